"""When the rules apply: a function for each matter, from facts to findings."""

from __future__ import annotations

import re
from collections.abc import Callable

from .._kho import kho_is_enabled
from .facts import Facts
from .kernellog import Evidence
from .report import Certainty, Report
from .scratch import Figures, enablement, excess, judged, words
from .surroundings import FIRST, incapable, vendors, version
from .text import share, size

LARGE = 0.1
"""The share of RAM from which scratch is a large one."""
UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def run(facts: Facts, report: Report, found: Figures) -> None:
    """Apply every rule."""
    for check in CHECKS:
        check(facts, report, found)


def _sure(report: Report, found: Figures) -> Certainty:
    """Say how sure what is held is."""
    unsure: Certainty = "guess" if report.scratch_how == "boot line" or found.doubts else "likely"
    return "certain" if report.scratch_how == "exact" else unsure


def _word(facts: Facts, wanted: str) -> Evidence | None:
    """Show the part of the command line that matters."""
    if facts.cmdline is None:
        return None
    found = [word for word in words(facts.cmdline.text) if re.match(wanted, word)]
    return facts.cmdline._replace(text=" ".join(found)[:200]) if found else None


def held(facts: Facts, report: Report, found: Figures) -> None:
    """DOC001, DOC002: scratch is held, and how much of RAM it is."""
    if report.state != "active" or not report.scratch:
        return
    areas = [area for area in report.areas if area.bytes]
    parts = " + ".join(f"{area.bytes:#x}" for area in areas)
    nodes = ", ".join(f"node {node}: {size(nbytes)}" for node, nbytes in report.by_node.items())
    about = {"boot line": "as the boot line asks,"}.get(report.scratch_how, report.scratch_how)
    text = f"{about} {report.scratch} bytes ({size(report.scratch)}"
    text += f", {share(report.share)} of RAM)" if report.share is not None else ")"
    text += f" = {parts}" if len(areas) > 1 else ""
    text += f"; {nodes}" if nodes else ""
    if report.scratch_how in ("inferred", "boot line"):
        sure = f"between {report.scratch_low} and {report.scratch_high}" if report.scratch_high is not None else None
        text += f"; surely {sure or f'at least {report.scratch_low}'} bytes"
    text += "".join(f"; {doubt}" for doubt in found.doubts if report.scratch_how != "exact")
    if report.boot == "kho" and enablement(facts, report.enabled_by_default) is False:
        text += "; inherited: kho=off gives it back after a cold boot only"
    if report.scratch_how == "at least":
        text += "; what is in use in it is not counted (root sees more: proc/pagetypeinfo, debugfs)"
    shown = [facts.config.get("CONFIG_KEXEC_HANDOVER"), _word(facts, r"kho")]
    report.add("DOC001", text, _sure(report, found), *found.evidence, *shown)
    if report.share is not None and report.share >= LARGE:
        shown = [facts.mem_total.seen if facts.mem_total is not None else None, *found.evidence[:4]]
        report.add("DOC002", f"{share(report.share)} of {size(report.ram or 0)}", _sure(report, found), *shown)


def failed(facts: Facts, report: Report, found: Figures) -> None:
    """DOC003, DOC004: a reservation failed, and what it left."""
    if report.state != "failed":
        return
    log = facts.log
    told = [] if log is None else [*log.failures, *([log.disabled] if log.disabled else []), log.asked]
    why = re.sub(r".*Failed to reserve ", "", log.failures[0].text) if log is not None and log.failures else ""
    text = f"the {why} could not be reserved" if why else "it is enabled, and holds no scratch of its own"
    if found.asked is not None:
        sizes = found.sizes
        ram = f" of {size(report.ram)} of RAM" if report.ram else ""
        text = f"asked for {' + '.join(map(size, sizes))} = {found.asked} bytes{ram}; {text}"
    sure: Certainty = "certain" if log is not None and log.disabled is not None else "likely"
    zones = [zone.seen for zone in facts.zones if zone.cma is not None][:2] if sure == "likely" else []
    report.add("DOC003", text, sure, *told, _word(facts, r"kho"), *zones)
    if report.leftover:
        text = f"{report.leftover} bytes ({size(report.leftover)}"
        text += f", {share(report.share)} of RAM)" if report.share is not None else ")"
        text = text if found.blocks is not None else f"at least {text}"
        report.add("DOC004", text, "likely" if found.blocks is not None else "guess", *found.evidence)


