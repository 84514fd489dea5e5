"""Compares two handovers: layout, scratch, folios, and subtrees, sessions, files and regions with their contents.

>>> found = diff(kho.open("before.elf"), kho.open("after.elf"))
>>> bool(found), [change.name for change in found.files]
(True, ['vm-1/0x10'])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from heapq import merge
from itertools import islice
from typing import Any, Literal, NamedTuple

from .. import errors
from .._kho import Incoming, Tracker
from .extract import WINDOW, Allowance, Content, Item, items, sha256_of

__all__ = ["Change", "ContentChange", "Diff", "Extent", "FolioChange", "diff", "extents_of"]

Side = Literal["added", "removed", "changed"]
"""`added`: only in B; `removed`: only in A; `changed`: in both, but different."""


class Extent(NamedTuple):
    """A run of adjacent folios of one order."""

    phys: int
    nbytes: int
    folios: int


@dataclass(frozen=True)
class FolioChange:
    """Folios of one order that only one handover preserves."""

    order: int
    """Order relative to `Diff.page_size`."""
    only_a: list[Extent]
    only_b: list[Extent]
    more_a: int = 0
    """Number of folios missing in `only_a`: those beyond the runs that an image of its size can plausibly hold."""
    more_b: int = 0


@dataclass(frozen=True)
class ContentChange:
    """Difference of two contents."""

    offset: int
    """Offset of the first difference; the shorter length if one content is a prefix of the other."""
    nbytes: int
    """Number of different bytes within the common length."""
    sha256: tuple[str | None, str | None]
    """Hex digests of A and B; None if the holes are too large to hash."""


@dataclass(frozen=True)
class Change:
    """A subtree, region or file that is in only one handover, or differs between them."""

    kind: str
    name: str
    side: Side
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Properties that differ, as (in A, in B): address, size, position, seals, compatible, error."""
    content: ContentChange | None = None
    """None if the contents are equal, or not readable on both sides."""


