"""What the fuzz targets begin with: `python seeds.py CORPUS` fills a folder for each of them (tests/ in PYTHONPATH).

Maps and memfds are written by the plain-Python model of the tests at the low addresses where the targets look for them;
devicetrees and dumps are those of tests/data.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import dumpfiles
import model

ROOT = Path(__file__).resolve().parents[2]
PAGE_SIZES = (4096, 16384, 65536)  # a first byte picks one
FEW = [(0x40_0000 << order, order) for order in (0, 1, 9)] + [(0x1_2345_0000, 0)]
MOST_BYTES = 1 << 20


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
    for kind, page_size in enumerate(PAGE_SIZES):
        for version in (2, 4):
            _, pages = model.serialize_radix(FEW, page_size, version, pages_from(page_size))
            yield image(kind, page_size, pages)
        for bitmap_bytes in {512, page_size}:
            head, pages = model.serialize_v1(FEW, page_size, bitmap_bytes, pages_from(page_size))
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


def main(corpus: Path) -> None:
    """Write the seeds; what is there already stays."""
    for target, seeds in (("map", maps()), ("payload", memfds()), ("dump", dumps())):
        folder = corpus / target
        folder.mkdir(parents=True, exist_ok=True)
        for n, seed in enumerate(seeds):
            if len(seed) <= MOST_BYTES:
                (folder / f"seed-{n}").write_bytes(seed)
    for target in "fdt", "snapshot":
        (corpus / target).mkdir(parents=True, exist_ok=True)
        for path in ROOT.glob("tests/data/fdt/*.dtb"):
            shutil.copy(path, corpus / target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
