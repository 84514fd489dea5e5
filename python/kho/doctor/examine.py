"""Examine a machine or a snapshot: the state of KHO, the memory it holds, and the rules that apply."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from ..errors import ParameterError
from . import checks, crash, fdstore
from .facts import Facts
from .layout import ARCHIVE
from .reading import gather
from .releases import affected, release_of
from .report import Report, State
from .scratch import Figures, alignment, areas_of, effective_scratch, enablement, excess, figures
from .surroundings import managed_memory, may_have_backport, why_no_kho
from .text import share, size
from .tree import Tree, clean


def examine(root: str | os.PathLike[str] = "/") -> Report:
    """Report how KHO uses the memory of a machine.

    Args: root: "/" for this machine, or a directory with any of proc/, sys/, var/log/dmesg and boot/config-*.
    Returns: a report. The content of the files never raises; files that could not be read are listed in `unread`.
    Raises: ParameterError if root is not a directory.
    """
    if not os.path.isdir(root):  # noqa: PTH112 - importing pathlib takes longer than an examination
        raise ParameterError(f"{os.fspath(root)}: not a directory")
    tree = Tree(root)
    if tree.live and not sys.platform.startswith("linux"):
        return Report(tree.root, f"This system is not Linux ({sys.platform}), so it has no KHO.", "absent")
    root = clean(tree.root)
    facts = gather(tree)
    facts.store = fdstore.store(tree, facts)
    report = Report(root)
    report.unread, report.layout, report.elsewhere = tree.unread, tree.layout, [clean(name) for name in tree.elsewhere]
    report.folder = clean(tree.folder) or None
    if facts.log is None:
        report.looked = [clean(name) for name in facts.looked]
    report.there = [] if tree.live else [clean(name) for name in tree.names("")]
    diagnose(facts, report)
    return report


def diagnose(facts: Facts, report: Report) -> None:
    """Fill in a report from the facts."""
    found = figures(facts)
    report.release = facts.release.text if facts.release is not None else None
    if facts.mixed is not None and facts.mem_total is None:
        facts.mem_total = managed_memory(facts)
    report.ram = facts.mem_total.bytes if facts.mem_total is not None else None
    report.container = facts.container is not None or facts.mixed is not None
    report.cma_total = facts.cma_total.bytes if facts.cma_total is not None else None
    report.hugetlb = facts.hugetlb.bytes if facts.hugetlb is not None else None
    report.nodes, report.page_size, report.pageblock = facts.nodes, facts.page_size, facts.block_bytes
    report.cmdline = facts.cmdline.text if facts.cmdline is not None else None
    report.platforms, report.numa = facts.platforms, facts.numa
    report.crash_wanted = crash.wanted_size(facts)
    if release_of(facts) is not None:
        report.rounds_sizes = affected(facts, "scratch-rounding") is False
    default = facts.config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
    if facts.config_file is not None:
        report.enabled_by_default = default is not None and default.text.endswith("=y")
    _determine_boot(facts, report)
    _determine_state(facts, report, found)
    _fill_amounts(facts, report, found)
    checks.run(facts, report, found)
    fdstore.check_store(facts, report, found)
    fdstore.check_entries(facts, report, found)
    report.crash_dumps, report.crash_dumps_why = crash.verdict(facts, report)
    report.crash_dumps_needs = crash.needs(report)
    report.headline = headline(facts, report, found)
    report.sort()


def _determine_boot(facts: Facts, report: Report) -> None:
    """Determine whether this was a cold boot or a boot by handover."""
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
    """Evidence for and against memory held by KHO."""

    held: bool
    """There is CMA memory outside CmaTotal: KHO's, or the leftover of a failed reservation."""
    nothing: bool
    """There is certainly none, according to pageblock counts or the zones of a cold boot."""
    idle: bool
    """There is likely none: none is free while most of RAM is free, or the memory in use leaves no room for it."""
    enabled: bool | None
    """Enabled by the command line or the kernel's default; None if neither is known."""


