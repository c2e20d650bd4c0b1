/*
 * confine.c - see confine.h.
 *
 * The rules are about what is opened, connected to and removed later; a descriptor that is open
 * stays what it is.  Landlock is called by number, and its constants are our own, since many
 * systems' headers are older than their kernels.  What a kernel does not know is left out.
 */
#define _GNU_SOURCE
#include "confine.h"

#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

/* The user */

enum { FIELDS = 4, USER_GROUP = 3 };

/* Cut a line at its colons.  False if it has too few fields. */
static bool split(char *line, char **field, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		if (!line)
			return false;
		field[i] = line;
		line = strchr(line, ':');
		if (line)
			*line++ = '\0';
	}
	return true;
}

/* All of a file as a string, in memory that the caller frees, or NULL. */
static char *read_text(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	char *text = NULL;

	if (fd >= 0 && fstat(fd, &st) == 0)
		text = calloc(1, (size_t)st.st_size + 1);
	if (text && read_at(fd, (uint8_t *)text, (uint64_t)st.st_size, 0) < 0) {
		free(text);
		text = NULL;
	}
	if (fd >= 0)
		close(fd);
	return text;
}

static bool parse_id(const char *s, unsigned long *id)
{
	return parse_number(s, 0, UINT32_MAX - 1, id);
}

/*
 * Find the line of /etc/passwd or /etc/group that has that name or that number: its number, and
 * the one behind it, where that is asked for.
 */
static bool look_up(const char *path, const char *name, unsigned long *id, unsigned long *group)
{
	char *text = read_text(path), *next = text, *line, *field[FIELDS];
	bool found = false;

	while (!found && (line = next)) {
		next = strchr(line, '\n');
		if (next)
			*next++ = '\0';
		found = split(line, field, group ? FIELDS : FIELDS - 1) &&
			(strcmp(field[0], name) == 0 || strcmp(field[2], name) == 0) &&
			parse_id(field[2], id) && (!group || parse_id(field[USER_GROUP], group));
	}
	free(text);
	return found;
}

bool confine_find_user(const char *name, struct confine_user *user)
{
	unsigned long uid, gid, unused;
	const char *group = strchr(name, ':');
	char *only = group ? strndup(name, (size_t)(group - name)) : strdup(name);
	bool known = only && look_up("/etc/passwd", only, &uid, group ? &unused : &gid);

	if (!known && only && group)
		known = parse_id(only, &uid);
	if (geteuid() != 0)
		log_failure("--user %s: only root can become another user", name);
	else if (!known)
		log_failure("--user %s: there is no such user in /etc/passwd%s", name,
			    group ? "" : "; a number needs a group, as in 1000:1000");
	else if (group && !look_up("/etc/group", group + 1, &gid, NULL) && !parse_id(group + 1, &gid))
		log_failure("--user %s: there is no such group in /etc/group", name);
	else if (uid == 0)
		log_failure("--user %s: that is root, and root is to be given up", name);
	else
		*user = (struct confine_user){ (uid_t)uid, (gid_t)gid };
	free(only);
	return user->uid != 0;
}

