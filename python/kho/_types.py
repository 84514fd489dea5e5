"""Small values that the compiled half returns."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FolioInfo"]


class FolioInfo(NamedTuple):
    """A folio: where it starts and how large it is.

    `phys` is its physical address in bytes, `order` the log2 of its size in pages.
    """

    phys: int
    order: int
