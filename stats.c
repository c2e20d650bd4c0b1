/*
 * stats.c - what clients ask for, and how long that takes: see stats.h.
 */
#include "stats.h"

#include "backend.h"
#include "log.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SAY_AGAIN_MS = 1000 };	/* between lines about the errors of one client */

/* Counting */

unsigned delay_index(uint64_t us)
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

uint64_t tally_percentile(const struct tally *t, unsigned percent)
{
	uint64_t all = 0, seen = t->delay[0];
	unsigned i;

	for (i = 0; i < STATS_DELAYS; i++)
		all += t->delay[i];
	for (i = 0; i < STATS_DELAYS - 1 && seen < all - all * (100 - percent) / 100; i++)
		seen += t->delay[i + 1];
	return delay_top(i) < t->longest ? delay_top(i) : t->longest;
}

static void count_delay(struct tally *t, uint64_t us, uint64_t n)
{
	t->delay[delay_index(us)] += n;
	if (us > t->longest)
		t->longest = us;
}

void stats_count(struct stats *s, const struct request *r)
{
	struct tally *t = &s->recent;

	switch (r->h.cmd) {
	case NBD_CMD_READ:
		t->reads++;
		t->read_bytes += r->error ? 0 : r->h.len;
		break;
	case NBD_CMD_WRITE:
		t->writes++;
		t->written_bytes += r->error ? 0 : r->h.len;
		break;
	case NBD_CMD_FLUSH:
		t->flushes++;
		break;
	default:
		t->others++;
	}
	if (r->error)
		t->errors++;
	if (r->begun == s->now)
		s->fresh++;
	else
		count_delay(t, stats_time(s) - r->begun, 1);
}

void stats_end_turn(struct stats *s)
{
	if (s->fresh > 0)
		count_delay(&s->recent, now_us() - s->now, s->fresh);
	s->fresh = 0;
	s->now = 0;
}

/* Sums */

static void tally_add(struct tally *sum, const struct tally *t)
{
	sum->reads += t->reads;
	sum->writes += t->writes;
	sum->flushes += t->flushes;
	sum->others += t->others;
	sum->read_bytes += t->read_bytes;
	sum->written_bytes += t->written_bytes;
	sum->errors += t->errors;
	if (t->longest > sum->longest)
		sum->longest = t->longest;
	for (unsigned i = 0; i < STATS_DELAYS; i++)
		sum->delay[i] += t->delay[i];
}

/* What a client did since it connected. */
static struct tally sum_of(const struct stats *s)
{
	struct tally all = s->past;

	tally_add(&all, &s->recent);
	return all;
}

void stats_leave(struct stats *gone, const struct stats *s)
{
	tally_add(&gone->past, &s->past);
	tally_add(&gone->recent, &s->recent);
}

