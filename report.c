/*
 * report.c - the statistics of all clients: see report.h.
 *
 * Each loop is asked for those of its own clients (loops_survey()), and tells them on its own
 * thread.  A loop may be late, if a disk keeps it.
 */
#include "report.h"

#include "loop.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum what {
	NOTHING = 0,
	INTERVAL = 1 << 0,	/* to the log: since the last time */
	TOTALS = 1 << 1,	/* to the log: since the beginning */
	ANSWER = 1 << 2,	/* to who asks */
};

static struct {
	uint64_t started;		/* now_ms() */
	uint64_t interval, due;		/* ms, now_ms(); 0 for none */
	void (*wake)(void);
	unsigned wanted;		/* of enum what */
	enum what running;
	atomic_bool ended;		/* it has been told by all loops */
	struct tally before;		/* at the end of the last interval */

	pthread_mutex_t lock;		/* guards the rest; a leaf */
	struct report found;
} report = { .lock = PTHREAD_MUTEX_INITIALIZER };

void tally_sum(const struct tally *t, struct tally_sums *sums)
{
	memcpy(sums->count, t->count, sizeof(sums->count));
	memcpy(sums->bytes, t->bytes, sizeof(sums->bytes));
	sums->errors = t->errors;
	sums->longest = t->longest;
	sums->p50 = tally_percentile(t, 50);
	sums->p99 = tally_percentile(t, 99);
}

/* Called by loops */

static void log_tally(const char *name, const struct tally *t)
{
	char line[STATS_LINE];

	tally_describe(t, line);
	log_at(LOG_ASKED, "%s: %s", name, line);
}

static void add(const struct tally *t)
{
	pthread_mutex_lock(&report.lock);
	tally_add(&report.found.total, t);
	pthread_mutex_unlock(&report.lock);
}

/* Without memory for what was before, it is told again. */
static void see_interval(const char *peer, struct stats *s, unsigned in_flight)
{
	struct tally t = s->all;

	(void)in_flight;
	t.longest = s->longest;
	add(&t);
	s->longest = 0;
	if (!peer)
		return;
	if (s->before)
		tally_subtract(&t, s->before);
	if (tally_requests(&t) == 0)
		return;
	log_tally(peer, &t);
	if (!s->before)
		s->before = malloc(sizeof(*s->before));
	if (s->before)
		*s->before = s->all;
}

static void see_totals(const char *peer, struct stats *s, unsigned in_flight)
{
	(void)in_flight;
	add(&s->all);
	if (peer && tally_requests(&s->all) > 0)
		log_tally(peer, &s->all);
}

/* One more, of which the name is set; NULL if out of memory. */
static struct report_client *add_client(struct report *r, const char *peer)
{
	size_t room = r->room ? 2 * r->room : 16;

	if (r->count == r->room) {
		struct report_client *client = realloc(r->client, room * sizeof(*client));

		if (!client)
			return NULL;
		r->client = client;
		r->room = room;
	}
	memcpy(r->client[r->count].peer, peer, ADDRESS_MAX);
	return &r->client[r->count++];
}

static void see_answer(const char *peer, struct stats *s, unsigned in_flight)
{
	struct report *r = &report.found;
	struct report_client *client;

	pthread_mutex_lock(&report.lock);
	tally_add(&r->total, &s->all);
	client = peer ? add_client(r, peer) : NULL;
	if (client) {
		tally_sum(&s->all, &client->sums);
		client->in_flight = in_flight;
	}
	pthread_mutex_unlock(&report.lock);
}

/* Any thread. */
static void survey_ended(void)
{
	atomic_store(&report.ended, true);
	report.wake();
}

/* The main thread's */

static void begin(enum what what)
{
	stats_see *const see[] = { [INTERVAL] = see_interval, [TOTALS] = see_totals,
				   [ANSWER] = see_answer };

	report.running = what;
	report.wanted &= ~(unsigned)what;
	pthread_mutex_lock(&report.lock);
	memset(&report.found.total, 0, sizeof(report.found.total));
	report.found.count = 0;
	pthread_mutex_unlock(&report.lock);
	loops_survey(see[what], survey_ended);
}

/* Nobody tells any more. */
static void log_total(void)
{
	struct tally t = report.found.total;

	if (report.running == INTERVAL) {
		tally_subtract(&t, &report.before);
		report.before = report.found.total;
		if (tally_requests(&t) == 0)
			return;
	}
	log_tally("all clients", &t);
}

void report_init(unsigned seconds, void (*wake)(void))
{
	report.started = now_ms();
	report.interval = seconds * UINT64_C(1000);
	report.wake = wake;
}

/* An interval begins with the first client. */
int report_timeout(void)
{
	uint64_t now;

	if (!report.interval || loops_load() == 0) {
		report.due = 0;
		return -1;
	}
	now = now_ms();
	if (!report.due)
		report.due = now + report.interval;
	return report.due > now ? (int)(report.due - now) : 0;
}

void report_now(void)
{
	report.wanted |= TOTALS;
}

void report_gather(void)
{
	report.wanted |= ANSWER;
	report.wake();
}

bool report_tend(void)
{
	bool answered = false;

	if (report.due && now_ms() >= report.due) {
		report.wanted |= INTERVAL;
		report.due = now_ms() + report.interval;
	}
	if (atomic_exchange(&report.ended, false)) {
		answered = report.running == ANSWER;
		if (!answered)
			log_total();
		report.running = NOTHING;
	}
	/* The lowest that is wanted, but not before the answer was taken. */
	if (!answered && !report.running && report.wanted)
		begin((enum what)(report.wanted & -report.wanted));
	return answered;
}

const struct report *report_take(void)
{
	pthread_mutex_lock(&report.lock);
	report.found.missing = loops_missing();
	return &report.found;
}

void report_release(void)
{
	pthread_mutex_unlock(&report.lock);
}

uint64_t report_uptime(void)
{
	return now_ms() - report.started;
}
