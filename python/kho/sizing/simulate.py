"""Runs a plan in an arena, measures it, and compares the result with `kho.plan`.

Only the pages of the map are touched in the arena, so simulating terabytes takes as much memory as their map.
"""

from __future__ import annotations

import errno
import os
import resource
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from .. import _kho
from ..errors import OutOfMemoryError, ParameterError, SourceError
from ..handover.outgoing import Outgoing
from ..sizes import format_size
from .plan import LOW, Calibration, Cost, Group, Plan, Zone, measured, plan, released

__all__ = ["Simulation", "calibrate", "placed", "simulate"]

DEFAULT_LAYOUT = released()[-1]
"""What is simulated unless one is named: the newest."""

BATCH = 1 << 16
GIB = 1 << 30
Progress = Callable[[str, int, int], object]
"""Callback: name of the step, number of folios done, total number of folios."""


@dataclass(frozen=True)
class Simulation:
    """A simulated handover and its measured cost."""

    plan: Plan
    cost: Cost
    """The planned cost for this layout and page size."""
    pages: int
    """Number of pages of metadata written."""
    nr_folios: int
    """Number of folios the next owner found, including the root FDT."""
    seconds: dict[str, float]
    """Seconds by step: mark, preserve, serialize, take over, count, restore."""
    peak_rss: int
    """Peak resident memory of this process in bytes."""
    page_faults: int
    kept: str | None = field(default=None)
    """Path of the ELF core that was written, or None."""

    @property
    def nbytes(self) -> int:
        """Bytes of metadata written, in whole pages."""
        return self.pages * self.cost.page_size

    @property
    def as_planned(self) -> bool:
        """Whether the result matches the plan; scattered folios within six standard deviations."""
        page = self.cost.page_size
        off = abs(self.nbytes - self.cost.pages * page)
        allowed = 0.0 if self.cost.exact else 6 * self.cost.deviation + page
        return self.nr_folios == self.plan.nr_folios + 1 and off <= allowed

    def as_dict(self) -> dict[str, Any]:
        """Return the result as a dict for JSON."""
        return {
            "plan": self.plan.as_dict(),
            "pages": self.pages,
            "nbytes": self.nbytes,
            "nr_folios": self.nr_folios,
            "as_planned": self.as_planned,
            "seconds": self.seconds,
            "peak_rss": self.peak_rss,
            "page_faults": self.page_faults,
            "kept": self.kept,
        }


def simulate(
    memory: int | str,
    folios: Sequence[Group | str] = (),
    *,
    preserve: Sequence[str] = (),
    random: bool = False,
    page_size: int = 4096,
    layout: str | None = None,
    kernel: str | None = None,
    calibration: Calibration | None = None,
    scale: float = 1.0,
    restore: bool = False,
    keep: str | os.PathLike[str] | None = None,
    seed: int = 1,
    progress: Progress | None = None,
) -> Simulation:
    """Hand folios over in an arena, take them over, and measure both.

    Args:
        memory, folios, preserve, random, calibration: as in `kho.plan`.
        page_size, layout: the page size and layout to write; default: the newest layout.
        kernel: a release, "7.0.11": write the layout and the root FDT that it writes.
        scale: factor for memory and numbers of folios, above 0 and at most 1.
        restore: also restore every folio, in batches.
        keep: path of a new, sparse ELF core to which the arena is written.
        seed: seed for the placement of scattered folios.
        progress: called with step, folios done and total.

    Raises:
        ParameterError: as `kho.plan`; `scale` out of range.
        OutOfMemoryError: the run needs more memory than this machine has available; the message names the amount and
            a `scale` that fits.
        SourceError: `keep` cannot be written, or the address space is too small.

    """
    whole = plan(
        memory,
        folios,
        preserve=preserve,
        random=random,
        page_sizes=[page_size],
        layouts=[layout] if layout is not None else [DEFAULT_LAYOUT] if kernel is None else None,
        kernel=kernel,
        calibration=calibration,
    )
    if not 0 < scale <= 1:
        raise ParameterError(f"scale: {scale} must be above 0 and at most 1")
    made = whole if scale == 1 else _scaled(whole, scale)
    if not made.costs:
        raise ParameterError("; ".join(f"{row}: {why}" for row, why in made.left_out.items()))
    _check_memory(made, restore=restore, available=_available())
    return _run(made, restore=restore, keep=keep, seed=seed, progress=progress, kernel=kernel)


