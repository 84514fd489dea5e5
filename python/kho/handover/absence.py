"""What of a machine's memory, and of its handover, a dump does not have.

A page is in the file, left out by the filter that wrote the dump (makedumpfile's levels), cut off with the end of the
file, or not RAM. The second and third kind are counted here and described once, in the words that every command uses.

>>> [line for line in absence(kho.open("vmcore.d31")).lines()]
['188416 pages, 736.0 MiB, were left out of this dump: level 31 = zero, cache, user, free pages; ...']
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .. import errors
from .._kho import Incoming
from ..sizes import format_size

__all__ = [
    "CUT_OFF",
    "LEFT_OUT",
    "NOT_IN_DUMP",
    "Absence",
    "absence",
    "dump_facts",
    "level_names",
    "map_line",
    "require_map",
    "why_absent",
]

LEFT_OUT = "left out"
CUT_OFF = "cut off"
NOT_IN_DUMP = "not in the dump"
REMEDY = (
    "a dump of makedumpfile -d 17 (or -d 1) keeps the contents, and so does running kho in the kdump kernel on "
    "/proc/vmcore before makedumpfile"
)
"""How to get what a filter left out."""
COPY = "copy the whole file again, or take the dump again with more room"
USER = 8
"""The bit of a level that leaves out pages of user space."""
COMPOUND = (7, 1)
"""The first Linux whose compound pages makedumpfile up to 1.7.9 misreads."""


@dataclass(frozen=True)
class Absence:
    """Bytes of a machine's memory that are not in its dump, and how many preserved pages are among them."""

    page_size: int
    level: int | None
    """The filter's level (makedumpfile's -d); None if the dump names none."""
    left_out: int
    """Bytes of memory that were left out."""
    cut_off: int
    """Bytes of memory that the end of the file cut off, as far as its headers name them."""
    cut_files: tuple[str, ...]
    """The files that are cut off."""
    preserved_left_out: int | None
    """Preserved pages among `left_out`; None if the map that has them is not in the dump."""
    preserved_cut_off: int | None
    second_pages: int
    """Folios whose second page alone was left out."""
    release: str | None
    """OSRELEASE of VMCOREINFO."""
    map_page: tuple[int, str] | None
    """The page of the map that is not in the dump, and why: `Incoming.map_lost`."""

    def __bool__(self) -> bool:
        return bool(self.left_out or self.cut_files)

    @property
    def compound_fault(self) -> bool:
        """Whether makedumpfile dropped the second pages of compound pages of Linux 7.1 and later, as up to 1.7.9."""
        return bool(self.second_pages) and self._may_be_compound_fault(known=False)

    def _may_be_compound_fault(self, *, known: bool) -> bool:
        """Whether level and release are those of the fault; with `known`, not if the release is not known."""
        found = re.match(r"(\d{1,4})\.(\d{1,4})", self.release or "")
        release = (int(found[1]), int(found[2])) if found else None
        user = self.level is None or self.level & USER
        return bool(user) and (not known if release is None else release >= COMPOUND)

    def lines(self) -> Iterator[str]:
        """Yield a line each: for a file that is cut off, what was left out, the map, and the fault of makedumpfile."""
        if self.cut_files:
            yield f"{', '.join(self.cut_files)}: {self.cut_line()}; {COPY}"
        if self.left_out:
            remedy = "" if self.preserved_left_out == 0 else f"; {REMEDY}"
            yield f"{self.left_out_line()}{remedy}"
        if self.map_page is not None:
            yield self.map_line()
        if self.compound_fault:
            yield self.compound_line()

    def cut_line(self) -> str:
        """Say how much is missing because the file is cut off."""
        text = "the file ends before what its headers promise: it is cut off"
        if not self.cut_off:
            return f"{text}, and how much memory is missing is not known"
        return f"{text}, and {self._pages(self.cut_off)} of memory are missing; {self._of(self.preserved_cut_off)}"

    def left_out_line(self) -> str:
        """Say how much was left out."""
        level = "" if self.level is None else f": level {self.level} = {level_names(self.level)}"
        return f"{self._pages(self.left_out)} were left out of this dump{level}; {self._of(self.preserved_left_out)}"

    def map_line(self) -> str:
        """Say which page of the map is not in the dump, and what follows from that."""
        assert self.map_page is not None
        _, why = self.map_page
        cause = ""
        if why == LEFT_OUT and self._may_be_compound_fault(known=True):
            cause = (
                "; unless a kernel that booted from it gave it back, makedumpfile up to 1.7.9 dropped it, as it does "
                "with Linux 7.1 and later at level 8 and above: take the dump with a later one, or with -d 17"
            )
        return f"{map_line(*self.map_page)}: which memory is preserved is not known, the rest is shown{cause}"

    def compound_line(self) -> str:
        """Say that makedumpfile dropped pages that it should have kept."""
        return (
            f"{self.second_pages} preserved folios lack their second page alone: makedumpfile up to 1.7.9 drops it of "
            "every compound page of Linux 7.1 and later at level 8 and above; take the dump with a later makedumpfile, "
            "or with -d 17"
        )

    def _pages(self, nbytes: int) -> str:
        count = -(-nbytes // self.page_size)
        return f"{count} page{'s' * (count != 1)}, {format_size(nbytes)}"

    def _of(self, pages: int | None) -> str:
        if pages is None:
            return "how much of it is preserved memory is not known"
        if not pages:
            return "no preserved memory is among them"
        return f"{pages} of them ({format_size(pages * self.page_size)}) are preserved memory of the handover"

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "level": self.level,
            "left_out_bytes": self.left_out,
            "cut_off_bytes": self.cut_off,
            "cut_files": list(self.cut_files),
            "preserved_pages_left_out": self.preserved_left_out,
            "preserved_pages_cut_off": self.preserved_cut_off,
            "compound_pages_without_their_second": self.second_pages if self.compound_fault else 0,
        }


