"""The pages of an image's memory: free, in use, reserved for the next commit's metadata, or pinned by readers."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from ...errors import OutOfMemoryError
from ...formats.live import PAGE, Catalog
from ..oserrors import error_of
from . import header, pins
from .allocator import Allocator
from .header import Root
from .image import ImageFile, State, no_memory
from .mapping import allocate, punch
from .memory import Meter, huge_pool
from .metadata import LEAST_METADATA, MOST_METADATA, Builder, meta_zone

__all__ = ["Pinned", "Space"]

ALIGN = (2 << 20) // PAGE
"""Pages. Large objects start at a multiple of this: huge pages can map them, and they are few folios."""
MOST_KEPT = (1 << 20) // PAGE
"""Pages of replaced objects and metadata that stay allocated for later ones, at most."""

Run = tuple[int, int]
"""First page and number of pages."""


class Pinned(NamedTuple):
    """Pages that no object of the committed generation has, kept because they may still be read."""

    start: int
    n: int
    born: int
    """The first generation that referred to them; for pages that were never committed, the next one."""
    freed: int
    """The first generation after `born` that does not refer to them; `born` if none does."""
    by: list[Callable[[], object]]
    """References of this process or the previous owner that keep them: each returns None once it is gone."""
    zone: bool = False
    """Whether they held metadata, so that the next commit's metadata may use them."""

    def is_referenced(self) -> bool:
        """Return whether an array of this process, or a previous owner, keeps these pages."""
        return any(by() is not None for by in self.by)


