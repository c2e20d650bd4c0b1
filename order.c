/*
 * order.c - changes of an image that are under way: see order.h.
 *
 * They are in one list.  A change that finds it empty may be stored without it, so that loops need
 * no lock: a place has its blocks meanwhile.  It takes the place, and then looks at the others and
 * at the list; a change that comes to the list then looks at the places.  So of two changes one
 * sees the other.
 */
#include "order.h"

#include "util.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
	SPANS_MAX = 4096,	/* a change in more pieces is waited for, and not cut further */
	COUNT_BITS = 12,	/* of a place: the number of blocks; above these, the first block */
};

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

/* Whether a change without the list has I/O under way there; that with c's place does not count. */
static bool place_is_taken(const struct change *c, uint64_t len, uint64_t off)
{
	for (unsigned i = 0; i < ORDER_PLACES; i++) {
		uint64_t place = atomic_load(&c->order->place[i].blocks);
		uint64_t blocks = place & ((1 << COUNT_BITS) - 1);

		if (place && &c->order->place[i] != c->place &&
		    shares_block((place >> COUNT_BITS) * BLOCK_SIZE, blocks * BLOCK_SIZE, off, len))
			return true;
	}
	return false;
}

/* Whether a change has to wait before it begins with I/O there. */
static bool must_wait(const struct change *c, uint64_t len, uint64_t off)
{
	bool older = false;	/* those behind c are */

	if (place_is_taken(c, len, off))
		return true;
	for (const struct change *i = c->order->first; i; i = i->next) {
		if (i == c)
			older = true;
		else if (shares_block(i->active.off, i->active.len, off, len) &&
			 (older || !i->pending))
			return true;
		else if (older && i->count >= SPANS_MAX && has_left(i, len, off))
			return true;
	}
	return false;
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

static void insert_change(struct change *c)
{
	c->next = c->order->first;
	c->order->first = c;
	c->listed = true;
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
	c->listed = false;
	if (c->left != &c->one)
		free(c->left);
}

/* Changes */

void order_add(struct order *o, struct change *c, uint64_t len, uint64_t off)
{
	c->order = o;
	c->one = (struct span){ off, len };
	c->left = &c->one;
	c->count = c->room = 1;
}

/* A free place for all of a change; NULL if there is none, or it does not fit. */
static struct order_place *claim_place(struct order *o, const struct span *s)
{
	uint64_t block = s->off / BLOCK_SIZE, count = (s->off + s->len - 1) / BLOCK_SIZE - block + 1;

	for (unsigned i = 0; i < ORDER_PLACES && count < 1 << COUNT_BITS; i++) {
		uint64_t none = 0;

		if (atomic_load(&o->place[i].blocks) == 0 &&
		    atomic_compare_exchange_strong(&o->place[i].blocks, &none,
						   block << COUNT_BITS | count))
			return &o->place[i];
	}
	return NULL;
}

static void leave_place(struct change *c)
{
	struct order *o = c->order;

	atomic_store(&c->place->blocks, 0);
	c->place = NULL;
	if (!atomic_load(&o->first))
		return;
	pthread_mutex_lock(&o->lock);
	pthread_cond_broadcast(&o->ended);
	pthread_mutex_unlock(&o->lock);
}

/* Begin with all of a change that has just come, without the list.  False if that cannot be. */
static bool begin_at_once(struct change *c)
{
	struct order *o = c->order;

	if (c->listed || atomic_load(&o->first))
		return false;
	c->place = claim_place(o, &c->one);
	if (!c->place)
		return false;
	if (!atomic_load(&o->first) && !place_is_taken(c, c->one.len, c->one.off))
		return true;
	leave_place(c);
	return false;
}

int order_begin(struct change *c, uint64_t max, bool wait, struct span *part)
{
	struct order *o = c->order;
	int ret = 0;

	if (!wait && begin_at_once(c)) {
		*part = c->active = c->one;
		return 1;
	}
	pthread_mutex_lock(&o->lock);
	if (!c->listed)
		insert_change(c);
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

	if (c->place && done) {
		leave_place(c);
		c->order = NULL;
		return;
	}
	pthread_mutex_lock(&o->lock);
	if (c->place) {		/* it is in the list before newer ones can begin */
		insert_change(c);
		atomic_store(&c->place->blocks, 0);
		c->place = NULL;
	}
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

	*c = (struct change){ .order = o, .left = &c->one, .pending = true };
	c->active = (struct span){ off, len };
	pthread_mutex_lock(&o->lock);
	insert_change(c);	/* new ones wait for this one: it is its turn some time */
	while (!(alone = !must_wait(c, len, off)) && wait)
		pthread_cond_wait(&o->ended, &o->lock);
	c->pending = false;
	if (!alone)
		remove_change(c);
	pthread_mutex_unlock(&o->lock);
	return alone;
}
