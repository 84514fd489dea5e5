"""drgn: the physical memory of a program that is a kernel, read with `Program.read(physical=True)`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from drgn import FaultError, Program

from .. import errors
from .._kho import Memory

__all__ = ["memory"]

IOMEM_MOST = 1 << 16
"""Maximum number of resources that are followed: the list is memory of a kernel that may be damaged."""


def memory(prog: object, ranges: Iterable[tuple[int, int]] | None = None) -> Memory:
    """Make a memory of a drgn program: a vmcore, the running kernel, a kernel read over QMP, or segments of your own.

    Args:
        prog: the `drgn.Program`.
        ranges: (phys, nbytes) of its RAM. By default those of the core dump, or of the kernel's `iomem_resource`, which
            needs debugging information.

    Raises: ParameterError if the ranges are not given and not known.

    """
    if not isinstance(prog, Program):
        raise errors.ParameterError(f"a {type(prog).__name__} of drgn is no memory: its Program is")

    def read(phys: int, n: int) -> bytes:
        try:
            found: bytes = prog.read(phys, n, physical=True)
        except FaultError as error:
            raise errors.LeftOutError(f"memory at {phys:#x} (+{n:#x}): {error}") from error
        return found

    return Memory.from_reader(read, _ranges(prog) if ranges is None else ranges, vmcoreinfo=_vmcoreinfo(prog))


def _ranges(prog: Program) -> list[tuple[int, int]]:
    """Return the ranges of RAM, from the core dump or from the kernel's list of resources."""
    path = prog.core_dump_path
    if path is not None:
        with contextlib.suppress(errors.KhoError):
            return Memory.open(os.fspath(path)).ranges
    try:
        return list(_iomem(prog))
    except (LookupError, FaultError, ValueError) as error:
        raise errors.ParameterError(
            f"the ranges of its memory are not known ({error}): give them to kho.readers.drgn.memory(prog, ranges)"
        ) from error


def _iomem(prog: Program) -> Iterator[tuple[int, int]]:
    """Yield the "System RAM" of `iomem_resource`."""
    from drgn.helpers.linux.ioport import for_each_resource

    for _, resource in zip(range(IOMEM_MOST), for_each_resource(prog["iomem_resource"].address_of_()), strict=False):
        name = resource.name.read_() if not hasattr(resource.name, "string_") else resource.name.string_()
        if name == b"System RAM":
            start = resource.start.value_()
            yield start, resource.end.value_() - start + 1


def _vmcoreinfo(prog: Program) -> bytes | None:
    """Return VMCOREINFO, which drgn has as an object of its own; None if it does not show it."""
    try:
        found = prog["VMCOREINFO"].string_()
    except (LookupError, FaultError, TypeError, ValueError):
        return None
    return found if isinstance(found, bytes) else None
