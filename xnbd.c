/*
 * xnbd.c - main() of xnbd-server: start-up order, signals, shutdown.
 *
 * The main thread opens everything, then accepts connections and hands them to loops, then
 * ends them.  Signals are its own: they ring its bell, and are looked at when it does not sleep.
 */
#define _GNU_SOURCE
#include "buffer.h"
#include "confine.h"
#include "control.h"
#include "ctl.h"
#include "exports.h"
#include "listen.h"
#include "log.h"
#include "loop.h"
#include "options.h"
#include "stats.h"
#include "util.h"
#include "worker.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	CONNECTIONS_MAX = 4096,
	DESCRIPTORS_SEEN = 4096,	/* those from there on are not looked for */
	EXPORT_FDS = 3,			/* for an image, and for a snapshot of it */
	LOOP_FDS = 2,
	PROXY_FDS = 6,			/* to look up a name, while it has a link already */
	SPARE_FDS = 64,			/* for all that can wait until there are some, at most */
	ACCEPT_BATCH = 64,
	ACCEPT_PAUSE_MS = 1000,		/* when the system has no more descriptors */
	STOP_MS = 4500,
	STOP_S = 5,			/* where even this thread is held up */
	GIVE_UP_MS = 2000,		/* of that, for requests that wait for an origin */
	LOOPS_MIN = 2,
};

/* Everything that the server consists of.  The main thread's. */
struct server {
	struct options options;
	struct listeners listeners;
	int passed;			/* sockets that were opened for us */
	int single_fd;			/* --inetd, --connected-fd: the client; else -1 */
	int ready_fd;			/* --daemonize: tells the first process; else -1 */
	int null_fd;			/* likewise: /dev/null */
	struct confine_user user;	/* --user: who to become */
	char *log_path, *pid_path;	/* from the root: a daemon leaves its place */
	struct stat pid_file;		/* of our pidfile, if there is a path */
	size_t connections_max;
	uint64_t accept_again;		/* now_ms() when a pause of accepting ends */
};

#if defined(SIGRTMIN)
#define SIGSTATS SIGRTMIN
#else
#define SIGSTATS SIGINFO
#endif

static volatile sig_atomic_t opening = 1;	/* nothing has been made that would have to be removed */
static volatile sig_atomic_t stop_signals;
static volatile sig_atomic_t came[128];		/* by their numbers */

static void end_at_once(void)
{
	log_flush();
	_exit(EXIT_FAILURE);
}

/* An origin, a name server or a disk may be silent for long: nobody waits for them any more. */
static void take_stop_signal(void)
{
	if (opening) {
		forget_unfinished();
		_exit(EXIT_SUCCESS);
	}
	if (stop_signals)
		end_at_once();
	stop_signals = 1;
	alarm(STOP_S);
}

static void on_signal(int sig)
{
#if defined(SIGINFO)
	if (sig == SIGINFO)
		sig = SIGSTATS;
#endif
	if (sig == SIGALRM)
		end_at_once();
	if (sig == SIGTERM || sig == SIGINT)
		take_stop_signal();
	else
		came[sig] = 1;
	wake_main();
}

/* Whether a signal has come since the last call. */
static bool take_signal(int sig)
{
	bool taken = came[sig];

	came[sig] = 0;
	return taken;
}

/* All other threads have them blocked: see thread_start(). */
static bool setup_signals(void)
{
	struct sigaction sa = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	const int handled[] = {
		SIGTERM, SIGINT, SIGALRM, SIGHUP, SIGUSR1, SIGUSR2, SIGSTATS,
#if defined(SIGINFO)
		SIGINFO,
#endif
	};
	int err = bell_init(&main_bell);

	if (err) {
		log_failure("cannot make a pipe: %s", strerror(-err));
		return false;
	}
	for (size_t i = 0; i < ARRAY_SIZE(handled); i++)
		sigaction(handled[i], &sa, NULL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN);	/* a file size limit is an error of one write */
	return true;
}

