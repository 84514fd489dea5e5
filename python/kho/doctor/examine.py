"""Examine a machine or a snapshot: which state KHO is in, what it holds, and the rules that apply."""

from __future__ import annotations

import os
import re
import sys

from ..errors import ParameterError
from . import checks
from .facts import Facts
from .reading import gather
from .report import Report
from .scratch import Figures, alignment, areas_of, enablement, excess, figures, judged
from .text import share, size
from .tree import Tree


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
    facts = gather(tree)
    report = Report(facts.root)
    report.unread = tree.unread
    diagnose(facts, report)
    return report


def diagnose(facts: Facts, report: Report) -> None:
    """Fill in a report from facts."""
    found = figures(facts)
    report.release = facts.release.text if facts.release is not None else None
    report.ram = facts.mem_total.bytes if facts.mem_total is not None else None
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


def old(release: str | None) -> bool:
    """Say whether a release is older than Linux 6.16, which brought KHO."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release or "")
    return match is not None and (int(match[1]), int(match[2])) < (6, 16)


def _state(facts: Facts, report: Report, found: Figures) -> None:
    """Decide which state KHO is in."""
    built = facts.config.get("CONFIG_KEXEC_HANDOVER")
    if facts.debugfs is not None or (facts.log is not None and facts.log.kho):
        report.built_in = True
    elif facts.config_file is not None:
        report.built_in = built is not None and built.text.endswith("=y")
    elif excess(found):
        report.built_in = True
    elif old(report.release) or (facts.meminfo and facts.cma_total is None):
        report.built_in = False
    enabled = enablement(facts, report.enabled_by_default)
    zero = found.blocks == 0 or (found.zones == 0 and not found.free and report.boot != "kho")
    if facts.log is not None and facts.log.disabled is not None:
        report.state = "failed"
    elif facts.debugfs is not None:
        report.state = "active"
    elif report.built_in is False:
        report.state = "absent"
    elif excess(found):
        off = enabled is False and report.boot != "kho"
        report.state = "off" if off else "failed" if left_behind(facts, report, found) else "active"
    elif enabled and facts.cma_free is not None:
        report.state = "unknown" if not zero else "failed" if report.built_in else "off"
    elif enabled is False or facts.cma_free is not None or zero:
        report.state = "off"
    elif enabled and facts.log is not None and facts.log.asked is not None:
        report.state = "active"


def left_behind(facts: Facts, report: Report, found: Figures) -> bool:
    """Say whether CMA memory outside CmaTotal is what a failed reservation left, though no message says so.

    An active KHO that booted cold has its scratch in zoneinfo's `cma`; a failed one has not, and has less than asked.
    """
    if report.boot == "kho":
        return False
    uncounted = found.zones == 0 and found.best is not None
    short = (
        found.asked is not None and found.asked - (found.best or 0) >= found.block_bytes and found.blocks is not None
    )
    impossible = found.asked is not None and facts.mem_total is not None and found.asked > facts.mem_total.bytes
    return impossible or (uncounted and (short or report.boot == "cold"))


def _amounts(facts: Facts, report: Report, found: Figures) -> None:
    """Fill in what is held, and what stayed behind."""
    _, spec, _ = judged(facts)
    report.alignment = alignment(report.release, facts.page_size, facts.block_bytes)
    report.scale = spec.percent if spec is not None else 200
    if report.boot == "kho":
        report.scale = None
    held = excess(found) if found.exact is None else found.exact
    if report.state == "active":
        report.scratch, report.scratch_how, report.areas = held, found.how, found.areas
        slack = 0 if found.how == "exact" else found.block_bytes
        least = max(found.free or 0, held - slack)
        report.scratch_low = min(least, held) if slack else held
        report.scratch_high = None if report.scratch_how == "at least" else held + slack
        if found.doubts:
            report.scratch_low = 0
        if found.zones == 0 and report.boot is None and found.exact is None:
            found.doubts.append("it may be what a failed reservation left: zoneinfo does not count it as CMA")
        if found.exact is None and found.asked is not None and report.boot != "kho":
            _as_asked(facts, report, found, found.asked)
    elif report.state in ("failed", "off", "absent"):
        report.scratch = report.scratch_low = report.scratch_high = 0
        report.scratch_how = "none"
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
        return f"KHO holds {least}{size(report.scratch)}{ram} as scratch: no kernel memory and no pins can live there."
    if report.state == "active":
        return "KHO is active; how much it holds cannot be seen from here."
    if report.state == "failed":
        value = judged(facts)[0] if found.asked is not None else None
        asked = (
            f"asked for {size(found.asked)} of scratch ({value[:60]}), " if value and found.asked is not None else ""
        )
        least = "at least " if found.blocks is None else ""
        left = "nothing stayed behind" if report.leftover == 0 else "what stayed behind cannot be seen from here"
        left = f"{least}{size(report.leftover)}{ram} stayed behind in CMA" if report.leftover else left
        return f"KHO {asked}could not reserve {'it' if asked else 'its scratch'} and disabled itself; {left}."
    if report.state == "off":
        return f"KHO is off ({why_off(facts, report)}) and holds nothing."
    if report.state == "absent":
        return f"KHO is not in this kernel ({why_absent(facts, report)}) and holds nothing."
    return f"It cannot be told whether KHO holds memory: {what_is_missing(facts)}."


def why_off(facts: Facts, report: Report) -> str:
    """Say why KHO is off."""
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
    if old(report.release):
        return f"Linux {report.release} is older than 6.16"
    return "it has no CMA, which KHO needs"


def what_is_missing(facts: Facts) -> str:
    """Say what would have been needed."""
    if not facts.meminfo and facts.log is None and facts.cmdline is None:
        return "there is no proc/meminfo, no kernel log and no command line"
    if not facts.meminfo:
        return "there is no proc/meminfo with CmaTotal and CmaFree"
    if facts.cma_free is None:
        return "proc/meminfo does not say CmaFree"
    return "it is enabled, and its memory may be in use; root sees more (proc/pagetypeinfo, debugfs)"
