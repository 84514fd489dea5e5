/* PID 1 of guests that boot into an image: takes every file that /list names (a session and a token a line) out of
 * /dev/liveupdate, and prints size, position, seals and SHA-256 of each; the same of physical memory that the command line names
 * (take_mem=ADDRESS,BYTES). Static, because the archive has nothing else. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEBUGFS "/sys/kernel/debug/kho/in/sub_fdts"
#define GET_SEALS 1034
#define ROTATE(x, n) ((x) >> (n) | (x) << (32 - (n)))

struct sha256 {
	uint32_t state[8];
	uint8_t block[64];
	uint64_t bytes;
};

static uint32_t round_constants[64], first_state[8];

/* The first 32 bits of the fractional part of the root of `prime`: square roots for the state, cube roots for the rounds. */
static uint32_t fraction(unsigned int prime, int cube)
{
	unsigned __int128 low = 0, high = (unsigned __int128)32 << 32, middle, power, target;

	target = (unsigned __int128)prime << (cube ? 96 : 64);
	while (high - low > 1) {
		middle = (low + high) / 2;
		power = cube ? middle * middle * middle : middle * middle;
		if (power <= target)
			low = middle;
		else
			high = middle;
	}
	return (uint32_t)low;
}

static void sha256_constants(void)
{
	unsigned int prime, divisor, count = 0;

	for (prime = 2; count < 64; prime++) {
		for (divisor = 2; divisor * divisor <= prime && prime % divisor; divisor++)
			;
		if (divisor * divisor <= prime)
			continue;
		if (count < 8)
			first_state[count] = fraction(prime, 0);
		round_constants[count++] = fraction(prime, 1);
	}
}

static void sha256_block(struct sha256 *hash, const uint8_t *p)
{
	uint32_t w[64], v[8], t1, t2, s0, s1;
	int i;

	for (i = 0; i < 16; i++)
		w[i] = (uint32_t)p[4 * i] << 24 | p[4 * i + 1] << 16 | p[4 * i + 2] << 8 | p[4 * i + 3];
	for (; i < 64; i++) {
		s0 = ROTATE(w[i - 15], 7) ^ ROTATE(w[i - 15], 18) ^ w[i - 15] >> 3;
		s1 = ROTATE(w[i - 2], 17) ^ ROTATE(w[i - 2], 19) ^ w[i - 2] >> 10;
		w[i] = w[i - 16] + s0 + w[i - 7] + s1;
	}
	memcpy(v, hash->state, sizeof(v));
	for (i = 0; i < 64; i++) {
		s1 = ROTATE(v[4], 6) ^ ROTATE(v[4], 11) ^ ROTATE(v[4], 25);
		t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + round_constants[i] + w[i];
		s0 = ROTATE(v[0], 2) ^ ROTATE(v[0], 13) ^ ROTATE(v[0], 22);
		t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
		memmove(v + 1, v, 7 * sizeof(v[0]));
		v[4] += t1;
		v[0] = t1 + t2;
	}
	for (i = 0; i < 8; i++)
		hash->state[i] += v[i];
}

static void sha256_start(struct sha256 *hash)
{
	memcpy(hash->state, first_state, sizeof(first_state));
	hash->bytes = 0;
}

static void sha256_add(struct sha256 *hash, const uint8_t *p, uint64_t nbytes)
{
	while (nbytes--) {
		hash->block[hash->bytes++ % 64] = *p++;
		if (hash->bytes % 64 == 0)
			sha256_block(hash, hash->block);
	}
}

static const char *sha256_hex(struct sha256 *hash)
{
	static char hex[65];
	uint64_t bits = hash->bytes * 8;
	uint8_t one = 0x80, zero = 0, length[8];
	int i;

	sha256_add(hash, &one, 1);
	while (hash->bytes % 64 != 56)
		sha256_add(hash, &zero, 1);
	for (i = 0; i < 8; i++)
		length[i] = bits >> (56 - 8 * i);
	sha256_add(hash, length, 8);
	for (i = 0; i < 8; i++)
		sprintf(hex + 8 * i, "%08x", hash->state[i]);
	return hex;
}

struct session_call { uint32_t size; int32_t fd; uint8_t name[64]; };
struct file_call { uint32_t size; int32_t fd; uint64_t token; };
struct finish_call { uint32_t size, reserved; };
#define RETRIEVE_SESSION _IO(0xBA, 0x01)
#define RETRIEVE_FD _IO(0xBA, 0x41)
#define FINISH _IO(0xBA, 0x42)

