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
	enum state state;
	bool ended;			/* there is no more input to come */
	bool broken;			/* nothing can be received or sent any more */
	bool behind;			/* waits for the end after the next one */
	const void *snapshot_of;	/* STATE_SNAPSHOT: which export */
	uint64_t due;			/* now_us(): for progress, or an answer; else to be closed */
	struct ctl_reply out;
	size_t len;			/* of the input that was not carried out yet */
	char input[CTL_LINE_MAX + LINE_END];
};

struct ctl {
	const struct ctl_ops *ops;
	struct listeners listeners;
	uint64_t accept_again;		/* now_us() when a pause of accepting ends, 0 for none */
	bool switching, reconnecting;	/* even if who asked for it has left */
	bool gathering;			/* likewise */
	bool background;		/* somebody wanted a copy, and need not wait for it */
	struct client *client[CTL_CONNECTIONS];		/* NULL: a free place */
};

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

static void answer_query(struct ctl *c, struct client *cl)
{
	c->ops->query(&cl->out);
	answer(cl, NULL);
}

/* What is being gathered already may lack what was done since. */
static void run_query(struct ctl *c, struct client *cl, char *arguments)
{
	(void)arguments;
	cl->state = STATE_QUERYING;
	cl->due = now_us() + GATHER_US;
	cl->behind = c->gathering;
	if (!c->gathering)
		c->ops->gather();
	c->gathering = true;
}

static void run_snapshot(struct ctl *c, struct client *cl, char *arguments)
{
	const char *error = c->ops->snapshot(arguments, &cl->snapshot_of, &cl->behind);

	if (error)
		answer(cl, error);
	else
		cl->state = STATE_SNAPSHOT;
}

static void answer_copy(struct client *cl, const struct ctl_copy *copy)
{
	char missing[64];

	if (copy->cached >= copy->blocks) {
		answer(cl, NULL);
		return;
	}
	for (unsigned i = 0; i < copy->failures; i++)
		ctl_say(&cl->out, "failed", "%" PRIu64 " %" PRIu64, copy->failed[i].off,
			copy->failed[i].len);
	if (copy->failures_more)
		ctl_say_number(&cl->out, "failed-more", copy->failures_more);
	snprintf(missing, sizeof(missing), "%" PRIu64 " blocks could not be copied",
		 copy->blocks - copy->cached);
	answer(cl, copy->error ? copy->error : missing);
}

/* Tell how the copy is going, unless the client does not read that; and that it has ended. */
static void tell_copy(struct ctl *c, struct client *cl)
{
	struct ctl_copy copy;

	c->ops->proxy->copy(&copy);
	if (!cl->out.len)
		ctl_say(&cl->out, "progress", "%" PRIu64 " %" PRIu64 " %" PRIu64, copy.cached,
			copy.blocks, copy.rate);
	cl->due = now_us() + PROGRESS_US;
	if (copy.running)
		return;
	answer_copy(cl, &copy);
	c->ops->proxy->release_copy();
}

/* False after answering what is wrong. */
static bool begin_copy(struct ctl *c, struct client *cl, const char *arguments)
{
	unsigned long blocks = 0;

	if (arguments && !parse_number(arguments, 1, BLOCKS_PER_REQUEST_MAX, &blocks)) {
		answer(cl, "BLOCKS_PER_REQUEST has to be a number from 1 to 8192");
		return false;
	}
	c->ops->proxy->start_copy((unsigned)blocks);
	return true;
}

static void run_cache_all(struct ctl *c, struct client *cl, char *arguments)
{
	if (!begin_copy(c, cl, arguments))
		return;
	cl->state = STATE_COPYING;
	tell_copy(c, cl);
}

static void give_up_background(struct ctl *c)
{
	if (c->background)
		c->ops->proxy->release_copy();
	c->background = false;
}

/* It may have to start again, even if the end of the last one has not been told yet. */
static void run_cache_all2(struct ctl *c, struct client *cl, char *arguments)
{
	if (!begin_copy(c, cl, arguments))
		return;
	give_up_background(c);
	c->background = true;
	answer(cl, NULL);
}

static void run_stop_copy(struct ctl *c, struct client *cl, char *arguments)
{
	(void)arguments;
	give_up_background(c);
	answer(cl, NULL);
}

