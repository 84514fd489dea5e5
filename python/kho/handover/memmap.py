"""Lays out a handover by address: rows of cells with the kinds and owners of preserved memory.

    spans (by owner) -> boundaries -> rows that contain boundaries, with cells -> text, or a picture (`mapdraw`)

Rows without a boundary of a span are merged into gaps, so a map of 16 TiB is as short as one of 16 MiB.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from typing import Any

from .. import errors
from .._kho import Incoming, Memfd, Vmalloc
from .._types import OwnedRange
from ..formats import Owned
from .owners import unlisted

__all__ = ["KINDS", "Cell", "Gap", "MemoryMap", "Row", "Span", "build", "lay_out", "spans_of", "spans_shown"]

KINDS = {
    "file": "file data",
    "region": "reserve_mem",
    "payload": "other payload",
    "metadata": "FDTs and lists",
    "unclaimed": "preserved, no known owner",
    "scratch": "scratch",
}
"""Kinds of memory and their descriptions."""
TOP = 1 << 64
MOST_ROWS = 2048
"""Maximum rows of a map; each has up to `columns` cells."""
Interval = tuple[int, int]
"""`(start, end)`, end exclusive."""


@dataclass(frozen=True)
class Span:
    """Memory of one owner: `intervals` are sorted, disjoint and not adjacent."""

    kind: str
    """A key of `KINDS`."""
    owner: str
    intervals: list[Interval]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(end - start for start, end in self.intervals)


@dataclass(frozen=True)
class Cell:
    """Part of a row: number of bytes by kind."""

    bytes_of: dict[str, int]
    ram: bool
    """Whether any of it is in this memory; True if unknown."""

    @property
    def kind(self) -> str | None:
        """The kind with the most bytes; None if the cell is empty."""
        return max(self.bytes_of, key=lambda kind: self.bytes_of[kind]) if self.bytes_of else None

    def density(self, nbytes: int) -> float:
        """Return the filled fraction of the cell, 0 to 1; `nbytes` is the size of the cell."""
        return min(sum(self.bytes_of.values()) / nbytes, 1.0)


@dataclass(frozen=True)
class Row:
    """`nbytes` from `phys`, in cells of equal size."""

    phys: int
    nbytes: int
    cells: list[Cell]
    owners: list[tuple[str, int]]
    """Owners with memory in this row and their bytes, the largest first."""


@dataclass(frozen=True)
class Gap:
    """`nbytes` from `phys` without a boundary of a span."""

    phys: int
    nbytes: int
    kind: str | None
    """Kind of all of it; None if nothing is preserved."""
    owner: str
    ram: int | None
    """Number of bytes that are in this memory; None if unknown."""


@dataclass(frozen=True)
class MemoryMap:
    """Rows sorted by address, with the gaps between them."""

    page_size: int
    row_bytes: int
    cell_bytes: int
    lines: list[Row | Gap] = field(repr=False)
    spans: list[Span] = field(repr=False)

    def _repr_html_(self) -> str:
        # By name, as the module that draws maps imports this one.
        picture: str = import_module(".mapdraw", __package__).to_svg(self)
        return picture.partition("?>\n")[2]

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by kind, in the order of `KINDS`, without kinds that do not occur."""
        found = {kind: sum(span.nbytes for span in self.spans if span.kind == kind) for kind in KINDS}
        return {kind: nbytes for kind, nbytes in found.items() if nbytes}

    def as_dict(self) -> dict[str, Any]:
        """Return the map as a dict for JSON: owners with their intervals, and the totals."""
        spans = [{"kind": span.kind, "owner": span.owner, "intervals": span.intervals} for span in self.spans]
        return {"page_size": self.page_size, "totals": self.totals, "spans": spans}


# Intervals


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Sort intervals and merge overlapping or adjacent ones."""
    found: list[Interval] = []
    start = end = -1
    for first, last in sorted(intervals):
        if first > end:
            if start < end:
                found.append((start, end))
            start, end = first, last
        elif last > end:
            end = last
    if start < end:
        found.append((start, end))
    return found


def without(intervals: Iterable[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Return `intervals` minus `others`; both sorted and disjoint, as returned by `merged`."""
    return list(_without(intervals, others))


def _without(intervals: Iterable[Interval], others: Sequence[Interval]) -> Iterator[Interval]:
    at = 0
    for start, end in intervals:
        while at < len(others) and others[at][1] <= start:
            at += 1
        i = at
        while i < len(others) and others[i][0] < end:
            if others[i][0] > start:
                yield start, others[i][0]
            start = max(start, others[i][1])
            i += 1
        if start < end:
            yield start, end


# Owners


