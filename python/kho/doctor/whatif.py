"""Predicts the effect of another boot line: memory gained or lost, and whether the kernel accepts it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .._kho import ScratchSpec, kho_is_enabled, parse_kho_scratch
from ..errors import KhoError, ParameterError
from .checks import unexpected_parses
from .crash import fits_after_handover, proposed
from .report import Report
from .scratch import scratch_values, split_cmdline, whole_pageblocks
from .text import size

DEFAULT = 200
"""The kernel's default for `kho_scratch=`, in percent."""


@dataclass
class WhatIf:
    """The predicted effect of parameters. All sizes are bytes."""

    parameters: str
    accepted: bool = True
    """True if the kernel accepts the parameters."""
    fits: bool | None = None
    """True if the areas fit into memory; None if unknown."""
    boots: bool | None = None
    """True if the next kernel can boot in the areas; None if unknown."""
    crash_kernel: bool | None = None
    """True if a crash kernel has room in one area after a handover; None if unknown, or without crashkernel=."""
    now: int | None = None
    then: int | None = None
    exact: bool = False
    """True if `then` is exact to the byte; otherwise it is an estimate."""
    sizes: list[int] = field(default_factory=list)
    """Sizes of the areas: low, global, one per node."""
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Missing information that would make the prediction better."""

    @property
    def gain(self) -> int | None:
        """Bytes that are no longer scratch; negative if scratch grows."""
        return None if self.now is None or self.then is None else self.now - self.then

    @property
    def good(self) -> bool:
        """True if the kernel accepts the parameters, and as far as is known everything has room."""
        return self.accepted and self.fits is not False and self.boots is not False and self.crash_kernel is not False

    @property
    def headline(self) -> str:
        """The prediction in one sentence."""
        if not self.accepted:
            return f"{self.parameters}: the kernel would not accept it; {'; '.join(self.notes)}."
        about = "" if self.exact else "about "
        if self.then is None:
            return f"{self.parameters}: the size of scratch cannot be predicted."
        text = f"{self.parameters}: scratch of {about}{size(self.then)}"
        if self.fits is False:
            text = f"{self.parameters}: scratch of {about}{size(self.then)} does not fit, and KHO would disable itself"
        elif self.gain is not None:
            change = "gains" if self.gain > 0 else "costs"
            text += f", {change} {about}{size(abs(self.gain))} compared with now" if self.gain else ", the same as now"
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as data for JSON."""
        return {**asdict(self), "gain": self.gain, "headline": self.headline}


def what_if(report: Report, parameters: str) -> WhatIf:
    """Predict the scratch memory of a boot with other parameters.

    Args: parameters: `kho=` and `kho_scratch=`, as on the command line; a parameter that is not given keeps its value.
    Raises: ParameterError for other parameters, or none.
    """
    made = WhatIf(parameters)
    value: str | None = None
    enabled = report.state in ("active", "failed")
    if report.state == "unknown":
        made.unknown.append("whether KHO is on now")
    for word in split_cmdline(parameters):
        name, _, rest = word.partition("=")
        if name == "kho":
            if kho_is_enabled(word, True) != kho_is_enabled(word, False):
                made.accepted = False
                made.notes.append(f"{word} is neither on nor off (kho=on, kho=off)")
            else:
                enabled = kho_is_enabled(word)
        elif name == "kho_scratch":
            value = rest
        else:
            raise ParameterError(f"--what-if {word}: neither kho= nor kho_scratch=")
    if not parameters.strip():
        raise ParameterError("--what-if: no parameters are given; use kho=off, or kho_scratch=64M,256M,64M")
    if report.state != "unknown" and report.scratch_how != "unknown":
        now = report.scratch if report.state == "active" else report.leftover or 0
        made.now = now if report.scratch_how != "at least" else report.scratch_low
        if report.scratch_how == "boot line":
            made.unknown.append("whether scratch has the size that the boot line requests (run as root to see it)")
        if report.scratch_how == "at least":
            made.unknown.append("how much scratch is in use now (run as root to see it): its size is a lower bound")
    else:
        made.unknown.append("how much scratch there is now")
    kept = [given for given in scratch_values(report.cmdline or "") if given is not None and _readable(given)]
    if value is None and enabled and kept:
        value = kept[-1]
        made.notes.append(f"kho_scratch={value[:80]} stays on the boot line; the default is kho_scratch=200%")
    spec = _spec(made, value)
    if not made.accepted:
        return made
    if report.boot == "kho":
        made.notes.append("after a handover the areas are inherited: only a cold boot changes them")
    if not enabled:
        made.then, made.exact, made.fits = 0, True, True
        if "kho_scratch" in parameters.replace("-", "_"):
            made.notes.append("KHO is off then, so kho_scratch= has no effect; add kho=on")
        return made
    if report.built_in is False:
        made.notes.append("this kernel has no KHO; another kernel is needed")
    if spec is not None and (line := whole_pageblocks(spec, report.pageblock)) and report.rounds_sizes is False:
        made.accepted = False
        made.notes.append(
            f"low and global must be whole pageblocks of {size(report.pageblock)}: Linux {report.release} may not "
            f"round them, and corrupts memory next to the area (DOC032); use {line}"
        )
        return made
    _sizes(made, report, spec)
    _fits(made, report)
    _crash_kernel(made, report)
    return made


def _readable(value: str) -> bool:
    """Return whether the kernel accepts a value of `kho_scratch=`."""
    try:
        parse_kho_scratch(value)
    except ParameterError:
        return False
    return True


def _spec(made: WhatIf, value: str | None) -> ScratchSpec | None:
    """Parse the sizes as the kernel does."""
    if value is None:
        return None
    try:
        spec = parse_kho_scratch(value)
    except ParameterError as error:
        made.accepted = False
        made.notes.append(str(error))
        return None
    made.notes += unexpected_parses(value, 2 << 20)
    return spec


