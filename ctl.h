/*
 * ctl.h - the control socket: commands in lines of text.  Main thread only; nothing blocks.
 *
 * The lines are documented in xnbd-bgctl(1), CONTROL SOCKET.
 */
#ifndef XNBD_CTL_H
#define XNBD_CTL_H

#include <stdbool.h>
#include <stdint.h>

enum { CTL_LINE_MAX = 8192 };	/* bytes of a command */

/* Lines of an answer that grows; freed by ctl.c. */
struct ctl_reply;
struct export;

/* Append "name: value". */
void ctl_say(struct ctl_reply *reply, const char *name, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

void ctl_say_number(struct ctl_reply *reply, const char *name, uint64_t n);

/* Append a part of lines, which ends with a line feed if it ends one. */
void ctl_put(struct ctl_reply *reply, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/*
 * What the server does when it is asked.  Those that return a text return NULL for success, or
 * one line that says why not.
 */
struct ctl_ops {
	/* Tell the state. */
	void (*query)(struct ctl_reply *reply, bool json);

	/*
	 * Make a snapshot of the export of that name, NULL if none was given.  *of is set to it, with
	 * which ctl_snapshot_ended() is called when it has happened or failed.  *behind is
	 * set if that is the second such call from now: one that is made already may lack changes.
	 */
	const char *(*snapshot)(const char *name, const struct export **of, bool *behind);

	bool proxy;			/* whether there is one; the rest is about that */

	/* Become a target, if that is not under way.  ctl_switched() is called when it is or failed. */
	const char *(*switch_over)(bool force);

	/*
	 * Go over to another origin.  ctl_reconnected() is called as above.  port is NULL for
	 * unix:PATH.
	 */
	const char *(*reconnect)(const char *host, const char *port, const char *export_name);

	/*
	 * Copy what is missing, until release_copy() was called as often.  blocks is the size of a
	 * request, 0 for the default.
	 */
	void (*start_copy)(unsigned blocks);
	void (*release_copy)(void);

	/*
	 * Tell how the copy is going, unless reply is NULL; *runs is whether it goes on.  If not, tell
	 * the parts that failed: NULL, or why blocks are missing.
	 */
	const char *(*copy)(struct ctl_reply *reply, bool *runs);
};

/*
 * Listen at path, with mode 0600, in place of a stale socket.  False after logging why not.  There
 * is one such socket at most; what follows may be called without it.
 */
bool ctl_open(const char *path, const struct ctl_ops *ops);

/* Close its connections. */
void ctl_close(void);

/*
 * A switch, or a reconnect, has ended: with NULL, or why it failed; zeroed is the number of blocks
 * that were missing and read as zeros now.
 */
void ctl_switched(const char *error, uint64_t zeroed);
void ctl_reconnected(const char *error);

/* A snapshot of that has ended: its path, or NULL and why there is none. */
void ctl_snapshot_ended(const struct export *of, const char *path, const char *error);

/* A copy may have ended. */
void ctl_copied(void);

#endif
