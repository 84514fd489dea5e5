"""Sources of physical memory that a user can name, and `open`, which reads the handover in them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from ._kho import Arena, Fdt, Incoming, Memory, open_memory
from .errors import FdtError, FormatError, NoHandoverError, SourceError
from .readers import memory_of

__all__ = ["LIVE", "Source", "memory", "open"]

LIVE = "live:"
"""Prefix of a source that is a running service (`kho.live`); a file with such a name is given as `./live:...`."""

FDT_MAGIC = b"\xd0\x0d\xfe\xed"
FDT_HEADER = 40
FDT_MOST = 16 << 20
"""Maximum bytes of a file that is a bare devicetree."""
FDT_PADDING = 1 << 16
"""Maximum bytes of padding after it."""

Source = str | os.PathLike[str] | Memory | Arena
"""One source: a path, a path with an address, or open memory."""


def open(  # noqa: A001 - kho.open reads like open()
    source: Source | Iterable[str | os.PathLike[str]] | object,
    *,
    fdt_phys: int | None = None,
    page_size: int | None = None,
    bitmap_bytes: int | None = None,
    scratch: Sequence[tuple[int, int]] | int | None = None,
    max_page_order: int | None = None,
    unpack_limit: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Incoming:
    """Read the handover in the memory of a kernel or an `Arena`. The memory is not changed.

    Args:
        source: an ELF core (`"core.elf"`, by p_paddr), a kdump file of makedumpfile or QEMU, flattened or not, a LiME
            dump, a raw image with the address of its first byte (`"ram.bin@0x40000000"`, optionally
            `",offset=0x1000,size=2G"` for a part of the file and `",hole=0xd0000000:4G"` for addresses that are not in
            it), the memory file of a virtual machine (`"/dev/shm/ram,machine=q35"`, or `pc`, `microvm`, `virt`,
            `firecracker`, `cloud-hypervisor`), the file of an arena, several of these that form one memory, the image
            of a running service (`"live:search-index"`), or a `Memory` or `Arena`. Files compressed with gzip, xz,
            zstd, bzip2, lz4 or snappy, AVML files, `"-"` and pipes are read as well (`Memory.open`). If the handover in
            a raw image is complete only at one other address, it is read at that address (`Incoming.placement`);
            `",check=no"` disables this. Objects of other tools are read through them: a `Program` of drgn, a layer of
            volatility3, an open dump of libkdumpfile (`kho.readers`); any other tool with `Memory.from_reader`.
        fdt_phys: physical address of the root FDT. If it is given, the memory is not searched, and the scratch areas
            are known only if `scratch` is given too.
        page_size: 4096, 16384 or 65536; default: detected.
        bitmap_bytes: 512 (Linux 6.16 and 6.17) or the page size (6.18 and later). kho-v1 does not record it; default:
            detected.
        scratch: `(addr, size)` of each scratch area, or the physical address of the array that lists them; default:
            found by the search for the FDT.
        max_page_order: refuse to restore folios of a larger order, as Linux before 7.1 does with MAX_PAGE_ORDER.
        unpack_limit: maximum number of bytes of a decompressed file or a pipe; see `Memory.open`.
        progress: called with the number of bytes decompressed, then searched so far; an exception stops the work.

    Raises:
        SourceError: a file that is missing, empty, a directory, not a usable ELF core or dump, or of an unsupported
            format (the message names the format and the remedy); a raw image whose handover is complete at no address
            or at several addresses.
        NoHandoverError: no root FDT was found.
        UnsupportedAbiError: an ABI that this version does not decode.
        FormatError: malformed structures in memory; the message names the place and the value.

    """
    opened = source if isinstance(source, Memory | Arena) else memory_of(source)
    if opened is None:
        named = cast(str | os.PathLike[str] | Iterable[str | os.PathLike[str]], source)
        opened = memory(named, unpack_limit=unpack_limit, progress=progress)
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
        if inc.vmcoreinfo_pages or inc.vmcoreinfo("OSRELEASE"):
            _know_scratch(inc)
        inc = inc if inc.address in ("own", "named") else _checked(inc)
        _log_opened(opened, inc)
        return inc
    except (NoHandoverError, FormatError, SourceError):
        if isinstance(opened, Memory) and bare_fdt(opened) is not None:
            raise SourceError(f"{opened.sources[0]}: this is a devicetree, not memory; kho fdt prints it") from None
        raise


def _log_opened(opened: Memory | Arena, inc: Incoming) -> None:
    """Log what was opened and how it is read, to the logger `kho`, if this process uses logging at all."""
    logging = sys.modules.get("logging")  # not imported here, because commands start quickly
    if logging is not None:
        log = logging.getLogger("kho")
        if log.isEnabledFor(logging.INFO):
            where = ", ".join(opened.sources) if isinstance(opened, Memory) and opened.sources else repr(opened)
            size = f"page size {inc.page_size}, {inc.certainty}: {inc.page_size_why}"
            log.info("%s: %s, root FDT at %#x, %s", where, inc.compatible, inc.fdt_phys, size)
        for other in inc.other_roots:
            log.debug("another root FDT at %#x: %s %s", other.phys, other.state, other.why or "")


def _know_scratch(inc: Incoming) -> None:
    from .handover.symbols import know_scratch  # a dump has symbols, most sources have none

    know_scratch(inc)


def _checked(inc: Incoming) -> Incoming:
    from .handover.addresses import checked  # imports every decoder

    return checked(inc)


def bare_fdt(found: Memory) -> bytes | None:
    """Return the bytes of a devicetree if it is the only content of a file opened as memory, else None."""
    if len(found.sources) != 1 or len(found.ranges) != 1 or found.ranges[0][0] != 0:
        return None
    size = found.ranges[0][1]
    if found.machine is not None or found.absent or not FDT_HEADER <= size <= FDT_MOST:
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
    """Open a source as memory: `Memory.open`, and running services by name.

    Raises: SourceError; NotFoundError if the service does not run; BusyError.
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
