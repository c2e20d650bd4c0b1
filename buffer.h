/*
 * buffer.h - memory for data on its way, used again while it is warm.
 *
 * A fresh page costs more than to copy its contents, and large buffers come from fresh pages.
 */
#ifndef XNBD_BUFFER_H
#define XNBD_BUFFER_H

#include <stddef.h>

/* Before there are threads. */
void buffer_init(void);

/* Memory for len bytes, or NULL.  Any thread. */
void *buffer_get(size_t len);

/* Give back what buffer_get(len) returned; NULL is allowed.  Any thread. */
void buffer_put(void *buffer, size_t len);

/* Free what is kept and not in use. */
void buffer_trim(void);

#endif
