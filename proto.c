/*
 * proto.c - the NBD wire format: see proto.h.
 *
 * Everything a peer sent is read through struct in, and everything sent is written through
 * struct proto_out or into room of a stated size, so that no length from the wire is ever
 * trusted.
 */
#define _GNU_SOURCE
#include "proto.h"

#include "util.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

/* Context ids: any number will do, a client gets to know it when it chooses the context. */
enum { ALLOCATION_ID = 1 };

/* What is left of an option's data.  Reading past the end gives zeros and sets bad. */
struct in {
	const uint8_t *p;
	size_t left;
	bool bad;
};

static const uint8_t *in_bytes(struct in *in, size_t n)
{
	const uint8_t *p = in->p;

	if (n > in->left) {
		in->bad = true;
		return NULL;
	}
	in->p += n;
	in->left -= n;
	return p;
}

/* A number of that many bytes. */
static uint32_t in_be(struct in *in, size_t size)
{
	const uint8_t *p = in_bytes(in, size);
	uint32_t v = 0;

	for (size_t i = 0; p && i < size; i++)
		v = v << 8 | p[i];
	return v;
}

static void out_bytes(struct proto_out *out, const void *p, size_t n)
{
	assert(n <= out->cap - out->len);
	if (n > 0)
		memcpy(out->p + out->len, p, n);
	out->len += n;
}

/* The low size bytes of v. */
static void out_be(struct proto_out *out, size_t size, uint64_t v)
{
	uint8_t b[8];

	put_be64(b, v);
	out_bytes(out, b + sizeof(b) - size, size);
}

/* Handshake */

uint8_t *proto_put_greeting(const struct proto_export *e, uint8_t *p)
{
	p = put_be64(p, NBD_INIT_PASSWD);
	if (!e) {
		p = put_be64(p, NBD_IHAVEOPT);
		return put_be16(p, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
	}
	p = put_be64(p, NBD_OLDSTYLE_MAGIC);
	p = put_be64(p, e->size);
	p = put_be32(p, e->flags);
	memset(p, 0, PROTO_ZEROES_SIZE);
	return p + PROTO_ZEROES_SIZE;
}

bool proto_client_flags(struct proto_session *s, const uint8_t *p)
{
	uint32_t flags = get_be32(p);

	s->fixed = flags & NBD_FLAG_FIXED_NEWSTYLE;
	s->no_zeroes = flags & NBD_FLAG_NO_ZEROES;
	return (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)) == 0;
}

bool proto_get_option(const uint8_t *p, uint32_t *opt, uint32_t *len)
{
	*opt = get_be32(p + 8);
	*len = get_be32(p + 12);
	return get_be64(p) == NBD_IHAVEOPT;
}

/* One option on its way through its handler. */
struct option {
	struct proto_session *s;
	const struct proto_exports *exports;
	uint32_t opt;
	struct in in;
	struct proto_out *out;
	size_t start;		/* of the data of the answer that is being written */
};

/* A string in an option's data, not terminated. */
struct name {
	const uint8_t *p;
	size_t len;
};

/* "Fixed newstyle negotiation": one answer, of which reply_end() says how long it is. */
static void reply_begin(struct option *o, uint32_t type)
{
	out_be(o->out, 8, NBD_OPTION_REPLY_MAGIC);
	out_be(o->out, 4, o->opt);
	out_be(o->out, 4, type);
	out_be(o->out, 4, 0);
	o->start = o->out->len;
}

static void reply_end(const struct option *o)
{
	put_be32(o->out->p + o->start - 4, (uint32_t)(o->out->len - o->start));
}

/* An answer without data. */
static enum proto_next reply(struct option *o, uint32_t type)
{
	reply_begin(o, type);
	return PROTO_HAGGLE;
}

/* "Conventions": UTF-8 without NUL.  0 for a good name, else the error to answer. */
static uint32_t check_name(const struct name *name)
{
	size_t n;

	if (name->len > PROTO_STRING_MAX)
		return NBD_REP_ERR_TOO_BIG;
	for (size_t i = 0; i < name->len; i += n) {
		n = utf8_length(name->p + i, name->len - i);
		if (n == 0)
			return NBD_REP_ERR_INVALID;
	}
	return 0;
}

bool proto_is_string(const char *s)
{
	struct name name = { (const uint8_t *)s, strlen(s) };

	return check_name(&name) == 0;
}

