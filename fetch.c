/*
 * fetch.c - blocks on their way from the origin into the cache image: see fetch.h.
 *
 *	fetch_wait()	blocks are not held: join the fetches that bring them, or begin some
 *	arrived()	the origin has answered
 *	fetch_store()	put the data into the image and set the bits; on a worker, if that may block
 *	fetch_settle()	tell all requests that wait for it
 *
 * Whether a block is held, and then which fetch brings it, is looked up under the lock.  A fetch is
 * taken from the table under the lock, after its bits were set.  So no request misses both.
 *
 * What a client wrote meanwhile stays: layer_fill() stores only what is not held.  A READ gets the
 * origin's bytes all the same: that is what the disk had when it came.
 *
 * A request that waits for all of its range holds no memory for data: a fetch gets its buffer when
 * the answer arrives.  Until all of it has arrived it can be taken back.
 */
#include "fetch.h"

#include "buffer.h"
#include "log.h"
#include "util.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
	FETCH_MAX = 1024 * 1024,	/* bytes that are asked for at once for clients */
	AHEAD_MAX = 8 * 1024 * 1024,	/* bytes that are fetched ahead of a reader */
	ZERO_PIECE = 64 * 1024,		/* zeros are looked for in pieces of this */
	STORE_HERE = 256 * 1024,	/* at most, by the origin's thread, if that does not block */
};

struct fetch {
	struct origin_request ask;	/* the first: arrived() relies on it */
	struct fetcher *f;
	struct job job;			/* storing it */
	struct fetch *next;		/* in its bucket */
	struct part *parts;		/* that wait for it */

	/* Of the background copy, and not in the table: */
	void (*copied)(void *copy, const struct origin_request *ask, int error);
	void *copy;
};

/* What a request wants of one fetch. */
struct part {
	struct part *next;		/* of those that wait for the same fetch */
	struct part *sibling;		/* of the same request */
	struct fetch *fetch;		/* NULL: it has arrived */
	struct miss *miss;
	uint64_t off, len;
};

/* A request that waits. */
struct miss {
	struct miss *next;		/* of those for which all has arrived */
	struct request *r;
	struct part *parts;
	unsigned left;			/* parts that have not arrived */
	int error;			/* of the first part that failed, or 0 */
	bool again;			/* carry the request out again, in any case */
};

/* Fetches that have begun; they are handed to the origin when the lock is free. */
struct batch {
	struct origin_request *first, **last;
};

void fetcher_init(struct fetcher *f, struct layer *layer, struct origin *origin)
{
	memset(f, 0, sizeof(*f));
	f->layer = layer;
	f->origin = origin;
	f->lane.name = "";
	pthread_mutex_init(&f->lock, NULL);
}

void fetcher_destroy(struct fetcher *f)
{
	pthread_mutex_destroy(&f->lock);
}

uint64_t fetch_unit(const struct fetcher *f)
{
	uint32_t min = origin_limits(f->origin)->min_block;

	return min > BLOCK_SIZE ? min : BLOCK_SIZE;
}

/* So is the result a multiple of the unit, but at the end of the disk. */
uint64_t fetch_fit(const struct fetcher *f, uint64_t len, uint64_t off, uint64_t max)
{
	uint64_t unit = fetch_unit(f), size = f->layer->size, end;
	uint64_t region_end = (off / FETCH_REGION + 1) * FETCH_REGION;

	if (max > origin_limits(f->origin)->max_block)
		max = origin_limits(f->origin)->max_block;
	max = max < unit ? unit : max - max % unit;
	end = (off + len + unit - 1) / unit * unit;
	if (end > off + max)
		end = off + max;
	if (end > region_end)
		end = region_end;
	return (end < size ? end : size) - off;
}

/* Storing */

/* Whether the piece at that place is zeros.  Most data shows at its first bytes that it is not. */
static bool is_zero_piece(const struct origin_request *ask, uint64_t at)
{
	const uint8_t *p = ask->buf + at;
	uint64_t len = ask->len - at < ZERO_PIECE ? ask->len - at : ZERO_PIECE;

	return p[0] == 0 && memcmp(p, p + 1, len - 1) == 0;
}

