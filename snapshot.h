/*
 * snapshot.h - a copy of an image as it was at one instant, made while clients write to it.
 *
 * The main thread calls all functions.
 */
#ifndef XNBD_SNAPSHOT_H
#define XNBD_SNAPSHOT_H

#include <stdbool.h>
#include <stdint.h>

#include "backend.h"

struct disk;
struct snapshot;

/*
 * Begin a snapshot IMAGE.snapshot.<seconds> of the disk, whose image has that path from the root.
 * When it has ended wake_main() is called.  NULL after logging why not, which *why says as well.
 */
struct snapshot *snapshot_new(struct disk *d, const char *image, const char **why);

/* Whether it has ended, well or not: then it can be freed at once. */
bool snapshot_is_over(const struct snapshot *s);

/* Of one that is over: the path of the file, or NULL and why there is none.  Both are lent. */
const char *snapshot_path(const struct snapshot *s, const char **why);

/* Give up. */
void snapshot_abandon(struct snapshot *s);

/* Waits for its end.  NULL is allowed. */
void snapshot_free(struct snapshot *s);

#endif
