/*
 * fetch.c - blocks on their way from the origin into the cache image: see fetch.h.
 *
 *	fetch_wait()	blocks are not held: join the fetches that bring them, or begin some
 *	arrived()	the origin has answered
 *	fetch_store()	put the data into the image and set the bits, on a worker if that may block
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
	STORE_HERE = 256 * 1024,	/* by the origin's thread at most, if that does not block */
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
	struct request *r;
	struct part *parts;
	unsigned left;			/* parts that have not arrived */
	int error;			/* of the first part that failed, or 0 */
	bool again;			/* carry it out again: what arrives is not its answer */
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

/* Memory for the answer to a READ; or NULL. */
static uint8_t *answer_of(struct request *r)
{
	if (!r->buf) {
		r->buf = buffer_get(r->h.len);
		r->buf_len = r->buf ? r->h.len : 0;
	}
	return r->buf;
}

/* Put what has arrived into the answer. */
static int put_data(const struct fetch *fetch, const struct part *p)
{
	struct request *r = p->miss->r;
	const uint8_t *from = fetch->ask.buf + (p->off - fetch->ask.off);

	if (!answer_of(r))
		return -ENOMEM;
	memcpy(r->buf + (p->off - r->h.off), from, p->len);
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

static void miss_free(struct miss *m)
{
	struct part *p;

	while ((p = m->parts)) {
		m->parts = p->sibling;
		free(p);
	}
	free(m);
}

/* All has arrived, or failed. */
static void send_back(struct miss *m)
{
	struct request *r = m->r;
	int error = m->error;
	bool again = m->again;

	miss_free(m);
	if (again && !error)
		request_again(r);
	else
		request_done(r, error);
}

/* Tell all parts that wait.  New ones do not come: it is in the table no more. */
static void tell_parts(struct fetch *fetch, int error)
{
	pthread_mutex_t *lock = &fetch->f->lock;
	struct part *p;

	pthread_mutex_lock(lock);
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
		pthread_mutex_unlock(lock);
		send_back(m);
		pthread_mutex_lock(lock);
	}
	pthread_mutex_unlock(lock);
}

/* The data is stored, or cannot be had or stored. */
static void fetch_settle(struct fetch *fetch, int error)
{
	if (!fetch->ask.error && !fetch->ask.extent) {
		log_store(fetch->f, error);
		origin_stored(fetch->f->origin, fetch->ask.len);
	}
	if (fetch->copied)
		fetch->copied(fetch->copy, &fetch->ask, error);
	else
		tell_parts(fetch, error);
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
		worker_submit(&fetch->job, &fetch->f->lane);
}

/* Beginning */

static void submit_batch(struct fetcher *f, const struct batch *batch)
{
	struct origin_request *next;

	for (struct origin_request *ask = batch->first; ask; ask = next) {
		next = ask->next;
		origin_submit(f->origin, ask);
	}
}

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

/* Ask for whole units, of which the first has off.  NULL if out of memory. */
static struct fetch *fetch_new(struct fetcher *f, struct batch *batch, uint64_t off, uint64_t end,
			       uint64_t max, enum origin_priority priority)
{
	struct fetch *fetch = calloc(1, sizeof(*fetch));

	if (!fetch)
		return NULL;
	fetch->f = f;
	fetch->job.run = store_job;
	fetch->ask.done = arrived;
	fetch->ask.priority = priority;
	fetch->ask.off = off - off % fetch_unit(f);
	fetch->ask.len = fetch_fit(f, fetch->ask.off, end, max);
	*batch->last = &fetch->ask;
	batch->last = &fetch->ask.next;
	return fetch;
}

uint64_t fetch_copy(struct fetcher *f, uint64_t off, uint64_t end, uint64_t max,
		    void (*done)(void *arg, const struct origin_request *ask, int error),
		    void *arg)
{
	struct batch batch = { NULL, &batch.first };
	struct fetch *fetch = fetch_new(f, &batch, off, end, max, ORIGIN_COPY);

	if (!fetch)
		return 0;
	fetch->copied = done;
	fetch->copy = arg;
	end = end_of(fetch);
	submit_batch(f, &batch);
	return end;
}

