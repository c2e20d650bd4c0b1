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

/* By names or by numbers; with a group a number need not be that of a known user. */
bool confine_find_user(const char *name)
{
	const char *group = strchr(name, ':');
	char *only = not_null(group ? strndup(name, (size_t)(group - name)) : strdup(name));
	const struct passwd *pw = getpwnam(only);
	const struct group *gr = group ? getgrnam(group + 1) : NULL;
	unsigned long uid = 0, gid = 0;
	bool has_uid = parse_number(only, 0, UINT32_MAX - 1, &uid);
	bool has_gid = group && parse_number(group + 1, 0, UINT32_MAX - 1, &gid);

	free(only);
	if (!pw && has_uid)
		pw = getpwuid((uid_t)uid);
	user.uid = pw ? pw->pw_uid : (uid_t)uid;
	user.gid = gr ? gr->gr_gid : group ? (gid_t)gid : pw ? pw->pw_gid : 0;
	if (geteuid() != 0)
		return log_failure("--user %s: only root can become another user", name);
	if (!pw && !(has_uid && group))
		return log_failure("--user %s: there is no such user%s", name,
				   group ? "" : "; a number needs a group, as in 1000:1000");
	if (group && !gr && !has_gid)
		return log_failure("--user %s: there is no such group", name);
	if (user.uid == 0)
		return log_failure("--user %s: that is root, and root is to be given up", name);
	user.name = name;
	return true;
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

/* The reach */

bool confine_holds;

static struct {
	int fd;			/* Landlock's rules, while they are made; else -1 */
	unsigned rights;	/* on files, that the kernel knows */
	int error;		/* -errno: the rules cannot be made */
} rules = { .fd = -1 };

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
 * Rules that allow nothing with files, no TCP ports, and signals to ourselves alone; none if the
 * kernel knows none.
 */
static void begin_rules(bool connects)
{
	const char *supervisor = getenv("NOTIFY_SOCKET");
	long version = landlock(CREATE_RULESET, 0, 0, CREATE_VERSION, 0);
	struct ruleset set = { 0 };

	if (version < 1)
		return;
	rules.rights = (1u << (version < 5 ? known_rights[version] : RIGHTS)) - 1;
	set.files = rules.rights;
	if (version >= 4)
		set.net = NET_BIND | (connects ? 0 : NET_CONNECT);
	if (version >= 6)
		set.scoped = SCOPE_SIGNAL | (supervisor && *supervisor == '@' ? 0 : SCOPE_ABSTRACT);
	rules.fd = (int)landlock(CREATE_RULESET, (long)&set, sizeof(set), 0, 0);
	rules.error = rules.fd < 0 ? -errno : 0;
}

bool confine_begin(bool sandbox, bool connects)
{
	if (user.name && !become_user())
		return false;
#ifdef __linux__
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
#endif
	if (sandbox)
		begin_rules(connects);
	return true;
}

/* What is not there, or cannot be reached by this user, is left out.  0 or -errno. */
static int add_rule(const char *place, unsigned rights)
{
	struct path_beneath rule = { rights & rules.rights, open(place, O_PATH | O_CLOEXEC) };
	struct stat st;
	int err = 0;

	if (rule.fd < 0)
		return errno == ENOENT || errno == EACCES ? 0 : -errno;
	if (fstat(rule.fd, &st) == 0 && !S_ISDIR(st.st_mode))
		rule.allowed &= FILE_RIGHTS;
	if (landlock(ADD_RULE, rules.fd, RULE_PATH_BENEATH, (long)&rule, 0) < 0)
		err = -errno;
	close(rule.fd);
	return err;
}

void confine_keep(const char *deed, const char *path, unsigned rights)
{
	char *place;

	if (!path)
		return;
	place = not_null(rights & CONFINE_ITSELF ? strdup(path) : directory_of(path));
	/* A log file that is there need not be made. */
	if (user.name && deed && !(rights == CONFINE_APPEND && access(path, W_OK) == 0) &&
	    access(place, W_OK | X_OK) < 0)
		log_line("--user %s: cannot %s%s later: %s", user.name, deed, path, strerror(errno));
	if (rules.fd >= 0 && !rules.error)
		rules.error = add_rule(place, rights);
	free(place);
}

bool confine_enter(void)
{
#ifdef XNBD_INSTRUMENTED
	confine_keep(NULL, "/", ~0u);	/* a sanitizer opens files of its own, at the end for instance */
#endif
	if (rules.fd >= 0) {
		if (!rules.error && landlock(RESTRICT_SELF, rules.fd, 0, 0, 0) < 0)
			rules.error = -errno;
		close(rules.fd);
		confine_holds = !rules.error;
	}
	return !rules.error || log_failure("cannot confine the server: %s (--no-sandbox starts it "
					   "without)", strerror(-rules.error));
}
