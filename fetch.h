/*
 * fetch.h - blocks on their way from the origin into the cache image, and who waits for them.
 *
 * That a block is on its way is known here and nowhere else; its bit says that it has arrived.
 */
#ifndef XNBD_FETCH_H
#define XNBD_FETCH_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "layer.h"
#include "origin.h"

enum {
	FETCH_MAX = 1024 * 1024,		/* bytes that are asked for at once for clients */
	FETCH_REGION = 32 * 1024 * 1024,	/* a fetch lies within a region: its most */
	FETCH_BUCKETS = 64,
};

struct fetch;

struct fetcher {
	struct layer *layer;
	struct origin *origin;
	atomic_bool cannot_store;	/* has been logged */
	atomic_uint demanded;		/* fetches that were begun for clients, who wait */
	pthread_mutex_t lock;		/* guards all that follows, and who waits; a leaf */
	struct fetch *bucket[FETCH_BUCKETS];	/* by region */
	struct fetch *arrived[ORIGIN_PRIORITIES];	/* to be stored, oldest first ... */
	struct fetch **last[ORIGIN_PRIORITIES];		/* ... and where the next one goes */
	bool storing;			/* job is with a worker */
	struct job job;
};

/* Who waits for a range that is being fetched. */
struct waiter {
	struct waiter *next;
	uint64_t off, len;

	/*
	 * Called by a worker or the origin's thread; must not block.  With buf, the range's bytes
	 * as the origin has them; error tells then why they could not be stored, or is 0.  Without:
	 * error is the origin's, or -EAGAIN: more than the range was asked for, and less may
	 * succeed.
	 */
	void (*done)(struct waiter *w, const uint8_t *buf, int error);
};

void fetcher_init(struct fetcher *f, struct layer *layer, struct origin *origin);

/* When nothing is being fetched any more. */
void fetcher_destroy(struct fetcher *f);

/*
 * Fetch a range, for the background copy, in one request.  w->off and w->len are set, to whole
 * blocks that are a multiple of the origin's smallest block; fetch_fit() makes them so.  0 or -ENOMEM.
 */
int fetch_copy(struct fetcher *f, struct waiter *w);

/* The most of len bytes at off that one request can have. */
uint64_t fetch_fit(const struct fetcher *f, uint64_t len, uint64_t off, uint64_t max);

/* Fetch what is not held of a range, nor on its way, since a client may want it soon. */
void fetch_ahead(struct fetcher *f, uint64_t len, uint64_t off);

/*
 * A client's request that waits for blocks.  It is done when all has arrived: a READ is answered,
 * everything else is carried out again, by a worker, and finds the blocks.  An error is its answer.
 */
struct miss;

/* Begin; or NULL if out of memory. */
struct miss *miss_new(struct fetcher *f, struct request *r);

/*
 * Wait for the beginning of a range, which for a READ is a part of r's, and is put into r->buf.
 * Returns how many bytes that are, 0 if the first block is held now, or -ENOMEM.
 */
int64_t miss_add(struct miss *m, uint64_t len, uint64_t off);

/*
 * All is added.  Returns the outcome of r's operation: PENDING, or err if nothing was added.  With
 * -EAGAIN it is carried out again, also if it is a READ.
 */
int miss_wait(struct miss *m, int err);

#endif
