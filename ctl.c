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
#include "loop.h"
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
	CONNECTIONS_MAX = 16,		/* the one that was idle for longest makes room */
	IDLE_MS = 60 * 1000,		/* without a command: then the connection is closed */
	PROGRESS_MS = 1000,
	BLOCKS_PER_REQUEST_MAX = 8192,
	ANSWER_LINE_MAX = 16384,	/* bytes; more than there are to say */
	VALUE_MAX = 16384 - 256,	/* with room for a name */
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
	STATE_SNAPSHOT,
	STATE_CLOSING,			/* when the answer has been sent */
};

struct ctl_client {
	struct source source;
	enum state state;
	bool ended;			/* there is no more input to come */
	bool broken;			/* nothing can be received or sent any more */
	bool behind;			/* waits for the end after the next one */
	const struct export *snapshot_of;	/* STATE_SNAPSHOT */
	uint64_t due;			/* now_ms(): for progress; else to be closed */
	uint64_t idle_since;		/* a count of those that became idle */
	struct ctl_reply out;
	size_t len;			/* of the input that was not carried out yet */
	char input[CTL_LINE_MAX + LINE_END];
};

/* There is one control socket at most. */
static struct {
	const struct ctl_ops *ops;	/* NULL: there is none */
	uint64_t idle_count;
	bool reconnecting;		/* even if who asked for it has left */
	bool background;		/* somebody wanted a copy, and need not wait for it */
	struct ctl_client *client[CONNECTIONS_MAX];	/* NULL: a free place */
} ctl;

/* Answers */

void ctl_put(struct ctl_reply *reply, const char *fmt, ...)
{
	char part[ANSWER_LINE_MAX];
	char *text;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(part, sizeof(part), fmt, ap);
	va_end(ap);
	text = reply->failed ? NULL : realloc(reply->text, reply->len + strlen(part));
	reply->failed = !text;
	if (!text)
		return;
	reply->text = text;
	memcpy(text + reply->len, part, strlen(part));
	reply->len += strlen(part);
}

void ctl_say(struct ctl_reply *reply, const char *name, const char *fmt, ...)
{
	char value[VALUE_MAX];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(value, sizeof(value), fmt, ap);
	va_end(ap);
	mask_control_characters(value, strlen(value));	/* a value must not end the line */
	ctl_put(reply, "%s: %s\n", name, value);
}

void ctl_say_number(struct ctl_reply *reply, const char *name, uint64_t n)
{
	ctl_say(reply, name, "%" PRIu64, n);
}

static void become_idle(struct ctl_client *cl)
{
	cl->state = STATE_IDLE;
	cl->idle_since = ctl.idle_count++;
	cl->due = now_ms() + IDLE_MS;
	cl->source.due = 0;
}

/* The command has been carried out: NULL, or why it was not. */
static void answer(struct ctl_client *cl, const char *error)
{
	if (error)
		ctl_say(&cl->out, "error", "%s", error);
	else
		ctl_put(&cl->out, "ok\n");
	become_idle(cl);
}

