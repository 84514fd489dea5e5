"""Formats of public drafts, and versions that are not known: written, read, shown as such, and never chosen by kho."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho import _kho
from kho.formats import Broken, Luo, MemfdFile, Raw, drafts_in, unverified_in
from kho.formats.features import HEADER, LUO_BITS, MEMFD_BITS, Features, is_header
from kho.handover.owners import owners
from kho.handover.verify import verify, verify_fdt
from test_verify import Edit

import captures
import handovers
import images
from bounded import bounded
from command import kho as run
from model import Node

PAGE = 4096
DRAFT = "kho-v4;radix-v1;vmalloc-v1"
U64 = st.integers(0, 2**64 - 1)
WORDS = st.one_of(U64, st.sampled_from([0, 1, 7, 8, PAGE, 2**63, 2**64 - 1]), st.integers(0, 255))


def memory_of(arena: kho.Arena) -> list[tuple[int, bytes]]:
    """The memory that a kernel would keep of an arena: folios and map."""
    inc = kho.open(arena)
    areas = [(phys, inc.page_size << order) for phys, order in inc.folios] + inc.map_nodes
    return [(phys, arena.read(phys, size)) for phys, size in images.merged(areas)]


def two_files(abi: str, version: str | None = None) -> tuple[kho.Arena, int]:
    """A handover with a session, two memfds and an FLB; the address of LUO's structure."""
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, abi)
    out.add_luo(liveupdate_num=3, version=version)
    out.add_memfd("vm-1", 0x10, b"guest memory", order=1, seals=0x6, pos=5)
    out.add_memfd("vm-1", 0x11, b"")
    out.add_flb("pci", 0xFEED, 2)
    out.finalize()
    return arena, out.subtrees["LUO"][0]


@cache
def segments(kind: str) -> list[tuple[int, bytes]]:
    abi, version = {"composite": (DRAFT, None), "features": ("kho-v4", "luo-features"), "v4": ("kho-v4", None)}[kind]
    return memory_of(two_files(abi, version)[0])


def edit(kind: str) -> Edit:
    return Edit(segments(kind))


def opened(edited: Edit) -> kho.Incoming:
    return kho.open(edited.memory)


def renamed(kind: str, old: bytes, new: bytes, phys: int) -> Edit:
    made = edit(kind)
    made.replace(phys, old, new)
    return made


def everything(inc: kho.Incoming) -> list[Any]:
    """Use every reader of a handover, as the commands do; errors are kho's own."""
    from kho.handover.describe import describe
    from kho.handover.extract import items

    report = describe(inc)
    json.dumps(report)
    found = [report, owners(inc).totals, verify(inc)]
    for item in items(inc):
        try:
            item.contents().read(16, 0)
        except kho.KhoError as error:
            found.append(str(error))
    return found


# Composite compatibles: the draft's rows


def test_a_draft_is_in_no_list_and_is_found_by_its_name() -> None:
    assert [abi.compatible for abi in _kho.abis().values() if abi.draft] == []
    rows = _kho.abis(drafts=True)
    assert list(rows)[: len(_kho.abis())] == list(_kho.abis())
    (row,) = (abi for abi in rows.values() if abi.draft)
    assert (row.compatible, row.luo, row.memfd, row.released) == (
        DRAFT,
        "luo-v5;block-v1",
        "memfd-v2;vmalloc-v1",
        False,
    )
    for text in (run("convert", "--help").out, run("plan", "--help").out, run("simulate", "--help").out):
        assert "radix-v1" not in text
    assert kho.Outgoing(kho.Arena("1M")).abi == "kho-v1"


def test_a_compatible_is_taken_apart_and_each_part_judged() -> None:
    assert _kho.split_compatible("kho-v4") == ("kho-v4", [], [])
    assert _kho.split_compatible(DRAFT) == ("kho-v4", ["radix-v1", "vmalloc-v1"], [])
    base, parts, doubts = _kho.split_compatible("luo-v5;block-v2;hash-v1")
    assert (base, parts) == ("luo-v5", ["block-v2", "hash-v1"])
    assert doubts == [
        'part "block-v2" is not known: chains of blocks read as block-v1',
        'part "hash-v1" is not known',
    ]


