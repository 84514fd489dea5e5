"""Handovers of every layout, built by the model and read by kho, which detects page size, bitmap size and scratch."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho

import images
from images import EM_AARCH64, EM_X86_64, GIB, KIB, MIB, TIB, Image, Layout

PAGES = (4096, 16384, 65536)
SHAPES = [(page, bitmap) for page in PAGES for bitmap in (512, page)]
SURE = ("certain", "likely")


def segments(layout: Layout) -> kho.Memory:
    """The image as memory without an ELF header, so without a machine type."""
    whole = model_memory(layout)
    return kho.Memory.from_segments(whole)


def model_memory(layout: Layout) -> list[tuple[int, bytes]]:
    out = []
    for phys, memsz, filesz in layout.segments():
        data = bytearray(memsz)
        for at in (p for p in layout.pages if phys <= p < phys + filesz):
            data[at - phys : at - phys + layout.page_size] = layout.pages[at]
        out.append((phys, bytes(data)))
    return out


def check(inc: kho.Incoming, image: Image, layout: Layout, *, scratch: bool = True) -> None:
    """Check that kho read the declared contents of the image."""
    assert inc.folios == layout.folios
    assert inc.page_size == image.page_size
    if inc.bitmap_bytes != image.bitmap_bytes:  # small bitmaps followed by zeros read the same as large ones
        assert "read as 512 bytes, it is the same" in (inc.bitmap_bytes_why or "")
        assert inc.bitmap_bytes == inc.page_size
    assert (inc.fdt_phys, inc.preserved_memory_map) == (layout.fdt_phys, layout.map_phys)
    assert inc.nr_folios == len(layout.folios)
    assert inc.preserved_bytes == sum(image.page_size << order for _, order in layout.folios)
    assert {name: sub.read() for name, sub in inc.subtrees.items()} == image.subtrees
    if scratch:
        assert inc.scratch == image.scratch
    assert inc.certainty in (*SURE, "guess", "given")
    assert inc.page_size_why
    assert inc.bitmap_bytes_why
    for phys, raw in image.contents.items():
        assert inc.read(phys, len(raw)) == raw


def plain(page_size: int, bitmap_bytes: int, machine: int = EM_AARCH64) -> Image:
    """Folios of several orders with bits in the first and last word of bitmaps, contents, scratch, a subtree."""
    p = page_size
    return Image(
        folios=[(p, 0), (p * 16, 4), (p * 511, 0), (p << 12, 0), (p << 14, 9), (p << 17, 10), (p << 20, 0)],
        page_size=p,
        bitmap_bytes=bitmap_bytes,
        ram=[(0, p << 22)],
        scratch=[(p << 21, 16 * MIB), ((p << 21) + 64 * MIB, 32 * MIB), ((p << 21) - 16 * MIB, 16 * MIB)],
        subtrees=images.sample_subtrees(),
        contents={p: b"one", p * 16 + 5: bytes(range(256)) * 2},
        machine=machine,
        metadata_phys=p << 18,
    )


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), SHAPES)
def test_every_layout_is_detected_in_an_elf_core(page_size: int, bitmap_bytes: int, tmp_path: Path) -> None:
    image = plain(page_size, bitmap_bytes)
    path = image.write(tmp_path / "core.elf")
    inc = kho.open(path)
    check(inc, image, image.lay_out())
    assert inc.certainty in SURE
    assert inc.others == []
    assert inc.pages_outside == 0


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), SHAPES)
@pytest.mark.parametrize("machine", [EM_X86_64, EM_AARCH64])
def test_given_sizes_override_detection(page_size: int, bitmap_bytes: int, machine: int, tmp_path: Path) -> None:
    image = plain(page_size, bitmap_bytes, machine)
    inc = kho.open(image.write(tmp_path / "core.elf"), page_size=page_size, bitmap_bytes=bitmap_bytes)
    check(inc, image, image.lay_out())
    assert (inc.certainty, inc.page_size_why, inc.bitmap_bytes_why) == (
        "given",
        "given by the caller",
        "given by the caller",
    )


@pytest.mark.parametrize("bitmap_bytes", [512, 4096])
def test_x86_64_has_one_page_size(bitmap_bytes: int, tmp_path: Path) -> None:
    image = plain(4096, bitmap_bytes, EM_X86_64)
    inc = kho.open(image.write(tmp_path / "core.elf"))
    check(inc, image, image.lay_out())
    assert inc.page_size_why == "x86_64 has no other"


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), SHAPES)
def test_every_layout_is_detected_in_raw_images(page_size: int, bitmap_bytes: int, tmp_path: Path) -> None:
    base = 0x4000_0000
    p = page_size
    image = Image(
        folios=[(base + p * 16, 4), (base + p * 40, 0), (base + p * 300, 0)],
        page_size=p,
        bitmap_bytes=bitmap_bytes,
        ram=[(base, 64 * MIB)],
        scratch=[(base + 32 * MIB, 4 * MIB), (base + 40 * MIB, 4 * MIB), (base + 48 * MIB, 4 * MIB)],
        subtrees=images.sample_subtrees(),
        metadata_phys=base + 24 * MIB,
    )
    layout = image.lay_out()
    low, high = tmp_path / "low.bin", tmp_path / "high.bin"
    low.write_bytes(layout.to_raw(base, 16 * MIB))
    high.write_bytes(layout.to_raw(base + 16 * MIB, 48 * MIB))
    inc = kho.open([f"{high}@{base + 16 * MIB:#x}", f"{low}@1G"])
    check(inc, image, layout)
    assert inc.certainty in SURE


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), SHAPES)
def test_numa_nodes_gigantic_folios_and_far_memory(page_size: int, bitmap_bytes: int, tmp_path: Path) -> None:
    p = page_size
    image = Image(
        folios=[(p << 9, 9), (p << 18, 18), (4 * TIB, 0), (4 * TIB + (p << 9), 9), (1 << 50, 30)],
        page_size=p,
        bitmap_bytes=bitmap_bytes,
        ram=[(0, p << 20), (4 * TIB, 32 * GIB)],
        scratch=[(MIB, MIB), (p << 19, 64 * MIB), (p * 3 << 18, 32 * MIB), (4 * TIB + 16 * GIB, 32 * MIB)],
        subtrees=images.sample_subtrees(),
        machine=EM_AARCH64,
        metadata_phys=2 * MIB,
    )
    path = image.write(tmp_path / "numa.elf")
    assert path.stat().st_size < 4 * MIB
    inc = kho.open(path)
    check(inc, image, image.lay_out())
    assert inc.folios_by_order[18] == inc.folios_by_order[30] == 1


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), [(4096, 512), (4096, 4096), (16384, 512)])
def test_more_bitmaps_than_a_chunk_holds(page_size: int, bitmap_bytes: int, tmp_path: Path) -> None:
    room = (page_size - 16) // 16
    span = 8 * bitmap_bytes * page_size
    count = 2 * room + 3
    image = Image(
        folios=[(span * i + page_size * (i % 4096), 0) for i in range(1, count)],
        page_size=page_size,
        bitmap_bytes=bitmap_bytes,
        ram=[(0, span * count)],
        machine=EM_AARCH64,
        metadata_phys=2 * page_size,
    )
    layout = image.lay_out()
    assert [len(layout.bitmaps(chunk)) for chunk in layout.chunks] == [room, room, 3]
    inc = kho.open(image.write(tmp_path / "many.elf"))
    check(inc, image, layout, scratch=False)
    pages_of_bitmaps = -(-count * bitmap_bytes // page_size)
    assert inc.metadata_pages == 3 + pages_of_bitmaps


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), SHAPES)
def test_empty_bitmaps_are_read(page_size: int, bitmap_bytes: int, tmp_path: Path) -> None:
    image = Image(
        folios=[(0x80_0000, 0)],
        page_size=page_size,
        bitmap_bytes=bitmap_bytes,
        blocks={(0, 7), (3, 0), (9, 0), (9, 1)},
        subtrees=images.sample_subtrees(),
        machine=EM_AARCH64,
    )
    inc = kho.open(image.write(tmp_path / "empty.elf"))
    check(inc, image, image.lay_out(), scratch=False)
    assert set(inc.folios_by_order) == {0}
    stats = inc.tracker().stats()
    assert {order: row["empty_blocks"] for order, row in stats.items()} == {0: 1, 3: 1, 9: 2}


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), SHAPES)
def test_stale_handovers_in_a_dump_of_all_ram_are_listed(page_size: int, bitmap_bytes: int, tmp_path: Path) -> None:
    """If a memory contains several handovers, one is read and the others are listed; each can be selected."""
    ram = [(0, 64 * MIB)]
    other = page_size if bitmap_bytes == 512 else 512
    stale = Image(
        folios=[(0x80_0000, 0)],
        page_size=page_size,
        bitmap_bytes=other,
        ram=ram,
        subtrees={"old": images.sample_subtrees()["producer"]},
        metadata_phys=4 * MIB,
    )
    image = Image(
        folios=[(0x100_0000, 2), (0x180_0000, 0)],
        page_size=page_size,
        bitmap_bytes=bitmap_bytes,
        ram=ram,
        scratch=[(32 * MIB, 4 * MIB), (40 * MIB, 4 * MIB), (48 * MIB, 4 * MIB)],
        subtrees=images.sample_subtrees() | {"second": images.sample_subtrees()["producer"]},
        whole_ram=True,
        under=[stale],
        machine=EM_AARCH64,
        metadata_phys=6 * MIB,
    )
    layout, old = image.lay_out(), stale.lay_out()
    path = image.write(tmp_path / "ram.elf")
    inc = kho.open(path)
    check(inc, image, layout)
    assert inc.others == [old.fdt_phys]
    there = kho.open(path, fdt_phys=old.fdt_phys)
    check(there, stale, old, scratch=False)


@pytest.mark.parametrize(("page_size", "bitmap_bytes"), SHAPES)
def test_a_handover_of_the_fdt_alone_gives_a_reason_for_its_layout(
    page_size: int, bitmap_bytes: int, tmp_path: Path
) -> None:
    image = Image(page_size=page_size, bitmap_bytes=bitmap_bytes, ram=[(0, 64 * MIB)], machine=EM_AARCH64)
    inc = kho.open(image.write(tmp_path / "bare.elf"))
    assert list(inc.folios) == [(image.lay_out().fdt_phys, 0)]
    assert inc.page_size_why
    assert inc.bitmap_bytes_why


def test_pages_outside_memory_are_counted(tmp_path: Path) -> None:
    image = Image(folios=[(0x40_0000, 0), (0x80_0000, 2)], ram=[(0, 0x80_1000)], whole_ram=True)
    inc = kho.open(image.write(tmp_path / "part.elf"))
    assert inc.folios == image.lay_out().folios
    assert inc.pages_outside == 3


@pytest.mark.parametrize("compatible", ["kho-v2", "kho-v4"])
def test_an_empty_map_is_refused_where_it_is_always_in_force(compatible: str, tmp_path: Path) -> None:
    """A map pointer of 0 boots cold (kho_populate, kernel/kexec_handover.c); that of kho-v1 may not be finalized."""
    layout = Image(folios=[(0x40_0000, 0)], compatible=compatible).lay_out()
    layout.root.props["preserved-memory-map"] = bytes(8)
    layout.put_root()
    path = tmp_path / "zero.elf"
    path.write_bytes(layout.to_elf())
    with pytest.raises(kho.FormatError, match=f"FDT at {layout.fdt_phys:#x}: preserved-memory-map is 0"):
        kho.open(path)


def test_given_scratch_areas_are_used(tmp_path: Path) -> None:
    image = plain(4096, 4096)
    areas = [(3 * GIB, 16 * MIB)]
    assert kho.open(image.write(tmp_path / "core.elf"), scratch=areas).scratch == areas


# Random sets


@st.composite
def folio_sets(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """A layout and disjoint folios, often at the edges of bitmaps of either size."""
    page, bitmap = draw(st.sampled_from(SHAPES))
    edge = st.sampled_from([0, 1, 4095, 4096, 4097, 8 * page - 1, 8 * page, 8 * page + 1])
    folios: dict[int, int] = {}
    taken: list[tuple[int, int]] = [(0, 64 * KIB)]
    for _ in range(draw(st.integers(1, 12))):
        order = draw(st.one_of(st.integers(0, 10), st.integers(0, 20)))
        index = draw(st.one_of(edge, st.integers(0, 1 << 18)))
        phys, size = index * (page << order), page << order
        if phys + size <= 1 << 50 and not images.overlap(phys, size, taken):
            folios[phys] = order
            taken.append((phys, size))
    return page, bitmap, sorted(folios.items())


@given(folio_sets())
@settings(max_examples=150)
def test_any_folios_read_back(
    tmp_path_factory: pytest.TempPathFactory, built: tuple[int, int, list[tuple[int, int]]]
) -> None:
    page, bitmap, folios = built
    image = Image(
        folios=folios,
        page_size=page,
        bitmap_bytes=bitmap,
        ram=[(0, 1 << 52)],
        subtrees=images.sample_subtrees(),
        machine=EM_AARCH64,
        metadata_phys=1 << 51,
    )
    layout = image.lay_out()
    path = image.write(tmp_path_factory.getbasetemp() / "random.elf")
    told = kho.open(path, page_size=page, bitmap_bytes=bitmap)
    check(told, image, layout, scratch=False)
    inc = kho.open(path)
    if inc.certainty in SURE:
        check(inc, image, layout, scratch=False)
    # If two readings differ and cannot be distinguished, the result is marked as uncertain.
    elif inc.folios != layout.folios:
        assert inc.certainty == "guess"
