/*
 * loop.h - the threads that connections live on.
 */
#ifndef XNBD_LOOP_H
#define XNBD_LOOP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "conn.h"
#include "stats.h"
#include "util.h"

struct pollfd;
struct request;
struct tx;

enum {
	/*
	 * One recv() takes this much: a batch of requests, or a piece of a payload.  It goes
	 * behind what a connection kept, with as much room as is left: that of an option at
	 * least, unless whole requests are waiting there.
	 */
	LOOP_RX_CHUNK = 256 * 1024,
	LOOP_RX_BYTES = LOOP_RX_CHUNK + PROTO_OPTION_MAX + PROTO_OPTION_SIZE,
};

struct loop {
	pthread_t thread;

	/* What others leave for it. */
	pthread_mutex_t lock;		/* guards these; a leaf */
	struct conn *arriving;
	struct request *completed;	/* newest first */
	atomic_bool stop;
	atomic_bool surveyed;		/* loops_survey() */
	struct bell bell;		/* one of them is new */

	/* Its own, for its thread alone. */
	struct conn **conn;
	struct pollfd *pfd;		/* one more than conn: the bell comes first */
	size_t count, room;
	struct conn *dirty;		/* have replies to send */
	struct request *free;		/* to be used again */
	unsigned free_count;
	struct tx *tx;			/* the current turn's; empty between turns */
	uint8_t *rx;			/* LOOP_RX_BYTES, for the current turn */
	uint64_t polled;		/* now_us() when poll() returned last */
	uint64_t sweep_due;		/* at that time it looks who is silent */
	bool stopping;
	struct stats gone;		/* of clients that have left */
	unsigned spin_misses, spin_skip;	/* see spin() */

	atomic_size_t load;		/* connections, those arriving included; read by others */
};

/*
 * Start the first of at most max threads that serve.  A client whose host owes an answer for
 * keepalive seconds is gone; 0 for never.  The main thread is woken whenever a connection ends.
 * Main thread.  0 or -errno.
 */
int loops_init(unsigned max, unsigned keepalive);

/*
 * Give a connection to a loop, which owns it then; starts one if there is none idle, and the bound
 * and the system allow.  Main thread.
 */
void loops_add(struct conn *c);

/* Connections on all loops; those of clients that are not gone.  Any thread. */
size_t loops_load(void);
size_t loops_clients(void);

/* Let connections that a gate turned away, or that had no room, try again.  Any thread. */
void loops_wake(void);

/* Have each loop tell what its clients, and those that have left, did: see stats.h.  Main thread. */
void loops_survey(void);

/* Ask all connections to finish.  Does not wait. */
void loops_stop(void);

/* Wait for all threads to end, after loops_stop(). */
void loops_join(void);

/* Free everything, when no other thread can complete a request any more. */
void loops_free(void);

/* A request has come back: the done function of requests.  Any thread. */
void loop_complete(struct request *r);

/* For connections, on the loop's thread: a zeroed request, or NULL if out of memory. */
struct request *loop_request(struct loop *l);
void loop_release(struct loop *l, struct request *r);

#endif
