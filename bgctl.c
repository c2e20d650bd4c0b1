/*
 * bgctl.c - main() of xnbd-bgctl: ask a server over its control socket.
 *
 * One command line is one line to the server, see xnbd-bgctl(1), CONTROL SOCKET.  The answer is
 * shown as it comes.  That of a query is a list of fields, and is shown when it is complete.
 */
#define _GNU_SOURCE
#include "ctl.h"
#include "log.h"
#include "options.h"
#include "proto.h"
#include "util.h"
#include "xnbd.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
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
	FIELDS_MAX = 8192,		/* of a query; likewise: one for each client */
	PLAIN_PROGRESS_MS = 5000,	/* between lines where there is no terminal */
	WIDTH_MAX = 512,
};

/* The connection */

struct server {
	const char *path;
	char aim[300];			/* "host:port: ", the subject of its errors; or "" */
	bool known;			/* it has answered before, over another connection */
	int fd;
	size_t at, len;			/* of text: where the next line begins, its end */
	char text[ANSWER_LINE_MAX];
};

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

static _Noreturn void fail_garbage(const struct server *s, const char *text)
{
	fail("%s is no control socket: '%.100s' is not an answer", s->path, text);
}

/* How long to wait for the server; 0: for as long as it takes. */
static void limit_silence(int fd, unsigned seconds)
{
	struct timeval limit = { .tv_sec = seconds };

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
}

static void connect_to(struct server *s)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };

	if (strlen(s->path) >= sizeof(sun.sun_path))
		fail("cannot connect to %s: the path has %zu bytes, %zu is the most", s->path,
		     strlen(s->path), sizeof(sun.sun_path) - 1);
	strcpy(sun.sun_path, s->path);
	s->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	s->at = s->len = 0;
	if (s->fd >= 0)
		limit_silence(s->fd, SILENCE_SECONDS);
	if (s->fd >= 0 && connect(s->fd, (struct sockaddr *)&sun, sizeof(sun)) == 0)
		return;
	if (s->known && (errno == ECONNREFUSED || errno == ENOENT))
		fail("%s: the server has ended", s->path);
	fail("cannot connect to %s: %s", s->path,
	     errno == ECONNREFUSED ? "no server listens there" :
	     errno == EAGAIN       ? "the server does not answer" :
				     strerror(errno));
}

/* Send a line.  That it cannot be sent has a reason which the server tells, or is its end. */
static void ask(const struct server *s, const char *line)
{
	send(s->fd, line, strlen(line), MSG_NOSIGNAL);
}

/* What may begin a line of an answer: other servers may neither end their line nor close. */
static const char name_characters[] = "abcdefghijklmnopqrstuvwxyz0123456789-";

static void receive(struct server *s)
{
	ssize_t n;

	s->len -= s->at;
	memmove(s->text, s->text + s->at, s->len);
	s->at = 0;
	if (s->len == sizeof(s->text) - 1)
		fail("%s: the server sends lines that are too long", s->path);
	do
		n = recv(s->fd, s->text + s->len, sizeof(s->text) - 1 - s->len, 0);
	while (n < 0 && errno == EINTR);
	if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
		fail("%s: the server did not answer in %d s", s->path, SILENCE_SECONDS);
	if (n < 0 && errno != ECONNRESET)
		fail("%s: %s", s->path, strerror(errno));
	if (n <= 0)
		fail("%s: the server closed the connection", s->path);
	s->len += (size_t)n;
	s->text[s->len] = '\0';
	if (!memchr(name_characters, *s->text, sizeof(name_characters) - 1))
		fail_garbage(s, s->text);
}

/* The next line, which is good until the next call. */
static char *next_line(struct server *s)
{
	char *line, *end;

	while (!(end = memchr(s->text + s->at, '\n', s->len - s->at)))
		receive(s);
	line = s->text + s->at;
	*end = '\0';
	s->at = (size_t)(end + 1 - s->text);
	mask_control_characters(line, (size_t)(end - line));
	return line;
}

