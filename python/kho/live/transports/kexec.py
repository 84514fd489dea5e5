"""Images across a kexec: the memfd goes into a session of /dev/liveupdate, and the next kernel's `open` finds it there.

One session per image, `kho-live/NAME`, with one file. Before the kexec the owner has it (`Handle.preserve`), as the
kernel discards a session with its last descriptor. After it:

    retrieve the session   once, whoever is first: others get BusyError as long as it is there
    retrieve the memfd     if the kernel cannot, it never will: a warning, and the service begins anew
    adopt                  as any other inherited image, which nobody trusts
    make the next session  before the old one is closed, so that no second process can come in between
    finish, preserve       a file is in one session at a time
    close the old session

What goes wrong on the way leaves session and memfd in this process (`_arrivals`), as they would be gone with their
last descriptor: whoever calls `open` again, with another version perhaps, finds them there. A process that dies before
it has preserved the image again takes it along.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from ... import luo
from ...errors import (
    BusyError,
    LuoBusyError,
    LuoError,
    LuoNotFoundError,
    LuoPermissionError,
    LuoRetrieveError,
    LuoStateError,
    LuoUnavailableError,
    ParameterError,
)
from ..deadline import Deadline
from ..file.image import SEALS

__all__ = ["Machine", "check", "find", "finish", "forget", "keep", "machine", "preserve", "session_name"]

PREFIX = "kho-live/"
TOKEN = 1
"""By which the session knows the memfd."""
F_SEAL_EXEC = 0x20
PATIENCE = 2.0
"""Seconds to wait for a device that others have open, which they have for a moment."""
POLL = 0.01


class Machine(NamedTuple):
    """Where this machine's live update device is, and how requests get there."""

    path: str | os.PathLike[str] = luo.PATH
    transport: luo.Transport = luo.KERNEL


machine = Machine()


@dataclass
class Arrival:
    """What the last kernel handed over, and nobody has preserved again."""

    session: luo.Session | None
    """None for an image that came otherwise."""
    fd: int = -1
    finished: bool = False

    def close(self) -> None:
        """Let go: what nobody has adopted is gone."""
        if self.session is not None:
            self.session.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_arrivals: dict[str, Arrival] = {}
_lock = threading.Lock()


def session_name(name: str) -> str:
    """Give the session of an image: at most 63 bytes, those of long names hashed."""
    made = PREFIX + name
    if len(made.encode()) < luo.NAME_BYTES:
        return made
    return f"{PREFIX}#{hashlib.sha256(name.encode()).hexdigest()[:48]}"


def check() -> None:
    """Refuse a machine without live updates. Raises: LuoUnavailableError, LuoPermissionError, with the remedy."""
    if reason := luo.available(machine.path):
        missing = not os.path.lexists(machine.path)
        raise (LuoUnavailableError if missing else LuoPermissionError)(
            errno.ENODEV if missing else errno.EACCES, reason
        )


def _device(deadline: Deadline | None) -> luo.Device:
    """Open the device, when the others are done with it."""
    until = time.monotonic() + PATIENCE
    deadline = deadline or Deadline(PATIENCE)
    while True:
        try:
            return luo.Device(machine.path, transport=machine.transport)
        except LuoBusyError:
            if time.monotonic() >= until or not deadline.sleep(POLL):
                raise


def find(name: str, *, insist: bool = True, deadline: Deadline | None = None) -> int | None:
    """Give the memfd that the last kernel handed over for an image; it stays this module's, until `forget`.

    Args: insist: whether a device that cannot be asked is an error. deadline: until when to wait for others that ask.
    Raises: BusyError if another process is taking the image over; LuoError for what may be better next time.
    """
    with _alone(name, deadline):
        arrival = _arrivals.get(name) or _retrieve(name, insist, deadline)
        if arrival is None:
            return None
        _arrivals[name] = arrival
        if arrival.fd < 0 and arrival.session is not None:
            try:
                arrival.fd = arrival.session.retrieve_fd(TOKEN)
            except (LuoRetrieveError, LuoNotFoundError) as error:
                _arrivals.pop(name).close()
                text = f"{name!r} was handed over by the last kernel, and is lost; the service begins anew: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)
                return None
        _make_safe(arrival.fd)
        return arrival.fd


