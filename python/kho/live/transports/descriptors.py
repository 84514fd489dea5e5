"""Descriptors that a process starts with: an image's, and what comes with it."""

from __future__ import annotations

import fcntl
import os
from typing import NamedTuple

__all__ = ["FIRST", "Inherited", "require_memfd", "set_inheritable"]

FIRST = 3
"""The lowest descriptor that is passed: SD_LISTEN_FDS_START of sd_listen_fds(3)."""


class Inherited(NamedTuple):
    """The descriptors of an image that this process was started with."""

    fd: int
    lock_fd: int | None
    """The owner's lock, which this process has kept across exec."""
    listener: int | None
    """The socket of the image's name."""
    transport: str


def require_memfd(fd: int) -> None:
    """Check that a descriptor leads to an image's memfd: its number may have been reused. Raises: OSError."""
    if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:kho-live:"):  # noqa: PTH115
        raise OSError(9, f"descriptor {fd} is another file")


def set_inheritable(fd: int, inheritable: bool) -> None:
    """Set whether a descriptor stays open across exec. Raises: OSError."""
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFD) if fd >= FIRST else -1
    except OSError:
        flags = -1
    if flags < 0:
        raise OSError(9, f"descriptor {fd} is not open")
    fcntl.fcntl(fd, fcntl.F_SETFD, flags & ~fcntl.FD_CLOEXEC if inheritable else flags | fcntl.FD_CLOEXEC)
