"""Record types in results of kho."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["SEVERITIES", "FolioInfo", "MemfdFolio", "OwnedRange", "PageInfo", "Placement", "Severity"]


Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Severities of findings, the most severe first."""


class FolioInfo(NamedTuple):
    """A folio: `1 << order` pages from `phys`."""

    phys: int
    order: int


@dataclass(frozen=True, slots=True)
class MemfdFolio:
    """A folio of a preserved memfd (`struct memfd_luo_folio_ser`)."""

    phys: int
    order: int
    """Order with which the folio is preserved."""
    index: int
    """Offset in the file, in pages."""
    flags: int
    """Bit 0: dirty; bit 1: up to date. A folio that is not up to date reads as zeros."""


class OwnedRange(NamedTuple):
    """Consecutive pages of one owner."""

    phys: int
    nbytes: int
    orders: tuple[int, ...]
    """Orders of the preserved folios that contain them; empty if not preserved."""
    owner: str
    """The owner: `session vm-1, file 0x10`; `unknown` for pages that nothing refers to."""
    what: str
    """The part of the owner: `data`, `folio list`."""
    offset: int | None
    """Offset in the owner's file or area, in bytes; None if they are not part of one."""


class Placement(NamedTuple):
    """Address of a raw image that is not complete at the given address, and was read at another one."""

    argument: str
    """The source with the address that was used: `ram.bin@0x40000000`."""
    named: str
    """The source as given."""
    as_is: str
    """The source that forces the given address: `ram.bin@0x0,check=no`."""
    certainty: str
    """certain: complete at no other address; likely: complete at others too, but there the difference is blank."""
    why: str
    """The reason for the decision."""


class PageInfo(NamedTuple):
    """State of a page, as the kernel's `struct page` describes it."""

    state: Literal["free", "head", "tail", "reserved"]
    """free: in the page allocator, or freed and waiting for the end of a view; head, tail: first or other page of an
    allocated folio; reserved: never allocated."""
    order: int | None
    """Order of the free block or folio that contains it; None for a reserved page."""
    refcount: int
    """References on the folio, for its head page; else 0."""
    private: int
    """`page->private`: for the head page of an inherited folio, the KHO marker until it is restored; else 0."""
    node: int
    """NUMA node of its memory."""
    head: int | None
    """Physical address of the allocated folio that contains it."""
