/*
 * writer: writes numbered blocks to a device and reads them again, one request at a time, and
 * measures how long a request takes.
 *
 *	writer DEVICE FIRST BLOCKS
 *
 * works on BLOCKS blocks from block FIRST on.  Request k, from 1 on, writes k to one of them, so
 * that each block is written after BLOCKS requests, and the next one reads another block, which
 * must hold what was written there last.  In a block stands, again and again, which of the
 * BLOCKS it is, and which request wrote it; 0 is what the disk was filled with before.
 *
 * SIGUSR1 begins a phase: "begun" tells that its first requests, which may have had to wait for
 * whoever sent the signal, are over.  A line says how long the one before took.  SIGTERM ends it:
 * all blocks are read and compared, and "written N" tells how many were written.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define WRITE_STRIDE 7919	/* prime, and test_migration.py knows it */
#define READ_STRIDE 104729

enum { BLOCK = 4096, LINE = 16, NOT_COUNTED = 50, AT_ONCE = 64 };

static int fd;
static unsigned long first, blocks, *numbers;
static char *buf;
static unsigned long phase_requests, phase_total, phase_longest;	/* times in microseconds */
static volatile sig_atomic_t next_phase, stop;

static void die(const char *what, unsigned long block)
{
	printf("block %lu: %s\n", block, what);
	exit(1);
}

static unsigned long now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (unsigned long)t.tv_sec * 1000000 + (unsigned long)t.tv_nsec / 1000;
}

static void took(unsigned long us)
{
	if (++phase_requests == NOT_COUNTED)
		puts("begun");
	if (phase_requests <= NOT_COUNTED || stop)
		return;
	phase_total += us;
	if (us > phase_longest)
		phase_longest = us;
}

static void end_phase(void)
{
	unsigned long n = phase_requests > NOT_COUNTED ? phase_requests - NOT_COUNTED : 0;

	printf("phase: %lu requests, mean %lu us, longest %lu us\n", n,
		n ? phase_total / n : 0, phase_longest);
	phase_requests = phase_total = phase_longest = 0;
}

static off_t position(unsigned long block)
{
	return (off_t)(first + block) * BLOCK;
}

/* What stands in a block, LINE bytes of it. */
static void describe(char *line, size_t size, unsigned long block)
{
	snprintf(line, size, "%07lu %07lu\n", block, numbers[block]);
}

static void write_block(unsigned long block, unsigned long number)
{
	char line[64];
	unsigned long began;

	numbers[block] = number;
	describe(line, sizeof(line), block);
	for (int at = 0; at < BLOCK; at += LINE)
		memcpy(buf + at, line, LINE);
	began = now_us();
	if (pwrite(fd, buf, BLOCK, position(block)) != BLOCK)
		die(strerror(errno), block);
	took(now_us() - began);
}

static void check_block(const char *data, unsigned long block)
{
	char line[64];

	describe(line, sizeof(line), block);
	for (int at = 0; at < BLOCK; at += LINE) {
		if (memcmp(data + at, line, LINE)) {
			printf("byte %d: expected %.*s, found %.*s\n", at, LINE - 1, line,
				LINE - 1, data + at);
			die("wrong data", block);
		}
	}
}

/* By one request. */
static void read_blocks(unsigned long block, unsigned long count)
{
	unsigned long began = now_us();

	if (pread(fd, buf, count * BLOCK, position(block)) != (ssize_t)count * BLOCK)
		die(strerror(errno), block);
	took(now_us() - began);
	for (unsigned long i = 0; i < count; i++)
		check_block(buf + i * BLOCK, block + i);
}

static void read_all(void)
{
	unsigned long n;

	for (unsigned long block = 0; block < blocks; block += n) {
		n = blocks - block < AT_ONCE ? blocks - block : AT_ONCE;
		read_blocks(block, n);
	}
}

static void on_signal(int number)
{
	if (number == SIGUSR1)
		next_phase = 1;
	else
		stop = 1;
}

int main(int argc, char **argv)
{
	unsigned long k;

	if (argc != 4)
		return 2;
	first = strtoul(argv[2], NULL, 10);
	blocks = strtoul(argv[3], NULL, 10);
	numbers = calloc(blocks, sizeof(*numbers));
	fd = open(argv[1], O_RDWR | O_DIRECT | O_DSYNC);
	if (fd < 0 || !numbers || posix_memalign((void **)&buf, BLOCK, AT_ONCE * BLOCK))
		die(argv[1], 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	signal(SIGUSR1, on_signal);
	signal(SIGTERM, on_signal);
	for (k = 1; !stop; k++) {
		write_block(k * WRITE_STRIDE % blocks, k);
		read_blocks(k * READ_STRIDE % blocks, 1);
		if (next_phase) {
			next_phase = 0;
			end_phase();
		}
	}
	end_phase();
	read_all();
	printf("written %lu\n", k - 1);
	return 0;
}
