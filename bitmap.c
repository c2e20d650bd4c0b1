/*
 * bitmap.c - block bitmaps, in memory and in a durable file: see bitmap.h.
 *
 * xnbd-bitmap(5) has the format of the file: a header, a committed map, a live map.  It also says
 * which map a start believes.  Memory is what counts while the server runs.  Bits are never taken
 * back, so that neither map needs an order of its own: any part of what was written is true.
 *
 * What a crash leaves between two calls, and why a reader gets the right bytes then:
 *
 *	between                         kill -9                     power cut, failed or remounted disk
 *	a first write, or a fetch:
 *	  data pwrite, record pwrite    bit 0: the other bytes      bit 0
 *	  record pwrite, bit, reply     bit 1, data is cached       bit 0, nobody was told of a flush
 *	a write to a held block:
 *	  pwrite, reply                 data is cached              the block as it was committed, or newer
 *	a commit:
 *	  data fdatasync, map pwrite    bit 1 by the live map       bit 0; the flush was not answered
 *	  map pwrite, map fdatasync     the same                    bit 0 or 1 for each page: data is stable
 *	a switch that is forced:
 *	  zeros, data fdatasync         bits 0 where zeros are      the same: the origin's bytes
 *	  data fdatasync, header        the same                    the same
 *	  header pwrite, fdatasync      all are held                none or all: it is one sector
 *	a start that believes less:
 *	  live map emptied, header      the same start again        the same start again
 */
#define _GNU_SOURCE
#include "bitmap.h"

#include "disk.h"
#include "log.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/sysmacros.h>
#endif

#if !defined(MAP_NORESERVE)
#define MAP_NORESERVE 0
#endif

enum {
	HEADER_SIZE = 4096,
	MAP_PAGE = 4096,		/* bytes of a map that are committed together */
	PAGE_BLOCKS = 8 * MAP_PAGE,
	COMMIT_PAGES = 64,		/* at most, for one sync of the data */
	VERSION = 2,
	BOOT_ID_SIZE = 16,
	CHECKED_SIZE = 80,		/* of the header */
	CHECKED_SIZE_1 = 64,		/* of version 1 */
};

/* What is known of a page of the map. */
enum page_state {
	DIRTY = 1,			/* has bits that are not committed */
	TAKEN = 2,			/* the committed map has space for it, so that no commit finds none */
};

static const char magic[8] = { 'x', 'n', 'b', 'd', 'b', 'm', 'a', 'p' };

struct bitmap {
	uint64_t blocks;
	atomic_size_t set;		/* bits that are; 32 bits are enough for 16 TiB */
	atomic_uint flags;		/* enum bitmap_flag */
	atomic_uchar *live;		/* anonymous memory */
	uint64_t map_bytes;		/* of one map, a multiple of MAP_PAGE */

	/* For a durable one; fd is -1 otherwise. */
	int fd;
	const char *path;		/* while it is opened, for the log */
	atomic_uchar *page;		/* enum page_state, for each page of the map */
	uint8_t *pages;			/* room for COMMIT_PAGES, for the commit */
	uint64_t page_number[COMMIT_PAGES];
	pthread_mutex_t lock;		/* for records and the header; a leaf */
	struct bitmap_identity id;
	uint8_t boot_id[BOOT_ID_SIZE];	/* these are read at the start: later there may be no access */
	uint64_t image_instance, own_instance;
	bool written_is_stable;		/* the flag BITMAP_WRITTEN is; for the commit */
	atomic_bool failed;		/* it is not on stable storage, and never will be */
};

static void put_le(uint8_t *p, uint64_t v, int bytes)
{
	for (int i = 0; i < bytes; i++)
		p[i] = (uint8_t)(v >> 8 * i);
}

static uint64_t get_le(const uint8_t *p, int bytes)
{
	uint64_t v = 0;

	for (int i = bytes; i > 0; i--)
		v = v << 8 | p[i - 1];
	return v;
}

