/*
 * control.c - what the control socket tells: see control.h.
 */
#include "control.h"

#include "cache.h"
#include "clients.h"
#include "confine.h"
#include "exports.h"
#include "stats.h"
#include "util.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	ANSWER_LINE_MAX = 16384,	/* bytes; more than there are to say */
	TEXT_MAX = 16000,		/* bytes of a value */
};

static struct {
	char *bitmap;			/* of a proxy, its path from the root */
	uint64_t started;		/* now_ms() */
	const char *snapshot_name;	/* the field that tells of the last one; NULL: none yet */
	char snapshot[4096];		/* its path, or why it failed */
} control;

/* Whether there is a proxy that is no target yet. */
static bool is_proxy(void)
{
	return exports.cache && !exports.cache->switched;
}

/* Lines, and fields of an object */

void control_put(struct answer *a, const char *fmt, ...)
{
	char part[ANSWER_LINE_MAX];
	char *text;
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(part, sizeof(part), fmt, ap);
	va_end(ap);
	text = a->failed ? NULL : realloc(a->text, a->len + strlen(part));
	a->failed = !text;
	if (!text)
		return;
	a->text = text;
	memcpy(text + a->len, part, strlen(part));
	a->len += strlen(part);
}

/* The value as a string in JSON; paths are bytes, JSON is characters. */
static void json_string(const char *value, char text[TEXT_MAX])
{
	const char *end = value + strlen(value);
	size_t len = 0, n;

	text[len++] = '"';
	for (; value < end && len < TEXT_MAX - 8; value += n ? n : 1) {
		n = utf8_length((const uint8_t *)value, (size_t)(end - value));
		if (*value == '"' || *value == '\\')
			text[len++] = '\\';
		memcpy(text + len, n ? value : "\\ufffd", n ? n : 6);
		len += n ? n : 6;
	}
	strcpy(text + len, "\"");
}

static char last_character(const struct answer *a)
{
	return a->len > 0 ? a->text[a->len - 1] : '\n';
}

/* JSON: what comes between the one before, if there is one, and the next. */
static const char *comma(const struct answer *a)
{
	return strchr("{[", last_character(a)) ? "" : ",";
}

/* The value is masked, and in JSON a string in quotes, a number, true or false. */
static void put_field(struct answer *a, const char *name, const char *value)
{
	if (a->json)
		control_put(a, "%s%s\"%s\": %s", comma(a), a->item ? " " : "\njson:   ", name,
			    value);
	else
		control_put(a, last_character(a) == '\n' ? "%s: %s%s" : " %s %s%s", name, value,
			    a->item ? "" : "\n");
}

void control_say(struct answer *a, const char *name, const char *fmt, ...)
{
	char text[TEXT_MAX], quoted[TEXT_MAX];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	mask_control_characters(text, strlen(text));	/* a value must not end the line */
	if (a->json)
		json_string(text, quoted);
	put_field(a, name, a->json ? quoted : text);
}

static void say_number(struct answer *a, const char *name, uint64_t n)
{
	char text[24];

	snprintf(text, sizeof(text), "%" PRIu64, n);
	put_field(a, name, text);
}

static void say_flag(struct answer *a, const char *name, bool set)
{
	if (a->json)
		put_field(a, name, set ? "true" : "false");
	else
		put_field(a, name, set ? "yes" : "no");
}

/* Items of a list: "list: key name value name value", or an array of objects. */

static void begin_list(struct answer *a, const char *list)
{
	if (a->json)
		control_put(a, "%s\njson:   \"%s\": [", comma(a), list);
}

static void begin_item(struct answer *a, const char *list, const char *key, const char *value)
{
	a->item = true;
	if (a->json)
		control_put(a, "%s\njson:     {", comma(a));
	control_say(a, a->json ? key : list, "%s", value);
}

static void end_item(struct answer *a)
{
	control_put(a, a->json ? " }" : "\n");
	a->item = false;
}

