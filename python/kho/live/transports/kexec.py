"""Images across a kexec: a session of /dev/liveupdate carries the memfd to the next kernel.

One session per image, `kho-live/NAME`, with one file. Before the kexec the owner keeps it open (`Handle.preserve`),
because the kernel discards a session with its last descriptor. After the kexec:

    retrieve the session   succeeds once: other processes get BusyError until it is closed
    retrieve the memfd     if the kernel cannot, it never will: a warning, and the service starts with a new image
    adopt                  checked like any other inherited image
    make the next session  before the old one is closed, so that no other process can make one of that name
    finish, preserve       a file is in one session at a time
    close the old session

After an error, session and memfd stay open in this process (`_arrivals`), because they would be lost with their last
descriptor: another call of `open`, with another version perhaps, finds them there. If a process dies before it has
preserved the image again, the image is lost.

Preserving allocates all of the memfd and pins it. Pinned memory is outside scratch, and what cannot be allocated ends
in the OOM killer, so `preserve` reads what there is first (`file.memory`).
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
from contextlib import contextmanager
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
from ...sizes import format_size
from ..deadline import Deadline
from ..file import memory
from .descriptors import make_safe

__all__ = [
    "Machine",
    "arrive",
    "check",
    "find",
    "finish",
    "forget",
    "is_kept",
    "is_session_of",
    "keep",
    "machine",
    "preserve",
    "session_name",
]

PREFIX = "kho-live/"
TOKEN = 1
"""The memfd's token in the session."""
F_SEAL_EXEC = 0x20
PATIENCE = 2.0
"""Seconds to wait for a device that another process has open."""
POLL = 0.01
"""Seconds between two attempts to open the device."""


class Machine(NamedTuple):
    """The live update device of the machine: its path, and how requests get there."""

    path: str | os.PathLike[str] = luo.PATH
    transport: luo.Transport = luo.KERNEL


machine = Machine()


@dataclass
class Arrival:
    """An image that the last kernel handed over, and that is not preserved again."""

    session: luo.Session | None
    """None for an image that came by another transport."""
    fd: int = -1
    finished: bool = False

    def close(self) -> None:
        """Close session and memfd: if no process has adopted the image, it is lost."""
        if self.session is not None:
            self.session.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_arrivals: dict[str, Arrival] = {}
_lock = threading.Lock()


def session_name(name: str) -> str:
    """Return the name of an image's session: at most 63 bytes, with a hash for a long name."""
    made = PREFIX + name
    if len(made.encode()) < luo.NAME_BYTES:
        return made
    return f"{PREFIX}#{hashlib.sha256(name.encode()).hexdigest()[:48]}"


def check() -> None:
    """Check that this machine has live updates. Raises: LuoUnavailableError, LuoPermissionError."""
    if reason := luo.available(machine.path):
        missing = not os.path.lexists(machine.path)
        raise (LuoUnavailableError if missing else LuoPermissionError)(
            errno.ENODEV if missing else errno.EACCES, reason
        )


def _device(deadline: Deadline | None) -> luo.Device:
    """Open the device, and wait while another process has it open. Raises: LuoError."""
    until = time.monotonic() + PATIENCE
    deadline = deadline or Deadline(PATIENCE)
    while True:
        try:
            return luo.Device(machine.path, transport=machine.transport)
        except LuoBusyError:
            if time.monotonic() >= until or not deadline.sleep(POLL):
                raise


def is_session_of(fd: int, name: str, *, named: bool) -> bool:
    """Return whether a descriptor is an image's session.

    Args: named: whether its link need not tell that it is a session, for descriptors that may be asked (GET_NAME).
    """
    if not named and luo.session_link(fd) is None:
        return False
    try:
        with luo.Session(os.dup(fd), transport=machine.transport) as session:
            return session.name == session_name(name)
    except (LuoError, OSError):
        return False


def arrive(name: str, fd: int, size: int = 0) -> bool:
    """Take an image out of its session, which came by another transport; `find` returns the memfd then.

    Args: fd: the session's descriptor, which belongs to this module from now on. size: as for `find`.
    Returns: whether it is a session of the last kernel: the files of one for the next kernel cannot be retrieved here;
        it is closed then.
    Raises: LuoError for errors that may be temporary.
    """
    with _lock:
        if name in _arrivals:
            os.close(fd)
            return True
        session = luo.Session(fd, name=session_name(name), transport=machine.transport)
        _warn_charge(name, size)
        try:
            arrival = Arrival(session, session.retrieve_fd(TOKEN))
        except LuoStateError:
            session.close()
            return False
        except (LuoRetrieveError, LuoNotFoundError) as error:
            session.close()
            _warn_lost(name, error)
            return True
        except BaseException:
            session.close()
            raise
        _arrivals[name] = arrival
        return True


