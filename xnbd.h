/*
 * xnbd.h - the types that pass between rooms.
 */
#ifndef XNBD_H
#define XNBD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "loop.h"
#include "order.h"
#include "proto.h"
#include "util.h"
#include "worker.h"

#if defined(XNBD_PORTABLE)
#define XNBD_VERSION "1.0.0-portable"
#else
#define XNBD_VERSION "1.0.0"
#endif

/*
 * One command in flight, or a piece of one.  It is made by a connection, handed to the export's
 * backend, and comes back to the connection's loop; only one of them touches it at a time.
 */
struct request {
	struct job job;			/* for the worker that runs it */
	struct mail mail;		/* on its way back to its connection's thread */
	struct request *next;		/* list link of whoever holds it */
	struct conn *conn;
	struct request *sibling, **back;	/* the others of its connection that are in flight */
	struct backend *backend;
	const atomic_bool *abandoned;	/* its client is gone; NULL for what no client asked for */
	bool lent;			/* it counts among those of its connection that are in flight */
	bool absent;			/* blocks have to be brought from elsewhere first */
	bool again;			/* it comes back to be carried out again */
	void (*done)(struct request *);	/* any thread may call it, see request_done() */
	struct proto_request h;		/* off and len lie inside the export */
	struct change change;		/* what changes the disk, and was not done at once */
	struct span at;			/* what is not done, or not brought, yet; at first all */
	struct fetch *fetch;		/* that it waits for; guarded by the fetcher's lock */
	struct request *fellow;		/* the next one that waits for this fetch; likewise */
	uint64_t lacks;			/* bytes of at, from its beginning, that this brings */
	int error;			/* an errno, 0 for none */
	bool refused;			/* error is the client's own */
	uint64_t commits;		/* FLUSH: of its layer, that had begun when it came */
	uint64_t begun;			/* stats_time() of the turn in which it came */

	uint8_t *buf;			/* READ: where to put data; WRITE: the payload */
	uint64_t buf_len;		/* if it is the request's own: freed with it */
	uint64_t counted;		/* bytes of it that its connection is charged with */

	/*
	 * BLOCK_STATUS: the answer.  READ by a worker: which runs of it are holes, whose part of
	 * buf is not filled; none means that all is data.  Freed with the request.
	 */
	struct extent *extent;
	unsigned extents;

	/*
	 * A WRITE whose payload arrives in pieces, a READ that is answered in pieces: each piece is
	 * a request of its own.
	 */
	struct request *whole;		/* in a piece: what it belongs to */
	unsigned pieces;		/* in the whole: those under way, and one while there will be more */
};

#endif
