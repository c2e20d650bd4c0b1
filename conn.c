/*
 * conn.c - one client's connection: see conn.h.
 *
 * A turn: receive what has arrived behind what was kept, take requests from it one after the
 * other, gather their replies in the workspace's tx, send them at once, keep what is not a whole
 * request yet.  Requests that would block are in flight meanwhile and come back through
 * conn_complete().
 *
 *	CLIENT_FLAGS -> OPTION     newstyle
 *	                  |
 *	               REQUEST     oldstyle and connected ones begin here
 *	                  |
 *	              FINISHING -> LINGERING -> DEAD  and from everywhere to DEAD
 *
 * Memory is bounded: while a client does not take its replies (backlog), or has too much in
 * flight, no more requests are taken from it.  A READ of more than READ_PIECE is answered in pieces:
 * it is the stream, and nothing else is answered until its end.
 *
 * A client that closes its side is gone.  If the rest of its input ends in a DISC it has left in
 * order, and all of that is carried out.  Else it may have come back on another connection: what
 * has not begun is dropped.
 */
#define _GNU_SOURCE
#include "conn.h"

#include "backend.h"
#include "buffer.h"
#include "log.h"
#include "loop.h"
#include "stats.h"
#include "util.h"
#include "xnbd.h"

#include <assert.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
	HANDSHAKE_MS = 10 * 1000,
	FINISHING_MS = 60 * 1000,	/* for what a leaving client has asked, and does not take */
	LINGERING_MS = 1000,
	STOPPING_MS = 2500,		/* for what is in flight when the server stops */

	/*
	 * One recv() takes this much: a batch of requests, or a piece of a payload.  It goes
	 * behind what a connection kept, with as much room as is left: that of an option at
	 * least, unless whole requests are waiting there.
	 */
	RX_CHUNK = 256 * 1024,
	RX_BYTES = RX_CHUNK + PROTO_OPTION_MAX + PROTO_OPTION_SIZE,

	OPTION_DATA_MAX = PROTO_MAX_PAYLOAD,	/* an option with more is an attack */

	TURN_BYTES = 4 * 1024 * 1024,	/* of replies and payloads; then it is another one's turn */
	STEP_COST = 4096,		/* bytes that a request counts for besides */

	TX_IOVS = 1024,			/* IOV_MAX of every system that we know */
	TX_BYTES = 516 * 1024,		/* two pieces of READs, with their headers */

	IN_FLIGHT_MAX = 512,
	BUFFERED_MAX = 2 * 1024 * 1024,	/* one more piece may pass it */

	HEARD_US = 50,			/* after this long a client may be gone, and back elsewhere */

	/* Replies are sent when there is less room than one step may need; a READ looks for itself. */
	STEP_BYTES = 32 * 1024 + PROTO_REPLY_ROOM,
	READ_BYTES = READ_PIECE + PROTO_REPLY_ROOM,
	ENCODE_IOVS = 512,
	PIECE_RUNS = 64,		/* of data and holes, each with a header */
};

#ifndef POLLRDHUP
#define POLLRDHUP 0	/* then the end of a client is seen when all before it has been received */
#endif

_Static_assert(STEP_BYTES >= (int)PROTO_OPTION_REPLY_ROOM, "an answer to an option fits");
_Static_assert(STEP_BYTES >= PROTO_REPLY_ROOM + (int)EXTENTS_MAX * PROTO_EXTENDED_EXTENT_SIZE,
	       "so do extents");
_Static_assert(TX_BYTES >= (int)READ_BYTES, "so does a piece of a READ");
_Static_assert(RX_CHUNK >= (int)BLOCK_SIZE + PROTO_EXTENDED_REQUEST_SIZE,
	       "a block can be kept");

/* Replies on their way out */

/*
 * What is to be sent: bytes of its own, and references to memory of others, in order.
 * Only the part of it that was used is ever touched, so that an idle one costs address space only.
 */
struct tx {
	struct request *held;		/* own the memory referred to; freed when all is sent */
	unsigned first, iovs;		/* iov[first] to iov[iovs - 1] are not sent yet */
	size_t size;			/* of this memory, in bytes */
	size_t used;			/* of bytes */
	struct iovec iov[TX_IOVS];
	uint8_t bytes[TX_BYTES];	/* of tx_rest(): as many as there are */
};

enum tx_result { TX_SENT, TX_MORE, TX_DEAD };

/* Forget what is in it.  The caller has taken care of held. */
static void tx_reset(struct tx *tx)
{
	assert(!tx->held);
	tx->first = tx->iovs = 0;
	tx->used = 0;
}

/* In memory of that size, or NULL. */
static struct tx *tx_init(struct tx *tx, size_t size)
{
	if (tx) {
		tx->size = size;
		tx->held = NULL;
		tx_reset(tx);
	}
	return tx;
}

/* With room for so many bytes of its own; NULL if out of memory. */
static struct tx *tx_new(size_t bytes)
{
	size_t size = offsetof(struct tx, bytes) + bytes;

	return tx_init(buffer_get(size), size);
}

static void tx_free(struct tx *tx)
{
	if (tx)
		buffer_put(tx, tx->size);
}

/* Where the next bytes go; write there, then tx_add() them. */
static uint8_t *tx_tail(struct tx *tx)
{
	return tx->bytes + tx->used;
}

/* Add memory that stays valid until it is sent. */
static void tx_refer(struct tx *tx, const void *p, size_t len)
{
	struct iovec *last = tx->iovs > 0 ? &tx->iov[tx->iovs - 1] : NULL;

	if (len == 0)
		return;
	if (last && (const uint8_t *)last->iov_base + last->iov_len == p) {
		last->iov_len += len;
		return;
	}
	assert(tx->iovs < TX_IOVS);
	tx->iov[tx->iovs].iov_base = (void *)(uintptr_t)p;
	tx->iov[tx->iovs].iov_len = len;
	tx->iovs++;
}

