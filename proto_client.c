/*
 * proto_client.c - the client's side of the NBD wire format: see proto_client.h.
 *
 * A handshake is a state machine that says how many bytes it wants next; every length from the
 * wire is checked before it wants that many.
 */
#include "proto_client.h"

#include <assert.h>
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

	REPLIES_MAX = 64,		/* to one option */
	MIN_BLOCK_MAX = 64 * 1024,	/* "Size constraints" */
	MAX_BLOCK_MIN = 4096,		/* less is of no use */
	TEXT_MAX = 128,			/* of a server's words */
	ERROR_CHUNK_MAX = 6 + 65535 + 8,
	STATUS_CHUNK_MAX = 4 + 1024 * 1024 * PROTO_EXTENT_SIZE,
};

static const char allocation[] = NBD_ALLOCATION;

static uint8_t *put_string(uint8_t *p, const char *s)
{
	size_t len = strlen(s);

	p = put_be32(p, (uint32_t)len);
	memcpy(p, s, len);
	return p + len;
}

/* Handshake */

static enum proto_next fail(struct proto_client *c, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(c->reason, sizeof(c->reason), fmt, ap);
	va_end(ap);
	return PROTO_CLOSE;
}

/* A server's words, fit for a log. */
static void clean_text(char *text, const uint8_t *p, size_t len)
{
	size_t n = len < TEXT_MAX ? len : TEXT_MAX - 1;

	for (size_t i = 0; i < n; i++)
		text[i] = p[i] >= 0x20 && p[i] < 0x7f ? (char)p[i] : '?';
	text[n] = '\0';
	if (n < len)
		strcpy(text + n - 3, "...");
}

static enum proto_next want(struct proto_client *c, enum proto_client_state state, size_t n)
{
	c->state = state;
	c->want = n;
	return PROTO_HAGGLE;
}

void proto_client_begin(struct proto_client *c, const char *name)
{
	memset(c, 0, sizeof(*c));
	c->name = name;
	c->zeroes = true;
	c->offer.min_block = 1;		/* "Size constraints": if nothing else is said */
	c->offer.max_block = PROTO_MAX_PAYLOAD;
	want(c, PROTO_CLIENT_GREETING, MAGIC_SIZE);
}

/* "Option haggling": the data of one option.  Returns where it ends. */
static uint8_t *put_option_data(const struct proto_client *c, uint8_t *p)
{
	size_t len = strlen(c->name);

	switch (c->opt) {
	case NBD_OPT_SET_META_CONTEXT:
		p = put_string(p, c->name);
		p = put_be32(p, 1);
		return put_string(p, allocation);
	case NBD_OPT_GO:
		p = put_string(p, c->name);
		p = put_be16(p, 1);
		return put_be16(p, NBD_INFO_BLOCK_SIZE);
	case NBD_OPT_EXPORT_NAME:
		memcpy(p, c->name, len);
		return p + len;
	default:
		return p;
	}
}

static enum proto_next ask(struct proto_client *c, uint32_t opt, uint8_t *out, size_t *len)
{
	uint8_t *p = out + *len, *data = p + PROTO_OPTION_SIZE, *end;

	c->opt = opt;
	c->replies = 0;
	end = put_option_data(c, data);
	p = put_be64(p, NBD_IHAVEOPT);
	p = put_be32(p, opt);
	put_be32(p, (uint32_t)(end - data));
	*len = (size_t)(end - out);
	if (opt == NBD_OPT_EXPORT_NAME)
		return want(c, PROTO_CLIENT_EXPORT, EXPORT_SIZE + (c->zeroes ? ZEROES_SIZE : 0));
	return want(c, PROTO_CLIENT_REPLY, OPTION_REPLY_SIZE);
}

static enum proto_next take_magic(struct proto_client *c, const uint8_t *in)
{
	if (get_be64(in) != NBD_INIT_PASSWD)
		return fail(c, "it is no NBD server");
	if (get_be64(in + 8) == NBD_OLDSTYLE_MAGIC)
		return want(c, PROTO_CLIENT_OLDSTYLE, PROTO_OLDSTYLE_SIZE - MAGIC_SIZE);
	if (get_be64(in + 8) != NBD_IHAVEOPT)
		return fail(c, "it speaks no known version of NBD");
	return want(c, PROTO_CLIENT_FLAGS, HANDSHAKE_FLAGS_SIZE);
}