@given(st.text(max_size=200), st.lists(st.text(max_size=60), max_size=40))
def test_any_text_is_taken_apart_in_few_and_short_doubts(base: str, parts: list[str]) -> None:
    text = ";".join([base, *parts])
    found_base, found_parts, doubts = _kho.split_compatible(text)
    assert ";".join([found_base, *found_parts]) == text
    assert len(doubts) <= 9
    assert all(len(doubt) < 700 for doubt in doubts)
    assert bool(doubts) or found_parts == sorted(set(found_parts))


# Known bytes


def test_the_draft_writes_the_strings_and_moves_the_fields_by_8() -> None:
    arena, luo = two_files(DRAFT)
    inc = kho.open(arena)
    assert bytes(inc.fdt).count(DRAFT.encode() + b"\0") == 1
    data = arena.read(luo, 40)
    assert inc.subtrees["LUO"].size == 40
    assert data[:16] == b"luo-v5;block-v1\0"
    number, sessions, flbs = struct.unpack("<QQQ", data[16:])
    assert number == 3
    following, count, name, files, nr_files = struct.unpack("<QQ64sQQ", arena.read(sessions, 96))
    assert (following, count, name.rstrip(b"\0"), nr_files) == (0, 1, b"vm-1", 2)
    compatible, memfd, token = struct.unpack("<48sQQ", arena.read(files + 16, 64))
    assert (compatible.rstrip(b"\0"), token) == (b"memfd-v2;vmalloc-v1", 0x10)
    assert struct.unpack("<QQIIQ", arena.read(memfd, 32)) == (5, 12, 0x6, 0, 1)
    assert struct.unpack("<QQ48sQQ", arena.read(flbs, 80))[:3] == (1, 1, b"pci".ljust(48, b"\0"))


def test_the_rival_draft_writes_128_bytes_first_and_no_version() -> None:
    arena, luo = two_files("kho-v4", "luo-features")
    assert kho.open(arena).subtrees["LUO"].size == 152
    data = arena.read(luo, 152)
    assert data[:128] == struct.pack("<QQQ", 0b111, 0b111, 0b111).ljust(128, b"\0")
    number, sessions, _ = struct.unpack("<QQQ", data[128:])
    assert number == 3
    (files,) = struct.unpack("<Q", arena.read(sessions + 16 + 64, 8))
    compatible, memfd, _ = struct.unpack("<48sQQ", arena.read(files + 16, 64))
    assert compatible.rstrip(b"\0") == b"memfd"
    data = arena.read(memfd, 128 + 48)
    assert data[:128] == struct.pack("<QQQ", 0b11, 0b11, 0b11).ljust(128, b"\0")
    assert struct.unpack("<QQIIQ", data[128:160]) == (5, 12, 0x6, 0, 1)


# Round trips


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_a_complete_handover_of_the_draft_is_read_as_it_was_written(page_size: int) -> None:
    arena, _, expected = handovers.complete(DRAFT, page_size=page_size)
    inc = kho.open(arena)
    handovers.check(inc, expected)
    assert (inc.compatible, inc.abi.compatible, inc.unverified) == (DRAFT, DRAFT, [])
    assert drafts_in(inc, inc.payloads) == [DRAFT, "luo-v5;block-v1", "memfd-v2;vmalloc-v1"]
    assert unverified_in(inc, inc.payloads) == []
    found = verify(arena)
    assert {f.id for f in found} == {"KHO044"}
    assert {f.severity for f in found} == {"note"}
    taken = kho.Incoming(arena)
    assert taken.restore_folio(expected.folios[0][0]).phys == expected.folios[0][0]


