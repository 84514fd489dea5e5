"""Payload writers: output equals the kernels' bytes, reads back, and is released completely when removed."""

from __future__ import annotations

import gc
import mmap
import struct
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho import _kho
from kho._types import MemfdFolio
from kho.formats import Luo, kernel_write
from kho.formats.luo import BLOCK, FILE, SESSION
from kho.handover import verify

import captures
import handovers
import model

MIB = 1 << 20
ABIS = ["kho-v1", "kho-v2", "kho-v3", "kho-v4"]
PAGE_SIZES = [4096, 16384, 65536]


def arena_of(page_size: int = 4096, size: int = 64 * MIB) -> kho.Arena:
    return kho.Arena(size, page_size=page_size)


# Rewriting captures


class Again:
    """The handover of a capture, rewritten at the kernel's addresses with kho's writers."""

    KERNELS: ClassVar = {
        "linux-6.18.15-x86_64": "6.18",
        "linux-7.0-layout-x86_64": "7.0",
        "linux-7.1.13-x86_64": "7.1",
        "linux-7.3.4-x86_64": "7.3",
    }
    """The kernels that wrote them; of the other captures the ABI decides what is written."""

    def __init__(self, name: str) -> None:
        self.inc = inc = kho.open(captures.elf(name))
        self.page = inc.page_size
        self.name = name
        runs = [*inc.ranges, *(inc.scratch or [])]
        start = min(phys for phys, _ in runs) // MIB * MIB
        end = max(phys + size for phys, size in runs)
        self.arena = kho.Arena([(start, end - start)], page_size=self.page, scratch=inc.scratch)
        # Bitmaps and nodes are allocated while all pages of the kernel are taken; their addresses do not change later.
        taken = [self.arena.alloc_at(*folio) for folio in inc.folios if folio.phys != inc.fdt_phys]
        place = {"fdt_phys": inc.fdt_phys, "map_phys": inc.preserved_memory_map}
        kernel = self.KERNELS.get(name)
        self.out = kho.Outgoing(self.arena, inc.compatible, kernel=kernel, bitmap_bytes=inc.bitmap_bytes, **place)
        self.out.preserve_all(inc.tracker())
        for folio in taken:
            self.out.unpreserve_folio(folio)
            folio.free()
        assert self.out.nr_folios == 1
        subtrees = list(inc.subtrees)
        for subtree in subtrees if self.out.subtree_order == "append" else reversed(subtrees):
            getattr(self, subtree.replace("-", "_").lower())(inc.subtrees[subtree].phys, inc.payloads[subtree])
        if "LUO" in inc.subtrees:
            self.sessions(inc.luo)

    def copied(self, phys: int, order: int) -> kho.Folio:
        """A folio at the kernel's address, with its contents."""
        folio = self.arena.alloc_at(phys, order)
        memoryview(folio)[:] = self.inc.read(phys, folio.nbytes)
        return folio

    def memblock(self, phys: int, payload: Any) -> None:
        for name, region in payload.regions.items():
            with self.out.placed([phys]):
                assert self.out.add_reserve_mem(name, region.size, start=region.start) == (region.start, region.size)
            self.arena.write(region.start, region.read())

    def kexec_metadata(self, phys: int, payload: Any) -> None:
        with self.out.placed([phys]):
            self.out.set_kexec_metadata(payload.previous_release, payload.kexec_count)

    def kho_test(self, phys: int, payload: Any) -> None:
        folios = [self.copied(*folio) for folio in payload.folios]
        with self.out.placed([*payload.list.blocks, *payload.list.chunks, phys]):
            assert self.out.add_kho_test(folios, machine=self.inc.machine) == payload.csum

    def luo(self, phys: int, payload: Any) -> None:
        lists = {what: at for what, at, _ in payload.blocks}
        array = [lists["session array"]] if payload.compatible == "luo-v1" else []
        with self.out.placed([phys, *array, lists["FLB list"]]):
            self.out.add_luo(liveupdate_num=payload.liveupdate_num)
        for flb in payload.flbs:
            self.out.add_flb(flb.name, flb.data, flb.count)

    def sessions(self, luo: Luo) -> None:
        home = [at for what, at, _ in luo.blocks if what == "session block"]
        for session in luo.all_sessions:
            blocks = [at for at, _ in session.blocks]
            for entry in session.entries:
                file = session.files[entry.token]
                for folio in file.folios:
                    self.copied(folio.phys, folio.order)
                with self.out.placed([*home, *blocks, entry.data, *file.list.blocks, *file.list.chunks]):
                    self.out.add_memfd(
                        session.name, entry.token, file.folios, pos=file.pos, size=file.size, seals=file.seals
                    )
                home, blocks = [], []


