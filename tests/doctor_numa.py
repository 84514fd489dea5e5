"""Generated machines with several nodes and zones, described by the addresses of their memory and scratch areas.

zoneinfo, pagetypeinfo and meminfo have the lines and columns that Linux 6.18 and 7.3 print. The counts of CMA pages are
computed from the areas, as the kernel computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from doctor_hosts import write

GIB = 1 << 30
ZONES = (("DMA", 0, 16 << 20), ("DMA32", 16 << 20, 4 * GIB), ("Normal", 4 * GIB, 1 << 52))
TYPES = ("Unmovable", "Movable", "Reclaimable", "HighAtomic", "CMA", "Isolate")
TWO_NODES = ((0, 0, 2 * GIB), (0, 4 * GIB, 66 * GIB), (1, 66 * GIB, 130 * GIB))
"""64 GiB each, the first with a hole below 4 GiB: (node, start, end)."""


@dataclass
class Machine:
    """A machine. All sizes are bytes."""

    ranges: Sequence[tuple[int, int, int]] = TWO_NODES
    areas: Sequence[tuple[int, int]] = ()
    """(phys, bytes) of scratch, or of the leftover of a failed reservation."""
    others: Sequence[tuple[int, int]] = ()
    """(phys, bytes) of other CMA areas."""
    used: int = 0
    """CMA memory that is not free."""
    cold: bool = True
    """True if init_cma_reserved_pageblock gave scratch to CMA, as at a cold boot."""
    page: int = 4096
    block: int = 2 << 20
    release: str = "7.3.4"
    cmdline: str = "BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet"
    messages: Sequence[str] = ()
    reserved: int = 3 * GIB
    """Memory reserved during boot, without scratch."""
    mixed: bool = False
    """True if pagetypeinfo has the additional table of page_owner=on."""
    files: dict[str, str | bytes] = field(default_factory=dict)

    def within(self, areas: Sequence[tuple[int, int]], start: int, end: int) -> int:
        """Return the number of bytes of the areas between two addresses."""
        return sum(max(min(at + size, end) - max(at, start), 0) for at, size in areas)

    def write(self, tree: Path) -> Path:
        """Write the files that every user can read, and pagetypeinfo."""
        total = sum(end - start for _, start, end in self.ranges)
        held, others = (sum(size for _, size in areas) for areas in (self.areas, self.others))
        usable = total - self.reserved
        write(
            tree,
            "proc/meminfo",
            f"MemTotal:       {usable >> 10} kB\nMemFree:        {usable * 3 // 4 >> 10} kB\nBuffers:  0 kB\n"
            f"CmaTotal:       {others >> 10} kB\nCmaFree:        {held + others - self.used >> 10} kB\n"
            "Balloon:               0 kB\nHugePages_Total:       0\nHugetlb:               0 kB\n",
        )
        nodes = sorted({node for node, _, _ in self.ranges})
        zones, free, blocks = [], [], []
        used = self.used
        for node in nodes:
            first = True
            for name, low, high in ZONES:
                parts = [(max(a, low), min(b, high)) for n, a, b in self.ranges if n == node and a < high and b > low]
                present = sum(b - a for a, b in parts) // self.page
                start, end = (min(a for a, _ in parts), max(b for _, b in parts)) if parts else (0, 0)
                inside = [self.within(areas, a, b) for areas in (self.areas, self.others) for a, b in parts]
                half = len(inside) // 2
                scratch, cma = sum(inside[:half]), sum(inside[half:])
                counted = cma + (scratch if self.cold else 0)
                zones.append(f"Node {node}, zone {name:>8}\n")
                if first and present:
                    zones.append("  per-node stats\n      nr_inactive_anon 924\n      nr_foll_pin_acquired 0\n")
                    first = False
                managed = present - self.reserved * present // (total)
                zones.append(f"  pages free     {present * 3 // 4}\n        boost    0\n        min      5632\n")
                zones.append(f"        spanned  {(end - start) // self.page}\n        present  {present}\n")
                zones.append(f"        managed  {managed}\n        cma      {counted // self.page}\n")
                zones.append("        protection: (0, 1818, 64213, 64213)\n")
                if present:
                    taken = min(used, scratch + cma)
                    used -= taken
                    zones.append(f"      nr_free_pages {present * 3 // 4}\n")
                    zones.append(f"      nr_free_cma  {(scratch + cma - taken) // self.page}\n")
                    zones.append("  pagesets\n    cpu: 0\n              count:    12\n              high:     4024\n")
                    zones.append(f"  node_unreclaimable:  0\n  start_pfn:           {start // self.page}\n")
                    where = f"Node {node:4}, zone {name:>8}"
                    free += [f"{where}, type {kind:>12} {'1 ' * 10}>100000\n" for kind in TYPES]
                    count = [0, present * self.page // self.block, 3, 1, (scratch + cma) // self.block, 0]
                    blocks.append(f"Node {node}, zone {name:>8} {' '.join(f'{n:12}' for n in count)} \n")
        write(tree, "proc/zoneinfo", "".join(zones))
        pages = self.block // self.page
        head = "".join(f"{kind:>12} " for kind in TYPES)
        text = f"Page block order: {pages.bit_length() - 1}\nPages per block:  {pages}\n\n"
        text += "Free pages count per migrate type at order       0      1 \n" + "".join(free)
        text += f"\nNumber of blocks type {head}\n" + "".join(blocks)
        text += f"\nNumber of mixed blocks  {head}\n" + "".join(blocks) if self.mixed else ""
        write(tree, "proc/pagetypeinfo", text)
        write(tree, "proc/cmdline", self.cmdline + "\n")
        write(tree, "proc/version", f"Linux version {self.release} (root@vm) (gcc) #1 SMP PREEMPT_DYNAMIC\n")
        shown = [f"  node {node:3}: [mem {start:#018x}-{end - 1:#018x}]" for node, start, end in self.ranges]
        cold = self.reserved + (held if self.cold else 0)
        memory = f"Memory: {total - cold >> 10}K/{total >> 10}K available (20480K kernel code, 4395K rwdata, 14960K "
        memory += f"rodata, 4560K init, 5916K bss, {cold >> 10}K reserved, {others >> 10}K cma-reserved)"
        lines = [f"Linux version {self.release} (root@vm) (gcc) #1 SMP", f"Command line: {self.cmdline}"]
        lines += [*self.messages, "Early memory node ranges", *shown, f"Kernel command line: {self.cmdline}", memory]
        lines += [f"cma: Reserved {size >> 20} MiB at {at:#018x}" for at, size in self.others]
        write(tree, "var/log/dmesg", "".join(f"[    0.000000] {line}\n" for line in lines))
        for name, content in self.files.items():
            write(tree, name, content)
        return tree

    def with_debugfs(self, tree: Path, side: str = "out") -> Path:
        """Write the files that root can read, including debugfs."""
        base = f"sys/kernel/debug/kho/{side}"
        write(tree, f"{base}/scratch_phys", "".join(f"{at:#x}\n" for at, _ in self.areas))
        write(tree, f"{base}/scratch_len", "".join(f"{size:#x}\n" for _, size in self.areas))
        return self.write(tree)


def metadata(release: str, count: int) -> bytes:
    """Return a kexec-metadata blob, version 1."""
    return (1).to_bytes(4, "little") + release.encode().ljust(65, b"\0") + count.to_bytes(4, "little")
