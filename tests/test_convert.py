"""Saving a handover as an ELF core, and converting it to another ABI without changing folios and subtrees."""

from __future__ import annotations

import hashlib
import struct
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho.handover import elfcore

import captures
import handovers
import images
import model
from command import kho as run

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
ABIS = ["kho-v1", "kho-v2", "kho-v3", "kho-v4"]
PAGE_SIZES = [4096, 16384, 65536]


def digests(inc: kho.Incoming) -> dict[tuple[int, int], str]:
    """SHA-256 of every folio except the root FDT's, which depends on the ABI."""
    return {
        (phys, order): hashlib.sha256(inc.read(phys, inc.page_size << order)).hexdigest()
        for phys, order in inc.folios
        if phys != inc.fdt_phys
    }


def program_headers(path: Path) -> list[tuple[int, int, int, int]]:
    """`(offset, phys, filesz, memsz)` of the PT_LOADs."""
    with path.open("rb") as file:
        raw = file.read(1 << 20)
    (phnum,) = struct.unpack_from("<H", raw, 56)
    assert raw[:7] == b"\x7fELF\x02\x01\x01"
    out = []
    for i in range(phnum):
        kind, _, offset, _, phys, filesz, memsz, _ = struct.unpack_from("<IIQQQQQQ", raw, 64 + 56 * i)
        assert kind == 1
        out.append((offset, phys, filesz, memsz))
    return out


# Saving


@pytest.mark.parametrize("name", captures.NAMES)
def test_a_saved_capture_has_the_same_memory(name: str, tmp_path: Path) -> None:
    inc = kho.open(captures.elf(name))
    saved = kho.Image(inc)
    segments = saved.save(tmp_path / "again.elf")
    assert [(s.phys, s.nbytes) for s in segments] == saved.segments
    again = kho.open(tmp_path / "again.elf")
    for key in ("compatible", "page_size", "bitmap_bytes", "fdt_phys", "folios", "map_pages", "scratch", "machine"):
        assert getattr(again, key) == getattr(inc, key), key
    theirs = kho.Memory.open(captures.elf(name))
    ours = kho.Memory.open(tmp_path / "again.elf")
    assert ours.ranges == saved.segments
    for phys, size in ours.ranges:
        assert ours.read(phys, size) == theirs.read(phys, size)
    # A capture contains almost only pages that were handed over.
    assert theirs.nbytes - ours.nbytes <= 2 * inc.page_size


@pytest.mark.parametrize("name", captures.NAMES)
def test_everything_saves_the_segments_of_the_capture(name: str, tmp_path: Path) -> None:
    kho.open(captures.elf(name)).save(tmp_path / "all.elf", everything=True)
    theirs, ours = program_headers(captures.elf(name)), program_headers(tmp_path / "all.elf")
    assert [(phys, memsz) for _, phys, _, memsz in ours] == [(phys, memsz) for _, phys, _, memsz in theirs]
    for (_, phys, filesz, _), (_, _, captured, _) in zip(ours, theirs, strict=True):
        assert filesz <= captured, hex(phys)
    memory, again = kho.Memory.open(captures.elf(name)), kho.Memory.open(tmp_path / "all.elf")
    assert memory.ranges == again.ranges
    assert all(memory.read(*part) == again.read(*part) for part in memory.ranges)


def test_zeros_are_saved_as_holes(tmp_path: Path) -> None:
    arena = kho.Arena(256 * MIB, scratch=[(0xC000000, 16 * MIB)])
    out = kho.Outgoing(arena, "kho-v4")
    folio = arena.alloc_at(64 * MIB, 14)
    arena.write(folio.phys + 40 * MIB, b"in the midst of it")
    out.preserve_folio(folio)
    out.preserve_folio(arena.alloc_at(32 * MIB, 9))
    out.finalize()
    out.save(tmp_path / "sparse.elf")
    by_phys = {phys: (filesz, memsz) for _, phys, filesz, memsz in program_headers(tmp_path / "sparse.elf")}
    assert by_phys[32 * MIB] == (0, 2 * MIB)
    assert by_phys[64 * MIB] == (40 * MIB + 4096, 64 * MIB)
    done = (tmp_path / "sparse.elf").stat()
    assert done.st_size > 40 * MIB
    assert done.st_blocks * 512 < 4 * MIB
    inc = kho.open(tmp_path / "sparse.elf")
    assert inc.read(64 * MIB + 40 * MIB, 18) == b"in the midst of it"
    assert inc.read(64 * MIB, 64 * MIB) == arena.read(64 * MIB, 64 * MIB)


