/*
 * stats.h - what clients ask for, and how long that takes: of one client, and of all.
 *
 * The statistics of a client belong to its loop's thread.
 */
#ifndef XNBD_STATS_H
#define XNBD_STATS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util.h"

struct request;

enum {
	STATS_DELAYS = 40,		/* up to 6 days */
	STATS_LINE = 256,		/* room for a description */
};

/* Requests that were answered. */
struct tally {
	uint64_t reads, writes, flushes, others;
	uint64_t read_bytes, written_bytes;
	uint64_t errors;		/* how many of them were answered with an error */
	uint64_t longest;		/* us */
	uint64_t delay[STATS_DELAYS];	/* how many took how long: see delay_index() */
};

/* Of one client. */
struct stats {
	struct tally past, recent;	/* before and since the end of the last interval */
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

/* A request is answered, in the turn in which it came or in a later one. */
void stats_count(struct stats *s, const struct request *r);

/* The turn's requests have taken all of it. */
void stats_end_turn(struct stats *s);

/* The client is gone: what it did, "" for nothing, in line of STATS_LINE bytes. */
void stats_end(struct stats *s, const char *peer, char *line);

/* Add what a client did to what all did that have left. */
void stats_leave(struct stats *gone, const struct stats *s);

/* The log is told of an error that a client has got, but not of too many. */
void stats_complain(struct stats *s, const char *peer, const struct request *r);

/* Say how many errors were not told, if it is time to.  Returns when it is; 0 for never. */
uint64_t stats_catch_up(struct stats *s, const char *peer, uint64_t now);

/* A tally in names and numbers, as the control socket tells it. */
enum { TALLY_FIELDS = 10 };
struct tally_field {
	const char *name;
	uint64_t value;
};
void tally_fields(const struct tally *t, struct tally_field field[TALLY_FIELDS]);

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

/*
 * The survey of all clients.  Each loop tells those of its own clients on its own thread.  A loop
 * may be late, if a disk keeps it.
 */

/*
 * One more loop is going to tell.  It tells of a client, or of all that have left, with peer NULL,
 * and then that there are no more.
 */
void stats_expect(void);
void stats_tell(const char *peer, struct stats *s, unsigned in_flight);
void stats_told(void);

/*
 * The rest is the main thread's.  The log gets what was done every so often, 0 for never.  ask()
 * has each loop be expected and tell.
 */
void stats_init(unsigned seconds, void (*ask)(void));

/* now_ms() when stats_tend() has something to do, UINT64_MAX for never; whether there are clients. */
uint64_t stats_due(bool clients);

/* Log what each client did since it connected. */
void stats_log(void);

/*
 * Gather what clients did, for a query; stats_tend() tells when that is complete.  True if the
 * survey that runs now belongs to an earlier query: its end comes first.
 */
bool stats_gather(void);

/*
 * Go on with what is due.  True once for each survey that stats_gather() asked for: it is complete,
 * and stays so until the next call, which must follow.
 */
bool stats_tend(void);

/* What was gathered, complete or not; stats_release() must follow. */
struct survey {
	struct tally total;
	struct survey_client {
		char peer[ADDRESS_MAX];
		struct tally all;
		unsigned in_flight;
	} *client;
	size_t count, room;		/* of clients */
	unsigned missing;		/* loops that have not told */
};
const struct survey *stats_take(void);
void stats_release(void);

#endif
