"""What a crash of this machine would leave: whether a crash kernel is there, where it would run, what it would save.

The facts were measured on Linux 6.19.11, 7.0.9, 7.0.11 and 7.3.4, x86_64 (docs/crash-dumps.md). `checks` of this module
are the rules DOC026, DOC027 and DOC029 to DOC031; those about a dump are in `dumps`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..crashline import crash_kernel_bytes
from .facts import Facts
from .kernellog import MEMORY, Evidence
from .releases import affected, release_of, shown, sure, unsure_text
from .report import Certainty, Report
from .scratch import Figures, enablement, split_cmdline
from .text import size

CrashDumps = Literal["ok", "damaged", "none", "none after the next live update", "not set up", "cannot tell"]
ALIGN = 16 << 20
"""CRASH_ALIGN of x86: the crash kernel's memory begins at a multiple of it."""
ALIGN_ARM = 2 << 20
"""CRASH_ALIGN of arm64."""
STEP = 64 << 20
"""Proposed sizes of the global area are multiples of it."""
NOKASLR = re.compile(r"(?:^|[\s\"'=])nokaslr(?=[\s\"']|$)")
BY_KEXEC_LOAD = re.compile(r"(?:^|[\s\"'=])(?:-c|--kexec-syscall)(?=[\s\"']|$)")
SEGMENTS = re.compile(r"nr_segments = (\d{1,4})")
SEGMENT = re.compile(r"segment\[\d{1,4}\]: .*bufsz=0x([0-9a-f]{1,16})\b")
TYPE = re.compile(r"kexec_file_load: type:(\d{1,3})")


@dataclass(frozen=True)
class LoadedImage:
    """The crash image that `kexec -d -p -s` described in the kernel log."""

    has_kho: bool
    evidence: list[Evidence]


def is_on(facts: Facts, report: Report) -> bool:
    """Return whether this kernel hands over: KHO is active and enabled, so that kexec images get its data."""
    return report.state == "active" and enablement(facts, report.enabled_by_default) is not False


def loaded_image(facts: Facts) -> LoadedImage | None:
    """Return the crash image that was loaded last, if the kernel log describes it; None if it does not.

    KHO adds a segment with the scratch array, 16 bytes for each of at least three areas. All others are larger.
    """
    found: LoadedImage | None = None
    count: Evidence | None = None
    scratch: list[Evidence] = []
    for seen in facts.log.others if facts.log is not None else []:
        if SEGMENTS.search(seen.text):
            count, scratch = seen, []
        elif count is not None and (match := SEGMENT.search(seen.text)) is not None:
            nbytes = int(match[1], 16)
            scratch += [seen] if nbytes % 16 == 0 and 48 <= nbytes < 1024 else []
        elif (match := TYPE.search(seen.text)) is not None:
            if match[1] == "1" and count is not None:
                found = LoadedImage(bool(scratch), [count, *scratch[:1], seen])
            count, scratch = None, []
    return found


def remedy_in_place(facts: Facts) -> tuple[bool | None, list[Evidence]]:
    """Return whether the crash kernel is loaded so that KASLR does not move it, with the evidence; None if unknown."""
    crash = facts.crash
    call = crash.call if crash.call is not None and crash.call_age != "an earlier boot" else None
    line = facts.cmdline
    inherited = line is not None and "nokaslr" in split_cmdline(line.text)
    own = line._replace(text="nokaslr") if line is not None else None
    if call is not None:
        reused = "--reuse-cmdline" in call.text and inherited
        safe = NOKASLR.search(call.text) or BY_KEXEC_LOAD.search(call.text) or reused
        return bool(safe), [_cut(call), *([own] if reused and own is not None else [])]
    for seen in crash.settings:
        name, _, value = seen.text.partition("=")
        if (NOKASLR if "LINE" in name else BY_KEXEC_LOAD).search(value):
            return True, [_cut(seen)]
    if inherited and own is not None:
        return True, [own]
    config = facts.config.get("CONFIG_RANDOMIZE_BASE")
    if config is not None and not config.text.endswith("=y"):
        return True, [config]
    return None, []


def _cut(seen: Evidence) -> Evidence:
    """Return evidence with the part of its text around the words that matter."""
    match = NOKASLR.search(seen.text) or BY_KEXEC_LOAD.search(seen.text)
    if match is None or len(seen.text) <= 160:
        return seen._replace(text=seen.text[:160])
    return seen._replace(text=f"... {seen.text[max(match.start() - 60, 0) : match.end() + 60]} ...")


def _is_arm(facts: Facts) -> bool:
    return facts.architecture is not None and facts.architecture.text == "aarch64"


