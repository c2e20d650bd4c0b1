/*
 * options.c - the command line of xnbd-server: see options.h.
 *
 * One table drives the parser and the usage text.
 */
#define _GNU_SOURCE
#include "options.h"

#include "util.h"
#include "xnbd.h"

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
	KIND_MODE,
	KIND_FLAG,	/* bool */
	KIND_STRING,	/* const char *, not empty */
	KIND_NAME,	/* const char * */
	KIND_NUMBER,	/* unsigned long, from min to max */
	KIND_FD,	/* long */
	KIND_SIZE,	/* uint64_t, bytes */
	KIND_OCTAL,	/* unsigned long, a mode of a file */
	KIND_LADDR,
	KIND_EXPORT,
	KIND_ALLOW,
	KIND_HELP,
	KIND_VERSION,
};

static const struct known {
	const char *name;
	const char *arg;		/* its name in the usage text, NULL for none */
	unsigned char kind, modes;	/* enum kind; the modes in which it means something */
	unsigned short field;		/* of struct options: where the value goes */
	unsigned short given;		/* likewise: a bool to set, 0 for none */
	unsigned long min, max;
	const char *help;
} known[] = {
#define FIELD(name) offsetof(struct options, name)
	{ "target", NULL, KIND_MODE, MODE_TARGET, 0, 0, 0, 0, "export a disk image" },
	{ "cow-target", NULL, KIND_MODE, MODE_COW_TARGET, 0, 0, 0, 0,
	  "export a base image, keep writes in an overlay" },
	{ "proxy", NULL, KIND_MODE, MODE_PROXY, 0, 0, 0, 0,
	  "cache a remote server's disk, and move it here" },
	{ "lport", "PORT", KIND_NUMBER, MODE_ANY, FIELD(lport), FIELD(lport_given), 0, 65535,
	  "TCP port to listen on, 0 for a free one (8520)" },
	{ "laddr", "ADDR", KIND_LADDR, MODE_ANY, 0, 0, 0, 0,
	  "address or name to listen on, may be repeated (all)" },
	{ "unix", "PATH", KIND_STRING, MODE_ANY, FIELD(unix_path), 0, 0, 0,
	  "Unix socket to listen on; without --lport and --laddr, there alone" },
	{ "unix-mode", "MODE", KIND_OCTAL, MODE_ANY, FIELD(unix_mode), 0, 0, 0,
	  "mode of that socket, such as 0660 (what the umask leaves)" },
	{ "allow", "ADDRESS", KIND_ALLOW, MODE_ANY, 0, 0, 0, 0,
	  "TCP clients that may connect: ADDRESS[/PREFIX], may be repeated (all)" },
	{ "max-connections", "N", KIND_NUMBER, MODE_ANY, FIELD(max_connections), 0, 1, 65536,
	  "clients at a time, at most (4096)" },
	{ "inetd", NULL, KIND_FLAG, MODE_ANY, FIELD(inetd), 0, 0, 0,
	  "serve the one client on standard input" },
	{ "connected-fd", "N", KIND_FD, MODE_ANY, FIELD(connected_fd), 0, 0, INT_MAX,
	  "serve the one client on descriptor N, already negotiated" },
	{ "oldstyle", NULL, KIND_FLAG, MODE_ANY, FIELD(oldstyle), 0, 0, 0,
	  "greet like old servers, without negotiation" },
	{ "export", "NAME=PATH", KIND_EXPORT, MODE_TARGET | MODE_COW_TARGET, 0, 0, 0, 0,
	  "export the image PATH by that name, may be repeated" },
	{ "readonly", NULL, KIND_FLAG, MODE_ANY, FIELD(readonly), 0, 0, 0,
	  "refuse writes" },
	{ "create", "SIZE", KIND_SIZE, MODE_TARGET, FIELD(create_size), FIELD(create), 0, 0,
	  "create a sparse image of SIZE (512M, 10G, ...) if there is none" },
	{ "cow-dir", "DIR", KIND_STRING, MODE_COW_TARGET, FIELD(cow_dir), 0, 0, 0,
	  "where the overlay goes, which has no name (beside the base)" },
	{ "cow-file", "PATH", KIND_STRING, MODE_COW_TARGET, FIELD(cow_file), 0, 0, 0,
	  "keep the overlay in PATH and PATH.map, and go on from there" },
	{ "target-exportname", "NAME", KIND_NAME, MODE_PROXY, FIELD(export_name), 0, 0, 0,
	  "name of the remote server's export (the empty name)" },
	{ "clear-bitmap", NULL, KIND_FLAG, MODE_PROXY, FIELD(clear_bitmap), 0, 0, 0,
	  "forget what is cached" },
	{ "max-queue-size", "N", KIND_NUMBER, MODE_PROXY, FIELD(max_queue_size), 0, 0, INT_MAX,
	  "requests of all clients that may wait (0: 512 of each)" },
	{ "max-buf-size", "SIZE", KIND_SIZE, MODE_PROXY, FIELD(max_buf_size), 0, 0, 0,
	  "memory for the data of those (0: 2M of each)" },
	{ "origin-connections", "N", KIND_NUMBER, MODE_PROXY, FIELD(origin_connections), 0, 1, 16,
	  "connections to the remote server, at most (2)" },
	{ "origin-timeout", "SECONDS", KIND_NUMBER, MODE_PROXY, FIELD(origin_timeout), 0, 1, 3600,
	  "connect again when it is silent for so long (15)" },
	{ "threads", "N", KIND_NUMBER, MODE_ANY, FIELD(threads), 0, 1, 1024,
	  "threads that connections are spread over, at most" },
	{ "daemonize", NULL, KIND_FLAG, MODE_ANY, FIELD(daemonize), 0, 0, 0,
	  "return when clients can connect, and go on in the background" },
	{ "pidfile", "PATH", KIND_STRING, MODE_ANY, FIELD(pidfile), 0, 0, 0,
	  "write the process id there" },
	{ "logpath", "FILE", KIND_STRING, MODE_ANY, FIELD(logpath), 0, 0, 0,
	  "log to FILE; SIGHUP opens it again" },
	{ "syslog", NULL, KIND_FLAG, MODE_ANY, FIELD(syslog), 0, 0, 0,
	  "log to syslog (with --inetd or --daemonize the default)" },
	{ "user", "NAME", KIND_STRING, MODE_ANY, FIELD(user), 0, 0, 0,
	  "become NAME[:GROUP] before serving anybody" },
	{ "no-sandbox", NULL, KIND_FLAG, MODE_ANY, FIELD(no_sandbox), 0, 0, 0,
	  "keep access to all files and to the network" },
	{ "ctl", "PATH", KIND_STRING, MODE_ANY, FIELD(control), 0, 0, 0,
	  "control socket, for xnbd-bgctl; a proxy has one without" },
	{ "quiet", NULL, KIND_FLAG, MODE_ANY, FIELD(quiet), 0, 0, 0, "log errors only" },
	{ "verbose", NULL, KIND_FLAG, MODE_ANY, FIELD(verbose), 0, 0, 0,
	  "log what clients negotiate, and each request that is refused" },
	{ "stats", "SECONDS", KIND_NUMBER, MODE_ANY, FIELD(stats), 0, 1, 86400,
	  "log every so often what each client did" },
	{ "help", NULL, KIND_HELP, MODE_ANY, 0, 0, 0, 0, "show this text" },
	{ "version", NULL, KIND_VERSION, MODE_ANY, 0, 0, 0, 0, "show the version" },
#undef FIELD
};