@pytest.fixture(scope="module", params=captures.NAMES)
def again(request: pytest.FixtureRequest) -> Again:
    made = Again(request.param)
    made.out.finalize()
    return made


def test_folios_root_and_scratch_equal_the_kernels(again: Again) -> None:
    inc, out = again.inc, again.out
    assert out.folios() == inc.folios
    assert out.serialize() == bytes(inc.fdt)
    assert {name: at for name, (at, _) in out.subtrees.items()} == {n: s.phys for n, s in inc.subtrees.items()}


def test_every_preserved_byte_equals_the_kernels(again: Again) -> None:
    inc = again.inc
    # After the end of an FDT, its page still contains data that libfdt left there; kho_test does not clear its list.
    sizes = {sub.phys: sub.size for sub in inc.subtrees.values() if inc.read(sub.phys, 4) == b"\xd0\x0d\xfe\xed"}
    sizes[inc.fdt_phys] = len(bytes(inc.fdt))
    test: Any = inc.payloads["kho_test"]
    assert len(test.list.blocks) == 1
    sizes[test.list.blocks[0]] = 8 * test.nr_folios
    for phys, order in inc.folios:
        size = sizes.get(phys) or inc.page_size << order
        assert again.arena.read(phys, size) == inc.read(phys, size), hex(phys)


def test_luo_and_subtrees_equal_the_kernels_bytes(again: Again) -> None:
    inc = again.inc
    for sub in inc.subtrees.values():
        size = sub.size if sub.size is not None else inc.page_size
        assert again.arena.read(sub.phys, size) == inc.read(sub.phys, size)
    if "LUO" not in inc.subtrees:
        return
    for owned in inc.luo.owned():
        if isinstance(owned.memory, tuple):
            phys, size = owned.memory
            assert again.arena.read(phys, size) == inc.read(phys, size), owned
        else:
            area = owned.memory if isinstance(owned.memory, _kho.Vmalloc) else owned.memory.list
            for page in [*area.blocks, *area.chunks]:
                assert again.arena.read(page, inc.page_size) == inc.read(page, inc.page_size), owned


@pytest.mark.parametrize("again", captures.RADIX_NAMES, indirect=True)
def test_the_tree_equals_the_kernels(again: Again) -> None:
    inc = again.inc

    def leaves(read: Any, root: int) -> dict[int, bytes]:
        levels, inner, _ = model.radix_shape(inc.page_size, int(inc.compatible.removeprefix("kho-v")))

        def walk(node: int, level: int, prefix: int) -> None:
            page = read(node, inc.page_size)
            if level == 0:
                found[prefix] = page
                return
            for index, child in enumerate(struct.unpack(f"<{inc.page_size // 8}Q", page)):
                if child:
                    walk(child, level - 1, prefix << inner | index)

        found: dict[int, bytes] = {}
        walk(root, levels - 1, 0)
        return found

    theirs = leaves(inc.read, inc.preserved_memory_map)
    ours = leaves(again.arena.read, inc.preserved_memory_map)
    assert {at: leaf for at, leaf in theirs.items() if leaf.strip(b"\0")} == ours
    assert len(ours) >= 3


@pytest.mark.parametrize("again", [name for name in captures.NAMES if name not in captures.RADIX_NAMES], indirect=True)
def test_the_chunks_equal_the_kernels(again: Again) -> None:
    """Each chunk but for the addresses of the next one and of the bitmaps, and each bitmap."""
    inc = again.inc

    def listed(read: Any) -> list[tuple[int, list[tuple[int, bytes]]]]:
        found, head = [], inc.preserved_memory_map
        while head:
            head, order, count = struct.unpack_from("<QII", page := read(head, inc.page_size))
            bitmaps = list(struct.iter_unpack("<QQ", page[16 : 16 + 16 * count]))
            found.append((order, [(start, read(at, inc.bitmap_bytes)) for start, at in bitmaps]))
            assert not page[16 + 16 * count :].strip(b"\0")
        return found

    theirs = listed(inc.read)
    assert listed(again.arena.read) == theirs
    assert len(theirs) >= 5