/* Read a length and as many bytes. */
static uint32_t in_name(struct in *in, struct name *name)
{
	name->len = in_be(in, 4);
	name->p = in_bytes(in, name->len);
	return in->bad ? NBD_REP_ERR_INVALID : check_name(name);
}

static bool name_is(const struct name *name, const char *s)
{
	return name->len == strlen(s) && memcmp(name->p, s, name->len) == 0;
}

/* FNV-1a: tells whether two options meant the same name, without keeping 4096 bytes of it. */
static uint64_t name_hash(const struct name *name)
{
	uint64_t h = UINT64_C(0xcbf29ce484222325);

	for (size_t i = 0; i < name->len; i++)
		h = (h ^ name->p[i]) * UINT64_C(0x100000001b3);
	return h;
}

static const struct proto_export *find_export(const struct option *o, const struct name *name)
{
	const struct proto_exports *x = o->exports;

	for (size_t i = 0; i < x->count; i++)
		if (name_is(name, x->entry[i]->name))
			return x->entry[i];
	if (x->any_name)
		return x->entry[0];
	o->out->unknown = name->p;
	o->out->unknown_len = name->len;
	return NULL;
}

/* Bind the session to its export; a context chosen for another name does not hold. */
static enum proto_next proto_transmit(struct proto_session *s, const struct proto_export *e,
				      const struct name *name)
{
	s->export = e;
	if (s->allocation_name != name_hash(name))
		s->allocation = false;
	return PROTO_TRANSMIT;
}

/* PROTO_EXPORT_SIZE bytes. */
static void out_export(const struct option *o, const struct proto_export *e)
{
	out_be(o->out, 8, e->size);
	out_be(o->out, 2, e->flags | (o->s->structured ? NBD_FLAG_SEND_DF : 0));
}

/* "NBD_OPT_EXPORT_NAME": the data is the name, and there is no way to say no. */
static enum proto_next opt_export_name(struct option *o)
{
	static const uint8_t zeroes[PROTO_ZEROES_SIZE];
	struct name name = { o->in.p, o->in.left };
	const struct proto_export *e;

	if (o->s->extended || check_name(&name) != 0)
		return PROTO_CLOSE;
	e = find_export(o, &name);
	if (!e)
		return PROTO_CLOSE;
	out_export(o, e);
	out_bytes(o->out, zeroes, o->s->no_zeroes ? 0 : sizeof(zeroes));
	return proto_transmit(o->s, e, &name);
}

static enum proto_next opt_abort(struct option *o)
{
	reply(o, NBD_REP_ACK);
	return PROTO_CLOSE;
}

static enum proto_next opt_list(struct option *o)
{
	for (size_t i = 0; i < o->exports->count; i++) {
		const struct proto_export *e = o->exports->entry[i];
		size_t name = strlen(e->name);

		reply_begin(o, NBD_REP_SERVER);
		out_be(o->out, 4, name);
		out_bytes(o->out, e->name, name);
		out_bytes(o->out, e->description, strlen(e->description));
		reply_end(o);
	}
	return reply(o, NBD_REP_ACK);
}

/* Answer one information request. */
static void info(struct option *o, unsigned type, const struct proto_export *e,
		 const struct name *name)
{
	reply_begin(o, NBD_REP_INFO);
	out_be(o->out, 2, type);
	switch (type) {
	case NBD_INFO_EXPORT:
		out_export(o, e);
		break;
	case NBD_INFO_NAME:
		out_bytes(o->out, name->p, name->len);
		break;
	case NBD_INFO_DESCRIPTION:
		out_bytes(o->out, e->description, strlen(e->description));
		break;
	case NBD_INFO_BLOCK_SIZE:
		out_be(o->out, 4, 1);
		out_be(o->out, 4, PROTO_PREFERRED_BLOCK);
		out_be(o->out, 4, PROTO_MAX_PAYLOAD);
		break;
	}
	reply_end(o);
}

/* "NBD_OPT_INFO and NBD_OPT_GO": each kind of information is told once. */
static enum proto_next opt_go(struct option *o)
{
	const struct proto_export *e;
	unsigned wanted = 1 << NBD_INFO_EXPORT, n, type;
	struct name name;
	uint32_t err = in_name(&o->in, &name);

