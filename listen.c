/*
 * listen.c - the sockets that clients connect to: see listen.h.
 */
#define _GNU_SOURCE
#include "listen.h"

#include "log.h"

#include <assert.h>
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
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum {
	BACKLOG = 1024,
	PASSED_FIRST = 3,	/* SD_LISTEN_FDS_START */
	FREE_PORT_TRIES = 32,
	LOCK_TRIES = 500,	/* for another start, in a directory; LOCK_PAUSE_MS each */
	LOCK_PAUSE_MS = 10,
};

/* Takes fd and unix_path over, also when it fails. */
static int add(struct listeners *l, int fd, char *unix_path)
{
	struct listener *all = realloc(l->all, (l->count + 1) * sizeof(*all));
	union address address;
	socklen_t len = sizeof(address);
	struct listener *new;

	if (!all) {
		close(fd);
		free(unix_path);
		return -ENOMEM;
	}
	l->all = all;
	new = &all[l->count++];
	*new = (struct listener){ .fd = fd, .unix_path = unix_path };
	if (getsockname(fd, &address.sa, &len) < 0)
		return -errno;
	format_address(&address.sa, len, new->address);
	new->local = address.sa.sa_family == AF_UNIX;
	return 0;
}

static void close_from(struct listeners *l, size_t first)
{
	while (l->count > first)
		close(l->all[--l->count].fd);
}

static void set_port(struct sockaddr *sa, unsigned port)
{
	if (sa->sa_family == AF_INET)
		((struct sockaddr_in *)sa)->sin_port = htons((uint16_t)port);
	else if (sa->sa_family == AF_INET6)
		((struct sockaddr_in6 *)sa)->sin6_port = htons((uint16_t)port);
}

static unsigned get_port(const struct listener *l)
{
	return (unsigned)atoi(strrchr(l->address, ':') + 1);
}

/* Whether one of our sockets has that address already. */
static bool is_listened_on(const struct listeners *l, const struct addrinfo *ai, unsigned port)
{
	char address[ADDRESS_MAX];

	set_port(ai->ai_addr, port);
	format_address(ai->ai_addr, ai->ai_addrlen, address);
	for (size_t i = 0; i < l->count; i++)
		if (strcmp(l->all[i].address, address) == 0)
			return true;
	return false;
}

/* 0 or -errno; -EAFNOSUPPORT if the system has no such sockets, for whatever reason. */
static int listen_address(struct listeners *l, const struct addrinfo *ai, unsigned port)
{
	int on = 1, err;
	int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return is_out_of_resources(errno) ? -errno : -EAFNOSUPPORT;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (ai->ai_family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on));
	set_port(ai->ai_addr, port);
	if (bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, BACKLOG) < 0) {
		err = -errno;
		close(fd);
		return err;
	}
	return add(l, fd, NULL);
}

/* A machine without IPv6, or without IPv4, still has all of its addresses. */
static bool family_is_missing(int err)
{
	return err == -EAFNOSUPPORT || err == -EADDRNOTAVAIL;
}

/*
 * All addresses of one list, each once, without those of a missing family if there are others:
 * these have their error in ai_flags then.  *port is set when 0.  Returns 0 or -errno, failed names
 * the address.
 */
static int listen_list(struct listeners *l, struct addrinfo *list, unsigned *port, char *failed)
{
	bool any = false;
	int err = 0;

	for (struct addrinfo *ai = list; ai; ai = ai->ai_next) {
		ai->ai_flags = 0;
		if (!is_listened_on(l, ai, *port))
			err = ai->ai_flags = listen_address(l, ai, *port);
		if (ai->ai_flags) {
			format_address(ai->ai_addr, ai->ai_addrlen, failed);
			if (!family_is_missing(err))
				return err;
		}
		any |= !ai->ai_flags;
		if (*port == 0 && !ai->ai_flags)
			*port = get_port(&l->all[l->count - 1]);
	}
	return any ? 0 : err;
}

static void log_missing(const struct addrinfo *list, unsigned port)
{
	char address[ADDRESS_MAX];

	for (const struct addrinfo *ai = list; ai; ai = ai->ai_next) {
		set_port(ai->ai_addr, port);
		format_address(ai->ai_addr, ai->ai_addrlen, address);
		if (ai->ai_flags)
			log_line("cannot listen on %s: %s; going on without", address,
				 strerror(-ai->ai_flags));
	}
}

static struct addrinfo *resolve(const char *name)
{
	char *host = name ? not_null(strdup(name)) : NULL;
	const struct addrinfo hints = {
		.ai_flags = AI_PASSIVE,
		.ai_family = AF_UNSPEC,
		.ai_socktype = SOCK_STREAM,
	};
	struct addrinfo *list;
	int err;

	if (host)
		strip_brackets(host);
	err = getaddrinfo(host, "0", &hints, &list);
	free(host);
	if (err) {
		log_failure("cannot listen on %s: %s", name ? name : "all addresses",
			    err == EAI_SYSTEM ? strerror(errno) : gai_strerror(err));
		return NULL;
	}
	return list;
}

