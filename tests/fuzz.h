/*
 * fuzz.h - what the fuzz targets share.
 *
 * A target is LLVMFuzzerTestOneInput(): libFuzzer calls it with inputs that it invents, and
 * fuzz_replay.c with files.  An input is taken apart from its front; where it has ended there
 * are zeros.  What must be true of the code under test is an assert().
 */
#ifndef XNBD_FUZZ_H
#define XNBD_FUZZ_H

#undef NDEBUG
#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n);

struct input {
	const uint8_t *p;
	size_t left;
};

/* n bytes, or as many as are left, in memory of exactly their size: free() it. */
static inline uint8_t *take_bytes(struct input *in, size_t *n)
{
	uint8_t *copy;

	if (*n > in->left)
		*n = in->left;
	copy = malloc(*n ? *n : 1);
	assert(copy);
	if (*n > 0)
		memcpy(copy, in->p, *n);
	in->p += *n;
	in->left -= *n;
	return copy;
}

/* A number of that many bytes. */
static inline uint64_t take(struct input *in, unsigned bytes)
{
	uint64_t v = 0;

	for (; bytes > 0; bytes--) {
		v <<= 8;
		if (in->left > 0) {
			v |= *in->p++;
			in->left--;
		}
	}
	return v;
}

#endif
