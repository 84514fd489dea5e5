"""Page allocator: free and used runs of pages. An object is one run, so it is contiguous wherever it is mapped."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

__all__ = ["Allocator"]


class Allocator:
    """The used runs among the pages 0..`pages`: disjoint, ascending, adjacent ones merged."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.used = 0
        """Number of used pages."""
        self._starts: list[int] = []
        self._ends: list[int] = []

    def take(self, start: int, n: int) -> None:
        """Mark `n` free pages as used."""
        if not n:
            return
        at = bisect_right(self._starts, start)
        end = start + n
        joins_before = at > 0 and self._ends[at - 1] == start
        joins_after = at < len(self._starts) and self._starts[at] == end
        if joins_before and joins_after:
            self._ends[at - 1] = self._ends.pop(at)
            del self._starts[at]
        elif joins_before:
            self._ends[at - 1] = end
        elif joins_after:
            self._starts[at] = start
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
        self.used += n

    def free(self, start: int, n: int) -> tuple[int, int]:
        """Mark `n` used pages as free; returns the whole free run that they are in then: (start, n)."""
        at = bisect_right(self._starts, start) - 1
        first, last, end = self._starts[at], self._ends[at], start + n
        if first == start and last == end:
            del self._starts[at], self._ends[at]
        elif first == start:
            self._starts[at] = end
        elif last == end:
            self._ends[at] = start
        else:
            self._ends[at] = start
            self._starts.insert(at + 1, end)
            self._ends.insert(at + 1, last)
        self.used -= n
        after = bisect_right(self._starts, start)
        begin = self._ends[after - 1] if after else 0
        return begin, (self._starts[after] if after < len(self._starts) else self.pages) - begin

    def taken(self) -> Iterator[tuple[int, int]]:
        """Iterate over the used runs, ascending: (start, n)."""
        for start, end in zip(self._starts, self._ends, strict=True):
            yield start, end - start

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Iterate over the free runs, ascending: (start, n)."""
        at = 0
        for start, end in zip(self._starts, self._ends, strict=True):
            if start > at:
                yield at, start - at
            at = end
        if at < self.pages:
            yield at, self.pages - at

    def lowest(self, n: int, align: int, limit: int) -> int | None:
        """Find the lowest `n` free pages that start at a multiple of `align` and end at or below `limit`."""
        for start, free in self.gaps():
            at = -(-start // align) * align
            if at + n <= min(start + free, limit):
                return at
        return None

    def highest(self, n: int, align: int) -> int | None:
        """Find the highest `n` free pages that start at a multiple of `align`."""
        for start, free in reversed(list(self.gaps())):
            at = (start + free - n) // align * align
            if at >= start:
                return at
        return None

    @property
    def largest(self) -> int:
        """Pages of the largest free run."""
        return max((n for _, n in self.gaps()), default=0)
