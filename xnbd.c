/*
 * xnbd.c - main() of xnbd-server: start-up order, signals, shutdown.
 *
 * The main thread opens everything, then accepts connections and hands them to loops, then
 * ends them.  It sleeps in ppoll(), and only there do signals come in.
 */
#define _GNU_SOURCE
#include "backend.h"
#include "control.h"
#include "cow.h"
#include "disk.h"
#include "listen.h"
#include "loop.h"
#include "options.h"
#include "proxy.h"
#include "report.h"
#include "snapshot.h"
#include "util.h"
#include "worker.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	CONNECTIONS_MAX = 4096,
	SPARE_FDS = 64,			/* for everything that is not a connection */
	ACCEPT_BATCH = 64,
	ACCEPT_PAUSE_MS = 1000,		/* when the system has no more descriptors */
	STOP_MS = 4500,
	GIVE_UP_MS = 2000,		/* of that, for requests that wait for an origin */
	LOOPS_PER_CPU = 2,
	LOOPS_MIN = 4,
};

/* Everything that the server consists of.  The main thread's. */
struct server {
	struct options options;
	struct backend *backend;
	struct disk *disk;		/* a target's: what snapshots are taken of */
	struct snapshot *snapshot;	/* that is being made, or NULL */
	bool snapshot_taken;		/* its instant is past; else it waits for the gate */
	bool snapshot_wanted;		/* another one, when that is done */
	struct export export;
	const struct proto_export *table[1];
	struct proto_exports exports;
	struct listeners listeners;
	int passed;			/* sockets that were opened for us */
	int single_fd;			/* --inetd, --connected-fd: the client; else -1 */
	int ready_fd;			/* --daemonize: tells the first process; else -1 */
	char *log_path, *pid_path, *image_path;	/* from the root: a daemon leaves its place */
	size_t connections_max;
	uint64_t accept_again;		/* now_ms() when a pause of accepting ends, 0 for none */
	uint64_t refusal_logged;	/* now_ms() */
};

/* Signals and loops wake the main thread with a byte in this pipe. */
static int wake_pipe[2] = { -1, -1 };
static volatile sig_atomic_t stop_signals, hup_signals, usr1_signals, usr2_signals, info_signals;

static void on_signal(int sig)
{
	switch (sig) {
	case SIGHUP:
		hup_signals = 1;
		break;
	case SIGUSR1:
		usr1_signals = 1;
		break;
	case SIGUSR2:
		usr2_signals = 1;
		break;
	case SIGTERM:
	case SIGINT:
		if (stop_signals)
			_exit(EXIT_FAILURE);
		stop_signals = 1;
		break;
	default:
		info_signals = 1;
	}
	poke_pipe(wake_pipe[1], 0);
}

/* Another thread: something that the main thread waits for has happened. */
static void wake_main(void)
{
	poke_pipe(wake_pipe[1], 0);
}

static atomic_bool room_again;

/* Another thread: clients that had no room may go on. */
static void tell_room(void)
{
	atomic_store(&room_again, true);
	wake_main();
}

/* The signals that we take, of which some systems have not all; returns how many. */
static size_t list_signals(int *sig)
{
	size_t n = 0;

	sig[n++] = SIGTERM;
	sig[n++] = SIGINT;
	sig[n++] = SIGHUP;
	sig[n++] = SIGUSR1;
	sig[n++] = SIGUSR2;
#if defined(SIGRTMIN)
	sig[n++] = SIGRTMIN;
#endif
#if defined(SIGINFO)
	sig[n++] = SIGINFO;
#endif
	return n;
}

/* Block what is handled, here and in all threads to come; handlers run in ppoll() only. */
static bool setup_signals(void)
{
	struct sigaction sa = { .sa_handler = on_signal };
	int err = make_pipe(wake_pipe), handled[8];
	size_t n = list_signals(handled);
	sigset_t set;

	if (err) {
		log_failure("cannot make a pipe: %s", strerror(-err));
		return false;
	}
	sigemptyset(&set);
	for (size_t i = 0; i < n; i++) {
		sigaddset(&set, handled[i]);
		sigaction(handled[i], &sa, NULL);
	}
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN);	/* a file size limit is an error of one write */
	return true;
}

/* Sleep until a descriptor is ready or a signal comes in. */
static int wait_for(struct pollfd *pfd, nfds_t n, int timeout_ms)
{
	struct timespec ts = { timeout_ms / 1000, timeout_ms % 1000 * 1000000L };
	sigset_t none;

	sigemptyset(&none);
	return ppoll(pfd, n, timeout_ms < 0 ? NULL : &ts, &none);
}

