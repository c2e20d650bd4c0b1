/*
 * cow.h - backend: a base image that never changes, and an overlay that takes the writes.
 */
#ifndef XNBD_COW_H
#define XNBD_COW_H

#include <stdbool.h>

#include "backend.h"

struct cow_options {
	const char *base;	/* path of the base image */
	const char *dir;	/* where the throw-away overlay goes, NULL: beside the base */
	const char *file;	/* of an overlay that is kept, its map in FILE.map; or NULL */
	bool readonly;
};

/* NULL after logging why not.  The close operation commits an overlay that is kept. */
struct backend *cow_open(const struct cow_options *o);

#endif
