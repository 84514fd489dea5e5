"""Ownership state of an image: owner, offered, transferring, transferred."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import BusyError, NotOwnerError

if TYPE_CHECKING:
    from .file.image import ImageFile, State

__all__ = ["Ownership", "Phase", "TransferSource"]

Phase = Literal["owner", "offered", "transferring", "transferred"]


class Ownership:
    """The ownership state of one handle, and the checks that depend on it.

        owner ──offer──> offered ──withdraw──> owner
          │                 └─────release─────┐
          ├──────────────────release──────────┴──> transferred ──reacquire──> owner
          └──begin_transfer──> transferring ──end_transfer──> owner or transferred

    While transferring, a successor reads the image, and calls that begin to change it wait. `release` unlocks the
    image: from then on another process can lock it, and the lock decides which process owns it.

    A handle has one of these, and calls it with the handle's lock held, which is also the lock of its condition.
    """

    def __init__(self, image: ImageFile, lock: threading.RLock) -> None:
        """Start as the owner: the caller has locked the image."""
        self.pid = os.getpid()
        """The process that owns the image; forked children of it do not."""
        self.handed_over = threading.Event()
        self._image = image
        self._ended = threading.Condition(lock)
        """Notified at the end of a transfer, and when the handle is closed."""
        self._owns = True
        self._offered = False
        self._transferring = False
        self.settling = False
        """Whether the previous owner does not know yet that this one has adopted the image: it would take an image that
        is unlocked for a successor back for itself."""
        self._waiting = 0
        """Calls that wait for the end of a transfer before they change the image."""

    @property
    def owns(self) -> bool:
        """Whether this handle holds the image's lock."""
        return self._owns

    @property
    def offered(self) -> bool:
        """Whether commits are refused, because a successor was offered the image."""
        return self._offered

    @property
    def phase(self) -> Phase:
        """The state by name."""
        if self._transferring:
            return "transferring"
        if not self._owns:
            return "transferred"
        return "offered" if self._offered else "owner"

    def require_process(self, what: str) -> None:
        """Check that the handle is open and belongs to this process. Raises: NotOwnerError."""
        where = self._image.where
        if os.getpid() != self.pid:
            raise NotOwnerError(f"{where}: {what}: process {self.pid} is the owner, this is a child of it")
        if self._image.fd < 0:
            raise NotOwnerError(f"{where}: {what}: this handle is closed")

    def require_owner(self, what: str) -> None:
        """Check that this handle owns the image; waits while a successor adopts it. Raises: NotOwnerError."""
        self.require_process(what)
        while self._transferring and not self._owns:
            self._ended.wait(1.0)
            self.require_process(what)
        if not self._owns:
            raise NotOwnerError(f"{self._image.where}: {what}: it was handed over")

    def require_change(self, what: str) -> None:
        """Check that this handle may change the image; waits until a transfer has ended. Raises: NotOwnerError."""
        self._waiting += 1
        try:
            while self._transferring:
                self.require_process(what)
                self._ended.wait(1.0)
        finally:
            self._waiting -= 1
        self.require_owner(what)

    def offer(self) -> None:
        """Refuse commits until `withdraw`. Raises: NotOwnerError."""
        self.require_owner("offer")
        self._offered = True

    def withdraw(self) -> None:
        """Accept commits again. Raises: NotOwnerError."""
        self.require_owner("withdraw")
        self._offered = False

    def begin_transfer(self, uncommitted: int) -> None:
        """Let a successor read the image; changes wait until `end_transfer`.

        Args: uncommitted: number of objects that were changed since the last commit.
        Raises: BusyError if there are any, or the image is offered or being transferred; NotOwnerError.
        """
        self.require_process("look")
        busy = f"{self._image.where}: process {self.pid}"
        if self._waiting and not self._transferring:
            # These calls waited during the last transfer: they go first, or they might wait for ever.
            raise BusyError(f"{busy} is about to change it")
        if self.settling:
            raise BusyError(f"{busy} is still taking it over")
        if uncommitted or self._offered or self._transferring:
            why = f"{uncommitted} changes are not committed" if uncommitted else "it is offered to another"
            raise BusyError(f"{busy} cannot hand over yet: {why}")
        self.require_owner("look")
        self._transferring = True

    @property
    def transferring(self) -> bool:
        """Whether a successor reads the image or adopts it."""
        return self._transferring

    def end_transfer(self) -> None:
        """Let calls that wait for the end of the transfer go on."""
        self._transferring = False
        self._ended.notify_all()

    def release(self) -> None:
        """Unlock the image: another process may acquire it."""
        self._owns = False
        self._image.unlock()

    def reacquire(self) -> None:
        """Be the owner again; the caller has locked the image."""
        self._owns = True
        self._offered = False

    def close(self) -> None:
        """End the ownership with the handle; calls that wait raise NotOwnerError."""
        self._owns = False
        self._ended.notify_all()

    def after_fork(self, lock: threading.RLock) -> None:
        """In a forked child: threads that waited are not in this process."""
        self._ended = threading.Condition(lock)
        self._transferring = False


class TransferSource(Protocol):
    """What the server of an image's name needs of the handle that owns the image."""

    transport: str

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def generation(self) -> int: ...

    def fileno(self) -> int: ...

    def draining(self) -> bool: ...

    def release(self) -> int: ...

    def _committed_facts(self) -> tuple[State, dict[str, int]]:
        """Return what is committed, and the bytes of the image in all and in use; takes no lock."""

    def _begin_transfer(self) -> int:
        """Let a successor read: changes wait until `_end_transfer`. Returns the descriptor, to pass to it."""

    def _transfer(self, most: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Unlock the image for the successor that reads it. Returns pinned runs of pages, and connections to pass."""

    def _end_transfer(self, *, adopted: bool = False) -> None:
        """End a transfer: the successor owns the image, or this process goes on."""
