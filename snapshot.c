/*
 * snapshot.c - a copy of an image as it was at one instant: see snapshot.h.
 *
 * Where the file system can share blocks (reflink), that is all.  Elsewhere a thread copies the
 * image from its beginning to its end, and a client's change to a block that is not copied yet
 * copies it first.  A block is copied when it lies before the position of the thread, or has
 * its bit set.  Whoever copies a block is alone with it (order.h), so that it does not change in
 * the middle.
 *
 * The file has no name, or a temporary one where that is not possible, until it is complete and
 * durable: fsync(), link(), fsync() of the directory.  A crash before the link leaves nothing, or a
 * temporary file; after it, before the directory is durable, all of the snapshot or nothing.
 */
#define _GNU_SOURCE
#include "snapshot.h"

#include "bitmap.h"
#include "disk.h"
#include "log.h"
#include "order.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
	CHUNK = 512 * 1024,		/* held at a time by the thread: a client may wait for it */
	PIECE = 64 * 1024,		/* read and written at a time by clients' workers */
	PROGRESS_MS = 10 * 1000,
	NAME_TRIES = 1000,
	SNAPSHOT_STACK = 128 * 1024,
};

struct snapshot {
	struct disk_hook hook;		/* the first: before_change() relies on it */
	struct disk *disk;
	uint64_t size;
	int fd;
	char *name;			/* without a suffix */
	char *temporary;		/* NULL if the file has no name */
	char *path;			/* its name, when it has one */
	void (*ended)(void);
	uint64_t started;		/* now_ms() */

	bool cloned;			/* nothing is to be copied */
	bool attached;			/* the disk calls the hook */
	pthread_t thread;
	bool has_thread;
	struct bitmap *copied;		/* by clients, ahead of the thread */
	atomic_uint_least64_t position;	/* all before it is copied */
	atomic_uint_least64_t bytes;	/* that were copied, for the log */
	atomic_int error;		/* -errno of the first failure: it has failed then */
	atomic_bool over;
};

/* Copying */

/* Copy a range that is data, through buf of room bytes. */
static int copy_data(struct snapshot *s, uint64_t len, uint64_t off, uint8_t *buf, uint64_t room)
{
	int err = 0;

	atomic_fetch_add(&s->bytes, len);
	while (len > 0 && !err) {
		uint64_t n = len < room ? len : room;

		err = disk_read(s->disk, buf, n, off, WAIT);
		if (!err)
			err = write_at(s->fd, buf, n, off);
		off += n;
		len -= n;
	}
	return err;
}

/* Copy a range without its holes. */
static int copy_range(struct snapshot *s, uint64_t len, uint64_t off, uint8_t *buf, uint64_t room)
{
	uint64_t end = off + len;
	int err = 0;

	while (off < end && !err) {
		struct extent e = disk_extent(s->disk, off, end);

		if (!(e.flags & NBD_STATE_ZERO))
			err = copy_data(s, e.len, off, buf, room);
		off += e.len;
	}
	return err;
}

/* Copy those blocks of a range that are not copied; nobody else changes it. */
static int copy_missing(struct snapshot *s, uint64_t len, uint64_t off, uint8_t *buf, uint64_t room)
{
	uint64_t end = off + len, n;
	bool copied;
	int err = 0;

	for (; off < end && !err; off += n) {
		uint64_t blk = off / BLOCK_SIZE;

		n = bitmap_run(s->copied, blk, bitmap_blocks(end) - blk, &copied) * BLOCK_SIZE;
		if (n > end - off)
			n = end - off;
		if (!copied)
			err = copy_range(s, n, off, buf, room);
	}
	return err;
}

static void fail(struct snapshot *s, int err)
{
	int none = 0;

	atomic_compare_exchange_strong(&s->error, &none, err);
}

/* Clients */

/* Whether all of the blocks from off to end are copied. */
static bool is_copied(const struct snapshot *s, uint64_t off, uint64_t end)
{
	uint64_t position = atomic_load(&s->position), blk, blocks;
	bool copied;

	if (off < position)
		off = position;
	if (off >= end)
		return true;
	blk = off / BLOCK_SIZE;
	blocks = bitmap_blocks(end) - blk;
	return bitmap_run(s->copied, blk, blocks, &copied) == blocks && copied;
}

/*
 * Copy ahead of the thread.  What lies before the thread's position has no bit
 * but is copied, and may have changed since.
 */
