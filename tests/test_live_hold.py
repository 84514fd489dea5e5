"""kho hold: memory that stays while its command is restarted; kho ps, kho release, live:NAME."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import kho
import kho.live
from kho import luo
from kho.live.handover import registry
from kho.live.transports import kexec
from kho.live.transports.holder import Holder

from command import kho as run
from fake_luo import CLIENT, FakeLuo, opened
from livefiles import Channel, process, service, wait_until

SERVICE = """
import os, signal, subprocess, sys, time, kho.live
def say(*words): print(*words, file=open(os.environ["LOG"], "a"), flush=True)
h = kho.live.open("held")
n = int(bytes(h["n"])) + 1 if h.inherited else 1
say(n, h.transport, h.generation, *h.names())
h.put("n", str(n).encode()); h.commit()
"""


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the commands say; the runtime directory is empty in the end, and no process is left."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    yield tmp_path / "log"
    assert list(Path("/dev/shm").glob("*held*")) == []
    registry.holdings()
    assert not (tmp_path / "kho").exists() or list((tmp_path / "kho").iterdir()) == []


def arguments(program: str, *options: str) -> list[str]:
    command = [sys.executable, "-c", SERVICE + program]
    return [sys.executable, "-m", "kho", "hold", "held", "--grace", "2", *options, "--", *command]


def held(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Hold a service until it is done."""
    return subprocess.run(arguments(program, *options), capture_output=True, text=True, timeout=60)


