/*
 * link.c - one connection to the origin, in transmission: see link.h.
 *
 * Each request has a slot from when it is asked to when it is answered; its cookie is the number
 * of the slot and one that never comes again.  Heads of replies and small data are received
 * through a buffer, large data straight to where it belongs.
 */
#define _GNU_SOURCE
#include "link.h"

#include "buffer.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	SLOTS = 512,			/* requests outstanding; a power of two */
	RX_BYTES = 256 * 1024,

	/* When answers are as large as this on average, only heads go through the buffer. */
	LARGE = 32 * 1024,
	LARGE_RX_BYTES = 128,

	PROGRESS = 1024,		/* bytes; who sends less in the time allowed counts as silent */
};

struct slot {
	struct origin_request *r;	/* NULL if it is free */
	struct slot *older, *newer;	/* in the order of asking; or the next free one */
	uint64_t asked;			/* when */
	unsigned extents;		/* that have been stored */
	struct proto_answer answer;
};

struct link {
	int fd;
	struct proto_offer offer;
	char reason[48];		/* room for what is said of its end */
	uint64_t cookies;		/* given out */
	uint64_t heard;			/* when an answer, or PROGRESS bytes of one, came last */
	size_t unheard;			/* bytes since then */
	uint64_t answered;		/* the latest time of asking of what was answered */
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

struct link *link_new(int fd, const struct proto_offer *offer)
{
	struct link *l = malloc(sizeof(*l));

	if (!l) {
		close(fd);
		return NULL;
	}
	memset(l, 0, offsetof(struct link, slot));
	l->fd = fd;
	l->offer = *offer;
	return l;
}

int link_fd(const struct link *l)
{
	return l->fd;
}

const struct proto_offer *link_offer(const struct link *l)
{
	return &l->offer;
}

short link_events(const struct link *l)
{
	return POLLIN | (l->tx_from < l->tx_to ? POLLOUT : 0);
}

bool link_has_room(const struct link *l)
{
	return l->count < SLOTS && l->tx_to - l->tx_from < SLOTS * PROTO_REQUEST_SIZE;
}

uint64_t link_owes(const struct link *l)
{
	return l->owes;
}

/* Asking */

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

static void finish(struct link *l, struct slot *s)
{
	struct origin_request *r = s->r;

	r->error = error_of(&s->answer);
	if (r->error)
		drop_data(r);
	if (r->extent)
		r->extents = s->extents;
	if (s->asked > l->answered)
		l->answered = s->asked;
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
	finish(l, s);
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
	wrong = proto_answer_add(&s->answer, &l->offer, r);
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

/* Where the next bytes go.  Returns how many entries of iov there are. */
static int where_to(struct link *l, struct iovec *iov)
{
	bool direct = l->current && l->place && l->left > 0;
	size_t room = RX_BYTES - l->rx_to;

	if (l->count > 0 && l->owes / l->count >= LARGE)
		room = LARGE_RX_BYTES;
	if (direct) {
		iov[0].iov_base = l->place;
		iov[0].iov_len = l->left;
	}
	iov[direct].iov_base = l->rx + l->rx_to;
	iov[direct].iov_len = room;
	return 1 + direct;
}

/* Receive once.  Returns what recvmsg() does; *wanted is what there was room for. */
static ssize_t receive(struct link *l, size_t *wanted)
{
	struct iovec iov[2];
	struct msghdr msg = { .msg_iov = iov };
	size_t direct = 0;
	ssize_t n;

	msg.msg_iovlen = (unsigned)where_to(l, iov);
	*wanted = iov[0].iov_len;
	if (msg.msg_iovlen == 2) {
		direct = l->left;
		*wanted += iov[1].iov_len;
	}
	n = recvmsg(l->fd, &msg, 0);
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
	size_t wanted;
	ssize_t n = receive(l, &wanted);

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
	*more = !wrong && (size_t)n == wanted;
	*bytes = l->fetched;
	l->fetched = 0;
	return wrong;
}

/* Not only who is silent is dead: an answer may be lost among others that come. */
const char *link_check(struct link *l, uint64_t now, unsigned timeout_ms, uint64_t *left)
{
	uint64_t silent = now - l->heard;

	if (l->count == 0)
		return NULL;
	if (silent >= timeout_ms) {
		snprintf(l->reason, sizeof(l->reason), "no answer for %u s", timeout_ms / 1000);
		return l->reason;
	}
	if (l->answered >= l->oldest->asked + timeout_ms)
		return "an answer is overdue";
	if (timeout_ms - silent < *left)
		*left = timeout_ms - silent;
	return NULL;
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
	struct origin_request *first = NULL;

	send_farewell(l);
	close(l->fd);
	for (struct slot *s = l->newest; s; s = s->older) {
		drop_data(s->r);
		s->r->next = first;
		first = s->r;
	}
	free(l);
	return first;
}
