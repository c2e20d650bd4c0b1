/*
 * bitmap.c - block bitmaps, in memory and in a durable file: see bitmap.h.
 *
 * The file, all numbers little-endian:
 *
 *	offset  size
 *	     0     8  magic "xnbdbmap"
 *	     8     4  version, 1
 *	    12     4  kind: enum bitmap_kind
 *	    16     8  bytes per block, 4096
 *	    24     8  size of the disk in bytes
 *	    32     8  fingerprint of the base image
 *	    40    16  boot id of the machine that wrote it last; zeros: not known
 *	    56     4  1 if it was closed in order: then both maps are the same
 *	    60     4  0
 *	    64     8  checksum (FNV-1a) of the 64 bytes before
 *	  4096     m  committed map: bit n % 8 of byte n / 8 is block n
 *	4096+m     m  live map, likewise; m is a multiple of 4096
 *
 * The live map is a shared mapping, so that kill -9 leaves it as it was at the last store: the
 * page cache holds it, as it holds the data.  A power cut does not, and what the disk then has
 * of it is worth nothing: after a reboot, which the boot id shows, the committed map alone
 * counts.  Its bits are written after the data that they speak of is on stable storage.
 *
 * Three facts are kept apart: set (live), set since the last commit (a dirty flag for each page
 * of the map), and committed.  A commit takes the dirty pages' contents first and syncs the
 * data then, so that a bit set meanwhile waits for the next.
 */
#define _GNU_SOURCE
#include "bitmap.h"

#include "util.h"
#include "xnbd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	HEADER_SIZE = 4096,
	MAP_PAGE = 4096,		/* bytes of a map that are committed together */
	COMMIT_PAGES = 64,		/* at most, for one sync of the data */
	VERSION = 1,
	BOOT_ID_SIZE = 16,
	CHECKED_SIZE = 64,		/* of the header */
};

static const char magic[8] = { 'x', 'n', 'b', 'd', 'b', 'm', 'a', 'p' };

struct bitmap {
	uint64_t blocks;
	atomic_size_t set;		/* bits that are; 32 bits are enough for 16 TiB */
	atomic_uchar *live;
	uint64_t map_bytes;		/* of one map, a multiple of MAP_PAGE */

