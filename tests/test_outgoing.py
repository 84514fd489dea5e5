"""Handing over: what is preserved, what it looks like in memory, and what is refused."""

from __future__ import annotations

import struct
from array import array

import pytest

import kho

import model
from adapters import ArenaMemory
from images import GIB, KIB, MIB

BASE = GIB
P = 4096
SHAPES = pytest.mark.parametrize(
    ("page_size", "bitmap_bytes"), [(p, b) for p in (4096, 16384, 65536) for b in (512, p)]
)
BLOB = model.write_fdt(model.Node({"compatible": b"example-v1\0"}))


def small(**options: object) -> kho.Arena:
    """1 GiB at 1 GiB, with scratch at its end."""
    scratch = [(BASE + 896 * MIB, 64 * MIB), (BASE + 960 * MIB, 64 * MIB)]
    return kho.Arena([(BASE, GIB)], **{"scratch": scratch, **options})  # type: ignore[arg-type]


def handover(out: kho.Outgoing) -> model.Handover:
    """What the model reads from the arena."""
    return model.read_handover(ArenaMemory(out.arena), out.fdt_phys, out.arena.page_size, out.bitmap_bytes)


# What is written


@pytest.mark.smoke
@SHAPES
def test_the_model_reads_what_was_handed_over(page_size: int, bitmap_bytes: int) -> None:
    arena = kho.Arena([(BASE, 16 * GIB)], page_size=page_size)
    out = kho.Outgoing(arena, bitmap_bytes=bitmap_bytes)
    folios = [arena.alloc(order) for order in (0, 0, 1, 4, 9)]
    for folio in folios:
        memoryview(folio)[:8] = struct.pack("<Q", folio.phys)
        assert out.preserve_folio(folio) is True
        assert out.preserve_folio(folio) is False
    phys = out.add_subtree("producer", BLOB)
    blob = out.serialize()
    assert arena.read(out.fdt_phys, len(blob)) == blob
    found = handover(out)
    assert found.compatible == "kho-v1" == out.abi
    assert found.folios == sorted([(f.phys, f.order) for f in folios] + [(out.fdt_phys, 0), (phys, 0)])
    assert found.folios == list(out.folios())
    assert found.subtrees == {"producer": (phys, BLOB)}
    assert out.subtrees == {"producer": (phys, len(BLOB))}
    assert (out.nr_folios, out.preserved_bytes) == (7, found.preserved_bytes)
    assert blob == model.write_fdt(found.root)
    for folio in folios:
        assert arena.read(folio.phys, 8) == struct.pack("<Q", folio.phys)


def chunks(out: kho.Outgoing) -> list[tuple[int, int, int, list[tuple[int, int]]]]:
    """(phys, order, num_elms, [(phys_start, bitmap)]) of each chunk, read with nothing but struct."""
    at = model.read_fdt(out.serialize()).int("preserved-memory-map")
    found = []
    while at:
        page = out.arena.read(at, out.arena.page_size)
        following, order, num = struct.unpack_from("<QII", page)
        entries = [struct.unpack_from("<QQ", page, 16 + 16 * i) for i in range(num)]
        assert not any(page[16 + 16 * num :]), "the rest of a chunk is zero"
        found.append((at, order, num, entries))
        at = following
    return found


def test_a_chunk_is_a_page_of_255_entries() -> None:
    """One bitmap of 512 bytes spans 16 MiB: 2^10 of them make chunks of 255, 255, 255, 255 and 4 entries."""
    arena = kho.Arena("16G")
    out = kho.Outgoing(arena, bitmap_bytes=512)
    for i in range(1, 1024):
        arena.alloc_at(i * 16 * MIB)
        out.preserve_folio(i * 16 * MIB)
    found = chunks(out)
    assert [num for _, _, num, _ in found] == [255, 255, 255, 255, 4]
    assert {order for _, order, _, _ in found} == {0}
    entries = [entry for chunk in found for entry in chunk[3]]
    assert [start for start, _ in entries] == [i * 16 * MIB for i in range(1024)]
    assert len({bitmap for _, bitmap in entries}) == 1024
    for i, (_, bitmap) in enumerate(entries[1:], 1):
        assert arena.read(bitmap, 512) == b"\1" + bytes(511), i
    assert all(at % P == 0 for at, *_ in found)
    assert len(model.read_v1(ArenaMemory(arena), found[0][0], P, 512)[0]) == out.nr_folios


