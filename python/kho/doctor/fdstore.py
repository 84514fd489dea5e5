"""systemd's descriptor store: what of it will cross a kexec, what is held for no unit. Checks DOC042 to DOC046, DOC048.

Live, `systemctl show` and `systemd-analyze fdstore` are asked; in a snapshot their saved output is read (sos, Insights,
supportconfig, systemctl_show*, systemd-analyze_fdstore*).
What systemd 262.1 does with the store was run on Linux 7.3.4 on 30 November 2026.
"""

from __future__ import annotations

import re

from . import layout
from .facts import Entry, Facts, Store, Unit
from .kernellog import Evidence
from .releasechecks import live_update
from .report import Report
from .scratch import Figures, enablement
from .text import size
from .tree import FILE_LIMIT, Tree, clean

PROPERTIES = "Id,LoadState,NFileDescriptorStore,FileDescriptorStorePreserve,KExecCount"
ASK = ("systemctl", "show", "--no-pager", f"--property={PROPERTIES}")
SECONDS = 30
"""For systemctl, which answers in milliseconds, but not on a machine that is short of memory or overloaded."""
SAVED = (
    ("sos_commands/systemd", "systemctl_show"),
    ("insights_commands", "systemctl_show"),
    ("", "systemctl_show"),
    ("", "systemctl-show"),
)
"""Directories, and how the names of files with the output of `systemctl show` begin in them."""
FDSTORES = (("sos_commands/systemd", "systemd-analyze_fdstore"), ("", "systemd-analyze_fdstore"), ("", "fdstore"))
"""Directories, and how the names of files with the output of `systemd-analyze fdstore UNIT` begin in them."""
ROW = re.compile(r"(.{1,255}?) +(\S+) +(\d+:\d+) +(\d+) +(\S+) +(\S.*?) +(ro|rw|wo|\S{1,3})\s*$")
"""A row of it: FDNAME TYPE DEVNO INODE RDEVNO PATH ACCESS."""
UNIT = re.compile(r"[\w@.:\\-]{1,240}\.(?:service|socket|scope)")
ASKED, ENTRIES = 16, 512
SESSION = "anon_inode:[luo_session]"
LEAST = 16 << 20
"""Bytes of shared memory outside of every cgroup from which it is reported."""
BY_KEXEC = "208"
"""/proc/sys/kernel/bootloader_type of a kernel that kexec started (x86: type 0xd)."""


def store(tree: Tree, facts: Facts) -> Store:
    """Read the stores of all units, the count of kexecs and the memory of no cgroup."""
    made = Store()
    for file, text in _ask(tree) if facts.live else _saved(tree):
        _parse(made, file, text)
    _entries(tree, made, live=facts.live)
    file = "proc/sys/kernel/bootloader_type"
    piece = layout.read(tree, file, 64) if tree.exists(file) else None
    if piece is not None and clean(piece.head) == BY_KEXEC:
        made.by_kexec = Evidence(piece.file, 1, f"{BY_KEXEC} (kexec)")
    _shmem(tree, made)
    return made


