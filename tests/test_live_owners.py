"""kho.live: an image has one owner, and one next owner."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import kho
import kho.live

from livefiles import child, die, ended

# Refusals


def test_another_version_or_name_is_refused_and_the_image_stays_as_it_is(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image, version="1") as h:
        h.put("a", b"1")
        h.commit()
        h.put("b", b"2")
    before = image.read_bytes()
    with pytest.raises(kho.SchemaError, match=r"'x' of version '1', not '2'"):
        kho.live.open("x", "1M", backing=image, version="2")
    with pytest.raises(kho.SchemaError, match=r"the image of 'x', not of 'y'"):
        kho.live.open("y", "1M", backing=image, version="1")
    assert image.read_bytes() == before
    with kho.live.open("x", "1M", backing=image, version="1") as h:
        assert h.dropped == ("b",)


def test_an_image_has_one_owner(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", b"1")
        h.commit()
        with pytest.raises(kho.BusyError, match=f"process {os.getpid()} has it"):
            kho.live.open("x", "1M", backing=image)
        with kho.live.attach(image) as candidate:
            assert bytes(candidate["a"]) == b"1"
            with pytest.raises(kho.BusyError):
                candidate.adopt()
            assert bytes(candidate["a"]) == b"1", "and is a candidate still"
    with pytest.raises(kho.NotOwnerError, match="closed"):
        h.put("a", b"2")
    with pytest.raises(kho.NotOwnerError, match="closed"):
        h["a"]


def test_an_owner_that_never_committed_leaves_nothing_to_inherit(image: Path) -> None:
    kho.live.open("x", "1M", backing=image).close()
    with kho.live.open("x", "1M", backing=image) as h:
        assert (h.inherited, h.generation, h.names()) == (False, 0, [])
        h.put("a", b"1")
        h.commit()
    with kho.live.open("x", "1M", backing=image) as h:
        assert (h.inherited, h.generation) == (True, 1)


def test_open_waits_for_an_owner_that_closes(image: Path) -> None:
    h = kho.live.open("x", "1M", backing=image)
    h.put("a", b"1")
    h.commit()
    closer = threading.Timer(0.1, h.close)
    closer.start()
    with kho.live.open("x", "1M", backing=image, timeout=10) as successor:
        assert successor.inherited
    closer.join()


@pytest.mark.parametrize("there", ["an image", "nothing", "a blank memfd"])
def test_of_several_candidates_one_adopts(image: Path, there: str) -> None:
    if there == "an image":
        kho.live.open("x", "1M", backing=image).close()
    for _ in range(5):
        fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        backing: Path | int = fd if there == "a blank memfd" else image
        ready, go = os.pipe(), os.pipe()
        won, done = os.pipe(), os.pipe()

        def race(backing: Path | int, ready: int, go: int, won: int, done: int) -> None:
            os.write(ready, b".")
            os.read(go, 1)
            try:
                h = kho.live.open("x", "1M", backing=backing)
            except kho.BusyError:
                os.write(won, b"-")
            else:
                os.write(won, b"+")
                os.read(done, 1)
                h.close()

        racer = partial(race, backing, ready[1], go[0], won[1], done[0])
        pids = [child(racer) for _ in range(6)]
        for _ in pids:
            os.read(ready[0], 1)
        os.write(go[1], b"." * len(pids))
        outcomes = b"".join(os.read(won[0], 1) for _ in pids)
        os.write(done[1], b"." * len(pids))
        assert [ended(pid) for pid in pids] == [0] * len(pids)
        assert sorted(outcomes) == sorted(b"+-----")
        for end in (fd, *ready, *go, *won, *done):
            os.close(end)
        if there == "nothing":
            image.unlink()


def test_a_forked_child_reads_and_changes_nothing(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", b"1")
        h.commit()
        h.put("b", b"2")
        shared = h.empty("filled", 4, "u1")

        def work() -> None:
            assert bytes(h["a"]) == b"1"
            for change in (h.commit, h.rollback, h.release, h.offer, h.hand_over, h.take_back):
                with pytest.raises(kho.NotOwnerError, match="this is a child of it"):
                    change()
            with pytest.raises(kho.NotOwnerError):
                h.put("c", b"3")
            with pytest.raises(kho.NotOwnerError):
                del h["a"]
            shared[2] = 5
            h.close()

        assert ended(child(work)) == 0
        assert h.commit() == 2
        assert (bytes(h["b"]), h["filled"][2], h.names()) == (b"2", 5, ["a", "b", "filled"])


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(image: Path) -> None:
    told, stop = os.pipe(), os.pipe()

    def service() -> None:
        h = kho.live.open("x", "1M", backing=image)
        h.put("a", b"1")
        h.commit()
        held = h["a"]

        def worker() -> None:
            os.write(told[1], b".")
            os.close(stop[1])
            os.read(stop[0], 1)
            assert bytes(held) == b"1"

        child(worker)
        die()

    assert ended(child(service)) == -9
    os.read(told[0], 1)
    with kho.live.open("x", "1M", backing=image) as h:
        assert bytes(h["a"]) == b"1"
    for end in (*told, *stop):
        os.close(end)


def test_threads_may_share_a_handle(image: Path) -> None:
    with kho.live.open("x", "8M", backing=image) as h:
        failed = []

        def work(who: int) -> None:
            try:
                for i in range(30):
                    h.put(f"{who}-{i % 3}", np.full(5000, who, "u1"))
                    h.commit()
                    assert (h[f"{who}-{i % 3}"] == who).all()
                    h.verify(f"{who}-{i % 3}")
            except BaseException as error:  # noqa: BLE001 - to be seen by the test
                failed.append(error)

        threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert len(h) == 12
        assert h.verify() == 60_000


# Handovers


def test_the_ownership_state_follows_offers_transfers_and_their_ends(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        states = [h._ownership.phase]
        h.offer()
        states.append(h._ownership.phase)
        with pytest.raises(kho.BusyError, match="offered to another"):
            h._begin_transfer()
        h.withdraw()
        states.append(h._ownership.phase)
        h._begin_transfer()
        with pytest.raises(kho.BusyError):
            h._begin_transfer()
        h._transfer(most=0)
        states.append(h._ownership.phase)
        h._end_transfer()
        states.append(h._ownership.phase)
        h._begin_transfer()
        h._transfer(most=0)
        assert not h.handed_over.is_set()
        h._end_transfer(adopted=True)
        states.append(h._ownership.phase)
        assert h.handed_over.is_set()
        with pytest.raises(kho.NotOwnerError, match="handed over"):
            h.put("a", b"")
    assert states == ["owner", "offered", "owner", "transferring", "owner", "transferred"]


def test_a_successor_reads_adopts_and_changes_the_image(image: Path) -> None:
    old = kho.live.open("x", "1M", backing=image)
    old.put("a", b"1")
    old.commit()
    old.put("b", b"2")
    old.offer()
    with pytest.raises(kho.BusyError, match="a successor is reading generation 1"):
        old.commit()
    candidate = kho.live.attach(image)
    assert candidate.names() == ["a"]
    assert candidate.verify() == 1
    with pytest.raises(kho.FinalizedError, match="1 changes are not committed"):
        old.hand_over()
    old.rollback()
    old.hand_over()
    with candidate.adopt() as new:
        assert (new.inherited, new.generation, bytes(new["a"])) == (True, 1, b"1")
        with pytest.raises(kho.NotOwnerError, match="closed"):
            candidate.names()
            candidate["a"]
        with pytest.raises(kho.NotOwnerError, match="handed over"):
            old.put("c", b"")
        assert bytes(old["a"]) == b"1", "the old one drains"
        with pytest.raises(kho.BusyError):
            old.take_back()
        new.put("c", b"3")
        new.commit()
    with pytest.raises(kho.StaleError, match="another generation than 1"):
        old.take_back()
    old.close()


def test_a_successor_that_is_not_fit_leaves_the_old_one_serving(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as old:
        old.put("a", b"1")
        old.commit()
        old.offer()
        kho.live.attach(image).close()
        old.withdraw()
        old.put("a", b"2")
        assert old.commit() == 2
        old.hand_over()

        def dies() -> None:
            h = kho.live.attach(image).adopt()
            h.put("a", b"never committed")
            die()

        assert ended(child(dies)) == -9
        old.take_back()
        old.put("a", b"3")
        assert old.commit() == 3
        assert bytes(old["a"]) == b"3"


def test_a_candidate_adopts_the_newest_generation(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as old:
        candidate = kho.live.attach(image)
        old.put("a", b"1")
        old.commit()
        assert candidate.generation == 0
        old.hand_over()
        with candidate.adopt() as new:
            assert (new.generation, bytes(new["a"])) == (1, b"1")


def test_a_reader_concurrent_with_commits_sees_whole_generations(image: Path) -> None:
    stop = threading.Event()
    with kho.live.open("x", "1M", backing=image) as h:

        def commits() -> None:
            i = 0
            while not stop.is_set():
                i += 1
                h.put("a", i.to_bytes(8, "little"))
                h.put("b", i.to_bytes(8, "little"))
                h.commit()

        writer = threading.Thread(target=commits)
        writer.start()
        try:
            seen: list[int] = []
            until = time.monotonic() + 60
            while len(seen) < 60 or len(set(seen)) < 4:
                assert time.monotonic() < until, "the owner commits at the same time"
                with kho.live.attach(image) as reader:
                    assert reader.names() in ([], ["a", "b"])
                    seen.append(reader.generation)
        finally:
            stop.set()
            writer.join()
    assert seen == sorted(seen)
