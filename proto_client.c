/*
 * proto_client.c - the client's side of the NBD wire format: see proto.h.
 *
 * A handshake is a state machine, whose state is the option that was sent last.  Each option is sent
 * once.  A length from the wire is checked before so many bytes are wanted.
 */
#include "proto.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum {
	CHUNK_SIZE = 20,

	MIN_BLOCK_MAX = 64 * 1024,	/* "Size constraints" */
	MAX_BLOCK_MIN = 4096,		/* less is of no use */
	TEXT_MAX = 124,			/* of a server's words */
	ERROR_CHUNK_MAX = 6 + 65535 + 8,
	STATUS_CHUNK_MAX = 4 + 1024 * 1024 * PROTO_EXTENT_SIZE,
};

static uint8_t *put_text(uint8_t *p, const char *s)
{
	size_t len = strlen(s);

	memcpy(p, s, len);
	return p + len;
}

static uint8_t *put_string(uint8_t *p, const char *s)
{
	return put_text(put_be32(p, (uint32_t)strlen(s)), s);
}

/* Handshake */

static enum proto_next handshake_fail(struct proto_client *c, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(c->reason, sizeof(c->reason), fmt, ap);
	va_end(ap);
	return PROTO_CLOSE;
}

void proto_client_begin(struct proto_client *c, const char *name)
{
	*c = (struct proto_client){
		.name = name,
		.zeroes = true,
		/* "Size constraints": if nothing else is said. */
		.offer = { .min_block = 1, .max_block = PROTO_MAX_PAYLOAD },
	};
}

/* "Option haggling" */
static enum proto_next send_option(struct proto_client *c, uint32_t opt)
{
	uint8_t *p = c->out + c->out_len, *data = p + PROTO_OPTION_SIZE, *end = data;

	if (opt == NBD_OPT_SET_META_CONTEXT)
		end = put_string(put_be32(put_string(data, c->name), 1), NBD_ALLOCATION);
	else if (opt == NBD_OPT_GO)
		end = put_be16(put_be16(put_string(data, c->name), 1), NBD_INFO_BLOCK_SIZE);
	else if (opt == NBD_OPT_EXPORT_NAME)
		end = put_text(data, c->name);
	p = put_be64(p, NBD_IHAVEOPT);
	p = put_be32(p, opt);
	put_be32(p, (uint32_t)(end - data));
	c->opt = opt;
	c->out_len = (size_t)(end - c->out);
	return PROTO_HAGGLE;
}

static enum proto_next transmit(struct proto_client *c)
{
	struct proto_offer *o = &c->offer;
	uint32_t max = o->max_block < PROTO_MAX_PAYLOAD ? o->max_block : PROTO_MAX_PAYLOAD;

	if (o->size > INT64_MAX)
		return handshake_fail(c, "a size of %llu bytes cannot be",
				      (unsigned long long)o->size);
	if (o->min_block == 0 || o->min_block & (o->min_block - 1) ||
	    o->min_block > MIN_BLOCK_MAX || max < o->min_block || max < MAX_BLOCK_MIN)
		return handshake_fail(c, "block sizes of %lu to %lu bytes cannot be used",
				      (unsigned long)o->min_block, (unsigned long)o->max_block);
	while (max & (max - 1))		/* to a power of two */
		max &= max - 1;
	o->max_block = max;
	if (!(o->flags & NBD_FLAG_HAS_FLAGS))
		o->flags = 0;
	return PROTO_TRANSMIT;
}

static enum proto_next take_export(struct proto_client *c, const uint8_t *size,
				   const uint8_t *flags)
{
	c->offer.size = get_be64(size);
	c->offer.flags = get_be16(flags);
	return transmit(c);
}

/* "Oldstyle negotiation": 16 bits of the flags are ours. */
static enum proto_next take_oldstyle(struct proto_client *c, const uint8_t *in, size_t n)
{
	if (c->name[0])
		return handshake_fail(c, "it is an oldstyle server, which has no export names");
	c->want = PROTO_OLDSTYLE_SIZE;
	return n < c->want ? PROTO_HAGGLE : take_export(c, in + 16, in + 26);
}

static enum proto_next take_greeting(struct proto_client *c, const uint8_t *in, size_t n)
{
	unsigned flags;