def test_a_handover_with_feature_headers_is_read_as_it_was_written() -> None:
    inc = opened(edit("features"))
    luo = inc.luo
    assert (luo.compatible, luo.liveupdate_num, luo.draft) == ("luo-features", 3, True)
    files = luo.sessions["vm-1"].files
    assert (files[0x10].read(), files[0x10].seals, files[0x10].pos) == (b"guest memory", 0x6, 5)
    assert (files[0x11].read(), files[0x10].compatible) == (b"", "memfd")
    assert [(flb.name, flb.data, flb.count) for flb in luo.flbs] == [("pci", 0xFEED, 2)]
    assert drafts_in(inc, inc.payloads) == ["luo-features", "memfd"]
    assert {f.id for f in verify(edit("features").memory)} == {"KHO018", "KHO036", "KHO044"}
    found = owners(inc)
    assert (len(found.unowned), len(found.unpreserved), found.shared) == (0, 0, [])
    assert luo.describe()["features"] == {word: list(LUO_BITS) for word in ("supported", "required", "active")}


def test_only_the_strings_differ_from_the_released_version() -> None:
    """The draft changes no map: the same calls preserve the same folios, with the same content but for LUO."""
    released, draft = kho.open(two_files("kho-v4")[0]), kho.open(two_files(DRAFT)[0])
    assert released.folios == draft.folios
    assert released.map_nodes == draft.map_nodes
    assert [f.read() for f in released.luo.sessions["vm-1"].files.values()] == [
        f.read() for f in draft.luo.sessions["vm-1"].files.values()
    ]


def test_luo_can_be_written_in_any_version_by_name_and_in_no_other() -> None:
    for version in ("luo-v1", "luo-v5", "luo-v5;block-v1", "luo-features"):
        arena, _ = two_files("kho-v4", version)
        assert kho.open(arena).luo.compatible == version
    out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
    with pytest.raises(kho.UnsupportedAbiError, match="luo-v9: kho cannot write it; it writes luo-features, luo-v1"):
        out.add_luo(version="luo-v9")
    assert dict(out.subtrees) == {}


# Unknown versions


def test_an_unknown_version_of_every_format_is_read_and_marked() -> None:
    """The same bytes under other names: everything is shown, and each name is said to be unknown."""
    made = edit("v4")
    inc = made.inc
    (files,) = inc.luo.sessions["vm-1"].blocks
    made.replace(inc.fdt_phys, b"kho-v4\0", b"kho-v9\0")
    made.replace(inc.subtrees["LUO"].phys, b"luo-v5\0", b"luo-v8\0")
    made.put(files[0] + 16, b"memfd-v7\0")
    future = opened(made)
    assert (future.compatible, future.abi.compatible, future.kernels) == ("kho-v9", "kho-v4", "no known kernel")
    assert future.unverified == ['version "kho-v9" is not known: read as kho-v4']
    assert future.folios == inc.folios
    luo = future.luo
    assert luo.unverified == ("version 'luo-v8' is not known: read as luo-v5",)
    file = luo.sessions["vm-1"].files[0x10]
    assert (file.read(), file.seals) == (b"guest memory", 0x6)
    assert file.unverified == ("version 'memfd-v7' is not known: read as memfd-v2",)
    assert unverified_in(future, future.payloads) == [
        'root FDT: version "kho-v9" is not known: read as kho-v4',
        "subtree LUO: version 'luo-v8' is not known: read as luo-v5",
        "session vm-1, file 0x10: version 'memfd-v7' is not known: read as memfd-v2",
    ]
    found = [f for f in verify(made.memory) if f.id != "KHO018"]
    assert [(f.id, f.severity) for f in found] == [("KHO046", "warning")] * 3
    assert owners(future).unverified == unverified_in(future, future.payloads)