@pytest.mark.parametrize("again", captures.LUO_V1_NAMES, indirect=True)
def test_the_root_that_debugfs_shows_after_the_kexec_is_the_one_written(again: Again) -> None:
    assert again.out.serialize() == captures.debugfs(again.name, 2, "in/fdt")
    shown = captures.debugfs(again.name, 1, "out/fdt")
    assert len(shown) < len(again.out.serialize())  # cut to the size that it had at boot


# A whole handover


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("abi", ABIS)
def test_a_complete_handover_reads_back(abi: str, page_size: int, tmp_path: Path) -> None:
    arena, out, expected = handovers.complete(abi, page_size=page_size)
    handovers.check(kho.open(arena), expected)
    out.save(tmp_path / "handover.elf")
    saved = kho.open(tmp_path / "handover.elf", page_size=page_size)
    assert (saved.compatible, saved.scratch) == (abi, arena.scratch)
    handovers.check(saved, expected)
    handovers.check(kho.Incoming(arena), expected)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_saved_handover_needs_no_page_size(page_size: int, tmp_path: Path) -> None:
    _, out, expected = handovers.complete(page_size=page_size)
    out.save(tmp_path / "handover.elf")
    inc = kho.open(tmp_path / "handover.elf")
    assert inc.page_size == page_size
    handovers.check(inc, expected)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("abi", ABIS)
def test_a_complete_handover_verifies_clean(abi: str, page_size: int) -> None:
    arena, _, _ = handovers.complete(abi, page_size=page_size)
    assert verify.verify(kho.open(arena)) == []


def test_writing_the_same_payloads_twice_gives_the_same_bytes() -> None:
    """Writers use no clock and no random numbers."""
    one, _, expected = handovers.complete()
    two, _, other = handovers.complete()
    assert expected == other
    for phys, order in expected.folios:
        assert one.read(phys, 4096 << order) == two.read(phys, 4096 << order)


@pytest.mark.parametrize("abi", ABIS)
def test_luo_lists_are_empty_until_finalize(abi: str) -> None:
    arena, out, expected = handovers.complete(abi)
    out.abort()
    luo = kho.open(arena, fdt_phys=out.fdt_phys).luo if abi != "kho-v1" else None
    if luo is not None:
        assert (luo.sessions, luo.flbs, luo.liveupdate_num) == ({}, [], expected.liveupdate_num)
    out.add_memfd("late", 1, b"more")
    out.finalize()
    sessions = kho.open(arena).luo.sessions
    assert list(sessions) == [*expected.sessions, "late"]
    assert sessions["late"].files[1].read() == b"more"


@pytest.mark.parametrize("abi", ABIS)
def test_removed_payloads_leave_no_pages(abi: str) -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, abi)
    bare = set(out.folios())
    test = [arena.alloc(order) for order in (0, 2)]
    allocated = arena.allocated_pages
    for _ in range(2):
        out.add_memfd("a", 1, bytes(5 * 4096))
        out.add_memfd("a", 2, bytes(2 * MIB), order=9)
        out.add_memfd("b", 1, b"")
        out.add_reserve_mem("r", 7 * 4096)
        out.add_kho_test(test)
        out.set_kexec_metadata("6.19", 1)
        area = out.preserve_vmalloc(bytes(10000), order=1)
        out.finalize()
        with pytest.raises(kho.FinalizedError):
            out.unpreserve_vmalloc(area)
        with pytest.raises(kho.FinalizedError):
            out.remove_session("a")
        with pytest.raises(kho.FinalizedError):
            out.add_memfd("a", 3, b"")
        out.abort()
        out.remove_file("a", 1)
        out.remove_session("b")
        out.unpreserve_vmalloc(area)
        for name in list(out.subtrees):
            out.remove_subtree(name)
        assert set(out.folios()) == bare
    # Nodes and bitmaps of the map stay allocated, as in the kernel.
    assert arena.allocated_pages - allocated <= 40
    for folio in test:
        assert folio.free()
    del out
    gc.collect()
    assert arena.allocated_pages == 0