	c->want = PROTO_GREETING_SIZE;
	if (n < c->want)
		return PROTO_HAGGLE;
	if (get_be64(in) != NBD_INIT_PASSWD)
		return handshake_fail(c, "it is no NBD server");
	if (get_be64(in + 8) == NBD_OLDSTYLE_MAGIC)
		return take_oldstyle(c, in, n);
	if (get_be64(in + 8) != NBD_IHAVEOPT)
		return handshake_fail(c, "it speaks no known version of NBD");
	flags = get_be16(in + 16) & (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
	c->zeroes = !(flags & NBD_FLAG_NO_ZEROES);
	put_be32(c->out, flags);
	c->out_len = PROTO_CLIENT_FLAGS_SIZE;
	return send_option(c, flags & NBD_FLAG_FIXED_NEWSTYLE ? NBD_OPT_STRUCTURED_REPLY :
								NBD_OPT_EXPORT_NAME);
}

/* What an error reply means, for the log. */
static const char *error_text(uint32_t reply)
{
	/* From NBD_REP_ERR_POLICY on. */
	static const char *const texts[] = {
		"its policy forbids it",
		"it finds the request invalid",
		"its platform cannot do that",
		"it requires TLS, which is not supported",
		"it has no such export",
		"it is shutting down",
		"it requires other block sizes",
		"it finds the request too big",
	};
	uint32_t i = reply - NBD_REP_ERR_POLICY;

	return i < sizeof(texts) / sizeof(texts[0]) ? texts[i] : "it refused";
}

/* All options but GO may be refused.  A server's words go to the log, which masks them. */
static enum proto_next take_refusal(struct proto_client *c, uint32_t reply, const uint8_t *text,
				    uint32_t len)
{
	bool optional = reply != NBD_REP_ERR_TLS_REQD && reply != NBD_REP_ERR_SHUTDOWN;
	bool longer = len > TEXT_MAX;

	if (c->opt == NBD_OPT_GO && reply == NBD_REP_ERR_UNSUP)
		return send_option(c, NBD_OPT_EXPORT_NAME);
	if (c->opt != NBD_OPT_GO && optional) {
		c->offer.allocation = false;
		return send_option(c, NBD_OPT_GO);
	}
	return handshake_fail(c, len ? "%s: \"%.*s%s\"" : "%s", error_text(reply),
			      longer ? TEXT_MAX : (int)len, (const char *)text,
			      longer ? "..." : "");
}

/* "NBD_REP_META_CONTEXT" */
static enum proto_next take_context(struct proto_client *c, const uint8_t *data, uint32_t len)
{
	if (len != 4 + strlen(NBD_ALLOCATION) || c->offer.allocation ||
	    memcmp(data + 4, NBD_ALLOCATION, strlen(NBD_ALLOCATION)) != 0)
		return handshake_fail(c, "it offers a context that was not asked for");
	c->offer.allocation = true;
	c->offer.allocation_id = get_be32(data);
	return PROTO_HAGGLE;
}

/* "NBD_REP_INFO": what we do not know is ignored. */
static enum proto_next take_info(struct proto_client *c, const uint8_t *data, uint32_t len)
{
	unsigned type = len >= 2 ? get_be16(data) : 0;

	if (len < 2 || (type == NBD_INFO_EXPORT && len != 12) ||
	    (type == NBD_INFO_BLOCK_SIZE && len != 14))
		return handshake_fail(c, "it sent information of a wrong size");
	if (type == NBD_INFO_EXPORT) {
		c->told = true;
		c->offer.size = get_be64(data + 2);
		c->offer.flags = get_be16(data + 10);
	} else if (type == NBD_INFO_BLOCK_SIZE) {
		c->offer.min_block = get_be32(data + 2);
		c->offer.max_block = get_be32(data + 10);
	}
	return PROTO_HAGGLE;
}

static enum proto_next take_ack(struct proto_client *c)
{
	switch (c->opt) {
	case NBD_OPT_STRUCTURED_REPLY:
		c->offer.structured = true;
		return send_option(c, NBD_OPT_SET_META_CONTEXT);
	case NBD_OPT_SET_META_CONTEXT:
		return send_option(c, NBD_OPT_GO);
	default:
		return c->told ? transmit(c) :
				 handshake_fail(c, "it did not tell the size of the export");
	}
}

static enum proto_next take_option_reply(struct proto_client *c, const uint8_t *in, size_t n)
{
	const uint8_t *data = in + PROTO_OPTION_REPLY_SIZE;
	unsigned opt = c->opt;
	uint32_t reply, len;