@SHAPES
def test_orders_ascend_and_each_begins_a_chunk(page_size: int, bitmap_bytes: int) -> None:
    arena = kho.Arena([(BASE, 64 * GIB)], page_size=page_size)
    out = kho.Outgoing(arena, bitmap_bytes=bitmap_bytes)
    for order in (9, 0, 5, 2):
        out.preserve_folio(arena.alloc(order))
    gone = arena.alloc(3)
    out.preserve_folio(gone)
    assert out.unpreserve_folio(gone) is True
    found = chunks(out)
    assert [order for _, order, _, _ in found] == [0, 2, 3, 5, 9], "an order whose bitmaps are empty still appears"
    for _, order, num, entries in found:
        assert num == 1
        start, bitmap = entries[0]
        assert start % (8 * bitmap_bytes * page_size << order) == 0
        assert len(model.set_bits(arena.read(bitmap, bitmap_bytes))) == {0: 2, 3: 0}.get(order, 1)


def test_bitmaps_stay_and_chunks_are_written_anew() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    before = chunks(out)
    out.preserve_folio(arena.alloc(4))
    allocated = arena.allocated_pages
    after = chunks(out)
    assert after[0][3] == before[0][3], "the bitmap of order 0 lies where it was"
    for _ in range(5):
        out.serialize()
    assert arena.allocated_pages <= allocated + 2, "earlier chunks are freed"
    for at, _, _, entries in chunks(out):
        for phys in [at, *(bitmap for _, bitmap in entries)]:
            assert arena.page(phys).state == "head"
            assert (phys // P, 0) not in out.tracker(), "the map itself is not preserved"


def test_page_ranges_are_split_as_the_kernel_splits_them() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    arena.alloc_at(BASE + 64 * P, 6)
    start, n = BASE + 65 * P, 30
    split = model.greedy_split(start // P, n)
    assert out.preserve_pages(start, n) == len(split) == 8
    assert set(split) <= set(out.tracker())
    assert out.preserve_pages(start, n) == 0
    assert out.unpreserve_pages(start, n) == 8
    assert out.nr_folios == 1
    assert out.preserve_pages(start, 0) == 0


def test_preserve_all_takes_a_tracker() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    tracker = kho.Tracker()
    for order in (0, 3, 3):
        tracker.preserve(arena.alloc(order).pfn, order)
    assert out.preserve_all(tracker) == 3
    assert (tracker - out.tracker()) == kho.Tracker()
    tracker.preserve((BASE + 800 * MIB) // P)
    with pytest.raises(kho.PageStateError, match=f"{BASE + 800 * MIB:#x} is free"):
        out.preserve_all(tracker)
    with pytest.raises(kho.ParameterError, match="page size"):
        out.preserve_all(kho.Tracker(page_size=65536))
    assert out.nr_folios == 4


# What is refused


def test_scratch_is_not_preserved() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    scratch = arena.scratch[0][0]
    with pytest.raises(kho.ScratchOverlapError, match=f"folio at {scratch:#x} .* overlaps the scratch area"):
        out.preserve_folio(scratch, 0)
    with pytest.raises(kho.ScratchOverlapError):
        out.preserve_pages(scratch - P, 2)
    with pytest.raises(kho.ScratchOverlapError):
        out.preserve_pages(sum(arena.scratch[-1]) - P, 1)
    with pytest.raises(kho.ScratchOverlapError):
        out.link_subtree("x", scratch + 8, 8)
    with pytest.raises(kho.PageStateError, match="is reserved"):
        kho.Outgoing(small(), fdt_phys=scratch)
    assert out.nr_folios == 1


def test_only_allocated_memory_is_preserved() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    free = BASE + 512 * MIB
    with pytest.raises(kho.PageStateError, match=f"page at {free:#x} is free"):
        out.preserve_folio(free, 0)
    with pytest.raises(kho.PageStateError):
        out.preserve_folio(free)
    folio = arena.alloc_at(free, 1)
    with pytest.raises(kho.PageStateError, match=f"page at {free + 2 * P:#x}"):
        out.preserve_pages(free, 3)
    with pytest.raises(kho.PageStateError):
        out.preserve_folio(free, 2)
    for wrong, error in ((free + 1, kho.MisalignedError), (2**64 - P, kho.OutsideMemoryError)):
        with pytest.raises(error):
            out.preserve_folio(wrong, 0)
    with pytest.raises(kho.MisalignedError):
        out.preserve_folio(free + P, 1)
    for order in (37, 64, 2**32, 2**64 - 1):
        with pytest.raises(kho.OrderError):
            out.preserve_folio(free, order)
    with pytest.raises(kho.KhoError):
        out.preserve_pages(free, 2**52)
    with pytest.raises(kho.KhoError):
        out.preserve_pages(free, 2**64 - 1)
    assert out.preserve_folio(folio.phys + P, 0) is True, "part of a folio may be preserved"
    assert out.nr_folios == 2


def test_what_is_preserved_is_not_freed() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    folio = arena.alloc(2)
    out.preserve_folio(folio)
    with pytest.raises(kho.PageStateError, match="is preserved"):
        folio.free()
    folio.get()
    assert folio.free() is False
    out.unpreserve_folio(folio)
    assert folio.free() is True
    with pytest.raises(kho.PageStateError, match="is preserved"):
        arena.free(out.fdt_phys)


def test_the_fdts_own_page_stays_preserved() -> None:
    out = kho.Outgoing(small())
    phys = out.add_subtree("producer", BLOB)
    for mine in (out.fdt_phys, phys):
        with pytest.raises(kho.ParameterError, match=f"{mine:#x} holds the FDT or a subtree"):
            out.unpreserve_folio(mine, 0)
    with pytest.raises(kho.ParameterError):
        out.unpreserve_pages(out.fdt_phys, 1)
    assert {(out.fdt_phys, 0), (phys, 0)} == set(out.folios())


@pytest.mark.parametrize("abi", ["", "kho-v0", "kho-v99", "KHO-V1"])
def test_versions_that_are_not_written_are_named(abi: str) -> None:
    with pytest.raises(kho.UnsupportedAbiError, match=f'compatible "{abi}"'):
        kho.Outgoing(small(), abi)


def test_placements() -> None:
    arena = small()
    out = kho.Outgoing(arena, fdt_phys=BASE + 8 * MIB, map_phys=BASE + 9 * MIB)
    assert out.fdt_phys == BASE + 8 * MIB
    assert [chunk[0] for chunk in chunks(out)] == [BASE + 9 * MIB]
    assert out.add_subtree("there", BLOB, phys=BASE + 10 * MIB) == BASE + 10 * MIB
    with pytest.raises(kho.PageStateError):
        out.add_subtree("taken", BLOB, phys=BASE + 10 * MIB)
    with pytest.raises(kho.MisalignedError):
        out.add_subtree("odd", BLOB, phys=BASE + 11 * MIB + 1)
    assert list(out.subtrees) == ["there"]


def test_a_placement_that_fails_leaves_nothing_behind() -> None:
    arena = small()
    taken = arena.alloc()
    free = arena.free_pages
    for fdt_phys, map_phys in (
        (taken.phys, BASE + MIB),
        (BASE + MIB, taken.phys),
        (BASE + MIB + 1, BASE + 2 * MIB),
        (BASE + MIB, BASE + MIB),
    ):
        with pytest.raises(kho.KhoError):
            kho.Outgoing(arena, fdt_phys=fdt_phys, map_phys=map_phys)
        assert arena.free_pages == free
    for wrong in (0, 511, 1024, 8192):
        with pytest.raises(kho.ParameterError):
            kho.Outgoing(arena, bitmap_bytes=wrong)
    assert arena.free_pages == free


def test_one_handover_at_a_time() -> None:
    arena = small()
    free = arena.free_pages
    out = kho.Outgoing(arena)
    with pytest.raises(kho.ParameterError, match="handed over already"):
        kho.Outgoing(arena)
    out.preserve_folio(arena.alloc())
    out.add_subtree("producer", BLOB)
    out.serialize()
    del out
    assert arena.free_pages == free - 1, "a handover that is dropped leaves the caller's folio alone"
    again = kho.Outgoing(arena)
    again.finalize()
    del again
    with pytest.raises(kho.ParameterError):
        kho.Outgoing(arena)


# Subtrees


def test_subtrees_come_and_go() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    free = arena.free_pages
    first = out.add_subtree("first", BLOB)
    second = out.add_subtree("second", bytes(range(256)) * 64)
    assert dict(out.folios())[second] == 2
    assert arena.read(second, 16 * KIB) == bytes(range(256)) * 64
    with pytest.raises(kho.ExistsError, match='"first"'):
        out.add_subtree("first", b"")
    with pytest.raises(kho.ExistsError):
        out.link_subtree("second", first, 8)
    assert list(handover_names(out)) == ["first", "second"]
    out.remove_subtree("first")
    assert arena.page(first).state == "free"
    with pytest.raises(kho.NotFoundError, match='"first"'):
        out.remove_subtree("first")
    out.link_subtree("third", second + 256, 256)
    out.remove_subtree("second")
    out.remove_subtree("third")
    assert (out.subtrees, out.nr_folios) == ({}, 1)
    out.serialize()
    assert arena.free_pages == free - 3, "the bitmap of order 2 is empty and stays, with two chunks"


def handover_names(out: kho.Outgoing) -> list[str]:
    return list(model.read_fdt(out.serialize()).children)


def test_subtrees_are_named_as_nodes_are() -> None:
    out = kho.Outgoing(small())
    free = out.arena.free_pages
    for wrong in ("", "x" * 300, "nul\0"):
        with pytest.raises(kho.FdtError):
            out.add_subtree(wrong, BLOB)
    assert (out.subtrees, out.arena.free_pages, out.nr_folios) == ({}, free, 1)
    with pytest.raises(kho.OutsideMemoryError):
        out.link_subtree("x", 2 * BASE, 1)
    assert out.arena.page(out.add_subtree("empty", b"")).state == "head"


def test_the_fdt_is_one_page() -> None:
    out = kho.Outgoing(small())
    phys = out.add_subtree("blob", BLOB)
    count = 0
    with pytest.raises(kho.FdtError, match="does not fit"):
        for count in range(1000):
            out.link_subtree(f"node-{count:04}", phys, 1)
    assert 50 < count < 200
    assert len(out.subtrees) == count + 1
    assert len(out.serialize()) <= P
    assert handover_names(out)[-1] == f"node-{count - 1:04}"


# Finalize and abort


def test_after_finalize_nothing_changes_until_abort() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    folio = arena.alloc(1)
    out.preserve_folio(folio)
    out.add_subtree("producer", BLOB)
    assert (out.finalized, arena.fdt_phys) == (False, None)
    fdt = out.finalize()
    assert (out.finalized, out.fdt_phys, arena.fdt_phys) == (True, fdt, fdt)
    changes = (
        lambda: out.preserve_folio(folio),
        lambda: out.unpreserve_folio(folio),
        lambda: out.preserve_pages(folio.phys, 1),
        lambda: out.unpreserve_pages(folio.phys, 1),
        lambda: out.preserve_all(kho.Tracker()),
        lambda: out.add_subtree("x", BLOB),
        lambda: out.link_subtree("x", folio.phys, 1),
        lambda: out.remove_subtree("producer"),
        out.finalize,
    )
    for change in changes:
        with pytest.raises(kho.FinalizedError, match="the handover is finalized"):
            change()
    assert handover(out).folios == list(out.folios())
    assert out.serialize() == arena.read(out.fdt_phys, len(out.serialize()))
    out.abort()
    assert (out.finalized, arena.fdt_phys) == (False, None)
    assert not any(arena.read(out.fdt_phys, P)), "there is no FDT before finalize"
    with pytest.raises(kho.FinalizedError, match="not finalized"):
        out.abort()
    assert out.unpreserve_folio(folio) is True
    out.remove_subtree("producer")
    out.finalize()
    assert [list(f) for f in handover(out).folios] == [[out.fdt_phys, 0]]


def test_abort_frees_the_map() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    free = arena.free_pages
    for _ in range(3):
        out.finalize()
        assert arena.free_pages == free - 1
        out.abort()
        assert arena.free_pages == free


def test_memory_that_runs_out_changes_nothing() -> None:
    arena = kho.Arena([(BASE, 16 * P)])
    out = kho.Outgoing(arena)
    folio = arena.alloc()
    held = []
    while arena.free_pages:
        held.append(arena.alloc())
    with pytest.raises(kho.OutOfMemoryError):
        out.serialize()
    with pytest.raises(kho.OutOfMemoryError):
        out.finalize()
    assert not out.finalized
    with pytest.raises(kho.OutOfMemoryError):
        out.add_subtree("x", BLOB)
    big = arena.folio(held[0].phys)
    assert out.preserve_folio(big) is True, "the bitmap of order 0 has room"
    with pytest.raises(kho.OutOfMemoryError):
        out.preserve_folio(folio.phys - folio.phys % (2 * P), 1)
    assert out.nr_folios == 2
    held[-1].free()
    out.finalize()
    assert handover(out).folios == list(out.folios())


def test_what_is_written_is_shown() -> None:
    out = kho.Outgoing(small())
    assert repr(out) == "<kho.Outgoing kho-v1 open: 1 folios>"
    assert out.bitmap_bytes == P
    out.finalize()
    assert repr(out) == "<kho.Outgoing kho-v1 finalized: 1 folios>"


@pytest.mark.parametrize("abi", ["kho-v1", "kho-v4"])
def test_a_run_is_preserved_as_its_folios_or_not_at_all(abi: str) -> None:
    arena = small()
    out = kho.Outgoing(arena, abi)
    block = arena.alloc(9)
    with pytest.raises(kho.PageStateError):
        out.preserve_run(block, 3, 65)
    assert out.preserve_run(block, 3, 64) == 64
    assert out.preserve_run(block.phys + 8 * P, 3, 2) == 0
    out.finalize()
    inc = kho.Incoming(arena)
    assert inc.folios_by_order == {0: 1, 3: 64}
    assert inc.restore_folio(block.phys + 8 * 63 * P).order == 3


@pytest.mark.parametrize("abi", ["kho-v1", "kho-v4"])
def test_many_are_preserved_at_once_or_not_at_all(abi: str) -> None:
    arena = small()
    out = kho.Outgoing(arena, abi)
    folios = [arena.alloc(order) for order in (0, 3, 9, 0)]
    phys = array("Q", [folio.phys for folio in folios])
    orders = bytes(folio.order for folio in folios)
    for bad, error in [
        (folios[1].phys + GIB, kho.OutsideMemoryError),
        (BASE + 512 * MIB, kho.PageStateError),
        (BASE + 896 * MIB, kho.ScratchOverlapError),
        (folios[0].phys + 8, kho.MisalignedError),
    ]:
        with pytest.raises(error):
            out.preserve_many(array("Q", [*phys, bad]), orders + b"\0")
    with pytest.raises(kho.ParameterError):
        out.preserve_many(phys, orders[1:])
    assert out.nr_folios == 1
    assert out.preserve_many(phys, orders) == 4
    assert out.preserve_many(phys[:1]) == 0
    assert out.preserve_many(array("Q")) == 0
    expected = sorted([(f.phys, f.order) for f in folios] + [(out.fdt_phys, 0)])
    assert list(out.folios()) == expected
    out.finalize()
    with pytest.raises(kho.FinalizedError):
        out.preserve_many(phys)
    assert list(kho.Incoming(arena).folios) == expected


@pytest.mark.parametrize("abi", ["kho-v1", "kho-v4"])
def test_a_subtree_stays_whole_while_something_else_in_its_pages_is_preserved(abi: str) -> None:
    arena = small()
    out = kho.Outgoing(arena, abi)
    blob = b"blob" * 2000
    phys = out.add_subtree("x", blob)
    before = list(out.folios())
    assert out.preserve_folio(phys, 0)
    with pytest.raises(kho.PageStateError, match="is preserved"):
        out.remove_subtree("x")
    assert arena.read(phys, len(blob)) == blob
    assert out.unpreserve_folio(phys, 0)
    assert list(out.folios()) == before
    out.remove_subtree("x")
    out.add_subtree("x", b"another")
    out.finalize()
    inc = kho.Incoming(arena)
    assert inc.read(inc.retrieve_subtree("x").phys, 7) == b"another"
