/*
 * proto_client.h - the NBD wire format, the client's side of it.
 *
 * Pure functions, like those of proto.h.  Nothing that a server sends is trusted: what does not
 * fit the protocol, or what was asked, is found here, with a reason for the log.
 */
#ifndef XNBD_PROTO_CLIENT_H
#define XNBD_PROTO_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto.h"

/* Sizes in bytes. */
enum {
	PROTO_CLIENT_ROOM = PROTO_STRING_MAX + 64,	/* room for what is sent at once */
	PROTO_CLIENT_TAKE_MAX = PROTO_OPTION_MAX,	/* the most that is wanted at once */
	PROTO_REASON_MAX = 256,
	PROTO_REPLY_HEAD_MAX = 32,
};

/* What a server has said of its export. */
struct proto_offer {
	uint64_t size;				/* bytes, below 2^63 */
	uint16_t flags;				/* transmission flags */
	uint32_t min_block, max_block;		/* bytes: powers of two, up to 64 KiB, 32 MiB */
	bool structured;
	bool allocation;			/* it tells base:allocation ... */
	uint32_t allocation_id;			/* ... under this number */
};

enum proto_client_state {
	PROTO_CLIENT_GREETING,
	PROTO_CLIENT_OLDSTYLE,
	PROTO_CLIENT_FLAGS,
	PROTO_CLIENT_REPLY,			/* to an option: the header ... */
	PROTO_CLIENT_REPLY_DATA,		/* ... and what follows it */
	PROTO_CLIENT_EXPORT,			/* the answer to EXPORT_NAME */
};

/* A handshake. */
struct proto_client {
	enum proto_client_state state;
	size_t want;				/* bytes that come next */
	uint8_t *out;				/* what is to be sent now ... */
	size_t out_len;				/* ... of so many bytes */
	const char *name;			/* of the export */
	bool zeroes;				/* 124 of them follow the answer to EXPORT_NAME */
	uint32_t opt;				/* the option that was sent last ... */
	uint32_t reply, reply_len;		/* ... and its reply's header */
	bool told;				/* the offer has a size */
	struct proto_offer offer;
	char reason[PROTO_REASON_MAX];		/* why it failed */
};

/*
 * Begin.  name is a string in the sense of proto_is_string(), out has room for PROTO_CLIENT_ROOM
 * bytes, and both must stay.
 */
void proto_client_begin(struct proto_client *c, const char *name, uint8_t *out);

/*
 * Take the c->want bytes at in.  PROTO_HAGGLE: send c->out, then receive c->want bytes, 1 to
 * PROTO_CLIENT_TAKE_MAX.  PROTO_TRANSMIT: c->offer is complete.  PROTO_CLOSE: c->reason says why.
 */
enum proto_next proto_client_take(struct proto_client *c, const uint8_t *in);

/* Write a request's header to p, of PROTO_REQUEST_SIZE bytes. */
void proto_put_request(const struct proto_request *r, uint8_t *p);

/*
 * A simple reply, or a chunk of a structured one: "Simple reply message", "Structured reply
 * chunk message".  Its head is all of it but data, extents and texts.
 */
struct proto_reply {
	bool simple;
	uint16_t type;			/* of a chunk; all errors are NBD_REPLY_TYPE_ERROR */
	bool last;			/* the answer ends with it */
	size_t head;			/* bytes */
	uint64_t cookie;
	uint32_t error;			/* as on the wire, 0 for none */
	uint64_t off;			/* of data or a hole */
	uint32_t len;			/* likewise; else 0 */
	uint32_t context;		/* of extents */
	uint32_t payload;		/* bytes behind the head; of a simple reply it depends */
};

/*
 * Take the head of a reply, of which n bytes are here at p.  Sets r->head, to more than n if
 * more must come first.  NULL, or what is wrong with it.
 */
const char *proto_get_reply(const uint8_t *p, size_t n, struct proto_reply *r);

enum { PROTO_PIECES_MAX = 32 };	/* of an answer, with gaps between them */

/* What has come of the answer to a request. */
struct proto_answer {
	uint64_t off;
	uint32_t len;
	bool status;			/* to BLOCK_STATUS, not to READ */
	uint32_t error;			/* the first one on the wire, 0 for none */
	uint64_t described;		/* bytes by extents */
	unsigned pieces;
	struct {
		uint32_t from, to;	/* bytes of the request, without what is around them */
	} piece[PROTO_PIECES_MAX];
};

void proto_answer_begin(struct proto_answer *a, const struct proto_request *r);

/*
 * Take the head of a reply with this answer's cookie; sets r->off, r->len and r->payload of a
 * simple reply.  Data and holes lie inside the request, and no byte of it has come before.  NULL,
 * or why the server must not say that.
 */
const char *proto_answer_add(struct proto_answer *a, const struct proto_offer *offer,
			     struct proto_reply *r);

/*
 * Take the next extent, of PROTO_EXTENT_SIZE bytes, from the payload of a chunk, and clip it to
 * the request: e->len is 0 if it is behind it.  NULL, or what is wrong with it.
 */
const char *proto_answer_extent(struct proto_answer *a, const uint8_t *p, struct extent *e);

/* After the last reply and its payload: NULL, or what is missing. */
const char *proto_answer_end(const struct proto_answer *a);

#endif
