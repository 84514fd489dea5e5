"""The kernel's own messages, from dmesg in any of the forms it is kept in.

The wordings are those of kernel/kexec_handover.c (6.16 to 6.18) and kernel/liveupdate/ (from 6.19 on); later kernels
say the same and more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .tree import Piece, clean

HIT_LIMIT = 2000
LINE_LIMIT = 4096

WORDS = re.compile(
    rb"KHO: |luo: |LUO: |liveupdate: |cma: Reserved |hugetlb_cma: reserve|Memory: \d|Linux version \d|ommand line: |"
    rb"  node +\d+: \[mem |Malformed early option '(?:kho|liveupdate)|crashkernel reserved: "
)
PREFIX = re.compile(r"^(?:.*? kernel: )?(?:<\d+>|\d+,\d+,\d+,[^;]*;)?(?:\[[\w .:+]{1,40}\] ?)?(?:\[ *[TC]\d+\] ?)?")
AREAS = re.compile(r"KHO: scratch areas: lowmem: (\d{1,12})MiB global: (\d{1,12})MiB pernode: (\d{1,12})MiB")
EXEC_FROM = re.compile(r"KHO: exec from: (\S{1,65}) \(count:? (\d{1,10})\)")
MEMORY = re.compile(r"Memory: (\d{1,15})K/(\d{1,15})K available .*?(\d{1,15})K reserved(?:, (\d{1,15})K cma-reserved)?")
CMA = re.compile(r"cma: Reserved (\d{1,12}) MiB at (?:0x)?([0-9a-fA-F]{1,16})")
NODE = re.compile(r"  node +(\d{1,5}): \[mem 0x([0-9a-fA-F]{1,16})-0x([0-9a-fA-F]{1,16})\]")


class Evidence(NamedTuple):
    """What something was seen by."""

    file: str
    line: int | None
    """Counted from 1; None where the line is not known."""
    text: str


@dataclass
class KernelLog:
    """What the kernel said of KHO and memory, since its last boot that the log has."""

    file: str
    version: str | None = None
    cmdline: Evidence | None = None
    kho: list[Evidence] = field(default_factory=list)
    luo: list[Evidence] = field(default_factory=list)
    malformed: list[Evidence] = field(default_factory=list)
    asked: Evidence | None = None
    """The sizes of `kho_scratch=`, as the kernel understood them."""
    asked_sizes: tuple[int, int, int] | None = None
    failures: list[Evidence] = field(default_factory=list)
    """Reservations that failed, the areas first."""
    disabled: Evidence | None = None
    found: Evidence | None = None
    """Handover data of a previous kernel."""
    refused: list[Evidence] = field(default_factory=list)
    """Handover data that could not be used."""
    exec_from: tuple[str, int, Evidence] | None = None
    reserved: int | None = None
    """Bytes reserved while booting, scratch among them on a cold boot."""
    memory: Evidence | None = None
    cma_reserved: int | None = None
    """Bytes of CMA areas of others."""
    cma: list[tuple[int, int, Evidence]] = field(default_factory=list)
    """(phys, bytes) of CMA areas of others."""
    nodes: list[tuple[int, int, int]] = field(default_factory=list)
    """(node, start, end) of memory."""


def hits(piece: Piece) -> Iterator[Evidence]:
    """Find the lines that matter, in order."""
    for data, numbered in ((piece.head, True), (piece.tail, False)):
        line, seen, end, count = 1, 0, -1, 0
        for match in WORDS.finditer(data):
            if match.start() < end:
                continue
            start = data.rfind(b"\n", max(match.start() - LINE_LIMIT, 0), match.start()) + 1
            start = max(start, match.start() - LINE_LIMIT)
            end = data.find(b"\n", match.end(), match.end() + LINE_LIMIT)
            end = end if end >= 0 else min(match.end() + LINE_LIMIT, len(data))
            line += data.count(b"\n", seen, match.start())
            seen = match.start()
            text = PREFIX.sub("", data[start:end].decode("utf-8", "replace"))
            yield Evidence(piece.file, line if numbered else None, text)
            count += 1
            if count >= HIT_LIMIT:
                break


def parse(piece: Piece) -> KernelLog | None:
    """Read a log; None if it is none of a kernel."""
    log: KernelLog | None = None
    for seen in hits(piece):
        if log is None or re.match(r"Linux version \d", seen.text):
            log = KernelLog(piece.file)
        _take(log, seen.text, Evidence(seen.file, seen.line, clean(seen.text)))
    return log


def _take(log: KernelLog, text: str, seen: Evidence) -> None:
    """Add a line to what is known."""
    if text.startswith("Linux version "):
        log.version = text.removeprefix("Linux version ").split(" ")[0][:80]
    elif "Kernel command line: " in text or (text.startswith("Command line: ") and log.cmdline is None):
        log.cmdline = Evidence(seen.file, seen.line, text.split("ommand line: ", 1)[1])
    elif "Malformed early option" in text:
        log.malformed.append(seen)
    elif match := MEMORY.search(text):
        log.reserved, log.memory = int(match[3]) << 10, seen
        log.cma_reserved = int(match[4]) << 10 if match[4] is not None else None
    elif match := CMA.search(text):
        log.cma.append((int(match[2], 16), int(match[1]) << 20, seen))
    elif match := NODE.search(text):
        log.nodes.append((int(match[1]), int(match[2], 16), int(match[3], 16) + 1))
    elif re.search(r"\bluo: |\bLUO: |\bliveupdate: ", text):
        log.luo.append(seen)
    elif "KHO: " in text:
        log.kho.append(seen)
        _take_kho(log, text, seen)


def _take_kho(log: KernelLog, text: str, seen: Evidence) -> None:
    """Add a line of KHO's."""
    if match := AREAS.search(text):
        log.asked = seen
        log.asked_sizes = (int(match[1]) << 20, int(match[2]) << 20, int(match[3]) << 20)
    elif "disabling kexec handover" in text:
        log.disabled = seen
    elif "Failed to reserve" in text:
        log.failures.append(seen)
    elif "ound kexec handover data" in text:
        log.found = seen
    elif match := EXEC_FROM.search(text):
        log.exec_from = (match[1], int(match[2]), seen)
    elif "isabling KHO revival" in text or "handover FDT" in text or "KHO: setup: " in text:
        log.refused.append(seen)
