/*
 * powercut: records what a server does to the files of one directory, and what passes through
 * its sockets, in one order.  test_powercut.py builds it, preloads it, and makes of the record
 * the files that a power cut at any moment may leave.
 *
 *	POWERCUT_DIRECTORY	the directory, an absolute path without links in it
 *	POWERCUT_LOG		the record, to which is added; not in that directory
 *	POWERCUT_KILL		a number n: the server is killed at the n-th moment, which is
 *				either before or after something that is recorded
 *	POWERCUT_HOLD_WRITE	a path: when there is such a file, and until it is gone, the first
 *				thread that writes to a new temporary file waits, and the record
 *				says so
 *	POWERCUT_HOLD_SYNC	likewise for the first thread that begins a sync
 *
 * A call that changes a file is made and recorded under one lock, so that the order of the
 * records is the order of the changes.  A sync has two records: what was recorded before the
 * first is durable at the second.  What was received is recorded before the server sees it, and
 * what is sent before anybody can answer to it.
 *
 * copy_file_range(), splice(), stores through a mapping and their like are not seen: the test
 * compares the files with the record, so that it does not miss a server that uses them.
 */
#include "preload.h"

#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>

/* Kinds of records.  The numbers are known to test_powercut.py. */
enum kind {
	WRITE = 1,		/* at: offset; bytes: the data */
	TRUNCATE,		/* at: the size */
	ALLOCATE,		/* at: the size, if the file was shorter */
	ZERO,			/* at: offset, length; inside the file */
	SYNC,			/* begins */
	SYNCED,			/* at: 1 if it succeeded */
	CREATE,			/* file: the new one; bytes: its name, which may be "" */
	UNLINK,			/* bytes: the name */
	RENAME,			/* bytes: the names, a NUL between them */
	LINK,			/* likewise; file: that which had no name, the first is "" then */
	RECEIVE,		/* file: the socket; bytes: the data */
	SEND,
	CLONE,			/* at: inode number of the file that it is a copy of now */
	HELD,			/* a thread waits: POWERCUT_HOLD */
};

/* Before the bytes, in the machine's byte order. */
struct record {
	uint32_t kind, thread;
	uint64_t file;		/* inode number */
	uint64_t at, length;
	uint64_t bytes;
};

#ifdef __GLIBC__
typedef unsigned long ioctl_request;
#else
typedef int ioctl_request;
#endif

enum {
	LOG_FD = 900,			/* where the server's own descriptors do not come */
};

/* The lock, which guards all that follows it. */
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;

static unsigned long moments, last_moment;
static uint64_t temporary;		/* the inode of a new temporary file; 0: none */
static bool somebody_waits;		/* by the wish of the test */

static char directory[4096];
static const char *hold_write, *hold_sync;
static size_t directory_len;
static int log_fd = -1;

__attribute__((constructor)) static void begin(void)
{
	const char *dir = getenv("POWERCUT_DIRECTORY"), *log = getenv("POWERCUT_LOG");
	const char *last = getenv("POWERCUT_KILL");
	int fd;

	if (!dir || !log || strlen(dir) >= sizeof(directory))
		return;
	directory_len = strlen(strcpy(directory, dir));
	fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0600);
	log_fd = fcntl(fd, F_DUPFD_CLOEXEC, LOG_FD);
	close(fd);
	hold_write = getenv("POWERCUT_HOLD_WRITE");
	hold_sync = getenv("POWERCUT_HOLD_SYNC");
	last_moment = last ? strtoul(last, NULL, 10) : 0;
}

/* From here on with the lock, as far as nothing else is said.  errno stays. */

static void append(enum kind kind, uint64_t file, uint64_t at, uint64_t length,
		   const struct iovec *data, int count, uint64_t bytes)
{
	struct record r = { kind, (uint32_t)syscall(SYS_gettid), file, at, length, bytes };
	struct iovec iov[1024 + 1] = { { &r, sizeof(r) } };
	int saved = errno, n = 1;

	for (int i = 0; i < count && bytes > 0; i++) {
		size_t len = data[i].iov_len < bytes ? data[i].iov_len : bytes;

		iov[n++] = (struct iovec){ data[i].iov_base, len };
		bytes -= len;
	}
	if (syscall(SYS_writev, log_fd, iov, n) < (long)sizeof(r))
		abort();
	errno = saved;
}

/* Something was recorded, or will be. */
static void moment(void)
{
	if (++moments == last_moment)
		kill(getpid(), SIGKILL);
}

static void put(enum kind kind, uint64_t file, uint64_t at, uint64_t length,
		const struct iovec *data, int count, uint64_t bytes)
{
	append(kind, file, at, length, data, count, bytes);
	moment();
}

