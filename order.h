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
 * I/O under way excludes all other I/O on the same blocks: a change that has begun may read, merge
 * and write whole blocks.  Each image has one order.  Ranges are bytes; len is not 0.
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
	pthread_mutex_t lock;		/* guards the list; emptied() is called with it */
	pthread_cond_t ended;		/* some I/O has */
	struct change *first;		/* those that are under way, the newest first */
	atomic_uint clients;		/* connections by which changes may come */
};

/* All zero is one that is not under way. */
struct change {
	struct order *order;		/* NULL: not under way */

	/*
	 * Called with the order's lock: nothing of it is left, so that it need not wait any more.
	 * May be called at any time while it is under way.
	 */
	void (*emptied)(struct change *);
	atomic_bool is_empty;		/* set before that call */

	/* The order's own. */
	struct change *next;
	struct span one, *left;		/* what is not stored yet, by position; left may be &one */
	unsigned count, room;
	struct span active;		/* I/O is under way here; len is 0 if there is none */
	int error;			/* it cannot go on, -errno */
};

/* It is all zero before. */
void order_init(struct order *o);
void order_destroy(struct order *o);

/*
 * Begin with a part of what is left of a change, at most max bytes.  The first time it takes its
 * place in the order, and *part has all of its range.  1, and the part; 0 if nothing is left;
 * -EAGAIN if it would have to wait for I/O and wait is not set; or an error.
 */
int order_begin(struct order *o, struct change *c, uint64_t max, bool wait, struct span *part);

/*
 * That I/O has ended.  done: it need not be done again; stored: its data is in the image.  (A TRIM
 * need not be.)  A change of which nothing is left then is not under way any more.
 */
void order_end(struct change *c, bool done, bool stored);

/* The change, or hold, is over.  What is not under way is left as it is. */
void order_remove(struct change *c);

/*
 * Be alone with a range for a while, without changing what the order is about: to store fetched
 * blocks, to copy old ones; until order_remove().  False if it would have to wait and wait is unset.
 */
bool order_hold(struct order *o, struct change *c, uint64_t len, uint64_t off, bool wait);

#endif
