/*
 * exports.c - what is served: see exports.h.
 *
 * Each export has snapshots of its own, one at a time, each in these steps:
 *
 *	wanted		by a signal, for instance, which may come during the one before
 *	begun		a thread takes its instant, and copies
 *	over		it is freed, and the next one may begin
 */
#include "exports.h"

#include "cache.h"
#include "clients.h"
#include "disk.h"
#include "log.h"
#include "origin.h"
#include "snapshot.h"
#include "target.h"
#include "util.h"

#include <stdlib.h>
#include <string.h>

struct exports exports;

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
	for (size_t i = 0; i < exports.count; i++)
		if (disk_is_same(d, exports.all[i].disk))
			return log_failure("cannot export image %s twice, also as %s: both could be "
					   "written to (--readonly may help)", image,
					   exports.all[i].path);
	return true;
}

static struct backend *open_target(const struct options *o, struct exported *e, const char *image)
{
	if (o->create && !disk_create(image, o->create_size))
		return NULL;
	e->disk = disk_open(image, o->readonly, true);
	if (!e->disk)
		return NULL;
	if (o->readonly || is_alone(e->disk, image))
		return target_open(e->disk, o->readonly);
	disk_close(e->disk);
	return NULL;
}

static struct backend *open_proxy(const struct options *o, struct exported *e)
{
	struct origin *origin = origin_open(o->host, o->port, o->export_name,
					    (unsigned)o->origin_connections,
					    (unsigned)o->origin_timeout * 1000);

	if (!origin)
		return NULL;
	exports.cache = cache_open(o->export->path, o->bitmap, o->clear_bitmap, o->readonly, origin);
	if (!exports.cache) {
		origin_close(origin);
		return NULL;
	}
	e->disk = exports.cache->layer.disk;
	return &exports.cache->layer.backend;
}

static struct backend *open_backend(const struct options *o, struct exported *e, const char *image)
{
	if (o->mode == MODE_PROXY)
		return open_proxy(o, e);
	if (o->mode == MODE_TARGET)
		return open_target(o, e, image);
	return cow_open(image, o->cow_file, o->cow_dir, o->readonly);
}

/* Open the next export; the table has room for it. */
static bool open_export(const struct options *o)
{
	struct exported *e = &exports.all[exports.count];
	const char *image = o->export[exports.count].path;
	struct backend *backend = open_backend(o, e, image);

	if (!backend)
		return false;
	e->path = not_null(absolute_path(image));
	export_init(&e->export, backend, o->export[exports.count].name, describe_image(image));
	exports.entry[exports.count++] = &e->export.proto;
	return true;
}

/*
 * Log that the image is empty, or has a format of its own, which clients will see.  A worker does
 * it: the start does not wait for a slow disk.
 */
static void look_at_image(struct job *job)
{
	static const struct {
		char format[8], magic[24];
		unsigned off;
	} known[] = {
		{ "qcow2", "QFI\xfb", 0 },
		{ "VMDK", "KDMV", 0 },
		{ "VMDK", "COWD", 0 },
		{ "VMDK", "# Disk DescriptorFile", 0 },
		{ "VDI", "\x7f\x10\xda\xbe", 64 },
	};
	struct exported *e = (struct exported *)((char *)job - offsetof(struct exported, look));
	struct backend *b = e->export.backend;
	uint8_t head[68];

	if (b->size == 0)
		log_line("image %s is empty: a disk of 0 bytes is served", e->path);
	if (b->size < sizeof(head) || b->ops->read(b, head, sizeof(head), 0, WAIT) != 0)
		return;
	for (size_t i = 0; i < ARRAY_SIZE(known); i++)
		if (memcmp(head + known[i].off, known[i].magic, strlen(known[i].magic)) == 0)
			log_line("image %s looks like %s: clients get the file as it is, as a raw "
				 "image", e->path, known[i].format);
}

