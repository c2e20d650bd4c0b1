/*
 * bgctl.c - main() of xnbd-bgctl: ask a server over its control socket.
 *
 * One command line is one line to the server, see xnbd-bgctl(1), CONTROL SOCKET.  The answer is
 * shown as it comes, but that of a query when it is complete.
 */
#define _GNU_SOURCE
#include "ctl.h"
#include "log.h"
#include "options.h"
#include "stats.h"
#include "util.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum {
	SILENCE_SECONDS = 10,		/* then a server will not answer any more */
	ANSWER_LINE_MAX = 16384,	/* bytes; more than a server says */
	STATE_MAX = 64 << 20,		/* bytes of its lines; likewise */
	PLAIN_PROGRESS_MS = 5000,	/* between lines where there is no terminal */
	WIDTH_MAX = 512,
	MIB = 1 << 20,
};

/* The connection */

static struct {
	const char *path;
	char aim[300];			/* "host:port: ", the subject of its errors; or "" */
	bool known;			/* it has answered before, over another connection */
	int fd;
	size_t len, taken;		/* of the input: bytes, and those of the last line */
	char input[ANSWER_LINE_MAX];
} server;

/* Whether the cursor is at the end of the progress bar. */
static bool bar_is_shown;

static void leave_bar(void)
{
	if (bar_is_shown)
		fputc('\n', stderr);
	bar_is_shown = false;
}

/* One line on stderr, and exit status 1. */
#define fail(...) (leave_bar(), log_error(__VA_ARGS__), exit(EXIT_FAILURE))

static _Noreturn void fail_garbage(const char *text, size_t len)
{
	fail("%s is no control socket: '%.*s' is not an answer", server.path,
	     (int)(len < 100 ? len : 100), text);
}

/* How long to wait for the server; 0: for as long as it takes. */
static void limit_silence(unsigned seconds)
{
	struct timeval limit = { .tv_sec = seconds };

	setsockopt(server.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(server.fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
}

static void connect_server(void)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };

	if (strlen(server.path) >= sizeof(sun.sun_path))
		fail("cannot connect to %s: the path has %zu bytes, %zu is the most", server.path,
		     strlen(server.path), sizeof(sun.sun_path) - 1);
	strcpy(sun.sun_path, server.path);
	server.len = server.taken = 0;
	server.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (server.fd >= 0)
		limit_silence(SILENCE_SECONDS);
	if (server.fd >= 0 && connect(server.fd, (struct sockaddr *)&sun, sizeof(sun)) == 0)
		return;
	if (server.known && (errno == ECONNREFUSED || errno == ENOENT))
		fail("%s: the server has ended", server.path);
	fail("cannot connect to %s: %s", server.path,
	     errno == ECONNREFUSED ? "no server listens there" :
	     errno == EAGAIN       ? "the server does not answer" :
				     strerror(errno));
}

/* Send a line.  That it cannot be sent has a reason which the server tells, or is its end. */
static void send_line(const char *line)
{
	send(server.fd, line, strlen(line), MSG_NOSIGNAL);
}

/* What may begin a line of an answer: other servers may neither end their line nor close. */
static const char name_characters[] = "abcdefghijklmnopqrstuvwxyz0123456789-";

/* More of a line. */
static void receive_more(void)
{
	ssize_t n = recv(server.fd, server.input + server.len, sizeof(server.input) - server.len, 0);

	if (n > 0)
		server.len += (size_t)n;
	else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
		fail("%s: the server did not answer in %d s", server.path, SILENCE_SECONDS);
	else if (n == 0 || errno == ECONNRESET)
		fail("%s: the server closed the connection", server.path);
	else if (errno != EINTR)
		fail("%s: %s", server.path, strerror(errno));
	if (server.len > 0 && !memchr(name_characters, *server.input, sizeof(name_characters) - 1))
		fail_garbage(server.input, server.len);
}

/* The next line, which is good until the next call. */
static char *next_line(void)
{
	char *end;

	server.len -= server.taken;
	memmove(server.input, server.input + server.taken, server.len);
	while (!(end = memchr(server.input, '\n', server.len))) {
		if (server.len == sizeof(server.input))
			fail("%s: the server sends lines that are too long", server.path);
		receive_more();
	}
	server.taken = (size_t)(end + 1 - server.input);
	*end = '\0';
	mask_control_characters(server.input, (size_t)(end - server.input));
	return server.input;
}

