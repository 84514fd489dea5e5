"""kho.live: arrays keep their contents over all changes of owner, and the memory they keep is bounded."""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kho
import kho.live
from kho.formats.live import Catalog, Item, Retired, decode_catalog, encode_catalog
from kho.live import Handle
from kho.live.file import header, metadata, pins, space
from kho.live.file.pins import Pin
from kho.live.handle import Change

from livefiles import blocks, child, die, ended, sample

BASE = 1 << 32


def filled(image: Path, size: str = "2M") -> Handle:
    """An image with an object."""
    h = kho.live.open("x", size, backing=image)
    h.put("a", sample(1, 50_000))
    h.commit()
    return h


def replace(h: Handle, times: int = 8) -> None:
    """Have memory that is not read used again."""
    for i in range(times):
        h.put("a", sample(100 + i, 50_000))
        h.put("b", sample(200 + i, 30_000))
        h.commit()


def same(array: Any, seed: int, nbytes: int = 50_000) -> None:
    np.testing.assert_array_equal(np.asarray(array), sample(seed, nbytes))


def test_an_array_of_an_owner_that_handed_over_stays(image: Path) -> None:
    old = filled(image)
    array = old["a"]
    old.hand_over()
    with kho.live.attach(image).adopt() as h:
        replace(h)
        same(array, 1)
        same(old["a"], 1)
        old.close()
        replace(h)
        same(array, 1)
        assert h.stats()["reader_bytes"] > 0
        del array
        gc.collect()
        assert h.stats()["reader_bytes"] == 0


def test_an_array_of_an_object_that_was_replaced_stays_when_its_owner_hands_over(image: Path) -> None:
    old = filled(image)
    array = old["a"]
    old.put("a", sample(2, 50_000))
    old.commit()
    old.put("dropped", sample(3, 5000))
    dropped = old["dropped"]
    old.rollback()
    old.hand_over()
    with kho.live.attach(image).adopt() as h:
        for _ in range(3):
            replace(h)
            same(array, 1)
            same(dropped, 3, 5000)
    old.close()


def test_an_array_that_is_held_over_close_costs_the_next_owner_its_own_pages(image: Path) -> None:
    h = filled(image)
    array, made = h["a"], h.empty("never committed", 70_000)
    made[:] = 7
    free = h.stats()["free"]
    h.close()
    with kho.live.open("x", backing=image) as again:
        replace(again)
        made[:] = 8
        assert again.stats()["free"] > free - (400 << 10)
        assert again.verify() == 80_000
        same(array, 1)


def test_a_child_that_outlives_its_parent_writes_into_nothing_that_is_committed(image: Path) -> None:
    go, told = os.pipe(), os.pipe()

    def service() -> None:
        h = filled(image)
        made = h.empty("filled by a child", 100_000)

        def work() -> None:
            os.read(go[0], 1)
            made[:] = 255
            same(h["a"], 1)
            os.write(told[1], b".")

        child(work)
        die()

    assert ended(child(service)) == -9
    with kho.live.open("x", backing=image) as h:
        replace(h)
        os.write(go[1], b".")
        os.set_blocking(told[0], True)
        assert os.read(told[0], 1) == b"."
        assert h.verify() == 80_000
        for _ in range(100):
            if not h.stats()["reader_bytes"]:
                break
            time.sleep(0.02)
        assert h.stats()["reader_bytes"] == 0, "the child has ended"
    for end in (*go, *told):
        os.close(end)


def test_more_runs_than_the_head_can_list_keep_all_free_pages(image: Path) -> None:
    h = filled(image, "8M")
    arrays = [h.empty(f"n{i}", 4096) for i in range(header.Left.MOST + 1)]
    h.close()
    with kho.live.open("x", backing=image) as again:
        with pytest.raises(kho.OutOfMemoryError, match="wait for readers"):
            again.put("b", b"2")
        arrays.clear()
        again.put("b", b"2")
        again.commit()


def test_a_new_image_waits_for_arrays_of_the_one_that_was_released_in_its_place() -> None:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with kho.live.open("x", "1M", backing=fd) as h:
        h.put("a", b"1" * 5000)
        h.commit()
        held = h["a"]
        h.release()
    with pytest.raises(kho.BusyError, match="still held"):
        kho.live.open("x", "1M", backing=fd)
    assert bytes(held) == b"1" * 5000
    del held
    with kho.live.open("x", "1M", backing=fd) as h:
        assert h.generation == 0
    os.close(fd)


