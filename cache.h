/*
 * cache.h - backend: the proxy.  Blocks are cached in an image, the others are at the origin.
 */
#ifndef XNBD_CACHE_H
#define XNBD_CACHE_H

#include <stdbool.h>

#include "backend.h"
#include "copy.h"
#include "origin.h"

struct cache_options {
	const char *image;		/* path of the cache image, a file or a block device */
	const char *bitmap;		/* path of its bitmap file */
	bool clear;			/* forget what is cached */
	bool readonly;
};

/* Takes origin over, also when it fails.  NULL after logging why not. */
struct backend *cache_open(const struct cache_options *o, struct origin *origin);

/* All of these are for the backend that cache_open() returned. */

/* The image, which the backend keeps; when all blocks are held it is the disk. */
struct disk *cache_disk(struct backend *b);

struct origin *cache_origin(struct backend *b);
struct copy *cache_copy(struct backend *b);

struct cache_status {
	uint64_t blocks, held;		/* of the disk; in the image */
	uint64_t written;		/* by clients of this run, and held since */
	unsigned per_mille;		/* held, rounded down: 1000 means all */
};

void cache_status(struct backend *b, struct cache_status *status);

/* The following are the main thread's. */

/*
 * Become a target, if all blocks are held, or, by force, as if the others were zeros.  NULL if that
 * has begun, or was under way, or why not.
 */
const char *cache_switch(struct backend *b, bool force);

/* Whether it has become a target. */
bool cache_is_target(struct backend *b);

struct cache_news {
	bool switched;			/* a switch has: */
	char error[128];		/* why it failed; "": it did not */
	uint64_t zeroed;		/* blocks that were missing and read as zeros now */
};

/* What has ended since the last call; the main thread is woken for that. */
void cache_tend(struct backend *b, struct cache_news *news);

/* The server stops: no more copying, nor switching. */
void cache_stop(struct backend *b);

/* End the origin: nothing is on its way any more, but with workers. */
void cache_end(struct backend *b);

#endif
