"""Conversion to another ABI or kernel: the same folios and contents under a new map, root FDT and LUO lists."""

from __future__ import annotations

import struct
from collections.abc import Collection
from itertools import islice, pairwise

from .. import _kho
from ..errors import FormatError, OutOfMemoryError, OutsideMemoryError, ParameterError, UnsupportedAbiError
from ..formats import subtree
from ..formats.kernel_write import aligned_blocks
from ..kernels import Kernel, known_kernel
from ..text import UNFINALIZED
from .absence import require_map
from .compat import Offer
from .convert_luo import DROPPABLE, Drop, Formats
from .convert_subtrees import Plan
from .elfcore import Image, Part, clipped, merged, whole_pages, without
from .outgoing import Outgoing

__all__ = ["Converted", "convert"]


class Converted(Image):
    """A converted handover: map, root FDT, scratch array and LUO lists in an arena, contents in the source."""

    def __init__(
        self, source: _kho.Incoming, out: Outgoing, machine: str, plan: Plan, fresh: list[tuple[int, int]]
    ) -> None:
        super().__init__(_kho.open_memory(out.arena, bitmap_bytes=out.bitmap_bytes), machine=machine)
        self.out = out
        """The converted handover; its arena does not contain the contents of folios."""
        self._source = source
        self._plan = plan
        self._fresh = fresh

    @property
    def losses(self) -> list[str]:
        """What was left out, as text: what `drop` allowed, and what a named kernel does not read."""
        return self._plan.losses

    @property
    def luo(self) -> str:
        """What became of LUO: "keep" as it is (or there is none), "write" in other formats, "drop"."""
        return self._plan.luo.action

    def offer(self) -> Offer:
        """Describe the converted handover for `kho.handover.compat.judge`."""
        offer = Offer.of(self._source)
        offer.abi, offer.bitmap_bytes, offer.levels = self.out.abi, self.out.bitmap_bytes, None
        offer.map, offer.orders = self._inc.preserved_memory_map, dict(self._inc.folios_by_order)
        self._plan.amend(offer)
        return offer

    def parts(self, *, everything: bool = False) -> list[Part]:
        """Return the memory that `save` writes. Raises: ParameterError if `everything` is set."""
        if everything:
            raise ParameterError(
                "a conversion contains only the handover: with all memory, the old map would be saved too"
            )
        inc, page = self._inc, self.page_size
        pages = [*inc.map_pages, inc.fdt_phys, *([] if inc.scratch_phys is None else [inc.scratch_phys])]
        own = merged([*((phys, page) for phys in pages), *self._fresh])
        runs = merged((part.phys, part.nbytes) for part in super().parts())
        parts = [Part(phys, nbytes, inc) for phys, nbytes in clipped(runs, own)]
        parts += [Part(phys, nbytes, self._source) for phys, nbytes in without(runs, own)]
        return sorted(parts, key=lambda part: part.phys)


