/*
 * options.c - the command lines of both programs: see options.h.
 *
 * A table for each program drives the parser, the checks and --help.
 */
#define _GNU_SOURCE
#include "options.h"

#include "access.h"
#include "log.h"
#include "util.h"
#include "xnbd.h"

#include <assert.h>
#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	DEFAULT_PORT = 8520,
	FIRST_OPTION = 256,		/* getopt's values for the rows begin here: not a character */
	OPTIONS_MAX = 64,		/* and the end */
};

struct row {
	char letter;			/* 0 for none */
	char name[20];			/* no pointers: each needs a relocation */
	char arg[12];			/* its name in the usage, "" for none; [X] is optional */
	unsigned char modes;		/* in which it means something; or which it is */
	unsigned short field;		/* of the options: where the value goes */
	void (*take)(const struct row *r, void *field, const char *value);
	unsigned min, max;		/* of a number; a text has min bytes at least */
	char help[72];
};

/* field, take, min and max. */
#define FLAG(field) FIELD(field), set_flag, 0, 0
#define TEXT(field) FIELD(field), set_text, 1, 0
#define NUMBER(field, min, max) FIELD(field), set_number, min, max
#define VALUE(take, field) FIELD(field), take, 0, 0
#define OTHER(take) 0, take, 0, 0

struct program {
	const char *usage;
	const char *choice, *choices;	/* what one chooses first, and all that there is */
	const struct row *rows;
	size_t count;
};

/* The command line that is being read. */
static struct {
	const struct program *program;
	int argc;
	char **argv;
	const struct row *chosen;	/* the mode, or the command; NULL: none yet */
	bool given[OPTIONS_MAX];	/* each of the rows */
} line;

PRINTF_LIKE(1, 2) static _Noreturn void usage_error(const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	log_failure("%s (see --help)", text);
	exit(EXIT_USAGE);
}

/* What options do with their values, NULL for none; field lies in the options, or is all of it. */

static void set_flag(const struct row *r, void *field, const char *value)
{
	(void)r, (void)value;
	*(bool *)field = true;
}

static void set_text(const struct row *r, void *field, const char *value)
{
	if (strlen(value) < r->min)
		usage_error("option '--%s' needs a value that is not empty", r->name);
	*(const char **)field = value;
}

/* To an unsigned long, or a long. */
static void set_number(const struct row *r, void *field, const char *value)
{
	if (!parse_number(value, r->min, r->max, field))
		usage_error("option '--%s': '%s' is not a number from %u to %u", r->name, value,
			    r->min, r->max);
}

/* A number of bytes such as 512, 64K, 10M, 1G, 4T (powers of 1024). */
static void set_bytes(const struct row *r, void *field, const char *value)
{
	static const char units[] = "KMGTkmgt";
	char *end;
	unsigned long long n;
	unsigned shift = 0;

	errno = 0;
	n = strtoull(value, &end, 10);
	if (*end && strchr(units, *end)) {
		shift = 10 * ((unsigned)(strchr(units, *end) - units) % 4 + 1);
		end++;
	}
	if (*value < '0' || *value > '9' || *end || errno || n > UINT64_MAX >> shift)
		usage_error("option '--%s': '%s' is not a size such as 512M or 10G", r->name,
			    value);
	*(uint64_t *)field = n << shift;
}

/* The permissions of a file, in octal, of which there must be some. */
static void set_file_mode(const struct row *r, void *field, const char *value)
{
	unsigned long mode = strtoul(value, NULL, 8);

	if (strspn(value, "01234567") != strlen(value) || mode == 0 || mode > 0777)
		usage_error("option '--%s': '%s' is not a mode from 1 to 0777, in octal", r->name,
			    value);
	*(unsigned long *)field = mode;
}

/* The mode, or the command, which may have a number. */
static void choose_mode(const struct row *r, void *field, const char *value)
{
	if (line.chosen)
		usage_error("option '--%s': a %s was chosen before, and there can be one only",
			    r->name, line.program->choice);
	line.chosen = r;
	if (value)
		set_number(r, field, value);
}