@pytest.mark.parametrize("abi", ABIS)
def test_a_dropped_handover_leaves_no_pages(abi: str) -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, abi)
    out.add_memfd("a", 1, bytes(5 * 4096))
    out.add_reserve_mem("r", 4096)
    out.add_kho_test([])
    out.preserve_vmalloc(b"x")
    del out
    assert arena.allocated_pages == 0
    assert kho.Outgoing(arena, abi).nr_folios == 1


def test_a_finalized_handover_outlives_its_object() -> None:
    arena, out, expected = handovers.complete()
    del out
    gc.collect()
    handovers.check(kho.Incoming(arena), expected)


# Each writer


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunks_are_filled_as_in_the_kernel(page_size: int, extra: int) -> None:
    """A full chunk is followed by another one, which may stay empty."""
    most = page_size // 8 - 1
    arena = kho.Arena((most + 64) * page_size, page_size=page_size)
    out = kho.Outgoing(arena, "kho-v4")
    folios = [arena.alloc() for _ in range(most + extra)]
    descriptor = out.preserve_vmalloc(folios)
    first, pages, flags, order = struct.unpack("<QIHH", descriptor)
    assert (pages, flags, order) == (most + extra, 1, 0)
    words = struct.unpack(f"<{most + 1}Q", arena.read(first, page_size))
    listed = [word for word in words[1:] if word]
    if words[0]:
        following = struct.unpack(f"<{most + 1}Q", arena.read(words[0], page_size))
        assert following[0] == 0
        listed += [word for word in following[1:] if word]
    assert bool(words[0]) == (extra >= 0)
    assert listed == [folio.phys for folio in folios]
    out.finalize()
    assert _kho.Vmalloc(kho.open(arena), descriptor).blocks == listed


def test_invalid_vmalloc_areas_are_refused() -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, "kho-v4")
    before = out.nr_folios
    with pytest.raises(kho.ParameterError, match=r"orders \[0, 1\]"):
        out.preserve_vmalloc([arena.alloc(0), arena.alloc(1)])
    with pytest.raises(kho.OutOfMemoryError):
        out.preserve_vmalloc(bytes(65 * MIB))
    assert out.nr_folios == before
    assert out.preserve_vmalloc(b"") == bytes(16)
    out.unpreserve_vmalloc(bytes(16))
    with pytest.raises(kho.NotFoundError, match="not preserved by this handover"):
        out.unpreserve_vmalloc(struct.pack("<QIHH", 4096, 1, 1, 0))


def test_folios_preserved_by_the_caller_stay_preserved() -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, "kho-v4")
    folio = arena.alloc(1)
    out.preserve_folio(folio)
    out.add_memfd("s", 1, [folio])
    out.remove_session("s")
    assert (folio.phys, 1) in list(out.folios())


def test_a_memfd_has_holes_where_no_folio_is() -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, "kho-v4")
    one, two, stale = arena.alloc(0), arena.alloc(1), arena.alloc(0)
    for folio, byte in ((one, b"1"), (two, b"2"), (stale, b"3")):
        memoryview(folio)[:] = byte * folio.nbytes
    listed = [MemfdFolio(one.phys, 0, 1, 3), MemfdFolio(two.phys, 1, 4, 3), MemfdFolio(stale.phys, 0, 7, 1)]
    out.add_memfd("s", 1, listed, size=8 * 4096 - 5)
    out.finalize()
    file = kho.open(arena).luo.sessions["s"].files[1]
    hole = bytes(4096)
    assert file.read() == (hole + b"1" * 4096 + hole * 2 + b"2" * 8192 + hole * 2)[:-5]
    assert file.folios == listed