enum { FIRST_OPTION = 256 };	/* getopt's values for known[0] and so on: not a character */

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

static void say(const char *fmt, ...) PRINTF_LIKE(1, 2);

/* On standard output, without what stdio takes for it. */
static void say(const char *fmt, ...)
{
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vdprintf(STDOUT_FILENO, fmt, ap);
	va_end(ap);
	if (n < 0)
		exit(EXIT_FAILURE);
}

static _Noreturn void show_help(void)
{
	say("usage: xnbd-server --target [options] [DISK_IMAGE]\n"
	    "       xnbd-server --cow-target [options] [BASE_DISK_IMAGE]\n"
	    "       xnbd-server --proxy [options] REMOTE_HOST REMOTE_PORT CACHE_IMAGE\n"
	    "                   CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH\n"
	    "Exports a disk image over the Network Block Device protocol.\n\n");
	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		const struct known *k = &known[i];
		char name[64];

		snprintf(name, sizeof(name), "--%s%s%s", k->name, k->arg ? " " : "",
			 k->arg ? k->arg : "");
		say("  %-24s %s\n", name, k->help);
	}
	exit(EXIT_SUCCESS);
}

static _Noreturn void show_version(void)
{
	say("xnbd-server %s\n", XNBD_VERSION);
	exit(EXIT_SUCCESS);
}

