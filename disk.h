/*
 * disk.h - backend: a raw image file or a block device.
 */
#ifndef XNBD_DISK_H
#define XNBD_DISK_H

#include "backend.h"

/*
 * Create a sparse image of size bytes at path unless something is there already.  False after
 * logging why it could not.  Durable when it returns.
 */
bool disk_create(const char *path, uint64_t size);

/*
 * Open the image; it stays open until the backend's close operation.  NULL after logging why it
 * could not.
 */
struct backend *disk_open(const char *path, bool readonly);

#endif
