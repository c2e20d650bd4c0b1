/*
 * fetch.c - blocks on their way from the origin into the cache image: see fetch.h.
 *
 *	miss_add()   a block is not held: join the fetch that brings it, or begin one
 *	arrived()    the origin has answered
 *	store()      put it into the image and set the bits; a worker does, if that takes its time
 *	settle()     tell all who wait
 *
 * Who looks whether a block is held, and then for its fetch, does so under the lock.  A fetch is
 * taken from the table under the lock, after its bits were set.  So nobody misses both.
 *
 * What a client wrote meanwhile stays: layer_fill() stores only what is not held.  A READ gets the
 * origin's bytes all the same: that is what the disk had when it came.
 *
 * A request that waits holds no memory for data: a fetch gets its buffer when the answer arrives.
 * Until all of it has arrived it can be taken back, by whoever knows that nobody wants it any more.
 */
#include "fetch.h"

#include "buffer.h"
#include "log.h"
#include "util.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
	ZERO_PIECE = 64 * 1024,		/* zeros are looked for in pieces of this */
	STORE_HERE = 256 * 1024,	/* at most, by the origin's thread, if that does not block */

	SEQUENTIAL_READS = 3,		/* this many make a stream */
	NEAR_READS = 8,			/* how far reads overtake each other, in reads */
	WINDOW_MIN = 256 * 1024,
	WINDOW_MAX = 8 * 1024 * 1024,
};

struct fetch {
	struct origin_request ask;	/* the first: arrived() relies on it */
	struct fetcher *f;
	struct fetch *next;		/* in its bucket */
	struct fetch *newer;		/* of those that have arrived */
	struct waiter *waiting;
};

/* A request, and the parts of it that are on their way. */
struct part {
	struct waiter waiter;		/* the first: part_done() relies on it */
	struct part *next;
	struct miss *miss;
};

struct miss {
	struct fetcher *f;
	struct request *r;		/* NULL: it was taken back; guarded by the fetcher's lock */
	bool reads;			/* it needs the data, stored or not */
	uint64_t off, len;		/* of a READ that is answered with what arrives; else len is 0 */
	_Atomic(uint8_t *) buf;		/* of len bytes, when something is in it */
	atomic_uint left;		/* parts, and one while they are being added */
	atomic_int error;		/* of the first that failed, 0 */
	atomic_bool again;		/* carry the request out again, in any case */
	bool added;			/* at least one part was */
	struct part *parts;
	struct part first;		/* mostly the only one */
};

static void store_arrived(struct job *job);

void fetcher_init(struct fetcher *f, struct layer *layer, struct origin *origin)
{
	memset(f, 0, sizeof(*f));
	f->layer = layer;
	f->origin = origin;
	f->job.run = store_arrived;
	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		f->last[i] = &f->arrived[i];
	pthread_mutex_init(&f->lock, NULL);
}

void fetcher_destroy(struct fetcher *f)
{
	pthread_mutex_destroy(&f->lock);
}

/* What the origin wants its requests to begin and end at. */
static uint64_t unit_of(const struct fetcher *f)
{
	uint32_t min = origin_limits(f->origin)->min_block;

	return min > BLOCK_SIZE ? min : BLOCK_SIZE;
}

/* The table.  These are called with the lock. */

static struct fetch **bucket_of(struct fetcher *f, uint64_t off)
{
	return &f->bucket[off / FETCH_REGION % FETCH_BUCKETS];
}

static void insert(struct fetch *fetch)
{
	struct fetch **p = bucket_of(fetch->f, fetch->ask.off);

	fetch->next = *p;
	*p = fetch;
	if (fetch->ask.priority == ORIGIN_DEMAND)
		atomic_fetch_add(&fetch->f->demanded, 1);
}

static void take_out(struct fetch *fetch)
{
	struct fetch **p = bucket_of(fetch->f, fetch->ask.off);

	while (*p != fetch)
		p = &(*p)->next;
	*p = fetch->next;
	if (fetch->ask.priority == ORIGIN_DEMAND)
		atomic_fetch_sub(&fetch->f->demanded, 1);
}