bool confine_give_socket(const char *path, const struct confine_user *user)
{
	int err = 0;
#ifdef O_PATH
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

/*
 * The C library's calls would have all threads make them, by a machinery of its own.  There is
 * this thread only, and the kernel's calls are about one.
 */
#if defined(__linux__) && !defined(XNBD_PORTABLE)
#ifndef SYS_setresuid32
#define SYS_setgroups32 SYS_setgroups
#define SYS_setresgid32 SYS_setresgid
#define SYS_setresuid32 SYS_setresuid
#endif

static bool set_groups(gid_t gid)
{
	return syscall(SYS_setgroups32, 1, &gid) == 0 &&
	       syscall(SYS_setresgid32, gid, gid, gid) == 0;
}

static bool set_user(uid_t uid)
{
	return syscall(SYS_setresuid32, uid, uid, uid) == 0;
}
#else
static bool set_groups(gid_t gid)
{
	return setgroups(1, &gid) == 0 && setgid(gid) == 0;
}

static bool set_user(uid_t uid)
{
	return setuid(uid) == 0;
}
#endif

bool confine_become(const struct confine_user *user)
{
	if (!set_groups(user->gid) || !set_user(user->uid)) {
		log_failure("cannot become user %lu: %s", (unsigned long)user->uid,
			    strerror(errno));
		return false;
	}
	if (set_user(0) || getuid() != user->uid || geteuid() != user->uid ||
	    getgid() != user->gid || getegid() != user->gid) {
		log_failure("cannot become user %lu for good", (unsigned long)user->uid);
		return false;
	}
	return true;
}

/* The reach */

void confine_no_new_privileges(void)
{
#ifdef __linux__
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
#endif
}

#if defined(__linux__) && !defined(XNBD_PORTABLE)
/* From here on all machines but two have the same numbers. */
#if !defined(SYS_landlock_create_ruleset) && !defined(__alpha__) && !defined(__mips__)
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif
#endif

#ifdef SYS_landlock_create_ruleset

/* What a compiler has put into the program opens files of its own, at the end for instance. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define INSTRUMENTED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(XNBD_COVERAGE)
#define INSTRUMENTED
#endif

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

/* How many rights on files each version of the interface knows. */
static const uint8_t known_rights[] = { 13, 14, 15, 15, 16 };

void confine_begin(struct confine *c, unsigned forbidden)
{
	long version = syscall(SYS_landlock_create_ruleset, NULL, 0, CREATE_VERSION);
	struct ruleset set = { 0 };
	size_t i;

	*c = (struct confine){ .fd = -1 };
	if (version < 1)
		return;
	i = version < (long)ARRAY_SIZE(known_rights) ? (size_t)version - 1 :
						       ARRAY_SIZE(known_rights) - 1;
	set.files = c->rights = (1u << known_rights[i]) - 1;
	if (version >= 4)
		set.net = NET_BIND | (forbidden & CONFINE_NO_CONNECT ? NET_CONNECT : 0);
	if (version >= 6)
		set.scoped = SCOPE_SIGNAL | (forbidden & CONFINE_NO_ABSTRACT ? SCOPE_ABSTRACT : 0);
	c->fd = (int)syscall(SYS_landlock_create_ruleset, &set, sizeof(set), 0);
	if (c->fd < 0)
		c->error = -errno;
#ifdef INSTRUMENTED
	confine_keep(c, "/", ~0u);
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
	if (rule.fd < 0 || syscall(SYS_landlock_add_rule, c->fd, RULE_PATH_BENEATH, &rule, 0) < 0)
		c->error = -errno;
	if (rule.fd >= 0)
		close(rule.fd);
}

bool confine_enter(struct confine *c)
{
	if (c->fd >= 0 && !c->error && syscall(SYS_landlock_restrict_self, c->fd, 0) < 0)
		c->error = -errno;
	if (c->fd >= 0)
		close(c->fd);
	if (c->error)
		log_failure("cannot confine the server: %s (--no-sandbox starts it without)",
			    strerror(-c->error));
	return c->error == 0;
}

#else

void confine_begin(struct confine *c, unsigned forbidden)
{
	(void)forbidden;
	c->fd = -1;
}

void confine_keep(struct confine *c, const char *path, unsigned rights)
{
	(void)c;
	(void)path;
	(void)rights;
}

bool confine_enter(struct confine *c)
{
	(void)c;
	return true;
}

#endif

void confine_keep_beside(struct confine *c, const char *path, unsigned rights)
{
	char *dir = path && c->fd >= 0 ? directory_of(path) : NULL;

	if (dir)
		confine_keep(c, dir, rights);
	else if (path && c->fd >= 0)
		c->error = -ENOMEM;
	free(dir);
}
