"""kho.live: a process that is killed at any moment leaves its successor a whole generation."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import kho
import kho.live
from kho.live import Handle

from livefiles import blocks, check_described, child, describe, descriptors, die, ended, folder, restore, sample

HERE = str(Path(kho.live.__file__).parent)


def change(h: Handle, made: dict[str, tuple[int, int]], chance: random.Random) -> None:
    """Put, edit or delete a few objects; `made` says what there is then."""
    for _ in range(chance.randint(1, 4)):
        name = f"o{chance.randrange(6)}"
        seed, size = chance.randrange(1 << 20), chance.randrange(20_000)
        kind = chance.random()
        if kind < 0.2 and name in made:
            del h[name]
            del made[name]
            continue
        if kind < 0.5:
            h.put(name, sample(seed, size))
        elif kind < 0.6 and name in made:
            size = made[name][1]
            h.edit(name)[:] = sample(seed, size)
        else:
            h.empty(name, size)[:] = sample(seed, size)
        made[name] = (seed, size)


def service(path: Path, said: memoryview, seed: int) -> None:
    """Take an image over and commit until killed; say which generation was committed, and that it was taken over."""
    chance = random.Random(seed)
    h = kho.live.open("x", "1M", backing=path)
    made = check_described(h)
    said[1] = 1
    while True:
        change(h, made, chance)
        h.put("state", describe(made, h.generation + 1))
        said[0] = h.commit()


def test_a_kill_at_500_random_moments_loses_nothing_that_was_committed() -> None:
    chance = random.Random(6)
    # Words with one store each: `struct` would store zeros first, and could be killed in between.
    said = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    with folder() as here:
        path = here / "image"
        kho.live.open("x", "1M", backing=path).close()
        files, open_files = sorted(here.iterdir()), descriptors()
        dropped = most = last = 0
        seen = set()
        for _ in range(500):
            said[1] = 0
            pid = child(lambda: service(path, said, chance.randrange(1 << 30)))
            # One in five may be killed before it has taken over, the others some time after a commit or two.
            early, commits = chance.random() < 0.2, said[0] + chance.randrange(3)
            while not early and (not said[1] or said[0] < commits):
                time.sleep(0.0002)
            time.sleep(chance.random() * 0.006)
            os.kill(pid, signal.SIGKILL)
            assert ended(pid) == -signal.SIGKILL
            with kho.live.open("x", "1M", backing=path) as h:
                assert said[0] <= h.generation <= said[0] + 1
                said[0] = h.generation
                last = h.generation
                check_described(h)
                dropped += bool(h.dropped)
                seen.add(h.generation)
                stats = h.stats()
                most = max(most, blocks(path) - stats["object_bytes"] - stats["metadata_bytes"])
        assert last > 300, "it came to commit now and then"
        assert dropped > 50, "and was killed between two commits"
        assert len(seen) > 50
        # Beyond objects and metadata: the head, and the rest of each object's last page.
        assert most < (80 << 10) + 7 * 4096
        assert (sorted(here.iterdir()), descriptors()) == (files, open_files)
        with kho.live.open("x", "1M", backing=path) as h:
            h.release()
        assert sorted(here.iterdir()) == []


CRITICAL = {
    "commit",
    "_store",
    "_committed",
    "_flush_head",
    "write_root",
    "retire",
    "_free",
    "_keep",
    "punch",
    "update",
    "_fill",
}


def killed_at(point: int, every: int = 9) -> None:
    """Have this process killed at its `point`th line of what commits, and of all `every`th lines of kho.live."""
    left = point
    others = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left, others
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        if event == "line":
            others += 1
            if frame.f_code.co_name in CRITICAL or others % every == 0:
                left -= 1
            if left < 0:
                die()
        return trace

    sys.settrace(trace)


def test_a_kill_at_any_line_of_a_commit_leaves_the_old_or_the_new_generation() -> None:
    with folder() as here:
        path = here / "image"
        begin = {"a": (1, 5000), "b": (2, 9000), "c": (3, 100)}
        end = {"b": (4, 3000), "c": (3, 100), "d": (5, 7000)}
        with kho.live.open("x", "1M", backing=path) as h:
            for name, (seed, size) in begin.items():
                h.put(name, sample(seed, size))
            h.put("state", describe(begin, 1))
            h.commit()
        original = path.read_bytes()

        def work(line: int) -> None:
            h = kho.live.open("x", "1M", backing=path)
            killed_at(line, every=25)
            del h["a"]
            h.put("b", sample(4, 3000))
            h.empty("d", 7000)[:] = sample(5, 7000)
            h.put("state", describe(end, 2))
            h.commit()
            sys.settrace(None)

        generations, torn, dropped, status = [], 0, set(), 1
        for line in range(5000):
            restore(path, original)
            status = ended(child(lambda line=line: work(line)))  # type: ignore[misc]
            if status == 0:
                break
            assert status == -signal.SIGKILL
            with kho.live.open("x", "1M", backing=path) as h:
                assert check_described(h) == (begin if h.generation == 1 else end)
                generations.append(h.generation)
                torn += h.torn == 2
                dropped.add(h.dropped)
                assert h.generation == 1 or not h.dropped
                stats = h.stats()
                assert blocks(path) < stats["object_bytes"] + stats["metadata_bytes"] + (80 << 10) + 5 * 4096
        assert status == 0
        assert generations == sorted(generations)
        assert set(generations) == {1, 2}
        assert torn >= 1, "the slot was written, and not yet the word"
        names = ("a", "b", "d", "state")
        assert dropped == {names[:n] for n in range(5)}


def test_a_kill_while_an_image_is_made_leaves_none() -> None:
    with folder() as here:
        path = here / "image"
        fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

        def work(line: int, backing: Path | int) -> None:
            killed_at(line)
            kho.live.open("x", "1M", backing=backing)
            sys.settrace(None)

        for backing in (path, fd):
            for line in range(2000):
                status = ended(child(lambda line=line, backing=backing: work(line, backing)))  # type: ignore[misc]
                if status == 0 or path.exists():
                    break
                assert list(here.iterdir()) == []
            assert line > 30
            with kho.live.open("x", "1M", backing=backing) as h:
                assert h.generation == 0
                h.release()
        os.close(fd)


class Service(RuleBasedStateMachine):
    """An image against a dict: what is committed, and what its owner sees."""

    names = st.sampled_from(["a", "b", "c", "ü", "long" * 20])
    sizes = st.one_of(st.integers(0, 9000), st.just(4096), st.integers(40_000, 140_000))

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.path = self.stack.enter_context(folder()) / "image"
        self.committed: dict[str, bytes] = {}
        self.current: dict[str, bytes] = {}
        self.held: list[tuple[Any, bytes]] = []
        self.generation = 0

    @initialize()
    def begin(self) -> None:
        self.h = kho.live.open("x", "1M", backing=self.path)

    @rule(name=names, size=sizes, seed=st.integers(0, 99), how=st.sampled_from(["put", "bytes", "empty"]))
    def put(self, name: str, size: int, seed: int, how: str) -> None:
        data = sample(seed, size)
        try:
            if how == "empty":
                self.h.empty(name, size)[:] = data
            else:
                self.h.put(name, data if how == "put" else data.tobytes())
        except kho.OutOfMemoryError:
            # Never if the memory is free in one run.
            assert self.h.stats()["largest_free"] < size + (128 << 10) + 4096
        else:
            self.current[name] = data.tobytes()

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.current:
            del self.h[name]
            del self.current[name]

    @rule(name=names)
    def edit(self, name: str) -> None:
        if self.current.get(name):
            try:
                edited = self.h.edit(name)
            except kho.OutOfMemoryError:
                return
            assert bytes(edited) == self.current[name]
            edited[0] = 255
            self.current[name] = b"\xff" + self.current[name][1:]

    @rule(name=names)
    def hold(self, name: str) -> None:
        if name in self.committed and name not in self.h.uncommitted:
            self.held.append((self.h[name], self.current[name]))

    @rule()
    def let_go(self) -> None:
        self.held = []

    @rule()
    def commit(self) -> None:
        changed = bool(self.h.uncommitted)
        try:
            self.generation = self.h.commit()
        except kho.OutOfMemoryError:
            assert self.h.stats()["free"] < 200 << 10
            return
        self.committed = dict(self.current)
        assert changed or self.h.generation == self.generation

    @rule()
    def rollback(self) -> None:
        self.h.rollback()
        self.current = dict(self.committed)

    @rule()
    def reopen(self) -> None:
        lost = self.h.uncommitted
        self.h.close()
        self.h = kho.live.open("x", "1M", backing=self.path)
        assert set(lost) <= set(self.h.dropped), "and what was put and deleted again"
        self.held = []
        self.current = dict(self.committed)

    @rule(seed=st.integers(0, 99), commits=st.booleans())
    def be_killed(self, seed: int, commits: bool) -> None:
        self.h.close()
        self.held = []

        def work() -> None:
            h = kho.live.open("x", "1M", backing=self.path)
            h.put("a", sample(seed, 50))
            if commits:
                h.commit()
                h.put("b", b"never committed")
            die()

        assert ended(child(work)) == -signal.SIGKILL
        if commits:
            self.committed["a"] = sample(seed, 50).tobytes()
        self.h = kho.live.open("x", "1M", backing=self.path)
        assert self.h.dropped == (("b",) if commits else ("a",))
        self.current = dict(self.committed)

    @invariant()
    def the_owner_sees_its_changes_and_a_candidate_what_is_committed(self) -> None:
        if not hasattr(self, "h"):
            return
        assert {name: bytes(np.asarray(self.h[name])) for name in self.h} == self.current
        with kho.live.attach(self.path) as candidate:
            assert {name: bytes(np.asarray(candidate[name])) for name in candidate} == self.committed
            candidate.verify()
            assert candidate.generation == self.h.generation
        for array, content in self.held:
            assert bytes(array) == content

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "h"):
            return
        stats = self.h.stats()

        def pages(objects: dict[str, bytes]) -> int:
            return sum(-(-len(data) // 4096) for data in objects.values())

        changed = set(self.h.uncommitted)
        uncommitted = {name: data for name, data in self.current.items() if name in changed}
        used = pages(self.committed) + pages(uncommitted)
        taken = stats["size"] - stats["free"] - stats["metadata_bytes"] - stats["pinned_bytes"]
        assert taken == used * 4096
        assert blocks(self.path) <= stats["size"] - stats["free"] + stats["kept_bytes"] + (68 << 10)
        assert stats["kept_bytes"] <= 1 << 20

    def teardown(self) -> None:
        if hasattr(self, "h"):
            self.h.release()
            assert not self.path.exists()
        self.stack.close()


TestService = Service.TestCase
TestService.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_samples_of_different_seeds_differ() -> None:
    def all_of() -> Iterator[bytes]:
        return (sample(seed, 200).tobytes() for seed in range(200))

    assert len(set(all_of())) == 200
