/*
 * log.h - the log: lines on stderr, in a file or FIFO, or to syslog.
 *
 * The program never waits for a reader of the log.  From log_start() on, lines are kept in memory,
 * and a thread writes them in their order.  Lines that find no room are lost; the log counts them.
 */
#ifndef XNBD_LOG_H
#define XNBD_LOG_H

#include "util.h"

enum log_level {
	LOG_ERROR,	/* something did not work */
	LOG_ASKED,	/* what somebody has asked for */
	LOG_EVENT,	/* something happened */
	LOG_DETAIL,
	LOG_OF_PEER = 8,	/* added to one of these: a client causes the line */
	LOG_TO_STARTER = 16,	/* likewise: the line goes to stderr as well */
};

/* The name before each line on stderr and in syslog: static storage. */
void log_name(const char *program);

/* If stderr is this socket, a client's, as it is under inetd: nothing in its place, and syslog. */
void log_keep_off(int fd);

/* Leave out lines above that level; LOG_EVENT is the default.  Call before threads start. */
void log_limit(enum log_level most);
bool log_shows(enum log_level level);

/*
 * Have the log go to that file instead of stderr, to syslog if it is NULL.  The path must outlive the
 * log.  NULL, or why not, and then the log is where it was.
 */
const char *log_open(const char *path);

/* Start the thread.  False after logging why not. */
bool log_start(void);

/* Have the thread open the log file again under its name, for log rotation. */
void log_reopen(void);

/*
 * Wait until all lines are written, but 0.2 s at most.  exit() does; call it before _exit(), also
 * from signal handlers.
 */
void log_flush(void);

/*
 * One line, whole.  Control characters in it become question marks.  If there are too many of those
 * that clients cause, some are counted instead.  Returns false, for a caller that fails with it.
 */
bool log_at(enum log_level level, const char *fmt, ...) PRINTF_LIKE(2, 3);

#define log_line(...) log_at(LOG_EVENT, __VA_ARGS__)
#define log_error(...) log_at(LOG_ERROR, __VA_ARGS__)
#define log_peer(level, ...) log_at((level) | LOG_OF_PEER, __VA_ARGS__)

/* About a failed start. */
#define log_failure(...) log_at(LOG_ERROR | LOG_TO_STARTER, __VA_ARGS__)

/*
 * log_flush(), then a line, with its newline, unless that is NULL, and the end of the program with a
 * failure.  Also for signal handlers.
 */
void end_at_once(const char *line);

#define log_fatal(...) (log_failure(__VA_ARGS__), end_at_once(NULL))

/* The memory; log_fatal() if there is none. */
void *not_null(void *memory);

/* Have all that was printed taken by the reader of standard output, or log_fatal(). */
void flush_output(void);

/*
 * Put open_nothing() in place of standard descriptors that are closed, or log_fatal(): a file or
 * socket with such a number would get lines that are meant for a terminal.
 */
void occupy_standard_descriptors(void);

#endif
