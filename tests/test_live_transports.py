"""kho.live: a process takes an image over from a running one, by socket, whichever of the two is killed when."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kho
import kho.live
from kho.live import Candidate
from kho.live.handover import registry, server, sockets, wire

from livefiles import Channel, descriptors, die, filled, forget_left, goes_on, owner, process, service, wait_until

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("sockets")


# Handovers


def test_a_successor_finds_the_image_by_its_name_while_its_owner_runs() -> None:
    with filled() as old:
        assert old.ask("hold", "a") == "held"
        looked = []

        def ready(candidate: Candidate) -> None:
            looked.append((candidate.names(), candidate.verify()))

        with kho.live.open("x", ready=ready) as h:
            assert looked == [(["a"], 3)]
            assert (h.transport, h.inherited, h.generation, bytes(h["a"])) == ("socket", True, 1, b"one")
            assert h.stats()["size"] == 4 * MIB
            assert old.ask("handed over", 5)
            assert old.ask("put", "a", "late")[0] == "NotOwnerError"
            # Memory that the old one shows is not reused before it has ended.
            for i in range(5):
                h.put("a", b"two" * 2000 + bytes([i]))
                h.commit()
            assert old.ask("held", "a") == "one"
            assert h.draining()
            # Pinned once each, after five commits: the object, and the metadata of its generation.
            assert 4096 < h.stats()["pinned_bytes"] < 140 << 10
            old.say("exit")
            assert old.ended() == 0
            assert not h.draining()
            assert h.stats()["pinned_bytes"] == 0
            assert [row.pid for row in registry.holdings()] == [os.getpid()]


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


def test_closing_its_handle_ends_an_old_owners_draining() -> None:
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
            # It was forked before the handover.
            again = old.ask("fork")
            old.kill()
            assert new.draining()
            os.kill(again, signal.SIGKILL)
            wait_until(lambda: not new.draining())
        os.kill(worker, signal.SIGKILL)


def test_a_third_owner_keeps_what_the_first_still_reads() -> None:
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


def test_many_handovers_within_one_process_leak_nothing() -> None:
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
        assert os.fstat(h.fileno()).st_blocks * 512 < before[2] * 512 + (64 << 10)
    h.release()
    assert sockets.connect("x") is None


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


def test_a_successor_waits_for_uncommitted_changes() -> None:
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


def test_changes_wait_while_a_successor_reads_and_then_go_on_or_are_refused() -> None:
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


def test_of_two_concurrent_successors_one_adopts_and_the_other_is_refused() -> None:
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
            assert [row.pid for row in registry.holdings()] == won


def test_two_waiting_successors_adopt_one_after_the_other() -> None:
    def successor_of(line: Channel) -> None:
        line.hear()
        service(line, timeout=20, ready=lambda candidate: time.sleep(0.05))

    with filled() as old, process(successor_of) as one, process(successor_of) as two:
        for line in (one, two):
            line.say("go")
        assert one.hear() == two.hear() == ["socket", 1, ["a"]]
        assert old.ask("handed over", 5)
        wait_until(lambda: one.ask("handed over", 0) != two.ask("handed over", 0))


def test_of_several_processes_that_start_at_once_one_makes_the_image() -> None:
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


# Killed at each step


def dies_at(step: int) -> None:
    """Kill this process at the `step`th call of a handover: before it, or after it."""
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

    for module, name in ((wire, "send"), (wire, "receive"), (sockets, "publish"), (server.Owner, "transfer")):
        setattr(module, name, wrapped(getattr(module, name)))
    candidate: Any = Candidate
    candidate.adopt = wrapped(candidate.adopt)


def test_a_successor_killed_at_any_step_leaves_the_old_owner_or_had_become_the_owner() -> None:
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


def test_an_owner_killed_at_any_step_leaves_its_image_to_its_successor() -> None:
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

        forget_left()
        with process(dying) as old:
            assert old.hear() == ["ready"]
            with kho.live.open("x", "4M", timeout=2) as h:
                outcomes.append((h.transport, h.generation))
                h.put("b", b"x")
                assert h.commit() == h.generation
                h.verify()
                assert [row.pid for row in registry.holdings()] == [os.getpid()]
            with contextlib.suppress(EOFError):
                if old.hear() == ["handed over"]:
                    break
    assert set(outcomes) == {("file", 1), ("socket", 1)}, "what was committed is found, also without its process"
    assert outcomes == sorted(outcomes), "what was never passed on is gone, what was is there"


def test_a_stopped_owner_delays_a_successor_only_until_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = functools.partial(wire.ask, within=0.3)
    monkeypatch.setattr(wire, "ask", lambda conn, message, fds=0, within=0: asked(conn, message, fds=fds))
    with filled() as old:
        os.kill(old.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{old.pid}/task")
        wait_until(lambda: all(" T " in (task / "stat").read_text() for task in tasks.iterdir()))
        with pytest.raises(kho.BusyError, match=rf"process {old.pid} has not answered 'prepare' for 0.3 s"):
            kho.live.open("x")
        assert [row.state for row in registry.holdings()] == ["silent"]
        os.kill(old.pid, signal.SIGCONT)
        wait_until(lambda: [row.state for row in registry.holdings()] == ["serving"])
        goes_on(old)


@pytest.mark.parametrize("stage", ["looks", "adopts"])
def test_a_successor_that_takes_too_long_loses_the_handover(stage: str) -> None:
    def impatient(line: Channel) -> None:
        server.LOOK = server.ADOPT = 0.3
        service(line)

    with process(impatient) as old:
        assert old.hear() == ["new", 0, []]
        conn = sockets.connect("x")
        assert conn is not None
        with conn:
            _, (fd,) = wire.ask(conn, {"do": "prepare", "name": "x", "version": "1"}, fds=1)
            if stage == "adopts":
                assert wire.ask(conn, {"do": "adopt"})[0]["pinned"] == []
            wait_until(lambda: old.ask("phase") != "transferring")
            goes_on(old)
            with pytest.raises(wire.WireError):
                wire.ask(conn, {"do": "adopted"})
        os.close(fd)
        goes_on(old)


def test_the_lock_holder_is_the_owner_whatever_messages_were_lost() -> None:
    def impatient(line: Channel) -> None:
        server.ADOPT = 0.2
        service(line)

    for breaks in (False, True):
        with process(impatient) as old:
            assert old.hear() == ["new", 0, []]
            conn = sockets.connect("x")
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