def test_more_segments_than_fit_the_elf_header_are_saved(tmp_path: Path) -> None:
    folios = [(8192 * i + 16 * MIB, 0) for i in range(0x10000)]
    contents = {folios[i][0]: struct.pack("<Q", i + 1) for i in range(0, len(folios), 1000)}
    source = images.Image(folios=folios, contents=contents, ram=[(0, 2 * GIB)]).write(tmp_path / "many.elf")
    inc = kho.open(source)
    assert len(kho.Image(inc).save(tmp_path / "again.elf")) > 0xFFFF
    again = kho.open(tmp_path / "again.elf")
    assert again.folios == inc.folios
    assert all(again.read(phys, 8) == raw for phys, raw in contents.items())


def test_a_source_can_be_saved_over_itself(tmp_path: Path) -> None:
    _, out, expected = handovers.complete()
    path = tmp_path / "handover.elf"
    out.save(path)
    before = path.read_bytes()
    inc = kho.open(path)
    inc.save(path)
    handovers.check(inc, expected)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_saving_name_the_reason(tmp_path: Path) -> None:
    arena = kho.Arena(16 * MIB)
    with pytest.raises(kho.NoHandoverError, match="no handover is finalized"):
        kho.Image.of_arena(arena)
    out = kho.Outgoing(arena, "kho-v4")
    with pytest.raises(kho.NoHandoverError):
        out.save(tmp_path / "x.elf")
    out.finalize()
    with pytest.raises(kho.SourceError, match="No such file"):
        out.save(tmp_path / "missing" / "x.elf")
    with pytest.raises(kho.SourceError, match="not a file"):
        out.save(tmp_path)
    with pytest.raises(kho.ParameterError, match="machine 'vax'"):
        kho.Image.of_arena(arena, machine="vax")
    with pytest.raises(kho.ParameterError, match="overlaps"):
        kho.save_elf(arena, [(0, 8192), (4096, 4096)], tmp_path / "x.elf")
    with pytest.raises(kho.OutsideMemoryError):
        kho.save_elf(kho.Memory.from_segments([(0, b"x" * 8192)]), [(4096, 8192)], tmp_path / "x.elf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183), ("machine 243", 243)])
def test_the_machine_type_is_kept(machine: str, number: int, tmp_path: Path) -> None:
    memory = kho.Memory.from_segments([(0x1000, b"a" * 100), (0x5000, bytes(5000))])
    kho.save_elf(memory, memory.ranges, tmp_path / "x.elf", machine=machine)
    raw = (tmp_path / "x.elf").read_bytes()
    assert struct.unpack_from("<HH", raw, 16) == (4, number)
    again = kho.Memory.open(tmp_path / "x.elf")
    assert (again.ranges, again.machine) == (memory.ranges, machine)
    assert again.read(0x1000, 100) == b"a" * 100


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12)


