"""`open` and `attach`: how a process gets an image, and the order in which `open` looks for one by its name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..errors import (
    BusyError,
    FormatError,
    LuoBusyError,
    LuoExistsError,
    LuoPermissionError,
    ParameterError,
    ReadOnlyError,
    SchemaError,
    SourceError,
)
from ..formats.live import PAGE, check_service
from ..sizes import format_size, parse_size
from .acquire import Request, duplicate, new_image, own_descriptor, own_inherited, own_left, own_path
from .candidate import Candidate
from .deadline import Deadline
from .file.image import LEAST, ImageFile, open_file
from .file.trust import Trust, path_of, policy_of
from .handle import Handle
from .handover import client, kept
from .handover.client import Offer, Ready
from .transports import kexec as across
from .transports import systemd
from .transports.descriptors import Inherited, copied
from .transports.environ import from_environment

__all__ = ["attach", "open", "open_at", "size_of"]

SIZE, KEXEC_SIZE = "1G", "64M"
"""Default sizes of a new image. Preserving it for the next kernel allocates all of it."""
RETRY = 0.002
"""Seconds before the search for an image starts again, when another process has just made it."""
PRESERVED = STARTING = 0.02
"""The same, when another process has preserved its image, or has its file, and will soon answer to the name."""


def open(  # noqa: A001 - kho.live.open reads like open()
    name: str,
    size: int | str | None = None,
    *,
    version: str = "1",
    backing: str | os.PathLike[str] | int | None = None,
    timeout: float | None = 0.0,
    ready: Ready | None = None,
    serve: bool | None = None,
    kexec: bool = False,
    trust: Trust = "private",
) -> Handle:
    """Become the owner of a service's image: of an existing one, or, the first time, of a new one.

    A memfd that another process owns is handed over by it: its `handed_over` is set then, and it can read until it
    ends. It refuses (BusyError) while it has uncommitted changes, or another successor.

    Args:
        name: the service's name, 1 to 255 bytes without a slash.
        size: bytes for objects and metadata of a new image, as 4096 or "8G"; by default 1 GiB, or 64 MiB with
            kexec=True, which allocates all of it at once. An existing image keeps its size (RuntimeWarning if that
            is smaller).
        version: the version of the service's data; an image of another version is refused and left as it is.
        backing: where a new image is. None: a file in this user's runtime directory, which the next process finds by
            `name` even after a crash, or a memfd where systemd's store, a holder or the kernel keeps it; without a
            place for it a memfd, with a RuntimeWarning. "memfd" or "hugetlb", which another process has to take over.
            The path of a file on tmpfs or pmem; or the descriptor of a memfd, empty or with an image: that is used.
        timeout: seconds to wait for other processes: for an owner that is busy, and for locks. The call ends at most
            half a second later, apart from the time that `ready` and reading the image take. 0: wait only for the
            answers of a process that hands over, at most 0.3 seconds in all. None: no limit.
        ready: a health check, called with the image as a `Candidate` before anything changes; an exception aborts the
            handover, and the current owner keeps running.
        serve: answer to the image's name, in a thread. Default: for memfds, unless a holder answers to it.
        kexec: preserve the image for the next kernel (`Handle.preserve`), or refuse. An image that the previous kernel
            preserved is found either way; with True a device that cannot be used is an error, with False it is ignored.
            In a service with a descriptor store systemd preserves it, with FileDescriptorStorePreserve=yes in the unit,
            and this process does not.
        trust: the files that are used: "private", files of this user and root that no other user may write, with one
            name, in a directory in which no other user may rename them; a number, also files of that user; "directory",
            the same in any directory; "any", any regular file: users who may write it can truncate it, which kills this
            process.

    Raises: BusyError if another process owns the image or does not answer; SchemaError for another name or version,
        with both; FormatError for an image that is torn or was tampered with; UntrustedError for a file that other
        users may change; OutOfMemoryError; DescriptorLimitError; ParameterError; SourceError; LuoError with kexec=True.

    """
    check_service(name)
    if "\0" in version or len(version.encode()) > 255:
        raise ParameterError(f"version {version!r}: at most 255 bytes without NUL")
    asked = 0 if size is None else size_of(size)
    nbytes = asked or size_of(KEXEC_SIZE if kexec else SIZE)
    deadline, policy = Deadline(timeout), policy_of(trust)
    if kexec:
        if not isinstance(backing, int) and backing not in (None, "memfd"):
            raise ParameterError(f"backing {os.fspath(backing)!r}: memfds go across a kexec, use backing='memfd'")
        # First: no owner hands over to a process that then refuses.
        _check_device(backing)
    # What else keeps a memfd: the kernel, systemd's store, and with serve=False no process shall find it.
    keep = backing is None and serve is not False and not kexec and not systemd.keeps()
    huge = backing == "hugetlb"
    request = Request(name, nbytes, version, ready, serve, kexec, asked, huge, keep, deadline, policy)
    if backing is None or backing in ("memfd", "hugetlb"):
        return _sized(_open_named(request), request)
    if isinstance(backing, int):
        handle = _settle_with_kernel(own_descriptor(backing, request), request)
    else:
        handle = own_path(path_of(backing), request)
    return _sized(_serve(handle, request) if serve else handle, request)


def open_at(path: Path, name: str, size: int, *, version: str, timeout: float | None, trust: Trust) -> Handle:
    """Own the image at a path, of whatever size, or make one there. Raises: as `open`."""
    deadline, policy = Deadline(timeout), policy_of(trust)
    request = Request(check_service(name), size_of(size), version, None, None, False, 0, False, False, deadline, policy)
    return own_path(path, request)


def _sized(handle: Handle, request: Request) -> Handle:
    """Warn (RuntimeWarning) if an image that was found is smaller than the size that was asked for."""
    size = handle._image.sup.size
    if size < request.asked and handle.inherited:
        try:
            warnings.warn(
                f"{handle._image.where}: {handle.name!r} has {format_size(size)}, not {format_size(request.asked)}: an "
                "image keeps the size that it was made with. For a larger one, release it and fill it again",
                RuntimeWarning,
                stacklevel=3,
            )
        except BaseException:  # warnings can be errors
            handle.close()
            raise
    return handle


def _check_device(backing: str | os.PathLike[str] | int | None) -> None:
    """Check that this machine has live updates, and that who preserves the image may use them. Raises: LuoError."""
    try:
        across.check()
    except LuoPermissionError:
        if backing not in (None, "memfd") or not systemd.keeps():
            raise


def attach(source: str | os.PathLike[str] | int, *, lock_fd: int | None = None, trust: Trust = "private") -> Candidate:
    """Read an image that another process may own: permission to read the file suffices.

    Args: source: its path, or a descriptor, which is duplicated. lock_fd: the owner's lock, kept across exec
        (`Handle.lock_fileno`); it belongs to the candidate from now on. trust: the files that are used, as for `open`.
    Raises: SourceError; UntrustedError for a file that other users may change; FormatError for an image that is torn or
        was tampered with.
    """
    policy = policy_of(trust)
    if isinstance(source, int):
        where = f"descriptor {source}"
        image = ImageFile(duplicate(source, where), where, lock_fd=lock_fd, policy=policy)
    else:
        path = path_of(source)
        try:
            fd = open_file(path, policy, reading=True)
            image = ImageFile(fd, str(path), path, lock_fd=lock_fd, policy=policy)
        except FileNotFoundError as error:
            raise SourceError(f"{path}: no such file") from error
    return Candidate._of(image)


def size_of(size: int | str) -> int:
    size = parse_size(size, "size")
    if size < LEAST or size > 1 << 46:
        raise ParameterError(f"size {size:#x}: at least {LEAST:#x} bytes are needed, at most {1 << 46:#x}")
    return -(-size // PAGE) * PAGE


# Transports


class Arrival(Protocol):
    """An image that a transport has found."""

    def own(self, request: Request) -> Handle:
        """Become its owner. Raises: as `open`."""

    def close(self) -> None:
        """Close what came with it, when its owner answers to its name, or could not."""


class Transport(Protocol):
    """A way in which an image comes to a process by its name."""

    def find(self, request: Request) -> Arrival | None:
        """Look for the image; None if it does not come this way."""


class Passed:
    """An image whose descriptors this process was passed."""

    def __init__(self, came: Inherited) -> None:
        self._came = came

    def own(self, request: Request) -> Handle:
        """Own it: it may be owned already, across exec. An image of another version stays in this process."""
        spare = duplicate(self._came.fd, f"{request.name!r} ({self._came.transport})")
        try:
            return own_inherited(self._came, request)
        except (SchemaError, ReadOnlyError):
            across.keep(request.name, spare)
            raise
        finally:
            os.close(spare)

    def close(self) -> None:
        """Close the socket of its name."""
        if self._came.listener is not None:
            os.close(self._came.listener)


class Offered:
    """An image that another process offers: its owner, or a holder."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer

    def own(self, request: Request) -> Handle:
        """Take it over from its owner; lock it if a holder has it."""
        with self._offer as offer:
            if offer.store:
                return own_inherited(Inherited(offer.keep(), None, None, "hold"), request)
            serve = request.serve is not False
            return offer.take(
                request.name, request.version, request.ready, request.deadline, serve=serve, policy=request.policy
            )

    def close(self) -> None:
        """Do nothing: `own` has closed it."""


