/*
 * copy.c - the background copy: see copy.h.
 *
 * A pass over the disk asks for what is not held, in order.  Where the origin tells extents, they
 * are asked for first, and runs of zeros are made without transfer.  A part that cannot
 * be delivered is asked for again by halves, down to the unit that fails.
 *
 * How many requests are under way is found by their delay: more, as long as that costs no time,
 * so that a long way to the origin is filled, and a short one is not queued up on.
 *
 * All work is done by one job at a time, the pump, on a worker.  What wakes it: a start, a stop, an
 * arrival, an answer about extents.
 */
#include "copy.h"

#include "fetch.h"
#include "layer.h"
#include "origin.h"
#include "util.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
	REQUEST_BYTES = 256 * 1024,	/* the default */
	MAP_EXTENTS = 1024,
	MAP_BYTES = 1024 * 1024 * 1024,	/* asked about at once */
	STEP = STEP_BYTES_MAX,		/* looked at, or zeroed while others wait, at once */

	WINDOW_MIN = 2,			/* requests under way */
	WINDOW_START = 64,
	WINDOW_MAX = 1024,
	QUEUE_US = 2000,		/* of delay that is allowed besides twice the least one */
	SHARE = 16,			/* parts of the window, of which one is asked for at once */

	RATE_MS = 1000,			/* the rate is that of this time, about */
};

/* What the origin told about a range. */
struct map {
	uint64_t off, end;
	unsigned extents;
	struct extent extent[MAP_EXTENTS];
};

/* A part that is being copied, or will be again. */
struct piece {
	struct waiter waiter;		/* the first: piece_done() relies on it */
	struct copy *copy;
	struct piece *next;		/* in the list of those to ask for again */
	uint64_t begun;			/* now_us() */
};

struct copy {
	struct fetcher *fetcher;
	struct layer *layer;
	struct origin *origin;
	void (*ended)(void *arg);
	void *arg;
	struct job job;			/* the pump */
	atomic_bool asking;		/* the origin about map */

	pthread_mutex_t lock;		/* guards all that follows but the pump's own; a leaf */
	unsigned wanted;		/* by so many */
	enum copy_state state;
	int error;			/* an errno that ends it */
	uint64_t request_bytes;
	bool awake, pumping;		/* the pump has something to do; is with a worker */
	unsigned under_way, window;	/* requests; the window counts in thousandths */
	uint64_t least_delay;		/* microseconds; 0: not known */
	struct piece *again;
	unsigned failures_in_pass;
	uint64_t failed_blocks, failures_more;
	unsigned failures;
	struct copy_failure failure[COPY_FAILURES];
	uint64_t copied, rate, rate_copied, rate_since;	/* bytes, and now_ms() */

	/* The pump's own, and the answer's while it is asking. */
	uint64_t pos;			/* the pass has come to here */
	struct map map;
	struct origin_request question;
};

static uint64_t unit_of(const struct copy *c)
{
	uint32_t min = origin_limits(c->origin)->min_block;

	return min > BLOCK_SIZE ? min : BLOCK_SIZE;
}

/* Something to do for the pump. */
static void unlock_and_pump(struct copy *c)
{
	bool submit = !c->pumping;

	c->awake = c->pumping = true;
	pthread_mutex_unlock(&c->lock);
	if (submit)
		worker_submit(&c->job);
}

/* Pieces */

/*
 * Congestion shows in the delay.  A request without it lets one more be under way, so that the
 * window doubles in each round; one with it lets the window shrink a little.
 */
static void adapt_window(struct copy *c, uint64_t delay)
{
	if (!c->least_delay || delay < c->least_delay)
		c->least_delay = delay;
	if (delay <= 2 * c->least_delay + QUEUE_US) {
		if (c->window < WINDOW_MAX * 1000)
			c->window += 1000;
	} else if (c->window > WINDOW_MIN * 1000) {
		c->window -= 300;
	}
}

