"""Hosts for the tests of `kho doctor`: changed copies of captured hosts, and generated ones."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

HOSTS = Path(__file__).parent / "data" / "hosts"
MIB = 1 << 20


def copied(name: str, to: Path, *without: str) -> Path:
    """Copy a captured host without some of its files."""
    tree = to / name
    shutil.copytree(HOSTS / name, tree)
    for file in without:
        place = tree / file
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
    return tree


def write(tree: Path, name: str, content: str | bytes) -> Path:
    """Write a file."""
    place = tree / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content.encode() if isinstance(content, str) else content)
    return tree


def edit(tree: Path, name: str, *changes: tuple[str, str]) -> Path:
    """Replace text in a file, which must contain it."""
    text = (tree / name).read_text()
    for old, new in changes:
        assert old in text, (name, old)
        text = text.replace(old, new)
    return write(tree, name, text)


def machine(
    tree: Path,
    *,
    nodes: Sequence[int] = (4096 * MIB,),
    scratch: Sequence[int] = (0,),
    counted: bool = True,
    cma: Sequence[int] = (0,),
    used: int = 0,
    page: int = 4096,
    block_order: int = 9,
    cmdline: str = "root=/dev/vda1",
    release: str = "7.3.4",
    pagetypeinfo: bool = True,
) -> Path:
    """Write the /proc files of a generated machine; all sizes in bytes.

    Args: nodes: RAM of each node. scratch: scratch on each node. counted: True if zoneinfo counts scratch as CMA, as
    after a cold boot. cma: other CMA areas on each node. used: CMA memory that is not free. page: the page size.
    """
    block = page << block_order
    cma = (*cma, *[0] * (len(nodes) - len(cma)))
    scratch = (*scratch, *[0] * (len(nodes) - len(scratch)))
    free = sum(scratch) + sum(cma) - used
    meminfo = {"MemTotal": sum(nodes), "MemFree": sum(nodes) // 2, "CmaTotal": sum(cma), "CmaFree": free}
    zones, rows = [], []
    start = 1 << 20
    for node, ram in enumerate(nodes):
        pages = ram // page
        held = cma[node] + (scratch[node] if counted else 0)
        zones.append(
            f"Node {node}, zone   Normal\n  per-node stats\n      nr_inactive_anon 924\n  pages free     {pages // 2}\n"
            f"        boost    0\n        spanned  {pages}\n        present  {pages}\n        managed  {pages}\n"
            f"        cma      {held // page}\n      nr_free_cma  {(cma[node] + scratch[node]) // page}\n"
            f"  start_pfn:           {start}\n"
        )
        count = (cma[node] + scratch[node]) // block
        rows.append(
            f"Node {node}, zone   Normal            3         {pages * page // block - count}       0  {count}  0\n"
        )
        start += pages
    write(tree, "proc/meminfo", "".join(f"{name}: {value >> 10:14} kB\n" for name, value in meminfo.items()))
    write(tree, "proc/zoneinfo", "".join(zones))
    write(tree, "proc/cmdline", cmdline + "\n")
    write(tree, "proc/sys/kernel/osrelease", release + "\n")
    if pagetypeinfo:
        head = f"Page block order: {block_order}\nPages per block:  {1 << block_order}\n\n"
        write(
            tree,
            "proc/pagetypeinfo",
            head
            + "Number of blocks type     Unmovable      Movable  HighAtomic          CMA      Isolate \n"
            + "".join(rows),
        )
    return tree


def log(tree: Path, *lines: str, release: str = "7.3.4", stamped: bool = True) -> Path:
    """Write a kernel log, with time stamps as in dmesg if `stamped`."""
    stamp = "[    0.000000] " if stamped else ""
    text = [f"Linux version {release} (root@vm) #1 SMP", *lines]
    return write(tree, "var/log/dmesg", "".join(f"{stamp}{line}\n" for line in text))


def debugfs(tree: Path, areas: Sequence[tuple[int, int]]) -> Path:
    """Write the debugfs files with the scratch areas (phys, bytes)."""
    base = "sys/kernel/debug/kho/out"
    write(tree, f"{base}/scratch_phys", "".join(f"{phys:#x}\n" for phys, _ in areas))
    return write(tree, f"{base}/scratch_len", "".join(f"{nbytes:#x}\n" for _, nbytes in areas))