class Kept:
    """An image whose descriptor stays a transport's."""

    def __init__(self, fd: int, transport: str) -> None:
        self._fd = fd
        self._transport = transport

    def own(self, request: Request) -> Handle:
        """Open it again, and own that.

        Raises: as `open`. With an image of another version, or one that the caller's check refuses, the error has a
        note: it is kept in systemd's store, or lost at the end of this process.
        """
        try:
            handle = own_descriptor(self._fd, request)
        except FormatError:
            raise
        except Exception as error:
            error.add_note(_fate(request, self._fd))
            raise
        handle.transport = self._transport
        return handle

    def close(self) -> None:
        """Do nothing: the transport keeps it."""


def _fate(request: Request, fd: int) -> str:
    """Keep an image of the last kernel that this process cannot use, and say where it is."""
    name = request.name
    reading = f"kho.live.attach(kho.live.kexec.find({name!r})) reads it here"
    if systemd.keeps():
        with request.deadline.wait() as seconds:
            if systemd.store(name, fd, seconds):
                return f"{name!r} came from the last kernel; systemd keeps it for the next process. {reading}"
    return (
        f"{name!r} came from the last kernel, and this process has the only descriptor: THE IMAGE IS LOST WHEN THIS "
        f"PROCESS ENDS. {reading}; `open` with its version continues it; `kho hold` and systemd's descriptor store "
        "keep it for another process"
    )