static void note_failure(struct copy *c, uint64_t len, uint64_t off)
{
	struct copy_failure *last = c->failures ? &c->failure[c->failures - 1] : NULL;

	c->failures_in_pass++;
	c->failed_blocks += (len + BLOCK_SIZE - 1) / BLOCK_SIZE;
	if (last && last->off + last->len == off)
		last->len += len;
	else if (c->failures < COPY_FAILURES)
		c->failure[c->failures++] = (struct copy_failure){ off, len };
	else
		c->failures_more++;
}

static void put_again(struct copy *c, struct piece *p)
{
	struct piece **at = &c->again;

	while (*at && (*at)->waiter.off < p->waiter.off)
		at = &(*at)->next;
	p->next = *at;
	*at = p;
}

/* The origin cannot deliver all of the piece: by halves, until only what fails is left. */
static void split(struct copy *c, struct piece *p)
{
	uint64_t unit = unit_of(c), units = (p->waiter.len + unit - 1) / unit;
	struct piece *half = units > 1 ? calloc(1, sizeof(*half)) : NULL;

	if (!half) {
		note_failure(c, p->waiter.len, p->waiter.off);
		free(p);
		return;
	}
	*half = *p;
	p->waiter.len = units / 2 * unit;
	half->waiter.off += p->waiter.len;
	half->waiter.len -= p->waiter.len;
	put_again(c, p);
	put_again(c, half);
}

/*
 * Whether to ask for more.  Where many are under way, which come one by one from far away, more
 * than one is worth the wake-up of the pump and the origin's thread.
 */
static bool is_worth_while(const struct copy *c)
{
	unsigned window = c->window / 1000;

	return c->under_way + window / SHARE <= window;
}

static bool piece_done(struct waiter *w, uint8_t *buf, bool whole, int error)
{
	struct piece *p = (struct piece *)w;
	struct copy *c = p->copy;
	bool pump = true;

	(void)whole;
	pthread_mutex_lock(&c->lock);
	c->under_way--;
	if (!error) {
		c->copied += w->len;
		adapt_window(c, now_us() - p->begun);
		free(p);
		pump = is_worth_while(c);
	} else if (buf || error != -EIO) {
		c->error = error == -ECANCELED ? -ESHUTDOWN : error;
		free(p);
	} else {
		split(c, p);
	}
	if (pump)
		unlock_and_pump(c);
	else
		pthread_mutex_unlock(&c->lock);
	return false;
}

/* Ask for a piece, which may be done at once.  False if that has to wait. */
static bool begin_piece(struct copy *c, struct piece *p)
{
	bool room;

	pthread_mutex_lock(&c->lock);
	room = c->under_way < c->window / 1000;
	if (room)
		c->under_way++;
	pthread_mutex_unlock(&c->lock);
	if (!room)
		return false;
	p->copy = c;
	p->begun = now_us();
	p->waiter.done = piece_done;
	if (fetch_copy(c->fetcher, &p->waiter) != 0)
		piece_done(&p->waiter, NULL, false, -ENOMEM);
	return true;
}

static void set_error(struct copy *c, int error)
{
	pthread_mutex_lock(&c->lock);
	if (!c->error)
		c->error = error;
	pthread_mutex_unlock(&c->lock);
}

/* Maps */

/* An answer is used up to the last whole unit that it tells of, so that questions are aligned. */
static void set_map_end(const struct copy *c, struct map *m)
{
	uint64_t end = m->off, unit = unit_of(c);

	if (m->extents == 0)
		return;
	for (unsigned i = 0; i < m->extents; i++)
		end += m->extent[i].len;
	if (end < c->layer->size)
		end = end / unit * unit;
	/* An extent of less than a unit: that unit counts as data. */
	if (end > m->off)
		m->end = end;
	else
		m->extents = 0;
}

/* Without an answer all of it is data. */
static void map_answered(struct origin_request *q)
{
	struct copy *c = (struct copy *)((char *)q - offsetof(struct copy, question));

	c->map.extents = q->error ? 0 : q->extents;
	set_map_end(c, &c->map);
	pthread_mutex_lock(&c->lock);
	if (q->error == -ECANCELED && !c->error)
		c->error = -ESHUTDOWN;
	atomic_store(&c->asking, false);
	unlock_and_pump(c);
}

