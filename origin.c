/*
 * origin.c - the proxy's connections to the remote server: see origin.h.
 *
 * One thread polls a pipe, the links, and attempts to make links.  Others leave it requests and
 * wishes in a mailbox, and write to the pipe only while it sleeps, as in loop.c.  It reads no
 * more while too much of what it delivered has not been put away; a clock stops meanwhile, so
 * that nobody seems silent who is not listened to.
 *
 * The first link that is up serves clients, the others the background copy; a single one serves
 * all.  What a lost link owed goes back to the front of the queues.
 */
#define _GNU_SOURCE
#include "origin.h"

#include "dial.h"
#include "link.h"
#include "util.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	ORIGIN_STACK = 128 * 1024,
	UNSTORED_MAX = 16 * 1024 * 1024,	/* delivered, and not put away */
	ROUNDS = 16,		/* of receiving from one link, or so many bytes of data: */
	ROUND_BYTES = 256 * 1024,	/* then it is the others' turn */
	BACKOFF_MIN = 100,	/* ms */
	BACKOFF_MAX = 5000,
	GRACE_MS = 1000,	/* after which an attempt that does not end is given up */
};

struct queue {
	struct origin_request *first, **last;
};

/* A place for a link: it is up, or an attempt is under way, or one will be. */
struct line {
	struct link *link;
	struct dial *dial;
	uint64_t deadline;	/* of the attempt; or when to make one; now_ms() */
	uint64_t since;		/* it has been up */
	unsigned backoff;	/* ms */
};

struct redirect {
	struct dial_target *target;
	struct dial *dial;
	uint64_t deadline;
	void (*done)(void *arg, const char *error);
	void *arg;
};

struct origin {
	pthread_t thread;
	bool started;			/* the thread; main thread */
	struct origin_limits limits;
	unsigned timeout_ms;

	/* The mailbox; see loop.c for mail and sleeping. */
	pthread_mutex_t lock;		/* guards what follows; a leaf */
	struct queue inbox;
	struct redirect *redirect;	/* one under way */
	struct dial_target *target;	/* written by the thread, which reads it without the lock */
	char reason[PROTO_REASON_MAX];	/* why there is no link; likewise */
	uint64_t fetched;		/* bytes of data */
	bool cancelled, ended;
	bool opened;			/* the first link is there; written before the thread is */

	int wake[2];
	atomic_bool mail, sleeping;
	atomic_uint up;			/* links */
	atomic_bool tells_extents;
	atomic_size_t unstored;		/* bytes delivered, and not put away */
	atomic_uint waiting;		/* requests that are not done */

	/* The thread's own. */
	struct queue queue[ORIGIN_PRIORITIES];
	struct line *line;
	struct pollfd *pfd;		/* the pipe, the lines, the redirect */
	unsigned lines;
	bool over;			/* cancelled */
	uint64_t stopped_at;		/* when the clock was stopped; 0: it goes */
	uint64_t stopped_ms;		/* for how long it was, before that */
};

static void wake(struct origin *o)
{
	atomic_store(&o->mail, true);
	if (atomic_exchange(&o->sleeping, false))
		poke_pipe(o->wake[1], 0);
}

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

/* Put requests, oldest first, back before those that wait. */
static void queue_again(struct origin *o, struct origin_request *r)
{
	struct queue again[ORIGIN_PRIORITIES];

	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		queue_init(&again[i]);
	queue_all(again, r);
	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++) {
		if (!again[i].first)
			continue;
		*again[i].last = o->queue[i].first;
		if (!o->queue[i].first)
			o->queue[i].last = again[i].last;
		o->queue[i].first = again[i].first;
	}
}

/* Requests that are done */

/* The asker may free it, or ask again, in done(). */
static void finish(struct origin *o, struct origin_request *r, int error)
{
	r->error = error;
	if (!error && !r->extent)
		atomic_fetch_add(&o->unstored, (size_t)r->len);
	atomic_fetch_sub(&o->waiting, 1);
	r->done(r);
}

static void finish_all(struct origin *o, struct origin_request *r)
{
	struct origin_request *next;

	for (; r; r = next) {
		next = r->next;
		finish(o, r, r->error);
	}
}

/* The clock */

static bool is_full(struct origin *o)
{
	return atomic_load(&o->unstored) > UNSTORED_MAX;
}

static void set_clock(struct origin *o)
{
	bool full = is_full(o);

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
		if (o->line[i].link)
			return o->line[i].link;
	return NULL;
}

