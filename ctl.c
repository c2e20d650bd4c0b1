/*
 * ctl.c - the control socket: see ctl.h.
 *
 * Each connection has its own input, output, command under way and deadline, so that none of
 * them waits for another.  A command is carried out when the answers to those before it have been
 * sent: what is to be sent is never more than one answer.
 */
#define _GNU_SOURCE
#include "ctl.h"

#include "listen.h"
#include "util.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	IDLE_US = 60000000,		/* without a command: then the connection is closed */
	PROGRESS_US = 1000000,
	GATHER_US = 1000000,		/* then a query is answered with what is there */
	ACCEPT_PAUSE_US = 1000000,	/* when the system has no more descriptors */
	BLOCKS_PER_REQUEST_MAX = 8192,
	ANSWER_LINE_MAX = 16384,	/* bytes; more than there are to say */
	LINE_END = 2,			/* "\r\n" */
};

struct ctl_reply {
	char *text;
	size_t len;
	bool failed;			/* out of memory: there is no answer */
};

enum state {
	STATE_IDLE,
	STATE_COPYING,
	STATE_SWITCHING,
	STATE_RECONNECTING,
	STATE_QUERYING,
	STATE_SNAPSHOT,
	STATE_CLOSING,			/* when the answer has been sent */
};

struct client {
	int fd;
	size_t entry;			/* its place among what is polled */
	enum state state;
	bool ended;			/* there is no more input to come */
	bool broken;			/* nothing can be received or sent any more */
	bool behind;			/* waits for the end after the next one */
	const struct export *snapshot_of;	/* STATE_SNAPSHOT */
	uint64_t due;			/* now_us(): for progress, or an answer; else to be closed */
	struct ctl_reply out;
	size_t len;			/* of the input that was not carried out yet */
	char input[CTL_LINE_MAX + LINE_END];
};

/* There is one control socket at most. */
static struct {
	const struct ctl_ops *ops;	/* NULL: there is none */
	struct listeners listeners;
	uint64_t accept_again;		/* now_us() when a pause of accepting ends */
	bool reconnecting;		/* even if who asked for it has left */
	bool background;		/* somebody wanted a copy, and need not wait for it */
	struct client *client[CTL_CONNECTIONS];		/* NULL: a free place */
} ctl;

/* Answers */

static void add_line(struct ctl_reply *r, const char *line)
{
	size_t len = strlen(line);
	char *text = r->failed ? NULL : realloc(r->text, r->len + len + 1);

	r->failed = !text;
	if (!text)
		return;
	memcpy(text + r->len, line, len);
	text[r->len + len] = '\n';
	r->text = text;
	r->len += len + 1;
}

void ctl_say(struct ctl_reply *reply, const char *name, const char *fmt, ...)
{
	char line[ANSWER_LINE_MAX];
	int len = snprintf(line, sizeof(line), "%s: ", name);
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line + len, sizeof(line) - (size_t)len, fmt, ap);
	va_end(ap);
	mask_control_characters(line, strlen(line));	/* a value must not end the line */
	add_line(reply, line);
}

void ctl_say_number(struct ctl_reply *reply, const char *name, uint64_t n)
{
	ctl_say(reply, name, "%" PRIu64, n);
}

/* The command has been carried out: NULL, or why it was not. */
static void answer(struct client *cl, const char *error)
{
	if (error)
		ctl_say(&cl->out, "error", "%s", error);
	else
		add_line(&cl->out, "ok");
	cl->state = STATE_IDLE;
	cl->due = now_us() + IDLE_US;
}