static void copy_first(struct snapshot *s, uint64_t off, uint64_t end)
{
	uint64_t position = atomic_load(&s->position);
	uint8_t *buf = malloc(PIECE);
	int err;

	if (off < position)
		off = position;
	err = buf ? copy_missing(s, end - off, off, buf, PIECE) : -ENOMEM;
	if (err)
		fail(s, err);
	else
		bitmap_set(s->copied, off / BLOCK_SIZE, bitmap_blocks(end) - off / BLOCK_SIZE, true);
	free(buf);
}

/* A range of the disk is about to change.  That the copy fails harms the snapshot only. */
static int before_change(struct disk_hook *hook, uint64_t len, uint64_t off, enum how how)
{
	struct snapshot *s = (struct snapshot *)hook;
	uint64_t end = bitmap_blocks(off + len) * BLOCK_SIZE;

	off -= off % BLOCK_SIZE;
	if (end > s->size)
		end = s->size;
	if (atomic_load(&s->error) || is_copied(s, off, end))
		return 0;
	if (how == TRY)
		return -EAGAIN;
	copy_first(s, off, end);
	return 0;
}

/* The thread */

/* How much to hold and copy at position off: a hole as a whole, data in chunks; whole blocks. */
static uint64_t next_length(const struct snapshot *s, uint64_t off)
{
	struct extent e = disk_extent(s->disk, off, s->size);
	uint64_t len = e.flags & NBD_STATE_ZERO || e.len < CHUNK ? e.len : CHUNK;

	if (off + len < s->size)
		len -= len % BLOCK_SIZE;
	if (len == 0)
		len = BLOCK_SIZE < s->size - off ? BLOCK_SIZE : s->size - off;
	return len;
}

static void log_progress(const struct snapshot *s, uint64_t *next)
{
	uint64_t position = atomic_load(&s->position);

	if (now_ms() < *next)
		return;
	*next += PROGRESS_MS;
	log_line("snapshot %s: %llu of %llu MiB", s->name, (unsigned long long)position >> 20,
		 (unsigned long long)s->size >> 20);
}

static void copy_image(struct snapshot *s)
{
	uint8_t *buf = malloc(CHUNK);
	uint64_t off = 0, log_at = s->started + PROGRESS_MS;

	if (!buf)
		fail(s, -ENOMEM);
	while (off < s->size && !atomic_load(&s->error)) {
		uint64_t len = next_length(s, off);
		struct change hold;
		int err;

		order_hold(disk_order(s->disk), &hold, len, off, true);
		err = copy_missing(s, len, off, buf, CHUNK);
		if (err)
			fail(s, err);
		else
			atomic_store(&s->position, off + len);
		order_remove(&hold);
		off += len;
		log_progress(s, &log_at);
	}
	free(buf);
}

static int link_as(const struct snapshot *s, const char *name)
{
	char path[64];
	int ret;

	if (s->temporary) {
		ret = link(s->temporary, name);
	} else {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", s->fd);
		ret = linkat(AT_FDCWD, path, AT_FDCWD, name, AT_SYMLINK_FOLLOW);
	}
	return ret < 0 ? -errno : 0;
}

/* Give the file its name, which the log is told. */
static int publish(struct snapshot *s)
{
	size_t room = strlen(s->name) + 16;
	int err = -EEXIST;
	uint64_t tenths;

	s->path = malloc(room);
	if (!s->path)
		return -ENOMEM;
	for (int i = 0; err == -EEXIST && i < NAME_TRIES; i++) {
		snprintf(s->path, room, i ? "%s.%d" : "%s", s->name, i);
		err = link_as(s, s->path);
	}
	if (!err) {
		err = sync_directory_of(s->path);
		if (err)
			unlink(s->path);	/* or it would be there and, after a power cut, not */
	}
	tenths = (now_ms() - s->started + 50) / 100;
	if (!err)
		log_line("snapshot %s: complete: %llu MiB %s in %llu.%u s", s->path,
			 (unsigned long long)(s->cloned ? s->size : atomic_load(&s->bytes)) >> 20,
			 s->cloned ? "cloned" : "copied", (unsigned long long)tenths / 10,
			 (unsigned)(tenths % 10));
	return err;
}

static const char *explain(int err)
{
	if (err == -ENODEV)
		return "it is a device, and there is no room beside it";
	return err == -ECANCELED ? "the server stops" : strerror(-err);
}

