"""What another boot line would change: memory gained or lost, and whether the kernel would take it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .._kho import ScratchSpec, kho_is_enabled, parse_kho_scratch
from ..errors import KhoError, ParameterError
from .checks import misread
from .report import Report
from .scratch import scratch_values, words
from .text import size

DEFAULT = 200
"""Per cent, where nothing else is asked for."""


@dataclass
class WhatIf:
    """What parameters would come to; bytes."""

    parameters: str
    accepted: bool = True
    """Whether the kernel can read them."""
    fits: bool | None = None
    """Whether the areas fit; None if that is not known."""
    now: int | None = None
    then: int | None = None
    exact: bool = False
    """Whether `then` is what the kernel would reserve, to the byte; else it is an estimate."""
    sizes: list[int] = field(default_factory=list)
    """Of the areas: low, global, one per node."""
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """What would have to be known to say more."""

    @property
    def gain(self) -> int | None:
        """Give the bytes that become usable by everyone; negative if there are fewer."""
        return None if self.now is None or self.then is None else self.now - self.then

    @property
    def headline(self) -> str:
        """Say it in one sentence."""
        if not self.accepted:
            return f"{self.parameters}: the kernel would not take it; {'; '.join(self.notes)}."
        about = "" if self.exact else "about "
        if self.then is None:
            return f"{self.parameters}: what it comes to is not known."
        text = f"{self.parameters}: scratch of {about}{size(self.then)}"
        if self.fits is False:
            text = f"{self.parameters}: scratch of {about}{size(self.then)} does not fit, and KHO would disable itself"
        elif self.gain is not None:
            change = "gains" if self.gain > 0 else "costs"
            text += f", {change} {about}{size(abs(self.gain))} against now" if self.gain else ", the same as now"
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """Give everything as data."""
        return {**asdict(self), "gain": self.gain, "headline": self.headline}


def what_if(report: Report, parameters: str) -> WhatIf:
    """Work out what a boot with these parameters would be like.

    Args: parameters: `kho=` and `kho_scratch=`, as on the command line; the one that is not given stays as it is.
    Raises: ParameterError for anything else.
    """
    made = WhatIf(parameters)
    value: str | None = None
    enabled = report.state in ("active", "failed")
    if report.state == "unknown":
        made.unknown.append("whether KHO is on now")
    for word in words(parameters):
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
        raise ParameterError("--what-if: nothing is asked; kho=off, or kho_scratch=64M,256M,64M")
    if report.state != "unknown" and report.scratch_how != "unknown":
        now = report.scratch if report.state == "active" else report.leftover or 0
        made.now = now if report.scratch_how != "at least" else report.scratch_low
        if report.scratch_how == "boot line":
            made.unknown.append("whether what the boot line asks for is what is held (root sees it)")
        if report.scratch_how == "at least":
            made.unknown.append("how much scratch is in use now (root sees it): what is held is a lower bound")
    else:
        made.unknown.append("how much scratch there is now")
    kept = [given for given in scratch_values(report.cmdline or "") if given is not None and _readable(given)]
    if value is None and enabled and kept:
        value = kept[-1]
        made.notes.append(f"kho_scratch={value[:80]} stays on the boot line; kho_scratch=200% is the default")
    spec = _spec(made, value)
    if not made.accepted:
        return made
    if report.boot == "kho":
        made.notes.append("after a handover the areas are inherited: it takes a cold boot to change them")
    if not enabled:
        made.then, made.exact, made.fits = 0, True, True
        if "kho_scratch" in parameters.replace("-", "_"):
            made.notes.append("KHO is off then, so kho_scratch= has no effect; add kho=on")
        return made
    if report.built_in is False:
        made.notes.append("this kernel has no KHO; another one would be needed")
    _sizes(made, report, spec)
    _fits(made, report)
    return made


def _readable(value: str) -> bool:
    """Say whether the kernel can read a value of `kho_scratch=`."""
    try:
        parse_kho_scratch(value)
    except ParameterError:
        return False
    return True


def _spec(made: WhatIf, value: str | None) -> ScratchSpec | None:
    """Read the sizes as the kernel would."""
    if value is None:
        return None
    try:
        spec = parse_kho_scratch(value)
    except ParameterError as error:
        made.accepted = False
        made.notes.append(str(error))
        return None
    made.notes += misread(value, 2 << 20)
    return spec


def _sizes(made: WhatIf, report: Report, spec: ScratchSpec | None) -> None:
    """Work out the areas."""
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
        need = report.reserved_at_boot
        if need is not None and made.then < need:
            made.notes.append(f"the next kernel needs about {size(need)} while it boots: too small for a handover")
        return
    percent = DEFAULT if spec is None else spec.percent or 0
    if report.scale and report.scratch and report.scratch_how != "at least":
        made.then = report.scratch * percent // report.scale
        made.exact = percent == report.scale
        if not made.exact:
            made.notes.append(f"from what {report.scale} % come to now; each area is rounded up by itself")
    elif report.reserved_at_boot is not None:
        made.then = 2 * report.reserved_at_boot * percent // 100
        made.notes.append("from what was reserved while booting; it counts as low or global, and again per node")
    elif report.ram is not None:
        made.then = 2 * (report.ram // 64) * percent // 100
        made.unknown.append("what the kernel reserves while booting (dmesg: Memory: ... reserved)")
        made.notes.append("from page structures alone, a sixty-fourth of RAM; it may be more")
    else:
        made.unknown.append("RAM, and what the kernel reserves while booting")


def _fits(made: WhatIf, report: Report) -> None:
    """Compare with the memory there is."""
    if made.then is None:
        return
    if report.ram is None:
        made.unknown.append("RAM, so whether it fits")
        return
    low = made.sizes[0] if made.sizes else 0
    per_node = made.sizes[2:] if len(made.sizes) > 2 else []
    over = [node for want, (node, have) in zip(per_node, report.nodes.items(), strict=False) if want > have]
    if made.then >= report.ram:
        made.fits = False
        made.notes.append(f"RAM is {size(report.ram)}")
    elif low >= 4 << 30 or over:
        made.fits = False
        made.notes.append("LOW is not below 4 GiB" if low >= 4 << 30 else f"it is more than node {over[0]} has")
    else:
        made.fits = True
        if made.then > report.ram // 2:
            made.notes.append("each area needs one piece of free memory at boot; this much may not be found")
