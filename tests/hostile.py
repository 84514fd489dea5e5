"""Malformed handovers by name: each is a small valid image with one defect.

A reader must refuse the images in `REFUSED`, whatever sizes it is given. It may read those in `ODD`, but must end in
bounded time without a crash. Both contain functions that damage a `Layout`; those in `FILES` damage the ELF file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import model
from images import MIB, Image, Layout, sample_subtrees
from model import Node

Damage = Callable[[Layout], None]
TOP = 2**64


def sane() -> Image:
    """Two chunks (orders 0 and 9), each of one bitmap, scratch and a subtree; page-sized bitmaps."""
    return Image(
        folios=[(0x40_0000, 0), (0x80_0000, 9)],
        ram=[(0, 64 * MIB)],
        scratch=[(48 * MIB, 8 * MIB)],
        subtrees=sample_subtrees(),
    )


def chunk_field(index: int, offset: int, form: str, value: int) -> Damage:
    """Damage: overwrite a field of chunk `index`."""

    def damage(layout: Layout) -> None:
        layout.put(layout.chunks[index] + offset, struct.pack("<" + form, value))

    return damage


def next_is(value: int) -> Damage:
    return chunk_field(1, 0, "Q", value)


def order_is(value: int) -> Damage:
    return chunk_field(0, 8, "I", value)


def num_elms_is(value: int) -> Damage:
    return chunk_field(0, 12, "I", value)


def phys_start_is(value: int) -> Damage:
    return chunk_field(1, 16, "Q", value)


def bitmap_is(value: int) -> Damage:
    return chunk_field(1, 24, "Q", value)


def chunk_points_at_itself(layout: Layout) -> None:
    next_is(layout.chunks[1])(layout)


def chunks_in_a_ring(layout: Layout) -> None:
    next_is(layout.chunks[0])(layout)


def long_ring(layout: Layout) -> None:
    """A ring of chunks without bitmaps that fills 1 MiB."""
    places = range(32 * MIB, 33 * MIB, layout.page_size)
    for at, following in zip(places, [*places[1:], places[0]], strict=True):
        layout.put(at, struct.pack("<QII", following, 0, 0))
    next_is(places[0])(layout)


def folios_up_to_the_top(layout: Layout) -> None:
    """4096 folios outside memory, the last one ends at 2^64; a page-sized bitmap cannot start at that address."""
    layout.put(layout.bitmaps(layout.chunks[1])[0][1], b"\xff" * layout.page_size)
    phys_start_is(TOP - (8 * 512 << 21))(layout)


def bitmap_is_its_chunk(layout: Layout) -> None:
    bitmap_is(layout.chunks[1])(layout)


def bitmap_twice(layout: Layout) -> None:
    """Two entries have the same bitmap and the same start."""
    chunk = layout.chunks[1]
    layout.put(chunk + 32, bytes(layout.pages[chunk][16:32]))
    chunk_field(1, 12, "I", 2)(layout)


def root_property(name: str, value: bytes | None) -> Damage:
    """Damage: replace a property of the root node, or remove it."""

    def damage(layout: Layout) -> None:
        layout.root.props.pop(name)
        if value is not None:
            layout.root.props[name] = value
        layout.put_root()

    return damage


def compatible_is(value: bytes | None) -> Damage:
    return root_property("compatible", value)


def map_is(value: bytes | int | None) -> Damage:
    return root_property("preserved-memory-map", struct.pack("<Q", value) if isinstance(value, int) else value)


def map_is_the_fdt(layout: Layout) -> None:
    map_is(layout.fdt_phys)(layout)


def map_inside_its_page(layout: Layout) -> None:
    map_is(layout.map_phys + 8)(layout)


def subtree_is(value: bytes | None) -> Damage:
    """Damage: replace the address in the producer's node."""

    def damage(layout: Layout) -> None:
        layout.root.children["producer"] = Node({} if value is None else {"fdt": value})
        layout.put_root()

    return damage


def header(index: int, value: int) -> Damage:
    """Damage: overwrite 32-bit word `index` of the FDT header."""

    def damage(layout: Layout) -> None:
        layout.put(layout.fdt_phys + 4 * index, struct.pack(">I", value))

    return damage


def struct_block(change: Callable[[bytes], bytes]) -> Damage:
    """Damage: rewrite the FDT's structure block and adjust the header."""

    def damage(layout: Layout) -> None:
        blob = model.write_fdt(layout.root)
        words = list(struct.unpack_from(">10I", blob))
        body, strings = change(blob[words[2] : words[3]]), blob[words[3] :]
        words[3] = words[2] + len(body)
        words[1] = words[3] + len(strings)
        words[9] = len(body)
        layout.put_root(struct.pack(">10I", *words) + blob[40 : words[2]] + body + strings)

    return damage


def name_without_nul(body: bytes) -> bytes:
    """Fill the block after the producer's FDT_BEGIN_NODE with its name."""
    at = body.index(b"producer")
    return body[:at] + b"p" * (len(body) - at)


def first_property(length: int, name: int | None = None) -> Callable[[bytes], bytes]:
    """Change the length or name offset of the root's first property."""

    def change(body: bytes) -> bytes:
        old_length, old_name = struct.unpack_from(">II", body, 12)
        words = (old_length if length < 0 else length, old_name if name is None else name)
        return body[:12] + struct.pack(">II", *words) + body[20:]

    return change


def fdt_of(fill: bytes) -> Damage:
    def damage(layout: Layout) -> None:
        layout.put_root(fill * layout.page_size)

    return damage


