/*
 * xnbd.c - main() of xnbd-server: start-up order, signals, shutdown.
 *
 * The main thread opens everything, then accepts connections and hands them to loops, then
 * ends them.  Signals are its own: they ring its bell, and are looked at when it does not sleep.
 */
#define _GNU_SOURCE
#include "access.h"
#include "buffer.h"
#include "cache.h"
#include "clients.h"
#include "confine.h"
#include "ctl.h"
#include "disk.h"
#include "exports.h"
#include "listen.h"
#include "log.h"
#include "options.h"
#include "origin.h"
#include "stats.h"
#include "util.h"
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	DESCRIPTORS_SEEN = 4096,	/* those from there on are not looked for */
	EXPORT_FDS = 3,			/* for an image, and for a snapshot of it */
	LOOP_FDS = 2,
	OWN_FDS = 4,			/* for a client to refuse, the log, control connections */
	PROXY_FDS = 6,			/* to look up a name, while it has a link already */
	SPARE_FDS = 64,			/* for all that can wait until there are some, at most */
	STOP_MS = 4500,
	STOP_LOOK_MS = 100,		/* how often it is looked at */
	STOP_S = 5,			/* where even this thread is held up */
	GIVE_UP_MS = 2000,		/* of that, for requests that wait for an origin */
	LOOPS_MIN = 2,
};

/* The main thread's. */
static struct {
	struct options options;
	int passed;			/* sockets that were opened for us */
	int single_fd;			/* --inetd, --connected-fd: the client; else -1 */
	int ready_fd;			/* --daemonize: tells the first process; else -1 */
	char *log_path, *pid_path;	/* from the root: a daemon leaves its place */
	struct stat pid_file;		/* of our pidfile; all zero: there is none */
} server = { .single_fd = -1, .ready_fd = -1 };

/* Either asks for statistics, and not every system has both. */
#ifndef SIGINFO
#define SIGINFO SIGRTMIN
#elif !defined(SIGRTMIN)
#define SIGRTMIN SIGINFO
#endif

static volatile sig_atomic_t opening = 1;	/* nothing has been made that would have to be removed */
static volatile sig_atomic_t stop_signals;
static volatile sig_atomic_t came[128];		/* by their numbers */

/* A start may wait long for an origin, a name server or a disk: it ends in the handler. */
static void on_signal(int sig)
{
	bool stops = sig == SIGTERM || sig == SIGINT;

	if (stops && opening) {
		forget_unfinished();
		_exit(EXIT_SUCCESS);
	}
	if (sig == SIGALRM)
		end_at_once("xnbd-server: stopped, but the main thread waits for the disk\n");
	if (stops && stop_signals)
		end_at_once(NULL);
	if (stops)
		alarm(STOP_S);
	stop_signals |= stops;
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
		SIGTERM, SIGINT, SIGALRM, SIGHUP, SIGUSR1, SIGUSR2, SIGRTMIN, SIGINFO,
	};
	int err = loop_init(&main_loop);

	if (err)
		return log_failure("cannot make a pipe: %s", strerror(-err));
	for (size_t i = 0; i < ARRAY_SIZE(handled); i++)
		sigaction(handled[i], &sa, NULL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN);	/* a file size limit is an error of one write */
	return true;
}

/* Start-up */

static pid_t daemon_pid;
static int null_fd;

/* The first process only waits: its signals are for the daemon. */
static void pass_on(int sig)
{
	kill(daemon_pid, sig);
}

/*
 * Go into the background.  Returns in the child; the first process waits until the child is
 * ready and exits with status 0, or 1 when the child ended before, which then has said why.
 */
static bool daemonize(void)
{
	int fds[2];
	char byte;

	null_fd = open_nothing();	/* later it may be out of reach */
	if (null_fd < 0 || pipe2(fds, O_CLOEXEC) < 0 || (daemon_pid = fork()) < 0)
		return log_failure("cannot daemonize: %s", strerror(errno));
	if (daemon_pid > 0) {
		signal(SIGTERM, pass_on);
		signal(SIGINT, pass_on);
		close(fds[1]);
		if (read(fds[0], &byte, 1) == 1)
			_exit(EXIT_SUCCESS);
		waitpid(daemon_pid, NULL, 0);
		_exit(EXIT_FAILURE);
	}
	close(fds[0]);
	server.ready_fd = fds[1];
	setsid();
	return true;
}