@given(RUNS, RUNS)
def test_merged_and_clipped_are_sets(one: list[tuple[int, int]], two: list[tuple[int, int]]) -> None:
    def points(runs: list[tuple[int, int]]) -> set[int]:
        return {at for start, size in runs for at in range(start, start + size)}

    left, right = elfcore.merged(one), elfcore.merged(two)
    assert points(left) == points(one)
    assert all(sum(a) < b[0] for a, b in pairwise(left))
    both = elfcore.clipped(left, right)
    assert points(both) == points(one) & points(two)
    assert sum(size for _, size in both) == len(points(both))


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([b"", b"x", b"y" * 4096, bytes(65536) + b"z"])), max_size=6)
)
def test_any_saved_memory_reads_back(pieces: list[tuple[int, bytes]]) -> None:
    pages: dict[int, bytes] = {}
    for at, raw in pieces:
        for i in range(0, max(len(raw), 1), 4096):
            pages[at * 4096 + i] = raw[i : i + 4096].ljust(4096, b"\0")
    memory = kho.Memory.from_segments(sorted(pages.items()))
    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "x.elf"
        segments = kho.save_elf(memory, memory.ranges, path)
        again = kho.Memory.open(path) if pages else None
        assert [(s.phys, s.nbytes) for s in segments] == memory.ranges
        for segment in segments:
            assert again is not None
            whole = memory.read(segment.phys, segment.nbytes)
            assert again.read(segment.phys, segment.nbytes) == whole
            assert segment.filesz == -(-len(whole.rstrip(b"\0")) // 4096) * 4096


# Converting


def held(inc: kho.Incoming, path: Path, abi: str, **given: Any) -> kho.Incoming:
    """Convert, and compare the result with the source; what becomes of LUO is for test_convert_luo.py."""
    made = kho.convert(inc, abi, drop=["seals"], keep_unknown=True, **given)
    made.save(path)
    again = kho.open(path, page_size=inc.page_size)
    assert again.compatible == abi
    if made.luo == "keep":
        assert again.folios == inc.folios
        assert digests(again) == digests(inc)
    assert (again.scratch, again.fdt_phys, again.machine) == (inc.scratch, inc.fdt_phys, made.machine)
    moved = {"LUO"} if made.luo == "write" else set()
    assert {*again.subtrees} == {*inc.subtrees}
    for name, sub in again.subtrees.items():
        assert sub.phys == inc.subtrees[name].phys or name in moved
    preserved = [(phys, inc.page_size << order) for phys, order in again.folios]
    for page in again.map_pages:
        assert not images.overlap(page, inc.page_size, preserved)
        assert not images.overlap(page, inc.page_size, inc.scratch or [])
    return again


@pytest.mark.parametrize("abi", ABIS)
@pytest.mark.parametrize("name", captures.NAMES)
def test_captures_keep_everything_in_every_abi(name: str, abi: str, tmp_path: Path) -> None:
    inc = kho.open(captures.elf(name))
    there = held(inc, tmp_path / "there.elf", abi)
    for name, payload in there.payloads.items():
        assert name == "LUO" or payload.describe() == inc.payloads[name].describe()
    back = held(there, tmp_path / "back.elf", inc.compatible, **_bitmaps(inc))
    assert bytes(back.fdt["/"]["compatible"]) == bytes(inc.fdt["/"]["compatible"])
    assert {node.name: node.properties for node in back.fdt.root.children if node.name != "LUO"} == {
        node.name: node.properties for node in inc.fdt.root.children if node.name != "LUO"
    }


def _bitmaps(inc: kho.Incoming) -> dict[str, int]:
    return {} if inc.bitmap_bytes is None else {"bitmap_bytes": inc.bitmap_bytes}


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("abi", ABIS)
def test_a_complete_handover_converts_to_every_abi(abi: str, page_size: int, tmp_path: Path) -> None:
    arena, _, expected = handovers.complete(abi, page_size=page_size)
    inc = kho.open(arena)
    for step, other in enumerate([*ABIS, *reversed(ABIS), abi]):
        inc = held(inc, tmp_path / f"{step}.elf", other)
        if page_size == 4096:
            memory = model.Memory.from_elf(tmp_path / f"{step}.elf")
            where = (memory, inc.preserved_memory_map, page_size)
            if other == "kho-v1":
                folios, _ = model.read_v1(*where, inc.bitmap_bytes or 0)
            else:
                folios, _ = model.read_radix(*where, int(other.removeprefix("kho-v")))
            assert folios == [tuple(folio) for folio in inc.folios]
    handovers.check(inc, expected, seals=False, folios=False)


@pytest.mark.parametrize("bitmap_bytes", [512, 4096])
def test_bitmaps_have_the_requested_size(bitmap_bytes: int, tmp_path: Path) -> None:
    inc = kho.open(captures.elf("linux-7.3.4-x86_64"))
    again = held(inc, tmp_path / "x.elf", "kho-v1", bitmap_bytes=bitmap_bytes)
    assert again.bitmap_bytes == bitmap_bytes
    # By default the source's bitmap size is kept.
    assert held(again, tmp_path / "y.elf", "kho-v1").bitmap_bytes == bitmap_bytes


def test_folios_outside_the_segments_are_converted(tmp_path: Path) -> None:
    """Terabytes of zeros, gigantic and overlapping folios are unchanged, and little data is copied."""
    folios = [(GIB * 4, 18), (GIB * 4 + 8192, 1), (TIB, 18), (TIB - 4096, 0), (32 * MIB, 10)]
    folios += [(2 * TIB + GIB * i, 18) for i in range(512)]
    source = images.Image(
        folios=folios,
        contents={TIB: b"x", 2 * TIB + 511 * GIB: b"y" * 5000},
        ram=[(0, 3 * TIB)],
        whole_ram=False,
        subtrees=images.sample_subtrees(),
    ).write(tmp_path / "wide.elf")
    inc = kho.open(source)
    for step, abi in enumerate(("kho-v4", "kho-v1", "kho-v2")):
        path = tmp_path / f"{step}.elf"
        kho.convert(inc, abi).save(path)
        inc = kho.open(path)
        assert (inc.compatible, [tuple(f) for f in inc.folios if f.order]) == (abi, sorted(f for f in folios if f[1]))
        assert (inc.read(TIB, 2), inc.read(2 * TIB + 511 * GIB, 5001)) == (b"x\0", b"y" * 5000 + b"\0")
        assert path.stat().st_blocks * 512 < 4 * MIB
        assert inc.subtrees["producer"].fdt().root.str("compatible") == "example-v1"


def test_a_blob_of_unknown_size_extends_to_the_end_of_its_folio(tmp_path: Path) -> None:
    """kho-v2 records no sizes; from kho-v3 on a size is required."""
    arena = kho.Arena(16 * MIB)
    out = kho.Outgoing(arena, "kho-v2")
    phys = out.add_subtree("blob", b"not an FDT" + bytes(5000))
    out.finalize()
    inc = kho.open(arena)
    assert inc.subtrees["blob"].size is None
    kho.convert(inc, "kho-v4").save(tmp_path / "x.elf")
    blob = kho.open(tmp_path / "x.elf").subtrees["blob"]
    assert (blob.phys, blob.size) == (phys, 8192)
    assert blob.read() == (b"not an FDT" + bytes(5000)).ljust(8192, b"\0")


def test_impossible_conversions_are_refused(tmp_path: Path) -> None:
    inc = kho.open(captures.elf("linux-7.3.4-x86_64"))
    with pytest.raises(kho.UnsupportedAbiError, match="kho-v9"):
        kho.convert(inc, "kho-v9")
    with pytest.raises(kho.ParameterError):
        kho.convert(inc, "kho-v4", bitmap_bytes=512)
    with pytest.raises(kho.ParameterError, match="old map"):
        kho.convert(inc, "kho-v3").save(tmp_path / "x.elf", everything=True)
    memory = kho.Memory.open(captures.elf("linux-7.3.4-x86_64"))
    most = [(phys, memory.read(phys, size)) for phys, size in memory.ranges if phys != 0x158C000]
    with pytest.raises(kho.OutsideMemoryError, match="102 preserved pages are not in this memory"):
        kho.convert(kho.open(kho.Memory.from_segments(most)), "kho-v1")


# The command


def test_the_command_converts(tmp_path: Path) -> None:
    path = tmp_path / "new.elf"
    source = captures.elf("linux-6.18.15-x86_64")
    done = run("convert", source, "--abi", "kho-v4", "-o", path)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == "kho-v1 to kho-v4: 16 folios, 216.0 KiB"
    assert run("inspect", "--json", path).json["compatible"] == "kho-v4"
    back = run("convert", path, "--abi", "kho-v1", "--bitmap-bytes", 512, "-o", tmp_path / "old.elf", "--json")
    assert (back.json["compatible"], back.json["bitmap_bytes"], back.json["nr_folios"]) == ("kho-v1", 512, 16)
    assert kho.open(tmp_path / "old.elf").folios == kho.open(source).folios


def test_the_command_prints_equivalent_python(tmp_path: Path) -> None:
    source, path = captures.elf("linux-7.3.4-aarch64"), tmp_path / "x.elf"
    done = run("convert", source, "--abi", "kho-v1", "--bitmap-bytes", 512, "--drop-seals", "-o", path, "--python")
    assert not path.exists()
    exec(done.out, {})
    assert kho.open(path).bitmap_bytes == 512
    done = run("convert", source, "--kernel", "7.0", "--drop-seals", "--keep-unknown", "-o", path, "--python")
    exec(done.out, {})
    assert kho.open(path).luo.compatible == "luo-v1"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--abi", "kho-v9"], "kho-v9"),
        (["--abi", "kho-v4", "--bitmap-bytes", "512"], "bitmap_bytes"),
        (["--abi", "kho-v1", "--bitmap-bytes", "1000"], "bitmap of 1000 bytes"),
    ],
)
def test_the_command_refuses(args: list[str], message: str, tmp_path: Path) -> None:
    done = run("convert", captures.elf("linux-7.3.4-x86_64"), *args, "-o", tmp_path / "x.elf")
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert not list(tmp_path.iterdir())


