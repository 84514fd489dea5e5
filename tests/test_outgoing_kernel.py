"""`Outgoing(kernel=...)`: each kernel's formats are chosen, read back, and taken by that kernel."""

from __future__ import annotations

import struct
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import Any

import pytest

import kho
from kho.fdt import Fdt
from kho.formats import KhoTest
from kho.formats.luo import LuoV1
from kho.handover.compat import Offer, Target, judge, worst
from kho.handover.describe import describe
from kho.handover.verify import verify
from kho.kernels import KERNELS, Release

import captures

MIB = 1 << 20
PAGE_SIZES = [4096, 16384, 65536]


def arena_of(page_size: int = 4096) -> kho.Arena:
    # Scratch areas are whole pageblocks, of 512 MiB at 64 KiB pages.
    return kho.Arena((4096 if page_size == 65536 else 256) * MIB, page_size=page_size, scratch="16M,32M,16M")


def complete(name: str, page_size: int = 4096) -> kho.Outgoing:
    """All that the kernel of a series can hand over."""
    kernel = KERNELS[name]
    arena = arena_of(page_size)
    out = kho.Outgoing(arena, kernel=name)
    out.add_reserve_mem("keepme", 3 * page_size)
    folios = [arena.alloc(order) for order in (0, 2, 0)]
    for folio in folios:
        memoryview(folio)[:] = Random(folio.phys).randbytes(folio.nbytes)
    out.add_kho_test(folios)
    if kernel.luo is not None:
        out.add_memfd("vm-1", 0x10, b"guest memory", pos=5)
        out.add_session("nothing yet")
    if kernel.flbs:
        out.add_flb("pci", 0xFEED, 2)
    if kernel.kexec_metadata:
        out.set_kexec_metadata(f"{name}.9", 3)
    return out


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_writes_reads_back_and_is_what_that_kernel_takes(
    name: str, page_size: int, tmp_path: Path
) -> None:
    kernel = KERNELS[name]
    out = complete(name, page_size)
    out.finalize()
    out.save(tmp_path / "handover.elf")
    inc = kho.open(tmp_path / "handover.elf")
    assert (inc.compatible, inc.bitmap_bytes, inc.page_size) == (
        kernel.abi,
        kernel.bitmap_bytes(page_size),
        page_size,
    )
    test: Any = inc.payloads["kho_test"]
    assert isinstance(test, KhoTest)
    assert (test.list is None, test.nr_folios, test.holds()) == (kernel.kho_test == "array", 3, True)
    assert list(inc.reserve_mem) == ["keepme"]
    assert ("LUO" in inc.subtrees) == (kernel.luo is not None)
    if kernel.luo is not None:
        luo = inc.luo
        assert luo.compatible == kernel.luo
        assert [session.name for session in luo.all_sessions] == ["vm-1", "nothing yet"]
        (entry,) = luo.sessions["vm-1"].entries
        assert (entry.compatible, luo.sessions["vm-1"].files[0x10].read()) == (kernel.memfd, b"guest memory")
        assert [flb.name for flb in luo.flbs] == (["pci"] if kernel.flbs else [])
        if isinstance(luo, LuoV1):
            assert luo.has_flb_node == kernel.flb_node
    assert ("kexec-metadata" in inc.subtrees) == kernel.kexec_metadata
    assert verify(inc, kernel=name) == []
    assert name in describe(inc)["kernels"] or "to" in describe(inc)["kernels"]
    rows = judge(Offer.of(inc), Target(Release.parse(name)))
    # A driver of its own takes an FLB.
    assert worst([row for row in rows if not row.object.startswith("FLB")]) == "taken", rows


@pytest.mark.parametrize(("one", "two"), list(pairwise(KERNELS)))
def test_two_kernels_write_the_same_bytes_only_if_nothing_of_their_formats_differs(one: str, two: str) -> None:
    def written(name: str) -> dict[str, bytes]:
        out = complete(name)
        out.finalize()
        found = {sub: out.arena.read(*out.subtrees[sub]) for sub in out.subtrees if sub != "kexec-metadata"}
        return {**found, "root": out.serialize()}

    a, b = KERNELS[one], KERNELS[two]
    alike = ("abi", "luo", "flb_node", "memfd", "kho_test", "finalize", "kexec_metadata")
    same = all(getattr(a, column) == getattr(b, column) for column in alike) and a.bitmap == b.bitmap
    assert (written(one) == written(two)) == same


