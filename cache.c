/*
 * cache.c - backend: the proxy: see cache.h.
 *
 * What is held is served from the image, by the same calls as a target's.  A read of what is not
 * held waits for the origin.  A write goes to the image; where it changes a part of a block that is
 * not held, that block is fetched first.  Waiting takes no thread: the operation says ABSENT, the
 * request is kept (fetch.h), and carried out again when the blocks are there.
 *
 * A switch lets the origin go when all blocks are held.  The cache stays the backend after it: it is
 * a disk whose blocks are always here.
 */
#define _GNU_SOURCE
#include "cache.h"

#include "fetch.h"
#include "layer.h"
#include "log.h"
#include "util.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	PREFETCH_MAX = 4 * 1024 * 1024,	/* bytes of a CACHE that are asked for at once */
};

struct cache {
	struct backend backend;
	struct layer layer;
	struct origin *origin;
	struct fetcher fetcher;
	struct copy *copy;
	void (*wake)(void);
	atomic_bool copy_done;

	/*
	 * The switch.  By force, a worker stores zeros first where nothing is held.  Then all that is held
	 * becomes durable, and all blocks are held; then the main thread lets the origin go.
	 */
	bool switching, switched;	/* the main thread's */
	uint64_t zeroed;		/* blocks, by force */
	struct job zero_job;
	struct request commit;		/* the flush that makes all durable */
	const char *failed;		/* the step that has, or NULL */
	int error;			/* why, an errno */
	atomic_bool switch_done;	/* those above are valid */
	atomic_bool stopping;		/* zero no more */
};

static struct cache *to_cache(struct backend *b)
{
	return (struct cache *)b;
}

/* Fetching */

static void advance(struct span *s, uint64_t n)
{
	s->off += n;
	s->len -= n;
}

/* A part from what is not held on, so that the origin is not asked for all of it at once. */
static int fetch_part(struct cache *c, struct request *r, enum how how)
{
	struct span part;
	bool held = true;

	while (r->at.len > 0 && held) {
		uint64_t n = layer_run(&c->layer, r->at.len, r->at.off, &held);

		if (held)
			advance(&r->at, n);
	}
	part = r->at;
	if (part.len > PREFETCH_MAX)
		part.len = PREFETCH_MAX;
	advance(&r->at, part.len);
	/* A READ is answered when all of it has been asked for, also if it cannot be stored. */
	r->fetched = r->at.len == 0 && r->h.cmd == NBD_CMD_READ;
	return part.len == 0 ? 0 : fetch_wait(&c->fetcher, r, &part, 1, how);
}

/* What the origin tells about the units at the beginning of what is not held; a part of one is data. */
static int fetch_status(struct cache *c, struct request *r, enum how how)
{
	uint64_t unit = origin_limits(c->origin)->min_block, before = r->h.off % unit, part = 0;
	struct span s = { r->h.off, r->h.len };
	bool held;

	s.len = layer_run(&c->layer, s.len, s.off, &held);
	if (held)
		return 0;
	if (s.len > PROTO_STATUS_MAX / 2)
		s.len = PROTO_STATUS_MAX / 2;
	if (s.off + s.len < c->layer.size)
		part = s.len % unit;
	if (before == 0 && s.len > part && origin_tells_extents(c->origin)) {
		s.len -= part;
		r->extents = r->h.flags & NBD_CMD_FLAG_REQ_ONE ? 1 : EXTENTS_MAX;
		return fetch_wait(&c->fetcher, r, &s, 1, how);
	}
	if (before > 0 && s.len > unit - before)
		s.len = unit - before;
	r->extent[0] = (struct extent){ s.len, 0 };
	r->extents = 1;
	request_done(r, 0);
	return PENDING;
}

/* The blocks of which a change keeps a part, as spans in edge; returns how many. */
static unsigned find_edges(const struct cache *c, uint64_t len, uint64_t off, struct span edge[2])
{
	uint64_t end = off + len;
	unsigned n = 0;

	if (off % BLOCK_SIZE != 0)
		edge[n++] = (struct span){ off, 1 };
	if (end % BLOCK_SIZE != 0 && end != c->layer.size)
		edge[n++] = (struct span){ end - 1, 1 };
	return n;
}

static int fetch_edges(struct cache *c, struct request *r, enum how how)
{
	struct span edge[2];
	unsigned n = find_edges(c, r->at.len, r->at.off, edge);

	return fetch_wait(&c->fetcher, r, edge, n, how);
}

