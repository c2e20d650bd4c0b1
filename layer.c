/*
 * layer.c - an image that holds some of the blocks of a disk: see layer.h.
 *
 * Whoever changes blocks is alone with them (order.h).  So a block without a bit can be merged, or
 * filled with what was fetched, without burying a write that came meanwhile.
 *
 * What a crash leaves between two calls, and why a reader gets the right bytes then; for the record
 * of bits see bitmap.c:
 *
 *	a part of a block that is not held: read of the base, merge, pwrite of all of it, bit
 *		until the bit is recorded the base has the block, as it was
 *	a whole block that is not held: pwrite, bit
 *		the same; the block is one pwrite, so that half of it is nowhere
 *	zeros, a hole: fallocate or pwrite, bit
 *		the same
 *	a part, or all, of a block that is held: pwrite
 *		the block as it was, or as it will be: one page of the page cache, one write to disk
 *	a forced switch: zeros in blocks without bits, fdatasync, all blocks held by one header
 *		before the header they have no bit, and the origin has them; after it they are zeros
 *	stable storage has failed: the map says so
 *		blocks that were committed are as they were then, or newer; the others are elsewhere
 */
#include "layer.h"

#include "util.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

static int sync_image(void *disk)
{
	return disk_sync(disk);
}

/* Nothing of it can be trusted any more but what was committed, and only after a restart. */
static void layer_fail(struct layer *l, int err)
{
	if (atomic_exchange(&l->backend->failed, true))
		return;
	if (l->durable)
		bitmap_mark_failed(l->map);
	committer_lost(&l->committer, err);
}

/*
 * Be alone with all blocks, so that those without a bit stay as they are, zeros, and that all that
 * was answered before is durable.
 */
static int complete(struct layer *l, bool *lost)
{
	struct change hold;
	uint64_t missing;
	int err = disk_sync(l->disk);	/* most of it, before anybody has to wait */

	*lost = err != 0;
	if (err)
		return err;
	order_hold(disk_order(l->disk), &hold, l->size, 0, true);
	missing = layer_missing(l);
	err = missing == 0 || atomic_load(&l->spoilt) == l->spoilt_before ?
		      bitmap_complete(l->map, sync_image, l->disk, lost) :
		      -EBUSY;
	if (!err)
		atomic_fetch_add(&l->brought, missing);
	order_remove(&hold);
	return err;
}

static int commit(struct committer *committer, bool *lost)
{
	struct layer *l = (struct layer *)((char *)committer - offsetof(struct layer, committer));
	int err;

	if (atomic_load(&l->backend->failed)) {
		*lost = true;
		return -EIO;
	}
	if (!l->durable) {
		err = disk_check(l->disk);
		*lost = err != 0;
	} else if (atomic_exchange(&l->completing, false)) {
		err = complete(l, lost);
	} else {
		err = bitmap_commit(l->map, sync_image, l->disk, lost);
	}
	if (*lost)
		layer_fail(l, err);
	return err;
}

void layer_init(struct layer *l, struct backend *backend, uint64_t size, const char *what)
{
	memset(l, 0, sizeof(*l));
	l->backend = backend;
	l->size = size;
	committer_init(&l->committer, commit, what,
		       "every request is answered with EIO until a restart, after which what had been "
		       "committed before is believed (xnbd-server(8), \"When the disk fails\")");
}

void layer_begin(struct layer *l)
{
	l->backend->order = disk_order(l->disk);
	atomic_init(&l->brought, bitmap_count(l->map));
	if (l->durable && bitmap_is_dirty(l->map))
		committer_soon(&l->committer);
}

void layer_destroy(struct layer *l)
{
	disk_close(l->base);
	disk_close(l->disk);
	bitmap_close(l->map);
	committer_destroy(&l->committer);
}

int layer_finish(struct layer *l)
{
	int err = committer_finish(&l->committer);

	if (!err)
		bitmap_mark_clean(l->map);	/* or the next start looks at more than it has to */
	return err;
}

