"""Where the sockets of this user's services are: `$XDG_RUNTIME_DIR/kho/NAME.sock`, in a directory nobody else enters.

A socket that nobody answers at is what a process that was killed left behind; whoever comes by next removes it. The
directory's `flock` is held, for moments, while a socket is put there or taken away: of those who begin a service at the
same time one finds the other's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from ..errors import BusyError, SourceError

__all__ = ["Published", "connect", "entries", "folder", "publish", "retract", "trusted"]

SUFFIX = ".sock"
LOCKED = 5.0
"""Seconds to wait for the directory's lock."""


def trusted(uid: int) -> bool:
    """Say whether a process of that user may take part: this user's and root's may."""
    return uid in (0, os.geteuid())


def folder() -> Path:
    """Say where the sockets are."""
    if (named := os.environ.get("XDG_RUNTIME_DIR")) and named.startswith("/"):
        return Path(named) / "kho"
    uid = os.geteuid()
    for base in (Path(f"/run/user/{uid}"), Path("/run")):
        if base.is_dir() and os.access(base, os.W_OK):
            return base / "kho"
    return Path(f"/tmp/kho-{uid}")


def file_of(name: str) -> str:
    """Give a service's file name: the name as far as it can be one, with a digest where it cannot."""
    plain = quote(name, safe=" @+,=", errors="surrogateescape").replace(".", "%2E")
    if len(plain) > 64:
        plain = f"{plain[:40]}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
    return plain + SUFFIX


@contextmanager
def opened(*, make: bool, lock: bool) -> Iterator[int]:
    """Open the directory. Raises: FileNotFoundError; SourceError if it is not this user's alone; BusyError."""
    here = folder()
    if make:
        try:
            here.mkdir(0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise SourceError(
                f"{here}: {error.strerror}; set XDG_RUNTIME_DIR to a directory of your own, or open with serve=False"
            ) from error
    try:
        fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(f"{here}: {error.strerror}; it must be a directory of your own") from error
    try:
        status = os.fstat(fd)
        if not trusted(status.st_uid) or status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise SourceError(f"{here}: of user {status.st_uid}, mode {mode:#o}; it must be yours alone: mode 0o700")
        if lock:
            _lock(fd, here)
        yield fd
    finally:
        os.close(fd)


def _lock(fd: int, here: Path) -> None:
    until = time.monotonic() + LOCKED
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise BusyError(f"{here}: another process has had it locked for {LOCKED:g} s") from error
            time.sleep(0.002)
        else:
            return


def _connected(at: int, file: str) -> socket.socket | None:
    """Connect to a socket; None if there is none, or nobody at it."""
    conn = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        conn.connect(f"/proc/self/fd/{at}/{file}")
    except OSError as error:
        conn.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.EPROTOTYPE):
            return None
        if error.errno == errno.EAGAIN:
            raise BusyError(f"{folder() / file}: too many wait for an answer there; try again") from error
        raise SourceError(f"{folder() / file}: {error.strerror}") from error
    return conn


def connect(name: str) -> socket.socket | None:
    """Connect to who has a service; None if nobody has. Raises: SourceError, BusyError."""
    try:
        with opened(make=False, lock=False) as at:
            return _connected(at, file_of(name))
    except FileNotFoundError:
        return None


def entries() -> Iterator[tuple[Path, socket.socket]]:
    """List the sockets that somebody answers at, and remove the others. Raises: SourceError, BusyError."""
    try:
        with opened(make=False, lock=True) as at:
            files = sorted(file for file in os.listdir(at) if file.endswith(SUFFIX))  # noqa: PTH208 - a descriptor
            found = []
            for file in files:
                conn = _connected(at, file)
                if conn is None:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(file, dir_fd=at)
                else:
                    found.append((folder() / file, conn))
    except FileNotFoundError:
        return
    yield from found


class Published:
    """A socket with a service's name."""

    def __init__(self, name: str, listener: socket.socket, ident: tuple[int, int]) -> None:
        self.name = name
        self.listener = listener
        self.ident = ident
        """Device and inode of the name, which tell whether it is still this one's."""


def publish(name: str, *, replace: bool) -> Published:
    """Listen at a service's name.

    Args: replace: in place of who listens there: for the owner of the image, whom it belongs to now.
    Raises: BusyError if another process listens there; SourceError.
    """
    file = file_of(name)
    temporary = f".{os.getpid()}{SUFFIX}.new"
    with opened(make=True, lock=True) as at:
        _tidy(at)
        conn = None if replace else _connected(at, file)
        if conn is not None:
            conn.close()
            raise BusyError(f"{folder() / file}: another process has {name!r} meanwhile")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            # Nobody is let in before it listens, so the mode is right from the first moment.
            listener.bind(f"/proc/self/fd/{at}/{temporary}")
            os.chmod(temporary, 0o600, dir_fd=at)
            listener.listen(64)
            status = os.stat(temporary, dir_fd=at)
            os.rename(temporary, file, src_dir_fd=at, dst_dir_fd=at)
        except OSError as error:
            listener.close()
            raise SourceError(f"{folder() / file}: {error.strerror}") from error
        return Published(name, listener, (status.st_dev, status.st_ino))


def _tidy(at: int) -> None:
    """Remove what those left who were killed while they had the lock."""
    for file in os.listdir(at):
        if re.fullmatch(rf"\.\d+{re.escape(SUFFIX)}\.new", file):
            with contextlib.suppress(OSError):
                os.unlink(file, dir_fd=at)


def holds(published: Published) -> bool:
    """Say whether a name is still this one's."""
    with contextlib.suppress(OSError, BusyError), opened(make=False, lock=False) as at:
        status = os.stat(file_of(published.name), dir_fd=at)
        return (status.st_dev, status.st_ino) == published.ident
    return False


def retract(published: Published) -> None:
    """Listen no more, and take the name away if it is still this one's."""
    published.listener.close()
    file = file_of(published.name)
    with contextlib.suppress(OSError, BusyError), opened(make=False, lock=True) as at:
        status = os.stat(file, dir_fd=at)
        if (status.st_dev, status.st_ino) == published.ident:
            os.unlink(file, dir_fd=at)
