"""Writers of payloads in the kernel's formats: vmalloc areas, memfds, memblock, kexec-metadata, kho_test.

These functions lay out bytes and preserve pages; `kho.Outgoing` calls them and keeps the `Holding` to undo it. The
layouts are those of abi.md section 6; pages are allocated and preserved in the same order as in the kernel.
"""

from __future__ import annotations

import struct
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from .. import _kho
from .._types import MemfdFolio
from ..errors import KhoError, MisalignedError, ParameterError, StaleError
from .features import MEMFD_BITS, Features
from .kernel import KhoTest, Metadata
from .registry import writer

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Blocks",
    "Holding",
    "aligned_blocks",
    "blocks_of",
    "csum",
    "kho_test_fdt",
    "memblock_fdt",
    "memfd",
    "metadata",
    "vmalloc",
]

VM_ALLOC = 1
"""`kho_vmalloc.flags`: ordinary pages (KHO_VMALLOC_ALLOC)."""
VM_HUGE = 2
"""`kho_vmalloc.flags`: huge mappings (KHO_VMALLOC_HUGE_VMAP)."""
DIRTY_UPTODATE = 3
"""Flags of a memfd folio: dirty and up to date."""
VMALLOC = struct.Struct("<QIHH")
"""`struct kho_vmalloc { u64 first; u32 total_pages; u16 flags; u16 order; }`"""
FLAGS_SHIFT = 52
"""A memfd folio's first word: `u64 pfn:52, flags:12`."""
NULL_VMALLOC = bytes(VMALLOC.size)

Blocks = list[int]
"""Physical addresses of the blocks of a vmalloc area, in the order of the area."""


class MemfdLayout(NamedTuple):
    """A version of `struct memfd_luo_ser`: pos, size, (seals, flags,) nr_folios, folios."""

    compatible: str
    layout: struct.Struct
    has_seals: bool
    draft: bool = False
    header: bytes = b""
    """What stands before the first field."""


V2 = struct.Struct("<QQIIQ16s")
MEMFD_V1 = writer(MemfdLayout("memfd-v1", struct.Struct("<QQQ16s"), has_seals=False))
MEMFD_V2 = writer(MemfdLayout("memfd-v2", V2, has_seals=True))
MEMFD_V2_PARTS = writer(MemfdLayout("memfd-v2;vmalloc-v1", V2, has_seals=True, draft=True))
MEMFD_FEATURES = writer(MemfdLayout("memfd", V2, has_seals=True, draft=True, header=Features.all_of(MEMFD_BITS).pack()))


