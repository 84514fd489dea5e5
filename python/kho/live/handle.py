"""Who may change an image: `Handle`, its owner, and `Candidate`, who wants to be."""

from __future__ import annotations

import errno
import os
import weakref
import zlib
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import (
    BusyError,
    FormatError,
    NotFoundError,
    NotOwnerError,
    OutOfMemoryError,
    StaleError,
)
from ..formats.live import PAGE, Catalog, Item, Retired, check_name, nbytes_of
from .file import header, pins
from .file.allocator import Runs
from .file.arrays import View, dtype_of, make_readonly, plain_array, plain_bytes, shaped
from .file.header import HEAD, Journal, Root
from .file.image import LEAST_METADATA, MOST_METADATA, Image, State, build, meta_zone, no_memory
from .file.mapping import Mapping, allocate, punch
from .file.memory import Meter, huge_pool
from .oserrors import error_of
from .ownership import Change, Pinned, Turns, _owners
from .reader import Reader, run_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from typing_extensions import Buffer

    from .handover.client import Predecessor

ALIGN = (2 << 20) // PAGE
"""Pages that large objects begin at a multiple of: huge pages, and few folios."""


SPARE = (1 << 20) // PAGE
"""Pages, at most, that replaced metadata leave for later commits while readers hold what these replace."""

LARGE = 64 << 10
"""Bytes from which an object is written as a file is."""


class Candidate(Reader):
    """An image as a successor sees it while its owner still has it: read-only, nothing of it is changed.

    What is read here is the generation that was committed when it was attached, whole, however often the owner commits:
    it keeps what a reader may see until the reader is closed, and its last array gone. Attach again to see a later one.
    """

    @classmethod
    def of(cls, image: Image) -> Candidate:
        """Read what an image has committed; if that fails, the image is closed. Raises: FormatError."""
        try:
            return cls(image, *image.pinned())
        except BaseException:
            image.close()
            raise

    def adopt(
        self, timeout: float = 0.0, *, version: str | None = None, predecessor: Predecessor | None = None
    ) -> Handle:
        """Become the owner, once the owner before has let go; the candidate is closed.

        What is committed is read anew, if there was a commit since. Memory that no generation refers to is given back.
        Args: timeout: seconds to wait for the owner. version: refuse another. predecessor: who still reads.
        Raises: BusyError while somebody else is the owner: of several candidates one adopts; StaleError if the image
            was released; SchemaError; FormatError; AccessError if this process may not write it.
        """
        with self._lock:
            image = self._image
            if image.lock_fd < 0:
                raise NotOwnerError(f"{image.where}: this candidate is closed, or another process's")
            image.make_writable()
            image.lock(timeout)
            try:
                if not image.still_there():
                    raise StaleError(f"{image.where}: it was released meanwhile")
                self._state = image.committed()
                self.check(None, version)
                handle = Handle(image, self._state, inherited=True, predecessor=predecessor)
            except BaseException:
                image.unlock()
                raise
            self._image = _Closed(image)
            self._unmap()
            return handle


class _Closed(Image):
    """What a reader is left with whose image went to another: its name, and no descriptor."""

    def __init__(self, image: Image) -> None:
        self.fd = self.lock_fd = -1
        self.session = None
        self.where = image.where
        self.path = image.path
        self.sup = image.sup
        self.head = image.head


