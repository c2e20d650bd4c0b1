/*
 * control.h - what the control socket tells: answers in lines of text, and the server's state.
 *
 * Main thread only; nothing here blocks.
 */
#ifndef XNBD_CONTROL_H
#define XNBD_CONTROL_H

#include <stdbool.h>
#include <stddef.h>

#include "util.h"

/* Lines of text; all zeros has none.  The owner frees the text. */
struct answer {
	char *text;
	size_t len;
	bool failed;			/* out of memory: there is no answer */

	/* While control_query() appends to it: */
	bool json;			/* the lines are those of an object, "json: TEXT" */
	bool item;			/* the fields are those of an item of a list */
};

/* Append "name: value".  Control characters in the value become question marks. */
void control_say(struct answer *a, const char *name, const char *fmt, ...) PRINTF_LIKE(3, 4);

/* Append text as it is. */
void control_put(struct answer *a, const char *fmt, ...) PRINTF_LIKE(2, 3);

/* What is to be served is open; the path of a proxy's bitmap, or NULL. */
void control_init(const char *bitmap);

/* Append the state, in lines or as one JSON object. */
void control_query(struct answer *a, bool json);

/*
 * Of a proxy: append how the copy is going; *runs is whether it goes on.  If not, append the parts
 * that failed: NULL, or why blocks are missing.
 */
const char *control_say_progress(struct answer *a, bool *runs);

/* The state tells of the last snapshot: its path, or NULL and why there is none. */
void control_note_snapshot(const char *path, const char *error);

#endif
