/*
 * clients.c - the threads that serve clients: see clients.h.
 *
 * Each has a loop with its connections, whose requests come back as mail.
 *
 * To poll many silent clients would slow down the few that are busy.  Where there are many, those that
 * have been silent for a while are parked: one more thread, the first of the list, polls them and
 * gives them back when they speak.  A client that comes back soon is parked later the next time.
 */
#define _GNU_SOURCE
#include "clients.h"

#include "loop.h"
#include "stats.h"
#include "util.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
	CLIENTS_STACK = 128 * 1024,

	/*
	 * Spinning: after a request, look for the next one for a while before sleeping, since to
	 * sleep and be woken costs more than most requests.  Only while that pays.
	 */
	SPIN_US = 65,
	SPIN_ROUNDS = 16,	/* then poll(), for the sake of the others */
	SPIN_CONNS = 4,		/* busy ones in a round; with more, poll() costs little each */
	SPIN_SKIP_MAX = 64,	/* sleeps without spinning after it did not pay, again and again */

	PARK_FROM = 16,		/* connections of a thread: to poll fewer costs nothing */
	SWEEP_MS = 250,
	PATIENCE_MS = 250,	/* of silence, then it is parked; twice as much if it came back soon */
	PATIENCE_MAX_MS = 256 * PATIENCE_MS,
	CHECK_MS = 100,		/* a tenth of the time that a host may be silent, for each second of it */
};

struct client_thread {
	pthread_t thread;
	struct loop loop;
	atomic_bool admit;		/* it is asked to: see clients_admit() */
	atomic_size_t load;		/* connections, those on their way to it included */

	/* Its own. */
	struct workspace workspace;
	bool stopping;
	uint64_t sweep_due;		/* now_ms() at which it looks for silent clients */
	struct conn *busy[SPIN_CONNS];	/* that had input in this round, and did not end */
	unsigned busy_count;		/* how many had, also if that is more */
	unsigned spin_skip, spin_pause;	/* sleeps without, still; after the next time in vain */
};

/* The parking thread is the first; those that serve come behind it. */
enum { PARKED, SERVING };

static struct {
	struct client_thread *thread;
	atomic_uint count;		/* with the place of the parking thread */
	unsigned max, spinners_max;
	uint64_t keepalive;		/* seconds */
	pthread_mutex_t moving;		/* a connection changes threads; all are asked something */
	bool parks;			/* there is the parking thread; with that lock */
	atomic_bool stopped;		/* clients_stop(); set with that lock */
	atomic_uint spinners;
	atomic_size_t total;		/* connections */
} clients = { .moving = PTHREAD_MUTEX_INITIALIZER };

static struct conn *conn_of(struct source *s)
{
	return (struct conn *)((char *)s - offsetof(struct conn, source));
}

static struct client_thread *thread_of(const struct conn *c)
{
	return (struct client_thread *)((char *)c->workspace -
					offsetof(struct client_thread, workspace));
}

void clients_admit(void)
{
	for (unsigned i = SERVING; i < clients.count; i++) {
		atomic_store(&clients.thread[i].admit, true);
		loop_wake(&clients.thread[i].loop);
	}
}

/* Connections */

/* Its place is free for another client, also if a disk still has requests of it. */
static void give_up_place(struct conn *c)
{
	if (access_leave(&c->guest))
		wake_main();
}

static void end_client(struct client_thread *t, struct conn *c)
{
	give_up_place(c);
	for (unsigned i = 0; i < SPIN_CONNS; i++)
		if (t->busy[i] == c)
			t->busy[i] = NULL;
	conn_free(c);
	atomic_fetch_sub(&t->load, 1);
	atomic_fetch_sub(&clients.total, 1);
	wake_main();
}

/* Set when its next turn is due; or end it, if it is over.  Whether it is still there. */
static bool settle_client(struct client_thread *t, struct conn *c)
{
	uint64_t due = c->deadline ? c->deadline : UINT64_MAX, say = 0;

	if (c->state == CONN_DEAD)
		give_up_place(c);
	if (conn_is_over(c)) {
		loop_remove(&t->loop, &c->source);
		if (t->loop.count == 0) {
			t->sweep_due = UINT64_MAX;
			loop_wake(&t->loop);	/* it may be about to sleep, and has to end if the server stops */
		}
		end_client(t, c);
		return false;
	}
	if (c->stats && c->stats->unsaid)
		say = stats_catch_up(c->stats, c->peer, now_ms());
	if (say && say < due)
		due = say;
	c->source.due = c->tired ? 0 : due;
	return true;
}

/* Whether it is still there, and had something to read. */
static bool serve_client(struct client_thread *t, struct conn *c, short revents)
{
	bool lively;

	if (!revents && c->deadline && c->deadline <= now_ms())
		conn_expire(c);
	conn_turn(c, revents);
	lively = c->lively;
	if (lively) {
		c->active = t->loop.polled / 1000;
		if (t->sweep_due > c->active + SWEEP_MS)
			t->sweep_due = c->active + SWEEP_MS;
	}
	return settle_client(t, c) && lively;
}