/* Tell others which links there are. */
static void publish(struct origin *o)
{
	const struct link *first = first_link(o);
	unsigned up = 0;

	for (unsigned i = 0; i < o->lines; i++)
		up += o->line[i].link != NULL;
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

	if (line->link && now - line->since > BACKOFF_MAX)
		line->backoff = BACKOFF_MIN;
	line->deadline = now + line->backoff;
	line->backoff = line->backoff > BACKOFF_MAX / 2 ? BACKOFF_MAX : line->backoff * 2;
}

static void lose(struct origin *o, struct line *line, const char *reason)
{
	struct link *link = line->link;

	back_off(line);
	line->link = NULL;
	publish(o);
	if (!first_link(o))
		set_reason(o, "");
	complain(o, first_link(o) ? "one of the links lost" : "link lost", reason);
	queue_again(o, link_free(link));
}

/* NULL, or why this is not the disk that it was. */
static const char *find_change(const struct origin *o, const struct proto_offer *offer,
			       char *reason)
{
	const struct origin_limits *l = &o->limits;

	if (offer->size != l->size)
		snprintf(reason, PROTO_REASON_MAX, "its size is %llu bytes, and must be %llu",
			 (unsigned long long)offer->size, (unsigned long long)l->size);
	else if (offer->min_block > l->min_block || offer->max_block < l->max_block)
		snprintf(reason, PROTO_REASON_MAX,
			 "its block sizes are %lu to %lu bytes, and must allow %lu to %lu",
			 (unsigned long)offer->min_block, (unsigned long)offer->max_block,
			 (unsigned long)l->min_block, (unsigned long)l->max_block);
	else
		return NULL;
	return reason;
}

/* A link is up.  Takes fd over; false if out of memory. */
static bool attach(struct origin *o, struct line *line, int fd, const struct proto_offer *offer)
{
	bool first = !first_link(o);

	line->link = link_new(fd, offer);
	if (!line->link)
		return false;
	line->since = now_ms();
	publish(o);
	if (first && o->opened) {
		log_line("origin %s: connected, %llu bytes", o->target->address,
			 (unsigned long long)offer->size);
		set_reason(o, "");
	}
	return true;
}

/*
 * The socket of an attempt that has ended, if it leads to the same disk; or -1, and why, in
 * reason of PROTO_REASON_MAX bytes.
 */