@contextmanager
def _alone(name: str, deadline: Deadline | None) -> Iterator[None]:
    """Keep other threads away. Raises: BusyError when the deadline has passed."""
    lock = _lock  # a fork replaces it
    with (deadline or Deadline(None)).wait() as seconds:
        mine = lock.acquire(timeout=seconds)
    if not mine:
        raise BusyError(f"image {name!r}: another thread of this process is asking the kernel for it")
    try:
        yield
    finally:
        lock.release()


def _retrieve(name: str, insist: bool, deadline: Deadline | None) -> Arrival | None:
    try:
        check()
        with _device(deadline) as device:
            return Arrival(device.retrieve_session(session_name(name)))
    except LuoNotFoundError:
        return None
    except LuoStateError as error:
        raise BusyError(f"image {name!r}: another process is taking it over from the last kernel: {error}") from error
    except LuoError:
        if insist:
            raise
        return None


def _make_safe(fd: int) -> None:
    """Make a memfd what it was: kernels before 7.2 forget the seals, and all of them the mode."""
    with suppress(OSError):
        # What cannot be sealed is refused by whoever reads it.
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        os.fchmod(fd, 0o600)


def finish(name: str) -> None:
    """Say that an image was adopted: its memory is its owner's alone. Raises: LuoError; it can be tried again."""
    with _lock:
        arrival = _arrivals.get(name)
        if arrival is not None and arrival.session is not None and not arrival.finished:
            arrival.session.finish()
            arrival.finished = True


def keep(name: str, fd: int) -> None:
    """Have an image outlive a handle that failed, wherever it came from: the next `find` gives it."""
    with _lock:
        if name not in _arrivals:
            _arrivals[name] = Arrival(None, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0), finished=True)


def forget(name: str) -> None:
    """Let go of what an image came with, once its owner has all that it needs."""
    with _lock:
        arrival = _arrivals.pop(name, None)
    if arrival is not None:
        arrival.close()


def preserve(
    fd: int, name: str, where: str, device: luo.Device | None = None, deadline: Deadline | None = None
) -> luo.Session:
    """Hand an image's memfd to the next kernel.

    Args: device: an open one; by default the machine's is opened for a moment. deadline: until when to wait for that.
    Returns: the session, which must be open when the kernel jumps.
    Raises: ParameterError for what is no memfd of normal pages, or sealed against execution; LuoExistsError if another
        process preserves an image of that name; LuoError. Nothing is preserved then.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = -1
    if seals < 0 or os.fstat(fd).st_nlink or os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise ParameterError(f"{where}: preserve: a memfd of normal pages goes across a kexec; use backing='memfd'")
    if seals & F_SEAL_EXEC:
        raise ParameterError(
            f"{where}: preserve: the memfd is sealed against execution (vm.memfd_noexec), and would come back sealed "
            "against writing; open(..., kexec=True) makes one that is not"
        )
    if device is None:
        check()
        with _device(deadline) as opened:
            session = opened.create_session(session_name(name))
    else:
        session = device.create_session(session_name(name))
    try:
        finish(name)
        session.preserve_fd(fd, TOKEN)
    except BaseException:
        session.close()
        raise
    return session


def _after_fork() -> None:
    """Close a child's copies: they would keep alive what its parent gives up."""
    global _lock  # noqa: PLW0603 - a lock that a thread of the parent's held would be held for ever
    _lock = threading.Lock()
    for arrival in _arrivals.values():
        arrival.close()
    _arrivals.clear()


os.register_at_fork(after_in_child=_after_fork)