def _ask(tree: Tree) -> list[tuple[str, str]]:
    """Ask the running systemd, if there is one; it answers without root."""
    import subprocess

    found = []
    for units in (("--all", "--type=service", "*"), ()) if tree.is_folder("run/systemd/system") else ():
        try:
            done = subprocess.run([*ASK, *units], capture_output=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            tree.note_unread("systemctl show", f"no answer in {SECONDS} s" if late else type(error).__name__)
            break
        found.append(("systemctl show", done.stdout[:FILE_LIMIT].decode("utf-8", "replace")))
    return found


def _saved(tree: Tree) -> list[tuple[str, str]]:
    """Read the saved outputs of `systemctl show`."""
    found = []
    if (kept := tree.kept.get(layout.SHOW)) is not None:
        found.append((kept.file, kept.head.decode("utf-8", "replace")))
    for folder, start in SAVED:
        names = tree.names(folder) if not folder or tree.exists(folder) else []
        for name in [each for each in names if each.startswith(start)][:8]:
            piece = tree.read(f"{folder}/{name}" if folder else name)
            if piece is not None:
                found.append((piece.file, piece.head.decode("utf-8", "replace")))
    return found


def _parse(made: Store, file: str, text: str) -> None:
    """Parse `KEY=VALUE` lines; an empty line separates units."""
    values: dict[str, str] = {}
    first = 1
    for line, content in enumerate([*text.split("\n"), ""], 1):
        name, equals, value = content.strip().partition("=")
        if equals and name in PROPERTIES.split(","):
            values[name] = value[:256]
        if content.strip():
            continue
        count = values.get("NFileDescriptorStore", "")
        if count.isdigit() and len(count) < 10 and int(count) and "Id" in values and len(made.units) < 1000:
            unit, preserve = clean(values["Id"]), clean(values.get("FileDescriptorStorePreserve", ""))
            load = clean(values.get("LoadState", ""))
            shown = f"{unit}: {count} descriptors, FileDescriptorStorePreserve={preserve}, LoadState={load}"
            known = {each.name for each in made.units}
            if unit not in known:
                made.units.append(Unit(unit, int(count), preserve, load, Evidence(file, first, shown)))
        kexecs = values.get("KExecCount", "")
        if kexecs.isdigit() and len(kexecs) < 10 and made.kexecs is None:
            made.kexecs = int(kexecs), Evidence(file, first, f"KExecCount={kexecs}")
        values, first = {}, line + 1


def _entries(tree: Tree, made: Store, *, live: bool) -> None:
    """Read the descriptors of stores whose units keep them, and the memfds that process 1 holds twice."""
    kept = [unit for unit in made.units if unit.preserve in ("yes", "on-success")]
    for unit in kept[:ASKED] if live else []:
        if UNIT.fullmatch(unit.name):
            _rows(made, unit.name, f"systemd-analyze fdstore {unit.name}", _analyze(unit.name))
    for folder, start in FDSTORES if not live else ():
        for file in [name for name in tree.names(folder) if name.startswith(start)][:64]:
            piece = tree.read(f"{folder}/{file}" if folder else file, 1 << 20)
            unit_name = UNIT.search(file.removeprefix(start))
            if piece is not None:
                text = piece.head.decode("utf-8", "replace")
                _rows(made, unit_name[0].lstrip("_-") if unit_name is not None else "", piece.file, text)
    if not made.entries:
        for fd, target in tree.links("proc/1/fd") if tree.exists("proc/1/fd") else []:
            about = tree.peek(f"proc/1/fdinfo/{fd}", 4096) if target.startswith("/memfd:") else b""
            inode = re.search(rb"^ino:\s*(\d{1,20})$", about, re.MULTILINE)
            if inode is not None and len(made.entries) < ENTRIES:
                seen = Evidence(f"proc/1/fd/{fd}", None, clean(f"{target}, inode {inode[1].decode()}"))
                made.entries.append(Entry("", clean(target), "reg", inode[1].decode(), target, seen))


def _analyze(unit: str) -> str:
    import subprocess

    ask = ["systemd-analyze", "--no-pager", "fdstore", unit]
    try:
        done = subprocess.run(ask, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout[: 1 << 20].decode("utf-8", "replace")


def _rows(made: Store, unit: str, file: str, text: str) -> None:
    """Parse the table of `systemd-analyze fdstore`."""
    for line, content in enumerate(text.split("\n")[:4096], 1):
        match = ROW.match(content.strip()[:1024])
        if match is not None and len(made.entries) < ENTRIES:
            seen = Evidence(file, line, clean(content))
            made.entries.append(Entry(unit, clean(match[1]), match[2], f"{match[3]} {match[4]}", clean(match[6]), seen))


def is_refused(entry: Entry) -> bool:
    """Return whether the kernel has no way to preserve a descriptor: it is no memfd, and no session."""
    return not (entry.path.startswith(SESSION) or (entry.kind == "reg" and entry.path.endswith("(deleted)")))


def check_entries(facts: Facts, report: Report, found: Figures) -> None:
    """DOC048: descriptors in stores that cross a kexec, and that the kernel refuses."""
    made, available = facts.store, live_update(facts, report)
    if made is None or available is None:
        return
    keep = {unit.name for unit in made.units if unit.preserve in ("no", "restart")}
    entries = [entry for entry in made.entries if entry.unit not in keep]
    refused = [entry for entry in entries if is_refused(entry)]
    seen: dict[str, Entry] = {}
    twice: list[tuple[Entry, Entry]] = []
    for entry in entries:
        if entry in refused or entry.path.startswith(SESSION):
            continue
        if entry.inode in seen:
            twice.append((seen[entry.inode], entry))
        seen.setdefault(entry.inode, entry)
    parts = [f"{_place(entry)} is no memfd ({entry.path[:40]})" for entry in refused[:6]]
    parts += [f"{_place(one)} and {_place(other)} are one memfd" for one, other in twice[:6]]
    if parts:
        text = f"the kernel will refuse {len(refused) + len(twice)} of {len(entries)}: {'; '.join(parts)}"
        shown = [entry.seen for entry in refused[:6]] + [entry.seen for pair in twice[:6] for entry in pair]
        report.add("DOC048", text, "certain" if all(entry.unit for entry in entries) else "likely", available, *shown)


def _place(entry: Entry) -> str:
    return f"{entry.unit} {entry.name}" if entry.unit else entry.seen.file


def _shmem(tree: Tree, made: Store) -> None:
    """Compare the shared memory of the root cgroup with the sum of its children's."""
    base = "sys/fs/cgroup"
    root = _shmem_of(tree, f"{base}/memory.stat")
    if root is None:
        return
    folders = [f"{base}/{name}" for name in tree.names(base) if tree.is_folder(f"{base}/{name}")]
    children = [_shmem_of(tree, f"{folder}/memory.stat") for folder in folders]
    known = sum(nbytes for nbytes in children if nbytes is not None)
    if any(nbytes is not None for nbytes in children) and root - known > 0:
        text = f"shmem {root}; its children have {known}"
        made.shmem = root - known, Evidence(f"{base}/memory.stat", None, text)


def _shmem_of(tree: Tree, file: str) -> int | None:
    piece = tree.read(file, 1 << 16) if tree.exists(file) else None
    found = re.search(rb"^shmem (\d{1,18})$", piece.head, re.MULTILINE) if piece is not None else None
    return int(found[1]) if found is not None else None


def check_store(facts: Facts, report: Report, found: Figures) -> None:
    """DOC042 to DOC046: what will not cross, what is held for no unit, what did not cross, memory of no cgroup."""
    made = facts.store
    if made is None:
        return
    lost = [unit for unit in made.units if unit.load == "not-found"]
    if lost:
        names = ", ".join(unit.name for unit in lost[:6])
        text = f"{len(lost)} unit{'' if len(lost) == 1 else 's'} without a unit file hold descriptors: {names}; the "
        text += "memory stays until a unit file of that name exists, and the next kexec carries it on"
        report.add("DOC043", text, "certain", *(unit.seen for unit in lost[:6]))
    available = live_update(facts, report)
    stay = [unit for unit in made.units if unit.preserve in ("no", "restart") and unit.load != "not-found"]
    if available is not None and stay:
        text = ", ".join(f"{unit.name} ({unit.count}, {unit.preserve})" for unit in stay[:8])
        report.add(
            "DOC042", f"will not cross systemctl kexec: {text}", "certain", available, *(u.seen for u in stay[:6])
        )
    on = enablement(facts, report.enabled_by_default) is not False and report.state == "active"
    none = made.kexecs is not None and made.kexecs[0] == 0 and report.boot == "cold"
    if on and none and made.by_kexec is not None and made.kexecs is not None:
        text = "kexec started this kernel, KExecCount is 0, and there is no handover: kexec_load loaded it, or KHO was "
        text += "off before"
        report.add("DOC044", text, "likely", made.by_kexec, made.kexecs[1])
    held = [seen for seen in facts.sessions if seen.file.startswith("proc/1/fd/") and "luo_session" in seen.text]
    if held and report.boot == "kho":
        text = f"systemd holds {len(held)} session{'' if len(held) == 1 else 's'} of the last kernel in its store"
        text += ": PRESERVE_FD on them fails, and the next kexec loses them"
        report.add("DOC045", text, "likely", *held[:6])
    if made.shmem is not None and made.shmem[0] >= LEAST and report.boot == "kho":
        text = f"{size(made.shmem[0])} of shared memory belong to no cgroup: what systemd retrieved from its store"
        report.add("DOC046", text, "likely", made.shmem[1])
