"""A declaration reads and writes a structure as C lays it out, and refuses every lie in it."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho import _kho
from kho.formats import (
    Blob,
    Broken,
    Declared,
    KeyTree,
    Owned,
    Payload,
    Record,
    array,
    blocks,
    decoder,
    keytree,
    nodes,
    raw,
    registry,
    s32,
    s64,
    text,
    u8,
    u16,
    u32,
    u64,
    vmalloc,
)
from kho.formats.keytree import levels_of
from kho.handover.owners import owners
from kho.handover.verify import verify

import captures
from bounded import bounded

PAGE_SIZES = [4096, 16384, 65536]
U64 = st.integers(0, 2**64 - 1)


class Point(Record):
    x = u16()
    low = u32(bits=5)
    middle = u32(bits=20)
    high = u32(bits=7)
    y = s32()


class Item(Record):
    key = u64()
    weight = u8()


class Loose(Record, packed=False):
    a = u8()
    b = u64()
    c = u16()
    items = array(Item, 3)
    d = u32()
    e = s64()
    name = text(5)


class LooseItem(Record, packed=False):
    key = u64()
    weight = u8()


class Nested(Record, packed=False):
    a = u8()
    items = array(LooseItem, 2)
    b = u8()


class Whole(Declared):
    version = u32(equals=3)
    nr_points = u32()
    points = vmalloc(Point, count="nr_points")
    numbers = vmalloc(u64())
    chain = blocks(Item, count="nr_items")
    nr_items = u64()
    name = text(12)
    pair = array(Item, 2, used="nr_pair")
    nr_pair = u8()
    reserved = raw(3)
    tree = keytree()
    nr_tail = u16()
    tail = array(Point, "nr_tail")


class Property(Record, fdt=True):
    size_ = u64(key="size", unit="bytes")
    label = text()


class Tree(Declared, fdt=True):
    serial = u64(key="serial-number")
    title = text()
    blob_ = raw(key="any-bytes")
    numbers = array(u32())
    points = vmalloc(Point)
    children = nodes(Property)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Register the declarations of this module for one test."""
    before = dict(registry._decoders)
    decoder("test,whole-v1")(Whole)
    decoder("test,tree-v1")(Tree)
    yield
    registry._decoders.clear()
    registry._decoders.update(before)


def handed_over(kind: type[Declared], values: Any, *, page_size: int = 4096, subtree: str = "") -> kho.Incoming:
    arena = kho.Arena(4096 * page_size, page_size=page_size)
    out = kho.Outgoing(arena, "kho-v4")
    if subtree:
        out.add_payload(kind, values, subtree=subtree)
    else:
        out.add_payload(kind, values, file=("s", 1))
    out.finalize()
    return kho.open(arena)


def only(inc: kho.Incoming) -> Any:
    return inc.luo.sessions["s"].files[1]


# As C has it

