/*
 * fetch.c - blocks on their way from the origin into the cache image: see fetch.h.
 *
 *	fetch_wait()	blocks are not held: join the fetch that brings the first, and begin others
 *	arrived()	the origin has answered
 *	fetch_store()	put the data into the image and set the bits, on a worker if that may block
 *	fetch_settle()	tell all requests that wait for it
 *
 * A request waits for one fetch at a time: then it is answered, or goes on, and waits for the next.
 * Whether a block is held, and then which fetch brings it, is looked up under the lock.  A fetch is
 * taken from the table under the lock, after its bits were set.  So no request misses both.
 *
 * What a client wrote meanwhile stays: layer_fill() stores only what is not held.  A READ gets the
 * origin's bytes all the same: that is what the disk had when it came.
 *
 * A request that waits for its first block holds no memory for data: a fetch gets its buffer when
 * the answer arrives.  Until that has been stored the request can be taken back.
 */
#include "fetch.h"

#include "buffer.h"
#include "log.h"
#include "util.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
	FETCH_MAX = 1024 * 1024,	/* bytes of a fetch for clients */
	WANTED_MAX = 4 * 1024 * 1024,	/* bytes that are asked for at once for one request */
	AHEAD_MAX = 8 * 1024 * 1024,	/* bytes that are fetched ahead of a reader */
	ZERO_PIECE = 64 * 1024,		/* zeros are looked for in pieces of this */
	STORE_HERE = 256 * 1024,	/* by the origin's thread at most, if that does not block */
	STORED_MS = 1000,		/* without a failure: what is fetched can be stored again */
};

struct fetch {
	struct origin_request ask;	/* the first: arrived() relies on it */
	struct fetcher *f;
	struct job job;			/* storing it */
	struct fetch *next;		/* in its bucket */
	struct request *waiting;	/* for it */
};

void fetcher_init(struct fetcher *f, struct layer *layer, struct origin *origin)
{
	f->layer = layer;
	f->origin = origin;
	f->lane.single = true;	/* more would take the processor from those who bring the data */
	pthread_mutex_init(&f->lock, NULL);
}

/* What the origin's requests begin and end at: a multiple of its smallest block and of ours. */
static uint64_t fetch_unit(const struct fetcher *f)
{
	uint32_t min = origin_limits(f->origin)->min_block;

	return min > BLOCK_SIZE ? min : BLOCK_SIZE;
}

/* Storing */

/* Whether it is the background copy's, and a client waits: for the image's lock, too. */
static bool gives_way(const struct fetch *fetch)
{
	return fetch->ask.priority == ORIGIN_COPY && atomic_load(&fetch->f->demanded) > 0;
}

static bool is_zero(const uint8_t *p, uint64_t len)
{
	return p[0] == 0 && memcmp(p, p + 1, len - 1) == 0;
}

/* Bytes at p, of len, that are all zero, or all data, by pieces: one write makes large folios. */
static uint64_t run_alike(const uint8_t *p, uint64_t len, bool *zero)
{
	uint64_t pos = len < ZERO_PIECE ? len : ZERO_PIECE, n;

	*zero = is_zero(p, pos);
	for (; pos < len; pos += n) {
		n = len - pos < ZERO_PIECE ? len - pos : ZERO_PIECE;
		if (is_zero(p + pos, n) != *zero)
			break;
	}
	return pos;
}

/*
 * Zeros become holes, which may block.  Most data shows at its first bytes that it is none.  A second
 * try finds what the first one has stored.
 */
static int fetch_store(const struct fetch *fetch, enum how how)
{
	const struct origin_request *ask = &fetch->ask;
	int ret = 0;

	for (uint64_t at = 0, len; at < ask->len && ret == 0; at += len) {
		const uint8_t *p = ask->buf + at;
		bool zero;

		len = ask->len - at;
		if (len > ZERO_PIECE && gives_way(fetch))
			len = ZERO_PIECE;
		len = run_alike(p, len, &zero);
		if (zero && how == TRY)
			return -EAGAIN;
		ret = layer_fill(fetch->f->layer, zero ? NULL : p, len, ask->off + at, how);
	}
	return ret;
}

