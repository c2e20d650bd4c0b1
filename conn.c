/*
 * conn.c - one client's connection: see conn.h.
 *
 * A turn: receive what has arrived behind what was kept, take requests from it one after the
 * other, gather their replies in the loop's tx, send them at once, keep what is not a whole
 * request yet.  Requests that would block are in flight meanwhile and come back through
 * conn_complete().
 *
 *	CLIENT_FLAGS -> OPTION <-> SKIP_OPTION       newstyle
 *	                  |
 *	               REQUEST <-> PAYLOAD            oldstyle and connected ones begin here
 *	                  |
 *	              FINISHING -> LINGERING -> DEAD  and from everywhere to DEAD
 *
 * Memory is bounded: while a client does not take its replies (backlog), or has too much in
 * flight, no more requests are taken from it.
 */
#define _GNU_SOURCE
#include "conn.h"

#include "backend.h"
#include "buffer.h"
#include "loop.h"
#include "stats.h"
#include "util.h"
#include "xnbd.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	HANDSHAKE_MS = 10 * 1000,
	FINISHING_MS = 10 * 1000,	/* for replies that a leaving client does not take */
	LINGERING_MS = 1000,
	STOPPING_MS = 2500,		/* for what is in flight when the server stops */

	OPTION_DATA_MAX = PROTO_MAX_PAYLOAD,	/* an option with more is an attack */

	IN_FLIGHT_MAX = 512,
	BUFFERED_MAX = 2 * 1024 * 1024,	/* one more request of up to 32 MiB may pass it */

	/* A READ of at least this is sent from the page cache, a shorter one copied. */
	SEND_MIN = 32 * 1024,
	SEND_PARTS = 16,

	/* Replies are sent when there is less room than one step may need. */
	STEP_BYTES = SEND_MIN + PROTO_REPLY_ROOM,
	ENCODE_IOVS = 512,
};

_Static_assert(STEP_BYTES >= (int)PROTO_OPTION_REPLY_ROOM, "an answer to an option fits");
_Static_assert(STEP_BYTES >= PROTO_REPLY_ROOM + (int)EXTENTS_MAX * PROTO_EXTENDED_EXTENT_SIZE,
	       "so do extents");
_Static_assert(LOOP_RX_CHUNK >= (int)BLOCK_SIZE + PROTO_EXTENDED_REQUEST_SIZE,
	       "a block can be kept");

/* What a READ finds in a hole, sent by reference: bss, and never written. */
static uint8_t zeros[128 * 1024];

/* Life and death */

struct conn *conn_new(int fd, enum greeting greeting, const struct proto_exports *exports,
		      const char *peer)
{
	struct conn *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->fd = fd;
	c->greeting = greeting;
	c->exports = exports;
	c->ready_end = &c->ready;
	strncpy(c->peer, peer, sizeof(c->peer) - 1);
	tune_socket(fd);
	return c;
}

/* Count down what bounds the load; there may be room again. */
static void unload(const struct load *load, atomic_size_t *count, size_t n, size_t max)
{
	size_t before = atomic_fetch_sub(count, n);

	if (max && before >= max && before - n < max)
		load->room();
}

static void free_request(struct conn *c, struct request *r)
{
	if (r->owns_buf) {
		struct load *load = &c->export->load;

		c->buffered -= r->h.len;
		unload(load, &load->bytes, r->h.len, load->bytes_max);
		buffer_put(r->buf, r->h.len);
	}
	free(r->extent);
	loop_release(c->loop, r);
}

static void free_requests(struct conn *c, struct request **list)
{
	struct request *r;

	while ((r = *list)) {
		*list = r->next;
		free_request(c, r);
	}
}

static void set_kept(struct conn *c, const uint8_t *p, size_t len)
{
	uint8_t *kept = NULL;

	if (len > 0) {
		kept = malloc(len);
		if (!kept) {
			conn_kill(c, "out of memory");
			return;
		}
		memcpy(kept, p, len);
	}
	free(c->kept);
	c->kept = kept;
	c->kept_len = len;
}

