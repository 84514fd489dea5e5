"""Parses kernel messages about KHO and memory, of the last boot in a log.

The messages are those of kernel/kexec_handover.c (6.16 to 6.18) and kernel/liveupdate/ (from 6.19 on). Later kernels
print the same messages and additional ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .logforms import Message, messages
from .tree import Piece, clean

REBOOT = 2.0
"""Seconds. Time stamps that go back by more than this start another boot, even if its first lines are missing."""
AREAS = re.compile(r"KHO: scratch areas: lowmem: (\d{1,12})MiB global: (\d{1,12})MiB pernode: (\d{1,12})MiB")
EXEC_FROM = re.compile(r"KHO: exec from: (\S{1,65}) \(count:? (\d{1,10})\)")
MEMORY = re.compile(r"Memory: (\d{1,15})K/(\d{1,15})K available .*?(\d{1,15})K reserved(?:, (\d{1,15})K cma-reserved)?")
SIGNATURE = re.compile(r"\((Ubuntu \S{1,80} \d{1,3}\.\d{1,3}\.\d{1,5})\)$")
"""The end of the first message of Ubuntu's kernels: what /proc/version_signature contains."""
CMA = re.compile(r"cma: Reserved (\d{1,12}) MiB at (?:0x)?([0-9a-fA-F]{1,16})")
OTHERS = (
    "crashkernel reserved: ",
    "cannot allocate crashkernel",
    "kexec_file: ",
    "kexec_file_load: ",
    ".text .data .bss",
    "ioremap on RAM at ",
    "Passed KHO data, but ",
    "KHO reserve-mem ",
    "Revived memory reservation ",
    "memfd_luo: ",
    "test_kho: ",
    "FDT 'memblock' ",
    "failed to prepare memblock FDT",
    "Kernel panic - not syncing: ",
    "Kdump: loaded ",
    "Initmem setup node ",
)
"""Beginnings of the messages in `KernelLog.others`."""
NODE = re.compile(r"node +(\d{1,5}): \[mem 0x([0-9a-fA-F]{1,16})-0x([0-9a-fA-F]{1,16})\]")


class Evidence(NamedTuple):
    """A line of a file that supports a fact."""

    file: str
    line: int | None
    """Counted from 1; None if unknown."""
    text: str


@dataclass
class KernelLog:
    """Kernel messages about KHO and memory, of the last boot in a log."""

    file: str
    version: str | None = None
    banner: str | None = None
    """The line that begins with `Linux version`, with the same text as /proc/version."""
    signature: Evidence | None = None
    """What the first message of Ubuntu's kernels has of /proc/version_signature."""
    boots: int = 1
    """Number of boots in the log."""
    boot_id: str | None = None
    """Boot id of the journal, 32 hexadecimal digits."""
    stamped: bool = False
    cmdline: Evidence | None = None
    line_ended: bool = False
    """True once `Kernel command line` is complete; it follows `Command line` and is printed once in a boot."""
    kho: list[Evidence] = field(default_factory=list)
    luo: list[Evidence] = field(default_factory=list)
    malformed: list[Evidence] = field(default_factory=list)
    parsed: Evidence | None = None
    """The sizes of `kho_scratch=` as parsed by the kernel."""
    parsed_sizes: tuple[int, int, int] | None = None
    failures: list[Evidence] = field(default_factory=list)
    """Reservations that failed, single areas first."""
    disabled: Evidence | None = None
    found: Evidence | None = None
    """The message that handover data of a previous kernel was found."""
    refused: list[Evidence] = field(default_factory=list)
    """Messages that handover data could not be used."""
    exec_from: tuple[str, int, Evidence] | None = None
    reserved: int | None = None
    """Bytes reserved during boot, including scratch after a cold boot."""
    memory: Evidence | None = None
    cma_reserved: int | None = None
    """Bytes of the CMA areas that are not scratch."""
    cma: list[tuple[int, int, Evidence]] = field(default_factory=list)
    """(phys, bytes, evidence) of the CMA areas that are not scratch."""
    nodes: list[tuple[int, int, int]] = field(default_factory=list)
    """(node, start, end) of each memory range."""
    kdump: Evidence | None = None
    """The message that KHO is off because this kernel saves a crash dump."""
    others: list[Evidence] = field(default_factory=list)
    """Messages of other parts of the kernel that concern KHO or crash kernels, in order."""

    @property
    def silent(self) -> bool:
        """True if the log has no message about this boot."""
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
    """Parse the last boot of a log; None if it is not a kernel log."""
    log: KernelLog | None = None
    last: float | None = None
    boots = 0
    for data, numbered in ((piece.head, True), (piece.tail, False)):
        for message in _chronological(messages(data, numbered)) if data else ():
            if log is None or _starts_boot(message, log, last):
                boots += 1
                log = KernelLog(piece.file, boots=boots, stamped=message.stamp is not None)
                last = None
            if message.boot_id is not None:
                log.boot_id = message.boot_id
            if message.stamp is not None:
                last = message.stamp
            seen = Evidence(piece.file, message.line, clean(message.text))
            if message.text and not message.text.startswith("-- ") and not _is_repeated(log, seen):
                _record(log, message.text, seen)
    return log if log is not None and not (log.boots == 1 and log.silent) else None


