/*
 * copy.h - the background copy: brings what is missing from the origin.
 *
 * Clients' misses go first.  What the origin knows to be zeros is not transferred.
 */
#ifndef XNBD_COPY_H
#define XNBD_COPY_H

#include <stdbool.h>
#include <stdint.h>

#include "order.h"

struct copy;
struct fetcher;

enum copy_state { COPY_IDLE, COPY_RUNNING, COPY_DONE, COPY_FAILED };

enum { COPY_FAILURES = 256 };	/* that are kept */

struct copy_status {
	enum copy_state state;
	int error;			/* COPY_FAILED: why, an errno; 0 if blocks failed */
	uint64_t rate;			/* bytes per second */
	uint64_t failed_blocks;
	unsigned failures;
	uint64_t failures_more;		/* that were not kept */
	struct span failure[COPY_FAILURES];	/* where blocks could not be delivered */
};

/* At the start of the program. */
struct copy *copy_new(struct fetcher *f);

/* When neither the origin nor workers are left. */
void copy_free(struct copy *c);

/*
 * Begin, or go on with, copying what is missing, in requests of at most that many bytes, 0 for
 * the default; until it has ended, or copy_release() was called as often.  The main thread is
 * woken when it has ended.
 */
void copy_start(struct copy *c, uint64_t request_bytes);
void copy_release(struct copy *c);

/* End it, whoever wants it. */
void copy_stop(struct copy *c);

void copy_status(struct copy *c, struct copy_status *status);

#endif
