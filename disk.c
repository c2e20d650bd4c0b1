/*
 * disk.c - a raw image file or a block device: see disk.h.
 *
 * Positions are always explicit (pread, pwrite), so that no two threads share a file offset.
 * A disk remembers that stable storage has failed, since fdatasync() tells that to one caller and
 * not to the next.
 *
 * Runs on loops (TRY) and workers (WAIT) alike.
 */
#define _GNU_SOURCE
#include "disk.h"

#include "buffer.h"
#include "log.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/vfs.h>
#endif

enum {
	/* A write that took longer shows that the disk is behind: workers write for a while. */
	SLOW_WRITE_US = 25 * 1000,	/* more than to lose the processor for a turn */
	SLOW_WRITE_PENALTIES = 20,	/* times as long: so much of the loop's time it costs */

	ZERO_CHUNK = 64 * 1024,
};

/* Reading */

/* Read without waiting for the disk, or -EAGAIN, also where there is no such call. */
static int read_try(struct disk *d, uint8_t *buf, uint64_t len, uint64_t off)
{
	ssize_t n = -1;

	if (d->in_memory)
		return read_at(d->fd, buf, len, off);
#if defined(SYS_preadv2) && !defined(XNBD_PORTABLE)
	enum { NOWAIT = 8 };	/* RWF_NOWAIT, which not every libc knows */
	struct iovec iov = { buf, len };

	n = syscall(SYS_preadv2, d->fd, &iov, 1, (long)off, (long)(off >> 32), NOWAIT);
#endif
	return n == (ssize_t)len ? 0 : -EAGAIN;	/* a worker finds out what is wrong, if it is */
}

int disk_read(struct disk *d, uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	return how == TRY ? read_try(d, buf, len, off) : read_at(d->fd, buf, len, off);
}

/* Writing */

/* Whether the page at off must be read from disk first, since a write changes a part of it only. */
static bool needs_read(struct disk *d, uint64_t off)
{
	uint8_t byte;

	return off % (uint64_t)getpagesize() != 0 && off < d->size &&
	       read_try(d, &byte, 1, off) != 0;
}

/*
 * A write that lands in the page cache does not block, unless it needs a part of a block that is
 * not there, or the kernel holds writers back because the disk is behind.  The second shows only
 * in the time that a write takes.
 */
static int write_try(struct disk *d, const uint8_t *buf, uint64_t len, uint64_t off)
{
	uint64_t start, took;
	int ret;

	if (d->in_memory)
		return write_at(d->fd, buf, len, off);
	start = now_us();
	if (start < atomic_load_explicit(&d->slow_until, memory_order_relaxed))
		return -EAGAIN;
	if (needs_read(d, off) || needs_read(d, off + len))
		return -EAGAIN;
	ret = write_at(d->fd, buf, len, off);
	took = now_us() - start;
	if (took > SLOW_WRITE_US)
		atomic_store_explicit(&d->slow_until, start + SLOW_WRITE_PENALTIES * took,
				      memory_order_relaxed);
	return ret;
}

static int before_change(struct disk *d, uint64_t len, uint64_t off, enum how how)
{
	return d->hook ? d->hook->before_change(d->hook, len, off, how) : 0;
}

int disk_write(struct disk *d, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = before_change(d, len, off, how);

	if (ret)
		return ret;
	return how == TRY ? write_try(d, buf, len, off) : write_at(d->fd, buf, len, off);
}

/* Make durable */

/* One at a time: the kernel tells an error to one of them, and the others have to find it here. */
int disk_sync(struct disk *d)
{
	pthread_mutex_lock(&d->syncing);
	while (!d->error && fdatasync(d->fd) < 0)
		if (errno != EINTR)
			d->error = -errno;
	pthread_mutex_unlock(&d->syncing);
	return d->error;
}

int disk_check(struct disk *d)
{
	pthread_mutex_lock(&d->syncing);
	if (!d->error)
		d->error = check_stored(d->fd);
	pthread_mutex_unlock(&d->syncing);
	return d->error;
}

/* Zeros and holes */

/* Of <linux/falloc.h>, of which musl has not all. */
enum { KEEP_SIZE = 1, PUNCH_HOLE = 2, ZERO_RANGE = 16 };

