/*
 * listen.c - the sockets that clients connect to: see listen.h.
 */
#define _GNU_SOURCE
#include "listen.h"

#include "confine.h"
#include "log.h"
#include "loop.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/un.h>
#include <unistd.h>

enum {
	BACKLOG = 1024,
	PASSED_FIRST = 3,	/* SD_LISTEN_FDS_START */
	FREE_PORT_TRIES = 32,
	LOCK_TRIES = 500,	/* for another start, in a directory; LOCK_PAUSE_MS each */
	LOCK_PAUSE_MS = 10,
	ACCEPT_PAUSE_MS = 1000,		/* when the system has no more descriptors */
};

/* Its source is first: the loop has a pointer to that. */
struct listener {
	struct source source;	/* due while the system has no more descriptors: accepting pauses */
	char address[ADDRESS_MAX];
	char *unix_path;	/* of a socket that we made, from the root; else NULL */
	struct stat file;	/* of such a socket, so that only our own is unlinked */
	listen_accept *accepted;	/* NULL before listen_start() if it is for clients */
};

static struct {
	struct listener *all;
	size_t count;
} listeners;

/* One more, whose socket is bound, or -1. */
static struct listener *add_listener(int fd)
{
	union address address = { .sa.sa_family = AF_UNSPEC };
	socklen_t len = sizeof(address);
	struct listener *l;

	listeners.all = not_null(realloc(listeners.all, (listeners.count + 1) * sizeof(*l)));
	l = &listeners.all[listeners.count++];
	*l = (struct listener){ .source = { .fd = fd, .due = UINT64_MAX } };
	getsockname(fd, &address.sa, &len);
	format_address(&address.sa, len, l->address);
	return l;
}

/* TCP */

static void format_at_port(const struct addrinfo *ai, unsigned port, char *address)
{
	if (ai->ai_family == AF_INET)
		((struct sockaddr_in *)ai->ai_addr)->sin_port = htons((uint16_t)port);
	else if (ai->ai_family == AF_INET6)
		((struct sockaddr_in6 *)ai->ai_addr)->sin6_port = htons((uint16_t)port);
	format_address(ai->ai_addr, ai->ai_addrlen, address);
}

static bool is_listened_on(const char *address)
{
	for (size_t i = 0; i < listeners.count; i++)
		if (strcmp(listeners.all[i].address, address) == 0)
			return true;
	return false;
}

/* Whether that errno is a lack of descriptors or memory. */
static bool is_out_of_resources(int err)
{
	return err == EMFILE || err == ENFILE || err == ENOBUFS || err == ENOMEM;
}

/* 0 or -errno; -EAFNOSUPPORT if the system has no such sockets, for whatever reason. */
static int listen_address(const struct addrinfo *ai)
{
	int on = 1, err;
	int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return is_out_of_resources(errno) ? -errno : -EAFNOSUPPORT;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (ai->ai_family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on));
	if (bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, BACKLOG) < 0) {
		err = -errno;
		close(fd);
		return err;
	}
	add_listener(fd);
	return 0;
}

/* NULL after logging why there is no address of that name; NULL stands for all of the machine. */
static struct addrinfo *resolve(const char *name)
{
	const struct addrinfo hints = {
		.ai_flags = AI_PASSIVE, .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM,
	};
	struct addrinfo *list = NULL;
	int err = getaddrinfo(name, "0", &hints, &list);

	if (err)
		log_failure("cannot listen on %s: %s", name ? name : "all addresses",
			    err == EAI_SYSTEM ? strerror(errno) : gai_strerror(err));
	return list;
}

/*
 * Listen at those addresses of a list that are new; ai_flags of each has the error.  Some may be
 * missing: a machine without IPv6, or without IPv4, still has all of its addresses.  *port is set
 * when 0.  0 or -errno, and failed names the address.
 */
