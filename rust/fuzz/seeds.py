"""What the fuzz targets begin with: `python seeds.py CORPUS BYTES` fills a folder for each (tests/ in PYTHONPATH).

No seed is longer than BYTES: libFuzzer would cut it, and what is cut is mutated for nothing. Maps, memfds and handovers
are written by the plain-Python model of the tests at low addresses; devicetrees and dumps are those of tests/data.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import chain, count, product
from pathlib import Path

import dumpfiles
import images
import model

ROOT = Path(__file__).resolve().parents[2]
PAGE_SIZES = (4096, 16384, 65536)  # a first byte picks one
FEW = [(0x40_0000 << order, order) for order in (0, 1, 9)] + [(0x1_2345_0000, 0)]


def image(kind: int, page_size: int, pages: dict[int, bytes]) -> bytes:
    """A target's input: a byte that picks, then memory from the first page on."""
    blob = bytearray(max(phys + len(page) for phys, page in pages.items()))
    for phys, page in pages.items():
        blob[phys : phys + len(page)] = page
    return bytes([kind]) + bytes(blob[page_size:])


def pages_from(page_size: int) -> Callable[[int], int]:
    """Give out one page after another, whatever is asked for."""
    places = count(page_size, page_size)
    return lambda _: next(places)


def maps() -> Iterator[bytes]:
    for (kind, page_size), folios in product(enumerate(PAGE_SIZES), (FEW, FEW[:1], FEW[2:3])):
        for version in (2, 4):
            _, pages = model.serialize_radix(folios, page_size, version, pages_from(page_size))
            yield image(kind, page_size, pages)
        for bitmap_bytes in {512, page_size}:
            head, pages = model.serialize_v1(folios, page_size, bitmap_bytes, pages_from(page_size))
            # Bitmaps come first; the targets look for the list's head at the first page.
            moved = {page_size: head, head: page_size}
            swapped = {moved.get(phys, phys): page for phys, page in pages.items()}
            chunk = bytearray(swapped[page_size])
            for at in range(16, len(chunk), 16):
                (bitmap,) = struct.unpack_from("<Q", chunk, at + 8)
                struct.pack_into("<Q", chunk, at + 8, moved.get(bitmap, bitmap))
            yield image(kind, page_size, {**swapped, page_size: bytes(chunk)})


def memfds() -> Iterator[bytes]:
    listed = b"".join(struct.pack("<QQ", pfn | 3 << 52, index) for index, pfn in enumerate((4, 5, 1 << 20)))
    for n, page_size in enumerate(PAGE_SIZES):
        vmalloc = struct.pack("<QIHH", 2 * page_size, 1, 1, 0)
        for first, version in ((struct.pack("<QQQ", 0, 5, 3), 0), (struct.pack("<QQIIQ", 0, 5, 0, 0, 3), 0x80)):
            pages = {
                page_size: first + vmalloc,
                2 * page_size: struct.pack("<QQ", 0, 3 * page_size),
                3 * page_size: listed,
                4 * page_size: b"hello",
            }
            kind = next(kind for kind in range(version, version + 3) if kind % 3 == n)
            yield image(kind, page_size, pages)


def dumps() -> Iterator[bytes]:
    data = ROOT / "tests" / "data"
    for path in sorted(data.glob("dumps/*.xz")):
        yield lzma.decompress(path.read_bytes())
    for path in sorted(data.glob("linux-*/handover.elf")):
        yield path.read_bytes()
    for codec in dumpfiles.CODECS:
        yield dumpfiles.kdump({n << 12: bytes([n]) * 4096 for n in range(3)}, codec)


def handovers(most: int) -> Iterator[bytes]:
    """Whole memories of every ABI with an FDT, a blob and a file: raw, raw from elsewhere, ELF, LiME and kdump."""
    for compatible, page_size in (("kho-v1", 4096), ("kho-v3", 4096), ("kho-v4", 4096), ("kho-v1", 16384)):
        for bitmap_bytes in (page_size, 512) if compatible == "kho-v1" else (page_size,):
            size = most // page_size * page_size
            file = struct.pack("<QQIIQ", 0, 9, 0, 0, 1) + struct.pack("<QIHH", size - 2 * page_size, 1, 1, 0)
            laid = images.Image(
                folios=[(size - page_size, 0), (size - 2 * page_size, 0)] if page_size == 4096 else [],
                page_size=page_size,
                bitmap_bytes=bitmap_bytes,
                compatible=compatible,
                ram=[(0, size)],
                scratch=[(1 << 20, 1 << 20), (2 << 20, 1 << 20), (3 << 20, 1 << 20)],
                subtrees={**images.sample_subtrees(), "file": file} if page_size == 4096 else {},
                metadata_phys=0 if page_size > 4096 else 4096,
            ).lay_out()
            used = max(laid.pages) + page_size
            yield laid.to_raw(0, used)
            yield bytes(4096) + laid.to_raw(4096, used - 4096)[: most - 4096]
            yield laid.to_elf()
            yield dumpfiles.lime([(0, laid.to_raw(0, used))])
            yield dumpfiles.kdump({phys: bytes(page) for phys, page in laid.pages.items()}, block=page_size)


def roarings() -> Iterator[bytes]:
    """An array, runs and a bitmap, of 32 and of 64 bits (RoaringFormatSpec)."""
    array = struct.pack("<IIHHI3H", 12346, 1, 0, 2, 16, 1, 5, 70)
    runs = struct.pack("<IB2HH4H", 12347, 1, 0, 99, 2, 0, 49, 1000, 49)
    bitmap = struct.pack("<IIHHI", 12346, 1, 3, 8191, 16) + b"\x55" * 2048 + bytes(6144)
    for kind in (0, 1, 2, 4, 0x90):
        for body in (array, runs, bitmap, struct.pack("<II", 12346, 0)):
            yield bytes([kind]) + body
            yield bytes([kind | 8]) + struct.pack("<QI", 1, 0) + body


def cmdlines() -> Iterator[bytes]:
    for line in (
        "kho=on",
        'quiet kho=0 kho="on" kho_scratch=512M,1G,0x1000',
        "kho_scratch=200% kho",
        'kho_scratch="16m,0,04t" -- kho=off',
        "16M,32M,16M,tail",
    ):
        yield line.encode()


def main(corpus: Path, most: int) -> None:
    """Write the seeds; what is there already stays, unless it is too long."""
    made: dict[str, Iterator[bytes]] = {
        "map": maps(),
        "payload": memfds(),
        "dump": chain(dumps(), handovers(most)),
        "incoming": handovers(most),
        "roaring": roarings(),
        "cmdline": cmdlines(),
    }
    for target, seeds in made.items():
        folder = corpus / target
        folder.mkdir(parents=True, exist_ok=True)
        for n, seed in enumerate(seeds):
            if len(seed) <= most:
                (folder / f"seed-{n}").write_bytes(seed)
    for target in "fdt", "snapshot":
        (corpus / target).mkdir(parents=True, exist_ok=True)
        for path in ROOT.glob("tests/data/fdt/*.dtb"):
            if path.stat().st_size <= most:
                shutil.copy(path, corpus / target)
    for path in corpus.glob("*/*"):
        if path.stat().st_size > most:
            path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