@pytest.mark.parametrize("abi", ["kho-v2", "kho-v3", "kho-v4"])
def test_invalid_sessions_and_files_are_refused(abi: str) -> None:
    out = kho.Outgoing(arena_of(), abi)
    out.add_memfd("s", 1, b"")
    state = set(out.folios())
    with pytest.raises(kho.ExistsError, match="session 's' has a file 0x1 already"):
        out.add_memfd("s", 1, b"x")
    with pytest.raises(kho.ExistsError, match="session 's' exists"):
        out.add_session("s")
    for name in ("", "x" * 64, "a\0b", "é" * 32):
        with pytest.raises(kho.ParameterError, match="session name"):
            out.add_memfd(name, 1, b"")
    with pytest.raises(kho.ParameterError, match="token"):
        out.add_memfd("new", -1, b"")
    with pytest.raises(kho.ParameterError, match="compatible"):
        out.add_file("new", 1, "c" * 48, 0)
    with pytest.raises(kho.ParameterError, match="memfd: "):
        out.add_memfd("new", 1, b"", pos=1 << 64)
    with pytest.raises(kho.OutOfMemoryError):
        out.add_memfd("new", 1, bytes(65 * MIB))
    with pytest.raises(kho.MisalignedError):
        out.add_memfd("new", 1, [MemfdFolio(4096, 1, 0, 3)])
    with pytest.raises(kho.NotFoundError):
        out.remove_file("s", 2)
    with pytest.raises(kho.NotFoundError):
        out.remove_session("new")
    if abi == "kho-v2":
        with pytest.raises(kho.ParameterError, match="memfd-v1 cannot record seals"):
            out.add_memfd("new", 1, b"", seals=1)
    assert set(out.folios()) == state


@pytest.mark.parametrize("nr", [1, 51, 52, 120])
def test_blocks_are_chained_when_they_are_full(nr: int) -> None:
    """After a header of 16 bytes, a page holds 51 sessions of 80 bytes, or 63 files of 64 bytes."""
    arena = arena_of()
    out = kho.Outgoing(arena, "kho-v4")
    for i in range(nr):
        out.add_session(f"s{i}")
        out.add_file("s0", i, "vendor,thing-v1", i << 12)
    out.finalize()
    luo = kho.open(arena).luo
    assert [session.name for session in luo.all_sessions] == [f"s{i}" for i in range(nr)]
    assert [(e.token, e.data) for e in luo.sessions["s0"].entries] == [(i, i << 12) for i in range(nr)]
    for what, layout, most, blocks in (
        ("session block", SESSION, 51, [at for what, at, _ in luo.blocks if what == "session block"]),
        ("file block", FILE, 63, [at for at, _ in luo.sessions["s0"].blocks]),
    ):
        assert (4096 - BLOCK.size) // layout.size == most
        counts = [BLOCK.unpack(arena.read(at, 16))[1] for at in blocks]
        assert counts == [most] * (nr // most) + [nr % most] * (nr % most > 0), what
    out.abort()
    for i in range(1, nr):
        out.remove_session(f"s{i}")
        out.remove_file("s0", i)
    out.finalize()
    luo = kho.open(arena).luo
    assert [(s.name, [e.token for e in s.entries]) for s in luo.all_sessions] == [("s0", [0])]
    assert len(luo.sessions["s0"].blocks) == 1


def test_luo_v1_has_the_kernels_limits() -> None:
    out = kho.Outgoing(arena_of(), "kho-v3")
    for token in range(128):
        out.add_file("s", token, "vendor,thing-v1", 0)
    with pytest.raises(kho.ParameterError, match="array of luo-v1 holds 128"):
        out.add_file("s", 128, "vendor,thing-v1", 0)
    for i in range(818):
        out.add_session(f"more {i}")
    with pytest.raises(kho.ParameterError, match="array of luo-v1 holds 819"):
        out.add_session("one too many")
    out.finalize()
    luo = kho.open(out.arena).luo
    assert len(luo.sessions) == 819
    assert len(luo.sessions["s"].files) == 128


def test_flbs_are_limited_to_their_page() -> None:
    out = kho.Outgoing(arena_of(), "kho-v4")
    for i in range(63):
        out.add_flb(f"flb{i}", i)
    with pytest.raises(kho.ParameterError, match="the FLB page is full: it holds 63"):
        out.add_flb("more", 0)
    with pytest.raises(kho.ExistsError):
        out.add_flb("flb0", 0)
    out.remove_flb("flb0")
    with pytest.raises(kho.NotFoundError):
        out.remove_flb("flb0")
    out.finalize()
    assert [flb.data for flb in kho.open(out.arena).luo.flbs] == list(range(1, 63))


def test_reserve_mem_regions_can_be_added_and_removed() -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, "kho-v4")
    one = out.add_reserve_mem("one", 5 * 4096)
    folios = [arena.alloc_at(32 * MIB + at, order) for at, order in ((0, 1), (8192, 0))]
    assert out.add_reserve_mem("two", folios) == (32 * MIB, 3 * 4096)
    assert out.add_reserve_mem("three", 4096, start=48 * MIB) == (48 * MIB, 4096)
    with pytest.raises(kho.ExistsError):
        out.add_reserve_mem("two", 4096)
    for size in (0, -4096, 100):
        with pytest.raises(kho.ParameterError, match="multiple of 4096"):
            out.add_reserve_mem("four", size)
    with pytest.raises(kho.ParameterError, match="a gap after"):
        out.add_reserve_mem("four", [arena.alloc_at(40 * MIB), arena.alloc_at(41 * MIB)])
    with pytest.raises(kho.PageStateError):
        out.add_reserve_mem("four", 4096, start=48 * MIB)
    out.remove_reserve_mem("one")
    with pytest.raises(kho.NotFoundError):
        out.remove_reserve_mem("one")
    out.finalize()
    with pytest.raises(kho.FinalizedError):
        out.remove_reserve_mem("two")
    found = {name: (region.start, region.size) for name, region in kho.open(arena).reserve_mem.items()}
    assert found == {"two": (32 * MIB, 3 * 4096), "three": (48 * MIB, 4096)}
    assert arena.page(one[0]).state == "free"
    assert arena.page(32 * MIB).state == "head"