def check_placement(facts: Facts, report: Report, found: Figures) -> None:
    """DOC026: KASLR places the crash kernel in scratch."""
    crash = facts.crash
    if crash.inside is not None or crash.crashed or not is_on(facts, report) or crash.is_loaded is False:
        return
    level, why = affected(facts, "crash-kernel"), unsure_text(facts, "crash-kernel")
    if level is False:
        level, why = affected(facts, "segment-unfinalized"), unsure_text(facts, "segment-unfinalized")
    if level is False:
        return
    wanted = wanted_size(facts)
    if crash.is_loaded is None and (reserved(facts) is False or not (wanted or crash.areas or crash.size)):
        return
    image = loaded_image(facts)
    safe, remedies = remedy_in_place(facts)
    if safe or (image is not None and not image.has_kho):
        return
    certainty: Certainty = "guess" if crash.is_loaded is None or _is_arm(facts) else "likely"
    known = image is not None and crash.is_loaded and not _is_arm(facts)
    if known and affected(facts, "crash-kernel"):  # 6.16 and 6.17.0 to 6.17.3 were not run
        certainty = "certain"
    text = f"Linux {report.release} passes its scratch areas to a crash kernel that kexec_file_load loads"
    if _is_arm(facts):
        text += ", which may fail while it boots (reported for arm64, not run)"
    else:
        text += ", and KASLR places it there: a part of the crashed machine's memory as large as the crash kernel is "
        text += "overwritten (58 MiB with Ubuntu's 7.0.0-14)"
        if report.boot == "kho":
            text += "; after a handover the kernel itself is in scratch, so the dump of it is at stake"
    if known:
        text += "; the loaded image has the segment with the scratch areas"
    elif not _is_arm(facts):
        text += "; unless its command line has nokaslr, or kexec_load loaded it (kexec -c)"
        if crash.is_loaded is None:
            text += ", or none is loaded"
    if crash.call is not None and any(remedy_of(seen) for seen in crash.settings):
        text += "; the configuration has a remedy that is not loaded yet: kdump-config reload"
    seen_loaded = [crash.loaded, *([image.evidence[0], *image.evidence[1:]] if image is not None else [])]
    size_seen = crash.size.seen if crash.size is not None else None
    report.add("DOC026", text + why, certainty, *shown(facts), *seen_loaded, *remedies, size_seen, _asked(facts))


def remedy_of(seen: Evidence) -> bool:
    """Return whether a line of kdump's configuration has a remedy."""
    name, _, value = seen.text.partition("=")
    return (NOKASLR if "LINE" in name else BY_KEXEC_LOAD).search(value) is not None


def check_finalized(facts: Facts, report: Report, found: Figures) -> None:
    """DOC027: a crash kernel is loaded while the handover is finalized."""
    crash, debugfs = facts.crash, facts.debugfs
    if crash.inside is not None or debugfs is None or debugfs.finalized is None or crash.is_loaded is False:
        return
    if crash.is_loaded is None and not (crash.areas or (crash.size is not None and crash.size.bytes)):
        return
    release = release_of(facts)
    level = affected(facts, "crash-kernel")
    if level is False and release is not None and (6, 16) <= release.series <= (6, 18):
        level = None  # from the sources, not run
    image = loaded_image(facts)
    call = crash.call is not None and BY_KEXEC_LOAD.search(crash.call.text) is not None
    if level is False or call or (image is not None and not image.has_kho):
        return
    text = "out/finalize is 1 and a crash kernel is loaded: it would hang before its first message, without a dump and "
    text += "without a reboot, also with nokaslr and kho=off"
    if release is not None and (6, 17) <= release.series <= (6, 18):
        text += "; on this release only if it was loaded after the 1 was written"
    certainty: Certainty = "guess" if crash.is_loaded is None else sure(level)
    report.add(
        "DOC027",
        text + unsure_text(facts, "crash-kernel"),
        certainty,
        debugfs.finalized,
        crash.loaded,
        *shown(facts),
    )


# Whether a crash kernel is there


def _asked(facts: Facts) -> Evidence | None:
    """Return `crashkernel=` of the command line."""
    if facts.cmdline is None:
        return None
    found = [word for word in split_cmdline(facts.cmdline.text) if word.startswith("crashkernel=")]
    return facts.cmdline._replace(text=" ".join(found)[:200]) if found else None


def wanted_size(facts: Facts) -> int:
    """Return the bytes that `crashkernel=` asks for in one piece; 0 if it asks for none or is not understood.

    The last value without a suffix counts, otherwise `,high` (kernel/crash_reserve.c). Ranges of RAM select a size.
    """
    if facts.cmdline is None:
        return 0
    return crash_kernel_bytes(" ".join(split_cmdline(facts.cmdline.text)), system_ram(facts)) or 0


def system_ram(facts: Facts) -> int | None:
    """Return the installed memory: of iomem, of the kernel log, or MemTotal."""
    if facts.crash.ram:
        return sum(end - start for start, end, _ in facts.crash.ram)
    if facts.log is not None and facts.log.memory is not None and (match := MEMORY.search(facts.log.memory.text)):
        return int(match[2]) << 10
    return facts.mem_total.bytes if facts.mem_total is not None else None


