/*
 * range.h - ranges of a disk that somebody is changing in several steps.
 *
 * Whoever holds a range is alone with it.  A holder never waits for another range, and never
 * for anything but local disk, so that those who wait for it get it.
 */
#ifndef XNBD_RANGE_H
#define XNBD_RANGE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* A range that is held, or wanted; it lies on its holder's stack. */
struct range {
	struct range *next;
	uint64_t off, len;
};

struct ranges {
	pthread_mutex_t lock;		/* guards all; a leaf */
	pthread_cond_t released;
	struct range *held;
	unsigned waiting;
};

void ranges_init(struct ranges *s);
void ranges_destroy(struct ranges *s);

/* Take r, whose off and len are set.  False if that would mean to wait, unless wait is set. */
bool ranges_take(struct ranges *s, struct range *r, bool wait);

void ranges_release(struct ranges *s, struct range *r);

#endif
