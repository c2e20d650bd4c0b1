/*
 * control.c - what the control socket tells and does in every mode: see control.h.
 */
#include "control.h"

#include "cache.h"
#include "clients.h"
#include "confine.h"
#include "ctl.h"
#include "exports.h"
#include "log.h"
#include "origin.h"
#include "stats.h"
#include "util.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
	const struct options *options;
	char *bitmap;			/* of a proxy, its path from the root */
	char reconnect_error[256];	/* "" for none */
	atomic_bool reconnect_done;
	uint64_t started;		/* now_ms() */
	char snapshot[4096];		/* the path of the last one, or why it failed; "": none yet */
	bool snapshot_failed;
} control;

/* Whether there is a proxy that is no target yet. */
static bool is_proxy(void)
{
	return exports.cache && !cache_is_target(exports.cache);
}

/* Query */

/* The only image has lines of its own; of several each has one: "name size 1048576 snapshot idle". */
static void say_exports(struct ctl_reply *reply)
{
	const struct exported *e = exports.all;

	if (exports.count == 1) {
		ctl_say(reply, "image", "%s", e->path);
		ctl_say_number(reply, "size", e->export.proto.size);
	}
	ctl_say(reply, "readonly", "%s", e->export.backend->readonly ? "yes" : "no");
	for (; exports.count > 1 && e < exports.all + exports.count; e++)
		ctl_say(reply, "export", "%s size %" PRIu64 " snapshot %s", e->export.proto.name,
			e->export.proto.size,
			e->snapshot || e->wanted ? "running" : "idle");
}

/* "address reads 1 writes 2 ..." */
static void say_client(struct ctl_reply *reply, const struct survey_client *c)
{
	struct tally_field field[TALLY_FIELDS];
	char text[512];
	int n = snprintf(text, sizeof(text), "%s", c->peer);

	tally_fields(&c->all, field);
	for (unsigned i = 0; i < TALLY_FIELDS; i++)
		n += snprintf(text + n, sizeof(text) - (size_t)n, " %s %" PRIu64, field[i].name,
			      field[i].value);
	ctl_say(reply, "client", "%s in-flight %u", text, c->in_flight);
}

/* "7:17 15:3": 17 requests took up to 7 us, and 3 more up to 15. */
static void say_delays(struct ctl_reply *reply, const uint64_t delay[STATS_DELAYS])
{
	char text[STATS_DELAYS * 36] = "";
	size_t n = 0;

	for (unsigned i = 0; i < STATS_DELAYS; i++)
		if (delay[i])
			n += (size_t)snprintf(text + n, sizeof(text) - n, "%s%" PRIu64 ":%" PRIu64,
					      n ? " " : "", delay_top(i), delay[i]);
	ctl_say(reply, "delays-us", "%s", text);
}

static void say_clients(struct ctl_reply *reply)
{
	const struct survey *s = stats_take();
	struct tally_field field[TALLY_FIELDS];

	tally_fields(&s->total, field);
	for (unsigned i = 0; i < TALLY_FIELDS; i++)
		ctl_say_number(reply, field[i].name, field[i].value);
	say_delays(reply, s->total.delay);
	if (s->missing)
		ctl_say_number(reply, "threads-missing", s->missing);
	for (size_t i = 0; i < s->count; i++)
		say_client(reply, &s->client[i]);
	stats_release();
}

static void say_snapshot(struct ctl_reply *reply)
{
	bool running = false;

	for (size_t i = 0; i < exports.count; i++)
		running |= exports.all[i].snapshot || exports.all[i].wanted;
	ctl_say(reply, "snapshot", running ? "running" : "idle");
	if (*control.snapshot)
		ctl_say(reply, control.snapshot_failed ? "snapshot-error" : "snapshot-last", "%s",
			control.snapshot);
}

static void say_blocks(struct ctl_reply *reply)
{
	struct cache_status s;
	unsigned share;

	cache_status(exports.cache, &s);
	share = s.per_mille;
	ctl_say_number(reply, "block-size", BLOCK_SIZE);
	ctl_say_number(reply, "blocks", s.blocks);
	ctl_say_number(reply, "cached-blocks", s.held);
	ctl_say(reply, "cached-percent", "%u.%u", share / 10, share % 10);
	ctl_say_number(reply, "written-blocks", s.written);
}

/* Why a copy ended early; NULL if it did not. */
static const char *copy_error(const struct copy_status *s)
{
	static char text[128];

	if (s->state == COPY_RUNNING || s->state == COPY_DONE)
		return NULL;
	if (s->state == COPY_IDLE)
		return "the copy was stopped";
	if (s->error)
		snprintf(text, sizeof(text), "cannot copy: %s", strerror(s->error));
	else
		snprintf(text, sizeof(text), "%" PRIu64 " blocks could not be copied",
			 s->failed_blocks);
	return text;
}

static void say_copy(struct ctl_reply *reply)
{
	static const char *const name[] = { [COPY_IDLE] = "idle", [COPY_RUNNING] = "running",
					    [COPY_DONE] = "done", [COPY_FAILED] = "failed" };
	static struct copy_status s;

	copy_status(cache_copy(exports.cache), &s);
	ctl_say(reply, "copy", "%s", name[s.state]);
	ctl_say_number(reply, "copy-rate", s.rate);
	ctl_say_number(reply, "copy-failed-blocks", s.failed_blocks);
	if (s.state == COPY_FAILED)
		ctl_say(reply, "copy-error", "%s", copy_error(&s));
}

