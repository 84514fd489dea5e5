"""The successor's side of a handover: read the offered image, adopt it, confirm; or leave it to its owner."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Callable
from typing import Self

from ...errors import BusyError, FormatError, SourceError
from ...owned import Uncopied
from ..candidate import Candidate
from ..deadline import Deadline
from ..file.image import ImageFile
from ..file.trust import PRIVATE, Policy, same_file
from ..handle import Handle
from . import kept, sockets, wire
from .predecessor import Predecessor

__all__ = ["Offer", "Predecessor", "Ready", "ask"]

Ready = Callable[[Candidate], object]
"""A health check: an exception aborts the handover, and the current owner keeps running."""
LOCK = 5.0
"""Seconds to wait for the lock that the owner has released."""
MOST_PASSED = 9
"""Descriptors: the image's, and the connections of at most 8 earlier owners that may still read."""
GONE = 0.5
"""Seconds to wait for the lock of an owner that has died."""
POLL = 0.02
"""Seconds between two attempts to ask a busy owner."""


class Offer(Uncopied):
    """An image that its owner, or a holder, lets this process read."""

    def __init__(self, conn: socket.socket, pid: int, fd: int, *, store: bool) -> None:
        self.conn = conn
        self.pid = pid
        self.fd = fd
        self.store = store
        """Whether a holder passes it: the process that locks it becomes its owner."""
        self._taken = False

    def keep(self) -> int:
        """Return the descriptor, which belongs to the caller from now on."""
        fd, self.fd = self.fd, -1
        return fd

    def __enter__(self) -> Self:
        """Return this offer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Decline the offer, if it was not taken: the owner goes on."""
        if self.fd >= 0:
            os.close(self.keep())
        if not self._taken:
            self.conn.close()

    def take(
        self,
        name: str,
        version: str,
        ready: Ready | None,
        deadline: Deadline,
        *,
        serve: bool = True,
        policy: Policy = PRIVATE,
    ) -> Handle:
        """Check the image, and adopt it.

        Raises: what `ready` raises; SchemaError; FormatError; BusyError if its owner does not release it. The current
            owner keeps running then.
        """
        image = ImageFile(self.keep(), f"{name!r} of process {self.pid}", policy=policy)
        with Candidate._of(image) as candidate:
            candidate._check_schema(name, version)
            if ready is not None:
                with deadline.suspended():
                    ready(candidate)
            owner = image.owner()
            try:
                with deadline.wait() as seconds:
                    answer, fds = wire.ask(self.conn, {"do": "adopt"}, fds=MOST_PASSED, within=seconds)
            except wire.WireError:
                # The owner has died, and its lock is free; or it has dropped the connection, and still has the lock.
                with deadline.wait(GONE) as seconds:
                    handle = candidate.adopt(seconds, version=version)
                return self._own(handle, deadline, serve=serve)
            conns = [self.conn, *_received(fds, image)]
            self._taken = True
            try:
                predecessor = Predecessor(conns, _pinned(answer.get("pinned"), self.pid), owner)
                with deadline.wait(LOCK) as seconds:
                    handle = candidate.adopt(seconds, version=version, predecessor=predecessor)
            except BaseException:
                for conn in conns:
                    conn.close()
                raise
        handle._ownership.settling = True
        self._own(handle, deadline, serve=serve)
        # The lock decides: this process is the owner, even if the previous one does not receive this.
        with contextlib.suppress(wire.WireError, BusyError), deadline.wait() as seconds:
            wire.ask(self.conn, {"do": "adopted"}, within=seconds)
        handle._ownership.settling = False
        return handle

    def _own(self, handle: Handle, deadline: Deadline, *, serve: bool) -> Handle:
        """Answer to the name; on an error close the image, to which nothing was committed: its owner takes it back."""
        try:
            handle.transport = "socket"
            kept.recognize(handle._image, handle.name)
            if serve:
                handle.serve(replace=True, deadline=deadline)
        except BaseException:
            handle.close()
            raise
        return handle


def _received(fds: list[int], image: ImageFile) -> list[socket.socket]:
    """Sort the descriptors that an owner passes: the image's for writing, and its connections to earlier owners."""
    conns = []
    own = os.fstat(image.fd)
    for fd in fds:
        status = os.fstat(fd)
        if stat.S_ISSOCK(status.st_mode):
            with contextlib.suppress(OSError):
                conns.append(socket.socket(fileno=fd))
                continue
        elif same_file(status, own) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
            os.dup2(fd, image.fd, inheritable=False)
        os.close(fd)
    return conns


def _pinned(given: object, pid: int) -> list[tuple[int, int]]:
    """Check the list of runs of pages that an owner still reads. Raises: FormatError."""
    good: list[tuple[int, int]] = []
    for run in given if isinstance(given, list) else [None]:
        numbers = run if isinstance(run, list) and len(run) == 2 else [None]
        whole = [number for number in numbers if type(number) is int and 0 <= number < 1 << 40]
        if len(whole) != 2 or not whole[1]:
            raise FormatError(f"process {pid}: {str(run)[:60]} is not a run of pages")
        good.append((whole[0], whole[1]))
    return good


def ask(name: str, version: str, deadline: Deadline) -> Offer | None:
    """Ask the process that answers to an image's name for it, and wait while it is busy; None if there is none.

    Raises: BusyError after the deadline; SchemaError, with both versions; SourceError.
    """
    request = {"do": "prepare", "name": name, "version": version}
    while True:
        conn = None
        try:
            conn = sockets.connect(name)
            if conn is None:
                return None
            pid, _ = wire.peer(conn)
            with deadline.wait() as seconds:
                answer, fds = wire.ask(conn, request, fds=1, within=seconds)
        except (BusyError, wire.WireError) as error:
            if conn is not None:
                conn.close()
            if not deadline.left() or not deadline.sleep(POLL):
                raise error if isinstance(error, BusyError) else BusyError(f"{name!r}: {error}") from error
            continue
        except BaseException:
            if conn is not None:
                conn.close()
            raise
        if len(fds) != 1:
            conn.close()
            for fd in fds:
                os.close(fd)
            raise SourceError(f"{name!r}: process {pid} passed no descriptor")
        fcntl.fcntl(fds[0], fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        return Offer(conn, pid, fds[0], store=answer.get("store") is True)
