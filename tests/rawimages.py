"""Raw images of handovers, at any address, with holes left out, cut: as virtual machines and dumpers write them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import kho

Run = tuple[int, int]
"""(address, bytes) of memory that an image has; the next run follows in the file without a gap."""
GIB = 1 << 30


def contents(source: Path) -> list[tuple[int, bytes]]:
    """(address, bytes) of all that an ELF core has."""
    memory = kho.Memory.open(source)
    return [(phys, memory.read(phys, nbytes)) for phys, nbytes in memory.ranges]


def write(path: Path, memory: Iterable[tuple[int, bytes]], runs: list[Run], *, size: int | None = None) -> Path:
    """Write a raw image of some runs, of `size` bytes or all; what is not there stays a hole of the file."""
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
    """The same bytes at other addresses: a memory that no pointer in it fits."""
    return [(phys + by, data) for phys, data in memory]
