"""Findings about the kernel that takes over, from the judgement of `kho.handover.compat`."""

from __future__ import annotations

from collections.abc import Iterator

from ..kernels import Kernel, Release, kernels_that_write, known_kernel, spanned
from .compat import Judged, Offer, Target, judge
from .rules import Finding, note_omitted

__all__ = ["luo_findings", "target_findings", "target_named"]

BAD = ("panics", "refused", "lost")
"""Verdicts that are findings."""


def target_named(text: str) -> Target:
    """Return the kernel of a release. Raises: ParameterError if no such kernel is known."""
    known_kernel(text)
    return Target(Release.parse(text))


def target_findings(
    offer: Offer, target: Target, place: str, phys: int | None = None, *, most: int = 16
) -> Iterator[Finding]:
    """Report what a kernel does not take (KHO039). Args: place, phys: of the root FDT. most: maximum number."""
    rows = [row for row in judge(offer, target) if row.verdict in BAD]
    found = [
        Finding("KHO039", f"{place}, {row.object}", f"Linux {target.release}: {row.verdict}: {row.why}", phys)
        for row in rows[:most]
    ]
    yield from note_omitted(found, len(rows))


def luo_findings(offer: Offer, place: str, phys: int | None, most: int) -> Iterator[Finding]:
    """Report LUO data that the kernels that read the map panic on or lose (KHO036 to KHO038).

    Kernels without LUO are left out: they ignore the subtree, whatever it is.

    Args: place, phys: of the subtree's blob. most: maximum number of files.
    """
    kernels = [kernel for kernel in kernels_that_write(offer.abi, offer.bitmap_bytes, None) if kernel.luo is not None]
    if offer.luo is None or not kernels:
        return
    judged = [(kernel, _luo_rows(offer, kernel)) for kernel in kernels]
    panics = [(kernel, rows["LUO"]) for kernel, rows in judged if rows["LUO"].verdict == "panics"]
    if panics:
        names = spanned([kernel for kernel, _ in panics])
        rule = "KHO036" if len(panics) == len(judged) else "KHO037"
        yield Finding(rule, place, f"{names} would panic: {panics[0][1].why}", phys)
    taking = [(kernel, rows) for kernel, rows in judged if rows["LUO"].verdict == "taken"]
    if not taking:
        return
    first = taking[0][1]
    lost = [name for name in first if all(rows[name].verdict == "lost" for _, rows in taking)]
    # Of several kernels the newest loses most, so that it has the reason.
    last = taking[-1][1]
    found = [Finding("KHO038", f"{place}, {name}", last[name].why, phys) for name in lost[:most]]
    yield from note_omitted(found, len(lost))


def _luo_rows(offer: Offer, kernel: Kernel) -> dict[str, Judged]:
    """Judge LUO and its files for a kernel, by object; LUO is "refused" if it does not come to that."""
    rows = {row.object: row for row in judge(offer, Target(Release.parse(kernel.name)))}
    found = {name: row for name, row in rows.items() if name == "LUO" or name.startswith("session ")}
    return {"LUO": Judged("LUO", "refused", "", ""), **found}