static int cache_fetch(struct backend *b, struct request *r, enum how how)
{
	struct cache *c = to_cache(b);
	const struct span all = { r->h.off, r->h.len };

	switch (r->h.cmd) {
	case NBD_CMD_READ:
		return r->h.len > READ_PIECE ? fetch_part(c, r, how) :
					       fetch_wait(&c->fetcher, r, &all, 1, how);
	case NBD_CMD_CACHE:
		return fetch_part(c, r, how);
	case NBD_CMD_BLOCK_STATUS:
		return fetch_status(c, r, how);
	default:
		return fetch_edges(c, r, how);
	}
}

static bool cache_take_back(struct backend *b, struct request *r)
{
	return fetch_take_back(&to_cache(b)->fetcher, r);
}

/* Reading */

static bool cache_holds(struct backend *b, uint64_t len, uint64_t off)
{
	return layer_holds(&to_cache(b)->layer, len, off);
}

static int cache_read(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	struct cache *c = to_cache(b);

	if (!layer_holds(&c->layer, len, off))
		return ABSENT;
	return disk_read(c->layer.disk, buf, len, off, how);
}

/* Writing */

/* Whether a block of which a change keeps a part is not held. */
static bool lacks_edges(const struct cache *c, uint64_t len, uint64_t off)
{
	struct span edge[2];
	unsigned n = find_edges(c, len, off, edge);

	for (unsigned i = 0; i < n; i++)
		if (!layer_holds(&c->layer, 1, edge[i].off))
			return true;
	return false;
}

static int cache_write(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off,
		       enum how how)
{
	struct cache *c = to_cache(b);

	return lacks_edges(c, len, off) ? ABSENT : layer_write(&c->layer, buf, len, off, how);
}

static int cache_zero(struct backend *b, uint64_t len, uint64_t off, unsigned flags)
{
	struct cache *c = to_cache(b);

	return lacks_edges(c, len, off) ? ABSENT : layer_zero(&c->layer, len, off, flags);
}

static int cache_trim(struct backend *b, uint64_t len, uint64_t off)
{
	return layer_trim(&to_cache(b)->layer, len, off);
}

static int cache_flush(struct backend *b, struct request *r)
{
	return layer_flush(&to_cache(b)->layer, r);
}

static int cache_prefetch(struct backend *b, uint64_t *len, uint64_t off)
{
	struct cache *c = to_cache(b);
	bool held;
	uint64_t n = layer_run(&c->layer, *len, off, &held);

	if (!held) {
		*len = 0;
		return ABSENT;
	}
	*len = n;
	disk_prefetch(c->layer.disk, n, off);
	return 0;
}

/* What is held, up to what is not; or else the origin has to be asked. */
static unsigned cache_extents(struct backend *b, struct extent *extent, unsigned max, uint64_t len,
			      uint64_t off, int *ret)
{
	struct cache *c = to_cache(b);
	bool held;
	uint64_t n = layer_run(&c->layer, len, off, &held);

	if (held)
		return disk_extents(c->layer.disk, extent, max, n, off);
	*ret = ABSENT;
	return 0;
}

/* Opening and closing */

static void free_cache(struct cache *c)
{
	copy_free(c->copy);
	origin_close(c->origin);
	fetcher_destroy(&c->fetcher);
	layer_destroy(&c->layer);
	free(c);
}

static int cache_close(struct backend *b)
{
	struct cache *c = to_cache(b);
	int err = layer_finish(&c->layer);

	free_cache(c);
	return err;
}

static const struct backend_ops cache_ops = {
	.name = "cache",
	.read = cache_read,
	.write = cache_write,
	.zero = cache_zero,
	.trim = cache_trim,
	.flush = cache_flush,
	.cache = cache_prefetch,
	.extents = cache_extents,
	.holds = cache_holds,
	.fetch = cache_fetch,
	.take_back = cache_take_back,
	.close = cache_close,
};

/* The background copy has ended.  Any thread. */
static void copied(void *cache)
{
	struct cache *c = cache;

	atomic_store(&c->copy_done, true);
	c->wake();
}

static bool refuse_image(const char *path, const char *what, uint64_t held)
{
	log_failure("cache image %s %s, but the bitmap says that it holds %llu blocks "
		    "(--clear-bitmap begins afresh)", path, what, (unsigned long long)held);
	return false;
}

static bool are_one_file(const char *image, const char *bitmap)
{
	bool same = is_same_file(image, bitmap);

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
	d = disk_open(path, false, false);
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
			return refuse_image(path, "does not exist", held);
		return disk_create(path, size);
	}
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size >= size)
		return true;
	snprintf(found, sizeof(found), "has %llu of %llu bytes", (unsigned long long)st.st_size,
		 (unsigned long long)size);
	if (held > 0)
		return refuse_image(path, found, held);
	if (truncate(path, (off_t)size) == 0)
		return true;
	log_failure("cannot extend cache image %s to %llu bytes: %s", path,
		    (unsigned long long)size, strerror(errno));
	return false;
}

