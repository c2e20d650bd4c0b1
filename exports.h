/*
 * exports.h - what is served: the table of exports, each with its image and its snapshots.
 *
 * There is one table.  Main thread only; nothing here blocks on a client.
 */
#ifndef XNBD_EXPORTS_H
#define XNBD_EXPORTS_H

#include <stdbool.h>

#include "backend.h"
#include "options.h"

struct exported {
	struct export export;
	char *path;			/* of the image, from the root: a daemon leaves its place */
	struct job look;		/* at the image, by a worker */
	struct disk *disk;		/* what snapshots are taken of; NULL: there are none */
	struct snapshot *snapshot;	/* that is being made, or NULL */
	bool wanted;			/* another one, when that is over */
};

/* The table, for other rooms to read. */
extern struct exports {
	struct exported *all;
	size_t count;
	const struct proto_export **entry;
	struct proto_exports proto;	/* for the handshake */
	struct cache *cache;		/* of a proxy, the backend of its only export; else NULL */
} exports;

/* Open what the options name.  False after logging why not; exports_close() is due then, too. */
bool exports_open(const struct options *o);

/* Threads may be started.  False after logging why not. */
bool exports_start(void);

/*
 * Make a snapshot of the export of that name; NULL means the only one.  Returns NULL, or why not.
 * *e is set to the export, *behind says that a snapshot of it is being made, and another one will
 * be when that has ended.
 */
const char *exports_snapshot_of(const char *name, const struct export **e, bool *behind);

/*
 * Make a snapshot of each image, or another one when that being made has ended.  False if there
 * is no image of which there are any.
 */
bool exports_snapshot(void);

/* A snapshot has ended: its path, or NULL and the reason, both for the time of the call. */
typedef void exports_ended(const struct export *e, const char *path, const char *error);

/* Go on with snapshots. */
void exports_tend(exports_ended *ended);

/*
 * The server stops: give up snapshots and copies, and let clients in who wait for one.  To be called
 * again while it returns true: a snapshot has not ended yet.
 */
bool exports_stop(void);

/* Close all.  Neither connections nor workers are left.  False if something is not durable. */
bool exports_close(void);

#endif