class Space:
    """Allocates an image's pages, with the file's memory for them, and frees those that are no longer read.

    Pages that are in use always have memory: without it, a store to a full file system would be a SIGBUS. Freed pages
    are punched out of the file, except for up to `MOST_KEPT`: an owner that replaces the same objects again and again
    writes to the same pages. To punch and allocate these for each commit costs a page fault and the zeroing of each
    page, and waits for locks of the file's mappings that readers take. The metadata of one commit are written while
    those of the previous one are still in use, so the pages for the next ones are allocated in advance (`reserve`): a
    full image can still delete and commit.

    The caller holds the handle's lock.
    """

    def __init__(self, image: ImageFile, fd: int, state: State) -> None:
        """Mark what a committed state uses.

        Args: fd: a descriptor of the file for writing, which stays the caller's.
        """
        self._image = image
        self._fd = fd
        self._meter = Meter()
        sup = image.sup
        self.runs = Allocator(sup.size // PAGE)
        self.holes = not image.keep_free
        """Whether freed pages are punched out of the file; False where the file system cannot do that, and for a file
        that a live update session preserves: the kernel has allocated all of it, and refuses to punch."""
        for item in state.catalog.items.values():
            if item.nbytes:
                self.runs.take((item.phys - sup.base) // PAGE, item.pages)
        self.zone = self.zone_of(state.root)
        """Pages of the committed metadata."""
        self.runs.take(*self.zone)
        self.reserve: Run = (0, 0)
        """Allocated pages for the metadata of the next commit."""
        self.spares: list[Run] = []
        """More such pages, of metadata that readers no longer hold."""
        self.kept = Allocator(self.runs.pages)
        """Free pages that are still allocated in the file, of replaced objects."""
        self._keeps = os.fstatvfs(fd).f_bsize == PAGE
        """Whether pages are kept: if the file's blocks are larger, one block may be of kept pages and of others."""
        self.pinned: list[Pinned] = []
        self.reader_pages = 0
        """Pages of `pinned` that readers in other processes, or forked children, keep."""
        self.unlocked_forks: list[int] = []
        """Generations that a child may read for which no lock could be taken when it was forked."""
        self._builder = Builder(sup.base, sup.size)
        self._forks = True
        """Whether generations may be locked by children of this process, or of earlier owners (`pins.FORKS`)."""
        self._elders = True
        """Whether handles of earlier owners may exist, whose processes may still fork."""
        self._opened = state.root.generation
        self._map_pages = LEAST_METADATA
        # The inverse of `next_metadata`, so that the next metadata take as many pages as the present ones.
        self._metadata_pages = self.zone[1] - max(2, self.zone[1] // 8)

    def zone_of(self, root: Root) -> Run:
        """Return the pages of a generation's metadata."""
        return (root.meta_phys - self._image.sup.base) // PAGE, root.meta_bytes // PAGE

    def is_free(self, start: int, n: int) -> bool:
        """Return whether all pages of a run are free."""
        return any(at <= start and start + n <= at + free for at, free in self.runs.gaps())

    def held(self, region: int, first: int, end: int) -> pins.Held:
        """Return which generations readers in other processes, or forked children, have locked."""
        return pins.held(self._image.lock_fd, region, first, end)

    # Allocation

    def allocate(self, what: str, pages: int, objects: int) -> tuple[int, bool]:
        """Allocate a run of pages for an object.

        Args: what: the act and the object, for messages. objects: how many objects the image will have.
        Returns: the first page; whether the pages may hold other bytes than zeros.  Raises: OutOfMemoryError.
        """
        limit = self.runs.pages - meta_zone(self.runs.pages, objects, self._map_pages)
        align = min(ALIGN, 1 << (pages.bit_length() - 1))
        start = self._kept_run(pages, align, limit)
        if start is not None:
            self.kept.free(start, pages)
            self.runs.take(start, pages)
            return start, True
        start = self.runs.lowest(pages, align, limit)
        if start is None:
            self.sweep()
            self.drop_spares()
            start = self.runs.lowest(pages, align, limit)
        if start is None:
            start = self.runs.lowest(pages, 1, limit)
        if start is None:
            # Free pages above `limit` are kept for metadata, so the message does not count them.
            gaps = [min(at + n, limit) - at for at, n in self.runs.gaps() if at < limit]
            raise no_memory(self._image.where, what, pages, sum(gaps), max(gaps, default=0), self.reader_pages)
        self.allocate_at(what, start, pages)
        return start, not self.holes

    def allocate_at(self, what: str, start: int, pages: int) -> None:
        """Allocate free pages, with the file's memory for them. Raises: OutOfMemoryError, SourceError."""
        for at, n in [(at, n) for at, n in self.kept.taken() if at < start + pages and start < at + n]:
            self.kept.free(at, n)
            self.punch(at, n)
        self.runs.take(start, pages)
        try:
            try:
                self._back(what, start, pages)
            except (OSError, OutOfMemoryError):
                if not self.drop_spares():
                    raise
                self._back(what, start, pages)
        except OSError as error:
            self._free(start, pages)
            kept = f"; {self.reader_pages * PAGE:#x} bytes of replaced objects wait for readers"
            doing = f"{what} needs {pages * PAGE:#x} bytes{kept if self.reader_pages else ''}"
            raise error_of(error, self._image.where, doing, pool=huge_pool(self._fd)) from error
        except OutOfMemoryError:
            self._free(start, pages)
            raise

    def _back(self, what: str, start: int, pages: int) -> None:
        """Allocate the file's memory of pages. Raises: OutOfMemoryError, OSError."""
        self._meter.check(self._fd, pages * PAGE, f"{self._image.where}: {what}")
        allocate(self._fd, self._image.sup.offset + start * PAGE, pages * PAGE)

    def punch(self, start: int, n: int) -> None:
        """Give the memory of free pages back to the machine."""
        if self.holes:
            self.holes = punch(self._fd, self._image.sup.offset + start * PAGE, n * PAGE)

    def _free(self, start: int, n: int) -> None:
        """Free pages, and punch the whole free run that they are in, as far as it is not kept.

        Blocks of the file may be larger than pages, and earlier parts of the run may still be allocated because a full
        file system could not punch them.
        """
        begin, free = self.runs.free(start, n)
        end = begin + free
        for at, kept in self.kept.taken():
            if at + kept <= start:
                begin = max(begin, at + kept)
            elif at >= start + n:
                end = min(end, at)
        self.punch(begin, end - begin)

    def _keep(self, start: int, n: int) -> None:
        """Free pages of an object; they stay allocated in the file if they are few."""
        room = MOST_KEPT - self._spare_pages()
        if not self._keeps or not self.holes or n > min(MOST_KEPT // 4, room):
            self._free(start, n)
            return
        if self.kept.used + n > room:
            self._drop_kept()
        self.runs.free(start, n)
        self.kept.take(start, n)

    def _kept_run(self, pages: int, align: int, limit: int) -> int | None:
        """Find kept pages for an object in the smallest run that fits: at a multiple of `align`, below `limit`."""
        best = None
        for start, n in self.kept.taken():
            at = -(-start // align) * align
            if at + pages <= min(start + n, limit) and (best is None or n < best[0]):
                best = n, at
        return None if best is None else best[1]

    def _drop_kept(self, *, punching: bool = True) -> bool:
        """Punch the kept pages; returns whether there were any."""
        kept, self.kept = self.kept, Allocator(self.runs.pages)
        if punching:
            for start, n in kept.taken():
                self.punch(start, n)
        return kept.used > 0

    # Pages that may still be read

    def pin(self, start: int, n: int, born: int, freed: int, by: list[Callable[[], object]]) -> None:
        """Free pages with the first `sweep` that finds that they are no longer read."""
        self.pinned.append(Pinned(start, n, born, freed, by))

    def pin_unlisted(self, generation: int, head: memoryview) -> None:
        """Pin what arrays of earlier owners' children may write, and drop reserved pages; for a new owner.

        Another owner may have punched these pages, or given them to a child, if this handle was an owner before. It may
        also have punched pages that were pinned and are no longer read, so none of them is kept.
        """
        self.drop_spares(punching=False)
        self.set_reserve((0, 0), punching=False)
        self._forks = self._elders = True
        self._opened = generation
        if self.held(pins.WRITERS, generation, generation + 1):
            left = header.Left(head).runs(generation)
            for start, n in list(self.runs.gaps()) if left is None else left:
                # A run may have been noted twice, or be in use already.
                if n and self.is_free(start, n):
                    self.runs.take(start, n)
                    self.pin(start, n, generation + 1, generation + 1, [])
        self.sweep(keeping=False)
        self.replenish()

    def sweep(self, *, keeping: bool = True) -> None:
        """Free pinned pages that no array of this process, forked child or reader of their generations can read.

        Args: keeping: few of them stay allocated in the file for later commits.
        """
        if not self.pinned:
            return
        _, _, first, end, _, _ = self.pinned[0]
        for _, _, born, freed, _, _ in self.pinned:
            if born < first:
                first = born
            if freed > end:
                end = freed
        readers = self.held(pins.READERS, first, end)
        forks = self._held_by_forks(first - 1, end) if self._forks else pins.NONE
        others = readers is not pins.NONE or forks is not pins.NONE or self.unlocked_forks
        kept: list[Pinned] = []
        self.reader_pages = 0
        for run in self.pinned:
            start, n, born, freed, by, zone = run
            if by and run.is_referenced():
                kept.append(run)
            elif others and (
                readers.any_of(born, freed)
                or (forks is not pins.NONE and forks.any_of(max(born - 1, 0), freed))
                or (self.unlocked_forks and any(born - 1 <= lost < freed for lost in self.unlocked_forks))
            ):
                kept.append(run)
                self.reader_pages += n
            elif not keeping:
                self._free(start, n)
            elif not zone:
                self._keep(start, n)
            elif n >= self.next_metadata() and self._keeps_spare(n):
                self.spares.append((start, n))
            else:
                self._free(start, n)
        self.pinned = kept

    def forked(self) -> None:
        """Query the locks of children from now on: this process forks."""
        self._forks = True

    def _held_by_forks(self, first: int, end: int) -> pins.Held:
        """Return which generations children have locked; if there are no such children, later sweeps need not query.

        A child's lock is taken by its parent before the fork: by this owner (`forked`), or by a handle of an earlier
        owner, which has the lock of a reader on its generation until its last mapping is gone. If no generation up to
        this owner's first one has such a lock, there is no such handle; children that it had are seen by the query
        after that one.
        """
        held = self.held(pins.FORKS, first, end)
        if not held:
            self._elders = self._elders and bool(self.held(pins.READERS, 0, self._opened + 1))
            self._forks = self._elders or bool(self.held(pins.FORKS, 0, pins.GENERATIONS))
        return held

    # Metadata

    def replace_zone(self, zone: Run, before: int, generation: int) -> None:
        """Make `zone` the pages of the committed metadata, and pin those of the generation before."""
        self.pinned.append(Pinned(*self.zone, before, generation, [], zone=True))
        self.zone = zone

    def lay_out(self, catalog: Catalog) -> tuple[Run, bytes, int]:
        """Build the metadata of a generation and allocate pages for them.

        Returns: the pages, the bytes, the physical address of the root FDT.  Raises: OutOfMemoryError.
        """
        self._reserve_spare()
        start, pages = self.reserve
        if not pages:
            start, pages = -1, self._map_pages + len(catalog.items) * 256 // PAGE
        while True:
            if start < 0:
                found = self.runs.highest(pages, 1)
                if found is None and self.drop_spares():
                    found = self.runs.highest(pages, 1)
                if found is None or pages * PAGE > MOST_METADATA:
                    free = self.runs.pages - self.runs.used
                    raise no_memory(self._image.where, "commit", pages, free, self.runs.largest, self.reader_pages)
                start = found
            try:
                meta, fdt_phys, used = self._builder.build(start, pages, catalog)
            except OutOfMemoryError:
                start, pages = -1, pages + -(-pages // 2)
                continue
            break
        if start == self.reserve[0] and self.reserve[1]:
            self.reserve = 0, 0
        else:
            self.allocate_at("commit", start, pages)
        self._map_pages = max(LEAST_METADATA, used - len(catalog.items) * 128 // PAGE)
        self._metadata_pages = used
        return (start, pages), meta, fdt_phys

    def next_metadata(self) -> int:
        """Return how many pages the next commit's metadata need, if it adds few objects."""
        return self._metadata_pages + max(2, self._metadata_pages // 8)

    def replenish(self) -> None:
        """Allocate pages for the metadata of the next commit, if there are free ones."""
        self._reserve_spare()
        if self.reserve[1] >= self.next_metadata():
            return
        pages = self.next_metadata() + 1
        found = self.runs.highest(pages, 1)
        if found is None:
            return
        with suppress(OutOfMemoryError):
            self.allocate_at("commit", found, pages)
            self.set_reserve((found, pages))

    def set_reserve(self, zone: Run, *, punching: bool = True) -> None:
        """Reserve other pages for the next metadata, and free those that were reserved."""
        (start, n), self.reserve = self.reserve, zone
        if n and punching:
            self._free(start, n)
        elif n:
            self.runs.free(start, n)

    def _reserve_spare(self) -> None:
        """Reserve the first spare run that is large enough, if none is reserved; free the smaller ones."""
        while self.spares and not self.reserve[1]:
            zone = self.spares.pop()
            if zone[1] >= self.next_metadata():
                self.reserve = zone
            else:
                self._free(*zone)

    def _spare_pages(self) -> int:
        return sum(pages for _, pages in self.spares) if self.spares else 0

    def _keeps_spare(self, n: int) -> bool:
        """Return whether `n` pages of old metadata are to be kept: as the reserve, or within `MOST_KEPT`."""
        return self.kept.used + self._spare_pages() + n <= MOST_KEPT or (not self.reserve[1] and not self.spares)

    def drop_spares(self, *, punching: bool = True) -> bool:
        """Free the spare runs, and punch the kept pages; returns whether there were any of both."""
        dropped = self._drop_kept(punching=punching)
        spares, self.spares = self.spares, []
        for zone in spares:
            if punching:
                self._free(*zone)
            else:
                self.runs.free(*zone)
        return dropped or bool(spares)
