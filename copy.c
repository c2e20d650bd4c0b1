/*
 * copy.c - the background copy: see copy.h.
 *
 * A job passes over the disk and asks for what is not held, in order.  Where the origin tells
 * extents, they are asked for first, and runs of zeros are made without transfer.  A second pass
 * asks for what could not be delivered, unit by unit: what fails then is told.
 *
 * The job ends when as many requests are under way as may be, or when it needs an answer, and is
 * submitted again when that is over.  How many may be under way is found by their delay: more, as
 * long as that costs no time, so that a long way to the origin is filled, and a short one is not
 * queued up on.
 */
#include "copy.h"

#include "util.h"

#include <errno.h>
#include <pthread.h>

enum {
	REQUEST_BYTES = 256 * 1024,	/* the default */
	MAP_BYTES = 1024 * 1024 * 1024,	/* asked about at once */

	WINDOW_MIN = 2 * 3,		/* thirds of requests under way */
	WINDOW_START = 64 * 3,
	WINDOW_MAX = 1024 * 3,
	QUEUE_US = 2000,		/* of delay that is allowed besides twice the least one */

	RATE_MS = 500,			/* the rate is that of so much time, at least */
};

/* Called with the lock. */
static bool copy_is_over(const struct copy *c)
{
	return c->status.error || c->wanted == 0;
}

/* Requests */

/*
 * Congestion shows in the delay.  A request without it lets one more be under way, so that the
 * window doubles in each round; one with it lets the window shrink a little.  Called with the lock.
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

/* A request has ended, for data or NULL.  An error, an errno, ends the copy. */
static void request_ended(struct copy *c, const struct origin_request *data, int error)
{
	bool go_on;

	pthread_mutex_lock(&c->lock);
	if (!c->status.error)
		c->status.error = error;
	if (data && !data->error && !error) {
		c->copied += data->len;
		adapt_window(c, now_us() - data->sent);
	}
	c->under_way--;
	go_on = c->rests && c->under_way <= c->window / 4;	/* of thirds: a quarter at a time */
	if (go_on)
		c->rests = false;
	pthread_mutex_unlock(&c->lock);
	if (go_on)
		worker_submit(&c->job, &c->lane);
}

static void data_copied(void *copy, const struct origin_request *ask, int error)
{
	if (ask->error == -EIO)
		error = 0;	/* the next pass asks again, or tells it */
	request_ended(copy, ask, error == -ECANCELED ? ESHUTDOWN : -error);
}

/* Maps */

/* What the last answer tells of the place where the job is, and up to where; or NULL. */
static const struct extent *known_extent(const struct copy *c, uint64_t *end)
{
	*end = c->question.off;
	for (unsigned i = 0; i < c->question.extents; i++) {
		*end += c->extent[i].len;
		if (c->off < *end)
			return &c->extent[i];
	}
	return NULL;
}

/* The job goes on.  Without an answer about that place all is data. */
static void map_answered(struct origin_request *q)
{
	struct copy *c = (struct copy *)((char *)q - offsetof(struct copy, question));
	uint64_t end;

	if (q->error || !known_extent(c, &end)) {
		q->extents = 1;
		c->extent[0] = (struct extent){ q->len, 0 };
	}
	request_ended(c, NULL, 0);
	worker_submit(&c->job, &c->lane);
}

/* Ask the origin about what follows.  The job ends with that. */
static void ask_map(struct copy *c)
{
	uint64_t off = c->off - c->off % origin_limits(c->fetcher->origin)->min_block;
	uint64_t left = c->layer->size - off;

	c->question = (struct origin_request){
		.priority = ORIGIN_COPY,
		.off = off,
		.len = left < MAP_BYTES ? left : MAP_BYTES,
		.extent = c->extent,
		.extents = COPY_EXTENTS,
		.done = map_answered,
	};
	origin_submit(c->fetcher->origin, &c->question);
}

/* The job */

/* Both passes are over, or the copy is.  Called with the lock. */
static void copy_end(struct copy *c)
{
	struct copy_status *s = &c->status;
	uint64_t size = copy_is_over(c) ? 0 : c->layer->size, n;

	for (uint64_t off = 0; off < size; off += n) {
		bool held;

		n = layer_run(c->layer, size - off, off, &held);
		if (held)
			continue;
		s->failed_blocks += bitmap_blocks(n);
		if (s->failures < COPY_FAILURES)
			s->failure[s->failures++] = (struct span){ off, n };
		else
			s->failures_more++;
	}
	if (layer_missing(c->layer) == 0 && !s->error)
		s->state = COPY_DONE;
	else
		s->state = s->error || c->wanted > 0 ? COPY_FAILED : COPY_IDLE;
}

