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

/* By name or by number; with a group a number need not be that of a known user. */
static bool find_user(const char *name, bool has_group, struct confine_user *user)
{
	const struct passwd *pw = getpwnam(name);
	unsigned long id = 0;
	bool is_number = parse_number(name, 0, UINT32_MAX - 1, &id);

	if (!pw && is_number)
		pw = getpwuid((uid_t)id);
	if (pw)
		*user = (struct confine_user){ pw->pw_uid, pw->pw_gid };
	else
		user->uid = (uid_t)id;
	return pw || (is_number && has_group);
}

static bool find_group(const char *name, gid_t *gid)
{
	const struct group *gr = getgrnam(name);
	unsigned long id = 0;
	bool is_number = parse_number(name, 0, UINT32_MAX - 1, &id);

	*gid = gr ? gr->gr_gid : (gid_t)id;
	return gr || is_number;
}

bool confine_find_user(const char *name, struct confine_user *user)
{
	const char *group = strchr(name, ':');
	char *only = group ? strndup(name, (size_t)(group - name)) : strdup(name);
	bool found = false;

	if (geteuid() != 0)
		log_failure("--user %s: only root can become another user", name);
	else if (!only || !find_user(only, group, user))
		log_failure("--user %s: there is no such user%s", name,
			    group ? "" : "; a number needs a group, as in 1000:1000");
	else if (group && !find_group(group + 1, &user->gid))
		log_failure("--user %s: there is no such group", name);
	else if (user->uid == 0)
		log_failure("--user %s: that is root, and root is to be given up", name);
	else
		found = true;
	free(only);
	return found;
}

bool confine_give_socket(const char *path, const struct confine_user *user)
{
	int err = 0;
#if O_PATH
	/* Whoever may write to the directory could have exchanged the file meanwhile. */
	int fd = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0 || !S_ISSOCK(st.st_mode) ||
	    fchownat(fd, "", user->uid, user->gid, AT_EMPTY_PATH) < 0)
		err = errno;
	if (fd >= 0)
		close(fd);
#else
	if (lchown(path, user->uid, user->gid) < 0)
		err = errno;
#endif
	if (err)
		log_failure("cannot give unix:%s to --user: %s", path, strerror(err));
	return err == 0;
}

bool confine_become(const struct confine_user *user)
{
	if (setgroups(1, &user->gid) < 0 || setgid(user->gid) < 0 || setuid(user->uid) < 0) {
		log_failure("cannot become user %lu: %s", (unsigned long)user->uid,
			    strerror(errno));
		return false;
	}
	if (setuid(0) == 0 || getuid() != user->uid || geteuid() != user->uid ||
	    getgid() != user->gid || getegid() != user->gid) {
		log_failure("cannot become user %lu for good", (unsigned long)user->uid);
		return false;
	}
	return true;
}

/* The reach */

static bool in_force;

void confine_no_new_privileges(void)
{
#ifdef __linux__
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
#endif
}

/* Landlock's calls, in the order of their numbers. */
enum { CREATE_RULESET, ADD_RULE, RESTRICT_SELF };

enum {
	CREATE_VERSION = 1,
	RULE_PATH_BENEATH = 1,
	NET_BIND = 1 << 0,
	NET_CONNECT = 1 << 1,
	SCOPE_ABSTRACT = 1 << 0,
	SCOPE_SIGNAL = 1 << 1,
	FILE_RIGHTS = CONFINE_EXECUTE | CONFINE_WRITE_FILE | CONFINE_READ_FILE | CONFINE_TRUNCATE |
		      CONFINE_IOCTL_DEV,
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

void confine_begin(struct confine *c, unsigned forbidden)
{
	long version = landlock(CREATE_RULESET, 0, 0, CREATE_VERSION, 0);
	struct ruleset set = { 0 };

	*c = (struct confine){ .fd = -1 };
	if (version < 1)
		return;
	c->rights = (1u << (version < 5 ? known_rights[version] : RIGHTS)) - 1;
	set.files = c->rights;
	if (version >= 4)
		set.net = NET_BIND | (forbidden & CONFINE_NO_CONNECT ? NET_CONNECT : 0);
	if (version >= 6)
		set.scoped = SCOPE_SIGNAL | (forbidden & CONFINE_NO_ABSTRACT ? SCOPE_ABSTRACT : 0);
	c->fd = (int)landlock(CREATE_RULESET, (long)&set, sizeof(set), 0, 0);
	if (c->fd < 0)
		c->error = -errno;
#ifdef XNBD_INSTRUMENTED
	confine_keep(c, "/", ~0u);	/* a sanitizer opens files of its own, at the end for instance */
#endif
}

void confine_keep(struct confine *c, const char *path, unsigned rights)
{
	struct path_beneath rule = { rights & c->rights, -1 };
	struct stat st;

	if (c->fd < 0 || c->error)
		return;
	rule.fd = open(path, O_PATH | O_CLOEXEC);
	if (rule.fd < 0 && (errno == ENOENT || errno == EACCES))
		return;
	if (rule.fd >= 0 && fstat(rule.fd, &st) == 0 && !S_ISDIR(st.st_mode))
		rule.allowed &= FILE_RIGHTS;
	if (rule.fd < 0 || landlock(ADD_RULE, c->fd, RULE_PATH_BENEATH, (long)&rule, 0) < 0)
		c->error = -errno;
	if (rule.fd >= 0)
		close(rule.fd);
}

bool confine_enter(struct confine *c)
{
	if (c->fd >= 0 && !c->error && landlock(RESTRICT_SELF, c->fd, 0, 0, 0) < 0)
		c->error = -errno;
	if (c->fd >= 0)
		close(c->fd);
	if (c->error)
		log_failure("cannot confine the server: %s (--no-sandbox starts it without)",
			    strerror(-c->error));
	in_force = c->fd >= 0 && !c->error;
	return c->error == 0;
}

bool confine_is_in_force(void)
{
	return in_force;
}
