/*
 * layer.c - an image that holds blocks of a disk: see layer.h.
 *
 * A change of blocks is alone with them (order.h).  So a block without a bit can be merged, or
 * filled with what was fetched, without burying a write that came meanwhile.
 *
 * What a crash leaves between two calls, and why a reader gets the right bytes then; for the record
 * of bits and a forced switch see bitmap.c:
 *
 *	a part of a block that is not held: read of the base, merge, pwrite of all of it, bit
 *		until the bit is recorded the base has the block, as it was
 *	a whole block that is not held: pwrite, bit
 *		the same; the block is one pwrite, so that half of it is nowhere
 *	zeros, a hole: fallocate or pwrite, bit
 *		the same
 *	a part, or all, of a block that is held: pwrite
 *		the block as it was, or as it will be: one page of the page cache, one write to disk
 *	stable storage has failed: the map says so
 *		blocks that were committed are as they were then, or newer; the others are elsewhere
 *
 * A FLUSH has to wait for a commit that begins after it came.  Those that come while one runs wait
 * in the lane: the first commits for all of them, so that any number of clients costs two at a time.
 * A loss is remembered: the kernel tells of lost pages once, and a second try would say that all
 * is well.
 */
#include "layer.h"

#include "log.h"
#include "util.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct layer *layer_of(struct backend *b)
{
	return (struct layer *)b;
}

/* Commits */

/* Something has to be committed, within about a second.  Cheap. */
static void commit_soon(struct layer *l)
{
	if (!atomic_load_explicit(&l->soon, memory_order_relaxed) &&
	    !atomic_exchange(&l->soon, true))
		worker_submit_later(&l->timer, &l->commits);
}

static void tell_state(const struct layer *l, enum log_level level, const char *state,
		       const char *more)
{
	const char *name = l->backend.name ? l->backend.name : "";

	log_at(level, "%s%s%s is %s%s", name, *name ? ": " : "", l->what, state, more);
}

/*
 * Stable storage has failed.  Under a map nothing can be trusted any more but what was committed,
 * and only after a restart; a plain image is read as before.
 */
static void layer_fail(struct layer *l, int err)
{
	char more[512];

	if (atomic_exchange(&l->lost, true))
		return;
	atomic_store(&l->backend.failed, l->map != NULL);
	if (l->durable)
		bitmap_tell(l->map, BITMAP_FAILED, false);
	snprintf(more, sizeof(more), ": %s; %s (xnbd-server(8), \"When the disk fails\")",
		 strerror(-err),
		 l->map ? "every request is answered with EIO until a restart, after which what had "
			  "been committed before is believed" :
			  "every flush fails until a restart; what was not flushed before may be "
			  "lost");
	tell_state(l, LOG_ERROR, "not on stable storage", more);
}

/*
 * Be alone with all blocks, so that those without a bit stay as they are, zeros, and that all that
 * was answered before is durable.
 */
static int complete_map(struct layer *l)
{
	struct change hold;
	uint64_t missing;
	int err = disk_sync(l->disk);	/* most of it, before any change has to wait */

	if (err)
		return err;
	order_hold(&l->disk->order, &hold, l->size, 0, true);
	missing = layer_missing(l);
	err = missing > 0 && atomic_load(&l->spoilt) ? -EBUSY : disk_sync(l->disk);
	if (!err)
		err = bitmap_tell(l->map, BITMAP_WHOLE, true);
	if (!err)
		atomic_fetch_add(&l->brought, missing);
	order_remove(&hold);
	return err;
}

/* Make durable all that was done before. */
static int make_durable(struct layer *l)
{
	if (atomic_load(&l->backend.failed))
		return -EIO;
	if (!l->map)
		return disk_sync(l->disk);
	return l->durable ? bitmap_commit(l->map, l->disk) : disk_check(l->disk);
}

/*
 * The end of a commit: whether its error is a loss.  One of the moment is told once, and again when
 * there was none in between.
 */
