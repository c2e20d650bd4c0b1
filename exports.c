/*
 * exports.c - what is served: see exports.h.
 *
 * Each export has snapshots of its own, one at a time, each in these steps:
 *
 *	wanted		by a signal, for instance, which may come during the one before
 *	waiting		prepared; the gate is closed, and those inside finish
 *	taken		its instant is past: the gate is open again, and a thread copies
 *	over		the gate is closed once more, to take it off the disk
 */
#include "exports.h"

#include "cache.h"
#include "disk.h"
#include "log.h"
#include "loop.h"
#include "origin.h"
#include "snapshot.h"
#include "target.h"
#include "util.h"

#include <stdlib.h>
#include <string.h>

static struct {
	struct exported *all;
	size_t count;
	const struct proto_export **entry;
	struct proto_exports proto;
	struct backend *cache;		/* of a proxy; else NULL */
	void (*snapshot_ended)(const struct export *e, const char *path, const char *error);
} table;

/* Opening */

/* What clients may see of the image's path; a file name may have bytes that NBD does not allow. */
static const char *describe_image(const char *path)
{
	const char *name = base_name(path);

	return proto_is_string(name) ? name : "";
}

/* Two disks on one image would know nothing of each other's flushes and snapshots. */
static bool is_alone(const struct disk *d, const char *image)
{
	for (size_t i = 0; i < table.count; i++) {
		const struct exported *other = &table.all[i];

		if (!disk_is_same(d, other->disk))
			continue;
		log_failure("cannot export image %s twice, also as %s: both could be written to "
			    "(--readonly may help)", image, other->path);
		return false;
	}
	return true;
}

static struct backend *open_target(const struct options *o, struct exported *e, const char *image)
{
	if (o->create && !disk_create(image, o->create_size))
		return NULL;
	e->disk = disk_open(image, o->readonly, true);
	if (!e->disk)
		return NULL;
	disk_look(e->disk, image);
	if (o->readonly || is_alone(e->disk, image))
		return target_open(e->disk, o->readonly);
	disk_close(e->disk);
	return NULL;
}

static struct backend *open_cow_target(const struct options *o, const char *image)
{
	const struct cow_options cow = { image, o->cow_dir, o->cow_file, o->readonly };

	return cow_open(&cow);
}

static struct backend *open_proxy(const struct options *o)
{
	const struct cache_options cache = { o->image, o->bitmap, o->clear_bitmap, o->readonly,
					     wake_main };
	const struct origin_options remote = {
		.host = o->host,
		.port = o->port,
		.export_name = o->export_name,
		.connections = (unsigned)o->origin_connections,
		.timeout_ms = (unsigned)o->origin_timeout * 1000,
	};
	struct origin *origin = origin_open(&remote);

	table.cache = origin ? cache_open(&cache, origin) : NULL;
	return table.cache;
}

static struct backend *open_backend(const struct options *o, struct exported *e, const char *image)
{
	switch (o->mode) {
	case MODE_COW_TARGET:
		return open_cow_target(o, image);
	case MODE_PROXY:
		return open_proxy(o);
	default:
		return open_target(o, e, image);
	}
}

/* Add an export to the table, which has room for it. */
static bool add(const struct options *o, const char *name, const char *image)
{
	struct exported *e = &table.all[table.count];
	struct backend *backend;

	e->path = absolute_path(image);
	if (!e->path) {
		log_failure("cannot start: out of memory");
		return false;
	}
	backend = open_backend(o, e, image);
	if (!backend) {
		free(e->path);
		return false;
	}
	export_init(&e->export, backend, name, describe_image(image), wake_main,
		    loops_wake);
	table.entry[table.count++] = &e->export.proto;
	return true;
}

/* LIST tells of all exports or of none. */
static bool can_be_listed(const struct options *o)
{
	size_t bytes = o->image ? PROTO_LIST_ENTRY + strlen(describe_image(o->image)) : 0;

	for (unsigned i = 0; i < o->exports; i++)
		bytes += PROTO_LIST_ENTRY + strlen(o->export[i].name) +
			 strlen(describe_image(o->export[i].path));
	if (bytes <= PROTO_LIST_ROOM)
		return true;
	log_failure("--export: the names of all exports and their files take %zu bytes, and there "
		    "is room for %d in an answer to LIST", bytes, PROTO_LIST_ROOM);
	return false;
}

static void bound_load(const struct options *o)
{
	load.room = loops_wake;
	if (o->max_queue_size)
		load.requests_max = o->max_queue_size;
	if (o->max_buf_size)
		load.bytes_max = o->max_buf_size < SIZE_MAX ? (size_t)o->max_buf_size : SIZE_MAX;
}

