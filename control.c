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
	uint64_t started;		/* now_ms() */
	char snapshot[4096];		/* the path of the last one, or why it failed; "": none yet */
	bool snapshot_failed;
} control;

/* Whether there is a proxy that is no target yet. */
static bool is_proxy(void)
{
	return exports.cache && !exports.cache->switched;
}

/* A query's fields */

/* The answer to a query: lines "name: value", or those of one JSON object, "json: TEXT". */
struct report {
	struct ctl_reply *reply;
	bool json;
	bool item;			/* the fields are those of an item of a list */
	const char *before;		/* JSON: what comes in front of the next field or item */
};

enum { JSON_STRING_MAX = 16000 };	/* bytes; what a line has room for */

/* The value as a string in JSON; paths are bytes, JSON is characters. */
static void json_string(const char *value, char text[JSON_STRING_MAX])
{
	const char *end = value + strlen(value);
	size_t len = 0, n;

	text[len++] = '"';
	for (; value < end && len < JSON_STRING_MAX - 8; value += n ? n : 1) {
		n = utf8_length((const uint8_t *)value, (size_t)(end - value));
		if (*value == '"' || *value == '\\')
			text[len++] = '\\';
		memcpy(text + len, n ? value : "\\ufffd", n ? n : 6);
		len += n ? n : 6;
	}
	strcpy(text + len, "\"");
}

/* The value is masked, and in JSON a number, true, false or an array. */
static void put_field(struct report *r, const char *name, const char *value)
{
	if (r->json) {
		ctl_put(r->reply, "%s\"%s\": %s", r->before, name, value);
		r->before = r->item ? ", " : ",\njson:   ";
	} else {
		ctl_put(r->reply, r->item ? " %s %s" : "%s: %s\n", name, value);
	}
}

/* A value must not end the line. */
static const char *masked(const char *value, char text[JSON_STRING_MAX])
{
	snprintf(text, JSON_STRING_MAX, "%s", value);
	mask_control_characters(text, strlen(text));
	return text;
}

static void say_text(struct report *r, const char *name, const char *value)
{
	char text[JSON_STRING_MAX], quoted[JSON_STRING_MAX];

	masked(value, text);
	if (r->json)
		json_string(text, quoted);
	put_field(r, name, r->json ? quoted : text);
}

static void say_number(struct report *r, const char *name, uint64_t n)
{
	char text[24];

	snprintf(text, sizeof(text), "%" PRIu64, n);
	put_field(r, name, text);
}

static void say_flag(struct report *r, const char *name, bool set)
{
	if (r->json)
		put_field(r, name, set ? "true" : "false");
	else
		put_field(r, name, set ? "yes" : "no");
}

/* Items of a list: "list: key name value name value", or an array of objects. */

static void begin_list(struct report *r, const char *list)
{
	if (r->json)
		ctl_put(r->reply, "%s\"%s\": [", r->before, list);
	r->before = "\njson:     ";
}

static void begin_item(struct report *r, const char *list, const char *key, const char *value)
{
	char text[JSON_STRING_MAX];

	r->item = true;
	if (r->json) {
		ctl_put(r->reply, "%s{ ", r->before);
		r->before = "";
		say_text(r, key, value);
	} else {
		ctl_put(r->reply, "%s: %s", list, masked(value, text));
	}
}

static void end_item(struct report *r)
{
	ctl_put(r->reply, r->json ? " }" : "\n");
	r->before = ",\njson:     ";
	r->item = false;
}

static void end_list(struct report *r)
{
	if (r->json)
		ctl_put(r->reply, *r->before == ',' ? "\njson:   ]" : "]");
	r->before = ",\njson:   ";
}

/* Query */

/* The only image has fields of its own. */
static void say_image(struct report *r)
{
	const struct exported *e = exports.all;

	if (exports.count == 1) {
		say_text(r, "image", e->path);
		say_number(r, "size", e->export.proto.size);
	}
	say_flag(r, "readonly", e->export.backend->readonly);
}

/* Of several images. */
static void say_exports(struct report *r)
{
	if (exports.count == 1)
		return;
	begin_list(r, "export");
	for (const struct exported *e = exports.all; e < exports.all + exports.count; e++) {
		begin_item(r, "export", "name", e->export.proto.name);
		say_number(r, "size", e->export.proto.size);
		say_text(r, "snapshot", e->snapshot || e->wanted ? "running" : "idle");
		end_item(r);
	}
	end_list(r);
}

static void say_tally(struct report *r, const struct tally *t)
{
	struct tally_field field[TALLY_FIELDS];

	tally_fields(t, field);
	for (unsigned i = 0; i < TALLY_FIELDS; i++)
		say_number(r, field[i].name, field[i].value);
}

/* "7:17 15:3", or [[7, 17], [15, 3]]: 17 requests took up to 7 us, and 3 more up to 15. */
static void say_delays(struct report *r, const _Atomic uint64_t delay[STATS_DELAYS])
{
	char text[STATS_DELAYS * 48] = "";
	const char *pair = r->json ? "%s[%" PRIu64 ", %" PRIu64 "]" : "%s%" PRIu64 ":%" PRIu64;
	const char *before = r->json ? "[" : "";
	size_t n = 0;

	for (unsigned i = 0; i < STATS_DELAYS; i++) {
		uint64_t many = delay[i];

		if (!many)
			continue;
		n += (size_t)snprintf(text + n, sizeof(text) - n, pair, before, delay_top(i), many);
		before = r->json ? ", " : " ";
	}
	if (r->json)
		strcpy(text + n, n ? "]" : "[]");
	put_field(r, "delays-us", text);
}