def test_a_full_image_says_that_it_waits_for_readers(image: Path) -> None:
    with filled(image) as h, kho.live.attach(image) as reader:
        h.put("a", b"")
        h.put("large", bytes(h.stats()["largest_free"] - (300 << 10)))
        h.commit()
        with kho.live.attach(image), pytest.raises(kho.OutOfMemoryError, match="wait for readers"):
            del h["large"]
            h.commit()
            h.put("large", bytes(1 << 20))
        h.put("large", bytes(1 << 20))
        same(reader["a"], 1)


def test_a_process_that_locks_every_other_generation_costs_memory_and_no_time(image: Path) -> None:
    with filled(image) as h:
        fd = os.open(image, os.O_RDONLY)
        for generation in range(0, 6000, 2):
            lock = pins._flock(fcntl.F_RDLCK, pins.READERS + generation, 1)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        began = time.process_time()
        found = pins.held(h.lock_fileno(), pins.READERS, 0, 6000)
        assert time.process_time() - began < 1
        assert all(found.any_of(generation, generation + 1) for generation in range(0, 6000, 2))
        replace(h, 3)
        os.close(fd)
        h.put("a", b"")
        h.commit()
        assert h.stats()["reader_bytes"] == 0


def test_locked_generations_are_found_as_runs(image: Path) -> None:
    with filled(image) as h:
        pin = Pin(h.fileno(), "here")
        for generation in (3, 4, 5, 9, 20):
            assert pin.take(pins.READERS + generation)
        found = pins.held(h.lock_fileno(), pins.READERS, 4, 20)
        held = [g for g in range(30) if found.any_of(g, g + 1)]
        assert held == [4, 5, 9]
        assert not found.any_of(6, 9)
        assert found.any_of(6, 10)
        assert not found.any_of(9, 9)
        pin.drop_all()
        assert not pins.held(h.lock_fileno(), pins.READERS, 0, 30)


def test_attach_warns_on_a_file_system_without_such_locks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, what: int, argument: Any = 0) -> Any:
        if what in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
            raise OSError(22, "Invalid argument")
        return real(fd, what, argument)

    real = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with filled(image) as h:
        with pytest.warns(RuntimeWarning, match="no locks of open file descriptions"):
            reader = kho.live.attach(image)
        same(reader["a"], 1)
        replace(h)
        reader.close()


def test_a_write_lock_where_readers_lock_is_an_error(image: Path) -> None:
    with filled(image) as h:
        fd = os.open(image, os.O_RDWR)
        lock = pins._flock(fcntl.F_WRLCK, pins.READERS, 100)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        with pytest.raises(kho.BusyError, match="/proc/locks"):
            kho.live.attach(image)
        os.close(fd)
        kho.live.attach(image).close()
        assert h.verify()


def test_an_image_of_the_previous_format_is_refused_with_the_remedy(image: Path) -> None:
    filled(image).close()
    with image.open("r+b") as file:
        head = bytearray(file.read(8192))
        view = memoryview(head)
        packed = header._SUPER.pack(header.MAGIC, 1, *header._SUPER.unpack_from(head, header.SUPER_AT)[2:])
        view[header.SUPER_AT : header.SUPER_AT + header.SUPER_BYTES] = header._sealed(packed)
        file.seek(0)
        file.write(head)
    with pytest.raises(kho.UnsupportedAbiError, match="format 1, not 2: an older kho wrote it"):
        kho.live.attach(image)


def test_the_list_of_retired_memory_is_decoded_and_checked() -> None:
    items = {"a": Item("a", BASE, 4096, None, (4096,), 0, 5)}
    good = Catalog("x", "1", 9, items, (Retired(BASE + 4096, 2, 3, 9), Retired(BASE + 16384, 1, 10, 10)))
    assert decode_catalog(encode_catalog(good)) == good
    for run, says in {
        Retired(BASE, 1, 3, 9): "overlap",
        Retired(BASE + 1, 1, 3, 9): "misaligned or out of range",
        Retired(BASE + 4096, 0, 3, 9): "misaligned or out of range",
        Retired(0, 1, 3, 9): "misaligned or out of range",
        Retired(BASE + 4096, (1 << 64) - 1, 3, 9): "misaligned or out of range",
        Retired(BASE + 4096, 1, 9, 3): "generations 9 to 3, in generation 9",
        Retired(BASE + 4096, 1, 3, 11): "generations 3 to 11",
    }.items():
        bad = Catalog("x", "1", 9, items, (run,))
        with pytest.raises(kho.FormatError, match=says):
            decode_catalog(encode_catalog(bad))


