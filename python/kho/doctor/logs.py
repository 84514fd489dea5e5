"""Finds the kernel logs in a tree, and decides whether a log is of the boot that the tree's other files show."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

from ..sizes import format_size
from . import layout
from .facts import Facts
from .kernellog import KernelLog
from .tree import FILE_LIMIT, Piece, Tree

LOG_TAIL = 256 << 10
LOGS = (
    "var/log/dmesg",
    "sos_commands/kernel/dmesg",
    "sos_commands/kernel/dmesg_-T",
    "sos_commands/general/dmesg",
    "sos_commands/boot/dmesg",
    "insights_commands/dmesg",
    "dmesg",
    "dmesg.txt",
    "CurrentDmesg.txt",
    "BootDmesg.txt",
    "sos_commands/logs/journalctl_--no-pager_--boot",
    "sos_commands/logs/journalctl_--no-pager_--catalog_--boot",
    "sos_commands/logs/journalctl_--all_--this-boot_--no-pager",
    "journalctl",
)
"""Logs of one boot, best first."""
MANY_BOOTS = (
    "var/log/kern.log",
    "var/log/messages",
    "var/log/syslog",
    "sos_commands/logs/journalctl_--no-pager",
)
"""Logs of several boots: only the last boot counts."""
FOLDERS = (
    "",
    "var/log",
    "sos_commands/kernel",
    "sos_commands/logs",
    "sos_commands/general",
    "insights_commands",
    "host_service_logs",
    "log",
    "logs",
)
NAMED = re.compile(
    r"(?:.*[-_.])?(?:dmesg|kern(?:el|log)?|journal(?:ctl)?|console|serial|messages|syslog|bootlog|netconsole)"
    r"(?:[-_.][^/]*)?",
    re.IGNORECASE,
)
EARLIER = re.compile(
    r".*(?:(?<!\d)\.[0-9](?:\.\w+)?|[-_]-1(?:[-_.].*)?|[-_.](?:prev|previous|old|last)(?:[-_.].*)?)", re.IGNORECASE
)
"""Names of logs of earlier boots: dmesg.0, journalctl_--boot_-1."""
BEGINS = re.compile(rb"Linux version \d+\.\d|GetConsoleOutput|(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{400}")
"""The beginning of a boot, or base64 that may contain it. A file without it may be a note that quotes messages."""
OTHER = re.compile(
    r"\.(?:crash|apport|conf|cfg|pdf|png|zip|tar|tgz|txz|tbz)\b|^(?:config|meminfo|version|cmdline|uname)\b"
)
CAPTURING = re.compile(r"kexec-dmesg.*")
"""Names of logs of the kdump kernel, which saved the dump; they are not logs of the kernel that crashed."""
CRASHED = re.compile(r"vmcore-dmesg.*|dmesg\.\d{8,14}|dmesg-(?:efi|erst|ramoops|pstore)[-\w.]*|console-ramoops[-\w.]*")
"""Names of logs of a kernel that crashed."""
MOST = 16
"""Maximum number of files that are searched in addition to those with known names."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def candidates(tree: Tree) -> Iterator[str]:
    """Yield the files that may be kernel logs, best first."""
    yield from LOGS
    yield from MANY_BOOTS
    yielded = 0
    for folder in FOLDERS:
        for name in tree.names(folder) if tree.exists(folder) else []:
            file = f"{folder}/{name}" if folder else name
            if file in LOGS or file in MANY_BOOTS or not NAMED.fullmatch(name) or CRASHED.fullmatch(name):
                continue
            if EARLIER.fullmatch(name) or CAPTURING.fullmatch(name) or tree.is_folder(file) or yielded >= MOST:
                continue
            yielded += 1
            yield file


def is_log_name(file: str) -> bool:
    """Return whether the name of a file is that of a log."""
    return file in LOGS or file in MANY_BOOTS or NAMED.fullmatch(file.rpartition("/")[2]) is not None


def logs_by_content(tree: Tree) -> Iterator[str]:
    """Yield files of the root directory that contain the beginning of a boot but do not have the name of a log."""
    searched = 0
    for name in tree.names(""):
        if NAMED.fullmatch(name) or CRASHED.fullmatch(name) or CAPTURING.fullmatch(name) or EARLIER.fullmatch(name):
            continue
        if tree.is_folder(name) or OTHER.search(name) or searched >= MOST:
            continue
        if any(piece.file == name for piece in tree.kept.values()):
            continue  # the sections of this file are mapped
        searched += 1
        if BEGINS.search(tree.peek(name, 1 << 20)):
            yield name


