"""kho.live: a reader of an image sees one whole generation for as long as it is open, whatever the owner does."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kho
import kho.live
from kho.handover.verify import verify
from kho.live import Candidate, Handle

from livefiles import check_described, child, describe, ended, folder, sample

ATTACHES = 100_000
"""With enough time."""


def change(h: Handle, made: dict[str, tuple[int, int]], chance: random.Random) -> int:
    """Replace, delete or add a few objects, and commit: which generation it is then."""
    for _ in range(chance.randint(1, 4)):
        name, seed, size = f"o{chance.randrange(8)}", chance.randrange(1 << 20), chance.randrange(20_000)
        if chance.random() < 0.2 and name in made:
            del h[name]
            del made[name]
        else:
            h.put(name, sample(seed, size))
            made[name] = (seed, size)
    h.put("state", describe(made, h.generation + 1))
    return h.commit()


def owner(backing: Path, said: memoryview, seed: int, serve: bool) -> None:
    """Own the image and commit, as fast as can be."""
    h = kho.live.open("readers", "8M", backing=backing, serve=serve)
    made, chance = check_described(h), random.Random(seed)
    while True:
        with contextlib.suppress(kho.OutOfMemoryError):
            said[0] = change(h, made, chance)
            continue
        h.rollback()  # the readers keep too much memory
        made = check_described(h)
        time.sleep(0.001)


@contextlib.contextmanager
def committing(path: Path, seed: int, *, serve: bool = False) -> Iterator[memoryview]:
    """A process that commits without pause; its last generation."""
    said = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    pid = child(lambda: owner(path, said, seed, serve))
    try:
        until = time.monotonic() + 30
        while not said[0]:
            assert time.monotonic() < until
            time.sleep(0.001)
        yield said
    finally:
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL


class Kept:
    """Readers, and arrays of readers that are closed, which are looked at again later."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._checks: list[Callable[[], object]] = []

    def attach(self, path: Path) -> int:
        """Attach, check what there is, and keep some of it."""
        reader = kho.live.attach(path)
        made = check_described(reader)
        if self._chance.random() < 0.5:
            self._checks.append(lambda: check_described(reader))
            return reader.generation
        if made and self._chance.random() < 0.5:
            name = self._chance.choice(sorted(made))
            array, expected = np.asarray(reader[name]), sample(*made[name])
            self._checks.append(lambda: np.testing.assert_array_equal(array, expected))
        reader.close()
        return reader.generation

    def check(self, most: int = 3) -> None:
        """Look at what is kept once more, and drop all but `most`."""
        self._chance.shuffle(self._checks)
        while len(self._checks) > most:
            self._checks.pop()()

    def drop(self) -> None:
        """Check everything, and close."""
        self.check(0)


def read_as_core(path: Path) -> int:
    """Read the image as a core, which `kho inspect` does, and compare every object's bytes with their checksum."""
    import zlib

    memory = kho.Memory.open(str(path))
    inc = kho.open(memory)
    (catalog,) = [payload.catalog for payload in inc.payloads.values() if hasattr(payload, "catalog")]
    for item in catalog.items.values():
        assert zlib.crc32(memory.read(item.phys, item.nbytes)) == item.crc32, item
    return int(catalog.generation)


def findings(source: Any) -> list[Any]:
    """What `kho verify` finds."""
    return [finding for finding in verify(source) if finding.severity in ("error", "warning")]


def test_every_read_next_to_a_committing_owner_is_of_one_whole_generation(
    attack_seconds: float, attack_seed: int
) -> None:
    chance = random.Random(attack_seed)
    kept = Kept(chance)
    counts = {"attach": 0, "core": 0, "verify": 0}
    seen: set[int] = set()
    until = time.monotonic() + attack_seconds
    with folder() as here, committing(here / "image", attack_seed) as said:
        while time.monotonic() < until and counts["attach"] < ATTACHES:
            what = chance.choices(list(counts), (20, 2, 1))[0]
            context = f"seed {attack_seed}, read {sum(counts.values())}, {what}"
            begun = said[0]
            try:
                if what == "verify":
                    assert findings(str(here / "image")) == []
                else:
                    generation = kept.attach(here / "image") if what == "attach" else read_as_core(here / "image")
                    assert begun <= generation, "what is read is not older than the read"
                    seen.add(generation)
                kept.check()
            except (AssertionError, kho.KhoError) as error:
                raise AssertionError(f"{context}: {error}") from error
            counts[what] += 1
        kept.drop()
        generations = said[0]
    print(f"{counts} of {len(seen)} generations while {generations} were committed")
    assert len(seen) > 3


def test_an_image_found_by_name_is_read_whole(attack_seconds: float, attack_seed: int, sockets: Path) -> None:
    until = time.monotonic() + attack_seconds / 2
    with folder() as here, committing(here / "image", attack_seed, serve=True):
        reads = 0
        while time.monotonic() < until:
            assert findings("live:readers") == [], f"seed {attack_seed}, read {reads}"
            reads += 1
    assert reads > 3