def shape(blob: bytes) -> bytes:
    """An FDT without its addresses: properties of 8 bytes, `struct kho_vmalloc` of 16, and an array of three."""
    found = bytearray(blob)
    at, end = struct.unpack_from(">I", blob, 8)[0], struct.unpack_from(">I", blob, 36)[0]
    end += at
    while at < end:
        (token,) = struct.unpack_from(">I", blob, at)
        at += 4
        if token == 1:
            at = (blob.index(b"\0", at) + 4) & ~3
        elif token == 3:
            (n,) = struct.unpack_from(">I", blob, at)
            if n in (8, 16, 24):
                found[at + 8 : at + 8 + n] = bytes(n)
            at = (at + 8 + n + 3) & ~3
    return bytes(found)


def written_forms(inc: kho.Incoming) -> dict[str, bytes]:
    """The root, each subtree and each memfd header as bytes without addresses; the order of subtrees is the root's."""
    found = {"root": shape(inc.read(inc.fdt_phys, inc.fdt.totalsize))}
    for name, sub in inc.subtrees.items():
        if inc.read(sub.phys, 4) == b"\xd0\x0d\xfe\xed":
            nbytes = struct.unpack(">I", inc.read(sub.phys + 4, 4))[0]
            found[name] = shape(inc.read(sub.phys, nbytes))
        else:
            found[name] = inc.read(sub.phys, 16 if name == "LUO" else 73)
    if "LUO" in inc.subtrees:
        for session in inc.luo.all_sessions:
            for entry in session.entries:
                header = bytearray(inc.read(entry.data, 48 if entry.compatible == "memfd-v2" else 40))
                header[-16:-8] = bytes(8)
                found[f"{session.name} {entry.token:#x} {entry.compatible}"] = bytes(header)
    return found


def common(kernel: str, *both: str) -> kho.Outgoing:
    """What `both` kernels can hand over, as one of them does, in the order in which its producers add it."""
    rows = [KERNELS[name] for name in both]
    arena = arena_of()
    out = kho.Outgoing(arena, kernel=kernel)
    if all(row.kexec_metadata for row in rows):
        out.set_kexec_metadata("7.1.9", 3)
    folios = [arena.alloc(order) for order in (0, 2, 0)]
    for n, folio in enumerate(folios):
        memoryview(folio)[:] = Random(n).randbytes(folio.nbytes)
    out.add_kho_test(folios)
    if all(row.luo for row in rows):
        out.add_memfd("vm-1", 0x10, b"guest memory", pos=5)
        out.add_session("nothing yet")
    if all(row.flbs for row in rows):
        out.add_flb("liveupdate-test-flb-v0", 0xFEED, 2)
    out.add_reserve_mem("keepme", 12288)
    out.finalize()
    return out


@pytest.mark.parametrize(("one", "two"), list(product(KERNELS, KERNELS)))
def test_a_conversion_for_a_kernel_is_what_an_outgoing_of_that_kernel_writes(
    one: str, two: str, tmp_path: Path
) -> None:
    common(one, one, two).save(tmp_path / "source.elf")
    common(two, one, two).save(tmp_path / "wanted.elf")
    kho.convert(kho.open(tmp_path / "source.elf"), kernel=two).save(tmp_path / "converted.elf")
    converted, wanted = kho.open(tmp_path / "converted.elf"), kho.open(tmp_path / "wanted.elf")
    assert [*converted.subtrees] == [*wanted.subtrees]
    assert written_forms(converted) == written_forms(wanted)


def test_a_real_root_is_converted_for_its_own_kernel_byte_for_byte(tmp_path: Path) -> None:
    for name in captures.NAMES:
        inc = kho.open(captures.elf(name))
        kernel = name.split("-")[1]
        kho.convert(inc, kernel="6.17" if kernel == "6.16" else kernel).save(tmp_path / "x.elf")
        again = kho.open(tmp_path / "x.elf", page_size=inc.page_size)
        before, after = (each.read(inc.fdt_phys, inc.fdt.totalsize) for each in (inc, again))
        old, new = (struct.pack("<Q", each.preserved_memory_map) for each in (inc, again))
        moved = before.replace(old, new)
        if kernel == "6.16":  # Linux 6.18.15 with the bitmaps of 6.16: its test lists folios as 6.18 does.
            moved, after = shape(moved), shape(after)
        assert moved == after, name


