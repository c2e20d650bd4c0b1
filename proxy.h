/*
 * proxy.h - the life of a proxy: what it is asked for, and how it becomes a target.
 *
 * There is one.  Main thread only; nothing here blocks once it is open.
 */
#ifndef XNBD_PROXY_H
#define XNBD_PROXY_H

#include <stdbool.h>

#include "backend.h"
#include "ctl.h"
#include "options.h"

/*
 * Connect to the origin, open the cache.  wake is to be called by any thread when proxy_tend()
 * has something to do.  NULL after logging why not.
 */
struct backend *proxy_open(const struct options *o, void (*wake)(void));

/* Serve the export that the backend is in, and tell ctl what comes of its commands. */
void proxy_serve(struct export *e, struct ctl *ctl);

/* Threads may be started: begin to ask the origin.  False after logging why not. */
bool proxy_start(void);

/* What the control socket asks of it.  NULL if there is no proxy. */
const struct ctl_proxy_ops *proxy_ops(void);

/* Whether there is one that has not become a target. */
bool proxy_is_one(void);

/* Tell its state, if there is one. */
void proxy_query(struct ctl_reply *reply);

/* Become a target, if all blocks are here; the log says what comes of it. */
void proxy_switch(void);

/* Go on with what was waited for.  True if the export has just become a target. */
bool proxy_tend(void);
struct disk *proxy_disk(void);	/* from proxy_open() on */

/* The server stops: no more commands or copying. */
void proxy_stop(void);

/* Let go of requests that still wait for the origin. */
void proxy_give_up(void);

/* No request is left: nothing comes from the origin any more when this returns. */
void proxy_end(void);

#endif
