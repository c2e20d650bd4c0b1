/*
 * layer.h - an image that holds blocks of a disk, all or some, and makes them durable.
 *
 * Of a plain target it holds all.  Else the other blocks are in the base image of a copy-on-write
 * target, or at a proxy's origin, and there is a bit for each that is held.  It is set after the
 * block's data is in the image, all of it, and is never taken back.  Ranges lie inside the disk;
 * len is not 0.  Any thread may call all of it.
 */
#ifndef XNBD_LAYER_H
#define XNBD_LAYER_H

#include "backend.h"
#include "bitmap.h"
#include "disk.h"

struct layer {
	struct backend backend;		/* the first: it stands for the layer */
	uint64_t size;			/* of the disk in bytes */
	const char *what;		/* for the log */
	struct disk *disk;		/* the image */
	struct bitmap *map;		/* NULL: all blocks are held */
	struct disk *base;		/* has the other blocks; NULL: whoever writes brings them */
	bool durable;			/* the map is a file, and bits have to be committed */
	atomic_size_t brought;		/* blocks that are held, but not by a client of this run */
	atomic_bool spoilt;		/* blocks without a bit were, since layer_zero_missing() */

	/* Commits, one at a time. */
	struct lane commits;
	atomic_uint_least64_t begun;	/* how many have begun */
	int result;			/* of the last one; only jobs of the lane know it */
	bool told;			/* the log was, of an error of the moment; likewise */
	atomic_bool lost;		/* something never will be durable */
	atomic_bool soon;		/* timer is with the workers */
	struct job timer;
};

/*
 * All is open; size, disk, map, base and durable are set, and the backend's source if it has one; the
 * rest is zero.  The backend's operations work from then on.  Without a base, what a read finds not
 * held is ABSENT, and so is, to a change, what layer_lacks() tells.  What a killed server set and
 * did not commit is committed soon.
 */
void layer_begin(struct layer *l, bool readonly, const char *what);

/* After a failed start: close the image, the map and the base, and free what begins with l. */
void layer_free(struct layer *l);

/* The length of the run at off, at most len bytes, that is in the same place: held or not. */
uint64_t layer_run(const struct layer *l, uint64_t len, uint64_t off, bool *held);

/* Whether all of the range is held. */
bool layer_holds(const struct layer *l, uint64_t len, uint64_t off);

/* A byte in a block that is not held, and of which a change of the range keeps a part; or none. */
struct span layer_lacks(const struct layer *l, uint64_t len, uint64_t off);

/* The number of blocks that are not held.  Costs nothing. */
uint64_t layer_missing(const struct layer *l);

/* The number of blocks that are held since clients changed them, in this run. */
uint64_t layer_written(const struct layer *l);

/* How many of len bytes at off are whole blocks, from the beginning on. */
uint64_t layer_whole(const struct layer *l, uint64_t len, uint64_t off);

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
 * Hold all blocks, at one instant, on stable storage.  What was not held reads as zeros then, if
 * layer_zero_missing() has succeeded.  For a job in the lane of the commits.  0; or -errno, and then
 * nothing has changed.
 */
int layer_complete(struct layer *l);

#endif
