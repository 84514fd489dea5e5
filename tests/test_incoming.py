"""kho.Incoming: the state that the next owner reads, and restoring folios, each at most once."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kho
from kho.handover.verify import verify

import captures
import model
from bounded import bounded
from images import GIB, MIB

BASE = GIB
P = 4096
BLOB = model.write_fdt(model.Node({"compatible": b"example-v1\0"}))
KHOP = 0x4B484F50
BACKINGS = pytest.mark.parametrize("backing", [None, "memfd"])


class FinalizedHandover:
    """A finalized handover: folios of orders 0, 2 and 4 that contain their address, a range of 30 pages, a blob."""

    def __init__(self, backing: str | None = None, bitmap_bytes: int = 4096, page_size: int = P) -> None:
        self.arena = kho.Arena([(BASE, 8 * GIB)], backing=backing, scratch="64M,64M,64M", page_size=page_size)
        out = kho.Outgoing(self.arena, bitmap_bytes=bitmap_bytes)
        self.folios = [self.arena.alloc(order) for order in (0, 2, 4)]
        for folio in self.folios:
            out.preserve_folio(folio)
            self.arena.write(folio.phys, f"folio at {folio.phys:#x}".encode())
        self.unpreserved = self.arena.alloc(1)
        self.range = self.arena.alloc_at(BASE + 64 * page_size * 64, 5).phys + page_size
        out.preserve_pages(self.range, 30)
        self.arena.write(self.range, bytes(range(256)) * (30 * page_size // 256))
        self.blob = out.add_subtree("producer", BLOB)
        self.fdt = out.finalize()
        self.preserved = out.folios()


# Taking over an arena


@pytest.mark.smoke
@BACKINGS
def test_the_next_owner_reads_all_that_was_handed_over(backing: str | None) -> None:
    handover = FinalizedHandover(backing)
    inc = kho.Incoming(handover.arena, handover.fdt)
    assert inc.folios == handover.preserved
    assert (inc.compatible, inc.page_size, inc.bitmap_bytes) == ("kho-v1", P, 4096)
    assert inc.nr_folios == 13
    assert sum(n for n in inc.folios_by_order.values()) == 13
    assert inc.preserved_bytes == (1 + 4 + 16 + 30 + 2) * P
    assert (inc.fdt_phys, inc.scratch, inc.others, inc.pages_outside) == (handover.fdt, handover.arena.scratch, [], 0)
    assert inc.page_size_why == "the arena's"
    assert inc.tracker().folios() == inc.folios == inc.unrestored()
    for original in handover.folios:
        folio = inc.restore_folio(original.phys)
        assert (folio.phys, folio.order, folio.refcount) == (original.phys, original.order, 1)
        assert bytes(folio).rstrip(b"\0") == f"folio at {folio.phys:#x}".encode()
    pages = inc.restore_pages(handover.range, 30)
    assert (pages.phys, pages.pfn, pages.nr_pages, len(pages)) == (handover.range, handover.range // P, 30, 30 * P)
    assert bytes(pages) == bytes(range(256)) * (30 * P // 256) == bytes(memoryview(pages))
    assert inc.retrieve_subtree("producer").read() == BLOB
    assert inc.retrieve_subtree("producer").phys == handover.blob
    assert list(inc.unrestored()) == sorted([(handover.fdt, 0), (handover.blob, 0)])
    assert inc.nr_restored == 11


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), [(p, b) for p in (4096, 16384, 65536) for b in (512, p)])
def test_every_page_and_bitmap_size_can_be_taken_over(page_size: int, bitmap_bytes: int) -> None:
    arena = kho.Arena([(BASE, 64 * GIB)], page_size=page_size, scratch="512M,512M,512M")
    out = kho.Outgoing(arena, bitmap_bytes=bitmap_bytes)
    folios = [arena.alloc(order) for order in (0, 1, 5, arena.max_page_order)]
    for i, folio in enumerate(folios):
        out.preserve_folio(folio)
        memoryview(folio)[-1] = i + 1
    inc = kho.Incoming(arena, out.finalize())
    assert (inc.page_size, inc.folios) == (page_size, out.folios())
    assert [inc.restore_folio(f.phys).order for f in folios] == [f.order for f in folios]
    for i, folio in enumerate(folios):
        assert arena.read(folio.phys + folio.nbytes - 1, 1)[0] == i + 1


def test_a_folio_can_be_restored_once() -> None:
    handover = FinalizedHandover()
    inc = kho.Incoming(handover.arena, handover.fdt)
    first, second, _ = handover.folios
    inc.restore_folio(first.phys)
    cases = {
        first.phys: "restored before",
        second.phys + P: f"inside the folio of order 2 at {second.phys:#x}",
        second.phys + 1: "not a multiple of the page size",
        handover.unpreserved.phys: "was not preserved",
        0: "was not preserved",
        2**64 - P: "was not preserved",
    }
    for phys, why in cases.items():
        with pytest.raises(kho.NotRestorableError, match=why) as caught:
            inc.restore_folio(phys)
        assert str(caught.value).startswith(f"folio at {phys:#x}: ")
    assert inc.nr_restored == 1
    assert inc.restore_folio(second).order == 2, "the folio object of the former owner is an address"


def test_a_range_of_pages_is_restored_completely_or_not_at_all() -> None:
    handover = FinalizedHandover()
    inc = kho.Incoming(handover.arena, handover.fdt)
    for phys, n in (
        (handover.range, 31),
        (handover.range + 2 * P, 28),
        (handover.range - P, 2),
        (handover.range + 1, 1),
    ):
        with pytest.raises(kho.NotRestorableError):
            inc.restore_pages(phys, n)
    with pytest.raises(kho.KhoError):
        inc.restore_pages(handover.range, 2**64 - 1)
    assert inc.nr_restored == 0
    first = model.greedy_split(handover.range // P, 30)[2]
    inc.restore_folio(first[0] * P)
    with pytest.raises(kho.NotRestorableError, match="restored before"):
        inc.restore_pages(handover.range, 30)
    assert inc.nr_restored == 1
    for pfn, order in model.greedy_split(handover.range // P, 30):
        if pfn != first[0]:
            pages = inc.restore_pages(pfn * P, 1 << order)
            assert pages.nr_pages == 1 << order


@BACKINGS
@pytest.mark.parametrize("make", [lambda phys: array("Q", phys), lambda phys: np.array(phys, np.int64)])
def test_a_list_of_folios_is_restored_completely_or_not_at_all(
    backing: str | None, make: Callable[[list[int]], Any]
) -> None:
    handover = FinalizedHandover(backing)
    inc = kho.Incoming(handover.arena, handover.fdt)
    phys = [folio.phys for folio in handover.folios]
    for bad in (phys[1], phys[1] + P, handover.unpreserved.phys, phys[0] + 8, 1 << 60):
        with pytest.raises(kho.NotRestorableError, match=f"{bad:#x}"):
            inc.restore_many(make([*phys, bad, handover.unpreserved.phys]))
    assert inc.nr_restored == handover.arena.allocated_pages == 0
    assert inc.restore_many(make([])) == b""
    assert inc.restore_many(make(phys[::-1])) == bytes([4, 2, 0])
    assert (inc.nr_restored, handover.arena.allocated_pages) == (3, 21)
    for folio in phys:
        assert handover.arena.page(folio).state == "head"
        assert handover.arena.read(folio, 64).rstrip(b"\0") == f"folio at {folio:#x}".encode()
    with pytest.raises(kho.NotRestorableError, match="restored before"):
        inc.restore_many(make([handover.fdt, phys[2]]))
    image = kho.open(handover.arena, fdt_phys=handover.fdt)
    assert image.restore_many(make(phys)) == bytes([0, 2, 4])
    kho.Outgoing(handover.arena).finalize()
    kho.Incoming(handover.arena)
    with pytest.raises(kho.StaleError):
        inc.restore_many(make([handover.fdt]))


def test_the_map_in_an_arena_is_read_in_place() -> None:
    """A bitmap of order 0 spans 128 MiB. If all of that is memory of the arena, the bitmap is used in place."""
    arena = kho.Arena([(GIB, 4 * GIB)])
    pages = arena.alloc_at(2 * GIB, 18)
    out = kho.Outgoing(arena, "kho-v4")
    phys: Any = np.arange(pages.phys, pages.phys + GIB, 8 * P)
    assert out.preserve_many(phys) == len(phys)
    inc = kho.Incoming(arena, out.finalize())
    stats = inc.stats()
    # 8 leaves for the pages and one for the FDT; the other pages of the map are inner nodes.
    assert (stats["blocks"], stats["in_place_bytes"]) == (9, 9 * P)
    assert stats["map_bytes"] == inc.metadata_pages * P > 9 * P
    assert stats["held_bytes"] < 32 << 10
    assert inc.nr_folios == len(phys) + 1
    image = kho.open(arena, fdt_phys=inc.fdt_phys)
    assert image.stats()["in_place_bytes"] == 0
    assert image.stats()["held_bytes"] > 9 * P


def test_each_page_of_a_restored_range_is_a_separate_folio() -> None:
    handover = FinalizedHandover()
    inc = kho.Incoming(handover.arena, handover.fdt)
    pages = inc.restore_pages(handover.range, 30)
    view = memoryview(pages)
    for i in range(30):
        info = handover.arena.page(handover.range + i * P)
        assert (info.state, info.order, info.refcount) == ("head", 0, 1)
    handover.arena.free(handover.range + 7 * P)
    assert handover.arena.page(handover.range + 7 * P).state == "free"
    assert handover.arena.page(handover.range + 8 * P).state == "head"
    for use in (memoryview, bytes):
        with pytest.raises(kho.PageStateError):
            use(pages)
    assert view.nbytes == 30 * P


@pytest.mark.parametrize(("bitmap_bytes", "marker"), [(512, 2), (4096, KHOP << 32 | 2)])
def test_restoring_clears_the_marker(bitmap_bytes: int, marker: int) -> None:
    handover = FinalizedHandover(bitmap_bytes=bitmap_bytes)
    phys = handover.folios[1].phys
    assert handover.arena.page(phys).private == 0
    inc = kho.Incoming(handover.arena, handover.fdt)
    info = handover.arena.page(phys)
    assert (info.state, info.private, info.refcount) == ("reserved", marker, 0)
    assert handover.arena.page(phys + P).private == 0
    inc.restore_folio(phys)
    info = handover.arena.page(phys)
    assert (info.state, info.order, info.private, info.refcount) == ("head", 2, 0, 1)
    assert handover.arena.page(phys + P).head == phys


def test_alloc_never_returns_preserved_memory() -> None:
    arena = kho.Arena([(BASE, 4 * MIB)], scratch=[(BASE + MIB, MIB)])
    out = kho.Outgoing(arena)
    kept = [arena.alloc(order) for order in (0, 3, 5, 0)]
    for folio in kept:
        out.preserve_folio(folio)
    inc = kho.Incoming(arena, out.finalize())
    forbidden = {phys + i * P for phys, order in inc.folios for i in range(1 << order)}
    forbidden |= set(range(BASE + MIB, BASE + 2 * MIB, P))
    got = set()
    while arena.free_pages:
        got.add(arena.alloc().phys)
    assert not got & forbidden
    assert len(got) + len(forbidden) == 4 * MIB // P
    with pytest.raises(kho.OutOfMemoryError):
        arena.alloc()
    with pytest.raises(kho.PageStateError, match="is reserved"):
        arena.free(kept[1].phys)
    restored = inc.restore_folio(kept[1].phys)
    assert restored.free() is True, "a restored folio can be freed"
    assert arena.alloc(3).phys == kept[1].phys
    assert len(inc.unrestored()) == 4


def test_memory_that_is_not_restored_is_free_after_the_next_kexec() -> None:
    handover = FinalizedHandover()
    inc = kho.Incoming(handover.arena, handover.fdt)
    folio = inc.restore_folio(handover.folios[2].phys)
    out = kho.Outgoing(handover.arena)
    out.preserve_folio(folio)
    last = kho.Incoming(handover.arena, out.finalize())
    assert list(last.folios) == sorted([(folio.phys, 4), (out.fdt_phys, 0)])
    assert handover.arena.page(handover.folios[1].phys).state == "free"
    assert bytes(last.restore_folio(folio.phys)).rstrip(b"\0") == f"folio at {folio.phys:#x}".encode()


def test_the_former_owner_loses_access() -> None:
    handover = FinalizedHandover()
    arena, old = handover.arena, handover.folios[0]
    out_arena_view = memoryview(old)
    out = kho.Incoming(arena, handover.fdt)
    uses = (lambda: memoryview(old), lambda: bytes(old), old.free, old.get, lambda: old.refcount)
    for use in uses:
        with pytest.raises(kho.StaleError, match="taken over"):
            use()
    assert bytes(out_arena_view[:5]) == b"folio", "mapped memory stays mapped"
    again = kho.Outgoing(arena)
    kho.Incoming(arena, again.finalize())
    with pytest.raises(kho.StaleError):
        again.serialize()
    with pytest.raises(kho.StaleError):
        again.abort()
    with pytest.raises(kho.StaleError):
        again.add_subtree("x", b"")
    with pytest.raises(kho.StaleError):
        out.restore_folio(handover.folios[1].phys)
    with pytest.raises(kho.StaleError):
        out.restore_pages(handover.range, 1)
    assert out.nr_folios == 13, "the parsed map stays available"


def test_taking_over_without_a_handover_raises() -> None:
    arena = kho.Arena("64M")
    with pytest.raises(kho.NoHandoverError):
        kho.Incoming(arena)
    with pytest.raises(kho.NoHandoverError):
        kho.open(arena)
    out = kho.Outgoing(arena)
    folio = arena.alloc()
    out.finalize()
    out.abort()
    with pytest.raises(kho.NoHandoverError):
        kho.Incoming(arena)
    with pytest.raises(kho.FormatError):
        kho.Incoming(arena, folio.phys)
    with pytest.raises(kho.OutsideMemoryError):
        kho.Incoming(arena, 2**40)
    assert folio.refcount == 1, "a failed call changes nothing"
    with pytest.raises(kho.ParameterError, match="the arena's pages have 4096 bytes"):
        kho.Incoming(arena, page_size=16384)
    with pytest.raises(TypeError):
        kho.Incoming("arena.elf")  # type: ignore[arg-type]


def test_a_map_with_memory_outside_the_arena_raises() -> None:
    """The arena cannot reserve memory that it does not have, so the takeover fails as a whole."""
    arena = kho.Arena([(BASE, 8 * MIB)], backing="memfd")
    out = kho.Outgoing(arena)
    out.preserve_folio(arena.alloc(1))
    head = model.read_fdt(out.serialize()).int("preserved-memory-map")
    bitmap = int.from_bytes(arena.read(head + 24, 8), "little")
    page = bytearray(arena.read(bitmap, 4096))
    page[400] |= 1
    fdt = out.finalize()
    # Written through the file, as another process could; Arena.write refuses this address.
    os.pwrite(arena.fileno(), bytes(page), 2 * MIB + bitmap - BASE)
    with pytest.raises(kho.OutsideMemoryError, match="preserved range"):
        kho.Incoming(arena, fdt)
    assert out.finalized
    out.abort()


def test_gigantic_folios_are_restored_unless_max_page_order_is_given() -> None:
    arena = kho.Arena([(0, 8 * GIB)])
    out = kho.Outgoing(arena)
    folio = arena.alloc(18, gigantic=True)
    memoryview(folio)[-1] = 9
    out.preserve_folio(folio)
    out.finalize()
    with pytest.raises(kho.NotRestorableError, match="order 18 exceeds MAX_PAGE_ORDER 10"):
        kho.open(arena, max_page_order=10).restore_folio(folio.phys)
    inc = kho.Incoming(arena)
    assert memoryview(inc.restore_folio(folio.phys))[-1] == 9


# Views, threads, images


def test_writes_to_restored_memory_are_in_place() -> None:
    handover = FinalizedHandover()
    inc = kho.Incoming(handover.arena, handover.fdt)
    folio, pages = inc.restore_folio(handover.folios[0].phys), inc.restore_pages(handover.range, 30)
    np.asarray(folio)[:] = 7
    memoryview(pages)[P : P + 4] = b"here"
    assert handover.arena.read(folio.phys, P) == b"\7" * P
    assert handover.arena.read(handover.range + P, 4) == b"here"
    view = memoryview(pages)
    del inc, folio, pages, handover
    gc.collect()
    assert bytes(view[P : P + 4]) == b"here"


def test_concurrent_threads_restore_each_folio_once() -> None:
    arena = kho.Arena("1G")
    out = kho.Outgoing(arena)
    folios = [arena.alloc().phys for _ in range(2000)]
    for phys in folios:
        out.preserve_folio(phys)
    inc = kho.Incoming(arena, out.finalize())
    restored_here: list[int] = []

    def restore() -> None:
        for phys in folios:
            try:
                restored_here.append(inc.restore_folio(phys).phys)
            except kho.NotRestorableError:
                continue

    threads = [threading.Thread(target=restore) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(restored_here) == sorted(folios)


def test_restoring_from_an_image_does_not_change_it(tmp_path: Path) -> None:
    path = tmp_path / "arena.elf"
    arena = kho.Arena([(BASE, 64 * MIB)], backing=path, scratch="4M,4M,4M")
    out = kho.Outgoing(arena)
    folio = arena.alloc(2)
    memoryview(folio)[:4] = b"data"
    out.preserve_folio(folio)
    out.finalize()
    del out
    for inc in (kho.open(path), kho.open(arena), kho.open(str(path)), kho.open(kho.Memory.open(path))):
        restored = inc.restore_folio(folio.phys)
        view = memoryview(restored)
        assert (bytes(view[:4]), view.readonly, view.nbytes) == (b"data", True, 4 * P)
        with pytest.raises(kho.NotRestorableError):
            inc.restore_folio(folio.phys)
        assert inc.scratch == arena.scratch
        assert inc.page_size_why == "the arena's"
        with pytest.raises(kho.ParameterError, match="in an image"):
            restored.free()
    assert kho.Incoming(arena).nr_restored == 0


TAKE_OVER = """
import sys, kho
arena = kho.Arena.open(sys.argv[1] if len(sys.argv) == 2 else int(sys.argv[2]))
inc = kho.Incoming(arena)
folio = inc.restore_folio({phys})
print(bytes(folio)[:5].decode(), inc.nr_folios, arena.page({phys}).state, arena.fdt_phys)
memoryview(folio)[:5] = b"reply"
out = kho.Outgoing(arena)
out.preserve_folio(folio)
out.finalize()
"""


@pytest.mark.parametrize("backing", ["memfd", "file"])
def test_another_process_takes_over_and_hands_over_again(backing: str, tmp_path: Path) -> None:
    path = tmp_path / "arena.elf"
    arena = kho.Arena([(BASE, 64 * MIB)], backing="memfd" if backing == "memfd" else path)
    out = kho.Outgoing(arena)
    folio = arena.alloc(3)
    memoryview(folio)[:5] = b"hello"
    out.preserve_folio(folio)
    out.finalize()
    args = [str(path)] if backing == "file" else ["fd", str(arena.fileno())]
    done = subprocess.run(
        [sys.executable, "-c", TAKE_OVER.format(phys=folio.phys), *args],
        capture_output=True,
        text=True,
        pass_fds=[arena.fileno()],
    )
    assert (done.stdout, done.stderr) == ("hello 2 head None\n", "")
    again = kho.Arena.open(path if backing == "file" else arena.fileno())
    assert again.fdt_phys is not None
    inc = kho.Incoming(again)
    assert bytes(inc.restore_folio(folio.phys))[:5] == b"reply"


def test_a_search_of_the_file_of_an_arena_skips_its_holes() -> None:
    arena = kho.Arena([(BASE, 256 << 30), (BASE + (512 << 30), 768 << 30)], backing="memfd")
    far = arena.alloc_at(BASE + (1000 << 30), 0)
    out = kho.Outgoing(arena)
    out.preserve_folio(far)
    out.finalize()
    fdt = arena.fdt_phys
    kho.Incoming(arena)
    assert arena.fdt_phys is None  # the reader has to search the memory
    for page in far.phys - 8192, far.phys + MIB:  # FDT and map are in the pages after far.phys
        arena.write(page, b"data, so that the page is not a hole")
    seen: list[int] = []
    with bounded(5):
        inc = kho.open(arena, progress=seen.append)
        found = verify(arena)
    assert (inc.fdt_phys, list(inc.folios)) == (fdt, [(far.phys, 0), (fdt, 0)])
    assert [finding for finding in found if finding.severity == "error"] == []
    assert os.fstat(arena.fileno()).st_blocks * 512 < MIB
    assert max(seen) < 16 * MIB


def test_an_fdt_whose_address_is_given_is_read_without_a_search() -> None:
    path = captures.elf("linux-7.3.4-x86_64")
    searched: list[int] = []
    found = kho.open(path, progress=searched.append)
    assert searched[-1] > 100_000
    told: list[int] = []
    inc = kho.open(path, fdt_phys=found.fdt_phys, progress=told.append)
    assert (list(inc.folios), inc.scratch, inc.scratch_phys) == (list(found.folios), None, None)
    inc = kho.open(path, fdt_phys=found.fdt_phys, scratch=found.scratch_phys, progress=told.append)
    assert (inc.scratch, inc.scratch_phys) == (found.scratch, found.scratch_phys)
    inc = kho.open(path, fdt_phys=found.fdt_phys, scratch=found.scratch, progress=told.append)
    assert (inc.scratch, inc.scratch_phys) == (found.scratch, None)
    assert told == []


def test_a_scratch_array_that_is_not_where_it_is_named_is_refused() -> None:
    path = captures.elf("linux-7.3.4-x86_64")
    found = kho.open(path)
    for fdt in (found.fdt_phys, None):
        with pytest.raises(kho.ParameterError, match=f"scratch: no scratch array lies at {found.fdt_phys:#x}"):
            kho.open(path, fdt_phys=fdt, scratch=found.fdt_phys)
        with pytest.raises(kho.OutsideMemoryError):
            kho.open(path, fdt_phys=fdt, scratch=1 << 60)
    with pytest.raises(TypeError):
        kho.open(path, scratch="0x1000")  # type: ignore[arg-type]


def dense(nbytes: int) -> kho.Memory:
    """Return memory without holes and without a handover; it occupies 64 MiB, whatever its size."""
    part = b"\xaa" * (64 * MIB)
    return kho.Memory.from_segments([(BASE + at, part) for at in range(0, nbytes, len(part))])


def test_an_exception_in_progress_ends_the_search() -> None:
    memory = dense(64 * MIB)
    seen: list[int] = []

    def progress(nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        kho.open(memory, progress=progress)
    assert len(seen) == 3
    with pytest.raises(kho.NoHandoverError):
        kho.open(memory, progress=seen.append)
    assert seen[-1] >= 64 * MIB


def test_a_signal_ends_a_search_without_a_progress_callback() -> None:
    """As Ctrl-C does during a search of a terabyte. Compares the CPU time of an interrupted search with a full one."""
    memory = dense(8 * GIB)
    before = signal.signal(signal.SIGVTALRM, lambda *_: 1 // 0)
    took = []
    try:
        for interrupt in (0, 0.01):
            signal.setitimer(signal.ITIMER_VIRTUAL, interrupt)
            began = time.thread_time()
            with pytest.raises(ZeroDivisionError if interrupt else kho.NoHandoverError):
                kho.open(memory)
            took.append(time.thread_time() - began)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert took[1] < took[0] / 2


def test_repr_and_attributes_show_what_was_read() -> None:
    handover = FinalizedHandover()
    inc = kho.open(handover.arena)
    assert repr(inc) == f"<kho.Incoming kho-v1 at {handover.fdt:#x}: 13 folios>"
    assert repr(inc.subtrees["producer"]) == f'<kho.Subtree "producer" at {handover.blob:#x}, {len(BLOB)} bytes>'
    with pytest.raises(kho.NotFoundError, match='"absent"'):
        inc.retrieve_subtree("absent")
    assert inc.fdt["/producer"].u64("fdt") == handover.blob
    assert inc.read(handover.blob, len(BLOB)) == BLOB


@pytest.mark.parametrize(("abi", "cut"), [("kho-v1", False), ("kho-v2", False), ("kho-v3", True), ("kho-v4", True)])
def test_pages_of_an_image_are_restored_as_they_were_cut_at_nodes(abi: str, cut: bool, tmp_path: Path) -> None:
    """The image does not tell where its machine's nodes begin; what was preserved does."""
    page, border = 4096, 0x80_6000
    arena = kho.Arena([(0, border, 0), (border, (16 << 20) - border, 1)])
    start, n = 0x80_0000, 16
    for pfn in range(start // page, start // page + n):
        arena.alloc_at(pfn * page)
    out = kho.Outgoing(arena, abi)
    out.preserve_pages(start, n)
    out.finalize()
    out.save(tmp_path / "x.elf")
    inc = kho.open(tmp_path / "x.elf", page_size=page)
    assert inc.order_at(start) == (2 if cut else 4)
    inc.restore_pages(start, n)
    assert not [folio for folio in inc.unrestored() if start <= folio.phys < start + n * page]
    with pytest.raises(kho.errors.NotRestorableError):
        inc.restore_pages(start, n)
