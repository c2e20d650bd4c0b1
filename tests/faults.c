/*
 * faults: fails, shortens or holds up the n-th call of one function of a server.  test_faults.py
 * preloads it, and says by the page that they share what it is to do.
 *
 * Functions that do the same have one name and one count: "pread" are preadv2() and pread64(),
 * too.  They are counted from the beginning; the test arms when the server is where it wants it.
 */
#include "preload.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>

/* The order is known to test_faults.py. */
enum call {
	PREAD, PWRITE, FDATASYNC, FSYNC, FALLOCATE, RECV, SEND, MALLOC, ACCEPT, OPEN, MMAP, THREAD,
	PIPE, SOCKET, CONNECT, LSEEK, TRUNCATE, LINK, POLL, STAT, READ, WRITE, FLOCK,
	UNLINK, CALLS
};

/* What is not an errno. */
enum kind {
	HALF = 1000,		/* half of the bytes, rounded up */
	ONE,			/* one byte */
	HOLD,			/* waits until it is released, and is made then */
	SLOW,			/* waits for a fifth of a second, and is made then */
};

struct control {
	atomic_uint call;	/* enum call */
	atomic_uint first;	/* the count at which it fails; 0: never */
	atomic_uint kind;
	atomic_uint times;	/* how many fail, from that one on */
	atomic_uint injected;	/* how many were */
	atomic_uint release;	/* for HOLD */
	atomic_uint count[CALLS];
};

static struct control *control;

__attribute__((constructor)) static void begin(void)
{
	control = shared_page();
}

static void hold(void)
{
	while (!atomic_load(&control->release))
		sleep_us(1000);
}

/* Counts a call.  0 if it is to be made as it is, else an errno or a kind. */
static unsigned fault(enum call call)
{
	unsigned count, first, kind;

	if (!control)
		return 0;
	count = atomic_fetch_add(&control->count[call], 1) + 1;
	first = atomic_load(&control->first);
	if (first == 0 || count < first || count - first >= atomic_load(&control->times) ||
	    atomic_load(&control->call) != call)
		return 0;
	kind = atomic_load(&control->kind);
	atomic_fetch_add(&control->injected, 1);
	if (kind == HOLD)
		hold();
	else if (kind == SLOW)
		sleep_us(200000);
	else
		return kind;
	return 0;
}

/* Whether the call fails; errno says why. */
static bool fails(enum call call)
{
	unsigned kind = fault(call);

	if (kind == 0)
		return false;
	errno = (int)kind;
	return true;
}

static size_t shortened(unsigned kind, size_t len)
{
	if (kind == HALF)
		return len - len / 2;
	return kind == ONE && len > 0 ? 1 : len;
}

/* The first bytes of a vector: how many places of it, of which the last is cut. */
static int cut(struct iovec *to, const struct iovec *from, int count, unsigned kind)
{
	size_t left = 0;
	int n = 0;

	for (int i = 0; i < count; i++)
		left += from[i].iov_len;
	left = shortened(kind, left);
	for (; n < count && left > 0; n++) {
		to[n].iov_base = from[n].iov_base;
		to[n].iov_len = from[n].iov_len < left ? from[n].iov_len : left;
		left -= to[n].iov_len;
	}
	return n;
}

enum { VECTOR_MAX = 1024 };

/* Bytes: kind is what fault() told, expr the call with the bytes len, or the vector iov. */
#define BYTES(call, expr)									\
	do {											\
		unsigned kind = fault(call);							\
												\
		if (kind > 0 && kind < HALF) {							\
			errno = (int)kind;							\
			return -1;								\
		}										\
		len = shortened(kind, len);							\
		return expr;									\
	} while (0)

#define VECTORS(call, expr)									\
	do {											\
		unsigned kind = fault(call);							\
		struct iovec part[VECTOR_MAX];							\
												\
		if (kind > 0 && kind < HALF) {							\
			errno = (int)kind;							\
			return -1;								\
		}										\
		if (kind >= HALF) {								\
			count = cut(part, iov, count, kind);					\
			iov = part;								\
		}										\
		return expr;									\
	} while (0)

/* Files */

#define AT_POSITIONS(pread_name, pwrite_name, pwritev_name, off_type)				\
ssize_t pread_name(int fd, void *buf, size_t len, off_type at)					\
{												\
	BYTES(PREAD, REAL(pread_name)(fd, buf, len, at));					\
}												\
												\
