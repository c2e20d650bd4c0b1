/*
 * options.c - the command lines of both programs: see options.h.
 *
 * A table for each program drives the parser, the checks and --help.
 */
#define _GNU_SOURCE
#include "options.h"

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

enum { DEFAULT_PORT = 8520 };

enum kind {
	KIND_MODE,	/* unsigned, the first member: the mode, or command; a value is a number */
	KIND_FLAG,	/* bool */
	KIND_STRING,	/* const char *, of min bytes at least */
	KIND_NUMBER,	/* unsigned long, or long; from min to max */
	KIND_SIZE,	/* uint64_t, bytes */
	KIND_OCTAL,	/* unsigned long, a mode of a file */
	KIND_LADDR,
	KIND_EXPORT,
	KIND_ALLOW,
	KIND_HELP,
	KIND_VERSION,
};

struct known {
	char letter;			/* 0 for none */
	const char *name;
	const char *arg;		/* its name in the usage text, NULL for none; [X] is optional */
	unsigned char modes;		/* in which it means something; or which it is */
	unsigned char kind;		/* enum kind */
	unsigned short field;		/* of the options: where the value goes */
	unsigned long min, max;
	const char *help;
};

/* Kind, field, min and max. */
#define FLAG(field) KIND_FLAG, FIELD(field), 0, 0
#define TEXT(field) KIND_STRING, FIELD(field), 1, 0
#define NUMBER(field, min, max) KIND_NUMBER, FIELD(field), min, max
#define VALUE(kind, field) kind, FIELD(field), 0, 0
#define OTHER(kind) kind, 0, 0, 0

struct program {
	const char *usage;
	const char *choice, *choices;	/* what KIND_MODE is called, and all there are */
	const struct known *known;
	size_t count;
};

