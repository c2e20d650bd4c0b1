/*
 * origin.c - the proxy's connections to the remote server: see origin.h.
 *
 *	LINK_DOWN	no connection; its deadline is when to dial
 *	LINK_DIAL	a thread looks the name up; then connect to an address, and the handshake;
 *			if that fails, the next address
 *	LINK_UP		transmission
 *
 * The links are on a loop of their own.  Other threads leave requests and wishes in the mailbox,
 * and wake it.  link_turn() is called when poll() has something for a link, when its deadline is
 * there, and to send what was added.  The function of a state returns NULL, or why the link is of
 * no use any more, and then link_fail() is called.
 *
 * The first link that is up serves clients, the others the background copy; a single one serves
 * all.  Requests that a lost link owed go back to the queues.
 *
 * Nothing is read from a link while too much of what was delivered has not been put away, and it does
 * not count as silent meanwhile.  The copy's links stop first: what clients wait for goes on.
 */
#define _GNU_SOURCE
#include "origin.h"

#include "buffer.h"
#include "log.h"
#include "loop.h"
#include "util.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

enum {
	ORIGIN_STACK = 128 * 1024,
	UNSTORED_MAX = 1024 * 1024,	/* delivered, and not put away; twice that for clients */
	IDLE_MS = 1000,			/* then buffers are given back */
	BACKOFF_MIN = 100,		/* ms */
	BACKOFF_MAX = 5000,
	LINKS_MAX = 16 + 1,		/* one is a redirect's */

	LOOKUP_STACK = 256 * 1024,	/* resolvers are greedy */
	LOOKUPS_MAX = 32,		/* more than that hang */
	ADDRESSES_MAX = 24,		/* of one name */

	OWED_MAX = 512,			/* requests outstanding */
	RX_BYTES = 256 * 1024,
	LARGE = 32 * 1024,		/* answers of which only the heads go through the buffer */
	HEADS_BYTES = 128,

	KEEPALIVE_S = 120,		/* while it owes nothing */
	PROGRESS = 1024,		/* bytes; less in the time allowed counts as silence */
};

struct queue {
	struct origin_request *first, **last;	/* last: where the next one goes, if there is a first */
};

/* Where a server is, and which of its exports is meant. */
struct target {
	struct sockaddr_un path;	/* AF_UNIX; or AF_UNSPEC, and there are host and port */
	char host[1024];		/* a name, or an address without brackets */
	char port[64];
	char export_name[PROTO_STRING_MAX + 1];
	char address[256];		/* "host:port", "[::1]:port", "unix:/path", or shortened */
};

/* What a name stands for: small enough that a pipe takes all of it at once. */
struct addresses {
	char error[64];			/* why there is none, or "" */
	unsigned count;
	struct {
		socklen_t len;
		struct sockaddr_storage sa;
	} address[ADDRESSES_MAX];
};

/* A thread that looks a name up.  Nothing waits for it: getaddrinfo() may hang for ever. */
struct lookup {
	int fd;				/* struct addresses goes there */
	struct target target;
};

static atomic_uint lookups;

/* Cookies are far from each other: one that has a wrong bit is nobody's.  Odd, so that none comes twice. */
#define COOKIE_STEP UINT64_C(0x9e3779b97f4a7c15)

enum link_state { LINK_DOWN, LINK_DIAL, LINK_UP };

struct link {
	struct source source;		/* the socket; a pipe, while the name is looked up; or -1 */
	struct origin *origin;
	enum link_state state;
	uint64_t deadline;		/* now_ms(): to dial, or to give this address up */
	unsigned backoff;		/* ms */

	/* The attempt. */
	uint64_t end;			/* of all of it; now_ms() */
	struct addresses found;		/* none while the name is looked up */
	unsigned next;			/* address to try */
	bool answered;			/* a server has, and the reason tells what it said */
	char reason[PROTO_REASON_MAX];	/* why it failed */
	struct proto_client client;	/* its offer stays */

	/* Transmission. */
	uint64_t cookies;		/* the one given out last */
	struct queue owed;		/* in the order of asking */
	unsigned count;			/* of them */
	uint64_t heard;			/* when an answer, or PROGRESS bytes of one, came last */
	size_t unheard;			/* bytes since then */
	bool clogged;			/* nothing is read */
	uint64_t listening;		/* since when it was not; now_ms() */

	size_t tx_len;			/* bytes to be sent */
	size_t rx_from, rx_to;		/* what was received and not looked at */

