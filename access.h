/*
 * access.h - which clients may connect: the rules of --allow, and how many there are.
 */
#ifndef XNBD_ACCESS_H
#define XNBD_ACCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>

/*
 * Add a rule: ADDRESS[/PREFIX], where an IPv6 ADDRESS may have a %ZONE, and brackets.  NULL, or what
 * is wrong with it, in memory that lasts until the next call.
 */
const char *access_allow(const char *text);

/* The place of a client. */
struct guest;

/* Make so many places, of which a host gets per_host at most; 0: all.  Main thread, once. */
void access_open(size_t places, size_t per_host);

/*
 * A place for a client of that address, which one of the rules has to match if there are any and it
 * does not come by a Unix socket.  NULL, and *why, which lasts until the next call.  Main thread.
 */
struct guest *access_enter(const struct sockaddr *sa, const char **why);

/* Give the place up, if there is one: *g is NULL then.  Whether it was one.  Any thread. */
bool access_leave(struct guest **g);

#endif
