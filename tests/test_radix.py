"""kho-v2, v3 and v4: the kernel's own trees, the model's, and those this library keeps while a handover is made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho.cli import cli

import model
from adapters import ArenaMemory
from captures import NAMES, RADIX_NAMES, elf, expected
from images import GIB, KIB, MIB, TIB, Image, Layout, sample_subtrees

# kho-v2 cannot hold the FDT's page, of order 0, at 16 KiB.
SHAPES = [
    (page_size, version)
    for page_size in (4096, 16384, 65536)
    for version in (2, 3, 4)
    if (page_size, version) != (16384, 2)
]
shapes = pytest.mark.parametrize(("page_size", "version"), SHAPES)
BASE = 4 * GIB


def image(page_size: int = 4096, version: int = 4, **options: object) -> Image:
    ram = [(0, 16 * GIB), (2**47, TIB)]
    folios = [(0x400_0000, 0), (GIB, 5), (9 * GIB, 0), (2**47 + 512 * GIB, 3)]
    return Image(
        **{
            "folios": folios,
            "page_size": page_size,
            "compatible": f"kho-v{version}",
            "ram": ram,
            "scratch": [(12 * GIB, 64 * MIB), (13 * GIB, 64 * MIB), (14 * GIB, 64 * MIB)],
            "subtrees": sample_subtrees(),
            "machine": 62 if page_size == 4096 else 183,
            **options,
        }  # type: ignore[arg-type]
    )


def saved(layout: Layout, path: Path) -> Path:
    with path.open("wb") as file:
        layout.write_elf(file)
    return path


@pytest.mark.parametrize("name", RADIX_NAMES)
def test_a_capture_reads_as_expected_without_an_option(name: str) -> None:
    facts, inc = expected(name), kho.open(elf(name))
    for key in ("compatible", "page_size", "fdt_phys", "preserved_memory_map", "nr_folios", "preserved_bytes"):
        assert getattr(inc, key) == facts[key], key
    assert inc.metadata_pages == facts["metadata_pages"]
    assert {str(order): n for order, n in inc.folios_by_order.items()} == facts["folios_by_order"]
    folios = list(inc.folios)
    assert folios == [tuple(folio) for folio in facts["folios"]]
    packed = b"".join(struct.pack("<QI", *folio) for folio in folios)
    assert hashlib.sha256(packed).hexdigest() == facts["folios_sha256"]
    assert inc.scratch == [tuple(area) for area in facts["scratch"]]
    found = {
        subtree.name: {"phys": subtree.phys, "size": subtree.size, "sha256": hashlib.sha256(subtree.read()).hexdigest()}
        for subtree in inc.subtrees.values()
    }
    assert found == facts["subtrees"]
    assert (inc.bitmap_bytes, inc.bitmap_bytes_why, inc.certainty) == (None, None, "certain")
    assert inc.pages_outside == 0


def test_a_subtree_that_is_no_devicetree_has_its_size() -> None:
    metadata = kho.open(elf("linux-7.3.4-x86_64")).retrieve_subtree("kexec-metadata")
    assert struct.unpack("<I65sI", metadata.read())[::2] == (1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_inspect_speaks_of_bitmaps_only_where_they_have_a_size(name: str) -> None:
    run = CliRunner().invoke(cli, ["inspect", str(elf(name)), "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.output)
    assert {"bitmap_bytes", "bitmap_bytes_why"} & set(report) == (
        set() if name in RADIX_NAMES else {"bitmap_bytes", "bitmap_bytes_why"}
    )
    text = CliRunner().invoke(cli, ["inspect", str(elf(name))])
    assert text.exit_code == 0
    assert ("bitmaps" in text.output) == (name not in RADIX_NAMES)


@shapes
@pytest.mark.parametrize("whole_ram", [False, True])
def test_the_page_size_of_a_tree_is_found(page_size: int, version: int, whole_ram: bool, tmp_path: Path) -> None:
    ram = [(0, GIB)]
    folios = [(0x200_0000, 0), (0x300_0000, 4)]
    scratch = [(512 * MIB + 64 * MIB * n, 64 * MIB) for n in range(3)]
    made = image(
        page_size, version, ram=ram, folios=folios, scratch=scratch, whole_ram=whole_ram, machine=183,
        # Aligned for every page size, so that the addresses tell nothing.
        fdt_phys=0x60_0000, metadata_phys=0x40_0000,
    )  # fmt: skip
    layout = made.lay_out()
    inc = kho.open(saved(layout, tmp_path / "image.elf"))
    assert inc.page_size == page_size, inc.page_size_why
    assert list(inc.folios) == layout.folios
    assert inc.compatible == f"kho-v{version}"


@shapes
def test_the_models_tree_reads_back(page_size: int, version: int, tmp_path: Path) -> None:
    layout = image(page_size, version).lay_out()
    inc = kho.open(saved(layout, tmp_path / "image.elf"))
    assert inc.page_size == page_size
    assert list(inc.folios) == layout.folios
    memory = model.Memory.from_elf(tmp_path / "image.elf")
    assert inc.metadata_pages == len(model.read_radix(memory, layout.map_phys, page_size, version)[1])
    assert inc.subtrees["producer"].fdt().root.str("compatible") == "example-v1"


NUMBERS = st.tuples(st.integers(0, 2**20), st.integers(0, 5), st.booleans())


@shapes
@settings(max_examples=25)
@given(steps=st.lists(NUMBERS, max_size=25))
def test_the_tree_is_what_the_model_reads_after_every_step(
    page_size: int, version: int, steps: list[tuple[int, int, bool]]
) -> None:
    size = 64 * MIB * (page_size // 4096)
    arena = kho.Arena([(BASE, size)], page_size=page_size, max_page_order=10)
    out = kho.Outgoing(arena, f"kho-v{version}")
    ours = {(out.fdt_phys, 0)}
    pool = arena.alloc(10)
    marked: set[model.Folio] = set()
    for number, order, single in steps:
        folio = (pool.phys + number % (1024 >> order) * (page_size << order), order)
        if not single:
            count = min(1 + number % 40, (pool.phys + (page_size << 10) - folio[0]) // page_size)
            split = {(pfn * page_size, o) for pfn, o in model.greedy_split(folio[0] // page_size, count)}
            assert out.preserve_pages(folio[0], count) == len(split - marked)
            marked |= split
        elif folio in marked:
            assert out.unpreserve_folio(*folio)
            marked.remove(folio)
        else:
            assert out.preserve_folio(*folio)
            marked.add(folio)
    handover = model.read_handover(ArenaMemory(arena), out.fdt_phys, page_size)
    assert handover.folios == sorted(marked | ours)
    assert handover.compatible == out.abi == f"kho-v{version}"
    assert out.serialize() == arena.read(out.fdt_phys, len(out.serialize()))
    assert out.bitmap_bytes is None
    inc = kho.open(arena, fdt_phys=out.fdt_phys)
    assert list(inc.folios) == handover.folios
    assert inc.metadata_pages == len(handover.metadata)


def test_single_pages_of_16_kib_lose_a_bit_and_come_back() -> None:
    """The depth of kho-v2 is a level short there: what is left of a page's key is read as what it meant."""
    arena = kho.Arena(64 * MIB, page_size=16 * KIB)
    out = kho.Outgoing(arena, "kho-v2")
    folios = [arena.alloc(order) for order in (0, 3, 0)]
    for folio in folios:
        out.preserve_folio(folio)
    inc = kho.open(arena, fdt_phys=out.finalize())
    assert {(folio.phys, folio.order) for folio in folios} < set(inc.folios)
    huge = kho.Arena("8G", page_size=16 * KIB)
    out = kho.Outgoing(huge, "kho-v2")
    with pytest.raises(kho.ParameterError, match="cannot tell this folio of order 17 from a single page"):
        out.preserve_folio(huge.alloc(17, gigantic=True))


