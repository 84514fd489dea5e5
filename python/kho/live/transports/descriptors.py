"""Descriptors that a process starts with: an image's, and what comes with it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import NamedTuple

from ...errors import KhoError
from ..file import header
from ..file.image import SEALS, blank
from ..file.mapping import punch
from ..oserrors import error_of

__all__ = [
    "FIRST",
    "Inherited",
    "copied",
    "create_memfd",
    "has_superblock",
    "make_safe",
    "require_image",
    "set_inheritable",
]

FIRST = 3
"""The lowest descriptor that is passed: SD_LISTEN_FDS_START of sd_listen_fds(3)."""
STEP = 4 << 20
"""Bytes that are moved at a time."""
MFD_HUGETLB = 0x4
MFD_EXEC = 0x10
"""From Linux 6.3: no F_SEAL_EXEC, whatever vm.memfd_noexec says. The next kernel makes every memfd with mode 0777, and
for an executable file F_SEAL_EXEC stands for the seals against writing as well (memfd_add_seals)."""


class Inherited(NamedTuple):
    """The descriptors of an image that this process was started with."""

    fd: int
    lock_fd: int | None
    """The owner's lock, which this process has kept across exec."""
    listener: int | None
    """The socket of the image's name."""
    transport: str


def create_memfd(name: str, where: str, *, huge: bool = False, kexec: bool = False) -> int:
    """Make a blank memfd for an image, without F_SEAL_EXEC.

    It may cross a kexec, by systemd's store for example, and would come back sealed against writing.

    Args: huge: of huge pages. kexec: refuse a memfd that would come back from a kexec sealed against writing.
    Returns: the descriptor, close-on-exec.  Raises: OutOfMemoryError, AccessError, DescriptorLimitError.
    """
    # The kernel accepts 249 bytes of a name.
    label = f"kho-live:{name.encode()[:200].decode(errors='ignore')}"
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (MFD_HUGETLB if huge else 0)
    try:
        try:
            return os.memfd_create(label, flags | MFD_EXEC)
        except OSError as error:
            # EINVAL: before Linux 6.3, which has no such seal. EACCES: vm.memfd_noexec is 2.
            if error.errno != errno.EINVAL and (kexec or error.errno != errno.EACCES):
                raise
            return os.memfd_create(label, flags)
    except OSError as error:
        hint = "vm.memfd_noexec is 2, and 1 is what kexec=True needs" if error.errno == errno.EACCES else ""
        raise error_of(error, where, "memfd_create", hint) from error


def require_image(fd: int) -> None:
    """Check that a descriptor leads to an image's memfd, or a blank one: its number may have been reused.

    A memfd that came by a kexec has no name (its link is `/ (deleted)`): an image is recognized by its superblock, and
    a memfd by having seals and no link. Raises: OSError.
    """
    status = os.fstat(fd)
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if stat.S_ISREG(status.st_mode) and not status.st_nlink and (has_superblock(fd) or blank(fd)):
            return
    except OSError:  # no memfd, or not open for reading
        pass
    raise OSError(errno.EBADF, f"descriptor {fd} is another file")


def has_superblock(fd: int) -> bool:
    """Return whether a file has the superblock of an image. Raises: OSError."""
    return os.pread(fd, len(header.MAGIC), header.SUPER_AT) == header.MAGIC


def make_safe(fd: int, name: str) -> bool:
    """Restore seals and mode of an image's memfd; the descriptor may lead to another memfd then.

    All kernels lose the mode. Linux 6.19 and 7.0 lose the seals, and the memfd cannot be sealed (F_SEAL_SEAL): it could
    be shrunk under its readers. It is moved to a new one there, in steps, so that little more memory is in use.

    Returns: whether it was moved.  Raises: KhoError if there is no memory for that.
    """
    moved = False
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK:
            if moved := bool(seals & fcntl.F_SEAL_SEAL):
                _move(fd, name)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        os.fchmod(fd, 0o600)
    except KhoError:
        raise
    except OSError:
        pass
    return moved


def _move(fd: int, name: str) -> None:
    """Move a memfd's contents to a new memfd, and let the descriptor lead to that. Raises: KhoError."""
    where = f"memfd {name!r}"
    new = create_memfd(name, where)
    try:
        size, at = os.fstat(fd).st_size, 0
        os.ftruncate(new, size)
        while at < size:
            part = _read(fd, min(STEP, size - at), at)
            # What was preserved has no holes; zeros need no memory here.
            if part.count(0) != len(part):
                done = 0
                while done < len(part):
                    done += os.pwrite(new, memoryview(part)[done:], at + done)
            punch(fd, at, len(part))
            at += len(part)
        os.dup2(new, fd, inheritable=False)
    except OSError as error:
        raise error_of(error, where, "move what a kexec has brought to a memfd that can be sealed") from error
    finally:
        os.close(new)


def _read(fd: int, nbytes: int, at: int) -> bytes:
    """Read up to `nbytes` bytes, at least one. Raises: OSError (EIO) if another process has cut the file there."""
    part = os.pread(fd, nbytes, at)
    if not part:
        raise OSError(errno.EIO, f"the file was cut at {at:#x} while it was read")
    return part


def copied(fd: int, name: str) -> int:
    """Copy an image's file to a new memfd, without its holes; returns its descriptor. Raises: KhoError."""
    where = f"memfd {name!r}"
    new = create_memfd(name, where)
    try:
        size, at = os.fstat(fd).st_size, 0
        os.ftruncate(new, size)
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            end = os.lseek(fd, at, os.SEEK_HOLE)
            while at < end:
                at += os.pwrite(new, _read(fd, min(STEP, end - at), at), at)
        fcntl.fcntl(new, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(new)
        raise error_of(error, where, "copy the image to a memfd") from error
    return new


def set_inheritable(fd: int, inheritable: bool) -> None:
    """Set whether a descriptor stays open across exec. Raises: OSError."""
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFD) if fd >= FIRST else -1
    except OSError:
        flags = -1
    if flags < 0:
        raise OSError(9, f"descriptor {fd} is not open")
    fcntl.fcntl(fd, fcntl.F_SETFD, flags & ~fcntl.FD_CLOEXEC if inheritable else flags | fcntl.FD_CLOEXEC)