static void put_bytes(enum kind kind, uint64_t file, const void *buf, size_t len)
{
	struct iovec iov = { (void *)buf, len };

	put(kind, file, 0, 0, &iov, 1, len);
}

/* Take the lock for a call that changes something, and give it back. */

static void begin_change(void)
{
	pthread_mutex_lock(&order);
	moment();
}

static void end_change(void)
{
	pthread_mutex_unlock(&order);
}

/* What a descriptor is; without the lock. */
enum what { OTHER, FILE_HERE, SOCKET };

static bool is_here(const char *path)
{
	return log_fd >= 0 && strncmp(path, directory, directory_len) == 0 &&
	       (path[directory_len] == '/' || path[directory_len] == '\0');
}

static enum what what_is(int fd, uint64_t *inode)
{
	char link[64], path[4096];
	struct stat st;
	ssize_t n;
	int saved = errno;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = log_fd < 0 || fd == log_fd ? -1 : readlink(link, path, sizeof(path) - 1);
	if (n < 0 || fstat(fd, &st) < 0) {
		errno = saved;
		return OTHER;
	}
	path[n] = '\0';
	*inode = st.st_ino;
	return S_ISSOCK(st.st_mode) ? SOCKET : is_here(path) ? FILE_HERE : OTHER;
}

/* A call that is made and recorded in its place in the order. */
struct call {
	enum what what;
	uint64_t inode;
};

static struct call enter(int fd)
{
	struct call c = { OTHER, 0 };

	c.what = what_is(fd, &c.inode);
	if (c.what != OTHER)
		begin_change();
	return c;
}

static void leave(const struct call *c)
{
	if (c->what != OTHER)
		end_change();
}

/* Without the lock: wait while there is a file at that path, if nobody else does. */
static void wait_for(const char *path, uint64_t inode)
{
	bool waits;

	if (!path || access(path, F_OK) < 0)
		return;
	pthread_mutex_lock(&order);
	waits = !somebody_waits;
	somebody_waits = true;
	if (waits)
		put(HELD, inode, 0, 0, NULL, 0, 0);
	pthread_mutex_unlock(&order);
	if (!waits)
		return;
	while (access(path, F_OK) == 0)
		sleep_us(1000);
	pthread_mutex_lock(&order);
	somebody_waits = false;
	pthread_mutex_unlock(&order);
}

static void wait_to_write(int fd)
{
	uint64_t inode;

	if (hold_write && what_is(fd, &inode) == FILE_HERE && inode == temporary)
		wait_for(hold_write, inode);
}

/* Writing and sending */

static ssize_t wrote(const struct call *c, ssize_t n, int64_t at, const struct iovec *iov,
		     int count)
{
	if (c->what != OTHER && n > 0)
		put(c->what == SOCKET ? SEND : WRITE, c->inode, (uint64_t)at, 0, iov, count,
		    (uint64_t)n);
	leave(c);
	return n;
}

static ssize_t wrote_bytes(const struct call *c, ssize_t n, int64_t at, const void *buf)
{
	struct iovec iov = { (void *)buf, n > 0 ? (size_t)n : 0 };

	return wrote(c, n, at, &iov, 1);
}

/* Where write() writes; sockets have no such place. */
static int64_t position(const struct call *c, int fd)
{
	return c->what == FILE_HERE ? lseek(fd, 0, SEEK_CUR) : 0;
}

ssize_t write(int fd, const void *buf, size_t len)
{
	struct call c = enter(fd);
	int64_t at = position(&c, fd);

	return wrote_bytes(&c, REAL(write)(fd, buf, len), at, buf);
}

ssize_t writev(int fd, const struct iovec *iov, int count)
{
	struct call c = enter(fd);
	int64_t at = position(&c, fd);

	return wrote(&c, REAL(writev)(fd, iov, count), at, iov, count);
}

#define PWRITES(pwrite_name, pwritev_name, off_type)						\
ssize_t pwrite_name(int fd, const void *buf, size_t len, off_type at)				\
{												\
	struct call c;										\
												\
	wait_to_write(fd);									\
	c = enter(fd);										\
	return wrote_bytes(&c, REAL(pwrite_name)(fd, buf, len, at), at, buf);			\
}												\
												\
ssize_t pwritev_name(int fd, const struct iovec *iov, int count, off_type at)			\
{												\
	struct call c = enter(fd);								\
												\
	return wrote(&c, REAL(pwritev_name)(fd, iov, count, at), at, iov, count);		\
}

PWRITES(pwrite, pwritev, off_t)