	/* For a durable one; fd is -1 otherwise. */
	int fd;
	uint8_t *file;			/* the mapping of all of it */
	uint64_t file_bytes;
	atomic_uchar *dirty;		/* one for each page of the map */
	uint8_t *pages;			/* room for COMMIT_PAGES */
	uint64_t page_number[COMMIT_PAGES];
	struct bitmap_identity id;
	uint8_t boot_id[BOOT_ID_SIZE];	/* read when it was opened: later there may be no access */
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

static uint64_t map_bytes_of(uint64_t blocks)
{
	uint64_t bytes = blocks / 8 + (blocks % 8 != 0);

	return (bytes + MAP_PAGE - 1) / MAP_PAGE * MAP_PAGE;
}

/* Bits */

bool bitmap_test(const struct bitmap *b, uint64_t blk)
{
	return atomic_load_explicit(&b->live[blk / 8], memory_order_acquire) >> blk % 8 & 1;
}

uint64_t bitmap_run(const struct bitmap *b, uint64_t blk, uint64_t max, bool *set)
{
	bool first = bitmap_test(b, blk);
	unsigned char all = first ? 0xff : 0;
	uint64_t n = 1;

	*set = first;
	while (n < max) {
		uint64_t at = blk + n;

		if (at % 8 == 0 && max - n >= 8 &&
		    atomic_load_explicit(&b->live[at / 8], memory_order_acquire) == all)
			n += 8;
		else if (bitmap_test(b, at) == first)
			n++;
		else
			break;
	}
	return n;
}

/* The page is marked after its bits: a commit that misses a bit finds the mark next time. */
static void mark_dirty(struct bitmap *b, uint64_t first_byte, uint64_t last_byte)
{
	if (!b->dirty)
		return;
	for (uint64_t page = first_byte / MAP_PAGE; page <= last_byte / MAP_PAGE; page++)
		atomic_store_explicit(&b->dirty[page], 1, memory_order_release);
}

static unsigned count_bits(unsigned bits)
{
	unsigned n = 0;

	for (; bits; bits &= bits - 1)
		n++;
	return n;
}

uint64_t bitmap_set(struct bitmap *b, uint64_t blk, uint64_t n)
{
	uint64_t end = blk + n, at = blk, fresh = 0;

	if (n == 0)
		return 0;
	while (at < end) {
		uint64_t count = 8 - at % 8;
		unsigned char bits, old;

		if (count > end - at)
			count = end - at;
		bits = (unsigned char)((0xffU >> (8 - count)) << at % 8);
		old = atomic_fetch_or_explicit(&b->live[at / 8], bits, memory_order_acq_rel);
		fresh += count_bits(bits & ~(unsigned)old);
		at += count;
	}
	mark_dirty(b, blk / 8, (end - 1) / 8);
	atomic_fetch_add_explicit(&b->set, fresh, memory_order_relaxed);
	return fresh;
}

uint64_t bitmap_count(const struct bitmap *b)
{
	return atomic_load_explicit(&b->set, memory_order_relaxed);
}

/* How many bits of blocks at to end - 1 are set; at is a multiple of 64. */
static uint64_t count_range(const struct bitmap *b, uint64_t at, uint64_t end)
{
	static const uint64_t none = 0, all = UINT64_MAX;
	const uint8_t *map = (const void *)b->live;
	uint64_t count = 0;

	for (; at + 64 <= end; at += 64) {
		if (memcmp(map + at / 8, &none, 8) == 0)
			continue;
		if (memcmp(map + at / 8, &all, 8) == 0)
			count += 64;
		else
			for (unsigned i = 0; i < 8; i++)
				count += count_bits(map[at / 8 + i]);
	}
	for (; at < end; at++)
		count += bitmap_test(b, at);
	return count;
}

struct bitmap *bitmap_new(uint64_t blocks)
{
	struct bitmap *b = calloc(1, sizeof(*b));
	void *map;