static uint64_t end_of(const struct fetch *fetch)
{
	return fetch->ask.off + fetch->ask.len;
}

/*
 * The fetch that brings the block at off, or NULL and then *end is lowered to where the next one
 * begins.  Those of the background copy do not count: they may take long.
 */
static struct fetch *find(struct fetcher *f, uint64_t off, uint64_t *end)
{
	for (struct fetch *i = *bucket_of(f, off); i; i = i->next) {
		if (i->ask.priority == ORIGIN_COPY)
			continue;
		if (i->ask.off <= off && off < end_of(i))
			return i;
		if (i->ask.off > off && i->ask.off < *end)
			*end = i->ask.off;
	}
	return NULL;
}

/* Fetches */

/* Zeros become a hole.  Most data shows at its first bytes that it is none. */
static bool is_zero(const uint8_t *p, uint64_t len)
{
	return p[0] == 0 && memcmp(p, p + 1, len - 1) == 0;
}

/* Bytes at p, at most len, that are all zero, or have none such piece; *zero tells which. */
static uint64_t zero_run(const uint8_t *p, uint64_t len, bool *zero)
{
	uint64_t n = 0;

	while (n < len) {
		uint64_t piece = len - n < ZERO_PIECE ? len - n : ZERO_PIECE;
		bool is = is_zero(p + n, piece);

		if (n > 0 && is != *zero)
			break;
		*zero = is;
		n += piece;
	}
	return n;
}

