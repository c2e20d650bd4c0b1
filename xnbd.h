/*
 * xnbd.h - the types that pass between rooms.
 */
#ifndef XNBD_H
#define XNBD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto.h"
#include "worker.h"

#if defined(XNBD_PORTABLE)
#define XNBD_VERSION "1.0.0-portable"
#else
#define XNBD_VERSION "1.0.0"
#endif

enum {
	BLOCK_SIZE = 4096,	/* the unit of bitmaps, of holes, and of write pieces */
};

/* A part of an open file. */
struct file_part {
	int fd;
	uint64_t off, len;	/* bytes */
};

/*
 * One command in flight, or a piece of one.  It is made by a connection, handed to the export's
 * backend, and comes back to the connection's loop; only one of them touches it at a time.
 */
struct request {
	struct job job;			/* for the worker that runs it */
	struct request *next;		/* list link of whoever holds it */
	struct conn *conn;
	struct backend *backend;
	struct gate *gate;		/* the export's */
	const atomic_bool *abandoned;	/* its client is gone; NULL for what no client asked for */
	bool inside;			/* the gate; whoever has the request leaves it */
	void (*done)(struct request *);	/* any thread may call it, see request_done() */
	struct proto_request h;		/* off and len lie inside the export */
	int error;			/* an errno, 0 for none */
	bool refused;			/* error is the client's own */
	uint64_t begun;			/* stats_time() of the turn in which it came */

	uint8_t *buf;			/* READ: where to put data; WRITE: the payload */
	bool owns_buf;			/* buf is freed with the request */

	/*
	 * BLOCK_STATUS: the answer.  READ by a worker: which runs of it are holes, whose part of
	 * buf is not filled; none means that all is data.  Freed with the request.
	 */
	struct extent *extent;
	unsigned extents;

	/* A WRITE whose payload arrives in pieces: each piece is a request of its own. */
	struct request *whole;		/* in a piece: the WRITE that it belongs to */
	unsigned pieces;		/* in the WRITE: pieces that are not done */
};

#endif
