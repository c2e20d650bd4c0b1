/*
 * access.h - which clients may connect: the rules of --allow, and how many there are.
 */
#ifndef XNBD_ACCESS_H
#define XNBD_ACCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/*
 * An address, and how many of its bits a client's must have in common with it.  IPv4 addresses
 * are kept as what IPv6 maps them to, ::ffff:0:0/96.
 */
struct access_rule {
	uint8_t address[16];
	uint32_t zone;		/* the interface of a link-local address, 0 for any */
	unsigned bits;
};

/*
 * Read ADDRESS[/PREFIX], where an IPv6 ADDRESS may have a %ZONE, and brackets.  NULL, or what is
 * wrong with it, in memory that lasts until the next call.
 */
const char *access_parse(struct access_rule *rule, const char *text);

/* Whether one of the rules matches a client's address. */
bool access_admits(const struct access_rule *rule, size_t count, const struct sockaddr *sa);

/* The place of a client. */
struct guest;

/* Make so many places.  Main thread, once. */
void access_open(size_t places);

/* A place for that client; NULL if there is none left.  Main thread. */
struct guest *access_enter(const struct sockaddr *sa);

/* Give the place up: *g is NULL then.  Whether it was one.  Any thread. */
bool access_leave(struct guest **g);

/* How many clients of that host are there, 0 for one without an address.  Main thread. */
size_t access_guests(const struct sockaddr *sa);

#endif