/* What was written at tx_tail(), up to end. */
static void tx_add(struct tx *tx, const uint8_t *end)
{
	size_t len = (size_t)(end - tx_tail(tx));

	assert(len <= TX_BYTES - tx->used);
	tx_refer(tx, tx_tail(tx), len);
	tx->used += len;
}

static bool is_own(const struct tx *tx, const struct iovec *v)
{
	const uint8_t *p = v->iov_base;

	return p >= tx->bytes && p < tx->bytes + tx->used;
}

/*
 * What is not sent yet, in memory of just that size; nothing is in tx any more.  NULL if out of
 * memory.
 */
static struct tx *tx_rest(struct tx *tx)
{
	size_t own = 0;
	struct tx *rest;

	for (unsigned i = tx->first; i < tx->iovs; i++)
		own += is_own(tx, &tx->iov[i]) ? tx->iov[i].iov_len : 0;
	rest = tx_new(own);
	if (!rest)
		return NULL;
	for (unsigned i = tx->first; i < tx->iovs; i++) {
		struct iovec v = tx->iov[i];

		if (is_own(tx, &v)) {
			v.iov_base = memcpy(tx_tail(rest), v.iov_base, v.iov_len);
			rest->used += v.iov_len;
		}
		tx_refer(rest, v.iov_base, v.iov_len);
	}
	rest->held = tx->held;
	tx->held = NULL;
	tx_reset(tx);
	return rest;
}

/* Take n sent bytes off the front. */
static void consume(struct tx *tx, size_t n)
{
	while (tx->first < tx->iovs && n >= tx->iov[tx->first].iov_len)
		n -= tx->iov[tx->first++].iov_len;
	if (n > 0) {
		tx->iov[tx->first].iov_base = (uint8_t *)tx->iov[tx->first].iov_base + n;
		tx->iov[tx->first].iov_len -= n;
	}
}

/* Send as much as the socket, which does not block, takes. */
static enum tx_result tx_send(struct tx *tx, int fd)
{
	while (tx->first < tx->iovs) {
		struct msghdr msg = { .msg_iov = tx->iov + tx->first,
				      .msg_iovlen = tx->iovs - tx->first };
		ssize_t n = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n >= 0) {
			consume(tx, (size_t)n);
			if (tx->first < tx->iovs)	/* there is no more room */
				return TX_MORE;
		} else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
			return TX_MORE;
		} else if (errno != EINTR) {
			return TX_DEAD;
		}
	}
	return TX_SENT;
}

/* Workspaces */

bool workspace_init(struct workspace *w, struct loop *loop)
{
	/* Not of buffer_get(): it would leave less room to those that come and go. */
	struct tx *tx = malloc(sizeof(*tx));

	*w = (struct workspace){ .loop = loop, .rx = malloc(RX_BYTES) };
	w->tx = tx_init(tx, sizeof(*tx));
	return w->tx && w->rx;
}

void workspace_free(struct workspace *w)
{
	free(w->spare);
	free(w->rx);
	free(w->tx);
}

/* Life and death */

struct conn *conn_new(int fd, enum greeting greeting, const struct proto_exports *exports,
		      const char *peer, unsigned keepalive)
{
	struct conn *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->source.fd = fd;
	c->greeting = greeting;
	c->exports = exports;
	c->back_end = &c->back;
	c->piece_end = &c->piece;
	strncpy(c->peer, peer, sizeof(c->peer) - 1);
	tune_socket(fd, keepalive);
	return c;
}

/*
 * Whether a client has enough: all of its own, or more than twice of what is left to others.  One
 * that has nothing may go over the bound: others may hold what they have for ever.
 */
static bool is_enough(size_t own, size_t own_max, const atomic_size_t *total, size_t max)
{
	size_t now = atomic_load(total), room = now < max ? max - now : 0;

	return own > 0 && (own >= own_max || room == 0 || own / 2 > room);
}

/* Whether no more data may be on its way for that client. */
static bool has_data_enough(const struct conn *c)
{
	return is_enough(c->buffered, BUFFERED_MAX, &load.bytes, load.bytes_max);
}

/* Count down; there may be room again for those who had too little. */
static void unload(atomic_size_t *total, size_t n, size_t max)
{
	size_t before = atomic_fetch_sub(total, n), after = before - n;

	if ((before >= max / 2 && after < max / 2) || (before >= max && after < max))
		load.room();
}

/* Data that a request needs, or will: a connection has a bound for it, whoever waits for what. */
static void charge(struct conn *c, struct request *r)
{
	if (r->counted > 0 || r->h.cmd > NBD_CMD_WRITE)
		return;
	r->counted = r->h.len < READ_PIECE ? r->h.len : READ_PIECE;	/* more is done in pieces */
	c->buffered += r->counted;
}

/* It is with others no more, nor will be: what it waits for now, if anything, is its client. */
static void take_home(struct conn *c, struct request *r)
{
	if (!r->lent)
		return;
	r->lent = false;
	stats_in_flight(c->stats, --c->in_flight);
	unload(&load.requests, 1, load.requests_max);
}

static void free_request(struct conn *c, struct request *r)
{
	take_home(c, r);
	c->buffered -= r->counted;
	if (r->buf_len > 0) {
		buffer_put(r->buf, r->buf_len);
		unload(&load.bytes, r->buf_len, load.bytes_max);
	}
	if (r->change.order)
		order_remove(&r->change);
	if (r->extent)
		free(r->extent);
	if (c->workspace->spare)
		free(r);
	else
		c->workspace->spare = r;
}

static void free_requests(struct conn *c, struct request **list)
{
	struct request *r;

	while ((r = *list)) {
		*list = r->next;
		free_request(c, r);
	}
}

/* Keep what is not taken yet, behind what is kept already.  False if out of memory. */
static bool keep(struct conn *c, const uint8_t *p, size_t len)
{
	uint8_t *kept;

	if (len == 0)
		return true;
	kept = realloc(c->kept, c->kept_len + len);
	if (!kept)
		return false;
	memcpy(kept + c->kept_len, p, len);
	c->kept = kept;
	c->kept_len += len;
	return true;
}