static void add_laddr(const struct row *r, void *options, const char *value)
{
	struct options *o = options;
	char *host = not_null(strdup(value));

	(void)r;
	strip_brackets(host);
	o->laddr = not_null(realloc(o->laddr, (o->laddrs + 1) * sizeof(*o->laddr)));
	o->laddr[o->laddrs++] = host;
}

static void add_allow(const struct row *r, void *options, const char *value)
{
	const char *wrong = access_allow(value);

	(void)options;
	if (wrong)
		usage_error("option '--%s': '%s' %s", r->name, value, wrong);
}

static void add_image(struct options *o, const char *name, const char *path)
{
	o->export = not_null(realloc(o->export, (o->exports + 1) * sizeof(*o->export)));
	o->export[o->exports++] = (struct named_image){ name, path };
}

/* The first '=' ends the name. */
static void add_export(const struct row *r, void *options, const char *value)
{
	struct options *o = options;
	const char *path = strchr(value, '='), *name;

	if (!path || path == value || !path[1])
		usage_error("option '--%s': NAME=PATH is expected, and not '%s'", r->name, value);
	name = not_null(strndup(value, (size_t)(path - value)));
	if (!proto_is_string(name))
		usage_error("option '--%s': a name has at most %d bytes of UTF-8, and is not '%s'",
			    r->name, PROTO_STRING_MAX, name);
	for (unsigned i = 0; i < o->exports; i++)
		if (strcmp(o->export[i].name, name) == 0)
			usage_error("option '--%s': two images have the name '%s'", r->name, name);
	add_image(o, name, path + 1);
}

/* --help, or --version, where the program's name is the first word of its usage. */
static void show_help(const struct row *chosen, void *field, const char *value)
{
	const struct program *p = line.program;
	bool help = chosen->letter == 'h';

	(void)field, (void)value;
	if (help)
		printf("usage: %s\n", p->usage);
	else
		printf("%.*s %s\n", (int)strcspn(p->usage, " "), p->usage, XNBD_VERSION);
	for (const struct row *r = p->rows; help && r < p->rows + p->count; r++) {
		char letter[] = "-x, ", name[64];

		letter[1] = r->letter;
		snprintf(name, sizeof(name), "%s--%s %s", r->letter ? letter : "    ", r->name,
			 r->arg);
		printf("  %-28s %s\n", name, r->help);
	}
	flush_output();
	exit(EXIT_SUCCESS);
}

/* The tables */

/* In any mode, but not where a single client is given. */
enum { MODE_MANY = MODE_ANY | MODE_PROXY << 1 };

