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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from ...errors import BusyError, KhoError
from ..deadline import Deadline
from ..file.trust import private_directory, trusted
from ..oserrors import error_of

__all__ = ["Published", "connect", "entries", "folder", "publish", "retract", "trusted"]

SUFFIX = ".sock"
LOCKED = 5.0
"""Seconds to wait for the directory's lock, for who has no deadline of its own."""
HINT = "set XDG_RUNTIME_DIR to a directory of your own, or open with serve=False"


def folder() -> Path:
    """Say where the sockets are: where XDG_RUNTIME_DIR says, if it names a directory, or one of the usual places."""
    if (named := os.environ.get("XDG_RUNTIME_DIR")) and named.startswith("/") and os.path.isdir(named):  # noqa: PTH112
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
def opened(*, make: bool, lock: Deadline | None = None) -> Iterator[int]:
    """Open the directory.

    Args: lock: have its lock before that deadline.
    Raises: FileNotFoundError; UntrustedError if it is not this user's alone; SourceError; BusyError.
    """
    here = folder()
    found = private_directory(here, make=make, hint=HINT)
    try:
        fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise error_of(error, here, "open the directory", HINT) from error
    finally:
        os.close(found)
    try:
        if lock is not None:
            _lock(fd, here, lock)
        yield fd
    finally:
        os.close(fd)


def _lock(fd: int, here: Path, deadline: Deadline) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not deadline.sleep(0.002):
                raise BusyError(
                    f"{here}: {_holder_of(fd)} has it locked, which is for moments only; end that process, or let "
                    "it go on (SIGCONT)"
                ) from error
        except OSError as error:
            raise error_of(error, here, "lock") from error
        else:
            return


def _holder_of(fd: int) -> str:
    """Name the process that has a file locked, as the kernel's table of locks tells."""
    status = os.fstat(fd)
    inode = f":{status.st_ino}"
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(inode) and int(words[4]) > 0:
                state = Path(f"/proc/{words[4]}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                return f"process {words[4]}" + (", which is stopped," if state in "Tt" else "")
    return "another process"


def _connected(at: int, file: str) -> socket.socket | None:
    """Connect to a socket; None if there is none, or nobody at it."""
    conn = _socket(folder() / file)
    try:
        conn.connect(f"/proc/self/fd/{at}/{file}")
    except OSError as error:
        conn.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.EPROTOTYPE):
            return None
        if error.errno == errno.EAGAIN:
            raise BusyError(f"{folder() / file}: too many wait for an answer there; try again") from error
        raise error_of(error, folder() / file, "connect") from error
    return conn


def _socket(where: Path) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise error_of(error, where, "make a socket") from error


def connect(name: str) -> socket.socket | None:
    """Connect to who has a service; None if nobody has. Raises: SourceError, BusyError."""
    try:
        with opened(make=False) as at:
            return _connected(at, file_of(name))
    except FileNotFoundError:
        return None


def entries() -> Iterator[tuple[Path, socket.socket]]:
    """List the sockets that somebody answers at, and remove the others. Raises: SourceError, BusyError."""
    try:
        with opened(make=False, lock=Deadline(LOCKED)) as at:
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


def publish(name: str, *, replace: bool, deadline: Deadline | None = None) -> Published:
    """Listen at a service's name.

    Args: replace: in place of who listens there: for the owner of the image, whom it belongs to now. deadline: until
        when to wait for the directory's lock; by default `LOCKED` seconds.
    Raises: BusyError if another process listens there; SourceError.
    """
    file = file_of(name)
    temporary = f".{os.getpid()}{SUFFIX}.new"
    with opened(make=True, lock=deadline or Deadline(LOCKED)) as at:
        _tidy(at)
        conn = None if replace else _connected(at, file)
        if conn is not None:
            conn.close()
            raise BusyError(f"{folder() / file}: another process has {name!r} meanwhile")
        listener = _socket(folder() / file)
        try:
            # Nobody is let in before it listens, so the mode is right from the first moment.
            listener.bind(f"/proc/self/fd/{at}/{temporary}")
            os.chmod(temporary, 0o600, dir_fd=at)
            listener.listen(64)
            status = os.stat(temporary, dir_fd=at)
            os.rename(temporary, file, src_dir_fd=at, dst_dir_fd=at)
        except OSError as error:
            listener.close()
            raise error_of(error, folder() / file, "listen", HINT) from error
        return Published(name, listener, (status.st_dev, status.st_ino))


def _tidy(at: int) -> None:
    """Remove what those left who were killed while they had the lock."""
    for file in os.listdir(at):
        if re.fullmatch(rf"\.\d+{re.escape(SUFFIX)}\.new", file):
            with contextlib.suppress(OSError):
                os.unlink(file, dir_fd=at)


def holds(published: Published) -> bool:
    """Say whether a name is still this one's."""
    with contextlib.suppress(OSError, KhoError), opened(make=False) as at:
        status = os.stat(file_of(published.name), dir_fd=at)
        return (status.st_dev, status.st_ino) == published.ident
    return False


def retract(published: Published) -> None:
    """Listen no more, and take the name away if it is still this one's."""
    published.listener.close()
    file = file_of(published.name)
    with contextlib.suppress(OSError, KhoError), opened(make=False, lock=Deadline(LOCKED)) as at:
        status = os.stat(file, dir_fd=at)
        if (status.st_dev, status.st_ino) == published.ident:
            os.unlink(file, dir_fd=at)
