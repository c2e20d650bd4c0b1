/*
 * util.c - see util.h.
 */
#define _GNU_SOURCE
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

/* Set before threads start, and by log_reopen() only through dup2(), which is atomic. */
static enum log_to log_to = LOG_TO_STDERR;
static const char *log_program = "xnbd";
static const char *log_path;
static int log_fd = STDERR_FILENO;
static int client_fd = STDIN_FILENO;

void log_name(const char *program)
{
	log_program = program;
}

static int open_log_file(const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0640);

	return fd < 0 ? -errno : fd;
}

int log_open(enum log_to to, const char *path)
{
	if (to == LOG_TO_FILE) {
		int fd = open_log_file(path);

		if (fd < 0)
			return fd;
		log_fd = fd;
		log_path = path;
	} else if (to == LOG_TO_SYSLOG) {
		openlog(log_program, LOG_PID, LOG_DAEMON);
	}
	log_to = to;
	return 0;
}

void log_reopen(void)
{
	int fd;

	if (log_to != LOG_TO_FILE)
		return;
	fd = open_log_file(log_path);
	if (fd < 0) {
		log_line("cannot reopen log file %s: %s", log_path, strerror(-fd));
		return;
	}
	dup3(fd, log_fd, O_CLOEXEC);
	close(fd);
	log_line("log file reopened");
}

/* A line is written by one write(), so that lines of several threads do not mix. */
static void write_line(int fd, const char *prefix, const char *fmt, va_list ap)
{
	char line[1024];
	size_t room = sizeof(line) - 1;
	int n = snprintf(line, room, "%s: ", prefix);
	size_t len = n < 0 ? 0 : (size_t)n < room ? (size_t)n : room - 1;

	n = vsnprintf(line + len, room - len, fmt, ap);
	if (n > 0)
		len += (size_t)n < room - len ? (size_t)n : room - len - 1;
	line[len++] = '\n';
	while (write(fd, line, len) < 0 && errno == EINTR)
		;
}

static void log_va(const char *fmt, va_list ap)
{
	char prefix[64];
	time_t now;
	struct tm tm;

	switch (log_to) {
	case LOG_TO_STDERR:
		write_line(STDERR_FILENO, log_program, fmt, ap);
		break;
	case LOG_TO_FILE:
		now = time(NULL);
		strftime(prefix, sizeof(prefix), "%Y-%m-%d %H:%M:%S", localtime_r(&now, &tm));
		write_line(log_fd, prefix, fmt, ap);
		break;
	case LOG_TO_SYSLOG:
		vsyslog(LOG_INFO, fmt, ap);
		break;
	}
}

void log_line(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	log_va(fmt, ap);
	va_end(ap);
}

bool is_same_socket(int a, int b)
{
	struct stat sa, sb;

	return fstat(a, &sa) == 0 && fstat(b, &sb) == 0 && S_ISSOCK(sa.st_mode) &&
	       sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
}

void log_keep_off(int fd)
{
	client_fd = fd;
}

bool log_would_disturb(void)
{
	return is_same_socket(client_fd, STDERR_FILENO);
}

void log_failure(const char *fmt, ...)
{
	bool silent = log_would_disturb();
	va_list ap;

	if (silent && log_to == LOG_TO_STDERR)
		log_open(LOG_TO_SYSLOG, NULL);
	if (!silent) {
		va_start(ap, fmt);
		write_line(STDERR_FILENO, log_program, fmt, ap);
		va_end(ap);
	}
	if (log_to != LOG_TO_STDERR) {
		va_start(ap, fmt);
		log_va(fmt, ap);
		va_end(ap);
	}
}

uint64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

uint64_t now_ms(void)
{
	return now_us() / 1000;
}

bool parse_size(const char *s, uint64_t *value)
{
	static const char units[] = "KMGT";
	unsigned long long n;
	const char *unit;
	char *end;

	if (*s < '0' || *s > '9')
		return false;
	errno = 0;
	n = strtoull(s, &end, 10);
	if (errno)
		return false;
	if (*end) {
		unit = strchr(units, *end >= 'a' ? *end - 'a' + 'A' : *end);
		if (!unit || end[1])
			return false;
		for (const char *u = units; u <= unit; u++) {
			if (n > UINT64_MAX / 1024)
				return false;
			n *= 1024;
		}
	}
	*value = n;
	return true;
}

