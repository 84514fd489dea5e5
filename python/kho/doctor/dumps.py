"""What a crash dump has lost, because the crash kernel ran in the crashed machine's memory: checks DOC028 and DOC047.

In the crash kernel its own files show the range. Of a saved dump, the crash kernel's log does if it was kept, and the
log of the crashed kernel, which is in the dump, tells whether its crash kernel went into scratch (docs/crash-dumps.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .crash import NOKASLR, LoadedImage, loaded_image
from .facts import Facts
from .kernellog import Evidence, KernelLog, parse
from .logs import CAPTURING
from .releases import affected, shown, unsure_text
from .report import Certainty, Report
from .scratch import Figures, enablement
from .text import size
from .tree import Piece, clean

if TYPE_CHECKING:
    from ..handover.symbols.vmcoreinfo import Readable

LEAST = 16 << 20
"""Bytes of a range from which it can be the memory reserved for a crash kernel."""
LOW = 1 << 20
"""The first MiB, which each crash kernel has in addition."""
MISPLACED = ".text .data .bss"
HEADER = re.compile(r"elfcorehdr=(?:\d+[KMG]?@)?(0x[0-9a-f]{1,16})")
SAVED_LOG = 4 << 20
"""Bytes that are read of a crash kernel's log next to a dump."""


@dataclass(frozen=True)
class Range:
    """A range of the crashed machine's memory, in which the crash kernel ran."""

    start: int
    end: int
    seen: list[Evidence] = field(default_factory=list)


def _outside(pieces: list[Range], header: int | None, code: int | None) -> Range | None:
    """Return the piece of RAM in which the crash kernel runs outside the memory reserved for it; None if there is none.

    The memory reserved for it is the piece that `elfcorehdr=` is next to. The kernel's code tells which other piece it
    is in; without it there must be one other piece.
    """

    def distance(piece: Range) -> int:
        if header is None or piece.start <= header < piece.end:
            return 0
        return min(abs(piece.start - header), abs(piece.end - header))

    high = [piece for piece in pieces if piece.end > LOW]
    if code is not None:
        own = next((piece for piece in high if piece.start <= code < piece.end), None)
        others = [piece for piece in high if piece is not own and piece.end - piece.start >= LEAST]
        if own is None or not others:
            return None
        return None if header is not None and distance(own) <= min(map(distance, others)) else own
    if header is None or len(high) != 2:
        return None
    return max(high, key=distance)


def lost_range(facts: Facts) -> Range | None:
    """Return the range in which this crash kernel, or the one that saved this dump, runs or ran; None if unknown."""
    crash = facts.crash
    if crash.inside is not None and crash.code is not None:
        pieces = [Range(start, end, [seen, crash.code[2]]) for start, end, seen in crash.ram]
        return _outside(pieces, _header(facts.cmdline), crash.code[0])
    log = crash.saved_by or (facts.log if crash.inside is not None else None)
    return lost_of_log(log) if log is not None else None


def lost_of_log(log: KernelLog) -> Range | None:
    """Return the range that the log of a crash kernel names as RAM outside its own, if it says that it runs there."""
    if not any(seen.text.startswith(MISPLACED) for seen in log.others):
        return None
    pieces = [
        Range(start, end, [Evidence(log.file, None, f"node {node}: [mem {start:#x}-{end - 1:#x}]")])
        for node, start, end in log.nodes
    ]
    return _outside(pieces, _header(log.cmdline), None)


def _header(line: Evidence | None) -> int | None:
    match = HEADER.search(line.text) if line is not None else None
    return int(match[1], 16) if match is not None else None


def check_dump(facts: Facts, report: Report, found: Figures) -> None:
    """DOC028: this crash dump has lost a range."""
    crash = facts.crash
    log = crash.saved_by or facts.log
    said = next((seen for seen in log.others if seen.text.startswith(MISPLACED)), None) if log is not None else None
    if crash.inside is None and crash.saved_by is None and said is not None and facts.meminfo:
        return  # a boot with memmap= on a running machine
    lost = lost_range(facts)
    if said is None and lost is None:
        return
    unread = [seen for seen in log.others if seen.text.startswith("ioremap on RAM")] if log is not None else []
    certainty: Certainty = "certain" if said is not None and (lost is not None or not crash.iomem) else "likely"
    seen = [said, *(lost.seen if lost is not None else []), crash.inside, *unread[:2]]
    report.add("DOC028", lost_text(lost), certainty, *seen)


def lost_text(lost: Range | None) -> str:
    """Say what a dump has lost."""
    where = f"at {lost.start:#x} to {lost.end - 1:#x}, in {size(lost.end - lost.start)}" if lost else "in memory"
    text = (
        f"the crash kernel runs {where} of the crashed kernel's memory: pages there cannot be read from /proc/vmcore "
    )
    return text + "(EFAULT), or read as the crash kernel's own bytes"