static const struct row server_rows[] = {
#define FIELD(name) offsetof(struct options, name)
	{ 't', "target", "", MODE_TARGET, OTHER(choose_mode), "export a disk image" },
	{ 'c', "cow-target", "", MODE_COW_TARGET, OTHER(choose_mode),
	  "export a base image, keep writes in an overlay" },
	{ 'p', "proxy", "", MODE_PROXY, OTHER(choose_mode),
	  "cache a remote server's disk, and move it here" },
	{ 'l', "lport", "PORT", MODE_MANY, NUMBER(lport, 0, 65535),
	  "TCP port to listen on, 0 for a free one (8520)" },
	{ 0, "laddr", "ADDR", MODE_MANY, OTHER(add_laddr),
	  "address or name to listen on, may be repeated (all)" },
	{ 0, "unix", "PATH", MODE_MANY, TEXT(unix_path),
	  "Unix socket to listen on; without --lport and --laddr, there alone" },
	{ 0, "unix-mode", "MODE", MODE_ANY, VALUE(set_file_mode, unix_mode),
	  "mode of that socket, such as 0660 (what the umask leaves)" },
	{ 0, "allow", "ADDRESS", MODE_ANY, OTHER(add_allow),
	  "TCP clients that may connect: ADDRESS[/PREFIX], may be repeated (all)" },
	{ 0, "max-connections", "N", MODE_MANY, NUMBER(max_connections, 1, 65536),
	  "clients at a time, at most (4096)" },
	{ 0, "max-per-host", "N", MODE_MANY, NUMBER(max_per_host, 1, 65536),
	  "of those, clients of one address (all)" },
	{ 0, "keepalive", "SECONDS", MODE_ANY, NUMBER(keepalive, 0, 36000),
	  "a client whose host is silent for so long is gone (300, 0 for never)" },
	{ 'i', "inetd", "", MODE_ANY, FLAG(inetd), "serve the one client on standard input" },
	{ 0, "connected-fd", "N", MODE_ANY, NUMBER(connected_fd, 0, INT_MAX),
	  "serve the one client on descriptor N, already negotiated" },
	{ 0, "oldstyle", "", MODE_ANY, FLAG(oldstyle),
	  "greet like old servers, without negotiation" },
	{ 0, "export", "NAME=PATH", MODE_TARGET | MODE_COW_TARGET, OTHER(add_export),
	  "export the image PATH by that name, may be repeated" },
	{ 'r', "readonly", "", MODE_ANY, FLAG(readonly), "refuse writes" },
	{ 0, "create", "SIZE", MODE_TARGET, VALUE(set_bytes, create_size),
	  "create a sparse image of SIZE (512M, 10G, ...) if there is none" },
	{ 0, "cow-dir", "DIR", MODE_COW_TARGET, TEXT(cow_dir),
	  "where the overlay goes, which has no name (beside the base)" },
	{ 0, "cow-file", "PATH", MODE_COW_TARGET, TEXT(cow_file),
	  "keep the overlay in PATH and PATH.map, and go on from there" },
	{ 0, "target-exportname", "NAME", MODE_PROXY, VALUE(set_text, export_name),
	  "name of the remote server's export (the empty name)" },
	{ 0, "clear-bitmap", "", MODE_PROXY, FLAG(clear_bitmap), "forget what is cached" },
	{ 0, "max-queue-size", "N", MODE_ANY, NUMBER(max_queue_size, 0, INT_MAX),
	  "requests of all clients that may wait (0: 8192)" },
	{ 0, "max-buf-size", "SIZE", MODE_ANY, VALUE(set_bytes, max_buf_size),
	  "memory for the data of those (0: 3M)" },
	{ 0, "origin-connections", "N", MODE_PROXY, NUMBER(origin_connections, 1, 16),
	  "connections to the remote server, at most (2)" },
	{ 0, "origin-timeout", "SECONDS", MODE_PROXY, NUMBER(origin_timeout, 1, 3600),
	  "connect again when it is silent for so long (15)" },
	{ 0, "threads", "N", MODE_MANY, NUMBER(threads, 1, 1024),
	  "threads that connections are spread over, at most" },
	{ 'd', "daemonize", "", MODE_MANY, FLAG(daemonize),
	  "return when clients can connect, and go on in the background" },
	{ 0, "pidfile", "PATH", MODE_ANY, TEXT(pidfile), "write the process id there" },
	{ 'L', "logpath", "FILE", MODE_ANY, TEXT(logpath), "log to FILE; SIGHUP opens it again" },
	{ 0, "syslog", "", MODE_ANY, FLAG(syslog),
	  "log to syslog (with --inetd or --daemonize the default)" },
	{ 0, "user", "NAME", MODE_ANY, TEXT(user), "become NAME[:GROUP] before serving anybody" },
	{ 0, "no-sandbox", "", MODE_ANY, FLAG(no_sandbox),
	  "keep access to all files and to the network" },
	{ 0, "ctl", "PATH", MODE_ANY, TEXT(control),
	  "control socket, for xnbd-bgctl; a proxy has one without" },
	{ 0, "quiet", "", MODE_ANY, FLAG(quiet), "log errors only" },
	{ 0, "verbose", "", MODE_ANY, FLAG(verbose),
	  "log what clients negotiate, and each request that is refused" },
	{ 0, "stats", "SECONDS", MODE_ANY, NUMBER(stats, 1, 86400),
	  "log every so often what each client did" },
	{ 'h', "help", "", MODE_ANY, OTHER(show_help), "show this text" },
	{ 'V', "version", "", MODE_ANY, OTHER(show_help), "show the version" },
#undef FIELD
};

/* The commands of xnbd-bgctl, for struct row. */
enum {
	COMMAND_QUERY = 1 << 0,
	COMMAND_CACHE_ALL = 1 << 1,
	COMMAND_CACHE_ALL2 = 1 << 2,
	COMMAND_SWITCH = 1 << 3,
	COMMAND_RECONNECT = 1 << 4,
	COMMAND_SNAPSHOT = 1 << 5,
	COMMAND_WATCH = 1 << 6,
	COMMAND_ANY = (1 << 7) - 1,
};

