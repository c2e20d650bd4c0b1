/*
 * bgctl.c - main() of xnbd-bgctl: ask a server over its control socket.
 *
 * One command line is one line to the server, see xnbd-bgctl(1), CONTROL SOCKET; its answer is
 * shown as it comes, but that of --query, which is shown when it is complete.
 */
#define _GNU_SOURCE
#include "bgctl.h"

#include "ctl.h"
#include "util.h"
#include "xnbd.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum {
	EXIT_USAGE = 2,
	PLAIN_PROGRESS_MS = 5000,	/* between lines where there is no terminal */
	WATCH_SECONDS_MAX = 3600,
};

enum command {
	COMMAND_NONE = 0,
	COMMAND_QUERY = 1 << 0,
	COMMAND_CACHE_ALL = 1 << 1,
	COMMAND_CACHE_ALL2 = 1 << 2,
	COMMAND_SWITCH = 1 << 3,
	COMMAND_RECONNECT = 1 << 4,
	COMMAND_SNAPSHOT = 1 << 5,
	COMMAND_WATCH = 1 << 6,
	COMMAND_ANY = (1 << 7) - 1,
};

/* The command line.  Strings are those of argv; NULL if not given. */
struct options {
	enum command command;
	bool json, progress, force, shutdown, help, version;
	const char *blocks;		/* per request */
	const char *seconds;		/* between looks */
	const char *export_name;
	const char *socket, *host, *port;
};

enum { FIRST_OPTION = 256 };	/* getopt's values for known[0] and so on: not a character */

static const struct known {
	const char *name;
	const char *arg;		/* its name in the usage text, NULL for none; [X] is optional */
	size_t field;			/* of struct options: a string if it has an arg, else a bool */
	enum command is, of;		/* the command that it is, or those that it belongs to */
	const char *help;
} known[] = {
#define FIELD(name) offsetof(struct options, name)
	{ "query", NULL, 0, COMMAND_QUERY, 0, "show the state of the server" },
	{ "watch", "[SECONDS]", FIELD(seconds), COMMAND_WATCH, 0,
	  "show what clients do, again and again (1)" },
	{ "snapshot", NULL, 0, COMMAND_SNAPSHOT, 0, "make a snapshot of a target's image" },
	{ "cache-all", NULL, 0, COMMAND_CACHE_ALL, 0,
	  "copy what is missing, and return when all is here" },
	{ "cache-all2", NULL, 0, COMMAND_CACHE_ALL2, 0,
	  "copy what is missing in the background, and return at once" },
	{ "switch", NULL, 0, COMMAND_SWITCH, 0,
	  "become a target: the origin is not needed any more" },
	{ "shutdown", NULL, FIELD(shutdown), COMMAND_SWITCH, 0, "the old name of --switch" },
	{ "reconnect", NULL, 0, COMMAND_RECONNECT, 0, "go over to another origin" },
	{ "json", NULL, FIELD(json), 0, COMMAND_QUERY, "as one JSON object" },
	{ "progress", NULL, FIELD(progress), 0, COMMAND_CACHE_ALL, "show how the copy is going" },
	{ "blocks-per-request", "N", FIELD(blocks), 0, COMMAND_CACHE_ALL | COMMAND_CACHE_ALL2,
	  "ask the origin for N blocks of 4096 bytes at once, up to 8192" },
	{ "force", NULL, FIELD(force), 0, COMMAND_SWITCH,
	  "even if blocks are missing, which read as zeros then" },
	{ "exportname", "NAME", FIELD(export_name), 0, COMMAND_RECONNECT | COMMAND_SNAPSHOT,
	  "the export: there (the present one), or here (the only one)" },
	{ "help", NULL, FIELD(help), 0, COMMAND_ANY, "show this text" },
	{ "version", NULL, FIELD(version), 0, COMMAND_ANY, "show the version" },
#undef FIELD
};

/* Terminals and JSON are not to see them. */
static void mask_control_characters(char *s)
{
	for (; *s; s++)
		if ((unsigned char)*s < ' ' || *s == 0x7f)
			*s = '?';
}