/*
 * The most bytes of the next request, which counts as under way from now on; 0 if the job rests, or
 * the copy has ended.
 */
static uint64_t copy_goes_on(struct copy *c)
{
	uint64_t size = c->layer->size, most = 0;
	bool over, ended = false;

	pthread_mutex_lock(&c->lock);
	if (atomic_load(&c->layer->backend.failed) && !c->status.error)
		c->status.error = EIO;		/* what is stored now would not be believed */
	if (c->off == size && c->under_way == 0 && !c->by_units && layer_missing(c->layer) > 0) {
		c->by_units = true;
		c->off = 0;
		c->question.extents = 0;
	}
	over = copy_is_over(c) || c->off == size;
	if (c->under_way >= (over ? 1 : c->window / 3)) {
		c->rests = true;
	} else if (over) {
		copy_end(c);
		ended = true;
	} else {
		c->under_way++;
		most = c->by_units ? 1 : c->request_bytes;	/* a whole unit, at least */
	}
	pthread_mutex_unlock(&c->lock);
	if (ended)
		wake_main();
	return most;
}

/* Copy the beginning of a run that is not held.  False if the job goes on after an answer. */
static bool copy_part(struct copy *c, uint64_t len, uint64_t most)
{
	uint64_t end, whole;
	const struct extent *e = known_extent(c, &end);

	if (!e) {
		ask_map(c);
		return false;
	}
	if (len > end - c->off)
		len = end - c->off;
	whole = layer_whole(c->layer, len, c->off);
	if (e->flags & NBD_STATE_ZERO && whole > 0) {
		request_ended(c, NULL, -layer_fill(c->layer, NULL, whole, c->off, WAIT));
		c->off += whole;
		return true;
	}
	len = fetch_copy(c->fetcher, len, c->off, most);
	if (len == 0)
		request_ended(c, NULL, ENOMEM);
	c->off += len;
	return true;
}

static void copy_job(struct job *job)
{
	struct copy *c = (struct copy *)((char *)job - offsetof(struct copy, job));
	bool here = true;
	uint64_t most;

	while (here && (most = copy_goes_on(c)) > 0) {
		uint64_t left = c->layer->size - c->off, n;
		bool held;

		n = layer_run(c->layer, left < STEP_BYTES_MAX ? left : STEP_BYTES_MAX, c->off, &held);
		if (held) {
			request_ended(c, NULL, 0);
			c->off += n;
		} else {
			here = copy_part(c, n, most);
		}
	}
}

/* Control */

void copy_init(struct copy *c, struct fetcher *f)
{
	c->fetcher = f;
	f->copied = data_copied;
	f->copy = c;
	c->layer = f->layer;
	c->lane.single = true;
	c->job.run = copy_job;
	pthread_mutex_init(&c->lock, NULL);
}

/* From the beginning of the disk.  Called with the lock; there is no job. */
static void copy_begin(struct copy *c)
{
	c->status = (struct copy_status){ .state = COPY_RUNNING };
	c->window = WINDOW_START;
	c->least_delay = 0;
	c->copied = 0;
	c->rate_since = now_ms();
	c->off = 0;
	c->by_units = false;
	c->question.extents = 0;
}

void copy_start(struct copy *c, uint64_t request_bytes)
{
	bool begins;

	pthread_mutex_lock(&c->lock);
	c->wanted++;
	c->request_bytes = request_bytes ? request_bytes : REQUEST_BYTES;
	begins = c->status.state != COPY_RUNNING;
	if (begins)
		copy_begin(c);
	pthread_mutex_unlock(&c->lock);
	if (begins)
		worker_submit(&c->job, &c->lane);
}

/* The job sees that when it goes on, or when what is under way has ended. */
void copy_release(struct copy *c, bool all)
{
	pthread_mutex_lock(&c->lock);
	c->wanted -= all ? c->wanted : c->wanted > 0;
	pthread_mutex_unlock(&c->lock);
}

void copy_status(struct copy *c, struct copy_status *status)
{
	uint64_t now = now_ms();

	pthread_mutex_lock(&c->lock);
	if (now - c->rate_since >= RATE_MS) {
		c->status.rate = c->copied * 1000 / (now - c->rate_since);
		c->copied = 0;
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