/*
 * The daemon can be used: let the first process go, and let go of its terminal, its directory, and
 * what it had open, which the log or an image may have been.  What we have opened, or were meant to
 * get, is what a program that we executed would not get.
 */
static bool detach(void)
{
	if (chdir("/") < 0)
		return log_failure("cannot daemonize: %s", strerror(errno));
	log_flush();		/* who waits for us may look there for our port */
	for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		dup2(null_fd, fd);
	close(null_fd);
	for (int fd = STDERR_FILENO + 1; fd < DESCRIPTORS_SEEN; fd++)
		if (fcntl(fd, F_GETFD) == 0)		/* and not FD_CLOEXEC */
			close(fd);
	while (write(server.ready_fd, "", 1) < 0 && errno == EINTR)
		;
	close(server.ready_fd);
	return true;
}

/* Whether a file neither holds blocks nor their bits, and may be used for something else. */
static bool is_no_image(const char *path)
{
	const struct options *o = &server.options;
	const char *image = is_same_file(path, o->cow_file) ? o->cow_file :
			    is_same_file(path, o->bitmap)   ? o->bitmap :
							      NULL;

	for (unsigned i = 0; i < o->exports; i++)
		if (is_same_file(path, o->export[i].path))
			image = o->export[i].path;
	return !image || log_failure("%s is needed for the disk: the log and the pidfile go "
				     "elsewhere", image);
}

static bool setup_log(void)
{
	const struct options *o = &server.options;
	const char *error;

	if (o->connected_fd >= 0)
		log_keep_off((int)o->connected_fd);
	log_limit(o->quiet ? LOG_ASKED : o->verbose ? LOG_DETAIL : LOG_EVENT);
	if (!o->logpath) {
		if (o->syslog || o->inetd || o->daemonize)
			log_open(NULL);
		return true;
	}
	if (!is_no_image(o->logpath))
		return false;
	server.log_path = not_null(absolute_path(o->logpath));
	error = log_open(server.log_path);
	return !error || log_failure("cannot open log file %s: %s", o->logpath, error);
}

/* As many descriptors as we may have. */
static void raise_limits(void)
{
	struct rlimit r;

	if (getrlimit(RLIMIT_NOFILE, &r) == 0) {
		r.rlim_cur = r.rlim_max;
		setrlimit(RLIMIT_NOFILE, &r);
	}
}

/* Threads for connections, and connections: as many as leave descriptors to the server itself. */
static bool share_descriptors(unsigned *loops)
{
	struct options *o = &server.options;
	int next = dup(STDIN_FILENO);	/* those that are open have lower numbers */
	struct rlimit r = { .rlim_cur = 256 };
	size_t spare, there;
	size_t needed = OWN_FDS + LOOP_FDS + EXPORT_FDS * o->exports +
			(o->mode == MODE_PROXY ? PROXY_FDS : 0);

	close(next);
	getrlimit(RLIMIT_NOFILE, &r);
	there = r.rlim_cur < INT_MAX ? (size_t)r.rlim_cur : INT_MAX;
	there -= next < 0 ? there : (size_t)next;
	if (there <= needed)
		return log_failure("the limit of open files is too low: %zu more are needed",
				   needed + 1 - there);
	there -= needed;
	spare = there / 4 < SPARE_FDS ? there / 4 : SPARE_FDS;
	if (*loops > 1 + there / 8)
		*loops = (unsigned)(1 + there / 8);
	there -= spare + LOOP_FDS * (*loops - 1);
	if (there < o->max_connections) {
		o->max_connections = there;
		log_line("the limit of open files leaves room for %zu connections", there);
	}
	access_open(o->max_connections, o->max_per_host);
	return true;
}

/* Whether clients may come by TCP where an option is about these. */
static bool options_are_of_use(bool tcp)
{
	return tcp || !server.options.of_tcp ||
	       log_failure("%s is about TCP clients, and at a Unix socket there are none",
			   server.options.of_tcp);
}