	if (err)
		return reply(o, err);
	for (n = in_be(&o->in, 2); n > 0 && !o->in.bad; n--) {
		type = in_be(&o->in, 2);
		if (type <= NBD_INFO_BLOCK_SIZE)
			wanted |= 1 << type;
	}
	if (o->in.bad || o->in.left > 0)
		return reply(o, NBD_REP_ERR_INVALID);
	e = find_export(o, &name);
	if (!e)
		return reply(o, NBD_REP_ERR_UNKNOWN);
	for (type = 0; type <= NBD_INFO_BLOCK_SIZE; type++)
		if (wanted & 1 << type)
			info(o, type, e, &name);
	reply(o, NBD_REP_ACK);
	return o->opt == NBD_OPT_GO ? proto_transmit(o->s, e, &name) : PROTO_HAGGLE;
}

/* "NBD_OPT_STRUCTURED_REPLY", "NBD_OPT_EXTENDED_HEADERS": there is no way back from the second. */
static enum proto_next opt_headers(struct option *o)
{
	bool extended = o->opt == NBD_OPT_EXTENDED_HEADERS;

	if (o->s->extended && !extended)
		return reply(o, NBD_REP_ERR_EXT_HEADER_REQD);
	o->s->structured = true;
	o->s->extended = extended;
	return reply(o, NBD_REP_ACK);
}

/* Read the queries; *match says whether one of them means base:allocation. */
static uint32_t in_queries(struct option *o, bool *match)
{
	bool list = o->opt == NBD_OPT_LIST_META_CONTEXT;
	uint32_t n = in_be(&o->in, 4), err;
	struct name query;

	*match = list && n == 0;
	for (; n > 0 && !o->in.bad; n--) {
		err = in_name(&o->in, &query);
		if (err)
			return err;
		if (name_is(&query, NBD_ALLOCATION) || (list && name_is(&query, "base:")))
			*match = true;
	}
	return o->in.bad || o->in.left > 0 ? NBD_REP_ERR_INVALID : 0;
}

/* "NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT" */
static enum proto_next opt_meta_context(struct option *o)
{
	bool set = o->opt == NBD_OPT_SET_META_CONTEXT, match;
	struct name name;
	uint32_t err;

	if (!o->s->structured)
		return reply(o, NBD_REP_ERR_INVALID);
	err = in_name(&o->in, &name);
	if (!err)
		err = in_queries(o, &match);
	if (err)
		return reply(o, err);
	if (!find_export(o, &name))
		return reply(o, NBD_REP_ERR_UNKNOWN);
	if (set && match) {
		o->s->allocation = true;
		o->s->allocation_name = name_hash(&name);
	}
	if (match) {
		reply_begin(o, NBD_REP_META_CONTEXT);
		out_be(o->out, 4, set ? ALLOCATION_ID : 0);
		out_bytes(o->out, NBD_ALLOCATION, strlen(NBD_ALLOCATION));
		reply_end(o);
	}
	return reply(o, NBD_REP_ACK);
}

static const struct option_kind {
	uint32_t opt;
	bool bare;	/* must come without data */
	enum proto_next (*handle)(struct option *);	/* NULL: there is no such option here */
} option_kinds[] = {
	{ NBD_OPT_EXPORT_NAME, false, opt_export_name },
	{ NBD_OPT_ABORT, false, opt_abort },
	{ NBD_OPT_LIST, true, opt_list },
	{ NBD_OPT_STARTTLS, true, NULL },
	{ NBD_OPT_INFO, false, opt_go },
	{ NBD_OPT_GO, false, opt_go },
	{ NBD_OPT_STRUCTURED_REPLY, true, opt_headers },
	{ NBD_OPT_LIST_META_CONTEXT, false, opt_meta_context },
	{ NBD_OPT_SET_META_CONTEXT, false, opt_meta_context },
	{ NBD_OPT_EXTENDED_HEADERS, true, opt_headers },
};

