"""Images that come with the process: across exec, from a holder, from systemd.

`KHO_LIVE_FDS=NAME:FD:LOCK:LISTENER,...` names descriptors that were left open for this process; NAME is quoted as in a
URL. With LOCK the image is owned already (exec in place), with `-` it is who locks it that owns it (a holder's child).
LISTENER, or `-`, is the socket of the image's name, open so that nobody takes the name for free meanwhile.

systemd keeps descriptors for a service with `FileDescriptorStoreMax=` while it restarts: they are sent with FDSTORE=1
(sd_notify(3)), and come back from number 3 on (sd_listen_fds(3)). No library in pure Python passes descriptors to the
notify socket, and libsystemd's bindings need its headers to build; it is one datagram.
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
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn
from urllib.parse import quote, unquote

from ...errors import ParameterError, SourceError
from ..ownership import Turns
from ..reader import _readers

__all__ = ["VARIABLE", "Inherited", "described", "execute", "fdname", "from_environment", "from_systemd", "store"]

VARIABLE = "KHO_LIVE_FDS"
NOTIFY = 2.0
"""Seconds that systemd may take to receive a datagram."""
FIRST = 3
"""SD_LISTEN_FDS_START"""


class Inherited(NamedTuple):
    """An image that was left for this process."""

    fd: int
    lock_fd: int | None
    listener: int | None
    transport: str


def described(name: str, *fds: int | None) -> str:
    """Write an image as `VARIABLE` has it: its descriptor, its lock's, its socket's."""
    return ":".join([quote(name, safe=""), *("-" if fd is None else str(fd) for fd in fds)])


def from_environment(name: str) -> Inherited | None:
    """Take the image of that name out of `VARIABLE`, so that no child of this process takes it for its own.

    Raises: SourceError if it names a descriptor that is not open: the image would be lost silently.
    """
    kept, found = [], None
    for entry in filter(None, os.environ.get(VARIABLE, "").split(",")):
        parts = re.fullmatch(r"([^:,]{1,765}):([0-9]{1,7}):([0-9]{1,7}|-):([0-9]{1,7}|-)", entry)
        if parts is None:
            raise SourceError(f"{VARIABLE}: {entry[:80]!r} is no NAME:FD:LOCK:LISTENER; unset it")
        if found is None and unquote(parts[1]) == name:
            lock_fd, listener = (None if part == "-" else int(part) for part in parts.groups()[2:])
            found = Inherited(int(parts[2]), lock_fd, listener, "hold" if lock_fd is None else "exec")
        else:
            kept.append(entry)
    if found is None:
        return None
    _set(kept)
    try:
        for fd in found[:3]:
            if fd is not None:
                _inheritable(fd, False)
        if found.lock_fd is None:
            _memfd(found.fd)
        if found.listener is not None and not stat.S_ISSOCK(os.fstat(found.listener).st_mode):
            raise OSError(errno.ENOTSOCK, f"descriptor {found.listener} is no socket")
    except OSError as error:
        raise SourceError(
            f"{VARIABLE}: {name!r}: {error.strerror}; who starts this process must leave its descriptors open "
            "(close_fds=False, or pass_fds)"
        ) from error
    return found


def _memfd(fd: int) -> None:
    """Refuse what is no image's memory, whatever its number was before. Raises: OSError."""
    if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:kho-live:"):  # noqa: PTH115
        raise OSError(9, f"descriptor {fd} is another file")


def _set(entries: list[str]) -> None:
    if entries:
        os.environ[VARIABLE] = ",".join(entries)
    else:
        os.environ.pop(VARIABLE, None)


def _inheritable(fd: int, yes: bool) -> None:
    """Keep a descriptor across exec, or not. Raises: OSError."""
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFD) if fd >= FIRST else -1
    except OSError:
        flags = -1
    if flags < 0:
        raise OSError(9, f"descriptor {fd} is not open")
    fcntl.fcntl(fd, fcntl.F_SETFD, flags & ~fcntl.FD_CLOEXEC if yes else flags | fcntl.FD_CLOEXEC)


def execute(argv: Sequence[str], env: Mapping[str, str] | None = None) -> NoReturn:
    """Become another program, which finds the memfd images of this process by `kho.live.open`.

    Threads end with this process's program, as always with exec; forked children that read go on, and must have ended
    before the new program commits. An image with a path needs none of this.
    Args: argv: the program, looked for in PATH, and its arguments. env: instead of this process's environment.
    Raises: FinalizedError with uncommitted changes; BusyError while an owner before drains, or a successor looks;
        ParameterError; OSError if the program cannot be run. Nothing has changed then.
    """
    if not argv:
        raise ParameterError("exec: no command")
    images = [image for reader in list(_readers) if isinstance(reader, Turns) and (image := reader.passed_on())]
    environment = dict(os.environ if env is None else env)
    environment[VARIABLE] = ",".join(described(*image) for image in images)
    fds = [fd for _, *several in images for fd in several if fd is not None]
    try:
        for fd in fds:
            _inheritable(fd, True)
        os.execvpe(argv[0], list(argv), environment)
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                _inheritable(fd, False)


# systemd


def fdname(name: str) -> str:
    """Give the name systemd keeps an image by: at most 255 printable characters without a colon."""
    plain = f"kho-live-{quote(name, safe='')}"
    return plain if len(plain) < 256 else f"kho-live-{hashlib.sha256(name.encode()).hexdigest()}"


_taken: set[tuple[int, int]] = set()


def from_systemd(name: str) -> Inherited | None:
    """Give what systemd kept for this service, if this process is the one it started."""
    count, names = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_FDNAMES", "").split(":")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not re.fullmatch(r"[0-9]{1,6}", count):
        return None
    for fd, given in zip(range(FIRST, FIRST + int(count)), names, strict=False):
        if given == fdname(name) and (os.getpid(), fd) not in _taken:
            _taken.add((os.getpid(), fd))
            try:
                _inheritable(fd, False)
                _memfd(fd)
            except OSError as error:
                raise SourceError(f"LISTEN_FDS: {given}: {error.strerror}") from error
            return Inherited(fd, None, None, "systemd")
    return None


def store(name: str, fd: int | None, within: float = NOTIFY) -> bool:
    """Have systemd keep a descriptor for the service's next process, or forget it (None); whether it was told.

    systemd says nothing in return: it keeps what FileDescriptorStoreMax= allows.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")) or os.environ.get("FDSTORE") == "0":
        return False
    state = f"FDSTORE{'REMOVE' if fd is None else ''}=1\nFDNAME={fdname(name)}".encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as conn:
            conn.settimeout(min(within, NOTIFY))
            conn.connect("\0" + address[1:] if address[0] == "@" else address)
            socket.send_fds(conn, [state], [] if fd is None else [fd])
    except OSError:
        return False
    return True
