"""Locks that keep the memory of generations which are still read, on bytes far beyond the end of the image's file.

A reader takes a shared lock of an *open file description* (`F_OFD_SETLK`) on the byte that stands for its generation.
The description, and the lock with it, lasts until every descriptor and every mapping of it is gone, in this process and
in its forked children. So an array that is held keeps its generation, the locks of a killed process are released
immediately, and no cleanup is needed.

    READERS + g     generation g is being read
    FORKS + g       a child was forked while g was committed; it may also see objects that were not committed then
    WRITERS + g     the same, and there are writable arrays of objects that were not committed
    PRESENT         the owner, always: see below

Reader: read the slot; lock its generation's byte; read the slot again. If it is still filled, the generation is kept;
if not, unlock and start again. Owner: store the word, empty the slot of the previous generation, then query the locks
on it. If the query comes after the reader's lock, the owner keeps the memory; if it comes before, the reader finds the
slot empty. This needs each side's store to be visible before its load: both go through the spinlock of the inode's list
of locks. The kernel skips that spinlock for F_OFD_GETLK on a file without any lock, so the owner always holds one
(PRESENT).

Only generations that are read are kept: memory that belonged to the generations from `born` up to but not including
`freed` can be reused once no lock is in that interval. A reader that never ends costs the memory of its own generation,
however many commits follow.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from bisect import bisect_left
from contextlib import suppress

from ...errors import BusyError, SourceError
from ..oserrors import error_of

__all__ = ["FORKS", "GENERATIONS", "NONE", "READERS", "WRITERS", "Held", "Pin", "held", "present"]

GENERATIONS = 1 << 59
"""Generations are less than this, so that the bytes that stand for them are valid file offsets."""
READERS = 1 << 62
FORKS = READERS + GENERATIONS
WRITERS = FORKS + GENERATIONS
PRESENT = WRITERS + GENERATIONS
UNSUPPORTED = {errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors of a file system without such locks."""
MOST_PROBES = 512
"""Queries of `held`; generations that were not queried by then count as held."""
_FLOCK = struct.Struct("@hhqqi4x")
"""`struct flock` where off_t has 64 bits: l_type, l_whence, l_start, l_len, l_pid."""


def _flock(kind: int, at: int, n: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, at, n, 0)


class Pin:
    """An open file description of an image's file, with locks on it that last as long as it or a mapping of it."""

    def __init__(self, fd: int, where: str, *, writable: bool = False) -> None:
        """Open the file again. Raises: SourceError."""
        self.where = where
        self.supported = True
        """Whether the file system has such locks; True until a lock fails."""
        try:
            flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
            self.fd = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError as error:
            self.fd = -1
            raise error_of(error, where, "open it again") from error

    def take(self, at: int) -> bool:
        """Lock a byte; returns False where the file system has no such locks.

        Raises: BusyError if a process holds a write lock on it; SourceError.
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
        """Close the descriptor; the locks last as long as a mapping of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        """Close."""
        if hasattr(self, "fd"):
            self.close()


def present(fd: int) -> bool:
    """Lock the owner's byte (PRESENT); returns False where the file system has no such locks."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, PRESENT, 1))
    except OSError:
        return False
    return True


class Held:
    """Generations that are locked, as ascending disjoint runs."""

    __slots__ = ("_runs",)

    def __init__(self, runs: list[tuple[int, int]]) -> None:
        self._runs = runs

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return bool(self._runs)

    def any_of(self, first: int, end: int) -> bool:
        """Return whether one of the generations from `first` up to but not including `end` is locked."""
        before = bisect_left(self._runs, (end,))
        return first < end and before > 0 and self._runs[before - 1][1] > first


NONE = Held([])


def held(fd: int, region: int, first: int, end: int) -> Held:
    """Query the generations, from `first` up to but not including `end`, that other descriptions than `fd`'s lock.

    A hostile process may lock any number of them: after `MOST_PROBES` queries the rest counts as locked.
    """
    ask = [(max(first, 0), min(end, PRESENT - region))]
    runs: list[tuple[int, int]] = []
    # Few function calls: an owner that is being read queries two or three times per commit.
    for _ in range(MOST_PROBES):
        if not ask:
            break
        low, high = ask.pop()
        if low >= high:
            continue
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, region + low, high - low, 0)
        try:
            kind, _, at, n, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))
        except OSError:
            return NONE
        if kind == fcntl.F_UNLCK:
            continue
        start, stop = at - region, high if n == 0 else at - region + n
        runs.append((max(low, start), min(high, stop)))
        if start > low:
            ask.append((low, start))
        if stop < high:
            ask.append((stop, high))
    if not runs:
        return NONE
    runs += ask
    runs.sort()
    return Held(runs)
