/*
 * backend.c - the way of a request to its backend and back: see backend.h.
 *
 *	request_try()    a loop: at once, if that is possible without blocking
 *	request_queue()  a worker: blocking; or the backend, which brings blocks first
 *	request_done()   the backend, later, for what was PENDING
 *	request_again()  blocks are here: back to the loop, which tries again
 *
 * All but the last end the same way: a command with FUA that changed something is followed by a
 * flush.  A change takes its place in the image's order when it comes, and gives it up when it is
 * stored, before that flush.
 */
#include "backend.h"

#include "buffer.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
	/* A shorter READ is not searched for holes: to send zeros costs no more. */
	SPARSE_READ_MIN = 16 * 1024,
	SPARSE_READ_EXTENTS = 64,	/* a READ is not answered in more pieces */
	/* To look for holes costs a hundredth of the time, where it takes longer than this. */
	SLOW_LOOK_US = 1000,
	LOOK_PAUSE = 100,
};

/* A range of the disk that one reply describes at most, in a time that nobody notices. */
static const uint64_t DESCRIBED_MAX = UINT64_C(64) << 30;

struct load load = { .requests_max = 8192, .bytes_max = 3 * 1024 * 1024 };

/* "Transmission flags": what this backend lets a client do. */
static uint16_t transmission_flags(const struct backend *b)
{
	uint16_t flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA |
			 NBD_FLAG_SEND_CACHE | NBD_FLAG_CAN_MULTI_CONN;

	if (b->readonly)
		return flags | NBD_FLAG_READ_ONLY;
	return flags | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
}

void export_init(struct export *e, struct backend *backend, const char *name,
		 const char *description)
{
	e->backend = backend;
	e->proto.name = name;
	e->proto.description = description;
	e->proto.size = backend->size;
	e->proto.flags = transmission_flags(backend);
	backend->name = name;
}

/* How much of its range the extents of r describe. */
static uint64_t described(const struct request *r)
{
	uint64_t len = 0;

	for (unsigned i = 0; i < r->extents; i++)
		len += r->extent[i].len;
	return len;
}

/* Describe the beginning of r's range in r->extent, which has room for max from then on. */
static int get_extents(struct request *r, unsigned max)
{
	uint64_t len = r->h.len < DESCRIBED_MAX ? r->h.len : DESCRIBED_MAX;

	if (!r->extent)
		r->extent = calloc(max, sizeof(*r->extent));
	if (!r->extent)
		return -ENOMEM;
	r->extents = max;
	return r->backend->ops->extents(r->backend, r->extent, &r->extents, len, r->h.off);
}

/*
 * Look for holes in a READ that goes to the disk anyway.  To find none is never an error.  A file
 * system may go through all extents of a file for that.
 */
static void find_holes(struct request *r)
{
	struct backend *b = r->backend;
	uint64_t begun = now_us(), took;

	r->extents = 0;
	if (r->h.len < SPARSE_READ_MIN || begun < atomic_load(&b->look_again))
		return;
	if (get_extents(r, SPARSE_READ_EXTENTS) != 0 || described(r) < r->h.len)
		r->extents = 0;
	took = now_us() - begun;
	if (took > SLOW_LOOK_US)
		atomic_store(&b->look_again, begun + LOOK_PAUSE * took);
}

uint8_t *request_buffer(struct request *r)
{
	if (!r->buf) {
		r->buf = buffer_get(r->h.len);
		r->buf_len = r->buf ? r->h.len : 0;
		atomic_fetch_add(&load.bytes, r->buf_len);
	}
	return r->buf;
}

/* READ on a worker: the data between the holes, into memory that is taken now. */
static int read_sparse(struct backend *b, struct request *r)
{
	uint64_t off = r->h.off;
	uint8_t *buf = request_buffer(r);
	int ret = 0;

	if (!buf)
		return -ENOMEM;
	find_holes(r);
	if (r->extents == 0)
		return b->ops->read(b, buf, r->h.len, off, WAIT);
	for (unsigned i = 0; i < r->extents && ret == 0; i++) {
		const struct extent *e = &r->extent[i];

		if (!(e->flags & NBD_STATE_ZERO))
			ret = b->ops->read(b, buf, e->len, off, WAIT);
		off += e->len;
		buf += e->len;
	}
	return ret;
}

bool request_is_abandoned(const struct request *r)
{
	return r->abandoned && atomic_load(r->abandoned);
}

/* CACHE in steps; what has been done is not looked at again when the rest has been brought. */
static int cache_range(struct backend *b, struct request *r)
{
	int ret = 0;

	while (r->at.len > 0 && ret == 0) {
		uint64_t n = r->at.len < STEP_BYTES_MAX ? r->at.len : STEP_BYTES_MAX;

		if (request_is_abandoned(r))
			return -ECANCELED;
		ret = b->ops->cache(b, &n, r->at.off);
		r->at.off += n;
		r->at.len -= n;
	}
	return ret;
}

static bool has_failed(const struct backend *b)
{
	return atomic_load_explicit(&b->failed, memory_order_relaxed);
}

int backend_try_read(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off)
{
	return has_failed(b) ? -EIO : b->ops->read(b, buf, len, off, TRY);
}

/* Changes */

/* Take back what waits for blocks from elsewhere. */
static bool unfetch(struct request *r)
{
	const struct backend_source *source = r->backend->source;

	return source && source->take_back(r->backend, r);
}

/* Newer changes have replaced all of it: it need not wait for its blocks any more. */
static void emptied(struct change *c)
{
	struct request *r = (struct request *)((char *)c - offsetof(struct request, change));

	if (unfetch(r))
		request_again(r);
}

