/*
 * tx.c - replies on their way out: see tx.h.
 */
#define _GNU_SOURCE
#include "tx.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/sendfile.h>
#endif

struct tx *tx_new(void)
{
	struct tx *tx = malloc(sizeof(*tx));

	if (tx) {
		tx->held = NULL;
		tx_reset(tx);
	}
	return tx;
}

void tx_reset(struct tx *tx)
{
	assert(!tx->held);
	tx->first = tx->iovs = 0;
	tx->first_file = tx->files = 0;
	tx->used = 0;
}

/* Whether nothing of a file is to be sent between the last reference to memory and the next. */
static bool may_extend(const struct tx *tx)
{
	return tx->iovs > 0 && (tx->files == 0 || tx->file[tx->files - 1].at < tx->iovs);
}

void tx_refer(struct tx *tx, const void *p, size_t len)
{
	struct iovec *last = may_extend(tx) ? &tx->iov[tx->iovs - 1] : NULL;

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

void tx_refer_file(struct tx *tx, const struct file_part *part)
{
	assert(tx->files < TX_FILES);
	tx->file[tx->files++] = (struct tx_file){ tx->iovs, *part };
}

/* Send memory up to iov[end - 1]; more says that a file's part follows at once. */
static ssize_t send_memory(struct tx *tx, int fd, unsigned end, bool more)
{
	struct msghdr msg = { 0 };
	ssize_t n;

	msg.msg_iov = tx->iov + tx->first;
	msg.msg_iovlen = end - tx->first;
	n = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0));
	if (n > 0)
		consume(tx, (size_t)n);
	return n;
}

/* Send from a file: the pages of the page cache themselves, where the system can. */
static ssize_t send_part(const struct file_part *part, int fd)
{
	uint8_t buf[16 * 1024];
	size_t len = part->len < sizeof(buf) ? (size_t)part->len : sizeof(buf);
	ssize_t n;
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	off_t off = (off_t)part->off;

	n = sendfile(fd, part->fd, &off, (size_t)part->len);
	if (n >= 0 || (errno != EINVAL && errno != ENOSYS))
		return n;
#endif
	n = pread(part->fd, buf, len, (off_t)part->off);
	return n > 0 ? send(fd, buf, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL) : n;
}

static ssize_t send_file(struct tx *tx, int fd)
{
	struct file_part *part = &tx->file[tx->first_file].part;
	ssize_t n = send_part(part, fd);

	if (n == 0) {		/* the file was truncated, and the reply is promised */
		errno = EIO;
		return -1;
	}
	if (n > 0) {
		part->off += (uint64_t)n;
		part->len -= (uint64_t)n;
		tx->first_file += part->len == 0;
	}
	return n;
}

static bool is_full(int err)
{
	return err == EAGAIN || err == EWOULDBLOCK || err == ENOBUFS;
}

enum tx_result tx_send(struct tx *tx, int fd)
{
	while (tx->first < tx->iovs || tx->first_file < tx->files) {
		bool file = tx->first_file < tx->files;
		unsigned end = file ? tx->file[tx->first_file].at : tx->iovs;
		ssize_t n = tx->first < end ? send_memory(tx, fd, end, file) : send_file(tx, fd);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return is_full(errno) ? TX_MORE : TX_DEAD;
		if (tx->first < end)	/* part of it: there is no more room */
			return TX_MORE;
	}
	return TX_SENT;
}
