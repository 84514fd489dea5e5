"""Images whose descriptors `KHO_LIVE_FDS` names: left open across exec, or by a holder.

`KHO_LIVE_FDS=NAME:FD:LOCK:LISTENER,...`; NAME is quoted as in a URL. With a number as LOCK this process owns the image
already (`kho.live.exec`); with `-` the process that locks it becomes its owner (a holder's command). LISTENER, or `-`,
is the socket of the image's name, kept open so that no other process takes the name during exec.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from urllib.parse import quote, unquote

from ...errors import SourceError
from .descriptors import Inherited, require_image, set_inheritable

__all__ = ["VARIABLE", "described", "from_environment"]

VARIABLE = "KHO_LIVE_FDS"


def described(name: str, *fds: int | None) -> str:
    """Return an image's entry in `VARIABLE`. Args: fds: the image's descriptor, its lock's, its socket's."""
    return ":".join([quote(name, safe=""), *("-" if fd is None else str(fd) for fd in fds)])


def from_environment(name: str) -> Inherited | None:
    """Take the image of that name out of `VARIABLE`; None if absent. No child finds it there then.

    Raises: SourceError if the entry names a descriptor that is not open: the image would be lost silently.
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
                set_inheritable(fd, False)
        if found.lock_fd is None:
            require_image(found.fd)
        if found.listener is not None and not stat.S_ISSOCK(os.fstat(found.listener).st_mode):
            raise OSError(errno.ENOTSOCK, f"descriptor {found.listener} is no socket")
    except OSError as error:
        raise SourceError(
            f"{VARIABLE}: {name!r}: {error.strerror}; who starts this process must leave its descriptors open "
            "(close_fds=False, or pass_fds)"
        ) from error
    return found


def _set(entries: Sequence[str]) -> None:
    if entries:
        os.environ[VARIABLE] = ",".join(entries)
    else:
        os.environ.pop(VARIABLE, None)
