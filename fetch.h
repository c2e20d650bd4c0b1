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
	FETCH_REGION = 32 * 1024 * 1024,	/* a fetch lies within a region: its most */
	FETCH_BUCKETS = 64,
};

struct fetcher {
	struct layer *layer;
	struct origin *origin;
	atomic_uint_least64_t failed;	/* now_ms() when storing failed last; 0: that is over */
	atomic_uint demanded;		/* fetches for clients that wait */
	pthread_mutex_t lock;		/* guards what follows, and requests that wait; a leaf */
	struct fetch *bucket[FETCH_BUCKETS];	/* what is fetched for clients, by region */
	struct lane lane;		/* of what workers store */

	/*
	 * What fetch_copy() asked for is here, and stored.  Any thread; it must not block.  error is
	 * 0; or the origin's; or why the data could not be stored, and then ask->error is 0.
	 */
	void (*copied)(void *copy, const struct origin_request *ask, int error);
	void *copy;
};

/* It is all zero before. */
void fetcher_init(struct fetcher *f, struct layer *layer, struct origin *origin);

/*
 * Fetch the beginning of a run that is not held, up to max bytes of it, in one request, for the
 * background copy.  Returns how many bytes that are, 0 if out of memory.
 */
uint64_t fetch_copy(struct fetcher *f, uint64_t len, uint64_t off, uint64_t max);

/*
 * Let a client's request wait for the first of r->at that it lacks.  The origin's error is its answer.
 *
 *	READ up to READ_PIECE	goes on behind that, and is done with its data at the end
 *	longer READ, CACHE	go on behind that, and are carried out again
 *	BLOCK_STATUS		is done with what the origin tells, in r->extent
 *	a change		is carried out again
 *
 * What a sequential reader will want next is fetched ahead of it.  Returns the outcome of r's fetch
 * operation.
 */
int fetch_wait(struct fetcher *f, struct request *r, enum how how);

/* Let a request that waits go.  False if it is on its way back, or does not wait.  Any thread. */
bool fetch_take_back(struct fetcher *f, struct request *r);

#endif
