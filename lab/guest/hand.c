/* PID 1 of a kernel that hands over: preserves what /plan names, shows its debugfs and /proc, loads /kernel with /next.cpio and
 * the command line in /line, waits for a line of input, and jumps. Static, because the archive has nothing else.
 *
 * A line of /plan is SESSION TOKEN BYTES POSITION SEALS SEED, or SESSION alone for one without files. The contents are the
 * numbers of xorshift64 from SEED on. Lines on the console: HAND: WORDS; a file is HAND: file PATH, HAND: hex ..., HAND: eof. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
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

#define FINALIZE "/sys/kernel/debug/kho/out/finalize"
#define ADD_SEALS 1033
struct session_call { uint32_t size; int32_t fd; uint8_t name[64]; };
struct file_call { uint32_t size; int32_t fd; uint64_t token; };
#define CREATE_SESSION _IO(0xBA, 0x00)
#define PRESERVE_FD _IO(0xBA, 0x40)

static void show_bytes(const unsigned char *data, ssize_t nbytes)
{
	ssize_t i, j;

	for (i = 0; i < nbytes; i += 64) {
		printf("HAND: hex ");
		for (j = i; j < nbytes && j < i + 64; j++)
			printf("%02x", data[j]);
		printf("\n");
	}
}

static void show_file(const char *path)
{
	static unsigned char data[1 << 16];
	int fd = open(path, O_RDONLY);
	ssize_t got, all = 0;

	if (fd < 0)
		return;
	while (all < (ssize_t)sizeof(data) && (got = read(fd, data + all, sizeof(data) - all)) > 0)
		all += got;
	close(fd);
	printf("HAND: file %s\n", path);
	show_bytes(data, all);
	printf("HAND: eof\n");
}

static void show_tree(const char *folder)
{
	DIR *open_folder = opendir(folder);
	struct dirent *entry;
	char path[512];
	struct stat st;

	while (open_folder && (entry = readdir(open_folder))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
		if (lstat(path, &st))
			continue;
		if (S_ISDIR(st.st_mode))
			show_tree(path);
		else
			show_file(path);
	}
	if (open_folder)
		closedir(open_folder);
}

static void fill(int fd, uint64_t nbytes, uint64_t seed)
{
	uint64_t i, state = seed;
	uint8_t *p;

	if (!nbytes)
		return;
	p = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED) {
		printf("HAND: mmap errno %d\n", errno);
		return;
	}
	for (i = 0; i < nbytes; i++) {
		if (i % 8 == 0) {
			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
		}
		p[i] = state >> (8 * (i % 8));
	}
	munmap(p, nbytes);
}

static void preserve(int device)
{
	char line[256], name[64], current[64] = "";
	unsigned long long token, nbytes, pos, seals, seed;
	FILE *plan = fopen("/plan", "r");
	int words, session = -1, fd;

	while (plan && fgets(line, sizeof(line), plan)) {
		struct file_call call = { .size = sizeof(call) };

		words = sscanf(line, "%63s %llx %llu %llu %llx %llu", name, &token, &nbytes, &pos, &seals, &seed);
		if (words < 1)
			continue;
		if (strcmp(name, current)) {
			struct session_call create = { .size = sizeof(create) };

			strcpy(current, name);
			memcpy(create.name, name, sizeof(create.name));
			session = ioctl(device, CREATE_SESSION, &create) ? -1 : create.fd;
			printf("HAND: session %s errno %d\n", name, session < 0 ? errno : 0);
		}
		if (words < 6 || session < 0)
			continue;
		fd = memfd_create("lab", MFD_ALLOW_SEALING);
		if (ftruncate(fd, nbytes))
			printf("HAND: ftruncate errno %d\n", errno);
		fill(fd, nbytes, seed);
		lseek(fd, pos, SEEK_SET);
		if (seals && fcntl(fd, ADD_SEALS, (int)seals))
			printf("HAND: seals errno %d\n", errno);
		call.fd = fd;
		call.token = token;
		printf("HAND: preserved %s %#llx errno %d\n", name, token, ioctl(session, PRESERVE_FD, &call) ? errno : 0);
	}
}

static long load(void)
{
	static char line[4096];
	int fd = open("/line", O_RDONLY), kernel = open("/kernel", O_RDONLY), archive = open("/next.cpio", O_RDONLY);
	ssize_t got = read(fd, line, sizeof(line) - 1);

	close(fd);
	return syscall(SYS_kexec_file_load, kernel, archive, got + 1, line, 0UL);
}

int main(void)
{
	static const char *const shown[] = {
		"/proc/cmdline", "/proc/meminfo", "/proc/pagetypeinfo", "/proc/zoneinfo", "/proc/iomem", "/proc/version",
	};
	static char log[1 << 18];
	int device, fd, length;
	unsigned int i;
	char byte;

	setvbuf(stdout, NULL, _IOLBF, 0);
	syscall(SYS_syslog, 8, NULL, 1); /* from here on the console is this program's */
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL);
	device = open("/dev/liveupdate", O_RDWR);
	printf("\nHAND: /dev/liveupdate errno %d\n", device < 0 ? errno : 0);
	if (device >= 0)
		preserve(device);
	if (device < 0 && (fd = open(FINALIZE, O_WRONLY)) >= 0) {
		/* Linux 6.16 to 6.18; later kernels with live update finalize by themselves */
		printf("HAND: finalize errno %d\n", write(fd, "1\n", 2) < 0 ? errno : 0);
		close(fd);
	}
	printf("HAND: kexec_file_load errno %d\n", load() ? errno : 0);
	show_tree("/sys/kernel/debug/kho");
	for (i = 0; i < sizeof(shown) / sizeof(shown[0]); i++)
		show_file(shown[i]);
	length = syscall(SYS_syslog, 3, log, sizeof(log));
	printf("HAND: file /dmesg\n");
	show_bytes((unsigned char *)log, length);
	printf("HAND: eof\nHAND: ready\n");
	fflush(stdout);
	if (read(0, &byte, 1) < 0)
		printf("HAND: read errno %d\n", errno);
	printf("HAND: jump\n");
	fflush(stdout);
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
	printf("HAND: kexec errno %d\n", errno);
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART, NULL);
	for (;;)
		pause();
}
