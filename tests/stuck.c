/*
 * stuck: a disk that does not answer.  test_exports.py builds it and preloads it into a server.
 *
 *	STUCK_IMAGE		calls for this file wait ...
 *	STUCK_WHILE		... as long as that one exists
 *
 * No read finds anything in the page cache, of whatever file, so that each goes to the disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void answer(int fd)
{
	const struct timespec ms = { 0, 1000000 };
	struct stat a, b;

	if (stat(getenv("STUCK_IMAGE"), &a) < 0 || fstat(fd, &b) < 0 || a.st_ino != b.st_ino)
		return;
	while (access(getenv("STUCK_WHILE"), F_OK) == 0)
		nanosleep(&ms, NULL);
}

#define WAITING(name, parameters, ...)								\
int name parameters										\
{												\
	answer(fd);										\
	return REAL(name)(__VA_ARGS__);								\
}

#define WAITING_IO(name, buffer, off_type)							\
ssize_t name(int fd, buffer *buf, size_t len, off_type at)					\
{												\
	answer(fd);										\
	return REAL(name)(fd, buf, len, at);							\
}

WAITING_IO(pread, void, off_t)
WAITING_IO(pwrite, const void, off_t)
WAITING(fallocate, (int fd, int mode, off_t at, off_t len), fd, mode, at, len)
WAITING(fdatasync, (int fd), fd)
#ifdef __GLIBC__
WAITING_IO(pread64, void, off64_t)
WAITING_IO(pwrite64, const void, off64_t)
WAITING(fallocate64, (int fd, int mode, off64_t at, off64_t len), fd, mode, at, len)
#endif

/* The page cache has nothing, and no file system is in memory. */

int fstatfs(int fd, struct statfs *st)
{
	(void)fd, (void)st;
	errno = ENOSYS;
	return -1;
}

#ifdef __GLIBC__
int fstatfs64(int fd, struct statfs64 *st)
{
	(void)fd, (void)st;
	errno = ENOSYS;
	return -1;
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
	if (number == SYS_preadv2) {
		errno = EAGAIN;
		return -1;
	}
	return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
