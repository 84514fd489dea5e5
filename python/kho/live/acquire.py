"""Becoming the owner of an image: adopting one from a path or descriptor, or making a new one."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from pathlib import Path
from typing import NamedTuple

from ..errors import BusyError, StaleError
from .candidate import Candidate
from .deadline import Deadline
from .file.header import HEAD
from .file.image import ImageFile, blank, open_file
from .file.trust import PRIVATE, Policy, check_descriptor, open_directory
from .handle import Handle
from .handover import kept
from .handover.client import Ready
from .oserrors import error_of
from .transports.descriptors import Inherited, create_memfd

__all__ = ["Request", "duplicate", "new_image", "own_descriptor", "own_inherited", "own_left", "own_path"]

HUGE = 2 << 20
RETRY = 0.002
"""Seconds between two attempts when another process has just made or removed the file."""


class Request(NamedTuple):
    """The arguments of `kho.live.open`, checked."""

    name: str
    size: int
    version: str
    ready: Ready | None
    serve: bool | None
    kexec: bool
    """Whether the image is to cross a kexec."""
    asked: int
    """`size` if the caller gave one, or 0: what an existing image is expected to have."""
    huge: bool
    keep: bool
    """Whether a new image is to be found by its name after the end of this process."""
    deadline: Deadline
    policy: Policy


def duplicate(fd: int, where: str) -> int:
    """Duplicate a caller's descriptor; the copy is closed on exec. Raises: SourceError, DescriptorLimitError."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    except (OSError, ValueError, OverflowError) as error:
        failed = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        raise error_of(failed, where) from error


def own_inherited(came: Inherited, request: Request) -> Handle:
    """Own a memfd that this process was passed; the image's descriptor and its lock are the handle's from now on."""
    where = f"{request.name!r} ({came.transport})"
    try:
        new = came.lock_fd is None and _is_blank(came.fd, where, request.policy)
    except BaseException:
        os.close(came.fd)
        raise
    if new:
        # A holder may have set its size (`kho hold --size`).
        size = max(os.fstat(came.fd).st_size - HEAD, 0) or request.size
        handle = _make(came.fd, request._replace(size=size), where, None)
    else:
        handle = _adopt(Candidate._of(ImageFile(came.fd, where, lock_fd=came.lock_fd, policy=request.policy)), request)
    handle.transport = came.transport
    kept.recognize(handle._image, request.name)
    return handle


def own_left(path: Path, request: Request) -> Handle:
    """Own an image that a process has left in its user's directory.

    Raises: BusyError if another process owns or removes it at this moment: look for that process first.
    """
    try:
        image = ImageFile(open_file(path), str(path), path)
        image.kept = True
        try:
            # Before the caller's check is called, which may take long.
            image.lock()
            if kept.served(path):
                # It is between two owners, and not left.
                raise BusyError(f"{path}: a process that answers to its name hands it over at this moment")
        except BaseException:
            image.close()
            raise
        candidate = Candidate._of(image)
        unused = not candidate.generation
        if unused and (candidate.version != request.version or image.sup.size != request.size):
            with candidate:
                candidate.adopt().release()
            raise BusyError(f"{path}: an image without a commit is removed")
        handle = _adopt(candidate, request, 0.0)
    except (FileNotFoundError, StaleError) as error:
        raise BusyError(f"{path}: another process has released it at this moment") from error
    handle.transport = "new" if unused else "file"
    return handle


def own_descriptor(fd: int, request: Request) -> Handle:
    """Own the image in a descriptor's file, or make one there; the descriptor stays the caller's."""
    where = f"descriptor {fd}"
    own = duplicate(fd, where)
    try:
        new = _is_blank(own, where, request.policy)
    except BaseException:
        os.close(own)
        raise
    if new:
        return _make(own, request, where, None)
    return _adopt(Candidate._of(ImageFile(own, where, policy=request.policy)), request)


def own_path(path: Path, request: Request) -> Handle:
    """Own the image at a path, or make one there.

    Raises: BusyError if other processes make and remove the file until the deadline, or own it.
    """
    while True:
        try:
            image = ImageFile(open_file(path, request.policy), str(path), path, policy=request.policy)
        except FileNotFoundError:
            image = None
        except StaleError:
            if not request.deadline.sleep(RETRY):
                raise
            continue
        try:
            if image is not None:
                return _adopt(Candidate._of(image), request)
            return _make(_unlinked_file(path, request.policy), request, str(path), path)
        except (FileExistsError, StaleError) as error:
            # Another process has made or released the image in between.
            if not request.deadline.sleep(RETRY):
                raise BusyError(f"{path}: other processes make and release it all the time") from error


