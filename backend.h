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

/*
 * The outcome of an operation is 0, a negative errno, -EAGAIN for TRY, or this: the backend
 * keeps the request and will call request_done() for it, from any thread.  Not for a READ or
 * WRITE by TRY, whose buffer is the connection's.  A flush is outside the gate while it is
 * PENDING.
 */
enum { PENDING = 1 };

/*
 * The operations of a backend.  All entries are required.  Several threads call them at the same
 * time.  The range r->h.off, r->h.len is inside the backend's size.
 */
struct backend_ops {
	const char *name;

	/* Fill r->buf with the range. */
	int (*read)(struct backend *b, struct request *r, enum how how);

	/*
	 * Begin a READ whose range has to be brought from elsewhere, without blocking: r->buf is
	 * the request's own.  PENDING, or -EAGAIN: let a worker read.
	 */
	int (*fetch)(struct backend *b, struct request *r);

	/*
	 * Say which parts of which files, at most max, hold the range, so that the kernel can
	 * send them: all of it in the page cache, without waiting for the disk.  Returns the
	 * number of parts, or 0 if it is not so, or not known.  The files stay open as long as
	 * the backend, and show later writes.
	 */
	int (*locate)(struct backend *b, const struct request *r, struct file_part *part, int max);

	/* Store r->buf in the range. */
	int (*write)(struct backend *b, struct request *r, enum how how);

	/* Make durable all that was done before. */
	int (*flush)(struct backend *b, struct request *r, enum how how);

	/* Drop the range's contents; a hint. */
	int (*trim)(struct backend *b, struct request *r, enum how how);

	/* Make the range read as zeros; r->h.flags may hold NO_HOLE and FAST_ZERO. */
	int (*zero)(struct backend *b, struct request *r, enum how how);

	/* Bring the range closer; a hint. */
	int (*cache)(struct backend *b, struct request *r, enum how how);

	/*
	 * Describe the range from its beginning in r->extent, of room for max; set r->extents,
	 * at least 1.  It may stop early when there is no more room.
	 */
	int (*extents)(struct backend *b, struct request *r, unsigned max, enum how how);

	/* Free it, at the end of the program: replies may refer to its memory until then. */
	void (*close)(struct backend *b);
};

struct backend {
	const struct backend_ops *ops;
	uint64_t size;		/* bytes; does not change */
	bool readonly;
};

/*
 * A gate before a backend.  Whoever reads or changes the disk is inside.  The main thread may
 * close it; who then comes is turned away, and woken when it opens.
 */
struct gate {
	atomic_uint inside;
	atomic_bool closed;
	void (*emptied)(void);		/* closed, and nobody is inside any more; any thread */
	void (*opened)(void);		/* wakes those who were turned away */
};

/* What clients have asked for and not got yet, all of them together; and how much that may be. */
struct load {
	atomic_size_t requests;
	atomic_size_t bytes;		/* in buffers of requests */
	size_t requests_max, bytes_max;	/* 0: each connection has bounds of its own */
	void (*room)(void);		/* there is room again; any thread */
};

/* A name that clients ask for, and what they get. */
struct export {
	struct proto_export proto;
	struct load load;
	struct backend *backend;	/* changes only while the gate is closed */
	struct gate gate;
	struct lane lane;		/* of its requests, when they wait for the disk */
};

void export_init(struct export *e, struct backend *backend, const char *name,
		 const char *description, void (*emptied)(void), void (*opened)(void));

/* Go inside.  False if the gate is closed: then nobody has gone in. */
bool gate_enter(struct gate *g);

/* Stay inside once more, for a request that others complete.  The caller is inside. */
void gate_hold(struct gate *g);
void gate_leave(struct gate *g);

/*
 * Main thread.  gate_close() does not wait: true if nobody is inside, else emptied is called
 * when that is so, and gate_close() may be called again to see.
 */
bool gate_close(struct gate *g);
void gate_open(struct gate *g);

/*
 * Carry out the command of r, which proto_check_request() let pass, on the calling thread
 * without blocking.  Returns 0, -errno, -EAGAIN (use request_queue(), which does all of it), or
 * PENDING.
 */
int request_try(struct request *r);

/*
 * Let a worker carry it out, or whoever brings what a READ wants; r->buf is its own.  r->done is
 * called, maybe before this returns.
 */
void request_queue(struct request *r);

/* The same, but a worker in any case: for backends, of what was PENDING. */
void request_again(struct request *r);

/* The fetch operation of backends that bring nothing from elsewhere. */
int backend_fetches_nothing(struct backend *b, struct request *r);

/* Make durable what the WRITE r did, if it asked for FUA: 0, -errno or PENDING. */
int request_commit(struct request *r);

/* A backend completes a request that was PENDING, with 0 or -errno.  Any thread. */
void request_done(struct request *r, int error);

/* The most extents that one BLOCK_STATUS reply has; clients ask again for what follows. */
enum { EXTENTS_MAX = 1024 };

#endif