	/* The reply whose payload is coming. */
	struct origin_request *current;	/* that it answers; NULL: there is no such reply */
	struct proto_reply reply;	/* its payload counts the bytes to come, not 0 */
	uint8_t *place;			/* for data; NULL: it is thrown away */

	uint8_t tx[(OWED_MAX + 1) * PROTO_REQUEST_SIZE];	/* the last is the farewell's */
	uint8_t rx[RX_BYTES];
};

_Static_assert(PROTO_CLIENT_ROOM <= (OWED_MAX + 1) * PROTO_REQUEST_SIZE, "tx holds a handshake");
_Static_assert((size_t)PROTO_CLIENT_WANT_MAX <= RX_BYTES, "rx holds a handshake's message");
_Static_assert(sizeof(struct addresses) <= 4096, "a pipe takes all addresses at once");

struct origin {
	pthread_t thread;
	bool started;			/* the thread; does not change while there is one */
	struct proto_offer limits;
	unsigned timeout_ms;

	/* The mailbox. */
	pthread_mutex_t lock;		/* guards what follows; a leaf */
	struct queue queue[ORIGIN_PRIORITIES];
	struct target target;		/* written by the thread, which reads it without the lock */
	char reason[PROTO_REASON_MAX];	/* of the last failure, or ""; likewise */
	atomic_bool cancelled;

	/* Going over to another origin.  One side has it: the thread, while it is redirecting. */
	struct target redirect;
	const char *redirect_error;	/* of the last time; NULL if it went well */
	atomic_bool redirecting;

	struct loop loop;		/* of the links */
	atomic_uint up;			/* links */
	atomic_uint_least64_t fetched;	/* bytes of data */
	atomic_size_t unstored;		/* bytes delivered, and not put away */
	atomic_uint waiting;		/* requests that are not done */

	/* The thread's own. */
	struct link *link[LINKS_MAX];	/* the last one is a redirect's */
	unsigned links;
	uint64_t trim;			/* when to give buffers back, if nothing is asked; now_ms() */
};

/* Queues */

static void queue_add(struct queue *q, struct origin_request *r)
{
	r->next = NULL;
	*(q->first ? q->last : &q->first) = r;
	q->last = &r->next;
}

static void queue_remove(struct queue *q, const struct origin_request *r)
{
	struct origin_request **at = &q->first;

	while (*at != r)
		at = &(*at)->next;
	*at = r->next;
	if (!*at)
		q->last = at;
}

/* The asker may free it, or ask again, in done(). */
static void request_finish(struct origin *o, struct origin_request *r, int error)
{
	r->error = error;
	if (!error && !r->extent)
		atomic_fetch_add(&o->unstored, (size_t)r->len);
	atomic_fetch_sub(&o->waiting, 1);
	r->done(r);
}

/* Have it asked by a link that has room for it. */
static void request_add(struct origin *o, struct origin_request *r)
{
	bool cancelled;

	pthread_mutex_lock(&o->lock);
	cancelled = o->cancelled;
	if (!cancelled)
		queue_add(&o->queue[r->priority], r);
	pthread_mutex_unlock(&o->lock);
	if (cancelled)
		request_finish(o, r, -ECANCELED);
	else
		loop_wake(&o->loop);
}

static struct origin_request *request_take(struct origin *o, unsigned priority)
{
	struct origin_request *r;

	pthread_mutex_lock(&o->lock);
	r = o->queue[priority].first;
	if (r)
		queue_remove(&o->queue[priority], r);
	pthread_mutex_unlock(&o->lock);
	return r;
}

/* Targets */

/* host may be "unix:PATH"; port NULL is NBD's own.  NULL, or why there can be no such target. */
static const char *target_set(struct target *t, const char *host, const char *port,
			      const char *export_name)
{
	bool local = strncmp(host, "unix:", 5) == 0, fits;
	const char *format = local ? "unix:%s" : strchr(host, ':') ? "[%s]:%s" : "%s:%s";
	char *name = local ? absolute_path(host + 5) : strdup(host);
	int room = sizeof(t->address), most = local ? sizeof(t->path.sun_path) : sizeof(t->host);

	if (!name)
		return "out of memory";
	strip_brackets(name);
	t->path.sun_family = local ? AF_UNIX : AF_UNSPEC;
	fits = snprintf(local ? t->path.sun_path : t->host, (size_t)most, "%s", name) < most;
	snprintf(t->port, sizeof(t->port), "%s", port ? port : "10809");
	snprintf(t->export_name, sizeof(t->export_name), "%s", export_name);
	if (snprintf(t->address, (size_t)room, format, name, t->port) >= room)
		strcpy(t->address + room - 4, "...");
	free(name);
	if (!fits || strlen(t->port) == sizeof(t->port) - 1)
		return "the host, the port or the path of the socket is too long";
	return proto_is_string(export_name) ? NULL :
					      "the name of the export is not UTF-8 or too long";
}

