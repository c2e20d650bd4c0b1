/*
 * worker.c - a few threads for disk calls that would block: see worker.h.
 *
 * Threads are started when jobs are ready and none is idle, and then stay: a disk that blocked once
 * will block again, and an idle thread costs a few kilobytes.  A job waits in its lane while
 * enough of that lane are active, which bounds the threads as well.
 *
 * While there are jobs for later, a thread is idle and waits for the first of them, also when all
 * other threads are stuck.
 */
#define _GNU_SOURCE
#include "worker.h"

#include "log.h"
#include "util.h"

#include <pthread.h>
#include <stddef.h>
#include <string.h>

enum {
	ACTIVE_MAX = 16,		/* of a lane: enough to keep a disk's queue busy */
	WORKER_STACK = 128 * 1024,
	LATER_MS = 1000,
};

static struct {
	pthread_mutex_t lock;		/* guards all below */
	pthread_cond_t wanted;		/* a job is ready, stop is set, or a thread has ended */
	struct job_list ready;		/* to be taken next; they are active */
	struct lane common;
	struct job_list later;		/* to be put when they are due */
	unsigned idle, count;		/* threads that run no job; all of them */
	bool stop;
	bool lacking;			/* it was logged that a thread could not be started */
} pool = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
};

/* All statics are called with the lock. */

static void append_job(struct job_list *list, struct job *job)
{
	job->next = NULL;
	*(list->first ? list->last : &list->first) = job;
	list->last = &job->next;
}

/* False if it is not in the list. */
static bool remove_job(struct job_list *list, const struct job *job)
{
	for (struct job **p = &list->first; *p; p = &(*p)->next)
		if (*p == job) {
			*p = job->next;
			if (!*p)
				list->last = p;
			return true;
		}
	return false;
}

static void put_job(struct job *job)
{
	if (job->lane->active < (job->lane->single ? 1 : ACTIVE_MAX)) {
		job->lane->active++;
		append_job(&pool.ready, job);
	} else {
		append_job(&job->lane->waiting, job);
	}
}

/* A job of the lane is done: the next one takes its place. */
static void leave_lane(struct lane *lane)
{
	struct job *job = lane->waiting.first;

	if (job) {
		remove_job(&lane->waiting, job);
		append_job(&pool.ready, job);
	} else {
		lane->active--;
	}
}

/* Run the first job that is ready.  The lock is let go meanwhile. */
static void run_first(void)
{
	struct job *job = pool.ready.first;
	struct lane *lane = job->lane;

	remove_job(&pool.ready, job);
	pthread_mutex_unlock(&pool.lock);
	job->run(job);			/* and it may be gone */
	pthread_mutex_lock(&pool.lock);
	leave_lane(lane);
}

/* Take the jobs for later that are due; all of them are when the pool stops. */
static void put_due(void)
{
	struct job *job;

	while ((job = pool.later.first) && (pool.stop || job->due <= now_ms())) {
		remove_job(&pool.later, job);
		put_job(job);
	}
}

static void *worker_main(void *unused);

/* 0 or an errno; that a thread is missing, which is not the first, is logged once. */
static int start_worker(void)
{
	pthread_t thread;
	int err = thread_start(&thread, WORKER_STACK, worker_main, NULL);

	if (!err) {
		pthread_detach(thread);
		pool.idle++;
		pool.count++;
	} else if (pool.count > 0 && !pool.lacking) {
		pool.lacking = true;
		log_error("cannot start a further worker thread: %s; going on with %u",
			  strerror(err), pool.count);
	}
	return err;
}

/* Have an idle thread, if there is something for it, now or later. */
static void keep_one_idle(void)
{
	if (pool.idle == 0 && pool.count > 0 && !pool.stop && (pool.ready.first || pool.later.first))
		start_worker();
}

static void *worker_main(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&pool.lock);
	for (;;) {
		put_due();
		while (!pool.ready.first && !pool.stop) {
			cond_wait_until(&pool.wanted, &pool.lock,
					pool.later.first ? pool.later.first->due : UINT64_MAX);
			put_due();
		}
		if (!pool.ready.first)
			break;
		pool.idle--;
		keep_one_idle();
		run_first();
		pool.idle++;
	}
	pool.idle--;
	pool.count--;
	pthread_cond_broadcast(&pool.wanted);
	pthread_mutex_unlock(&pool.lock);
	return NULL;
}

int worker_begin(void)
{
	int err;

	cond_init(&pool.wanted);
	pthread_mutex_lock(&pool.lock);
	err = start_worker();
	pthread_mutex_unlock(&pool.lock);
	return -err;
}

void worker_submit(struct job *job, struct lane *lane)
{
	pthread_mutex_lock(&pool.lock);
	job->lane = lane ? lane : &pool.common;
	put_job(job);
	keep_one_idle();
	pthread_mutex_unlock(&pool.lock);
	pthread_cond_signal(&pool.wanted);
}

bool worker_take_back(struct job *job)
{
	bool found, ready = false;

	pthread_mutex_lock(&pool.lock);
	found = job->lane && remove_job(&job->lane->waiting, job);
	if (!found)
		found = ready = remove_job(&pool.ready, job);
	if (ready)
		leave_lane(job->lane);
	pthread_mutex_unlock(&pool.lock);
	return found;
}

void worker_submit_later(struct job *job, struct lane *lane)
{
	pthread_mutex_lock(&pool.lock);
	if (!pool.stop) {	/* or a job that submits itself again would go on for ever */
		job->lane = lane;
		job->due = now_ms() + LATER_MS;
		append_job(&pool.later, job);
		keep_one_idle();
		if (pool.count > 0)
			pthread_cond_broadcast(&pool.wanted);	/* it may be the first */
	}
	pthread_mutex_unlock(&pool.lock);
}

bool worker_is_busy(void)
{
	bool busy;

	pthread_mutex_lock(&pool.lock);
	busy = pool.ready.first || pool.idle < pool.count;
	pthread_mutex_unlock(&pool.lock);
	return busy;
}

void worker_stop(void)
{
	pthread_mutex_lock(&pool.lock);
	pool.stop = true;
	if (pool.count > 0)
		pthread_cond_broadcast(&pool.wanted);
	while (pool.count > 0)
		pthread_cond_wait(&pool.wanted, &pool.lock);
	pthread_mutex_unlock(&pool.lock);
}
