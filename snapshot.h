/*
 * snapshot.h - a copy of an image as it was at one instant, made while clients write to it.
 *
 * The main thread calls all functions but snapshot_before_change().
 */
#ifndef XNBD_SNAPSHOT_H
#define XNBD_SNAPSHOT_H

#include <stdbool.h>
#include <stdint.h>

#include "backend.h"

struct disk;
struct snapshot;

/*
 * Prepare a snapshot IMAGE.snapshot.<seconds> of the disk, whose image has that path from the
 * root.  ended is called by the snapshot's thread when it has ended.  NULL after logging why
 * not, which *why tells.
 */
struct snapshot *snapshot_new(struct disk *d, const char *image, void (*ended)(void),
			      const char **why);

/* The instant.  Nobody may be changing the disk: the gate is closed. */
void snapshot_take(struct snapshot *s);

/* Copy what is needed, in a thread.  The gate may be open. */
void snapshot_start(struct snapshot *s);

/* Whether it has ended, well or not: then it can be freed at once. */
bool snapshot_is_over(const struct snapshot *s);

/* When it is over: its path; or NULL, and why there is none. */
const char *snapshot_path(const struct snapshot *s, const char **why);

/* Give up. */
void snapshot_abandon(struct snapshot *s);

/* Waits for its end.  Nobody may be changing the disk.  NULL is allowed. */
void snapshot_free(struct snapshot *s);

/*
 * A range of the disk is about to change: copy what the snapshot still needs of it.  0, or
 * -EAGAIN for TRY; that the copy fails harms the snapshot only.  Any thread.
 */
int snapshot_before_change(struct snapshot *s, uint64_t len, uint64_t off, enum how how);

#endif