/* False if there is none, for the reason that found has then. */
static bool find_addresses(const struct target *t, int flags, struct addresses *found)
{
	const struct addrinfo hints = {
		.ai_flags = flags, .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM,
	};
	struct addrinfo *list;
	int err;

	memset(found, 0, sizeof(*found));
	if (t->path.sun_family == AF_UNIX) {
		found->count = 1;
		found->address[0].len = sizeof(t->path);
		memcpy(&found->address[0].sa, &t->path, sizeof(t->path));
		return true;
	}
	err = getaddrinfo(t->host, t->port, &hints, &list);
	if (err) {
		snprintf(found->error, sizeof(found->error), "%s",
			 err == EAI_SYSTEM ? strerror(errno) : gai_strerror(err));
		return false;
	}
	for (struct addrinfo *i = list; i && found->count < ADDRESSES_MAX; i = i->ai_next) {
		found->address[found->count].len = i->ai_addrlen;
		memcpy(&found->address[found->count++].sa, i->ai_addr, i->ai_addrlen);
	}
	freeaddrinfo(list);
	return true;
}

static void lookup_free(struct lookup *k)
{
	close(k->fd);
	free(k);
	atomic_fetch_sub(&lookups, 1);
}

/* The thread. */
static void *lookup_main(void *arg)
{
	struct lookup *k = arg;
	struct addresses found;
	ssize_t n;

	find_addresses(&k->target, 0, &found);
	n = write(k->fd, &found, sizeof(found));
	(void)n;	/* the link may have been given up */
	lookup_free(k);
	return NULL;
}

/* Have the name looked up.  The result comes from the descriptor that is returned, or -1. */
static int lookup_start(const struct target *t)
{
	struct lookup *k = malloc(sizeof(*k));
	pthread_t thread;
	int fds[2];

	if (!k || pipe2(fds, O_CLOEXEC | O_NONBLOCK) < 0) {
		free(k);
		return -1;
	}
	k->fd = fds[1];
	k->target = *t;
	if (atomic_fetch_add(&lookups, 1) < LOOKUPS_MAX &&
	    thread_start(&thread, LOOKUP_STACK, lookup_main, k) == 0) {
		pthread_detach(thread);
		return fds[0];
	}
	lookup_free(k);
	close(fds[0]);
	return -1;
}

/* Which links there are */

static struct link *first_link(const struct origin *o)
{
	for (unsigned i = 0; i < o->links; i++)
		if (o->link[i]->state == LINK_UP)
			return o->link[i];
	return NULL;
}

static bool is_redirect(const struct link *l)
{
	return l == l->origin->link[l->origin->links - 1];
}

static const struct target *target_of(const struct link *l)
{
	return is_redirect(l) ? &l->origin->redirect : &l->origin->target;
}

/* More than one link is made only to a server that is up and allows it. */
static bool link_may_dial(const struct link *l)
{
	const struct origin *o = l->origin;
	const struct link *first = first_link(o);

	if (is_redirect(l))
		return atomic_load(&o->redirecting);
	return l == o->link[0] || (first && first->client.offer.flags & NBD_FLAG_CAN_MULTI_CONN);
}

/* Sending */

static bool would_block(int err)
{
	return err == EAGAIN || err == EWOULDBLOCK || err == EINTR || err == ENOBUFS;
}

static const char *link_send(struct link *l)
{
	ssize_t n;

	if (l->tx_len == 0)
		return NULL;
	n = send(l->source.fd, l->tx, l->tx_len, MSG_NOSIGNAL);
	if (n < 0)
		return would_block(errno) ? NULL : strerror(errno);
	l->tx_len -= (size_t)n;
	memmove(l->tx, l->tx + n, l->tx_len);
	return NULL;
}

static void put_request(struct link *l, const struct proto_request *r)
{
	assert(sizeof(l->tx) - l->tx_len >= PROTO_REQUEST_SIZE);
	proto_put_request(r, l->tx + l->tx_len);
	l->tx_len += PROTO_REQUEST_SIZE;
}

