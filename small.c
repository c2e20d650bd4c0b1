/*
 * small.c - in the small static programs, the place of those functions of musl whose full form
 * takes much room for what these programs, and musl itself, use of it.
 *
 * The linker takes them instead of what is in the archive, also for calls that come from there
 * (getaddrinfo(), inet_ntop()).  Each does what the C standard or POSIX says of it, in the C
 * locale, which the programs never leave; but printf() knows no floating point, no wide
 * characters and no positions, and getopt_long() no short options.  Not part of other builds.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* printf() */

struct conversion {
	bool left;		/* '-' */
	char fill;		/* ' ' or, for numbers, '0' */
	int width, precision;	/* -1: no precision */
	int longs;		/* 0: int, 1: long, 2: long long */
};

static int put_fill(FILE *f, char fill, int n)
{
	for (int i = 0; i < n; i++)
		fwrite(&fill, 1, 1, f);
	return n > 0 ? n : 0;
}

static int put_text(FILE *f, const struct conversion *c, const char *s, size_t len)
{
	int n = (int)len, fill = c->width - n;

	if (!c->left)
		n += put_fill(f, c->fill, fill);
	fwrite(s, 1, len, f);
	if (c->left)
		n += put_fill(f, ' ', fill);
	return n;
}

/* The sign of a number that is filled with zeros stands before them. */
static int put_number(FILE *f, struct conversion *c, uintmax_t value, unsigned base, bool minus)
{
	char digits[3 * sizeof(value) + 1], *s = digits + sizeof(digits);
	bool apart = minus && c->fill == '0';

	do
		*--s = "0123456789abcdef"[value % base];
	while (value /= base);
	if (apart) {
		fwrite("-", 1, 1, f);
		c->width--;
	} else if (minus) {
		*--s = '-';
	}
	return put_text(f, c, s, (size_t)(digits + sizeof(digits) - s)) + apart;
}

/* A number in the format, or an argument where there is '*'. */
static const char *take_count(const char *fmt, int *n, va_list *ap)
{
	if (*fmt == '*') {
		*n = va_arg(*ap, int);
		return fmt + 1;
	}
	for (*n = 0; isdigit((unsigned char)*fmt); fmt++)
		*n = *n * 10 + *fmt - '0';
	return fmt;
}

/* What stands between '%' and the letter; returns where that is. */
static const char *take_conversion(const char *fmt, struct conversion *c, va_list *ap)
{
	*c = (struct conversion){ .fill = ' ', .precision = -1 };
	for (; *fmt == '-' || *fmt == '0'; fmt++) {
		if (*fmt == '-')
			c->left = true;
		else
			c->fill = '0';
	}
	fmt = take_count(fmt, &c->width, ap);
	if (*fmt == '.')
		fmt = take_count(fmt + 1, &c->precision, ap);
	for (;; fmt++) {
		if (*fmt == 'l' || *fmt == 'z')
			c->longs++;
		else if (*fmt == 'j')
			c->longs = 2;
		else if (*fmt != 'h')
			return fmt;
	}
}

static uintmax_t take_unsigned(int longs, va_list *ap)
{
	_Static_assert(sizeof(size_t) == sizeof(long), "%zu is %lu");
	if (longs == 0)
		return va_arg(*ap, unsigned);
	return longs == 1 ? va_arg(*ap, unsigned long) : va_arg(*ap, unsigned long long);
}

static intmax_t take_signed(int longs, va_list *ap)
{
	if (longs == 0)
		return va_arg(*ap, int);
	return longs == 1 ? va_arg(*ap, long) : va_arg(*ap, long long);
}

static int put_signed(FILE *f, struct conversion *c, intmax_t n)
{
	return put_number(f, c, n < 0 ? -(uintmax_t)n : (uintmax_t)n, 10, n < 0);
}

static int put_string(FILE *f, const struct conversion *c, const char *s)
{
	if (!s)
		s = "(null)";
	return put_text(f, c, s, c->precision < 0 ? strlen(s) : strnlen(s, (size_t)c->precision));
}

static int convert(FILE *f, struct conversion *c, char letter, va_list *ap)
{
	char character;

	switch (letter) {
	case 's':
		return put_string(f, c, va_arg(*ap, const char *));
	case 'd':
		return put_signed(f, c, take_signed(c->longs, ap));
	case 'u':
		return put_number(f, c, take_unsigned(c->longs, ap), 10, false);
	case 'x':
		return put_number(f, c, take_unsigned(c->longs, ap), 16, false);
	case 'c':
		character = (char)va_arg(*ap, int);
		return put_text(f, c, &character, 1);
	case '%':
		return put_text(f, c, "%", 1);
	default:
		abort();	/* a format that is not for here: tests/test_small.py looks for them */
	}
}

int vfprintf(FILE *restrict f, const char *restrict fmt, va_list arguments)
{
	struct conversion c;
	va_list ap;
	int n = 0;

	va_copy(ap, arguments);
	while (*fmt) {
		size_t plain = strcspn(fmt, "%");

		fwrite(fmt, 1, plain, f);
		n += (int)plain;
		fmt += plain;
		if (*fmt) {
			fmt = take_conversion(fmt + 1, &c, &ap);
			n += convert(f, &c, *fmt++, &ap);
		}
	}
	va_end(ap);
	return ferror(f) ? -1 : n;
}

/* assert() comes here, see STATIC_CFLAGS in the Makefile. */

_Noreturn void assert_failed(const char *file, int line);

