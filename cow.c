/*
 * cow.c - backend: copy on write: see cow.h.
 *
 * A bit for each block tells where it is: 1 in the overlay, at the same offset, 0 in the base.
 * A bit is set after the block's data is in the overlay, all of it, and is never taken back: a
 * block that is trimmed or zeroed is a hole in the overlay.  So a reader that finds 0 reads the
 * base, which does not change, and one that finds 1 reads what was stored.
 *
 * The first write to a block may have to add the rest of it from the base.  Until its bit is
 * set, a block is written only by who holds its range (range.h): else a merge could bury a
 * write that came between its reading and its writing.  Once the bit is set, writes go straight
 * to the overlay.
 *
 * A throw-away overlay has no name.  One that is kept has its bits in a bitmap file (bitmap.h).
 */
#define _GNU_SOURCE
#include "cow.h"

#include "bitmap.h"
#include "commit.h"
#include "disk.h"
#include "range.h"
#include "util.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct cow {
	struct backend backend;
	struct disk *base, *overlay;
	struct bitmap *map;
	struct ranges first_writes;
	bool kept;
	struct committer committer;	/* if it is kept */
};

static struct cow *to_cow(struct backend *b)
{
	return (struct cow *)b;
}

/* A run of blocks that lie in the same place. */
struct run {
	struct disk *disk;
	uint64_t len;
};

/* The run at off, at most len bytes. */
static struct run run_at(const struct cow *c, uint64_t off, uint64_t len)
{
	uint64_t blk = off / BLOCK_SIZE, end = off + len, blocks, to;
	bool set;

	blocks = bitmap_run(c->map, blk, bitmap_blocks(end) - blk, &set);
	to = (blk + blocks) * BLOCK_SIZE;
	return (struct run){ set ? c->overlay : c->base, (to < end ? to : end) - off };
}

static bool is_in_overlay(const struct cow *c, uint64_t len, uint64_t off)
{
	struct run run = run_at(c, off, len);

	return run.disk == c->overlay && run.len == len;
}

/* Reading */

static int read_runs(struct cow *c, uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = 0;

	while (len > 0 && ret == 0) {
		struct run run = run_at(c, off, len);

		ret = disk_read(run.disk, buf, run.len, off, how);
		buf += run.len;
		off += run.len;
		len -= run.len;
	}
	return ret;
}

static int op_read(struct backend *b, struct request *r, enum how how)
{
	return read_runs(to_cow(b), r->buf, r->h.len, r->h.off, how);
}

static int op_map(struct backend *b, const struct request *r, struct iovec *iov, int max)
{
	uint64_t off = r->h.off, len = r->h.len;
	int n = 0;

	while (len > 0) {
		struct run run = run_at(to_cow(b), off, len);

		if (n == max || !disk_map(run.disk, run.len, off, &iov[n++]))
			return 0;
		off += run.len;
		len -= run.len;
	}
	return n;
}

/* Writing */

/* Bytes of the block that holds off; the last block may be a part of one. */
static uint64_t block_bytes(const struct cow *c, uint64_t off)
{
	uint64_t left = c->backend.size - (off - off % BLOCK_SIZE);

	return left < BLOCK_SIZE ? left : BLOCK_SIZE;
}

/*
 * Store a part of one block, whose range is held.  The rest is added from the base, but never
 * once the block is in the overlay: others may write there at the same time.
 */
static int write_part(struct cow *c, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	uint64_t at = off % BLOCK_SIZE, start = off - at, bytes = block_bytes(c, off);
	uint8_t block[BLOCK_SIZE];
	int ret;

	assert(at + len <= bytes);
	if (is_in_overlay(c, len, off))
		return disk_write(c->overlay, buf, len, off, how);
	ret = disk_read(c->base, block, bytes, start, how);
	if (ret)
		return ret;
	memcpy(block + at, buf, len);
	ret = disk_write(c->overlay, block, bytes, start, how);
	if (ret == 0)
		bitmap_set(c->map, start / BLOCK_SIZE, 1);
	return ret;
}

/* How many of len bytes at off are whole blocks from the beginning on. */
static uint64_t whole_blocks(const struct cow *c, uint64_t len, uint64_t off)
{
	if (off % BLOCK_SIZE != 0)
		return 0;
	return off + len == c->backend.size ? len : len - len % BLOCK_SIZE;
}

