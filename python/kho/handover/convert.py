"""Conversion to another ABI: the same folios, contents and subtrees under a new map and root FDT."""

from __future__ import annotations

import struct
from itertools import islice, pairwise

from .. import _kho
from ..errors import FormatError, OutOfMemoryError, OutsideMemoryError, ParameterError
from ..formats import subtree
from ..formats.kernel_write import aligned_blocks
from .elfcore import Image, Part, clipped, merged
from .outgoing import Outgoing

__all__ = ["Converted", "convert"]


class Converted(Image):
    """A converted handover: map, root FDT and scratch array in an arena, contents in the source."""

    def __init__(self, source: _kho.Incoming, out: Outgoing, machine: str) -> None:
        super().__init__(_kho.open_memory(out.arena, bitmap_bytes=out.bitmap_bytes), machine=machine)
        self.out = out
        """The converted handover; its arena does not contain the contents of folios."""
        self._source = source

    def parts(self, *, everything: bool = False) -> list[Part]:
        """Return the memory that `save` writes. Raises: ParameterError if `everything` is set."""
        if everything:
            raise ParameterError(
                "a conversion contains only the handover: with all memory, the old map would be saved too"
            )
        inc = self._inc
        own = [*inc.map_pages, inc.fdt_phys, *([] if inc.scratch_phys is None else [inc.scratch_phys])]
        runs = [(part.phys, part.nbytes) for part in super().parts()]
        parts = []
        inside = sorted(own)
        at = 0
        for start, size in merged(runs):
            end = start + size
            while at < len(inside) and inside[at] < end:
                if inside[at] > start:
                    parts.append(Part(start, inside[at] - start, self._source))
                parts.append(Part(inside[at], self.page_size, inc))
                start = inside[at] + self.page_size
                at += 1
            if start < end:
                parts.append(Part(start, end - start, self._source))
        return parts


def convert(inc: _kho.Incoming, abi: str, *, bitmap_bytes: int | None = None) -> Converted:
    """Convert a handover to another ABI; contents are copied only by `Converted.save`.

    Folios, orders, contents, subtrees and the address of the root FDT are unchanged. The new map goes to unused pages
    of the source's memory and, since a core of a handover has few of these, of the gaps between its runs, the smallest
    gap first. Blobs of subtrees are not converted.

    Args: abi: the `compatible` to write. bitmap_bytes: for kho-v1, 512 or the page size; default: the source's if it is
        kho-v1, else the page size.
    Raises: UnsupportedAbiError; OutsideMemoryError if preserved pages are missing; FormatError for more runs of memory
        than an image of this size can hold; PageStateError for preserved memory in scratch or on page 0, where no
        kernel preserves any; ParameterError.
    """
    if inc.pages_outside:
        raise OutsideMemoryError(f"{inc.pages_outside} preserved pages are not in this memory")
    _check_runs(inc)
    row = _kho.abis().get(abi)
    if row is not None and row.bitmaps and bitmap_bytes is None:
        bitmap_bytes = inc.bitmap_bytes
    page = inc.page_size
    nbytes, most = _map_bytes(inc.tracker(), row, bitmap_bytes), (16 << 20) + 2 * inc.room("held")
    if nbytes > most:
        raise FormatError(
            f"map at {inc.preserved_memory_map:#x}: as {abi} it would take {nbytes} bytes, but an image of this size "
            f"can plausibly have at most {most}"
        )
    known = merged([*(_pages(start, size, page) for start, size in inc.ranges), *(inc.scratch or [])])
    spare = 0
    while True:
        gaps = _gaps(known, spare * page)
        try:
            out = _write(inc, merged(known + gaps), abi, bitmap_bytes)
        except OutOfMemoryError:
            if sum(size for _, size in gaps) < spare * page:
                raise
            spare = max(16, spare * 4)
        else:
            return Converted(inc, out, Image(inc).machine)


def _check_runs(inc: _kho.Incoming) -> None:
    """Check that preserved memory has no more runs than an image of this size can plausibly hold.

    Raises: FormatError.
    """
    most = inc.room("items")
    runs = inc.tracker().extents()
    pieces = (block for pfn, n in runs for block in aligned_blocks(pfn, pfn + n))
    if len(runs) > most or sum(1 for _ in islice(pieces, 2 * most + 1)) > 2 * most:
        raise FormatError(
            f"map at {inc.preserved_memory_map:#x}: preserved memory in more than {most} runs, which an image of "
            "this size cannot plausibly hold"
        )