C = """
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#define P __attribute__((packed))
struct point { uint16_t x; uint32_t low:5, middle:20, high:7; int32_t y; } P;
struct item { uint64_t key; uint8_t weight; } P;
struct loose_item { uint64_t key; uint8_t weight; };
struct loose { uint8_t a; uint64_t b; uint16_t c; struct item items[3]; uint32_t d; int64_t e; char name[5]; };
struct nested { uint8_t a; struct loose_item items[2]; uint8_t b; };
static void show(const void *at, size_t n) { const unsigned char *p = at; while (n--) printf("%02x", *p++); puts(""); }
int main(void) {
    struct point p; struct loose l; struct nested n;
    memset(&p, 0, sizeof p); memset(&l, 0, sizeof l); memset(&n, 0, sizeof n);
    p.x = 0x1234; p.low = 21; p.middle = 0xabcde; p.high = 0x55; p.y = -2; show(&p, sizeof p);
    l.a = 1; l.b = 2; l.c = 3; l.items[1].key = 4; l.items[2].weight = 5; l.d = 6; l.e = -7; strcpy(l.name, "four");
    show(&l, sizeof l);
    n.a = 1; n.items[1].key = 2; n.items[1].weight = 3; n.b = 4; show(&n, sizeof n);
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_c_compiler_lays_the_structures_out_alike(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text(C)
    subprocess.run(["cc", "-o", tmp_path / "a", tmp_path / "a.c"], check=True, timeout=60)
    lines = subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True).stdout.split()
    nothing = {"key": 0, "weight": 0}
    loose = {"a": 1, "b": 2, "c": 3, "d": 6, "e": -7, "name": "four"}
    made = [
        Point.layout.pack({"x": 0x1234, "low": 21, "middle": 0xABCDE, "high": 0x55, "y": -2}, None),
        Loose.layout.pack({**loose, "items": [nothing, {"key": 4, "weight": 0}, {"key": 0, "weight": 5}]}, None),
        Nested.layout.pack({"a": 1, "items": [nothing, {"key": 2, "weight": 3}], "b": 4}, None),
    ]
    assert [part.hex() for part in made] == lines


# Round trips

POINTS = st.fixed_dictionaries(
    {
        "x": st.integers(0, 2**16 - 1),
        "low": st.integers(0, 31),
        "middle": st.integers(0, 2**20 - 1),
        "high": st.integers(0, 127),
        "y": st.integers(-(2**31), 2**31 - 1),
    }
)
ITEMS = st.fixed_dictionaries({"key": U64, "weight": st.integers(0, 255)})
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=2)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read(page_size: int, data: st.DataObject) -> None:
    values: dict[str, Any] = {
        "points": data.draw(st.lists(POINTS, max_size=20)),
        "numbers": data.draw(st.lists(st.integers(1, 2**64 - 1), max_size=20)),
        "chain": data.draw(st.lists(ITEMS, max_size=5)) * data.draw(st.sampled_from([1, 200])),
        "name": data.draw(NAMES),
        "pair": data.draw(st.lists(ITEMS, max_size=2)),
        "reserved": data.draw(st.binary(min_size=3, max_size=3)),
        "tree": data.draw(st.sets(st.integers(0, 2**40), max_size=10)),
        "tail": data.draw(st.lists(POINTS, max_size=20)),
    }
    inc = handed_over(Whole, values, page_size=page_size)
    found = only(inc)
    assert isinstance(found, Whole)
    for name in ("points", "chain", "pair", "tail"):
        assert [record.describe() for record in getattr(found, name)] == values[name]
    assert found.numbers == values["numbers"]
    assert (found.name, found.reserved, list(found.tree)) == (
        *(values["name"], values["reserved"]),
        sorted(values["tree"]),
    )
    counts = (found.nr_points, found.nr_items, found.nr_pair, found.nr_tail)
    assert counts == tuple(len(values[name]) for name in ("points", "chain", "pair", "tail"))
    assert not [f for f in verify(inc) if f.id in ("KHO021", "KHO022", "KHO023", "KHO026", "KHO033", "KHO034")]
    assert not owners(inc).unowned


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_devicetree_is_read_as_it_was_written(data: st.DataObject) -> None:
    names = st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True)
    children = data.draw(st.dictionaries(names, st.fixed_dictionaries({"size_": U64, "label": NAMES}), max_size=4))
    values = {
        "serial": data.draw(U64),
        "title": data.draw(NAMES),
        "blob_": data.draw(st.binary(max_size=9)),
        "numbers": data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=9)),
        "points": [point | {"x": 1} for point in data.draw(st.lists(POINTS, max_size=9))],
        "children": children,
    }
    inc = handed_over(Tree, values, subtree="mine")
    found = inc.payloads["mine"]
    assert isinstance(found, Tree), found
    assert (found.serial, found.title, found.blob_) == (values["serial"], values["title"], values["blob_"])
    assert found.numbers == values["numbers"]
    assert [point.describe() for point in found.points] == values["points"]
    assert {name: child.describe() for name, child in found.children.items()} == children
    assert found.describe()["units"] == {"children.size_": "bytes"}
    assert inc.subtrees["mine"].fdt().root.u64("serial-number") == values["serial"]
    assert not owners(inc).unowned


def test_missing_and_unfit_values_are_refused_by_name() -> None:
    whole = {"name": "x", "tree": []}
    for values, message in (
        ({}, "test,whole-v1: name: no value"),
        (whole | {"name": "x" * 12}, "name 'xxxxxxxxxxxx': not text of at most 11 bytes"),
        (whole | {"name": "a\0b"}, "without NUL"),
        (whole | {"nr_points": -1}, "nr_points -1: not an integer of 32 bits"),
        (whole | {"nr_points": True}, "nr_points True: not an integer"),
        (whole | {"reserved": b"four"}, "reserved: 4 bytes, there is room for 3"),
        (whole | {"pair": [{"key": 0, "weight": 0}] * 3}, "pair: 27 bytes, there is room for 18"),
        (whole | {"points": [{"x": 1}]}, "low: no value"),
        (whole | {"points": [{"x": 1, "low": 32, "middle": 0, "high": 0, "y": 0}]}, "low 32: not an integer of 5 bits"),
        (whole | {"other": 1}, "no field 'other'; there are version, "),
        (whole | {"chain": [{"key": 0, "weight": 0}]}, "chain: a list needs pages"),
        (whole | {"tree": [1]}, "tree: a tree needs pages"),
        (whole | {"numbers": [1]}, "numbers: a list needs pages"),
    ):
        with pytest.raises(kho.ParameterError, match=message.replace("(", r"\(")):
            Whole.encode(**values)
    with pytest.raises(kho.ParameterError, match="a tree of 6 levels"):
        handed_over(Whole, whole | {"tree": [1 << 63]})


# Declarations that cannot be a structure


def test_a_declaration_that_cannot_be_a_structure_is_refused_at_once() -> None:
    cases: dict[str, dict[str, Any]] = {
        "the bit fields up to it do not fill": {"a": u32(bits=31)},
        "the bit fields before it do not fill": {"a": u32(bits=30), "b": u32()},
        "follows a, a list of variable length": {"n": u32(), "a": array(u8(), "n"), "b": u8()},
        "a list of variable length needs a count": {"a": array(u8())},
        "has no size": {"a": text()},
    }
    for message, fields in cases.items():
        with pytest.raises(TypeError, match=message):
            type("Bad", (Record,), dict(fields))
    for name in ("token", "data", "draft", "owned", "units", "layout"):
        with pytest.raises(TypeError, match=f"field '{name}': the name is in use"):
            type("Bad", (Declared,), {name: u32()})
    with pytest.raises(TypeError, match="a bit field in a devicetree"):
        type("Bad", (Record,), {"a": u32(bits=32)}, fdt=True)
    with pytest.raises(TypeError, match="the unit must be pfn or phys"):
        u64(owns="data", unit="bytes")
    with pytest.raises(TypeError, match="records of no size"):
        array(type("Empty", (Record,), {}), 3)


def test_a_field_that_is_declared_again_stands_where_the_subclass_has_it() -> None:
    class Base(Record):
        size_ = u64()
        name_ = u8()

    class Derived(Base):
        first = u16()
        size_ = u64()

    assert list(Derived.layout.fields) == ["name_", "first", "size_"]


def test_the_api_for_classes_without_fields_stays() -> None:
    @decoder("test,plain-v1")
    class Plain(Payload):
        def __init__(self, blob: Blob) -> None:
            super().__init__(blob)
            self.serial = int.from_bytes(blob.read(8), "little")

        def owned(self) -> Iterator[Owned]:
            yield Owned(self.blob.owner, "all of it", (self.blob.phys, 8))

    out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
    folio = out.arena.alloc()
    memoryview(folio)[:8] = struct.pack("<Q", 42)
    out.preserve_folio(folio)
    out.add_file("s", 1, "test,plain-v1", folio.phys)
    out.finalize()
    assert only(kho.open(out.arena)).serial == 42
    assert not owners(kho.open(out.arena)).unowned
    assert not Plain.draft


# Lies


def lie(**changes: Any) -> Any:
    """Read a payload with these members, written over those of a valid one."""
    values = {"points": [], "name": "x", "tree": [], "tail": []} | changes
    return only(handed_over(Whole, values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 4}, "version 0x4 is not 0x3"),
        ({"nr_points": 1 << 30}, "the area of points has room for 0"),
        ({"nr_items": 5}, "nr_items 5: the blocks of chain have 0"),
        ({"nr_pair": 3}, "nr_pair 3: pair has room for 2"),
    ],
)
def test_a_lie_is_refused_with_the_name_of_the_field(changes: dict[str, Any], message: str) -> None:
    found = lie(**changes)
    assert isinstance(found, Broken)
    assert message in str(found.error)
    assert str(found.error).startswith("session s, file 0x1 at 0x")


def test_a_list_at_the_end_stays_inside_the_blob() -> None:
    class Ends(Declared):
        nr = u32()
        items = array(u64(), "nr")

    decoder("test,ends-v1")(Ends)
    out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
    out.add_payload(Ends, {"items": [1, 2], "nr": 3}, subtree="test,ends-v1")
    out.finalize()
    found = kho.open(out.arena).payloads["test,ends-v1"]
    assert isinstance(found, Broken)
    assert "nr 3: the payload has room for 2 items" in str(found.error)


@pytest.mark.parametrize("kind", ["itself", "ring", "outside", "unaligned", "long", "full"])
def test_a_chain_of_blocks_ends_whatever_it_points_to(kind: str) -> None:
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v4")
    pages = [arena.alloc() for _ in range(400 if kind == "long" else 2)]
    for page, following in zip(pages, [*pages[1:], pages[0]], strict=True):
        out.preserve_folio(page)
        memoryview(page)[:16] = struct.pack("<QQ", following.phys, 1000 if kind == "full" else 0)
    first = {"itself": pages[0].phys, "outside": 1 << 40, "unaligned": pages[0].phys + 8}.get(kind, pages[0].phys)
    if kind == "itself":
        memoryview(pages[0])[:8] = struct.pack("<Q", pages[0].phys)
    blob = bytearray(Whole.encode(name="x", tree=[]))
    struct.pack_into("<Q", blob, 40, first)
    out.add_payload(Whole, bytes(blob), file=("s", 1))
    out.finalize()
    with bounded():
        found = only(kho.open(arena))
    assert isinstance(found, Broken)
    expected = {"outside": "0x10000000000", "unaligned": "not a multiple of the page size", "full": "do not fit a page"}
    assert expected.get(kind, "belongs to a list already") in str(found.error)


def test_a_count_in_a_signed_field_may_be_negative() -> None:
    class Signed(Declared):
        nr = s32()
        items = array(u64(), "nr")

    decoder("test,signed-v1")(Signed)
    found = only(handed_over(Signed, {"nr": -1}))
    assert isinstance(found, Broken)
    assert "nr -1: is negative" in str(found.error)


def test_many_lists_that_share_one_area_are_refused() -> None:
    """Each of 1,000 records leads to the same list of 1,000 numbers."""

    class Entry(Record):
        numbers = vmalloc(u64())

    class Lists(Declared):
        nr = u32()
        entries = array(Entry, "nr")

    decoder("test,lists-v1")(Lists)
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v4")
    area = out.preserve_vmalloc(struct.pack("<1000Q", *range(1, 1001)))
    out.add_payload(Lists, struct.pack("<I", 1000) + area * 1000, file=("s", 1))
    out.finalize()
    with bounded():
        found = only(kho.open(arena))
    assert isinstance(found, Broken)
    assert "can plausibly hold" in str(found.error)


def test_a_page_frame_number_beyond_the_address_space_is_refused() -> None:
    class Owner(Record):
        pfn = u64(unit="pfn", owns="data")

    class Owns(Declared):
        entries = vmalloc(Owner)
        numbers = vmalloc(u64(unit="pfn", owns="data"))
        one = u64(unit="pfn", owns="data")

    decoder("test,owns-v1")(Owns)
    far = 1 << 52
    for values in ({"entries": [{"pfn": far}], "one": 0}, {"numbers": [far], "one": 0}, {"one": far}):
        found = only(handed_over(Owns, values))
        assert isinstance(found, Broken)
        assert "0x10000000000000: beyond the address space" in str(found.error)


def test_an_address_owns_its_folio_or_as_many_bytes_as_another_field_contains() -> None:
    class Buffer(Declared):
        folio_at = u64(unit="phys", owns="folio")
        start = u64(unit="phys", owns="region", nbytes="length")
        length = u64(unit="bytes")

    decoder("test,buffer-v1")(Buffer)
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v4")
    folio, region = arena.alloc(2), arena.alloc(1)
    for each in (folio, region):
        out.preserve_folio(each)
    values = {"folio_at": folio.phys, "start": region.phys, "length": 8192}
    out.add_payload(Buffer, values, file=("s", 1))
    out.finalize()
    inc = kho.open(arena)
    owned = {found.what: found.memory for found in only(inc).owned()}
    assert (owned["folio"], owned["region"]) == ((folio.phys, 4 * 4096), (region.phys, 8192))
    assert not owners(inc).unowned
    assert verify(inc) == []


def test_a_devicetree_that_lacks_a_property_or_has_another_size_is_refused() -> None:
    def read(*properties: tuple[str, bytes]) -> Payload:
        w = _kho.FdtWriter(4096)
        with w.node():
            w.property_str("compatible", "test,tree-v1")
            for name, value in properties:
                w.property(name, value)
        out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
        out.add_subtree("mine", w.finish())
        out.finalize()
        return kho.open(out.arena).payloads["mine"]

    serial, rest = ("serial-number", bytes(8)), [("title", b"t\0"), ("any-bytes", b""), ("numbers", bytes(8))]
    assert isinstance(read(serial, *rest, ("points", bytes(16))), Tree)
    for properties, message in (
        ([*rest], "no property 'serial-number'"),
        ([("serial-number", bytes(4)), *rest, ("points", bytes(16))], "serial-number: 4 bytes, not 8"),
        ([serial, *rest, ("points", bytes(15))], "points: 15 bytes, not 16"),
        ([serial, *rest[:2], ("numbers", bytes(7)), ("points", bytes(16))], "numbers: 7 bytes are not a multiple of 4"),
    ):
        found = read(*properties)
        assert isinstance(found, Broken)
        assert message in str(found.error)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject) -> None:
    size = Whole.layout.size + 64
    blob = data.draw(st.binary(min_size=size, max_size=size))
    if data.draw(st.booleans()):
        blob = struct.pack("<I", 3) + blob[4:]
    inc = handed_over(Whole, blob)
    with bounded():
        found = only(inc)
        assert isinstance(found, Whole | Broken)
        found.describe()
        verify(inc)
        owners(inc)


# Trees of plain keys


TREES = [name for name in captures.NAMES if "bitmap_bytes" not in captures.expected(name)]


@pytest.mark.parametrize("name", TREES)
def test_the_map_of_a_real_kernel_is_a_tree_of_keys(name: str) -> None:
    """Its keys are those of kho_radix_encode_key: the highest bit states the order."""
    inc = kho.open(captures.elf(name))
    tree = KeyTree(inc, inc.preserved_memory_map, "map")
    shift = inc.page_size.bit_length() - 1
    folios = []
    for key in tree:
        order = 64 - shift - (key.bit_length() - 1)
        folios.append(((key ^ 1 << (64 - shift - order)) << (shift + order), order))
    assert sorted(folios) == [tuple(folio) for folio in inc.folios]
    assert sorted(tree.nodes) == sorted(phys for phys, _ in inc.map_nodes)
    assert len(tree) == inc.nr_folios


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_tree_of_pages_owns_its_nodes_and_pages(page_size: int) -> None:
    class Deposited(Declared):
        pages = keytree(owns="deposited page")

    decoder("test,mshv-v1")(Deposited)
    arena = kho.Arena(4096 * page_size, page_size=page_size)
    out = kho.Outgoing(arena, "kho-v4")
    folios = [arena.alloc(order) for order in (0, 3, 0)]
    for folio in folios:
        out.preserve_folio(folio)
    pfns = [folio.pfn + n for folio in folios for n in range(folio.nr_pages)]
    out.add_payload(Deposited, {"pages": pfns}, file=("s", 1))
    out.finalize()
    inc = kho.open(arena)
    found = only(inc)
    assert list(found.pages) == sorted(pfns)
    assert len(found.pages.nodes) == levels_of(page_size)
    assert pfns[0] in found.pages
    assert 5 not in found.pages
    assert not owners(inc).unowned
    runs = found.describe()["pages"]
    assert runs["keys"] == len(pfns) == sum(n for _, n in runs["runs"])


@pytest.mark.parametrize("kind", ["itself", "shared", "outside", "unaligned"])
def test_a_damaged_tree_is_refused(kind: str) -> None:
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v4")
    root, other = arena.alloc(), arena.alloc()
    entries = {
        "itself": [root.phys],
        "shared": [other.phys, other.phys],
        "outside": [1 << 40],
        "unaligned": [other.phys + 8],
    }[kind]
    memoryview(root)[: 8 * len(entries)] = struct.pack(f"<{len(entries)}Q", *entries)
    for folio in (root, other):
        out.preserve_folio(folio)
    out.finalize()
    with bounded(), pytest.raises(kho.FormatError, match=r"tree node"):
        KeyTree(kho.open(arena), root.phys, "tree")


def test_a_tree_of_alternating_bits_takes_bounded_time() -> None:
    """Runs are what costs: 16384 in each leaf of a page."""
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v4")
    leaves = [arena.alloc() for _ in range(500)]
    tables = [arena.alloc() for _ in range(5)]
    for leaf in leaves:
        memoryview(leaf)[:] = b"\x55" * 4096
    memoryview(tables[0])[:4000] = struct.pack("<500Q", *(leaf.phys for leaf in leaves))
    for above, below in zip(tables[1:], tables, strict=False):
        memoryview(above)[:8] = struct.pack("<Q", below.phys)
    out.finalize()
    with bounded(2), contextlib.suppress(kho.FormatError):
        KeyTree(kho.open(arena), tables[-1].phys, "tree")
