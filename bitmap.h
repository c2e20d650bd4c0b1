/*
 * bitmap.h - which blocks of a disk are held elsewhere: in memory, or in a durable file.
 *
 * A bit goes from 0 to 1 and never back.  All functions but those that open and close may be
 * called by several threads at the same time.
 */
#ifndef XNBD_BITMAP_H
#define XNBD_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

struct bitmap;
struct disk;

/* What a bitmap file belongs to.  The numbers are part of its format: xnbd-bitmap(5). */
enum bitmap_kind {
	BITMAP_OVERLAY = 1,	/* of a copy-on-write target */
	BITMAP_CACHE = 2,	/* of a proxy */
};

struct bitmap_identity {
	enum bitmap_kind kind;
	uint64_t disk_size;	/* bytes */
	uint64_t fingerprint;	/* of the base image; 0 where there is none */
	const char *image;	/* path of the file or device that holds the blocks; it may not be there yet */
};

/* The blocks of a disk of size bytes, the last of which may be a part of one. */
uint64_t bitmap_blocks(uint64_t size);

/* FNV-1a of more bytes, which begins with BITMAP_CHECKSUM. */
#define BITMAP_CHECKSUM UINT64_C(0xcbf29ce484222325)
uint64_t bitmap_checksum(uint64_t h, const uint8_t *p, uint64_t size);

/* In memory, all 0, gone when it is closed.  NULL if out of memory. */
struct bitmap *bitmap_new(uint64_t blocks);

/*
 * Open the file at path, or create it, and lock it until it is closed.  If clear is set, whatever
 * is there is forgotten.  NULL after logging what is wrong with it.
 */
struct bitmap *bitmap_open(const char *path, const struct bitmap_identity *id, bool clear);

/* NULL is allowed.  Does not commit. */
void bitmap_close(struct bitmap *b);

/*
 * The number of blocks from blk on, at most max, that have the same bit; *set is that bit.
 * A reader of a bit also sees what was written before it was set.
 */
uint64_t bitmap_run(const struct bitmap *b, uint64_t blk, uint64_t max, bool *set);

/*
 * Set n bits, whose blocks' data has been stored.  In a file they are recorded first, so that they
 * outlive the process.  0, or -errno and then some may not be set; -EAGAIN, without wait, while
 * another thread is recording some.
 */
int bitmap_set(struct bitmap *b, uint64_t blk, uint64_t n, bool wait);

/* How many bits are set. */
uint64_t bitmap_count(const struct bitmap *b);

/* What the header tells.  The numbers are part of the format. */
enum bitmap_flag {
	BITMAP_FAILED = 1,	/* stable storage has: only the committed map is to be believed */
	BITMAP_WHOLE = 2,	/* all blocks are held, whatever the bits say */
	BITMAP_WRITTEN = 4,	/* a client changes the disk */
};

/*
 * Set a flag in the file and then in memory; if durable, on stable storage in between.  In memory
 * alone there are none.  0 or -errno.
 */
int bitmap_tell(struct bitmap *b, enum bitmap_flag flag, bool durable);

/*
 * Make durable what was set before the call, and first the image, which has the data that the bits
 * speak of.  One thread at a time.  0 or -errno.
 */
int bitmap_commit(struct bitmap *b, struct disk *image);

/* Whether the file is not on stable storage, and never will be; other errors may pass. */
bool bitmap_has_failed(const struct bitmap *b);

/* After a commit, when no bit will be set any more: mark the file so.  0 or -errno. */
int bitmap_mark_clean(struct bitmap *b);

#endif
