/*
 * loop.c - the threads that connections live on: see loop.h.
 *
 * Each loop polls its connections and its bell.  Others leave it connections and completed
 * requests in a mailbox, and ring.
 *
 * To poll many who are silent would slow down the few who are not.  Where there are many, those that
 * have been silent for a while are parked: one more loop, the first of the list, polls them and
 * gives them back when they speak.  Who comes back soon is parked later the next time.
 */
#define _GNU_SOURCE
#include "loop.h"

#include "log.h"
#include "stats.h"
#include "xnbd.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	LOOP_STACK = 128 * 1024,

	/* While the server stops, connections are looked after this often. */
	STOPPING_TICK_MS = 10,

	/*
	 * Spinning: after a request, look for the next one for a while before sleeping, since to
	 * sleep and be woken costs more than most requests.  Only while that pays.
	 */
	SPIN_US = 50,
	SPIN_ROUNDS = 16,	/* then poll(), for the sake of the others */
	SPIN_CONNS = 4,		/* busy ones in a round; with more, poll() costs little each */
	SPIN_SKIP_MAX = 64,	/* sleeps without spinning after it did not pay */

	FREE_REQUESTS = 64,	/* kept for use again */

	PARK_FROM = 16,		/* connections of a loop: to poll fewer costs nothing */
	SWEEP_US = 250 * 1000,
	PATIENCE_US = 250 * 1000,
	PATIENCE_MAX_US = 256 * PATIENCE_US,
	CHECK_US = 100 * 1000,	/* a tenth of the time that a host may be silent, for each second of it */
};

/* The car park is the first loop; those that serve come behind it. */
enum { PARKED, SERVING };

static struct {
	struct loop *loop;
	atomic_uint count;		/* with the place of the parked ones */
	unsigned max, spinners_max;
	uint64_t keepalive;		/* seconds */
	pthread_mutex_t moving;		/* a connection changes loops; all are told something */
	bool parks;			/* there is the loop of the parked ones; with that lock */
} loops = { .moving = PTHREAD_MUTEX_INITIALIZER };

static atomic_uint spinners;
static atomic_size_t loops_total;	/* connections; */
static atomic_size_t loops_places;	/* those of clients that are not gone */

/* The mailbox */

void loop_complete(struct request *r)
{
	struct loop *l = r->conn->loop;

	pthread_mutex_lock(&l->lock);
	r->next = l->completed;
	l->completed = r;
	pthread_mutex_unlock(&l->lock);
	bell_ring(&l->bell);
}

static void give(struct loop *l, struct conn *c)
{
	atomic_fetch_add(&l->load, 1);
	pthread_mutex_lock(&l->lock);
	c->next = l->arriving;
	l->arriving = c;
	pthread_mutex_unlock(&l->lock);
	bell_ring(&l->bell);
}

void loops_wake(void)
{
	for (unsigned i = SERVING; i < loops.count; i++)
		bell_ring(&loops.loop[i].bell);
}

/* Requests */

struct request *loop_request(struct loop *l)
{
	struct request *r = l->free;

	if (!r)
		return calloc(1, sizeof(*r));
	l->free = r->next;
	l->free_count--;
	memset(r, 0, sizeof(*r));
	return r;
}

void loop_release(struct loop *l, struct request *r)
{
	if (l->free_count >= FREE_REQUESTS) {
		free(r);
		return;
	}
	r->next = l->free;
	l->free = r;
	l->free_count++;
}

/* Connections */

static bool make_place(struct loop *l)
{
	size_t room = l->room ? l->room * 2 : 8;
	struct conn **conn;
	struct pollfd *pfd;

	if (l->count < l->room)
		return true;
	conn = realloc(l->conn, room * sizeof(*conn));
	if (!conn)
		return false;
	l->conn = conn;
	pfd = realloc(l->pfd, (room + 1) * sizeof(*pfd));
	if (!pfd)
		return false;
	l->pfd = pfd;
	l->room = room;
	return true;
}

/* Its place is free for another client, also if a disk still has requests of it. */
static void give_up_place(struct conn *c)
{
	if (c->uncounted)
		return;
	c->uncounted = true;
	access_leave(&c->guest);
	atomic_fetch_sub(&loops_places, 1);
	wake_main();
}

static void end_conn(struct loop *l, struct conn *c)
{
	give_up_place(c);
	conn_free(c);
	atomic_fetch_sub(&l->load, 1);
	atomic_fetch_sub(&loops_total, 1);
	wake_main();
}

static void remove_conn(struct loop *l, size_t i)
{
	if (l->conn[i]->stats)
		stats_leave(&l->gone, l->conn[i]->stats);
	end_conn(l, l->conn[i]);
	l->conn[i] = l->conn[--l->count];
	if (l->count == 0)
		l->sweep_due = UINT64_MAX;
}

