/*
 * target.h - backends: an image alone, or a base image that never changes with an overlay that
 * takes the writes.
 */
#ifndef XNBD_TARGET_H
#define XNBD_TARGET_H

#include <stdbool.h>

#include "backend.h"

struct disk;

/* The disk is taken over.  Both are for the start: without memory the program ends. */
struct backend *target_open(struct disk *d, bool readonly);

struct cow_options {
	const char *base;	/* path of the base image */
	const char *dir;	/* where the throw-away overlay goes, NULL: beside the base */
	const char *file;	/* of an overlay that is kept, its map in FILE.map; or NULL */
	bool readonly;
};

/* NULL after logging why not.  The close operation commits an overlay that is kept. */
struct backend *cow_open(const struct cow_options *o);

#endif