static void say_clients(struct report *r)
{
	struct tally total;
	const struct stats *s = stats_take(&total);

	say_tally(r, &total);
	say_delays(r, total.delay);
	begin_list(r, "client");
	for (; s; s = s->next) {
		begin_item(r, "client", "address", s->peer);
		say_tally(r, &s->all);
		say_number(r, "in-flight", s->in_flight);
		end_item(r);
	}
	end_list(r);
	stats_release();
}

static void say_snapshot(struct report *r)
{
	bool running = false;

	for (size_t i = 0; i < exports.count; i++)
		running |= exports.all[i].snapshot || exports.all[i].wanted;
	say_text(r, "snapshot", running ? "running" : "idle");
	if (*control.snapshot)
		say_text(r, control.snapshot_failed ? "snapshot-error" : "snapshot-last",
			 control.snapshot);
}

static void say_blocks(struct report *r)
{
	struct cache_status s;
	unsigned share;
	char percent[24];

	cache_status(exports.cache, &s);
	share = s.per_mille;
	say_number(r, "block-size", BLOCK_SIZE);
	say_number(r, "blocks", s.blocks);
	say_number(r, "cached-blocks", s.held);
	snprintf(percent, sizeof(percent), "%u.%u", share / 10, share % 10);
	put_field(r, "cached-percent", percent);
	say_number(r, "written-blocks", layer_written(&exports.cache->layer));
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

static void say_copy(struct report *r)
{
	static const char *const name[] = { [COPY_IDLE] = "idle", [COPY_RUNNING] = "running",
					    [COPY_DONE] = "done", [COPY_FAILED] = "failed" };
	static struct copy_status s;

	copy_status(&exports.cache->copy, &s);
	say_text(r, "copy", name[s.state]);
	say_number(r, "copy-rate", s.rate);
	say_number(r, "copy-failed-blocks", s.failed_blocks);
	if (s.state == COPY_FAILED)
		say_text(r, "copy-error", copy_error(&s));
}

static void say_proxy(struct report *r)
{
	struct origin_status s;
	const char *link = "closed";

	origin_status(exports.cache->origin, &s);
	if (is_proxy())
		link = s.links ? "up" : "down";
	say_text(r, "bitmap", control.bitmap);
	say_text(r, "origin", s.address);
	say_text(r, "origin-export", s.export_name);
	say_text(r, "origin-link", link);
	if (strcmp(link, "down") == 0)
		say_text(r, "origin-reason", s.reason);
	say_number(r, "origin-links", s.links);
	say_blocks(r);
	say_number(r, "fetched-bytes", s.fetched);
	say_number(r, "origin-requests", s.waiting);
	say_copy(r);
}

static void say_state(struct report *r)
{
	bool is_cow = control.options->mode == MODE_COW_TARGET;

	say_text(r, "mode", is_proxy() ? "proxy" : is_cow ? "cow-target" : "target");
	say_image(r);
	if (!r->json)
		say_exports(r);
	say_number(r, "uptime", (now_ms() - control.started) / 1000);
	say_flag(r, "confined", confine_is_in_force());
	say_number(r, "clients", clients_count());
	say_number(r, "pending-requests", atomic_load(&load.requests));
	say_number(r, "pending-requests-limit", load.requests_max);
	say_number(r, "buffer-bytes", atomic_load(&load.bytes));
	say_number(r, "buffer-bytes-limit", load.bytes_max);
	if (exports.cache)
		say_proxy(r);
	say_snapshot(r);
	say_clients(r);
	if (r->json)
		say_exports(r);
}

static void query(struct ctl_reply *reply, bool json)
{
	struct report r = { .reply = reply, .json = json, .before = "json:   " };

	if (json)
		ctl_put(reply, "json: {\n");
	say_state(&r);
	if (json)
		ctl_put(reply, "\njson: }\n");
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
	copy_start(&exports.cache->copy, (uint64_t)blocks * BLOCK_SIZE);
}

static void release_copy(void)
{
	copy_release(&exports.cache->copy, false);
}

static const char *say_progress(struct ctl_reply *reply, bool *runs)
{
	static struct copy_status s;
	struct origin_status o;
	struct cache_status c;

	copy_status(&exports.cache->copy, &s);
	*runs = s.state == COPY_RUNNING;
	if (!reply)
		return NULL;
	origin_status(exports.cache->origin, &o);
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

static const char *reconnect(const char *host, const char *port, const char *export_name)
{
	if (exports.cache->switched)
		return "this is a target, it has no origin";
	return origin_redirect(exports.cache->origin, host, port, export_name);
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
	const char *error;

	exports_tend(snapshot_ended);
	if (!exports.cache)
		return;
	if (origin_redirected(exports.cache->origin, &error))
		ctl_reconnected(error);
	if (control.options->control)
		ctl_copied();		/* it may have */
	if (cache_switch_ended(exports.cache, &error))
		ctl_switched(error, exports.cache->zeroed);
}

/* Life */

bool control_open(const struct options *o)
{
	static struct ctl_ops ops = {
		.query = query,
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