/* Take the only client, and keep everything else off its socket. */
static bool take_client(int fd, const char *option)
{
	if (!listen_check(fd, false, option))
		return false;
	server.single_fd = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
	if (server.single_fd < 0)
		return log_failure("%s: %s", option, strerror(errno));
	close(fd);
	close(STDIN_FILENO);
	close(STDOUT_FILENO);
	occupy_standard_descriptors();
	return options_are_of_use(!is_unix_socket(server.single_fd));
}

/* All but the Unix socket of --unix, whose file would have to be removed. */
static bool open_sockets(void)
{
	const struct options *o = &server.options;
	bool tcp = false;

	if (o->inetd)
		return take_client(STDIN_FILENO, "--inetd");
	if (o->connected_fd >= 0)
		return take_client((int)o->connected_fd, "--connected-fd");
	if (server.passed > 0 && (o->lport_given || o->laddrs || o->unix_path))
		return log_failure("LISTEN_FDS says where to listen, --lport, --laddr and --unix do "
				   "not belong to it");
	if (server.passed > 0)
		return listen_passed(server.passed, &tcp) && options_are_of_use(tcp);
	return (o->unix_path && !o->lport_given && !o->laddrs) ||
	       listen_tcp(o->laddr, o->laddrs, (unsigned)o->lport);
}

/* Whether a file holds a number and a newline alone, as a pidfile does. */
static bool holds_number(int fd)
{
	char text[24] = "";
	ssize_t n = pread(fd, text, sizeof(text) - 1, 0);
	size_t digits = strspn(text, "0123456789");

	return digits > 0 && n == (ssize_t)digits + 1 && text[digits] == '\n';
}

/* Lock and write a pidfile, which stays open, and is *own if it is one.  NULL, or why not. */
static const char *make_pidfile(const char *path, struct stat *own)
{
	const int flags = O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
	struct stat st;
	char number[24];
	int fd, n;

	do {	/* until it is not one that another server has just removed */
		fd = open(path, flags, 0644);
		if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) < 0 || fstat(fd, &st) < 0)
			return errno == EWOULDBLOCK ? "the server of that pidfile runs already" :
						      strerror(errno);
	} while (st.st_nlink == 0 && close(fd) == 0);
	if (!S_ISREG(st.st_mode))
		return "it is not a file";
	if (st.st_nlink > 1)
		return "the file has another name";
	if (st.st_size > 0 && !holds_number(fd))
		return "the file holds something else than a process id";
	*own = st;
	n = snprintf(number, sizeof(number), "%ld\n", (long)getpid());
	if (ftruncate(fd, 0) < 0 || write(fd, number, (size_t)n) != n)
		return strerror(errno);
	return NULL;
}

static bool write_pidfile(void)
{
	const char *path = server.options.pidfile, *wrong;

	if (!path)
		return true;
	if (!is_no_image(path))
		return false;
	if (is_same_file(path, server.log_path))
		return log_failure("pidfile %s is the log, too", path);
	server.pid_path = not_null(absolute_path(path));
	wrong = make_pidfile(path, &server.pid_file);
	return !wrong || log_failure("cannot write pidfile %s: %s", path, wrong);
}

static void remove_pidfile(void)
{
	int err = remove_own(server.pid_path, &server.pid_file);

	if (err)
		log_line("cannot remove pidfile %s: %s", server.pid_path, strerror(-err));
}

/*
 * SIGHUP opens the log file again, which may be another one then; a terminal or the like stays what
 * it is, under any name.
 */
static void keep_log(const char *path)
{
	struct stat st;

	if (lstat(path, &st) == 0 && !S_ISREG(st.st_mode))
		confine_keep(NULL, path, CONFINE_ITSELF | CONFINE_APPEND | CONFINE_READ_FILE);
	else
		confine_keep("open log file ", path, CONFINE_APPEND);
}

/* The directories of a file, and of a whole chain of links: others replace these now and then. */
static void keep_chain(const char *file)
{
	char at[4096], target[sizeof(at)];
	ssize_t n = snprintf(target, sizeof(target), "%s", file);

	for (unsigned links = 0; n > 0 && links < 40; links++) {
		size_t dir = *target == '/' ? 0 : (size_t)(base_name(at) - at);

		target[n] = '\0';
		snprintf(at + dir, sizeof(at) - dir, "%s", target);
		confine_keep(NULL, at, CONFINE_READ);
		n = readlink(at, target, sizeof(target) - 1);
	}
}