/*
 * Once for each time that it begins to fail.  Zeros may find room where data does not, so it is over
 * when nothing has failed for a while.
 */
static void log_store(struct fetcher *f, int error)
{
	uint64_t failed = atomic_load(&f->failed);

	if (error && atomic_exchange(&f->failed, now_ms()) == 0)
		log_error("cannot cache what is read from the origin: %s; going on without",
			 strerror(-error));
	else if (!error && failed && now_ms() - failed >= STORED_MS &&
		 atomic_compare_exchange_strong(&f->failed, &failed, 0))
		log_line("what is read from the origin is cached again");
}

/* The table.  Its functions are called with the lock. */

static struct fetch **bucket_of(struct fetcher *f, uint64_t off)
{
	return &f->bucket[off / FETCH_REGION % FETCH_BUCKETS];
}

static uint64_t end_of(const struct fetch *fetch)
{
	return fetch->ask.off + fetch->ask.len;
}

/*
 * The fetch that brings the block at off, or NULL.  *len is lowered to what is alike: held, or
 * brought by that fetch, or neither.
 */
static struct fetch *fetch_find(struct fetcher *f, uint64_t *len, uint64_t off, bool *held)
{
	*len = layer_run(f->layer, *len, off, held);
	for (struct fetch *i = *held ? NULL : *bucket_of(f, off); i; i = i->next) {
		bool brings = i->ask.off <= off && off < end_of(i);
		uint64_t next = brings ? end_of(i) : i->ask.off;

		if (next > off && next - off < *len)
			*len = next - off;
		if (brings)
			return i;
	}
	return NULL;
}

/* It may not be there: what the copy asks for is not. */
static void fetch_remove(struct fetch *fetch)
{
	struct fetch **p = bucket_of(fetch->f, fetch->ask.off);

	while (*p && *p != fetch)
		p = &(*p)->next;
	if (*p)
		*p = fetch->next;
}

/* What has arrived */

/* Whether the origin's data is the answer. */
static bool takes_data(const struct request *r)
{
	return r->h.cmd == NBD_CMD_READ && r->h.len <= READ_PIECE;
}

/* So much of what is left has been brought. */
static void pass(struct request *r, uint64_t len)
{
	r->at = (struct span){ r->at.off + len, r->at.len - len };
}

/* Put what has arrived into the answer. */
static int put_data(const struct fetch *fetch, struct request *r)
{
	const uint8_t *from = fetch->ask.buf + (r->at.off - fetch->ask.off);

	if (!request_buffer(r))
		return -ENOMEM;
	memcpy(r->buf + (r->at.off - r->h.off), from, r->lacks);
	return 0;
}

/* Where the origin does not tell, all is data. */
static int put_extents(struct origin_request *ask, struct request *r)
{
	r->extent = ask->extent;
	r->extents = ask->extents;
	ask->extent = NULL;
	if (ask->error) {
		r->extent[0] = (struct extent){ ask->len, 0 };
		r->extents = 1;
	}
	return ask->error == -ECANCELED ? -ECANCELED : 0;
}

/*
 * Whether a request may be carried out though its fetch failed: its blocks have come by another way,
 * or a fetch of what it needs, and no more, would be smaller.
 */
static bool may_try_again(const struct fetch *fetch, uint64_t len, uint64_t off)
{
	uint64_t unit = fetch_unit(fetch->f);
	bool wider = off / unit * unit > fetch->ask.off || off + len + unit <= end_of(fetch);

	return (fetch->ask.error == -EIO && wider) || layer_holds(fetch->f->layer, len, off);
}