/* LIST tells of all exports or of none. */
static bool can_be_listed(const struct options *o)
{
	size_t bytes = 0;

	for (unsigned i = 0; i < o->exports; i++)
		bytes += PROTO_LIST_ENTRY + strlen(o->export[i].name) +
			 strlen(describe_image(o->export[i].path));
	return bytes <= PROTO_LIST_ROOM ||
	       log_failure("--export: the names of all exports and their files take %zu bytes, and "
			   "there is room for %d in an answer to LIST", bytes, PROTO_LIST_ROOM);
}

bool exports_open(const struct options *o)
{
	bool ok = true;

	load.room = clients_admit;
	if (o->max_queue_size)
		load.requests_max = o->max_queue_size;
	if (o->max_buf_size)
		load.bytes_max = o->max_buf_size < SIZE_MAX ? (size_t)o->max_buf_size : SIZE_MAX;
	if (!can_be_listed(o))
		return false;
	exports.all = not_null(calloc(o->exports, sizeof(*exports.all)));
	exports.entry = not_null(calloc(o->exports, sizeof(*exports.entry)));
	while (ok && exports.count < o->exports)
		ok = open_export(o);
	exports.proto = (struct proto_exports){
		exports.entry, exports.count, o->exports == 1 && !*o->export->name,
	};
	return ok;
}

bool exports_start(void)
{
	for (struct exported *e = exports.all; e < exports.all + exports.count; e++) {
		e->look.run = look_at_image;
		if (!exports.cache)
			worker_submit(&e->look, &e->export.lane);
	}
	return !exports.cache || origin_start(exports.cache->origin);
}

/* Snapshots */

/* Those of a proxy are of its cache, when that is the whole disk. */
static bool has_snapshots(const struct exported *e)
{
	return e->disk && (!exports.cache || exports.cache->switched);
}

bool exports_snapshot(void)
{
	bool any = false;

	for (size_t i = 0; i < exports.count; i++) {
		exports.all[i].wanted |= has_snapshots(&exports.all[i]);
		any |= exports.all[i].wanted;
	}
	return any;
}

const char *exports_snapshot_of(const char *name, const struct export **e, bool *behind)
{
	struct exported *of = NULL;

	if (!name && exports.count > 1)
		return "there are several exports, and a snapshot needs the name of one";
	for (size_t i = 0; i < exports.count; i++)
		if (!name || strcmp(name, exports.all[i].export.proto.name) == 0)
			of = &exports.all[i];
	if (!of)
		return "there is no export of that name";
	if (!has_snapshots(of))
		return "snapshots are taken in target mode";
	*e = &of->export;
	*behind = of->snapshot != NULL;
	of->wanted = true;
	wake_main();
	return NULL;
}

static void tend_snapshot(struct exported *e, exports_ended *ended)
{
	const char *path, *error;

	if (e->snapshot && snapshot_is_over(e->snapshot)) {
		path = snapshot_path(e->snapshot, &error);
		ended(&e->export, path, error);
		snapshot_free(e->snapshot);
		e->snapshot = NULL;
	}
	if (e->wanted && !e->snapshot) {
		e->wanted = false;
		e->snapshot = snapshot_new(e->disk, e->path, &error);
		if (!e->snapshot)
			ended(&e->export, NULL, error);
	}
}

void exports_tend(exports_ended *ended)
{
	for (size_t i = 0; i < exports.count; i++)
		tend_snapshot(&exports.all[i], ended);
}

/* End */

bool exports_stop(void)
{
	bool busy = false;

	for (struct exported *e = exports.all; e < exports.all + exports.count; e++) {
		if (e->snapshot)
			snapshot_abandon(e->snapshot);
		busy |= e->snapshot && !snapshot_is_over(e->snapshot);
	}
	if (exports.cache)
		cache_stop(exports.cache);
	return busy;
}

bool exports_close(void)
{
	bool ok = true;

	if (exports.cache)
		origin_close(exports.cache->origin);
	for (struct exported *e = exports.all; e < exports.all + exports.count; e++) {
		snapshot_free(e->snapshot);
		ok &= e->export.backend->ops->close(e->export.backend) == 0;
		free(e->path);
	}
	free(exports.all);
	free(exports.entry);
	return ok;
}
