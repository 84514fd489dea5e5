"""/dev/liveupdate: sessions that carry open files across a kexec (abi.md section 7).

Before the kexec:

>>> with luo.Device() as device:
...     session = device.create_session("search-index")
>>> session.preserve_fd(memfd, token=1)

After it:

>>> with luo.Device() as device:
...     session = device.retrieve_session("search-index")
>>> memfd = session.retrieve_fd(1)
>>> session.finish()

Lifetimes:

- One process at a time may have the device open. Sessions do not need it, so close it after a request.
- A session that was created must be open when the kernel jumps. Its last close discards it with everything it preserves
  for the next kernel, so keep the object: closing it, dropping it or leaving its `with` block cancels the handover.
  `detach` returns the descriptor for another owner.
- The last close of a session that was retrieved finishes it: files that were not retrieved by then are freed. To keep a
  file for the next kexec too, preserve it again, in a new session, after `finish`.
- Descriptors are close-on-exec. A forked child has copies of them, and a session is closed only when parent and child
  have both closed it.

Kernels differ (`kho.kernels.FIXES`):

- Linux 6.19 and 7.0 to 7.0.10 can retrieve a memfd with part of its pages missing, and report success. There
  `retrieve_fd` looks for missing pages, and raises; given a size or a SHA-256 it compares them on every kernel.
- A session knows its direction if it comes from a `Device`, and checks it. Before 7.1.5 the kernel does not, so of a
  session that was inherited say which it is (`Session(fd, incoming=True)`).
- A name has 1 to 63 bytes here; before 7.1.4 the kernel takes an empty one, and cuts a longer one.
- Linux 6.19 and 7.0 lose the seals of a memfd, and take one file under two tokens; the next kernel retrieves it once.
- GET_NAME came with 7.2: before that the name is read from the descriptor's link in /proc.

Threads may share these objects: each object makes one request at a time, as the kernel does for a session. Preserving a
large memfd allocates its holes and pins its pages, and may take seconds.

The request numbers are those of x86_64, arm64 and every other architecture whose `_IO` has no direction bits.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import struct
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from ._kho import kho_is_enabled
from .errors import (
    LuoAbiError,
    LuoBusyError,
    LuoError,
    LuoExistsError,
    LuoFileError,
    LuoNotFoundError,
    LuoPermissionError,
    LuoRetrieveError,
    LuoStateError,
    LuoUnavailableError,
    ParameterError,
)
from .formats.luo_write import text, word
from .kernels import FIXES, Release
from .owned import Uncopied

__all__ = [
    "KERNEL",
    "NAME_BYTES",
    "PATH",
    "REQUESTS",
    "Device",
    "Request",
    "Session",
    "Transport",
    "available",
    "session_link",
]

PATH = "/dev/liveupdate"
NAME_BYTES = 64
"""LIVEUPDATE_SESSION_NAME_LENGTH: a session's name with its NUL."""
LINK = b"anon_inode:[luo_session] "
"""What the link of a session's descriptor in /proc begins with; its name follows."""
WINDOW = 1 << 20
"""Bytes that are hashed at a time."""


class Request(NamedTuple):
    """An ioctl: its number, and the layout of its structure, which starts with its own size (u32)."""

    number: int
    layout: struct.Struct


def _request(nr: int, layout: str, nbytes: int) -> Request:
    """Return `_IO(0xBA, nr)` with a structure of `nbytes`."""
    made = Request(0xBA << 8 | nr, struct.Struct(layout))
    assert made.layout.size == nbytes, f"request {made.number:#x}: {made.layout.size} bytes are not {nbytes}"
    return made


REQUESTS = {
    # Requests to the device.
    "CREATE_SESSION": _request(0x00, "=Ii64s", 72),
    "RETRIEVE_SESSION": _request(0x01, "=Ii64s", 72),
    # Requests to a session.
    "PRESERVE_FD": _request(0x40, "=IiQ", 16),
    "RETRIEVE_FD": _request(0x41, "=IiQ", 16),
    "FINISH": _request(0x42, "=II", 8),
    "GET_NAME": _request(0x43, "=II64s", 72),
}
"""The requests of include/uapi/linux/liveupdate.h."""


class Transport(Protocol):
    """The system calls on a live update device; tests use others."""

    def open(self, path: str) -> int:
        """Open the device; returns a descriptor, close-on-exec. Raises: OSError."""

    def ioctl(self, fd: int, number: int, buffer: bytearray) -> None:
        """Make a request; the kernel writes its answer to `buffer`. Raises: OSError."""


