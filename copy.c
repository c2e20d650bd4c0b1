/*
 * copy.c - the background copy: see copy.h.
 *
 * A thread passes over the disk and asks for what is not held, in order.  Where the origin tells
 * extents, they are asked for first, and runs of zeros are made without transfer.  A second pass
 * asks for what could not be delivered, unit by unit: what fails then is told.
 *
 * How many requests are under way is found by their delay: more, as long as that costs no time,
 * so that a long way to the origin is filled, and a short one is not queued up on.
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
	COPY_STACK = 128 * 1024,
	REQUEST_BYTES = 256 * 1024,	/* the default */
	MAP_EXTENTS = 1024,
	MAP_BYTES = 1024 * 1024 * 1024,	/* asked about at once */

	WINDOW_MIN = 2,			/* requests under way */
	WINDOW_START = 64,
	WINDOW_MAX = 1024,
	QUEUE_US = 2000,		/* of delay that is allowed besides twice the least one */
	SHARE = 16,			/* parts of the window, of which one is asked for at once */

	RATE_MS = 500,			/* the rate is that of so much time, at least */
};

/* What the origin told about a range. */
struct map {
	uint64_t off, end;
	unsigned extents;
	struct extent extent[MAP_EXTENTS];
};

struct copy {
	struct fetcher *fetcher;
	struct layer *layer;
	struct origin *origin;
	void (*ended)(void *arg);
	void *arg;
	pthread_t thread;
	bool has_thread;		/* to be joined; main thread */

	pthread_mutex_t lock;		/* guards what follows; a leaf */
	pthread_cond_t changed;		/* there is room, or the thread has nothing to wait for */
	unsigned wanted;		/* by so many */
	enum copy_state state;
	int error;			/* an errno that ends it */
	uint64_t request_bytes;
	unsigned under_way, window;	/* requests */
	uint64_t least_delay;		/* microseconds; 0: not known */
	uint64_t failed_blocks, failures_more;
	unsigned failures;
	struct copy_failure failure[COPY_FAILURES];
	uint64_t copied, rate, rate_copied, rate_since;	/* bytes, and now_ms() */

	/* The thread's own, and the answer's while it is asking. */
	struct map map;
	struct origin_request question;
	atomic_bool asking;
};

/* Called with the lock. */
static bool copy_is_over(const struct copy *c)
{
	return c->error || c->wanted == 0;
}

/* Requests */

/*
 * Congestion shows in the delay.  A request without it lets one more be under way, so that the
 * window doubles in each round; one with it lets the window shrink.
 */
static void adapt_window(struct copy *c, uint64_t delay)
{
	if (!c->least_delay || delay < c->least_delay)
		c->least_delay = delay;
	if (delay > 2 * c->least_delay + QUEUE_US)
		c->window -= c->window > WINDOW_MIN;
	else
		c->window += c->window < WINDOW_MAX;
}

/*
 * A request has ended; error, an errno, ends the copy.  Where many are under way, which come one by
 * one from far away, room for more than one is worth the wake-up of two threads.
 */