/* Start-up */

static pid_t daemon_pid;

/* The first process waits: who wants it to end means the daemon. */
static void pass_on(int sig)
{
	kill(daemon_pid, sig);
}

/*
 * Go into the background.  Returns in the child; the first process waits until the child is
 * ready and exits with status 0, or 1 when the child ended before, which then has said why.
 */
static bool daemonize(struct server *s)
{
	int fds[2], status;
	char byte;

	if (pipe2(fds, O_CLOEXEC) < 0 || (daemon_pid = fork()) < 0) {
		log_failure("cannot daemonize: %s", strerror(errno));
		return false;
	}
	if (daemon_pid > 0) {
		signal(SIGTERM, pass_on);
		signal(SIGINT, pass_on);
		close(fds[1]);
		if (read(fds[0], &byte, 1) == 1)
			_exit(EXIT_SUCCESS);
		waitpid(daemon_pid, &status, 0);
		_exit(EXIT_FAILURE);
	}
	close(fds[0]);
	s->ready_fd = fds[1];
	s->null_fd = open_nothing();
	if (s->null_fd < 0)
		log_failure("cannot daemonize: %s", strerror(errno));
	setsid();
	return s->null_fd >= 0;
}

/*
 * The daemon can be used: let the first process go, and let go of its terminal, its directory, and
 * what it had open.  What we have opened, or were meant to get, is what a program that we executed
 * would not get.
 */
static bool detach(struct server *s)
{
	int flags;

	if (chdir("/") < 0) {
		log_failure("cannot daemonize: %s", strerror(errno));
		return false;
	}
	log_flush();		/* who waits for us may look there for our port */
	for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		dup2(s->null_fd, fd);
	if (s->null_fd > STDERR_FILENO)
		close(s->null_fd);
	for (int fd = STDERR_FILENO + 1; fd < DESCRIPTORS_SEEN; fd++) {
		flags = fcntl(fd, F_GETFD);
		if (flags >= 0 && !(flags & FD_CLOEXEC))
			close(fd);
	}
	while (write(s->ready_fd, "", 1) < 0 && errno == EINTR)
		;
	close(s->ready_fd);
	s->ready_fd = -1;
	return true;
}

/* Whether a file for something else is one that holds blocks, too, or their bits; logs that. */
static bool is_image(const struct options *o, const char *path)
{
	const char *const files[] = { o->image, o->cow_file, o->bitmap };
	const char *image = NULL;

	for (size_t i = 0; path && i < ARRAY_SIZE(files) && !image; i++)
		image = files[i] && is_same_file(path, files[i]) ? files[i] : NULL;
	for (unsigned i = 0; path && i < o->exports && !image; i++)
		image = is_same_file(path, o->export[i].path) ? o->export[i].path : NULL;
	if (image)
		log_failure("%s is needed for the disk: the log and the pidfile go elsewhere", image);
	return image != NULL;
}

static bool setup_log(struct server *s)
{
	const struct options *o = &s->options;
	const char *error;

	if (o->connected_fd >= 0)
		log_keep_off((int)o->connected_fd);
	log_limit(o->quiet ? LOG_ASKED : o->verbose ? LOG_DETAIL : LOG_EVENT);
	if (!o->logpath) {
		log_open(o->syslog || o->inetd || o->daemonize || log_would_disturb() ?
				 LOG_TO_SYSLOG : LOG_TO_STDERR, NULL);
		return true;
	}
	if (is_image(o, o->logpath))
		return false;
	s->log_path = not_null(absolute_path(o->logpath));
	error = log_open(LOG_TO_FILE, s->log_path);
	if (error)
		log_failure("cannot open log file %s: %s", o->logpath, error);
	return error == NULL;
}

static size_t connections_wanted(const struct options *o)
{
	return o->max_connections ? o->max_connections : CONNECTIONS_MAX;
}

