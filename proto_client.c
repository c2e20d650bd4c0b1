/*
 * proto_client.c - the client's side of the NBD wire format: see proto_client.h.
 *
 * A handshake is a state machine that says how many bytes it wants next; every length from the
 * wire is checked before it wants that many.
 */
#include "proto_client.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum {
	MAGIC_SIZE = 16,	/* the two that every server sends first */
	HANDSHAKE_FLAGS_SIZE = 2,
	OPTION_REPLY_SIZE = 20,
	EXPORT_SIZE = 10,
	ZEROES_SIZE = 124,
	SIMPLE_REPLY_SIZE = 16,
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

static enum proto_next await(struct proto_client *c, enum proto_client_state state, size_t n)
{
	c->state = state;
	c->want = n;
	return PROTO_HAGGLE;
}

void proto_client_begin(struct proto_client *c, const char *name, uint8_t *out)
{
	*c = (struct proto_client){
		.name = name,
		.out = out,
		.zeroes = true,
		/* "Size constraints": if nothing else is said. */
		.offer = { .min_block = 1, .max_block = PROTO_MAX_PAYLOAD },
	};
	await(c, PROTO_CLIENT_GREETING, MAGIC_SIZE);
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
	if (opt == NBD_OPT_EXPORT_NAME)
		return await(c, PROTO_CLIENT_EXPORT, EXPORT_SIZE + (c->zeroes ? ZEROES_SIZE : 0));
	return await(c, PROTO_CLIENT_REPLY, OPTION_REPLY_SIZE);
}

static enum proto_next take_magic(struct proto_client *c, const uint8_t *in)
{
	if (get_be64(in) != NBD_INIT_PASSWD)
		return handshake_fail(c, "it is no NBD server");
	if (get_be64(in + 8) == NBD_OLDSTYLE_MAGIC && c->name[0])
		return handshake_fail(c, "it is an oldstyle server, which has no export names");
	if (get_be64(in + 8) == NBD_OLDSTYLE_MAGIC)
		return await(c, PROTO_CLIENT_OLDSTYLE, PROTO_OLDSTYLE_SIZE - MAGIC_SIZE);
	if (get_be64(in + 8) != NBD_IHAVEOPT)
		return handshake_fail(c, "it speaks no known version of NBD");
	return await(c, PROTO_CLIENT_FLAGS, HANDSHAKE_FLAGS_SIZE);
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
	c->name = NULL;
	return PROTO_TRANSMIT;
}

static enum proto_next take_flags(struct proto_client *c, const uint8_t *in)
{
	unsigned flags = get_be16(in) & (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);

	c->zeroes = !(flags & NBD_FLAG_NO_ZEROES);
	put_be32(c->out, flags);
	c->out_len = PROTO_CLIENT_FLAGS_SIZE;
	return send_option(c, flags & NBD_FLAG_FIXED_NEWSTYLE ? NBD_OPT_STRUCTURED_REPLY :
								NBD_OPT_EXPORT_NAME);
}

/* Size and flags, which have 32 bits where the server is oldstyle. */
static enum proto_next take_export(struct proto_client *c, const uint8_t *in)
{
	c->offer.size = get_be64(in);
	c->offer.flags = get_be16(in + (c->state == PROTO_CLIENT_OLDSTYLE ? 10 : 8));
	return transmit(c);
}

/* What an error reply means, for the log. */
static const char *error_text(uint32_t reply)
{
	/* NBD_REP_ERR_UNSUP is the first, those after it follow. */
	static const char *const texts[] = {
		"it does not know the option",
		"its policy forbids it",
		"it finds the request invalid",
		"its platform cannot do that",
		"it requires TLS, which is not supported",
		"it has no such export",
		"it is shutting down",
		"it requires other block sizes",
		"it finds the request too big",
	};
	uint32_t i = reply - NBD_REP_ERR_UNSUP;

	return i < sizeof(texts) / sizeof(texts[0]) ? texts[i] : "it refused";
}

/* All options but GO may be refused.  A server's words go to the log, which masks them. */
static enum proto_next take_refusal(struct proto_client *c, const uint8_t *in)
{
	bool optional = c->reply != NBD_REP_ERR_TLS_REQD && c->reply != NBD_REP_ERR_SHUTDOWN;
	bool longer = c->reply_len > TEXT_MAX;