/* Asking */

/* Until when what has been silent, or has waited, since then may go on with that. */
static uint64_t link_patience(const struct link *l, uint64_t since)
{
	return (since > l->listening ? since : l->listening) + l->origin->timeout_ms;
}

static void note_progress(struct link *l)
{
	l->heard = now_ms();
	l->unheard = 0;
}

static void link_ask(struct link *l, struct origin_request *r)
{
	const struct proto_request h = {
		.cmd = r->extent ? NBD_CMD_BLOCK_STATUS : NBD_CMD_READ,
		.cookie = l->cookies += COOKIE_STEP,
		.off = r->off,
		.len = r->len,
	};

	if (r->extent && !l->client.offer.allocation) {
		request_finish(l->origin, r, -EIO);
		return;
	}
	if (l->count++ == 0)
		note_progress(l);
	r->cookie = h.cookie;
	r->sent = now_us();
	proto_answer_begin(&r->answer, &h, r->extent, r->extents);
	queue_add(&l->owed, r);
	put_request(l, &h);
}

/* The link for requests of that priority, or NULL if they must wait. */
static struct link *choose_link(const struct origin *o, unsigned priority)
{
	struct link *first = first_link(o), *best = first;

	for (unsigned i = 0; i < o->links && priority == ORIGIN_COPY; i++) {
		struct link *l = o->link[i];

		if (l->state == LINK_UP && l != first && (best == first || l->count < best->count))
			best = l;
	}
	/* What is to be sent may begin with a part of a request, and be answered before it is sent. */
	if (!best || best->count == OWED_MAX || best->tx_len > (OWED_MAX - 1) * PROTO_REQUEST_SIZE)
		return NULL;
	return best;
}

/* Hand requests to the links, in the order of their priority. */
static void feed_links(struct origin *o)
{
	struct origin_request *r;
	struct link *l;

	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		while ((l = choose_link(o, i)) && (r = request_take(o, i)))
			link_ask(l, r);
}

/* Answers */

/* The data does not remain what it was: it is asked for again, or not at all. */
static void drop_data(struct origin_request *r)
{
	buffer_put(r->buf, r->len);
	r->buf = NULL;
}

/* The last of an answer is here. */
static const char *end_answer(struct link *l, struct origin_request *r)
{
	const char *wrong = proto_answer_end(&r->answer);
	uint64_t sent = r->sent / 1000;
	int error = r->answer.error ? -EIO : 0;

	if (wrong)
		return wrong;
	if (r->answer.error == NBD_ESHUTDOWN)
		return "it is shutting down";
	queue_remove(&l->owed, r);
	l->count--;
	l->backoff = BACKOFF_MIN;	/* it is of use */
	note_progress(l);
	if (error)
		drop_data(r);
	r->extents = r->answer.extents;
	request_finish(l->origin, r, error);
	if (l->owed.first && sent >= link_patience(l, l->owed.first->sent / 1000))
		return "an answer is overdue";
	return NULL;
}

/* So much more of the payload is at its place, or in the buffer. */
static const char *took_payload(struct link *l, size_t n)
{
	struct origin_request *r = l->current;

	if (l->place)
		l->place += n;
	if (l->reply.type == NBD_REPLY_TYPE_OFFSET_DATA)
		atomic_fetch_add(&l->origin->fetched, n);
	l->reply.payload -= (uint32_t)n;
	if (l->reply.payload > 0)
		return NULL;
	l->current = NULL;
	l->place = NULL;
	return l->reply.last ? end_answer(l, r) : NULL;
}

/* Where a part of the answer belongs; NULL, and an error for the request, if out of memory. */
static uint8_t *place_of(struct origin_request *r, uint64_t off)
{
	if (!r->buf)
		r->buf = buffer_get(r->len);
	if (r->buf)
		return r->buf + (off - r->off);
	r->answer.error = NBD_ENOMEM;
	return NULL;
}

static struct origin_request *find_owed(const struct link *l, uint64_t cookie)
{
	struct origin_request *r = l->owed.first;

	while (r && r->cookie != cookie)
		r = r->next;
	return r;
}