/* The WRITE whose payload will not come; its pieces may still be under way. */
static void abandon_current(struct conn *c)
{
	struct request *r = c->current;

	c->current = NULL;
	if (r && r->pieces == 0)
		free_request(c, r);
}

/* With what it did, if it did something. */
static void log_end(struct conn *c, const char *why)
{
	char did[STATS_LINE] = "";
	bool busy = false;

	if (c->stats) {
		stats_end_turn(c->stats);
		stats_catch_up(c->stats, c->peer, UINT64_MAX);
		busy = tally_requests(&c->stats->all) > 0;
	}
	if (busy)
		tally_describe(&c->stats->all, did);
	log_line("%s: disconnected: %s%s%s", c->peer, why, busy ? "; " : "", did);
}

void conn_kill(struct conn *c, const char *why)
{
	if (c->state == CONN_DEAD)
		return;
	log_end(c, why);
	atomic_store(&c->dead, true);	/* before the client can know, and come back */
	close(c->fd);
	c->fd = -1;
	c->state = CONN_DEAD;
	c->deadline = 0;
	abandon_current(c);
	free_requests(c, &c->ready);
	c->ready_end = &c->ready;
	free(c->kept);
	c->kept = NULL;
	c->kept_len = 0;
	if (c->backlog) {
		free_requests(c, &c->backlog->held);
		free(c->backlog);
		c->backlog = NULL;
	}
}

bool conn_is_over(const struct conn *c)
{
	return c->state == CONN_DEAD && c->in_flight == 0;
}

void conn_free(struct conn *c)
{
	if (!c)
		return;
	assert(conn_is_over(c) && c->buffered == 0);
	stats_free(c->stats);
	free(c);
}

static void set_deadline(struct conn *c, unsigned ms)
{
	uint64_t deadline = now_ms() + ms;

	if (c->deadline == 0 || deadline < c->deadline)
		c->deadline = deadline;
}