/* EXPORT_NAME has no error replies, and a client that is not fixed newstyle knows no others. */
enum proto_next proto_option(struct proto_session *s, const struct proto_exports *exports,
			     uint32_t opt, const uint8_t *data, size_t len, struct proto_out *out)
{
	struct option o = { s, exports, opt, { data, len, false }, out, 0 };
	const struct option_kind *kind = NULL;
	bool large = len > PROTO_OPTION_MAX;

	for (size_t i = 0; i < ARRAY_SIZE(option_kinds); i++)
		if (option_kinds[i].opt == opt)
			kind = &option_kinds[i];
	if (opt == NBD_OPT_SET_META_CONTEXT)	/* one that fails, too, forgets the earlier choice */
		s->allocation = false;
	if (opt == NBD_OPT_EXPORT_NAME ? large : !s->fixed)
		return PROTO_CLOSE;
	if (!kind)
		return reply(&o, NBD_REP_ERR_UNSUP);
	if (large)
		return reply(&o, NBD_REP_ERR_TOO_BIG);
	if (kind->bare && len > 0)
		return reply(&o, NBD_REP_ERR_INVALID);
	return kind->handle ? kind->handle(&o) : reply(&o, NBD_REP_ERR_UNSUP);
}

/* Transmission */

/*
 * "Request message": with extended headers, what has a payload has PAYLOAD_LEN.  But for the
 * WRITEs of qemu: 8.2 to 10.0 at least do not set it, and send the payload all the same.
 */
const char *proto_get_request(const struct proto_session *s, const uint8_t *p, size_t n,
			      struct proto_request *r, size_t *size)
{
	size_t whole = s->extended ? PROTO_EXTENDED_REQUEST_SIZE : PROTO_REQUEST_SIZE;

	*size = n < whole ? 0 : whole;
	if (n < PROTO_REQUEST_SIZE)
		return NULL;
	if (get_be32(p) != (s->extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC))
		return "wrong magic of a request";
	if (n < whole)
		return NULL;
	r->flags = get_be16(p + 4);
	r->cmd = get_be16(p + 6);
	r->cookie = get_be64(p + 8);
	r->off = get_be64(p + 16);
	r->len = s->extended ? get_be64(p + 24) : get_be32(p + 24);
	r->payload = r->cmd == NBD_CMD_WRITE ||
		     (s->extended && r->flags & NBD_CMD_FLAG_PAYLOAD_LEN);
	if (s->extended && r->payload && r->len > PROTO_MAX_PAYLOAD)
		return "request with too much payload";
	return NULL;
}

bool proto_cmd_writes(uint16_t cmd)
{
	return cmd == NBD_CMD_WRITE || cmd == NBD_CMD_TRIM || cmd == NBD_CMD_WRITE_ZEROES;
}

/* "Request types": 0 if the command is known and its flags are its own. */
static int check_flags(const struct proto_session *s, const struct proto_request *r)
{
	static const unsigned own[] = {
		[NBD_CMD_READ] = NBD_CMD_FLAG_DF,
		[NBD_CMD_WRITE] = NBD_CMD_FLAG_PAYLOAD_LEN,
		[NBD_CMD_WRITE_ZEROES] = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
		[NBD_CMD_BLOCK_STATUS] = NBD_CMD_FLAG_REQ_ONE,
	};
	unsigned allowed;

	if (r->cmd >= ARRAY_SIZE(own) || r->cmd == NBD_CMD_DISC)
		return EINVAL;
	if (r->cmd == NBD_CMD_FLUSH && (r->off || r->len))
		return EINVAL;
	if (r->cmd == NBD_CMD_BLOCK_STATUS && (!s->allocation || r->len == 0))
		return EINVAL;
	allowed = own[r->cmd] | NBD_CMD_FLAG_FUA;	/* "Command flags": FUA on every command */
	if (!s->structured)
		allowed &= ~NBD_CMD_FLAG_DF;
	if (!s->extended)
		allowed &= ~NBD_CMD_FLAG_PAYLOAD_LEN;
	return r->flags & ~allowed ? EINVAL : 0;
}

/* "Error values": what is beyond the end depends on whether it would grow the export. */
int proto_check_request(const struct proto_session *s, const struct proto_request *r)
{
	uint64_t size = s->export->size;
	int err = check_flags(s, r);

	if (err)
		return err;
	if (proto_cmd_writes(r->cmd) && (s->export->flags & NBD_FLAG_READ_ONLY))
		return EPERM;
	if (r->cmd == NBD_CMD_READ && r->len > PROTO_MAX_READ)
		return EOVERFLOW;
	if (r->cmd == NBD_CMD_WRITE && r->len > PROTO_MAX_PAYLOAD)
		return EINVAL;
	if (r->len > size || r->off > size - r->len)
		return r->cmd == NBD_CMD_WRITE || r->cmd == NBD_CMD_WRITE_ZEROES ? ENOSPC : EINVAL;
	return 0;
}

