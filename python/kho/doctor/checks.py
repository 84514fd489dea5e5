"""Checks that turn facts into findings: one function for each group of rules."""

from __future__ import annotations

import re
from collections.abc import Callable

from .._kho import kho_is_enabled
from . import crash, dumps, releasechecks
from .facts import Facts
from .kernellog import Evidence
from .releases import affected, sure, unsure_text
from .report import Certainty, Report
from .scratch import Figures, effective_scratch, enablement, excess, split_cmdline, whole_pageblocks
from .surroundings import FIRST, may_have_backport, version, why_no_kho
from .text import share, size

LARGE = 0.1
"""Share of RAM from which DOC002 applies."""
NO_HUGETLB = (7, 3)
"""The first Linux whose percentages do not count huge pages that are reserved during boot."""
UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def run(facts: Facts, report: Report, found: Figures) -> None:
    """Run every check."""
    for check in CHECKS:
        check(facts, report, found)


def _certainty(report: Report, found: Figures) -> Certainty:
    """Return the certainty of the amount of scratch."""
    unsure: Certainty = "guess" if report.scratch_how == "boot line" or found.doubts else "likely"
    return "certain" if report.scratch_how == "exact" else unsure


def _cmdline_words(facts: Facts, wanted: str) -> Evidence | None:
    """Return the words of the command line that match a pattern, as evidence; None if there are none."""
    if facts.cmdline is None:
        return None
    found = [word for word in split_cmdline(facts.cmdline.text) if re.match(wanted, word)]
    return facts.cmdline._replace(text=" ".join(found)[:200]) if found else None


def check_scratch(facts: Facts, report: Report, found: Figures) -> None:
    """DOC001, DOC002: scratch is held; its share of RAM."""
    if report.state != "active" or not report.scratch:
        return
    areas = [area for area in report.areas if area.bytes]
    parts = " + ".join(f"{area.bytes:#x}" for area in areas)
    nodes = ", ".join(f"node {node}: {size(nbytes)}" for node, nbytes in report.by_node.items())
    about = {"boot line": "as the boot line requests,"}.get(report.scratch_how, report.scratch_how)
    text = f"{about} {report.scratch} bytes ({size(report.scratch)}"
    text += f", {share(report.share)} of RAM)" if report.share is not None else ")"
    text += f" = {parts}" if len(areas) > 1 else ""
    text += f"; {nodes}" if nodes else ""
    if report.scratch_how in ("inferred", "boot line"):
        sure = f"between {report.scratch_low} and {report.scratch_high}" if report.scratch_high is not None else None
        text += f"; certainly {sure or f'at least {report.scratch_low}'} bytes"
    text += "".join(f"; {doubt}" for doubt in found.doubts if report.scratch_how != "exact")
    if report.boot == "kho" and enablement(facts, report.enabled_by_default) is False:
        text += "; inherited: kho=off frees it at the next kexec or cold boot"
    if report.scratch_how == "at least":
        text += "; scratch pages in use are not counted (run as root for proc/pagetypeinfo and debugfs)"
    shown = [facts.config.get("CONFIG_KEXEC_HANDOVER"), _cmdline_words(facts, r"kho")]
    report.add("DOC001", text, _certainty(report, found), *found.evidence, *shown)
    if report.share is not None and report.share >= LARGE:
        shown = [facts.mem_total.seen if facts.mem_total is not None else None, *found.evidence[:4]]
        report.add("DOC002", f"{share(report.share)} of {size(report.ram or 0)}", _certainty(report, found), *shown)


def check_failure(facts: Facts, report: Report, found: Figures) -> None:
    """DOC003, DOC004: a reservation failed; its leftover."""
    if report.state != "failed" or facts.crash.inside is not None:
        return
    log = facts.log
    messages = [] if log is None else [*log.failures, *([log.disabled] if log.disabled else []), log.parsed]
    why = re.sub(r".*Failed to reserve ", "", log.failures[0].text) if log is not None and log.failures else ""
    text = f"the {why} could not be reserved" if why else "KHO is enabled but holds no scratch"
    if found.requested is not None:
        sizes = found.sizes
        ram = f" of {size(report.ram)} of RAM" if report.ram else ""
        text = f"requested {' + '.join(map(size, sizes))} = {found.requested} bytes{ram}; {text}"
    sure: Certainty = "certain" if log is not None and log.disabled is not None else "likely"
    zones = [zone.seen for zone in facts.zones if zone.cma is not None][:2] if sure == "likely" else []
    report.add("DOC003", text, sure, *messages, _cmdline_words(facts, r"kho"), *zones)
    if report.leftover:
        text = f"{report.leftover} bytes ({size(report.leftover)}"
        text += f", {share(report.share)} of RAM)" if report.share is not None else ")"
        text = text if found.blocks is not None else f"at least {text}"
        report.add("DOC004", text, "likely" if found.blocks is not None else "guess", *found.evidence)


