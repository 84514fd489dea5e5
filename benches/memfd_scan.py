"""What looking for memfds in no list adds to opening a raw dump by search, and that nothing is found where nothing is.

    python benches/memfd_scan.py [MIB] [--pieces N] [--files FILE ...]

A raw image of 1024 MiB, by default: half noise, half words as kernel data has them (small numbers, and addresses of
pages that are there), with a handover in it whose preserved pages no payload refers to. Opened as it is, then with
`unlisted`; the ratio, and the number of memfds found, which is 0. The search itself looks at each page that it reads:
what that costs is at most what looking at the preserved pages alone costs, which are read for it once more, so that
processor time is printed too, for the whole image, with what it adds to a search without it. `make guard` counts the
instructions of both, and fails above 20 %. With --pieces N the image is followed by N others of its size, in
memory, that are searched for false hits alone. Each FILE is opened and searched too.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import kho
from kho._kho import join_owners
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


def alone(source: str, fdt_phys: int) -> float:
    """Seconds of processor time that looking at the preserved pages takes, without a search before it."""
    inc = kho.open(source, fdt_phys=fdt_phys)
    owners_of(inc)
    began = time.process_time()
    unlisted(inc)
    both = time.process_time() - began
    began = time.process_time()
    owners_of(inc)
    return max(both - (time.process_time() - began), 0.0)


def owners_of(inc: kho.Incoming) -> None:
    """Do what `unlisted` does before it looks at pages."""
    join_owners(inc, [("root FDT", "FDT")], [(0, 0, (inc.fdt_phys, inc.fdt.totalsize))])


def false_hits(mib: int, seed: int) -> int:
    """Memfds found in another image, held in memory: in its preserved pages, and as if no map had them."""
    rng = Random(seed)
    size = mib * MIB
    noise = b"".join(rng.randbytes(MIB) if n % 2 else words(rng, size // 4096) for n in range(mib))
    made = bytearray(noise)
    image = Image(compatible="kho-v1", ram=[(0, size)], subtrees=sample_subtrees(), metadata_phys=MIB)
    laid = image.lay_out()
    root = bytearray(laid.pages[laid.fdt_phys])
    at = root.index(struct.pack("<Q", laid.map_phys))
    root[at : at + 8] = bytes(8)
    laid.put_root(bytes(root))
    for phys, page in laid.pages.items():
        made[phys : phys + len(page)] = page
    return len(unlisted(kho.open(kho.Memory.from_segments([(0, bytes(made))]))))


def main() -> None:
    """Print the ratio of the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mib", nargs="?", type=int, default=1024)
    parser.add_argument("--pieces", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=[])
    given = parser.parse_args()
    mib = given.mib
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
        fdt_phys = kho.open(source).fdt_phys
        cpu = []
        for _ in range(ROUNDS):
            began = time.process_time()
            kho.open(source)
            cpu.append((time.process_time() - began, 4 * alone(source, fdt_phys)))
        search, look = (statistics.median(values) for values in zip(*cpu, strict=True))
        share = look / (search - look) if search > look else float("inf")
        print(f"processor time: open {search:.3f} s; looking for memfds takes at most {look:.3f} s of it, +{share:.0%}")
    found = 0
    for piece in range(given.pieces):
        found += false_hits(mib, piece)
        print(f"{(piece + 1) * mib} MiB searched; found {found}", flush=True)
    for name in given.files:
        seconds, count = timed(name, scan=True)
        print(f"{name}: {seconds:.3f} s; found {count}")


if __name__ == "__main__":
    main()