@pytest.mark.parametrize("version", [2, 3])
def test_a_16_kib_tree_of_two_pages_and_more_reads_back(version: int, tmp_path: Path) -> None:
    """Written by the model, without the FDT, whose own key loses its top bit."""
    folios = [(0x400_0000, 1), (GIB, 5), (2**47, 9)]
    made = image(16384, version, folios=folios, subtrees={})
    layout = made.lay_out()
    places = iter(range(0x800_0000, 0x900_0000, 16384))
    layout.map_phys, pages = model.serialize_radix(folios, 16384, version, lambda _: next(places))
    for phys, raw in pages.items():
        layout.put(phys, raw)
    layout.root.props["preserved-memory-map"] = struct.pack("<Q", layout.map_phys)
    layout.put_root()
    inc = kho.open(saved(layout, tmp_path / "image.elf"), page_size=16384)
    assert list(inc.folios) == folios


def test_no_bitmap_size_can_be_asked_for() -> None:
    with pytest.raises(kho.errors.ParameterError, match="kho-v4 keeps a tree of pages"):
        kho.open(elf("linux-7.3.4-x86_64"), bitmap_bytes=4096)
    with pytest.raises(kho.errors.ParameterError, match="kho-v3 keeps a tree of pages"):
        kho.Outgoing(kho.Arena(64 * MIB), "kho-v3", bitmap_bytes=512)


