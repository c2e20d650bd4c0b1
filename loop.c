/*
 * loop.c - one thread's poll(): see loop.h.
 */
#include "loop.h"

#include "log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool make_room_for_source(struct loop *l)
{
	size_t room = l->room ? l->room * 2 : 8;
	struct source **source;
	struct pollfd *pfd;

	if (l->count < l->room)
		return true;
	source = realloc(l->source, room * sizeof(*source));
	if (!source)
		return false;
	l->source = source;
	pfd = realloc(l->pfd, (room + 1) * sizeof(*pfd));
	if (!pfd)
		return false;
	l->pfd = pfd;
	l->room = room;
	return true;
}

int loop_init(struct loop *l, struct bell *bell)
{
	*l = (struct loop){ .bell = bell };
	pthread_mutex_init(&l->lock, NULL);
	return make_room_for_source(l) ? 0 : -ENOMEM;
}

void loop_free(struct loop *l)
{
	free(l->source);
	free(l->pfd);
	pthread_mutex_destroy(&l->lock);
}

bool loop_add(struct loop *l, struct source *s)
{
	if (!make_room_for_source(l))
		return false;
	s->place = l->count;
	s->entry = 0;
	l->source[l->count++] = s;
	return true;
}

void loop_remove(struct loop *l, struct source *s)
{
	struct source *last = l->source[--l->count];

	l->source[s->place] = last;
	last->place = s->place;
}

void loop_post(struct loop *l, struct mail *m)
{
	pthread_mutex_lock(&l->lock);
	m->next = l->mail;
	l->mail = m;
	pthread_mutex_unlock(&l->lock);
	bell_ring(l->bell);
}

void loop_wake(struct loop *l)
{
	bell_ring(l->bell);
}

bool loop_is_rung(const struct loop *l)
{
	return atomic_load_explicit(&l->bell->rung, memory_order_relaxed);
}

bool loop_deliver(struct loop *l)
{
	struct mail *newest, *oldest = NULL, *next;

	if (!bell_answer(l->bell))
		return false;
	pthread_mutex_lock(&l->lock);
	newest = l->mail;
	l->mail = NULL;
	pthread_mutex_unlock(&l->lock);
	for (; newest; newest = next) {
		next = newest->next;
		newest->next = oldest;
		oldest = newest;
	}
	for (; oldest; oldest = next) {
		next = oldest->next;
		oldest->deliver(oldest);
	}
	return true;
}

/*
 * In the order in which they were added.  A turn may remove sources: the last one comes in the place of
 * one that is gone, and if that has passed it waits for the next round.
 */
void loop_turn_due(struct loop *l)
{
	uint64_t now = now_ms();

	for (size_t i = 0; i < l->count;) {
		struct source *s = l->source[i];
		short revents = s->entry ? l->pfd[s->entry].revents : 0;
		bool due = !revents && s->due <= now;

		s->entry = 0;
		if (due)
			s->due = UINT64_MAX;
		if (due || revents)
			s->ops->turn(s, revents);
		if (i < l->count && l->source[i] == s)
			i++;
	}
}

/* No more entries than descriptors, or poll() would refuse them.  Returns how many. */
static unsigned prepare_poll(struct loop *l, uint64_t *due)
{
	unsigned n = 1;

	for (size_t i = 0; i < l->count; i++) {
		struct source *s = l->source[i];
		short events = s->ops->events(s);

		s->entry = events ? n++ : 0;
		if (events)
			l->pfd[s->entry] = (struct pollfd){ .fd = s->fd, .events = events };
		if (s->due < *due)
			*due = s->due;
	}
	return n;
}

void loop_poll(struct loop *l, uint64_t due)
{
	unsigned n;
	int ready;

	loop_turn_due(l);
	n = prepare_poll(l, &due);
	ready = bell_poll(l->bell, l->pfd, n, ms_until(due));
	if (ready < 0)
		log_fatal("cannot wait for %u descriptors: %s", n, strerror(-ready));
	l->polled = now_us();
	loop_turn_due(l);
}
