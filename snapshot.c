/*
 * snapshot.c - a copy of an image as it was at one instant: see snapshot.h.
 *
 * A thread makes it.  At its instant the thread is alone with all blocks (order.h): changes that are
 * under way end before it, and others begin after it.  Where the file system can share blocks
 * (reflink), that is all.  Elsewhere the thread copies the image from its beginning to its end, and
 * a client's change to a block that is not copied yet copies it first.  A bit tells that a block is
 * copied.  The thread is alone with the blocks that it copies, so that none changes in the middle.
 * It passes holes without setting bits: a client's change finds them as they are, or has set them.
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
	PROGRESS_MS = 10 * 1000,
	NAME_TRIES = 1000,
	SNAPSHOT_STACK = 128 * 1024,
};

struct snapshot {
	struct disk_hook hook;		/* the first: before_change() relies on it */
	struct disk *disk;
	uint64_t size;
	int fd;
	char name[DISK_NAME_MAX];	/* without a suffix */
	char path[DISK_NAME_MAX + 16];	/* its name, when it has one */
	char temporary[DISK_NAME_MAX];	/* "" if the file has no name */
	uint64_t started;		/* now_ms() */

	bool cloned;			/* nothing is to be copied */
	pthread_t thread;
	bool has_thread;
	struct bitmap *copied;		/* a bit for each block */
	atomic_uint_least64_t bytes;	/* that were copied, for the log */
	atomic_int error;		/* -errno: it has failed, or will */
	atomic_bool over;
};

/* Copying */

/* Copy from off to end, or to the end of the disk, without holes, through buf of CHUNK bytes. */
static int copy_range(struct snapshot *s, uint64_t off, uint64_t end, uint8_t *buf)
{
	struct extent e;
	int err = 0;

	if (end > s->size)
		end = s->size;
	for (; off < end && !err; off += e.len) {
		e = disk_extent(s->disk, off, end);
		if (e.flags & NBD_STATE_ZERO)
			continue;
		if (e.len > CHUNK)
			e.len = CHUNK;
		err = disk_read(s->disk, buf, e.len, off, WAIT);
		if (!err)
			err = write_at(s->fd, buf, e.len, off);
		atomic_fetch_add(&s->bytes, e.len);
	}
	return err;
}

/* Copy those of some blocks that are not copied; nobody else changes them.  buf may be NULL. */
static void copy_blocks(struct snapshot *s, uint64_t blk, uint64_t end, uint8_t *buf)
{
	int err = buf ? 0 : -ENOMEM;
	bool copied;

	for (uint64_t at = blk, n; at < end && !err; at += n) {
		n = bitmap_run(s->copied, at, end - at, &copied);
		if (!copied)
			err = copy_range(s, at * BLOCK_SIZE, (at + n) * BLOCK_SIZE, buf);
	}
	if (err)
		atomic_store(&s->error, err);
	else
		bitmap_set(s->copied, blk, end - blk, true);
}

/* A range of the disk is about to change.  That the copy fails harms the snapshot only. */
static int copy_before_change(struct disk_hook *hook, uint64_t len, uint64_t off, enum how how)
{
	struct snapshot *s = (struct snapshot *)hook;
	uint64_t blk = off / BLOCK_SIZE, end = bitmap_blocks(off + len);
	uint8_t *buf;
	bool copied;

	if (atomic_load(&s->error) ||
	    (bitmap_run(s->copied, blk, end - blk, &copied) == end - blk && copied))
		return 0;
	if (how == TRY)
		return -EAGAIN;
	buf = malloc(CHUNK);
	copy_blocks(s, blk, end, buf);
	free(buf);
	return 0;
}

/* The thread */

/* Copy the whole blocks that a chunk of data touches; returns where they end. */
static uint64_t copy_chunk(struct snapshot *s, uint64_t len, uint64_t off, uint8_t *buf)
{
	uint64_t blk = off / BLOCK_SIZE, end = bitmap_blocks(off + (len < CHUNK ? len : CHUNK));
	struct change hold;

	order_hold(&s->disk->order, &hold, (end - blk) * BLOCK_SIZE, blk * BLOCK_SIZE, true);
	copy_blocks(s, blk, end, buf);
	order_remove(&hold);
	return end * BLOCK_SIZE;
}

