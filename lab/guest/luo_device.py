"""Requests to a live update device over three kernels, and their answers: one record each.

In a guest: boot with lab=luo_device.py phase=1; the records are JSON on lines that begin with `R `. On the host,
tests/test_luo_recorded.py makes the same requests of tests/fake_luo.py. A record is

    {"phase": 1, "what": "preserve again elsewhere", "answer": "EBUSY", "ioctls": [["PRESERVE_FD", 16, "EBUSY"]]}

with each ioctl as its request, the size that it gives, and its errno. Records whose name begins with `x ` are of the
real device alone: a fake has no such file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import resource
import socket
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kho
from kho import luo

CREATE, RETRIEVE, PRESERVE, TAKE, FINISH, NAME = 0xBA00, 0xBA01, 0xBA40, 0xBA41, 0xBA42, 0xBA43
NAMES = {request.number: name for name, request in luo.REQUESTS.items()}
ADD_SEALS, GET_SEALS = 1033, 1034
PHASES = 3
WIDE = (2**64 - 1, 1 << 63, 7 << 32 | 7)
"""Tokens that do not fit 32 bits."""
LONG = "\u00fc" * 31 + "l"
"""A name of 63 bytes."""


def name_of(error: OSError) -> str:
    """An errno as its name."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def tried(call: Callable[..., Any], *args: Any) -> Any:
    """What a call returns, or how it fails; "ok" for None."""
    try:
        result = call(*args)
    except kho.KhoError as error:
        return f"{type(error).__name__}({name_of(error) if isinstance(error, OSError) else '-'})"
    except OSError as error:
        return name_of(error)
    return "ok" if result is None else result


def session_struct(name: bytes | str, size: int = 72, fd: int = -1) -> bytes:
    """The structure of CREATE_SESSION and RETRIEVE_SESSION."""
    raw = name if isinstance(name, bytes) else name.encode()
    return struct.pack("<Ii", size, fd) + raw.ljust(64, b"\0")[:64]


