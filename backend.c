/*
 * backend.c - the way of a request to its backend and back: see backend.h.
 *
 *	request_try()    a loop: at once, if that is possible without blocking
 *	request_queue()  a worker: blocking
 *	request_done()   the backend, later, for what was PENDING
 *
 * All three end the same way: a command with FUA that changed something is followed by a flush.
 */
#include "backend.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A READ shorter than this is not searched for holes: to send zeros costs no more. */
enum { SPARSE_READ_MIN = 16 * 1024 };

/* A READ is not answered in more pieces than this. */
enum { SPARSE_READ_EXTENTS = 64 };

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
		 const char *description, void (*emptied)(void), void (*opened)(void))
{
	e->backend = backend;
	e->proto.name = name;
	e->proto.description = description;
	e->proto.size = backend->size;
	e->proto.flags = transmission_flags(backend);
	atomic_init(&e->gate.inside, 0);
	atomic_init(&e->gate.closed, false);
	e->gate.emptied = emptied;
	e->gate.opened = opened;
	e->lane.name = name;
}

/*
 * Going in and closing meet on two variables: who goes in counts itself and then looks whether
 * the gate is closed, who closes sets the flag and then looks at the count.  One of them sees
 * the other.
 */
bool gate_enter(struct gate *g)
{
	atomic_fetch_add(&g->inside, 1);
	if (!atomic_load(&g->closed))
		return true;
	gate_leave(g);
	return false;
}

void gate_hold(struct gate *g)
{
	atomic_fetch_add(&g->inside, 1);
}

void gate_leave(struct gate *g)
{
	if (atomic_fetch_sub(&g->inside, 1) == 1 && atomic_load(&g->closed))
		g->emptied();
}

bool gate_close(struct gate *g)
{
	atomic_store(&g->closed, true);
	return atomic_load(&g->inside) == 0;
}

void gate_open(struct gate *g)
{
	atomic_store(&g->closed, false);
	g->opened();
}

/* BLOCK_STATUS: "NBD_REPLY_TYPE_BLOCK_STATUS" */
static int describe(struct backend *b, struct request *r, enum how how)
{
	unsigned max = r->h.flags & NBD_CMD_FLAG_REQ_ONE ? 1 : EXTENTS_MAX;

	if (!r->extent)
		r->extent = calloc(max, sizeof(*r->extent));
	if (!r->extent)
		return -ENOMEM;
	return b->ops->extents(b, r, max, how);
}

/* The bytes that the extents of r describe. */
static uint64_t described(const struct request *r)
{
	uint64_t len = 0;

	for (unsigned i = 0; i < r->extents; i++)
		len += r->extent[i].len;
	return len;
}

static bool has_hole(const struct request *r)
{
	for (unsigned i = 0; i < r->extents; i++)
		if (r->extent[i].flags & NBD_STATE_ZERO)
			return true;
	return false;
}

/* Look for holes in a READ that goes to the disk anyway.  To find none is never an error. */
static void find_holes(struct backend *b, struct request *r)
{
	if (r->h.len < SPARSE_READ_MIN)
		return;
	r->extent = calloc(SPARSE_READ_EXTENTS, sizeof(*r->extent));
	if (!r->extent)
		return;
	if (b->ops->extents(b, r, SPARSE_READ_EXTENTS, WAIT) != 0 || !has_hole(r) ||
	    described(r) < r->h.len)
		r->extents = 0;
}

/* READ on a worker: the data between the holes. */
static int read_sparse(struct backend *b, struct request *r)
{
	struct proto_request h = r->h;
	uint8_t *buf = r->buf;
	int ret = 0;

	find_holes(b, r);
	if (r->extents == 0)
		return b->ops->read(b, r, WAIT);
	for (unsigned i = 0; i < r->extents && ret == 0; i++) {
		r->h.len = r->extent[i].len;
		if (!(r->extent[i].flags & NBD_STATE_ZERO))
			ret = b->ops->read(b, r, WAIT);
		r->h.off += r->h.len;
		r->buf += r->h.len;
	}
	r->h = h;
	r->buf = buf;
	return ret;
}

static int run(struct request *r, enum how how)
{
	struct backend *b = r->backend;

	assert(r->h.len <= b->size && r->h.off <= b->size - r->h.len);
	switch (r->h.cmd) {
	case NBD_CMD_READ:
		return how == TRY ? b->ops->read(b, r, how) : read_sparse(b, r);
	case NBD_CMD_WRITE:
		return b->ops->write(b, r, how);
	case NBD_CMD_FLUSH:
		return b->ops->flush(b, r, how);
	case NBD_CMD_TRIM:
		return b->ops->trim(b, r, how);
	case NBD_CMD_CACHE:
		return b->ops->cache(b, r, how);
	case NBD_CMD_WRITE_ZEROES:
		return b->ops->zero(b, r, how);
	default:
		assert(r->h.cmd == NBD_CMD_BLOCK_STATUS);
		return describe(b, r, how);
	}
}

/*
 * The flush that FUA asks for; the flag is taken off, so that it happens once.  It may take
 * long, and does not hold up who closes the gate.
 */
static int commit(struct request *r, enum how how)
{
	if (!(r->h.flags & NBD_CMD_FLAG_FUA) || !proto_cmd_writes(r->h.cmd))
		return 0;
	r->h.flags &= (uint16_t)~NBD_CMD_FLAG_FUA;
	if (r->inside) {
		r->inside = false;
		gate_leave(r->gate);
	}
	return r->backend->ops->flush(r->backend, r, how);
}

int request_try(struct request *r)
{
	int ret = run(r, TRY);

	return ret == 0 ? commit(r, TRY) : ret;
}

int request_commit(struct request *r)
{
	return commit(r, TRY);
}

void request_done(struct request *r, int error)
{
	if (error == 0)
		error = commit(r, WAIT);
	if (error == PENDING)
		return;
	r->error = -error;
	r->done(r);
}

/*
 * A change that waited for long, and whose client was disconnected meanwhile: it may have come back
 * and written something newer, which must stay.
 */
static bool is_late(const struct request *r)
{
	return r->abandoned && atomic_load(r->abandoned) && proto_cmd_writes(r->h.cmd);
}

static void run_job(struct job *job)
{
	struct request *r = (struct request *)((char *)job - offsetof(struct request, job));
	int ret = is_late(r) ? -ECANCELED : run(r, WAIT);

	if (ret != PENDING)
		request_done(r, ret);
}

void request_again(struct request *r)
{
	r->job.run = run_job;
	worker_submit(&r->job);
}

void request_queue(struct request *r)
{
	if (r->h.cmd != NBD_CMD_READ || r->backend->ops->fetch(r->backend, r) != PENDING)
		request_again(r);
}

int backend_fetches_nothing(struct backend *b, struct request *r)
{
	(void)b, (void)r;
	return -EAGAIN;
}