	if (!b)
		return NULL;
	b->fd = -1;
	b->blocks = blocks;
	b->map_bytes = map_bytes_of(blocks ? blocks : 1);
	map = mmap(NULL, b->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map == MAP_FAILED) {
		free(b);
		return NULL;
	}
	b->live = map;
	return b;
}

/* The file */

/* The machine's boot id in its 16 bytes; zeros if there is none, which equals no other. */
static void read_boot_id(uint8_t *id)
{
	char text[64] = "";
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	unsigned digits = 0;
	ssize_t n = 0;

	memset(id, 0, BOOT_ID_SIZE);
	if (fd >= 0) {
		n = read(fd, text, sizeof(text) - 1);
		close(fd);
	}
	for (const char *p = text; n > 0 && *p && digits < 2 * BOOT_ID_SIZE; p++) {
		static const char hex[] = "0123456789abcdef";
		const char *digit = strchr(hex, *p);

		if (digit) {
			id[digits / 2] = (uint8_t)(id[digits / 2] << 4 | (digit - hex));
			digits++;
		}
	}
}

static uint64_t checksum(const uint8_t *p)
{
	uint64_t h = UINT64_C(0xcbf29ce484222325);

	for (int i = 0; i < CHECKED_SIZE; i++)
		h = (h ^ p[i]) * UINT64_C(0x100000001b3);
	return h;
}

static int sync_file(const struct bitmap *b)
{
	while (fdatasync(b->fd) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

static int write_header(struct bitmap *b, bool clean)
{
	uint8_t p[CHECKED_SIZE + 8] = { 0 };
	int err;

	memcpy(p, magic, sizeof(magic));
	put_le(p + 8, VERSION, 4);
	put_le(p + 12, b->id.kind, 4);
	put_le(p + 16, BLOCK_SIZE, 8);
	put_le(p + 24, b->id.disk_size, 8);
	put_le(p + 32, b->id.fingerprint, 8);
	memcpy(p + 40, b->boot_id, BOOT_ID_SIZE);
	put_le(p + 56, clean, 4);
	put_le(p + 64, checksum(p), 8);
	err = write_at(b->fd, p, sizeof(p), 0);
	return err ? err : sync_file(b);
}

/* What to do about a file that is refused. */
static const char *remedy(const struct bitmap *b)
{
	return b->id.kind == BITMAP_CACHE ? " (--clear-bitmap begins afresh)" : "";
}

static bool refuse(const struct bitmap *b, const char *path, const char *what, uint64_t found,
		   uint64_t expected)
{
	log_failure("bitmap file %s: %s is %llu, and %llu is expected%s", path, what,
		    (unsigned long long)found, (unsigned long long)expected, remedy(b));
	return false;
}

/* Whether the file, of which st tells, is what it should be. */
static bool check_header(const struct bitmap *b, const char *path, uint64_t file_size)
{
	const uint8_t *p = b->file;

	if (memcmp(p, magic, sizeof(magic)) != 0) {
		log_failure("bitmap file %s: it is no bitmap file of xnbd%s", path, remedy(b));
		return false;
	}
	if (get_le(p + 8, 4) != VERSION)
		return refuse(b, path, "version", get_le(p + 8, 4), VERSION);
	if (get_le(p + 64, 8) != checksum(p)) {
		log_failure("bitmap file %s: the header is damaged, its checksum is wrong%s", path,
			    remedy(b));
		return false;
	}
	if (get_le(p + 12, 4) != b->id.kind)
		return refuse(b, path, "kind", get_le(p + 12, 4), b->id.kind);
	if (get_le(p + 16, 8) != BLOCK_SIZE)
		return refuse(b, path, "block size", get_le(p + 16, 8), BLOCK_SIZE);
	if (get_le(p + 24, 8) != b->id.disk_size)
		return refuse(b, path, "size of the disk", get_le(p + 24, 8), b->id.disk_size);
	if (get_le(p + 32, 8) != b->id.fingerprint)
		return refuse(b, path, "fingerprint of the base image", get_le(p + 32, 8),
			      b->id.fingerprint);
	if (file_size != b->file_bytes)
		return refuse(b, path, "size of the file", file_size, b->file_bytes);
	return true;
}

/*
 * A part of a map, which begins at offset map of the file, that may have bits: bytes *at to *end - 1
 * of it, from *at on; whole pages.  What was allocated and never written need not be looked at: a
 * large disk's maps are mostly that.  False if there is none.
 */
static bool next_part(const struct bitmap *b, uint64_t map, uint64_t *at, uint64_t *end)
{
	*end = b->map_bytes;
#if defined(SEEK_DATA) && !defined(XNBD_PORTABLE)
	off_t from = *at < *end ? lseek(b->fd, (off_t)(map + *at), SEEK_DATA) : -1, to;

	if (from < 0 && errno == ENXIO)		/* none up to the end of the file */
		return false;
	if (from < 0)
		return *at < *end;
	if ((uint64_t)from >= map + *end)
		return false;
	*at = ((uint64_t)from - map) / MAP_PAGE * MAP_PAGE;
	to = lseek(b->fd, from, SEEK_HOLE);
	if (to > from && (uint64_t)to < map + *end)
		*end = ((uint64_t)to - map + MAP_PAGE - 1) / MAP_PAGE * MAP_PAGE;
#else
	(void)map;
#endif
	return *at < *end;
}

/* Make parts of the live map what was committed: those where the map at that offset has bits. */
static void restore_live_map(struct bitmap *b, uint64_t map)
{
	for (uint64_t at = 0, end; next_part(b, map, &at, &end); at = end)
		memcpy((void *)(b->live + at), b->file + HEADER_SIZE + at, end - at);
}

/* What was set and not committed waits for the first commit. */
static void find_dirty(struct bitmap *b, uint64_t map)
{
	const uint8_t *committed = b->file + HEADER_SIZE;

	for (uint64_t at = 0, end; next_part(b, map, &at, &end); at = end)
		for (; at < end; at += MAP_PAGE)
			b->dirty[at / MAP_PAGE] =
				memcmp((void *)(b->live + at), committed + at, MAP_PAGE) != 0;
}

/* How many bits a file had when it was opened; those behind the last block do not count. */
static uint64_t count_all(const struct bitmap *b, uint64_t map)
{
	uint64_t count = 0;

	for (uint64_t at = 0, end; next_part(b, map, &at, &end); at = end)
		count += count_range(b, at * 8, end * 8 < b->blocks ? end * 8 : b->blocks);
	return count;
}

/*
 * After a reboot, or if we cannot know, the live map is what was committed.  All that was stored is
 * written out first, so that every file system tells it from what never was.
 */
static int settle_live_map(struct bitmap *b)
{
	static const uint8_t unknown[BOOT_ID_SIZE];
	uint64_t map = HEADER_SIZE + b->map_bytes;
	int err = sync_file(b);

	if (err)
		return err;
	if (memcmp(b->boot_id, unknown, BOOT_ID_SIZE) != 0 &&
	    memcmp(b->boot_id, b->file + 40, BOOT_ID_SIZE) == 0) {
		find_dirty(b, map);
		find_dirty(b, HEADER_SIZE);
	} else {
		restore_live_map(b, map);
		map = HEADER_SIZE;
		restore_live_map(b, map);
	}
	atomic_init(&b->set, count_all(b, map));
	return 0;
}

/* Write the contents of a new file; a mapping must never meet a full disk, so all is allocated. */
static int format(struct bitmap *b)
{
	int err = posix_fallocate(b->fd, 0, (off_t)b->file_bytes);

	if (err)
		return -err;
	err = write_header(b, false);
	return !err && fsync(b->fd) < 0 ? -errno : err;
}

/* Give the file at tmp its name; replace says whether something may be there. */
static int name_file(const char *tmp, const char *path, bool replace)
{
	if (!replace && link(tmp, path) == 0)
		return unlink(tmp) < 0 ? -errno : 0;
	if (!replace && errno != EPERM && errno != EOPNOTSUPP)	/* no links there */
		return -errno;
	return rename(tmp, path) < 0 ? -errno : 0;
}

/* The file gets its name when it is whole and durable, so that a crash leaves none or all of it. */
static int create_file(struct bitmap *b, const char *path, bool replace)
{
	size_t len = strlen(path) + sizeof(".XXXXXX");
	char *tmp = malloc(len);
	int err;

	if (!tmp)
		return -ENOMEM;
	snprintf(tmp, len, "%s.XXXXXX", path);
	b->fd = mkostemp(tmp, O_CLOEXEC);
	if (b->fd < 0) {
		err = -errno;
		free(tmp);
		return err;
	}
	err = format(b);
	if (!err)
		err = name_file(tmp, path, replace);
	if (err)
		unlink(tmp);
	free(tmp);
	close(b->fd);
	b->fd = -1;
	return err ? err : sync_directory_of(path);
}

/* Open and lock a file that is there; -EWOULDBLOCK if somebody has it, or has just replaced it. */
static int open_existing(struct bitmap *b, const char *path)
{
	struct stat st, named;

	b->fd = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
	if (b->fd < 0 || flock(b->fd, LOCK_EX | LOCK_NB) < 0 || fstat(b->fd, &st) < 0 ||
	    lstat(path, &named) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return -EINVAL;
	return st.st_dev == named.st_dev && st.st_ino == named.st_ino ? 0 : -EWOULDBLOCK;
}

/* What is larger than the bitmap should be, and is none, may be an image by mistake. */
static bool may_clear(const struct bitmap *b)
{
	uint8_t found[sizeof(magic)];
	struct stat st;

	return fstat(b->fd, &st) == 0 &&
	       ((uint64_t)st.st_size <= b->file_bytes ||
		(read_at(b->fd, found, sizeof(found), 0) == 0 &&
		 memcmp(found, magic, sizeof(magic)) == 0));
}

static int open_file(struct bitmap *b, const char *path, bool clear, bool *created)
{
	int err = open_existing(b, path), old = b->fd;

	*created = false;
	if (err != -ENOENT && (err || !clear))
		return err;
	if (!err && !may_clear(b))
		return -EINVAL;
	err = create_file(b, path, clear && !err);
	*created = err == 0;
	if (old >= 0)
		close(old);		/* and with it the lock on what was there */
	return err == 0 || err == -EEXIST ? open_existing(b, path) : err;
}

static int map_file(struct bitmap *b)
{
	void *map = mmap(NULL, b->file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);

	if (map == MAP_FAILED)
		return -errno;
	b->file = map;
	b->live = (atomic_uchar *)(b->file + HEADER_SIZE + b->map_bytes);
	return 0;
}

/* All of the mapping was looked at; that it is in our memory is no use. */
static void forget_pages(struct bitmap *b)
{
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	madvise(b->file, b->file_bytes, MADV_DONTNEED);
#else
	(void)b;
#endif
}

static bool prepare(struct bitmap *b, const char *path, bool clear)
{
	struct stat st;
	bool created;
	int err = open_file(b, path, clear, &created);

	if (!err && fstat(b->fd, &st) < 0)
		err = -errno;
	if (!err && (uint64_t)st.st_size < HEADER_SIZE)
		return refuse(b, path, "size of the file", (uint64_t)st.st_size, b->file_bytes);
	if (!err)
		err = map_file(b);
	if (!err && !check_header(b, path, (uint64_t)st.st_size))
		return false;
	if (!err && !created) {
		err = settle_live_map(b);
		forget_pages(b);
	}
	if (!err)
		err = write_header(b, false);
	if (err)
		log_failure("bitmap file %s: %s", path,
			    err == -EWOULDBLOCK ? "another server uses it" :
			    err == -EINVAL	? "it is no bitmap file, and is left alone" :
						  strerror(-err));
	return err == 0;
}

struct bitmap *bitmap_open(const char *path, const struct bitmap_identity *id, bool clear)
{
	struct bitmap *b = calloc(1, sizeof(*b));

	if (!b)
		goto out_of_memory;
	b->fd = -1;
	b->id = *id;
	read_boot_id(b->boot_id);
	b->blocks = bitmap_blocks(id->disk_size);
	b->map_bytes = map_bytes_of(b->blocks ? b->blocks : 1);
	b->file_bytes = HEADER_SIZE + 2 * b->map_bytes;
	b->dirty = calloc(b->map_bytes / MAP_PAGE, sizeof(*b->dirty));
	b->pages = malloc(COMMIT_PAGES * MAP_PAGE);
	if (!b->dirty || !b->pages)
		goto out_of_memory;
	if (prepare(b, path, clear))
		return b;
	bitmap_close(b);
	return NULL;
out_of_memory:
	log_failure("bitmap file %s: %s", path, strerror(ENOMEM));
	bitmap_close(b);
	return NULL;
}

void bitmap_close(struct bitmap *b)
{
	if (!b)
		return;
	if (b->file)
		munmap(b->file, b->file_bytes);
	else if (b->live)
		munmap((void *)b->live, b->map_bytes);
	if (b->fd >= 0)
		close(b->fd);
	free((void *)b->dirty);
	free(b->pages);
	free(b);
}

/* Take the contents of dirty pages from *page on; returns how many. */
static unsigned take_dirty(struct bitmap *b, uint64_t *page)
{
	uint64_t pages = b->map_bytes / MAP_PAGE;
	unsigned n = 0;

	for (; *page < pages && n < COMMIT_PAGES; ++*page) {
		if (!atomic_exchange_explicit(&b->dirty[*page], 0, memory_order_acquire))
			continue;
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

	for (unsigned i = 0; i < n && !err; i++)
		err = write_at(b->fd, b->pages + i * MAP_PAGE, MAP_PAGE,
				  HEADER_SIZE + b->page_number[i] * MAP_PAGE);
	if (!err && n > 0)
		err = sync_file(b);
	return err;
}

int bitmap_commit(struct bitmap *b, int (*sync)(void *), void *arg)
{
	uint64_t page = 0;
	unsigned n;
	int err;

	do {
		n = take_dirty(b, &page);
		err = sync(arg);
		if (!err)
			err = write_committed(b, n);
	} while (!err && n == COMMIT_PAGES);
	return err;
}

bool bitmap_is_dirty(const struct bitmap *b)
{
	for (uint64_t page = 0; page < b->map_bytes / MAP_PAGE; page++)
		if (atomic_load_explicit(&b->dirty[page], memory_order_relaxed))
			return true;
	return false;
}

int bitmap_mark_clean(struct bitmap *b)
{
	return write_header(b, true);
}
