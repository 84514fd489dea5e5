"""The images of this user's running services: list them, open one for reading, release one."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ...errors import KhoError, NotFoundError
from ..candidate import Candidate
from ..file.image import ImageFile, open_file
from ..file.trust import check_descriptor, open_trusted, path_of
from ..handle import Handle
from . import kept, sockets, wire

__all__ = ["Holding", "holdings", "readable", "release"]

WHO = 2.0
"""Seconds after which a process that does not answer is shown as silent."""
RELEASE = 60.0
"""Seconds that a process may take to release an image."""


class Holding(NamedTuple):
    """An image, and the process that answers to its name, if there is one."""

    name: str
    pid: int | None
    uid: int
    state: str
    """serving, handing over, draining (the previous owner still reads), idle (a holder without its command), silent;
    left (no process has it), or unreadable (as left, but not an image that can be used)."""
    transport: str
    """How the image came to the process (`Handle.transport`)."""
    version: str
    generation: int
    objects: int
    used: int
    """Bytes in use."""
    size: int
    """Bytes of memory, used or not."""
    since: float
    """When the process began to answer, in seconds since the epoch; or when the file that was left was changed."""
    child: int | None
    """For a holder: the process of its command."""
    command: str
    """The command line of the process, or of a holder's command; the path of a file that was left."""


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()[:4096]
        return raw.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    return ""


def holdings() -> list[Holding]:
    """List the images of this user's services, by name; sockets of killed processes are removed.

    Raises: SourceError if other users may enter the runtime directory.
    """
    found = []
    for file, conn in sockets.entries():
        with conn, contextlib.suppress(KhoError, OSError):
            found.append(_holding(file.name.removesuffix(sockets.SUFFIX), conn))
    found += [_left(path, status) for path, status in kept.left()]
    return sorted(found, key=lambda row: row.name)


def _left(path: Path, status: os.stat_result) -> Holding:
    """Describe an image that no process has."""
    used, since = status.st_blocks * 512, status.st_mtime
    try:
        image = ImageFile(open_file(path, reading=True), str(path), path)
        try:
            catalog, size = image.committed().catalog, image.sup.size
        finally:
            image.close()
    except (KhoError, OSError):
        name = unquote(path.name.removesuffix(kept.SUFFIX))
        return Holding(name, None, status.st_uid, "unreadable", "file", "", 0, 0, used, 0, since, None, str(path))
    return Holding(
        catalog.image,
        None,
        status.st_uid,
        "left",
        "file",
        catalog.version,
        catalog.generation,
        len(catalog.items),
        used,
        size,
        since,
        None,
        str(path),
    )


def _holding(file: str, conn: socket.socket) -> Holding:
    pid, uid = wire.peer(conn)
    try:
        row, _ = wire.ask(conn, {"do": "who"}, within=WHO)
    except KhoError:
        return Holding(file, pid, uid, "silent", "", "", 0, 0, 0, 0, 0.0, None, _command(pid))

    def number(key: str) -> int:
        value = row.get(key)
        return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 63 else 0

    def text(key: str) -> str:
        value = row.get(key)
        return value[:255] if isinstance(value, str) else ""

    child = number("child") or None
    if row.get("successor"):
        state = "handing over"
    elif row.get("draining"):
        state = "draining"
    else:
        state = "idle" if "child" in row and child is None else "serving"
    return Holding(
        text("name") or file,
        pid,
        uid,
        state,
        text("transport"),
        text("version"),
        number("generation"),
        number("objects"),
        number("used"),
        number("size"),
        min(float(number("since")), time.time()),
        child,
        _command(child or pid),
    )


def _connected(name: str) -> socket.socket:
    """Connect to the process that has an image. Raises: NotFoundError if none has; SourceError; BusyError."""
    conn = sockets.connect(name)
    if conn is None:
        raise NotFoundError(
            f"no process has {name!r}, and none has left it: nothing in {sockets.folder()}; `kho ps` lists the images"
        )
    try:
        wire.peer(conn)
    except BaseException:
        conn.close()
        raise
    return conn


def _left_by(name: str) -> Path | None:
    """Return the path of an image that no process has; None if a process answers to the name, or there is none."""
    path = kept.find(name)
    if path is None or (conn := sockets.connect(name)) is None:
        return path
    conn.close()
    return None


def readable(name: str) -> int:
    """Get a descriptor for reading an image, of a running service or left by one; it belongs to the caller.

    Raises: NotFoundError if there is none; BusyError if its process does not answer; SourceError.
    """
    if (path := _left_by(name)) is not None:
        try:
            return open_trusted(path, flags=os.O_RDONLY)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: no such file") from error
    with _connected(name) as conn:
        _, fds = wire.ask(conn, {"do": "read"}, fds=1)
    try:
        if len(fds) != 1:
            raise wire.WireError(f"{name!r}: no descriptor was passed")
        check_descriptor(fds[0], repr(name))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds[0]


def release(name: str | os.PathLike[str], *, force: bool = False) -> int:
    """Free an image's memory; returns how many bytes.

    Args: name: a service's, or, with a slash in it, the path of an image's file. force: even if a process uses it: a
        holder ends its command; a service that owns its image keeps the arrays that it still holds, with their memory.
    Raises: BusyError while it is in use; NotFoundError; for a path UntrustedError if other users may change the file,
        SourceError, FormatError.
    """
    text = os.fspath(name)
    if "/" in text:
        return _release_path(path_of(text))
    if (path := _left_by(text)) is not None:
        return _release_path(path)
    with _connected(text) as conn:
        answer, _ = wire.ask(conn, {"do": "release", "force": force}, within=RELEASE)
    freed = answer.get("freed")
    return freed if isinstance(freed, int) else 0


def _release_path(path: Path) -> int:
    try:
        image = ImageFile(open_file(path), str(path), path)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    with Candidate._of(image) as candidate:
        handle: Handle = candidate.adopt()
    freed = os.fstat(handle.fileno()).st_blocks * 512
    handle.release()
    return freed
