"""Examine a machine or a snapshot: which state KHO is in, what it holds, and the rules that apply."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from ..errors import ParameterError
from . import checks
from .facts import Facts
from .layout import ARCHIVE
from .reading import gather
from .report import Report, State
from .scratch import Figures, alignment, areas_of, enablement, excess, figures, judged
from .surroundings import amount_of_zones, incapable, vendors
from .text import share, size
from .tree import Tree, clean


def examine(root: str | os.PathLike[str] = "/") -> Report:
    """Say what KHO does to the memory of a machine.

    Args: root: "/" for this one, or a directory with its proc/, sys/, var/log/dmesg, boot/config-* as far as there are.
    Returns: a report. Nothing in the files raises; what could not be read is in `unread`.
    Raises: ParameterError if root is no directory.
    """
    if not os.path.isdir(root):  # noqa: PTH112 - pathlib takes longer to import than this takes in all
        raise ParameterError(f"{os.fspath(root)}: no directory")
    tree = Tree(root)
    if tree.live and not sys.platform.startswith("linux"):
        return Report(tree.root, f"This is no Linux ({sys.platform}): it has no KHO, and none of its memory.", "absent")
    root = clean(tree.root)
    facts = gather(tree)
    report = Report(root)
    report.unread, report.layout, report.elsewhere = tree.unread, tree.layout, [clean(name) for name in tree.elsewhere]
    report.folder = clean(tree.folder) or None
    if facts.log is None:
        report.looked = [clean(name) for name in facts.looked]
    report.there = [] if tree.live else [clean(name) for name in tree.names("")]
    diagnose(facts, report)
    return report


def diagnose(facts: Facts, report: Report) -> None:
    """Fill in a report from facts."""
    found = figures(facts)
    report.release = facts.release.text if facts.release is not None else None
    if facts.mixed is not None and facts.mem_total is None:
        facts.mem_total = amount_of_zones(facts)
    report.ram = facts.mem_total.bytes if facts.mem_total is not None else None
    report.container = facts.container is not None or facts.mixed is not None
    report.cma_total = facts.cma_total.bytes if facts.cma_total is not None else None
    report.hugetlb = facts.hugetlb.bytes if facts.hugetlb is not None else None
    report.nodes, report.page_size, report.pageblock = facts.nodes, facts.page_size, facts.block_bytes
    report.cmdline = facts.cmdline.text if facts.cmdline is not None else None
    report.platforms = facts.platforms
    default = facts.config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
    if facts.config_file is not None:
        report.enabled_by_default = default is not None and default.text.endswith("=y")
    _boot(facts, report)
    _state(facts, report, found)
    _amounts(facts, report, found)
    checks.run(facts, report, found)
    report.headline = headline(facts, report, found)
    report.sort()


def _boot(facts: Facts, report: Report) -> None:
    """Decide between a cold boot and one by handover."""
    log, shown = facts.log, facts.debugfs
    if shown is not None and shown.previous is not None:
        report.previous_release, report.kexec_count = shown.previous[:2]
    if log is not None and log.exec_from is not None:
        report.previous_release, report.kexec_count = log.exec_from[:2]
    handed = log is not None and (log.found or log.exec_from)
    if (shown is not None and shown.incoming) or handed or (facts.handed_over and not (log and log.refused)):
        report.boot = "kho"
    elif shown is not None or (log is not None and log.version is not None) or facts.boot_data or facts.cold_counted:
        report.boot = "cold"


@dataclass(frozen=True)
class Signs:
    """What speaks for and against memory held by KHO, each None where nothing is known."""

    held: bool
    """CMA memory outside CmaTotal is seen: KHO's, or what a failed reservation left."""
    nothing: bool
    """There is surely none: pageblocks are counted, or the zones of a cold boot."""
    idle: bool
    """None is seen free while most of RAM is, or there is no room for any: likely there is none."""
    enabled: bool | None
    """By the command line, or the kernel's default."""