def new_image(request: Request) -> Handle:
    """Make an image: in a file that the next process finds (`Request.keep`), or in a memfd.

    Warns (RuntimeWarning) if it is to be found, and there is no place for its file.
    Raises: BusyError if another process makes it at this moment; OutOfMemoryError, AccessError, DescriptorLimitError.
    """
    if request.keep:
        room = kept.blank_file(request.name, request.size)
        if not isinstance(room, str):
            return _make_left(room, request)
        warnings.warn(
            f"{request.name!r}: the image will be lost if this process ends before another has it, as there is no "
            f"place to leave it: {room}. Take a smaller size=, or a path on tmpfs as backing=; backing='memfd' does "
            "without a place",
            RuntimeWarning,
            stacklevel=5,
        )
    return _new_memfd(request)


def _make_left(room: kept.Room, request: Request) -> Handle:
    """Make an image in a file, and give it its name, unless there is one of that name. Raises: BusyError."""
    handle = _make(room.fd, request, str(room.path), None)
    try:
        with kept.locked(request.deadline):
            if (other := kept.find(request.name)) is not None:
                raise BusyError(f"{other}: another process has made the image at this moment")
            _link(room.fd, room.path, PRIVATE)
    except BaseException:
        handle.close()
        raise
    handle._image.path, handle._image.kept = room.path, True
    return handle


def _new_memfd(request: Request) -> Handle:
    where = f"memfd {request.name!r}"
    fd = create_memfd(request.name, where, huge=request.huge, kexec=request.kexec)
    size = -(-request.size // HUGE) * HUGE if request.huge else request.size
    return _make(fd, request._replace(size=size), where, None)


def _is_blank(fd: int, where: str, policy: Policy) -> bool:
    """Return whether a descriptor's file has no image yet. Raises: SourceError, UntrustedError."""
    check_descriptor(fd, where, policy)
    try:
        return blank(fd)
    except OSError as error:
        raise error_of(error, where, "read") from error


def _adopt(candidate: Candidate, request: Request, timeout: float | None = None) -> Handle:
    """Check a candidate's schema and health, and adopt it; it is closed either way.

    Args: timeout: seconds to wait for its owner; by default until the deadline.
    """
    try:
        candidate._image.keep_free = request.kexec
        candidate._check_schema(request.name, request.version)
        if request.ready is not None:
            with request.deadline.suspended():
                request.ready(candidate)
        return candidate.adopt(request.deadline.left() if timeout is None else timeout, version=request.version)
    finally:
        candidate.close()


def _make(fd: int, request: Request, where: str, path: Path | None) -> Handle:
    """Make an image in a blank file, and lock it before another process can find it."""
    image = ImageFile.create(fd, request.size, request.name, request.version, where)
    image.keep_free = request.kexec
    try:
        if path is not None:
            _link(fd, path, request.policy)
            image.path = path
        return Handle(image, image.committed(), inherited=False)
    except BaseException:
        image.close()
        raise


def _unlinked_file(path: Path, policy: Policy) -> int:
    """Make a file without a name (O_TMPFILE) in the directory of `path`. Raises: SourceError, UntrustedError."""
    try:
        at = open_directory(path, policy)
        try:
            return os.open(f"/proc/self/fd/{at}", os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
        finally:
            os.close(at)
    except OSError as error:
        hint = "tmpfs, ext4 and xfs can do that" if error.errno in (errno.EOPNOTSUPP, errno.EISDIR) else ""
        raise error_of(error, path, f"make a file in {path.parent}", hint) from error


def _link(fd: int, path: Path, policy: Policy) -> None:
    """Give a complete file its name, unless another has it. Raises: FileExistsError; SourceError."""
    try:
        at = open_directory(path, policy)
        try:
            # With a directory's descriptor this is linkat, which follows the link in /proc.
            os.link(f"/proc/self/fd/{fd}", path.name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=True)
        finally:
            os.close(at)
    except FileExistsError:
        raise
    except OSError as error:
        raise error_of(error, path, "give it its name") from error