static int take_socket(const struct origin *o, struct dial *dial, struct proto_offer *offer,
		       char *reason)
{
	int fd = dial_take(dial, offer, reason);

	if (fd >= 0 && find_change(o, offer, reason)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static void end_dial(struct origin *o, struct line *line)
{
	char reason[PROTO_REASON_MAX];
	struct proto_offer offer;
	int fd = take_socket(o, line->dial, &offer, reason);

	dial_free(line->dial);
	line->dial = NULL;
	if (fd >= 0 && attach(o, line, fd, &offer))
		return;
	back_off(line);
	complain(o, "cannot connect", fd < 0 ? reason : "out of memory");
}

/* More than one link is made only to a server that is up and allows it. */
static bool may_dial(const struct origin *o, const struct line *line)
{
	const struct link *first = first_link(o);

	return line == o->line || (first && link_offer(first)->flags & NBD_FLAG_CAN_MULTI_CONN);
}

static void start_dial(struct origin *o, struct line *line)
{
	line->dial = dial_start(o->target, o->timeout_ms);
	if (line->dial) {
		line->deadline = now_ms() + o->timeout_ms + GRACE_MS;
		return;
	}
	back_off(line);
	complain(o, "cannot connect", "out of memory or descriptors");
}

/* Going over to another origin */

static struct redirect *get_redirect(struct origin *o)
{
	struct redirect *r;

	pthread_mutex_lock(&o->lock);
	r = o->redirect;
	pthread_mutex_unlock(&o->lock);
	return r;
}

static void free_redirect(struct redirect *r)
{
	dial_free(r->dial);
	dial_target_free(r->target);
	free(r);
}

static void end_redirect(struct origin *o, struct redirect *r, const char *error)
{
	pthread_mutex_lock(&o->lock);
	o->redirect = NULL;
	pthread_mutex_unlock(&o->lock);
	r->done(r->arg, error);
	free_redirect(r);
}

/* Leave all that leads to the old one. */
static void hang_up(struct origin *o)
{
	for (unsigned i = 0; i < o->lines; i++) {
		struct line *line = &o->line[i];

		if (line->link)
			queue_again(o, link_free(line->link));
		dial_free(line->dial);
		*line = (struct line){ .backoff = BACKOFF_MIN };
	}
	publish(o);
}

static void change_target(struct origin *o, struct redirect *r)
{
	struct dial_target *old = o->target;

	pthread_mutex_lock(&o->lock);
	o->target = r->target;
	pthread_mutex_unlock(&o->lock);
	r->target = old;
}

static void try_redirect(struct origin *o, struct redirect *r)
{
	char reason[PROTO_REASON_MAX];
	struct proto_offer offer;
	int fd = take_socket(o, r->dial, &offer, reason);

	if (fd < 0) {
		end_redirect(o, r, reason);
		return;
	}
	hang_up(o);
	change_target(o, r);
	attach(o, o->line, fd, &offer);
	end_redirect(o, r, NULL);
}

/* The thread */

static void cancel_all(struct origin *o)
{
	struct redirect *redirect = get_redirect(o);
	struct origin_request *r;

	o->over = true;
	hang_up(o);
	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		while ((r = queue_take(&o->queue[i])))
			finish(o, r, -ECANCELED);
	if (redirect)
		end_redirect(o, redirect, "the origin is not needed any more");
}

/* Returns false when it is time to end. */
static bool take_mail(struct origin *o)
{
	struct origin_request *arrived;
	bool cancelled, ended;

	if (!atomic_exchange(&o->mail, false))
		return true;
	pthread_mutex_lock(&o->lock);
	arrived = o->inbox.first;
	queue_init(&o->inbox);
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

		if (l && l != first && (!best || link_owes(l) < link_owes(best)))
			best = l;
	}
	if (!best)
		best = first;
	return best && link_has_room(best) ? best : NULL;
}

static void ask(struct origin *o, struct link *l, struct origin_request *r, uint64_t now)
{
	r->sent = now_us();
	if (r->extent && !link_offer(l)->allocation)
		finish(o, r, -ENOTSUP);
	else
		link_ask(l, r, now);
}

/* Hand requests to the links, in the order of their priority. */
static void feed(struct origin *o)
{
	uint64_t now = clock_ms(o);
	struct link *l;

	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		while (o->queue[i].first && (l = choose_link(o, (enum origin_priority)i)))
			ask(o, l, queue_take(&o->queue[i]), now);
}

static void count_bytes(struct origin *o, uint64_t bytes)
{
	pthread_mutex_lock(&o->lock);
	o->fetched += bytes;
	pthread_mutex_unlock(&o->lock);
}

/* Receive, for a while.  NULL, or why the link must be given up. */
static const char *receive(struct origin *o, struct line *line)
{
	const char *wrong = NULL;
	bool more = true;
	uint64_t sum = 0;

	for (unsigned i = 0; i < ROUNDS && sum < ROUND_BYTES && more && !wrong && !is_full(o); i++) {
		struct origin_request *finished;
		uint64_t bytes;

		wrong = link_receive(line->link, clock_ms(o), &finished, &more, &bytes);
		count_bytes(o, bytes);
		sum += bytes;
		if (finished)
			line->backoff = BACKOFF_MIN;	/* it is of use */
		finish_all(o, finished);
	}
	return wrong;
}

static void turn_line(struct origin *o, struct line *line, short revents)
{
	const char *wrong = NULL;

	if (line->dial && revents)
		end_dial(o, line);
	if (!line->link)
		return;
	if (revents & ~POLLOUT)
		wrong = receive(o, line);
	if (wrong)
		lose(o, line, wrong);
}

/* Look after a link.  False if it was lost. */
static bool tend_link(struct origin *o, struct line *line, uint64_t *left)
{
	const char *wrong = link_send(line->link);

	if (!wrong && !o->stopped_at)
		wrong = link_check(line->link, clock_ms(o), o->timeout_ms, left);
	if (wrong)
		lose(o, line, wrong);
	return !wrong;
}

/* End an attempt, or make one, if it is time.  False if that happened. */
static bool tend_dial(struct origin *o, struct line *line, uint64_t *left)
{
	uint64_t now = now_ms();

	if (!line->dial && !may_dial(o, line))
		return true;
	if (line->deadline > now) {
		if (line->deadline - now < *left)
			*left = line->deadline - now;
		return true;
	}
	if (line->dial)
		end_dial(o, line);
	else
		start_dial(o, line);
	return false;
}

/* False if the redirect has ended. */
static bool tend_redirect(struct origin *o, struct redirect *r, uint64_t *left)
{
	uint64_t now = now_ms();

	if (r->deadline <= now) {
		try_redirect(o, r);
		return false;
	}
	if (r->deadline - now < *left)
		*left = r->deadline - now;
	return true;
}

/* All that is to be done between two sleeps.  Returns for how long to sleep, in ms. */
static uint64_t work(struct origin *o)
{
	struct redirect *redirect = get_redirect(o);
	uint64_t left = UINT64_MAX;
	bool settled = true;

	set_clock(o);
	feed(o);
	for (unsigned i = 0; i < o->lines; i++) {
		struct line *line = &o->line[i];

		settled &= line->link ? tend_link(o, line, &left) : tend_dial(o, line, &left);
	}
	if (redirect)
		settled &= tend_redirect(o, redirect, &left);
	return settled ? left : 0;
}

/* What to poll for. */
static void prepare_poll(struct origin *o)
{
	const struct redirect *redirect = get_redirect(o);
	struct pollfd *p = o->pfd;

	*p++ = (struct pollfd){ .fd = o->wake[0], .events = POLLIN };
	for (unsigned i = 0; i < o->lines; i++, p++) {
		const struct line *line = &o->line[i];

		p->fd = line->link ? link_fd(line->link) : line->dial ? dial_fd(line->dial) : -1;
		p->events = line->link ? link_events(line->link) : POLLIN;
		if (line->link && o->stopped_at)
			p->events &= POLLOUT;
		if (!p->events)
			p->fd = -1;
	}
	*p = (struct pollfd){ .fd = redirect ? dial_fd(redirect->dial) : -1, .events = POLLIN };
}

/* Sleep until something happens, unless there is mail. */
static void sleep_in_poll(struct origin *o, uint64_t left)
{
	int timeout = left > INT32_MAX ? -1 : (int)left, n;

	atomic_store(&o->sleeping, true);
	if (atomic_load(&o->mail))
		timeout = 0;
	n = poll(o->pfd, o->lines + 2, timeout);
	atomic_store(&o->sleeping, false);
	if (n > 0 && o->pfd[0].revents)
		drain_pipe(o->wake[0]);
	for (unsigned i = 0; n <= 0 && i < o->lines + 2; i++)
		o->pfd[i].revents = 0;
}

static void turn_ready(struct origin *o)
{
	struct redirect *redirect = get_redirect(o);

	for (unsigned i = 0; i < o->lines; i++)
		turn_line(o, &o->line[i], o->pfd[i + 1].revents);
	if (redirect && o->pfd[o->lines + 1].revents)
		try_redirect(o, redirect);
}

static void *origin_main(void *arg)
{
	struct origin *o = arg;

	while (take_mail(o)) {
		uint64_t left = o->over ? UINT64_MAX : work(o);

		prepare_poll(o);
		sleep_in_poll(o, left);
		turn_ready(o);
	}
	return NULL;
}

/* Opening and closing */

/* Wait until the attempt has ended or its time is over. */
static void wait_for_dial(struct dial *dial, unsigned timeout_ms)
{
	struct pollfd p = { .fd = dial_fd(dial), .events = POLLIN };
	uint64_t end = now_ms() + timeout_ms + GRACE_MS, now;

	while ((now = now_ms()) < end && poll(&p, 1, (int)(end - now)) < 0 && errno == EINTR)
		;
}

/* Make the first link.  False, and why, in reason. */
static bool connect_first(struct origin *o, char *reason)
{
	struct dial *dial = dial_start(o->target, o->timeout_ms);
	struct proto_offer offer;
	int fd;

	snprintf(reason, PROTO_REASON_MAX, "out of memory or descriptors");
	if (!dial)
		return false;
	wait_for_dial(dial, o->timeout_ms);
	fd = dial_take(dial, &offer, reason);
	dial_free(dial);
	if (fd < 0)
		return false;
	o->limits.size = offer.size;
	o->limits.min_block = offer.min_block;
	o->limits.max_block = offer.max_block;
	return attach(o, o->line, fd, &offer);
}

bool origin_start(struct origin *o)
{
	pthread_attr_t attr;
	int err;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, ORIGIN_STACK);
	err = pthread_create(&o->thread, &attr, origin_main, o);
	pthread_attr_destroy(&attr);
	o->started = err == 0;
	if (err)
		log_failure("cannot start a thread: %s", strerror(err));
	return err == 0;
}

