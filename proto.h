/*
 * proto.h - the NBD wire format: the server's side, proto.c, and the client's, proto_client.c.
 *
 * Pure functions: they encode, decode and validate in memory that the caller owns, and never
 * block, log or allocate.  They may be called from any thread.  Headings cited in comments are
 * those of doc/proto.md of the NBD project.
 *
 * Nothing that a peer sends is trusted.  What does not fit the protocol, or what was asked of a
 * server, is found here, with a reason for the log.
 */
#ifndef XNBD_PROTO_H
#define XNBD_PROTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NBD_ALLOCATION "base:allocation"
#define NBD_INIT_PASSWD UINT64_C(0x4e42444d41474943)
#define NBD_IHAVEOPT UINT64_C(0x49484156454f5054)
#define NBD_OLDSTYLE_MAGIC UINT64_C(0x00420281861253)
#define NBD_OPTION_REPLY_MAGIC UINT64_C(0x0003e889045565a9)
#define NBD_REQUEST_MAGIC UINT32_C(0x25609513)
#define NBD_SIMPLE_REPLY_MAGIC UINT32_C(0x67446698)
#define NBD_STRUCTURED_REPLY_MAGIC UINT32_C(0x668e33ef)
#define NBD_EXTENDED_REQUEST_MAGIC UINT32_C(0x21e41c71)
#define NBD_EXTENDED_REPLY_MAGIC UINT32_C(0x6e8a278c)

enum {
	/* handshake flags, and the client's answer to them */
	NBD_FLAG_FIXED_NEWSTYLE = 1 << 0,
	NBD_FLAG_NO_ZEROES = 1 << 1,

	/* transmission flags */
	NBD_FLAG_HAS_FLAGS = 1 << 0,
	NBD_FLAG_READ_ONLY = 1 << 1,
	NBD_FLAG_SEND_FLUSH = 1 << 2,
	NBD_FLAG_SEND_FUA = 1 << 3,
	NBD_FLAG_SEND_TRIM = 1 << 5,
	NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
	NBD_FLAG_SEND_DF = 1 << 7,
	NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
	NBD_FLAG_SEND_CACHE = 1 << 10,
	NBD_FLAG_SEND_FAST_ZERO = 1 << 11,

	/* options */
	NBD_OPT_EXPORT_NAME = 1,
	NBD_OPT_ABORT = 2,
	NBD_OPT_LIST = 3,
	NBD_OPT_STARTTLS = 5,
	NBD_OPT_INFO = 6,
	NBD_OPT_GO = 7,
	NBD_OPT_STRUCTURED_REPLY = 8,
	NBD_OPT_LIST_META_CONTEXT = 9,
	NBD_OPT_SET_META_CONTEXT = 10,
	NBD_OPT_EXTENDED_HEADERS = 11,

	/* option replies that are no errors */
	NBD_REP_ACK = 1,
	NBD_REP_SERVER = 2,
	NBD_REP_INFO = 3,
	NBD_REP_META_CONTEXT = 4,

	/* information types of NBD_REP_INFO */
	NBD_INFO_EXPORT = 0,
	NBD_INFO_NAME = 1,
	NBD_INFO_DESCRIPTION = 2,
	NBD_INFO_BLOCK_SIZE = 3,

	/* commands */
	NBD_CMD_READ = 0,
	NBD_CMD_WRITE = 1,
	NBD_CMD_DISC = 2,
	NBD_CMD_FLUSH = 3,
	NBD_CMD_TRIM = 4,
	NBD_CMD_CACHE = 5,
	NBD_CMD_WRITE_ZEROES = 6,
	NBD_CMD_BLOCK_STATUS = 7,

	/* command flags */
	NBD_CMD_FLAG_FUA = 1 << 0,
	NBD_CMD_FLAG_NO_HOLE = 1 << 1,
	NBD_CMD_FLAG_DF = 1 << 2,
	NBD_CMD_FLAG_REQ_ONE = 1 << 3,
	NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
	NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5,

	/* structured replies: the one flag, and the chunk types */
	NBD_REPLY_FLAG_DONE = 1 << 0,
	NBD_REPLY_TYPE_NONE = 0,
	NBD_REPLY_TYPE_OFFSET_DATA = 1,
	NBD_REPLY_TYPE_OFFSET_HOLE = 2,
	NBD_REPLY_TYPE_BLOCK_STATUS = 5,
	NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6,
	NBD_REPLY_TYPE_ERROR = (1 << 15) + 1,

	/* base:allocation */
	NBD_STATE_HOLE = 1 << 0,
	NBD_STATE_ZERO = 1 << 1,

