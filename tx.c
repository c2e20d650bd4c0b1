/*
 * tx.c - replies on their way out: see tx.h.
 */
#define _GNU_SOURCE
#include "tx.h"

#include "buffer.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct tx *tx_new(size_t bytes)
{
	size_t size = offsetof(struct tx, bytes) + bytes;
	struct tx *tx = buffer_get(size);

	if (tx) {
		tx->size = size;
		tx->held = NULL;
		tx_reset(tx);
	}
	return tx;
}

void tx_reset(struct tx *tx)
{
	assert(!tx->held);
	tx->first = tx->iovs = 0;
	tx->used = 0;
}

void tx_free(struct tx *tx)
{
	if (tx)
		buffer_put(tx, tx->size);
}

static bool is_own(const struct tx *tx, const struct iovec *v)
{
	const uint8_t *p = v->iov_base;

	return p >= tx->bytes && p < tx->bytes + tx->used;
}

struct tx *tx_rest(struct tx *tx)
{
	size_t own = 0;
	struct tx *rest;

	for (unsigned i = tx->first; i < tx->iovs; i++)
		own += is_own(tx, &tx->iov[i]) ? tx->iov[i].iov_len : 0;
	rest = tx_new(own);
	if (!rest)
		return NULL;
	for (unsigned i = tx->first; i < tx->iovs; i++) {
		struct iovec v = tx->iov[i];

		if (is_own(tx, &v)) {
			v.iov_base = memcpy(tx_tail(rest), v.iov_base, v.iov_len);
			rest->used += v.iov_len;
		}
		tx_refer(rest, v.iov_base, v.iov_len);
	}
	rest->held = tx->held;
	tx->held = NULL;
	tx_reset(tx);
	return rest;
}

void tx_refer(struct tx *tx, const void *p, size_t len)
{
	struct iovec *last = tx->iovs > 0 ? &tx->iov[tx->iovs - 1] : NULL;

	if (len == 0)
		return;
	if (last && (const uint8_t *)last->iov_base + last->iov_len == p) {
		last->iov_len += len;
		return;
	}
	assert(tx->iovs < TX_IOVS);
	tx->iov[tx->iovs].iov_base = (void *)(uintptr_t)p;
	tx->iov[tx->iovs].iov_len = len;
	tx->iovs++;
}

void tx_add(struct tx *tx, size_t len)
{
	assert(len <= TX_BYTES - tx->used);
	tx_refer(tx, tx_tail(tx), len);
	tx->used += len;
}

/* Take n sent bytes off the front. */
static void consume(struct tx *tx, size_t n)
{
	while (tx->first < tx->iovs && n >= tx->iov[tx->first].iov_len)
		n -= tx->iov[tx->first++].iov_len;
	if (n > 0) {
		tx->iov[tx->first].iov_base = (uint8_t *)tx->iov[tx->first].iov_base + n;
		tx->iov[tx->first].iov_len -= n;
	}
}

enum tx_result tx_send(struct tx *tx, int fd)
{
	while (tx->first < tx->iovs) {
		struct msghdr msg = { .msg_iov = tx->iov + tx->first,
				      .msg_iovlen = tx->iovs - tx->first };
		ssize_t n = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n >= 0) {
			consume(tx, (size_t)n);
			if (tx->first < tx->iovs)	/* there is no more room */
				return TX_MORE;
		} else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
			return TX_MORE;
		} else if (errno != EINTR) {
			return TX_DEAD;
		}
	}
	return TX_SENT;
}