/* The command line */

static _Noreturn void usage_error(const char *fmt, ...) PRINTF_LIKE(1, 2);

static _Noreturn void usage_error(const char *fmt, ...)
{
	char line[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	mask_control_characters(line);
	log_error("%s (see --help)", line);
	exit(EXIT_USAGE);
}

static _Noreturn void show_help(void)
{
	printf("usage: xnbd-bgctl --query [--json] CONTROL_SOCKET\n"
	       "       xnbd-bgctl --watch[=SECONDS] CONTROL_SOCKET\n"
	       "       xnbd-bgctl --snapshot [--exportname NAME] CONTROL_SOCKET\n"
	       "       xnbd-bgctl --cache-all [--progress] [--blocks-per-request N] "
	       "CONTROL_SOCKET\n"
	       "       xnbd-bgctl --cache-all2 [--blocks-per-request N] CONTROL_SOCKET\n"
	       "       xnbd-bgctl --switch [--force] CONTROL_SOCKET\n"
	       "       xnbd-bgctl --reconnect [--exportname NAME] CONTROL_SOCKET HOST PORT\n"
	       "Controls the xnbd-server that CONTROL_SOCKET belongs to.\n\n");
	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		char name[64];

		snprintf(name, sizeof(name), "--%s%s%s", known[i].name, known[i].arg ? " " : "",
			 known[i].arg ? known[i].arg : "");
		printf("  %-23s %s\n", name, known[i].help);
	}
	exit(fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
}

static _Noreturn void show_version(void)
{
	printf("xnbd-bgctl %s\n", XNBD_VERSION);
	exit(fflush(stdout) == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
}

static void set_command(struct options *o, const struct known *k)
{
	if (o->command != COMMAND_NONE)
		usage_error("option '--%s': a command was given before, and there can be one only",
			    k->name);
	o->command = k->is;
}

static void set_option(struct options *o, const struct known *k, const char *value)
{
	char *field = (char *)o + k->field;

	if (k->is)
		set_command(o, k);
	if (k->arg)
		*(const char **)field = value;
	else if (k->field)
		*(bool *)field = true;
	if (o->help)
		show_help();
	if (o->version)
		show_version();
}

/* getopt_long() returned '?' or ':'; word is the argument that it looked at last. */
static _Noreturn void bad_option(int found, const char *word)
{
	if (optopt >= FIRST_OPTION && found == ':')
		usage_error("option '--%s' needs a value: %s", known[optopt - FIRST_OPTION].name,
			    known[optopt - FIRST_OPTION].arg);
	if (optopt >= FIRST_OPTION)
		usage_error("option '--%s' takes no value, as in '%s'",
			    known[optopt - FIRST_OPTION].name, word);
	if (optopt)
		usage_error("unknown option '-%c'", optopt);
	usage_error("unknown or ambiguous option '%s'", word);
}

/* Returns a bit for each option of known[] that was there. */
static unsigned parse_words(struct options *o, int argc, char **argv)
{
	struct option longopts[ARRAY_SIZE(known) + 1] = { 0 };
	unsigned seen = 0;
	int found;

	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		longopts[i].name = known[i].name;
		longopts[i].has_arg = !known[i].arg	   ? no_argument :
				      *known[i].arg == '[' ? optional_argument :
							     required_argument;
		longopts[i].val = FIRST_OPTION + (int)i;
	}
	opterr = 0;
	while ((found = getopt_long(argc, argv, ":", longopts, NULL)) != -1) {
		if (found < FIRST_OPTION)
			bad_option(found, argv[optind - 1]);
		set_option(o, &known[found - FIRST_OPTION], optarg);
		seen |= 1U << (found - FIRST_OPTION);
	}
	return seen;
}

static void check_options(const struct options *o, unsigned seen)
{
	unsigned long n;

	if (o->command == COMMAND_NONE)
		usage_error("no command: --query, --watch, --snapshot, --cache-all, --cache-all2, "
			    "--switch or --reconnect is needed");
	for (size_t i = 0; i < ARRAY_SIZE(known); i++)
		if (seen & 1U << i && known[i].of && !(known[i].of & o->command))
			usage_error("option '--%s' does not belong to this command", known[i].name);
	if (o->blocks && !parse_number(o->blocks, 1, 8192, &n))
		usage_error("option '--blocks-per-request': '%s' is not a number from 1 to 8192",
			    o->blocks);
	if (o->export_name && strpbrk(o->export_name, "\r\n"))
		usage_error("option '--exportname': the name must have no line break");
	if (o->shutdown)
		log_line("--shutdown is deprecated, its name is --switch now");
}

static bool is_unix(const char *host)
{
	return strncmp(host, "unix:", strlen("unix:")) == 0;
}

/* The server may have another working directory. */
static const char *from_root(const char *host)
{
	char *path = absolute_path(host + strlen("unix:")), *result;

	if (!path || asprintf(&result, "unix:%s", path) < 0)
		usage_error("HOST '%s': %s", host, strerror(errno));
	free(path);
	return result;
}

/* What is a word of the line to the server. */
static void check_word(const char *what, const char *word)
{
	if (!*word || strpbrk(word, " \r\n"))
		usage_error("%s '%s': it must have a character, no blank and no line break", what,
			    word);
}

static void take_remote(struct options *o, int argc, char **argv)
{
	if (argc < 1)
		usage_error("HOST is missing");
	o->host = is_unix(argv[0]) ? from_root(argv[0]) : argv[0];
	check_word("HOST", o->host);
	if (argc < 2 && !is_unix(o->host))
		usage_error("PORT is missing");
	o->port = is_unix(o->host) ? "-" : argv[1];
	check_word("PORT", o->port);
	if (argc > 2)
		usage_error("CONTROL_SOCKET HOST PORT are expected, '%s' is too much", argv[2]);
}

static void parse_options(struct options *o, int argc, char **argv)
{
	unsigned long n;

	check_options(o, parse_words(o, argc, argv));
	argc -= optind;
	argv += optind;
	if (o->command == COMMAND_WATCH && !o->seconds && argc == 2) {	/* --watch SECONDS */
		o->seconds = *argv++;
		argc--;
	}
	if (o->seconds && !parse_number(o->seconds, 1, WATCH_SECONDS_MAX, &n))
		usage_error("option '--watch': '%s' is not a number from 1 to %d", o->seconds,
			    WATCH_SECONDS_MAX);
	if (argc < 1)
		usage_error("CONTROL_SOCKET is missing");
	o->socket = argv[0];
	if (o->command == COMMAND_RECONNECT)
		take_remote(o, argc - 1, argv + 1);
	else if (argc > 1)
		usage_error("one CONTROL_SOCKET is expected, '%s' is too much", argv[1]);
}

/* The connection */

/* Whether the cursor is at the end of the progress bar. */
static bool bar_is_shown;

static void leave_bar(void)
{
	if (bar_is_shown)
		fputc('\n', stderr);
	bar_is_shown = false;
}

_Noreturn void fail(const char *fmt, ...)
{
	char line[1000];
	va_list ap;

	leave_bar();
	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	mask_control_characters(line);
	log_error("%s", line);
	exit(EXIT_FAILURE);
}

static _Noreturn void fail_garbage(const struct server *s, const char *text)
{
	fail("%s: the server sends '%.100s', which is not an answer", s->path, text);
}

void connect_to(struct server *s, const char *path)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };

	s->path = path;
	if (strlen(path) >= sizeof(sun.sun_path))
		fail("cannot connect to %s: the path has %zu bytes, %zu is the most", path,
		     strlen(path), sizeof(sun.sun_path) - 1);
	strcpy(sun.sun_path, path);
	s->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (s->fd >= 0 && connect(s->fd, (struct sockaddr *)&sun, sizeof(sun)) == 0)
		return;
	if (s->known && (errno == ECONNREFUSED || errno == ENOENT))
		fail("%s: the server has ended", path);
	fail("cannot connect to %s: %s", path,
	     errno == ECONNREFUSED ? "no server listens there" :
	     errno == EAGAIN       ? "the server does not answer" :
				     strerror(errno));
}