/* The next line of an answer: its name, and *value; NULL for "ok".  "error" ends the program. */
static const char *next_value(const char **value)
{
	char *line = next_line();
	size_t len = strspn(line, name_characters);

	if (strcmp(line, "ok") == 0)
		return NULL;
	if (len == 0 || strncmp(line + len, ": ", 2) != 0)
		fail_garbage(line, strlen(line));
	line[len] = '\0';
	*value = line + len + 2;
	if (strcmp(line, "error") == 0)
		fail("%s%s", server.aim, *value);
	return line;
}

/* The number at *at, in front of that character; *at goes behind it. */
static uint64_t take_number(const char **at, char behind)
{
	char *end;
	uint64_t n = strtoull(*at, &end, 10);

	if (**at < '0' || **at > '9' || *end != behind)
		fail_garbage(*at, strlen(*at));
	*at = end + 1;
	return n;
}

/* In characters, within reason. */
static struct winsize terminal_size(int fd)
{
	struct winsize w = { 0 };

	ioctl(fd, TIOCGWINSZ, &w);
	w.ws_col = w.ws_col == 0 ? 80 : w.ws_col < WIDTH_MAX ? w.ws_col : WIDTH_MAX;
	w.ws_row = w.ws_row == 0 ? 24 : w.ws_row > 2 ? w.ws_row : 2;
	return w;
}

/* --query */

/* The whole state, in lines behind a line feed, over a connection of its own.  To be freed. */
static char *ask_state(bool json)
{
	const char *name, *value;
	char *state;
	size_t len;
	FILE *f = not_null(open_memstream(&state, &len));

	connect_server();
	send_line(json ? "query json\n" : "query\n");
	fputc('\n', f);
	while ((name = next_value(&value)))
		if (fprintf(f, "%s%s%s\n", json ? "" : name, json ? "" : ": ", value) < 0 ||
		    ftell(f) > STATE_MAX)
			fail("%s: the server's answer is too long", server.path);
	not_null(fclose(f) == 0 ? state : NULL);
	close(server.fd);
	server.known = true;
	return state;
}

static void show_query(bool json)
{
	char *state = ask_state(json);

	fputs(state + 1, stdout);
	flush_output();
	free(state);
}

/* --cache-all */

/*
 * In words, such as "42.7%  103.4 MiB/s  0:01:23 left", the blocks that are here, all blocks, and the
 * bytes per second.  The reason why the origin is down is "" if it is not.  Returns the permille,
 * rounded down: only all is 1000.
 */
static unsigned describe_progress(const char *value, const char *reason, char *text, size_t size)
{
	uint64_t cached = take_number(&value, ' '), blocks = take_number(&value, ' ');
	uint64_t rate = take_number(&value, '\0'), left = cached < blocks ? blocks - cached : 0;
	uint64_t seconds = left / (rate / BLOCK_SIZE + 1);
	unsigned permille = left ? (unsigned)(cached * 1000 / blocks) : 1000;
	char time[32] = "-:--:--";

	if (rate || !left)
		snprintf(time, sizeof(time), "%" PRIu64 ":%02u:%02u", seconds / 3600,
			 (unsigned)(seconds / 60 % 60), (unsigned)(seconds % 60));
	if (*reason)
		snprintf(text, size, "%.1f%%  the origin is down: %s", permille / 10.0, reason);
	else
		snprintf(text, size, "%.1f%%  %.1f MiB/s  %s left", permille / 10.0,
			 (double)rate / MIB, time);
	return permille;
}

/* All columns but the last, which some terminals leave at once; without room for a bar, text. */
static void draw_bar(unsigned permille, const char *text)
{
	enum { BAR_MIN = 6 };
	int room = terminal_size(STDERR_FILENO).ws_col - 1;
	int bar = room - (int)strlen("[]  ") - (int)strlen(text);
	char full[WIDTH_MAX];

	memset(full, '=', sizeof(full));
	if (bar >= BAR_MIN)
		fprintf(stderr, "\r[%-*.*s]  %s", bar, bar * (int)permille / 1000, full, text);
	else
		fprintf(stderr, "\r%-*.*s", room, room, text);
	bar_is_shown = true;
}

