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

static int cache_fetch(struct backend *b, struct request *r, enum how how)
{
	return fetch_wait(&to_cache(b)->fetcher, r, how);
}

static bool cache_take_back(struct backend *b, struct request *r)
{
	return fetch_take_back(&to_cache(b)->fetcher, r);
}

static const struct backend_source cache_source = { cache_fetch, cache_take_back };

/* Opening */

static bool are_two_files(const char *image, const char *bitmap)
{
	return !is_same_file(image, bitmap) ||
	       log_failure("cache image %s and bitmap file %s are the same file", image, bitmap);
}

/* Create the image, or extend one that holds nothing as yet.  False after logging why not. */
static bool prepare_image(struct layer *l, const char *path)
{
	unsigned long long size = l->size, held = bitmap_count(l->map);
	unsigned long long found = l->disk ? l->disk->size : 0;
	bool is_device = l->disk && !l->disk->is_file;

	if (found < size && held > 0 && !is_device)
		return log_failure("cache image %s has %llu of %llu bytes, but the bitmap says that "
				   "it holds %llu blocks (--clear-bitmap begins afresh)", path,
				   found, size, held);
	if (!l->disk && disk_create(path, size))
		l->disk = disk_open(path, false, false);
	if (!l->disk)
		return false;
	if (l->disk->size < size && is_device)
		return log_failure("image %s has %llu bytes, and at least %llu are expected", path,
				   found, size);
	if (l->disk->size < size && truncate(path, (off_t)size) < 0)
		return log_failure("cannot extend cache image %s to %llu bytes: %s", path, size,
				   strerror(errno));
	l->disk->size = size;		/* what is behind that is not used */
	return true;
}

static bool open_layer(struct layer *l, const char *image, const char *bitmap, bool clear)
{
	const struct bitmap_identity id = { BITMAP_CACHE, l->size, 0, image };

	if (access(image, F_OK) == 0) {
		l->disk = disk_open(image, false, false);	/* before anything is changed */
		if (!l->disk || !are_two_files(image, bitmap))
			return false;
	}
	l->map = bitmap_open(bitmap, &id, clear);
	return l->map && are_two_files(image, bitmap) && prepare_image(l, image);
}

struct cache *cache_open(const char *image, const char *bitmap, bool clear, bool readonly,
			 struct origin *origin)
{
	struct cache *c = not_null(calloc(1, sizeof(*c)));

	c->origin = origin;
	c->layer.size = origin_limits(origin)->size;
	c->layer.durable = true;
	fetcher_init(&c->fetcher, &c->layer, origin);
	copy_init(&c->copy, &c->fetcher);
	if (!open_layer(&c->layer, image, bitmap, clear)) {
		layer_free(&c->layer);
		return NULL;
	}
	c->layer.backend.source = &cache_source;
	layer_begin(&c->layer, readonly, "the cache");
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
static void switch_ended(struct cache *c, int err)
{
	c->error = -err;
	atomic_store(&c->switch_done, true);
	wake_main();
}

static void complete_job(struct job *job)
{
	struct cache *c = (struct cache *)((char *)job - offsetof(struct cache, job));

	switch_ended(c, layer_complete(&c->layer));
}

static void zero_job(struct job *job)
{
	struct cache *c = (struct cache *)((char *)job - offsetof(struct cache, job));
	int err;

	c->zeroed = layer_missing(&c->layer);
	c->step = "store zeros";
	err = layer_zero_missing(&c->layer, &c->stopping);
	if (err) {
		switch_ended(c, err);
		return;
	}
	c->step = "make the image durable";
	c->job.run = complete_job;
	worker_submit(&c->job, &c->layer.commits);
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
	c->job.run = zero_job;
	copy_release(&c->copy, true);
	worker_submit(&c->job, NULL);
	return NULL;
}

bool cache_switch_ended(struct cache *c, const char **error)
{
	static char why[128];

	if (!atomic_exchange(&c->switch_done, false))
		return false;
	c->switching = false;
	c->switched = !c->error;
	*error = c->switched ? NULL : why;
	if (!c->switched) {
		snprintf(why, sizeof(why), "cannot %s: %s", c->step, strerror(c->error));
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