class _Kernel:
    """The kernel that runs this process."""

    def open(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            # The kernel does not check how the device is open: a user who may read it may make every request.
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def ioctl(self, fd: int, number: int, buffer: bytearray) -> None:
        fcntl.ioctl(fd, number, buffer)


KERNEL: Transport = _Kernel()


class HasFileno(Protocol):
    """A file or socket."""

    def fileno(self) -> int:
        """Return its descriptor."""


Meanings = dict[int, tuple[type[LuoError], str]]
"""The exception and the message for each errno."""

_OTHER_ABI = "this kernel knows another form of the request, or not this request"
_COMMON: Meanings = {
    errno.EBADF: (LuoStateError, "the descriptor was closed by other code"),
    errno.EPERM: (LuoPermissionError, "not permitted; by default root is"),
    errno.EACCES: (LuoPermissionError, "permission denied; by default root may"),
    errno.EINVAL: (LuoAbiError, _OTHER_ABI),
    errno.E2BIG: (LuoAbiError, _OTHER_ABI),
    errno.ENOTTY: (LuoAbiError, f"{_OTHER_ABI}, or this is no live update device"),
}
_NO_DEVICE = "no live update device; boot with `liveupdate=on kho=on` (Linux 6.19 or later with CONFIG_LIVEUPDATE)"
_OPEN: Meanings = {
    errno.ENOENT: (LuoUnavailableError, _NO_DEVICE),
    errno.ENODEV: (LuoUnavailableError, _NO_DEVICE),
    errno.ENXIO: (LuoUnavailableError, _NO_DEVICE),
    errno.EBUSY: (LuoBusyError, "another process has it open, and one at a time may; `fuser -v` names it"),
    errno.EIO: (LuoError, "the kernel cannot read what its predecessor handed over; every open fails until a reboot"),
}
_CREATE: Meanings = {
    errno.EEXIST: (LuoExistsError, "there is one of that name; its last descriptor must be closed first")
}
_RETRIEVE: Meanings = {
    errno.ENOENT: (LuoNotFoundError, "the last kernel did not hand it over, or it is finished and closed"),
    errno.EINVAL: (LuoStateError, "it was retrieved before, and that descriptor is what there is of it"),
}
_PRESERVE: Meanings = {
    errno.EEXIST: (LuoExistsError, "the session has a file of that token"),
    errno.EBUSY: (
        LuoBusyError,
        "the file is in a session already, this one or another, or in one that is not finished",
    ),
    errno.EBADF: (LuoFileError, "the descriptor is not open"),
    errno.ENOENT: (LuoFileError, "the kernel preserves no file of this kind; memfds without MFD_HUGETLB are sure"),
    errno.EOPNOTSUPP: (LuoFileError, "the file has seals, or something else, that this kernel cannot carry over"),
    errno.EFBIG: (LuoFileError, "the file is too large"),
}
_TAKE: Meanings = {
    errno.ENOENT: (LuoNotFoundError, "no file of that token was handed over, or the session is finished"),
    # The kernel allocates the descriptor before it retrieves the file, so these errors can be retried.
    errno.EMFILE: (LuoError, "this process has no free descriptor; close some and try again"),
    errno.ENFILE: (LuoError, "the system has no free file; try again"),
}
_FINISH: Meanings = {errno.EBUSY: (LuoBusyError, "a file cannot finish yet; nothing was finished, try again later")}


def _refusal(error: OSError, what: str, meanings: Meanings) -> LuoError:
    number = errno.EIO if error.errno is None else error.errno
    kind, why = meanings.get(number) or _COMMON.get(number) or (LuoError, os.strerror(number))
    return kind(number, f"{what}: {why}")


def _name(name: str) -> bytes:
    try:
        name.encode()  # `text` takes names of images, which may be other bytes
        return text("session name", name, NAME_BYTES)
    except UnicodeEncodeError as error:
        raise ParameterError(f"session name {name!r}: no UTF-8 encodes it") from error


class _Descriptor(Uncopied):
    """An owned descriptor, to which requests are made one at a time."""

    _instead = "pass the object itself to a thread, and a duplicate of its descriptor (`os.dup`) to another process"

    def __init__(self, fd: int, what: str, transport: Transport) -> None:
        self._fd = -1
        self._what = what
        self._transport = transport
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._fd = fd

    def _guard(self) -> threading.Lock:
        if self._pid != os.getpid():
            # A fork copies a lock in its state: another thread of the parent may have held it.
            self._lock, self._pid = threading.Lock(), os.getpid()
        return self._lock

    def _checked(self) -> int:
        if self._fd < 0:
            raise LuoStateError(errno.EBADF, f"{self._what}: is closed")
        return self._fd

    def _call(self, request: str, *values: int | bytes) -> list[Any]:
        """Make a request; returns the answer's fields after its size. Raises: LuoStateError once closed; OSError."""
        number, layout = REQUESTS[request]
        buffer = bytearray(layout.pack(layout.size, *values))
        with self._guard():
            self._transport.ioctl(self._checked(), number, buffer)
        return list(layout.unpack(buffer)[1:])

    @property
    def closed(self) -> bool:
        """Whether it was closed or detached."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return the descriptor, which stays this object's. Raises: LuoStateError once closed."""
        return self._checked()

    def detach(self) -> int:
        """Return the descriptor, which the caller must close from now on. Raises: LuoStateError once closed."""
        with self._guard():
            fd, self._fd = self._checked(), -1
        return fd

    def close(self) -> None:
        """Close the descriptor, once; further calls do nothing."""
        with self._guard():
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        """Return this object. Raises: LuoStateError once closed."""
        self._checked()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close the descriptor, with a ResourceWarning, if it is still open."""
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"{self._what}: was never closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        """Return the class, the name, and whether it is closed."""
        return f"<kho.luo.{type(self).__name__} {self._what}{', closed' if self.closed else ''}>"


class Device(_Descriptor):
    """The live update device, which makes and retrieves sessions. One process at a time may have it open."""

    def __init__(
        self,
        path: str | os.PathLike[str] = PATH,
        *,
        transport: Transport = KERNEL,
        release: Release | None = None,
    ) -> None:
        """Open the device. The first open after a kexec reads what was handed over.

        Args: release: of the kernel; by default of the running one.
        Raises: LuoUnavailableError; LuoBusyError; LuoPermissionError; LuoError.
        """
        self.path = os.fspath(path)
        try:
            fd = transport.open(self.path)
        except OSError as error:
            raise _refusal(error, self.path, _OPEN) from error
        super().__init__(fd, self.path, transport)
        self._release = release

    def create_session(self, name: str) -> Session:
        """Make a session for the next kernel (LIVEUPDATE_IOCTL_CREATE_SESSION).

        Args: name: by which the next kernel finds it; 1 to 63 bytes of UTF-8 without NUL.
        Raises: ParameterError; LuoExistsError; LuoStateError once closed; LuoError.
        """
        return self._session("CREATE_SESSION", name, _CREATE, incoming=False)

    def retrieve_session(self, name: str) -> Session:
        """Retrieve a session of the last kernel, once (LIVEUPDATE_IOCTL_RETRIEVE_SESSION).

        Raises: ParameterError; LuoNotFoundError; LuoStateError the second time, or once closed; LuoError.
        """
        return self._session("RETRIEVE_SESSION", name, _RETRIEVE, incoming=True)

    def _session(self, request: str, name: str, meanings: Meanings, *, incoming: bool) -> Session:
        raw = _name(name)
        try:
            fd, _ = self._call(request, -1, raw)
        except LuoStateError:
            raise
        except OSError as error:
            raise _refusal(error, f"session {name!r}", meanings) from error
        made = _made(fd, f"session {name!r}")
        return Session(made, name=name, incoming=incoming, transport=self._transport, release=self._release)


def _made(fd: int, what: str) -> int:
    if fd < 0:
        raise LuoAbiError(errno.EINVAL, f"{what}: the kernel gave no descriptor, {_OTHER_ABI}")
    return fd


class Session(_Descriptor):
    """A session: files that one owner hands to the next kernel, or that the last kernel has handed over."""

    def __init__(
        self,
        fd: int,
        *,
        name: str | None = None,
        incoming: bool | None = None,
        transport: Transport = KERNEL,
        release: Release | None = None,
    ) -> None:
        """Own the descriptor of a session, inherited or received.

        Args: name: if it is known; otherwise the kernel is asked. incoming: whether the last kernel handed it over;
            None if that is not known. release: of the kernel; by default of the running one.
        Raises: ParameterError for a number that is not a descriptor.
        """
        if not 0 <= fd < 1 << 31:
            raise ParameterError(f"fd {fd}: no descriptor")
        self._known = name
        self.incoming = incoming
        self._release = release if release is not None or transport is not KERNEL else Release.running()
        super().__init__(fd, f"session of fd {fd}" if name is None else f"session {name!r}", transport)

    @property
    def name(self) -> str:
        """The name: as given, or by GET_NAME, or before Linux 7.2 from the descriptor's link in /proc.

        Raises: LuoStateError once closed; LuoAbiError for a descriptor that is no session; LuoError.
        """
        if self._known is None:
            try:
                _, raw = self._ask("GET_NAME", 0, bytes(NAME_BYTES), what="name", meanings={})
            except LuoAbiError:
                raw = session_link(self._checked())
                if raw is None:
                    raise
            self._known = raw.split(b"\0")[0].decode("utf-8", "replace")
            self._what = f"session {self._known!r}"
        return self._known

    def preserve_fd(self, fd: int | HasFileno, token: int) -> None:
        """Preserve a file for the next kernel (LIVEUPDATE_SESSION_PRESERVE_FD).

        A memfd keeps its contents as they are at the kexec, its size, position and (from Linux 7.1) seals. Until then
        its size is fixed: calls that grow, shrink or punch it fail. The kernel holds the file, so `fd` may be closed.
        A memfd sealed against execution (F_SEAL_EXEC) may come back sealed against writing as well.

        Args: token: 64 bits by which the next kernel finds the file; each file has its own.
        Raises: ParameterError; LuoExistsError; LuoFileError; LuoBusyError; LuoStateError for a session that was
            retrieved, or is closed; LuoError. Nothing has changed then.
        """
        number = fd if isinstance(fd, int) else fd.fileno()
        if not 0 <= number < 1 << 31:
            raise ParameterError(f"fd {number}: no descriptor")
        self._direction(incoming=False, cannot="was handed over by the last kernel; what goes on needs a new session")
        self._ask("PRESERVE_FD", number, word("token", token), what=f"file {token:#x}", meanings=_PRESERVE)

    def retrieve_fd(
        self, token: int, *, size: int | None = None, sha256: str | None = None, holes: bool = False
    ) -> int:
        """Retrieve a file (LIVEUPDATE_SESSION_RETRIEVE_FD); files may be retrieved in any order.

        Args: size: bytes that were preserved, if they are known; compared with those of the file. sha256: the digest of
            its contents at the kexec, in hexadecimal, if it is known; compared. holes: accept a file with pages
            missing from a kernel that can lose them; they read as zeros.
        Returns: a descriptor, close-on-exec, which the caller must close. A second call returns another descriptor of
            the same open file.
        Raises: ParameterError; LuoNotFoundError; LuoStateError for a session that was created, or is closed;
            LuoRetrieveError if the kernel cannot retrieve it, which is final, or if what it gave is incomplete;
            LuoError if there is no free descriptor.
        """
        self._direction(incoming=True, cannot="is for the next kernel; only there files can be retrieved")
        what = f"file {word('token', token):#x}"
        fd, _ = self._ask("RETRIEVE_FD", -1, token, what=what, meanings=_TAKE, otherwise=LuoRetrieveError)
        what = f"{self._what}, {what}"
        fd = _made(fd, what)
        try:
            wrong = self._incomplete(fd, size, sha256, holes=holes)
        except BaseException:
            os.close(fd)
            raise
        if wrong is not None:
            os.close(fd)
            raise LuoRetrieveError(errno.EIO, f"{what}: {wrong}")
        return fd

    def _incomplete(self, fd: int, size: int | None, sha256: str | None, *, holes: bool) -> str | None:
        """Say how a retrieved file differs from what was preserved; None if it does not, as far as is known."""
        status = os.fstat(fd)
        if size is not None and status.st_size != size:
            return f"has {status.st_size} bytes, and {size} were preserved"
        if sha256 is not None:
            found = _digest(fd)
            return None if found == sha256.lower() else f"has SHA-256 {found}, and {sha256} was preserved"
        fix = FIXES["retrieve-partial"]
        if holes or self._release is None or fix.affects(self._release) is False or not stat.S_ISREG(status.st_mode):
            return None
        # PRESERVE_FD fills holes, so that a file that came back whole has none.
        hole = _first_hole(fd, status.st_size)
        if hole is None:
            return None
        if FIXES["memfd-dirty"].affects(self._release) is False:
            missing = f"the page at {hole:#x} is missing"
        else:
            missing = f"the page at {hole:#x} is missing, or was allocated and never written"
        return (
            f"{missing}: Linux {self._release} can report success then ({fix.upstream}), {fix.remedied()} do not; "
            "holes=True accepts the file"
        )

    def finish(self) -> None:
        """End the handover of the session's files (LIVEUPDATE_SESSION_FINISH).

        The kernel releases every file: retrieved files last as long as their descriptors, the others are freed.

        Raises: LuoBusyError if a file cannot finish yet; LuoStateError for a session that was created, or is closed;
            LuoError.
        """
        self._direction(incoming=True, cannot="is for the next kernel; only there it can finish. `close` discards it")
        self._ask("FINISH", 0, what="finish", meanings=_FINISH)

    def _direction(self, *, incoming: bool, cannot: str) -> None:
        # Linux before 7.1.5 does not check it (FIXES["ioctl-direction"]).
        if self.incoming is not None and self.incoming != incoming:
            raise LuoStateError(errno.EINVAL, f"{self._what}: {cannot}")

    def _ask(
        self,
        request: str,
        *values: int | bytes,
        what: str,
        meanings: Meanings,
        otherwise: type[LuoError] | None = None,
    ) -> list[Any]:
        try:
            return self._call(request, *values)
        except LuoStateError:
            raise
        except OSError as error:
            what = f"{self._what}, {what}"
            if error.errno == errno.EINVAL and self.incoming is None and request != "GET_NAME":
                wrong = f"{what}: the session is of the other direction, or {_OTHER_ABI}"
                raise LuoStateError(errno.EINVAL, wrong) from error
            if otherwise is not None and error.errno not in (*meanings, errno.EBADF, errno.ENOTTY, errno.E2BIG):
                number = errno.EIO if error.errno is None else error.errno
                lost = f"{what}: cannot be brought back, now or later: {os.strerror(number)}"
                raise otherwise(number, lost) from error
            raise _refusal(error, what, meanings) from error


def session_link(fd: int) -> bytes | None:
    """Read a session's name from the link of its descriptor, `anon_inode:[luo_session] NAME`.

    Returns: None for another file, or one that is not open.
    """
    with suppress(OSError):
        link = os.readlink(os.fsencode(f"/proc/self/fd/{fd}"))  # noqa: PTH115 - a Path changes names with slashes
        if link.startswith(LINK):
            return link.removeprefix(LINK)
    return None


def _first_hole(fd: int, size: int) -> int | None:
    """Find the first hole before the end of a file; the position stays. None if there is none, or none can be told."""
    with suppress(OSError):
        at = os.lseek(fd, 0, os.SEEK_CUR)
        try:
            hole = os.lseek(fd, 0, os.SEEK_HOLE) if size else 0
        finally:
            os.lseek(fd, at, os.SEEK_SET)
        return hole if hole < size else None
    return None


def _digest(fd: int) -> str:
    """Compute the SHA-256 of a file; the position stays."""
    made, at = hashlib.sha256(), 0
    while part := os.pread(fd, WINDOW, at):
        made.update(part)
        at += len(part)
    return made.hexdigest()


def available(path: str | os.PathLike[str] = PATH, *, cmdline: str | None = None) -> str | None:
    """Say why live updates are not available, with the remedy; None if the device exists.

    None means that the device can be opened, or is in use.

    The device is not opened: the first open after a kexec reads what was handed over, and blocks other processes.

    Args: cmdline: the kernel's command line, for the reason; by default /proc/cmdline.
    """
    path = os.fspath(path)
    if Path(path).exists():
        return None if os.access(path, os.R_OK) else f"{path}: this user may not open it; by default root may"
    if cmdline is None:
        cmdline = ""
        with suppress(OSError):
            cmdline = Path("/proc/cmdline").read_text(errors="replace")
    # The kernel parses both with kstrtobool, so the parser of `kho=` reads `liveupdate=` as well.
    switches = [found for found in cmdline.split() if found.startswith("liveupdate=")]
    if not kho_is_enabled(" ".join(found.replace("liveupdate", "kho", 1) for found in switches)):
        return f"{path}: is not there; boot with `liveupdate=on kho=on`"
    if not kho_is_enabled(cmdline, default=True):
        return f"{path}: is not there, as `kho=` is off; boot with `kho=on` and `liveupdate=on`"
    release = os.uname().release
    return (
        f"{path}: is not there, though `liveupdate=on` is; it takes a kernel with CONFIG_LIVEUPDATE (Linux 6.19 or "
        f"later, this is {release}) whose KHO came up, and a /dev that shows its devices"
    )
