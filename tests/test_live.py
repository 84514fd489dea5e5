"""kho.live: objects that stay in place while processes come and go."""

from __future__ import annotations

import array
import gc
import json
import mmap
import os
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kho
import kho.live
from kho.payload import Live

from livefiles import DTYPES, blocks, child, contents, descriptors, die, ended, folder

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIB = 1 << 20


@pytest.fixture
def path() -> Iterator[Path]:
    """Where an image may be."""
    with folder() as here:
        yield here / "image"


def test_what_was_committed_is_there_again_in_place(path: Path) -> None:
    with kho.live.open("index", "8M", backing=path, version="2") as h:
        assert (h.inherited, h.generation, h.names(), h.dropped, h.torn) == (False, 0, [], (), None)
        vectors = h.empty("vectors", (100, 30), "f4")
        vectors[:] = np.arange(3000, dtype="f4").reshape(100, 30)
        h.put("blob", b"hello")
        assert h.commit() == 1
    with kho.live.open("index", "1G", backing=path, version="2") as h:
        assert (h.inherited, h.generation, h.names()) == (True, 1, ["vectors", "blob"])
        assert h.stats()["size"] == 8 * MIB, "an image keeps its size"
        assert np.array_equal(h["vectors"], np.arange(3000).reshape(100, 30))
        assert bytes(h["blob"]) == b"hello"
        assert h.verify() == 12005
        assert len(h) == 2
        assert "blob" in h
        assert list(h) == ["vectors", "blob"]
        h.release()
    assert not path.exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 300, 2)])
def test_arrays_of_any_plain_dtype_come_back(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = np.frombuffer(bytes(i * 7 % 2 for i in range(size)), dtype).reshape(shape)
    with kho.live.open("x", "1M", backing=path) as h:
        h.put("a", array)
        filled = h.empty("b", shape, dtype)
        filled[...] = array
        h.commit()
    with kho.live.open("x", "1M", backing=path) as h:
        for name in ("a", "b"):
            again = h[name]
            assert isinstance(again, np.ndarray)
            assert (again.dtype, again.shape) == (np.dtype(dtype), shape)
            assert again.tobytes() == array.tobytes()
            assert not again.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.zeros(3, [("a", "f4"), ("b", "i2")]),
        np.zeros(2, "V8"),
        np.zeros(2, "g"),
        np.array(["", ""], "S0").view("S1")[:0].astype("O"),
    ],
)
def test_what_no_image_holds_is_refused(path: Path, value: np.ndarray) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        with pytest.raises(kho.ParameterError, match="store a structured or foreign array as bytes"):
            h.put("a", value)
        assert h.names() == []
        with pytest.raises(TypeError):
            h.put("a", "text")  # type: ignore[arg-type]
        with pytest.raises(kho.ParameterError):
            h.empty("a", (-1,))
        with pytest.raises(kho.ParameterError, match="32 dimensions"):
            h.empty("a", (1,) * 33)
        with pytest.raises(kho.ParameterError, match="dtype 'nonsense'"):
            h.empty("a", 3, "nonsense")
        for name in ("", "a\0b", "x" * 256, "\ud800"):
            with pytest.raises(kho.ParameterError, match="1 to 255 bytes"):
                h.put(name, b"")


