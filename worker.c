/*
 * worker.c - a few threads for disk calls that would block: see worker.h.
 *
 * Threads are started when jobs wait and none is idle, and then stay: a disk that blocked once
 * will block again, and an idle thread costs a few kilobytes.  A job waits in its lane while
 * enough of that lane are active, which bounds the threads as well.
 *
 * Somebody always waits for the time of the jobs for later, also when all other threads are stuck.
 */
#define _GNU_SOURCE
#include "worker.h"

#include "log.h"
#include "util.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
	ACTIVE_MAX = 16,		/* of a lane: enough to keep a disk's queue busy */
	WORKER_STACK = 128 * 1024,
};

static struct {
	pthread_mutex_t lock;		/* guards all below */
	pthread_cond_t wanted;		/* there is a job, or stop is set; of the clock of now_ms() */
	struct job *first, **last;	/* to be taken next; they are active */
	unsigned waiting;		/* jobs in that list */
	struct lane common;
	struct job *later;		/* for later, those due first first */
	bool timed;			/* an idle thread waits for the first of them */
	unsigned idle;			/* threads in pthread_cond_wait(), or about to begin */
	unsigned count;
	pthread_t *thread;		/* count of them */
	bool begun, stop;
	bool lacking;			/* it was logged that a thread could not be started */
} pool = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.last = &pool.first,
	.common.name = "",
};

static struct job *take_job(void)
{
	struct job *job = pool.first;

	pool.first = job->next;
	if (!pool.first)
		pool.last = &pool.first;
	pool.waiting--;
	job->queued = false;
	return job;
}

static void put_active(struct job *job)
{
	job->next = NULL;
	*pool.last = job;
	pool.last = &job->next;
	pool.waiting++;
}

static void put_job(struct job *job)
{
	struct lane *lane = job->lane ? job->lane : &pool.common;

	job->lane = lane;
	job->queued = true;
	if (lane->active < ACTIVE_MAX) {
		lane->active++;
		put_active(job);
		return;
	}
	job->next = NULL;
	if (lane->first)
		lane->last->next = job;
	else
		lane->first = job;
	lane->last = job;
}

/* A job of the lane is done: the next one takes its place. */
static void leave_lane(struct lane *lane)
{
	struct job *job = lane->first;

	if (!job) {
		lane->active--;
		return;
	}
	lane->first = job->next;
	put_active(job);
}

/* Run the first job.  Called with the lock, which is let go meanwhile. */
static void run_first(void)
{
	struct job *job = take_job();
	struct lane *lane = job->lane;

	pthread_mutex_unlock(&pool.lock);
	job->run(job);			/* and it may be gone */
	pthread_mutex_lock(&pool.lock);
	leave_lane(lane);
}

/* Take the jobs for later that are due; all of them are when the pool stops. */
static void put_due(void)
{
	struct job *job;

	while ((job = pool.later) && (pool.stop || job->due <= now_ms())) {
		pool.later = job->next;
		put_job(job);
	}
}

/* One idle thread waits until the first job for later is due, the others for a signal. */
static void wait_idle(void)
{
	bool timed = pool.later && !pool.timed;

	pool.idle++;
	pool.timed |= timed;
	cond_wait_until(&pool.wanted, &pool.lock, timed ? pool.later->due : UINT64_MAX);
	if (timed)
		pool.timed = false;
	pool.idle--;
}

static void start_thread(void);

/* Who is about to run a job may have been the one that waited for the time. */
static void watch_time(void)
{
	if (!pool.later || pool.timed)
		return;
	if (pool.idle == 0)
		start_thread();
	else
		pthread_cond_signal(&pool.wanted);
}

static void *worker_main(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&pool.lock);
	pool.idle--;
	for (;;) {
		put_due();
		while (!pool.first && !pool.stop) {
			wait_idle();
			put_due();
		}
		if (!pool.first)
			break;
		watch_time();
		run_first();
	}
	pthread_mutex_unlock(&pool.lock);
	return NULL;
}

/* Called with the lock.  0 or an errno; one that is not the first can be done without. */
static int begin_thread(void)
{
	pthread_t *thread;
	int err = ENOMEM;

	thread = realloc(pool.thread, (pool.count + 1) * sizeof(*thread));
	if (thread)
		pool.thread = thread;
	if (thread)
		err = thread_start(&thread[pool.count], WORKER_STACK, worker_main, NULL);
	if (!err) {
		pool.count++;
		pool.idle++;
	}
	return err;
}

static void start_thread(void)
{
	int err = !pool.begun || pool.stop ? 0 : begin_thread();	/* they may be being joined */

	if (err && !pool.lacking)
		log_error("cannot start a further worker thread: %s; going on with %u",
			  strerror(err), pool.count);
	pool.lacking |= err != 0;
}

int worker_begin(void)
{
	int err;

	cond_init(&pool.wanted);
	pthread_mutex_lock(&pool.lock);
	pool.begun = true;
	err = begin_thread();
	pthread_mutex_unlock(&pool.lock);
	return -err;
}

void worker_submit(struct job *job)
{
	bool here;

	pthread_mutex_lock(&pool.lock);
	put_job(job);
	if (pool.waiting > pool.idle)
		start_thread();
	here = pool.count == 0;		/* before the first and after the last thread */
	while (here && pool.first)
		run_first();
	pthread_mutex_unlock(&pool.lock);
	if (!here)
		pthread_cond_signal(&pool.wanted);
}

/* Take the job out of a list; *before is set to the one before it, which may be NULL.  Or false. */
static bool unlink_job(struct job **first, const struct job *job, struct job **before)
{
	*before = NULL;
	for (; *first; *before = *first, first = &(*first)->next)
		if (*first == job) {
			*first = job->next;
			return true;
		}
	return false;
}

bool worker_take_back(struct job *job)
{
	struct lane *lane = job->lane;
	struct job *before;
	bool queued;

	pthread_mutex_lock(&pool.lock);
	queued = job->queued;
	job->queued = false;
	if (queued && unlink_job(&lane->first, job, &before)) {
		if (lane->last == job)
			lane->last = before;
	} else if (queued && unlink_job(&pool.first, job, &before)) {
		if (!job->next)
			pool.last = before ? &before->next : &pool.first;
		pool.waiting--;
		leave_lane(lane);
	}
	pthread_mutex_unlock(&pool.lock);
	return queued;
}

void worker_submit_later(struct job *job, unsigned ms)
{
	struct job **p = &pool.later;

	job->due = now_ms() + ms;
	pthread_mutex_lock(&pool.lock);
	if (pool.stop) {	/* or a job that submits itself again would go on for ever */
		pthread_mutex_unlock(&pool.lock);
		return;
	}
	while (*p && (*p)->due <= job->due)
		p = &(*p)->next;
	job->next = *p;
	*p = job;
	if (pool.idle == 0)
		start_thread();
	if (pool.count > 0)
		pthread_cond_broadcast(&pool.wanted);	/* the one that waits for the time, too */
	pthread_mutex_unlock(&pool.lock);
}

void worker_stop(void)
{
	pthread_mutex_lock(&pool.lock);
	pool.stop = true;
	if (pool.count > 0)
		pthread_cond_broadcast(&pool.wanted);
	pthread_mutex_unlock(&pool.lock);
	for (unsigned i = 0; i < pool.count; i++)
		pthread_join(pool.thread[i], NULL);
	free(pool.thread);
	pool.thread = NULL;
	pool.count = 0;
}