/* fallocate() where there is one; -EOPNOTSUPP where it cannot. */
static int allocate(const struct disk *d, int how, uint64_t len, uint64_t off)
{
	int ret = -1;

	errno = EOPNOTSUPP;
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	do
		ret = fallocate(d->fd, KEEP_SIZE | how, (off_t)off, (off_t)len);
	while (ret < 0 && errno == EINTR);
#else
	(void)d, (void)how, (void)len, (void)off;
#endif
	if (ret == 0)
		return 0;
	/*
	 * Old kernels, FUSE and filters of system calls have ways of their own to say that it is
	 * missing.  EINVAL: the disk ends within a block of its device.
	 */
	if (errno == ENOSYS || errno == ENODEV || errno == EPERM || errno == EINVAL)
		return -EOPNOTSUPP;
	return -errno;
}

/* Holes that cannot be made can be kept: then zeros are written only where there are none. */
static int write_zeros(struct disk *d, uint64_t len, uint64_t off, bool keep_holes)
{
	static uint8_t zeros[ZERO_CHUNK];	/* not const: that would fill the program file */
	uint8_t *buf = buffer_get(ZERO_CHUNK);
	int ret = buf ? 0 : -ENOMEM;

	while (len > 0 && ret == 0) {
		uint64_t n = len < ZERO_CHUNK ? len : ZERO_CHUNK;

		if (!keep_holes || read_at(d->fd, buf, n, off) < 0 || memcmp(buf, zeros, n) != 0)
			ret = write_at(d->fd, zeros, n, off);
		off += n;
		len -= n;
	}
	buffer_put(buf, ZERO_CHUNK);
	return ret;
}

int disk_zero(struct disk *d, uint64_t len, uint64_t off, unsigned flags)
{
	bool fast = flags & NBD_CMD_FLAG_FAST_ZERO, holes = !(flags & NBD_CMD_FLAG_NO_HOLE);
	int ret = before_change(d, len, off, WAIT);

	if (ret)
		return ret;
	ret = -EOPNOTSUPP;
	if (holes) {
		ret = allocate(d, PUNCH_HOLE, len, off);
		atomic_store(&d->data_to, 0);	/* the remembered run may have a hole now */
	}
	/* On a device without the command, the kernel itself would write zeros: not fast. */
	if (ret == -EOPNOTSUPP && (d->is_file || !fast))
		ret = allocate(d, ZERO_RANGE, len, off);
	if (ret == -EOPNOTSUPP && !fast)
		ret = write_zeros(d, len, off, holes);
	return ret;
}

void disk_prefetch(struct disk *d, uint64_t len, uint64_t off)
{
	posix_fadvise(d->fd, (off_t)off, (off_t)len, POSIX_FADV_WILLNEED);
}

/*
 * What cannot be told is data, which is always true; so is what lies behind the end of an image
 * that was truncated: to read it fails.
 *
 * SEEK_HOLE walks over all extents up to the next hole, which in a large file without one takes as
 * long as to read it.  So the end of the run is remembered.  What is said to be data always may be.
 */
struct extent disk_extent(struct disk *d, uint64_t pos, uint64_t end)
{
	struct extent e = { end - pos, 0 };
#if defined(SEEK_DATA) && !defined(XNBD_PORTABLE)
	off_t from = (off_t)pos, to = (off_t)atomic_load(&d->data_to);

	if (from >= to || pos < atomic_load(&d->data_from)) {
		to = lseek(d->fd, from, SEEK_DATA);
		if (to < 0 && errno == ENXIO && lseek(d->fd, 0, SEEK_END) >= (off_t)end)
			to = (off_t)end;	/* nothing but a hole up to the end of the file */
		if (to > from) {
			e.flags = NBD_STATE_HOLE | NBD_STATE_ZERO;
		} else {
			to = lseek(d->fd, from, SEEK_HOLE);
			atomic_store(&d->data_to, 0);	/* others never see a run that is not one */
			atomic_store(&d->data_from, pos);
			atomic_store(&d->data_to, to > from ? (uint64_t)to : 0);
		}
	}
	if (to > from && (uint64_t)to < end)
		e.len = (uint64_t)(to - from);
#else
	(void)d;
#endif
	return e;
}

void disk_close(struct disk *d)
{
	if (!d)
		return;
	close(d->fd);
	order_destroy(&d->order);
	pthread_mutex_destroy(&d->syncing);
	free(d);
}

