/*
 * watch.c - xnbd-bgctl --watch: what clients do, again and again.
 *
 * Each look is a query, over a connection of its own; rates are the differences between two of them.
 * On a terminal a frame is drawn over the one before, by a single write(); elsewhere each look is a
 * line.
 */
#define _GNU_SOURCE
#include "bgctl.h"

#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	FIRST_MS = 200,			/* to the second look on a terminal, which has no rates before */
	DELAYS_MAX = 256,		/* more steps than a server has */
	TEXT_MAX = 160,
};

/* What is shown of a client, or of all. */
struct counters {
	uint64_t reads, writes, flushes, others, read_bytes, written_bytes, errors, in_flight, p99;
};

struct seen {
	char address[TEXT_MAX];
	struct counters now, since;	/* since the look before */
};

/* One look. */
struct look {
	uint64_t at;			/* now_ms() */
	char mode[TEXT_MAX], image[TEXT_MAX], cached[TEXT_MAX], copy[TEXT_MAX], origin[TEXT_MAX],
		link[TEXT_MAX], snapshot[TEXT_MAX];
	uint64_t size, uptime, clients, pending, copy_rate;
	struct counters all;
	uint64_t top[DELAYS_MAX], delays[DELAYS_MAX];	/* us; how many */
	size_t steps;
	struct seen *client;
	size_t count, room;
};

static const struct field {
	const char *name;
	size_t text, number;		/* of struct look, 0 for none ... */
	size_t counter;			/* ... of struct counters, plus 1 */
} fields[] = {
#define TEXT(name, field) { name, offsetof(struct look, field), 0, 0 }
#define NUMBER(name, field) { name, 0, offsetof(struct look, field), 0 }
#define COUNTER(name, field) { name, 0, 0, 1 + offsetof(struct counters, field) }
	TEXT("mode", mode),
	TEXT("image", image),
	TEXT("cached-percent", cached),
	TEXT("copy", copy),
	TEXT("origin", origin),
	TEXT("origin-link", link),
	TEXT("snapshot", snapshot),
	NUMBER("size", size),
	NUMBER("uptime", uptime),
	NUMBER("clients", clients),
	NUMBER("pending-requests", pending),
	NUMBER("copy-rate", copy_rate),
	COUNTER("reads", reads),
	COUNTER("writes", writes),
	COUNTER("flushes", flushes),
	COUNTER("others", others),
	COUNTER("read-bytes", read_bytes),
	COUNTER("written-bytes", written_bytes),
	COUNTER("errors", errors),
	COUNTER("in-flight", in_flight),
	COUNTER("p99-us", p99),
#undef TEXT
#undef NUMBER
#undef COUNTER
};

/* A look at the server */

static void take_counter(struct counters *c, const char *name, const char *value)
{
	for (size_t i = 0; i < ARRAY_SIZE(fields); i++)
		if (fields[i].counter && strcmp(fields[i].name, name) == 0)
			*(uint64_t *)((char *)c + fields[i].counter - 1) = strtoull(value, NULL, 10);
}

static void take_field(struct look *l, const char *name, const char *value)
{
	for (size_t i = 0; i < ARRAY_SIZE(fields); i++) {
		const struct field *f = &fields[i];

		if (strcmp(f->name, name) != 0)
			continue;
		if (f->text)
			snprintf((char *)l + f->text, TEXT_MAX, "%s", value);
		else if (f->number)
			*(uint64_t *)((char *)l + f->number) = strtoull(value, NULL, 10);
	}
	take_counter(&l->all, name, value);
}

/* "4:17 5:3" */
static void take_delays(struct look *l, const char *value)
{
	char *end;

	for (l->steps = 0; *value && l->steps < DELAYS_MAX; l->steps++) {
		l->top[l->steps] = strtoull(value, &end, 10);
		if (*end != ':')
			return;
		l->delays[l->steps] = strtoull(end + 1, &end, 10);
		value = *end ? end + 1 : end;
	}
}

