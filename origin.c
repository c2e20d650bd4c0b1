/*
 * origin.c - the proxy's connections to the remote server: see origin.h.
 *
 * One thread polls its bell and the links, also those that are being made.  Others leave it
 * requests and wishes in a mailbox, and ring.  It reads no more while too much of what it delivered
 * has not been put away; a clock stops meanwhile, so that nobody seems silent who is not listened to.
 *
 * The first link that is up serves clients, the others the background copy; a single one serves
 * all.  What a lost link owed goes back to the front of the queues.
 */
#define _GNU_SOURCE
#include "origin.h"

#include "link.h"
#include "log.h"
#include "util.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	ORIGIN_STACK = 128 * 1024,
	UNSTORED_MAX = 4 * 1024 * 1024,	/* delivered, and not put away */
	ROUNDS = 16,		/* of receiving from one link, or so many bytes of data: */
	ROUND_BYTES = 256 * 1024,	/* then it is the others' turn */
	BACKOFF_MIN = 100,	/* ms */
	BACKOFF_MAX = 5000,
	LINES_MAX = ORIGIN_CONNECTIONS_MAX + 1,
};

struct queue {
	struct origin_request *first, **last;
};

/* A place for a link, that may be up, or on its way there.  The last one is for a redirect's. */
struct line {
	struct link *link;
	bool up;		/* to the same disk as ever */
	uint64_t since;		/* it has been up; now_ms() */
	uint64_t deadline;	/* when to make one */
	unsigned backoff;	/* ms */
};

/* To another origin. */
struct redirect {
	struct link_target *target;	/* NULL: there is none */
	void (*done)(const char *error);
};

struct origin {
	pthread_t thread;
	bool started;			/* the thread; main thread */
	struct proto_offer limits;
	unsigned timeout_ms;

	/* The mailbox. */
	pthread_mutex_t lock;		/* guards what follows; a leaf */
	struct queue inbox;
	struct redirect redirect;	/* the thread ends it */
	struct link_target *target;	/* written by the thread, which reads it without the lock */
	char reason[PROTO_REASON_MAX];	/* why there is no link; likewise */
	bool cancelled, ended;

	struct bell bell;
	atomic_uint up;			/* links */
	atomic_uint_least64_t fetched;	/* bytes of data */
	atomic_bool tells_extents;
	atomic_size_t unstored;		/* bytes delivered, and not put away */
	atomic_uint waiting;		/* requests that are not done */

	/* The thread's own. */
	struct queue queue[ORIGIN_PRIORITIES];
	struct line line[LINES_MAX];
	struct pollfd pfd[1 + LINES_MAX];	/* the bell, the lines */
	unsigned lines;
	const struct link_target *next;	/* the redirect's */
	char change[PROTO_REASON_MAX];	/* room for find_change() */
	bool over;			/* cancelled */
	uint64_t stopped_at;		/* when the clock was stopped; 0: it goes */
	uint64_t stopped_ms;		/* for how long it was, before that */
};

/* Queues */

static void queue_init(struct queue *q)
{
	q->first = NULL;
	q->last = &q->first;
}

static void queue_add(struct queue *q, struct origin_request *r)
{
	r->next = NULL;
	*q->last = r;
	q->last = &r->next;
}

static struct origin_request *queue_take(struct queue *q)
{
	struct origin_request *r = q->first;

	if (!r)
		return NULL;
	q->first = r->next;
	if (!q->first)
		q->last = &q->first;
	return r;
}

static void queue_all(struct queue *q, struct origin_request *r)
{
	struct origin_request *next;

	for (; r; r = next) {
		next = r->next;
		queue_add(&q[r->priority], r);
	}
}

/* Put requests, newest first, back before those that wait. */
static void queue_again(struct origin *o, struct origin_request *r)
{
	struct origin_request *next;

	for (; r; r = next) {
		struct queue *q = &o->queue[r->priority];

		next = r->next;
		r->next = q->first;
		if (!q->first)
			q->last = &r->next;
		q->first = r;
	}
}

/* Requests that are done */

/* The asker may free it, or ask again, in done(). */
static void request_finish(struct origin *o, struct origin_request *r, int error)
{
	r->error = error;
	if (!error && !r->extent)
		atomic_fetch_add(&o->unstored, (size_t)r->len);
	atomic_fetch_sub(&o->waiting, 1);
	r->done(r);
}

static void requests_finish(struct origin *o, struct origin_request *r)
{
	struct origin_request *next;

	for (; r; r = next) {
		next = r->next;
		request_finish(o, r, r->error);
	}
}

