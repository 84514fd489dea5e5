"""A slow, simple implementation of the handover formats in plain Python, as the reference for the Rust code.

Written from the format description alone; shares nothing with the Rust code. Uses sets instead of bitmaps and integers
instead of words, and checks only what prevents a malformed image from hanging the reader. Addresses and sizes are in
bytes, pfns in pages; a folio is `(phys, order)`: `page_size << order` bytes, aligned to that size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Folio = tuple[int, int]
Alloc = Callable[[int], int]

MAX_ORDER = 36
"""The largest order that the tracker accepts."""
FDT_MAGIC = 0xD00DFEED


class ModelError(Exception):
    """The image is malformed."""


# Memory


@dataclass(frozen=True)
class Segment:
    """`memsz` bytes of physical memory at `phys`: `data`, then zeros."""

    phys: int
    memsz: int
    data: bytes


class Memory:
    """Physical memory, as a list of segments."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = sorted(segments, key=lambda s: s.phys)

    @classmethod
    def from_elf(cls, image: bytes | Path) -> Memory:
        """The PT_LOAD segments of an ELF64 little-endian file, by p_paddr (ELF-64 Object File Format 1.5)."""
        raw = image.read_bytes() if isinstance(image, Path) else image
        if raw[:6] != b"\x7fELF\x02\x01":
            raise ModelError("not a little-endian ELF64 file")
        (phoff,) = struct.unpack_from("<Q", raw, 0x20)
        phentsize, phnum = struct.unpack_from("<HH", raw, 0x36)
        if phnum == 0xFFFF:  # PN_XNUM: too many for 16 bits, sh_info of section 0 has the number
            (shoff,) = struct.unpack_from("<Q", raw, 0x28)
            (phnum,) = struct.unpack_from("<I", raw, shoff + 44)
        segments = []
        for i in range(phnum):
            p_type, _flags, offset, _vaddr, paddr, filesz, memsz, _align = struct.unpack_from(
                "<IIQQQQQQ", raw, phoff + i * phentsize
            )
            if p_type == 1:
                segments.append(Segment(paddr, memsz, raw[offset : offset + filesz]))
        return cls(segments)

    def read(self, phys: int, size: int) -> bytes:
        """`size` bytes at `phys`, across adjacent segments. Raises ModelError if a byte is outside the segments."""
        out = b""
        while len(out) < size:
            at = phys + len(out)
            for s in self.segments:
                if s.phys <= at < s.phys + s.memsz:
                    want = min(size - len(out), s.phys + s.memsz - at)
                    data = s.data[at - s.phys : at - s.phys + want]
                    out += data + bytes(want - len(data))
                    break
            else:
                raise ModelError(f"{at:#x} is not in this memory")
        return out

    def u64(self, phys: int) -> int:
        return int.from_bytes(self.read(phys, 8), "little")

    def pages(self, page_size: int) -> Iterator[int]:
        """The address of each page that has bytes in the file."""
        for s in self.segments:
            yield from range(-(-s.phys // page_size) * page_size, s.phys + len(s.data), page_size)


# Flattened devicetree (Devicetree Specification v0.4, chapter 5)


@dataclass
class Node:
    """A devicetree node: properties by name, then children by name, in order."""

    props: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, Node] = field(default_factory=dict)

    def string(self, name: str) -> str:
        return self.props[name].rstrip(b"\0").decode()

    def int(self, name: str) -> int:
        """A value in native byte order, which is little-endian on all machines with KHO."""
        return int.from_bytes(self.props[name], "little")


def fdt_size(memory: Memory, phys: int) -> int:
    """The header's `totalsize`. Raises ModelError if there is no header at `phys`."""
    magic, total = struct.unpack(">II", memory.read(phys, 8))
    if magic != FDT_MAGIC:
        raise ModelError(f"{phys:#x}: no FDT at this address")
    return int(total)


def read_fdt(blob: bytes) -> Node:
    """The root node of a blob."""
    magic, _total, off_struct, off_strings = struct.unpack_from(">IIII", blob)
    if magic != FDT_MAGIC:
        raise ModelError("no FDT")
    outer = Node()
    stack = [outer]
    at = off_struct

    def text(start: int) -> str:
        return blob[start : blob.index(b"\0", start)].decode()

    while True:
        (token,) = struct.unpack_from(">I", blob, at)
        at += 4
        if token == 1:  # FDT_BEGIN_NODE
            name = text(at)
            at += (len(name) + 4) & ~3
            node = Node()
            stack[-1].children[name] = node
            stack.append(node)
        elif token == 2:  # FDT_END_NODE
            stack.pop()
        elif token == 3:  # FDT_PROP
            size, name_at = struct.unpack_from(">II", blob, at)
            stack[-1].props[text(off_strings + name_at)] = blob[at + 8 : at + 8 + size]
            at += 8 + ((size + 3) & ~3)
        elif token == 9:  # FDT_END
            return outer.children[""]
        elif token != 4:  # FDT_NOP
            raise ModelError(f"unknown token {token:#x}")


def write_fdt(root: Node) -> bytes:
    """The blob that libfdt's sequential writer produces: strings are in reverse order of first use."""
    strings = b""
    ends: dict[bytes, int] = {}  # distance of a string's start from the end of the string table, which grows downwards

    def string_end(name: str) -> int:
        nonlocal strings
        raw = name.encode() + b"\0"
        if raw not in strings:
            strings = raw + strings
        return ends.setdefault(raw, len(strings) - strings.index(raw))

    def emit(name: str, node: Node) -> list[tuple[bytes, int | None, bytes]]:
        raw = name.encode() + b"\0"
        out: list[tuple[bytes, int | None, bytes]] = [(struct.pack(">I", 1) + raw + bytes(-len(raw) % 4), None, b"")]
        for key, value in node.props.items():
            end = string_end(key)
            out.append((struct.pack(">II", 3, len(value)), end, value + bytes(-len(value) % 4)))
        for key, child in node.children.items():
            out += emit(key, child)
        return [*out, (struct.pack(">I", 2), None, b"")]

    body = b""
    for head, end, tail in emit("", root):
        body += head + (b"" if end is None else struct.pack(">I", len(strings) - end)) + tail
    body += struct.pack(">I", 9)
    off_struct = 48 + 16  # header, aligned to 16, and the empty memory reservation block
    off_strings = off_struct + len(body)
    total = off_strings + len(strings)
    header = struct.pack(">10I", FDT_MAGIC, total, off_struct, off_strings, 48, 17, 16, 0, len(strings), len(body))
    return header + bytes(off_struct - len(header)) + body + strings


def find_fdts(memory: Memory, page_size: int) -> list[int]:
    """Addresses of pages that begin with an FDT with a root compatible of kho-v<n> and a map property."""
    found = []
    for phys in memory.pages(page_size):
        try:
            root = read_fdt(memory.read(phys, fdt_size(memory, phys)))
            if root.string("compatible").startswith("kho-v") and "preserved-memory-map" in root.props:
                found.append(phys)
        except (ModelError, KeyError, ValueError, struct.error):
            continue
    return found


# The preserved-memory map


def set_bits(bitmap: bytes) -> list[int]:
    """Indexes of the set bits; bit i is bit i%8 of byte i/8."""
    return [8 * i + bit for i, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1]


def read_v1(memory: Memory, head: int, page_size: int, bitmap_bytes: int) -> tuple[list[Folio], set[int]]:
    """kho-v1: the chunk list at `head` (struct khoser_mem_chunk, kernel/kexec_handover.c of 6.16 and 6.18).

    Returns the folios by address, and the addresses of the pages that chunks and bitmaps occupy.
    """
    folios = []
    metadata = set()
    seen = set()
    chunk = head
    while chunk:
        if chunk in seen:
            raise ModelError(f"chunk at {chunk:#x}: a cycle")
        seen.add(chunk)
        metadata.add(chunk)
        page = memory.read(chunk, page_size)
        following, order, num_elms = struct.unpack_from("<QII", page)
        if num_elms > (page_size - 16) // 16:
            raise ModelError(f"chunk at {chunk:#x}: {num_elms} bitmaps")
        for i in range(num_elms):
            phys_start, bitmap = struct.unpack_from("<QQ", page, 16 + 16 * i)
            metadata.add(bitmap // page_size * page_size)
            folios += [
                (phys_start + bit * (page_size << order), order) for bit in set_bits(memory.read(bitmap, bitmap_bytes))
            ]
        chunk = following
    return sorted(folios), metadata


def radix_shape(page_size: int, version: int) -> tuple[int, int, int]:
    """(levels, key bits per inner level, key bits per leaf) of kho-v2..v4 (linux/kho/abi/kexec_handover.h)."""
    shift = page_size.bit_length() - 1
    inner, leaf = shift - 3, shift + 3
    width = 64 - shift + (1 if version >= 3 else 0)
    return -(-(width - leaf) // inner) + 1, inner, leaf


def radix_key(folio: Folio, page_size: int) -> int:
    """The key for address and order: the highest set bit encodes the order."""
    phys, order = folio
    shift = page_size.bit_length() - 1
    return 1 << (64 - shift - order) | phys >> (shift + order)


def radix_folio(key: int, page_size: int) -> Folio:
    """The inverse of `radix_key`."""
    shift = page_size.bit_length() - 1
    top = key.bit_length() - 1
    order = 64 - shift - top
    if order < 0:
        raise ModelError(f"key {key:#x} exceeds the keys of order 0")
    return (key ^ 1 << top) << (shift + order), order


def read_radix(memory: Memory, root: int, page_size: int, version: int) -> tuple[list[Folio], set[int]]:
    """kho-v2..v4: the radix tree at `root`. Returns the folios by address, and the addresses of the tree's pages."""
    levels, inner, leaf = radix_shape(page_size, version)
    folios: list[Folio] = []
    metadata = set()

    def walk(node: int, level: int, prefix: int) -> None:
        metadata.add(node)
        page = memory.read(node, page_size)
        if level == 0:
            folios.extend(radix_folio(prefix << leaf | bit, page_size) for bit in set_bits(page))
            return
        for index, child in enumerate(struct.unpack(f"<{page_size // 8}Q", page)):
            if child:
                walk(child, level - 1, prefix << inner | index)

    walk(root, levels - 1, 0)
    return sorted(folios), metadata


# Writing


def greedy_split(pfn: int, nr_pages: int) -> list[tuple[int, int]]:
    """`(pfn, order)` of the aligned blocks of a range (kho_preserve_pages, kernel/kexec_handover.c)."""
    out = []
    end = pfn + nr_pages
    while pfn < end:
        order = 0
        while order < MAX_ORDER and pfn % (2 << order) == 0 and pfn + (2 << order) <= end:
            order += 1
        out.append((pfn, order))
        pfn += 1 << order
    return out


class ModelTracker:
    """The preserved folios as a set of `(pfn, order)`, and the bitmaps created so far: empty ones are kept."""

    def __init__(self, page_size: int = 4096, bitmap_bytes: int = 4096) -> None:
        self.page_size = page_size
        self.bits = 8 * bitmap_bytes
        self.marked: set[tuple[int, int]] = set()
        self.blocks: set[tuple[int, int]] = set()

    def check(self, pfn: int, order: int) -> None:
        """Raise ValueError for a misaligned or out-of-range folio."""
        if not 0 <= order <= MAX_ORDER or pfn % (1 << order) or not 0 <= pfn < 2**64 // self.page_size:
            raise ValueError(f"pfn {pfn:#x} order {order}")

    def preserve(self, pfn: int, order: int = 0) -> bool:
        """Mark a folio; returns whether it was unmarked before."""
        self.check(pfn, order)
        self.blocks.add((order, (pfn >> order) // self.bits))
        new = (pfn, order) not in self.marked
        self.marked.add((pfn, order))
        return new

    def unpreserve(self, pfn: int, order: int = 0) -> bool:
        """Unmark a folio; returns whether it was marked before."""
        self.check(pfn, order)
        known = (pfn, order) in self.marked
        self.marked.discard((pfn, order))
        return known

    def check_range(self, pfn: int, nr_pages: int) -> None:
        """Raise ValueError for a range that exceeds the address space, before any change."""
        if pfn < 0 or nr_pages < 0 or pfn + nr_pages > 2**64 // self.page_size:
            raise ValueError(f"pfn {pfn:#x} + {nr_pages:#x}")

    def preserve_pages(self, pfn: int, nr_pages: int) -> int:
        """Mark a range; returns the number of folios of its split that were unmarked before."""
        self.check_range(pfn, nr_pages)
        return sum([self.preserve(*block) for block in greedy_split(pfn, nr_pages)])

    def unpreserve_pages(self, pfn: int, nr_pages: int) -> int:
        """Unmark a range; returns the number of folios of its split that were marked before."""
        self.check_range(pfn, nr_pages)
        return sum([self.unpreserve(*block) for block in greedy_split(pfn, nr_pages)])

    def folios(self) -> list[Folio]:
        """`(phys, order)`, by address."""
        return sorted((pfn * self.page_size, order) for pfn, order in self.marked)

    def serialize_v1(self, alloc: Alloc) -> tuple[int, dict[int, bytes]]:
        """As the function `serialize_v1`, including empty bitmaps."""
        return serialize_v1(self.folios(), self.page_size, self.bits // 8, alloc, self.blocks)


def serialize_v1(
    folios: Iterable[Folio],
    page_size: int,
    bitmap_bytes: int,
    alloc: Alloc,
    blocks: Iterable[tuple[int, int]] = (),
) -> tuple[int, dict[int, bytes]]:
    """The chunk list of `folios` and of empty `blocks` (order, index): orders ascending, indices ascending.

    `alloc(nbytes)` returns the address for a bitmap or a chunk. Returns the address of the first chunk (0 for an empty
    map) and `{phys: bytes}`.
    """
    bits = 8 * bitmap_bytes
    grid: dict[int, dict[int, set[int]]] = {}
    for order, index in blocks:
        grid.setdefault(order, {}).setdefault(index, set())
    for phys, order in folios:
        index, bit = divmod(phys // (page_size << order), bits)
        grid.setdefault(order, {}).setdefault(index, set()).add(bit)

    chunks: list[tuple[int, list[tuple[int, int]]]] = []
    out: dict[int, bytes] = {}
    room = (page_size - 16) // 16
    for order in sorted(grid):
        entries = []
        for index in sorted(grid[order]):
            bitmap = alloc(bitmap_bytes)
            out[bitmap] = sum(1 << bit for bit in grid[order][index]).to_bytes(bitmap_bytes, "little")
            entries.append((index * bits * (page_size << order), bitmap))
        chunks += [(order, entries[i : i + room]) for i in range(0, len(entries), room)]

    where = [alloc(page_size) for _ in chunks]
    for (order, entries), at, following in zip(chunks, where, [*where, 0][1:], strict=True):
        page = struct.pack("<QII", following, order, len(entries)) + b"".join(struct.pack("<QQ", *e) for e in entries)
        out[at] = page.ljust(page_size, b"\0")
    return (where[0] if where else 0), out


def serialize_radix(
    folios: Iterable[Folio], page_size: int, version: int, alloc: Alloc
) -> tuple[int, dict[int, bytes]]:
    """The radix tree of `folios`. Returns the root's address and `{phys: page}`."""
    levels, inner, leaf = radix_shape(page_size, version)
    out: dict[int, bytes] = {}

    def build(keys: list[int], level: int) -> int:
        at = alloc(page_size)
        if level == 0:
            out[at] = sum(1 << key % (1 << leaf) for key in set(keys)).to_bytes(page_size, "little")
            return at
        table = [0] * (page_size // 8)
        groups: dict[int, list[int]] = {}
        for key in keys:
            groups.setdefault((key >> ((level - 1) * inner + leaf)) % (1 << inner), []).append(key)
        for index in sorted(groups):
            table[index] = build(groups[index], level - 1)
        out[at] = struct.pack(f"<{page_size // 8}Q", *table)
        return at

    return build([radix_key(f, page_size) for f in folios], levels - 1), out


# The handover as a whole


@dataclass
class Handover:
    """The handover with the root FDT at `fdt_phys`. A subtree is `(phys, bytes)`."""

    fdt_phys: int
    page_size: int
    root: Node
    folios: list[Folio]
    metadata: set[int]
    subtrees: dict[str, tuple[int, bytes]]

    @property
    def compatible(self) -> str:
        return self.root.string("compatible")

    @property
    def map(self) -> int:
        return self.root.int("preserved-memory-map")

    @property
    def preserved_bytes(self) -> int:
        return sum(self.page_size << order for _, order in self.folios)


def read_handover(memory: Memory, fdt_phys: int, page_size: int, bitmap_bytes: int | None = None) -> Handover:
    """Read the handover with the root FDT at `fdt_phys`; for kho-v1 the bitmap size is required."""
    root = read_fdt(memory.read(fdt_phys, fdt_size(memory, fdt_phys)))
    compatible, head = root.string("compatible"), root.int("preserved-memory-map")
    if compatible == "kho-v1":
        if bitmap_bytes is None:
            raise ModelError("kho-v1 needs bitmap_bytes")
        folios, metadata = read_v1(memory, head, page_size, bitmap_bytes)
    elif compatible in ("kho-v2", "kho-v3", "kho-v4"):
        folios, metadata = read_radix(memory, head, page_size, int(compatible[-1]))
    else:
        raise ModelError(f"compatible {compatible!r}")
    subtrees = {}
    for name, node in root.children.items():
        phys = node.int("fdt" if compatible == "kho-v1" else "preserved-data")
        size = node.int("blob-size") if "blob-size" in node.props else fdt_size(memory, phys)
        subtrees[name] = (phys, memory.read(phys, size))
    return Handover(fdt_phys, page_size, root, folios, metadata, subtrees)


# Payloads


def read_vmalloc(memory: Memory, descriptor: bytes, page_size: int) -> bytes:
    """The concatenated pages of a struct kho_vmalloc (include/linux/kho/abi/kexec_handover.h)."""
    chunk, total_pages, _flags, order = struct.unpack("<QIHH", descriptor)
    out = b""
    while chunk and len(out) < total_pages * page_size:
        page = struct.unpack(f"<{page_size // 8}Q", memory.read(chunk, page_size))
        for phys in page[1:]:
            if phys == 0:
                break
            out += memory.read(phys, page_size << order)
        chunk = page[0]
    if len(out) != total_pages * page_size:
        raise ModelError(f"vmalloc area of {total_pages} pages has {len(out)} bytes")
    return out


def csum(data: bytes) -> int:
    """The one's-complement sum of 16-bit words: csum_partial and csum_fold without the inversion (lib/checksum.c)."""
    return fold(sum(struct.unpack(f"<{len(data) // 2}H", data)))


def fold(total: int) -> int:
    """A one's-complement sum folded to 16 bits, for comparing two sums."""
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def read_kho_test(memory: Memory, blob: bytes, page_size: int, inline: bool | None = None) -> tuple[list[Folio], int]:
    """The data of lib/test_kho.c: the folios in their order, and the 32-bit checksum.

    `inline`: whether `folios_info` is the list itself (6.16) or a struct kho_vmalloc that points to it (from 6.18).
    Default: by the length, which is ambiguous for two folios and then means the struct.
    """
    data = read_fdt(blob).children["data"]
    nr, info = data.int("nr_folios"), data.props["folios_info"]
    if inline is None:
        inline = len(info) != 16
    listed = info if inline else read_vmalloc(memory, info, page_size)
    words = struct.unpack_from(f"<{nr}Q", listed)
    return [(word & ~(page_size - 1), word & (page_size - 1)) for word in words], data.int("csum")


def csum_of_folios(memory: Memory, folios: Iterable[Folio], page_size: int) -> int:
    """The checksum of `kho_test`: `csum` of the contents of all folios, in their order."""
    return csum(b"".join(memory.read(phys, page_size << order) for phys, order in folios))


def read_reserve_mem(blob: bytes) -> dict[str, tuple[int, int]]:
    """`reserve_mem=` areas by name: (start, size) (mm/memblock.c)."""
    return {name: (node.int("start"), node.int("size")) for name, node in read_fdt(blob).children.items()}
