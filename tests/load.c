/*
 * load: puts an NBD server under load and measures it.
 *
 * It is meant to cost less CPU than any server, so that the server is what is
 * measured: each connection has one thread and keeps D requests in flight; all
 * requests that may be sent go out in one gathered send, all replies that have
 * arrived come in by one recv into one buffer that stays in the CPU's cache.
 * What was read is not looked at, unless --verify asks for it.
 *
 * Threads: main starts one per connection and joins them. A struct conn belongs
 * to its thread alone; opt and deadline are constant once they run.
 *
 * --verify: a block's bytes follow from its position, the seed and how often
 * this run has written it; 0 times is what --make-image leaves. A connection
 * then keeps to its own part of the disk and never has two requests to one
 * block in flight, so each read has exactly one right answer.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
#define STRUCTURED_MAGIC 0x668e33efu
#define OPTION_MAGIC UINT64_C(0x49484156454F5054)
#define OPTION_REPLY_MAGIC UINT64_C(0x3e889045565a9)
#define REP_ERR_UNSUP 0x80000001u
#define BUSY 0x80000000u	/* in a version: a request is in flight */

enum {
	CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3,
	OPT_EXPORT_NAME = 1, OPT_STRUCTURED = 8, REP_ACK = 1,
	FLAG_NO_ZEROES = 2, FLAGS_FLUSH = 1 | 1 << 2,
	CHUNK_DATA = 1, CHUNK_HOLE = 2, CHUNK_ERROR = 0x8000,
	REQUEST_SIZE = 28, SIMPLE_SIZE = 16, CHUNK_SIZE = 20,
	RBUF_SIZE = 256 << 10,
	DEPTH_MAX = 512,	/* two pieces each: within IOV_MAX */
	STALL_SECONDS = 30,
	SPIN_NS = 50000,
	HIST_SUB = 64,		/* steps per doubling: 1.6 % */
	HIST_SIZE = HIST_SUB * 60,
};

enum pattern { RANDOM, SEQUENTIAL, ONCE };

static struct {
	const char *target, *image, *export, *store;
	uint64_t conns, depth, bs, read_percent, flush_every, size, count, seed, relay, null;
	double seconds;
	enum pattern pattern;
	bool structured, verify;
} opt = { .export = "", .conns = 1, .depth = 1, .bs = 4096, .read_percent = 100, .seed = 1 };

struct slot {
	uint64_t start, offset, left;	/* left: of the data to be read */
	uint32_t *version, error;
	uint8_t cmd;
	bool active;
};

struct conn {
	pthread_t thread;
	int fd;
	uint64_t export_size, rng, now;
	/* the part of the disk that is worked on, in blocks of opt.bs */
	uint64_t first, blocks, next;
	unsigned bits;			/* ONCE: 2^bits >= blocks */
	uint32_t *version;		/* --verify: one per block */
	/* requests out */
	struct slot *slots;
	unsigned *idle, nidle;		/* a stack of slots */
	uint8_t *headers, *payload;
	struct iovec *iov, *iov_next;
	unsigned niov;
	uint64_t quota, issued;
	bool stop;
	/* replies in */
	uint8_t *rbuf;
	size_t pos, end;
	struct slot *slot;		/* whose payload is coming */
	bool check, last;		/* compare it; it ends the reply */
	uint64_t payload_left, payload_at;
	/* --null: the request that gets the next reply */
	uint8_t request[REQUEST_SIZE];
	bool owed;
	/* results; done is by command */
	uint64_t done[4], errors, latency_max, *hist;
	uint32_t first_error;
	char failed[100];
};

static struct conn *conns;
static pthread_barrier_t start_line;
static uint64_t deadline;

/* ---- small helpers ---- */

static uint64_t get_be(const uint8_t *p, unsigned n)
{
	uint64_t v = 0;

	while (n--)
		v = v << 8 | *p++;
	return v;
}

static void put_be(uint8_t *p, uint64_t v, unsigned n)
{
	for (; n--; v >>= 8)
		p[n] = (uint8_t)v;
}

static uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fputs("load: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	va_end(ap);
	exit(2);
}

static void *need(size_t n, size_t size)
{
	void *p = calloc(n, size);

	if (!p)
		die("out of memory");
	return p;
}