@contextmanager
def holding(program: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A holder that runs."""
    with subprocess.Popen(arguments(program, *options), stderr=subprocess.PIPE, text=True) as holder:
        try:
            yield holder
        finally:
            holder.kill()


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def test_a_killed_command_leaves_the_last_committed_generation_to_the_next(log: Path) -> None:
    program = """
h.put("lost", b"x" * 100_000)
if n < 4: os.kill(os.getpid(), signal.SIGKILL)
"""
    done = held(program, "--size", "8M")
    assert done.returncode == 0
    assert lines(log) == ["1 hold 0", "2 hold 1 n", "3 hold 2 n", "4 hold 3 n"]
    assert done.stderr.count("it ended with 137; once more in") == 3


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("", 0)])
def test_the_holders_exit_code_is_the_commands(ends: str, code: int, log: Path) -> None:
    assert held(ends, "--restart", "never").returncode == code
    assert len(lines(log)) == 1


def test_a_holder_gives_up_on_a_command_that_always_fails(log: Path) -> None:
    done = held("sys.exit(3)", "--failures", "3")
    assert done.returncode == 3
    assert len(lines(log)) == 3
    assert "3 times in a row it ended with 3 at once; giving up" in done.stderr


def test_sighup_restarts_and_sigterm_ends_command_and_holder(log: Path) -> None:
    with holding('say("committed"); time.sleep(60)') as holder:
        wait_until(lambda: len(lines(log)) == 2)
        holder.send_signal(signal.SIGHUP)
        wait_until(lambda: len(lines(log)) == 4)
        assert lines(log)[2] == "2 hold 1 n"
        holder.send_signal(signal.SIGTERM)
        assert holder.wait(20) == 143


def test_a_command_may_end_in_its_own_way_and_is_killed_if_it_does_not_end(log: Path) -> None:
    polite = "signal.signal(15, lambda *_: sys.exit(5)); say('ready'); time.sleep(60)"
    stubborn = "signal.signal(15, signal.SIG_IGN); say('ready'); time.sleep(60)"
    for program, code in ((polite, 5), (stubborn, 137)):
        log.unlink(missing_ok=True)
        with holding(program, "--grace", "0.3") as holder:
            wait_until(lambda: "ready" in lines(log))
            holder.send_signal(signal.SIGTERM)
            assert holder.wait(20) == code


def test_descendants_of_a_command_are_ended_before_the_next_one_starts(log: Path) -> None:
    program = """
if n == 1:
    left = subprocess.Popen(["sleep", "60"])
    say("left", left.pid)
    os.kill(os.getpid(), 9)
"""
    assert held(program).returncode == 0
    pid = int(lines(log)[1].split()[1])
    assert not Path(f"/proc/{pid}").exists(), "neither running nor a zombie"
    assert lines(log)[2] == "2 hold 1 n"


def test_a_killed_holder_takes_its_command_with_it(log: Path) -> None:
    with holding("say('pid', os.getpid()); time.sleep(60)") as holder:
        wait_until(lambda: len(lines(log)) == 2)
        pid = int(lines(log)[1].split()[1])
        holder.kill()
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def test_a_command_without_its_descriptors_finds_the_memory_by_the_socket(log: Path) -> None:
    again = "subprocess.run([sys.executable, '-c', sys.orig_argv[2], 'again'], close_fds=True, check=True)"
    program = f"""
if len(sys.argv) == 1:
    h.close()
    {again}
"""
    assert held(program).returncode == 0
    assert lines(log) == ["1 hold 0", "2 hold 1 n"]


def test_ps_inspect_and_release_work_on_a_held_image(log: Path) -> None:
    with holding("time.sleep(60)", "--size", "8M") as holder:
        wait_until(lambda: any(row.generation == 1 for row in registry.holdings()))
        (row,) = run("ps", "--json").json["images"]
        assert (row["name"], row["pid"], row["state"], row["objects"]) == ("held", holder.pid, "serving", 1)
        assert (row["size"], row["transport"], row["uid"]) == (8 << 20, "hold", os.geteuid())
        assert row["child"] not in (None, holder.pid)
        assert "held" in run("ps").out
        for command in ("inspect", "verify", "map", "owners"):
            assert run(command, "live:held").code == 0
        assert "generation 1 of held" in run("inspect", "live:held").out
        taken = held("")
        assert taken.returncode == 2
        assert "another process has 'held' now" in taken.stderr
        refused = run("release", "held", "--yes")
        assert (refused.code, "say --force" in refused.err) == (1, True)
        assert run("release", "held").code == 2, "the command asks a terminal, and there is none"
        assert run("release", "held", "--yes", "--force").code == 0
        assert holder.wait(20) == 143
    assert run("release", "held", "--yes").code == 2
    assert run("ps", "--json").json == {"schema": "kho-ps-1", "images": []}


def test_a_service_that_owns_its_image_is_released_only_by_force() -> None:
    with process(service) as old:
        assert old.hear() == ["new", 0, []]
        old.ask("put", "a", "one")
        old.ask("commit")
        assert run("release", "x", "--yes").code == 1
        assert old.ask("get", "a") == "one"
        done = run("release", "x", "--yes", "--force", "--json")
        assert done.code == 0
        assert json.loads(done.out)["freed"] > 4096
        assert old.ask("put", "b", "two")[0] == "NotOwnerError"


def test_an_image_in_a_file_is_released_when_no_process_owns_it(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with kho.live.open("x", "4M", backing=path):
        assert run("release", path, "--yes").code == 1
        assert path.exists()
    assert run("release", path, "--yes").code == 0
    assert not path.exists()
    assert run("release", path, "--yes").code == 2


def test_images_of_no_running_process_are_not_found() -> None:
    with pytest.raises(kho.NotFoundError, match="no process has 'nope'"):
        kho.open("live:nope")
    assert run("inspect", "live:nope").code == 2
    assert run("hold", "x", "--", "/nonexistent").code == 2
    assert run("hold", "x", "--size", "1", "--", "true").code == 2


def test_a_holder_asks_the_kernel_first(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeLuo(tmp_path / "liveupdate") as machine:
        monkeypatch.setattr(kexec, "machine", kexec.Machine(machine.path, CLIENT))
        with kho.live.open("held", "4M", kexec=True) as h:
            h.put("n", b"6")
            h.commit()
            machine.kexec()
        command = [sys.executable, "-c", SERVICE + "if n < 9: os.kill(os.getpid(), signal.SIGKILL)"]
        said: list[str] = []
        with process(lambda line: line.say(Holder("held", command, size=1 << 20, log=said.append).run(), said)) as line:
            code, told = line.hear()
        assert code == 0
        assert told[0] == "kho hold: held: memory of the last kernel"
        assert lines(log) == ["7 hold 1 n", "8 hold 2 n", "9 hold 3 n"]
        assert (machine.incoming(), machine.outgoing()) == ({}, {}), "finished: the command can preserve it"


def test_a_holder_does_not_hide_that_the_kernel_was_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Path
) -> None:
    said: list[str] = []

    def run_one(line: Channel) -> None:
        line.say(Holder("held", ["true"], log=said.append).run(), said)

    with process(run_one) as line:
        assert line.hear() == [0, []], "no device: nothing to say"
    with FakeLuo(tmp_path / "liveupdate") as machine:
        monkeypatch.setattr(kexec, "machine", kexec.Machine(machine.path, CLIENT))
        with process(run_one) as line:
            assert line.hear() == [0, []], "asked, and there is none"
        with opened(machine) as device:
            device.create_session("kho-live/held").detach()
            machine.kexec()
        with opened(machine) as device:
            other = device.retrieve_session("kho-live/held")
        with other, process(run_one) as line:
            assert line.ended() == 1, "another process is taking it over: BusyError"
        monkeypatch.setattr(luo, "available", lambda path=None: f"{path}: this user may not open it")
        with process(run_one) as line:
            code, told = line.hear()
        assert (code, len(told)) == (0, 1)
        assert "was not asked for memory of the last one" in told[0]
        assert "this user may not open it" in told[0]