static void finish(int session, const char *name)
{
	struct finish_call call = { .size = sizeof(call) };

	if (session < 0)
		return;
	printf("TAKE: finish %s errno %d\n", name, ioctl(session, FINISH, &call) ? errno : 0);
	close(session);
}

static void take_file(int session, const char *name, unsigned long long token)
{
	struct file_call call = { .size = sizeof(call), .token = token };
	static uint8_t buffer[65536];
	struct sha256 hash;
	struct stat st;
	off_t at = 0;
	ssize_t got;

	if (ioctl(session, RETRIEVE_FD, &call)) {
		printf("TAKE: file %s %#llx errno %d\n", name, token, errno);
		return;
	}
	sha256_start(&hash);
	while ((got = pread(call.fd, buffer, sizeof(buffer), at)) > 0) {
		sha256_add(&hash, buffer, got);
		at += got;
	}
	fstat(call.fd, &st);
	printf("TAKE: file %s %#llx size %lld pos %lld seals %#x sha256 %s\n", name, token, (long long)st.st_size,
	       (long long)lseek(call.fd, 0, SEEK_CUR), fcntl(call.fd, GET_SEALS), sha256_hex(&hash));
	close(call.fd);
}

static void take_files(void)
{
	char line[256], name[64], current[64] = "";
	int device = open("/dev/liveupdate", O_RDWR), session = -1;
	unsigned long long token;
	FILE *list = fopen("/list", "r");

	printf("TAKE: /dev/liveupdate errno %d\n", device < 0 ? errno : 0);
	while (list && fgets(line, sizeof(line), list)) {
		if (sscanf(line, "%63s %llx", name, &token) != 2)
			continue;
		if (strcmp(name, current)) {
			struct session_call call = { .size = sizeof(call) };

			finish(session, current);
			strcpy(current, name);
			memcpy(call.name, name, sizeof(call.name));
			session = ioctl(device, RETRIEVE_SESSION, &call) ? -1 : call.fd;
			if (session < 0)
				printf("TAKE: session %s errno %d\n", name, errno);
		}
		if (session >= 0)
			take_file(session, name, token);
	}
	finish(session, current);
}

static void take_memory(const char *word)
{
	unsigned long long phys, nbytes;
	struct sha256 hash;
	uint8_t *p;
	int fd;

	if (sscanf(word, "take_mem=%llx,%llx", &phys, &nbytes) != 2)
		return;
	fd = open("/dev/mem", O_RDONLY);
	p = mmap(NULL, nbytes, PROT_READ, MAP_SHARED, fd, phys);
	if (p == MAP_FAILED) {
		printf("TAKE: memory %#llx errno %d\n", phys, errno);
		return;
	}
	sha256_start(&hash);
	sha256_add(&hash, p, nbytes);
	printf("TAKE: memory %#llx bytes %llu sha256 %s\n", phys, nbytes, sha256_hex(&hash));
	munmap(p, nbytes);
	close(fd);
}

int main(void)
{
	char line[4096] = "", *word;
	struct dirent *entry;
	struct sha256 hash;
	DIR *folder;
	int fd;

	setvbuf(stdout, NULL, _IONBF, 0);
	syscall(SYS_syslog, 8, NULL, 1); /* from here on the console is this program's */
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	sha256_constants();
	sha256_start(&hash);
	sha256_add(&hash, (const uint8_t *)"abc", 3);
	printf("\nTAKE: abc sha256 %s\n", sha256_hex(&hash));

	fd = open("/proc/cmdline", O_RDONLY);
	if (fd < 0 || read(fd, line, sizeof(line) - 1) < 0)
		printf("TAKE: /proc/cmdline errno %d\n", errno);
	close(fd);
	take_files();
	for (word = strtok(line, " \n"); word; word = strtok(NULL, " \n"))
		take_memory(word);

	printf("TAKE: subtrees");
	folder = opendir(DEBUGFS);
	while (folder && (entry = readdir(folder)))
		if (entry->d_name[0] != '.')
			printf(" %s", entry->d_name);
	printf("\nTAKE: end\n");
	usleep(200000);
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART, NULL);
	for (;;)
		pause();
}