def reserved(facts: Facts) -> bool | None:
    """Return whether memory is reserved for a crash kernel; None if the files do not show it."""
    crash = facts.crash
    if crash.size is not None:
        return crash.size.bytes > 0
    if crash.areas:
        return True
    if _failed(facts) is not None:
        return False
    log = facts.log
    if log is not None and any(seen.text.startswith("crashkernel reserved") for seen in log.others):
        return True
    return False if crash.iomem else None


def _failed(facts: Facts) -> Evidence | None:
    log = facts.log
    return next((seen for seen in log.others if seen.text.startswith("cannot allocate crash")), None) if log else None


def reserved_bytes(facts: Facts) -> int:
    """Return the bytes that are reserved for a crash kernel; 0 if none are or if it is unknown."""
    crash = facts.crash
    if crash.size is not None:
        return crash.size.bytes
    areas = sum(end - start for start, end, _ in crash.areas)
    return areas or (wanted_size(facts) if reserved(facts) else 0)


def fits_after_handover(
    areas: list[int], wanted: int, others: int | None, places: list[int | None] | None = None, align: int = ALIGN
) -> bool | None:
    """Return whether a crash kernel fits into scratch areas of these sizes; None if it depends on what is next to it.

    Areas that adjoin are one piece: with 32M,128M,32M Linux 7.3.4 reserved 128 MiB across two of them.

    Args: wanted: its bytes. others: what the kernel reserves besides during boot; None if unknown. places: the address
    of each area, where it is known: the crash kernel's memory begins at a multiple of `align`.
    """
    known = [place for place in places or [] if place is not None]
    if len(known) == len(areas):
        runs: list[list[int]] = []
        for start, nbytes in sorted(zip(known, areas, strict=True)):
            if runs and runs[-1][1] == start:
                runs[-1][1] += nbytes
            elif nbytes:
                runs.append([start, start + nbytes])
        most = largest = max((end - start - -start % align for start, end in runs), default=0)
    else:
        most, largest = sum(areas), max(areas, default=0)
    if most < wanted:
        return False
    return True if others is not None and largest >= wanted + others + align else None