static struct origin *make_origin(const struct origin_options *options)
{
	struct origin *o = calloc(1, sizeof(*o));

	if (!o)
		return NULL;
	pthread_mutex_init(&o->lock, NULL);
	o->wake[0] = o->wake[1] = -1;
	o->timeout_ms = options->timeout_ms;
	o->lines = options->connections;
	o->line = calloc(o->lines, sizeof(*o->line));
	o->pfd = calloc(o->lines + 2, sizeof(*o->pfd));
	o->target = dial_target_new(options->host, options->port, options->export_name);
	for (unsigned i = 0; o->line && i < o->lines; i++)
		o->line[i].backoff = BACKOFF_MIN;
	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		queue_init(&o->queue[i]);
	queue_init(&o->inbox);
	return o;
}

static void free_origin(struct origin *o)
{
	if (!o)
		return;
	if (o->line)
		hang_up(o);
	for (unsigned i = 0; i < 2; i++)
		if (o->wake[i] >= 0)
			close(o->wake[i]);
	pthread_mutex_destroy(&o->lock);
	dial_target_free(o->target);
	free(o->line);
	free(o->pfd);
	free(o);
}

struct origin *origin_open(const struct origin_options *options)
{
	char reason[PROTO_REASON_MAX] = "out of memory";
	struct origin *o = make_origin(options);
	int err = o && o->line && o->pfd && o->target ? make_pipe(o->wake) : -ENOMEM;

