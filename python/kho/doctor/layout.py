"""Where collectors keep what /proc and dmesg say, so that one set of readers serves all of them.

A machine's tree has proc/, sys/ and var/log; sos and Insights keep the same below a folder, with commands' output
next to it; SUSE's supportconfig and Debian's apport put many files into a few, as sections; kdump leaves a log alone.
Everything is mapped to the names that the machine's own tree has (`proc/meminfo`, `dmesg`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import suppress

from .tree import FILE_LIMIT, Piece, Tree

DEPTH = 6
FOLDERS = 300
"""Folders that are looked into for a report that lies deeper."""
SECTION = re.compile(rb"^#==\[ [A-Z][\w ]{1,40} \]=+#\r?\n# ?([^\n]{1,400})\n", re.MULTILINE)
"""supportconfig's: what it is, then the command or file."""
SHOWN = re.compile(
    rb"^(?:(?:\[?[\w.-]{1,64}@[\w.-]{1,64}[^\n#$>]{0,80}[#$]|[#$+]|crash>) ?(?=(?:sudo +)?(?:/[\w/]{1,20}/)?"
    rb"(?:cat|dmesg|journalctl|uname|lsmod|zcat|log)\b)([^\n]{1,200}?)|==> (/[^\n ]{1,200}) <==) *\r?\n",
    re.MULTILINE,
)
"""A command and what it printed, or a file and its content: in pvereport, in a terminal's text, by head and tail."""
PROMPT = re.compile(
    rb"^(?:\[?[\w.-]{1,64}@[\w.-]{1,64}[^\n#$>]{0,80}[#$]|[#$]|\+\+?|crash>)(?: |$)|^={4,} [^\n]* ={4,}$", re.MULTILINE
)
"""Where what a command printed ends."""
APPORT = re.compile(rb"^([A-Za-z][\w.-]{0,60}):(?: ([^\n]*))?\n((?: [^\n]*\n)*)", re.MULTILINE)
COLLECTORS = re.compile(
    r"sos(?:report)?[-_].*|scc_.*|nts_.*|data|insights[-_].*|must-gather.*|quay-io-.*|registry-.*|.*sha256-.*|nodes|host|rootfs|"
    r"(?:oops|vmcore|ccpp|pstoreoops|xorg|Python3?)-\d{4}-\d\d-\d\d.*|\d{12}|127\.0\.0\.1-.*|\d{4}-\d\d-\d\d-\d\d.*",
    re.IGNORECASE,
)
"""Names of folders that a collector makes, or people make for its output."""
MARKS = ("sos_commands", "insights_commands", "supportconfig.txt", "basic-environment.txt", "os_info")
KNOWN = (
    "proc",
    "sys",
    "var",
    "dmesg",
    "dmesg.txt",
    "vmcore-dmesg.txt",
    "CurrentDmesg.txt",
    "meminfo",
    "cmdline",
    *MARKS,
)
ARCHIVE = re.compile(r".+\.(?:tar|tgz|txz|tbz|tar\.\w+|zip)")
FLAT = {
    "proc/cmdline": ("ProcKernelCmdLine.txt", "ProcCmdLine.txt", "kernel_cmdline"),
    "proc/modules": ("ProcModules.txt",),
}
"""More names that files of /proc are given where there is no proc/."""
COMMANDS = {"dmesg": "dmesg", "uname": "uname", "lsmod": "proc/modules", "journalctl": "journalctl"}
FIELDS = {
    "ProcKernelCmdLine": "proc/cmdline",
    "ProcCmdLine": "proc/cmdline",
    "VmCoreDmesg": "vmcore-dmesg.txt",
    "CurrentDmesg": "dmesg",
    "CurrentDmesg.txt": "dmesg",
    "BootDmesg": "dmesg",
    "KernLog": "var/log/kern.log",
    "Uname": "uname",
    "ProcModules": "proc/modules",
    "ProcModules.txt": "proc/modules",
    "Architecture": "architecture",
}
"""apport's fields. Its ProcCmdline is that of the process which crashed."""


