"""Flattened devicetrees: what a handover's root, and many a subtree, is stored in.

The reader takes any bytes without harm; the writer's bytes equal those of libfdt's sequential writer. Values are in
native byte order, as KHO writes them, while the format's own words are big-endian.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kho._kho import Fdt
from kho._kho import FdtNode as Node
from kho._kho import FdtPlaceholder as Placeholder
from kho._kho import FdtWriter as Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Fdt", "Node", "Placeholder", "Writer", "parse"]


def parse(blob: Buffer) -> Fdt:
    """Read a blob strictly: `Fdt(blob)`. See `Fdt.partial` for one that is cut short.

    Raises: FdtError with the offset of the first thing that is wrong.
    """
    return Fdt(blob)