/* The next line of an answer: its name, and *value; NULL for "ok".  "error" ends the program. */
static const char *next_value(struct server *s, const char **value)
{
	char *line = next_line(s), *colon = strstr(line, ": ");
	size_t len;

	if (strcmp(line, "ok") == 0)
		return NULL;
	len = strspn(line, name_characters);
	if (!colon || colon != line + len || len == 0)
		fail_garbage(s, line);
	*colon = '\0';
	*value = colon + 2;
	if (strcmp(line, "error") == 0)
		fail("%s%s", s->aim, *value);
	return line;
}

/* Exactly count numbers, with single blanks between them. */
static void parse_numbers(const struct server *s, const char *value, uint64_t *n, size_t count)
{
	const char *at = value;
	char *end;

	for (size_t i = 0; i < count; i++) {
		if (*at < '0' || *at > '9')
			fail_garbage(s, value);
		n[i] = strtoull(at, &end, 10);
		if (*end != (i + 1 < count ? ' ' : '\0'))
			fail_garbage(s, value);
		at = end + 1;
	}
}

/* A state: the fields that a query is answered with. */

struct fields {
	struct field *all;
	size_t count;
};

struct field {
	char *name, *value;
	char *key;			/* of an item of an array: its address or name; else NULL */
	struct fields pairs;		/* likewise: what its value tells behind that */
};

/* Lines that there may be several of: an array in JSON. */
static const struct array {
	const char *name;
	const char *key;
	const char *first;		/* The pairs begin with the last one of this name. */
	const char *with;		/* The array is there, maybe empty, with this field. */
} arrays[] = {
	{ "client", "address", " reads ", "clients" },
	{ "export", "name", " size ", "export" },
};

static struct field *add_field(struct fields *f)
{
	if ((f->count & (f->count - 1)) == 0)
		f->all = not_null(realloc(f->all, (f->count ? 2 * f->count : 1) * sizeof(*f->all)));
	f->all[f->count] = (struct field){ 0 };
	return &f->all[f->count++];
}

/* An address may have blanks, and a path as well. */
static void parse_item(struct field *item, const struct array *a)
{
	char *pairs = NULL, *name, *value;

	item->key = not_null(strdup(item->value));
	for (char *at = item->key; (at = strstr(at, a->first)); at++)
		pairs = at;
	if (!pairs)
		return;
	*pairs = '\0';
	name = strtok(pairs + 1, " ");
	while (name && (value = strtok(NULL, " "))) {
		*add_field(&item->pairs) = (struct field){ .name = name, .value = value };
		name = strtok(NULL, " ");
	}
}

static void free_fields(struct fields *f)
{
	for (size_t i = 0; i < f->count; i++) {
		free(f->all[i].name);
		free(f->all[i].value);
		free(f->all[i].key);
		free(f->all[i].pairs.all);
	}
	free(f->all);
}

static void take_field(struct fields *f, const char *name, const char *value)
{
	struct field *field = add_field(f);

	field->name = not_null(strdup(name));
	field->value = not_null(strdup(value));
	for (size_t i = 0; i < ARRAY_SIZE(arrays); i++)
		if (strcmp(name, arrays[i].name) == 0)
			parse_item(field, &arrays[i]);
}

/* Over a connection of its own; the fields are to be freed. */
static struct fields ask_state(struct server *s)
{
	struct fields f = { 0 };
	const char *name, *value;

	connect_to(s);
	ask(s, "query\n");
	while ((name = next_value(s, &value))) {
		if (f.count == FIELDS_MAX)
			fail("%s: the server's answer is too long", s->path);
		take_field(&f, name, value);
	}
	close(s->fd);
	s->known = true;
	return f;
}

/* The value of a field; NULL if there is none. */
static const char *find(const struct fields *f, const char *name)
{
	for (size_t i = 0; i < f->count; i++)
		if (strcmp(f->all[i].name, name) == 0)
			return f->all[i].value;
	return NULL;
}

static bool is_client(const struct field *f)
{
	return strcmp(f->name, "client") == 0;
}

