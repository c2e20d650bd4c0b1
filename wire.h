/*
 * wire.h - numbers and words of the NBD wire format that both of its sides share.
 */
#ifndef XNBD_WIRE_H
#define XNBD_WIRE_H

#include <stdint.h>

#define NBD_ALLOCATION "base:allocation"

/* Numbers are big-endian.  put returns where the next one goes. */

static inline uint16_t get_be16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t get_be32(const uint8_t *p)
{
	return (uint32_t)get_be16(p) << 16 | get_be16(p + 2);
}

static inline uint64_t get_be64(const uint8_t *p)
{
	return (uint64_t)get_be32(p) << 32 | get_be32(p + 4);
}

static inline uint8_t *put_be16(uint8_t *p, unsigned v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
	return p + 2;
}

static inline uint8_t *put_be32(uint8_t *p, uint32_t v)
{
	return put_be16(put_be16(p, v >> 16), v & 0xffff);
}

static inline uint8_t *put_be64(uint8_t *p, uint64_t v)
{
	return put_be32(put_be32(p, (uint32_t)(v >> 32)), (uint32_t)v);
}

#endif
