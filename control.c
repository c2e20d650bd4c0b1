/*
 * control.c - what the control socket tells and does in every mode: see control.h.
 */
#include "control.h"

#include "exports.h"
#include "loop.h"
#include "proxy.h"
#include "report.h"
#include "util.h"

#include <stdio.h>
#include <stdlib.h>

static struct {
	struct ctl *ctl;		/* NULL: there is no socket */
	enum mode mode;
	char snapshot_path[4096];	/* of the last one; "" for none, or if it failed */
	char snapshot_error[128];	/* why it failed; "" if it did not */
} control;

/* Query */

static const char *mode_name(void)
{
	return proxy_is_one()			  ? "proxy" :
	       control.mode == MODE_COW_TARGET ? "cow-target" :
						    "target";
}

/* What waits, of all exports; a proxy has bounds for it, and one export. */
static void say_load(struct ctl_reply *reply)
{
	size_t requests = 0, bytes = 0;
	struct exports_state e = { 0 };

	for (size_t i = 0; i < exports_table()->count; i++) {
		exports_state(i, &e);
		requests += atomic_load(&e.export->load.requests);
		bytes += atomic_load(&e.export->load.bytes);
	}
	ctl_say_number(reply, "pending-requests", requests);
	ctl_say_number(reply, "pending-requests-limit", e.export->load.requests_max);
	ctl_say_number(reply, "buffer-bytes", bytes);
	ctl_say_number(reply, "buffer-bytes-limit", e.export->load.bytes_max);
}

/* The only image has lines of its own; of several each has one: "name size 1048576 snapshot 0". */
static void say_exports(struct ctl_reply *reply)
{
	size_t count = exports_table()->count;
	struct exports_state e;

	exports_state(0, &e);
	if (count == 1) {
		ctl_say(reply, "image", "%s", e.path);
		ctl_say_number(reply, "size", e.export->proto.size);
	}
	ctl_say(reply, "readonly", e.export->backend->readonly ? "yes" : "no");
	for (size_t i = 0; count > 1 && i < count; i++) {
		exports_state(i, &e);
		ctl_say(reply, "export", "%s size %llu snapshot %d", e.export->proto.name,
			(unsigned long long)e.export->proto.size, e.snapshot);
	}
}

static const char *const sum_name[] = { "reads", "writes", "flushes", "others", "read-bytes",
					"written-bytes", "errors", "max-us", "p50-us", "p99-us" };

_Static_assert(sizeof(struct tally_sums) == ARRAY_SIZE(sum_name) * sizeof(uint64_t),
	       "the names are those of its members, in their order");

/* "address reads 1 writes 2 ..." */
static void say_client(struct ctl_reply *reply, const struct report_client *c)
{
	char text[512];
	int n = snprintf(text, sizeof(text), "%s", c->peer);

	for (unsigned i = 0; i < ARRAY_SIZE(sum_name); i++)
		n += snprintf(text + n, sizeof(text) - (size_t)n, " %s %llu", sum_name[i],
			      (unsigned long long)((const uint64_t *)&c->sums)[i]);
	ctl_say(reply, "client", "%s in-flight %u", text, c->in_flight);
}

/* "4:17 5:3": requests that took up to 4 us, and up to 5. */
static void say_delays(struct ctl_reply *reply, const struct tally *t)
{
	char text[STATS_BUCKETS * 32];
	int n = 0;

	*text = '\0';
	for (unsigned i = 0; i < STATS_BUCKETS; i++)
		if (t->delay[i])
			n += snprintf(text + n, sizeof(text) - (size_t)n, "%s%llu:%llu",
				      n ? " " : "", (unsigned long long)bucket_top(i),
				      (unsigned long long)t->delay[i]);
	ctl_say(reply, "delays-us", "%s", text);
}

static void say_report(struct ctl_reply *reply)
{
	const struct report *r = report_take();
	struct tally_sums sums;

	tally_sum(&r->total, &sums);
	for (unsigned i = 0; i < ARRAY_SIZE(sum_name); i++)
		ctl_say_number(reply, sum_name[i], ((const uint64_t *)&sums)[i]);
	say_delays(reply, &r->total);
	if (r->missing)
		ctl_say_number(reply, "threads-missing", r->missing);
	for (size_t i = 0; i < r->count; i++)
		say_client(reply, &r->client[i]);
	report_release();
}

static void say_snapshot(struct ctl_reply *reply)
{
	struct exports_state e;
	bool running = false;

	for (size_t i = 0; i < exports_table()->count; i++) {
		exports_state(i, &e);
		running |= e.snapshot;
	}
	ctl_say(reply, "snapshot", running ? "running" : "idle");
	if (*control.snapshot_path)
		ctl_say(reply, "snapshot-last", "%s", control.snapshot_path);
	if (*control.snapshot_error)
		ctl_say(reply, "snapshot-error", "%s", control.snapshot_error);
}

static void query(struct ctl_reply *reply)
{
	ctl_say(reply, "mode", "%s", mode_name());
	say_exports(reply);
	ctl_say_number(reply, "uptime", report_uptime() / 1000);
	ctl_say_number(reply, "clients", loops_load());
	say_load(reply);
	proxy_query(reply);
	say_snapshot(reply);
	say_report(reply);
}

/* Snapshots */

static const char *snapshot(const char *name, const void **of, bool *behind)
{
	const struct export *e = NULL;
	const char *why = exports_snapshot_of(name, &e, behind);

	*of = e;
	return why;
}

static void snapshot_ended(const struct export *e, const char *path, const char *error)
{
	snprintf(control.snapshot_path, sizeof(control.snapshot_path), "%s", path ? path : "");
	snprintf(control.snapshot_error, sizeof(control.snapshot_error), "%s",
		 path ? "" : error);
	if (control.ctl)
		ctl_snapshot_ended(control.ctl, e, path, error);
}

/* Life */

bool control_open(const struct options *o)
{
	static struct ctl_ops ops = {
		.query = query,
		.gather = report_gather,
		.snapshot = snapshot,
	};

	if (!o->control)
		return true;
	control.mode = o->mode;
	ops.proxy = proxy_ops();
	control.ctl = ctl_open(o->control, &ops);
	if (!control.ctl)
		return false;
	exports_on_snapshot(snapshot_ended);
	proxy_serve(exports_first(), control.ctl);
	return true;
}

void control_close(void)
{
	ctl_close(control.ctl);
	control.ctl = NULL;
}

size_t control_poll(struct pollfd *pfd)
{
	return control.ctl ? ctl_poll(control.ctl, pfd) : 0;
}

int control_timeout(void)
{
	return control.ctl ? ctl_timeout(control.ctl) : -1;
}

void control_turn(const struct pollfd *pfd, size_t n)
{
	if (control.ctl)
		ctl_turn(control.ctl, pfd, n);
}

void control_gathered(void)
{
	if (control.ctl)
		ctl_gathered(control.ctl);
}
