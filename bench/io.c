/*
 * Disk benchmark of the guest: io DEVICE SECONDS NAME
 * Prints "RATE io_NAME_TEST MB/S" for reading and writing, in sequence (1 MB, 4 at a time) and at random (4 KB, one
 * and 32 at a time), by Linux's asynchronous direct I/O.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_DEPTH = 32, MAX_SIZE = 1 << 20 };

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t seed = 88172645463325252u;

static uint64_t bits(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

/* Bytes per second of transfers of "size" bytes, "depth" at a time. */
static double measure(int fd, off_t disk, int writes, int random, size_t size, int depth, double seconds)
{
	static unsigned char *buffers;
	static struct iocb blocks[MAX_DEPTH];
	struct io_event events[MAX_DEPTH];
	aio_context_t context = 0;
	uint64_t count = disk / size, next = 0, done = 0;
	double start, end;
	int out = 0;

	if (!buffers && posix_memalign((void **)&buffers, 4096, (size_t)MAX_DEPTH * MAX_SIZE))
		fail("memory");
	memset(buffers, 0x5a, (size_t)depth * size);
	if (syscall(SYS_io_setup, depth, &context))
		fail("io_setup");
	start = now();
	end = start + seconds;
	for (int i = 0; i < depth; i++) {
		memset(&blocks[i], 0, sizeof blocks[i]);
		blocks[i].aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
		blocks[i].aio_fildes = fd;
		blocks[i].aio_buf = (uintptr_t)(buffers + (size_t)i * size);
		blocks[i].aio_nbytes = size;
		blocks[i].aio_data = i;
		events[i].data = i;
	}
	for (int ready = depth; ready > 0 || out > 0;) {
		struct iocb *list[MAX_DEPTH];
		int n = 0;

		for (int i = 0; i < ready && now() < end; i++) {
			struct iocb *b = &blocks[events[i].data];

			b->aio_offset = (random ? bits() % count : next++ % count) * size;
			list[n++] = b;
		}
		if (n && syscall(SYS_io_submit, context, n, list) != n)
			fail("io_submit");
		out += n;
		if (!out)
			break;
		ready = syscall(SYS_io_getevents, context, 1, MAX_DEPTH, events, NULL);
		if (ready < 0)
			fail("io_getevents");
		for (int i = 0; i < ready; i++)
			if (events[i].res != (int64_t)size)
				fail("transfer");
		out -= ready;
		done += ready;
	}
	end = now();
	syscall(SYS_io_destroy, context);
	if (writes && fsync(fd))
		fail("fsync");
	return done * size / (end - start);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int writes, random, depth;
		size_t size;
	} tests[] = {
		{ "seqread", 0, 0, 4, 1 << 20 },      { "seqwrite", 1, 0, 4, 1 << 20 },
		{ "randread_qd1", 0, 1, 1, 4096 },    { "randwrite_qd1", 1, 1, 1, 4096 },
		{ "randread_qd32", 0, 1, 32, 4096 },  { "randwrite_qd32", 1, 1, 32, 4096 },
	};
	off_t size;
	int fd;

	if (argc != 4)
		return 2;
	fd = open(argv[1], O_RDWR | O_DIRECT);
	if (fd < 0 || (size = lseek(fd, 0, SEEK_END)) < MAX_SIZE)
		fail(argv[1]);
	for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
		double rate = measure(fd, size, tests[i].writes, tests[i].random, tests[i].size, tests[i].depth, atof(argv[2]));

		printf("RATE io_%s_%s %.3f\n", argv[3], tests[i].name, rate / 1e6);
		fflush(stdout);
	}
	return 0;
}
