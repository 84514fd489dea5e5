"""Images that outlive their process without another one: files on tmpfs, which the next process finds by their name.

They are next to the sockets, `$XDG_RUNTIME_DIR/kho/NAME.live`, or in /dev/shm/kho-UID where that directory is not on
tmpfs or has no room: systemd makes /run/user/UID as large as a tenth of the memory, /dev/shm as half of it.
`KHO_LIVE_DIR` names another one, on any tmpfs. Directories have mode 0700 and belong to this user; one that does not is
not used. A file that is complete gets its name under the lock of the sockets' directory: of several processes that
start at the same time one makes the image.

How much is left is bounded. An image without a commit is removed when it is closed. Next to `MOST` images that no
process has, or to images that take a share of the file system (`SHARE`), no further one is made: the caller uses a
memfd and warns.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...errors import BusyError, KhoError
from ...sizes import format_size
from ..deadline import Deadline
from ..file.image import ImageFile
from ..file.mapping import in_memory
from ..file.trust import private_directory, same_file
from . import sockets

__all__ = ["MOST", "SHARE", "SUFFIX", "Room", "blank_file", "find", "left", "locked", "places", "recognize", "served"]

SUFFIX = ".live"
VARIABLE = "KHO_LIVE_DIR"
"""The environment variable with another directory for images: in a volume of a container, for example."""
MOST = 64
"""Images that no process has, next to which no further one is made."""
SHARE = 2
"""They may take one part in this many of their file system."""


class Room(NamedTuple):
    """A file without a name on tmpfs, and the name that it is to get."""

    fd: int
    path: Path


def places() -> list[Path]:
    """List the directories in which images may be, in the order in which they are used."""
    if (named := os.environ.get(VARIABLE, "")).startswith("/"):
        return [Path(named)]
    return [sockets.folder(), Path(f"/dev/shm/kho-{os.geteuid()}")]


def _file_of(name: str) -> str:
    return sockets.file_of(name).removesuffix(sockets.SUFFIX) + SUFFIX


def find(name: str) -> Path | None:
    """Return the path of the image of a name; None if there is none. Directories of other users are not used."""
    file = _file_of(name)
    for place in places():
        with contextlib.suppress(KhoError, OSError):
            at = private_directory(place, make=False)
            try:
                os.stat(file, dir_fd=at, follow_symlinks=False)
            finally:
                os.close(at)
            return place / file
    return None


@contextlib.contextmanager
def locked(deadline: Deadline) -> Iterator[None]:
    """Hold the lock of the sockets' directory, in which a file of an image gets its name. Raises: BusyError."""
    with sockets.opened(make=True, lock=deadline):
        yield


def blank_file(name: str, size: int) -> Room | str:
    """Make a file for an image, without a name, in the first directory that has room for it.

    Args: size: bytes that the image may get.
    Returns: the file, whose descriptor belongs to the caller; or why there is none, for each directory.
    """
    reasons = []
    for place in places():
        try:
            at = private_directory(place, make=True)
            try:
                fd = os.open(f"/proc/self/fd/{at}", os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
            finally:
                os.close(at)
        except (KhoError, OSError) as error:
            reasons.append(str(error) if isinstance(error, KhoError) else f"{place}: {error.strerror}")
            continue
        reason = _unfit(fd, place, size)
        if reason is None:
            return Room(fd, place / _file_of(name))
        os.close(fd)
        reasons.append(reason)
    return "; ".join(reasons)


def _unfit(fd: int, place: Path, size: int) -> str | None:
    """Return why an image of `size` bytes cannot be left in a directory; None if it can."""
    if not in_memory(fd):
        return f"{place}: not on tmpfs"
    system = os.fstatvfs(fd)
    room = system.f_bavail * system.f_frsize
    if system.f_blocks and room < size:
        return f"{place}: {format_size(room)} free, for an image of up to {format_size(size)}"
    there = [status for path, status in _files(place) if not served(path)]
    taken = sum(status.st_blocks * 512 for status in there)
    share = system.f_blocks * system.f_frsize // SHARE
    if len(there) >= MOST or (share and taken >= share):
        return (
            f"{place}: {len(there)} images that no process has take {format_size(taken)}; `kho ps` lists them, `kho "
            "release NAME` frees one"
        )
    return None


def _files(place: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Iterate over the files of images in a directory of this user."""
    with contextlib.suppress(KhoError, OSError):
        at = private_directory(place, make=False)
        try:
            names = sorted(name for name in os.listdir(f"/proc/self/fd/{at}") if name.endswith(SUFFIX))  # noqa: PTH208
            found = []
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found.append((place / name, os.stat(name, dir_fd=at, follow_symlinks=False)))
        finally:
            os.close(at)
        yield from (entry for entry in found if stat.S_ISREG(entry[1].st_mode))


def served(path: Path) -> bool:
    """Return whether a process answers to the name of an image's file."""
    try:
        conn = sockets.connect_file(path.name.removesuffix(SUFFIX) + sockets.SUFFIX)
    except BusyError:
        return True
    except KhoError:
        return False
    if conn is None:
        return False
    conn.close()
    return True


def left() -> Iterator[tuple[Path, os.stat_result]]:
    """Iterate over the files of this user's images to whose names no process answers."""
    for place in places():
        for path, status in _files(place):
            if not served(path):
                yield path, status


def recognize(image: ImageFile, name: str) -> None:
    """Tell an image whose descriptor was passed where its file is, so that `release` removes it."""
    if image.path is not None or not os.fstat(image.fd).st_nlink:
        return
    path = find(name)
    with contextlib.suppress(OSError):
        if path is not None and same_file(os.fstat(image.fd), path.lstat()):
            image.path, image.kept = path, True
