/*
 * small.c - compares the functions of ../small.c with those of the C library.  They are compiled
 * into this program under other names.  Prints what differs, and "compared N".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int small_vfprintf(FILE *f, const char *fmt, va_list ap);
unsigned long small_strtoul(const char *s, char **end, int base);
unsigned long long small_strtoull(const char *s, char **end, int base);
int small_getopt_long(int argc, char *const *argv, const char *shorts, const struct option *o,
		      int *index);
void small_qsort(void *base, size_t count, size_t width, int (*f)(const void *, const void *));
char *small_strstr(const char *s, const char *part);
size_t small_mbstowcs(wchar_t *to, const char *s, size_t room);
struct tm *small_gmtime_r(const time_t *t, struct tm *tm);
extern char *small_optarg;
extern int small_optind, small_optopt;

static unsigned long compared;

static void check(bool same, const char *what, const char *with)
{
	compared++;
	if (!same)
		printf("%s: differs for '%s'\n", what, with);
}

__attribute__((format(printf, 1, 2))) static void format(const char *fmt, ...)
{
	char wanted[300] = "", *made = NULL;
	size_t len;
	FILE *f = open_memstream(&made, &len);
	va_list ap;
	int n, m;

	va_start(ap, fmt);
	n = vsnprintf(wanted, sizeof(wanted), fmt, ap);
	va_end(ap);
	va_start(ap, fmt);
	m = small_vfprintf(f, fmt, ap);
	va_end(ap);
	fclose(f);
	check(n == m && strcmp(wanted, made) == 0, "printf", fmt);
	free(made);
}

static void formats(void)
{
	const int numbers[] = { 0, 1, -1, 9, -10, 12345, -2147483647 - 1, 2147483647 };

	for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
		int n = numbers[i];

		format("%d %u %x %c%%", n, (unsigned)n, (unsigned)n, 'a' + n % 20);
		format("[%5d] [%-5d] [%05d] [%02d]", n, n, n, n);
		format("[%8x] [%02u] [%-3u]", (unsigned)n, (unsigned)n, (unsigned)n);
		format("%ld %lu %lx", (long)(n * 100000UL), n * 100000UL, (unsigned long)n);
		format("%lld %llu %llx", n * 4000000000LL, n * 4000000000ULL, n * 99999ULL);
		format("%zu %jd %hu", (size_t)n, (__INTMAX_TYPE__)n, (unsigned short)(n & 0x7fff));
	}
	format("%s|%10s|%-10s|%.2s|%.*s|%*s|", "abc", "abc", "abc", "abc", 1, "abc", 5, "abc");
	format("%.0s%.9s%s", "abc", "abc", "");
	format("plain");
	format("%s", "");
	format("%% %d%s%%%s", 1, "a", "b");
}

/* The number, how much of the text it took, and the error. */
static void number(const char *s, int base)
{
	char *end, *small_end;
	unsigned long long n, m;
	int err;

	errno = 0;
	n = strtoull(s, &end, base);
	err = errno;
	errno = 0;
	m = small_strtoull(s, &small_end, base);
	check(n == m && end == small_end && err == errno, "strtoull", s);
	errno = 0;
	n = strtoul(s, &end, base);
	err = errno;
	errno = 0;
	m = small_strtoul(s, &small_end, base);
	check(n == m && end == small_end && err == errno, "strtoul", s);
}

static void numbers(void)
{
	static const char *const all[] = {
		"0", "00", "7", "10", "010", "0x10", "0X1f", "0x", "0xg", "x", "", " 5", "+5", "-5",
		"18446744073709551615", "18446744073709551616", "4294967296", "99999999999999999999",
		"12 ", "12k", "1.2", "-", "-99999999999999999999", "zz", "1F", "08", "\t\n7"
	};
	const int bases[] = { 0, 8, 10, 16, 36 };

	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
		for (size_t b = 0; b < sizeof(bases) / sizeof(*bases); b++)
			number(all[i], bases[b]);
}