def test_the_commands_mark_what_is_unverified(tmp_path: Path) -> None:
    content = bytearray(captures.elf("linux-7.3.4-x86_64").read_bytes())
    at = content.index(b"kho-v4\0")
    content[at : at + 6] = b"kho-v9"
    path = tmp_path / "future.elf"
    path.write_bytes(content)
    doubt = 'version "kho-v9" is not known: read as kho-v4'
    done = run("inspect", path)
    assert (done.code, done.out.splitlines()[0]) == (0, f"kho-v9 handover (no known kernel) in {path}")
    assert f"unverified: root FDT: {doubt}" in done.out
    assert "01c29cb64734b836" in done.out
    report = run("inspect", "--json", path).json
    assert (report["compatible"], report["read_as"]) == ("kho-v9", "kho-v4")
    assert report["unverified"] == [f"root FDT: {doubt}"]
    expected = captures.expected("linux-7.3.4-x86_64")
    assert report["folios_by_order"] == expected["folios_by_order"]
    done = run("owners", path)
    assert (done.code, done.out.splitlines()[0]) == (0, f"unverified: root FDT: {doubt}")
    assert run("owners", "--json", path).json["unverified"] == [f"root FDT: {doubt}"]
    done = run("verify", path)
    assert (done.code, "0 errors, 1 warning" in done.out) == (0, True)
    done = run("extract", path, "--session", "vm-1", "--token", "0x11", "-o", tmp_path / "file")
    assert (done.code, f"unverified: {doubt}" in done.err) == (0, True)
    done = run("extract", path, "--all", tmp_path / "all")
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert (manifest["compatible"], manifest["read_as"], manifest["unverified"]) == ("kho-v9", "kho-v4", [doubt])
    assert run("inspect", "--json", captures.elf("linux-7.3.4-x86_64")).json["unverified"] == []


@pytest.mark.parametrize("name", captures.NAMES)
def test_a_capture_under_an_unknown_name_is_read_by_evidence(name: str, tmp_path: Path) -> None:
    content = bytearray(captures.elf(name).read_bytes())
    sane = kho.open(captures.elf(name))
    at = content.index(sane.compatible.encode() + b"\0")
    content[at : at + 6] = b"kho-v9"
    (tmp_path / "future.elf").write_bytes(content)
    future = kho.open(tmp_path / "future.elf", fdt_phys=sane.fdt_phys)
    assert future.folios == sane.folios
    assert (future.abi.map, future.abi.subtree_property) == (sane.abi.map, sane.abi.subtree_property)
    assert {n: s.phys for n, s in future.subtrees.items()} == {n: s.phys for n, s in sane.subtrees.items()}
    assert future.unverified


def test_a_composite_with_unknown_parts_is_read_as_its_base() -> None:
    arena, _ = two_files(DRAFT)
    made = Edit(memory_of(arena))
    made.replace(made.inc.fdt_phys, b";radix-v1;vmalloc-v1\0", b";radix-v2;zmalloc-v1\0")
    inc = opened(made)
    assert inc.abi.compatible == "kho-v4"
    assert inc.unverified == [
        'part "radix-v2" is not known: the radix tree of the map read as radix-v1',
        'part "zmalloc-v1" is not known',
    ]
    assert inc.folios == made.inc.folios
    luo = made.inc.subtrees["LUO"].phys
    for new, doubts in (
        (b"luo-v5;block-v7", ('part "block-v7" is not known: chains of blocks read as block-v1',)),
        (b"luo-v6;block-v1", ("version 'luo-v6' is not known: read as luo-v5",)),
        (b"luo-v5;radix-v1", ("a combination of parts that no draft has: read as luo-v5",)),
    ):
        made.put(luo, new)
        found = opened(made).luo
        assert (found.compatible, found.unverified, found.liveupdate_num) == (new.decode(), doubts, 3)
        assert found.sessions["vm-1"].files[0x10].read() == b"guest memory"


def test_an_unknown_file_in_the_layout_of_an_old_version_is_read_as_that() -> None:
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v1")
    out.add_memfd("s", 1, b"bytes" * 2000)
    out.finalize()
    made = Edit(memory_of(arena))
    ((phys, _),) = made.inc.luo.sessions["s"].blocks
    made.put(phys, b"memfd-v5")
    file = opened(made).luo.sessions["s"].files[1]
    assert (file.read(), file.unverified) == (b"bytes" * 2000, ("version 'memfd-v5' is not known: read as memfd-v1",))


def test_a_map_like_no_known_one_leaves_what_the_root_leads_to() -> None:
    made = edit("v4")
    made.replace(made.inc.fdt_phys, b"kho-v4\0", b"kho-v9\0")
    made.put(made.map_phys, b"\x07" * PAGE)
    inc = opened(made)
    assert (inc.nr_folios, inc.certainty, inc.map_pages) == (0, "not read", [])
    assert inc.unverified[1].startswith("its map cannot be read as that of any known version")
    assert inc.luo.sessions["vm-1"].files[0x11].read() == b""
    assert "KHO004" in [f.id for f in verify(made.memory)]
    everything(inc)
    known = edit("v4")
    known.put(known.map_phys, b"\x07" * PAGE)
    with pytest.raises(kho.FormatError):
        opened(known)


