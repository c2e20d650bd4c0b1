/*
 * listen.h - the sockets that clients connect to, and the control socket.  Main thread only.
 */
#ifndef XNBD_LISTEN_H
#define XNBD_LISTEN_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/types.h>

/* Somebody was accepted, whose socket is that of the function then. */
typedef void listen_accept(int fd, const struct sockaddr *sa, socklen_t len);

/*
 * Listen on TCP alone: on each address that the names stand for, or on all addresses of the machine
 * if there are no names.  Port 0 takes a port that is free on all of them.  To be called first, since
 * it may begin again.  False after logging why not.
 */
bool listen_tcp(const char *const *names, size_t count, unsigned port);

/*
 * Listen on a Unix socket, in place of one that nobody serves; mode is that of its file, 0 for
 * what the umask says.  accepted() is given if it is not for clients; else it is NULL.  False after
 * logging why not.
 */
bool listen_unix(const char *path, mode_t mode, listen_accept *accepted);

/*
 * How many sockets the process that started us passes on, by the protocol of sd_listen_fds(3):
 * descriptors from 3 on.  To be asked before this process forks.  -1 after logging that nobody
 * can tell.
 */
int listen_count_passed(void);

/* Whether fd is a stream socket that listens, or a connection.  Logs what it is instead. */
bool listen_check(int fd, bool listens, const char *what);

/*
 * Listen on that many passed sockets; *tcp is set if clients may come by TCP.  False after logging
 * what one of them is instead.
 */
bool listen_passed(int count, bool *tcp);

/* Accept on the main thread's loop, and log where.  False after logging why not. */
bool listen_start(listen_accept *accepted);

/* There may be descriptors again. */
void listen_resume(void);

/* Close all, and remove the files of Unix sockets that we made. */
void listen_close(void);

#endif