/* Start-up */

/*
 * Go into the background.  Returns in the child; the first process waits until the child is
 * ready and exits with status 0, or 1 when the child ended before, which then has said why.
 */
static bool daemonize(struct server *s)
{
	int fds[2], status;
	pid_t pid;
	char byte;

	if (pipe2(fds, O_CLOEXEC) < 0 || (pid = fork()) < 0) {
		log_failure("cannot daemonize: %s", strerror(errno));
		return false;
	}
	if (pid > 0) {
		close(fds[1]);
		if (read(fds[0], &byte, 1) == 1)
			_exit(EXIT_SUCCESS);
		waitpid(pid, &status, 0);
		_exit(EXIT_FAILURE);
	}
	close(fds[0]);
	s->ready_fd = fds[1];
	setsid();
	return true;
}

/* The daemon can be used: let the first process go, and let go of its terminal and directory. */
static bool detach(struct server *s)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (null < 0 || chdir("/") < 0) {
		log_failure("cannot daemonize: %s", strerror(errno));
		return false;
	}
	for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		dup2(null, fd);
	if (null > STDERR_FILENO)
		close(null);
	while (write(s->ready_fd, "", 1) < 0 && errno == EINTR)
		;
	close(s->ready_fd);
	s->ready_fd = -1;
	return true;
}

static bool setup_log(struct server *s)
{
	const struct options *o = &s->options;
	int err;

	if (o->connected_fd >= 0)
		log_keep_off((int)o->connected_fd);
	log_limit(o->quiet ? LOG_ASKED : o->verbose ? LOG_DETAIL : LOG_EVENT);
	if (o->logpath) {
		s->log_path = absolute_path(o->logpath);
		err = s->log_path ? log_open(LOG_TO_FILE, s->log_path) : -ENOMEM;
		if (err)
			log_failure("cannot open log file %s: %s", o->logpath, strerror(-err));
		return err == 0;
	}
	if (o->syslog || o->inetd || o->daemonize || log_would_disturb())
		log_open(LOG_TO_SYSLOG, NULL);
	return true;
}

static void set_limit(const struct rlimit *r)
{
#if defined(__linux__) && !defined(XNBD_PORTABLE)
	prlimit(0, RLIMIT_NOFILE, r, NULL);	/* musl's setrlimit() stops all threads, in 2 KB */
#else
	setrlimit(RLIMIT_NOFILE, r);
#endif
}

/* As many descriptors as we may have; how many connections that makes. */
static size_t raise_limits(void)
{
	struct rlimit r;

	if (getrlimit(RLIMIT_NOFILE, &r) < 0)
		return 256;
	if (r.rlim_cur < r.rlim_max && r.rlim_cur < CONNECTIONS_MAX + SPARE_FDS) {
		r.rlim_cur = r.rlim_max < CONNECTIONS_MAX + SPARE_FDS ?
				     r.rlim_max :
				     CONNECTIONS_MAX + SPARE_FDS;
		set_limit(&r);
		getrlimit(RLIMIT_NOFILE, &r);
	}
	if (r.rlim_cur >= CONNECTIONS_MAX + SPARE_FDS)
		return CONNECTIONS_MAX;
	return r.rlim_cur > 2 * SPARE_FDS ? r.rlim_cur - SPARE_FDS : r.rlim_cur / 2;
}

/* What clients may see of the image's path; a file name may have bytes that NBD does not allow. */
static const char *describe_image(const char *path)
{
	const char *name = base_name(path);

	return proto_is_string(name) ? name : "";
}

static struct backend *open_target(struct server *s)
{
	const struct options *o = &s->options;

	if (o->create && !disk_create(o->image, o->create_size))
		return NULL;
	s->image_path = absolute_path(o->image);
	s->disk = disk_open(o->image, o->readonly, " (--readonly may help)");
	return s->disk ? disk_backend(s->disk) : NULL;
}

static struct backend *open_cow_target(const struct options *o)
{
	const struct cow_options cow = { o->image, o->cow_dir, o->cow_file, o->readonly };

	return cow_open(&cow);
}

static struct backend *open_proxy(struct server *s)
{
	s->image_path = absolute_path(s->options.image);	/* for when it is a target */
	return proxy_open(&s->options, wake_main);
}

static struct backend *open_backend(struct server *s)
{
	switch (s->options.mode) {
	case MODE_COW_TARGET:
		return open_cow_target(&s->options);
	case MODE_PROXY:
		return open_proxy(s);
	default:
		return open_target(s);
	}
}