/* As many descriptors as we may have, up to what all connections, loops and exports need. */
static void raise_limits(const struct options *o)
{
	rlim_t files = (rlim_t)connections_wanted(o) + 3 * SPARE_FDS +
		       (rlim_t)(2 * EXPORT_FDS) * o->exports + LOOP_FDS * (rlim_t)o->threads;
	struct rlimit r;

	if (getrlimit(RLIMIT_NOFILE, &r) < 0 || r.rlim_cur >= r.rlim_max || r.rlim_cur >= files)
		return;
	r.rlim_cur = r.rlim_max < files ? r.rlim_max : files;
	setrlimit(RLIMIT_NOFILE, &r);
}

/* How many descriptors may still be opened. */
static size_t free_descriptors(void)
{
	struct rlimit r;
	size_t limit, open = 0;

	if (getrlimit(RLIMIT_NOFILE, &r) < 0)
		r.rlim_cur = 256;
	limit = r.rlim_cur < INT_MAX ? (size_t)r.rlim_cur : INT_MAX;
	for (int fd = 0; fd < DESCRIPTORS_SEEN; fd++)
		open += fcntl(fd, F_GETFD) >= 0;
	return limit > open ? limit - open : 0;
}

/* Threads for connections, and connections: as many as leave descriptors to the server itself. */
static bool share_descriptors(struct server *s, unsigned *loops)
{
	const struct options *o = &s->options;
	size_t images = o->exports + (o->image != NULL), spare, there = free_descriptors();
	/* One client more is accepted before it is refused; the log is opened again. */
	size_t needed = 2 + LOOP_FDS + EXPORT_FDS * images + (o->control ? 2 : 0) +
			(o->mode == MODE_PROXY ? PROXY_FDS : 0);

	if (there <= needed) {
		log_failure("the limit of open files is too low: %zu more are needed",
			    needed + 1 - there);
		return false;
	}
	there -= needed;
	spare = there / 4 < SPARE_FDS ? there / 4 : SPARE_FDS;
	if (*loops > 1 + there / 8)
		*loops = (unsigned)(1 + there / 8);
	there -= spare + LOOP_FDS * (*loops - 1);
	s->connections_max = connections_wanted(o) < there ? connections_wanted(o) : there;
	if (s->connections_max < o->max_connections)
		log_line("the limit of open files leaves room for %zu connections", there);
	return true;
}

/* Take the client from standard input, and keep everything else off its socket. */
static bool take_inetd(struct server *s)
{
	int null;

	if (!listen_check(STDIN_FILENO, false, "--inetd"))
		return false;
	s->single_fd = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
	null = open_nothing();
	if (s->single_fd < 0 || null < 0) {
		log_failure("--inetd: %s", strerror(errno));
		return false;
	}
	dup2(null, STDIN_FILENO);
	dup2(null, STDOUT_FILENO);
	if (is_same_socket(s->single_fd, STDERR_FILENO))
		dup2(null, STDERR_FILENO);
	close(null);
	return true;
}

/* Whether there can be clients with addresses, where only some of these may connect. */
static bool allow_is_of_use(const struct server *s)
{
	bool of_use = !s->options.allows || (s->single_fd >= 0 && !is_unix_socket(s->single_fd));

	for (size_t i = 0; i < s->listeners.count; i++)
		of_use |= !s->listeners.all[i].local;
	if (!of_use)
		log_failure("--allow is about TCP clients, and at a Unix socket there are none");
	return of_use;
}

