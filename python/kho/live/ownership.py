"""Whose turn it is to change an image: an owner's, or its successor's; `Turns` is what a handle knows of that."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..errors import BusyError, FinalizedError, KhoError, LuoError, NotOwnerError, StaleError
from ..formats.live import PAGE, Item
from .file import header, pins
from .file.allocator import Runs
from .file.header import Journal
from .file.image import Image, State
from .file.mapping import Mapping
from .file.pins import Pin
from .reader import Exporter, Reader, run_of
from .transports import kexec

if TYPE_CHECKING:
    from ..luo import Device, Session
    from .deadline import Deadline
    from .handle import Handle
    from .handover.client import Predecessor
    from .handover.server import Server


@dataclass
class Change:
    """An object that is not committed."""

    item: Item
    """Without checksum and generation."""
    writer: weakref.ref[Exporter] | None = None
    view: weakref.ref[Any] | None = None
    """The writable array that was handed out."""


class Pinned(NamedTuple):
    """Pages that no object has any more, and that may still be read."""

    start: int
    n: int
    born: int
    """The first generation that referred to them; of what was not committed, the one it would have come with."""
    freed: int
    """The first one after `born` that does not; `born` if none does."""
    by: list[Callable[[], object]]
    """What keeps them in this process, or in the owner before: None when called, once it does not any more."""
    zone: bool = False
    """Whether they were metadata, which the next commit's may take the place of."""


FORK = 10.0
"""Seconds a fork waits for other threads' calls on a handle."""