def signs(facts: Facts, report: Report, found: Figures) -> Signs:
    """Weigh the figures. A lower bound of 0 is no sign of anything: scratch may be full of movable pages."""
    total, free = facts.mem_total, facts.mem_free
    room = None if total is None else total.bytes - (free.bytes if free is not None else 0) + excess(found)
    nothing = found.blocks == 0 or (found.zones == 0 and not found.free and report.boot == "cold")
    # What others have in use hides as much of scratch from CmaFree, unless zones tell the two apart.
    plain = not found.others or found.zones == 0
    idle = report.boot != "kho" and found.free == 0 and plain and total is not None and free is not None
    # By default scratch is a sixteenth of RAM or more: less memory in use than that has no room for it. Where zones
    # show that there is none of a cold boot, half of RAM is enough.
    most = total.bytes // 2 if total is not None and found.zones == 0 else (total.bytes // 16 * 15 if total else 0)
    idle = idle and free is not None and free.bytes >= most
    idle = idle or (found.free == 0 and room is not None and room < facts.block_bytes)
    return Signs(bool(excess(found)), nothing, idle, enablement(facts, report.enabled_by_default))


def _built_in(facts: Facts, found: Figures) -> bool | None:
    """Decide whether the kernel has KHO; None where nothing tells."""
    built = facts.config.get("CONFIG_KEXEC_HANDOVER")
    if facts.debugfs is not None or (facts.log is not None and facts.log.kho):
        return True
    if facts.config_file is not None:
        return built is not None and built.text.endswith("=y")
    if incapable(facts) is not None:
        # A vendor may have brought KHO to an older kernel; memory held and kho=on together would be a sign of it.
        return None if (excess(found) or vendors(facts)) and enablement(facts, None) else False
    if excess(found):
        return True
    return False if facts.meminfo_whole and facts.cma_total is None and facts.cma_free is None else None


def _state(facts: Facts, report: Report, found: Figures) -> None:
    """Decide which state KHO is in: the first row that applies. Only proof makes it off or absent."""
    report.built_in = _built_in(facts, found)
    seen = signs(facts, report, found)
    log, boot, enabled = facts.log, report.boot, seen.enabled
    foreign = report.built_in is None and incapable(facts) is not None
    taken = log is not None and log.asked is not None and boot == "cold"
    finished = log is not None and log.memory is not None
    rows: tuple[tuple[object, State], ...] = (
        (log is not None and log.disabled, "failed"),
        (log is not None and log.kdump, "off"),
        (facts.debugfs is not None, "active"),
        (report.built_in is False, "absent"),
        (foreign, "unknown"),
        # A kernel that was handed its scratch keeps it, whatever its own command line says.
        (boot == "kho" and not (seen.nothing and not seen.held), "active"),
        (boot == "kho", "unknown"),
        (seen.held and enabled is False and boot == "cold", "off"),
        (seen.held and enabled is False, "unknown"),
        (seen.held and left_behind(facts, report, found), "failed"),
        (seen.held, "active"),
        (enabled and seen.nothing and report.built_in, "failed"),
        (enabled and (seen.nothing or (seen.idle and found.zones == 0)), "off"),
        (enabled and taken and (finished or facts.cma_free is None), "active"),
        (enabled, "unknown"),
        (enabled is False, "off"),
        (seen.nothing or seen.idle, "off"),
    )
    report.state = next((state for applies, state in rows if applies), "unknown")


def left_behind(facts: Facts, report: Report, found: Figures) -> bool:
    """Say whether CMA memory outside CmaTotal is what a failed reservation left, though no message says so.

    An active KHO that booted cold has its scratch in zoneinfo's `cma`; a failed one has not.
    """
    if report.boot == "kho" or found.zones:
        return False
    impossible = found.asked is not None and facts.mem_total is not None and found.asked > facts.mem_total.bytes
    return impossible or (found.zones == 0 and found.best is not None and report.boot == "cold")


