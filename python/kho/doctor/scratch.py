"""How much memory KHO holds, and the source of that figure.

Scratch is the memory of CMA pageblocks that CmaTotal does not count. Sources, best first:

- debugfs out/scratch_len: the areas, exact; root only.
- /proc/pagetypeinfo: pageblocks of type CMA, less CmaTotal. Exact to a pageblock, whether the memory is used or free;
  root only.
- /proc/zoneinfo `cma`, less CmaTotal: pages that init_cma_reserved_pageblock gave to CMA, as a cold boot does. Every
  user can read it. A kernel that inherited its scratch, or whose reservation failed, frees the areas through another
  code path and does not count them here.
- CmaFree less CmaTotal in /proc/meminfo: a lower bound. Movable pages in scratch or in other CMA areas reduce it; after
  a handover, so do the kernel's own allocations during boot, which are in scratch.
- The sizes in `kho_scratch=`, rounded as the kernel candidates them, after a cold boot without a failure: exact if the
  pageblocks add up to the same size, or if the kernel log shows the parsed sizes.
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
    """An area of scratch: its size in bytes and its physical address."""

    kind: str
    """low, global or node, in the kernel's order."""
    phys: int | None
    bytes: int
    node: int | None


@dataclass
class Figures:
    """Bytes of CMA memory outside CmaTotal, by source; None if the source is missing."""

    areas: list[Area] = field(default_factory=list)
    exact: int | None = None
    blocks: int | None = None
    zones: int | None = None
    free: int | None = None
    sizes: list[int] = field(default_factory=list)
    """Sizes of the areas that `kho_scratch=` requests, rounded; empty for a percentage."""
    evidence: list[Evidence] = field(default_factory=list)
    block_bytes: int = 0
    others: int = 0
    """CmaTotal, the size of the CMA areas that are not scratch."""
    doubts: list[str] = field(default_factory=list)
    """Reasons why an inferred figure may not be scratch."""
    by_node: dict[int, int] = field(default_factory=dict)

    @property
    def requested(self) -> int | None:
        """Sum of the sizes in `kho_scratch=LOW,GLOBAL,PERNODE`; None if it is absent or rejected."""
        return sum(self.sizes) if self.sizes else None

    @property
    def counted(self) -> int | None:
        """Bytes of CMA pageblocks outside CmaTotal; None if neither pagetypeinfo nor zoneinfo counts them."""
        return self.blocks if self.blocks is not None else self.zones or None

    @property
    def best(self) -> int | None:
        """The best figure. Pageblock counts precede CmaFree, whose per-CPU counters drift by some pages."""
        if self.exact is not None:
            return self.exact
        if self.blocks is not None:
            return self.blocks
        known = [figure for figure in (self.zones, self.free) if figure is not None]
        return max(known, default=None)

    @property
    def how(self) -> str:
        """Kind of the best figure: exact, inferred or at least."""
        if self.exact is not None:
            return "exact"
        if self.blocks is not None or self.zones:
            return "inferred"
        return "at least"


def enablement(facts: Facts, default: bool | None) -> bool | None:
    """Return whether this boot enabled KHO; None if this depends on a command line or default that is unknown."""
    if facts.cmdline is None:
        return None
    on, off = kho_is_enabled(facts.cmdline.text, True), kho_is_enabled(facts.cmdline.text, False)
    return on if on == off else default


def excess(found: Figures) -> int:
    """Return the bytes that are certainly in CMA outside CmaTotal.

    If there are other CMA areas, less than half a pageblock may be a drift between counters and does not count.
    """
    best = found.best or 0
    drift = 0 if found.exact is not None or found.counted or not found.others else found.block_bytes // 2
    return best if best >= drift else 0


def split_cmdline(cmdline: str) -> Iterator[str]:
    """Split a command line as the kernel does: without quotes, up to the `--` that precedes the arguments of init."""
    for match in re.finditer(r'(?:"[^"]*"|[^\s"])+', cmdline):
        word = match[0].replace('"', "")
        if word == "--":
            return
        name, equals, value = word.partition("=")
        yield name.replace("-", "_") + equals + value


def scratch_values(cmdline: str) -> list[str | None]:
    """Return the value of each `kho_scratch` parameter; None for one without a value."""
    found = (word.partition("=") for word in split_cmdline(cmdline))
    return [value if equals else None for name, equals, value in found if name == "kho_scratch"]


def effective_scratch(facts: Facts) -> tuple[str | None, ScratchSpec | None, list[tuple[str, str]]]:
    """Parse `kho_scratch=` as the kernel does, which uses the last valid value.

    Returns: that value and its parsed form, both None if there is none; and each rejected value with the reason.
    Older kernels accept text after the third size; such a value counts if the log shows that it was accepted.
    """
    taken: tuple[str | None, ScratchSpec | None] = None, None
    rejected = []
    for value in scratch_values(facts.cmdline.text) if facts.cmdline is not None else []:
        try:
            if value is None:
                raise ParameterError("kho_scratch: no value is given")
            taken = value, parse_kho_scratch(value)
        except ParameterError as error:
            rejected.append((value or "", str(error)))
    if taken[1] is None and rejected and facts.log is not None and facts.log.parsed_sizes is not None:
        with suppress(ParameterError):
            taken = rejected[-1][0], parse_kho_scratch(rejected[-1][0], trailing_garbage=True)
    return *taken, rejected


