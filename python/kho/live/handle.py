"""`Handle`: an image and its owner, the one process that changes it."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .._kho import MappedBytes
from ..errors import (
    BusyError,
    FinalizedError,
    FormatError,
    KhoError,
    LuoError,
    NotFoundError,
    OutOfMemoryError,
    StaleError,
)
from ..formats.live import PAGE, Catalog, Item, Retired, check_name, nbytes_of
from .file import header, pins
from .file.allocator import Allocator
from .file.arrays import View, dtype_of, make_readonly, plain_array, plain_bytes, shaped
from .file.header import HEAD, Journal, Root
from .file.image import ImageFile, State
from .file.mapping import Mapping, in_memory, punch
from .file.pins import Pin
from .file.space import Pinned, Run, Space
from .oserrors import error_of
from .ownership import Ownership
from .reader import Reader, run_of
from .transports import kexec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from typing_extensions import Buffer

    from ..luo import Device, Session
    from .deadline import Deadline
    from .handover.predecessor import Predecessor
    from .handover.server import Server

LARGE = 64 << 10
"""Bytes. Objects of this size and more are filled by write(2), which takes no page faults, if their pages are new."""
FORK = 10.0
"""Seconds that a fork waits for calls of other threads on a handle."""


@dataclass
class Change:
    """An object that was put but not committed."""

    item: Item
    """Its checksum and generation are not set yet."""
    stale: bool = False
    """Whether its pages were those of another object: most of them are mapped already."""
    writer: weakref.ref[MappedBytes] | None = None
    view: weakref.ref[Any] | None = None
    """The writable array that was handed out."""


class Handle(Reader):
    """An image and its owner: the one process that changes it. Threads may share it; each call is atomic.

    Reads see the uncommitted changes. A forked child may read, and may fill an array that `empty` gave its parent; all
    else raises NotOwnerError there. Without `commit`, changes are lost with the handle or the process.
    """

    def __init__(
        self, image: ImageFile, state: State, *, inherited: bool, predecessor: Predecessor | None = None
    ) -> None:
        """Own an image that the caller has locked.

        Args: predecessor: earlier owners that may still read what this one replaces.
        Raises: FormatError if what readers keep overlaps what is in use; OutOfMemoryError; SourceError.
        """
        super().__init__(image, state, Pin(image.fd, image.where, writable=True))
        self.inherited = inherited and state.root.generation > 0
        """Whether there was something to take over: an owner that died before its first commit left nothing."""
        self.transport = "path" if image.path is not None else "descriptor"
        """How the image came to this process: new, exec, socket, hold, systemd, kexec, file, path or descriptor."""
        self.stored = False
        """Whether systemd was asked to keep the image."""
        self._ownership = Ownership(image, self._lock)
        self.handed_over = self._ownership.handed_over
        """Set when a successor that asked for the image has it: time to drain."""
        self._server: Server | None = None
        self._preserve_again = False
        """Whether the image was preserved for the next kernel when it was handed over."""
        self._changes: dict[str, Change | None] = {}
        """What was put (a change) or deleted (None) since the last commit, by name."""
        self._writers = weakref.WeakValueDictionary[int, MappedBytes]()
        """Writable views of uncommitted objects, by physical address."""
        self._fork: tuple[bool, Pin | None] = False, None
        """During a fork: whether the lock is held for it, and the pin for the child."""
        self._predecessor = predecessor
        self._shared = {item.phys for item in state.catalog.items.values()} if predecessor is not None else set[int]()
        """Addresses of the committed objects that the predecessor may read."""
        sup = image.sup
        pins.present(image.lock_fd)
        image.fill_holes(state)
        self._memory = Mapping(self._pin.fd, sup.offset, sup.size, writable=True)
        self._head = Mapping(self._pin.fd, 0, HEAD, writable=True)
        self._bytes = self._head.view(0, HEAD)
        self._on_medium = not in_memory(image.fd)
        """Whether the file has a medium to which its pages are flushed."""
        self._space = Space(image, self._pin.fd, state)
        header.retire(self._bytes, state.root.generation)
        self._journal = Journal(self._bytes)
        self._journal.clear()
        self._bytes[header.OWNER_AT : header.OWNER_AT + 8] = os.getpid().to_bytes(8, "little")
        self._pin_inherited(state, predecessor)
        self._space.pin_unlisted(self.generation, self._bytes)
        self._punch_free()
        self._space.replenish()
        _handles.add(self)

    def _pin_inherited(self, state: State, predecessor: Predecessor | None) -> None:
        """Pin the pages that earlier owners and other readers keep. Raises: FormatError if they are in use."""
        where, base, space = self._image.where, self._image.sup.base, self._space
        retired = {(run.phys, run.pages): run for run in state.catalog.retired}
        if predecessor is not None:
            for start, n in predecessor.pinned:
                if not space.is_free(start, n):
                    raise FormatError(f"{where}: its owner holds {n} pages from {start}, which are not free")
                space.runs.take(start, n)
                run = retired.pop((base + start * PAGE, n), None)
                born, freed = (self.generation + 1,) * 2 if run is None else (run.born, run.freed)
                space.pin(start, n, born, freed, [predecessor])
        for run in retired.values():
            start = (run.phys - base) // PAGE
            if not space.is_free(start, run.pages):
                raise FormatError(f"{where}: its owner holds {run.pages} pages from {start}, which are retired")
            space.runs.take(start, run.pages)
            space.pin(start, run.pages, run.born, run.freed, [])

    def _punch_free(self) -> None:
        """Give free memory back to the machine: earlier owners, or a live update session, have allocated it."""
        if not self._space.holes:
            return
        for start, n in list(self._space.runs.gaps()):
            self._space.punch(start, n)
        if self.inherited and os.fstatvfs(self._pin.fd).f_bsize <= PAGE:
            # A session allocates the unused part of the head as well.
            punch(self._pin.fd, header.JOURNAL_END, HEAD - header.JOURNAL_END)

    # Reading

    def _find(self, name: str) -> Item:
        if name not in self._changes:
            return super()._find(name)
        change = self._changes[name]
        if change is None:
            raise NotFoundError(f"{self._image.where}: object {name!r} was deleted")
        return change.item

    def names(self) -> list[str]:
        """Return the objects' names, with those of uncommitted ones, in the order in which they were put."""
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

        It is writable until the commit, and read-only from then on. Slices of it that were taken earlier stay writable:
        do not write to them after the commit. `verify` finds such writes.

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
                    self._write(change, memoryview(array.reshape(-1).view("u1")))
                elif array.nbytes:
                    target: Any = shaped(self._bytes_of(change.item), code, array.shape)
                    target[...] = array
            return
        raw = plain_bytes(name, value)
        with self._lock:
            change = self._new("put", name, raw.nbytes, None, (raw.nbytes,))
            if raw.nbytes:
                self._write(change, raw.cast("B") if raw.c_contiguous else memoryview(raw.tobytes()))

    def edit(self, name: str) -> View:
        """Copy an object into a writable array; with the commit the copy replaces the object.

        Raises: NotFoundError, OutOfMemoryError, NotOwnerError.
        """
        with self._lock:
            self._ownership.require_change("edit")
            item = self._find(name)
            source = self._exporter(item.phys, item.nbytes)
            change = self._new("edit", name, item.nbytes, item.dtype, item.shape)
            if item.nbytes:
                self._write(change, memoryview(source).cast("B"))
            return self._writable(change)

    def __delitem__(self, name: str) -> None:
        """Delete an object with the next commit; arrays of it that are held keep their contents.

        Raises: NotFoundError, NotOwnerError.
        """
        with self._lock:
            self._ownership.require_change("del")
            self._find(name)
            self._note(name)
            gone = self._changes.pop(name, None)
            if name in self._state.catalog.items:
                self._changes[name] = None
            if gone is not None:
                self._free_uncommitted(gone.item)
                self._space.sweep()

    def _note(self, name: str) -> None:
        """Note in the journal that an object is being changed."""
        if not self._changes:
            self._journal.begin(self.generation)
        if name not in self._changes:
            self._journal.add(name)

    def _new(self, what: str, name: str, nbytes: int, dtype: str | None, shape: tuple[int, ...]) -> Change:
        """Allocate an object, and make it what its name stands for."""
        self._ownership.require_change(what)
        check_name(name)
        pages = -(-nbytes // PAGE)
        sup = self._image.sup
        objects = len(self._state.catalog.items) + len(self._changes) + 1
        start, stale = self._space.allocate(f"{what} {name!r}", pages, objects) if pages else (0, False)
        if stale:
            # What is not filled reads as zeros, as in pages that were allocated just now.
            filled = 0 if what == "empty" else nbytes
            self._memory.update(start * PAGE + filled, bytes(pages * PAGE - filled))
        self._note(name)
        gone = self._changes.pop(name, None)
        phys = sup.base + start * PAGE if pages else 0
        change = self._changes[name] = Change(Item(name, phys, nbytes, dtype, shape, 0, 0), stale)
        if gone is not None:
            self._free_uncommitted(gone.item)
            self._space.sweep()
        return change

    def _bytes_of(self, item: Item) -> memoryview:
        return self._memory.view(item.phys - self._image.sup.base, item.nbytes)

    def _write(self, change: Change, raw: memoryview) -> None:
        """Fill an object: a large one in new pages by write(2), if the file can be written, else through the mapping.

        In pages that are mapped already, write(2) would take ten times as long: it looks up and locks each of them,
        next to readers whose page faults do the same.
        """
        item, done = change.item, 0
        if item.nbytes >= LARGE and not change.stale:
            offset = self._image.sup.offset + item.phys - self._image.sup.base
            try:
                while done < item.nbytes:
                    done += os.pwrite(self._pin.fd, raw[done:], offset + done)
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
        view = shaped(memoryview(writer), item.dtype, item.shape)
        change.view = weakref.ref(view)
        return view

    def _free(self, item: Item, born: int, freed: int) -> None:
        """Free an object's pages with the first sweep that finds that they are no longer read."""
        start, n = run_of(item, self._image.sup.base)
        if not n:
            return
        phys = item.phys
        by: list[Callable[[], object]] = [
            weakref.ref(view) for view in (self._exporters.get(phys), self._writers.get(phys)) if view is not None
        ]
        if phys in self._shared and self._predecessor is not None:
            self._shared.discard(phys)
            by += [self._predecessor] if self._predecessor() is not None else []
        self._space.pin(start, n, born, freed, by)

    def _free_uncommitted(self, item: Item) -> None:
        self._free(item, self.generation + 1, self.generation + 1)

    # Commits

    def commit(self) -> int:
        """Make all changes since the last commit part of the image, or none; returns the new generation.

        A process that is killed at any moment leaves the previous generation or this one, whole. The checksums
        (zlib.crc32) of changed objects are computed; other objects are not touched. Without changes nothing happens.
        Raises: OutOfMemoryError if there is no room for the metadata; BusyError while the image is offered;
            NotOwnerError. Nothing has changed then.
        """
        with self._lock:
            self._ownership.require_owner("commit")
            if self._ownership.offered:
                raise BusyError(
                    f"{self._image.where}: commit: a successor is reading generation {self.generation}; withdraw"
                )
            if not self._changes:
                self._space.sweep()
                return self.generation
            before, generation = self._state, self.generation + 1
            items = {name: item for name, item in before.catalog.items.items() if name not in self._changes}
            for name, change in self._changes.items():
                if change is not None:
                    crc = zlib.crc32(self._bytes_of(change.item)) if change.item.nbytes else 0
                    items[name] = replace(change.item, crc32=crc, generation=generation)
            catalog = Catalog(self.name, self.version, generation, items, self._retired(generation))
            try:
                zone, meta, fdt_phys = self._space.lay_out(catalog)
            except OutOfMemoryError:
                # The sweep at the end of the previous commit found readers, which may have ended.
                self._space.sweep()
                catalog = replace(catalog, retired=self._retired(generation))
                zone, meta, fdt_phys = self._space.lay_out(catalog)
            meta_phys = self._image.sup.base + zone[0] * PAGE
            root = Root(generation, fdt_phys, meta_phys, len(meta), zlib.crc32(meta))
            try:
                self._store(items, root, meta)
            finally:
                # After an interrupt (KeyboardInterrupt, say) the word decides whether this was a commit.
                if self._image.word() == fdt_phys:
                    self._committed(before, State(root, catalog, None), zone)
                else:
                    self._space.set_reserve(zone)
            return generation

    def _retired(self, generation: int) -> tuple[Retired, ...]:
        """List the pages that the next owner must not reuse while they are read, once `generation` is committed."""
        base, before = self._image.sup.base, self._state
        start, n = self._space.zone
        runs = [Retired(base + run.start * PAGE, run.n, run.born, run.freed) for run in self._space.pinned]
        runs.append(Retired(base + start * PAGE, n, before.root.generation, generation))
        for name in self._changes:
            old = before.catalog.items.get(name)
            if old is not None and old.nbytes:
                runs.append(Retired(old.phys, old.pages, old.generation, generation))
        return tuple(runs)

    @property
    def _pinned(self) -> list[Pinned]:
        return self._space.pinned

    def _store(self, items: dict[str, Item], root: Root, meta: bytes) -> None:
        """Write data and metadata, then the slot, then the word.

        On a medium, each is flushed before the next is written. Against the death of the process alone the order of the
        stores suffices: what it has stored is in the page cache, whatever happens to the process.
        """
        sup = self._image.sup
        at = root.meta_phys - sup.base
        self._memory.update(at, meta)
        if self._on_medium:
            for item in items.values():
                if item.generation == root.generation and item.nbytes:
                    self._memory.flush(item.phys - sup.base, item.nbytes)
            self._memory.flush(at, len(meta))
        header.write_root(self._bytes, sup, root)
        self._flush_head()
        self._bytes[sup.word_at : sup.word_at + 8].cast("Q")[0] = root.fdt_phys
        self._flush_head()

    def _flush_head(self) -> None:
        if self._on_medium:
            self._head.flush(0, header.JOURNAL_AT)

    def _committed(self, before: State, now: State, zone: Run) -> None:
        """Follow a commit: retire the previous slot, free what only the previous generation referred to."""
        header.retire(self._bytes, now.root.generation)
        changes, self._changes = self._changes, {}
        self._state = now
        for name, change in changes.items():
            if change is not None and change.view is not None:
                make_readonly(change.view())
            if (old := before.catalog.items.get(name)) is not None:
                self._free(old, old.generation, now.root.generation)
        self._space.replace_zone(zone, before.root.generation, now.root.generation)
        self._space.sweep()
        self._space.replenish()

    def rollback(self) -> None:
        """Drop the changes since the last commit. Raises: NotOwnerError."""
        with self._lock:
            self._ownership.require_owner("rollback")
            changes, self._changes = self._changes, {}
            self._journal.clear()
            for change in changes.values():
                if change is not None:
                    self._free_uncommitted(change.item)
            self._space.sweep()
            self._space.replenish()

    # Ownership

    def offer(self) -> int:
        """Let a successor read: until `withdraw` or `hand_over` nothing is committed, so what it reads stays.

        Returns: the descriptor, to pass to it.  Raises: NotOwnerError.
        """
        with self._lock:
            self._ownership.offer()
            return self._image.fd

    def withdraw(self) -> None:
        """End an offer, when the successor is not fit: commits are accepted again. Raises: NotOwnerError."""
        with self._lock:
            self._ownership.withdraw()

    def hand_over(self) -> None:
        """Let a candidate adopt the image; this handle can still read, but changes nothing any more.

        What it reads stays whole until it is closed and the last array of it is gone. Raises: FinalizedError with
        uncommitted changes: commit or roll back first; NotOwnerError.
        """
        with self._lock:
            self._release_to_successor(listed=False)

    def _release_to_successor(self, *, listed: bool) -> None:
        """Unlock the image. Args: listed: the successor is told which replaced pages are still read."""
        with self._lock:
            self._ownership.require_owner("hand_over")
            if self._changes:
                raise FinalizedError(f"{self._image.where}: hand_over: {len(self._changes)} changes are not committed")
            self._lock_shown(listed=listed)
            # A file is in one session at a time: the next session is the successor's.
            self._preserve_again = self._end_session()
            self._ownership.release()

    def _lock_shown(self, *, listed: bool) -> None:
        """Lock the generations that arrays of this process show, as a reader does, before another process owns them.

        The locks are on the description that is mapped: they end with the last array.
        """
        if not self._pin.take(pins.READERS + self.generation):
            return
        for pinned in [pinned for pinned in self._pinned if pinned.is_referenced()]:
            self._pin.take(pins.FORKS + pinned.freed - 1)
        if not listed:
            self._lock_unlisted(self._pin)

    def _lock_unlisted(self, pin: Pin) -> None:
        """Note in the head, and lock, the pages that arrays of this process show and no commit refers to."""
        now, base = self.generation, self._image.sup.base
        items = [change.item for change in self._changes.values() if change is not None and change.item.nbytes]
        runs = [run_of(item, base) for item in items if item.phys in self._writers or item.phys in self._exporters]
        runs += [(pinned.start, pinned.n) for pinned in self._pinned if pinned.freed > now and pinned.is_referenced()]
        if runs:
            header.Left(self._bytes).add(now, runs)
            pin.take(pins.FORKS + now)
            pin.take(pins.WRITERS + now)

    def take_back(self) -> None:
        """Become the owner again, when a successor has not adopted the image, or died before it committed.

        Raises: BusyError if it has it; StaleError if it has committed: open the image again then.
        """
        with self._lock:
            ownership = self._ownership
            ownership.require_process("take_back")
            if ownership.owns:
                ownership.withdraw()
                return
            self._image.lock()
            try:
                there = self._image.still_there() and self._image.committed().root == self._state.root
            except KhoError:
                there = False
            if not there:
                self._image.unlock()
                raise StaleError(
                    f"{self._image.where}: take_back: there is another generation than {self.generation} by now"
                )
            header.retire(self._bytes, self.generation)
            self._journal.clear()
            self._pin.drop_all()
            self._space.pin_unlisted(self.generation, self._bytes)
            ownership.reacquire()
            if self._preserve_again:
                try:
                    self.preserve()
                except (LuoError, OutOfMemoryError) as error:
                    warnings.warn(f"taken back, but not preserved any more: {error}", RuntimeWarning, stacklevel=2)

    def preserve(self, device: Device | None = None, *, deadline: Deadline | None = None) -> Session:
        """Hand the image to the next kernel, as it is at the kexec: `open` finds it there (`kho.live.kexec`).

        The session is this handle's, and must be open when the kernel jumps: the image is no longer preserved once it
        was handed over, released or closed, or its process has ended. While it is preserved, all of the image's memory
        is allocated.
        Args: device: one that is open; by default the machine's is opened for the call. deadline: until when to
            wait for others that have it open.
        Raises: ParameterError for an image that is not on a memfd of normal pages; OutOfMemoryError if it does not fit
            outside scratch or into the memory cgroup; LuoError; NotOwnerError.
        """
        with self._lock:
            self._ownership.require_owner("preserve")
            image = self._image
            if image.session is None or image.session.closed:
                image.session = kexec.preserve(image.fd, self.name, image.where, device, deadline)
                self._space.holes = False
            return image.session

    def _free_at_once(self) -> None:
        """Punch memory that is freed from now on: no session of this process preserves the image."""
        with self._lock:
            if self._image.keep_free:
                self._image.keep_free, self._space.holes = False, True

    def _end_session(self) -> bool:
        """Stop preserving the image for the next kernel; returns whether it was preserved."""
        was = self._image.end_session()
        self._image.keep_free &= not was
        self._space.holes |= was
        return was

    # Transfers: calls of the server that answers to the image's name (`ownership.TransferSource`)

    def _begin_transfer(self) -> int:
        """Let a successor read: until `_end_transfer`, calls that begin to change the image wait.

        Returns: the descriptor, to pass to it.  Raises: BusyError with uncommitted changes, or an offer; NotOwnerError.
        """
        with self._lock:
            self._ownership.begin_transfer(len(self._changes))
            return self._image.fd

    def _transfer(self, most: int) -> tuple[list[Run], list[int]]:
        """Unlock the image for the successor that reads it.

        Returns: at most `most` runs of pages that arrays of this process, or of earlier owners, still read; and the
            connections that stay open as long as earlier owners read.  Raises: BusyError, FinalizedError.
        """
        with self._lock:
            self._space.sweep()
            if len(self._pinned) > most:
                raise BusyError(f"{self._image.where}: arrays of {len(self._pinned)} replaced objects are still held")
            conns = self._predecessor.conns if self._predecessor is not None and self._predecessor() else []
            self._release_to_successor(listed=True)
            return [(pinned.start, pinned.n) for pinned in self._pinned], [conn.fileno() for conn in conns]

    def _end_transfer(self, *, adopted: bool = False) -> None:
        """End a transfer: the successor has adopted the image, or this process takes it back.

        Raises: BusyError if the successor has it; StaleError, NotOwnerError as `take_back`.
        """
        ownership = self._ownership
        with self._lock:
            try:
                if not adopted and ownership.transferring and self._image.fd >= 0:
                    self.take_back()
            finally:
                if adopted or ownership.owns or self._image.fd < 0:
                    ownership.end_transfer()
        if adopted:
            self.handed_over.set()

    def _committed_facts(self) -> tuple[State, dict[str, int]]:
        """Return what is committed, and the bytes of the image in all and in use; takes no lock."""
        return self._state, {"size": self._image.sup.size, "used": self._space.runs.used * PAGE}

    def _across_exec(self) -> tuple[str, int, int, int | None] | None:
        """Return what goes across exec: name, descriptor, lock, socket; None for a file that the caller named.

        Raises: FinalizedError with uncommitted changes; BusyError.
        """
        with self._lock:
            image, ownership = self._image, self._ownership
            if os.getpid() != ownership.pid or not ownership.owns or image.fd < 0:
                return None
            if image.path is not None and not image.kept:
                return None
            if self._changes:
                raise FinalizedError(f"{image.where}: exec: {len(self._changes)} changes are not committed")
            if ownership.phase != "owner" or self.draining():
                raise BusyError(f"{image.where}: exec: the owner before is still draining, or a successor is looking")
            return self.name, image.fd, image.lock_fd, None if self._server is None else self._server.fileno()

    def lock_fileno(self) -> int:
        """Return the lock's descriptor; with it a program stays the owner across exec (`attach(lock_fd=)`)."""
        return self._image.lock_fd

    def draining(self) -> bool:
        """Return whether the previous owner, or a child of it, may still read what this process has replaced."""
        with self._lock:
            return self._predecessor is not None and self._predecessor() is not None

    def serve(self, *, replace: bool = False, deadline: Deadline | None = None) -> None:
        """Answer to this image's name, in a thread: to successors, `kho ps`, `kho inspect live:NAME`.

        The thread is stopped while this process forks, and not started in the child.
        Args: replace: take the name from a process that answers to it; for an owner that got its image otherwise.
            deadline: until when to wait for others that begin to serve.
        Raises: BusyError if another process answers; SourceError; NotOwnerError.
        """
        # Imported here: its hook must be registered after this module's, as a fork runs them in reverse order. So the
        # server's thread has paused before the fork takes the handle's lock.
        from .handover.server import Owner, Server

        with self._lock:
            if self._server is None:
                self._ownership.require_owner("serve")
                self._server = Server(Owner(self), replace=replace, deadline=deadline)

    @property
    def served(self) -> bool:
        """Whether a process that asks for the image by its name finds it with this one."""
        return self._server is not None and not self.handed_over.is_set()

    def _stop_serving(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    # Forks

    def _before_fork(self) -> None:
        """Pin what a child will see: its mappings are its parent's, so its parent's locks do not cover it."""
        held = self._lock.acquire(timeout=FORK)
        pin, now = None, self.generation
        if os.getpid() == self._ownership.pid and self._image.fd >= 0 and self._pin.supported:
            self._space.forked()
            try:
                pin = Pin(self._pin.fd, self._image.where)
                if pin.take(pins.FORKS + now) and self._ownership.owns:
                    self._lock_unlisted(pin)
            except KhoError:
                pin = None
                self._space.unlocked_forks.append(now)
            if not held:
                # Another thread's call is still running: it may commit once before the child exists.
                self._space.unlocked_forks += [now, now + 1]
        self._fork = held, pin

    def _after_fork_in_parent(self) -> None:
        """Close the child's pin here: its locks belong to the open file, which the child has too."""
        (held, pin), self._fork = self._fork, (False, None)
        if pin is not None:
            pin.close()
        if held:
            self._lock.release()

    def _forked(self) -> None:
        super()._forked()
        self._ownership.after_fork(self._lock)
        (_, pin), self._fork = self._fork, (False, None)
        if pin is not None:
            mappings = [mapping for name in ("_data", "_memory") if (mapping := vars(self).get(name)) is not None]
            try:
                # A mapping keeps the locks of a child that closes all descriptors, as daemons do.
                kept: object = Mapping(pin.fd, 0, PAGE, writable=False)
                pin.close()
            except KhoError:
                kept = pin
            for mapping in mappings:
                mapping.keeps.append(kept)

    # The end

    def release(self) -> int:
        """Give the image up, with all its memory; returns how many bytes the machine has back at once.

        Arrays of it, and what others read, keep their contents; their memory is freed with them.
        Raises: NotOwnerError.
        """
        with self._lock:
            self._ownership.require_owner("release")
        # Without the lock, for which the server's thread may be waiting.
        self._stop_serving()
        with self._lock:
            self._ownership.require_owner("release")
            image = self._image
            self._end_session()
            if self.stored:
                from .transports.systemd import store

                store(self.name, None)
            if image.path is not None and image.still_there():
                image.path.unlink()
            # Without its magic the file is blank: `open(backing=fd)` can make an image in it again.
            taken = os.fstat(image.fd).st_blocks
            self._bytes[:8].cast("Q")[0] = 0
            self._bytes[: header.JOURNAL_END] = bytes(header.JOURNAL_END)
            for start, n in self._unread():
                self._space.punch(start, n)
            # The head (64 KiB) stays allocated: a process that maps it must not meet a hole.
            freed = (taken - os.fstat(image.fd).st_blocks) * 512
            self.close()
            return max(freed, 0)

    def _unread(self) -> list[Run]:
        """List the runs of pages that no array of this process shows, and no reader or child may read."""
        base, everything = self._image.sup.base, pins.PRESENT - pins.READERS
        space = self._space
        shown = Allocator(space.runs.pages)
        items = [*self._state.catalog.items.values()]
        items += [change.item for change in self._changes.values() if change is not None]
        if space.unlocked_forks or space.held(pins.READERS, 0, everything):
            return list(space.runs.gaps())
        for item in items:
            if item.nbytes and (item.phys in self._exporters or item.phys in self._writers):
                shown.take(*run_of(item, base))
        for pinned in self._pinned:
            if pinned.is_referenced():
                shown.take(pinned.start, pinned.n)
        return list(shown.gaps())

    def close(self) -> None:
        """Give up the ownership: another process may acquire the image. Uncommitted changes are lost.

        Views that were handed out stay, and keep their contents: the next owner keeps the memory they show.
        """
        self._stop_serving()
        with self._lock:
            ownership = self._ownership
            if ownership.owns and os.getpid() == ownership.pid and self._image.lock_fd >= 0:
                self._lock_shown(listed=False)
                self._remove_unused()
            ownership.close()
            super().close()
            if self._predecessor is not None:
                self._predecessor.close()
            for mapped in ("_memory", "_head", "_bytes", "_journal"):
                vars(self).pop(mapped, None)

    def _remove_unused(self) -> None:
        """Remove the file of an image without a commit, while it is locked."""
        image = self._image
        if image.kept and image.path is not None and not self._state.root.generation and image.still_there():
            with contextlib.suppress(OSError):
                image.path.unlink()

    def __del__(self) -> None:
        """Close."""
        if hasattr(self, "_space"):
            self.close()
        else:
            super().__del__()

    def stats(self) -> dict[str, int]:
        """Return what the image takes, in bytes unless it says otherwise.

        `size`: memory there can be; `free`, `largest_free` of it; `kept_bytes`: of the free memory what stays allocated
        for the next commits, at most 1 MiB together with that for metadata; `objects` (how many), `object_bytes`;
        `metadata_bytes`: of this generation, and kept for later commits'; `uncommitted` (how many),
        `uncommitted_bytes`; `pinned_bytes`: of replaced objects and metadata that are still read, and `reader_bytes` of
        these by readers in other processes, or children; `allocated_bytes`: what the file takes of the machine;
        `generation`; `holes`: 1 if freed memory goes back to the machine at once, 0 where the file system cannot do
        that, or while the image is preserved.
        """
        with self._lock:
            self._ownership.require_owner("stats")
            space = self._space
            space.sweep()
            changes = [change.item for change in self._changes.values() if change is not None]
            return {
                "size": space.runs.pages * PAGE,
                "free": (space.runs.pages - space.runs.used) * PAGE,
                "largest_free": space.runs.largest * PAGE,
                "kept_bytes": space.kept.used * PAGE,
                "objects": len(self._names()),
                "object_bytes": sum(item.nbytes for item in self._names().values()),
                "metadata_bytes": (space.zone[1] + space.reserve[1] + sum(n for _, n in space.spares)) * PAGE,
                "uncommitted": len(self._changes),
                "uncommitted_bytes": sum(item.nbytes for item in changes),
                "pinned_bytes": sum(pinned.n for pinned in space.pinned) * PAGE,
                "reader_bytes": space.reader_pages * PAGE,
                "allocated_bytes": os.fstat(self._image.fd).st_blocks * 512,
                "generation": self.generation,
                "holes": int(space.holes),
            }


_handles: weakref.WeakSet[Handle] = weakref.WeakSet()
"""The handles of this process, completely made."""
_forking: list[Handle] = []


def open_handles() -> list[Handle]:
    """Return the handles of this process."""
    return list(_handles)


def _before_fork() -> None:
    _forking[:] = list(_handles)
    for handle in _forking:
        handle._before_fork()


def _after_fork_in_parent() -> None:
    for handle in _forking:
        handle._after_fork_in_parent()
    _forking.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_forking.clear)
