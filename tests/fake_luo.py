"""A machine with a live update device, for tests: the rules of Linux 7.3's kernel/liveupdate and mm/memfd_luo.c.

tests/data/luo has the answers of real devices; tests/test_luo_recorded.py compares this one with them.

The device is a Unix socket, a session the end of a socket pair: a session dies when the last copy of its descriptor is
closed, in whatever process fork, exec or another socket has put it, and any process that knows the path can use the
device.

    with FakeLuo(tmp_path / "liveupdate") as machine:
        device = luo.Device(machine.path, transport=CLIENT)
        ...
        machine.kexec()  # preserved files can be retrieved, everything else is gone

Unlike on a real machine, processes survive a kexec, with descriptors that no longer answer. While a file is preserved,
`os.write`, `os.ftruncate`, `os.posix_fallocate` and kho's `punch_hole` refuse to change its size or its holes in this
process (EPERM); another process can, but `kexec` fails the test if it did. The link of a retrieved memfd is
`/memfd: (deleted)`, not `/ (deleted)`: no memfd without a name can be made here. Numbers and layouts are written out
here, apart from those of `kho.luo`, so that each checks the other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import struct
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import kho
from kho import _kho, luo
from kho.live.file import mapping

CREATE_SESSION, RETRIEVE_SESSION = 0xBA00, 0xBA01
PRESERVE_FD, RETRIEVE_FD, FINISH, GET_NAME = 0xBA40, 0xBA41, 0xBA42, 0xBA43

ALL_SEALS = 0x3F
"""MEMFD_LUO_ALL_SEALS: seal, shrink, grow, write, future_write, exec."""


class Client:
    """What a process uses instead of `open` and `ioctl` (`kho.luo.Transport`)."""

    def open(self, path: str) -> int:
        """Connect; the machine says whether it may be."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as opened:
            opened.callback(end.close)
            end.connect(path)
            (refused,) = struct.unpack("<i", end.recv(4) or struct.pack("<i", errno.ENODEV))
            if refused:
                raise OSError(refused, os.strerror(refused))
            opened.pop_all()
            return end.detach()

    def ioctl(self, fd: int, number: int, buffer: bytearray) -> None:
        """Send the request with a socket for its answer, so that any number may be under way."""
        given = struct.unpack_from("<i", buffer, 4) if number == PRESERVE_FD else ()
        passed = [file for file in given if _is_open(file)]  # before there are descriptors that it could become
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            with theirs, self._end(fd) as end:
                socket.send_fds(end, [struct.pack("<I", number) + buffer], [theirs.fileno(), *passed])
            answer, fds = _received(mine)
        (refused,) = struct.unpack_from("<i", answer or struct.pack("<i", errno.EIO))
        if refused:
            raise OSError(refused, os.strerror(refused))
        buffer[: len(answer) - 4] = answer[4:]
        if fds:
            struct.pack_into("<i", buffer, 4, fds[0])

    def _end(self, fd: int) -> socket.socket:
        copy = os.dup(fd)
        try:
            return socket.socket(fileno=copy)
        except OSError as error:
            os.close(copy)
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY)) from error


CLIENT = Client()


