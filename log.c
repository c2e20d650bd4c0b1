/*
 * log.c - see log.h.
 *
 * There are two buffers.  Lines are added to one while the thread writes those of the other, which
 * may take for ever: a pipe may be full, a terminal stopped, a disk gone.  Before there is the
 * thread, a line that is not taken in FLUSH_MS is lost.
 */
#define _GNU_SOURCE
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
	LINE_BYTES = 1024,
	ROOM = 64 * 1024,		/* of each buffer */
	FLUSH_MS = 200,			/* the end waits so long for a log that nobody reads, ... */
	FILE_FLUSH_MS = 2000,		/* ... and for a disk that is busy */
	PEER_MS = 200,			/* a line of each level about clients in that time, ... */
	PEER_BURST = 500,		/* ... but so many at once, if there were none before */
	LEFT_OUT_MS = 2000,		/* until the log tells how many others there were */
	LOG_STACK = 64 * 1024,
};

enum log_to { LOG_TO_STDERR, LOG_TO_FILE, LOG_TO_SYSLOG };

/* Set before threads start; the descriptor is then the thread's. */
static enum log_to log_to = LOG_TO_STDERR;
static enum log_level log_most = LOG_EVENT;
static const char *log_program = "xnbd";
static const char *log_path;
static bool has_levels;			/* stderr is the journal's: lines begin with their level */
static int log_fd = -1;			/* the file, or a socket for syslog */

static char buffer[2][ROOM];		/* lines to be written, each with its newline */

static struct {
	pthread_mutex_t lock;		/* guards all below; a leaf */
	pthread_cond_t changed;
	bool started;			/* the thread; before, each line is written at once */
	atomic_bool pending;		/* there are lines that are not written yet */
	bool reopen;			/* it is to open the file again */
	unsigned which;			/* the buffer that lines are added to, ... */
	size_t len;			/* ... and what it holds */
	unsigned long lost;		/* lines; told behind the next one that is written */
	uint64_t used[LOG_DETAIL + 1];	/* by lines of a level about clients: until now_ms() is that */
	unsigned long left_out;		/* of these lines; to be told when ... */
	uint64_t due;			/* ... now_ms() is that; UINT64_MAX if there are none */
} queue = { .lock = PTHREAD_MUTEX_INITIALIZER, .due = UINT64_MAX };

void log_name(const char *program)
{
	const char *journal = getenv("JOURNAL_STREAM");
	char name[64];
	struct stat st;

	log_program = program;
	if (!journal || fstat(STDERR_FILENO, &st) < 0)
		return;
	snprintf(name, sizeof(name), "%llu:%llu", (unsigned long long)st.st_dev,
		 (unsigned long long)st.st_ino);
	has_levels = strcmp(journal, name) == 0;
}

void log_keep_off(int fd)
{
	struct stat a, b;

	if (fstat(fd, &a) < 0 || fstat(STDERR_FILENO, &b) < 0 || !S_ISSOCK(a.st_mode) ||
	    a.st_dev != b.st_dev || a.st_ino != b.st_ino)
		return;
	close(STDERR_FILENO);
	occupy_standard_descriptors();
	log_open(NULL);
}

void log_limit(enum log_level most)
{
	log_most = most;
}

bool log_shows(enum log_level level)
{
	return level <= log_most;
}

/* Lines */

/* The time is UTC, so that the logs of two hosts that a disk moves between agree. */
static int put_prefix(char *p, size_t room, enum log_to to, enum log_level level)
{
	/* RFC 3164, "PRI Part": error, informational, debug */
	static const unsigned char severity[] = { [LOG_ERROR] = 3, [LOG_ASKED] = 6,
						  [LOG_EVENT] = 6, [LOG_DETAIL] = 7 };
	enum { DAEMON = 3 << 3 };
	time_t now = time(NULL);
	struct tm tm;

	switch (to) {
	case LOG_TO_FILE:
		gmtime_r(&now, &tm);
		return snprintf(p, room, "%04d-%02d-%02dT%02d:%02d:%02dZ: ", tm.tm_year + 1900,
				tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec);
	case LOG_TO_SYSLOG:	/* whose daemon adds the time */
		return snprintf(p, room, "<%d>%s[%d]: ", DAEMON | severity[level], log_program,
				(int)getpid());
	default:
		return has_levels ? snprintf(p, room, "<%d>%s: ", severity[level], log_program) :
				    snprintf(p, room, "%s: ", log_program);
	}
}

