"""Each defect is found under its own id, in an otherwise valid handover; captures have no errors."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
from kho.cli.verify import documentation
from kho.formats import HwPoison, KhoTest, MemfdFile
from kho.handover import rules as findings
from kho.handover.rules import RULES, Finding
from kho.handover.verify import verify, verify_fdt

import captures
import hostile
import model
from bounded import bounded
from command import kho as run
from images import MIB, Layout, merged
from model import Node

NAME = "linux-7.3.4-x86_64"
PAGE = 4096
ROOT = Path(__file__).parent.parent


class Edit:
    """A memory to be damaged: the pages of a handover by address."""

    def __init__(self, segments: list[tuple[int, bytes]], scratch_phys: int = 0) -> None:
        self.sane = segments
        self.segments = {phys: bytearray(data) for phys, data in segments}
        self.scratch_phys = scratch_phys

    @cached_property
    def inc(self) -> kho.Incoming:
        """The undamaged handover."""
        return kho.open(kho.Memory.from_segments(self.sane))

    @property
    def memory(self) -> kho.Memory:
        return kho.Memory.from_segments([(phys, bytes(data)) for phys, data in self.segments.items()])

    def find(self, phys: int) -> tuple[bytearray, int]:
        start, data = next((s, d) for s, d in self.segments.items() if s <= phys < s + len(d))
        return data, phys - start

    def put(self, phys: int, raw: bytes) -> None:
        data, at = self.find(phys)
        data[at : at + len(raw)] = raw

    def get(self, phys: int, n: int) -> bytes:
        data, at = self.find(phys)
        return bytes(data[at : at + n])

    def u64(self, phys: int) -> int:
        return int.from_bytes(self.get(phys, 8), "little")

    def put_u64(self, phys: int, value: int) -> None:
        self.put(phys, struct.pack("<Q", value))

    def replace(self, phys: int, old: bytes, new: bytes) -> None:
        """Replace the only occurrence of the bytes `old` in the page at `phys`."""
        page = self.get(phys, PAGE)
        assert page.count(old) == 1
        assert len(old) == len(new)
        self.put(phys + page.index(old), new)

    def preserve(self, phys: int, order: int, on: bool = True) -> None:
        """Set or clear a key of a kho-v4 tree with 4 KiB pages; its leaf must exist."""
        key, node = 1 << (52 - order) | phys >> (12 + order), self.map_phys
        for level in range(5, 0, -1):
            node = self.u64(node + 8 * (key >> ((level - 1) * 9 + 15) & 511))
            assert node, "no such leaf"
        byte, bit = node + key % 32768 // 8, 1 << key % 8
        old = self.get(byte, 1)[0]
        assert bool(old & bit) != on
        self.put(byte, bytes([old ^ bit]))

    # Addresses in a valid handover: sessions vm-1 and cache, and kho_test, as the tables below need them.

    @property
    def map_phys(self) -> int:
        return self.inc.preserved_memory_map

    @property
    def fdt_phys(self) -> int:
        return self.inc.fdt_phys

    @cached_property
    def big(self) -> kho.FolioInfo:
        """The largest folio of kho_test; no other folio has its order."""
        test = self.inc.payloads["kho_test"]
        assert isinstance(test, KhoTest)
        return kho.FolioInfo(*max(test.folios, key=lambda folio: folio[1]))

    @cached_property
    def first_entry(self) -> int:
        """The address of the map's first entry."""
        return next(at for at in range(self.map_phys, self.map_phys + PAGE, 8) if self.u64(at))

    @cached_property
    def session(self) -> int:
        """The first session entry, vm-1; each has 80 bytes: name, files, count."""
        return self.inc.luo.blocks[0][1] + 16

    @cached_property
    def file(self) -> int:
        """The first file entry of vm-1; each has 64 bytes: compatible, data, token."""
        return self.inc.luo.sessions["vm-1"].blocks[0][0] + 16

    def memfd(self, token: int = 0x10) -> MemfdFile:
        found = self.inc.luo.sessions["vm-1"].files[token]
        assert isinstance(found, MemfdFile)
        return found

    def record(self, n: int, token: int = 0x10) -> int:
        """The address of a record of a file's folio list; each has 16 bytes: pfn and flags, index."""
        return self.memfd(token).list.blocks[0] + 16 * n


@cache
def captured() -> list[tuple[int, bytes]]:
    memory = kho.Memory.open(captures.elf(NAME))
    return [(phys, memory.read(phys, size)) for phys, size in memory.ranges]


def capture() -> Edit:
    """A complete handover of Linux 7.3.4."""
    return Edit(captured(), int(captures.expected(NAME)["scratch_phys"]))