def _map_bytes(tracker: _kho.Tracker, abi: _kho.Abi | None, bitmap_bytes: int | None) -> int:
    """Return the bytes that the bitmaps or tree of the new map will take: distant folios share no nodes."""
    page = tracker.page_size
    shift = page.bit_length() - 1
    if abi is not None and abi.bitmaps:
        # Bits of the folio's index within a bitmap.
        levels, size = [(8 * (bitmap_bytes or page)).bit_length() - 1], bitmap_bytes or page
    else:
        levels, size = [shift + 3 + n * (shift - 3) for n in range(abi.levels[page] if abi else 1)], page
    nodes = 0
    for order, row in tracker.stats().items():
        if not row["folios"]:
            continue
        counted = [-1] * len(levels)
        for pfn, n in tracker.runs(order):
            first, last = pfn >> order, (pfn >> order) + n - 1
            for i, bits in enumerate(levels):
                end = last >> bits
                nodes += max(end - max(first >> bits, counted[i] + 1) + 1, 0)
                counted[i] = max(counted[i], end)
    return nodes * size


def _gaps(known: list[tuple[int, int]], nbytes: int) -> list[tuple[int, int]]:
    """Choose memory for the map outside the source: the smallest gaps between its runs, then the range after them."""
    gaps = [(sum(a), b[0] - sum(a)) for a, b in pairwise(known)]
    out = []
    for start, size in [*sorted(gaps, key=lambda gap: gap[1]), (sum(known[-1]), (1 << 52) - sum(known[-1]))]:
        take = min(size, nbytes)
        if take > 0:
            out.append((start, take))
            nbytes -= take
    return out


def _write(inc: _kho.Incoming, regions: list[tuple[int, int]], abi: str, bitmap_bytes: int | None) -> Outgoing:
    """Write map and root FDT into an arena in which preserved memory is allocated."""
    page = inc.page_size
    arena = _kho.Arena(regions, page_size=page, scratch=inc.scratch)
    kept = inc.tracker()
    own_page = (inc.fdt_phys // page, 0) in kept
    taken = [(pfn * page, n * page) for pfn, n in kept.extents()]
    # A blob may be unpreserved; the map must not overwrite it in any case.
    taken += clipped(merged((sub.phys // page * page, page) for sub in inc.subtrees.values()), regions)
    for start, size in merged(taken):
        end = start + size
        if own_page and start <= inc.fdt_phys < end:
            _take(arena, start, inc.fdt_phys)
            start = inc.fdt_phys + page
        _take(arena, start, end)
    out = Outgoing(arena, abi, bitmap_bytes=bitmap_bytes, fdt_phys=inc.fdt_phys if own_page else None)
    out.preserve_all(kept)
    subtrees = list(inc.subtrees.values())
    for sub in subtrees if _kho.abis()[abi].subtree_order == "append" else reversed(subtrees):
        out.link_subtree(sub.name, sub.phys, _size(inc, sub.name, kept))
    out.finalize()
    return out


def _pages(start: int, size: int, page: int) -> tuple[int, int]:
    """Expand a run to whole pages."""
    first = start // page * page
    return first, -(-(start + size) // page) * page - first


def _take(arena: _kho.Arena, start: int, end: int) -> None:
    """Allocate a range of pages, so that the map is not placed there."""
    page = arena.page_size
    for pfn, order in aligned_blocks(start // page, end // page):
        arena.alloc_at(pfn * page, order)


def _size(inc: _kho.Incoming, name: str, kept: _kho.Tracker) -> int:
    """Return a blob's size: as recorded, else as its decoder reads, else up to the end of its folio."""
    sub = inc.retrieve_subtree(name)
    if sub.size is not None:
        return sub.size
    layout = getattr(subtree(inc, name), "LAYOUT", None)
    if isinstance(layout, struct.Struct):
        return layout.size
    pfn = sub.phys // inc.page_size
    orders = [order for order in inc.folios_by_order if (pfn >> order << order, order) in kept]
    pages = 1 << max(orders, default=0)
    return (pfn // pages + 1) * pages * inc.page_size - sub.phys
