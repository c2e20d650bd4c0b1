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

enum {
	CLIENTS_STACK = 128 * 1024,

	/*
	 * Spinning: after a request, look for the next one for a while before sleeping, since to
	 * sleep and be woken costs more than most requests.  Only while that pays.
	 */
	SPIN_US = 65,
	SPIN_ROUNDS = 16,	/* then poll(), which sees also what is no input */
	SPIN_SKIP_MAX = 63,	/* sleeps without spinning after it did not pay, again and again */

	/*
	 * A thread with so many connections spins, looking at each of them, and lets them stay.  Of more
	 * those that are silent are parked, and to poll the others costs little each.
	 */
	FEW_CONNS = 8,
	SILENT_MS = 250,
	SWEEP_MS = 250,
};

struct client_thread {
	pthread_t thread;
	struct loop loop;
	atomic_bool admit;		/* it is asked to: see clients_admit() */
	atomic_size_t load;		/* connections, those on their way to it included */

	/* Its own. */
	struct workspace workspace;
	bool lively;			/* a connection had input in this round */
	uint64_t sweep_due;		/* now_ms(); UINT64_MAX while all are silent */
	unsigned spin_skip, spin_pause;	/* sleeps without, still; after the next time in vain */
};

/* The parking thread is the first; those that serve come behind it. */
enum { PARKED, SERVING };

static struct {
	struct client_thread *thread;
	atomic_uint count;		/* with the place of the parking thread */
	unsigned max, spinners_max;
	unsigned keepalive;		/* seconds */
	atomic_bool parks;		/* there is the parking thread */
	atomic_bool stopped;		/* clients_stop() */
	atomic_uint spinners;
	atomic_size_t total;		/* connections; threads end when they stop and there are none */
} clients;

static struct conn *conn_of(const struct source *s)
{
	return (struct conn *)((char *)(uintptr_t)s - offsetof(struct conn, source));
}

static struct client_thread *thread_of(const struct conn *c)
{
	return (struct client_thread *)((char *)c->workspace -
					offsetof(struct client_thread, workspace));
}

/* The first of all threads that there are. */
static unsigned first_thread(void)
{
	return clients.parks ? PARKED : SERVING;
}

static void wake_threads(void)
{
	for (unsigned i = first_thread(); i < clients.count; i++)
		loop_wake(&clients.thread[i].loop);
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
	conn_free(c);
	atomic_fetch_sub(&t->load, 1);
	if (atomic_fetch_sub(&clients.total, 1) == 1 && atomic_load(&clients.stopped))
		wake_threads();
	wake_main();
}

/* Give it a turn, and set when the next one is due; or end it, if it is over. */
static void serve_client(struct client_thread *t, struct conn *c, short revents)
{
	uint64_t due, say = 0;

	conn_turn(c, revents);
	if (c->lively) {
		t->lively = true;
		c->active = t->loop.polled / 1000;
	}
	if (c->state == CONN_DEAD)
		give_up_place(c);
	if (conn_is_over(c)) {
		loop_remove(&t->loop, &c->source);
		end_client(t, c);
		return;
	}
	due = c->deadline ? c->deadline : UINT64_MAX;
	if (c->stats && c->stats->unsaid)
		say = stats_catch_up(c->stats, c->peer, now_ms());
	if (say && say < due)
		due = say;
	c->source.due = c->tired ? 0 : due;
}

/* A connection has come, from another thread or a new one. */
static void take_arrival(struct mail *m)
{
	struct conn *c = (struct conn *)((char *)m - offsetof(struct conn, mail));
	struct client_thread *t = thread_of(c);

	if (c->active == 0) {
		c->active = now_ms();
		conn_start(c);
	}
	if (!loop_add(&t->loop, &c->source)) {
		conn_kill(c, "out of memory");
		end_client(t, c);
		return;
	}
	c->source.due = 0;
	if (clients.stopped)
		conn_stop(c);
}

static void give_client(struct client_thread *t, struct conn *c)
{
	atomic_fetch_add(&t->load, 1);
	c->workspace = &t->workspace;
	c->mail.deliver = take_arrival;
	loop_post(&t->loop, &c->mail);
}

/* Take what was posted, and do what all threads are asked for.  False if there is nothing new. */
static bool take_mail(struct client_thread *t)
{
	bool admit, stop;

	if (!loop_deliver(&t->loop))
		return false;
	admit = atomic_exchange(&t->admit, false);
	stop = atomic_load(&clients.stopped);
	for (size_t i = 0; i < t->loop.count && (admit || stop); i++) {
		if (stop)
			conn_stop(conn_of(t->loop.source[i]));
		t->loop.source[i]->due = 0;
	}
	return true;
}

/* Parking */

