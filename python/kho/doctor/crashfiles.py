"""Reads the files about crash kernels: what is reserved and loaded, by which call, and where a crash kernel lies."""

from __future__ import annotations

import re

from . import layout
from .facts import Amount, Facts, number
from .kernellog import Evidence
from .tree import FILE_LIMIT, Tree, clean

STATE = ("sys/kernel/kexec_crash_{}", "sys/kernel/kexec/crash_{}")
"""Files of the state, to Linux 6.18 and from 6.19 on; the first ones stay there."""
CALL = "var/crash/kexec_cmd"
"""Where kdump-tools keeps the call of kexec that loaded the crash kernel."""
SETTINGS = ("etc/default/kdump-tools", "etc/sysconfig/kdump", "etc/default/kexec")
"""Configuration of kdump: Debian and Ubuntu; Fedora, RHEL and SUSE."""
SETTING = re.compile(
    rb"^[ \t]*((?:KDUMP_CMDLINE|KDUMP_COMMANDLINE)(?:_APPEND)?|KDUMP_KEXEC_ARGS|KEXEC_ARGS|KEXEC_OPTIONS)="
    rb"([^\n]{0,2000})",
    re.MULTILINE,
)
RESOURCE = re.compile(r"( *)([0-9a-f]{1,16})-([0-9a-f]{1,16}) : (System RAM|Crash kernel|Kernel code)$")
RANGES = 4096


def crash_kernel(tree: Tree, facts: Facts) -> None:
    """Read what is reserved and loaded for a crash, by which call, and the stable level of the release."""
    crash = facts.crash
    piece = layout.read(tree, "proc/version_signature", 4096)
    if piece is not None and piece.head.strip():
        crash.signature = Evidence(piece.file, piece.line(0), clean(piece.head.split(b"\n")[0]))
    for pattern in STATE:
        crash.loaded = crash.loaded or _value(tree, pattern.format("loaded"))
        seen = _value(tree, pattern.format("size")) if crash.size is None else None
        nbytes = number(seen.text) if seen is not None else None
        if seen is not None and nbytes is not None:
            crash.size = Amount(nbytes, seen)
    _resources(tree, facts)
    _call(tree, facts)
    for file in SETTINGS:
        piece = layout.read(tree, file, 1 << 16) if tree.exists(file) or file in tree.kept else None
        for match in SETTING.finditer(piece.head) if piece is not None else ():
            seen = Evidence(piece.file if piece is not None else file, None, clean(match[0].strip()))
            crash.settings.append(seen._replace(line=piece.line(match.start()) if piece is not None else None))


def inside_crash_kernel(tree: Tree, facts: Facts) -> None:
    """Determine whether this kernel is itself a crash kernel; after the log and the command line are known."""
    crash = facts.crash
    crash.signature = crash.signature or (facts.log.signature if facts.log is not None else None)
    if facts.log is not None and facts.log.kdump is not None:
        crash.inside = facts.log.kdump
    elif facts.cmdline is not None and (match := re.search(r"(?:^| )(elfcorehdr=\S{1,60})", facts.cmdline.text)):
        crash.inside = facts.cmdline._replace(text=match[1])
    elif tree.stat("proc/vmcore") is not None:
        crash.inside = Evidence("proc/vmcore", None, "is there")


def _value(tree: Tree, file: str) -> Evidence | None:
    """Read a file with one value."""
    piece = layout.read(tree, file, 256) if tree.exists(file) or file in tree.kept else None
    text = clean(piece.head) if piece is not None else ""
    return Evidence(piece.file, piece.line(0), text) if piece is not None and text else None


def _resources(tree: Tree, facts: Facts) -> None:
    """Read RAM, crash kernel areas and the kernel's code from /proc/iomem, if it shows addresses."""
    piece = layout.read(tree, "proc/iomem", FILE_LIMIT)
    crash = facts.crash
    lines = piece.head.decode("utf-8", "replace").split("\n")[:RANGES] if piece is not None else []
    for line, text in enumerate(lines, 1):
        match = RESOURCE.match(text)
        if match is None or piece is None:
            continue
        start, end = int(match[2], 16), int(match[3], 16) + 1
        if end <= 1 or end <= start:
            continue
        crash.iomem = True
        seen = Evidence(piece.file, None if piece.before is None else piece.before + line, clean(text))
        if match[4] == "Kernel code":
            crash.code = crash.code or (start, end, seen)
        elif match[4] == "Crash kernel":
            crash.areas.append((start, end, seen))
        elif not match[1]:
            crash.ram.append((start, end, seen))


def _call(tree: Tree, facts: Facts) -> None:
    """Read the call that loaded the crash kernel, and whether it is of this boot."""
    piece = layout.read(tree, CALL, 1 << 16) if tree.exists(CALL) or CALL in tree.kept else None
    if piece is None:
        return
    calls = [line for line in piece.head.decode("utf-8", "replace").split("\n")[:64] if "kexec" in line]
    found = next((line for line in calls if re.search(r" (?:-p|--load-panic)(?: |$)", line)), None)
    if found is None:
        return
    crash = facts.crash
    shown = "".join(c if c.isprintable() else " " for c in found)
    crash.call = Evidence(piece.file, piece.line(0), shown[:4096])
    written = tree.stat(CALL)
    times = layout.read(tree, "proc/stat", 1 << 20) if tree.exists("proc/stat") else None
    boot = re.search(rb"^btime (\d{1,12})$", times.head, re.MULTILINE) if times is not None else None
    if written is not None and boot is not None:
        crash.call_age = "this boot" if written.st_mtime >= int(boot[1]) - 60 else "an earlier boot"
