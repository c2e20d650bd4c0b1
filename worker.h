/*
 * worker.h - a few threads for disk calls that would block.
 */
#ifndef XNBD_WORKER_H
#define XNBD_WORKER_H

#include <stdbool.h>
#include <stdint.h>

struct job_list {
	struct job *first, **last;	/* last: where the next one goes, if there is a first */
};

/*
 * Jobs that may wait for the same disk.  Only so many of a lane are run at a time, so that a disk
 * that does not answer leaves threads to the others.  All zero but for the first; the rest is the
 * pool's.  It must last until worker_stop().
 */
struct lane {
	bool single;			/* one job at a time */
	unsigned active;		/* jobs that a thread runs, or takes next */
	struct job_list waiting;	/* those that have to wait for these */
};

/* Something to run.  It lies inside what it works on; the pool only links it. */
struct job {
	struct job *next;
	struct lane *lane;
	void (*run)(struct job *);
	uint64_t due;			/* now_ms(), if it was submitted for later */
};

/*
 * Start the first thread; jobs for later wait for that.  Further ones come when they are needed,
 * and can be had.  Main thread, once.  0 or -errno.
 */
int worker_begin(void);

/*
 * Run the job on a worker, soon, in order of the lane.  Any thread; it does not block.  Jobs that
 * belong to no export have the lane NULL.
 */
void worker_submit(struct job *job, struct lane *lane);

/* Take back a job that no thread has begun with.  False if that is too late, or it is none. */
bool worker_take_back(struct job *job);

/* Submit it when a second has passed, or when the pool stops; never after that. */
void worker_submit_later(struct job *job, struct lane *lane);

/* Whether a thread runs a job, or will at once. */
bool worker_is_busy(void);

/* Finish all jobs and end the threads.  No job may be submitted from outside any more. */
void worker_stop(void);

#endif