static const struct row bgctl_rows[] = {
#define FIELD(name) offsetof(struct bgctl_options, name)
	{ 'q', "query", "", COMMAND_QUERY, OTHER(choose_mode), "show the state of the server" },
	{ 0, "watch", "[SECONDS]", COMMAND_WATCH, FIELD(seconds), choose_mode, 1, 3600,
	  "show what clients do, again and again (1)" },
	{ 0, "snapshot", "", COMMAND_SNAPSHOT, OTHER(choose_mode),
	  "make a snapshot of a target's image" },
	{ 'c', "cache-all", "", COMMAND_CACHE_ALL, OTHER(choose_mode),
	  "copy what is missing, and return when all is here" },
	{ 'C', "cache-all2", "", COMMAND_CACHE_ALL2, OTHER(choose_mode),
	  "copy what is missing in the background, and return at once" },
	{ 's', "switch", "", COMMAND_SWITCH, OTHER(choose_mode),
	  "become a target: the origin is not needed any more" },
	{ 0, "shutdown", "", COMMAND_SWITCH, OTHER(choose_mode), "the old name of --switch" },
	{ 'r', "reconnect", "", COMMAND_RECONNECT, OTHER(choose_mode),
	  "go over to another origin" },
	{ 0, "json", "", COMMAND_QUERY, FLAG(json), "as one JSON object" },
	{ 0, "progress", "", COMMAND_CACHE_ALL, FLAG(progress), "show how the copy is going" },
	{ 0, "blocks-per-request", "N", COMMAND_CACHE_ALL | COMMAND_CACHE_ALL2, NUMBER(blocks, 1, 8192),
	  "ask the origin for N blocks of 4096 bytes at once (64)" },
	{ 0, "force", "", COMMAND_SWITCH, FLAG(force),
	  "even if blocks are missing, which read as zeros then" },
	{ 0, "exportname", "NAME", COMMAND_RECONNECT | COMMAND_SNAPSHOT, VALUE(set_text, export_name),
	  "the export: there (the present one), or here (the only one)" },
	{ 'h', "help", "", COMMAND_ANY, OTHER(show_help), "show this text" },
	{ 'V', "version", "", COMMAND_ANY, OTHER(show_help), "show the version" },
#undef FIELD
};

static const struct program server = {
	"xnbd-server --target [options] [DISK_IMAGE]\n"
	"       xnbd-server --cow-target [options] [BASE_DISK_IMAGE]\n"
	"       xnbd-server --proxy [options] REMOTE_HOST REMOTE_PORT CACHE_IMAGE\n"
	"                   CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH\n"
	"Exports a disk image over the Network Block Device protocol.\n",
	"mode", "--target, --cow-target or --proxy", server_rows, ARRAY_SIZE(server_rows),
};

static const struct program bgctl = {
	"xnbd-bgctl --query [--json] CONTROL_SOCKET\n"
	"       xnbd-bgctl --watch[=SECONDS] CONTROL_SOCKET\n"
	"       xnbd-bgctl --snapshot [--exportname NAME] CONTROL_SOCKET\n"
	"       xnbd-bgctl --cache-all [--progress] [--blocks-per-request N] CONTROL_SOCKET\n"
	"       xnbd-bgctl --cache-all2 [--blocks-per-request N] CONTROL_SOCKET\n"
	"       xnbd-bgctl --switch [--force] CONTROL_SOCKET\n"
	"       xnbd-bgctl --reconnect [--exportname NAME] CONTROL_SOCKET HOST PORT\n"
	"Controls the xnbd-server that CONTROL_SOCKET belongs to.\n",
	"command", "--query, --watch, --snapshot, --cache-all, --cache-all2, --switch or --reconnect",
	bgctl_rows, ARRAY_SIZE(bgctl_rows),
};

/* Options of the server that contradict each other. */
static const char exclusive[][2][16] = {
	{ "logpath", "syslog" },      { "quiet", "verbose" },	       { "cow-dir", "cow-file" },
	{ "create", "readonly" },     { "export", "oldstyle" },	       { "inetd", "connected-fd" },
	{ "export", "connected-fd" }, { "oldstyle", "connected-fd" },
};

