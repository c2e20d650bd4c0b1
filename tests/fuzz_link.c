/*
 * fuzz_link.c - fuzzes a link to the origin that is up: of origin.c, with its requests and what they
 * receive.
 *
 * An input is a list of events: something is asked, the origin says something, some bytes of that
 * arrive.  Most of what it says are chunks for one of the requests; all data in them is what the
 * disk has at the place that the chunk names.  The socket and the clock are those of this file.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include "../origin.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	ASKED = 64,
	LEN_MAX = 70000,
	EXTENTS = 5,			/* room for them */
	ALLOCATION_ID = 7,
	WIRE_MAX = 1 << 20,
	FRESH = 0xee,			/* in memory that was not written to */
	HEAD_MAX = 32,			/* of a reply */
};

static ssize_t fake_recvmsg(const struct msghdr *msg);
static ssize_t fake_send(const uint8_t *p, size_t len);
static int fake_close(void);
static uint64_t fake_ms(void);
static void *fresh_buffer(size_t len);

#define recvmsg(fd, msg, flags) fake_recvmsg(msg)
#define send(fd, p, len, flags) fake_send(p, len)
#define close(fd) fake_close()
#include "../buffer.h"
#include "../util.h"
#define now_ms() fake_ms()
#define now_us() (fake_ms() * 1000)
#define buffer_get fresh_buffer
#define buffer_put(p, len) free(p)
#define buffer_trim() ((void)0)
#include "../origin.c"
#undef recvmsg
#undef send
#undef close
#undef now_ms
#undef now_us

/* Something that was asked. */
struct asked {
	struct origin_request r;	/* first, so that one is the other */
	struct extent extent[EXTENTS];
	unsigned room;			/* for extents */
	bool holes;			/* the origin said that there are some */
	bool done;			/* it came back */
};

static struct origin origin;
static struct asked asked[ASKED];
static unsigned asks;
static uint8_t wire[WIRE_MAX];		/* what the origin has said */
static size_t wire_len, wire_at, arrived;
static size_t send_room;
static uint8_t sent[PROTO_REQUEST_SIZE];	/* part of a request */
static size_t sent_len;
static uint64_t ms;
static bool closed_by_origin, closed_by_link;
static bool spoilt;			/* data may have come to a wrong place */

/* The disk: no byte is 0, or as in fresh memory. */
static uint8_t disk_byte(uint64_t off)
{
	return (uint8_t)(1 + (off * 7 + (off >> 8)) % 200);
}

static void *fresh_buffer(size_t len)
{
	void *p = malloc(len);

	assert(p);
	return memset(p, FRESH, len);
}

/* The socket */

static ssize_t fake_recvmsg(const struct msghdr *msg)
{
	size_t n = 0;

	assert(!closed_by_link);
	for (size_t i = 0; i < msg->msg_iovlen; i++) {
		size_t len = msg->msg_iov[i].iov_len;

		if (len > arrived - wire_at)
			len = arrived - wire_at;
		if (len > 0)
			memcpy(msg->msg_iov[i].iov_base, wire + wire_at, len);
		wire_at += len;
		n += len;
	}
	if (n > 0 || closed_by_origin)
		return (ssize_t)n;
	errno = EAGAIN;
	return -1;
}

/* What a proxy may ask. */
static void check_request(void)
{
	static const struct proto_session compact;
	struct proto_request r;
	size_t size;

	assert(!proto_get_request(&compact, sent, sizeof(sent), &r, &size) && size == sizeof(sent));
	assert(r.flags == 0);
	assert(r.cmd == NBD_CMD_READ || r.cmd == NBD_CMD_BLOCK_STATUS || r.cmd == NBD_CMD_DISC);
	assert(r.len <= LEN_MAX && (r.len > 0 || r.cmd == NBD_CMD_DISC));
}

static ssize_t fake_send(const uint8_t *p, size_t len)
{
	if (len > send_room)
		len = send_room;
	if (len == 0) {
		errno = EAGAIN;
		return -1;
	}
	send_room -= len;
	for (size_t i = 0; i < len; i++) {
		sent[sent_len++] = p[i];
		if (sent_len == sizeof(sent)) {
			check_request();
			sent_len = 0;
		}
	}
	return (ssize_t)len;
}

static int fake_close(void)
{
	assert(!closed_by_link);
	closed_by_link = true;
	return 0;
}

static uint64_t fake_ms(void)
{
	return ms;
}

/* What has come of it */

static void check_data(const struct asked *k)
{
	const uint8_t *data = k->r.buf;

	assert(data);
	for (size_t i = 0; i < k->r.len && !spoilt; i++)
		assert(data[i] == disk_byte(k->r.off + i) || (k->holes && data[i] == 0));
}

