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
#include "log.h"
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

	WINDOW_MIN = 2 * 3,		/* thirds of requests under way */
	WINDOW_START = 64 * 3,
	WINDOW_MAX = 1024 * 3,
	QUEUE_US = 2000,		/* of delay that is allowed besides twice the least one */

	RATE_MS = 500,			/* the rate is that of so much time, at least */
};

/* What the origin told about a range, from off on. */
struct map {
	uint64_t off;
	unsigned next, extents;		/* next is the one at off */
	struct extent extent[MAP_EXTENTS];
};

struct copy {
	struct fetcher *fetcher;
	struct layer *layer;		/* the fetcher's */
	atomic_bool ended;		/* since copy_has_ended() */
	pthread_t thread;
	bool has_thread;		/* to be joined; main thread */

	pthread_mutex_t lock;		/* guards what follows; a leaf */
	pthread_cond_t changed;		/* there is room, or the thread has nothing to wait for */
	unsigned wanted;		/* by so many */
	struct copy_status status;
	uint64_t request_bytes;
	unsigned under_way, window;	/* requests; the window counts in thirds */
	uint64_t least_delay;		/* microseconds; 0: not known */
	uint64_t copied, rate_copied, rate_since;	/* bytes, and now_ms() */

	bool asking;			/* about the map, which is the answer's meanwhile */

	/* The thread's own. */
	struct map map;
	struct origin_request question;
};

/* Called with the lock. */
static bool copy_is_over(const struct copy *c)
{
	return c->status.error || c->wanted == 0;
}

/* Requests */

/*
 * Congestion shows in the delay.  A request without it lets one more be under way, so that the
 * window doubles in each round; one with it lets the window shrink a little.
 */
static void adapt_window(struct copy *c, uint64_t delay)
{
	if (!c->least_delay || delay < c->least_delay)
		c->least_delay = delay;
	if (delay > 2 * c->least_delay + QUEUE_US)
		c->window -= c->window > WINDOW_MIN ? 1 : 0;
	else
		c->window += c->window < WINDOW_MAX ? 3 : 0;
}