static void *not_null(void *memory)
{
	if (!memory)
		usage_error("out of memory");
	return memory;
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

static void set_mode(struct options *o, const struct known *k)
{
	if (o->mode != MODE_NONE)
		usage_error("option '--%s': a mode was chosen before, and there can be one only",
			    k->name);
	o->mode = (enum mode)k->modes;
}

static void set_number(const struct known *k, const char *value, unsigned long *n)
{
	if (!parse_number(value, k->min, k->max, n))
		usage_error("option '--%s': '%s' is not a number from %lu to %lu", k->name, value,
			    k->min, k->max);
}

static void set_option(struct options *o, const struct known *k, const char *value)
{
	char *field = (char *)o + k->field;
	unsigned long n;

	switch ((enum kind)k->kind) {
	case KIND_MODE:
		set_mode(o, k);
		break;
	case KIND_FLAG:
		*(bool *)field = true;
		break;
	case KIND_STRING:
		if (!*value)
			usage_error("option '--%s' needs a value that is not empty", k->name);
		*(const char **)field = value;
		break;
	case KIND_NAME:
		*(const char **)field = value;
		break;
	case KIND_NUMBER:
		set_number(k, value, (unsigned long *)field);
		break;
	case KIND_FD:
		set_number(k, value, &n);
		*(long *)field = (long)n;
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
		show_help();
	case KIND_VERSION:
		show_version();
	}
	if (k->given)
		*(bool *)((char *)o + k->given) = true;
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
static uint64_t parse_words(struct options *o, int argc, char **argv)
{
	struct option longopts[ARRAY_SIZE(known) + 1] = { 0 };
	uint64_t seen = 0;
	int found;

	_Static_assert(ARRAY_SIZE(known) <= 64, "one bit for each option");
	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		longopts[i].name = known[i].name;
		longopts[i].has_arg = known[i].arg ? required_argument : no_argument;
		longopts[i].val = FIRST_OPTION + (int)i;
	}
	opterr = 0;
	while ((found = getopt_long(argc, argv, ":", longopts, NULL)) != -1) {
		if (found < FIRST_OPTION)
			bad_option(found, argv[optind - 1]);
		set_option(o, &known[found - FIRST_OPTION], optarg);
		seen |= UINT64_C(1) << (found - FIRST_OPTION);
	}
	return seen;
}

static void check_modes(const struct options *o, uint64_t seen)
{
	if (o->mode == MODE_NONE)
		usage_error("no mode: --target, --cow-target or --proxy is needed");
	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		if (!(seen & UINT64_C(1) << i))
			continue;
		if (!(known[i].modes & o->mode))
			usage_error("option '--%s' does not belong to this mode", known[i].name);
	}
}

/* Options that contradict each other, or that would do nothing. */
static void check_together(const struct options *o)
{
	const char *single = o->inetd ? "--inetd" : "--connected-fd";

	if (o->inetd && o->connected_fd >= 0)
		usage_error("--inetd and --connected-fd exclude each other");
	if (o->logpath && o->syslog)
		usage_error("--logpath and --syslog exclude each other");
	if (o->quiet && o->verbose)
		usage_error("--quiet and --verbose exclude each other");
	if (o->control && o->mode == MODE_PROXY)
		usage_error("--ctl is not for a proxy: its last argument is CONTROL_SOCKET_PATH");
	if (o->oldstyle && o->connected_fd >= 0)
		usage_error("--oldstyle is of no use with --connected-fd: nothing is negotiated");
	if (o->exports > 0 && (o->oldstyle || o->connected_fd >= 0))
		usage_error("with %s no client can ask for a name, --export does not belong to it",
			    o->oldstyle ? "--oldstyle" : single);
	if (o->cow_dir && o->cow_file)
		usage_error("--cow-dir and --cow-file exclude each other");
	if (o->create && o->readonly)
		usage_error("--create and --readonly exclude each other");
	if (o->unix_mode && !o->unix_path)
		usage_error("--unix-mode needs --unix");
	if (o->allows && o->unix_path && !o->lport_given && !o->laddrs)
		usage_error("--allow is about TCP clients, and with --unix alone there are none");
	if (!o->inetd && o->connected_fd < 0)
		return;
	if (o->lport_given || o->laddrs || o->unix_path)
		usage_error("%s serves one client, --lport, --laddr and --unix do not belong to it",
			    single);
	if (o->daemonize)
		usage_error("%s and --daemonize exclude each other", single);
	if (o->threads || o->max_connections)
		usage_error("%s serves one client, --threads and --max-connections do not belong "
			    "to it", single);
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

static bool is_unix(const char *host)
{
	if (strncmp(host, "unix:", 5) != 0)
		return false;
	if (!host[5])
		usage_error("REMOTE_HOST: '%s' has no path", host);
	return true;
}

static void take_proxy_arguments(struct options *o, int argc, char **argv)
{
	static const char *const name[] = { "REMOTE_HOST", "REMOTE_PORT", "CACHE_IMAGE",
					    "CACHE_BITMAP_IMAGE", "CONTROL_SOCKET_PATH" };
	const char **const field[] = { &o->host, &o->port, &o->image, &o->bitmap, &o->control };
	unsigned long port;

	/* A Unix socket has no port; it may be left out. */
	if (optind < argc && is_unix(argv[optind]) && argc - optind < 5) {
		o->host = argv[optind++];
		take_arguments(name + 2, field + 2, 3, argc, argv);
		return;
	}
	take_arguments(name, field, 5, argc, argv);
	if (is_unix(o->host))
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
	seen = parse_words(o, argc, argv);
	check_modes(o, seen);
	check_together(o);
	if (o->mode == MODE_PROXY)
		take_proxy_arguments(o, argc, argv);
	else
		take_image(o, argc, argv);
}

void options_free(struct options *o)
{
	for (unsigned i = 0; i < o->exports; i++)
		free(o->export[i].name);
	free(o->export);
	free(o->laddr);
	free(o->allow);
}
