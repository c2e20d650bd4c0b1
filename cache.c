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

/*
 * A switch, each step begun by cache_tend() when the one before has ended:
 *
 *	ZEROING		only by force: zeros are stored where nothing is held, by a worker
 *	COMPLETING	all that is held becomes durable, and then all blocks are held
 *	then the origin is let go
 */
enum step { NO_SWITCH, ZEROING, COMPLETING, SWITCHED };

struct cache {
	struct layer layer;		/* the first */
	struct origin *origin;
	struct fetcher fetcher;
	struct copy *copy;
	void (*wake)(void);

	/* The switch; the main thread's, but for the step that is under way. */
	enum step step;
	uint64_t zeroed;		/* blocks, by force */
	struct job zero_job;
	struct request commit;		/* the flush that COMPLETING waits for */
	int error;			/* the outcome of a step, an errno */
	atomic_bool step_done, copy_done;
	atomic_bool stopping;		/* zero no more */
};

static struct cache *to_cache(struct backend *b)
{
	return (struct cache *)b;
}

/* Reading */

/* What is held from the image, the rest from the origin. */
static int fetch_read(struct cache *c, struct request *r, enum how how)
{
	uint64_t off = r->h.off, end = off + r->h.len;
	struct miss *m = miss_new(&c->fetcher, r);
	int err = m ? 0 : -ENOMEM;

	while (off < end && !err) {
		bool held;
		uint64_t n = layer_run(&c->layer, end - off, off, &held);

		if (held) {
			uint8_t *buf = miss_buffer(m);

			err = buf ? disk_read(c->layer.disk, buf + (off - r->h.off), n, off, how) :
				    -ENOMEM;
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

/* Bring blocks of a range; all of those that are not held, or the first and the last. */
static int fetch_blocks(struct cache *c, struct request *r, uint64_t len, uint64_t off, bool edges)
{
	struct miss *m = miss_new(&c->fetcher, r);
	uint64_t end = off + len, last = (end - 1) / BLOCK_SIZE * BLOCK_SIZE;
	int err = m ? 0 : -ENOMEM;

	if (m && edges) {
		int64_t added = off % BLOCK_SIZE == 0 ? 0 : miss_add(m, 1, off);

		if (added >= 0 && end % BLOCK_SIZE != 0 && end != c->layer.size)
			added = miss_add(m, 1, last);
		return miss_wait(m, added < 0 ? (int)added : 0);
	}
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

static void advance(struct span *s, uint64_t n)
{
	s->off += n;
	s->len -= n;
}

/* A part from what is not held on, so that the origin is not asked for all of it at once. */
static int fetch_next(struct cache *c, struct request *r)
{
	uint64_t n = 0, off;
	bool held = true;

	while (r->at.len > 0 && held) {
		n = layer_run(&c->layer, r->at.len, r->at.off, &held);
		if (held)
			advance(&r->at, n);
	}
	off = r->at.off;
	n = r->at.len < PREFETCH_MAX ? r->at.len : PREFETCH_MAX;
	advance(&r->at, n);
	/* A READ is answered when all of it has been asked for, also if it cannot be stored. */
	r->fetched = r->at.len == 0 && r->h.cmd == NBD_CMD_READ;
	return n == 0 ? 0 : fetch_blocks(c, r, n, off, false);
}

static int fetch_status(struct cache *c, struct request *r)
{
	bool held;
	uint64_t len = layer_run(&c->layer, r->h.len, r->h.off, &held);

	if (held)
		return 0;
	if (len > PROTO_STATUS_MAX / 2)
		len = PROTO_STATUS_MAX / 2;
	if (origin_tells_extents(c->origin))
		return fetch_extents(&c->fetcher, r, len,
				     r->h.flags & NBD_CMD_FLAG_REQ_ONE ? 1 : EXTENTS_MAX);
	r->extent[0] = (struct extent){ len, 0 };
	r->extents = 1;
	request_done(r, 0);
	return PENDING;
}

static int op_fetch(struct backend *b, struct request *r, enum how how)
{
	struct cache *c = to_cache(b);

	switch (r->h.cmd) {
	case NBD_CMD_READ:
		fetch_missed(&c->fetcher, r->h.len, r->h.off);
		return r->h.len > READ_PIECE ? fetch_next(c, r) : fetch_read(c, r, how);
	case NBD_CMD_CACHE:
		return fetch_next(c, r);
	case NBD_CMD_BLOCK_STATUS:
		return fetch_status(c, r);
	default:
		return fetch_blocks(c, r, r->at.len, r->at.off, true);
	}
}

static bool op_take_back(struct backend *b, struct request *r)
{
	return fetch_take_back(&to_cache(b)->fetcher, r);
}

static bool op_holds(struct backend *b, uint64_t len, uint64_t off)
{
	return layer_holds(&to_cache(b)->layer, len, off);
}

static int op_read(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	struct cache *c = to_cache(b);

	if (!layer_holds(&c->layer, len, off))
		return ABSENT;
	return disk_read(c->layer.disk, buf, len, off, how);
}

/* Writing */

/* Whether a block of which a change leaves a part as it is is not held. */
static bool lacks_edges(const struct cache *c, uint64_t len, uint64_t off)
{
	const struct layer *l = &c->layer;
	uint64_t end = off + len;

	if (off % BLOCK_SIZE != 0 && !layer_holds(l, 1, off))
		return true;
	return end % BLOCK_SIZE != 0 && end != l->size && !layer_holds(l, 1, end - 1);
}

static int op_write(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	struct cache *c = to_cache(b);

	return lacks_edges(c, len, off) ? ABSENT : layer_write(b, buf, len, off, how);
}

static int op_zero(struct backend *b, uint64_t len, uint64_t off, unsigned flags)
{
	struct cache *c = to_cache(b);

	return lacks_edges(c, len, off) ? ABSENT : layer_zero(b, len, off, flags);
}

static int op_cache(struct backend *b, uint64_t *len, uint64_t off)
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
static unsigned op_extents(struct backend *b, struct extent *extent, unsigned max, uint64_t len,
			   uint64_t off, int *ret)
{
	struct cache *c = to_cache(b);
	bool held;
	uint64_t n = layer_run(&c->layer, len, off, &held);

	if (held)
		return layer_extents(b, extent, max, n, off, ret);
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

static int op_close(struct backend *b)
{
	struct cache *c = to_cache(b);
	int err = layer_finish(&c->layer);

	free_cache(c);
	return err;
}

static const struct backend_ops cache_ops = {
	.name = "cache",
	.read = op_read,
	.write = op_write,
	.zero = op_zero,
	.trim = layer_trim,
	.flush = layer_flush,
	.cache = op_cache,
	.extents = op_extents,
	.holds = op_holds,
	.fetch = op_fetch,
	.take_back = op_take_back,
	.close = op_close,
};

/* The background copy has ended.  Any thread. */
static void copied(void *cache)
{
	struct cache *c = cache;

	atomic_store(&c->copy_done, true);
	c->wake();
}

static bool refuse(const char *path, const char *what, uint64_t held)
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
	const struct bitmap_identity id = { BITMAP_CACHE, c->layer.size, 0, o->image };
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
	c->origin = origin;
	layer_init(&c->layer, &cache_ops, origin_limits(origin)->size, o->readonly, "the cache");
	c->layer.durable = true;
	fetcher_init(&c->fetcher, &c->layer, origin);
	c->wake = o->wake;
	c->copy = copy_new(&c->fetcher, copied, c);
	if (!c->copy) {
		log_failure("cannot open cache image %s: %s", o->image, strerror(ENOMEM));
	} else if (open_layer(c, o)) {
		layer_begin(&c->layer);
		return &c->layer.backend;
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

/* A worker. */
static void step_ended(struct cache *c, int error)
{
	c->error = error;
	atomic_store(&c->step_done, true);
	c->wake();
}

static void completed(struct request *r)
{
	step_ended(to_cache(r->backend), r->error);
}

static void begin_completing(struct cache *c)
{
	c->step = COMPLETING;
	c->commit = (struct request){
		.backend = &c->layer.backend,
		.done = completed,
		.h.cmd = NBD_CMD_FLUSH,
	};
	layer_complete(&c->layer, &c->commit);
}

static void zero_missing(struct job *job)
{
	struct cache *c = (struct cache *)((char *)job - offsetof(struct cache, zero_job));

	c->zeroed = layer_missing(&c->layer);
	step_ended(c, -layer_zero_missing(&c->layer, &c->stopping));
}

const char *cache_switch(struct backend *b, bool force)
{
	static char why[128];
	struct cache *c = to_cache(b);
	struct cache_status s;
	unsigned share;

	if (c->step == SWITCHED)
		return "this is a target already";
	if (c->step != NO_SWITCH)
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
	c->zeroed = 0;
	if (s.held == s.blocks) {
		begin_completing(c);
		return NULL;
	}
	copy_stop(c->copy);
	c->step = ZEROING;
	c->zero_job.run = zero_missing;
	worker_submit(&c->zero_job);
	return NULL;
}

static void end_switch(struct cache *c, struct cache_news *news)
{
	int error = c->error ? c->error : layer_missing(&c->layer) > 0 ? EAGAIN : 0;

	news->switched = true;
	news->zeroed = c->zeroed;
	if (error) {
		snprintf(news->error, sizeof(news->error), "%s: %s",
			 c->step == ZEROING ? "cannot store zeros" : "cannot make the image durable",
			 strerror(error));
		c->step = NO_SWITCH;
		log_error("cannot switch to target mode: %s", news->error);
		return;
	}
	/* Nobody needs it any more; those who wait for it will find the blocks. */
	origin_cancel(c->origin);
	c->step = SWITCHED;
	if (c->zeroed)
		log_line("switched to target mode; %llu blocks were missing and read as zeros now",
			 (unsigned long long)c->zeroed);
	else
		log_line("switched to target mode; the origin is not needed any more");
}

void cache_tend(struct backend *b, struct cache_news *news)
{
	struct cache *c = to_cache(b);

	*news = (struct cache_news){ .copied = atomic_exchange(&c->copy_done, false) };
	if (!atomic_exchange(&c->step_done, false))
		return;
	if (c->step == ZEROING && !c->error)
		begin_completing(c);
	else
		end_switch(c, news);
}

bool cache_is_target(struct backend *b)
{
	return to_cache(b)->step == SWITCHED;
}

void cache_stop(struct backend *b)
{
	struct cache *c = to_cache(b);

	copy_stop(c->copy);
	atomic_store(&c->stopping, true);
}
