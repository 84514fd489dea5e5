"""Synthetic handovers as ELF cores, built with the model alone, and `Layout`, to damage them."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import model
from model import Folio, Node

EM_X86_64 = 62
EM_AARCH64 = 183
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PN_XNUM = 0xFFFF
FILE_ALIGN = 0x1000
"""Alignment of segments in the file."""


def overlap(phys: int, size: int, areas: Iterable[tuple[int, int]]) -> bool:
    return any(phys < start + length and start < phys + size for start, length in areas)


@dataclass
class Image:
    """Description of a handover: preserved folios, memory and ABI. Sizes and addresses in bytes.

    The FDT and the subtrees are preserved too, as in the kernel. They, the map and the scratch array go to free pages
    from `metadata_phys` on (default: 1 MiB after the start of the first RAM range), or to `fdt_phys` and
    `scratch_phys`.
    """

    folios: list[Folio] = field(default_factory=list)
    page_size: int = 4096
    bitmap_bytes: int = 4096
    compatible: str = "kho-v1"
    ram: list[tuple[int, int]] = field(default_factory=lambda: [(0, 256 * MIB)])
    scratch: list[tuple[int, int]] = field(default_factory=list)
    subtrees: dict[str, bytes] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    """Bytes by address; all other memory is zeros."""
    blocks: set[tuple[int, int]] = field(default_factory=set)
    """Empty kho-v1 bitmaps in the map, as `(order, index)`."""
    fdt_phys: int | None = None
    scratch_phys: int | None = None
    metadata_phys: int | None = None
    machine: int = EM_X86_64
    whole_ram: bool = False
    """A dump of all RAM with one PT_LOAD per range, instead of one per run of handed-over pages."""
    under: list[Image] = field(default_factory=list)
    """Stale handovers in the same memory, at lower addresses."""

    def lay_out(self) -> Layout:
        """Assign an address to each part and return the layout."""
        out = Layout(self)
        for stale in self.under:
            for phys, page in stale.lay_out().pages.items():
                out.put(phys, bytes(page))
        for phys, raw in self.contents.items():
            out.put(phys, raw)
        start = self.ram[0][0] + MIB if self.metadata_phys is None else self.metadata_phys
        taken = [(phys, self.page_size << order) for phys, order in self.folios] + self.scratch
        taken += [(phys, self.page_size) for phys in (self.fdt_phys, self.scratch_phys) if phys is not None]
        pages = free_pages(start, self.page_size, taken)
        bitmap_room: list[int] = []

        def place(size: int) -> int:
            if size == self.page_size:
                return next(pages)
            if not bitmap_room:
                page = next(pages)
                bitmap_room.extend(range(page, page + self.page_size, size))
            return bitmap_room.pop(0)

        v1 = self.compatible == "kho-v1"
        out.fdt_phys = next(pages) if self.fdt_phys is None else self.fdt_phys
        own = [(out.fdt_phys, 0)]
        children = {}
        for name, blob in self.subtrees.items():
            if len(blob) > self.page_size:
                raise ValueError(f"subtree {name!r} is larger than a page")
            phys = next(pages)
            out.put(phys, blob)
            own.append((phys, 0))
            props = {"fdt" if v1 else "preserved-data": struct.pack("<Q", phys)}
            if self.compatible not in ("kho-v1", "kho-v2"):
                props["blob-size"] = struct.pack("<Q", len(blob))
            children[name] = Node(props)

        out.folios = sorted({*self.folios, *own})
        if v1:
            out.map_phys, written = model.serialize_v1(
                out.folios, self.page_size, self.bitmap_bytes, place, self.blocks
            )
        else:
            version = int(self.compatible.removeprefix("kho-v"))
            out.map_phys, written = model.serialize_radix(out.folios, self.page_size, version, place)
        for phys, raw in written.items():
            out.put(phys, raw)
        chunk = out.map_phys if v1 else 0
        while chunk:
            out.chunks.append(chunk)
            chunk = out.u64(chunk)

        out.scratch_phys = next(pages) if self.scratch_phys is None else self.scratch_phys
        out.put(out.scratch_phys, b"".join(struct.pack("<QQ", *area) for area in self.scratch))
        root = {"compatible": self.compatible.encode() + b"\0", "preserved-memory-map": struct.pack("<Q", out.map_phys)}
        out.root = Node(root, children)
        out.put_root()
        return out

    def write(self, path: Path) -> Path:
        """Write the ELF core with holes, so that a file of terabytes takes only the space of its pages."""
        with path.open("wb") as file:
            self.lay_out().write_elf(file)
        return path

    def to_bytes(self) -> bytes:
        """The ELF core as bytes, for images that fit into memory."""
        return self.lay_out().to_elf()


def free_pages(start: int, page_size: int, taken: list[tuple[int, int]]) -> Iterator[int]:
    at = -(-start // page_size) * page_size
    while True:
        while overlap(at, page_size, taken):
            at += page_size
        yield at
        at += page_size


class Layout:
    """The pages of an image by address, and the addresses of its parts, so that tests can damage them."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.page_size = image.page_size
        self.pages: dict[int, bytearray] = {}
        self.fdt_phys = self.map_phys = self.scratch_phys = 0
        self.chunks: list[int] = []
        self.folios: list[Folio] = []
        self.root = Node()

    def put(self, phys: int, raw: bytes) -> None:
        """Write `raw` at `phys`; missing pages are created."""
        at = phys - phys % self.page_size
        while at < phys + max(len(raw), 1):
            page = self.pages.setdefault(at, bytearray(self.page_size))
            begin, end = max(phys, at), min(phys + len(raw), at + self.page_size)
            page[begin - at : end - at] = raw[begin - phys : end - phys]
            at += self.page_size

    def put_root(self, blob: bytes | None = None) -> None:
        """Write `root`, or another blob, as the root FDT."""
        self.pages.pop(self.fdt_phys, None)
        self.put(self.fdt_phys, model.write_fdt(self.root) if blob is None else blob)

    def u64(self, phys: int) -> int:
        page = self.pages[phys - phys % self.page_size]
        return int(struct.unpack_from("<Q", page, phys % self.page_size)[0])

    def bitmaps(self, chunk: int) -> list[tuple[int, int]]:
        """`(phys_start, bitmap)` of each entry of a chunk."""
        (num,) = struct.unpack_from("<I", self.pages[chunk], 12)
        return [struct.unpack_from("<QQ", self.pages[chunk], 16 + 16 * i) for i in range(num)]

    def segments(self) -> list[tuple[int, int, int]]:
        """`(phys, memory size, file size)` of each PT_LOAD; bytes after the file size are zeros."""
        data = merged((phys, self.page_size) for phys in self.pages)
        if self.image.whole_ram:
            areas = self.image.ram
        else:
            areas = merged(data + [(phys, self.page_size << order) for phys, order in self.folios])
        out = []
        for start, size in areas:
            inside = [(phys, length) for phys, length in data if start <= phys < start + size]
            if self.image.whole_ram:
                out.append((start, size, sum(inside[-1]) - start if inside else 0))
                continue
            if not inside or inside[0][0] > start:
                inside.insert(0, (start, 0))
            ends = [phys for phys, _ in inside[1:]] + [start + size]
            out += [(phys, end - phys, length) for (phys, length), end in zip(inside, ends, strict=True)]
        return out

    def write_elf(self, file: BinaryIO) -> None:
        """Write an ELF64 core: header, program headers, then the bytes of each segment."""
        segments = self.segments()
        many = len(segments) >= PN_XNUM  # then their number is in section header 0
        shoff = 64 + 56 * len(segments) if many else 0
        phnum, shentsize, shnum = (PN_XNUM, 64, 1) if many else (len(segments), 0, 0)
        ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        header = (4, self.image.machine, 1, 0, 64, shoff, 0, 64, 56, phnum, shentsize, shnum, 0)
        file.write(ident + struct.pack("<HHIQQQI6H", *header))
        at = 64 + 56 * len(segments) + 64 * shnum
        offsets = []
        for phys, memsz, filesz in segments:
            at = -(-at // FILE_ALIGN) * FILE_ALIGN
            offsets.append(at)
            file.write(struct.pack("<IIQQQQQQ", 1, 7, at, 0, phys, filesz, memsz, 0))
            at += filesz
        if many:
            file.write(struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, len(segments), 0, 0))
        for (phys, _, filesz), offset in zip(segments, offsets, strict=True):
            self.write_pages(file, phys, filesz, offset)

    def write_pages(self, file: BinaryIO, start: int, size: int, offset: int = 0) -> None:
        """Write `size` bytes from `start` at `offset` of a file; missing pages become holes."""
        for phys in sorted(p for p in self.pages if start <= p < start + size):
            file.seek(offset + phys - start)
            file.write(self.pages[phys])

    def to_elf(self) -> bytes:
        file = io.BytesIO()
        self.write_elf(file)
        return file.getvalue()

    def to_raw(self, start: int, size: int) -> bytes:
        """`size` bytes of memory from `start`, as in a raw dump."""
        file = io.BytesIO(bytes(size))
        self.write_pages(file, start, size)
        return file.getvalue()


def merged(areas: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort `(start, size)` ranges and merge overlapping or adjacent ones."""
    out: list[tuple[int, int]] = []
    for start, size in sorted(areas):
        if out and start <= sum(out[-1]):
            first = out[-1][0]
            out[-1] = (first, max(sum(out[-1]), start + size) - first)
        else:
            out.append((start, size))
    return out


def sample_subtrees() -> dict[str, bytes]:
    """An FDT of an unknown producer."""
    return {"producer": model.write_fdt(Node({"compatible": b"example-v1\0"}))}
