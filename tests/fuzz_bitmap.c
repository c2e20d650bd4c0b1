/*
 * fuzz_bitmap.c - fuzzes what bitmap.c opens: a file of any contents.
 *
 * The first bytes of an input choose the disk and what is done to the file; the rest is its
 * contents.  Whether it may be opened, and what it then says, is found here in another way: from
 * xnbd-bitmap(5).  bitmap.c is included for the boot id, and for what it says of a refusal.
 *
 * TMPDIR should be in memory: much is synced.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include "../util.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define log_failure(...) ((void)snprintf(reason, sizeof(reason), __VA_ARGS__))
static char reason[256];
#include "../bitmap.c"

enum {
	CHANGES_MAX = 8,
	PAGE_BLOCKS = 8 * 4096,		/* of a page of a map */
};

/* What is asked for, and the file that is there. */
struct scene {
	struct bitmap_identity id;
	bool clear;
	bool sparse, allocated;		/* pages of zeros are not written; there is room for them */
	uint64_t blocks, map_bytes;
	uint8_t *file;			/* NULL: there is none */
	size_t len;
};

static char path[256];

static void choose_path(void)
{
	const char *tmp = getenv("TMPDIR");
	char dir[sizeof(path) - 8];

	snprintf(dir, sizeof(dir), "%s/xnbd-fuzz-XXXXXX", tmp ? tmp : "/tmp");
	assert(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/map", dir);
}

static void remove_directory(void)
{
	unlink(path);
	*strrchr(path, '/') = '\0';
	rmdir(path);
}

/* The file */

static uint64_t fnv1a(const uint8_t *p, size_t n)
{
	uint64_t h = UINT64_C(14695981039346656037);

	for (; n > 0; n--)
		h = (h ^ *p++) * UINT64_C(1099511628211);
	return h;
}

/* Make the header good, but for what bits say. */
static void mend_header(struct scene *s, unsigned bits)
{
	if (s->len < 72 || !(bits & 1))
		return;
	memcpy(s->file, "xnbdbmap", 8);
	if (bits & 2) {
		put_le(s->file + 8, 1, 4);
		put_le(s->file + 12, s->id.kind, 4);
		put_le(s->file + 16, 4096, 8);
		put_le(s->file + 24, s->id.disk_size, 8);
		put_le(s->file + 32, s->id.fingerprint, 8);
	}
	if (bits & 4)
		read_boot_id(s->file + 40);
	if (bits & 8)
		put_le(s->file + 64, fnv1a(s->file, 64), 8);
}

/* The contents go to the header, and repeated to both maps if the size shall be right. */
static void make_file(struct scene *s, struct input *in, unsigned bits)
{
	unsigned empty = bits & 64 ? (unsigned)take(in, 1) : 0;		/* which pages of the maps */
	size_t n = in->left, full = 4096 + 2 * s->map_bytes;
	uint8_t *p = take_bytes(in, &n);

	s->len = bits & 16 ? n : full + (bits & 32 ? n % 3 - 1 : 0);
	s->file = calloc(1, s->len ? s->len : 1);
	assert(s->file);
	if (n > 0)
		memcpy(s->file, p, n < s->len ? n : s->len);
	for (size_t at = 4096, i = 0; n > 0 && at < s->len; at++, i++)
		if (empty & 1 << i / 4096 % 8)
			s->file[at] = 0;
		else
			s->file[at] = p[(i * 7 + i / 4096) % n];
	free(p);
	mend_header(s, bits);
}

/* Few, or about as many as fill a page of the map: it takes long to look at many. */
static uint64_t take_blocks(struct input *in)
{
	uint64_t n = take(in, 1);

	return n < 224 ? n : PAGE_BLOCKS * (1 + (n & 1)) + n - 240;
}

static void write_file(const struct scene *s)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
	static const uint8_t zeros[4096];

	assert(fd >= 0 && ftruncate(fd, (off_t)s->len) == 0);
	assert(!s->allocated || s->len == 0 || posix_fallocate(fd, 0, (off_t)s->len) == 0);
	for (size_t at = 0, n; at < s->len; at += n) {
		n = s->len - at < sizeof(zeros) ? s->len - at : sizeof(zeros);
		if (!s->sparse || memcmp(s->file + at, zeros, n) != 0)
			assert(pwrite(fd, s->file + at, n, (off_t)at) == (ssize_t)n);
	}
	close(fd);
}