	c->want = PROTO_OPTION_REPLY_SIZE;
	if (n < c->want)
		return PROTO_HAGGLE;
	reply = get_be32(in + 12);
	len = get_be32(in + 16);
	if (get_be64(in) != NBD_OPTION_REPLY_MAGIC || get_be32(in + 8) != opt)
		return handshake_fail(c, "its reply to option %u is malformed", opt);
	if (len > PROTO_OPTION_MAX)
		return handshake_fail(c, "its reply to option %u is too long", opt);
	c->want += len;
	if (n < c->want)
		return PROTO_HAGGLE;
	if (reply & NBD_REP_ERR(0))
		return take_refusal(c, reply, data, len);
	if (reply == NBD_REP_ACK && len == 0)
		return take_ack(c);
	if (reply == NBD_REP_META_CONTEXT && opt == NBD_OPT_SET_META_CONTEXT)
		return take_context(c, data, len);
	if (reply == NBD_REP_INFO && opt == NBD_OPT_GO)
		return take_info(c, data, len);
	return handshake_fail(c, "it answered option %u by %lu", opt, (unsigned long)reply);
}

enum proto_next proto_client_take(struct proto_client *c, const uint8_t *in, size_t n)
{
	c->out_len = 0;
	switch (c->opt) {
	case 0:
		return take_greeting(c, in, n);
	case NBD_OPT_EXPORT_NAME:
		c->want = PROTO_EXPORT_SIZE + (c->zeroes ? PROTO_ZEROES_SIZE : 0);
		return n < c->want ? PROTO_HAGGLE : take_export(c, in, in + 8);
	default:
		return take_option_reply(c, in, n);
	}
}

/* Transmission */

void proto_put_request(const struct proto_request *r, uint8_t *p)
{
	p = put_be32(p, NBD_REQUEST_MAGIC);
	p = put_be16(p, r->flags);
	p = put_be16(p, r->cmd);
	p = put_be64(p, r->cookie);
	p = put_be64(p, r->off);
	put_be32(p, (uint32_t)r->len);
}

/* The chunk types, with the part of their data that is always there, and the bounds of all. */
static const struct chunk_kind {
	uint16_t type;
	uint32_t head, min, max;
} chunk_kinds[] = {
	{ NBD_REPLY_TYPE_NONE, 0, 0, 0 },
	{ NBD_REPLY_TYPE_OFFSET_DATA, 8, 9, 8 + PROTO_MAX_PAYLOAD },
	{ NBD_REPLY_TYPE_OFFSET_HOLE, 12, 12, 12 },
	{ NBD_REPLY_TYPE_BLOCK_STATUS, 4, 12, STATUS_CHUNK_MAX },
	{ NBD_REPLY_TYPE_ERROR, 6, 6, ERROR_CHUNK_MAX },
};

/* "Error chunk": all types with the highest bit are errors, known to us or not. */
static const struct chunk_kind *find_chunk(uint16_t type)
{
	if (type & 1 << 15)
		type = NBD_REPLY_TYPE_ERROR;
	for (size_t i = 0; i < sizeof(chunk_kinds) / sizeof(chunk_kinds[0]); i++)
		if (chunk_kinds[i].type == type)
			return &chunk_kinds[i];
	return NULL;
}

void proto_answer_begin(struct proto_answer *a, const struct proto_request *r,
			struct extent *extent, unsigned room)
{
	*a = (struct proto_answer){
		.gaps = extent ? 0 : 1,
		.gap = { { r->off, r->off + r->len } },
		.extent = extent,
		.room = room,
		.left = r->len,
	};
}

/* Data or a hole comes: it lies inside one gap, and the rest of that remains. */
static const char *fill_gap(struct proto_answer *a, struct proto_reply *r, uint64_t off,
			    uint32_t len)
{
	struct proto_gap *gap = a->gap, *end = a->gap + a->gaps, behind;

	/* Ranges are tested without addition. */
	while (gap < end && (off < gap->from || off >= gap->to || len > gap->to - off))
		gap++;
	if (gap == end || len == 0)
		return "it sent data that was not asked for, or that came before";
	behind = (struct proto_gap){ off + len, gap->to };
	gap->to = off;
	if (gap->from == off)
		*gap = a->gap[--a->gaps];
	if (behind.from < behind.to && a->gaps == PROTO_GAPS_MAX)
		return "it sent too many pieces in disorder";
	if (behind.from < behind.to)
		a->gap[a->gaps++] = behind;
	r->off = off;
	r->len = len;
	return NULL;
}

/* Take a chunk; p is behind its header. */
static const char *take_chunk(struct proto_answer *a, const struct proto_offer *offer,
			      const uint8_t *p, struct proto_reply *r)
{
	switch (r->type) {
	case NBD_REPLY_TYPE_NONE:
		return r->last ? NULL : "it sent an empty chunk that is not the last";
	case NBD_REPLY_TYPE_OFFSET_DATA:
		return fill_gap(a, r, get_be64(p), r->payload);
	case NBD_REPLY_TYPE_OFFSET_HOLE:
		return fill_gap(a, r, get_be64(p), get_be32(p + 8));
	case NBD_REPLY_TYPE_BLOCK_STATUS:
		if (!a->extent || a->extents > 0 || get_be32(p) != offer->allocation_id)
			return "it sent a status that was not asked for";
		return r->payload % PROTO_EXTENT_SIZE ? "it sent half an extent" : NULL;
	default:
		if (get_be32(p) == 0)
			return "it sent an error chunk without an error";
		a->error = get_be32(p);
		return get_be16(p + 4) > r->payload ? "it sent a text longer than its chunk" : NULL;
	}
}

/* "Structured reply chunk message" */
static const char *get_chunk(struct proto_answer *a, const struct proto_offer *offer,
			     const uint8_t *p, size_t n, struct proto_reply *r)
{
	const struct chunk_kind *kind;
	uint32_t len;

	r->head = CHUNK_SIZE;
	if (n < CHUNK_SIZE)
		return NULL;
	kind = find_chunk(get_be16(p + 6));
	if (!kind)
		return "it sent a chunk of an unknown type";
	len = get_be32(p + 16);
	if (len < kind->min || len > kind->max)
		return "it sent a chunk of a wrong size";
	r->head += kind->head;
	r->type = kind->type;
	r->last = get_be16(p + 4) & NBD_REPLY_FLAG_DONE;
	r->payload = len - kind->head;
	return n < r->head ? NULL : take_chunk(a, offer, p + CHUNK_SIZE, r);
}

/* "Simple reply message": without an error all of the data follows. */
static const char *get_simple(struct proto_answer *a, const struct proto_offer *offer,
			      const uint8_t *p, struct proto_reply *r)
{
	r->last = true;
	r->type = NBD_REPLY_TYPE_ERROR;
	if (get_be32(p + 4)) {
		a->error = get_be32(p + 4);
		return NULL;
	}
	if (offer->structured)
		return "it sent a simple reply where a structured one is due";
	r->type = NBD_REPLY_TYPE_OFFSET_DATA;
	r->payload = (uint32_t)a->left;
	return fill_gap(a, r, a->gap[0].from, r->payload);
}

const char *proto_get_reply(struct proto_answer *a, const struct proto_offer *offer,
			    const uint8_t *p, size_t n, struct proto_reply *r)
{
	bool simple = get_be32(p) == NBD_SIMPLE_REPLY_MAGIC;

	*r = (struct proto_reply){ .head = PROTO_REPLY_SIZE };
	if (!simple && get_be32(p) != NBD_STRUCTURED_REPLY_MAGIC)
		return "it sent a wrong magic number";
	if (!a)
		return "it answered what was not asked";
	if (simple)
		return get_simple(a, offer, p, r);
	if (!offer->structured)
		return "it sent a structured reply that was not negotiated";
	return get_chunk(a, offer, p, n, r);
}

const char *proto_get_extents(struct proto_answer *a, const uint8_t *p, size_t n)
{
	for (; n > 0; n -= PROTO_EXTENT_SIZE, p += PROTO_EXTENT_SIZE) {
		struct extent e = { get_be32(p), get_be32(p + 4) & (NBD_STATE_HOLE | NBD_STATE_ZERO) };

		if (e.len == 0)
			return "it sent an extent of 0 bytes";
		if (e.len > a->left)
			e.len = a->left;
		a->left -= e.len;
		if (e.len > 0 && a->extents < a->room)
			a->extent[a->extents++] = e;
	}
	return NULL;
}

const char *proto_answer_end(const struct proto_answer *a)
{
	if (!a->error && (a->gaps > 0 || (a->extent && a->extents == 0)))
		return "it sent less than was asked for";
	return NULL;
}