/* Make a line of at most LINE_BYTES; returns how long it is. */
static size_t log_make_line(char *line, enum log_to to, enum log_level level, const char *text)
{
	size_t room = LINE_BYTES - 1, len = (size_t)put_prefix(line, room, to, level);

	snprintf(line + len, room - len, "%s", text);
	len += strlen(line + len);
	mask_control_characters(line, len);
	line[len++] = '\n';
	return len;
}

/* Waits for a reader, but no longer than that; -1 for ever. */
static bool write_all(int fd, const char *p, size_t len, int wait_ms)
{
	struct pollfd pfd = { .fd = fd, .events = POLLOUT };

	while (len > 0) {
		ssize_t n = poll(&pfd, 1, wait_ms) == 0 ? 0 : write(fd, p, len);

		if (n > 0) {
			p += n;
			len -= (size_t)n;
		} else if (n == 0 || (errno != EINTR && errno != EAGAIN)) {
			return false;
		}
	}
	return true;
}

/* By one call, so that it stays whole among the lines of others. */
static bool write_line(enum log_to to, const char *line, size_t len, int wait_ms)
{
	struct sockaddr_un daemon = { .sun_family = AF_UNIX, .sun_path = "/dev/log" };

	if (to == LOG_TO_SYSLOG)
		return sendto(log_fd, line, len - 1, MSG_NOSIGNAL | (wait_ms < 0 ? 0 : MSG_DONTWAIT),
			      (struct sockaddr *)&daemon, sizeof(daemon)) >= 0;
	return write_all(to == LOG_TO_FILE ? log_fd : STDERR_FILENO, line, len, wait_ms);
}

/* An error, past the lines that wait. */
static bool write_now(enum log_to to, const char *text, int wait_ms)
{
	char line[LINE_BYTES];

	return write_line(to, line, log_make_line(line, to, LOG_ERROR, text), wait_ms);
}

/* Whether there may be one more line about clients.  If not, it is counted.  With the lock. */
static bool admit_line(enum log_level level)
{
	uint64_t now = now_ms(), *used = &queue.used[level];

	if (*used < now)
		*used = now;
	if (*used < now + PEER_BURST * PEER_MS) {
		*used += PEER_MS;
		return true;
	}
	if (queue.left_out++ == 0) {
		queue.due = now + LEFT_OUT_MS;
		pthread_cond_broadcast(&queue.changed);
	}
	return false;
}

static void put_line(enum log_level level, const char *line, size_t len)
{
	pthread_mutex_lock(&queue.lock);
	if (level & LOG_OF_PEER && !admit_line(level & ~LOG_OF_PEER)) {
		;
	} else if (!queue.started) {
		queue.lost += !write_line(log_to, line, len, FLUSH_MS);
	} else if (queue.len + len > ROOM) {
		queue.lost++;
	} else {
		memcpy(buffer[queue.which] + queue.len, line, len);
		queue.len += len;
		atomic_store(&queue.pending, true);
		pthread_cond_broadcast(&queue.changed);
	}
	pthread_mutex_unlock(&queue.lock);
}

bool log_at(enum log_level level, const char *fmt, ...)
{
	enum log_level kind = level & ~(LOG_OF_PEER | LOG_TO_STARTER);
	char text[LINE_BYTES], line[LINE_BYTES];
	va_list ap;

	if (!log_shows(kind))
		return false;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	put_line(level, line, log_make_line(line, log_to, kind, text));
	if (level & LOG_TO_STARTER && log_to != LOG_TO_STDERR)
		write_now(LOG_TO_STDERR, text, FLUSH_MS);
	return false;
}

/* The end of the program */

void end_at_once(const char *line)
{
	log_flush();
	if (line)
		write_line(log_to, line, strlen(line), FLUSH_MS);
	_exit(EXIT_FAILURE);
}

void *not_null(void *memory)
{
	if (memory)
		return memory;
	log_failure("out of memory");
	exit(EXIT_FAILURE);
}

void flush_output(void)
{
	if (fflush(stdout) != 0 || ferror(stdout))
		log_fatal("cannot write to standard output: %s", strerror(errno));
}

void occupy_standard_descriptors(void)
{
	/* What is opened gets the lowest number that is free: this one. */
	for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open_nothing() < 0)
			log_fatal("descriptor %d is closed, and nothing can be put there", fd);
}

/* Files */