def check_scratch_parameter(facts: Facts, report: Report, found: Figures) -> None:
    """DOC005, DOC006, DOC008: kho_scratch= is rejected, parsed unexpectedly, or has no effect."""
    value, spec, rejected = effective_scratch(facts)
    shown = _cmdline_words(facts, r"kho_scratch(=|$)")
    log = facts.log
    logged, parsed = (log.malformed, log.parsed) if log is not None else ([], None)
    for text, why in rejected[-3:]:
        if text == value:
            report.add("DOC006", f"{why}; this kernel accepted it", "certain", shown, parsed)
        else:
            stays = value[:80] if value is not None else "the default of 200 %"
            certainty: Certainty = "certain" if logged else "likely"
            report.add("DOC005", f"{why}; {stays} is in effect", certainty, shown, *logged)
    if value is None or spec is None:
        return
    for text in unexpected_parses(value, found.block_bytes):
        report.add("DOC006", text, "certain", shown, parsed)
    repeated = len(shown.text.split()) > 1 if shown is not None else False
    if report.state in ("off", "absent"):
        report.add("DOC008", f"kho_scratch={value} is given, but KHO is not active", "likely", shown)
    elif report.boot == "kho":
        same = found.sizes and sorted(found.sizes) == sorted(area.bytes for area in report.areas)
        text = "the same sizes were inherited" if same else "the inherited areas are in effect"
        report.add("DOC008", f"kho_scratch={value}: {text}", "certain" if same else "likely", shown)
    elif repeated:
        text = f"kho_scratch= is given more than once; the last valid value, {value}, is in effect"
        report.add("DOC008", text, "certain", shown)


def unexpected_parses(value: str, block_bytes: int) -> list[str]:
    """Return how the kernel parses an accepted value of kho_scratch=, where this differs from how it looks."""
    if value.endswith("%"):
        percent = int(value.rstrip("%").lstrip("+") or 0)
        if percent == 0:
            return [f"{value} leaves scratch of 0 bytes, which cannot be reserved"]
        return [f"{value} is {percent // 100} times all the memory reserved at boot"] if percent > 1000 else []
    found = []
    for part in value.split(","):
        match = re.match(r"(0x[0-9a-f]*|[0-9]*)([KMGTPE]?)", part, re.IGNORECASE)
        if match is None or not match[1]:
            continue
        digits, shift = match[1], UNITS[match[2].upper()]
        octal = digits.startswith("0") and len(digits) > 1 and not digits.lower().startswith("0x")
        try:
            meant = int(digits, 0 if not octal else 8) << shift
        except ValueError:
            continue
        if octal:
            found.append(f"{part[:40]} is octal: {size(meant % (1 << 64))}")
        if meant >= 1 << 64:
            found.append(f"{part[:40]} exceeds 64 bits and wraps around to {size(meant % (1 << 64))}")
        elif 0 < meant < block_bytes and not match[2]:
            found.append(f"{part} has no suffix: {meant} bytes, rounded up to {size(block_bytes)}")
    return found


def check_kho_parameter(facts: Facts, report: Report, found: Figures) -> None:
    """DOC007, DOC014, DOC025: kho= is not a boolean; KHO is on by default; KHO is requested but not active."""
    if facts.cmdline is None:
        return
    wrong = [
        word
        for word in split_cmdline(facts.cmdline.text)
        if re.match(r"kho(=|$)", word) and kho_is_enabled(word, True) != kho_is_enabled(word, False)
    ]
    if wrong:
        logged = facts.log.malformed if facts.log is not None else []
        shown = facts.cmdline._replace(text=" ".join(wrong)[:200])
        report.add("DOC007", f"{wrong[-1][:80]}: neither on nor off", "certain", shown, *logged)
    asked_for = enablement(facts, None) is True and facts.crash.inside is None
    if asked_for and report.state in ("off", "absent"):
        certainty: Certainty = "certain" if report.built_in is False else "likely" if found.blocks == 0 else "guess"
        text = "KHO is not built in" if report.built_in is False else "KHO is not built in, or it disabled itself"
        cma = facts.cma_free.seen if facts.cma_free is not None else None
        report.add(
            "DOC025", f"kho= requests KHO; {text}", certainty, _cmdline_words(facts, r"kho(=|$)"), facts.release, cma
        )
    if enablement(facts, None) is None and report.state in ("active", "failed"):
        default = facts.config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
        sure: Certainty = "certain" if default is not None else "likely"
        report.add("DOC014", "no kho= on the command line", sure, default, facts.cmdline._replace(text="no kho="))