static void unpark(struct client_thread *t, struct conn *c);

static void client_turn(struct source *s, short revents)
{
	struct conn *c = conn_of(s);
	struct client_thread *t = thread_of(c);

	if (revents && t == &clients.thread[PARKED] && !t->stopping)
		unpark(t, c);
	else if (serve_client(t, c, revents) && revents && t->busy_count++ < SPIN_CONNS)
		t->busy[t->busy_count - 1] = c;
}

static short client_events(const struct source *s)
{
	return conn_events((const struct conn *)((const char *)s - offsetof(struct conn, source)));
}

static const struct source_ops client_ops = { client_events, client_turn };

/* A connection has come from another thread. */
static void take_moved(struct mail *m)
{
	struct conn *c = (struct conn *)((char *)m - offsetof(struct conn, mail));
	struct client_thread *t = thread_of(c);

	if (!loop_add(&t->loop, &c->source)) {
		conn_kill(c, "out of memory");
		end_client(t, c);
		return;
	}
	c->source.due = 0;
	if (t->stopping)
		conn_stop(c);
}

static void take_new(struct mail *m)
{
	struct conn *c = (struct conn *)((char *)m - offsetof(struct conn, mail));

	c->active = now_ms();
	conn_start(c);
	take_moved(m);
}

static void give_client(struct client_thread *t, struct conn *c, void (*take)(struct mail *))
{
	atomic_fetch_add(&t->load, 1);
	c->workspace = &t->workspace;
	c->mail.deliver = take;
	loop_post(&t->loop, &c->mail);
}

/* What a thread is asked for */

static void stop_clients(struct client_thread *t)
{
	t->stopping = true;
	for (size_t i = 0; i < t->loop.count; i++) {
		conn_stop(conn_of(t->loop.source[i]));
		t->loop.source[i]->due = 0;
	}
}

static void take_mail(struct client_thread *t)
{
	bool admit;

	loop_deliver(&t->loop);
	admit = atomic_exchange(&t->admit, false);
	if (atomic_load(&clients.stopped) && !t->stopping) {
		loop_deliver(&t->loop);		/* what was posted before that */
		stop_clients(t);
	}
	for (size_t i = 0; i < t->loop.count && admit; i++)
		if (conn_admit(conn_of(t->loop.source[i])))
			t->loop.source[i]->due = 0;
}

/* Parking */

/* Give a connection to another thread, with all that it has done.  False if that has to wait. */
static bool move_client(struct client_thread *from, struct conn *c, struct client_thread *to)
{
	bool may;

	pthread_mutex_lock(&clients.moving);
	may = !clients.stopped;
	if (may) {
		loop_remove(&from->loop, &c->source);
		give_client(to, c, take_moved);
		atomic_fetch_sub(&from->load, 1);
	}
	pthread_mutex_unlock(&clients.moving);
	return may;
}

static int start_client_thread(struct client_thread *t);

/* Whether there is the parking thread; it is made when it is needed first. */
static bool can_park(void)
{
	bool can;

	pthread_mutex_lock(&clients.moving);
	if (!clients.parks && !clients.stopped)
		clients.parks = start_client_thread(&clients.thread[PARKED]) == 0;
	can = clients.parks;
	pthread_mutex_unlock(&clients.moving);
	return can;
}

/* Whether it was parked; from then on it is another thread's. */
static bool park(struct client_thread *t, struct conn *c)
{
	return t->loop.polled / 1000 - c->active >= c->patience && conn_may_park(c) && can_park() &&
	       move_client(t, c, &clients.thread[PARKED]);
}

/* End those whose hosts are gone, and park those who have been silent for long. */
static void sweep(struct client_thread *t)
{
	uint64_t wait = UINT64_MAX;

	for (size_t i = t->loop.count; i-- > 0;) {
		struct conn *c = conn_of(t->loop.source[i]);
		bool owes, vanished = conn_has_vanished(c, (unsigned)clients.keepalive, &owes);

		if (vanished)
			conn_kill(c, "its host does not answer any more");
		if (owes && wait > clients.keepalive * CHECK_MS)
			wait = clients.keepalive * CHECK_MS;
		if (t->loop.count > PARK_FROM && (owes || !park(t, c)))
			wait = SWEEP_MS;
		if (vanished)
			settle_client(t, c);
	}
	t->sweep_due = wait < UINT64_MAX ? t->loop.polled / 1000 + wait : UINT64_MAX;
}

static struct client_thread *least_loaded(void)
{
	struct client_thread *best = &clients.thread[SERVING];

	for (unsigned i = SERVING; i < clients.count; i++)
		if (atomic_load(&clients.thread[i].load) < atomic_load(&best->load))
			best = &clients.thread[i];
	return best;
}