@dataclass(frozen=True)
class Diff:
    """All differences of two handovers; false if there are none."""

    page_size: int
    """Unit of folio orders: the smaller of the two page sizes, in bytes."""
    facts: dict[str, tuple[Any, Any]]
    """ABI, page and bitmap sizes, addresses of FDT and map, as (in A, in B)."""
    scratch: tuple[list[tuple[int, int]] | None, list[tuple[int, int]] | None] | None
    """Scratch areas of A and B if they differ; None for a side whose areas are unknown."""
    folios: list[FolioChange]
    subtrees: list[Change]
    sessions: list[Change]
    """Sessions in only one handover, and errors of LUO."""
    files: list[Change]
    reserve_mem: list[Change]
    uncompared: list[str] = field(default_factory=list)
    """Items that could not be compared because they, or what leads to them, are not in one of the dumps."""

    def __bool__(self) -> bool:
        return bool(
            self.facts
            or self.scratch
            or self.folios
            or self.subtrees
            or self.sessions
            or self.files
            or self.reserve_mem
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the differences as a dict for JSON."""
        data = asdict(self)
        for change in data["folios"]:
            for side in ("more_a", "more_b"):
                if not change[side]:
                    del change[side]
        if not self.uncompared:
            del data["uncompared"]
        return {"different": bool(self), **data}


def diff(a: Incoming, b: Incoming, *, progress: Callable[[int], object] | None = None) -> Diff:
    """Compare two handovers. Contents are read in windows, without holes.

    Args: progress: called with the number of bytes compared so far.
    Raises: OrderError for folios too large to be expressed in the other page size; SourceError.
    """
    page = min(a.page_size, b.page_size)
    names = ("compatible", "page_size", "bitmap_bytes", "fdt_phys", "preserved_memory_map")
    facts = {name: (getattr(a, name), getattr(b, name)) for name in names}
    scratch = (a.scratch, b.scratch)
    uncompared: list[str] = []
    if any(inc.scratch is None and any(inc.absent_bytes()) for inc in (a, b)) and scratch[0] != scratch[1]:
        scratch = (None, None)
        uncompared.append("scratch")
    changes = list(_changes(a, b, progress, uncompared))
    lost = a.map_lost or b.map_lost
    if lost:
        uncompared.insert(0, "folios, page size and bitmap size")
        del facts["page_size"], facts["bitmap_bytes"]
    return Diff(
        page_size=page,
        facts={name: pair for name, pair in facts.items() if pair[0] != pair[1]},
        scratch=None if scratch[0] == scratch[1] else scratch,
        folios=[] if lost else _folios(a, b, page),
        subtrees=[change for change in changes if change.kind == "subtree"],
        sessions=[change for change in changes if change.kind in ("session", "sessions")],
        files=[change for change in changes if change.kind == "file"],
        reserve_mem=[change for change in changes if change.kind == "reserve_mem"],
        uncompared=uncompared,
    )


# Folios


def _folios(a: Incoming, b: Incoming, page: int) -> list[FolioChange]:
    in_a, in_b = _tracker(a, page), _tracker(b, page)
    sides = []
    for only, inc in ((in_a - in_b, a), (in_b - in_a, b)):
        listed = _extents_of(only, inc.room("items"))
        sides.append((listed, {order: row["folios"] for order, row in only.stats().items() if row["folios"]}))
    (only_a, all_a), (only_b, all_b) = sides

    def more(order: int, listed: dict[int, list[Extent]], counts: dict[int, int]) -> int:
        return counts.get(order, 0) - sum(extent.folios for extent in listed.get(order, []))

    return [
        FolioChange(
            order, only_a.get(order, []), only_b.get(order, []), more(order, only_a, all_a), more(order, only_b, all_b)
        )
        for order in sorted(all_a.keys() | all_b.keys())
    ]


def _tracker(inc: Incoming, page: int) -> Tracker:
    """Return the preserved folios in units of a smaller page: orders grow by log2 of the ratio of page sizes."""
    own = inc.tracker()
    if inc.page_size == page:
        return own
    more = (inc.page_size // page).bit_length() - 1
    tracker = Tracker(page)
    for order in inc.folios_by_order:
        for pfn, folios in own.runs(order):
            tracker.preserve_run(pfn << more, order + more, folios)
    return tracker


def extents_of(tracker: Tracker) -> dict[int, list[Extent]]:
    """Merge adjacent folios of one order: order -> extents, sorted by address."""
    return _extents_of(tracker, None)


def _extents_of(tracker: Tracker, most: int | None) -> dict[int, list[Extent]]:
    """As `extents_of`, with at most `most` extents in total."""
    found = {}
    left = most
    for order, row in tracker.stats().items():
        size = tracker.page_size << order
        if row["folios"]:
            runs = tracker.runs(order)
            found[order] = [Extent(pfn * tracker.page_size, n * size, n) for pfn, n in islice(runs, left)]
            left = None if left is None else left - len(found[order])
    return found


# Contents


def _keyed(found: Iterable[Item]) -> dict[tuple[str, str, int], Item]:
    """Key items by kind, name and, for duplicate names, a running number."""
    keyed: dict[tuple[str, str, int], Item] = {}
    seen: dict[tuple[str, str], int] = {}
    for item in found:
        nth = seen[item.kind, item.name] = seen.get((item.kind, item.name), 0) + 1
        keyed[item.kind, item.name, nth] = item
    return keyed


def _luo(inc: Incoming) -> tuple[list[str], dict[str, list[int]]]:
    """Return session names and FLBs; empty without LUO, or if it is malformed, which `items` reports."""
    try:
        luo = inc.luo
    except errors.KhoError:
        return [], {}
    return list(luo.sessions), {flb.name: [flb.data, flb.count] for flb in luo.flbs}


def _changes(
    a: Incoming, b: Incoming, progress: Callable[[int], object] | None, uncompared: list[str]
) -> Iterator[Change]:
    in_a, in_b = _keyed(items(a)), _keyed(items(b))
    # Kinds whose list is not in one of the dumps.
    unlisted: set[str] = {
        item.kind for found in (in_a, in_b) for item in found.values() if item.absent and item.kind != "file"
    }
    if "sessions" in unlisted:
        uncompared.append("sessions")
        unlisted.add("file")
    else:
        yield from _session_changes(a, b)
    if "reserve_mem" in unlisted:
        uncompared.append("reserve_mem")
    allowances = (Allowance(a), Allowance(b))
    done = 0

    def told(nbytes: int) -> None:
        if progress:
            progress(done + nbytes)

    for key in [*in_a, *(key for key in in_b if key not in in_a)]:
        one, other = in_a.get(key), in_b.get(key)
        if key[0] in unlisted:
            continue
        if one is None:
            yield from (_lone(item, "added") for item in (other,) if item)
        elif other is None:
            yield _lone(one, "removed")
        elif one.absent or other.absent:
            uncompared.append(f"{one.kind} {one.name}")
        else:
            try:
                change = _compare(one, other, allowances, told)
            except errors.MissingMemoryError:
                change = _compare(replace(one, content=None), replace(other, content=None), allowances, told)
                uncompared.append(f"{one.kind} {one.name}")
            if change is not None:
                yield change
            done += one.content.data_bytes if one.content else 0


def _session_changes(a: Incoming, b: Incoming) -> Iterator[Change]:
    (sessions_a, flbs_a), (sessions_b, flbs_b) = _luo(a), _luo(b)
    both = set(sessions_a) & set(sessions_b)
    yield from (Change("session", name, "removed") for name in sessions_a if name not in both)
    yield from (Change("session", name, "added") for name in sessions_b if name not in both)
    if flbs_a != flbs_b:
        pairs = {name: (flbs_a.get(name), flbs_b.get(name)) for name in flbs_a | flbs_b}
        yield Change("sessions", "FLBs", "changed", {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})


def _lone(item: Item, side: Side) -> Change:
    facts = _facts(item).items()
    return Change(
        item.kind, item.name, side, {name: (v, None) if side == "removed" else (None, v) for name, v in facts}
    )


def _facts(item: Item) -> dict[str, Any]:
    """Return the properties of an item that are compared in addition to its contents."""
    named = {"phys": item.phys, "size": item.size, "error": item.error}
    return {name: value for name, value in named.items() if value is not None} | {
        name: value for name, value in item.facts.items() if name not in ("session", "token")
    }


def _compare(
    a: Item, b: Item, allowances: tuple[Allowance, Allowance], progress: Callable[[int], object]
) -> Change | None:
    facts_a, facts_b = _facts(a), _facts(b)
    names = [*facts_a, *(name for name in facts_b if name not in facts_a)]
    facts = {name: (facts_a.get(name), facts_b.get(name)) for name in names}
    facts = {name: pair for name, pair in facts.items() if pair[0] != pair[1]}
    content = None
    if a.content is not None and b.content is not None:
        try:
            content = _contents(a.content, b.content, allowances, progress)
        except errors.MissingMemoryError:
            raise
        except (errors.OutsideMemoryError, errors.FormatError) as error:
            unread = (_why(a.content, error), _why(b.content, error))
            if unread[0] != unread[1]:
                facts["unreadable"] = unread
    if not facts and content is None:
        return None
    return Change(a.kind, a.name, "changed", facts, content)


def _why(content: Content, error: errors.KhoError) -> str | None:
    """Return the reason why contents cannot be read; None if they can."""
    if isinstance(error, errors.FormatError):
        return str(error)
    try:
        for _ in content.windows():
            pass
    except errors.OutsideMemoryError as mine:
        return str(mine)
    return None


def _contents(
    a: Content, b: Content, allowances: tuple[Allowance, Allowance], progress: Callable[[int], object]
) -> ContentChange | None:
    """Compare the ranges that are data on at least one side.

    Only memfds have holes; holes read as zeros, so ranges that are holes on both sides are equal.
    """
    for content, allowance in zip((a, b), allowances, strict=True):
        allowance.take_data(content)
    shared = min(a.size, b.size)
    first: int | None = None
    differing = done = 0
    for start, end in _union(a, b, shared):
        for offset in range(start, end, WINDOW):
            n = min(WINDOW, end - offset)
            one, other = a.read(n, offset), b.read(n, offset)
            if one != other:
                mixed = (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(n, "little")
                differing += n - mixed.count(0)
                if first is None:
                    first = offset + n - len(mixed.lstrip(b"\0"))
            done += n
            progress(done)
    if first is None:
        if a.size == b.size:
            return None
        first = shared
    digests = (sha256_of(a, allowance=allowances[0]), sha256_of(b, allowance=allowances[1]))
    return ContentChange(first, differing, digests)


def _union(a: Content, b: Content, limit: int) -> Iterator[tuple[int, int]]:
    """Yield `(start, end)` of ranges in which A or B may have non-zero bytes, disjoint and below `limit`."""
    start = end = 0
    for offset, nbytes in merge(a.present(), b.present()):
        stop = min(offset + nbytes, limit)
        if offset > end:
            if start < end:
                yield start, end
            start, end = offset, stop
        else:
            end = max(end, stop)
    if start < end:
        yield start, end
