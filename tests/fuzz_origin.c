/*
 * fuzz_origin.c - fuzzes what a proxy reads from its origin: proto_client.c.
 *
 * The first byte of an input chooses a handshake, the bytes of replies, or replies made of a few
 * bytes each, which get further.  A map with a byte for each byte of the request says what an
 * answer must have come to.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include "../proto.h"

enum {
	LEN_MAX = 4096,
	ALLOCATION_ID = 7,
	HEAD_MAX = 32,			/* of a reply */
	EXTENTS = 5,			/* room for them */
};

/* Handshake */

/* What our client sends must be good, whatever the server said: flags, options or both. */
static void check_sent(const uint8_t *p, size_t len, bool first)
{
	struct proto_session s;
	uint32_t opt, data;

	if (first && len > 0) {
		assert(len >= PROTO_CLIENT_FLAGS_SIZE && proto_client_flags(&s, p));
		p += PROTO_CLIENT_FLAGS_SIZE;
		len -= PROTO_CLIENT_FLAGS_SIZE;
	}
	if (len == 0)
		return;
	assert(len >= PROTO_OPTION_SIZE && proto_get_option(p, &opt, &data));
	assert(len == PROTO_OPTION_SIZE + data);
	assert(opt == NBD_OPT_STRUCTURED_REPLY || opt == NBD_OPT_SET_META_CONTEXT ||
	       opt == NBD_OPT_GO || opt == NBD_OPT_EXPORT_NAME);
}

static bool is_power_of_two(uint32_t n)
{
	return n && !(n & (n - 1));
}

static void check_offer(const struct proto_offer *o)
{
	assert(o->size <= INT64_MAX);
	assert(is_power_of_two(o->min_block) && is_power_of_two(o->max_block));
	assert(o->min_block <= 65536 && o->min_block <= o->max_block);
	assert(o->max_block >= 4096 && o->max_block <= PROTO_MAX_PAYLOAD);
	assert(o->structured || !o->allocation);
	assert(o->flags == 0 || o->flags & NBD_FLAG_HAS_FLAGS);
}

static void check_reason(const struct proto_client *c)
{
	size_t len = strnlen(c->reason, sizeof(c->reason));

	assert(len > 0 && len < sizeof(c->reason) - 1);
}

static void fuzz_handshake(struct input *in, const char *name)
{
	uint8_t out[PROTO_CLIENT_ROOM];
	enum proto_next next = PROTO_HAGGLE;
	struct proto_client c;
	size_t want = 0, sent = 0;

	proto_client_begin(&c, name);
	while (next == PROTO_HAGGLE) {
		struct input message = *in;
		size_t n = want;
		uint8_t *p;

		if (n > in->left)
			return;
		p = take_bytes(&message, &n);
		c.out = out + sent;
		next = proto_client_take(&c, p, n);
		free(p);
		assert(c.want > 0 && c.want <= PROTO_CLIENT_WANT_MAX);
		assert(c.want >= n || next != PROTO_HAGGLE);
		assert(c.out_len <= sizeof(out) - sent);
		assert(c.out_len == 0 || (next == PROTO_HAGGLE && c.want == n));
		check_sent(out + sent, c.out_len, sent == 0);
		sent += c.out_len;
		want = c.want > n ? c.want : 0;
		if (c.want == n)
			*in = message;
	}
	if (next == PROTO_TRANSMIT)
		check_offer(&c.offer);
	else
		check_reason(&c);
}

/* Answers */

/* A request, what its answer has come to, and what it must have come to. */
struct asked {
	struct proto_offer offer;
	struct proto_request r;
	struct proto_answer a;
	uint8_t came[LEN_MAX];		/* how often each byte of the request did */
	uint64_t described;		/* bytes by extents */
	struct extent extent[EXTENTS];
	bool told;
	bool failed;			/* an error came */
};

static bool is_status(const struct asked *k)
{
	return k->r.cmd == NBD_CMD_BLOCK_STATUS;
}

static void ask(struct asked *k, struct input *in)
{
	static const uint64_t offs[4] = { 0, 4096, UINT32_MAX - 100, INT64_MAX - LEN_MAX };
	unsigned bits = (unsigned)take(in, 1);

	memset(k, 0, sizeof(*k));
	k->offer.structured = bits & 1;
	k->offer.allocation = bits & 2;
	k->offer.allocation_id = ALLOCATION_ID;
	k->r.cmd = bits & 4 && bits & 1 ? NBD_CMD_BLOCK_STATUS : NBD_CMD_READ;
	k->r.off = offs[bits >> 3 & 3];
	k->r.len = take(in, 2) % LEN_MAX + 1;
	k->r.cookie = take(in, 1);
	proto_answer_begin(&k->a, &k->r, is_status(k) ? k->extent : NULL, EXTENTS);
}