static bool is_idle_tally(const struct tally *t)
{
	return t->reads + t->writes + t->flushes + t->others == 0;
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

static void tally_describe(const struct tally *t, char *line)
{
	const char *read_unit, *write_unit;
	unsigned long long read = scale(t->read_bytes, &read_unit);
	unsigned long long written = scale(t->written_bytes, &write_unit);

	snprintf(line, STATS_LINE,
		 "%" PRIu64 " reads %llu %s, %" PRIu64 " writes %llu %s, %" PRIu64 " flushes, "
		 "%" PRIu64 " others, %" PRIu64 " errors, p50 %" PRIu64 " us, p99 %" PRIu64 " us, "
		 "max %" PRIu64 " us", t->reads, read, read_unit, t->writes, written, write_unit,
		 t->flushes, t->others, t->errors, tally_percentile(t, 50),
		 tally_percentile(t, 99), t->longest);
}

void stats_end(struct stats *s, const char *peer, char *line)
{
	struct tally all;

	stats_end_turn(s);
	stats_catch_up(s, peer, UINT64_MAX);
	all = sum_of(s);
	*line = '\0';
	if (!is_idle_tally(&all))
		tally_describe(&all, line);
}

void tally_fields(const struct tally *t, struct tally_field field[TALLY_FIELDS])
{
	const struct tally_field fields[TALLY_FIELDS] = {
		{ "reads", t->reads },
		{ "writes", t->writes },
		{ "flushes", t->flushes },
		{ "others", t->others },
		{ "read-bytes", t->read_bytes },
		{ "written-bytes", t->written_bytes },
		{ "errors", t->errors },
		{ "max-us", t->longest },
		{ "p50-us", tally_percentile(t, 50) },
		{ "p99-us", tally_percentile(t, 99) },
	};

	memcpy(field, fields, sizeof(fields));
}

/* Errors */

static const char command_names[][13] = { "READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE",
					  "WRITE_ZEROES", "BLOCK_STATUS" };

/* Why proto_check_request() did not let it pass. */
static const char *refusal(const struct request *r)
{
	uint64_t size = r->backend->size;

	if (r->error == EPERM)
		return "the export is read-only";
	if (r->error == EOVERFLOW ||
	    (r->h.cmd == NBD_CMD_WRITE && r->h.len > PROTO_MAX_PAYLOAD))
		return "it is too long";
	if (r->h.len > size || r->h.off > size - r->h.len)
		return "it passes the end";
	return "the command, its flags or its range are not known here";
}

void stats_complain(struct stats *s, const char *peer, const struct request *r)
{
	bool clients_own = r->refused || r->error == ENOTSUP || r->error == ESHUTDOWN;
	enum log_level level = clients_own ? LOG_DETAIL : LOG_ERROR;
	char number[24];
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
	snprintf(number, sizeof(number), "command %u", (unsigned)r->h.cmd);
	log_at(level, "%s: %s of %" PRIu64 " bytes at %" PRIu64 " %s: %s", peer,
	       r->h.cmd < ARRAY_SIZE(command_names) ? command_names[r->h.cmd] : number, r->h.len,
	       r->h.off, r->refused ? "refused" : "failed",
	       r->refused ? refusal(r) : strerror(r->error));
}

uint64_t stats_catch_up(struct stats *s, const char *peer, uint64_t now)
{
	if (!s->unsaid || now < s->say_again)
		return s->unsaid ? s->say_again : 0;
	log_error("%s: ... and %" PRIu64 " more", peer, s->unsaid);
	s->unsaid = 0;
	s->say_again = now + SAY_AGAIN_MS;
	return 0;
}

/* The survey: loops */

enum {
	INTERVAL = 1 << 0,	/* to the log: since the last time */
	TOTALS = 1 << 1,	/* to the log: since the beginning */
	ANSWER = 1 << 2,	/* to a control connection */
};

static struct {
	uint64_t interval;		/* ms; 0 for none */
	uint64_t due;			/* now_ms(); UINT64_MAX for never */
	void (*ask)(void);
	unsigned wanted, running;	/* what for */

	atomic_uint missing;		/* loops that have not told */

	pthread_mutex_t lock;		/* guards the rest; a leaf */
	struct survey found;
	struct tally recent;		/* of this interval, of all clients */
} survey = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* Nothing of those that have left, whose name is NULL; of nothing done only if that is wanted. */
static void log_tally(const char *name, const struct tally *t, bool idle)
{
	char line[STATS_LINE];

	if (!name || (is_idle_tally(t) && !idle))
		return;
	tally_describe(t, line);
	log_at(LOG_ASKED, "%s: %s", name, line);
}

/* Out of memory: the client is left out. */
static void add_surveyed(struct survey *f, const char *peer, const struct tally *all,
			 unsigned in_flight)
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
	client->all = *all;
	client->in_flight = in_flight;
}

void stats_expect(void)
{
	atomic_fetch_add(&survey.missing, 1);
}

void stats_tell(const char *peer, struct stats *s, unsigned in_flight)
{
	struct tally all = sum_of(s);

	pthread_mutex_lock(&survey.lock);
	tally_add(&survey.found.total, &all);
	tally_add(&survey.recent, &s->recent);
	if (peer)
		add_surveyed(&survey.found, peer, &all, in_flight);
	pthread_mutex_unlock(&survey.lock);
	if (survey.running & TOTALS)
		log_tally(peer, &all, false);
	if (survey.running & INTERVAL) {
		log_tally(peer, &s->recent, false);
		s->past = all;
		s->recent = (struct tally){ 0 };
	}
}

void stats_told(void)
{
	if (atomic_fetch_sub(&survey.missing, 1) == 1)
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
	survey.ask();
	wake_main();		/* there may be no loop yet */
}

/* All loops have told.  Returns whether a control connection waits for that. */
static bool stats_ended(void)
{
	bool answered = survey.running & ANSWER;

	if (survey.running & INTERVAL)
		log_tally("all clients", &survey.recent, false);
	if (survey.running & TOTALS)
		log_tally("all clients", &survey.found.total, true);
	survey.running = 0;
	return answered;
}

bool stats_tend(void)
{
	if (now_ms() >= survey.due) {
		survey.wanted |= INTERVAL;
		survey.due = now_ms() + survey.interval;
	}
	if (survey.running && !atomic_load(&survey.missing) && stats_ended())
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
