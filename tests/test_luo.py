"""/dev/liveupdate, on a fake device with the kernel's rules, and on this machine's if it has one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kho
from kho import luo
from kho.kernels import Release

from fake_luo import CLIENT, FakeLuo, contents_of, create, hand_over, memfd, opened, retrieve
from livefiles import descriptors

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
NAME = "search-index"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FakeLuo]:
    with FakeLuo(tmp_path / "liveupdate") as made:
        yield made


# Numbers and layouts

SOURCE = r"""
    #include <stddef.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <sys/ioctl.h>
    #define SHOW(what, nr, type, last) \
        printf(what " %u %zu %zu\n", (unsigned)_IO(0xBA, nr), sizeof(struct type), offsetof(struct type, last))
    struct session { uint32_t size; int32_t fd; uint8_t name[64]; };
    struct file { uint32_t size; int32_t fd; uint64_t token; };
    struct finish { uint32_t size; uint32_t reserved; };
    struct name { uint32_t size; uint32_t reserved; uint8_t name[64]; };
    int main(void)
    {
        SHOW("CREATE_SESSION", 0x00, session, name);
        SHOW("RETRIEVE_SESSION", 0x01, session, name);
        SHOW("PRESERVE_FD", 0x40, file, token);
        SHOW("RETRIEVE_FD", 0x41, file, token);
        SHOW("FINISH", 0x42, finish, reserved);
        SHOW("GET_NAME", 0x43, name, name);
        return 0;
    }