/* Whether the bytes are in the request, and came before. */
static bool is_inside(const struct asked *k, uint64_t off, uint32_t len)
{
	return off >= k->r.off && (unsigned __int128)off + len <= k->r.off + k->r.len;
}

static bool is_fresh(const struct asked *k, uint64_t off, uint32_t len)
{
	return !memchr(k->came + (off - k->r.off), 1, len);
}

/* How many gaps there are in what has come. */
static unsigned gaps(const struct asked *k)
{
	unsigned n = 0;

	for (size_t i = 0; i < k->r.len; i++)
		n += !k->came[i] && (i == 0 || k->came[i - 1]);
	return n;
}

/* A whole head was refused: there must be a reason. */
static void check_refusal(const struct asked *k, const uint8_t *p)
{
	bool simple = get_be32(p) == NBD_SIMPLE_REPLY_MAGIC;
	uint32_t type, len, bytes = 0;

	if (simple) {
		assert(!get_be32(p + 4) && k->offer.structured);
		return;
	}
	if (get_be32(p) != NBD_STRUCTURED_REPLY_MAGIC || !k->offer.structured)
		return;
	type = get_be16(p + 6);
	len = get_be32(p + 16);
	if (type == NBD_REPLY_TYPE_OFFSET_DATA && len > 8)
		bytes = len - 8;
	else if (type == NBD_REPLY_TYPE_OFFSET_HOLE && len == 12)
		bytes = get_be32(p + 28);
	if (bytes > 0 && bytes <= LEN_MAX && !is_status(k) && is_inside(k, get_be64(p + 20), bytes))
		assert(!is_fresh(k, get_be64(p + 20), bytes) || gaps(k) == PROTO_GAPS_MAX);
	assert(type != NBD_REPLY_TYPE_NONE || len > 0 || !(get_be16(p + 4) & NBD_REPLY_FLAG_DONE));
	if (type == NBD_REPLY_TYPE_ERROR && len == 6)
		assert(get_be32(p + 20) == 0 || get_be16(p + 24) > 0);
	if (type == NBD_REPLY_TYPE_BLOCK_STATUS && len == 12)
		assert(!is_status(k) || k->told || get_be32(p + 20) != ALLOCATION_ID);
}

/* What was taken. */
static void check_reply(struct asked *k, const struct proto_reply *reply, const uint8_t *p)
{
	k->failed |= reply->type == NBD_REPLY_TYPE_ERROR;
	k->told |= reply->type == NBD_REPLY_TYPE_BLOCK_STATUS;
	assert(k->offer.structured == (get_be32(p) == NBD_STRUCTURED_REPLY_MAGIC) ||
	       reply->type == NBD_REPLY_TYPE_ERROR);
	assert(reply->type != NBD_REPLY_TYPE_ERROR || k->a.error);
	assert(reply->type != NBD_REPLY_TYPE_BLOCK_STATUS || is_status(k));
	if (reply->len == 0)
		return;
	assert(!is_status(k) && reply->type != NBD_REPLY_TYPE_ERROR);
	assert(is_inside(k, reply->off, reply->len) && is_fresh(k, reply->off, reply->len));
	assert(reply->payload == (reply->type == NBD_REPLY_TYPE_OFFSET_DATA ? reply->len : 0));
	memset(k->came + (reply->off - k->r.off), 1, reply->len);
}

/*
 * Take the head of a reply as bytes arrive, in memory of exactly that size: it must be the same
 * as from all bytes at once.  False if it is bad, or does not come.
 */
static bool take_reply(struct asked *k, struct proto_reply *reply, struct input *in)
{
	struct proto_answer before = k->a;
	struct proto_reply whole;
	const char *wrong = NULL;
	size_t n = 0;
	uint8_t *p = NULL;

	reply->head = PROTO_REPLY_SIZE;
	while (!wrong && reply->head > n && reply->head <= in->left) {
		struct input copy = *in;

		assert(n == 0 || memcmp(&before, &k->a, sizeof(before)) == 0);
		free(p);
		n = reply->head;
		p = take_bytes(&copy, &n);
		wrong = proto_get_reply(&k->a, &k->offer, p, n, reply);
		assert(wrong || (reply->head >= n && reply->head <= HEAD_MAX));
	}
	free(p);
	if (n == 0 || (!wrong && reply->head > n))
		return false;
	assert(proto_get_reply(&before, &k->offer, in->p, in->left, &whole) == wrong);
	if (wrong) {
		check_refusal(k, in->p);
		return false;
	}
	assert(reply->type == whole.type && reply->last == whole.last && reply->off == whole.off);
	assert(reply->len == whole.len && reply->payload == whole.payload);
	assert(proto_reply_cookie(in->p) == get_be64(in->p + 8));
	check_reply(k, reply, in->p);
	in->p += n;
	in->left -= n;
	return true;
}

