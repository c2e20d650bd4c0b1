/*
 * What the libraries have in common that tests preload into a server.  What they do, the test
 * tells them by variables of the environment, or by a page of shared memory:
 *
 *	SHARED_PAGE		the file that is mapped, see SharedPage in conftest.py
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* The function that a caller would have got without us. */
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* NULL if there is none. */
static inline void *shared_page(void)
{
	const char *path = getenv("SHARED_PAGE");
	int fd = path ? REAL(open)(path, O_RDWR | O_CLOEXEC) : -1;
	void *map = MAP_FAILED;

	if (fd >= 0) {
		map = REAL(mmap)(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
	}
	return map == MAP_FAILED ? NULL : map;
}

/* errno stays. */
static inline void sleep_us(unsigned long us)
{
	const struct timespec t = { (time_t)(us / 1000000), (long)(us % 1000000) * 1000 };
	int saved = errno;

	nanosleep(&t, NULL);
	errno = saved;
}

/* Defines syscall(), by which the server makes preadv2(): that becomes preadv2_call(arguments). */
#define SYSCALL(preadv2_call)									\
long syscall(long number, ...)									\
{												\
	long a[6];										\
	va_list args;										\
												\
	va_start(args, number);									\
	for (int i = 0; i < 6; i++)								\
		a[i] = va_arg(args, long);							\
	va_end(args);										\
	if (number == SYS_preadv2)								\
		return preadv2_call(a);								\
	return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);			\
}
