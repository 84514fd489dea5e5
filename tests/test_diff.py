"""Comparing handovers: equal ones have no difference, and each difference is reported exactly."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
from kho.handover.diff import diff, extents_of

import captures
import hostile
from command import kho as run
from images import MIB, Image

V4 = "linux-7.3.4-x86_64"


def patched(name: str, change: dict[int, bytes]) -> kho.Incoming:
    """A capture with changed bytes at some addresses."""
    memory = kho.Memory.open(captures.elf(name))
    segments = []
    for phys, size in memory.ranges:
        raw = bytearray(memory.read(phys, size))
        for at, new in change.items():
            if phys <= at < phys + size:
                raw[at - phys : at - phys + len(new)] = new
        segments.append((phys, raw))
    page = captures.expected(name)["page_size"]
    return kho.open(kho.Memory.from_segments(segments), page_size=page, scratch=kho.open(captures.elf(name)).scratch)


@pytest.mark.parametrize("name", captures.NAMES)
def test_a_handover_does_not_differ_from_itself(name: str) -> None:
    done = run("diff", captures.elf(name), captures.elf(name))
    assert (done.code, done.out, done.err) == (0, "", "")
    assert not diff(kho.open(captures.elf(name)), patched(name, {}))


@pytest.mark.parametrize("name", [name for name in captures.NAMES if "luo" in captures.expected(name)])
def test_one_byte_of_one_file_is_found(name: str) -> None:
    inc = kho.open(captures.elf(name))
    offset, phys, _ = inc.luo.sessions["vm-1"].files[0x10].memfd.extents[-1]
    at = phys + 123
    found = diff(inc, patched(name, {at: bytes([inc.read(at, 1)[0] ^ 0x40])}))
    rest = (found.facts, found.scratch, found.folios, found.subtrees, found.sessions, found.reserve_mem)
    assert not any(rest)
    (change,) = found.files
    assert (change.name, change.side, change.facts) == ("vm-1/0x10", "changed", {})
    assert change.content is not None
    assert (change.content.offset, change.content.nbytes) == (offset + 123, 1)
    assert change.content.sha256[0] == captures.expected(name)["luo"]["sessions"][0]["files"][0]["sha256"]
    assert change.content.sha256[1] not in (None, change.content.sha256[0])


def test_metadata_of_a_file_is_compared() -> None:
    inc = kho.open(captures.elf(V4))
    data = inc.luo.sessions["vm-1"].files[0x11].memfd.phys
    found = diff(inc, patched(V4, {data: struct.pack("<Q", 7), data + 16: struct.pack("<I", 15)}))
    (change,) = found.files
    assert (change.name, change.facts, change.content) == ("vm-1/0x11", {"pos": (156, 7), "seals": (6, 15)}, None)


def test_a_longer_file_differs_from_the_end_of_the_shorter() -> None:
    inc = kho.open(captures.elf(V4))
    data = inc.luo.sessions["vm-1"].files[0x11].memfd.phys
    (change,) = diff(inc, patched(V4, {data + 8: struct.pack("<Q", 300)})).files
    assert change.facts == {"size": (312, 300)}
    assert change.content is not None
    assert (change.content.offset, change.content.nbytes) == (300, 0)


def test_a_region_is_compared_by_its_bytes() -> None:
    inc = kho.open(captures.elf(V4))
    (change,) = diff(inc, patched(V4, {inc.reserve_mem["keepme"].start + 0xFFFE: b"zz"})).reserve_mem
    assert change.content is not None
    assert (change.name, change.content.offset) == ("keepme", 0xFFFE)


def test_handovers_of_different_kernels_differ_in_abi_and_layout() -> None:
    done = run("diff", captures.elf("linux-6.18.15-x86_64"), captures.elf(V4), "--json")
    assert done.code == 1
    found = done.json
    assert found["different"]
    assert found["facts"]["compatible"] == ["kho-v1", "kho-v4"]
    assert found["scratch"] is None
    assert [change["name"] for change in found["files"]] == ["vm-1/0x10", "vm-1/0x11", "cache/0x7", "cache/0x8"]
    assert {change["side"] for change in found["files"]} == {"added"}
    assert [(c["name"], c["side"]) for c in found["subtrees"]][2:] == [("LUO", "added"), ("kexec-metadata", "added")]
    text = run("diff", captures.elf("linux-6.18.15-x86_64"), captures.elf(V4))
    assert text.code == 1
    assert text.out.startswith("compatible: kho-v1 -> kho-v4\n")
    assert "  > vm-1/0x10, 393216 bytes\n" in text.out
    back = run("diff", captures.elf(V4), captures.elf("linux-6.18.15-x86_64"))
    assert "  < vm-1/0x10, 393216 bytes\n" in back.out


@pytest.mark.parametrize("names", [("linux-6.18.15-x86_64", V4), ("linux-6.16-layout-x86_64", V4)])
def test_folios_of_one_side_equal_the_set_difference(names: tuple[str, str]) -> None:
    folios = [{tuple(folio) for folio in captures.expected(name)["folios"]} for name in names]
    found = diff(*(kho.open(captures.elf(name)) for name in names))
    for side, only in (("only_a", folios[0] - folios[1]), ("only_b", folios[1] - folios[0])):
        listed = {
            (phys + i * (4096 << change.order), change.order)
            for change in found.folios
            for phys, _, count in getattr(change, side)
            for i in range(count)
        }
        assert listed == only


def test_folios_of_different_page_sizes_are_compared_in_bytes() -> None:
    small = Image(folios=[(4 * MIB, 4), (8 * MIB, 0)], page_size=4096, compatible="kho-v4").to_bytes()
    large = Image(folios=[(4 * MIB, 0)], page_size=65536, compatible="kho-v4", machine=183).to_bytes()
    opened = []
    for raw, page in ((small, 4096), (large, 65536)):
        opened.append(kho.open(memory_of(raw), page_size=page))
    found = diff(*opened)
    assert found.page_size == 4096
    assert found.facts["page_size"] == (4096, 65536)
    everywhere = [extent.phys for change in found.folios for extent in [*change.only_a, *change.only_b]]
    assert 4 * MIB not in everywhere
    assert 8 * MIB in everywhere


def memory_of(elf: bytes) -> kho.Memory:
    """The segments of an ELF core as memory without a machine type."""
    (count,) = struct.unpack_from("<H", elf, 56)
    loads = [struct.unpack_from("<IIQQQQQQ", elf, 64 + 56 * i) for i in range(count)]
    return kho.Memory.from_segments(
        [(phys, elf[offset : offset + filesz].ljust(memsz, b"\0")) for _, _, offset, _, phys, filesz, memsz, _ in loads]
    )


@given(st.sets(st.tuples(st.integers(0, 64), st.sampled_from([0, 1, 3]))))
def test_extents_are_runs_of_adjacent_folios(chosen: set[tuple[int, int]]) -> None:
    tracker = kho.Tracker()
    for index, order in chosen:
        tracker.preserve(index << order, order)
    found = extents_of(tracker)
    spread = {
        ((extent.phys >> 12 >> order) + i, order)
        for order, extents in found.items()
        for extent in extents
        for i in range(extent.folios)
    }
    assert spread == chosen
    for order, extents in found.items():
        assert all(extent.nbytes == extent.folios * 4096 << order for extent in extents)
        assert all(a.phys + a.nbytes < b.phys for a, b in pairwise(extents))


@pytest.mark.parametrize("swap", [False, True])
def test_an_unreadable_side_is_named(swap: bool, tmp_path: Path) -> None:
    bad = tmp_path / "bad.elf"
    bad.write_bytes(hostile.damaged(hostile.REFUSED["no map"]))
    pair = [captures.elf(V4), bad]
    done = run("diff", *(reversed(pair) if swap else pair))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"kho: {bad}: ")


@pytest.mark.parametrize("what", sorted([*hostile.REFUSED, *hostile.ODD]))
def test_malformed_images_give_an_error_or_a_difference(what: str, tmp_path: Path) -> None:
    image = tmp_path / "image.elf"
    image.write_bytes(hostile.damaged((hostile.REFUSED | hostile.ODD)[what]))
    done = run("diff", image, captures.elf(V4))
    assert done.code in ((2,) if what in hostile.REFUSED else (1, 2))
    assert "Traceback" not in done.err
    if done.code == 1:
        assert run("diff", image, image).code == 0
