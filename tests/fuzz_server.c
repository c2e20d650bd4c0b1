/*
 * fuzz_server.c - fuzzes what the server reads from its clients: proto.c.
 *
 * The first bytes of an input choose the exports and what is done: a session of a client that
 * may send anything, a handshake with our own client, or a string.  What the server answers is
 * parsed here, or by proto_client.c, and must be what the protocol says.
 */
#include "fuzz.h"

#include "../proto.h"

#include <errno.h>

enum {
	EXPORTS = 8,
	OPTION_REPLY_SIZE = 20,
	OPTION_DATA_MAX = PROTO_MAX_PAYLOAD,	/* as conn.c */
	ALLOCATION_ID = 1,
	RUNS_MAX = 16,
};

/* What a server has to offer. */
struct world {
	struct proto_export export[EXPORTS];
	const struct proto_export *entry[EXPORTS];
	struct proto_exports exports;
};

static void make_world(struct world *w, struct input *in)
{
	static const char *const names[EXPORTS] = { "", "disk", "a", "\xc3\xa4rger", "name", "x", "y" };
	static const uint64_t sizes[8] = { 0, 1, 511, 4096, 5001, 1 << 20,
					   (UINT64_C(1) << 32) + 5, INT64_MAX };
	static char longest[PROTO_STRING_MAX + 1];
	unsigned bits = (unsigned)take(in, 1), size = (unsigned)take(in, 1);

	memset(longest, 'n', PROTO_STRING_MAX);
	/* The first has the empty name; it may not be there. */
	w->exports = (struct proto_exports){ w->entry, 1 + (bits & 7), bits & 8 };
	if (bits & 64 && w->exports.count > 1) {
		w->exports.entry++;
		w->exports.count--;
	}
	for (size_t i = 0; i < EXPORTS; i++) {
		w->export[i] = (struct proto_export){
			.name = names[i] ? names[i] : longest,
			.description = bits & 16 && i > 1 ? longest : "text",	/* they fit in a LIST */
			.size = sizes[(size + i) % 8],
			.flags = NBD_FLAG_HAS_FLAGS | (bits & 32 ? NBD_FLAG_READ_ONLY : 0),
		};
		w->entry[i] = &w->export[i];
	}
}

/* The export that a name means, found in another way than proto.c does. */
static const struct proto_export *meant(const struct world *w, const uint8_t *name, size_t len)
{
	const struct proto_export *const *entry = w->exports.entry;
	const struct proto_export *found = w->exports.any_name ? entry[0] : NULL;

	for (size_t i = w->exports.count; i > 0; i--)
		if (strlen(entry[i - 1]->name) == len &&
		    (len == 0 || memcmp(entry[i - 1]->name, name, len) == 0))
			found = entry[i - 1];
	return found;
}

/* Strings */

/* The code point of the sequence of n bytes at p, by the table of RFC 3629 read backwards. */
static bool is_sequence(const uint8_t *p, size_t n)
{
	static const uint32_t least[5] = { 0, 1, 0x80, 0x800, 0x10000 };
	uint32_t point = n == 1 ? p[0] : p[0] & (0x7f >> n);

	if (n == 1 ? p[0] >= 0x80 : p[0] >> (7 - n) != (2 << n) - 2)
		return false;
	for (size_t i = 1; i < n; i++) {
		if (p[i] >> 6 != 2)
			return false;
		point = point << 6 | (p[i] & 0x3f);
	}
	return point >= least[n] && point <= 0x10ffff && (point < 0xd800 || point > 0xdfff);
}

static bool is_string(const uint8_t *p, size_t len)
{
	size_t n = 1, at = 0;

	for (; at < len && len <= PROTO_STRING_MAX; at += n) {
		for (n = 1; n <= 4 && !(n <= len - at && is_sequence(p + at, n));)
			n++;
		if (n > 4)
			return false;
	}
	return len <= PROTO_STRING_MAX;
}

