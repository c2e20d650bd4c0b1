/*
 * link.h - one connection to the origin: made step by step; then requests out, answers in.
 *
 * It never blocks, and belongs to one thread.  Functions that return a string return NULL, or why
 * the link is of no use any more, in words that last as long as the link.
 */
#ifndef XNBD_LINK_H
#define XNBD_LINK_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>

#include "origin.h"
#include "proto_client.h"

/* Where a server is, and which of its exports is meant. */
struct link_target {
	char *host;		/* a name, an address without brackets, or a path of a socket */
	char *port;		/* NULL for a Unix socket */
	char *export_name;
	char address[256];	/* "host:port", "[::1]:port" or "unix:/path", maybe shortened */
};

/*
 * host may be "unix:PATH", and an address may be in brackets; port NULL means NBD's own.  NULL
 * if out of memory.  link_target_free() takes NULL.
 */
struct link_target *link_target_new(const char *host, const char *port, const char *export_name);
void link_target_free(struct link_target *t);

struct link;

/*
 * A link to be made to the target, which must stay until it is up.  The attempt, and later each
 * answer, may take timeout_ms.  NULL if out of memory.
 */
struct link *link_new(const struct link_target *t, unsigned timeout_ms);

/* Close it.  Returns what it owes, newest first: it is to be asked again.  Takes NULL. */
struct origin_request *link_free(struct link *l);

/* What to poll() for: POLLIN, POLLOUT, or both. */
struct pollfd link_poll(const struct link *l);

/* Begin the attempt, or go on with it when poll() says so, until the link is up. */
const char *link_advance(struct link *l);

/* What the server said of its export: NULL until the link is up, and the rest may be called. */
const struct proto_offer *link_offer(const struct link *l);

/* Whether one more may be asked. */
bool link_has_room(const struct link *l);

/* About how many bytes it owes. */
uint64_t link_owes(const struct link *l);

/* Ask; r->sent is set already.  It goes out with link_send().  For now see link_check(). */
void link_ask(struct link *l, struct origin_request *r, uint64_t now);

/* Send what has been asked. */
const char *link_send(struct link *l);

/*
 * Receive once.  Requests that are answered are appended at *finished, with their error set;
 * *more says whether to try again at once, and *bytes the data that came.
 */
const char *link_receive(struct link *l, uint64_t now, struct origin_request **finished,
			 bool *more, uint64_t *bytes);

/*
 * A link that owes something and has been silent for too long is dead, and so is an attempt.
 * now is in milliseconds of a clock that its owner may stop; an attempt goes by now_ms().  *left
 * becomes the time until then, or stays as it is.
 */
const char *link_check(struct link *l, uint64_t now, uint64_t *left);

#endif
