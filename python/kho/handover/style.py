"""What an `Outgoing` writes: the formats that belong to an ABI, or those of one kernel."""

from __future__ import annotations

from typing import NamedTuple

from .. import _kho
from ..errors import ParameterError
from ..kernels import known_kernel

__all__ = ["Style", "style_of"]

DEFAULT_ABI = "kho-v1"
"""What an `Outgoing` writes unless it is told: the version of the earliest kernels with KHO."""


class Style(NamedTuple):
    """The formats that an `Outgoing` writes, and whose they are."""

    abi: str
    bitmap_bytes: int | None
    """Of a chunk list, None for the newest size."""
    edited_root: bool
    """Whether the root FDT of a chunk list is written at the start and edited, with map 0 until `finalize`."""
    luo: str | None
    flb_node: bool
    """Whether LUO's FDT has a node for FLBs."""
    memfd: str | None
    kexec_metadata: bool
    inline_test: bool
    """Whether kho_test lists its folios in the FDT itself."""
    whose: str
    """The kernels that read it, for messages: "the kernels of kho-v1", "Linux 7.0"."""


def style_of(abi: str | None, kernel: str | None, bitmap_bytes: int | None, page_size: int) -> Style:
    """Choose the formats of a handover.

    Args: kernel: the release that is to read it, as `Release.parse` takes it. All point releases of a series write the
        same.
    Raises: ParameterError for a release without KHO or after the last one known, or if `abi` or `bitmap_bytes` is not
        what that kernel writes.
    """
    if kernel is None:
        name = DEFAULT_ABI if abi is None else abi
        row = _kho.abis(drafts=True).get(name)  # an unknown ABI is refused by `_kho.Outgoing`
        luo, memfd = (None, None) if row is None else (row.luo, row.memfd)
        return Style(name, bitmap_bytes, False, luo, True, memfd, True, False, f"the kernels of {name}")
    found = known_kernel(kernel)
    theirs = found.bitmap_bytes(page_size)
    if abi is not None and abi != found.abi:
        raise ParameterError(
            f"abi={abi!r} and kernel={kernel!r}: Linux {found.name} writes {found.abi}; give one of both"
        )
    if bitmap_bytes is not None and bitmap_bytes != theirs:
        writes = f"{found.abi} without bitmaps" if theirs is None else f"bitmaps of {theirs}"
        raise ParameterError(
            f"bitmap_bytes={bitmap_bytes} and kernel={kernel!r}: Linux {found.name} writes {writes}; give one of both"
        )
    return Style(
        found.abi,
        theirs,
        found.edits_root,
        found.luo,
        found.flbs,
        found.memfd,
        found.kexec_metadata,
        found.kho_test == "array",
        f"Linux {found.name}",
    )