/* A proxy connects again to an origin that was away, and looks up its name for that. */
static void keep_resolver(void)
{
	keep_chain("/etc/hosts");
	keep_chain("/etc/resolv.conf");
	keep_chain("/etc/nsswitch.conf");
	keep_chain("/etc/gai.conf");
#ifdef __GLIBC__
	/* It may load libraries for that. */
	confine_keep(NULL, "/usr", CONFINE_ITSELF | CONFINE_READ);
	confine_keep(NULL, "/lib", CONFINE_ITSELF | CONFINE_READ);
	confine_keep(NULL, "/lib64", CONFINE_ITSELF | CONFINE_READ);
#endif
}

/* What will be done with files after the start, and nothing else, stays possible. */
static bool give_up_rights(void)
{
	const struct options *o = &server.options;
	bool is_proxy = o->mode == MODE_PROXY;

	if (!confine_begin(!o->no_sandbox, is_proxy))
		return false;
	for (struct exported *e = exports.all; e < exports.all + exports.count; e++)
		if (e->disk && e->disk->is_file)
			confine_keep("make snapshots of ", e->path, CONFINE_FILES);
	confine_keep("remove unix:", o->unix_path, CONFINE_REMOVE_FILE);
	confine_keep("remove unix:", o->control, CONFINE_REMOVE_FILE);
	confine_keep("remove pidfile ", server.pid_path, CONFINE_REMOVE_FILE);
	if (server.log_path)
		keep_log(server.log_path);
	if (is_proxy)
		keep_resolver();
	if (is_proxy && !o->port && o->user && access(o->host + strlen("unix:"), W_OK) < 0)
		log_error("--user %s: cannot connect to origin %s again: %s", o->user, o->host,
			  strerror(errno));
	return confine_enter();
}

/* Start the first loop and the first worker, which are needed to serve anybody. */
static bool start_threads(void)
{
	unsigned max = (unsigned)server.options.threads;
	int err;

	if (max == 0)
		max = cpu_count() > LOOPS_MIN ? cpu_count() : LOOPS_MIN;
	if (!share_descriptors(&max))
		return false;
	err = clients_begin(max, (unsigned)server.options.keepalive);
	if (!err)
		err = worker_begin();
	return !err || log_failure("cannot start a thread: %s", strerror(-err));
}

/* Tell the process that started us and waits for it, if one does, as sd_notify(3) would. */
static void notify_supervisor(const char *state)
{
	const char *name = getenv("NOTIFY_SOCKET");
	size_t len = name ? strlen(name) : 0;
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd;

	if (len < 2 || len > sizeof(sun.sun_path))
		return;
	memcpy(sun.sun_path, name, len);
	if (name[0] == '@')	/* Linux: a name that is no file */
		sun.sun_path[0] = '\0';
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return;
	if (sendto(fd, state, strlen(state), 0, (const struct sockaddr *)&sun,
		   (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len)) < 0)
		log_error("cannot notify %s: %s", name, strerror(errno));
	close(fd);
}

/* Serve a client, if it may connect. */
static void accept_client(int fd, const struct sockaddr *sa, socklen_t len)
{
	static unsigned long serial;	/* clients of Unix sockets have no names of their own */
	const struct options *o = &server.options;
	enum greeting greeting = o->connected_fd >= 0 ? GREET_CONNECTED :
				 o->oldstyle	      ? GREET_OLDSTYLE :
							GREET_NEWSTYLE;
	char peer[ADDRESS_MAX];
	const char *why;
	struct guest *guest = access_enter(sa, &why);
	struct conn *c = NULL;

	serial++;
	if (sa->sa_family == AF_UNIX)
		snprintf(peer, sizeof(peer), "unix client %lu", serial);
	else
		format_address(sa, len, peer);
	if (guest) {
		why = "out of memory";
		c = conn_new(fd, greeting, &exports.proto, peer, (unsigned)o->keepalive);
	}
	if (c) {
		c->guest = guest;
		clients_add(c);
		return;
	}
	access_leave(&guest);
	log_peer(LOG_ERROR, "%s: refused: %s", peer, why);
	close(fd);
}

