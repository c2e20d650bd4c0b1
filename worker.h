/*
 * worker.h - a few threads for disk calls that would block.
 */
#ifndef XNBD_WORKER_H
#define XNBD_WORKER_H

/* Something to run.  It lies inside what it works on; the pool only links it. */
struct job {
	struct job *next;
	void (*run)(struct job *);
};

/* Run the job on a worker, soon, in order of submission.  Any thread; does not block. */
void worker_submit(struct job *job);

/* Finish all jobs and end the threads.  No job may be submitted from outside any more. */
void worker_stop(void);

#endif