def signs(facts: Facts, report: Report, found: Figures) -> Signs:
    """Weigh the figures. A lower bound of 0 proves nothing, because movable pages may fill all of scratch."""
    total, free = facts.mem_total, facts.mem_free
    room = None if total is None else total.bytes - (free.bytes if free is not None else 0) + excess(found)
    nothing = found.blocks == 0 or (found.zones == 0 and not found.free and report.boot == "cold")
    # Used pages of other CMA areas hide the same number of free scratch pages in CmaFree, unless zones separate them.
    plain = not found.others or found.zones == 0
    idle = report.boot != "kho" and found.free == 0 and plain and total is not None and free is not None
    # By default scratch is at least a sixteenth of RAM: if less than that is in use, scratch cannot be hidden there.
    # If the zones rule out scratch of a cold boot, it is enough that half of RAM is free.
    most = total.bytes // 2 if total is not None and found.zones == 0 else (total.bytes // 16 * 15 if total else 0)
    idle = idle and free is not None and free.bytes >= most
    idle = idle or (found.free == 0 and room is not None and room < facts.block_bytes)
    return Signs(bool(excess(found)), nothing, idle, enablement(facts, report.enabled_by_default))


def _built_in(facts: Facts, found: Figures) -> bool | None:
    """Return whether the kernel has KHO; None if there is no evidence."""
    built = facts.config.get("CONFIG_KEXEC_HANDOVER")
    if facts.debugfs is not None or (facts.log is not None and facts.log.kho):
        return True
    if facts.config_file is not None:
        return built is not None and built.text.endswith("=y")
    if why_no_kho(facts) is not None:
        # A vendor may have backported KHO to an older kernel. Held memory together with kho=on indicates a backport.
        return None if (excess(found) or may_have_backport(facts)) and enablement(facts, None) else False
    if excess(found):
        return True
    return False if facts.meminfo_whole and facts.cma_total is None and facts.cma_free is None else None


def _determine_state(facts: Facts, report: Report, found: Figures) -> None:
    """Determine the state of KHO: the first row that applies. Off and absent need proof."""
    report.built_in = _built_in(facts, found)
    seen = signs(facts, report, found)
    log, boot, enabled = facts.log, report.boot, seen.enabled
    foreign = report.built_in is None and why_no_kho(facts) is not None
    taken = log is not None and log.parsed is not None and boot == "cold"
    finished = log is not None and log.memory is not None
    # A crash kernel of 7.3 and later disables KHO; an earlier one may, because its scratch does not fit.
    captures = facts.crash.inside is not None and not seen.held
    rows: tuple[tuple[object, State], ...] = (
        (log is not None and log.disabled, "failed"),
        (log is not None and log.kdump, "off"),
        (facts.debugfs is not None, "active"),
        (report.built_in is False, "absent"),
        (foreign, "unknown"),
        # A kernel that inherited its scratch keeps it, whatever its own command line says.
        (boot == "kho" and not (seen.nothing and not seen.held), "active"),
        (boot == "kho", "unknown"),
        (seen.held and enabled is False and boot == "cold", "off"),
        (seen.held and enabled is False, "unknown"),
        (seen.held and is_leftover(facts, report, found), "failed"),
        (seen.held, "active"),
        (captures and (seen.nothing or seen.idle), "off"),
        (enabled and seen.nothing and report.built_in, "failed"),
        (enabled and (seen.nothing or (seen.idle and found.zones == 0)), "off"),
        (enabled and taken and (finished or facts.cma_free is None), "active"),
        (enabled, "unknown"),
        (enabled is False, "off"),
        (seen.nothing or seen.idle, "off"),
    )
    report.state = next((state for applies, state in rows if applies), "unknown")


def is_leftover(facts: Facts, report: Report, found: Figures) -> bool:
    """Return whether CMA memory outside CmaTotal is the leftover of a failed reservation, without a kernel message.

    After a cold boot zoneinfo's `cma` includes the scratch of an active KHO, but not the leftover of a failed one.
    """
    if report.boot == "kho" or found.zones:
        return False
    impossible = found.requested is not None and facts.mem_total is not None and found.requested > facts.mem_total.bytes
    return impossible or (found.zones == 0 and found.best is not None and report.boot == "cold")


