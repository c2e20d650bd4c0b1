/*
 * layer.c - an image that holds some of the blocks of a disk: see layer.h.
 *
 * Until its bit is set, a block is written only by who holds its range (range.h): else what is
 * merged, or fetched, could bury a write that came meanwhile.  Once the bit is set, writes go
 * straight to the image.
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

static int commit(struct committer *committer)
{
	struct layer *l = (struct layer *)((char *)committer - offsetof(struct layer, committer));

	return bitmap_commit(l->map, sync_image, l->disk);
}

void layer_init(struct layer *l, uint64_t size, const char *what)
{
	memset(l, 0, sizeof(*l));
	l->size = size;
	ranges_init(&l->first_writes);
	committer_init(&l->committer, commit, what);
}

void layer_begin(struct layer *l)
{
	if (l->durable && bitmap_is_dirty(l->map))
		committer_soon(&l->committer);
}

void layer_destroy(struct layer *l)
{
	disk_close(l->base);
	disk_close(l->disk);
	bitmap_close(l->map);
	ranges_destroy(&l->first_writes);
	committer_destroy(&l->committer);
}

int layer_finish(struct layer *l)
{
	int err = committer_run(&l->committer);

	return err ? err : bitmap_mark_clean(l->map);
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

/* The blocks that a range touches are in the image now.  Returns how many were not before. */
static uint64_t set_held(struct layer *l, uint64_t len, uint64_t off)
{
	uint64_t blk = off / BLOCK_SIZE;
	uint64_t fresh = bitmap_set(l->map, blk, bitmap_blocks(off + len) - blk);

	if (fresh > 0 && l->durable)
		committer_soon(&l->committer);
	return fresh;
}

/* Bytes of the block that holds off; the last block may be a part of one. */
static uint64_t block_bytes(const struct layer *l, uint64_t off)
{
	uint64_t left = l->size - (off - off % BLOCK_SIZE);

	return left < BLOCK_SIZE ? left : BLOCK_SIZE;
}

/*
 * Store a part of one block, whose range is taken.  The rest is added from the base, but never
 * once the block is held: others may write there at the same time.
 */
static int write_part(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off,
		      enum how how, uint64_t *fresh)
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
	if (ret == 0)
		*fresh += set_held(l, bytes, start);
	return ret;
}

/* Store blocks that may not be held as yet; their range is taken. */
static int write_first(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off,
		       enum how how, uint64_t *fresh)
{
	int ret = 0;

	while (len > 0 && ret == 0) {
		uint64_t n = layer_whole(l, len, off);

		if (n > 0) {
			ret = disk_write(l->disk, buf, n, off, how);
			if (ret == 0)
				*fresh += set_held(l, n, off);
		} else {
			n = BLOCK_SIZE - off % BLOCK_SIZE;
			if (n > len)
				n = len;
			ret = write_part(l, buf, n, off, how, fresh);
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

int layer_write(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how,
		uint64_t *fresh)
{
	struct range range = blocks_of(len, off);
	int ret;

	if (layer_holds(l, len, off))
		return disk_write(l->disk, buf, len, off, how);
	if (!ranges_take(&l->first_writes, &range, how == WAIT))
		return -EAGAIN;
	ret = write_first(l, buf, len, off, how, fresh);
	ranges_release(&l->first_writes, &range);
	return ret;
}

/* Zero whole blocks: they become holes of the image where it can have holes. */
static int zero_whole(struct layer *l, uint64_t len, uint64_t off, unsigned flags, uint64_t *fresh)
{
	int ret;

	if (len == 0)
		return 0;
	ret = disk_zero(l->disk, len, off, flags);
	if (ret == 0)
		*fresh += set_held(l, len, off);
	return ret;
}

/* Whole blocks first: for FAST_ZERO that is what may fail, and then nothing may have changed. */
static int zero_range(struct layer *l, uint64_t len, uint64_t off, unsigned flags, uint64_t *fresh)
{
	static uint8_t zeros[BLOCK_SIZE];	/* never written */
	uint64_t head = layer_head(len, off), whole = layer_whole(l, len - head, off + head);
	uint64_t tail = len - head - whole;
	int ret = zero_whole(l, whole, off + head, flags, fresh);

	if (ret == 0 && head > 0)
		ret = write_part(l, zeros, head, off, WAIT, fresh);
	if (ret == 0 && tail > 0)
		ret = write_part(l, zeros, tail, off + head + whole, WAIT, fresh);
	return ret;
}

int layer_zero(struct layer *l, uint64_t len, uint64_t off, unsigned flags, uint64_t *fresh)
{
	struct range range = blocks_of(len, off);
	int ret;

	ranges_take(&l->first_writes, &range, true);
	ret = zero_range(l, len, off, flags, fresh);
	ranges_release(&l->first_writes, &range);
	return ret;
}

int layer_trim(struct layer *l, uint64_t len, uint64_t off, uint64_t *fresh)
{
	uint64_t head = layer_head(len, off), whole = layer_whole(l, len - head, off + head);
	struct range range = blocks_of(whole, off + head);
	int ret;

	if (whole == 0)
		return 0;
	ranges_take(&l->first_writes, &range, true);
	ret = zero_whole(l, whole, off + head, NBD_CMD_FLAG_FAST_ZERO, fresh);
	ranges_release(&l->first_writes, &range);
	return ret == -EOPNOTSUPP ? 0 : ret;
}

/* A run that is not held and stays so, since its range is taken. */
static int fill_run(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = buf ? disk_write(l->disk, buf, len, off, how) : disk_zero(l->disk, len, off, 0);

	if (ret == 0)
		set_held(l, len, off);
	return ret;
}

int layer_fill(struct layer *l, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	struct range range = blocks_of(len, off);
	int ret = 0;

	if (!ranges_take(&l->first_writes, &range, how == WAIT))
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
	ranges_release(&l->first_writes, &range);
	return ret;
}

int layer_flush(struct layer *l, struct request *r)
{
	return l->durable ? committer_flush(&l->committer, r) : 0;
}