/* The payload of a STATUS.  False if it is bad. */
static bool take_extents(struct asked *k, uint32_t payload, struct input *in)
{
	assert(payload > 0 && payload % PROTO_EXTENT_SIZE == 0);
	for (; payload > 0 && in->left >= PROTO_EXTENT_SIZE; payload -= PROTO_EXTENT_SIZE) {
		uint32_t len = get_be32(in->p), flags = get_be32(in->p + 4);
		uint64_t left = k->r.len - k->described;
		unsigned had = k->a.extents;

		if (proto_get_extents(&k->a, in->p, PROTO_EXTENT_SIZE)) {
			assert(len == 0);
			return false;
		}
		assert(len > 0 && k->a.extents == had + (had < EXTENTS && left > 0));
		k->described += len < left ? len : left;
		if (k->a.extents > had) {
			assert(k->extent[had].len == (len < left ? len : left));
			assert(k->extent[had].flags == (flags & 3));
		}
		take(in, PROTO_EXTENT_SIZE);
	}
	return payload == 0;
}

/* After the last reply: an answer without an error is complete, and every byte came once. */
static void check_end(const struct asked *k)
{
	bool complete = is_status(k) ? k->told : !memchr(k->came, 0, k->r.len);

	assert((proto_answer_end(&k->a) == NULL) == (complete || k->failed));
	assert((k->a.error != 0) == k->failed);
}

/* One reply that is here.  False if there are no more. */
static bool take_answer(struct asked *k, struct proto_reply *reply, struct input *in)
{
	if (!take_reply(k, reply, in))
		return false;
	if (reply->type == NBD_REPLY_TYPE_BLOCK_STATUS && !take_extents(k, reply->payload, in))
		return false;
	if (reply->last)
		check_end(k);
	return !reply->last;
}

/* Bytes from a socket: payloads of data are left out. */
static void fuzz_bytes(struct input *in)
{
	struct proto_reply reply;
	struct asked k;

	ask(&k, in);
	while (take_answer(&k, &reply, in)) {
		size_t text = reply.type == NBD_REPLY_TYPE_ERROR ? reply.payload : 0;

		free(take_bytes(in, &text));
	}
}

/* Write a chunk's head, of a few bytes of the input: most of them are nearly good. */
static size_t make_chunk(const struct asked *k, struct input *in, uint8_t *p)
{
	unsigned bits = (unsigned)take(in, 1);
	uint64_t off = k->r.off + take(in, 2) % (LEN_MAX + 16) - 8 * (bits >> 6 & 1);
	uint32_t len = (uint32_t)take(in, 2) % (LEN_MAX + 16);
	static const uint16_t types[8] = {
		NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_DATA,
		NBD_REPLY_TYPE_OFFSET_HOLE, NBD_REPLY_TYPE_OFFSET_HOLE, NBD_REPLY_TYPE_NONE,
		NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_BLOCK_STATUS,
	};
	uint16_t type = types[bits & 7];
	uint8_t *head = p + 20;

	if (type == NBD_REPLY_TYPE_OFFSET_DATA) {
		head = put_be64(head, off);
	} else if (type == NBD_REPLY_TYPE_OFFSET_HOLE) {
		head = put_be32(put_be64(head, off), len);
		len = 0;
	} else if (type == NBD_REPLY_TYPE_ERROR) {
		head = put_be16(put_be32(head, bits >> 4 & 3), 0);
		len = 0;
	} else if (type == NBD_REPLY_TYPE_BLOCK_STATUS) {
		head = put_be32(head, ALLOCATION_ID + (bits >> 6 & 1));
		head = put_be32(put_be32(head, len), bits);
		len = 0;
	} else {
		len = 0;
	}
	p = put_be16(put_be32(p, NBD_STRUCTURED_REPLY_MAGIC), bits >> 7);
	p = put_be64(put_be16(p, type), k->r.cookie);
	put_be32(p, (uint32_t)(head - p - 4) + len);
	return (size_t)(head - p) + 16;
}

static void fuzz_chunks(struct input *in)
{
	uint8_t room[HEAD_MAX + PROTO_EXTENT_SIZE];
	struct proto_reply reply;
	struct asked k;

	ask(&k, in);
	while (in->left > 0) {
		struct input chunk = { room, make_chunk(&k, in, room) };

		if (!take_answer(&k, &reply, &chunk))
			return;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
	static char longest[PROTO_STRING_MAX + 1];
	struct input in = { p, n };

	memset(longest, 'n', PROTO_STRING_MAX);
	switch (take(&in, 1) % 8) {
	case 0:
	case 1:
		fuzz_handshake(&in, "");
		break;
	case 2:
		fuzz_handshake(&in, longest);
		break;
	case 3:
	case 4:
		fuzz_bytes(&in);
		break;
	default:
		fuzz_chunks(&in);
	}
	return 0;
}