static bool is_parked(const struct loop *l)
{
	return l == &loops.loop[PARKED];
}

static void turn(struct loop *l, struct conn *c, short revents)
{
	conn_turn(c, revents);
	if (!c->lively)
		return;
	c->active = l->polled;
	if (l->sweep_due > l->polled + SWEEP_US)
		l->sweep_due = l->polled + SWEEP_US;
}

static void add_conn(struct loop *l, struct conn *c)
{
	bool is_new = !c->loop;

	c->loop = l;
	if (!make_place(l)) {
		conn_kill(c, "out of memory");
		end_conn(l, c);
		return;
	}
	l->conn[l->count++] = c;
	if (l->stopping)
		conn_stop(c);
	if (is_new) {
		c->active = now_us();
		conn_start(c, l);
	}
}

static void mark_dirty(struct loop *l, struct conn *c)
{
	if (c->dirty)
		return;
	c->dirty = true;
	c->next = l->dirty;
	l->dirty = c;
}

static void take_arriving(struct loop *l, struct conn *c)
{
	struct conn *next;

	for (; c; c = next) {
		next = c->next;
		c->next = NULL;
		add_conn(l, c);
	}
}

/* The mailbox has the newest first; replies go out in the order in which requests came back. */
static struct request *reverse(struct request *r)
{
	struct request *next, *result = NULL;

	for (; r; r = next) {
		next = r->next;
		r->next = result;
		result = r;
	}
	return result;
}

static void take_completed(struct loop *l, struct request *r)
{
	struct request *next;

	for (r = reverse(r); r; r = next) {
		struct conn *c = r->conn;

		next = r->next;
		conn_complete(c, r);
		mark_dirty(l, c);
	}
}

/* A gate may have opened, or the load may be less. */
static void admit_turned_away(struct loop *l)
{
	for (size_t i = 0; i < l->count; i++)
		if (conn_admit(l->conn[i]))
			mark_dirty(l, l->conn[i]);
}

static void stop_all(struct loop *l)
{
	l->stopping = true;
	for (size_t i = 0; i < l->count; i++)
		conn_stop(l->conn[i]);
}

static void tell_survey(struct loop *l)
{
	for (size_t i = 0; i < l->count; i++) {
		struct conn *c = l->conn[i];

		if (c->stats)
			stats_tell(c->state == CONN_DEAD ? NULL : c->peer, c->stats, c->in_flight);
	}
	stats_tell(NULL, &l->gone, 0);
	stats_told();
}

static void turn_dirty(struct loop *l)
{
	struct conn *c;

	while ((c = l->dirty)) {
		l->dirty = c->next;
		c->dirty = false;
		conn_turn(c, 0);
	}
}

static void take_mail(struct loop *l)
{
	struct conn *arriving;
	struct request *completed;
	bool surveyed;

	if (!bell_answer(&l->bell))
		return;
	surveyed = atomic_exchange(&l->surveyed, false);	/* first: who came before it is told */
	pthread_mutex_lock(&l->lock);
	arriving = l->arriving;
	l->arriving = NULL;
	completed = l->completed;
	l->completed = NULL;
	pthread_mutex_unlock(&l->lock);
	if (atomic_load(&l->stop) && !l->stopping)
		stop_all(l);
	take_arriving(l, arriving);
	take_completed(l, completed);
	admit_turned_away(l);
	turn_dirty(l);
	if (surveyed)
		tell_survey(l);
}

/* Close what is overdue, forget what has ended.  Returns the time to the next deadline, or -1. */
static int tend(struct loop *l)
{
	uint64_t now = 0, first = UINT64_MAX;

	for (size_t i = 0; i < l->count;) {
		struct conn *c = l->conn[i];

		if (c->tired)
			first = 0;
		if (c->deadline) {
			if (!now)
				now = now_ms();
			if (c->deadline <= now)
				conn_expire(c);
			else if (c->deadline < first)
				first = c->deadline;
		}
		if (c->stats && c->stats->unsaid) {
			uint64_t due = stats_catch_up(c->stats, c->peer, now_ms());

			first = due && due < first ? due : first;
		}
		if (c->state == CONN_DEAD)
			give_up_place(c);
		if (conn_is_over(c))
			remove_conn(l, i);
		else
			i++;
	}
	if (l->sweep_due / 1000 < first)
		first = l->sweep_due / 1000;
	return ms_until(first);
}

/* Parking */

/* Give a connection to another loop, with all that it has done.  False if that has to wait. */
static bool move(struct loop *from, size_t i, struct loop *to)
{
	struct conn *c = from->conn[i];
	bool may;

	pthread_mutex_lock(&loops.moving);
	may = !atomic_load(&from->surveyed) && !atomic_load(&from->stop);
	if (may) {
		from->conn[i] = from->conn[--from->count];
		give(to, c);
		atomic_fetch_sub(&from->load, 1);
	}
	pthread_mutex_unlock(&loops.moving);
	return may;
}