def _warn_lost(name: str, error: LuoError) -> None:
    text = f"{name!r} was handed over by the last kernel, and is lost; the service starts with a new image"
    warnings.warn(f"{text}: {error}", RuntimeWarning, stacklevel=4)


def find(name: str, *, insist: bool = True, deadline: Deadline | None = None, size: int = 0) -> int | None:
    """Return the memfd that the last kernel handed over for an image, or None; kept until `forget`.

    Args: insist: whether a device that cannot be used is an error. deadline: until when to wait for other callers.
        size: bytes of the image, as far as the caller knows: retrieving charges them to this process's memory cgroup.
    Raises: BusyError if another process is taking the image over; LuoError for errors that may be temporary.
    """
    with _alone(name, deadline):
        arrival = _arrivals.get(name) or _retrieve(name, insist, deadline)
        if arrival is None:
            return None
        _arrivals[name] = arrival
        if arrival.fd < 0 and arrival.session is not None:
            _warn_charge(name, size)
            try:
                arrival.fd = arrival.session.retrieve_fd(TOKEN)
            except (LuoRetrieveError, LuoNotFoundError) as error:
                _arrivals.pop(name).close()
                _warn_lost(name, error)
                return None
        make_safe(arrival.fd, name)
        return arrival.fd


def _warn_charge(name: str, size: int) -> None:
    """Warn before the kernel charges an image to a cgroup without room for it, which ends in the OOM killer."""
    for limit in memory.limits():
        if size > limit.left:
            warnings.warn(
                f"{name!r} comes from the last kernel: retrieving it charges up to {format_size(size)} to the memory "
                f"cgroup {limit.path}, which has {format_size(limit.left)} left of {format_size(limit.limit)}; the "
                "kernel kills this process if it does not fit, and the image is lost. Raise the limit (MemoryMax=)",
                RuntimeWarning,
                stacklevel=4,
            )
            return


@contextmanager
def _alone(name: str, deadline: Deadline | None) -> Iterator[None]:
    """Hold the module's lock. Raises: BusyError when the deadline has passed."""
    lock = _lock  # `_after_fork` replaces the global
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


def finish(name: str) -> None:
    """Finish an image's session, when the image is adopted. Raises: LuoError; it can be tried again."""
    with _lock:
        arrival = _arrivals.get(name)
        if arrival is not None and arrival.session is not None and not arrival.finished:
            arrival.session.finish()
            arrival.finished = True


def keep(name: str, fd: int) -> None:
    """Keep a memfd whose handle failed, from whatever transport: the next `find` returns it."""
    if os.fstat(fd).st_nlink:
        return  # a file, which is found by its name
    with _lock:
        if name not in _arrivals:
            _arrivals[name] = Arrival(None, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0), finished=True)


def is_kept(name: str) -> bool:
    """Return whether this process keeps an image that it could not adopt."""
    return name in _arrivals


def forget(name: str) -> None:
    """Close the session and memfd that an image came with, once its owner has its own descriptors."""
    with _lock:
        arrival = _arrivals.pop(name, None)
    if arrival is not None:
        arrival.close()


def preserve(
    fd: int, name: str, where: str, device: luo.Device | None = None, deadline: Deadline | None = None
) -> luo.Session:
    """Hand an image's memfd to the next kernel.

    Args: device: an open one; by default the machine's is opened for the call. deadline: until when to wait for it.
    Returns: the session, which must be open when the kernel jumps.
    Raises: ParameterError if it is not a memfd of normal pages, or is sealed against execution; OutOfMemoryError if
        its memory does not fit outside scratch, or into the memory cgroup; LuoExistsError if another process preserves
        an image of that name; LuoError. Nothing is preserved then.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = -1
    if seals < 0 or os.fstat(fd).st_nlink or os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise ParameterError(
            f"{where}: preserve: a memfd of normal pages goes across a kexec: say kexec=True or backing='memfd'"
        )
    if seals & F_SEAL_EXEC:
        raise ParameterError(
            f"{where}: preserve: the memfd is sealed against execution (vm.memfd_noexec), and would come back sealed "
            "against writing; a memfd that kho.live makes is not"
        )
    if device is None:
        check()
    memory.check_pinned(fd, f"{where}: preserve")
    if device is None:
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
    """In a forked child: close the copies, which would keep open what the parent closes."""
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it, which the child does not have
    _lock = threading.Lock()
    for arrival in _arrivals.values():
        arrival.close()
    _arrivals.clear()


os.register_at_fork(after_in_child=_after_fork)