	/* errors */
	NBD_EPERM = 1,
	NBD_EIO = 5,
	NBD_ENOMEM = 12,
	NBD_EINVAL = 22,
	NBD_ENOSPC = 28,
	NBD_EOVERFLOW = 75,
	NBD_ENOTSUP = 95,
	NBD_ESHUTDOWN = 108,
};

/* option replies that are errors */
#define NBD_REP_ERR(n) (UINT32_C(0x80000000) + (n))
#define NBD_REP_ERR_UNSUP NBD_REP_ERR(1)
#define NBD_REP_ERR_POLICY NBD_REP_ERR(2)
#define NBD_REP_ERR_INVALID NBD_REP_ERR(3)
#define NBD_REP_ERR_TLS_REQD NBD_REP_ERR(5)
#define NBD_REP_ERR_UNKNOWN NBD_REP_ERR(6)
#define NBD_REP_ERR_SHUTDOWN NBD_REP_ERR(7)
#define NBD_REP_ERR_TOO_BIG NBD_REP_ERR(9)
#define NBD_REP_ERR_EXT_HEADER_REQD NBD_REP_ERR(10)

/* Numbers are big-endian.  put returns where the next one goes. */

static inline uint16_t get_be16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t get_be32(const uint8_t *p)
{
	return (uint32_t)get_be16(p) << 16 | get_be16(p + 2);
}

static inline uint64_t get_be64(const uint8_t *p)
{
	return (uint64_t)get_be32(p) << 32 | get_be32(p + 4);
}

static inline uint8_t *put_be16(uint8_t *p, unsigned v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
	return p + 2;
}

static inline uint8_t *put_be32(uint8_t *p, uint32_t v)
{
	return put_be16(put_be16(p, v >> 16), v & 0xffff);
}

static inline uint8_t *put_be64(uint8_t *p, uint64_t v)
{
	return put_be32(put_be32(p, (uint32_t)(v >> 32)), (uint32_t)v);
}

/* Sizes in bytes. */
enum {
	PROTO_STRING_MAX = 4096,		/* "Conventions" */
	PROTO_MAX_PAYLOAD = 32 * 1024 * 1024,	/* "Size constraints" */
	PROTO_MAX_READ = 64 * 1024 * 1024,	/* more than we advertise: others serve it, too */
	PROTO_STATUS_MAX = 1024 * 1024 * 1024,	/* the range of a BLOCK_STATUS that we ask */
	PROTO_PREFERRED_BLOCK = 4096,
	PROTO_GREETING_SIZE = 18,
	PROTO_OLDSTYLE_SIZE = 152,
	PROTO_CLIENT_FLAGS_SIZE = 4,
	PROTO_OPTION_SIZE = 16,			/* an option's header */
	PROTO_OPTION_MAX = 64 * 1024,		/* option data that is taken as a whole */
	PROTO_OPTION_REPLY_SIZE = 20,		/* the header of an answer to an option */
	PROTO_OPTION_REPLY_ROOM = 32 * 1024,	/* room for the answer to one option */
	PROTO_LIST_ROOM = PROTO_OPTION_REPLY_ROOM - PROTO_OPTION_REPLY_SIZE,	/* for all exports */
	PROTO_LIST_ENTRY = PROTO_OPTION_REPLY_SIZE + 4,	/* besides name and description */
	PROTO_EXPORT_SIZE = 10,			/* an export's size and flags ... */
	PROTO_ZEROES_SIZE = 124,		/* ... and what may follow them */
	PROTO_REQUEST_SIZE = 28,		/* a request's header ... */
	PROTO_EXTENDED_REQUEST_SIZE = 32,	/* ... and one with a length of 64 bits */
	PROTO_REPLY_ROOM = 128,			/* room for any reply's header */
	PROTO_EXTENT_SIZE = 8,			/* one extent of NBD_REPLY_TYPE_BLOCK_STATUS */
	PROTO_EXTENDED_EXTENT_SIZE = 16,	/* ... and of NBD_REPLY_TYPE_BLOCK_STATUS_EXT */
	PROTO_CLIENT_ROOM = 3 * PROTO_STRING_MAX + 256,	/* for all that a client's handshake sends */
	PROTO_CLIENT_WANT_MAX = PROTO_OPTION_REPLY_SIZE + PROTO_OPTION_MAX,
	PROTO_REASON_MAX = 256,
	PROTO_REPLY_SIZE = 16,			/* the shortest reply, and the beginning of all */
};