def check_sizing(facts: Facts, report: Report, found: Figures) -> None:
    """DOC009, DOC010: scratch is too small; boot-time reservations inflate it."""
    gigantic, crash = facts.gigantic, facts.crash_kernel
    numbers = version(report.release)
    if report.scale and report.state in ("active", "failed"):
        # Without NUMA the node's share counts the low and the global area too. With it a crash kernel is no node's.
        times = (4, 4) if facts.numa is False else (2, 1)
        if numbers is not None and numbers >= NO_HUGETLB:
            gigantic = None
        sources = [("gigantic pages", gigantic, times[0]), ("the crash kernel", crash, times[1])]
        counted = [(what, amount, n) for what, amount, n in sources if amount is not None and amount.bytes >= 64 << 20]
        part = sum(amount.bytes * n for _, amount, n in counted) * report.scale // 100
        at_boot = _cmdline_words(facts, r"hugepages=|hugepagesz=|default_hugepagesz=|crashkernel=")
        if part and at_boot is not None and (report.state == "failed" or (report.scratch or 0) >= part):
            what = " and ".join(f"{size(amount.bytes)} of {name}" for name, amount, _ in counted)
            text = f"{what}, reserved at boot, add up to {size(part)} to scratch at {report.scale} %"
            report.add("DOC010", text, "likely", *(amount.seen for _, amount, _ in counted), at_boot)
    if report.state != "active" or not report.scratch or report.scratch_how == "at least":
        return
    need = report.needed_at_boot
    shown = facts.log.memory if facts.log is not None else None
    if need is None and facts.memmap is not None:
        need, shown = facts.memmap.bytes, facts.memmap.seen
    if facts.crash.inside is not None:
        return
    if need is not None and report.scratch < need:
        text = f"scratch is {size(report.scratch)}, but this kernel reserved {size(need)} at boot"
        text += f", without {size(report.crash_kernel)} of the crash kernel" if report.crash_kernel else ""
        report.add("DOC009", text, "likely", shown, *found.evidence[:4], _cmdline_words(facts, r"kho_scratch="))


def check_pageblocks(facts: Facts, report: Report, found: Figures) -> None:
    """DOC032: sizes of scratch areas that are not whole pageblocks."""
    block = facts.block_bytes
    spec = effective_scratch(facts)[1]
    lens = facts.debugfs.lens if facts.debugfs is not None else []
    odd = [amount for amount in lens if amount.bytes % block]
    remedy = f"Use whole pageblocks of {size(block)}"
    line = whole_pageblocks(spec, block) if spec is not None else None
    remedy += f": {line}, with a cold boot." if line is not None else ", with a cold boot."
    if odd:
        text = f"{', '.join(f'{amount.bytes:#x}' for amount in odd[:4])} bytes: no multiple of {size(block)}"
        text += "; the kernel also gave the rest of the last pageblock to the page allocator, with any owner's memory"
        seen = [amount.seen for amount in odd[:4]]
        report.add(
            "DOC032", text, "certain", *seen, _cmdline_words(facts, r"kho_scratch="), facts.release, remedy=remedy
        )
        return
    if lens or line is None or report.state != "active" or report.boot == "kho" or report.rounds_sizes is not False:
        return
    level = affected(facts, "scratch-rounding")
    text = f"low or global is no multiple of {size(block)}, and Linux {report.release}"
    text += f" {'does' if level else 'may'} not round it"
    text += unsure_text(facts, "scratch-rounding")
    parsed = facts.log.parsed if facts.log is not None else None
    seen_line = _cmdline_words(facts, r"kho_scratch=")
    report.add("DOC032", text, sure(level), seen_line, parsed, facts.release, facts.crash.signature, remedy=remedy)


