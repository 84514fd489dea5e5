"""The records kho hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["SEVERITIES", "FolioInfo", "MemfdFolio", "OwnedRange", "PageInfo", "Placement", "Severity"]


Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Of what a rule finds, the worst first."""


class FolioInfo(NamedTuple):
    """A folio: `1 << order` pages from `phys`."""

    phys: int
    order: int


@dataclass(frozen=True, slots=True)
class MemfdFolio:
    """A folio of a preserved memfd (`struct memfd_luo_folio_ser`, abi.md section 6).

    Read from the list of a memfd (`inc.luo.sessions["vm-1"].files[0x10].folios`), and taken by `Outgoing.add_memfd` for
    files with holes, and for folios with flags of their own.

    Fields:
        phys: physical address of its head page.
        order: log2 of its number of pages, with which it was preserved.
        index: its place in the file, in pages.
        flags: 1 dirty, 2 up to date; a folio that is not up to date reads as zeros.
    """

    phys: int
    order: int
    index: int
    flags: int


class OwnedRange(NamedTuple):
    """Consecutive pages of one owner."""

    phys: int
    nbytes: int
    orders: tuple[int, ...]
    """The orders of the preserved folios that hold them; none for what is not preserved."""
    owner: str
    """Whose they are: `session vm-1, file 0x10`; `unknown` for pages nobody claims."""
    what: str
    """What of it: `data`, `folio list`."""
    offset: int | None
    """Where in the owner's file or area they begin, in bytes, when they are part of one."""


class Placement(NamedTuple):
    """Where a raw image was read that is not whole where it was named."""

    argument: str
    """The source that names this address: `ram.bin@0x40000000`."""
    named: str
    """The source as it was named."""
    as_is: str
    """The source that reads it as it was named, whatever is there: `ram.bin@0x0,check=no`."""
    certainty: str
    """certain: at no other address is it whole; likely: at others as well, but what differs is blank there."""
    why: str
    """How it was decided."""


class PageInfo(NamedTuple):
    """What the kernel would say of a page (`struct page`)."""

    state: Literal["free", "head", "tail", "reserved"]
    """In the page allocator, or freed and waiting there for the end of a view; the first or another page of an
    allocated folio; not to be allocated."""
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