ssize_t pwrite_name(int fd, const void *buf, size_t len, off_type at)				\
{												\
	BYTES(PWRITE, REAL(pwrite_name)(fd, buf, len, at));					\
}												\
												\
ssize_t pwritev_name(int fd, const struct iovec *iov, int count, off_type at)			\
{												\
	VECTORS(PWRITE, REAL(pwritev_name)(fd, iov, count, at));				\
}

AT_POSITIONS(pread, pwrite, pwritev, off_t)

static long preadv2_call(const long *a)
{
	const struct iovec *iov = (const struct iovec *)a[1];
	int count = (int)a[2];

	VECTORS(PREAD, REAL(syscall)(SYS_preadv2, a[0], iov, count, a[3], a[4], a[5]));
}

SYSCALL(preadv2_call)

/* What does not fail is not made either: there are thousands of servers, and no power cut. */
int fdatasync(int fd)
{
	(void)fd;
	return fails(FDATASYNC) ? -1 : 0;
}

int fsync(int fd)
{
	(void)fd;
	return fails(FSYNC) ? -1 : 0;
}

int flock(int fd, int operation)
{
	return fails(FLOCK) ? -1 : REAL(flock)(fd, operation);
}

#define SIZES(fallocate_name, posix_fallocate_name, ftruncate_name, truncate_name, lseek_name,	\
	      off_type)										\
int fallocate_name(int fd, int mode, off_type at, off_type len)					\
{												\
	return fails(FALLOCATE) ? -1 : REAL(fallocate_name)(fd, mode, at, len);			\
}												\
												\
int posix_fallocate_name(int fd, off_type at, off_type len)					\
{												\
	unsigned kind = fault(FALLOCATE);							\
												\
	return kind ? (int)kind : REAL(posix_fallocate_name)(fd, at, len);			\
}												\
												\
int ftruncate_name(int fd, off_type size)							\
{												\
	return fails(TRUNCATE) ? -1 : REAL(ftruncate_name)(fd, size);				\
}												\
												\
int truncate_name(const char *path, off_type size)						\
{												\
	return fails(TRUNCATE) ? -1 : REAL(truncate_name)(path, size);				\
}												\
												\
off_type lseek_name(int fd, off_type at, int whence)						\
{												\
	return fails(LSEEK) ? -1 : REAL(lseek_name)(fd, at, whence);				\
}

SIZES(fallocate, posix_fallocate, ftruncate, truncate, lseek, off_t)

#define STATS(stat_name, lstat_name, fstat_name, stat_type)					\
int stat_name(const char *path, stat_type *st)							\
{												\
	return fails(STAT) ? -1 : REAL(stat_name)(path, st);					\
}												\
												\
int lstat_name(const char *path, stat_type *st)							\
{												\
	return fails(STAT) ? -1 : REAL(lstat_name)(path, st);					\
}												\
												\
int fstat_name(int fd, stat_type *st)								\
{												\
	return fails(STAT) ? -1 : REAL(fstat_name)(fd, st);					\
}

STATS(stat, lstat, fstat, struct stat)

static mode_t mode_of(int flags, va_list args)
{
	return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(args, mode_t) : 0;
}

#define OPENS(open_name, mkostemp_name)								\
int open_name(const char *path, int flags, ...)							\
{												\
	mode_t mode;										\
	va_list args;										\
												\
	va_start(args, flags);									\
	mode = mode_of(flags, args);								\
	va_end(args);										\
	return fails(OPEN) ? -1 : REAL(open_name)(path, flags, mode);				\
}												\
												\
int mkostemp_name(char *path, int flags)							\
{												\
	return fails(OPEN) ? -1 : REAL(mkostemp_name)(path, flags);				\
}

OPENS(open, mkostemp)

int link(const char *from, const char *to)
{
	return fails(LINK) ? -1 : REAL(link)(from, to);
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags)
{
	return fails(LINK) ? -1 : REAL(linkat)(from_dir, from, to_dir, to, flags);
}

int rename(const char *from, const char *to)
{
	return fails(LINK) ? -1 : REAL(rename)(from, to);
}

int unlink(const char *path)
{
	return fails(UNLINK) ? -1 : REAL(unlink)(path);
}

/* Memory.  dlsym() may want some itself.  A sanitizer has an allocator of its own. */

