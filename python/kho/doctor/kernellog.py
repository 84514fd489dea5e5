"""What the kernel's own messages say of KHO and memory, of the last boot that a log has.

The wordings are those of kernel/kexec_handover.c (6.16 to 6.18) and kernel/liveupdate/ (from 6.19 on); later kernels
say the same and more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .logforms import Said, messages
from .tree import Piece, clean

REBOOT = 2.0
"""Seconds that time stamps go back where another boot begins without its first lines."""
AREAS = re.compile(r"KHO: scratch areas: lowmem: (\d{1,12})MiB global: (\d{1,12})MiB pernode: (\d{1,12})MiB")
EXEC_FROM = re.compile(r"KHO: exec from: (\S{1,65}) \(count:? (\d{1,10})\)")
MEMORY = re.compile(r"Memory: (\d{1,15})K/(\d{1,15})K available .*?(\d{1,15})K reserved(?:, (\d{1,15})K cma-reserved)?")
CMA = re.compile(r"cma: Reserved (\d{1,12}) MiB at (?:0x)?([0-9a-fA-F]{1,16})")
NODE = re.compile(r"node +(\d{1,5}): \[mem 0x([0-9a-fA-F]{1,16})-0x([0-9a-fA-F]{1,16})\]")


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
    banner: str | None = None
    """The line that begins with `Linux version`, as /proc/version has it."""
    boots: int = 1
    """How many boots the log has, this being the last."""
    boot_id: str | None = None
    """As the journal has it, 32 hexadecimal digits."""
    stamped: bool = False
    cmdline: Evidence | None = None
    line_ended: bool = False
    """Whether all of `Kernel command line` was seen, which comes after `Command line` and is said once in a boot."""
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
    kdump: Evidence | None = None
    """That KHO is off on purpose, since this is the kernel that saves a crash dump."""

    @property
    def silent(self) -> bool:
        """Say whether nothing is known of this boot."""
        return not (
            self.version
            or self.cmdline
            or self.kho
            or self.luo
            or self.malformed
            or self.memory
            or self.cma
            or self.nodes
        )


def parse(piece: Piece) -> KernelLog | None:
    """Read a log: what its last boot says; None if it is none of a kernel."""
    log: KernelLog | None = None
    last: float | None = None
    boots = 0
    for data, numbered in ((piece.head, True), (piece.tail, False)):
        for said in _forwards(messages(data, numbered)) if data else ():
            if log is None or _begins(said, log, last):
                boots += 1
                log = KernelLog(piece.file, boots=boots, stamped=said.stamp is not None)
                last = None
            if said.boot_id is not None:
                log.boot_id = said.boot_id
            if said.stamp is not None:
                last = said.stamp
            seen = Evidence(piece.file, said.line, clean(said.text))
            if said.text and not said.text.startswith("-- ") and not _again(log, seen):
                _take(log, said.text, seen)
    return log if log is not None and not (log.boots == 1 and log.silent) else None


def _forwards(said: Iterable[Said]) -> list[Said]:
    """Give messages in the order that they were said: journalctl --reverse has a boot's banner last."""
    found = list(said)
    texts = [each.text for each in found if each.text and not each.text.startswith("-- ")]
    ends = len(texts) > 2 and texts[-1].startswith("Linux version ") and not texts[0].startswith("Linux version ")
    if not ends or "ommand line: " not in texts[-2][:24]:
        return found
    boots: list[list[Said]] = [[]]
    for each in found:  # a border stands before what it begins, in either order
        if not each.text or each.text.startswith("-- "):
            boots.append([each])
        else:
            boots[-1].append(each)
    ordered = []
    for boot in reversed(boots):
        border = [each for each in boot[:1] if not each.text or each.text.startswith("-- ")]
        ordered += border + boot[len(border) :][::-1]
    return ordered


def _begins(said: Said, log: KernelLog, last: float | None) -> bool:
    """Say whether a message is the first of another boot than the log's so far."""
    if said.text.startswith("-- ") or (said.boot_id is not None and not said.text):
        return not log.silent or log.boot_id is not None
    if said.text.startswith("Linux version "):
        if log.silent:
            return False  # the journal said that a boot begins, and this is its first line
        # /proc/version printed by a program has no stamp where the kernel's messages have one: no boot.
        quoted = log.stamped and said.stamp is None and log.version is not None
        return not (quoted and said.text.startswith(f"Linux version {log.version} "))
    if said.text.startswith(("Command line: ", "Kernel command line: ")) and _another_line(said.text, log):
        return True  # of a boot that lost its banner
    return last is not None and said.stamp is not None and said.stamp + REBOOT < last


def _again(log: KernelLog, seen: Evidence) -> bool:
    """Say whether a form has a message twice, as rsyslog's debug template and GELF do: whole, or cut short."""
    return any(seen.text == known.text for known in (*log.kho[-3:], *log.luo[-3:]))


def _another_line(text: str, log: KernelLog) -> bool:
    """Say whether a command line follows one that was complete, and differs from it by more than being cut."""
    if log.cmdline is None or not log.line_ended:
        return False
    new, known = text.split("ommand line: ", 1)[1].rstrip(" \\"), log.cmdline.text
    return bool(new) and not known.startswith(new) and not new.startswith(known.rstrip(" \\")) and new not in known


def _take(log: KernelLog, text: str, seen: Evidence) -> None:
    """Add a line to what is known."""
    if text.startswith("Linux version "):
        if log.version is None:
            log.version = text.removeprefix("Linux version ").split(" ")[0][:80]
            log.banner = text[:1024]
    elif text.startswith("Kernel command line: "):
        # Linux 6.19 and later wrap a long one, with " \\" at the end of each line but the last.
        before = log.cmdline.text if log.cmdline is not None and log.cmdline.text.endswith(" \\") else ""
        log.cmdline = Evidence(seen.file, seen.line, before.removesuffix("\\") + text.split("ommand line: ", 1)[1])
        log.line_ended = not log.cmdline.text.endswith(" \\")
    elif text.startswith("Command line: "):
        if log.cmdline is None:
            log.cmdline = Evidence(seen.file, seen.line, text.split("ommand line: ", 1)[1])
    elif "Malformed early option" in text:
        log.malformed.append(seen)
    elif match := MEMORY.search(text):
        log.reserved, log.memory = int(match[3]) << 10, seen
        log.cma_reserved = int(match[4]) << 10 if match[4] is not None else None
    elif match := CMA.match(text):
        area = int(match[2], 16), int(match[1]) << 20
        if area not in [known[:2] for known in log.cma]:  # some forms have each message twice
            log.cma.append((*area, seen))
    elif match := NODE.match(text):
        part = int(match[1]), int(match[2], 16), int(match[3], 16) + 1
        if part not in log.nodes:
            log.nodes.append(part)
    elif text.startswith(("luo: ", "LUO: ", "liveupdate: ")):
        log.luo.append(seen)
    elif text.startswith("KHO: "):
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
    elif "disabled in the kdump kernel" in text:
        log.kdump = seen
    elif "ound kexec handover data" in text:
        log.found = seen
    elif match := EXEC_FROM.search(text):
        log.exec_from = (match[1], int(match[2]), seen)
    elif "isabling KHO revival" in text or "handover FDT" in text or "KHO: setup: " in text:
        log.refused.append(seen)