/* Take the head of a reply, if all of it is here. */
static const char *take_head(struct link *l, const uint8_t *p, size_t n)
{
	struct proto_reply *reply = &l->reply;
	struct origin_request *r;
	const char *wrong;

	if (n < PROTO_REPLY_SIZE)
		return NULL;
	r = find_owed(l, proto_reply_cookie(p));
	wrong = proto_get_reply(r ? &r->answer : NULL, &l->client.offer, p, n, reply);
	if (wrong || reply->head > n)
		return wrong;
	l->rx_from += reply->head;
	l->current = r;
	l->place = reply->len ? place_of(r, reply->off) : NULL;
	if (reply->type == NBD_REPLY_TYPE_OFFSET_HOLE && l->place)
		memset(l->place, 0, reply->len);
	return took_payload(l, 0);
}

static const char *take_payload(struct link *l, const uint8_t *p, size_t n)
{
	const char *wrong = NULL;

	if (n > l->reply.payload)
		n = l->reply.payload;
	if (l->reply.type == NBD_REPLY_TYPE_BLOCK_STATUS) {
		n -= n % PROTO_EXTENT_SIZE;
		wrong = proto_get_extents(&l->current->answer, p, n);
	} else if (l->place) {
		memcpy(l->place, p, n);
	}
	l->rx_from += n;
	return wrong ? wrong : took_payload(l, n);
}

/* Losing a link */

/* What it owes is asked again. */
static void link_close(struct link *l)
{
	struct origin_request *r;

	/* "Terminating the transmission phase": or it may be taken for an accident. */
	if (l->state == LINK_UP) {
		put_request(l, &(struct proto_request){ .cmd = NBD_CMD_DISC });
		link_send(l);
		atomic_fetch_sub(&l->origin->up, 1);
	}
	if (l->source.fd >= 0)
		close(l->source.fd);
	l->source.fd = -1;
	l->state = LINK_DOWN;
	l->current = NULL;
	l->place = NULL;
	l->count = 0;
	l->tx_len = l->rx_from = l->rx_to = 0;
	while ((r = l->owed.first)) {
		queue_remove(&l->owed, r);
		drop_data(r);
		request_add(l->origin, r);
	}
}

/* Close those from that one on, which may dial at once. */
static void close_links(struct origin *o, unsigned from)
{
	for (unsigned i = from; i < o->links; i++) {
		link_close(o->link[i]);
		o->link[i]->deadline = 0;
		o->link[i]->backoff = BACKOFF_MIN;
	}
}

static void set_reason(struct origin *o, const char *reason)
{
	pthread_mutex_lock(&o->lock);
	snprintf(o->reason, sizeof(o->reason), "%s", reason);
	pthread_mutex_unlock(&o->lock);
}

static void log_connected(const struct origin *o)
{
	log_line("origin %s: connected, %llu bytes", o->target.address,
		 (unsigned long long)o->limits.size);
}

static void redirect_end(struct origin *o, const char *error)
{
	o->redirect_error = error;
	atomic_store(&o->redirecting, false);
	wake_main();
}

/* It is closed, and there is no other address to try: again later.  A reason is logged once. */
static void link_lost(struct link *l, bool was_up)
{
	struct origin *o = l->origin;
	bool others = atomic_load(&o->up) > 0;

	if (is_redirect(l)) {
		l->deadline = 0;
		redirect_end(o, l->reason);
		return;
	}
	l->deadline = now_ms() + l->backoff;
	l->backoff = l->backoff > BACKOFF_MAX / 2 ? BACKOFF_MAX : l->backoff * 2;
	if (strcmp(l->reason, o->reason) == 0 && (others || !was_up))
		return;
	if (o->started)
		log_error("origin %s: %s: %s", o->target.address,
			  !was_up ? "cannot connect" : others ? "one of the links lost" :
								"link lost", l->reason);
	set_reason(o, l->reason);
}

/* The attempt */

/*
 * Connect to the next address: each has its share of the time that is left.  A server speaks first,
 * so an error of connect() shows when its greeting is received.  NULL, or why not.
 */