def test_successive_commits_reuse_each_others_metadata_pages(image: Path) -> None:
    """Without readers no memory is taken or given back for metadata: where nothing is free, one can still commit."""
    with filled(image) as h:
        replace(h, 4)
        zones = set()
        for _ in range(10):
            h.put("a", sample(1, 50_000))
            h.commit()
            zones.add(h._space.zone)
        assert len(zones) == 2


def test_short_lived_readers_cause_no_allocation_of_metadata(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    punched: list[int] = []

    def punching(fd: int, offset: int, nbytes: int) -> bool:
        punched.append(nbytes)
        return True

    with filled(image, "8M") as h:
        reader = kho.live.attach(image)
        for i in range(40):
            if i == 10:
                monkeypatch.setattr(space, "allocate", lambda *run: allocated.append(run[2]))
                monkeypatch.setattr(space, "punch", punching)
            del h["a"]
            h.put("a", b"")
            h.commit()
            following = kho.live.attach(image)
            reader.close()
            reader = following
        reader.close()
        assert (allocated, punched) == ([], [])
        assert h.stats()["metadata_bytes"] < 1 << 20


@pytest.mark.parametrize("nbytes", [8, 250_000])
def test_an_object_that_is_replaced_again_and_again_takes_and_gives_back_no_memory(
    image: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    """Also while readers attach to each generation and are closed after the next commit."""
    calls: list[tuple[str, int]] = []

    def punching(fd: int, offset: int, n: int) -> bool:
        calls.append(("punch", n))
        return True

    with kho.live.open("x", "8M", backing=image) as h:
        readers, places = [], set()
        for i in range(60):
            if i == 20:
                monkeypatch.setattr(space, "allocate", lambda *run: calls.append(("allocate", run[2])))
                monkeypatch.setattr(space, "punch", punching)
            h.put("a", sample(i, nbytes))
            h.commit()
            places.add(h.info("a").phys)
            readers.append(kho.live.attach(image))
            if len(readers) > 2:
                reader = readers.pop(0)
                assert bytes(reader["a"]) == sample(i - 2, nbytes).tobytes()
                reader.close()
        for reader in readers:
            reader.close()
        assert calls == []
        assert len(places) <= 5
        assert len(h._space._builder._arenas) <= 4


def test_memory_that_is_kept_for_later_commits_is_bounded_and_given_up_when_it_is_needed(image: Path) -> None:
    with kho.live.open("x", "8M", backing=image) as h:
        stats = h.stats()
        for i in range(40):
            h.put(f"{i % 7}", sample(i, 1 + i * 9000 % 300_000))
            h.commit()
            stats = h.stats()
            assert stats["kept_bytes"] <= 1 << 20
            assert blocks(image) <= stats["size"] - stats["free"] + stats["kept_bytes"] + (68 << 10)
        assert stats["kept_bytes"] > 0
        for name in h.names():
            del h[name]
        h.commit()
        kept = h.stats()["kept_bytes"]
        h.put("large", bytes(6 << 20))
        assert h.stats()["kept_bytes"] < kept, "it has some of these pages"
        h.commit()
        h.verify()
    with kho.live.open("x", backing=image) as h:
        assert blocks(image) <= h.stats()["size"] - h.stats()["free"] + (68 << 10), "the next owner gives it back"


def test_pages_that_are_used_again_hold_zeros_and_not_what_was_replaced(image: Path) -> None:
    with kho.live.open("x", "8M", backing=image) as h:
        reused = 0
        for i in range(6):
            h.put("a", b"\xff" * 8192)
            h.commit()
            del h["a"]
            h.commit()
            kept = h.stats()["kept_bytes"]
            if i % 2:
                h.empty("b", 5000)
            else:
                h.put("b", bytes(4100))
            reused += kept - h.stats()["kept_bytes"]
            assert not np.asarray(h["b"]).any()
            offset = h._image.sup.offset + h.info("b").phys - h._image.sup.base
            assert os.pread(h.fileno(), 8192, offset) == bytes(8192)
            h.rollback()
        assert reused == 6 * 8192


def test_a_commit_that_found_no_room_while_generations_were_read_succeeds_once_they_are_not(image: Path) -> None:
    with kho.live.open("x", "1M", backing=image) as h:
        h.put("a", b"0")
        h.commit()
        h.put("large", bytes(512 << 10))
        h.commit()
        readers = []
        with pytest.raises(kho.OutOfMemoryError, match="wait for readers"):
            for i in range(60):
                readers.append(kho.live.attach(image))
                h.put("a", bytes([i]))
                h.commit()
        assert 2 <= len(readers) < 60
        for reader in readers:
            reader.close()
        assert h.commit() == len(readers) + 2
        h.verify()


def test_locks_of_children_are_queried_only_while_there_may_be_children(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    query = pins.held

    def held(fd: int, region: int, first: int, end: int) -> pins.Held:
        asked.append(region)
        return query(fd, region, first, end)

    with filled(image) as h:
        replace(h, 2)
        monkeypatch.setattr(pins, "held", held)
        replace(h, 2)
        assert asked == [pins.READERS] * 2
        old = h["a"]
        h.put("a", sample(7, 50_000))
        h.commit()
        go, told = os.pipe(), os.pipe()

        def work() -> None:
            os.write(told[1], b".")
            os.read(go[0], 1)
            same(h["a"], 7)

        pid = child(work)
        assert os.read(told[0], 1) == b"."
        # The sweep of this call looks for children of the generation before, and there are none of it.
        assert h.stats()["pinned_bytes"]
        del old
        gc.collect()
        h.commit()
        replace(h)
        assert h.stats()["reader_bytes"] > 0
        os.write(go[1], b".")
        assert ended(pid) == 0
        replace(h, 2)
        asked.clear()
        replace(h, 2)
        assert asked == [pins.READERS] * 2
        for end in (*go, *told):
            os.close(end)


def test_metadata_that_are_built_in_an_arena_that_was_used_before_are_the_same() -> None:
    builder, size = metadata.Builder(BASE, 64 << 20), 16384
    for i in range(40):
        start, n = [(16000, 12), (16012, 12), (16100, 20), (15000, 40), (15100, 100)][i * 7 % 5]
        items = {
            f"name {k}": Item(
                f"name {k}", BASE + (k * 300 + i % 3) * 4096, 1 + k * i * 7777 % 900_000, None, (1,), i, i
            )
            for k in range(1 + i * 5 % 30)
        }
        made = Catalog("x", "1", i, items, tuple(Retired(BASE + (size - 9 - k) * 4096, 1, i, i) for k in range(i % 5)))
        try:
            expected = metadata.Builder(BASE, size * 4096).build(start, n, made)
        except kho.OutOfMemoryError:
            with pytest.raises(kho.OutOfMemoryError):
                builder.build(start, n, made)
            continue
        assert builder.build(start, n, made) == expected
        assert len(builder._arenas) <= metadata.MOST_ARENAS
    assert len(builder._arenas) > 1


def no_page_is_a_hole(h: Handle, image: Path) -> None:
    """Check that the file has blocks for exactly the head, the pages in use, and those that are kept."""
    space = h._space
    assert blocks(image) == header.JOURNAL_END + (space.runs.used + space.kept.used) * 4096


def test_a_new_owner_keeps_no_page_that_is_a_hole(image: Path) -> None:
    old = filled(image)
    reader = kho.live.attach(image)
    old.put("a", sample(2, 50_000))
    old.commit()
    old.close()
    reader.close()
    with kho.live.open("x", backing=image) as h:
        no_page_is_a_hole(h, image)
        replace(h, 2)
        no_page_is_a_hole(h, image)


def test_an_owner_that_takes_back_keeps_no_page_that_its_successor_gave_back(image: Path) -> None:
    old = filled(image, "8M")
    readers = []
    for i in range(3):
        readers.append(kho.live.attach(image))
        old.put("a", sample(10 + i, 50_000))
        old.commit()
    old.hand_over()
    for reader in readers:
        reader.close()

    def successor() -> None:
        with kho.live.attach(image).adopt() as h:
            assert h.stats()["reader_bytes"] == 0

    assert ended(child(successor)) == 0
    old.take_back()
    no_page_is_a_hole(old, image)
    replace(old, 3)
    no_page_is_a_hole(old, image)
    old.close()


def test_arenas_for_metadata_are_not_kept_where_address_space_costs_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = Catalog("x", "1", 1, {})

    def kept(size: int) -> int:
        builder = metadata.Builder(BASE, size)
        for start in range(0, 120, 12):
            builder.build(start, 12, made)
        return len(builder._arenas)

    assert [kept(size) for size in (1 << 20, 1 << 38, 1 << 39, 1 << 41)] == [4, 4, 2, 0]
    monkeypatch.setattr(metadata, "OVERCOMMIT", tmp_path / "overcommit_memory")
    assert kept(1 << 20) == 0
    for mode, most in (("0\n", 4), ("1\n", 4), ("2\n", 0)):
        metadata.OVERCOMMIT.write_text(mode)
        assert kept(1 << 20) == most
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 40, 1 << 40))
    metadata.OVERCOMMIT.write_text("0\n")
    assert kept(1 << 20) == 0


def test_a_full_image_uses_the_memory_of_spare_metadata(image: Path) -> None:
    with filled(image, "1M") as h:
        whole = h.stats()["metadata_bytes"]
        readers = []
        for i in range(6):
            h.put("b", bytes([i]))
            h.commit()
            readers.append(kho.live.attach(image))
        for reader in readers:
            reader.close()
        h.put("b", b"")
        h.commit()
        assert whole < h.stats()["metadata_bytes"] <= whole + (1 << 20)
        with pytest.raises(kho.OutOfMemoryError):
            h.put("c", bytes(1 << 20))
        assert h.stats()["metadata_bytes"] <= whole
        h.put("c", bytes(h.stats()["largest_free"] // 2))
        h.commit()
        h.verify()


def test_an_owner_that_takes_back_commits_to_no_page_that_a_child_of_its_successor_writes(image: Path) -> None:
    old = filled(image)
    old.hand_over()
    go, told = os.pipe(), os.pipe()

    def successor() -> None:
        h = kho.live.attach(image).adopt()
        h.put("gone", b"gone")
        # Pages that the previous owner has reserved for its next metadata, and that are free for this one.
        gap = old._space.reserve
        h._space.set_reserve((0, 0))
        h._space.runs.take(*gap)
        whole = h._memory.exporter(gap[0] * 4096, gap[1] * 4096)
        item = Item("rest", BASE + gap[0] * 4096, gap[1] * 4096, None, (gap[1] * 4096,), 0, 0)
        h._writers[item.phys] = whole
        h._changes["rest"] = Change(item)

        def write() -> None:
            signal.alarm(20)  # no process waits for it
            os.write(told[1], b".")
            os.read(go[0], 1)
            memoryview(whole).cast("B")[:] = b"\xff" * len(whole)
            os.write(told[1], b".")
            os.read(go[0], 1)

        child(write)
        die()

    assert ended(child(successor)) < 0
    os.read(told[0], 1)
    old.take_back()
    old.put("b", b"two")
    generation = old.commit()
    os.write(go[1], b".")
    os.read(told[0], 1)
    with kho.live.attach(image) as reader:
        assert (reader.generation, bytes(reader["b"])) == (generation, b"two")
        reader.verify()
    os.write(go[1], b".")
    old.close()


def test_an_owner_that_replaces_an_object_in_turn_makes_no_page_fault_and_no_write(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it next to readers: each of both takes locks of pages that the page faults of readers take."""
    written: list[int] = []
    pwrite = os.pwrite

    def count(fd: int, data: Any, at: int) -> int:
        written.append(len(data))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", count)
    h, nbytes = filled(image), 250_000

    def faults() -> list[int]:
        found = []
        for value in [bytes([i]) * nbytes for i in range(8)]:
            with kho.live.attach(image) as reader:
                reader.verify()
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            h.put("a", value)
            h.commit()
            found.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
            assert bytes(h["a"]) == value
        return found

    faults()
    assert written, "new pages are written without a page fault"
    written.clear()
    assert sum(faults()) < 30, "of 62 pages each time"
    assert not written
