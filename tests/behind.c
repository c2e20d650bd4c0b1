/*
 * behind: a disk that is slow where the test wants it.  test_order.py builds it and preloads it
 * into a server, and tells it through a page of shared memory what to do.
 *
 *	BEHIND_CONTROL		the file that is mapped: struct control
 *	BEHIND_COLD		nothing is found in the page cache, so that a write of a part of a
 *				page is no work for a loop
 *
 * A call waits before it is made, as one of a thread that lost its processor on the way does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

/* The order is known to test_order.py. */
struct control {
	atomic_uint_least64_t start, end;	/* changes of that range, of any file */
	atomic_uint_least64_t left;		/* how many of them will wait */
	atomic_uint_least64_t closed;		/* they wait as long as this is set */
	atomic_uint_least64_t caught;		/* how many have come to wait */
	atomic_uint_least64_t inline_;		/* of those, by threads that serve sockets */
	atomic_uint_least64_t passed;		/* of those, that are done */
	atomic_uint_least64_t sync_closed;	/* fdatasync() waits as long as this is set */
	atomic_uint_least64_t sync_caught;
	atomic_uint_least64_t jitter;		/* microseconds, at most, for some of all changes */
};

static struct control *control;
static bool cold;
static _Thread_local bool serves;
static _Thread_local unsigned dice;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("BEHIND_CONTROL");
	int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
	void *map;

	cold = getenv("BEHIND_COLD") != NULL;
	if (fd < 0)
		return;
	map = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (map != MAP_FAILED)
		control = map;
}

static void sleep_us(unsigned long us)
{
	const struct timespec t = { (time_t)(us / 1000000), (long)(us % 1000000) * 1000 };

	nanosleep(&t, NULL);
}

static void wait_for(const atomic_uint_least64_t *closed)
{
	int saved = errno;

	while (atomic_load(closed))
		sleep_us(500);
	errno = saved;
}

static void lag(unsigned long most)
{
	if (dice == 0)
		dice = (unsigned)(uintptr_t)&dice;
	dice = dice * 1103515245 + 12345;
	if (most && dice >> 16 & 1)
		sleep_us((dice >> 17) % most);
}

/* Whether the caller waited. */
static bool before(uint64_t at, uint64_t len)
{
	uint64_t left;

	if (!control)
		return false;
	lag(atomic_load(&control->jitter));
	if (at >= atomic_load(&control->end) || at + len <= atomic_load(&control->start))
		return false;
	left = atomic_load(&control->left);
	while (left > 0 && !atomic_compare_exchange_weak(&control->left, &left, left - 1))
		;
	if (left == 0)
		return false;
	if (serves)
		atomic_fetch_add(&control->inline_, 1);
	atomic_fetch_add(&control->caught, 1);
	wait_for(&control->closed);
	return true;
}

static void after(bool waited)
{
	if (waited)
		atomic_fetch_add(&control->passed, 1);
}

static uint64_t bytes(const struct iovec *iov, int count)
{
	uint64_t n = 0;

	for (int i = 0; i < count; i++)
		n += iov[i].iov_len;
	return n;
}

#define CHANGE(type, name, parameters, at, len, ...)						\
type name parameters										\
{												\
	bool waited = before((uint64_t)(at), len);						\
	type ret = REAL(name)(__VA_ARGS__);							\
												\
	after(waited);										\
	return ret;										\
}

#define CHANGES(pwrite_name, pwritev_name, fallocate_name, off_type)				\
CHANGE(ssize_t, pwrite_name, (int fd, const void *buf, size_t len, off_type at), at, len,	\
       fd, buf, len, at)									\
CHANGE(ssize_t, pwritev_name, (int fd, const struct iovec *iov, int n, off_type at), at,	\
       bytes(iov, n), fd, iov, n, at)								\
CHANGE(int, fallocate_name, (int fd, int mode, off_type at, off_type len), at, (uint64_t)len,	\
       fd, mode, at, len)

CHANGES(pwrite, pwritev, fallocate, off_t)
#ifdef __GLIBC__
CHANGES(pwrite64, pwritev64, fallocate64, off64_t)
CHANGE(ssize_t, pwritev2, (int fd, const struct iovec *iov, int n, off_t at, int flags), at,
       bytes(iov, n), fd, iov, n, at, flags)
CHANGE(ssize_t, pwritev64v2, (int fd, const struct iovec *iov, int n, off64_t at, int flags), at,
       bytes(iov, n), fd, iov, n, at, flags)
#endif

int fdatasync(int fd)
{
	if (control && atomic_load(&control->sync_closed)) {
		atomic_fetch_add(&control->sync_caught, 1);
		wait_for(&control->sync_closed);
	}
	return REAL(fdatasync)(fd);
}

/* Threads that serve sockets */

ssize_t recv(int fd, void *buf, size_t len, int flags)
{
	serves = true;
	return REAL(recv)(fd, buf, len, flags);
}

ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
	serves = true;
	return REAL(recvmsg)(fd, msg, flags);
}

/* The page cache */

#define COLD(error)										\
	do {											\
		if (cold) {									\
			errno = error;								\
			return -1;								\
		}										\
	} while (0)

int mincore(void *at, size_t len, unsigned char *vec)
{
	COLD(EAGAIN);
	return REAL(mincore)(at, len, vec);
}

int fstatfs(int fd, struct statfs *st)
{
	COLD(ENOSYS);
	return REAL(fstatfs)(fd, st);
}

#ifdef __GLIBC__
ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
	COLD(EAGAIN);
	return REAL(preadv2)(fd, iov, n, at, flags);
}

int fstatfs64(int fd, struct statfs64 *st)
{
	COLD(ENOSYS);
	return REAL(fstatfs64)(fd, st);
}

ssize_t preadv64v2(int fd, const struct iovec *iov, int n, off64_t at, int flags)
{
	COLD(EAGAIN);
	return REAL(preadv64v2)(fd, iov, n, at, flags);
}
#endif

long syscall(long number, ...)
{
	long a[6];
	va_list args;

	va_start(args, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(args, long);
	va_end(args);
	if (number == SYS_preadv2)
		COLD(EAGAIN);
	return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