static bool open_sockets(struct server *s)
{
	const struct options *o = &s->options;

	if (o->inetd)
		return take_inetd(s);
	if (o->connected_fd >= 0) {
		s->single_fd = (int)o->connected_fd;
		return listen_check(s->single_fd, false, "--connected-fd") &&
		       fcntl(s->single_fd, F_SETFD, FD_CLOEXEC) == 0;
	}
	if (s->passed > 0 && (o->lport_given || o->laddrs || o->unix_path)) {
		log_failure("LISTEN_FDS says where to listen, --lport, --laddr and --unix do not "
			    "belong to it");
		return false;
	}
	if (s->passed > 0)
		return listen_passed(&s->listeners, s->passed);
	if ((!o->unix_path || o->lport_given || o->laddrs) &&
	    !listen_tcp(&s->listeners, o->laddr, o->laddrs, (unsigned)o->lport))
		return false;
	opening = 0;
	return !o->unix_path || listen_unix(&s->listeners, o->unix_path, (mode_t)o->unix_mode);
}

/* Whether a file holds a number and a newline alone, as a pidfile does. */
static bool holds_number(int fd)
{
	char text[24] = "";
	ssize_t n = pread(fd, text, sizeof(text) - 1, 0);
	size_t digits = strspn(text, "0123456789");

	return digits > 0 && n == (ssize_t)digits + 1 && text[digits] == '\n';
}

/* Open and lock a pidfile, of which *st is then known.  NULL, or why not. */
static const char *open_pidfile(const char *path, int *fd, struct stat *st)
{
	*fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0644);
	if (*fd < 0 || fstat(*fd, st) < 0)
		return strerror(errno);
	if (!S_ISREG(st->st_mode))
		return "it is not a file";
	if (flock(*fd, LOCK_EX | LOCK_NB) < 0)
		return errno == EWOULDBLOCK ? "the server of that pidfile runs already" :
					      strerror(errno);
	if (fstat(*fd, st) < 0)
		return strerror(errno);
	if (st->st_nlink > 1)
		return "the file has another name";
	return st->st_size == 0 || holds_number(*fd) ?
		       NULL : "the file holds something else than a process id";
}

/* The pidfile stays open, since it is locked while this process lives. */
static bool write_pidfile(struct server *s)
{
	const char *path = s->options.pidfile, *wrong;
	int fd;

	if (!path)
		return true;
	if (is_image(&s->options, path))
		return false;
	if (s->log_path && is_same_file(path, s->log_path)) {
		log_failure("pidfile %s is the log, too", path);
		return false;
	}
	do	/* until it is not one that another server has just removed */
		wrong = open_pidfile(path, &fd, &s->pid_file);
	while (!wrong && s->pid_file.st_nlink == 0 && close(fd) == 0);
	s->pid_path = wrong ? NULL : absolute_path(path);
	if (!wrong && (!s->pid_path || ftruncate(fd, 0) < 0 ||
		       dprintf(fd, "%ld\n", (long)getpid()) < 0))
		wrong = strerror(errno);
	if (wrong)
		log_failure("cannot write pidfile %s: %s", path, wrong);
	return !wrong;
}

static void remove_pidfile(const struct server *s)
{
	if (s->pid_path)
		remove_own("pidfile ", s->pid_path, s->pid_file.st_dev, s->pid_file.st_ino);
}

/* Sockets are made by root, who may make them anywhere, and belong to who serves them. */
static bool become_user(struct server *s)
{
	const char *control = s->options.control;

	for (size_t i = 0; i < s->listeners.count; i++)
		if (s->listeners.all[i].unix_path &&
		    !confine_give_socket(s->listeners.all[i].unix_path, &s->user))
			return false;
	return (!control || confine_give_socket(control, &s->user)) && confine_become(&s->user);
}

/* SIGHUP opens the log file again; if it is a terminal or the like, under any name. */
static void keep_log(struct confine *c, const char *path)
{
	struct stat st;

	if (path && lstat(path, &st) == 0 && !S_ISREG(st.st_mode))
		confine_keep(c, path, CONFINE_APPEND | CONFINE_READ_FILE);
	else
		confine_keep_beside(c, path, CONFINE_APPEND);
}

/*
 * A file that may be a link, to a link maybe: of each the directory, since others replace the file
 * now and then.
 */