static int listen_list(struct addrinfo *list, unsigned *port, char *failed)
{
	char address[ADDRESS_MAX];
	bool any = false;
	int err = 0;

	for (struct addrinfo *ai = list; ai; ai = ai->ai_next) {
		format_at_port(ai, *port, address);
		err = ai->ai_flags = is_listened_on(address) ? 0 : listen_address(ai);
		if (err)
			strcpy(failed, address);
		if (err && err != -EAFNOSUPPORT && err != -EADDRNOTAVAIL)
			return err;
		if (!err && *port == 0)
			*port = (unsigned)atoi(strrchr(listeners.all->address, ':') + 1);
		any |= !err;
	}
	for (struct addrinfo *ai = list; ai && any; ai = ai->ai_next) {
		format_at_port(ai, *port, address);
		if (ai->ai_flags)
			log_line("cannot listen on %s: %s; going on without", address,
				 strerror(-ai->ai_flags));
	}
	return any ? 0 : err;
}

bool listen_tcp(const char *const *names, size_t count, unsigned port)
{
	char failed[ADDRESS_MAX];
	unsigned chosen;
	int err, tries = 0;

	do {	/* a port that is free at one address may be in use at the next */
		listen_close();
		chosen = port;
		err = 0;
		for (size_t i = 0; !err && (i < count || i == 0); i++) {
			struct addrinfo *list = resolve(count ? names[i] : NULL);

			if (!list)
				return false;
			err = listen_list(list, &chosen, failed);
			freeaddrinfo(list);
		}
	} while (err == -EADDRINUSE && port == 0 && ++tries < FREE_PORT_TRIES);
	return !err || log_failure("cannot listen on %s: %s", failed, strerror(-err));
}

/* Unix sockets */

/* Whether somebody serves the socket. */
static bool is_alive(const struct sockaddr_un *sun)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	bool alive;

	if (fd < 0)
		return true;
	/* Only a refusal shows that nobody is there: a full backlog, for one, does not. */
	alive = connect(fd, (const struct sockaddr *)sun, sizeof(*sun)) == 0 ||
		errno != ECONNREFUSED;
	close(fd);
	return alive;
}

/*
 * Lock the directory of a socket, since one that another start has bound, and that does not listen
 * yet, looks as one that nobody serves.  The descriptor that holds the lock, or -errno.
 */
static int lock_directory(const char *path)
{
	char *dir = not_null(directory_of(path));
	int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), err = fd < 0 ? -errno : 0;

	free(dir);
	for (int tries = 0; !err && flock(fd, LOCK_EX | LOCK_NB) < 0; tries++) {
		if ((errno != EWOULDBLOCK && errno != EINTR) || tries == LOCK_TRIES) {
			err = -errno;
			close(fd);
		} else {
			poll(NULL, 0, LOCK_PAUSE_MS);
		}
	}
	return err ? err : fd;
}

/* Bind, in place of a stale socket if there is one and the directory is locked.  NULL, or why not. */
static const char *bind_unix(int fd, const struct sockaddr_un *sun, int lock)
{
	struct stat st;

	if (lock == -EWOULDBLOCK)
		return "somebody else has its directory locked";
	while (bind(fd, (const struct sockaddr *)sun, sizeof(*sun)) < 0) {
		if (errno != EADDRINUSE || lstat(sun->sun_path, &st) < 0)
			return strerror(errno);
		if (!S_ISSOCK(st.st_mode))
			return "there is a file that is not a socket";
		if (is_alive(sun))
			return "another server is listening there";
		if (lock < 0)
			return strerror(-lock);
		if (unlink(sun->sun_path) < 0)
			return strerror(errno);
	}
	return NULL;
}

/*
 * The socket's file has the mode from its beginning: the umask is that of all threads, but nobody
 * creates files meanwhile.  As bind_unix(); what was made is closed and removed by listen_close().
 */
static const char *start_unix(struct listener *l, const struct sockaddr_un *sun, mode_t mode)
{
	const char *wrong;
	mode_t old;
	int lock;

	l->source.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	l->unix_path = absolute_path(sun->sun_path);
	if (l->source.fd < 0 || !l->unix_path)
		return strerror(errno);
	lock = lock_directory(sun->sun_path);
	old = umask(~mode & 0777);
	if (!mode)
		umask(old);
	wrong = bind_unix(l->source.fd, sun, lock);
	umask(old);
	if (!wrong && (lstat(l->unix_path, &l->file) < 0 || listen(l->source.fd, BACKLOG) < 0))
		wrong = strerror(errno);
	if (lock >= 0)
		close(lock);
	return wrong;
}