static uint64_t number_of(const struct fields *f, const char *name)
{
	const char *value = find(f, name);

	return value ? strtoull(value, NULL, 10) : 0;
}

/* The next of delays such as "7:17 15:3": n requests took up to us.  False if there is none. */
static bool next_delay(const char **at, uint64_t *us, uint64_t *n)
{
	char *end;

	*us = strtoull(*at, &end, 10);
	if (*end != ':')
		return false;
	*n = strtoull(end + 1, &end, 10);
	*at = end;
	return true;
}

/* --query */

/* Values that are text whatever they look like. */
static bool is_text(const char *name)
{
	static const char *const texts[] = { "image", "bitmap", "origin-export", "origin-reason",
					     "copy-error", "snapshot-last", "snapshot-error",
					     "address", "name" };

	for (size_t i = 0; i < ARRAY_SIZE(texts); i++)
		if (strcmp(name, texts[i]) == 0)
			return true;
	return false;
}

/* 0, 17 or 99.5, but not 017, which JSON does not have. */
static bool is_number(const char *s)
{
	static const char digits[] = "0123456789";
	size_t len = strspn(s, digits), more;

	if (len == 0 || (len > 1 && s[0] == '0'))
		return false;
	if (s[len] != '.')
		return s[len] == '\0';
	more = strspn(s + len + 1, digits);
	return more > 0 && s[len + 1 + more] == '\0';
}

/* Paths are bytes, JSON is characters. */
static void print_json_string(const char *s)
{
	size_t len;

	putchar('"');
	for (; *s; s += len ? len : 1) {
		len = utf8_length((const uint8_t *)s, strlen(s));
		if (*s == '"' || *s == '\\')
			putchar('\\');
		if (len)
			fwrite(s, 1, len, stdout);
		else
			fputs("\\ufffd", stdout);
	}
	putchar('"');
}

/* Pairs of numbers. */
static void print_json_delays(const char *value)
{
	const char *before = "";
	uint64_t us, n;

	putchar('[');
	while (next_delay(&value, &us, &n)) {
		printf("%s[%" PRIu64 ", %" PRIu64 "]", before, us, n);
		before = ", ";
	}
	putchar(']');
}

static void print_json_pair(const char *before, const char *name, const char *value)
{
	fputs(before, stdout);
	print_json_string(name);
	fputs(": ", stdout);
	if (strcmp(name, "delays-us") == 0)
		print_json_delays(value);
	else if (is_text(name))
		print_json_string(value);
	else if (is_number(value))
		fputs(value, stdout);
	else if (strcmp(value, "yes") == 0 || strcmp(value, "no") == 0)
		fputs(*value == 'y' ? "true" : "false", stdout);
	else
		print_json_string(value);
}

static void print_json_array(const struct fields *f, const struct array *a)
{
	const char *before = "\n    { ";

	printf("\"%s\": [", a->name);
	for (size_t i = 0; i < f->count; i++) {
		const struct field *item = &f->all[i];

		if (strcmp(item->name, a->name) != 0)
			continue;
		print_json_pair(before, a->key, item->key);
		for (size_t n = 0; n < item->pairs.count; n++)
			print_json_pair(", ", item->pairs.all[n].name, item->pairs.all[n].value);
		fputs(" }", stdout);
		before = ",\n    { ";
	}
	fputs(*before == ',' ? "\n  ]" : "]", stdout);
}

static void print_json(const struct fields *f)
{
	const char *before = "\n  ";

	putchar('{');
	for (size_t i = 0; i < f->count; i++) {
		if (f->all[i].key)
			continue;
		print_json_pair(before, f->all[i].name, f->all[i].value);
		before = ",\n  ";
	}
	for (size_t i = 0; i < ARRAY_SIZE(arrays); i++) {
		if (!find(f, arrays[i].name) && !find(f, arrays[i].with))
			continue;
		fputs(before, stdout);
		print_json_array(f, &arrays[i]);
		before = ",\n  ";
	}
	puts(*before == ',' ? "\n}" : "}");
}