class Holding:
    """The memory that one payload has preserved, released as a unit.

    As a context manager it releases the memory if the block raises. It has only a weak reference to its handover.
    """

    def __init__(self, out: _kho.Outgoing, places: deque[int] | None = None) -> None:
        self._out = weakref.ref(out)
        self.arena = out.arena
        self.page_size = out.arena.page_size
        self._places = places
        self._preserved: list[tuple[int, int]] = []
        self._allocated: list[int] = []

    def page(self, order: int = 0, *, zero: bool = True) -> _kho.Folio:
        """Allocate and preserve a folio of 2^`order` pages (kho_alloc_preserve); `zero`: clear it.

        Raises: OutOfMemoryError; PageStateError if a given address is in use.
        """
        place = self._places.popleft() if self._places else None
        folio = self.arena.alloc(order) if place is None else self.arena.alloc_at(place, order)
        self._allocated.append(folio.phys)
        if zero:
            memoryview(folio)[:] = bytes(folio.nbytes)
        self.keep(folio.phys, 1 << order)
        return folio

    def array(self, nr_pages: int) -> int:
        """Allocate, clear and preserve contiguous pages for an array, and return their address.

        They are one folio if `nr_pages` is a power of two and no other place was given. Only a given place may be a
        page that no folio of this size begins at.

        Raises: as `page`.
        """
        order = (nr_pages - 1).bit_length()
        place = self._places[0] if self._places else 0
        if nr_pages == 1 << order and place % (self.page_size << order) == 0:
            return self.page(order).phys
        if self._places:
            self._places.popleft()
        else:
            found = self.arena.alloc(order)  # finds room; the array takes the pages that it needs
            place = found.phys
            found.free()
        self.range(place, nr_pages)
        return place

    def range(self, start: int, nr_pages: int) -> None:
        """Allocate, clear and preserve `nr_pages` pages at `start`. Raises: PageStateError."""
        pfn = start // self.page_size
        for head, order in aligned_blocks(pfn, pfn + nr_pages):
            folio = self.arena.alloc_at(head * self.page_size, order)
            self._allocated.append(folio.phys)
            memoryview(folio)[:] = bytes(folio.nbytes)
        self.keep(start, nr_pages)

    def keep(self, phys: int, nr_pages: int) -> None:
        """Preserve allocated pages. Raises: as `Outgoing.preserve_pages`."""
        if self._owner().preserve_pages(phys, nr_pages):
            self._preserved.append((phys, nr_pages))

    def put(self, data: bytes) -> int:
        """Copy bytes into a new preserved folio of their size, and return its address. Raises: OutOfMemoryError."""
        pages = max(-(-len(data) // self.page_size), 1)
        folio = self.page((pages - 1).bit_length())
        memoryview(folio)[: len(data)] = data
        return folio.phys

    def area(self, data: bytes) -> bytes:
        """Copy bytes into a new preserved vmalloc area, and return its struct kho_vmalloc. Raises: OutOfMemoryError."""
        blocks, order, _ = blocks_of(self, data)
        return vmalloc(self, blocks, order)

    def _owner(self) -> _kho.Outgoing:
        out = self._out()
        if out is None:
            raise StaleError("the handover no longer exists")
        return out

    def release(self, out: _kho.Outgoing | None = None) -> None:
        """Unpreserve all pages and free those it allocated; a second call does nothing.

        Args: out: the handover, if it is being finalized by the garbage collector.
        Raises: FinalizedError.
        """
        out = self._owner() if out is None else out
        while self._preserved:
            out.unpreserve_pages(*self._preserved[-1])
            self._preserved.pop()
        while self._allocated:
            self.arena.free(self._allocated.pop())

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release everything after an exception."""
        if kind is not None:
            self.release()


def aligned_blocks(pfn: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield `(pfn, order)` of the largest naturally aligned blocks in a range of pages, greedily as in the kernel."""
    while pfn < end:
        order = (end - pfn).bit_length() - 1
        if pfn:
            order = min(order, (pfn & -pfn).bit_length() - 1)
        yield pfn, order
        pfn += 1 << order


def blocks_of(hold: Holding, data: Buffer | Iterable[_kho.Folio | int], order: int = 0) -> tuple[Blocks, int, int]:
    """Copy bytes into new folios of one order, or use given folios; preserve all of them.

    Args: data: bytes, or allocated folios of one order. order: of the new folios; ignored for given folios.
    Returns: the blocks, their order, and the number of bytes.
    Raises: ParameterError for folios of several orders; OutOfMemoryError; PageStateError.
    """
    view = _view(data)
    if view is not None:
        return [folio.phys for folio in _copy_into_folios(hold, view, order)], order, view.nbytes
    blocks: Blocks = []
    orders = set()
    for given in _folios(data):
        folio = hold.arena.folio(given) if isinstance(given, int) else given
        hold.keep(folio.phys, folio.nr_pages)
        blocks.append(folio.phys)
        orders.add(folio.order)
    if len(orders) > 1:
        raise ParameterError(f"vmalloc: folios of orders {sorted(orders)}; all blocks of an area have the same order")
    order = orders.pop() if orders else order
    return blocks, order, len(blocks) * (hold.page_size << order)


def _view(data: object) -> memoryview | None:
    """Return a view of the bytes of a buffer; None if `data` is not a buffer, or is one of folios."""
    if isinstance(data, _kho.Folio):
        return None
    try:
        return memoryview(data).cast("B")  # type: ignore[arg-type]  # raises TypeError if it is not a buffer
    except TypeError:
        return None


def _folios(data: Any) -> Iterable[Any]:
    return [data] if isinstance(data, _kho.Folio) else data


def _copy_into_folios(hold: Holding, view: memoryview, order: int) -> Iterator[_kho.Folio]:
    """Yield new folios with the bytes copied into them; the last one is padded with zeros."""
    size = hold.page_size << order
    for at in range(0, view.nbytes, size):
        piece = view[at : at + size]
        folio = hold.page(order, zero=False)
        target = memoryview(folio)
        target[: piece.nbytes] = piece
        if piece.nbytes < size:
            target[piece.nbytes :] = bytes(size - piece.nbytes)
        yield folio


def vmalloc(hold: Holding, blocks: Blocks, order: int = 0, flags: int = VM_ALLOC) -> bytes:
    """Write the chunks of a vmalloc area and preserve them (kho_preserve_vmalloc).

    As in the kernel, a full chunk is always followed by another one, which may be empty.

    Returns: the 16 bytes of `struct kho_vmalloc`; zeros if there are no blocks.
    Raises: OutOfMemoryError; ParameterError for more than 2^32 pages.
    """
    if not blocks:
        return NULL_VMALLOC
    if len(blocks) << order >= 1 << 32:
        raise ParameterError(f"vmalloc: {len(blocks) << order} pages exceed 2^32 - 1")
    most = hold.page_size // 8 - 1
    first = previous = hold.page()
    for at in range(0, len(blocks), most):
        chunk = previous if at == 0 else _append_chunk(hold, previous)
        part = blocks[at : at + most]
        memoryview(chunk)[8 : 8 + 8 * len(part)] = struct.pack(f"<{len(part)}Q", *part)
        previous = chunk
    if len(blocks) % most == 0:
        _append_chunk(hold, previous)
    return VMALLOC.pack(first.phys, len(blocks) << order, flags, order)


def _append_chunk(hold: Holding, previous: _kho.Folio) -> _kho.Folio:
    chunk = hold.page()
    memoryview(previous)[:8] = struct.pack("<Q", chunk.phys)
    return chunk


def memfd(
    hold: Holding,
    version: MemfdLayout,
    data: Buffer | Iterable[_kho.Folio | MemfdFolio],
    *,
    pos: int,
    size: int | None,
    seals: int,
    order: int,
) -> int:
    """Write a memfd: `struct memfd_luo_ser`, its folios, and their list in a vmalloc area (mm/memfd_luo.c).

    Args: as in `Outgoing.add_memfd`. version: of the structure.
    Returns: the physical address of the structure.
    """
    if seals and not version.has_seals:
        raise ParameterError(f"memfd: seals {seals:#x}, but {version.compatible} cannot record seals")
    header = hold.page()
    view = _view(data)
    records: list[MemfdFolio]
    if view is None:
        records = list(_preserve_given(hold, data))
        bare = max((r.index + (1 << r.order) for r in records), default=0) * hold.page_size
        size = bare if size is None else size
    else:
        made = enumerate(_copy_into_folios(hold, view, order))
        records = [MemfdFolio(folio.phys, order, i << order, DIRTY_UPTODATE) for i, folio in made]
        size = view.nbytes if size is None else size
    packed = bytearray(16 * len(records))
    for at, record in enumerate(records):
        word = record.phys // hold.page_size | record.flags << FLAGS_SHIFT
        struct.pack_into("<QQ", packed, 16 * at, word, record.index)
    blocks, _, _ = blocks_of(hold, packed)
    fields = (pos, size, seals, 0, len(records)) if version.has_seals else (pos, size, len(records))
    end = len(version.header) + version.layout.size
    try:
        memoryview(header)[:end] = version.header + version.layout.pack(*fields, vmalloc(hold, blocks))
    except struct.error as error:
        raise ParameterError(f"memfd: pos {pos}, size {size}, seals {seals}: {error}") from error
    return header.phys


def _preserve_given(hold: Holding, data: object) -> Iterator[MemfdFolio]:
    """Preserve given folios; a folio without an index follows the previous one in the file."""
    index = 0
    for given in _folios(data):
        if isinstance(given, MemfdFolio):
            record = given
        elif isinstance(given, _kho.Folio):
            record = MemfdFolio(given.phys, given.order, index, DIRTY_UPTODATE)
        else:
            raise ParameterError(f"memfd: {given!r} is not a folio")
        if record.phys % (hold.page_size << record.order):
            raise MisalignedError(f"memfd: folio at {record.phys:#x} is not aligned to its order, {record.order}")
        hold.keep(record.phys, 1 << record.order)
        index = record.index + (1 << record.order)
        yield record


def memblock_fdt(regions: dict[str, tuple[int, int]]) -> bytes:
    """Return the blob of the subtree `memblock` for `(start, size)` by name (prepare_kho_fdt, mm/memblock.c)."""
    w = _kho.FdtWriter(1 << 16)
    with w.node():
        w.property_str("compatible", "memblock-v1")
        for name, (start, size) in regions.items():
            with w.node(name):
                w.property_str("compatible", "reserve-mem-v1")
                w.property_u64("start", start)
                w.property_u64("size", size)
    return w.finish()


def metadata(previous_release: str, kexec_count: int) -> bytes:
    """Return the blob of the subtree `kexec-metadata`: 73 bytes (struct kho_kexec_metadata).

    Raises: ParameterError for a release of more than 64 bytes or a count of more than 32 bits.
    """
    return Metadata.encode(previous_release=previous_release, kexec_count=kexec_count)


def kho_test_fdt(folios: Sequence[tuple[int, int]], csum: int, listed: bytes | None) -> bytes:
    """Return the blob of the subtree `kho_test` (kho_test_prepare_fdt, lib/test_kho.c).

    Args: listed: the `struct kho_vmalloc` of the folio list; None for an inline array, as in Linux 6.16 and 6.17.
    """
    w = _kho.FdtWriter(1 << 20)
    with w.node():
        w.property_str("compatible", "kho-test-v1")
        w.property_u32("magic", KhoTest.MAGIC)
        with w.node("data"):
            w.property_u32("nr_folios", len(folios))
            w.property("folios_info", folio_words(folios) if listed is None else listed)
            w.property_u32("csum", csum)
    return w.finish()


def folio_words(folios: Sequence[tuple[int, int]]) -> bytes:
    """Return `phys | order` of each folio, as 8 bytes each."""
    return struct.pack(f"<{len(folios)}Q", *(phys | order for phys, order in folios))


def csum(folios: Iterable[Buffer], machine: str = "x86_64") -> int:
    """Compute csum_partial over all folios, each call starting with the sum of the previous one.

    On x86_64 the result is a one's-complement sum of 32-bit words; other machines fold each folio to 16 bits and add
    the results (lib/checksum.c). Both fold to the same 16 bits.
    """
    total = 0
    for folio in folios:
        view = memoryview(folio).cast("B")
        modulus = 0xFFFFFFFF if machine == "x86_64" else 0xFFFF
        words = sum(int.from_bytes(view[at : at + 65536], "little") % modulus for at in range(0, view.nbytes, 65536))
        if words == 0 and bytes(view).count(0) == view.nbytes:
            continue
        # One's complement has two zeros, 0 and ~0: the sum is 0 only if all words are 0.
        total += words % modulus or modulus
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


def release_all(holdings: Iterable[Holding], out: _kho.Outgoing) -> None:
    """Release what can be released after the handover was dropped; its arena may have another owner by now."""
    for holding in holdings:
        try:
            holding.release(out)
        except KhoError:
            continue