#if defined(__GLIBC__) && !defined(FAULTS_NO_MALLOC)
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t size);

void *malloc(size_t size)
{
	return fails(MALLOC) ? NULL : __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
	return fails(MALLOC) ? NULL : __libc_calloc(n, size);
}

void *realloc(void *p, size_t size)
{
	return fails(MALLOC) ? NULL : __libc_realloc(p, size);
}
#endif

#define MAPS(mmap_name, off_type)								\
void *mmap_name(void *at, size_t len, int prot, int flags, int fd, off_type off)		\
{												\
	return fails(MMAP) ? MAP_FAILED : REAL(mmap_name)(at, len, prot, flags, fd, off);	\
}

MAPS(mmap, off_t)

/* Sockets, pipes, threads */

/*
 * A look for input that finds none is not counted: how many there are is a matter of chance.
 * poll() sees an error without taking it; MSG_PEEK would take a reset away from the server,
 * which then finds the end of an orderly connection.
 */
static bool finds_nothing(int fd)
{
	struct pollfd pfd = { .fd = fd, .events = POLLIN };
	int saved = errno;
	bool nothing = REAL(poll)(&pfd, 1, 0) == 0;

	errno = saved;
	return nothing;
}

ssize_t recv(int fd, void *buf, size_t len, int flags)
{
	if (finds_nothing(fd))
		return REAL(recv)(fd, buf, len, flags);
	BYTES(RECV, REAL(recv)(fd, buf, len, flags));
}

ssize_t send(int fd, const void *buf, size_t len, int flags)
{
	BYTES(SEND, REAL(send)(fd, buf, len, flags));
}

static ssize_t message(enum call call, int fd, const struct msghdr *given, int flags,
		       ssize_t (*real)(int, struct msghdr *, int))
{
	struct msghdr msg = *given;
	struct iovec *iov = msg.msg_iov;
	int count = (int)msg.msg_iovlen;

	VECTORS(call, (msg.msg_iov = iov, msg.msg_iovlen = (size_t)count, real(fd, &msg, flags)));
}

ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
	if (finds_nothing(fd))
		return REAL(recvmsg)(fd, msg, flags);
	return message(RECV, fd, msg, flags, REAL(recvmsg));
}

ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
	return message(SEND, fd, msg, flags,
		       (ssize_t (*)(int, struct msghdr *, int))dlsym(RTLD_NEXT, "sendmsg"));
}

ssize_t read(int fd, void *buf, size_t len)
{
	BYTES(READ, REAL(read)(fd, buf, len));
}

ssize_t write(int fd, const void *buf, size_t len)
{
	BYTES(WRITE, REAL(write)(fd, buf, len));
}

int accept4(int fd, struct sockaddr *addr, socklen_t *len, int flags)
{
	return fails(ACCEPT) ? -1 : REAL(accept4)(fd, addr, len, flags);
}

int socket(int domain, int type, int protocol)
{
	return fails(SOCKET) ? -1 : REAL(socket)(domain, type, protocol);
}

int connect(int fd, const struct sockaddr *addr, socklen_t len)
{
	return fails(CONNECT) ? -1 : REAL(connect)(fd, addr, len);
}

int socketpair(int domain, int type, int protocol, int fds[2])
{
	return fails(PIPE) ? -1 : REAL(socketpair)(domain, type, protocol, fds);
}

int pipe2(int fds[2], int flags)
{
	return fails(PIPE) ? -1 : REAL(pipe2)(fds, flags);
}

int poll(struct pollfd *fds, nfds_t n, int timeout)
{
	return fails(POLL) ? -1 : REAL(poll)(fds, n, timeout);
}

int ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout, const sigset_t *mask)
{
	return fails(POLL) ? -1 : REAL(ppoll)(fds, n, timeout, mask);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg)
{
	unsigned kind = fault(THREAD);

	return kind ? (int)kind : REAL(pthread_create)(thread, attr, run, arg);
}

/* The names that programs with 64-bit positions use where glibc has both. */
#ifdef __GLIBC__
AT_POSITIONS(pread64, pwrite64, pwritev64, off64_t)
SIZES(fallocate64, posix_fallocate64, ftruncate64, truncate64, lseek64, off64_t)
STATS(stat64, lstat64, fstat64, struct stat64)
OPENS(open64, mkostemp64)
MAPS(mmap64, off64_t)
#endif