/* What is left, up to a zero, as a string of C. */
static char *take_text(struct input *in)
{
	size_t len = in->left;
	const uint8_t *end = len ? memchr(in->p, 0, len) : NULL;
	char *text;

	if (end)
		len = (size_t)(end - in->p);
	text = malloc(len + 1);
	assert(text);
	if (len > 0)
		memcpy(text, in->p, len);
	text[len] = '\0';
	return text;
}

static void fuzz_string(struct input *in)
{
	char *text = take_text(in);

	assert(proto_is_string(text) == is_string((uint8_t *)text, strlen(text)));
	free(text);
}

/* Options: what the answer must be like, whatever the client sent. */

static void check_info(const struct proto_session *s, const struct proto_export *e,
		       const uint8_t *p, size_t len)
{
	assert(len >= 2 && e);
	if (get_be16(p) == NBD_INFO_EXPORT) {
		assert(len == 12 && get_be64(p + 2) == e->size);
		assert(get_be16(p + 10) == (e->flags | (s->structured ? NBD_FLAG_SEND_DF : 0)));
	} else if (get_be16(p) == NBD_INFO_BLOCK_SIZE) {
		assert(len == 14 && get_be32(p + 2) == 1 && get_be32(p + 10) == PROTO_MAX_PAYLOAD);
	} else {
		assert(get_be16(p) <= NBD_INFO_DESCRIPTION && is_string(p + 2, len - 2));
	}
}

/* A reply that is not the last one. */
static void check_part(const struct proto_session *s, uint32_t opt, const struct proto_export *e,
		       uint32_t type, const uint8_t *p, size_t len)
{
	if (type == NBD_REP_SERVER) {
		assert(opt == NBD_OPT_LIST && len >= 4 && get_be32(p) <= len - 4);
	} else if (type == NBD_REP_INFO) {
		assert(opt == NBD_OPT_INFO || opt == NBD_OPT_GO);
		check_info(s, e, p, len);
	} else {
		assert(type == NBD_REP_META_CONTEXT && s->structured);
		assert(opt == NBD_OPT_LIST_META_CONTEXT || opt == NBD_OPT_SET_META_CONTEXT);
		assert(len == 4 + strlen(NBD_ALLOCATION));
		assert(memcmp(p + 4, NBD_ALLOCATION, len - 4) == 0);
	}
}

/* All replies to an option; returns the type of the last one, and counts the others. */
static uint32_t check_replies(const struct proto_session *s, uint32_t opt,
			      const struct proto_export *e, const struct proto_out *out,
			      unsigned *parts)
{
	const uint8_t *p = out->p, *end = out->p + out->len;

	for (*parts = 0;; ++*parts) {
		uint32_t type, len;

		assert(end - p >= OPTION_REPLY_SIZE);
		assert(get_be64(p) == NBD_OPTION_REPLY_MAGIC && get_be32(p + 8) == opt);
		type = get_be32(p + 12);
		len = get_be32(p + 16);
		p += OPTION_REPLY_SIZE;
		assert(len <= (size_t)(end - p));
		if (type == NBD_REP_ACK || type >= NBD_REP_ERR(0)) {
			assert(len == 0 && p == end);	/* nothing behind it */
			assert(type == NBD_REP_ACK || *parts == 0);
			assert(type == NBD_REP_ACK || type <= NBD_REP_ERR_EXT_HEADER_REQD);
			return type;
		}
		check_part(s, opt, e, type, p, len);
		p += len;
	}
}

/* The export that an option is about. */
static const struct proto_export *about(const struct world *w, uint32_t opt, const uint8_t *data,
					size_t len)
{
	if (opt == NBD_OPT_EXPORT_NAME)
		return is_string(data, len) ? meant(w, data, len) : NULL;
	if (len < 4 || get_be32(data) > len - 4 || !is_string(data + 4, get_be32(data)))
		return NULL;
	return meant(w, data + 4, get_be32(data));
}

