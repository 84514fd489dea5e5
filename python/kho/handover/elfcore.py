"""ELF cores of what was handed over: one PT_LOAD per physical run, p_paddr its address, holes where only zeros are.

Such a core is what a kernel's handover was captured as for the tests, and what `kho.open`, crash, gdb and readelf read.
Contents are streamed; no more than a megabyte is in memory at a time.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from .. import _kho
from ..errors import NoHandoverError, OutsideMemoryError, ParameterError, SourceError

__all__ = ["Image", "Part", "Segment", "save_elf"]

MACHINES = {"x86_64": 62, "aarch64": 183}
"""e_machine."""
EHDR = struct.Struct("<16sHHIQQQI6H")
PHDR = struct.Struct("<IIQQQQQQ")
SHDR = struct.Struct("<IIQQQQIIQQ")
PN_XNUM = 0xFFFF
"""As many program headers or more are counted in section header 0."""
ALIGN = 4096
"""Where segments begin in the file."""
CHUNK = 1 << 20
PIECE = 1 << 16
"""What is looked at for a hole."""
ZEROS = bytes(PIECE)


class Readable(Protocol):
    """Physical memory: a `Memory`, `Arena` or `Incoming`."""

    def read(self, phys: int, n: int, /) -> bytes:
        """Copy `n` bytes."""
        ...

    def next_data(self, phys: int, /) -> tuple[int, int] | None:
        """Find what may be other than zeros."""
        ...


class Part(NamedTuple):
    """A run of memory, and where its bytes are."""

    phys: int
    nbytes: int
    memory: Readable


class Segment(NamedTuple):
    """A PT_LOAD: `nbytes` from `phys`; the first `filesz` are in the file, the rest reads as zeros."""

    phys: int
    nbytes: int
    filesz: int


def save_elf(
    memory: _kho.Memory | _kho.Arena | _kho.Incoming,
    ranges: Iterable[tuple[int, int]],
    path: str | os.PathLike[str],
    *,
    machine: str = "x86_64",
    progress: Callable[[int], object] | None = None,
) -> list[Segment]:
    """Write runs of physical memory as an ELF core.

    Args: ranges: (phys, nbytes) each, all of them in the memory. machine: "x86_64", "aarch64" or "machine N".
        progress: called with the number of bytes written so far.
    Returns: the segments.
    Raises: OutsideMemoryError; ParameterError for ranges that overlap; SourceError if the file cannot be written.
    """
    parts = [Part(phys, nbytes, memory) for phys, nbytes in sorted(ranges) if nbytes]
    there = memory.ranges if not isinstance(memory, _kho.Arena) else [(at, size) for at, size, _ in memory.regions]
    for phys, nbytes, _ in parts:
        if clipped([(phys, nbytes)], merged(there)) != [(phys, nbytes)]:
            raise OutsideMemoryError(f"ELF core: the {nbytes:#x} bytes at {phys:#x} are not all in this memory")
    return _save(parts, path, machine, progress)


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Make one of what overlaps or adjoins; by address."""
    out: list[tuple[int, int]] = []
    for start, size in sorted(ranges):
        if out and start <= sum(out[-1]):
            first = out[-1][0]
            out[-1] = (first, max(sum(out[-1]), start + size) - first)
        elif size:
            out.append((start, size))
    return out