def map_line(phys: int, why: str) -> str:
    """Say that a page of the map is not in the dump. Args: `Incoming.map_lost`."""
    end = "was left out of this dump" if why == LEFT_OUT else "is cut off with the end of the file"
    return f"the map's page at {phys:#x} {end}"


def require_map(inc: Incoming, what: str) -> None:
    """Raise LeftOutError or CutOffError if a page of the map is not in the dump; `what` cannot be done without it."""
    if inc.map_lost is not None:
        error = errors.LeftOutError if inc.map_lost[1] == LEFT_OUT else errors.CutOffError
        raise error(f"{map_line(*inc.map_lost)}: which memory is preserved is not known; {what}")


def absence(inc: Incoming) -> Absence:
    """Count what the dump of a handover does not have."""
    left_out, cut_off = inc.absent_bytes()
    preserved_left_out, preserved_cut_off, second_pages = (None, None, 0) if inc.map_lost else inc.count_absent()
    return Absence(
        page_size=inc.page_size,
        level=inc.dump_level,
        left_out=left_out,
        cut_off=cut_off,
        cut_files=tuple(map(os.fsdecode, inc.cut_files)),
        preserved_left_out=preserved_left_out,
        preserved_cut_off=preserved_cut_off,
        second_pages=second_pages,
        release=inc.vmcoreinfo("OSRELEASE"),
        map_page=inc.map_lost,
    )


def level_names(level: int) -> str:
    """Name what a level of makedumpfile leaves out: `zero, cache, user, free pages`."""
    cache = "cache" if level & 2 else "private cache" if level & 4 else None
    names = ("zero" if level & 1 else None, cache, "user" if level & USER else None, "free" if level & 16 else None)
    return f"{', '.join(filter(None, names)) or 'no'} pages"


def why_absent(error: BaseException | None) -> str | None:
    """Return `left out` or `cut off` if an error says that memory is not in the dump, else None."""
    match error:
        case errors.LeftOutError():
            return LEFT_OUT
        case errors.CutOffError():
            return CUT_OFF
        case _:
            return None


def dump_facts(inc: Incoming) -> dict[str, Any]:
    """Return what the dump says of itself: release and time of the crash of VMCOREINFO, and the filter's level."""
    facts: dict[str, Any] = {}
    if release := inc.vmcoreinfo("OSRELEASE"):
        facts["release"] = release
    seconds = inc.vmcoreinfo("CRASHTIME") or ""
    if seconds.isdecimal() and len(seconds) < 12:
        facts["crash_time"] = datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if inc.dump_level:
        facts["level"] = inc.dump_level
    return facts