static void run_switch(struct ctl *c, struct client *cl, char *arguments)
{
	const char *error;

	if (arguments && strcmp(arguments, "force")) {
		answer(cl, "switch may be followed by 'force' only");
		return;
	}
	cl->state = STATE_SWITCHING;
	if (c->switching)
		return;		/* one end for all who ask meanwhile */
	c->switching = true;
	error = c->ops->proxy->switch_over(arguments != NULL);
	if (error)
		ctl_switched(c, error, 0);
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

static void run_reconnect(struct ctl *c, struct client *cl, char *arguments)
{
	const char *host = take_word(&arguments), *port = take_word(&arguments), *error;

	if (!host || !*host || !port || !*port) {
		answer(cl, "reconnect needs HOST PORT, or unix:PATH -");
		return;
	}
	if (c->reconnecting) {
		answer(cl, "a reconnect is under way already");
		return;
	}
	if (strncmp(host, "unix:", strlen("unix:")) == 0)
		port = NULL;
	cl->state = STATE_RECONNECTING;
	c->reconnecting = true;
	error = c->ops->proxy->reconnect(host, port, arguments);
	if (error)
		ctl_reconnected(c, error);
}

static void run_help(struct ctl *c, struct client *cl, char *arguments);

static const struct command {
	const char *name;
	const char *arguments;		/* "" for none */
	bool proxy;			/* for that only */
	void (*run)(struct ctl *, struct client *, char *arguments);
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

static void run_help(struct ctl *c, struct client *cl, char *arguments)
{
	(void)arguments;
	for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
		if (c->ops->proxy || !commands[i].proxy)
			ctl_say(&cl->out, "command", "%s%s", commands[i].name,
				commands[i].arguments);
	answer(cl, NULL);
}

static void run_line(struct ctl *c, struct client *cl, char *line)
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
	else if (command->proxy && !c->ops->proxy)
		answer(cl, "that command is for a proxy, and this server is none");
	else
		command->run(c, cl, arguments);
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
static void run_lines(struct ctl *c, struct client *cl)
{
	char line[CTL_LINE_MAX + 1];

	while (cl->state == STATE_IDLE && !cl->out.len && !cl->broken) {
		ssize_t len = take_line(cl, line);

		if (len >= 0 && memchr(line, '\0', (size_t)len))
			answer(cl, "the line has a NUL byte");
		else if (len >= 0)
			run_line(c, cl, line);
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

static void drop(struct ctl *c, size_t place)
{
	struct client *cl = c->client[place];

	if (cl->state == STATE_COPYING)
		c->ops->proxy->release_copy();
	close(cl->fd);
	free(cl->out.text);
	free(cl);
	c->client[place] = NULL;
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

static void turn(struct ctl *c, size_t place, short revents)
{
	struct client *cl = c->client[place];

	if (revents & (POLLIN | POLLHUP))
		receive(cl);
	if (cl->state == STATE_COPYING && now_us() >= cl->due)
		tell_copy(c, cl);
	if (cl->state == STATE_QUERYING && now_us() >= cl->due)
		answer_query(c, cl);
	flush(cl);
	run_lines(c, cl);
	if (is_over(cl, revents))
		drop(c, place);
}

/* A free place, made by closing who was idle for longest if need be.  -1 if all are busy. */
static int find_place(struct ctl *c)
{
	int longest = -1;

	for (int i = 0; i < CTL_CONNECTIONS; i++) {
		const struct client *cl = c->client[i];

		if (!cl)
			return i;
		if (!is_busy(cl) && (longest < 0 || cl->due < c->client[longest]->due))
			longest = i;
	}
	if (longest >= 0)
		drop(c, (size_t)longest);
	return longest;
}

/* Whether there is no place now, but soon: a query does not take long. */
static bool is_place_near(const struct ctl *c)
{
	bool near = false;

	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		if (!c->client[i] || !is_busy(c->client[i]))
			return false;
		near |= c->client[i]->state == STATE_QUERYING;
	}
	return near;
}

static void refuse(int fd)
{
	static const char line[] = "error: too many connections\n";

	send(fd, line, sizeof(line) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
	close(fd);
}

static void add_client(struct ctl *c, int fd)
{
	int place = find_place(c);
	struct client *cl = place < 0 ? NULL : calloc(1, sizeof(*cl));

	if (!cl) {
		refuse(fd);
		return;
	}
	cl->fd = fd;
	cl->due = now_us() + IDLE_US;
	c->client[place] = cl;
}

/* A few at a time, so that those who are here get their turn. */
static void accept_clients(struct ctl *c)
{
	for (int i = 0; i < CTL_CONNECTIONS && !is_place_near(c); i++) {
		int fd = accept4(c->listeners.all[0].fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd >= 0) {
			add_client(c, fd);
		} else if (errno == EAGAIN || errno == EWOULDBLOCK) {
			return;
		} else if (errno != EINTR && errno != ECONNABORTED) {
			c->accept_again = now_us() + ACCEPT_PAUSE_US;
			return;
		}
	}
}

/* The socket */

struct ctl *ctl_open(const char *path, const struct ctl_ops *ops)
{
	struct ctl *c = calloc(1, sizeof(*c));

	if (!c) {
		log_failure("cannot listen on unix:%s: out of memory", path);
		return NULL;
	}
	c->ops = ops;
	if (!listen_unix(&c->listeners, path, 0600)) {
		free(c);
		return NULL;
	}
	return c;
}

void ctl_close(struct ctl *c)
{
	if (!c)
		return;
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		if (!c->client[i])
			continue;
		if (is_busy(c->client[i]))
			ctl_say(&c->client[i]->out, "error", "the server ends");
		flush(c->client[i]);
		drop(c, i);
	}
	listen_close(&c->listeners);
	free(c);
}

static short wanted_events(const struct client *cl)
{
	return (short)((wants_input(cl) ? POLLIN : 0) | (cl->out.len ? POLLOUT : 0));
}

/* One entry for each place, so that they can be told apart even if some were closed. */
size_t ctl_poll(struct ctl *c, struct pollfd *pfd)
{
	pfd[0] = (struct pollfd){ .fd = c->listeners.all[0].fd, .events = POLLIN };
	if (c->accept_again || is_place_near(c))
		pfd[0].fd = -1;
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		const struct client *cl = c->client[i];

		pfd[1 + i] = (struct pollfd){ .fd = -1 };
		if (cl)
			pfd[1 + i] = (struct pollfd){ .fd = cl->fd, .events = wanted_events(cl) };
	}
	return CTL_FDS;
}

int ctl_timeout(const struct ctl *c)
{
	uint64_t now = now_us(), first = c->accept_again ? c->accept_again : UINT64_MAX;

	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		const struct client *cl = c->client[i];
		uint64_t due = UINT64_MAX;

		if (cl && cl->out.failed)
			due = now;
		else if (cl && (!is_busy(cl) || cl->state == STATE_COPYING ||
				cl->state == STATE_QUERYING))
			due = cl->due;
		if (due < first)
			first = due;
	}
	if (first == UINT64_MAX)
		return -1;
	return first > now ? (int)((first - now) / 1000 + 1) : 0;
}

void ctl_turn(struct ctl *c, const struct pollfd *pfd, size_t n)
{
	for (size_t i = 0; i + 1 < n; i++)
		if (c->client[i])
			turn(c, i, pfd[1 + i].revents);
	if (c->accept_again && now_us() >= c->accept_again)
		c->accept_again = 0;
	if (pfd[0].revents)
		accept_clients(c);
}

/*
 * What was waited for.  The answers are sent by the next turn, which comes at once: there is
 * output now.
 */

static void answer_all(struct ctl *c, enum state state, const char *error, uint64_t zeroed)
{
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		struct client *cl = c->client[i];

		if (!cl || cl->state != state)
			continue;
		if (!error && zeroed)
			ctl_say_number(&cl->out, "zeroed", zeroed);
		answer(cl, error);
	}
}

void ctl_switched(struct ctl *c, const char *error, uint64_t zeroed)
{
	c->switching = false;
	answer_all(c, STATE_SWITCHING, error, zeroed);
}

void ctl_reconnected(struct ctl *c, const char *error)
{
	c->reconnecting = false;
	answer_all(c, STATE_RECONNECTING, error, 0);
}

/* Whether cl is in that state and its turn has come, of which there is one for each end. */
static bool is_due(struct client *cl, enum state state)
{
	bool due = cl && cl->state == state && !cl->behind;

	if (cl && cl->state == state)
		cl->behind = false;
	return due;
}

void ctl_gathered(struct ctl *c)
{
	c->gathering = false;
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		struct client *cl = c->client[i];

		if (is_due(cl, STATE_QUERYING))
			answer_query(c, cl);
		else if (cl && cl->state == STATE_QUERYING)
			c->gathering = true;
	}
	if (c->gathering)
		c->ops->gather();
}

void ctl_snapshot_ended(struct ctl *c, const void *of, const char *path, const char *error)
{
	for (size_t i = 0; i < CTL_CONNECTIONS; i++) {
		struct client *cl = c->client[i];

		if (!cl || cl->snapshot_of != of || !is_due(cl, STATE_SNAPSHOT))
			continue;
		if (path)
			ctl_say(&cl->out, "snapshot", "%s", path);
		answer(cl, path ? NULL : error);
	}
}

void ctl_copied(struct ctl *c)
{
	struct ctl_copy copy;

	c->ops->proxy->copy(&copy);
	if (copy.running)
		return;
	give_up_background(c);
	for (size_t i = 0; i < CTL_CONNECTIONS; i++)
		if (c->client[i] && c->client[i]->state == STATE_COPYING)
			tell_copy(c, c->client[i]);
}