def settle(tree: Tree) -> None:
    """Find what the tree is: enter the folder that has the report, and map what is kept as sections."""
    if tree.live:
        return
    if not _report(tree, ""):
        unread = list(tree.unread)
        _descend(tree)
        tree.unread[:] = unread  # what is elsewhere is not missed
    for name in tree.names(""):
        if name.endswith((".txt", ".TXT", ".log", ".out", ".md")) and name not in (
            "dmesg.txt",
            "meminfo.txt",
            "cmdline.txt",
        ):
            _sections(tree, name)
        if name.endswith((".crash", ".apport")) or name.startswith("apport."):
            _apport(tree, name)
    if tree.exists("insights_commands"):
        tree.layout = "a Red Hat Insights archive"
    elif tree.exists("sos_commands"):
        tree.layout = "an sosreport"


def _report(tree: Tree, folder: str) -> bool:
    """Say whether a folder has what can be examined: by names alone."""
    found = set(tree.names(folder))
    if "data" in found and found & {"meta_data", "insights_archive.txt"}:
        return False  # Insights: all of it is in data/
    wanted = {"zoneinfo", "pagetypeinfo", "zoneinfo.txt", "meminfo.txt", "proc_meminfo.txt"}
    logs = any(re.fullmatch(r"(?:.*[-_.])?dmesg(?:[-_.].*)?|.*\.(?:crash|apport)|apport\..*", name) for name in found)
    return bool(found & {*KNOWN, *wanted}) or logs


def _descend(tree: Tree) -> None:
    """Look for a report that lies deeper; enter it if a collector made it, and if there is one."""
    todo, looked = [("", 0)], 0
    found: list[str] = []
    while todo and looked < FOLDERS:
        folder, depth = todo.pop(0)
        for name in tree.names(folder):
            place = f"{folder}/{name}" if folder else name
            looked += 1
            if looked > FOLDERS or not tree.is_folder(place):
                continue
            if _report(tree, place):
                found.append(place)
            elif depth + 1 < DEPTH:
                todo.append((place, depth + 1))
    made = [place for place in found if _by_collector(tree, place)]
    if len(made) == 1:
        tree.enter(made[0])
    else:
        tree.elsewhere = made or found


def _by_collector(tree: Tree, place: str) -> bool:
    """Say whether a collector made a folder, by its name or by what is in it."""
    parts = place.split("/")
    inside = set(tree.names(place))
    return (
        COLLECTORS.fullmatch(parts[-1]) is not None
        or bool(inside & set(MARKS))
        or (len(parts) > 1 and parts[-2] == "nodes")
    )


def _sections(tree: Tree, name: str) -> None:
    """Map the sections of a file of supportconfig."""
    if SECTION.search(tree.peek(name, 1 << 12)):
        tree.layout = "a supportconfig"
        piece = tree.read(name, tail=FILE_LIMIT)
        for data, numbered in ((piece.head, True), (piece.tail, False)) if piece is not None else ():
            _keep(tree, name, data, numbered, list(SECTION.finditer(data))[:4096])
    elif not tree.exists("proc") and SHOWN.search(tree.peek(name, 1 << 18)):
        piece = tree.read(name)
        if piece is not None:
            _keep(tree, name, piece.head, True, list(SHOWN.finditer(piece.head))[:4096], shown=True)


def _keep(
    tree: Tree, name: str, data: bytes, numbered: bool, marks: list[re.Match[bytes]], shown: bool = False
) -> None:
    """Keep sections by the names that the machine has for them.

    Args: numbered: whether lines can be counted. shown: what was printed in a terminal, believed if it looks so.
    """
    line, counted = 0, 0
    for mark, after in zip(marks, [*marks[1:], None][: len(marks)], strict=True):
        line += data.count(b"\n", counted, mark.end())
        counted = mark.end()
        title = (mark[1] or mark[mark.re.groups]).decode("utf-8", "replace").strip()
        target = _target(title.removeprefix("sudo").strip() if mark[1] else title)
        end = after.start() if after is not None else len(data)
        if shown and (stop := PROMPT.search(data, mark.end(), end)) is not None:
            end = stop.start()
        body, before = data[mark.end() : end], line
        if shown:
            whole = body.lstrip(b"\r\n")
            before += body.count(b"\n", 0, len(body) - len(whole))
            body = whole.rstrip(b"\r\n") + b"\n"
            fits = FITS.get(target) if target is not None else None
            if fits is not None and not fits.search(body):
                continue
        if target is not None and body.strip() and (shown or target not in tree.kept):
            tree.kept[target] = Piece(name, body, b"", before if numbered else None)


