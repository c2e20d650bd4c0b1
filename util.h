/*
 * util.h - the clock, sockets, threads and other small helpers.
 */
#ifndef XNBD_UTIL_H
#define XNBD_UTIL_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/stat.h>

enum { BLOCK_SIZE = 4096 };		/* bytes: the unit of bitmaps, holes, and pieces of writes */

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#if defined(__GNUC__)
#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define PRINTF_LIKE(fmt, args)
#endif

/*
 * The bytes of the UTF-8 character at p, of which left are there; 0 if it is none.  Shortest form, no
 * surrogates, no NUL.
 */
size_t utf8_length(const uint8_t *p, size_t left);

/* Replace what terminals obey by '?': C0, DEL, and C1, in UTF-8 and as single bytes. */
void mask_control_characters(char *s, size_t len);

/* Milliseconds and microseconds of a clock that only goes forward. */
uint64_t now_ms(void);
uint64_t now_us(void);

/* A decimal number from min to max.  False if it is none. */
bool parse_number(const char *s, unsigned long min, unsigned long max, unsigned long *value);

/* The path from the root, in memory that the caller frees; NULL if out of memory. */
char *absolute_path(const char *path);

/* The last component of a path, within it. */
const char *base_name(const char *path);

/* The directory of a path, "." if it names none, in memory that the caller frees; or NULL. */
char *directory_of(const char *path);

/* All of len bytes at off, or an error: 0 or -errno, -EIO where the file ends before. */
int read_at(int fd, uint8_t *buf, uint64_t len, uint64_t off);
int write_at(int fd, const uint8_t *buf, uint64_t len, uint64_t off);

/*
 * Whether the kernel could store what it has tried to store of that file, and nobody was told
 * otherwise: 0 or -errno, once for each descriptor.  Waits for what is under way, and begins nothing.
 */
int check_stored(int fd);

/*
 * Create a file whose contents fill() writes to fd, so that a crash leaves it whole and durable, or
 * not at all.  With replace it takes the place of one that is there, else that is -EEXIST.  0 or -errno.
 */
int create_file(const char *path, bool replace, int (*fill)(void *arg, int fd), void *arg);

/* Whether two paths lead to one file that is there; NULL leads to none. */
bool is_same_file(const char *one, const char *other);

/* Remove the file that create_file() is at.  For a signal handler of the main thread. */
void forget_unfinished(void);

/* fsync the directory that holds path, so that its entry is durable.  0 or -errno. */
int sync_directory_of(const char *path);

enum { ADDRESS_MAX = 128 };

union address {
	struct sockaddr sa;
	struct sockaddr_storage room;
};

/* "127.0.0.1:8520", "[::1]:8520" or "unix:/path", in buf of ADDRESS_MAX bytes. */
void format_address(const struct sockaddr *sa, socklen_t len, char *buf);

/* Take away the brackets that an IPv6 address may have. */
void strip_brackets(char *host);

/* Remove a file, unless the path is NULL or leads to another one by now.  0 or -errno. */
int remove_own(const char *path, const struct stat *file);

/* A descriptor that neither gives nor takes anything, also without /dev/null; -1 with errno. */
int open_nothing(void);

/* A thread that no signal disturbs.  0 or an errno. */
int thread_start(pthread_t *thread, size_t stack, void *(*run)(void *), void *arg);

/* A condition with the clock of now_ms(). */
void cond_init(pthread_cond_t *cond);

/* Wait, until now_ms() is that at most; UINT64_MAX for ever. */
void cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t when);

/* Whether that is a socket of this machine alone. */
bool is_unix_socket(int fd);

/*
 * TCP: no delay, and notice a peer that has been silent for keepalive seconds, unless that is 0.
 * Unix sockets: room for a batch of replies.
 */
void tune_socket(int fd, unsigned keepalive);

/* The processors that we may run on, at least 1. */
unsigned cpu_count(void);

#endif