static const struct known server_known[] = {
#define FIELD(name) offsetof(struct options, name)
	{ 't', "target", NULL, MODE_TARGET, OTHER(KIND_MODE), "export a disk image" },
	{ 'c', "cow-target", NULL, MODE_COW_TARGET, OTHER(KIND_MODE),
	  "export a base image, keep writes in an overlay" },
	{ 'p', "proxy", NULL, MODE_PROXY, OTHER(KIND_MODE),
	  "cache a remote server's disk, and move it here" },
	{ 'l', "lport", "PORT", MODE_ANY, NUMBER(lport, 0, 65535),
	  "TCP port to listen on, 0 for a free one (8520)" },
	{ 0, "laddr", "ADDR", MODE_ANY, OTHER(KIND_LADDR),
	  "address or name to listen on, may be repeated (all)" },
	{ 0, "unix", "PATH", MODE_ANY, TEXT(unix_path),
	  "Unix socket to listen on; without --lport and --laddr, there alone" },
	{ 0, "unix-mode", "MODE", MODE_ANY, VALUE(KIND_OCTAL, unix_mode),
	  "mode of that socket, such as 0660 (what the umask leaves)" },
	{ 0, "allow", "ADDRESS", MODE_ANY, OTHER(KIND_ALLOW),
	  "TCP clients that may connect: ADDRESS[/PREFIX], may be repeated (all)" },
	{ 0, "max-connections", "N", MODE_ANY, NUMBER(max_connections, 1, 65536),
	  "clients at a time, at most (4096)" },
	{ 0, "max-per-host", "N", MODE_ANY, NUMBER(max_per_host, 1, 65536),
	  "of those, clients of one address (all)" },
	{ 0, "keepalive", "SECONDS", MODE_ANY, NUMBER(keepalive, 0, 36000),
	  "a client whose host is silent for so long is gone (300, 0 for never)" },
	{ 'i', "inetd", NULL, MODE_ANY, FLAG(inetd), "serve the one client on standard input" },
	{ 0, "connected-fd", "N", MODE_ANY, NUMBER(connected_fd, 0, INT_MAX),
	  "serve the one client on descriptor N, already negotiated" },
	{ 0, "oldstyle", NULL, MODE_ANY, FLAG(oldstyle),
	  "greet like old servers, without negotiation" },
	{ 0, "export", "NAME=PATH", MODE_TARGET | MODE_COW_TARGET, OTHER(KIND_EXPORT),
	  "export the image PATH by that name, may be repeated" },
	{ 'r', "readonly", NULL, MODE_ANY, FLAG(readonly), "refuse writes" },
	{ 0, "create", "SIZE", MODE_TARGET, VALUE(KIND_SIZE, create_size),
	  "create a sparse image of SIZE (512M, 10G, ...) if there is none" },
	{ 0, "cow-dir", "DIR", MODE_COW_TARGET, TEXT(cow_dir),
	  "where the overlay goes, which has no name (beside the base)" },
	{ 0, "cow-file", "PATH", MODE_COW_TARGET, TEXT(cow_file),
	  "keep the overlay in PATH and PATH.map, and go on from there" },
	{ 0, "target-exportname", "NAME", MODE_PROXY, VALUE(KIND_STRING, export_name),
	  "name of the remote server's export (the empty name)" },
	{ 0, "clear-bitmap", NULL, MODE_PROXY, FLAG(clear_bitmap), "forget what is cached" },
	{ 0, "max-queue-size", "N", MODE_ANY, NUMBER(max_queue_size, 0, INT_MAX),
	  "requests of all clients that may wait (0: 8192)" },
	{ 0, "max-buf-size", "SIZE", MODE_ANY, VALUE(KIND_SIZE, max_buf_size),
	  "memory for the data of those (0: 3M)" },
	{ 0, "origin-connections", "N", MODE_PROXY, NUMBER(origin_connections, 1, 16),
	  "connections to the remote server, at most (2)" },
	{ 0, "origin-timeout", "SECONDS", MODE_PROXY, NUMBER(origin_timeout, 1, 3600),
	  "connect again when it is silent for so long (15)" },
	{ 0, "threads", "N", MODE_ANY, NUMBER(threads, 1, 1024),
	  "threads that connections are spread over, at most" },
	{ 'd', "daemonize", NULL, MODE_ANY, FLAG(daemonize),
	  "return when clients can connect, and go on in the background" },
	{ 0, "pidfile", "PATH", MODE_ANY, TEXT(pidfile), "write the process id there" },
	{ 'L', "logpath", "FILE", MODE_ANY, TEXT(logpath), "log to FILE; SIGHUP opens it again" },
	{ 0, "syslog", NULL, MODE_ANY, FLAG(syslog),
	  "log to syslog (with --inetd or --daemonize the default)" },
	{ 0, "user", "NAME", MODE_ANY, TEXT(user), "become NAME[:GROUP] before serving anybody" },
	{ 0, "no-sandbox", NULL, MODE_ANY, FLAG(no_sandbox),
	  "keep access to all files and to the network" },
	{ 0, "ctl", "PATH", MODE_ANY, TEXT(control),
	  "control socket, for xnbd-bgctl; a proxy has one without" },
	{ 0, "quiet", NULL, MODE_ANY, FLAG(quiet), "log errors only" },
	{ 0, "verbose", NULL, MODE_ANY, FLAG(verbose),
	  "log what clients negotiate, and each request that is refused" },
	{ 0, "stats", "SECONDS", MODE_ANY, NUMBER(stats, 1, 86400),
	  "log every so often what each client did" },
	{ 'h', "help", NULL, MODE_ANY, OTHER(KIND_HELP), "show this text" },
	{ 'V', "version", NULL, MODE_ANY, OTHER(KIND_VERSION), "show the version" },
#undef FIELD
};