/* One that uses the whole request less.  It is freed with the last of them, if its client is gone. */
static bool release_whole(struct conn *c, struct request *whole)
{
	if (--whole->pieces > 0)
		return false;
	if (c->state != CONN_DEAD)
		return true;
	free_request(c, whole);
	return false;
}

/* What will not be finished; pieces of it may still be under way, and come back by themselves. */
static void abandon(struct conn *c, struct request **whole)
{
	struct request *r = *whole;

	*whole = NULL;
	if (r)
		release_whole(c, r);
}

/* Pieces of a stream that are with others come back by themselves. */
static void drop_pieces(struct conn *c)
{
	struct request *next;

	for (struct request *r = c->piece; r; r = next) {
		next = r->next;
		if (!r->lent)
			free_request(c, r);
	}
	c->piece = NULL;
	c->piece_end = &c->piece;
}

static void conn_complete(struct conn *c, struct request *r);

/* Give back what has not begun; the rest comes back by itself. */
static void take_all_back(struct conn *c)
{
	struct request *next;

	for (struct request *r = c->out; r; r = next) {
		next = r->sibling;
		if (request_take_back(r))
			conn_complete(c, r);
	}
}

void conn_kill(struct conn *c, const char *why)
{
	char did[STATS_LINE] = "";

	c->deadline = 0;
	if (c->state == CONN_DEAD)
		return;
	if (c->stats)
		stats_end(c->stats, did);
	log_peer(LOG_EVENT, "%s: disconnected: %s%s%s", c->peer, why, *did ? "; " : "", did);
	if (c->export)
		atomic_fetch_sub(&c->export->backend->order->clients, 1);
	atomic_store(&c->dead, true);	/* before the client can know, and come back */
	close(c->source.fd);
	c->source.fd = -1;
	c->state = CONN_DEAD;
	drop_pieces(c);
	abandon(c, &c->stream);
	abandon(c, &c->current);
	free_requests(c, &c->back);
	free(c->kept);
	c->kept = NULL;
	c->kept_len = 0;
	if (c->backlog) {
		free_requests(c, &c->backlog->held);
		tx_free(c->backlog);
		c->backlog = NULL;
	}
	take_all_back(c);
}

bool conn_is_over(const struct conn *c)
{
	return c->state == CONN_DEAD && c->in_flight == 0;
}

void conn_free(struct conn *c)
{
	assert(conn_is_over(c) && c->buffered == 0);
	free(c->stats);
	free(c);
}

static void set_deadline(struct conn *c, unsigned ms)
{
	uint64_t deadline = now_ms() + ms;

	if (c->deadline == 0 || deadline < c->deadline)
		c->deadline = deadline;
}

/* Its deadline has passed. */
static void conn_expire(struct conn *c)
{
	if (c->state == CONN_LINGERING)
		conn_kill(c, c->end);
	else if (c->stopping)
		conn_kill(c, "server stops");
	else if (c->state < CONN_REQUEST)
		conn_kill(c, "handshake took too long");
	else
		conn_kill(c, c->in_flight ? "its requests take too long" : "replies were not taken");
}

/* Take no more requests; end when what is in flight is answered. */
static void finish(struct conn *c, const char *why)
{
	c->state = CONN_FINISHING;
	c->blocked = false;
	c->end = why;
	if (!c->stopping)
		c->deadline = 0;
	set_deadline(c, FINISHING_MS);
}

/* Whether a close would throw away replies that are on their way, since there is input. */
static bool has_unsent(const struct conn *c)
{
	int out = 0, in = 0;

	return ioctl(c->source.fd, TIOCOUTQ, &out) < 0 || out > 0 ||
	       ioctl(c->source.fd, FIONREAD, &in) < 0 || in > 0;
}

/* The last step of an orderly end: nothing is in flight, and everything is sent. */
static void close_orderly(struct conn *c)
{
	if (c->export && (c->gone || !has_unsent(c))) {
		conn_kill(c, c->end);
		return;
	}
	/* To close with input unread would make TCP throw away replies that are on their way. */
	shutdown(c->source.fd, SHUT_WR);
	c->state = CONN_LINGERING;
	c->deadline = 0;
	set_deadline(c, LINGERING_MS);
}

/* Sending */

/*
 * The client takes no replies any more, and gets none, since a part of one is missing.  What it has
 * sent may still end in order.
 */
static void lose(struct conn *c, const char *why)
{
	shutdown(c->source.fd, SHUT_WR);
	if (c->state == CONN_REQUEST) {
		c->gone = true;
		c->end = why;
	} else if (c->state != CONN_FINISHING) {
		conn_kill(c, why);
	}
}

/*
 * Send the backlog, or what the workspace's tx holds.  What the client does not take is the backlog.
 * False if there is one, or the connection is dead.
 */
static bool conn_flush(struct conn *c)
{
	struct tx *tx = c->backlog ? c->backlog : c->workspace->tx;
	enum tx_result result = c->state == CONN_DEAD ? TX_SENT : tx_send(tx, c->source.fd);

	if (result == TX_MORE && !c->backlog)
		c->backlog = tx_rest(tx);
	if (result == TX_MORE && c->backlog)
		return false;
	free_requests(c, &tx->held);
	if (c->backlog) {
		tx_free(c->backlog);
		c->backlog = NULL;
	} else {
		tx_reset(tx);
	}
	if (result == TX_DEAD)
		lose(c, "cannot send");
	else if (result == TX_MORE)
		conn_kill(c, "out of memory");
	return c->state != CONN_DEAD;
}

/* Make room for bytes, and for iovs references to memory.  False if the client has to take replies first. */
static bool make_room(struct conn *c, size_t bytes, unsigned iovs)
{
	const struct tx *tx = c->workspace->tx;

	if (c->backlog)
		return false;
	return (TX_BYTES - tx->used >= bytes && TX_IOVS - tx->iovs >= iovs) || conn_flush(c);
}