class StoredSession:
    """An image in a live update session of the last kernel that systemd has kept: taken out of it, as it is incoming.

    It could not be preserved again in that session, and systemd hands over only its name with the next kexec.
    """

    def __init__(self, memfd: Arrival, given: str) -> None:
        self._memfd = memfd
        self._given = given

    def own(self, request: Request) -> Handle:
        """Own the memfd, and let systemd drop the session."""
        handle = self._memfd.own(request)
        handle.transport = "systemd"
        systemd.remove(self._given)
        return handle

    def close(self) -> None:
        """Close what came with the memfd."""
        self._memfd.close()


class Environment:
    """Descriptors that this process was started with: across exec, or by a holder."""

    error: SourceError | None = None
    """Why those that the environment names cannot be used."""

    def find(self, request: Request) -> Arrival | None:
        """Take the image out of the environment."""
        try:
            came = from_environment(request.name)
        except SourceError as error:
            # A holder also answers to the name: look there before this is an error.
            self.error = error
            return None
        return None if came is None else Passed(came)


class RunningProcess:
    """The process that answers to the image's name: its owner, or a holder."""

    def find(self, request: Request) -> Arrival | None:
        """Ask it for the image, and wait until it can hand over."""
        offer = client.ask(request.name, request.version, request.deadline)
        return None if offer is None else Offered(offer)


class Unusable:
    """The end of the search if the environment names descriptors that are not open: a new image would hide the loss."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def find(self, request: Request) -> Arrival | None:
        """Raise the error of the environment."""
        if self._environment.error is not None:
            raise self._environment.error
        return None


class Systemd:
    """systemd's file descriptor store."""

    def find(self, request: Request) -> Arrival | None:
        """Take what systemd has kept for this process."""
        name = request.name
        stored = systemd.from_systemd(name)
        session = systemd.session_from_systemd(name)
        if session is None:
            return None if stored is None else Passed(stored)
        fd, given = session
        if stored is not None:
            # The memfd is what systemd shall preserve, and a file is in one session at a time.
            os.close(fd)
            return StoredSession(Passed(stored), given)
        if across.arrive(name, fd, request.asked):
            memfd = across.find(name, insist=False, deadline=request.deadline)
            if memfd is not None:
                return StoredSession(Kept(memfd, "systemd"), given)
        else:
            warnings.warn(
                f"{name!r}: systemd kept a live update session of this kernel without the memfd, which only the next "
                "kernel can take out of it; it is dropped, and the service starts with a new image. Store "
                "`fileno()` of the handle, not that of the session",
                RuntimeWarning,
                stacklevel=5,
            )
        systemd.remove(given)
        return None


class Kexec:
    """The kernel before this one."""

    def find(self, request: Request) -> Arrival | None:
        """Retrieve what it has preserved."""
        insist = request.kexec and not systemd.keeps()
        fd = across.find(request.name, insist=insist, deadline=request.deadline, size=request.asked)
        return None if fd is None else Kept(fd, "kexec")