def _amounts(facts: Facts, report: Report, found: Figures) -> None:
    """Fill in what is held, and what stayed behind."""
    _, spec, _ = judged(facts)
    report.alignment = alignment(report.release, facts.page_size, facts.block_bytes)
    report.scale = spec.percent if spec is not None else 200
    if report.boot == "kho":
        report.scale = None
    held = excess(found) if found.exact is None else found.exact
    if report.state == "active" and not held and found.exact is None:
        report.scratch_low = 0  # it is active, and nothing of it is seen free: all of it may be in use
        if found.asked is not None and report.boot != "kho":
            _as_asked(facts, report, found, found.asked)
    elif report.state == "active":
        report.scratch, report.scratch_how, report.areas = held, found.how, found.areas
        slack = 0 if found.how == "exact" else found.block_bytes
        least = max(found.free or 0, held - slack)
        report.scratch_low = min(least, held) if slack else held
        report.scratch_high = None if report.scratch_how == "at least" else held + slack
        if found.doubts:
            report.scratch_low = 0
        if not found.zones and report.boot is None and found.exact is None:
            why = (
                "zoneinfo does not count it as CMA" if found.zones == 0 else "neither log nor zoneinfo tells them apart"
            )
            found.doubts.append(f"it may be what a failed reservation left: {why}")
        if found.exact is None and found.asked is not None and report.boot != "kho":
            _as_asked(facts, report, found, found.asked)
    elif report.state in ("failed", "off", "absent"):
        report.scratch = report.scratch_low = report.scratch_high = 0
        report.scratch_how = "none"
        if report.state == "off" and not _surely_nothing(facts, report, found):
            report.scratch_high = None
        if report.state == "failed" and (found.blocks is not None or found.free is not None):
            report.leftover = excess(found)
    if (report.scratch or report.leftover) and not report.by_node:
        report.by_node = found.by_node
    if facts.log is not None and facts.log.reserved is not None and report.boot != "kho":
        reserved = facts.log.reserved - (report.scratch or 0)
        report.reserved_at_boot = reserved if reserved > 0 else None
    if facts.debugfs is not None:
        report.preserved = [
            {"direction": side, "name": name, "bytes": nbytes} for side, name, nbytes in facts.debugfs.subtrees
        ]


def _surely_nothing(facts: Facts, report: Report, found: Figures) -> bool:
    """Say whether KHO, being off, holds nothing: a kernel that was handed scratch keeps it with kho=off, too."""
    seen = signs(facts, report, found)
    return report.boot == "cold" or seen.nothing or seen.idle


def _as_asked(facts: Facts, report: Report, found: Figures, asked: int) -> None:
    """Take the sizes of the boot line: for exact if something else bears them out, else where there is only a bound."""
    log, nodes = facts.log, list(facts.nodes)
    if found.counted is not None:
        sure = found.counted == asked
        if not sure:
            return
    else:
        if not (found.free or 0) <= asked < (report.ram or 0):
            return
        sure = report.boot == "cold" and log is not None and log.asked is not None and bool(nodes)
    report.scratch, report.scratch_how = asked, "exact" if sure else "boot line"
    report.areas = areas_of(found.sizes, nodes)
    report.scratch_low = asked if sure else found.free or 0
    report.scratch_high = asked if report.boot == "cold" else None
    if len(nodes) == 1:
        report.by_node = {nodes[0]: asked}


def headline(facts: Facts, report: Report, found: Figures) -> str:
    """Say the whole in one sentence."""
    ram = f" ({share(report.share)} of RAM)" if report.share is not None else ""
    if report.state == "active" and report.scratch:
        least = {"at least": "at least ", "boot line": "about "}.get(report.scratch_how, "")
        where = " on the host of this container" if report.container else ""
        what = f"KHO holds {least}{size(report.scratch)}{ram}{where} as scratch"
        return f"{what}: no kernel memory and no pins can live there."
    if report.state == "active":
        handed = (
            " (this kernel was booted by a handover, and keeps the scratch it was handed)"
            if report.boot == "kho"
            else ""
        )
        return f"KHO is active{handed}; how much it holds cannot be seen from here."
    if report.state == "failed":
        value = judged(facts)[0] if found.asked is not None else None
        asked = (
            f"asked for {size(found.asked)} of scratch ({value[:60]}), " if value and found.asked is not None else ""
        )
        least = "at least " if found.blocks is None else ""
        left = "nothing stayed behind" if report.leftover == 0 else "what stayed behind cannot be seen from here"
        left = f"{least}{size(report.leftover)}{ram} stayed behind in CMA" if report.leftover else left
        return f"KHO {asked}could not reserve {'it' if asked else 'its scratch'} and disabled itself; {left}."
    others = f"; {size(excess(found))} of CMA memory outside CmaTotal is something else's" if excess(found) else ""
    if report.state == "off":
        if others:
            return f"KHO is off ({why_off(facts, report)}){others}."
        if report.scratch_high is None:
            return f"KHO is off ({why_off(facts, report)}), and holds nothing unless a handover brought it scratch."
        return f"KHO is off ({why_off(facts, report)}) and holds nothing."
    if report.state == "absent":
        likely = "likely " if facts.config_file is None and vendors(facts) else ""
        nothing = "" if likely else " and holds nothing"
        return f"KHO is {likely}not in this kernel ({why_absent(facts, report)}){others or nothing}."
    return f"It cannot be told whether KHO holds memory: {what_is_missing(facts, report, found)}."


