"""Lifetimes of sessions and files over calls, closes, processes and kexecs, on a fake device."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import kho
from kho import luo

from fake_luo import CLIENT, FakeLuo, contents_of, create, hand_over, memfd, opened, retrieve
from livefiles import descriptors

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
NAME = "search-index"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FakeLuo]:
    with FakeLuo(tmp_path / "liveupdate") as made:
        yield made


# Across a kexec


@pytest.mark.parametrize(
    ("contents", "pos", "seals"),
    [(b"", 0, 0), (b"index" * 5000, 4096, SEALS), (b"x", 100, SEALS | fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE)],
)
def test_a_memfd_comes_back_after_a_kexec(machine: FakeLuo, contents: bytes, pos: int, seals: int) -> None:
    fd = memfd(contents, seals=seals)
    with create(machine) as session:
        session.preserve_fd(fd, 7)
        os.lseek(fd, pos, os.SEEK_SET)  # the position at the kexec counts, not the one at preserving
        os.close(fd)
        machine.kexec()
    with retrieve(machine) as session:
        back = session.retrieve_fd(7)
        assert os.fstat(back).st_size == len(contents)
        assert os.lseek(back, 0, os.SEEK_CUR) == pos
        assert fcntl.fcntl(back, fcntl.F_GET_SEALS) == seals
        assert fcntl.fcntl(back, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        session.finish()
    assert contents_of(back) == contents
    assert machine.incoming() == {}


def test_writes_after_preserving_are_kept(machine: FakeLuo) -> None:
    fd = memfd(bytes(8192))
    with create(machine) as session:
        session.preserve_fd(fd, 7)
        os.pwrite(fd, b"late", 4096)
        machine.kexec()
    os.close(fd)
    with retrieve(machine) as session:
        assert contents_of(session.retrieve_fd(7)) == bytes(4096) + b"late" + bytes(4092)


def test_holes_come_back_as_zeros(machine: FakeLuo) -> None:
    fd = memfd()
    os.truncate(fd, 1 << 30)
    os.pwrite(fd, b"middle", 1 << 29)
    with create(machine) as session:
        session.preserve_fd(fd, 7)
        machine.kexec()
    os.close(fd)
    with retrieve(machine) as session:
        back = session.retrieve_fd(7)
        assert os.fstat(back).st_size == 1 << 30
        assert os.pread(back, 10, (1 << 29) - 2) == b"\0\0middle\0\0"
        os.close(back)


def test_files_are_retrieved_in_any_order_and_again(machine: FakeLuo) -> None:
    with hand_over(machine, {1: b"one", 2**64 - 1: b"last", 0: b"none"}) as session:
        assert contents_of(session.retrieve_fd(2**64 - 1)) == b"last"
        assert contents_of(session.retrieve_fd(0)) == b"none"
        first, second = session.retrieve_fd(1), session.retrieve_fd(1)
        assert first != second
        os.lseek(first, 2, os.SEEK_SET)
        assert os.lseek(second, 0, os.SEEK_CUR) == 2  # one open file
        os.close(first)
        assert contents_of(second) == b"one"


def test_a_retrieved_file_is_preserved_again_in_a_new_session(machine: FakeLuo) -> None:
    session = hand_over(machine, {1: b"index"})
    for _ in range(3):
        fd = session.retrieve_fd(1)
        with create(machine) as following:
            with pytest.raises(kho.LuoBusyError, match="not finished"):
                following.preserve_fd(fd, 1)
            session.finish()
            session.close()
            following.preserve_fd(fd, 1)
            os.close(fd)
            machine.kexec()
        session = retrieve(machine)
    with session:
        assert contents_of(session.retrieve_fd(1)) == b"index"


def test_a_handover_is_read_by_kho(machine: FakeLuo) -> None:
    fd, empty = memfd(b"index" * 2000, pos=17, seals=SEALS), memfd()
    arena = kho.Arena("256M", scratch="16M,32M,16M")
    with create(machine) as session, create(machine, "empty"):
        session.preserve_fd(fd, 7)
        session.preserve_fd(empty, 8)
        out = machine.handover(arena)
    os.close(fd)
    os.close(empty)
    found = kho.Incoming(out.arena, out.fdt_phys).luo
    assert found.liveupdate_num == 1
    assert {name: set(s.files) for name, s in found.sessions.items()} == {NAME: {7, 8}, "empty": set()}
    file = found.sessions[NAME].files[7]
    assert (file.read(), file.pos, file.seals) == (b"index" * 2000, 17, SEALS)


# Lifetimes


def test_one_opener_at_a_time(machine: FakeLuo) -> None:
    with opened(machine), pytest.raises(kho.LuoBusyError, match="another process has it open") as caught:
        opened(machine)
    assert caught.value.errno == errno.EBUSY
    opened(machine).close()


def test_a_session_outlives_its_device_and_dies_with_its_descriptor(machine: FakeLuo) -> None:
    session = create(machine)
    fd = memfd(b"x")
    session.preserve_fd(fd, 1)
    assert machine.outgoing() == {NAME: {1}}
    session.close()
    assert machine.outgoing() == {}
    with create(machine) as session:  # name and file are free again
        session.preserve_fd(fd, 1)
    os.close(fd)


def test_a_retrieved_session_is_finished_by_its_last_close(machine: FakeLuo) -> None:
    hand_over(machine, {1: b"one"}).close()
    with pytest.raises(kho.LuoNotFoundError, match="finished and closed"):
        retrieve(machine)


def test_a_session_that_is_not_retrieved_is_gone_after_the_next_kexec(machine: FakeLuo) -> None:
    with create(machine):
        machine.kexec()
    assert machine.incoming() == {NAME: set()}
    machine.kexec()
    assert machine.incoming() == {}


def test_a_detached_descriptor_keeps_the_session(machine: FakeLuo) -> None:
    session = create(machine)
    fd = session.detach()
    assert session.closed
    session.close()
    assert machine.outgoing() == {NAME: set()}
    with luo.Session(fd, transport=CLIENT) as again:
        assert again.fileno() == fd
        assert again.name == NAME
        assert again.incoming is None
        file = memfd(b"x")
        again.preserve_fd(file, 1)
        os.close(file)
    assert machine.outgoing() == {}


def test_a_child_that_inherits_a_session_keeps_it(machine: FakeLuo) -> None:
    session = create(machine)
    wait = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[session.fileno()]) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        session.close()
        assert machine.outgoing() == {NAME: set()}
    assert machine.outgoing() == {}


def test_descriptors_are_closed_in_programs_that_a_process_starts(machine: FakeLuo) -> None:
    with opened(machine) as device, device.create_session(NAME) as session:
        assert not os.get_inheritable(device.fileno())
        assert not os.get_inheritable(session.fileno())


def test_a_session_can_be_sent_over_a_socket(machine: FakeLuo) -> None:
    a, b = socket.socketpair()
    with a, b:
        with create(machine) as session:
            socket.send_fds(a, [b"."], [session.fileno()])
        assert machine.outgoing() == {NAME: set()}  # in the socket
        _, (fd,), _, _ = socket.recv_fds(b, 1, 1)
    with luo.Session(fd, transport=CLIENT) as received:
        assert received.name == NAME
        assert repr(received) == "<kho.luo.Session session 'search-index'>"


SUCCESSOR = """
    import os, sys
    from kho import luo
    from fake_luo import CLIENT
    with luo.Device(sys.argv[1], transport=CLIENT) as device:
        session = device.retrieve_session("search-index")
    with session:
        sys.stdout.buffer.write(os.pread(session.retrieve_fd(1), 100, 0))
        session.finish()
