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

/* There is one writer: cheaper than to add, which is one locked instruction. */
static void count(_Atomic uint64_t *n, uint64_t more)
{
	atomic_store_explicit(n, atomic_load_explicit(n, memory_order_relaxed) + more,
			      memory_order_relaxed);
}

static void raise_to(_Atomic uint64_t *most, uint64_t n)
{
	if (n > atomic_load_explicit(most, memory_order_relaxed))
		atomic_store_explicit(most, n, memory_order_relaxed);
}

static void count_delay(struct stats *s, uint64_t us, uint64_t n)
{
	count(&s->all.delay[delay_index(us)], n);
	raise_to(&s->all.longest, us);
	raise_to(&s->longest, us);
}

void stats_count(struct stats *s, const struct proto_request *h, int error, uint64_t begun)
{
	struct tally *t = &s->all;

	switch (h->cmd) {
	case NBD_CMD_READ:
		count(&t->reads, 1);
		count(&t->read_bytes, error ? 0 : h->len);
		break;
	case NBD_CMD_WRITE:
		count(&t->writes, 1);
		count(&t->written_bytes, error ? 0 : h->len);
		break;
	case NBD_CMD_FLUSH:
		count(&t->flushes, 1);
		break;
	default:
		count(&t->others, 1);
	}
	if (error)
		count(&t->errors, 1);
	if (begun == s->now)
		s->fresh++;
	else
		count_delay(s, stats_time(s) - begun, 1);
}

void stats_end_turn(struct stats *s)
{
	if (s->fresh > 0)
		count_delay(s, now_us() - s->now, s->fresh);
	s->fresh = 0;
	s->now = 0;
}

/* Sums */

/* Add t, times 1; or take it away, but for the longest, with UINT64_MAX, which is -1. */
static void tally_add(struct tally *sum, const struct tally *t, uint64_t times)
{
	count(&sum->reads, times * t->reads);
	count(&sum->writes, times * t->writes);
	count(&sum->flushes, times * t->flushes);
	count(&sum->others, times * t->others);
	count(&sum->read_bytes, times * t->read_bytes);
	count(&sum->written_bytes, times * t->written_bytes);
	count(&sum->errors, times * t->errors);
	raise_to(&sum->longest, t->longest);
	for (unsigned i = 0; i < STATS_DELAYS; i++)
		count(&sum->delay[i], times * t->delay[i]);
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

/* All clients */

static struct {
	pthread_mutex_t lock;		/* guards the list and gone; nothing but the log's inside */
	struct stats *first;		/* in the order in which they came */
	struct stats gone;		/* the sum of those that have left; told: of all */
} all = { .lock = PTHREAD_MUTEX_INITIALIZER };
static struct stats **all_end = &all.first;	/* likewise */

/* now_ms() of the next interval's end, UINT64_MAX for never; the main thread's. */
static uint64_t interval_due = UINT64_MAX;

void stats_begin(struct stats *s, const char *peer)
{
	s->peer = peer;
	pthread_mutex_lock(&all.lock);
	s->back = all_end;
	*all_end = s;
	all_end = &s->next;
	pthread_mutex_unlock(&all.lock);
}

void stats_end(struct stats *s, char *line)
{
	stats_end_turn(s);
	stats_catch_up(s, s->peer, UINT64_MAX);
	*line = '\0';
	if (!is_idle_tally(&s->all))
		tally_describe(&s->all, line);
	pthread_mutex_lock(&all.lock);
	*s->back = s->next;
	*(s->next ? &s->next->back : &all_end) = s->back;
	tally_add(&all.gone.all, &s->all, 1);
	raise_to(&all.gone.longest, s->longest);
	pthread_mutex_unlock(&all.lock);
}

const struct stats *stats_take(struct tally *total)
{
	memset(total, 0, sizeof(*total));
	pthread_mutex_lock(&all.lock);
	tally_add(total, &all.gone.all, 1);
	for (const struct stats *s = all.first; s; s = s->next)
		tally_add(total, &s->all, 1);
	return all.first;
}

void stats_release(void)
{
	pthread_mutex_unlock(&all.lock);
}

/* Nothing of nothing done, unless that is wanted. */
static void log_tally(const char *name, const struct tally *t, bool idle)
{
	char line[STATS_LINE];

	if (is_idle_tally(t) && !idle)
		return;
	tally_describe(t, line);
	log_at(LOG_ASKED, "%s: %s", name, line);
}

void stats_log(void)
{
	struct tally total;

	for (const struct stats *s = stats_take(&total); s; s = s->next)
		log_tally(s->peer, &s->all, false);
	stats_release();
	log_tally("all clients", &total, true);
}

/* Log what was done since the last time, and keep in s how much was told.  Returns the longest. */
static uint64_t log_interval(const char *name, const struct tally *now, struct stats *s)
{
	struct tally recent = { 0 };

	tally_add(&recent, now, 1);
	tally_add(&recent, &s->told, UINT64_MAX);
	tally_add(&s->told, &recent, 1);
	recent.longest = atomic_exchange(&s->longest, 0);
	log_tally(name, &recent, false);
	return recent.longest;
}

static void log_intervals(void)
{
	struct tally total;

	stats_take(&total);
	for (struct stats *s = all.first; s; s = s->next)
		raise_to(&all.gone.longest, log_interval(s->peer, &s->all, s));
	log_interval("all clients", &total, &all.gone);
	stats_release();
}

uint64_t stats_tend(unsigned seconds)
{
	uint64_t now = now_ms();

	if (seconds == 0)
		return interval_due = UINT64_MAX;
	if (now >= interval_due)
		log_intervals();
	if (now >= interval_due || interval_due == UINT64_MAX)
		interval_due = now + seconds * UINT64_C(1000);
	return interval_due;
}
