/*
 * order.h - changes of an image that are under way, and the order in which they end.
 *
 * Changes that overlap end as if they had been carried out in the order in which the server took
 * them from the sockets:
 *
 *	- A change that is stored takes its range away from every older one that has not begun there.
 *	  So an older change never lands over a newer one, whatever it waits for meanwhile.
 *	- A change waits for local I/O that is under way on the blocks of its range, for nothing else.
 *
 * I/O under way excludes all other I/O on the same blocks: who has begun may read, merge and write
 * whole blocks.  Each image has one order.  Ranges are bytes; len is not 0.
 */
#ifndef XNBD_ORDER_H
#define XNBD_ORDER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct span {
	uint64_t off, len;		/* bytes */
};

struct order {
	pthread_mutex_t lock;		/* guards what follows; emptied() is called with it */
	pthread_cond_t ended;		/* I/O has, that somebody waits for */
	struct change *first;		/* those that are registered, in any order */
	atomic_uint count;		/* how many */
	atomic_uint waiting;		/* threads in order_begin() or order_hold() */
	atomic_uint_least64_t taken;	/* grows by 2 for each change that is numbered */
	atomic_uint clients;		/* connections by which changes may come */
};

/* A change that is not done at once.  All zero is one that is not registered. */
struct change {
	struct order *order;		/* NULL: not registered */

	/*
	 * Called with the order's lock: nothing of it is left, so that it need not wait any more.
	 * May be called at any time while it is registered.
	 */
	void (*emptied)(struct change *);
	atomic_bool is_empty;		/* set before that call */

	/* The order's own. */
	struct change *next;
	uint64_t number;		/* an older change has a smaller one */
	struct span one, *left;		/* what is not stored yet, by position; left may be &one */
	unsigned count, room;
	struct span active;		/* I/O is under way here; len is 0 if there is none */
	bool hold;			/* of order_hold(): nothing can be taken from it */
	bool pending;			/* a hold that waits for older I/O to end */
	int error;			/* it cannot go on, -errno */
};

void order_init(struct order *o);
void order_destroy(struct order *o);

/* Main thread, once: up to that many threads will call order_enter().  False if out of memory. */
bool order_prepare(unsigned threads);
void order_unprepare(void);

/*
 * A loop's thread is about to change a range at once.  False if that would mean to wait.  In both
 * cases order_register() may follow, and order_leave() must.
 */
bool order_enter(struct order *o, uint64_t len, uint64_t off);

/* The change that has entered is not done at once: it keeps its place in the order. */
void order_register(struct order *o, struct change *c, uint64_t len, uint64_t off);

/* stored: the range is.  (A TRIM need not be.) */
void order_leave(struct order *o, bool stored);

/*
 * Begin with a part of what is left of a registered change, at most max bytes.  1, and the part; 0
 * if nothing is left; -EAGAIN if it would have to wait for I/O and wait is not set; or an error.
 */
int order_begin(struct change *c, uint64_t max, bool wait, struct span *part);

/* That I/O has ended.  done: it need not be done again; stored: its data is in the image. */
void order_end(struct change *c, bool done, bool stored);

/* The change, or hold, is over: its memory may go away.  What is not registered is left as it is. */
void order_remove(struct change *c);

/*
 * Be alone with a range for a while, without changing what the order is about: to store fetched
 * blocks, to copy old ones; until order_remove().  False if it would have to wait, and wait is not set.
 */
bool order_hold(struct order *o, struct change *c, uint64_t len, uint64_t off, bool wait);

#endif