def test_buffers_and_arrays_that_are_not_contiguous_are_copied_in_order(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        grid = np.arange(24, dtype="i4").reshape(4, 6)
        h.put("fortran", np.asfortranarray(grid))
        h.put("strided", grid[::2, ::-1])
        h.put("buffer", array.array("h", [1, 2, 3]))
        h.put("slice", memoryview(bytes(range(10)))[::3])
        h.put("nothing", b"")
        h.commit()
        assert np.array_equal(h["fortran"], grid)
        assert np.array_equal(h["strided"], grid[::2, ::-1])
        assert bytes(h["buffer"]) == b"\1\0\2\0\3\0"
        assert bytes(h["slice"]) == b"\0\3\6\x09"
        assert bytes(h["nothing"]) == b""


# Views


def test_committed_arrays_cannot_be_written(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        filled = h.empty("a", 4, "u1")
        filled[:] = 7
        with pytest.raises(ValueError):
            h["a"][0] = 1
        h.commit()
        for view in (filled, h["a"]):
            with pytest.raises(ValueError, match="read-only"):
                view[0] = 1
        with pytest.raises(ValueError):
            h["a"].flags.writeable = True
        h.put("b", b"bytes")
        h.commit()
        with pytest.raises(TypeError):
            h["b"][0] = 1
        h.verify()


def test_views_are_the_memory_itself(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        filled = h.empty("a", 4096, "u1")
        seen = h["a"]
        filled[17] = 3
        assert seen[17] == 3
        assert not np.asarray(seen).flags.owndata


def test_an_array_that_is_held_outlives_its_object_and_the_handle(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        h.put("a", np.full(100_000, 7, "u1"))
        h.commit()
        held = h["a"][5:]
        del h["a"]
        h.commit()
        assert h.stats()["pinned_bytes"] == 102_400
        for i in range(8):
            h.put("b", np.full(100_000, i, "u1"))
            h.commit()
        assert (held == 7).all(), "memory somebody looks at is not given to another object"
        half = held[::2]
        del held
        gc.collect()
        assert h.stats()["pinned_bytes"] == 102_400
        del half
        gc.collect()
        assert h.stats()["pinned_bytes"] == 0
        last = h["b"]
    assert (last == 7).all(), "and stays mapped when the handle is closed"


def test_an_edit_is_a_copy_until_it_is_committed(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        h.put("a", np.arange(10))
        h.commit()
        before = h["a"]
        edited = h.edit("a")
        edited[0] = 99
        assert before[0] == 0
        with kho.live.attach(path) as other:
            assert other["a"][0] == 0
        h.commit()
        assert (before[0], h["a"][0], h.info("a").generation) == (0, 99, 2)
        with pytest.raises(kho.NotFoundError):
            h.edit("b")


# Commits


def test_what_is_not_committed_is_dropped_and_said(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        h.put("kept", b"1")
        h.put("changed", b"old")
        h.commit()
        h.put("changed", b"new")
        h.put("new", b"2")
        del h["kept"]
        assert h.uncommitted == ["changed", "new", "kept"]
        assert h.names() == ["changed", "new"]
    with kho.live.open("x", "1M", backing=path) as h:
        assert h.dropped == ("changed", "new", "kept")
        h.rollback()
        assert {name: bytes(h[name]) for name in h} == {"kept": b"1", "changed": b"old"}
    with kho.live.open("x", "1M", backing=path) as h:
        assert h.dropped == (), "it is said once"


def test_a_rollback_drops_what_is_not_committed(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        h.put("a", b"1")
        h.commit()
        free = h.stats()["free"]
        h.put("a", b"2")
        h.put("b", b"3")
        h.rollback()
        assert (h.names(), bytes(h["a"]), h.uncommitted, h.stats()["free"]) == (["a"], b"1", [], free)
        assert h.commit() == 1, "there is nothing to commit"


def test_deleting(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        free = h.stats()["free"]
        h.put("a", bytes(100_000))
        del h["a"]
        assert (h.names(), h.uncommitted, h.stats()["free"]) == ([], [], free)
        for read in (h.__getitem__, h.__delitem__, h.info):
            with pytest.raises(kho.NotFoundError, match="no object 'a'"):
                read("a")
        h.put("a", bytes(100_000))
        h.commit()
        del h["a"]
        with pytest.raises(kho.NotFoundError, match="was deleted"):
            h["a"]
        h.commit()
        assert h.names() == []
        assert h.stats()["free"] == free


def test_unchanged_objects_are_not_summed_up_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kho.live.open("x", "4M", backing=path) as h:
        h.put("large", bytes(MIB))
        h.commit()
        summed: list[int] = []
        real = zlib.crc32

        def crc32(data: Buffer) -> int:
            summed.append(memoryview(data).nbytes)
            return real(data)

        monkeypatch.setattr(zlib, "crc32", crc32)
        h.put("small", b"1234")
        h.commit()
        assert 4 in summed
        assert MIB not in summed


def test_a_thousand_generations_take_no_more_memory_than_ten(path: Path) -> None:
    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    with kho.live.open("x", "4M", backing=path) as h:
        h.put("stays", bytes(50_000))
        seen = []
        before = (0, Counter[str](), 0, 0)
        for i in range(1000):
            h.put("a", np.full(20_000 + i % 7 * 5000, i % 256, "u1"))
            h.put(f"b{i % 5}", b"x" * (i % 3000))
            h.commit()
            if i >= 10:
                seen.append(blocks(path))
            if i == 100:
                before = rss(), descriptors(), path.stat().st_size, h.stats()["free"] // (64 << 10)
        assert max(seen) - min(seen) <= 64 << 10
        assert max(seen) < 400 << 10
        after = rss(), descriptors(), path.stat().st_size, h.stats()["free"] // (64 << 10)
        assert after[1:3] == before[1:3]
        assert abs(after[3] - before[3]) <= 1
        assert after[0] - before[0] < 4 * MIB
        h.verify()


def test_a_full_image_says_what_it_needs_and_has_and_can_be_emptied(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        with pytest.raises(kho.OutOfMemoryError, match=r"put 'big' needs 0.957 MiB in one run; 0.812 MiB free"):
            h.put("big", bytes(1_000_000))
        assert (h.names(), h.uncommitted) == ([], [])
        count = 0
        with pytest.raises(kho.OutOfMemoryError, match="larger size"):
            for i in range(300):
                h.put(f"o{i}", bytes(4096))
                count = i + 1
        h.commit()
        assert count > 120
        for i in range(count):
            del h[f"o{i}"]
        h.commit()
        h.put("big", bytes(600_000))
        h.commit()
    with pytest.raises(kho.ParameterError, match="size"):
        kho.live.open("x", "1K", backing=path.with_name("other"))
    with pytest.raises(kho.ParameterError, match="write 1048576 or '8G'"):
        kho.live.open("x", "lots", backing=path.with_name("other"))


def test_many_names_make_metadata_of_many_pages(path: Path) -> None:
    with kho.live.open("x", "32M", backing=path) as h:
        for i in range(3000):
            h.put(f"object number {i}", i.to_bytes(4, "little"))
        h.commit()
    with kho.live.open("x", "32M", backing=path) as h:
        assert len(h) == 3000
        assert all(int.from_bytes(h[f"object number {i}"], "little") == i for i in range(0, 3000, 97))


# Who may


def test_another_version_or_name_is_refused_and_the_image_stays_as_it_is(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path, version="1") as h:
        h.put("a", b"1")
        h.commit()
        h.put("b", b"2")
    before = path.read_bytes()
    with pytest.raises(kho.SchemaError, match=r"'x' of version '1', not '2'"):
        kho.live.open("x", "1M", backing=path, version="2")
    with pytest.raises(kho.SchemaError, match=r"the image of 'x', not of 'y'"):
        kho.live.open("y", "1M", backing=path, version="1")
    assert path.read_bytes() == before
    with kho.live.open("x", "1M", backing=path, version="1") as h:
        assert h.dropped == ("b",)


def test_there_is_one_owner(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
        h.put("a", b"1")
        h.commit()
        with pytest.raises(kho.BusyError, match=f"process {os.getpid()} has it"):
            kho.live.open("x", "1M", backing=path)
        with kho.live.attach(path) as candidate:
            assert bytes(candidate["a"]) == b"1"
            with pytest.raises(kho.BusyError):
                candidate.adopt()
            assert bytes(candidate["a"]) == b"1", "and is a candidate still"
    with pytest.raises(kho.NotOwnerError, match="closed"):
        h.put("a", b"2")
    with pytest.raises(kho.NotOwnerError, match="closed"):
        h["a"]


def test_an_owner_that_never_committed_leaves_nothing_to_inherit(path: Path) -> None:
    kho.live.open("x", "1M", backing=path).close()
    with kho.live.open("x", "1M", backing=path) as h:
        assert (h.inherited, h.generation, h.names()) == (False, 0, [])
        h.put("a", b"1")
        h.commit()
    with kho.live.open("x", "1M", backing=path) as h:
        assert (h.inherited, h.generation) == (True, 1)


def test_one_waits_for_an_owner_that_lets_go(path: Path) -> None:
    h = kho.live.open("x", "1M", backing=path)
    h.put("a", b"1")
    h.commit()
    closer = threading.Timer(0.1, h.close)
    closer.start()
    with kho.live.open("x", "1M", backing=path, timeout=10) as successor:
        assert successor.inherited
    closer.join()


@pytest.mark.parametrize("there", ["an image", "nothing", "a blank memfd"])
def test_of_those_that_race_one_adopts(path: Path, there: str) -> None:
    if there == "an image":
        kho.live.open("x", "1M", backing=path).close()
    for _ in range(5):
        fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        backing: Path | int = fd if there == "a blank memfd" else path
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
            path.unlink()


def test_a_forked_child_reads_and_changes_nothing(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as h:
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


def test_a_child_that_lives_on_does_not_keep_its_parents_image(path: Path) -> None:
    told, stop = os.pipe(), os.pipe()

    def service() -> None:
        h = kho.live.open("x", "1M", backing=path)
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
    with kho.live.open("x", "1M", backing=path) as h:
        assert bytes(h["a"]) == b"1"
    for end in (*told, *stop):
        os.close(end)


def test_threads_may_share_a_handle(path: Path) -> None:
    with kho.live.open("x", "8M", backing=path) as h:
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


# Handing over


def test_a_successor_looks_adopts_and_goes_on(path: Path) -> None:
    old = kho.live.open("x", "1M", backing=path)
    old.put("a", b"1")
    old.commit()
    old.put("b", b"2")
    old.offer()
    with pytest.raises(kho.BusyError, match="a successor is reading generation 1"):
        old.commit()
    candidate = kho.live.attach(path)
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


def test_a_successor_that_is_not_fit_leaves_the_old_one_serving(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as old:
        old.put("a", b"1")
        old.commit()
        old.offer()
        kho.live.attach(path).close()
        old.withdraw()
        old.put("a", b"2")
        assert old.commit() == 2
        old.hand_over()

        def dies() -> None:
            h = kho.live.attach(path).adopt()
            h.put("a", b"never committed")
            die()

        assert ended(child(dies)) == -9
        old.take_back()
        old.put("a", b"3")
        assert old.commit() == 3
        assert bytes(old["a"]) == b"3"


def test_a_candidate_adopts_the_newest_generation(path: Path) -> None:
    with kho.live.open("x", "1M", backing=path) as old:
        candidate = kho.live.attach(path)
        old.put("a", b"1")
        old.commit()
        assert candidate.generation == 0
        old.hand_over()
        with candidate.adopt() as new:
            assert (new.generation, bytes(new["a"])) == (1, b"1")


def test_a_reader_beside_a_committing_owner_sees_whole_generations(path: Path) -> None:
    stop = threading.Event()
    with kho.live.open("x", "1M", backing=path) as h:

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
            seen = set()
            for _ in range(60):
                with kho.live.attach(path) as reader:
                    assert reader.names() in ([], ["a", "b"])
                    seen.add(reader.generation)
        finally:
            stop.set()
            writer.join()
    assert len(seen) > 3


# Backings


def test_a_memfd_is_sealed_and_goes_by_its_descriptor() -> None:
    before = descriptors()
    with kho.live.open("x", "1M") as h:
        h.put("a", b"1")
        h.commit()
        with pytest.raises(OSError):
            os.ftruncate(h.fileno(), 0)
        with pytest.raises(OSError):
            os.ftruncate(h.fileno(), 1 << 30)
        passed = os.dup(h.fileno())
        with pytest.raises(kho.BusyError):
            kho.live.open("x", "1M", backing=passed)
    with kho.live.open("x", "1M", backing=passed) as h:
        assert (h.inherited, bytes(h["a"])) == (True, b"1")
        h.release()
    with kho.live.open("x", "1M", backing=passed) as h:
        assert (h.inherited, h.generation, h.names()) == (False, 0, []), "a released memfd can be used again"
    os.close(passed)
    assert descriptors() == before


def test_a_transport_finds_what_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = os.memfd_create("kept", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    asked = []

    def finder(name: str) -> int | None:
        asked.append(name)
        return kept if name == "x" else None

    monkeypatch.setattr(kho.live.transports, "FINDERS", [lambda name: None, finder])
    with kho.live.open("x", "1M") as h:
        assert not h.inherited
        h.put("a", b"1")
        h.commit()
    with kho.live.open("x", "1M") as h:
        assert (h.inherited, bytes(h["a"])) == (True, b"1")
    with kho.live.open("y", "1M") as h:
        assert not h.inherited
    assert asked == ["x", "x", "y"]
    os.close(kept)


def test_the_owners_lock_goes_across_exec() -> None:
    h = kho.live.open("x", "1M")
    h.put("a", b"1")
    h.commit()
    fds = h.fileno(), h.lock_fileno()
    program = (
        "import sys, kho.live, os\n"
        "fd, lock = map(int, sys.argv[1:])\n"
        "try: kho.live.attach(fd).adopt()\n"
        "except kho.BusyError: pass\n"
        "else: sys.exit('adopted without the lock')\n"
        "with kho.live.attach(fd, lock_fd=lock).adopt() as h: print(bytes(h['a']))\n"
    )
    args = [sys.executable, "-c", program, *map(str, fds)]
    done = subprocess.run(args, pass_fds=fds, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("b'1'\n", "")
    h.close()


def test_memfds_that_can_be_shrunk_are_refused() -> None:
    with kho.live.open("x", "1M") as h:
        whole = os.pread(h.fileno(), 8 * MIB, 0)
    fd = os.memfd_create("copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, whole)
    with pytest.raises(kho.FormatError, match="can be shrunk under its readers"):
        kho.live.attach(fd)
    os.close(fd)
    fd = os.memfd_create("unsealable", os.MFD_CLOEXEC)
    with pytest.raises(kho.ParameterError, match="MFD_ALLOW_SEALING"):
        kho.live.open("x", "1M", backing=fd)
    os.close(fd)


def test_hugetlb(path: Path) -> None:
    free = Path("/proc/sys/vm/nr_hugepages")
    if not free.exists() or int(free.read_text()) < 4:
        with pytest.raises(kho.KhoError):
            kho.live.open("x", "4M", backing="hugetlb")
        pytest.skip("no huge pages")
    with kho.live.open("x", "4M", backing="hugetlb") as h:
        h.put("a", b"1")
        h.commit()
        fd = os.dup(h.fileno())
    with kho.live.open("x", "4M", backing=fd) as h:
        assert bytes(h["a"]) == b"1"
        h.release()
    os.close(fd)


def test_sources_that_are_none(path: Path, tmp_path: Path) -> None:
    with pytest.raises(kho.SourceError, match="no such file"):
        kho.live.attach(path)
    with pytest.raises(kho.SourceError):
        kho.live.attach(12345)
    with pytest.raises(kho.SourceError, match=r"no such|No such"):
        kho.live.open("x", "1M", backing=path / "no" / "directory")
    with pytest.raises(kho.KhoError):
        kho.live.open("x", "1M", backing=tmp_path)
    os.mkfifo(path)
    with pytest.raises(kho.SourceError, match="not a file"):
        kho.live.attach(path)
    path.unlink()
    for content in (b"", b"x", bytes(4 * MIB), b"\x7fELF" + bytes(4 * MIB)):
        path.write_bytes(content)
        with pytest.raises(kho.FormatError, match="remove the file|no kho.live image"):
            kho.live.open("x", "1M", backing=path)
        assert path.read_bytes() == content


def test_a_file_on_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with kho.live.open("x", "1M", backing=path) as h:
        h.put("a", b"1")
        h.commit()
    assert path.stat().st_mode & 0o777 == 0o600
    with kho.live.open("x", "1M", backing=path) as h:
        assert bytes(h["a"]) == b"1"


def test_a_file_system_that_is_full_is_an_error_and_no_signal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    with kho.live.open("x", "1M", backing=path) as h:
        h.put("a", b"1")
        free = h.stats()["free"]
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            with pytest.raises(kho.OutOfMemoryError, match="No space left on device"):
                h.put("b", b"2")
            with pytest.raises(kho.OutOfMemoryError, match="commit needs"):
                h.commit()
        assert (h.names(), h.generation, h.stats()["free"]) == (["a"], 0, free)
        assert h.commit() == 1


def test_a_released_image_leaves_nothing(path: Path) -> None:
    before, files = descriptors(), sorted(path.parent.iterdir())
    h = kho.live.open("x", "8M", backing=path)
    h.put("a", bytes(MIB))
    h.commit()
    candidate = kho.live.attach(path)
    held = h["a"]
    h.release()
    assert os.fstat(candidate.fileno()).st_blocks == 0, "its memory is given back, whoever looks on"
    assert bytes(held[:4]) == bytes(4)
    with pytest.raises(kho.StaleError, match="released meanwhile"):
        candidate.adopt()
    candidate.close()
    del h, candidate, held
    gc.collect()
    assert sorted(path.parent.iterdir()) == files
    assert descriptors() == before
    with kho.live.open("x", "8M", backing=path) as h:
        assert not h.inherited


# Other tools


def test_inspect_and_verify_read_the_image_of_a_running_service(path: Path) -> None:
    with kho.live.open("search", "4M", backing=path, version="7") as h:
        h.put("vectors", np.zeros((300, 8), "f4"))
        h.put("[names]", b"a,b")
        h.commit()
        del h["vectors"]
        run = [sys.executable, "-m", "kho", "inspect", str(path)]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        assert "kho.live: generation 1 of search, version 7" in text
        assert "vectors  <f4    300 x 8" in text
        assert "[names]  bytes" in text
        data = json.loads(subprocess.run([*run, "--json"], capture_output=True, check=True).stdout)
        assert [(row["name"], row["dtype"], row["shape"]) for row in data["live"]["objects"]] == [
            ("vectors", "<f4", [300, 8]),
            ("[names]", None, [3]),
        ]
        verify = [sys.executable, "-m", "kho", "verify", str(path)]
        assert "0 errors, 0 warnings" in subprocess.run(verify, capture_output=True, text=True, check=True).stdout
        inc = kho.open(path)
        live = inc.payloads["kho-live"]
        assert isinstance(live, Live)
        item = live.catalog.items["vectors"]
        assert inc.read(item.phys, item.nbytes) == bytes(9600)
        assert kho.Arena.open(path).fdt_phys == inc.fdt_phys
        assert {owned.owner for owned in live.owned()} == {"search vectors", "search [names]"}


def test_importing_kho_does_not_import_live() -> None:
    program = "import sys, kho; assert 'kho.live' not in sys.modules; kho.live.open; assert 'kho.live' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_numpy_objects_are_memoryviews(path: Path) -> None:
    program = """
import sys
sys.modules["numpy"] = None
import array, kho.live
h = kho.live.open("x", "1M", backing=sys.argv[1])
a = h.empty("a", (2, 3), "f4")
a[1, 2] = 1.5
h.put("b", array.array("i", [1, 2]))
h.empty("c", 4, "<U3")
h.commit()
try: a[0, 0] = 1
except ValueError: pass
else: raise SystemExit("writable")
print(h["a"].format, h["a"].shape, h["a"][1, 2], h["a"].readonly, bytes(h["b"]), h["c"].nbytes)
try: h.empty("d", 3, 5)
except kho.ParameterError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        r"f (2, 3) 1.5 True b'\x01\x00\x00\x00\x02\x00\x00\x00' 48",
        "dtype 5: without numpy, say it as '<f4'",
    ]
    with kho.live.open("x", "1M", backing=path) as h:
        assert contents(h)["a"] == (("<f4", (2, 3)), np.array([[0, 0, 0], [0, 0, 1.5]], "f4").tobytes())