static bool open_export(struct server *s)
{
	const struct options *o = &s->options;

	s->backend = open_backend(s);
	if (!s->backend)
		return false;
	export_init(&s->export, s->backend, "", describe_image(o->image), wake_main,
		    loops_wake);
	s->export.load.room = tell_room;
	s->table[0] = &s->export.proto;
	s->exports.entry = s->table;
	s->exports.count = 1;
	s->exports.any_name = true;
	return true;
}

/* Whether fd is a connection; logs what it is if not. */
static bool is_connection(int fd, const char *what)
{
	int listening = 0, type = 0;
	socklen_t len = sizeof(type);

	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) < 0 || type != SOCK_STREAM) {
		log_failure("%s: descriptor %d is not a stream socket", what, fd);
		return false;
	}
	if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len) == 0 && listening) {
		log_failure("%s: descriptor %d is a socket that listens, not a connection", what,
			    fd);
		return false;
	}
	return true;
}

/* Take the client from standard input, and keep everything else off its socket. */
static bool take_inetd(struct server *s)
{
	int null;

	if (!is_connection(STDIN_FILENO, "--inetd"))
		return false;
	s->single_fd = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
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

static bool open_sockets(struct server *s)
{
	const struct options *o = &s->options;

	if (o->inetd)
		return take_inetd(s);
	if (o->connected_fd >= 0) {
		s->single_fd = (int)o->connected_fd;
		return is_connection(s->single_fd, "--connected-fd") &&
		       fcntl(s->single_fd, F_SETFD, FD_CLOEXEC) == 0;
	}
	if (s->passed > 0 && (o->lport_given || o->laddrs || o->unix_path)) {
		log_failure("LISTEN_FDS says where to listen, --lport, --laddr and --unix do not "
			    "belong to it");
		return false;
	}
	if (s->passed > 0)
		return listen_passed(&s->listeners, s->passed);
	if (o->unix_path && !listen_unix(&s->listeners, o->unix_path, 0))
		return false;
	if (o->unix_path && !o->lport_given && !o->laddrs)
		return true;
	return listen_tcp(&s->listeners, o->laddr, o->laddrs, (unsigned)o->lport);
}

static bool write_pidfile(struct server *s)
{
	const char *path = s->options.pidfile;
	char line[32];
	int fd, n;

	if (!path)
		return true;
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
	n = snprintf(line, sizeof(line), "%ld\n", (long)getpid());
	n = fd < 0 ? -1 : (int)write(fd, line, (size_t)n);
	if (fd >= 0 && close(fd) < 0)
		n = -1;
	s->pid_path = n < 0 ? NULL : absolute_path(path);
	if (!s->pid_path) {
		log_failure("cannot write pidfile %s: %s", path, strerror(errno));
		if (fd >= 0)
			unlink(path);
	}
	return s->pid_path != NULL;
}

static bool start_loops(struct server *s)
{
	unsigned max = (unsigned)s->options.threads;
	int err;

	if (max == 0)
		max = LOOPS_PER_CPU * cpu_count();
	if (!s->options.threads && max < LOOPS_MIN)
		max = LOOPS_MIN;
	err = loops_init(max, wake_main);
	if (err)
		log_failure("cannot start: %s", strerror(-err));
	return err == 0;
}

/* For the control socket, and a signal. */
static const char *want_snapshot(void *arg)
{
	struct server *s = arg;

	if (!s->disk || !s->image_path)
		return "snapshots are taken in target mode";
	s->snapshot_wanted = true;
	wake_main();
	return NULL;
}

static bool start(struct server *s)
{
	s->connections_max = raise_limits();
	report_init((unsigned)s->options.stats, wake_main);
	if (!setup_log(s) || !setup_signals() || !open_export(s) || !open_sockets(s) ||
	    !control_open(&s->options, &s->export, want_snapshot, s) || !start_loops(s) || !write_pidfile(s))
		return false;
	for (size_t i = 0; i < s->listeners.count; i++)
		log_line("listening on %s", s->listeners.all[i].address);
	notify_supervisor("READY=1");
	return s->ready_fd < 0 || detach(s);
}

/* Connections */

/* Hand a client to a loop, or close it. */
static void add_client(struct server *s, int fd, enum greeting greeting, const char *peer)
{
	struct conn *c = conn_new(fd, greeting, &s->exports, peer);
	int err;

	if (!c) {
		log_error("%s: refused: out of memory", peer);
		close(fd);
		return;
	}
	err = loops_add(c);
	if (err) {
		conn_kill(c, strerror(-err));
		conn_free(c);
	}
}

/* Close a client that is one too many; the log says so once a second at most. */
static void refuse_client(struct server *s, int fd, const char *peer)
{
	uint64_t now = now_ms();

	close(fd);
	if (s->refusal_logged && now - s->refusal_logged < 1000)
		return;
	s->refusal_logged = now;
	log_error("%s: refused: there are %zu connections already", peer, s->connections_max);
}

static void pause_accepting(struct server *s)
{
	log_error("cannot accept: %s; trying again when a connection ends", strerror(errno));
	s->accept_again = now_ms() + ACCEPT_PAUSE_MS;
}

static bool out_of_resources(int err)
{
	return err == EMFILE || err == ENFILE || err == ENOBUFS || err == ENOMEM;
}

/* Accept one client.  False if there is none, or accepting has to pause. */
static bool accept_client(struct server *s, const struct listener *l)
{
	static unsigned long serial;	/* clients of Unix sockets have no names of their own */
	union {
		struct sockaddr sa;
		struct sockaddr_storage room;
	} address;
	socklen_t len = sizeof(address);
	char peer[ADDRESS_MAX];
	int fd = accept4(l->fd, &address.sa, &len, SOCK_CLOEXEC);

	if (fd < 0) {
		if (out_of_resources(errno))
			pause_accepting(s);
		return errno == EINTR || errno == ECONNABORTED;
	}
	serial++;
	if (l->local)
		snprintf(peer, sizeof(peer), "unix client %lu", serial);
	else
		format_address(&address.sa, len, peer);
	if (loops_load() >= s->connections_max)
		refuse_client(s, fd, peer);
	else
		add_client(s, fd, s->options.oldstyle ? GREET_OLDSTYLE : GREET_NEWSTYLE, peer);
	return true;
}

static void accept_clients(struct server *s, const struct pollfd *pfd)
{
	for (size_t i = 0; i < s->listeners.count; i++)
		for (int n = 0; pfd[i].revents && n < ACCEPT_BATCH; n++)
			if (!accept_client(s, &s->listeners.all[i]))
				break;
}

/* Milliseconds to the end of a pause of accepting, -1 if there is none. */
static int pause_left(struct server *s)
{
	uint64_t now;

	if (!s->accept_again)
		return -1;
	now = now_ms();
	if (now < s->accept_again)
		return (int)(s->accept_again - now);
	s->accept_again = 0;
	return -1;
}

/* Snapshots */

/* The instant that the snapshot shows: nobody reads or writes. */
static void take_snapshot(struct server *s)
{
	if (!gate_close(&s->export.gate))
		return;		/* called again when it is empty */
	snapshot_take(s->snapshot);
	s->snapshot_taken = true;
	control_snapshot_begun();
	gate_open(&s->export.gate);
	snapshot_start(s->snapshot);
}

static void end_snapshot(struct server *s)
{
	const char *path, *why = NULL;

	if (!gate_close(&s->export.gate))
		return;
	path = snapshot_path(s->snapshot, &why);
	control_snapshot_ended(path, why);
	snapshot_free(s->snapshot);
	s->snapshot = NULL;
	gate_open(&s->export.gate);
}

/* One at a time; a signal during one is remembered. */
static void tend_snapshots(struct server *s)
{
	const char *why;

	if (s->snapshot && s->snapshot_taken && snapshot_is_over(s->snapshot))
		end_snapshot(s);
	if (s->snapshot_wanted && !s->snapshot) {
		s->snapshot_wanted = s->snapshot_taken = false;
		s->snapshot = snapshot_new(s->disk, s->image_path, wake_main, &why);
		if (!s->snapshot)
			control_snapshot_ended(NULL, why);
	}
	if (s->snapshot && !s->snapshot_taken)
		take_snapshot(s);
}

/* The pipe had something: something ended, or a signal came. */
static void take_wakeups(struct server *s)
{
	const char *why;

	drain_pipe(wake_pipe[0]);
	s->accept_again = 0;
	if (hup_signals) {
		hup_signals = 0;
		log_reopen();
	}
	if (usr1_signals) {
		usr1_signals = 0;
		why = want_snapshot(s);
		if (why)
			log_error("SIGUSR1 ignored: %s", why);
	}
	if (usr2_signals) {
		usr2_signals = 0;
		proxy_switch();
	}
	if (info_signals) {
		info_signals = 0;
		report_now();
	}
	if (atomic_exchange(&room_again, false))
		loops_wake();
	if (proxy_tend())
		s->disk = proxy_disk();
	tend_snapshots(s);
}

/* The shorter of two times, of which -1 is none. */
static int earlier(int a, int b)
{
	return a < 0 || (b >= 0 && b < a) ? b : a;
}

/* Accept clients until a signal to stop, or until the only client has left. */
static void serve(struct server *s)
{
	size_t listeners = s->listeners.count, controls;
	struct pollfd pfd[1 + listeners + CTL_FDS];
	bool single = s->single_fd >= 0;

	pfd[0] = (struct pollfd){ .fd = wake_pipe[0], .events = POLLIN };
	for (size_t i = 0; i < listeners; i++)
		pfd[i + 1].events = POLLIN;
	while (!stop_signals && !(single && loops_load() == 0)) {
		int timeout = earlier(earlier(pause_left(s), control_timeout()), report_timeout());

		for (size_t i = 0; i < listeners; i++)
			pfd[i + 1].fd = s->accept_again ? -1 : s->listeners.all[i].fd;
		controls = control_poll(pfd + 1 + listeners);
		if (wait_for(pfd, 1 + listeners + controls, timeout) < 0)
			continue;
		if (pfd[0].revents)
			take_wakeups(s);
		while (report_tend())
			control_gathered();
		accept_clients(s, pfd + 1);
		control_turn(pfd + 1 + listeners, controls);
	}
}

static void add_single_client(struct server *s)
{
	enum greeting greeting = GREET_CONNECTED;
	union {
		struct sockaddr sa;
		struct sockaddr_storage room;
	} address;
	socklen_t len = sizeof(address);
	char peer[ADDRESS_MAX] = "client";

	if (s->options.inetd)
		greeting = s->options.oldstyle ? GREET_OLDSTYLE : GREET_NEWSTYLE;
	if (getpeername(s->single_fd, &address.sa, &len) == 0 && address.sa.sa_family != AF_UNIX)
		format_address(&address.sa, len, peer);
	add_client(s, s->single_fd, greeting, peer);
}

/* End */

static bool has_work(const struct server *s)
{
	return loops_load() > 0 ||
	       (s->snapshot && s->snapshot_taken && !snapshot_is_over(s->snapshot));
}

/* Let all connections finish, and give up a snapshot.  False if that takes too long. */
static bool stop_all(struct server *s)
{
	uint64_t begun = now_ms(), now;
	struct pollfd pfd = { .fd = wake_pipe[0], .events = POLLIN };

	if (s->snapshot)
		snapshot_abandon(s->snapshot);
	control_close();
	proxy_stop();
	gate_open(&s->export.gate);	/* nobody waits for it any more */
	loops_stop();
	while (has_work(s)) {
		uint64_t until = begun;

		now = now_ms();
		until += now < begun + GIVE_UP_MS ? GIVE_UP_MS : STOP_MS;
		if (now >= begun + GIVE_UP_MS)
			proxy_give_up();
		if (now >= until)
			return false;
		if (wait_for(&pfd, 1, (int)(until - now)) > 0)
			drain_pipe(wake_pipe[0]);
	}
	return true;
}

static void clean_up(struct server *s)
{
	listen_close(&s->listeners);
	if (s->pid_path)
		unlink(s->pid_path);
	free(s->pid_path);
	free(s->log_path);
	free(s->image_path);
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
	if (!stop_all(s)) {
		log_error("stopped, but %zu connections wait for the disk", loops_load());
		if (s->pid_path)
			unlink(s->pid_path);
		_exit(EXIT_SUCCESS);
	}
	loops_join();
	proxy_end();
	worker_stop();		/* one may be at its last words to a loop */
	loops_free();
	snapshot_free(s->snapshot);
}

/* A socket or an image that got one of these numbers would take what is meant for a terminal. */
static void open_standard_descriptors(void)
{
	int fd;

	do
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		close(fd);
}

int main(int argc, char **argv)
{
	static struct server s = { .single_fd = -1, .ready_fd = -1 };
	int status = EXIT_FAILURE;

	open_standard_descriptors();
	log_name("xnbd-server");
	options_parse(&s.options, argc, argv);
	s.passed = listen_count_passed();
	if (s.passed < 0)
		return EXIT_FAILURE;
	if (s.options.daemonize && !daemonize(&s))
		return EXIT_FAILURE;
	if (start(&s)) {
		run(&s);
		status = EXIT_SUCCESS;
	} else {
		control_close();
		worker_stop();		/* a commit may be due */
	}
	if (s.backend)
		s.backend->ops->close(s.backend);
	clean_up(&s);
	return status;
}