static bool open_layer(struct cache *c, const struct cache_options *o)
{
	const struct bitmap_identity id = { BITMAP_CACHE, c->backend.size, 0, o->image };
	struct layer *l = &c->layer;

	if (!can_open(o->image) || are_one_file(o->image, o->bitmap))
		return false;
	l->map = bitmap_open(o->bitmap, &id, o->clear);
	if (!l->map || are_one_file(o->image, o->bitmap) ||
	    !prepare_image(o->image, l->size, bitmap_count(l->map)))
		return false;
	l->disk = disk_open(o->image, false, false);
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
	layer_init(&c->layer, &c->backend, c->backend.size, "the cache");
	c->layer.durable = true;
	fetcher_init(&c->fetcher, &c->layer, origin);
	c->wake = o->wake;
	c->copy = copy_new(&c->fetcher, copied, c);
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
	status->written = layer_written(&c->layer);
}

unsigned cache_per_mille(const struct cache_status *status)
{
	return status->blocks ? (unsigned)(status->held * 1000 / status->blocks) : 1000;
}

/* The switch */

/* It is done, or that step has failed.  A worker. */
static void switch_ended(struct cache *c, const char *failed, int error)
{
	c->failed = failed;
	c->error = error;
	atomic_store(&c->switch_done, true);
	c->wake();
}

static void completed(struct request *r)
{
	struct cache *c = to_cache(r->backend);
	int error = r->error ? r->error : layer_missing(&c->layer) > 0 ? EAGAIN : 0;

	switch_ended(c, error ? "cannot make the image durable" : NULL, error);
}

static void complete_layer(struct cache *c)
{
	c->commit = (struct request){
		.backend = &c->backend,
		.done = completed,
		.h.cmd = NBD_CMD_FLUSH,
	};
	layer_complete(&c->layer, &c->commit);
}

static void zero_missing(struct job *job)
{
	struct cache *c = (struct cache *)((char *)job - offsetof(struct cache, zero_job));
	int err;

	c->zeroed = layer_missing(&c->layer);
	err = layer_zero_missing(&c->layer, &c->stopping);
	if (err)
		switch_ended(c, "cannot store zeros", -err);
	else
		complete_layer(c);
}

const char *cache_switch(struct backend *b, bool force)
{
	static char why[128];
	struct cache *c = to_cache(b);
	struct cache_status s;
	unsigned share;

	if (c->switched)
		return "this is a target already";
	if (c->switching)
		return NULL;
	cache_status(b, &s);
	share = cache_per_mille(&s);
	if (s.held < s.blocks && !force) {
		snprintf(why, sizeof(why), "%llu of %llu blocks are not here yet (%u.%u %% are)",
			 (unsigned long long)(s.blocks - s.held), (unsigned long long)s.blocks,
			 share / 10, share % 10);
		return why;
	}
	log_line("switching to target mode");
	c->switching = true;
	c->zeroed = 0;
	if (s.held == s.blocks) {
		complete_layer(c);
		return NULL;
	}
	copy_stop(c->copy);
	c->zero_job.run = zero_missing;
	worker_submit(&c->zero_job);
	return NULL;
}

void cache_tend(struct backend *b, struct cache_news *news)
{
	struct cache *c = to_cache(b);

	*news = (struct cache_news){ .copied = atomic_exchange(&c->copy_done, false) };
	if (!atomic_exchange(&c->switch_done, false))
		return;
	c->switching = false;
	c->switched = !c->failed;
	news->switched = true;
	news->zeroed = c->zeroed;
	if (c->failed) {
		snprintf(news->error, sizeof(news->error), "%s: %s", c->failed,
			 strerror(c->error));
		log_error("cannot switch to target mode: %s", news->error);
		return;
	}
	/* Nobody needs it any more; those who wait for it will find the blocks. */
	origin_cancel(c->origin);
	if (c->zeroed)
		log_line("switched to target mode; %llu blocks were missing and read as zeros now",
			 (unsigned long long)c->zeroed);
	else
		log_line("switched to target mode; the origin is not needed any more");
}

bool cache_is_target(struct backend *b)
{
	return to_cache(b)->switched;
}

void cache_stop(struct backend *b)
{
	struct cache *c = to_cache(b);

	copy_stop(c->copy);
	atomic_store(&c->stopping, true);
}

void cache_end(struct backend *b)
{
	struct cache *c = to_cache(b);

	origin_end(c->origin);
	copy_free(c->copy);
	c->copy = NULL;
}