/* Replies */

/*
 * The data of a READ, or of its piece r, that is in r->buf, which is held until it is sent.  Where
 * the reply has no chunks for holes they are zeros, which r->buf does not have yet.
 */
static void put_read_data(struct conn *c, const struct request *whole, struct request *r)
{
	const struct extent all = { r->h.len, 0 };
	const struct extent *e = r->extents ? r->extent : &all;
	const struct extent *end = e + (r->extents ? r->extents : 1);
	struct tx *tx = c->workspace->tx;
	bool chunks = proto_in_chunks(&c->session, &whole->h);
	uint64_t pos = 0;

	for (; e < end; pos += e->len, e++) {
		tx_add(tx, proto_put_run(&c->session, &whole->h, r->h.off + pos, e, tx_tail(tx)));
		if (e->flags & NBD_STATE_ZERO && !chunks)
			memset(r->buf + pos, 0, e->len);
		if (!(e->flags & NBD_STATE_ZERO) || !chunks)
			tx_refer(tx, r->buf + pos, e->len);
	}
	r->next = tx->held;
	tx->held = r;
}

/*
 * Write the reply to a request that is done; tx has STEP_BYTES and ENCODE_IOVS of room.  The
 * request is freed, or held until its data is sent.
 */
static void put_reply(struct conn *c, struct request *r)
{
	struct tx *tx = c->workspace->tx;

	if (r->error == ECANCELED) {	/* the server stops, and the origin did not answer in time */
		free_request(c, r);
		return;
	}
	stats_count(c->stats, &r->h, r->error, r->begun);
	if (r->error)
		stats_complain(c->stats, c->peer, r);
	if (r->error || (r->h.cmd != NBD_CMD_READ && r->h.cmd != NBD_CMD_BLOCK_STATUS) ||
	    r->h.len == 0) {
		tx_add(tx, proto_put_reply(&c->session, &r->h, r->error, tx_tail(tx)));
		free_request(c, r);
	} else if (r->h.cmd == NBD_CMD_BLOCK_STATUS) {
		tx_add(tx, proto_put_status(&c->session, &r->h, r->extent, r->extents, tx_tail(tx)));
		free_request(c, r);
	} else {
		put_read_data(c, r, r);
	}
}

static void append(struct request ***end, struct request *r)
{
	r->next = NULL;
	**end = r;
	*end = &r->next;
}

static struct request *take_first(struct request **list, struct request ***end)
{
	struct request *r = *list;

	*list = r->next;
	if (!*list)
		*end = list;
	return r;
}

/* Requests in flight */

/* A request, or a piece of one, is with others until conn_complete(). */
static void lend(struct conn *c, struct request *r)
{
	r->sibling = c->out;
	r->back = &c->out;
	if (c->out)
		c->out->back = &r->sibling;
	c->out = r;
	if (r->lent)
		return;
	r->lent = true;
	stats_in_flight(c->stats, ++c->in_flight);
	atomic_fetch_add(&load.requests, 1);
}

/* Others have to do it: a worker, or whoever brings what it needs. */
static void queue(struct conn *c, struct request *r)
{
	charge(c, r);
	/* This thread will free it: so it takes it. */
	if (r->h.cmd == NBD_CMD_READ && !r->absent)
		request_buffer(r);
	lend(c, r);
	request_queue(r);
}

/* All of a WRITE is stored, if there was anything to store. */
static int commit_write(struct request *r)
{
	return r->error ? -r->error : request_commit(r);
}

/*
 * A request, or a piece of one, is done with that outcome, or it is PENDING.  A piece of a READ stays
 * in the stream's list until its turn comes.
 */
static void conn_settle(struct conn *c, struct request *r, int ret)
{
	struct request *whole = r->whole;

	if (ret == PENDING) {
		lend(c, r);
		return;
	}
	r->error = -ret;
	take_home(c, r);
	if (whole) {
		if (!whole->error)
			whole->error = r->error;
		if (r->h.cmd != NBD_CMD_READ || c->state == CONN_DEAD)
			free_request(c, r);
		if (release_whole(c, whole))
			conn_settle(c, whole, commit_write(whole));
	} else if (c->state == CONN_DEAD) {
		free_request(c, r);
	} else {
		append(&c->back_end, r);
	}
}

static void conn_complete(struct conn *c, struct request *r)
{
	*r->back = r->sibling;
	if (r->sibling)
		r->sibling->back = r->back;
	if (!r->again || c->state == CONN_DEAD) {
		conn_settle(c, r, -r->error);
	} else if (r->whole && r->h.cmd == NBD_CMD_READ) {
		r->again = false;	/* the stream waits for it */
		queue(c, r);
	} else {
		append(&c->back_end, r);
	}
}

static void take_back_mail(struct mail *m)
{
	struct request *r = (struct request *)((char *)m - offsetof(struct request, mail));

	r->conn->source.due = 0;
	conn_complete(r->conn, r);
}

/* The done function of requests.  Any thread. */
static void come_back(struct request *r)
{
	loop_post(r->conn->workspace->loop, &r->mail);
}

/*
 * Steps: each takes some of the n bytes at p and returns how many, 0 if it needs more.
 */

static void conn_enter_transmission(struct conn *c)
{
	const struct proto_export *e = c->session.export;

	c->stats = calloc(1, sizeof(*c->stats));
	if (!c->stats) {
		conn_kill(c, "out of memory");
		return;
	}
	stats_begin(c->stats, c->peer);
	c->export = (struct export *)((char *)(uintptr_t)e - offsetof(struct export, proto));
	atomic_fetch_add(&c->export->backend->order->clients, 1);
	c->state = CONN_REQUEST;
	if (!c->stopping)
		c->deadline = 0;
	log_peer(LOG_EVENT, "%s: connected%s%s", c->peer, *e->name ? " to " : "", e->name);
	log_peer(LOG_DETAIL, "%s: export '%s' of %llu bytes, flags 0x%x%s%s", c->peer, e->name,
		 (unsigned long long)e->size, e->flags,
		 c->session.extended   ? ", extended headers" :
		 c->session.structured ? ", structured replies" :
					 "",
		 c->session.allocation ? ", base:allocation" : "");
}