def _fill_amounts(facts: Facts, report: Report, found: Figures) -> None:
    """Fill in the amounts of scratch and leftover."""
    _, spec, _ = effective_scratch(facts)
    report.alignment = alignment(report.release, facts.page_size, facts.block_bytes)
    report.scale = spec.percent if spec is not None else 200
    if report.boot == "kho":
        report.scale = None
    held = excess(found) if found.exact is None else found.exact
    if report.state == "active" and not held and found.exact is None:
        report.scratch_low = 0  # KHO is active, but no scratch is free: all of it may be in use
        if found.requested is not None and report.boot != "kho":
            _use_boot_line_sizes(facts, report, found, found.requested)
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
                "zoneinfo does not count it as CMA"
                if found.zones == 0
                else "neither the log nor zoneinfo distinguishes the two"
            )
            found.doubts.append(f"it may be the leftover of a failed reservation: {why}")
        if found.exact is None and found.requested is not None and report.boot != "kho":
            _use_boot_line_sizes(facts, report, found, found.requested)
    elif report.state in ("failed", "off", "absent"):
        report.scratch = report.scratch_low = report.scratch_high = 0
        report.scratch_how = "none"
        if report.state == "off" and not _certainly_nothing(facts, report, found):
            report.scratch_high = None
        if report.state == "failed" and (found.blocks is not None or found.free is not None):
            report.leftover = excess(found)
    report.crash_kernel = crash.reserved_bytes(facts) if crash.reserved(facts) is not None else None
    if (report.scratch or report.leftover) and not report.by_node:
        report.by_node = found.by_node
    if facts.log is not None and facts.log.reserved is not None and report.boot != "kho":
        reserved = facts.log.reserved - (report.scratch or 0)
        report.reserved_at_boot = reserved if reserved > 0 else None
    if facts.debugfs is not None:
        report.preserved = [
            {"direction": side, "name": name, "bytes": nbytes} for side, name, nbytes in facts.debugfs.subtrees
        ]


def _certainly_nothing(facts: Facts, report: Report, found: Figures) -> bool:
    """Return whether KHO, which is off, certainly holds nothing: inherited scratch is kept also with kho=off."""
    seen = signs(facts, report, found)
    return report.boot == "cold" or seen.nothing or seen.idle


def _use_boot_line_sizes(facts: Facts, report: Report, found: Figures, requested: int) -> None:
    """Use the sizes of the boot line: as exact if other evidence confirms them, otherwise if only a bound is known."""
    log, nodes = facts.log, list(facts.nodes)
    if found.counted is not None:
        sure = found.counted == requested
        if not sure:
            return
    else:
        if not (found.free or 0) <= requested < (report.ram or 0):
            return
        sure = report.boot == "cold" and log is not None and log.parsed is not None and bool(nodes)
    report.scratch, report.scratch_how = requested, "exact" if sure else "boot line"
    report.areas = areas_of(found.sizes, nodes)
    report.scratch_low = requested if sure else found.free or 0
    report.scratch_high = requested if report.boot == "cold" else None
    if len(nodes) == 1:
        report.by_node = {nodes[0]: requested}


def headline(facts: Facts, report: Report, found: Figures) -> str:
    """Return the result in one sentence."""
    ram = f" ({share(report.share)} of RAM)" if report.share is not None else ""
    if report.state == "active" and report.scratch:
        least = {"at least": "at least ", "boot line": "about "}.get(report.scratch_how, "")
        where = " on the host of this container" if report.container else ""
        what = f"KHO holds {least}{size(report.scratch)}{ram}{where} as scratch"
        return f"{what}; kernel memory and long-term pins cannot use it."
    if report.state == "active":
        handed = " (this kernel was booted by a handover and inherited its scratch)" if report.boot == "kho" else ""
        return f"KHO is active{handed}; these files do not show how much memory it holds."
    if report.state == "failed" and facts.crash.inside is not None:
        return "This is a crash kernel: KHO could not reserve its scratch here and disabled itself, which is harmless."
    if report.state == "failed":
        value = effective_scratch(facts)[0] if found.requested is not None else None
        wanted = (
            f"{size(found.requested)} of scratch ({value[:60]})"
            if value and found.requested is not None
            else "its scratch"
        )
        least = "at least " if found.blocks is None else ""
        left = "no memory was left in CMA" if report.leftover == 0 else "these files do not show the leftover in CMA"
        left = f"{least}{size(report.leftover)}{ram} was left in CMA" if report.leftover else left
        return f"KHO could not reserve {wanted} and disabled itself; {left}."
    others = f"; {size(excess(found))} of CMA memory outside CmaTotal has another owner" if excess(found) else ""
    if report.state == "off":
        if others:
            return f"KHO is off ({why_off(facts, report)}){others}."
        if report.scratch_high is None:
            return (
                f"KHO is off ({why_off(facts, report)}) and holds nothing, unless it inherited scratch by a handover."
            )
        return f"KHO is off ({why_off(facts, report)}) and holds nothing."
    if report.state == "absent":
        likely = "likely " if facts.config_file is None and may_have_backport(facts) else ""
        nothing = "" if likely else " and holds nothing"
        return f"KHO is {likely}not in this kernel ({why_absent(facts, report)}){others or nothing}."
    return f"Cannot determine whether KHO holds memory: {missing_evidence(facts, report, found)}."


