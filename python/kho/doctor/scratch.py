"""How much memory KHO holds, and how that is known.

Scratch is memory of CMA pageblocks outside CmaTotal. What shows it, best first:

- debugfs out/scratch_len: the areas themselves, exact; root only.
- /proc/pagetypeinfo: pageblocks of type CMA, less CmaTotal. Exact to a pageblock whatever is in the memory; root only.
- /proc/zoneinfo `cma`, less CmaTotal: pages that were given to CMA one pageblock at a time, as a cold boot does
  (init_cma_reserved_pageblock). For everyone. A kernel that was handed its scratch, or whose reservation failed, frees
  it another way and does not count it here.
- CmaFree less CmaTotal in /proc/meminfo: a lower bound. Movable pages in scratch or in anybody's CMA area lower it, and
  after a handover what the kernel allocated while booting lies in scratch too.
- The sizes of `kho_scratch=`, rounded as the kernel rounds them, on a cold boot that did not fail: exact if pageblocks
  come to the same, or if the kernel's log says that it read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from .._kho import ScratchSpec, kho_is_enabled, parse_kho_scratch
from ..errors import KhoError, ParameterError
from .facts import Facts
from .kernellog import Evidence


@dataclass(frozen=True)
class Area:
    """An area of scratch: bytes at a physical address."""

    kind: str
    """As the kernel orders them: "low", "global", "node"."""
    phys: int | None
    bytes: int
    node: int | None


@dataclass
class Figures:
    """Bytes of CMA memory outside CmaTotal, by each way there is to know; None where it is not known."""

    areas: list[Area] = field(default_factory=list)
    exact: int | None = None
    blocks: int | None = None
    zones: int | None = None
    free: int | None = None
    sizes: list[int] = field(default_factory=list)
    """Of the areas that `kho_scratch=` comes to, rounded; none for a percentage."""
    evidence: list[Evidence] = field(default_factory=list)
    block_bytes: int = 0
    others: int = 0
    """CmaTotal."""
    doubts: list[str] = field(default_factory=list)
    """Why what is inferred may be something else."""
    by_node: dict[int, int] = field(default_factory=dict)

    @property
    def asked(self) -> int | None:
        """Give what `kho_scratch=LOW,GLOBAL,PERNODE` comes to; None if it is not given, or rejected."""
        return sum(self.sizes) if self.sizes else None

    @property
    def counted(self) -> int | None:
        """Give what pageblocks come to; None if nobody counts them."""
        return self.blocks if self.blocks is not None else self.zones or None

    @property
    def best(self) -> int | None:
        """Give the best figure: exact, else inferred. CmaFree drifts by some pages per CPU: blocks outweigh it."""
        if self.exact is not None:
            return self.exact
        if self.blocks is not None:
            return self.blocks
        known = [figure for figure in (self.zones, self.free) if figure is not None]
        return max(known, default=None)

    @property
    def how(self) -> str:
        """Say what kind of figure the best one is."""
        if self.exact is not None:
            return "exact"
        if self.blocks is not None or self.zones:
            return "inferred"
        return "at least"


def enablement(facts: Facts, default: bool | None) -> bool | None:
    """Say whether the boot enabled KHO; None if no command line is known, or it leaves it to an unknown default."""
    if facts.cmdline is None:
        return None
    on, off = kho_is_enabled(facts.cmdline.text, True), kho_is_enabled(facts.cmdline.text, False)
    return on if on == off else default


def excess(found: Figures) -> int:
    """Give what is surely in CMA outside CmaTotal; beside other CMA areas, some pages are a drift between counters."""
    best = found.best or 0
    drift = 0 if found.exact is not None or found.counted or not found.others else found.block_bytes // 2
    return best if best >= drift else 0


def words(cmdline: str) -> Iterator[str]:
    """Split a command line as the kernel does, quotes taken off, up to the -- after which init's begin."""
    for match in re.finditer(r'(?:"[^"]*"|[^\s"])+', cmdline):
        word = match[0].replace('"', "")
        if word == "--":
            return
        name, equals, value = word.partition("=")
        yield name.replace("-", "_") + equals + value


def scratch_values(cmdline: str) -> list[str | None]:
    """Give the values of each `kho_scratch=` there is; None for one that has none."""
    found = (word.partition("=") for word in words(cmdline))
    return [value if equals else None for name, equals, value in found if name == "kho_scratch"]


def judged(facts: Facts) -> tuple[str | None, ScratchSpec | None, list[tuple[str, str]]]:
    """Read `kho_scratch=` as the kernel does, which takes the last value it can read.

    Returns: that value and what it says, both None if there is none; and each that is rejected, with the reason.
    Older kernels let anything follow the third size; the log shows that it was taken.
    """
    taken: tuple[str | None, ScratchSpec | None] = None, None
    rejected = []
    for value in scratch_values(facts.cmdline.text) if facts.cmdline is not None else []:
        try:
            if value is None:
                raise ParameterError("kho_scratch: without a value")
            taken = value, parse_kho_scratch(value)
        except ParameterError as error:
            rejected.append((value or "", str(error)))
    if taken[1] is None and rejected and facts.log is not None and facts.log.asked_sizes is not None:
        with suppress(ParameterError):
            taken = rejected[-1][0], parse_kho_scratch(rejected[-1][0], trailing_garbage=True)
    return *taken, rejected