def asked(facts: Facts, report: Report, found: Figures) -> None:
    """DOC005, DOC006, DOC008: kho_scratch= is rejected, misread, or without effect."""
    value, spec, rejected = judged(facts)
    shown = _word(facts, r"kho_scratch(=|$)")
    log = facts.log
    said, took = (log.malformed, log.asked) if log is not None else ([], None)
    for text, why in rejected[-3:]:
        if text == value:
            report.add("DOC006", f"{why}; this kernel took it", "certain", shown, took)
        else:
            stays = value[:80] if value is not None else "the default of 200 %"
            certainty: Certainty = "certain" if said else "likely"
            report.add("DOC005", f"{why}; {stays} is in force", certainty, shown, *said)
    if value is None or spec is None:
        return
    for text in misread(value, found.block_bytes):
        report.add("DOC006", text, "certain", shown, took)
    repeated = len(shown.text.split()) > 1 if shown is not None else False
    if report.state in ("off", "absent"):
        report.add("DOC008", f"kho_scratch={value} is given, and KHO is not active", "likely", shown)
    elif report.boot == "kho":
        same = found.sizes and sorted(found.sizes) == sorted(area.bytes for area in report.areas)
        text = "the same as was inherited" if same else "the areas of the kernel before are in force"
        report.add("DOC008", f"kho_scratch={value}: {text}", "certain" if same else "likely", shown)
    elif repeated:
        text = f"kho_scratch= is given more than once; the last that can be read, {value}, counts"
        report.add("DOC008", text, "certain", shown)


def misread(value: str, block_bytes: int) -> list[str]:
    """Say what a value that the kernel accepts means otherwise than it looks."""
    if value.endswith("%"):
        percent = int(value.rstrip("%").lstrip("+") or 0)
        if percent == 0:
            return [f"{value} leaves scratch of 0 bytes, which cannot be reserved"]
        return [f"{value} is more than {percent // 100} times all that was reserved"] if percent > 1000 else []
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
            found.append(f"{part[:40]} is beyond 64 bits and comes out as {size(meant % (1 << 64))}")
        elif 0 < meant < block_bytes and not match[2]:
            found.append(f"{part} has no suffix: {meant} bytes, rounded up to {size(block_bytes)}")
    return found


def switch(facts: Facts, report: Report, found: Figures) -> None:
    """DOC007, DOC014: kho= is not understood; nobody asked."""
    if facts.cmdline is None:
        return
    wrong = [
        word
        for word in words(facts.cmdline.text)
        if re.match(r"kho(=|$)", word) and kho_is_enabled(word, True) != kho_is_enabled(word, False)
    ]
    if wrong:
        said = facts.log.malformed if facts.log is not None else []
        shown = facts.cmdline._replace(text=" ".join(wrong)[:200])
        report.add("DOC007", f"{wrong[-1][:80]}: neither on nor off", "certain", shown, *said)
    asked_for = enablement(facts, None) is True and not (facts.log is not None and facts.log.kdump)
    if asked_for and report.state in ("off", "absent"):
        certainty: Certainty = "certain" if report.built_in is False else "likely" if found.blocks == 0 else "guess"
        text = "it is not built in" if report.built_in is False else "it is not built in, or it disabled itself"
        cma = facts.cma_free.seen if facts.cma_free is not None else None
        report.add("DOC025", f"kho= asks for it; {text}", certainty, _word(facts, r"kho(=|$)"), facts.release, cma)
    if enablement(facts, None) is None and report.state in ("active", "failed"):
        default = facts.config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
        sure: Certainty = "certain" if default is not None else "likely"
        report.add("DOC014", "no kho= on the command line", sure, default, facts.cmdline._replace(text="no kho="))