/* Store blocks that may be in the base as yet; their range is held. */
static int write_first(struct cow *c, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = 0;

	while (len > 0 && ret == 0) {
		uint64_t n = whole_blocks(c, len, off);

		if (n > 0) {
			ret = disk_write(c->overlay, buf, n, off, how);
			if (ret == 0)
				bitmap_set(c->map, off / BLOCK_SIZE,
					   bitmap_blocks(off + n) - off / BLOCK_SIZE);
		} else {
			n = BLOCK_SIZE - off % BLOCK_SIZE;
			if (n > len)
				n = len;
			ret = write_part(c, buf, n, off, how);
		}
		buf += n;
		off += n;
		len -= n;
	}
	return ret;
}

/* The range of all blocks that a change touches. */
static struct range blocks_of(uint64_t len, uint64_t off)
{
	uint64_t start = off - off % BLOCK_SIZE;

	return (struct range){ NULL, start, bitmap_blocks(off + len) * BLOCK_SIZE - start };
}

static int op_write(struct backend *b, struct request *r, enum how how)
{
	struct cow *c = to_cow(b);
	struct range range = blocks_of(r->h.len, r->h.off);
	int ret;

	if (is_in_overlay(c, r->h.len, r->h.off))
		return disk_write(c->overlay, r->buf, r->h.len, r->h.off, how);
	if (!ranges_take(&c->first_writes, &range, how == WAIT))
		return -EAGAIN;
	ret = write_first(c, r->buf, r->h.len, r->h.off, how);
	ranges_release(&c->first_writes, &range);
	return ret;
}

/* Zero whole blocks: they become holes of the overlay where it can have holes. */
static int zero_whole(struct cow *c, uint64_t len, uint64_t off, unsigned flags)
{
	int ret;

	if (len == 0)
		return 0;
	ret = disk_zero(c->overlay, len, off, flags);
	if (ret == 0)
		bitmap_set(c->map, off / BLOCK_SIZE, bitmap_blocks(off + len) - off / BLOCK_SIZE);
	return ret;
}

/* Bytes from off to the next block boundary, at most len. */
static uint64_t head_bytes(uint64_t len, uint64_t off)
{
	uint64_t head = (BLOCK_SIZE - off % BLOCK_SIZE) % BLOCK_SIZE;

	return head < len ? head : len;
}

/* Whole blocks first: for FAST_ZERO that is what may fail, and then nothing may have changed. */
static int zero_range(struct cow *c, uint64_t len, uint64_t off, unsigned flags)
{
	static uint8_t zeros[BLOCK_SIZE];	/* never written */
	uint64_t head = head_bytes(len, off), whole = whole_blocks(c, len - head, off + head);
	uint64_t tail = len - head - whole;
	int ret = zero_whole(c, whole, off + head, flags);

	if (ret == 0 && head > 0)
		ret = write_part(c, zeros, head, off, WAIT);
	if (ret == 0 && tail > 0)
		ret = write_part(c, zeros, tail, off + head + whole, WAIT);
	return ret;
}

static int op_zero(struct backend *b, struct request *r, enum how how)
{
	struct cow *c = to_cow(b);
	struct range range = blocks_of(r->h.len, r->h.off);
	int ret;

	if (how == TRY)
		return -EAGAIN;
	ranges_take(&c->first_writes, &range, true);
	ret = zero_range(c, r->h.len, r->h.off, r->h.flags);
	ranges_release(&c->first_writes, &range);
	return ret;
}

/* Whole blocks become holes.  Where the overlay cannot have holes nothing happens. */
static int op_trim(struct backend *b, struct request *r, enum how how)
{
	struct cow *c = to_cow(b);
	uint64_t head = head_bytes(r->h.len, r->h.off), off = r->h.off + head;
	uint64_t len = whole_blocks(c, r->h.len - head, off);
	struct range range = blocks_of(len, off);
	int ret;

	if (len == 0)
		return 0;
	if (how == TRY)
		return -EAGAIN;
	ranges_take(&c->first_writes, &range, true);
	ret = zero_whole(c, len, off, NBD_CMD_FLAG_FAST_ZERO);
	ranges_release(&c->first_writes, &range);
	return ret == -EOPNOTSUPP ? 0 : ret;
}