ssize_t send(int fd, const void *buf, size_t len, int flags)
{
	struct call c = enter(fd);

	return wrote_bytes(&c, REAL(send)(fd, buf, len, flags), 0, buf);
}

ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
	struct call c = enter(fd);

	return wrote(&c, REAL(sendmsg)(fd, msg, flags), 0, msg->msg_iov, (int)msg->msg_iovlen);
}

/* Receiving: it may block, and so is recorded afterwards. */

static ssize_t received(int fd, ssize_t n, const struct iovec *iov, int count)
{
	uint64_t inode;

	if (n <= 0 || what_is(fd, &inode) != SOCKET)
		return n;
	pthread_mutex_lock(&order);
	put(RECEIVE, inode, 0, 0, iov, count, (uint64_t)n);
	pthread_mutex_unlock(&order);
	return n;
}

ssize_t recv(int fd, void *buf, size_t len, int flags)
{
	struct iovec iov = { buf, len };
	ssize_t n = REAL(recv)(fd, buf, len, flags);

	return flags & MSG_PEEK ? n : received(fd, n, &iov, 1);
}

ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
	ssize_t n = REAL(recvmsg)(fd, msg, flags);

	return flags & MSG_PEEK ? n : received(fd, n, msg->msg_iov, (int)msg->msg_iovlen);
}

ssize_t read(int fd, void *buf, size_t len)
{
	struct iovec iov = { buf, len };

	return received(fd, REAL(read)(fd, buf, len), &iov, 1);
}

/* The size, and zeros */

static int changed(const struct call *c, int result, enum kind kind, uint64_t at, uint64_t length)
{
	if (c->what == FILE_HERE && result == 0)
		put(kind, c->inode, at, length, NULL, 0, 0);
	leave(c);
	return result;
}

#define SIZES(ftruncate_name, fallocate_name, posix_fallocate_name, off_type)			\
int ftruncate_name(int fd, off_type size)							\
{												\
	struct call c = enter(fd);								\
												\
	return changed(&c, REAL(ftruncate_name)(fd, size), TRUNCATE, (uint64_t)size, 0);	\
}												\
												\
int fallocate_name(int fd, int mode, off_type at, off_type len)					\
{												\
	struct call c = enter(fd);								\
	int result = REAL(fallocate_name)(fd, mode, at, len);					\
												\
	if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))				\
		return changed(&c, result, ZERO, (uint64_t)at, (uint64_t)len);			\
	return changed(&c, result, ALLOCATE, mode & FALLOC_FL_KEEP_SIZE ? 0 :			\
		       (uint64_t)(at + len), 0);						\
}												\
												\
int posix_fallocate_name(int fd, off_type at, off_type len)					\
{												\
	struct call c = enter(fd);								\
												\
	return changed(&c, REAL(posix_fallocate_name)(fd, at, len), ALLOCATE,			\
		       (uint64_t)(at + len), 0);						\
}

SIZES(ftruncate, fallocate, posix_fallocate, off_t)

/* A file becomes a copy of another one. */
int ioctl(int fd, ioctl_request what, ...)
{
	struct call c = { OTHER, 0 };
	struct stat st;
	va_list args;
	void *arg;
	int result;

	va_start(args, what);
	arg = va_arg(args, void *);
	va_end(args);
	if (what == (ioctl_request)FICLONE)
		c = enter(fd);
	result = REAL(ioctl)(fd, what, arg);
	if (c.what == OTHER)
		return result;
	return changed(&c, result, CLONE, fstat((int)(intptr_t)arg, &st) < 0 ? 0 : st.st_ino, 0);
}

/* Syncs: others go on meanwhile. */

static void put_sync(const struct call *c, enum kind kind, bool ok)
{
	if (c->what != FILE_HERE)
		return;
	pthread_mutex_lock(&order);
	put(kind, c->inode, ok, 0, NULL, 0, 0);
	pthread_mutex_unlock(&order);
}

static int do_sync(int fd, int (*real)(int))
{
	struct call c = { OTHER, 0 };
	int result;

	c.what = what_is(fd, &c.inode);
	put_sync(&c, SYNC, true);
	if (c.what == FILE_HERE)
		wait_for(hold_sync, c.inode);
	result = real(fd);
	put_sync(&c, SYNCED, result == 0);
	return result;
}

int fdatasync(int fd)
{
	return do_sync(fd, REAL(fdatasync));
}

int fsync(int fd)
{
	return do_sync(fd, REAL(fsync));
}

/* Names: paths are absolute, or they are not noticed. */

static const char *name_of(const char *path)
{
	if (!is_here(path) || path[directory_len] != '/')
		return NULL;
	path += directory_len;
	return path + strspn(path, "/");
}

/* A file that is new, if it has a name here, or empty again. */
static void put_opened(int fd, const char *name)
{
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		return;
	if (name)
		put_bytes(CREATE, st.st_ino, name, strlen(name));
	else if (st.st_size == 0)
		put(TRUNCATE, st.st_ino, 0, 0, NULL, 0, 0);
}

