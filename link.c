/*
 * link.c - one connection to the origin: see link.h.
 *
 *	LINK_NEW
 *	LINK_RESOLVE	a thread looks the name up
 *	LINK_CONNECT	to an address; from here and the next state to the next one, if it fails
 *	LINK_NEGOTIATE	the handshake
 *	LINK_UP		transmission
 *
 * In transmission each request has a slot from when it is asked to when it is answered; its
 * cookie is the number of the slot and one that never comes again.  Heads of replies and small
 * data are received through a buffer, large data straight to where it belongs.
 */
#define _GNU_SOURCE
#include "link.h"

#include "buffer.h"
#include "util.h"

#include <assert.h>
#include <errno.h>
#include <netdb.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum {
	LOOKUP_STACK = 256 * 1024,	/* resolvers are greedy */
	LOOKUPS_MAX = 32,		/* more than that hang */
	ADDRESSES_MAX = 24,		/* of one name */

	SLOTS = 512,			/* requests outstanding; a power of two */
	RX_BYTES = 256 * 1024,

	/* When answers are as large as this on average, only heads go through the buffer. */
	LARGE = 32 * 1024,
	LARGE_RX_BYTES = 128,

	KEEPALIVE_S = 120,		/* while it owes nothing */
	PROGRESS = 1024,		/* bytes; who sends less in the time allowed counts as silent */
};

static const char NBD_PORT[] = "10809";

enum link_state { LINK_NEW, LINK_RESOLVE, LINK_CONNECT, LINK_NEGOTIATE, LINK_UP };

/* What a name stands for: small enough that a pipe takes all of it at once. */
struct link_addresses {
	char error[64];			/* why there is none, or "" */
	unsigned count;
	struct {
		socklen_t len;
		struct sockaddr_storage sa;
	} address[ADDRESSES_MAX];
};

/* A thread that looks a name up.  Nobody waits for it: it may hang for as long as it pleases. */
struct lookup {
	int fd;				/* struct link_addresses goes there */
	struct link_target *target;
};

static atomic_uint lookups;

struct slot {
	struct origin_request *r;	/* NULL if it is free */
	struct slot *older, *newer;	/* in the order of asking; or the next free one */
	uint64_t asked;			/* when */
	unsigned extents;		/* that have been stored */
	struct proto_answer answer;
};

struct link {
	enum link_state state;
	int fd;				/* the socket; or a pipe, while the name is looked up */
	unsigned timeout_ms;
	char reason[PROTO_REASON_MAX];	/* of its end */

	/* The attempt. */
	const struct link_target *target;
	uint64_t end;			/* of all of it; now_ms() */
	uint64_t deadline;		/* of this state, or this address */
	struct link_addresses found;
	unsigned next;			/* address to try */
	bool answered;			/* by a server, and the reason is about what it said */
	struct proto_client client;	/* its offer stays */

	/* Transmission. */
	uint64_t cookies;		/* given out */
	uint64_t heard;			/* when an answer, or PROGRESS bytes of one, came last */
	size_t unheard;			/* bytes since then */
	uint64_t latest;		/* time of asking of what was answered */
	uint64_t fetched;		/* bytes of data, not reported yet */
	struct origin_request **finished;	/* the next answered request goes here */

	struct slot *free, *oldest, *newest;
	unsigned fresh;			/* slots from here on were never used, nor written to */
	unsigned count;			/* requests that it owes */
	uint64_t owes;			/* bytes */

	size_t tx_from, tx_to;		/* what is to be sent */
	size_t rx_from, rx_to;		/* what was received and not looked at */

	/* The reply whose payload is coming. */
	struct slot *current;
	struct proto_reply reply;
	uint32_t left;			/* bytes */
	uint8_t *place;			/* for data; NULL: it is thrown away */

	struct slot slot[SLOTS];
	uint8_t tx[(SLOTS + 1) * PROTO_REQUEST_SIZE];	/* the last place is the farewell's */
	uint8_t rx[RX_BYTES];
};

_Static_assert(PROTO_CLIENT_ROOM <= (SLOTS + 1) * PROTO_REQUEST_SIZE, "tx holds a handshake's part");
_Static_assert((size_t)PROTO_CLIENT_TAKE_MAX <= RX_BYTES, "rx holds a handshake's part");
_Static_assert(sizeof(struct link_addresses) <= 4096, "a pipe takes all addresses at once");