/* Give a connection to another thread, whose it is from then on, with all that it has done. */
static void move_client(struct client_thread *from, struct conn *c, struct client_thread *to)
{
	loop_remove(&from->loop, &c->source);
	give_client(to, c);
	atomic_fetch_sub(&from->load, 1);
}

/* Whether it was parked. */
static bool park(struct client_thread *t, struct conn *c)
{
	if (t->loop.polled / 1000 - c->active < c->patience || !conn_may_park(c) ||
	    !atomic_load(&clients.parks))
		return false;
	move_client(t, c, &clients.thread[PARKED]);
	return true;
}

/* End those whose hosts are gone, and park those who have been silent for long. */
static void sweep(struct client_thread *t)
{
	bool again = false;

	for (size_t i = t->loop.count; i-- > 0;) {
		struct conn *c = conn_of(t->loop.source[i]);
		bool owes;

		if (conn_has_vanished(c, clients.keepalive, &owes)) {
			conn_kill(c, "its host does not answer any more");
			c->source.due = 0;
		}
		again |= owes || (t->loop.count > FEW_CONNS && !park(t, c));
	}
	t->sweep_due = again ? t->loop.polled / 1000 + SWEEP_MS : UINT64_MAX;
}

static struct client_thread *least_loaded(void)
{
	struct client_thread *best = &clients.thread[SERVING];

	for (unsigned i = SERVING; i < clients.count; i++)
		if (atomic_load(&clients.thread[i].load) < atomic_load(&best->load))
			best = &clients.thread[i];
	return best;
}

static void client_turn(struct source *s, short revents)
{
	struct conn *c = conn_of(s);
	struct client_thread *t = thread_of(c);

	if (!revents || t != &clients.thread[PARKED] || clients.stopped) {
		serve_client(t, c, revents);
		return;
	}
	if (t->loop.polled / 1000 - c->active < 4 * c->patience)
		c->patience *= 2;
	else
		c->patience = SILENT_MS;
	move_client(t, c, least_loaded());
}

static short client_events(const struct source *s)
{
	return conn_events(conn_of(s));
}

static const struct source_ops client_ops = { client_events, client_turn };

/* Spinning */

/* One look at each connection.  True if one of them had something. */
static bool look_at_all(struct client_thread *t)
{
	t->lively = false;
	for (size_t i = t->loop.count; i-- > 0;) {
		struct conn *c = conn_of(t->loop.source[i]);

		if (conn_events(c) & POLLIN)
			serve_client(t, c, POLLIN);
	}
	if (take_mail(t)) {
		loop_turn_due(&t->loop);
		t->lively = true;
	}
	return t->lively;
}

/* Look for more for a while; true if there was something. */
static bool spin_for(struct client_thread *t)
{
	uint64_t until = now_us() + SPIN_US;
	bool paid = false;

	for (unsigned rounds = 0; rounds < SPIN_ROUNDS;) {
		if (look_at_all(t)) {
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
		if (spin_for(t))
			t->spin_pause = 0;
		else if (t->spin_pause < SPIN_SKIP_MAX)
			t->spin_pause = 2 * t->spin_pause + 1;
		t->spin_skip = t->spin_pause;
	}
	atomic_fetch_sub(&clients.spinners, 1);
}

/* Starting and stopping */

static void *client_main(void *arg)
{
	struct client_thread *t = arg;

	for (;;) {
		take_mail(t);
		if (clients.stopped && clients.total == 0)
			return NULL;
		if (t->loop.count == 0)
			t->sweep_due = UINT64_MAX;
		t->lively = false;
		loop_poll(&t->loop, t->sweep_due);
		if (t->lively && t->sweep_due == UINT64_MAX)
			t->sweep_due = t->loop.polled / 1000 + SWEEP_MS;
		if (t->lively && t->loop.count <= FEW_CONNS)
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

	t->sweep_due = UINT64_MAX;
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

/*
 * The thread with the fewest connections; a new one while there may be more and none is idle.  When
 * all have many, there is the parking thread, too.
 */
static struct client_thread *choose_thread(void)
{
	struct client_thread *best = least_loaded();
	size_t load = atomic_load(&best->load);

	if (load > 0 && clients.count < clients.max &&
	    start_client_thread(&clients.thread[clients.count]) == 0)
		return &clients.thread[clients.count++];
	if (load >= FEW_CONNS && !clients.parks)
		clients.parks = start_client_thread(&clients.thread[PARKED]) == 0;
	return best;
}

void clients_add(struct conn *c)
{
	c->source.ops = &client_ops;
	c->patience = SILENT_MS;
	atomic_fetch_add(&clients.total, 1);
	give_client(choose_thread(), c);
}

size_t clients_count(void)
{
	return atomic_load(&clients.total);
}

void clients_stop(void)
{
	atomic_store(&clients.stopped, true);
	wake_threads();
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
