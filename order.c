/*
 * order.c - changes of an image that are under way: see order.h.
 *
 * A loop that changes something at once does not register it: it publishes the range in a slot of
 * its own, then looks whether anything is registered or in another slot, and mostly finds nothing.
 * Who registers a change, or begins with one, does so under the lock and then looks at the slots.
 * Each side makes itself visible first and looks at the other afterwards, so that one of them sees
 * the other.
 *
 * Numbers: a registered change has an even one.  One in a slot that found nothing under way has the
 * next odd one, so that it is older than all that come later, without a shared counter to write to.
 */
#include "order.h"

#include "xnbd.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum {
	SPANS_MAX = 4096,	/* a change in more pieces is waited for, and not cut further */
	LINE = 64,		/* bytes of the processor's cache that change hands together */
};

struct slot {
	_Alignas(LINE) _Atomic(struct order *) order;	/* NULL: nothing is published */
	atomic_uint_least64_t off, len;
	uint64_t number;	/* the owner's; 0: nothing older was there */
};

static struct slot *slots;
static unsigned slots_max;
static atomic_uint slots_used;
static _Thread_local struct slot *mine;

bool order_prepare(unsigned threads)
{
	slots = aligned_alloc(LINE, threads * sizeof(*slots));
	if (slots)
		memset(slots, 0, threads * sizeof(*slots));
	slots_max = threads;
	return slots != NULL;
}

void order_unprepare(void)
{
	atomic_store(&slots_used, 0);
	free(slots);
	slots = NULL;
}