/* Begin with a run that is neither held nor on its way; or NULL.  Called with the lock. */
static struct fetch *fetch_begin(struct fetcher *f, struct batch *batch, uint64_t off, uint64_t end,
				 enum origin_priority priority)
{
	struct fetch **bucket = bucket_of(f, off);
	struct fetch *fetch = fetch_new(f, batch, off, end, FETCH_MAX, priority);

	if (!fetch)
		return NULL;
	fetch->next = *bucket;
	*bucket = fetch;
	if (priority == ORIGIN_DEMAND)
		atomic_fetch_add(&f->demanded, 1);
	return fetch;
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

/* Wait for what a fetch brings up to end.  False if out of memory. */
static bool miss_join(struct miss *m, struct fetch *fetch, uint64_t off, uint64_t end)
{
	struct part *p = calloc(1, sizeof(*p));

	if (!p)
		return false;
	if (end > end_of(fetch))
		end = end_of(fetch);
	*p = (struct part){ fetch->parts, m->parts, fetch, m, off, end - off };
	fetch->parts = m->parts = p;
	m->left++;
	return true;
}

/*
 * Go through a span, and count what is held.  The request waits for the rest, of which a fetch
 * begins where none is on its way; without a request it is fetched ahead.  Without a batch none
 * begins: it is -ENODATA then.  0 or -errno.  Called with the lock.
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
		if (!fetch && !batch)
			return -ENODATA;
		if (!fetch)
			fetch = fetch_begin(f, batch, off, gap_end,
					    m ? ORIGIN_DEMAND : ORIGIN_AHEAD);
		if (!fetch || (m && !miss_join(m, fetch, off, to)))
			return -ENOMEM;
		if (to > end_of(fetch))
			to = end_of(fetch);
	}
	return 0;
}

/* Whether all of a range is held or on its way.  Called with the lock. */
static bool is_here_soon(struct fetcher *f, uint64_t len, uint64_t off)
{
	const struct span s = { off, len };
	uint64_t bytes = 0;

	return miss_add(f, NULL, &s, NULL, &bytes) == 0;
}

/*
 * A READ that misses belongs to a sequential reader if what lies before it is held, or on its way.
 * As much as that is, from twice its length on, is fetched ahead of it; and again when half of that
 * is left.  READs that find their blocks held do not come here.  Called with the lock.
 */
static void fetch_ahead(struct fetcher *f, uint64_t len, uint64_t off, struct batch *batch)
{
	struct span ahead = { off + len, 0 };
	uint64_t left = f->layer->size - ahead.off, bytes = 0;

	for (uint64_t n = 2 * len; n <= off && n <= AHEAD_MAX; n *= 2) {
		if (!is_here_soon(f, n, off - n))
			break;
		ahead.len = n;
	}
	if (ahead.len > left)
		ahead.len = left;
	if (!is_here_soon(f, ahead.len / 2, ahead.off))
		miss_add(f, NULL, &ahead, batch, &bytes);
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
	struct fetch *fetch = fetch_new(f, batch, s->off, s->off, 0, ORIGIN_DEMAND);

	if (!fetch)
		return -ENOMEM;
	fetch->ask.off = s->off;
	fetch->ask.len = s->len;
	fetch->ask.extent = m->r->extent;	/* it comes back with the answer */
	fetch->ask.extents = m->r->extents;
	m->r->extent = NULL;
	return miss_join(m, fetch, s->off, s->off + s->len) ? 0 : -ENOMEM;
}

int fetch_wait(struct fetcher *f, struct request *r, const struct span *s, enum how how)
{
	struct batch batch = { NULL, &batch.first };
	uint64_t read = 0, held = 0;
	int ret = takes_data(r) ? read_held(f, r, how, &read) : 0;
	struct miss *m = ret == 0 ? calloc(1, sizeof(*m)) : NULL;

	if (!m)
		return ret ? ret : -ENOMEM;
	m->r = r;
	m->again = !takes_data(r) && r->h.cmd != NBD_CMD_BLOCK_STATUS;
	pthread_mutex_lock(&f->lock);
	if (r->h.cmd == NBD_CMD_BLOCK_STATUS)
		ret = ask_extents(f, m, s, &batch);
	else
		ret = miss_add(f, m, s, &batch, &held);
	if (ret == 0 && r->h.cmd == NBD_CMD_READ)
		fetch_ahead(f, r->h.len, r->h.off, &batch);
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