_Noreturn void assert_failed(const char *file, int line)
{
	dprintf(STDERR_FILENO, "Assertion at %s:%d failed\n", file, line);
	abort();
}

/* strtoul() */

static unsigned digit_of(char c)
{
	if (isdigit((unsigned char)c))
		return (unsigned)(c - '0');
	return isalpha((unsigned char)c) ? (unsigned)(c | 0x20) - 'a' + 10 : UINT_MAX;
}

static bool is_hex(const char *s)
{
	return s[0] == '0' && (s[1] | 0x20) == 'x' && digit_of(s[2]) < 16;
}

static unsigned long long scan(const char *s, char **end, int base, unsigned long long max)
{
	const char *from = s;
	unsigned long long n = 0;
	bool minus, over = false;
	unsigned digit;

	while (isspace((unsigned char)*s))
		s++;
	minus = *s == '-';
	s += *s == '-' || *s == '+';
	if ((base == 0 || base == 16) && is_hex(s)) {
		s += 2;
		base = 16;
	} else if (base == 0) {
		base = *s == '0' ? 8 : 10;
	}
	for (; (digit = digit_of(*s)) < (unsigned)base; from = ++s) {
		over = over || n > (max - digit) / (unsigned)base;
		n = n * (unsigned)base + digit;
	}
	if (end)
		*end = (char *)from;
	if (over)
		errno = ERANGE;
	return over ? max : minus ? -n : n;
}

unsigned long long strtoull(const char *restrict s, char **restrict end, int base)
{
	return scan(s, end, base, ULLONG_MAX);
}

unsigned long strtoul(const char *restrict s, char **restrict end, int base)
{
	return (unsigned long)scan(s, end, base, ULONG_MAX);
}

/* getopt_long() */

char *optarg;
int optind = 1, opterr, optopt;

/* Move a word before the operands that were passed over. */
static char *take_word(char **words, int from)
{
	char *word = words[from];

	memmove(words + optind + 1, words + optind, (size_t)(from - optind) * sizeof(*words));
	words[optind++] = word;
	return word;
}

/* The one of that name, or the only one whose name begins so. */
static const struct option *find_option(const struct option *o, const char *name, size_t len)
{
	const struct option *found = NULL;
	bool ambiguous = false;

	for (; o->name; o++) {
		if (strncmp(o->name, name, len) != 0)
			continue;
		if (!o->name[len])
			return o;
		ambiguous = found;
		found = o;
	}
	return ambiguous ? NULL : found;
}

int getopt_long(int argc, char *const *argv, const char *none, const struct option *longopts,
		int *index)
{
	char **words = (char **)argv, *word;
	const struct option *o;
	int at = optind;
	size_t len;

	(void)none, (void)index;
	while (at < argc && (words[at][0] != '-' || !words[at][1]))
		at++;
	if (at >= argc)
		return -1;
	word = take_word(words, at);
	optopt = word[1];
	if (word[1] != '-')
		return '?';
	if (!word[2])
		return -1;
	len = strcspn(word += 2, "=");
	o = find_option(longopts, word, len);
	optopt = o ? o->val : 0;
	if (!o || (word[len] && !o->has_arg))
		return '?';
	optarg = word[len] ? word + len + 1 : NULL;
	if (o->has_arg && !word[len]) {
		if (at + 1 >= argc)
			return ':';
		optarg = take_word(words, at + 1);
	}
	return o->val;
}

/* Others */

/* For the few addresses of a name. */
void qsort(void *base, size_t count, size_t width, int (*compare)(const void *, const void *))
{
	for (size_t i = 1; i < count; i++) {
		char *high = (char *)base + i * width;

		for (; high > (char *)base && compare(high - width, high) > 0; high -= width) {
			for (size_t byte = 0; byte < width; byte++) {
				char c = high[byte];

				high[byte] = high[byte - width];
				high[byte - width] = c;
			}
		}
	}
}

char *strstr(const char *s, const char *part)
{
	size_t len = strlen(part);

	for (; strncmp(s, part, len) != 0; s++)
		if (!*s)
			return NULL;
	return (char *)s;
}

/* In the C locale a byte is a character. */
size_t mbstowcs(wchar_t *restrict to, const char *restrict s, size_t room)
{
	size_t n = 0;

	if (!to)
		return strlen(s);
	while (n < room && (to[n] = (unsigned char)s[n]))
		n++;
	return n;
}

/*
 * Days are counted from 1 March of the year 0, so that a leap day is the last of its year.  The
 * time must not be before that; day of the week and of the year are left out.
 */
struct tm *gmtime_r(const time_t *restrict t, struct tm *restrict tm)
{
	enum { YEARS_4 = 4 * 365 + 1, YEARS_100 = 25 * YEARS_4 - 1, YEARS_400 = 4 * YEARS_100 + 1 };
	int second = (int)((*t % 86400 + 86400) % 86400);
	long long days = (*t - second) / 86400 + 719468;
	int day = (int)(days % YEARS_400), year, month;

	year = (day - day / (YEARS_4 - 1) + day / YEARS_100 - day / (YEARS_400 - 1)) / 365;
	day -= 365 * year + year / 4 - year / 100;
	month = (5 * day + 2) / 153;
	*tm = (struct tm){ .tm_hour = second / 3600,
			   .tm_min = second / 60 % 60,
			   .tm_sec = second % 60,
			   .tm_mday = day - (153 * month + 2) / 5 + 1,
			   .tm_mon = (month + 2) % 12,
			   .tm_year = (int)(days / YEARS_400) * 400 + year + (month >= 10) - 1900 };
	return tm;
}