static void end_list(struct answer *a)
{
	if (a->json)
		control_put(a, *comma(a) ? "\njson:   ]" : "]");
}

/* Query */

/* The only image has fields of its own; several are a list. */
static void say_images(struct answer *a)
{
	const struct exported *e = exports.all;

	if (exports.count == 1) {
		control_say(a, "image", "%s", e->path);
		say_number(a, "size", e->export.proto.size);
	}
	say_flag(a, "readonly", e->export.backend->readonly);
	if (exports.count == 1)
		return;
	begin_list(a, "export");
	for (; e < exports.all + exports.count; e++) {
		begin_item(a, "export", "name", e->export.proto.name);
		say_number(a, "size", e->export.proto.size);
		control_say(a, "snapshot", "%s", e->snapshot || e->wanted ? "running" : "idle");
		end_item(a);
	}
	end_list(a);
}

static void say_tally(struct answer *a, const struct tally *t)
{
	say_number(a, "reads", t->reads);
	say_number(a, "writes", t->writes);
	say_number(a, "flushes", t->flushes);
	say_number(a, "others", t->others);
	say_number(a, "read-bytes", t->read_bytes);
	say_number(a, "written-bytes", t->written_bytes);
	say_number(a, "errors", t->errors);
	say_number(a, "max-us", t->longest);
	say_number(a, "p50-us", tally_percentile(t, 50));
	say_number(a, "p99-us", tally_percentile(t, 99));
}

/* "7:17 15:3", or [[7, 17], [15, 3]]: 17 requests took up to 7 us, and 3 more up to 15. */
static void say_delays(struct answer *a, const _Atomic uint64_t delay[STATS_DELAYS])
{
	const char *pair = a->json ? "%s[%" PRIu64 ", %" PRIu64 "]" : "%s%" PRIu64 ":%" PRIu64;
	const char *before = "";

	begin_list(a, "delays-us");
	if (!a->json)
		control_put(a, "delays-us: ");
	for (unsigned i = 0; i < STATS_DELAYS; i++) {
		if (!delay[i])
			continue;
		control_put(a, pair, before, delay_top(i), (uint64_t)delay[i]);
		before = a->json ? ", " : " ";
	}
	control_put(a, a->json ? "]" : "\n");
}

static void say_clients(struct answer *a)
{
	struct tally total;
	const struct stats *s = stats_take(&total);

	say_tally(a, &total);
	say_delays(a, total.delay);
	begin_list(a, "client");
	for (; s; s = s->next) {
		begin_item(a, "client", "address", s->peer);
		say_tally(a, &s->all);
		say_number(a, "in-flight", s->in_flight);
		end_item(a);
	}
	end_list(a);
	stats_release();
}

static void say_snapshot(struct answer *a)
{
	bool running = false;

	for (size_t i = 0; i < exports.count; i++)
		running |= exports.all[i].snapshot || exports.all[i].wanted;
	control_say(a, "snapshot", "%s", running ? "running" : "idle");
	if (control.snapshot_name)
		control_say(a, control.snapshot_name, "%s", control.snapshot);
}

static void say_blocks(struct answer *a)
{
	struct cache_status s;
	char percent[24];

	cache_status(exports.cache, &s);
	say_number(a, "block-size", BLOCK_SIZE);
	say_number(a, "blocks", s.blocks);
	say_number(a, "cached-blocks", s.held);
	snprintf(percent, sizeof(percent), "%u.%u", s.per_mille / 10, s.per_mille % 10);
	put_field(a, "cached-percent", percent);
	say_number(a, "written-blocks", layer_written(&exports.cache->layer));
}

/* Why a copy ended early. */
static const char *copy_error(const struct copy_status *s)
{
	static char text[128];

	if (s->state == COPY_IDLE)
		return "the copy was stopped";
	if (s->error)
		snprintf(text, sizeof(text), "cannot copy: %s", strerror(s->error));
	else
		snprintf(text, sizeof(text), "%" PRIu64 " blocks could not be copied",
			 s->failed_blocks);
	return text;
}

