/*
 * stats.h - what clients ask for, and how long that takes: of one client, and of all.
 *
 * The counters of a client are written by its thread alone, without locked instructions, and read
 * by the main thread.
 */
#ifndef XNBD_STATS_H
#define XNBD_STATS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto.h"
#include "util.h"

struct request;

enum {
	STATS_DELAYS = 40,		/* up to 6 days */
	STATS_LINE = 256,		/* room for a description */
};

/* Requests that were answered. */
struct tally {
	_Atomic uint64_t reads, writes, flushes, others;
	_Atomic uint64_t read_bytes, written_bytes;
	_Atomic uint64_t errors;	/* how many of them were answered with an error */
	_Atomic uint64_t longest;	/* us */
	_Atomic uint64_t delay[STATS_DELAYS];	/* how many took how long: see delay_index() */
};

/* Of one client. */
struct stats {
	struct tally all;		/* since it connected */
	_Atomic uint64_t longest;	/* us, of this interval */
	atomic_uint in_flight;		/* requests that are not done */
	const char *peer;

	struct stats *next, **back;	/* of the list; with its lock */
	struct tally told;		/* all at the end of the last interval; the main thread's */

	/* The rest is its thread's alone. */
	uint64_t now;			/* now_us() of the turn; 0: none has been needed */
	uint64_t fresh;			/* of this turn's requests that it has answered already */

	/* Errors in the log */
	uint64_t say_again;		/* now_ms() when there may be another line */
	uint64_t unsaid;		/* errors since the last one */
};

/* The time for this turn's requests; one look at the clock. */
static inline uint64_t stats_time(struct stats *s)
{
	if (!s->now)
		s->now = now_us();
	return s->now;
}

/* A request is answered, with an errno or 0; it came in the turn whose stats_time() was begun. */
void stats_count(struct stats *s, const struct proto_request *h, int error, uint64_t begun);

/* The turn's requests have taken all of it. */
void stats_end_turn(struct stats *s);

/* So many requests are not done. */
static inline void stats_in_flight(struct stats *s, unsigned n)
{
	atomic_store_explicit(&s->in_flight, n, memory_order_relaxed);
}

/* A client is there from now on; peer has to stay until stats_end(). */
void stats_begin(struct stats *s, const char *peer);

/* The client is gone: what it did, "" for nothing, in line of STATS_LINE bytes. */
void stats_end(struct stats *s, char *line);

/* The log is told of an error that a client has got, but not of too many. */
void stats_complain(struct stats *s, const char *peer, const struct request *r);

/* Say how many errors were not told, if it is time to.  Returns when it is; 0 for never. */
uint64_t stats_catch_up(struct stats *s, const char *peer, uint64_t now);

/*
 * Delays are counted by powers of two: delay[i] those of up to delay_top(i) microseconds, which
 * is one less than a power, and longer than delay_top(i - 1).
 */
unsigned delay_index(uint64_t us);
uint64_t delay_top(unsigned i);

/*
 * Microseconds within which that share of the requests was answered, rounded up to a delay_top(),
 * but not above the longest.
 */
uint64_t tally_percentile(const struct tally *t, unsigned percent);

/* All clients.  Main thread. */

/*
 * Log what was done each so many seconds, of which the first begin with this call; 0 for never.
 * Returns now_ms() of the next call, UINT64_MAX for none.
 */
uint64_t stats_tend(unsigned seconds);

/* Log what each client did since it connected. */
void stats_log(void);

/*
 * The first of the clients that are there, in the order in which they came; total is what all did,
 * with those that have left.  None comes or leaves until stats_release().
 */
const struct stats *stats_take(struct tally *total);
void stats_release(void);

#endif
