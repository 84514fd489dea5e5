"""Sockets of this user's services: `$XDG_RUNTIME_DIR/kho/NAME.sock`, in a directory of mode 0700.

A socket that no process listens at was left by a killed process; `entries` and `publish` remove or replace it. The
directory's `flock` is held while a socket is added or removed: of several processes that start a service at the same
time, one publishes its socket and the others find it.
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

__all__ = ["Published", "connect", "connect_file", "entries", "folder", "publish", "retract", "trusted"]

SUFFIX = ".sock"
LOCKED = 5.0
"""Seconds to wait for the directory's lock, for callers without a deadline."""
HINT = "set XDG_RUNTIME_DIR to a directory of your own, or open with serve=False"


def folder() -> Path:
    """Return the sockets' directory: in XDG_RUNTIME_DIR if that is a directory, else in /run/user/UID, /run or /tmp."""
    if (named := os.environ.get("XDG_RUNTIME_DIR")) and named.startswith("/") and os.path.isdir(named):  # noqa: PTH112
        return Path(named) / "kho"
    uid = os.geteuid()
    for base in (Path(f"/run/user/{uid}"), Path("/run")):
        if base.is_dir() and os.access(base, os.W_OK):
            return base / "kho"
    return Path(f"/tmp/kho-{uid}")


def file_of(name: str) -> str:
    """Return a service's file name: the quoted name, or, if that is long, its start and a digest."""
    plain = quote(name, safe=" @+,=", errors="surrogateescape").replace(".", "%2E")
    if len(plain) > 64:
        plain = f"{plain[:40]}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:16]}"
    return plain + SUFFIX


@contextmanager
def opened(*, make: bool, lock: Deadline | None = None) -> Iterator[int]:
    """Open the directory.

    Args: make: make it if it is missing. lock: take its lock, before that deadline.
    Raises: FileNotFoundError; UntrustedError if other users may enter it; SourceError; BusyError.
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
                    f"{here}: {_holder_of(fd)} has it locked, which should last milliseconds; end that process, or "
                    "continue it (SIGCONT)"
                ) from error
        except OSError as error:
            raise error_of(error, here, "lock") from error
        else:
            return


def _holder_of(fd: int) -> str:
    """Name the process that holds a file's lock, from /proc/locks."""
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
    """Connect to a socket; None if there is none, or no process listens at it."""
    conn = _socket(folder() / file)
    try:
        conn.connect(f"/proc/self/fd/{at}/{file}")
    except OSError as error:
        conn.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.EPROTOTYPE):
            return None
        if error.errno == errno.EAGAIN:
            raise BusyError(f"{folder() / file}: too many connections wait there; try again") from error
        raise error_of(error, folder() / file, "connect") from error
    return conn


def _socket(where: Path) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise error_of(error, where, "make a socket") from error


def connect(name: str) -> socket.socket | None:
    """Connect to the process that answers to a name; None if there is none. Raises: SourceError, BusyError."""
    return connect_file(file_of(name))


def connect_file(file: str) -> socket.socket | None:
    """Connect to the process that listens at a socket of the directory. Raises: as `connect`."""
    try:
        with opened(make=False) as at:
            return _connected(at, file)
    except FileNotFoundError:
        return None


def entries() -> Iterator[tuple[Path, socket.socket]]:
    """Iterate over the sockets that processes listen at, connected; removes others. Raises: SourceError, BusyError."""
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
    """A listening socket with a service's name."""

    def __init__(self, name: str, listener: socket.socket, ident: tuple[int, int]) -> None:
        self.name = name
        self.listener = listener
        self.ident = ident
        """Device and inode of the socket's file: another process may have replaced it."""


def publish(name: str, *, replace: bool, deadline: Deadline | None = None) -> Published:
    """Listen at a service's name.

    Args: replace: replace the socket of a process that listens there; for the owner of the image. deadline: until when
        to wait for the directory's lock; by default `LOCKED` seconds.
    Raises: BusyError if another process listens there; SourceError.
    """
    file = file_of(name)
    temporary = f".{os.getpid()}{SUFFIX}.new"
    with opened(make=True, lock=deadline or Deadline(LOCKED)) as at:
        _tidy(at)
        conn = None if replace else _connected(at, file)
        if conn is not None:
            conn.close()
            raise BusyError(f"{folder() / file}: another process has {name!r} now")
        listener = _socket(folder() / file)
        try:
            # No connection is accepted before `listen`, so the mode is set before any.
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
    """Remove temporary sockets of processes that were killed while they held the lock."""
    for file in os.listdir(at):
        if re.fullmatch(rf"\.\d+{re.escape(SUFFIX)}\.new", file):
            with contextlib.suppress(OSError):
                os.unlink(file, dir_fd=at)


def holds(published: Published) -> bool:
    """Return whether a name still leads to this socket."""
    with contextlib.suppress(OSError, KhoError), opened(make=False) as at:
        status = os.stat(file_of(published.name), dir_fd=at)
        return (status.st_dev, status.st_ino) == published.ident
    return False


def retract(published: Published) -> None:
    """Close the socket, and remove its name unless another process has replaced it."""
    published.listener.close()
    file = file_of(published.name)
    with contextlib.suppress(OSError, KhoError), opened(make=False, lock=Deadline(LOCKED)) as at:
        status = os.stat(file, dir_fd=at)
        if (status.st_dev, status.st_ino) == published.ident:
            os.unlink(file, dir_fd=at)
