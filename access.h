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

/* A client among all that are there. */
struct guest {
	struct guest *next, **back;	/* back is NULL if it is not among them */
	uint8_t address[16];
};

/* Count a client until access_leave().  Any thread. */
void access_enter(struct guest *g, const struct sockaddr *sa);

/* Whether it was counted.  It may be called for any. */
bool access_leave(struct guest *g);

/* How many there are of that host, 0 for one without an address; of all if it is NULL. */
size_t access_guests(const struct sockaddr *sa);

#endif