/* What a request waited for has arrived, or failed with error.  It is not in the table any more. */
static void deliver(struct fetch *fetch, struct request *r, int error)
{
	struct span part = { r->at.off, r->lacks };

	/* It can be answered from the image when there is memory for it again. */
	if (!error && takes_data(r) && !r->buf && atomic_load(&load.bytes) >= load.bytes_max) {
		request_again(r);
		return;
	}
	if (r->h.cmd == NBD_CMD_BLOCK_STATUS)
		error = put_extents(&fetch->ask, r);
	else if (r->h.cmd == NBD_CMD_READ && !fetch->ask.error)	/* it may not have been stored */
		error = takes_data(r) ? put_data(fetch, r) : 0;
	if (r->h.cmd == NBD_CMD_READ && !error)
		pass(r, part.len);
	if (!error && (r->h.cmd == NBD_CMD_BLOCK_STATUS || (takes_data(r) && r->at.len == 0)))
		request_done(r, 0);
	else if (!error || may_try_again(fetch, part.len, part.off))
		request_again(r);
	else
		request_done(r, error);
}

/* The data is stored, or cannot be had or stored. */
static void fetch_settle(struct fetch *fetch, int error)
{
	struct fetcher *f = fetch->f;
	struct request *next;

	if (!fetch->ask.error && !fetch->ask.extent) {
		log_store(f, error);
		origin_stored(f->origin, fetch->ask.len);
	}
	pthread_mutex_lock(&f->lock);
	fetch_remove(fetch);
	for (struct request *r = fetch->waiting; r; r = r->fellow)
		r->fetch = NULL;	/* it cannot be taken back any more */
	pthread_mutex_unlock(&f->lock);
	if (fetch->ask.priority == ORIGIN_DEMAND)
		atomic_fetch_sub(&f->demanded, 1);
	if (fetch->ask.priority == ORIGIN_COPY)
		f->copied(f->copy, &fetch->ask, error);
	for (struct request *r = fetch->waiting; r; r = next) {
		next = r->fellow;
		deliver(fetch, r, error);
	}
	buffer_put(fetch->ask.buf, fetch->ask.len);
	free(fetch->ask.extent);
	free(fetch);
}

static void store_job(struct job *job)
{
	struct fetch *fetch = (struct fetch *)((char *)job - offsetof(struct fetch, job));

	fetch_settle(fetch, fetch_store(fetch, WAIT));
}

/*
 * The origin's thread, in whose processor's cache the data is: it stores a little.  What a client
 * waits for would come later by the time that the background copy's data takes.
 */
static void arrived(struct origin_request *ask)
{
	struct fetch *fetch = (struct fetch *)ask;
	int error = ask->error;

	if (!error && !ask->extent)
		error = gives_way(fetch) || ask->len > STORE_HERE ? -EAGAIN : fetch_store(fetch, TRY);
	if (error != -EAGAIN)
		fetch_settle(fetch, error);
	else
		worker_submit(&fetch->job, &fetch->f->lane);
}

/* Beginning */

/* Bytes of the longest request for a run at off, a multiple of the unit. */
static uint64_t fetch_fit(const struct fetcher *f, uint64_t off, uint64_t end, uint64_t max)
{
	uint64_t unit = fetch_unit(f), size = f->layer->size;
	uint64_t region_end = (off / FETCH_REGION + 1) * FETCH_REGION;

	if (max > origin_limits(f->origin)->max_block)
		max = origin_limits(f->origin)->max_block;
	max = max < unit ? unit : max - max % unit;
	end = (end + unit - 1) / unit * unit;
	if (end > off + max)
		end = off + max;
	if (end > region_end)
		end = region_end;
	return (end < size ? end : size) - off;
}

/* For whole units, of which the first has off; origin_submit() is due.  NULL if out of memory. */
static struct fetch *fetch_new(struct fetcher *f, uint64_t len, uint64_t off, uint64_t max,
			       enum origin_priority priority)
{
	struct fetch *fetch = calloc(1, sizeof(*fetch));

	if (!fetch)
		return NULL;
	fetch->f = f;
	fetch->job.run = store_job;
	fetch->ask.done = arrived;
	fetch->ask.priority = priority;
	fetch->ask.off = off - off % fetch_unit(f);
	fetch->ask.len = fetch_fit(f, fetch->ask.off, off + len, max);
	if (priority == ORIGIN_DEMAND)
		atomic_fetch_add(&f->demanded, 1);
	return fetch;
}

uint64_t fetch_copy(struct fetcher *f, uint64_t len, uint64_t off, uint64_t max)
{
	struct fetch *fetch = fetch_new(f, len, off, max, ORIGIN_COPY);

	if (!fetch)
		return 0;
	len = end_of(fetch) - off;
	origin_submit(f->origin, &fetch->ask);
	return len;
}

