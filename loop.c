/*
 * loop.c - one thread's poll(): see loop.h.
 */
#define _GNU_SOURCE
#include "loop.h"

#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct loop main_loop;

static bool make_room_for_source(struct loop *l)
{
	size_t room = l->room ? l->room * 2 : 8;
	struct source **source;
	struct pollfd *pfd;

	if (l->count < l->room)
		return true;
	source = realloc(l->source, room * sizeof(*source));
	if (!source)
		return false;
	l->source = source;
	pfd = realloc(l->pfd, (room + 1) * sizeof(*pfd));
	if (!pfd)
		return false;
	l->pfd = pfd;
	l->room = room;
	return true;
}

int loop_init(struct loop *l)
{
	*l = (struct loop){ .pipe = { -1, -1 }, .mail_end = &l->mail };
	pthread_mutex_init(&l->lock, NULL);
	if (pipe2(l->pipe, O_CLOEXEC | O_NONBLOCK) < 0)
		return -errno;
	return make_room_for_source(l) ? 0 : -ENOMEM;
}

void loop_free(struct loop *l)
{
	if (l->pipe[0] >= 0) {
		close(l->pipe[0]);
		close(l->pipe[1]);
	}
	free(l->source);
	free(l->pfd);
	pthread_mutex_destroy(&l->lock);
}

bool loop_add(struct loop *l, struct source *s)
{
	if (!make_room_for_source(l))
		return false;
	s->place = l->count;
	s->entry = 0;
	l->source[l->count++] = s;
	return true;
}

void loop_remove(struct loop *l, struct source *s)
{
	struct source *last = l->source[--l->count];

	l->source[s->place] = last;
	last->place = s->place;
}

void loop_post(struct loop *l, struct mail *m)
{
	pthread_mutex_lock(&l->lock);
	m->next = NULL;
	*l->mail_end = m;
	l->mail_end = &m->next;
	pthread_mutex_unlock(&l->lock);
	loop_wake(l);
}

void loop_wake(struct loop *l)
{
	int saved = errno;

	atomic_store(&l->rung, true);
	if (atomic_exchange(&l->sleeping, false))
		while (write(l->pipe[1], "", 1) < 0 && errno == EINTR)
			;
	errno = saved;
}

void wake_main(void)
{
	loop_wake(&main_loop);
}

bool loop_deliver(struct loop *l)
{
	struct mail *m, *next;

	if (!atomic_exchange(&l->rung, false))
		return false;
	pthread_mutex_lock(&l->lock);
	m = l->mail;
	l->mail = NULL;
	l->mail_end = &l->mail;
	pthread_mutex_unlock(&l->lock);
	for (; m; m = next) {
		next = m->next;
		m->deliver(m);
	}
	return true;
}

/*
 * In the order in which they were added.  A turn may remove sources: the last one comes in the place of
 * one that is gone, and if that has passed it waits for the next round.
 */
void loop_turn_due(struct loop *l)
{
	uint64_t now = now_ms();

	for (size_t i = 0; i < l->count;) {
		struct source *s = l->source[i];
		short revents = s->entry ? l->pfd[s->entry].revents : 0;
		bool due = !revents && s->due <= now;

		s->entry = 0;
		if (due)
			s->due = UINT64_MAX;
		if (due || revents)
			s->ops->turn(s, revents);
		if (i < l->count && l->source[i] == s)
			i++;
	}
}

/* No more entries than descriptors, or poll() would refuse them.  Returns how many. */
static unsigned prepare_poll(struct loop *l, uint64_t *due)
{
	unsigned n = 1;

	l->pfd[0] = (struct pollfd){ .fd = l->pipe[0], .events = POLLIN };
	for (size_t i = 0; i < l->count; i++) {
		struct source *s = l->source[i];
		short events = s->ops->events(s);

		s->entry = events ? n++ : 0;
		if (events)
			l->pfd[s->entry] = (struct pollfd){ .fd = s->fd, .events = events };
		if (s->due < *due)
			*due = s->due;
	}
	return n;
}

/* For poll(). */
static int ms_until(uint64_t when)
{
	uint64_t now = now_ms();

	if (when == UINT64_MAX)
		return -1;
	return when > now ? (int)(when - now) : 0;
}

void loop_poll(struct loop *l, uint64_t due)
{
	unsigned n;
	int ready, err;
	char buf[64];

	loop_turn_due(l);
	n = prepare_poll(l, &due);
	atomic_store(&l->sleeping, true);
	ready = poll(l->pfd, n, atomic_load(&l->rung) ? 0 : ms_until(due));
	err = ready < 0 ? errno : 0;
	atomic_store(&l->sleeping, false);
	if (err && err != EINTR && err != ENOMEM)
		log_fatal("cannot wait for %u descriptors: %s", n, strerror(err));
	l->polled = now_us();
	if (ready > 0 && l->pfd[0].revents)
		while (read(l->pipe[0], buf, sizeof(buf)) == (ssize_t)sizeof(buf))
			;
	loop_turn_due(l);
}
