"""How much memory KHO holds, and how that is known.

Scratch is memory of CMA pageblocks outside CmaTotal. What shows it, best first:

- debugfs out/scratch_len: the areas themselves, exact; root only.
- /proc/pagetypeinfo: pageblocks of type CMA, less CmaTotal. Exact to a pageblock whatever is in the memory; root only.
- /proc/zoneinfo `cma`, less CmaTotal: pages that were given to CMA one pageblock at a time, as a cold boot does
  (init_cma_reserved_pageblock). For everyone. A kernel that was handed its scratch, or whose reservation failed, frees
  it another way and does not count it here.
- CmaFree less CmaTotal in /proc/meminfo: a lower bound. Movable pages in scratch or in anybody's CMA area lower it, and
  after a handover what the kernel allocated while booting lies in scratch too.
- The sizes of `kho_scratch=`, rounded as the kernel rounds them, on a cold boot that did not fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .._kho import ScratchSpec, kho_is_enabled, kho_scratch_of, parse_kho_scratch
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
    asked: int | None = None
    """What `kho_scratch=` comes to, rounded."""
    evidence: list[Evidence] = field(default_factory=list)
    block_bytes: int = 0
    by_node: dict[int, int] = field(default_factory=dict)

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
    """Say whether the boot enabled KHO; None if it is left to a default that is not known."""
    if facts.cmdline is None:
        return default
    on, off = kho_is_enabled(facts.cmdline.text, True), kho_is_enabled(facts.cmdline.text, False)
    return on if on == off else default


def excess(found: Figures) -> int:
    """Give what is surely in CMA outside CmaTotal; a page or two are a race between two counters."""
    return found.best if found.best is not None and found.best >= found.block_bytes // 2 else 0


def spec_of(facts: Facts) -> ScratchSpec | None:
    """Read `kho_scratch=`; None if it is not given, or rejected. Older kernels let anything follow it."""
    value = kho_scratch_of(facts.cmdline.text) if facts.cmdline is not None else None
    if value is None:
        return None
    try:
        return parse_kho_scratch(value)
    except ParameterError:
        pass
    asked = facts.log.asked_sizes if facts.log is not None else None
    try:
        return parse_kho_scratch(value, trailing_garbage=True) if asked is not None else None
    except ParameterError:
        return None


def asked_bytes(spec: ScratchSpec | None, nodes: int, block_bytes: int) -> list[int] | None:
    """Give the sizes of the areas that explicit sizes come to; None for a percentage or more than 64 bits."""
    if spec is None or spec.low is None:
        return None
    try:
        return spec.sizes(0, 0, [0] * max(nodes, 1), block_bytes)
    except KhoError:
        return None


def figures(facts: Facts) -> Figures:
    """Work out every figure that the facts allow."""
    found = Figures(block_bytes=facts.block_bytes)
    others = facts.cma_total.bytes if facts.cma_total is not None else 0
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
    sizes = asked_bytes(spec_of(facts), len(nodes), facts.block_bytes)
    found.asked = sum(sizes) if sizes is not None else None
    return found


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