def convert(
    inc: _kho.Incoming,
    abi: str | None = None,
    *,
    kernel: str | None = None,
    bitmap_bytes: int | None = None,
    drop: Collection[Drop] = (),
    keep_unknown: bool = False,
) -> Converted:
    """Convert a handover to another ABI or kernel; contents are copied only by `Converted.save`.

    Folios, orders, contents, the address of the root FDT, and all other subtrees are unchanged. LUO's lists and memfd
    headers are written in the formats of the target if it does not read them as they are: their old pages are then no
    longer preserved. For a kernel, root FDT and kho_test are written in its form, and kexec-metadata left out where it
    is not read.
    New map and lists go to unused pages of the source's memory and, since a core of a handover has
    few of these, of the gaps between its runs, the smallest gap first.

    Args:
        abi: the `compatible` to write, with the LUO and memfd versions that belong to it.
        kernel: in place of `abi`, the release to write it for ("7.0.3"): it decides ABI, bitmap size and LUO's formats.
        bitmap_bytes: for kho-v1, 512 or the page size; default: the source's if it is kho-v1, else the page size.
        drop: losses that are allowed, each only where the target cannot take the object: "seals" of memfds, "files" of
            a kind that kho does not know, "flbs", "luo" (all sessions).
        keep_unknown: keep files and FLBs of a kind that kho does not know as they are, as a driver may read them, and
            convert a handover of a version that is not known as what it was read as.

    Raises:
        ParameterError: the target cannot take LUO data; the message has the object and the remedy.
        UnsupportedAbiError: no such ABI, or no writer for its LUO version.
        OutsideMemoryError: preserved pages are missing.
        FormatError: malformed LUO data, or more runs of memory than an image of this size can hold.
        PageStateError: preserved memory is in scratch or on page 0, where no kernel preserves any.

    """
    if (abi is None) == (kernel is None):
        raise ParameterError("convert: either abi or kernel is needed")
    unknown = sorted(set(drop) - set(DROPPABLE))
    if unknown:
        raise ParameterError(f"convert: drop={unknown[0]!r}: must be one of {', '.join(DROPPABLE)}")
    if kernel is not None:
        target: Kernel | None = known_kernel(kernel)
        assert target is not None
        if bitmap_bytes is not None:
            raise ParameterError("convert: the kernel decides the bitmap size: leave bitmap_bytes out")
        abi, bitmap_bytes, formats = target.abi, target.bitmap_bytes(inc.page_size), Formats.of_kernel(target)
    else:
        target, row = None, _kho.abis().get(str(abi))
        if row is None:
            raise UnsupportedAbiError(f"ABI {abi!r}: known are {', '.join(_kho.abis())}")
        abi, formats = row.compatible, Formats.of_abi(row)
    if inc.unverified and not keep_unknown:
        raise ParameterError(
            f"root FDT at {inc.fdt_phys:#x}: {'; '.join(inc.unverified)}; --keep-unknown (keep_unknown=True) converts "
            "it as that"
        )
    if inc.pages_outside:
        raise OutsideMemoryError(f"{inc.pages_outside} preserved pages are not in this memory")
    _check_runs(inc)
    row = _kho.abis()[abi]
    if row.bitmaps and bitmap_bytes is None:
        bitmap_bytes = inc.bitmap_bytes
    if bitmap_bytes is not None:
        _kho.Tracker(inc.page_size, bitmap_bytes)  # refuses a size that no bitmap has
    plan = Plan(inc, formats, target, drop, keep_unknown=keep_unknown)
    page = inc.page_size
    nbytes, most = _map_bytes(inc.tracker(), row, bitmap_bytes), (16 << 20) + 2 * inc.room("held")
    if nbytes > most:
        raise FormatError(
            f"map at {inc.preserved_memory_map:#x}: as {abi} it would take {nbytes} bytes, but an image of this size "
            f"can plausibly have at most {most}"
        )
    known = merged([*(whole_pages(start, size, page) for start, size in inc.ranges), *(inc.scratch or [])])
    spare = 0
    while True:
        gaps = _gaps(known, spare * page)
        try:
            out, fresh = _write(inc, merged(known + gaps), abi, bitmap_bytes, plan, target)
        except OutOfMemoryError as error:
            if sum(size for _, size in gaps) < spare * page:
                raise OutOfMemoryError(
                    f"no room for the new map and lists between the runs of this memory, or after them: {error}"
                ) from error
            spare = max(16, spare * 4)
        else:
            return Converted(inc, out, Image(inc).machine, plan, fresh)


def _check_runs(inc: _kho.Incoming) -> None:
    """Check that there is a map, and no more runs of preserved memory than an image of this size can plausibly hold.

    Raises: FormatError; LeftOutError or CutOffError if the map is not in the dump.
    """
    require_map(inc, "there is nothing to convert")
    if not inc.finalized:
        raise FormatError(f"root FDT at {inc.fdt_phys:#x}: {UNFINALIZED}; there is nothing to convert")
    most = inc.room("items")
    runs = inc.tracker().extents()
    pieces = (block for pfn, n in runs for block in aligned_blocks(pfn, pfn + n))
    if len(runs) > most or sum(1 for _ in islice(pieces, 2 * most + 1)) > 2 * most:
        raise FormatError(
            f"map at {inc.preserved_memory_map:#x}: preserved memory in more than {most} runs, which an image of "
            "this size cannot plausibly hold"
        )


