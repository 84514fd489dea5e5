"""Hosts with a crash kernel, for the tests of `kho doctor`: copies of captured machines with stated changes.

`layout70` is tests/data/linux-7.0-layout-x86_64/host (7.0's KHO code, a guest of 256 MiB): stage1: a cold boot, stage2:
the boot after it by a handover. The changes are the release, the command line, and what kdump adds to a machine, in the
words that kernels and kdump-tools print. `inside` is tests/data/hosts/kdump-kernel, a real crash kernel of Linux 7.3.4,
changed to the memory map and the messages of a crash kernel that KASLR put into scratch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from doctor_hosts import HOSTS, edit, write

LAYOUT = HOSTS.parent / "linux-7.0-layout-x86_64" / "host"
CALL = (
    '/sbin/kexec -p --command-line="BOOT_IMAGE=/vmlinuz-7.0 root=/dev/vda1 ro reset_devices nr_cpus=1 irqpoll '
    'usbcore.nousb{nokaslr}" --initrd=/var/lib/kdump/initrd.img /var/lib/kdump/vmlinuz'
)
SEGMENTS = (
    "kexec_file: nr_segments = {count}",
    "kexec_file: segment[0]: buf=0x(____ptrval____) bufsz=0x4000 mem=0x37000000 memsz=0x6000",
    "kexec_file: segment[1]: buf=0x(____ptrval____) bufsz=0x1000 mem=0x3effe000 memsz=0x1000",
    "kexec_file: kexec_file_load: type:{kind}, start:0x3efff1e0 head:0x0 flags:0x8",
)


def layout70(
    to: Path,
    *,
    stage: int = 1,
    release: str = "7.0.9",
    signature: str | None = None,
    loaded: str | None = "1",
    size: int | None = 16 << 20,
    nokaslr: bool = False,
    finalize: str = "0",
    cmdline: str = "crashkernel=16M",
    call: str | None = None,
) -> Path:
    """Copy the captured machine, with a crash kernel of 16 MiB reserved and loaded."""
    tree = to / "host"
    shutil.copytree(LAYOUT / f"stage{stage}", tree)
    for file in ("proc/cmdline", "var/log/dmesg"):
        edit(tree, file, (" nokaslr panic=-1", f"{' nokaslr' if nokaslr else ''} {cmdline}".rstrip()))
    edit(tree, "proc/version", ("6.19.11-kho70", release))
    edit(tree, "var/log/dmesg", ("6.19.11-kho70", release))
    write(tree, "sys/kernel/debug/kho/out/finalize", f"{finalize}\n")
    if size:
        area = f"  0a000000-{0xA000000 + size - 1:08x} : Crash kernel\n"
        edit(tree, "proc/iomem", ("00100000-0ffdffff : System RAM\n", f"00100000-0ffdffff : System RAM\n{area}"))
    if loaded is not None:
        write(tree, "sys/kernel/kexec_crash_loaded", f"{loaded}\n")
    if size is not None:
        write(tree, "sys/kernel/kexec_crash_size", f"{size}\n")
    if signature is not None:
        write(tree, "proc/version_signature", f"{signature}\n")
    if call is not None:
        write(tree, "var/crash/kexec_cmd", f"{call}\n")
    return tree


def say(tree: Path, *lines: str) -> Path:
    """Add messages at the end of the kernel log."""
    file = "dmesg" if (tree / "dmesg").is_file() else "var/log/dmesg"
    text = (tree / file).read_text()
    return write(tree, file, text + "".join(f"<6>{line}\n" for line in lines))


def loads(tree: Path, *, kho: bool, kind: int = 1) -> Path:
    """Add what `kexec -d -p -s` makes the kernel print; `kho`: with the segment of the scratch array."""
    count, first, second, last = SEGMENTS
    scratch = "kexec_file: segment[5]: buf=0x(____ptrval____) bufsz=0x30 mem=0x3eff0000 memsz=0x1000"
    say(tree, count.format(count=6 if kho else 5), first, second, *([scratch] if kho else []), last.format(kind=kind))
    return tree


def inside(to: Path, *, release: str = "7.0.9", misplaced: bool = True, said: bool = True) -> Path:
    """Copy the captured crash kernel; `misplaced`: its code is in a range outside of its own memory."""
    tree = to / "crash"
    shutil.copytree(HOSTS / "kdump-kernel", tree)
    edit(tree, "proc/version", ("version 7.3.4", f"version {release}"))
    changes = [
        ("version 7.3.4", f"version {release}"),
        ("KHO: disabled in the kdump kernel", "KHO: disabling KHO revival"),
    ]
    edit(tree, "dmesg", *changes)
    if misplaced:
        code = "".join(f"  {line}\n" for line in ("7e200000-7e7120ff : Kernel code",))
        edit(
            tree, "proc/iomem", (code, ""), ("77000f58-7effffff", "33200000-33bfffff : System RAM\n@77000f58-7effffff")
        )
        edit(tree, "proc/iomem", ("@", "  33200000-337120ff : Kernel code\n"))
    if said:
        say(tree, ".text .data .bss are not marked as E820_TYPE_RAM!")
    return tree