uint64_t bitmap_blocks(uint64_t size)
{
	return size / BLOCK_SIZE + (size % BLOCK_SIZE != 0);
}

/* Bits */

static bool holds_all(const struct bitmap *b)
{
	return atomic_load_explicit(&b->flags, memory_order_acquire) & BITMAP_WHOLE;
}

static bool is_set(const struct bitmap *b, uint64_t blk)
{
	return holds_all(b) ||
	       atomic_load_explicit(&b->live[blk / 8], memory_order_acquire) >> blk % 8 & 1;
}

uint64_t bitmap_run(const struct bitmap *b, uint64_t blk, uint64_t max, bool *set)
{
	bool first = is_set(b, blk);
	unsigned char all = first ? 0xff : 0;
	uint64_t n = 1;

	*set = first;
	if (holds_all(b))
		return first ? max : n;
	while (n < max) {
		uint64_t at = blk + n;

		if (at % 8 == 0 && max - n >= 8 &&
		    atomic_load_explicit(&b->live[at / 8], memory_order_acquire) == all)
			n += 8;
		else if (is_set(b, at) == first)
			n++;
		else
			break;
	}
	return n;
}

/* The bits of byte at that stand for blocks blk to end - 1. */
static unsigned char bits_of(uint64_t at, uint64_t blk, uint64_t end)
{
	unsigned first = at * 8 < blk ? (unsigned)(blk - at * 8) : 0;
	unsigned last = end - at * 8 < 8 ? (unsigned)(end - at * 8) : 8;

	return (unsigned char)(0xffU << first & 0xffU >> (8 - last));
}

/* Set some bits of byte at; whether any of them was not set. */
static bool set_byte(struct bitmap *b, uint64_t at, unsigned char bits)
{
	unsigned fresh = bits & ~(unsigned)atomic_fetch_or_explicit(&b->live[at], bits,
								     memory_order_acq_rel);
	unsigned n = 0;

	for (; fresh; fresh &= fresh - 1)
		n++;
	atomic_fetch_add_explicit(&b->set, n, memory_order_relaxed);
	return n > 0;
}

static void set_bits(struct bitmap *b, uint64_t blk, uint64_t end)
{
	for (uint64_t at = blk / 8; at * 8 < end; at++)
		set_byte(b, at, bits_of(at, blk, end));
}

/* Write to the file.  An error that time will not mend is remembered: something is lost. */
static int write_map(struct bitmap *b, const uint8_t *p, uint64_t len, uint64_t off)
{
	int err = write_at(b->fd, p, len, off);
	bool momentary = err == -ENOSPC || err == -EDQUOT || err == -EFBIG || err == -ENOMEM;

	if (err && !momentary)
		atomic_store(&b->failed, true);
	return err;
}

/* fdatasync() of the file; an error is remembered. */
static int sync_file(struct bitmap *b)
{
	while (fdatasync(b->fd) < 0)
		if (errno != EINTR) {
			atomic_store(&b->failed, true);
			return -errno;
		}
	return 0;
}

/*
 * Write the bits of blocks that lie in one page to the live map, and then set them.  Called with
 * the lock, so that nobody writes older bytes over them.  The page is marked after its bits: a
 * commit that misses a bit finds the mark next time.
 */
static int set_recorded(struct bitmap *b, uint64_t blk, uint64_t end)
{
	uint64_t first = blk / 8, bytes = (end - 1) / 8 - first + 1, page = first / MAP_PAGE;
	uint8_t buf[MAP_PAGE] = { 0 };
	int err = 0;
	bool set;

	if (bitmap_run(b, blk, end - blk, &set) == end - blk && set)
		return 0;
	if (!(atomic_load(&b->page[page]) & TAKEN)) {
		err = write_map(b, buf, MAP_PAGE, HEADER_SIZE + page * MAP_PAGE);
		if (err)
			return err;
		atomic_fetch_or(&b->page[page], TAKEN);
	}
	for (uint64_t i = 0; i < bytes; i++)
		buf[i] = atomic_load_explicit(&b->live[first + i], memory_order_relaxed) |
			 bits_of(first + i, blk, end);
	err = write_map(b, buf, bytes, HEADER_SIZE + b->map_bytes + first);
	if (err)
		return err;
	set_bits(b, blk, end);
	atomic_fetch_or(&b->page[page], DIRTY);
	return 0;
}

