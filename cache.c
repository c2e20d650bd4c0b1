/*
 * cache.c - backend: the proxy: see cache.h.
 *
 * What is held is served from the image, by the same calls as a target's.  A read of what is not
 * held waits for the origin.  A write goes to the image; where it changes a part of a block that is
 * not held, that block is fetched first.  Waiting takes no thread: the operation says ABSENT, the
 * request is kept (fetch.h), and carried out again when the blocks are there.
 *
 * A switch lets the origin go when all blocks are held.  The cache stays the backend after it: it
 * is a disk whose blocks are always here.
 */
#define _GNU_SOURCE
#include "cache.h"

#include "log.h"
#include "util.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct cache *to_cache(struct backend *b)
{
	return (struct cache *)b;
}

static bool cache_holds(struct backend *b, uint64_t len, uint64_t off)
{
	return layer_holds(&to_cache(b)->layer, len, off);
}

/* Fetching */

/* The origin tells of what begins and ends where its smallest blocks do; else all is data. */
static int fetch_status(struct cache *c, struct request *r)
{
	uint64_t unit = origin_limits(c->origin)->min_block;
	struct span *s = &r->at;
	bool held;

	if (s->len > PROTO_STATUS_MAX / 2)
		s->len = PROTO_STATUS_MAX / 2;
	s->len = layer_run(&c->layer, s->len, s->off, &held);
	if (held)
		return 0;
	if (s->off % unit == 0 && (s->len % unit == 0 || s->off + s->len == c->layer.size))
		return fetch_extents(&c->fetcher, r);
	r->extent[0] = (struct extent){ s->len, 0 };
	r->extents = 1;
	request_done(r, 0);
	return PENDING;
}

/*
 * A place in a block that is not held, and of which a change keeps a part; empty if there is none.
 */
static struct span lacking_edge(struct backend *b, uint64_t len, uint64_t off)
{
	uint64_t end = off + len;

	if (off % BLOCK_SIZE != 0 && !cache_holds(b, 1, off))
		return (struct span){ off, 1 };
	if (end % BLOCK_SIZE != 0 && end != b->size && !cache_holds(b, 1, end - 1))
		return (struct span){ end - 1, 1 };
	return (struct span){ off, 0 };
}

/* Both edges are asked for at once; the change waits for one after the other. */
static int fetch_edges(struct cache *c, struct request *r, enum how how)
{
	uint64_t end = r->at.off + r->at.len;
	struct span edge = lacking_edge(r->backend, r->at.len, r->at.off);

	if (edge.len == 0)
		return 0;
	if (end % BLOCK_SIZE != 0 && end != c->layer.size)
		fetch_begin(&c->fetcher, 1, end - 1, ORIGIN_DEMAND);
	r->at = edge;
	return fetch_wait(&c->fetcher, r, how);
}

static int cache_fetch(struct backend *b, struct request *r, enum how how)
{
	struct cache *c = to_cache(b);

	if (r->h.cmd == NBD_CMD_BLOCK_STATUS)
		return fetch_status(c, r);
	return proto_cmd_writes(r->h.cmd) ? fetch_edges(c, r, how) :
					    fetch_wait(&c->fetcher, r, how);
}

static bool cache_take_back(struct backend *b, struct request *r)
{
	return fetch_take_back(&to_cache(b)->fetcher, r);
}

/* Writing */

static int cache_write(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off,
		       enum how how)
{
	return lacking_edge(b, len, off).len > 0 ? ABSENT : layer_write(b, buf, len, off, how);
}

static int cache_zero(struct backend *b, uint64_t len, uint64_t off, unsigned flags)
{
	return lacking_edge(b, len, off).len > 0 ? ABSENT : layer_zero(b, len, off, flags);
}

/* Opening and closing */

static void free_cache(struct cache *c)
{
	origin_close(c->origin);
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
	.read = layer_read,
	.write = cache_write,
	.zero = cache_zero,
	.flush = layer_flush,
	.cache = layer_cache,
	.extents = layer_extents,
	.holds = cache_holds,
	.fetch = cache_fetch,
	.take_back = cache_take_back,
	.close = cache_close,
};

static bool are_one_file(const char *image, const char *bitmap)
{
	bool same = is_same_file(image, bitmap);

	if (same)
		log_failure("cache image %s and bitmap file %s are the same file", image, bitmap);
	return same;
}

