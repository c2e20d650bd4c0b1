/*
 * ctl.c - the control socket: see ctl.h.
 *
 * Each connection has its own input, output, command under way and deadline, so that none of
 * them waits for another.  A command is carried out when the answers to those before it have been
 * sent: what is to be sent is never more than one answer.
 */
#define _GNU_SOURCE
#include "ctl.h"

#include "cache.h"
#include "control.h"
#include "exports.h"
#include "listen.h"
#include "log.h"
#include "loop.h"
#include "util.h"

#include <errno.h>
#include <inttypes.h>
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
	LINE_END = 2,			/* "\r\n" */
};

/*
 * A command under way waits for the end of something, which an address stands for: of a proxy's
 * cache those of the copy, of the origin, and of whether it has switched; or an export's, for a
 * snapshot.
 */
struct ctl_client {
	struct source source;		/* the first: ctl_turn() relies on it */
	bool connected;			/* else the place is free */
	bool ended;			/* no more input comes, or is taken */
	const void *awaits;		/* NULL: no command is under way */
	bool behind;			/* it awaits the end after the next one */
	uint64_t due;			/* now_ms(): for progress; without a command, to be closed */
	uint64_t idle_since;		/* a count of those that became idle; 0 in a free place */
	struct answer out;		/* failed also if the connection is broken */
	size_t len;			/* of the input that was not carried out yet */
	char input[CTL_LINE_MAX + LINE_END];
};

static struct {
	uint64_t idle_count;
	bool reconnecting;		/* even if the client that asked for it has left */
	bool background;		/* a copy is wanted that no client waits for */
	struct ctl_client client[CONNECTIONS_MAX];
} ctl;

static struct ctl_client *const places_end = ctl.client + CONNECTIONS_MAX;

/* Answers */

/* The command has been carried out: NULL, or why it was not. */
static void answer(struct ctl_client *cl, const char *error)
{
	if (error)
		control_say(&cl->out, "error", "%s", error);
	else
		control_put(&cl->out, "ok\n");
	cl->awaits = NULL;
	cl->due = now_ms() + IDLE_MS;
	cl->idle_since = ++ctl.idle_count;
	cl->source.due = 0;
}

