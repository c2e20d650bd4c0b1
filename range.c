/*
 * range.c - ranges that somebody is changing: see range.h.
 *
 * The list is as long as there are threads in the middle of a change: a handful.
 */
#include "range.h"

#include <stddef.h>

void ranges_init(struct ranges *s)
{
	pthread_mutex_init(&s->lock, NULL);
	pthread_cond_init(&s->released, NULL);
	s->held = NULL;
	s->waiting = 0;
}

void ranges_destroy(struct ranges *s)
{
	pthread_cond_destroy(&s->released);
	pthread_mutex_destroy(&s->lock);
}

static bool overlaps(const struct range *a, const struct range *b)
{
	return a->off < b->off ? b->off - a->off < a->len : a->off - b->off < b->len;
}

static bool is_held(const struct ranges *s, const struct range *r)
{
	for (const struct range *h = s->held; h; h = h->next)
		if (overlaps(h, r))
			return true;
	return false;
}

bool ranges_take(struct ranges *s, struct range *r, bool wait)
{
	bool taken;

	pthread_mutex_lock(&s->lock);
	while (is_held(s, r) && wait) {
		s->waiting++;
		pthread_cond_wait(&s->released, &s->lock);
		s->waiting--;
	}
	taken = !is_held(s, r);
	if (taken) {
		r->next = s->held;
		s->held = r;
	}
	pthread_mutex_unlock(&s->lock);
	return taken;
}

void ranges_release(struct ranges *s, struct range *r)
{
	struct range **p = &s->held;

	pthread_mutex_lock(&s->lock);
	while (*p != r)
		p = &(*p)->next;
	*p = r->next;
	if (s->waiting)
		pthread_cond_broadcast(&s->released);
	pthread_mutex_unlock(&s->lock);
}
