/*
 * confine.h - what the server gives up before it serves anybody: root, and on Linux whatever it
 * will not need.  Main thread, while there is no other: those that come inherit it.
 */
#ifndef XNBD_CONFINE_H
#define XNBD_CONFINE_H

#include <stdbool.h>

/*
 * Find NAME[:GROUP], each a name or a number, to be that user later; without GROUP it is that of
 * NAME.  False after logging what is wrong, also if we are not root.
 */
bool confine_find_user(const char *name);

/* Give a socket's file to that user, if there is one.  False after logging why not. */
bool confine_give_socket(const char *path);

/* What may be done with files later on; the values are Landlock's. */
enum {
	CONFINE_WRITE_FILE = 1 << 1,
	CONFINE_READ_FILE = 1 << 2,
	CONFINE_READ_DIR = 1 << 3,
	CONFINE_REMOVE_FILE = 1 << 5,
	CONFINE_MAKE_REG = 1 << 8,
	CONFINE_TRUNCATE = 1 << 14,
	CONFINE_ITSELF = 1 << 30,	/* ours: on what is at the path, not on its directory */

	CONFINE_READ = CONFINE_READ_FILE | CONFINE_READ_DIR,
	CONFINE_APPEND = CONFINE_WRITE_FILE | CONFINE_MAKE_REG,
	/* Create, fill, name and remove files, and make that durable. */
	CONFINE_FILES = CONFINE_READ | CONFINE_APPEND | CONFINE_REMOVE_FILE | CONFINE_TRUNCATE,
};

/*
 * Become the user, without any other group and for ever, and begin the rules of a sandbox, where
 * TCP connections can be made only if connects.  False after logging why not.
 */
bool confine_begin(bool sandbox, bool connects);

/*
 * Keep rights on the directory of a file, if there is one, and on all below it.  Unless it is NULL the
 * deed says what for, as in "remove pidfile ", and the log tells if --user cannot do that.
 */
void confine_keep(const char *deed, const char *path, unsigned rights);

/*
 * From now on only what was kept can be done, as far as the kernel knows such rules.  False after
 * logging why not.
 */
bool confine_enter(void);

/* Whether rules hold. */
extern bool confine_holds;

#endif