# A named kernel


def test_a_kernel_that_is_named_decides_abi_and_bitmap_size(tmp_path: Path) -> None:
    source = captures.elf("linux-6.18.15-x86_64")
    wanted = [("6.17", "kho-v1", 512), ("7.0.3", "kho-v1", 4096), ("7.1", "kho-v3", None)]
    for kernel, compatible, bitmap_bytes in wanted:
        done = run("convert", source, "--kernel", kernel, "-o", tmp_path / "new.elf", "--json")
        assert done.code == 0
        assert (done.json["compatible"], done.json["bitmap_bytes"]) == (compatible, bitmap_bytes)
        # The test's own folios are listed in another form up to 6.17.
        assert done.err == ""
        assert run("compat", tmp_path / "new.elf", kernel).code == 0


def test_another_bitmap_size_under_the_same_compatible_is_said(tmp_path: Path) -> None:
    source = captures.elf("linux-6.16-layout-x86_64")
    done = run("convert", source, "--kernel", "6.19", "-o", tmp_path / "new.elf")
    assert done.out.startswith("kho-v1 to kho-v1, bitmaps of 512 bytes to 4096: 16 folios")
    assert run("convert", source, "--kernel", "6.17", "-o", tmp_path / "new.elf").out.startswith("kho-v1 to kho-v1: ")


