/*
 * stable: fails calls on files of certain names, or ends the server at them.  test_durability.py
 * preloads it, and says by the page that they share what it is to do.  Other than with faults.c,
 * every call that does not fail is made: data gets onto the disk.
 */
#include "preload.h"

#include <fnmatch.h>
#include <limits.h>

/* Bits; the order is known to test_durability.py. */
enum call { FDATASYNC, FSYNC, PWRITE, FALLOCATE, FTRUNCATE, LINK };

/* What is not an errno. */
enum kind {
	END_BEFORE = 1000,	/* as SIGKILL does, and the call is not made */
	END_AFTER,
};

struct control {
	atomic_uint calls;	/* a bit for each enum call that fails */
	atomic_uint kind;
	atomic_uint skip;	/* how many are left alone first */
	atomic_uint times;	/* how many fail then */
	atomic_uint injected;	/* how many were */
	char name[1024];	/* a pattern for fnmatch(), of the whole path */
};

static struct control *control;

__attribute__((constructor)) static void begin(void)
{
	control = shared_page();
}

static bool take_one(atomic_uint *left)
{
	unsigned n = atomic_load(left);

	while (n > 0)
		if (atomic_compare_exchange_weak(left, &n, n - 1))
			return true;
	return false;
}

static bool has_name(int fd)
{
	char link[64], path[PATH_MAX];
	ssize_t n;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, path, sizeof(path) - 1);
	if (n < 0)
		return false;
	path[n] = '\0';
	return fnmatch(control->name, path, 0) == 0;
}

static void end(void)
{
	syscall(SYS_kill, getpid(), 9);
	for (;;)
		pause();
}

/* 0 if the call is to be made; else an errno, or END_AFTER.  fd -1: any name will do. */
static int fault(enum call call, int fd)
{
	int saved = errno, kind;

	if (!control || !(atomic_load(&control->calls) >> call & 1) ||
	    atomic_load(&control->times) == 0)
		return 0;
	if (fd >= 0 && !has_name(fd)) {
		errno = saved;
		return 0;
	}
	errno = saved;
	if (take_one(&control->skip) || !take_one(&control->times))
		return 0;
	kind = (int)atomic_load(&control->kind);
	atomic_fetch_add(&control->injected, 1);
	if (kind == END_BEFORE)
		end();
	return kind;
}

/* The value of the call, after which the server may end. */
#define CALL(type, call, fd, expr)				\
	do {							\
		int kind = fault(call, fd);			\
		type value;					\
								\
		if (kind > 0 && kind < END_BEFORE) {		\
			errno = kind;				\
			return -1;				\
		}						\
		value = expr;					\
		if (kind == END_AFTER)				\
			end();					\
		return value;					\
	} while (0)

int fdatasync(int fd)
{
	CALL(int, FDATASYNC, fd, REAL(fdatasync)(fd));
}

int fsync(int fd)
{
	CALL(int, FSYNC, fd, REAL(fsync)(fd));
}

ssize_t write(int fd, const void *buf, size_t len)
{
	CALL(ssize_t, PWRITE, fd, REAL(write)(fd, buf, len));
}

int link(const char *from, const char *to)
{
	CALL(int, LINK, -1, REAL(link)(from, to));
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags)
{
	CALL(int, LINK, -1, REAL(linkat)(from_dir, from, to_dir, to, flags));
}

int rename(const char *from, const char *to)
{
	CALL(int, LINK, -1, REAL(rename)(from, to));
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags)
{
	CALL(int, LINK, -1, REAL(renameat2)(from_dir, from, to_dir, to, flags));
}

#define POSITIONED(pwrite_name, pwritev_name, fallocate_name, posix_fallocate_name,		\
		   ftruncate_name, off_type)							\
ssize_t pwrite_name(int fd, const void *buf, size_t len, off_type at)				\
{												\
	CALL(ssize_t, PWRITE, fd, REAL(pwrite_name)(fd, buf, len, at));				\
}												\
												\
ssize_t pwritev_name(int fd, const struct iovec *iov, int count, off_type at)			\
{												\
	CALL(ssize_t, PWRITE, fd, REAL(pwritev_name)(fd, iov, count, at));			\
}												\
												\
int fallocate_name(int fd, int mode, off_type at, off_type len)					\
{												\
	CALL(int, FALLOCATE, fd, REAL(fallocate_name)(fd, mode, at, len));			\
}												\
												\
int posix_fallocate_name(int fd, off_type at, off_type len)					\
{												\
	int kind = fault(FALLOCATE, fd);							\
												\
	return kind ? kind : REAL(posix_fallocate_name)(fd, at, len);				\
}												\
												\
int ftruncate_name(int fd, off_type size)							\
{												\
	CALL(int, FTRUNCATE, fd, REAL(ftruncate_name)(fd, size));				\
}

POSITIONED(pwrite, pwritev, fallocate, posix_fallocate, ftruncate, off_t)

/* The names that programs with 64-bit positions use where glibc has both. */
#ifdef __GLIBC__
POSITIONED(pwrite64, pwritev64, fallocate64, posix_fallocate64, ftruncate64, off64_t)
#endif
