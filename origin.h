/*
 * origin.h - the proxy's connections to the remote server, the origin.
 *
 * One thread does all that waits for the network; a name is looked up by another.  The origin is
 * read, never written to, and not trusted: what it says is checked against what was asked.
 * A link that is lost, silent or wrong is made again for as long as it takes, and what it owed is
 * asked for again.
 */
#ifndef XNBD_ORIGIN_H
#define XNBD_ORIGIN_H

#include <stdbool.h>
#include <stdint.h>

#include "proto.h"

struct origin;

/* What goes first: the links to the origin are shared in this order. */
enum origin_priority {
	ORIGIN_DEMAND,		/* a client waits for it */
	ORIGIN_AHEAD,		/* a client may soon */
	ORIGIN_COPY,		/* the background copy; on links of its own where there are some */
	ORIGIN_PRIORITIES,
};

/* It belongs to the origin until done is called, once, whatever happens. */
struct origin_request {
	struct origin_request *next;		/* for whoever has it */
	enum origin_priority priority;
	uint64_t off, len;	/* bytes: multiples of min_block but at the end, 1 to max_block */

	/*
	 * The data is delivered in buf, len bytes from buffer_get(), which is the asker's to give
	 * back.  Or, if extent is set, room for extents of them: len may then be up to
	 * PROTO_STATUS_MAX, and the answer describes the beginning of the range, at least one
	 * extent, and at most all of it.
	 */
	uint8_t *buf;
	struct extent *extent;
	unsigned extents;

	/*
	 * Called by the origin's thread, or within origin_submit(); must not block.  error is 0;
	 * -EIO, the origin cannot, or does not tell extents; -ECANCELED.
	 */
	void (*done)(struct origin_request *);
	int error;

	/* The origin's own. */
	uint64_t cookie;
	uint64_t sent;		/* now_us() when it was sent last; also for the asker */
	struct proto_answer answer;
};

/*
 * Connect, and wait for that.  NULL after logging why not.  host is a name, an address (maybe in
 * brackets), or "unix:PATH", and then port is NULL; export_name "" is the default one.  All of them are
 * copied.  There are as many connections at most, 1 to 16, where the origin allows several.  A link
 * that owes an answer is dead after timeout_ms of silence.
 */
struct origin *origin_open(const char *host, const char *port, const char *export_name,
			   unsigned connections, unsigned timeout_ms);

/*
 * Log the connection and start the thread: nothing is asked before.  Main thread, once.  False after
 * logging why not.
 */
bool origin_start(struct origin *o);

/* What the first link was told: its size and block sizes hold while the program runs. */
const struct proto_offer *origin_limits(const struct origin *o);

/* Ask.  Any thread; does not block. */
void origin_submit(struct origin *o, struct origin_request *r);

/*
 * Data of that many bytes, which was delivered, has been put away.  While too much has not, the
 * origin delivers nothing.  Must be called once for each delivery.  Any thread.
 */
void origin_stored(struct origin *o, uint64_t bytes);

/*
 * Take everything back: all requests, and those to come, are done with -ECANCELED, and the
 * links are closed.  It may return before that.  Any thread; twice is allowed.
 */
void origin_cancel(struct origin *o);

/*
 * Go over to another origin, once a link to it has been made and its size is the same; the old
 * link is used until then.  Without export_name the name stays as it is.  NULL if that has begun, or
 * why not.  One at a time, and none after origin_cancel().  Main thread.
 */
const char *origin_redirect(struct origin *o, const char *host, const char *port,
			    const char *export_name);

/*
 * Whether the redirect has ended; the main thread is woken for that.  *error is NULL, or why it
 * failed, until the next one.
 */
bool origin_redirected(struct origin *o, const char **error);

struct origin_status {
	char address[256];		/* "host:port", "[::1]:port" or "unix:/path" */
	char export_name[256];		/* shortened with "..." at the end */
	unsigned links;			/* that are up */
	char reason[PROTO_REASON_MAX];	/* if there is none: why */
	uint64_t fetched;		/* bytes of data received */
	uint64_t waiting;		/* requests that are not done */
};

/* Any thread. */
void origin_status(struct origin *o, struct origin_status *status);

/*
 * Cancel, and end the thread: when this returns, done has been called for all requests.  Those that
 * are submitted later are done at once; origin_stored() may still be called.  Main thread.
 */
void origin_end(struct origin *o);

/* End it, and free it. */
void origin_close(struct origin *o);

#endif