def test_metadata_is_73_bytes_and_can_change() -> None:
    out = kho.Outgoing(arena_of(), "kho-v4")
    out.set_kexec_metadata("7.3.3", 1)
    out.set_kexec_metadata("7.3.4", 0xFFFFFFFF)
    assert out.subtrees["kexec-metadata"][1] == 73
    for release, count in (("x" * 65, 0), ("a\0b", 0), ("7", -1), ("7", 1 << 32)):
        with pytest.raises(kho.ParameterError, match="kexec-metadata"):
            out.set_kexec_metadata(release, count)
    out.finalize()
    with pytest.raises(kho.FinalizedError):
        out.set_kexec_metadata("7.3.5", 2)
    metadata = kho.open(out.arena).metadata
    assert (metadata.previous_release, metadata.kexec_count) == ("7.3.4", 0xFFFFFFFF)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("nr", [0, 1, 2, 600])
def test_kho_test_lists_any_number_of_folios(nr: int, inline: bool) -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, "kho-v1", bitmap_bytes=512 if inline else None)
    out.add_kho_test([arena.alloc() for _ in range(nr)], inline=inline)
    with pytest.raises(kho.ExistsError):
        out.add_kho_test([])
    out.finalize()
    test: Any = kho.open(arena, bitmap_bytes=out.bitmap_bytes).payloads["kho_test"]
    assert (test.nr_folios, len(test.folios), test.csum, test.holds()) == (nr, nr, 0, True)


def test_placed_sets_the_addresses_of_pages() -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, "kho-v4")
    with out.placed([0x100000, 0x108000]):
        assert out.preserve_vmalloc(b"x") == struct.pack("<QIHH", 0x108000, 1, 1, 0)
    with pytest.raises(kho.ParameterError, match="no page was allocated at 0x200000"), out.placed([0x200000]):
        pass
    with pytest.raises(kho.PageStateError), out.placed([0x100000]):
        out.preserve_vmalloc(b"x")
    assert arena.page(0x100000).state == "head"


# Laws


def summed(parts: list[bytes]) -> int:
    return model.fold(model.csum(b"".join(parts)))


