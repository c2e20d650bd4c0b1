/*
 * worker.c - a few threads for disk calls that would block: see worker.h.
 *
 * Threads are started when jobs wait and none is idle, up to a bound, and then stay: a disk that
 * blocked once will block again, and an idle thread costs a few kilobytes.
 */
#define _GNU_SOURCE
#include "worker.h"

#include "util.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

enum {
	WORKER_MAX = 16,		/* enough to keep a disk's queue busy */
	WORKER_STACK = 128 * 1024,
};

static struct {
	pthread_mutex_t lock;		/* guards all below */
	pthread_cond_t wanted;		/* there is a job, or stop is set; of the clock of now_ms() */
	struct job *first, **last;
	unsigned waiting;		/* jobs in the list */
	struct job *later;		/* for later, those due first first */
	bool timed;			/* an idle thread waits for the first of them */
	unsigned idle;			/* threads in pthread_cond_wait() */
	unsigned count;
	pthread_t thread[WORKER_MAX];
	bool stop;
} pool = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.last = &pool.first,
};

static struct job *take_job(void)
{
	struct job *job = pool.first;

	pool.first = job->next;
	if (!pool.first)
		pool.last = &pool.first;
	pool.waiting--;
	return job;
}

static void put_job(struct job *job)
{
	job->next = NULL;
	*pool.last = job;
	pool.last = &job->next;
	pool.waiting++;
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
	struct timespec until;

	pool.idle++;
	if (pool.later && !pool.timed) {
		until.tv_sec = (time_t)(pool.later->due / 1000);
		until.tv_nsec = (long)(pool.later->due % 1000 * 1000000);
		pool.timed = true;
		pthread_cond_timedwait(&pool.wanted, &pool.lock, &until);
		pool.timed = false;
	} else {
		pthread_cond_wait(&pool.wanted, &pool.lock);
	}
	pool.idle--;
}

static void *worker_main(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&pool.lock);
	for (;;) {
		put_due();
		while (!pool.first && !pool.stop) {
			wait_idle();
			put_due();
		}
		if (!pool.first)
			break;
		/* It may have been the one that waited for the time. */
		if (pool.later && !pool.timed)
			pthread_cond_signal(&pool.wanted);
		struct job *job = take_job();

		pthread_mutex_unlock(&pool.lock);
		job->run(job);
		pthread_mutex_lock(&pool.lock);
	}
	pthread_mutex_unlock(&pool.lock);
	return NULL;
}

/* Called with the lock. */
static void start_thread(void)
{
	static bool prepared;
	pthread_condattr_t clock;
	pthread_attr_t attr;
	int err;

	if (!prepared) {
		pthread_condattr_init(&clock);
		pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
		pthread_cond_init(&pool.wanted, &clock);
		pthread_condattr_destroy(&clock);
		prepared = true;
	}
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, WORKER_STACK);
	err = pthread_create(&pool.thread[pool.count], &attr, worker_main, NULL);
	pthread_attr_destroy(&attr);
	if (!err)
		pool.count++;
	else if (pool.count == 0)
		log_error("cannot start a worker thread: %s", strerror(err));
}

void worker_submit(struct job *job)
{
	bool here;

	pthread_mutex_lock(&pool.lock);
	put_job(job);
	if (pool.waiting > pool.idle && pool.count < WORKER_MAX && !pool.stop)
		start_thread();
	here = pool.count == 0;		/* no thread at all: then it must be done here */
	if (here)
		job = take_job();
	pthread_mutex_unlock(&pool.lock);
	if (here)
		job->run(job);
	else
		pthread_cond_signal(&pool.wanted);
}

void worker_submit_later(struct job *job, unsigned ms)
{
	struct job **p = &pool.later;

	job->due = now_ms() + ms;
	pthread_mutex_lock(&pool.lock);
	while (*p && (*p)->due <= job->due)
		p = &(*p)->next;
	job->next = *p;
	*p = job;
	if (pool.count == 0)
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
	pool.count = 0;
}