bool exports_open(const struct options *o)
{
	size_t count = o->exports + (o->image != NULL);
	bool ok;

	bound_load(o);
	if (o->exports > 0 && !can_be_listed(o))
		return false;
	table.all = calloc(count, sizeof(*table.all));
	table.entry = calloc(count, sizeof(*table.entry));
	if (!table.all || !table.entry) {
		log_failure("cannot start: out of memory");
		return false;
	}
	ok = !o->image || add(o, "", o->image);
	for (unsigned i = 0; ok && i < o->exports; i++)
		ok = add(o, o->export[i].name, o->export[i].path);
	table.proto = (struct proto_exports){ table.entry, table.count, o->exports == 0 };
	return ok;
}

const struct proto_exports *exports_table(void)
{
	return &table.proto;
}

struct backend *exports_cache(void)
{
	return table.cache;
}

bool exports_start(void)
{
	struct origin_status status;

	if (!table.cache)
		return true;
	origin_status(cache_origin(table.cache), &status);
	log_line("origin %s: connected, %llu bytes", status.address,
		 (unsigned long long)table.cache->size);
	return origin_start(cache_origin(table.cache));
}

void exports_have_disk(void)
{
	table.all[0].disk = cache_disk(table.cache);
}

/* Snapshots */

const char *exports_snapshots_beside(size_t i)
{
	const struct exported *e = &table.all[i];
	const struct disk *d = !e->disk && table.cache ? cache_disk(table.cache) : e->disk;

	return d && d->is_file ? e->path : NULL;
}

bool exports_snapshot(void)
{
	bool any = false;

	for (size_t i = 0; i < table.count; i++) {
		table.all[i].wanted = table.all[i].disk;
		any |= table.all[i].wanted;
	}
	return any;
}

const struct exported *exports_at(size_t i)
{
	return &table.all[i];
}

const char *exports_snapshot_of(const char *name, const struct export **e, bool *behind)
{
	struct exported *of = NULL;

	if (!name && table.count > 1)
		return "there are several exports, and a snapshot needs the name of one";
	for (size_t i = 0; i < table.count; i++)
		if (!name || strcmp(name, table.all[i].export.proto.name) == 0)
			of = &table.all[i];
	if (!of)
		return "there is no export of that name";
	if (!of->disk)
		return "snapshots are taken in target mode";
	*e = &of->export;
	*behind = of->snapshot && of->taken;
	of->wanted = true;
	wake_main();
	return NULL;
}

void exports_on_snapshot(void (*ended)(const struct export *e, const char *path,
				       const char *error))
{
	table.snapshot_ended = ended;
}

static void begin_snapshot(struct exported *e)
{
	const char *error;

	e->wanted = e->taken = false;
	e->snapshot = snapshot_new(e->disk, e->path, &error);
	if (!e->snapshot)
		table.snapshot_ended(&e->export, NULL, error);
}

/* The instant that the snapshot shows: nobody reads or writes. */
static void take_snapshot(struct exported *e)
{
	if (!gate_close(&e->export.gate))
		return;		/* called again when it is empty */
	snapshot_take(e->snapshot);
	e->taken = true;
	gate_open(&e->export.gate);
	snapshot_start(e->snapshot);
}

static void end_snapshot(struct exported *e)
{
	const char *error, *path;

	if (!gate_close(&e->export.gate))
		return;
	path = snapshot_path(e->snapshot, &error);
	table.snapshot_ended(&e->export, path, error);
	snapshot_free(e->snapshot);
	e->snapshot = NULL;
	gate_open(&e->export.gate);
}

/* Whether a snapshot's thread is at work. */
static bool is_copying(const struct exported *e)
{
	return e->snapshot && e->taken && !snapshot_is_over(e->snapshot);
}

static void tend_snapshot(struct exported *e)
{
	if (e->snapshot && e->taken && snapshot_is_over(e->snapshot))
		end_snapshot(e);
	if (e->wanted && !e->snapshot)
		begin_snapshot(e);
	if (e->snapshot && !e->taken)
		take_snapshot(e);
}

void exports_tend(void)
{
	for (size_t i = 0; i < table.count; i++)
		tend_snapshot(&table.all[i]);
}

/* End */

void exports_stop(void)
{
	for (size_t i = 0; i < table.count; i++) {
		struct exported *e = &table.all[i];

		if (e->snapshot)
			snapshot_abandon(e->snapshot);
		gate_open(&e->export.gate);	/* nobody waits for it any more */
	}
	if (table.cache)
		cache_stop(table.cache);
}

void exports_give_up(void)
{
	if (table.cache)
		origin_cancel(cache_origin(table.cache));
}

void exports_end(void)
{
	if (table.cache)
		origin_end(cache_origin(table.cache));
}

bool exports_are_busy(void)
{
	for (size_t i = 0; i < table.count; i++)
		if (is_copying(&table.all[i]))
			return true;
	return false;
}

bool exports_close(void)
{
	bool ok = true;

	for (size_t i = 0; i < table.count; i++) {
		struct exported *e = &table.all[i];

		snapshot_free(e->snapshot);
		ok &= e->export.backend->ops->close(e->export.backend) == 0;
		free(e->path);
	}
	free(table.all);
	free(table.entry);
	return ok;
}
