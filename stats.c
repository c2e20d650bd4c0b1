/*
 * stats.c - what clients ask for, and how long that takes: see stats.h.
 */
#include "stats.h"

#include "backend.h"
#include "log.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SAY_AGAIN_MS = 1000 };	/* between lines about the errors of one client */

/* Counting */

/* Delays are counted by their length in bits. */
static unsigned delay_bits(uint64_t us)
{
	unsigned bits = 0;

	for (; us > 0 && bits < STATS_DELAYS - 1; us >>= 1)
		bits++;
	return bits;
}

uint64_t delay_top(unsigned i)
{
	return (UINT64_C(1) << i) - 1;
}

static void count_delay(struct stats *s, uint64_t us, uint64_t n)
{
	s->all.delay[delay_bits(us)] += n;
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

/* Sums */

/* Add it so many times: UINT64_MAX, which is -1, takes it away. */
static void tally_add(struct tally *sum, const struct tally *t, uint64_t times)
{
	for (unsigned i = 0; i < STATS_COUNTS; i++)
		sum->count[i] += times * t->count[i];
	for (unsigned i = 0; i < STATS_DELAYS; i++)
		sum->delay[i] += times * t->delay[i];
	if (t->longest > sum->longest)
		sum->longest = t->longest;
}

void stats_leave(struct stats *gone, const struct stats *s)
{
	tally_add(&gone->all, &s->all, 1);
	tally_add(&gone->before, &s->before, 1);
	if (s->longest > gone->longest)
		gone->longest = s->longest;
}

uint64_t tally_requests(const struct tally *t)
{
	return t->count[STATS_READS] + t->count[STATS_WRITES] + t->count[STATS_FLUSHES] +
	       t->count[STATS_OTHERS];
}

/* Microseconds within which that share of requests was answered, rounded up to a power of two. */
static uint64_t tally_percentile(const struct tally *t, unsigned percent)
{
	uint64_t all = 0, seen = t->delay[0];
	unsigned i;

	for (i = 0; i < STATS_DELAYS; i++)
		all += t->delay[i];
	for (i = 0; i < STATS_DELAYS - 1 && seen < all - all * (100 - percent) / 100; i++)
		seen += t->delay[i + 1];
	return delay_top(i) < t->longest ? delay_top(i) : t->longest;
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
	unsigned long long read = scale(t->count[STATS_READ_BYTES], &read_unit);
	unsigned long long written = scale(t->count[STATS_WRITTEN_BYTES], &write_unit);

	snprintf(line, STATS_LINE,
		 "%llu reads %llu %s, %llu writes %llu %s, %llu flushes, %llu others, "
		 "%llu errors, p50 %llu us, p99 %llu us, max %llu us",
		 (unsigned long long)t->count[STATS_READS], read, read_unit,
		 (unsigned long long)t->count[STATS_WRITES], written, write_unit,
		 (unsigned long long)t->count[STATS_FLUSHES],
		 (unsigned long long)t->count[STATS_OTHERS],
		 (unsigned long long)t->count[STATS_ERRORS],
		 (unsigned long long)tally_percentile(t, 50),
		 (unsigned long long)tally_percentile(t, 99), (unsigned long long)t->longest);
}

void tally_fields(const struct tally *t, struct stats_field field[STATS_FIELDS])
{
	static const char *const names[] = {
		[STATS_READS] = "reads",
		[STATS_WRITES] = "writes",
		[STATS_FLUSHES] = "flushes",
		[STATS_OTHERS] = "others",
		[STATS_READ_BYTES] = "read-bytes",
		[STATS_WRITTEN_BYTES] = "written-bytes",
		[STATS_ERRORS] = "errors",
	};
	struct stats_field *f = field;

	for (unsigned i = 0; i < STATS_COUNTS; i++)
		*f++ = (struct stats_field){ names[i], t->count[i] };
	*f++ = (struct stats_field){ "max-us", t->longest };
	*f++ = (struct stats_field){ "p50-us", tally_percentile(t, 50) };
	*f++ = (struct stats_field){ "p99-us", tally_percentile(t, 99) };
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

/* The survey: loops */

enum {
	INTERVAL = 1 << 0,	/* to the log: since the last time */
	TOTALS = 1 << 1,	/* to the log: since the beginning */
	ANSWER = 1 << 2,	/* to who asks */
};

static struct {
	uint64_t interval;		/* ms; 0 for none */
	uint64_t due;			/* now_ms(); UINT64_MAX for never */
	void (*ask)(void);
	unsigned wanted, running;	/* what for */

	atomic_uint missing;		/* who have not told: loops, and stats_begin() */
	atomic_bool ended;		/* all have told */

	pthread_mutex_t lock;		/* guards the rest; a leaf */
	struct survey found;
	struct tally recent;		/* of this interval, of all clients */
} survey = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void log_tally(const char *name, const struct tally *t)
{
	char line[STATS_LINE];

	tally_describe(t, line);
	log_at(LOG_ASKED, "%s: %s", name, line);
}

/* Nothing of a client that did nothing. */
static void log_client(const char *peer, const struct tally *t)
{
	if (peer && tally_requests(t) > 0)
		log_tally(peer, t);
}

static void end_interval(const char *peer, struct stats *s)
{
	struct tally t = s->all;

	tally_add(&t, &s->before, UINT64_MAX);
	t.longest = s->longest;
	pthread_mutex_lock(&survey.lock);
	tally_add(&survey.recent, &t, 1);
	pthread_mutex_unlock(&survey.lock);
	log_client(peer, &t);
	s->before = s->all;
	s->longest = 0;
}

/* Out of memory: that one is left out. */
static void add_client(struct survey *f, const char *peer, const struct stats *s, unsigned in_flight)
{
	size_t room = f->room ? 2 * f->room : 16;
	struct survey_client *client;

	if (f->count == f->room) {
		client = realloc(f->client, room * sizeof(*client));
		if (!client)
			return;
		f->client = client;
		f->room = room;
	}
	client = &f->client[f->count++];
	memcpy(client->peer, peer, ADDRESS_MAX);
	client->all = s->all;
	client->in_flight = in_flight;
}

void stats_expect(void)
{
	atomic_fetch_add(&survey.missing, 1);
}

void stats_tell(const char *peer, struct stats *s, unsigned in_flight)
{
	pthread_mutex_lock(&survey.lock);
	tally_add(&survey.found.total, &s->all, 1);
	if (peer)
		add_client(&survey.found, peer, s, in_flight);
	pthread_mutex_unlock(&survey.lock);
	if (survey.running & INTERVAL)
		end_interval(peer, s);
	if (survey.running & TOTALS)
		log_client(peer, &s->all);
}

void stats_told(void)
{
	if (atomic_fetch_sub(&survey.missing, 1) > 1)
		return;
	atomic_store(&survey.ended, true);
	wake_main();
}

/* The survey: the main thread */

void stats_init(unsigned seconds, void (*ask)(void))
{
	survey.interval = seconds * UINT64_C(1000);
	survey.due = UINT64_MAX;
	survey.ask = ask;
}

/* An interval begins with the first client. */
uint64_t stats_due(bool clients)
{
	if (!survey.interval || !clients)
		survey.due = UINT64_MAX;
	else if (survey.due == UINT64_MAX)
		survey.due = now_ms() + survey.interval;
	return survey.due;
}

void stats_log(void)
{
	survey.wanted |= TOTALS;
}

bool stats_gather(void)
{
	survey.wanted |= ANSWER;
	wake_main();
	return survey.running & ANSWER;
}

static void stats_begin(void)
{
	survey.running = survey.wanted;
	survey.wanted = 0;
	pthread_mutex_lock(&survey.lock);
	survey.found.total = (struct tally){ 0 };
	survey.found.count = 0;
	survey.recent = (struct tally){ 0 };
	pthread_mutex_unlock(&survey.lock);
	stats_expect();
	survey.ask();
	stats_told();
}

/* Nobody tells any more.  Returns whether somebody asked. */
static bool stats_end(void)
{
	const struct tally *total = &survey.found.total;
	bool answered = survey.running & ANSWER;

	if (survey.running & INTERVAL)
		log_client("all clients", &survey.recent);
	if (survey.running & TOTALS)
		log_tally("all clients", total);
	survey.running = 0;
	return answered;
}

bool stats_tend(void)
{
	if (now_ms() >= survey.due) {
		survey.wanted |= INTERVAL;
		survey.due = now_ms() + survey.interval;
	}
	if (atomic_exchange(&survey.ended, false) && stats_end())
		return true;	/* it is taken before the next one begins */
	if (!survey.running && survey.wanted)
		stats_begin();
	return false;
}

const struct survey *stats_take(void)
{
	pthread_mutex_lock(&survey.lock);
	survey.found.missing = atomic_load(&survey.missing);
	return &survey.found;
}

void stats_release(void)
{
	pthread_mutex_unlock(&survey.lock);
}