def check_other_memory(facts: Facts, report: Report, found: Figures) -> None:
    """DOC011, DOC012: huge pages and other CMA areas."""
    if facts.hugetlb is not None and facts.hugetlb.bytes:
        text = f"{size(facts.hugetlb.bytes)} are huge pages"
        if report.scratch:
            text += f", {size(report.scratch)} are scratch"
        report.add("DOC011", text, "certain", facts.hugetlb.seen, _cmdline_words(facts, r"hugepages="))
    if facts.cma_total is not None and facts.cma_total.bytes:
        text = f"CmaTotal is {size(facts.cma_total.bytes)}; it does not include scratch"
        areas = [seen for _, _, seen in facts.log.cma] if facts.log is not None else []
        report.add(
            "DOC012", text, "certain", facts.cma_total.seen, *areas[:4], _cmdline_words(facts, r"cma=|hugetlb_cma=")
        )


def check_pins(facts: Facts, report: Report, found: Figures) -> None:
    """DOC013: users of long-term pins, on a machine with memory that cannot be pinned."""
    closed = report.scratch or report.leftover
    if closed and facts.pins:
        text = f"{size(closed)} cannot be pinned; {'; '.join(seen.text for seen in facts.pins[:4])}"
        report.add("DOC013", text, "likely", *facts.pins, *found.evidence[:2])


def check_absence(facts: Facts, report: Report, found: Figures) -> None:
    """DOC015, DOC016, DOC023: KHO is off or not built in; figures disagree, or CMA memory is unexplained."""
    built = facts.config.get("CONFIG_KEXEC_HANDOVER")
    cma = facts.cma_free.seen if facts.cma_free is not None else None
    if report.state == "off":
        shown = _cmdline_words(facts, r"kho(=|$)")
        default = facts.config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
        enabled = enablement(facts, report.enabled_by_default)
        text = "kho=off on the command line" if enablement(facts, None) is False else "KHO is not enabled"
        kdump = facts.log.kdump if facts.log is not None else None
        if kdump is not None:
            report.add("DOC015", "this is the kdump kernel, which disables KHO", "certain", kdump, shown)
            return
        if facts.crash.inside is not None:
            report.add("DOC015", "this is a crash kernel", "likely", facts.crash.inside, shown, cma)
            return
        if enabled:
            text = "requested, but no CMA memory is outside CmaTotal: KHO is not built in, or it disabled itself"
        if enablement(facts, None):
            return  # DOC025
        sure: Certainty = "certain" if enabled is False else "likely"
        report.add("DOC015", text, sure, shown, default, built, cma)
    elif report.state == "absent":
        foreign = facts.config_file is None and excess(found)
        numbers = version(report.release)
        sure = "certain" if facts.config_file is not None else "likely"
        brought = foreign and numbers is not None and (6, 0) <= numbers < FIRST
        if brought or (facts.config_file is None and may_have_backport(facts)):
            sure = "guess"  # vendors backport features to their long-term kernels
        config = Evidence(facts.config_file, None, "no CONFIG_KEXEC_HANDOVER=y") if facts.config_file else None
        memory = facts.mem_total.seen if facts.mem_total is not None else None
        text = why_no_kho(facts) or "holds nothing"
        what = "kho=off frees nothing" if foreign else "KHO holds nothing"
        text = f"{text}; {what}" if why_no_kho(facts) and facts.config_file is None else what
        report.add("DOC016", text, sure, built or config, facts.architecture, facts.release, memory)
    elif report.state != "unknown":
        inferred = found.blocks if found.blocks is not None else found.zones if report.boot == "cold" else None
        if found.exact is None or inferred is None:
            return
        if abs(found.exact - inferred) > found.block_bytes * max(len(found.areas), 1):
            text = (
                f"scratch is {size(found.exact)} in debugfs, but CMA pageblocks outside CmaTotal are {size(inferred)}"
            )
            report.add("DOC023", text, "certain", *found.evidence)
        return
    if excess(found):
        text = f"{size(excess(found))} of CMA memory is outside CmaTotal, but KHO is not active"
        if report.state == "unknown":
            text = f"{size(excess(found))} of CMA memory is outside CmaTotal, but kho=off or the kernel contradicts KHO"
        remedy = "Find out what else reserves CMA memory: cma=, reserved-memory in the devicetree, a vendor's driver. "
        remedy += "kho=off frees nothing here"
        remedy += "." if report.state == "absent" else ", unless scratch was inherited: then a cold boot frees it."
        report.add("DOC023", text, "likely", *found.evidence, remedy=remedy)