bool parse_number(const char *s, unsigned long min, unsigned long max, unsigned long *value)
{
	char *end;

	if (*s < '0' || *s > '9')
		return false;
	errno = 0;
	*value = strtoul(s, &end, 10);
	return !errno && !*end && *value >= min && *value <= max;
}

char *absolute_path(const char *path)
{
	char *cwd, *result;
	size_t len;

	if (path[0] == '/')
		return strdup(path);
	cwd = getcwd(NULL, 0);
	if (!cwd)
		return NULL;
	len = strlen(cwd) + strlen(path) + 2;
	result = malloc(len);
	if (result)
		snprintf(result, len, "%s/%s", cwd, path);
	free(cwd);
	return result;
}

const char *base_name(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

char *directory_of(const char *path)
{
	size_t len = (size_t)(base_name(path) - path);

	return len ? strndup(path, len) : strdup(".");
}

int read_at(int fd, uint8_t *buf, uint64_t len, uint64_t off)
{
	while (len > 0) {
		ssize_t n = pread(fd, buf, len, (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		buf += n;
		off += (uint64_t)n;
		len -= (uint64_t)n;
	}
	return 0;
}

int write_at(int fd, const uint8_t *buf, uint64_t len, uint64_t off)
{
	while (len > 0) {
		ssize_t n = pwrite(fd, buf, len, (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		buf += n;
		off += (uint64_t)n;
		len -= (uint64_t)n;
	}
	return 0;
}

int sync_directory_of(const char *path)
{
	char *dir = directory_of(path);
	int fd, ret = 0;

	if (!dir)
		return -ENOMEM;
	fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	free(dir);
	if (fd < 0)
		return -errno;
	/* Some file systems cannot sync a directory, and then need not. */
	if (fsync(fd) < 0 && errno != EINVAL)
		ret = -errno;
	close(fd);
	return ret;
}

void format_address(const struct sockaddr *sa, socklen_t len, char *buf)
{
	char host[64], port[16];

	if (sa->sa_family == AF_UNIX) {
		const char *path = ((const struct sockaddr_un *)sa)->sun_path;
		size_t head = offsetof(struct sockaddr_un, sun_path);
		size_t n = len > head ? strnlen(path, len - head) : 0;

		snprintf(buf, ADDRESS_MAX, "unix:%.*s", (int)n, path);
	} else if (getnameinfo(sa, len, host, sizeof(host), port, sizeof(port),
			       NI_NUMERICHOST | NI_NUMERICSERV) == 0) {
		snprintf(buf, ADDRESS_MAX, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
	} else {
		snprintf(buf, ADDRESS_MAX, "(unknown address)");
	}
}

int make_pipe(int fds[2])
{
	return pipe2(fds, O_CLOEXEC | O_NONBLOCK) < 0 ? -errno : 0;
}

void poke_pipe(int fd, char byte)
{
	int saved = errno;

	while (write(fd, &byte, 1) < 0 && errno == EINTR)
		;
	errno = saved;
}

void drain_pipe(int fd)
{
	char buf[64];

	while (read(fd, buf, sizeof(buf)) == (ssize_t)sizeof(buf))
		;
}

void tune_socket(int fd)
{
	int on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
#if defined(TCP_KEEPIDLE) && defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
	/* A client that is gone without a word is noticed within two minutes, not two hours. */
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &(int){ 60 }, sizeof(int));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &(int){ 10 }, sizeof(int));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &(int){ 6 }, sizeof(int));
#endif
}

unsigned cpu_count(void)
{
	long n = sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	cpu_set_t set;

	if (sched_getaffinity(0, sizeof(set), &set) == 0)
		n = CPU_COUNT(&set);
#endif
	return n > 0 ? (unsigned)n : 1;
}