/* What getopt_long() makes of a command line: what it returned and left, in one text. */
static void parse(char *out, int argc, char *const *given, bool small)
{
	static const struct option known[] = { { "target", no_argument, NULL, 256 },
					       { "target-name", required_argument, NULL, 257 },
					       { "lport", required_argument, NULL, 258 },
					       { "laddr", required_argument, NULL, 259 },
					       { 0 } };
	char *argv[10] = { 0 };
	int found;

	memcpy(argv, given, (size_t)argc * sizeof(*argv));
	opterr = 0;
	optind = 0;	/* the C library's way to begin again */
	small_optind = 1;
	*out = '\0';
	do {
		found = (small ? small_getopt_long : getopt_long)(argc, argv, ":", known, NULL);
		sprintf(out + strlen(out), "%d %s %d;", found,
			found > 256 ? (small ? small_optarg : optarg) : "",
			found == '?' || found == ':' ? (small ? small_optopt : optopt) : 0);
	} while (found > 255);
	for (int i = small ? small_optind : optind; found == -1 && i < argc; i++)
		sprintf(out + strlen(out), " %s", argv[i]);
}

static void command_lines(void)
{
	static char *const all[][10] = {
		{ "x", "--target", "a" }, { "x", "a", "--target", "b" }, { "x", "--targ", "a" },
		{ "x", "--target-n", "n", "a" }, { "x", "--lport=5", "a", "--laddr", "b", "c" },
		{ "x", "--l", "5" }, { "x", "--lport" }, { "x", "a", "--lport" }, { "x", "--target=1" },
		{ "x", "--lport=", "a" }, { "x", "a", "--", "--target" }, { "x", "--" }, { "x", "-" },
		{ "x", "-q" }, { "x", "a", "-q", "b" }, { "x", "--nothing" }, { "x", "--nothing=1" },
		{ "x" }, { "x", "a", "b", "--laddr", "--", "c", "--lport", "-1", "d" },
		{ "x", "", "--lp", "" },
	};
	char wanted[1000], made[1000];

	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) {
		int argc = 0;

		while (argc < 10 && all[i][argc])
			argc++;
		parse(wanted, argc, all[i], false);
		parse(made, argc, all[i], true);
		check(strcmp(wanted, made) == 0, "getopt_long", all[i][1] ? all[i][1] : "nothing");
	}
}

static int by_number(const void *a, const void *b)
{
	return *(const int *)a < *(const int *)b ? -1 : *(const int *)a > *(const int *)b;
}

static void sort(void)
{
	for (size_t count = 0; count < 50; count++) {
		int a[50][3], b[50][3];

		for (size_t i = 0; i < count; i++)
			for (int j = 0, n = rand() % 100; j < 3; j++)
				a[i][j] = b[i][j] = n;
		qsort(a, count, sizeof(*a), by_number);
		small_qsort(b, count, sizeof(*b), by_number);
		check(memcmp(a, b, count * sizeof(*a)) == 0, "qsort", "random numbers");
	}
}

static void texts(void)
{
	static const char *const all[] = { "", "a", "b", "ab", "aab", "abab", "aabaab",
					   "localhost", "host" };

	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) {
		wchar_t wide[4] = { 9, 9, 9, 9 };

		for (size_t j = 0; j < sizeof(all) / sizeof(*all); j++)
			check(strstr(all[i], all[j]) == small_strstr(all[i], all[j]), "strstr", all[i]);
		check(strlen(all[i]) == small_mbstowcs(NULL, all[i], 0), "mbstowcs", all[i]);
		check((strlen(all[i]) < 4 ? strlen(all[i]) : 4) == small_mbstowcs(wide, all[i], 4) &&
		      wide[0] == all[i][0], "mbstowcs", all[i]);
	}
}

static void times(void)
{
	for (long long t = -62000000000; t < 70000000000; t += 12345677) {
		struct tm wanted, made;
		time_t now = (time_t)t;
		char text[40];

		gmtime_r(&now, &wanted);
		small_gmtime_r(&now, &made);
		snprintf(text, sizeof(text), "%lld", t);
		check(wanted.tm_year == made.tm_year && wanted.tm_mon == made.tm_mon &&
		      wanted.tm_mday == made.tm_mday && wanted.tm_hour == made.tm_hour &&
		      wanted.tm_min == made.tm_min && wanted.tm_sec == made.tm_sec, "gmtime_r", text);
	}
}

int main(void)
{
	formats();
	numbers();
	command_lines();
	sort();
	texts();
	times();
	printf("compared %lu\n", compared);
	return 0;
}
