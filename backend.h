/*
 * backend.h - what serves the bytes of an export, and the way of a request to it and back.
 */
#ifndef XNBD_BACKEND_H
#define XNBD_BACKEND_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include "xnbd.h"

/* How an operation is run. */
enum how {
	TRY,	/* by a connection's loop: it must not block, and says -EAGAIN where it would */
	WAIT,	/* by a worker, after -EAGAIN, all of it: it may block on disk, not on a network */
};

/* The outcome of an operation is 0, a negative errno, -EAGAIN for TRY, or one of these. */
enum {
	/*
	 * Of flush and fetch: the backend keeps the request, and will call request_done() or
	 * request_again() for it, from any thread.
	 */
	PENDING = 1,

	/* Of read, write, zero, cache and extents: fetch() has to bring blocks first. */
	ABSENT = 2,
};

/*
 * The operations of a backend.  Several threads call them at the same time.  Ranges are inside the
 * backend's size, and not empty.  Whoever changes a range has begun with it in the backend's order
 * (order.h).
 */
struct backend_ops {
	/* Fill buf with the range. */
	int (*read)(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off, enum how how);

	/* Store buf in the range. */
	int (*write)(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off, enum how how);

	/* Make the range read as zeros; flags may hold NO_HOLE and FAST_ZERO.  WAIT. */
	int (*zero)(struct backend *b, uint64_t len, uint64_t off, unsigned flags);

	/* Make durable all that was done before. */
	int (*flush)(struct backend *b, struct request *r);

	/* Bring the range closer; a hint.  WAIT.  ABSENT, and *len bytes from its beginning are here. */
	int (*cache)(struct backend *b, uint64_t *len, uint64_t off);

	/*
	 * Describe the range from its beginning, in room for *count extents, of which there are so
	 * many then.  They may end before the range does.  WAIT.
	 */
	int (*extents)(struct backend *b, struct extent *extent, unsigned *count, uint64_t len,
		       uint64_t off);

	/* Free it, at the end of the program.  0, or -errno if something is not durable. */
	int (*close)(struct backend *b);
};

/* Where a backend has blocks brought from.  Several threads call it, likewise. */
struct backend_source {
	/*
	 * Begin to bring what the request lacks: a READ its range, others what r->at says.
	 * PENDING, or -errno, -EAGAIN for TRY, or 0: try again.  Of a READ up to READ_PIECE and of
	 * a BLOCK_STATUS that are PENDING the answer is made, of others not.
	 */
	int (*fetch)(struct backend *b, struct request *r, enum how how);

	/* Take back a request that fetch() keeps.  False if it is on its way back.  Any thread. */
	bool (*take_back)(struct backend *b, struct request *r);
};

struct backend {
	const struct backend_ops *ops;
	const struct backend_source *source;	/* NULL: nothing is ABSENT */
	const char *name;	/* of its export, for the log; NULL before export_init() */
	uint64_t size;		/* bytes; does not change */
	bool readonly;
	struct order *order;	/* of the image that changes go to */
	atomic_bool failed;	/* stable storage has: every request is answered with EIO */
	atomic_uint_least64_t look_again;	/* now_us(): READs are not searched for holes before */
};

/*
 * What all clients have asked for and not got yet, and how much that may be.  A client that has
 * nothing may ask all the same.
 */
struct load {
	atomic_size_t requests;
	atomic_size_t bytes;		/* of data that requests hold */
	size_t requests_max, bytes_max;
	void (*room)(void);		/* there is room again; any thread */
};
extern struct load load;

/* A name that clients ask for, and what they get. */
struct export {
	struct proto_export proto;
	struct backend *backend;
	struct lane lane;		/* of its requests, when they wait for the disk */
};

void export_init(struct export *e, struct backend *backend, const char *name,
		 const char *description);

enum {
	READ_PIECE = 256 * 1024,	/* a READ of more is answered in pieces of this */
	STEP_BYTES_MAX = 64 * 1024 * 1024,	/* between two looks whether somebody still wants it */
};

/*
 * Read without blocking: 0, -errno; -EAGAIN if a worker has to, ABSENT if blocks have to be brought
 * first, and then buf is undefined.
 */
int backend_try_read(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off);

/* Write without blocking: 0 or -errno; -EAGAIN or ABSENT: a request is needed. */
int backend_try_write(struct backend *b, const uint8_t *buf, uint64_t len, uint64_t off);

/*
 * Carry out the command of r, which proto_check_request() let pass, on the calling loop's thread
 * without blocking.  Returns 0, -errno, PENDING, or -EAGAIN: request_queue() does it.  For a READ of
 * more than READ_PIECE 0 says that its pieces can be read.
 */
int request_try(struct request *r);

/*
 * Let a worker carry it out, or whoever brings what it lacks; r->buf, of a WRITE, is its own.
 * r->done is called, maybe before this returns.
 */
void request_queue(struct request *r);

/* Make durable what the WRITE r did, if it asked for FUA: 0, -errno or PENDING. */
int request_commit(struct request *r);

/*
 * Take back a request that has not begun, since its client is gone.  False if it has: it will come
 * back by itself.  The loop's thread.
 */
bool request_take_back(struct request *r);

/* A backend completes a request that was PENDING, with 0 or -errno.  Any thread. */
void request_done(struct request *r, int error);

/* The same for one that is to be carried out again. */
void request_again(struct request *r);

/* The memory for the data of a READ or WRITE, counted, of its own from then on; or NULL. */
uint8_t *request_buffer(struct request *r);

/* Whether its client is gone. */
bool request_is_abandoned(const struct request *r);

/* The most extents that one BLOCK_STATUS reply has; clients ask again for what follows. */
enum { EXTENTS_MAX = 1024 };

#endif
