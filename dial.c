/*
 * dial.c - an attempt to make a connection to an NBD server: see dial.h.
 *
 * The owner and the thread each have an end of a pair of sockets: the thread sends a byte when
 * it has ended, and stops when the owner has closed its end.  Who is last to let go frees.
 */
#define _GNU_SOURCE
#include "dial.h"

#include "util.h"

#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum {
	DIAL_STACK = 256 * 1024,	/* resolvers are greedy */
	DIALS_MAX = 32,			/* more than that hang */
};

static atomic_uint dials;

static const char NBD_PORT[] = "10809";

struct dial {
	atomic_uint holders;		/* the owner and the thread */
	int owner, thread;		/* the ends of the pair */
	struct dial_target *target;
	uint64_t deadline;		/* now_ms() */

	/* The thread's until it has ended, then the owner's. */
	atomic_bool ended;
	int fd;
	struct proto_client client;
	bool answered;			/* by a server, and the reason is about what it said */
	char reason[PROTO_REASON_MAX];
	uint8_t in[PROTO_CLIENT_TAKE_MAX], out[PROTO_CLIENT_ROOM];
};

/* Targets */

static char *copy_host(const char *host, bool local)
{
	size_t len = strlen(host);

	if (local)
		return absolute_path(host + 5);
	if (len > 2 && host[0] == '[' && host[len - 1] == ']')
		return strndup(host + 1, len - 2);
	return strdup(host);
}

static void name_address(struct dial_target *t)
{
	size_t room = sizeof(t->address);
	int n;

	if (t->port)
		n = snprintf(t->address, room, strchr(t->host, ':') ? "[%s]:%s" : "%s:%s",
			     t->host, t->port);
	else
		n = snprintf(t->address, room, "unix:%s", t->host);
	if (n < 0 || (size_t)n >= room)
		strcpy(t->address + room - 4, "...");
}

static struct dial_target *make_target(char *host, const char *port, const char *export_name)
{
	struct dial_target *t = calloc(1, sizeof(*t));

	if (!t) {
		free(host);
		return NULL;
	}
	t->host = host;
	t->port = port ? strdup(port) : NULL;
	t->export_name = strdup(export_name);
	if (!t->host || (port && !t->port) || !t->export_name) {
		dial_target_free(t);
		return NULL;
	}
	name_address(t);
	return t;
}

struct dial_target *dial_target_new(const char *host, const char *port, const char *export_name)
{
	bool local = strncmp(host, "unix:", 5) == 0;

	return make_target(copy_host(host, local), local ? NULL : port ? port : NBD_PORT, export_name);
}

struct dial_target *dial_target_copy(const struct dial_target *t)
{
	return make_target(strdup(t->host), t->port, t->export_name);
}

void dial_target_free(struct dial_target *t)
{
	if (!t)
		return;
	free(t->host);
	free(t->port);
	free(t->export_name);
	free(t);
}

/* The thread */

/* Always false.  What a server answered is not forgotten for another that cannot be reached. */
static bool fail(struct dial *d, const char *fmt, ...)
{
	va_list ap;

	if (d->answered)
		return false;
	va_start(ap, fmt);
	vsnprintf(d->reason, sizeof(d->reason), fmt, ap);
	va_end(ap);
	return false;
}

/* Wait until fd is ready.  False when there is no time left, or the owner has gone. */
static bool wait_for(struct dial *d, int fd, short events, uint64_t deadline)
{
	struct pollfd pfd[2] = {
		{ .fd = fd, .events = events },
		{ .fd = d->thread, .events = POLLIN },
	};
	uint64_t now = now_ms();
	int n;

	if (now >= deadline)
		n = 0;
	else
		n = poll(pfd, 2, (int)(deadline - now));
	if (n == 0)
		return fail(d, "no answer");
	if (n < 0)
		return errno == EINTR || fail(d, "poll: %s", strerror(errno));
	return !pfd[1].revents || fail(d, "given up");
}

/* Whether a call on a socket should be repeated, after waiting. */
static bool would_block(int err)
{
	return err == EAGAIN || err == EWOULDBLOCK || err == EINTR;
}

static bool send_all(struct dial *d, const uint8_t *p, size_t len, uint64_t deadline)
{
	while (len > 0) {
		ssize_t n = send(d->fd, p, len, MSG_NOSIGNAL);

		if (n < 0 && !would_block(errno))
			return fail(d, "%s", strerror(errno));
		if (n < 0 && !wait_for(d, d->fd, POLLOUT, deadline))
			return false;
		if (n > 0) {
			p += n;
			len -= (size_t)n;
		}
	}
	return true;
}

static bool recv_all(struct dial *d, uint8_t *p, size_t len, uint64_t deadline)
{
	while (len > 0) {
		ssize_t n = recv(d->fd, p, len, 0);

		if (n == 0)
			return fail(d, d->client.state == PROTO_CLIENT_EXPORT ?
				    "it closed the connection: it may not have such an export" :
				    "it closed the connection in the handshake");
		if (n < 0 && !would_block(errno))
			return fail(d, "%s", strerror(errno));
		if (n < 0 && !wait_for(d, d->fd, POLLIN, deadline))
			return false;
		if (n > 0) {
			p += n;
			len -= (size_t)n;
		}
	}
	return true;
}