/* The clock */

static bool is_clogged(struct origin *o)
{
	return atomic_load(&o->unstored) > UNSTORED_MAX;
}

static void set_clock(struct origin *o)
{
	bool full = is_clogged(o);

	if (full && !o->stopped_at) {
		o->stopped_at = now_ms();
	} else if (!full && o->stopped_at) {
		o->stopped_ms += now_ms() - o->stopped_at;
		o->stopped_at = 0;
	}
}

static uint64_t clock_ms(const struct origin *o)
{
	return (o->stopped_at ? o->stopped_at : now_ms()) - o->stopped_ms;
}

/* Links that come and go */

static struct link *first_link(const struct origin *o)
{
	for (unsigned i = 0; i < o->lines; i++)
		if (o->line[i].up)
			return o->line[i].link;
	return NULL;
}

/* Tell others which links there are. */
static void publish_links(struct origin *o)
{
	const struct link *first = first_link(o);
	unsigned up = 0;

	for (unsigned i = 0; i < o->lines; i++)
		up += o->line[i].up;
	if (first)
		atomic_store(&o->tells_extents, link_offer(first)->allocation);
	atomic_store(&o->up, up);
}

static void set_reason(struct origin *o, const char *reason)
{
	pthread_mutex_lock(&o->lock);
	snprintf(o->reason, sizeof(o->reason), "%s", reason);
	pthread_mutex_unlock(&o->lock);
}

/* Log a reason, once. */
static void complain(struct origin *o, const char *what, const char *reason)
{
	if (strcmp(reason, o->reason) == 0)
		return;
	log_error("origin %s: %s: %s", o->target->address, what, reason);
	set_reason(o, reason);
}

/* Try again later: sooner if it was fine for a while. */
static void back_off(struct line *line)
{
	uint64_t now = now_ms();

	if (line->up && now - line->since > BACKOFF_MAX)
		line->backoff = BACKOFF_MIN;
	line->deadline = now + line->backoff;
	line->backoff = line->backoff > BACKOFF_MAX / 2 ? BACKOFF_MAX : line->backoff * 2;
}

/* Of the attempt, or of the link. */
static void line_lose(struct origin *o, struct line *line, const char *reason)
{
	const char *what = "cannot connect";

	back_off(line);
	if (line->up) {
		line->up = false;
		publish_links(o);
		if (!first_link(o))
			set_reason(o, "");
		what = first_link(o) ? "one of the links lost" : "link lost";
	}
	complain(o, what, reason);
	queue_again(o, link_free(line->link));
	line->link = NULL;
}

/* Leave all that leads to the old one. */
static void hang_up(struct origin *o)
{
	for (unsigned i = 0; i < o->lines; i++) {
		queue_again(o, link_free(o->line[i].link));
		o->line[i] = (struct line){ .backoff = BACKOFF_MIN };
	}
	publish_links(o);
}

/* NULL, or why this is not the disk that it was. */
static const char *find_change(struct origin *o, const struct proto_offer *offer)
{
	const struct proto_offer *l = &o->limits;

	if (offer->size != l->size)
		snprintf(o->change, sizeof(o->change), "its size is %llu bytes, and must be %llu",
			 (unsigned long long)offer->size, (unsigned long long)l->size);
	else if (offer->min_block > l->min_block || offer->max_block < l->max_block)
		snprintf(o->change, sizeof(o->change),
			 "its block sizes are %lu to %lu bytes, and must allow %lu to %lu",
			 (unsigned long)offer->min_block, (unsigned long)offer->max_block,
			 (unsigned long)l->min_block, (unsigned long)l->max_block);
	else
		return NULL;
	return o->change;
}

static void line_up(struct origin *o, struct line *line, struct link *link)
{
	line->link = link;
	line->up = true;
	line->since = now_ms();
	publish_links(o);
}

/* Use a link from now on. */
static void line_use(struct origin *o, struct line *line, struct link *link)
{
	bool first = !first_link(o);

	line_up(o, line, link);
	if (!first)
		return;
	log_line("origin %s: connected, %llu bytes", o->target->address,
		 (unsigned long long)o->limits.size);
	set_reason(o, "");
}

/* Going over to another origin */

static struct line *redirect_line(struct origin *o)
{
	return &o->line[o->lines - 1];
}

