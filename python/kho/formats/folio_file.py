"""Files whose folios are listed as a memfd's are: `{ u64 pfn:52, flags:12; u64 index; }` in a vmalloc area."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from .. import errors
from .declare import Declared, Record, u64, vmalloc

if TYPE_CHECKING:
    from ..handover.rules import Finding

UPTODATE = 2
"""Flag of a memfd's folio: its content counts (abi.md section 6)."""
MOST = 16
"""Maximum number of findings of one kind."""


class FolioEntry(Record):
    """A folio of a file: its first page, its flags, and its place in the file in pages."""

    pfn = u64(bits=52, unit="pfn", owns="data")
    flags = u64(bits=12, default=0, flags={1: "dirty", 2: "up to date"})
    index = u64(unit="pages")


class Extent(NamedTuple):
    """A part of a file that is not a hole."""

    offset: int
    phys: int
    nbytes: int


class FolioFile(Declared):
    """A file with a size and a list of folios; a subclass declares these fields again, at their places."""

    size = u64(unit="bytes")
    nr_folios = u64()
    folios = vmalloc(FolioEntry, count="nr_folios", listed=False)

    def present(self, flags: int) -> bool:
        """Whether a folio with these flags has content; else it reads as zeros."""
        return bool(flags & UPTODATE)

    @cached_property
    def extents(self) -> list[Extent]:
        """The parts of the file that are not holes, by offset, inside its size; of an overlap, the later folio's."""
        inc = self.blob.inc
        page = inc.page_size
        found: list[Extent] = []
        for index, pfn, flags in self._entries():
            offset, phys = index * page, pfn * page
            if offset >= self.size:
                break
            if found and found[-1].offset + found[-1].nbytes > offset:
                last = found.pop()
                if offset > last.offset:
                    found.append(Extent(last.offset, last.phys, offset - last.offset))
            if self.present(flags):
                nbytes = min(page << (inc.order_at(phys) or 0), self.size - offset)
                last = found[-1] if found else Extent(0, 0, 0)
                if (offset, phys) == (last.offset + last.nbytes, last.phys + last.nbytes) and found:
                    found[-1] = Extent(last.offset, last.phys, last.nbytes + nbytes)
                else:
                    found.append(Extent(offset, phys, nbytes))
        return found

    def _from(self, offset: int) -> Iterator[Extent]:
        """Yield the extents that end after `offset`."""
        first = bisect_right(self.extents, offset, key=lambda extent: extent.offset + extent.nbytes)
        return islice(self.extents, first, None)

    def _entries(self) -> list[tuple[int, int, int]]:
        """Return (index, pfn, flags) of every folio, by index, in the order of the list where it is the same."""
        names = ("index", "pfn", "flags" if hasattr(self.folios.of, "flags") else "index")
        return sorted(self.folios.columns(*names), key=lambda entry: entry[0])

    @property
    def parts(self) -> list[tuple[int, int]]:
        """`(offset, nbytes)` of the parts that are not holes."""
        return [(extent.offset, extent.nbytes) for extent in self.extents]

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`, by default up to the end; holes are zeros.

        Raises: OutOfRangeError beyond the end; OutsideMemoryError; FormatError for more zeros than the image can hold.
        """
        n = max(self.size - offset, 0) if n is None else n
        if offset < 0 or n < 0 or offset + n > self.size:
            raise errors.OutOfRangeError(f"{self.blob.owner}: {n} bytes at {offset}: the file has {self.size}")
        most = max(self.blob.inc.room("contents"), 1 << 26)
        if n > most:
            raise errors.FormatError(f"{self.blob.owner}: {n} bytes at once, more than an image of this size can hold")
        made = bytearray(n)
        for extent in self._from(offset):
            start, end = max(extent.offset, offset), min(extent.offset + extent.nbytes, offset + n)
            if start >= end:
                break
            made[start - offset : end - offset] = self.blob.inc.read(extent.phys + start - extent.offset, end - start)
        return bytes(made)

    def next_to_read(self, offset: int, end: int) -> tuple[int, int] | None:
        """Find the first `(offset, nbytes)` before `end` that may hold other than zeros, or cannot be read."""
        inc = self.blob.inc
        for extent in self._from(offset):
            start, stop = max(extent.offset, offset), min(extent.offset + extent.nbytes, end)
            if start >= stop:
                break
            phys = extent.phys + start - extent.offset
            if not inc.has(phys, stop - start):
                return start, stop - start
            if found := inc.next_to_read(phys, stop - start):
                return start + found[0] - phys, found[1]
        return None

    def findings(self) -> Iterator[Finding]:
        """Report folios with one index (KHO027), and folios beyond the end of the file (KHO028)."""
        from ..handover.rules import Finding

        page = self.blob.inc.page_size
        said = {"KHO027": 0, "KHO028": 0}
        reach = 0
        for index, pfn, _ in self._entries():
            rule, why = "", ""
            if index < reach:
                rule, why = "KHO027", "another folio has the same index"
            elif index * page >= self.size:
                rule, why = "KHO028", f"the file has {self.size} bytes"
            reach = max(reach, index + (1 << (self.blob.inc.order_at(pfn * page) or 0)))
            if rule and said[rule] < MOST:
                said[rule] += 1
                place = f"{self.blob.owner}, index {index}"
                yield Finding(rule, place, f"folio at {pfn * page:#x}: {why}", pfn * page)
