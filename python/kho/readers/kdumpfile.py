"""libkdumpfile: a dump that it has open, with the bindings of 0.5.1 (Debian 12) or with pykdumpfile 0.5.5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import kdumpfile

from .. import errors
from .._kho import Memory

__all__ = ["memory"]

NO_DATA = tuple(
    getattr(kdumpfile, name, None) or getattr(kdumpfile.exceptions, name)
    for name in ("NoDataException", "NoDataError")
    if hasattr(kdumpfile, name) or hasattr(kdumpfile.exceptions, name)
)
"""The exception for a page that is not in the dump, in the bindings that are installed."""
SPACE = kdumpfile.KDUMP_MACHPHYSADDR if hasattr(kdumpfile, "KDUMP_MACHPHYSADDR") else kdumpfile.MACHPHYSADDR
"""The address space of machine-physical addresses."""


def memory(context: object, ranges: Iterable[tuple[int, int]] | None = None) -> Memory:
    """Make a memory of an open dump.

    Args:
        context: a `kdumpfile.kdumpfile` or a `kdumpfile.Context`.
        ranges: (phys, nbytes) of the memory in it. By default what the map of its pages has.

    Raises: ParameterError for another object, and without `ranges` and a map of pages.

    """
    dump: Any = context
    if not hasattr(dump, "read") or not hasattr(dump, "attr"):
        raise errors.ParameterError(f"a {type(dump).__name__} of libkdumpfile is no memory: an open dump is")

    def read(phys: int, n: int) -> Any:
        try:
            return dump.read(SPACE, phys, n)
        except NO_DATA as error:
            raise errors.LeftOutError(f"memory at {phys:#x} (+{n:#x}): {error}") from error

    return Memory.from_reader(read, _ranges(dump) if ranges is None else ranges, vmcoreinfo=_vmcoreinfo(dump))


def _ranges(dump: Any) -> list[tuple[int, int]]:
    """Return the runs of pages that the dump has."""
    try:
        pages, size = dump.attr["memory"]["pagemap"], dump.attr["arch"]["page_size"]
    except KeyError as error:
        raise errors.ParameterError(
            f"libkdumpfile does not know its pages ({error}): give them to kho.readers.kdumpfile.memory(dump, ranges)"
        ) from error
    return [(first * size, (end - first) * size) for first, end in _runs(pages)]


def _runs(pages: Any) -> Iterator[tuple[int, int]]:
    """Yield the runs of set bits, as (first, end)."""
    at = 0
    while True:
        try:
            first = pages.find_set(at)
        except NO_DATA:
            return
        at = pages.find_clear(first)
        if at <= first:  # a bitmap that changes under the search
            return
        yield first, at


def _vmcoreinfo(dump: Any) -> bytes | None:
    """Return VMCOREINFO; None without it."""
    try:
        raw = dump.attr["linux"]["vmcoreinfo"]["raw"]
    except KeyError:
        return None
    if isinstance(raw, bytes):
        return raw
    if isinstance(raw, str):
        return raw.encode("latin-1")
    return bytes(raw.get()) if hasattr(raw, "get") else bytes(raw)