static void make_scene(struct scene *s, struct input *in)
{
	unsigned what = (unsigned)take(in, 1), bits = (unsigned)take(in, 1);

	s->blocks = take_blocks(in);
	s->id.disk_size = s->blocks * 4096;
	if (s->blocks > 0)
		s->id.disk_size -= take(in, 2) % 4096;
	s->id.kind = what & 1 ? BITMAP_OVERLAY : BITMAP_CACHE;
	s->id.fingerprint = take(in, 1);
	s->clear = what & 2;
	s->sparse = what & 16;
	s->allocated = what & 32;
	s->map_bytes = s->blocks ? (s->blocks + PAGE_BLOCKS - 1) / PAGE_BLOCKS * 4096 : 4096;
	s->file = NULL;
	s->len = 0;
	unlink(path);
	if (what & 4 && what & 8)
		return;			/* there is no file */
	make_file(s, in, bits);
	write_file(s);
}

/* What the file is now: free() it. */
static uint8_t *read_file(size_t *len)
{
	int fd = open(path, O_RDONLY);
	struct stat st;
	uint8_t *p;

	assert(fd >= 0 && fstat(fd, &st) == 0);
	*len = (size_t)st.st_size;
	p = malloc(*len ? *len : 1);
	assert(p && read(fd, p, *len) == (ssize_t)*len);
	close(fd);
	return p;
}

/* What must come of it */

static bool is_good(const struct scene *s)
{
	const uint8_t *p = s->file;

	return s->len == 4096 + 2 * s->map_bytes && memcmp(p, "xnbdbmap", 8) == 0 &&
	       get_le(p + 8, 4) == 1 && get_le(p + 12, 4) == s->id.kind &&
	       get_le(p + 16, 8) == 4096 && get_le(p + 24, 8) == s->id.disk_size &&
	       get_le(p + 32, 8) == s->id.fingerprint && get_le(p + 64, 8) == fnv1a(p, 64);
}

/* Something that is no bitmap, and larger than one, is left alone even so. */
static bool is_clearable(const struct scene *s)
{
	return s->len <= 4096 + 2 * s->map_bytes ||
	       (s->len >= 8 && memcmp(s->file, "xnbdbmap", 8) == 0);
}

/* The map that is to be believed; NULL: no bit is set. */
static const uint8_t *believed(const struct scene *s)
{
	uint8_t id[16];

	if (!s->file || s->clear)
		return NULL;
	read_boot_id(id);
	return s->file + 4096 + (memcmp(s->file + 40, id, 16) == 0 ? s->map_bytes : 0);
}

static void check_untouched(const struct scene *s)
{
	size_t len;
	uint8_t *p = read_file(&len);

	assert(len == s->len && memcmp(p, s->file, len) == 0);
	free(p);
}

static bool bit_of(const uint8_t *map, uint64_t blk)
{
	return map && map[blk / 8] >> blk % 8 & 1;
}

/* Each bit, how many, and the runs that they make. */
static void check_bits(const struct bitmap *b, const uint8_t *map, uint64_t blocks)
{
	uint64_t count = 0, run = 0;
	bool set = false;

	for (uint64_t blk = 0; blk < blocks; blk++, run--) {
		assert(bitmap_test(b, blk) == bit_of(map, blk));
		count += bit_of(map, blk);
		if (run > 0) {
			assert(bit_of(map, blk) == set);
			continue;
		}
		assert(blk == 0 || bit_of(map, blk) != set);
		run = bitmap_run(b, blk, blocks - blk, &set);
		assert(run > 0 && run <= blocks - blk && set == bit_of(map, blk));
	}
	assert(bitmap_count(b) == count);
}