static const struct known bgctl_known[] = {
#define FIELD(name) offsetof(struct bgctl_options, name)
	{ 'q', "query", NULL, COMMAND_QUERY, OTHER(KIND_MODE), "show the state of the server" },
	{ 0, "watch", "[SECONDS]", COMMAND_WATCH, KIND_MODE, FIELD(seconds), 1, 3600,
	  "show what clients do, again and again (1)" },
	{ 0, "snapshot", NULL, COMMAND_SNAPSHOT, OTHER(KIND_MODE),
	  "make a snapshot of a target's image" },
	{ 'c', "cache-all", NULL, COMMAND_CACHE_ALL, OTHER(KIND_MODE),
	  "copy what is missing, and return when all is here" },
	{ 'C', "cache-all2", NULL, COMMAND_CACHE_ALL2, OTHER(KIND_MODE),
	  "copy what is missing in the background, and return at once" },
	{ 's', "switch", NULL, COMMAND_SWITCH, OTHER(KIND_MODE),
	  "become a target: the origin is not needed any more" },
	{ 0, "shutdown", NULL, COMMAND_SWITCH, OTHER(KIND_MODE), "the old name of --switch" },
	{ 'r', "reconnect", NULL, COMMAND_RECONNECT, OTHER(KIND_MODE),
	  "go over to another origin" },
	{ 0, "json", NULL, COMMAND_QUERY, FLAG(json), "as one JSON object" },
	{ 0, "progress", NULL, COMMAND_CACHE_ALL, FLAG(progress), "show how the copy is going" },
	{ 0, "blocks-per-request", "N", COMMAND_CACHE_ALL | COMMAND_CACHE_ALL2, NUMBER(blocks, 1, 8192),
	  "ask the origin for N blocks of 4096 bytes at once (64)" },
	{ 0, "force", NULL, COMMAND_SWITCH, FLAG(force),
	  "even if blocks are missing, which read as zeros then" },
	{ 0, "exportname", "NAME", COMMAND_RECONNECT | COMMAND_SNAPSHOT, VALUE(KIND_STRING, export_name),
	  "the export: there (the present one), or here (the only one)" },
	{ 'h', "help", NULL, COMMAND_ANY, OTHER(KIND_HELP), "show this text" },
	{ 'V', "version", NULL, COMMAND_ANY, OTHER(KIND_VERSION), "show the version" },
#undef FIELD
};

static const struct program server = {
	"xnbd-server --target [options] [DISK_IMAGE]\n"
	"       xnbd-server --cow-target [options] [BASE_DISK_IMAGE]\n"
	"       xnbd-server --proxy [options] REMOTE_HOST REMOTE_PORT CACHE_IMAGE\n"
	"                   CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH\n"
	"Exports a disk image over the Network Block Device protocol.\n",
	"mode", "--target, --cow-target or --proxy", server_known, ARRAY_SIZE(server_known),
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
	bgctl_known, ARRAY_SIZE(bgctl_known),
};

/* Options of the server that contradict each other. */
static const char *const exclusive[][2] = {
	{ "logpath", "syslog" },      { "quiet", "verbose" },
	{ "cow-dir", "cow-file" },    { "create", "readonly" },
	{ "export", "oldstyle" },     { "export", "connected-fd" },
	{ "inetd", "connected-fd" },  { "oldstyle", "connected-fd" },
	{ "inetd", "daemonize" },     { "connected-fd", "daemonize" },
	{ "inetd", "lport" },	      { "connected-fd", "lport" },
	{ "inetd", "laddr" },	      { "connected-fd", "laddr" },
	{ "inetd", "unix" },	      { "connected-fd", "unix" },
	{ "inetd", "threads" },	      { "connected-fd", "threads" },
	{ "inetd", "max-connections" }, { "connected-fd", "max-connections" },
	{ "inetd", "max-per-host" },  { "connected-fd", "max-per-host" },
};

enum {
	FIRST_OPTION = 256,		/* getopt's values for the rows begin here: not a character */
	OPTIONS_MAX = 64,		/* one bit for each, and the end */
};

static _Noreturn void usage_error(const char *fmt, ...) PRINTF_LIKE(1, 2);