/* Zeros become holes, which may block. */
static int fetch_store(const struct fetch *fetch, enum how how)
{
	const struct origin_request *ask = &fetch->ask;
	uint64_t end;
	int ret = 0;

	for (uint64_t at = 0; at < ask->len && ret == 0; at = end) {
		bool zero = is_zero_piece(ask, at);

		for (end = at + ZERO_PIECE; end < ask->len && is_zero_piece(ask, end) == zero;)
			end += ZERO_PIECE;
		if (end > ask->len)
			end = ask->len;
		if (zero && how == TRY)
			return -EAGAIN;
		ret = layer_fill(fetch->f->layer, zero ? NULL : ask->buf + at, end - at,
				 ask->off + at, how);
	}
	return ret;
}

/* Once for each time that it begins to fail. */
static void log_store(struct fetcher *f, int error)
{
	if (error && !atomic_exchange(&f->cannot_store, true))
		log_error("cannot cache what is read from the origin: %s; going on without",
			 strerror(-error));
	if (!error && atomic_load(&f->cannot_store) && atomic_exchange(&f->cannot_store, false))
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
 * The fetch that brings the block at off, or NULL and then *end is lowered to where the next one
 * begins.
 */
static struct fetch *fetch_find(struct fetcher *f, uint64_t off, uint64_t *end)
{
	for (struct fetch *i = *bucket_of(f, off); i; i = i->next) {
		if (i->ask.off <= off && off < end_of(i))
			return i;
		if (i->ask.off > off && i->ask.off < *end)
			*end = i->ask.off;
	}
	return NULL;
}

static void fetch_remove(struct fetch *fetch)
{
	struct fetch **p = bucket_of(fetch->f, fetch->ask.off);

	while (*p != fetch)
		p = &(*p)->next;
	*p = fetch->next;
	if (fetch->ask.priority == ORIGIN_DEMAND)
		atomic_fetch_sub(&fetch->f->demanded, 1);
}

/* What has arrived */

static bool takes_data(const struct request *r)
{
	return r->h.cmd == NBD_CMD_READ && r->h.len <= READ_PIECE;
}

/* Whether what arrives is its answer; else it is carried out again. */
static bool is_answered(const struct request *r)
{
	return takes_data(r) || r->h.cmd == NBD_CMD_BLOCK_STATUS;
}

/* Memory for the answer to a READ; or NULL. */
static uint8_t *answer_of(struct request *r)
{
	if (!r->buf) {
		r->buf = buffer_get(r->h.len);
		r->buf_len = r->buf ? r->h.len : 0;
	}
	return r->buf;
}

/* Put what has arrived into the answer, which the fetch's buffer becomes if that is all and its last use. */
static int put_data(struct fetch *fetch, const struct part *p)
{
	struct request *r = p->miss->r;
	struct origin_request *ask = &fetch->ask;

	if (!fetch->parts && p->len == ask->len && p->len == r->h.len && !r->buf) {
		r->buf = ask->buf;
		r->buf_len = ask->len;
		ask->buf = NULL;
		return 0;
	}
	if (!answer_of(r))
		return -ENOMEM;
	memcpy(r->buf + (p->off - r->h.off), ask->buf + (p->off - ask->off), p->len);
	return 0;
}

/* Whether a fetch of what the part needs, and no more, would be smaller. */
static bool is_wider(const struct fetch *fetch, const struct part *p)
{
	uint64_t unit = fetch_unit(fetch->f);

	return p->off / unit * unit > fetch->ask.off || p->off + p->len + unit <= end_of(fetch);
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

/* The part has arrived, or failed with error.  Called with the lock. */
static void part_end(struct fetch *fetch, const struct part *p, int error)
{
	struct miss *m = p->miss;

	if (fetch->ask.extent)
		error = put_extents(&fetch->ask, m->r);
	else if (!fetch->ask.error && takes_data(m->r))
		error = put_data(fetch, p);
	else if (!fetch->ask.error && m->r->h.cmd == NBD_CMD_READ)
		error = 0;	/* in pieces, it asks again for what could not be stored */
	if (error && ((fetch->ask.error == -EIO && is_wider(fetch, p)) ||
		      layer_holds(fetch->f->layer, p->len, p->off)))
		m->again = true;
	else if (error && !m->error)
		m->error = error;
}

/* Tell all parts that wait; returns the requests that wait for nothing any more. */
static struct miss *tell_parts(struct fetch *fetch, int error)
{
	struct miss *complete = NULL;
	struct part *p;

	pthread_mutex_lock(&fetch->f->lock);
	if (!fetch->ask.extent)
		fetch_remove(fetch);
	while ((p = fetch->parts)) {
		struct miss *m = p->miss;

		fetch->parts = p->next;
		p->fetch = NULL;
		part_end(fetch, p, error);
		if (--m->left > 0)
			continue;
		m->r->miss = NULL;
		m->next = complete;
		complete = m;
	}
	pthread_mutex_unlock(&fetch->f->lock);
	return complete;
}

static void miss_free(struct miss *m)
{
	struct part *p;

	while ((p = m->parts)) {
		m->parts = p->sibling;
		free(p);
	}
	free(m);
}

static void send_back(struct miss *m)
{
	struct miss *next;

	for (; m; m = next) {
		struct request *r = m->r;
		int error = m->error;
		bool again = !error && (m->again || !is_answered(r));

		next = m->next;
		miss_free(m);
		if (again)
			request_again(r);
		else
			request_done(r, error);
	}
}

/* The data is stored, or cannot be had or stored. */
static void fetch_settle(struct fetch *fetch, int error)
{
	struct miss *complete = NULL;

	if (!fetch->ask.error && !fetch->ask.extent) {
		log_store(fetch->f, error);
		origin_stored(fetch->f->origin, fetch->ask.len);
	}
	if (fetch->copied)
		fetch->copied(fetch->copy, &fetch->ask, error);
	else
		complete = tell_parts(fetch, error);
	buffer_put(fetch->ask.buf, fetch->ask.len);
	free(fetch->ask.extent);
	free(fetch);
	send_back(complete);
}

static void store_job(struct job *job)
{
	struct fetch *fetch = (struct fetch *)((char *)job - offsetof(struct fetch, job));

	fetch_settle(fetch, fetch_store(fetch, WAIT));
}

/*
 * Whether the origin's thread is to store it, in whose processor's cache it is.  What a client
 * waits for would come later by the time that the background copy's data takes.
 */
static bool is_stored_here(const struct fetch *fetch)
{
	const struct origin_request *ask = &fetch->ask;

	return ask->len <= STORE_HERE &&
	       (ask->priority != ORIGIN_COPY || atomic_load(&fetch->f->demanded) == 0);
}

/* The origin's thread. */
static void arrived(struct origin_request *ask)
{
	struct fetch *fetch = (struct fetch *)ask;
	int error = ask->error;

	if (!error && !ask->extent)
		error = is_stored_here(fetch) ? fetch_store(fetch, TRY) : -EAGAIN;
	if (error != -EAGAIN)
		fetch_settle(fetch, error);
	else
		worker_submit(&fetch->job);
}

/* Beginning */

static struct fetch *fetch_new(struct fetcher *f, uint64_t len, uint64_t off,
			       enum origin_priority priority)
{
	struct fetch *fetch = calloc(1, sizeof(*fetch));

	if (!fetch)
		return NULL;
	fetch->f = f;
	fetch->job.run = store_job;
	fetch->job.lane = &f->lane;
	fetch->ask.done = arrived;
	fetch->ask.priority = priority;
	fetch->ask.off = off;
	fetch->ask.len = len;
	return fetch;
}

int fetch_copy(struct fetcher *f, uint64_t len, uint64_t off,
	       void (*done)(void *arg, const struct origin_request *ask, int error), void *arg)
{
	struct fetch *fetch = fetch_new(f, len, off, ORIGIN_COPY);

	if (!fetch)
		return -ENOMEM;
	fetch->copied = done;
	fetch->copy = arg;
	origin_submit(f->origin, &fetch->ask);
	return 0;
}

static void batch_add(struct batch *batch, struct fetch *fetch)
{
	*batch->last = &fetch->ask;
	batch->last = &fetch->ask.next;
}

/* Begin with a run that is not held nor on its way.  NULL if out of memory.  Called with the lock. */
static struct fetch *fetch_begin(struct fetcher *f, struct batch *batch, uint64_t off, uint64_t end,
				 enum origin_priority priority)
{
	uint64_t start = off - off % fetch_unit(f);
	struct fetch **bucket = bucket_of(f, off), *fetch;

	fetch = fetch_new(f, fetch_fit(f, end - start, start, FETCH_MAX), start, priority);
	if (!fetch)
		return NULL;
	fetch->next = *bucket;
	*bucket = fetch;
	if (priority == ORIGIN_DEMAND)
		atomic_fetch_add(&f->demanded, 1);
	batch_add(batch, fetch);
	return fetch;
}

static void submit_batch(struct fetcher *f, const struct batch *batch)
{
	struct origin_request *next;

	for (struct origin_request *ask = batch->first; ask; ask = next) {
		next = ask->next;
		origin_submit(f->origin, ask);
	}
}

/*
 * Read-ahead.  A read that misses is a sequential one if what lies before it is held, or on its way.
 * As much as that is, from twice the read's length on, is fetched ahead of it; again when half of that
 * is left.  Reads that find their blocks held do not come here.
 */

/*
 * The first place in a range that is neither held nor on its way, and *to is where the run of such
 * places ends; or the end of the range.  Called with the lock.
 */
static uint64_t find_gap(struct fetcher *f, uint64_t off, uint64_t end, uint64_t *to)
{
	while (off < end) {
		bool held;
		struct fetch *fetch;

		*to = off + layer_run(f->layer, end - off, off, &held);
		fetch = held ? NULL : fetch_find(f, off, to);
		if (!held && !fetch)
			return off;
		off = held ? *to : end_of(fetch);
	}
	return end;
}

/* How many bytes to be ahead of a reader; 0 if it is none.  Called with the lock. */
static uint64_t window_of(struct fetcher *f, uint64_t len, uint64_t off)
{
	uint64_t window = 0, to;

	for (uint64_t n = 2 * len; n <= off && n <= AHEAD_MAX; n *= 2) {
		if (find_gap(f, off - n, off, &to) < off)
			break;
		window = n;
	}
	return window;
}

static void begin_ahead(struct fetcher *f, uint64_t len, uint64_t off, struct batch *batch)
{
	uint64_t from = off + len, end = f->layer->size, window = window_of(f, len, off), to;

	if (end - from > window)
		end = from + window;
	off = find_gap(f, from, end, &to);
	if (off - from >= window / 2)
		return;
	while (off < end) {
		const struct fetch *fetch = fetch_begin(f, batch, off, to, ORIGIN_AHEAD);

		off = fetch ? find_gap(f, end_of(fetch), end, &to) : end;
	}
}

/* Waiting */

/* Put what is held into the answer to a READ, and count it. */
static int read_held(struct fetcher *f, struct request *r, enum how how, uint64_t *bytes)
{
	uint64_t n;
	int ret = 0;

	for (uint64_t at = 0; at < r->h.len && ret == 0; at += n) {
		bool held;

		n = layer_run(f->layer, r->h.len - at, r->h.off + at, &held);
		if (!held)
			continue;
		*bytes += n;
		ret = answer_of(r) ? disk_read(f->layer->disk, r->buf + at, n, r->h.off + at, how) :
				     -ENOMEM;
	}
	return ret;
}

/* Wait for what a fetch brings up to end.  Returns where that ends, 0 if out of memory. */
static uint64_t miss_join(struct miss *m, struct fetch *fetch, uint64_t off, uint64_t end)
{
	struct part *p = calloc(1, sizeof(*p));

	if (!p)
		return 0;
	if (end > end_of(fetch))
		end = end_of(fetch);
	*p = (struct part){ fetch->parts, m->parts, fetch, m, off, end - off };
	fetch->parts = m->parts = p;
	m->left++;
	return end;
}

/*
 * Let it wait for what is not held of a span, and count what is held.  0 or -ENOMEM.  Called with the
 * lock.
 */
static int miss_add(struct fetcher *f, struct miss *m, const struct span *s, struct batch *batch,
		    uint64_t *bytes)
{
	uint64_t end = s->off + s->len, to;

	for (uint64_t off = s->off; off < end; off = to) {
		bool held;
		struct fetch *fetch;
		uint64_t gap_end;

		to = gap_end = off + layer_run(f->layer, end - off, off, &held);
		if (held) {
			*bytes += to - off;
			continue;
		}
		fetch = fetch_find(f, off, &gap_end);
		if (!fetch)
			fetch = fetch_begin(f, batch, off, gap_end, ORIGIN_DEMAND);
		to = fetch ? miss_join(m, fetch, off, to) : 0;
		if (to == 0)
			return -ENOMEM;
	}
	return 0;
}

/* Take its parts out of what they wait for.  Called with the lock. */
static void miss_detach(struct miss *m)
{
	for (struct part *p = m->parts; p; p = p->sibling) {
		struct part **at;

		if (!p->fetch)
			continue;
		for (at = &p->fetch->parts; *at != p; at = &(*at)->next)
			;
		*at = p->next;
	}
}

/* Let a BLOCK_STATUS wait for the origin's answer.  Called with the lock. */
static int ask_extents(struct fetcher *f, struct miss *m, const struct span *s, struct batch *batch)
{
	struct fetch *fetch = fetch_new(f, s->len, s->off, ORIGIN_DEMAND);

	if (!fetch)
		return -ENOMEM;
	fetch->ask.extent = m->r->extent;	/* it comes back with the answer */
	fetch->ask.extents = m->r->extents;
	m->r->extent = NULL;
	batch_add(batch, fetch);
	return miss_join(m, fetch, s->off, s->off + s->len) ? 0 : -ENOMEM;
}

int fetch_wait(struct fetcher *f, struct request *r, const struct span *span, unsigned n,
	       enum how how)
{
	struct batch batch = { NULL, &batch.first };
	uint64_t read = 0, held = 0;
	int ret = takes_data(r) ? read_held(f, r, how, &read) : 0;
	struct miss *m = ret == 0 ? calloc(1, sizeof(*m)) : NULL;

	if (!m)
		return ret ? ret : -ENOMEM;
	m->r = r;
	pthread_mutex_lock(&f->lock);
	for (unsigned i = 0; i < n && ret == 0; i++)
		ret = r->h.cmd == NBD_CMD_BLOCK_STATUS ?
			      ask_extents(f, m, &span[i], &batch) :
			      miss_add(f, m, &span[i], &batch, &held);
	if (ret == 0 && r->h.cmd == NBD_CMD_READ)
		begin_ahead(f, r->h.len, r->h.off, &batch);
	if (ret == 0 && request_is_abandoned(r))
		ret = -ECANCELED;
	/* What was not held when that was read, and is now, has to be read as well: once more. */
	if (ret == 0 && m->left > 0 && !atomic_load(&r->change.is_empty) &&
	    (held == read || !takes_data(r)))
		ret = PENDING;
	if (ret == PENDING)
		r->miss = m;
	else
		miss_detach(m);
	pthread_mutex_unlock(&f->lock);
	submit_batch(f, &batch);
	if (ret != PENDING)
		miss_free(m);
	return ret;
}

bool fetch_take_back(struct fetcher *f, struct request *r)
{
	struct miss *m;

	pthread_mutex_lock(&f->lock);
	m = r->miss;
	r->miss = NULL;
	if (m)
		miss_detach(m);
	pthread_mutex_unlock(&f->lock);
	if (m)
		miss_free(m);
	return m != NULL;
}