static void check_extents(const struct asked *k)
{
	uint64_t sum = 0;

	assert(k->r.extents <= k->room);
	for (unsigned i = 0; i < k->r.extents; i++) {
		assert(k->extent[i].len > 0 && k->extent[i].flags <= 3);
		sum += k->extent[i].len;
	}
	assert(k->r.extents > 0 && sum <= k->r.len);
}

static void finished(struct origin_request *r)
{
	struct asked *k = (struct asked *)r;

	assert(k >= asked && k < asked + asks && !k->done);
	k->done = true;
	if (r->error)
		assert(!r->buf && r->error == -EIO);
	else if (r->extent)
		check_extents(k);
	else
		check_data(k);
}

/* Asking */

static void ask(struct link *l, const struct proto_offer *offer, struct input *in)
{
	unsigned bits = (unsigned)take(in, 1);
	struct asked *k = &asked[asks];

	if (asks == ASKED || choose_link(&origin, 0) != l)
		return;
	memset(k, 0, sizeof(*k));
	k->r.done = finished;
	k->r.off = take(in, 1) * UINT64_C(0x10001000);
	k->r.len = 1 + (bits & 8 ? take(in, 3) % LEN_MAX : take(in, 1));
	if (bits & 1 && offer->allocation) {
		k->r.extent = k->extent;
		k->r.extents = k->room = 1 + bits / 2 % EXTENTS;
	}
	asks++;
	ms++;
	link_ask(l, &k->r);
}

/* Saying */

static void say(const void *p, size_t len)
{
	if (len > 0 && len <= WIRE_MAX - wire_len) {
		memcpy(wire + wire_len, p, len);
		wire_len += len;
	} else if (len > 0) {
		spoilt = true;
	}
}

static void say_data(uint64_t off, uint32_t len)
{
	for (; len > 0; len--, off++) {
		uint8_t byte = disk_byte(off);

		say(&byte, 1);
	}
}

/* The range of a chunk: often all of the request, or what is left of it after the last one. */
static void take_range(const struct asked *k, struct input *in, uint64_t *off, uint32_t *len)
{
	unsigned bits = (unsigned)take(in, 1);

	*off = k->r.off;
	*len = (uint32_t)k->r.len;
	if (bits & 1) {
		uint32_t from = (uint32_t)take(in, 2) % (*len + 8);

		*off += from;
		*len = bits & 2 || from >= *len ? (uint32_t)take(in, 2) : *len - from;
	} else if (bits & 2) {
		*len = *len / (2 + bits / 4 % 8);
	}
	if (bits & 128)
		*off -= 4;
}

static void say_extents(struct input *in)
{
	uint8_t p[PROTO_EXTENT_SIZE];

	put_be32(put_be32(p, (uint32_t)take(in, 2)), (uint32_t)take(in, 1));
	say(p, sizeof(p));
}

/* Change a bit of a head that was just written. */
static void spoil(uint8_t *head, size_t len, struct input *in)
{
	unsigned bit = (unsigned)take(in, 1) % (unsigned)(8 * len);

	head[bit / 8] ^= (uint8_t)(1 << bit % 8);
	spoilt |= bit / 8 == 6 || bit / 8 == 7 || bit / 8 >= 16;	/* type, length, offset */
}

static uint8_t *put_chunk(uint8_t *p, uint16_t type, bool last, uint64_t cookie, uint32_t len)
{
	p = put_be16(put_be32(p, NBD_STRUCTURED_REPLY_MAGIC), last);
	return put_be32(put_be64(put_be16(p, type), cookie), len);
}

