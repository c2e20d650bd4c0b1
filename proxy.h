/*
 * proxy.h - the life of a proxy: its control socket, and how it becomes a target.
 *
 * There is one.  Main thread only; nothing here blocks once it is open.
 */
#ifndef XNBD_PROXY_H
#define XNBD_PROXY_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>

#include "backend.h"
#include "ctl.h"
#include "options.h"

/*
 * Connect to the origin, open the cache.  wake is to be called by any thread when proxy_tend()
 * has something to do.  NULL after logging why not.
 */
struct backend *proxy_open(const struct options *o, void (*wake)(void));

/* Listen on the control socket, for the export that the backend is in.  False after logging. */
bool proxy_listen(struct export *e);

/* Threads may be started: begin to ask the origin.  False after logging why not. */
bool proxy_start(void);

/* For poll(): as ctl_poll(), ctl_timeout() and ctl_turn().  Nothing if there is no proxy. */
size_t proxy_poll(struct pollfd *pfd);
int proxy_timeout(void);
void proxy_turn(const struct pollfd *pfd, size_t n);

/* Become a target, if all blocks are here; the log says what comes of it. */
void proxy_switch(void);

/*
 * Go on with what was waited for.  True if the export has just become a target: its backend is
 * that of disk_backend(proxy_disk()) now.
 */
bool proxy_tend(void);
struct disk *proxy_disk(void);	/* from proxy_open() on */

/* Close the control socket: no more commands. */
void proxy_unlisten(void);

/* The server stops: no more commands or copying, and begin to make durable what is here. */
void proxy_stop(void);

/* Let go of requests that still wait for the origin. */
void proxy_give_up(void);

/* No request is left: nothing comes from the origin any more when this returns. */
void proxy_end(void);

#endif