def _chronological(message: Iterable[Message]) -> list[Message]:
    """Return messages in chronological order: `journalctl --reverse` prints the banner of a boot last."""
    found = list(message)
    texts = [each.text for each in found if each.text and not each.text.startswith("-- ")]
    ends = len(texts) > 2 and texts[-1].startswith("Linux version ") and not texts[0].startswith("Linux version ")
    if not ends or "ommand line: " not in texts[-2][:24]:
        return found
    boots: list[list[Message]] = [[]]
    for each in found:  # in both orders a boot separator precedes the messages of its boot
        if not each.text or each.text.startswith("-- "):
            boots.append([each])
        else:
            boots[-1].append(each)
    ordered = []
    for boot in reversed(boots):
        border = [each for each in boot[:1] if not each.text or each.text.startswith("-- ")]
        ordered += border + boot[len(border) :][::-1]
    return ordered


def _starts_boot(message: Message, log: KernelLog, last: float | None) -> bool:
    """Return whether a message is the first of another boot."""
    if message.text.startswith("-- ") or (message.boot_id is not None and not message.text):
        return not log.silent or log.boot_id is not None
    if message.text.startswith("Linux version "):
        if log.silent:
            return False  # the boot separator came before: this is the first line of the same boot
        # A program that prints /proc/version adds no time stamp, unlike the kernel's messages: this is not a boot.
        quoted = log.stamped and message.stamp is None and log.version is not None
        return not (quoted and message.text.startswith(f"Linux version {log.version} "))
    if message.text.startswith(("Command line: ", "Kernel command line: ")) and _is_other_cmdline(message.text, log):
        return True  # the first message of a boot whose banner is missing
    return last is not None and message.stamp is not None and message.stamp + REBOOT < last


def _is_repeated(log: KernelLog, seen: Evidence) -> bool:
    """Return whether the log format repeats a message, as rsyslog's debug template and GELF do."""
    return any(seen.text == known.text for known in (*log.kho[-3:], *log.luo[-3:]))


def _is_other_cmdline(text: str, log: KernelLog) -> bool:
    """Return whether a command line follows a complete one and differs from it by more than truncation."""
    if log.cmdline is None or not log.line_ended:
        return False
    new, known = text.split("ommand line: ", 1)[1].rstrip(" \\"), log.cmdline.text
    return bool(new) and not known.startswith(new) and not new.startswith(known.rstrip(" \\")) and new not in known


def _record(log: KernelLog, text: str, seen: Evidence) -> None:
    """Record a message."""
    if text.startswith("Linux version "):
        if log.version is None:
            log.version = text.removeprefix("Linux version ").split(" ")[0][:80]
            log.banner = text[:1024]
            if match := SIGNATURE.search(text.rstrip()):
                log.signature = Evidence(seen.file, seen.line, match[1])
    elif text.startswith("Kernel command line: "):
        # Linux 6.19 and later wrap a long command line: each line but the last ends with " \\".
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
        if area not in [known[:2] for known in log.cma]:  # some log formats have each message twice
            log.cma.append((*area, seen))
    elif match := NODE.match(text):
        part = int(match[1]), int(match[2], 16), int(match[3], 16) + 1
        if part not in log.nodes:
            log.nodes.append(part)
    elif text.startswith(("luo: ", "LUO: ", "liveupdate: ")):
        log.luo.append(seen)
    elif text.startswith("KHO: "):
        log.kho.append(seen)
        _record_kho(log, text, seen)
    elif text.startswith(OTHERS):
        log.others.append(seen)


def _record_kho(log: KernelLog, text: str, seen: Evidence) -> None:
    """Record a message of KHO."""
    if match := AREAS.search(text):
        log.parsed = seen
        log.parsed_sizes = (int(match[1]) << 20, int(match[2]) << 20, int(match[3]) << 20)
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