/* Targets */

static char *copy_host(const char *host, bool local)
{
	char *copy;

	if (local)
		return absolute_path(host + 5);
	copy = strdup(host);
	if (copy)
		strip_brackets(copy);
	return copy;
}

static void name_address(struct link_target *t)
{
	size_t room = sizeof(t->address);
	const char *format = !t->port ? "unix:%s" : strchr(t->host, ':') ? "[%s]:%s" : "%s:%s";
	int n = snprintf(t->address, room, format, t->host, t->port);

	if (n < 0 || (size_t)n >= room)
		strcpy(t->address + room - 4, "...");
}

struct link_target *link_target_new(const char *host, const char *port, const char *export_name)
{
	struct link_target *t = calloc(1, sizeof(*t));
	bool local = strncmp(host, "unix:", 5) == 0;

	if (!t)
		return NULL;
	t->host = copy_host(host, local);
	t->port = local ? NULL : strdup(port ? port : NBD_PORT);
	t->export_name = strdup(export_name);
	if (!t->host || !t->export_name || (!local && !t->port)) {
		link_target_free(t);
		return NULL;
	}
	name_address(t);
	return t;
}

void link_target_free(struct link_target *t)
{
	if (!t)
		return;
	free(t->host);
	free(t->port);
	free(t->export_name);
	free(t);
}

struct link *link_new(const struct link_target *t, unsigned timeout_ms)
{
	struct link *l = malloc(sizeof(*l));

	if (!l)
		return NULL;
	memset(l, 0, offsetof(struct link, slot));
	l->fd = -1;
	l->target = t;
	l->timeout_ms = timeout_ms;
	l->end = l->deadline = now_ms() + timeout_ms;
	return l;
}

struct pollfd link_poll(const struct link *l)
{
	bool sends = l->state == LINK_CONNECT || l->tx_from < l->tx_to;
	bool receives = l->state == LINK_UP || !sends;

	return (struct pollfd){
		.fd = l->fd, .events = (receives ? POLLIN : 0) | (sends ? POLLOUT : 0),
	};
}

const struct proto_offer *link_offer(const struct link *l)
{
	return l->state == LINK_UP ? &l->client.offer : NULL;
}

/* Sending, in a handshake and later */

static const char closed[] = "it closed the connection";

static bool would_block(int err)
{
	return err == EAGAIN || err == EWOULDBLOCK || err == EINTR || err == ENOBUFS;
}

const char *link_send(struct link *l)
{
	ssize_t n;

	if (l->tx_from == l->tx_to)
		return NULL;
	n = send(l->fd, l->tx + l->tx_from, l->tx_to - l->tx_from, MSG_NOSIGNAL);
	if (n < 0 && errno == EPIPE)
		return closed;
	if (n < 0)
		return would_block(errno) ? NULL : strerror(errno);
	l->tx_from += (size_t)n;
	if (l->tx_from == l->tx_to)
		l->tx_from = l->tx_to = 0;
	return NULL;
}

/* Addresses */

/* Returns what getaddrinfo() does. */
static int find_addresses(const struct link_target *t, int flags, struct link_addresses *found)
{
	const struct addrinfo hints = {
		.ai_flags = flags, .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM,
	};
	struct addrinfo *list;
	int err = getaddrinfo(t->host, t->port, &hints, &list);

	memset(found, 0, sizeof(*found));
	if (err) {
		snprintf(found->error, sizeof(found->error), "%s",
			 err == EAI_SYSTEM ? strerror(errno) : gai_strerror(err));
		return err;
	}
	for (struct addrinfo *i = list; i && found->count < ADDRESSES_MAX; i = i->ai_next) {
		found->address[found->count].len = i->ai_addrlen;
		memcpy(&found->address[found->count++].sa, i->ai_addr, i->ai_addrlen);
	}
	freeaddrinfo(list);
	return 0;
}

static void lookup_free(struct lookup *k)
{
	close(k->fd);
	link_target_free(k->target);
	free(k);
	atomic_fetch_sub(&lookups, 1);
}

