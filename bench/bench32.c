// bench32.c - as bench.c, for 32-bit code: a program without any library, since 32-bit ones are rarely installed.
//
//   bench32 [-d DIV] [NAME|GROUP|all][,...]...     (all names begin with "i386_")
//
// Build: gcc -m32 -O2 -ffreestanding -nostdlib -static -fno-pie -no-pie -fno-stack-protector
typedef unsigned long long u64;
typedef unsigned u32;
typedef unsigned char u8;
#define NOIPA __attribute__((noipa))

static int syscall3(int n, long a, const void *b, long c)
{
	int r;
	__asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory");
	return r;
}
void *memset(void *p, int c, unsigned long n)
{
	void *start = p;
	__asm__ volatile("rep stosb" : "+D"(p), "+c"(n) : "a"(c) : "memory");
	return start;
}
static u64 mix(u64 h, u64 v) { return (h ^ v) * 0x9e3779b97f4a7c15ull + (h >> 29); }

static u64 i386_sieve(u32 reps)
{
	enum { N = 1 << 18 };
	static u8 p[N];
	u32 n = 0;
	while (reps--) {
		memset(p, 1, N);
		for (u32 i = 2; i < N; i++)
			if (p[i]) {
				n++;
				for (u32 j = i < 512 ? i * i : N; j < N; j += i)
					p[j] = 0;
			}
	}
	return n;
}

static NOIPA u32 fib(u32 n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static u64 i386_fib(u32 reps)
{
	u64 h = 0;
	for (u32 i = 0; i < reps; i++)
		h = mix(h, fib(27 + (i & 1)));
	return h;
}

static u64 i386_hash(u32 reps)			// an open hash table: 64-bit arithmetic in pairs of registers
{
	enum { N = 1 << 14 };
	static u64 keys[N];
	u64 h = 1;
	memset(keys, 0, sizeof keys);
	for (u32 r = 0; r < reps; r++)
		for (u32 i = 0; i < N; i++) {
			u64 key = mix(i >> 1, r & 1) | 1;
			u32 at = key >> 40 & (N - 1);
			for (u32 k = 0; k < 8 && keys[at] != key; k++, at = (at + 1) & (N - 1))
				if (!keys[at])
					keys[at] = key;
			h = mix(h, keys[at]);
		}
	return h;
}

static u64 i386_vm(u32 reps)			// a byte-code interpreter: a loop that counts down
{
	static const u8 code[] = { 1, 2, 3, 0, 4, 5, 1, 0, 6 };
	u32 a = 1, b = 2, c = 3;
	while (reps--)
		for (u32 n = 4096, pc = 0; n;)
			switch (code[pc++]) {
			case 0: a += b; break;
			case 1: b ^= a << 3; break;
			case 2: c = a - c; break;
			case 3: a = (a << 7) | (a >> 25); break;
			case 4: b += c & 0xff; break;
			case 5: if (c & 1) a++; else b--; break;
			case 6: n--, pc = 0; break;
			}
	return (u64)a << 32 | (b ^ c);
}

enum { M = 64 };
static u64 bits(double d)
{
	union { double d; u64 u; } both = { d };
	return both.u;
}
#define MATMUL(name, how) \
	how static u64 name(u32 reps) \
	{ \
		static double a[M][M], b[M][M], c[M][M]; \
		double s = 0; \
		for (int i = 0; i < M; i++) \
			for (int j = 0; j < M; j++) \
				a[i][j] = (i * 3 + j) % 17 * 0.25, b[i][j] = (i + j * 5) % 13 * 0.5, c[i][j] = 0; \
		while (reps--) \
			for (int i = 0; i < M; i++) \
				for (int k = 0; k < M; k++) \
					for (int j = 0; j < M; j++) \
						c[i][j] += a[i][k] * b[k][j]; \
		for (int i = 0; i < M; i++) \
			for (int j = 0; j < M; j++) \
				s += c[i][j]; \
		return bits(s); \
	}
MATMUL(i386_x87, __attribute__((target("fpmath=387"))))
MATMUL(i386_sse2, __attribute__((target("sse2,fpmath=sse"))))

#define B(name, work) { #name, name, work }
static const struct { const char *name; u64 (*run)(u32); u32 work; } benches[] = {
	B(i386_sieve, 150), B(i386_fib, 80), B(i386_hash, 400), B(i386_vm, 1200), B(i386_x87, 300), B(i386_sse2, 300),
};

static int chosen(const char *list, const char *name)
{
	for (u32 n; *list; list += n + (list[n] == ',')) {
		for (n = 0; list[n] && list[n] != ',';)
			n++;
		if (n == 3 && list[0] == 'a' && list[1] == 'l' && list[2] == 'l')
			return 1;
		u32 same = 0;
		while (same < n && list[same] == name[same])
			same++;
		if (n && same == n && (!name[n] || name[n] == '_'))
			return 1;
	}
	return 0;
}

static u32 microseconds(void)			// CLOCK_MONOTONIC, wrapping
{
	int t[2];
	syscall3(265, 1, t, 0);
	return t[0] * 1000000u + t[1] / 1000;
}

static void report(const char *name, u32 time, u64 sum)
{
	char line[96], *p = line;
	for (const char *s = "BENCH "; *s;)
		*p++ = *s++;
	while (*name)
		*p++ = *name++;
	*p++ = ' ';
	for (u32 unit = 1000000000; unit; unit /= 10) {
		u32 digit = time / unit % 10;
		*p++ = '0' + digit;
		if (unit == 1000000)
			*p++ = '.';
	}
	*p++ = ' ';
	for (int i = 60; i >= 0; i -= 4)
		*p++ = "0123456789abcdef"[sum >> i & 15];
	*p++ = '\n';
	syscall3(4, 1, line, p - line);
}

__attribute__((used, noreturn, force_align_arg_pointer)) static void run(int argc, char **argv)
{
	u32 div = 0;
	if (argc > 2 && argv[1][0] == '-' && argv[1][1] == 'd') {
		for (const char *s = argv[2]; *s >= '0' && *s <= '9';)
			div = div * 10 + (*s++ - '0');
		argc -= 2, argv += 2;
	}
	for (u32 i = 0; i < sizeof benches / sizeof *benches; i++) {
		int yes = argc < 2;
		for (int k = 1; k < argc; k++)
			yes |= chosen(argv[k], benches[i].name);
		if (!yes)
			continue;
		u32 work = benches[i].work / (div ? div : 1), start = microseconds();
		u64 sum = benches[i].run(work ? work : 1);
		report(benches[i].name, microseconds() - start, sum);
	}
	for (;;)
		syscall3(1, 0, 0, 0);
}
__asm__(".globl _start\n_start: mov %esp,%eax\n lea 4(%eax),%edx\n push %edx\n push (%eax)\n call run\n");
