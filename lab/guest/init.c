/* PID 1 of guests with Python: mounts, runs the script that the command line names (lab=NAME.py), and resets the machine.
 * QEMU runs with -no-reboot, so the reset ends it; power off needs ACPI. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void mount_on(const char *type, const char *path, const char *options)
{
	mkdir(path, 0755);
	if (mount(type, path, type, 0, options) && errno != EBUSY)
		printf("LAB: mount %s on %s: %d\n", type, path, errno);
}

int main(void)
{
	char line[4096] = "", path[256] = "", *word;
	int fd, status = 0;
	pid_t child, ended;

	setvbuf(stdout, NULL, _IONBF, 0);
	mount_on("proc", "/proc", NULL);
	mount_on("sysfs", "/sys", NULL);
	mount_on("debugfs", "/sys/kernel/debug", NULL);
	mount_on("devtmpfs", "/dev", NULL);
	mount_on("tmpfs", "/dev/shm", "mode=1777");
	mount_on("tmpfs", "/run", NULL);
	mount_on("tmpfs", "/mnt", "mode=1777");
	mount_on("tmpfs", "/tmp", "mode=1777");

	fd = open("/proc/cmdline", O_RDONLY);
	if (fd < 0 || read(fd, line, sizeof(line) - 1) < 0)
		printf("LAB: /proc/cmdline: %d\n", errno);
	close(fd);
	word = strstr(line, "lab=");
	if (word && (word == line || word[-1] == ' ')) {
		snprintf(path, sizeof(path), "/lab/guest/%s", word + 4);
		path[strcspn(path, " \n")] = 0;
	}
	setenv("PATH", "/usr/bin:/usr/sbin:/sbin", 1);
	setenv("PYTHONPATH", "/opt/kho:/lab/guest", 1);
	setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
	setenv("PYTHONUNBUFFERED", "1", 1);
	setenv("HOME", "/mnt", 1);
	setenv("TERM", "dumb", 1);
	setenv("COLUMNS", "120", 1);
	setenv("OPENBLAS_NUM_THREADS", "1", 1);
	if (chdir("/mnt"))
		printf("LAB: chdir: %d\n", errno);

	child = fork();
	if (!child) {
		setsid();
		fd = open("/dev/console", O_RDWR);
		dup2(fd, 0);
		dup2(fd, 1);
		dup2(fd, 2);
		if (fd > 2)
			close(fd);
		execl("/usr/bin/python", "python", path, (char *)NULL);
		printf("LAB: exec: %d\n", errno);
		_exit(127);
	}
	while ((ended = wait(&status)) != child)
		if (ended < 0 && errno != EINTR)
			break;
	printf("LAB: ended %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
	sync();
	usleep(300000);
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART, NULL);
	for (;;)
		pause();
}
