/*
 * intruder: what somebody who has taken over a server could do with it.  test_confine.py builds
 * it, preloads it, and sends INTRUDER_SIGNAL to a thread: that one tries everything then, and
 * reports a line "NAME ERRNO" for each, 0 for what succeeded.
 *
 *	INTRUDER_REPORT		the file for the report, opened at the start
 *	INTRUDER_OUTSIDE	a directory that is none of the server's business; has `file`
 *	INTRUDER_INSIDE		one that has its files, and `program`
 *	INTRUDER_PORT		of a TCP server on 127.0.0.1
 *	INTRUDER_ABSTRACT	the name of a Unix socket without a file
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define INTRUDER_SIGNAL (SIGRTMAX - 3)

static int report_fd = -1;
static const char *outside, *inside, *abstract;
static int port;

static void report(const char *name, int error)
{
	char line[64];
	int n = snprintf(line, sizeof(line), "%s %d\n", name, error);

	if (write(report_fd, line, (size_t)n) != n)
		_exit(99);
}

static const char *path(const char *dir, const char *name)
{
	static char buf[4096];

	snprintf(buf, sizeof(buf), "%s/%s", dir, name);
	return buf;
}

/* For what gives a descriptor, or -1. */
static int outcome(long fd)
{
	if (fd < 0)
		return errno;
	close((int)fd);
	return 0;
}

static int try_open(const char *dir, const char *name, int flags)
{
	return outcome(syscall(SYS_openat, AT_FDCWD, path(dir, name), flags, 0600));
}

static int try_exec(const char *program)
{
	char *argv[] = { (char *)program, NULL };
	pid_t pid = fork();
	int status;

	if (pid == 0) {
		execv(program, argv);
		_exit(errno);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return 99;
	return WEXITSTATUS(status);
}

static int try_tcp(int (*call)(int, const struct sockaddr *, socklen_t), int number)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons((uint16_t)number) };
	int fd = socket(AF_INET, SOCK_STREAM, 0), error;

	in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	error = call(fd, (const struct sockaddr *)&in, sizeof(in)) < 0 ? errno : 0;
	close(fd);
	return error;
}

static int try_abstract(void)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	size_t len = strlen(abstract);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0), error;

	memcpy(un.sun_path + 1, abstract, len);
	error = connect(fd, (const struct sockaddr *)&un,
			(socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + len)) < 0 ?
			errno :
			0;
	close(fd);
	return error;
}

static void try_all(int unused)
{
	int saved = errno;

	(void)unused;
	report("read outside", try_open(outside, "file", O_RDONLY));
	report("write outside", try_open(outside, "file", O_WRONLY));
	report("list outside", try_open(outside, ".", O_RDONLY | O_DIRECTORY));
	report("create outside", try_open(outside, "new", O_WRONLY | O_CREAT | O_EXCL));
	report("remove outside", unlink(path(outside, "victim")) < 0 ? errno : 0);
	report("list inside", try_open(inside, ".", O_RDONLY | O_DIRECTORY));
	report("write inside", try_open(inside, "program", O_WRONLY));
	report("create inside", try_open(inside, "new", O_WRONLY | O_CREAT | O_EXCL));
	report("remove inside", unlink(path(inside, "victim")) < 0 ? errno : 0);
	report("make a directory inside", mkdirat(AT_FDCWD, path(inside, "directory"), 0700) < 0 ?
						  errno :
						  0);
	report("read the users", try_open("/etc", "passwd", O_RDONLY));
	report("execute", try_exec("/bin/true"));
	report("execute inside", try_exec(path(inside, "program")));
	report("connect", try_tcp(connect, port));
	report("bind", try_tcp(bind, 0));
	report("connect abstract", try_abstract());
	report("signal", kill(getppid(), 0) < 0 ? errno : 0);
	/* EINVAL: this namespace does not even know a root. */
	report("become root", syscall(SYS_setresuid, 0, 0, 0) == 0 ? 0 : errno == EINVAL ? EPERM : errno);
	report("end", 0);
	errno = saved;
}

/* Threads that want no signals get this one. */
int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)
{
	sigset_t but;

	if (!set)
		return sigprocmask(how, set, old) < 0 ? errno : 0;
	but = *set;
	sigdelset(&but, INTRUDER_SIGNAL);
	return sigprocmask(how, &but, old) < 0 ? errno : 0;
}

__attribute__((constructor)) static void begin(void)
{
	const char *name = getenv("INTRUDER_REPORT");
	struct sigaction sa = { .sa_handler = try_all };

	if (!name)
		return;
	report_fd = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	outside = getenv("INTRUDER_OUTSIDE");
	inside = getenv("INTRUDER_INSIDE");
	abstract = getenv("INTRUDER_ABSTRACT");
	port = atoi(getenv("INTRUDER_PORT"));
	sigaction(INTRUDER_SIGNAL, &sa, NULL);
}
