"""Which files of a tree are kernel logs, and whether a log is of the boot that the tree shows."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

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
"""Logs of one boot, the best first."""
MANY_BOOTS = (
    "var/log/kern.log",
    "var/log/messages",
    "var/log/syslog",
    "sos_commands/logs/journalctl_--no-pager",
)
"""Logs of more than one boot: what is before their last one does not count."""
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
"""How a boot begins, or base64 that may have it: without it, a note may quote anything."""
OTHER = re.compile(
    r"\.(?:crash|apport|conf|cfg|pdf|png|zip|tar|tgz|txz|tbz)\b|^(?:config|meminfo|version|cmdline|uname)\b"
)
CAPTURING = re.compile(r"kexec-dmesg.*")
"""Names of logs of the kernel that saved a dump, which says nothing of the one that crashed."""
CRASHED = re.compile(r"vmcore-dmesg.*|dmesg\.\d{8,14}|dmesg-(?:efi|erst|ramoops|pstore)[-\w.]*|console-ramoops[-\w.]*")
"""Names of logs that a kernel left when it crashed."""
MOST = 16
"""Logs that are looked at besides those whose names are known."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def candidates(tree: Tree) -> Iterator[str]:
    """Name the files that may be kernel logs, the best first."""
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


def named(file: str) -> bool:
    """Say whether a file is a log by its name."""
    return file in LOGS or file in MANY_BOOTS or NAMED.fullmatch(file.rpartition("/")[2]) is not None


def unnamed(tree: Tree) -> Iterator[str]:
    """Name the files of the root that have a boot's beginning, though their names do not say that they are logs."""
    looked = 0
    for name in tree.names(""):
        if NAMED.fullmatch(name) or CRASHED.fullmatch(name) or CAPTURING.fullmatch(name) or EARLIER.fullmatch(name):
            continue
        if tree.is_folder(name) or OTHER.search(name) or looked >= MOST:
            continue
        if any(piece.file == name for piece in tree.kept.values()):
            continue  # its sections are read
        looked += 1
        if BEGINS.search(tree.peek(name, 1 << 20)):
            yield name


def crashed(tree: Tree) -> Iterator[str]:
    """Name the logs that crashed kernels left, the newest first; last those of kernels that saved a dump."""
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
    """Read a log, unpacked; of one that may have many boots its end, if that is not all of it."""
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
    """Unpack a log that was rotated or attached, as far as other files are read."""
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
            tree.skipped(piece.file, f"compressed ({kind}): unpack it first")
            return None
    except broken as error:
        tree.skipped(piece.file, f"not {kind}: {error}")
        return None
    if len(data) >= FILE_LIMIT:
        tree.skipped(piece.file, "its end")
    return Piece(piece.file, data)


def first(data: bytes) -> str:
    """Give the first line of a file."""
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[0].decode("utf-8", "replace")


def of_another_boot(tree: Tree, facts: Facts, log: KernelLog) -> str | None:
    """Say why a log's last boot is not the one that the tree shows; None if nothing speaks against it."""
    release = facts.release.text if facts.release is not None else None
    line = facts.cmdline.text if facts.cmdline is not None else None
    same = None if line is None or log.cmdline is None else same_line(line, log.cmdline.text)
    # Vendors' uname has a suffix that banners of rebuilt kernels may lack: then the command line decides.
    kin = log.version in (None, release) or (same and _base(release) == _base(log.version))
    if release is not None and not kin:
        return f"it is of Linux {log.version}, this is {release}"
    built, said = _build(facts.banner), _build(log.banner)
    if built is not None and said is not None and built != said and log.version == release:
        return f"it is of another build of Linux {log.version} ({said}): an earlier boot"
    piece = layout.read(tree, "proc/sys/kernel/random/boot_id", 64)
    boot_id = piece.head.decode("ascii", "replace").replace("-", "").strip() if piece is not None else ""
    if log.boot_id is not None and re.fullmatch(r"[0-9a-f]{32}", boot_id) and boot_id != log.boot_id:
        return f"its last boot is {log.boot_id}, this is {boot_id}: an earlier boot"
    if same is False:
        return "the command line of its last boot is not the one of proc/cmdline: another boot"
    return None


def _base(release: str | None) -> str | None:
    """Give the version that a release begins with."""
    match = re.match(r"\d+\.\d+(?:\.\d+)?", release or "")
    return match[0] if match is not None else None


def _build(banner: str | None) -> str | None:
    """Give number and date of a kernel's build, if a banner has both."""
    match = re.search(r"(#\d+\S*) .*?((?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} .{0,30}\b\d{4})", banner or "")
    return f"{match[1]} {match[2]}" if match is not None else None


def same_line(shown: str, said: str) -> bool:
    """Say whether a log's command line is that of /proc/cmdline, though it be cut or something stick to its end."""
    ours, theirs = " ".join(shown.split()), " ".join(said.split()).removesuffix(" \\")
    if theirs.startswith(ours):
        rest = theirs[len(ours) :]
        return not rest or re.match(r"[^\s=,]{1,40}: |[\"'\[\]{}<\\]", rest) is not None
    return len(theirs) >= 200 and ours.startswith(theirs)