/* It has spoken. */
static void unpark(struct client_thread *t, struct conn *c)
{
	bool soon = t->loop.polled / 1000 - c->active < 4 * c->patience;

	c->patience = !soon ? PATIENCE_MS :
		      c->patience < PATIENCE_MAX_MS ? 2 * c->patience : PATIENCE_MAX_MS;
	move_client(t, c, least_loaded());
}

/* Spinning */

/* One look at each busy connection.  True if one of them had something. */
static bool look_at_busy(struct client_thread *t)
{
	bool found = false;

	for (unsigned i = 0; i < t->busy_count; i++) {
		struct conn *c = t->busy[i];

		if (c && conn_events(c) & POLLIN)
			found |= serve_client(t, c, POLLIN);
	}
	if (loop_is_rung(&t->loop)) {
		take_mail(t);
		loop_turn_due(&t->loop);
		found = true;
	}
	return found;
}

/* Look for more for a while; true if there was something. */
static bool spin_for(struct client_thread *t)
{
	uint64_t until = now_us() + SPIN_US;
	bool paid = false;

	for (unsigned rounds = 0; rounds < SPIN_ROUNDS;) {
		if (look_at_busy(t)) {
			paid = true;
			rounds++;
			until = now_us() + SPIN_US;
		} else if (now_us() >= until) {
			break;
		}
	}
	return paid;
}

/* Spin if that has not been in vain lately, and if a processor is left for those we wait for. */
static void spin(struct client_thread *t)
{
	if (t->spin_skip > 0) {
		t->spin_skip--;
		return;
	}
	if (atomic_fetch_add(&clients.spinners, 1) < clients.spinners_max) {
		if (spin_for(t)) {
			t->spin_pause = 1;
		} else {
			if (t->spin_pause < SPIN_SKIP_MAX)
				t->spin_pause *= 2;
			t->spin_skip = t->spin_pause;
		}
	}
	atomic_fetch_sub(&clients.spinners, 1);
}

/* Starting and stopping */

static void *client_main(void *arg)
{
	struct client_thread *t = arg;

	for (;;) {
		take_mail(t);
		if (t->stopping && t->loop.count == 0)
			return NULL;
		t->busy_count = 0;
		loop_poll(&t->loop, t->sweep_due);
		if (t->busy_count > 0 && t->busy_count <= SPIN_CONNS)
			spin(t);
		if (t->loop.polled / 1000 >= t->sweep_due)
			sweep(t);
	}
}

static void free_client_thread(struct client_thread *t)
{
	workspace_free(&t->workspace);
	loop_free(&t->loop);
}

static int start_client_thread(struct client_thread *t)
{
	int err;

	memset(t, 0, sizeof(*t));
	t->sweep_due = UINT64_MAX;
	t->spin_pause = 1;
	err = loop_init(&t->loop);
	if (!workspace_init(&t->workspace, &t->loop) && !err)
		err = -ENOMEM;
	if (!err)
		err = -thread_start(&t->thread, CLIENTS_STACK, client_main, t);
	if (err)
		free_client_thread(t);
	return err;
}

int clients_begin(unsigned max, unsigned keepalive)
{
	int err;

	clients.count = SERVING;
	clients.keepalive = keepalive;
	clients.max = SERVING + max;
	clients.thread = calloc(clients.max, sizeof(*clients.thread));
	if (!clients.thread)
		return -ENOMEM;
	clients.spinners_max = cpu_count() - 1;
	err = start_client_thread(&clients.thread[SERVING]);
	clients.count += !err;
	return err;
}

/* The thread with the fewest connections; a new one while there may be more and none is idle. */
static struct client_thread *choose_thread(void)
{
	struct client_thread *best = least_loaded();

	if (atomic_load(&best->load) == 0 || clients.count == clients.max ||
	    start_client_thread(&clients.thread[clients.count]))
		return best;
	return &clients.thread[clients.count++];
}

void clients_add(struct conn *c)
{
	c->source.ops = &client_ops;
	c->patience = PATIENCE_MS;
	atomic_fetch_add(&clients.total, 1);
	give_client(choose_thread(), c, take_new);
}

/* The first of all threads that there are. */
static unsigned first_thread(void)
{
	return clients.parks ? PARKED : SERVING;
}

size_t clients_count(void)
{
	return atomic_load(&clients.total);
}

void clients_stop(void)
{
	pthread_mutex_lock(&clients.moving);
	atomic_store(&clients.stopped, true);
	for (unsigned i = first_thread(); i < clients.count; i++)
		loop_wake(&clients.thread[i].loop);
	pthread_mutex_unlock(&clients.moving);
}

void clients_join(void)
{
	for (unsigned i = first_thread(); i < clients.count; i++)
		pthread_join(clients.thread[i].thread, NULL);
}

void clients_free(void)
{
	for (unsigned i = first_thread(); i < clients.count; i++)
		free_client_thread(&clients.thread[i]);
	free(clients.thread);
	clients.thread = NULL;
	clients.count = 0;
}
