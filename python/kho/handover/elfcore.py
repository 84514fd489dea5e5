"""Writes handovers as ELF cores: one PT_LOAD per physical run, with its address in p_paddr; zeros become holes.

`kho.open`, crash, gdb and readelf read such cores; the captures of kernels for the tests are in this format. Contents
are streamed, at most 1 MiB at a time. Memory that the source does not have, because its filter left it out or its end
is cut off, is in no segment: a note of the owner `kho` lists it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from .. import _kho
from ..errors import NoHandoverError, OutsideMemoryError, ParameterError, SourceError
from .absence import require_map

__all__ = ["Image", "Part", "Segment", "save_elf"]

MACHINES = {"x86_64": 62, "aarch64": 183}
"""e_machine."""
EHDR = struct.Struct("<16sHHIQQQI6H")
PHDR = struct.Struct("<IIQQQQQQ")
SHDR = struct.Struct("<IIQQQQIIQQ")
NOTE = struct.Struct("<III4sIi")
"""Header of the note `kho` of type 2, with its version and level; then ABSENT for each run of memory."""
ABSENT = struct.Struct("<QQQ")
WHYS = ("left out", "cut off")
"""Number in the note -> reason, as `Memory.absent` has it."""
PN_XNUM = 0xFFFF
"""PN_XNUM: from this number of program headers on, their count is in section header 0."""
ALIGN = 4096
"""Alignment of segments in the file."""
CHUNK = 1 << 20
PIECE = 1 << 16
"""Granularity of holes in bytes."""
ZEROS = bytes(PIECE)


class Readable(Protocol):
    """Protocol of physical memory: `Memory`, `Arena`, `Incoming`."""

    def read(self, phys: int, n: int, /) -> bytes:
        """Copy `n` bytes from `phys`."""
        ...

    def next_data(self, phys: int, /) -> tuple[int, int] | None:
        """Return `(phys, nbytes)` of the next run that may contain non-zero bytes; None if there is none."""
        ...


class Part(NamedTuple):
    """A run of memory and the source of its bytes."""

    phys: int
    nbytes: int
    memory: Readable


class Segment(NamedTuple):
    """A PT_LOAD: `nbytes` from `phys`; the first `filesz` are in the file, the rest are zeros."""

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

    Args: ranges: `(phys, nbytes)` each, inside the memory. machine: "x86_64", "aarch64" or "machine N".
        progress: called with the number of bytes processed so far.
    Returns: the segments.
    Raises: OutsideMemoryError; ParameterError for ranges that overlap; SourceError if the file cannot be written.
    """
    parts = [Part(phys, nbytes, memory) for phys, nbytes in sorted(ranges) if nbytes]
    there = memory.ranges if not isinstance(memory, _kho.Arena) else [(at, size) for at, size, _ in memory.regions]
    for phys, nbytes, _ in parts:
        if clipped([(phys, nbytes)], merged(there)) != [(phys, nbytes)]:
            raise OutsideMemoryError(f"ELF core: {nbytes:#x} bytes at {phys:#x} are not all in this memory")
    return _save(parts, path, machine, progress)


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort ranges and merge overlapping or adjacent ones."""
    out: list[tuple[int, int]] = []
    for start, size in sorted(ranges):
        if out and start <= sum(out[-1]):
            first = out[-1][0]
            out[-1] = (first, max(sum(out[-1]), start + size) - first)
        elif size:
            out.append((start, size))
    return out


def clipped(ranges: Iterable[tuple[int, int]], to: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the intersection of two lists of ranges; both are sorted and disjoint."""
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
            begin, stop = max(start, first), min(end, first + length)
            out.append((begin, stop - begin))
            next_bound += 1
    return out


