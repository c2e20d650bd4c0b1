/*
 * disk.h - a raw image file or a block device, and the backend that serves it.
 *
 * Ranges lie inside the disk.  Those functions that take an enum how do not block when it is
 * TRY and return -EAGAIN instead; the others may block on local disk.  All may be called by
 * several threads at the same time.  Errors are -errno.
 */
#ifndef XNBD_DISK_H
#define XNBD_DISK_H

#include "backend.h"

struct disk;

/*
 * Create a sparse image of size bytes at path unless something is there already.  False after
 * logging why it could not.  Durable when it returns.
 */
bool disk_create(const char *path, uint64_t size);

/*
 * Open the image at path.  NULL after logging why it could not, with hints at options of a target
 * that may help.
 */
struct disk *disk_open(const char *path, bool readonly, bool hints);

/* Log that the image is empty, or has a format of its own, which clients will see. */
void disk_look(struct disk *d, const char *path);

/*
 * Make a disk of an open image of that size; takes fd over, also
 * when it fails.  NULL as above.
 */
struct disk *disk_adopt(int fd, uint64_t size, bool readonly);

/* Use the first size bytes only.  False after logging that there are less; path is for the log. */
bool disk_limit(struct disk *d, const char *path, uint64_t size);

/* NULL is allowed. */
void disk_close(struct disk *d);

/* The backend that serves the disk and nothing else; its close operation is disk_close(). */
struct backend *disk_backend(struct disk *d);

uint64_t disk_size(const struct disk *d);

/* The order of changes of the image, which is one for all disks that have it open. */
struct order *disk_order(struct disk *d);

int disk_read(struct disk *d, uint8_t *buf, uint64_t len, uint64_t off, enum how how);

/* Whoever changes a range has begun with it in the image's order. */
int disk_write(struct disk *d, const uint8_t *buf, uint64_t len, uint64_t off, enum how how);

/* Zero a range; of flags, NO_HOLE and FAST_ZERO count. */
int disk_zero(struct disk *d, uint64_t len, uint64_t off, unsigned flags);

/* Punch out a range of whole blocks; -EOPNOTSUPP where there are no holes. */
int disk_trim(struct disk *d, uint64_t len, uint64_t off);

void disk_prefetch(struct disk *d, uint64_t len, uint64_t off);

/* The run at pos: its status, and its length, which ends at end at the latest. */
struct extent disk_extent(struct disk *d, uint64_t pos, uint64_t end);

/* The runs of a range, at most max: how many, and they end before the range if there are more. */
unsigned disk_extents(struct disk *d, struct extent *extent, unsigned max, uint64_t len,
		      uint64_t off);

/* Whether it is a file, which has a place beside it, and not a device. */
bool disk_is_file(const struct disk *d);

/* Whether both are the same file or device. */
bool disk_is_same(const struct disk *a, const struct disk *b);

/*
 * Make the file fd share all blocks of the image.  0; -EOPNOTSUPP where the file system cannot; or
 * another -errno.
 */
int disk_clone(struct disk *d, int fd);

/*
 * Call before_change() for each range that is about to change: 0, or -EAGAIN for TRY.  NULL for no
 * call.  While nobody changes the disk.
 */
struct disk_hook {
	int (*before_change)(struct disk_hook *, uint64_t len, uint64_t off, enum how how);
};
void disk_set_hook(struct disk *d, struct disk_hook *hook);

/*
 * fdatasync().  An error belongs to the image: once there was one, every later call fails, of all
 * disks that have the image open.
 */
int disk_sync(struct disk *d);

/* The same without making anything durable: whether the kernel could not store something. */
int disk_check(struct disk *d);

/* That error, or 0. */
int disk_error(const struct disk *d);

#endif