static void check_export_name(const struct proto_session *s, const struct proto_export *e,
			      enum proto_next next, const struct proto_out *out)
{
	static const uint8_t zeroes[124];

	if (!e || s->extended) {
		assert(next == PROTO_CLOSE && out->len == 0);
		return;
	}
	assert(next == PROTO_TRANSMIT && s->export == e);
	assert(out->len == (s->no_zeroes ? 10 : 134) && get_be64(out->p) == e->size);
	assert(memcmp(out->p + 10, zeroes, out->len - 10) == 0);
}

static void check_answer(const struct world *w, const struct proto_session *before,
			 const struct proto_session *s, uint32_t opt, const uint8_t *data,
			 size_t len, enum proto_next next, const struct proto_out *out)
{
	const struct proto_export *e = about(w, opt, data, len);
	unsigned parts;
	uint32_t last;

	assert(out->len <= out->cap);
	assert(s->fixed == before->fixed && s->no_zeroes == before->no_zeroes);
	assert(s->structured >= before->structured && s->structured >= s->extended);
	assert(s->extended == before->extended || opt == NBD_OPT_EXTENDED_HEADERS);
	assert((s->export != NULL) == (next == PROTO_TRANSMIT));
	if (opt == NBD_OPT_EXPORT_NAME) {
		check_export_name(s, e, next, out);
		return;
	}
	if (!s->fixed) {
		assert(next == PROTO_CLOSE && out->len == 0);
		return;
	}
	last = check_replies(s, opt, e, out, &parts);
	assert((next == PROTO_CLOSE) == (opt == NBD_OPT_ABORT));
	assert((next == PROTO_TRANSMIT) == (opt == NBD_OPT_GO && last == NBD_REP_ACK));
	assert(next != PROTO_TRANSMIT || s->export == e);
	assert(!s->allocation || s->structured);
	if (opt == NBD_OPT_LIST && last == NBD_REP_ACK)
		assert(parts == w->exports.count);
	if (opt == NBD_OPT_SET_META_CONTEXT)
		assert(s->allocation == (last == NBD_REP_ACK && parts == 1));
	if (opt == 0 || opt > NBD_OPT_EXTENDED_HEADERS)
		assert(last == NBD_REP_ERR_UNSUP);
	if (last == NBD_REP_ERR_EXT_HEADER_REQD)
		assert(opt == NBD_OPT_STRUCTURED_REPLY && before->extended);
	if (opt == NBD_OPT_EXTENDED_HEADERS)
		assert(s->extended == (before->extended || len == 0));
}

/* Answer one option, with its data in memory that ends where the data does. */
static enum proto_next answer(const struct world *w, struct proto_session *s, uint32_t opt,
			      const uint8_t *data, size_t len, struct proto_out *out)
{
	struct proto_session before = *s;
	enum proto_next next = proto_option(s, &w->exports, opt, data, len, out);

	check_answer(w, &before, s, opt, data, len, next, out);
	return next;
}

/* What is not taken, since it is too large.  Nothing but an error, or silence. */
static enum proto_next refuse(const struct world *w, struct proto_session *s, uint32_t opt,
			      size_t len, struct proto_out *out)
{
	enum proto_next next = proto_option(s, &w->exports, opt, NULL, len, out);
	unsigned parts;

	assert(!s->export);
	if (!s->fixed || opt == NBD_OPT_EXPORT_NAME)
		assert(next == PROTO_CLOSE && out->len == 0);
	else
		assert(check_replies(s, opt, NULL, out, &parts) >= NBD_REP_ERR_UNSUP);
	assert(opt != NBD_OPT_SET_META_CONTEXT || !s->allocation);
	return next;
}

/* The next option of a client.  PROTO_CLOSE also where the input ends. */
static enum proto_next haggle(const struct world *w, struct proto_session *s, struct input *in)
{
	uint8_t room[PROTO_OPTION_REPLY_ROOM];
	struct proto_out out = { .p = room, .cap = sizeof(room) };
	size_t head = PROTO_OPTION_SIZE, n;
	uint8_t *p = take_bytes(in, &head);
	enum proto_next next = PROTO_CLOSE;
	uint32_t opt, len;
	bool good = head == PROTO_OPTION_SIZE && proto_get_option(p, &opt, &len);