void order_init(struct order *o)
{
	memset(o, 0, sizeof(*o));
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
	unsigned low = 0, high = c->count;

	while (low < high) {
		unsigned mid = (low + high) / 2;

		if (c->left[mid].off + c->left[mid].len <= off)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static bool has_left(const struct change *c, uint64_t len, uint64_t off)
{
	unsigned i = find_left(c, off);

	return i < c->count && c->left[i].off < off + len;
}

/* Room for one span more.  False if out of memory. */
static bool grow(struct change *c)
{
	unsigned room = c->room * 2;
	struct span *left;

	if (c->count < c->room)
		return true;
	left = malloc(room * sizeof(*left));
	if (!left)
		return false;
	memcpy(left, c->left, c->count * sizeof(*left));
	if (c->left != &c->one)
		free(c->left);
	c->left = left;
	c->room = room;
	return true;
}

/* Take a range from what is left. */
static void take(struct change *c, uint64_t len, uint64_t off)
{
	uint64_t end = off + len;
	unsigned i = find_left(c, off), n = 0;
	struct span *s = &c->left[i];

	if (i == c->count || s->off >= end)
		return;
	if (s->off < off && s->off + s->len > end) {	/* from its middle */
		if (!grow(c)) {
			c->error = -ENOMEM;
			c->count = 0;
			return;
		}
		s = &c->left[i];
		memmove(s + 1, s, (c->count - i) * sizeof(*s));
		c->count++;
		s[1].len = s[1].off + s[1].len - end;
		s[1].off = end;
		s[0].len = off - s[0].off;
		return;
	}
	if (s->off < off) {
		s->len = off - s->off;
		i++;
	}
	while (i + n < c->count && c->left[i + n].off + c->left[i + n].len <= end)
		n++;
	memmove(&c->left[i], &c->left[i + n], (c->count - i - n) * sizeof(c->left[0]));
	c->count -= n;
	if (i < c->count && c->left[i].off < end) {
		c->left[i].len -= end - c->left[i].off;
		c->left[i].off = end;
	}
}

/* Conflicts.  All of these are called with the lock. */

/* Whether a loop, other than the one that asks, is storing something in these blocks. */
static bool is_in_slot(const struct order *o, uint64_t len, uint64_t off)
{
	unsigned used = atomic_load(&slots_used);

	for (unsigned i = 0; i < used; i++) {
		struct slot *s = &slots[i];

		if (s != mine && atomic_load(&s->order) == o &&
		    shares_block(atomic_load(&s->off), atomic_load(&s->len), off, len))
			return true;
	}
	return false;
}

/* Whether the change of that number, or c, has to wait before it stores something there. */
static bool must_wait(const struct order *o, const struct change *c, uint64_t number, uint64_t len,
		      uint64_t off)
{
	for (const struct change *i = o->first; i; i = i->next) {
		if (i == c)
			continue;
		if (shares_block(i->active.off, i->active.len, off, len) &&
		    (!i->pending || i->number < number))
			return true;
		if (i->number < number && i->count >= SPANS_MAX && has_left(i, len, off))
			return true;
	}
	return is_in_slot(o, len, off);
}

/* What is stored now is not to be stored by older changes any more. */
static void take_from_older(struct order *o, uint64_t number, uint64_t len, uint64_t off)
{
	for (struct change *i = o->first, *next; i; i = next) {
		next = i->next;
		if (i->hold || i->number >= number || i->count == 0)
			continue;
		take(i, len, off);
		if (i->count == 0 && i->emptied) {
			atomic_store(&i->is_empty, true);
			i->emptied(i);
		}
	}
}

static void wake_waiting(struct order *o)
{
	if (atomic_load(&o->waiting))
		pthread_cond_broadcast(&o->ended);
}

/*
 * Sleep until some I/O has ended.  The first call returns at once, but lets loops know: who is in a
 * slot may have left it just before that.
 */
static void wait_for_end(struct order *o, bool *announced)
{
	if (*announced)
		pthread_cond_wait(&o->ended, &o->lock);
	else
		atomic_fetch_add(&o->waiting, 1);
	*announced = true;
}

static void stop_waiting(struct order *o, bool announced)
{
	if (announced)
		atomic_fetch_sub(&o->waiting, 1);
}

static uint64_t next_number(struct order *o)
{
	return atomic_fetch_add(&o->taken, 2) + 2;
}

static void insert(struct order *o, struct change *c)
{
	c->order = o;
	c->next = o->first;
	o->first = c;
	atomic_fetch_add(&o->count, 1);
}

static void take_out(struct order *o, struct change *c)
{
	struct change **p = &o->first;

	while (*p != c)
		p = &(*p)->next;
	*p = c->next;
	atomic_fetch_sub(&o->count, 1);
	c->order = NULL;
}

/* Loops */

static struct slot *get_slot(void)
{
	unsigned i;

	if (!mine) {
		i = atomic_fetch_add(&slots_used, 1);
		assert(i < slots_max);
		mine = &slots[i];
	}
	return mine;
}

bool order_enter(struct order *o, uint64_t len, uint64_t off)
{
	struct slot *s = get_slot();
	uint64_t odd = atomic_load_explicit(&o->taken, memory_order_relaxed) + 1;
	bool free;

	atomic_store_explicit(&s->off, off, memory_order_relaxed);
	atomic_store_explicit(&s->len, len, memory_order_relaxed);
	atomic_store(&s->order, o);
	s->number = odd;
	/* In this order: who registers a change leaves its slot afterwards. */
	if (!is_in_slot(o, len, off) && atomic_load(&o->count) == 0)
		return true;
	pthread_mutex_lock(&o->lock);
	s->number = next_number(o);
	free = !must_wait(o, NULL, s->number, len, off);
	pthread_mutex_unlock(&o->lock);
	return free;
}

void order_register(struct order *o, struct change *c, uint64_t len, uint64_t off)
{
	c->number = mine->number;
	c->one = (struct span){ off, len };
	c->left = &c->one;
	c->count = c->room = 1;
	pthread_mutex_lock(&o->lock);
	insert(o, c);
	pthread_mutex_unlock(&o->lock);
}

void order_leave(struct order *o, bool stored)
{
	struct slot *s = mine;

	if (stored && atomic_load_explicit(&o->count, memory_order_relaxed) > 0) {
		pthread_mutex_lock(&o->lock);
		take_from_older(o, s->number, atomic_load(&s->len), atomic_load(&s->off));
		pthread_mutex_unlock(&o->lock);
	}
	atomic_store(&s->order, NULL);
	if (atomic_load(&o->waiting)) {
		pthread_mutex_lock(&o->lock);
		wake_waiting(o);
		pthread_mutex_unlock(&o->lock);
	}
}

/* Registered changes */

/* A part of what is left with which it may begin now; false if there is none. */
static bool choose(const struct order *o, const struct change *c, uint64_t max, struct span *part)
{
	for (unsigned i = 0; i < c->count; i++) {
		struct span s = c->left[i];

		if (s.len > max)
			s.len = max - (s.off + max) % BLOCK_SIZE;
		if (!must_wait(o, c, c->number, s.len, s.off)) {
			*part = s;
			return true;
		}
	}
	return false;
}

int order_begin(struct change *c, uint64_t max, bool wait, struct span *part)
{
	struct order *o = c->order;
	bool announced = false;
	int ret = -EAGAIN;

	pthread_mutex_lock(&o->lock);
	while (ret == -EAGAIN) {
		if (c->count == 0)
			ret = c->error;
		else if (choose(o, c, max, part))
			ret = 1;
		else if (wait)
			wait_for_end(o, &announced);
		else
			break;
	}
	if (ret == 1)
		c->active = *part;
	stop_waiting(o, announced);
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
		take_from_older(o, c->number, s.len, s.off);
	wake_waiting(o);
	pthread_mutex_unlock(&o->lock);
}

void order_remove(struct change *c)
{
	struct order *o = c->order;

	if (!o)
		return;
	pthread_mutex_lock(&o->lock);
	take_out(o, c);
	wake_waiting(o);
	pthread_mutex_unlock(&o->lock);
	if (c->left != &c->one)
		free(c->left);
}

bool order_hold(struct order *o, struct change *c, uint64_t len, uint64_t off, bool wait)
{
	bool announced = false, free;

	memset(c, 0, sizeof(*c));
	c->left = &c->one;
	c->hold = c->pending = true;
	c->active = (struct span){ off, len };
	pthread_mutex_lock(&o->lock);
	c->number = next_number(o);
	insert(o, c);	/* new ones wait for this one: it is its turn some time */
	while (!(free = !must_wait(o, c, c->number, len, off)) && wait)
		wait_for_end(o, &announced);
	stop_waiting(o, announced);
	c->pending = false;
	if (!free)
		take_out(o, c);
	pthread_mutex_unlock(&o->lock);
	return free;
}