int bitmap_set(struct bitmap *b, uint64_t blk, uint64_t n, bool wait)
{
	uint64_t end = blk + n, to;
	int err = 0;

	if (holds_all(b))
		return 0;
	if (b->fd < 0) {
		set_bits(b, blk, end);
		return 0;
	}
	if (pthread_mutex_trylock(&b->lock) != 0) {
		if (!wait)
			return -EAGAIN;
		pthread_mutex_lock(&b->lock);
	}
	for (; blk < end && !err; blk = to) {
		to = (blk / PAGE_BLOCKS + 1) * PAGE_BLOCKS;
		if (to > end)
			to = end;
		err = set_recorded(b, blk, to);
	}
	pthread_mutex_unlock(&b->lock);
	return err;
}

uint64_t bitmap_count(const struct bitmap *b)
{
	return holds_all(b) ? b->blocks : atomic_load_explicit(&b->set, memory_order_relaxed);
}

struct bitmap *bitmap_new(uint64_t blocks)
{
	struct bitmap *b = calloc(1, sizeof(*b));
	uint64_t pages;
	void *map;

	if (!b)
		return NULL;
	b->fd = -1;
	pthread_mutex_init(&b->lock, NULL);
	b->blocks = blocks;
	pages = blocks / PAGE_BLOCKS + (blocks % PAGE_BLOCKS != 0);
	b->map_bytes = (pages ? pages : 1) * MAP_PAGE;
	map = mmap(NULL, b->map_bytes, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (map != MAP_FAILED) {
		b->live = map;
		return b;
	}
	bitmap_close(b);
	return NULL;
}

/* Which page cache it is */

static const uint8_t unknown_boot[BOOT_ID_SIZE];

/* The machine's boot id in its 16 bytes; zeros if there is none, which equals no other. */
static void read_boot_id(uint8_t *id)
{
	char text[64] = "", *p = text;
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, text, sizeof(text) - 1) < 0)
		text[0] = '\0';
	if (fd >= 0)
		close(fd);
	for (int i = 0; i < BOOT_ID_SIZE; i++, p += 2) {
		p += *p == '-';
		id[i] = (uint8_t)strtoul((char[]){ p[0], p[1], '\0' }, NULL, 16);
	}
}

#if defined(__linux__) && !defined(XNBD_PORTABLE)
static uint64_t inode_of(const char *path)
{
	struct stat st;

	return stat(path, &st) == 0 ? st.st_ino : 0;
}

/* A btrfs has a folder below /sys/fs whose name is its UUID. */
static uint64_t btrfs_instance(int fd)
{
	enum { FSID = 16, FSID_SIZE = 16 };		/* struct btrfs_ioctl_fs_info_args */
	uint8_t info[1024] = { 0 };
	char name[64] = "/sys/fs/btrfs/";
	size_t n = strlen(name);

	if (ioctl(fd, _IOC(_IOC_READ, 0x94, 31, sizeof(info)), info) < 0)
		return 0;
	for (int i = 0; i < FSID_SIZE; i++)
		n += (size_t)snprintf(name + n, sizeof(name) - n, "%s%02x",
				      i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
				      info[FSID + i]);
	return inode_of(name);
}

/* The number of the folder that the kernel makes below /sys/fs for a mounted file system. */
static uint64_t mounted_instance(int fd, dev_t dev)
{
	static const char *const type[] = { "ext4", "xfs", "f2fs" };
	char link[64], device[256], name[512];
	uint64_t instance = 0;
	ssize_t n;

	snprintf(link, sizeof(link), "/sys/dev/block/%u:%u", major(dev), minor(dev));
	n = readlink(link, device, sizeof(device) - 1);
	if (n < 0)
		return btrfs_instance(fd);
	device[n] = '\0';
	for (size_t i = 0; i < ARRAY_SIZE(type) && !instance; i++) {
		snprintf(name, sizeof(name), "/sys/fs/%s/%s", type[i], base_name(device));
		instance = inode_of(name);
	}
	return instance;
}