def _target(title: str) -> str | None:
    """Name the file that a section is: of /proc as it is, of a command as it is known."""
    words = title.split()
    if not words:
        return None
    if words[0] in ("zcat", "/usr/bin/zcat") and "config.gz" in title:
        return "config"
    command = words[0].rpartition("/")[2]
    if command == "cat" and len(words) == 2:
        words = words[1:]
    elif words[0] == "log" and len(words) <= 2:
        return "vmcore-dmesg.txt"  # of the crash utility
    elif command in COMMANDS:
        previous = re.search(r"(?:-b|--boot)[ =]?-[1-9]", title) is not None
        return None if previous else COMMANDS[command]
    return words[0][1:] if words[0].startswith(("/proc/", "/sys/", "/boot/", "/etc/", "/var/log/")) else None


def _apport(tree: Tree, name: str) -> None:
    """Map the fields of a report of apport."""
    marked = re.search(rb"^(?:ProblemType|ProcKernelCmdLine|DistroRelease): ", tree.peek(name, 1 << 16), re.MULTILINE)
    piece = tree.read(name) if marked is not None else None
    if piece is None:
        return
    tree.layout = "a report of apport"
    for match in APPORT.finditer(piece.head):
        target = FIELDS.get(match[1].decode("ascii", "replace"))
        if target is None or target in tree.kept:
            continue
        body = match[2] or b""
        if body == b"base64":
            body = _unpacked(match[3])
        elif match[3]:
            body = re.sub(rb"^ ", b"", match[3], flags=re.MULTILINE)
        line = piece.head.count(b"\n", 0, match.start(3) if match[3] else match.start())
        tree.kept[target] = Piece(name, body, b"", line)


def _unpacked(encoded: bytes) -> bytes:
    """Read a compressed field: base64 in pieces, gzip."""
    import zlib

    data = b""
    with suppress(ValueError):
        for part in encoded.split():
            data += base64.b64decode(part)
    made = b""
    with suppress(zlib.error):
        made = zlib.decompressobj(47).decompress(data, FILE_LIMIT)
    return made


def names_of(file: str) -> Iterator[str]:
    """Name the places where a file of a machine is kept if it is not where the machine has it."""
    yield from FLAT.get(file, ())
    folder, _, name = file.rpartition("/")
    if folder == "proc":
        yield from (
            name,
            f"{name}.txt",
            f"{name}.log",
            f"proc_{name}",
            f"proc-{name}",
            f"proc.{name}",
            f"proc_{name}.txt",
        )
        yield f"insights_commands/cat_.proc.{name}"
        yield f"sos_commands/kernel/cat_.proc.{name}"
        yield f"sos_commands/memory/cat_.proc.{name}"


FITS = {
    "proc/meminfo": re.compile(rb"^MemTotal:", re.MULTILINE),
    "proc/zoneinfo": re.compile(rb"^Node \d+, zone", re.MULTILINE),
    "proc/pagetypeinfo": re.compile(rb"^Page block order:", re.MULTILINE),
    "proc/version": re.compile(rb"^Linux version \d"),
    "proc/cmdline": re.compile(rb"^[^\n\0]{1,8192}\n?\Z"),
    "proc/iomem": re.compile(rb"^ *[0-9a-f]+-[0-9a-f]+ : ", re.MULTILINE),
    "proc/vmstat": re.compile(rb"^nr_free_pages \d", re.MULTILINE),
    "proc/modules": re.compile(rb"^\w+ +\d+ +\d+", re.MULTILINE),
    "proc/misc": re.compile(rb"^ *\d+ \S+$", re.MULTILINE),
}
"""What a file must look like to be believed under another name."""


def read(tree: Tree, file: str, limit: int) -> Piece | None:
    """Read a file of the machine wherever the tree keeps it."""
    if not tree.live and file in tree.kept and tree.stat(file) is None:
        return tree.kept[file]
    piece = tree.read(file, limit)
    if piece is not None or tree.live or tree.stat(file) is not None:
        return piece
    fits = FITS.get(file)
    for name in names_of(file) if fits is not None else ():
        found = tree.read(name, limit) if tree.exists(name) else None
        if found is not None and fits is not None and fits.search(found.head):
            return found
    return None