def _sizes(made: WhatIf, report: Report, spec: ScratchSpec | None) -> None:
    """Predict the sizes of the areas."""
    nodes = len(report.nodes) or max(len(report.areas) - 2, 0)
    if spec is not None and spec.low is not None:
        if not nodes:
            made.unknown.append("how many NUMA nodes have memory; one is assumed")
        try:
            made.sizes = spec.sizes(0, 0, [0] * (nodes or 1), report.alignment)
        except KhoError as error:
            made.accepted = False
            made.notes.append(str(error))
            return
        made.then, made.exact = sum(made.sizes), bool(nodes)
        need = report.needed_at_boot
        made.boots = None if need is None else made.then >= need
        if need is not None and made.then < need:
            made.notes.append(
                f"too small for a handover: the next kernel needs about {size(need)} while it boots (on x86_64 with "
                "its initramfs)"
            )
        return
    percent = DEFAULT if spec is None else spec.percent or 0
    if report.scale and report.scratch and report.scratch_how != "at least":
        made.then = report.scratch * percent // report.scale
        made.exact = percent == report.scale
        if not made.exact:
            made.notes.append(f"scaled from the size at {report.scale} % now; each area is rounded up separately")
    elif report.reserved_at_boot is not None:
        crash = min(report.crash_kernel or 0, report.reserved_at_boot)
        counted = 4 * report.reserved_at_boot if report.numa is False else 2 * report.reserved_at_boot - crash
        made.then = counted * percent // 100
        made.notes.append("estimated from the memory reserved at boot, which counts for low or global and per node")
        if report.crash_kernel:
            made.notes.append(f"{size(report.crash_kernel)} of it are the crash kernel's")
    elif report.ram is not None:
        made.then = 2 * (report.ram // 64) * percent // 100
        made.unknown.append("how much the kernel reserves at boot (dmesg: Memory: ... reserved)")
        made.notes.append("estimated from the page structures alone, 1/64 of RAM; it may be more")
    else:
        made.unknown.append("the size of RAM, and how much the kernel reserves at boot")


def _fits(made: WhatIf, report: Report) -> None:
    """Compare the areas with the memory of the machine."""
    if made.then is None:
        return
    if report.ram is None:
        made.unknown.append("the size of RAM, and therefore whether the areas fit")
        return
    low = made.sizes[0] if made.sizes else 0
    per_node = made.sizes[2:] if len(made.sizes) > 2 else []
    over = [node for want, (node, have) in zip(per_node, report.nodes.items(), strict=False) if want > have]
    if made.then + report.crash_wanted >= report.ram + (report.crash_kernel or 0):
        made.fits = False
        crash = f", and {size(report.crash_wanted)} are for the crash kernel" if report.crash_wanted else ""
        made.notes.append(f"RAM is {size(report.ram)}{crash}")
    elif low >= 4 << 30 or over:
        made.fits = False
        made.notes.append(
            "LOW is not below 4 GiB" if low >= 4 << 30 else f"PERNODE exceeds the memory of node {over[0]}"
        )
    else:
        made.fits = True
        if made.then > report.ram // 2:
            made.notes.append("each area must be contiguous free memory at boot; areas this large may not be available")


def _crash_kernel(made: WhatIf, report: Report) -> None:
    """Compare the largest area with the memory that `crashkernel=` asks for: after a handover it must fit into one."""
    if not report.crash_wanted:
        return
    if len(made.sizes) < 3:
        _crash_kernel_by_percentage(made, report)
        return
    others = report.needed_at_boot
    besides = others if others is not None else 64 << 20
    made.crash_kernel = fits_after_handover(made.sizes, report.crash_wanted, others)
    if made.crash_kernel:
        made.notes.append(f"after a live update the crash kernel's {size(report.crash_wanted)} fit into one area")
        return
    line = proposed(made.sizes, report.crash_wanted, besides, report.ram, report.pageblock)
    text = f"crashkernel= asks for {size(report.crash_wanted)}, and the largest area has {size(max(made.sizes))}"
    text += f"; {line} has room for it" if line is not None else ""
    if made.crash_kernel is False:
        made.notes.append(f"no crash kernel after a live update: {text}")
    else:
        made.unknown.append(f"whether a crash kernel has room after a live update: {text}")


def _crash_kernel_by_percentage(made: WhatIf, report: Report) -> None:
    """Say whether a crash kernel has room if scratch is a percentage, in proportion to the areas of now."""
    if made.then is None:
        return
    if report.scale and report.scratch and [area for area in report.areas if area.phys is not None]:
        sizes = [area.bytes * made.then // report.scratch for area in report.areas]
    elif report.reserved_at_boot is not None and report.numa is False:
        low = made.then // 4  # R of low memory at 200 %, and three times that for the node
        sizes = [low, 0, made.then - low]
    else:
        made.unknown.append(
            f"whether one area of a percentage has room for the crash kernel's {size(report.crash_wanted)} after a "
            f"live "
            "update: kho_scratch=LOW,GLOBAL,PERNODE decides it"
        )
        return
    made.crash_kernel = fits_after_handover(sizes, report.crash_wanted, report.needed_at_boot)
    text = f"the crash kernel's {size(report.crash_wanted)}, the largest area would be about {size(max(sizes))}"
    if made.crash_kernel:
        made.notes.append(f"after a live update there is room for {text}")
    elif made.crash_kernel is False:
        made.notes.append(f"no crash kernel after a live update: {text}")
    else:
        made.unknown.append(f"whether there is room after a live update for {text}")