static uint32_t power_of_two_below(uint32_t n)
{
	while (n & (n - 1))
		n &= n - 1;
	return n;
}

static enum proto_next transmit(struct proto_client *c)
{
	struct proto_offer *o = &c->offer;
	uint32_t max = o->max_block;

	if (o->size > INT64_MAX)
		return fail(c, "a size of %llu bytes cannot be", (unsigned long long)o->size);
	if (o->min_block == 0 || o->min_block & (o->min_block - 1) ||
	    o->min_block > MIN_BLOCK_MAX || max < o->min_block || max < MAX_BLOCK_MIN)
		return fail(c, "block sizes of %lu to %lu bytes cannot be used",
			    (unsigned long)o->min_block, (unsigned long)max);
	if (!(o->flags & NBD_FLAG_HAS_FLAGS))
		o->flags = 0;
	o->max_block = max > PROTO_MAX_PAYLOAD ? PROTO_MAX_PAYLOAD : power_of_two_below(max);
	c->name = NULL;
	return PROTO_TRANSMIT;
}

static enum proto_next take_oldstyle(struct proto_client *c, const uint8_t *in)
{
	if (c->name[0])
		return fail(c, "it is an oldstyle server, which has no export names");
	c->offer.size = get_be64(in);
	c->offer.flags = get_be16(in + 10);
	return transmit(c);
}

static enum proto_next take_flags(struct proto_client *c, const uint8_t *in, uint8_t *out,
				  size_t *len)
{
	unsigned flags = get_be16(in) & (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);

	c->zeroes = !(flags & NBD_FLAG_NO_ZEROES);
	put_be32(out, flags);
	*len = PROTO_CLIENT_FLAGS_SIZE;
	return ask(c, flags & NBD_FLAG_FIXED_NEWSTYLE ? NBD_OPT_STRUCTURED_REPLY :
							NBD_OPT_EXPORT_NAME, out, len);
}

static enum proto_next take_export(struct proto_client *c, const uint8_t *in)
{
	c->offer.size = get_be64(in);
	c->offer.flags = get_be16(in + 8);
	return transmit(c);
}

/* What an error reply means, for the log. */
static const char *error_text(uint32_t reply)
{
	switch (reply) {
	case NBD_REP_ERR_UNSUP:
		return "it does not know the option";
	case NBD_REP_ERR_POLICY:
		return "its policy forbids it";
	case NBD_REP_ERR_INVALID:
		return "it finds the request invalid";
	case NBD_REP_ERR_PLATFORM:
		return "its platform cannot do that";
	case NBD_REP_ERR_TLS_REQD:
		return "it requires TLS, which is not supported";
	case NBD_REP_ERR_UNKNOWN:
		return "it has no such export";
	case NBD_REP_ERR_SHUTDOWN:
		return "it is shutting down";
	case NBD_REP_ERR_BLOCK_SIZE_REQD:
		return "it requires other block sizes";
	case NBD_REP_ERR_TOO_BIG:
		return "it finds the request too big";
	default:
		return "it refused";
	}
}

static enum proto_next take_refusal(struct proto_client *c, const uint8_t *in, uint8_t *out,
				    size_t *len)
{
	bool optional = c->reply != NBD_REP_ERR_TLS_REQD && c->reply != NBD_REP_ERR_SHUTDOWN;
	char text[TEXT_MAX];

	if (c->opt == NBD_OPT_GO && c->reply == NBD_REP_ERR_UNSUP)
		return ask(c, NBD_OPT_EXPORT_NAME, out, len);
	if (c->opt != NBD_OPT_GO && optional) {
		c->offer.allocation = false;
		return ask(c, NBD_OPT_GO, out, len);
	}
	clean_text(text, in, c->reply_len);
	return fail(c, text[0] ? "%s: \"%s\"" : "%s", error_text(c->reply), text);
}

