"""Mappings of files with weakly referenced views, and allocation and punching of the file's memory.

`mmap.mmap` duplicates the descriptor for each mapping, and its memoryviews cannot be referenced weakly. Here each view
has an exporter that can be: memory is reused only after the last array that shows it is gone.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Any

from ...errors import OutsideMemoryError
from ...owned import Uncopied
from ..oserrors import error_of
from .memory import huge_pool

__all__ = ["Mapping", "allocate", "punch"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

MAP_FAILED = ctypes.c_void_p(-1).value
MS_SYNC = 4
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
UNSUPPORTED = {95, 38, 1}
"""EOPNOTSUPP, ENOSYS; EPERM of a memfd that a live update session preserves, as its pages are frozen."""
LATER = {errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.ENOMEM}
"""Errors for which punching is put off: a full file system may need a block to record the hole."""
ZEROS = 1 << 20
"""Bytes that one write stores where a file system cannot allocate."""


class Mapping(Uncopied):
    """A shared mapping of a part of a file; unmapped when the last view is gone."""

    def __init__(self, fd: int, offset: int, size: int, *, writable: bool) -> None:
        """Map `size` bytes from `offset`. Raises: OutOfMemoryError (ENOMEM); SourceError."""
        self.size = 0
        self.keeps: list[object] = []
        """Objects that must live as long as a view of this."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, offset)
        if address is None or address == MAP_FAILED:
            error = ctypes.get_errno()
            raise error_of(OSError(error, os.strerror(error)), f"map {size:#x} bytes", pool=huge_pool(fd))
        self.address: int = address
        self.size = size
        self._munmap = _libc.munmap

    def exporter(self, at: int, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
        """Return an object that exports `nbytes` at offset `at` as a buffer, and lives as long as any view of it.

        Raises: OutsideMemoryError.
        """
        if at < 0 or nbytes < 0 or at + nbytes > self.size:
            raise OutsideMemoryError(f"{nbytes:#x} bytes at {at:#x} are not in a mapping of {self.size:#x}")
        made: Any = (ctypes.c_ubyte * nbytes).from_address(self.address + at)
        made.mapping = self
        return made  # type: ignore[no-any-return]

    def view(self, at: int, nbytes: int) -> memoryview:
        """Return a view of mapped bytes. Raises: OutsideMemoryError."""
        return memoryview(self.exporter(at, nbytes)).cast("B")

    def flush(self, at: int, nbytes: int) -> None:
        """Flush bytes to the medium of the file, if it has one (msync). Raises: SourceError."""
        first = at // mmap.PAGESIZE * mmap.PAGESIZE
        if _libc.msync(self.address + first, at + nbytes - first, MS_SYNC):
            error = ctypes.get_errno()
            raise error_of(OSError(error, os.strerror(error)), "msync")

    def __del__(self) -> None:
        """Unmap."""
        if self.size:
            self._munmap(self.address, self.size)


def punch(fd: int, offset: int, nbytes: int) -> bool:
    """Free a part of a file (FALLOC_FL_PUNCH_HOLE), which reads as zeros then; False if the file does not support it.

    On a full file system the part may stay allocated, which is not an error.
    Raises: SourceError.
    """
    if nbytes <= 0 or not _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, nbytes):
        return True
    error = ctypes.get_errno()
    if error in UNSUPPORTED:
        return False
    if error in LATER:
        return True
    raise error_of(OSError(error, os.strerror(error)), f"give back {nbytes:#x} bytes at {offset:#x}")


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