static bool start(void)
{
	const struct options *o = &server.options;

	raise_limits();
	if ((o->user && !confine_find_user(o->user)) || !setup_signals() || !setup_log() ||
	    !exports_open(o) || !is_no_image(o->logpath) || !open_sockets())
		return false;
	opening = 0;
	if ((o->unix_path && !listen_unix(o->unix_path, (mode_t)o->unix_mode, NULL)) ||
	    !ctl_open(o) || !write_pidfile() || !give_up_rights() || !log_start() ||
	    !start_threads() || !exports_start())
		return false;
	log_line("%s", confine_holds ? "confined to the files that are needed" :
		 o->no_sandbox	     ? "not confined: --no-sandbox" :
				       "not confined: this system has no Landlock");
	if (!listen_start(accept_client))
		return false;
	notify_supervisor("READY=1");
	return server.ready_fd < 0 || detach();
}

/* Service */

/* Something ended, or a signal came. */
static void take_wakeups(void)
{
	listen_resume();
	if (take_signal(SIGHUP))
		log_reopen();
	if (take_signal(SIGUSR1) && !exports_snapshot())
		log_error("SIGUSR1 ignored: snapshots are taken in target mode");
	if (take_signal(SIGUSR2))
		ctl_switch();
	if (take_signal(SIGRTMIN) || take_signal(SIGINFO))
		stats_log();
	ctl_tend();
}

/* Accept clients until a signal to stop, or until the only client has left. */
static void serve(void)
{
	unsigned stats = (unsigned)server.options.stats;

	while (!stop_signals && (server.single_fd < 0 || clients_count() > 0)) {
		loop_poll(&main_loop, stats_tend(clients_count() > 0 ? stats : 0));
		if (loop_deliver(&main_loop))
			take_wakeups();
	}
}

static void add_single_client(void)
{
	union address address = { .sa.sa_family = AF_UNSPEC };	/* of a client that has left */
	socklen_t len = sizeof(address);

	getpeername(server.single_fd, &address.sa, &len);
	fcntl(server.single_fd, F_SETFL, O_RDWR | O_NONBLOCK);
	accept_client(server.single_fd, &address.sa, len);
}

/* End */

/* Let all connections finish, and give up snapshots.  The program ends if that takes too long. */
static void server_stop(void)
{
	uint64_t begun = now_ms(), past;

	listen_close();
	ctl_close();
	exports_stop();
	clients_stop();
	while (clients_count() > 0 || exports_stop() || worker_is_busy()) {
		past = now_ms() - begun;
		if (past >= GIVE_UP_MS && exports.cache)
			origin_cancel(exports.cache->origin);
		if (past >= STOP_MS) {
			if (clients_count() > 0)
				log_error("stopped, but %zu connections wait for the disk",
					  clients_count());
			else
				log_error("stopped, but a thread waits for the disk");
			remove_pidfile();
			end_at_once(NULL);
		}
		loop_poll(&main_loop, now_ms() + STOP_LOOK_MS);
		loop_deliver(&main_loop);
	}
	clients_join();
	if (exports.cache)
		origin_end(exports.cache->origin);
	worker_stop();		/* one may be at its last words to a loop; a commit may be due */
	clients_free();
}

/* exit() calls it, also where a start ends for lack of memory. */
static void clean_up(void)
{
	listen_close();
	ctl_close();
	remove_pidfile();
	log_flush();
}

int main(int argc, char **argv)
{
	int status = EXIT_FAILURE;

	buffer_init();
	log_name("xnbd-server");
	occupy_standard_descriptors();
	log_keep_off(STDIN_FILENO);
	options_parse(&server.options, argc, argv);
	server.passed = listen_count_passed();
	if (server.passed < 0 || (server.options.daemonize && !daemonize()))
		return EXIT_FAILURE;
	atexit(clean_up);
	if (start()) {
		if (server.single_fd >= 0)
			add_single_client();
		serve();
		if (stop_signals)
			log_line("stopping");
		status = EXIT_SUCCESS;
	}
	server_stop();
	if (!exports_close())		/* a last commit; the alarm bounds it, too */
		status = EXIT_FAILURE;
	return status;
}
