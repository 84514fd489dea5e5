"""What differs between two handovers: format, scratch, folios, subtrees, sessions, files, regions, and their contents.

>>> found = diff(kho.open("before.elf"), kho.open("after.elf"))
>>> bool(found), [change.name for change in found.files]
(True, ['vm-1/0x10'])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from heapq import merge
from itertools import islice
from typing import Any, Literal, NamedTuple

from .. import errors
from .._kho import Incoming, Tracker
from .extract import WINDOW, Allowance, Content, Item, items, sha256_of

__all__ = ["Change", "ContentChange", "Diff", "Extent", "FolioChange", "diff", "extents_of"]

Side = Literal["added", "removed", "changed"]
"""In B only, in A only, or in both and not the same."""


class Extent(NamedTuple):
    """Folios of one order that adjoin."""

    phys: int
    nbytes: int
    folios: int


@dataclass(frozen=True)
class FolioChange:
    """Folios of one order that only one of the two preserves."""

    order: int
    """In pages of `Diff.page_size`."""
    only_a: list[Extent]
    only_b: list[Extent]
    more_a: int = 0
    """Folios only A preserves that `only_a` does not list: in more places than an image of its size plausibly has."""
    more_b: int = 0


@dataclass(frozen=True)
class ContentChange:
    """Contents that are not the same."""

    offset: int
    """The first byte that differs; the length of the shorter one if it is the beginning of the other."""
    nbytes: int
    """Bytes that differ, of those both have."""
    sha256: tuple[str | None, str | None]
    """Of A and of B; None if there are too many zeros to be worth hashing."""


@dataclass(frozen=True)
class Change:
    """A subtree, region or file that one of the two lacks, or that is not the same in both."""

    kind: str
    name: str
    side: Side
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """What is known of it and differs, as (in A, in B): address, size, position, seals, compatible, error."""
    content: ContentChange | None = None
    """None where contents are the same, or not to be had on both sides."""


@dataclass(frozen=True)
class Diff:
    """Everything that differs; false if nothing does."""

    page_size: int
    """What orders of folios are in: the smaller of the two page sizes."""
    facts: dict[str, tuple[Any, Any]]
    """ABI, page and bitmap sizes, addresses of FDT and map, as (in A, in B)."""
    scratch: tuple[list[tuple[int, int]] | None, list[tuple[int, int]] | None] | None
    """The areas of A and of B if they differ; one is None if they are not known there."""
    folios: list[FolioChange]
    subtrees: list[Change]
    sessions: list[Change]
    """Sessions one of the two lacks, and whether LUO can be read."""
    files: list[Change]
    reserve_mem: list[Change]

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
        """Give it as data for JSON."""
        data = asdict(self)
        for change in data["folios"]:
            for side in ("more_a", "more_b"):
                if not change[side]:
                    del change[side]
        return {"different": bool(self), **data}


def diff(a: Incoming, b: Incoming, *, progress: Callable[[int], object] | None = None) -> Diff:
    """Compare two handovers; their contents are read in windows, holes are not.

    Args: progress: called with the bytes of contents compared so far.
    Raises: OrderError for folios beyond what can be compared across page sizes; SourceError.
    """
    page = min(a.page_size, b.page_size)
    names = ("compatible", "page_size", "bitmap_bytes", "fdt_phys", "preserved_memory_map")
    facts = {name: (getattr(a, name), getattr(b, name)) for name in names}
    scratch = (a.scratch, b.scratch)
    changes = list(_changes(a, b, progress))
    return Diff(
        page_size=page,
        facts={name: pair for name, pair in facts.items() if pair[0] != pair[1]},
        scratch=None if scratch[0] == scratch[1] else scratch,
        folios=_folios(a, b, page),
        subtrees=[change for change in changes if change.kind == "subtree"],
        sessions=[change for change in changes if change.kind in ("session", "sessions")],
        files=[change for change in changes if change.kind == "file"],
        reserve_mem=[change for change in changes if change.kind == "reserve_mem"],
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
    """Give what is preserved in pages of another size: as many orders more as they are smaller."""
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
    """Join neighbors of one order: order to extents by address."""
    return _extents_of(tracker, None)


def _extents_of(tracker: Tracker, most: int | None) -> dict[int, list[Extent]]:
    """As `extents_of`, of `most` extents in all."""
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
    """Key items by kind and name; of a name that stands twice, by the how-manieth it is."""
    keyed: dict[tuple[str, str, int], Item] = {}
    seen: dict[tuple[str, str], int] = {}
    for item in found:
        nth = seen[item.kind, item.name] = seen.get((item.kind, item.name), 0) + 1
        keyed[item.kind, item.name, nth] = item
    return keyed


def _luo(inc: Incoming) -> tuple[list[str], dict[str, list[int]]]:
    """Give the names of the sessions, and the FLBs; nothing without LUO, or with one that `items` reports."""
    try:
        luo = inc.luo
    except errors.KhoError:
        return [], {}
    return list(luo.sessions), {flb.name: [flb.data, flb.count] for flb in luo.flbs}


def _changes(a: Incoming, b: Incoming, progress: Callable[[int], object] | None) -> Iterator[Change]:
    (sessions_a, flbs_a), (sessions_b, flbs_b) = _luo(a), _luo(b)
    both = set(sessions_a) & set(sessions_b)
    yield from (Change("session", name, "removed") for name in sessions_a if name not in both)
    yield from (Change("session", name, "added") for name in sessions_b if name not in both)
    if flbs_a != flbs_b:
        pairs = {name: (flbs_a.get(name), flbs_b.get(name)) for name in flbs_a | flbs_b}
        yield Change("sessions", "FLBs", "changed", {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})
    in_a, in_b = _keyed(items(a)), _keyed(items(b))
    allowances = (Allowance(a), Allowance(b))
    done = 0

    def told(nbytes: int) -> None:
        if progress:
            progress(done + nbytes)

    for key in [*in_a, *(key for key in in_b if key not in in_a)]:
        one, other = in_a.get(key), in_b.get(key)
        if one is None:
            yield from (_lone(item, "added") for item in (other,) if item)
        elif other is None:
            yield _lone(one, "removed")
        else:
            change = _compare(one, other, allowances, told)
            if change is not None:
                yield change
            done += one.content.data_bytes if one.content else 0


def _lone(item: Item, side: Side) -> Change:
    facts = _facts(item).items()
    return Change(
        item.kind, item.name, side, {name: (v, None) if side == "removed" else (None, v) for name, v in facts}
    )


def _facts(item: Item) -> dict[str, Any]:
    """Give what of an item is compared besides its contents."""
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
        except (errors.OutsideMemoryError, errors.FormatError) as error:
            unread = (_why(a.content, error), _why(b.content, error))
            if unread[0] != unread[1]:
                facts["unreadable"] = unread
    if not facts and content is None:
        return None
    return Change(a.kind, a.name, "changed", facts, content)


def _why(content: Content, error: errors.KhoError) -> str | None:
    """Say what keeps contents from being read; None if nothing does."""
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
    """Compare what is data on either side; where both have holes there is nothing to read.

    Only memfds have holes, and these read as zeros.
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
    """Yield where either has something other than zeros, as (start, end), disjoint and below `limit`."""
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
