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
	FETCH_STREAMS = 8,			/* sequential readers that are told from others */
};

struct fetch;

/* Somebody who reads one piece after the other. */
struct stream {
	uint64_t next;			/* where the next read is expected */
	uint64_t end;			/* up to here all has been asked for */
	uint64_t window;		/* bytes to be ahead */
	unsigned reads;			/* that were where they were expected */
	uint64_t used;			/* when it was last: a count of reads */
};

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
	struct stream stream[FETCH_STREAMS];
	uint64_t reads;			/* of streams */
};

/* Something that waits for a range that is being fetched. */
struct waiter {
	struct waiter *next;
	struct fetch *fetch;		/* the fetcher's; NULL: it is being told */
	uint64_t off, len;

	/*
	 * Called by a worker or the origin's thread; must not block.  With buf, the range's bytes
	 * as the origin has them; error tells then why they could not be stored, or is 0.  Without:
	 * error is the origin's, or -EAGAIN: more than the range was asked for, and less may
	 * succeed.  True if buf has been taken over, from buffer_get(w->len); only if whole is set.
	 */
	bool (*done)(struct waiter *w, uint8_t *buf, bool whole, int error);
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

/*
 * A client's read found blocks that were not held.  What a sequential reader will want next is
 * fetched ahead of it.  Does not block.
 */
void fetch_missed(struct fetcher *f, uint64_t len, uint64_t off);

/*
 * A client's request that waits for blocks.  When all has arrived a READ up to READ_PIECE is done,
 * with its data, and everything else is carried out again.  An error is its answer.
 */
struct miss;

/* Begin; or NULL if out of memory. */
struct miss *miss_new(struct fetcher *f, struct request *r);

/*
 * Wait for the beginning of a range, which for a READ is a part of r's.  Returns how many bytes that
 * are, 0 if the first block is held now, or -ENOMEM.
 */
int64_t miss_add(struct miss *m, uint64_t len, uint64_t off);

/* Memory for the answer to a READ, which may be put there before miss_wait(); or NULL. */
uint8_t *miss_buffer(struct miss *m);

/*
 * All is added.  Returns the outcome of r's fetch operation: PENDING; or err, if it is set, or nothing
 * was added.  In any other case than PENDING it waits for nothing any more.
 */
int miss_wait(struct miss *m, int err);

/* Let a request that waits go.  False if it is on its way back, or does not wait.  Any thread. */
bool fetch_take_back(struct fetcher *f, struct request *r);

/*
 * Let a BLOCK_STATUS wait for the origin's answer; there is room for max extents.  PENDING, or
 * -ENOMEM, or -ECANCELED.
 */
int fetch_extents(struct fetcher *f, struct request *r, uint64_t len, unsigned max);

#endif