static void request_ended(struct copy *c, int error)
{
	pthread_mutex_lock(&c->lock);
	if (!c->error)
		c->error = error;
	c->under_way--;
	if (c->under_way + c->window / SHARE <= c->window)
		pthread_cond_signal(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

/* Wait until one more request may be under way.  Its most bytes; 0 if the copy is over. */
static uint64_t wait_for_room(struct copy *c)
{
	uint64_t bytes = 0;

	pthread_mutex_lock(&c->lock);
	while (!copy_is_over(c) && c->under_way >= c->window)
		pthread_cond_wait(&c->changed, &c->lock);
	if (!copy_is_over(c)) {
		bytes = c->request_bytes;
		c->under_way++;
	}
	pthread_mutex_unlock(&c->lock);
	return bytes;
}

static void data_copied(void *copy, const struct origin_request *ask, int error)
{
	struct copy *c = copy;

	if (!error) {
		pthread_mutex_lock(&c->lock);
		c->copied += ask->len;
		adapt_window(c, now_us() - ask->sent);
		pthread_mutex_unlock(&c->lock);
	}
	if (ask->error == -EIO)
		error = 0;	/* the next pass asks again, or tells it */
	request_ended(c, error == -ECANCELED ? ESHUTDOWN : -error);
}

/* Ask for data from off on, up to end.  Returns where what was asked for ends. */
static uint64_t copy_data(struct copy *c, uint64_t off, uint64_t end, bool by_units)
{
	uint64_t unit = fetch_unit(c->fetcher), bytes = wait_for_room(c), len;

	if (bytes == 0)
		return end;
	off -= off % unit;
	len = fetch_fit(c->fetcher, end - off, off, by_units ? unit : bytes);
	if (fetch_copy(c->fetcher, len, off, data_copied, c) != 0)
		request_ended(c, ENOMEM);
	return off + len;
}

/* Make zeros, of whole blocks, without asking. */
static void copy_zeros(struct copy *c, uint64_t len, uint64_t off)
{
	if (wait_for_room(c) > 0)
		request_ended(c, -layer_fill(c->layer, NULL, len, off, WAIT));
}

/* Maps */

/* Without an answer all of it is data. */
static void map_answered(struct origin_request *q)
{
	struct copy *c = (struct copy *)((char *)q - offsetof(struct copy, question));
	struct map *m = &c->map;

	m->extents = q->error ? 0 : q->extents;
	m->end = q->error ? q->off + q->len : q->off;
	for (unsigned i = 0; i < m->extents; i++)
		m->end += m->extent[i].len;
	atomic_store(&c->asking, false);
	request_ended(c, q->error == -ECANCELED ? ESHUTDOWN : 0);
}

/* Have the map that off lies in.  False if the copy is over. */
static bool have_map(struct copy *c, uint64_t off)
{
	uint64_t start = off - off % fetch_unit(c->fetcher), left = c->layer->size - start;

	if (off < c->map.end)
		return true;
	if (wait_for_room(c) == 0)
		return false;
	c->question = (struct origin_request){
		.priority = ORIGIN_COPY,
		.off = start,
		.len = left < MAP_BYTES ? left : MAP_BYTES,
		.extent = c->map.extent,
		.extents = MAP_EXTENTS,
		.done = map_answered,
	};
	c->map.off = start;
	atomic_store(&c->asking, true);
	origin_submit(c->origin, &c->question);
	pthread_mutex_lock(&c->lock);
	while (atomic_load(&c->asking))
		pthread_cond_wait(&c->changed, &c->lock);
	pthread_mutex_unlock(&c->lock);
	return true;
}

/* Whether the run at pos reads as zeros; *end is lowered to its end. */
static bool is_zero_at(const struct map *m, uint64_t pos, uint64_t *end)
{
	uint64_t at = m->off;

	for (unsigned i = 0; i < m->extents; at += m->extent[i++].len) {
		const struct extent *e = &m->extent[i];

		if (pos >= at + e->len)
			continue;
		if (at + e->len < *end)
			*end = at + e->len;
		return e->flags & NBD_STATE_ZERO;
	}
	if (*end > m->end)
		*end = m->end;
	return false;
}

/* The pass */

/* Copy the beginning of a run that is not held.  Returns where that ends. */
static uint64_t copy_part(struct copy *c, uint64_t off, uint64_t end, bool by_units)
{
	uint64_t len;

	if (!origin_tells_extents(c->origin))
		return copy_data(c, off, end, by_units);
	if (!have_map(c, off))
		return end;
	if (!is_zero_at(&c->map, off, &end))
		return copy_data(c, off, end, by_units);
	len = layer_whole(c->layer, end - off, off);
	if (len == 0)
		return copy_data(c, off, end, by_units);
	copy_zeros(c, len, off);
	return off + len;
}

/* Copy what is not held.  Returns whether the copy is to go on. */
static bool copy_pass(struct copy *c, bool by_units)
{
	bool over = false;

	c->map.off = c->map.end = 0;
	for (uint64_t off = 0, end; off < c->layer->size && !over; off = end) {
		uint64_t left = c->layer->size - off;
		bool held;

		end = off + layer_run(c->layer, left < STEP_BYTES_MAX ? left : STEP_BYTES_MAX, off,
				      &held);
		if (!held)
			end = copy_part(c, off, end, by_units);
		pthread_mutex_lock(&c->lock);
		over = copy_is_over(c);
		pthread_mutex_unlock(&c->lock);
	}
	pthread_mutex_lock(&c->lock);
	while (c->under_way > 0)
		pthread_cond_wait(&c->changed, &c->lock);
	over = copy_is_over(c);
	pthread_mutex_unlock(&c->lock);
	return !over;
}

/* What is missing after both passes. */
static void find_failures(struct copy *c)
{
	uint64_t size = c->layer->size, n;

	for (uint64_t off = 0; off < size; off += n) {
		bool held;

		n = layer_run(c->layer, size - off, off, &held);
		if (held)
			continue;
		pthread_mutex_lock(&c->lock);
		c->failed_blocks += bitmap_blocks(n);
		if (c->failures < COPY_FAILURES)
			c->failure[c->failures++] = (struct copy_failure){ off, n };
		else
			c->failures_more++;
		pthread_mutex_unlock(&c->lock);
	}
}

static void *copy_main(void *copy)
{
	struct copy *c = copy;
	bool complete, again;

	do {
		complete = copy_pass(c, false) &&
			   (layer_missing(c->layer) == 0 || copy_pass(c, true));
		if (complete)
			find_failures(c);
		pthread_mutex_lock(&c->lock);
		again = !complete && !copy_is_over(c);
		if (!again && layer_missing(c->layer) == 0)
			c->state = COPY_DONE;
		else if (!again)
			c->state = c->error || complete ? COPY_FAILED : COPY_IDLE;
		pthread_mutex_unlock(&c->lock);
	} while (again);
	c->ended(c->arg);
	return NULL;
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
	pthread_mutex_init(&c->lock, NULL);
	pthread_cond_init(&c->changed, NULL);
	return c;
}

void copy_free(struct copy *c)
{
	if (!c)
		return;
	if (c->has_thread)
		pthread_join(c->thread, NULL);
	pthread_cond_destroy(&c->changed);
	pthread_mutex_destroy(&c->lock);
	free(c);
}

/* Called with the lock, which a thread that has ended does not take any more. */
static void copy_begin(struct copy *c)
{
	if (c->has_thread)
		pthread_join(c->thread, NULL);
	c->state = COPY_RUNNING;
	c->window = WINDOW_START;
	c->least_delay = 0;
	c->failures = 0;
	c->failed_blocks = c->failures_more = 0;
	c->copied = c->rate = c->rate_copied = 0;
	c->rate_since = now_ms();
	c->error = thread_start(&c->thread, COPY_STACK, copy_main, c);
	c->has_thread = c->error == 0;
	if (c->error)
		c->state = COPY_FAILED;
}

void copy_start(struct copy *c, uint64_t request_bytes)
{
	bool failed;

	pthread_mutex_lock(&c->lock);
	c->wanted++;
	c->request_bytes = request_bytes ? request_bytes : REQUEST_BYTES;
	if (c->state != COPY_RUNNING)
		copy_begin(c);
	failed = c->state == COPY_FAILED;
	pthread_mutex_unlock(&c->lock);
	if (failed)
		c->ended(c->arg);
}

void copy_release(struct copy *c)
{
	pthread_mutex_lock(&c->lock);
	if (c->wanted > 0)
		c->wanted--;
	pthread_cond_signal(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

void copy_stop(struct copy *c)
{
	pthread_mutex_lock(&c->lock);
	c->wanted = 0;
	pthread_cond_signal(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

/* Called with the lock. */
static void measure_rate(struct copy *c)
{
	uint64_t now = now_ms(), since = now - c->rate_since;

	if (since < RATE_MS)
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
	status->error = c->error;
	status->rate = status->state == COPY_RUNNING ? c->rate : 0;
	status->failed_blocks = c->failed_blocks;
	status->failures = c->failures;
	status->failures_more = c->failures_more;
	memcpy(status->failure, c->failure, c->failures * sizeof(c->failure[0]));
	pthread_mutex_unlock(&c->lock);
}
