/*
 * confine.c - see confine.h.
 *
 * The rules are about what is opened, connected to and removed later; a descriptor that is open
 * stays what it is.  Landlock is called by number, and its constants are our own, since many
 * systems' headers are older than their kernels.  What a kernel does not know is left out.
 */
#define _GNU_SOURCE
#include "confine.h"

#include "log.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/prctl.h>
#include <sys/syscall.h>
#if !defined(SYS_landlock_create_ruleset) && !defined(__alpha__) && !defined(__mips__)
#define SYS_landlock_create_ruleset 444		/* on all machines but these two */
#endif
#endif

#ifndef O_PATH
#define O_PATH 0
#endif

/* The user */

static struct {
	const char *name;	/* of --user; NULL: we stay as we are */
	uid_t uid;		/* not 0 */
	gid_t gid;
} user;

/* By name or by number; with a group a number need not be that of a known user. */
static bool find_user(const char *name, bool has_group)
{
	const struct passwd *pw = getpwnam(name);
	unsigned long id = 0;
	bool is_number = parse_number(name, 0, UINT32_MAX - 1, &id);

	if (!pw && is_number)
		pw = getpwuid((uid_t)id);
	user.uid = pw ? pw->pw_uid : (uid_t)id;
	user.gid = pw ? pw->pw_gid : 0;
	return pw || (is_number && has_group);
}

static bool find_group(const char *name)
{
	const struct group *gr = getgrnam(name);
	unsigned long id = 0;
	bool is_number = parse_number(name, 0, UINT32_MAX - 1, &id);

	user.gid = gr ? gr->gr_gid : (gid_t)id;
	return gr || is_number;
}

bool confine_find_user(const char *name)
{
	const char *group = strchr(name, ':');
	char *only = group ? strndup(name, (size_t)(group - name)) : strdup(name);

	if (geteuid() != 0)
		log_failure("--user %s: only root can become another user", name);
	else if (!only || !find_user(only, group))
		log_failure("--user %s: there is no such user%s", name,
			    group ? "" : "; a number needs a group, as in 1000:1000");
	else if (group && !find_group(group + 1))
		log_failure("--user %s: there is no such group", name);
	else if (user.uid == 0)
		log_failure("--user %s: that is root, and root is to be given up", name);
	else
		user.name = name;
	free(only);
	return user.name != NULL;
}

bool confine_give_socket(const char *path)
{
	int err = 0;

	if (!user.name)
		return true;
#if O_PATH
	/* Whoever may write to the directory could have exchanged the file meanwhile. */
	int fd = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0 || !S_ISSOCK(st.st_mode) ||
	    fchownat(fd, "", user.uid, user.gid, AT_EMPTY_PATH) < 0)
		err = errno;
	if (fd >= 0)
		close(fd);
#else
	if (lchown(path, user.uid, user.gid) < 0)
		err = errno;
#endif
	return !err || log_failure("cannot give unix:%s to --user: %s", path, strerror(err));
}

/* Without any other group, for ever.  False after logging why not. */
static bool become_user(void)
{
	if (setgroups(1, &user.gid) < 0 || setgid(user.gid) < 0 || setuid(user.uid) < 0)
		return log_failure("cannot become user %lu: %s", (unsigned long)user.uid,
				   strerror(errno));
	if (setuid(0) == 0 || getuid() != user.uid || geteuid() != user.uid ||
	    getgid() != user.gid || getegid() != user.gid)
		return log_failure("cannot become user %lu for good", (unsigned long)user.uid);
	return true;
}

/* What will be done later */

static struct kept {
	const char *deed, *path;	/* "remove pidfile ", or NULL; and its file */
	char *place;			/* the directory or file that there are these rights on */
	unsigned rights;
} *kept;
static size_t kept_count;

void confine_keep(const char *deed, const char *path, unsigned rights)
{
	char *place = rights & CONFINE_ITSELF ? strdup(path) : directory_of(path);

	kept = not_null(realloc(kept, (kept_count + 1) * sizeof(*kept)));
	kept[kept_count++] = (struct kept){ deed, path, not_null(place), rights };
}

/* Whether the user can do it.  A log file that is there need not be made. */
static bool is_possible(const struct kept *k)
{
	return !user.name || !k->deed ||
	       (k->rights == CONFINE_APPEND && access(k->path, W_OK) == 0) ||
	       access(k->place, W_OK | X_OK) == 0;
}

/* The reach */

static bool in_force;