def crash_logs(tree: Tree) -> Iterator[str]:
    """Yield the logs of crashed kernels, newest first, then those of kdump kernels."""
    if "vmcore-dmesg.txt" in tree.kept:
        yield "vmcore-dmesg.txt"
    capturing = []
    for folder in ("", "sys/fs/pstore"):
        for name in tree.names(folder) if tree.exists(folder) else []:
            file = f"{folder}/{name}" if folder else name
            if tree.is_folder(file):
                continue
            if CRASHED.fullmatch(name):
                yield file
            elif CAPTURING.fullmatch(name):
                capturing.append(file)
    for folder in ("var/crash", "var/lib/systemd/pstore"):
        for place in reversed(tree.names(folder)[-MOST:] if tree.exists(folder) else []):
            for name in tree.names(f"{folder}/{place}") if tree.is_folder(f"{folder}/{place}") else []:
                if CRASHED.fullmatch(name) or name == "dmesg.txt":
                    yield f"{folder}/{place}/{name}"
    yield from capturing


def read(tree: Tree, file: str) -> Piece | None:
    """Read and decompress a log. If it may have several boots and is too large, only its end is returned."""
    many = file not in LOGS
    if file in tree.kept and tree.stat(file) is None:
        return tree.kept[file]
    piece = tree.read(file, tail=FILE_LIMIT if many else LOG_TAIL)
    if piece is None:
        return None
    kind = next((kind for magic, kind in COMPRESSED.items() if piece.head.startswith(magic)), None)
    if kind is not None:
        return unpacked(tree, piece, kind)
    return Piece(file, b"", piece.tail) if piece.tail and many else piece


def unpacked(tree: Tree, piece: Piece, kind: str) -> Piece | None:
    """Decompress a log, at most `FILE_LIMIT` bytes."""
    broken: tuple[type[Exception], ...] = (zlib.error, OSError, EOFError, ValueError)
    try:
        if kind == "gzip":
            data = zlib.decompressobj(31).decompress(piece.head, FILE_LIMIT)
        elif kind == "bzip2":
            import bz2

            data = bz2.BZ2Decompressor().decompress(piece.head, FILE_LIMIT)
        elif kind == "xz":
            import lzma

            broken = (*broken, lzma.LZMAError, MemoryError)
            data = lzma.LZMADecompressor(memlimit=64 << 20).decompress(piece.head, FILE_LIMIT)
        else:
            tree.note_unread(piece.file, f"compressed ({kind}): unpack it first")
            return None
    except broken as error:
        tree.note_unread(piece.file, f"not {kind}: {error}")
        return None
    if len(data) >= FILE_LIMIT:
        tree.note_unread(piece.file, f"what follows {format_size(FILE_LIMIT)}")
    return Piece(piece.file, data)


def first_line(data: bytes) -> str:
    """Return the first line of a file's content."""
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[0].decode("utf-8", "replace")


def why_another_boot(tree: Tree, facts: Facts, log: KernelLog) -> str | None:
    """Return why the last boot of a log is not the boot of the tree; None if there is no contradiction."""
    release = facts.release.text if facts.release is not None else None
    line = facts.cmdline.text if facts.cmdline is not None else None
    same = None if line is None or log.cmdline is None else same_cmdline(line, log.cmdline.text)
    # A vendor's uname may have a suffix that the banner of a rebuilt kernel lacks: then the command line decides.
    kin = log.version in (None, release) or (same and _base(release) == _base(log.version))
    if release is not None and not kin:
        return f"the log is of Linux {log.version}, this kernel is {release}"
    built, logged = _build(facts.banner), _build(log.banner)
    if built is not None and logged is not None and built != logged and log.version == release:
        return f"the log is of another build of Linux {log.version} ({logged}): an earlier boot"
    piece = layout.read(tree, "proc/sys/kernel/random/boot_id", 64)
    boot_id = piece.head.decode("ascii", "replace").replace("-", "").strip() if piece is not None else ""
    if log.boot_id is not None and re.fullmatch(r"[0-9a-f]{32}", boot_id) and boot_id != log.boot_id:
        return f"the log's last boot is {log.boot_id}, this boot is {boot_id}: an earlier boot"
    if same is False:
        return "the command line of the log's last boot differs from proc/cmdline: another boot"
    return None


def _base(release: str | None) -> str | None:
    """Return the version at the beginning of a release."""
    match = re.match(r"\d+\.\d+(?:\.\d+)?", release or "")
    return match[0] if match is not None else None


def _build(banner: str | None) -> str | None:
    """Return number and date of a kernel's build, if the banner has both."""
    match = re.search(r"(#\d+\S*) .*?((?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} .{0,30}\b\d{4})", banner or "")
    return f"{match[1]} {match[2]}" if match is not None else None


def same_cmdline(shown: str, logged: str) -> bool:
    """Return whether a log's command line equals /proc/cmdline, even if truncated or followed by other text."""
    ours, theirs = " ".join(shown.split()), " ".join(logged.split()).removesuffix(" \\")
    if theirs.startswith(ours):
        rest = theirs[len(ours) :]
        return not rest or re.match(r"[^\s=,]{1,40}: |[\"'\[\]{}<\\]", rest) is not None
    return len(theirs) >= 200 and ours.startswith(theirs)