static void ask_map(struct copy *c, uint64_t off)
{
	uint64_t left = c->layer->size - off;

	c->question = (struct origin_request){
		.priority = ORIGIN_COPY,
		.off = off,
		.len = left < MAP_BYTES ? left : MAP_BYTES,
		.extent = c->map.extent,
		.extents = MAP_EXTENTS,
		.done = map_answered,
	};
	c->map.off = off;
	c->map.end = off + c->question.len;
	atomic_store(&c->asking, true);
	origin_submit(c->origin, &c->question);
}

/* Have the map that pos lies in.  False if that has to wait. */
static bool have_map(struct copy *c)
{
	if (atomic_load(&c->asking))
		return false;
	if (c->pos < c->map.end)
		return true;
	ask_map(c, c->pos / unit_of(c) * unit_of(c));
	return false;
}

/* Whether the run at pos reads as zeros; *end is lowered to its end. */
static bool is_zero_at(const struct copy *c, uint64_t pos, uint64_t *end)
{
	uint64_t at = c->map.off;

	if (*end > c->map.end)
		*end = c->map.end;
	for (unsigned i = 0; i < c->map.extents; at += c->map.extent[i++].len) {
		const struct extent *e = &c->map.extent[i];

		if (pos >= at + e->len)
			continue;
		if (at + e->len < *end)
			*end = at + e->len;
		return e->flags & NBD_STATE_ZERO;
	}
	return false;
}

/* The pass */

/* Make zeros of the whole blocks of a run.  False if there is none. */
static bool make_zeros(struct copy *c, uint64_t end)
{
	uint64_t len = layer_whole(c->layer, end - c->pos, c->pos);
	int err;

	if (len == 0)
		return false;
	err = layer_fill(c->layer, NULL, len, c->pos, WAIT);
	if (err)
		set_error(c, err);
	c->pos += len;
	return true;
}

/* Ask for what is not held at pos, up to end.  False if that has to wait. */
static bool ask_data(struct copy *c, uint64_t end)
{
	uint64_t unit = unit_of(c), off = c->pos / unit * unit, len;
	struct piece *p = calloc(1, sizeof(*p));

	if (!p) {
		set_error(c, -ENOMEM);
		return false;
	}
	len = fetch_fit(c->fetcher, end - off, off, c->request_bytes);
	p->waiter.off = off;
	p->waiter.len = len;
	if (!begin_piece(c, p)) {
		free(p);
		return false;
	}
	c->pos = off + len;
	return true;
}

/* The next part of the pass.  False if that has to wait, or there is none. */
static bool step(struct copy *c)
{
	uint64_t left = c->layer->size - c->pos, end;
	bool held;

	if (left == 0)
		return false;
	end = c->pos + layer_run(c->layer, left < STEP ? left : STEP, c->pos, &held);
	if (held) {
		c->pos = end;
		return true;
	}
	if (origin_tells_extents(c->origin)) {
		if (!have_map(c))
			return false;
		if (is_zero_at(c, c->pos, &end) && make_zeros(c, end))
			return true;
	}
	return ask_data(c, end);
}

/* Ask again for what failed as a part of something larger. */
static bool step_again(struct copy *c)
{
	struct piece *p;

	pthread_mutex_lock(&c->lock);
	p = c->again;
	if (p)
		c->again = p->next;
	pthread_mutex_unlock(&c->lock);
	if (!p)
		return false;
	if (begin_piece(c, p))
		return true;
	pthread_mutex_lock(&c->lock);
	put_again(c, p);
	pthread_mutex_unlock(&c->lock);
	return false;
}

/* Called with the lock. */
static bool is_over(const struct copy *c)
{
	return c->error || c->wanted == 0;
}

static void free_again(struct copy *c)
{
	struct piece *p;

	while ((p = c->again)) {
		c->again = p->next;
		free(p);
	}
}