/*
 * A number that changes when the file system that has path, or will, is mounted again, or when the
 * device at path is another one: then the page cache is another one, too.  It does not depend on
 * the mount namespace.  0 if there is no such number.
 */
static uint64_t instance_of(const char *path)
{
	char *dir = directory_of(path);
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	uint64_t instance = 0;
	struct stat st = { 0 };

	if (fd < 0 && dir)
		fd = open(dir, O_RDONLY | O_CLOEXEC);
	free(dir);
	if (fd < 0)
		return 0;
	if (fstat(fd, &st) == 0 && S_ISBLK(st.st_mode))
		ioctl(fd, _IOR(0x12, 128, uint64_t), &instance);	/* BLKGETDISKSEQ */
	else
		instance = mounted_instance(fd, st.st_dev);
	close(fd);
	return instance;
}
#else
static uint64_t instance_of(const char *path)
{
	(void)path;
	return 0;
}
#endif

/* The file */

uint64_t bitmap_checksum(uint64_t h, const uint8_t *p, uint64_t size)
{
	for (uint64_t i = 0; i < size; i++)
		h = (h ^ p[i]) * UINT64_C(0x100000001b3);
	return h;
}

/* Called with the lock, once the file is open to others. */
static int write_header(struct bitmap *b, bool clean, unsigned flags)
{
	uint8_t p[CHECKED_SIZE + 8] = { 0 };

	memcpy(p, magic, sizeof(magic));
	put_le(p + 8, VERSION, 4);
	put_le(p + 12, b->id.kind, 4);
	put_le(p + 16, BLOCK_SIZE, 8);
	put_le(p + 24, b->id.disk_size, 8);
	put_le(p + 32, b->id.fingerprint, 8);
	memcpy(p + 40, b->boot_id, BOOT_ID_SIZE);
	put_le(p + 56, clean, 4);
	put_le(p + 60, flags, 4);
	put_le(p + 64, b->image_instance, 8);
	put_le(p + 72, b->own_instance, 8);
	put_le(p + 80, bitmap_checksum(BITMAP_CHECKSUM, p, CHECKED_SIZE), 8);
	return write_map(b, p, sizeof(p), 0);
}

int bitmap_tell(struct bitmap *b, enum bitmap_flag flag, bool durable)
{
	unsigned flags = atomic_load_explicit(&b->flags, memory_order_relaxed);
	int err = 0;

	if (b->fd < 0 || (flags & flag && !durable))
		return 0;
	pthread_mutex_lock(&b->lock);
	flags = atomic_load(&b->flags) | flag;
	if (flags != atomic_load(&b->flags))
		err = write_header(b, false, flags);
	if (!err && durable)
		err = sync_file(b);
	if (!err)
		atomic_store(&b->flags, flags);
	pthread_mutex_unlock(&b->lock);
	return err;
}

static uint64_t file_bytes(const struct bitmap *b)
{
	return HEADER_SIZE + 2 * b->map_bytes;
}

/* Whether nothing is lost but what was cached: another file may be an image, named by mistake. */
static bool may_clear(const struct bitmap *b)
{
	uint8_t found[16];

	return lseek(b->fd, 0, SEEK_END) == 0 ||
	       (read_at(b->fd, found, sizeof(found), 0) == 0 &&
		memcmp(found, magic, sizeof(magic)) == 0 && get_le(found + 12, 4) == b->id.kind);
}

static bool refuse_file(const struct bitmap *b, const char *why)
{
	bool hint = b->id.kind == BITMAP_CACHE && may_clear(b);

	return log_failure("bitmap file %s: %s%s", b->path, why,
			   hint ? " (--clear-bitmap begins afresh)" : "");
}