def sizing(facts: Facts, report: Report, found: Figures) -> None:
    """DOC009, DOC010: scratch is too small, or inflated."""
    gigantic, crash = facts.gigantic, facts.crash_kernel
    if report.scale and report.state in ("active", "failed"):
        sources = [("gigantic pages", gigantic), ("the crash kernel", crash)]
        counted = [(what, amount) for what, amount in sources if amount is not None and amount.bytes >= 64 << 20]
        total = sum(amount.bytes for _, amount in counted)
        part = total * 2 * report.scale // 100
        at_boot = _word(facts, r"hugepages=|hugepagesz=|default_hugepagesz=|crashkernel=")
        if total and at_boot is not None and (report.state == "failed" or (report.scratch or 0) >= part):
            what = " and ".join(f"{size(amount.bytes)} of {name}" for name, amount in counted)
            text = f"{what}, reserved while booting, make up to {size(part)} of scratch at {report.scale} %"
            report.add("DOC010", text, "likely", *(amount.seen for _, amount in counted), at_boot)
    if report.state != "active" or not report.scratch or report.scratch_how == "at least":
        return
    need = report.reserved_at_boot
    shown = facts.log.memory if facts.log is not None else None
    if need is None and facts.memmap is not None:
        need, shown = facts.memmap.bytes, facts.memmap.seen
    if need is not None and report.scratch < need:
        text = f"{size(report.scratch)} of scratch, {size(need)} were reserved by this kernel while it booted"
        report.add("DOC009", text, "likely", shown, *found.evidence[:4], _word(facts, r"kho_scratch="))


def others(facts: Facts, report: Report, found: Figures) -> None:
    """DOC011, DOC012: huge pages and CMA areas of others."""
    if facts.hugetlb is not None and facts.hugetlb.bytes:
        text = f"{size(facts.hugetlb.bytes)} are huge pages"
        if report.scratch:
            text += f", {size(report.scratch)} are scratch"
        report.add("DOC011", text, "certain", facts.hugetlb.seen, _word(facts, r"hugepages="))
    if facts.cma_total is not None and facts.cma_total.bytes:
        text = f"CmaTotal is {size(facts.cma_total.bytes)}; scratch is not in it"
        areas = [seen for _, _, seen in facts.log.cma] if facts.log is not None else []
        report.add("DOC012", text, "certain", facts.cma_total.seen, *areas[:4], _word(facts, r"cma=|hugetlb_cma="))


def pins(facts: Facts, report: Report, found: Figures) -> None:
    """DOC013: what pins memory for long, beside memory that cannot be pinned."""
    closed = report.scratch or report.leftover
    if closed and facts.pins:
        text = f"{size(closed)} cannot be pinned; {'; '.join(seen.text for seen in facts.pins[:4])}"
        report.add("DOC013", text, "likely", *facts.pins, *found.evidence[:2])


def absence(facts: Facts, report: Report, found: Figures) -> None:
    """DOC015, DOC016, DOC023: KHO is off or not there; CMA memory that nothing explains."""
    built = facts.config.get("CONFIG_KEXEC_HANDOVER")
    cma = facts.cma_free.seen if facts.cma_free is not None else None
    if report.state == "off":
        shown = _word(facts, r"kho(=|$)")
        default = facts.config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
        enabled = enablement(facts, report.enabled_by_default)
        text = "kho=off on the command line" if enablement(facts, None) is False else "it is not enabled"
        kdump = facts.log.kdump if facts.log is not None else None
        if kdump is not None:
            report.add("DOC015", "off on purpose, in the kernel that saves a crash dump", "certain", kdump, shown)
            return
        if enabled:
            text = "it is asked for, and there is no CMA memory outside CmaTotal: not built in, or it disabled itself"
        if enablement(facts, None):
            return  # DOC025
        sure: Certainty = "certain" if enabled is False else "likely"
        report.add("DOC015", text, sure, shown, default, built, cma)
    elif report.state == "absent":
        foreign = facts.config_file is None and excess(found)
        numbers = version(report.release)
        sure = "certain" if facts.config_file is not None else "likely"
        brought = foreign and numbers is not None and (6, 0) <= numbers < FIRST
        if brought or (facts.config_file is None and vendors(facts)):
            sure = "guess"  # vendors bring features to their long-lived kernels
        config = Evidence(facts.config_file, None, "no CONFIG_KEXEC_HANDOVER=y") if facts.config_file else None
        memory = facts.mem_total.seen if facts.mem_total is not None else None
        text = incapable(facts) or "holds nothing"
        what = "nothing is gained by kho=off" if foreign else "holds nothing"
        text = f"{text}; {what}" if incapable(facts) and facts.config_file is None else what
        report.add("DOC016", text, sure, built or config, facts.architecture, facts.release, memory)
    elif report.state != "unknown":
        inferred = found.blocks if found.blocks is not None else found.zones if report.boot == "cold" else None
        if found.exact is None or inferred is None:
            return
        if abs(found.exact - inferred) > found.block_bytes * max(len(found.areas), 1):
            text = f"debugfs says {size(found.exact)}, CMA pageblocks outside CmaTotal are {size(inferred)}"
            report.add("DOC023", text, "certain", *found.evidence)
        return
    if excess(found):
        text = f"{size(excess(found))} of CMA memory outside CmaTotal, and KHO is not active"
        if report.state == "unknown":
            text = (
                f"{size(excess(found))} of CMA memory outside CmaTotal, where kho=off or the kernel speak against KHO"
            )
        remedy = "Look at what else reserves CMA memory: cma=, reserved-memory in the devicetree, a vendor's driver. "
        remedy += "kho=off gains nothing here"
        remedy += (
            "." if report.state == "absent" else ", unless a handover booted this kernel: then it takes a cold boot."
        )
        report.add("DOC023", text, "likely", *found.evidence, remedy=remedy)


