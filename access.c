/*
 * access.c - see access.h.  Addresses are compared as bits, never as text.
 */
#include "access.h"

#include "log.h"
#include "util.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAPPED_BITS = 96, ADDRESS_BITS = 128 };

static const uint8_t mapped[MAPPED_BITS / 8] = { [10] = 0xff, [11] = 0xff };

static bool is_mapped(const uint8_t *address)
{
	return memcmp(address, mapped, sizeof(mapped)) == 0;
}

/* The first bits of an address; the others are zero. */
static void network_of(uint8_t *network, const uint8_t *address, unsigned bits)
{
	memset(network, 0, ADDRESS_BITS / 8);
	for (unsigned i = 0; i < bits; i++)
		network[i / 8] |= address[i / 8] & (0x80u >> i % 8);
}

/* The name or the number of an interface.  Only link-local addresses need one. */
static bool parse_zone(struct access_rule *rule, const char *zone)
{
	unsigned long number;

	if (rule->address[0] != 0xfe || (rule->address[1] & 0xc0) != 0x80)
		return false;
	rule->zone = if_nametoindex(zone);
	if (!rule->zone && parse_number(zone, 1, UINT32_MAX, &number))
		rule->zone = (uint32_t)number;
	return rule->zone != 0;
}

/* Returns how many bits the address has, 0 if it is none. */
static unsigned parse_address(uint8_t *address, const char *text)
{
	memcpy(address, mapped, sizeof(mapped));
	if (inet_pton(AF_INET, text, address + sizeof(mapped)) == 1)
		return ADDRESS_BITS - MAPPED_BITS;
	return inet_pton(AF_INET6, text, address) == 1 ? ADDRESS_BITS : 0;
}

const char *access_parse(struct access_rule *rule, const char *text)
{
	static char why[160];
	uint8_t network[sizeof(rule->address)];
	char copy[INET6_ADDRSTRLEN + IF_NAMESIZE + 8], *slash, *zone;
	unsigned long prefix;
	bool bracket, v4;
	unsigned width;

	memset(rule, 0, sizeof(*rule));
	snprintf(copy, sizeof(copy), "%s", strlen(text) < sizeof(copy) ? text : "");
	slash = strchr(copy, '/');
	if (slash)
		*slash++ = '\0';
	bracket = *copy == '[';
	strip_brackets(copy);
	zone = strchr(copy, '%');
	if (zone)
		*zone++ = '\0';
	width = parse_address(rule->address, copy);
	if (!width || (bracket && width != ADDRESS_BITS))
		return "is no address such as 192.0.2.1 or 2001:db8::1, nor one with a /PREFIX";
	if (zone && !parse_zone(rule, zone))
		return "has a zone that is no interface, or that its address cannot have";
	prefix = width;
	if (slash && !parse_number(slash, 0, width, &prefix))
		return width == ADDRESS_BITS ? "has a prefix that is not a number from 0 to 128" :
					       "has a prefix that is not a number from 0 to 32";
	rule->bits = (unsigned)prefix + ADDRESS_BITS - width;
	network_of(network, rule->address, rule->bits);
	if (memcmp(network, rule->address, sizeof(network)) == 0)
		return NULL;
	v4 = is_mapped(network);	/* it is shown as one, also if it was written as IPv6 maps it */
	inet_ntop(v4 ? AF_INET : AF_INET6, v4 ? network + sizeof(mapped) : network, copy,
		  sizeof(copy));
	snprintf(why, sizeof(why), "has bits behind its prefix: the network is %s/%u", copy,
		 rule->bits - (v4 ? MAPPED_BITS : 0));
	return why;
}

/* A client's address, as rules have them.  False if it has none. */
static bool address_of(const struct sockaddr *sa, uint8_t *address)
{
	if (sa->sa_family == AF_INET6) {
		memcpy(address, &((const struct sockaddr_in6 *)sa)->sin6_addr, ADDRESS_BITS / 8);
	} else if (sa->sa_family == AF_INET) {
		memcpy(address, mapped, sizeof(mapped));
		memcpy(address + sizeof(mapped), &((const struct sockaddr_in *)sa)->sin_addr, 4);
	} else {
		return false;
	}
	return true;
}

bool access_admits(const struct access_rule *rule, size_t count, const struct sockaddr *sa)
{
	uint8_t address[ADDRESS_BITS / 8], network[ADDRESS_BITS / 8];
	uint32_t zone = sa->sa_family == AF_INET6 ?
				((const struct sockaddr_in6 *)sa)->sin6_scope_id : 0;

	if (!address_of(sa, address))
		return false;
	for (size_t i = 0; i < count; i++) {
		network_of(network, address, rule[i].bits);
		if (is_mapped(rule[i].address) == is_mapped(address) &&
		    memcmp(network, rule[i].address, sizeof(network)) == 0 &&
		    (!rule[i].zone || rule[i].zone == zone))
			return true;
	}
	return false;
}

/* Places: the main thread gives them, and any thread gives them back. */

struct guest {
	atomic_bool is_there;
	uint8_t address[ADDRESS_BITS / 8];	/* all zero for a client that has none */
};

static struct guest *guests;
static size_t guests_max;

void access_open(size_t places)
{
	guests = not_null(calloc(places, sizeof(*guests)));
	guests_max = places;
}

struct guest *access_enter(const struct sockaddr *sa)
{
	struct guest *g = guests, *end = guests + guests_max;

	while (g < end && g->is_there)
		g++;
	if (g == end)
		return NULL;
	memset(g->address, 0, sizeof(g->address));
	address_of(sa, g->address);
	g->is_there = true;
	return g;
}

bool access_leave(struct guest **g)
{
	bool was_there = *g;

	if (was_there)
		(*g)->is_there = false;
	*g = NULL;
	return was_there;
}

size_t access_guests(const struct sockaddr *sa)
{
	uint8_t address[ADDRESS_BITS / 8];
	size_t n = 0;

	if (address_of(sa, address))
		for (const struct guest *g = guests; g < guests + guests_max; g++)
			n += g->is_there && memcmp(g->address, address, sizeof(address)) == 0;
	return n;
}
