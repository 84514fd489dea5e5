"""The examples, with real servers over loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from livefiles import SHM, folder

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
FASTAPI = EXAMPLES / "fastapi_index"
SMALL = {"INDEX_BYTES": "64M", "DRAIN_SECONDS": "2", "PORT": "0", "OPENBLAS_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not here")


def wait_for(what: Any, seconds: float = 20) -> None:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


class Supervised:
    """A supervisor, and what it says."""

    def __init__(self, *command: str, **env: str) -> None:
        args = [sys.executable, str(FASTAPI / "run.py"), "--", *(command or (sys.executable, str(FASTAPI / "app.py")))]
        self.process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=os.environ | SMALL | env)
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def said(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until it has printed a line that many times; return the last line."""
        wait_for(lambda: sum(bool(re.search(pattern, line)) for line in self.lines) >= times)
        return [found for line in self.lines if (found := re.search(pattern, line))][times - 1]

    @property
    def port(self) -> int:
        return int(self.said(r"listening on (\d+)")[1])

    def end(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self._thread.join(20)
            assert self.process.stdout is not None
            self.process.stdout.close()


@contextmanager
def supervised(*command: str, **env: str) -> Iterator[Supervised]:
    made = Supervised(*command, **env)
    try:
        yield made
    finally:
        made.end()


class Client(threading.Thread):
    """Asks all the time, over connections that are kept alive, and tries nothing twice."""

    def __init__(self, port: int, seed: int) -> None:
        super().__init__()
        self.url = f"http://127.0.0.1:{port}/search/"
        self.seed = seed
        self.pids: list[int] = []
        self.failures: list[str] = []
        self.stopped = False
        self.start()

    def run(self) -> None:
        with httpx.Client(timeout=20) as http:
            number = self.seed
            while not self.stopped:
                number = number * 1103515245 % (1 << 31) + 1
                try:
                    answer = http.get(f"{self.url}{number}").raise_for_status().json()
                    assert answer["hits"][0] == answer["query"] == number % 65536
                    self.pids.append(answer["pid"])
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(repr(error))

    def stop(self) -> None:
        self.stopped = True
        self.join(30)


def left() -> set[str]:
    """What is in /dev/shm of these."""
    return {path.name for path in SHM.iterdir() if "index" in path.name} if SHM.is_dir() else set()


def test_a_service_is_replaced_under_load_and_no_request_fails() -> None:
    before = left()
    with supervised() as service:
        first = int(service.said(r"service (\d+) is ready .* made the index")[1])
        clients = [Client(service.port, seed) for seed in (1, 2, 3)]
        pids = [first]
        for turn in (1, 2):
            wait_for(lambda: all(client.pids and client.pids[-1] == pids[-1] for client in clients))
            service.process.send_signal(signal.SIGHUP)
            found = service.said(r"service (\d+) is ready .* found the index in (\S+) ms", turn)
            pids.append(int(found[1]))
            wait_for(lambda: all(client.pids[-1] == pids[-1] for client in clients))
        for client in clients:
            client.stop()
        assert [client.failures for client in clients] == [[], [], []]
        assert {pid for client in clients for pid in client.pids} == set(pids)
        assert service.end() == 0
    assert left() == before


def test_a_service_that_is_killed_is_there_again_with_its_index() -> None:
    with supervised() as service:
        first = int(service.said(r"service (\d+) is ready .* made the index")[1])
        url = f"http://127.0.0.1:{service.port}/search/77"
        hits = httpx.get(url).json()["hits"]
        os.kill(first, signal.SIGKILL)
        again = httpx.get(url, timeout=20).json()  # the connection waits in the socket
        assert again["pid"] != first
        assert (again["hits"], again["hits"][0]) == (hits, 77)
        service.said("found the index")


def test_a_successor_that_does_not_come_up_leaves_the_old_one_serving(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    program = (
        f"import os, runpy, sys; os.path.exists({str(broken)!r}) and sys.exit(7); "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    with supervised(sys.executable, "-c", program, str(FASTAPI / "app.py")) as service:
        first = int(service.said(r"service (\d+) is ready")[1])
        broken.touch()
        service.process.send_signal(signal.SIGHUP)
        service.said("did not come up: exit code 7")
        assert httpx.get(f"http://127.0.0.1:{service.port}/search/5").json()["pid"] == first


def test_pre_forked_workers_share_one_image_and_find_it_after_a_restart() -> None:
    with folder() as here:
        for life in (0, 1):
            answers = asked(here, life)
            assert {answer["sum"] for answer in answers} == {120.0}
            assert {(answer["inherited"], answer["generation"]) for answer in answers} == {(life > 0, 1)}
            assert len({answer["at"] for answer in answers}) == 1, "mapped once, before the fork"
            assert len({answer["worker"] for answer in answers}) == 2
        assert [path.name for path in here.iterdir() if path.name != "gunicorn.log"] == ["table"]


def asked(here: Path, life: int) -> list[dict[str, Any]]:
    """Start gunicorn with two workers, ask until both have answered, and end it."""
    log = here / "gunicorn.log"
    log.write_text("")
    args = [
        "--preload",
        "-w",
        "2",
        "-b",
        "127.0.0.1:0",
        "--no-control-socket",
        "--graceful-timeout",
        "5",
        "gunicorn_prefork:app",
    ]
    with log.open("w") as file:
        master = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *args],
            cwd=EXAMPLES,
            env=os.environ | {"IMAGE": str(here / "table")},
            stderr=file,
        )
    try:
        wait_for(lambda: re.search(r"Listening at: (\S+)", log.read_text()) or master.poll() is not None)
        (url,) = re.findall(r"Listening at: (\S+)", log.read_text())
        answers: list[dict[str, Any]] = []

        def both() -> bool:
            answers.append(httpx.get(f"{url}/{len(answers)}", timeout=20).json())
            return len({answer["worker"] for answer in answers}) == 2

        wait_for(both)
        return answers
    finally:
        master.terminate()
        assert master.wait(20) == 0, log.read_text()


def test_weights_are_read_and_then_attached(tmp_path: Path) -> None:
    save_file({"w": np.ones((100, 10), "f4"), "b": np.zeros(3, "f2")}, tmp_path / "m.safetensors")

    def run(*args: str) -> str:
        command = [sys.executable, str(EXAMPLES / "weights.py"), *args, str(tmp_path / "m.safetensors")]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    try:
        assert run().startswith("read 2 tensors, 4006 bytes")
        assert run().startswith("attached 2 tensors, 4006 bytes")
        assert "w: F32 100 10" in run()
    finally:
        run("--release")


def test_the_load_test_counts_no_failure_of_a_service_that_is_replaced() -> None:
    env = os.environ | SMALL | {"LOAD_SECONDS": "0.3", "DRAIN_SECONDS": "1", "INDEX_BYTES": "8M"}
    command = [sys.executable, str(ROOT / "benches" / "live_load.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    rows = {row["way"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == ["kho.live, replaced", "np.load, replaced", "kho.live, killed", "np.load, killed"]
    assert rows["kho.live, replaced"]["failures"] == 0
    assert all(row["requests"] > 20 and row["p50_ms"] <= row["p99_ms"] <= row["max_ms"] for row in rows.values())
