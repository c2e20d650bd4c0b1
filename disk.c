/*
 * disk.c - backend: a raw image file or a block device.
 *
 * Positions are always explicit (pread, pwrite), so that no two threads share a file offset.
 * An image is one file or device, whoever has it open: it has one order of changes, and remembers
 * that stable storage has failed, since fdatasync() tells that to one caller and not to the next.
 *
 * Runs on loops (TRY) and workers (WAIT) alike.
 */
#define _GNU_SOURCE
#include "disk.h"

#include "buffer.h"
#include "commit.h"
#include "log.h"
#include "util.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
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
	SLOW_WRITE_PENALTY_US = 500 * 1000,

	ZERO_CHUNK = 64 * 1024,
};

static size_t page_size;	/* set when a disk is opened */

struct image {
	struct image *next;
	dev_t dev;			/* of the file system; or of the device itself */
	ino_t ino;			/* of the file; 0 for a device */
	unsigned users;
	atomic_int error;		/* of the first fdatasync() that failed, -errno; 0 */
	struct order order;
};

static struct image *images;	/* the main thread's */

struct disk {
	struct backend backend;
	int fd;
	bool block_device;

	struct image *image;

	bool in_memory;			/* on tmpfs: nothing ever waits for a disk */
	atomic_bool no_nowait;		/* the file system cannot say whether a read would block */
	atomic_bool no_punch;
	atomic_bool no_zero_range;
	atomic_uint_least64_t slow_until;	/* now_us() */

	/* The run of data that was found last: to look for its end may take long. */
	atomic_uint_least64_t data_from, data_to;

	struct committer committer;
	struct disk_hook *hook;		/* changes only while nobody changes the disk */
};

static struct disk *to_disk(struct backend *b)
{
	return (struct disk *)b;
}

/* Reading */

/* One pread() that does not wait for the disk; -EOPNOTSUPP where there is no such thing. */
static ssize_t pread_nowait(int fd, void *buf, size_t len, uint64_t off)
{
#if defined(SYS_preadv2) && !defined(XNBD_PORTABLE)
	enum { NOWAIT = 8 };	/* RWF_NOWAIT, which not every libc knows */
	struct iovec iov = { buf, len };
	ssize_t n = syscall(SYS_preadv2, fd, &iov, 1, (long)off, (long)(off >> 32), NOWAIT);

	if (n >= 0)
		return n;
	return errno == ENOSYS || errno == EINVAL ? -EOPNOTSUPP : -errno;
#else
	(void)fd, (void)buf, (void)len, (void)off;
	return -EOPNOTSUPP;
#endif
}

/* Read without waiting for the disk, or -EAGAIN. */
static int read_try(struct disk *d, uint8_t *buf, uint64_t len, uint64_t off)
{
	if (d->in_memory)
		return read_at(d->fd, buf, len, off);
	if (!atomic_load_explicit(&d->no_nowait, memory_order_relaxed)) {
		ssize_t n = pread_nowait(d->fd, buf, len, off);

		if (n == (ssize_t)len)
			return 0;
		if (n != -EOPNOTSUPP)	/* a worker finds out what is wrong, if anything is */
			return -EAGAIN;
		atomic_store_explicit(&d->no_nowait, true, memory_order_relaxed);
	}
	return -EAGAIN;
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

	return off % page_size != 0 && off < d->backend.size && read_try(d, &byte, 1, off) != 0;
}

/*
 * A write that lands in the page cache does not block, unless it needs a part of a block that is
 * not there, or the kernel holds writers back because the disk is behind.  The second shows only
 * in the time that a write takes.
 */
