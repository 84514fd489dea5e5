"""The records kho hands out."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["FolioInfo", "PageInfo"]


class FolioInfo(NamedTuple):
    """A folio: `1 << order` pages from `phys`."""

    phys: int
    order: int


class PageInfo(NamedTuple):
    """What the kernel would say of a page (`struct page`)."""

    state: Literal["free", "head", "tail", "reserved"]
    """In the page allocator; the first or another page of an allocated folio; nobody's to allocate."""
    order: int | None
    """The order of the free block or folio it is in; None for a reserved page."""
    refcount: int
    """References on the folio, at its head; 0 elsewhere."""
    private: int
    """`page->private`: the KHO marker of an inherited folio's head page until it is restored, else 0."""
    node: int
    """The NUMA node of its memory."""
    head: int | None
    """Physical address of the allocated folio it is in."""
