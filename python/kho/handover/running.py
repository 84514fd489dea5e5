"""A running machine as a source: what debugfs shows of its handover, and its memory, /proc/kcore.

debugfs shows FDTs, never folios. /proc/kcore is the machine's memory as an ELF core, for root alone, on x86_64 and
arm64: the map of what the kernel will hand over is in it, live. LUO writes sessions and files while the kexec is under
way, so that until then their pages have no owner (KHO034). A directory with copies of `proc` and `sys` is read the
same way, as far as it has the files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .._kho import Fdt, Incoming, Memory, Snapshot, abis, find_memory, open_memory
from .._types import OwnedRange
from ..errors import AccessError, FdtError, KhoError, NoHandoverError, SourceError
from ..fdt import likely_names
from .symbols import know_scratch

__all__ = ["UnreadableError", "core_of", "is_running", "looked_at", "missing_root", "open_running", "shown_ranges"]

PAGE = 4096
"""Bytes of a page, for blobs whose size is not shown."""
ADDRESSES = {abi.subtree_property for abi in abis().values()}
SIZES = {abi.size_property for abi in abis().values()} - {None}
"""Names of the properties of a subtree in the root FDT."""


class UnreadableError(SourceError):
    """The memory of a running machine cannot be read; the message says why, and what would be needed."""


def is_running(source: str | os.PathLike[str]) -> bool:
    """Say whether a source is "live" or a directory, so not an image of memory."""
    return Snapshot.recognizes(source) and (source == "live" or Path(source).is_dir())


def core_of(source: str | os.PathLike[str]) -> Path:
    """Name the memory of the running machine, or of a directory with a `proc`. It may be missing."""
    return (Path("/") if source == "live" else Path(source)) / "proc/kcore"


def open_running(
    source: str | os.PathLike[str],
    *,
    progress: Callable[[int], object] | None = None,
    fdt_phys: int | None = None,
    page_size: int | None = None,
    bitmap_bytes: int | None = None,
    scratch: Sequence[tuple[int, int]] | int | None = None,
) -> tuple[Incoming, Memory]:
    """Read the handover that a running kernel holds in memory, from /proc/kcore.

    A machine that was itself booted by a handover has the root FDT of that one in memory, too; it is left out.

    Raises: UnreadableError without /proc/kcore, without permission for it (AccessError is its cause), or without a
        handover in it; ParameterError.
    """
    path = core_of(source)
    memory = _memory(path, progress)
    areas = scratch
    try:
        shown = Snapshot.open(source)
    except KhoError:
        shown = None
    if areas is None and shown is not None:
        areas = shown.scratch
    received = None if shown is None or shown.incoming is None else shown.incoming.fdt
    if fdt_phys is None and received is not None:
        others = [phys for phys in find_memory(memory)[0] if not _begins(memory, phys, received)]
        fdt_phys = others[0] if others else None
        if fdt_phys is None:
            raise UnreadableError(f"{path}: no root FDT in it but that of the handover which booted this kernel")
    try:
        inc = open_memory(
            memory,
            fdt_phys=fdt_phys,
            page_size=page_size,
            bitmap_bytes=bitmap_bytes,
            scratch=areas,
            progress=progress,
        )
    except NoHandoverError as error:
        raise UnreadableError(
            f"{path}: {error}; KHO is off, or this kernel finalizes first (Linux 6.16 to 7.0)"
        ) from error
    know_scratch(inc)
    return inc, memory


def _memory(path: Path, progress: Callable[[int], object] | None) -> Memory:
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise UnreadableError(f"{path}: is not there (CONFIG_PROC_KCORE), so the memory cannot be read") from error
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(f"{path}: is no regular file, so the memory cannot be read")
    try:
        return Memory.open(path, progress=progress)
    except AccessError as error:
        raise UnreadableError(f"{path}: permission denied: root is needed to read memory") from error
    except SourceError as error:
        raise UnreadableError(str(error)) from error


def _begins(memory: Memory, phys: int, blob: bytes) -> bool:
    try:
        return memory.read(phys, len(blob)) == blob
    except KhoError:
        return False


def missing_root(shown: Snapshot) -> str:
    """Say why debugfs has no outgoing root FDT."""
    if shown.incoming is not None:
        # kho_init returns before it adds out/fdt (Linux 6.19 and later).
        return "not shown by this kernel, which was itself booted by a handover"
    if shown.finalized is False:
        return "there is none yet: nothing was finalized"
    return "not shown by this kernel"


def shown_ranges(shown: Snapshot) -> list[OwnedRange]:
    """List the memory that the FDTs of debugfs name: blobs of subtrees, regions of reserve_mem; of the outgoing side.

    Orders are not known, so they are empty. Without an outgoing root FDT the subtrees have no addresses.
    """
    side = shown.outgoing
    if side is None:
        return []
    rows = [] if side.fdt is None else list(_blobs(side.fdt))
    regions = side.sub_fdts.get("memblock")
    return sorted([*rows, *(_regions(regions) if regions is not None else ())])


def _blobs(root: bytes) -> Iterator[OwnedRange]:
    """Yield the blob of each subnode of a root FDT, which may be cut: property names may be missing, values are not."""
    try:
        fdt = Fdt.partial(root)[0]
        nodes, likely = fdt.root.children, likely_names(fdt)
    except KhoError:
        return
    for node in nodes:
        numbers = {
            name or likely.get(offset): int.from_bytes(raw, "little")
            for name, offset, raw in node.raw_properties
            if len(raw) == 8
        }
        phys = next((number for name, number in numbers.items() if name in ADDRESSES), None)
        if phys is not None:
            nbytes = next((number for name, number in numbers.items() if name in SIZES), PAGE)
            yield OwnedRange(phys, nbytes, (), f"subtree {node.name}", "blob", None)


def _regions(blob: bytes) -> Iterator[OwnedRange]:
    try:
        for node in Fdt(blob).root.children:
            if "start" in node and "size" in node:
                yield OwnedRange(node.u64("start"), node.u64("size"), (), f"reserve_mem {node.name}", "region", None)
    except (FdtError, KhoError):
        return


def looked_at(shown: Snapshot) -> Iterator[tuple[str, str]]:
    """Name each file of debugfs, and what was read of it."""
    for way, side in (("in", shown.incoming), ("out", shown.outgoing)):
        if side is None:
            yield way, "not there" if way == "out" else "not there: this kernel was not booted by a handover"
            continue
        if side.fdt is not None:
            cut = "" if side.truncated is None else f" of {side.truncated[0]}"
            yield f"{way}/fdt", f"{len(side.fdt)}{cut} bytes, checked"
        else:
            yield f"{way}/fdt", missing_root(shown) if way == "out" else "not there"
        for name, blob in side.sub_fdts.items():
            yield f"{way}/sub_fdts/{name}", f"{len(blob)} bytes, not checked: what it refers to is in memory"
