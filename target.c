/*
 * target.c - backends of local images: see target.h.
 *
 * Of a copy-on-write target a block that is trimmed or zeroed is a hole in the overlay.  So a reader
 * that finds 0 in the map reads the base, which does not change, and else what was stored.
 *
 * A throw-away overlay has no name.  One that is kept has its bits in a bitmap file (bitmap.h).
 */
#define _GNU_SOURCE
#include "target.h"

#include "layer.h"
#include "log.h"
#include "util.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct backend *target_open(struct disk *d, bool readonly)
{
	struct layer *l = not_null(calloc(1, sizeof(*l)));

	l->size = d->size;
	l->disk = d;
	layer_begin(l, readonly, "the image");
	return &l->backend;
}

/* Copy on write */

/* A file without a name, as large as the base. */
static bool open_throw_away(struct layer *l, const char *base, const char *place)
{
	char *dir;
	int fd;

	if (!place && !l->base->is_file)
		return log_failure("base image %s is a device: --cow-dir must say where the "
				   "overlay goes", base);
	dir = not_null(place ? strdup(place) : directory_of(base));
	fd = disk_make_file(dir, ".xnbd-overlay-", NULL);
	if (fd >= 0 && ftruncate(fd, (off_t)l->size) == 0) {
		l->disk = disk_adopt(fd);
		l->map = not_null(bitmap_new(bitmap_blocks(l->size)));
	} else {
		log_failure("cannot make an overlay of %llu bytes in %s: %s%s",
			    (unsigned long long)l->size, dir, strerror(errno),
			    place ? "" : " (--cow-dir names another place)");
		if (fd >= 0)
			close(fd);
	}
	free(dir);
	return l->disk;
}

/*
 * Tells one base image from another of the same size: a hash of some of its blocks, from all
 * over it.  It stays the same when the image is moved or copied.
 */
static bool fingerprint(const struct layer *l, uint64_t *result)
{
	enum { SAMPLES = 256 };
	uint64_t blocks = bitmap_blocks(l->size), step = blocks / SAMPLES + 1;
	uint8_t block[BLOCK_SIZE];

	*result = BITMAP_CHECKSUM;
	for (uint64_t blk = 0; blk < blocks; blk += blk < SAMPLES ? 1 : step) {
		uint64_t off = blk * BLOCK_SIZE, left = l->size - off;
		uint64_t bytes = left < BLOCK_SIZE ? left : BLOCK_SIZE;
		int err = disk_read(l->base, block, bytes, off, WAIT);

		if (err)
			return log_failure("cannot read the base image: %s", strerror(-err));
		*result = bitmap_checksum(*result, block, bytes);
	}
	return true;
}

/* The overlay's file; that it is not there yet is right only if its map is empty. */
static bool open_kept_file(struct layer *l, const char *path)
{
	uint64_t held = bitmap_count(l->map);
	struct stat st;

	if (lstat(path, &st) == 0 && !S_ISREG(st.st_mode))
		return log_failure("overlay %s is no regular file", path);
	if (held > 0 && access(path, F_OK) < 0)
		return log_failure("overlay %s does not exist, but %s.map says that it holds %llu "
				   "blocks", path, path, (unsigned long long)held);
	l->disk = disk_create(path, l->size) ? disk_open(path, false, false) : NULL;
	if (!l->disk || l->disk->size == l->size)
		return l->disk;
	return log_failure("overlay %s: its size is %llu, and %llu, that of its base, is expected",
			   path, (unsigned long long)l->disk->size, (unsigned long long)l->size);
}

static bool open_kept(struct layer *l, const char *path)
{
	struct bitmap_identity id = { BITMAP_OVERLAY, l->size, 0, path };
	size_t room = strlen(path) + sizeof(".map");
	char *map = not_null(malloc(room));
	bool ok = fingerprint(l, &id.fingerprint);

	snprintf(map, room, "%s.map", path);
	if (ok && access(path, F_OK) == 0 && access(map, F_OK) < 0)
		ok = log_failure("overlay %s exists, but its map %s does not: without it the "
				 "overlay is of no use, remove it to begin afresh", path, map);
	l->durable = true;
	l->map = ok ? bitmap_open(map, &id, false) : NULL;
	free(map);
	return l->map && open_kept_file(l, path);
}

struct backend *cow_open(const char *base, const char *file, const char *dir, bool readonly)
{
	struct disk *d = disk_open(base, true, false);
	struct layer *l;

	if (!d)
		return NULL;
	l = not_null(calloc(1, sizeof(*l)));
	l->size = d->size;
	l->base = d;
	if (file ? open_kept(l, file) : open_throw_away(l, base, dir)) {
		layer_begin(l, readonly, "the overlay");
		return &l->backend;
	}
	layer_free(l);
	return NULL;
}
