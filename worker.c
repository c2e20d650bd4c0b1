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

enum {
	WORKER_MAX = 16,		/* enough to keep a disk's queue busy */
	WORKER_STACK = 128 * 1024,
};

static struct {
	pthread_mutex_t lock;		/* guards all below */
	pthread_cond_t wanted;		/* there is a job, or stop is set */
	struct job *first, **last;
	unsigned waiting;		/* jobs in the list */
	unsigned idle;			/* threads in pthread_cond_wait() */
	unsigned count;
	pthread_t thread[WORKER_MAX];
	bool stop;
} pool = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.wanted = PTHREAD_COND_INITIALIZER,
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

static void *worker_main(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&pool.lock);
	for (;;) {
		while (!pool.first && !pool.stop) {
			pool.idle++;
			pthread_cond_wait(&pool.wanted, &pool.lock);
			pool.idle--;
		}
		if (!pool.first)
			break;
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
	pthread_attr_t attr;
	int err;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, WORKER_STACK);
	err = pthread_create(&pool.thread[pool.count], &attr, worker_main, NULL);
	pthread_attr_destroy(&attr);
	if (!err)
		pool.count++;
	else if (pool.count == 0)
		log_line("cannot start a worker thread: %s", strerror(err));
}

void worker_submit(struct job *job)
{
	bool here;

	job->next = NULL;
	pthread_mutex_lock(&pool.lock);
	*pool.last = job;
	pool.last = &job->next;
	pool.waiting++;
	if (pool.waiting > pool.idle && pool.count < WORKER_MAX)
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

void worker_stop(void)
{
	pthread_mutex_lock(&pool.lock);
	pool.stop = true;
	pthread_mutex_unlock(&pool.lock);
	pthread_cond_broadcast(&pool.wanted);
	for (unsigned i = 0; i < pool.count; i++)
		pthread_join(pool.thread[i], NULL);
	pool.count = 0;
}