bool listen_tcp(struct listeners *l, const char *const *names, size_t count, unsigned port)
{
	struct addrinfo *lists[count ? count : 1];
	size_t lists_count = count ? count : 1, before = l->count;
	char failed[ADDRESS_MAX] = "";
	unsigned chosen = port;
	int err = -EADDRINUSE;

	for (size_t i = 0; i < lists_count; i++) {
		lists[i] = resolve(count ? names[i] : NULL);
		if (!lists[i]) {
			lists_count = i;
			goto out;
		}
	}
	for (int tries = 0; tries < FREE_PORT_TRIES && err == -EADDRINUSE; tries++) {
		close_from(l, before);
		chosen = port;
		err = 0;
		for (size_t i = 0; i < lists_count && !err; i++)
			err = listen_list(l, lists[i], &chosen, failed);
		if (port != 0)
			break;
	}
	if (err)
		log_failure("cannot listen on %s: %s", failed, strerror(-err));
	for (size_t i = 0; i < lists_count && !err; i++)
		log_missing(lists[i], chosen);
out:
	for (size_t i = 0; i < lists_count; i++)
		freeaddrinfo(lists[i]);
	return err == 0;
}

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
 * Bind to a path; the socket's file has the mode from its beginning.  The umask is that of all
 * threads, but nobody creates files meanwhile.
 */
static int bind_mode(int fd, const struct sockaddr_un *sun, mode_t mode)
{
	mode_t old = mode ? umask(~mode & 0777) : 0;
	int err = bind(fd, (const struct sockaddr *)sun, sizeof(*sun)) < 0 ? errno : 0;

	if (mode)
		umask(old);
	return err;
}

/*
 * Lock the directory of a socket, since one that another start has bound, and that does not listen
 * yet, looks as one that nobody serves.  The descriptor that holds the lock, or -errno.
 */
static int lock_directory(const char *path)
{
	char *dir = directory_of(path);
	int fd = dir ? open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1, err = 0;

	if (fd < 0)
		err = dir ? -errno : -ENOMEM;
	free(dir);
	for (int tries = 0; fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) < 0; tries++) {
		err = -errno;
		if ((err != -EWOULDBLOCK && err != -EINTR) || tries == LOCK_TRIES) {
			close(fd);
			return err;
		}
		poll(NULL, 0, LOCK_PAUSE_MS);
	}
	return fd < 0 ? err : fd;
}

/*
 * Bind, in place of a stale socket if there is one, and if the directory is locked.  0 or -errno.
 */
static int bind_unix(int fd, const struct sockaddr_un *sun, mode_t mode, int lock)
{
	int err = lock == -EWOULDBLOCK ? EWOULDBLOCK : bind_mode(fd, sun, mode);
	struct stat st;

	if (err != EADDRINUSE)
		return -err;
	if (lstat(sun->sun_path, &st) < 0)
		return -errno;
	if (!S_ISSOCK(st.st_mode))
		return -EEXIST;
	if (is_alive(sun))
		return -EADDRINUSE;
	if (lock < 0)
		return lock;
	if (unlink(sun->sun_path) < 0)
		return -errno;
	return -bind_mode(fd, sun, mode);
}

/* 0 or -errno; fd is closed on failure. */
static int start_unix(struct listeners *l, int fd, const struct sockaddr_un *sun, mode_t mode)
{
	char *path = absolute_path(sun->sun_path);
	int lock = lock_directory(sun->sun_path);
	struct stat st;
	bool bound;
	int err;

	err = path ? bind_unix(fd, sun, mode, lock) : -ENOMEM;
	bound = err == 0;
	if (!err && (listen(fd, BACKLOG) < 0 || lstat(path, &st) < 0))
		err = -errno;
	if (lock >= 0)
		close(lock);
	if (err) {
		close(fd);
		free(path);
	} else {
		err = add(l, fd, path);
	}
	if (!err) {
		l->all[l->count - 1].dev = st.st_dev;
		l->all[l->count - 1].ino = st.st_ino;
	} else if (bound) {
		unlink(sun->sun_path);
	}
	return err;
}

bool listen_unix(struct listeners *l, const char *path, mode_t mode)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd, err;

	if (strlen(path) >= sizeof(sun.sun_path)) {
		log_failure("cannot listen on unix:%s: the path has %zu bytes, %zu is the most",
			    path, strlen(path), sizeof(sun.sun_path) - 1);
		return false;
	}
	strcpy(sun.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	err = fd < 0 ? -errno : start_unix(l, fd, &sun, mode);
	if (err)
		log_failure("cannot listen on unix:%s: %s", path,
			    err == -EADDRINUSE	? "another server is listening there" :
			    err == -EEXIST	? "there is a file that is not a socket" :
			    err == -EWOULDBLOCK ? "somebody else has its directory locked" :
						  strerror(-err));
	return err == 0;
}

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
	socklen_t len = sizeof(type);

	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) < 0 || type != SOCK_STREAM) {
		log_failure("%s: descriptor %d is not a stream socket", what, fd);
		return false;
	}
	getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len);
	if (listens != (listening != 0))
		log_failure("%s: descriptor %d %s", what, fd, listens ?
			    "does not listen (--inetd takes a connection)" :
			    "is a socket that listens, not a connection");
	return listens == (listening != 0);
}

static bool take_passed(struct listeners *l, int fd)
{
	int err;

	if (!listen_check(fd, true, "LISTEN_FDS"))
		return false;
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	err = add(l, fd, NULL);
	if (err)
		log_failure("LISTEN_FDS: descriptor %d: %s", fd, strerror(-err));
	return err == 0;
}

bool listen_passed(struct listeners *l, int count)
{
	for (int i = 0; i < count; i++)
		if (!take_passed(l, PASSED_FIRST + i))
			return false;
	return true;
}

void listen_close(struct listeners *l)
{
	for (size_t i = 0; i < l->count; i++) {
		struct listener *one = &l->all[i];
		int err = one->unix_path ? remove_own(one->unix_path, one->dev, one->ino) : 0;

		if (err)
			log_line("cannot remove unix:%s: %s", one->unix_path, strerror(-err));
		free(one->unix_path);
		close(one->fd);
	}
	free(l->all);
	l->all = NULL;
	l->count = 0;
}