uint32_t proto_error(int err)
{
	static const struct {
		int err;
		uint32_t wire;
	} known[] = {
		{ 0, 0 },
		{ EPERM, NBD_EPERM }, { EACCES, NBD_EPERM }, { EROFS, NBD_EPERM },
		{ ENOMEM, NBD_ENOMEM },
		{ EINVAL, NBD_EINVAL },
		{ ENOSPC, NBD_ENOSPC }, { EDQUOT, NBD_ENOSPC }, { EFBIG, NBD_ENOSPC },
		{ EOVERFLOW, NBD_EOVERFLOW },
		{ ENOTSUP, NBD_ENOTSUP }, { EOPNOTSUPP, NBD_ENOTSUP },
		{ ESHUTDOWN, NBD_ESHUTDOWN },
	};

	for (size_t i = 0; i < ARRAY_SIZE(known); i++)
		if (known[i].err == err)
			return known[i].wire;
	return NBD_EIO;
}

/* "Simple reply message" */
static uint8_t *put_simple(const struct proto_request *r, int err, uint8_t *p)
{
	p = put_be32(p, NBD_SIMPLE_REPLY_MAGIC);
	p = put_be32(p, proto_error(err));
	return put_be64(p, r->cookie);
}

/*
 * "Structured reply chunk message", "Extended reply chunk message": the header, before len bytes
 * of payload.
 */
static uint8_t *put_chunk(const struct proto_session *s, const struct proto_request *r,
			  uint16_t type, bool last, uint32_t len, uint8_t *p)
{
	p = put_be32(p, s->extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC);
	p = put_be16(p, last ? NBD_REPLY_FLAG_DONE : 0);
	p = put_be16(p, type);
	p = put_be64(p, r->cookie);
	if (!s->extended)
		return put_be32(p, len);
	p = put_be64(p, r->off);
	return put_be64(p, len);
}

uint8_t *proto_put_reply(const struct proto_session *s, const struct proto_request *r, int err,
			 uint8_t *p)
{
	if (!s->structured ||
	    (!s->extended && r->cmd != NBD_CMD_READ && r->cmd != NBD_CMD_BLOCK_STATUS))
		return put_simple(r, err, p);
	if (!err)
		return put_chunk(s, r, NBD_REPLY_TYPE_NONE, true, 0, p);
	p = put_chunk(s, r, NBD_REPLY_TYPE_ERROR, true, 6, p);
	return put_be16(put_be32(p, proto_error(err)), 0);
}

bool proto_in_chunks(const struct proto_session *s, const struct proto_request *r)
{
	return s->structured && !(r->flags & NBD_CMD_FLAG_DF);
}

uint8_t *proto_put_run(const struct proto_session *s, const struct proto_request *r, uint64_t off,
		       const struct extent *run, uint8_t *p)
{
	bool chunks = proto_in_chunks(s, r);
	uint32_t len = (uint32_t)(chunks ? run->len : r->len);
	bool last = off + len == r->off + r->len;

	if (!chunks && off != r->off)
		return p;
	if (!s->structured)
		return put_simple(r, 0, p);
	if (chunks && run->flags & NBD_STATE_ZERO) {
		p = put_chunk(s, r, NBD_REPLY_TYPE_OFFSET_HOLE, last, 8 + 4, p);
		return put_be32(put_be64(p, off), len);
	}
	p = put_chunk(s, r, NBD_REPLY_TYPE_OFFSET_DATA, last, 8 + len, p);
	return put_be64(p, off);
}

uint8_t *proto_put_status(const struct proto_session *s, const struct proto_request *r,
			  const struct extent *extent, uint32_t n, uint8_t *p)
{
	uint16_t type = s->extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS;
	uint32_t len = s->extended ? 8 + n * PROTO_EXTENDED_EXTENT_SIZE : 4 + n * PROTO_EXTENT_SIZE;

	assert(s->allocation && n > 0);
	p = put_be32(put_chunk(s, r, type, true, len, p), ALLOCATION_ID);
	if (s->extended)
		p = put_be32(p, n);
	for (; n > 0; n--, extent++)
		p = s->extended ? put_be64(put_be64(p, extent->len), extent->flags) :
				  put_be32(put_be32(p, (uint32_t)extent->len), extent->flags);
	return p;
}
