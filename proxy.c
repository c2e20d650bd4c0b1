/*
 * proxy.c - the life of a proxy: see proxy.h.
 *
 * The switch, each step begun by proxy_tend() when the one before has been reported:
 *
 *	ZEROING		only if forced: zeros are stored where nothing is held, by a worker
 *	COMPLETING	all that is held becomes durable, and then all blocks are held
 *	then the origin is let go
 *
 * The cache stays the backend, and clients go on all the time.
 */
#include "proxy.h"

#include "cache.h"
#include "ctl.h"
#include "disk.h"
#include "origin.h"
#include "util.h"
#include "worker.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum step { NO_SWITCH, ZEROING, COMPLETING, SWITCHED };

static struct {
	const struct options *options;
	char *bitmap;			/* its path from the root */
	void (*wake)(void);
	struct backend *backend;	/* the cache; NULL: there is no proxy */
	struct export *export;
	struct ctl *ctl;

	enum step step;
	uint64_t zeroed;		/* blocks, by a switch that was forced */
	struct job zero_job;
	struct request commit;		/* the flush that a step waits for */
	int error;			/* its outcome, an errno, or that of zeroing */
	atomic_bool step_done;

	char reconnect_error[256];	/* "" for none */
	atomic_bool reconnect_done;
	atomic_bool copy_ended;
} proxy;

/* Query */

/* Tenths of a percent, rounded down: never 1000 while a block is missing. */
static unsigned per_mille(uint64_t held, uint64_t blocks)
{
	return blocks ? (unsigned)(held * 1000 / blocks) : 1000;
}

static void query_origin(struct ctl_reply *reply)
{
	struct origin_status s;

	origin_status(cache_origin(proxy.backend), &s);
	ctl_say(reply, "origin", "%s", s.address);
	ctl_say(reply, "origin-export", "%s", s.export_name);
	if (proxy.step == SWITCHED)
		ctl_say(reply, "origin-link", "closed");
	else
		ctl_say(reply, "origin-link", s.up ? "up" : "down");
	if (!s.up && proxy.step != SWITCHED)
		ctl_say(reply, "origin-reason", "%s", s.reason);
	ctl_say_number(reply, "origin-links", s.links);
}

static void query_blocks(struct ctl_reply *reply)
{
	struct cache_status s;
	unsigned share;

	cache_status(proxy.backend, &s);
	share = per_mille(s.held, s.blocks);
	ctl_say_number(reply, "block-size", BLOCK_SIZE);
	ctl_say_number(reply, "blocks", s.blocks);
	ctl_say_number(reply, "cached-blocks", s.held);
	ctl_say(reply, "cached-percent", "%u.%u", share / 10, share % 10);
	ctl_say_number(reply, "written-blocks", s.written);
}

static void query_requests(struct ctl_reply *reply)
{
	struct origin_status s;

	origin_status(cache_origin(proxy.backend), &s);
	ctl_say_number(reply, "fetched-bytes", s.fetched);
	ctl_say_number(reply, "origin-requests", s.waiting);
}

/* Why a copy ended early, in buf; NULL if it did not. */
static const char *copy_error(const struct copy_status *s, char *buf, size_t size)
{
	if (s->state == COPY_RUNNING || s->state == COPY_DONE)
		return NULL;
	if (s->state == COPY_IDLE)
		return "the copy was stopped";
	if (s->error)
		snprintf(buf, size, "cannot copy: %s", strerror(s->error));
	else
		snprintf(buf, size, "%llu blocks could not be copied",
			 (unsigned long long)s->failed_blocks);
	return buf;
}

static void query_copy(struct ctl_reply *reply)
{
	static const char *const name[] = { [COPY_IDLE] = "idle", [COPY_RUNNING] = "running",
					    [COPY_DONE] = "done", [COPY_FAILED] = "failed" };
	static struct copy_status s;
	char error[128];

	copy_status(cache_copy(proxy.backend), &s);
	ctl_say(reply, "copy", "%s", name[s.state]);
	ctl_say_number(reply, "copy-rate", s.rate);
	ctl_say_number(reply, "copy-failed-blocks", s.failed_blocks);
	if (s.state == COPY_FAILED)
		ctl_say(reply, "copy-error", "%s", copy_error(&s, error, sizeof(error)));
}