def _received(end: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """A message and its descriptors, close-on-exec: `socket.recv_fds` drops its flags."""
    message, ancillary, _, _ = end.recvmsg(4096, socket.CMSG_SPACE(2 * 4), flags | socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, data in ancillary:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        fds.frombytes(data)
    return message, list(fds)


@dataclass
class File:
    """A preserved file. After a kexec it is the next kernel's, held by no process until it is retrieved."""

    fd: int
    size: int
    seals: int = 0
    """As they were when it was preserved: later ones are lost."""
    status: int = 0
    """Of retrieving it: 0 not tried, 1 done, or the errno that stays, negative."""

    @property
    def inode(self) -> tuple[int, int]:
        """What makes it the same file (memfd_luo_get_id)."""
        found = os.fstat(self.fd)
        return found.st_dev, found.st_ino


@dataclass
class Session:
    """A session, in one of the two lists."""

    name: bytes
    retrieved: bool = False
    files: dict[int, File] = field(default_factory=dict)


class FakeLuo:
    """A machine that was booted with `liveupdate=on`, its device at `path`."""

    def __init__(self, path: str | os.PathLike[str], memory: int | None = None) -> None:
        """Switch it on. Args: memory: bytes that preserved files can take; preserving more is ENOMEM."""
        self.path = Path(path)
        self.memory = memory
        self.pid = os.getpid()
        self.kexecs = 0
        self._lock = threading.RLock()
        self._outgoing: dict[bytes, Session] = {}
        self._incoming: dict[bytes, Session] = {}
        self._preserved: set[tuple[int, int]] = set()
        self._faults: dict[tuple[str, str, int], int] = {}
        self._ends: dict[int, tuple[socket.socket, Session | None]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen()
        self._waker, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="fake-luo", daemon=True)
        self._thread.start()
        _machines.append(self)
        _interpose()

    # What a test does and asks

    def fail(self, step: str, session: str, token: int, number: int) -> None:
        """Let a step ("preserve", "freeze", "retrieve", "finish") fail for a file until `heal`."""
        self._faults[step, session, token] = number

    def heal(self, step: str, session: str, token: int) -> None:
        """Undo `fail`."""
        del self._faults[step, session, token]

    def outgoing(self) -> dict[str, set[int]]:
        """Sessions that a kexec would hand over now, with their tokens."""
        return self._listed(self._outgoing)

    def incoming(self) -> dict[str, set[int]]:
        """Sessions of the last kernel that are not done with, with their tokens."""
        return self._listed(self._incoming)

    def _listed(self, sessions: dict[bytes, Session]) -> dict[str, set[int]]:
        with self._lock:
            self._reap()
            return {session.name.decode(): set(session.files) for session in sessions.values()}

    def kexec(self) -> None:
        """Boot the next kernel: outgoing sessions come in, every descriptor and incoming session is gone.

        Raises: OSError if a file does not freeze: the old kernel goes on as if nothing had been.
        """
        with self._lock:
            self._reap()
            for session in self._outgoing.values():
                for token, file in session.files.items():
                    if number := self._faults.get(("freeze", session.name.decode(), token)):
                        raise OSError(number, os.strerror(number))
                    changed = os.fstat(file.fd).st_size
                    assert changed == file.size, f"file {token:#x} went from {file.size} to {changed} bytes: EPERM"
            arriving = {
                name: Session(name, files={t: File(reproduced(f), f.size) for t, f in session.files.items()})
                for name, session in self._outgoing.items()
            }
            self._drop()
            self._incoming = arriving
            self.kexecs += 1

    def handover(self, arena: kho.Arena) -> kho.Outgoing:
        """What a kexec would hand over now, as a finalized kho-v4 handover in an arena."""
        out = kho.Outgoing(arena, "kho-v4")
        with self._lock:
            self._reap()
            out.add_luo(liveupdate_num=self.kexecs + 1)
            for session in self._outgoing.values():
                out.add_session(session.name.decode())
                for token, file in session.files.items():
                    contents = os.pread(file.fd, file.size, 0)
                    pos = os.lseek(file.fd, 0, os.SEEK_CUR)
                    out.add_memfd(session.name.decode(), token, contents, pos=pos, seals=file.seals)
        out.finalize()
        return out

    def is_frozen(self, fd: int) -> bool:
        """Whether a file is preserved for the next kernel: its size and holes are fixed (SHMEM_F_MAPPING_FROZEN)."""
        with self._lock:
            self._reap()
            found = os.fstat(fd)
            frozen = [file.inode for session in self._outgoing.values() for file in session.files.values()]
            return (found.st_dev, found.st_ino) in frozen

    def close(self) -> None:
        """Switch the machine off."""
        _machines.remove(self)
        _interpose()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._waker.close()
        self._wake.close()
        self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Descriptors

    def _serve(self) -> None:
        try:
            while True:
                poll = select.poll()
                with self._lock:
                    for fd in (self._listener.fileno(), self._waker.fileno(), *self._ends):
                        poll.register(fd, select.POLLIN)
                for fd, event in poll.poll():
                    if fd == self._listener.fileno():
                        if event & select.POLLHUP:
                            return
                        self._accept()
                    elif fd == self._waker.fileno():
                        self._waker.recv(4096)
                    else:
                        self._receive(fd)
        finally:
            with self._lock:  # no client waits for an answer
                self._drop()

    def _accept(self) -> None:
        end, _ = self._listener.accept()
        with self._lock:
            self._reap()
            busy = any(session is None for _, session in self._ends.values())
            with contextlib.suppress(BrokenPipeError):
                end.send(struct.pack("<i", errno.EBUSY if busy else 0))
            if busy:
                end.close()
            else:
                self._ends[end.fileno()] = (end, None)

    def _receive(self, fd: int) -> None:
        with self._lock:
            self._reap()  # what was closed before the request was made is gone when it is answered
            if fd not in self._ends:
                return
            end, session = self._ends[fd]
            try:
                message, fds = _received(end, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            with contextlib.ExitStack() as received:
                for got in fds:
                    received.callback(os.close, got)
                if len(fds) >= 1:
                    self._answer(session, message, *fds)

    def _answer(self, session: Session | None, message: bytes, reply: int, given: int = -1) -> None:
        with socket.socket(fileno=os.dup(reply)) as to, contextlib.ExitStack() as made:
            try:
                (number,) = struct.unpack_from("<I", message)
                answer, fd = self._ioctl(session, number, message[4:], given)
                if fd >= 0:
                    made.callback(os.close, fd)
                data, passed = struct.pack("<i", 0) + answer, [fd] * (fd >= 0)
            except OSError as error:
                data, passed = struct.pack("<i", error.errno or errno.EIO), []
            with contextlib.suppress(BrokenPipeError):
                socket.send_fds(to, [data], passed)

    def _reap(self) -> None:
        """Release the sessions whose descriptors are all closed."""
        poll = select.poll()
        for fd in self._ends:
            poll.register(fd, 0)
        for fd, _ in poll.poll(0):
            end, session = self._ends.pop(fd)
            end.close()
            if session is not None:
                self._release(session)

    def _session_fd(self, session: Session) -> int:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ends[mine.fileno()] = (mine, session)
        return theirs.detach()

    def _drop(self) -> None:
        for end, _ in self._ends.values():
            end.close()
        self._ends.clear()
        for session in (*self._outgoing.values(), *self._incoming.values()):
            self._let_go(session)
        self._outgoing, self._incoming = {}, {}
        assert not self._preserved, "a file stayed in the books"
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    # The rules

    def _ioctl(self, session: Session | None, number: int, user: bytes, given: int) -> tuple[bytes, int]:
        """A request: the structure as the caller gets it back, and a descriptor for its `fd` or -1."""
        nr = number & 0xFF
        if session is None:
            # (least size, size that is copied, size of the answer, whether of incoming sessions)
            known: dict[int, tuple[int, int, int, bool | None]] = {
                CREATE_SESSION: (72, 72, 72, None),
                RETRIEVE_SESSION: (72, 72, 72, None),
            }
            in_range = nr < 2
        else:
            known = {
                PRESERVE_FD: (16, 16, 16, False),
                RETRIEVE_FD: (16, 16, 16, True),
                FINISH: (8, 8, 8, True),
                GET_NAME: (72, 72, 72, None),
            }
            in_range = 0x40 <= nr < 0x44
        if not in_range:
            raise _error(errno.EINVAL)
        if len(user) < 4:
            raise _error(errno.EFAULT)
        (size,) = struct.unpack_from("<I", user)
        if number not in known:
            raise _error(errno.ENOTTY)
        least, copied, answered, incoming = known[number]
        if session is not None and incoming not in (None, session.retrieved):
            raise _error(errno.EINVAL)
        if size < least:
            raise _error(errno.EINVAL)
        if len(user) < size:
            raise _error(errno.EFAULT)
        if any(user[copied:size]):
            raise _error(errno.E2BIG)
        answer, fd = self._execute(session, number, user[:copied].ljust(copied, b"\0"), given)
        return answer.ljust(answered, b"\0")[: min(size, answered)], fd

    def _execute(self, session: Session | None, number: int, user: bytes, given: int) -> tuple[bytes, int]:
        if session is None:
            _, _, raw = struct.unpack("<Ii64s", user)
            return user, (self._create if number == CREATE_SESSION else self._retrieve_session)(raw)
        if number == GET_NAME:
            if struct.unpack_from("<I", user, 4) != (0,):
                raise _error(errno.EINVAL)
            return user[:8] + session.name.ljust(64, b"\0"), -1
        if number == FINISH:
            if struct.unpack_from("<I", user, 4) != (0,):
                raise _error(errno.EINVAL)
            self._finish(session)
            return user, -1
        _, _, token = struct.unpack("<IiQ", user)
        if number == RETRIEVE_FD:
            return user, self._retrieve(session, token)
        self._preserve(session, token, given)
        return user, -1

    def _create(self, raw: bytes) -> int:
        name, nul, _ = raw.partition(b"\0")
        if not name or not nul:
            raise _error(errno.EINVAL)
        if name in self._outgoing:
            raise _error(errno.EEXIST)
        made = self._outgoing[name] = Session(name)
        return self._session_fd(made)

    def _retrieve_session(self, raw: bytes) -> int:
        session = self._incoming.get(raw.partition(b"\0")[0])
        if session is None:
            raise _error(errno.ENOENT)
        if session.retrieved:
            raise _error(errno.EINVAL)
        session.retrieved = True
        return self._session_fd(session)

    def _preserve(self, session: Session, token: int, given: int) -> None:
        if token in session.files:
            raise _error(errno.EEXIST)
        if given < 0 or fcntl.fcntl(given, fcntl.F_GETFL) & os.O_PATH:
            raise _error(errno.EBADF)
        if not _can_preserve(given):
            raise _error(errno.ENOENT)
        file = File(given, os.fstat(given).st_size, fcntl.fcntl(given, fcntl.F_GET_SEALS))
        if file.inode in self._preserved:
            raise _error(errno.EBUSY)
        self._fault("preserve", session, token)
        if file.seals & ~ALL_SEALS:
            raise _error(errno.EOPNOTSUPP)
        taken = sum(other.size for one in self._outgoing.values() for other in one.files.values())
        if self.memory is not None and taken + file.size > self.memory:
            raise _error(errno.ENOMEM)
        if file.size:  # memfd_pin_folios allocates what is not there
            with Path(f"/proc/self/fd/{given}").open("r+b", buffering=0) as writable:  # it may be open for reading
                _fallocate(writable.fileno(), 0, file.size)
        file.fd = os.dup(given)
        session.files[token] = file
        self._preserved.add(file.inode)

    def _retrieve(self, session: Session, token: int) -> int:
        file = session.files.get(token)
        if file is None:
            raise _error(errno.ENOENT)
        if file.status == 0:
            number = self._faults.get(("retrieve", session.name.decode(), token), 0)
            file.status = -number or 1
            if number:  # its memory went with the attempt
                os.close(file.fd)
            else:
                self._preserved.add(file.inode)
        if file.status < 0:
            raise _error(-file.status)
        return os.dup(file.fd)

    def _finish(self, session: Session) -> None:
        for token in session.files:
            self._fault("finish", session, token)
        self._let_go(session)

    def _release(self, session: Session) -> None:
        """The last descriptor was closed (luo_session_release)."""
        if not session.retrieved:
            self._let_go(session)
            del self._outgoing[session.name]
            return
        with contextlib.suppress(OSError):  # a file that cannot finish stays, and cannot be retrieved again
            self._finish(session)
            del self._incoming[session.name]

    def _let_go(self, session: Session) -> None:
        for file in session.files.values():
            if file.status >= 0:
                self._preserved.discard(file.inode)
                os.close(file.fd)
        session.files.clear()

    def _fault(self, step: str, session: Session, token: int) -> None:
        if number := self._faults.get((step, session.name.decode(), token)):
            raise _error(number)


def _is_open(fd: int) -> bool:
    try:
        return fd >= 0 and os.fstat(fd) is not None
    except OSError:
        return False


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _can_preserve(fd: int) -> bool:
    """Whether it is shmem that no name leads to (memfd_luo_can_preserve)."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return os.fstat(fd).st_nlink == 0 and os.fstatvfs(fd).f_bsize == os.sysconf("SC_PAGESIZE")


def reproduced(file: File) -> int:
    """A memfd as the next kernel makes it (memfd_luo_retrieve): contents, size, position and seals.

    It is a file of mode 0777, so this kernel adds the seals against writing to F_SEAL_EXEC, as that one does.
    """
    old = file.fd
    new = os.memfd_create("", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(new, os.fstat(old).st_size)
    if file.size:
        _fallocate(new, 0, file.size)
    for start, end in _data(old):
        at = start
        os.lseek(new, start, os.SEEK_SET)
        while at < end:
            at += os.sendfile(new, old, at, end - at)
    os.lseek(new, os.lseek(old, 0, os.SEEK_CUR), os.SEEK_SET)
    fcntl.fcntl(new, fcntl.F_ADD_SEALS, file.seals)
    return new


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """Where a file has data; the position stays."""
    pos = os.lseek(fd, 0, os.SEEK_CUR)
    size, at = os.fstat(fd).st_size, 0
    try:
        while at < size:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, at, os.SEEK_HOLE)
            yield at, end
            at = end
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.lseek(fd, pos, os.SEEK_SET)


# Preserved files do not change their size

_machines: list[FakeLuo] = []
_fallocate = os.posix_fallocate
_real: dict[tuple[Any, str], Any] = {}


def _refused(fd: Any, changes: bool) -> None:
    """Raise EPERM for a change of a preserved file."""
    if changes and any(os.getpid() == machine.pid and machine.is_frozen(fd) for machine in _machines):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _is_memory(fd: Any) -> bool:
    try:
        found = os.fstat(fd)
    except (OSError, TypeError):
        return False
    return stat.S_ISREG(found.st_mode) and not found.st_nlink


def _interpose() -> None:
    """Let the calls that change a file's size or holes fail for preserved files, while there is a machine."""
    places = [(os, name) for name in ("write", "pwrite", "truncate", "ftruncate", "posix_fallocate")]
    places += [(mapping, "punch_hole"), (_kho, "punch_hole")]
    if not _machines:
        for (place, name), real in _real.items():
            setattr(place, name, real)
        _real.clear()
    elif not _real:
        for place, name in places:
            _real[place, name] = getattr(place, name)
            setattr(place, name, _checked(name, getattr(place, name)))


def _checked(name: str, real: Any) -> Any:
    def checked(fd: Any, *args: Any) -> Any:
        if _is_memory(fd):
            size = os.fstat(fd).st_size
            if name in ("write", "pwrite"):
                at = args[1] if name == "pwrite" else os.lseek(fd, 0, os.SEEK_CUR)
                _refused(fd, at + memoryview(args[0]).nbytes > size)
            else:
                _refused(fd, name not in ("truncate", "ftruncate") or args[0] != size)
        return real(fd, *args)

    return checked


# What tests do with it


def opened(machine: FakeLuo) -> luo.Device:
    """The device."""
    return luo.Device(machine.path, transport=CLIENT)


def create(machine: FakeLuo, name: str = "search-index") -> luo.Session:
    """A session for the next kernel; the device is closed again."""
    with opened(machine) as device:
        return device.create_session(name)


def retrieve(machine: FakeLuo, name: str = "search-index") -> luo.Session:
    """A session of the last kernel; the device is closed again."""
    with opened(machine) as device:
        return device.retrieve_session(name)


def memfd(contents: bytes = b"", *, pos: int = 0, seals: int = 0) -> int:
    """A memfd with these contents."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.pwrite(fd, contents, 0)
    os.lseek(fd, pos, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def hand_over(machine: FakeLuo, files: dict[int, bytes], name: str = "search-index") -> luo.Session:
    """A session of these files, by token, retrieved after a kexec."""
    with create(machine, name) as session:
        for token, contents in files.items():
            fd = memfd(contents)
            session.preserve_fd(fd, token)
            os.close(fd)
        machine.kexec()
    return retrieve(machine, name)


def contents_of(fd: int) -> bytes:
    """What a file holds, up to 1 MiB; the descriptor is closed."""
    try:
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)
