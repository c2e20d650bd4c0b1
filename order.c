/*
 * order.c - changes of an image that are under way: see order.h.
 */
#include "order.h"

#include "util.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { SPANS_MAX = 4096 };	/* a change in more pieces is waited for, and not cut further */

void order_init(struct order *o)
{
	pthread_mutex_init(&o->lock, NULL);
	pthread_cond_init(&o->ended, NULL);
}

void order_destroy(struct order *o)
{
	assert(!o->first);
	pthread_cond_destroy(&o->ended);
	pthread_mutex_destroy(&o->lock);
}

/* Spans */

/* Whether both have bytes in the same block. */
static bool shares_block(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
	return a_len > 0 && b_len > 0 && a / BLOCK_SIZE <= (b + b_len - 1) / BLOCK_SIZE &&
	       b / BLOCK_SIZE <= (a + a_len - 1) / BLOCK_SIZE;
}

/* The first span of what is left that ends behind off; c->count if there is none. */
static unsigned find_left(const struct change *c, uint64_t off)
{
	unsigned i = 0;

	while (i < c->count && c->left[i].off + c->left[i].len <= off)
		i++;
	return i;
}

static bool has_left(const struct change *c, uint64_t len, uint64_t off)
{
	unsigned i = find_left(c, off);

	return i < c->count && c->left[i].off < off + len;
}

/* Put n spans, 0 to 2, in the place of one.  False if out of memory. */
static bool replace_span(struct change *c, unsigned i, const struct span *with, unsigned n)
{
	if (c->count - 1 + n > c->room) {
		struct span *left = malloc(2 * c->room * sizeof(*left));

		if (!left)
			return false;
		memcpy(left, c->left, c->count * sizeof(*left));
		if (c->left != &c->one)
			free(c->left);
		c->left = left;
		c->room *= 2;
	}
	memmove(&c->left[i + n], &c->left[i + 1], (c->count - i - 1) * sizeof(*with));
	memcpy(&c->left[i], with, n * sizeof(*with));
	c->count += n - 1;
	return true;
}

/* Take a range from what is left. */
static void take(struct change *c, uint64_t len, uint64_t off)
{
	uint64_t end = off + len;
	unsigned n;

	for (unsigned i = find_left(c, off); i < c->count && c->left[i].off < end; i += n) {
		struct span s = c->left[i], rest[2];

		n = 0;
		if (s.off < off)
			rest[n++] = (struct span){ s.off, off - s.off };
		if (s.off + s.len > end)
			rest[n++] = (struct span){ end, s.off + s.len - end };
		if (!replace_span(c, i, rest, n)) {
			c->error = -ENOMEM;
			c->count = 0;
		}
	}
}

/* Conflicts.  All of these are called with the lock. */

/* Whether c, or an older one, has I/O under way there. */
static bool io_is_under_way(const struct change *c, uint64_t len, uint64_t off)
{
	for (; c; c = c->next)
		if (shares_block(c->active.off, c->active.len, off, len))
			return true;
	return false;
}

/* Whether a change has to wait before it begins with I/O there. */
static bool must_wait(const struct change *c, uint64_t len, uint64_t off)
{
	for (const struct change *older = c->next; older; older = older->next)
		if (older->count >= SPANS_MAX && has_left(older, len, off))
			return true;
	return io_is_under_way(c->order->first, len, off);
}

/* What is stored now is not to be stored by older changes any more. */
static void take_from_older(const struct change *c, uint64_t len, uint64_t off)
{
	for (struct change *i = c->next; i; i = i->next) {
		if (i->count == 0)
			continue;
		take(i, len, off);
		if (i->count == 0 && i->emptied) {
			atomic_store(&i->is_empty, true);
			i->emptied(i);
		}
	}
}

static void insert_change(struct order *o, struct change *c)
{
	c->order = o;
	c->next = o->first;
	o->first = c;
}

static void remove_change(struct change *c)
{
	struct change *newer = c->order->first;

	if (newer == c) {
		c->order->first = c->next;
	} else {
		while (newer->next != c)
			newer = newer->next;
		newer->next = c->next;
	}
	c->order = NULL;
	if (c->left != &c->one)
		free(c->left);
}

/* Changes */

int order_begin(struct order *o, struct change *c, uint64_t max, bool wait, struct span *part)
{
	int ret = 0;

	pthread_mutex_lock(&o->lock);
	if (!c->order) {
		c->one = *part;
		c->left = &c->one;
		c->count = c->room = 1;
		insert_change(o, c);
	}
	while (ret == 0 && c->count > 0) {
		struct span s = c->left[0];

		if (s.len > max)
			s.len = max - (s.off + max) % BLOCK_SIZE;
		if (!must_wait(c, s.len, s.off)) {
			*part = c->active = s;
			ret = 1;
		} else if (wait) {
			pthread_cond_wait(&o->ended, &o->lock);
		} else {
			ret = -EAGAIN;
		}
	}
	if (ret == 0)
		ret = c->error;
	pthread_mutex_unlock(&o->lock);
	return ret;
}

void order_end(struct change *c, bool done, bool stored)
{
	struct order *o = c->order;
	struct span s = c->active;

	pthread_mutex_lock(&o->lock);
	c->active.len = 0;
	if (done)
		take(c, s.len, s.off);
	if (stored)
		take_from_older(c, s.len, s.off);
	if (c->count == 0 && !c->error)
		remove_change(c);
	pthread_cond_broadcast(&o->ended);
	pthread_mutex_unlock(&o->lock);
}

void order_remove(struct change *c)
{
	struct order *o = c->order;

	if (!o)
		return;
	pthread_mutex_lock(&o->lock);
	remove_change(c);
	pthread_cond_broadcast(&o->ended);
	pthread_mutex_unlock(&o->lock);
}

bool order_hold(struct order *o, struct change *c, uint64_t len, uint64_t off, bool wait)
{
	bool alone;

	*c = (struct change){ .left = &c->one, .active = { off, len } };
	pthread_mutex_lock(&o->lock);
	insert_change(o, c);	/* nothing begins there any more: it is its turn some time */
	while (!(alone = !io_is_under_way(c->next, len, off)) && wait)
		pthread_cond_wait(&o->ended, &o->lock);
	if (!alone)
		remove_change(c);
	pthread_mutex_unlock(&o->lock);
	return alone;
}
