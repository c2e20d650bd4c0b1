/*
 * stats.h - what clients ask for, and how long that takes.
 *
 * The statistics of a client are those of its loop's thread, but for a survey.
 */
#ifndef XNBD_STATS_H
#define XNBD_STATS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util.h"
#include "xnbd.h"

enum {
	STATS_READ,
	STATS_WRITE,
	STATS_FLUSH,
	STATS_OTHER,
	STATS_KINDS,

	STATS_BUCKETS = 100,		/* up to 67 s; the last one has what is more */
	STATS_LINE = 256,		/* room for a description */
};

/* Requests that were answered. */
struct tally {
	uint64_t count[STATS_KINDS];
	uint64_t bytes[STATS_WRITE + 1];	/* that were read, and written */
	uint64_t errors;
	uint64_t longest;			/* us */
	uint64_t delay[STATS_BUCKETS];		/* how many took how long, see bucket_top() */
};

/* Of one client. */
struct stats {
	struct tally all;		/* since it connected */
	struct tally *before;		/* as they were at the last report; NULL if there was none */
	uint64_t longest;		/* us; since then */
	uint64_t now;			/* now_us() of the turn; 0: none has been needed */
	uint64_t fresh;			/* of this turn's requests that it has answered already */

	/* Errors in the log */
	uint64_t say_again;		/* now_ms() when there may be another line */
	uint64_t unsaid;		/* errors since the last one */
};

/* What a client, or all of them, did.  NULL as peer: those that have left. */
typedef void stats_see(const char *peer, struct stats *s, unsigned in_flight);

/* For loops, with as little as can be for each request. */

/* The time for this turn's requests; one look at the clock. */
static inline uint64_t stats_time(struct stats *s)
{
	if (!s->now)
		s->now = now_us();
	return s->now;
}

/* A request that came in an earlier turn is answered. */
void stats_late(struct stats *s, const struct request *r);

/* A request is answered. */
static inline void stats_count(struct stats *s, const struct request *r)
{
	unsigned cmd = r->h.cmd;
	struct tally *t = &s->all;

	t->count[cmd <= NBD_CMD_WRITE ? cmd : cmd == NBD_CMD_FLUSH ? STATS_FLUSH : STATS_OTHER]++;
	if (r->error)
		t->errors++;
	else if (cmd <= NBD_CMD_WRITE)
		t->bytes[cmd] += r->h.len;
	if (r->begun == s->now)
		s->fresh++;
	else
		stats_late(s, r);
}

/* A READ is answered in the turn in which it came. */
static inline void stats_count_read(struct stats *s, uint64_t len)
{
	s->all.count[STATS_READ]++;
	s->all.bytes[STATS_READ] += len;
	s->fresh++;
}

/* The turn's requests have taken all of it. */
void stats_end_turn(struct stats *s);

/* The rest */

/* Add to sum, and take off what is in before. */
void tally_add(struct tally *sum, const struct tally *t);
void tally_subtract(struct tally *t, const struct tally *before);

uint64_t tally_requests(const struct tally *t);

/* Microseconds within which that share of requests was answered, rounded up to a bucket. */
uint64_t tally_percentile(const struct tally *t, unsigned percent);

/* The top of a bucket, in microseconds. */
uint64_t bucket_top(unsigned bucket);

/* For people, in line of STATS_LINE bytes. */
void tally_describe(const struct tally *t, char *line);

/* A client leaves: add what it did to those of all that have left. */
void stats_leave(struct stats *gone, const struct stats *s);

/* Forget them, with what belongs to them. */
void stats_free(struct stats *s);

/* The log is told of an error that a client has got, but not of too many. */
void stats_complain(struct stats *s, const char *peer, const struct request *r);

/* Say how many errors were not told, if it is time to.  Returns when it is; 0 for never. */
uint64_t stats_catch_up(struct stats *s, const char *peer, uint64_t now);

#endif
