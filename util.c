/*
 * util.c - see util.h.
 */
#define _GNU_SOURCE
#include "util.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

size_t utf8_length(const uint8_t *p, size_t left)
{
	static const uint32_t least[] = { [2] = 0x80, [3] = 0x800, [4] = 0x10000 };
	uint32_t c = p[0];
	size_t n;

	if (c < 0x80)
		return c != 0;
	n = c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
	if (c < 0xc0 || c >= 0xf8 || n > left)
		return 0;
	c &= 0x7f >> n;
	for (size_t i = 1; i < n; i++) {
		if ((p[i] & 0xc0) != 0x80)
			return 0;
		c = c << 6 | (p[i] & 0x3f);
	}
	return c >= least[n] && c <= 0x10ffff && (c < 0xd800 || c > 0xdfff) ? n : 0;
}

void mask_control_characters(char *s, size_t len)
{
	size_t n;

	for (size_t i = 0; i < len; i += n) {
		const uint8_t *p = (const uint8_t *)s + i;
		uint8_t c = p[0];

		n = utf8_length(p, len - i);
		if (n == 2 && c == 0xc2)
			c = p[1];
		if (n == 0)
			n = 1;
		if (c < ' ' || (c >= 0x7f && c < 0xa0))
			memset(s + i, '?', n);
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

	if (path[0] == '/')
		return strdup(path);
	cwd = getcwd(NULL, 0);
	if (!cwd || asprintf(&result, "%s/%s", cwd, path) < 0)
		result = NULL;
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

/* Read into buf, or write what is in it. */
static int transfer_at(int fd, uint8_t *buf, uint64_t len, uint64_t off, bool out)
{
	while (len > 0) {
		ssize_t n = out ? pwrite(fd, buf, len, (off_t)off) : pread(fd, buf, len, (off_t)off);

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

int read_at(int fd, uint8_t *buf, uint64_t len, uint64_t off)
{
	return transfer_at(fd, buf, len, off, false);
}

int write_at(int fd, const uint8_t *buf, uint64_t len, uint64_t off)
{
	return transfer_at(fd, (uint8_t *)buf, len, off, true);
}

int check_stored(int fd)
{
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	while (sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE) < 0)
		if (errno != EINTR)	/* others say that the file or the kernel has no such thing */
			return errno == EIO || errno == ENOSPC || errno == EDQUOT ? -errno : 0;
#else
	(void)fd;
#endif
	return 0;
}

bool is_same_file(const char *one, const char *other)
{
	struct stat a, b;

	return one && other && stat(one, &a) == 0 && stat(other, &b) == 0 && a.st_dev == b.st_dev &&
	       a.st_ino == b.st_ino;
}

static const char *volatile unfinished;	/* the main thread's, during its start */

void forget_unfinished(void)
{
	if (unfinished)
		unlink(unfinished);
}

/* Give the file at tmp its name.  It may keep the other one. */
static int name_file(const char *tmp, const char *path, bool replace)
{
	if (!replace && link(tmp, path) == 0)
		return 0;
	if (!replace && errno != EPERM && errno != EOPNOTSUPP)	/* no links there */
		return -errno;
	return rename(tmp, path) < 0 ? -errno : 0;
}

int create_file(const char *path, bool replace, int (*fill)(void *arg, int fd), void *arg)
{
	char *tmp;
	int fd, err;

	if (asprintf(&tmp, "%s.XXXXXX", path) < 0)
		return -ENOMEM;
	unfinished = tmp;
	fd = mkostemp(tmp, O_CLOEXEC);
	err = fd < 0 ? -errno : fill(arg, fd);
	if (!err && fsync(fd) < 0)
		err = -errno;
	if (!err)
		err = name_file(tmp, path, replace);
	if (fd >= 0) {
		unlink(tmp);
		close(fd);
	}
	unfinished = NULL;
	free(tmp);
	return err ? err : sync_directory_of(path);
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
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)sa;
	const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)sa;
	char host[INET6_ADDRSTRLEN], zone[1 + IF_NAMESIZE] = "%";
	int head = offsetof(struct sockaddr_un, sun_path);
	bool zoned = sa->sa_family == AF_INET6 && v6->sin6_scope_id &&
		     if_indextoname(v6->sin6_scope_id, zone + 1);

	if (sa->sa_family == AF_UNIX)
		snprintf(buf, ADDRESS_MAX, "unix:%.*s", (int)len > head ? (int)len - head : 0,
			 ((const struct sockaddr_un *)sa)->sun_path);
	else if (sa->sa_family == AF_INET)
		snprintf(buf, ADDRESS_MAX, "%s:%u",
			 inet_ntop(AF_INET, &v4->sin_addr, host, sizeof(host)), ntohs(v4->sin_port));
	else if (sa->sa_family == AF_INET6)
		snprintf(buf, ADDRESS_MAX, "[%s%s]:%u",
			 inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof(host)), zoned ? zone : "",
			 ntohs(v6->sin6_port));
	else
		strcpy(buf, "(unknown address)");
}

void strip_brackets(char *host)
{
	size_t len = strlen(host);

	if (len < 2 || host[0] != '[' || host[len - 1] != ']')
		return;
	memmove(host, host + 1, len - 2);
	host[len - 2] = '\0';
}

int remove_own(const char *path, const struct stat *file)
{
	struct stat st;
	bool own = path && lstat(path, &st) == 0 && st.st_dev == file->st_dev &&
		   st.st_ino == file->st_ino;

	return own && unlink(path) < 0 ? -errno : 0;
}

int open_nothing(void)
{
	int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);

	return fd >= 0 ? fd : socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

int thread_start(pthread_t *thread, size_t stack, void *(*run)(void *), void *arg)
{
	pthread_attr_t attr;
	sigset_t all, before;
	int err;

	sigfillset(&all);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, stack);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(thread, &attr, run, arg);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attr);
	return err;
}

void cond_init(pthread_cond_t *cond)
{
	pthread_condattr_t clock;

	pthread_condattr_init(&clock);
	pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
	pthread_cond_init(cond, &clock);
	pthread_condattr_destroy(&clock);
}

void cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t when)
{
	struct timespec until = { (time_t)(when / 1000), (long)(when % 1000 * 1000000) };

	if (when == UINT64_MAX)
		pthread_cond_wait(cond, lock);
	else
		pthread_cond_timedwait(cond, lock, &until);
}

bool is_unix_socket(int fd)
{
	union address address;
	socklen_t len = sizeof(address);

	return getsockname(fd, &address.sa, &len) == 0 && address.sa.sa_family == AF_UNIX;
}

void tune_socket(int fd, unsigned keepalive)
{
	int on = 1, probes = 6, alive = keepalive > 0;

	/* Its buffer does not grow by itself, as TCP's does, and by default holds no full batch. */
	if (is_unix_socket(fd)) {
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &(int){ 256 * 1024 }, sizeof(int));
		return;
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &alive, sizeof(alive));
#if defined(TCP_KEEPIDLE) && defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
	int idle = (int)(keepalive + 1) / 2, interval = (int)keepalive / 2 / probes;

	if (!alive)
		return;
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, interval ? &interval : &on, sizeof(on));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
#endif
}

unsigned cpu_count(void)
{
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	cpu_set_t set;

	return sched_getaffinity(0, sizeof(set), &set) == 0 ? (unsigned)CPU_COUNT(&set) : 1;
#else
	long n = sysconf(_SC_NPROCESSORS_ONLN);

	return n > 0 ? (unsigned)n : 1;
#endif
}
