/*
 * confine.h - what the server gives up before it serves anybody: root, and on Linux whatever it
 * will not need.  Main thread, while there is no other: those that come inherit it.
 */
#ifndef XNBD_CONFINE_H
#define XNBD_CONFINE_H

#include <stdbool.h>
#include <sys/types.h>

struct confine_user {
	uid_t uid;		/* not 0 */
	gid_t gid;
};

/*
 * Find NAME[:GROUP], each a name or a number; without GROUP it is that of NAME.  False after
 * logging what is wrong, also if we are not root.
 */
bool confine_find_user(const char *name, struct confine_user *user);

/* Give a socket's file to that user.  False after logging why not. */
bool confine_give_socket(const char *path, const struct confine_user *user);

/* Become that user, without any other group, for ever.  False after logging why not. */
bool confine_become(const struct confine_user *user);

/* What may be done with files later on; the values are Landlock's. */
enum {
	CONFINE_EXECUTE = 1 << 0,
	CONFINE_WRITE_FILE = 1 << 1,
	CONFINE_READ_FILE = 1 << 2,
	CONFINE_READ_DIR = 1 << 3,
	CONFINE_REMOVE_FILE = 1 << 5,
	CONFINE_MAKE_REG = 1 << 8,
	CONFINE_TRUNCATE = 1 << 14,
	CONFINE_IOCTL_DEV = 1 << 15,

	CONFINE_READ = CONFINE_READ_FILE | CONFINE_READ_DIR,
	CONFINE_APPEND = CONFINE_WRITE_FILE | CONFINE_MAKE_REG,
	/* Create, fill, name and remove files, and make that durable. */
	CONFINE_FILES = CONFINE_READ | CONFINE_APPEND | CONFINE_REMOVE_FILE | CONFINE_TRUNCATE,
};

/* What is forbidden as a whole. */
enum {
	CONFINE_NO_CONNECT = 1 << 0,	/* by TCP */
	CONFINE_NO_ABSTRACT = 1 << 1,	/* no connections to Unix sockets that have no files */
};

/* Rules in the making. */
struct confine {
	int fd;			/* -1 if the kernel knows none */
	int error;		/* -errno of the first failure */
	unsigned rights;	/* those that the kernel knows */
};

/* Begin without any rights on files, and without TCP ports. */
void confine_begin(struct confine *c, unsigned forbidden);

/*
 * Keep rights on a file, or on a directory and all below it.  What is not there, or cannot be
 * reached by this user, is left out.
 */
void confine_keep(struct confine *c, const char *path, unsigned rights);

/* The rules hold from now on, as far as the kernel knows them.  False after logging why not. */
bool confine_enter(struct confine *c);

/* Whether rules hold. */
bool confine_is_in_force(void);

/* No program that this process might execute can give it rights. */
void confine_no_new_privileges(void);

#endif
