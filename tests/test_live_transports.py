"""kho.live: an image finds its next process, by socket, across exec, from systemd; whoever dies when."""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kho
import kho.live
from kho.live import Candidate, census, inherited, runtime, server, wire

from livefiles import Channel, descriptors, die, process, service

MIB = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, in which nothing is left."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = descriptors()
    yield tmp_path / "kho"
    gc.collect()
    left = [file.name for file in (tmp_path / "kho").iterdir()] if (tmp_path / "kho").is_dir() else []
    assert descriptors() == before
    assert left == [] or all(runtime.connect("x") is None for _ in left), left


def owner(**options: Any) -> contextlib.AbstractContextManager[Channel]:
    """A process that opens the image `x`."""
    return process(functools.partial(service, **options))


@contextlib.contextmanager
def filled(**options: Any) -> Iterator[Channel]:
    """A process that has `x` with an object `a` in it."""
    with owner(**options) as old:
        assert old.hear() == ["new", 0, []]
        assert old.ask("put", "a", "one") == "put"
        assert old.ask("commit") == 1
        yield old


def goes_on(old: Channel) -> None:
    """The old one is the owner, and others find it."""
    generation = old.ask("generation")
    assert old.ask("put", "b", "two") == "put"
    assert old.ask("commit") == generation + 1
    assert [(row.name, row.pid, row.state) for row in census.holdings()] == [("x", old.pid, "serving")]


# Taking over


def test_a_successor_finds_the_image_by_its_name_while_its_owner_runs() -> None:
    with filled() as old:
        assert old.ask("hold", "a") == "held"
        looked = []

        def ready(candidate: Candidate) -> None:
            looked.append((candidate.names(), candidate.verify()))

        with kho.live.open("x", "1G", ready=ready) as h:
            assert looked == [(["a"], 3)]
            assert (h.transport, h.inherited, h.generation, bytes(h["a"])) == ("socket", True, 1, b"one")
            assert h.stats()["size"] == 4 * MIB
            assert old.ask("handed over", 5)
            assert old.ask("put", "a", "late")[0] == "NotOwnerError"
            # What the old one shows is not used anew before it has ended.
            for i in range(5):
                h.put("a", b"two" * 2000 + bytes([i]))
                h.commit()
            assert old.ask("held", "a") == "one"
            assert h.draining()
            assert h.stats()["pinned_bytes"] == 4096
            old.say("exit")
            assert old.ended() == 0
            assert not h.draining()
            assert h.stats()["pinned_bytes"] == 0
            assert [row.pid for row in census.holdings()] == [os.getpid()]


def test_arrays_of_replaced_objects_that_the_old_one_still_shows_stay_whole() -> None:
    with filled() as old:
        assert old.ask("hold", "a") == "held"
        old.ask("put", "a", "two")
        old.ask("commit")
        with kho.live.open("x") as h:
            for i in range(200):
                h.put(f"o{i}", bytes([255]) * 8000)
            h.commit()
            assert old.ask("held", "a") == "one"
            old.kill()
            assert h.stats()["pinned_bytes"] == 0


def test_closing_its_handle_is_what_tells_that_an_old_one_has_drained() -> None:
    with filled() as old, kho.live.open("x") as h:
        assert h.draining()
        old.ask("close")
        assert not h.draining()


def test_children_of_the_old_one_count_as_readers() -> None:
    with filled() as old:
        worker = old.ask("fork")
        with kho.live.open("x") as new:
            del new["a"]
            new.commit()
            # It was there before the hand-over, and knows nothing of it.
            again = old.ask("fork")
            old.kill()
            assert new.draining()
            os.kill(again, signal.SIGKILL)
            wait_until(lambda: not new.draining())
        os.kill(worker, signal.SIGKILL)


def wait_until(true: Callable[[], bool], within: float = 10) -> None:
    until = time.monotonic() + within
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_third_waits_for_the_first_too_with_what_it_replaces() -> None:
    with filled() as first, owner(timeout=5) as second:
        assert second.hear() == ["socket", 1, ["a"]]
        assert first.ask("hold", "a") == "held"
        assert second.ask("put", "a", "two") == "put"
        assert second.ask("commit") == 2
        with kho.live.open("x", timeout=5) as third:
            assert second.ask("handed over", 5)
            second.kill()
            third.put("b", b"x" * 100_000)
            third.commit()
            assert third.draining()
            assert first.ask("held", "a") == "one"
            first.kill()
            assert not third.draining()
            assert third.stats()["pinned_bytes"] == 0