def spans_of(inc: Incoming) -> list[Span]:
    """Return the memory of a handover by owner, sorted by first address.

    Covers memory that payloads refer to, the root FDT, the blobs of subtrees (with the complete folio that they begin),
    scratch, and preserved memory that nothing refers to. Payloads that cannot be decoded refer to nothing.
    """
    page = inc.page_size
    room = left = inc.room("items")
    found: dict[tuple[str, str], list[Interval]] = defaultdict(list)

    def add(kind: str, owner: str, phys: int, nbytes: int) -> None:
        if phys < TOP and nbytes > 0:
            found[kind, owner].append((phys - phys % page, min(-(-(phys + nbytes) // page) * page, TOP)))

    add("metadata", "root FDT", inc.fdt_phys, page)
    for name, blob in inc.subtrees.items():
        order = inc.order_at(blob.phys // page * page)
        add("metadata", f"subtree {name}", blob.phys, max(blob.size or page, 0 if order is None else page << order))
    payloads = inc.payloads
    for payload in [*payloads.values(), *unlisted(inc, payloads)]:
        try:
            for owned in payload.owned():
                for phys, nbytes in islice(_memory(owned, page, room), max(left, 0)):
                    left -= 1
                    add(_kind(owned), owned.owner, phys, nbytes)
        except errors.KhoError:
            continue  # its memory is shown as unclaimed
    for i, (phys, nbytes) in enumerate(inc.scratch or []):
        add("scratch", f"scratch, {area_name(i)}", phys, nbytes)
    _count_once(found, page)
    spans = [Span(kind, owner, merged(intervals)) for (kind, owner), intervals in found.items()]

    claimed = merged(interval for span in spans if span.kind != "scratch" for interval in span.intervals)
    preserved = ((pfn * page, (pfn + pages) * page) for pfn, pages in inc.tracker().extents())
    rest = list(islice(_without(preserved, claimed), room))
    if rest:
        spans.append(Span("unclaimed", "unknown", rest))
    return sorted((span for span in spans if span.intervals), key=lambda span: span.intervals[0])


def _count_once(found: dict[tuple[str, str], list[Interval]], page: int) -> None:
    """Remove from each interval of more than a page the parts that an earlier one, by address, contains.

    Structures may share a page, but no kernel hands over a larger range twice. Without this, a malformed image that
    lists one range for many owners would be drawn many times over.
    """
    reach = 0
    kept: dict[tuple[str, str], list[Interval]] = {owner: [] for owner in found}
    every = [(start, end, owner) for owner, some in found.items() if owner[0] != "scratch" for start, end in some]
    every.sort(key=lambda interval: interval[:2])
    for start, end, owner in every:
        first = start if end - start <= page else max(start, min(reach, end))
        if first < end:
            kept[owner].append((first, end))
        reach = max(reach, end)
    found.update((owner, some) for owner, some in kept.items() if owner[0] != "scratch")


def _memory(owned: Owned, page: int, room: int) -> Iterator[tuple[int, int]]:
    """Yield the memory of an `Owned` as `(phys, nbytes)`."""
    memory = owned.memory
    if isinstance(memory, Vmalloc):
        yield from ((chunk, page) for chunk in memory.chunks)
        yield from ((block, page << memory.order) for block in memory.blocks)
    elif isinstance(memory, Memfd):
        yield from memory.memory_runs(room)
    else:
        yield memory


def _kind(owned: Owned) -> str:
    if isinstance(owned.memory, Memfd):
        return "file"
    if owned.what == "region":
        return "region"
    return "payload" if owned.what in ("folio", "area") else "metadata"


# Rows and cells


def build(
    inc: Incoming,
    ranges: Sequence[tuple[int, int]] | None = None,
    *,
    columns: int = 64,
    rows: int = 32,
    row_bytes: int | None = None,
) -> MemoryMap:
    """Lay out a handover by address.

    Args:
        ranges: `(phys, size)` of the memory (`Memory.ranges`); None if unknown.
        columns: cells per row, a power of two.
        rows: maximum number of rows with a boundary; a row has the smallest size for which they suffice.
        row_bytes: bytes per row, a power of two and at least a page per cell; overrides `rows`.

    Raises: ParameterError.

    """
    return lay_out(spans_of(inc), inc.page_size, ranges, columns=columns, rows=rows, row_bytes=row_bytes)


def lay_out(
    spans: list[Span],
    page_size: int,
    ranges: Sequence[tuple[int, int]] | None = None,
    *,
    columns: int = 64,
    rows: int = 32,
    row_bytes: int | None = None,
) -> MemoryMap:
    """Lay out spans by address; arguments as in `build`. Raises: ParameterError."""
    smallest = columns * page_size
    for what, value, least in (("columns", columns, 1), ("row_bytes", row_bytes or smallest, smallest)):
        if value < least or value & (value - 1):
            raise errors.ParameterError(f"{what} {value}: must be a power of two of at least {least}")
    size = row_bytes or smallest
    indices = sorted({edge // size for span in spans for start, end in span.intervals for edge in (start, end - 1)})
    while row_bytes is None and len(indices) > max(rows, 1) and size < TOP:
        size *= 2
        indices = sorted({index >> 1 for index in indices})
    if len(indices) > MOST_ROWS:
        raise errors.ParameterError(f"row_bytes {row_bytes}: {len(indices)} rows exceed the maximum, {MOST_ROWS}")
    ram = None if ranges is None else merged((phys, phys + nbytes) for phys, nbytes in ranges)
    drawn = _rows(spans, ram, indices, size, size // columns)
    return MemoryMap(page_size, size, size // columns, _with_gaps(drawn, spans, ram, size), spans)


def spans_shown(rows: Iterable[OwnedRange], scratch: Sequence[tuple[int, int]] | None, page_size: int) -> list[Span]:
    """Return the memory that is known without an image: ranges with owners (`kho.handover.running`), and scratch."""

    def paged(phys: int, nbytes: int) -> list[Interval]:
        return [(phys - phys % page_size, min(-(-(phys + nbytes) // page_size) * page_size, TOP))]

    areas = [(f"scratch, {area_name(i)}", area) for i, area in enumerate(scratch or ())]
    spans = [
        *(
            Span("region" if r.what == "region" else "metadata", r.owner, paged(r.phys, r.nbytes))
            for r in rows
            if r.nbytes
        ),
        *(Span("scratch", name, paged(*area)) for name, area in areas if area[1]),
    ]
    return sorted((span for span in spans if span.nbytes > 0), key=lambda span: span.intervals[0])


def area_name(index: int) -> str:
    """Name a scratch area by its place in the array."""
    return ("low memory", "global")[index] if index < 2 else f"node {index - 2}"


def _rows(
    spans: list[Span], ram: list[Interval] | None, indices: list[int], row_bytes: int, cell_bytes: int
) -> list[Row]:
    """Count the bytes of each kind in each cell of the rows at `indices`."""
    columns = row_bytes // cell_bytes
    cells: dict[int, dict[str, int]] = defaultdict(dict)
    owners: dict[int, dict[str, int]] = {index: {} for index in indices}
    for span in spans:
        counts: dict[int, int] = defaultdict(int)
        for start, end in span.intervals:
            first = start // cell_bytes
            if (end - 1) // cell_bytes == first:
                counts[first] += end - start
            else:
                for index in indices[
                    bisect_left(indices, start // row_bytes) : bisect_right(indices, (end - 1) // row_bytes)
                ]:
                    for cell in range(
                        max(first, index * columns), min((end - 1) // cell_bytes + 1, (index + 1) * columns)
                    ):
                        counts[cell] += min(end, (cell + 1) * cell_bytes) - max(start, cell * cell_bytes)
        for cell, nbytes in counts.items():
            cells[cell][span.kind] = cells[cell].get(span.kind, 0) + nbytes
            row = owners[cell // columns]
            row[span.owner] = row.get(span.owner, 0) + nbytes
    return [
        Row(
            index * row_bytes,
            row_bytes,
            [
                Cell(cells.get(cell, {}), _within(ram, cell * cell_bytes, (cell + 1) * cell_bytes) != 0)
                for cell in range(index * columns, (index + 1) * columns)
            ],
            sorted(owners[index].items(), key=lambda owner: -owner[1]),
        )
        for index in indices
    ]


def _within(ram: list[Interval] | None, start: int, end: int) -> int | None:
    """Count the bytes from `start` to `end` that are in this memory; None if unknown."""
    if ram is None:
        return None
    nbytes = 0
    for i in range(max(bisect_right(ram, (start, TOP)) - 1, 0), len(ram)):
        if ram[i][0] >= end:
            break
        nbytes += max(min(ram[i][1], end) - max(ram[i][0], start), 0)
    return nbytes


def _with_gaps(rows: list[Row], spans: list[Span], ram: list[Interval] | None, row_bytes: int) -> list[Row | Gap]:
    """Insert the gaps between rows: memory of a single owner, or nothing preserved."""
    lines: list[Row | Gap] = []
    end = 0
    for row in rows:
        if row.phys > end:
            kind, owner = next(((span.kind, span.owner) for span in spans if _covers(span, end)), (None, ""))
            lines.append(Gap(end, row.phys - end, kind, owner, _within(ram, end, row.phys)))
        end = row.phys + row_bytes
        last = lines[-1] if lines else None
        if isinstance(last, Gap) and last.kind and row.owners == [(last.owner, row_bytes)]:
            lines[-1] = Gap(last.phys, last.nbytes + row_bytes, last.kind, last.owner, _within(ram, last.phys, end))
        else:
            lines.append(row)
    last_ram = ram[-1][1] if ram else 0
    if last_ram > end:
        lines.append(Gap(end, last_ram - end, None, "", _within(ram, end, last_ram)))
    return lines


def _covers(span: Span, phys: int) -> bool:
    at = bisect_right(span.intervals, (phys, TOP)) - 1
    return at >= 0 and span.intervals[at][1] > phys