/* The rest */

static int op_flush(struct backend *b, struct request *r, enum how how)
{
	struct cow *c = to_cow(b);

	(void)how;
	return c->kept && !b->readonly ? committer_flush(&c->committer, r) : 0;
}

static int op_cache(struct backend *b, struct request *r, enum how how)
{
	uint64_t off = r->h.off, len = r->h.len;

	if (how == TRY)
		return -EAGAIN;
	while (len > 0) {
		struct run run = run_at(to_cow(b), off, len);

		disk_prefetch(run.disk, run.len, off);
		off += run.len;
		len -= run.len;
	}
	return 0;
}

/* Neighbours of the same status are one extent, whether they lie in the base or not. */
static int op_extents(struct backend *b, struct request *r, unsigned max, enum how how)
{
	uint64_t pos = r->h.off, end = pos + r->h.len;
	struct extent e, *last = NULL;

	if (how == TRY)
		return -EAGAIN;
	r->extents = 0;
	for (; pos < end; pos += e.len) {
		struct run run = run_at(to_cow(b), pos, end - pos);

		e = disk_extent(run.disk, pos, pos + run.len);
		if (last && last->flags == e.flags) {
			last->len += e.len;
			continue;
		}
		if (r->extents == max)
			break;
		last = &r->extent[r->extents++];
		*last = e;
	}
	return 0;
}

static void free_cow(struct cow *c)
{
	disk_close(c->base);
	disk_close(c->overlay);
	bitmap_close(c->map);
	ranges_destroy(&c->first_writes);
	committer_destroy(&c->committer);
	free(c);
}

static void op_close(struct backend *b)
{
	struct cow *c = to_cow(b);

	if (c->kept && committer_run(&c->committer) == 0)
		bitmap_mark_clean(c->map);
	free_cow(c);
}

static const struct backend_ops cow_ops = {
	.name = "cow",
	.read = op_read,
	.map = op_map,
	.write = op_write,
	.flush = op_flush,
	.trim = op_trim,
	.zero = op_zero,
	.cache = op_cache,
	.extents = op_extents,
	.close = op_close,
};

/* Opening */

/* Make an overlay of an open, empty file; takes fd over. */
static bool adopt_overlay(struct cow *c, int fd, const char *where)
{
	if (ftruncate(fd, (off_t)c->backend.size) < 0) {
		log_failure("cannot make an overlay of %llu bytes in %s: %s",
			    (unsigned long long)c->backend.size, where, strerror(errno));
		close(fd);
		return false;
	}
	c->overlay = disk_adopt(fd, c->backend.size, false);
	return c->overlay != NULL;
}

