"""What looking for memfds in no list adds to opening a raw dump by search, and that nothing is found where nothing is.

    python benches/memfd_scan.py [MIB] [FILE ...]

A raw image of 1024 MiB, by default: half noise, half words as kernel data has them (small numbers, and addresses of
pages that are there), with a handover in it whose preserved pages no payload refers to. Opened as it is, then with
`unlisted`; the ratio, and the number of memfds found, which is 0. Dumps named as FILE are opened and searched too.
"""

from __future__ import annotations

import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import kho
from kho.handover.owners import unlisted

from images import MIB, Image, sample_subtrees

ROUNDS = 5


def words(rng: Random, pages: int) -> bytes:
    """A MiB of pages that begin as a structure of a memfd may."""
    made = []
    for _ in range(MIB // 4096):
        head = [rng.choice((0, 1, rng.randrange(1 << 14), rng.randrange(pages) << 12)) for _ in range(6)]
        made.append(struct.pack("<6Q", *head).ljust(4096, b"\0"))
    return b"".join(made)


def write(path: Path, mib: int) -> None:
    """Write the image: noise that differs from MiB to MiB, then the handover's own pages over it."""
    rng = Random(mib)
    size = mib * MIB
    folios = [(size // 2 + n * 4096, 0) for n in range(size // 4 // 4096)]
    image = Image(folios=folios, compatible="kho-v4", ram=[(0, size)], subtrees=sample_subtrees(), metadata_phys=MIB)
    laid = image.lay_out()
    with path.open("wb") as out:
        for n in range(mib):
            out.write(rng.randbytes(MIB) if n % 2 else words(rng, size // 4096))
        for phys, page in laid.pages.items():
            out.seek(phys)
            out.write(page)


def timed(source: str, *, scan: bool) -> tuple[float, int]:
    """Seconds, and how many memfds were found."""
    began = time.perf_counter()
    inc = kho.open(source)
    found = unlisted(inc) if scan else []
    return time.perf_counter() - began, len(found)


def main() -> None:
    """Print the ratio of the medians."""
    given = sys.argv[1:]
    mib = int(given.pop(0)) if given and given[0].isdigit() else 1024
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ram.bin"
        write(path, mib)
        source = f"{path}@0,check=no"
        timed(source, scan=True)
        plain, scanned, found = [], [], 0
        for _ in range(ROUNDS):
            plain.append(timed(source, scan=False)[0])
            seconds, count = timed(source, scan=True)
            scanned.append(seconds)
            found += count
        open_s, scan_s = statistics.median(plain), statistics.median(scanned)
        print(f"{mib} MiB: open {open_s:.3f} s, with memfds {scan_s:.3f} s, ratio {scan_s / open_s:.2f}; found {found}")
    for name in given:
        seconds, count = timed(name, scan=True)
        print(f"{name}: {seconds:.3f} s; found {count}")


if __name__ == "__main__":
    main()