/* Durable first, then visible.  What the image itself has lost is in no copy of it. */
static void complete(struct snapshot *s)
{
	int err = atomic_load(&s->error);

	if (!err && fsync(s->fd) < 0)
		err = -errno;
	if (!err)
		err = disk_check(s->disk);
	if (!err)
		err = atomic_load(&s->error);	/* a client's copy may have failed at last */
	if (!err)
		err = publish(s);
	if (!err)
		return;
	fail(s, err);
	log_error("snapshot %s: failed: %s", s->name, explain(atomic_load(&s->error)));
}

static void *snapshot_main(void *arg)
{
	struct snapshot *s = arg;

	if (!s->cloned)
		copy_image(s);
	complete(s);
	atomic_store(&s->over, true);
	s->ended();
	return NULL;
}

/* From the beginning to the end */

/* A file without a name if that can be given one later, else one with a temporary name. */
static int open_file(struct snapshot *s)
{
	char *dir = directory_of(s->name);
	size_t room = dir ? strlen(dir) + 32 : 0;

	if (!dir)
		return -ENOMEM;
	s->fd = -1;
#if defined(O_TMPFILE) && !defined(XNBD_PORTABLE)
	if (access("/proc/self/fd", X_OK) == 0)
		s->fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
#endif
	if (s->fd < 0) {
		s->temporary = malloc(room);
		if (s->temporary) {
			snprintf(s->temporary, room, "%s/.xnbd-snapshot-XXXXXX", dir);
			s->fd = mkostemp(s->temporary, O_CLOEXEC);
		}
	}
	free(dir);
	if (s->fd < 0)
		return -errno;
	return ftruncate(s->fd, (off_t)s->size) < 0 ? -errno : 0;
}

struct snapshot *snapshot_new(struct disk *d, const char *image, void (*ended)(void),
			      const char **why)
{
	struct snapshot *s = calloc(1, sizeof(*s));
	size_t room = strlen(image) + 64;
	int err = -ENOMEM;

	if (!s)
		goto fail;
	s->fd = -1;
	s->disk = d;
	s->size = disk_size(d);
	s->ended = ended;
	s->started = now_ms();
	s->copied = bitmap_new(bitmap_blocks(s->size));
	s->name = malloc(room);
	if (!s->copied || !s->name)
		goto fail;
	snprintf(s->name, room, "%s.snapshot.%lld", image, (long long)time(NULL));
	err = disk_is_file(d) ? disk_error(d) : -ENODEV;
	if (!err)
		err = open_file(s);
	if (!err)
		return s;
fail:
	*why = explain(err);
	log_error("snapshot of %s: failed: %s", image, *why);
	snapshot_free(s);
	return NULL;
}

void snapshot_take(struct snapshot *s)
{
	int err = disk_clone(s->disk, s->fd);

	s->cloned = err != -EOPNOTSUPP;
	if (!err && ftruncate(s->fd, (off_t)s->size) < 0)	/* the image may be larger than the disk */
		err = -errno;
	if (s->cloned && err) {
		fail(s, err);
	} else if (!s->cloned) {
		s->hook.before_change = before_change;
		disk_set_hook(s->disk, &s->hook);
		s->attached = true;
	}
	log_line("snapshot %s: started", s->name);
}

void snapshot_start(struct snapshot *s)
{
	int err = thread_start(&s->thread, SNAPSHOT_STACK, snapshot_main, s);

	s->has_thread = err == 0;
	if (err) {
		log_error("snapshot %s: failed: %s", s->name, strerror(err));
		fail(s, -err);
		atomic_store(&s->over, true);
		s->ended();
	}
}

bool snapshot_is_over(const struct snapshot *s)
{
	return atomic_load(&s->over);
}

const char *snapshot_path(const struct snapshot *s, const char **why)
{
	int err = atomic_load(&s->error);

	*why = err ? explain(err) : NULL;
	return err ? NULL : s->path;
}

void snapshot_abandon(struct snapshot *s)
{
	fail(s, -ECANCELED);
}

void snapshot_free(struct snapshot *s)
{
	if (!s)
		return;
	if (s->has_thread)
		pthread_join(s->thread, NULL);
	if (s->attached)
		disk_set_hook(s->disk, NULL);
	if (s->temporary && s->fd >= 0 && unlink(s->temporary) < 0)
		log_error("snapshot %s: cannot remove %s: %s", s->name, s->temporary,
			  strerror(errno));
	if (s->fd >= 0)
		close(s->fd);
	bitmap_close(s->copied);
	free(s->temporary);
	free(s->path);
	free(s->name);
	free(s);
}
