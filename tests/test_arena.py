"""Arenas: allocation, page states, scratch, buffers, files."""

from __future__ import annotations

import gc
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho

from images import GIB, KIB, MIB, TIB

SIZES = pytest.mark.parametrize("page_size", [4096, 16384, 65536])


def arena_of_64_mib(**options: object) -> kho.Arena:
    """Return an arena of 64 MiB at the address 1 GiB."""
    return kho.Arena([(GIB, 64 * MIB)], **options)  # type: ignore[arg-type]


# Properties and parameters


@pytest.mark.smoke
def test_an_arena_has_its_regions_and_counts_as_attributes() -> None:
    arena = kho.Arena([(TIB, 2 * GIB, 1), (0, GIB, 0)])
    assert arena.regions == [(0, GIB, 0), (TIB, 2 * GIB, 1)]
    assert (arena.page_size, arena.max_page_order, arena.nodes) == (4096, 10, [0, 1])
    assert arena.nbytes == 3 * GIB
    assert (arena.scratch, arena.scratch_phys, arena.fdt_phys) == ([], None, None)
    assert (arena.free_pages, arena.allocated_pages, arena.reserved_pages) == (3 * GIB // 4096 - 1, 0, 1)
    assert repr(arena) == "<kho.Arena of 0xc0000000 bytes, 4 KiB pages, in anonymous memory>"


@pytest.mark.parametrize(("regions", "nbytes"), [("64M", 64 * MIB), (0x10000, 0x10000), ("0x200000", 2 * MIB)])
def test_a_size_instead_of_regions_starts_at_address_0(regions: str | int, nbytes: int) -> None:
    arena = kho.Arena(regions)
    assert arena.regions == [(0, nbytes, 0)]
    assert arena.page(0).state == "reserved", "address 0 means no address, so its page is never allocated"


@SIZES
def test_the_largest_order_is_max_page_order_of_the_kernel(page_size: int) -> None:
    arena = kho.Arena([(GIB, 4 * GIB)], page_size=page_size)
    largest = {4096: 10, 16384: 11, 65536: 13}[page_size]
    assert arena.max_page_order == largest
    assert arena.alloc(largest).nbytes == page_size << largest
    with pytest.raises(kho.OrderError, match=f"order {largest + 1} exceeds {largest}"):
        arena.alloc(largest + 1)
    assert arena_of_64_mib(max_page_order=3, page_size=page_size).max_page_order == 3


@pytest.mark.parametrize(
    ("regions", "error"),
    [
        ([], kho.ParameterError),
        ([(0, 0)], kho.ParameterError),
        ([(1, 4096)], kho.MisalignedError),
        ([(0, 4097)], kho.MisalignedError),
        ([(0, 8192), (4096, 4096)], kho.ParameterError),
        ([(2**64 - 4096, 8192)], kho.OutOfRangeError),
        ("lots", kho.ParameterError),
        ("", kho.ParameterError),
        (2**64, kho.ParameterError),
        (-1, kho.ParameterError),
        ([(2**64, 4096)], kho.ParameterError),
        ([(0, 4096, 2**32)], kho.OutOfRangeError),
        ([(0, 4096, 0), (0, 4096, 1)], kho.ParameterError),
    ],
)
def test_invalid_regions_raise(regions: object, error: type[kho.KhoError]) -> None:
    with pytest.raises(error):
        kho.Arena(regions)  # type: ignore[arg-type]


def test_invalid_options_raise(tmp_path: Path) -> None:
    for wrong in ({"page_size": 8192}, {"scratch": "16M"}, {"scratch": [(0, 4096)]}, {"max_page_order": 37}):
        with pytest.raises(kho.ParameterError):
            arena_of_64_mib(**wrong)
    for areas in ([(GIB + 63 * MIB, 2 * MIB)], [(GIB, MIB), (GIB + MIB - 4096, MIB)], [(GIB, 0)]):
        with pytest.raises(kho.ParameterError, match="scratch"):
            arena_of_64_mib(scratch=areas)
    with pytest.raises(kho.KhoError):
        arena_of_64_mib(backing=tmp_path / "no" / "such" / "directory")


# Allocation


def test_folios_are_aligned_and_disjoint_and_merge_when_freed() -> None:
    arena = arena_of_64_mib()
    free = arena.free_pages
    folios = [arena.alloc(order) for order in (0, 3, 0, 10, 1)]
    spans = sorted((f.phys, f.phys + f.nbytes) for f in folios)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for folio in folios:
        assert folio.phys % folio.nbytes == 0
        assert (folio.pfn, folio.nr_pages, len(folio)) == (folio.phys // 4096, 1 << folio.order, folio.nbytes)
    assert arena.allocated_pages == sum(f.nr_pages for f in folios)
    assert arena.free_pages == free - arena.allocated_pages
    for folio in folios:
        assert arena.free(folio) is True
    assert (arena.free_pages, arena.allocated_pages) == (free, 0)
    assert arena.alloc(10).phys == GIB, "freed buddies merge"


def test_alloc_at_allocates_a_particular_block() -> None:
    arena = arena_of_64_mib()
    folio = arena.alloc_at(GIB + 12 * 4096, 2)
    assert (folio.phys, folio.order) == (GIB + 12 * 4096, 2)
    assert arena.folio(folio.phys).order == 2
    with pytest.raises(kho.PageStateError, match=f"page at {GIB + 12 * 4096:#x} is allocated, not free"):
        arena.alloc_at(folio.phys)
    with pytest.raises(kho.PageStateError, match=f"page at {GIB + 12 * 4096:#x}"):
        arena.alloc_at(GIB + 8 * 4096, 3)
    with pytest.raises(kho.MisalignedError):
        arena.alloc_at(GIB + 4096, 1)
    with pytest.raises(kho.MisalignedError):
        arena.alloc_at(GIB + 1)
    for outside in (GIB - 4096, GIB + 64 * MIB, 0, 2**64 - 4096):
        with pytest.raises(kho.OutsideMemoryError):
            arena.alloc_at(outside)


def test_an_allocation_without_free_memory_raises() -> None:
    arena = kho.Arena([(GIB, 16 * 4096)])
    folios = [arena.alloc(2) for _ in range(4)]
    with pytest.raises(kho.OutOfMemoryError, match="no free block of order 0"):
        arena.alloc()
    assert issubclass(kho.OutOfMemoryError, MemoryError)
    folios[1].free()
    with pytest.raises(kho.OutOfMemoryError, match="order 3"):
        arena.alloc(3)
    assert {arena.alloc().phys for _ in range(4)} == {folios[1].phys + i * 4096 for i in range(4)}


def test_double_frees_raise() -> None:
    arena = arena_of_64_mib()
    folio = arena.alloc(2)
    with pytest.raises(kho.PageStateError, match="tail of an allocated folio"):
        arena.free(folio.phys + 4096)
    assert folio.free() is True
    with pytest.raises(kho.PageStateError, match="is free"):
        folio.free()
    with pytest.raises(kho.PageStateError):
        arena.free(folio.phys)
    with pytest.raises(kho.OutsideMemoryError):
        arena.free(0)
    with pytest.raises(TypeError):
        arena.free("folio")  # type: ignore[arg-type]


def test_a_folio_is_freed_with_its_last_reference() -> None:
    arena = arena_of_64_mib()
    folio = arena.alloc(1)
    assert (folio.refcount, folio.get(), folio.refcount) == (1, 2, 2)
    assert arena.page(folio.phys).refcount == 2
    assert arena.page(folio.phys + 4096).refcount == 0
    assert folio.free() is False
    assert arena.page(folio.phys).state == "head"
    assert folio.free() is True
    assert folio.refcount == 0
    with pytest.raises(kho.PageStateError):
        folio.get()


def test_gigantic_folios_need_the_gigantic_option() -> None:
    arena = kho.Arena([(0, TIB)])
    with pytest.raises(kho.OrderError):
        arena.alloc(18)
    folio = arena.alloc(18, gigantic=True)
    assert (folio.nbytes, folio.phys % GIB) == (GIB, 0)
    memoryview(folio)[-1] = 7
    assert arena.read(folio.phys + GIB - 1, 1) == b"\7"
    assert arena.alloc(27, gigantic=True).nbytes == TIB // 2
    assert folio.free()


def test_sixteen_terabytes_take_less_than_100_kib_of_metadata() -> None:
    arena = kho.Arena("16T")
    assert arena.metadata_bytes < 100 * KIB
    last = arena.alloc_at(16 * TIB - 4096)
    memoryview(last)[:3] = b"end"
    assert arena.read(16 * TIB - 4096, 3) == b"end"
    assert arena.alloc(30, gigantic=True).nbytes == 4 * TIB


def test_allocations_stay_on_the_requested_node() -> None:
    arena = kho.Arena([(0, 64 * MIB, 0), (64 * MIB, 64 * MIB, 1), (TIB, 64 * MIB, 1)])
    assert arena.alloc(4, node=1).phys == 64 * MIB
    assert arena.page(TIB).node == 1
    assert arena.page(64 * MIB - 4096).node == 0
    pages = [arena.alloc(10, node=1).phys for _ in range(31)]
    assert min(pages) >= 64 * MIB
    assert max(pages) >= TIB
    with pytest.raises(kho.OutOfMemoryError, match="order 10 on node 1"):
        arena.alloc(10, node=1)
    with pytest.raises(kho.OutOfMemoryError, match="node 7"):
        arena.alloc(node=7)
    with pytest.raises(kho.KhoError):
        arena.alloc_at(0, 15)  # the block would span both nodes


def test_a_page_has_state_order_refcount_and_head() -> None:
    arena = arena_of_64_mib(scratch=[(GIB + 32 * MIB, MIB)])
    folio = arena.alloc_at(GIB + 16 * 4096, 2)
    assert arena.page(folio.phys) == kho.PageInfo("head", 2, 1, 0, 0, folio.phys)
    assert arena.page(folio.phys + 3 * 4096 + 17) == kho.PageInfo("tail", 2, 0, 0, 0, folio.phys)
    assert arena.page(GIB + 32 * MIB) == kho.PageInfo("reserved", None, 0, 0, 0, None)
    free = arena.page(GIB)
    assert (free.state, free.refcount, free.head) == ("free", 0, None)
    with pytest.raises(kho.OutsideMemoryError):
        arena.page(GIB - 1)
    with pytest.raises(kho.PageStateError):
        arena.folio(GIB)


# Scratch


def test_scratch_is_placed_from_a_kho_scratch_value() -> None:
    arena = kho.Arena([(0, 2 * GIB, 0), (4 * GIB, 2 * GIB, 1)], scratch="16M,32M,8M")
    assert [size // MIB for _, size in arena.scratch] == [16, 32, 8, 8]
    low, everywhere, first, second = (addr for addr, _ in arena.scratch)
    assert low + 16 * MIB == 2 * GIB, "the low area is as high as possible below 4 GiB"
    assert everywhere + 32 * MIB == 6 * GIB
    assert first + 8 * MIB == low
    assert second + 8 * MIB == everywhere
    assert arena.scratch_phys == 2 * GIB - 4096
    array = arena.read(arena.scratch_phys, 64)
    assert array == b"".join(n.to_bytes(8, "little") for area in arena.scratch for n in area)


@SIZES
def test_scratch_is_rounded_to_whole_pageblocks(page_size: int) -> None:
    block = {4096: 2 * MIB, 16384: 32 * MIB, 65536: 512 * MIB}[page_size]
    arena = kho.Arena("8G", page_size=page_size, scratch="1M,1M,1M")
    assert [size for _, size in arena.scratch] == [block] * 3
    assert all(addr % block == 0 for addr, _ in arena.scratch)


def test_scratch_may_be_a_percentage_of_the_reserved_memory() -> None:
    arena = kho.Arena("1G", scratch="200%", reserved=8 * MIB)
    assert [size for _, size in arena.scratch] == [16 * MIB, 16 * MIB], "nothing is left for the global area"
    spec = kho.parse_kho_scratch("16M,4M,16M")
    assert [size for _, size in kho.Arena("1G", scratch=spec).scratch] == [16 * MIB, 4 * MIB, 16 * MIB]
    with pytest.raises(kho.ParameterError, match="global area"):
        kho.Arena("128M", scratch="16M,3G,16M")


def test_scratch_is_never_allocated() -> None:
    areas = [(GIB + 4 * MIB, 2 * MIB), (GIB + 9 * MIB, MIB)]
    arena = kho.Arena([(GIB, 16 * MIB)], scratch=areas)
    with pytest.raises(kho.PageStateError, match="is reserved"):
        arena.alloc_at(GIB + 4 * MIB)
    with pytest.raises(kho.PageStateError):
        arena.alloc_at(GIB + 4 * MIB, 10)
    taken = []
    while arena.free_pages:
        taken.append(arena.alloc().phys)
    assert len(taken) == 13 * MIB // 4096
    assert not any(addr <= phys < addr + size for phys in taken for addr, size in areas)


# Bytes


def test_views_share_the_memory_of_the_arena() -> None:
    arena = arena_of_64_mib()
    folio = arena.alloc(1)
    view = memoryview(folio)
    assert (view.nbytes, view.format, view.readonly, view.ndim) == (8192, "B", False, 1)
    view[4090:4100] = b"0123456789"
    assert arena.read(folio.phys + 4090, 10) == b"0123456789"
    arena.write(folio.phys, b"written")
    assert bytes(view[:7]) == b"written"
    assert bytes(folio)[:7] == b"written"
    array = np.asarray(folio)
    assert (array.dtype.str, array.shape) == ("|u1", (8192,))
    array[:4] = 255
    assert arena.read(folio.phys, 5) == b"\xff\xff\xff\xfft"
    words = np.asarray(folio).view(np.uint64)
    words[-1] = 2**64 - 1
    assert arena.read(folio.phys + 8184, 8) == b"\xff" * 8


def test_views_keep_the_arena_alive() -> None:
    arena = arena_of_64_mib()
    folio = arena.alloc()
    view, array = memoryview(folio), np.asarray(folio)
    view[:5] = b"still"
    del arena, folio
    gc.collect()
    assert bytes(view[:5]) == b"still"
    array[0] = 83
    assert bytes(view[:5]) == b"Still"


def test_a_freed_folio_has_no_view() -> None:
    arena = arena_of_64_mib()
    folio = arena.alloc(2)
    folio.free()
    for use in (memoryview, bytes):
        with pytest.raises(kho.PageStateError):
            use(folio)
    again = arena.alloc_at(folio.phys, 0)
    assert again.phys == folio.phys
    for use in (memoryview, bytes):
        with pytest.raises(kho.PageStateError):
            use(folio)  # three of its four pages are free


def test_reads_and_writes_outside_memory_raise() -> None:
    arena = kho.Arena([(0, 8192), (8192, 8192), (MIB, 4096)])
    arena.write(8190, b"seam")
    assert arena.read(8190, 4) == b"seam"
    assert arena.read(0, 0) == b""
    for phys, data in ((16383, b"xx"), (MIB - 1, b"xx"), (2**64 - 1, b"x"), (TIB, b"x")):
        with pytest.raises(kho.OutsideMemoryError):
            arena.write(phys, data)
        with pytest.raises(kho.OutsideMemoryError):
            arena.read(phys, len(data))
    with pytest.raises(kho.OutsideMemoryError):
        arena.read(0, 2**63)
    with pytest.raises(kho.ParameterError):
        arena.read(-1, 1)


def test_new_memory_is_zero() -> None:
    arena = arena_of_64_mib()
    assert not np.asarray(arena.alloc(10)).any()


# Files


OTHER = """
import sys, kho
arena = kho.Arena.open(sys.argv[1] if len(sys.argv) == 2 else int(sys.argv[2]))
print(arena.page_size, arena.nbytes, arena.read({phys}, 5).decode(), arena.scratch, arena.fdt_phys)
arena.write({phys}, b"reply")
"""


@pytest.mark.parametrize("backing", ["memfd", "file"])
def test_another_process_sees_the_memory(backing: str, tmp_path: Path) -> None:
    path = tmp_path / "arena.elf"
    arena = arena_of_64_mib(backing="memfd" if backing == "memfd" else path, scratch="2M,2M,2M")
    folio = arena.alloc(3)
    memoryview(folio)[:5] = b"hello"
    args = [str(path)] if backing == "file" else ["fd", str(arena.fileno())]
    done = subprocess.run(
        [sys.executable, "-c", OTHER.format(phys=folio.phys), *args],
        capture_output=True,
        text=True,
        pass_fds=[arena.fileno()],
    )
    assert done.stderr == ""
    assert done.stdout == f"4096 {64 * MIB} hello {arena.scratch} None\n"
    assert bytes(memoryview(folio)[:5]) == b"reply"


def test_an_anonymous_arena_has_no_file() -> None:
    with pytest.raises(kho.ParameterError, match="no file"):
        arena_of_64_mib().fileno()


def test_the_file_of_an_arena_is_new_and_sparse(tmp_path: Path) -> None:
    path = tmp_path / "arena.elf"
    arena = kho.Arena("1T", backing=path)
    assert path.stat().st_size > TIB
    assert path.stat().st_blocks * 512 < MIB
    with pytest.raises(kho.KhoError, match="exists"):
        kho.Arena("1T", backing=path)
    del arena
    assert kho.Arena.open(path).nbytes == TIB


def test_opening_anything_but_an_arena_raises(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(8192))
    with plain.open("r+b") as file:
        for source in (plain, str(plain), file.fileno(), tmp_path / "missing", tmp_path, -1, 10**6):
            with pytest.raises(kho.KhoError):
                kho.Arena.open(source)
    arena = tmp_path / "arena.elf"
    kho.Arena("1M", backing=arena)
    content = arena.read_bytes()[:4096]
    for length in (0, 1, 63, 64, 100, 200, 4096):
        plain.write_bytes(content[:length])
        with pytest.raises(kho.KhoError):
            kho.Arena.open(plain)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils' readelf is not here")
def test_readelf_accepts_the_file_of_an_arena(tmp_path: Path) -> None:
    path = tmp_path / "arena.elf"
    kho.Arena([(GIB, 64 * MIB), (TIB, MIB)], backing=path)
    done = subprocess.run(["readelf", "-hlnW", path], capture_output=True, text=True, env={"LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "CORE (Core file)" in done.stdout
    assert f"0x{GIB:016x} 0x4000000" in done.stdout
    assert f"0x{TIB:016x} 0x100000" in done.stdout
    assert "kho" in done.stdout


# Random use


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 30)), max_size=60))
def test_random_allocations_agree_with_a_set_of_pages(steps: list[tuple[int, bool, int]]) -> None:
    arena = kho.Arena([(4096, 96 * 4096), (TIB, 32 * 4096)])
    total = arena.free_pages
    held: list[kho.Folio] = []
    for order, free, pick in steps:
        if free and held:
            assert held.pop(pick % len(held)).free()
            continue
        try:
            held.append(arena.alloc(order))
        except kho.OutOfMemoryError:
            used = {f.pfn + i for f in held for i in range(f.nr_pages)}
            pages = [*range(1, 97), *range(TIB >> 12, (TIB >> 12) + 32)]
            blocks = (range(pfn, pfn + (1 << order)) for pfn in pages if pfn % (1 << order) == 0)
            inside = [b for b in blocks if b.stop <= 97 or b.start >= TIB >> 12]
            assert not any(used.isdisjoint(b) and set(b) <= set(pages) for b in inside)
    pages_held = [f.pfn + i for f in held for i in range(f.nr_pages)]
    assert len(pages_held) == len(set(pages_held)) == arena.allocated_pages == total - arena.free_pages