/* A request has ended; an error, an errno, ends the copy. */
static void request_ended(struct copy *c, int error)
{
	pthread_mutex_lock(&c->lock);
	if (!c->status.error)
		c->status.error = error;
	c->under_way--;
	if (c->under_way <= c->window / 4 || copy_is_over(c))	/* of thirds: a quarter at a time */
		pthread_cond_signal(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

/* Wait until one more request may be under way.  Its most bytes; 0 if the copy is over. */
static uint64_t wait_for_room(struct copy *c)
{
	uint64_t bytes = 0;

	pthread_mutex_lock(&c->lock);
	while (!copy_is_over(c) && c->under_way >= c->window / 3)
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

/* Ask for data from off on, up to end.  Returns as copy_part(). */
static uint64_t copy_data(struct copy *c, uint64_t off, uint64_t end, bool by_units)
{
	uint64_t bytes = wait_for_room(c), to;

	if (bytes == 0)
		return c->layer->size;
	to = fetch_copy(c->fetcher, end - off, off, by_units ? 1 : bytes);
	if (to == 0)
		request_ended(c, ENOMEM);
	return to ? off + to : end;
}

/* Maps */

static void map_answered(struct origin_request *q)
{
	struct copy *c = (struct copy *)((char *)q - offsetof(struct copy, question));

	c->map.extents = q->extents;
	if (q->error) {		/* without an answer all of it is data */
		c->map.extents = 1;
		c->map.extent[0] = (struct extent){ q->len, 0 };
	}
	pthread_mutex_lock(&c->lock);
	c->asking = false;
	pthread_cond_signal(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

/* Ask the origin about what follows, and wait for that. */
static void ask_map(struct copy *c, uint64_t off)
{
	uint64_t left;

	c->map.next = 0;
	c->map.off = off - off % origin_limits(c->fetcher->origin)->min_block;
	left = c->layer->size - c->map.off;
	c->question = (struct origin_request){
		.priority = ORIGIN_COPY,
		.off = c->map.off,
		.len = left < MAP_BYTES ? left : MAP_BYTES,
		.extent = c->map.extent,
		.extents = MAP_EXTENTS,
		.done = map_answered,
	};
	c->asking = true;
	origin_submit(c->fetcher->origin, &c->question);
	pthread_mutex_lock(&c->lock);
	while (c->asking)
		pthread_cond_wait(&c->changed, &c->lock);
	pthread_mutex_unlock(&c->lock);
}

/* The known extent that off lies in; or NULL. */
static const struct extent *extent_at(struct map *m, uint64_t off)
{
	while (m->next < m->extents && off >= m->off + m->extent[m->next].len)
		m->off += m->extent[m->next++].len;
	return m->next < m->extents ? &m->extent[m->next] : NULL;
}

/* The pass */

/* Copy the beginning of a run that is not held.  Returns its end; the disk's if all is over. */
static uint64_t copy_part(struct copy *c, uint64_t off, uint64_t end, bool by_units)
{
	const struct extent *e = NULL;	/* also if it told of less than a block */
	uint64_t len;

	if (origin_tells_extents(c->fetcher->origin)) {
		if (!extent_at(&c->map, off))
			ask_map(c, off);
		e = extent_at(&c->map, off);
	}
	if (e && end > c->map.off + e->len)
		end = c->map.off + e->len;
	len = layer_whole(c->layer, end - off, off);
	if (!e || !(e->flags & NBD_STATE_ZERO) || len == 0)
		return copy_data(c, off, end, by_units);
	if (wait_for_room(c) == 0)
		return c->layer->size;
	request_ended(c, -layer_fill(c->layer, NULL, len, off, WAIT));
	return off + len;
}

/* Copy what is not held.  Returns whether the copy is to go on. */
static bool copy_pass(struct copy *c, bool by_units)
{
	uint64_t size = c->layer->size, end;
	bool held, over;

	c->map.extents = 0;
	for (uint64_t off = 0; off < size; off = end) {
		end = size - off < STEP_BYTES_MAX ? size : off + STEP_BYTES_MAX;
		end = off + layer_run(c->layer, end - off, off, &held);
		if (!held)
			end = copy_part(c, off, end, by_units);
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
	struct copy_status *s = &c->status;
	uint64_t size = c->layer->size, n;

	for (uint64_t off = 0; off < size; off += n) {
		bool held;

		n = layer_run(c->layer, size - off, off, &held);
		if (held)
			continue;
		pthread_mutex_lock(&c->lock);
		s->failed_blocks += bitmap_blocks(n);
		if (s->failures < COPY_FAILURES)
			s->failure[s->failures++] = (struct span){ off, n };
		else
			s->failures_more++;
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
			c->status.state = COPY_DONE;
		else if (!again)
			c->status.state = c->status.error || complete ? COPY_FAILED : COPY_IDLE;
		pthread_mutex_unlock(&c->lock);
	} while (again);
	atomic_store(&c->ended, true);
	wake_main();
	return NULL;
}

/* Control */

struct copy *copy_new(struct fetcher *f)
{
	struct copy *c = not_null(calloc(1, sizeof(*c)));

	c->fetcher = f;
	f->copied = data_copied;
	f->copy = c;
	c->layer = f->layer;
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
	int err;

	if (c->has_thread)
		pthread_join(c->thread, NULL);
	c->status = (struct copy_status){ .state = COPY_RUNNING };
	c->window = WINDOW_START;
	c->least_delay = 0;
	c->copied = c->rate_copied = 0;
	c->rate_since = now_ms();
	err = thread_start(&c->thread, COPY_STACK, copy_main, c);
	c->has_thread = err == 0;
	if (err) {
		c->status.state = COPY_FAILED;
		c->status.error = err;
		atomic_store(&c->ended, true);
		wake_main();
	}
}

void copy_start(struct copy *c, uint64_t request_bytes)
{
	pthread_mutex_lock(&c->lock);
	c->wanted++;
	c->request_bytes = request_bytes ? request_bytes : REQUEST_BYTES;
	if (c->status.state != COPY_RUNNING)
		copy_begin(c);
	pthread_mutex_unlock(&c->lock);
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

void copy_status(struct copy *c, struct copy_status *status)
{
	uint64_t now = now_ms();

	pthread_mutex_lock(&c->lock);
	if (now - c->rate_since >= RATE_MS) {
		c->status.rate = (c->copied - c->rate_copied) * 1000 / (now - c->rate_since);
		c->rate_copied = c->copied;
		c->rate_since = now;
	}
	*status = c->status;
	/* What was asked for already may still arrive, but nobody waits for it. */
	if (status->state == COPY_RUNNING && c->wanted == 0)
		status->state = COPY_IDLE;
	if (status->state != COPY_RUNNING)
		status->rate = 0;
	pthread_mutex_unlock(&c->lock);
}

bool copy_has_ended(struct copy *c)
{
	return atomic_exchange(&c->ended, false);
}