def proposed(areas: list[int], wanted: int, others: int, ram: int | None, pageblock: int) -> str | None:
    """Return a `kho_scratch=` whose global area has room for the crash kernel and for what the kernel reserves.

    All sizes are whole pageblocks, as Linux before 6.18.42 and 7.1.5 needs them. None if it takes too much of the RAM.
    """

    def whole(nbytes: int, unit: int) -> int:
        return -(-nbytes // unit) * unit

    low = whole(max(areas[0] if len(areas) > 2 else 0, 16 << 20), pageblock)
    per_node = whole(max([16 << 20, *areas[2:]]), pageblock)
    anywhere = whole(wanted + others + ALIGN, max(STEP, pageblock))
    nodes = max(len(areas) - 2, 1)
    if ram is not None and low + anywhere + per_node * nodes + wanted > ram // 4 * 3:
        return None
    return f"kho_scratch={low >> 20}M,{anywhere >> 20}M,{per_node >> 20}M"


def check_reservation(facts: Facts, report: Report, found: Figures) -> None:
    """DOC029, DOC030: no crash kernel is reserved; there is none after the next live update."""
    crash = facts.crash
    wanted = wanted_size(facts)
    if crash.inside is not None or not wanted or report.container:
        return
    others = report.needed_at_boot
    areas = [area.bytes for area in report.areas]
    line = proposed(areas, wanted, others if others is not None else 64 << 20, system_ram(facts), report.pageblock)
    remedy = (
        f"Boot cold with {line}, so that one scratch area has room for it" if line else "Boot cold with larger areas"
    )
    remedy += " (kho doctor --what-if shows the rest), or with a smaller crashkernel=."
    failed = _failed(facts)
    size_seen = crash.size.seen if crash.size is not None else None
    if reserved(facts) is False:
        text = f"crashkernel= asks for {size(wanted)}, and none is reserved: a crash leaves no vmcore"
        if report.boot == "kho":
            text += " until the next cold boot; after a handover it must fit into one scratch area"
            text += f" ({', '.join(map(size, areas))})" if areas else ""
        else:
            remedy = "Ask for less, or for an address above 4 GiB: crashkernel=SIZE,high."
        certain = failed is not None or size_seen is not None
        seen = [failed, size_seen, _asked(facts), *_area_lines(facts)]
        report.add("DOC029", text, "certain" if certain else "likely", *seen, remedy=remedy)
        return
    if report.boot == "kho" or not is_on(facts, report) or not areas:
        return
    align = ALIGN_ARM if _is_arm(facts) else ALIGN
    fits = fits_after_handover(areas, wanted, others, [area.phys for area in report.areas], align)
    short = others is not None and max(areas) < wanted + others
    if fits is False or (fits is None and short):
        text = (
            f"crashkernel= asks for {size(wanted)}; after the next live update it must fit into one scratch area, and "
        )
        if fits is False:
            text += f"the largest has {size(max(areas))}"
            text += f", and does not begin at a multiple of {size(align)}" if max(areas) >= wanted else ""
            text += ": there will be no crash kernel until a cold boot"
        else:
            text += f"the largest, {size(max(areas))}, also has to hold {size(others or 0)} that the kernel reserves"
        seen = [_asked(facts), *_area_lines(facts), size_seen, *(each for _, _, each in crash.areas)]
        report.add("DOC030", text, "certain" if fits is False else "likely", *seen, remedy=remedy)


def _area_lines(facts: Facts) -> list[Evidence]:
    """Return the evidence of the scratch areas: debugfs, or the boot line."""
    if facts.debugfs is not None and facts.debugfs.lens:
        return [amount.seen for amount in facts.debugfs.lens]
    words = list(split_cmdline(facts.cmdline.text)) if facts.cmdline is not None else []
    found = " ".join(word for word in words if word.startswith("kho_scratch="))
    return [facts.cmdline._replace(text=found[:200])] if found and facts.cmdline is not None else []


def check_inside(facts: Facts, report: Report, found: Figures) -> None:
    """DOC031: a crash kernel that reserves scratch of its own."""
    crash, log = facts.crash, facts.log
    if crash.inside is None:
        return
    tried = [*log.failures, *([log.disabled] if log.disabled is not None else [])] if log is not None else []
    if report.state == "failed":
        text = "KHO could not reserve scratch in this crash kernel and disabled itself, which is harmless here"
        report.add("DOC031", text, "certain" if tried else "likely", crash.inside, *tried, *shown(facts))
    elif report.state == "active" and report.scratch:
        text = (
            f"{size(report.scratch)} of this crash kernel's memory are scratch; kho=off on its command line saves that"
        )
        report.add(
            "DOC031", text, "certain" if found.exact is not None else "likely", crash.inside, *found.evidence[:4]
        )


def verdict(facts: Facts, report: Report) -> tuple[CrashDumps, str]:
    """Return what a crash of this machine would leave, and why; the findings must be known."""
    crash = facts.crash
    ids = {finding.id: finding for finding in report.findings}
    if report.container:
        return "cannot tell", "the files are those of a container"
    if crash.inside is not None:
        return ("damaged", ids["DOC028"].value) if "DOC028" in ids else ("ok", "this is the crash kernel")
    if "DOC028" in ids:
        return "damaged", ids["DOC028"].value
    if "DOC047" in ids:
        return ("damaged" if ids["DOC047"].certainty == "certain" else "cannot tell"), ids["DOC047"].value
    if "DOC027" in ids:
        return "none", ids["DOC027"].value
    if "DOC029" in ids:
        return "none", ids["DOC029"].value
    if "DOC026" in ids:
        guess = ids["DOC026"].certainty == "guess" or affected_unknown(facts)
        return ("cannot tell" if guess else "damaged"), ids["DOC026"].value
    wanted = wanted_size(facts)
    if crash.is_loaded is False:
        return (
            ("none", "memory is reserved, but no crash kernel is loaded")
            if wanted
            else ("not set up", "none is loaded")
        )
    if not wanted and not crash.is_loaded and not crash.areas:
        return (
            ("not set up", "no crashkernel= on the command line")
            if facts.cmdline
            else ("cannot tell", "no files show it")
        )
    if "DOC030" in ids:
        return "none after the next live update", ids["DOC030"].value
    if crash.is_loaded is None:
        return "cannot tell", "the files do not show whether a crash kernel is loaded (sys/kernel/kexec_crash_loaded)"
    if facts.release is None:
        return "cannot tell", "the release is unknown"
    return "ok", "a crash kernel is loaded, and nothing is known that damages its dump"


def needs(report: Report) -> str:
    """Return the least that a machine needs so that its crash dumps are whole; empty if nothing is known to help."""
    ids = {finding.id for finding in report.findings}
    if report.crash_dumps == "damaged":
        return "one line in a file"
    if report.crash_dumps == "cannot tell" and "DOC026" in ids:
        return "a new kernel"
    return "a reboot" if ids & {"DOC027", "DOC029", "DOC030"} else ""


def affected_unknown(facts: Facts) -> bool:
    """Return whether a vendor's release does not tell if it has the fault, and no loaded image shows it either."""
    image = loaded_image(facts)
    return affected(facts, "crash-kernel") is None and not (image is not None and image.has_kho)


CHECKS = (check_placement, check_finalized, check_reservation, check_inside)