static void take_client(struct look *l, char *value)
{
	char *pairs = split_name(value, " reads ");
	const char *name, *number;
	struct seen *seen;

	if (l->count == l->room) {
		l->room = l->room ? 2 * l->room : 16;
		l->client = realloc(l->client, l->room * sizeof(*l->client));
		if (!l->client)
			fail("out of memory");
	}
	seen = &l->client[l->count++];
	*seen = (struct seen){ 0 };
	snprintf(seen->address, sizeof(seen->address), "%s", value);
	while (next_pair(&pairs, &name, &number))
		take_counter(&seen->now, name, number);
}

static void look_at(struct server *s, struct look *l)
{
	struct seen *client = l->client;
	size_t room = l->room;
	const char *name, *value;

	*l = (struct look){ .client = client, .room = room };
	s->used = s->len = 0;
	s->deadline = now_ms() + ANSWER_MS;
	connect_to(s, s->path);
	send_line(s, "query\n", strlen("query\n"));
	for (unsigned lines = 0; (name = next_value(s, &value)); lines++) {
		if (lines == ANSWER_LINES_MAX)
			fail("%s: the server's answer is too long", s->path);
		if (strcmp(name, "client") == 0)
			take_client(l, (char *)(uintptr_t)value);
		else if (strcmp(name, "delays-us") == 0)
			take_delays(l, value);
		else
			take_field(l, name, value);
	}
	close(s->fd);
	s->known = true;
	l->at = now_ms();
}

/* Differences */

/* What is less than before belongs to another server, or client. */
static struct counters since(const struct counters *now, const struct counters *before)
{
	struct counters d = *now;
	const uint64_t *b = (const uint64_t *)before;
	uint64_t *n = (uint64_t *)&d;

	for (size_t i = 0; i < offsetof(struct counters, in_flight) / sizeof(*n); i++)
		n[i] = n[i] >= b[i] ? n[i] - b[i] : n[i];
	return d;
}

static uint64_t requests(const struct counters *c)
{
	return c->reads + c->writes + c->flushes + c->others;
}

/* Who was there before, and stands at about the same place. */
static const struct counters *find(const struct look *l, const char *address, size_t *at)
{
	static const struct counters none;

	for (size_t i = 0; i < l->count; i++) {
		size_t n = (*at + i) % l->count;

		if (strcmp(l->client[n].address, address) == 0) {
			*at = n + 1;
			return &l->client[n].now;
		}
	}
	return &none;
}

static int by_requests(const void *a, const void *b)
{
	uint64_t n = requests(&((const struct seen *)a)->since);
	uint64_t m = requests(&((const struct seen *)b)->since);

	return n < m ? 1 : n > m ? -1 : 0;
}

static void compare_clients(struct look *l, const struct look *before)
{
	size_t at = 0;

	for (size_t i = 0; i < l->count; i++) {
		struct seen *c = &l->client[i];

		c->since = since(&c->now, find(before, c->address, &at));
	}
}

/* How many requests took up to that long by the look before. */
static uint64_t delays_before(const struct look *before, uint64_t top)
{
	for (size_t i = 0; i < before->steps; i++)
		if (before->top[i] == top)
			return before->delays[i];
	return 0;
}

/* Of the requests since the look before: such as "140 us", or "-" if there were none. */
static void percentile(const struct look *l, const struct look *before, char *text, size_t size)
{
	uint64_t n = 0, seen = 0, delays[DELAYS_MAX];
	size_t i;

	for (i = 0; i < l->steps; i++) {
		delays[i] = l->delays[i] - delays_before(before, l->top[i]);
		n += delays[i];
	}
	snprintf(text, size, "-");
	for (i = 0; i < l->steps && n > 0; i++) {
		seen += delays[i];
		if (seen >= n - n / 100)
			break;
	}
	if (i < l->steps && n > 0)
		snprintf(text, size, "%" PRIu64 " us", l->top[i]);
}