static void show_progress(const char *value, const char *reason)
{
	static uint64_t next;		/* now_ms(), for another line; UINT64_MAX: all is told */
	char text[512];
	unsigned permille = describe_progress(value, reason, text, sizeof(text));
	bool complete = permille == 1000;

	if (isatty(STDERR_FILENO)) {
		draw_bar(permille, text);
	} else if (complete ? next < UINT64_MAX : now_ms() >= next) {
		log_line("%s", text);
		next = complete ? UINT64_MAX : now_ms() + PLAIN_PROGRESS_MS;
	}
}

static void show_failure(const char *value)
{
	uint64_t off = take_number(&value, ' '), len = take_number(&value, '\0');

	leave_bar();
	log_error("the origin cannot deliver %" PRIu64 " bytes at offset %" PRIu64, len, off);
}

/* Until the command has been carried out. */
static void follow(bool show)
{
	char reason[256] = "";		/* why the origin is down, as the progress behind it tells */
	const char *name, *value;

	while ((name = next_value(&value))) {
		if (strcmp(name, "progress") == 0) {
			if (show)
				show_progress(value, reason);
			*reason = '\0';
		} else if (strcmp(name, "origin-reason") == 0) {
			snprintf(reason, sizeof(reason), "%s", value);
		} else if (strcmp(name, "failed") == 0) {
			show_failure(value);
		} else if (strcmp(name, "failed-more") == 0) {
			log_error("and more, in %s further places", value);
		} else if (strcmp(name, "zeroed") == 0) {
			log_line("%s blocks were missing, and read as zeros now", value);
		} else if (strcmp(name, "snapshot") == 0) {
			puts(value);
		}
	}
	leave_bar();
	flush_output();
}

/*
 * --watch: the query again and again, with rates.  A terminal shows the rates of all clients, those
 * of each busy client, and the state.  Elsewhere a line shows the rates of all clients.
 */

/* What follows a mark; "" if it is not there. */
static const char *behind(const char *text, const char *mark)
{
	const char *at = strstr(text, mark);

	return at ? at + strlen(mark) : "";
}

/* A number of all clients is "reads: 1", one of a client "reads 1". */
static double number_of(const char *text, const char *name)
{
	const char *value = behind(text, name);

	return strtod(value + strspn(value, ": "), NULL);
}

/* What a number has grown by; one that is smaller than before belongs to another server. */
static double since(const char *now, const char *before, const char *name)
{
	double n = number_of(now, name), old = number_of(before, name);

	return n >= old ? n - old : n;
}

/* Of numbers that begin behind "reads". */
static void print_rates(const char *now, const char *before, double seconds)
{
	double requests = since(now, before, "") + since(now, before, "writes") +
			  since(now, before, "flushes") + since(now, before, "others");

	printf("%.0f requests/s, %.1f MiB/s read, %.1f MiB/s written, ", requests / seconds,
	       since(now, before, "read-bytes") / MIB / seconds,
	       since(now, before, "written-bytes") / MIB / seconds);
}

/* Add delays such as "7:17 15:3" so many times: UINT64_MAX, which is -1, takes them away. */
static void add_delays(const char *state, uint64_t times, struct tally *sum)
{
	const char *at = behind(state, "\ndelays-us: ");
	char *end;

	for (uint64_t us; us = strtoull(at, &end, 10), *end == ':'; at = end)
		sum->delay[delay_index(us)] += times * strtoull(end + 1, &end, 10);
}

static void print_total(const char *now, const char *before, double seconds)
{
	const char *why = behind(now, "\norigin-reason: "), *link = behind(now, "\norigin-link: ");
	struct tally delays = { .longest = UINT64_MAX };

	add_delays(now, 1, &delays);
	add_delays(before, UINT64_MAX, &delays);
	if (*why)
		printf("origin down: %.*s; ", (int)strcspn(why, "\n"), why);
	print_rates(behind(now, "\nreads"), behind(before, "\nreads"), seconds);
	printf("p99 %" PRIu64 " us, %.0f clients, %.0f errors", tally_percentile(&delays, 99),
	       number_of(now, "\nclients"), number_of(now, "\nerrors"));
	if (*link)
		printf(", %.1f %% cached, origin %.*s", number_of(now, "\ncached-percent"),
		       (int)strcspn(link, "\n"), link);
}

