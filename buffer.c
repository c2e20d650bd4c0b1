/*
 * buffer.c - memory for data on its way: see buffer.h.
 *
 * Large buffers are of a few sizes, so that they fit again.  Those that are not in use are kept, as
 * long as all of them together, in use or not, are within a bound.
 */
#include "buffer.h"

#include <pthread.h>
#include <stdlib.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

enum {
	SMALLEST = 64 * 1024,		/* what is smaller comes from malloc() warm enough */
	LARGEST = 1024 * 1024,		/* what is larger is not kept */
	ALL_MAX = 6 * 1024 * 1024,
};

struct kept {
	struct kept *next;
	size_t size;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;	/* guards what follows; a leaf */
static struct kept *kept;
static size_t all_bytes;		/* of large ones, in use or kept */

void buffer_init(void)
{
#if defined(__GLIBC__)
	/* Or the heap of each thread that had a large one would keep as much. */
	mallopt(M_MMAP_THRESHOLD, SMALLEST);
#endif
}

/* The size of a buffer for len bytes; 0 if it is not one to keep. */
static size_t size_for(size_t len)
{
	size_t size = SMALLEST;

	if (len < SMALLEST || len > LARGEST)
		return 0;
	while (size < len)
		size *= 2;
	return size;
}

/* Take kept ones off the list until all have no more bytes than that.  Called with the lock. */
static struct kept *take_kept(size_t max)
{
	struct kept *first = kept, **end = &first;

	while (*end && all_bytes > max) {
		all_bytes -= (*end)->size;
		end = &(*end)->next;
	}
	kept = *end;
	*end = NULL;
	return first;
}

static void free_all(struct kept *k)
{
	while (k) {
		struct kept *next = k->next;

		free(k);
		k = next;
	}
}

void *buffer_get(size_t len)
{
	size_t size = size_for(len);
	struct kept *k, **p = &kept, *others = NULL;

	if (size == 0)
		return malloc(len);
	pthread_mutex_lock(&lock);
	while (*p && (*p)->size != size)
		p = &(*p)->next;
	k = *p;
	if (k) {
		*p = k->next;
	} else if ((k = malloc(size))) {
		all_bytes += size;
		others = take_kept(ALL_MAX);
	}
	pthread_mutex_unlock(&lock);
	free_all(others);
	return k;
}

void buffer_put(void *buffer, size_t len)
{
	struct kept *k = buffer;
	size_t size = size_for(len);

	if (!buffer || size == 0) {
		free(buffer);
		return;
	}
	pthread_mutex_lock(&lock);
	k->size = size;
	k->next = kept;
	kept = k;
	k = take_kept(ALL_MAX);
	pthread_mutex_unlock(&lock);
	free_all(k);
}

void buffer_trim(void)
{
	struct kept *all;

	pthread_mutex_lock(&lock);
	all = take_kept(0);
	pthread_mutex_unlock(&lock);
	free_all(all);
}
