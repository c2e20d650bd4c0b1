/*
 * cache.c - backend: the proxy: see cache.h.
 *
 * What is held is served from the image, by the same calls as a target's.  A read of what is not
 * held waits for the origin.  A write goes to the image; where it changes a part of a block that is
 * not held, that block is fetched first.  Waiting takes no thread: the operation answers
 * PENDING, and is carried out again when the blocks are there (fetch.h).
 */
#define _GNU_SOURCE
#include "cache.h"

#include "ahead.h"
#include "fetch.h"
#include "layer.h"
#include "util.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	PREFETCH_MAX = 4 * 1024 * 1024,	/* bytes of a CACHE that are asked for at once */
	ZERO_STEP = 64 * 1024 * 1024,	/* bytes that are zeroed while others wait */
};

struct cache {
	struct backend backend;
	struct layer layer;
	struct origin *origin;
	struct fetcher fetcher;
	struct ahead ahead;
	struct copy *copy;
	atomic_size_t written;		/* blocks */
	atomic_bool stopping;		/* zero no more */
};

static struct cache *to_cache(struct backend *b)
{
	return (struct cache *)b;
}

/* Reading */

/* What is held from the image, the rest from the origin. */
static int read_missing(struct cache *c, struct request *r, enum how how)
{
	uint64_t off = r->h.off, end = off + r->h.len;
	struct miss *m = miss_new(&c->fetcher, r);
	int err = m ? 0 : -ENOMEM;

	while (off < end && !err) {
		bool held;
		uint64_t n = layer_run(&c->layer, end - off, off, &held);

		if (held) {
			err = disk_read(c->layer.disk, r->buf + (off - r->h.off), n, off, how);
			off += n;
		} else {
			int64_t added = miss_add(m, n, off);

			if (added < 0)
				err = (int)added;
			else
				off += (uint64_t)added;
		}
	}
	return m ? miss_wait(m, err) : err;
}

static int op_read(struct backend *b, struct request *r, enum how how)
{
	struct cache *c = to_cache(b);
	uint64_t off = r->h.off, len = r->h.len;

	if (layer_holds(&c->layer, len, off)) {
		if (how == TRY)
			ahead_hit(&c->ahead, len, off);
		return disk_read(c->layer.disk, r->buf, len, off, how);
	}
	return how == TRY ? -EAGAIN : read_missing(c, r, WAIT);
}

static int op_fetch(struct backend *b, struct request *r)
{
	struct cache *c = to_cache(b);

	if (layer_holds(&c->layer, r->h.len, r->h.off))
		return -EAGAIN;
	ahead_missed(&c->ahead, r->h.len, r->h.off);
	return read_missing(c, r, TRY);
}

static int op_locate(struct backend *b, const struct request *r, struct file_part *part, int max)
{
	struct cache *c = to_cache(b);

	if (max < 1 || !layer_holds(&c->layer, r->h.len, r->h.off))
		return 0;
	ahead_hit(&c->ahead, r->h.len, r->h.off);
	return disk_locate(c->layer.disk, r->h.len, r->h.off, part);
}

/* Writing */

/* The blocks of which a change leaves a part as it is, and that are not held. */
static bool lacks_edges(const struct cache *c, uint64_t len, uint64_t off)
{
	const struct layer *l = &c->layer;
	uint64_t end = off + len;

	if (off % BLOCK_SIZE != 0 && !layer_holds(l, 1, off))
		return true;
	return end % BLOCK_SIZE != 0 && end != l->size && !layer_holds(l, 1, end - 1);
}

/* Fetch blocks for r, which will be carried out again then. */
static int fetch_for(struct cache *c, struct request *r, uint64_t len, uint64_t off)
{
	struct miss *m = miss_new(&c->fetcher, r);
	uint64_t end = off + len;
	int err = m ? 0 : -ENOMEM;

	while (off < end && !err) {
		bool held;
		uint64_t n = layer_run(&c->layer, end - off, off, &held);
		int64_t added = held ? (int64_t)n : miss_add(m, n, off);

		if (added < 0)
			err = (int)added;
		else
			off += (uint64_t)added;
	}
	return m ? miss_wait(m, err) : err;
}

