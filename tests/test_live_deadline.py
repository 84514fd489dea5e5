"""kho.live: `open` ends half a second after its timeout at the latest, wherever another process has stopped."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import kho
import kho.live
from kho import luo
from kho.live import Handle
from kho.live.deadline import GRACE, Deadline
from kho.live.handover import server, sockets, wire
from kho.live.transports import kexec

from livefiles import Channel, filled, goes_on, process, service, wait_until

pytestmark = pytest.mark.usefixtures("sockets")

LATE = 0.5
TIMEOUTS = (0.0, 0.2)


def stopped(pid: int) -> bool:
    """Whether every thread of a process has stopped, or it has ended."""
    with contextlib.suppress(OSError):
        states = [(task / "stat").read_text().rpartition(")")[2] for task in Path(f"/proc/{pid}/task").iterdir()]
        return all(state.split()[0] in "TZ" for state in states)
    return False


def stops(pid: int) -> bool:
    """Whether a process stops within moments."""
    until = time.monotonic() + 0.3
    while not (found := stopped(pid)) and time.monotonic() < until:
        time.sleep(0.01)
    return found


def stops_at(step: int) -> None:
    """Stop this process (SIGSTOP) at the `step`th call of a handover: before it, or after it."""
    calls = itertools.count()

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGSTOP)
            result = function(*args, **kwargs)
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGSTOP)
            return result

        return call

    for place, name in (
        (wire, "send"),
        (wire, "receive"),
        (wire, "peer"),
        (sockets, "_lock"),
        (server.Owner, "prepare"),
        (server.Owner, "transfer"),
        (Handle, "_begin_transfer"),
        (Handle, "_release_to_successor"),
        (Handle, "_end_transfer"),
    ):
        setattr(place, name, wrapped(getattr(place, name)))


def waited_for_cpu() -> float:
    """Return the seconds that this thread was ready and another ran: the machine's load, not a wait of the call's."""
    return int(Path("/proc/thread-self/schedstat").read_text("ascii").split()[1]) / 1e9


def in_time(timeout: float, work: Callable[[], object]) -> object:
    """Make a call that has a timeout, and check that it ends in time; returns its result, or the error."""
    began = time.monotonic() - waited_for_cpu()
    try:
        return work()
    except kho.KhoError as error:
        return error
    finally:
        took = time.monotonic() - waited_for_cpu() - began
        assert took < timeout + LATE, f"{took:.2f} s with timeout={timeout}"


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """Stop a process for the `with` block."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: stopped(pid))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def locked_directory() -> Iterator[int]:
    """A process that has stopped while it had the runtime directory's lock."""

    def holder(line: Channel) -> None:
        fd = os.open(sockets.folder(), os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        line.say("locked")
        signal.pause()

    kho.live.open("other", "1M").close()
    with process(holder) as other:
        assert other.hear() == ["locked"]
        with halted(other.pid):
            yield other.pid


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_an_owner_that_stops_at_any_step_delays_no_open(timeout: float) -> None:
    reached = []
    for step in range(100):

        def stopping(line: Channel, step: int = step) -> None:
            h = kho.live.open("x", "4M")
            h.put("a", b"one")
            h.commit()
            stops_at(step)
            line.say("ready")
            h.handed_over.wait()
            line.say("handed over")
            signal.pause()

        with process(stopping) as old:
            assert old.hear() == ["ready"]
            got = in_time(timeout, lambda: kho.live.open("x", "4M", timeout=timeout))
            has_stopped = stops(old.pid)
            os.kill(old.pid, signal.SIGCONT)
            if isinstance(got, Handle):
                # The lock holder is the owner; the previous one notices when it continues.
                assert (got.transport, bytes(got["a"])) == ("socket", b"one")
                assert old.hear() == ["handed over"]
                got.close()
            else:
                assert isinstance(got, kho.BusyError), got
                with kho.live.open("x", "4M", timeout=20) as h:
                    assert (h.transport, bytes(h["a"])) == ("socket", b"one")
            reached.append(has_stopped)
        if not has_stopped:
            break
    assert sum(reached) > 15
    assert len(reached) < 99


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_process_that_stopped_with_the_directorys_lock_delays_no_open(timeout: float, tmp_path: Path) -> None:
    with filled() as old, locked_directory() as pid:
        ways: list[dict[str, Any]] = [{}, {"backing": tmp_path / "image", "serve": True}, {"serve": True}]
        for options in ways:
            got = in_time(timeout, partial(kho.live.open, "new", "1M", timeout=timeout, **options))
            assert isinstance(got, kho.BusyError)
            assert f"process {pid}, which is stopped, has it locked" in str(got)
        got = in_time(timeout, lambda: kho.live.open("x", "1M", timeout=timeout))
        assert isinstance(got, kho.BusyError)
        assert old.ask("handed over", 0) is False
    with kho.live.open("new", "1M", timeout=5) as h:
        assert h.transport == "new"


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_stopped_owner_of_a_path_delays_no_open(timeout: float, tmp_path: Path) -> None:
    path = tmp_path / "image"
    with process(lambda line: service(line, backing=path)) as old:
        assert old.hear()[0] == "path"
        with halted(old.pid):
            for serve in (None, True):
                got = in_time(timeout, partial(kho.live.open, "x", backing=path, timeout=timeout, serve=serve))
                assert isinstance(got, kho.BusyError)


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_stopped_successor_delays_no_other(timeout: float) -> None:
    def looks(line: Channel) -> None:
        def ready(candidate: object) -> None:
            line.say("looks")
            signal.pause()

        kho.live.open("x", ready=ready)

    with filled() as old, process(looks) as one:
        assert one.hear() == ["looks"]
        with halted(one.pid):
            assert isinstance(in_time(timeout, lambda: kho.live.open("x", timeout=timeout)), kho.BusyError)
        one.kill()
        goes_on_soon(old)


def goes_on_soon(old: Channel) -> None:
    """The old one is the owner again when it has noticed."""
    wait_until(lambda: old.ask("phase") != "transferring")
    goes_on(old)


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_stopped_holder_delays_no_open(timeout: float) -> None:
    from kho.live.transports.holder import Holder

    def holds(line: Channel) -> None:
        holder = Holder("x", ["/bin/sleep", "60"])
        line.say("holds")
        holder.run()

    with process(holds) as holder:
        assert holder.hear() == ["holds"]
        wait_until((sockets.folder() / "x.sock").exists)
        with halted(holder.pid):
            assert isinstance(in_time(timeout, lambda: kho.live.open("x", timeout=timeout)), kho.BusyError)
        os.kill(holder.pid, signal.SIGTERM)
        holder.ended()


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_service_manager_that_has_stopped_delays_no_open(
    timeout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    full = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            full.sendto(b"x", str(tmp_path / "notify"))
    got = in_time(timeout, lambda: kho.live.open("x", "1M", timeout=timeout))
    assert isinstance(got, Handle)
    assert not got.stored
    monkeypatch.delenv("NOTIFY_SOCKET")
    got.close()
    manager.close()
    full.close()


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_device_that_others_have_open_delays_no_open(timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> None:
        raise kho.LuoBusyError(16, "another process has it open")

    monkeypatch.setattr(luo, "Device", busy)
    monkeypatch.setattr(kexec, "check", lambda: None)
    got = in_time(timeout, lambda: kho.live.open("x", "1M", timeout=timeout, kexec=True))
    assert isinstance(got, kho.LuoBusyError)


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_thread_that_asks_the_kernel_delays_no_other(timeout: float) -> None:
    with kexec._lock:
        got = in_time(timeout, lambda: kho.live.open("x", "1M", timeout=timeout))
    assert isinstance(got, kho.BusyError)


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_process_that_stopped_while_it_filled_an_image_delays_no_open(timeout: float, tmp_path: Path) -> None:
    from kho.live import safetensors as cache

    save_file({"a": np.ones(1000, "f4")}, tmp_path / "m.safetensors")

    def fills(line: Channel) -> None:
        def read(*_: Any) -> None:
            line.say("reads")
            os.kill(os.getpid(), signal.SIGSTOP)

        setattr(cache, "_read", read)  # noqa: B010 - mypy knows it as a function
        cache.load(tmp_path / "m.safetensors", backing=tmp_path / "image")

    with process(fills) as other:
        assert other.hear() == ["reads"]
        wait_until(lambda: stopped(other.pid))
        load = lambda: cache.load(tmp_path / "m.safetensors", backing=tmp_path / "image", timeout=timeout)  # noqa: E731
        assert isinstance(in_time(timeout, load), kho.BusyError)


def test_open_waits_at_a_full_queue_until_the_timeout() -> None:
    with filled() as old, contextlib.ExitStack() as stack:
        with halted(old.pid), contextlib.suppress(kho.BusyError):
            while (conn := sockets.connect("x")) is not None:
                stack.enter_context(conn)
            raise AssertionError("its queue has no end")
        os.kill(old.pid, signal.SIGSTOP)
        wait_until(lambda: stopped(old.pid))
        for timeout in TIMEOUTS:
            assert isinstance(in_time(timeout, partial(kho.live.open, "x", timeout=timeout)), kho.BusyError)
        os.kill(old.pid, signal.SIGCONT)
        stack.close()
        with kho.live.open("x", timeout=20) as h:
            assert bytes(h["a"]) == b"one"


# Time that does not count as waiting


def test_the_time_that_ready_takes_is_not_counted() -> None:
    with filled() as old, kho.live.open("x", timeout=0, ready=lambda c: time.sleep(GRACE + LATE)) as h:
        assert bytes(h["a"]) == b"one"
        assert old.ask("handed over", 5)


def test_without_a_timeout_open_waits_for_the_owner_without_limit(tmp_path: Path) -> None:
    with process(lambda line: service(line, backing=tmp_path / "image")) as old:
        assert old.hear()[0] == "path"
        old.say("exit")
        with kho.live.open("x", backing=tmp_path / "image", timeout=None) as h:
            assert not h.inherited


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan])
def test_a_timeout_is_a_number_of_seconds(timeout: float, tmp_path: Path) -> None:
    with pytest.raises(kho.ParameterError, match="or None to wait as long as it takes"):
        kho.live.open("x", "1M", backing=tmp_path / "image", timeout=timeout)


def test_all_waits_together_are_charged_to_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    for timeout in (0.0, 2.0, 7.5):
        began, deadline = now[0], Deadline(timeout)
        while deadline.sleep(0.01):
            pass
        assert now[0] - began == pytest.approx(timeout + GRACE, abs=0.02)
        with deadline.wait() as seconds:
            assert seconds < 1e-3
        assert deadline.left() == 0
        # Work does not count as waiting.
        other = Deadline(timeout)
        now[0] += timeout + 100
        with other.wait() as seconds:
            assert seconds == GRACE
            now[0] += GRACE / 2
        with other.wait() as seconds:
            assert seconds == pytest.approx(GRACE / 2)
        third = Deadline(timeout)
        with third.suspended():
            now[0] += 50
        assert third.left() == pytest.approx(timeout)
    assert Deadline(None).left() > 1e5
    assert Deadline(math.inf).left() > 1e5