def test_many_hand_overs_within_one_process_leave_nothing() -> None:
    h = kho.live.open("x", "4M")
    h.put("a", b"1")
    h.commit()
    before = None
    for _ in range(30):
        following = kho.live.open("x")
        assert following.transport == "socket"
        assert h.handed_over.is_set()
        h.close()
        h = following
        h.put("a", os.urandom(50_000))
        h.commit()
        before = before or (descriptors(), threading.active_count(), os.fstat(h.fileno()).st_blocks)
        assert (descriptors(), threading.active_count()) == before[:2]
        assert os.fstat(h.fileno()).st_blocks < before[2] + 32
    h.release()
    assert runtime.connect("x") is None


def test_a_failing_health_check_leaves_the_old_one_serving() -> None:
    def ready(candidate: Candidate) -> None:
        raise RuntimeError(f"not fit for {candidate.names()}")

    with filled() as old:
        for _ in range(3):
            with pytest.raises(RuntimeError, match=r"not fit for \['a'"):
                kho.live.open("x", ready=ready)
        goes_on(old)
        with kho.live.open("x") as h:
            assert h.generation == 2


def test_another_version_leaves_the_old_one_serving() -> None:
    with filled(version="7") as old:
        with pytest.raises(kho.SchemaError, match="of version '7', not '8'"):
            kho.live.open("x", version="8", timeout=5)
        goes_on(old)


def test_uncommitted_changes_are_waited_for() -> None:
    with filled() as old:
        old.ask("put", "b", "begun")
        with pytest.raises(kho.BusyError, match=f"process {old.pid} cannot hand over yet: 1 changes are not committed"):
            kho.live.open("x")
        timer = threading.Timer(0.3, old.say, ("commit",))
        timer.start()
        with kho.live.open("x", timeout=10) as h:
            assert h.names() == ["a", "b"]
        timer.join()
        assert old.hear() == [2]


def test_changes_wait_while_a_successor_looks_and_then_go_on_or_are_refused() -> None:
    h = kho.live.open("x", "4M")
    done: list[object] = []

    def write() -> None:
        try:
            h.put("a", b"1")
            done.append(h.commit())
        except kho.NotOwnerError as error:
            done.append(error)

    def successors(line: Channel) -> None:
        def ready(candidate: Candidate) -> None:
            line.say("looks")
            if line.hear() == ["not fit"]:
                raise RuntimeError

        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                kho.live.open("x", ready=ready, timeout=10)
        line.say("has it")
        line.hear()

    with process(successors) as line:
        for answer in ("not fit", "fit"):
            assert line.hear() == ["looks"]
            thread = threading.Thread(target=write)
            thread.start()
            time.sleep(0.2)
            assert done == ([] if answer == "not fit" else [1]), "it waits"
            assert h.names() == ([] if answer == "not fit" else ["a"]), "and reads go on"
            line.say(answer)
            thread.join(10)
        assert line.hear() == ["has it"]
    assert done[0] == 1
    assert isinstance(done[1], kho.NotOwnerError)
    h.close()


def test_of_two_successors_that_race_one_adopts_and_the_other_is_told() -> None:
    def successor_of(line: Channel) -> None:
        line.hear()
        service(line, ready=lambda candidate: time.sleep(0.05))

    for _ in range(20):
        with filled() as old, process(successor_of) as one, process(successor_of) as two:
            one.say("go")
            two.say("go")
            answers = {line.pid: line.hear() for line in (one, two)}
            won = [pid for pid, answer in answers.items() if answer == ["socket", 1, ["a"]]]
            lost = [answer for answer in answers.values() if answer[0] == "BusyError"]
            assert len(won) == len(lost) == 1, answers
            assert f"process {won[0]} is taking 'x' over from {old.pid}" in lost[0][1]
            assert old.ask("handed over", 5)
            assert [row.pid for row in census.holdings()] == won