static size_t step_client_flags(struct conn *c, const uint8_t *p, size_t n)
{
	if (n < PROTO_CLIENT_FLAGS_SIZE)
		return 0;
	if (!proto_client_flags(&c->session, p))
		conn_kill(c, "unknown client flags");
	else
		c->state = CONN_OPTION;
	return PROTO_CLIENT_FLAGS_SIZE;
}

static void answer_option(struct conn *c, uint32_t opt, const uint8_t *data, uint32_t len)
{
	struct proto_out out = { .p = tx_tail(c->workspace->tx), .cap = PROTO_OPTION_REPLY_ROOM };
	enum proto_next next = proto_option(&c->session, c->exports, opt, data, len, &out);

	if (out.unknown)
		log_peer(LOG_ERROR, "%s: refused: there is no export '%.*s'", c->peer,
			 (int)out.unknown_len, (const char *)out.unknown);
	tx_add(c->workspace->tx, out.p + out.len);
	if (next == PROTO_TRANSMIT)
		conn_enter_transmission(c);
	else if (next == PROTO_CLOSE)
		finish(c, "handshake ended");
}

static size_t step_option(struct conn *c, const uint8_t *p, size_t n)
{
	uint32_t opt, len;

	if (c->skip > 0) {
		n = n < c->skip ? n : c->skip;
		c->skip -= (uint32_t)n;
		if (c->skip == 0)	/* the answer is the same for all that are too large */
			answer_option(c, c->skipped, NULL, PROTO_OPTION_MAX + 1);
		return n;
	}
	if (n < PROTO_OPTION_SIZE)
		return 0;
	if (!proto_get_option(p, &opt, &len)) {
		conn_kill(c, "wrong magic of an option");
		return n;
	}
	if (len > OPTION_DATA_MAX) {
		conn_kill(c, "option with too much data");
		return n;
	}
	if (len > PROTO_OPTION_MAX) {
		c->skipped = opt;
		c->skip = len;
		return PROTO_OPTION_SIZE;
	}
	if (n < PROTO_OPTION_SIZE + len)
		return 0;
	answer_option(c, opt, p + PROTO_OPTION_SIZE, len);
	return PROTO_OPTION_SIZE + len;
}

static struct request *new_request(struct conn *c, const struct proto_request *h)
{
	struct request *r = c->workspace->spare ? c->workspace->spare : malloc(sizeof(*r));

	c->workspace->spare = NULL;
	if (r) {
		memset(r, 0, sizeof(*r));
		r->conn = c;
		r->job.lane = &c->export->lane;
		r->backend = c->export->backend;
		r->abandoned = &c->dead;
		r->done = come_back;
		r->mail.deliver = take_back_mail;
		r->h = *h;
		r->at = (struct span){ h->off, h->len };
		r->begun = stats_time(c->stats);
	}
	return r;
}

/* Take note of what has been done in this turn. */
static void spend(struct conn *c, size_t bytes)
{
	c->spent += bytes;
	c->tired = c->spent >= TURN_BYTES;
}

/*
 * A READ, or a piece of it, straight into the reply, behind its header, if that is possible without
 * blocking: see backend_try_read().  There is room.
 */
static int read_copied(struct conn *c, const struct proto_request *h, uint64_t len, uint64_t off)
{
	struct tx *tx = c->workspace->tx;
	const struct extent run = { len, 0 };
	uint8_t *data = proto_put_run(&c->session, h, off, &run, tx_tail(tx));
	int ret = backend_try_read(c->export->backend, data, len, off);

	if (ret == 0) {
		tx_add(tx, data + len);
		spend(c, len);
	}
	return ret;
}

/* Whether a try has found out no more than that others have to do it. */
static bool is_undecided(int ret)
{
	return ret == -EAGAIN || ret == ABSENT;
}

/*
 * read_copied() did not read what r asks for, and returned that.  While it waits for others it has no
 * memory for its data: that is got when the data is there.
 */
static void read_later(struct conn *c, struct request *r, int ret)
{
	r->absent = ret == ABSENT;
	if (is_undecided(ret))
		queue(c, r);
	else
		conn_settle(c, r, ret);
}

/* A READ that has come back to be carried out, or is a long one. */
static void start_read(struct conn *c, struct request *r)
{
	bool is_long = r->h.len > READ_PIECE;
	int ret = is_long ? request_try(r) : read_copied(c, &r->h, r->h.len, r->h.off);

	if (ret != 0) {
		read_later(c, r, is_long && r->absent ? ABSENT : ret);
	} else if (is_long) {
		take_home(c, r);
		r->at = (struct span){ r->h.off, r->h.len };
		r->pieces = 1;
		c->stream = r;
	} else {
		stats_count(c->stats, &r->h, 0, r->begun);
		free_request(c, r);
	}
}

/* Carry out a request, also a piece of a WRITE, that has all that it needs; there is room. */
static void start_request(struct conn *c, struct request *r)
{
	int ret;

	if (r->h.len == 0 && r->h.cmd != NBD_CMD_FLUSH) {
		conn_settle(c, r, commit_write(r));
		return;
	}
	if (r->h.cmd == NBD_CMD_READ) {
		start_read(c, r);
		return;
	}
	ret = request_try(r);
	if (ret == -EAGAIN)
		queue(c, r);
	else
		conn_settle(c, r, ret);
}

/* Room for the reply to a request: a READ is read into it. */
static size_t reply_bytes(const struct proto_request *h)
{
	return h->cmd == NBD_CMD_READ && h->len <= READ_PIECE ? h->len + PROTO_REPLY_ROOM : STEP_BYTES;
}

