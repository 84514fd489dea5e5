"""Describes the root FDTs of other handovers that are in the same memory.

A machine that was booted by a handover has the root FDT of that one, too: its map was given back early in boot.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import errors
from .._kho import Incoming
from .._types import OtherRoot
from .absence import CUT_OFF, LEFT_OUT

__all__ = ["about_root", "about_roots"]

BOOTED = "the handover this kernel booted from"


def about_root(other: OtherRoot, own_count: int | None) -> str:
    """Describe another root FDT in the same memory.

    Args: own_count: the kexec_count of the handover that was read; None if it has none.
    """
    count = other.kexec_count
    place = f"{other.phys:#x}" if count is None else f"{other.phys:#x} (kexec {count})"
    gone = {LEFT_OUT: "left out of this dump", CUT_OFF: "cut off with the end of the file"}.get(other.state)
    if count is not None and own_count is not None and count < own_count and other.state != "unset":
        # A kernel gives the map back that it booted from, whatever the pages of it hold.
        earlier = count < own_count - 1
        return f"the root FDT at {place} is of {'an earlier handover' if earlier else BOOTED}; its map was given back"
    if other.state == "stale" or other.state == "broken":
        return f"the root FDT at {place} is of another handover, whose map is gone: a kernel that boots gives it back"
    if gone is not None:
        return f"the root FDT at {place} is of another handover, whose map was {gone}"
    if other.state == "unset":
        return f"the root FDT at {place} has no map yet: that handover was not finalized"
    return f"another handover's FDT is at {place}; read it with --fdt-phys {other.phys:#x}"


def about_roots(inc: Incoming) -> Iterator[str]:
    """Yield a line for each root FDT in the memory of a handover other than its own."""
    if inc.other_roots:
        try:
            own = inc.metadata.kexec_count
        except errors.KhoError:
            own = None
        yield from (about_root(other, own) for other in inc.other_roots)
