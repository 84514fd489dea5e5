"""What a tree says about its kernel and memory, each with the file and line it stands in.

A value that is absent, malformed or larger than any machine's memory is None; what was made of the values is elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..sizes import PAGEBLOCK_ORDERS
from .kernellog import Evidence, KernelLog

MEMORY_LIMIT = 1 << 52
"""Bytes of physical memory that an address can name; more is nonsense."""


class Amount(NamedTuple):
    """A number of bytes, and where it stands."""

    bytes: int
    seen: Evidence


class Zone(NamedTuple):
    """A zone of /proc/zoneinfo; pages."""

    node: int
    name: str
    start: int
    spanned: int
    present: int
    managed: int
    cma: int | None
    """Pages that were given to CMA as such (init_cma_reserved_pageblock)."""
    free_cma: int
    seen: Evidence


class Blocks(NamedTuple):
    """Pageblocks of a zone of type CMA (/proc/pagetypeinfo)."""

    node: int
    cma: int
    seen: Evidence


@dataclass
class Debugfs:
    """sys/kernel/debug/kho, which root sees if CONFIG_KEXEC_HANDOVER_DEBUGFS is set."""

    lens: list[Amount] = field(default_factory=list)
    phys: list[int] = field(default_factory=list)
    finalized: Evidence | None = None
    incoming: Evidence | None = None
    compatible: tuple[str, Evidence] | None = None
    subtrees: list[tuple[str, str, int]] = field(default_factory=list)
    """(direction "in" or "out", name, bytes)."""
    previous: tuple[str, int, Evidence] | None = None
    """(release, count) of kexec-metadata as it came in."""
    liveupdate: list[Evidence] = field(default_factory=list)
    """What LUO says of itself, as it came in and as it goes out."""


@dataclass
class Facts:
    """Everything that was read."""

    root: str
    live: bool
    release: Evidence | None = None
    mem_total: Amount | None = None
    mem_free: Amount | None = None
    cma_total: Amount | None = None
    cma_free: Amount | None = None
    meminfo: bool = False
    meminfo_whole: bool = False
    """Whether meminfo has lines before and after the place of CmaTotal: then a kernel without it has no CMA."""
    hugetlb: Amount | None = None
    gigantic: Amount | None = None
    """Bytes of huge pages larger than the buddy allocator's largest block."""
    crash_kernel: Amount | None = None
    page_size: int = 4096
    page_size_from: str = "assumed"
    block_order: int | None = None
    zones: list[Zone] = field(default_factory=list)
    node_memory: dict[int, int] = field(default_factory=dict)
    """NUMA nodes as sysfs has them: bytes that are managed."""
    blocks: list[Blocks] = field(default_factory=list)
    memmap: Amount | None = None
    """Bytes of struct page that were allocated while booting."""
    cmdline: Evidence | None = None
    config: dict[str, Evidence] = field(default_factory=dict)
    """CONFIG_ names with their values, those that matter and are there."""
    config_file: str | None = None
    log: KernelLog | None = None
    looked: list[str] = field(default_factory=list)
    """Where a kernel log was looked for."""
    banner: str | None = None
    """/proc/version, whole."""
    debugfs: Debugfs | None = None
    handed_over: Evidence | None = None
    """That the boot loader or device tree told this kernel of a handover."""
    boot_data: Evidence | None = None
    """Where it would stand if they had."""
    device: Evidence | None = None
    device_usable: bool | None = None
    sessions: list[Evidence] = field(default_factory=list)
    pins: list[Evidence] = field(default_factory=list)
    container: Evidence | None = None
    of_container: Amount | None = None
    """MemTotal, where meminfo is a container's and CmaTotal and CmaFree are its host's; `mem_total` is None then."""
    mixed: str | None = None
    """What shows that meminfo has the figures of two machines."""
    architecture: Evidence | None = None
    """As uname -m names it."""
    platforms: list[str] = field(default_factory=list)

    @property
    def block_bytes(self) -> int:
        """Give the size of a pageblock in bytes."""
        order = self.block_order if self.block_order is not None else PAGEBLOCK_ORDERS[self.page_size]
        return self.page_size << order

    @property
    def nodes(self) -> dict[int, int]:
        """NUMA nodes that have memory: bytes present."""
        found: dict[int, int] = {}
        for zone in self.zones:
            if zone.present:
                found[zone.node] = found.get(zone.node, 0) + zone.present * self.page_size
        if not found and self.log is not None:
            for node, start, end in self.log.nodes:
                found[node] = found.get(node, 0) + max(end - start, 0)
        return dict(sorted((found or self.node_memory).items()))

    @property
    def cold_counted(self) -> bool:
        """Say whether zoneinfo counts CMA pages that CmaTotal does not: scratch of a cold boot, and of no other."""
        counts = [zone.cma for zone in self.zones if zone.cma is not None]
        others = self.cma_total.bytes if self.cma_total is not None else None
        return bool(counts) and others is not None and sum(counts) * self.page_size > others

    def node_of(self, phys: int) -> int | None:
        """Say on which NUMA node an address lies."""
        for node, start, end in self.log.nodes if self.log is not None else []:
            if start <= phys < end:
                return node
        pfn = phys // self.page_size
        found = {zone.node for zone in self.zones if zone.start <= pfn < zone.start + zone.spanned}
        nodes = self.nodes
        if len(found) == 1:
            return found.pop()
        return next(iter(nodes)) if len(nodes) == 1 else None


def number(text: str | bytes, unit: int = 1, base: int = 10) -> int | None:
    """Read a number of units; None for what is no number, or more bytes than memory can have."""
    if not 0 < len(text) <= 32:
        return None
    try:
        value = int(text, base) * unit
    except ValueError:
        return None
    return value if 0 <= value < MEMORY_LIMIT else None