/* What the handshake tells of an export. */
struct proto_export {
	const char *name;		/* UTF-8, at most PROTO_STRING_MAX bytes */
	const char *description;	/* likewise */
	uint64_t size;			/* bytes */
	uint16_t flags;			/* transmission flags, without SEND_DF */
};

struct proto_exports {
	const struct proto_export *const *entry;	/* at least one; no name is there twice */
	size_t count;		/* so few that their entries fit in PROTO_LIST_ROOM */
	bool any_name;		/* a name that is not in the table means the first */
};

/* What one connection has negotiated; all zero is the state before the client's flags. */
struct proto_session {
	const struct proto_export *export;	/* NULL until transmission */
	bool fixed;			/* fixed newstyle */
	bool no_zeroes;
	bool structured;		/* replies in chunks */
	bool extended;			/* and all headers extended; only if structured */
	bool allocation;		/* base:allocation was chosen ... */
	uint64_t allocation_name;	/* ... for the export name with this hash */
};

/* A request's header: "Request message". */
struct proto_request {
	uint64_t cookie;
	uint64_t off;
	uint64_t len;
	uint16_t cmd;
	uint16_t flags;
	bool payload;		/* len bytes of it follow the header */
};

/* One run of blocks of the same status: "NBD_REPLY_TYPE_BLOCK_STATUS". */
struct extent {
	uint64_t len;		/* bytes, not 0 */
	uint32_t flags;		/* NBD_STATE_* */
};

/* An answer that is being written. */
struct proto_out {
	uint8_t *p;
	size_t len, cap;
	const uint8_t *unknown;	/* the name, in the option, of an export that is not there; or NULL */
	size_t unknown_len;
};

enum proto_next {
	PROTO_HAGGLE,		/* send the answer, then expect another option */
	PROTO_TRANSMIT,		/* send the answer, then transmission begins */
	PROTO_CLOSE,		/* send the answer, if there is one, then close */
};

/* Whether s may be sent as a string: "Conventions". */
bool proto_is_string(const char *s);

/*
 * Write the server's first words to p, of PROTO_GREETING_SIZE bytes, or, with an export, those of
 * "Oldstyle negotiation", of PROTO_OLDSTYLE_SIZE.  Returns where they end.
 */
uint8_t *proto_put_greeting(const struct proto_export *e, uint8_t *p);

/* Take the client's flags.  False if it wants what was not offered: drop the connection. */
bool proto_client_flags(struct proto_session *s, const uint8_t *p);

/* Take an option's header.  False if the magic is wrong: drop the connection. */
bool proto_get_option(const uint8_t *p, uint32_t *opt, uint32_t *len);

/*
 * Handle one whole option and write its answer to out, which has PROTO_OPTION_REPLY_ROOM bytes.
 * Data of more than PROTO_OPTION_MAX is refused, and need not be there.  "Option types".
 */
enum proto_next proto_option(struct proto_session *s, const struct proto_exports *exports,
			     uint32_t opt, const uint8_t *data, size_t len, struct proto_out *out);

/*
 * Take a request's header, of which n bytes are here at p.  Sets *size to its bytes, or to 0 if
 * more must come first.  NULL, or why to drop the connection.
 */
const char *proto_get_request(const struct proto_session *s, const uint8_t *p, size_t n,
			      struct proto_request *r, size_t *size);

/*
 * The one gate for requests: 0 if r may be carried out on the session's export, else the errno
 * for its reply.  What passes has a known command with flags of its own, on a range inside the
 * export, and a payload if it is a WRITE, and only then.
 */
int proto_check_request(const struct proto_session *s, const struct proto_request *r);

/* Whether the command changes the export. */
bool proto_cmd_writes(uint16_t cmd);

/* The value on the wire for an errno: one of NBD_E*. */
uint32_t proto_error(int err);

/*
 * Replies.  Each writes at p, which has PROTO_REPLY_ROOM bytes, and returns where what it wrote ends.
 * They choose the form by what the session negotiated.
 */

/* The reply to a request without data, or with an error (an errno, 0 for none). */
uint8_t *proto_put_reply(const struct proto_session *s, const struct proto_request *r, int err,
			 uint8_t *p);

/* Whether data of the READ r is sent in chunks that each say where they belong. */
bool proto_in_chunks(const struct proto_session *s, const struct proto_request *r);

/*
 * What precedes a run of data at off of a READ: a chunk's header; where there are no chunks the
 * header of all of it before the first run, and nothing before others.  In chunks it is also all that
 * there is to a hole, which NBD_STATE_ZERO means.
 */