	if (!err && connect_first(o, reason)) {
		o->opened = true;
		return o;
	}
	log_failure("cannot reach origin %s%s%s: %s",
		    o && o->target ? o->target->address : options->host,
		    *options->export_name ? ", export " : "", options->export_name,
		    err ? strerror(-err) : reason);
	free_origin(o);
	return NULL;
}

const struct origin_limits *origin_limits(const struct origin *o)
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
		finish(o, r, -ECANCELED);
	else
		wake(o);
}

void origin_stored(struct origin *o, uint64_t bytes)
{
	size_t before = atomic_fetch_sub(&o->unstored, (size_t)bytes);

	if (before > UNSTORED_MAX && before - bytes <= UNSTORED_MAX)
		wake(o);
}

void origin_cancel(struct origin *o)
{
	pthread_mutex_lock(&o->lock);
	o->cancelled = true;
	pthread_mutex_unlock(&o->lock);
	wake(o);
}

/* NULL if out of memory or descriptors. */
static struct redirect *make_redirect(struct origin *o, struct dial_target *target)
{
	struct redirect *r = calloc(1, sizeof(*r));

	if (!r || !target) {
		dial_target_free(target);
		free(r);
		return NULL;
	}
	r->target = target;
	r->dial = dial_start(target, o->timeout_ms);
	r->deadline = now_ms() + o->timeout_ms + GRACE_MS;
	if (!r->dial) {
		free_redirect(r);
		return NULL;
	}
	return r;
}

/* Another address; without a name, the export keeps its own. */
static struct dial_target *new_target(struct origin *o, const char *host, const char *port,
				      const char *export_name)
{
	struct dial_target *target;

	pthread_mutex_lock(&o->lock);
	if (!export_name)
		export_name = o->target->export_name;
	target = dial_target_new(host, port, export_name);
	pthread_mutex_unlock(&o->lock);
	return target;
}

/* Give it to the thread.  NULL, or why not. */
static const char *hand_over(struct origin *o, struct redirect *r)
{
	const char *error = NULL;

	pthread_mutex_lock(&o->lock);
	if (o->cancelled)
		error = "the origin is not needed any more";
	else if (o->redirect)
		error = "another one is under way";
	else
		o->redirect = r;
	pthread_mutex_unlock(&o->lock);
	return error;
}

void origin_redirect(struct origin *o, const char *host, const char *port,
		     const char *export_name, void (*done)(void *arg, const char *error),
		     void *arg)
{
	const char *error = "the name of the export is not UTF-8 or too long";
	struct redirect *r;

	if (export_name && !proto_is_string(export_name)) {
		done(arg, error);
		return;
	}
	r = make_redirect(o, new_target(o, host, port, export_name));
	if (!r) {
		done(arg, "out of memory or descriptors");
		return;
	}
	r->done = done;
	r->arg = arg;
	error = hand_over(o, r);
	if (error) {
		done(arg, error);
		free_redirect(r);
	} else {
		wake(o);
	}
}

/* Copy a string, shortened if need be. */
static void copy_short(char *to, size_t room, const char *from)
{
	if ((size_t)snprintf(to, room, "%s", from) >= room)
		strcpy(to + room - 4, "...");
}

void origin_status(struct origin *o, struct origin_status *status)
{
	pthread_mutex_lock(&o->lock);
	copy_short(status->address, sizeof(status->address), o->target->address);
	copy_short(status->export_name, sizeof(status->export_name), o->target->export_name);
	copy_short(status->reason, sizeof(status->reason), o->reason);
	status->fetched = o->fetched;
	pthread_mutex_unlock(&o->lock);
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
	wake(o);
	pthread_join(o->thread, NULL);
}

void origin_close(struct origin *o)
{
	if (!o)
		return;
	origin_end(o);
	free_origin(o);
}