/* Set bits, in the bitmap and in the map that says what it must be. */
static void change(struct bitmap *b, uint8_t *map, uint64_t blocks, struct input *in)
{
	for (unsigned i = 0; i < CHANGES_MAX && blocks > 0 && in->left > 0; i++) {
		uint64_t blk = take(in, 3) % blocks, n = take(in, 2) % (blocks - blk + 1), fresh = 0;

		for (uint64_t k = blk; k < blk + n; k++) {
			fresh += !bit_of(map, k);
			map[k / 8] |= (uint8_t)(1 << k % 8);
		}
		assert(bitmap_set(b, blk, n) == fresh);
		assert(!fresh || bitmap_is_dirty(b));
	}
}

static int sync_data(void *arg)
{
	++*(unsigned *)arg;
	return 0;
}

/* After a commit, and a reboot: all is there, and the file is what the manual says. */
static void check_commit(struct bitmap *b, const struct scene *s, const uint8_t *map)
{
	unsigned synced = 0;
	size_t len;
	uint8_t *p;

	assert(bitmap_commit(b, sync_data, &synced) == 0 && synced > 0);
	assert(!bitmap_is_dirty(b) && bitmap_mark_clean(b) == 0);
	bitmap_close(b);
	p = read_file(&len);
	assert(len == 4096 + 2 * s->map_bytes && get_le(p + 56, 4) == 1);
	assert(get_le(p + 64, 8) == fnv1a(p, 64));
	assert(memcmp(p + 4096, p + 4096 + s->map_bytes, s->map_bytes) == 0);
	for (uint64_t blk = 0; blk < s->blocks; blk++)
		assert(bit_of(p + 4096, blk) == bit_of(map, blk));
	free(p);
}

/* The machine has no memory of what was not committed: the boot id is another one. */
static void forget_boot_id(void)
{
	uint8_t p[72];
	int fd = open(path, O_RDWR);

	assert(fd >= 0 && read_at(fd, p, sizeof(p), 0) == 0);
	p[40] ^= 1;
	put_le(p + 64, fnv1a(p, 64), 8);
	assert(write_at(fd, p, sizeof(p), 0) == 0);
	close(fd);
}

static void use(struct bitmap *b, const struct scene *s, struct input *in)
{
	uint8_t *map = calloc(1, s->map_bytes);
	bool kill = take(in, 1) & 1;

	assert(map);
	if (believed(s))
		memcpy(map, believed(s), s->map_bytes);
	check_bits(b, map, s->blocks);
	change(b, map, s->blocks, in);
	check_bits(b, map, s->blocks);
	assert(!bitmap_open(path, &s->id, s->clear));	/* somebody has it */
	if (kill) {
		bitmap_close(b);
		b = bitmap_open(path, &s->id, false);
		assert(b);
		check_bits(b, map, s->blocks);
	}
	check_commit(b, s, map);
	forget_boot_id();
	b = bitmap_open(path, &s->id, false);
	assert(b);
	check_bits(b, map, s->blocks);
	bitmap_close(b);
	free(map);
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
	size_t tail = n > 32 ? 32 : 0;
	struct input in = { p, n - tail }, later = { p + n - tail, tail };
	struct bitmap *b;
	struct scene s;

	if (!path[0]) {
		choose_path();
		atexit(remove_directory);
	}
	make_scene(&s, &in);
	reason[0] = '\0';
	b = bitmap_open(path, &s.id, s.clear);
	if (!s.file || (s.clear ? is_clearable(&s) : is_good(&s))) {
		assert(b);
		use(b, &s, &later);
	} else {
		assert(!b && strstr(reason, path));
		check_untouched(&s);
	}
	free(s.file);
	return 0;
}