/* On a worker.  0 if both blocks at the ends of the range are held, or else as fetch_for(). */
static int fetch_edges(struct cache *c, struct request *r)
{
	uint64_t off = r->h.off, last = off + r->h.len - 1;
	struct miss *m;
	int64_t added = 0;

	if (!lacks_edges(c, r->h.len, off))
		return 0;
	m = miss_new(&c->fetcher, r);
	if (!m)
		return -ENOMEM;
	if (off % BLOCK_SIZE != 0)
		added = miss_add(m, 1, off);
	if (added >= 0 && last % BLOCK_SIZE != BLOCK_SIZE - 1)
		added = miss_add(m, 1, last);
	return miss_wait(m, added < 0 ? (int)added : 0);
}

static void count_written(struct cache *c, uint64_t fresh)
{
	if (fresh > 0)
		atomic_fetch_add_explicit(&c->written, fresh, memory_order_relaxed);
}

static int op_write(struct backend *b, struct request *r, enum how how)
{
	struct cache *c = to_cache(b);
	uint64_t fresh = 0;
	int ret;

	if (how == TRY && lacks_edges(c, r->h.len, r->h.off))
		return -EAGAIN;
	ret = how == TRY ? 0 : fetch_edges(c, r);
	if (ret)
		return ret;
	ret = layer_write(&c->layer, r->buf, r->h.len, r->h.off, how, &fresh);
	count_written(c, fresh);
	return ret;
}

static int op_zero(struct backend *b, struct request *r, enum how how)
{
	struct cache *c = to_cache(b);
	uint64_t fresh = 0;
	int ret = how == TRY ? -EAGAIN : fetch_edges(c, r);

	if (ret)
		return ret;
	ret = layer_zero(&c->layer, r->h.len, r->h.off, r->h.flags, &fresh);
	count_written(c, fresh);
	return ret;
}

static int op_trim(struct backend *b, struct request *r, enum how how)
{
	struct cache *c = to_cache(b);
	uint64_t fresh = 0;
	int ret;

	if (how == TRY)
		return -EAGAIN;
	ret = layer_trim(&c->layer, r->h.len, r->h.off, &fresh);
	count_written(c, fresh);
	return ret;
}

static int op_flush(struct backend *b, struct request *r, enum how how)
{
	(void)how;
	return layer_flush(&to_cache(b)->layer, r);
}

/* A part that is not held at a time, so that the origin is not asked for all of it at once. */
static int op_cache(struct backend *b, struct request *r, enum how how)
{
	struct cache *c = to_cache(b);
	uint64_t off = r->h.off, end = off + r->h.len;
	bool held = true;

	if (how == TRY)
		return -EAGAIN;
	while (off < end) {
		uint64_t n = layer_run(&c->layer, end - off, off, &held);

		if (!held)
			return fetch_for(c, r, n < PREFETCH_MAX ? n : PREFETCH_MAX, off);
		off += n;
	}
	disk_prefetch(c->layer.disk, r->h.len, r->h.off);
	return 0;
}

/* Extents */

/* A BLOCK_STATUS that the origin is asked for. */
struct question {
	struct origin_request ask;	/* the first: answered() relies on it */
	struct request *r;
	uint64_t skip, len;		/* bytes before, and of, what r is about */
};

/* Cut the extents of r down to len bytes behind skip bytes. */
static void cut_extents(struct request *r, uint64_t skip, uint64_t len)
{
	unsigned kept = 0;

	for (unsigned i = 0; i < r->extents && len > 0; i++) {
		struct extent e = r->extent[i];
		uint64_t cut = skip < e.len ? skip : e.len;

		e.len -= cut;
		skip -= cut;
		if (e.len > len)
			e.len = len;
		len -= e.len;
		if (e.len > 0)
			r->extent[kept++] = e;
	}
	r->extents = kept;
}