	free(p);
	if (!good || len > OPTION_DATA_MAX)
		return PROTO_CLOSE;
	n = len;
	p = take_bytes(in, &n);
	if (len > PROTO_OPTION_MAX)
		next = refuse(w, s, opt, len, &out);
	else if (n == len)
		next = answer(w, s, opt, p, n, &out);
	free(p);
	return next;
}

/* Requests */

static bool is_beyond(const struct proto_session *s, const struct proto_request *r)
{
	return (unsigned __int128)r->off + r->len > s->export->size;
}

/* Whether an error is justified; 0 if nothing is wrong. */
static bool may_be(const struct proto_session *s, const struct proto_request *r, int err)
{
	static const unsigned flags[8] = {
		NBD_CMD_FLAG_DF, 0, 0, 0, 0, 0, NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
		NBD_CMD_FLAG_REQ_ONE,
	};
	bool known = r->cmd < 8 && r->cmd != NBD_CMD_DISC;
	bool grows = r->cmd == NBD_CMD_WRITE || r->cmd == NBD_CMD_WRITE_ZEROES;
	bool writes = grows || r->cmd == NBD_CMD_TRIM;
	bool payload = s->extended && r->flags & NBD_CMD_FLAG_PAYLOAD_LEN;
	unsigned others = r->flags & ~(payload ? (unsigned)NBD_CMD_FLAG_PAYLOAD_LEN : 0);
	bool invalid = !known || others & ~(flags[r->cmd] | NBD_CMD_FLAG_FUA) ||
		       (r->cmd == NBD_CMD_READ && r->flags & NBD_CMD_FLAG_DF && !s->structured) ||
		       (r->cmd == NBD_CMD_FLUSH && (r->off || r->len)) ||
		       (r->cmd == NBD_CMD_BLOCK_STATUS && (!s->allocation || !r->len)) ||
		       (r->cmd == NBD_CMD_WRITE && r->len > PROTO_MAX_PAYLOAD) ||
		       (payload && r->cmd != NBD_CMD_WRITE);
	bool forbidden = writes && s->export->flags & NBD_FLAG_READ_ONLY;
	bool large = r->cmd == NBD_CMD_READ && r->len > PROTO_MAX_READ;
	bool beyond = is_beyond(s, r);

	switch (err) {
	case 0:
		return !invalid && !forbidden && !large && !beyond;
	case EINVAL:
		return invalid || (beyond && !grows);
	case EPERM:
		return forbidden;
	case EOVERFLOW:
		return large;
	case ENOSPC:
		return beyond && grows;
	default:
		return false;
	}
}

/*
 * Our own client has no extended headers: take what they have more, and see that it is right.
 * Returns how many bytes are left of n at p.
 */
static size_t shorten(const struct proto_request *r, uint8_t *p, size_t n)
{
	bool status = get_be16(p + 6) == NBD_REPLY_TYPE_BLOCK_STATUS_EXT;
	uint64_t len = get_be64(p + 24);
	size_t cut = status ? 36 : 32;

	assert(n >= cut && get_be32(p) == NBD_EXTENDED_REPLY_MAGIC && get_be64(p + 16) == r->off);
	assert(len <= UINT32_MAX && get_be16(p + 6) != NBD_REPLY_TYPE_BLOCK_STATUS);
	if (status) {
		assert(n == 40 && len == 8 + (uint64_t)get_be32(p + 36) * PROTO_EXTENDED_EXTENT_SIZE);
		put_be16(p + 6, NBD_REPLY_TYPE_BLOCK_STATUS);
		len = 4 + (uint64_t)get_be32(p + 36) * PROTO_EXTENT_SIZE;
		memmove(p + 36, p + 32, 4);
	}
	put_be32(p, NBD_STRUCTURED_REPLY_MAGIC);
	put_be32(p + 16, (uint32_t)len);
	memmove(p + 20, p + cut, n - cut);
	return n - (cut - 20);
}

