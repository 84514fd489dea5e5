"""Mappings of files, and allocation and punching of the file's memory, with kho's errors.

`mmap.mmap` duplicates the descriptor for each mapping, and its memoryviews cannot be referenced weakly. Here each view
has an exporter that can be: memory is reused only after the last array that shows it is gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Self

from ..._kho import FileMapping, punch_hole
from ...formats.live import PAGE
from ...owned import Uncopied
from ..oserrors import error_of
from .memory import huge_pool

__all__ = ["Mapping", "allocate", "in_memory", "punch"]

UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}
"""EPERM is that of a memfd that a live update session preserves, as its pages are frozen."""
LATER = {errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.ENOMEM}
"""Errors for which punching is put off: a full file system may need a block to record the hole."""
ZEROS = 1 << 20
"""Bytes that one write stores where a file system cannot allocate."""


class Mapping(Uncopied, FileMapping):
    """A shared mapping of a part of a file; unmapped when the last view is gone."""

    keeps: list[object]
    """Objects that must live as long as a view of this."""

    def __new__(cls, fd: int, offset: int, size: int, *, writable: bool) -> Self:
        """Map `size` bytes from `offset`. Raises: OutOfMemoryError (ENOMEM); SourceError."""
        try:
            made = super().__new__(cls, fd, offset, size, writable=writable)
        except OSError as error:
            raise error_of(error, f"map {size:#x} bytes", pool=huge_pool(fd)) from error
        made.keeps = []
        return made

    def view(self, at: int, nbytes: int) -> memoryview:
        """Return a view of mapped bytes. Raises: OutsideMemoryError."""
        return memoryview(self.exporter(at, nbytes))

    def update(self, at: int, data: bytes) -> int:
        """Store the pages of `data` that differ from those at `at`; returns how many. Raises: OutsideMemoryError.

        Cache lines that are not written stay in the caches of the processors on which readers read them.
        """
        view, stored = self.view(at, len(data)), 0
        for begin in range(0, len(data), PAGE):
            piece = data[begin : begin + PAGE]
            if bytes(view[begin : begin + PAGE]) != piece:
                view[begin : begin + PAGE] = piece
                stored += 1
        return stored

    def flush(self, at: int, nbytes: int) -> None:
        """Flush bytes to the medium of the file, if it has one (msync). Raises: SourceError; OutsideMemoryError."""
        try:
            super().flush(at, nbytes)
        except OSError as error:
            raise error_of(error, "msync") from error


def in_memory(fd: int) -> bool:
    """Return whether a file is on tmpfs or hugetlbfs, or a memfd: only these have seals, and no medium."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def punch(fd: int, offset: int, nbytes: int) -> bool:
    """Free a part of a file (FALLOC_FL_PUNCH_HOLE), which reads as zeros then; False if the file does not support it.

    On a full file system the part may stay allocated, which is not an error.
    Raises: SourceError.
    """
    if nbytes <= 0:
        return True
    try:
        punch_hole(fd, offset, nbytes)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        if error.errno not in LATER:
            raise error_of(error, f"give back {nbytes:#x} bytes at {offset:#x}") from error
    return True


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Allocate the blocks of a part of a file: without them, an access through a mapping may be a SIGBUS.

    The contents stay. On a file system that cannot allocate, zeros are written to the holes.
    Raises: OSError, usually ENOSPC; a part may have been allocated then.
    """
    while nbytes > 0:
        try:
            os.posix_fallocate(fd, offset, nbytes)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno == errno.EPERM:
                return  # a live update session preserves the file, and has allocated all of its pages
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            _write_zeros(fd, offset, nbytes)
        return


def _write_zeros(fd: int, offset: int, nbytes: int) -> None:
    end = offset + nbytes
    while offset < end:
        # On a file system without holes everything counts as data.
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end
        while offset < min(data, end):
            offset += os.pwrite(fd, bytes(min(ZEROS, min(data, end) - offset)), offset)
        if offset < end:
            offset = os.lseek(fd, offset, os.SEEK_HOLE)