/* The origin's thread.  Where the origin does not tell, all is data. */
static void answered(struct origin_request *ask)
{
	struct question *q = (struct question *)ask;
	struct request *r = q->r;
	bool cancelled = ask->error == -ECANCELED;

	r->extents = ask->error ? 0 : ask->extents;
	cut_extents(r, q->skip, q->len);
	if (r->extents == 0) {
		r->extent[0] = (struct extent){ q->len, 0 };
		r->extents = 1;
	}
	free(q);
	/* At a switch the blocks are held by now. */
	if (cancelled && layer_holds(&to_cache(r->backend)->layer, 1, r->h.off))
		request_again(r);
	else
		request_done(r, cancelled ? -ESHUTDOWN : 0);
}

/* The len bytes at the beginning of r's range are not held. */
static int ask_extents(struct cache *c, struct request *r, uint64_t len, unsigned max)
{
	uint64_t unit = origin_limits(c->origin)->min_block, start, end;
	struct question *q;

	if (len > PROTO_STATUS_MAX / 2)
		len = PROTO_STATUS_MAX / 2;
	if (!origin_tells_extents(c->origin)) {
		r->extent[0] = (struct extent){ len, 0 };
		r->extents = 1;
		return 0;
	}
	q = calloc(1, sizeof(*q));
	if (!q)
		return -ENOMEM;
	start = r->h.off / unit * unit;
	end = (r->h.off + len + unit - 1) / unit * unit;
	if (end > c->backend.size)
		end = c->backend.size;
	q->r = r;
	q->skip = r->h.off - start;
	q->len = len;
	q->ask.priority = ORIGIN_DEMAND;
	q->ask.off = start;
	q->ask.len = end - start;
	q->ask.extent = r->extent;
	q->ask.extents = max;
	q->ask.done = answered;
	origin_submit(c->origin, &q->ask);
	return PENDING;
}

/* What is held, up to what is not; or else what the origin says. */
static int op_extents(struct backend *b, struct request *r, unsigned max, enum how how)
{
	struct cache *c = to_cache(b);
	bool held;
	uint64_t n = layer_run(&c->layer, r->h.len, r->h.off, &held);

	if (how == TRY)
		return -EAGAIN;
	if (held && (n == r->h.len || r->h.cmd == NBD_CMD_BLOCK_STATUS)) {
		r->extents = disk_extents(c->layer.disk, r->extent, max, n, r->h.off);
		return 0;
	}
	if (r->h.cmd == NBD_CMD_READ)
		return -EAGAIN;		/* its holes are looked for; it will have to wait */
	return ask_extents(c, r, n, max);
}

/* Opening and closing */

static void free_cache(struct cache *c)
{
	copy_free(c->copy);
	origin_close(c->origin);
	fetcher_destroy(&c->fetcher);
	ahead_destroy(&c->ahead);
	layer_destroy(&c->layer);
	free(c);
}

static void op_close(struct backend *b)
{
	struct cache *c = to_cache(b);

	layer_finish(&c->layer);
	free_cache(c);
}

static const struct backend_ops cache_ops = {
	.name = "cache",
	.read = op_read,
	.fetch = op_fetch,
	.locate = op_locate,
	.write = op_write,
	.flush = op_flush,
	.trim = op_trim,
	.zero = op_zero,
	.cache = op_cache,
	.extents = op_extents,
	.close = op_close,
};

static bool refuse(const char *path, const char *what, uint64_t held)
{
	log_failure("cache image %s %s, but the bitmap says that it holds %llu blocks "
		    "(--clear-bitmap begins afresh)", path, what, (unsigned long long)held);
	return false;
}

/* Whether two names on the command line lead to one file; logs that. */
static bool is_same_file(const char *image, const char *bitmap)
{
	struct stat a, b;
	bool same = stat(image, &a) == 0 && stat(bitmap, &b) == 0 && a.st_dev == b.st_dev &&
		    a.st_ino == b.st_ino;

	if (same)
		log_failure("cache image %s and bitmap file %s are the same file", image, bitmap);
	return same;
}

