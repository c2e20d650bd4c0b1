/*
 * control.c - what the control socket tells and does in every mode: see control.h.
 */
#include "control.h"

#include "loop.h"
#include "proxy.h"
#include "report.h"
#include "util.h"

#include <stdio.h>
#include <stdlib.h>

static struct {
	struct ctl *ctl;		/* NULL: there is no socket */
	const struct export *export;
	enum mode mode;
	char *image;			/* from the root */
	control_want_snapshot *want_snapshot;
	void *arg;

	bool snapshot_runs;
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

static void say_load(struct ctl_reply *reply)
{
	const struct load *load = &control.export->load;

	ctl_say_number(reply, "pending-requests", atomic_load(&load->requests));
	ctl_say_number(reply, "pending-requests-limit", load->requests_max);
	ctl_say_number(reply, "buffer-bytes", atomic_load(&load->bytes));
	ctl_say_number(reply, "buffer-bytes-limit", load->bytes_max);
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
	ctl_say(reply, "snapshot", control.snapshot_runs ? "running" : "idle");
	if (*control.snapshot_path)
		ctl_say(reply, "snapshot-last", "%s", control.snapshot_path);
	if (*control.snapshot_error)
		ctl_say(reply, "snapshot-error", "%s", control.snapshot_error);
}

static void query(struct ctl_reply *reply)
{
	const struct backend *b = control.export->backend;

	ctl_say(reply, "mode", "%s", mode_name());
	ctl_say(reply, "image", "%s", control.image);
	ctl_say_number(reply, "size", b->size);
	ctl_say(reply, "readonly", b->readonly ? "yes" : "no");
	ctl_say_number(reply, "uptime", report_uptime() / 1000);
	ctl_say_number(reply, "clients", loops_load());
	say_load(reply);
	proxy_query(reply);
	say_snapshot(reply);
	say_report(reply);
}

/* Snapshots */

static const char *snapshot(bool *behind)
{
	*behind = control.snapshot_runs;
	return control.want_snapshot(control.arg);
}

void control_snapshot_begun(void)
{
	control.snapshot_runs = true;
}

void control_snapshot_ended(const char *path, const char *error)
{
	control.snapshot_runs = false;
	snprintf(control.snapshot_path, sizeof(control.snapshot_path), "%s", path ? path : "");
	snprintf(control.snapshot_error, sizeof(control.snapshot_error), "%s",
		 path ? "" : error);
	if (control.ctl)
		ctl_snapshot_ended(control.ctl, path, error);
}

/* Life */

bool control_open(const struct options *o, struct export *e,
		  control_want_snapshot *want_snapshot, void *arg)
{
	static struct ctl_ops ops = {
		.query = query,
		.gather = report_gather,
		.snapshot = snapshot,
	};

	if (!o->control)
		return true;
	control.image = absolute_path(o->image);
	if (!control.image) {
		log_failure("cannot start: out of memory");
		return false;
	}
	control.export = e;
	control.mode = o->mode;
	control.want_snapshot = want_snapshot;
	control.arg = arg;
	ops.proxy = proxy_ops();
	control.ctl = ctl_open(o->control, &ops);
	if (control.ctl)
		proxy_serve(e, control.ctl);
	return control.ctl != NULL;
}

void control_close(void)
{
	ctl_close(control.ctl);
	control.ctl = NULL;
	free(control.image);
	control.image = NULL;
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