/*
 * Whether the client is still there, as far as can be known before its next change is taken.  It
 * matters where another connection can bring what this one owed.
 */
static bool is_there(struct conn *c)
{
	struct pollfd p = { .fd = c->source.fd, .events = POLLRDHUP };
	uint64_t now;

	if (c->gone)
		return c->orderly;
	if (atomic_load(&c->export->backend->order->clients) == 1)
		return true;
	now = now_us();
	if (now - c->heard < HEARD_US || now - c->workspace->loop->polled < HEARD_US)
		return true;
	c->heard = now;
	c->gone = poll(&p, 1, 0) > 0;
	return !c->gone;
}

/* Whether a READ is answered as a whole, straight from the image if that is possible. */
static bool is_short_read(const struct proto_request *h)
{
	return h->cmd == NBD_CMD_READ && h->len > 0 && h->len <= READ_PIECE;
}

/* A WRITE whose payload is here, as most are; its reply has room. */
static int write_at_once(struct conn *c, const struct proto_request *h, const uint8_t *payload)
{
	struct tx *tx = c->workspace->tx;
	int ret = -EAGAIN;

	if (is_there(c))
		ret = backend_try_write(c->export->backend, payload, h->len, h->off);
	if (ret == 0)
		tx_add(tx, proto_put_reply(&c->session, h, 0, tx_tail(tx)));
	return ret;
}

/*
 * Carry out and answer what needs neither a request nor to block; n bytes of the payload are here: 0
 * or -errno.  -EAGAIN and ABSENT are those of read_copied() and backend_try_write(): then a request is
 * needed.
 */
static int do_at_once(struct conn *c, const struct proto_request *h, const uint8_t *payload,
		      size_t n)
{
	uint64_t begun = stats_time(c->stats);
	int ret = -EAGAIN;

	if (is_short_read(h))
		ret = read_copied(c, h, h->len, h->off);
	else if (h->cmd == NBD_CMD_WRITE && h->len > 0 && h->len <= n && !(h->flags & NBD_CMD_FLAG_FUA))
		ret = write_at_once(c, h, payload);
	if (ret == 0)
		stats_count(c->stats, h, 0, begun);
	return ret;
}

/*
 * Make a request of a command that do_at_once() did not do, and returned that; or that was refused,
 * and then it is -errno, too.
 */
static void take_request(struct conn *c, const struct proto_request *h, bool refused, int ret)
{
	struct request *r = new_request(c, h);

	if (!r) {
		conn_kill(c, "out of memory");
		return;
	}
	r->error = is_undecided(ret) ? 0 : -ret;
	r->refused = refused;
	if (h->payload && h->len > 0) {	/* also of what has failed */
		r->pieces = 1;
		c->current = r;
	} else if (r->error) {
		conn_settle(c, r, ret);
	} else if (is_short_read(h)) {
		read_later(c, r, ret);
	} else {
		start_request(c, r);
	}
}

static size_t step_request(struct conn *c, const uint8_t *p, size_t n)
{
	struct proto_request h;
	size_t size;
	int error, ret;
	const char *wrong = proto_get_request(&c->session, p, n, &h, &size);

	if (wrong) {
		conn_kill(c, wrong);
		return n;
	}
	if (size == 0)
		return 0;
	if (h.cmd == NBD_CMD_DISC) {
		finish(c, "client left");
		return n;
	}
	if (!make_room(c, reply_bytes(&h), 1) || (proto_cmd_writes(h.cmd) && !h.payload && !is_there(c))) {
		c->blocked = true;
		return 0;
	}
	error = proto_check_request(&c->session, &h);
	ret = error ? -error : do_at_once(c, &h, p + size, n - size);
	if (ret == 0)
		return size + (h.payload ? h.len : 0);
	take_request(c, &h, error != 0, ret);
	return size;
}

static void advance(struct span *s, uint64_t len)
{
	s->off += len;
	s->len -= len;
}

/* A part of a request, the next len bytes.  Without memory for it that is the outcome of the request. */
static struct request *new_piece(struct conn *c, struct request *whole, uint64_t len)
{
	const struct proto_request h = { .cmd = whole->h.cmd, .off = whole->at.off, .len = len };
	struct request *piece = new_request(c, &h);

	if (piece) {
		piece->whole = whole;
		whole->pieces++;
	} else {
		whole->error = ENOMEM;
	}
	return piece;
}

/* Store a piece, or all, of a payload.  What is not done at once is done from a copy. */
static void store_payload(struct conn *c, struct request *r, const uint8_t *p)
{
	int ret;

	r->buf = (uint8_t *)(uintptr_t)p;
	ret = request_try(r);
	if (ret == -EAGAIN) {
		r->buf = NULL;
		if (request_buffer(r)) {
			memcpy(r->buf, p, r->h.len);
			queue(c, r);
			return;
		}
		ret = -ENOMEM;
	}
	conn_settle(c, r, ret);
}

/*
 * How much of a payload of which n bytes are here to store now.  Pieces end at block boundaries,
 * so that no block is stored by halves when a client dies.
 */
static size_t piece_size(const struct conn *c, size_t n)
{
	const struct request *r = c->current;
	size_t tail = (r->at.off + n) % BLOCK_SIZE;

	if (n >= r->at.len)
		return r->at.len;
	if (r->error)
		return n;
	return n > tail ? n - tail : 0;
}

static size_t step_payload(struct conn *c, const uint8_t *p, size_t n)
{
	struct request *r = c->current;

	n = piece_size(c, n);
	if (n == 0)
		return 0;
	if (!is_there(c)) {
		c->blocked = true;
		return 0;
	}
	if (n == r->h.len && !r->error) {
		c->current = NULL;
		store_payload(c, r, p);
		return n;
	}
	if (!r->error) {
		struct request *piece = new_piece(c, r, n);

		if (piece)
			store_payload(c, piece, p);
	}
	advance(&r->at, n);
	if (r->at.len > 0)
		return n;
	c->current = NULL;
	if (release_whole(c, r))
		conn_settle(c, r, commit_write(r));
	return n;
}

