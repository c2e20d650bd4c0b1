/*
 * conn.h - one client's connection: handshake, requests in, replies out.
 *
 * A connection belongs to a thread.  But for conn_new(), all functions are called by that thread,
 * and none of them blocks.
 */
#ifndef XNBD_CONN_H
#define XNBD_CONN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "access.h"
#include "loop.h"
#include "proto.h"
#include "util.h"

struct request;
struct stats;
struct tx;

/* What the connections of one thread share, for the current turn. */
struct workspace {
	struct loop *loop;
	struct tx *tx;			/* empty between turns */
	uint8_t *rx;
	struct request *spare;		/* the last that was freed; most are done before the next one comes */
};

/* How a connection begins. */
enum greeting {
	GREET_NEWSTYLE,
	GREET_OLDSTYLE,		/* tells size and flags of the default export, no negotiation */
	GREET_CONNECTED,	/* somebody else has negotiated: transmission at once */
};

enum conn_state {
	CONN_CLIENT_FLAGS,
	CONN_OPTION,
	CONN_REQUEST,
	CONN_FINISHING,		/* takes no more requests, and ends when all replies are sent */
	CONN_LINGERING,		/* all is sent; waits for the client to close */
	CONN_DEAD,		/* the socket is closed; ends when no request is in flight */
};

struct conn {
	struct source source;		/* the socket */
	struct workspace *workspace;	/* of its thread */
	enum greeting greeting;
	enum conn_state state;
	const struct proto_exports *exports;
	struct proto_session session;
	struct export *export;		/* NULL until transmission */
	struct stats *stats;		/* likewise */
	uint64_t deadline;		/* now_ms() at which it is closed, 0 for none */

	uint8_t *kept;			/* received and not taken yet */
	size_t kept_len;
	uint32_t skipped, skip;		/* CONN_OPTION: one that is too large, and bytes of it to come */
	struct request *current;	/* CONN_REQUEST: the WRITE whose payload arrives; at: what is to come */
	uint64_t heard;			/* now_us() when it was found to be there, but for the loop's polled */

	struct request *stream;		/* the READ that is answered in pieces, before all others */
	struct request *piece, **piece_end;	/* before its at, in order; some are lent */

	struct request *back, **back_end;	/* to be answered, or carried out again */
	struct tx *backlog;		/* replies that the client does not take yet */
	struct request *out;		/* what others have */
	unsigned in_flight;		/* requests that are not done */
	uint64_t buffered;		/* bytes of data that they need */
	size_t spent;			/* bytes of this turn */

	atomic_bool dead;		/* as the state is; for other threads */
	bool stopping;			/* the server is */
	const char *end;		/* CONN_FINISHING: why it ends, for the log */
	bool gone;			/* the client has closed its side, or all of it */
	bool orderly;			/* gone, and all that it sent is kept, with a DISC in it */
	bool blocked;			/* kept may hold whole requests, taken when there is room */
	bool lively;			/* had something to read in its last turn */
	bool tired;			/* that has ended before all was done: another must follow */

	/* Of clients.c. */
	struct mail mail;		/* while it is on its way to a thread */
	struct guest *guest;		/* until its place is given up */
	uint64_t active;		/* now_ms() of the last turn that had something to read */
	uint64_t patience;		/* milliseconds of silence after that, and then it is parked */
	char peer[ADDRESS_MAX];
};

/*
 * Make a connection of a socket, which it owns from now on; exports must outlive it.  A host that is
 * silent for keepalive seconds has lost it; 0 for never.  NULL if out of memory, and then the socket
 * is still the caller's.
 */
struct conn *conn_new(int fd, enum greeting greeting, const struct proto_exports *exports,
		      const char *peer, unsigned keepalive);

/* Send the first words.  Its workspace is set. */
void conn_start(struct conn *c);

/* What to poll() for; 0 means nothing at all, not even a hang-up. */
short conn_events(const struct conn *c);

/*
 * Receive and send what can be; revents is what poll() saw, or may have missed.  With 0 its deadline
 * may have passed, or there may be room again.
 */
void conn_turn(struct conn *c, short revents);

/*
 * Whether the client's host has answered nothing for that many seconds, though it has been asked;
 * never for 0.  A host that answers may be slow to take what it is sent.  *owes: it may come to that.
 */
bool conn_has_vanished(const struct conn *c, unsigned seconds, bool *owes);

/* Whether nothing is to be done until the client speaks. */
bool conn_may_park(const struct conn *c);

/* The server stops: finish what has been received, and close.  May be told again. */
void conn_stop(struct conn *c);

/* Whether it has ended and conn_free() may be called. */
bool conn_is_over(const struct conn *c);

/* Close it whatever it does.  Requests in flight must have come back before conn_free(). */
void conn_kill(struct conn *c, const char *why);

void conn_free(struct conn *c);

/* False if out of memory; workspace_free() may then be called all the same. */
bool workspace_init(struct workspace *w, struct loop *loop);
void workspace_free(struct workspace *w);

#endif
