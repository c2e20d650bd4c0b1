/*
 * tx.h - replies of one connection on their way out: gathered, sent in one go, and kept when the
 * client does not take them.
 */
#ifndef XNBD_TX_H
#define XNBD_TX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "xnbd.h"

enum {
	TX_IOVS = 1024,			/* IOV_MAX of every system that we know */
	TX_BYTES = 516 * 1024,		/* two pieces of READs, with their headers */
};

/*
 * What is to be sent: bytes of its own, and references to memory of others, in order.
 * Only the part of it that was used is ever touched, so that an idle one costs address space only.
 */
struct tx {
	struct request *held;		/* own the memory referred to; freed when all is sent */
	unsigned first, iovs;		/* iov[first] to iov[iovs - 1] are not sent yet */
	size_t size;			/* of this memory, in bytes */
	size_t used;			/* of bytes */
	struct iovec iov[TX_IOVS];
	uint8_t bytes[TX_BYTES];	/* of tx_rest(): as many as there are */
};

enum tx_result { TX_SENT, TX_MORE, TX_DEAD };

/* With room for so many bytes of its own, TX_BYTES but for tx_rest().  NULL if out of memory. */
struct tx *tx_new(size_t bytes);

/*
 * What is not sent yet, in memory of just that size; nothing is in tx any more.  NULL if out of
 * memory.
 */
struct tx *tx_rest(struct tx *tx);

void tx_free(struct tx *tx);

/* Forget what is in it.  The caller has taken care of held. */
void tx_reset(struct tx *tx);

/* Room for bytes, and for iovs references to memory. */
static inline bool tx_has_room(const struct tx *tx, size_t bytes, unsigned iovs)
{
	return TX_BYTES - tx->used >= bytes && TX_IOVS - tx->iovs >= iovs;
}

/* Where the next bytes go; write there, then tx_add() them. */
static inline uint8_t *tx_tail(struct tx *tx)
{
	return tx->bytes + tx->used;
}

void tx_add(struct tx *tx, size_t len);

/* Add memory that stays valid until it is sent. */
void tx_refer(struct tx *tx, const void *p, size_t len);

/* Send as much as the socket, which does not block, takes. */
enum tx_result tx_send(struct tx *tx, int fd);

#endif