static int fill(struct fetcher *f, const uint8_t *buf, uint64_t len, uint64_t off, enum how how)
{
	int ret = 0;

	while (len > 0 && ret == 0) {
		bool zero = false;
		uint64_t n = zero_run(buf, len, &zero);

		ret = zero && how == TRY ? -EAGAIN :
					   layer_fill(f->layer, zero ? NULL : buf, n, off, how);
		buf += n;
		off += n;
		len -= n;
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

/* Whether a fetch of what w needs, and no more, would be smaller. */
static bool is_wider(const struct fetch *fetch, const struct waiter *w)
{
	uint64_t unit = unit_of(fetch->f);

	return w->off / unit * unit > fetch->ask.off || w->off + w->len + unit <= end_of(fetch);
}

/* Tell all who wait, which is gone then.  The only one may keep the buffer, if it wants all of it. */
static void tell_waiters(struct fetch *fetch, struct waiter *w, int error)
{
	uint8_t *buf = fetch->ask.error ? NULL : fetch->ask.buf;
	bool whole = buf && w && !w->next && w->len == fetch->ask.len;
	struct waiter *next;

	for (; w; w = next) {
		next = w->next;
		if (!buf)
			w->done(w, NULL, false, error == -EIO && is_wider(fetch, w) ? -EAGAIN : error);
		else if (w->done(w, buf + (w->off - fetch->ask.off), whole, error))
			fetch->ask.buf = NULL;
	}
}

/* The data is stored, or cannot be had or stored: tell all who wait. */
static void settle(struct fetch *fetch, int error)
{
	struct fetcher *f = fetch->f;
	struct waiter *waiting;

	if (!fetch->ask.error) {
		log_store(f, error);
		origin_stored(f->origin, fetch->ask.len);
	}
	pthread_mutex_lock(&f->lock);
	take_out(fetch);
	waiting = fetch->waiting;
	for (struct waiter *w = waiting; w; w = w->next)
		w->fetch = NULL;
	pthread_mutex_unlock(&f->lock);
	tell_waiters(fetch, waiting, error);
	buffer_put(fetch->ask.buf, fetch->ask.len);
	free(fetch);
}

static int store(struct fetch *fetch, enum how how)
{
	return fill(fetch->f, fetch->ask.buf, fetch->ask.len, fetch->ask.off, how);
}

/* What is to be stored next: that for which clients wait comes first.  Called with the lock. */
static struct fetch *next_arrived(struct fetcher *f)
{
	struct fetch *fetch = NULL;

	for (unsigned i = 0; i < ORIGIN_PRIORITIES && !fetch; i++) {
		fetch = f->arrived[i];
		if (fetch)
			f->arrived[i] = fetch->newer;
		if (!f->arrived[i])
			f->last[i] = &f->arrived[i];
	}
	return fetch;
}

/*
 * One worker at a time stores: the file system lets one write to a file, and others that would
 * only take the processor from those who bring the data.
 */
static void store_arrived(struct job *job)
{
	struct fetcher *f = (struct fetcher *)((char *)job - offsetof(struct fetcher, job));
	struct fetch *fetch;

	for (;;) {
		pthread_mutex_lock(&f->lock);
		fetch = next_arrived(f);
		f->storing = fetch != NULL;
		pthread_mutex_unlock(&f->lock);
		if (!fetch)
			return;
		settle(fetch, store(fetch, WAIT));
	}
}

static void store_later(struct fetch *fetch)
{
	struct fetcher *f = fetch->f;
	unsigned priority = fetch->ask.priority;
	bool start;

	pthread_mutex_lock(&f->lock);
	*f->last[priority] = fetch;
	f->last[priority] = &fetch->newer;
	start = !f->storing;
	f->storing = true;
	pthread_mutex_unlock(&f->lock);
	if (start)
		worker_submit(&f->job);
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

	if (!error)
		error = is_stored_here(fetch) ? store(fetch, TRY) : -EAGAIN;
	if (error != -EAGAIN)
		settle(fetch, error);
	else
		store_later(fetch);
}

/* The request for blocks from off to end: what lies within the origin's blocks, and one region. */
static struct fetch *new_fetch(struct fetcher *f, uint64_t off, uint64_t end, uint64_t max,
			       enum origin_priority priority)
{
	struct fetch *fetch = calloc(1, sizeof(*fetch));

	if (!fetch)
		return NULL;
	fetch->f = f;
	fetch->ask.done = arrived;
	fetch->ask.priority = priority;
	fetch->ask.off = off;
	fetch->ask.len = fetch_fit(f, end - off, off, max);
	return fetch;
}

/* off is a multiple of the unit; so is the result, but at the end of the disk. */
uint64_t fetch_fit(const struct fetcher *f, uint64_t len, uint64_t off, uint64_t max)
{
	uint64_t unit = unit_of(f), size = f->layer->size, end;
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

int fetch_copy(struct fetcher *f, struct waiter *w)
{
	struct fetch *fetch = new_fetch(f, w->off, w->off + w->len, FETCH_REGION, ORIGIN_COPY);

	if (!fetch)
		return -ENOMEM;
	w->next = NULL;
	w->fetch = fetch;
	fetch->waiting = w;
	pthread_mutex_lock(&f->lock);
	insert(fetch);
	pthread_mutex_unlock(&f->lock);
	origin_submit(f->origin, &fetch->ask);
	return 0;
}

/*
 * Read-ahead.  A read that misses belongs to a stream if it is near the place where that expects its
 * next one: near, since a client's reads are handled by several threads, in any order.  After some
 * such reads a window ahead of the reader is fetched, which grows as the stream goes on: with reads
 * that find their blocks on their way, or, of a slow reader, with the first one behind the window.
 */

/* A new fetch for the beginning of a run that is not held nor on its way; NULL if there is none. */
static struct fetch *ahead(struct fetcher *f, uint64_t *off, uint64_t end)
{
	uint64_t unit = unit_of(f), start, to;
	struct fetch *there, *fetch;
	bool held;

	to = *off + layer_run(f->layer, end - *off, *off, &held);
	there = held ? NULL : find(f, *off, &to);
	if (held || there) {
		*off = held ? to : end_of(there);
		return NULL;
	}
	start = *off / unit * unit;
	fetch = new_fetch(f, start, to, FETCH_MAX, ORIGIN_AHEAD);
	*off = fetch ? end_of(fetch) : end;
	if (fetch)
		insert(fetch);
	return fetch;
}

/* Fetch what is not held of a range, nor on its way. */
static void fetch_ahead(struct fetcher *f, uint64_t off, uint64_t end)
{
	while (off < end) {
		struct fetch *fetch;

		pthread_mutex_lock(&f->lock);
		fetch = ahead(f, &off, end);
		pthread_mutex_unlock(&f->lock);
		if (fetch)
			origin_submit(f->origin, &fetch->ask);
	}
}

/*
 * The stream that a read belongs to, or in its place the one that was used longest ago.  Called with
 * the lock.
 */
static struct stream *stream_find(struct fetcher *f, uint64_t len, uint64_t off)
{
	struct stream *oldest = f->stream;

	for (struct stream *s = f->stream; s < f->stream + FETCH_STREAMS; s++) {
		uint64_t last = s->end > s->next ? s->end : s->next;	/* what it has found there */
		uint64_t distance = off < s->next ? s->next - off : off > last ? off - last : 0;

		if (s->reads > 0 && distance <= NEAR_READS * len) {
			s->reads++;
			return s;
		}
		if (s->used < oldest->used)
			oldest = s;
	}
	*oldest = (struct stream){ .reads = 1 };
	return oldest;
}

/* Move the window on.  Returns where what is to be fetched begins; it ends at s->end. */
static uint64_t stream_advance(struct fetcher *f, struct stream *s)
{
	uint64_t size = f->layer->size, from = s->end > s->next ? s->end : s->next, to;

	s->window = s->window ? s->window * 2 : WINDOW_MIN;
	if (s->window > WINDOW_MAX)
		s->window = WINDOW_MAX;
	to = size - s->next > s->window ? s->next + s->window : size;
	s->end = to > from ? to : from;
	return from;
}

void fetch_missed(struct fetcher *f, uint64_t len, uint64_t off)
{
	uint64_t from = 0, end = 0;
	struct stream *s;

	pthread_mutex_lock(&f->lock);
	s = stream_find(f, len, off);
	s->used = ++f->reads;
	if (off + len > s->next)
		s->next = off + len;
	if (s->reads >= SEQUENTIAL_READS && s->end < s->next + s->window / 2 + len) {
		from = stream_advance(f, s);
		end = s->end;
	}
	pthread_mutex_unlock(&f->lock);
	fetch_ahead(f, from, end);
}

/* Misses */

struct miss *miss_new(struct fetcher *f, struct request *r)
{
	struct miss *m = calloc(1, sizeof(*m));

	if (!m)
		return NULL;
	m->f = f;
	m->r = r;
	m->off = r->h.off;
	m->reads = r->h.cmd == NBD_CMD_READ;
	m->len = m->reads && r->h.len <= READ_PIECE ? r->h.len : 0;
	atomic_init(&m->left, 1);
	return m;
}

uint8_t *miss_buffer(struct miss *m)
{
	uint8_t *none = NULL, *buf = atomic_load(&m->buf);

	if (buf)
		return buf;
	buf = buffer_get(m->len);
	if (buf && !atomic_compare_exchange_strong(&m->buf, &none, buf)) {
		buffer_put(buf, m->len);
		buf = none;
	}
	return buf;
}

static void miss_free(struct miss *m)
{
	struct part *p;

	while ((p = m->parts)) {
		m->parts = p->next;
		if (p != &m->first)
			free(p);
	}
	buffer_put(atomic_load(&m->buf), m->len);
	free(m);
}

/* Everything that it waited for has come, or failed. */
static void miss_end(struct miss *m)
{
	int error = atomic_load(&m->error);
	bool again = atomic_load(&m->again) || m->len == 0;
	struct request *r;

	pthread_mutex_lock(&m->f->lock);
	r = m->r;
	if (r)
		r->miss = NULL;
	pthread_mutex_unlock(&m->f->lock);
	if (r && !error && !again) {
		if (r->buf_len > 0)
			buffer_put(r->buf, r->buf_len);
		r->buf = atomic_exchange(&m->buf, NULL);
		r->buf_len = m->len;
	}
	miss_free(m);
	if (r && !error && again)
		request_again(r);
	else if (r)
		request_done(r, error);
}

static void miss_drop(struct miss *m, unsigned n)
{
	if (n > 0 && atomic_fetch_sub(&m->left, n) == n)
		miss_end(m);
}

static void miss_fail(struct miss *m, int error)
{
	int none = 0;

	atomic_compare_exchange_strong(&m->error, &none, error);
}

/* Put what has arrived into the answer to a READ.  True if the buffer has become that. */
static bool put_data(struct miss *m, const struct waiter *w, uint8_t *buf, bool whole)
{
	uint8_t *none = NULL, *to;

	if (whole && w->len == m->len && atomic_compare_exchange_strong(&m->buf, &none, buf))
		return true;
	to = miss_buffer(m);
	if (to)
		memcpy(to + (w->off - m->off), buf, w->len);
	else
		miss_fail(m, -ENOMEM);
	return false;
}

static bool part_done(struct waiter *w, uint8_t *buf, bool whole, int error)
{
	struct miss *m = ((struct part *)w)->miss;
	bool taken = false;

	if (buf && m->len > 0)
		taken = put_data(m, w, buf, whole);
	else if (buf && m->reads)
		;	/* in pieces, it asks again for what could not be stored */
	else if (error == -EAGAIN || (error && layer_holds(m->f->layer, w->len, w->off)))
		atomic_store(&m->again, true);
	else if (error)
		miss_fail(m, error);
	miss_drop(m, 1);
	return taken;
}

static struct part *new_part(struct miss *m, uint64_t off)
{
	struct part *part = m->parts ? calloc(1, sizeof(*part)) : &m->first;

	if (!part)
		return NULL;
	part->miss = m;
	part->waiter.off = off;
	part->waiter.done = part_done;
	part->next = m->parts;
	m->parts = part;
	return part;
}

/* Let it wait for what a fetch brings of the run up to end. */
static void join(struct fetch *fetch, struct part *part, uint64_t end)
{
	struct waiter *w = &part->waiter;

	if (end > end_of(fetch))
		end = end_of(fetch);
	w->len = end - w->off;
	w->fetch = fetch;
	w->next = fetch->waiting;
	fetch->waiting = w;
	atomic_fetch_add(&part->miss->left, 1);
}

int64_t miss_add(struct miss *m, uint64_t len, uint64_t off)
{
	struct fetcher *f = m->f;
	struct fetch *fetch = NULL, *begun = NULL;
	struct part *part;
	uint64_t end;
	int64_t ret = 0;
	bool held;

	pthread_mutex_lock(&f->lock);
	end = off + layer_run(f->layer, len, off, &held);
	if (!held) {
		uint64_t free_end = end;

		fetch = find(f, off, &free_end);
		if (!fetch)
			fetch = begun = new_fetch(f, off / unit_of(f) * unit_of(f), free_end,
						  FETCH_MAX, ORIGIN_DEMAND);
		part = fetch ? new_part(m, off) : NULL;
		if (part)
			join(fetch, part, end);
		if (part && begun)
			insert(begun);
		ret = part ? (int64_t)part->waiter.len : -ENOMEM;
		m->added |= part != NULL;
	}
	pthread_mutex_unlock(&f->lock);
	if (begun && ret > 0)
		origin_submit(f->origin, &begun->ask);
	else if (ret < 0)
		free(begun);
	return ret;
}

/* Take its parts out of what they wait for; returns how many.  Called with the lock. */
static unsigned miss_detach(struct miss *m)
{
	unsigned n = 0;

	for (struct part *p = m->parts; p; p = p->next) {
		struct waiter **at;

		if (!p->waiter.fetch)
			continue;
		for (at = &p->waiter.fetch->waiting; *at != &p->waiter; at = &(*at)->next)
			;
		*at = p->waiter.next;
		p->waiter.fetch = NULL;
		n++;
	}
	m->r = NULL;
	return n;
}

int miss_wait(struct miss *m, int err)
{
	struct request *r = m->r;
	unsigned dropped = 0;
	int ret = PENDING;

	pthread_mutex_lock(&m->f->lock);
	if (err || !m->added)
		ret = err;
	else if (request_is_abandoned(r))
		ret = -ECANCELED;
	else if (atomic_load(&r->change.is_empty))
		ret = 0;
	if (ret == PENDING)
		r->miss = m;
	else
		dropped = miss_detach(m);
	pthread_mutex_unlock(&m->f->lock);
	miss_drop(m, dropped + 1);
	return ret;
}

/* Extents */

/* A BLOCK_STATUS that the origin is asked for. */
struct question {
	struct origin_request ask;	/* the first: answered() relies on it */
	struct fetcher *f;
	struct request *r;		/* NULL: it was taken back; guarded by the fetcher's lock */
	uint64_t skip, len;		/* bytes before, and of, what r is about */
};

/* Cut the extents of r down to len bytes behind skip bytes. */
static void cut_extents(struct request *r, uint64_t skip, uint64_t len)
{
	unsigned kept = 0;

	for (unsigned i = 0; i < r->extents && len > 0; i++) {
		struct extent e = r->extent[i];
		uint64_t cut = skip < e.len ? skip : e.len;

		e.len -= cut;
		skip -= cut;
		if (e.len > len)
			e.len = len;
		len -= e.len;
		if (e.len > 0)
			r->extent[kept++] = e;
	}
	r->extents = kept;
}

/* The origin's thread.  Where the origin does not tell, all is data. */
static void answered(struct origin_request *ask)
{
	struct question *q = (struct question *)ask;
	struct fetcher *f = q->f;
	struct request *r;

	pthread_mutex_lock(&f->lock);
	r = q->r;
	if (r)
		r->question = NULL;
	pthread_mutex_unlock(&f->lock);
	if (!r) {
		free(ask->extent);
		free(q);
		return;
	}
	r->extent = ask->extent;
	r->extents = ask->error ? 0 : ask->extents;
	cut_extents(r, q->skip, q->len);
	if (r->extents == 0) {
		r->extent[0] = (struct extent){ q->len, 0 };
		r->extents = 1;
	}
	/* At a switch the blocks are held by now. */
	if (ask->error == -ECANCELED && layer_holds(f->layer, 1, r->h.off))
		request_again(r);
	else
		request_done(r, ask->error == -ECANCELED ? -ECANCELED : 0);
	free(q);
}

int fetch_extents(struct fetcher *f, struct request *r, uint64_t len, unsigned max)
{
	uint64_t unit = origin_limits(f->origin)->min_block, start = r->h.off / unit * unit, end;
	struct question *q = calloc(1, sizeof(*q));
	bool wanted;

	if (!q)
		return -ENOMEM;
	end = (r->h.off + len + unit - 1) / unit * unit;
	if (end > f->layer->size)
		end = f->layer->size;
	q->f = f;
	q->r = r;
	q->skip = r->h.off - start;
	q->len = len;
	q->ask.priority = ORIGIN_DEMAND;
	q->ask.off = start;
	q->ask.len = end - start;
	q->ask.extents = max;
	q->ask.done = answered;
	pthread_mutex_lock(&f->lock);
	wanted = !request_is_abandoned(r);
	if (wanted) {
		q->ask.extent = r->extent;	/* it comes back with the answer */
		r->extent = NULL;
		r->question = q;
	}
	pthread_mutex_unlock(&f->lock);
	if (!wanted) {
		free(q);
		return -ECANCELED;
	}
	origin_submit(f->origin, &q->ask);
	return PENDING;
}

bool fetch_take_back(struct fetcher *f, struct request *r)
{
	struct miss *m;
	struct question *q;
	unsigned dropped = 0;

	pthread_mutex_lock(&f->lock);
	m = r->miss;
	q = r->question;
	r->miss = NULL;
	r->question = NULL;
	if (m)
		dropped = miss_detach(m);
	if (q)
		q->r = NULL;
	pthread_mutex_unlock(&f->lock);
	if (m)
		miss_drop(m, dropped);
	return m || q;
}