/* The thread. */
static void *lookup_main(void *arg)
{
	struct lookup *k = arg;
	struct link_addresses found;
	ssize_t n;

	find_addresses(k->target, 0, &found);
	n = write(k->fd, &found, sizeof(found));
	(void)n;	/* the link may have been given up */
	lookup_free(k);
	return NULL;
}

/* Have the name looked up.  The result comes from the descriptor that is returned, or -1. */
static int lookup_start(const struct link_target *t)
{
	struct lookup *k = malloc(sizeof(*k));
	pthread_t thread;
	int fds[2];

	if (!k || make_pipe(fds) < 0) {
		free(k);
		return -1;
	}
	k->fd = fds[1];
	k->target = link_target_new(t->host, t->port, "");
	if (atomic_fetch_add(&lookups, 1) < LOOKUPS_MAX && k->target &&
	    thread_start(&thread, LOOKUP_STACK, lookup_main, k) == 0) {
		pthread_detach(thread);
		return fds[0];
	}
	lookup_free(k);
	close(fds[0]);
	return -1;
}

/* The attempt: a function for each state */

static int link_connect(struct link *l)
{
	unsigned i = l->next++;
	const struct sockaddr *sa = (const struct sockaddr *)&l->found.address[i].sa;

	l->state = LINK_CONNECT;
	l->fd = socket(sa->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (l->fd >= 0 && connect(l->fd, sa, l->found.address[i].len) == 0)
		return 0;
	return l->fd >= 0 && (errno == EINPROGRESS || errno == EINTR) ? 0 : errno;
}

/*
 * Try the next address, since the last one is of no use: each has its share of the time that is
 * left.  What a server answered is not forgotten for another that cannot be reached.
 */
static const char *link_try_next(struct link *l, const char *reason)
{
	int err = 0;

	do {
		uint64_t now = now_ms();

		if (err)
			reason = strerror(err);
		if (reason && !l->answered)
			snprintf(l->reason, sizeof(l->reason), "%s", reason);
		l->answered |= l->state == LINK_NEGOTIATE;
		if (l->fd >= 0)
			close(l->fd);
		l->fd = -1;
		if (l->next == l->found.count || now >= l->end)
			return l->reason;
		l->deadline = now + (l->end - now) / (l->found.count - l->next);
		err = link_connect(l);
	} while (err);
	return NULL;
}

static const char *link_begin_local(struct link *l)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	size_t len = strlen(l->target->host);

	if (len >= sizeof(sun.sun_path)) {
		snprintf(l->reason, sizeof(l->reason), "the path has %zu bytes, %zu is the most",
			 len, sizeof(sun.sun_path) - 1);
		return l->reason;
	}
	memcpy(sun.sun_path, l->target->host, len);
	memcpy(&l->found.address[0].sa, &sun, sizeof(sun));
	l->found.address[0].len = sizeof(sun);
	l->found.count = 1;
	return link_try_next(l, NULL);
}

/* Only a name takes a thread to find out what it stands for. */
static const char *link_begin(struct link *l)
{
	const struct link_target *t = l->target;

	if (!t->port)
		return link_begin_local(l);
	if (find_addresses(t, AI_NUMERICHOST | AI_NUMERICSERV, &l->found) == 0)
		return link_try_next(l, NULL);
	l->state = LINK_RESOLVE;
	l->fd = lookup_start(t);
	return l->fd < 0 ? "out of memory or descriptors" : NULL;
}

static const char *link_resolved(struct link *l)
{
	ssize_t n = read(l->fd, &l->found, sizeof(l->found));

	if (n != (ssize_t)sizeof(l->found))
		return n < 0 && errno == EINTR ? NULL : "the name was not looked up";
	return l->found.error[0] ? l->found.error : link_try_next(l, NULL);
}

static const char *link_connected(struct link *l)
{
	socklen_t size = sizeof(int);
	int err;

	if (getsockopt(l->fd, SOL_SOCKET, SO_ERROR, &err, &size) < 0)
		err = errno;
	if (err)
		return link_try_next(l, strerror(err));
	tune_socket(l->fd, KEEPALIVE_S);
	proto_client_begin(&l->client, l->target->export_name);
	l->tx_from = l->tx_to = l->rx_to = 0;
	l->state = LINK_NEGOTIATE;
	return NULL;
}