static void redirect_end(struct origin *o, const char *error)
{
	struct redirect r;

	pthread_mutex_lock(&o->lock);
	r = o->redirect;
	o->redirect.target = NULL;
	pthread_mutex_unlock(&o->lock);
	o->next = NULL;
	r.done(error);
	link_free(redirect_line(o)->link);
	redirect_line(o)->link = NULL;
	link_target_free(r.target);
}

/* There is a link: leave the old origin. */
static void redirect_go(struct origin *o)
{
	struct link *link = redirect_line(o)->link;
	struct link_target *old = o->target;

	redirect_line(o)->link = NULL;
	hang_up(o);
	pthread_mutex_lock(&o->lock);
	o->target = o->redirect.target;
	o->redirect.target = old;
	pthread_mutex_unlock(&o->lock);
	line_use(o, o->line, link);
	redirect_end(o, NULL);
}

/* Attempts */

static void line_fail(struct origin *o, struct line *line, const char *reason)
{
	if (line == redirect_line(o))
		redirect_end(o, reason);
	else
		line_lose(o, line, reason);
}

/* More than one link is made only to a server that is up and allows it. */
static bool line_may_connect(struct origin *o, const struct line *line)
{
	const struct link *first = first_link(o);

	if (line == redirect_line(o))
		return o->next != NULL;
	return line == o->line || (first && link_offer(first)->flags & NBD_FLAG_CAN_MULTI_CONN);
}

static void line_advance(struct origin *o, struct line *line)
{
	const char *wrong = link_advance(line->link);

	if (!wrong && !link_offer(line->link))
		return;
	if (!wrong)
		wrong = find_change(o, link_offer(line->link));
	if (wrong)
		line_fail(o, line, wrong);
	else if (line == redirect_line(o))
		redirect_go(o);
	else
		line_use(o, line, line->link);
}

static void line_start(struct origin *o, struct line *line)
{
	line->link = link_new(line == redirect_line(o) ? o->next : o->target, o->timeout_ms);
	if (line->link)
		line_advance(o, line);
	else
		line_fail(o, line, "out of memory or descriptors");
}

/* The thread */

static void cancel_all(struct origin *o)
{
	struct origin_request *r;

	o->over = true;
	hang_up(o);
	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		while ((r = queue_take(&o->queue[i])))
			request_finish(o, r, -ECANCELED);
	if (o->next)
		redirect_end(o, "the origin is not needed any more");
}

/* Returns false when it is time to end. */
static bool origin_take_mail(struct origin *o)
{
	struct origin_request *arrived;
	bool cancelled, ended;

	if (!bell_answer(&o->bell))
		return true;
	pthread_mutex_lock(&o->lock);
	arrived = o->inbox.first;
	queue_init(&o->inbox);
	o->next = o->redirect.target;
	cancelled = o->cancelled;
	ended = o->ended;
	pthread_mutex_unlock(&o->lock);
	queue_all(o->queue, arrived);
	if (cancelled)
		cancel_all(o);
	return !ended;
}

/* The link for requests of that priority, or NULL if they must wait. */
static struct link *choose_link(const struct origin *o, enum origin_priority priority)
{
	struct link *first = first_link(o), *best = NULL;

	for (unsigned i = 0; i < o->lines && priority == ORIGIN_COPY; i++) {
		struct link *l = o->line[i].link;

		if (o->line[i].up && l != first && (!best || link_owes(l) < link_owes(best)))
			best = l;
	}
	if (!best)
		best = first;
	return best && link_has_room(best) ? best : NULL;
}

static void origin_ask(struct origin *o, struct link *l, struct origin_request *r, uint64_t now)
{
	r->sent = now_us();
	if (r->extent && !link_offer(l)->allocation)
		request_finish(o, r, -ENOTSUP);
	else
		link_ask(l, r, now);
}

/* Hand requests to the links, in the order of their priority. */
static void feed_links(struct origin *o)
{
	uint64_t now = clock_ms(o);
	struct link *l;

	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		while (o->queue[i].first && (l = choose_link(o, (enum origin_priority)i)))
			origin_ask(o, l, queue_take(&o->queue[i]), now);
}

/* Receive, for a while.  NULL, or why the link must be given up. */
static const char *line_receive(struct origin *o, struct line *line)
{
	const char *wrong = NULL;
	bool more = true;
	uint64_t sum = 0;

	for (unsigned i = 0; i < ROUNDS && sum < ROUND_BYTES && more && !wrong && !is_clogged(o); i++) {
		struct origin_request *finished;
		uint64_t bytes;

		wrong = link_receive(line->link, clock_ms(o), &finished, &more, &bytes);
		atomic_fetch_add(&o->fetched, bytes);
		sum += bytes;
		if (finished)
			line->backoff = BACKOFF_MIN;	/* it is of use */
		requests_finish(o, finished);
	}
	return wrong;
}

