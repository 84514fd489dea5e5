"""A plan carried out in an arena: what was written, how long it took, and whether it is what `kho.plan` said.

The arena's memory is never touched but for the map itself, so that terabytes cost what their map costs.
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
from .plan import LOW, Calibration, Cost, Group, Plan, Zone, measured, plan, released

__all__ = ["Simulation", "calibrate", "placed", "simulate"]

DEFAULT_LAYOUT = released()[-1]
"""What is simulated unless one is named: the newest."""

BATCH = 1 << 16
GIB = 1 << 30
Progress = Callable[[str, int, int], object]
"""Called with what is being done, how many folios of it are done, and of how many."""


@dataclass(frozen=True)
class Simulation:
    """A handover that was done, with what it took."""

    plan: Plan
    cost: Cost
    """What was planned for this layout and page size."""
    pages: int
    """Pages of metadata that were written."""
    nr_folios: int
    """Folios the next owner found, the root FDT among them."""
    seconds: dict[str, float]
    """mark, preserve, serialize, take over, count, restore: those that were done."""
    peak_rss: int
    """Most memory this process ever had, in bytes."""
    page_faults: int
    kept: str | None = field(default=None)
    """The ELF core that was written."""

    @property
    def nbytes(self) -> int:
        """Bytes of metadata that were written, whole pages."""
        return self.pages * self.cost.page_size

    @property
    def as_planned(self) -> bool:
        """Whether it is what was planned: to the page, or within six standard deviations where chance decides."""
        page = self.cost.page_size
        off = abs(self.nbytes - self.cost.pages * page)
        allowed = 0.0 if self.cost.exact else 6 * self.cost.deviation + page
        return self.nr_folios == self.plan.nr_folios + 1 and off <= allowed

    def as_dict(self) -> dict[str, Any]:
        """Give it as data for JSON."""
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
    layout: str = DEFAULT_LAYOUT,
    calibration: Calibration | None = None,
    scale: float = 1.0,
    restore: bool = False,
    keep: str | os.PathLike[str] | None = None,
    seed: int = 1,
    progress: Progress | None = None,
) -> Simulation:
    """Hand folios over in an arena and take them over, measuring.

    Args:
        memory, folios, preserve, random, calibration: as `kho.plan`.
        page_size, layout: the one to write.
        scale: multiplies memory and numbers of folios.
        restore: also restore every folio, a batch a call.
        keep: have the arena in a new file there, sparse, an ELF core.
        seed: how folios are scattered.
        progress: told what is being done.

    Raises:
        ParameterError: as `kho.plan`; `scale` not between 0 and 1.
        OutOfMemoryError: the run needs more memory than this machine has left; the message says how much, and which
            `scale` fits.
        SourceError: `keep` cannot be written, or the address space is too small.

    """
    whole = plan(
        memory,
        folios,
        preserve=preserve,
        random=random,
        page_sizes=[page_size],
        layouts=[layout],
        calibration=calibration,
    )
    if not 0 < scale <= 1:
        raise ParameterError(f"scale: {scale} is not above 0 and at most 1")
    made = whole if scale == 1 else _scaled(whole, scale)
    if not made.costs:
        raise ParameterError("; ".join(f"{row}: {why}" for row, why in made.left_out.items()))
    _check_memory(made, restore=restore, available=_available())
    return _run(made, restore=restore, keep=keep, seed=seed, progress=progress)


def _scaled(whole: Plan, scale: float) -> Plan:
    """Plan less of the same: memory, and of each group as large a part."""
    memory = max(2 * LOW, int(whole.memory * scale) // LOW * LOW)
    groups = [Group(int(zone.count * scale), zone.size, zone.random) for zone in whole.zones]
    groups = [group for group in groups if group.count]
    if not groups and whole.zones:
        raise ParameterError(f"scale: {scale} of these folios are none")
    names = [cost.layout.name for cost in whole.costs] or [row.split(",")[0] for row in whole.left_out]
    pages = list(whole.scratch.sizes)
    return plan(memory, groups, layouts=names, page_sizes=pages, calibration=whole.calibration)


def _needed(made: Plan, *, restore: bool) -> int:
    """Bound the memory a run takes: the map, what is marked, what is taken over, and 64 bytes a run of folios."""
    cost = made.costs[0]
    extents = sum(zone.extents for zone in made.zones)
    listed = 16 * made.nr_folios + 2 * cost.bitmap_bytes if restore else 0
    return int(4 * (cost.nbytes + cost.directory_bytes) + 64 * extents) + listed + (64 << 20)


def _available() -> int:
    """Bytes this machine can still give, as the kernel estimates it."""
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
            f"simulate: {made.nr_folios} folios need about {needed >> 20} MiB, and {available >> 20} MiB are there; "
            f"a scale of {fits:.2g} would fit"
        )


def placed(zone: Zone, page_size: int, seed: int, *, bitmap_bytes: int | None = None) -> _kho.Tracker:
    """Give the folios of a zone; scattered ones are drawn from a seed."""
    order = (zone.size // page_size).bit_length() - 1
    first, step = zone.start // page_size, 1 << order
    folios = _kho.Tracker(page_size, bitmap_bytes)
    if not zone.random:
        folios.preserve_run(first, order, zone.slots)
        return folios
    # Of more than half the slots it is quicker to draw those that stay empty.
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
    """Allocate all of a zone, whoever owns what is not handed over, in blocks as large as fit; how many pages."""
    at, end = zone.start, zone.start + zone.slots * zone.size
    while at < end:
        block = min(at & -at, 1 << (end - at).bit_length() - 1)
        arena.alloc_at(at, (block // arena.page_size).bit_length() - 1)
        at += block
    return (end - zone.start) // arena.page_size


class _Clock:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def start(self) -> None:
        """Begin to count."""
        self._began = time.perf_counter()

    def stop(self, what: str) -> None:
        """Add what has passed."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._began
        self._began = now