def chain(facts: Facts, report: Report, found: Figures) -> None:
    """DOC017, DOC018: handed over, or refused."""
    log, shown = facts.log, facts.debugfs
    if log is not None and log.refused and report.boot != "kho":
        report.add("DOC018", log.refused[0].text, "certain", *log.refused)
    if report.boot != "kho":
        return
    text = "by a kernel that does not say its release"
    if report.previous_release is not None:
        text = f"from Linux {report.previous_release}, kexec number {report.kexec_count} since the last cold boot"
    seen = [log.found, log.exec_from[2] if log.exec_from else None] if log is not None else []
    if shown is not None:
        seen += [shown.previous[2] if shown.previous else None, shown.incoming]
    report.add("DOC017", text, "certain", *seen, facts.handed_over)


def at_work(facts: Facts, report: Report, found: Figures) -> None:
    """DOC019, DOC020: a forgotten finalize; what is preserved."""
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


def live(facts: Facts, report: Report, found: Figures) -> None:
    """DOC021, DOC022, DOC024: live update, and containers."""
    wanted = _word(facts, r"liveupdate(=|$)")
    if wanted is not None and not kho_is_enabled(wanted.text.replace("liveupdate", "kho")):
        wanted = None
    said = [seen for seen in facts.log.luo if "isabling" in seen.text] if facts.log is not None else []
    luo = facts.debugfs.liveupdate if facts.debugfs is not None else []
    if wanted is not None and (said or report.state in ("off", "failed", "absent")):
        report.add("DOC021", said[0].text if said else "KHO is not active", "certain", wanted, *said)
    elif facts.device is not None or luo:
        text = "/dev/liveupdate is there" if facts.device is not None else "LUO has a subtree"
        if facts.device_usable is False:
            text += ", not for this user"
        for seen in luo:
            text += f"; {'to come' if '/out/' in seen.file else 'handed over'}: {seen.text}"
        holders = len(facts.sessions)
        text += f"; {holders} descriptor{'' if holders == 1 else 's'} of it or of sessions seen" if holders else ""
        report.add("DOC022", text, "certain", facts.device, *luo, *facts.sessions, wanted)
    if facts.container is not None or facts.mixed is not None:
        text = "the figures are the host's"
        shown = [facts.cma_free.seen if facts.cma_free is not None else None]
        if facts.mixed is not None:
            own = facts.of_container
            limit = (
                f"MemTotal ({size(own.bytes)}) is the container's" if own is not None else "MemTotal is the container's"
            )
            text = f"{facts.mixed}: {limit}, CmaTotal and CmaFree are its host's; no share of RAM is made of them"
            shown.append(own.seen if own is not None else None)
        report.add("DOC024", text, "likely", facts.container, *shown)


Check = Callable[[Facts, Report, Figures], None]
CHECKS: tuple[Check, ...] = (
    held,
    failed,
    asked,
    switch,
    sizing,
    others,
    pins,
    absence,
    chain,
    at_work,
    live,
)
