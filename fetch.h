/*
 * fetch.h - blocks on their way from the origin into the cache image, and requests that wait for them.
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
	FETCH_REGION = 32 * 1024 * 1024,	/* a fetch lies within a region: its most */
	FETCH_BUCKETS = 64,
};

struct fetcher {
	struct layer *layer;
	struct origin *origin;
	atomic_bool cannot_store;	/* has been logged */
	atomic_uint demanded;		/* fetches for clients that wait */
	pthread_mutex_t lock;		/* guards what follows, and requests that wait; a leaf */
	struct fetch *bucket[FETCH_BUCKETS];	/* what is fetched for clients, by region */
	struct lane lane;		/* of what workers store */
};

void fetcher_init(struct fetcher *f, struct layer *layer, struct origin *origin);

/* When nothing is being fetched any more. */
void fetcher_destroy(struct fetcher *f);

/* What the origin's requests begin and end at: a multiple of its smallest block and of ours. */
uint64_t fetch_unit(const struct fetcher *f);

/* The most of len bytes at off, a multiple of the unit, that one request of max bytes can have. */
uint64_t fetch_fit(const struct fetcher *f, uint64_t len, uint64_t off, uint64_t max);

/*
 * Fetch a range that is as fetch_fit() makes it, for the background copy.  done(arg) is called by
 * any thread, and must not block: error is 0, the origin's, or why the data could not be stored,
 * and then ask->error is 0.  0 or -ENOMEM.
 */
int fetch_copy(struct fetcher *f, uint64_t len, uint64_t off,
	       void (*done)(void *arg, const struct origin_request *ask, int error), void *arg);

/*
 * Let a client's request wait for what is not held of n spans.  A READ up to READ_PIECE, whose
 * span is its range, is then done, with its data; a BLOCK_STATUS, with what the origin tells of its
 * span, which is a multiple of the origin's smallest block but at the end of the disk, in r->extent,
 * with room for r->extents; everything else is carried out again.  An error of the origin is its
 * answer.  What a sequential reader will want next is fetched ahead of it.  Returns the outcome of
 * r's fetch operation.
 */
int fetch_wait(struct fetcher *f, struct request *r, const struct span *span, unsigned n,
	       enum how how);

/* Let a request that waits go.  False if it is on its way back, or does not wait.  Any thread. */
bool fetch_take_back(struct fetcher *f, struct request *r);

#endif