/* A part of the handshake is in rx, or some of it is. */
static const char *link_haggle(struct link *l)
{
	enum proto_next next;

	if (l->rx_to < l->client.want)
		return NULL;
	next = proto_client_take(&l->client, l->rx, l->tx, &l->tx_to);
	l->rx_to = 0;
	if (next == PROTO_TRANSMIT)
		l->state = LINK_UP;
	return next == PROTO_CLOSE ? link_try_next(l, l->client.reason) : NULL;
}

static const char *link_negotiate(struct link *l)
{
	const char *wrong = link_send(l);
	ssize_t n;

	if (wrong)
		return link_try_next(l, wrong);
	if (l->tx_from < l->tx_to)
		return NULL;
	n = recv(l->fd, l->rx + l->rx_to, l->client.want - l->rx_to, 0);
	if (n == 0)
		return link_try_next(l, l->client.state == PROTO_CLIENT_EXPORT ?
				     "it closed the connection: it may not have such an export" :
				     "it closed the connection in the handshake");
	if (n < 0)
		return would_block(errno) ? NULL : link_try_next(l, strerror(errno));
	l->rx_to += (size_t)n;
	return link_haggle(l);
}

const char *link_advance(struct link *l)
{
	switch (l->state) {
	case LINK_NEW:
		return link_begin(l);
	case LINK_RESOLVE:
		return link_resolved(l);
	case LINK_CONNECT:
		return link_connected(l);
	case LINK_NEGOTIATE:
		return link_negotiate(l);
	default:
		return NULL;
	}
}

/* Asking */

bool link_has_room(const struct link *l)
{
	return l->count < SLOTS && l->tx_to - l->tx_from < SLOTS * PROTO_REQUEST_SIZE;
}

uint64_t link_owes(const struct link *l)
{
	return l->owes;
}

static uint64_t answer_bytes(const struct origin_request *r)
{
	return r->extent ? PROTO_EXTENT_SIZE : r->len;
}

static struct slot *take_slot(struct link *l, struct origin_request *r)
{
	struct slot *s = l->free;

	if (s)
		l->free = s->newer;
	else
		s = &l->slot[l->fresh++];
	s->r = r;
	s->newer = NULL;
	s->older = l->newest;
	*(l->newest ? &l->newest->newer : &l->oldest) = s;
	l->newest = s;
	l->count++;
	l->owes += answer_bytes(r);
	return s;
}

static void release_slot(struct link *l, struct slot *s)
{
	*(s->older ? &s->older->newer : &l->oldest) = s->newer;
	*(s->newer ? &s->newer->older : &l->newest) = s->older;
	l->count--;
	l->owes -= answer_bytes(s->r);
	s->r = NULL;
	s->newer = l->free;
	l->free = s;
}

static void put_request(struct link *l, const struct proto_request *r)
{
	if (l->tx_from > 0) {
		memmove(l->tx, l->tx + l->tx_from, l->tx_to - l->tx_from);
		l->tx_to -= l->tx_from;
		l->tx_from = 0;
	}
	assert(sizeof(l->tx) - l->tx_to >= PROTO_REQUEST_SIZE);
	proto_put_request(r, l->tx + l->tx_to);
	l->tx_to += PROTO_REQUEST_SIZE;
}

static void note_progress(struct link *l, uint64_t now)
{
	l->heard = now;
	l->unheard = 0;
}

void link_ask(struct link *l, struct origin_request *r, uint64_t now)
{
	struct slot *s = take_slot(l, r);
	const struct proto_request h = {
		.cmd = r->extent ? NBD_CMD_BLOCK_STATUS : NBD_CMD_READ,
		.cookie = l->cookies++ * SLOTS + (unsigned)(s - l->slot),
		.off = r->off,
		.len = r->len,
	};

	if (l->count == 1)
		note_progress(l, now);
	r->cookie = h.cookie;
	s->asked = now;
	s->extents = 0;
	proto_answer_begin(&s->answer, &h);
	put_request(l, &h);
}

/* Answers */

