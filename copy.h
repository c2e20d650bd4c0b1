/*
 * copy.h - the background copy: brings what is missing from the origin.
 *
 * Clients' misses go first.  What the origin knows to be zeros is not transferred.
 */
#ifndef XNBD_COPY_H
#define XNBD_COPY_H

#include <stdbool.h>
#include <stdint.h>

#include "fetch.h"

enum copy_state { COPY_IDLE, COPY_RUNNING, COPY_DONE, COPY_FAILED };

enum {
	COPY_FAILURES = 256,		/* that are kept */
	COPY_EXTENTS = 1024,		/* in an answer */
};

struct copy_status {
	enum copy_state state;
	int error;			/* COPY_FAILED: why, an errno; 0 if blocks failed */
	uint64_t rate;			/* bytes per second */
	uint64_t failed_blocks;
	unsigned failures;
	uint64_t failures_more;		/* that were not kept */
	struct span failure[COPY_FAILURES];	/* where blocks could not be delivered */
};

struct copy {
	struct fetcher *fetcher;
	struct layer *layer;		/* the fetcher's */
	struct lane lane;		/* of the job, which is alone there */
	struct job job;

	pthread_mutex_t lock;		/* guards what follows; a leaf */
	unsigned wanted;		/* by so many */
	struct copy_status status;
	uint64_t request_bytes;
	unsigned under_way, window;	/* requests; the window counts in thirds */
	bool rests;			/* the job: it is to be submitted when requests have ended */
	uint64_t least_delay;		/* microseconds; 0: not known */
	uint64_t copied, rate_since;	/* bytes since then; now_ms() */

	/* The job's own. */
	uint64_t off;			/* this pass has asked for what lies before */
	bool by_units;			/* it is the second one */
	struct origin_request question;	/* about what follows, with the last answer */
	struct extent extent[COPY_EXTENTS];	/* of that */
};

/* It is all zero before, and must last until neither the origin nor workers are left. */
void copy_init(struct copy *c, struct fetcher *f);

/*
 * Begin, or go on with, copying what is missing, in requests of at most that many bytes, 0 for
 * the default; until it has ended, or copy_release() was called as often.  The main thread is
 * woken when it has ended.
 */
void copy_start(struct copy *c, uint64_t request_bytes);

/* One who has started it does not want it any more; or, all, nobody does. */
void copy_release(struct copy *c, bool all);

void copy_status(struct copy *c, struct copy_status *status);

#endif