@given(st.lists(st.binary(max_size=64).map(lambda raw: raw.ljust(-(-len(raw) // 4) * 4, b"\0")), max_size=5))
def test_the_sums_of_both_machines_fold_to_one_checksum(parts: list[bytes]) -> None:
    for machine in ("x86_64", "aarch64"):
        total = kernel_write.csum(parts, machine)
        assert 0 <= total < 1 << 32
        assert model.fold(total) % 0xFFFF == summed(parts) % 0xFFFF
        assert (total == 0) == (not any(b"".join(parts)))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_only_the_sum_of_zeros_is_0(machine: str) -> None:
    assert kernel_write.csum([b"\xff" * 8], machine) == (0xFFFFFFFF if machine == "x86_64" else 0xFFFF)
    assert kernel_write.csum([bytes(8)], machine) == 0
    assert kernel_write.csum([b"\xff" * (1 << 20)], machine) != 0


SIZES = st.one_of(
    st.integers(0, 40000),
    st.builds(lambda pages, off: max(0, pages * 4096 + off), st.integers(0, 600), st.integers(-1, 1)),
)


@st.composite
def files(draw: st.DrawFn) -> list[tuple[str, int, bytes, int, int]]:
    names = st.sampled_from(["a", "b", "x" * 63, "ümlaut"])
    made = {}
    for _ in range(draw(st.integers(0, 6))):
        key = (draw(names), draw(st.sampled_from([0, 1, 7, (1 << 64) - 1])))
        size = draw(SIZES)
        seed = draw(st.binary(min_size=1, max_size=16))
        made[key] = ((seed * (size // len(seed) + 1))[:size], draw(st.integers(0, 10)), draw(st.integers(0, size)))
    return [(name, token, *rest) for (name, token), rest in made.items()]


@settings(max_examples=40)
@given(files(), st.sampled_from(ABIS), st.sampled_from(PAGE_SIZES))
def test_files_of_any_contents_and_orders_read_back(
    given_files: list[tuple[str, int, bytes, int, int]], abi: str, page_size: int
) -> None:
    arena = kho.Arena(1 << 30, page_size=page_size)
    out = kho.Outgoing(arena, abi)
    out.add_luo()
    for name, token, contents, order, pos in given_files:
        order = min(order, 16 - (page_size.bit_length() - 13))
        out.add_memfd(name, token, contents, pos=pos, order=order)
    out.finalize()
    inc = kho.open(arena)
    found: dict[tuple[str, int], Any] = {
        (name, token): (session.files[token].read(), session.files[token].pos)
        for name, session in inc.luo.sessions.items()
        for token in session.files
    }
    assert found == {(name, token): (contents, pos) for name, token, contents, _, pos in given_files}
    owned = {inc.fdt_phys}
    for part in inc.luo.owned():
        if isinstance(part.memory, tuple):
            owned.add(part.memory[0])
        elif isinstance(part.memory, _kho.Vmalloc):
            owned |= {*part.memory.blocks, *part.memory.chunks}
        else:
            owned |= {folio.phys for folio in part.memory.folios}
    left = {folio.phys for folio in inc.folios} - owned
    assert left == {inc.subtrees["LUO"].phys}


def test_data_is_copied_once_from_any_buffer(tmp_path: Path) -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, "kho-v4")
    path = tmp_path / "contents"
    path.write_bytes(bytes(range(256)) * 32)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        out.add_memfd("s", 1, mapped)
    out.add_memfd("s", 2, memoryview(path.read_bytes()).cast("I"))
    folio = arena.alloc(1)
    memoryview(folio)[:] = path.read_bytes()
    out.add_memfd("s", 3, [folio])
    out.add_memfd("s", 4, b"", size=10000)
    out.finalize()
    files = kho.open(arena).luo.sessions["s"].files
    assert [files[token].read() for token in (1, 2, 3)] == [path.read_bytes()] * 3
    assert [folio.phys for folio in files[3].folios] == [folio.phys]
    assert files[4].read() == bytes(10000)


@pytest.mark.parametrize("abi", ABIS)
def test_the_root_is_placed_before_the_map(abi: str) -> None:
    """The map takes the lowest free pages, and the requested address of the root is one of them."""
    lowest = arena_of().alloc().phys
    assert kho.Outgoing(arena_of(), abi, fdt_phys=lowest).fdt_phys == lowest
    with pytest.raises(kho.PageStateError):
        kho.Outgoing(arena_of(), abi, fdt_phys=lowest, map_phys=lowest)