void proxy_query(struct ctl_reply *reply)
{
	if (!proxy.backend)
		return;
	ctl_say(reply, "bitmap", "%s", proxy.bitmap);
	query_origin(reply);
	query_blocks(reply);
	query_requests(reply);
	query_copy(reply);
}

/* Copy */

static void copied(void)
{
	atomic_store(&proxy.copy_ended, true);
	proxy.wake();
}

static void start_copy(unsigned blocks)
{
	copy_start(cache_copy(proxy.backend), (uint64_t)blocks * BLOCK_SIZE);
}

static void release_copy(void)
{
	copy_release(cache_copy(proxy.backend));
}

static void tell_copy(struct ctl_copy *copy)
{
	static struct copy_status s;
	static struct ctl_range range[COPY_FAILURES];
	static char error[128];
	struct cache_status blocks;

	copy_status(cache_copy(proxy.backend), &s);
	cache_status(proxy.backend, &blocks);
	for (unsigned i = 0; i < s.failures; i++)
		range[i] = (struct ctl_range){ s.failure[i].off, s.failure[i].len };
	*copy = (struct ctl_copy){
		.running = s.state == COPY_RUNNING,
		.cached = blocks.held,
		.blocks = blocks.blocks,
		.rate = s.rate,
		.error = copy_error(&s, error, sizeof(error)),
		.failures = s.failures,
		.failed = range,
		.failures_more = s.failures_more,
	};
}

/* Reconnect */

/* The origin's thread, or ours. */
static void reconnected(void *unused, const char *error)
{
	(void)unused;
	snprintf(proxy.reconnect_error, sizeof(proxy.reconnect_error), "%s", error ? error : "");
	atomic_store(&proxy.reconnect_done, true);
	proxy.wake();
}

static const char *reconnect(const char *host, const char *port, const char *export_name)
{
	if (proxy.step == SWITCHED)
		return "this is a target, it has no origin";
	origin_redirect(cache_origin(proxy.backend), host, port, export_name, reconnected, NULL);
	return NULL;
}

/* Switch */

/* Any thread. */
static void step_ended(int error)
{
	proxy.error = error;
	atomic_store(&proxy.step_done, true);
	proxy.wake();
}

static void committed(struct request *r)
{
	step_ended(r->error);
}

static void begin_completing(void)
{
	proxy.step = COMPLETING;
	proxy.commit = (struct request){
		.backend = proxy.backend,
		.done = committed,
		.h.cmd = NBD_CMD_FLUSH,
	};
	cache_complete(proxy.backend, &proxy.commit);
}

static void zero_missing(struct job *job)
{
	(void)job;
	step_ended(-cache_zero_missing(proxy.backend, &proxy.zeroed));
}

static const char *switch_over(bool force)
{
	static char why[128];
	struct cache_status s;
	unsigned share;

	if (proxy.step == SWITCHED)
		return "this is a target already";
	if (proxy.step != NO_SWITCH)
		return NULL;
	cache_status(proxy.backend, &s);
	share = per_mille(s.held, s.blocks);
	if (s.held < s.blocks && !force) {
		snprintf(why, sizeof(why), "%llu of %llu blocks are not here yet (%u.%u %% are)",
			 (unsigned long long)(s.blocks - s.held), (unsigned long long)s.blocks,
			 share / 10, share % 10);
		return why;
	}
	log_line("switching to target mode");
	proxy.zeroed = 0;
	if (s.held == s.blocks) {
		begin_completing();
		return NULL;
	}
	copy_stop(cache_copy(proxy.backend));
	proxy.step = ZEROING;
	proxy.zero_job.run = zero_missing;
	worker_submit(&proxy.zero_job);
	return NULL;
}

static void report_switch(const char *error)
{
	if (error)
		log_error("cannot switch to target mode: %s", error);
	else if (proxy.zeroed)
		log_line("switched to target mode; %llu blocks were missing and read as zeros now",
			 (unsigned long long)proxy.zeroed);
	else
		log_line("switched to target mode; the origin is not needed any more");
	ctl_switched(proxy.ctl, error, proxy.zeroed);
}