def test_of_two_successors_that_wait_each_has_its_turn() -> None:
    def successor_of(line: Channel) -> None:
        line.hear()
        service(line, timeout=20, ready=lambda candidate: time.sleep(0.05))

    with filled() as old, process(successor_of) as one, process(successor_of) as two:
        for line in (one, two):
            line.say("go")
        assert one.hear() == two.hear() == ["socket", 1, ["a"]]
        assert old.ask("handed over", 5)
        wait_until(lambda: one.ask("handed over", 0) != two.ask("handed over", 0))


def test_of_those_that_begin_at_once_one_makes_the_image() -> None:
    def begin(line: Channel) -> None:
        line.hear()
        service(line, timeout=20)

    for _ in range(5):
        with contextlib.ExitStack() as stack:
            lines = [stack.enter_context(process(begin)) for _ in range(4)]
            for line in lines:
                line.say("go")
            assert sorted(line.hear()[0] for line in lines) == ["new", "socket", "socket", "socket"]
            wait_until(lambda lines=lines: sum(not line.ask("handed over", 0) for line in lines) == 1)  # type: ignore[misc]


# Whoever dies when


def dies_at(step: int) -> None:
    """Have this process killed at its `step`th call that a hand-over consists of: before it, or behind it."""
    calls = itertools.count()

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                die()
            result = function(*args, **kwargs)
            if next(calls) == step:
                die()
            return result

        return call

    for module, name in ((wire, "send"), (wire, "receive"), (runtime, "publish"), (server.Owner, "give")):
        setattr(module, name, wrapped(getattr(module, name)))
    candidate: Any = Candidate
    candidate.adopt = wrapped(candidate.adopt)


def test_a_successor_killed_at_any_step_leaves_an_owner_or_was_one() -> None:
    outcomes = []
    for step in range(100):

        def dying(line: Channel, step: int = step) -> None:
            dies_at(step)
            service(line)

        with filled() as old:
            with process(dying) as new:
                try:
                    answer = new.hear()
                except EOFError:
                    assert new.ended() == -signal.SIGKILL
                    answer = None
                if answer:
                    assert answer == ["socket", 1, ["a"]]
            if answer:
                break
            if old.ask("handed over", 0.5):
                outcomes.append("handed over")
            else:
                outcomes.append("goes on")
                goes_on(old)
    assert outcomes.count("goes on") >= 10
    assert outcomes == sorted(outcomes), "up to a step it goes on, and from that on it drains"
    assert len(outcomes) < 99


def test_an_owner_killed_at_any_step_leaves_its_image_to_who_has_seen_it() -> None:
    outcomes = []
    for step in range(100):

        def dying(line: Channel, step: int = step) -> None:
            h = kho.live.open("x", "4M")
            h.put("a", b"one")
            h.commit()
            dies_at(step)
            line.say("ready")
            h.handed_over.wait()
            line.say("handed over")
            signal.pause()

        with process(dying) as old:
            assert old.hear() == ["ready"]
            with kho.live.open("x", "4M", timeout=2) as h:
                outcomes.append((h.transport, h.generation))
                h.put("b", b"x")
                assert h.commit() == h.generation
                h.verify()
                assert [row.pid for row in census.holdings()] == [os.getpid()]
            with contextlib.suppress(EOFError):
                if old.hear() == ["handed over"]:
                    break
    assert set(outcomes) == {("new", 0), ("socket", 1)}
    assert outcomes == sorted(outcomes), "what was never passed on is gone, what was is there"