static void keep_links(struct confine *c, const char *file)
{
	enum { LINKS_MAX = 40, ROOM = 4096 };
	char path[2 * ROOM], target[ROOM];
	ssize_t len;

	snprintf(path, sizeof(path), "%s", file);
	for (int i = 0; i < LINKS_MAX; i++) {
		confine_keep_beside(c, path, CONFINE_READ);
		len = readlink(path, target, sizeof(target) - 1);
		if (len <= 0)
			return;
		target[len] = '\0';
		len = *target == '/' ? 0 : base_name(path) - path;
		snprintf(path + len, sizeof(path) - (size_t)len, "%s", target);
	}
}

/* What a proxy needs to look up the name of an origin, later. */
static void keep_resolver(struct confine *c)
{
	keep_links(c, "/etc/hosts");
	keep_links(c, "/etc/resolv.conf");
	keep_links(c, "/etc/nsswitch.conf");
	keep_links(c, "/etc/gai.conf");
#ifdef __GLIBC__
	confine_keep(c, "/usr", CONFINE_READ);		/* it may load libraries for that */
	confine_keep(c, "/lib", CONFINE_READ);
	confine_keep(c, "/lib64", CONFINE_READ);
#endif
}

/* What will be done with files after the start, and nothing else, stays possible. */
static bool confine(struct server *s)
{
	const struct options *o = &s->options;
	const char *supervisor = getenv("NOTIFY_SOCKET");
	struct confine c;

	confine_begin(&c, (o->mode == MODE_PROXY ? 0 : CONFINE_NO_CONNECT) |
				  (supervisor && *supervisor == '@' ? 0 : CONFINE_NO_ABSTRACT));
	for (size_t i = 0; i < exports_table()->count; i++)
		confine_keep_beside(&c, exports_snapshots_beside(i), CONFINE_FILES);
	for (size_t i = 0; i < s->listeners.count; i++)
		confine_keep_beside(&c, s->listeners.all[i].unix_path, CONFINE_REMOVE_FILE);
	confine_keep_beside(&c, o->control, CONFINE_REMOVE_FILE);
	confine_keep_beside(&c, s->pid_path, CONFINE_REMOVE_FILE);
	keep_log(&c, s->log_path);
	if (o->mode == MODE_PROXY)
		keep_resolver(&c);
	return confine_enter(&c);
}

/* Before there are threads, and before there are clients. */
static bool give_up_rights(struct server *s)
{
	if (s->options.user && !become_user(s))
		return false;
	confine_no_new_privileges();
	return s->options.no_sandbox || confine(s);
}

/* The first loop, and the first worker: without them nobody could be served. */
static bool start_threads(struct server *s)
{
	unsigned max = (unsigned)s->options.threads;
	int err;

	if (max == 0)
		max = cpu_count() > LOOPS_MIN ? cpu_count() : LOOPS_MIN;
	if (!share_descriptors(s, &max))
		return false;
	err = loops_init(max, (unsigned)s->options.keepalive);
	if (!err)
		err = worker_begin();
	if (err)
		log_failure("cannot start a thread: %s", strerror(-err));
	return err == 0;
}

static bool start(struct server *s)
{
	raise_limits(&s->options);
	stats_init((unsigned)s->options.stats, loops_survey);
	if (s->options.user && !confine_find_user(s->options.user, &s->user))
		return false;
	if (!setup_signals() || !setup_log(s) || !exports_open(&s->options) ||
	    is_image(&s->options, s->options.logpath) || !open_sockets(s))
		return false;
	opening = 0;
	if (!allow_is_of_use(s) || !control_open(&s->options) || !write_pidfile(s) ||
	    !give_up_rights(s) || !log_start() || !start_threads(s) || !exports_start())
		return false;
	log_line("%s", confine_is_in_force() ? "confined to the files that are needed" :
		 s->options.no_sandbox	     ? "not confined: --no-sandbox" :
					       "not confined: this system has no Landlock");
	for (size_t i = 0; i < s->listeners.count; i++)
		log_line("listening on %s", s->listeners.all[i].address);
	notify_supervisor("READY=1");
	return s->ready_fd < 0 || detach(s);
}