static void flush(struct client *cl)
{
	struct ctl_reply *r = &cl->out;
	ssize_t n;

	if (!r->len || cl->broken)
		return;
	n = send(cl->fd, r->text, r->len, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (n < 0) {
		cl->broken = errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR;
		return;
	}
	r->len -= (size_t)n;
	memmove(r->text, r->text + n, r->len);
}

/* Commands.  Each gets what follows its name, NULL if that is nothing. */

static void answer_query(struct client *cl)
{
	ctl.ops->query(&cl->out);
	answer(cl, NULL);
}

static void run_query(struct client *cl, char *arguments)
{
	(void)arguments;
	cl->state = STATE_QUERYING;
	cl->due = now_us() + GATHER_US;
	cl->behind = ctl.ops->gather();
}

static void run_snapshot(struct client *cl, char *arguments)
{
	const char *error = ctl.ops->snapshot(arguments, &cl->snapshot_of, &cl->behind);

	if (error)
		answer(cl, error);
	else
		cl->state = STATE_SNAPSHOT;
}

/* Tell how the copy is going, unless the client does not read that; and that it has ended. */
static void tell_copy(struct client *cl)
{
	size_t unread = cl->out.len;
	bool runs;
	const char *error = ctl.ops->copy(&cl->out, &runs);

	cl->due = now_us() + PROGRESS_US;
	if (!runs) {
		answer(cl, error);
		ctl.ops->release_copy();
	} else if (unread) {
		cl->out.len = unread;
	}
}

/* False after answering what is wrong. */
static bool begin_copy(struct client *cl, const char *arguments)
{
	unsigned long blocks = 0;

	if (arguments && !parse_number(arguments, 1, BLOCKS_PER_REQUEST_MAX, &blocks)) {
		answer(cl, "BLOCKS_PER_REQUEST has to be a number from 1 to 8192");
		return false;
	}
	ctl.ops->start_copy((unsigned)blocks);
	return true;
}

static void run_cache_all(struct client *cl, char *arguments)
{
	if (!begin_copy(cl, arguments))
		return;
	cl->state = STATE_COPYING;
	tell_copy(cl);
}

static void give_up_background(void)
{
	if (ctl.background)
		ctl.ops->release_copy();
	ctl.background = false;
}

/* It may have to start again, even if the end of the last one has not been told yet. */
static void run_cache_all2(struct client *cl, char *arguments)
{
	if (!begin_copy(cl, arguments))
		return;
	give_up_background();
	ctl.background = true;
	answer(cl, NULL);
}

static void run_stop_copy(struct client *cl, char *arguments)
{
	(void)arguments;
	give_up_background();
	answer(cl, NULL);
}

static void run_switch(struct client *cl, char *arguments)
{
	const char *error;

	if (arguments && strcmp(arguments, "force"))
		error = "switch may be followed by 'force' only";
	else
		error = ctl.ops->switch_over(arguments != NULL);
	if (error)
		answer(cl, error);
	else
		cl->state = STATE_SWITCHING;	/* one end for all who ask meanwhile */
}

/* The word at *rest, which is ended there; *rest goes to what follows it, or is NULL. */
static char *take_word(char **rest)
{
	char *word = *rest, *blank = word ? strchr(word, ' ') : NULL;

	if (blank)
		*blank = '\0';
	*rest = blank ? blank + 1 : NULL;
	return word;
}

static void run_reconnect(struct client *cl, char *arguments)
{
	const char *host = take_word(&arguments), *port = take_word(&arguments), *error;

	if (!host || !*host || !port || !*port)
		error = "reconnect needs HOST PORT, or unix:PATH -";
	else if (ctl.reconnecting)
		error = "a reconnect is under way already";
	else
		error = ctl.ops->reconnect(host, strncmp(host, "unix:", 5) == 0 ? NULL : port,
					   arguments);
	if (error) {
		answer(cl, error);
		return;
	}
	cl->state = STATE_RECONNECTING;
	ctl.reconnecting = true;
}

static void run_help(struct client *cl, char *arguments);

static const struct command {
	const char *name;
	const char *arguments;		/* "" for none */
	bool proxy;			/* for that only */
	void (*run)(struct client *, char *arguments);
} commands[] = {
	{ "help", "", false, run_help },
	{ "query", "", false, run_query },
	{ "snapshot", " [EXPORT_NAME]", false, run_snapshot },
	{ "cache-all", " [BLOCKS_PER_REQUEST]", true, run_cache_all },
	{ "cache-all2", " [BLOCKS_PER_REQUEST]", true, run_cache_all2 },
	{ "stop-copy", "", true, run_stop_copy },
	{ "switch", " [force]", true, run_switch },
	{ "reconnect", " HOST PORT [EXPORT_NAME]", true, run_reconnect },
};

static void run_help(struct client *cl, char *arguments)
{
	(void)arguments;
	for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
		if (ctl.ops->proxy || !commands[i].proxy)
			ctl_say(&cl->out, "command", "%s%s", commands[i].name,
				commands[i].arguments);
	answer(cl, NULL);
}

static void run_line(struct client *cl, char *line)
{
	char *arguments = line, *name = take_word(&arguments);
	const struct command *command = NULL;

	for (size_t i = 0; i < ARRAY_SIZE(commands) && !command; i++)
		if (strcmp(commands[i].name, name) == 0)
			command = &commands[i];
	if (!command)
		answer(cl, "unknown command, try help");
	else if (arguments && !*command->arguments)
		answer(cl, "that command is a single word");
	else if (command->proxy && !ctl.ops->proxy)
		answer(cl, "that command is for a proxy, and this server is none");
	else
		command->run(cl, arguments);
}

/* Lines */

/* Copy the first line, without its end, to line of CTL_LINE_MAX + 1 bytes.  Its length, or -1. */
static ssize_t take_line(struct client *cl, char *line)
{
	char *end = memchr(cl->input, '\n', cl->len);
	size_t taken = end ? (size_t)(end - cl->input) + 1 : 0, len = taken ? taken - 1 : 0;

	if (len > 0 && cl->input[len - 1] == '\r')
		len--;
	if (len > CTL_LINE_MAX || (!end && cl->len == sizeof(cl->input))) {
		answer(cl, "the line is too long");
		cl->state = STATE_CLOSING;
		return -1;
	}
	if (!end)
		return -1;
	memcpy(line, cl->input, len);
	line[len] = '\0';
	cl->len -= taken;
	memmove(cl->input, end + 1, cl->len);
	return (ssize_t)len;
}

/* Carry out what is there, as long as the client takes the answers. */
static void run_lines(struct client *cl)
{
	char line[CTL_LINE_MAX + 1];

	while (cl->state == STATE_IDLE && !cl->out.len && !cl->broken) {
		ssize_t len = take_line(cl, line);

		if (len >= 0 && memchr(line, '\0', (size_t)len))
			answer(cl, "the line has a NUL byte");
		else if (len >= 0)
			run_line(cl, line);
		flush(cl);
		if (len < 0)
			return;
	}
}

static bool wants_input(const struct client *cl)
{
	return !cl->ended && cl->len < sizeof(cl->input);
}

/* Also while a command is under way: that the client has left is to be noticed. */
static void receive(struct client *cl)
{
	ssize_t n;

	if (!wants_input(cl))
		return;
	n = recv(cl->fd, cl->input + cl->len, sizeof(cl->input) - cl->len, MSG_DONTWAIT);
	if (n > 0)
		cl->len += (size_t)n;
	else if (n == 0)
		cl->ended = true;
	else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
		cl->broken = true;
}

/* Connections */

static bool is_busy(const struct client *cl)
{
	return cl->state != STATE_IDLE && cl->state != STATE_CLOSING;
}

static void drop(size_t place)
{
	struct client *cl = ctl.client[place];

	if (cl->state == STATE_COPYING)
		ctl.ops->release_copy();
	close(cl->fd);
	free(cl->out.text);
	free(cl);
	ctl.client[place] = NULL;
}

/* A client that has only ended its own sending still gets its answers. */
static bool is_over(const struct client *cl, short revents)
{
	if (cl->broken || cl->out.failed || (revents & (POLLERR | POLLNVAL)))
		return true;
	if (is_busy(cl))
		return revents & POLLHUP;
	return now_us() >= cl->due || (!cl->out.len && (cl->ended || cl->state == STATE_CLOSING));
}

static void turn(size_t place, short revents)
{
	struct client *cl = ctl.client[place];

	if (revents & (POLLIN | POLLHUP))
		receive(cl);
	if (cl->state == STATE_COPYING && now_us() >= cl->due)
		tell_copy(cl);
	if (cl->state == STATE_QUERYING && now_us() >= cl->due)
		answer_query(cl);
	flush(cl);
	run_lines(cl);
	if (is_over(cl, revents))
		drop(place);
}

/* A free place, made by closing who was idle for longest if need be.  -1 if all are busy. */
static int find_place(void)
{
	int longest = -1;

	for (int i = 0; i < CTL_CONNECTIONS; i++) {
		const struct client *cl = ctl.client[i];

		if (!cl)
			return i;
		if (!is_busy(cl) && (longest < 0 || cl->due < ctl.client[longest]->due))
			longest = i;
	}
	if (longest >= 0)
		drop((size_t)longest);
	return longest;
}

/* Whether there is no place now, but soon: a query does not take long. */
static bool is_place_near(void)
{
	bool near = false;

	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		if (!ctl.client[i] || !is_busy(ctl.client[i]))
			return false;
		near |= ctl.client[i]->state == STATE_QUERYING;
	}
	return near;
}