static bool refuse_number(const struct bitmap *b, const char *what, uint64_t found,
			  uint64_t expected)
{
	char why[128];

	snprintf(why, sizeof(why), "%s is %llu, and %llu is expected", what,
		 (unsigned long long)found, (unsigned long long)expected);
	return refuse_file(b, why);
}

/* Whether the header p, and the size of the file, are what they should be. */
static bool check_header(const struct bitmap *b, const uint8_t *p, uint64_t size)
{
	uint64_t version = get_le(p + 8, 4);
	unsigned checked = version == 1 ? CHECKED_SIZE_1 : CHECKED_SIZE;

	if (memcmp(p, magic, sizeof(magic)) != 0)
		return refuse_file(b, "it is no bitmap file of xnbd");
	if (version != 1 && version != VERSION)
		return refuse_number(b, "version", version, VERSION);
	if (get_le(p + checked, 8) != bitmap_checksum(BITMAP_CHECKSUM, p, checked))
		return refuse_file(b, "the header is damaged, its checksum is wrong");
	if (get_le(p + 12, 4) != b->id.kind)
		return refuse_file(b, b->id.kind == BITMAP_CACHE ?
					 "it belongs to an overlay, and not to a proxy" :
					 "it belongs to a proxy, and not to an overlay");
	if (get_le(p + 16, 8) != BLOCK_SIZE)
		return refuse_number(b, "block size", get_le(p + 16, 8), BLOCK_SIZE);
	if (get_le(p + 24, 8) != b->id.disk_size)
		return refuse_number(b, "size of the disk", get_le(p + 24, 8), b->id.disk_size);
	if (get_le(p + 32, 8) != b->id.fingerprint)
		return refuse_file(b, "the base image has changed since this overlay was made");
	/* Without the live map: see empty_live_map(). */
	if (size != file_bytes(b) && size != file_bytes(b) - b->map_bytes)
		return refuse_number(b, "size of the file", size, file_bytes(b));
	return true;
}

/* Add a page of a map in the file; with bits that were not there its page has that state. */
static void add_page(struct bitmap *b, uint64_t page, const uint8_t *p, enum page_state state)
{
	for (uint64_t i = 0, at = page * MAP_PAGE; i < MAP_PAGE && at * 8 < b->blocks; i++, at++)
		if (p[i] && set_byte(b, at, p[i] & bits_of(at, at * 8, b->blocks)))
			b->page[page] |= state;
}

/*
 * Read the map at offset map of the file.  What was never written need not be looked at: a large
 * disk's maps are mostly that.
 */
static int load_map(struct bitmap *b, uint64_t map, enum page_state state)
{
	uint64_t end = map + b->map_bytes;
	int err = 0;

	for (uint64_t off = map; off < end && !err; off += MAP_PAGE) {
#if defined(SEEK_DATA) && !defined(XNBD_PORTABLE)
		off_t to = lseek(b->fd, (off_t)off, SEEK_DATA);

		if (to >= 0)
			off = (uint64_t)to / MAP_PAGE * MAP_PAGE;
		if (off >= end || (to < 0 && errno == ENXIO))	/* no data up to the end */
			break;
#endif
		err = read_at(b->fd, b->pages, MAP_PAGE, off);
		if (!err)
			add_page(b, (off - map) / MAP_PAGE, b->pages, state);
	}
	return err;
}

static bool is_same_instance(uint64_t a, uint64_t b)
{
	return a == 0 || b == 0 || a == b;
}