/* Send, and see whether it is still alive. */
static const char *line_check(struct origin *o, struct line *line, uint64_t *left)
{
	const char *wrong = line->up ? link_send(line->link) : NULL;

	if (!wrong && !(line->up && o->stopped_at))
		wrong = link_check(line->link, clock_ms(o), left);
	return wrong;
}

/* What is due.  False if a link was lost or begun. */
static bool line_tend(struct origin *o, struct line *line, uint64_t *left)
{
	uint64_t now = now_ms();
	const char *wrong;

	if (line->link) {
		wrong = line_check(o, line, left);
		if (wrong)
			line_fail(o, line, wrong);
		return !wrong;
	}
	if (!line_may_connect(o, line))
		return true;
	if (line->deadline <= now) {
		line_start(o, line);
		return false;
	}
	if (line->deadline - now < *left)
		*left = line->deadline - now;
	return true;
}

/* All that is to be done between two sleeps.  Returns for how long to sleep, in ms. */
static uint64_t work(struct origin *o)
{
	uint64_t left = UINT64_MAX;
	bool settled = true;

	set_clock(o);
	feed_links(o);
	for (unsigned i = 0; i < o->lines; i++)
		settled &= line_tend(o, &o->line[i], &left);
	return settled ? left : 0;
}

/* What to poll for. */
static void origin_prepare_poll(struct origin *o)
{
	for (unsigned i = 0; i < o->lines; i++) {
		const struct line *line = &o->line[i];
		struct pollfd *p = &o->pfd[i + 1];

		*p = line->link ? link_poll(line->link) : (struct pollfd){ .fd = -1 };
		if (line->up && o->stopped_at)
			p->events &= POLLOUT;
		if (!p->events)
			p->fd = -1;
	}
}

/* What poll() told of a link. */
static void line_turn(struct origin *o, struct line *line, short revents)
{
	const char *wrong = NULL;

	if (line->up && revents & ~POLLOUT)
		wrong = line_receive(o, line);
	else if (line->link && !line->up && revents)
		line_advance(o, line);
	if (wrong)
		line_lose(o, line, wrong);
}

static void *origin_main(void *arg)
{
	struct origin *o = arg;
	int n;

	while (origin_take_mail(o)) {
		uint64_t left = o->over ? UINT64_MAX : work(o);

		origin_prepare_poll(o);
		n = bell_poll(&o->bell, o->pfd, o->lines + 1, left > INT32_MAX ? -1 : (int)left);
		if (n < 0)
			log_fatal("cannot wait for %u descriptors: %s", o->lines + 1, strerror(-n));
		for (unsigned i = 0; n > 0 && i < o->lines; i++)
			line_turn(o, &o->line[i], o->pfd[i + 1].revents);
	}
	return NULL;
}

/* Opening and closing */

/* Wait until a link is up.  NULL, or why it never will be. */
static const char *wait_for_link(struct link *l)
{
	const char *wrong = link_advance(l);

	while (!wrong && !link_offer(l)) {
		uint64_t left = INT32_MAX;
		struct pollfd p;

		wrong = link_check(l, 0, &left);
		p = link_poll(l);
		if (!wrong && poll(&p, 1, (int)left) > 0)
			wrong = link_advance(l);
	}
	return wrong;
}

/* Make the first link.  NULL, or why there is none. */
static const char *connect_first(struct origin *o)
{
	struct link *l = o->line[0].link = link_new(o->target, o->timeout_ms);
	const char *wrong = l ? wait_for_link(l) : "out of memory or descriptors";

	if (wrong)
		return wrong;
	o->limits = *link_offer(l);
	line_up(o, o->line, l);
	return NULL;
}

bool origin_start(struct origin *o)
{
	int err = thread_start(&o->thread, ORIGIN_STACK, origin_main, o);

	o->started = err == 0;
	if (err)
		log_failure("cannot start a thread: %s", strerror(err));
	return err == 0;
}

/* 0 or -errno; to be freed in any case. */
static int origin_init(struct origin *o, const struct origin_options *options)
{
	assert(options->connections <= ORIGIN_CONNECTIONS_MAX);
	pthread_mutex_init(&o->lock, NULL);
	o->timeout_ms = options->timeout_ms;
	o->lines = options->connections + 1;
	for (unsigned i = 0; i < o->lines; i++)
		o->line[i].backoff = BACKOFF_MIN;
	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		queue_init(&o->queue[i]);
	queue_init(&o->inbox);
	o->bell.pipe[0] = o->bell.pipe[1] = -1;
	o->target = link_target_new(options->host, options->port, options->export_name);
	return o->target ? bell_init(&o->bell) : -ENOMEM;
}