static void refuse(int fd)
{
	static const char line[] = "error: too many connections\n";

	send(fd, line, sizeof(line) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
	close(fd);
}

static void add_client(int fd)
{
	int place = find_place();
	struct client *cl = place < 0 ? NULL : calloc(1, sizeof(*cl));

	if (!cl) {
		refuse(fd);
		return;
	}
	cl->fd = fd;
	cl->due = now_us() + IDLE_US;
	ctl.client[place] = cl;
}

/* A few at a time, so that those who are here get their turn. */
static void accept_clients(void)
{
	for (int i = 0; i < CTL_CONNECTIONS && !is_place_near(); i++) {
		int fd = accept4(ctl.listeners.all[0].fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd >= 0) {
			add_client(fd);
		} else if (errno == EAGAIN || errno == EWOULDBLOCK) {
			return;
		} else if (errno != EINTR && errno != ECONNABORTED) {
			ctl.accept_again = now_us() + ACCEPT_PAUSE_US;
			return;
		}
	}
}

/* The socket */

bool ctl_open(const char *path, const struct ctl_ops *ops)
{
	if (!listen_unix(&ctl.listeners, path, 0600))
		return false;
	ctl.ops = ops;
	return true;
}

void ctl_close(void)
{
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		if (!ctl.client[i])
			continue;
		if (is_busy(ctl.client[i]))
			ctl_say(&ctl.client[i]->out, "error", "the server ends");
		flush(ctl.client[i]);
		drop(i);
	}
	listen_close(&ctl.listeners);
	memset(&ctl, 0, sizeof(ctl));
}