static int fail(struct conn *c, const char *what, int err)
{
	snprintf(c->failed, sizeof(c->failed), "%s%s%s", what, err ? ": " : "",
		err ? strerror(err) : "");
	return -1;
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

static uint64_t draw(struct conn *c)
{
	return mix(c->rng += UINT64_C(0x9e3779b97f4a7c15));
}

/* ---- the pattern of --verify and --make-image ---- */

static void pattern_fill(uint8_t *p, uint64_t at, size_t len, uint32_t version)
{
	uint64_t salt = mix(opt.seed * 2654435761u + version), word;

	for (size_t i = 0; i < len; i += sizeof(word)) {
		word = mix((at + i) / sizeof(word) ^ salt);
		memcpy(p + i, &word, len - i < sizeof(word) ? len - i : sizeof(word));
	}
}

static bool pattern_matches(const uint8_t *p, uint64_t at, size_t len, uint32_t version)
{
	uint8_t want[4096];
	size_t skip = at % 8, n;

	for (; len; p += n, at += n, len -= n, skip = at % 8) {
		n = len < sizeof(want) - skip ? len : sizeof(want) - skip;
		pattern_fill(want, at - skip, skip + n, version);
		if (memcmp(want + skip, p, n))
			return false;
	}
	return true;
}

static int make_image(void)
{
	static uint8_t buf[1 << 20];
	FILE *f = fopen(opt.image, "wb");
	size_t n;

	for (uint64_t at = 0; f && at < opt.size; at += n) {
		n = opt.size - at < sizeof(buf) ? opt.size - at : sizeof(buf);
		pattern_fill(buf, at, n, 0);
		if (fwrite(buf, n, 1, f) != 1)
			break;
	}
	if (!f || ferror(f) || fclose(f))
		die("%s: %s", opt.image, strerror(errno));
	return 0;
}

/* ---- connecting and the handshake ---- */

static int send_all(struct conn *c, const void *buf, size_t len)
{
	if (send(c->fd, buf, len, MSG_NOSIGNAL) == (ssize_t)len)
		return 0;
	return fail(c, "handshake", errno);
}

static int recv_all(struct conn *c, void *buf, size_t len)
{
	ssize_t n = recv(c->fd, buf, len, MSG_WAITALL);

	return n == (ssize_t)len ? 0 : fail(c, "handshake", n < 0 ? errno : ECONNRESET);
}

static int connect_unix(const char *path)
{
	struct sockaddr_un sa = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (strlen(path) >= sizeof(sa.sun_path))
		die("%s: the path is too long for a socket", path);
	strcpy(sa.sun_path, path);
	return connect(fd, (struct sockaddr *)&sa, sizeof(sa)) ? -1 : fd;
}

static int connect_tcp(const char *target)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *list = NULL, *ai;
	const char *colon = strrchr(target, ':');
	char host[256];
	int fd = -1, one = 1, err;

	if (!colon || snprintf(host, sizeof(host), "%.*s", (int)(colon - target), target) > 255 ||
	    getaddrinfo(host, colon + 1, &hints, &list))
		die("%s: neither HOST:PORT nor unix:PATH", target);
	for (ai = list; ai; ai = ai->ai_next) {
		fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fd >= 0 && connect(fd, ai->ai_addr, ai->ai_addrlen) == 0)
			break;
		err = errno;
		close(fd);
		errno = err;
		fd = -1;
	}
	freeaddrinfo(list);
	if (fd < 0)
		return -1;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

static int send_option(struct conn *c, uint32_t option, const char *data)
{
	uint8_t msg[16 + 4096];
	size_t len = strlen(data);

	put_be(msg, OPTION_MAGIC, 8);
	put_be(msg + 8, option, 4);
	put_be(msg + 12, len, 4);
	memcpy(msg + 16, data, len);
	return send_all(c, msg, 16 + len);
}

/* Newstyle with EXPORT_NAME: every server has it, structured replies or not. */
static int handshake(struct conn *c)
{
	uint8_t buf[10 + 124];
	uint64_t flags;

	if (recv_all(c, buf, 18))
		return -1;
	if (get_be(buf + 8, 8) != OPTION_MAGIC)
		return fail(c, "not a newstyle server", 0);
	flags = get_be(buf + 16, 2) & 3;
	put_be(buf, flags, 4);
	if (send_all(c, buf, 4))
		return -1;
	if (opt.structured) {
		if (send_option(c, OPT_STRUCTURED, "") || recv_all(c, buf, 20))
			return -1;
		if (get_be(buf + 12, 8) != (uint64_t)REP_ACK << 32)
			return fail(c, "structured replies refused", 0);
	}
	if (send_option(c, OPT_EXPORT_NAME, opt.export) || recv_all(c, buf, flags & 2 ? 10 : 134))
		return -1;
	c->export_size = get_be(buf, 8);
	return 0;
}

static int connect_target(void)
{
	return strncmp(opt.target, "unix:", 5) ? connect_tcp(opt.target)
					       : connect_unix(opt.target + 5);
}

static int conn_connect(struct conn *c)
{
	struct timeval stall = { .tv_sec = STALL_SECONDS };

	c->fd = connect_target();
	if (c->fd < 0)
		return fail(c, "connect", errno);
	setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof(stall));
	return handshake(c);
}

/* ---- requests out ---- */

