/*
 * dial.h - an attempt to make a connection to an NBD server.
 *
 * Resolving a name and connecting may hang for as long as they please, so each attempt has a
 * thread of its own, that is left alone with its memory when the attempt is given up.
 */
#ifndef XNBD_DIAL_H
#define XNBD_DIAL_H

#include <stdbool.h>

#include "proto_client.h"

/* Where a server is, and which of its exports is meant. */
struct dial_target {
	char *host;		/* a name, an address without brackets, or a path of a socket */
	char *port;		/* NULL for a Unix socket */
	char *export_name;
	char address[256];	/* "host:port", "[::1]:port" or "unix:/path", maybe shortened */
};

/*
 * host may be "unix:PATH", and an address may be in brackets; port NULL means NBD's own.  NULL
 * if out of memory.  dial_target_free() takes NULL.
 */
struct dial_target *dial_target_new(const char *host, const char *port, const char *export_name);
struct dial_target *dial_target_copy(const struct dial_target *t);
void dial_target_free(struct dial_target *t);

struct dial;

/*
 * Start an attempt, that takes up to timeout_ms.  NULL if out of memory or
 * descriptors, or if too many that were given up still hang.
 */
struct dial *dial_start(const struct dial_target *t, unsigned timeout_ms);

/* A descriptor that is readable when the attempt has ended. */
int dial_fd(const struct dial *d);

/*
 * The socket of the attempt, which does not block, and what the server said; or -1, and why, in
 * reason of PROTO_REASON_MAX bytes, also when the attempt has not ended.  Once.
 */
int dial_take(struct dial *d, struct proto_offer *offer, char *reason);

/* Free it; an attempt that has not ended is given up.  NULL is allowed. */
void dial_free(struct dial *d);

#endif