def test_an_arena_of_an_unknown_version_is_read_and_not_taken_over() -> None:
    new = "kho-v8"
    _kho.Abi._add(new, like="kho-v4")
    try:
        arena, _ = two_files(new)
    finally:
        _kho.Abi._remove(new)
    assert kho.open(arena).unverified
    with pytest.raises(kho.UnsupportedAbiError, match=new):
        kho.Incoming(arena)


def test_what_fits_no_version_is_still_refused_by_name() -> None:
    made = edit("v4")
    page = made.get(made.inc.fdt_phys, PAGE)
    made.put(
        made.inc.fdt_phys, page.replace(b"kho-v4\0", b"kho-v9\0").replace(b"preserved-memory", b"something-whatso")
    )
    with pytest.raises(kho.UnsupportedAbiError, match='compatible "kho-v9"'):
        opened(made)
    assert [f.id for f in verify(made.memory)] == ["KHO002", "KHO018"]


def test_a_bare_fdt_of_an_unknown_version_is_a_warning() -> None:
    made = edit("v4")
    blob = bytes(made.inc.fdt)
    assert verify_fdt(blob) == []
    (finding,) = verify_fdt(blob.replace(b"kho-v4\0", b"kho-v9\0"))
    assert (finding.id, finding.severity) == ("KHO046", "warning")
    assert "read as kho-v4" in finding.value


def test_names_that_are_no_version_stay_raw() -> None:
    made = edit("v4")
    inc = made.inc
    ((phys, _),) = inc.luo.sessions["vm-1"].blocks
    for name in (b"vfio-pci-v1", b"memfdx-v2", b"memfd-vX", b";", b"memfd-v", b"-v1"):
        made.put(phys + 16, name.ljust(48, b"\0"))
        assert isinstance(opened(made).luo.sessions["vm-1"].files[0x10], Raw), name


# Conversion


@pytest.mark.parametrize("kind", ["composite", "features"])
def test_a_draft_is_converted_to_a_release_and_no_release_to_a_draft(kind: str, tmp_path: Path) -> None:
    made = edit(kind)
    kho.convert(made.inc, "kho-v4", drop=["flbs"]).save(tmp_path / "v4.elf")
    inc = kho.open(tmp_path / "v4.elf")
    assert (inc.compatible, inc.luo.compatible, drafts_in(inc, inc.payloads)) == ("kho-v4", "luo-v5", [])
    assert [entry.compatible for entry in inc.luo.sessions["vm-1"].entries] == ["memfd-v2", "memfd-v2"]
    file = inc.luo.sessions["vm-1"].files[0x10]
    assert (file.read(), file.seals, file.pos) == (b"guest memory", 0x6, 5)
    with pytest.raises(kho.UnsupportedAbiError, match="radix-v1"):
        kho.convert(inc, DRAFT)


def test_what_is_not_known_is_not_converted_unless_asked_for() -> None:
    made = edit("v4")
    made.replace(made.inc.fdt_phys, b"kho-v4\0", b"kho-v9\0")
    inc = opened(made)
    with pytest.raises(kho.ParameterError, match='version "kho-v9" is not known: read as kho-v4; --keep-unknown'):
        kho.convert(inc, "kho-v4")
    assert kho.convert(inc, "kho-v4", keep_unknown=True).out.abi == "kho-v4"
    made = renamed("v4", b"luo-v5\0", b"luo-v8\0", luo_header(edit("v4")))
    with pytest.raises(kho.FormatError, match="version 'luo-v8' is not known: read as luo-v5"):
        kho.convert(opened(made), "kho-v3")


# Feature headers: refusals


def luo_header(made: Edit) -> int:
    return made.inc.subtrees["LUO"].phys


def memfd_header(made: Edit) -> int:
    return made.inc.luo.sessions["vm-1"].entries[0].data