/* What our own client has asked, and the server answers. */
struct dialogue {
	const struct proto_session *s;
	const struct proto_request *r;
	struct proto_answer a;
	struct extent extent[RUNS_MAX];
};

static void begin(struct dialogue *d, const struct proto_session *s, const struct proto_request *r)
{
	d->s = s;
	d->r = r;
	proto_answer_begin(&d->a, r, r->cmd == NBD_CMD_BLOCK_STATUS ? d->extent : NULL, RUNS_MAX);
}

/* Decode what the server wrote at p, of n bytes, and see that it answers. */
static struct proto_reply decode(struct dialogue *d, uint8_t *p, size_t n)
{
	const struct proto_offer offer = {
		.structured = d->s->structured,
		.allocation = d->s->allocation,
		.allocation_id = ALLOCATION_ID,
	};
	struct proto_reply reply;

	assert(n <= PROTO_REPLY_ROOM);
	if (d->s->extended)
		n = shorten(d->r, p, n);
	assert(!proto_get_reply(&d->a, &offer, p, n, &reply) && reply.head == n);
	assert(proto_reply_cookie(p) == d->r->cookie);
	return reply;
}

static void check_plain(const struct proto_session *s, const struct proto_request *r, int err)
{
	bool chunk = s->extended || (s->structured && (r->cmd == NBD_CMD_READ ||
						       r->cmd == NBD_CMD_BLOCK_STATUS));
	uint8_t room[PROTO_REPLY_ROOM];
	size_t n = (size_t)(proto_put_reply(s, r, err, room) - room);
	struct proto_reply reply;
	struct dialogue d;

	begin(&d, s, r);
	if (chunk || err) {
		reply = decode(&d, room, n);
		assert(reply.last && reply.payload == 0 && d.a.error == proto_error(err));
	}
	assert(chunk == (get_be32(room) != NBD_SIMPLE_REPLY_MAGIC));
	assert(chunk || (n == 16 && get_be32(room + 4) == proto_error(err) &&
			 get_be64(room + 8) == r->cookie));
}

/* A READ that succeeds, in runs as the input likes: our own client understands it. */
static void check_read(const struct proto_session *s, const struct proto_request *r,
		       struct input *in)
{
	uint8_t room[PROTO_REPLY_ROOM];
	uint64_t at = 0, len;
	struct dialogue d;

	if (r->len > PROTO_MAX_PAYLOAD)		/* our own client does not ask for so much */
		return;
	begin(&d, s, r);
	for (unsigned i = 0; at < r->len; at += len, i++) {
		bool chunks = proto_in_chunks(s, r), hole = chunks && take(in, 1) & 1, last;
		struct proto_reply reply;
		struct extent run;

		len = chunks && i < RUNS_MAX ? take(in, 4) % (r->len - at) + 1 : r->len - at;
		last = at + len == r->len;
		run = (struct extent){ len, hole ? NBD_STATE_ZERO : 0 };
		reply = decode(&d, room, (size_t)(proto_put_run(s, r, r->off + at, &run, room) - room));
		assert(reply.last == last && !d.a.error);
		assert(reply.off == r->off + at && reply.len == len);
		assert(reply.payload == (hole ? 0 : len));
	}
	assert(!proto_answer_end(&d.a));
}

static void check_status(const struct proto_session *s, const struct proto_request *r,
			 struct input *in)
{
	size_t size = s->extended ? PROTO_EXTENDED_EXTENT_SIZE : PROTO_EXTENT_SIZE, head;
	uint8_t room[PROTO_REPLY_ROOM + RUNS_MAX * PROTO_EXTENDED_EXTENT_SIZE], *p;
	unsigned n = 1 + (unsigned)take(in, 1) % RUNS_MAX, got = 0;
	struct extent extent[RUNS_MAX];
	struct proto_reply reply;
	struct dialogue d;
	uint64_t told = 0;