static int end_commit(struct layer *l, int err, bool last)
{
	char more[128];

	if (err && (atomic_load(&l->disk->error) || (l->durable && bitmap_has_failed(l->map)))) {
		layer_fail(l, err);
		return err;
	}
	snprintf(more, sizeof(more), ": %s%s", strerror(-err), last ? "" : "; trying again");
	if (err && (last || !l->told))
		tell_state(l, LOG_ERROR, "not committed", more);
	if (!err && l->told)
		tell_state(l, LOG_EVENT, "committed again", "");
	l->told = err != 0;
	if (err && !last)
		commit_soon(l);
	return err;
}

static void commit(struct layer *l)
{
	atomic_fetch_add(&l->begun, 1);
	l->result = end_commit(l, make_durable(l), false);
}

static void timer_due(struct job *timer)
{
	struct layer *l = (struct layer *)((char *)timer - offsetof(struct layer, timer));

	atomic_store(&l->soon, false);
	commit(l);
}

static void flush_job(struct job *job)
{
	struct request *r = (struct request *)((char *)job - offsetof(struct request, job));
	struct layer *l = layer_of(r->backend);

	if (atomic_load(&l->begun) == r->commits)
		commit(l);
	request_done(r, l->result);
}

static int layer_flush(struct backend *b, struct request *r)
{
	struct layer *l = layer_of(b);

	if (b->readonly && !l->durable)
		return 0;
	r->commits = atomic_load(&l->begun);
	r->job.run = flush_job;
	worker_submit(&r->job, &l->commits);
	return PENDING;
}

int layer_complete(struct layer *l)
{
	int err = atomic_load(&l->backend.failed) ? -EIO : complete_map(l);

	return end_commit(l, err, false);
}

/* Blocks */

uint64_t layer_run(const struct layer *l, uint64_t len, uint64_t off, bool *held)
{
	uint64_t blk = off / BLOCK_SIZE, end = off + len, blocks, to;

	*held = true;
	if (!l->map)
		return len;
	blocks = bitmap_run(l->map, blk, bitmap_blocks(end) - blk, held);
	to = (blk + blocks) * BLOCK_SIZE;
	return (to < end ? to : end) - off;
}

bool layer_holds(const struct layer *l, uint64_t len, uint64_t off)
{
	bool held;

	return layer_run(l, len, off, &held) == len && held;
}

uint64_t layer_missing(const struct layer *l)
{
	return bitmap_blocks(l->size) - bitmap_count(l->map);
}

uint64_t layer_written(const struct layer *l)
{
	return bitmap_count(l->map) - atomic_load(&l->brought);
}

uint64_t layer_whole(const struct layer *l, uint64_t len, uint64_t off)
{
	if (off % BLOCK_SIZE != 0)
		return 0;
	return off + len == l->size ? len : len - len % BLOCK_SIZE;
}

struct span layer_lacks(const struct layer *l, uint64_t len, uint64_t off)
{
	uint64_t end = off + len;

	if (off % BLOCK_SIZE != 0 && !layer_holds(l, 1, off))
		return (struct span){ off, 1 };
	if (end % BLOCK_SIZE != 0 && end != l->size && !layer_holds(l, 1, end - 1))
		return (struct span){ end - 1, 1 };
	return (struct span){ off, 0 };
}

/* Where the run at off lies, of at most *len bytes, and its length; NULL: it is absent. */
static struct disk *run_at(const struct layer *l, uint64_t *len, uint64_t off)
{
	bool held;

	*len = layer_run(l, *len, off, &held);
	return held ? l->disk : l->base;
}

static int layer_read(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = layer_of(b)->base || layer_holds(layer_of(b), len, off) ? 0 : ABSENT;

	for (uint64_t n = len; len > 0 && ret == 0; n = len) {
		struct disk *d = run_at(layer_of(b), &n, off);

		ret = disk_read(d, buf, n, off, how);
		buf += n;
		off += n;
		len -= n;
	}
	return ret;
}