def _run(
    made: Plan, *, restore: bool, keep: str | os.PathLike[str] | None, seed: int, progress: Progress | None
) -> Simulation:
    with _kept(keep) as save:
        return _run_in(made, restore=restore, keep=keep, seed=seed, progress=progress, save=save)


@contextmanager
def _kept(keep: str | os.PathLike[str] | None) -> Iterator[Callable[[_kho.Arena], None]]:
    """Make the file of an arena that is kept; it is removed if the run fails.

    The arena lies in a memfd and is copied without its holes: in a file of its own each folio would take its bytes on
    the disk, and a simulation touches none of them.
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
    """Copy a file's data, and leave its holes. Raises: SourceError."""
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
    save: Callable[[_kho.Arena], None],
) -> Simulation:
    cost, clock = made.costs[0], _Clock()
    layout, page = cost.layout, cost.page_size
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # The map lies behind the memory that is planned, so that folios may be anywhere in that.
    room = -(-int(2 * cost.nbytes + (16 << 20)) // GIB) * GIB
    top = -(-made.memory // GIB) * GIB
    regions = [(0, made.memory), (top, room)]
    arena = _kho.Arena(regions, page_size=page, backing=None if keep is None else "memfd")
    taken = sum(_alloc(arena, zone) for zone in made.zones)
    out = Outgoing(arena, layout.abi, bitmap_bytes=layout.bitmap_bytes, fdt_phys=page)
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
    """Measure this machine with runs of the engine, a second in all: an empty map, full bitmaps, scattered pages."""
    serialize: dict[str, tuple[float, float]] = {}
    take_over: dict[str, tuple[float, float, float]] = {}
    for name in measured():
        # What is small would be lost in the noise of one run; what is large must not find its memory in the cache.
        tries = [_measured(name, Group(1, 4096), seed) for _ in range(3)]
        empty = min(tries, key=lambda run: run.seconds["take over"])
        full = _measured(name, Group(1 << 24, 4096), seed)
        spread = _measured(name, Group(1 << 17, 4096, random=True), seed)
        begin, start = empty.seconds["serialize"], empty.seconds["take over"]
        per_kib = max(0.0, full.seconds["take over"] - start) / (full.cost.bitmap_bytes / 1024)
        rest = spread.seconds["take over"] - start - per_kib * spread.cost.bitmap_bytes / 1024
        extents = sum(zone.extents for zone in spread.plan.zones)
        writing = 0.0 if spread.cost.layout.tree else max(0.0, spread.seconds["serialize"] - begin)  # a tree is there
        serialize[name] = (begin, writing / spread.cost.bitmaps)
        take_over[name] = (start, per_kib, max(0.0, rest) / extents)
    return Calibration(serialize, take_over)


def _measured(name: str, group: Group, seed: int) -> Simulation:
    made = plan(128 * GIB, [group], layouts=[name])
    return _run(made, restore=False, keep=None, seed=seed, progress=None)