static const char *link_connect(struct link *l)
{
	uint64_t now = now_ms(), left = l->end > now ? l->end - now : 0;
	unsigned i = l->next++;
	socklen_t len = l->found.address[i].len;
	const struct sockaddr *sa = (const struct sockaddr *)&l->found.address[i].sa;

	l->state = LINK_DIAL;
	l->deadline = now + left / (l->found.count - i);
	proto_client_begin(&l->client, target_of(l)->export_name);
	l->source.fd = socket(sa->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (l->source.fd < 0)
		return strerror(errno);
	tune_socket(l->source.fd, KEEPALIVE_S);
	if (connect(l->source.fd, sa, len) < 0 && errno != EINPROGRESS && errno != EINTR)
		return strerror(errno);
	return NULL;
}

/*
 * The link, or the way to that address, is of no use.  What a server answered is not forgotten for
 * another address that cannot be reached.
 */
static void link_fail(struct link *l, const char *reason)
{
	bool was_up = l->state == LINK_UP;

	do {
		if (!l->answered)
			snprintf(l->reason, sizeof(l->reason), "%s", reason);
		l->answered |= l->client.opt != 0;
		link_close(l);
		if (was_up || l->next == l->found.count || now_ms() >= l->end) {
			link_lost(l, was_up);
			return;
		}
		reason = link_connect(l);
	} while (reason);
}

/* Begin an attempt.  Only a name takes a thread to find out what it stands for. */
static const char *link_dial(struct link *l)
{
	const struct target *t = target_of(l);

	l->next = 0;
	l->answered = false;
	l->end = l->deadline = now_ms() + l->origin->timeout_ms;
	if (find_addresses(t, AI_NUMERICHOST | AI_NUMERICSERV, &l->found))
		return link_connect(l);
	l->state = LINK_DIAL;
	l->source.fd = lookup_start(t);
	return l->source.fd < 0 ? "out of memory or descriptors" : NULL;
}

static const char *link_resolved(struct link *l)
{
	ssize_t n = read(l->source.fd, &l->found, sizeof(l->found));

	close(l->source.fd);
	l->source.fd = -1;
	if (n != (ssize_t)sizeof(l->found))
		return "the name was not looked up";
	return l->found.error[0] ? l->found.error : link_connect(l);
}

/* NULL, or why the offer is not that of the disk that there was. */
static const char *find_change(struct link *l)
{
	const struct proto_offer *limits = &l->origin->limits, *offer = &l->client.offer;

	if (offer->size == limits->size && offer->min_block <= limits->min_block &&
	    offer->max_block >= limits->max_block)
		return NULL;
	snprintf(l->client.reason, PROTO_REASON_MAX,
		 "it has %llu bytes and block sizes of %lu to %lu, and must have %llu and %lu to %lu",
		 (unsigned long long)offer->size, (unsigned long)offer->min_block,
		 (unsigned long)offer->max_block, (unsigned long long)limits->size,
		 (unsigned long)limits->min_block, (unsigned long)limits->max_block);
	return l->client.reason;
}

/* There is a link to another origin: leave the old one. */
static void redirect_go(struct origin *o)
{
	struct link *l = o->link[o->links - 1];

	o->link[o->links - 1] = o->link[0];
	o->link[0] = l;
	close_links(o, 1);
	pthread_mutex_lock(&o->lock);
	o->target = o->redirect;
	pthread_mutex_unlock(&o->lock);
}

/* The handshake is over. */
static const char *link_use(struct link *l)
{
	struct origin *o = l->origin;
	bool redirects = is_redirect(l);
	const char *wrong;

	if (!o->started)
		o->limits = l->client.offer;
	wrong = find_change(l);
	if (wrong)
		return wrong;
	if (redirects)
		redirect_go(o);
	l->state = LINK_UP;
	l->answered = false;
	if (atomic_fetch_add(&o->up, 1) == 0) {
		set_reason(o, "");
		if (o->started)
			log_connected(o);
	}
	if (redirects)
		redirect_end(o, NULL);
	return NULL;
}

/* Receiving */

static const char *take_handshake(struct link *l, const uint8_t *p, size_t n)
{
	struct proto_client *c = &l->client;
	enum proto_next next;

	c->out = l->tx + l->tx_len;
	next = proto_client_take(c, p, n);
	l->tx_len += c->out_len;
	if (c->want <= n)
		l->rx_from += c->want;
	if (next == PROTO_TRANSMIT)
		return link_use(l);
	return next == PROTO_CLOSE ? c->reason : NULL;
}

/* Look at all that was received. */
static const char *take_messages(struct link *l)
{
	const char *(*take)(struct link *l, const uint8_t *p, size_t n), *wrong;
	size_t before;

	do {
		before = l->rx_from;
		take = l->state != LINK_UP ? take_handshake : l->current ? take_payload : take_head;
		wrong = take(l, l->rx + before, l->rx_to - before);
	} while (!wrong && l->rx_from > before);
	memmove(l->rx, l->rx + l->rx_from, l->rx_to - l->rx_from);
	l->rx_to -= l->rx_from;
	l->rx_from = 0;
	return wrong;
}

/* Receive once: what is left of the data straight to its place. */
static const char *link_receive(struct link *l)
{
	const struct origin_request *r = l->owed.first;
	size_t direct = l->place ? l->reply.payload : 0;
	size_t most = r && !r->extent && r->len >= LARGE ? HEADS_BYTES : RX_BYTES;
	struct iovec iov[2] = {
		{ .iov_base = l->place, .iov_len = direct },
		{ .iov_base = l->rx + l->rx_to, .iov_len = most - l->rx_to },
	};
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };
	ssize_t n = recvmsg(l->source.fd, &msg, 0);
	const char *wrong = NULL;

	assert(l->rx_to < most);	/* a part of a head, or of a message of the handshake */
	if (n == 0)
		return l->state == LINK_UP ? "it closed the connection" :
		       l->client.opt == NBD_OPT_EXPORT_NAME ?
			       "it closed the connection: it may not have such an export" :
			       "it closed the connection in the handshake";
	if (n < 0)
		return would_block(errno) ? NULL : strerror(errno);
	l->unheard += (size_t)n;
	if (l->unheard >= PROGRESS)
		note_progress(l);
	direct = (size_t)n < direct ? (size_t)n : direct;
	l->rx_to += (size_t)n - direct;
	if (direct > 0)
		wrong = took_payload(l, direct);
	return wrong ? wrong : take_messages(l);
}

