"""Images that systemd keeps while a service restarts, and across `systemctl kexec`.

The unit has `FileDescriptorStoreMax=`, and for a kexec `FileDescriptorStorePreserve=yes`.

They are sent to the notify socket with FDSTORE=1 (sd_notify(3)), and come back as descriptors from number 3 on
(sd_listen_fds(3)). They are found by FDNAME: systemd reverses their order with every daemon-reload. Across a kexec
systemd-shutdown preserves the stored memfds after all services have ended, so that this process needs no session of
/dev/liveupdate, and no access to it. This sends the datagram itself: no library in pure Python passes descriptors to
that socket, and building libsystemd's bindings needs its headers.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator
from urllib.parse import quote

from ...errors import SourceError
from . import kexec
from .descriptors import FIRST, Inherited, make_safe, require_image, set_inheritable

__all__ = ["fdname", "from_systemd", "keeps", "received", "remove", "session_from_systemd", "store"]

NOTIFY = 2.0
"""Seconds that systemd may take to receive a datagram."""


def fdname(name: str) -> str:
    """Return an image's FDNAME: at most 255 printable characters without a colon."""
    plain = f"kho-live-{quote(name, safe='')}"
    return plain if len(plain) < 256 else f"kho-live-{hashlib.sha256(name.encode()).hexdigest()}"


_taken: set[tuple[int, int]] = set()
"""Process and descriptor of what `from_systemd` and `session_from_systemd` have returned."""


_names: set[str] = set()
"""FDNAMEs of these."""


def keeps() -> bool:
    """Return whether the unit has a descriptor store: systemd sets FDSTORE to its size (from version 254)."""
    size = os.environ.get("FDSTORE", "")
    return _address() is not None and re.fullmatch(r"[0-9]{1,9}", size) is not None and int(size) > 0


def _address() -> str | None:
    """Return the notify socket's address; None if there is none, or systemd takes no descriptors."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    return address if address.startswith(("/", "@")) and os.environ.get("FDSTORE") != "0" else None


def _passed() -> Iterator[tuple[int, str]]:
    """Iterate over the descriptors that systemd has passed to this process, with their FDNAMEs."""
    count, names = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_FDNAMES", "").split(":")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not re.fullmatch(r"[0-9]{1,6}", count):
        return
    for fd, given in zip(range(FIRST, FIRST + int(count)), names, strict=False):
        if (os.getpid(), fd) not in _taken:
            yield fd, given


def from_systemd(name: str) -> Inherited | None:
    """Return what systemd has kept of an image for this process; None if absent, or on the second call.

    Raises: SourceError if the descriptor is closed or another file.
    """
    wrong = None
    for fd, given in _passed():
        if given != fdname(name):
            continue
        try:
            set_inheritable(fd, False)
            if kexec.is_session_of(fd, name, named=True):
                continue
            require_image(fd)
        except OSError as error:
            wrong = wrong or SourceError(f"LISTEN_FDS: {given}: {error.strerror}")
            continue
        _taken.add((os.getpid(), fd))
        _names.add(given)
        if make_safe(fd, name):
            remove(given)  # the memfd that systemd has is empty; the new one is stored as any other
        return Inherited(fd, None, None, "systemd")
    if wrong is not None:
        raise wrong
    return None


def received(name: str) -> bool:
    """Return whether this process has got a descriptor of an image's FDNAME from systemd."""
    return fdname(name) in _names


def session_from_systemd(name: str) -> tuple[int, str] | None:
    """Return an image's session that systemd has kept for this process, and its FDNAME; None if absent."""
    for fd, given in _passed():
        try:
            if kexec.is_session_of(fd, name, named=given == fdname(name)):
                set_inheritable(fd, False)
                _taken.add((os.getpid(), fd))
                _names.add(given)
                return fd, given
        except OSError:
            continue
    return None


def store(name: str, fd: int | None, within: float = NOTIFY) -> bool:
    """Ask systemd to keep a descriptor for the service's next process, or to drop it (None).

    Returns: whether the request was sent. systemd does not answer: it keeps what FileDescriptorStoreMax= allows.
    """
    return remove(fdname(name), within) if fd is None else _notify("FDSTORE=1", fdname(name), [fd], within)


def remove(given: str, within: float = NOTIFY) -> bool:
    """Ask systemd to drop all descriptors of an FDNAME; returns whether the request was sent."""
    _names.discard(given)
    return _notify("FDSTOREREMOVE=1", given, [], within)


def _notify(request: str, given: str, fds: list[int], within: float) -> bool:
    address = _address()
    if address is None:
        return False
    state = f"{request}\nFDNAME={given}".encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as conn:
            conn.settimeout(min(within, NOTIFY))
            conn.connect("\0" + address[1:] if address[0] == "@" else address)
            socket.send_fds(conn, [state], fds)
    except OSError:
        return False
    return True
