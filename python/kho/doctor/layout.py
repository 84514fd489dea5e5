"""Maps the layouts of different collectors to one, so that the same readers work for all of them.

The tree of a machine has proc/, sys/ and var/log. sos and Insights keep the same files below a directory, next to the
output of commands. SUSE's supportconfig and Debian's apport combine many files into a few, as sections. kdump writes
only a log. All of them are mapped to the names in the machine's own tree (`proc/meminfo`, `dmesg`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import suppress

from .tree import FILE_LIMIT, Piece, Tree

DEPTH = 6
FOLDERS = 300
"""Maximum number of directories that are searched for a report below the root."""
SECTION = re.compile(rb"^#==\[ [A-Z][\w ]{1,40} \]=+#\r?\n# ?([^\n]{1,400})\n", re.MULTILINE)
"""Heading of a section in supportconfig: its kind, then the command or file."""
TRANSCRIPT = re.compile(
    rb"^(?:(?:\[?[\w.-]{1,64}@[\w.-]{1,64}[^\n#$>]{0,80}[#$]|[#$+]|crash>) ?(?=(?:sudo +)?(?:/[\w/]{1,20}/)?"
    rb"(?:cat|dmesg|journalctl|uname|lsmod|zcat|log)\b)([^\n]{1,200}?)|==> (/[^\n ]{1,200}) <==) *\r?\n",
    re.MULTILINE,
)
"""A command before its output, or a file name before its content: pvereport, text of a terminal, head and tail."""
PROMPT = re.compile(
    rb"^(?:\[?[\w.-]{1,64}@[\w.-]{1,64}[^\n#$>]{0,80}[#$]|[#$]|\+\+?|crash>)(?: |$)|^={4,} [^\n]* ={4,}$", re.MULTILINE
)
"""The end of a command's output."""
APPORT = re.compile(rb"^([A-Za-z][\w.-]{0,60}):(?: ([^\n]*))?\n((?: [^\n]*\n)*)", re.MULTILINE)
COLLECTORS = re.compile(
    r"sos(?:report)?[-_].*|scc_.*|nts_.*|data|insights[-_].*|must-gather.*|quay-io-.*|registry-.*|.*sha256-.*|nodes|host|rootfs|"
    r"(?:oops|vmcore|ccpp|pstoreoops|xorg|Python3?)-\d{4}-\d\d-\d\d.*|\d{12}|127\.0\.0\.1-.*|\d{4}-\d\d-\d\d-\d\d.*",
    re.IGNORECASE,
)
"""Names of directories that a collector creates, or that are usual for its output."""
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
"""Additional names of /proc files in trees without proc/."""
SHOW = "systemctl_show"
"""The outputs of `systemctl show`, one after the other."""
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
    "ProcVersionSignature": "proc/version_signature",
    "ProcModules": "proc/modules",
    "ProcModules.txt": "proc/modules",
    "Architecture": "architecture",
}
"""Fields of apport. ProcCmdline is not among them: it is the command line of the process that crashed."""


def detect_layout(tree: Tree) -> None:
    """Detect the layout of a tree: enter the directory that has the report, and map the sections of files."""
    if tree.live:
        return
    if not _has_report(tree, ""):
        unread = list(tree.unread)
        _enter_report(tree)
        tree.unread[:] = unread  # directories that were only searched are not reported as unread
    for name in tree.names(""):
        if name.endswith((".txt", ".TXT", ".log", ".out", ".md")) and name not in (
            "dmesg.txt",
            "meminfo.txt",
            "cmdline.txt",
        ):
            _map_sections(tree, name)
        if name.endswith((".crash", ".apport")) or name.startswith("apport."):
            _map_apport_fields(tree, name)
    if tree.exists("insights_commands"):
        tree.layout = "a Red Hat Insights archive"
    elif tree.exists("sos_commands"):
        tree.layout = "an sosreport"


def _has_report(tree: Tree, folder: str) -> bool:
    """Return whether a directory has files that can be examined, judged by names only."""
    found = set(tree.names(folder))
    if "data" in found and found & {"meta_data", "insights_archive.txt"}:
        return False  # Insights: the files are in data/
    wanted = {"zoneinfo", "pagetypeinfo", "zoneinfo.txt", "meminfo.txt", "proc_meminfo.txt"}
    logs = any(re.fullmatch(r"(?:.*[-_.])?dmesg(?:[-_.].*)?|.*\.(?:crash|apport)|apport\..*", name) for name in found)
    return bool(found & {*KNOWN, *wanted}) or logs


def _enter_report(tree: Tree) -> None:
    """Search the directories below the root for reports; enter the report if a collector made exactly one."""
    todo, searched = [("", 0)], 0
    found: list[str] = []
    while todo and searched < FOLDERS:
        folder, depth = todo.pop(0)
        for name in tree.names(folder):
            place = f"{folder}/{name}" if folder else name
            searched += 1
            if searched > FOLDERS or not tree.is_folder(place):
                continue
            if _has_report(tree, place):
                found.append(place)
            elif depth + 1 < DEPTH:
                todo.append((place, depth + 1))
    made = [place for place in found if _is_collection(tree, place)]
    if len(made) == 1:
        tree.enter(made[0])
    else:
        tree.elsewhere = made or found


