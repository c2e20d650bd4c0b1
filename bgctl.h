/*
 * bgctl.h - what the parts of xnbd-bgctl share: a connection to a control socket, and the end of the
 * program when something is wrong with it.
 */
#ifndef XNBD_BGCTL_H
#define XNBD_BGCTL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util.h"

enum {
	ANSWER_MS = 30000,		/* for commands that do not take long */
	ANSWER_LINE_MAX = 16384,	/* more than a server says */
	ANSWER_LINES_MAX = 8192,	/* of a query; likewise: one for each client */
	WIDTH_DEFAULT = 80,
	WIDTH_MAX = 512,
	HEIGHT_DEFAULT = 24,
};

struct server {
	const char *path;
	char aim[300];			/* "host:port: ", what its errors are about; or "" */
	int fd;
	bool known;			/* it has answered before, over another connection */
	uint64_t deadline;		/* now_ms() when the answer must be here; 0 for never */
	size_t used, len;		/* of buf: what was taken, what is there */
	char buf[ANSWER_LINE_MAX];
};

/* One line on stderr, and exit status 1. */
_Noreturn void fail(const char *fmt, ...) PRINTF_LIKE(1, 2);

/* Connect, send a line; these two, and what follows, fail() if that is not possible. */
void connect_to(struct server *s, const char *path);
void send_line(struct server *s, const char *line, size_t len);

/* The next line of an answer: its name, *value; NULL when that was "ok".  "error" ends us. */
const char *next_value(struct server *s, const char **value);

/* 0, 17 or 99.5, but not 017, which JSON does not have. */
bool is_number(const char *s);

/*
 * Cut " name number" off the front of what follows an address or a name.  False at its end, and
 * where there is no such pair.
 */
bool next_pair(char **text, const char **name, const char **number);

/* Where that begins, with the pair that begins with first: text is ended there.  "" if none does. */
char *split_name(char *text, const char *first);

/* The size of the terminal, in characters. */
size_t terminal_width(int fd);
size_t terminal_height(int fd);

/* --watch */
_Noreturn void watch(struct server *s, unsigned seconds);

#endif