"""


def test_another_process_retrieves_what_this_one_preserved(machine: FakeLuo) -> None:
    fd = memfd(b"for the successor")
    with create(machine) as session:
        session.preserve_fd(fd, 1)
        machine.kexec()
    os.close(fd)
    code = [sys.executable, "-c", textwrap.dedent(SUCCESSOR), str(machine.path)]
    paths = os.pathsep.join(path for path in (str(Path(__file__).parent), *sys.path) if path)
    done = subprocess.run(code, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": paths}, timeout=60)
    assert done.stdout == b"for the successor"
    assert machine.incoming() == {}


def test_a_process_that_is_killed_leaves_no_session(machine: FakeLuo) -> None:
    with create(machine) as session:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[session.fileno()])
    assert machine.outgoing() == {NAME: set()}
    child.kill()
    child.wait()
    assert machine.outgoing() == {}


def test_an_object_that_is_dropped_open_warns_and_is_closed(machine: FakeLuo) -> None:
    before = descriptors()
    session = create(machine)
    with pytest.warns(ResourceWarning, match="session 'search-index': was never closed"):
        del session
    assert machine.outgoing() == {}
    assert descriptors() <= before


def test_a_closed_object_is_refused_as_such(machine: FakeLuo) -> None:
    device = opened(machine)
    session = device.create_session(NAME)
    for closed in (session, device):
        closed.close()
        closed.close()
        with pytest.raises(kho.LuoStateError, match="is closed") as caught:
            closed.fileno()
        assert caught.value.errno == errno.EBADF
        with pytest.raises(kho.LuoStateError, match="is closed"), closed:
            pass
        with pytest.raises(kho.LuoStateError, match="is closed"):
            closed.detach()
        assert repr(closed).endswith(", closed>")
    with pytest.raises(kho.LuoStateError, match="session 'search-index': is closed"):
        session.preserve_fd(0, 1)
    with pytest.raises(kho.LuoStateError, match="is closed"):
        device.create_session(NAME)
    assert session.name == NAME


def test_threads_share_a_session(machine: FakeLuo) -> None:
    failed: list[kho.LuoError] = []
    with create(machine) as session:

        def preserve(thread: int) -> None:
            for i in range(16):
                fd = memfd(bytes([thread, i]))
                try:
                    session.preserve_fd(fd, i)
                except kho.LuoExistsError as error:
                    failed.append(error)
                finally:
                    os.close(fd)

        threads = [threading.Thread(target=preserve, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert machine.outgoing() == {NAME: set(range(16))}
        assert len(failed) == 3 * 16


def test_a_close_waits_for_the_request_under_way() -> None:
    begun, go_on = threading.Event(), threading.Event()
    open_then: list[bool] = []

    class Slow:
        def open(self, path: str) -> int:
            return os.open(os.devnull, os.O_RDWR)

        def ioctl(self, fd: int, number: int, buffer: bytearray) -> None:
            begun.set()
            go_on.wait(10)
            open_then.append(fcntl.fcntl(fd, fcntl.F_GETFD) >= 0)

    session = luo.Session(Slow().open(""), name="x", transport=Slow())
    threads = [threading.Thread(target=session.preserve_fd, args=(0, 1)), threading.Thread(target=session.close)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    threads[1].join(0.05)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join()
    assert open_then == [True]
    assert session.closed


def test_after_a_fork_during_a_request_the_child_can_make_requests(machine: FakeLuo) -> None:
    script = textwrap.dedent("""
        import os, signal, sys
        from kho import luo
        from fake_luo import CLIENT
        with luo.Device(sys.argv[1], transport=CLIENT) as device:
            session = device.create_session("search-index")
        session._lock.acquire()  # as a thread has it that preserves a large memfd
        if (child := os.fork()) == 0:
            signal.alarm(30)  # a child that waits for ever would outlive the test
            session.preserve_fd(os.memfd_create("x"), 1)
            session.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        session._lock.release()
        session.preserve_fd(os.memfd_create("y"), 2)
        session.close()
    """)
    paths = os.pathsep.join(path for path in (str(Path(__file__).parent), *sys.path) if path)
    env = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script, str(machine.path)], check=True, env=env, timeout=60)


# Any order of calls, against a model

NAMES = st.sampled_from(["a", "b", "c"])
TOKENS = st.integers(0, 3)
FILES = st.integers(0, 3)


class Lives(RuleBasedStateMachine):
    """Sessions and files through any number of kexecs; the model is what the kernel's sources say, as sets."""

    def __init__(self) -> None:
        super().__init__()
        self.before = descriptors()
        self.count = 0
        # A path of its own, and short: a Unix socket's has 107 bytes.
        self.path = Path(os.environ.get("TMPDIR", "/tmp")) / f"kho-luo-{os.getpid()}-{id(self):x}"
        self.machine = FakeLuo(self.path)
        self.device: luo.Device | None = None
        self.files = [memfd(bytes([i]) * (i * 1000)) for i in range(4)]
        self.out: dict[str, tuple[luo.Session, dict[int, int]]] = {}
        """Created: the object, and token to file."""
        self.arrived: dict[str, dict[int, int]] = {}
        """Handed over, not finished."""
        self.found: dict[str, luo.Session] = {}
        """Retrieved sessions that are open."""
        self.taken: set[tuple[str, int]] = set()
        self.lost: set[tuple[str, int]] = set()

    def refused(self, kind: type[kho.LuoError], call: object, *args: object) -> None:
        assert callable(call)
        with pytest.raises(kind):
            call(*args)

    @rule()
    def open_device(self) -> None:
        if self.device is None:
            self.device = opened(self.machine)
        else:
            self.refused(kho.LuoBusyError, opened, self.machine)

    @precondition(lambda self: self.device)
    @rule()
    def close_device(self) -> None:
        assert self.device is not None
        self.device.close()
        self.device = None

    @precondition(lambda self: self.device)
    @rule(name=NAMES)
    def create(self, name: str) -> None:
        assert self.device is not None
        if name in self.out:
            self.refused(kho.LuoExistsError, self.device.create_session, name)
        else:
            self.out[name] = (self.device.create_session(name), {})

    @precondition(lambda self: self.device)
    @rule(name=NAMES)
    def retrieve_session(self, name: str) -> None:
        assert self.device is not None
        if name in self.found:
            self.refused(kho.LuoStateError, self.device.retrieve_session, name)
        elif name not in self.arrived:
            self.refused(kho.LuoNotFoundError, self.device.retrieve_session, name)
        else:
            self.found[name] = self.device.retrieve_session(name)

    @precondition(lambda self: self.out)
    @rule(name=NAMES, token=TOKENS, file=FILES)
    def preserve(self, name: str, token: int, file: int) -> None:
        if name not in self.out:
            return
        session, files = self.out[name]
        if token in files:
            self.refused(kho.LuoExistsError, session.preserve_fd, self.files[file], token)
        elif any(file in held.values() for _, held in self.out.values()):
            self.refused(kho.LuoBusyError, session.preserve_fd, self.files[file], token)
        else:
            session.preserve_fd(self.files[file], token)
            files[token] = file

    @precondition(lambda self: self.found)
    @rule(name=NAMES, token=TOKENS, fails=st.booleans())
    def retrieve(self, name: str, token: int, fails: bool) -> None:
        if name not in self.found:
            return
        session, key = self.found[name], (name, token)
        if token not in self.arrived[name]:
            self.refused(kho.LuoNotFoundError, session.retrieve_fd, token)
            return
        if fails:
            self.machine.fail("retrieve", name, token, errno.ENOMEM)
        if key in self.lost or (fails and key not in self.taken):
            self.refused(kho.LuoRetrieveError, session.retrieve_fd, token)
            self.lost.add(key)
        else:
            i = self.arrived[name][token]
            fd = session.retrieve_fd(token)
            assert contents_of(fd) == bytes([i]) * (i * 1000)
            self.taken.add(key)
        if fails:
            self.machine.heal("retrieve", name, token)

    @precondition(lambda self: self.found)
    @rule(name=NAMES)
    def finish(self, name: str) -> None:
        if name in self.found:
            self.found[name].finish()
            self.forget(name)
            self.arrived[name] = {}

    @rule(name=NAMES)
    def close_created(self, name: str) -> None:
        if name in self.out:
            self.out.pop(name)[0].close()

    @rule(name=NAMES)
    def close_retrieved(self, name: str) -> None:
        if name in self.found:
            self.found.pop(name).close()
            self.forget(name)
            del self.arrived[name]

    @rule()
    def kexec(self) -> None:
        self.machine.kexec()
        for session in (*(s for s, _ in self.out.values()), *self.found.values(), self.device):
            if session is not None:
                session.close()
        self.arrived = {name: dict(files) for name, (_, files) in self.out.items()}
        self.out, self.found, self.device, self.taken, self.lost = {}, {}, None, set(), set()

    def forget(self, name: str) -> None:
        self.taken = {key for key in self.taken if key[0] != name}
        self.lost = {key for key in self.lost if key[0] != name}

    @invariant()
    def the_machine_has_what_the_model_has(self) -> None:
        assert self.machine.outgoing() == {name: set(files) for name, (_, files) in self.out.items()}
        assert self.machine.incoming() == {name: set(files) for name, files in self.arrived.items()}

    def teardown(self) -> None:
        for session in (*(s for s, _ in self.out.values()), *self.found.values(), self.device):
            if session is not None:
                session.close()
        for fd in self.files:
            os.close(fd)
        self.machine.close()
        assert descriptors() <= self.before


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=40)