"""


def test_request_numbers_and_structure_sizes_equal_the_kernels() -> None:
    assert {name: (request.number, request.layout.size) for name, request in luo.REQUESTS.items()} == {
        "CREATE_SESSION": (47616, 72),
        "RETRIEVE_SESSION": (47617, 72),
        "PRESERVE_FD": (47680, 16),
        "RETRIEVE_FD": (47681, 16),
        "FINISH": (47682, 8),
        "GET_NAME": (47683, 72),
    }


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_c_compiler_lays_the_structures_out_alike(tmp_path: Path) -> None:
    source = tmp_path / "luo.c"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-Wall", "-Werror", "-o", tmp_path / "luo", source], check=True)
    printed = subprocess.run([tmp_path / "luo"], capture_output=True, text=True, check=True).stdout
    ours = []
    for name, (number, layout) in luo.REQUESTS.items():
        fields = re.findall(r"\d*[a-zA-Z]", layout.format)
        last = struct.calcsize("=" + "".join(fields[:-1]))
        ours.append(f"{name} {number} {layout.size} {last}")
    assert printed.splitlines() == ours


class Recorder:
    """A transport that writes down what it is given, and answers with a descriptor of /dev/null."""

    def __init__(self, answer: int | None = None) -> None:
        self.asked: list[tuple[int, bytes]] = []
        self.answer = answer
        self.refuses = 0

    def open(self, path: str) -> int:
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, number: int, buffer: bytearray) -> None:
        self.asked.append((number, bytes(buffer)))
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        if number in (0xBA00, 0xBA01, 0xBA41):
            struct.pack_into("<i", buffer, 4, self.open("") if self.answer is None else self.answer)


def test_requests_have_the_bytes_that_the_kernel_expects() -> None:
    kernel = Recorder()
    with luo.Device(transport=kernel) as device:
        with device.create_session("é") as session:
            session.preserve_fd(5, 0x1122334455667788)
        with device.retrieve_session("x" * 63) as session:
            os.close(session.retrieve_fd(2**64 - 1))
            session.finish()
    minus_one = b"\xff\xff\xff\xff"
    assert kernel.asked == [
        (0xBA00, b"\x48\0\0\0" + minus_one + "é".encode() + bytes(62)),
        (0xBA40, b"\x10\0\0\0" + b"\5\0\0\0" + bytes.fromhex("8877665544332211")),
        (0xBA01, b"\x48\0\0\0" + minus_one + b"x" * 63 + b"\0"),
        (0xBA41, b"\x10\0\0\0" + minus_one + b"\xff" * 8),
        (0xBA42, b"\x08\0\0\0" + bytes(4)),
    ]


@pytest.mark.parametrize("call", ["create_session", "retrieve_session", "retrieve_fd"])
def test_an_answer_without_a_descriptor_is_an_abi_error(call: str) -> None:
    kernel = Recorder(answer=-1)
    with luo.Device(transport=kernel) as device:
        session = luo.Session(os.dup(device.fileno()), name="x", incoming=True, transport=kernel)
        with session, pytest.raises(kho.LuoAbiError, match="gave no descriptor"):
            session.retrieve_fd(1) if call == "retrieve_fd" else getattr(device, call)("x")


# Refusals


@pytest.mark.parametrize("name", ["", "x" * 64, "é" * 32, "a\0b", "\udc80"])
def test_a_name_that_does_not_fit_is_refused(machine: FakeLuo, name: str) -> None:
    with opened(machine) as device:
        for call in (device.create_session, device.retrieve_session):
            with pytest.raises(kho.ParameterError, match="session name"):
                call(name)
    assert machine.outgoing() == {}


@pytest.mark.parametrize("name", ["x", "x" * 63, "é" * 31, " ", "../\n"])
def test_any_other_name_comes_back(machine: FakeLuo, name: str) -> None:
    fd = create(machine, name).detach()
    with luo.Session(fd, transport=CLIENT) as session:
        assert session.name == name
        machine.kexec()
    with retrieve(machine, name) as session:
        assert session.name == name


def test_a_name_or_token_twice_is_refused(machine: FakeLuo) -> None:
    a, b = memfd(b"a"), memfd(b"b")
    with opened(machine) as device, device.create_session(NAME) as session:
        with pytest.raises(kho.ExistsError, match="session 'search-index': there is one of that name"):
            device.create_session(NAME)
        session.preserve_fd(a, 1)
        with pytest.raises(kho.LuoExistsError, match="file 0x1: the session has a file of that token") as caught:
            session.preserve_fd(b, 1)
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(kho.LuoBusyError, match="in a session already"):
            session.preserve_fd(a, 2)
        with device.create_session("other") as other:
            with pytest.raises(kho.LuoBusyError):
                other.preserve_fd(a, 1)
            other.preserve_fd(b, 1)
    os.close(a)
    os.close(b)


@pytest.mark.parametrize("token", [-1, 1 << 64])
def test_a_token_has_64_bits(machine: FakeLuo, token: int) -> None:
    with hand_over(machine, {}) as session, pytest.raises(kho.ParameterError, match="64 bits"):
        session.retrieve_fd(token)
    with create(machine) as session, pytest.raises(kho.ParameterError, match="64 bits"):
        session.preserve_fd(0, token)


@pytest.mark.parametrize("fd", [-1, 1 << 31])
def test_a_descriptor_is_a_small_number(machine: FakeLuo, fd: int) -> None:
    with create(machine) as session, pytest.raises(kho.ParameterError, match="no descriptor"):
        session.preserve_fd(fd, 1)
    with pytest.raises(kho.ParameterError, match="no descriptor"):
        luo.Session(fd)


def test_only_memfds_are_preserved(machine: FakeLuo, tmp_path: Path) -> None:
    def refused(fd: int) -> None:
        with pytest.raises(kho.LuoFileError, match="preserves no file of this kind") as caught:
            session.preserve_fd(fd, 1)
        assert caught.value.errno == errno.ENOENT

    with create(machine) as session:
        with (tmp_path / "file").open("wb") as file:
            refused(file.fileno())
        a, b = socket.socketpair()
        with a, b:
            refused(a.fileno())
        huge = os.memfd_create("huge", os.MFD_HUGETLB)
        refused(huge)
        os.close(huge)
        with pytest.raises(kho.LuoFileError, match="not open"):
            session.preserve_fd(huge, 1)
        assert machine.outgoing() == {NAME: set()}


def test_a_file_object_is_preserved_by_its_descriptor(machine: FakeLuo) -> None:
    with os.fdopen(memfd(b"x"), "rb") as file, create(machine) as session:
        session.preserve_fd(file, 1)
        assert machine.outgoing() == {NAME: {1}}


def test_each_direction_has_its_requests(machine: FakeLuo) -> None:
    fd = memfd(b"x")
    for incoming in (True, None):
        with hand_over(machine, {1: b"one"}) as session:
            same = luo.Session(os.dup(session.fileno()), incoming=incoming, transport=CLIENT)
            with same, pytest.raises(kho.LuoStateError):
                same.preserve_fd(fd, 2)
    for incoming in (False, None):
        with create(machine) as session:
            same = luo.Session(os.dup(session.fileno()), incoming=incoming, transport=CLIENT)
            with same, pytest.raises(kho.LuoStateError):
                same.retrieve_fd(1)
            same = luo.Session(os.dup(session.fileno()), incoming=incoming, transport=CLIENT)
            with same, pytest.raises(kho.LuoStateError):
                same.finish()
    os.close(fd)


def test_a_session_of_known_direction_does_not_ask_the_kernel() -> None:
    kernel = Recorder()
    fd = kernel.open("")
    with luo.Session(fd, name="x", incoming=False, transport=kernel) as session:
        with pytest.raises(kho.LuoStateError, match="only there files can be retrieved"):
            session.retrieve_fd(1)
        with pytest.raises(kho.LuoStateError, match="only there it can finish"):
            session.finish()
    assert kernel.asked == []


def test_a_session_is_retrieved_once(machine: FakeLuo) -> None:
    with hand_over(machine, {1: b"one"}) as session:
        with pytest.raises(kho.LuoStateError, match="it was retrieved before"):
            retrieve(machine)
        with create(machine) as following:  # the two lists have their own names
            assert (session.incoming, following.incoming) == (True, False)
    with pytest.raises(kho.NotFoundError, match="the last kernel did not hand it over"):
        retrieve(machine)


def test_what_was_not_handed_over_is_not_found(machine: FakeLuo) -> None:
    with hand_over(machine, {1: b"one"}) as session:
        with pytest.raises(kho.LuoNotFoundError, match="file 0x2: no file of that token") as caught:
            session.retrieve_fd(2)
        assert caught.value.errno == errno.ENOENT
        session.finish()
        session.finish()
        with pytest.raises(kho.LuoNotFoundError, match="or the session is finished"):
            session.retrieve_fd(1)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_failed_retrieval_is_final(machine: FakeLuo, number: int) -> None:
    machine.fail("retrieve", NAME, 1, number)
    with hand_over(machine, {1: b"one", 2: b"two"}) as session:
        with pytest.raises(kho.LuoRetrieveError, match="cannot be brought back, now or later") as caught:
            session.retrieve_fd(1)
        assert caught.value.errno == number
        machine.heal("retrieve", NAME, 1)
        with pytest.raises(kho.LuoRetrieveError):
            session.retrieve_fd(1)
        assert contents_of(session.retrieve_fd(2)) == b"two"
        session.finish()
    assert machine.incoming() == {}


def test_a_session_that_cannot_finish_yet_can_later(machine: FakeLuo) -> None:
    with hand_over(machine, {1: b"one"}) as session:
        machine.fail("finish", NAME, 1, errno.EBUSY)
        with pytest.raises(kho.LuoBusyError, match="nothing was finished"):
            session.finish()
        assert contents_of(session.retrieve_fd(1)) == b"one"
        machine.heal("finish", NAME, 1)
        session.finish()


def test_a_kexec_that_fails_changes_nothing(machine: FakeLuo) -> None:
    fd = memfd(b"x")
    machine.fail("freeze", NAME, 1, errno.EAGAIN)
    with create(machine) as session:
        session.preserve_fd(fd, 1)
        with pytest.raises(BlockingIOError):
            machine.kexec()
        machine.heal("freeze", NAME, 1)
        session.preserve_fd(other := memfd(b"y"), 2)
        machine.kexec()
    os.close(fd)
    os.close(other)
    assert machine.incoming() == {NAME: {1, 2}}


class Refusing:
    """A transport whose kernel answers every request with an errno."""

    def __init__(self, number: int | None, *, on_open: bool = False) -> None:
        self.number, self.on_open = number, on_open

    def open(self, path: str) -> int:
        if self.on_open:
            self.ioctl(0, 0, bytearray())
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, number: int, buffer: bytearray) -> None:
        raise OSError("of no number") if self.number is None else OSError(self.number, "from the test")


OPEN = [
    (errno.ENOENT, kho.LuoUnavailableError, "boot with `liveupdate=on kho=on`"),
    (errno.ENODEV, kho.LuoUnavailableError, "boot with"),
    (errno.ENXIO, kho.LuoUnavailableError, "boot with"),
    (errno.EBUSY, kho.LuoBusyError, "another process has it open"),
    (errno.EACCES, kho.LuoPermissionError, "by default root may"),
    (errno.EPERM, PermissionError, "by default root is"),
    (errno.EIO, kho.LuoError, "every open fails until a reboot"),
    (errno.EMFILE, kho.LuoError, "Too many open files"),
    (None, kho.LuoError, "EIO"),
]


@pytest.mark.parametrize(("number", "kind", "message"), OPEN)
def test_a_refused_open_names_the_remedy(number: int | None, kind: type[kho.LuoError], message: str) -> None:
    before = descriptors()
    with pytest.raises(kind, match=message) as caught:
        luo.Device("/dev/elsewhere", transport=Refusing(number, on_open=True))
    name = errno.errorcode[number or errno.EIO]
    assert isinstance(caught.value, kho.LuoError)
    assert caught.value.errno == (number or errno.EIO)
    assert str(caught.value).startswith("/dev/elsewhere: ")
    assert str(caught.value).endswith(f"({name})")
    assert descriptors() <= before


CALLS = ["create_session", "retrieve_session", "preserve_fd", "retrieve_fd", "finish", "name"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.E2BIG, kho.LuoAbiError),
        (errno.ENOTTY, kho.LuoAbiError),
        (errno.EBADF, kho.LuoError),
        (errno.EPERM, kho.LuoError),
        (errno.ENOMEM, kho.LuoError),
        (None, kho.LuoError),
    ],
)
def test_every_refusal_has_a_class_and_leaks_nothing(call: str, number: int | None, kind: type[kho.LuoError]) -> None:
    before = descriptors()
    kernel = Refusing(number)
    with luo.Device(transport=kernel) as device:
        session = luo.Session(os.dup(device.fileno()), incoming=call != "preserve_fd", transport=kernel)
        with session, pytest.raises(kind) as caught:
            if call == "name":
                _ = session.name
            elif call == "finish":
                session.finish()
            elif call == "retrieve_fd":
                session.retrieve_fd(1)
            elif call == "preserve_fd":
                session.preserve_fd(0, 1)
            else:
                getattr(device, call)("x")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == (number or errno.EIO)
    assert descriptors() <= before


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EMFILE, kho.LuoError, "close some and try again"),
        (errno.ENFILE, kho.LuoError, "try again"),
        (errno.EBADF, kho.LuoStateError, "closed by other code"),
    ],
)
def test_a_retrieval_without_a_free_descriptor_loses_no_file(
    number: int, kind: type[kho.LuoError], message: str
) -> None:
    kernel = Refusing(number)
    with (
        luo.Session(os.dup(0), name="x", incoming=True, transport=kernel) as session,
        pytest.raises(kind, match=message) as caught,
    ):
        session.retrieve_fd(1)
    assert not isinstance(caught.value, kho.LuoRetrieveError)


@pytest.mark.parametrize("call", ["create_session", "preserve_fd", "finish", "name"])
def test_an_unexplained_einval_is_an_abi_error(call: str) -> None:
    kernel = Refusing(errno.EINVAL)
    with luo.Device(transport=kernel) as device:
        session = luo.Session(os.dup(device.fileno()), incoming=call == "finish", transport=kernel)
        with session, pytest.raises(kho.LuoAbiError, match="another form of the request"):
            if call == "name":
                _ = session.name
            elif call == "finish":
                session.finish()
            elif call == "preserve_fd":
                session.preserve_fd(0, 1)
            else:
                device.create_session("x")


def test_the_device_is_opened_for_both_ways_and_for_this_program_only() -> None:
    with luo.Device("/dev/null") as device:
        assert fcntl.fcntl(device.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert not os.get_inheritable(device.fileno())


def test_a_file_that_is_not_a_live_update_device_is_refused() -> None:
    with luo.Device("/dev/null") as device, pytest.raises(kho.LuoAbiError, match="no live update device"):
        device.create_session("x")
    with pytest.raises(kho.LuoUnavailableError):
        luo.Device("/nonexistent/liveupdate")


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = descriptors()
    with FakeLuo(tmp_path / "liveupdate") as machine:
        with hand_over(machine, {1: b"one", 2: b"two"}) as session:
            os.close(session.retrieve_fd(1))
            for _ in range(20):
                with pytest.raises(kho.LuoNotFoundError):
                    session.retrieve_fd(3)
                with pytest.raises(kho.LuoStateError):
                    retrieve(machine)
                with create(machine, "a"), pytest.raises(kho.LuoExistsError):
                    create(machine, "a")
        machine.kexec()
    assert descriptors() <= before


# Rules of the fake device that `kho.luo` does not trigger


@pytest.mark.parametrize(
    ("number", "user", "refused"),
    [
        (0xBA00, struct.pack("<Ii64s", 71, -1, b"x"), errno.EINVAL),
        (0xBA00, struct.pack("<Ii64s", 72, -1, b"x" * 64), errno.EINVAL),
        (0xBA00, struct.pack("<Ii64s", 72, -1, b""), errno.EINVAL),
        (0xBA00, struct.pack("<Ii64sI", 76, -1, b"x", 1), errno.E2BIG),
        (0xBA00, struct.pack("<Ii64sI", 76, -1, b"x", 0), 0),
        (0xBA00, struct.pack("<Ii64s", 76, -1, b"x"), errno.EFAULT),
        (0xBA00, b"\x48\0", errno.EFAULT),
        (0xBA02, struct.pack("<Ii64s", 72, -1, b"x"), errno.EINVAL),
        (0xBB00, struct.pack("<Ii64s", 72, -1, b"x"), errno.ENOTTY),
        (0xBA40, struct.pack("<IiQ", 16, -1, 1), errno.EINVAL),
    ],
)
def test_the_fake_checks_structures_as_the_kernel_does(
    machine: FakeLuo, number: int, user: bytes, refused: int
) -> None:
    buffer = bytearray(user)
    with opened(machine) as device:
        if refused:
            with pytest.raises(OSError) as caught:
                CLIENT.ioctl(device.fileno(), number, buffer)
            assert caught.value.errno == refused
        else:
            CLIENT.ioctl(device.fileno(), number, buffer)
            os.close(struct.unpack_from("<i", buffer, 4)[0])
        assert len(buffer) == len(user)


def test_a_file_that_changed_its_size_fails_the_test(machine: FakeLuo) -> None:
    fd = memfd(b"x")
    with create(machine) as session:
        session.preserve_fd(fd, 1)
        for change in (
            lambda: os.truncate(fd, 100),
            lambda: os.pwrite(fd, b"xy", 0),
            lambda: os.pwrite(fd, b"x", 1),
            lambda: os.posix_fallocate(fd, 0, 1),
            lambda: os.posix_fallocate(fd, 0, 100),
        ):
            with pytest.raises(PermissionError):
                change()
        os.pwrite(fd, b"y", 0)
        os.truncate(fd, 1)
        # Another process is not stopped here, as it would be on a real machine.
        subprocess.run([sys.executable, "-c", f"import os; os.truncate({fd}, 100)"], pass_fds=[fd], check=True)
        with pytest.raises(AssertionError, match="went from 1 to 100 bytes"):
            machine.kexec()
    os.close(fd)


# Availability


@pytest.mark.parametrize(
    ("cmdline", "reason"),
    [
        ("", "boot with `liveupdate=on kho=on`"),
        ("kho=on liveupdate", "boot with `liveupdate=on kho=on`"),
        ("kho=on liveupdate=off", "boot with `liveupdate=on kho=on`"),
        ("liveupdate=on liveupdate=0", "boot with `liveupdate=on kho=on`"),
        ("liveupdate=on kho=off", "boot with `kho=on`"),
        ("kho=off quiet liveupdate=1", "boot with `kho=on`"),
        ("liveupdate=y", "CONFIG_LIVEUPDATE"),
        ("kho=1 liveupdate=0 liveupdate=on", "CONFIG_LIVEUPDATE"),
    ],
)
def test_the_reason_is_in_the_command_line(tmp_path: Path, cmdline: str, reason: str) -> None:
    found = luo.available(tmp_path / "liveupdate", cmdline=cmdline)
    assert found is not None
    assert reason in found
    assert found.startswith(str(tmp_path))


def test_a_device_in_use_counts_as_available(machine: FakeLuo) -> None:
    assert luo.available(machine.path) is None
    with opened(machine):
        assert luo.available(machine.path) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_device_without_permission_is_not_available(tmp_path: Path) -> None:
    path = tmp_path / "liveupdate"
    path.touch(mode=0)
    assert "may not open it" in (luo.available(path) or "")


NO_DEVICE = luo.available()


@pytest.mark.skipif(NO_DEVICE is not None, reason=f"no real device: {NO_DEVICE}")
def test_the_real_device_keeps_the_rules_up_to_the_kexec() -> None:
    name = f"kho-test-{os.getpid()}"
    fd = memfd(b"x" * 5000)
    with luo.Device() as device, device.create_session(name) as session:
        assert stat.S_ISCHR(os.fstat(device.fileno()).st_mode)
        with pytest.raises(kho.LuoBusyError):
            luo.Device()
        with pytest.raises(kho.LuoExistsError):
            device.create_session(name)
        with pytest.raises(kho.LuoNotFoundError):
            device.retrieve_session(name)
        session.preserve_fd(fd, 7)
        with pytest.raises(kho.LuoExistsError):
            session.preserve_fd(fd, 7)
        a, b = socket.socketpair()
        with a, b, pytest.raises(kho.LuoFileError):
            session.preserve_fd(a.fileno(), 8)
        with pytest.raises(PermissionError):
            os.truncate(fd, 10000)
        session.close()
        os.truncate(fd, 10000)
        device.create_session(name).close()
    os.close(fd)


def test_the_module_is_imported_on_first_use() -> None:
    code = "import sys, kho; early = 'kho.luo' in sys.modules; print(early, kho.luo.PATH, 'kho.luo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "/dev/liveupdate", "True"]
    with pytest.raises(AttributeError, match="no attribute 'lua'"):
        _ = vars(kho)["__getattr__"]("lua")


# Kernels that differ


def handed_over(machine: FakeLuo, fd: int, release: str | None) -> luo.Session:
    """A session with one file of token 1, retrieved from a kernel of that release."""
    with create(machine) as session:
        session.preserve_fd(fd, 1)
        machine.kexec()
    given = None if release is None else Release.parse(release)
    with luo.Device(machine.path, transport=CLIENT, release=given) as device:
        return device.retrieve_session(NAME)


def memfds() -> int:
    """How many descriptors of memfds this process has; the machine's sockets come and go by themselves."""
    return sum(n for name, n in descriptors().items() if "memfd" in name)


