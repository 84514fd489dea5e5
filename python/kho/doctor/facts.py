"""Facts about a kernel and its memory as read from a tree, each with the file and line it comes from.

A value that is absent, malformed or larger than any machine's memory is None. Conclusions are drawn in `examine` and
`scratch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..sizes import PAGEBLOCK_ORDERS
from .kernellog import Evidence, KernelLog

MEMORY_LIMIT = 1 << 52
"""Bytes of physical memory that an address can refer to; larger values are rejected."""


class Amount(NamedTuple):
    """A number of bytes, and the evidence for it."""

    bytes: int
    seen: Evidence


class Zone(NamedTuple):
    """A zone of /proc/zoneinfo; sizes in pages."""

    node: int
    name: str
    start: int
    spanned: int
    present: int
    managed: int
    cma: int | None
    """Pages that init_cma_reserved_pageblock gave to CMA; None if zoneinfo has no such line."""
    free_cma: int
    seen: Evidence


class Blocks(NamedTuple):
    """Number of pageblocks of type CMA in a zone (/proc/pagetypeinfo)."""

    node: int
    cma: int
    seen: Evidence


@dataclass
class Debugfs:
    """Content of sys/kernel/debug/kho, which root can read if CONFIG_KEXEC_HANDOVER_DEBUGFS is set."""

    lens: list[Amount] = field(default_factory=list)
    phys: list[int] = field(default_factory=list)
    finalized: Evidence | None = None
    incoming: Evidence | None = None
    compatible: tuple[str, Evidence] | None = None
    subtrees: list[tuple[str, str, int]] = field(default_factory=list)
    """(direction "in" or "out", name, bytes)."""
    previous: tuple[str, int, Evidence] | None = None
    """(release, count) of the incoming kexec-metadata."""
    liveupdate: list[Evidence] = field(default_factory=list)
    """State of LUO, incoming and outgoing."""
    luo_flb: bool | None = None
    """Whether the outgoing LUO FDT has the node luo-flb, which 7.0 and 7.1 need; None if it is not an FDT."""


@dataclass
class CrashKernel:
    """What the files show about the kernel that is loaded for a crash; in such a kernel, about the dump."""

    signature: Evidence | None = None
    """/proc/version_signature, whose last word is the stable release that Ubuntu's kernel contains."""
    loaded: Evidence | None = None
    """kexec_crash_loaded: 0 or 1."""
    size: Amount | None = None
    """kexec_crash_size: the memory that is reserved."""
    iomem: bool = False
    """True if iomem has addresses; other users than root see zeros."""
    areas: list[tuple[int, int, Evidence]] = field(default_factory=list)
    """(start, end, evidence) of each `Crash kernel` of iomem."""
    ram: list[tuple[int, int, Evidence]] = field(default_factory=list)
    """(start, end, evidence) of each `System RAM` of iomem."""
    code: tuple[int, int, Evidence] | None = None
    """`Kernel code` of iomem."""
    call: Evidence | None = None
    """The call that loaded it, as kdump-tools keeps it."""
    call_age: str = ""
    """"this boot" or "an earlier boot" by the file's time; empty if unknown."""
    settings: list[Evidence] = field(default_factory=list)
    """Lines of the configuration of kdump that add to its command line or its call."""
    inside: Evidence | None = None
    """The evidence that this kernel is itself a crash kernel."""
    crashed: bool = False
    """True if the kernel log is that of a kernel that crashed, as a dump or a collector keeps it."""
    saved_by: KernelLog | None = None
    """The log of the crash kernel that saved a dump, where it is kept next to the dump (kexec-dmesg.log)."""

    @property
    def is_loaded(self) -> bool | None:
        """Return whether a crash kernel is loaded; None if it is unknown."""
        return {"1": True, "0": False}.get(self.loaded.text) if self.loaded is not None else None


@dataclass
class Unit:
    """A unit with descriptors in its store."""

    name: str
    count: int
    preserve: str
    load: str
    seen: Evidence


class Entry(NamedTuple):
    """A descriptor in a store."""

    unit: str
    """Empty if only the manager's descriptor is known."""
    name: str
    kind: str
    """The type of the inode: reg, sock, fifo, dir, chr."""
    inode: str
    """Device and number."""
    path: str
    seen: Evidence


