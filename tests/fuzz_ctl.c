/*
 * fuzz_ctl.c - fuzzes the control socket: ctl.c and control.c, between clients and a server that are
 * both pretended.
 *
 * An input is a list of events: somebody connects, sends, reads, leaves; a copy or a switch ends;
 * time passes; memory runs out.  The sockets and the clock are those of this file, so that both are
 * included here.  After each event they get their turns, as in the main loop, until there is nothing
 * to do.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include "../cache.h"
#include "../clients.h"
#include "../confine.h"
#include "../ctl.h"
#include "../exports.h"
#include "../listen.h"
#include "../util.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	PEERS = 40,			/* that connect, one after the other */
	FIRST_FD = 1000,
	ROOM_MAX = 65536,		/* bytes in a socket's buffer */
	TURNS_MAX = 20000,
	BLOCKS_MAX = 8192,
};

static ssize_t fake_recv(int fd, void *buf, size_t len);
static ssize_t fake_send(int fd, const void *buf, size_t len);
static int fake_close(int fd);
static uint64_t fake_now(void);
static void *fake_realloc(void *p, size_t n);
static bool fake_listen(listen_accept *got);

#define recv(fd, buf, len, flags) fake_recv(fd, buf, len)
#define send(fd, buf, len, flags) fake_send(fd, buf, len)
#define close fake_close
#define now_ms fake_now
#define realloc fake_realloc
#define listen_unix(path, mode, got) fake_listen(got)
#include "../control.c"
#include "../ctl.c"
#undef recv
#undef send
#undef close
#undef realloc

/* The other end of a connection. */
struct peer {
	bool accepted, closed;		/* by the server */
	bool done_sending, gone;
	uint8_t *sent;			/* and not received by the server yet */
	size_t sent_len;
	size_t room;			/* for answers, until the peer reads */
	uint8_t *got;
	size_t got_len;
	bool excused;			/* it cannot expect an answer to each line any more */
	unsigned lines, answers;	/* complete lines that it sent; answers that it got */
	size_t line_len;		/* of the line that it is sending */
};

static struct peer peer[PEERS];
static unsigned peers, arriving;	/* arriving: the first that is not accepted yet */
static bool server_ends;
static uint64_t now;
static bool no_memory;

/* The loop, and the listener on it. */
static struct source *source[PEERS];
static size_t sources;
struct loop main_loop;
static listen_accept *accepted;

/* The proxy, or a target. */
static struct cache cache;
static struct exported image[2] = { { .path = "proxy\nok\r\x7f", .export.backend = &cache.layer.backend } };
struct exports exports = { .all = image, .count = 1 };
struct load load;
static unsigned copies;			/* started and not released */
static bool copy_runs, copy_failed, switching, reconnecting;
static unsigned snapshots;		/* to be made; the first may be under way */
static bool snapshot_runs, snapshot_ends, snapshot_fails;
static bool switched, redirected;	/* have ended, and ctl.c was not told yet */
static const char *switch_error, *redirect_error;
static uint64_t cached, total;

/* Sockets */

static struct peer *peer_of(int fd)
{
	unsigned i = (unsigned)(fd - FIRST_FD);

	assert(fd >= FIRST_FD && i < peers && peer[i].accepted && !peer[i].closed);
	return &peer[i];
}

bool loop_add(struct loop *l, struct source *s)
{
	(void)l;
	if (no_memory)
		return false;
	s->place = sources;
	source[sources++] = s;
	return true;
}

void loop_remove(struct loop *l, struct source *s)
{
	(void)l;
	source[s->place] = source[--sources];
	source[s->place]->place = s->place;
}

static ssize_t fake_recv(int fd, void *buf, size_t len)
{
	struct peer *p = peer_of(fd);

	assert(len > 0);
	if (p->sent_len == 0) {
		errno = EAGAIN;
		return p->done_sending ? 0 : -1;
	}
	if (len > p->sent_len)
		len = p->sent_len;
	memcpy(buf, p->sent, len);
	p->sent_len -= len;
	memmove(p->sent, p->sent + len, p->sent_len);
	return (ssize_t)len;
}

