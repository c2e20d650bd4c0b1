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
#include "xnbd.h"

/* What is counted of the requests that were answered. */
enum {
	STATS_READS,			/* by NBD_CMD_READ, NBD_CMD_WRITE */
	STATS_WRITES,
	STATS_FLUSHES,
	STATS_OTHERS,
	STATS_READ_BYTES,		/* likewise */
	STATS_WRITTEN_BYTES,
	STATS_ERRORS,
	STATS_COUNTS,

	STATS_FIELDS = STATS_COUNTS + 3,
	STATS_DELAYS = 40,		/* up to 6 days */
	STATS_LINE = 256,		/* room for a description */
};

struct tally {
	uint64_t count[STATS_COUNTS];
	uint64_t longest;		/* us */
	uint64_t delay[STATS_DELAYS];	/* how many took how long, see delay_top() */
};

/* Of one client. */
struct stats {
	struct tally all;		/* since it connected */
	struct tally before;		/* as they were at the last interval's end */
	uint64_t longest;		/* us; since then */
	uint64_t now;			/* now_us() of the turn; 0: none has been needed */
	uint64_t fresh;			/* of this turn's requests that it has answered already */

	/* Errors in the log */
	uint64_t say_again;		/* now_ms() when there may be another line */
	uint64_t unsaid;		/* errors since the last one */
};

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

	t->count[cmd <= NBD_CMD_WRITE ? cmd : cmd == NBD_CMD_FLUSH ? STATS_FLUSHES : STATS_OTHERS]++;
	if (r->error)
		t->count[STATS_ERRORS]++;
	else if (cmd <= NBD_CMD_WRITE)
		t->count[STATS_READ_BYTES + cmd] += r->h.len;
	if (r->begun == s->now)
		s->fresh++;
	else
		stats_late(s, r);
}

/* A READ is answered in the turn in which it came. */
static inline void stats_count_read(struct stats *s, uint64_t len)
{
	s->all.count[STATS_READS]++;
	s->all.count[STATS_READ_BYTES] += len;
	s->fresh++;
}

/* The turn's requests have taken all of it. */
void stats_end_turn(struct stats *s);

/* One tally */

uint64_t tally_requests(const struct tally *t);

/* The longest delay that is counted in delay[i], in microseconds. */
uint64_t delay_top(unsigned i);

/* A tally in names and numbers, as the control socket tells it. */
struct stats_field {
	const char *name;
	uint64_t value;
};
void tally_fields(const struct tally *t, struct stats_field field[STATS_FIELDS]);

/* The same for people, in line of STATS_LINE bytes. */
void tally_describe(const struct tally *t, char *line);

/* One client */

/* A client leaves: add what it did to those of all that have left. */
void stats_leave(struct stats *gone, const struct stats *s);

/* The log is told of an error that a client has got, but not of too many. */
void stats_complain(struct stats *s, const char *peer, const struct request *r);

/* Say how many errors were not told, if it is time to.  Returns when it is; 0 for never. */
uint64_t stats_catch_up(struct stats *s, const char *peer, uint64_t now);

/*
 * The survey of all clients.  Each loop tells those of its own clients on its own thread.  A loop
 * may be late, if a disk keeps it.
 */

/* Loops: expect one more to tell; tell a client, or as peer NULL those that have left; told all. */
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
 * Gather what clients did for who asks; stats_tend() tells when that is complete.  True if it tells
 * that of somebody who asked before first.
 */
bool stats_gather(void);

/*
 * Go on with what is due.  True once for each survey that was asked for by stats_gather(): it is
 * complete, and stays so until the next call, which must follow.
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