@dataclass
class Store:
    """What systemd shows of its stores."""

    units: list[Unit] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    kexecs: tuple[int, Evidence] | None = None
    """KExecCount of the manager."""
    by_kexec: Evidence | None = None
    """The evidence that kexec started this kernel."""
    shmem: tuple[int, Evidence] | None = None
    """Bytes of shared memory of the root cgroup that no child accounts for."""


@dataclass
class Facts:
    """All facts that were read from a tree; None, empty or False where it has none."""

    root: str
    live: bool
    release: Evidence | None = None
    mem_total: Amount | None = None
    mem_free: Amount | None = None
    cma_total: Amount | None = None
    cma_free: Amount | None = None
    meminfo: bool = False
    meminfo_whole: bool = False
    """True if meminfo has lines before and after the position of CmaTotal: if it lacks CmaTotal, there is no CMA."""
    hugetlb: Amount | None = None
    gigantic: Amount | None = None
    """Bytes of huge pages larger than the buddy allocator's largest block."""
    crash_kernel: Amount | None = None
    crash: CrashKernel = field(default_factory=CrashKernel)
    numa: bool | None = None
    """Whether the kernel was built with CONFIG_NUMA; None if unknown."""
    page_size: int = 4096
    page_size_from: str = "assumed"
    block_order: int | None = None
    zones: list[Zone] = field(default_factory=list)
    node_memory: dict[int, int] = field(default_factory=dict)
    """Managed bytes by NUMA node, from sysfs."""
    blocks: list[Blocks] = field(default_factory=list)
    memmap: Amount | None = None
    """Bytes of struct page that were allocated during boot."""
    cmdline: Evidence | None = None
    config: dict[str, Evidence] = field(default_factory=dict)
    """The CONFIG_ options of `reading.OPTION` that the file has."""
    config_file: str | None = None
    log: KernelLog | None = None
    looked: list[str] = field(default_factory=list)
    """Files that were searched for a kernel log."""
    banner: str | None = None
    """The complete text of /proc/version."""
    debugfs: Debugfs | None = None
    handed_over: Evidence | None = None
    """The handover entry in the boot parameters or the devicetree."""
    boot_data: Evidence | None = None
    """Boot parameters without such an entry."""
    device: Evidence | None = None
    device_usable: bool | None = None
    small_tmpfs: list[tuple[str, int, int, Evidence]] = field(default_factory=list)
    """(mount point, bytes, bytes that its usual share of MemTotal is, evidence) of each tmpfs that is smaller."""
    sessions: list[Evidence] = field(default_factory=list)
    store: Store | None = None
    pins: list[Evidence] = field(default_factory=list)
    container: Evidence | None = None
    of_container: Amount | None = None
    """MemTotal, if meminfo has the container's MemTotal but its host's CmaFree; then `mem_total` is None."""
    mixed: str | None = None
    """Why meminfo is known to have the figures of two machines; None if it is not."""
    architecture: Evidence | None = None
    """The architecture as `uname -m` prints it."""
    platforms: list[str] = field(default_factory=list)

    @property
    def block_bytes(self) -> int:
        """Size of a pageblock in bytes."""
        order = self.block_order if self.block_order is not None else PAGEBLOCK_ORDERS[self.page_size]
        return self.page_size << order

    @property
    def nodes(self) -> dict[int, int]:
        """Present bytes by NUMA node, for nodes that have memory."""
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
        """True if zoneinfo counts CMA pages that CmaTotal does not, which only scratch of a cold boot causes."""
        counts = [zone.cma for zone in self.zones if zone.cma is not None]
        others = self.cma_total.bytes if self.cma_total is not None else None
        return bool(counts) and others is not None and sum(counts) * self.page_size > others

    def node_of(self, phys: int) -> int | None:
        """Return the NUMA node of a physical address; None if it is unknown."""
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
    """Parse a number of units into bytes; None if it is malformed or exceeds `MEMORY_LIMIT`."""
    if not 0 < len(text) <= 32:
        return None
    try:
        value = int(text, base) * unit
    except ValueError:
        return None
    return value if 0 <= value < MEMORY_LIMIT else None