def root_of(kernel: str, subtrees: list[str]) -> bytes:
    """The root FDT of a kernel with these subtrees, in the order in which they were added."""
    arena = arena_of()
    out = kho.Outgoing(arena, kernel=kernel)
    for name in subtrees:
        out.add_subtree(name, b"")
    return out.serialize()


@pytest.mark.parametrize(
    ("kernel", "subtrees", "nbytes"),
    [
        ("6.17", ["kho_test", "memblock"], 236),
        ("6.19", ["kho_test", "LUO", "memblock"], 260),
        ("7.0", ["kho_test", "LUO", "memblock"], 260),
        ("7.1", ["kexec-metadata", "kho_test", "LUO", "memblock"], 405),
    ],
)
def test_roots_have_as_many_bytes_as_those_of_the_kernels_that_ran(
    kernel: str, subtrees: list[str], nbytes: int
) -> None:
    """Sizes of the captures of 6.17.8, 6.19.11, the 7.0 layout and 7.1.13."""
    blob = root_of(kernel, subtrees)
    assert len(blob) == nbytes
    listed = [node.name for node in Fdt(blob).root.children]
    assert listed == (subtrees if kernel == "6.17" else subtrees[::-1])


@pytest.mark.parametrize(("kernel", "nbytes"), [("6.19", 236), ("7.0", 311), ("7.1", 311)])
def test_the_fdt_of_luo_has_as_many_bytes_as_the_kernels(kernel: str, nbytes: int) -> None:
    """Linux 6.19 writes no `luo-flb` node, and 7.0 panics without it."""
    out = kho.Outgoing(arena_of(), kernel=kernel)
    out.add_luo()
    fdt = Fdt(out.arena.read(*out.subtrees["LUO"]))
    assert (fdt.totalsize, "/luo-flb" in fdt) == (nbytes, kernel != "6.19")
    if kernel == "6.19":
        with pytest.raises(kho.ParameterError, match=r"has no FLBs; Linux 7\.0 and later have"):
            out.add_flb("pci", 1)
    else:
        (flbs,) = struct.unpack("<Q", fdt["/luo-flb"]["luo-flb-header"])
        assert struct.unpack("<QQ", out.arena.read(flbs, 16)) == (1, 0)


@pytest.mark.parametrize("abi", ["kho-v1", "kho-v3"])
def test_without_a_kernel_luo_v1_has_its_flb_node(abi: str) -> None:
    out = kho.Outgoing(arena_of(), abi)
    out.add_luo()
    assert "/luo-flb" in Fdt(out.arena.read(*out.subtrees["LUO"]))


@pytest.mark.parametrize(("kernel", "boot"), [("6.19", 152), ("7.0", 152), ("7.1", 233), ("7.3", 233)])
def test_a_root_that_is_edited_is_there_from_the_start(kernel: str, boot: int) -> None:
    """Boot sizes as debugfs shows them on 6.19.11 and 7.1.13, whose `out/fdt` is cut to them; 7.0 and 7.3 likewise."""
    arena = arena_of()
    out = kho.Outgoing(arena, kernel=kernel)
    if KERNELS[kernel].kexec_metadata:
        out.set_kexec_metadata("7.1.13", 1)
    blob = arena.read(out.fdt_phys, 4096)
    assert int.from_bytes(blob[4:8], "big") == boot
    fdt = Fdt(blob[:boot])
    (where,) = struct.unpack("<Q", fdt.root["preserved-memory-map"])
    assert (where == 0) == (KERNELS[kernel].map == "chunk list")


def test_finalizing_an_edited_root_changes_its_map_alone() -> None:
    out = complete("7.0")
    before = out.arena.read(out.fdt_phys, 4096)
    for _ in range(2):
        out.finalize()
        after = out.arena.read(out.fdt_phys, 4096)
        assert after[: len(out.serialize())] == out.serialize()
        changed = [at for at in range(4096) if before[at] != after[at]]
        assert changed
        assert max(changed) - min(changed) < 8
        out.abort()
        assert out.arena.read(out.fdt_phys, 4096) == before
    out.remove_subtree("kho_test")
    out.finalize()
    assert list(kho.open(out.arena).subtrees) == ["LUO", "memblock"]