static void say_reply(const struct proto_offer *offer, struct input *in)
{
	unsigned bits = (unsigned)take(in, 1), kind = bits % 8;
	struct asked *k = &asked[asks ? take(in, 1) % asks : 0];
	uint64_t cookie = k->r.cookie, off;
	uint8_t head[HEAD_MAX], *p = head;
	bool last = bits & 8;
	unsigned n = 1 + bits / 32 % 8;
	uint32_t len;

	if (asks == 0)
		return;
	take_range(k, in, &off, &len);
	k->holes |= kind == 3;
	if (!offer->structured || kind == 7)
		p = put_be64(put_be32(put_be32(p, NBD_SIMPLE_REPLY_MAGIC), bits >> 6), cookie);
	else if (kind < 3)
		p = put_be64(put_chunk(p, NBD_REPLY_TYPE_OFFSET_DATA, last, cookie, 8 + len), off);
	else if (kind == 3)
		p = put_be32(put_be64(put_chunk(p, NBD_REPLY_TYPE_OFFSET_HOLE, last, cookie, 12),
				      off), len);
	else if (kind == 4)
		p = put_chunk(p, NBD_REPLY_TYPE_NONE, true, cookie, 0);
	else if (kind == 5)
		p = put_be16(put_be32(put_chunk(p, NBD_REPLY_TYPE_ERROR, last, cookie, 6),
				      bits & 64 ? NBD_EIO : NBD_EINVAL), 0);
	else
		p = put_be32(put_chunk(p, NBD_REPLY_TYPE_BLOCK_STATUS, last, cookie,
				       4 + n * PROTO_EXTENT_SIZE), ALLOCATION_ID);
	if (bits & 16)
		spoil(head, (size_t)(p - head), in);
	say(head, (size_t)(p - head));
	if (!offer->structured)
		say_data(k->r.off, bits >> 6 ? 0 : (uint32_t)k->r.len);
	else if (kind < 3)
		say_data(off, len);
	for (; offer->structured && kind == 6 && n > 0; n--)
		say_extents(in);
}

static void say_anything(struct input *in)
{
	size_t n = take(in, 1) % 64;
	uint8_t *p = take_bytes(in, &n);

	spoilt = true;
	say(p, n);
	free(p);
}

/* Receive all that has arrived. */
static void receive_all(struct link *l)
{
	do {
		size_t before = wire_at;

		link_turn(&l->source, POLLIN);
		assert(atomic_load(&origin.fetched) <= wire_at);
		assert(l->state == LINK_DOWN || before == arrived || wire_at > before);
	} while (l->state == LINK_UP && wire_at < arrived);
}

static void check_owed(const struct link *l)
{
	unsigned owed = 0;

	for (unsigned i = 0; i < asks; i++)
		owed += !asked[i].done;
	assert(l->count == owed);
}

static void event(struct link *l, const struct proto_offer *offer, struct input *in)
{
	switch (take(in, 1) % 8) {
	case 0:
		ask(l, offer, in);
		break;
	case 1:
		send_room = take(in, 1);
		break;
	case 2:
		arrived += take(in, 1);
		closed_by_origin = arrived > wire_len + 200;
		break;
	case 3:
		arrived = wire_len;
		break;
	case 4:
		say_anything(in);
		break;
	case 5:
		ms += take(in, 1);
		break;
	default:
		say_reply(offer, in);
	}
	if (arrived > wire_len)
		arrived = wire_len;
	receive_all(l);
	link_turn(&l->source, 0);
	if (l->state == LINK_UP)
		check_owed(l);
}

/* What it owed waits to be asked again, in the same order. */
static void end(struct link *l)
{
	struct origin_request *owed;
	unsigned at = 0;

	send_room = 0;
	if (l->state == LINK_UP)
		link_close(l);
	while ((owed = request_take(&origin, 0))) {
		while (at < asks && asked[at].done)
			at++;
		assert(at < asks && owed == &asked[at].r && !owed->buf);
		asked[at].done = true;
	}
	assert(closed_by_link);
	for (unsigned i = 0; i < asks; i++) {
		assert(asked[i].done);
		free(asked[i].r.buf);
	}
	for (unsigned i = 0; i < origin.links; i++)
		free(origin.link[i]);
	loop_free(&origin.loop);
}

/* A link that is up, and the one for a redirect. */
static struct link *begin(const struct proto_offer *offer)
{
	struct link *l;

	asks = 0;
	memset(asked, 0, sizeof(asked));
	wire_len = wire_at = arrived = send_room = sent_len = 0;
	closed_by_origin = closed_by_link = spoilt = false;
	ms = 0;
	memset(&origin, 0, sizeof(origin));
	assert(!origin_init(&origin, 1) && !target_set(&origin.target, "", NULL, ""));
	origin.timeout_ms = 100;
	l = origin.link[0];
	l->source.fd = 0;
	l->state = LINK_UP;
	l->client.offer = *offer;
	return l;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
	struct input in = { p, n };
	unsigned bits = (unsigned)take(&in, 1);
	const struct proto_offer offer = {
		.size = INT64_MAX,
		.structured = bits & 1,
		.allocation = (bits & 3) == 3,
		.allocation_id = ALLOCATION_ID,
		.min_block = 1,
		.max_block = PROTO_MAX_PAYLOAD,
	};
	struct link *l = begin(&offer);

	while (in.left > 0 && l->state == LINK_UP)
		event(l, &offer, &in);
	end(l);
	return 0;
}