/* Connections */

/* Whether a client may connect, whose address is NULL at a Unix socket; the log says why not. */
static bool may_connect(struct server *s, const struct sockaddr *sa, const char *peer)
{
	char reason[64] = "no --allow has its address";

	if (sa && s->options.allows &&
	    !access_admits(s->options.allow, s->options.allows, sa)) {
		log_peer(LOG_ERROR, "%s: refused: %s", peer, reason);
		return false;
	}
	if (loops_clients() >= s->connections_max)
		snprintf(reason, sizeof(reason), "there are %zu connections already",
			 s->connections_max);
	else if (sa && s->options.max_per_host && access_guests(sa) >= s->options.max_per_host)
		snprintf(reason, sizeof(reason), "its host has %lu connections already",
			 s->options.max_per_host);
	else
		return true;
	log_peer(LOG_ERROR, "%s: refused: %s", peer, reason);
	return false;
}

static enum greeting greeting_of(const struct options *o)
{
	return o->connected_fd >= 0 ? GREET_CONNECTED :
	       o->oldstyle	    ? GREET_OLDSTYLE :
				      GREET_NEWSTYLE;
}

/* Hand a client to a loop, or close it; its address is NULL at a Unix socket. */
static void add_client(struct server *s, int fd, const struct sockaddr *sa, const char *peer)
{
	struct conn *c;

	if (!may_connect(s, sa, peer)) {
		close(fd);
		return;
	}
	c = conn_new(fd, greeting_of(&s->options), exports_table(), peer,
		     (unsigned)s->options.keepalive);
	if (!c) {
		log_peer(LOG_ERROR, "%s: refused: out of memory", peer);
		close(fd);
		return;
	}
	if (sa)
		access_enter(&c->guest, sa);
	loops_add(c);
}

static void pause_accepting(struct server *s)
{
	log_peer(LOG_ERROR, "cannot accept: %s; trying again when a connection ends",
		 strerror(errno));
	s->accept_again = now_ms() + ACCEPT_PAUSE_MS;
}

/* Accept one client.  False if there is none, or accepting has to pause. */
static bool accept_client(struct server *s, const struct listener *l)
{
	static unsigned long serial;	/* clients of Unix sockets have no names of their own */
	union address address;
	socklen_t len = sizeof(address);
	char peer[ADDRESS_MAX];
	int fd = accept4(l->fd, &address.sa, &len, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0) {
		if (is_out_of_resources(errno))
			pause_accepting(s);
		return errno == EINTR || errno == ECONNABORTED;
	}
	serial++;
	if (l->local)
		snprintf(peer, sizeof(peer), "unix client %lu", serial);
	else
		format_address(&address.sa, len, peer);
	add_client(s, fd, l->local ? NULL : &address.sa, peer);
	return true;
}

static void accept_clients(struct server *s, const struct pollfd *pfd)
{
	for (size_t i = 0; i < s->listeners.count; i++)
		for (int n = 0; pfd[i].revents && n < ACCEPT_BATCH; n++)
			if (!accept_client(s, &s->listeners.all[i]))
				break;
}

/* Something ended, or a signal came. */
static void take_wakeups(struct server *s)
{
	s->accept_again = 0;
	if (take_signal(SIGHUP))
		log_reopen();
	if (take_signal(SIGUSR1) && !exports_snapshot())
		log_error("SIGUSR1 ignored: snapshots are taken in target mode");
	if (take_signal(SIGUSR2))
		control_switch();
	if (take_signal(SIGSTATS))
		stats_log();
	control_tend();
	exports_tend();
}

