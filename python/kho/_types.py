"""Record types in results of kho."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["SEVERITIES", "FolioInfo", "MemfdFolio", "OtherRoot", "OwnedRange", "PageInfo", "Placement", "Severity"]


Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Severities of findings, the most severe first."""


class FolioInfo(NamedTuple):
    """A folio: `1 << order` pages from `phys` on.

    Fields:
        phys: physical address of its head page.
        order: log2 of its number of pages.
    """

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
    """Consecutive pages of one owner.

    Fields:
        phys: physical address of the first.
        nbytes: bytes of all of them.
        orders: the orders of the preserved folios that hold them; empty for pages that are not preserved.
        owner: `session vm-1, file 0x10`, for example; `unknown` for pages without an owner.
        what: their part in the owner: `data`, `folio list`.
        offset: where in the owner's file or area they begin, in bytes; None if they are not a part of one.
    """

    phys: int
    nbytes: int
    orders: tuple[int, ...]
    owner: str
    what: str
    offset: int | None


class OtherRoot(NamedTuple):
    """A root FDT in a memory, next to the one of the handover that was read.

    Fields:
        phys: its physical address.
        state: whole: its map can be read; stale: the map's pages hold something else by now; unset: its map pointer is
            0, nothing was serialized; broken: the map or the FDT cannot be read; left out, cut off: a part of the map
            is not in the dump; unread: there are too many roots.
        why: of a broken one, the error; else None.
        kexec_count: handovers before the kernel that it is for, from its kexec-metadata; None without.
    """

    phys: int
    state: Literal["whole", "stale", "unset", "broken", "left out", "cut off", "unread"]
    why: str | None
    kexec_count: int | None


class Placement(NamedTuple):
    """Where a raw image was read whose handover is not whole where it was named.

    Fields:
        argument: the source that names this address: `ram.bin@0x40000000`.
        named: the source as it was named.
        as_is: the source that reads it as it was named, whatever is there: `ram.bin@0x0,check=no`.
        certainty: certain: the handover is whole at no other address; likely: it is whole at others as well, but the
            memory that differs is blank there.
        why: how the address was decided, as text.
    """

    argument: str
    named: str
    as_is: str
    certainty: str
    why: str


class PageInfo(NamedTuple):
    """The state of a page, as the kernel's `struct page` has it.

    Fields:
        state: `free`: in the page allocator, or freed and waiting for the end of a view; `head` or `tail`: the first or
            another page of an allocated folio; `reserved`: not to be allocated.
        order: the order of the free block or folio that it is in; None for a reserved page.
        refcount: references on the folio, at its head; 0 elsewhere.
        private: `page->private`: the KHO marker of an inherited folio's head page until it is restored, else 0.
        node: the NUMA node of its memory.
        head: physical address of the allocated folio that it is in, else None.
    """

    state: Literal["free", "head", "tail", "reserved"]
    order: int | None
    refcount: int
    private: int
    node: int
    head: int | None