/* The data does not remain what it was: it is asked for again, or not at all. */
static void drop_data(struct origin_request *r)
{
	if (!r->allocated)
		return;
	buffer_put(r->buf, r->len);
	r->buf = NULL;
	r->allocated = false;
}

/* What an error on the wire means to who asked. */
static int error_of(const struct proto_answer *a)
{
	if (a->status && (a->error == NBD_EINVAL || a->error == NBD_ENOTSUP))
		return -ENOTSUP;
	return a->error ? -EIO : 0;
}

static void link_finish(struct link *l, struct slot *s)
{
	struct origin_request *r = s->r;

	r->error = error_of(&s->answer);
	if (r->error)
		drop_data(r);
	if (r->extent)
		r->extents = s->extents;
	if (s->asked > l->latest)
		l->latest = s->asked;
	release_slot(l, s);
	r->next = NULL;
	*l->finished = r;
	l->finished = &r->next;
}

/* Where a part of the answer belongs; NULL, and an error for the request, if out of memory. */
static uint8_t *place_of(struct slot *s, uint64_t off)
{
	struct origin_request *r = s->r;

	if (!r->buf) {
		r->buf = buffer_get(r->len);
		r->allocated = r->buf;
	}
	if (!r->buf) {
		s->answer.error = NBD_ENOMEM;
		return NULL;
	}
	return r->buf + (off - r->off);
}

static struct slot *find_slot(struct link *l, uint64_t cookie)
{
	struct slot *s = &l->slot[cookie % SLOTS];

	return cookie % SLOTS < l->fresh && s->r && s->r->cookie == cookie ? s : NULL;
}

/* The last of an answer is here. */
static const char *end_answer(struct link *l, struct slot *s)
{
	const char *wrong = proto_answer_end(&s->answer);

	if (wrong)
		return wrong;
	if (s->answer.error == NBD_ESHUTDOWN)
		return "it is shutting down";
	link_finish(l, s);
	return NULL;
}

static const char *end_reply(struct link *l)
{
	struct slot *s = l->current;

	l->current = NULL;
	if (l->reply.kind != PROTO_REPLY_HOLE)
		l->fetched += l->reply.len;
	return l->reply.last ? end_answer(l, s) : NULL;
}

/* Take the head of a reply, if all of it is here. */
static const char *take_head(struct link *l, bool *more)
{
	struct proto_reply *r = &l->reply;
	const char *wrong = proto_get_reply(l->rx + l->rx_from, l->rx_to - l->rx_from, r);
	struct slot *s;

	if (wrong)
		return wrong;
	*more = r->head > l->rx_to - l->rx_from;
	if (*more)
		return NULL;
	s = find_slot(l, r->cookie);
	if (!s)
		return "it answered what was not asked";
	wrong = proto_answer_add(&s->answer, &l->client.offer, r);
	if (wrong)
		return wrong;
	l->rx_from += r->head;
	l->current = s;
	l->left = r->payload;
	l->place = r->len ? place_of(s, r->off) : NULL;
	if (r->kind == PROTO_REPLY_HOLE && l->place)
		memset(l->place, 0, r->len);
	return NULL;
}

/* Extents beyond the room that there is are checked as well. */
static const char *take_extents(struct link *l)
{
	struct slot *s = l->current;
	struct extent e;

	while (l->left > 0 && l->rx_to - l->rx_from >= PROTO_EXTENT_SIZE) {
		const char *wrong = proto_answer_extent(&s->answer, l->rx + l->rx_from, &e);

		if (wrong)
			return wrong;
		if (e.len > 0 && s->extents < s->r->extents)
			s->r->extent[s->extents++] = e;
		l->rx_from += PROTO_EXTENT_SIZE;
		l->left -= PROTO_EXTENT_SIZE;
	}
	return NULL;
}

/* Data that is at its place, or in the buffer. */
static void took_data(struct link *l, size_t n)
{
	l->left -= (uint32_t)n;
	if (l->place)
		l->place += n;
}

static const char *take_payload(struct link *l, bool *more)
{
	size_t here = l->rx_to - l->rx_from, n = here < l->left ? here : l->left;
	const char *wrong = NULL;

	if (l->reply.kind == PROTO_REPLY_STATUS) {
		wrong = take_extents(l);
	} else {
		if (l->place && n > 0)
			memcpy(l->place, l->rx + l->rx_from, n);
		took_data(l, n);
		l->rx_from += n;
	}
	*more = l->left > 0;
	return wrong;
}