def why_off(facts: Facts, report: Report) -> str:
    """Say why KHO is off."""
    if facts.log is not None and facts.log.kdump is not None:
        return "on purpose, in the kernel that saves a crash dump"
    if facts.cmdline is not None and enablement(facts, None) is False:
        return "kho=off on the command line" if "kho=" in facts.cmdline.text else "not asked for"
    if enablement(facts, report.enabled_by_default):
        return "asked for, but either not built in, or it disabled itself"
    if report.enabled_by_default is False:
        return "not on by default, nor asked for"
    return "no CMA memory outside CmaTotal"


def why_absent(facts: Facts, report: Report) -> str:
    """Say why KHO is not there."""
    if facts.config_file is not None:
        return "CONFIG_KEXEC_HANDOVER is not set"
    if vendors(facts):
        return f"{incapable(facts)}, though its vendor backports features"
    return incapable(facts) or "it has no CMA, which KHO needs"


def what_is_missing(facts: Facts, report: Report, found: Figures) -> str:
    """Say what would have been needed, and where it was looked for."""
    if not facts.meminfo and facts.log is None and facts.cmdline is None:
        return "there is no proc/meminfo, no kernel log and no command line" + what_is_there(report)
    foreign = incapable(facts)
    if foreign is not None and not excess(found) and enablement(facts, None):
        return f"{foreign}, yet kho= asks for it, and its vendor backports features; none of it is seen free"
    if foreign is not None and excess(found):
        return f"{foreign}, yet {size(excess(found))} of CMA memory are outside CmaTotal and kho= asks for it"
    if excess(found):
        why = why_off(facts, report)
        return f"{why}, yet {size(excess(found))} of CMA memory are outside CmaTotal: a handover's, or something else's"
    if report.boot == "kho":
        return "it was handed over, yet no pageblock is scratch: figures of two machines or moments"
    if not facts.meminfo:
        return "there is no proc/meminfo with CmaTotal and CmaFree"
    if facts.cma_free is None:
        return "proc/meminfo does not say CmaFree"
    free = (
        facts.mem_free.bytes / facts.mem_total.bytes
        if facts.mem_free and facts.mem_total and facts.mem_total.bytes
        else None
    )
    full = f" while {share(free)} of memory is free" if free is not None else ""
    enabled = (
        "it is enabled, and its memory" if enablement(facts, report.enabled_by_default) else "scratch, if there is any,"
    )
    proves = f"none of it is seen free, which proves nothing{full}: {enabled} may be in use"
    return f"{proves}; root sees more (proc/pagetypeinfo, debugfs), and a kernel log or config may tell"


def what_is_there(report: Report) -> str:
    """Say where it was looked, and what is there instead."""
    if report.elsewhere:
        named = ", ".join(f"{name}/" for name in report.elsewhere[:6])
        many = len(report.elsewhere) > 1
        return (
            f"; {named} look{'' if many else 's'} like {'reports: name one of them' if many else 'a report: name it'}"
        )
    packed = [name for name in report.there if ARCHIVE.fullmatch(name)]
    if packed:
        return f"; {packed[0]} is an archive: unpack it, and name the folder"
    if report.there:
        more = f" and {len(report.there) - 8} more" if len(report.there) > 8 else ""
        where = "proc/, var/log, sos_commands, insights_commands and sections"
        return f"; it was looked for in {where}; there is {', '.join(report.there[:8])}{more}"
    return "; the directory is empty"
