"""The synthetic images contain what they declare, according to the model."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import hostile
import images
import model
from images import EM_AARCH64, GIB, MIB, TIB, Image

NUMA = [(0, 2 * GIB), (1 * TIB, 2 * GIB)]


def check(image: Image, memory: model.Memory) -> None:
    """Check that the model reads the contents of `image` from `memory`."""
    layout = image.lay_out()
    assert layout.fdt_phys in model.find_fdts(memory, image.page_size)
    bitmap_bytes = image.bitmap_bytes if image.compatible == "kho-v1" else None
    handover = model.read_handover(memory, layout.fdt_phys, image.page_size, bitmap_bytes)
    assert handover.compatible == image.compatible
    assert handover.folios == layout.folios
    assert set(image.folios) <= set(handover.folios)
    assert {name: blob for name, (_, blob) in handover.subtrees.items()} == image.subtrees
    for phys, raw in image.contents.items():
        assert memory.read(phys, len(raw)) == raw
    scratch = memory.read(layout.scratch_phys, 16 * len(image.scratch))
    assert list(struct.iter_unpack("<QQ", scratch)) == image.scratch
    assert not any(images.overlap(phys, image.page_size, image.scratch) for phys in layout.pages)


def small(page_size: int, bitmap_bytes: int, compatible: str) -> Image:
    return Image(
        folios=[(0, 0), (page_size * 16, 4), (page_size << 14, 9), (page_size << 20, 10)],
        page_size=page_size,
        bitmap_bytes=bitmap_bytes,
        compatible=compatible,
        scratch=[(32 * MIB, 16 * MIB)],
        subtrees=images.sample_subtrees(),
        contents={0: b"zero", page_size * 16 + 5: bytes(range(256)) * 2 * (page_size // 512)},
        machine=EM_AARCH64,
        metadata_phys=31 * MIB + 512 * 1024,
    )


# At 16 KiB pages the tree of kho-v2 lacks a level: order-0 folios do not read back.
FORMATS = [(page, layout) for page in (4096, 16384, 65536) for layout in ("512", "page", "kho-v2", "kho-v3", "kho-v4")]
FORMATS = [f for f in FORMATS if f != (16384, "kho-v2")]


@pytest.mark.parametrize(("page_size", "layout"), FORMATS)
def test_every_page_size_and_format_reads_back(page_size: int, layout: str) -> None:
    compatible = layout if layout.startswith("kho") else "kho-v1"
    image = small(page_size, 512 if layout == "512" else page_size, compatible)
    check(image, model.Memory.from_elf(image.to_bytes()))


def test_gigantic_folios_and_numa_nodes_cost_no_bytes(tmp_path: Path) -> None:
    image = Image(
        folios=[(1 * GIB, 18), (1 * TIB, 9), (4 * TIB, 30)], ram=NUMA, scratch=[(64 * MIB, MIB), (TIB + GIB, MIB)]
    )
    path = image.write(tmp_path / "numa.elf")
    assert path.stat().st_size < MIB
    check(image, model.Memory.from_elf(path))
    assert path.read_bytes() == image.to_bytes()


def test_a_dump_of_all_ram_contains_stale_handovers() -> None:
    stale = Image(folios=[(0x80_0000, 0)], ram=[(0, 32 * MIB)], metadata_phys=4 * MIB)
    image = Image(folios=[(0x40_0000, 2)], ram=[(0, 32 * MIB)], whole_ram=True, under=[stale])
    memory = model.Memory.from_elf(image.to_bytes())
    assert [(s.phys, s.memsz) for s in memory.segments] == [(0, 32 * MIB)]
    assert len(memory.segments[0].data) < 8 * MIB
    check(image, memory)
    found = model.find_fdts(memory, 4096)
    assert found == sorted({image.lay_out().fdt_phys, stale.lay_out().fdt_phys})


def test_an_image_can_have_more_segments_than_fit_the_elf_header(tmp_path: Path) -> None:
    image = Image(folios=[(2 * GIB + i * 8192, 0) for i in range(65536)])
    memory = model.Memory.from_elf(image.write(tmp_path / "many.elf"))
    assert len(memory.segments) > 65535
    assert memory.segments[-1].phys == 2 * GIB + 65535 * 8192


def test_a_raw_dump_is_the_same_memory() -> None:
    image = Image(folios=[(0x40_0000, 2)], contents={0x40_0000: b"here"})
    check(image, model.Memory([model.Segment(0, 8 * MIB, image.lay_out().to_raw(0, 8 * MIB))]))


def test_the_undamaged_image_is_valid() -> None:
    check(hostile.sane(), model.Memory.from_elf(hostile.sane().to_bytes()))
    assert [len(hostile.sane().lay_out().bitmaps(chunk)) for chunk in hostile.sane().lay_out().chunks] == [1, 1]


def test_all_damaged_images_differ() -> None:
    built = [*hostile.refused().values(), *hostile.odd().values(), *hostile.files().values()]
    assert len({hostile.sane().to_bytes(), *built}) == len(built) + 1
    assert max(len(image) for image in built) < 8 * MIB
