/*
 * cache.h - backend: the proxy.  Blocks are cached in an image, the others are at the origin.
 */
#ifndef XNBD_CACHE_H
#define XNBD_CACHE_H

#include <stdbool.h>

#include "copy.h"

/* The main thread may look at all of it but for what belongs to the switch. */
struct cache {
	struct layer layer;		/* the first: its backend is the export's */
	struct origin *origin;
	struct fetcher fetcher;
	struct copy copy;

	/*
	 * The switch.  A worker stores zeros where nothing is held, which only force allows.  Then
	 * all becomes durable, and all blocks are held; then the main thread lets the origin go.
	 */
	bool switching, switched;	/* the main thread's; switched: it is a target */
	struct job job;
	int error;			/* of the last one, an errno */
	const char *step;		/* the one that is under way, or has failed */
	uint64_t zeroed;		/* blocks that were missing, and read as zeros now */
	atomic_bool switch_done;
	atomic_bool stopping;		/* zero no more */
};

/*
 * A cache in an image, a file or a block device, with a bitmap file; if clear is set, what is cached is
 * forgotten.  The origin must outlive the workers, and is the caller's to close.  NULL after logging
 * why not.
 */
struct cache *cache_open(const char *image, const char *bitmap, bool clear, bool readonly,
			 struct origin *origin);

struct cache_status {
	uint64_t blocks, held;		/* of the disk; in the image */
	unsigned per_mille;		/* held, rounded down: 1000 means all */
};

void cache_status(const struct cache *c, struct cache_status *status);

/* The following are the main thread's. */

/*
 * Become a target, if all blocks are held, or, by force, as if the others were zeros.  NULL if that
 * has begun, or was under way, or why not.
 */
const char *cache_switch(struct cache *c, bool force);

/*
 * Whether a switch has ended since the last call; the main thread is woken for that.  *error is
 * NULL, or why it failed.
 */
bool cache_switch_ended(struct cache *c, const char **error);

/* The server stops: no more copying, nor switching. */
void cache_stop(struct cache *c);

#endif