void conn_expire(struct conn *c)
{
	switch (c->state) {
	case CONN_CLIENT_FLAGS:
	case CONN_OPTION:
	case CONN_SKIP_OPTION:
		conn_kill(c, c->stopping ? "server stops" : "handshake took too long");
		break;
	case CONN_LINGERING:
		conn_kill(c, c->end);
		break;
	default:
		conn_kill(c, c->stopping  ? "server stops" :
			     c->in_flight ? "its requests take too long" :
					    "replies were not taken");
	}
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

/* The last step of an orderly end: nothing is in flight, and everything is sent. */
static void close_orderly(struct conn *c)
{
	if (!c->linger) {
		conn_kill(c, c->end);
		return;
	}
	/* To close with input unread would make TCP throw away replies that are on their way. */
	shutdown(c->fd, SHUT_WR);
	c->state = CONN_LINGERING;
	c->deadline = 0;
	set_deadline(c, LINGERING_MS);
}

/* Sending */

/* Send what the loop's tx holds.  What is left becomes the backlog. */
static void flush(struct conn *c)
{
	struct loop *l = c->loop;
	enum tx_result result = c->state == CONN_DEAD ? TX_DEAD : tx_send(l->tx, c->fd);

	if (result == TX_MORE) {
		struct tx *fresh = tx_new();

		if (fresh) {
			c->backlog = l->tx;
			l->tx = fresh;
			return;
		}
	}
	free_requests(c, &l->tx->held);
	tx_reset(l->tx);
	if (result == TX_DEAD)
		conn_kill(c, "cannot send");
	else if (result == TX_MORE)
		conn_kill(c, "out of memory");
}

/* Send more of the backlog.  True if there is none any more. */
static bool send_backlog(struct conn *c)
{
	enum tx_result result;

	if (!c->backlog)
		return true;
	result = tx_send(c->backlog, c->fd);
	if (result == TX_MORE)
		return false;
	if (result == TX_DEAD) {
		conn_kill(c, "cannot send");
		return false;
	}
	free_requests(c, &c->backlog->held);
	free(c->backlog);
	c->backlog = NULL;
	return true;
}

/* Make room for one step's output.  False if the client has to take replies first. */
static bool make_room(struct conn *c, size_t bytes, unsigned iovs)
{
	if (c->backlog)
		return false;
	if (tx_has_room(c->loop->tx, bytes, iovs))
		return true;
	flush(c);
	return c->state != CONN_DEAD && !c->backlog;
}

/* Replies */

static void put_zeros(struct tx *tx, uint64_t len)
{
	for (; len > sizeof(zeros); len -= sizeof(zeros))
		tx_refer(tx, zeros, sizeof(zeros));
	tx_refer(tx, zeros, len);
}

/* One run of a READ: at r->buf + pos, or a hole. */
static void put_run(struct conn *c, const struct request *r, uint64_t pos, const struct extent *e)
{
	bool last = pos + e->len == r->h.len, hole = e->flags & NBD_STATE_ZERO;
	uint64_t off = r->h.off + pos;
	struct tx *tx = c->loop->tx;

	if (c->session.structured && hole && !(r->h.flags & NBD_CMD_FLAG_DF)) {
		tx_add(tx, proto_put_hole(&c->session, &r->h, off, (uint32_t)e->len, last,
					  tx_tail(tx)));
		return;
	}
	if (c->session.structured && !(r->h.flags & NBD_CMD_FLAG_DF))
		tx_add(tx, proto_put_data(&c->session, &r->h, off, (uint32_t)e->len, last,
					  tx_tail(tx)));
	if (hole)
		put_zeros(tx, e->len);
	else
		tx_refer(tx, r->buf + pos, e->len);
}

/* A READ that a worker did, in r->buf. */
static void put_read(struct conn *c, struct request *r)
{
	bool chunks = c->session.structured && !(r->h.flags & NBD_CMD_FLAG_DF);
	const struct extent all = { r->h.len, 0 };
	const struct extent *e = r->extents ? r->extent : &all;
	unsigned n = r->extents ? r->extents : 1;
	struct tx *tx = c->loop->tx;
	uint64_t pos = 0;

	if (!chunks)
		tx_add(tx, proto_put_data(&c->session, &r->h, r->h.off, (uint32_t)r->h.len, true,
					  tx_tail(tx)));
	for (unsigned i = 0; i < n; pos += e[i++].len)
		put_run(c, r, pos, &e[i]);
}

/* READ from the page cache: true if all of it is there. */
static bool read_located(struct conn *c, struct request *r)
{
	struct tx *tx = c->loop->tx;
	struct file_part part[SEND_PARTS];
	int n = r->backend->ops->locate(r->backend, r, part, SEND_PARTS);

	if (n == 0)
		return false;
	tx_add(tx, proto_put_data(&c->session, &r->h, r->h.off, (uint32_t)r->h.len, true,
				  tx_tail(tx)));
	for (int i = 0; i < n; i++)
		tx_refer_file(tx, &part[i]);
	free_request(c, r);
	return true;
}

static void put_block_status(struct conn *c, const struct request *r)
{
	struct tx *tx = c->loop->tx;

	tx_add(tx, proto_put_status(&c->session, &r->h, r->extents, tx_tail(tx)));
	for (unsigned i = 0; i < r->extents; i++)
		tx_add(tx, proto_put_extent(&c->session, &r->extent[i], tx_tail(tx)));
}

/*
 * Write the reply to a request that is done; tx has STEP_BYTES and ENCODE_IOVS of room.  The
 * request is freed, or held until its data is sent.
 */
static void put_reply(struct conn *c, struct request *r)
{
	struct tx *tx = c->loop->tx;

	stats_count(c->stats, r);
	if (r->error)
		stats_complain(c->stats, c->peer, r);
	if (r->error || (r->h.cmd != NBD_CMD_READ && r->h.cmd != NBD_CMD_BLOCK_STATUS) ||
	    r->h.len == 0) {
		tx_add(tx, proto_put_reply(&c->session, &r->h, r->error, tx_tail(tx)));
		free_request(c, r);
	} else if (r->h.cmd == NBD_CMD_BLOCK_STATUS) {
		put_block_status(c, r);
		free_request(c, r);
	} else if (r->h.len >= SEND_MIN && read_located(c, r)) {
		return;
	} else {
		put_read(c, r);
		r->next = tx->held;
		tx->held = r;
	}
}

static void put_ready(struct conn *c, struct request *r)
{
	r->next = NULL;
	*c->ready_end = r;
	c->ready_end = &r->next;
}

/* Write replies that wait, as long as the client takes them. */
static void put_ready_replies(struct conn *c)
{
	struct request *r;

	if (c->ready)
		stats_time(c->stats);
	while ((r = c->ready) && make_room(c, STEP_BYTES, ENCODE_IOVS)) {
		c->ready = r->next;
		if (!c->ready)
			c->ready_end = &c->ready;
		put_reply(c, r);
	}
}

/* Requests in flight */

/*
 * Take a place among the requests of all clients, where these are bounded, before a step that may
 * need one.  False if there is none.
 */
static bool reserve(struct conn *c)
{
	struct load *load = c->export ? &c->export->load : NULL;
	size_t count;

	if (!load || !load->requests_max)
		return true;
	count = atomic_load(&load->requests);
	while (count < load->requests_max)
		if (atomic_compare_exchange_weak(&load->requests, &count, count + 1)) {
			c->reserved = true;
			return true;
		}
	return false;
}

/* The step did not need it. */
static void unreserve(struct conn *c)
{
	struct load *load = &c->export->load;

	c->reserved = false;
	unload(load, &load->requests, 1, load->requests_max);
}

/* A request, or a piece of one, is with others until conn_complete(). */
static void lend(struct conn *c)
{
	c->in_flight++;
	if (!c->reserved)
		atomic_fetch_add(&c->export->load.requests, 1);
	c->reserved = false;
}

/* A worker has to do it. */
static void queue(struct conn *c, struct request *r)
{
	lend(c);
	r->inside = true;
	gate_hold(r->gate);
	request_queue(r);
}

/* The outcome of something that was tried: a reply, now or later. */
static void settle(struct conn *c, struct request *r, int ret)
{
	if (ret == PENDING) {
		lend(c);
	} else if (ret == -EAGAIN) {
		queue(c, r);
	} else {
		r->error = -ret;
		put_reply(c, r);
	}
}

/* Give r a buffer of its own for its data. */
static bool own_buffer(struct conn *c, struct request *r)
{
	r->buf = buffer_get(r->h.len);
	if (!r->buf)
		return false;
	r->owns_buf = true;
	c->buffered += r->h.len;
	atomic_fetch_add(&c->export->load.bytes, r->h.len);
	return true;
}

/* All of a WRITE's payload has come, and its pieces are done. */
static int commit_write(struct conn *c, struct request *r)
{
	r->backend = c->export->backend;	/* it may have changed between pieces */
	return r->error ? -r->error : request_commit(r);
}

static void complete_piece(struct conn *c, struct request *piece)
{
	struct request *r = piece->whole;
	int ret;

	if (piece->error && !r->error)
		r->error = piece->error;
	free_request(c, piece);
	if (--r->pieces > 0 || r == c->current)
		return;
	if (c->state == CONN_DEAD) {
		free_request(c, r);
		return;
	}
	ret = commit_write(c, r);
	if (ret == PENDING) {
		lend(c);
		return;
	}
	r->error = -ret;
	put_ready(c, r);
}

void conn_complete(struct conn *c, struct request *r)
{
	struct gate *gate = r->inside ? r->gate : NULL;
	struct load *load = &c->export->load;

	c->in_flight--;
	unload(load, &load->requests, 1, load->requests_max);
	if (r->whole)
		complete_piece(c, r);
	else if (c->state == CONN_DEAD)
		free_request(c, r);
	else
		put_ready(c, r);
	if (gate)
		gate_leave(gate);
}

/*
 * Steps: each takes some of the n bytes at p and returns how many, 0 if it needs more.
 */

static void enter_transmission(struct conn *c)
{
	const struct proto_export *e = c->session.export;

	c->stats = calloc(1, sizeof(*c->stats));
	if (!c->stats) {
		conn_kill(c, "out of memory");
		return;
	}
	c->export = (struct export *)((char *)(uintptr_t)e - offsetof(struct export, proto));
	c->state = CONN_REQUEST;
	if (!c->stopping)
		c->deadline = 0;
	log_line("%s: connected%s%s", c->peer, *e->name ? " to " : "", e->name);
	log_at(LOG_DETAIL, "%s: export '%s' of %llu bytes, flags 0x%x%s%s", c->peer, e->name,
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

static void option_answered(struct conn *c, enum proto_next next, const struct proto_out *out)
{
	tx_add(c->loop->tx, out->len);
	switch (next) {
	case PROTO_HAGGLE:
		c->state = CONN_OPTION;
		break;
	case PROTO_TRANSMIT:
		enter_transmission(c);
		break;
	case PROTO_CLOSE:
		c->linger = true;
		finish(c, "handshake ended");
		break;
	}
}

static struct proto_out option_out(struct conn *c)
{
	struct proto_out out = { tx_tail(c->loop->tx), 0, PROTO_OPTION_REPLY_ROOM, false };

	return out;
}

static size_t step_option(struct conn *c, const uint8_t *p, size_t n)
{
	struct proto_out out = option_out(c);
	enum proto_next next;
	uint32_t opt, len;

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
		c->state = CONN_SKIP_OPTION;
		c->skip_opt = opt;
		c->skip_left = len;
		return PROTO_OPTION_SIZE;
	}
	if (n < PROTO_OPTION_SIZE + len)
		return 0;
	if (c->stopping)
		next = proto_option_shutdown(&c->session, opt, &out);
	else
		next = proto_option(&c->session, c->exports, opt, p + PROTO_OPTION_SIZE, len,
				    &out);
	option_answered(c, next, &out);
	return PROTO_OPTION_SIZE + len;
}

static size_t step_skip_option(struct conn *c, size_t n)
{
	struct proto_out out = option_out(c);
	enum proto_next next;

	if (n > c->skip_left)
		n = c->skip_left;
	c->skip_left -= (uint32_t)n;
	if (c->skip_left == 0) {
		next = proto_option_too_big(&c->session, c->skip_opt, &out);
		option_answered(c, next, &out);
	}
	return n;
}

static struct request *new_request(struct conn *c, const struct proto_request *h)
{
	struct request *r = loop_request(c->loop);

	if (r) {
		r->conn = c;
		r->job.lane = &c->export->lane;
		r->backend = c->export->backend;
		r->gate = &c->export->gate;
		r->abandoned = &c->dead;
		r->done = loop_complete;
		r->h = *h;
		r->begun = stats_time(c->stats);
	}
	return r;
}

/* READ straight into the reply, behind its header: true if that was possible without blocking. */
static bool read_copied(struct conn *c, struct request *r)
{
	struct tx *tx = c->loop->tx;
	size_t head = proto_put_data(&c->session, &r->h, r->h.off, (uint32_t)r->h.len, true,
				     tx_tail(tx));
	int ret;

	r->buf = tx_tail(tx) + head;
	ret = request_try(r);
	if (ret == -EAGAIN)
		return false;
	assert(ret != PENDING);
	if (ret == 0) {
		tx_add(tx, head + r->h.len);
		stats_count_read(c->stats, r->h.len);
		free_request(c, r);
	} else {
		settle(c, r, ret);
	}
	return true;
}

static void start_read(struct conn *c, struct request *r)
{
	uint64_t len = r->h.len;

	if (len == 0) {
		settle(c, r, 0);
		return;
	}
	if (len >= SEND_MIN && read_located(c, r)) {
		stats_count_read(c->stats, len);
		return;
	}
	if (len < SEND_MIN && read_copied(c, r))
		return;
	if (own_buffer(c, r))
		queue(c, r);
	else
		settle(c, r, -ENOMEM);
}

/* A WRITE, or what was refused: its payload has to be taken in any case. */
static void start_payload(struct conn *c, struct request *r)
{
	assert(r->error || r->h.cmd == NBD_CMD_WRITE);
	if (r->h.len == 0) {
		settle(c, r, commit_write(c, r));
		return;
	}
	c->current = r;
	c->current_left = r->h.len;
	c->state = CONN_PAYLOAD;
}

static void start_request(struct conn *c, struct request *r)
{
	if (r->h.cmd == NBD_CMD_READ) {
		start_read(c, r);
		return;
	}
	settle(c, r, r->h.len == 0 && r->h.cmd != NBD_CMD_FLUSH ? 0 : request_try(r));
}

static size_t step_request(struct conn *c, const uint8_t *p, size_t n)
{
	size_t size = proto_request_size(&c->session);
	struct proto_request h;
	struct request *r;

	if (n < PROTO_REQUEST_SIZE)
		return 0;
	if (!proto_is_request(&c->session, p)) {
		conn_kill(c, "wrong magic of a request");
		return n;
	}
	if (n < size)
		return 0;
	if (!proto_get_request(&c->session, p, &h)) {
		conn_kill(c, "request with too much payload");
		return n;
	}
	if (h.cmd == NBD_CMD_DISC) {
		finish(c, "client left");
		return n;
	}
	r = new_request(c, &h);
	if (!r) {
		conn_kill(c, "out of memory");
		return n;
	}
	r->error = c->stopping ? ESHUTDOWN : proto_check_request(&c->session, &h);
	r->refused = r->error != 0;
	if (h.payload)
		start_payload(c, r);
	else if (r->error)
		put_reply(c, r);
	else
		start_request(c, r);
	return size;
}

/* Let a worker store a piece, or all, of a payload: out of a copy. */
static int queue_payload(struct conn *c, struct request *r, const uint8_t *p)
{
	if (!own_buffer(c, r))
		return -ENOMEM;
	memcpy(r->buf, p, r->h.len);
	queue(c, r);
	return PENDING;
}

/* Store a piece, or all, of a payload.  What is PENDING has been counted as in flight. */
static int store(struct conn *c, struct request *r, const uint8_t *p)
{
	int ret;

	r->buf = (uint8_t *)(uintptr_t)p;
	ret = request_try(r);
	if (ret == -EAGAIN)
		return queue_payload(c, r, p);
	if (ret == PENDING)
		lend(c);
	return ret;
}

/* The whole payload is here. */
static void store_whole(struct conn *c, struct request *r, const uint8_t *p)
{
	int ret = r->error ? -r->error : store(c, r, p);

	if (ret != PENDING)
		settle(c, r, ret);
}

/* n bytes of the payload, which are some whole blocks or its end. */
static void store_piece(struct conn *c, struct request *r, const uint8_t *p, size_t n)
{
	const struct proto_request h = {
		.cmd = NBD_CMD_WRITE,
		.off = r->h.off + (r->h.len - c->current_left),
		.len = n,
	};
	struct request *piece;
	int ret;

	if (r->error)
		return;
	piece = new_request(c, &h);
	if (!piece) {
		r->error = ENOMEM;
		return;
	}
	piece->whole = r;
	r->pieces++;
	ret = store(c, piece, p);
	if (ret == PENDING)
		return;
	r->pieces--;
	free_request(c, piece);
	if (ret != 0)
		r->error = -ret;
}

/*
 * How much of a payload of which n bytes are here to store now.  Pieces end at block boundaries,
 * so that no block is stored by halves when a client dies.
 */
static size_t piece_size(const struct conn *c, size_t n)
{
	uint64_t pos = c->current->h.off + (c->current->h.len - c->current_left);
	size_t tail;

	if (n >= c->current_left)
		return c->current_left;
	if (c->current->error)
		return n;
	tail = (pos + n) % BLOCK_SIZE;
	return n > tail ? n - tail : 0;
}

static size_t step_payload(struct conn *c, const uint8_t *p, size_t n)
{
	struct request *r = c->current;

	n = piece_size(c, n);
	if (n == 0)
		return 0;
	if (n == r->h.len) {
		c->current = NULL;
		c->state = CONN_REQUEST;
		store_whole(c, r, p);
		return n;
	}
	store_piece(c, r, p, n);
	c->current_left -= n;
	if (c->current_left == 0) {
		c->current = NULL;
		c->state = CONN_REQUEST;
		if (r->pieces == 0)
			settle(c, r, commit_write(c, r));
	}
	return n;
}

/* Input */

static bool in_transmission(const struct conn *c)
{
	return c->state == CONN_REQUEST || c->state == CONN_PAYLOAD;
}

/* Whether no more may be in flight.  A bound for all clients takes the place of each one's. */
static bool is_full(const struct conn *c)
{
	const struct load *load;

	if (!c->export)
		return false;
	load = &c->export->load;
	if (load->requests_max ? atomic_load(&load->requests) >= load->requests_max :
				 c->in_flight >= IN_FLIGHT_MAX)
		return true;
	return load->bytes_max ? atomic_load(&load->bytes) >= load->bytes_max :
				 c->buffered >= BUFFERED_MAX;
}

/* Whether a step may be taken: room for its reply, and not too much in flight. */
static bool may_step(struct conn *c)
{
	return !is_full(c) && make_room(c, STEP_BYTES, 1) && reserve(c);
}

static size_t step(struct conn *c, const uint8_t *p, size_t n)
{
	switch (c->state) {
	case CONN_CLIENT_FLAGS:
		return step_client_flags(c, p, n);
	case CONN_OPTION:
		return step_option(c, p, n);
	case CONN_SKIP_OPTION:
		return step_skip_option(c, n);
	case CONN_REQUEST:
		return step_request(c, p, n);
	case CONN_PAYLOAD:
		return step_payload(c, p, n);
	default:
		return n;	/* nothing is taken from it any more */
	}
}

/* Take steps until there is not enough input, or no room.  Returns the bytes taken. */
static size_t take_steps(struct conn *c, const uint8_t *p, size_t n)
{
	bool inside = false;
	size_t pos = 0, taken;

	while (pos < n) {
		if (in_transmission(c) && !inside) {
			inside = gate_enter(&c->export->gate);
			if (!inside) {
				c->turned_away = c->blocked = true;
				break;
			}
		}
		if (!may_step(c)) {
			c->blocked = true;
			break;
		}
		taken = step(c, p + pos, n - pos);
		if (c->reserved)
			unreserve(c);
		if (taken == 0)
			break;
		pos += taken;
	}
	if (inside)
		gate_leave(&c->export->gate);
	return pos;
}

/* The client will send no more. */
static void end_of_input(struct conn *c)
{
	if (in_transmission(c) && !c->current && !c->blocked && c->kept_len == 0)
		finish(c, "client left");
	else if (in_transmission(c))
		conn_kill(c, "client left in the middle of a request");
	else
		conn_kill(c, "client left during the handshake");
}

/* Whether requests may be received now. */
static bool takes_input(const struct conn *c)
{
	return c->state < CONN_FINISHING && !c->backlog && !c->turned_away && !is_full(c);
}

/* Receive behind what was kept, and take from it what can be taken. */
static void input(struct conn *c)
{
	uint8_t *rx = c->loop->rx;
	size_t have = c->kept_len, room = LOOP_RX_BYTES - have, taken;
	ssize_t n;

	if (room > LOOP_RX_CHUNK)
		room = LOOP_RX_CHUNK;
	if (have > 0)
		memcpy(rx, c->kept, have);
	do
		n = recv(c->fd, rx + have, room, MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
		conn_kill(c, strerror(errno));
		return;
	}
	c->lively = n > 0;
	if (n <= 0 && !c->blocked) {
		if (n == 0)
			end_of_input(c);
		return;
	}
	c->blocked = false;
	if (n > 0)
		have += (size_t)n;
	taken = take_steps(c, rx, have);
	if (c->state != CONN_DEAD)
		set_kept(c, rx + taken, have - taken);
}

static void discard_input(struct conn *c)
{
	ssize_t n = recv(c->fd, c->loop->rx, LOOP_RX_CHUNK, MSG_DONTWAIT);

	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
		conn_kill(c, c->end);
}

/* Whether there is nothing that we owe the client. */
static bool is_idle(const struct conn *c)
{
	return c->in_flight == 0 && !c->ready && !c->current && !c->blocked && !c->backlog;
}

/* Whether replies are on their way that a close with input unread would throw away. */
static bool has_unsent(const struct conn *c)
{
	int bytes = 0;

	return ioctl(c->fd, TIOCOUTQ, &bytes) < 0 || bytes > 0;
}

/* While the server stops: end when the client has gone quiet. */
static void stop_when_quiet(struct conn *c)
{
	if (c->state == CONN_DEAD)
		return;
	if (!is_idle(c) || c->lively || has_unsent(c))
		c->linger = true;
	if (!is_idle(c) || c->lively)
		return;
	if (c->state < CONN_FINISHING)
		finish(c, "server stops");
}

void conn_turn(struct conn *c, bool readable)
{
	c->lively = false;
	if (c->state == CONN_LINGERING) {
		discard_input(c);
		return;
	}
	if (c->state == CONN_DEAD || !send_backlog(c))
		return;
	put_ready_replies(c);
	/* What is sent makes room for what was blocked. */
	do {
		if ((readable || c->blocked) && takes_input(c))
			input(c);
		if (!c->backlog)
			flush(c);
		readable = false;
	} while (c->blocked && takes_input(c));
	if (c->stats && c->stats->now)
		stats_end_turn(c->stats);
	if (c->stopping)
		stop_when_quiet(c);
	if (c->state == CONN_FINISHING && is_idle(c))
		close_orderly(c);
}

short conn_events(const struct conn *c)
{
	if (c->state == CONN_DEAD)
		return 0;
	if (c->backlog)
		return POLLOUT;
	return c->state == CONN_LINGERING || takes_input(c) ? POLLIN : 0;
}

bool conn_admit(struct conn *c)
{
	bool waits = c->turned_away || (c->blocked && !c->backlog);

	c->turned_away = false;
	return waits;
}

void conn_stop(struct conn *c)
{
	c->stopping = true;
	set_deadline(c, STOPPING_MS);
}

/* Oldstyle and connected clients get the default export without asking. */
static void bind_default(struct conn *c)
{
	c->session.export = c->exports->entry[0];
	enter_transmission(c);
}

void conn_start(struct conn *c, struct loop *loop)
{
	struct tx *tx = loop->tx;

	c->loop = loop;
	switch (c->greeting) {
	case GREET_NEWSTYLE:
		proto_put_greeting(tx_tail(tx));
		tx_add(tx, PROTO_GREETING_SIZE);
		set_deadline(c, HANDSHAKE_MS);
		break;
	case GREET_OLDSTYLE:
		proto_put_oldstyle(tx_tail(tx), c->exports->entry[0]);
		tx_add(tx, PROTO_OLDSTYLE_SIZE);
		bind_default(c);
		break;
	case GREET_CONNECTED:
		bind_default(c);
		break;
	}
	flush(c);
}
