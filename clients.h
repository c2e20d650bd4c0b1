/*
 * clients.h - the threads that serve clients.
 */
#ifndef XNBD_CLIENTS_H
#define XNBD_CLIENTS_H

#include <stddef.h>

#include "conn.h"

/*
 * Start the first of at most max threads.  A client whose host owes an answer for keepalive seconds
 * is gone; 0 for never.  The main thread is woken whenever a connection ends.  Main thread.  0 or
 * -errno.
 */
int clients_begin(unsigned max, unsigned keepalive);

/*
 * Give a connection to a thread, which owns it then.  Another thread is started if none is idle and
 * the bound and the system allow it.  Main thread.
 */
void clients_add(struct conn *c);

/* How many connections there are, also of clients that are gone.  Any thread. */
size_t clients_count(void);

/* Let connections that had no room try again.  Any thread. */
void clients_admit(void);

/* Ask all connections to finish.  Does not wait. */
void clients_stop(void);

/* Wait for all threads to end, after clients_stop(). */
void clients_join(void);

/* Free everything, when no other thread can complete a request any more. */
void clients_free(void);

#endif
