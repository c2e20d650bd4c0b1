/*
 * worker.h - a few threads for disk calls that would block.
 */
#ifndef XNBD_WORKER_H
#define XNBD_WORKER_H

#include <stdint.h>

/* Something to run.  It lies inside what it works on; the pool only links it. */
struct job {
	struct job *next;
	void (*run)(struct job *);
	uint64_t due;		/* now_ms() at which it may run, if it was submitted for later */
};

/* Threads may be started from now on; jobs for later wait for that.  Main thread, once. */
void worker_begin(void);

/* Run the job on a worker, soon, in order of submission.  Any thread; does not block. */
void worker_submit(struct job *job);

/* The same, when ms milliseconds have passed, or when the pool stops. */
void worker_submit_later(struct job *job, unsigned ms);

/* Finish all jobs and end the threads.  No job may be submitted from outside any more. */
void worker_stop(void);

#endif
