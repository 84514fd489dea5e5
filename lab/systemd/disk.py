"""The guest's disk: Debian's files, the services, kho, the kernel to load, as one ext4 file system."""

from __future__ import annotations

import gzip
import json
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

from ..claims import LabError
from ..initramfs import Cpio
from . import units
from .rootfs import Root

__all__ = ["copy", "file", "make", "records"]

GUEST = Path(__file__).parent / "guest"
SIZE = "800M"
UNITS = "etc/systemd/system"
GENERATORS = "usr/lib/systemd/system-generators"
"""They make no unit that the guest needs. systemd gives them 90 seconds and then freezes, which is too short for a
guest under TCG on a busy machine."""
FSTAB_GENERATOR = "systemd-fstab-generator"
"""initrd-parse-etc.service runs it by another name."""
MACHINE_ID = "0123456789abcdef0123456789abcdef\n"
BINARIES = ("sh", "dash", "mount", "umount", "systemctl", "journalctl", "kmod")
"""What the initrd has of /usr/bin."""
FILES = ("etc/passwd", "etc/group", "etc/nsswitch.conf", "etc/ld.so.cache", "usr/lib/os-release")
NOT_IN_INITRD = ("perl-base", "gconv", "lapack", "blas", "libgfortran", "libstdc++", "libapt", "libxen", "libsqlite")
MOUNT = """[Unit]
Description=Root file system of the lab
DefaultDependencies=no
Before=initrd-root-fs.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/mount -t ext4 /dev/vda /sysroot
"""
"""In the initrd: no udev runs there, so systemd would wait for a device unit."""


def make(root: Root, kernel: Path, package: Path, folder: Path) -> Path:
    """Make the disk.

    Args: root: Debian's files. kernel: the image that the guest loads for each kexec. package: the Python package
        `kho`, with its extension. folder: where the disk is made.
    Raises: LabError if a tool fails.
    """
    tree, disk = folder / "tree", folder / "disk.ext4"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    try:
        _run("tar", "xf", str(root.tar), "-C", str(tree), "--numeric-owner", "--exclude=./dev/*")
        _configure(tree)
        own = tree / "lab"
        own.mkdir()
        for script in GUEST.glob("*.py"):
            shutil.copy(script, own / script.name)
        for guest in units.GUESTS:
            (own / f"units-{guest}").write_text(units.by_boot(guest))
        (own / "boot").write_text("1\n")
        shutil.copy(kernel, own / "bzImage")
        into = tree / "usr/lib/python3/dist-packages/kho"
        shutil.copytree(package, into, ignore=shutil.ignore_patterns("__pycache__"))
        _run("chroot", str(tree), "/usr/bin/python3", "-c", "import kho.live, kho.cli.doctor, numpy")
        with gzip.open(own / "initrd.cpio.gz", "wb", compresslevel=1) as out:
            out.write(_initrd(tree))
        disk.unlink(missing_ok=True)
        options = "^has_journal,^metadata_csum_seed"
        _run("mke2fs", "-q", "-t", "ext4", "-O", options, "-d", str(tree), str(disk), SIZE)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return disk


def copy(disk: Path, into: Path) -> None:
    """Copy a disk, which is mostly holes."""
    _run("cp", "--sparse=always", str(disk), str(into))


def records(disk: Path) -> list[dict[str, Any]]:
    """Return what the guest has recorded on its disk so far, in order; a line that was cut short is left out."""
    made = []
    for line in file(disk, "records.jsonl").decode(errors="replace").splitlines():
        try:
            made.append(json.loads(line))
        except ValueError:
            continue
    return made


def file(disk: Path, name: str) -> bytes:
    """Return a file of /lab on the disk; nothing if there is none."""
    words = ["debugfs", "-R", f"cat /lab/{name}", str(disk)]
    return subprocess.run(words, capture_output=True, check=False, env=_env()).stdout


def _env() -> dict[str, str]:
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=_env())
    if done.returncode:
        raise LabError(f"{' '.join(words[:2])} failed ({done.returncode}): {done.stderr[-2000:]}")


def _configure(tree: Path) -> None:
    """Write the units and mask what the guest does not need."""
    system = tree / UNITS
    wants = system / "multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    for name in units.MASKED:
        _link(system / name, "/dev/null")
    generators = tree / "etc/systemd/system-generators"
    generators.mkdir(exist_ok=True)
    for each in (tree / GENERATORS).iterdir():
        _link(generators / each.name, "/dev/null")
    for service in units.SERVICES:
        (system / f"{service.name}.service").write_text(units.text(service))
    (system / "lab.service").write_text(units.driver())
    _link(wants / "lab.service", f"/{UNITS}/lab.service")
    _link(system / "default.target", "/usr/lib/systemd/system/multi-user.target")
    for folder, name, content in (
        ("journald.conf.d", "lab.conf", "[Journal]\nStorage=volatile\nReadKMsg=no\nRuntimeMaxUse=16M\n"),
        ("system.conf.d", "lab.conf", "[Manager]\nDefaultTimeoutStartSec=600s\nDefaultDeviceTimeoutSec=900s\n"),
    ):
        (tree / "etc/systemd" / folder).mkdir(parents=True, exist_ok=True)
        (tree / "etc/systemd" / folder / name).write_text(content)
    (tree / "etc/machine-id").write_text(MACHINE_ID)
    (tree / "etc/hostname").write_text("lab\n")
    (tree / "etc/fstab").write_text("")


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _initrd(tree: Path) -> bytes:
    """Pack an initrd (cpio newc) in which systemd is process 1, mounts the disk and switches to it."""
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    paths = [tree / "usr/bin" / name for name in BINARIES] + [tree / name for name in FILES]
    paths += [
        path
        for path in sorted((tree / "usr/lib/systemd").rglob("*"))
        if path.parent != tree / GENERATORS or path.name == FSTAB_GENERATOR
    ]
    for path in sorted(libraries.rglob("*")):
        if not str(path.relative_to(libraries)).startswith(NOT_IN_INITRD):
            paths.append(path)
    made = Cpio()
    made.console()
    for name in ("sysroot", "var", "root"):
        made.folder(name)
    for name in ("bin", "lib", "lib64", "sbin"):
        made.link(name, str((tree / name).readlink()))
    made.link("usr/lib64/ld-linux-x86-64.so.2", "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    made.link("usr/sbin/init", "../lib/systemd/systemd")
    made.link("init", "usr/lib/systemd/systemd")
    made.file("etc/initrd-release", b'ID=lab\nPRETTY_NAME="Lab initrd"\n')
    made.file("etc/machine-id", MACHINE_ID.encode())
    made.file(f"{UNITS}/lab-root.service", MOUNT.encode())
    made.link(f"{UNITS}/initrd-root-fs.target.wants/lab-root.service", f"/{UNITS}/lab-root.service")
    for name in units.MASKED:
        made.link(f"{UNITS}/{name}", "/dev/null")
    for path in paths:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            made.link(str(path.relative_to(tree)), str(path.readlink()))
        elif stat.S_ISREG(mode):
            made.file(str(path.relative_to(tree)), path.read_bytes(), stat.S_IMODE(mode))
    return made.bytes()