static void ctl_flush(struct ctl_client *cl)
{
	struct answer *a = &cl->out;
	ssize_t n;

	if (!a->len || a->failed)
		return;
	n = send(cl->source.fd, a->text, a->len, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (n < 0) {
		a->failed = errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR;
		return;
	}
	a->len -= (size_t)n;
	memmove(a->text, a->text + n, a->len);
}

/*
 * Commands.  Each gets what follows its name, NULL if that is nothing.  It returns why it is not
 * carried out; or NULL, and if it is under way the client awaits something.
 */

static const char *run_query(struct ctl_client *cl, char *arguments)
{
	if (arguments && strcmp(arguments, "json"))
		return "query may be followed by 'json' only";
	control_query(&cl->out, arguments != NULL);
	return NULL;
}

static const char *run_snapshot(struct ctl_client *cl, char *arguments)
{
	const struct export *of = NULL;
	const char *error = exports_snapshot_of(arguments, &of, &cl->behind);

	cl->awaits = of;
	return error;
}

/* Tell how the copy is going, unless the client does not read that; and that it has ended. */
static void tell_progress(struct ctl_client *cl)
{
	size_t unread = cl->out.len;
	bool runs;
	const char *error = control_say_progress(&cl->out, &runs);

	cl->due = now_ms() + PROGRESS_MS;
	if (!runs) {
		answer(cl, error);
		copy_release(&exports.cache->copy, false);
	} else if (unread) {
		cl->out.len = unread;
	}
}

static const char *run_cache_all(struct ctl_client *cl, char *arguments)
{
	unsigned long blocks = 0;

	if (arguments && !parse_number(arguments, 1, BLOCKS_PER_REQUEST_MAX, &blocks))
		return "BLOCKS_PER_REQUEST has to be a number from 1 to 8192";
	copy_start(&exports.cache->copy, (uint64_t)blocks * BLOCK_SIZE);
	cl->awaits = &exports.cache->copy;
	cl->due = 0;
	return NULL;
}

static void give_up_background(void)
{
	if (ctl.background)
		copy_release(&exports.cache->copy, false);
	ctl.background = false;
}

/* It may have to start again, even if the end of the last one has not been told yet. */
static const char *run_cache_all2(struct ctl_client *cl, char *arguments)
{
	const char *error = run_cache_all(cl, arguments);

	if (error)
		return error;
	give_up_background();
	ctl.background = true;
	cl->awaits = NULL;
	return NULL;
}

static const char *run_stop_copy(struct ctl_client *cl, char *arguments)
{
	(void)cl, (void)arguments;
	give_up_background();
	return NULL;
}

static const char *run_switch(struct ctl_client *cl, char *arguments)
{
	const char *error = "switch may be followed by 'force' only";

	if (!arguments || strcmp(arguments, "force") == 0)
		error = cache_switch(exports.cache, arguments != NULL);
	if (!error)
		cl->awaits = &exports.cache->switched;	/* one end for all who ask meanwhile */
	return error;
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

static const char *run_reconnect(struct ctl_client *cl, char *arguments)
{
	const char *host = take_word(&arguments), *port = take_word(&arguments);
	bool local = host && strncmp(host, "unix:", 5) == 0;
	const char *error;
	unsigned long number;

	if (!host || !*host || !port || !*port)
		return "reconnect needs HOST PORT, or unix:PATH -";
	if (!local && !parse_number(port, 1, UINT16_MAX, &number))
		return "PORT has to be a number from 1 to 65535";
	if (ctl.reconnecting)
		return "a reconnect is under way already";
	if (exports.cache->switched)
		return "this is a target, it has no origin";
	error = origin_redirect(exports.cache->origin, host, local ? NULL : port, arguments);
	if (error)
		return error;
	cl->awaits = &exports.cache->origin;
	ctl.reconnecting = true;
	return NULL;
}

static const char *run_help(struct ctl_client *cl, char *arguments);

static const struct command {
	const char *name;
	const char *arguments;		/* "" for none */
	bool proxy;			/* for that only */
	const char *(*run)(struct ctl_client *, char *arguments);
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

static const char *run_help(struct ctl_client *cl, char *arguments)
{
	(void)arguments;
	for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
		if (exports.cache || !commands[i].proxy)
			control_say(&cl->out, "command", "%s%s", commands[i].name,
				    commands[i].arguments);
	return NULL;
}

/* As the commands, of which the input begins with one of that length. */
static const char *run_line(struct ctl_client *cl, size_t len)
{
	char *arguments = cl->input, *name;
	const struct command *command = NULL;

	if (len > CTL_LINE_MAX) {
		cl->ended = true;
		return "the line is too long";
	}
	arguments[len] = '\0';
	if (strlen(arguments) < len)
		return "the line has a NUL byte";
	name = take_word(&arguments);
	for (size_t i = 0; i < ARRAY_SIZE(commands) && !command; i++)
		if (strcmp(commands[i].name, name) == 0)
			command = &commands[i];
	if (!command)
		return "unknown command, try help";
	if (arguments && !*command->arguments)
		return "that command is a single word";
	if (command->proxy && !exports.cache)
		return "that command is for a proxy, and this server is none";
	return command->run(cl, arguments);
}

/* Lines */

/* Carry out what is there, as long as the client takes the answers. */
static void run_lines(struct ctl_client *cl)
{
	while (!cl->awaits && !cl->out.len && !cl->out.failed) {
		char *end = memchr(cl->input, '\n', cl->len);
		size_t len = end ? (size_t)(end - cl->input) : cl->len, used = end ? len + 1 : len;
		const char *error;

		if (!end && len < sizeof(cl->input))
			return;
		if (end && len > 0 && end[-1] == '\r')
			len--;
		cl->due = UINT64_MAX;
		error = run_line(cl, len);
		if (!cl->awaits)
			answer(cl, error);
		cl->len -= used;
		memmove(cl->input, cl->input + used, cl->len);
		ctl_flush(cl);
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
		cl->out.failed = true;
}

/* Connections */

static bool awaits_copy(const struct ctl_client *cl)
{
	return exports.cache && cl->awaits == &exports.cache->copy;
}

static void drop_client(struct ctl_client *cl)
{
	if (awaits_copy(cl))
		copy_release(&exports.cache->copy, false);
	loop_remove(&main_loop, &cl->source);
	close(cl->source.fd);
	free(cl->out.text);
	memset(cl, 0, sizeof(*cl));
}

/* A client that has only ended its own sending still gets its answers. */
static bool ctl_has_left(const struct ctl_client *cl, short revents)
{
	if (cl->out.failed || (revents & (POLLERR | POLLNVAL)))
		return true;
	if (cl->awaits)
		return revents & POLLHUP;
	return now_ms() >= cl->due || (!cl->out.len && cl->ended);
}

static short ctl_events(const struct source *s)
{
	const struct ctl_client *cl = (const struct ctl_client *)s;

	return (short)(POLLHUP | (wants_input(cl) ? POLLIN : 0) | (cl->out.len ? POLLOUT : 0));
}

static void ctl_turn(struct source *s, short revents)
{
	struct ctl_client *cl = (struct ctl_client *)s;

	if (revents & (POLLIN | POLLHUP))
		ctl_receive(cl);
	if (cl->awaits && now_ms() >= cl->due)
		tell_progress(cl);
	ctl_flush(cl);
	run_lines(cl);
	if (ctl_has_left(cl, revents))
		drop_client(cl);
	else
		s->due = cl->due;
}

static const struct source_ops ctl_source_ops = { ctl_events, ctl_turn };

/* A free place, made by closing the client that was idle for longest if need be; or NULL. */
static struct ctl_client *find_place(void)
{
	struct ctl_client *place = NULL;

	for (struct ctl_client *cl = ctl.client; cl < places_end; cl++)
		if (!cl->awaits && (!place || cl->idle_since < place->idle_since))
			place = cl;
	if (place && place->connected)
		drop_client(place);
	return place;
}

static void accept_control(int fd, const struct sockaddr *sa, socklen_t len)
{
	static const char full[] = "error: too many connections\n";
	struct ctl_client *cl = find_place();

	(void)sa, (void)len;
	if (cl) {
		cl->source = (struct source){ .ops = &ctl_source_ops, .fd = fd };
		cl->due = now_ms() + IDLE_MS;
	}
	if (!cl || !loop_add(&main_loop, &cl->source)) {
		send(fd, full, sizeof(full) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		close(fd);
		return;
	}
	cl->connected = true;
	cl->idle_since = ++ctl.idle_count;
}

/* What was waited for.  The answers are sent by the next turn, which comes at once. */

/* With an error, or NULL; of success the line "name: value" tells, unless the value is NULL. */
static void end_wait(const void *awaited, const char *error, const char *name, const char *value)
{
	for (struct ctl_client *cl = ctl.client; cl < places_end; cl++) {
		if (cl->awaits != awaited)
			continue;
		if (cl->behind) {
			cl->behind = false;
			continue;
		}
		if (!error && value)
			control_say(&cl->out, name, "%s", value);
		answer(cl, error);
	}
}

static void snapshot_ended(const struct export *of, const char *path, const char *error)
{
	control_note_snapshot(path, error);
	end_wait(of, path ? NULL : error, "snapshot", path);
}

/* If it has. */
static void copy_ended(void)
{
	struct copy_status s;

	copy_status(&exports.cache->copy, &s);
	if (s.state == COPY_RUNNING)
		return;
	give_up_background();
	for (struct ctl_client *cl = ctl.client; cl < places_end; cl++)
		if (awaits_copy(cl))
			tell_progress(cl);
}

void ctl_tend(void)
{
	const char *error;
	char zeroed[24];

	exports_tend(snapshot_ended);
	if (!exports.cache)
		return;
	if (ctl.reconnecting && origin_redirected(exports.cache->origin, &error)) {
		ctl.reconnecting = false;
		end_wait(&exports.cache->origin, error, NULL, NULL);
	}
	copy_ended();
	if (!cache_switch_ended(exports.cache, &error))
		return;
	snprintf(zeroed, sizeof(zeroed), "%" PRIu64, exports.cache->zeroed);
	end_wait(&exports.cache->switched, error, "zeroed", exports.cache->zeroed ? zeroed : NULL);
}

void ctl_switch(void)
{
	const char *error = exports.cache ? cache_switch(exports.cache, false) : "it is no proxy";

	if (error)
		log_error("cannot switch to target mode: %s", error);
}

/* The socket */

bool ctl_open(const struct options *o)
{
	if (!o->control)
		return true;
	control_init(o->bitmap);
	return listen_unix(o->control, 0600, accept_control);
}

void ctl_close(void)
{
	for (struct ctl_client *cl = ctl.client; cl < places_end; cl++) {
		if (!cl->connected)
			continue;
		if (cl->awaits)
			control_say(&cl->out, "error", "the server ends");
		ctl_flush(cl);
		drop_client(cl);
	}
}