/* A permutation of 0 .. 2^bits - 1: each step can be undone. */
static uint64_t permute(const struct conn *c, uint64_t i)
{
	uint64_t mask = (UINT64_C(1) << c->bits) - 1;

	i ^= opt.seed & mask;
	for (int round = 0; round < 3; round++) {
		i = i * UINT64_C(0x9e3779b97f4a7c15) & mask;
		i ^= i >> (c->bits / 2 + 1);
	}
	return i;
}

/* The next block of the connection's part, or false when ONCE is through. */
static bool next_block(struct conn *c, uint64_t *blk)
{
	do {
		if (opt.pattern == RANDOM)
			*blk = draw(c) % c->blocks;
		else if (opt.pattern == SEQUENTIAL)
			*blk = c->next++ % c->blocks;
		else if (c->next >> c->bits)
			return false;
		else
			*blk = permute(c, c->next++);
	} while (*blk >= c->blocks || (c->version && c->version[*blk] & BUSY));
	return true;
}

static uint8_t next_command(struct conn *c)
{
	if (opt.flush_every && (c->issued + 1) % opt.flush_every == 0)
		return CMD_FLUSH;
	if (opt.read_percent % 100 == 0)
		return opt.read_percent ? CMD_READ : CMD_WRITE;
	return draw(c) % 100 < opt.read_percent ? CMD_READ : CMD_WRITE;
}

static bool next_request(struct conn *c, struct slot *s)
{
	uint64_t blk = 0;

	*s = (struct slot) { .cmd = next_command(c), .start = c->now, .active = true };
	if (s->cmd == CMD_FLUSH)
		return true;
	if (!next_block(c, &blk))
		return false;
	s->offset = (c->first + blk) * opt.bs;
	s->left = s->cmd == CMD_READ ? opt.bs : 0;
	if (c->version) {
		s->version = &c->version[blk];
		*s->version = (*s->version + (s->cmd == CMD_WRITE)) | BUSY;
	}
	return true;
}

static void add_piece(struct conn *c, uint8_t *p, size_t len)
{
	struct iovec *prev = c->niov ? &c->iov[c->niov - 1] : NULL;

	if (prev && (uint8_t *)prev->iov_base + prev->iov_len == p)
		prev->iov_len += len;
	else
		c->iov[c->niov++] = (struct iovec) { .iov_base = p, .iov_len = len };
}

static void add_request(struct conn *c, const struct slot *s, uint8_t *head)
{
	uint64_t i = (uint64_t)(s - c->slots);
	uint8_t *payload = c->payload;

	put_be(head, REQUEST_MAGIC, 4);
	put_be(head + 4, s->cmd, 4);
	put_be(head + 8, i, 8);
	put_be(head + 16, s->offset, 8);
	put_be(head + 24, s->cmd == CMD_FLUSH ? 0 : opt.bs, 4);
	add_piece(c, head, REQUEST_SIZE);
	if (s->cmd != CMD_WRITE)
		return;
	if (s->version) {
		payload += i * opt.bs;
		pattern_fill(payload, s->offset, opt.bs, *s->version & ~BUSY);
	}
	add_piece(c, payload, opt.bs);
}

static void fill(struct conn *c)
{
	uint8_t *head = c->headers;

	c->iov_next = c->iov;
	c->stop |= deadline && c->now >= deadline;
	for (; c->nidle && !c->stop; head += REQUEST_SIZE) {
		struct slot *s = &c->slots[c->idle[c->nidle - 1]];

		c->stop = (c->quota && c->issued == c->quota) || !next_request(c, s);
		if (c->stop)
			break;
		add_request(c, s, head);
		c->issued++;
		c->nidle--;
	}
}