def why_off(facts: Facts, report: Report) -> str:
    """Return why KHO is off."""
    if facts.log is not None and facts.log.kdump is not None:
        return "this is the kdump kernel, which disables KHO"
    if facts.crash.inside is not None:
        return "this is a crash kernel"
    if facts.cmdline is not None and enablement(facts, None) is False:
        return "kho=off on the command line" if "kho=" in facts.cmdline.text else "not requested"
    if enablement(facts, report.enabled_by_default):
        return "requested, but either not built in, or it disabled itself"
    if report.enabled_by_default is False:
        return "neither on by default nor requested"
    return "no CMA memory outside CmaTotal"


def why_absent(facts: Facts, report: Report) -> str:
    """Return why the kernel has no KHO."""
    if facts.config_file is not None:
        return "CONFIG_KEXEC_HANDOVER is not set"
    if may_have_backport(facts):
        return f"{why_no_kho(facts)}, but its vendor backports features"
    return why_no_kho(facts) or "it has no CMA, which KHO requires"


def missing_evidence(facts: Facts, report: Report, found: Figures) -> str:
    """Return which evidence is missing, and where it was searched for."""
    if not facts.meminfo and facts.log is None and facts.cmdline is None:
        return "there is no proc/meminfo, no kernel log and no command line" + searched_places(report)
    foreign = why_no_kho(facts)
    if foreign is not None and not excess(found) and enablement(facts, None):
        return f"{foreign}, but kho= requests it and its vendor backports features; no scratch is free"
    if foreign is not None and excess(found):
        return f"{foreign}, but kho= requests it and {size(excess(found))} of CMA memory is outside CmaTotal"
    if excess(found):
        why = why_off(facts, report)
        held = f"{size(excess(found))} of CMA memory is outside CmaTotal"
        return f"{why}, but {held}: inherited scratch, or an area with another owner"
    if report.boot == "kho":
        return "this kernel took over a handover, but no pageblock is scratch: the files are of two machines or times"
    if not facts.meminfo:
        return "there is no proc/meminfo with CmaTotal and CmaFree"
    if facts.cma_free is None:
        return "proc/meminfo has no CmaFree"
    free = (
        facts.mem_free.bytes / facts.mem_total.bytes
        if facts.mem_free and facts.mem_total and facts.mem_total.bytes
        else None
    )
    full = f" while {share(free)} of memory is free" if free is not None else ""
    enabled = (
        "KHO is enabled, and its scratch"
        if enablement(facts, report.enabled_by_default)
        else "scratch, if there is any,"
    )
    proves = f"no scratch is free, which proves nothing{full}: {enabled} may be in use"
    return f"{proves}; files that only root can read (proc/pagetypeinfo, debugfs), a kernel log or its config help"


def searched_places(report: Report) -> str:
    """Return where reports were searched for, and what the directory contains instead."""
    if report.elsewhere:
        named = ", ".join(f"{name}/" for name in report.elsewhere[:6])
        many = len(report.elsewhere) > 1
        return (
            f"; {named} look{'' if many else 's'} like "
            f"{'reports: pass one of them as DIRECTORY' if many else 'a report: pass it as DIRECTORY'}"
        )
    packed = [name for name in report.there if ARCHIVE.fullmatch(name)]
    if packed:
        return f"; {packed[0]} is an archive: unpack it, and pass the directory"
    if report.there:
        more = f" and {len(report.there) - 8} more" if len(report.there) > 8 else ""
        where = "proc/, var/log, sos_commands, insights_commands and sections"
        return f"; searched {where}; found {', '.join(report.there[:8])}{more}"
    return "; the directory is empty"
