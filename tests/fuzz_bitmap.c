/*
 * fuzz_bitmap.c - fuzzes what bitmap.c opens: a file of any contents.
 *
 * The first bytes of an input choose the disk and what is done to the file; the rest is its
 * contents, and at the end of it what is done to the bitmap: bits, commits, kills, power cuts.
 * Whether the file may be opened, and what it then says, is found here in another way: from
 * xnbd-bitmap(5).  bitmap.c is included for the boot id, the instances of file systems, and for
 * what it says of a refusal.
 *
 * TMPDIR should be in memory: much is synced.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include "../log.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#undef log_line
#undef log_failure
#define log_failure(...) (snprintf(reason, sizeof(reason), __VA_ARGS__), false)
#define log_line(...) ((void)snprintf(reason, sizeof(reason), __VA_ARGS__))
static char reason[256];
#include "../bitmap.c"

enum {
	EVENTS_MAX = 12,
	TAIL = 64,			/* bytes of an input that choose events */
	HEADER_BYTES = 88,		/* of the header that mean something */
};

/* Where what is where in the header. */
enum {
	AT_VERSION = 8,
	AT_BOOT = 40,
	AT_CLEAN = 56,
	AT_FLAGS = 60,
	AT_IMAGE = 64,
	AT_OWN = 72,
	AT_CHECKSUM = 80,
	AT_CHECKSUM_1 = 64,		/* of version 1 */
};

/* What is asked for, and the file that is there. */
struct scene {
	struct bitmap_identity id;
	bool clear;
	bool sparse, allocated;		/* pages of zeros are not written; there is room for them */
	bool raw;			/* flags and instances are what the contents say */
	uint64_t blocks, map_bytes;
	uint8_t *file;			/* NULL: there is none */
	size_t len;
};

static char path[256];
static struct disk image;		/* it is synced, and no more */

int disk_sync(struct disk *d)
{
	return atomic_load(&d->error);
}

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

static size_t checked_bytes(const uint8_t *header)
{
	return get_le(header + AT_VERSION, 4) == 1 ? AT_CHECKSUM_1 : AT_CHECKSUM;
}

static void seal(uint8_t *header)
{
	size_t n = checked_bytes(header);

	put_le(header + n, fnv1a(header, n), 8);
}

static bool is_sealed(const uint8_t *header)
{
	size_t n = checked_bytes(header);

	return get_le(header + n, 8) == fnv1a(header, n);
}

/* Make the header good, but for what bits say. */
static void mend_header(struct scene *s, unsigned bits)
{
	if (s->len < HEADER_BYTES || !(bits & 1))
		return;
	memcpy(s->file, "xnbdbmap", 8);
	if (bits & 2) {
		put_le(s->file + AT_VERSION, bits & 128 ? 1 : 2, 4);
		put_le(s->file + 12, s->id.kind, 4);
		put_le(s->file + 16, 4096, 8);
		put_le(s->file + 24, s->id.disk_size, 8);
		put_le(s->file + 32, s->id.fingerprint, 8);
	}
	if (bits & 4)
		read_boot_id(s->file + AT_BOOT);
	if (!s->raw) {
		put_le(s->file + AT_FLAGS, s->file[AT_FLAGS] & BITMAP_WRITTEN, 4);
		put_le(s->file + AT_IMAGE, instance_of(s->id.image), 8);
		put_le(s->file + AT_OWN, instance_of(path), 8);
	}
	if (bits & 8)
		seal(s->file);
}

/* One of the sizes that are nearly right; the last one has no live map, and is right as well. */
static size_t other_size(const struct scene *s, size_t n)
{
	size_t full = 4096 + 2 * s->map_bytes;

	return n % 4 == 3 ? full - s->map_bytes : full + n % 4 - 1;
}

/* The contents go to the header, and repeated to both maps if the size shall be right. */
static void make_file(struct scene *s, struct input *in, unsigned bits)
{
	unsigned empty = bits & 64 ? (unsigned)take(in, 1) : 0;		/* which pages of the maps */
	size_t n = in->left;
	uint8_t *p = take_bytes(in, &n);

	s->len = bits & 16 ? n : bits & 32 ? other_size(s, n) : 4096 + 2 * s->map_bytes;
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
	s->id.image = what & 64 ? "/" : path;
	s->raw = what & 128;
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
	size_t full = 4096 + 2 * s->map_bytes;

	return (s->len == full || s->len == full - s->map_bytes) &&
	       memcmp(p, "xnbdbmap", 8) == 0 &&
	       (get_le(p + AT_VERSION, 4) == 1 || get_le(p + AT_VERSION, 4) == 2) &&
	       get_le(p + 12, 4) == s->id.kind && get_le(p + 16, 8) == 4096 &&
	       get_le(p + 24, 8) == s->id.disk_size && get_le(p + 32, 8) == s->id.fingerprint &&
	       is_sealed(p);
}