	if (c->opt == NBD_OPT_GO && c->reply == NBD_REP_ERR_UNSUP)
		return send_option(c, NBD_OPT_EXPORT_NAME);
	if (c->opt != NBD_OPT_GO && optional) {
		c->offer.allocation = false;
		return send_option(c, NBD_OPT_GO);
	}
	return handshake_fail(c, c->reply_len ? "%s: \"%.*s%s\"" : "%s", error_text(c->reply),
			      longer ? TEXT_MAX : (int)c->reply_len, (const char *)in,
			      longer ? "..." : "");
}

/* "NBD_REP_META_CONTEXT" */
static enum proto_next take_context(struct proto_client *c, const uint8_t *in)
{
	if (c->reply_len != 4 + strlen(NBD_ALLOCATION) || c->offer.allocation ||
	    memcmp(in + 4, NBD_ALLOCATION, strlen(NBD_ALLOCATION)) != 0)
		return handshake_fail(c, "it offers a context that was not asked for");
	c->offer.allocation = true;
	c->offer.allocation_id = get_be32(in);
	return await(c, PROTO_CLIENT_REPLY, OPTION_REPLY_SIZE);
}

/* "NBD_REP_INFO": what we do not know is ignored. */
static enum proto_next take_info(struct proto_client *c, const uint8_t *in)
{
	unsigned type = c->reply_len >= 2 ? get_be16(in) : 0;