@cache
def handed_over() -> tuple[list[tuple[int, bytes]], int]:
    """The memory that a kernel would keep of an arena with a complete handover, and the scratch array's address."""
    arena = kho.Arena("96M", scratch="4M,8M,4M")
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd("vm-1", 0x10, random.Random(1).randbytes(6 * MIB))
    out.add_memfd("vm-1", 0x11, b"five thousand".ljust(5000, b"."), pos=13)
    out.add_memfd("cache", 7, b"\x5a" * (2 * MIB), order=9)
    out.add_memfd("cache", 8, b"")
    out.add_reserve_mem("keepme", 64 * 1024)
    out.set_kexec_metadata("7.3.4", 1)
    folios = [arena.alloc(order) for order in (5, 2, 1, 0, 0)]
    for n, folio in enumerate(folios):
        memoryview(folio)[:] = random.Random(n).randbytes(folio.nbytes)
    out.add_kho_test(folios)
    out.finalize()
    inc = kho.open(arena)
    assert arena.scratch_phys is not None
    areas = [(phys, PAGE << order) for phys, order in inc.folios] + inc.map_nodes + [(arena.scratch_phys, PAGE)]
    return [(phys, arena.read(phys, size)) for phys, size in merged(areas)], arena.scratch_phys


def written() -> Edit:
    """A handover as Linux 7.3 writes it, made from Python."""
    return Edit(*handed_over())


class Case(NamedTuple):
    """A defect: the base, the damage, and the arguments of `verify`."""

    damage: Callable[[Edit], None] = lambda edit: None
    options: Callable[[Edit], dict[str, Any]] = lambda edit: {}
    base: Callable[[], Edit] | None = None
    """The base, if it is not one of `BASES`."""


BASES = {"captured": capture, "written": written}


def root_value(old: int, new: int) -> Callable[[Edit], None]:
    """Damage that replaces the value of a property of the root FDT."""

    def damage(edit: Edit) -> None:
        page = edit.get(edit.fdt_phys, PAGE)
        wanted = struct.pack("<Q", old)
        (at,) = (n for n in range(8, PAGE, 4) if page[n : n + 8] == wanted and page[n - 8 : n - 4] == b"\0\0\0\x08")
        edit.put_u64(edit.fdt_phys + at, new)

    return damage


def put(where: Callable[[Edit], int], form: str, *values: Any) -> Callable[[Edit], None]:
    """Damage that writes a struct."""
    return lambda edit: edit.put(where(edit), struct.pack("<" + form, *values))


def shared_node(edit: Edit) -> None:
    edit.put_u64(edit.first_entry + 8, edit.u64(edit.first_entry))


def a_level_too_low(edit: Edit) -> None:
    order_0 = edit.u64(edit.map_phys + 2 * 8)
    root_value(edit.map_phys, order_0)(edit)


def entry_in_no_page(edit: Edit) -> None:
    edit.put_u64(edit.first_entry, edit.u64(edit.first_entry) + 8)


def from_layout(layout: Layout) -> Edit:
    return Edit([(phys, bytes(page)) for phys, page in layout.pages.items()])


def misaligned_start() -> Edit:
    layout = hostile.sane().lay_out()
    hostile.REFUSED["phys_start misaligned"](layout)
    return from_layout(layout)


def either_page_size() -> Edit:
    """A kho-v1 map that is equally valid with 4 KiB and 16 KiB pages: the FDT's bit is set in both readings."""
    fdt, chunk, bitmap = 0x10000, 0x20000, 0x30000
    edit = Edit([(0, bytes(512 << 10))])
    root = Node({"compatible": b"kho-v1\0", "preserved-memory-map": struct.pack("<Q", chunk)})
    edit.put(fdt, model.write_fdt(root))
    edit.put(chunk, struct.pack("<QIIQQ", 0, 0, 1, 0, bitmap))
    edit.put_u64(bitmap, 1 << (fdt >> 12) | 1 << (fdt >> 14))
    return edit


def luo_v1(abi: str, *, flb_node: bool) -> Edit:
    """A LUO subtree of Linux 6.19 (without the node luo-flb) or 7.0, without sessions, under a map of any version."""
    arena = kho.Arena("96M", scratch="4M,8M,4M")
    out = kho.Outgoing(arena, abi)
    sessions = arena.alloc(4)
    out.preserve_folio(sessions)
    nodes = {"luo-session": Node({"compatible": b"luo-session-v2\0", "luo-session-header": pack_u64(sessions.phys)})}
    if flb_node:
        nodes["luo-flb"] = Node({"compatible": b"luo-flb-v1\0", "luo-flb-header": pack_u64(0)})
    root = Node({"compatible": b"luo-v1\0", "liveupdate-number": pack_u64(1)}, nodes)
    out.add_subtree("LUO", model.write_fdt(root))
    out.finalize()
    assert arena.scratch_phys is not None
    inc = kho.open(arena)
    pages = [(phys, PAGE << order) for phys, order in inc.folios] + inc.map_nodes + [(arena.scratch_phys, PAGE)]
    return Edit([(phys, arena.read(phys, size)) for phys, size in merged(pages)], arena.scratch_phys)