static int layer_cache(struct backend *b, uint64_t *len, uint64_t off)
{
	struct disk *d = run_at(layer_of(b), len, off);

	if (d)
		disk_prefetch(d, *len, off);
	else
		*len = 0;
	return d ? 0 : ABSENT;
}

static int layer_extents(struct backend *b, struct extent *extent, unsigned *count, uint64_t len,
			 uint64_t off)
{
	uint64_t end = off + len;
	unsigned n = 0, max = *count;
	struct extent e;

	for (; off < end; off += e.len) {
		uint64_t run = end - off;
		struct disk *d = run_at(layer_of(b), &run, off);

		if (!d)
			break;
		e = disk_extent(d, off, off + run);
		if (n > 0 && extent[n - 1].flags == e.flags)
			extent[n - 1].len += e.len;
		else if (n < max)
			extent[n++] = e;
		else
			break;
	}
	*count = n;
	return n > 0 ? 0 : ABSENT;
}

/* Changes */

/* The outcome of a call of the map: an error may be a loss. */
static int check_map(struct layer *l, int ret)
{
	if (ret != 0 && ret != -EAGAIN && bitmap_has_failed(l->map))
		layer_fail(l, ret);
	return ret;
}

/* A client changes something, which a map's file tells first; or ABSENT. */
static int begin_change(struct layer *l, uint64_t len, uint64_t off)
{
	if (!l->map)
		return 0;
	if (!l->base && layer_lacks(l, len, off).len > 0)
		return ABSENT;
	return check_map(l, bitmap_tell(l->map, BITMAP_WRITTEN, false));
}

/*
 * The blocks that a range touches, which may not be held, have been stored, if ret is 0: hold them.
 */
static int set_held(struct layer *l, uint64_t len, uint64_t off, int ret, enum how how)
{
	uint64_t blk = off / BLOCK_SIZE, blocks = bitmap_blocks(off + len) - blk;

	if (!l->map)
		return ret;
	if (ret == 0) {
		ret = check_map(l, bitmap_set(l->map, blk, blocks, how == WAIT));
		if (l->durable)
			commit_soon(l);
	}
	if (ret != 0 && ret != -EAGAIN)
		atomic_store(&l->spoilt, true);
	return ret;
}

/* Store a part of one block that is not held, and what the base has of the rest. */
static int merge_part(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	uint64_t at = off % BLOCK_SIZE, start = off - at, left = l->size - start;
	uint64_t bytes = left < BLOCK_SIZE ? left : BLOCK_SIZE;
	uint8_t block[BLOCK_SIZE];
	int ret;

	assert(l->base && at + len <= bytes);
	ret = disk_read(l->base, block, bytes, start, how);
	if (ret)
		return ret;
	memcpy(block + at, buf, len);
	ret = disk_write(l->disk, block, bytes, start, how);
	return set_held(l, bytes, start, ret, how);
}

/* Store a range, run by run: what is held as it is, of the rest whole blocks, or a part of one. */
static int write_range(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off,
		       enum how how)
{
	int ret = 0;

	while (len > 0 && ret == 0) {
		bool held;
		uint64_t n = layer_run(l, len, off, &held), whole = layer_whole(l, n, off);
		uint64_t part = BLOCK_SIZE - off % BLOCK_SIZE;

		if (held) {
			ret = disk_write(l->disk, buf, n, off, how);
		} else if (whole > 0) {
			n = whole;
			ret = disk_write(l->disk, buf, n, off, how);
			ret = set_held(l, n, off, ret, how);
		} else {
			n = part < n ? part : n;
			ret = merge_part(l, buf, n, off, how);
		}
		buf += n;
		off += n;
		len -= n;
	}
	return ret;
}

static int layer_write(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off,
		       enum how how)
{
	int ret = begin_change(layer_of(b), len, off);

	return ret ? ret : write_range(layer_of(b), buf, len, off, how);
}

