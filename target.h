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

/*
 * On the base image of that path.  The overlay is file, which is kept, its map in FILE.map; or, if
 * that is NULL, it is thrown away, and lies in dir, NULL: beside the base.  NULL after logging why not.
 */
struct backend *cow_open(const char *base, const char *file, const char *dir, bool readonly);

#endif