/* A second's share of n in ms milliseconds, rounded. */
static uint64_t per_second(uint64_t n, uint64_t ms)
{
	if (ms == 0)
		ms = 1;
	return n < UINT64_MAX / 2000 ? (n * 1000 + ms / 2) / ms : n / ms * 1000;
}

enum { MIB_TEXT = 24 };

/* Bytes as MiB with one decimal, in text of MIB_TEXT bytes. */
static const char *mib(uint64_t bytes, char *text)
{
	uint64_t tenths = bytes / 1024 * 10 / 1024 + (bytes / 1024 * 10 % 1024 >= 512);

	snprintf(text, MIB_TEXT, "%" PRIu64 ".%u", tenths / 10, (unsigned)(tenths % 10));
	return text;
}

/* Lines */

static void print_rates(FILE *out, const struct look *l, const struct look *before)
{
	struct counters d = since(&l->all, &before->all);
	uint64_t ms = l->at - before->at;
	char p99[32], read[MIB_TEXT], written[MIB_TEXT];

	percentile(l, before, p99, sizeof(p99));
	fprintf(out, "%" PRIu64 " requests/s, %s MiB/s read, %s MiB/s written, p99 %s",
		per_second(requests(&d), ms), mib(per_second(d.read_bytes, ms), read),
		mib(per_second(d.written_bytes, ms), written), p99);
}

static void print_line(const struct look *l, const struct look *before)
{
	print_rates(stdout, l, before);
	printf(", %" PRIu64 " clients, %" PRIu64 " errors", l->clients, l->all.errors);
	if (*l->cached)
		printf(", %s %% cached", l->cached);
	putchar('\n');
	if (fflush(stdout) != 0)
		exit(EXIT_FAILURE);
}

/* Frames */

static void print_size(FILE *out, uint64_t bytes)
{
	static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB" };
	size_t i = 0;

	for (; bytes >= 10240 && i + 1 < ARRAY_SIZE(units); bytes >>= 10)
		i++;
	fprintf(out, "%" PRIu64 " %s", bytes, units[i]);
}

static void print_head(FILE *out, const struct look *l, const struct look *before)
{
	char copied[MIB_TEXT];

	fprintf(out, "%s  ", l->mode);
	if (*l->image) {	/* of several exports there is none to be named */
		fprintf(out, "%s  ", l->image);
		print_size(out, l->size);
		fputs("  ", out);
	}
	fprintf(out, "up %" PRIu64 ":%02u:%02u\n", l->uptime / 3600,
		(unsigned)(l->uptime / 60 % 60), (unsigned)(l->uptime % 60));
	print_rates(out, l, before);
	fprintf(out, "\n%" PRIu64 " clients, %" PRIu64 " requests in flight, %" PRIu64 " errors",
		l->clients, l->pending, l->all.errors);
	if (*l->snapshot && strcmp(l->snapshot, "idle") != 0)
		fprintf(out, ", snapshot %s", l->snapshot);
	fputc('\n', out);
	if (*l->cached)
		fprintf(out, "%s %% cached, copy %s, %s MiB/s, origin %s %s\n", l->cached, l->copy,
			mib(l->copy_rate, copied), l->origin, l->link);
}

static void print_clients(FILE *out, const struct look *l, uint64_t ms)
{
	fprintf(out, "\n%-24s %10s %10s %10s %9s %9s %7s\n", "CLIENT", "REQUESTS/S", "READ MIB/S",
		"WRITE MIB/S", "IN FLIGHT", "P99 US", "ERRORS");
	for (size_t i = 0; i < l->count; i++) {
		const struct seen *c = &l->client[i];
		char read[MIB_TEXT], written[MIB_TEXT];

		fprintf(out, "%-24s %10" PRIu64 " %10s %11s %9" PRIu64 " %9" PRIu64 " %7" PRIu64 "\n",
			c->address, per_second(requests(&c->since), ms),
			mib(per_second(c->since.read_bytes, ms), read),
			mib(per_second(c->since.written_bytes, ms), written), c->now.in_flight,
			c->now.p99, c->now.errors);
	}
}