/* Something that is no bitmap, or one of another kind, is left alone even so. */
static bool is_clearable(const struct scene *s)
{
	return s->len == 0 || (s->len >= 16 && memcmp(s->file, "xnbdbmap", 8) == 0 &&
			       get_le(s->file + 12, 4) == s->id.kind);
}

/* What a bitmap must say, and what it must say after a power cut. */
struct truth {
	uint8_t *now, *durable;		/* maps */
	bool whole;			/* all bits are set: both maps are 0xff then */
	bool written;			/* a client has changed the disk */
};

static bool is_same_place(const uint8_t *p, uint64_t instance)
{
	uint64_t then = get_le(p, 8);

	return then == 0 || instance == 0 || then == instance;
}

/* Whether the live map of a file counts. */
static bool live_counts(const struct scene *s)
{
	const uint8_t *p = s->file;
	uint8_t id[16];

	read_boot_id(id);
	if (s->len != 4096 + 2 * s->map_bytes || memcmp(p + AT_BOOT, id, 16) != 0)
		return false;
	return get_le(p + AT_VERSION, 4) == 1 ||
	       (!(p[AT_FLAGS] & BITMAP_FAILED) && is_same_place(p + AT_IMAGE, instance_of(s->id.image)) &&
		is_same_place(p + AT_OWN, instance_of(path)));
}

static void hold_all(const struct scene *s, struct truth *t)
{
	t->whole = true;
	memset(t->now, 0xff, s->map_bytes);
	memset(t->durable, 0xff, s->map_bytes);
}