/* Whether an image that is there can be used: to be known before anything is changed. */
static bool can_open(const char *path)
{
	struct stat st;
	struct disk *d;

	if (stat(path, &st) < 0)
		return true;
	d = disk_open(path, false, "");
	disk_close(d);
	return d != NULL;
}

/* Create the image, or extend one that holds nothing as yet.  False after logging why not. */
static bool prepare_image(const char *path, uint64_t size, uint64_t held)
{
	struct stat st;
	char found[64];

	if (stat(path, &st) < 0) {
		if (errno == ENOENT && held > 0)
			return refuse(path, "does not exist", held);
		return disk_create(path, size);
	}
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size >= size)
		return true;
	snprintf(found, sizeof(found), "has %llu of %llu bytes", (unsigned long long)st.st_size,
		 (unsigned long long)size);
	if (held > 0)
		return refuse(path, found, held);
	if (truncate(path, (off_t)size) == 0)
		return true;
	log_failure("cannot extend cache image %s to %llu bytes: %s", path,
		    (unsigned long long)size, strerror(errno));
	return false;
}

static bool open_layer(struct cache *c, const struct cache_options *o)
{
	const struct bitmap_identity id = { BITMAP_CACHE, c->backend.size, 0 };
	struct layer *l = &c->layer;

	if (!can_open(o->image) || is_same_file(o->image, o->bitmap))
		return false;
	l->map = bitmap_open(o->bitmap, &id, o->clear);
	if (!l->map || is_same_file(o->image, o->bitmap) ||
	    !prepare_image(o->image, l->size, bitmap_count(l->map)))
		return false;
	l->disk = disk_open(o->image, false, "");
	return l->disk && disk_limit(l->disk, o->image, l->size);
}

struct backend *cache_open(const struct cache_options *o, struct origin *origin)
{
	struct cache *c = calloc(1, sizeof(*c));

	if (!c) {
		log_failure("cannot open cache image %s: %s", o->image, strerror(ENOMEM));
		origin_close(origin);
		return NULL;
	}
	c->backend.ops = &cache_ops;
	c->backend.size = origin_limits(origin)->size;
	c->backend.readonly = o->readonly;
	c->origin = origin;
	layer_init(&c->layer, c->backend.size, "the cache");
	c->layer.durable = true;
	fetcher_init(&c->fetcher, &c->layer, origin);
	ahead_init(&c->ahead, &c->fetcher);
	c->copy = copy_new(&c->fetcher, o->copied);
	if (!c->copy) {
		log_failure("cannot open cache image %s: %s", o->image, strerror(ENOMEM));
	} else if (open_layer(c, o)) {
		layer_begin(&c->layer);
		return &c->backend;
	}
	free_cache(c);
	return NULL;
}

/* Control */

struct disk *cache_disk(struct backend *b)
{
	return to_cache(b)->layer.disk;
}

struct origin *cache_origin(struct backend *b)
{
	return to_cache(b)->origin;
}

struct copy *cache_copy(struct backend *b)
{
	return to_cache(b)->copy;
}

void cache_status(struct backend *b, struct cache_status *status)
{
	struct cache *c = to_cache(b);

	status->blocks = bitmap_blocks(b->size);
	status->held = status->blocks - layer_missing(&c->layer);
	status->written = atomic_load(&c->written);
}

int cache_zero_missing(struct backend *b, uint64_t *zeroed)
{
	struct cache *c = to_cache(b);
	struct layer *l = &c->layer;
	uint64_t before = layer_missing(l);
	int err = 0;

	for (uint64_t off = 0, n; off < b->size && !err; off += n) {
		bool held;

		n = b->size - off < ZERO_STEP ? b->size - off : ZERO_STEP;
		n = layer_run(l, n, off, &held);
		if (atomic_load(&c->stopping))
			err = -ECANCELED;
		else if (!held)
			err = layer_fill(l, NULL, n, off, WAIT);
	}
	*zeroed = before - layer_missing(l);
	return err;
}

void cache_stop_zeroing(struct backend *b)
{
	atomic_store(&to_cache(b)->stopping, true);
}
