/*
 * ahead.c - read-ahead for sequential readers: see ahead.h.
 *
 * A read that misses belongs to a stream if it is near the place where that expects its next
 * one: near, since a client's reads are handled by several threads, in any order.  After some
 * such reads a window ahead of the reader is fetched, which grows as the stream goes on.  The
 * reads that follow find their blocks; one of them, at the mark, lets the window move on.
 */
#include "ahead.h"

#include <string.h>

enum {
	SEQUENTIAL_READS = 3,		/* this many make a stream */
	NEAR_READS = 8,			/* how far reads overtake each other, in reads */
	WINDOW_MIN = 256 * 1024,
	WINDOW_MAX = 8 * 1024 * 1024,
};

void ahead_init(struct ahead *a, struct fetcher *f)
{
	memset(a, 0, sizeof(*a));
	a->fetcher = f;
	pthread_mutex_init(&a->lock, NULL);
}

void ahead_destroy(struct ahead *a)
{
	pthread_mutex_destroy(&a->lock);
}

/* Called with the lock, as are the next ones. */
static void set_mark(struct ahead *a, struct stream *s, uint64_t off)
{
	size_t mark = (size_t)(off / BLOCK_SIZE);
	size_t old = atomic_exchange(&a->mark[s - a->stream], mark);

	if (!old && mark)
		atomic_fetch_add(&a->active, 1);
	if (old && !mark)
		atomic_fetch_sub(&a->active, 1);
}

/* The stream that a read belongs to, or in its place the one that was used longest ago. */
static struct stream *find_stream(struct ahead *a, uint64_t len, uint64_t off)
{
	struct stream *oldest = a->stream;

	for (struct stream *s = a->stream; s < a->stream + AHEAD_STREAMS; s++) {
		uint64_t distance = off > s->next ? off - s->next : s->next - off;

		if (s->reads > 0 && distance <= NEAR_READS * len) {
			s->reads++;
			return s;
		}
		if (s->used < oldest->used)
			oldest = s;
	}
	memset(oldest, 0, sizeof(*oldest));
	set_mark(a, oldest, 0);
	oldest->reads = 1;
	return oldest;
}

/* Move the window on.  Returns what is to be fetched: *len bytes at *off. */
static void advance(struct ahead *a, struct stream *s, uint64_t *len, uint64_t *off)
{
	uint64_t size = a->fetcher->layer->size, from = s->end > s->next ? s->end : s->next, to;

	s->window = s->window ? s->window * 2 : WINDOW_MIN;
	if (s->window > WINDOW_MAX)
		s->window = WINDOW_MAX;
	to = size - s->next > s->window ? s->next + s->window : size;
	*off = from;
	*len = to > from ? to - from : 0;
	s->end = from + *len;
	set_mark(a, s, to < size && layer_missing(a->fetcher->layer) ? to - s->window / 2 : 0);
}

static void read_at_stream(struct ahead *a, struct stream *s, uint64_t len, uint64_t off)
{
	s->used = ++a->reads;
	if (off + len > s->next)
		s->next = off + len;
}

void ahead_missed(struct ahead *a, uint64_t len, uint64_t off)
{
	uint64_t ahead_len = 0, ahead_off = 0;
	struct stream *s;

	pthread_mutex_lock(&a->lock);
	s = find_stream(a, len, off);
	read_at_stream(a, s, len, off);
	if (s->reads >= SEQUENTIAL_READS && s->end < s->next + s->window / 2 + len)
		advance(a, s, &ahead_len, &ahead_off);
	pthread_mutex_unlock(&a->lock);
	if (ahead_len > 0)
		fetch_ahead(a->fetcher, ahead_len, ahead_off);
}

/* A read that may have come to the mark of stream i. */
static void at_mark(struct ahead *a, unsigned i, uint64_t len, uint64_t off)
{
	uint64_t ahead_len = 0, ahead_off = 0;
	struct stream *s = &a->stream[i];

	pthread_mutex_lock(&a->lock);
	if (atomic_load(&a->mark[i]) && off < s->end) {
		read_at_stream(a, s, len, off);
		advance(a, s, &ahead_len, &ahead_off);
	}
	pthread_mutex_unlock(&a->lock);
	if (ahead_len > 0)
		fetch_ahead(a->fetcher, ahead_len, ahead_off);
}

void ahead_hit(struct ahead *a, uint64_t len, uint64_t off)
{
	if (atomic_load_explicit(&a->active, memory_order_relaxed) == 0)
		return;
	for (unsigned i = 0; i < AHEAD_STREAMS; i++) {
		size_t mark = atomic_load_explicit(&a->mark[i], memory_order_relaxed);
		uint64_t at = (uint64_t)mark * BLOCK_SIZE;

		if (mark && off + len > at && off < at + WINDOW_MAX)
			at_mark(a, i, len, off);
	}
}
