/*
 * link.h - one connection to the origin, in transmission: requests out, answers in.
 *
 * It never blocks, and belongs to one thread.  Times are milliseconds of a clock that its owner
 * may stop; they are only compared with each other.
 */
#ifndef XNBD_LINK_H
#define XNBD_LINK_H

#include <stdbool.h>
#include <stdint.h>

#include "origin.h"
#include "proto_client.h"

struct link;

/* Takes the socket over, which must not block; NULL if out of memory, and it is closed. */
struct link *link_new(int fd, const struct proto_offer *offer);

/* Close it.  Returns what it owes, oldest first: it is to be asked again. */
struct origin_request *link_free(struct link *l);

int link_fd(const struct link *l);
const struct proto_offer *link_offer(const struct link *l);

/* What to poll() for, of POLLIN and POLLOUT. */
short link_events(const struct link *l);

/* Whether one more may be asked. */
bool link_has_room(const struct link *l);

/* About how many bytes it owes. */
uint64_t link_owes(const struct link *l);

/* Ask; r->sent is set already.  It goes out with link_send(). */
void link_ask(struct link *l, struct origin_request *r, uint64_t now);

/*
 * The functions below return NULL, or why the link is of no use any more, in words that last
 * as long as the link.
 */

/* Send what has been asked. */
const char *link_send(struct link *l);

/*
 * Receive once.  Requests that are answered are appended at *finished, with their error set;
 * *more says whether to try again at once, and *bytes the data that came.
 */
const char *link_receive(struct link *l, uint64_t now, struct origin_request **finished,
			 bool *more, uint64_t *bytes);

/*
 * A link that owes something and has been silent for timeout_ms is dead.  *left becomes the time
 * until then, or stays as it is.
 */
const char *link_check(struct link *l, uint64_t now, unsigned timeout_ms, uint64_t *left);

#endif