class File:
    """A file in this user's runtime directory, which an earlier process has left."""

    def find(self, request: Request) -> Arrival | None:
        """Look for the file."""
        path = kept.find(request.name)
        return None if path is None else Left(path)


class Left:
    """An image in a file that an earlier process has left."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def own(self, request: Request) -> Handle:
        """Own it."""
        return own_left(self._path, request)

    def close(self) -> None:
        """Do nothing: the file stays."""


class New:
    """A new image: there is none of this name."""

    def find(self, request: Request) -> Arrival:
        """Always there."""
        return self

    def own(self, request: Request) -> Handle:
        """Make it."""
        handle = new_image(request)
        handle.transport = "new"
        return handle

    def close(self) -> None:
        """Do nothing."""


def _transports() -> Sequence[Transport]:
    """List the transports in the order in which `open` asks them; the last one always finds something."""
    environment = Environment()
    return environment, RunningProcess(), Unusable(environment), Systemd(), Kexec(), File(), New()


def _open_named(request: Request) -> Handle:
    """Own an image by its name, from the first transport that finds it."""
    deadline = request.deadline
    ordered = _transports()
    while True:
        arrival = next(arrival for transport in ordered if (arrival := transport.find(request)) is not None)
        try:
            try:
                handle = arrival.own(request)
            except BusyError:
                # Another process makes, owns or releases the file at this moment, and will soon answer to the name.
                if not isinstance(arrival, Left | New) or not deadline.sleep(STARTING):
                    raise
                continue
            if moved := handle._image.kept and (request.kexec or systemd.keeps()):
                handle = _moved(handle, request)
            if handle.inherited and not handle.stored and handle.transport != "hold":
                # Before the kernel forgets it: systemd keeps it even if this process dies in between.
                _store(handle, request)
            try:
                _settle_with_kernel(handle, request)
                if request.serve or (request.serve is None and handle.transport != "hold"):
                    # An image that was passed on brings its name. For a new one another process may have the name now.
                    _serve(handle, request, replace=moved or handle.transport == "exec")
            except BusyError:
                if handle.transport != "new" or not deadline.sleep(RETRY):
                    raise
                continue
            except LuoExistsError:
                if handle.transport != "new" or not deadline.left() or not deadline.sleep(PRESERVED):
                    raise
                continue
        finally:
            arrival.close()
        if not handle.inherited and handle.transport != "hold":
            _store(handle, request)
        return handle


def _moved(handle: Handle, request: Request) -> Handle:
    """Move an image from a file that a process has left to a memfd, which is what systemd and the kernel keep.

    Raises: OutOfMemoryError: the copy is made while the file is there; the image stays in the file then.
    """
    try:
        fd = copied(handle.fileno(), request.name)
        try:
            moved = own_descriptor(fd, request)
        finally:
            os.close(fd)
    except BaseException:
        handle.close()
        raise
    moved.transport, moved._dropped = handle.transport, handle.dropped
    _store(moved, request)
    # Processes that read the file keep its memory until they end.
    if (path := handle._image.path) is not None and handle._image.still_there():
        path.unlink()
    handle.close()
    return moved


def _store(handle: Handle, request: Request) -> None:
    """Ask systemd to keep an image; a file that the next process finds needs no keeper."""
    if handle._image.kept:
        return
    with request.deadline.wait() as seconds:
        if handle.transport == "new" and systemd.received(request.name):
            systemd.remove(systemd.fdname(request.name), seconds)  # an image that the caller has given up
        handle.stored = systemd.store(request.name, handle.fileno(), seconds)


def _serve(handle: Handle, request: Request, *, replace: bool = False) -> Handle:
    """Let a new owner answer to its image's name; the handle is closed on an error. Raises: BusyError, SourceError."""
    try:
        handle.serve(replace=replace, deadline=request.deadline)
    except BaseException:
        handle.close()
        raise
    return handle


def _settle_with_kernel(handle: Handle, request: Request) -> Handle:
    """Tell the kernel that an image has arrived, and preserve it for the next one if that was asked for.

    Raises: LuoError; the image stays in this process then, for another call of `open`.
    """
    try:
        # systemd preserves what it stores when all services have ended; a file is in one session at a time.
        if request.kexec and (not systemd.keeps() or handle.transport in ("hold", "descriptor")):
            handle.preserve(deadline=request.deadline)
        else:
            handle._free_at_once()
            across.finish(handle.name)
    except BaseException as error:
        if isinstance(error, LuoBusyError) and not request.kexec:
            return handle  # the image is adopted; `preserve` asks a kernel that cannot finish yet again
        if handle.inherited:
            across.keep(handle.name, handle.fileno())
        handle.close()
        raise
    across.forget(handle.name)
    return handle
