"""Images for the tests of kho.live: paths, contents, and child processes that serve one, change it and are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import kho
import kho.live
from kho.live import Candidate, Handle
from kho.live.handover import kept, registry

SHM = Path("/dev/shm")
DTYPES = ["|b1", "|u1", "<i2", "<f4", "<c16", "<M8[ns]", "|S3", "<U2", ">i4"]


@contextmanager
def folder() -> Iterator[Path]:
    """A directory on tmpfs, if there is one."""
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None, prefix="kho-test-") as name:
        yield Path(name)


def contents(reader: Candidate | Handle) -> dict[str, Any]:
    """Every object by name, as something that can be compared."""
    return {name: (info_of(reader, name), np.asarray(reader[name]).tobytes()) for name in reader.names()}


def info_of(reader: Candidate | Handle, name: str) -> tuple[str | None, tuple[int, ...]]:
    """Dtype and shape."""
    item = reader.info(name)
    return item.dtype, item.shape


def sample(seed: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that say which they are."""
    return ((np.arange(nbytes, dtype=np.uint64) * 2654435761 + seed * 40503) >> 13).astype(np.uint8)


def describe(made: dict[str, tuple[int, int]], generation: int) -> bytes:
    """What the object `state` holds: the generation it was committed in, and seed and size of every other object."""
    return json.dumps({"generation": generation, "made": made}).encode()


def check_described(reader: Candidate | Handle) -> dict[str, tuple[int, int]]:
    """Compare an image with what its object `state` says; seed and size of every object."""
    assert reader.verify() >= 0
    if reader.generation == 0:
        assert reader.names() == []
        return {}
    state = json.loads(bytes(np.asarray(reader["state"])))
    assert state["generation"] == reader.generation
    made = {name: (seed, size) for name, (seed, size) in state["made"].items()}
    assert sorted(reader.names()) == sorted([*made, "state"])
    for name, (seed, size) in made.items():
        assert np.array_equal(np.asarray(reader[name]), sample(seed, size)), name
    return made


def child(work: Callable[[], object]) -> int:
    """Fork a process that does something and exits: with 0, or 1 if that raised; its pid."""
    pid = os.fork()
    if not pid:
        _in_child(work)
    return pid


def _in_child(work: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a child: its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    """Kill this process (SIGKILL)."""
    os.kill(os.getpid(), signal.SIGKILL)


def descriptors() -> Counter[str]:
    """Count this process's open descriptors by the file they lead to.

    Compare with `<=`: descriptors in reference cycles, as in earlier tests' tracebacks, may be closed at any time. A
    `FakeLuo` is a thread of this process: ask it for its sessions first, so that it has closed the unused ones.
    """
    held: Counter[str] = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            held[str(fd.readlink()).partition(":[")[0]] += 1
    return held


def restore(path: Path, content: bytes) -> None:
    """Write a file with holes where there are zeros, as it was before it was read."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), 4096):
            page = content[at : at + 4096]
            if any(page):
                os.pwrite(file.fileno(), page, at)


def blocks(path: Path) -> int:
    """Bytes a file takes."""
    return path.stat().st_blocks * 512


class Channel:
    """One end of a line to another process: JSON objects, one per packet."""

    def __init__(self, conn: socket.socket, pid: int = 0) -> None:
        self._conn = conn
        self.pid = pid
        conn.settimeout(30)

    def say(self, *words: Any) -> None:
        """Send."""
        self._conn.send(json.dumps(words).encode())

    def hear(self) -> Any:
        """Receive."""
        raw = self._conn.recv(1 << 16)
        if not raw:
            raise EOFError
        return json.loads(raw)

    def ask(self, *words: Any) -> Any:
        """Send, and receive the answer, a single word."""
        self.say(*words)
        (answer,) = self.hear()
        return answer

    def kill(self) -> None:
        """End the process there, without a chance to tidy up."""
        os.kill(self.pid, signal.SIGKILL)
        self.ended()

    def ended(self) -> int:
        """Wait for the process there: its exit code, negative for a signal."""
        pid, self.pid = self.pid, 0
        return ended(pid)


@contextmanager
def process(work: Callable[[Channel], object]) -> Iterator[Channel]:
    """Fork a process that does something; it is killed in the end."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run() -> None:
        here.close()
        work(Channel(there))

    pid = child(run)
    there.close()
    channel = Channel(here, pid)
    try:
        yield channel
    finally:
        if channel.pid:
            channel.kill()
        here.close()


def service(line: Channel, name: str = "x", **options: Any) -> None:
    """Open an image, report the result, and execute requests: any method of the handle, by name."""
    held: dict[str, Any] = {}
    try:
        h = kho.live.open(name, "4M", **options)
    except kho.KhoError as error:
        line.say(type(error).__name__, str(error))
        return
    line.say(h.transport, h.generation, h.names())
    while True:
        try:
            what, *rest = line.hear()
        except EOFError:
            return
        try:
            if what == "put":
                h.put(rest[0], rest[1].encode())
                answer: Any = "put"
            elif what == "hold":
                held[rest[0]] = h[rest[0]]
                answer = "held"
            elif what == "held":
                answer = bytes(held[rest[0]]).decode(errors="replace")
            elif what == "get":
                answer = bytes(h[rest[0]]).decode(errors="replace")
            elif what == "phase":
                answer = h._ownership.phase
            elif what == "handed over":
                answer = h.handed_over.wait(rest[0])
            elif what == "fork":
                answer = child(signal.pause)
            elif what == "exit":
                return
            else:
                found = getattr(h, what)
                answer = found(*rest) if callable(found) else found
        except kho.KhoError as error:
            answer = [type(error).__name__, str(error)]
        line.say(answer)


def owner(**options: Any) -> AbstractContextManager[Channel]:
    """A process that opens the image `x`."""
    return process(partial(service, **options))


def forget_left() -> None:
    """Remove the images that ended processes have left, as for the first start of a service."""
    for path, _ in kept.left():
        path.unlink()


@contextmanager
def filled(**options: Any) -> Iterator[Channel]:
    """A process that has made `x`, with an object `a` in it."""
    forget_left()
    with owner(**options) as old:
        assert old.hear() == ["new", 0, []]
        assert old.ask("put", "a", "one") == "put"
        assert old.ask("commit") == 1
        yield old


def goes_on(old: Channel) -> None:
    """Check that the old process is the owner, and found by its name."""
    generation = old.ask("generation")
    assert old.ask("put", "b", "two") == "put"
    assert old.ask("commit") == generation + 1
    assert [(row.name, row.pid, row.state) for row in registry.holdings()] == [("x", old.pid, "serving")]


def wait_until(true: Callable[[], object], within: float = 20) -> None:
    """Poll until a condition is true."""
    until = time.monotonic() + within
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
