/*
 * stats.c - what clients ask for, and how long that takes: see stats.h.
 *
 * Delays are counted in buckets: one for each microsecond below 4, then 4 for each doubling, so
 * that what is told is at most a fifth too much.
 */
#include "stats.h"

#include "backend.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SAY_AGAIN_MS = 1000 };	/* between lines about the errors of one client */

/* Counting */

static unsigned bucket_of(uint64_t us)
{
	unsigned doublings = 0, bucket;

	for (; us >= 8; us >>= 1)
		doublings++;
	bucket = 4 * doublings + (unsigned)us;
	return bucket < STATS_BUCKETS ? bucket : STATS_BUCKETS - 1;
}

uint64_t bucket_top(unsigned bucket)
{
	unsigned doublings = bucket < 4 ? 0 : bucket / 4 - 1;

	return ((uint64_t)(bucket - 4 * doublings + 1) << doublings) - 1;
}

static void count_delay(struct stats *s, uint64_t us, uint64_t n)
{
	s->all.delay[bucket_of(us)] += n;
	if (us > s->all.longest)
		s->all.longest = us;
	if (us > s->longest)
		s->longest = us;
}

void stats_late(struct stats *s, const struct request *r)
{
	count_delay(s, stats_time(s) - r->begun, 1);
}

void stats_end_turn(struct stats *s)
{
	if (s->fresh > 0)
		count_delay(s, now_us() - s->now, s->fresh);
	s->fresh = 0;
	s->now = 0;
}

void stats_free(struct stats *s)
{
	if (s)
		free(s->before);
	free(s);
}

/* Sums: all of a tally is numbers, and all but one of them can be added. */

enum { TALLY_NUMBERS = sizeof(struct tally) / sizeof(uint64_t) };

_Static_assert(sizeof(struct tally) == TALLY_NUMBERS * sizeof(uint64_t), "numbers alone");

void tally_add(struct tally *sum, const struct tally *t)
{
	uint64_t longest = sum->longest > t->longest ? sum->longest : t->longest;

	for (unsigned i = 0; i < TALLY_NUMBERS; i++)
		((uint64_t *)sum)[i] += ((const uint64_t *)t)[i];
	sum->longest = longest;
}

void tally_subtract(struct tally *t, const struct tally *before)
{
	uint64_t longest = t->longest;

	for (unsigned i = 0; i < TALLY_NUMBERS; i++)
		((uint64_t *)t)[i] -= ((const uint64_t *)before)[i];
	t->longest = longest;
}

void stats_leave(struct stats *gone, const struct stats *s)
{
	tally_add(&gone->all, &s->all);
	if (s->longest > gone->longest)
		gone->longest = s->longest;
}

uint64_t tally_requests(const struct tally *t)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < STATS_KINDS; i++)
		n += t->count[i];
	return n;
}

uint64_t tally_percentile(const struct tally *t, unsigned percent)
{
	uint64_t n = 0, before = 0;
	unsigned i;

	for (i = 0; i < STATS_BUCKETS; i++)
		n += t->delay[i];
	for (i = 0; i < STATS_BUCKETS - 1; i++) {
		before += t->delay[i];
		if (before >= n - n * (100 - percent) / 100)
			break;
	}
	return bucket_top(i) < t->longest && i < STATS_BUCKETS - 1 ? bucket_top(i) : t->longest;
}

/* Text */

/* Four digits at least, if there are as many. */
static unsigned long long scale(uint64_t bytes, const char **unit)
{
	static const char units[][4] = { "B", "KiB", "MiB", "GiB", "TiB" };
	unsigned i = 0;

	for (; bytes >= 10240 && i + 1 < ARRAY_SIZE(units); bytes >>= 10)
		i++;
	*unit = units[i];
	return bytes;
}

void tally_describe(const struct tally *t, char *line)
{
	const char *read_unit, *write_unit;
	unsigned long long read = scale(t->bytes[STATS_READ], &read_unit);
	unsigned long long written = scale(t->bytes[STATS_WRITE], &write_unit);

	snprintf(line, STATS_LINE,
		 "%llu reads %llu %s, %llu writes %llu %s, %llu flushes, %llu others, "
		 "%llu errors, p50 %llu us, p99 %llu us, max %llu us",
		 (unsigned long long)t->count[STATS_READ], read, read_unit,
		 (unsigned long long)t->count[STATS_WRITE], written, write_unit,
		 (unsigned long long)t->count[STATS_FLUSH],
		 (unsigned long long)t->count[STATS_OTHER], (unsigned long long)t->errors,
		 (unsigned long long)tally_percentile(t, 50),
		 (unsigned long long)tally_percentile(t, 99), (unsigned long long)t->longest);
}

/* Errors */

enum { COMMAND_NAME = 24 };

/* In name, of COMMAND_NAME bytes. */
static const char *name_of(unsigned cmd, char *name)
{
	static const char names[][13] = { "READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE",
					  "WRITE_ZEROES", "BLOCK_STATUS" };

	if (cmd < ARRAY_SIZE(names))
		return names[cmd];
	snprintf(name, COMMAND_NAME, "command %u", cmd);
	return name;
}

/* Why proto_check_request() did not let it pass. */
static const char *refusal(const struct request *r)
{
	uint64_t size = r->backend->size;

	switch (r->error) {
	case EPERM:
		return "the export is read-only";
	case EOVERFLOW:
		return "it is too long";
	}
	if (r->h.cmd == NBD_CMD_WRITE && r->h.len > PROTO_MAX_PAYLOAD)
		return "it is too long";
	if (r->h.len > size || r->h.off > size - r->h.len)
		return "it passes the end";
	return "the command, its flags or its range are not known here";
}

/* What nobody can be blamed for, or the client alone. */
static bool is_detail(const struct request *r)
{
	return r->refused || r->error == ENOTSUP || r->error == ESHUTDOWN;
}

void stats_complain(struct stats *s, const char *peer, const struct request *r)
{
	enum log_level level = is_detail(r) ? LOG_DETAIL : LOG_ERROR;
	char name[COMMAND_NAME];
	uint64_t now;

	if (!log_shows(level))
		return;
	now = now_ms();
	if (now < s->say_again) {
		s->unsaid++;
		return;
	}
	stats_catch_up(s, peer, now);
	s->say_again = now + SAY_AGAIN_MS;
	log_at(level, "%s: %s of %llu bytes at %llu %s: %s", peer, name_of(r->h.cmd, name),
	       (unsigned long long)r->h.len, (unsigned long long)r->h.off,
	       r->refused ? "refused" : "failed", r->refused ? refusal(r) : strerror(r->error));
}

uint64_t stats_catch_up(struct stats *s, const char *peer, uint64_t now)
{
	if (!s->unsaid || now < s->say_again)
		return s->unsaid ? s->say_again : 0;
	log_error("%s: ... and %llu more", peer, (unsigned long long)s->unsaid);
	s->unsaid = 0;
	s->say_again = now + SAY_AGAIN_MS;
	return 0;
}