/* A screen is drawn over the one before; the terminal cuts what is too long. */
static void print_looks(const char *now, const char *before, double seconds)
{
	bool terminal = isatty(STDOUT_FILENO);
	unsigned rows = terminal ? terminal_size(STDOUT_FILENO).ws_row - 2 : 0;
	const char *line = now, *at, *old;
	char client[ADDRESS_MAX + 32];

	fputs(terminal ? "\033[H\033[?7l" : "", stdout);
	print_total(now, before, seconds);
	puts(terminal ? "\033[K" : "");
	while (rows > 0 && *(line = behind(line, "\nclient: ")) && *(at = behind(line, " reads"))) {
		snprintf(client, sizeof(client), "\nclient: %.*s", (int)(at - line), line);
		old = behind(before, client);
		before = *old ? old : before;	/* they keep their order */
		if (strncmp(at, old, strcspn(at, "\n")) == 0)
			continue;		/* it did nothing */
		print_rates(at, old, seconds);
		printf("%.*s\033[K\n", (int)(at - strlen(" reads") - line), line);
		rows--;
	}
	for (line = now + 1; rows > 0 && *line && strncmp(line, "client: ", 8) != 0; rows--) {
		printf("%.*s\033[K\n", (int)strcspn(line, "\n"), line);
		line = behind(line, "\n");
	}
	fputs(terminal ? "\033[J\033[?7h" : "", stdout);
	flush_output();
}

static void end_watch(int sig)
{
	(void)sig;
	_exit(EXIT_SUCCESS);
}

static _Noreturn void watch(unsigned seconds)
{
	char *now, *before;
	uint64_t last, ms;

	signal(SIGINT, end_watch);	/* Ctrl-C */
	before = ask_state(false);
	last = now_ms();
	for (unsigned wait = 1;; wait = seconds) {
		sleep(wait);
		now = ask_state(false);
		ms = now_ms() - last;
		last += ms;
		print_looks(now, before, (double)ms / 1000);
		free(before);
		before = now;
	}
}

/* The other commands */

/* The line to the server, in memory that the caller frees. */
static char *command_line(const struct bgctl_options *o)
{
	char *line;
	size_t len;
	FILE *f = not_null(open_memstream(&line, &len));

	fputs(o->command, f);
	if (o->blocks)
		fprintf(f, " %lu", o->blocks);
	if (o->force)
		fputs(" force", f);
	if (o->host)
		fprintf(f, o->port ? " %s %s" : " unix:%s -", o->host, o->port);
	if (o->export_name)
		fprintf(f, " %s", o->export_name);
	fputc('\n', f);
	fclose(f);
	if (len <= CTL_LINE_MAX + 1)
		return line;
	log_error("HOST, PORT and NAME are too long");
	exit(EXIT_USAGE);
}

/* A command may take its time, but a server that will not carry it out is not waited for. */
static void run_command(const struct bgctl_options *o)
{
	char *line = command_line(o);
	const char *value;

	connect_server();
	send_line("help\n");
	while (next_value(&value))
		;
	limit_silence(0);
	if (o->host)
		snprintf(server.aim, sizeof(server.aim), o->port ? "%s:%s: " : "unix:%s: ", o->host,
			 o->port);
	send_line(line);
	free(line);
	follow(o->progress);
}

int main(int argc, char **argv)
{
	static struct bgctl_options o;	/* what it refers to lasts as long as the program */

	log_name("xnbd-bgctl");
	occupy_standard_descriptors();
	options_parse_bgctl(&o, argc, argv);
	server.path = o.socket;
	if (strcmp(o.command, "query") == 0)
		show_query(o.json);
	else if (strcmp(o.command, "watch") == 0)
		watch((unsigned)o.seconds);
	else
		run_command(&o);
	return EXIT_SUCCESS;
}
