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
	PROTO_CLIENT_ROOM = 3 * PROTO_STRING_MAX + 256,	/* room for all that a handshake sends */
	PROTO_CLIENT_WANT_MAX = PROTO_OPTION_REPLY_SIZE + PROTO_OPTION_MAX,
	PROTO_REASON_MAX = 256,
	PROTO_REPLY_SIZE = 16,		/* the shortest reply, and the beginning of all */
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