bool disk_is_same(const struct disk *a, const struct disk *b)
{
	return a->dev == b->dev && a->ino == b->ino;
}

int disk_clone(struct disk *d, int fd)
{
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	if (ioctl(fd, _IOW(0x94, 9, int), d->fd) == 0)	/* FICLONE of <linux/fs.h> */
		return 0;
	return errno == EIO || errno == ENOSPC || errno == EDQUOT ? -errno : -EOPNOTSUPP;
#else
	(void)d, (void)fd;
	return -EOPNOTSUPP;
#endif
}

/* Opening */

int disk_make_file(const char *dir, const char *prefix, char *name)
{
	char path[DISK_NAME_MAX];
	int fd = -1;

#if defined(O_TMPFILE) && !defined(XNBD_PORTABLE)
	if (!name || access("/proc/self/fd", X_OK) == 0)
		fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd >= 0)
		return fd;
#endif
	snprintf(path, sizeof(path), "%s/%sXXXXXX", dir, prefix);
	fd = mkostemp(path, O_CLOEXEC);		/* which fails if there was no room for all of it */
	if (fd >= 0 && name)
		memcpy(name, path, sizeof(path));
	else if (fd >= 0)
		unlink(path);
	return fd;
}

static int set_size(void *size, int fd)
{
	return ftruncate(fd, (off_t)*(uint64_t *)size) < 0 ? -errno : 0;
}

bool disk_create(const char *path, uint64_t size)
{
	struct stat st;
	int err = -EFBIG;

	if (lstat(path, &st) == 0)
		return true;
	if (size <= INT64_MAX)
		err = create_file(path, false, set_size, &size);
	return !err || err == -EEXIST ||
	       log_failure("cannot create image %s of %llu bytes: %s", path,
			   (unsigned long long)size, strerror(-err));
}

/* Linux lets a read-only device be opened for writing, and then fails the writes. */
static bool is_readonly_device(int fd)
{
#if defined(__linux__)
	int readonly = 0;

	return ioctl(fd, _IO(0x12, 94), &readonly) == 0 && readonly;	/* BLKROGET */
#else
	(void)fd;
	return false;
#endif
}

/* Open a file or device.  False after logging why not. */
static bool open_image(const char *path, bool readonly, bool hints, int *fd)
{
	const char *hint = hints && !readonly ? " (--readonly may help)" : "";
	struct stat st;

	/* Before open(), which would hang on a FIFO. */
	if (stat(path, &st) < 0)
		return log_failure("cannot open image %s: %s%s", path, strerror(errno),
				   *hint && errno == ENOENT ? " (--create SIZE makes one)" : "");
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return log_failure("cannot serve image %s: it is %s, and must be a file or a block "
				   "device", path,
				   S_ISDIR(st.st_mode) ? "a directory" : "of another kind");
	*fd = open(path, (readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOCTTY);
	if (*fd < 0) {
		bool perhaps = errno == EACCES || errno == EROFS || errno == EPERM;

		return log_failure("cannot open image %s%s: %s%s", path,
				   readonly ? "" : " for writing", strerror(errno),
				   perhaps ? hint : "");
	}
	if (readonly || !is_readonly_device(*fd))
		return true;
	close(*fd);
	return log_failure("cannot open image %s for writing: the device is read-only%s", path, hint);
}

struct disk *disk_adopt(int fd)
{
	off_t size = lseek(fd, 0, SEEK_END);
	struct stat st;
	struct disk *d;

	if (size < 0 || fstat(fd, &st) < 0) {
		log_failure("cannot serve an image: %s", strerror(errno));
		close(fd);
		return NULL;
	}
	d = not_null(calloc(1, sizeof(*d)));
	d->fd = fd;
	d->size = (uint64_t)size;
	d->is_file = !S_ISBLK(st.st_mode);
	d->dev = d->is_file ? st.st_dev : st.st_rdev;
	d->ino = d->is_file ? st.st_ino : 0;
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	struct statfs fs;

	d->in_memory = fstatfs(fd, &fs) == 0 && fs.f_type == 0x01021994;	/* TMPFS_MAGIC */
#endif
	order_init(&d->order);
	pthread_mutex_init(&d->syncing, NULL);
	return d;
}

struct disk *disk_open(const char *path, bool readonly, bool hints)
{
	int fd = -1;

	return open_image(path, readonly, hints, &fd) ? disk_adopt(fd) : NULL;
}