/* Whether a file may be a log: no control characters are at its beginning but those of texts. */
static bool log_is_text(int fd)
{
	static const char of_texts[] = { '\t', '\n', '\f', '\r', '\033' };
	char head[512];
	ssize_t n = pread(fd, head, sizeof(head), 0);

	for (ssize_t i = 0; i < n; i++)
		if ((unsigned char)head[i] < ' ' && !memchr(of_texts, head[i], sizeof(of_texts)))
			return false;
	return true;
}

/* Open a log in place of the one that is open, and wait for no reader.  NULL, or why not. */
static const char *log_open_file(const char *path)
{
	const int flags = O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
	struct stat st;
	int fd;

	if (stat(path, &st) == 0 && S_ISBLK(st.st_mode))
		return "it is a block device";
	fd = open(path, O_RDWR | flags, 0640);		/* a FIFO needs no reader then */
	if (fd < 0 && errno == EACCES)
		fd = open(path, O_WRONLY | flags, 0640);
	if (fd < 0)
		return strerror(errno);
	if (!log_is_text(fd)) {
		close(fd);
		return "what is in it is no text";
	}
	if (log_fd >= 0)
		close(log_fd);
	log_fd = fd;
	return NULL;
}

static void reopen_log(void)
{
	const char *error = log_open_file(log_path);

	if (error)
		log_error("cannot reopen log file %s: %s", log_path, error);
	else
		log_line("log file reopened");
}

void log_reopen(void)
{
	pthread_mutex_lock(&queue.lock);
	queue.reopen = log_to == LOG_TO_FILE;
	pthread_cond_broadcast(&queue.changed);
	pthread_mutex_unlock(&queue.lock);
}

/* The thread */

/* Write what there is.  Called with the lock, which is let go meanwhile. */
static void write_lines(void)
{
	const char *p = buffer[queue.which], *end = p + queue.len;
	unsigned long lost = queue.lost, left_out = 0;
	bool reopen = queue.reopen;
	char text[64];

	if (queue.due <= now_ms()) {
		left_out = queue.left_out;
		queue.left_out = 0;
		queue.due = UINT64_MAX;
	}
	queue.which ^= 1;
	queue.len = queue.lost = 0;
	queue.reopen = false;
	pthread_mutex_unlock(&queue.lock);
	for (const char *next; p < end; p = next) {
		next = (const char *)memchr(p, '\n', (size_t)(end - p)) + 1;
		lost += !write_line(log_to, p, (size_t)(next - p), -1);
	}
	snprintf(text, sizeof(text), "%lu lines of the log were lost", lost);
	if (lost && write_now(log_to, text, -1))
		lost = 0;
	if (left_out)
		log_error("%lu more lines about clients were left out", left_out);
	if (reopen)
		reopen_log();
	pthread_mutex_lock(&queue.lock);
	queue.lost += lost;
}

static void *log_main(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&queue.lock);
	for (;;) {
		while (!queue.len && !queue.reopen && queue.due > now_ms()) {
			atomic_store(&queue.pending, false);
			cond_wait_until(&queue.changed, &queue.lock, queue.due);
		}
		write_lines();
	}
	return NULL;
}

/* exit() calls it. */
static void end_log(void)
{
	pthread_mutex_lock(&queue.lock);
	queue.due = queue.left_out ? 0 : UINT64_MAX;
	atomic_store(&queue.pending, true);
	pthread_cond_broadcast(&queue.changed);
	pthread_mutex_unlock(&queue.lock);
	log_flush();
}

bool log_start(void)
{
	pthread_t thread;
	int err;

	cond_init(&queue.changed);
	err = thread_start(&thread, LOG_STACK, log_main, NULL);
	if (err)
		return log_failure("cannot start a thread: %s", strerror(err));
	pthread_detach(thread);
	queue.started = true;
	atexit(end_log);
	return true;
}

void log_flush(void)
{
	struct stat st;
	int fd = log_to == LOG_TO_FILE ? log_fd : STDERR_FILENO;
	bool is_file = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);

	/* Not the clock: where the machine is too busy for this thread, it is for the log's.  poll() may fail. */
	for (int ms = 0; atomic_load(&queue.pending) && ms < (is_file ? FILE_FLUSH_MS : FLUSH_MS); ms++)
		nanosleep(&(struct timespec){ .tv_nsec = 1000 * 1000 }, NULL);
}

const char *log_open(const char *path)
{
	const char *error = path ? log_open_file(path) : NULL;

	if (error)
		return error;
	if (!path && log_fd < 0)
		log_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	log_path = path;
	log_to = path ? LOG_TO_FILE : LOG_TO_SYSLOG;
	return NULL;
}