/* Zero whole blocks: they become holes of the image where it can have holes. */
static int zero_whole(struct layer *l, uint64_t len, uint64_t off, unsigned flags)
{
	int ret;

	if (len == 0)
		return 0;
	ret = disk_zero(l->disk, len, off, flags);
	return ret == -EOPNOTSUPP ? ret : set_held(l, len, off, ret, WAIT);
}

/* Whole blocks first: for FAST_ZERO that is what may fail, and then nothing may have changed. */
static int layer_zero(struct backend *b, uint64_t len, uint64_t off, unsigned flags)
{
	struct layer *l = layer_of(b);
	static uint8_t zeros[BLOCK_SIZE];	/* never written */
	uint64_t head = (BLOCK_SIZE - off % BLOCK_SIZE) % BLOCK_SIZE, whole, tail;
	int ret = begin_change(l, len, off);

	if (head > len)
		head = len;
	whole = layer_whole(l, len - head, off + head);
	tail = len - head - whole;
	if (ret == 0)
		ret = zero_whole(l, whole, off + head, flags);
	if (ret == 0 && head > 0)
		ret = write_range(l, zeros, head, off, WAIT);
	if (ret == 0 && tail > 0)
		ret = write_range(l, zeros, tail, off + head + whole, WAIT);
	return ret;
}

/* Filling */

/* A run that is not held and stays so, since its range is. */
static int fill_run(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = buf ? disk_write(l->disk, buf, len, off, how) : disk_zero(l->disk, len, off, 0);

	ret = set_held(l, len, off, ret, how);
	if (ret == 0)
		atomic_fetch_add(&l->brought, bitmap_blocks(len));
	return ret;
}

/* Fill what is not held of a range; or just store zeros there. */
static int fill_range(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, bool hold,
		      enum how how)
{
	struct change alone;
	int ret = 0;

	if (!order_hold(&l->disk->order, &alone, len, off, how == WAIT))
		return -EAGAIN;
	while (len > 0 && ret == 0) {
		bool held;
		uint64_t n = layer_run(l, len, off, &held);

		if (!held)
			ret = hold ? fill_run(l, buf, n, off, how) : disk_zero(l->disk, n, off, 0);
		if (buf)
			buf += n;
		off += n;
		len -= n;
	}
	order_remove(&alone);
	return ret;
}

int layer_fill(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	return fill_range(l, buf, len, off, true, how);
}

int layer_zero_missing(struct layer *l, const atomic_bool *stop)
{
	int err = 0;

	atomic_store(&l->spoilt, false);
	for (uint64_t off = 0, n; off < l->size && !err; off += n) {
		n = l->size - off < STEP_BYTES_MAX ? l->size - off : STEP_BYTES_MAX;
		err = atomic_load(stop) ? -ECANCELED : fill_range(l, NULL, n, off, false, WAIT);
	}
	return err;
}

/* Beginning and end */

void layer_free(struct layer *l)
{
	disk_close(l->base);
	disk_close(l->disk);
	bitmap_close(l->map);
	free(l);
}

static int layer_close(struct backend *b)
{
	struct layer *l = layer_of(b);
	int err = l->durable ? end_commit(l, make_durable(l), true) : 0;

	if (l->durable && !err)
		bitmap_mark_clean(l->map);	/* or the next start looks at more than it has to */
	err = atomic_load(&l->lost) ? -EIO : err;
	layer_free(l);
	return err;
}

static const struct backend_ops layer_ops = {
	.read = layer_read,
	.write = layer_write,
	.zero = layer_zero,
	.flush = layer_flush,
	.cache = layer_cache,
	.extents = layer_extents,
	.close = layer_close,
};

void layer_begin(struct layer *l, bool readonly, const char *what)
{
	l->backend.ops = &layer_ops;
	l->backend.size = l->size;
	l->backend.readonly = readonly;
	l->backend.order = &l->disk->order;
	l->what = what;
	l->commits.single = true;
	l->timer.run = timer_due;
	if (l->map)
		atomic_init(&l->brought, bitmap_count(l->map));
	if (l->durable)
		commit_soon(l);
}