static bool is_pausing(void)
{
	return now_us() < ctl.accept_again;
}

static short wanted_events(const struct client *cl)
{
	return (short)((wants_input(cl) ? POLLIN : 0) | (cl->out.len ? POLLOUT : 0));
}

/* No more entries than descriptors, or poll() would refuse them where these are few. */
size_t ctl_poll(struct pollfd *pfd)
{
	size_t n = 1;

	if (!ctl.ops)
		return 0;
	pfd[0] = (struct pollfd){ .fd = ctl.listeners.all[0].fd, .events = POLLIN };
	if (is_pausing() || is_place_near())
		pfd[0].fd = -1;
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		struct client *cl = ctl.client[i];

		if (!cl)
			continue;
		pfd[n] = (struct pollfd){ .fd = cl->fd, .events = wanted_events(cl) };
		cl->entry = n++;
	}
	return n;
}

uint64_t ctl_due(void)
{
	uint64_t first = is_pausing() ? ctl.accept_again : UINT64_MAX;

	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		const struct client *cl = ctl.client[i];
		uint64_t due = UINT64_MAX;

		if (cl && cl->out.failed)
			due = 0;
		else if (cl && (!is_busy(cl) || cl->state == STATE_COPYING ||
				cl->state == STATE_QUERYING))
			due = cl->due;
		if (due < first)
			first = due;
	}
	return first == UINT64_MAX ? first : first / 1000 + 1;
}

void ctl_turn(const struct pollfd *pfd, size_t n)
{
	if (n == 0)
		return;
	for (size_t i = 0; i < CTL_CONNECTIONS; i++)
		if (ctl.client[i])
			turn(i, pfd[ctl.client[i]->entry].revents);
	if (pfd[0].revents)
		accept_clients();
}

/*
 * What was waited for.  The answers are sent by the next turn, which comes at once: there is
 * output now.
 */

static void answer_all(enum state state, const char *error, uint64_t zeroed)
{
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		struct client *cl = ctl.client[i];

		if (!cl || cl->state != state)
			continue;
		if (!error && zeroed)
			ctl_say_number(&cl->out, "zeroed", zeroed);
		answer(cl, error);
	}
}

void ctl_switched(const char *error, uint64_t zeroed)
{
	answer_all(STATE_SWITCHING, error, zeroed);
}

void ctl_reconnected(const char *error)
{
	ctl.reconnecting = false;
	answer_all(STATE_RECONNECTING, error, 0);
}

/* Whether cl is in that state and its turn has come, of which there is one for each end. */
static bool is_due(struct client *cl, enum state state)
{
	bool due = cl && cl->state == state && !cl->behind;

	if (cl && cl->state == state)
		cl->behind = false;
	return due;
}

void ctl_gathered(void)
{
	for (size_t i = 0; i < CTL_CONNECTIONS; i++)
		if (is_due(ctl.client[i], STATE_QUERYING))
			answer_query(ctl.client[i]);
}

void ctl_snapshot_ended(const struct export *of, const char *path, const char *error)
{
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		struct client *cl = ctl.client[i];

		if (!cl || cl->snapshot_of != of || !is_due(cl, STATE_SNAPSHOT))
			continue;
		if (path)
			ctl_say(&cl->out, "snapshot", "%s", path);
		answer(cl, path ? NULL : error);
	}
}

void ctl_copied(void)
{
	bool runs;

	ctl.ops->copy(NULL, &runs);
	if (runs)
		return;
	give_up_background();
	for (size_t i = 0; i < CTL_CONNECTIONS; i++)
		if (ctl.client[i] && ctl.client[i]->state == STATE_COPYING)
			tell_copy(ctl.client[i]);
}
