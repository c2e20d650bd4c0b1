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

/*
 * An address, and how many of its bits a client's must have in common with it.  IPv4 addresses
 * are kept as what IPv6 maps them to, ::ffff:0:0/96.
 */
struct access_rule {
	uint8_t address[ADDRESS_BITS / 8];
	uint32_t zone;		/* the interface of a link-local address, 0 for any */
	unsigned bits;
};

static struct access_rule *rules;
static size_t rule_count;

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

const char *access_allow(const char *text)
{
	static char why[160];
	uint8_t network[ADDRESS_BITS / 8];
	struct access_rule *rule;
	char copy[INET6_ADDRSTRLEN + IF_NAMESIZE + 8], *slash, *zone;
	unsigned long prefix;
	bool bracket, v4;
	unsigned width;

	rules = not_null(realloc(rules, (rule_count + 1) * sizeof(*rules)));
	rule = &rules[rule_count++];
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
	memcpy(rule->address, mapped, sizeof(mapped));
	v4 = !bracket && inet_pton(AF_INET, copy, rule->address + sizeof(mapped)) == 1;
	width = v4 ? ADDRESS_BITS - MAPPED_BITS : ADDRESS_BITS;
	if (!v4 && inet_pton(AF_INET6, copy, rule->address) != 1)
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

static bool is_allowed(const struct sockaddr *sa)
{
	uint8_t address[ADDRESS_BITS / 8], network[ADDRESS_BITS / 8];
	uint32_t zone = sa->sa_family == AF_INET6 ?
				((const struct sockaddr_in6 *)sa)->sin6_scope_id : 0;

	if (!address_of(sa, address))
		return sa->sa_family == AF_UNIX || rule_count == 0;
	for (const struct access_rule *r = rules; r < rules + rule_count; r++) {
		network_of(network, address, r->bits);
		if (is_mapped(r->address) == is_mapped(address) &&
		    memcmp(network, r->address, sizeof(network)) == 0 &&
		    (!r->zone || r->zone == zone))
			return true;
	}
	return rule_count == 0;
}

/* Places: the main thread gives them, and any thread gives them back. */

struct guest {
	atomic_bool is_there;
	uint8_t address[ADDRESS_BITS / 8];	/* all zero for a client that has none */
};

static struct guest *guests;
static size_t guests_max, per_host_max;

void access_open(size_t places, size_t per_host)
{
	guests = not_null(calloc(places, sizeof(*guests)));
	guests_max = places;
	per_host_max = per_host;
}

struct guest *access_enter(const struct sockaddr *sa, const char **why)
{
	static char text[64];
	uint8_t address[ADDRESS_BITS / 8] = { 0 };
	bool counts = address_of(sa, address) && per_host_max > 0;
	struct guest *place = NULL;
	size_t there = 0;

	*why = "no --allow has its address";
	if (!is_allowed(sa))
		return NULL;
	for (struct guest *g = guests; g < guests + guests_max && (counts || !place); g++) {
		if (!g->is_there)
			place = g;
		else if (memcmp(g->address, address, sizeof(address)) == 0)
			there++;
	}
	*why = text;
	if (counts && there >= per_host_max) {
		snprintf(text, sizeof(text), "its host has %zu connections already", per_host_max);
		return NULL;
	}
	snprintf(text, sizeof(text), "there are %zu connections already", guests_max);
	if (!place)
		return NULL;
	memcpy(place->address, address, sizeof(address));
	place->is_there = true;
	return place;
}

bool access_leave(struct guest **g)
{
	if (!*g)
		return false;
	(*g)->is_there = false;
	*g = NULL;
	return true;
}