/* Look at all that was received. */
static const char *take_replies(struct link *l)
{
	const char *wrong = NULL;
	bool more = false;

	while (!wrong && !more && (l->current || l->rx_from < l->rx_to)) {
		if (!l->current)
			wrong = take_head(l, &more);
		else
			wrong = take_payload(l, &more);
		if (!wrong && !more && l->current && l->left == 0)
			wrong = end_reply(l);
	}
	memmove(l->rx, l->rx + l->rx_from, l->rx_to - l->rx_from);
	l->rx_to -= l->rx_from;
	l->rx_from = 0;
	return wrong;
}

/*
 * Receive once, and what is left of large data straight to its place.  Returns what recvmsg()
 * does; *room is how much could have come.
 */
static ssize_t link_recv(struct link *l, size_t *room)
{
	bool large = l->count > 0 && l->owes / l->count >= LARGE;
	size_t direct = l->current && l->place ? l->left : 0;
	struct iovec iov[2] = {
		{ .iov_base = l->place, .iov_len = direct },
		{ .iov_base = l->rx + l->rx_to,
		  .iov_len = large ? LARGE_RX_BYTES : RX_BYTES - l->rx_to },
	};
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };
	ssize_t n = recvmsg(l->fd, &msg, 0);

	*room = iov[0].iov_len + iov[1].iov_len;
	if (n > 0) {
		direct = (size_t)n < direct ? (size_t)n : direct;
		took_data(l, direct);
		l->rx_to += (size_t)n - direct;
	}
	return n;
}

const char *link_receive(struct link *l, uint64_t now, struct origin_request **finished,
			 bool *more, uint64_t *bytes)
{
	const char *wrong;
	size_t room;
	ssize_t n = link_recv(l, &room);

	*finished = NULL;
	*more = false;
	*bytes = 0;
	if (n == 0)
		return closed;
	if (n < 0)
		return would_block(errno) ? NULL : strerror(errno);
	l->finished = finished;
	wrong = take_replies(l);
	l->unheard += (size_t)n;
	if (*finished || l->unheard >= PROGRESS)
		note_progress(l, now);
	*more = !wrong && (size_t)n == room;
	*bytes = l->fetched;
	l->fetched = 0;
	return wrong;
}

/* Not only who is silent is dead: an answer may be lost among others that come. */
static const char *link_check_answers(struct link *l, uint64_t now, uint64_t *left)
{
	uint64_t silent = now - l->heard;

	if (l->count == 0)
		return NULL;
	if (silent >= l->timeout_ms) {
		snprintf(l->reason, sizeof(l->reason), "no answer for %u s", l->timeout_ms / 1000);
		return l->reason;
	}
	if (l->latest >= l->oldest->asked + l->timeout_ms)
		return "an answer is overdue";
	if (l->timeout_ms - silent < *left)
		*left = l->timeout_ms - silent;
	return NULL;
}

static const char *link_check_attempt(struct link *l, uint64_t now, uint64_t *left)
{
	const char *wrong = now >= l->deadline ? link_try_next(l, "no answer") : NULL;

	if (!wrong && l->deadline - now < *left)
		*left = l->deadline - now;
	return wrong;
}

const char *link_check(struct link *l, uint64_t now, uint64_t *left)
{
	return l->state == LINK_UP ? link_check_answers(l, now, left) :
				     link_check_attempt(l, now_ms(), left);
}

/* "Terminating the transmission phase": a server that is not told so may think it an accident. */
static void send_farewell(struct link *l)
{
	const struct proto_request h = { .cmd = NBD_CMD_DISC };

	put_request(l, &h);
	link_send(l);
}

struct origin_request *link_free(struct link *l)
{
	struct origin_request *owed = NULL;

	if (!l)
		return NULL;
	if (l->state == LINK_UP)
		send_farewell(l);
	if (l->fd >= 0)
		close(l->fd);
	for (struct slot *s = l->oldest; s; s = s->newer) {
		drop_data(s->r);
		s->r->next = owed;
		owed = s->r;
	}
	free(l);
	return owed;
}