bool listen_unix(const char *path, mode_t mode, listen_accept *accepted)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	struct listener *l;
	const char *wrong;

	if (strlen(path) >= sizeof(sun.sun_path))
		return log_failure("cannot listen on unix:%s: the path has %zu bytes, %zu is the "
				   "most", path, strlen(path), sizeof(sun.sun_path) - 1);
	strcpy(sun.sun_path, path);
	l = add_listener(-1);
	l->accepted = accepted;
	snprintf(l->address, sizeof(l->address), "unix:%s", path);
	wrong = start_unix(l, &sun, mode);
	if (wrong)
		return log_failure("cannot listen on unix:%s: %s", path, wrong);
	return confine_give_socket(l->unix_path);
}

/* Passed sockets */

int listen_count_passed(void)
{
	const char *process = getenv("LISTEN_PID"), *sockets = getenv("LISTEN_FDS");
	unsigned long pid, count;

	if (!process || !sockets)
		return 0;
	if (!parse_number(process, 1, INT_MAX, &pid) ||
	    !parse_number(sockets, 0, INT_MAX - PASSED_FIRST, &count)) {
		log_failure("LISTEN_PID '%s' or LISTEN_FDS '%s' is not a number", process, sockets);
		return -1;
	}
	return pid == (unsigned long)getpid() ? (int)count : 0;
}

bool listen_check(int fd, bool listens, const char *what)
{
	int type = 0, listening = 0;
	socklen_t len = sizeof(int);
	const char *wrong = NULL;

	getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len);
	getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len);
	if (type != SOCK_STREAM)
		wrong = "is not a stream socket";
	else if (listens && !listening)
		wrong = "does not listen (--inetd takes a connection)";
	else if (!listens && listening)
		wrong = "is a socket that listens, not a connection";
	return !wrong || log_failure("%s: descriptor %d %s", what, fd, wrong);
}

bool listen_passed(int count, bool *tcp)
{
	for (int fd = PASSED_FIRST; fd < PASSED_FIRST + count; fd++) {
		if (!listen_check(fd, true, "LISTEN_FDS"))
			return false;
		fcntl(fd, F_SETFD, FD_CLOEXEC);
		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
		add_listener(fd);
		*tcp |= !is_unix_socket(fd);
	}
	return true;
}

/* Accepting */

static short listener_events(const struct source *s)
{
	return s->due != UINT64_MAX ? 0 : POLLIN;
}

static void listener_turn(struct source *s, short revents)
{
	union address address = { .sa.sa_family = AF_UNIX };	/* of which some have none */
	socklen_t len = sizeof(address);
	int fd = revents ? accept4(s->fd, &address.sa, &len, SOCK_CLOEXEC | SOCK_NONBLOCK) : -1;

	if (fd >= 0) {
		((struct listener *)s)->accepted(fd, &address.sa, len);
	} else if (revents && is_out_of_resources(errno)) {
		log_peer(LOG_ERROR, "cannot accept: %s; trying again when a connection ends",
			 strerror(errno));
		s->due = now_ms() + ACCEPT_PAUSE_MS;
	}
}

bool listen_start(listen_accept *accepted)
{
	static const struct source_ops ops = { listener_events, listener_turn };

	for (struct listener *l = listeners.all; l < listeners.all + listeners.count; l++) {
		if (!loop_add(&main_loop, &l->source))
			return log_failure("out of memory");
		l->source.ops = &ops;		/* which says that it is on the loop */
		if (l->accepted)
			continue;
		l->accepted = accepted;
		log_line("listening on %s", l->address);
	}
	return true;
}

void listen_resume(void)
{
	for (size_t i = 0; i < listeners.count; i++)
		listeners.all[i].source.due = UINT64_MAX;
}

void listen_close(void)
{
	for (struct listener *l = listeners.all; l < listeners.all + listeners.count; l++) {
		int err = remove_own(l->unix_path, &l->file);

		if (err)
			log_line("cannot remove unix:%s: %s", l->unix_path, strerror(-err));
		free(l->unix_path);
		if (l->source.ops)
			loop_remove(&main_loop, &l->source);
		if (l->source.fd >= 0)
			close(l->source.fd);
	}
	free(listeners.all);
	memset(&listeners, 0, sizeof(listeners));
}