/* A file without a name in dir: -1 and errno if that is not possible. */
static int unnamed_file(const char *dir)
{
	char path[4096];
	int fd;

#if defined(O_TMPFILE) && !defined(XNBD_PORTABLE)
	fd = open(dir, O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600);
	if (fd >= 0)
		return fd;
#endif
	if (snprintf(path, sizeof(path), "%s/.xnbd-overlay-XXXXXX", dir) >= (int)sizeof(path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	fd = mkostemp(path, O_CLOEXEC);
	if (fd >= 0)
		unlink(path);
	return fd;
}

static bool open_throw_away(struct cow *c, const struct cow_options *o)
{
	struct stat st;
	char *dir;
	int fd;

	if (!o->dir && stat(o->base, &st) == 0 && !S_ISREG(st.st_mode)) {
		log_failure("base image %s is a device: --cow-dir must say where the overlay goes",
			    o->base);
		return false;
	}
	dir = o->dir ? strdup(o->dir) : directory_of(o->base);
	fd = dir ? unnamed_file(dir) : -1;
	if (fd < 0)
		log_failure("cannot make an overlay in %s: %s%s", dir ? dir : "memory",
			    strerror(errno), o->dir ? "" : " (--cow-dir names another place)");
	else if (!adopt_overlay(c, fd, dir))
		fd = -1;
	free(dir);
	if (fd < 0)
		return false;
	c->map = bitmap_new(bitmap_blocks(c->backend.size));
	if (!c->map)
		log_failure("cannot make a bitmap: %s", strerror(ENOMEM));
	return c->map != NULL;
}

/*
 * Tells one base image from another of the same size: a hash of some of its blocks, from all
 * over it.  It stays the same when the image is moved or copied.
 */
static bool fingerprint(const struct cow *c, uint64_t *result)
{
	enum { SAMPLES = 256 };
	uint64_t blocks = bitmap_blocks(c->backend.size), step = blocks / SAMPLES + 1;
	uint64_t h = UINT64_C(0xcbf29ce484222325);
	uint8_t block[BLOCK_SIZE];

	for (uint64_t blk = 0; blk < blocks; blk += blk < SAMPLES ? 1 : step) {
		uint64_t off = blk * BLOCK_SIZE, bytes = block_bytes(c, off);
		int err = disk_read(c->base, block, bytes, off, WAIT);

		if (err) {
			log_failure("cannot read the base image: %s", strerror(-err));
			return false;
		}
		for (uint64_t i = 0; i < bytes; i++)
			h = (h ^ block[i]) * UINT64_C(0x100000001b3);
	}
	*result = h;
	return true;
}

/* The overlay's file is not there yet: right only if its map is empty. */
static bool create_kept(struct cow *c, const char *path)
{
	uint64_t held = bitmap_count(c->map);
	int fd, err;

	if (held > 0) {
		log_failure("overlay %s does not exist, but %s.map says that it holds %llu blocks",
			    path, path, (unsigned long long)held);
		return false;
	}
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0) {
		log_failure("cannot create overlay %s: %s", path, strerror(errno));
		return false;
	}
	if (!adopt_overlay(c, fd, path)) {
		unlink(path);
		return false;
	}
	err = disk_sync(c->overlay);
	if (!err)
		err = sync_directory_of(path);
	if (err) {
		log_failure("cannot create overlay %s: %s", path, strerror(-err));
		unlink(path);
	}
	return err == 0;
}

static bool open_kept_file(struct cow *c, const char *path)
{
	struct stat st;
	int fd = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC);

	if (fd < 0 && errno == ENOENT)
		return create_kept(c, path);
	if (fd < 0 || fstat(fd, &st) < 0) {
		log_failure("cannot open overlay %s: %s", path, strerror(errno));
		if (fd >= 0)
			close(fd);
		return false;
	}
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size != c->backend.size) {
		log_failure("overlay %s: its size is %llu, and %llu, that of its base, is expected",
			    path, (unsigned long long)st.st_size,
			    (unsigned long long)c->backend.size);
		close(fd);
		return false;
	}
	c->overlay = disk_adopt(fd, c->backend.size, false);
	return c->overlay != NULL;
}

static bool open_kept(struct cow *c, const char *path)
{
	struct bitmap_identity id = { BITMAP_OVERLAY, c->backend.size, 0 };
	size_t len = strlen(path) + sizeof(".map");
	char *map_path = malloc(len);
	bool ok = false;

	if (!map_path || !fingerprint(c, &id.fingerprint))
		goto out;
	snprintf(map_path, len, "%s.map", path);
	if (access(path, F_OK) == 0 && access(map_path, F_OK) < 0) {
		log_failure("overlay %s exists, but its map %s does not: without it the overlay is "
			    "of no use, remove it to begin afresh", path, map_path);
		goto out;
	}
	c->map = bitmap_open(map_path, &id);
	ok = c->map && open_kept_file(c, path);
out:
	free(map_path);
	return ok;
}

static int sync_overlay(void *overlay)
{
	return disk_sync(overlay);
}

static int commit(struct committer *committer)
{
	struct cow *c = (struct cow *)((char *)committer - offsetof(struct cow, committer));

	return bitmap_commit(c->map, sync_overlay, c->overlay);
}

struct backend *cow_open(const struct cow_options *o)
{
	struct cow *c = calloc(1, sizeof(*c));

	if (!c) {
		log_failure("cannot open image %s: %s", o->base, strerror(ENOMEM));
		return NULL;
	}
	c->backend.ops = &cow_ops;
	c->backend.readonly = o->readonly;
	c->kept = o->file != NULL;
	ranges_init(&c->first_writes);
	committer_init(&c->committer, commit, "the overlay");
	c->base = disk_open(o->base, true);
	if (c->base) {
		c->backend.size = disk_size(c->base);
		if (o->file ? open_kept(c, o->file) : open_throw_away(c, o))
			return &c->backend;
	}
	free_cow(c);
	return NULL;
}