def alignment(release: str | None, page_size: int, block_bytes: int) -> int:
    """Give what sizes are rounded up to: a pageblock; from Linux 7.2 on the buddy allocator's largest block."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release or "")
    recent = match is not None and (int(match[1]), int(match[2])) >= (7, 2)
    return max(block_bytes, page_size << 10) if recent and page_size == 4096 else block_bytes


def rounded(spec: ScratchSpec | None, nodes: int, align: int) -> list[int]:
    """Give the sizes of the areas that explicit sizes come to; none for a percentage or more than 64 bits."""
    if spec is None or spec.low is None:
        return []
    try:
        return spec.sizes(0, 0, [0] * max(nodes, 1), align)
    except KhoError:
        return []


def figures(facts: Facts) -> Figures:
    """Work out every figure that the facts allow."""
    found = Figures(block_bytes=facts.block_bytes)
    others = found.others = facts.cma_total.bytes if facts.cma_total is not None else 0
    nodes = list(facts.nodes)
    if facts.debugfs is not None and facts.debugfs.lens:
        _areas(found, facts, nodes)
    if facts.blocks:
        counts: dict[int, int] = {}
        for row in facts.blocks:
            counts[row.node] = counts.get(row.node, 0) + row.cma * facts.block_bytes
            if row.cma:
                found.evidence.append(row.seen)
        found.blocks = max(sum(counts.values()) - others, 0)
        _share(found, counts, others, facts)
    zones = [zone for zone in facts.zones if zone.cma is not None]
    if zones:
        counts = {}
        for zone in zones:
            counts[zone.node] = counts.get(zone.node, 0) + (zone.cma or 0) * facts.page_size
            if zone.cma:
                found.evidence.append(zone.seen)
        found.zones = max(sum(counts.values()) - others, 0)
        if not found.by_node and found.zones:
            _share(found, counts, others, facts)
    if facts.cma_free is not None:
        found.free = max(facts.cma_free.bytes - others, 0)
        found.evidence += [facts.cma_free.seen, *([facts.cma_total.seen] if facts.cma_total is not None else [])]
    if zones and not found.zones:
        _uncounted(found, facts)
    default = facts.config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
    if facts.cma_total is None and found.exact is None:
        if not enablement(facts, default.text.endswith("=y") if default is not None else None):
            # All of it may be areas of others, and nothing says that KHO is on: then it is no sign of scratch.
            found.blocks = found.zones = found.free = None
            found.by_node = {}
            if facts.blocks and not any(row.cma for row in facts.blocks):
                found.blocks = 0
            if zones and not any(zone.cma for zone in zones):
                found.zones = 0
        found.doubts.append("CmaTotal is not known: areas of others may be in it")
    spec = judged(facts)[1]
    align = alignment(facts.release.text if facts.release is not None else None, facts.page_size, facts.block_bytes)
    ways = [rounded(spec, len(nodes), each) for each in (align, facts.block_bytes, facts.block_bytes << 1)]
    found.sizes = next((sizes for sizes in ways if sizes and sum(sizes) == found.counted), ways[0])
    return found


def areas_of(sizes: list[int], nodes: list[int]) -> list[Area]:
    """Name the areas of sizes: low memory, global, one per node; where they lie is not known."""
    kinds = ["low", "global", *["node"] * (len(sizes) - 2)]
    only = nodes[0] if len(nodes) == 1 else None
    places = [only, only, *(nodes if len(nodes) == len(sizes) - 2 else [only] * (len(sizes) - 2))]
    return [Area(kind, None, size, node) for kind, size, node in zip(kinds, sizes, places, strict=True)]


def _uncounted(found: Figures, facts: Facts) -> None:
    """Find what zoneinfo shows as free and does not count as CMA: by node, and in all if meminfo does not say."""
    free: dict[int, int] = {}
    for zone in facts.zones:
        free[zone.node] = free.get(zone.node, 0) + (zone.free_cma - (zone.cma or 0)) * facts.page_size
    left = {node: nbytes for node, nbytes in sorted(free.items()) if nbytes > 0}
    if found.free is None:
        found.free = sum(left.values())
        found.evidence += [
            zone.seen._replace(text=f"{zone.seen.text}, nr_free_cma {zone.free_cma}")
            for zone in facts.zones
            if zone.free_cma > (zone.cma or 0)
        ]
    found.by_node = found.by_node or left


def _areas(found: Figures, facts: Facts, nodes: list[int]) -> None:
    """Take the areas that debugfs shows: low memory, global, one per node with memory."""
    shown = facts.debugfs
    if shown is None:
        return
    phys = shown.phys if len(shown.phys) == len(shown.lens) else [None] * len(shown.lens)
    for i, (amount, start) in enumerate(zip(shown.lens, phys, strict=True)):
        node = facts.node_of(start) if start is not None else None
        if i >= 2 and node is None and len(nodes) == len(shown.lens) - 2:
            node = nodes[i - 2]
        found.areas.append(Area(("low", "global")[i] if i < 2 else "node", start, amount.bytes, node))
        at = f"{amount.seen.text} at {start:#x}" if start is not None else amount.seen.text
        found.evidence.append(amount.seen._replace(text=at))
    found.exact = sum(area.bytes for area in found.areas)
    held = [area for area in found.areas if area.bytes]
    if all(area.node is not None for area in held):
        for area in held:
            found.by_node[area.node or 0] = found.by_node.get(area.node or 0, 0) + area.bytes


def _share(found: Figures, counts: dict[int, int], others: int, facts: Facts) -> None:
    """Give each node its share of what was counted, if it is known where CMA areas of others lie."""
    if found.by_node:
        return
    left = dict(counts)
    if others:
        holders = [node for node, count in counts.items() if count]
        placed = dict.fromkeys(counts, 0)
        for phys, nbytes, _ in facts.log.cma if facts.log is not None else []:
            node = facts.node_of(phys)
            if node in placed:
                placed[node] += nbytes
        if len(holders) == 1:
            left[holders[0]] -= others
        elif sum(placed.values()) == others:
            left = {node: count - placed[node] for node, count in counts.items()}
        else:
            return
    found.by_node = {node: count for node, count in sorted(left.items()) if count > 0}