static void show_query(struct server *s, bool json)
{
	struct fields f = ask_state(s);

	if (json)
		print_json(&f);
	for (size_t i = 0; !json && i < f.count; i++)
		printf("%s: %s\n", f.all[i].name, f.all[i].value);
	flush_output();
	free_fields(&f);
}

/* What --watch and --cache-all have in common */

enum { MIB_TEXT = 24 };

/* Bytes as MiB with one decimal, in text of MIB_TEXT bytes. */
static const char *mib(uint64_t bytes, char *text)
{
	uint64_t tenths = bytes / 1024 * 10 / 1024 + (bytes / 1024 * 10 % 1024 >= 512);

	snprintf(text, MIB_TEXT, "%" PRIu64 ".%u", tenths / 10, (unsigned)(tenths % 10));
	return text;
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

/* --cache-all */

enum { DESCRIPTION_MAX = 512 };

struct progress {
	uint64_t cached, blocks, rate;	/* as the server tells them; rate in bytes per second */
	char reason[256];		/* why the origin is down; "": it is not */
	uint64_t next;			/* now_ms(): when there may be another line */
	bool complete;			/* has been shown */
};

/* Rounded down: only all is 1000. */
static unsigned permille(const struct progress *p)
{
	unsigned share = p->cached < p->blocks ? (unsigned)(1000.0 * p->cached / p->blocks) : 1000;

	return share == 1000 && p->cached < p->blocks ? 999 : share;
}

/* Such as "42.7%  103.4 MiB/s  0:01:23 left". */
static void describe(const struct progress *p, char *text, size_t size)
{
	uint64_t left = p->blocks > p->cached ? p->blocks - p->cached : 0;
	uint64_t seconds = p->rate ? left / (p->rate / BLOCK_SIZE + 1) : 0;
	size_t n = (size_t)snprintf(text, size, "%u.%u%%  ", permille(p) / 10, permille(p) % 10);
	char rate[MIB_TEXT];

	if (*p->reason)
		snprintf(text + n, size - n, "the origin is down: %s", p->reason);
	else if (left && !p->rate)
		snprintf(text + n, size - n, "0.0 MiB/s  -:--:-- left");
	else
		snprintf(text + n, size - n, "%s MiB/s  %" PRIu64 ":%02u:%02u left",
			 mib(p->rate, rate), seconds / 3600, (unsigned)(seconds / 60 % 60),
			 (unsigned)(seconds % 60));
}

/* All columns but the last, which some terminals leave at once; without room for a bar, text. */
static void draw_bar(const struct progress *p)
{
	enum { BAR_MIN = 6 };
	int room = terminal_size(STDERR_FILENO).ws_col - 1, bar;
	char text[DESCRIPTION_MAX], full[WIDTH_MAX];

	describe(p, text, sizeof(text));
	memset(full, '=', sizeof(full));
	bar = room - (int)strlen("[]  ") - (int)strlen(text);
	if (bar >= BAR_MIN)
		fprintf(stderr, "\r[%-*.*s]  %s", bar, bar * (int)permille(p) / 1000, full, text);
	else
		fprintf(stderr, "\r%-*.*s", room, room, text);
	bar_is_shown = true;
}

static void print_progress(struct progress *p)
{
	uint64_t now = now_ms();
	char text[DESCRIPTION_MAX];

	if (p->complete || (p->cached < p->blocks && now < p->next))
		return;
	describe(p, text, sizeof(text));
	log_line("%s", text);
	p->next = now + PLAIN_PROGRESS_MS;
	p->complete = p->cached >= p->blocks;
}

static void take_progress(const struct server *s, const char *value, bool show,
			  struct progress *p)
{
	uint64_t n[3];

	parse_numbers(s, value, n, ARRAY_SIZE(n));
	p->cached = n[0];
	p->blocks = n[1];
	p->rate = n[2];
	if (show && isatty(STDERR_FILENO))
		draw_bar(p);
	else if (show)
		print_progress(p);
	*p->reason = '\0';
}

static void show_failure(const struct server *s, const char *value)
{
	uint64_t n[2];

	parse_numbers(s, value, n, ARRAY_SIZE(n));
	leave_bar();
	log_error("the origin cannot deliver %" PRIu64 " bytes at offset %" PRIu64, n[1], n[0]);
}

/* Until the command has been carried out. */
static void follow(struct server *s, bool show_progress)
{
	struct progress progress = { 0 };
	const char *name, *value;

	while ((name = next_value(s, &value))) {
		if (strcmp(name, "progress") == 0)
			take_progress(s, value, show_progress, &progress);
		else if (strcmp(name, "origin-reason") == 0)
			snprintf(progress.reason, sizeof(progress.reason), "%s", value);
		else if (strcmp(name, "failed") == 0)
			show_failure(s, value);
		else if (strcmp(name, "failed-more") == 0)
			log_error("and more, in %s further places", value);
		else if (strcmp(name, "zeroed") == 0)
			log_line("%s blocks were missing, and read as zeros now", value);
		else if (strcmp(name, "snapshot") == 0)
			puts(value);
	}
	leave_bar();
	flush_output();
}

/*
 * --watch: the query again and again, with rates.  A terminal shows the rates of all clients, those
 * of each busy client, and the state.  Elsewhere a line shows the rates of all clients.
 */

static unsigned rows;		/* that are left on the screen */

static void show_row(const char *fmt, ...) PRINTF_LIKE(1, 2);

static void show_row(const char *fmt, ...)
{
	va_list ap;

	rows--;
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	fputs(isatty(STDOUT_FILENO) ? "\033[K\n" : "\n", stdout);
}

/* A number that is smaller than before belongs to another server. */
static uint64_t since(const struct fields *now, const struct fields *before, const char *name)
{
	uint64_t n = number_of(now, name), old = number_of(before, name);

	return n >= old ? n - old : n;
}

/* They follow the reason why the origin is down, NULL if it is not, and what follows them. */
static void show_rates(const struct fields *now, const struct fields *before, uint64_t ms,
		       const char *reason, const char *what)
{
	uint64_t requests = since(now, before, "reads") + since(now, before, "writes") +
			    since(now, before, "flushes") + since(now, before, "others");
	char read[MIB_TEXT], written[MIB_TEXT];

	show_row("%s%s%s%" PRIu64 " requests/s, %s MiB/s read, %s MiB/s written, %s",
		 reason ? "origin down: " : "", reason ? reason : "", reason ? "; " : "",
		 (requests * 1000 + ms / 2) / ms,
		 mib(since(now, before, "read-bytes") * 1000 / ms, read),
		 mib(since(now, before, "written-bytes") * 1000 / ms, written), what);
}

/* How many requests took up to that many microseconds. */
static uint64_t count_up_to(const struct fields *f, uint64_t us)
{
	const char *delays = find(f, "delays-us");
	uint64_t count = 0, top, n;

	while (delays && next_delay(&delays, &top, &n))
		if (top <= us)
			count += n;
	return count;
}

static void show_total(const struct fields *now, const struct fields *before, uint64_t ms)
{
	uint64_t all = count_up_to(now, UINT64_MAX) - count_up_to(before, UINT64_MAX), us = 0;
	const char *cached = find(now, "cached-percent"), *link = find(now, "origin-link");
	char text[512];
	int n;

	while (us < UINT64_MAX && count_up_to(now, us) - count_up_to(before, us) < all - all / 100)
		us = 2 * us + 1;
	n = snprintf(text, sizeof(text), "p99 %" PRIu64 " us, %" PRIu64 " clients, %" PRIu64
		     " errors", us, number_of(now, "clients"), number_of(now, "errors"));
	if (cached && link)
		snprintf(text + n, sizeof(text) - (size_t)n, ", %s %% cached, origin %s", cached,
			 link);
	show_rates(now, before, ms, find(now, "origin-reason"), text);
}

static void show_client(const struct field *f, const struct fields *before, uint64_t ms)
{
	const struct field *old = NULL;

	for (size_t i = 0; i < before->count && !old; i++)
		if (is_client(&before->all[i]) && strcmp(before->all[i].key, f->key) == 0)
			old = &before->all[i];
	if (!old || strcmp(old->value, f->value) != 0 || number_of(&f->pairs, "in-flight") > 0)
		show_rates(&f->pairs, old ? &old->pairs : &(struct fields){ 0 }, ms, NULL,
			   f->key);
}

/* A screen is drawn over the one before; the terminal cuts what is too long. */
static void show_look(const struct fields *now, const struct fields *before, uint64_t ms)
{
	bool terminal = isatty(STDOUT_FILENO);

	rows = terminal ? terminal_size(STDOUT_FILENO).ws_row - 1 : 1;
	fputs(terminal ? "\033[H\033[?7l" : "", stdout);
	show_total(now, before, ms);
	for (size_t i = 0; i < now->count && rows > 0; i++)
		if (is_client(&now->all[i]))
			show_client(&now->all[i], before, ms);
	for (size_t i = 0; i < now->count && rows > 0; i++)
		if (!is_client(&now->all[i]))
			show_row("%s: %s", now->all[i].name, now->all[i].value);
	fputs(terminal ? "\033[J\033[?7h" : "", stdout);
	flush_output();
}

static void end_watch(int sig)
{
	(void)sig;
	_exit(EXIT_SUCCESS);
}

static _Noreturn void watch(struct server *s, unsigned long seconds)
{
	struct fields now, before;
	uint64_t last, ms;

	signal(SIGINT, end_watch);	/* Ctrl-C */
	before = ask_state(s);
	last = now_ms();
	for (unsigned wait = 1;; wait = (unsigned)seconds) {
		sleep(wait);
		now = ask_state(s);
		ms = now_ms() - last;
		last += ms;
		show_look(&now, &before, ms);
		free_fields(&before);
		before = now;
	}
}

/* The other commands */

/* The line to the server; returns like snprintf(). */
static int make_line(const struct bgctl_options *o, char *line, size_t size)
{
	const char *name = o->export_name ? o->export_name : "", *blank = o->export_name ? " " : "";

	switch (o->command) {
	case COMMAND_SWITCH:
		return snprintf(line, size, "switch%s\n", o->force ? " force" : "");
	case COMMAND_RECONNECT:
		return snprintf(line, size, "reconnect %s %s%s%s\n", o->host, o->port, blank, name);
	case COMMAND_SNAPSHOT:
		return snprintf(line, size, "snapshot%s%s\n", blank, name);
	default:
		name = o->command == COMMAND_CACHE_ALL ? "cache-all" : "cache-all2";
		return o->blocks ? snprintf(line, size, "%s %lu\n", name, o->blocks) :
				   snprintf(line, size, "%s\n", name);
	}
}

/* A command may take its time, but a server that will not carry it out is not waited for. */
static void greet(struct server *s)
{
	const char *value;

	connect_to(s);
	ask(s, "help\n");
	while (next_value(s, &value))
		;
	limit_silence(s->fd, 0);
}

static void run(const struct bgctl_options *o, struct server *s)
{
	char line[CTL_LINE_MAX + 2];	/* with "\n" and its end */
	int len = make_line(o, line, sizeof(line));

	if (len >= (int)sizeof(line)) {
		log_error("HOST, PORT and NAME are too long");
		exit(EXIT_USAGE);
	}
	greet(s);
	if (o->command == COMMAND_RECONNECT)
		snprintf(s->aim, sizeof(s->aim), strcmp(o->port, "-") ? "%s:%s: " : "%s: ",
			 o->host, o->port);
	ask(s, line);
	follow(s, o->progress);
}

int main(int argc, char **argv)
{
	static struct bgctl_options o;	/* what it refers to lasts as long as the program */
	static struct server server;

	log_name("xnbd-bgctl");
	occupy_standard_descriptors();
	options_parse_bgctl(&o, argc, argv);
	server.path = o.socket;
	if (o.command == COMMAND_QUERY)
		show_query(&server, o.json);
	else if (o.command == COMMAND_WATCH)
		watch(&server, o.seconds);
	else
		run(&o, &server);
	return EXIT_SUCCESS;
}
