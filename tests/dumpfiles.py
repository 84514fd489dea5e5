"""Writers of dumps in plain Python: kdump in every compression, flattened, LiME, raw; none compresses repeats."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

Run = tuple[int, int]
"""`(address, bytes)` of a run of memory in a raw image; runs are adjacent in the file."""


def stored(page: bytes) -> bytes:
    return page


def lzo(page: bytes) -> bytes:
    """One run of literals and the end of the stream (Documentation/staging/lzo.rst)."""
    left = len(page) - 18
    return bytes(1 + (left - 1) // 255) + bytes([(left - 1) % 255 + 1]) + page + b"\x11\0\0"


def snappy(page: bytes) -> bytes:
    """A length of three bytes, and one literal element with a 16-bit length."""
    n = len(page)
    return bytes([n & 127 | 128, n >> 7 & 127 | 128, n >> 14]) + b"\xf4" + struct.pack("<H", n - 1) + page


def zstd(page: bytes) -> bytes:
    """A frame of one segment with one raw block (RFC 8878)."""
    return b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(page)) + struct.pack("<I", len(page) << 3 | 1)[:3] + page


CODECS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "stored": (0, stored),
    "zlib": (1, zlib.compress),
    "lzo": (2, lzo),
    "snappy": (4, snappy),
    "zstd": (0x20, zstd),
}


def kdump(
    pages: dict[int, bytes],
    codec: str = "zlib",
    *,
    block: int = 4096,
    machine: str = "x86_64",
    ram: Iterable[int] = (),
    level: int = 0,
) -> bytes:
    """A kdump file, version 6, of whole pages by address; pages of zeros share a descriptor's page (diskdump_mod.h).

    `ram` are the addresses of more pages that the machine had, which the filter of this level left out.
    """
    flags, pack = CODECS[codec]
    known = {*pages, *ram}
    max_mapnr = max(known) // block + 1
    blocks = -(-max_mapnr // (8 * block))
    bitmaps = [bytearray(blocks * block), bytearray(blocks * block)]
    for bitmap, addresses in zip(bitmaps, (known, pages), strict=True):
        for phys in addresses:
            bitmap[phys // block // 8] |= 1 << phys // block % 8
    main = struct.pack(
        "<8si65s65s65s65s65s65s6x16xIiiIIIIIIi",
        *(b"KDUMP   ", 6, b"Linux", b"", b"7.3.4", b"", machine.encode(), b""),
        *(0, block, 1, 2 * blocks, max_mapnr, 0, 0, 0, 0, 1),
    )
    sub = struct.pack("<QiiQQqQqQqQQQQ", 0, level, *[0] * 11, max_mapnr)
    head = main.ljust(block, b"\0") + sub.ljust(block, b"\0") + b"".join(map(bytes, bitmaps))
    zeros = len(head) + 24 * len(pages)
    descriptors, body = b"", bytearray(block)
    for _, page in sorted(pages.items()):
        packed, how, offset = page, 0, zeros
        if any(page):
            packed, how, offset = pack(page), flags, zeros + len(body)
            body += packed
        descriptors += struct.pack("<qIIQ", offset, len(packed), how, 0)
    return head + descriptors + bytes(body)


def flatten(file: bytes, step: int = 4096) -> bytes:
    """The flattened form of makedumpfile, with the last part of the file first."""
    out = (b"makedumpfile".ljust(16, b"\0") + struct.pack(">qq", 1, 1)).ljust(4096, b"\0")
    for at in reversed(range(0, len(file), step)):
        part = file[at : at + step]
        out += struct.pack(">qq", at, len(part)) + part
    return out + struct.pack(">qq", -1, -1)


def lime(runs: list[tuple[int, bytes]]) -> bytes:
    """A LiME dump of `(phys, bytes)` runs."""
    return b"".join(struct.pack("<4sIQQQ", b"EMiL", 1, phys, phys + len(raw) - 1, 0) + raw for phys, raw in runs)


def raw(path: Path, memory: Iterable[tuple[int, bytes]], runs: list[Run], *, size: int | None = None) -> Path:
    """Write a raw image of some runs, cut to `size` bytes; missing memory stays a hole in the file."""
    with path.open("wb") as file:
        for phys, data in memory:
            at = 0
            for start, nbytes in runs:
                first, last = max(phys, start), min(phys + len(data), start + nbytes)
                if first < last:
                    file.seek(at + first - start)
                    file.write(data[first - phys : last - phys])
                at += nbytes
        file.truncate(sum(nbytes for _, nbytes in runs) if size is None else size)
    return path


def moved(memory: Iterable[tuple[int, bytes]], by: int) -> list[tuple[int, bytes]]:
    """The same bytes at other addresses, so that all pointers in them are wrong."""
    return [(phys + by, data) for phys, data in memory]