/* The words of the command line */

/* The option that getopt_long() means by a value, NULL if there is none. */
static const struct row *row_of_value(int value)
{
	const struct program *p = line.program;

	if (value >= FIRST_OPTION)
		return &p->rows[value - FIRST_OPTION];
	for (size_t i = 0; i < p->count; i++)
		if (value && p->rows[i].letter == value)
			return &p->rows[i];
	return NULL;
}

/* Whether there was an option of that name, which the program knows. */
static bool has(const char *name)
{
	size_t row = 0;

	while (strcmp(line.program->rows[row].name, name) != 0)
		row++;
	return line.given[row];
}

/* getopt_long() returned '?' or ':'. */
static _Noreturn void bad_option(int found)
{
	const struct row *r = row_of_value(optopt);
	const char *word = line.argv[optind - 1];

	if (r && found == ':')
		usage_error("option '--%s' needs a value: %s", r->name, r->arg);
	if (r)
		usage_error("option '--%s' takes no value, as in '%s'", r->name, word);
	if (optopt)
		usage_error("unknown option '-%c'", optopt);
	usage_error("unknown or ambiguous option '%s'", word);
}

/* The rows in getopt's form: letters of 2 * OPTIONS_MAX bytes, longopts of OPTIONS_MAX. */
static void translate_rows(char *letters, struct option *longopts)
{
	*letters++ = ':';
	for (size_t i = 0; i < line.program->count; i++) {
		const struct row *r = &line.program->rows[i];

		longopts[i].name = r->name;
		longopts[i].has_arg = !*r->arg	     ? no_argument :
				      *r->arg == '[' ? optional_argument :
						       required_argument;
		longopts[i].val = FIRST_OPTION + (int)i;
		if (r->letter)
			*letters++ = r->letter;
		if (r->letter && *r->arg)
			*letters++ = ':';
	}
}

/* Options may stand behind arguments, which optind counts afterwards. */
static void parse_options(const struct program *p, void *options, int argc, char **argv)
{
	struct option longopts[OPTIONS_MAX] = { 0 };
	char letters[2 * OPTIONS_MAX] = "";
	int found;

	assert(p->count < OPTIONS_MAX);
	line.program = p;
	line.argc = argc;
	line.argv = argv;
	translate_rows(letters, longopts);
	opterr = 0;
	while ((found = getopt_long(argc, argv, letters, longopts, NULL)) != -1) {
		const struct row *r = row_of_value(found);

		if (!r)
			bad_option(found);
		r->take(r, (char *)options + r->field, optarg);
		line.given[r - p->rows] = true;
	}
	if (!line.chosen)
		usage_error("no %s: %s is needed", p->choice, p->choices);
	for (size_t i = 0; i < p->count; i++)
		if (line.given[i] && !(p->rows[i].modes & line.chosen->modes))
			usage_error("option '--%s' does not belong to this %s", p->rows[i].name,
				    p->choice);
}

/* Arguments */

static const char *take_argument(const char *name)
{
	if (optind == line.argc)
		usage_error("%s is missing", name);
	return line.argv[optind++];
}

static void end_arguments(const char *last)
{
	if (optind < line.argc)
		usage_error("%s is the last argument, '%s' is too much", last, line.argv[optind]);
}

/* A host, and its port in front of so many more; that of unix:PATH is NULL, or left out. */
static const char *take_remote(const char *name, const char *port_name, const char **port, int more)
{
	const char *host = take_argument(name);
	bool local = strncmp(host, "unix:", strlen("unix:")) == 0;

	if (!*host || strcmp(host, "unix:") == 0)
		usage_error("%s '%s' names nothing", name, host);
	if (!local || line.argc - optind > more)
		*port = take_argument(port_name);
	if (local)
		*port = NULL;
	return host;
}

/* xnbd-server */