static enum proto_next again(struct proto_client *c)
{
	return want(c, PROTO_CLIENT_REPLY, OPTION_REPLY_SIZE);
}

/* "NBD_REP_META_CONTEXT" */
static enum proto_next take_context(struct proto_client *c, const uint8_t *in)
{
	if (c->reply_len != 4 + strlen(allocation) || c->offer.allocation ||
	    memcmp(in + 4, allocation, strlen(allocation)) != 0)
		return fail(c, "it offers a context that was not asked for");
	c->offer.allocation = true;
	c->offer.allocation_id = get_be32(in);
	return again(c);
}

/* "NBD_REP_INFO": what we do not know is ignored. */
static enum proto_next take_info(struct proto_client *c, const uint8_t *in)
{
	unsigned type = c->reply_len >= 2 ? get_be16(in) : 0;

	if (c->reply_len < 2 || (type == NBD_INFO_EXPORT && c->reply_len != 12) ||
	    (type == NBD_INFO_BLOCK_SIZE && c->reply_len != 14))
		return fail(c, "it sent information of a wrong size");
	if (type == NBD_INFO_EXPORT) {
		c->told = true;
		c->offer.size = get_be64(in + 2);
		c->offer.flags = get_be16(in + 10);
	} else if (type == NBD_INFO_BLOCK_SIZE) {
		c->offer.min_block = get_be32(in + 2);
		c->offer.max_block = get_be32(in + 10);
	}
	return again(c);
}

static enum proto_next take_ack(struct proto_client *c, uint8_t *out, size_t *len)
{
	switch (c->opt) {
	case NBD_OPT_STRUCTURED_REPLY:
		c->offer.structured = true;
		return ask(c, NBD_OPT_SET_META_CONTEXT, out, len);
	case NBD_OPT_SET_META_CONTEXT:
		return ask(c, NBD_OPT_GO, out, len);
	default:
		return c->told ? transmit(c) : fail(c, "it did not tell the size of the export");
	}
}

/* A whole reply to the option that was sent last. */
static enum proto_next take_reply_data(struct proto_client *c, const uint8_t *in, uint8_t *out,
				       size_t *len)
{
	if (c->reply & NBD_REP_ERR(0))
		return take_refusal(c, in, out, len);
	if (c->reply == NBD_REP_ACK && c->reply_len == 0)
		return take_ack(c, out, len);
	if (c->reply == NBD_REP_META_CONTEXT && c->opt == NBD_OPT_SET_META_CONTEXT)
		return take_context(c, in);
	if (c->reply == NBD_REP_INFO && c->opt == NBD_OPT_GO)
		return take_info(c, in);
	return fail(c, "it answered option %u by %lu", (unsigned)c->opt, (unsigned long)c->reply);
}

static enum proto_next take_reply(struct proto_client *c, const uint8_t *in, uint8_t *out,
				  size_t *len)
{
	c->reply = get_be32(in + 12);
	c->reply_len = get_be32(in + 16);
	if (get_be64(in) != NBD_OPTION_REPLY_MAGIC || get_be32(in + 8) != c->opt)
		return fail(c, "its reply to option %u is malformed", (unsigned)c->opt);
	if (c->reply_len > PROTO_CLIENT_TAKE_MAX || ++c->replies > REPLIES_MAX)
		return fail(c, "it says too much in reply to option %u", (unsigned)c->opt);
	if (c->reply_len == 0)
		return take_reply_data(c, in, out, len);
	return want(c, PROTO_CLIENT_REPLY_DATA, c->reply_len);
}