static void say_copy(struct answer *a)
{
	static const char *const name[] = { [COPY_IDLE] = "idle", [COPY_RUNNING] = "running",
					    [COPY_DONE] = "done", [COPY_FAILED] = "failed" };
	static struct copy_status s;

	copy_status(&exports.cache->copy, &s);
	control_say(a, "copy", "%s", name[s.state]);
	say_number(a, "copy-rate", s.rate);
	say_number(a, "copy-failed-blocks", s.failed_blocks);
	if (s.state == COPY_FAILED)
		control_say(a, "copy-error", "%s", copy_error(&s));
}

static void say_proxy(struct answer *a)
{
	struct origin_status s;
	const char *link = "closed";

	origin_status(exports.cache->origin, &s);
	if (is_proxy())
		link = s.links ? "up" : "down";
	control_say(a, "bitmap", "%s", control.bitmap);
	control_say(a, "origin", "%s", s.address);
	control_say(a, "origin-export", "%s", s.export_name);
	control_say(a, "origin-link", "%s", link);
	if (strcmp(link, "down") == 0)
		control_say(a, "origin-reason", "%s", s.reason);
	say_number(a, "origin-links", s.links);
	say_blocks(a);
	say_number(a, "fetched-bytes", s.fetched);
	say_number(a, "origin-requests", s.waiting);
	say_copy(a);
}

static void say_state(struct answer *a)
{
	const char *mode = exports.all->disk ? "target" : "cow-target";	/* which has an overlay */

	control_say(a, "mode", "%s", is_proxy() ? "proxy" : mode);
	say_images(a);
	say_number(a, "uptime", (now_ms() - control.started) / 1000);
	say_flag(a, "confined", confine_holds);
	say_number(a, "clients", clients_count());
	say_number(a, "pending-requests", atomic_load(&load.requests));
	say_number(a, "pending-requests-limit", load.requests_max);
	say_number(a, "buffer-bytes", atomic_load(&load.bytes));
	say_number(a, "buffer-bytes-limit", load.bytes_max);
	if (exports.cache)
		say_proxy(a);
	say_snapshot(a);
	say_clients(a);
}

void control_query(struct answer *a, bool json)
{
	a->json = json;
	if (json)
		control_put(a, "json: {");
	say_state(a);
	if (json)
		control_put(a, "\njson: }\n");
	a->json = false;
}

const char *control_say_progress(struct answer *a, bool *runs)
{
	struct copy_status s;
	struct origin_status o;
	struct cache_status c;

	copy_status(&exports.cache->copy, &s);
	origin_status(exports.cache->origin, &o);
	cache_status(exports.cache, &c);
	*runs = s.state == COPY_RUNNING;
	if (o.links == 0 && is_proxy())
		control_say(a, "origin-reason", "%s", o.reason);
	control_say(a, "progress", "%" PRIu64 " %" PRIu64 " %" PRIu64, c.held, c.blocks, s.rate);
	if (*runs || (c.held == c.blocks && !s.error))
		return NULL;
	for (unsigned i = 0; i < s.failures; i++)
		control_say(a, "failed", "%" PRIu64 " %" PRIu64, s.failure[i].off, s.failure[i].len);
	if (s.failures_more)
		say_number(a, "failed-more", s.failures_more);
	return copy_error(&s);
}

void control_note_snapshot(const char *path, const char *error)
{
	control.snapshot_name = path ? "snapshot-last" : "snapshot-error";
	snprintf(control.snapshot, sizeof(control.snapshot), "%s", path ? path : error);
}

void control_init(const char *bitmap)
{
	control.started = now_ms();
	control.bitmap = bitmap ? absolute_path(bitmap) : NULL;
}