static void fail_switch(int error)
{
	char why[128];

	snprintf(why, sizeof(why), "%s: %s",
		 proxy.step == ZEROING ? "cannot store zeros" : "cannot make the image durable",
		 strerror(error));
	proxy.step = NO_SWITCH;
	report_switch(why);
}

/* All blocks are held, so nobody needs the origin; those who wait for it will find the blocks. */
static void let_origin_go(void)
{
	origin_cancel(cache_origin(proxy.backend));
	proxy.step = SWITCHED;
	report_switch(NULL);
}

/* True if it has become a target. */
static bool tend_switch(void)
{
	struct cache_status s;

	if (!atomic_exchange(&proxy.step_done, false))
		return false;
	cache_status(proxy.backend, &s);
	if (proxy.error)
		fail_switch(proxy.error);
	else if (proxy.step == ZEROING)
		begin_completing();
	else if (s.held < s.blocks)
		fail_switch(EAGAIN);
	else
		let_origin_go();
	return proxy.step == SWITCHED;
}

bool proxy_tend(void)
{
	if (!proxy.backend)
		return false;
	if (atomic_exchange(&proxy.reconnect_done, false))
		ctl_reconnected(proxy.ctl,
				*proxy.reconnect_error ? proxy.reconnect_error : NULL);
	if (atomic_exchange(&proxy.copy_ended, false))
		ctl_copied(proxy.ctl);
	return tend_switch();
}

void proxy_switch(void)
{
	const char *error;

	if (!proxy.backend) {
		log_error("SIGUSR2 ignored: there is no proxy to switch");
		return;
	}
	error = switch_over(false);
	if (error)
		log_error("cannot switch to target mode: %s", error);
}

/* Life */

struct backend *proxy_open(const struct options *o, void (*wake)(void))
{
	const struct cache_options cache = { o->image, o->bitmap, o->clear_bitmap, o->readonly,
					     copied };
	const struct origin_options remote = {
		.host = o->host,
		.port = o->port,
		.export_name = o->export_name,
		.connections = (unsigned)o->origin_connections,
		.timeout_ms = (unsigned)o->origin_timeout * 1000,
	};
	struct origin *origin;

	proxy.options = o;
	proxy.wake = wake;
	proxy.bitmap = absolute_path(o->bitmap);
	if (!proxy.bitmap) {
		log_failure("cannot start: out of memory");
		return NULL;
	}
	origin = origin_open(&remote);
	proxy.backend = origin ? cache_open(&cache, origin) : NULL;
	return proxy.backend;
}

bool proxy_is_one(void)
{
	return proxy.backend && proxy.step != SWITCHED;
}

const struct ctl_proxy_ops *proxy_ops(void)
{
	static const struct ctl_proxy_ops ops = {
		.switch_over = switch_over,
		.reconnect = reconnect,
		.start_copy = start_copy,
		.release_copy = release_copy,
		.copy = tell_copy,
	};

	return proxy.backend ? &ops : NULL;
}

void proxy_serve(struct export *e, struct ctl *ctl)
{
	struct origin_status origin;

	if (!proxy.backend)
		return;
	proxy.export = e;
	proxy.ctl = ctl;
	e->load.requests_max = proxy.options->max_queue_size;
	e->load.bytes_max = proxy.options->max_buf_size < SIZE_MAX ?
				    (size_t)proxy.options->max_buf_size :
				    SIZE_MAX;
	origin_status(cache_origin(proxy.backend), &origin);
	log_line("origin %s: connected, %llu bytes", origin.address,
		 (unsigned long long)proxy.backend->size);
}

bool proxy_start(void)
{
	return !proxy.backend || origin_start(cache_origin(proxy.backend));
}

struct disk *proxy_disk(void)
{
	return proxy.backend ? cache_disk(proxy.backend) : NULL;
}

void proxy_stop(void)
{
	proxy.ctl = NULL;
	if (!proxy.backend)
		return;
	copy_stop(cache_copy(proxy.backend));
	cache_stop_zeroing(proxy.backend);
}

void proxy_give_up(void)
{
	if (proxy.backend)
		origin_cancel(cache_origin(proxy.backend));
}

void proxy_end(void)
{
	if (proxy.backend)
		origin_end(cache_origin(proxy.backend));
	free(proxy.bitmap);
	proxy.bitmap = NULL;
}
