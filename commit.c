/*
 * commit.c - make durable, once for all who wait: see commit.h.
 *
 * A FLUSH has to wait for a commit that begins after it came.  While one runs, those who come
 * gather for the next, so that any number of clients costs two at a time.
 *
 * Whoever commits remembers a loss: the kernel tells of lost pages once, and a second try would say
 * that all is well.
 */
#include "commit.h"

#include "backend.h"
#include "log.h"
#include "util.h"
#include "worker.h"

#include <assert.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum { COMMIT_MS = 1000 };

static atomic_bool has_lost;

bool commit_has_lost(void)
{
	return atomic_load(&has_lost);
}

static void tell(const struct committer *c, enum log_level level, const char *state, const char *more)
{
	const char *name = c->job.lane ? c->job.lane->name : "";

	log_at(level, "%s%s%s is %s%s", name, *name ? ": " : "", c->what, state, more);
}

void committer_lost(struct committer *c, int err)
{
	char more[512];

	if (atomic_exchange(&c->lost, true))
		return;
	atomic_store(&has_lost, true);
	snprintf(more, sizeof(more), ": %s; %s", strerror(-err), c->consequence);
	tell(c, LOG_ERROR, "not on stable storage", more);
}

/* An error of the moment is told once, and again when there was none in between. */
static void note(struct committer *c, int err, bool last)
{
	char more[128];

	snprintf(more, sizeof(more), ": %s%s", strerror(-err), last ? "" : "; trying again");
	if (err && (last || !c->told))
		tell(c, LOG_ERROR, "not committed", more);
	if (!err && c->told)
		tell(c, LOG_EVENT, "committed again", "");
	c->told = err != 0;
}

static int run_commit(struct committer *c, bool last)
{
	bool lost = false;
	int err = c->commit(c, &lost);

	if (lost) {
		committer_lost(c, err);
		return err;
	}
	note(c, err, last);
	if (err && !last)
		committer_soon(c);
	return err;
}

int committer_finish(struct committer *c)
{
	return run_commit(c, true);
}

static void run_job(struct job *job)
{
	struct committer *c = (struct committer *)((char *)job - offsetof(struct committer, job));

	for (;;) {
		struct request *r, *next;
		int error;

		pthread_mutex_lock(&c->lock);
		r = c->waiting;
		c->waiting = NULL;
		c->running = c->wanted;
		c->wanted = false;
		if (!c->running) {
			pthread_mutex_unlock(&c->lock);
			return;
		}
		pthread_mutex_unlock(&c->lock);
		error = run_commit(c, false);
		for (; r; r = next) {
			next = r->next;
			request_done(r, error);
		}
	}
}

/* Have a commit begin after this call; r, if there is one, waits for it. */
static void want(struct committer *c, struct request *r)
{
	bool start;

	pthread_mutex_lock(&c->lock);
	if (r) {
		r->next = c->waiting;
		c->waiting = r;
	}
	c->wanted = true;
	start = !c->running;
	c->running = true;
	if (start && r)
		c->job.lane = r->job.lane;	/* all who flush this are of one export */
	pthread_mutex_unlock(&c->lock);
	if (start)
		worker_submit(&c->job);
}

int committer_flush(struct committer *c, struct request *r)
{
	want(c, r);
	return PENDING;
}

static void timer_due(struct job *timer)
{
	struct committer *c =
		(struct committer *)((char *)timer - offsetof(struct committer, timer));

	atomic_store(&c->soon, false);
	want(c, NULL);
}

void committer_soon(struct committer *c)
{
	if (!atomic_load_explicit(&c->soon, memory_order_relaxed) &&
	    !atomic_exchange(&c->soon, true))
		worker_submit_later(&c->timer, COMMIT_MS);
}

void committer_init(struct committer *c, int (*commit)(struct committer *, bool *lost),
		    const char *what, const char *consequence)
{
	memset(c, 0, sizeof(*c));
	c->commit = commit;
	c->what = what;
	c->consequence = consequence;
	c->job.run = run_job;
	c->timer.run = timer_due;
	atomic_init(&c->soon, false);
	pthread_mutex_init(&c->lock, NULL);
}

void committer_destroy(struct committer *c)
{
	assert(!c->running && !c->waiting);
	pthread_mutex_destroy(&c->lock);
}