def alignment(release: str | None, page_size: int, block_bytes: int) -> int:
    """Return the alignment of area sizes: a pageblock; from Linux 7.2 on the buddy allocator's largest block."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release or "")
    recent = match is not None and (int(match[1]), int(match[2])) >= (7, 2)
    return max(block_bytes, page_size << 10) if recent and page_size == 4096 else block_bytes


def rounded(spec: ScratchSpec | None, nodes: int, align: int) -> list[int]:
    """Return the rounded sizes of all areas; empty for a percentage, or if a size exceeds 64 bits."""
    if spec is None or spec.low is None:
        return []
    try:
        return spec.sizes(0, 0, [0] * max(nodes, 1), align)
    except KhoError:
        return []


def whole_pageblocks(spec: ScratchSpec, block: int) -> str | None:
    """Return the `kho_scratch=` with low and global sizes rounded up to whole pageblocks; None if they are.

    Linux 6.16 to 6.18.41, 6.19, 7.0 and 7.1.0 to 7.1.4 use these two sizes as given, and round only those of nodes.
    """
    if spec.low is None or spec.global_ is None or spec.pernode is None:
        return None
    sizes = (spec.low, spec.global_, spec.pernode)
    if not any(nbytes % block for nbytes in sizes[:2]):
        return None
    return "kho_scratch=" + ",".join(f"{-(-nbytes // block) * block >> 20}M" for nbytes in sizes)


def figures(facts: Facts) -> Figures:
    """Compute each figure whose source is available."""
    found = Figures(block_bytes=facts.block_bytes)
    others = found.others = facts.cma_total.bytes if facts.cma_total is not None else 0
    nodes = list(facts.nodes)
    if facts.debugfs is not None and facts.debugfs.lens:
        _use_areas(found, facts, nodes)
    if facts.blocks:
        counts: dict[int, int] = {}
        for row in facts.blocks:
            counts[row.node] = counts.get(row.node, 0) + row.cma * facts.block_bytes
            if row.cma:
                found.evidence.append(row.seen)
        found.blocks = max(sum(counts.values()) - others, 0)
        _split_by_node(found, counts, others, facts)
    zones = [zone for zone in facts.zones if zone.cma is not None]
    if zones:
        counts = {}
        for zone in zones:
            counts[zone.node] = counts.get(zone.node, 0) + (zone.cma or 0) * facts.page_size
            if zone.cma:
                found.evidence.append(zone.seen)
        found.zones = max(sum(counts.values()) - others, 0)
        if not found.by_node and found.zones:
            _split_by_node(found, counts, others, facts)
    if facts.cma_free is not None:
        found.free = max(facts.cma_free.bytes - others, 0)
        found.evidence += [facts.cma_free.seen, *([facts.cma_total.seen] if facts.cma_total is not None else [])]
    if zones and not found.zones:
        _use_free_cma(found, facts)
    default = facts.config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
    if facts.cma_total is None and found.exact is None:
        if not enablement(facts, default.text.endswith("=y") if default is not None else None):
            # All of it may be other CMA areas, and there is no evidence that KHO is on: this does not indicate scratch.
            found.blocks = found.zones = found.free = None
            found.by_node = {}
            if facts.blocks and not any(row.cma for row in facts.blocks):
                found.blocks = 0
            if zones and not any(zone.cma for zone in zones):
                found.zones = 0
        found.doubts.append("CmaTotal is unknown: the figure may include other CMA areas")
    spec = effective_scratch(facts)[1]
    align = alignment(facts.release.text if facts.release is not None else None, facts.page_size, facts.block_bytes)
    candidates = [rounded(spec, len(nodes), each) for each in (align, facts.block_bytes, facts.block_bytes << 1)]
    found.sizes = next((sizes for sizes in candidates if sizes and sum(sizes) == found.counted), candidates[0])
    return found


def areas_of(sizes: list[int], nodes: list[int]) -> list[Area]:
    """Return areas of the given sizes: low memory, global, one per node. Their addresses are unknown."""
    kinds = ["low", "global", *["node"] * (len(sizes) - 2)]
    only = nodes[0] if len(nodes) == 1 else None
    places = [only, only, *(nodes if len(nodes) == len(sizes) - 2 else [only] * (len(sizes) - 2))]
    return [Area(kind, None, size, node) for kind, size, node in zip(kinds, sizes, places, strict=True)]


def _use_free_cma(found: Figures, facts: Facts) -> None:
    """Use free CMA pages that zoneinfo does not count in `cma`: by node, and as a total if meminfo has no CmaFree."""
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


def _use_areas(found: Figures, facts: Facts, nodes: list[int]) -> None:
    """Use the areas in debugfs: low memory, global, one per node with memory."""
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


def _split_by_node(found: Figures, counts: dict[int, int], others: int, facts: Facts) -> None:
    """Split the counted memory among the nodes, if the nodes of the other CMA areas are known."""
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