def test_what_no_kernel_of_an_abi_takes_is_said(tmp_path: Path) -> None:
    """With an ABI and 512-byte bitmaps LUO is written, and Linux 6.16 and 6.17 have none."""
    source = captures.elf("linux-7.0-layout-x86_64")
    done = run("convert", source, "--abi", "kho-v1", "--bitmap-bytes", "512", "-o", tmp_path / "new.elf")
    assert (done.code, done.err.count("warning: Linux 6.16: LUO: lost")) == (0, 1)
    done = run("convert", captures.elf("linux-6.18.15-x86_64"), "--abi", "kho-v4", "-o", tmp_path / "new.elf")
    assert "kho_test" not in done.err


def test_a_folio_that_a_named_kernel_cannot_restore_is_a_warning(tmp_path: Path) -> None:
    """Its MAX_PAGE_ORDER depends on the configuration, which a release does not tell."""
    arena = kho.Arena(256 * MIB, scratch="16M,32M,16M")
    out = kho.Outgoing(arena, "kho-v3")
    out.preserve_folio(arena.alloc(11, gigantic=True))
    out.finalize()
    out.save(tmp_path / "old.elf")
    done = run("convert", tmp_path / "old.elf", "--kernel", "7.0", "-o", tmp_path / "new.elf")
    assert done.code == 0
    assert "warning: Linux 7.0: folios of order 11 and more: lost" in done.err


def test_a_target_is_named_once(tmp_path: Path) -> None:
    source = captures.elf("linux-6.18.15-x86_64")
    for named in ((), ("--abi", "kho-v4", "--kernel", "7.3"), ("--kernel", "7.0", "--bitmap-bytes", "512")):
        assert run("convert", source, *named, "-o", tmp_path / "new.elf").code == 2
    assert run("convert", source, "--kernel", "6.12", "-o", tmp_path / "new.elf").code == 2