/* Carry out a part of a change. */
static int apply(struct request *r, const struct span *s, enum how how)
{
	struct backend *b = r->backend;
	unsigned flags = r->h.cmd == NBD_CMD_TRIM ? NBD_CMD_FLAG_FAST_ZERO : r->h.flags;

	if (r->h.cmd == NBD_CMD_WRITE)
		return b->ops->write(b, r->buf + (s->off - r->h.off), s->len, s->off, how);
	return how == TRY ? -EAGAIN : b->ops->zero(b, s->len, s->off, flags);
}

/* What is left of a change, step by step. */
static int go_on_with_change(struct request *r, enum how how)
{
	struct order *order = r->backend->order;
	struct span s = r->at;
	int ret;

	if (!r->change.order)
		r->change.emptied = emptied;
	do {
		bool hint;

		ret = order_begin(order, &r->change, STEP_BYTES_MAX, how == WAIT, &s);
		if (ret != 1)
			break;
		ret = request_is_abandoned(r) ? -ECANCELED : apply(r, &s, how);
		hint = r->h.cmd == NBD_CMD_TRIM && ret == -EOPNOTSUPP;
		order_end(&r->change, ret == 0 || hint, ret == 0);
		if (ret == 0)	/* what has begun cannot be refused any more, fast or not */
			r->h.flags &= (uint16_t)~NBD_CMD_FLAG_FAST_ZERO;
		if (hint)
			ret = 0;
	} while (ret == 0 && r->change.order);
	if (ret == ABSENT)
		r->at = s;
	else if (ret != -EAGAIN)
		order_remove(&r->change);
	return ret;
}

int backend_try_write(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off)
{
	struct change change = { 0 };
	struct span part = { off, len };
	int ret = has_failed(b) ? -EIO : order_begin(b->order, &change, len, false, &part);

	if (ret == 1) {
		ret = b->ops->write(b, buf, len, off, TRY);
		order_end(&change, ret == 0, ret == 0);
	}
	order_remove(&change);
	return ret;
}

/* A TRIM is about the whole blocks of its range.  False if there are none. */
static bool trim_to_blocks(struct request *r)
{
	uint64_t end = r->h.off + r->h.len;
	uint64_t from = (r->h.off + BLOCK_SIZE - 1) / BLOCK_SIZE * BLOCK_SIZE;

	if (end < r->backend->size)
		end -= end % BLOCK_SIZE;
	if (from >= end)
		return false;
	r->at = (struct span){ from, end - from };
	return true;
}

static int request_run(struct request *r, enum how how)
{
	struct backend *b = r->backend;
	bool one;

	assert(r->h.len <= b->size && r->h.off <= b->size - r->h.len);
	if (has_failed(b))
		return -EIO;
	switch (r->h.cmd) {
	case NBD_CMD_READ:
		if (r->h.len > READ_PIECE)	/* fetch() sees what it lacks, and passes the rest */
			return b->source && r->at.len > 0 ? ABSENT : 0;
		return read_sparse(b, r);
	case NBD_CMD_FLUSH:
		return b->ops->flush(b, r);
	case NBD_CMD_CACHE:
		return how == TRY ? -EAGAIN : cache_range(b, r);
	case NBD_CMD_BLOCK_STATUS:
		/* "NBD_REPLY_TYPE_BLOCK_STATUS" */
		one = r->h.flags & NBD_CMD_FLAG_REQ_ONE;
		return how == TRY ? -EAGAIN : get_extents(r, one ? 1 : EXTENTS_MAX);
	default:
		assert(proto_cmd_writes(r->h.cmd));
		if (r->h.cmd == NBD_CMD_TRIM && !trim_to_blocks(r))
			return 0;
		return go_on_with_change(r, how);
	}
}

/* The flush that FUA asks for; the flag is taken off, so that it happens once. */
int request_commit(struct request *r)
{
	if (!(r->h.flags & NBD_CMD_FLAG_FUA) || !proto_cmd_writes(r->h.cmd))
		return 0;
	r->h.flags &= (uint16_t)~NBD_CMD_FLAG_FUA;
	return r->backend->ops->flush(r->backend, r);
}

int request_try(struct request *r)
{
	int ret = request_run(r, TRY);

	r->absent = ret == ABSENT;
	if (ret == 0)
		return request_commit(r);
	return r->absent ? -EAGAIN : ret;
}

void request_done(struct request *r, int error)
{
	order_remove(&r->change);
	if (error == 0)
		error = request_commit(r);
	if (error == PENDING)
		return;
	r->error = -error;
	r->done(r);
}

void request_again(struct request *r)
{
	r->again = true;
	r->done(r);
}

static void run_request_job(struct job *job);

static void submit(struct request *r)
{
	r->job.run = run_request_job;
	worker_submit(&r->job, r->job.lane);
}

/* Bring what it lacks. */
static void fetch(struct request *r, enum how how)
{
	int ret = r->backend->source->fetch(r->backend, r, how);

	if (ret == 0)
		request_again(r);
	else if (ret == -EAGAIN)
		submit(r);
	else if (ret != PENDING)
		request_done(r, ret);
}

static void run_request_job(struct job *job)
{
	struct request *r = (struct request *)((char *)job - offsetof(struct request, job));
	int ret = request_is_abandoned(r) ? -ECANCELED : request_run(r, WAIT);

	if (ret == ABSENT)
		fetch(r, WAIT);
	else if (ret != PENDING)
		request_done(r, ret);
}

void request_queue(struct request *r)
{
	if (r->absent)
		fetch(r, TRY);
	else
		submit(r);
}

bool request_take_back(struct request *r)
{
	if (!worker_take_back(&r->job) && !unfetch(r))
		return false;
	order_remove(&r->change);
	r->error = ECANCELED;
	return true;
}