enum proto_next proto_client_take(struct proto_client *c, const uint8_t *in, uint8_t *out,
				  size_t *len)
{
	*len = 0;
	switch (c->state) {
	case PROTO_CLIENT_GREETING:
		return take_magic(c, in);
	case PROTO_CLIENT_OLDSTYLE:
		return take_oldstyle(c, in);
	case PROTO_CLIENT_FLAGS:
		return take_flags(c, in, out, len);
	case PROTO_CLIENT_REPLY:
		return take_reply(c, in, out, len);
	case PROTO_CLIENT_REPLY_DATA:
		return take_reply_data(c, in, out, len);
	case PROTO_CLIENT_EXPORT:
		return take_export(c, in);
	}
	return PROTO_CLOSE;
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
	enum proto_reply_kind kind;
	uint32_t head, min, max;
} chunk_kinds[] = {
	{ NBD_REPLY_TYPE_NONE, PROTO_REPLY_NONE, 0, 0, 0 },
	{ NBD_REPLY_TYPE_OFFSET_DATA, PROTO_REPLY_DATA, 8, 9, 8 + PROTO_MAX_PAYLOAD },
	{ NBD_REPLY_TYPE_OFFSET_HOLE, PROTO_REPLY_HOLE, 12, 12, 12 },
	{ NBD_REPLY_TYPE_BLOCK_STATUS, PROTO_REPLY_STATUS, 4, 12, STATUS_CHUNK_MAX },
	{ NBD_REPLY_TYPE_ERROR, PROTO_REPLY_ERROR, 6, 6, ERROR_CHUNK_MAX },
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
	switch (r->kind) {
	case PROTO_REPLY_NONE:
		return r->last ? NULL : "it sent an empty chunk that is not the last";
	case PROTO_REPLY_DATA:
		r->off = get_be64(p);
		r->len = r->payload;
		return NULL;
	case PROTO_REPLY_HOLE:
		r->off = get_be64(p);
		r->len = get_be32(p + 8);
		return r->len ? NULL : "it sent a hole of 0 bytes";
	case PROTO_REPLY_STATUS:
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
	r->kind = kind->kind;
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
	r->kind = PROTO_REPLY_SIMPLE;
	r->last = true;
	r->error = get_be32(p + 4);
	r->cookie = get_be64(p + 8);
	return NULL;
}

void proto_answer_begin(struct proto_answer *a, const struct proto_request *r)
{
	a->off = r->off;
	a->len = (uint32_t)r->len;
	a->status = r->cmd == NBD_CMD_BLOCK_STATUS;
	a->told = false;
	a->error = 0;
	a->described = 0;
	a->pieces = 0;
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

/* DATA and HOLE: ranges are tested without addition. */
static const char *add_range(struct proto_answer *a, const struct proto_reply *r)
{
	uint64_t from = r->off - a->off;

	if (a->status)
		return "it sent data in reply to a status request";
	if (r->off < a->off || from > a->len || r->len > a->len - from)
		return "it sent data that was not asked for";
	return cover(a, (uint32_t)from, (uint32_t)from + r->len);
}

static const char *add_simple(struct proto_answer *a, const struct proto_offer *offer,
			      struct proto_reply *r)
{
	if (r->error)
		return NULL;
	if (offer->structured)
		return "it sent a simple reply where a structured one is due";
	r->off = a->off;
	r->len = r->payload = a->len;
	return add_range(a, r);
}

static const char *add_status(struct proto_answer *a, const struct proto_offer *offer,
			      const struct proto_reply *r)
{
	if (!a->status || a->told || r->context != offer->allocation_id)
		return "it sent a status that was not asked for";
	a->told = true;
	return NULL;
}

const char *proto_answer_add(struct proto_answer *a, const struct proto_offer *offer,
			     struct proto_reply *r)
{
	if (r->kind != PROTO_REPLY_SIMPLE && !offer->structured)
		return "it sent a structured reply that was not negotiated";
	if (r->error && !a->error)
		a->error = r->error;
	switch (r->kind) {
	case PROTO_REPLY_SIMPLE:
		return add_simple(a, offer, r);
	case PROTO_REPLY_DATA:
	case PROTO_REPLY_HOLE:
		return add_range(a, r);
	case PROTO_REPLY_STATUS:
		return add_status(a, offer, r);
	default:
		return NULL;
	}
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
		return a->told ? NULL : "it sent no status";
	if (a->pieces != 1 || a->piece[0].to - a->piece[0].from != a->len)
		return "it sent less data than was asked for";
	return NULL;
}