/* What the loop calls */

static struct link *link_of(const struct source *s)
{
	return (struct link *)((char *)(uintptr_t)s - offsetof(struct link, source));
}

static short link_events(const struct source *s)
{
	const struct link *l = link_of(s);

	if (l->state == LINK_DOWN)
		return 0;
	return (l->clogged ? 0 : POLLIN) | (l->tx_len > 0 ? POLLOUT : 0);
}

/* When link_expire() is due: now_ms(), or UINT64_MAX. */
static uint64_t link_deadline(const struct link *l)
{
	if (l->state == LINK_UP)
		return l->count == 0 || l->clogged ? UINT64_MAX : link_patience(l, l->heard);
	return l->state != LINK_DOWN || link_may_dial(l) ? l->deadline : UINT64_MAX;
}

static const char *link_expire(struct link *l)
{
	if (l->state == LINK_DOWN)
		return link_dial(l);
	if (l->state != LINK_UP)
		return "no answer";
	snprintf(l->client.reason, PROTO_REASON_MAX, "no answer for %u s",
		 l->origin->timeout_ms / 1000);
	return l->client.reason;
}

static void link_turn(struct source *s, short revents)
{
	struct link *l = link_of(s);
	size_t most = l == first_link(l->origin) ? 2 * UNSTORED_MAX : UNSTORED_MAX;
	const char *wrong = NULL;

	if (l->clogged)
		l->listening = now_ms();
	l->clogged = l->state == LINK_UP && atomic_load(&l->origin->unstored) > most;
	if (!revents && link_deadline(l) <= now_ms())
		wrong = link_expire(l);		/* unless an earlier turn has put it off */
	else if (revents && l->state == LINK_DIAL && l->found.count == 0)
		wrong = link_resolved(l);
	else if (revents & ~POLLOUT && l->state != LINK_DOWN && !l->clogged)
		wrong = link_receive(l);
	if (!wrong)
		wrong = link_send(l);
	if (wrong)
		link_fail(l, wrong);
	s->due = link_deadline(l);
}

static const struct source_ops link_ops = { link_events, link_turn };

/* The thread */

/* Sleep once, and all that is to be done before and after it. */
static void origin_turn(struct origin *o)
{
	feed_links(o);
	if (atomic_load(&o->waiting) > 0)
		o->trim = now_ms() + IDLE_MS;
	for (unsigned i = 0; i < o->links; i++)
		link_turn(&o->link[i]->source, 0);
	loop_poll(&o->loop, o->trim);
	loop_deliver(&o->loop);
	if (now_ms() >= o->trim) {
		buffer_trim();
		o->trim = UINT64_MAX;
	}
}

static void *origin_main(void *arg)
{
	struct origin *o = arg;
	struct origin_request *r;

	while (!atomic_load(&o->cancelled))
		origin_turn(o);
	close_links(o, 0);
	for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)
		while ((r = request_take(o, i)))
			request_finish(o, r, -ECANCELED);
	if (atomic_load(&o->redirecting))
		redirect_end(o, "the origin is not needed any more");
	return NULL;
}