def test_held_arrays_outlive_killed_owners_and_the_commits_of_their_successors(
    attack_seconds: float, attack_seed: int
) -> None:
    chance = random.Random(attack_seed)
    kept = Kept(chance)
    until = time.monotonic() + attack_seconds
    lives = 0
    with folder() as here:
        while time.monotonic() < until or lives < 3:
            with committing(here / "image", attack_seed + lives):
                for _ in range(chance.randrange(1, 12)):
                    kept.attach(here / "image")
                time.sleep(chance.random() * 0.03)
            lives += 1
            try:
                kept.check(6)
            except AssertionError as error:
                raise AssertionError(f"seed {attack_seed}, owner {lives}: {error}") from error
        kept.drop()


def test_children_of_an_owner_see_the_state_at_their_fork(attack_seconds: float, attack_seed: int) -> None:
    chance = random.Random(attack_seed)
    until = time.monotonic() + attack_seconds
    forks = 0
    with folder() as here, kho.live.open("forks", "8M", backing=here / "image") as h:
        made: dict[str, tuple[int, int]] = {}
        change(h, made, chance)
        while time.monotonic() < until or forks < 3:
            drawn = chance.random()
            held = h[chance.choice(sorted(made))] if made and drawn < 0.5 else None
            scribbled = h.empty("scribble", 9000) if drawn < 0.3 else None
            go, told = os.pipe(), os.pipe()

            def work(closes: bool, go: tuple[int, int], told: tuple[int, int], scribbled: Any, held: Any) -> None:
                before = {name: np.asarray(h[name]).tobytes() for name in made}
                shown = None if held is None else bytes(held)
                views = {name: np.asarray(h[name]) for name in made}
                if closes:
                    h.close()
                    os.closerange(3, go[0])
                    gc.collect()
                os.write(told[1], b".")
                os.read(go[0], 1)
                if scribbled is not None:
                    scribbled[:] = 255
                assert {name: view.tobytes() for name, view in views.items()} == before
                assert held is None or bytes(held) == shown

            closes = chance.random() < 0.5 and go[0] > 3
            pid = child(lambda: work(closes, go, told, scribbled, held))  # noqa: B023 - it runs here and now
            os.read(told[0], 1)
            if scribbled is not None:
                if chance.random() < 0.5:
                    h.rollback()
                else:
                    del h["scribble"]
            del scribbled, held
            for _ in range(chance.randrange(6)):
                change(h, made, chance)
            os.write(go[1], b".")
            assert ended(pid) == 0, f"seed {attack_seed}, fork {forks}"
            check_described(h)
            for end in (*go, *told):
                os.close(end)
            forks += 1


def test_a_reader_that_never_ends_costs_what_its_own_generation_holds(attack_seconds: float) -> None:
    with folder() as here, kho.live.open("x", "4M", backing=here / "image") as h:
        h.put("a", sample(0, 200_000))
        h.commit()
        with kho.live.attach(here / "image") as reader:
            array = np.asarray(reader["a"])
            until = time.monotonic() + attack_seconds / 4
            commits = 0
            while commits < 100 or time.monotonic() < until:
                h.put("a", sample(commits, 200_000))
                h.commit()
                commits += 1
            stats = h.stats()
            assert 200_000 <= stats["reader_bytes"] == stats["pinned_bytes"] < 400_000
            np.testing.assert_array_equal(array, sample(0, 200_000))
        assert h.stats()["reader_bytes"] > 0, "an array is held still"
        del array
        assert h.stats()["reader_bytes"] == 0


@pytest.mark.parametrize("commits", [1, 2, 3, 4])
@pytest.mark.parametrize("moment", ["before the lock", "after the lock"])
def test_commits_at_any_moment_of_an_attach_do_no_harm(
    monkeypatch: pytest.MonkeyPatch, moment: str, commits: int
) -> None:
    """The two moments that matter: between the first look at the slot and the lock, and between that and the second."""
    from kho.live.file.pins import Pin

    take = Pin.take
    with folder() as here, kho.live.open("x", "1M", backing=here / "image") as h:
        made: dict[str, tuple[int, int]] = {}
        chance = random.Random(1)
        change(h, made, chance)
        done: list[int] = []

        def now() -> None:
            if len(done) < 3:
                for _ in range(commits):
                    done.append(change(h, made, chance))

        def taken(self: Pin, at: int) -> bool:
            if moment == "before the lock":
                now()
            locked = take(self, at)
            if moment == "after the lock":
                now()
            return locked

        with monkeypatch.context() as patched:
            patched.setattr(Pin, "take", taken)
            reader: Candidate = kho.live.attach(here / "image")
        for _ in range(5):
            check_described(reader)
            change(h, made, chance)
        reader.close()