/* What the file at the beginning says. */
static void read_truth(const struct scene *s, struct truth *t)
{
	const uint8_t *p = s->file;

	memset(t, 0, sizeof(*t));
	t->now = calloc(1, s->map_bytes);
	t->durable = calloc(1, s->map_bytes);
	assert(t->now && t->durable);
	if (!p || s->clear)
		return;
	for (uint64_t i = 0; i < s->map_bytes; i++) {
		t->durable[i] = p[4096 + i];
		t->now[i] = t->durable[i] | (live_counts(s) ? p[4096 + s->map_bytes + i] : 0);
	}
	t->written = get_le(p + AT_VERSION, 4) == 2 && p[AT_FLAGS] & BITMAP_WRITTEN;
	if (get_le(p + AT_VERSION, 4) == 2 && p[AT_FLAGS] & BITMAP_WHOLE)
		hold_all(s, t);
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

/* The runs that bits make, and how many are set. */
static void check_runs(const struct bitmap *b, const uint8_t *map, uint64_t blocks)
{
	uint64_t count = 0, run;
	bool set = false, last;

	for (uint64_t blk = 0; blk < blocks; blk += run) {
		last = set;
		run = bitmap_run(b, blk, blocks - blk, &set);
		assert(run > 0 && run <= blocks - blk && (blk == 0 || set != last));
		for (uint64_t i = blk; i < blk + run; i++)
			assert(bit_of(map, i) == set);
		count += set ? run : 0;
	}
	assert(bitmap_count(b) == count);
}

/* Each bit as well. */
static void check_bits(const struct bitmap *b, const uint8_t *map, uint64_t blocks)
{
	for (uint64_t blk = 0; blk < blocks; blk++)
		assert(is_set(b, blk) == bit_of(map, blk));
	check_runs(b, map, blocks);
}

/* Whether something is to be committed. */
static bool is_dirty(const struct bitmap *b)
{
	for (uint64_t page = 0; page < b->map_bytes / MAP_PAGE; page++)
		if (b->page[page] & DIRTY)
			return true;
	return false;
}

/* Set bits, in the bitmap and in the map that says what it must be. */
static void change(struct bitmap *b, const struct scene *s, struct truth *t, struct input *in)
{
	uint64_t blk, n, fresh = 0, before = bitmap_count(b);

	if (s->blocks == 0)
		return;
	blk = take(in, 3) % s->blocks;
	n = take(in, 2) % (s->blocks - blk + 1);
	for (uint64_t k = blk; k < blk + n; k++) {
		fresh += !bit_of(t->now, k);
		t->now[k / 8] |= (uint8_t)(1 << k % 8);
	}
	assert(bitmap_set(b, blk, n, true) == 0 && bitmap_count(b) == before + fresh);
	assert(!fresh || is_dirty(b));
}

/* Commit; or try to, when the data cannot be made durable. */
static void make_durable(struct bitmap *b, const struct scene *s, struct truth *t, bool fails)
{
	bool dirty = is_dirty(b);

	atomic_store(&image.error, fails ? -EIO : 0);
	assert(bitmap_commit(b, &image) == (fails ? -EIO : 0));
	assert(!bitmap_has_failed(b) && is_dirty(b) == (fails && dirty));
	if (!fails)
		memcpy(t->durable, t->now, s->map_bytes);
}

/* Change a byte of the header of the file, which nobody has open. */
static void change_header(unsigned at)
{
	uint8_t p[HEADER_BYTES];
	int fd = open(path, O_RDWR);

	assert(fd >= 0 && read_at(fd, p, sizeof(p), 0) == 0);
	assert(get_le(p + AT_VERSION, 4) == 2 && is_sealed(p));
	p[at] ^= 1;
	seal(p);
	assert(write_at(fd, p, sizeof(p), 0) == 0);
	close(fd);
}

enum end { KILL, POWER_CUT, FAILURE, REMOUNT, ENDS };

/* It ends, and another one opens the file. */
static struct bitmap *reopen(struct bitmap *b, const struct scene *s, struct truth *t, enum end how)
{
	unsigned instance = b->own_instance > 1 ? AT_OWN : b->image_instance > 1 ? AT_IMAGE : 0;

	if (how == FAILURE)
		bitmap_tell(b, BITMAP_FAILED, false);
	bitmap_close(b);
	if (how == POWER_CUT)
		change_header(AT_BOOT);
	if (how == REMOUNT && instance)
		change_header(instance);
	if (how != KILL && (how != REMOUNT || instance))
		memcpy(t->now, t->durable, s->map_bytes);
	b = bitmap_open(path, &s->id, false);
	assert(b);
	return b;
}

/* In order, after a commit: the file is what the manual says. */
static void check_file(const struct scene *s, const struct truth *t)
{
	size_t len;
	uint8_t *p = read_file(&len);

	assert(len == 4096 + 2 * s->map_bytes && get_le(p + AT_VERSION, 4) == 2);
	assert(is_sealed(p) && get_le(p + AT_CLEAN, 4) == 1);
	assert(get_le(p + AT_FLAGS, 4) == (t->whole ? BITMAP_WHOLE : 0U) + (t->written ? BITMAP_WRITTEN : 0U));
	for (uint64_t blk = 0; blk < s->blocks; blk++) {
		assert(t->whole || bit_of(p + 4096, blk) == bit_of(t->now, blk));
		assert(!bit_of(p + 4096 + s->map_bytes, blk) || bit_of(t->now, blk));
	}
	free(p);
}

static struct bitmap *do_event(struct bitmap *b, const struct scene *s, struct truth *t,
			       struct input *in)
{
	unsigned event = (unsigned)take(in, 1);

	switch (event % 8) {
	case 0:
	case 1:
	case 2:
		change(b, s, t, in);
		return b;
	case 3:
		make_durable(b, s, t, event & 8);
		return b;
	case 4:
		assert(bitmap_tell(b, BITMAP_WHOLE, true) == 0);
		hold_all(s, t);
		return b;
	case 5:
		assert(bitmap_tell(b, BITMAP_WRITTEN, false) == 0);
		t->written = true;
		return b;
	default:
		return reopen(b, s, t, event / 8 % ENDS);
	}
}

static void use(struct bitmap *b, const struct scene *s, struct input *in)
{
	struct truth t;

	read_truth(s, &t);
	check_bits(b, t.now, s->blocks);
	assert(!bitmap_open(path, &s->id, s->clear));	/* somebody has it */
	for (unsigned i = 0; i < EVENTS_MAX && in->left > 0; i++) {
		b = do_event(b, s, &t, in);
		check_runs(b, t.now, s->blocks);
	}
	make_durable(b, s, &t, false);
	assert(bitmap_mark_clean(b) == 0);
	bitmap_close(b);
	check_file(s, &t);
	change_header(AT_BOOT);
	b = bitmap_open(path, &s->id, false);
	assert(b);
	check_bits(b, t.now, s->blocks);
	bitmap_close(b);
	free(t.now);
	free(t.durable);
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
	size_t tail = n > TAIL ? TAIL : 0;
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
