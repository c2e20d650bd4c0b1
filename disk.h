/*
 * disk.h - a raw image file or a block device.
 *
 * Ranges lie inside the disk.  Those functions that take an enum how do not block when it is
 * TRY and return -EAGAIN instead; the others may block on local disk.  All may be called by
 * several threads at the same time.  Errors are -errno.
 */
#ifndef XNBD_DISK_H
#define XNBD_DISK_H

#include <stdatomic.h>
#include <sys/types.h>

#include "backend.h"

/* before_change() is called for each range that is about to change: 0, or -EAGAIN for TRY. */
struct disk_hook {
	int (*before_change)(struct disk_hook *, uint64_t len, uint64_t off, enum how how);
};

struct disk {
	uint64_t size;			/* bytes; whoever opens it may use less */
	bool is_file;			/* which has a place beside it; else it is a device */
	struct order order;		/* of the changes of the image */
	struct disk_hook *hook;		/* or NULL; is set while nobody changes the disk */
	atomic_int error;		/* -errno of the first fdatasync() that failed, or 0 */

	/* disk.c's own. */
	pthread_mutex_t syncing;
	int fd;
	dev_t dev;			/* of the file system; or of the device itself */
	ino_t ino;			/* of the file; 0 for a device */
	bool in_memory;			/* on tmpfs: nothing ever waits for a disk */
	atomic_uint_least64_t slow_until;	/* now_us() */

	/* The run of data that was found last: to look for its end may take long. */
	atomic_uint_least64_t data_from, data_to;
};

/*
 * Create a sparse image of size bytes at path unless something is there already.  False after
 * logging why it could not.  Durable when it returns.
 */
bool disk_create(const char *path, uint64_t size);

/*
 * A new, empty file in dir.  It has no name, and can be given one, where that is possible; else
 * *name, of DISK_NAME_MAX bytes, is its path, which begins with prefix.  Where name is NULL it
 * never has one.  -1 and errno.
 */
enum { DISK_NAME_MAX = 4096 };
int disk_make_file(const char *dir, const char *prefix, char *name);

/*
 * Open the image at path.  NULL after logging why it could not, with hints at options of a target
 * that may help.
 */
struct disk *disk_open(const char *path, bool readonly, bool hints);

/* Make a disk of an open image; takes fd over, also when it fails.  NULL as above. */
struct disk *disk_adopt(int fd);

/* NULL is allowed. */
void disk_close(struct disk *d);

int disk_read(struct disk *d, uint8_t *buf, uint64_t len, uint64_t off, enum how how);

/* Whoever changes a range has begun with it in the image's order. */
int disk_write(struct disk *d, const uint8_t *buf, uint64_t len, uint64_t off, enum how how);

/*
 * Zero a range of whole blocks, by the cheapest way that the flags allow; of them NO_HOLE and
 * FAST_ZERO count.  -EOPNOTSUPP if it would not be fast.
 */
int disk_zero(struct disk *d, uint64_t len, uint64_t off, unsigned flags);

void disk_prefetch(struct disk *d, uint64_t len, uint64_t off);

/* The run at pos: its status, and its length, which ends at end at the latest. */
struct extent disk_extent(struct disk *d, uint64_t pos, uint64_t end);

/* Whether both are the same file or device. */
bool disk_is_same(const struct disk *a, const struct disk *b);

/*
 * Make the file fd share all blocks of the image.  0; -EOPNOTSUPP where the file system cannot; or
 * another -errno.
 */
int disk_clone(struct disk *d, int fd);

/* fdatasync().  Once there was an error, every later call fails. */
int disk_sync(struct disk *d);

/* The same without making anything durable: whether the kernel could not store something. */
int disk_check(struct disk *d);

#endif