static uint64_t earlier(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Accept clients until a signal to stop, or until the only client has left. */
static void serve(struct server *s)
{
	size_t listeners = s->listeners.count, controls;
	struct pollfd pfd[1 + listeners + CTL_FDS];
	bool single = s->single_fd >= 0;

	for (size_t i = 0; i < listeners; i++)
		pfd[i + 1].events = POLLIN;
	while (!stop_signals && !(single && loops_load() == 0)) {
		bool pause = now_ms() < s->accept_again;
		uint64_t due = earlier(earlier(pause ? s->accept_again : UINT64_MAX, ctl_due()),
				       stats_due(loops_load() > 0));

		for (size_t i = 0; i < listeners; i++)
			pfd[i + 1].fd = pause ? -1 : s->listeners.all[i].fd;
		controls = ctl_poll(pfd + 1 + listeners);
		if (bell_poll(&main_bell, pfd, 1 + listeners + controls, ms_until(due)) < 0)
			continue;
		if (bell_answer(&main_bell))
			take_wakeups(s);
		while (stats_tend())
			ctl_gathered();
		accept_clients(s, pfd + 1);
		ctl_turn(pfd + 1 + listeners, controls);
	}
}

static void add_single_client(struct server *s)
{
	union address address;
	socklen_t len = sizeof(address);
	char peer[ADDRESS_MAX] = "client";

	address.sa.sa_family = AF_UNSPEC;	/* of a client that has left, who is not let in then */
	if (getpeername(s->single_fd, &address.sa, &len) == 0 && address.sa.sa_family != AF_UNIX)
		format_address(&address.sa, len, peer);
	fcntl(s->single_fd, F_SETFL, O_RDWR | O_NONBLOCK);
	add_client(s, s->single_fd, &address.sa, peer);
}

/* End */

/* Let all connections finish, and give up snapshots.  False if that takes too long. */
static bool stop_all(void)
{
	uint64_t begun = now_ms(), now;
	struct pollfd pfd;

	control_close();
	exports_stop();
	loops_stop();
	while (loops_load() > 0 || exports_are_busy()) {
		uint64_t until = begun;

		now = now_ms();
		until += now < begun + GIVE_UP_MS ? GIVE_UP_MS : STOP_MS;
		if (now >= begun + GIVE_UP_MS)
			exports_give_up();
		if (now >= until)
			return false;
		bell_poll(&main_bell, &pfd, 1, (int)(until - now));
		bell_answer(&main_bell);
	}
	return true;
}

static void clean_up(struct server *s)
{
	listen_close(&s->listeners);
	remove_pidfile(s);
	free(s->pid_path);
	options_free(&s->options);
}

static void run(struct server *s)
{
	if (s->single_fd >= 0)
		add_single_client(s);
	serve(s);
	if (stop_signals)
		log_line("stopping");
	listen_close(&s->listeners);
	if (!stop_all()) {
		log_error("stopped, but %zu connections wait for the disk", loops_load());
		remove_pidfile(s);
		end_at_once();
	}
	loops_join();
	exports_end();
	worker_stop();		/* one may be at its last words to a loop */
	loops_free();
}

int main(int argc, char **argv)
{
	static struct server s = { .single_fd = -1, .ready_fd = -1 };
	int status = EXIT_FAILURE;

	buffer_init();
	log_name("xnbd-server");
	occupy_standard_descriptors();
	options_parse(&s.options, argc, argv);
	s.passed = listen_count_passed();
	if (s.passed < 0)
		return EXIT_FAILURE;
	if (s.options.daemonize && !daemonize(&s))
		return EXIT_FAILURE;
	if (start(&s)) {
		run(&s);
		alarm(0);	/* what is left is a last commit */
		status = EXIT_SUCCESS;
	} else {
		control_close();
		loops_stop();
		loops_join();
		worker_stop();		/* a commit may be due */
		loops_free();
	}
	if (!exports_close())
		status = EXIT_FAILURE;
	clean_up(&s);
	return status;
}
