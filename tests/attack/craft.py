"""Images crafted to cost a reader as much memory and time per byte as possible.

There is one for each structure with a count or a pointer. `CASES` has them by name, as functions of `scale`, the
approximate size of the file in MiB.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from kho.fdt import Writer

import model
from dumpfiles import flatten

MIB = 1 << 20
P = 4096
TOP = 1 << 40
"""Address of zeros that an image claims without bytes in the file."""


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


@dataclass
class Craft:
    """Description of a handover: bytes by address, claimed zeros, preserved folios, and subtrees of the root."""

    data: dict[int, bytes] = field(default_factory=dict)
    claims: list[tuple[int, int]] = field(default_factory=list)
    folios: list[tuple[int, int]] = field(default_factory=list)
    subtrees: list[tuple[str, int, int]] = field(default_factory=list)
    compatible: str = "kho-v4"
    map_phys: int | None = None
    """Address of a map that was written already, instead of one generated from `folios`."""
    at: int = 16 * MIB

    def room(self, nbytes: int, align: int = P) -> int:
        """Return an aligned address followed by `nbytes` of unused memory."""
        phys = -(-self.at // align) * align
        self.at = -(-(phys + nbytes) // P) * P
        return phys

    def put(self, raw: bytes, phys: int | None = None, *, order: int | None = 0) -> int:
        """Write bytes, by default at a new address, in preserved folios of an order; return the address."""
        size = P << (order or 0)
        phys = self.room(max(len(raw), 1), size) if phys is None else phys
        self.data[phys] = raw
        if order is not None:
            self.folios += [(at, order) for at in range(phys, phys + max(len(raw), 1), size)]
        return phys

    def subtree(self, name: str, raw: bytes, size: int | None = None) -> int:
        phys = self.put(raw)
        self.subtrees.append((name, phys, len(raw) if size is None else size))
        return phys

    def root(self) -> bytes:
        v1 = self.compatible == "kho-v1"
        writer = Writer(1 << 16)
        with writer.node():
            writer.property_str("compatible", self.compatible)
            writer.property_u64("preserved-memory-map", self.map_phys or 0)
            for name, phys, size in self.subtrees:
                with writer.node(name):
                    writer.property_u64("fdt" if v1 else "preserved-data", phys)
                    if not v1:
                        writer.property_u64("blob-size", size)
        return writer.finish()

    def elf(self, roots: int = 1) -> bytes:
        """The ELF core; several roots all point to the same map."""
        fdts = [self.put(bytes(1 << 16) if len(self.subtrees) > 9 else b"") for _ in range(roots)]
        if self.map_phys is None and self.compatible == "kho-v1":
            self.map_phys, pages = model.serialize_v1(self.folios, P, P, self.room, set())
            self.data |= pages
        elif self.map_phys is None:
            self.map_phys, pages = model.serialize_radix(self.folios, P, 4, self.room)
            self.data |= pages
        for fdt in fdts:
            self.data[fdt] = self.root().ljust(P, b"\0")
        return elf([*self.segments(), *((phys, b"", nbytes) for phys, nbytes in self.claims)])

    def segments(self) -> Iterator[tuple[int, bytes, int]]:
        """Runs of the written bytes, in whole pages."""
        start, parts = -1, bytearray()
        for phys, raw in sorted(self.data.items()):
            if phys != start + len(parts):
                if parts:
                    yield start, bytes(parts), len(parts)
                start, parts = phys, bytearray()
            parts += raw + bytes(-len(raw) % P)
        yield start, bytes(parts), len(parts)


def elf(segments: Iterable[tuple[int, bytes, int]], offset: int | None = None) -> bytes:
    """An ELF core of `(phys, bytes, memory size)`; with `offset` all segments have that file offset."""
    segments = list(segments)
    many = len(segments) >= 0xFFFF
    at = start = 64 + 56 * len(segments) + (64 if many else 0)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQI6H",
        4,
        62,
        1,
        0,
        64,
        start - 64 if many else 0,
        0,
        64,
        56,
        min(len(segments), 0xFFFF),
        64,
        int(many),
        0,
    )
    headers, body = bytearray(), bytearray()
    for phys, raw, memsz in segments:
        place = start if offset is not None else at
        filesz = offset if offset is not None and raw else len(raw)
        headers += struct.pack("<IIQQQQQQ", 1, 7, place, 0, phys, filesz, memsz, 0)
        body += raw
        at += len(raw)
    if many:
        headers += struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, len(segments), 0, 0)
    return bytes(head + headers + body)


def fdt(properties: dict[str, bytes], children: dict[str, dict[str, bytes]], capacity: int = 1 << 16) -> bytes:
    writer = Writer(capacity)
    with writer.node():
        for name, value in properties.items():
            writer.property(name, value)
        for child, inside in children.items():
            with writer.node(child):
                for name, value in inside.items():
                    writer.property(name, value)
    return writer.finish()


def vmalloc(craft: Craft, blocks: list[int], order: int = 0, total: int | None = None) -> bytes:
    """Write the chunks of a vmalloc area and return its descriptor."""
    first = 0
    for at in reversed(range(0, max(len(blocks), 1), 511)):
        first = craft.put(u64(first, *blocks[at : at + 511]).ljust(P, b"\0"))
    return struct.pack("<QIHH", first, len(blocks) << order if total is None else total, 1, order)


def records(craft: Craft, raw: bytes) -> bytes:
    """Write records into a vmalloc area of single pages and return its descriptor."""
    start = craft.put(raw.ljust(-(-len(raw) // P) * P, b"\0"))
    return vmalloc(craft, list(range(start, start + len(raw), P)))


def kho_test(craft: Craft, words: bytes, nr_folios: int | None = None) -> None:
    info = records(craft, words)
    count = len(words) // 8 if nr_folios is None else nr_folios
    data = {"nr_folios": struct.pack("<I", count), "folios_info": info, "csum": struct.pack("<I", 0)}
    craft.subtree(
        "kho_test", fdt({"compatible": b"kho-test-v1\0", "magic": struct.pack("<I", 0x4B484F21)}, {"data": data})
    )


def memfd(craft: Craft, size: int, folios: bytes | None, list_: bytes | None = None, count: int | None = None) -> int:
    """Write a memfd-v2 with a list of these records, or with the list of a descriptor; return its address."""
    area = list_ or records(craft, folios or b"")
    return craft.put(struct.pack("<QQIIQ", 0, size, 0, 0, len(folios or b"") // 16 if count is None else count) + area)


def luo5(craft: Craft, files: list[tuple[bytes, int, int]], name: bytes = b"s") -> None:
    """Write one session with these files `(compatible, data, token)`, in blocks of a page."""
    first = 0
    for at in reversed(range(0, max(len(files), 1), 63)):
        some = files[at : at + 63]
        raw = b"".join(struct.pack("<48sQQ", *file) for file in some)
        first = craft.put(u64(first, len(some)) + raw)
    sessions = craft.put(u64(0, 1) + struct.pack("<64sQQ", name, first, len(files)))
    craft.subtree("LUO", struct.pack("<8sQQQ", b"luo-v5", 1, sessions, 0))


def records_of(pairs: Iterable[tuple[int, int]]) -> bytes:
    """Records of up-to-date memfd folios `(pfn, index)`."""
    return b"".join(u64(pfn | 2 << 52, index) for pfn, index in pairs)


# Payloads


def zeros_under_a_test_folio(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, P << 30)], folios=[(TOP, 30)])
    kho_test(craft, u64(TOP | 30, 0))
    return craft.elf()


def zeros_under_many_test_folios(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, 2000 * P << 18)], folios=[(TOP + (n * P << 18), 18) for n in range(2000)])
    kho_test(craft, u64(*(phys | order for phys, order in craft.folios)))
    return craft.elf()


def one_test_folio_again_and_again(scale: float) -> bytes:
    craft = Craft()
    phys = craft.put(bytes(range(256)) * (MIB // 256), order=8)
    kho_test(craft, u64(phys | 8) * int(60_000 * scale))
    return craft.elf()


def test_folios_inside_one_another(scale: float) -> bytes:
    craft = Craft()
    phys = craft.put(bytes(range(256)) * (MIB // 256), order=8)
    inside = [(phys + n * (P << order), order) for order in range(9) for n in range(256 >> order)]
    craft.folios += inside
    kho_test(craft, b"".join(u64(start | order) for start, order in inside) * 16)
    return craft.elf()


def a_test_list_of_many(scale: float) -> bytes:
    craft = Craft()
    kho_test(craft, u64(*(1 << 32 | n << 12 for n in range(int(scale * MIB) // 8))), (1 << 32) - 1)
    return craft.elf()


def a_devicetree_of_4_gib_of_zeros(scale: float) -> bytes:
    craft = Craft()
    blob = bytearray(fdt({"compatible": b"memblock-v1\0"}, {}))
    blob[4:8] = b"\xff\xff\xff\xff"
    phys = craft.subtree("memblock", bytes(blob), (1 << 32) - 1)
    craft.claims.append((phys + P, 1 << 33))
    craft.at = phys + (1 << 34)
    return craft.elf()


def blobs_of_terabytes_of_zeros(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, 1 << 46)])
    for n in range(100):
        craft.subtrees.append((f"big{n}", TOP + (n << 38), 1 << 38))
    return craft.elf()


def subtrees_that_share_a_blob(scale: float) -> bytes:
    craft = Craft()
    regions = {f"r{n}": {"start": u64(TOP + n * P), "size": u64(P)} for n in range(int(scale * 5000))}
    phys = craft.subtree("s", fdt({"compatible": b"memblock-v1\0"}, regions, 4 * MIB))
    size = craft.subtrees[0][2]
    craft.subtrees += [(f"s{n}", phys, size) for n in range(900)]
    return craft.elf()


def subtrees_that_share_sessions(scale: float) -> bytes:
    craft = Craft()
    luo5(craft, [(b"memfd-v9", n << 12, n) for n in range(int(scale * 10_000))])
    _, phys, size = craft.subtrees[0]
    craft.subtrees += [(f"l{n}", phys, size) for n in range(900)]
    return craft.elf()


def regions_over_everything(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, 1 << 46)])
    regions = {f"r{n}": {"start": u64(TOP), "size": u64(1 << 46)} for n in range(min(int(scale * 9000), 8000))}
    craft.subtree("memblock", fdt({"compatible": b"memblock-v1\0"}, regions, 4 * MIB))
    return craft.elf()


def objects_of_a_service(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, 1 << 46)])
    objects = {
        str(n): {
            "key": f"{n}\0".encode(),
            "memory": u64(TOP + (n << 32), 1 << 32),
            "crc32": bytes(4),
            "generation": u64(1),
        }
        for n in range(int(scale * 6000))
    }
    head = {"compatible": b"kho-live-v1\0", "image": b"x\0", "version": b"1\0", "generation": u64(1)}
    craft.subtree("kho-live", fdt(head, objects, 4 * MIB))
    return craft.elf()


# LUO


def blocks_sixteen_bytes_apart(scale: float) -> bytes:
    """Blocks overlap: each begins 16 bytes after the previous one, so 51 session entries are counted repeatedly."""
    craft = Craft()
    count = int(scale * MIB) // 16
    start = craft.room(count * 16 + P)
    raw = b"".join(u64(start + 16 * (n + 1) if n + 1 < count else 0, 50) for n in range(count))
    craft.put(raw, start)
    craft.subtree("LUO", struct.pack("<8sQQQ", b"luo-v5", 1, start, 0))
    return craft.elf()


def sessions_of_shared_files(scale: float) -> bytes:
    """Luo-v5 in which all sessions refer to the same blocks of files."""
    craft = Craft()
    files = b"".join(struct.pack("<48sQQ", b"x-v1", n, n) for n in range(63))
    shared = craft.put(u64(0, 63) + files)
    first = 0
    for _ in range(int(scale * MIB) // P):
        first = craft.put(u64(first, 50) + struct.pack("<64sQQ", b"s", shared, 63) * 50)
    craft.subtree("LUO", struct.pack("<8sQQQ", b"luo-v5", 1, first, 0))
    return craft.elf()


def files_of_unknown_kinds(scale: float) -> bytes:
    craft = Craft()
    luo5(craft, [(b"x-v1", n << 12, n) for n in range(int(scale * MIB) // 64)])
    return craft.elf()


def as_many_files_as_are_read(scale: float) -> bytes:
    craft = Craft()
    luo5(craft, [(b"x-v1", n << 12, n) for n in range(min(int(scale * 8000), 8000))])
    return craft.elf()


def as_many_test_folios_as_are_read(scale: float) -> bytes:
    craft = Craft()
    kho_test(craft, u64(*(1 << 32 | n << 13 for n in range(min(int(scale * 8000), 8000)))))
    return craft.elf()


def sessions_without_files(scale: float) -> bytes:
    craft = Craft()
    first = 0
    for n in range(int(scale * MIB) // P):
        named = (struct.pack("<64sQQ", b"%d" % (50 * n + i), 0, 0) for i in range(50))
        first = craft.put(u64(first, 50) + b"".join(named))
    craft.subtree("LUO", struct.pack("<8sQQQ", b"luo-v5", 1, first, 0))
    return craft.elf()


def a_ring_of_blocks(scale: float) -> bytes:
    craft = Craft()
    count = int(scale * MIB) // P
    start = craft.room(count * P)
    for n in range(count):
        craft.put(u64(start + (n + 1) % count * P, 0), start + n * P)
    craft.subtree("LUO", struct.pack("<8sQQQ", b"luo-v5", 1, start, 0))
    return craft.elf()


def arrays_a_page_apart(scale: float) -> bytes:
    return arrays_that_overlap(scale, 64)


def arrays_that_overlap(scale: float, step: int = 1) -> bytes:
    """Luo-v1 in which the file array of each session begins `step` entries after that of the previous one."""
    craft = Craft()
    files = int(scale * MIB) // 64
    array = craft.put(struct.pack("<48sQQ", b"memfd-v9", 7, 7) * files)
    count = min(4000, files // step - 1)
    named = (struct.pack("<64sQQ", b"%d" % n, array + 64 * step * n, files - step * n) for n in range(count))
    header = craft.put(u64(count) + b"".join(named))
    child = {"luo-session": {"compatible": b"luo-session-v2\0", "luo-session-header": u64(header)}}
    craft.subtree("LUO", fdt({"compatible": b"luo-v1\0", "liveupdate-number": u64(1)}, child))
    return craft.elf()


def lists_of_zeros(scale: float) -> bytes:
    """Luo-v1 with arrays in claimed zeros."""
    craft = Craft(claims=[(TOP, 1 << 46)])
    header = craft.put(u64(60_000) + struct.pack("<64sQQ", b"a", TOP, 60_000) * 10)
    flbs = craft.put(u64(1 << 60, 60_000))
    craft.claims.append((flbs + P, 1 << 33))
    craft.at = flbs + (1 << 34)
    children = {
        "luo-session": {"compatible": b"luo-session-v2\0", "luo-session-header": u64(header)},
        "luo-flb": {"compatible": b"luo-flb-v1\0", "luo-flb-header": u64(flbs)},
    }
    craft.subtree("LUO", fdt({"compatible": b"luo-v1\0", "liveupdate-number": u64(1)}, children))
    return craft.elf()


# Files


def one_folio_everywhere_in_a_file(scale: float) -> bytes:
    craft = Craft()
    phys = craft.put(bytes(range(256)) * (2 * MIB // 256), order=9)
    count = int(scale * MIB) // 16
    luo5(
        craft,
        [(b"memfd-v2", memfd(craft, count * 2 * MIB, records_of((phys >> 12, n * 512) for n in range(count))), 1)],
    )
    return craft.elf()


def one_folio_in_many_files(scale: float) -> bytes:
    craft = Craft()
    phys = craft.put(bytes(range(256)) * (MIB // 256), order=8)
    count = int(scale * MIB) // (3 * P)
    luo5(craft, [(b"memfd-v2", memfd(craft, MIB, records_of([(phys >> 12, 0)])), n) for n in range(count)])
    return craft.elf()


def a_file_in_pieces(scale: float) -> bytes:
    """Every other page of a file is a hole, and its folios are scattered over memory."""
    craft = Craft(claims=[(TOP, 1 << 45)])
    count = int(scale * MIB) // 16
    folios = records_of(((TOP >> 12) + n * 7919 % (1 << 33), 2 * n) for n in range(count))
    luo5(craft, [(b"memfd-v2", memfd(craft, count * 2 * P, folios), 1)])
    return craft.elf()


def pieces_with_contents(scale: float) -> bytes:
    """As `a_file_in_pieces`, with folios that are in the file, each used repeatedly."""
    craft = Craft()
    phys = craft.put(bytes(range(1, 129)) * (64 * P // 128))
    count = int(scale * MIB) // 16
    folios = records_of(((phys >> 12) + n * 7 % 64, 2 * n) for n in range(count))
    luo5(craft, [(b"memfd-v2", memfd(craft, count * 2 * P, folios), 1)])
    return craft.elf()


def files_of_holes(scale: float) -> bytes:
    craft = Craft()
    sizes = [1 << 62, (1 << 64) - 1, 1 << 40, *[1 << 29] * 40]
    luo5(craft, [(b"memfd-v2", memfd(craft, size, b""), n) for n, size in enumerate(sizes)])
    return craft.elf()


def files_of_claimed_zeros(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, P << 34)], folios=[(TOP + n * (P << 30), 30) for n in range(16)])
    files = []
    for n in range(16):
        folio = records_of([((TOP >> 12) + (n << 30), 0)])
        files.append((b"memfd-v2", memfd(craft, P << 30, folio), n))
    luo5(craft, files)
    return craft.elf()


def lists_that_share_their_pages(scale: float) -> bytes:
    """Each file has a chunk of its own, but all chunks refer to the same pages of records."""
    craft = Craft()
    raw = records_of((n, n) for n in range(int(scale * MIB) // 32))
    start = craft.put(raw.ljust(-(-len(raw) // P) * P, b"\0"))
    pages = list(range(start, start + len(raw), P))
    files = []
    for n in range(int(scale * MIB) // (4 * P)):
        listed = vmalloc(craft, pages[:511])
        files.append((b"memfd-v2", memfd(craft, 1 << 40, None, listed, 1 << 40), n))
    luo5(craft, files)
    return craft.elf()


def lists_that_share_a_chain(scale: float) -> bytes:
    craft = Craft()
    listed = vmalloc(craft, [(1 << 32) + n * P for n in range(int(scale * MIB) // 16)])
    count = int(scale * MIB) // (4 * P)
    luo5(craft, [(b"memfd-v2", memfd(craft, 1 << 40, None, listed, 1 << 40), n) for n in range(count)])
    return craft.elf()


def a_list_of_pages_that_are_not_there(scale: float) -> bytes:
    craft = Craft()
    listed = vmalloc(craft, [(1 << 32) + 2 * n * P for n in range(int(scale * MIB) // 8)])
    luo5(craft, [(b"memfd-v2", memfd(craft, 1 << 40, None, listed, 1 << 40), 1)])
    return craft.elf()


def a_list_of_gigantic_blocks(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, 1 << 60)])
    listed = vmalloc(craft, [TOP + (n * P << 27) for n in range(20_000)], order=27, total=1)
    luo5(craft, [(b"memfd-v2", memfd(craft, 1 << 62, None, listed, 1 << 62), 1)])
    return craft.elf()


# Maps


def leaves(craft: Craft, bits: bytes, nbytes: int) -> None:
    """Write a tree whose leaves of order 0 contain `bits`, repeated."""
    count = max(nbytes // P, 1)
    start = craft.room(count * P)
    craft.data[start] = bits * (count * P // len(bits))
    tables = [start + n * P for n in range(count)]
    # Keys of order 0 have bit 52 set; a leaf decides 15 bits. This is index 256 in the level below the root.
    for level in range(5):
        made = []
        for at in range(0, len(tables), 512):
            table = [0] * 512
            first = {3: 0, 4: 2}.get(level, 0)
            table[first : first + len(tables[at : at + 512])] = tables[at : at + 512]
            made.append(craft.put(u64(*table[:512]), order=None))
        tables = made
    craft.map_phys = tables[0]


def every_other_page(scale: float) -> bytes:
    craft = Craft()
    leaves(craft, b"\x55", int(scale * MIB))
    return craft.elf()


def as_many_runs_as_are_read(scale: float) -> bytes:
    craft = Craft()
    leaves(craft, b"\x55", min(int(scale * 15), 15) * P)
    return craft.elf()


def every_page(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, 1 << 50)])
    leaves(craft, b"\xff", int(scale * MIB))
    return craft.elf()


def a_few_bits_of_each_leaf(scale: float) -> bytes:
    craft = Craft()
    leaves(craft, b"\x01" + bytes(63), int(scale * MIB))
    return craft.elf()


def tables_of_zeros(scale: float) -> bytes:
    """Inner nodes whose entries point to claimed pages."""
    craft = Craft(claims=[(TOP, 1 << 50)])
    count = max(int(scale * MIB) // P, 1)
    tables = []
    for n in range(count):
        tables.append(craft.put(u64(*(TOP + (512 * n + i) * P for i in range(512))), order=None))
    for _ in range(4):
        tables = [craft.put(u64(*tables[at : at + 512]), order=None) for at in range(0, len(tables), 512)]
    craft.map_phys = tables[0]
    return craft.elf()


def a_tree_that_shares_its_nodes(scale: float) -> bytes:
    craft = Craft()
    node = craft.put(b"\xff" * P, order=None)
    for _ in range(5):
        node = craft.put(u64(*[node] * 512), order=None)
    craft.map_phys = node
    return craft.elf()


def chunks_of_claimed_bitmaps(scale: float) -> bytes:
    craft = Craft(claims=[(TOP, 1 << 50)], compatible="kho-v1")
    first = 0
    for n in range(int(scale * MIB) // P):
        entries = b"".join(u64((255 * n + i) << 27, TOP + (255 * n + i) * P) for i in range(255))
        first = craft.put(struct.pack("<QII", first, 0, 255) + entries, order=None)
    craft.map_phys = first
    return craft.elf()


def bitmaps_all_over(scale: float) -> bytes:
    """Small bitmaps whose starts are as far apart as possible."""
    craft = Craft(compatible="kho-v1")
    count = int(scale * MIB) // 528
    start = craft.room(count * 512)
    craft.data[start] = (b"\x01" + bytes(511)) * count
    first = 0
    for at in range(0, count, 255):
        some = range(at, min(at + 255, count))
        entries = b"".join(u64(n * 0x9E3779B9 % (1 << 36) << 24, start + 512 * n) for n in some)
        first = craft.put(struct.pack("<QII", first, 0, len(some)) + entries, order=None)
    craft.map_phys = first
    return craft.elf()


def bitmaps_all_over_claimed_zeros(scale: float) -> bytes:
    """As `bitmaps_all_over`, inside memory: converted to a tree, each bitmap needs nodes of its own."""
    craft = Craft(claims=[(TOP, 1 << 60)], compatible="kho-v1")
    count = int(scale * MIB) // 528
    start = craft.room(count * 512)
    craft.data[start] = (b"\x01" + bytes(511)) * count
    first = 0
    for at in range(0, count, 255):
        some = range(at, min(at + 255, count))
        entries = b"".join(u64(TOP + (n * 0x9E3779B9 % (1 << 35) << 24), start + 512 * n) for n in some)
        first = craft.put(struct.pack("<QII", first, 0, len(some)) + entries, order=None)
    craft.map_phys = first
    return craft.elf()


def many_roots_of_one_map(scale: float) -> bytes:
    craft = Craft(compatible="kho-v1")
    craft.folios = [(n * 2 * P, 0) for n in range(int(scale * 200_000))]
    return craft.elf(roots=100)


# Files of memory


def headers_of_zeros(scale: float) -> bytes:
    craft = Craft()
    craft.claims = [(TOP + 2 * n * P, P) for n in range(int(scale * MIB) // 56)]
    return craft.elf()


def headers_and_one_over_all(scale: float) -> bytes:
    craft = Craft()
    craft.claims = [(TOP + 2 * n * P, 1) for n in range(int(scale * MIB) // 56)] + [(TOP, 1 << 50)]
    return craft.elf()


def addresses_of_the_same_bytes(scale: float) -> bytes:
    size = int(scale * MIB) // 2
    return elf([(n * 2 * MIB, b"x" if n < 8000 else b"", size) for n in range(8000)], offset=size) + bytes(
        range(256)
    ) * (size // 256)


def scratch_arrays(scale: float) -> bytes:
    """Pages that all look like a scratch array."""
    page = b"".join(u64((n + 1) * 4 * MIB, MIB) for n in range(255)).ljust(P, b"\0")
    craft = Craft()
    craft.put(page * (int(scale * MIB) // P), order=None)
    return craft.elf()


def pages_that_begin_devicetrees(scale: float) -> bytes:
    raw = bytearray(fdt({"compatible": b"acme\0"}, {}, P).ljust(P, b"\0"))
    raw[4:8] = struct.pack(">I", 1 << 16)
    craft = Craft()
    craft.put(bytes(raw) * (int(scale * MIB) // P) + bytes(1 << 16), order=None)
    return craft.elf()


def lime_ranges(scale: float) -> bytes:
    count = int(scale * MIB) // 33
    return b"".join(struct.pack("<4sIQQQ", b"EMiL", 1, 2 * n, 2 * n, 0) + b"x" for n in range(count))


def a_packed_dump(scale: float, block: int = 65536) -> bytes:
    """A dump of pages that compress to almost nothing."""
    packed = zlib.compress(b"\x07" * block, 9)
    return _kdump([packed] * (int(scale * MIB) // (24 + len(packed))), block)


def a_dump_that_shares_its_pages(scale: float) -> bytes:
    """A dump whose descriptors point to one compressed page."""
    return _kdump([zlib.compress(b"\x07" * 65536, 9)], 65536, int(scale * MIB) // 24)


def _kdump(pages: list[bytes], block: int, repeat: int = 1) -> bytes:
    count = len(pages) * repeat
    blocks = -(-count // (8 * block))
    main = struct.pack(
        "<8si65s65s65s65s65s65s6x16xIiiIIIIIIi",
        *(b"KDUMP   ", 6, b"Linux", b"", b"7.3.4", b"", b"aarch64", b""),
        *(0, block, 1, 2 * blocks, count, 0, 0, 0, 0, 1),
    )
    sub = struct.pack("<QiiQQqQqQqQQQQ", *[0] * 13, count)
    bitmap = b"\xff" * (count // 8) + bytes([(1 << count % 8) - 1])
    head = main.ljust(block, b"\0") + sub.ljust(block, b"\0") + 2 * bitmap.ljust(blocks * block, b"\0")
    at = len(head) + 24 * count
    descriptors, body = bytearray(), bytearray()
    for packed in pages:
        descriptors += struct.pack("<qIIQ", at + len(body), len(packed), 1, 0) * repeat
        body += packed
    return head + bytes(descriptors) + bytes(body)


def pages_of_all_sizes(scale: float) -> bytes:
    """A dump whose descriptors have sizes up to 2^32 - 1."""
    raw = bytearray(_kdump([zlib.compress(b"\x07" * P)], P, 1000))
    for at in range(4 * P, 4 * P + 24 * 500, 24):
        raw[at + 8 : at + 16] = b"\xff\xff\xff\xff\x01\0\0\0"
    return bytes(raw)


def a_flattened_dump_of_bytes(scale: float) -> bytes:
    """Records of one byte each, scattered over a file of 2^62 bytes."""
    head = (b"makedumpfile".ljust(16, b"\0") + struct.pack(">qq", 1, 1)).ljust(P, b"\0")
    count = int(scale * MIB) // 17
    start = flatten(_kdump([zlib.compress(b"\x07" * P)], P))[P:-16]
    body = b"".join(struct.pack(">qq", (1 << 40) + n * 65537 % (1 << 61), 1) + b"x" for n in range(count))
    return head + start + body + struct.pack(">qq", -1, -1)


def a_bare_devicetree(scale: float) -> bytes:
    """Nodes of the maximum depth, and as many as fit."""
    count = min(int(scale * MIB), 2 * MIB - 4096) // 12
    body = b"\0\0\0\1\0\0\0\0" + b"\0\0\0\1a\0\0\0" * 62
    body += b"\0\0\0\1b\0\0\0\0\0\0\2" * count + b"\0\0\0\2" * 63 + b"\0\0\0\x09"
    return (
        struct.pack(">10I", 0xD00DFEED, 56 + len(body), 56, 56 + len(body), 40, 17, 16, 0, 0, len(body))
        + bytes(16)
        + body
    )


def a_devicetree_of_properties(scale: float) -> bytes:
    count = min(int(scale * MIB), 2 * MIB - 4096) // 16
    body = b"\0\0\0\1\0\0\0\0" + b"\0\0\0\3\0\0\0\4\0\0\0\0abc\0" * count + b"\0\0\0\2\0\0\0\x09"
    head = struct.pack(">10I", 0xD00DFEED, 60 + len(body), 56, 56 + len(body), 40, 17, 16, 0, 4, len(body))
    return head + bytes(16) + body + b"reg\0"


def a_devicetree_of_strings(scale: float) -> bytes:
    value = b"ab\0" * (min(int(scale * MIB), 2 * MIB - 4096) // 3)
    return fdt({"compatible": b"kho-v4\0", "names": value}, {}, 4 * MIB)


CASES: dict[str, Callable[[float], bytes]] = {
    made.__name__: made
    for made in (
        zeros_under_a_test_folio,
        zeros_under_many_test_folios,
        one_test_folio_again_and_again,
        test_folios_inside_one_another,
        a_test_list_of_many,
        a_devicetree_of_4_gib_of_zeros,
        blobs_of_terabytes_of_zeros,
        subtrees_that_share_a_blob,
        subtrees_that_share_sessions,
        regions_over_everything,
        objects_of_a_service,
        blocks_sixteen_bytes_apart,
        sessions_of_shared_files,
        files_of_unknown_kinds,
        as_many_files_as_are_read,
        as_many_test_folios_as_are_read,
        sessions_without_files,
        a_ring_of_blocks,
        arrays_that_overlap,
        arrays_a_page_apart,
        lists_of_zeros,
        one_folio_everywhere_in_a_file,
        one_folio_in_many_files,
        a_file_in_pieces,
        pieces_with_contents,
        files_of_holes,
        files_of_claimed_zeros,
        lists_that_share_their_pages,
        lists_that_share_a_chain,
        a_list_of_pages_that_are_not_there,
        a_list_of_gigantic_blocks,
        every_other_page,
        as_many_runs_as_are_read,
        every_page,
        a_few_bits_of_each_leaf,
        tables_of_zeros,
        a_tree_that_shares_its_nodes,
        chunks_of_claimed_bitmaps,
        bitmaps_all_over,
        bitmaps_all_over_claimed_zeros,
        many_roots_of_one_map,
        headers_of_zeros,
        headers_and_one_over_all,
        addresses_of_the_same_bytes,
        scratch_arrays,
        pages_that_begin_devicetrees,
        lime_ranges,
        a_packed_dump,
        a_dump_that_shares_its_pages,
        pages_of_all_sizes,
        a_flattened_dump_of_bytes,
        a_bare_devicetree,
        a_devicetree_of_properties,
        a_devicetree_of_strings,
    )
}