static void copy_image(struct snapshot *s)
{
	uint8_t *buf = malloc(CHUNK);
	uint64_t off = 0, next = s->started + PROGRESS_MS;

	while (off < s->size && !atomic_load(&s->error)) {
		struct extent e = disk_extent(s->disk, off, s->size);

		off = e.flags & NBD_STATE_ZERO ? off + e.len : copy_chunk(s, e.len, off, buf);
		if (now_ms() < next)
			continue;
		next += PROGRESS_MS;
		log_line("snapshot %s: %llu of %llu MiB", s->name, (unsigned long long)off >> 20,
			 (unsigned long long)s->size >> 20);
	}
	free(buf);
}

static int link_as(const struct snapshot *s, const char *name)
{
	char path[64];
	int ret;

	if (*s->temporary) {
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
	int err = -EEXIST;
	uint64_t tenths;

	for (int i = 0; err == -EEXIST && i < NAME_TRIES; i++) {
		snprintf(s->path, sizeof(s->path), i ? "%s.%d" : "%s", s->name, i);
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
static void finish_snapshot(struct snapshot *s)
{
	int err = atomic_load(&s->error);

	if (!err && fsync(s->fd) < 0)
		err = -errno;
	if (!err)
		err = disk_check(s->disk);
	if (!err)
		err = atomic_load(&s->error);	/* it may have been given up */
	if (!err)
		err = publish(s);
	atomic_store(&s->error, err);
	if (err)
		log_error("snapshot %s: failed: %s", s->name, explain(err));
	atomic_store(&s->over, true);
	wake_main();
}

/* The instant: share the blocks, or see to it that each is copied before it changes. */
static void take_instant(struct snapshot *s)
{
	struct change hold;
	int err;

	order_hold(&s->disk->order, &hold, s->size, 0, true);
	err = disk_clone(s->disk, s->fd);
	s->cloned = err != -EOPNOTSUPP;
	if (!s->cloned)
		s->disk->hook = &s->hook;
	order_remove(&hold);
	log_line("snapshot %s: started", s->name);
	if (!err && ftruncate(s->fd, (off_t)s->size) < 0)	/* the image may be larger than the disk */
		err = -errno;
	if (s->cloned && err)
		atomic_store(&s->error, err);
}

/* Changes copy no more from then on. */
static void take_hook_off(struct snapshot *s)
{
	struct change hold;

	order_hold(&s->disk->order, &hold, s->size, 0, true);
	s->disk->hook = NULL;
	order_remove(&hold);
}

static void *snapshot_main(void *arg)
{
	struct snapshot *s = arg;

	take_instant(s);
	if (!s->cloned) {
		copy_image(s);
		take_hook_off(s);
	}
	finish_snapshot(s);
	return NULL;
}

/* From the beginning to the end */

/* Make the file, which has no name if it can be given one later. */
static int make_file(struct snapshot *s)
{
	char *dir = directory_of(s->name);

	if (!dir)
		return -ENOMEM;
	s->fd = disk_make_file(dir, ".xnbd-snapshot-", s->temporary);
	free(dir);
	return s->fd < 0 || ftruncate(s->fd, (off_t)s->size) < 0 ? -errno : 0;
}

struct snapshot *snapshot_new(struct disk *d, const char *image, const char **why)
{
	struct snapshot *s = calloc(1, sizeof(*s));
	int err = -ENOMEM;

	if (!s)
		goto fail;
	s->fd = -1;
	s->hook.before_change = copy_before_change;
	s->disk = d;
	s->size = d->size;
	s->started = now_ms();
	s->copied = bitmap_new(bitmap_blocks(s->size));
	if (!s->copied)
		goto fail;
	snprintf(s->name, sizeof(s->name), "%s.snapshot.%lld", image, (long long)time(NULL));
	err = d->is_file ? atomic_load(&d->error) : -ENODEV;
	if (!err)
		err = make_file(s);
	if (!err)
		err = -thread_start(&s->thread, SNAPSHOT_STACK, snapshot_main, s);
	s->has_thread = err == 0;
	if (!err)
		return s;
fail:
	*why = explain(err);
	log_error("snapshot of %s: failed: %s", image, *why);
	snapshot_free(s);
	return NULL;
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
	atomic_store(&s->error, -ECANCELED);
}

void snapshot_free(struct snapshot *s)
{
	if (!s)
		return;
	if (s->has_thread)
		pthread_join(s->thread, NULL);
	if (*s->temporary && unlink(s->temporary) < 0)
		log_error("snapshot %s: cannot remove %s: %s", s->name, s->temporary,
			  strerror(errno));
	if (s->fd >= 0)
		close(s->fd);
	bitmap_close(s->copied);
	free(s);
}