def _map_bytes(tracker: _kho.Tracker, abi: _kho.Abi, bitmap_bytes: int | None) -> int:
    """Return the bytes that the bitmaps or tree of the new map will take: distant folios share no nodes."""
    page = tracker.page_size
    shift = page.bit_length() - 1
    if abi.bitmaps:
        # Bits of the folio's index within a bitmap.
        levels, size = [(8 * (bitmap_bytes or page)).bit_length() - 1], bitmap_bytes or page
    else:
        levels, size = [shift + 3 + n * (shift - 3) for n in range(abi.levels[page])], page
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


def _write(
    inc: _kho.Incoming,
    regions: list[tuple[int, int]],
    abi: str,
    bitmap_bytes: int | None,
    plan: Plan,
    kernel: Kernel | None,
) -> tuple[Outgoing, list[tuple[int, int]]]:
    """Write map, root FDT and subtrees into an arena in which preserved memory is allocated.

    Subtrees are added in the order in which the source's kernel added them, so that their nodes are in the order in
    which the target's kernel would have them.

    Returns: the handover, and `(phys, nbytes)` of the preserved memory that was written.
    """
    page = inc.page_size
    arena = _kho.Arena(regions, page_size=page, scratch=inc.scratch)
    kept = inc.tracker()
    if plan.gone:
        kept = _unpreserved(kept, plan.gone)
    own_page = (inc.fdt_phys // page, 0) in kept
    taken = [(pfn * page, n * page) for pfn, n in kept.extents()]
    linked = {name: sub for name, sub in inc.subtrees.items() if name not in plan.written | plan.dropped}
    # A blob may be unpreserved; the map must not overwrite it in any case.
    taken += clipped(merged((sub.phys // page * page, page) for sub in linked.values()), regions)
    for start, size in merged(taken):
        end = start + size
        if own_page and start <= inc.fdt_phys < end:
            _take(arena, start, inc.fdt_phys)
            start = inc.fdt_phys + page
        _take(arena, start, end)
    out = Outgoing(
        arena,
        abi,
        kernel=None if kernel is None else kernel.name,
        bitmap_bytes=bitmap_bytes,
        fdt_phys=inc.fdt_phys if own_page else None,
    )
    out.preserve_all(kept)
    subtrees = list(inc.subtrees)
    for name in reversed(subtrees) if _newest_first(inc) else subtrees:
        if name in linked:
            out.link_subtree(name, linked[name].phys, _size(inc, name, kept))
        elif name in plan.written:
            plan.write(name, out)
    out.finalize()
    return out, [(pfn * page, n * page) for pfn, n in (out.tracker() - kept).extents()]


def _newest_first(inc: _kho.Incoming) -> bool:
    """Say whether the root FDT was edited, with a new subtree before the others, or written in one pass.

    libfdt's sequential writer puts each new property name before the earlier ones, its editor after them: in one pass
    the strings are `fdt preserved-memory-map compatible`, edited `preserved-memory-map compatible fdt`.
    """
    if inc.abi.subtree_order == "prepend":
        return True
    head = struct.unpack(">10I", inc.read(inc.fdt_phys, 40))
    return not inc.read(inc.fdt_phys + head[3], min(head[8], 4)).startswith(b"fdt\0")


def _unpreserved(kept: _kho.Tracker, gone: list[tuple[int, int]]) -> _kho.Tracker:
    """Unpreserve every folio that lies entirely in one of these ranges; bitmaps that become empty are left out."""
    page = kept.page_size
    for order in kept.stats():
        nbytes = page << order
        for start, size in clipped([(pfn * page, n * nbytes) for pfn, n in kept.runs(order)], gone):
            first, end = -(-start // nbytes), (start + size) // nbytes
            if end > first:
                kept.unpreserve_run(first << order, order, end - first)
    return kept | _kho.Tracker(page, kept.bitmap_bytes)


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