static void ctl_flush(struct ctl_client *cl)
{
	struct ctl_reply *r = &cl->out;
	ssize_t n;

	if (!r->len || cl->broken)
		return;
	n = send(cl->source.fd, r->text, r->len, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (n < 0) {
		cl->broken = errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR;
		return;
	}
	r->len -= (size_t)n;
	memmove(r->text, r->text + n, r->len);
}

/* Commands.  Each gets what follows its name, NULL if that is nothing. */

static void run_query(struct ctl_client *cl, char *arguments)
{
	if (arguments && strcmp(arguments, "json")) {
		answer(cl, "query may be followed by 'json' only");
		return;
	}
	ctl.ops->query(&cl->out, arguments != NULL);
	answer(cl, NULL);
}

static void run_snapshot(struct ctl_client *cl, char *arguments)
{
	const char *error = ctl.ops->snapshot(arguments, &cl->snapshot_of, &cl->behind);

	if (error)
		answer(cl, error);
	else
		cl->state = STATE_SNAPSHOT;
}

/* Tell how the copy is going, unless the client does not read that; and that it has ended. */
static void tell_progress(struct ctl_client *cl)
{
	size_t unread = cl->out.len;
	bool runs;
	const char *error = ctl.ops->copy(&cl->out, &runs);

	cl->due = now_ms() + PROGRESS_MS;
	if (!runs) {
		answer(cl, error);
		ctl.ops->release_copy();
	} else if (unread) {
		cl->out.len = unread;
	}
}

/* False after answering what is wrong. */
static bool begin_copy(struct ctl_client *cl, const char *arguments)
{
	unsigned long blocks = 0;

	if (arguments && !parse_number(arguments, 1, BLOCKS_PER_REQUEST_MAX, &blocks)) {
		answer(cl, "BLOCKS_PER_REQUEST has to be a number from 1 to 8192");
		return false;
	}
	ctl.ops->start_copy((unsigned)blocks);
	return true;
}

static void run_cache_all(struct ctl_client *cl, char *arguments)
{
	if (!begin_copy(cl, arguments))
		return;
	cl->state = STATE_COPYING;
	tell_progress(cl);
}

static void give_up_background(void)
{
	if (ctl.background)
		ctl.ops->release_copy();
	ctl.background = false;
}

/* It may have to start again, even if the end of the last one has not been told yet. */
static void run_cache_all2(struct ctl_client *cl, char *arguments)
{
	if (!begin_copy(cl, arguments))
		return;
	give_up_background();
	ctl.background = true;
	answer(cl, NULL);
}

static void run_stop_copy(struct ctl_client *cl, char *arguments)
{
	(void)arguments;
	give_up_background();
	answer(cl, NULL);
}

static void run_switch(struct ctl_client *cl, char *arguments)
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

static void run_reconnect(struct ctl_client *cl, char *arguments)
{
	const char *host = take_word(&arguments), *port = take_word(&arguments), *error;
	bool local = host && strncmp(host, "unix:", 5) == 0;
	unsigned long number;

	if (!host || !*host || !port || !*port)
		error = "reconnect needs HOST PORT, or unix:PATH -";
	else if (!local && !parse_number(port, 1, UINT16_MAX, &number))
		error = "PORT has to be a number from 1 to 65535";
	else if (ctl.reconnecting)
		error = "a reconnect is under way already";
	else
		error = ctl.ops->reconnect(host, local ? NULL : port, arguments);
	if (error) {
		answer(cl, error);
		return;
	}
	cl->state = STATE_RECONNECTING;
	ctl.reconnecting = true;
}

static void run_help(struct ctl_client *cl, char *arguments);

static const struct command {
	const char *name;
	const char *arguments;		/* "" for none */
	bool proxy;			/* for that only */
	void (*run)(struct ctl_client *, char *arguments);
} commands[] = {
	{ "help", "", false, run_help },
	{ "query", " [json]", false, run_query },
	{ "snapshot", " [EXPORT_NAME]", false, run_snapshot },
	{ "cache-all", " [BLOCKS_PER_REQUEST]", true, run_cache_all },
	{ "cache-all2", " [BLOCKS_PER_REQUEST]", true, run_cache_all2 },
	{ "stop-copy", "", true, run_stop_copy },
	{ "switch", " [force]", true, run_switch },
	{ "reconnect", " HOST PORT [EXPORT_NAME]", true, run_reconnect },
};

static void run_help(struct ctl_client *cl, char *arguments)
{
	(void)arguments;
	for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
		if (ctl.ops->proxy || !commands[i].proxy)
			ctl_say(&cl->out, "command", "%s%s", commands[i].name,
				commands[i].arguments);
	answer(cl, NULL);
}

static void run_line(struct ctl_client *cl, char *line)
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
static ssize_t take_line(struct ctl_client *cl, char *line)
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
static void run_lines(struct ctl_client *cl)
{
	char line[CTL_LINE_MAX + 1];

	while (cl->state == STATE_IDLE && !cl->out.len && !cl->broken) {
		ssize_t len = take_line(cl, line);

		if (len >= 0 && memchr(line, '\0', (size_t)len))
			answer(cl, "the line has a NUL byte");
		else if (len >= 0)
			run_line(cl, line);
		ctl_flush(cl);
		if (len < 0)
			return;
	}
}

static bool wants_input(const struct ctl_client *cl)
{
	return !cl->ended && cl->len < sizeof(cl->input);
}

/* Also while a command is under way: that the client has left is to be noticed. */
static void ctl_receive(struct ctl_client *cl)
{
	ssize_t n;

	if (!wants_input(cl))
		return;
	n = recv(cl->source.fd, cl->input + cl->len, sizeof(cl->input) - cl->len, MSG_DONTWAIT);
	if (n > 0)
		cl->len += (size_t)n;
	else if (n == 0)
		cl->ended = true;
	else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
		cl->broken = true;
}

/* Connections */

static bool is_busy(const struct ctl_client *cl)
{
	return cl->state != STATE_IDLE && cl->state != STATE_CLOSING;
}

static void drop_client(struct ctl_client *cl)
{
	if (cl->state == STATE_COPYING)
		ctl.ops->release_copy();
	loop_remove(&main_loop, &cl->source);
	close(cl->source.fd);
	for (size_t i = 0; i < CONNECTIONS_MAX; i++)
		if (ctl.client[i] == cl)
			ctl.client[i] = NULL;
	free(cl->out.text);
	free(cl);
}

/* A client that has only ended its own sending still gets its answers. */
static bool ctl_has_left(const struct ctl_client *cl, short revents)
{
	if (cl->broken || cl->out.failed || (revents & (POLLERR | POLLNVAL)))
		return true;
	if (is_busy(cl))
		return revents & POLLHUP;
	return now_ms() >= cl->due || (!cl->out.len && (cl->ended || cl->state == STATE_CLOSING));
}

static struct ctl_client *client_of(const struct source *s)
{
	return (struct ctl_client *)((char *)(uintptr_t)s - offsetof(struct ctl_client, source));
}

static short ctl_events(const struct source *s)
{
	const struct ctl_client *cl = client_of(s);

	return (short)(POLLHUP | (wants_input(cl) ? POLLIN : 0) | (cl->out.len ? POLLOUT : 0));
}

static void ctl_turn(struct source *s, short revents)
{
	struct ctl_client *cl = client_of(s);

	if (revents & (POLLIN | POLLHUP))
		ctl_receive(cl);
	if (cl->state == STATE_COPYING && now_ms() >= cl->due)
		tell_progress(cl);
	ctl_flush(cl);
	run_lines(cl);
	if (ctl_has_left(cl, revents))
		drop_client(cl);
	else
		s->due = !is_busy(cl) || cl->state == STATE_COPYING ? cl->due : UINT64_MAX;
}

static const struct source_ops ctl_source_ops = { ctl_events, ctl_turn };

/* A free place, made by closing the client that was idle for longest if need be; or NULL. */
static struct ctl_client **find_place(void)
{
	struct ctl_client **longest = NULL;

	for (struct ctl_client **p = ctl.client; p < ctl.client + CONNECTIONS_MAX; p++) {
		if (!*p)
			return p;
		if (!is_busy(*p) && (!longest || (*p)->idle_since < (*longest)->idle_since))
			longest = p;
	}
	if (longest)
		drop_client(*longest);
	return longest;
}

static void accept_control(int fd, const struct sockaddr *sa, socklen_t len)
{
	static const char full[] = "error: too many connections\n";
	struct ctl_client **place = find_place(), *cl = place ? calloc(1, sizeof(*cl)) : NULL;

	(void)sa, (void)len;
	if (cl) {
		cl->source = (struct source){ .ops = &ctl_source_ops, .fd = fd };
		become_idle(cl);
	}
	if (!cl || !loop_add(&main_loop, &cl->source)) {
		free(cl);
		send(fd, full, sizeof(full) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		close(fd);
		return;
	}
	*place = cl;
}

/* The socket */

bool ctl_open(const char *path, const struct ctl_ops *ops)
{
	if (!listen_unix(path, 0600, accept_control))
		return false;
	ctl.ops = ops;
	return true;
}

void ctl_close(void)
{
	for (size_t i = 0; i < CONNECTIONS_MAX; i++) {
		struct ctl_client *cl = ctl.client[i];

		if (!cl)
			continue;
		if (is_busy(cl))
			ctl_say(&cl->out, "error", "the server ends");
		ctl_flush(cl);
		drop_client(cl);
	}
	memset(&ctl, 0, sizeof(ctl));
}

/* What was waited for.  The answers are sent by the next turn, which comes at once. */

static void answer_all(enum state state, const char *error, uint64_t zeroed)
{
	for (size_t i = 0; i < CONNECTIONS_MAX; i++) {
		struct ctl_client *cl = ctl.client[i];

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

void ctl_snapshot_ended(const struct export *of, const char *path, const char *error)
{
	for (size_t i = 0; i < CONNECTIONS_MAX; i++) {
		struct ctl_client *cl = ctl.client[i];

		if (!cl || cl->state != STATE_SNAPSHOT || cl->snapshot_of != of)
			continue;
		if (cl->behind) {
			cl->behind = false;
			continue;
		}
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
	for (size_t i = 0; i < CONNECTIONS_MAX; i++)
		if (ctl.client[i] && ctl.client[i]->state == STATE_COPYING)
			tell_progress(ctl.client[i]);
}