/* Begin with the beginning of a run that is neither held nor on its way.  Called with the lock. */
static struct fetch *fetch_add(struct fetcher *f, uint64_t *len, uint64_t off,
			       enum origin_priority priority)
{
	struct fetch *fetch = fetch_new(f, *len, off, FETCH_MAX, priority);

	if (!fetch)
		return NULL;
	fetch->next = *bucket_of(f, off);
	*bucket_of(f, off) = fetch;
	if (end_of(fetch) - off < *len)
		*len = end_of(fetch) - off;
	return fetch;
}

/* Let a request wait for len bytes of a fetch, those where it goes on.  Called with the lock. */
static int fetch_join(struct fetch *fetch, struct request *r, uint64_t len)
{
	if (request_is_abandoned(r))
		return -ECANCELED;
	if (atomic_load(&r->change.is_empty))
		return 0;
	r->lacks = len;
	r->fetch = fetch;
	r->fellow = fetch->waiting;
	fetch->waiting = r;
	return PENDING;
}

/*
 * Fetch the beginning of a range, of which *len is lowered to what is held, or on its way then.  A
 * request, if there is one, goes on there.  0 if it is held; PENDING; or -errno.
 */
static int bring(struct fetcher *f, struct request *r, uint64_t *len, uint64_t off,
		 enum origin_priority priority)
{
	struct fetch *fetch, *begun = NULL;
	bool held;
	int ret = 0;

	pthread_mutex_lock(&f->lock);
	fetch = fetch_find(f, len, off, &held);
	if (!held && !fetch)
		fetch = begun = fetch_add(f, len, off, priority);
	if (!held && !fetch)
		ret = -ENOMEM;
	else if (!held)
		ret = r ? fetch_join(fetch, r, *len) : PENDING;
	pthread_mutex_unlock(&f->lock);
	if (begun)	/* without the lock: it may have settled when this returns */
		origin_submit(f->origin, &begun->ask);
	return ret;
}

/* Begin to fetch what is neither held nor on its way of a range that a client will want. */
static void fetch_begin(struct fetcher *f, uint64_t len, uint64_t off,
			enum origin_priority priority)
{
	uint64_t end = off + len;

	for (; off < end; off += len) {
		len = end - off;
		if (bring(f, NULL, &len, off, priority) < 0)
			break;
	}
}

/* Reading ahead */

/* Whether all of a range is held or on its way. */
static bool is_here_soon(struct fetcher *f, uint64_t len, uint64_t off)
{
	uint64_t end = off + len;
	bool soon = true;

	pthread_mutex_lock(&f->lock);
	for (; soon && off < end; off += len) {
		bool held;

		len = end - off;
		soon = fetch_find(f, &len, off, &held) || held;
	}
	pthread_mutex_unlock(&f->lock);
	return soon;
}

/*
 * A READ that misses belongs to a sequential reader if what lies before it is held, or on its way.
 * As much as that is, from twice its length on, is fetched ahead of it; and again when half of that
 * is left.  READs that find their blocks held do not come here.
 */
static void fetch_ahead(struct fetcher *f, uint64_t len, uint64_t off)
{
	uint64_t ahead = 0, next = off + len;

	for (uint64_t n = 2 * len; n <= off && n <= AHEAD_MAX && is_here_soon(f, n, off - n); n *= 2)
		ahead = n;
	if (ahead > f->layer->size - next)
		ahead = f->layer->size - next;
	if (!is_here_soon(f, ahead / 2, next))
		fetch_begin(f, ahead, next, ORIGIN_AHEAD);
}

/* Waiting */

/* Go on behind what is held; of a READ that is to be answered it is read. */
static int pass_held(struct fetcher *f, struct request *r, enum how how)
{
	int ret = 0;

	while (r->at.len > 0 && ret == 0) {
		bool held;
		uint64_t n = layer_run(f->layer, r->at.len, r->at.off, &held);

		if (!held)
			break;
		if (takes_data(r) && !request_buffer(r))
			return -ENOMEM;
		if (takes_data(r))
			ret = disk_read(f->layer->disk, r->buf + (r->at.off - r->h.off), n,
					r->at.off, how);
		if (ret == 0)
			pass(r, n);
	}
	return ret;
}

