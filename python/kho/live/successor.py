"""Taking an image over from the process that has it: look, adopt, and say so; or leave it as it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from typing import Self

from ..errors import BusyError, FormatError, SourceError
from . import runtime, wire
from .handle import Candidate, Handle
from .image import Image

__all__ = ["Offer", "Predecessor", "Ready", "ask"]

Ready = Callable[[Candidate], object]
"""A health check: what it raises keeps the owner before in office."""
LOCK = 5.0
"""Seconds until the lock that was let go of must be had."""
MOST_PASSED = 8
"""Processes that may still be draining when an image is handed on."""
GONE = 0.5
"""Seconds the lock of who has died may take to be free."""
POLL = 0.02


class Predecessor:
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


class Offer:
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

    def take(self, name: str, version: str, ready: Ready | None, *, serve: bool = True) -> Handle:
        """Look at it, and adopt it if it is fit.

        Raises: what `ready` does; SchemaError; FormatError; BusyError if its owner does not let go. The owner before
            goes on then.
        """
        image = Image(self.keep(), f"{name!r} of process {self.pid}")
        with Candidate.of(image) as candidate:
            candidate.check(name, version)
            if ready is not None:
                ready(candidate)
            try:
                answer, fds = wire.ask(self.conn, {"do": "adopt"}, fds=MOST_PASSED)
            except wire.WireError:
                # It has died, and its lock with it; or it had no more patience, and is the owner still.
                return self._own(candidate.adopt(GONE, version=version), serve=serve)
            conns = [self.conn, *_sockets(fds)]
            self._taken = True
            try:
                predecessor = Predecessor(conns, _pinned(answer.get("pinned"), self.pid))
                handle = candidate.adopt(LOCK, version=version, predecessor=predecessor)
            except BaseException:
                for conn in conns:
                    conn.close()
                raise
        self._own(handle, serve=serve)
        # Who has the lock is the owner, whether the one before hears of it or not.
        with contextlib.suppress(wire.WireError, BusyError):
            wire.ask(self.conn, {"do": "adopted"})
        return handle

    def _own(self, handle: Handle, *, serve: bool) -> Handle:
        """Answer to the name; if that cannot be, leave the image, which nothing was committed to, to its owner."""
        try:
            handle.transport = "socket"
            if serve:
                handle.serve(replace=True)
        except BaseException:
            handle.close()
            raise
        return handle


def _sockets(fds: list[int]) -> list[socket.socket]:
    conns = []
    for fd in fds:
        try:
            conns.append(socket.socket(fileno=fd))
        except OSError:
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


def ask(name: str, version: str, until: float) -> Offer | None:
    """Ask who has an image for it, and wait for one's turn until then; None if nobody has.

    Raises: BusyError; SchemaError, with both versions; SourceError.
    """
    while True:
        conn = runtime.connect(name)
        if conn is None:
            return None
        try:
            pid, _ = wire.peer(conn)
            answer, fds = wire.ask(conn, {"do": "prepare", "name": name, "version": version}, fds=1)
        except (BusyError, wire.WireError) as error:
            conn.close()
            if time.monotonic() >= until:
                raise error if isinstance(error, BusyError) else BusyError(f"{name!r}: {error}") from error
            time.sleep(POLL)
            continue
        except BaseException:
            conn.close()
            raise
        if len(fds) != 1:
            conn.close()
            raise SourceError(f"{name!r}: process {pid} passed no descriptor")
        fcntl.fcntl(fds[0], fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        return Offer(conn, pid, fds[0], store=answer.get("store") is True)