def clipped(ranges: Iterable[tuple[int, int]], to: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give the parts of ranges that lie in others; both by address and disjoint."""
    out = []
    bounds = list(to)
    at = 0
    for start, size in ranges:
        end = start + size
        while at < len(bounds) and sum(bounds[at]) <= start:
            at += 1
        next_bound = at
        while next_bound < len(bounds) and bounds[next_bound][0] < end:
            first, length = bounds[next_bound]
            begin, behind = max(start, first), min(end, first + length)
            out.append((begin, behind - begin))
            next_bound += 1
    return out


def data_runs(part: Part) -> list[tuple[int, int]]:
    """List what of a part may hold something other than zeros: (phys, nbytes)."""
    runs = []
    at, end = part.phys, part.phys + part.nbytes
    while at < end:
        found = part.memory.next_data(at)
        if found is None or found[0] >= end:
            break
        start, size = found
        behind = min(start + size, end)
        runs.append((start, behind - start))
        at = behind
    return runs


def _end_of_data(part: Part, runs: list[tuple[int, int]], page_size: int) -> int:
    """Find the end of the last page of a part that is not all zeros; its start if they all are."""
    for start, size in reversed(runs):
        end = start + size
        while end > start:
            begin = max(start, (end - 1) // PIECE * PIECE)
            piece = part.memory.read(begin, end - begin)
            if piece != ZEROS[: len(piece)]:
                last = begin + len(piece.rstrip(b"\0")) - 1
                return min((last // page_size + 1) * page_size, part.phys + part.nbytes)
            end = begin
    return part.phys


def _save(
    parts: list[Part],
    path: str | os.PathLike[str],
    machine: str,
    progress: Callable[[int], object] | None,
    page_size: int = ALIGN,
) -> list[Segment]:
    """Write parts, by address, into a file that takes its name when it is complete."""
    path = Path(path)
    runs = [data_runs(part) for part in parts]
    groups = _groups(parts)
    segments = []
    for group in groups:
        phys, last = parts[group[0]].phys, parts[group[-1]]
        end = phys
        for i in reversed(group):
            end = _end_of_data(parts[i], runs[i], page_size)
            if end > parts[i].phys:
                break
        segments.append(Segment(phys, last.phys + last.nbytes - phys, max(end - phys, 0)))
    if path.exists() and not path.is_file():
        raise SourceError(f"{path}: not a file")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with unfinished.open("wb") as file:
                offsets = _write_headers(file, segments, _machine(machine))
                written = 0
                for segment, offset, group in zip(segments, offsets, groups, strict=True):
                    for i in group:
                        most = segment.phys + segment.filesz
                        for start, size in runs[i]:
                            place = offset + start - segment.phys
                            written = _copy(
                                file, parts[i].memory, start, min(size, most - start), place, written, progress
                            )
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: {error.strerror or error}") from error
    return segments


def _groups(parts: list[Part]) -> list[list[int]]:
    """Group the parts that adjoin: a segment each."""
    groups: list[list[int]] = []
    end = -1
    for i, part in enumerate(parts):
        if part.phys < end:
            raise ParameterError(f"ELF core: the run at {part.phys:#x} overlaps the one before it")
        if part.phys == end:
            groups[-1].append(i)
        else:
            groups.append([i])
        end = part.phys + part.nbytes
    return groups


def _machine(name: str) -> int:
    if name in MACHINES:
        return MACHINES[name]
    word, _, number = name.partition(" ")
    if word != "machine" or not number.isdecimal() or int(number) > 0xFFFF:
        raise ParameterError(f"machine {name!r}: x86_64, aarch64 or 'machine N'")
    return int(number)


def _write_headers(file: BinaryIO, segments: list[Segment], machine: int) -> list[int]:
    """Write header and program headers; where each segment goes. The file has its full size then."""
    many = len(segments) >= PN_XNUM
    shoff = EHDR.size + PHDR.size * len(segments) if many else 0
    phnum, shentsize, shnum = (PN_XNUM, SHDR.size, 1) if many else (len(segments), 0, 0)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    # ET_CORE, EV_CURRENT
    file.write(
        EHDR.pack(ident, 4, machine, 1, 0, EHDR.size, shoff, 0, EHDR.size, PHDR.size, phnum, shentsize, shnum, 0)
    )
    end = EHDR.size + PHDR.size * len(segments) + SHDR.size * shnum
    offsets = []
    for segment in segments:
        at = -(-end // ALIGN) * ALIGN
        offsets.append(at)
        # PT_LOAD, readable, writable, executable
        file.write(PHDR.pack(1, 7, at, 0, segment.phys, segment.filesz, segment.nbytes, 0))
        end = at + segment.filesz
    if many:
        file.write(SHDR.pack(0, 0, 0, 0, 0, 0, 0, len(segments), 0, 0))
    file.truncate(end)
    return offsets


def _copy(
    file: BinaryIO,
    memory: Readable,
    start: int,
    size: int,
    place: int,
    written: int,
    progress: Callable[[int], object] | None,
) -> int:
    """Copy memory into the file, leaving out pieces that are zeros; how many bytes there have been by now."""
    for at in range(0, size, CHUNK):
        chunk = memory.read(start + at, min(CHUNK, size - at))
        for within in range(0, len(chunk), PIECE):
            piece = chunk[within : within + PIECE]
            if piece != ZEROS[: len(piece)]:
                file.seek(place + at + within)
                file.write(piece)
        written += len(chunk)
        if progress is not None:
            progress(written)
    return written


class Image:
    """A handover as an ELF core: the preserved folios, the pages of the map, the scratch array's page.

    >>> kho.Image(kho.open("ram.bin@0x40000000")).save("handover.elf")
    """

    def __init__(self, inc: _kho.Incoming, *, machine: str | None = None) -> None:
        self._inc = inc
        self.page_size = inc.page_size
        self.machine = machine or inc.machine or ("x86_64" if inc.page_size == 4096 else "aarch64")
        """`e_machine`: "x86_64", "aarch64" or "machine N"; by default the source's, else what has that page size."""
        _machine(self.machine)

    @classmethod
    def of_arena(cls, arena: _kho.Arena, *, machine: str | None = None) -> Image:
        """Give the image of the handover that was finalized in an arena. Raises: NoHandoverError if none was."""
        if arena.fdt_phys is None:
            raise NoHandoverError("nothing was finalized in this arena")
        return cls(_kho.open_memory(arena), machine=machine)

    def parts(self, *, everything: bool = False) -> list[Part]:
        """List the memory that is saved; adjacent parts become one segment.

        Args: everything: all there is, handed over or not.
        """
        inc = self._inc
        if everything:
            return [Part(phys, nbytes, inc) for phys, nbytes in inc.ranges]
        page = self.page_size
        runs = [(pfn * page, n * page) for pfn, n in inc.tracker().extents()]
        pages = [*inc.map_pages, inc.fdt_phys, *(sub.phys for sub in inc.subtrees.values())]
        if inc.scratch_phys is not None:
            pages.append(inc.scratch_phys)
        runs += [(phys // page * page, page) for phys in pages]
        return [Part(phys, nbytes, inc) for phys, nbytes in clipped(merged(runs), inc.ranges)]

    @property
    def segments(self) -> list[tuple[int, int]]:
        """`(phys, nbytes)` of each physical run of what was handed over, as far as the memory has it."""
        return merged((part.phys, part.nbytes) for part in self.parts())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        everything: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> list[Segment]:
        """Write the ELF core; runs of zeros become holes, a segment that ends in pages of zeros is cut short.

        The file appears under its name when it is complete, so that it may be the one that is read.
        Args: everything: save all the memory there is. progress: called with the number of bytes seen so far.
        Returns: the segments.
        Raises: SourceError if the file cannot be written, or the source not be read.
        """
        return _save(self.parts(everything=everything), path, self.machine, progress, self.page_size)