def check_saved(facts: Facts, report: Report, found: Figures) -> None:
    """DOC047: the crash kernel that saved this dump probably ran in memory of the crashed machine."""
    if not facts.crash.crashed or facts.log is None or any(each.id == "DOC028" for each in report.findings):
        return
    enabled = enablement(facts, report.enabled_by_default)
    verdict = suspicion(facts, is_on=None if enabled is None and not facts.log.kho else enabled is not False)
    if verdict is not None:
        text, certainty, seen = verdict
        report.add("DOC047", text, certainty, *seen)


def suspicion(facts: Facts, *, is_on: bool | None) -> tuple[str, Certainty, list[Evidence | None]] | None:
    """Say whether a crash kernel of this machine went into scratch, by the log of the machine that crashed.

    Args: is_on: whether KHO was on; None if unknown.
    Returns: text, certainty and evidence; None if nothing speaks for it.
    """
    level = affected(facts, "crash-kernel")
    line = facts.cmdline.text if facts.cmdline is not None else ""
    image: LoadedImage | None = loaded_image(facts)
    loaded = [seen for seen in facts.log.others if seen.text.startswith("Kdump: loaded")] if facts.log else []
    arm = facts.architecture is not None and facts.architecture.text == "aarch64"
    if level is False or is_on is False or NOKASLR.search(line) or arm or not (loaded or image):
        return None
    if image is not None and not image.has_kho:
        return None
    text = (
        f"Linux {facts.release.text if facts.release is not None else '?'} passes its scratch areas to a crash kernel "
    )
    text += "that kexec_file_load loads, and KASLR places it there: what this dump has of scratch can be the crash "
    text += "kernel's bytes, and pages can be missing"
    certainty: Certainty = "likely" if is_on and image is None else "guess"
    if image is not None:
        certainty = "certain" if level else "likely"
        text += "; the loaded image had the segment with the scratch areas"
    else:
        text += "; unless its command line had nokaslr, or kexec_load loaded it"
        text += "" if is_on else ", or KHO was off"
    seen = [*shown(facts), *loaded[-1:], *(image.evidence if image is not None else [])]
    return text + unsure_text(facts, "crash-kernel"), certainty, seen


# Of a dump's file


def facts_of_dump(memory: Readable, name: str) -> Facts | None:
    """Return what a dump shows about the machine that crashed: its release and its kernel log; None without both."""
    from ..handover.kernellog import kernel_log

    release = memory.vmcoreinfo("OSRELEASE")
    if release is None or memory.vmcoreinfo("CRASHTIME") is None:
        return None  # not written by a crash kernel
    text = kernel_log(memory)
    if text is None:
        return None
    log = parse(Piece(name, text.encode()))
    facts = Facts(name, live=False)
    facts.release = Evidence(f"{name}: VMCOREINFO", None, release)
    facts.log = log
    if log is not None:
        facts.cmdline, facts.crash.signature = log.cmdline, log.signature
    facts.crash.crashed = True
    machine = getattr(memory, "machine", None)
    facts.architecture = Evidence(name, None, machine) if machine in ("x86_64", "aarch64") else None
    return facts


def logs_next_to(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the logs of crash kernels in the directory of a dump (kexec-dmesg.log)."""
    folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH120, PTH100 - as in the rest of this package
    with suppress(OSError):
        for name in sorted(os.listdir(folder))[:1024]:  # noqa: PTH208
            if CAPTURING.fullmatch(name):
                with open(f"{folder}/{name}", "rb", opener=_without_waiting) as file:
                    yield name, file.read(SAVED_LOG)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def notes_of_dump(memory: Readable, path: str, *, is_on: bool | None) -> Iterator[str]:
    """Yield what a saved dump has lost: by the log of its crash kernel that is next to it, or by its own log.

    Args: is_on: whether KHO was on in the machine that crashed; None if unknown.
    """
    name = clean(os.path.basename(path))  # noqa: PTH119
    for file, data in logs_next_to(path):
        log = parse(Piece(clean(file), data))
        if log is not None and any(seen.text.startswith(MISPLACED) for seen in log.others):
            yield f"{lost_text(lost_of_log(log))} ({file}; DOC028)"
            return
    facts = facts_of_dump(memory, name)
    verdict = suspicion(facts, is_on=is_on) if facts is not None and facts.log is not None else None
    if verdict is not None:
        yield f"{verdict[0]} ({verdict[1]}; kho doctor --explain DOC047)"


CHECKS = (check_dump, check_saved)