static _Noreturn void usage_error(const char *fmt, ...)
{
	char line[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	log_failure("%s (see --help)", line);
	exit(EXIT_USAGE);
}

static _Noreturn void end_output(void)
{
	flush_output();
	exit(EXIT_SUCCESS);
}

static _Noreturn void show_help(const struct program *p)
{
	printf("usage: %s\n", p->usage);
	for (size_t i = 0; i < p->count; i++) {
		const struct known *k = &p->known[i];
		char letter[] = "-x, ", name[64];

		letter[1] = k->letter;
		snprintf(name, sizeof(name), "%s--%s%s%s", k->letter ? letter : "    ", k->name,
			 k->arg ? " " : "", k->arg ? k->arg : "");
		printf("  %-28s %s\n", name, k->help);
	}
	end_output();
}

static void add_laddr(struct options *o, const char *value)
{
	o->laddr = not_null(realloc(o->laddr, (o->laddrs + 1) * sizeof(*o->laddr)));
	o->laddr[o->laddrs++] = value;
}

/* The first '=' ends the name. */
static void add_export(struct options *o, const char *value)
{
	const char *path = strchr(value, '=');
	struct named_image *e;

	if (!path || path == value || !path[1])
		usage_error("option '--export': NAME=PATH is expected, and not '%s'", value);
	o->export = not_null(realloc(o->export, (o->exports + 1) * sizeof(*e)));
	e = &o->export[o->exports];
	e->path = path + 1;
	e->name = not_null(strndup(value, (size_t)(path - value)));
	if (!proto_is_string(e->name))
		usage_error("option '--export': a name has at most %d bytes of UTF-8, and is not "
			    "'%s'", PROTO_STRING_MAX, e->name);
	for (unsigned i = 0; i < o->exports; i++)
		if (strcmp(o->export[i].name, e->name) == 0)
			usage_error("option '--export': two images have the name '%s'", e->name);
	o->exports++;
}

static void add_allow(struct options *o, const char *value)
{
	const char *wrong;

	o->allow = not_null(realloc(o->allow, (o->allows + 1) * sizeof(*o->allow)));
	wrong = access_parse(&o->allow[o->allows++], value);
	if (wrong)
		usage_error("option '--allow': '%s' %s", value, wrong);
}

/* The mode of a file, in octal: its permissions, of which there must be some. */
static void set_octal(const struct known *k, const char *value, unsigned long *mode)
{
	*mode = strtoul(value, NULL, 8);
	if (strspn(value, "01234567") != strlen(value) || *mode == 0 || *mode > 0777)
		usage_error("option '--%s': '%s' is not a mode from 1 to 0777, in octal", k->name,
			    value);
}

static void set_number(const struct known *k, const char *value, unsigned long *n)
{
	if (!parse_number(value, k->min, k->max, n))
		usage_error("option '--%s': '%s' is not a number from %lu to %lu", k->name, value,
			    k->min, k->max);
}

static void set_mode(const struct program *p, unsigned *mode, const struct known *k)
{
	if (*mode != 0)
		usage_error("option '--%s': a %s was chosen before, and there can be one only",
			    k->name, p->choice);
	*mode = k->modes;
}

/* A number of bytes such as 512, 64K, 10M, 1G, 4T (powers of 1024).  False if it is none. */
static bool parse_size(const char *s, uint64_t *value)
{
	static const char units[] = "KMGT";
	const char *unit;
	unsigned shift = 0;
	char *end;

	if (*s < '0' || *s > '9')
		return false;
	errno = 0;
	*value = strtoull(s, &end, 10);
	if (*end) {
		unit = strchr(units, *end >= 'a' ? *end - 'a' + 'A' : *end);
		if (!unit || end[1])
			return false;
		shift = 10 * (unsigned)(unit - units + 1);
	}
	if (errno || *value > UINT64_MAX >> shift)
		return false;
	*value <<= shift;
	return true;
}

static void set_option(const struct program *p, void *o, const struct known *k, const char *value)
{
	char *field = (char *)o + k->field;

	switch ((enum kind)k->kind) {
	case KIND_MODE:
		set_mode(p, o, k);
		if (value)
			set_number(k, value, (unsigned long *)field);
		break;
	case KIND_FLAG:
		*(bool *)field = true;
		break;
	case KIND_STRING:
		if (strlen(value) < k->min)
			usage_error("option '--%s' needs a value that is not empty", k->name);
		*(const char **)field = value;
		break;
	case KIND_NUMBER:
		set_number(k, value, (unsigned long *)field);
		break;
	case KIND_SIZE:
		if (!parse_size(value, (uint64_t *)field))
			usage_error("option '--%s': '%s' is not a size such as 512M or 10G",
				    k->name, value);
		break;
	case KIND_OCTAL:
		set_octal(k, value, (unsigned long *)field);
		break;
	case KIND_ALLOW:
		add_allow(o, value);
		break;
	case KIND_LADDR:
		add_laddr(o, value);
		break;
	case KIND_EXPORT:
		add_export(o, value);
		break;
	case KIND_HELP:
		show_help(p);
	case KIND_VERSION:
		/* The program's name is the first word of its usage. */
		printf("%.*s %s\n", (int)strcspn(p->usage, " "), p->usage, XNBD_VERSION);
		end_output();
	}
}

/* The option that getopt_long() means by a value, NULL if there is none. */
static const struct known *find_value(const struct program *p, int value)
{
	if (value >= FIRST_OPTION)
		return &p->known[value - FIRST_OPTION];
	for (size_t i = 0; i < p->count; i++)
		if (value && p->known[i].letter == value)
			return &p->known[i];
	return NULL;
}

/* The row of an option that there is. */
static const struct known *row_of(const struct program *p, const char *name)
{
	const struct known *k = p->known;

	while (strcmp(k->name, name) != 0)
		k++;
	return k;
}

/* Whether the words had that option; seen has a bit for each row. */
static bool has(const struct program *p, uint64_t seen, const char *name)
{
	return seen & UINT64_C(1) << (row_of(p, name) - p->known);
}

/* getopt_long() returned '?' or ':'; word is the argument that it looked at last. */
static _Noreturn void bad_option(const struct program *p, int found, const char *word)
{
	const struct known *k = find_value(p, optopt);

	if (k && found == ':')
		usage_error("option '--%s' needs a value: %s", k->name, k->arg);
	if (k)
		usage_error("option '--%s' takes no value, as in '%s'", k->name, word);
	if (optopt)
		usage_error("unknown option '-%c'", optopt);
	usage_error("unknown or ambiguous option '%s'", word);
}

/* In getopt's form; letters of 2 * OPTIONS_MAX bytes, longopts of OPTIONS_MAX. */
static void translate(const struct program *p, char *letters, struct option *longopts)
{
	*letters++ = ':';
	for (size_t i = 0; i < p->count; i++) {
		const struct known *k = &p->known[i];

		longopts[i].name = k->name;
		longopts[i].has_arg = !k->arg	      ? no_argument :
				      *k->arg == '[' ? optional_argument :
						       required_argument;
		longopts[i].val = FIRST_OPTION + (int)i;
		if (k->letter)
			*letters++ = k->letter;
		if (k->letter && k->arg)
			*letters++ = ':';
	}
}

/* Returns a bit for each option that was there. */
static uint64_t parse_words(const struct program *p, void *o, int argc, char **argv)
{
	struct option longopts[OPTIONS_MAX] = { 0 };
	char letters[2 * OPTIONS_MAX] = "";
	uint64_t seen = 0;
	int found;

	assert(p->count < OPTIONS_MAX);
	translate(p, letters, longopts);
	opterr = 0;
	while ((found = getopt_long(argc, argv, letters, longopts, NULL)) != -1) {
		const struct known *k = find_value(p, found);

		if (!k)
			bad_option(p, found, argv[optind - 1]);
		set_option(p, o, k, optarg);
		seen |= UINT64_C(1) << (k - p->known);
	}
	return seen;
}

static void check_modes(const struct program *p, unsigned mode, uint64_t seen)
{
	if (mode == 0)
		usage_error("no %s: %s is needed", p->choice, p->choices);
	for (size_t i = 0; i < p->count; i++) {
		if (!(seen & UINT64_C(1) << i))
			continue;
		if (!(p->known[i].modes & mode))
			usage_error("option '--%s' does not belong to this %s", p->known[i].name,
				    p->choice);
	}
}

/* Options of the server that contradict each other, or that would do nothing. */
static void check_together(const struct options *o, uint64_t seen)
{
	for (size_t i = 0; i < ARRAY_SIZE(exclusive); i++) {
		const char *one = exclusive[i][0], *other = exclusive[i][1];

		if (has(&server, seen, one) && has(&server, seen, other))
			usage_error("--%s and --%s exclude each other", one, other);
	}
	if (o->control && o->mode == MODE_PROXY)
		usage_error("--ctl is not for a proxy: its last argument is CONTROL_SOCKET_PATH");
	if (o->unix_mode && !o->unix_path)
		usage_error("--unix-mode needs --unix");
	if (o->allows && o->unix_path && !o->lport_given && !o->laddrs)
		usage_error("--allow is about TCP clients, and with --unix alone there are none");
}

/* What stands behind the options, in order, and where it goes. */
static void take_arguments(const char *const *name, const char **const *field, int n, int argc,
			   char **argv)
{
	int given = argc - optind;

	if (given < n)
		usage_error("%s is missing", name[given]);
	if (given > n)
		usage_error("%s is the last argument, '%s' is too much", name[n - 1],
			    argv[optind + n]);
	for (int i = 0; i < n; i++)
		*field[i] = argv[optind + i];
}

static bool is_unix(const char *what, const char *host)
{
	if (strncmp(host, "unix:", strlen("unix:")) != 0)
		return false;
	if (!host[strlen("unix:")])
		usage_error("%s: '%s' has no path", what, host);
	return true;
}

static void take_proxy_arguments(struct options *o, int argc, char **argv)
{
	static const char *const name[] = { "REMOTE_HOST", "REMOTE_PORT", "CACHE_IMAGE",
					    "CACHE_BITMAP_IMAGE", "CONTROL_SOCKET_PATH" };
	const char **const field[] = { &o->host, &o->port, &o->image, &o->bitmap, &o->control };
	unsigned long port;

	/* A Unix socket has no port; it may be left out. */
	if (optind < argc && is_unix("REMOTE_HOST", argv[optind]) && argc - optind < 5) {
		o->host = argv[optind++];
		take_arguments(name + 2, field + 2, 3, argc, argv);
		return;
	}
	take_arguments(name, field, 5, argc, argv);
	if (is_unix("REMOTE_HOST", o->host))
		o->port = NULL;
	else if (!parse_number(o->port, 1, 65535, &port))
		usage_error("REMOTE_PORT: '%s' is not a number from 1 to 65535", o->port);
	if (!*o->host)
		usage_error("REMOTE_HOST is empty");
}

static void take_image(struct options *o, int argc, char **argv)
{
	static const char *const name[] = { "DISK_IMAGE" };
	const char **const field[] = { &o->image };

	if (o->exports == 0 || optind < argc)
		take_arguments(name, field, 1, argc, argv);
	if (o->cow_file && o->exports + (o->image != NULL) > 1)
		usage_error("--cow-file is the overlay of one image, there can be no others");
}

void options_parse(struct options *o, int argc, char **argv)
{
	uint64_t seen;

	memset(o, 0, sizeof(*o));
	o->lport = DEFAULT_PORT;
	o->connected_fd = -1;
	o->export_name = "";
	o->origin_connections = 2;
	o->origin_timeout = 15;
	o->keepalive = 300;
	seen = parse_words(&server, o, argc, argv);
	o->lport_given = has(&server, seen, "lport");
	o->create = has(&server, seen, "create");
	check_modes(&server, o->mode, seen);
	check_together(o, seen);
	if (o->mode == MODE_PROXY)
		take_proxy_arguments(o, argc, argv);
	else
		take_image(o, argc, argv);
}

/* It becomes a word of the line to the server. */
static void check_word(const char *what, const char *word)
{
	if (!*word || strpbrk(word, " \r\n"))
		usage_error("%s '%s': it must have a character, no blank and no line break", what,
			    word);
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

/* A Unix socket has no port; what stands there is left out. */
static void take_remote(struct bgctl_options *o, int argc, char **argv)
{
	static const char *const name[] = { "CONTROL_SOCKET", "HOST", "PORT" };
	const char **const field[] = { &o->socket, &o->host, &o->port };
	bool local = argc - optind > 1 && is_unix("HOST", argv[optind + 1]);

	take_arguments(name, field, local && argc - optind == 2 ? 2 : 3, argc, argv);
	if (local) {
		o->host = from_root(o->host);
		o->port = "-";
	}
	check_word("HOST", o->host);
	check_word("PORT", o->port);
}

void options_parse_bgctl(struct bgctl_options *o, int argc, char **argv)
{
	static const char *const name[] = { "CONTROL_SOCKET" };
	const char **const field[] = { &o->socket };

	uint64_t seen;

	memset(o, 0, sizeof(*o));
	seen = parse_words(&bgctl, o, argc, argv);
	check_modes(&bgctl, o->command, seen);
	if (o->export_name && strpbrk(o->export_name, "\r\n"))
		usage_error("option '--exportname': the name must have no line break");
	if (has(&bgctl, seen, "shutdown"))
		log_line("--shutdown is deprecated, its name is --switch now");
	if (o->command == COMMAND_WATCH && !o->seconds && argc - optind == 2)	/* --watch SECONDS */
		set_number(row_of(&bgctl, "watch"), argv[optind++], &o->seconds);
	if (!o->seconds)
		o->seconds = 1;
	if (o->command == COMMAND_RECONNECT)
		take_remote(o, argc, argv);
	else
		take_arguments(name, field, 1, argc, argv);
}

void options_free(struct options *o)
{
	for (unsigned i = 0; i < o->exports; i++)
		free(o->export[i].name);
	free(o->export);
	free(o->laddr);
	free(o->allow);
}