static void say_proxy(struct ctl_reply *reply)
{
	struct origin_status s;
	const char *link = "closed";

	origin_status(cache_origin(exports.cache), &s);
	if (is_proxy())
		link = s.links ? "up" : "down";
	ctl_say(reply, "bitmap", "%s", control.bitmap);
	ctl_say(reply, "origin", "%s", s.address);
	ctl_say(reply, "origin-export", "%s", s.export_name);
	ctl_say(reply, "origin-link", "%s", link);
	if (strcmp(link, "down") == 0)
		ctl_say(reply, "origin-reason", "%s", s.reason);
	ctl_say_number(reply, "origin-links", s.links);
	say_blocks(reply);
	ctl_say_number(reply, "fetched-bytes", s.fetched);
	ctl_say_number(reply, "origin-requests", s.waiting);
	say_copy(reply);
}

static void query(struct ctl_reply *reply)
{
	bool is_cow = control.options->mode == MODE_COW_TARGET;

	ctl_say(reply, "mode", is_proxy() ? "proxy" : is_cow ? "cow-target" : "target");
	say_exports(reply);
	ctl_say_number(reply, "uptime", (now_ms() - control.started) / 1000);
	ctl_say(reply, "confined", confine_is_in_force() ? "yes" : "no");
	ctl_say_number(reply, "clients", clients_count());
	ctl_say_number(reply, "pending-requests", atomic_load(&load.requests));
	ctl_say_number(reply, "pending-requests-limit", load.requests_max);
	ctl_say_number(reply, "buffer-bytes", atomic_load(&load.bytes));
	ctl_say_number(reply, "buffer-bytes-limit", load.bytes_max);
	if (exports.cache)
		say_proxy(reply);
	say_snapshot(reply);
	say_clients(reply);
}

/* Snapshots */

static void snapshot_ended(const struct export *e, const char *path, const char *error)
{
	control.snapshot_failed = !path;
	snprintf(control.snapshot, sizeof(control.snapshot), "%s", path ? path : error);
	ctl_snapshot_ended(e, path, error);
}

/* A proxy */

static void start_copy(unsigned blocks)
{
	copy_start(cache_copy(exports.cache), (uint64_t)blocks * BLOCK_SIZE);
}

static void release_copy(void)
{
	copy_release(cache_copy(exports.cache));
}

static const char *say_progress(struct ctl_reply *reply, bool *runs)
{
	static struct copy_status s;
	struct origin_status o;
	struct cache_status c;

	copy_status(cache_copy(exports.cache), &s);
	*runs = s.state == COPY_RUNNING;
	if (!reply)
		return NULL;
	origin_status(cache_origin(exports.cache), &o);
	cache_status(exports.cache, &c);
	if (o.links == 0 && is_proxy())
		ctl_say(reply, "origin-reason", "%s", o.reason);
	ctl_say(reply, "progress", "%" PRIu64 " %" PRIu64 " %" PRIu64, c.held, c.blocks, s.rate);
	if (*runs || c.held == c.blocks)
		return NULL;
	for (unsigned i = 0; i < s.failures; i++)
		ctl_say(reply, "failed", "%" PRIu64 " %" PRIu64, s.failure[i].off, s.failure[i].len);
	if (s.failures_more)
		ctl_say_number(reply, "failed-more", s.failures_more);
	return copy_error(&s);
}

/* The origin's thread, or ours. */
static void reconnected(const char *error)
{
	snprintf(control.reconnect_error, sizeof(control.reconnect_error), "%s", error ? error : "");
	atomic_store(&control.reconnect_done, true);
	wake_main();
}

static const char *reconnect(const char *host, const char *port, const char *export_name)
{
	if (cache_is_target(exports.cache))
		return "this is a target, it has no origin";
	origin_redirect(cache_origin(exports.cache), host, port, export_name, reconnected);
	return NULL;
}

static const char *switch_over(bool force)
{
	return cache_switch(exports.cache, force);
}

void control_switch(void)
{
	const char *error;

	if (!exports.cache) {
		log_error("SIGUSR2 ignored: there is no proxy to switch");
		return;
	}
	error = switch_over(false);
	if (error)
		log_error("cannot switch to target mode: %s", error);
}

void control_tend(void)
{
	struct cache_news news;

	exports_tend(snapshot_ended);
	if (!exports.cache)
		return;
	if (atomic_exchange(&control.reconnect_done, false))
		ctl_reconnected(*control.reconnect_error ? control.reconnect_error : NULL);
	cache_tend(exports.cache, &news);
	if (news.copied)
		ctl_copied();
	if (news.switched)
		ctl_switched(*news.error ? news.error : NULL, news.zeroed);
}

/* Life */

bool control_open(const struct options *o)
{
	static struct ctl_ops ops = {
		.query = query,
		.gather = stats_gather,
		.snapshot = exports_snapshot_of,
		.switch_over = switch_over,
		.reconnect = reconnect,
		.start_copy = start_copy,
		.release_copy = release_copy,
		.copy = say_progress,
	};

	control.started = now_ms();
	control.options = o;
	if (!o->control)
		return true;
	ops.proxy = exports.cache != NULL;
	control.bitmap = o->bitmap ? absolute_path(o->bitmap) : NULL;
	return ctl_open(o->control, &ops);
}
