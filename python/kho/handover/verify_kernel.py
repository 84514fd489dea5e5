"""Findings about the kernel that takes over, from the judgement of `kho.handover.compat`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from .._types import OwnedRange
from ..errors import KhoError
from ..formats import Luo, MemfdFile
from ..kernels import FIXES, KERNELS, Kernel, Release, kernels_that_write, known_kernel, spanned
from ..sizes import PAGEBLOCK_ORDERS, format_size
from .compat import Judged, Offer, Target, judge
from .rules import Finding, note_omitted

__all__ = [
    "luo_findings",
    "partial_findings",
    "release_findings",
    "target_findings",
    "target_named",
    "unsettled_findings",
]

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
    kernel = target.kernel
    theirs = None if kernel is None else kernel.bitmap_bytes(offer.page_size or 4096)
    other = None not in (theirs, offer.bitmap_bytes) and theirs != offer.bitmap_bytes
    found = [
        Finding(
            "KHO051" if other and row.object == "map" else "KHO039",
            f"{place}, {row.object}",
            f"Linux {target.release}: {row.verdict}: {row.why}",
            phys,
        )
        for row in rows[:most]
    ]
    yield from note_omitted(found, len(rows))


def release_findings(offer: Offer, place: str) -> Iterator[Finding]:
    """Report faults of the release that hands over, where it is known (KHO049, KHO050). Args: place: of LUO."""
    release = offer.release
    if release is None:
        return
    pages = offer.page_size or 4096
    block = pages << PAGEBLOCK_ORDERS[pages]
    rounded = FIXES["scratch-rounding"].affects(release) is False
    # Areas per node are rounded in every release.
    for name, (phys, nbytes) in zip(("low memory", "global"), offer.scratch or (), strict=False):
        if nbytes % block and not rounded:
            why = f"{format_size(nbytes)}, no multiple of {format_size(block)}; Linux {release} does not round it"
            yield Finding("KHO050", f"scratch area for {name} at {phys:#x}", why, phys)
    # Without a point release most of its kernels have the fix.
    if offer.luo is not None and release.point is not None and FIXES["memfd-dirty"].affects(release) is not False:
        vendor = "; your vendor may have the fix" if release.vendor else ""
        yield Finding("KHO049", place, f"handed over by Linux {release}: {FIXES['memfd-dirty'].effect}{vendor}")


UNSETTLED_MEMFD = KERNELS["{}.{}".format(*FIXES["memfd-dirty"].since)].memfd
"""Compatible of the memfds whose folios a kernel with the fault lists."""
SETTLED = bytes(0x30 & ~byte and 1 for byte in range(256))
"""Of the byte of a folio's record that holds its flags, dirty (0x10) and up to date (0x20): 1 if either is missing."""
RECORD, FLAGS_AT = 16, 6
WINDOW = 1 << 20


def unsettled_findings(luo: Luo, most: int) -> Iterator[Finding]:
    """Report memfds with folios that were not dirty and up to date, which only Linux 6.19.0 to 6.19.8 record (KHO049).

    Later formats of memfds came with kernels without the fault.
    """
    found: list[Finding] = []
    count = 0
    for session in luo.all_sessions:
        for entry in session.entries:
            file = session.files.decode(entry) if entry.compatible == UNSETTLED_MEMFD else None
            if not isinstance(file, MemfdFile) or not (n := _unsettled(file)):
                continue
            count += 1
            if len(found) < most:
                place = f"session {session.name}, file {entry.token:#x} at {entry.data:#x}"
                why = (
                    f"{n} of {file.memfd.nr_listed} folios were not dirty, or not up to date, when they were preserved"
                )
                found.append(Finding("KHO049", place, why, entry.data))
    yield from note_omitted(found, count)


def _unsettled(file: MemfdFile) -> int:
    """Count the folios of a list that are not dirty and up to date, by windows; 0 for a list that cannot be read."""
    area, n = file.memfd.list, file.memfd.nr_listed * RECORD
    try:
        parts = (area.read(min(WINDOW, n - at), at) for at in range(0, n, WINDOW))
        return sum(sum(part[FLAGS_AT::RECORD].translate(SETTLED)) for part in parts)
    except KhoError:
        return 0


def partial_findings(rows: Iterable[OwnedRange], target: Target, most: int) -> Iterator[Finding]:
    """Report files that a kernel restores in part without an error (KHO052). Args: rows: what is not preserved."""
    if FIXES["retrieve-partial"].affects(target.release) is False:
        return
    offsets: dict[str, list[OwnedRange]] = defaultdict(list)
    for row in rows:
        if row.what == "data" and row.owner.startswith("session ") and row.offset is not None:
            offsets[row.owner].append(row)
    # Where the first folio cannot be restored, RETRIEVE_FD fails.
    later = {owner: each for owner, each in offsets.items() if all(row.offset for row in each)}
    found = [
        Finding("KHO052", owner, f"Linux {target.release}: offset {each[0].offset:#x} cannot be restored", each[0].phys)
        for owner, each in later.items()
    ]
    yield from note_omitted(found[:most], len(found))


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