/* Landlock's calls, in the order of their numbers. */
enum { CREATE_RULESET, ADD_RULE, RESTRICT_SELF };

enum {
	CREATE_VERSION = 1,
	RULE_PATH_BENEATH = 1,
	NET_BIND = 1 << 0,
	NET_CONNECT = 1 << 1,
	SCOPE_ABSTRACT = 1 << 0,
	SCOPE_SIGNAL = 1 << 1,
	FILE_RIGHTS = CONFINE_WRITE_FILE | CONFINE_READ_FILE | CONFINE_TRUNCATE,
};

struct ruleset {
	uint64_t files, net, scoped;	/* what is forbidden unless a rule allows it */
};

struct path_beneath {
	uint64_t allowed;
	int32_t fd;
};

/* How many rights on files each version of the interface knows; later ones know all that we name. */
static const uint8_t known_rights[] = { 0, 13, 14, 15, 15 };
enum { RIGHTS = 16 };

static long landlock(int call, long a, long b, long c, long d)
{
#if defined(SYS_landlock_create_ruleset) && !defined(XNBD_PORTABLE)
	return syscall(SYS_landlock_create_ruleset + call, a, b, c, d);
#else
	(void)call, (void)a, (void)b, (void)c, (void)d;
	return -1;
#endif
}

/*
 * Rules that allow nothing with files, no TCP ports, and signals to ourselves alone: a descriptor,
 * -ENOSYS if the kernel knows none, or -errno.  *rights are those on files that it knows.
 */
static int begin_rules(bool connects, unsigned *rights)
{
	const char *supervisor = getenv("NOTIFY_SOCKET");
	long version = landlock(CREATE_RULESET, 0, 0, CREATE_VERSION, 0);
	struct ruleset set = { 0 };
	int fd;

	if (version < 1)
		return -ENOSYS;
	*rights = (1u << (version < 5 ? known_rights[version] : RIGHTS)) - 1;
	set.files = *rights;
	if (version >= 4)
		set.net = NET_BIND | (connects ? 0 : NET_CONNECT);
	if (version >= 6)
		set.scoped = SCOPE_SIGNAL | (supervisor && *supervisor == '@' ? 0 : SCOPE_ABSTRACT);
	fd = (int)landlock(CREATE_RULESET, (long)&set, sizeof(set), 0, 0);
	return fd < 0 ? -errno : fd;
}

/* What is not there, or cannot be reached by this user, is left out.  0 or -errno. */
static int add_rule(int fd, const char *place, unsigned rights)
{
	struct path_beneath rule = { rights, open(place, O_PATH | O_CLOEXEC) };
	struct stat st;
	int err = 0;

	if (rule.fd < 0)
		return errno == ENOENT || errno == EACCES ? 0 : -errno;
	if (fstat(rule.fd, &st) == 0 && !S_ISDIR(st.st_mode))
		rule.allowed &= FILE_RIGHTS;
	if (landlock(ADD_RULE, fd, RULE_PATH_BENEATH, (long)&rule, 0) < 0)
		err = -errno;
	close(rule.fd);
	return err;
}

/* Keep what is kept, and nothing else, as far as the kernel knows such rules.  0 or -errno. */
static int enter_rules(bool connects)
{
	unsigned rights;
	int fd = begin_rules(connects, &rights), err = 0;

	if (fd < 0)
		return fd == -ENOSYS ? 0 : fd;
#ifdef XNBD_INSTRUMENTED
	confine_keep(NULL, "/", ~0u);	/* a sanitizer opens files of its own, at the end for instance */
#endif
	for (size_t i = 0; i < kept_count && !err; i++)
		err = add_rule(fd, kept[i].place, kept[i].rights & rights);
	if (!err && landlock(RESTRICT_SELF, fd, 0, 0, 0) < 0)
		err = -errno;
	close(fd);
	in_force = !err;
	return err;
}

bool confine_enter(bool sandbox, bool connects)
{
	int err;

	if (user.name && !become_user())
		return false;
#ifdef __linux__
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
#endif
	for (const struct kept *k = kept; k < kept + kept_count; k++)
		if (!is_possible(k))
			log_line("--user %s: cannot %s%s later: %s", user.name, k->deed, k->path,
				 strerror(errno));
	err = sandbox ? enter_rules(connects) : 0;
	return !err || log_failure("cannot confine the server: %s (--no-sandbox starts it without)",
				   strerror(-err));
}

bool confine_is_in_force(void)
{
	return in_force;
}