uint8_t *proto_put_run(const struct proto_session *s, const struct proto_request *r, uint64_t off,
		       const struct extent *run, uint8_t *p);

/* The reply to a BLOCK_STATUS: p has room for n extents of PROTO_EXTENDED_EXTENT_SIZE as well. */
uint8_t *proto_put_status(const struct proto_session *s, const struct proto_request *r,
			  const struct extent *extent, uint32_t n, uint8_t *p);

/* The client's side. */

/* What a server has said of its export. */
struct proto_offer {
	uint64_t size;				/* bytes, below 2^63 */
	uint16_t flags;				/* transmission flags */
	uint32_t min_block, max_block;		/* bytes: powers of two, up to 64 KiB, 32 MiB */
	bool structured;
	bool allocation;			/* it tells base:allocation ... */
	uint32_t allocation_id;			/* ... under this number */
};

/* A handshake. */
struct proto_client {
	size_t want;			/* bytes of the message that was looked at */
	uint8_t *out;			/* where to write what is to be sent; the caller's ... */
	size_t out_len;			/* ... and how many bytes of it there are */
	const char *name;		/* of the export */
	bool zeroes;			/* 124 of them follow the answer to EXPORT_NAME */
	uint32_t opt;			/* the option that was sent last; 0 before the first */
	bool told;			/* the offer has a size */
	struct proto_offer offer;
	char reason[PROTO_REASON_MAX];	/* why it failed */
};

/* Begin.  name is a string in the sense of proto_is_string(), and must stay. */
void proto_client_begin(struct proto_client *c, const char *name);

/*
 * Take the next message, of which n bytes are here at in, and write what is to be sent to c->out.  If
 * c->want, at most PROTO_CLIENT_WANT_MAX, is more than n nothing was taken: more must come first.
 * PROTO_TRANSMIT: c->offer is complete.  PROTO_CLOSE: c->reason says why.
 */
enum proto_next proto_client_take(struct proto_client *c, const uint8_t *in, size_t n);

/* Write a request's header to p, of PROTO_REQUEST_SIZE bytes. */
void proto_put_request(const struct proto_request *r, uint8_t *p);

enum { PROTO_GAPS_MAX = 32 };

/* Data that has not come: bytes of the export, without the one at to. */
struct proto_gap {
	uint64_t from, to;
};

/* What has come of the answer to a request. */
struct proto_answer {
	uint32_t error;			/* the last one on the wire, 0 for none */
	unsigned gaps;			/* in the data of a READ */
	struct proto_gap gap[PROTO_GAPS_MAX];
	struct extent *extent;		/* of a BLOCK_STATUS; else NULL */
	unsigned extents, room;		/* that have come, and that there is memory for: not 0 */
	uint64_t left;			/* bytes that they do not describe yet */
};

/* extent has room for that many extents; NULL for a READ. */
void proto_answer_begin(struct proto_answer *a, const struct proto_request *r,
			struct extent *extent, unsigned room);

/*
 * A simple reply, or a chunk of a structured one: "Simple reply message", "Structured reply
 * chunk message".  Its head is all of it but data, extents and texts.
 */
struct proto_reply {
	size_t head;			/* bytes */
	uint16_t type;			/* NBD_REPLY_TYPE_*, of a simple reply too; all errors are one */
	bool last;			/* the answer ends with it */
	uint64_t off;			/* of data or a hole */
	uint32_t len;			/* likewise; else 0 */
	uint32_t payload;		/* bytes behind the head */
};

/* The cookie of the reply that begins at p. */
static inline uint64_t proto_reply_cookie(const uint8_t *p)
{
	return get_be64(p + 8);
}

/*
 * Take the head of a reply, of which n bytes are here at p, PROTO_REPLY_SIZE at least.  a is the
 * answer with its cookie; NULL if there is none.  If r->head is more than n nothing was taken: more
 * must come first.  Data and holes lie inside the request, and no byte of it has come before.
 * NULL, or why the server must not say that.
 */
const char *proto_get_reply(struct proto_answer *a, const struct proto_offer *offer,
			    const uint8_t *p, size_t n, struct proto_reply *r);

/*
 * Take n bytes of the payload of NBD_REPLY_TYPE_BLOCK_STATUS, whole extents, and clip them to the
 * request.  Those without room are checked as well.  NULL, or what is wrong with them.
 */
const char *proto_get_extents(struct proto_answer *a, const uint8_t *p, size_t n);

/* After the last reply and its payload: NULL, or what is missing. */
const char *proto_answer_end(const struct proto_answer *a);

#endif