static int write_try(struct disk *d, const uint8_t *buf, uint64_t len, uint64_t off)
{
	uint64_t start;
	int ret;

	if (d->in_memory)
		return write_at(d->fd, buf, len, off);
	start = now_us();
	if (start < atomic_load_explicit(&d->slow_until, memory_order_relaxed))
		return -EAGAIN;
	if (needs_read(d, off) || needs_read(d, off + len))
		return -EAGAIN;
	ret = write_at(d->fd, buf, len, off);
	if (now_us() - start > SLOW_WRITE_US)
		atomic_store_explicit(&d->slow_until, start + SLOW_WRITE_PENALTY_US,
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

int disk_error(const struct disk *d)
{
	return atomic_load(&d->image->error);
}

int disk_sync(struct disk *d)
{
	int err = disk_error(d), none = 0;

	while (!err && fdatasync(d->fd) < 0)
		if (errno != EINTR)
			err = -errno;
	if (err)
		atomic_compare_exchange_strong(&d->image->error, &none, err);
	/* Another disk of the same image may have been told meanwhile. */
	return err ? err : disk_error(d);
}

int disk_check(struct disk *d)
{
	int err = disk_error(d), none = 0;

	if (!err)
		err = check_stored(d->fd);
	if (err)
		atomic_compare_exchange_strong(&d->image->error, &none, err);
	return err;
}

static int commit(struct committer *c, bool *lost)
{
	int err = disk_sync((struct disk *)((char *)c - offsetof(struct disk, committer)));

	*lost = err != 0;
	return err;
}

/* Zeros and holes */

enum allocation { PUNCH_HOLE, ZERO_RANGE };

/* fallocate() where there is one; -EOPNOTSUPP, remembered in *missing, where it cannot. */
static int allocate(const struct disk *d, enum allocation how, atomic_bool *missing, uint64_t off,
		    uint64_t len)
{
	int ret = -1;

	errno = EOPNOTSUPP;
	if (atomic_load_explicit(missing, memory_order_relaxed))
		return -EOPNOTSUPP;
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	enum { KEEP_SIZE = 1, PUNCH = 2, ZERO = 16 };	/* <linux/falloc.h>; musl has not all */
	int mode = KEEP_SIZE | (how == PUNCH_HOLE ? PUNCH : ZERO);

	do
		ret = fallocate(d->fd, mode, (off_t)off, (off_t)len);
	while (ret < 0 && errno == EINTR);
#else
	(void)d, (void)how, (void)off, (void)len;
#endif
	if (ret == 0)
		return 0;
	/* Old kernels, FUSE and filters of system calls say that it is missing in ways of their own. */
	if (errno != EOPNOTSUPP && errno != ENOSYS && errno != ENODEV && errno != EPERM)
		return -errno;
	atomic_store_explicit(missing, true, memory_order_relaxed);
	return -EOPNOTSUPP;
}

/* There may be holes in a range: of the remembered run of data the larger part stays. */
static void forget_data(struct disk *d, uint64_t off, uint64_t len)
{
	uint64_t from = atomic_load(&d->data_from), to = atomic_load(&d->data_to), end = off + len;

	if (off >= to || end <= from)
		return;
	if (off > from && off - from >= (end < to ? to - end : 0))
		atomic_store(&d->data_to, off);
	else
		atomic_store(&d->data_from, end < to ? end : to);
}

static int punch(struct disk *d, uint64_t off, uint64_t len)
{
	int ret = allocate(d, PUNCH_HOLE, &d->no_punch, off, len);

	forget_data(d, off, len);
	return ret;
}

static int zero_range(struct disk *d, uint64_t off, uint64_t len)
{
	return allocate(d, ZERO_RANGE, &d->no_zero_range, off, len);
}

static uint8_t zeros[ZERO_CHUNK];	/* not const: that would fill the program file */

static int write_zeros(struct disk *d, uint64_t off, uint64_t len)
{
	int ret = 0;

	while (len > 0 && ret == 0) {
		uint64_t n = len < sizeof(zeros) ? len : sizeof(zeros);

		ret = write_at(d->fd, zeros, n, off);
		off += n;
		len -= n;
	}
	return ret;
}

/* Write zeros where there are none: holes that cannot be made can be kept. */
static int clear(struct disk *d, uint64_t off, uint64_t len)
{
	uint8_t *buf = buffer_get(ZERO_CHUNK);
	int ret = buf ? 0 : -ENOMEM;

	while (len > 0 && ret == 0) {
		uint64_t n = len < ZERO_CHUNK ? len : ZERO_CHUNK;

		if (read_at(d->fd, buf, n, off) < 0 || memcmp(buf, zeros, n) != 0)
			ret = write_at(d->fd, zeros, n, off);
		off += n;
		len -= n;
	}
	buffer_put(buf, ZERO_CHUNK);
	return ret;
}

/* Zero a range, of whole blocks on a device, by the cheapest way that the flags allow. */
static int zero_blocks(struct disk *d, uint64_t off, uint64_t len, unsigned flags)
{
	bool fast = flags & NBD_CMD_FLAG_FAST_ZERO;
	int ret = -EOPNOTSUPP;

	if (len == 0)
		return 0;
	if (!(flags & NBD_CMD_FLAG_NO_HOLE))
		ret = punch(d, off, len);
	/* On a device without the command, the kernel itself would write zeros: not fast. */
	if (ret == -EOPNOTSUPP && !(fast && d->block_device))
		ret = zero_range(d, off, len);
	if (ret == -EOPNOTSUPP && !fast)
		ret = flags & NBD_CMD_FLAG_NO_HOLE ? write_zeros(d, off, len) : clear(d, off, len);
	return ret;
}

static uint64_t round_up(uint64_t off)
{
	return off + (BLOCK_SIZE - off % BLOCK_SIZE) % BLOCK_SIZE;
}

static uint64_t round_down(uint64_t off)
{
	return off - off % BLOCK_SIZE;
}

/* A device zeroes whole blocks only: write the edges, after what may fail for FAST_ZERO. */
static int zero_device(struct disk *d, uint64_t off, uint64_t len, unsigned flags)
{
	uint64_t end = off + len, from = round_up(off), to = round_down(end);
	int ret;

	if (from >= to)
		return write_zeros(d, off, len);
	ret = zero_blocks(d, from, to - from, flags);
	if (ret == 0)
		ret = write_zeros(d, off, from - off);
	if (ret == 0)
		ret = write_zeros(d, to, end - to);
	return ret;
}

int disk_zero(struct disk *d, uint64_t len, uint64_t off, unsigned flags)
{
	int ret = before_change(d, len, off, WAIT);

	if (ret)
		return ret;
	return d->block_device ? zero_device(d, off, len, flags) : zero_blocks(d, off, len, flags);
}

int disk_trim(struct disk *d, uint64_t len, uint64_t off)
{
	int ret = before_change(d, len, off, WAIT);

	return ret ? ret : punch(d, off, len);
}

void disk_prefetch(struct disk *d, uint64_t len, uint64_t off)
{
	if (len > 0)
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
	struct extent data = { end - pos, 0 };
	struct extent hole = { end - pos, NBD_STATE_HOLE | NBD_STATE_ZERO };
#if defined(SEEK_DATA) && !defined(XNBD_PORTABLE)
	uint64_t known = atomic_load_explicit(&d->data_to, memory_order_relaxed);
	struct stat st;
	off_t to;

	if (pos >= atomic_load_explicit(&d->data_from, memory_order_relaxed) && pos < known) {
		if (known < end)
			data.len = known - pos;
		return data;
	}
	to = lseek(d->fd, (off_t)pos, SEEK_DATA);
	if (to < 0) {	/* ENXIO: nothing but a hole up to the end of the file */
		bool whole = errno == ENXIO && fstat(d->fd, &st) == 0 &&
			     (uint64_t)st.st_size >= end;

		return whole ? hole : data;
	}
	if ((uint64_t)to > pos) {
		if ((uint64_t)to < end)
			hole.len = (uint64_t)to - pos;
		return hole;
	}
	to = lseek(d->fd, (off_t)pos, SEEK_HOLE);
	if (to <= 0 || (uint64_t)to <= pos)
		return data;
	atomic_store_explicit(&d->data_to, pos, memory_order_relaxed);
	atomic_store_explicit(&d->data_from, pos, memory_order_relaxed);
	atomic_store_explicit(&d->data_to, (uint64_t)to, memory_order_relaxed);
	if ((uint64_t)to < end)
		data.len = (uint64_t)to - pos;
#else
	(void)d, (void)hole;
#endif
	return data;
}

unsigned disk_extents(struct disk *d, struct extent *extent, unsigned max, uint64_t len,
		      uint64_t off)
{
	uint64_t end = off + len;
	unsigned n = 0;

	while (off < end && n < max) {
		extent[n] = disk_extent(d, off, end);
		off += extent[n++].len;
	}
	return n;
}

uint64_t disk_size(const struct disk *d)
{
	return d->backend.size;
}

static void image_leave(struct image *image)
{
	struct image **p = &images;

	if (--image->users > 0)
		return;
	while (*p != image)
		p = &(*p)->next;
	*p = image->next;
	order_destroy(&image->order);
	free(image);
}

/* The image of an open file, with one user more; NULL if out of memory. */
static struct image *image_join(const struct stat *st)
{
	dev_t dev = S_ISBLK(st->st_mode) ? st->st_rdev : st->st_dev;
	ino_t ino = S_ISBLK(st->st_mode) ? 0 : st->st_ino;
	struct image *image = images;

	while (image && (image->dev != dev || image->ino != ino))
		image = image->next;
	if (!image) {
		image = calloc(1, sizeof(*image));
		if (!image)
			return NULL;
		image->dev = dev;
		image->ino = ino;
		order_init(&image->order);
		image->next = images;
		images = image;
	}
	image->users++;
	return image;
}

void disk_close(struct disk *d)
{
	if (!d)
		return;
	close(d->fd);
	committer_destroy(&d->committer);
	image_leave(d->image);
	free(d);
}

struct order *disk_order(struct disk *d)
{
	return &d->image->order;
}

bool disk_is_file(const struct disk *d)
{
	return !d->block_device;
}

bool disk_is_same(const struct disk *a, const struct disk *b)
{
	return a->image == b->image;
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

void disk_set_hook(struct disk *d, struct disk_hook *hook)
{
	d->hook = hook;
}

/* The backend */

static int op_read(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	return disk_read(to_disk(b), buf, len, off, how);
}

static int op_write(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	return disk_write(to_disk(b), buf, len, off, how);
}

static int op_zero(struct backend *b, uint64_t len, uint64_t off, unsigned flags)
{
	return disk_zero(to_disk(b), len, off, flags);
}

static int op_trim(struct backend *b, uint64_t len, uint64_t off)
{
	return disk_trim(to_disk(b), len, off);
}

static int op_flush(struct backend *b, struct request *r)
{
	return b->readonly ? 0 : committer_flush(&to_disk(b)->committer, r);
}

static int op_cache(struct backend *b, uint64_t *len, uint64_t off)
{
	disk_prefetch(to_disk(b), *len, off);
	return 0;
}

static unsigned op_extents(struct backend *b, struct extent *extent, unsigned max, uint64_t len,
			   uint64_t off, int *ret)
{
	(void)ret;
	return disk_extents(to_disk(b), extent, max, len, off);
}

static int op_close(struct backend *b)
{
	disk_close(to_disk(b));
	return 0;
}

static const struct backend_ops disk_ops = {
	.name = "disk",
	.read = op_read,
	.write = op_write,
	.zero = op_zero,
	.trim = op_trim,
	.flush = op_flush,
	.cache = op_cache,
	.extents = op_extents,
	.holds = backend_holds_all,
	.fetch = backend_fetches_nothing,
	.take_back = backend_keeps_nothing,
	.close = op_close,
};

struct backend *disk_backend(struct disk *d)
{
	return &d->backend;
}

/* Opening */

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
	if (err && err != -EEXIST)
		log_failure("cannot create image %s of %llu bytes: %s", path,
			    (unsigned long long)size, strerror(-err));
	return !err || err == -EEXIST;
}

bool disk_limit(struct disk *d, const char *path, uint64_t size)
{
	if (d->backend.size < size) {
		log_failure("image %s has %llu bytes, and at least %llu are expected", path,
			    (unsigned long long)d->backend.size, (unsigned long long)size);
		return false;
	}
	d->backend.size = size;
	return true;
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

/* Open a file or device, and find out its kind and size.  -1 after logging why not. */
static int open_image(const char *path, bool readonly, bool hints, uint64_t *size)
{
	const char *hint = hints && !readonly ? " (--readonly may help)" : "";
	struct stat st;
	int fd;
	off_t end;

	/* Before open(), which would hang on a FIFO. */
	if (stat(path, &st) < 0) {
		log_failure("cannot open image %s: %s%s", path, strerror(errno),
			    *hint && errno == ENOENT ? " (--create SIZE makes one)" : "");
		return -1;
	}
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
		log_failure("cannot serve image %s: it is %s, and must be a file or a block device",
			    path, S_ISDIR(st.st_mode) ? "a directory" : "of another kind");
		return -1;
	}
	fd = open(path, (readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOCTTY);
	if (fd < 0) {
		bool perhaps = errno == EACCES || errno == EROFS || errno == EPERM;

		log_failure("cannot open image %s%s: %s%s", path, readonly ? "" : " for writing",
			    strerror(errno), perhaps ? hint : "");
		return -1;
	}
	if (!readonly && is_readonly_device(fd)) {
		log_failure("cannot open image %s for writing: the device is read-only%s", path,
			    hint);
		close(fd);
		return -1;
	}
	end = lseek(fd, 0, SEEK_END);
	if (end < 0) {
		log_failure("cannot find out the size of image %s: %s", path, strerror(errno));
		close(fd);
		return -1;
	}
	*size = (uint64_t)end;
	return fd;
}

static bool is_in_memory(int fd)
{
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	enum { TMPFS_MAGIC = 0x01021994 };
	struct statfs st;

	return fstatfs(fd, &st) == 0 && st.f_type == TMPFS_MAGIC;
#else
	(void)fd;
	return false;
#endif
}

struct disk *disk_adopt(int fd, uint64_t size, bool readonly)
{
	struct disk *d = calloc(1, sizeof(*d));
	struct stat st;
	int err = !d ? ENOMEM : fstat(fd, &st) < 0 ? errno : 0;

	if (!err && !(d->image = image_join(&st)))
		err = ENOMEM;
	if (err) {
		log_failure("cannot serve an image: %s", strerror(err));
		close(fd);
		free(d);
		return NULL;
	}
	page_size = (size_t)getpagesize();
	d->fd = fd;
	d->backend.ops = &disk_ops;
	d->backend.size = size;
	d->backend.readonly = readonly;
	d->block_device = S_ISBLK(st.st_mode);
	d->in_memory = is_in_memory(fd);
	d->backend.order = &d->image->order;
	committer_init(&d->committer, commit, "the image",
		       "every flush fails until a restart; what was not flushed before may be lost "
		       "(xnbd-server(8), \"When the disk fails\")");
	return d;
}

struct disk *disk_open(const char *path, bool readonly, bool hints)
{
	uint64_t size;
	int fd = open_image(path, readonly, hints, &size);

	return fd < 0 ? NULL : disk_adopt(fd, size, readonly);
}

void disk_look(struct disk *d, const char *path)
{
	static const struct {
		const char *format, *magic;
		unsigned off;
	} known[] = {
		{ "qcow2", "QFI\xfb", 0 },
		{ "VMDK", "KDMV", 0 },
		{ "VMDK", "COWD", 0 },
		{ "VMDK", "# Disk DescriptorFile", 0 },
		{ "VDI", "\x7f\x10\xda\xbe", 64 },
	};
	uint8_t head[68];

	if (d->backend.size == 0)
		log_line("image %s is empty: a disk of 0 bytes is served", path);
	if (d->backend.size < sizeof(head) || read_at(d->fd, head, sizeof(head), 0) < 0)
		return;
	for (size_t i = 0; i < ARRAY_SIZE(known); i++)
		if (memcmp(head + known[i].off, known[i].magic, strlen(known[i].magic)) == 0)
			log_line("image %s looks like %s: clients get the file as it is, as a raw "
				 "image", path, known[i].format);
}