def like_no_version(edit: Edit) -> None:
    """Change the compatible, and the name of the map's property."""
    page = edit.get(edit.fdt_phys, PAGE).replace(b"kho-v4\0", b"kho-v9\0")
    edit.put(edit.fdt_phys, page.replace(b"preserved-memory-map\0", b"preserved-memory-tab\0"))


def no_map() -> Edit:
    """A descriptor store of systemd whose map is not JSON."""
    arena = kho.Arena("96M", scratch="4M,8M,4M")
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd("systemd", 0, b"no JSON")
    out.finalize()
    assert arena.scratch_phys is not None
    inc = kho.open(arena)
    pages = [(phys, PAGE << order) for phys, order in inc.folios] + inc.map_nodes + [(arena.scratch_phys, PAGE)]
    return Edit([(phys, arena.read(phys, size)) for phys, size in merged(pages)], arena.scratch_phys)


def pack_u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def poisoned() -> Edit:
    """A handover whose list of poisoned pages names a page of a preserved folio."""
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v4")
    folio = arena.alloc(3)
    out.preserve_folio(folio)
    out.add_payload(HwPoison, {"pfns": [1, folio.pfn + 5]}, subtree="hwpoison", draft=True)
    out.finalize()
    return Edit([(0, arena.read(0, 16 * MIB))])


def lost_folio(edit: Edit) -> None:
    folio = edit.memfd().folios[0]
    edit.preserve(folio.phys, folio.order, on=False)


def same_folio_twice(edit: Edit) -> None:
    edit.put_u64(edit.record(0, 0x11), edit.u64(edit.record(0)))


def own_scratch(edit: Edit) -> dict[str, Any]:
    return {"scratch": edit.inc.scratch}