	if (r->len > UINT32_MAX)		/* our own client does not ask for so much */
		return;
	for (unsigned i = 0; i < n; i++)
		extent[i] = (struct extent){ 1 + take(in, 3), (uint32_t)take(in, 1) & 3 };
	head = (size_t)(proto_put_status(s, r, extent, n, room) - room) - n * size;
	p = room + head;
	begin(&d, s, r);
	reply = decode(&d, room, head);
	assert(reply.last && reply.payload == n * PROTO_EXTENT_SIZE);
	for (unsigned i = 0; i < n; i++, p += size) {
		const struct extent *e = &extent[i];
		uint64_t left = r->len - told;

		if (s->extended) {	/* our own client reads shorter ones */
			assert(get_be64(p) == e->len && get_be64(p + 8) == e->flags);
			put_be32(put_be32(p, (uint32_t)e->len), e->flags);
		}
		assert(!proto_get_extents(&d.a, p, PROTO_EXTENT_SIZE));
		got += left > 0;
		assert(d.a.extents == got);
		assert(left == 0 || (d.extent[i].flags == e->flags &&
				     d.extent[i].len == (e->len < left ? e->len : left)));
		told += e->len < left ? e->len : left;
	}
	assert(!proto_answer_end(&d.a));
}

/* The next request of a client.  False where there is none. */
static bool request(const struct proto_session *s, struct input *in)
{
	size_t whole = s->extended ? PROTO_EXTENDED_REQUEST_SIZE : PROTO_REQUEST_SIZE;
	size_t n = whole, size;
	uint8_t *p = take_bytes(in, &n), again[PROTO_REQUEST_SIZE];
	struct proto_request r;
	bool good = !proto_get_request(s, p, n, &r, &size) && size > 0;
	int err;

	assert(size == (n < whole ? 0 : whole));
	if (good) {
		proto_put_request(&r, again);
		assert(memcmp(p + 4, again + 4, 20) == 0);
		assert(s->extended ? get_be64(p + 24) == r.len : get_be32(p + 24) == r.len);
		assert(r.payload || r.cmd != NBD_CMD_WRITE);
		assert(!r.payload || !s->extended || r.len <= PROTO_MAX_PAYLOAD);
	}
	free(p);
	if (!good || r.cmd == NBD_CMD_DISC)
		return false;
	err = proto_check_request(s, &r);
	assert(may_be(s, &r, err));
	assert(err || r.payload == (r.cmd == NBD_CMD_WRITE));
	if (err || (r.cmd != NBD_CMD_READ && r.cmd != NBD_CMD_BLOCK_STATUS) || r.len == 0)
		check_plain(s, &r, err);
	else if (r.cmd == NBD_CMD_READ)
		check_read(s, &r, in);
	else
		check_status(s, &r, in);
	return true;
}

/* Any errno at all becomes one that is in the protocol. */
static void check_errno(int err)
{
	static const uint32_t known[] = { 0, NBD_EPERM, NBD_EIO, NBD_ENOMEM, NBD_EINVAL, NBD_ENOSPC,
					  NBD_EOVERFLOW, NBD_ENOTSUP, NBD_ESHUTDOWN };
	uint32_t wire = proto_error(err);
	size_t i = 0;

	while (i < sizeof(known) / sizeof(known[0]) && known[i] != wire)
		i++;
	assert(i < sizeof(known) / sizeof(known[0]) && (wire == 0) == (err == 0));
}

/* A client that may send anything. */
static void fuzz_session(const struct world *w, struct input *in)
{
	struct proto_session s = { 0 };
	size_t n = PROTO_CLIENT_FLAGS_SIZE;
	uint8_t *p = take_bytes(in, &n);
	bool good = n == PROTO_CLIENT_FLAGS_SIZE && proto_client_flags(&s, p);
	enum proto_next next = PROTO_HAGGLE;

	assert(n < PROTO_CLIENT_FLAGS_SIZE || good == (get_be32(p) <= 3));
	free(p);
	while (good && next == PROTO_HAGGLE)
		next = haggle(w, &s, in);
	if (!good || next != PROTO_TRANSMIT)
		return;
	while (request(&s, in))
		;
	check_errno((int)take(in, 2));
}