def test_the_root_is_edited_as_libfdt_edits_it() -> None:
    libfdt = pytest.importorskip("libfdt")
    arena = kho.Arena(64 * MIB)
    out = kho.Outgoing(arena, "kho-v4")

    def libfdts(blob: bytes, name: str, phys: int | None, size: int = 0) -> bytes:
        tree = libfdt.Fdt(blob)
        tree.resize(4096)  # fdt_open_into
        if phys is None:
            tree.del_node(tree.subnode_offset(0, name))
        else:
            node = tree.add_subnode(0, name)
            tree.setprop(node, "preserved-data", struct.pack("<Q", phys))
            tree.setprop(node, "blob-size", struct.pack("<Q", size))
        tree.pack()
        return bytes(tree.as_bytearray())

    theirs = out.serialize()
    for name, size in [("a", 5), ("a-longer-name", 6000), ("b", 1), ("abc", 0)]:
        theirs = libfdts(theirs, name, out.add_subtree(name, bytes(size)), size)
        assert out.serialize() == theirs, name
    for name in ("a-longer-name", "abc"):
        out.remove_subtree(name)
        theirs = libfdts(theirs, name, None)
        assert out.serialize() == theirs, name
    theirs = libfdts(theirs, "again", out.add_subtree("again", b"x"), 1)
    assert out.serialize() == theirs
    assert [subtree.name for subtree in kho.open(arena, fdt_phys=out.fdt_phys).subtrees.values()] == ["again", "b", "a"]


def leaf_of(layout: Layout) -> tuple[int, int]:
    """The inner node above a leaf, and the index there."""
    levels, _, _ = model.radix_shape(layout.page_size, 4)
    above = at = layout.map_phys
    index = 0
    for _ in range(levels - 1):
        above = at
        index = next(i for i in range(layout.page_size // 8) if layout.u64(above + 8 * i))
        at = layout.u64(above + 8 * index)
    return above, index


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("itself", "a second entry leads to it"),
        ("root", "a second entry leads to it"),
        (0x1234_5678, "not a multiple of the page size"),
        (2**63, "not in this memory"),
        (2**64 - 4096, "not in this memory"),
    ],
)
def test_an_entry_that_leads_astray_is_reported(value: int | str, message: str, tmp_path: Path) -> None:
    layout = image().lay_out()
    above, index = leaf_of(layout)
    target = {"itself": above, "root": layout.map_phys}.get(value, value) if isinstance(value, str) else value
    layout.put(above + 8 * (index + 1), struct.pack("<Q", target))
    with pytest.raises(kho.errors.FormatError, match=f"tree node at .*{message}"):
        kho.open(saved(layout, tmp_path / "image.elf"))


WORDS = st.integers(0, 2**64 - 1) | st.integers(0, 600).map(lambda n: n * 4096)


@settings(max_examples=60)
@given(page=st.integers(0, 40), index=st.integers(0, 511), value=WORDS)
def test_any_damage_to_a_tree_is_read_or_reported(page: int, index: int, value: int) -> None:
    layout = image(ram=[(0, 16 * GIB)], folios=[(0x400_0000, 0), (GIB, 5)]).lay_out()
    pages = sorted(layout.pages)
    layout.put(pages[page % len(pages)] + 8 * index, struct.pack("<Q", value))
    with tempfile.NamedTemporaryFile() as file:
        layout.write_elf(file)  # type: ignore[arg-type]
        file.flush()
        with contextlib.suppress(kho.errors.KhoError):
            inc = kho.open(file.name, fdt_phys=layout.fdt_phys)
            assert inc.nr_folios == len(inc.folios)