def check_handover(facts: Facts, report: Report, found: Figures) -> None:
    """DOC017, DOC018: booted by a handover; a handover was refused."""
    log, shown = facts.log, facts.debugfs
    if (
        log is not None
        and log.refused
        and report.boot != "kho"
        and facts.crash.inside is None
        and not releasechecks.is_harmless(facts)
    ):
        report.add("DOC018", log.refused[0].text, "certain", *log.refused)
    if report.boot != "kho":
        return
    text = "the release of the previous kernel is unknown"
    if report.previous_release is not None:
        text = f"from Linux {report.previous_release}, kexec number {report.kexec_count} since the last cold boot"
    seen = [log.found, log.exec_from[2] if log.exec_from else None] if log is not None else []
    if shown is not None:
        seen += [shown.previous[2] if shown.previous else None, shown.incoming]
    if facts.small_tmpfs and not report.container:
        point, nbytes, part, _ = facts.small_tmpfs[0]
        text += (
            f"; {point} has {size(nbytes)}, and its share of MemTotal is {size(part)}: it can have been mounted while "
        )
        text += "memory waited to be retrieved"
    small = [each[3] for each in facts.small_tmpfs]
    report.add("DOC017", text, "certain", *seen, facts.handed_over, *small)


def check_preserved(facts: Facts, report: Report, found: Figures) -> None:
    """DOC019, DOC020: finalized without a kexec; preserved subtrees."""
    shown = facts.debugfs
    if shown is None:
        return
    if shown.finalized is not None:
        report.add("DOC019", "out/finalize is 1", "certain", shown.finalized)
    going = [f"{name} ({nbytes} bytes)" for side, name, nbytes in shown.subtrees if side == "out"]
    if going:
        abi = shown.compatible[1] if shown.compatible is not None else None
        seen = [Evidence(f"sys/kernel/debug/kho/out/sub_fdts/{n}", None, f"{b} bytes") for s, n, b in shown.subtrees
                if s == "out"]  # fmt: skip
        text = f"{len(going)} subtree{'' if len(going) == 1 else 's'}: {', '.join(going)[:400]}"
        report.add("DOC020", text, "certain", abi, *seen)


def check_live_update(facts: Facts, report: Report, found: Figures) -> None:
    """DOC021, DOC022, DOC024: live update, and containers."""
    wanted = _cmdline_words(facts, r"liveupdate(=|$)")
    if wanted is not None and not kho_is_enabled(wanted.text.replace("liveupdate", "kho")):
        wanted = None
    logged = [seen for seen in facts.log.luo if "isabling" in seen.text] if facts.log is not None else []
    luo = facts.debugfs.liveupdate if facts.debugfs is not None else []
    if wanted is not None and (logged or report.state in ("off", "failed", "absent")):
        report.add("DOC021", logged[0].text if logged else "KHO is not active", "certain", wanted, *logged)
    elif facts.device is not None or luo:
        text = "/dev/liveupdate exists" if facts.device is not None else "LUO has a subtree"
        if facts.device_usable is False:
            text += ", but this user may not open it"
        for seen in luo:
            text += f"; {'outgoing' if '/out/' in seen.file else 'incoming'}: {seen.text}"
        holders = len(facts.sessions)
        text += f"; {holders} open descriptor{'' if holders == 1 else 's'} of it or of sessions" if holders else ""
        report.add("DOC022", text, "certain", facts.device, *luo, *facts.sessions, wanted)
    if facts.container is not None or facts.mixed is not None:
        text = "the figures are those of the host"
        shown = [facts.cma_free.seen if facts.cma_free is not None else None]
        if facts.mixed is not None:
            own = facts.of_container
            limit = (
                f"MemTotal ({size(own.bytes)}) is the container's" if own is not None else "MemTotal is the container's"
            )
            text = f"{facts.mixed}: {limit}, CmaTotal and CmaFree are its host's, so there is no share of RAM"
            shown.append(own.seen if own is not None else None)
        report.add("DOC024", text, "likely", facts.container, *shown)


Check = Callable[[Facts, Report, Figures], None]
CHECKS: tuple[Check, ...] = (
    check_scratch,
    check_failure,
    check_scratch_parameter,
    check_kho_parameter,
    check_sizing,
    check_pageblocks,
    check_other_memory,
    check_pins,
    check_absence,
    check_handover,
    check_preserved,
    check_live_update,
    *crash.CHECKS,
    *dumps.CHECKS,
    *releasechecks.CHECKS,
)
