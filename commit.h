/*
 * commit.h - make durable, once for all who wait.
 */
#ifndef XNBD_COMMIT_H
#define XNBD_COMMIT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "xnbd.h"

struct committer {
	/*
	 * Make durable all that was done before: 0 or -errno.  *lost is set if it never will be.
	 * On a worker, one at a time.
	 */
	int (*commit)(struct committer *, bool *lost);
	const char *what;		/* for the log */
	const char *consequence;	/* likewise, of a loss */

	atomic_bool lost;		/* committer_lost() */
	bool told;			/* the log was, of an error of the moment; for who commits */
	pthread_mutex_t lock;		/* guards what follows; a leaf */
	struct request *waiting;
	bool wanted;			/* a commit is, also if nobody waits */
	bool running;			/* job is with a worker */
	struct job job;

	atomic_bool soon;		/* timer is with the workers */
	struct job timer;
};

void committer_init(struct committer *c, int (*commit)(struct committer *, bool *lost),
		    const char *what, const char *consequence);
void committer_destroy(struct committer *c);

/* A backend's flush operation: r is done when a commit that begins after this call has ended. */
int committer_flush(struct committer *c, struct request *r);

/* Something has to be committed, within about a second.  Any thread; cheap. */
void committer_soon(struct committer *c);

/* Commit for the last time, on this thread; no request may be waiting.  0 or -errno. */
int committer_finish(struct committer *c);

/* Stable storage has failed: the log is told, once.  Any thread. */
void committer_lost(struct committer *c, int err);

/* Whether any commit has found that something never will be durable.  Any thread. */
bool commit_has_lost(void);

#endif