def no_more_memfds(than: int) -> bool:
    """Whether there are as many or fewer, once the machine's thread, which answers first, has closed its own."""
    deadline = time.monotonic() + 20
    while memfds() > than and time.monotonic() < deadline:
        time.sleep(0.005)
    return memfds() <= than


def with_a_hole() -> int:
    """A memfd of four pages, the third is missing: a restored file whose folio was not there."""
    fd = memfd(b"a" * 8192)
    os.pwrite(fd, b"b" * 100, 12288)
    os.lseek(fd, 7, os.SEEK_SET)
    return fd


@pytest.mark.parametrize("release", ["6.19.11", "7.0", "7.0.10", "7.0.0-14-generic"])
def test_a_file_with_pages_missing_is_refused_where_the_kernel_calls_it_a_success(
    machine: FakeLuo, release: str
) -> None:
    fd = with_a_hole()
    with handed_over(machine, fd, release) as session:
        before = memfds()
        for _ in range(2):
            with pytest.raises(
                kho.LuoRetrieveError, match=f"0x2000 is missing: Linux {release} can .* 7.0.11"
            ) as caught:
                session.retrieve_fd(1)
            assert caught.value.errno == errno.EIO
        assert no_more_memfds(before)
        back = session.retrieve_fd(1, holes=True)
        assert os.lseek(back, 0, os.SEEK_CUR) == 7
        assert contents_of(back) == b"a" * 8192 + bytes(4096) + b"b" * 100
    os.close(fd)