/* READs in pieces */

static uint64_t piece_length(const struct request *stream)
{
	return stream->at.len < READ_PIECE ? stream->at.len : READ_PIECE;
}

/* The next piece, at the end of the stream's list; NULL without memory. */
static struct request *add_piece(struct conn *c)
{
	struct request *r = c->stream;
	uint64_t len = piece_length(r);
	struct request *piece = new_piece(c, r, len);

	if (piece) {
		advance(&r->at, len);
		append(&c->piece_end, piece);
	}
	return piece;
}

/* Let others read some pieces more, while the first of them is waited for. */
static void read_ahead(struct conn *c)
{
	while (c->stream->at.len > 0 && !has_data_enough(c)) {
		struct request *piece = add_piece(c);

		if (!piece)
			return;
		queue(c, piece);
	}
}

/* The stream is over, or as good as over: there was an error. */
static void end_stream(struct conn *c)
{
	struct request *r = c->stream;
	uint64_t next = c->piece ? c->piece->h.off : r->at.off;

	drop_pieces(c);
	c->stream = NULL;
	if (!r->error) {
		stats_count(c->stats, &r->h, r->error, r->begun);
		free_request(c, r);
	} else if (next == r->h.off || proto_in_chunks(&c->session, &r->h)) {
		append(&c->back_end, r);
	} else {
		if (r->error != ECANCELED)
			stats_complain(c->stats, c->peer, r);
		free_request(c, r);
		conn_kill(c, "a READ failed after a part of its data had been sent");
	}
}

/* The next piece, which was read by others, or can be at once.  False if that has to wait. */
static bool put_piece(struct conn *c)
{
	struct request *piece = c->piece, *r = c->stream;
	uint64_t len;
	int ret;

	if (piece && piece->lent) {
		read_ahead(c);
		return false;
	}
	if (piece) {
		take_first(&c->piece, &c->piece_end);
		put_read_data(c, r, piece);
		return true;
	}
	/* What has been read is taken first, and is no more. */
	if (has_data_enough(c) && !conn_flush(c))
		return false;
	len = piece_length(r);
	ret = read_copied(c, &r->h, len, r->at.off);
	if (ret == 0)
		advance(&r->at, len);
	else if ((piece = add_piece(c)))
		read_later(c, piece, ret);
	return true;
}

static void go_on_with_stream(struct conn *c)
{
	while (c->stream && !c->tired) {
		if (c->stream->error || (c->stream->at.len == 0 && !c->piece)) {
			if (c->stream->pieces > 1)
				return;
			end_stream(c);
		} else if (!make_room(c, READ_BYTES + PIECE_RUNS * PROTO_REPLY_ROOM, ENCODE_IOVS) ||
			   !put_piece(c)) {
			return;
		}
	}
}

/* Input */

/* Whether no more may be in flight.  Who is gone has sent all that it ever will. */
static bool is_full(const struct conn *c)
{
	return !c->gone &&
	       (is_enough(c->in_flight, IN_FLIGHT_MAX, &load.requests, load.requests_max) ||
		has_data_enough(c));
}

static size_t conn_step(struct conn *c, const uint8_t *p, size_t n)
{
	switch (c->state) {
	case CONN_CLIENT_FLAGS:
		return step_client_flags(c, p, n);
	case CONN_OPTION:
		return step_option(c, p, n);
	case CONN_REQUEST:
		return c->current ? step_payload(c, p, n) : step_request(c, p, n);
	default:
		return n;	/* nothing is taken from it any more */
	}
}

/*
 * What has come back goes on, as long as the client takes replies: the stream first, then requests that
 * are answered, or carried out again.
 */
static void go_on(struct conn *c)
{
	if (c->back)
		stats_time(c->stats);
	for (;;) {
		struct request *r;

		if (c->stream)
			go_on_with_stream(c);
		r = c->back;
		if (!r || c->stream || !make_room(c, reply_bytes(&r->h), ENCODE_IOVS) ||
		    (r->again && c->tired))
			return;
		take_first(&c->back, &c->back_end);
		if (r->again) {
			r->again = false;
			start_request(c, r);
		} else {
			put_reply(c, r);
		}
	}
}

/* Take steps until there is not enough input, or no room.  Returns the bytes taken. */
static size_t take_steps(struct conn *c, const uint8_t *p, size_t n)
{
	size_t pos = 0, taken;

	c->blocked = false;
	while (pos < n) {
		if (c->tired || c->stream || is_full(c) || !make_room(c, STEP_BYTES, 1)) {
			c->blocked = true;
			break;
		}
		taken = conn_step(c, p + pos, n - pos);
		spend(c, taken + STEP_COST);
		if (c->stream || c->back)
			go_on(c);
		if (taken == 0)
			break;
		pos += taken;
	}
	return pos;
}

/* Whether what is kept has a DISC behind requests that are whole. */
static bool has_disc(const struct conn *c)
{
	uint64_t pos = c->current ? c->current->at.len : 0;
	struct proto_request h;
	size_t size;

	while (pos < c->kept_len) {
		if (proto_get_request(&c->session, c->kept + pos, c->kept_len - pos, &h, &size) ||
		    size == 0)
			return false;
		if (h.cmd == NBD_CMD_DISC)
			return true;
		pos += size + (h.payload ? h.len : 0);
	}
	return false;
}

/* Receive up to room bytes at p.  Returns how many; 0 if there are none, or the client is gone. */
static size_t conn_receive(struct conn *c, uint8_t *p, size_t room)
{
	ssize_t n;

	if (room == 0)		/* all is kept that can be */
		return 0;
	do
		n = recv(c->source.fd, p, room, MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n > 0) {
		c->lively = true;
		return (size_t)n;
	}
	if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
		return 0;
	c->gone = true;
	if (n < 0 && !c->end)
		c->end = strerror(errno);
	if (c->state != CONN_REQUEST)
		conn_kill(c, c->end ? c->end : "client left during the handshake");
	return 0;
}