uint64_t layer_run(const struct layer *l, uint64_t len, uint64_t off, bool *held)
{
	uint64_t blk = off / BLOCK_SIZE, end = off + len, blocks, to;

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

uint64_t layer_head(uint64_t len, uint64_t off)
{
	uint64_t head = (BLOCK_SIZE - off % BLOCK_SIZE) % BLOCK_SIZE;

	return head < len ? head : len;
}

uint64_t layer_whole(const struct layer *l, uint64_t len, uint64_t off)
{
	if (off % BLOCK_SIZE != 0)
		return 0;
	return off + len == l->size ? len : len - len % BLOCK_SIZE;
}

/*
 * The blocks that a range touches, which may not be held, have been stored, if ret is 0: hold them.
 */
static int set_held(struct layer *l, uint64_t len, uint64_t off, int ret, enum how how)
{
	uint64_t blk = off / BLOCK_SIZE;

	if (ret == 0) {
		ret = bitmap_set(l->map, blk, bitmap_blocks(off + len) - blk, how == WAIT);
		if (ret != 0 && ret != -EAGAIN && !is_momentary(ret))
			layer_fail(l, ret);
		if (l->durable)
			committer_soon(&l->committer);
	}
	if (ret != 0 && ret != -EAGAIN)
		atomic_fetch_add(&l->spoilt, 1);
	return ret;
}

/* Bytes of the block that holds off; the last block may be a part of one. */
static uint64_t block_bytes(const struct layer *l, uint64_t off)
{
	uint64_t left = l->size - (off - off % BLOCK_SIZE);

	return left < BLOCK_SIZE ? left : BLOCK_SIZE;
}

/*
 * Store a part of one block.  The rest is added from the base, but never once the block is held.
 */
static int write_part(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off,
		      enum how how)
{
	uint64_t at = off % BLOCK_SIZE, start = off - at, bytes = block_bytes(l, off);
	uint8_t block[BLOCK_SIZE];
	int ret;

	assert(at + len <= bytes);
	if (layer_holds(l, len, off))
		return disk_write(l->disk, buf, len, off, how);
	assert(l->base);
	ret = disk_read(l->base, block, bytes, start, how);
	if (ret)
		return ret;
	memcpy(block + at, buf, len);
	ret = disk_write(l->disk, block, bytes, start, how);
	return set_held(l, bytes, start, ret, how);
}

/* Store blocks that may not be held as yet. */
static int write_first(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off,
		       enum how how)
{
	int ret = 0;

	while (len > 0 && ret == 0) {
		uint64_t n = layer_whole(l, len, off);

		if (n > 0) {
			ret = disk_write(l->disk, buf, n, off, how);
			ret = set_held(l, n, off, ret, how);
		} else {
			n = BLOCK_SIZE - off % BLOCK_SIZE;
			if (n > len)
				n = len;
			ret = write_part(l, buf, n, off, how);
		}
		buf += n;
		off += n;
		len -= n;
	}
	return ret;
}

int layer_write(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int err = bitmap_note_change(l->map);

	if (err)
		return err;
	return layer_holds(l, len, off) ? disk_write(l->disk, buf, len, off, how) :
					  write_first(l, buf, len, off, how);
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
static int zero_range(struct layer *l, uint64_t len, uint64_t off, unsigned flags)
{
	static uint8_t zeros[BLOCK_SIZE];	/* never written */
	uint64_t head = layer_head(len, off), whole = layer_whole(l, len - head, off + head);
	uint64_t tail = len - head - whole;
	int ret = zero_whole(l, whole, off + head, flags);

	if (ret == 0 && head > 0)
		ret = write_part(l, zeros, head, off, WAIT);
	if (ret == 0 && tail > 0)
		ret = write_part(l, zeros, tail, off + head + whole, WAIT);
	return ret;
}

int layer_zero(struct layer *l, uint64_t len, uint64_t off, unsigned flags)
{
	int err = bitmap_note_change(l->map);

	return err ? err : zero_range(l, len, off, flags);
}

int layer_trim(struct layer *l, uint64_t len, uint64_t off)
{
	int err = bitmap_note_change(l->map);

	return err ? err : zero_whole(l, len, off, NBD_CMD_FLAG_FAST_ZERO);
}

/* A run that is not held and stays so, since its range is. */
static int fill_run(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = buf ? disk_write(l->disk, buf, len, off, how) : disk_zero(l->disk, len, off, 0);

	ret = set_held(l, len, off, ret, how);
	if (ret == 0)
		atomic_fetch_add(&l->brought, bitmap_blocks(len));
	return ret;
}

int layer_fill(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	struct change hold;
	int ret = 0;

	if (!order_hold(disk_order(l->disk), &hold, len, off, how == WAIT))
		return -EAGAIN;
	while (len > 0 && ret == 0) {
		bool held;
		uint64_t n = layer_run(l, len, off, &held);

		if (!held)
			ret = fill_run(l, buf, n, off, how);
		if (buf)
			buf += n;
		off += n;
		len -= n;
	}
	order_remove(&hold);
	return ret;
}

/* Completing */

/* Zeros where nothing is held in a range, which nobody else changes meanwhile. */
static int zero_missing_in(struct layer *l, uint64_t len, uint64_t off)
{
	struct change hold;
	int ret = 0;

	order_hold(disk_order(l->disk), &hold, len, off, true);
	while (len > 0 && ret == 0) {
		bool held;
		uint64_t n = layer_run(l, len, off, &held);

		if (!held)
			ret = disk_zero(l->disk, n, off, 0);
		off += n;
		len -= n;
	}
	order_remove(&hold);
	return ret;
}

int layer_zero_missing(struct layer *l, const atomic_bool *stop)
{
	int err = 0;

	l->spoilt_before = atomic_load(&l->spoilt);
	for (uint64_t off = 0, n; off < l->size && !err; off += n) {
		bool held;

		n = l->size - off < STEP_BYTES_MAX ? l->size - off : STEP_BYTES_MAX;
		n = layer_run(l, n, off, &held);
		if (atomic_load(stop))
			err = -ECANCELED;
		else if (!held)
			err = zero_missing_in(l, n, off);
	}
	return err;
}

int layer_complete(struct layer *l, struct request *r)
{
	atomic_store(&l->completing, true);
	return committer_flush(&l->committer, r);
}

int layer_flush(struct layer *l, struct request *r)
{
	return committer_flush(&l->committer, r);
}