def _is_collection(tree: Tree, place: str) -> bool:
    """Return whether a collector made a directory, by its name or by its files."""
    parts = place.split("/")
    inside = set(tree.names(place))
    return (
        COLLECTORS.fullmatch(parts[-1]) is not None
        or bool(inside & set(MARKS))
        or (len(parts) > 1 and parts[-2] == "nodes")
    )


def _map_sections(tree: Tree, name: str) -> None:
    """Map the sections of a supportconfig file, or the commands and outputs in the text of a terminal."""
    if SECTION.search(tree.peek(name, 1 << 12)):
        tree.layout = "a supportconfig"
        piece = tree.read(name, tail=FILE_LIMIT)
        for data, numbered in ((piece.head, True), (piece.tail, False)) if piece is not None else ():
            _keep_sections(tree, name, data, numbered, list(SECTION.finditer(data))[:4096])
    elif not tree.exists("proc") and TRANSCRIPT.search(tree.peek(name, 1 << 18)):
        piece = tree.read(name)
        if piece is not None:
            _keep_sections(tree, name, piece.head, True, list(TRANSCRIPT.finditer(piece.head))[:4096], shown=True)


def _keep_sections(
    tree: Tree, name: str, data: bytes, numbered: bool, marks: list[re.Match[bytes]], shown: bool = False
) -> None:
    """Add sections to `tree.kept`, by the name that their content has on the machine.

    Args: numbered: True if lines can be counted. shown: True for the text of a terminal, where a section must match
    the pattern of its file in `FITS`.
    """
    line, counted = 0, 0
    for mark, after in zip(marks, [*marks[1:], None][: len(marks)], strict=True):
        line += data.count(b"\n", counted, mark.end())
        counted = mark.end()
        title = (mark[1] or mark[mark.re.groups]).decode("utf-8", "replace").strip()
        target = _file_of_section(title.removeprefix("sudo").strip() if mark[1] else title)
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
        if target == SHOW and target in tree.kept and body.strip():
            before_it = tree.kept[target]  # a section for each unit
            if before_it.file == name and len(before_it.head) + len(body) < FILE_LIMIT:
                tree.kept[target] = before_it._replace(head=before_it.head + b"\n\n" + body, before=None)
        elif target is not None and body.strip() and (shown or target not in tree.kept):
            tree.kept[target] = Piece(name, body, b"", before if numbered else None)


def _file_of_section(title: str) -> str | None:
    """Return the name of the file that a section contains, or that of a command's output; None if unknown."""
    words = title.split()
    if not words:
        return None
    if words[0].rpartition("/")[2] == "systemctl" and "show" in words[1:]:
        return SHOW
    if words[0] in ("zcat", "/usr/bin/zcat") and "config.gz" in title:
        return "config"
    command = words[0].rpartition("/")[2]
    if command == "cat" and len(words) == 2:
        words = words[1:]
    elif words[0] == "log" and len(words) <= 2:
        return "vmcore-dmesg.txt"  # a command of the crash utility
    elif command in COMMANDS:
        previous = re.search(r"(?:-b|--boot)[ =]?-[1-9]", title) is not None
        return None if previous else COMMANDS[command]
    return words[0][1:] if words[0].startswith(("/proc/", "/sys/", "/boot/", "/etc/", "/var/log/")) else None


def _map_apport_fields(tree: Tree, name: str) -> None:
    """Map the fields of an apport report."""
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
            body = _decompress(match[3])
        elif match[3]:
            body = re.sub(rb"^ ", b"", match[3], flags=re.MULTILINE)
        line = piece.head.count(b"\n", 0, match.start(3) if match[3] else match.start())
        tree.kept[target] = Piece(name, body, b"", line)


def _decompress(encoded: bytes) -> bytes:
    """Decode a compressed field: pieces of base64, then gzip."""
    import zlib

    data = b""
    with suppress(ValueError):
        for part in encoded.split():
            data += base64.b64decode(part)
    made = b""
    with suppress(zlib.error):
        made = zlib.decompressobj(47).decompress(data, FILE_LIMIT)
    return made


def other_names(file: str) -> Iterator[str]:
    """Yield the other names that collectors and users give to a file of a machine."""
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
    "proc/version_signature": re.compile(rb"^\S+ \S+ \d+\.\d+\S*\s*\Z"),
    "proc/cmdline": re.compile(rb"^[^\n\0]{1,8192}\n?\Z"),
    "proc/iomem": re.compile(rb"^ *[0-9a-f]+-[0-9a-f]+ : ", re.MULTILINE),
    "proc/vmstat": re.compile(rb"^nr_free_pages \d", re.MULTILINE),
    "proc/modules": re.compile(rb"^\w+ +\d+ +\d+", re.MULTILINE),
    "proc/misc": re.compile(rb"^ *\d+ \S+$", re.MULTILINE),
}
"""Patterns that a file must match to be used under another name."""


def read(tree: Tree, file: str, limit: int) -> Piece | None:
    """Read a file of the machine: by its own name, from a section, or by another name."""
    if not tree.live and file in tree.kept and tree.stat(file) is None:
        return tree.kept[file]
    piece = tree.read(file, limit)
    if piece is not None or tree.live or tree.stat(file) is not None:
        return piece
    fits = FITS.get(file)
    for name in other_names(file) if fits is not None else ():
        found = tree.read(name, limit) if tree.exists(name) else None
        if found is not None and fits is not None and fits.search(found.head):
            return found
    return None
