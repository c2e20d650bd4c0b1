/*
 * control.h - what the control socket tells and does in every mode.
 *
 * There is one at most.  Main thread only; nothing here blocks.
 */
#ifndef XNBD_CONTROL_H
#define XNBD_CONTROL_H

#include <stdbool.h>

#include "options.h"

/* Listen, if the options name a socket; what is to be served is open.  False after logging why not. */
bool control_open(const struct options *o);

/* A proxy is to become a target; the log says what comes of it. */
void control_switch(void);

/* Go on with what was waited for. */
void control_tend(void);

#endif