def test_before_6_19_9_a_hole_may_be_a_page_that_was_never_written(machine: FakeLuo) -> None:
    fd = with_a_hole()
    with (
        handed_over(machine, fd, "6.19.8") as session,
        pytest.raises(kho.LuoRetrieveError, match="is missing, or was allocated and never written"),
    ):
        session.retrieve_fd(1)
    os.close(fd)


@pytest.mark.parametrize("release", [None, "7.0.11", "7.1", "7.3.4"])
def test_holes_are_not_looked_for_where_the_kernel_fails_itself(machine: FakeLuo, release: str | None) -> None:
    fd = with_a_hole()
    with handed_over(machine, fd, release) as session:
        os.close(session.retrieve_fd(1))
    os.close(fd)


@pytest.mark.parametrize("contents", [b"", b"x", b"y" * 4096, b"z" * 10_000])
def test_a_whole_file_is_retrieved_where_holes_are_looked_for(machine: FakeLuo, contents: bytes) -> None:
    fd = memfd(contents)
    with handed_over(machine, fd, "7.0.10") as session:
        assert contents_of(session.retrieve_fd(1)) == contents
    os.close(fd)


def test_size_and_digest_are_compared_on_every_kernel(machine: FakeLuo) -> None:
    fd = memfd(b"index" * 1000)
    right = hashlib.sha256(b"index" * 1000).hexdigest()
    with handed_over(machine, fd, "7.3.4") as session:
        before = memfds()
        with pytest.raises(kho.LuoRetrieveError, match="has 5000 bytes, and 5001 were preserved"):
            session.retrieve_fd(1, size=5001)
        with pytest.raises(kho.LuoRetrieveError, match=f"has SHA-256 {right}, and 00"):
            session.retrieve_fd(1, sha256="00" * 32)
        assert no_more_memfds(before)
        os.close(session.retrieve_fd(1, size=5000, sha256=right.upper()))
    os.close(fd)


def test_before_7_2_the_name_is_that_of_the_descriptors_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Recorder()
    kernel.refuses = errno.EINVAL
    with luo.Session(kernel.open(""), transport=kernel) as session:
        with pytest.raises(kho.LuoAbiError):
            _ = session.name
        monkeypatch.setattr(os, "readlink", lambda _: b"anon_inode:[luo_session] search-index")
        assert session.name == "search-index"