/* The same for one that is to be renamed, or has no name as yet. */
static void put_temporary(int fd, const char *name)
{
	struct stat st;

	put_opened(fd, name);
	if (fd >= 0 && fstat(fd, &st) == 0)
		temporary = st.st_ino;
}

typedef int open_function(const char *path, int flags, ...);

static int do_open(open_function *real, const char *path, int flags, mode_t mode)
{
	const char *name = flags & (O_CREAT | O_TRUNC) ? name_of(path) : NULL;
	bool nameless = (flags & O_TMPFILE) == O_TMPFILE && is_here(path), exists;
	int fd;

	if (!name && !nameless)
		return real(path, flags, mode);
	begin_change();
	exists = faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
	fd = real(path, flags, mode);
	if (nameless)
		put_temporary(fd, "");
	else
		put_opened(fd, exists ? NULL : name);
	end_change();
	return fd;
}

static mode_t mode_of(int flags, va_list args)
{
	return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(args, mode_t) : 0;
}

#define OPEN(open_name)										\
int open_name(const char *path, int flags, ...)							\
{												\
	mode_t mode;										\
	va_list args;										\
												\
	va_start(args, flags);									\
	mode = mode_of(flags, args);								\
	va_end(args);										\
	return do_open(REAL(open_name), path, flags, mode);					\
}

OPEN(open)

#define TEMPORARY(mkostemp_name)								\
int mkostemp_name(char *path, int flags)							\
{												\
	int fd;											\
												\
	if (!name_of(path))									\
		return REAL(mkostemp_name)(path, flags);					\
	begin_change();										\
	fd = REAL(mkostemp_name)(path, flags);							\
	put_temporary(fd, name_of(path));							\
	end_change();										\
	return fd;										\
}

TEMPORARY(mkostemp)

int unlink(const char *path)
{
	const char *name = name_of(path);
	int result;

	if (!name)
		return REAL(unlink)(path);
	begin_change();
	result = REAL(unlink)(path);
	if (result == 0)
		put_bytes(UNLINK, 0, name, strlen(name));
	end_change();
	return result;
}

#define TRUNCATES(truncate_name, off_type)							\
int truncate_name(const char *path, off_type size)						\
{												\
	struct stat st;										\
	int result;										\
												\
	if (!name_of(path))									\
		return REAL(truncate_name)(path, size);						\
	begin_change();										\
	result = REAL(truncate_name)(path, size);						\
	if (result == 0 && stat(path, &st) == 0)						\
		put(TRUNCATE, st.st_ino, (uint64_t)size, 0, NULL, 0, 0);			\
	end_change();										\
	return result;										\
}

TRUNCATES(truncate, off_t)

/* Two names of one file; both are in the directory, or it is not noticed. */
static int do_two(enum kind kind, int (*real)(const char *, const char *), const char *from,
		  const char *to)
{
	const char *old = name_of(from), *new = name_of(to);
	struct iovec iov[2] = { { (void *)old, old ? strlen(old) + 1 : 0 },
				{ (void *)new, new ? strlen(new) : 0 } };
	int result;

	if (!old || !new)
		return real(from, to);
	begin_change();
	result = real(from, to);
	if (result == 0)
		put(kind, 0, 0, 0, iov, 2, iov[0].iov_len + iov[1].iov_len);
	end_change();
	return result;
}

int rename(const char *from, const char *to)
{
	return do_two(RENAME, REAL(rename), from, to);
}

int link(const char *from, const char *to)
{
	return do_two(LINK, REAL(link), from, to);
}

/* A file without a name gets one: from is a descriptor in /proc. */
int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags)
{
	const char *name = name_of(to);
	struct iovec iov[2] = { { (void *)"", 1 }, { (void *)name, name ? strlen(name) : 0 } };
	struct stat st;
	int result;

	if (!name)
		return REAL(linkat)(from_fd, from, to_fd, to, flags);
	begin_change();
	result = REAL(linkat)(from_fd, from, to_fd, to, flags);
	if (result == 0 && stat(to, &st) == 0)
		put(LINK, st.st_ino, 0, 0, iov, 2, iov[0].iov_len + iov[1].iov_len);
	end_change();
	return result;
}

/* The names that programs with 64-bit positions use where glibc has both. */
#ifdef __GLIBC__
PWRITES(pwrite64, pwritev64, off64_t)
SIZES(ftruncate64, fallocate64, posix_fallocate64, off64_t)
OPEN(open64)
TRUNCATES(truncate64, off64_t)
TEMPORARY(mkostemp64)
#endif
