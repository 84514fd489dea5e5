"""Images that systemd keeps while a service restarts, with `FileDescriptorStoreMax=` in its unit.

They are sent to the notify socket with FDSTORE=1 (sd_notify(3)), and come back as descriptors from number 3 on
(sd_listen_fds(3)). This sends the datagram itself: no library in pure Python passes descriptors to that socket, and
building libsystemd's bindings needs its headers.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from urllib.parse import quote

from ...errors import SourceError
from .descriptors import FIRST, Inherited, require_memfd, set_inheritable

__all__ = ["fdname", "from_systemd", "store"]

NOTIFY = 2.0
"""Seconds that systemd may take to receive a datagram."""


def fdname(name: str) -> str:
    """Return an image's FDNAME: at most 255 printable characters without a colon."""
    plain = f"kho-live-{quote(name, safe='')}"
    return plain if len(plain) < 256 else f"kho-live-{hashlib.sha256(name.encode()).hexdigest()}"


_taken: set[tuple[int, int]] = set()
"""Process and descriptor of what `from_systemd` has returned."""


def from_systemd(name: str) -> Inherited | None:
    """Return what systemd has kept of an image for this process; None if absent, or on the second call.

    Raises: SourceError if the descriptor is closed or another file.
    """
    count, names = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_FDNAMES", "").split(":")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not re.fullmatch(r"[0-9]{1,6}", count):
        return None
    for fd, given in zip(range(FIRST, FIRST + int(count)), names, strict=False):
        if given == fdname(name) and (os.getpid(), fd) not in _taken:
            _taken.add((os.getpid(), fd))
            try:
                set_inheritable(fd, False)
                require_memfd(fd)
            except OSError as error:
                raise SourceError(f"LISTEN_FDS: {given}: {error.strerror}") from error
            return Inherited(fd, None, None, "systemd")
    return None


def store(name: str, fd: int | None, within: float = NOTIFY) -> bool:
    """Ask systemd to keep a descriptor for the service's next process, or to drop it (None).

    Returns: whether the request was sent. systemd does not answer: it keeps what FileDescriptorStoreMax= allows.
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
