"""kho.live: clients of the socket that are refused; names of sockets, and sockets of killed processes."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import kho
import kho.live
from kho.live.handover import registry, server, wire
from kho.live.handover import sockets as runtime

from livefiles import Channel, filled, goes_on, process, service, wait_until

pytestmark = pytest.mark.usefixtures("sockets")


# Hostile peers


GARBAGE: list[bytes] = [
    b"x",
    b"\0" * 60_000,
    b"[" * 60_000,
    b'{"do": "who"',
    b"[1, 2]",
    b"9" * 5000,
    b"{}",
    b'{"do": null}',
    b'{"do": ["prepare"]}',
    b'{"do": "prepare"}',
    b'{"do": "prepare", "name": 5, "version": {}}',
    b'{"do": "adopt"}',
    b'{"do": "adopted"}',
    b'{"do": "release", "force": "yes"}',
    json.dumps({"do": "x" * 60_000}).encode(),
]


def test_malformed_requests_are_refused_and_the_owner_goes_on() -> None:
    with filled() as old:
        before = len(os.listdir(f"/proc/{old.pid}/fd"))  # noqa: PTH208
        for raw in [*GARBAGE, os.urandom(1000), b"x" * 100_000]:
            conn = runtime.connect("x")
            assert conn is not None
            with conn:
                conn.send(raw)
                conn.settimeout(5)
                answer = conn.recv(1 << 16)
                assert not answer or json.loads(answer)["ok"] is False
        goes_on(old)
        wait_until(lambda: len(os.listdir(f"/proc/{old.pid}/fd")) == before)  # noqa: PTH208


def test_unexpected_descriptors_are_closed() -> None:
    with filled() as old:
        before = len(os.listdir(f"/proc/{old.pid}/fd"))  # noqa: PTH208
        conn = runtime.connect("x")
        assert conn is not None
        with conn:
            for _ in range(20):
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 250))]
                conn.sendmsg([b'{"do": "who"}'], rights)
                conn.settimeout(5)
                assert json.loads(conn.recv(1 << 16))["ok"]
            assert len(os.listdir(f"/proc/{old.pid}/fd")) == before + 1  # noqa: PTH208
        goes_on(old)


def connected(name: str) -> socket.socket:
    """A connection, once the server has taken in those that wait before it."""
    until = time.monotonic() + 30
    while True:
        try:
            conn = runtime.connect(name)
        except kho.BusyError:
            assert time.monotonic() < until
            time.sleep(0.001)
        else:
            assert conn is not None
            return conn


def test_silent_and_unresponsive_clients_block_no_other() -> None:
    with filled() as old, contextlib.ExitStack() as stack:
        silent = []
        for _ in range(100):
            conn = connected("x")
            silent.append(stack.enter_context(conn))
            with contextlib.suppress(OSError):
                for _ in range(300 if len(silent) == 50 else 0):
                    conn.send(b'{"do": "who"}')
        goes_on(old)
        assert len(os.listdir(f"/proc/{old.pid}/fd")) < 60  # noqa: PTH208
        with kho.live.open("x", timeout=5) as h:
            assert bytes(h["a"]) == b"one"


def test_a_new_owner_hands_over_only_after_its_predecessor_knows_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that the previous owner would find the image unlocked for the next successor, and take it back."""
    refused = []
    ask = wire.ask

    def asks(conn: socket.socket, message: wire.Message, **given: Any) -> Any:
        if message.get("do") == "adopted":
            with pytest.raises(kho.BusyError, match="still taking it over") as error:
                kho.live.open("x", timeout=0)
            refused.append(error)
        return ask(conn, message, **given)

    with filled() as old:
        monkeypatch.setattr(wire, "ask", asks)
        with kho.live.open("x", timeout=5) as h:
            assert len(refused) == 1
            assert bytes(h["a"]) == b"one"
            assert old.pid != os.getpid()


def test_a_servers_false_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("liar")
    for answer, fds in (
        ({"ok": True}, []),
        ({"ok": True}, [fd]),
        ({"ok": "yes"}, [fd]),
        ({}, [fd, fd, fd]),
        ({"ok": False, "error": ["busy"], "text": 7}, []),
    ):
        published = runtime.publish("x", replace=True)

        def serve(answer: Any = answer, fds: Any = fds, published: Any = published) -> None:
            published.listener.settimeout(5)
            with published.listener.accept()[0] as conn:
                conn.recv(100)
                wire.send(conn, answer, *fds)
                conn.settimeout(5)
                conn.recv(100)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(kho.KhoError):
            kho.live.open("x")
        thread.join()
        runtime.retract(published)
    os.close(fd)


@pytest.mark.parametrize(
    "pinned", [None, 5, [[1]], [[0, 0]], [["a", 1]], [[-1, 4]], [[0, 1 << 50]], [[1023, 5]], [[0, 1]]]
)
def test_a_malformed_list_of_pinned_pages_is_refused_and_nothing_is_adopted(pinned: object) -> None:
    def lying(line: Channel) -> None:
        owners: Any = server.Owner
        transfer = owners.transfer
        owners.transfer = lambda self: ({"pinned": pinned}, transfer(self)[1])
        service(line)

    with process(lying) as old:
        assert old.hear() == ["new", 0, []]
        old.ask("put", "a", "x")
        old.ask("commit")
        with pytest.raises(kho.FormatError, match="not a run of pages|which are not free"):
            kho.live.open("x")
        wait_until(lambda: old.ask("phase") != "transferring")
        goes_on(old)


