"""Which generations of an image are still being read: locks on bytes far beyond the end of its file.

A reader takes a shared lock of an *open file description* (`F_OFD_SETLK`) on the byte that stands for its generation.
The description lives until every descriptor and every mapping of it is gone, in this process and in its forked
children, and the lock with it: an array that is still held keeps its generation, a process that is killed
gives it up, and nothing has to be tidied up.

    READERS + g     generation g is being read
    FORKS + g       a child was forked while g was committed; it may also see objects that were not committed then
    WRITERS + g     the same, and of objects that were not committed there are writable arrays
    PRESENT         the owner, always: see below

Reader: read the slot; lock its generation's byte; read the slot once more. If it is still there, the generation is
kept; if not, unlock and begin again. Owner: store the word, retire the slot of the generation before, then ask who
holds a lock on it. Either the owner's question comes after the lock, and it keeps the memory; or before it, and the
reader finds the slot retired. This needs each side's store to be visible before its load: both go through the
spinlock of the inode's list of locks. The kernel skips that spinlock for F_OFD_GETLK on a file without any lock, which
is why the owner holds one of its own (PRESENT).

A generation is kept for as long as it is read, and no other: memory that was committed from generation `born` to
before generation `freed` can be used again once no lock is in that interval. A reader that never ends costs what its
own generation holds, however many commits come after it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from bisect import bisect_right
from contextlib import suppress

from ...errors import BusyError, SourceError
from ..oserrors import error_of

__all__ = ["FORKS", "GENERATIONS", "READERS", "WRITERS", "Held", "Pin", "held", "present"]

GENERATIONS = 1 << 59
"""A generation is below this, so that its bytes are offsets that a file can have."""
READERS = 1 << 62
FORKS = READERS + GENERATIONS
WRITERS = FORKS + GENERATIONS
PRESENT = WRITERS + GENERATIONS
UNSUPPORTED = {errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system without such locks says."""
MOST_PROBES = 512
"""Questions to the kernel about who holds what; whatever is left then counts as held."""
_FLOCK = struct.Struct("@hhqqi4x")
"""`struct flock` where off_t has 64 bits: l_type, l_whence, l_start, l_len, l_pid."""


def _flock(kind: int, at: int, n: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, at, n, 0)


class Pin:
    """An open file description of an image's file, and the locks on it: they end with it and its mappings."""

    def __init__(self, fd: int, where: str, *, writable: bool = False) -> None:
        """Open the file once more. Raises: SourceError."""
        self.where = where
        self.supported = True
        """Whether the file system has such locks, as far as is known."""
        try:
            flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
            self.fd = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError as error:
            self.fd = -1
            raise error_of(error, where, "open it again") from error

    def take(self, at: int) -> bool:
        """Lock a byte; False where the file system has no such locks.

        Raises: BusyError if a process has locked it against readers; SourceError.
        """
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, at, 1))
        except OSError as error:
            if error.errno in UNSUPPORTED:
                self.supported = False
                return False
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BusyError(
                    f"{self.where}: a process holds a write lock where readers lock, which no kho does; /proc/locks "
                    "lists it by the file's inode"
                ) from error
            raise SourceError(f"{self.where}: lock for reading: {error.strerror}") from error
        return True

    def drop(self, at: int, n: int = 1) -> None:
        """Unlock bytes."""
        with suppress(OSError):
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, at, n))

    def drop_all(self) -> None:
        """Unlock everything."""
        self.drop(READERS, PRESENT - READERS)

    def close(self) -> None:
        """Close the descriptor; the locks stay as long as a mapping of it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        """Close."""
        if hasattr(self, "fd"):
            self.close()


def present(fd: int) -> bool:
    """Mark a description as an owner's, for as long as it is open; False where the file system has no such locks."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, PRESENT, 1))
    except OSError:
        return False
    return True


class Held:
    """Generations that are held, as ascending disjoint runs."""

    def __init__(self, runs: list[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in runs]
        self._ends = [end for _, end in runs]

    def __bool__(self) -> bool:
        """Say whether there is any."""
        return bool(self._starts)

    def any_of(self, first: int, end: int) -> bool:
        """Say whether one of `first..end` is held."""
        before = bisect_right(self._starts, end - 1)
        return first < end and before > 0 and self._ends[before - 1] > first


def held(fd: int, region: int, first: int, end: int) -> Held:
    """Ask which generations of `first..end` other descriptions than `fd`'s hold locks on.

    A hostile process may hold any number of them: after `MOST_PROBES` questions the rest counts as held.
    """
    first, end = max(first, 0), min(end, PRESENT - region)
    runs: list[tuple[int, int]] = []
    ask = [(first, end)] if first < end else []
    for _ in range(MOST_PROBES):
        if not ask:
            break
        low, high = ask.pop()
        try:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, region + low, high - low))
        except OSError:
            return Held([])
        kind, _, at, n, _ = _FLOCK.unpack(answer)
        if kind == fcntl.F_UNLCK:
            continue
        start = max(at - region, low)
        stop = high if n == 0 else min(at + n - region, high)
        runs.append((start, stop))
        ask += [(a, b) for a, b in ((low, start), (stop, high)) if a < b]
    return Held(sorted(runs + ask))