static int start_loop(struct loop *l);

/* Whether there is the loop of the parked ones; it is made when it is needed first. */
static bool can_park(void)
{
	bool can;

	pthread_mutex_lock(&loops.moving);
	if (!loops.parks && !atomic_load(&loops.loop[SERVING].stop))
		loops.parks = start_loop(&loops.loop[PARKED]) == 0;
	can = loops.parks;
	pthread_mutex_unlock(&loops.moving);
	return can;
}

/* Whether it was parked; from then on it is another loop's. */
static bool park(struct loop *l, size_t i)
{
	const struct conn *c = l->conn[i];

	return l->polled - c->active >= c->patience && conn_may_park(c) && can_park() &&
	       move(l, i, &loops.loop[PARKED]);
}

/* End those whose hosts are gone, and park those who have been silent for long. */
static void sweep(struct loop *l)
{
	uint64_t wait = UINT64_MAX;

	for (size_t i = l->count; i-- > 0;) {
		bool owes, vanished = conn_has_vanished(l->conn[i],
								(unsigned)loops.keepalive, &owes);

		if (vanished)
			conn_kill(l->conn[i], "its host does not answer any more");
		if (owes && wait > loops.keepalive * CHECK_US)
			wait = loops.keepalive * CHECK_US;
		if (l->count > PARK_FROM && (owes || !park(l, i)))
			wait = SWEEP_US;
	}
	l->sweep_due = wait < UINT64_MAX ? l->polled + wait : UINT64_MAX;
}

static struct loop *least_loaded(void)
{
	struct loop *best = &loops.loop[SERVING];

	for (unsigned i = SERVING; i < loops.count; i++)
		if (atomic_load(&loops.loop[i].load) < atomic_load(&best->load))
			best = &loops.loop[i];
	return best;
}

/* What poll() saw of a connection. */
static short revents_of(const struct loop *l, const struct conn *c)
{
	return c->entry ? l->pfd[c->entry].revents : 0;
}

/* Give back those who have spoken. */
static void unpark(struct loop *l)
{
	for (size_t i = l->count; i-- > 0;) {
		struct conn *c = l->conn[i];
		bool soon = l->polled - c->active < 4 * c->patience;

		if (!revents_of(l, c))
			continue;
		c->patience = !soon ? PATIENCE_US :
			      c->patience < PATIENCE_MAX_US ? 2 * c->patience : PATIENCE_MAX_US;
		move(l, i, least_loaded());
	}
}

/* No more entries than descriptors, or poll() would refuse them.  Returns how many. */
static unsigned prepare_poll(struct loop *l)
{
	unsigned n = 1;

	for (size_t i = 0; i < l->count; i++) {
		struct conn *c = l->conn[i];
		short events = conn_events(c);

		c->entry = events ? n++ : 0;
		if (events)
			l->pfd[c->entry] = (struct pollfd){ .fd = c->fd, .events = events };
	}
	return n;
}

/* A turn for everyone whom poll() named; busy gets those who had input, up to max of them. */
static unsigned turn_ready(struct loop *l, struct conn **busy, unsigned max)
{
	unsigned n = 0;

	for (size_t i = 0; i < l->count; i++) {
		struct conn *c = l->conn[i];
		short revents = revents_of(l, c);

		if (!revents && !l->stopping && !c->tired)
			continue;
		turn(l, c, revents);
		if (c->lively && n++ < max)
			busy[n - 1] = c;
	}
	return n;
}

/* One look at each busy connection.  True if one of them had something. */
static bool look_at(struct loop *l, struct conn **busy, unsigned n)
{
	bool found = false;

	for (unsigned i = 0; i < n; i++) {
		if (!(conn_events(busy[i]) & POLLIN))
			continue;
		turn(l, busy[i], POLLIN);
		found |= busy[i]->lively;
	}
	if (atomic_load_explicit(&l->bell.rung, memory_order_relaxed)) {
		take_mail(l);
		found = true;
	}
	return found;
}

/* Look for more for a while; true if there was something. */
static bool spin_for(struct loop *l, struct conn **busy, unsigned n)
{
	uint64_t until = now_us() + SPIN_US;
	bool paid = false;

	for (unsigned rounds = 0; rounds < SPIN_ROUNDS;) {
		if (look_at(l, busy, n)) {
			paid = true;
			rounds++;
			until = now_us() + SPIN_US;
		} else if (now_us() >= until) {
			break;
		}
	}
	return paid;
}