# Other users


def test_other_users_are_refused_at_both_ends() -> None:
    def suspicious(line: Channel) -> None:
        wire.trusted = lambda uid, policy=None: False  # type: ignore[attr-defined]
        service(line)

    with process(suspicious) as old:
        assert old.hear() == ["new", 0, []]
        with pytest.raises(kho.BusyError, match="closed the connection|broke|does not listen"):
            kho.live.open("x")
    with filled() as old:

        def suspects(line: Channel) -> None:
            suspicious(line)

        with process(suspects) as other:
            kind, text = other.hear()
            assert kind == "SourceError"
            assert "nothing is passed between users" in text
        goes_on(old)


def test_another_user_cannot_connect(sockets: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can be another user")
    with filled() as old:
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert stat.S_IMODE((sockets / "x.sock").stat().st_mode) == 0o600

        def other(line: Channel) -> None:
            for at in list(sockets.parents)[:-2]:
                at.chmod(0o711)
            os.seteuid(65534)
            service(line)

        with process(other) as line:
            assert line.hear()[0] == "AccessError"
        goes_on(old)


def test_a_directory_that_others_may_enter_is_not_used(sockets: Path) -> None:
    for mode in (0o755, 0o770):
        sockets.mkdir(exist_ok=True)
        sockets.chmod(mode)
        with pytest.raises(kho.SourceError, match=f"mode {mode:#o}; it must be yours alone"):
            kho.live.open("x", "4M")
    sockets.chmod(0o700)
    sockets.rmdir()
    sockets.symlink_to("/tmp")
    with pytest.raises(kho.SourceError, match="must be a directory of your own"):
        kho.live.open("x", "4M")
    sockets.unlink()
    sockets.write_bytes(b"")
    with pytest.raises(kho.SourceError):
        kho.live.open("x", "4M")
    sockets.unlink()


def test_without_a_runtime_directory_an_image_opens_with_serve_false(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc")
    with pytest.raises(kho.SourceError, match="serve=False"):
        kho.live.open("x", "4M")
    with kho.live.open("x", "4M", serve=False) as h:
        assert not h.served


# Names


@pytest.mark.parametrize("name", ["a%2Fb", "..", ".", "a b", "ü" * 120, "x" * 255, "%41", "A.sock", "-"])
def test_every_name_has_its_own_socket(name: str, sockets: Path) -> None:
    with kho.live.open(name, "4M") as h:
        assert h.served
        assert [row.name for row in registry.holdings()] == [name]
        assert len([file for file in sockets.iterdir() if file.name.endswith(".sock")]) == 1
        assert runtime.connect(name + "x" if len(name) < 9 else "y") is None
        with pytest.raises(kho.NotFoundError, match="no process has 'nope'"):
            registry.readable("nope")
    assert list(sockets.iterdir()) == []


def test_the_socket_of_a_killed_process_is_replaced_and_removed(sockets: Path) -> None:
    for clean in (lambda: kho.live.open("x", "4M").close(), registry.holdings):
        with filled() as old:
            old.kill()
        assert (sockets / "x.sock").exists()
        (sockets / ".99.sock.new").write_bytes(b"")
        clean()
        assert not (sockets / "x.sock").exists()
        (sockets / ".99.sock.new").unlink(missing_ok=True)


def test_a_process_that_exits_without_closing_leaves_no_socket(sockets: Path) -> None:
    program = "import kho.live; h = kho.live.open('x', '4M'); h.put('a', b'1'); h.commit()"
    done = subprocess.run([sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [file.name for file in sockets.iterdir()] == ["x.live"]


def test_forked_children_do_not_answer() -> None:
    with filled() as old:
        worker = old.ask("fork")
        goes_on(old)
        old.kill()
        assert runtime.connect("x") is None
        with kho.live.open("x", "4M") as h:
            assert h.transport == "file"
        os.kill(worker, signal.SIGKILL)


def test_forks_during_handovers_disturb_no_process() -> None:
    with filled() as old:
        for _ in range(20):
            old.say("fork")
            with contextlib.suppress(kho.BusyError), pytest.raises(RuntimeError):
                kho.live.open("x", timeout=1, ready=lambda candidate: (_ for _ in ()).throw(RuntimeError()))
            os.kill(old.hear()[0], signal.SIGKILL)
        goes_on(old)


def test_an_image_with_a_path_is_served_if_asked_for(tmp_path: Path) -> None:
    with kho.live.open("x", "4M", backing=tmp_path / "image", serve=True) as h:
        assert [(row.name, row.transport) for row in registry.holdings()] == [("x", "path")]
        with pytest.raises(kho.BusyError, match="another process has 'x' now"):
            kho.live.open("x", "4M", backing=tmp_path / "other", serve=True)
        assert h.served