def _scaled(whole: Plan, scale: float) -> Plan:
    """Return the plan for `scale` times the memory and the folios of each group."""
    memory = max(2 * LOW, int(whole.memory * scale) // LOW * LOW)
    groups = [Group(int(zone.count * scale), zone.size, zone.random) for zone in whole.zones]
    groups = [group for group in groups if group.count]
    if not groups and whole.zones:
        raise ParameterError(f"scale: {scale} leaves no folios")
    names = [cost.layout.name for cost in whole.costs] or [row.split(",")[0] for row in whole.left_out]
    pages = list(whole.scratch.sizes)
    return plan(memory, groups, layouts=names, page_sizes=pages, calibration=whole.calibration)


def _needed(made: Plan, *, restore: bool) -> int:
    """Return an upper bound of the run's memory: map, marked and taken-over folios, 64 bytes per run of folios."""
    cost = made.costs[0]
    extents = sum(zone.extents for zone in made.zones)
    listed = 16 * made.nr_folios + 2 * cost.bitmap_bytes if restore else 0
    return int(4 * (cost.nbytes + cost.directory_bytes) + 64 * extents) + listed + (64 << 20)


def _available() -> int:
    """Return the available memory in bytes (MemAvailable)."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_memory(made: Plan, *, restore: bool, available: int) -> None:
    needed = _needed(made, restore=restore)
    if needed > available:
        fits = max(available - (64 << 20), 0) / needed * 0.9
        raise OutOfMemoryError(
            f"simulate: {made.nr_folios} folios need about {format_size(needed)}, {format_size(available)} are "
            f"available; a scale of {fits:.2g} would fit"
        )


def placed(zone: Zone, page_size: int, seed: int, *, bitmap_bytes: int | None = None) -> _kho.Tracker:
    """Return the folios of a zone; scattered ones are placed at random from a seed."""
    order = (zone.size // page_size).bit_length() - 1
    first, step = zone.start // page_size, 1 << order
    folios = _kho.Tracker(page_size, bitmap_bytes)
    if not zone.random:
        folios.preserve_run(first, order, zone.slots)
        return folios
    # If more than half the slots are taken, it is faster to choose the empty ones.
    drawn = min(zone.count, zone.slots - zone.count)
    draw, left = Random(seed).random, drawn
    while left:
        batch = [first + int(draw() * zone.slots) * step for _ in range(min(left, BATCH))]
        left -= folios.preserve_many(array("Q", batch), order)
    if drawn == zone.count:
        return folios
    rest = _kho.Tracker(page_size, bitmap_bytes)
    rest.preserve_run(first, order, zone.slots)
    rest -= folios
    return rest


def _alloc(arena: _kho.Arena, zone: Zone) -> int:
    """Allocate all pages of a zone, in blocks as large as possible; return the number of pages."""
    at, end = zone.start, zone.start + zone.slots * zone.size
    while at < end:
        block = min(at & -at, 1 << (end - at).bit_length() - 1)
        arena.alloc_at(at, (block // arena.page_size).bit_length() - 1)
        at += block
    return (end - zone.start) // arena.page_size


class _Clock:
    """Accumulates seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def start(self) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def stop(self, what: str) -> None:
        """Add the elapsed time to `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._began
        self._began = now


def _run(
    made: Plan,
    *,
    restore: bool,
    keep: str | os.PathLike[str] | None,
    seed: int,
    progress: Progress | None,
    kernel: str | None = None,
) -> Simulation:
    with _output_file(keep) as save:
        return _run_in(made, restore=restore, keep=keep, seed=seed, progress=progress, kernel=kernel, save=save)


@contextmanager
def _output_file(keep: str | os.PathLike[str] | None) -> Iterator[Callable[[_kho.Arena], None]]:
    """Context manager: create the file for `keep`; it is removed if the run fails.

    The arena is in a memfd and is copied without its holes. In a file, allocating a folio would reserve its bytes on
    disk, although a simulation touches none of them.
    """
    if keep is None:
        yield lambda arena: None
        return
    path = Path(keep)
    try:
        file = path.open("xb", buffering=0)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error
    try:
        with file:
            yield lambda arena: _copy_data(arena.fileno(), file.fileno(), path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _copy_data(source: int, target: int, path: Path) -> None:
    """Copy a file's data but not its holes. Raises: SourceError."""
    size = os.fstat(source).st_size
    at = 0
    try:
        os.ftruncate(target, size)
        while at < size:
            try:
                at = os.lseek(source, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(source, at, os.SEEK_HOLE)
            while at < end:
                piece = os.pread(source, min(end - at, 1 << 20), at)
                at += os.pwrite(target, piece, at)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error


def _run_in(
    made: Plan,
    *,
    restore: bool,
    keep: str | os.PathLike[str] | None,
    seed: int,
    progress: Progress | None,
    kernel: str | None,
    save: Callable[[_kho.Arena], None],
) -> Simulation:
    cost, clock = made.costs[0], _Clock()
    layout, page = cost.layout, cost.page_size
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # The map lies after the planned memory, so that folios can have any address in that memory.
    room = -(-int(2 * cost.nbytes + (16 << 20)) // GIB) * GIB
    top = -(-made.memory // GIB) * GIB
    regions = [(0, made.memory), (top, room)]
    arena = _kho.Arena(regions, page_size=page, backing=None if keep is None else "memfd")
    taken = sum(_alloc(arena, zone) for zone in made.zones)
    out = Outgoing(arena, layout.abi, kernel=kernel, bitmap_bytes=layout.bitmap_bytes, fdt_phys=page)
    done = 0
    for number, zone in enumerate(made.zones):
        clock.start()
        if zone.random:
            folios = placed(zone, page, seed + number, bitmap_bytes=layout.bitmap_bytes)
            clock.stop("mark")
            done += out.preserve_all(folios)
        else:
            done += out.preserve_run(zone.start, (zone.size // page).bit_length() - 1, zone.slots)
        clock.stop("preserve")
        if progress is not None:
            progress("preserve", done, made.nr_folios)
    clock.start()
    out.finalize()
    clock.stop("serialize")
    pages = arena.allocated_pages - taken
    inc = _kho.Incoming(arena)
    clock.stop("take over")
    nr_folios = sum(inc.folios_by_order.values())
    clock.stop("count")
    if restore:
        _restore(inc, clock, progress)
    save(arena)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Simulation(
        plan=made,
        cost=cost,
        pages=pages,
        nr_folios=nr_folios,
        seconds=clock.seconds,
        peak_rss=usage.ru_maxrss * 1024,
        page_faults=usage.ru_minflt - faults,
        kept=None if keep is None else os.fspath(keep),
    )


def _restore(inc: _kho.Incoming, clock: _Clock, progress: Progress | None) -> None:
    folios = inc.folios
    for at in range(0, len(folios), BATCH):
        batch = array("Q", [folio.phys for folio in folios[at : at + BATCH]])
        clock.start()
        inc.restore_many(batch)
        clock.stop("restore")
        if progress is not None:
            progress("restore", at + len(batch), len(folios))


def calibrate(seed: int = 1) -> Calibration:
    """Measure this machine in about 1 s, with an empty map, full bitmaps and scattered pages."""
    serialize: dict[str, tuple[float, float]] = {}
    take_over: dict[str, tuple[float, float, float]] = {}
    for name in measured():
        # Small times need several runs because of noise; large runs must not find their memory in the cache.
        tries = [_measured(name, Group(1, 4096), seed) for _ in range(3)]
        empty = min(tries, key=lambda run: run.seconds["take over"])
        full = _measured(name, Group(1 << 24, 4096), seed)
        spread = _measured(name, Group(1 << 17, 4096, random=True), seed)
        begin, start = empty.seconds["serialize"], empty.seconds["take over"]
        per_kib = max(0.0, full.seconds["take over"] - start) / (full.cost.bitmap_bytes / 1024)
        rest = spread.seconds["take over"] - start - per_kib * spread.cost.bitmap_bytes / 1024
        extents = sum(zone.extents for zone in spread.plan.zones)
        # Serializing a tree writes nothing: the tree is kept up to date.
        writing = 0.0 if spread.cost.layout.tree else max(0.0, spread.seconds["serialize"] - begin)
        serialize[name] = (begin, writing / spread.cost.bitmaps)
        take_over[name] = (start, per_kib, max(0.0, rest) / extents)
    return Calibration(serialize, take_over)


def _measured(name: str, group: Group, seed: int) -> Simulation:
    made = plan(128 * GIB, [group], layouts=[name])
    return _run(made, restore=False, keep=None, seed=seed, progress=None)