/* Sends what the socket takes; c->niov is what is left. */
static int push(struct conn *c)
{
	struct msghdr msg = { .msg_iov = c->iov_next, .msg_iovlen = c->niov };
	ssize_t n = sendmsg(c->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : fail(c, "send", errno);
	for (; c->niov && (size_t)n >= c->iov_next->iov_len; c->niov--)
		n -= (ssize_t)(c->iov_next++)->iov_len;
	if (c->niov) {
		c->iov_next->iov_base = (uint8_t *)c->iov_next->iov_base + n;
		c->iov_next->iov_len -= (size_t)n;
	}
	return 0;
}

/* ---- replies in ---- */

static void finish(struct conn *c, struct slot *s)
{
	uint64_t ns = c->now - s->start;
	unsigned shift = 0;

	if (!s->error && s->left)
		s->error = EBADMSG;
	if (s->error) {
		c->errors++;
		c->first_error = c->first_error ? c->first_error : s->error;
	} else {
		c->done[s->cmd]++;
	}
	if (s->version)
		*s->version &= ~BUSY;
	if (ns > c->latency_max)
		c->latency_max = ns;
	while (ns >> shift >= 2 * HIST_SUB)
		shift++;
	c->hist[shift * HIST_SUB + (ns >> shift)]++;
	s->active = false;
	c->idle[c->nidle++] = (unsigned)(s - c->slots);
}

/* Passes over what is here of a reply's payload, and ends the reply with it. */
static void take_payload(struct conn *c)
{
	struct slot *s = c->slot;
	size_t n = c->end - c->pos;

	n = n < c->payload_left ? n : c->payload_left;
	if (c->check && !pattern_matches(c->rbuf + c->pos, c->payload_at, n, *s->version & ~BUSY))
		s->error = EBADMSG;
	c->pos += n;
	c->payload_at += n;
	c->payload_left -= n;
	if (c->payload_left)
		return;
	c->slot = NULL;
	if (c->last)
		finish(c, s);
}

static int simple_reply(struct conn *c, struct slot *s, const uint8_t *p)
{
	bool data;

	s->error = (uint32_t)get_be(p + 4, 4);
	data = s->cmd == CMD_READ && !s->error;
	if (data && opt.structured)
		return fail(c, "simple reply to a read", 0);
	c->pos += SIMPLE_SIZE;
	c->slot = s;
	c->last = true;
	c->check = data && s->version;
	c->payload_left = data ? opt.bs : 0;
	c->payload_at = s->offset;
	s->left = 0;
	return 1;
}

/* A chunk of data or a hole: within the request, not more than is missing. */
static int covers(struct conn *c, struct slot *s, uint64_t at, uint64_t len)
{
	if (len > s->left || at - s->offset > opt.bs - len)
		return fail(c, "chunk outside the request", 0);
	s->left -= len;
	return 1;
}

static int chunk(struct conn *c, struct slot *s, const uint8_t *p, size_t have)
{
	unsigned type = (unsigned)get_be(p + 6, 2);
	unsigned fixed = type == CHUNK_DATA ? 8 : type == CHUNK_HOLE ? 12 : type & CHUNK_ERROR ? 4 : 0;
	uint64_t len = get_be(p + 16, 4);

	if (len < fixed)
		return fail(c, "chunk too short", 0);
	if (have < CHUNK_SIZE + fixed)
		return 0;
	c->pos += CHUNK_SIZE + fixed;
	c->slot = s;
	c->last = get_be(p + 4, 2) & 1;
	c->check = type == CHUNK_DATA && s->version;
	c->payload_left = len - fixed;
	c->payload_at = fixed >= 8 ? get_be(p + CHUNK_SIZE, 8) : 0;
	if (type & CHUNK_ERROR || (type == CHUNK_HOLE && s->version))	/* the pattern has no zeros */
		s->error = type == CHUNK_HOLE ? EBADMSG : (uint32_t)get_be(p + CHUNK_SIZE, 4);
	if (type == CHUNK_DATA)
		return covers(c, s, c->payload_at, c->payload_left);
	return type == CHUNK_HOLE ? covers(c, s, c->payload_at, get_be(p + CHUNK_SIZE + 8, 4)) : 1;
}

/* 1: took a reply's head, 0: it is not all here yet, -1: broken. */
static int take_head(struct conn *c)
{
	const uint8_t *p = c->rbuf + c->pos;
	size_t have = c->end - c->pos;
	bool structured;
	uint64_t cookie;

	if (have < SIMPLE_SIZE)
		return 0;
	structured = opt.structured && get_be(p, 4) == STRUCTURED_MAGIC;
	if (!structured && get_be(p, 4) != SIMPLE_MAGIC)
		return fail(c, "bad reply magic", 0);
	cookie = get_be(p + 8, 8);
	if (cookie >= opt.depth || !c->slots[cookie].active)
		return fail(c, "reply to a request that is not in flight", 0);
	if (!structured)
		return simple_reply(c, &c->slots[cookie], p);
	return have < CHUNK_SIZE ? 0 : chunk(c, &c->slots[cookie], p, have);
}

static int take_replies(struct conn *c)
{
	int r = 1;

	while (r > 0) {
		if (!c->slot)
			r = take_head(c);
		if (r > 0)
			take_payload(c);
		if (c->slot)
			break;
	}
	memmove(c->rbuf, c->rbuf + c->pos, c->end - c->pos);
	c->end -= c->pos;
	c->pos = 0;
	return r < 0 ? -1 : 0;
}

/* Receives once. With requests still unsent, waits for room to send as well. */
static int pull(struct conn *c)
{
	struct pollfd pfd = { .fd = c->fd, .events = POLLIN | POLLOUT };
	ssize_t n;

	if (c->niov && poll(&pfd, 1, STALL_SECONDS * 1000) == 0)
		return fail(c, "stalled", 0);
	if (c->niov && !(pfd.revents & ~POLLOUT))
		return 0;
	n = recv(c->fd, c->rbuf + c->end, RBUF_SIZE - c->end, 0);
	if (n == 0)
		return fail(c, "closed by the server", 0);
	if (n < 0 && errno == EAGAIN)
		return fail(c, "stalled", 0);
	if (n < 0)
		return errno == EINTR ? 0 : fail(c, "receive", errno);
	c->now = clock_ns();
	c->end += (size_t)n;
	return take_replies(c);
}

/* ---- a connection's life ---- */

static void conn_prepare(struct conn *c, uint64_t index)
{
	uint64_t blocks = (opt.size ? opt.size : c->export_size) / opt.bs;
	bool shared = opt.pattern == RANDOM && !opt.verify;

	c->blocks = shared ? blocks : blocks / opt.conns;
	c->first = shared ? 0 : c->blocks * index;
	if (c->blocks < (opt.verify ? opt.depth : 1) || blocks * opt.bs > c->export_size)
		die("%s: the disk or its part is too small", opt.target);
	while (c->blocks > UINT64_C(1) << c->bits)
		c->bits++;
	c->rng = mix(opt.seed) + index;
	c->quota = opt.count / opt.conns;
	c->slots = need(opt.depth, sizeof(*c->slots));
	c->idle = need(opt.depth, sizeof(*c->idle));
	c->headers = need(opt.depth, REQUEST_SIZE);
	c->iov = need(2 * opt.depth, sizeof(*c->iov));
	c->rbuf = need(RBUF_SIZE, 1);
	c->hist = need(HIST_SIZE, sizeof(*c->hist));
	c->payload = need(opt.verify ? opt.depth : 1, opt.bs);
	pattern_fill(c->payload, index, opt.bs, BUSY);
	c->version = opt.verify ? need(c->blocks, sizeof(*c->version)) : NULL;
	for (; c->nidle < opt.depth; c->nidle++)
		c->idle[c->nidle] = c->nidle;
}

static void *conn_main(void *arg)
{
	struct conn *c = arg;
	uint8_t bye[REQUEST_SIZE] = { 0 };

	pthread_barrier_wait(&start_line);
	c->now = clock_ns();
	do {
		if (!c->niov)
			fill(c);
		if (!c->niov && c->nidle == opt.depth)
			break;
	} while ((!c->niov || !push(c)) && !pull(c));
	c->now = clock_ns();
	put_be(bye, REQUEST_MAGIC, 4);
	put_be(bye + 4, CMD_DISC, 4);
	if (!c->failed[0])
		send(c->fd, bye, sizeof(bye), MSG_NOSIGNAL);
	close(c->fd);
	return NULL;
}

/* ---- results ---- */

static double hist_us(const uint64_t *hist, uint64_t total, double part)
{
	uint64_t rank = (uint64_t)((double)total * part), seen = hist[0], i = 0, shift;

	while (seen <= rank && i < HIST_SIZE - 1)
		seen += hist[++i];
	shift = i < 2 * HIST_SUB ? 0 : i / HIST_SUB - 1;
	return (double)((i - shift * HIST_SUB) << shift) / 1000;
}

static double cpu_seconds(void)
{
	struct rusage u;

	getrusage(RUSAGE_SELF, &u);
	return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
		(double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void add_up(struct conn *sum, const struct conn *c)
{
	for (unsigned i = 0; i < HIST_SIZE; i++)
		sum->hist[i] += c->hist[i];
	for (unsigned i = 0; i < 4; i++)
		sum->done[i] += c->done[i];
	sum->errors += c->errors;
	sum->first_error = sum->first_error ? sum->first_error : c->first_error;
	sum->latency_max = c->latency_max > sum->latency_max ? c->latency_max : sum->latency_max;
	sum->now = c->now > sum->now ? c->now : sum->now;
	if (c->failed[0])
		memcpy(sum->failed, c->failed, sizeof(sum->failed));
}

static int report(uint64_t began, double cpu)
{
	static uint64_t hist[HIST_SIZE];
	struct conn sum = { .hist = hist };
	uint64_t data, all;
	double seconds;

	for (uint64_t i = 0; i < opt.conns; i++)
		add_up(&sum, &conns[i]);
	data = sum.done[CMD_READ] + sum.done[CMD_WRITE];
	all = data + sum.done[CMD_FLUSH];
	seconds = (double)(sum.now - began) / 1e9;
	if (sum.errors && !sum.failed[0])
		fail(&sum, "error reply", (int)sum.first_error);
	printf("{\"requests\": %" PRIu64 ", \"reads\": %" PRIu64 ", \"flushes\": %" PRIu64
		", \"seconds\": %.4f, \"req_s\": %.1f, \"mib_s\": %.2f, \"p50_us\": %.1f, "
		"\"p99_us\": %.1f, \"max_us\": %.1f, \"client_cpu_us\": %.4f, \"errors\": %" PRIu64
		", \"failed\": \"%s\"}\n", all, sum.done[CMD_READ], sum.done[CMD_FLUSH], seconds,
		(double)all / seconds, (double)data * (double)opt.bs / seconds / 1048576,
		hist_us(hist, all + sum.errors, 0.5), hist_us(hist, all + sum.errors, 0.99),
		(double)sum.latency_max / 1000, all ? cpu * 1e6 / (double)all : 0, sum.errors,
		sum.failed);
	return sum.failed[0] ? 1 : 0;
}

static int run(void)
{
	uint64_t began;
	double cpu;

	conns = need(opt.conns, sizeof(*conns));
	pthread_barrier_init(&start_line, NULL, (unsigned)opt.conns + 1);
	for (uint64_t i = 0; i < opt.conns; i++) {
		if (conn_connect(&conns[i]))
			die("%s: %s", opt.target, conns[i].failed);
		conn_prepare(&conns[i], i);
		if (pthread_create(&conns[i].thread, NULL, conn_main, &conns[i]))
			die("cannot start a thread");
	}
	cpu = cpu_seconds();
	began = clock_ns();
	deadline = opt.seconds > 0 ? began + (uint64_t)(opt.seconds * 1e9) : 0;
	pthread_barrier_wait(&start_line);
	for (uint64_t i = 0; i < opt.conns; i++)
		pthread_join(conns[i].thread, NULL);
	return report(began, cpu_seconds() - cpu);
}

/* ---- a relay: the least that a proxy which stores what it reads has to do ---- */

struct relay {
	int near, far, store;
};

/* Sends all of it, or returns false. */
static bool pass_on(int fd, const uint8_t *p, ssize_t n)
{
	for (ssize_t sent; n > 0; p += sent, n -= sent) {
		sent = send(fd, p, (size_t)n, MSG_NOSIGNAL);
		if (sent <= 0)
			return false;
	}
	return n == 0;
}

static void *relay_requests(void *arg)
{
	struct relay *r = arg;
	uint8_t buf[65536];
	ssize_t n;

	do
		n = recv(r->near, buf, sizeof(buf), 0);
	while (n > 0 && pass_on(r->far, buf, n));
	shutdown(r->far, SHUT_RDWR);
	return NULL;
}

static void relay_replies(struct relay *r)
{
	static uint8_t buf[RBUF_SIZE];
	off_t at = 0;
	ssize_t n;

	for (; (n = recv(r->far, buf, sizeof(buf), 0)) > 0; at += n) {
		if (pwrite(r->store, buf, (size_t)n, at) != n)
			die("%s: %s", opt.store, strerror(errno));
		if (!pass_on(r->near, buf, n))
			break;
	}
	shutdown(r->near, SHUT_RDWR);
}

static int listen_at(uint64_t port)
{
	struct sockaddr_in sa = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&sa, sizeof(sa)) || listen(fd, SOMAXCONN))
		die("port %" PRIu64 ": %s", port, strerror(errno));
	return fd;
}

/* One client at a time, until it is killed. */
static int relay(void)
{
	struct relay r = { .store = open(opt.store, O_WRONLY | O_CREAT | O_CLOEXEC, 0600) };
	int listener = listen_at(opt.relay), one = 1;
	pthread_t thread;

	while ((r.near = accept(listener, NULL, NULL)) >= 0 && (r.far = connect_target()) >= 0) {
		setsockopt(r.near, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (pthread_create(&thread, NULL, relay_requests, &r))
			die("cannot start a thread");
		relay_replies(&r);
		pthread_join(thread, NULL);
		close(r.near);
		close(r.far);
	}
	die("%s: %s", opt.target, strerror(errno));
	return 2;
}

/* ---- a server without a disk: the least that any server has to do ---- */

static int null_spinners;		/* at once, at most */
static int null_store = -1;		/* where payloads go, if anywhere */

/* Newstyle, and one export: who asks for anything else is told that there is none. */
static int null_handshake(struct conn *c)
{
	uint8_t buf[4096], head[134] = { 0 };
	uint64_t option = 0, len, flags;

	memcpy(head, "NBDMAGIC", 8);
	put_be(head + 8, OPTION_MAGIC, 8);
	put_be(head + 16, 3, 2);
	if (send_all(c, head, 18) || recv_all(c, buf, 4))
		return -1;
	flags = get_be(buf, 4);
	while (option != OPT_EXPORT_NAME) {
		if (recv_all(c, buf, 16))
			return -1;
		option = get_be(buf + 8, 4);
		len = get_be(buf + 12, 4);
		if (len > sizeof(buf) || (len && recv_all(c, buf, len)))
			return -1;
		put_be(head, OPTION_REPLY_MAGIC, 8);
		put_be(head + 8, option, 4);
		put_be(head + 12, REP_ERR_UNSUP, 4);
		put_be(head + 16, 0, 4);
		if (option != OPT_EXPORT_NAME && send_all(c, head, 20))
			return -1;
	}
	memset(head, 0, sizeof(head));
	put_be(head, opt.size, 8);
	put_be(head + 8, FLAGS_FLUSH, 2);
	return send_all(c, head, flags & FLAG_NO_ZEROES ? 10 : 134);
}

/* Sends all replies that are ready. */
static int null_send(struct conn *c)
{
	struct pollfd pfd = { .fd = c->fd, .events = POLLOUT };

	for (c->iov_next = c->iov; c->niov; poll(&pfd, 1, -1))
		if (push(c))
			return -1;
		else if (!c->niov)
			break;
	c->nidle = 0;
	return 0;
}

static int null_request(struct conn *c)
{
	uint64_t cmd, len;

	memcpy(c->request, c->rbuf + c->pos, REQUEST_SIZE);
	cmd = get_be(c->request + 6, 2);
	len = get_be(c->request + 24, 4);
	c->pos += REQUEST_SIZE;
	c->payload_left = cmd == CMD_WRITE ? len : 0;
	c->owed = true;
	return cmd == CMD_DISC || (cmd == CMD_READ && len > opt.bs) ? -1 : 0;
}

/* Every READ gets the same data. */
static int null_reply(struct conn *c)
{
	uint8_t *head = c->headers + c->nidle++ * SIMPLE_SIZE;

	c->owed = false;
	put_be(head, SIMPLE_MAGIC, 4);
	memcpy(head + 8, c->request + 8, 8);
	add_piece(c, head, SIMPLE_SIZE);
	if (get_be(c->request + 6, 2) == CMD_READ)
		add_piece(c, c->payload, get_be(c->request + 24, 4));
	return c->nidle == DEPTH_MAX ? null_send(c) : 0;
}

/* n bytes of a payload are here. */
static void null_payload(struct conn *c, size_t n)
{
	off_t at = (off_t)(get_be(c->request + 16, 8) + get_be(c->request + 24, 4) - c->payload_left);

	if (n && null_store >= 0 && pwrite(null_store, c->rbuf + c->pos, n, at) != (ssize_t)n)
		die("%s: %s", opt.store, strerror(errno));
	c->payload_left -= n;
	c->pos += n;
}

/* Takes all requests that have come. */
static int null_take(struct conn *c)
{
	size_t n;
	int r = 0;

	for (c->pos = 0; !r;) {
		n = c->end - c->pos;
		null_payload(c, n < c->payload_left ? n : c->payload_left);
		if (c->owed && !c->payload_left)
			r = null_reply(c);
		else if (!c->owed && c->end - c->pos >= REQUEST_SIZE)
			r = null_request(c);
		else
			break;
	}
	memmove(c->rbuf, c->rbuf + c->pos, c->end - c->pos);
	c->end -= c->pos;
	return r ? r : null_send(c);
}

/* Receives once; looks for a while before it sleeps, if that leaves a processor for the client. */
static ssize_t null_recv(struct conn *c)
{
	static atomic_int spinners;
	uint64_t until = clock_ns() + SPIN_NS;
	size_t room = RBUF_SIZE - c->end;
	ssize_t n = -1;

	errno = EAGAIN;
	if (atomic_fetch_add(&spinners, 1) < null_spinners)
		while (n < 0 && errno == EAGAIN && clock_ns() < until)
			n = recv(c->fd, c->rbuf + c->end, room, MSG_DONTWAIT);
	atomic_fetch_sub(&spinners, 1);
	return n < 0 && errno == EAGAIN ? recv(c->fd, c->rbuf + c->end, room, 0) : n;
}

static void *null_main(void *arg)
{
	struct conn *c = arg;
	ssize_t n;

	c->headers = need(DEPTH_MAX, SIMPLE_SIZE);
	c->iov = need(2 * DEPTH_MAX, sizeof(*c->iov));
	c->payload = need(1, opt.bs);
	c->rbuf = need(1, RBUF_SIZE);
	c->iov_next = c->iov;
	if (null_handshake(c) == 0) {
		do {
			n = null_recv(c);
			c->end += n > 0 ? (size_t)n : 0;
		} while (n > 0 && null_take(c) == 0);
	}
	close(c->fd);
	free(c->headers);
	free(c->iov);
	free(c->payload);
	free(c->rbuf);
	free(c);
	return NULL;
}

/* A thread for each client, until it is killed. */
static int null(void)
{
	int listener = listen_at(opt.null), fd, one = 1;
	struct conn *c;

	null_spinners = (int)sysconf(_SC_NPROCESSORS_ONLN) - 1;
	if (opt.store && (null_store = open(opt.store, O_WRONLY | O_CREAT | O_CLOEXEC, 0600)) < 0)
		die("%s: %s", opt.store, strerror(errno));
	while ((fd = accept(listener, NULL, NULL)) >= 0) {
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		c = need(1, sizeof(*c));
		c->fd = fd;
		if (pthread_create(&c->thread, NULL, null_main, c) || pthread_detach(c->thread))
			die("cannot start a thread");
	}
	die("port %" PRIu64 ": %s", opt.null, strerror(errno));
	return 2;
}

/* ---- options ---- */

static const char usage[] =
	"usage: load [options] HOST:PORT | unix:PATH\n"
	"       load --make-image PATH --size SIZE [--seed N]\n"
	"       load --relay PORT --store PATH HOST:PORT | unix:PATH\n"
	"       load --null PORT --size SIZE [--block-size SIZE] [--store PATH]\n"
	"  --connections N (1)      --depth N (1)          requests in flight on each\n"
	"  --block-size SIZE (4K)   --size SIZE            work on the first SIZE of the disk\n"
	"  --pattern random|sequential|once                once: each block once, scattered\n"
	"  --read-percent N (100)   --flush-every N        every Nth request is a FLUSH\n"
	"  --seconds S              --count N              the end; needed unless --pattern once\n"
	"  --export NAME            --seed N (1)           --structured: structured replies\n"
	"  --verify   check what is read; the disk was made by --make-image with this seed\n"
	"  --relay    pass a connection on, and keep a copy of what comes back, no more\n"
	"  --null     answer without a disk: READs up to the block size, the same data to all;\n"
	"             with --store what is written goes there, by one pwrite() a piece\n"
	"Prints one line of JSON. Exit status: 0, 1 errors, 2 could not start.\n";

static uint64_t number(const char *name, const char *s)
{
	static const char units[] = "KMGT";
	unsigned long long v;
	const char *u;
	char *end;

	v = strtoull(s, &end, 10);
	u = *end ? strchr(units, *end) : NULL;
	if (*s < '0' || *s > '9' || (*end && (!u || end[1])) || v > UINT64_C(1) << 52)
		die("--%s: not a number: %s", name, s);
	return u ? (uint64_t)v << 10 * (u - units + 1) : v;
}

static enum pattern pattern_named(const char *s)
{
	static const char *const names[] = { "random", "sequential", "once" };

	for (unsigned i = 0; i < 3; i++)
		if (!strcmp(s, names[i]))
			return (enum pattern)i;
	die("--pattern: unknown: %s", s);
	return RANDOM;
}

static void check_options(void)
{
	if (opt.conns < 1 || opt.conns > 4096 || opt.depth < 1 || opt.depth > DEPTH_MAX)
		die("--connections is 1 to 4096, --depth 1 to %d", DEPTH_MAX);
	if (opt.bs < 1 || opt.bs > 32 << 20 || (opt.verify && opt.bs % 8) || opt.read_percent > 100)
		die("--block-size is 1 to 32M (with --verify a multiple of 8), --read-percent 0 to 100");
	if (opt.seconds <= 0 && opt.count < opt.conns && opt.pattern != ONCE)
		die("--seconds or --count (one for each connection or more) says when it ends");
	if (strlen(opt.export) > 4096)
		die("--export: more than 4096 bytes");
}

int main(int argc, char **argv)
{
	static uint64_t *const numbers[] = { &opt.conns, &opt.depth, &opt.bs, &opt.size,
		&opt.read_percent, &opt.flush_every, &opt.count, &opt.seed, &opt.relay,
		&opt.null };
	static const struct option longs[] = {
		{ "connections", 1, NULL, 0 }, { "depth", 1, NULL, 1 },
		{ "block-size", 1, NULL, 2 }, { "size", 1, NULL, 3 },
		{ "read-percent", 1, NULL, 4 }, { "flush-every", 1, NULL, 5 },
		{ "count", 1, NULL, 6 }, { "seed", 1, NULL, 7 }, { "relay", 1, NULL, 8 },
		{ "null", 1, NULL, 9 },
		{ "pattern", 1, NULL, 'p' }, { "seconds", 1, NULL, 't' },
		{ "export", 1, NULL, 'e' }, { "make-image", 1, NULL, 'm' },
		{ "store", 1, NULL, 'o' }, { "structured", 0, NULL, 's' }, { "verify", 0, NULL, 'v' },
		{ "help", 0, NULL, 'h' }, { NULL, 0, NULL, 0 },
	};
	int key, at = 0;

	while ((key = getopt_long(argc, argv, "", longs, &at)) != -1) {
		switch (key) {
		case 'p': opt.pattern = pattern_named(optarg); break;
		case 't': opt.seconds = atof(optarg); break;
		case 'e': opt.export = optarg; break;
		case 'm': opt.image = optarg; break;
		case 'o': opt.store = optarg; break;
		case 's': opt.structured = true; break;
		case 'v': opt.verify = true; break;
		case 'h': return fputs(usage, stdout) < 0;
		case '?': return 2;
		default: *numbers[key] = number(longs[at].name, optarg);
		}
	}
	if (opt.image)
		return make_image();
	if (opt.null)
		return null();
	if (optind != argc - 1)
		die("one server is needed: HOST:PORT or unix:PATH");
	opt.target = argv[optind];
	if (opt.relay && opt.store)
		return relay();
	check_options();
	return run();
}