	if (c->reply_len < 2 || (type == NBD_INFO_EXPORT && c->reply_len != 12) ||
	    (type == NBD_INFO_BLOCK_SIZE && c->reply_len != 14))
		return handshake_fail(c, "it sent information of a wrong size");
	if (type == NBD_INFO_EXPORT) {
		c->told = true;
		c->offer.size = get_be64(in + 2);
		c->offer.flags = get_be16(in + 10);
	} else if (type == NBD_INFO_BLOCK_SIZE) {
		c->offer.min_block = get_be32(in + 2);
		c->offer.max_block = get_be32(in + 10);
	}
	return await(c, PROTO_CLIENT_REPLY, OPTION_REPLY_SIZE);
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

/* A whole reply to the option that was sent last. */
static enum proto_next take_reply_data(struct proto_client *c, const uint8_t *in)
{
	if (c->reply & NBD_REP_ERR(0))
		return take_refusal(c, in);
	if (c->reply == NBD_REP_ACK && c->reply_len == 0)
		return take_ack(c);
	if (c->reply == NBD_REP_META_CONTEXT && c->opt == NBD_OPT_SET_META_CONTEXT)
		return take_context(c, in);
	if (c->reply == NBD_REP_INFO && c->opt == NBD_OPT_GO)
		return take_info(c, in);
	return handshake_fail(c, "it answered option %u by %lu", (unsigned)c->opt,
			      (unsigned long)c->reply);
}

static enum proto_next take_reply(struct proto_client *c, const uint8_t *in)
{
	c->reply = get_be32(in + 12);
	c->reply_len = get_be32(in + 16);
	if (get_be64(in) != NBD_OPTION_REPLY_MAGIC || get_be32(in + 8) != c->opt)
		return handshake_fail(c, "its reply to option %u is malformed", (unsigned)c->opt);
	if (c->reply_len > PROTO_CLIENT_TAKE_MAX)
		return handshake_fail(c, "its reply to option %u is too long", (unsigned)c->opt);
	if (c->reply_len == 0)
		return take_reply_data(c, in);
	return await(c, PROTO_CLIENT_REPLY_DATA, c->reply_len);
}

enum proto_next proto_client_take(struct proto_client *c, const uint8_t *in)
{
	c->out_len = 0;
	switch (c->state) {
	case PROTO_CLIENT_GREETING:
		return take_magic(c, in);
	case PROTO_CLIENT_FLAGS:
		return take_flags(c, in);
	case PROTO_CLIENT_REPLY:
		return take_reply(c, in);
	case PROTO_CLIENT_REPLY_DATA:
		return take_reply_data(c, in);
	default:
		return take_export(c, in);
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

/* Take what stands at p, after the header of a chunk with len bytes. */
static const char *get_chunk_head(const uint8_t *p, uint32_t len, struct proto_reply *r)
{
	switch (r->type) {
	case NBD_REPLY_TYPE_NONE:
		return r->last ? NULL : "it sent an empty chunk that is not the last";
	case NBD_REPLY_TYPE_OFFSET_DATA:
		r->off = get_be64(p);
		r->len = r->payload;
		return NULL;
	case NBD_REPLY_TYPE_OFFSET_HOLE:
		r->off = get_be64(p);
		r->len = get_be32(p + 8);
		return r->len ? NULL : "it sent a hole of 0 bytes";
	case NBD_REPLY_TYPE_BLOCK_STATUS:
		r->context = get_be32(p);
		return r->payload % PROTO_EXTENT_SIZE ? "it sent half an extent" : NULL;
	default:
		r->error = get_be32(p);
		if (r->error == 0)
			return "it sent an error chunk without an error";
		return get_be16(p + 4) > len - 6 ? "it sent a text longer than its chunk" : NULL;
	}
}

/* "Structured reply chunk message" */
static const char *get_chunk(const uint8_t *p, size_t n, struct proto_reply *r)
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
	r->type = kind->type;
	r->head += kind->head;
	r->last = get_be16(p + 4) & NBD_REPLY_FLAG_DONE;
	r->cookie = get_be64(p + 8);
	r->payload = len - kind->head;
	return n < r->head ? NULL : get_chunk_head(p + CHUNK_SIZE, len, r);
}

const char *proto_get_reply(const uint8_t *p, size_t n, struct proto_reply *r)
{
	memset(r, 0, sizeof(*r));
	r->head = SIMPLE_REPLY_SIZE;
	if (n < SIMPLE_REPLY_SIZE)
		return NULL;
	if (get_be32(p) == NBD_STRUCTURED_REPLY_MAGIC)
		return get_chunk(p, n, r);
	if (get_be32(p) != NBD_SIMPLE_REPLY_MAGIC)
		return "it sent a wrong magic number";
	r->simple = true;
	r->last = true;
	r->error = get_be32(p + 4);
	r->cookie = get_be64(p + 8);
	return NULL;
}

void proto_answer_begin(struct proto_answer *a, const struct proto_request *r)
{
	*a = (struct proto_answer){
		.off = r->off,
		.len = (uint32_t)r->len,
		.status = r->cmd == NBD_CMD_BLOCK_STATUS,
	};
}

/* Mark a part of the request, from before to, as having come. */
static const char *cover(struct proto_answer *a, uint32_t from, uint32_t to)
{
	for (unsigned i = 0; i < a->pieces;) {
		uint32_t here = a->piece[i].from, end = a->piece[i].to;

		if (from < end && here < to)
			return "it sent data that came before";
		if (end == from)
			from = here;
		else if (here == to)
			to = end;
		else {
			i++;
			continue;
		}
		a->piece[i] = a->piece[--a->pieces];
	}
	if (a->pieces == PROTO_PIECES_MAX)
		return "it sent too many pieces in disorder";
	a->piece[a->pieces].from = from;
	a->piece[a->pieces++].to = to;
	return NULL;
}

/* Data or a hole: ranges are tested without addition. */
static const char *add_range(struct proto_answer *a, const struct proto_reply *r)
{
	uint64_t from = r->off - a->off;

	if (a->status)
		return "it sent data in reply to a status request";
	if (r->off < a->off || from > a->len || r->len > a->len - from)
		return "it sent data that was not asked for";
	return cover(a, (uint32_t)from, (uint32_t)from + r->len);
}

const char *proto_answer_add(struct proto_answer *a, const struct proto_offer *offer,
			     struct proto_reply *r)
{
	if (!r->simple && !offer->structured)
		return "it sent a structured reply that was not negotiated";
	if (r->error && !a->error)
		a->error = r->error;
	if (r->simple && !r->error) {
		if (offer->structured)
			return "it sent a simple reply where a structured one is due";
		r->off = a->off;
		r->len = r->payload = a->len;
	}
	if (r->type == NBD_REPLY_TYPE_BLOCK_STATUS &&
	    (!a->status || a->described > 0 || r->context != offer->allocation_id))
		return "it sent a status that was not asked for";
	return r->len > 0 ? add_range(a, r) : NULL;
}

const char *proto_answer_extent(struct proto_answer *a, const uint8_t *p, struct extent *e)
{
	uint64_t left = a->len - a->described;

	e->len = get_be32(p);
	e->flags = get_be32(p + 4) & (NBD_STATE_HOLE | NBD_STATE_ZERO);
	if (e->len == 0)
		return "it sent an extent of 0 bytes";
	if (e->len > left)
		e->len = left;
	a->described += e->len;
	return NULL;
}

const char *proto_answer_end(const struct proto_answer *a)
{
	if (a->error)
		return NULL;
	if (a->status)
		return a->described ? NULL : "it sent no status";
	if (a->pieces != 1 || a->piece[0].to - a->piece[0].from != a->len)
		return "it sent less data than was asked for";
	return NULL;
}