def in_own_scratch(edit: Edit) -> None:
    """Preserve a page of scratch, in the leaf of the order-0 folio with the highest address."""
    leaf = max(phys for phys, order in edit.inc.folios if order == 0) // LEAF
    assert edit.inc.scratch
    edit.preserve(next(addr for addr, _ in edit.inc.scratch if addr // LEAF == leaf), 0)


LEAF = 32768 * PAGE
NOWHERE = 0x700_0000
"""An address without memory in either base, in an existing leaf."""


def edited_root() -> Edit:
    """A handover of Linux 7.0, whose kernels write the root at boot and edit it."""
    arena = kho.Arena("64M", scratch="2M,2M,2M")
    out = kho.Outgoing(arena, kernel="7.0")
    out.add_reserve_mem("keepme", 64 * 1024)
    out.add_memfd("vm-1", 0x10, b"guest")
    out.finalize()
    inc = kho.open(arena)
    assert arena.scratch_phys is not None
    areas = [(phys, PAGE << order) for phys, order in inc.folios] + inc.map_nodes + [(arena.scratch_phys, PAGE)]
    return Edit([(phys, arena.read(phys, size)) for phys, size in merged(areas)], arena.scratch_phys)


def node_without_property(edit: Edit) -> None:
    """Add a node to the root, as a kernel does that has no room left for its property."""
    root = Node({name: edit.inc.fdt.root[name] for name in ("compatible", "preserved-memory-map")}, {"left": Node({})})
    for node in edit.inc.fdt.root.children:
        root.children[node.name] = Node({"fdt": node["fdt"]})
    edit.put(edit.fdt_phys, model.write_fdt(root))


def of_kernel(kernel: str, files: list[list[tuple[int, int]]]) -> tuple[kho.Outgoing, list[list[kho.Folio]]]:
    """A handover of a kernel with a memfd for each list of (order, flags)."""
    arena = kho.Arena("64M", scratch="2M,2M,2M")
    out = kho.Outgoing(arena, kernel=kernel)
    made = []
    for token, folios in enumerate(files):
        held = [arena.alloc(order) for order, _ in folios]
        index, entries = 0, []
        for folio, (order, flags) in zip(held, folios, strict=True):
            entries.append(kho.MemfdFolio(folio.phys, order, index, flags))
            index += 1 << order
        out.add_memfd("vm-1", token, entries, size=index * PAGE)
        made.append(held)
    return out, made


def edit_of(out: kho.Outgoing) -> Edit:
    out.finalize()
    arena = out.arena
    inc = kho.open(arena)
    assert arena.scratch_phys is not None
    areas = [(phys, PAGE << order) for phys, order in inc.folios] + inc.map_nodes + [(arena.scratch_phys, PAGE)]
    return Edit([(phys, arena.read(phys, size)) for phys, size in merged(areas)], arena.scratch_phys)


def memfd_without(kernel: str, *lost: int) -> Edit:
    """A memfd of three folios; the `lost` ones are not preserved."""
    out, (folios,) = of_kernel(kernel, [[(1, 3), (0, 3), (0, 3)]])
    for n in lost:
        out.unpreserve_folio(folios[n])
    return edit_of(out)


def before_the_jump(edit: Edit) -> None:
    """Empty LUO's list of sessions."""
    edit.put(edit.inc.luo.blob.phys + 16, bytes(16))


def two_structures_of_one_memfd(edit: Edit) -> None:
    """Copy a memfd's structure over its own first page of data: both name one list, and no session has either."""
    session = next(session for session in edit.inc.luo.all_sessions if session.entries)
    file = next(f for f in map(session.files.decode, session.entries) if isinstance(f, kho.formats.MemfdFile))
    edit.put(file.folios[0].phys, edit.get(file.blob.phys, 48).ljust(PAGE, b"\0"))
    before_the_jump(edit)


CORRUPTIONS: dict[str, Case] = {
    "KHO001": Case(lambda edit: root_value(edit.map_phys, 0)(edit)),
    "KHO002": Case(like_no_version),
    "KHO004": Case(put(lambda edit: edit.first_entry, "Q", 0x4000_0000_0000)),
    "KHO005": Case(shared_node),
    "KHO006": Case(a_level_too_low),
    "KHO007": Case(entry_in_no_page),
    "KHO008": Case(base=either_page_size),
    "KHO009": Case(lambda edit: edit.preserve(*edit.big, on=False)),
    "KHO010": Case(options=lambda edit: {"scratch": [(edit.map_phys // (2 * MIB) * 2 * MIB, 2 * MIB)]}),
    "KHO011": Case(lambda edit: edit.preserve(edit.map_phys, 0)),
    "KHO012": Case(lambda edit: edit.preserve(edit.big.phys, 0)),
    "KHO013": Case(base=misaligned_start),
    "KHO014": Case(lambda edit: edit.preserve(NOWHERE, 0)),
    "KHO015": Case(in_own_scratch, own_scratch),
    "KHO016": Case(
        options=lambda edit: {"nodes": [(0, edit.big.phys + PAGE, 0), (edit.big.phys + PAGE, 1 << 30, 1)]},
    ),
    "KHO017": Case(options=lambda edit: {"scratch": [(0xB40_1000, 16 * MIB)]}),
    "KHO018": Case(lambda edit: edit.put(edit.scratch_phys, bytes(48))),
    "KHO019": Case(lambda edit: edit.replace(edit.fdt_phys, b"preserved-data\0", b"preserved-atad\0")),
    "KHO020": Case(root_value(32, 16)),
    "KHO021": Case(lambda edit: edit.preserve(edit.fdt_phys, 0, on=False)),
    "KHO022": Case(lost_folio),
    "KHO023": Case(
        lambda edit: edit.replace(edit.inc.subtrees["kho_test"].phys, struct.pack("<I", 0x4B484F21), b"nope")
    ),
    "KHO024": Case(lambda edit: edit.put(edit.big.phys, b"\xff\xfe\xfd")),
    "KHO025": Case(put(lambda edit: edit.file, "48s", b"vendor-v1")),
    "KHO026": Case(put(lambda edit: edit.memfd().blob.phys + 40, "I", 9999)),
    "KHO027": Case(put(lambda edit: edit.record(1) + 8, "Q", 0)),
    "KHO028": Case(put(lambda edit: edit.record(1) + 8, "Q", 6 * MIB // PAGE)),
    "KHO029": Case(put(lambda edit: edit.memfd().blob.phys + 24, "Q", 9999)),
    "KHO030": Case(put(lambda edit: edit.session + 80, "64s", b"vm-1")),
    "KHO031": Case(put(lambda edit: edit.file + 64 + 56, "Q", 0x10)),
    "KHO032": Case(put(lambda edit: edit.session + 72, "Q", 3)),
    "KHO033": Case(same_folio_twice),
    "KHO034": Case(lambda edit: edit.preserve(NOWHERE, 0)),
    "KHO035": Case(base=poisoned),
    "KHO036": Case(base=lambda: luo_v1("kho-v4", flb_node=True)),
    "KHO037": Case(base=lambda: luo_v1("kho-v1", flb_node=False)),
    "KHO038": Case(put(lambda edit: edit.file, "48s", b"memfd-v1")),
    "KHO039": Case(options=lambda edit: {"kernel": "7.1"}),
    "KHO047": Case(lambda edit: root_value(edit.map_phys, 0)(edit), base=edited_root),
    "KHO048": Case(node_without_property, base=edited_root),
    "KHO049": Case(base=lambda: edit_of(of_kernel("6.19", [[(0, 1)]])[0])),
    "KHO050": Case(options=lambda edit: {"scratch": [(2 * MIB, 3 * MIB)]}, base=edited_root),
    "KHO051": Case(options=lambda edit: {"kernel": "6.19"}, base=lambda: edit_of(of_kernel("6.17", [])[0])),
    "KHO052": Case(options=lambda edit: {"kernel": "7.0.3"}, base=lambda: memfd_without("7.0", 1)),
    "KHO043": Case(before_the_jump),
    "KHO056": Case(before_the_jump),
    "KHO057": Case(two_structures_of_one_memfd),
    "KHO044": Case(put(lambda edit: edit.file, "48s", b"memfd-v2;vmalloc-v1")),
    "KHO045": Case(base=no_map),
    "KHO046": Case(lambda edit: edit.replace(edit.fdt_phys, b"kho-v4\0", b"kho-v9\0")),
}


def ids(found: list[Finding]) -> list[str]:
    return [f.id for f in found]


@pytest.mark.parametrize("name", captures.NAMES)
def test_handovers_of_real_kernels_have_no_errors(name: str) -> None:
    found = verify(captures.elf(name))
    assert [f for f in found if f.severity != "note"] == []
    done = run("verify", captures.elf(name))
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"0 errors, 0 warnings, {len(found)} notes\n")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", CORRUPTIONS)
def test_each_corruption_is_found_under_its_id(rule: str, base: str) -> None:
    case = CORRUPTIONS[rule]
    edit = (case.base or BASES[base])()
    case.damage(edit)
    memory, options = edit.memory, case.options(edit)
    with bounded():
        found = verify(memory, **options)
    assert rule in ids(found), found
    finding = next(f for f in found if f.id == rule)
    assert finding.place
    assert finding.value
    assert (finding.severity, finding.title) == (RULES[rule].severity, RULES[rule].title)


# Faults of releases


@pytest.mark.parametrize(("flags", "n"), [([3, 3], 0), ([3, 1], 1), ([2, 0], 2), ([0, 3], 1)])
def test_folios_that_were_not_settled_prove_a_kernel_that_loses_late_writes(flags: list[int], n: int) -> None:
    out, _ = of_kernel("6.19", [[(1, each) for each in flags], [(0, 3)]])
    edit = edit_of(out)
    found = [f for f in verify(edit.memory) if f.id == "KHO049"]
    wanted = [("session vm-1, file 0x0", f"{n} of 2 folios were not dirty, or not up to date")] if n else []
    assert [(f.place.partition(" at")[0], f.value.partition(", when")[0]) for f in found] == wanted


@pytest.mark.parametrize(
    ("release", "found"),
    [
        ("6.19.8", True),
        ("6.19.9", False),
        ("6.19", False),
        ("6.19.0-5-generic", True),
        ("7.0.0", False),
        ("6.18.1", False),
    ],
)
def test_the_release_of_a_machine_tells_which_faults_it_has(release: str, found: bool, tmp_path: Path) -> None:
    root = tmp_path / "machine"
    shutil.copytree(captures.DATA / "linux-7.0-layout-x86_64/host/stage1", root)
    (root / "proc/version").write_text(f"Linux version {release} (a@b) #1\n")
    listed = [f for f in verify(root) if f.id == "KHO049"]
    assert bool(listed) == found
    assert all(("your vendor may" in f.value) == ("generic" in release) for f in listed)


@pytest.mark.parametrize(
    ("kernel", "size", "found"),
    [
        ("7.0", 3 * MIB, True),
        ("7.0", 4 * MIB, False),
        ("6.19", 2 * MIB + PAGE, True),
        ("7.1", 3 * MIB, True),
        ("7.2", 3 * MIB, False),
    ],
)
def test_sizes_of_scratch_are_compared_with_what_the_kernel_rounds(kernel: str, size: int, found: bool) -> None:
    out, _ = of_kernel(kernel, [[(0, 3)]])
    memory = edit_of(out).memory
    for n, area in enumerate(("low memory", "global", "node 0")):
        areas = [(8 * MIB * (each + 5), size if each == n else 2 * MIB) for each in range(3)]
        places = [f.place.partition(" at")[0] for f in verify(memory, scratch=areas) if f.id == "KHO050"]
        assert places == ([f"scratch area for {area}"] if found and n < 2 else [])


@pytest.mark.parametrize(
    ("lost", "kernel", "found"),
    [
        ((1,), "7.0.10", True),
        ((1, 2), "6.19.11", True),
        ((2,), "7.0.0-14-generic", True),
        ((1,), "7.0.11", False),
        ((0,), "7.0.10", False),
        ((0, 2), "7.0.10", False),
        ((), "7.0.10", False),
    ],
)
def test_a_memfd_that_is_restored_in_part_is_found_for_the_kernel(
    lost: tuple[int, ...], kernel: str, found: bool
) -> None:
    listed = [f for f in verify(memfd_without("7.0", *lost).memory, kernel=kernel) if f.id == "KHO052"]
    assert [f.place for f in listed] == (["session vm-1, file 0x0"] if found else [])
    if found:
        assert f"offset {[0, 2, 3][lost[0]] * PAGE:#x} cannot be restored" in listed[0].value


@pytest.mark.parametrize("base", BASES)
def test_the_undamaged_bases_have_no_findings(base: str) -> None:
    edit = BASES[base]()
    assert verify(edit.memory) == verify(edit.inc) == []


def test_every_rule_has_a_corruption() -> None:
    # Dumps that lack pages are in test_filtered.py.
    assert sorted({*CORRUPTIONS, "KHO003", "KHO040", "KHO041", "KHO042", "KHO058"}) == sorted(RULES)
    assert list(RULES) == sorted(RULES)
    assert all(re.fullmatch("KHO[0-9]{3}", rule) for rule in RULES)


# The kernel that takes over


def found_for(edit: Edit, **given: Any) -> list[tuple[str, str]]:
    return [(f.id, f.severity) for f in verify(edit.memory, **given)]


def test_luo_data_is_judged_for_the_kernels_that_read_the_map() -> None:
    assert found_for(luo_v1("kho-v1", flb_node=True)) == []
    assert found_for(luo_v1("kho-v1", flb_node=False)) == [("KHO037", "note")]
    assert found_for(luo_v1("kho-v3", flb_node=True)) == []
    assert found_for(luo_v1("kho-v3", flb_node=False)) == [("KHO036", "error")]
    assert found_for(luo_v1("kho-v4", flb_node=True)) == [("KHO036", "error")]
    # No released kernel reads kho-v2.
    assert found_for(luo_v1("kho-v2", flb_node=False)) == []


def test_a_named_kernel_takes_the_place_of_all_others() -> None:
    edit = luo_v1("kho-v1", flb_node=False)
    assert found_for(edit, kernel="6.19") == []
    assert found_for(edit, kernel="7.0.11") == [("KHO039", "error")]
    (found,) = verify(edit.memory, kernel="7.0.11")
    assert "LUO" in found.place
    assert "Linux 7.0.11: panics: no node luo-flb" in found.value
    assert found_for(edit, kernel="6.18") == [("KHO039", "error")]  # its memory stays reserved
    with pytest.raises(kho.ParameterError, match=r"Linux 6\.12: kernels with KHO"):
        verify(edit.memory, kernel="6.12")


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("linux-6.18.15-x86_64", ["6.18", "6.19", "7.0"]),
        ("linux-7.0-layout-x86_64", ["7.0", "7.0.0-14-generic"]),
        ("linux-7.1.13-x86_64", ["7.1.13"]),
        ("linux-7.3.4-x86_64", ["7.2", "7.3.4"]),
        ("linux-7.3.4-aarch64", ["7.3"]),
        ("linux-7.3.4-aarch64-64k", ["7.3"]),
    ],
)
def test_a_capture_has_no_findings_for_its_own_kernel(name: str, kernels: list[str]) -> None:
    for kernel in kernels:
        assert verify(captures.elf(name), kernel=kernel) == []


def test_bitmaps_of_another_size_under_the_same_compatible_are_found_for_a_named_kernel() -> None:
    small, large = captures.elf("linux-6.16-layout-x86_64"), captures.elf("linux-6.18.15-x86_64")
    for elf, kernel, verdict, nbytes in (
        (small, "6.18", "panics", 512),
        (small, "7.0", "panics", 512),
        (large, "6.16", "lost", 4096),
        (large, "6.17", "lost", 4096),
    ):
        (found,) = verify(elf, kernel=kernel)
        assert found.id == "KHO051"
        assert f"Linux {kernel}: {verdict}: bitmaps of {nbytes} bytes under the same compatible" in found.value
    assert [f.id for f in verify(small)] == []


def test_a_bare_fdt_and_a_debugfs_directory_are_judged_for_a_named_kernel(tmp_path: Path) -> None:
    path = captures.DATA / NAME / "host/stage1/sys/kernel/debug/kho"
    assert [f.id for f in verify(path, kernel="7.3") if f.severity == "error"] == []
    assert [f.id for f in verify(path, kernel="7.1") if f.severity == "error"] == ["KHO039"]
    inc = kho.open(captures.elf(NAME))
    (tmp_path / "fdt").write_bytes(inc.read(inc.fdt_phys, inc.fdt.totalsize))
    assert verify(tmp_path / "fdt", kernel="7.2") == []
    assert [f.id for f in verify(tmp_path / "fdt", kernel="6.19")] == ["KHO039"]
    assert [f.id for f in verify_fdt((tmp_path / "fdt").read_bytes(), kernel="7.0")] == ["KHO039"]


def test_the_command_judges_for_a_named_kernel() -> None:
    done = run("verify", "--kernel", "7.1", captures.elf(NAME))
    assert done.code == 1
    assert "error KHO039" in done.out
    assert run("verify", "--kernel", "7.3", captures.elf(NAME)).code == 0
    assert run("verify", "--kernel", "5.4", captures.elf(NAME)).code == 2


def test_a_truncated_fdt_of_debugfs_still_gives_abi_and_map() -> None:
    path = captures.DATA / NAME / "host/stage1/sys/kernel/debug/kho/out/fdt"
    (found,) = verify(path)
    assert found.id == "KHO003"
    assert "233 bytes of 405" in found.value
    assert f"kho-v4, map at {captures.expected(NAME)['preserved_memory_map']:#x}" in found.value


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", captures.V1_NAMES)
def test_a_bare_fdt_can_be_valid(name: str, stage: int) -> None:
    assert verify_fdt(captures.debugfs(name, stage, "out/fdt" if stage == 1 else "in/fdt")) == []


def test_an_unreadable_map_does_not_hide_other_findings() -> None:
    edit = capture()
    shared_node(edit)
    root_value(240, 100)(edit)
    found = verify(edit.memory, scratch=[(0xB40_1000, 16 * MIB)])
    assert ids(found) == ["KHO005", "KHO020", "KHO017"]
    assert "a shared node or a cycle" in found[0].value
    assert found[0].phys


def test_findings_are_limited_and_the_rest_is_counted() -> None:
    edit = capture()
    places = [edit.big.phys + n * PAGE for n in (0, 2, 4, 6)]
    for phys in places:
        edit.preserve(phys, 0)
    found = [f for f in verify(edit.memory, most=2) if f.id == "KHO012"]
    assert [f.phys for f in found] == places[:2]
    assert found[1].value.endswith("(and 2 more places)")


def test_an_open_handover_is_verified() -> None:
    assert verify(capture().inc) == []


def test_an_arena_is_checked_with_its_own_nodes() -> None:
    half = 64 * MIB
    arena = kho.Arena([(0, half, 0), (half, half, 1)], scratch="2M,2M,2M")
    out = kho.Outgoing(arena)
    folio = arena.alloc_at(0x40_0000, 2)
    out.preserve_folio(folio)
    out.finalize()
    assert [i for i in ids(verify(arena)) if RULES[i].severity == "error"] == []


# Hostile input


def attempt(source: Path | kho.Memory) -> list[Finding] | kho.KhoError:
    """The result of verify in bounded time: findings, or a `KhoError`."""
    result: list[Finding] | kho.KhoError
    with bounded():
        try:
            result = verify(source)
        except kho.KhoError as error:
            result = error
    return result


def check(result: list[Finding] | kho.KhoError) -> None:
    if isinstance(result, kho.KhoError):
        assert str(result)
    else:
        assert all(f.id in RULES and f.place and f.value for f in result)


@pytest.mark.parametrize("what", sorted([*hostile.REFUSED, *hostile.ODD, *hostile.FILES]))
def test_malformed_images_give_findings_or_an_error(what: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.elf"
    if what in hostile.FILES:
        path.write_bytes(hostile.FILES[what](hostile.sane().to_bytes()))
        return check(attempt(path))
    path.write_bytes(hostile.damaged({**hostile.REFUSED, **hostile.ODD}[what]))
    check(attempt(path))
    if what in hostile.REFUSED:
        fdt = hostile.sane().lay_out().fdt_phys
        found = verify(path, fdt_phys=fdt)
        assert any(f.severity == "error" for f in found), found
    return None


@given(st.integers(0, 2**64), st.binary(min_size=1, max_size=16))
def test_changed_bytes_give_findings_or_an_error(where: int, value: bytes) -> None:
    edit = capture()
    phys = list(edit.segments)[where % len(edit.segments)]
    data = edit.segments[phys]
    at = where // len(edit.segments) % max(len(data) - len(value), 1)
    data[at : at + len(value)] = value
    check(attempt(edit.memory))


# The command


def damaged(tmp_path: Path, *rules: str) -> Path:
    """A raw file of the capture's low memory, with defects."""
    edit = capture()
    for rule in rules:
        CORRUPTIONS[rule].damage(edit)
    path = tmp_path / "bad.bin"
    with path.open("wb") as out:
        for phys, data in edit.segments.items():
            out.seek(phys)
            out.write(data)
    return path


def test_errors_exit_1(tmp_path: Path) -> None:
    done = run("verify", f"{damaged(tmp_path, 'KHO012')}@0")
    assert done.code == 1
    assert done.err == ""
    assert "error KHO012: folios overlap" in done.out
    assert f"page at {capture().big.phys:#x}" in done.out
    assert RULES["KHO012"].advice in done.out


def test_findings_are_printed_as_json(tmp_path: Path) -> None:
    done = run("verify", "--json", f"{damaged(tmp_path, 'KHO024', 'KHO034')}@0")
    assert done.code == 1
    assert done.json["counts"] == {"error": 1, "warning": 0, "note": 1}
    assert [(f["id"], f["severity"]) for f in done.json["findings"]] == [("KHO024", "error"), ("KHO034", "note")]


def test_findings_are_printed_as_sarif(tmp_path: Path) -> None:
    done = run("verify", "--sarif", f"{damaged(tmp_path, 'KHO012')}@0")
    assert done.code == 1
    log = done.json
    assert log["version"] == "2.1.0"
    (only,) = log["runs"]
    rules = only["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(RULES)
    assert all(rule["name"].isalnum() and rule["shortDescription"]["text"] for rule in rules)
    for result in only["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        physical = result["locations"][0]["physicalLocation"]
        assert physical["artifactLocation"]["index"] < len(only["artifacts"])
        assert physical["address"]["absoluteAddress"] >= 0


SARIF = {
    "log": {"$schema", "version", "runs"},
    "runs": {"tool", "artifacts", "results"},
    "tool": {"driver"},
    "driver": {"name", "version", "informationUri", "rules"},
    "rules": {"id", "name", "helpUri", "shortDescription", "fullDescription", "help", "defaultConfiguration"},
    "shortDescription": {"text"},
    "fullDescription": {"text"},
    "help": {"text"},
    "defaultConfiguration": {"level"},
    "artifacts": {"location"},
    "location": {"uri"},
    "results": {"ruleId", "ruleIndex", "level", "message", "locations"},
    "message": {"text"},
    "locations": {"physicalLocation", "logicalLocations"},
    "physicalLocation": {"artifactLocation", "address"},
    "artifactLocation": {"uri", "index"},
    "address": {"absoluteAddress", "kind"},
    "logicalLocations": {"fullyQualifiedName"},
}
"""The properties of SARIF 2.1.0 objects that kho uses; the schema allows no unknown ones."""


def test_sarif_links_to_the_documentation_that_the_package_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    image = f"{damaged(tmp_path, 'KHO012')}@0"
    monkeypatch.setattr("kho.cli.verify.documentation", lambda: "https://docs.invalid/kho")
    driver = run("verify", "--sarif", image).json["runs"][0]["tool"]["driver"]
    assert driver["informationUri"] == "https://docs.invalid/kho"
    assert {rule["id"]: rule["helpUri"] for rule in driver["rules"]}[
        "KHO012"
    ] == "https://docs.invalid/kho/findings/#kho012"
    monkeypatch.undo()
    named: Any = metadata.metadata("kho")
    named["Project-URL"] = "Documentation, https://docs.invalid/kho/"
    monkeypatch.setattr(metadata, "metadata", lambda name: named)
    assert documentation() == "https://docs.invalid/kho"
    del named["Project-URL"]
    assert documentation() is None
    assert "helpUri" not in run("verify", "--sarif", image).out


def check_sarif(name: str, value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            check_sarif(name, item)
    elif isinstance(value, dict):
        assert set(value) <= SARIF[name], name
        for key, item in value.items():
            check_sarif(key, item)
    else:
        kind = int if name in ("index", "ruleIndex", "absoluteAddress") else str
        assert type(value) is kind, name


@pytest.mark.parametrize("rule", ["KHO001", "KHO012", "KHO022", "KHO034"])
def test_sarif_output_conforms_to_its_schema(rule: str, tmp_path: Path) -> None:
    done = run("verify", "--sarif", f"{damaged(tmp_path, rule)}@0")
    check_sarif("log", done.json)
    assert rule in [result["ruleId"] for result in done.json["runs"][0]["results"]]


def test_a_rule_is_explained() -> None:
    done = run("verify", "--explain", "kho015")
    assert done.code == 0
    assert done.out.startswith("KHO015 (error): folio in scratch\n")
    assert RULES["KHO015"].matters in done.out
    missing = run("verify", "--explain", "KHO999")
    assert missing.code == 2
    assert "no finding KHO999" in missing.err


def test_all_rules_are_listed() -> None:
    done = run("verify", "--list")
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == list(RULES)
    assert [rule["id"] for rule in run("verify", "--list", "--json").json["rules"]] == list(RULES)


def test_findings_md_matches_the_rules() -> None:
    page = (ROOT / "docs/findings.md").read_text()
    assert page == findings.markdown() == run("verify", "--list", "--markdown").out


def test_without_a_source_or_a_handover_verify_exits_2(tmp_path: Path) -> None:
    assert run("verify").code == 2
    nothing = tmp_path / "nothing.bin"
    nothing.write_bytes(bytes(8192))
    assert run("verify", nothing).code == 2
    assert run("verify", tmp_path / "missing").code == 2


def test_a_finding_of_another_package_without_a_rule_is_a_warning() -> None:
    odd = Finding("ACME001", "widget at 0x1000", "serial 0")
    assert (odd.severity, odd.phys) == ("warning", None)
    assert json.loads(json.dumps(odd.as_dict()))["id"] == "ACME001"


@pytest.mark.parametrize("name", ["linux-7.3.4-x86_64", "linux-6.18.15-x86_64"])
def test_the_fdts_of_a_debugfs_directory_are_checked(name: str) -> None:
    folder = captures.elf(name).parent / "host/stage1"
    found = verify(folder)
    assert [finding.id for finding in found] == (["KHO003"] if "7.3" in name else [])
    assert all("out/fdt" in finding.place for finding in found)
