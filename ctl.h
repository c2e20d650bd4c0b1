/*
 * ctl.h - the control socket: commands in lines of text.  Main thread only; nothing blocks.
 *
 * The lines are documented in xnbd-bgctl(1), CONTROL SOCKET.
 */
#ifndef XNBD_CTL_H
#define XNBD_CTL_H

#include <stdbool.h>

enum { CTL_LINE_MAX = 8192 };	/* bytes of a command */

struct options;

/*
 * Listen, with mode 0600, in place of a stale socket, if the options name one; what is to be served
 * is open.  False after logging why not.  There is one such socket at most; what follows may be
 * called without it.
 */
bool ctl_open(const struct options *o);

/* A proxy is to become a target; the log says what comes of it. */
void ctl_switch(void);

/* Go on with snapshots and with a proxy, and answer those who wait for what has ended. */
void ctl_tend(void);

/* Close its connections. */
void ctl_close(void);

#endif