def test_an_owner_that_has_stopped_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = functools.partial(wire.ask, within=0.3)
    monkeypatch.setattr(wire, "ask", lambda conn, message, fds=0, within=0: asked(conn, message, fds=fds))
    with filled() as old:
        os.kill(old.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{old.pid}/task")
        wait_until(lambda: all(" T " in (task / "stat").read_text() for task in tasks.iterdir()))
        with pytest.raises(kho.BusyError, match=rf"process {old.pid} has not answered 'prepare' for 0.3 s"):
            kho.live.open("x")
        assert [row.state for row in census.holdings()] == ["silent"]
        os.kill(old.pid, signal.SIGCONT)
        wait_until(lambda: [row.state for row in census.holdings()] == ["serving"])
        goes_on(old)


@pytest.mark.parametrize("stage", ["looks", "adopts"])
def test_a_successor_that_takes_too_long_has_missed_its_turn(stage: str) -> None:
    def impatient(line: Channel) -> None:
        server.LOOK = server.ADOPT = 0.3
        service(line)

    with process(impatient) as old:
        assert old.hear() == ["new", 0, []]
        conn = runtime.connect("x")
        assert conn is not None
        with conn:
            _, (fd,) = wire.ask(conn, {"do": "prepare", "name": "x", "version": "1"}, fds=1)
            if stage == "adopts":
                assert wire.ask(conn, {"do": "adopt"})[0]["pinned"] == []
            wait_until(lambda: old.ask("_looked_at") is False)
            goes_on(old)
            with pytest.raises(wire.WireError):
                wire.ask(conn, {"do": "adopted"})
        os.close(fd)
        goes_on(old)


def test_who_has_the_lock_is_the_owner_whatever_was_said() -> None:
    def impatient(line: Channel) -> None:
        server.ADOPT = 0.2
        service(line)

    for breaks in (False, True):
        with process(impatient) as old:
            assert old.hear() == ["new", 0, []]
            conn = runtime.connect("x")
            assert conn is not None
            _, (fd,) = wire.ask(conn, {"do": "prepare", "name": "x", "version": "1"}, fds=1)
            wire.ask(conn, {"do": "adopt"})
            with kho.live.attach(fd).adopt() as h:
                if breaks:
                    conn.close()
                assert old.ask("handed over", 5)
                assert old.ask("put", "a", "b")[0] == "NotOwnerError"
                assert h.generation == 0
            conn.close()
            os.close(fd)


def test_a_successor_that_took_too_long_to_check_leaves_the_old_one_serving() -> None:
    def impatient(line: Channel) -> None:
        server.LOOK = 0.2
        service(line)

    with process(impatient) as old:
        assert old.hear() == ["new", 0, []]
        with pytest.raises(kho.BusyError, match=f"process {old.pid} has it"):
            kho.live.open("x", ready=lambda candidate: time.sleep(0.6))
        goes_on(old)


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


def test_garbage_is_refused_and_the_owner_goes_on() -> None:
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


def test_descriptors_that_nobody_asked_for_are_not_taken() -> None:
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


def test_those_who_say_nothing_or_never_listen_block_nobody() -> None:
    with filled() as old, contextlib.ExitStack() as stack:
        silent = []
        for _ in range(100):
            conn = connected("x")
            silent.append(stack.enter_context(conn))
            with contextlib.suppress(OSError):
                for _ in range(300 if len(silent) == 50 else 0):
                    conn.send(b'{"do": "who"}')
        began = time.monotonic()
        goes_on(old)
        assert time.monotonic() - began < 2
        assert len(os.listdir(f"/proc/{old.pid}/fd")) < 60  # noqa: PTH208
        with kho.live.open("x", timeout=5) as h:
            assert bytes(h["a"]) == b"one"


def test_a_server_that_lies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_pages_that_cannot_be_held_are_refused_and_nothing_is_taken(pinned: object) -> None:
    def lying(line: Channel) -> None:
        owners: Any = server.Owner
        give = owners.give
        owners.give = lambda self: ({"pinned": pinned}, give(self)[1])
        service(line)

    with process(lying) as old:
        assert old.hear() == ["new", 0, []]
        old.ask("put", "a", "x")
        old.ask("commit")
        with pytest.raises(kho.FormatError, match="no run of pages|which are not free"):
            kho.live.open("x")
        wait_until(lambda: old.ask("_looked_at") is False)
        goes_on(old)


# Who may


def test_other_users_are_turned_away_at_both_ends() -> None:
    def suspicious(line: Channel) -> None:
        wire.trusted = lambda uid: False  # type: ignore[attr-defined]
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


def test_another_user_does_not_come_in(here: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can be another user")
    with filled() as old:
        assert stat.S_IMODE(here.stat().st_mode) == 0o700
        assert stat.S_IMODE((here / "x.sock").stat().st_mode) == 0o600

        def other(line: Channel) -> None:
            for at in list(here.parents)[:-2]:
                at.chmod(0o711)
            os.seteuid(65534)
            service(line)

        with process(other) as line:
            assert line.hear()[0] == "SourceError"
        goes_on(old)


def test_a_directory_that_others_may_enter_is_not_used(here: Path) -> None:
    for mode in (0o755, 0o770):
        here.mkdir(exist_ok=True)
        here.chmod(mode)
        with pytest.raises(kho.SourceError, match=f"mode {mode:#o}; it must be yours alone"):
            kho.live.open("x", "4M")
    here.chmod(0o700)
    here.rmdir()
    here.symlink_to("/tmp")
    with pytest.raises(kho.SourceError, match="must be a directory of your own"):
        kho.live.open("x", "4M")
    here.unlink()
    here.write_bytes(b"")
    with pytest.raises(kho.SourceError):
        kho.live.open("x", "4M")
    here.unlink()


def test_without_a_place_for_sockets_an_image_can_be_had_unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    with pytest.raises(kho.SourceError, match="serve=False"):
        kho.live.open("x", "4M")
    with kho.live.open("x", "4M", serve=False) as h:
        assert not h.served


# Names


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a b", "ü" * 120, "x" * 255, "%41", "A.sock", "-"])
def test_any_name_is_a_socket_of_its_own(name: str, here: Path) -> None:
    with kho.live.open(name, "4M") as h:
        assert h.served
        assert [row.name for row in census.holdings()] == [name]
        assert len([file for file in here.iterdir() if file.name.endswith(".sock")]) == 1
        assert runtime.connect(name + "x" if len(name) < 9 else "y") is None
        with pytest.raises(kho.NotFoundError, match="nobody has 'nope'"):
            census.readable("nope")
    assert list(here.iterdir()) == []


def test_what_a_killed_process_left_is_replaced_and_removed(here: Path) -> None:
    for clean in (lambda: kho.live.open("x", "4M").close(), census.holdings):
        with filled() as old:
            old.kill()
        assert (here / "x.sock").exists()
        (here / ".99.sock.new").write_bytes(b"")
        clean()
        assert not (here / "x.sock").exists()
        (here / ".99.sock.new").unlink(missing_ok=True)


def test_a_process_that_exits_without_closing_leaves_nothing(here: Path) -> None:
    program = "import kho.live; h = kho.live.open('x', '4M'); h.put('a', b'1'); h.commit()"
    done = subprocess.run([sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(here.iterdir()) == []


def test_forked_children_do_not_answer() -> None:
    with filled() as old:
        worker = old.ask("fork")
        goes_on(old)
        old.kill()
        assert runtime.connect("x") is None
        with kho.live.open("x", "4M") as h:
            assert h.transport == "new"
        os.kill(worker, signal.SIGKILL)


def test_forks_while_successors_come_and_go_disturb_nobody() -> None:
    with filled() as old:
        for _ in range(20):
            old.say("fork")
            with contextlib.suppress(kho.BusyError), pytest.raises(RuntimeError):
                kho.live.open("x", timeout=1, ready=lambda candidate: (_ for _ in ()).throw(RuntimeError()))
            os.kill(old.hear()[0], signal.SIGKILL)
        goes_on(old)


def test_a_path_is_answered_for_if_asked(tmp_path: Path) -> None:
    with kho.live.open("x", "4M", backing=tmp_path / "image", serve=True) as h:
        assert [(row.name, row.transport) for row in census.holdings()] == [("x", "path")]
        with pytest.raises(kho.BusyError, match="another process has 'x' meanwhile"):
            kho.live.open("x", "4M", backing=tmp_path / "other", serve=True)
        assert h.served


# Across exec


STAGES = """
import os, sys, kho.live
n = int(sys.argv[1])
h = kho.live.open("x", "4M")
fds = len(os.listdir("/proc/self/fd"))
print(n, h.transport, h.inherited, h.generation, h.served, fds, "KHO_LIVE_FDS" in os.environ, flush=True)
h.put("n", str(n).encode())
if n == 0:
    try: kho.live.exec([sys.executable])
    except kho.FinalizedError as error: print("refused", flush=True)
h.commit()
if n == 0:
    try: kho.live.exec(["/nonexistent"])
    except FileNotFoundError: print(os.get_inheritable(h.fileno()), flush=True)
if n < 4:
    kho.live.exec([sys.executable, *sys.argv[:0], "-c", os.environ["PROGRAM"], str(n + 1)])
h.release()
"""


def test_an_image_goes_across_exec_again_and_again(here: Path) -> None:
    run = [sys.executable, "-c", STAGES, "0"]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PROGRAM": STAGES})
    assert done.stderr == ""
    first, *others = [line.split() for line in done.stdout.splitlines()]
    assert first[:5] == ["0", "new", "False", "0", "True"]
    assert others[:2] == [["refused"], ["False"]]
    assert [line[:5] for line in others[2:]] == [[str(n), "exec", "True", str(n), "True"] for n in range(1, 5)]
    assert {(line[5], line[6]) for line in others[2:]} == {(first[5], "False")}, "and no descriptor is lost on the way"
    assert list(here.iterdir()) == []


def test_nobody_else_gets_the_name_while_a_process_changes_its_program() -> None:
    program = (
        "import sys, time, kho.live\n"
        "if len(sys.argv) == 1:\n"
        "    h = kho.live.open('x', '4M'); h.put('a', b'1'); h.commit(); print('go', flush=True)\n"
        "    kho.live.exec([sys.executable, '-c', 'import time; time.sleep(0.5)\\n' + sys.orig_argv[2], 'again'])\n"
        "h = kho.live.open('x'); print(h.transport, flush=True); h.handed_over.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as old:
        assert old.stdout is not None
        assert old.stdout.readline() == "go\n"
        time.sleep(0.2)
        with kho.live.open("x", timeout=20) as h:
            assert (h.transport, h.generation) == ("socket", 1)
            assert old.stdout.read() == "exec\n"


@pytest.mark.parametrize("value", ["x", "x:3", "x:a:-:-", "x:3:-:-:-", ":3:-:-", "x:99999999:-:-", "x:3:-:-;y"])
def test_a_variable_that_nobody_wrote_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(inherited.VARIABLE, value)
    with pytest.raises(kho.SourceError, match="is no NAME:FD:LOCK:LISTENER"):
        kho.live.open("x", "4M")


def test_a_descriptor_that_was_closed_on_the_way_is_no_reason_to_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for fds in ("900:-:-", "900:901:-", "0:-:-", "1:-:902"):
        monkeypatch.setenv(inherited.VARIABLE, f"y:5:-:-,x:{fds}")
        with pytest.raises(kho.SourceError, match="must leave its descriptors open"):
            kho.live.open("x", "4M")
    file = os.open("/dev/null", os.O_RDWR)
    monkeypatch.setenv(inherited.VARIABLE, f"x:{file}:-:-")
    with pytest.raises(kho.SourceError, match=f"descriptor {file} is another file"):
        kho.live.open("x", "4M")
    os.close(file)
    with kho.live.open("x", "4M") as h:
        assert h.transport == "new", "it was reported once"


# systemd


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


def test_systemd_keeps_the_image_while_the_service_is_not_there(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    name = "my service: ü"
    try:
        with manager.start(functools.partial(service, name=name)) as first:
            manager.main = first.pid
            assert first.hear() == ["new", 0, []]
            assert manager.hear()["FDNAME"] == inherited.fdname(name) == "kho-live-my%20service%3A%20%C3%BC"
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


def test_what_systemd_passed_to_another_process_is_not_this_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", inherited.fdname("x"))
    for pid in ("1", str(os.getppid()), "", "x"):
        monkeypatch.setenv("LISTEN_PID", pid)
        assert inherited.from_systemd("x") is None
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    for count in ("", "-1", "x", "0"):
        monkeypatch.setenv("LISTEN_FDS", count)
        assert inherited.from_systemd("x") is None


def test_a_notify_socket_that_nobody_reads_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for address in ("", "relative", "/nonexistent", "@nobody-listens", str(tmp_path)):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with kho.live.open("x", "4M") as h:
            assert not h.stored
    assert len(inherited.fdname("x" * 255)) < 256
    assert len(inherited.fdname("ü" * 127)) < 256


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
