"""How long `kho inspect` takes to open a core of 512 MiB, against the time it takes to read the file.

    python benches/open_core.py [MIB]

Each is run in a process of its own, with the file in the page cache: seconds, peak RSS, and the ratio to reading the
whole file into one buffer, 1 MiB at a time. "sparse" is a handover in a file of holes; "dense" has noise in every page
of it; "kdump" and "flat" are the dense one, every fourth page of it noise and the others text, packed with zlib.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from dumpfiles import flatten, kdump
from images import MIB, Image, sample_subtrees

PEAK = """
import sys, time
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
"""
READ = (
    PEAK
    + """
began = time.perf_counter()
buffer = bytearray(1 << 20)
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.readinto(buffer):
        pass
print(time.perf_counter() - began, peak())
"""
)
INSPECT = (
    PEAK
    + """
import kho
began = time.perf_counter()
inc = kho.open(sys.argv[1])
assert inc.nr_folios == int(sys.argv[2]), inc.nr_folios
print(time.perf_counter() - began, peak())
"""
)


def image(size: int) -> Image:
    """A handover in the middle of `nbytes` bytes of RAM."""
    half = size // 2
    return Image(
        folios=[(half + i * 0x4000, 0) for i in range(512)],
        ram=[(0, size)],
        scratch=[(m * MIB, MIB) for m in (8, 9, 10)],
        subtrees=sample_subtrees(),
        metadata_phys=half + 32 * MIB,
        whole_ram=True,
    )


def measure(program: str, *args: object) -> tuple[float, int]:
    """Seconds and peak RSS in KiB: the best of three."""
    runs = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", program, *map(str, args)], check=True, capture_output=True, text=True
        )
        seconds, rss = out.stdout.split()
        runs.append((float(seconds), int(rss)))
    return min(runs)


def main() -> None:
    """Write the files, measure, print a table."""
    size = int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 512 * MIB
    layout = image(size).lay_out()
    noise = random.Random(1)
    with tempfile.TemporaryDirectory() as dir_name:
        files = {name: Path(dir_name) / name for name in ("sparse", "dense", "kdump", "flat")}
        for name in ("sparse", "dense"):
            with files[name].open("wb") as file:
                if name == "dense":
                    for _ in range(size // MIB + 1):
                        file.write(noise.randbytes(MIB))
                file.seek(0)
                layout.write_elf(file)
                file.truncate(size + 0x1000)
        if name == "dense":
            # The program header must say that all of it is in the file.
            with files[name].open("r+b") as file:
                file.seek(64 + 32)
                file.write(size.to_bytes(8, "little"))
        part = min(size, 128 * MIB)
        pages = {
            at: noise.randbytes(4096) if at >> 12 & 3 == 0 else b"text " * 819 + b"!" for at in range(0, part, 4096)
        }
        small = image(part).lay_out()
        pages |= {phys: bytes(page) for phys, page in small.pages.items()}
        packed = kdump(pages)
        files["kdump"].write_bytes(packed)
        files["flat"].write_bytes(flatten(packed, 1 << 16))
        print("file    memory      file     open   peak RSS    read   open/read")
        for name, path in files.items():
            memory = size if name in ("sparse", "dense") else part
            read, _ = measure(READ, path)
            took, rss = measure(INSPECT, path, len((layout if memory == size else small).folios))
            length = path.stat().st_size
            sizes = f"{name:7}{memory >> 20:5} MiB {length >> 20:5} MiB"
            print(f"{sizes} {took:6.4f} s {rss >> 10:5} MiB {read:6.3f} s {took / read:7.2f}")


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"({time.perf_counter() - began:.0f} s in all)")