def without(ranges: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Subtract ranges from ranges; both are sorted and disjoint."""
    out = []
    for start, size in ranges:
        at, end = start, start + size
        for hole, length in clipped([(start, size)], others):
            if hole > at:
                out.append((at, hole - at))
            at = hole + length
        if at < end:
            out.append((at, end - at))
    return out


def whole_pages(phys: int, nbytes: int, page: int) -> tuple[int, int]:
    """Expand a run to whole pages."""
    first = phys // page * page
    return first, -(-(phys + nbytes) // page) * page - first


def data_runs(part: Part) -> list[tuple[int, int]]:
    """Return `(phys, nbytes)` of the runs of a part that may contain non-zero bytes."""
    runs = []
    at, end = part.phys, part.phys + part.nbytes
    while at < end:
        found = part.memory.next_data(at)
        if found is None or found[0] >= end:
            break
        start, size = found
        stop = min(start + size, end)
        runs.append((start, stop - start))
        at = stop
    return runs


Absent = list[tuple[int, int, str]]
"""Memory that is not in a dump, as `Memory.absent`."""


def absent_in(part: Part) -> Iterator[tuple[int, int, str]]:
    """Yield what of a part is not in the files of its source: (phys, nbytes, why)."""
    memory, at, end = part.memory, part.phys, part.phys + part.nbytes
    if not isinstance(memory, _kho.Memory | _kho.Incoming):
        return
    while at < end and (found := memory.next_absent(at)) is not None and found[0] < end:
        phys, nbytes, why = found
        yield phys, min(nbytes, end - phys), why
        at = phys + nbytes


def present(parts: Iterable[Part]) -> tuple[list[Part], Absent]:
    """Return the parts without what is not in their source, and what that is."""
    there: list[Part] = []
    gone: Absent = []
    for part in parts:
        at = part.phys
        for phys, nbytes, why in absent_in(part):
            if at < phys:
                there.append(Part(at, phys - at, part.memory))
            gone.append((phys, nbytes, why))
            at = phys + nbytes
        if at < part.phys + part.nbytes:
            there.append(Part(at, part.phys + part.nbytes - at, part.memory))
    return there, gone


def _end_of_data(part: Part, runs: list[tuple[int, int]], page_size: int) -> int:
    """Return the end of a part's last page that is not all zeros; the start of the part if there is none."""
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
    """Write sorted parts to a temporary file, then rename it to `path`.

    What is not in their source is in a note: it would read as zeros otherwise.
    """
    path = Path(path)
    levels = (part.memory.dump_level for part in parts if isinstance(part.memory, _kho.Memory | _kho.Incoming))
    level = next((level for level in levels if level is not None), None)
    parts, absent = present(parts)
    note = absence_note(absent, level) if absent else b""
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
                offsets = _write_headers(file, segments, _machine(machine), note)
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
    """Group adjacent parts; each group becomes a segment."""
    groups: list[list[int]] = []
    end = -1
    for i, part in enumerate(parts):
        if part.phys < end:
            raise ParameterError(f"ELF core: the run at {part.phys:#x} overlaps the previous one")
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
        raise ParameterError(f"machine {name!r}: must be x86_64, aarch64 or 'machine N'")
    return int(number)


def absence_note(absent: Absent, level: int | None) -> bytes:
    """Return the note of memory that the machine had and the file has not (rust/kho/src/memory/format/elf.rs)."""
    nbytes = NOTE.size - 16 + ABSENT.size * len(absent)
    head = NOTE.pack(4, nbytes, 2, b"kho\0", 1, -1 if level is None else level)
    return head + b"".join(ABSENT.pack(phys, size, WHYS.index(why)) for phys, size, why in absent)


def _write_headers(file: BinaryIO, segments: list[Segment], machine: int, note: bytes = b"") -> list[int]:
    """Write header, program headers and note, set the file's size, and return the file offset of each segment."""
    headers = len(segments) + bool(note)
    many = headers >= PN_XNUM
    shoff = EHDR.size + PHDR.size * headers if many else 0
    phnum, shentsize, shnum = (PN_XNUM, SHDR.size, 1) if many else (headers, 0, 0)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    # ET_CORE, EV_CURRENT
    file.write(
        EHDR.pack(ident, 4, machine, 1, 0, EHDR.size, shoff, 0, EHDR.size, PHDR.size, phnum, shentsize, shnum, 0)
    )
    end = EHDR.size + PHDR.size * headers + SHDR.size * shnum
    if note:
        # PT_NOTE, readable
        file.write(PHDR.pack(4, 4, end, 0, 0, len(note), len(note), 4))
        end += len(note)
    offsets = []
    for segment in segments:
        at = -(-end // ALIGN) * ALIGN
        offsets.append(at)
        # PT_LOAD, readable, writable, executable
        file.write(PHDR.pack(1, 7, at, 0, segment.phys, segment.filesz, segment.nbytes, 0))
        end = at + segment.filesz
    if many:
        file.write(SHDR.pack(0, 0, 0, 0, 0, 0, 0, headers, 0, 0))
    file.write(note)
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
    """Copy memory into the file, leaving holes for zeros; return the number of bytes processed so far."""
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
    """An ELF core of a handover: preserved folios, pages of the map, page of the scratch array.

    >>> kho.Image(kho.open("ram.bin@0x40000000")).save("handover.elf")
    """

    def __init__(self, inc: _kho.Incoming, *, machine: str | None = None) -> None:
        self._inc = inc
        self.page_size = inc.page_size
        self.machine = machine or inc.machine or ("x86_64" if inc.page_size == 4096 else "aarch64")
        """`e_machine`: "x86_64", "aarch64" or "machine N"; default: the source's, else one with this page size."""
        _machine(self.machine)

    def __repr__(self) -> str:
        return f"<kho.Image of {self._inc!r}, {self.machine}>"

    @classmethod
    def of_arena(cls, arena: _kho.Arena, *, machine: str | None = None) -> Image:
        """Return the image of the handover finalized in an arena. Raises: NoHandoverError if there is none."""
        if arena.fdt_phys is None:
            raise NoHandoverError("no handover is finalized in this arena")
        return cls(_kho.open_memory(arena), machine=machine)

    def parts(self, *, everything: bool = False) -> list[Part]:
        """Return the memory that `save` writes; adjacent parts become one segment.

        Args: everything: include memory that is not handed over.
        """
        inc = self._inc
        if everything:
            return [Part(phys, nbytes, inc) for phys, nbytes in inc.ranges]
        require_map(inc, "a core of all memory (everything=True) can be saved")
        page = self.page_size
        runs = [(pfn * page, n * page) for pfn, n in inc.tracker().extents()]
        pages = [*inc.map_pages, inc.fdt_phys, *(sub.phys for sub in inc.subtrees.values())]
        if inc.scratch_phys is not None:
            pages.append(inc.scratch_phys)
        runs += [(phys // page * page, page) for phys in pages]
        return [Part(phys, nbytes, inc) for phys, nbytes in clipped(merged(runs), inc.ranges)]

    @property
    def segments(self) -> list[tuple[int, int]]:
        """`(phys, nbytes)` of each physical run of the handover that is present in the memory."""
        return merged((part.phys, part.nbytes) for part in self.parts())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        everything: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> list[Segment]:
        """Write the ELF core; zeros become holes, and zeros at a segment's end are not stored.

        The file is renamed to its path when complete, so it can replace its own source.
        Args: everything: save all memory. progress: called with the number of bytes processed so far.
        Returns: the segments.
        Raises: SourceError if the file cannot be written or the source cannot be read.
        """
        return _save(self.parts(everything=everything), path, self.machine, progress, self.page_size)
