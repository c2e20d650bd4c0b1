/*
 * layer.h - an image that holds some of the blocks of a disk, and a bit for each that it holds.
 *
 * The other blocks are elsewhere: in the base image of a copy-on-write target, or at a proxy's
 * origin.  A bit is set after the block's data is in the image, all of it, and is never taken
 * back.  Ranges lie inside the disk; len is not 0.  Any thread may call all of it.
 */
#ifndef XNBD_LAYER_H
#define XNBD_LAYER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend.h"
#include "bitmap.h"
#include "commit.h"
#include "disk.h"

struct layer {
	struct backend *backend;	/* that serves it: its requests fail when stable storage has */
	uint64_t size;			/* of the disk in bytes */
	struct disk *disk;		/* the image */
	struct bitmap *map;
	struct disk *base;		/* has the other blocks; NULL: whoever writes brings them */
	bool durable;			/* the map is a file, and bits have to be committed */
	atomic_size_t brought;		/* blocks that are held, but not by a client of this run */
	atomic_uint spoilt;		/* blocks without a bit have got data that is worth nothing */
	atomic_bool completing;		/* layer_complete() */
	unsigned spoilt_before;		/* the last layer_zero_missing() */
	struct committer committer;
};

/* Only size has to be set before; disk, map and base are, when they are open. */
void layer_init(struct layer *l, struct backend *backend, uint64_t size, const char *what);

/* All is open: what a killed server set and did not commit is committed soon. */
void layer_begin(struct layer *l);

/* Close the image, the map and the base, those that are there. */
void layer_destroy(struct layer *l);

/* Commit for the last time, on this thread: then the map is marked clean.  0 or -errno. */
int layer_finish(struct layer *l);

/* The length of the run at off, at most len bytes, that is in the same place: held or not. */
uint64_t layer_run(const struct layer *l, uint64_t len, uint64_t off, bool *held);

/* Whether all of the range is held. */
bool layer_holds(const struct layer *l, uint64_t len, uint64_t off);

/* The number of blocks that are not held.  Costs nothing. */
uint64_t layer_missing(const struct layer *l);

/* The number of blocks that are held since clients changed them, in this run. */
uint64_t layer_written(const struct layer *l);

/* Bytes from off to the next block boundary, at most len. */
uint64_t layer_head(uint64_t len, uint64_t off);

/* How many of len bytes at off are whole blocks, from the beginning on. */
uint64_t layer_whole(const struct layer *l, uint64_t len, uint64_t off);

/*
 * Change a range, for a client, which has begun with it in the image's order.  A block of which a
 * part is changed must be held, or there must be a base to take the rest from.  0, -errno, or
 * -EAGAIN for TRY.
 */
int layer_write(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how);

/* The same for zeros; flags as in disk_zero().  Blocks. */
int layer_zero(struct layer *l, uint64_t len, uint64_t off, unsigned flags);

/* A range of whole blocks becomes a hole; -EOPNOTSUPP where there are none.  Blocks. */
int layer_trim(struct layer *l, uint64_t len, uint64_t off);

/*
 * Hold what is not held of a range of whole blocks; what is held stays as it is.  buf has the
 * bytes of the range; NULL means zeros, which blocks.  0, -errno, or -EAGAIN for TRY.
 */
int layer_fill(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how);

/*
 * Store zeros in all blocks that are not held, without holding them: layer_complete() may follow.
 * A worker's; it ends early, with -ECANCELED, when *stop is set.  0 or -errno.
 */
int layer_zero_missing(struct layer *l, const atomic_bool *stop);

/*
 * Hold all blocks, at one instant, on stable storage, after a flush by r.  What was not held reads as
 * zeros then, if layer_zero_missing() has succeeded.  r is done with an error if that failed, and
 * then nothing has changed.  PENDING.
 */
int layer_complete(struct layer *l, struct request *r);

/* The flush operation of a backend. */
int layer_flush(struct layer *l, struct request *r);

#endif