static ssize_t fake_send(int fd, const void *buf, size_t len)
{
	struct peer *p = peer_of(fd);

	if (p->gone || p->room == 0) {
		errno = p->gone ? EPIPE : EAGAIN;
		return -1;
	}
	if (len > p->room)
		len = p->room;
	p->got = realloc(p->got, p->got_len + len);
	assert(p->got);
	memcpy(p->got + p->got_len, buf, len);
	p->got_len += len;
	p->room -= len;
	return (ssize_t)len;
}

/* Who waits for something is not sent away, unless it has left or the server ends. */
static int fake_close(int fd)
{
	struct peer *p = peer_of(fd);

	for (size_t i = 0; !server_ends && i < CONNECTIONS_MAX; i++)
		if (ctl.client[i].connected && ctl.client[i].source.fd == fd)
			assert(!ctl.client[i].awaits || p->gone || no_memory);
	p->closed = true;
	return 0;
}

static uint64_t fake_now(void)
{
	return now / 1000;
}

static void *fake_realloc(void *p, size_t n)
{
	if (no_memory)
		return NULL;
	return realloc(p, n);
}

static bool fake_listen(listen_accept *got)
{
	accepted = got;
	return true;
}

static short events_of(int fd)
{
	short events = 0;
	struct peer *p = peer_of(fd);

	if (p->sent_len > 0 || p->done_sending)
		events |= POLLIN;
	if (p->room > 0)
		events |= POLLOUT;
	return p->gone ? events | POLLHUP : events;
}

/* What the server does */

void wake_main(void)
{
}

size_t clients_count(void)
{
	return peers;
}

bool confine_holds;

/* One that was wanted begins at the end of the one before. */
const char *exports_snapshot_of(const char *name, const struct export **e, bool *behind)
{
	if (cached % 8 == 7 || (name && strlen(name) % 8 == 7))
		return "it is a device";
	*e = &image[0].export;
	*behind = snapshot_runs;
	snapshots = snapshot_runs ? 2 : 1;
	return NULL;
}

void exports_tend(exports_ended *ended)
{
	if (!snapshot_ends)
		return;
	snapshot_ends = false;
	ended(&image[1].export, NULL, "of another export, which nobody wanted");
	ended(&image[0].export, snapshot_fails ? NULL : "/a\nb", "the disk is full");
}

const char *cache_switch(struct cache *c, bool force)
{
	(void)c;
	if (!switching && !force && cached < total)
		return "not all of it is here";
	switching = true;
	return NULL;
}

bool cache_switch_ended(struct cache *c, const char **error)
{
	bool ended = switched;

	(void)c;
	switched = false;
	*error = switch_error;
	return ended;
}

void cache_status(const struct cache *c, struct cache_status *s)
{
	(void)c;
	*s = (struct cache_status){ .blocks = total, .held = cached };
}

uint64_t layer_written(const struct layer *l)
{
	(void)l;
	return cached / 2;
}

void origin_status(struct origin *o, struct origin_status *s)
{
	(void)o;
	*s = (struct origin_status){ .links = cached % 2, .reason = "it\nis down" };
}

const char *origin_redirect(struct origin *o, const char *host, const char *port,
			    const char *export_name)
{
	(void)o;
	assert(!reconnecting && *host && !strchr(host, ' '));
	assert(strlen(host) + (export_name ? strlen(export_name) : 0) <= CTL_LINE_MAX);
	assert(port ? *port && !strchr(port, ' ') : strncmp(host, "unix:", 5) == 0);
	if (strcmp(host, "bad") == 0)
		return "no such host";
	reconnecting = true;
	return NULL;
}

bool origin_redirected(struct origin *o, const char **error)
{
	bool ended = redirected;

	(void)o;
	redirected = false;
	*error = redirect_error;
	return ended;
}

void copy_start(struct copy *c, uint64_t request_bytes)
{
	(void)c;
	assert(request_bytes <= (uint64_t)BLOCKS_MAX * BLOCK_SIZE);
	copies++;
	copy_runs |= cached < total;	/* one that runs ends by end_copy() only */
}

void copy_release(struct copy *c, bool all)
{
	(void)c;
	assert(!all);
	assert(copies > 0);
	if (--copies == 0)
		copy_runs = false;
}