class Turns(Reader, ABC):
    """An owner that may stop being one, and may be one again."""

    _bytes: memoryview
    _journal: Journal
    _runs: Runs
    _holes: bool
    _writers: weakref.WeakValueDictionary[int, Exporter]

    def __init__(self, image: Image, state: State, *, inherited: bool, predecessor: Predecessor | None) -> None:
        super().__init__(image, state, Pin(image.fd, image.where, writable=True))
        self.inherited = inherited and state.root.generation > 0
        """Whether there was something to take over: an owner that died before it first committed left nothing."""
        self.transport = "path" if image.path is not None else "descriptor"
        """How the image came to this process: new, exec, socket, hold, systemd, found, path or descriptor."""
        self.handed_over = threading.Event()
        """Set when a successor that asked for it has the image: time to drain."""
        self.stored = False
        """Whether systemd was told to keep the image."""
        self._server: Server | None = None
        self._predecessor = predecessor
        self._turn = threading.Condition(self._lock)
        self._pid = os.getpid()
        self._owner = True
        self._again = False
        self._offered = False
        self._looked_at = False
        self._waiting = 0
        self._changes: dict[str, Change | None] = {}
        self._pinned: list[Pinned] = []
        self._fork: tuple[bool, Pin | None] = False, None
        self._lost: list[int] = []
        """Generations that a child may read that was forked without a pin."""

    def _changing(self, what: str) -> None:
        """Refuse what only the owner may do; who begins to change something waits while a successor looks."""
        self._waiting += 1
        try:
            while self._looked_at and not self._changes:
                self._here(what)
                self._turn.wait(1.0)
        finally:
            self._waiting -= 1
        self._mine(what)

    def _mine(self, what: str) -> None:
        """Refuse what only the owner may do; who that is is open for a moment while a successor adopts."""
        self._here(what)
        while self._looked_at and not self._owner:
            self._turn.wait(1.0)
            self._here(what)
        if not self._owner:
            raise NotOwnerError(f"{self._image.where}: {what}: it was handed over")

    def _here(self, what: str) -> None:
        if os.getpid() != self._pid:
            raise NotOwnerError(f"{self._image.where}: {what}: process {self._pid} is the owner, this is a child of it")
        if self._image.fd < 0:
            raise NotOwnerError(f"{self._image.where}: {what}: this handle is closed")

    def offer(self) -> int:
        """Let a successor look: until `withdraw` or `hand_over` nothing is committed, so what it reads stays.

        Returns: the descriptor, to pass on to it.  Raises: NotOwnerError.
        """
        with self._lock:
            self._mine("offer")
            self._offered = True
            return self._image.fd

    def lock_fileno(self) -> int:
        """Give the lock's descriptor: who keeps it across exec stays the owner (`attach(fd, lock_fd=...)`)."""
        return self._image.lock_fd

    def withdraw(self) -> None:
        """Take an offer back: the successor is not fit. Raises: NotOwnerError."""
        with self._lock:
            self._mine("withdraw")
            self._offered = False

    def hand_over(self) -> None:
        """Let a candidate adopt the image; this handle reads on, and changes nothing more.

        What it reads stays whole, until it is closed and the last array of it is gone. Raises: FinalizedError with
        uncommitted changes: commit or roll back first; NotOwnerError.
        """
        with self._lock:
            self._hand_over(told=False)

    def _hand_over(self, *, told: bool) -> None:
        with self._lock:
            self._mine("hand_over")
            if self._changes:
                raise FinalizedError(f"{self._image.where}: hand_over: {len(self._changes)} changes are not committed")
            self._keep_shown(told=told)
            # A file is in one session at a time, and the next is the successor's.
            self._again = self._end_session()
            self._owner = False
            self._image.unlock()

    def _keep_shown(self, *, told: bool) -> None:
        """Lock what arrays of this process show, as any reader does, before another becomes the owner.

        The locks are on the description that is mapped: they go with the last array.
        Args: told: the successor hears which pages of replaced objects are still looked at.
        """
        now = self.generation
        if not self._pin.take(pins.READERS + now):
            return
        looked_at = [pinned for pinned in self._pinned if any(by() is not None for by in pinned.by)]
        for pinned in looked_at:
            self._pin.take(pins.FORKS + pinned.freed - 1)
        if not told:
            self._leave(self._pin)

    def _leave(self, pin: Pin) -> None:
        """Note which pages that no commit refers to arrays of this process show, and lock them."""
        now, base = self.generation, self._image.sup.base
        items = [change.item for change in self._changes.values() if change is not None and change.item.nbytes]
        runs = [run_of(item, base) for item in items if item.phys in self._writers or item.phys in self._exporters]
        runs += [
            (pinned.start, pinned.n)
            for pinned in self._pinned
            if pinned.freed > now and any(by() is not None for by in pinned.by)
        ]
        if runs:
            header.Left(self._bytes).add(now, runs)
            pin.take(pins.FORKS + now)
            pin.take(pins.WRITERS + now)

    def _others(self, region: int, first: int, end: int) -> pins.Held:
        """Ask which generations readers in other processes, or children, keep."""
        return pins.held(self._image.lock_fd, region, first, end)

    @abstractmethod
    def _settle(self) -> None:
        """Account for what readers of earlier generations, and other owners' children, may still look at."""

    def take_back(self) -> None:
        """Be the owner again, when a successor did not adopt the image, or died before it committed.

        Raises: BusyError if it has it; StaleError if it has committed: open the image anew then.
        """
        with self._lock:
            self._here("take_back")
            if self._owner:
                self._offered = False
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
            self._settle()
            self._owner = True
            self._offered = False
            if self._again:
                try:
                    self.preserve()
                except LuoError as error:
                    warnings.warn(f"taken back, but not preserved any more: {error}", RuntimeWarning, stacklevel=2)

    def preserve(self, device: Device | None = None, *, deadline: Deadline | None = None) -> Session:
        """Hand the image to the next kernel, as it is at the kexec: `open` finds it there (`kho.live.kexec`).

        The session is this handle's, and must be open when the kernel jumps: the image is not preserved any more once
        it was handed over, released or closed, or its process has ended. All of the image's memory is taken meanwhile.
        Args: device: one that is open; by default the machine's is opened for a moment. deadline: until when to
            wait for others that have it open.
        Raises: ParameterError for an image that is not on a memfd of normal pages; LuoError; NotOwnerError.
        """
        with self._lock:
            self._mine("preserve")
            image = self._image
            if image.session is None or image.session.closed:
                image.session = kexec.preserve(image.fd, self.name, image.where, device, deadline)
            return image.session

    def _end_session(self) -> bool:
        """Have the image be this kernel's alone; whether it was not."""
        was = self._image.end_session()
        self._holes |= was
        return was

    @abstractmethod
    def _sweep(self) -> None:
        """Free what nobody refers to any more."""

    def look(self) -> int:
        """Let a successor look that asked for it: until `look_away` or `give` whoever begins to change something waits.

        Returns: the descriptor, to pass on.  Raises: BusyError with uncommitted changes, or an offer; NotOwnerError.
        """
        with self._lock:
            self._here("look")
            if self._waiting and not self._looked_at:
                # They have waited for the last one that looked, and go first.
                raise BusyError(f"{self._image.where}: process {self._pid} is about to change it")
            if self._changes or self._offered or self._looked_at:
                why = f"{len(self._changes)} changes are not committed" if self._changes else "it is offered to another"
                raise BusyError(f"{self._image.where}: process {self._pid} cannot hand over yet: {why}")
            self._mine("look")
            self._looked_at = True
            return self._image.fd

    def give(self, most: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Hand over to who looks.

        Returns: at most `most` runs of pages that arrays of this process, or of the owners before it, keep from being
            used anew; the connections by which one knows of these owners.  Raises: BusyError, FinalizedError.
        """
        with self._lock:
            self._sweep()
            if len(self._pinned) > most:
                raise BusyError(f"{self._image.where}: arrays of {len(self._pinned)} replaced objects are still held")
            conns = self._predecessor.conns if self._predecessor is not None and self._predecessor() else []
            self._hand_over(told=True)
            return [(pinned.start, pinned.n) for pinned in self._pinned], [conn.fileno() for conn in conns]

    def committed_facts(self) -> tuple[State, dict[str, int]]:
        """Tell what is committed, and the bytes there are, and are in use; without waiting for a lock."""
        return self._state, {"size": self._image.sup.size, "used": self._runs.used * PAGE}

    def look_away(self, *, adopted: bool = False) -> None:
        """End a look: the successor has it, or this process goes on."""
        with self._lock:
            try:
                if not adopted and self._looked_at and self._image.fd >= 0:
                    self.take_back()
            finally:
                if adopted or self._owner or self._image.fd < 0:
                    self._looked_at = False
                    self._turn.notify_all()
        if adopted:
            self.handed_over.set()

    def passed_on(self) -> tuple[str, int, int, int | None] | None:
        """Give what goes across exec: name, descriptor, lock, socket; None if it is not an owner's memfd.

        Raises: FinalizedError with uncommitted changes; BusyError.
        """
        with self._lock:
            image = self._image
            if os.getpid() != self._pid or not self._owner or image.fd < 0 or image.path is not None:
                return None
            if self._changes:
                raise FinalizedError(f"{image.where}: exec: {len(self._changes)} changes are not committed")
            if self._looked_at or self._offered or self.draining():
                raise BusyError(f"{image.where}: exec: the owner before is still draining, or a successor is looking")
            return self.name, image.fd, image.lock_fd, None if self._server is None else self._server.fileno()

    def draining(self) -> bool:
        """Say whether the owner before, or a child of it, may still read what this process has replaced."""
        with self._lock:
            return self._predecessor is not None and self._predecessor() is not None

    def serve(self, *, replace: bool = False, deadline: Deadline | None = None) -> None:
        """Answer to this image's name from now on, in a thread: to successors, `kho ps`, `kho inspect live:NAME`.

        The thread is stopped while this process forks, and not started in the child.
        Args: replace: in place of who answers now; for an owner that got its image otherwise. deadline:
            until when to wait for others that begin to serve.
        Raises: BusyError if another process answers; SourceError; NotOwnerError.
        """
        from .handover.server import Owner, Server

        with self._lock:
            if self._server is None:
                self._mine("serve")
                self._server = Server(Owner(cast("Handle", self)), replace=replace, deadline=deadline)

    @property
    def served(self) -> bool:
        """Whether somebody who asks for the image by its name finds it with this process."""
        return self._server is not None and not self.handed_over.is_set()

    def _stop_serving(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def _fork_begins(self) -> None:
        """Pin what a child will see: its mappings are its parent's, whose locks do not tell the two apart."""
        held = self._lock.acquire(timeout=FORK)
        pin, now = None, self.generation
        if os.getpid() == self._pid and self._image.fd >= 0 and self._pin.supported:
            try:
                pin = Pin(self._pin.fd, self._image.where)
                if pin.take(pins.FORKS + now) and self._owner:
                    self._leave(pin)
            except KhoError:
                pin = None
                self._lost.append(now)
            if not held:
                # A call that is going on may commit once before the child is there.
                self._lost += [now, now + 1]
        self._fork = held, pin

    def _fork_ended(self) -> None:
        """In the parent: leave the pin to the child."""
        (held, pin), self._fork = self._fork, (False, None)
        if pin is not None:
            pin.close()
        if held:
            self._lock.release()

    def _forked(self) -> None:
        super()._forked()
        self._turn = threading.Condition(self._lock)
        self._looked_at = False
        (_, pin), self._fork = self._fork, (False, None)
        if pin is not None:
            mappings = [mapping for name in ("_data", "_memory") if (mapping := vars(self).get(name)) is not None]
            try:
                # A child that closes all descriptors, as daemons do, has its mappings still.
                kept: object = Mapping(pin.fd, 0, PAGE, writable=False)
                pin.close()
            except KhoError:
                kept = pin
            for mapping in mappings:
                mapping.keeps.append(kept)


_owners: weakref.WeakSet[Turns] = weakref.WeakSet()


def _before_fork() -> None:
    _forking[:] = list(_owners)
    for owner in _forking:
        owner._fork_begins()


def _after_fork_in_parent() -> None:
    for owner in _forking:
        owner._fork_ended()
    _forking.clear()


_forking: list[Turns] = []
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_forking.clear)