/* A fresh connection takes a short line; one that does not has a reason to tell, or has ended. */
void send_line(struct server *s, const char *line, size_t len)
{
	ssize_t n = send(s->fd, line, len, MSG_NOSIGNAL);

	if (n >= 0 && (size_t)n < len)
		fail("%s: the server does not take the command", s->path);
}

static void wait_for_input(const struct server *s)
{
	struct pollfd pfd = { .fd = s->fd, .events = POLLIN };
	uint64_t now = now_ms();
	int left = -1, n;

	if (s->deadline)
		left = s->deadline > now ? (int)(s->deadline - now) : 0;
	n = poll(&pfd, 1, left);
	if (n == 0)
		fail("%s: the server did not answer in %d s", s->path, ANSWER_MS / 1000);
	if (n < 0 && errno != EINTR)
		fail("%s: %s", s->path, strerror(errno));
}

static void receive(struct server *s)
{
	ssize_t n;

	memmove(s->buf, s->buf + s->used, s->len - s->used);
	s->len -= s->used;
	s->used = 0;
	if (s->len == sizeof(s->buf))
		fail("%s: the server sends lines that are too long", s->path);
	wait_for_input(s);
	n = recv(s->fd, s->buf + s->len, sizeof(s->buf) - s->len, 0);
	if (n == 0 || (n < 0 && errno == ECONNRESET))
		fail("%s: the server closed the connection", s->path);
	if (n > 0)
		s->len += (size_t)n;
	else if (errno != EAGAIN && errno != EINTR)
		fail("%s: %s", s->path, strerror(errno));
}

