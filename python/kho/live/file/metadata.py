"""A generation's metadata: root FDT, subtree and map, built as a handover in a private arena."""

from __future__ import annotations

import resource
from pathlib import Path

from ... import _kho
from ...errors import OutOfMemoryError
from ...formats.kernel_write import aligned_blocks
from ...formats.live import PAGE, SUBTREE, Catalog, encode_catalog

__all__ = ["LARGEST_ORDER", "LEAST_METADATA", "MOST_METADATA", "Builder", "build", "meta_zone"]

ABI = "kho-v4"
"""The version of an image's handover: chosen once, as every version of kho reads it."""
LARGEST_ORDER = 20
LEAST_METADATA = 16
"""Pages that suffice for the metadata of a few objects."""
MOST_METADATA = 256 << 20
"""Bytes. Larger metadata are neither written nor read."""
MOST_ARENAS = 4
"""Arenas that a builder keeps. Without readers commits use two runs of pages in turn; each reader may add one."""
LARGEST_KEPT = 64
"""Pages. An arena for larger metadata is not kept, so the arenas of a builder take at most 1 MiB."""
MOST_SPACE = 1 << 40
"""Bytes of address space that the arenas of a builder take, at most."""
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def meta_zone(pages: int, objects: int, map_pages: int) -> int:
    """Return how many pages at the end are kept for metadata: of two generations, so a full image can be emptied."""
    return max(min(pages // 8, 1024), 2 * (objects * 256 // PAGE + map_pages + 8))


def build(base: int, size: int, start: int, n: int, catalog: Catalog) -> tuple[bytes, int, int]:
    """Build a generation's metadata once. Arguments, result and errors: see `Builder`."""
    return Builder(base, size).build(start, n, catalog)


class Builder:
    """Builds the metadata of an image's generations.

    A handover builds them in a private arena with the addresses of the image, in which only the pages for them are
    free; the image is not touched. To make such an arena costs more than the handover in it: a mapping, a page fault
    for each page of metadata, and an allocation for each block of pages that is not free. So the last arenas are kept,
    by the run of pages that is free in them. A handover that was not finalized leaves nothing in its arena except for
    bytes of free pages, and its pages are zeroed, or written as a whole, when they are allocated.
    """

    def __init__(self, base: int, size: int) -> None:
        """Args: base: physical address of the image's memory. size: its bytes."""
        self._base = base
        self._size = size
        self._most = min(MOST_ARENAS, MOST_SPACE // size) if _is_space_free() else 0
        self._arenas: dict[tuple[int, int], _kho.Arena] = {}
        """The arenas that are kept, the last used one last: by the first free page and the page after the last one."""

    def build(self, start: int, n: int, catalog: Catalog) -> tuple[bytes, int, int]:
        """Build a generation's root FDT, subtree and map for `n` pages from page `start`.

        Returns: the bytes, which end with the last page that is needed; the FDT's address; the number of pages needed.
        Raises: OutOfMemoryError if the pages do not suffice.
        """
        blob = encode_catalog(catalog)
        blob_pages = -(-len(blob) // PAGE)
        if blob_pages >= n:
            raise OutOfMemoryError(f"{blob_pages} pages of names do not fit {n}")
        free = start + blob_pages, start + n
        arena = self._arenas.pop(free, None)
        if arena is None:
            arena = self._new(*free)
        at = self._base + start * PAGE
        arena.write(at, blob.ljust(blob_pages * PAGE, b"\0"))
        out = _kho.Outgoing(arena, ABI)
        for item in catalog.items.values():
            if item.pages:
                out.preserve_pages(item.phys, item.pages)
        out.preserve_pages(at, blob_pages)
        out.link_subtree(SUBTREE, at, len(blob))
        out.serialize()
        used = n - arena.free_pages
        while arena.page(at + (n - 1) * PAGE).state == "free":
            n -= 1
        built = arena.read(at, n * PAGE), out.fdt_phys, used
        del out
        if free[1] - start <= LARGEST_KEPT and self._most:
            if len(self._arenas) >= self._most:
                del self._arenas[next(iter(self._arenas))]
            self._arenas[free] = arena
        return built

    def _new(self, start: int, end: int) -> _kho.Arena:
        """Make an arena in which the pages from `start` up to but not including `end` are free."""
        arena = _kho.Arena([(self._base, self._size)], max_page_order=LARGEST_ORDER)
        first = self._base // PAGE
        for begin, after in ((0, start), (end, self._size // PAGE)):
            for pfn, order in aligned_blocks(first + begin, first + after):
                arena.alloc_at(pfn * PAGE, order)
        return arena


def _is_space_free() -> bool:
    """Return whether address space that is not touched costs nothing: it has no limit, and is not charged as memory."""
    strict = b"2"
    try:
        charged = OVERCOMMIT.read_bytes().strip() == strict
    except OSError:
        charged = True
    return not charged and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
