"""Taking an image over from the process that has it: look, adopt, and say so; or leave it as it was."""

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
from ..deadline import Deadline
from ..file.image import Image
from ..file.trust import PRIVATE, Policy, same_file
from ..handle import Candidate, Handle
from . import sockets, wire

__all__ = ["Offer", "Predecessor", "Ready", "ask"]

Ready = Callable[[Candidate], object]
"""A health check: what it raises keeps the owner before in office."""
LOCK = 5.0
"""Seconds until the lock that was let go of must be had."""
MOST_PASSED = 9
"""The image, and as many processes as may still be draining when it is handed on."""
GONE = 0.5
"""Seconds the lock of who has died may take to be free."""
POLL = 0.02


class Predecessor(Uncopied):
    """The owners before, which may still read what is being replaced: None when called, once they cannot any more.

    Each has a connection open, and so have its forked children; what they have not closed ends with them.
    """

    def __init__(self, conns: list[socket.socket], pinned: list[tuple[int, int]]) -> None:
        self.conns = conns
        self.pinned = pinned
        """Runs of pages, of objects that had been replaced before, which arrays of theirs look at."""

    def __call__(self) -> Predecessor | None:
        """Say whether any of them may be reading."""
        for conn in list(self.conns):
            try:
                if conn.recv(64, socket.MSG_DONTWAIT):
                    continue
            except BlockingIOError:
                continue
            except OSError:
                pass
            conn.close()
            self.conns.remove(conn)
        return self if self.conns else None

    def close(self) -> None:
        """Stop watching."""
        while self.conns:
            self.conns.pop().close()


class Offer(Uncopied):
    """An image that its owner, or a holder, lets this process look at."""

    def __init__(self, conn: socket.socket, pid: int, fd: int, *, store: bool) -> None:
        self.conn = conn
        self.pid = pid
        self.fd = fd
        self.store = store
        """Nobody owns it: whoever gets its lock does."""
        self._taken = False

    def keep(self) -> int:
        """Give the descriptor, which is the caller's from now on."""
        fd, self.fd = self.fd, -1
        return fd

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Decline, if it was not taken: the owner goes on."""
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
        """Look at it, and adopt it if it is fit.

        Raises: what `ready` does; SchemaError; FormatError; BusyError if its owner does not let go. The owner before
            goes on then.
        """
        image = Image(self.keep(), f"{name!r} of process {self.pid}", policy=policy)
        with Candidate.of(image) as candidate:
            candidate.check(name, version)
            if ready is not None:
                with deadline.suspended():
                    ready(candidate)
            try:
                with deadline.wait() as seconds:
                    answer, fds = wire.ask(self.conn, {"do": "adopt"}, fds=MOST_PASSED, within=seconds)
            except wire.WireError:
                # It has died, and its lock with it; or it had no more patience, and is the owner still.
                with deadline.wait(GONE) as seconds:
                    handle = candidate.adopt(seconds, version=version)
                return self._own(handle, deadline, serve=serve)
            conns = [self.conn, *_received(fds, image)]
            self._taken = True
            try:
                predecessor = Predecessor(conns, _pinned(answer.get("pinned"), self.pid))
                with deadline.wait(LOCK) as seconds:
                    handle = candidate.adopt(seconds, version=version, predecessor=predecessor)
            except BaseException:
                for conn in conns:
                    conn.close()
                raise
        self._own(handle, deadline, serve=serve)
        # Who has the lock is the owner, whether the one before hears of it or not.
        with contextlib.suppress(wire.WireError, BusyError), deadline.wait() as seconds:
            wire.ask(self.conn, {"do": "adopted"}, within=seconds)
        return handle

    def _own(self, handle: Handle, deadline: Deadline, *, serve: bool) -> Handle:
        """Answer to the name; if that cannot be, leave the image, which nothing was committed to, to its owner."""
        try:
            handle.transport = "socket"
            if serve:
                handle.serve(replace=True, deadline=deadline)
        except BaseException:
            handle.close()
            raise
        return handle


def _received(fds: list[int], image: Image) -> list[socket.socket]:
    """Sort what an owner passes when it lets go: the image for writing, and its connections to owners before it."""
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
    """Check which runs of pages an owner still looks at."""
    good: list[tuple[int, int]] = []
    for run in given if isinstance(given, list) else [None]:
        numbers = run if isinstance(run, list) and len(run) == 2 else [None]
        whole = [number for number in numbers if type(number) is int and 0 <= number < 1 << 40]
        if len(whole) != 2 or not whole[1]:
            raise FormatError(f"process {pid}: {str(run)[:60]} is no run of pages")
        good.append((whole[0], whole[1]))
    return good


def ask(name: str, version: str, deadline: Deadline) -> Offer | None:
    """Ask who has an image for it, and wait for one's turn until the deadline; None if no process has.

    Raises: BusyError; SchemaError, with both versions; SourceError.
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
