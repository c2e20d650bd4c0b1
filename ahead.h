/*
 * ahead.h - read-ahead: what sequential readers of a proxy will want next is fetched before.
 */
#ifndef XNBD_AHEAD_H
#define XNBD_AHEAD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "fetch.h"

enum { AHEAD_STREAMS = 8 };

/* Somebody who reads one piece after the other. */
struct stream {
	uint64_t next;		/* where the next read is expected */
	uint64_t end;		/* up to here all has been asked for */
	uint64_t window;	/* bytes to be ahead */
	unsigned reads;		/* that were where they were expected */
	uint64_t used;		/* when it was last: a count of reads */
};

struct ahead {
	struct fetcher *fetcher;
	atomic_uint active;		/* streams that have a mark */
	atomic_size_t mark[AHEAD_STREAMS];	/* the block whose read lets the stream go on, 0: none */
	pthread_mutex_t lock;		/* guards what follows; a leaf */
	struct stream stream[AHEAD_STREAMS];
	uint64_t reads;
};

void ahead_init(struct ahead *a, struct fetcher *f);
void ahead_destroy(struct ahead *a);

/* A client's read found blocks that were not held. */
void ahead_missed(struct ahead *a, uint64_t len, uint64_t off);

/* A client's read found all blocks.  Does not block, and costs next to nothing. */
void ahead_hit(struct ahead *a, uint64_t len, uint64_t off);

#endif