/* Our own client and our own server: they must agree. */

struct wire {
	uint8_t p[2 * PROTO_OPTION_REPLY_ROOM];		/* on the way to the client */
	size_t len;
};

/* Answer what the client sent; the first time it begins with its flags. */
static void serve(const struct world *w, struct proto_session *s, const uint8_t *p, size_t n,
		  struct wire *wire, bool first)
{
	uint32_t opt, len;

	if (first) {
		assert(n >= PROTO_CLIENT_FLAGS_SIZE && proto_client_flags(s, p));
		p += PROTO_CLIENT_FLAGS_SIZE;
		n -= PROTO_CLIENT_FLAGS_SIZE;
	}
	assert(n >= PROTO_OPTION_SIZE && proto_get_option(p, &opt, &len));
	assert(n == PROTO_OPTION_SIZE + len);
	struct proto_out out = { .p = wire->p + wire->len, .cap = PROTO_OPTION_REPLY_ROOM };
	answer(w, s, opt, p + PROTO_OPTION_SIZE, len, &out);
	wire->len += out.len;
}

static enum proto_next converse(const struct world *w, struct proto_client *c,
				struct proto_session *s, struct wire *wire)
{
	enum proto_next next = PROTO_HAGGLE;
	bool first = true;

	while (next == PROTO_HAGGLE) {
		next = proto_client_take(c, wire->p, wire->len);
		assert(c->want > 0 && c->want <= wire->len);
		assert(c->out_len <= PROTO_CLIENT_ROOM);
		wire->len -= c->want;
		memmove(wire->p, wire->p + c->want, wire->len);
		if (next != PROTO_HAGGLE || c->out_len == 0)
			continue;
		serve(w, s, c->out, c->out_len, wire, first);
		first = false;
	}
	return next;
}

static void fuzz_handshake(const struct world *w, struct input *in, bool oldstyle)
{
	static struct wire wire;
	char *name = oldstyle ? calloc(1, 1) : take_text(in);
	const struct proto_export *e = oldstyle ? w->exports.entry[0] :
						  meant(w, (uint8_t *)name, strlen(name));
	struct proto_session s = { 0 };
	uint8_t sent[PROTO_CLIENT_ROOM];
	struct proto_client c;

	if (proto_is_string(name)) {
		proto_client_begin(&c, name);
		c.out = sent;
		wire.len = (size_t)(proto_put_greeting(oldstyle ? e : NULL, wire.p) - wire.p);
		assert(wire.len == (oldstyle ? PROTO_OLDSTYLE_SIZE : PROTO_GREETING_SIZE));
		if (converse(w, &c, &s, &wire) == PROTO_TRANSMIT) {
			assert(e && c.offer.size == e->size && wire.len == 0);
			assert(oldstyle || s.export == e);
			assert(c.offer.structured == !oldstyle && c.offer.allocation == !oldstyle);
			assert(s.allocation == c.offer.allocation);
			assert(oldstyle || c.offer.allocation_id == ALLOCATION_ID);
			assert(c.offer.min_block == 1 && c.offer.max_block == PROTO_MAX_PAYLOAD);
		} else {
			assert(!e && c.reason[0]);
		}
	}
	free(name);
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
	struct input in = { p, n };
	unsigned what = (unsigned)take(&in, 1) % 8;
	struct world w;

	make_world(&w, &in);
	switch (what) {
	case 0:
		fuzz_string(&in);
		break;
	case 1:
	case 2:
		fuzz_handshake(&w, &in, what == 2);
		break;
	default:
		fuzz_session(&w, &in);
	}
	return 0;
}