def memfd(content: bytes = b"", size: int | None = None, flags: int = 0, seals: int = 0, pos: int = 0) -> int:
    """A memfd that can be sealed."""
    fd = os.memfd_create("t", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.pwrite(fd, content, 0)
    if size is not None:
        os.ftruncate(fd, size)
    os.lseek(fd, pos, 0)
    if seals:
        fcntl.fcntl(fd, ADD_SEALS, seals)
    return fd


def pattern(nbytes: int, seed: int) -> bytes:
    """Bytes that tell which they are."""
    return (bytes((seed + i * 7) & 255 for i in range(251)) * (nbytes // 251 + 1))[:nbytes]


def shown(fd: int) -> str:
    """A file's size, position, seals, mode, flags, links, and the start of its SHA-256."""
    status = os.fstat(fd)
    digest = hashlib.sha256(os.pread(fd, 1 << 24, 0)).hexdigest()[:12]
    return (
        f"size {status.st_size} pos {os.lseek(fd, 0, 1)} seals {fcntl.fcntl(fd, GET_SEALS):#x} "
        f"mode {status.st_mode & 0o777:o} cloexec {fcntl.fcntl(fd, fcntl.F_GETFD)} "
        f"flags {fcntl.fcntl(fd, fcntl.F_GETFL) & 3} nlink {status.st_nlink} {digest}"
    )


def in_child(work: Callable[[], object]) -> None:
    """Do something in a child, and wait for its end."""
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    os.waitpid(pid, 0)


class Recorder:
    """Makes the requests of each phase, and keeps what was answered."""

    def __init__(self, transport: luo.Transport, path: str, *, real: bool, out: Callable[[dict[str, Any]], object]):
        self.inner = transport
        self.path = path
        self.real = real
        self.out = out
        self.phase = 1
        self.ioctls: list[list[Any]] = []
        self.kept: list[Any] = []

    def open(self, path: str) -> int:
        """As a transport."""
        return self.inner.open(path)

    def ioctl(self, fd: int, number: int, buffer: bytearray) -> None:
        """As a transport: notes the request and its errno."""
        size = struct.unpack_from("<I", buffer)[0] if len(buffer) >= 4 else 0
        entry = [NAMES.get(number, f"{number:#x}"), size, "ok"]
        self.ioctls.append(entry)
        try:
            self.inner.ioctl(fd, number, buffer)
        except OSError as error:
            entry[2] = name_of(error)
            raise

    def say(self, what: str, answer: Any) -> None:
        """Record an answer, with the ioctls since the last one."""
        ioctls, self.ioctls = self.ioctls, []
        plain = answer if isinstance(answer, str | int | None) else str(answer)
        self.out({"phase": self.phase, "what": what, "answer": plain, "ioctls": ioctls})

    def asked(self, fd: int, number: int, user: bytes) -> tuple[str, bytearray]:
        """A request: "ok" or its errno, and the buffer after it."""
        buffer = bytearray(user)
        try:
            self.ioctl(fd, number, buffer)
        except OSError as error:
            return name_of(error), buffer
        return "ok", buffer

    def make(self, device: int, name: bytes | str) -> int:
        """Create a session."""
        result, buffer = self.asked(device, CREATE, session_struct(name))
        assert result == "ok", result
        return struct.unpack_from("<i", buffer, 4)[0]

    def session(self, device: int, name: bytes | str) -> tuple[str, int]:
        """Retrieve a session."""
        result, buffer = self.asked(device, RETRIEVE, session_struct(name))
        return result, struct.unpack_from("<i", buffer, 4)[0]

    def preserve(self, session: int, fd: int, token: int) -> str:
        """Preserve a file."""
        return self.asked(session, PRESERVE, struct.pack("<IiQ", 16, fd, token))[0]

    def take(self, session: int, token: int) -> tuple[str, int]:
        """Retrieve a file."""
        result, buffer = self.asked(session, TAKE, struct.pack("<IiQ", 16, -1, token))
        return result, struct.unpack_from("<i", buffer, 4)[0]

    def device(self) -> luo.Device:
        """The device through kho.luo; no release, so that nothing depends on that of the kernel."""
        return luo.Device(self.path, transport=self)

    # The first kernel

    def first(self) -> None:
        """Everything that needs no handover."""
        self.devices()
        device = self.open(self.path)
        session = self.forms(device)
        self.directions(session)
        second, path_only = self.sizes_of_preserve(device, session)
        self.files(device, second)
        self.preserved_file(second)
        kid = self.lives(device)
        self.kept = [second, kid, *self.api(path_only)]

    def devices(self) -> None:
        """Opening the device."""
        device = self.open(self.path)
        self.say("open twice", tried(self.open, self.path))
        reading, writing = os.pipe()
        in_child(lambda: os.write(writing, str(tried(self.open, self.path)).encode()))
        self.say("open in a child", os.read(reading, 100).decode())
        copy = os.dup(device)
        os.close(device)
        self.say("open while a dup of it lives", tried(self.open, self.path))
        os.close(copy)
        device = self.open(self.path)
        self.say("open again", "ok")
        self.say("device cloexec", fcntl.fcntl(device, fcntl.F_GETFD))
        if self.real:
            self.say("x device O_RDONLY while open", tried(os.open, self.path, os.O_RDONLY))
            for what, call in (
                ("read", lambda: os.read(device, 8)),
                ("write", lambda: os.write(device, b"x")),
                ("mmap", lambda: mmap.mmap(device, 4096)),
                ("lseek", lambda: os.lseek(device, 0, 0)),
            ):
                self.say(f"x device {what}", tried(call))
        os.close(device)
        device = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC) if self.real else self.open(self.path)
        self.say("create through a device opened O_RDONLY", self.asked(device, CREATE, session_struct("ro"))[0])
        os.close(device)

    def forms(self, device: int) -> int:
        """Requests of other numbers and sizes; names."""
        for number in (0xBA02, 0xBA40, 0xBAFF, 0xBB00, 0xBA00 | 1 << 30, 0x5401):
            self.say(f"device request {number:#x}", self.asked(device, number, session_struct("nr"))[0])
        for size in (0, 3, 8, 71, 73, 80, 4000):
            user = struct.pack("<Ii", size, -1) + b"sz%d\0" % size
            self.say(f"create size {size}", self.asked(device, CREATE, user.ljust(max(size, 72), b"\0"))[0])
        user = session_struct("e2", 80).ljust(79, b"\0") + b"\1"
        self.say("create size 80 with 1 at its end", self.asked(device, CREATE, user)[0])
        self.say("create without NUL", self.asked(device, CREATE, session_struct(b"n" * 64))[0])
        self.say("create empty", self.asked(device, CREATE, session_struct(b""))[0])
        self.say("create empty, more after the NUL", self.asked(device, CREATE, session_struct(b"\0x"))[0])
        result, buffer = self.asked(device, CREATE, session_struct(b"m" * 63))
        self.say("create 63 bytes", result)
        self.say("answer keeps the name", bytes(buffer[8:]) == b"m" * 63 + b"\0")
        result, buffer = self.asked(device, CREATE, session_struct(b"odd\xff\n/ \x01", fd=77))
        self.say("create odd bytes", result)
        odd = struct.unpack_from("<i", buffer, 4)[0]
        self.say("fd given in is ignored", odd != 77)
        self.say("session cloexec", fcntl.fcntl(odd, fcntl.F_GETFD))
        result, buffer = self.asked(odd, NAME, struct.pack("<II", 72, 0) + bytes(64))
        self.say("get name", (result, bytes(buffer[8:]).rstrip(b"\0")))
        for size in (4, 8, 15, 16, 71, 72, 80):
            user = (struct.pack("<II", size, 0) + b"\xee" * 64).ljust(max(size, 72), b"\0")
            result, buffer = self.asked(odd, NAME, user)
            self.say(f"get name size {size}, name not zero", (result, bytes(buffer[8:24])))
        user = struct.pack("<II", 80, 0).ljust(79, b"\0") + b"\1"
        self.say("get name size 80 with 1 at its end", self.asked(odd, NAME, user)[0])
        self.say("get name reserved 1", self.asked(odd, NAME, struct.pack("<II", 72, 1) + bytes(64))[0])
        result, buffer = self.asked(device, CREATE, session_struct(b"first\0garbage"))
        self.say("create garbage after the NUL", result)
        first = struct.unpack_from("<i", buffer, 4)[0]
        self.say("again, other garbage", self.asked(device, CREATE, session_struct(b"first\0other"))[0])
        result, buffer = self.asked(device, CREATE, session_struct(b"first", fd=55))
        self.say("a refusal leaves the buffer", (result, struct.unpack_from("<i", buffer, 4)[0]))
        for what, name in (
            ("on a cold boot", "nothing"),
            ("an outgoing name", "first"),
            ("empty", ""),
            ("without NUL", "q" * 64),
        ):
            self.say(f"retrieve {what}", self.asked(device, RETRIEVE, session_struct(name))[0])
        for number in (0xBA00, 0xBA3F, 0xBA44, 0xBB40, 0xBA40 | 1 << 30):
            self.say(f"session request {number:#x}", self.asked(first, number, struct.pack("<IiQ", 16, -1, 1))[0])
        return first

    def directions(self, session: int) -> None:
        """Requests to a session for the next kernel that are for one of the last."""
        self.say("finish outgoing", self.asked(session, FINISH, struct.pack("<II", 8, 0))[0])
        self.say("take from outgoing", self.take(session, 1)[0])
        self.say("take from outgoing, size 4", self.asked(session, TAKE, struct.pack("<IiQ", 4, -1, 1))[0])

    def sizes_of_preserve(self, device: int, first: int) -> tuple[int, int]:
        """Sizes, tokens, and one file in one session."""
        a = memfd(pattern(5000, 1), pos=1234)
        for size in (4, 8, 15, 17):
            user = struct.pack("<IiQ", size, a, 99).ljust(max(size, 16), b"\0")
            self.say(f"preserve size {size}", self.asked(first, PRESERVE, user)[0])
        user = struct.pack("<IiQ", 24, a, 98) + b"\1" + bytes(7)
        self.say("preserve size 24 with 1 after it", self.asked(first, PRESERVE, user)[0])
        second = self.make(device, "second")
        self.say("preserve again elsewhere", self.preserve(second, a, 1))
        self.say("close session", tried(os.close, first))
        self.say("name is free after close", tried(lambda: os.close(self.make(device, "first"))))
        self.say("preserve", self.preserve(second, a, 1))
        self.say("same token", self.preserve(second, memfd(b"b"), 1))
        self.say("same token, same file", self.preserve(second, a, 1))
        self.say("same token, bad fd", self.preserve(second, -1, 1))
        self.say("same file, other token", self.preserve(second, a, 2))
        again = os.open(f"/proc/self/fd/{a}", os.O_RDWR)
        self.say("same inode opened again", self.preserve(second, again, 3))
        os.close(again)
        self.say("fd -1", self.preserve(second, -1, 4))
        self.say("fd 9999", self.preserve(second, 9999, 4))
        self.say("fd is the session", self.preserve(second, second, 4))
        self.say("fd is the device", self.preserve(second, device, 4))
        return second, a

    def files(self, device: int, second: int) -> None:
        """What can be preserved."""
        pipe, _ = os.pipe()
        stream, _other = socket.socketpair()
        for what, fd in (
            ("pipe", pipe),
            ("socket", stream.fileno()),
            ("eventfd", os.eventfd(0)),
            ("/dev/null", os.open("/dev/null", os.O_RDWR)),
            ("folder", os.open("/dev/shm", os.O_RDONLY)),
            ("/proc file", os.open("/proc/self/stat", os.O_RDONLY)),
        ):
            self.say(f"preserve {what}", self.preserve(second, fd, 5))
        named = os.open("/dev/shm/kho-lab-named", os.O_RDWR | os.O_CREAT, 0o600)
        os.write(named, b"named")
        self.say("tmpfs file with a name", self.preserve(second, named, 6))
        Path("/dev/shm/kho-lab-named").unlink()
        self.say("tmpfs file, unlinked", self.preserve(second, named, 6))
        unnamed = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE, 0o600)
        os.write(unnamed, b"tmpfile")
        self.say("tmpfs O_TMPFILE", self.preserve(second, unnamed, 7))
        path = os.open(f"/proc/self/fd/{memfd(b'path')}", os.O_PATH)
        self.say("O_PATH of a memfd", self.preserve(second, path, 8))
        reading = os.open(f"/proc/self/fd/{memfd(b'readonly')}", os.O_RDONLY)
        self.say("O_RDONLY of a memfd", self.preserve(second, reading, 9))
        self.say("hugetlb memfd", self.preserve(second, os.memfd_create("h", os.MFD_HUGETLB), 10))
        unsealable = os.memfd_create("n", os.MFD_CLOEXEC)
        os.write(unsealable, b"no sealing")
        self.say("memfd without ALLOW_SEALING", self.preserve(second, unsealable, 11))
        noexec = os.memfd_create("n", os.MFD_CLOEXEC | 0x8)
        os.write(noexec, b"noexec")
        self.say("memfd NOEXEC_SEAL", (self.preserve(second, noexec, 12), fcntl.fcntl(noexec, GET_SEALS)))
        for i, seals in enumerate((1, 2, 4, 8, 16, 0x20, 0x3F, 0x1F)):
            fd = memfd(pattern(9000, i), seals=seals)
            what = f"memfd seals {seals:#x}, which are {fcntl.fcntl(fd, GET_SEALS):#x}"
            self.say(what, self.preserve(second, fd, 0x100 + seals))
        self.say("empty memfd", self.preserve(second, memfd(), 13))
        self.say("one byte", self.preserve(second, memfd(b"1"), 14))
        sparse = memfd(size=8 << 20)
        before = os.fstat(sparse).st_blocks
        self.say("sparse 8 MiB", self.preserve(second, sparse, 15))
        self.say("its blocks before and after", (before, os.fstat(sparse).st_blocks))
        self.say("token 0", self.preserve(second, memfd(b"zero"), 0))
        self.say("token 2^64-1", self.preserve(second, memfd(b"max"), 2**64 - 1))

    def preserved_file(self, second: int) -> None:
        """What can be done with a file while it is preserved."""
        c = memfd(pattern(10000, 3), pos=11)
        self.say("preserve c", self.preserve(second, c, 20))
        self.say("preserved: write inside", tried(os.pwrite, c, b"changed", 100))
        for what, call in (
            ("write past the end", lambda: os.pwrite(c, b"x" * 10, 9995)),
            ("write at the end", lambda: os.pwrite(c, b"x", 10000)),
            ("write far past the end", lambda: os.pwrite(c, b"x", 20000)),
            ("truncate smaller", lambda: os.ftruncate(c, 5000)),
            ("truncate larger", lambda: os.ftruncate(c, 50000)),
            ("truncate same", lambda: os.ftruncate(c, 10000)),
            ("fallocate inside", lambda: os.posix_fallocate(c, 0, 4096)),
            ("fallocate past the end", lambda: os.posix_fallocate(c, 0, 40960)),
            ("fchmod", lambda: os.fchmod(c, 0o600)),
        ):
            self.say(f"preserved: {what}", tried(call))
        self.say("preserved: add seals", (tried(lambda: fcntl.fcntl(c, ADD_SEALS, 2)), fcntl.fcntl(c, GET_SEALS)))
        os.lseek(c, 222, 0)
        mapped = mmap.mmap(c, 10000)
        mapped[200:207] = b"through"
        self.say("preserved: write through a mapping", "ok")

    def lives(self, device: int) -> int:
        """How long sessions live."""
        e = memfd(b"e1")
        short = self.make(device, "short")
        self.say("preserve e", self.preserve(short, e, 1))
        copy = os.dup(short)
        os.close(short)
        self.say("after closing one of two", self.preserve(copy, memfd(b"more"), 2))
        os.close(copy)
        self.say("name of it is free", tried(lambda: os.close(self.make(device, "short"))))
        self.say("e can grow again", tried(os.ftruncate, e, 5000))
        kid = self.make(device, "kid")
        in_child(lambda: os.close(kid))
        self.say("after a child's close", self.preserve(kid, memfd(b"kid"), 1))

        def orphan() -> None:
            self.preserve(self.make(device, "orphan"), memfd(b"orphan"), 1)

        in_child(orphan)
        self.say("name of a session whose process ended is free", tried(lambda: os.close(self.make(device, "orphan"))))
        os.close(device)
        self.say("a session works without the device", self.preserve(kid, memfd(b"kid2"), 2))
        return kid

    def api(self, a: int) -> tuple[luo.Session, ...]:
        """The same through kho.luo."""
        with self.device() as device:
            self.say("api: second device", tried(self.device))
            big = device.create_session("api")
            self.say("api: same name", tried(device.create_session, "api"))
            for name in ("", "n" * 64, "a\0b", "\ud800"):
                self.say(f"api: name {name[:4]!r} of {len(name)}", tried(device.create_session, name))
            self.say("api: retrieve nothing", tried(device.retrieve_session, "nothing"))
            long = device.create_session(LONG)
            self.say("api: long name", len(LONG.encode()))
            discarded = device.create_session("discarded")
        self.say("api: closed device", tried(device.create_session, "x"))
        self.say("api: preserve", tried(big.preserve_fd, memfd(pattern(70000, 9), pos=70), 7))
        for token in WIDE:
            self.say(f"api: preserve {token:#x}", tried(big.preserve_fd, memfd(f"{token:x}".encode()), token))
        pipe, _ = os.pipe()
        self.say("api: pipe", tried(big.preserve_fd, pipe, 8))
        self.say("api: bad fd", tried(big.preserve_fd, 9999, 8))
        self.say("api: same token", tried(big.preserve_fd, memfd(b"x"), 7))
        twice = memfd(b"dup")
        big.preserve_fd(twice, 9)
        self.say("api: same file", tried(big.preserve_fd, twice, 10))
        self.say("api: hugetlb", tried(big.preserve_fd, os.memfd_create("h", os.MFD_HUGETLB), 11))
        self.say("api: retrieve_fd of outgoing", tried(big.retrieve_fd, 7))
        self.say("api: finish of outgoing", tried(big.finish))
        with luo.Session(os.dup(big.fileno()), transport=self) as adopted:
            self.say("api: name of a descriptor", tried(lambda: adopted.name))
            self.say("api: retrieve_fd of a descriptor", tried(adopted.retrieve_fd, 7))
            self.say("api: finish of a descriptor", tried(adopted.finish))
            self.say("api: preserve_fd of a descriptor", tried(adopted.preserve_fd, memfd(b"S"), 12))
        discarded.preserve_fd(memfd(b"gone"), 1)
        discarded.close()
        with self.device() as device:
            never = device.create_session("never")
            never.preserve_fd(memfd(pattern(30000, 5)), 1)
            never.preserve_fd(memfd(pattern(30000, 6)), 2)
            lost = device.create_session("lost")
            lost.preserve_fd(memfd(b"lost"), 1)
            none = device.create_session("none")
        return big, never, lost, none, long

    # The second kernel

    def second(self) -> None:
        """What comes in, and what goes on."""
        device = self.open(self.path)
        for name in ("first", "discarded", "orphan", "short", "x", ""):
            self.say(f"session {name!r}", self.session(device, name)[0])
        result, none = self.session(device, "none")
        self.say("empty session", result)
        self.say("empty session: finish", self.asked(none, FINISH, struct.pack("<II", 8, 0))[0])
        self.say("empty session: take", self.take(none, 1)[0])
        os.close(none)
        self.say("empty session again", self.session(device, "none")[0])
        result, long = self.session(device, LONG)
        self.say("long name", result)
        os.close(long)
        result, s = self.session(device, "second")
        self.say("retrieve", result)
        self.say("retrieve again", self.session(device, "second")[0])
        self.say("session cloexec", fcntl.fcntl(s, fcntl.F_GETFD))
        result, buffer = self.asked(s, NAME, struct.pack("<II", 72, 0) + bytes(64))
        self.say("name", (result, bytes(buffer[8:]).rstrip(b"\0")))
        self.say("preserve on incoming", self.preserve(s, memfd(b"x"), 500))
        self.say("take missing", self.take(s, 12345)[0])
        self.say("take size 15", self.asked(s, TAKE, struct.pack("<IiQ", 15, -1, 1))[0])
        fds = self.taken(s)
        self.incoming(device, s, fds)
        self.incoming_lives(device)
        os.close(device)
        self.kept.append(self.incoming_api())

    def taken(self, s: int) -> dict[int, int]:
        """Every file."""
        seals = (1, 2, 4, 8, 16, 0x20, 0x3F, 0x1F)
        tokens = (1, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0, 2**64 - 1, 20, 98, 99, *(0x100 + one for one in seals))
        fds = {}
        for token in tokens:
            result, fd = self.take(s, token)
            fds[token] = fd if result == "ok" else -1
            self.say(f"take {token:#x}", shown(fd) if result == "ok" else result)
        result, again = self.take(s, 20)
        if result == "ok":
            os.lseek(again, 77, 0)
        self.say("take twice: the same open file", (result, again != fds[20], tried(os.lseek, fds[20], 0, 1)))
        if self.real:
            self.say("x link of a retrieved file", tried(os.readlink, f"/proc/self/fd/{fds[1]}"))
            self.say("x link of a session", tried(os.readlink, f"/proc/self/fd/{s}"))
        for token in (1, 9, 12, 0x120, 0x108, 20):
            self.say(f"write to {token:#x}", tried(os.pwrite, fds[token], b"W", 0))
        self.say("map 0xc for writing", tried(lambda: mmap.mmap(fds[12], 6) and None))
        self.say("grow retrieved", tried(os.ftruncate, fds[1], 6000))
        self.say("shrink retrieved", tried(os.ftruncate, fds[1], 100))
        self.say("fallocate retrieved", tried(os.posix_fallocate, fds[1], 0, 8192))
        self.say("blocks of the sparse file", os.fstat(fds[15]).st_blocks if fds[15] >= 0 else None)
        self.say("add seals to what cannot be sealed", tried(lambda: fcntl.fcntl(fds[11], ADD_SEALS, 2) and None))
        return fds

    def incoming(self, device: int, s: int, fds: dict[int, int]) -> None:
        """FINISH, and preserving again."""
        n = self.make(device, "second")
        self.say("create with an incoming name", "ok")
        self.say("preserve retrieved before finish", self.preserve(n, fds[14], 1))
        self.say("finish reserved 1", self.asked(s, FINISH, struct.pack("<II", 8, 1))[0])
        self.say("finish size 4", self.asked(s, FINISH, struct.pack("<II", 4, 0))[0])
        self.say("finish", self.asked(s, FINISH, struct.pack("<II", 8, 0))[0])
        self.say("finish twice", self.asked(s, FINISH, struct.pack("<II", 8, 0))[0])
        self.say("take after finish", self.take(s, 20)[0])
        self.say("retrieve session after finish", self.session(device, "second")[0])
        self.say("name after finish", self.asked(s, NAME, struct.pack("<II", 72, 0) + bytes(64))[0])
        self.say("file after finish", tried(shown, fds[20]))
        self.say("preserve retrieved after finish", self.preserve(n, fds[14], 1))
        self.say("preserve retrieved, with seals", self.preserve(n, fds[0x11F], 2))
        self.say("preserve retrieved, grown", self.preserve(n, fds[1], 3))
        self.say("preserve retrieved, of NOEXEC_SEAL", self.preserve(n, fds[12], 4))
        os.close(s)
        self.say("session after close", self.session(device, "second")[0])
        self.kept = [n]

    def incoming_lives(self, device: int) -> None:
        """How long sessions of the last kernel live."""
        result, s = self.session(device, "never")
        self.say("never finished: take 1", (result, self.take(s, 1)[0]))
        os.close(s)
        self.say("never finished: again", self.session(device, "never")[0])
        result, kid = self.session(device, "kid")
        result2, fd = self.take(kid, 2)
        self.say("kid", (result, result2, tried(os.pread, fd, 9, 0)))
        in_child(lambda: os.close(kid))
        self.say("kid after a child's close", self.take(kid, 1)[0])
        os.close(kid)
        self.say("kid's file after the session", tried(os.pread, fd, 9, 0))

    def incoming_api(self) -> luo.Session:
        """The same through kho.luo."""
        with self.device() as device:
            self.say("api: nothing", tried(device.retrieve_session, "nothing"))
            a = device.retrieve_session("api")
            self.say("api: again", tried(device.retrieve_session, "api"))
            self.say("api: create the same", tried(lambda: device.create_session("api").close()))
        self.say("api: preserve", tried(a.preserve_fd, memfd(b"x"), 1))
        self.say("api: take missing", tried(a.retrieve_fd, 70))
        fd = tried(a.retrieve_fd, 7)
        self.say("api: take", shown(fd) if isinstance(fd, int) else fd)
        if not isinstance(fd, int):
            return a  # before 7.1.5 FINISH of an outgoing session has dropped its files
        for token in WIDE:
            self.say(f"api: take {token:#x}", tried(lambda token=token: os.pread(a.retrieve_fd(token), 20, 0)))
            result, again = self.take(a.fileno(), token)
            self.say(f"take {token:#x} of api", (result, tried(os.pread, again, 20, 0)))
        with luo.Session(os.dup(a.fileno()), transport=self) as adopted:
            self.say("api: name of a descriptor", tried(lambda: adopted.name))
            self.say("api: preserve_fd of a descriptor", tried(adopted.preserve_fd, memfd(b"x"), 1))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, hard))
        used = []
        try:
            while True:
                used.append(os.dup(0))
        except OSError:
            pass
        if self.real:
            self.say("x api: no descriptor", tried(a.retrieve_fd, 9))
        for one in used:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.say("api: then", tried(lambda: os.pread(a.retrieve_fd(9), 5, 0)))
        self.say("api: finish", tried(a.finish))
        self.say("api: finish again", tried(a.finish))
        self.say("api: take after finish", tried(a.retrieve_fd, 9))
        a.close()
        self.say("api: closed", tried(a.finish))
        with self.device() as device:
            third = device.create_session("third")
        third.preserve_fd(fd, 1)
        return third

    # The third kernel

    def third(self) -> None:
        """What went on."""
        with self.device() as device:
            self.say("lost", tried(device.retrieve_session, "lost"))
            self.say("api", tried(device.retrieve_session, "api"))
            third = tried(device.retrieve_session, "third")
            answer = third if isinstance(third, str) else tried(lambda: shown(third.retrieve_fd(1)))
            self.say("third", answer)
            second = device.retrieve_session("second")
        for token in (1, 2, 3, 4):
            self.say(f"second {token}", tried(lambda token=token: shown(second.retrieve_fd(token))))
        self.kept = [third, second]

    def run(self, phase: int) -> None:
        """Make the requests of a kernel; the sessions stay open."""
        self.phase = phase
        self.ioctls.clear()
        (self.first, self.second, self.third)[phase - 1]()


def main() -> None:
    """In a guest: this kernel's phase, then the next kernel."""
    import kexec

    warnings.simplefilter("ignore")
    phase = int(kexec.argument("phase", "1"))
    print("PHASE", phase, os.uname().release, flush=True)
    recorder = Recorder(luo.KERNEL, luo.PATH, real=True, out=lambda record: print("R", json.dumps(record), flush=True))
    recorder.run(phase)
    print("END", phase, flush=True)
    if phase < PHASES:
        kexec.load("next", phase=phase + 1)
        kexec.jump()


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001
        import traceback

        print("BROKEN", traceback.format_exc(), flush=True)
        sys.exit(1)
