/*
 * report.h - the statistics of all clients, for the log and for who asks.  Main thread.
 */
#ifndef XNBD_REPORT_H
#define XNBD_REPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "stats.h"

/* A client, for who asks. */
struct report_client {
	char peer[ADDRESS_MAX];
	struct tally_sums {
		uint64_t count[STATS_KINDS], bytes[STATS_WRITE + 1], errors, longest, p50, p99;
	} sums;
	unsigned in_flight;
};

/* The log gets what was done every so often, 0 for never; wake makes the main thread tend. */
void report_init(unsigned seconds, void (*wake)(void));

/* Milliseconds until report_tend() has something to do, -1 for never. */
int report_timeout(void);

/* Log what each client did since it connected. */
void report_now(void);

/* Gather what clients did; report_tend() tells when that is complete.  One at a time. */
void report_gather(void);

/*
 * Go on with what is due.  True once for each report_gather(): it is complete, and stays so until the
 * next call, which must follow.
 */
bool report_tend(void);

/*
 * What was gathered, complete or not; report_release() must follow.  clients are count; missing
 * loops have not told.
 */
struct report {
	struct tally total;
	struct report_client *client;
	size_t count, room;
	unsigned missing;
};
const struct report *report_take(void);
void report_release(void);

/* Milliseconds since report_init(). */
uint64_t report_uptime(void);

void tally_sum(const struct tally *t, struct tally_sums *sums);

#endif