/* Receive all that there is of a client that is gone.  False if out of memory. */
static bool receive_rest(struct conn *c)
{
	size_t n;

	while ((n = conn_receive(c, c->workspace->rx, RX_CHUNK)) > 0)
		if (!keep(c, c->workspace->rx, n))
			return false;
	return true;
}

/* The client is gone: in order, or nothing that has not begun will. */
static void see_how_it_left(struct conn *c)
{
	if (c->state != CONN_REQUEST || c->orderly)
		return;
	c->orderly = receive_rest(c) && has_disc(c);
	c->blocked = c->orderly;
	if (c->orderly)
		set_deadline(c, FINISHING_MS);
	else if (c->end)
		conn_kill(c, c->end);
	else
		conn_kill(c, c->kept_len > 0 || c->current ? "client left in the middle of a request" :
							     "client left");
}

/* Whether requests may be received now. */
static bool takes_input(const struct conn *c)
{
	return c->state < CONN_FINISHING && !c->backlog && !c->stream && !is_full(c) &&
	       (c->blocked || !c->stopping);
}

/* Receive behind what was kept, unless no more is taken, and take from it what can be taken. */
static void input(struct conn *c)
{
	uint8_t *kept = c->kept, *p = kept;
	size_t len = c->kept_len, room = RX_BYTES - len, n, taken;

	if (!c->gone && !c->stopping) {
		p = c->workspace->rx;
		n = conn_receive(c, p + len, room < RX_CHUNK ? room : RX_CHUNK);
		if (c->gone || (n == 0 && !c->blocked))
			return;
		if (len > 0)
			memcpy(p, kept, len);
		len += n;
	}
	c->kept = NULL;		/* so that it outlives the connection's end */
	c->kept_len = 0;
	taken = take_steps(c, p, len);
	if (c->state != CONN_DEAD && !keep(c, p + taken, len - taken))
		conn_kill(c, "out of memory");
	free(kept);
}

/* Whether there is nothing that we owe the client. */
static bool is_idle(const struct conn *c)
{
	return c->in_flight == 0 && !c->back && !c->stream && !c->blocked && !c->backlog;
}

void conn_turn(struct conn *c, short revents)
{
	c->lively = c->tired = false;
	c->spent = 0;
	if (!revents && c->deadline && c->deadline <= now_ms())
		conn_expire(c);
	if (c->state == CONN_LINGERING) {
		conn_receive(c, c->workspace->rx, RX_CHUNK);
		return;
	}
	if (c->state == CONN_REQUEST && revents & (POLLRDHUP | POLLHUP | POLLERR))
		c->gone = true;
	if (c->state == CONN_DEAD || (c->backlog && !c->gone && !conn_flush(c)))
		return;
	/* What is sent makes room for what was blocked. */
	do {
		if (c->gone)
			see_how_it_left(c);
		if (c->state == CONN_DEAD || (c->backlog && !conn_flush(c)))
			return;
		go_on(c);
		if ((revents & POLLIN || c->blocked) && takes_input(c))
			input(c);
		if (!c->backlog)
			conn_flush(c);
		revents = 0;
	} while ((c->gone && !c->orderly && c->state == CONN_REQUEST) ||
		 (c->blocked && !c->tired && takes_input(c)));
	if (c->stats && c->stats->now)
		stats_end_turn(c->stats);
	if (c->stopping && c->state < CONN_FINISHING && is_idle(c))
		finish(c, "server stops");
	if (c->state == CONN_FINISHING && is_idle(c))
		close_orderly(c);
}

short conn_events(const struct conn *c)
{
	if (c->state == CONN_DEAD)
		return 0;
	if (c->backlog)
		return c->gone ? POLLOUT : POLLOUT | POLLRDHUP;
	if (c->gone)
		return 0;
	if (c->state == CONN_LINGERING)
		return POLLIN;
	return takes_input(c) ? POLLIN | POLLRDHUP : c->state == CONN_REQUEST ? POLLRDHUP : 0;
}

bool conn_has_vanished(const struct conn *c, unsigned seconds, bool *owes)
{
	bool vanished = false;

	*owes = c->in_flight > 0 || c->backlog;
#if defined(__linux__)
	struct tcp_info tcp;
	socklen_t len = sizeof(tcp);

	if (!seconds || getsockopt(c->source.fd, IPPROTO_TCP, TCP_INFO, &tcp, &len) < 0)	/* not TCP */
		return *owes = false;
	*owes |= tcp.tcpi_unacked > 0;
	vanished = tcp.tcpi_retransmits + tcp.tcpi_probes >= 2 &&
		   tcp.tcpi_last_ack_recv / 1000 >= seconds;
#endif
	return vanished;
}

bool conn_may_park(const struct conn *c)
{
	return c->state == CONN_REQUEST && is_idle(c) && c->kept_len == 0 && !c->gone &&
	       !c->stopping && !c->stats->unsaid;
}

void conn_stop(struct conn *c)
{
	c->stopping = true;
	set_deadline(c, STOPPING_MS);
	if (c->state < CONN_REQUEST)
		conn_kill(c, "server stops");
}

void conn_start(struct conn *c)
{
	struct tx *tx = c->workspace->tx;

	if (c->greeting != GREET_NEWSTYLE)	/* it gets the default export without asking */
		c->session.export = c->exports->entry[0];
	if (c->greeting != GREET_CONNECTED)
		tx_add(tx, proto_put_greeting(c->session.export, tx_tail(tx)));
	if (c->session.export)
		conn_enter_transmission(c);
	else
		set_deadline(c, HANDSHAKE_MS);
	conn_flush(c);
}