/* Options that contradict each other, or that would do nothing. */
static void check_together(const struct options *o)
{
	for (size_t i = 0; i < ARRAY_SIZE(exclusive); i++)
		if (has(exclusive[i][0]) && has(exclusive[i][1]))
			usage_error("--%s and --%s exclude each other", exclusive[i][0],
				    exclusive[i][1]);
	for (size_t i = 0; i < ARRAY_SIZE(server_rows); i++)
		if (line.given[i] && server_rows[i].modes == MODE_MANY &&
		    (o->inetd || o->connected_fd >= 0))
			usage_error("--%s is not for --inetd and --connected-fd",
				    server_rows[i].name);
	if (o->control && o->mode == MODE_PROXY)
		usage_error("--ctl is not for a proxy: its last argument is CONTROL_SOCKET_PATH");
	if (o->unix_mode && !o->unix_path)
		usage_error("--unix-mode needs --unix");
	if (o->of_tcp && o->unix_path && !o->lport_given && !o->laddrs)
		usage_error("%s is about TCP clients, and with --unix alone there are none", o->of_tcp);
}

static void take_proxy_arguments(struct options *o)
{
	unsigned long port;

	o->host = take_remote("REMOTE_HOST", "REMOTE_PORT", &o->port, 3);
	if (o->port && !parse_number(o->port, 1, 65535, &port))
		usage_error("REMOTE_PORT: '%s' is not a number from 1 to 65535", o->port);
	o->export->path = take_argument("CACHE_IMAGE");
	o->bitmap = take_argument("CACHE_BITMAP_IMAGE");
	o->control = take_argument("CONTROL_SOCKET_PATH");
	end_arguments("CONTROL_SOCKET_PATH");
}

static void take_image(struct options *o)
{
	if (o->exports == 1 || optind < line.argc) {
		o->export->path = take_argument("DISK_IMAGE");
	} else {		/* all images have names */
		o->export++;
		o->exports--;
	}
	end_arguments("DISK_IMAGE");
	if (o->cow_file && o->exports > 1)
		usage_error("--cow-file is the overlay of one image, there can be no others");
}

void options_parse(struct options *o, int argc, char **argv)
{
	*o = (struct options){
		.lport = DEFAULT_PORT,
		.max_connections = 4096,
		.connected_fd = -1,
		.export_name = "",
		.origin_connections = 2,
		.origin_timeout = 15,
		.keepalive = 300,
	};
	add_image(o, "", NULL);		/* whose path is an argument, and which is the first */
	parse_options(&server, o, argc, argv);
	o->mode = line.chosen->modes;
	o->lport_given = has("lport");
	o->create = has("create");
	o->of_tcp = has("allow") ? "--allow" : o->max_per_host ? "--max-per-host" :
		    has("keepalive") ? "--keepalive" : NULL;
	check_together(o);
	if (o->mode == MODE_PROXY)
		take_proxy_arguments(o);
	else
		take_image(o);
}

/* xnbd-bgctl */

/* It becomes a word of the line to the server. */
static void check_word(const char *what, const char *word)
{
	if (!*word || strpbrk(word, " \r\n"))
		usage_error("%s '%s': it must have a character, no blank and no line break", what,
			    word);
}

static void take_new_origin(struct bgctl_options *o)
{
	o->host = take_remote("HOST", "PORT", &o->port, 0);
	if (!o->port)		/* the server may have another working directory */
		o->host = not_null(absolute_path(o->host + strlen("unix:")));
	else
		check_word("PORT", o->port);
	check_word("HOST", o->host);
}

void options_parse_bgctl(struct bgctl_options *o, int argc, char **argv)
{
	*o = (struct bgctl_options){ 0 };
	parse_options(&bgctl, o, argc, argv);
	o->command = line.chosen->name;
	if (o->export_name && strpbrk(o->export_name, "\r\n"))
		usage_error("option '--exportname': the name must have no line break");
	if (has("shutdown")) {
		log_line("--shutdown is deprecated, its name is --switch now");
		o->command = "switch";
	}
	if (line.chosen->modes == COMMAND_WATCH && !o->seconds && argc - optind == 2)
		set_number(line.chosen, &o->seconds, argv[optind++]);	/* --watch SECONDS */
	if (!o->seconds)
		o->seconds = 1;
	o->socket = take_argument("CONTROL_SOCKET");
	if (line.chosen->modes == COMMAND_RECONNECT)
		take_new_origin(o);
	end_arguments(o->host ? "PORT" : "CONTROL_SOCKET");
}