@pytest.mark.parametrize("kernel", ["6.16", "6.17", "6.18"])
def test_kernels_without_luo_take_none(kernel: str) -> None:
    out = kho.Outgoing(arena_of(), kernel=kernel)
    before = set(out.folios())
    for add in (
        out.add_luo,
        lambda: out.add_session("vm"),
        lambda: out.add_memfd("vm", 1, b"x"),
        lambda: out.add_flb("pci", 1),
    ):
        with pytest.raises(kho.UnsupportedAbiError, match=rf"there is none in Linux {kernel}"):
            add()
    with pytest.raises(kho.UnsupportedAbiError, match=rf"kexec-metadata: Linux {kernel} does not have it"):
        out.set_kexec_metadata("6.18", 1)
    assert set(out.folios()) == before


def test_seals_are_refused_where_the_kernel_loses_them() -> None:
    for kernel, kept in (("6.19", False), ("7.0", False), ("7.1", True), ("7.2", True), ("7.3", True)):
        out = kho.Outgoing(arena_of(), kernel=kernel)
        if kept:
            out.add_memfd("vm", 1, b"x", seals=6)
        else:
            with pytest.raises(kho.ParameterError, match="memfd-v1 cannot record seals"):
                out.add_memfd("vm", 1, b"x", seals=6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"abi": "kho-v3", "kernel": "7.0"}, "abi='kho-v3' and kernel='7.0': Linux 7.0 writes kho-v1"),
        ({"abi": "kho-v1", "kernel": "7.3.4"}, "abi='kho-v1' and kernel='7.3.4': Linux 7.3 writes kho-v4"),
        ({"kernel": "7.0", "bitmap_bytes": 512}, "bitmap_bytes=512 and kernel='7.0': Linux 7.0 writes bitmaps of 4096"),
        ({"kernel": "6.17", "bitmap_bytes": 4096}, "kernel='6.17': Linux 6.17 writes bitmaps of 512"),
        ({"kernel": "7.1", "bitmap_bytes": 4096}, "kernel='7.1': Linux 7.1 writes kho-v3 without bitmaps"),
        ({"kernel": "6.15"}, "Linux 6.15: kernels with KHO that are known here: 6.16, 6.17"),
        ({"kernel": "9.0"}, "Linux 9.0: kernels with KHO that are known here: 6.16"),
        ({"kernel": "seven"}, "kernel release 'seven': write 7.0 or 7.0.11"),
    ],
)
def test_what_contradicts_is_named(given: dict[str, Any], said: str) -> None:
    arena = arena_of()
    with pytest.raises(kho.ParameterError) as refused:
        kho.Outgoing(arena, **given)
    assert said in str(refused.value)
    assert arena.allocated_pages == 0


@pytest.mark.parametrize(
    ("given", "abi", "bitmap"),
    [
        ({}, "kho-v1", 4096),
        ({"kernel": "7.0.11"}, "kho-v1", 4096),
        ({"kernel": "7.0.0-14-generic"}, "kho-v1", 4096),
        ({"kernel": "6.17.8", "bitmap_bytes": 512}, "kho-v1", 512),
        ({"abi": "kho-v4", "kernel": "7.2"}, "kho-v4", None),
        ({"abi": "kho-v2"}, "kho-v2", None),
    ],
)
def test_what_agrees_is_taken(given: dict[str, Any], abi: str, bitmap: int | None) -> None:
    out = kho.Outgoing(arena_of(), **given)
    assert (out.abi, out.bitmap_bytes) == (abi, bitmap)


def test_arrays_of_luo_can_be_placed_on_any_page() -> None:
    """Neither array need begin where a folio of its size does; its pages are preserved as the kernel splits a range."""
    arena = arena_of()
    out = kho.Outgoing(arena, kernel="7.0")
    with out.placed([0x800000, 0x803000, 0x820000]):
        out.add_luo()
    with out.placed([0x841000, 0x850000, 0x852000, 0x853000, 0x854000]):
        out.add_memfd("vm-1", 0x10, b"guest")
    out.finalize()
    inc = kho.open(arena)
    assert {what: (phys, nbytes) for what, phys, nbytes in inc.luo.blocks} == {
        "FLB list": (0x820000, 4096),
        "session array": (0x803000, 16 * 4096),
    }
    (session,) = inc.luo.all_sessions
    assert (session.blocks, session.files[0x10].read()) == ([(0x841000, 2 * 4096)], b"guest")
    assert [inc.order_at(phys) for phys in (0x803000, 0x804000, 0x808000, 0x810000)] == [0, 2, 3, 1]
    assert verify(inc) == []
    out.abort()
    out.remove_subtree("LUO")
    assert {arena.page(phys).state for phys in (0x803000, 0x80F000, 0x841000, 0x842000)} == {"free"}
