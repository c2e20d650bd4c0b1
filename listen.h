/*
 * listen.h - the sockets that clients connect to.  Main thread only.
 */
#ifndef XNBD_LISTEN_H
#define XNBD_LISTEN_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>

#include "loop.h"
#include "util.h"

struct listener {
	struct source source;
	bool pauses;		/* accepting, since the system has no more descriptors */
	char address[ADDRESS_MAX];
	bool local;		/* a Unix socket, whose clients have no names */
	char *unix_path;	/* of a socket that we made, from the root; else NULL */
	struct stat file;	/* of such a socket, so that only our own is unlinked */
	void (*accepted)(struct listener *l, int fd, const struct sockaddr *sa, socklen_t len);
};

struct listeners {
	struct listener *all;
	size_t count;
};

/*
 * Listen on TCP alone: on each address that the names stand for, or on all addresses of the machine
 * if there are no names.  Port 0 takes a port that is free on all of them.  False after logging
 * why not.
 */
bool listen_tcp(struct listeners *l, const char *const *names, size_t count, unsigned port);

/*
 * Listen on a Unix socket, in place of one that nobody serves; mode is that of its file, 0 for
 * what the umask says.  False after logging why not.
 */
bool listen_unix(struct listeners *l, const char *path, mode_t mode);

/*
 * How many sockets the process that started us passes on, by the protocol of sd_listen_fds(3):
 * descriptors from 3 on.  To be asked before this process forks.  -1 after logging that nobody
 * can tell.
 */
int listen_count_passed(void);

/* Whether fd is a stream socket that listens, or a connection.  Logs what it is instead. */
bool listen_check(int fd, bool listens, const char *what);

/* Listen on that many passed sockets.  False after logging what one of them is instead. */
bool listen_passed(struct listeners *l, int count);

/*
 * Accept on a loop: accepted() gets each client, whose socket is its own then; nobody is accepted
 * while is_full(), which may be NULL.  False if out of memory.
 */
bool listen_start(struct listeners *l, struct loop *loop,
		  void (*accepted)(struct listener *l, int fd, const struct sockaddr *sa,
				   socklen_t len));

/* There may be descriptors again. */
void listen_resume(struct listeners *l);

/* Close all, and remove the files of Unix sockets that we made. */
void listen_close(struct listeners *l);

#endif