/* Spin if that has paid lately, and if a processor is left for those we wait for. */
static void spin(struct loop *l, struct conn **busy, unsigned n)
{
	if (l->spin_skip > 0) {
		l->spin_skip--;
		return;
	}
	if (atomic_fetch_add(&spinners, 1) < loops.spinners_max) {
		if (spin_for(l, busy, n)) {
			l->spin_misses = 0;
		} else {
			if (l->spin_misses < 16)
				l->spin_misses++;
			l->spin_skip = 1U << l->spin_misses;
			if (l->spin_skip > SPIN_SKIP_MAX)
				l->spin_skip = SPIN_SKIP_MAX;
		}
	}
	atomic_fetch_sub(&spinners, 1);
}

static void *loop_main(void *arg)
{
	struct loop *l = arg;
	struct conn *busy[SPIN_CONNS];

	for (;;) {
		unsigned n = 0, fds;
		int timeout, ready;

		take_mail(l);
		timeout = tend(l);
		if (l->stopping && l->count == 0)
			return NULL;
		if (l->stopping)
			timeout = STOPPING_TICK_MS;
		fds = prepare_poll(l);
		ready = bell_poll(&l->bell, l->pfd, fds, timeout);
		if (ready < 0)
			log_fatal("cannot wait for %u descriptors: %s", fds, strerror(-ready));
		l->polled = now_us();
		if (is_parked(l) && !l->stopping)
			unpark(l);
		else if (ready > 0 || timeout == 0 || l->stopping)
			n = turn_ready(l, busy, SPIN_CONNS);
		if (n > 0 && n <= SPIN_CONNS)
			spin(l, busy, n);
		if (l->polled >= l->sweep_due)
			sweep(l);
	}
}

/* Starting and stopping */

static void free_loop(struct loop *l)
{
	struct request *r;

	while ((r = l->free)) {
		l->free = r->next;
		free(r);
	}
	free(l->conn);
	free(l->pfd);
	free(l->rx);
	tx_free(l->tx);
	bell_free(&l->bell);
	pthread_mutex_destroy(&l->lock);
}

static int start_loop(struct loop *l)
{
	int err;

	memset(l, 0, sizeof(*l));
	l->sweep_due = UINT64_MAX;
	err = bell_init(&l->bell);
	if (err)
		return err;
	pthread_mutex_init(&l->lock, NULL);
	l->rx = malloc(LOOP_RX_BYTES);
	l->tx = tx_new();
	err = l->rx && l->tx && make_place(l) ? 0 : -ENOMEM;
	if (!err)
		err = -thread_start(&l->thread, LOOP_STACK, loop_main, l);
	if (err)
		free_loop(l);
	return err;
}

int loops_init(unsigned max, unsigned keepalive)
{
	int err;

	loops.count = SERVING;
	loops.keepalive = keepalive;
	loops.max = SERVING + max;
	loops.loop = calloc(loops.max, sizeof(*loops.loop));
	if (!loops.loop || !order_prepare(loops.max))
		return -ENOMEM;
	loops.spinners_max = cpu_count() - 1;
	err = start_loop(&loops.loop[SERVING]);
	loops.count += !err;
	return err;
}

/* The loop with the fewest connections; a new one while there may be more and none is idle. */
static struct loop *choose_loop(void)
{
	struct loop *best = least_loaded();

	if (atomic_load(&best->load) == 0 || loops.count == loops.max ||
	    start_loop(&loops.loop[loops.count]))
		return best;
	return &loops.loop[loops.count++];
}

void loops_add(struct conn *c)
{
	struct loop *l = choose_loop();

	c->patience = PATIENCE_US;
	atomic_fetch_add(&loops_total, 1);
	atomic_fetch_add(&loops_places, 1);
	give(l, c);
}

/* The first of all loops that there are. */
static unsigned first_loop(void)
{
	return loops.parks ? PARKED : SERVING;
}

size_t loops_load(void)
{
	return atomic_load(&loops_total);
}

size_t loops_clients(void)
{
	return atomic_load(&loops_places);
}

void loops_survey(void)
{
	pthread_mutex_lock(&loops.moving);
	for (unsigned i = first_loop(); i < loops.count; i++) {
		stats_expect();
		atomic_store(&loops.loop[i].surveyed, true);
		bell_ring(&loops.loop[i].bell);
	}
	pthread_mutex_unlock(&loops.moving);
}

void loops_stop(void)
{
	pthread_mutex_lock(&loops.moving);
	for (unsigned i = first_loop(); i < loops.count; i++) {
		atomic_store(&loops.loop[i].stop, true);
		bell_ring(&loops.loop[i].bell);
	}
	pthread_mutex_unlock(&loops.moving);
}

void loops_join(void)
{
	for (unsigned i = first_loop(); i < loops.count; i++)
		pthread_join(loops.loop[i].thread, NULL);
}

void loops_free(void)
{
	for (unsigned i = first_loop(); i < loops.count; i++)
		free_loop(&loops.loop[i]);
	free(loops.loop);
	order_unprepare();
	loops.loop = NULL;
	loops.count = 0;
}