/* Create the image, or extend one that holds nothing as yet.  False after logging why not. */
static bool prepare_image(const struct layer *l, const char *path)
{
	const struct disk *d = l->disk;
	unsigned long long size = l->size, held = bitmap_count(l->map);

	if (d && (!d->is_file || d->size >= size))
		return true;
	if (held > 0) {
		log_failure("cache image %s has %llu of %llu bytes, but the bitmap says that it "
			    "holds %llu blocks (--clear-bitmap begins afresh)", path,
			    d ? (unsigned long long)d->size : 0, size, held);
		return false;
	}
	if (!d)
		return disk_create(path, size);
	if (truncate(path, (off_t)size) == 0)
		return true;
	log_failure("cannot extend cache image %s to %llu bytes: %s", path, size, strerror(errno));
	return false;
}

static bool open_layer(struct cache *c, const struct cache_options *o)
{
	const struct bitmap_identity id = { BITMAP_CACHE, c->layer.size, 0, o->image };
	struct layer *l = &c->layer;

	if (access(o->image, F_OK) == 0) {
		l->disk = disk_open(o->image, false, false);	/* before anything is changed */
		if (!l->disk || are_one_file(o->image, o->bitmap))
			return false;
	}
	l->map = bitmap_open(o->bitmap, &id, o->clear);
	if (!l->map || are_one_file(o->image, o->bitmap) ||
	    !prepare_image(l, o->image))
		return false;
	disk_close(l->disk);
	l->disk = disk_open(o->image, false, false);
	return l->disk && disk_limit(l->disk, o->image, l->size);
}

struct cache *cache_open(const struct cache_options *o, struct origin *origin)
{
	struct cache *c = not_null(calloc(1, sizeof(*c)));

	c->origin = origin;
	c->layer.size = origin_limits(origin)->size;
	c->layer.durable = true;
	fetcher_init(&c->fetcher, &c->layer, origin);
	copy_init(&c->copy, &c->fetcher);
	if (!open_layer(c, o)) {
		free_cache(c);
		return NULL;
	}
	layer_begin(&c->layer, &cache_ops, o->readonly, "the cache");
	return c;
}

/* Control */

void cache_status(const struct cache *c, struct cache_status *status)
{
	status->blocks = bitmap_blocks(c->layer.size);
	status->held = status->blocks - layer_missing(&c->layer);
	status->per_mille = 1000;
	if (status->blocks > 0)
		status->per_mille = (unsigned)(status->held * 1000 / status->blocks);
}

/* The switch */

/* It is done, or a step has failed.  A worker. */
static void switch_ended(struct request *r)
{
	atomic_store(&to_cache(r->backend)->switch_done, true);
	wake_main();
}

/* A worker. */
static void zero_and_complete(struct job *job)
{
	struct cache *c = (struct cache *)((char *)job - offsetof(struct cache, commit.job));
	int err;

	c->zeroed = layer_missing(&c->layer);
	c->step = "store zeros";
	err = layer_zero_missing(&c->layer, &c->stopping);
	if (err) {
		request_done(&c->commit, err);
		return;
	}
	c->step = "make the image durable";
	layer_complete(&c->layer, &c->commit);
}

const char *cache_switch(struct cache *c, bool force)
{
	static char why[128];
	struct cache_status s;

	if (c->switched)
		return "this is a target already";
	if (c->switching)
		return NULL;
	cache_status(c, &s);
	if (s.held < s.blocks && !force) {
		snprintf(why, sizeof(why), "%llu of %llu blocks are not here yet (%u.%u %% are)",
			 (unsigned long long)(s.blocks - s.held), (unsigned long long)s.blocks,
			 s.per_mille / 10, s.per_mille % 10);
		return why;
	}
	log_line("switching to target mode");
	c->switching = true;
	c->commit = (struct request){
		.job.run = zero_and_complete,
		.backend = &c->layer.backend,
		.done = switch_ended,
		.h.cmd = NBD_CMD_FLUSH,
	};
	copy_release(&c->copy, true);
	worker_submit(&c->commit.job, NULL);
	return NULL;
}

bool cache_switch_ended(struct cache *c, const char **error)
{
	static char why[128];

	if (!atomic_exchange(&c->switch_done, false))
		return false;
	c->switching = false;
	c->switched = !c->commit.error;
	*error = c->switched ? NULL : why;
	if (!c->switched) {
		snprintf(why, sizeof(why), "cannot %s: %s", c->step, strerror(c->commit.error));
		log_error("cannot switch to target mode: %s", why);
		return true;
	}
	/* Nobody needs it any more; those who wait for it will find the blocks. */
	origin_cancel(c->origin);
	if (c->zeroed)
		log_line("switched to target mode; %llu blocks were missing and read as zeros now",
			 (unsigned long long)c->zeroed);
	else
		log_line("switched to target mode; the origin is not needed any more");
	return true;
}

void cache_stop(struct cache *c)
{
	copy_release(&c->copy, true);
	atomic_store(&c->stopping, true);
}