void copy_status(struct copy *c, struct copy_status *s)
{
	(void)c;
	*s = (struct copy_status){ .state = copy_runs ? COPY_RUNNING : copy_failed ? COPY_FAILED : COPY_IDLE };
	if (copy_failed)
		s->failure[s->failures++] = (struct span){ .off = 8192, .len = UINT64_MAX };
}

/* Peers */

/* Count the answers among the lines that came, each of which must be one. */
static void read_answers(struct peer *p)
{
	uint8_t *at = p->got, *end;

	for (; p->got_len > 0 && (end = memchr(at, '\n', p->got_len)); at = end + 1) {
		size_t len = (size_t)(end - at);

		p->got_len -= len + 1;
		for (size_t i = 0; i < len; i++)
			assert(at[i] >= ' ' && at[i] != 0x7f);
		if ((len == 2 && memcmp(at, "ok", 2) == 0) || (len > 6 && memcmp(at, "error:", 6) == 0))
			p->answers++;
		else
			assert(memmem(at, len, ": ", 2));
	}
	if (p->got_len > 0)
		memmove(p->got, at, p->got_len);
}

static void connect_peer(struct input *in)
{
	if (peers == PEERS)
		return;
	peer[peers] = (struct peer){ .room = take(in, 1) * 256 };
	peers++;
}

static void send_bytes(struct peer *p, const uint8_t *bytes, size_t n)
{
	if (p->done_sending || n == 0 || p->sent_len + n > ROOM_MAX)
		return;
	p->sent = realloc(p->sent, p->sent_len + n);
	assert(p->sent);
	memcpy(p->sent + p->sent_len, bytes, n);
	p->sent_len += n;
	for (size_t i = 0; i < n; i++) {
		p->line_len++;
		if (p->line_len > CTL_LINE_MAX)
			p->excused = true;	/* it will be told so, and dismissed */
		if (bytes[i] != '\n')
			continue;
		p->lines++;
		p->line_len = 0;
	}
}

/* What is longer than an input should be, or hard to come by. */
static void send_line(struct peer *p, unsigned which)
{
	static const char *const lines[] = {
		"query\n", "cache-all\n", "cache-all2 8192\n", "switch force\n", "switch\n",
		"reconnect unix:/a - x y\n", "reconnect bad 1\n", "stop-copy\n",
	};
	static uint8_t filler[CTL_LINE_MAX + 8];

	if (which & 8) {
		memset(filler, 'x', sizeof(filler));
		filler[0] = '\n';
		send_bytes(p, filler, CTL_LINE_MAX - 4 + (which & 7) + 4 * (which >> 4 & 1));
	} else {
		send_bytes(p, (const uint8_t *)lines[which & 7], strlen(lines[which & 7]));
	}
}

static void send_some(struct peer *p, struct input *in)
{
	size_t n = take(in, 1);
	uint8_t *bytes = take_bytes(in, &n);

	send_bytes(p, bytes, n);
	free(bytes);
}

static void leave(struct peer *p)
{
	p->done_sending = p->gone = true;
	p->excused = true;
}

/* The server */

static void end_copy(unsigned how)
{
	copy_failed = how & 1;
	if (!copy_failed)
		cached = total;
	copy_runs = false;
	ctl_tend();
}

static void end_switch(unsigned how)
{
	if (!switching)
		return;
	switching = false;
	switched = true;
	cache.zeroed = how & 2;
	switch_error = how & 1 ? "the disk\nis full" : NULL;
	ctl_tend();
}

static void end_reconnect(unsigned how)
{
	if (!reconnecting)
		return;
	redirected = true;
	redirect_error = how & 1 ? "another size" : NULL;
	reconnecting = false;
	ctl_tend();
}

static void tend_snapshot(unsigned how)
{
	if (snapshots > 0 && !snapshot_runs && (how & 1)) {
		snapshot_runs = true;
	} else if (snapshots > 0) {
		snapshots--;
		snapshot_runs = false;
		snapshot_ends = true;
		snapshot_fails = !(how & 2);
		ctl_tend();
	}
}

static bool accept_peer(void)
{
	if (arriving == peers)
		return false;
	peer[arriving].accepted = true;
	accepted(FIRST_FD + (int)arriving++, NULL, 0);
	return true;
}