/* Bytes of text that fit into room columns, without a part of a character at the end. */
static size_t cut(const char *text, size_t len, size_t room)
{
	if (len <= room)
		return len;
	while (room > 0 && ((unsigned char)text[room] & 0xc0) == 0x80)
		room--;
	return room;
}

/* As many of its lines as there are on the terminal, each as long as fits. */
static void draw(const char *text)
{
	size_t width = terminal_width(STDOUT_FILENO) - 1, rows = terminal_height(STDOUT_FILENO);
	char *frame = NULL;
	size_t len = 0;
	FILE *out = open_memstream(&frame, &len);

	if (!out)
		fail("out of memory");
	fputs("\033[H", out);
	for (size_t row = 1; *text && (row < rows || row == 1); row++) {
		size_t line = strcspn(text, "\n");

		fwrite(text, 1, cut(text, line, width), out);
		fputs("\033[K\n", out);
		text += line + 1;
	}
	fputs("\033[J", out);
	if (fclose(out) != 0)
		fail("out of memory");
	for (size_t at = 0; at < len;) {
		ssize_t n = write(STDOUT_FILENO, frame + at, len - at);

		if (n < 0)
			exit(EXIT_FAILURE);
		at += (size_t)n;
	}
	free(frame);
}

static void draw_frame(struct look *l, const struct look *before)
{
	char *text = NULL;
	size_t len = 0;
	FILE *out = open_memstream(&text, &len);

	if (!out)
		fail("out of memory");
	print_head(out, l, before);
	compare_clients(l, before);
	if (l->count > 0)
		qsort(l->client, l->count, sizeof(*l->client), by_requests);
	print_clients(out, l, l->at - before->at);
	if (fclose(out) != 0)
		fail("out of memory");
	draw(text);
	free(text);
}

/* From the beginning to the end */

static const char cursor_off[] = "\033[?25l\033[2J", cursor_on[] = "\033[?25h";

static void say(const char *text, size_t len)
{
	if (write(STDOUT_FILENO, text, len) < 0)
		_exit(EXIT_FAILURE);
}

static void show_cursor(void)
{
	say(cursor_on, strlen(cursor_on));
}

/* Ctrl-C is the way to end this; by another signal we end as if there were no handler. */
static void on_signal(int sig)
{
	if (isatty(STDOUT_FILENO))
		show_cursor();
	if (sig == SIGINT)
		_exit(EXIT_SUCCESS);
	signal(sig, SIG_DFL);
	raise(sig);
}

static void catch_signals(void)
{
	static const int ends[] = { SIGINT, SIGTERM, SIGHUP };

	for (size_t i = 0; i < ARRAY_SIZE(ends); i++)
		signal(ends[i], on_signal);
}

static void clear_screen(void)
{
	say(cursor_off, strlen(cursor_off));
	atexit(show_cursor);
}

static void sleep_until(uint64_t at)
{
	uint64_t now;

	while ((now = now_ms()) < at)
		poll(NULL, 0, (int)(at - now));
}

void watch(struct server *s, unsigned seconds)
{
	static struct look looks[2];
	bool terminal = isatty(STDOUT_FILENO);
	unsigned ms = seconds * 1000;
	uint64_t next;

	catch_signals();		/* a server that is slow to answer is left as well */
	look_at(s, &looks[0]);
	if (terminal)
		clear_screen();		/* not before: why it cannot be looked at stands there */
	next = now_ms() + (terminal ? FIRST_MS : ms);
	for (unsigned i = 1;; i ^= 1) {
		sleep_until(next);
		next = now_ms() + ms;
		look_at(s, &looks[i]);
		if (terminal)
			draw_frame(&looks[i], &looks[i ^ 1]);
		else
			print_line(&looks[i], &looks[i ^ 1]);
	}
}