static void origin_free(struct origin *o)
{
	hang_up(o);
	bell_free(&o->bell);
	pthread_mutex_destroy(&o->lock);
	link_target_free(o->target);
	free(o);
}

struct origin *origin_open(const struct origin_options *options)
{
	struct origin *o = calloc(1, sizeof(*o));
	int err = o ? origin_init(o, options) : -ENOMEM;
	const char *wrong = err ? strerror(-err) : connect_first(o);

	if (!wrong)
		return o;
	log_failure("cannot reach origin %s%s%s: %s",
		    o && o->target ? o->target->address : options->host,
		    *options->export_name ? ", export " : "", options->export_name, wrong);
	if (o)
		origin_free(o);
	return NULL;
}

const struct proto_offer *origin_limits(const struct origin *o)
{
	return &o->limits;
}

bool origin_tells_extents(struct origin *o)
{
	return atomic_load(&o->tells_extents);
}

void origin_submit(struct origin *o, struct origin_request *r)
{
	bool cancelled;

	assert(r->len > 0 && r->len <= (r->extent ? PROTO_STATUS_MAX : o->limits.max_block));
	assert(r->len <= o->limits.size && r->off <= o->limits.size - r->len);
	r->allocated = false;
	atomic_fetch_add(&o->waiting, 1);
	pthread_mutex_lock(&o->lock);
	cancelled = o->cancelled;
	if (!cancelled)
		queue_add(&o->inbox, r);
	pthread_mutex_unlock(&o->lock);
	if (cancelled)
		request_finish(o, r, -ECANCELED);
	else
		bell_ring(&o->bell);
}

void origin_stored(struct origin *o, uint64_t bytes)
{
	size_t before = atomic_fetch_sub(&o->unstored, (size_t)bytes);

	if (before > UNSTORED_MAX && before - bytes <= UNSTORED_MAX)
		bell_ring(&o->bell);
}

void origin_cancel(struct origin *o)
{
	pthread_mutex_lock(&o->lock);
	o->cancelled = true;
	pthread_mutex_unlock(&o->lock);
	bell_ring(&o->bell);
}

/* Leave it to the thread.  NULL, or why not.  Called with the lock. */
static const char *set_redirect(struct origin *o, const char *host, const char *port,
				const char *export_name)
{
	if (export_name && !proto_is_string(export_name))
		return "the name of the export is not UTF-8 or too long";
	if (o->cancelled)
		return "the origin is not needed any more";
	if (o->redirect.target)
		return "another one is under way";
	o->redirect.target = link_target_new(host, port, export_name ? export_name :
							 o->target->export_name);
	return o->redirect.target ? NULL : "out of memory or descriptors";
}

void origin_redirect(struct origin *o, const char *host, const char *port,
		     const char *export_name, void (*done)(const char *error))
{
	const char *error;

	pthread_mutex_lock(&o->lock);
	error = set_redirect(o, host, port, export_name);
	if (!error)
		o->redirect.done = done;
	pthread_mutex_unlock(&o->lock);
	if (error)
		done(error);
	else
		bell_ring(&o->bell);
}

void origin_status(struct origin *o, struct origin_status *status)
{
	size_t room = sizeof(status->export_name);

	pthread_mutex_lock(&o->lock);
	strcpy(status->address, o->target->address);
	strcpy(status->reason, o->reason);
	if (snprintf(status->export_name, room, "%s", o->target->export_name) >= (int)room)
		strcpy(status->export_name + room - 4, "...");
	pthread_mutex_unlock(&o->lock);
	status->fetched = atomic_load(&o->fetched);
	status->links = atomic_load(&o->up);
	status->up = status->links > 0;
	status->waiting = atomic_load(&o->waiting);
}

void origin_end(struct origin *o)
{
	bool ended;

	pthread_mutex_lock(&o->lock);
	ended = o->ended;
	o->cancelled = o->ended = true;
	pthread_mutex_unlock(&o->lock);
	if (ended || !o->started)
		return;
	bell_ring(&o->bell);
	pthread_join(o->thread, NULL);
}

void origin_close(struct origin *o)
{
	if (!o)
		return;
	origin_end(o);
	origin_free(o);
}
