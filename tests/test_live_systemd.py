"""kho.live: systemd keeps an image while its service is stopped."""

from __future__ import annotations

import array
import contextlib
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kho
import kho.live
from kho.live.transports import systemd

from livefiles import Channel, process, service

pytestmark = pytest.mark.usefixtures("sockets")


class Manager:
    """What systemd does for a service with FileDescriptorStoreMax= and NotifyAccess=main (sd_pid_notify_with_fds(3)).

    Of a datagram it takes the sender from SCM_CREDENTIALS; it keeps descriptors by FDNAME, one per file, and passes
    them from 3 on to the next main process, with LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES.
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

    def start(self, work: Callable[[Channel], object]) -> contextlib.AbstractContextManager[Channel]:
        """Start the service."""

        def main(line: Channel) -> None:
            os.environ["NOTIFY_SOCKET"] = str(self.path)
            moved = [os.dup(fd) for fd in self.store.values()]
            line._conn = socket.socket(fileno=os.dup2(line._conn.detach(), 50))
            line._conn.settimeout(30)
            high = [os.dup2(fd, 60 + i, inheritable=False) for i, fd in enumerate(moved)]
            for i, fd in enumerate(high):
                os.dup2(fd, 3 + i)
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
        for fd in manager.store.values():
            os.close(fd)
        manager.conn.close()


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