def test_unknown_required_bits_are_refused_by_name_and_others_shown() -> None:
    made = edit("features")
    at = luo_header(made)
    made.put(at, HEADER.pack(0b101111, 0b100111, 0b111, bytes(104)))
    broken = opened(made).payloads["LUO"]
    assert isinstance(broken, Broken)
    assert "required features are not known: bit 5; known are NUMBER (bit 0), SESSIONS (bit 1), FLBS (bit 2)" in str(
        broken.error
    )
    assert "KHO023" in [f.id for f in verify(made.memory)]
    made.put(at, HEADER.pack(0b101111, 0b111, 0b1111, bytes(104)))
    luo = opened(made).luo
    assert luo.unverified == ("supported features are not known: bit 3, bit 5", "active features are not known: bit 3")
    assert luo.describe()["features"]["supported"] == [*LUO_BITS, "bit 3", "bit 5"]
    assert luo.sessions["vm-1"].files[0x10].read() == b"guest memory"
    made = edit("features")
    made.put(memfd_header(made), HEADER.pack(0b111, 0b111, 0b11, bytes(104)))
    files = opened(made).luo.sessions["vm-1"].files
    assert isinstance(files[0x10], Broken)
    assert "required features are not known: bit 2; known are SEALS (bit 0), FOLIOS (bit 1)" in str(files[0x10].error)
    assert isinstance(files[0x11], MemfdFile)


def test_a_field_whose_feature_is_not_in_use_is_not_read() -> None:
    made = edit("features")
    at = luo_header(made)
    made.put(at, HEADER.pack(0b111, 0, 0b110, bytes(104)))
    assert opened(made).luo.liveupdate_num == 0
    made.put(at, HEADER.pack(0b111, 0, 0b001, bytes(104)))
    luo = opened(made).luo
    assert (luo.liveupdate_num, luo.sessions, luo.flbs) == (3, {}, [])
    made = edit("features")
    at = memfd_header(made)
    made.put(at, HEADER.pack(0b11, 0, 0b10, bytes(104)))
    file = opened(made).luo.sessions["vm-1"].files[0x10]
    assert (file.seals, file.read()) == (0, b"guest memory")
    made.put(at, HEADER.pack(0b11, 0, 0b01, bytes(104)))
    file = opened(made).luo.sessions["vm-1"].files[0x10]
    assert isinstance(file, Broken)
    assert "FOLIOS is not in use" in str(file.error)


@pytest.mark.parametrize("bits", [LUO_BITS, MEMFD_BITS])
@given(WORDS, WORDS, WORDS, st.sampled_from([bytes(104), b"\1".rjust(104, b"\0"), b"\xff" * 104]))
def test_a_header_is_refused_exactly_if_its_words_contradict_each_other(
    bits: tuple[str, ...], supp: int, req: int, active: int, reserved: bytes
) -> None:
    data = HEADER.pack(supp, req, active, reserved)
    assert is_header(data) == (supp != 0 and not any(reserved))
    known = (1 << len(bits)) - 1
    fine = req & ~known == 0 and req & ~supp == 0 and active & ~supp == 0
    try:
        features = Features.of(data, bits)
    except ValueError as error:
        assert not fine
        assert len(str(error)) < 2000
    else:
        assert fine
        assert features.pack() == data
        assert all(features.has(name) == bool(active >> bit & 1) for bit, name in enumerate(bits))
        assert bool(features.unknown()) == bool((supp | active) & ~known or any(reserved))


# Hostile fields

COMPOSITE_FIELDS: dict[str, Callable[[Edit], int]] = {
    "liveupdate_num": lambda e: luo_header(e) + 16,
    "sessions_pa": lambda e: luo_header(e) + 24,
    "flbs_pa": lambda e: luo_header(e) + 32,
}
FEATURE_FIELDS: dict[str, Callable[[Edit], int]] = {
    **{f"LUO word {n}": (lambda e, n=n: luo_header(e) + 8 * n) for n in range(19)},  # type: ignore[misc]
    **{f"memfd word {n}": (lambda e, n=n: memfd_header(e) + 8 * n) for n in range(22)},  # type: ignore[misc]
}
LISTS: dict[str, Callable[[Edit], int]] = {
    "next session block": lambda e: e.inc.luo.blocks[0][1],
    "number of sessions": lambda e: e.inc.luo.blocks[0][1] + 8,
    "files of the session": lambda e: e.session + 64,
    "count of the session": lambda e: e.session + 72,
    "next file block": lambda e: e.file - 16,
    "number of files": lambda e: e.file - 8,
    "data of a file": lambda e: e.file + 48,
}
HOSTILE = [("composite", name) for name in (*COMPOSITE_FIELDS, *LISTS)] + [
    ("features", name) for name in (*FEATURE_FIELDS, *LISTS)
]


