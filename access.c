/*
 * access.c - see access.h.  Addresses are compared as bits, never as text.
 */
#include "access.h"

#include "util.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { MAPPED_BITS = 96, ADDRESS_BITS = 128 };

static const uint8_t mapped[MAPPED_BITS / 8] = { [10] = 0xff, [11] = 0xff };

static bool is_mapped(const uint8_t *address)
{
	return memcmp(address, mapped, sizeof(mapped)) == 0;
}

/* Whether two addresses agree in their first bits. */
static bool same_bits(const uint8_t *a, const uint8_t *b, unsigned bits)
{
	unsigned bytes = bits / 8, rest = bits % 8;

	return memcmp(a, b, bytes) == 0 &&
	       (rest == 0 || (a[bytes] ^ b[bytes]) >> (8 - rest) == 0);
}

/* Clear the bits behind the first ones. */
static void mask(uint8_t *address, unsigned bits)
{
	for (unsigned i = bits; i < ADDRESS_BITS; i++)
		address[i / 8] &= (uint8_t)~(0x80u >> i % 8);
}

/* An IPv4 rule is shown as one, also if it was written as one that IPv6 maps. */
static void show(const uint8_t *address, char *buf)
{
	bool v4 = is_mapped(address);

	inet_ntop(v4 ? AF_INET : AF_INET6, v4 ? address + sizeof(mapped) : address, buf,
		  INET6_ADDRSTRLEN);
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
	bool bracket;
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
	if (slash && !parse_number(slash, 0, width, &prefix)) {
		snprintf(why, sizeof(why), "has a prefix that is not a number from 0 to %u", width);
		return why;
	}
	rule->bits = (unsigned)prefix + ADDRESS_BITS - width;
	memcpy(network, rule->address, sizeof(network));
	mask(network, rule->bits);
	if (memcmp(network, rule->address, sizeof(network)) == 0)
		return NULL;
	show(network, copy);
	snprintf(why, sizeof(why), "has bits behind its prefix: the network is %s/%u", copy,
		 rule->bits - (is_mapped(network) || width < ADDRESS_BITS ? MAPPED_BITS : 0));
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
	uint8_t address[ADDRESS_BITS / 8];
	uint32_t zone = sa->sa_family == AF_INET6 ?
				((const struct sockaddr_in6 *)sa)->sin6_scope_id : 0;

	if (!address_of(sa, address))
		return false;
	for (size_t i = 0; i < count; i++)
		if (is_mapped(rule[i].address) == is_mapped(address) &&
		    same_bits(rule[i].address, address, rule[i].bits) &&
		    (!rule[i].zone || rule[i].zone == zone))
			return true;
	return false;
}

static pthread_mutex_t guests_lock = PTHREAD_MUTEX_INITIALIZER;
static struct guest *guests;

void access_enter(struct guest *g, const struct sockaddr *sa)
{
	if (!address_of(sa, g->address))
		return;
	pthread_mutex_lock(&guests_lock);
	g->next = guests;
	g->back = &guests;
	if (guests)
		guests->back = &g->next;
	guests = g;
	pthread_mutex_unlock(&guests_lock);
}

void access_leave(struct guest *g)
{
	pthread_mutex_lock(&guests_lock);
	if (g->back)
		*g->back = g->next;
	if (g->back && g->next)
		g->next->back = g->back;
	g->back = NULL;
	pthread_mutex_unlock(&guests_lock);
}

size_t access_guests(const struct sockaddr *sa)
{
	uint8_t address[ADDRESS_BITS / 8];
	size_t n = 0;

	if (!address_of(sa, address))
		return 0;
	pthread_mutex_lock(&guests_lock);
	for (const struct guest *g = guests; g; g = g->next)
		n += memcmp(g->address, address, sizeof(address)) == 0;
	pthread_mutex_unlock(&guests_lock);
	return n;
}
