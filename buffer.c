/*
 * buffer.c - memory for data on its way: see buffer.h.
 *
 * Large buffers are of a few sizes, so that they fit again, and are kept up to a bound.
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
	KEPT_MAX = 4 * 1024 * 1024,
};

struct kept {
	struct kept *next;
	size_t size;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;	/* guards what follows; a leaf */
static struct kept *kept;
static size_t kept_bytes;

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

void *buffer_get(size_t len)
{
	size_t size = size_for(len);
	struct kept *k, **p = &kept;

	if (size == 0)
		return malloc(len);
	pthread_mutex_lock(&lock);
	while (*p && (*p)->size != size)
		p = &(*p)->next;
	k = *p;
	if (k) {
		*p = k->next;
		kept_bytes -= size;
	}
	pthread_mutex_unlock(&lock);
	return k ? (void *)k : malloc(size);
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
	if (kept_bytes + size <= KEPT_MAX) {
		k->size = size;
		k->next = kept;
		kept = k;
		kept_bytes += size;
		k = NULL;
	}
	pthread_mutex_unlock(&lock);
	free(k);
}

void buffer_trim(void)
{
	struct kept *k, *next;

	pthread_mutex_lock(&lock);
	k = kept;
	kept = NULL;
	kept_bytes = 0;
	pthread_mutex_unlock(&lock);
	for (; k; k = next) {
		next = k->next;
		free(k);
	}
}