@pytest.mark.parametrize(("kind", "field"), HOSTILE)
@settings(max_examples=12)
@given(value=WORDS)
def test_no_value_of_a_field_breaks_a_reader(kind: str, field: str, value: int) -> None:
    made = edit(kind)
    place = {**COMPOSITE_FIELDS, **FEATURE_FIELDS, **LISTS}[field]
    made.put_u64(place(made), value)
    with bounded(2.0):
        everything(opened(made))


@pytest.mark.parametrize("kind", ["composite", "features"])
@settings(max_examples=30)
@given(st.binary(min_size=1, max_size=64), st.integers(0, 48))
def test_no_name_of_a_version_breaks_a_reader(kind: str, name: bytes, at: int) -> None:
    made = edit(kind)
    made.put(luo_header(made), name)
    made.put(made.file, name[:48])
    everything(opened(made))
    made = edit(kind)
    prefix = b"memfd-v2;"[: at % 10]
    made.put(made.file, (prefix + name)[:48])
    everything(opened(made))


@settings(max_examples=40)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300))
def test_no_compatible_of_a_root_breaks_a_reader(suffix: str) -> None:
    layout = images.Image(folios=[(0x40_0000, 0)]).lay_out()
    layout.root.props["compatible"] = b"kho-v" + suffix.encode()[:2000] + b"\0"
    layout.put_root()
    memory = kho.Memory.from_segments([(phys, bytes(page)) for phys, page in layout.pages.items()])
    try:
        inc = kho.open(memory, fdt_phys=layout.fdt_phys)
    except kho.KhoError:
        return
    assert inc.unverified or inc.compatible in _kho.abis(drafts=True)
    assert all(len(doubt) < 1000 for doubt in inc.unverified)
    everything(inc)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["preserved-memory-map", "fdt", "preserved-data", "blob-size"]), max_size=4, unique=True),
    st.lists(st.sampled_from(["preserved-memory-map", "fdt", "preserved-data", "blob-size"]), max_size=4, unique=True),
    WORDS,
    st.sampled_from([4, 8]),
)
def test_any_root_of_an_unknown_version_is_read_or_refused(
    props: list[str], of_node: list[str], value: int, nbytes: int
) -> None:
    layout = images.Image(folios=[(0x40_0000, 0)]).lay_out()
    layout.root.props.clear()
    layout.root.props["compatible"] = b"kho-v9\0"
    for name in props:
        layout.root.props[name] = value.to_bytes(8, "little")[:nbytes]
    layout.root.children["LUO"] = Node({name: value.to_bytes(8, "little")[:nbytes] for name in of_node})
    layout.put_root()
    memory = kho.Memory.from_segments([(phys, bytes(page)) for phys, page in layout.pages.items()])
    verify(memory, fdt_phys=layout.fdt_phys)
    try:
        inc = kho.open(memory, fdt_phys=layout.fdt_phys)
    except kho.KhoError:
        return
    assert inc.unverified
    everything(inc)


def test_ten_thousand_files_of_an_unknown_version_are_bounded() -> None:
    arena = kho.Arena("64M")
    out = kho.Outgoing(arena, "kho-v4")
    folio = arena.alloc()
    out.preserve_folio(folio)
    for token in range(10_000):
        out.add_file("s", token, "memfd-v9;x-v1", folio.phys + token % 4096 // 8 * 8)
    out.finalize()
    with bounded(4.0):
        inc = kho.open(arena)
        assert len(unverified_in(inc, inc.payloads)) <= 17
    assert isinstance(inc.luo, Luo)
