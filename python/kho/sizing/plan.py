"""Computes the cost of a handover: exact bytes of metadata, and estimated seconds on this machine.

    groups of folios -> zones of memory -> runs of folio indexes -> bitmaps, and the nodes that point to them

Nothing is preserved, so 16 TiB are planned as fast as 16 MiB. `kho.simulate` runs the plan and compares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from .._kho import Abi, ScratchSpec, abis, parse_kho_scratch
from ..errors import ParameterError
from ..kernels import FIXES, Kernel, Release, known_kernel
from ..sizes import PAGE_SIZES, PAGEBLOCK_ORDERS, SMALL_BITMAP, format_size, parse_size

__all__ = ["LAYOUTS", "LOW", "Calibration", "Cost", "Group", "Layout", "Plan", "Scratch", "Zone", "plan", "size_of"]

LOW = 1 << 20
"""Bytes at the bottom of memory without folios, as on a PC; the root FDT is in page 1."""
MOST = 1 << 48
"""Memory that can be planned: what a machine addresses with tables of four levels."""
ENTRY, CHUNK_HEADER = 16, 16
SLOT, SLACK, FAR = 8, 16, 40
"""Tracker directory: bytes per slot; maximum slots per block; bytes for a block outside the slots."""
FOUR_GIB = 1 << 32


@dataclass(frozen=True)
class Layout:
    """Format of a map (abi.md sections 3 and 4)."""

    name: str
    abi: str
    kernels: str
    """Versions of Linux that write it: "7.2 and 7.3"."""
    bitmap_bytes: int | None = None
    """Bytes of a bitmap if they do not depend on the page size; None for a page."""
    tree: bool = True
    released: bool = True
    """Whether a release of Linux writes it."""

    @classmethod
    def of(cls, abi: Abi) -> list[Layout]:
        """List the layouts of an ABI: one, or one for each bitmap size that its chunk list comes with."""
        if not abi.bitmaps:
            return [cls(abi.compatible, abi.compatible, _linux(abi.kernels), released=abi.released)]
        return [
            cls(
                abi.compatible if nbytes is None else f"{abi.compatible}-{nbytes}",
                abi.compatible,
                _linux(kernels),
                bitmap_bytes=nbytes,
                tree=False,
                released=abi.released,
            )
            for nbytes, kernels in abi.bitmaps
        ]

    def depth(self, page_size: int) -> int:
        """Return the number of levels of the tree, including leaves. Raises: KeyError for a chunk list."""
        return abis()[self.abi].levels[page_size]


def _linux(kernels: str) -> str:
    """Leave out "Linux", which is in the head of the table."""
    return kernels.removeprefix("Linux ")


class _Layouts(Mapping[str, Layout]):
    """The layouts of all ABIs that kho writes, by name, oldest first: made from the table of ABIs each time."""

    def _made(self) -> dict[str, Layout]:
        return {layout.name: layout for abi in abis().values() if abi.decoded for layout in Layout.of(abi)}

    def __getitem__(self, name: str) -> Layout:
        return self._made()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())


LAYOUTS: Mapping[str, Layout] = _Layouts()
"""The layouts that can be planned, by name."""
MEASURED_TREE = "kho-v4"
"""The layout that is measured for all trees: they are written and read by the same code, and kept calibrations have
its name."""


def released() -> list[str]:
    """List the names of the layouts that releases of Linux write."""
    return [name for name, layout in LAYOUTS.items() if layout.released]


def written_by(kernel: Kernel) -> list[str]:
    """List the name of the layout that a kernel writes."""
    small = kernel.bitmap_bytes(PAGE_SIZES[0]) == SMALL_BITMAP
    return [
        name
        for name, layout in LAYOUTS.items()
        if layout.abi == kernel.abi and (layout.bitmap_bytes == SMALL_BITMAP) == small
    ]


def measured() -> list[str]:
    """List the names of the layouts that are measured: every chunk list, and one tree for all of them."""
    return [*(name for name, layout in LAYOUTS.items() if not layout.tree), MEASURED_TREE]


def size_of(text: str | int, what: str = "size") -> int:
    """Read a size in bytes: `parse_size`. Raises: ParameterError."""
    return parse_size(text, what)


@dataclass(frozen=True)
class Group:
    """A number of folios of one size, scattered at random or contiguous."""

    count: int
    size: int
    """Size of a folio in bytes, a power of two."""
    random: bool | None = None
    """None: as the plan's `random`."""

    @classmethod
    def parse(cls, text: str) -> Group:
        """Parse `1000000x4K`, `1000000x4K@random` or `512x1G@contiguous`. Raises: ParameterError."""
        body, _, place = text.partition("@")
        count, _, size = body.partition("x")
        if not re.fullmatch("[0-9]{1,20}", count) or not size or place not in ("", "random", "contiguous"):
            raise ParameterError(f"folios: {text[:40]!r} is not COUNTxSIZE, as 1048576x2M or 1000000x4K@random")
        return cls(int(count), size_of(size, "folios"), {"random": True, "contiguous": False}.get(place))

    @classmethod
    def share(cls, text: str, memory: int) -> Group:
        """Parse a share of memory: `80%:2M` or `80%:2M@random`. Raises: ParameterError."""
        percent, _, rest = text.partition("%:")
        if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?", percent) or not rest:
            raise ParameterError(f"preserve: {text[:40]!r} is not a share and a folio size, as 80%:2M")
        one = cls.parse(f"1x{rest}")
        whole, _, part = percent.partition(".")
        share = memory * int(whole + part) // 10 ** (2 + len(part))
        return replace(one, count=share // one.size if one.size else 0)


@dataclass(frozen=True)
class Zone:
    """The memory of one group; it has the size of the folios, or is larger if they are scattered."""

    start: int
    slots: int
    """Number of possible positions of a folio."""
    count: int
    size: int
    """Size of a folio in bytes."""

    @property
    def random(self) -> bool:
        """Whether the folios are scattered: the slots they occupy are random."""
        return self.count < self.slots

    @property
    def extents(self) -> float:
        """Average number of runs of adjacent folios."""
        return self.count * (self.slots - self.count + 1) / self.slots


class Run(NamedTuple):
    """A run of folio indexes or keys: `taken` of `slots` from `first`. Runs of different spaces share no node."""

    space: int
    first: int
    slots: int
    taken: int


def _empty_probability(slots: int, count: int, part: int) -> float:
    """Probability that `part` of `slots` positions has none of `count`: C(slots - part, count) / C(slots, count)."""
    few, many = sorted((count, part))
    if few + many > slots:
        return 0.0
    if few > 4096:  # if the product is not 0, its factors hardly differ: the middle one stands for all
        middle = slots - (few - 1) / 2
        return math.exp(few * math.log1p(-many / middle)) if many < middle else 0.0
    return math.exp(math.fsum(math.log1p(-many / (slots - i)) if many < slots - i else -math.inf for i in range(few)))


def _occupied_nodes(runs: Iterable[Run], shift: int) -> tuple[float, float]:
    """Return the average number of non-empty nodes of `1 << shift` indexes, and an upper bound of the variance.

    Only a node at the edge of a run can contain indexes of another run.
    """
    edges: dict[tuple[int, int], float] = {}
    mean = variance = 0.0
    for run in runs:
        end = run.first + run.slots
        low, high = run.first >> shift, (end - 1) >> shift
        for node in {low, high}:
            part = min((node + 1) << shift, end) - max(node << shift, run.first)
            edges[run.space, node] = edges.get((run.space, node), 1.0) * _empty_probability(run.slots, run.taken, part)
        if high - low > 1:
            chance = _empty_probability(run.slots, run.taken, 1 << shift)
            mean += (high - low - 1) * (1 - chance)
            variance += (high - low - 1) * chance * (1 - chance)
    mean += math.fsum(1 - chance for chance in edges.values())
    return mean, variance + math.fsum(chance * (1 - chance) for chance in edges.values())


@dataclass(frozen=True)
class Calibration:
    """Speed of this machine in seconds by layout (`measured`), from `kho.sizing.simulate.calibrate`."""

    serialize: dict[str, tuple[float, float]]
    """Seconds of fixed cost, and per bitmap."""
    take_over: dict[str, tuple[float, float, float]]
    """Seconds of fixed cost, per KiB of bitmaps, and per run of adjacent folios."""

    @classmethod
    def from_dict(cls, data: object) -> Calibration:
        """Read the result of `asdict`, alone or under `calibration` in a plan's JSON. Raises: ParameterError."""
        if isinstance(data, dict) and isinstance(data.get("calibration"), dict):
            data = data["calibration"]
        read: dict[str, dict[str, tuple[float, ...]]] = {}
        for name, length in (("serialize", 2), ("take_over", 3)):
            rows = data.get(name) if isinstance(data, dict) else None
            for layout in measured():
                row = rows.get(layout) if isinstance(rows, dict) else None
                fine = isinstance(row, list | tuple) and len(row) == length
                if not fine or not all(type(x) in (int, float) and 0 <= x < 1e6 for x in row or ()):
                    raise ParameterError(f"calibration: {name} of {layout} is not {length} numbers of seconds")
                read.setdefault(name, {})[layout] = tuple(float(x) for x in row or ())
        return cls(**read)  # type: ignore[arg-type]

    @staticmethod
    def key(layout: Layout) -> str:
        """Return the name of the measured layout that represents a layout."""
        return MEASURED_TREE if layout.tree else layout.name


@dataclass(frozen=True)
class Cost:
    """Cost of one layout at one page size."""

    layout: Layout
    page_size: int
    bitmaps: int
    """Number of bitmaps (leaves), a rounded average if folios are scattered."""
    bitmap_bytes: int
    nodes: int
    """Number of chunks, or of inner nodes of the tree."""
    node_bytes: int
    fdt_bytes: int
    """The page of the root FDT."""
    directory_bytes: int
    """Estimate of the memory of kho's tracker in addition to the bitmaps, outside the memory that is handed over."""
    deviation: float
    """Upper bound of the standard deviation of the bytes; 0 if they are exact."""
    serialize_s: float | None = None
    take_over_s: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the figures are exact, that is no folios are scattered."""
        return not self.deviation

    @property
    def nbytes(self) -> int:
        """Bytes of metadata in the memory that is handed over: bitmaps, nodes, root FDT."""
        return self.bitmap_bytes + self.node_bytes + self.fdt_bytes

    @property
    def pages(self) -> int:
        """Number of pages of this metadata; several bitmaps of 512 bytes share a page."""
        return -(-self.bitmap_bytes // self.page_size) + (self.node_bytes + self.fdt_bytes) // self.page_size

    def as_dict(self) -> dict[str, Any]:
        """Return the cost as a dict for JSON."""
        own = {key: value for key, value in asdict(self).items() if key != "layout"}
        named = {"layout": self.layout.name, "abi": self.layout.abi, "kernels": self.layout.kernels}
        return named | own | {"exact": self.exact, "nbytes": self.nbytes, "pages": self.pages}


@dataclass(frozen=True)
class Scratch:
    """Memory that the kernel would reserve as scratch for the next kernel's boot (`kho_scratch=`)."""

    value: str
    reserved: tuple[int, ...] | None
    """Bytes that the kernel reserves at boot: below 4 GiB, then on each node; None if the sizes are given."""
    estimated: bool
    sizes: dict[int, list[int]]
    """Page size -> sizes of the areas: low, global, one per node."""
    aligned: dict[int, int]
    """Page size -> what sizes are rounded up to, in bytes."""
    rounds_all: bool = True
    """Whether explicit low and global sizes are rounded, too, as kernels with the fix `scratch-rounding` do."""

    def unaligned(self, page_size: int) -> list[int]:
        """List the sizes of low and global area that the kernel takes as they are, and are no multiple."""
        return [size for size in self.sizes[page_size][:2] if size % self.aligned[page_size]]


@dataclass(frozen=True)
class Plan:
    """Cost of a handover, with a row per layout and page size."""

    memory: int
    zones: list[Zone]
    costs: list[Cost]
    scratch: Scratch
    left_out: dict[str, str]
    """Impossible rows -> reason."""
    calibration: Calibration | None = field(default=None, repr=False)

    @property
    def nr_folios(self) -> int:
        """Number of folios, without the root FDT."""
        return sum(zone.count for zone in self.zones)

    @property
    def preserved(self) -> int:
        """Total bytes of the folios."""
        return sum(zone.count * zone.size for zone in self.zones)

    def left(self, page_size: int) -> int:
        """Bytes of memory that are neither preserved nor scratch.

        A negative number says that these folios and that scratch do not fit.
        """
        return self.memory - LOW - self.preserved - sum(self.scratch.sizes[page_size])

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dict for JSON."""
        return {
            "memory": self.memory,
            "nr_folios": self.nr_folios,
            "preserved": self.preserved,
            "zones": [asdict(zone) | {"random": zone.random} for zone in self.zones],
            "costs": [cost.as_dict() for cost in self.costs],
            "left_out": self.left_out,
            "scratch": asdict(self.scratch) | {"left": {page: self.left(page) for page in self.scratch.sizes}},
            "calibration": asdict(self.calibration) if self.calibration else None,
        }


def plan(
    memory: int | str,
    folios: Iterable[Group | str] = (),
    *,
    preserve: Iterable[str] = (),
    random: bool = False,
    page_sizes: Sequence[int] = (4096,),
    layouts: Sequence[str] | None = None,
    scratch: str = "200%",
    reserved: Sequence[int] | None = None,
    nodes: int = 1,
    calibration: Calibration | None = None,
    kernel: str | None = None,
) -> Plan:
    """Compute the cost of handing over folios, without preserving them.

    Each group gets a zone of memory, the largest folios at the top. Zones of scattered folios divide the memory that is
    not preserved equally among them; the result is the average over all placements.

    Args:
        memory: bytes, or "2T".
        folios: a `Group` each, or `"1048576x2M"`, `"1000000x4K@random"`.
        preserve: shares of memory, `"80%:2M"`.
        random: scatter groups that do not specify a placement.
        page_sizes: 4096, 16384, 65536. layouts: keys of `LAYOUTS`; default: those that releases of Linux write.
        scratch: a value of `kho_scratch=`; a percentage refers to `reserved`.
        reserved: bytes that the kernel reserves at boot: below 4 GiB, then on each node; default: estimated.
        nodes: NUMA nodes with memory.
        calibration: speed of this machine; without it the plan has no times.
        kernel: a release, "7.0.11": the layout that it writes, and how it reads, rounds and aligns `scratch`; default:
            as the last kernel that is known, with areas aligned to a pageblock.

    Raises:
        ParameterError: folios that do not fit into memory or are smaller than a page; malformed sizes; `layouts` that
            `kernel` does not write.

    """
    total = size_of(memory, "memory")
    if not 2 * LOW <= total <= MOST:
        raise ParameterError(f"memory: {memory} is not between {format_size(2 * LOW)} and {format_size(MOST)}")
    if not 1 <= nodes <= 1024:
        raise ParameterError(f"nodes: {nodes} is not between 1 and 1024")
    for page in page_sizes:
        if page not in PAGE_SIZES:
            raise ParameterError(f"page size: {page} is none of {', '.join(map(str, PAGE_SIZES))}")
    known = dict(LAYOUTS)
    writer = None if kernel is None else (Release.parse(kernel), known_kernel(kernel))
    names = list(layouts) if layouts is not None else released() if writer is None else written_by(writer[1])
    for name in names:
        if name not in known:
            raise ParameterError(f"layout: {name!r} is none of {', '.join(known)}")
        if writer is not None and name not in written_by(writer[1]):
            theirs = ", ".join(written_by(writer[1]))
            raise ParameterError(f"layout {name!r} and kernel {kernel!r}: Linux {writer[1].name} writes {theirs}")
    groups = [Group.parse(group) if isinstance(group, str) else group for group in folios]
    groups += [Group.share(text, total) for text in preserve]
    zones = _zones(total, [replace(g, random=random if g.random is None else g.random) for g in groups])
    costs, left_out = [], {}
    for page in page_sizes:
        for zone in zones:
            if zone.size < page:
                raise ParameterError(f"folios: the size {zone.size} is smaller than the page size {page}")
        for name in names:
            why = _refused(known[name], page, zones)
            if why is None:
                costs.append(_cost(known[name], page, zones, calibration))
            else:
                left_out[f"{name}, pages of {page} bytes"] = why
    preserved = sum(zone.count * zone.size for zone in zones)
    most = max((cost.nbytes for cost in costs), default=0)
    if preserved + most + LOW > total:
        raise ParameterError(f"folios: {preserved} bytes, and {most} of metadata, do not fit {total} bytes of memory")
    found = _scratch(scratch, reserved, total, nodes, page_sizes, writer)
    return Plan(total, zones, costs, found, left_out, calibration)


def _zones(memory: int, groups: Sequence[Group]) -> list[Zone]:
    """Divide memory from the top: larger folios lie above, so each zone begins at a multiple of its folio size."""
    for group in groups:
        if group.size <= 0 or group.size & (group.size - 1):
            raise ParameterError(f"folios: the size {group.size} is not a power of two")
        if group.count <= 0:
            raise ParameterError(f"folios: the count {group.count} of {group.size} bytes must be at least 1")
    wanted = sum(group.count * group.size for group in groups)
    if wanted + LOW > memory:
        raise ParameterError(
            f"folios: {wanted} bytes do not fit {memory} bytes of memory without its first {LOW} bytes"
        )
    share = (memory - LOW - wanted) // max(1, sum(bool(group.random) for group in groups))
    zones, end = [], memory
    for group in sorted(groups, key=lambda group: -group.size):
        end -= end % group.size
        slots = group.count + (share // group.size if group.random else 0)
        slots = min(slots, max(group.count, (end - LOW) // group.size))
        start = end - slots * group.size
        if start < LOW:
            raise ParameterError(
                f"folios: {group.count} of {group.size} bytes do not fit aligned into {memory} bytes of memory"
            )
        zones.append(Zone(start, slots, group.count, group.size))
        end = start
    return zones


def _refused(layout: Layout, page_size: int, zones: Iterable[Zone]) -> str | None:
    """Return why a layout cannot hold these folios: without the key bit of order 0, large folios look like pages."""
    shift = page_size.bit_length() - 1
    if not layout.tree or all(zone.size <= 1 << 30 for zone in zones):
        return None
    depth = layout.depth(page_size)
    if 64 - shift < (depth - 1) * (shift - 3) + shift + 3:
        return None
    deeper = next(
        (abi.compatible for abi in abis().values() if abi.levels.get(page_size, 0) > depth), "a later version"
    )
    return (
        f"a tree of {depth} levels cannot distinguish folios above 1 GiB from single pages; {deeper} has one more level"
    )


def _cost(layout: Layout, page_size: int, zones: Sequence[Zone], calibration: Calibration | None) -> Cost:
    shift = page_size.bit_length() - 1
    each = layout.bitmap_bytes or page_size
    leaf = (8 * each).bit_length() - 1
    fdt = Zone(page_size, 1, 1, page_size)
    by_order: dict[int, list[Run]] = {}
    for zone in (*zones, fdt):
        order = (zone.size >> shift).bit_length() - 1
        by_order.setdefault(order, []).append(Run(order, zone.start // zone.size, zone.slots, zone.count))
    blocks = {order: _occupied_nodes(runs, leaf) for order, runs in by_order.items()}
    bitmaps, deviation = sum(mean for mean, _ in blocks.values()), 0.0
    if layout.tree:
        depth, table = layout.depth(page_size), shift - 3
        mask = (1 << ((depth - 1) * table + leaf)) - 1
        keys = [
            Run(0, (1 << (64 - shift - order) | run.first) & mask, run.slots, run.taken)
            for order, runs in by_order.items()
            for run in runs
        ]
        levels = [_occupied_nodes(keys, leaf + level * table) for level in range(1, depth)]
        nodes = sum(round(mean) for mean, _ in levels)
        deviation = page_size * sum(math.sqrt(variance) for _, variance in levels)
    else:
        entries = (page_size - CHUNK_HEADER) // ENTRY
        nodes = sum(math.ceil(round(mean, 6) / entries) for mean, _ in blocks.values())
        uncertain = [math.sqrt(variance) for _, variance in blocks.values() if variance > 1e-6]
        deviation = page_size * sum(1 + sd / entries for sd in uncertain)
    deviation += each * math.sqrt(sum(variance for _, variance in blocks.values()))
    cost = Cost(
        layout=layout,
        page_size=page_size,
        bitmaps=round(bitmaps),
        bitmap_bytes=round(bitmaps) * each,
        nodes=nodes,
        node_bytes=nodes * page_size,
        fdt_bytes=page_size,
        directory_bytes=sum(_directory(by_order[order], leaf, mean) for order, (mean, _) in blocks.items()),
        deviation=deviation if deviation >= 1 else 0.0,
    )
    if calibration is None:
        return cost
    key = Calibration.key(layout)
    begin, per_bitmap = calibration.serialize[key]
    start, per_kib, per_run = calibration.take_over[key]
    extents = 1 + sum(zone.extents for zone in zones)
    return replace(
        cost,
        serialize_s=begin + per_bitmap * bitmaps,
        take_over_s=start + per_kib * cost.bitmap_bytes / 1024 + per_run * extents,
    )


def _directory(runs: Sequence[Run], leaf: int, blocks: float) -> int:
    """Estimate the bytes of an order's directory: slots from block 0 to the last, or an entry for each distant block.

    Pages of a large table take memory only if they contain slots in use.
    """
    low = min(run.first for run in runs) >> leaf
    high = max(run.first + run.slots - 1 for run in runs) >> leaf
    if high >= SLACK * max(blocks, 1):
        return round(FAR * blocks)
    slots = (high // 16 + 1) * 16 + 1
    pages = min(high * SLOT // 4096 - low * SLOT // 4096 + 1, math.ceil(blocks))
    return SLOT * slots if SLOT * slots < 128 << 10 else 4096 * pages


def _scratch(
    value: str,
    reserved: Sequence[int] | None,
    memory: int,
    nodes: int,
    page_sizes: Iterable[int],
    writer: tuple[Release, Kernel] | None,
) -> Scratch:
    """Compute the scratch areas; an estimate for a percentage, as the kernel's reservations are unknown.

    If it is not known whether a release rounds the low and the global size, it is taken not to.
    """
    release, kernel = writer or (None, None)
    spec: ScratchSpec = parse_kho_scratch(value) if kernel is None else kernel.parse_scratch(value)
    rounds_all = release is None or FIXES["scratch-rounding"].affects(release) is False
    if reserved is not None and len(reserved) != nodes + 1:
        raise ParameterError(f"reserved: {len(reserved)} sizes, but {nodes + 1} are needed: below 4 GiB, then per node")
    estimated = spec.percent is not None and reserved is None
    sizes, aligned, given = {}, {}, tuple(reserved or ())
    for page in page_sizes:
        given = given if not estimated else _reserved(memory, nodes, page)
        low, *rest = given or [0] * (nodes + 1)
        aligned[page] = page << PAGEBLOCK_ORDERS[page] if kernel is None else kernel.scratch_block(page)
        sizes[page] = spec.sizes(low, sum(rest), rest, align=aligned[page], rounds_all=rounds_all)
    return Scratch(value, given if spec.percent is not None else None, estimated, sizes, aligned, rounds_all)


def _reserved(memory: int, nodes: int, page_size: int) -> tuple[int, ...]:
    """Estimate what a kernel reserves at boot: 64 bytes per page for `struct page`, and 16 MiB for itself.

    A guest of 2 GiB with Linux 7.3 reserved 50 MiB; this estimate is 48. With more than 4 GiB, `struct page` is
    allocated high, and low memory contains the kernel and 64 MiB of bounce buffers.
    """
    everything = memory // page_size * 64 + (16 << 20)
    low = everything if memory <= FOUR_GIB else min(everything, 80 << 20)
    return (low, *[everything // nodes] * nodes)
