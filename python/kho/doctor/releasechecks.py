"""Checks by release and by kernel message: DOC033 to DOC041."""

from __future__ import annotations

import re

from ..kernels import FIXES
from .facts import Facts
from .kernellog import Evidence
from .messages import meaning_of
from .releases import affected, release_of, shown, sure, unsure_text
from .report import Certainty, Report
from .scratch import Figures, split_cmdline

LATENT = ("retrieve-partial", "session-error-ignored", "retrieve-leaks", "session-race", "ioctl-direction")
"""Faults of live update that DOC035 names on a machine that has it."""
RESTORE = "memfd_luo: Unable to restore folio"
PANIC = "Kernel panic - not syncing: The incoming tree failed"
PASSED = "Passed KHO data, but"
HARMLESS = re.compile(r"handover FDT \(\S{1,40}\) is invalid: -9$")


def live_update(facts: Facts, report: Report) -> Evidence | None:
    """Return the evidence that live update is available; None if it is not."""
    if report.state != "active" or facts.crash.inside is not None:
        return None
    if facts.device is not None:
        return facts.device
    if facts.debugfs is not None and facts.debugfs.liveupdate:
        return facts.debugfs.liveupdate[0]
    words = (
        [word for word in split_cmdline(facts.cmdline.text) if word in ("liveupdate=on", "liveupdate=1")]
        if (facts.cmdline is not None)
        else []
    )
    return facts.cmdline._replace(text=words[-1]) if words and facts.cmdline is not None else None


def _said(facts: Facts, start: str) -> list[Evidence]:
    return [seen for seen in facts.log.others if seen.text.startswith(start)] if facts.log is not None else []


def check_memfds(facts: Facts, report: Report, found: Figures) -> None:
    """DOC033, DOC034, DOC035: memfds that lose pages, that came back in part, and other faults of live update."""
    available = live_update(facts, report)
    level = affected(facts, "memfd-dirty")
    if available is not None and level is not False:
        fixed = FIXES["memfd-dirty"].remedied()
        text = f"Linux {report.release} can lose pages that are written after PRESERVE_FD; fixed in {fixed}"
        report.add("DOC033", text + unsure_text(facts, "memfd-dirty"), sure(level), *shown(facts), available)
    failed = _said(facts, RESTORE)
    partial = affected(facts, "retrieve-partial")
    if failed:
        text = f"{len(failed)} page{'' if len(failed) == 1 else 's'} of memfds could not be restored"
        if partial is not False:
            text += "; RETRIEVE_FD can have succeeded all the same, with a short file"
            text += f" (fixed in {FIXES['retrieve-partial'].remedied()})"
        else:
            text += "; RETRIEVE_FD has failed, and the file is lost"
        report.add("DOC034", text + unsure_text(facts, "retrieve-partial"), "certain", *failed[:6], *shown(facts))
    if available is None:
        return
    faults = [(name, affected(facts, name)) for name in LATENT]
    has = [name for name, each in faults if each is not False and not (name == "retrieve-partial" and failed)]
    if has:
        parts = [f"{FIXES[name].effect} (fixed in {FIXES[name].remedied()})" for name in has]
        certainty = sure(all(each for name, each in faults if name in has))
        report.add("DOC035", "; ".join(parts), certainty, *shown(facts), available)


def check_nodes(facts: Facts, report: Report, found: Figures) -> None:
    """DOC036: a NUMA node without memory makes the reservation fail."""
    level = affected(facts, "memoryless-node")
    empty = [seen for seen in _said(facts, "Initmem setup node ") if seen.text.endswith(" as memoryless")]
    if report.state != "failed" or level is False or not empty:
        return
    text = f"{len(empty)} NUMA node{'' if len(empty) == 1 else 's'} without memory, for which Linux {report.release} "
    text += f"tries to reserve scratch; fixed in {FIXES['memoryless-node'].remedied()}"
    seen = [*empty[:4], facts.log.disabled if facts.log is not None else None, *shown(facts)]
    report.add("DOC036", text + unsure_text(facts, "memoryless-node"), "likely", *seen)


def is_harmless(facts: Facts) -> list[Evidence]:
    """Return the messages of a refusal that lost nothing: an FDT page of a 6.16 or 6.17 that was never finalized."""
    log, release = facts.log, release_of(facts)
    if log is None or release is None or affected(facts, "segment-unfinalized") is False:
        return []
    refused = [seen for seen in log.refused if HARMLESS.search(seen.text)]
    return log.refused if refused else []


def check_harmless(facts: Facts, report: Report, found: Figures) -> None:
    """DOC037: nothing was handed over, which an empty FDT page shows."""
    seen = is_harmless(facts)
    if seen and report.boot != "kho":
        level = affected(facts, "segment-unfinalized")
        text = "the previous kernel passed an empty FDT page because nothing was finalized; nothing is lost. Fixed in "
        text += FIXES["segment-unfinalized"].remedied()
        report.add("DOC037", text, sure(level), *seen[:4], *shown(facts))


def check_next_kernel(facts: Facts, report: Report, found: Figures) -> None:
    """DOC038: a kexec from this release into a later one does not boot."""
    release = release_of(facts)
    if release is None or report.state != "active" or facts.crash.inside is not None:
        return
    luo = facts.debugfs.luo_flb if facts.debugfs is not None else None
    available = live_update(facts, report)
    if release.series == (6, 19) and available is not None and luo is not True:
        text = "kexec from this kernel to 7.0 panics there: its LUO data has no luo-flb node, also without a session. "
        text += "kho=off on the 7.0 kernel's line avoids it: memfds are lost, reserve_mem is kept, and scratch stays "
        text += "reserved until a cold boot"
        certainty: Certainty = "certain" if not release.vendor else "likely"
        report.add("DOC038", text, certainty, *shown(facts), available)
    elif (6, 16) <= release.series <= (6, 17) and facts.debugfs is not None and facts.debugfs.finalized is not None:
        text = (
            "kexec from this kernel to 6.18 or later dies before its first message: the map has bitmaps of 512 bytes, "
        )
        text += "which the next kernel reads as pages"
        certainty = "certain" if not release.vendor and release.series == (6, 17) else "likely"
        report.add("DOC038", text, certainty, facts.debugfs.finalized, *shown(facts))


def check_messages(facts: Facts, report: Report, found: Figures) -> None:
    """DOC039, DOC040, DOC041: a panic of live update, faults that the kernel reported, a handover that was ignored."""
    log = facts.log
    if log is None:
        return
    panics, passed = _said(facts, PANIC), _said(facts, PASSED)
    lines = [*log.kho, *log.luo, *log.others]
    known = [(seen, meaning) for seen in lines if (meaning := meaning_of(seen.text)) is not None]
    reasons = [seen for seen, meaning in known if meaning.rule == "DOC039"]
    if panics:
        text = "the kernel panicked because it could not use the LUO data of the previous one; kho=off on its line "
        text += "avoids it"
        report.add("DOC039", text, "certain", *reasons, *shown(facts))
    if passed:
        report.add("DOC041", passed[0].text, "certain", *passed[:2], *shown(facts))
    bad = [(seen, meaning) for seen, meaning in known if meaning.bad]
    if bad and facts.crash.inside is None:
        told = dict.fromkeys(f"{seen.text[:100]}: {meaning.meaning}" for seen, meaning in bad)
        report.add("DOC040", "; ".join(told), "certain", *(seen for seen, _ in bad))


CHECKS = (check_memfds, check_nodes, check_harmless, check_next_kernel, check_messages)
