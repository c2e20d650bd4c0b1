/*
 * slow: a disk that is slow where the test wants it, preloaded into a server.
 *
 *	SLOW_IMAGE		calls for this file wait ...
 *	SLOW_WHILE		... as long as that one exists
 *	SLOW_COLD		nothing is found in the page cache, of whatever file, so that no
 *				read is work for a loop, nor a write of a part of a page
 *
 * The page that is shared with the test says what else waits.  A call waits before it is made, as
 * one of a thread that lost its processor on the way does.
 */
#include "preload.h"

#include <sys/vfs.h>

/* The order is known to test_order.py. */
struct control {
	atomic_uint_least64_t start, end;	/* changes of that range, of any file */
	atomic_uint_least64_t left;		/* how many of them will wait */
	atomic_uint_least64_t closed;		/* they wait as long as this is set */
	atomic_uint_least64_t caught;		/* how many have come to wait */
	atomic_uint_least64_t inline_;		/* of those, by threads that serve sockets */
	atomic_uint_least64_t passed;		/* of those, that are done */
	atomic_uint_least64_t sync_closed;	/* fdatasync() and fsync() wait as long as this is set */
	atomic_uint_least64_t sync_caught;
	atomic_uint_least64_t jitter;		/* microseconds, at most, for some of all changes */
};

static struct control *control;
static const char *image, *image_while;
static bool cold;
static _Thread_local bool serves;
static _Thread_local unsigned dice;

__attribute__((constructor)) static void begin(void)
{
	control = shared_page();
	image = getenv("SLOW_IMAGE");
	image_while = getenv("SLOW_WHILE");
	cold = getenv("SLOW_COLD") != NULL;
}

static void wait_for_image(int fd)
{
	struct stat a, b;

	if (!image || stat(image, &a) < 0 || fstat(fd, &b) < 0 || a.st_ino != b.st_ino)
		return;
	while (access(image_while, F_OK) == 0)
		sleep_us(1000);
}

static void wait_for(const atomic_uint_least64_t *closed)
{
	while (atomic_load(closed))
		sleep_us(500);
}

static void lag(unsigned long most)
{
	if (dice == 0)
		dice = (unsigned)(uintptr_t)&dice;
	dice = dice * 1103515245 + 12345;
	if (most && dice >> 16 & 1)
		sleep_us((dice >> 17) % most);
}

/* Whether the caller waited for the test. */
static bool before(int fd, uint64_t at, uint64_t len)
{
	uint64_t left;

	wait_for_image(fd);
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

#define AT_POSITIONS(pread_name, pwrite_name, fallocate_name, off_type)				\
ssize_t pread_name(int fd, void *buf, size_t len, off_type at)					\
{												\
	wait_for_image(fd);									\
	return REAL(pread_name)(fd, buf, len, at);						\
}												\
												\
ssize_t pwrite_name(int fd, const void *buf, size_t len, off_type at)				\
{												\
	bool waited = before(fd, (uint64_t)at, len);						\
	ssize_t n = REAL(pwrite_name)(fd, buf, len, at);					\
												\
	after(waited);										\
	return n;										\
}												\
												\
int fallocate_name(int fd, int mode, off_type at, off_type len)					\
{												\
	bool waited = before(fd, (uint64_t)at, (uint64_t)len);					\
	int ret = REAL(fallocate_name)(fd, mode, at, len);					\
												\
	after(waited);										\
	return ret;										\
}

AT_POSITIONS(pread, pwrite, fallocate, off_t)
#ifdef __GLIBC__
AT_POSITIONS(pread64, pwrite64, fallocate64, off64_t)
#endif

static void wait_to_sync(void)
{
	if (control && atomic_load(&control->sync_closed)) {
		atomic_fetch_add(&control->sync_caught, 1);
		wait_for(&control->sync_closed);
	}
}

int fdatasync(int fd)
{
	wait_for_image(fd);
	wait_to_sync();
	return REAL(fdatasync)(fd);
}

int fsync(int fd)
{
	wait_to_sync();
	return REAL(fsync)(fd);
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

/* What is cold: the page cache has nothing, and no file system is in memory. */

#define COLD(error)										\
	do {											\
		if (cold) {									\
			errno = error;								\
			return -1;								\
		}										\
	} while (0)

static long preadv2_call(const long *a)
{
	COLD(EAGAIN);
	return REAL(syscall)(SYS_preadv2, a[0], a[1], a[2], a[3], a[4], a[5]);
}

SYSCALL(preadv2_call)

int fstatfs(int fd, struct statfs *st)
{
	COLD(ENOSYS);
	return REAL(fstatfs)(fd, st);
}

#ifdef __GLIBC__
int fstatfs64(int fd, struct statfs64 *st)
{
	COLD(ENOSYS);
	return REAL(fstatfs64)(fd, st);
}
#endif
