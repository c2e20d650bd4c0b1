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
	void (*copied)(void);		/* the background copy has ended; any thread */
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
	uint64_t written;		/* blocks that are held since clients wrote them, in this run */
};

void cache_status(struct backend *b, struct cache_status *status);

/*
 * A forced switch: store zeros where nothing is held, which cache_complete() makes what is read there.
 * A worker's.  0 or -errno; *zeroed is set to the number of blocks.
 */
int cache_zero_missing(struct backend *b, uint64_t *zeroed);

/* The server stops: it ends soon, with -ECANCELED. */
void cache_stop_zeroing(struct backend *b);

/* All blocks are held when r is done without an error: see layer_complete(). */
void cache_complete(struct backend *b, struct request *r);

#endif
