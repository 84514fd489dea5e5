"""What a user may name as memory to read, and how it is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from ._kho import Arena, Fdt, Incoming, Memory, open_memory
from .errors import FdtError, FormatError, NoHandoverError, SourceError

__all__ = ["LIVE", "Source", "memory", "open"]

LIVE = "live:"
"""How the name of a running service begins, that is a source (`kho.live`); a file of that name is `./live:...`."""

FDT_MAGIC = b"\xd0\x0d\xfe\xed"
FDT_HEADER = 40
FDT_MOST = 16 << 20
"""Bytes of a file that may be a devicetree by itself."""
FDT_PADDING = 1 << 16
"""Bytes there may be after it."""

Source = str | os.PathLike[str] | Memory | Arena
"""One source: a path, a path with an address, or memory at hand."""


def open(  # noqa: A001 - kho.open reads like open()
    source: Source | Iterable[str | os.PathLike[str]],
    *,
    fdt_phys: int | None = None,
    page_size: int | None = None,
    bitmap_bytes: int | None = None,
    scratch: Sequence[tuple[int, int]] | int | None = None,
    max_page_order: int | None = None,
    unpack_limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Incoming:
    """Read the handover in memory that a kernel, or an `Arena`, left behind. Nothing is changed.

    Args:
        source: an ELF core (`"core.elf"`, by p_paddr), a kdump file of makedumpfile's or QEMU's, flattened or not, a
            LiME dump, a raw image with the address of its first byte (`"ram.bin@0x40000000"`, optionally
            `",offset=0x1000,size=2G"` for a part of the file and `",hole=0xd0000000:4G"` for addresses that it leaves
            out), the memory file of a virtual machine (`"/dev/shm/ram,machine=q35"`, or `pc`, `microvm`, `virt`,
            `firecracker`, `cloud-hypervisor`), an arena's own file, several of these together as one memory, the image
            of a running service (`"live:search-index"`), or a `Memory` or `Arena`. Files may be packed with gzip, xz,
            zstd, bzip2, lz4 or snappy, or be AVML's; `"-"` and pipes are read as well (`Memory.open`). One raw image
            whose handover is not whole at its address is read where it is, if that is one place
            (`Incoming.placement`); `",check=no"` forbids it.
        fdt_phys: physical address of the root FDT. If it is given, the memory is not searched, and the scratch areas
            are known only if `scratch` is given too.
        page_size: 4096, 16384 or 65536; decided from evidence when not given.
        bitmap_bytes: 512 (Linux 6.16) or the page size (6.18 and later); kho-v1 says it nowhere, so it is decided
            from evidence when not given.
        scratch: `(addr, size)` of each scratch area, or the physical address of the array that lists them; found by
            the search for the FDT when not given.
        max_page_order: refuse to restore folios of a larger order, as Linux before 7.x does with MAX_PAGE_ORDER.
        unpack_limit: the most bytes a packed file or a pipe may come to; see `Memory.open`.
        progress: called with the number of bytes unpacked, then searched so far; what it raises ends the work.

    Raises:
        SourceError: a file that is missing, empty, a directory, no usable ELF core or dump, or of a format that holds
            no memory kho reads (the message names the format and the remedy); a raw image whose handover is whole at
            no address, or at several.
        NoHandoverError: no root FDT was found.
        UnsupportedAbiError: an ABI that this version does not decode.
        FormatError: memory that no kernel would have written; the message names the place and the value.

    """
    opened = (
        source if isinstance(source, Memory | Arena) else memory(source, unpack_limit=unpack_limit, progress=progress)
    )
    try:
        inc = open_memory(
            opened,
            fdt_phys=fdt_phys,
            page_size=page_size,
            bitmap_bytes=bitmap_bytes,
            scratch=scratch,
            max_page_order=max_page_order,
            progress=progress,
        )
        return inc if inc.address in ("own", "named") else _checked(inc)
    except (NoHandoverError, FormatError, SourceError):
        if isinstance(opened, Memory) and bare_fdt(opened) is not None:
            raise SourceError(f"{opened.sources[0]}: this is a devicetree, not memory; kho fdt prints it") from None
        raise


def _checked(inc: Incoming) -> Incoming:
    from .handover.addresses import checked  # imports every decoder

    return checked(inc)


def bare_fdt(found: Memory) -> bytes | None:
    """Give the bytes of a devicetree that is all there is in a file opened as memory; None if it is something else."""
    if len(found.sources) != 1 or len(found.ranges) != 1 or found.ranges[0][0] != 0:
        return None
    size = found.ranges[0][1]
    if found.machine is not None or not FDT_HEADER <= size <= FDT_MOST:
        return None
    head = found.read(0, FDT_HEADER)
    if not head.startswith(FDT_MAGIC) or size > int.from_bytes(head[4:8], "big") + FDT_PADDING:
        return None
    raw = found.read(0, size)
    try:
        Fdt.partial(raw)
    except FdtError:
        return None
    return raw


def memory(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    unpack_limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Memory:
    """Open what is named as memory: `Memory.open`, and running services by name.

    Raises: SourceError; NotFoundError for a service that does not run; BusyError.
    """
    parts = [source] if isinstance(source, str | os.PathLike) else list(source)
    borrowed: list[int] = []
    try:
        for i, part in enumerate(parts):
            if isinstance(part, str) and part.startswith(LIVE):
                from .live.handover.registry import readable

                borrowed.append(readable(part.removeprefix(LIVE)))
                parts[i] = f"/proc/self/fd/{borrowed[-1]}"
        return Memory.open(*parts, unpack_limit=unpack_limit, progress=progress)
    finally:
        for fd in borrowed:
            os.close(fd)
