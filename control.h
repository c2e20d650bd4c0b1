/*
 * control.h - what the control socket tells and does in every mode.
 *
 * There is one at most.  Main thread only; nothing here blocks.
 */
#ifndef XNBD_CONTROL_H
#define XNBD_CONTROL_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>

#include "backend.h"
#include "ctl.h"
#include "options.h"

/* What is asked of the owner of snapshots: NULL if one will be made, or why not. */
typedef const char *control_want_snapshot(void *arg);

/* Listen, if the options name a socket.  False after logging why not. */
bool control_open(const struct options *o, struct export *e,
		  control_want_snapshot *want_snapshot, void *arg);

/* No more commands. */
void control_close(void);

/* For poll(): as ctl_poll(), ctl_timeout() and ctl_turn(). */
size_t control_poll(struct pollfd *pfd);
int control_timeout(void);
void control_turn(const struct pollfd *pfd, size_t n);

/* report_gather() is complete. */
void control_gathered(void);

/* A snapshot begins, and shows this instant. */
void control_snapshot_begun(void);

/* One has ended, even if it has never begun: its path, or NULL and why there is none. */
void control_snapshot_ended(const char *path, const char *error);

#endif