/* The next line, which is good until the next call. */
static char *next_line(struct server *s)
{
	char *line, *end;

	while (!(end = memchr(s->buf + s->used, '\n', s->len - s->used)))
		receive(s);
	line = s->buf + s->used;
	s->used = (size_t)(end - s->buf) + 1;
	*end = '\0';
	if (strlen(line) < (size_t)(end - line))
		fail_garbage(s, line);
	mask_control_characters(line);
	return line;
}

const char *next_value(struct server *s, const char **value)
{
	char *line = next_line(s), *colon = strstr(line, ": ");
	size_t len;

	if (strcmp(line, "ok") == 0)
		return NULL;
	len = strspn(line, "abcdefghijklmnopqrstuvwxyz0123456789-");
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

/* --query */

/* Values that are text even if they look like a number. */
static bool is_text(const char *name)
{
	static const char *const texts[] = { "image", "bitmap", "origin-export", "origin-reason",
					     "copy-error", "snapshot-last", "snapshot-error",
					     "delays-us", "address", "name" };

	for (size_t i = 0; i < ARRAY_SIZE(texts); i++)
		if (strcmp(name, texts[i]) == 0)
			return true;
	return false;
}

bool is_number(const char *s)
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

/* Bytes of the character at s, 0 if it is none. */
static size_t utf8_length(const char *s)
{
	const unsigned char *u = (const unsigned char *)s;
	size_t len = u[0] < 0x80 ? 1 : u[0] < 0xc2 ? 0 : u[0] < 0xe0 ? 2 : u[0] < 0xf0 ? 3 :
		     u[0] < 0xf5 ? 4 : 0;
	unsigned min = u[0] == 0xe0 ? 0xa0 : u[0] == 0xf0 ? 0x90 : 0x80;
	unsigned max = u[0] == 0xed ? 0x9f : u[0] == 0xf4 ? 0x8f : 0xbf;

	if (len > 1 && (u[1] < min || u[1] > max))
		return 0;
	for (size_t i = 2; i < len; i++)
		if ((u[i] & 0xc0) != 0x80)
			return 0;
	return len;
}

/* Paths are bytes, JSON is characters. */
static void print_json_string(FILE *out, const char *s)
{
	size_t len;

	fputc('"', out);
	for (; *s; s += len ? len : 1) {
		len = utf8_length(s);
		if (*s == '"' || *s == '\\')
			fputc('\\', out);
		if (len)
			fwrite(s, 1, len, out);
		else
			fputs("\\ufffd", out);
	}
	fputc('"', out);
}

static void print_json_value(FILE *out, const char *name, const char *value)
{
	print_json_string(out, name);
	fputs(": ", out);
	if (is_number(value) && !is_text(name))
		fputs(value, out);
	else
		print_json_string(out, value);
}

char *split_name(char *text, const char *first)
{
	char *pairs = NULL;

	for (char *at = text; (at = strstr(at, first)); at++)
		pairs = at;
	if (!pairs)
		return text + strlen(text);
	*pairs = '\0';
	return pairs + 1;
}

bool next_pair(char **text, const char **name, const char **number)
{
	char *blank = strchr(*text, ' '), *end;

	if (!blank)
		return false;
	*blank = '\0';
	end = blank + 1 + strcspn(blank + 1, " ");
	*name = *text;
	*number = blank + 1;
	*text = *end ? end + 1 : end;
	*end = '\0';
	return is_number(*number);
}

/* Lines that there may be several of, each a name and pairs of numbers: an array of objects. */
struct array {
	const char *line;		/* the name of the line, and of the array */
	const char *key;		/* of the name in each object */
	const char *first;		/* the first pair begins with this */
	unsigned count;
	FILE *out;
	char *text;
	size_t len;
};

static void add_to_array(struct array *a, char *text)
{
	char *pairs = split_name(text, a->first);
	const char *name, *number;

	fputs(a->count++ ? ",\n    { " : "\n    { ", a->out);
	print_json_value(a->out, a->key, text);
	while (next_pair(&pairs, &name, &number)) {
		fputs(", ", a->out);
		print_json_value(a->out, name, number);
	}
	fputs(" }", a->out);
}

static FILE *open_text(char **text, size_t *len)
{
	FILE *out = open_memstream(text, len);

	if (!out)
		fail("out of memory");
	return out;
}

static void close_text(FILE *out)
{
	if (fclose(out) != 0)
		fail("out of memory");
}

static void end_array(struct array *a, FILE *out, const char *separator)
{
	close_text(a->out);
	fprintf(out, "%s\"%s\": [%s%s]", separator, a->line, a->text, a->count ? "\n  " : "");
	free(a->text);
}

static void drop_array(struct array *a)
{
	close_text(a->out);
	free(a->text);
}

static struct array *find_array(struct array *arrays, const char *line)
{
	for (struct array *a = arrays; a->line; a++)
		if (strcmp(a->line, line) == 0)
			return a;
	return NULL;
}

/* The lines of an answer, each for itself but those that become arrays. */
static void print_json(struct server *s, FILE *out)
{
	struct array arrays[] = { { "client", "address", " reads ", 0, NULL, NULL, 0 },
				  { "export", "name", " size ", 0, NULL, NULL, 0 },
				  { NULL, NULL, NULL, 0, NULL, NULL, 0 } };
	const char *name, *value;
	bool clients = false;
	unsigned lines = 0;

	for (struct array *a = arrays; a->line; a++)
		a->out = open_text(&a->text, &a->len);
	while ((name = next_value(s, &value))) {
		struct array *a = find_array(arrays, name);

		if (lines + arrays[0].count + arrays[1].count == ANSWER_LINES_MAX)
			fail("%s: the server's answer is too long", s->path);
		if (a) {
			add_to_array(a, (char *)(uintptr_t)value);
			continue;
		}
		clients |= strcmp(name, "clients") == 0;
		fputs(lines++ ? ",\n  " : "{\n  ", out);
		print_json_value(out, name, value);
	}
	for (struct array *a = arrays; a->line; a++)
		if (a->count || (a == arrays && clients))
			end_array(a, out, lines++ ? ",\n  " : "{\n  ");
		else
			drop_array(a);
	fputs(lines ? "\n}\n" : "{}\n", out);
}

static void print_lines(struct server *s, FILE *out)
{
	const char *name, *value;

	for (unsigned lines = 0; (name = next_value(s, &value)); lines++) {
		if (lines == ANSWER_LINES_MAX)
			fail("%s: the server's answer is too long", s->path);
		fprintf(out, "%s: %s\n", name, value);
	}
}

/* All of the answer or nothing. */
static void show_query(struct server *s, bool json)
{
	char *text = NULL;
	size_t len = 0;
	FILE *out = open_text(&text, &len);

	if (json)
		print_json(s, out);
	else
		print_lines(s, out);
	close_text(out);
	if (fwrite(text, 1, len, stdout) < len || fflush(stdout) != 0)
		fail("cannot write to standard output: %s", strerror(errno));
	free(text);
}

/* --cache-all */

struct progress {
	uint64_t cached, blocks, rate;	/* as the server tells them; rate in bytes per second */
	uint64_t next;			/* now_ms(): when there may be another line */
	bool complete;			/* has been shown */
};

/* Rounded down: 1000 means all.  Numbers that no disk has are only not to overflow. */
static unsigned permille(const struct progress *p)
{
	if (p->cached >= p->blocks)
		return 1000;
	if (p->blocks > UINT64_MAX / 1000)
		return (unsigned)(p->cached / (p->blocks / 1000 + 1));
	return (unsigned)(p->cached * 1000 / p->blocks);
}

/* Such as "42.7%  103.4 MiB/s  0:01:23 left". */
static void describe(const struct progress *p, char *text, size_t size)
{
	uint64_t left = p->blocks > p->cached ? p->blocks - p->cached : 0;
	uint64_t seconds = p->rate ? left / (p->rate / BLOCK_SIZE + 1) : 0;
	uint64_t tenths = (p->rate * 10 + (1 << 19)) >> 20;
	int n = snprintf(text, size, "%u.%u%%  %" PRIu64 ".%u MiB/s  ", permille(p) / 10,
			 permille(p) % 10, tenths / 10, (unsigned)(tenths % 10));

	if (left && !p->rate)
		snprintf(text + n, size - (size_t)n, "-:--:-- left");
	else
		snprintf(text + n, size - (size_t)n, "%" PRIu64 ":%02u:%02u left", seconds / 3600,
			 (unsigned)(seconds / 60 % 60), (unsigned)(seconds % 60));
}

size_t terminal_width(int fd)
{
	struct winsize w;

	if (ioctl(fd, TIOCGWINSZ, &w) < 0 || w.ws_col == 0)
		return WIDTH_DEFAULT;
	return w.ws_col < WIDTH_MAX ? w.ws_col : WIDTH_MAX;
}

size_t terminal_height(int fd)
{
	struct winsize w;

	return ioctl(fd, TIOCGWINSZ, &w) < 0 || w.ws_row == 0 ? HEIGHT_DEFAULT : w.ws_row;
}

/* All columns but the last, which some terminals leave at once; without room for a bar, text. */
static void draw_bar(const struct progress *p)
{
	enum { BAR_MIN = 6 };
	size_t room = terminal_width(STDERR_FILENO) - 1, text_len, bar;
	char text[128], line[WIDTH_MAX];

	describe(p, text, sizeof(text));
	text_len = strlen(text);
	memset(line, ' ', sizeof(line));
	line[0] = '\r';
	if (room >= text_len + BAR_MIN + 4) {
		bar = room - text_len - 4;
		line[1] = '[';
		memset(line + 2, '=', bar * permille(p) / 1000);
		line[2 + bar] = ']';
		memcpy(line + bar + 5, text, text_len);
	} else {
		memcpy(line + 1, text, text_len < room ? text_len : room);
	}
	fwrite(line, 1, room + 1, stderr);
	bar_is_shown = true;
}

static void print_progress(struct progress *p)
{
	uint64_t now = now_ms();
	char text[128];

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
	if (!show)
		return;
	if (isatty(STDERR_FILENO))
		draw_bar(p);
	else
		print_progress(p);
}

static void show_failure(const struct server *s, const char *value)
{
	uint64_t n[2];

	parse_numbers(s, value, n, ARRAY_SIZE(n));
	leave_bar();
	log_error("the origin cannot deliver %" PRIu64 " bytes at offset %" PRIu64, n[1], n[0]);
}

static void follow_copy(struct server *s, bool show)
{
	struct progress progress = { 0 };
	const char *name, *value;

	while ((name = next_value(s, &value))) {
		s->deadline = 0;	/* it is alive, and may take as long as it needs */
		if (strcmp(name, "progress") == 0)
			take_progress(s, value, show, &progress);
		else if (strcmp(name, "failed") == 0)
			show_failure(s, value);
		else if (strcmp(name, "failed-more") == 0)
			log_error("and more, in %s further places", value);
	}
	leave_bar();
}

/* The other commands */

static void wait_for_end(struct server *s)
{
	const char *name, *value;

	while ((name = next_value(s, &value))) {
		if (strcmp(name, "zeroed") == 0)
			log_line("%s blocks were missing, and read as zeros now", value);
		if (strcmp(name, "snapshot") == 0 && (puts(value) < 0 || fflush(stdout) != 0))
			fail("cannot write to standard output: %s", strerror(errno));
	}
}

/* The line to the server; returns like snprintf(). */
static int make_line(const struct options *o, char *line, size_t size)
{
	switch (o->command) {
	case COMMAND_CACHE_ALL:
	case COMMAND_CACHE_ALL2:
		return snprintf(line, size, "cache-all%s%s%s\n",
				o->command == COMMAND_CACHE_ALL ? "" : "2", o->blocks ? " " : "",
				o->blocks ? o->blocks : "");
	case COMMAND_SWITCH:
		return snprintf(line, size, "switch%s\n", o->force ? " force" : "");
	case COMMAND_RECONNECT:
		return snprintf(line, size, "reconnect %s %s%s%s\n", o->host, o->port,
				o->export_name ? " " : "", o->export_name ? o->export_name : "");
	case COMMAND_SNAPSHOT:
		return snprintf(line, size, "snapshot%s%s\n", o->export_name ? " " : "",
				o->export_name ? o->export_name : "");
	default:
		return snprintf(line, size, "query\n");
	}
}

static void run(const struct options *o, struct server *s)
{
	if (o->command & (COMMAND_QUERY | COMMAND_CACHE_ALL | COMMAND_CACHE_ALL2))
		s->deadline = now_ms() + ANSWER_MS;
	if (o->command == COMMAND_QUERY)
		show_query(s, o->json);
	else if (o->command == COMMAND_CACHE_ALL)
		follow_copy(s, o->progress);
	else
		wait_for_end(s);
}

int main(int argc, char **argv)
{
	static struct options o;	/* what it refers to lasts as long as the program */
	static struct server server;
	char line[CTL_LINE_MAX + 2];	/* with "\n" and its end */
	int len;

	log_name("xnbd-bgctl");
	parse_options(&o, argc, argv);
	server.path = o.socket;
	if (o.command == COMMAND_WATCH)
		watch(&server, o.seconds ? (unsigned)strtoul(o.seconds, NULL, 10) : 1);
	len = make_line(&o, line, sizeof(line));
	if (len >= (int)sizeof(line))
		usage_error("HOST, PORT and NAME are too long");
	if (o.command == COMMAND_RECONNECT)
		snprintf(server.aim, sizeof(server.aim), is_unix(o.host) ? "%s: " : "%s:%s: ",
			 o.host, o.port);
	connect_to(&server, o.socket);
	send_line(&server, line, (size_t)len);
	run(&o, &server);
	return EXIT_SUCCESS;
}