/* Nothing more can be asked for.  Called with the lock; true if the copy has ended. */
static bool settle(struct copy *c)
{
	if (c->under_way > 0 || atomic_load(&c->asking) || c->state != COPY_RUNNING)
		return false;
	if (is_over(c))
		free_again(c);
	else if (c->again || c->pos < c->layer->size)
		return false;
	if (!is_over(c) && c->failures_in_pass == 0 && layer_missing(c->layer) > 0) {
		c->pos = 0;		/* what was on its way for others has failed */
		c->map.off = c->map.end = 0;
		c->awake = true;
		return false;
	}
	if (layer_missing(c->layer) == 0)
		c->state = COPY_DONE;
	else
		c->state = c->error || c->failures_in_pass > 0 ? COPY_FAILED : COPY_IDLE;
	return true;
}

static void pump(struct job *job)
{
	struct copy *c = (struct copy *)((char *)job - offsetof(struct copy, job));
	bool go_on, ended;

	for (;;) {
		pthread_mutex_lock(&c->lock);
		if (!c->awake) {
			c->pumping = false;
			pthread_mutex_unlock(&c->lock);
			return;
		}
		c->awake = false;
		go_on = c->state == COPY_RUNNING && !is_over(c);
		pthread_mutex_unlock(&c->lock);
		while (go_on && (step_again(c) || step(c))) {
			pthread_mutex_lock(&c->lock);
			go_on = !is_over(c);
			pthread_mutex_unlock(&c->lock);
		}
		pthread_mutex_lock(&c->lock);
		ended = settle(c);
		pthread_mutex_unlock(&c->lock);
		if (ended)
			c->ended(c->arg);
	}
}

/* Control */

struct copy *copy_new(struct fetcher *f, void (*ended)(void *arg), void *arg)
{
	struct copy *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->fetcher = f;
	c->layer = f->layer;
	c->origin = f->origin;
	c->ended = ended;
	c->arg = arg;
	c->job.run = pump;
	pthread_mutex_init(&c->lock, NULL);
	return c;
}

void copy_free(struct copy *c)
{
	if (!c)
		return;
	free_again(c);
	pthread_mutex_destroy(&c->lock);
	free(c);
}

/* Called with the lock, when nothing is under way. */
static void begin_pass(struct copy *c)
{
	c->state = COPY_RUNNING;
	c->error = 0;
	c->window = WINDOW_START * 1000;
	c->least_delay = 0;
	c->failures_in_pass = c->failures = 0;
	c->failed_blocks = c->failures_more = 0;
	c->pos = 0;
	c->map.off = c->map.end = 0;
	c->copied = c->rate = c->rate_copied = 0;
	c->rate_since = now_ms();
}

void copy_start(struct copy *c, uint64_t request_bytes)
{
	pthread_mutex_lock(&c->lock);
	c->wanted++;
	c->request_bytes = request_bytes ? request_bytes : REQUEST_BYTES;
	if (c->state != COPY_RUNNING)
		begin_pass(c);
	unlock_and_pump(c);
}

void copy_release(struct copy *c)
{
	pthread_mutex_lock(&c->lock);
	if (c->wanted > 0)
		c->wanted--;
	unlock_and_pump(c);
}

void copy_stop(struct copy *c)
{
	pthread_mutex_lock(&c->lock);
	c->wanted = 0;
	unlock_and_pump(c);
}

/* Called with the lock. */
static void measure_rate(struct copy *c)
{
	uint64_t now = now_ms(), since = now - c->rate_since;

	if (since < RATE_MS / 2)
		return;
	c->rate = (c->copied - c->rate_copied) * 1000 / since;
	c->rate_copied = c->copied;
	c->rate_since = now;
}

void copy_status(struct copy *c, struct copy_status *status)
{
	pthread_mutex_lock(&c->lock);
	measure_rate(c);
	/* What was asked for already may still arrive, but nobody waits for it. */
	status->state = c->state == COPY_RUNNING && c->wanted == 0 ? COPY_IDLE : c->state;
	status->error = -c->error;
	status->rate = status->state == COPY_RUNNING ? c->rate : 0;
	status->failed_blocks = c->failed_blocks;
	status->failures = c->failures;
	status->failures_more = c->failures_more;
	memcpy(status->failure, c->failure, c->failures * sizeof(c->failure[0]));
	pthread_mutex_unlock(&c->lock);
}