static bool negotiate(struct dial *d, uint64_t deadline)
{
	enum proto_next next = PROTO_HAGGLE;
	size_t len;

	proto_client_begin(&d->client, d->target->export_name);
	while (next == PROTO_HAGGLE) {
		if (!recv_all(d, d->in, d->client.want, deadline))
			return false;
		next = proto_client_take(&d->client, d->in, d->out, &len);
		if (!send_all(d, d->out, len, deadline))
			return false;
	}
	return next == PROTO_TRANSMIT || fail(d, "%s", d->client.reason);
}

/* 0 or an errno; ETIMEDOUT also if the owner has gone. */
static int connect_to(struct dial *d, const struct sockaddr *sa, socklen_t len,
		      uint64_t deadline)
{
	socklen_t size = sizeof(int);
	int err = 0;

	if (connect(d->fd, sa, len) == 0)
		return 0;
	if (errno != EINPROGRESS && errno != EINTR)
		return errno;
	if (!wait_for(d, d->fd, POLLOUT, deadline))
		return ETIMEDOUT;
	return getsockopt(d->fd, SOL_SOCKET, SO_ERROR, &err, &size) < 0 ? errno : err;
}

/* Try one address. */
static bool try_address(struct dial *d, const struct sockaddr *sa, socklen_t len,
			uint64_t deadline)
{
	int err = 0;

	d->fd = socket(sa->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (d->fd < 0)
		err = errno;
	else
		err = connect_to(d, sa, len, deadline);
	if (err) {
		fail(d, "%s", strerror(err));
	} else {
		tune_socket(d->fd);
		if (negotiate(d, deadline))
			return true;
		d->answered = true;
	}
	if (d->fd >= 0)
		close(d->fd);
	d->fd = -1;
	return false;
}

static bool try_path(struct dial *d)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	size_t len = strlen(d->target->host);

	if (len >= sizeof(sun.sun_path))
		return fail(d, "the path has %zu bytes, %zu is the most", len,
			    sizeof(sun.sun_path) - 1);
	memcpy(sun.sun_path, d->target->host, len);
	return try_address(d, (const struct sockaddr *)&sun, sizeof(sun), d->deadline);
}

/* Try all addresses; each has its share of the time that is left. */
static bool try_list(struct dial *d, const struct addrinfo *ai)
{
	unsigned left = 0;

	for (const struct addrinfo *i = ai; i; i = i->ai_next)
		left++;
	for (; ai; ai = ai->ai_next, left--) {
		uint64_t now = now_ms();

		if (now >= d->deadline)
			return fail(d, "no answer");
		if (try_address(d, ai->ai_addr, ai->ai_addrlen,
				now + (d->deadline - now) / left))
			return true;
	}
	return false;
}

static bool try_name(struct dial *d)
{
	const struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM };
	struct addrinfo *list;
	int err = getaddrinfo(d->target->host, d->target->port, &hints, &list);
	bool done;

	if (err)
		return fail(d, "%s", err == EAI_SYSTEM ? strerror(errno) : gai_strerror(err));
	done = try_list(d, list);
	freeaddrinfo(list);
	return done;
}

static void let_go(struct dial *d)
{
	if (atomic_fetch_sub(&d->holders, 1) > 1)
		return;
	atomic_fetch_sub(&dials, 1);
	if (d->fd >= 0)
		close(d->fd);
	close(d->thread);
	dial_target_free(d->target);
	free(d);
}

static void *dial_main(void *arg)
{
	struct dial *d = arg;

	if (d->target->port)
		try_name(d);
	else
		try_path(d);
	atomic_store(&d->ended, true);
	send(d->thread, "", 1, MSG_NOSIGNAL);
	let_go(d);
	return NULL;
}

/* The owner */

static int start_thread(struct dial *d)
{
	pthread_attr_t attr;
	pthread_t thread;
	int err;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, DIAL_STACK);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	err = pthread_create(&thread, &attr, dial_main, d);
	pthread_attr_destroy(&attr);
	return err;
}

struct dial *dial_start(const struct dial_target *t, unsigned timeout_ms)
{
	struct dial *d = NULL;
	int pair[2];

	if (atomic_fetch_add(&dials, 1) < DIALS_MAX)
		d = malloc(sizeof(*d));
	if (!d || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0) {
		atomic_fetch_sub(&dials, 1);
		free(d);
		return NULL;
	}
	memset(d, 0, offsetof(struct dial, in));
	d->owner = pair[0];
	d->thread = pair[1];
	d->fd = -1;
	d->deadline = now_ms() + timeout_ms;
	d->target = dial_target_copy(t);
	atomic_init(&d->holders, 2);
	if (!d->target || start_thread(d)) {
		atomic_store(&d->holders, 1);
		dial_free(d);
		return NULL;
	}
	return d;
}

int dial_fd(const struct dial *d)
{
	return d->owner;
}

int dial_take(struct dial *d, struct proto_offer *offer, char *reason)
{
	int fd;

	if (!atomic_load(&d->ended)) {
		snprintf(reason, PROTO_REASON_MAX, "no answer");
		return -1;
	}
	fd = d->fd;
	d->fd = -1;
	*offer = d->client.offer;
	memcpy(reason, d->reason, PROTO_REASON_MAX);
	return fd;
}

void dial_free(struct dial *d)
{
	if (!d)
		return;
	close(d->owner);
	let_go(d);
}
