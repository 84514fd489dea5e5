"""What guest scripts share: the command line, kexec from Python, the kernel log."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
KEXEC_FILE_LOAD = {"x86_64": 320, "aarch64": 294}
KEXEC_FILE_NO_INITRAMFS = 4
REBOOT_KEXEC = 0x45584543  # LINUX_REBOOT_CMD_KEXEC


def cmdline() -> str:
    """The kernel's command line."""
    return Path("/proc/cmdline").read_text().strip()


def argument(name: str, default: str = "") -> str:
    """The value of a word NAME=VALUE of the command line."""
    for word in cmdline().split():
        if word.startswith(name + "="):
            return word.split("=", 1)[1]
    return default


def load(kernel: str, initrd: str = "/sys/firmware/initrd", **change: str | int | None) -> str:
    """Load a kernel with this one's command line and the words that are given; None removes a word.

    The kernel is a file of /lab/kernels. Boot with retain_initrd: this kernel's archive is also the next one's, and
    needs no second copy. Memory outside scratch must have room for both.
    """
    words = [word for word in cmdline().split() if word.split("=")[0] not in change]
    words += [f"{name}={value}" for name, value in change.items() if value is not None]
    line = " ".join(words).encode() + b"\0"
    image, archive = os.open(f"/lab/kernels/{kernel}", os.O_RDONLY), os.open(initrd, os.O_RDONLY)
    result = LIBC.syscall(
        KEXEC_FILE_LOAD[platform.machine()], image, archive, ctypes.c_ulong(len(line)), line, ctypes.c_ulong(0)
    )
    error = ctypes.get_errno()
    os.close(image)
    os.close(archive)
    if result:
        raise OSError(error, f"kexec_file_load: {os.strerror(error)}")
    return line.decode()


def jump() -> None:
    """Start the loaded kernel; raises OSError if that fails."""
    sys.stdout.flush()
    os.sync()
    LIBC.reboot(REBOOT_KEXEC)
    error = ctypes.get_errno()
    raise OSError(error, f"reboot: {os.strerror(error)}")


def dmesg(*words: str) -> list[str]:
    """The lines of the kernel log that contain one of `words`, in any case; all of them without words."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [line for line in log if not words or any(word.lower() in line.lower() for word in words)]