class Handle(Turns):
    """An image and its owner: the one process that changes it. Threads may share it; each call is atomic.

    Reads see the uncommitted changes. A forked child may read, and may fill an array that `empty` gave its parent; all
    else raises NotOwnerError there. Without `commit`, changes are lost with the handle or the process.
    """

    def __init__(self, image: Image, state: State, *, inherited: bool, predecessor: Predecessor | None = None) -> None:
        super().__init__(image, state, inherited=inherited, predecessor=predecessor)
        self._its = {item.phys for item in state.catalog.items.values()} if predecessor is not None else set[int]()
        self._holes = True
        self._meter = Meter()
        self._writers = weakref.WeakValueDictionary()
        sup = image.sup
        pins.present(image.lock_fd)
        image.fill_holes(state)
        self._file = self._pin.fd
        self._memory = Mapping(self._file, sup.offset, sup.size, writable=True)
        self._head = Mapping(self._file, 0, HEAD, writable=True)
        self._bytes = self._head.view(0, HEAD)
        self._runs = Runs(sup.size // PAGE)
        for item in state.catalog.items.values():
            self._runs.take(*run_of(item, sup.base))
        self._zone = self._metadata(state.root)
        """Pages of the committed metadata."""
        self._runs.take(*self._zone)
        # As many as would be laid out in as many pages as there are, next time (`_next_metadata`).
        self._metadata_pages = self._zone[1] - max(2, self._zone[1] // 8)
        self._reserve = (0, 0)
        """Pages, with memory, for the next commit's metadata: one can delete and commit where nothing is free."""
        self._spares: list[tuple[int, int]] = []
        """More such zones, which readers have let go of: to allocate and punch one each commit takes time."""
        self._kept = 0
        """Pages of `_pinned` that others than this process keep."""
        self._map_pages = LEAST_METADATA
        header.retire(self._bytes, state.root.generation)
        self._journal = Journal(self._bytes)
        self._journal.clear()
        self._bytes[header.OWNER_AT : header.OWNER_AT + 8] = self._pid.to_bytes(8, "little")
        retired = {(run.phys, run.pages): run for run in state.catalog.retired}
        if predecessor is not None:
            for start, n in predecessor.pinned:
                if not self._is_free(start, n):
                    raise FormatError(f"{image.where}: its owner holds {n} pages from {start}, which are not free")
                self._runs.take(start, n)
                run = retired.pop((sup.base + start * PAGE, n), None)
                born, freed = (self.generation + 1,) * 2 if run is None else (run.born, run.freed)
                self._pinned.append(Pinned(start, n, born, freed, [predecessor]))
        for run in retired.values():
            start = (run.phys - sup.base) // PAGE
            if not self._is_free(start, run.pages):
                raise FormatError(f"{image.where}: its owner holds {run.pages} pages from {start}, which are retired")
            self._runs.take(start, run.pages)
            self._pinned.append(Pinned(start, run.pages, run.born, run.freed, []))
        self._settle()
        for start, n in list(self._runs.gaps()):
            self._punch(start, n)
        self._replenish()
        _owners.add(self)

    def _is_free(self, start: int, n: int) -> bool:
        return any(at <= start and start + n <= at + free for at, free in self._runs.gaps())

    def _settle(self) -> None:
        # Another owner may have punched these pages, or handed them to a child, if this is one once more.
        self._drop_spares(punching=False)
        self._keep_reserve((0, 0), punching=False)
        now = self.generation
        if self._others(pins.WRITERS, now, now + 1):
            left = header.Left(self._bytes).runs(now)
            for start, n in list(self._runs.gaps()) if left is None else left:
                if n and self._is_free(start, n):  # and not accounted for already, or noted twice
                    self._runs.take(start, n)
                    self._pinned.append(Pinned(start, n, now + 1, now + 1, []))
        self._sweep()
        self._replenish()

    def _metadata(self, root: Root) -> tuple[int, int]:
        return (root.meta_phys - self._image.sup.base) // PAGE, root.meta_bytes // PAGE

    def _punch(self, start: int, n: int) -> None:
        if self._holes:
            self._holes = punch(self._file, self._image.sup.offset + start * PAGE, n * PAGE)

    # What is there

    def _find(self, name: str) -> Item:
        if name not in self._changes:
            return super()._find(name)
        change = self._changes[name]
        if change is None:
            raise NotFoundError(f"{self._image.where}: object {name!r} was deleted")
        return change.item

    def names(self) -> list[str]:
        """List the objects, uncommitted ones and all, in the order in which they were put."""
        with self._lock:
            return list(self._names())

    def _names(self) -> dict[str, Item]:
        items = {name: item for name, item in self._state.catalog.items.items() if name not in self._changes}
        return items | {name: change.item for name, change in self._changes.items() if change is not None}

    @property
    def uncommitted(self) -> list[str]:
        """The names of objects that were put or deleted since the last commit."""
        with self._lock:
            return list(self._changes)

    # Changes

    def empty(self, name: str, shape: int | Sequence[int], dtype: Any = "u1") -> View:
        """Make an array to be filled; the commit replaces an object of the same name by it.

        It is writable until the commit, and read-only from then on. Slices of it that were taken before are not made
        read-only: do not write through them, `verify` will tell.

        Args: shape: numbers of elements. dtype: numpy's, or its `str` as "<f4"; numbers, booleans, times, strings.
        Raises: OutOfMemoryError with what is needed and free; ParameterError; NotOwnerError.
        """
        code = dtype_of(dtype)
        sizes = (int(shape),) if isinstance(shape, int) or hasattr(shape, "__index__") else tuple(map(int, shape))
        nbytes = nbytes_of(code, sizes)
        with self._lock:
            change = self._new("empty", name, nbytes, code, sizes)
            return self._writable(change)

    def put(self, name: str, value: Buffer | np.ndarray[Any, Any]) -> None:
        """Copy an array or bytes in; the commit replaces an object of the same name by it.

        Args: value: a numpy array, or anything that exports a buffer of numbers: without numpy's dtype it becomes
            bytes. What means more than its buffer (masked arrays and other subclasses, objects, structures) is refused.
        Raises: OutOfMemoryError with what is needed and free; NotStorableError with the remedy; ParameterError;
            NotOwnerError.
        """
        if (array := plain_array(name, value)) is not None:
            code = dtype_of(array.dtype)
            with self._lock:
                change = self._new("put", name, array.nbytes, code, array.shape)
                if array.nbytes >= LARGE and array.flags.c_contiguous:
                    self._write(change.item, memoryview(array.reshape(-1).view("u1")))
                elif array.nbytes:
                    place: Any = shaped(self._bytes_of(change.item), code, array.shape)
                    place[...] = array
            return
        raw = plain_bytes(name, value)
        with self._lock:
            change = self._new("put", name, raw.nbytes, None, (raw.nbytes,))
            if raw.nbytes:
                self._write(change.item, raw.cast("B") if raw.c_contiguous else memoryview(raw.tobytes()))

    def edit(self, name: str) -> View:
        """Copy an object so as to change it: a writable array, as `empty` gives, with what it holds.

        Raises: NotFoundError, OutOfMemoryError, NotOwnerError.
        """
        with self._lock:
            self._changing("edit")
            item = self._find(name)
            source = self._exporter(item.phys, item.nbytes)
            change = self._new("edit", name, item.nbytes, item.dtype, item.shape)
            if item.nbytes:
                self._write(change.item, memoryview(source).cast("B"))
            return self._writable(change)

    def __delitem__(self, name: str) -> None:
        """Delete an object, once that is committed; arrays of it that are held stay as they are.

        Raises: NotFoundError, NotOwnerError.
        """
        with self._lock:
            self._changing("del")
            self._find(name)
            self._note(name)
            gone = self._changes.pop(name, None)
            if name in self._state.catalog.items:
                self._changes[name] = None
            if gone is not None:
                self._free_uncommitted(gone.item)
                self._sweep()

    def _note(self, name: str) -> None:
        """Have the journal say that an object is being changed."""
        if not self._changes:
            self._journal.begin(self.generation)
        if name not in self._changes:
            self._journal.add(name)

    def _new(self, what: str, name: str, nbytes: int, dtype: str | None, shape: tuple[int, ...]) -> Change:
        """Make room for an object, which is what its name stands for from now on."""
        self._changing(what)
        check_name(name)
        pages = -(-nbytes // PAGE)
        sup = self._image.sup
        start = self._take(f"{what} {name!r}", pages) if pages else 0
        self._note(name)
        gone = self._changes.pop(name, None)
        phys = sup.base + start * PAGE if pages else 0
        change = self._changes[name] = Change(Item(name, phys, nbytes, dtype, shape, 0, 0))
        if gone is not None:
            self._free_uncommitted(gone.item)
            self._sweep()
        return change

    def _take(self, what: str, pages: int) -> int:
        """Take free pages for an object."""
        objects = len(self._state.catalog.items) + len(self._changes) + 1
        limit = self._runs.pages - meta_zone(self._runs.pages, objects, self._map_pages)
        align = min(ALIGN, 1 << (pages.bit_length() - 1))
        start = self._runs.lowest(pages, align, limit)
        if start is None:
            self._sweep()
            self._drop_spares()
            start = self._runs.lowest(pages, align, limit)
        if start is None:
            start = self._runs.lowest(pages, 1, limit)
        if start is None:
            # What is free but kept for metadata is nothing that an object could have.
            gaps = [min(at + n, limit) - at for at, n in self._runs.gaps() if at < limit]
            raise no_memory(self._image.where, what, pages, sum(gaps), max(gaps, default=0), self._kept)
        self._back(what, start, pages)
        return start

    def _back(self, what: str, start: int, pages: int) -> None:
        """Take pages, with the machine's memory behind them now: later there would be a SIGBUS for want of it."""
        self._runs.take(start, pages)
        try:
            try:
                self._allocate(what, start, pages)
            except (OSError, OutOfMemoryError):
                if not self._drop_spares():
                    raise
                self._allocate(what, start, pages)
        except OSError as error:
            self._punch(*self._runs.give(start, pages))
            kept = f"; {self._kept * PAGE:#x} bytes of replaced objects wait for readers" if self._kept else ""
            doing = f"{what} needs {pages * PAGE:#x} bytes{kept}"
            raise error_of(error, self._image.where, doing, pool=huge_pool(self._file)) from error
        except OutOfMemoryError:
            self._punch(*self._runs.give(start, pages))
            raise

    def _allocate(self, what: str, start: int, pages: int) -> None:
        self._meter.check(self._file, pages * PAGE, f"{self._image.where}: {what}")
        allocate(self._file, self._image.sup.offset + start * PAGE, pages * PAGE)

    def _bytes_of(self, item: Item) -> memoryview:
        return self._memory.view(item.phys - self._image.sup.base, item.nbytes)

    def _write(self, item: Item, raw: memoryview) -> None:
        """Fill an object; large ones by writing the file, which takes no page faults, where files can be written."""
        done = 0
        if item.nbytes >= LARGE:
            offset = self._image.sup.offset + item.phys - self._image.sup.base
            try:
                while done < item.nbytes:
                    done += os.pwrite(self._file, raw[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise error_of(error, self._image.where, f"write {item.name!r}") from error
        self._bytes_of(item)[done:] = raw[done:]

    def _writable(self, change: Change) -> View:
        item = change.item
        writer = self._memory.exporter(item.phys - self._image.sup.base if item.nbytes else 0, item.nbytes)
        change.writer = weakref.ref(writer)
        if item.nbytes:
            self._writers[item.phys] = writer
        view = shaped(memoryview(writer).cast("B"), item.dtype, item.shape)
        change.view = weakref.ref(view)
        return view

    def _free(self, item: Item, born: int, freed: int) -> None:
        """Give an object's pages back with the next `_sweep` that finds that they are not read any more."""
        start, n = run_of(item, self._image.sup.base)
        if not n:
            return
        phys = item.phys
        held: list[Callable[[], object]] = [
            weakref.ref(by) for by in (self._exporters.get(phys), self._writers.get(phys)) if by is not None
        ]
        if phys in self._its and self._predecessor is not None:
            self._its.discard(phys)
            held += [self._predecessor] if self._predecessor() is not None else []
        self._pinned.append(Pinned(start, n, born, freed, held))

    def _free_uncommitted(self, item: Item) -> None:
        self._free(item, self.generation + 1, self.generation + 1)

    def _sweep(self) -> None:
        """Give back what is not read any more: by arrays of this process, children, or readers of its generations."""
        if not self._pinned:
            return
        first, end = min(pinned.born for pinned in self._pinned), max(pinned.freed for pinned in self._pinned)
        readers, forks = self._others(pins.READERS, first, end), self._others(pins.FORKS, first - 1, end)
        anyone = readers or forks or self._lost
        kept: list[Pinned] = []
        self._kept = 0
        for pinned in self._pinned:
            start, n, born, freed, held, zone = pinned
            if held and any(by() is not None for by in held):
                kept.append(pinned)
            elif anyone and (
                readers.any_of(born, freed)
                or forks.any_of(max(born - 1, 0), freed)
                or any(born - 1 <= lost < freed for lost in self._lost)
            ):
                kept.append(pinned)
                self._kept += n
            elif zone and n >= self._next_metadata() and self._has_room_for(n):
                self._spares.append((start, n))
            else:
                self._punch(*self._runs.give(start, n))
        self._pinned = kept

    def _has_room_for(self, zone: int) -> bool:
        """Say whether a zone is to be kept: as the next commit's, or as a spare."""
        spare = sum(n for _, n in self._spares)
        return spare + zone <= SPARE or (not self._reserve[1] and not self._spares)

    def _drop_spares(self, *, punching: bool = True) -> bool:
        """Give back the metadata's pages that the next commit does without; whether there were any."""
        spares, self._spares = self._spares, []
        for zone in spares:
            given = self._runs.give(*zone)
            if punching:
                self._punch(*given)
        return bool(spares)

    # Commits

    def commit(self) -> int:
        """Make every change since the last commit part of the image, all or none; the generation it is then.

        A process that is killed at any moment leaves the generation before or this one, whole. Changed objects are
        summed up (zlib.crc32), others are not touched. Without changes nothing happens.
        Raises: OutOfMemoryError if there is no room for the metadata; BusyError while the image is offered;
            NotOwnerError. Nothing has changed then.
        """
        with self._lock:
            self._mine("commit")
            if self._offered:
                raise BusyError(
                    f"{self._image.where}: commit: a successor is reading generation {self.generation}; withdraw"
                )
            self._sweep()
            if not self._changes:
                return self.generation
            before, generation = self._state, self.generation + 1
            items = {name: item for name, item in before.catalog.items.items() if name not in self._changes}
            for name, change in self._changes.items():
                if change is not None:
                    crc = zlib.crc32(self._bytes_of(change.item)) if change.item.nbytes else 0
                    items[name] = replace(change.item, crc32=crc, generation=generation)
            catalog = Catalog(self.name, self.version, generation, items, self._retired(generation))
            zone, meta, fdt_phys = self._lay_out(catalog)
            start = zone[0]
            root = Root(generation, fdt_phys, self._image.sup.base + start * PAGE, len(meta), zlib.crc32(meta))
            try:
                self._store(items, root, meta)
            finally:
                # Whatever interrupts this process, it goes on from what the image says.
                if self._image.word() == fdt_phys:
                    self._committed(before, State(root, catalog, None), zone)
                else:
                    self._keep_reserve(zone)
            return generation

    def _retired(self, generation: int) -> tuple[Retired, ...]:
        """List what the next owner must not use while it is read, once this generation is committed."""
        base, before = self._image.sup.base, self._state
        start, n = self._zone
        runs = [Retired(base + pinned.start * PAGE, pinned.n, pinned.born, pinned.freed) for pinned in self._pinned]
        runs.append(Retired(base + start * PAGE, n, before.root.generation, generation))
        gone = [old for name in self._changes if (old := before.catalog.items.get(name)) is not None and old.nbytes]
        runs += [Retired(old.phys, old.pages, old.generation, generation) for old in gone]
        return tuple(runs)

    def _lay_out(self, catalog: Catalog) -> tuple[tuple[int, int], bytes, int]:
        """Build the metadata of a generation and take pages for them: these, the bytes, the FDT's address."""
        sup = self._image.sup
        self._use_spare()
        start, pages = self._reserve
        if not pages:
            start, pages = -1, self._map_pages + len(catalog.items) * 256 // PAGE
        while True:
            if start < 0:
                found = self._runs.highest(pages, 1)
                if found is None and self._drop_spares():
                    found = self._runs.highest(pages, 1)
                if found is None or pages * PAGE > MOST_METADATA:
                    free = self._runs.pages - self._runs.used
                    raise no_memory(self._image.where, "commit", pages, free, self._runs.largest, self._kept)
                start = found
            try:
                meta, fdt_phys, used = build(sup.base, sup.size, start, pages, catalog)
            except OutOfMemoryError:
                start, pages = -1, pages + -(-pages // 2)
                continue
            break
        if start == self._reserve[0] and self._reserve[1]:
            self._reserve = 0, 0
        else:
            self._back("commit", start, pages)
        self._map_pages = max(LEAST_METADATA, used - len(catalog.items) * 128 // PAGE)
        self._metadata_pages = used
        return (start, pages), meta, fdt_phys

    def _next_metadata(self) -> int:
        """Say how many pages the next commit's metadata will do with, if it adds little."""
        return self._metadata_pages + max(2, self._metadata_pages // 8)

    def _replenish(self) -> None:
        """Keep memory for the metadata of the next commit, where there is any."""
        self._use_spare()
        if self._reserve[1] >= self._next_metadata():
            return
        pages = self._next_metadata() + 1
        found = self._runs.highest(pages, 1)
        if found is None:
            return
        with suppress(OutOfMemoryError):
            self._back("commit", found, pages)
            self._keep_reserve((found, pages))

    def _use_spare(self) -> None:
        """Have the next commit's metadata where some were before, if there is room for them."""
        while self._spares and not self._reserve[1]:
            zone = self._spares.pop()
            if zone[1] >= self._next_metadata():
                self._reserve = zone
            else:
                self._punch(*self._runs.give(*zone))

    def _keep_reserve(self, zone: tuple[int, int], *, punching: bool = True) -> None:
        (start, n), self._reserve = self._reserve, zone
        if n:
            given = self._runs.give(start, n)
            if punching:
                self._punch(*given)

    def _store(self, items: dict[str, Item], root: Root, meta: bytes) -> None:
        """Write data and metadata, then the slot, then the word.

        Each is on its medium before the next is written, where there is one; against the death of the process alone the
        order of the stores suffices, since what it stored is in the machine's memory whatever becomes of it.
        """
        sup = self._image.sup
        at = root.meta_phys - sup.base
        self._memory.view(at, len(meta))[:] = meta
        if self._image.path is not None:
            for item in items.values():
                if item.generation == root.generation and item.nbytes:
                    self._memory.flush(item.phys - sup.base, item.nbytes)
            self._memory.flush(at, len(meta))
        header.write_root(self._bytes, sup, root)
        self._flush_head()
        self._bytes[sup.word_at : sup.word_at + 8].cast("Q")[0] = root.fdt_phys
        self._flush_head()

    def _flush_head(self) -> None:
        if self._image.path is not None:
            self._head.flush(0, header.JOURNAL_AT)

    def _committed(self, before: State, now: State, zone: tuple[int, int]) -> None:
        """Follow the image: retire the slot before, give back what only that generation referred to and none reads."""
        header.retire(self._bytes, now.root.generation)
        changes, self._changes = self._changes, {}
        self._state = now
        for name, change in changes.items():
            if change is not None and change.view is not None:
                make_readonly(change.view())
            if (old := before.catalog.items.get(name)) is not None:
                self._free(old, old.generation, now.root.generation)
        self._pinned.append(Pinned(*self._zone, before.root.generation, now.root.generation, [], zone=True))
        self._zone = zone
        self._sweep()
        self._replenish()

    def rollback(self) -> None:
        """Drop the changes since the last commit. Raises: NotOwnerError."""
        with self._lock:
            self._mine("rollback")
            changes, self._changes = self._changes, {}
            self._journal.clear()
            for change in changes.values():
                if change is not None:
                    self._free_uncommitted(change.item)
            self._sweep()
            self._replenish()

    # Ends

    def release(self) -> int:
        """Give the image up, with all its memory: how many bytes the machine has back at once.

        Arrays of it, and what others read, stay what they are; their memory goes with them.
        Raises: NotOwnerError.
        """
        with self._lock:
            self._mine("release")
        # Without the lock, which its thread may be waiting for.
        self._stop_serving()
        with self._lock:
            self._mine("release")
            image = self._image
            self._end_session()
            if self.stored:
                from .transports.inherited import store

                store(self.name, None)
            if image.path is not None and image.still_there():
                image.path.unlink()
            # Without its magic it is blank, and can be made anew where the descriptor is all there is.
            taken = os.fstat(image.fd).st_blocks
            self._bytes[:8].cast("Q")[0] = 0
            self._bytes[: header.JOURNAL_END] = bytes(header.JOURNAL_END)
            for start, n in self._unseen():
                self._punch(start, n)
            # The head stays, 64 KiB: who looks at it must not find a hole.
            freed = (taken - os.fstat(image.fd).st_blocks) * 512
            self.close()
            return max(freed, 0)

    def _unseen(self) -> list[tuple[int, int]]:
        """List the runs of pages that no array of this process shows, and no reader or child may look at."""
        base, everything = self._image.sup.base, pins.PRESENT - pins.READERS
        seen = Runs(self._runs.pages)
        items = [*self._state.catalog.items.values()]
        items += [change.item for change in self._changes.values() if change is not None]
        if self._lost or self._others(pins.READERS, 0, everything):
            return list(self._runs.gaps())
        for item in items:
            if item.nbytes and (item.phys in self._exporters or item.phys in self._writers):
                seen.take(*run_of(item, base))
        for pinned in self._pinned:
            if any(by() is not None for by in pinned.by):
                seen.take(pinned.start, pinned.n)
        return list(seen.gaps())

    def close(self) -> None:
        """Let go of the image: another may own it. Uncommitted changes are lost.

        Views that were handed out stay, and stay what they are: the next owner keeps what they show.
        """
        self._stop_serving()
        with self._lock:
            if self._owner and os.getpid() == self._pid and self._image.lock_fd >= 0:
                self._keep_shown(told=False)
            self._owner = False
            super().close()
            if self._predecessor is not None:
                self._predecessor.close()
            self._turn.notify_all()
            for mapped in ("_memory", "_head", "_bytes", "_journal"):
                vars(self).pop(mapped, None)

    def __del__(self) -> None:
        """Close."""
        if hasattr(self, "_looked_at"):
            self.close()
        else:
            super().__del__()

    def stats(self) -> dict[str, int]:
        """Tell what the image takes, in bytes unless it says otherwise.

        `size`: memory there can be; `free`, `largest_free` of it; `objects` (how many), `object_bytes`;
        `metadata_bytes`: of this generation, and kept for later commits'; `uncommitted` (how many),
        `uncommitted_bytes`; `pinned_bytes`: of objects and metadata that are gone, but looked at, and `reader_bytes` of
        these by readers in other processes, or children; `allocated_bytes`: what the file takes of the machine;
        `generation`; `holes`: 1 if freed memory goes back to the machine at once, 0 where the file system cannot do
        that, or while the image is preserved.
        """
        with self._lock:
            self._mine("stats")
            self._sweep()
            changes = [change.item for change in self._changes.values() if change is not None]
            return {
                "size": self._runs.pages * PAGE,
                "free": (self._runs.pages - self._runs.used) * PAGE,
                "largest_free": self._runs.largest * PAGE,
                "objects": len(self._names()),
                "object_bytes": sum(item.nbytes for item in self._names().values()),
                "metadata_bytes": (self._zone[1] + self._reserve[1] + sum(n for _, n in self._spares)) * PAGE,
                "uncommitted": len(self._changes),
                "uncommitted_bytes": sum(item.nbytes for item in changes),
                "pinned_bytes": sum(pinned.n for pinned in self._pinned) * PAGE,
                "reader_bytes": self._kept * PAGE,
                "allocated_bytes": os.fstat(self._image.fd).st_blocks * 512,
                "generation": self.generation,
                "holes": int(self._holes),
            }
