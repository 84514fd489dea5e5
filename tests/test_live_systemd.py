"""kho.live: systemd keeps an image while its service is stopped."""

from __future__ import annotations

import array
import contextlib
import fcntl
import functools
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kho
import kho.live
from kho import luo
from kho.live.transports import kexec, systemd

import fake_luo
from fake_luo import CLIENT, FakeLuo
from livefiles import Channel, process, service

pytestmark = pytest.mark.usefixtures("sockets")


class Manager:
    """What systemd does for a service with FileDescriptorStoreMax= and NotifyAccess=main (sd_pid_notify_with_fds(3)).

    Of a datagram it takes the sender from SCM_CREDENTIALS; it keeps descriptors by FDNAME, one per file, and passes
    them from 3 on to the next main process, with LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES. From systemd 254 on FDSTORE
    is the size of the store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store: dict[str, int] = {}
        self.main = 0
        self.conn = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.conn.bind(str(path))
        self.conn.settimeout(10)

    def hear(self) -> dict[str, str]:
        """Take one message."""
        raw, rights, flags, _ = self.conn.recvmsg(4096, 4096)
        assert not flags & socket.MSG_CTRUNC
        fields = dict(line.split("=", 1) for line in raw.decode().splitlines())
        fds = array.array("i")
        for _, kind, data in rights:
            if kind == socket.SCM_RIGHTS:
                fds.frombytes(data)
            else:
                assert array.array("i", data)[0] == self.main
        name = fields.get("FDNAME", "stored")
        assert len(name) < 256
        assert name.isascii()
        assert ":" not in name
        if fields.get("FDSTOREREMOVE") == "1":
            os.close(self.store.pop(name))
        elif fields.get("FDSTORE") == "1":
            (fd,) = fds
            if name in self.store and os.path.sameopenfile(fd, self.store[name]):
                os.close(fd)
            else:
                self.store[name] = fd
        return fields

    def turn(self) -> None:
        """Reverse the order, as every daemon-reload and kexec does."""
        self.store = dict(reversed(self.store.items()))

    def kexec(self) -> None:
        """Bring the memfds to the next kernel, as systemd-shutdown does with FileDescriptorStorePreserve=yes."""
        for name, old in self.store.items():
            file = fake_luo.File(old, os.fstat(old).st_size, fcntl.fcntl(old, fcntl.F_GET_SEALS))
            self.store[name] = fake_luo.reproduced(file)
            os.close(old)
        self.turn()

    def close(self) -> None:
        """Drop everything."""
        for fd in self.store.values():
            os.close(fd)
        self.conn.close()

    def start(self, work: Callable[[Channel], object]) -> contextlib.AbstractContextManager[Channel]:
        """Start the service."""

        def main(line: Channel) -> None:
            os.environ["NOTIFY_SOCKET"] = str(self.path)
            os.environ["FDSTORE"] = "4"
            moved = [os.dup(fd) for fd in self.store.values()]
            line._conn = socket.socket(fileno=os.dup2(line._conn.detach(), 50))
            line._conn.settimeout(30)
            high = [os.dup2(fd, 60 + i, inheritable=False) for i, fd in enumerate(moved)]
            for fd in {*moved, *self.store.values()}:  # those of systemd itself are not in the service
                os.close(fd)
            for i, fd in enumerate(high):
                os.dup2(fd, 3 + i)
                os.close(fd)
            os.environ.update(
                LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=":".join(self.store)
            )
            work(line)

        return process(main)


def test_systemd_keeps_the_image_while_the_service_is_stopped(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    name = "my service: ü"
    try:
        with manager.start(functools.partial(service, name=name)) as first:
            manager.main = first.pid
            assert first.hear() == ["new", 0, []]
            assert manager.hear()["FDNAME"] == systemd.fdname(name) == "kho-live-my%20service%3A%20%C3%BC"
            first.ask("put", "a", "one")
            first.ask("commit")
            first.ask("put", "b", "lost")
            first.kill()
        for generation in (1, 2):
            with manager.start(functools.partial(service, name=name)) as again:
                manager.main = again.pid
                assert again.hear() == ["systemd", generation, ["a"]]
                assert manager.hear()["FDSTORE"] == "1"
                assert len(manager.store) == 1, "the same file is kept once"
                again.ask("put", "a", "two")
                again.ask("commit")
                if generation == 2:
                    again.ask("release")
                    assert manager.hear()["FDSTOREREMOVE"] == "1"
                    assert manager.store == {}
                again.say("exit")
                assert again.ended() == 0
    finally:
        manager.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@contextlib.contextmanager
def served(manager: Manager, name: str = "x", **options: Any) -> Iterator[Channel]:
    """A service that has opened its image; what it says first is left to read."""
    with manager.start(functools.partial(service, name=name, **options)) as line:
        manager.main = line.pid
        yield line
        if line.pid:
            line.say("exit")
            assert line.ended() == 0


def test_an_image_without_a_name_is_found_after_every_kexec(manager: Manager) -> None:
    with served(manager) as first:
        assert first.hear() == ["new", 0, []]
        manager.hear()
        first.ask("put", "a", "one")
        first.ask("commit")
    for generation in (1, 2, 3):
        manager.kexec()
        (fd,) = manager.store.values()
        assert not str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/memfd:kho-live")
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 0x7
        assert os.fstat(fd).st_mode & 0o777 == 0o777
        for _ in range(2):
            with served(manager) as again:
                assert again.hear() == ["systemd", generation, ["a"]]
                assert manager.hear()["FDSTORE"] == "1"
                assert len(manager.store) == 1
                assert again.ask("get", "a") == "one"
        with served(manager) as again:
            again.hear()
            manager.hear()
            again.ask("put", "a", "one")
            again.ask("commit")


def test_images_are_found_by_name_in_whatever_order_systemd_passes_them(manager: Manager) -> None:
    for name in ("a", "b", "c"):
        with served(manager, name) as line:
            line.hear()
            manager.hear()
            line.ask("put", name, name)
            line.ask("commit")
    for _ in range(2):
        manager.turn()
        for name in ("a", "b", "c"):
            with served(manager, name) as line:
                assert line.hear() == ["systemd", 1, [name]]
                manager.hear()


@pytest.mark.parametrize("other", ["text", "named", "pipe", "memfd"])
def test_a_descriptor_that_is_no_image_is_refused(manager: Manager, tmp_path: Path, other: str) -> None:
    if other == "memfd":
        fd = os.memfd_create("kho-live:x")
        os.write(fd, b"text" * 5000)
    elif other == "pipe":
        fd, end = os.pipe()
        os.close(end)
    else:
        path = tmp_path / "file"
        with kho.live.open("x", "1M", backing=path):
            pass
        if other == "text":
            path.write_bytes(bytes(5000))
        fd = os.open(path, os.O_RDWR)
    manager.store[systemd.fdname("x")] = fd
    with served(manager) as line:
        kind, text = line.hear()
        assert (kind, "is another file" in text) == ("SourceError", True)
        assert line.ended() == 0


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLuo]:
    with FakeLuo(tmp_path / "liveupdate") as made:
        monkeypatch.setattr(kexec, "machine", kexec.Machine(made.path, CLIENT))
        yield made


def test_in_a_service_with_a_store_systemd_preserves_the_image_and_this_process_does_not(
    manager: Manager, machine: FakeLuo
) -> None:
    with served(manager, kexec=True) as line:
        assert line.hear() == ["new", 0, []]
        manager.hear()
        assert machine.outgoing() == {}
        line.ask("put", "a", "one")
        line.ask("commit")
        assert line.ask("stats")["holes"] == 1
    # What systemd-shutdown does then is not refused: the memfd is in no session.
    (fd,) = manager.store.values()
    with fake_luo.create(machine, "systemd") as session:
        session.preserve_fd(fd, 1)
        machine.kexec()
    with fake_luo.retrieve(machine, "systemd") as session:
        os.close(fd)
        manager.store[systemd.fdname("x")] = session.retrieve_fd(1)
        session.finish()
    with served(manager, kexec=True) as line:
        assert line.hear() == ["systemd", 1, ["a"]]
        manager.hear()
        assert (machine.outgoing(), machine.incoming()) == ({}, {})


def test_without_a_store_a_service_of_systemd_preserves_its_image_itself(
    manager: Manager, machine: FakeLuo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    for size in (None, "", "0", "x"):
        if size is None:
            monkeypatch.delenv("FDSTORE", raising=False)
        else:
            monkeypatch.setenv("FDSTORE", size)
        manager.main = os.getpid()
        with kho.live.open("x", "1M", kexec=True):
            assert machine.outgoing() == {"kho-live/x": {1}}
    while manager.store or select.select([manager.conn], [], [], 0)[0]:
        if select.select([manager.conn], [], [], 0)[0]:
            manager.hear()
        for fd in manager.store.values():
            os.close(fd)
        manager.store.clear()


def preserved(machine: FakeLuo) -> None:
    """An image `x` that a process has preserved by a session of its own, and the next kernel."""
    with kho.live.open("x", "4M", kexec=True) as h:
        h.put("a", b"one")
        h.commit()
        machine.kexec()


def test_an_image_is_taken_out_of_its_own_session_that_systemd_passes(manager: Manager, machine: FakeLuo) -> None:
    preserved(machine)
    with fake_luo.retrieve(machine, "kho-live/x") as session:
        manager.store[systemd.fdname("x")] = session.detach()
    with served(manager) as line:
        assert line.hear() == ["systemd", 1, ["a"]]
        heard = [manager.hear() for _ in range(2)]
        assert [next(iter(one)) for one in heard] == ["FDSTOREREMOVE", "FDSTORE"]
        assert {one["FDNAME"] for one in heard} == {systemd.fdname("x")}
        assert machine.incoming() == {}, "finished"
        assert machine.outgoing() == {}
        assert line.ask("put", "b", "two") == "put"
        assert line.ask("commit") == 2
        assert line.ask("verify") == 6
    with served(manager) as line:
        assert line.hear() == ["systemd", 2, ["a", "b"]]
        manager.hear()


def test_a_session_whatever_its_fdname_is_told_by_its_link(monkeypatch: pytest.MonkeyPatch, machine: FakeLuo) -> None:
    with fake_luo.create(machine, "kho-live/x") as session:
        assert not kexec.is_session_of(session.fileno(), "x", named=False), "here it is a socket"
        monkeypatch.setattr(luo, "session_link", lambda fd: b"kho-live/x" if fd == session.fileno() else None)
        assert kexec.is_session_of(session.fileno(), "x", named=False)
        assert not kexec.is_session_of(session.fileno(), "y", named=False)
        assert not kexec.is_session_of(0, "x", named=False)


def test_a_session_for_the_next_kernel_that_systemd_passes_next_to_the_memfd_is_dropped(
    manager: Manager, machine: FakeLuo, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(manager) as line:
        line.hear()
        manager.hear()
        line.ask("put", "a", "one")
        line.ask("commit")
    session = fake_luo.create(machine, "kho-live/x")
    (fd,) = manager.store.values()
    session.preserve_fd(fd, 1)
    manager.store = {"mine": session.detach(), **manager.store}
    monkeypatch.setattr(luo, "session_link", lambda fd: b"kho-live/x" if fd == 3 else None)
    with served(manager) as line:
        assert line.hear() == ["systemd", 1, ["a"]]
        assert manager.hear() == {"FDSTOREREMOVE": "1", "FDNAME": "mine"}
        manager.hear()
        assert machine.outgoing() == {}, "systemd can preserve the memfd again"


def test_a_session_for_the_next_kernel_without_the_memfd_is_dropped_with_a_warning(
    manager: Manager, machine: FakeLuo
) -> None:
    with kho.live.open("x", "4M", backing="memfd") as h:
        manager.store[systemd.fdname("x")] = os.dup(h.preserve().fileno())
    assert machine.outgoing() == {"kho-live/x": {1}}

    def main(line: Channel) -> None:
        with pytest.warns(RuntimeWarning, match="kept a live update session of this kernel"):
            h = kho.live.open("x", "4M")
        line.say(h.transport, h.names())
        line.hear()

    with manager.start(main) as line:
        manager.main = line.pid
        assert line.hear() == ["new", []]
        assert manager.hear()["FDSTOREREMOVE"] == "1"
        while not manager.store:
            manager.hear()
        assert list(manager.store) == [systemd.fdname("x")]
        assert machine.outgoing() == {}


def test_an_image_of_another_version_from_the_last_kernel_is_kept_by_systemd(
    manager: Manager, machine: FakeLuo
) -> None:
    preserved(machine)
    with served(manager, version="2") as line:
        assert line.hear()[0] == "SchemaError"
        assert manager.hear()["FDSTORE"] == "1"
        assert line.ended() == 0
    assert machine.incoming() == {}, "the kernel has nothing any more"
    with served(manager, version="1") as line:
        assert line.hear() == ["systemd", 1, ["a"]]
        manager.hear()


def test_a_write_sealed_image_is_said_to_be_one_and_can_be_copied(manager: Manager) -> None:
    with served(manager) as line:
        line.hear()
        manager.hear()
        line.ask("put", "a", "one")
        line.ask("commit")
    (fd,) = manager.store.values()
    sealed = fake_luo.reproduced(fake_luo.File(fd, os.fstat(fd).st_size, 0x20))
    assert fcntl.fcntl(sealed, fcntl.F_GET_SEALS) == 0x3E
    manager.store[systemd.fdname("x")] = sealed
    os.close(fd)

    def main(line: Channel) -> None:
        with pytest.raises(kho.ReadOnlyError) as caught:
            kho.live.open("x", "4M")
        # The lines of docs/live.md
        fd = kexec.find("x")
        assert fd is not None
        old = kho.live.attach(fd)
        kexec.forget("x")
        with kho.live.open("x", "4M") as h:
            for name in old.names():
                h.put(name, old[name])
            h.commit()
            line.say(str(caught.value), h.transport, h.names())

    with manager.start(main) as line:
        manager.main = line.pid
        said, *found = line.hear()
        assert "vm.memfd_noexec=1" in said
        assert "docs/live.md" in said
        assert found == ["new", ["a"]]
        assert [next(iter(manager.hear())) for _ in range(2)] == ["FDSTOREREMOVE", "FDSTORE"]
        assert line.ended() == 0
    with served(manager) as line:
        assert line.hear() == ["systemd", 1, ["a"]]
        manager.hear()


def test_descriptors_that_systemd_passed_to_another_process_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", systemd.fdname("x"))
    for pid in ("1", str(os.getppid()), "", "x"):
        monkeypatch.setenv("LISTEN_PID", pid)
        assert systemd.from_systemd("x") is None
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    for count in ("", "-1", "x", "0"):
        monkeypatch.setenv("LISTEN_FDS", count)
        assert systemd.from_systemd("x") is None


def test_an_unread_notify_socket_is_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for address in ("", "relative", "/nonexistent", "@nobody-listens", str(tmp_path)):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with kho.live.open("x", "4M") as h:
            assert not h.stored
    assert len(systemd.fdname("x" * 255)) < 256
    assert len(systemd.fdname("ü" * 127)) < 256


def test_a_real_systemd_keeps_the_image(tmp_path: Path) -> None:
    run = ["systemd-run", "--user", "--wait", "--collect", "--quiet"]
    try:
        able = subprocess.run([*run, "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        able = False
    if not able:
        pytest.skip("no systemd --user here; the notify socket above is faithful to it")
    log = tmp_path / "log"
    program = tmp_path / "service.py"
    program.write_text(
        "import os, signal, sys, kho.live\n"
        "with kho.live.open('kho-test', '4M') as h:\n"
        f"    print(h.transport, h.generation, file=open({str(log)!r}, 'a'), flush=True)\n"
        "    h.put('a', b'x'); h.commit()\n"
        "    if h.generation < 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    h.release()\n"
    )
    properties = ["Restart=on-failure", "RestartSec=0", "FileDescriptorStoreMax=4", "NotifyAccess=main"]
    options = [f"--property={one}" for one in properties]
    options += [f"--setenv=PYTHONPATH={os.pathsep.join(sys.path)}"]
    subprocess.run([*run, *options, sys.executable, str(program)], check=True, timeout=60)
    assert log.read_text().split() == ["new", "0", "systemd", "1", "systemd", "2"]