static bool turn_source(struct source *s)
{
	bool due = s->due <= now / 1000;
	short events = s->ops->events(s), revents = 0;

	if (due)
		s->due = UINT64_MAX;
	else if (events)
		revents = events_of(s->fd) & (events | POLLHUP);
	if (due || revents)
		s->ops->turn(s, revents);
	return due || revents;
}

/* One round of poll() and what follows it.  False if there was nothing to do. */
static bool take_turn(void)
{
	bool ready = accept_peer();

	for (size_t i = sources; i-- > 0;)
		if (i < sources)
			ready |= turn_source(source[i]);
	return ready;
}

/* The level of poll() would make it spin: a hang-up of a busy client, which is dropped at once. */
static void settle(void)
{
	unsigned turns = 0;

	while (take_turn())
		assert(++turns < TURNS_MAX);
	assert(ctl.reconnecting == reconnecting);
	for (unsigned i = 0; i < peers; i++)
		read_answers(&peer[i]);
}

static void event(struct input *in)
{
	unsigned what = (unsigned)take(in, 1), which = (unsigned)take(in, 1);
	struct peer *p = peers ? &peer[which % peers] : NULL;

	switch (p ? what % 18 : 0) {
	case 0:
		connect_peer(in);
		break;
	case 1:
		p->room = ROOM_MAX;
		break;
	case 2:
		p->room = which;
		break;
	case 3:
		p->done_sending = true;
		break;
	case 4:
		leave(p);
		break;
	case 5:
		end_copy(which);
		break;
	case 6:
		end_switch(which);
		break;
	case 7:
		end_reconnect(which);
		break;
	case 8:
		now += which * UINT64_C(400000);
		break;
	case 9:
		no_memory = which & 1;
		break;
	case 10:
		cached = which < total ? which : total;
		break;
	case 11:
	case 12:
		send_line(p, (unsigned)take(in, 1));
		break;
	case 17:
		tend_snapshot(which);
		break;
	default:
		send_some(p, in);
	}
}

/* All that could be waited for happens, and everybody reads. */
static void finish(void)
{
	no_memory = false;
	for (unsigned round = 0; round < 3 * CTL_LINE_MAX; round++) {
		for (unsigned i = 0; i < peers; i++)
			peer[i].room = ROOM_MAX;
		if (copy_runs)
			end_copy(0);
		end_switch(0);
		end_reconnect(0);
		tend_snapshot(0);
		settle();
		if (!copy_runs && !switching && !reconnecting && !snapshots)
			return;
	}
	assert(!"it comes to an end");
}

/* Whether the server may have closed the connection: to make room, or after a long time. */
static bool may_be_closed(void)
{
	return peers > CONNECTIONS_MAX || now / 1000 >= IDLE_MS;
}

static void check_peer(const struct peer *p)
{
	assert(p->accepted && p->answers <= p->lines + 2);	/* +2: turned away, or dismissed */
	assert(p->got_len == 0 || p->closed);
	if (!p->excused && !p->closed)
		assert(p->answers == p->lines && p->sent_len == 0);
	if (!p->excused && p->closed && !may_be_closed())
		assert(p->done_sending && p->answers == p->lines);
}

static void begin(bool proxy)
{
	server_ends = false;
	peers = arriving = 0;
	sources = 0;
	now = 1000;
	no_memory = false;
	copies = 0;
	copy_runs = copy_failed = switching = reconnecting = snapshot_runs = false;
	snapshots = 0;
	snapshot_ends = switched = redirected = false;
	cached = 0;
	total = 100;
	ctl.reconnecting = ctl.background = false;
	exports.cache = proxy ? &cache : NULL;
}

static void end(bool memory_was_short)
{
	bool background = ctl.background;

	for (unsigned i = 0; i < peers && !memory_was_short; i++)
		check_peer(&peer[i]);
	server_ends = true;
	ctl_close();
	assert(copies == background);
	for (unsigned i = 0; i < peers; i++) {
		assert(peer[i].closed || !peer[i].accepted);
		free(peer[i].sent);
		free(peer[i].got);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
	struct input in = { p, n };
	bool memory_was_short = false;
	bool opened;

	begin(n % 8 != 7);
	opened = ctl_open(&(struct options){ .control = "" });
	assert(opened);
	while (in.left > 0) {
		event(&in);
		settle();
		memory_was_short |= no_memory;
	}
	finish();
	end(memory_was_short);
	return 0;
}
