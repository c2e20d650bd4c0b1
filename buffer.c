/*
 * buffer.c - memory for data on its way: see buffer.h.
 *
 * Buffers of a few sizes are kept in lists, up to a bound, and all freed when none was wanted for
 * a while.
 */
#include "buffer.h"

#include "worker.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

enum {
	SMALLEST = 64 * 1024,		/* what is smaller comes from malloc() warm enough */
	SIZES = 5,			/* each is twice the one before */
	KEPT_MAX = 2 * 1024 * 1024,	/* bytes in all lists */
	IDLE_MS = 1000,
};

struct kept {
	struct kept *next;
};

static void let_go(struct job *job);

static struct {
	pthread_mutex_t lock;		/* guards what follows; a leaf */
	struct kept *list[SIZES];
	size_t bytes;
	bool wanted;			/* since the timer was set */
	bool timed;			/* the timer is set */
	struct job timer;
} pool = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.timer.run = let_go,
};

/* Which list has buffers of len bytes; SIZES if none. */
static unsigned list_for(size_t len)
{
	unsigned i = 0;

	if (len < SMALLEST)
		return SIZES;
	while (i < SIZES && len > (size_t)SMALLEST << i)
		i++;
	return i;
}

/* Called with the lock. */
static void free_all(void)
{
	struct kept *k;

	for (unsigned i = 0; i < SIZES; i++)
		while ((k = pool.list[i])) {
			pool.list[i] = k->next;
			free(k);
		}
	pool.bytes = 0;
#if defined(__GLIBC__)
	malloc_trim(0);		/* or it would be kept for the threads that had most of it */
#endif
}

/* The time is over: if nobody wanted one, none will be kept. */
static void let_go(struct job *job)
{
	bool again;

	pthread_mutex_lock(&pool.lock);
	again = pool.wanted;
	pool.wanted = false;
	pool.timed = again;
	if (!again)
		free_all();
	pthread_mutex_unlock(&pool.lock);
	if (again)
		worker_submit_later(job, IDLE_MS);
}

void buffer_init(void)
{
#if defined(__GLIBC__)
	/* Or the heap of each thread that had a large one would keep as much. */
	mallopt(M_MMAP_THRESHOLD, SMALLEST);
#endif
}

void *buffer_get(size_t len)
{
	unsigned i = list_for(len);
	struct kept *k;

	if (i == SIZES)
		return malloc(len);
	pthread_mutex_lock(&pool.lock);
	pool.wanted = true;
	k = pool.list[i];
	if (k) {
		pool.list[i] = k->next;
		pool.bytes -= (size_t)SMALLEST << i;
	}
	pthread_mutex_unlock(&pool.lock);
	return k ? (void *)k : malloc((size_t)SMALLEST << i);
}

void buffer_put(void *buffer, size_t len)
{
	unsigned i = list_for(len);
	size_t bytes = (size_t)SMALLEST << i;
	bool keep, set_timer;
	struct kept *k = buffer;

	if (!buffer || i == SIZES) {
		free(buffer);
		return;
	}
	pthread_mutex_lock(&pool.lock);
	keep = pool.bytes + bytes <= KEPT_MAX;
	set_timer = keep && !pool.timed;
	if (keep) {
		k->next = pool.list[i];
		pool.list[i] = k;
		pool.bytes += bytes;
		pool.timed = true;
	}
	pthread_mutex_unlock(&pool.lock);
	if (!keep)
		free(buffer);
	if (set_timer)
		worker_submit_later(&pool.timer, IDLE_MS);
}