/* Of a READ, a CACHE or an edge.  When it is PENDING the request may be done already. */
static int wait_for_data(struct fetcher *f, struct request *r, enum how how)
{
	const struct proto_request h = r->h;
	uint64_t off, len, n;
	int ret;

	ret = pass_held(f, r, how);
	if (ret == 0 && r->at.len == 0 && takes_data(r)) {
		request_done(r, 0);
		return PENDING;
	}
	if (ret || r->at.len == 0)
		return ret;
	off = r->at.off;
	n = len = r->at.len < WANTED_MAX ? r->at.len : WANTED_MAX;
	ret = bring(f, r, &n, off, ORIGIN_DEMAND);
	if (ret == PENDING) {
		fetch_begin(f, len - n, off + n, ORIGIN_DEMAND);
		if (h.cmd == NBD_CMD_READ)
			fetch_ahead(f, h.len, h.off);
	}
	return ret;
}

/* Both edges of a change are asked for at once; it waits for one after the other. */
static int wait_for_edge(struct fetcher *f, struct request *r, enum how how)
{
	uint64_t end = r->at.off + r->at.len;
	struct span edge = layer_lacks(f->layer, r->at.len, r->at.off);

	if (edge.len == 0)
		return 0;
	if (end % BLOCK_SIZE != 0 && end != f->layer->size)
		fetch_begin(f, 1, end - 1, ORIGIN_DEMAND);
	r->at = edge;
	return wait_for_data(f, r, how);
}

/* Ask the origin about r->at, which begins and ends where its smallest blocks do. */
static int ask_extents(struct fetcher *f, struct request *r)
{
	struct fetch *fetch = fetch_new(f, 0, r->at.off, 0, ORIGIN_DEMAND);
	int ret;

	if (!fetch)
		return -ENOMEM;
	fetch->ask.off = r->at.off;
	fetch->ask.len = r->at.len;
	fetch->ask.extent = r->extent;	/* it comes back with the answer */
	fetch->ask.extents = r->h.flags & NBD_CMD_FLAG_REQ_ONE ? 1 : EXTENTS_MAX;
	r->extent = NULL;
	pthread_mutex_lock(&f->lock);
	ret = fetch_join(fetch, r, r->at.len);
	pthread_mutex_unlock(&f->lock);
	origin_submit(f->origin, &fetch->ask);
	return ret;
}

/* What is in a part of one of the origin's blocks is data. */
static int wait_for_extents(struct fetcher *f, struct request *r)
{
	uint64_t unit = origin_limits(f->origin)->min_block;
	struct span *s = &r->at;
	bool held;

	if (s->len > PROTO_STATUS_MAX / 2)
		s->len = PROTO_STATUS_MAX / 2;
	s->len = layer_run(f->layer, s->len, s->off, &held);
	if (held)
		return 0;
	if (s->off % unit == 0 && (s->len % unit == 0 || s->off + s->len == f->layer->size))
		return ask_extents(f, r);
	r->extent[0] = (struct extent){ s->len, 0 };
	r->extents = 1;
	request_done(r, 0);
	return PENDING;
}

int fetch_wait(struct fetcher *f, struct request *r, enum how how)
{
	if (r->h.cmd == NBD_CMD_BLOCK_STATUS)
		return wait_for_extents(f, r);
	return proto_cmd_writes(r->h.cmd) ? wait_for_edge(f, r, how) : wait_for_data(f, r, how);
}

bool fetch_take_back(struct fetcher *f, struct request *r)
{
	struct request **p;
	bool waits;

	pthread_mutex_lock(&f->lock);
	waits = r->fetch != NULL;
	if (waits) {
		for (p = &r->fetch->waiting; *p != r; p = &(*p)->fellow)
			;
		*p = r->fellow;
		r->fetch = NULL;
	}
	pthread_mutex_unlock(&f->lock);
	return waits;
}