/* Whether the image, or this file, has an error that nobody was told of, as after kill -9. */
static bool has_lost(const struct bitmap *b)
{
	int fd = open(b->id.image, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	bool lost = (fd >= 0 && check_stored(fd) != 0) || check_stored(b->fd) != 0;

	if (fd >= 0)
		close(fd);
	return lost;
}

/* Whether the live map was written to the page cache that is there now; the log says why not. */
static bool believes_live_map(const struct bitmap *b, const uint8_t *header)
{
	bool is_2 = get_le(header + 8, 4) == VERSION, clean = get_le(header + 56, 4);
	const char *why = NULL;

	if (memcmp(b->boot_id, unknown_boot, BOOT_ID_SIZE) == 0)
		return false;
	if (memcmp(b->boot_id, header + 40, BOOT_ID_SIZE) != 0)
		why = "the machine was started again";
	else if (has_lost(b) || (is_2 && get_le(header + 60, 4) & BITMAP_FAILED))
		why = "stable storage had failed";
	else if (is_2 && (!is_same_instance(b->image_instance, get_le(header + 64, 8)) ||
			  !is_same_instance(b->own_instance, get_le(header + 72, 8))))
		why = "its file system, or that of the image, was mounted again";
	if (why && !clean)
		log_line("bitmap file %s: %s: of what was cached or written only what had been "
			 "committed is believed", b->path, why);
	return !why;
}

/*
 * Make all of the live map zeros, which costs nothing where a file can have holes.  A file that is
 * left without one has an empty one.
 */
static int empty_live_map(const struct bitmap *b)
{
	return ftruncate(b->fd, (off_t)(file_bytes(b) - b->map_bytes)) < 0 ||
	       ftruncate(b->fd, (off_t)file_bytes(b)) < 0 ? -errno : 0;
}

/* Take over what a file that was there says. */
static int load_maps(struct bitmap *b, const uint8_t *header, uint64_t size)
{
	uint64_t live = HEADER_SIZE + b->map_bytes;
	unsigned flags = get_le(header + 8, 4) == VERSION ? (unsigned)get_le(header + 60, 4) : 0;
	int err = load_map(b, HEADER_SIZE, TAKEN);

	atomic_init(&b->flags, flags & (BITMAP_WHOLE | BITMAP_WRITTEN));
	b->written_is_stable = flags & BITMAP_WRITTEN;
	if (!err && size == file_bytes(b) && believes_live_map(b, header))
		return load_map(b, live, DIRTY | TAKEN);
	return err ? err : empty_live_map(b);
}

/* Write the contents of a new file. */
static int format(void *bitmap, int fd)
{
	struct bitmap *b = bitmap;
	int err = ftruncate(fd, (off_t)file_bytes(b)) < 0 ? -errno : 0;

	b->fd = fd;
	if (!err)
		err = write_header(b, false, 0);
	b->fd = -1;		/* it is closed again */
	return err;
}

/* Open and lock a file that is there; -EWOULDBLOCK if somebody has it, or has just replaced it. */
static int open_existing(struct bitmap *b)
{
	struct stat st, named;

	b->fd = open(b->path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
	if (b->fd < 0 || flock(b->fd, LOCK_EX | LOCK_NB) < 0 || fstat(b->fd, &st) < 0 ||
	    lstat(b->path, &named) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return -EINVAL;
	return st.st_dev == named.st_dev && st.st_ino == named.st_ino ? 0 : -EWOULDBLOCK;
}

/* Open and lock the file, which is made if there is none, or it is to be cleared. */
static int open_map(struct bitmap *b, bool clear)
{
	int err = open_existing(b), old = b->fd;

	if (err != -ENOENT && (err || !clear))
		return err;
	if (!err && !may_clear(b))
		return -EINVAL;
	b->fd = -1;
	err = create_file(b->path, clear && !err, format, b);
	if (old >= 0)
		close(old);		/* and with it the lock on what was there */
	return err == 0 || err == -EEXIST ? open_existing(b) : err;
}

/* Have the file, locked, and take over what it says.  False after logging why not. */
static bool prepare_file(struct bitmap *b, bool clear)
{
	uint8_t header[CHECKED_SIZE + 8];
	int err = open_map(b, clear);
	uint64_t size = err ? 0 : (uint64_t)lseek(b->fd, 0, SEEK_END);

	if (!err && size < HEADER_SIZE)
		return refuse_number(b, "size of the file", size, file_bytes(b));
	if (!err)
		err = read_at(b->fd, header, sizeof(header), 0);
	if (!err && !check_header(b, header, size))
		return false;
	if (!err)
		err = load_maps(b, header, size);
	if (!err)
		err = write_header(b, false, atomic_load(&b->flags));
	if (!err)
		err = sync_file(b);
	if (err)
		log_failure("bitmap file %s: %s", b->path,
			    err == -EWOULDBLOCK ? "another server uses it" :
			    err == -EINVAL	? "it is no bitmap file of this kind, and is left alone" :
						  strerror(-err));
	else if (memcmp(b->boot_id, unknown_boot, BOOT_ID_SIZE) == 0)
		log_line("bitmap file %s: /proc/sys/kernel/random/boot_id cannot be read: what is "
			 "not flushed, or is younger than a second, will be lost if this process is "
			 "killed", b->path);
	return err == 0;
}

struct bitmap *bitmap_open(const char *path, const struct bitmap_identity *id, bool clear)
{
	struct bitmap *b = not_null(bitmap_new(bitmap_blocks(id->disk_size)));

	b->id = *id;
	b->path = path;
	b->page = not_null(calloc(b->map_bytes / MAP_PAGE, sizeof(*b->page)));
	b->pages = not_null(malloc(COMMIT_PAGES * MAP_PAGE));
	read_boot_id(b->boot_id);
	b->image_instance = instance_of(id->image);
	b->own_instance = instance_of(path);
	if (prepare_file(b, clear))
		return b;
	bitmap_close(b);
	return NULL;
}

void bitmap_close(struct bitmap *b)
{
	if (!b)
		return;
	if (b->live)
		munmap((void *)b->live, b->map_bytes);
	if (b->fd >= 0)
		close(b->fd);
	pthread_mutex_destroy(&b->lock);
	free((void *)b->page);
	free(b->pages);
	free(b);
}

bool bitmap_has_failed(const struct bitmap *b)
{
	return atomic_load(&b->failed);
}

/* Committing */

/* Take the contents of dirty pages from *page on; returns how many. */
static unsigned take_dirty(struct bitmap *b, uint64_t *page)
{
	uint64_t pages = b->map_bytes / MAP_PAGE;
	unsigned n = 0;

	for (; *page < pages && n < COMMIT_PAGES; ++*page) {
		if (!(atomic_load_explicit(&b->page[*page], memory_order_relaxed) & DIRTY))
			continue;
		atomic_fetch_and(&b->page[*page], (unsigned char)~DIRTY);
		for (unsigned i = 0; i < MAP_PAGE; i++)
			b->pages[n * MAP_PAGE + i] = atomic_load_explicit(
				&b->live[*page * MAP_PAGE + i], memory_order_acquire);
		b->page_number[n++] = *page;
	}
	return n;
}

static int write_committed(struct bitmap *b, unsigned n)
{
	int err = 0;

	/* That clients write is on stable storage before any bit of theirs. */
	if (!b->written_is_stable && atomic_load(&b->flags) & BITMAP_WRITTEN) {
		err = sync_file(b);
		b->written_is_stable = !err;
	}
	for (unsigned i = 0; i < n && !err; i++)
		err = write_map(b, b->pages + i * MAP_PAGE, MAP_PAGE,
				 HEADER_SIZE + b->page_number[i] * MAP_PAGE);
	return !err && n > 0 ? sync_file(b) : err;
}

int bitmap_commit(struct bitmap *b, struct disk *image)
{
	uint64_t page = 0;
	unsigned n;
	int err;

	do {
		n = take_dirty(b, &page);
		err = disk_sync(image);
		if (!err)
			err = write_committed(b, n);
		for (unsigned i = 0; err && i < n; i++)
			atomic_fetch_or(&b->page[b->page_number[i]], DIRTY);
	} while (!err && n == COMMIT_PAGES);
	return err;
}

int bitmap_mark_clean(struct bitmap *b)
{
	int err = write_header(b, true, atomic_load(&b->flags));

	return err ? err : sync_file(b);
}
