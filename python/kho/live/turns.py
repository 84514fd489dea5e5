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

from ..errors import BusyError, FinalizedError, LuoError, NotOwnerError, StaleError
from ..payload.live import PAGE, Item
from . import kexec, slots
from .image import Image, State
from .reader import Exporter, Reader
from .runs import Runs
from .slots import Journal

if TYPE_CHECKING:
    from ..luo import Device, Session
    from .deadline import Deadline
    from .handle import Handle
    from .server import Server
    from .successor import Predecessor


@dataclass
class Change:
    """An object that is not committed."""

    item: Item
    """Without checksum and generation."""
    writer: weakref.ref[Exporter] | None = None
    view: weakref.ref[Any] | None = None
    """The writable array that was handed out."""


class Pinned(NamedTuple):
    """Pages of an object that is gone, which somebody still looks at."""

    start: int
    n: int
    by: list[Callable[[], object]]


class Turns(Reader, ABC):
    """An owner that may stop being one, and may be one again."""

    _bytes: memoryview
    _journal: Journal
    _runs: Runs
    _holes: bool

    def __init__(self, image: Image, state: State, *, inherited: bool, predecessor: Predecessor | None) -> None:
        super().__init__(image, state)
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

        Arrays of committed objects stay whole until the successor commits. Raises: FinalizedError with uncommitted
        changes: commit or roll back first; NotOwnerError.
        """
        with self._lock:
            self._mine("hand_over")
            if self._changes:
                raise FinalizedError(f"{self._image.where}: hand_over: {len(self._changes)} changes are not committed")
            # A file is in one session at a time, and the next is the successor's.
            self._again = self._end_session()
            self._owner = False
            self._image.unlock()

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
            if self._image.word() != self._state.root.fdt_phys or not self._image.still_there():
                self._image.unlock()
                raise StaleError(
                    f"{self._image.where}: take_back: there is another generation than {self.generation} by now"
                )
            slots.retire(self._bytes, self.generation)
            self._journal.clear()
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
            self.hand_over()
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
        from .server import Owner, Server

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

    def _forked(self) -> None:
        super()._forked()
        self._turn = threading.Condition(self._lock)
        self._looked_at = False