def fdt_cut_in_half(layout: Layout) -> None:
    blob = model.write_fdt(layout.root)
    layout.put_root(blob[: len(blob) // 2])


DEEP = b"\0\0\0\1x\0\0\0" * 400

REFUSED: dict[str, Damage] = {
    "chunk points at itself": chunk_points_at_itself,
    "chunks in a ring": chunks_in_a_ring,
    "a ring of 256 chunks": long_ring,
    "num_elms 2^32-1": num_elms_is(2**32 - 1),
    "num_elms one too many": num_elms_is(256),
    "order 37": order_is(37),
    "order 64": order_is(64),
    "order 200": order_is(200),
    "order 2^32-1": order_is(2**32 - 1),
    "next outside memory": next_is(0x4000_0000_0000),
    "next at the top": next_is(TOP - 4096),
    "next 2^64-1": next_is(TOP - 1),
    "next unaligned": next_is(0x40_0010),
    "bitmap outside memory": bitmap_is(0x4000_0000_0000),
    "bitmap at the top": bitmap_is(TOP - 4096),
    "bitmap unaligned": bitmap_is(0x40_0004),
    "bitmap 0": bitmap_is(0),
    "phys_start misaligned": phys_start_is(0x1000),
    "phys_start 2^64-1": phys_start_is(TOP - 1),
    "map of 4 bytes": map_is(bytes(4)),
    "map of no bytes": map_is(b""),
    "no map": map_is(None),
    "map outside memory": map_is(0x4000_0000_0000),
    "map 2^64-1": map_is(TOP - 1),
    "map inside its page": map_inside_its_page,
    "compatible of something else": compatible_is(b"acme,board\0"),
    "compatible empty": compatible_is(b""),
    "compatible without NUL": compatible_is(b"kho-v1"),
    "no compatible": compatible_is(None),
    "FDT magic wrong": header(0, 0xD00DFEEE),
    "FDT totalsize 2^32-1": header(1, 2**32 - 1),
    "FDT totalsize 8": header(1, 8),
    "FDT structure outside": header(2, 2**32 - 4),
    "FDT strings outside": header(3, 2**32 - 1),
    "FDT version 1": header(5, 1),
    "FDT last compatible 99": header(6, 99),
    "FDT cut in half": fdt_cut_in_half,
    "FDT of 0xff": fdt_of(b"\xff"),
    "FDT of zeros": fdt_of(b"\0"),
    "name without NUL": struct_block(name_without_nul),
    "no FDT_END": struct_block(lambda body: body[:-8]),
    "unknown token": struct_block(lambda body: body[:8] + b"\0\0\0\7" + body[12:]),
    "one FDT_END_NODE too many": struct_block(lambda body: body[:-4] + b"\0\0\0\2" + body[-4:]),
    "nodes nest 400 deep": struct_block(lambda body: body[:-8] + DEEP + b"\0\0\0\2" * 400 + body[-8:]),
    "property of 2^32-1 bytes": struct_block(first_property(2**32 - 1)),
    "property name outside": struct_block(first_property(-1, 2**31)),
}

ODD: dict[str, Damage] = {
    "map 0": map_is(0),
    "folios up to the top": folios_up_to_the_top,
    "compatible of the future": compatible_is(b"kho-v99\0"),
    "no bitmaps in a chunk": num_elms_is(0),
    "bitmap is its chunk": bitmap_is_its_chunk,
    "bitmap twice": bitmap_twice,
    "map is the FDT": map_is_the_fdt,
    "subtree outside memory": subtree_is(struct.pack("<Q", 0x4000_0000_0000)),
    "subtree of 4 bytes": subtree_is(bytes(4)),
    "subtree 0": subtree_is(bytes(8)),
    "subtree without a pointer": subtree_is(None),
}


def word(offset: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """Overwrite a field of the ELF file; program header 0 is at offset 64."""
    raw = struct.pack("<" + form, value)
    return lambda elf: elf[:offset] + raw + elf[offset + len(raw) :]


FILES: dict[str, Callable[[bytes], bytes]] = {
    "ELF32": word(4, "B", 1),
    "big-endian ELF": word(5, "B", 2),
    "program headers outside": word(32, "Q", 2**63),
    "program headers of 1 byte": word(54, "H", 1),
    "65534 program headers": word(56, "H", 65534),
    "no program headers": word(56, "H", 0),
    "PN_XNUM without a section": word(56, "H", 65535),
    "segment outside the file": word(64 + 8, "Q", 2**63),
    "segment past the end of memory": word(64 + 24, "Q", TOP - 4096),
    "segment larger in the file than in memory": word(64 + 32, "Q", 2**62),
    "segment of 2^64-1 bytes": word(64 + 40, "Q", TOP - 1),
    "cut in half": lambda elf: elf[: len(elf) // 2],
    "cut in the header": lambda elf: elf[:40],
    "zeros": lambda _: bytes(4 * MIB),
    "0xff": lambda _: b"\xff" * (4 * MIB),
    "empty": lambda _: b"",
}


def refused() -> dict[str, bytes]:
    """ELF cores that a reader must refuse, by the name of their defect."""
    return {name: damaged(damage) for name, damage in REFUSED.items()}


def odd() -> dict[str, bytes]:
    """ELF cores that a reader may read, by the name of their defect."""
    return {name: damaged(damage) for name, damage in ODD.items()}


def files() -> dict[str, bytes]:
    """Damaged ELF files, by the name of their defect."""
    elf = sane().to_bytes()
    return {name: change(elf) for name, change in FILES.items()}


def damaged(damage: Damage) -> bytes:
    layout = sane().lay_out()
    damage(layout)
    return layout.to_elf()
