/*
 * commit.h - make durable, once for all who wait.
 */
#ifndef XNBD_COMMIT_H
#define XNBD_COMMIT_H

#include <pthread.h>
#include <stdbool.h>

#include "xnbd.h"

struct committer {
	/* Make durable all that was done before: 0 or -errno.  On a worker, one at a time. */
	int (*commit)(struct committer *);
	const char *what;		/* for the log */

	int error;			/* of the first that failed: sticky; for who commits */
	pthread_mutex_t lock;		/* guards what follows; a leaf */
	struct request *waiting;
	bool running;			/* job is with a worker */
	struct job job;
};

void committer_init(struct committer *c, int (*commit)(struct committer *), const char *what);
void committer_destroy(struct committer *c);

/* A backend's flush operation: r is done when a commit that begins after this call has ended. */
int committer_flush(struct committer *c, struct request *r);

/* Commit now, on this thread; no request may be waiting.  0 or -errno. */
int committer_run(struct committer *c);

#endif
