/*
 * loop.h - one thread's poll(): descriptors with their handlers, deadlines, and a mailbox.
 *
 * But for loop_post() and loop_wake(), which any thread may call, all functions are called by the
 * loop's own thread, or while it has none.
 */
#ifndef XNBD_LOOP_H
#define XNBD_LOOP_H

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util.h"

struct source;

struct source_ops {
	/* What to poll() for; 0 for nothing, not even a hang-up. */
	short (*events)(const struct source *s);

	/* poll() saw revents; 0: it is due.  It may add and remove sources, itself included. */
	void (*turn)(struct source *s, short revents);
};

/* A descriptor that is polled.  It lies inside what it belongs to. */
struct source {
	const struct source_ops *ops;
	int fd;
	uint64_t due;		/* now_ms() of a turn without an event: 0 for soon, UINT64_MAX for never */
	size_t place;		/* the loop's: among the sources; */
	unsigned entry;		/* of those that poll() was asked about, 0 if it is none */
};

/* Something that other threads leave for a loop.  It lies inside what it is about. */
struct mail {
	struct mail *next;
	void (*deliver)(struct mail *m);	/* called by the loop's thread */
};

/*
 * A loop is woken by a byte in its pipe while it sleeps.  It says that it is about to sleep and
 * then looks whether it was rung; others ring and then look whether it sleeps.
 */
struct loop {
	atomic_bool rung, sleeping;
	int pipe[2];
	struct source **source;
	struct pollfd *pfd;	/* one more than sources: the pipe comes first */
	size_t count, room;
	uint64_t polled;	/* now_us() when poll() returned last */
	pthread_mutex_t lock;	/* guards mail; a leaf */
	struct mail *mail, **mail_end;
};

/* The main thread's; wake_main() ends its sleep. */
extern struct loop main_loop;
void wake_main(void);

/* 0 or -errno; loop_free() is due in any case.  The sources are their owners'. */
int loop_init(struct loop *l);
void loop_free(struct loop *l);

/* ops, fd and due are set.  False if out of memory. */
bool loop_add(struct loop *l, struct source *s);
void loop_remove(struct loop *l, struct source *s);

/* Have m delivered; in the order of these calls, and before the loop sleeps again. */
void loop_post(struct loop *l, struct mail *m);

/* End its sleep.  Keeps errno: signal handlers call it. */
void loop_wake(struct loop *l);

/* Deliver what was posted.  True if the loop was woken, by that or by loop_wake(). */
bool loop_deliver(struct loop *l);

/* Give sources that are due their turns. */
void loop_turn_due(struct loop *l);

/*
 * Give sources that are due their turns, sleep until something happens or now_ms() is due, then
 * give those their turns to whom it happened.
 */
void loop_poll(struct loop *l, uint64_t due);

#endif
