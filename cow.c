/*
 * cow.c - backend: copy on write: see cow.h.
 *
 * The overlay holds a block, at the same offset, or the base does (layer.h).  A block that is
 * trimmed or zeroed is a hole in the overlay.  So a reader that finds 0 in the map reads the
 * base, which does not change, and one that finds 1 reads what was stored.
 *
 * A throw-away overlay has no name.  One that is kept has its bits in a bitmap file (bitmap.h).
 */
#define _GNU_SOURCE
#include "cow.h"

#include "layer.h"
#include "log.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct cow {
	struct backend backend;
	struct layer layer;		/* the overlay, and its base */
};

static struct layer *layer_of(struct backend *b)
{
	return &((struct cow *)b)->layer;
}

/* A run of blocks that lie in the same place. */
struct run {
	struct disk *disk;
	uint64_t len;
};

/* The run at off, at most len bytes. */
static struct run run_at(const struct layer *l, uint64_t off, uint64_t len)
{
	bool held;
	uint64_t n = layer_run(l, len, off, &held);

	return (struct run){ held ? l->disk : l->base, n };
}

static int op_read(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = 0;

	while (len > 0 && ret == 0) {
		struct run run = run_at(layer_of(b), off, len);

		ret = disk_read(run.disk, buf, run.len, off, how);
		buf += run.len;
		off += run.len;
		len -= run.len;
	}
	return ret;
}

static int op_write(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	return layer_write(layer_of(b), buf, len, off, how);
}

static int op_zero(struct backend *b, uint64_t len, uint64_t off, unsigned flags)
{
	return layer_zero(layer_of(b), len, off, flags);
}

static int op_trim(struct backend *b, uint64_t len, uint64_t off)
{
	return layer_trim(layer_of(b), len, off);
}

static int op_flush(struct backend *b, struct request *r)
{
	return b->readonly ? 0 : layer_flush(layer_of(b), r);
}

static int op_cache(struct backend *b, uint64_t *len, uint64_t off)
{
	struct run run = run_at(layer_of(b), off, *len);

	disk_prefetch(run.disk, run.len, off);
	*len = run.len;
	return 0;
}

/* Neighbours of the same status are one extent, whether they lie in the base or not. */
static unsigned op_extents(struct backend *b, struct extent *extent, unsigned max, uint64_t len,
			   uint64_t off, int *ret)
{
	uint64_t end = off + len;
	struct extent e, *last = NULL;
	unsigned n = 0;

	(void)ret;
	for (; off < end; off += e.len) {
		struct run run = run_at(layer_of(b), off, end - off);

		e = disk_extent(run.disk, off, off + run.len);
		if (last && last->flags == e.flags) {
			last->len += e.len;
			continue;
		}
		if (n == max)
			break;
		last = &extent[n++];
		*last = e;
	}
	return n;
}

static void free_cow(struct cow *c)
{
	layer_destroy(&c->layer);
	free(c);
}

static int op_close(struct backend *b)
{
	struct cow *c = (struct cow *)b;
	int err = c->layer.durable ? layer_finish(&c->layer) : 0;

	free_cow(c);
	return err;
}

static const struct backend_ops cow_ops = {
	.name = "cow",
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
	c->layer.disk = disk_adopt(fd, c->backend.size, false);
	return c->layer.disk != NULL;
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
	c->layer.map = bitmap_new(bitmap_blocks(c->backend.size));
	if (!c->layer.map)
		log_failure("cannot make a bitmap: %s", strerror(ENOMEM));
	return c->layer.map != NULL;
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
		uint64_t off = blk * BLOCK_SIZE, bytes = c->backend.size - off;
		int err;

		if (bytes > BLOCK_SIZE)
			bytes = BLOCK_SIZE;
		err = disk_read(c->layer.base, block, bytes, off, WAIT);
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

/* The overlay's file; that it is not there yet is right only if its map is empty. */
static bool open_kept_file(struct cow *c, const char *path)
{
	uint64_t held = bitmap_count(c->layer.map);
	struct stat st;
	int fd;

	if (held > 0 && lstat(path, &st) < 0 && errno == ENOENT) {
		log_failure("overlay %s does not exist, but %s.map says that it holds %llu blocks",
			    path, path, (unsigned long long)held);
		return false;
	}
	if (!disk_create(path, c->backend.size))
		return false;
	fd = open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
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
	c->layer.disk = disk_adopt(fd, c->backend.size, false);
	return c->layer.disk != NULL;
}

static bool open_kept(struct cow *c, const char *path)
{
	struct bitmap_identity id = { BITMAP_OVERLAY, c->backend.size, 0, path };
	size_t len = strlen(path) + sizeof(".map");
	char *map_path = malloc(len);
	bool ok = false;

	if (!map_path)
		log_failure("cannot open overlay %s: %s", path, strerror(ENOMEM));
	if (!map_path || !fingerprint(c, &id.fingerprint))
		goto out;
	snprintf(map_path, len, "%s.map", path);
	if (access(path, F_OK) == 0 && access(map_path, F_OK) < 0) {
		log_failure("overlay %s exists, but its map %s does not: without it the overlay is "
			    "of no use, remove it to begin afresh", path, map_path);
		goto out;
	}
	c->layer.map = bitmap_open(map_path, &id, false);
	ok = c->layer.map && open_kept_file(c, path);
out:
	free(map_path);
	return ok;
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
	layer_init(&c->layer, &c->backend, 0, "the overlay");
	c->layer.durable = o->file != NULL;
	c->layer.base = disk_open(o->base, true, false);
	if (c->layer.base) {
		disk_look(c->layer.base, o->base);
		c->backend.size = c->layer.size = disk_size(c->layer.base);
		if (o->file ? open_kept(c, o->file) : open_throw_away(c, o)) {
			layer_begin(&c->layer);
			return &c->backend;
		}
	}
	free_cow(c);
	return NULL;
}