/* Opening and closing */

/* NULL, or why not; to be freed in any case. */
static const char *origin_init(struct origin *o, unsigned connections)
{
	assert(connections < LINKS_MAX);
	pthread_mutex_init(&o->lock, NULL);
	if (loop_init(&o->loop) < 0)
		return strerror(errno);
	while (o->links <= connections) {
		struct link *l = not_null(calloc(1, sizeof(*l)));

		o->link[o->links++] = l;
		l->origin = o;
		l->source = (struct source){ .ops = &link_ops, .fd = -1, .due = UINT64_MAX };
		l->backoff = BACKOFF_MIN;
		if (!loop_add(&o->loop, &l->source))
			return strerror(ENOMEM);
	}
	return NULL;
}

struct origin *origin_open(const char *host, const char *port, const char *export_name,
			   unsigned connections, unsigned timeout_ms)
{
	struct origin *o = not_null(calloc(1, sizeof(*o)));
	const char *wrong = origin_init(o, connections);

	o->timeout_ms = timeout_ms;
	if (!wrong)
		wrong = target_set(&o->target, host, port, export_name);
	while (!wrong && !first_link(o)) {
		origin_turn(o);
		wrong = *o->reason ? o->reason : NULL;
	}
	if (!wrong)
		return o;
	log_failure("cannot reach origin %s%s%.255s: %s",
		    *o->target.address ? o->target.address : host,
		    *export_name ? ", export " : "", export_name, wrong);
	origin_close(o);
	return NULL;
}

bool origin_start(struct origin *o)
{
	int err;

	log_connected(o);
	o->started = true;
	err = thread_start(&o->thread, ORIGIN_STACK, origin_main, o);
	if (!err)
		return true;
	o->started = false;
	return log_failure("cannot start a thread: %s", strerror(err));
}

const struct proto_offer *origin_limits(const struct origin *o)
{
	return &o->limits;
}

void origin_submit(struct origin *o, struct origin_request *r)
{
	assert(r->len > 0 && r->len <= (r->extent ? PROTO_STATUS_MAX : o->limits.max_block));
	assert(r->len <= o->limits.size && r->off <= o->limits.size - r->len);
	r->buf = NULL;
	atomic_fetch_add(&o->waiting, 1);
	request_add(o, r);
}

void origin_stored(struct origin *o, uint64_t bytes)
{
	if (atomic_fetch_sub(&o->unstored, (size_t)bytes) > UNSTORED_MAX)
		loop_wake(&o->loop);
}

void origin_cancel(struct origin *o)
{
	pthread_mutex_lock(&o->lock);
	o->cancelled = true;
	pthread_mutex_unlock(&o->lock);
	loop_wake(&o->loop);
}

const char *origin_redirect(struct origin *o, const char *host, const char *port,
			    const char *export_name)
{
	const char *wrong = target_set(&o->redirect, host, port,
				       export_name ? export_name : o->target.export_name);

	if (!wrong) {
		atomic_store(&o->redirecting, true);
		loop_wake(&o->loop);
	}
	return wrong;
}

bool origin_redirected(struct origin *o, const char **error)
{
	if (atomic_load(&o->redirecting))
		return false;
	*error = o->redirect_error;
	return true;
}

void origin_status(struct origin *o, struct origin_status *status)
{
	size_t room = sizeof(status->export_name);

	pthread_mutex_lock(&o->lock);
	strcpy(status->address, o->target.address);
	strcpy(status->reason, o->reason);
	if (snprintf(status->export_name, room, "%s", o->target.export_name) >= (int)room)
		strcpy(status->export_name + room - 4, "...");
	pthread_mutex_unlock(&o->lock);
	status->fetched = atomic_load(&o->fetched);
	status->links = atomic_load(&o->up);
	status->waiting = atomic_load(&o->waiting);
}

void origin_end(struct origin *o)
{
	origin_cancel(o);
	if (o->started)
		pthread_join(o->thread, NULL);
	o->started = false;
}

void origin_close(struct origin *o)
{
	origin_end(o);
	close_links(o, 0);
	for (unsigned i = 0; i < o->links; i++)
		free(o->link[i]);
	loop_free(&o->loop);
	pthread_mutex_destroy(&o->lock);
	free(o);
}
