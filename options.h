/*
 * options.h - the command lines of xnbd-server and xnbd-bgctl.
 */
#ifndef XNBD_OPTIONS_H
#define XNBD_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

enum mode {
	MODE_TARGET = 1 << 0,
	MODE_COW_TARGET = 1 << 1,
	MODE_PROXY = 1 << 2,
	MODE_ANY = MODE_TARGET | MODE_COW_TARGET | MODE_PROXY,
};

struct named_image {
	const char *name;		/* as proto_export wants it; "" without --export */
	const char *path;		/* of a proxy: the cache's */
};

/* xnbd-server. */
struct options {
	unsigned mode;			/* enum mode */
	struct named_image *export;	/* exports of them, at least one, no two of the same name */
	unsigned exports;

	/* --proxy */
	const char *host;		/* or "unix:PATH" */
	const char *port;		/* NULL for a Unix socket */
	const char *bitmap;
	const char *control;		/* in other modes NULL for none */
	const char *export_name;
	bool clear_bitmap;
	unsigned long origin_connections;
	unsigned long origin_timeout;	/* seconds */

	unsigned long lport;
	bool lport_given;
	const char *of_tcp;	/* an option that is about TCP clients; or NULL */
	const char **laddr;	/* laddrs of them, without brackets */
	unsigned laddrs;
	const char *unix_path;
	unsigned long unix_mode;	/* 0 for what the umask says */
	unsigned long max_connections;
	unsigned long max_per_host;	/* 0: all of them */
	unsigned long keepalive;	/* seconds; 0 for never */
	unsigned long max_queue_size;	/* requests; 0 for the default */
	uint64_t max_buf_size;		/* bytes; 0 for the default */
	bool inetd;
	long connected_fd;	/* -1 for none */
	bool oldstyle;

	const char *cow_dir;
	const char *cow_file;

	bool readonly;
	bool create;
	uint64_t create_size;	/* bytes */
	unsigned long threads;	/* 0 for the default */

	bool daemonize;
	const char *pidfile;
	const char *logpath;
	const char *user;	/* NAME[:GROUP] */
	bool no_sandbox;
	bool syslog;
	bool quiet, verbose;
	unsigned long stats;	/* seconds; 0 for never */
};

/* xnbd-bgctl.  Strings are those of argv, but for a path of the host. */
struct bgctl_options {
	const char *command;		/* as the server knows it; "watch" */
	const char *socket;
	bool json, progress, force;
	unsigned long blocks;		/* per request; 0 for the default */
	unsigned long seconds;		/* of "watch" */
	const char *export_name;	/* NULL for none; without line breaks */
	const char *host;		/* of "reconnect": one word; of a Unix socket the path from the root */
	const char *port;		/* one word; NULL for a Unix socket */
};

enum { EXIT_USAGE = 2 };

/*
 * Read the command line, which has to outlive *o.  These do not return after --help and --version,
 * and neither after an error, which is one line on stderr and exit status 2.
 */
void options_parse(struct options *o, int argc, char **argv);
void options_parse_bgctl(struct bgctl_options *o, int argc, char **argv);

#endif
