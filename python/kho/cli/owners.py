"""`kho owners`: list the owner of each preserved page."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import click

from .._kho import Incoming, Snapshot
from .._types import OwnedRange
from ..handover.absence import CUT_OFF, LEFT_OUT, map_line
from ..handover.owners import Owners, owners, why_outside
from ..handover.running import UnreadableError, shown_ranges
from ..text import UNFINALIZED
from . import output
from .options import read_unmarked, source_options


@click.command("owners")
@source_options
@click.option("--by-page", is_flag=True, help="One row for each page instead of one for each range.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; addresses are integers.")
def command(source: tuple[str, ...], by_page: bool, as_json: bool, **options: int | None) -> None:
    """List the owner of each preserved page in SOURCE.

    An owner is the root FDT, a subtree's blob, a LUO block, a file of a session (with the offset in the file), a page
    list, a reserve_mem region, kho_test, or a memfd that no session lists; pages that nothing refers to are listed as
    unknown. Ranges that the dump does not have, or not all of, are marked: left out by its filter, or cut off. After
    that come the ranges that are referred to but not preserved, and ranges with two owners. SOURCE is anything `kho
    inspect` takes. Of "live", the running machine, it is what /proc/kcore holds; without permission for that (root),
    the addresses that the FDTs in debugfs name.

    \b
    Exit codes: 0 everything referred to is preserved, 1 some is not, or has two owners, 2 no handover or not readable.
    """
    try:
        inc = read_unmarked(source, **options)
    except UnreadableError as error:
        show_debugfs(source[0], str(error), as_json=as_json)
        return
    found = owners(inc)
    if as_json:
        print_json(inc, found, by_page=by_page)
    else:
        show(inc, found, by_page=by_page)
    if found.unpreserved or found.shared:
        sys.exit(1)


def show_debugfs(source: str, why: str, *, as_json: bool) -> None:
    """Print what the FDTs in debugfs name. Raises: SourceError if it cannot be read, either."""
    rows = shown_ranges(Snapshot.open(source))
    output.line(f"note: {why}; this is what debugfs shows: no folios, no files", err=True)
    if as_json:
        output.print_json({"source": "debugfs", "why": why, "rows": [row._asdict() for row in rows]})
        return
    table = output.table("address", ">size", "owner")
    for row in rows:
        table.add(f"{row.phys:#x}", output.size(row.nbytes), owner_and_part(row))
    table.show()


def ranges(inc: Incoming, found: Owners, *, by_page: bool) -> Iterator[OwnedRange]:
    """Yield one row per range or, with `by_page`, one per page.

    Ranges are not split after `inc.room("items")` pages, the number that an image of this size can plausibly hold:
    one bit of a malformed map stands for up to 2^36 pages.
    """
    left = inc.room("items") if by_page else 0
    for row in islice(found.rows, inc.room("items")):
        left -= row.nbytes // inc.page_size
        if not by_page or left < 0:
            yield row
            continue
        for at in range(0, row.nbytes, inc.page_size):
            offset = None if row.offset is None else row.offset + at
            yield row._replace(phys=row.phys + at, nbytes=inc.page_size, offset=offset)


def absent(inc: Incoming, row: OwnedRange) -> dict[str, int]:
    """Return the bytes of a range that are not in the dump, by reason; empty if all are there."""
    left_out, cut_off = inc.absent_bytes(row.phys, row.nbytes)
    return {why: nbytes for why, nbytes in ((LEFT_OUT, left_out), (CUT_OFF, cut_off)) if nbytes}


def mark(inc: Incoming, row: OwnedRange) -> str:
    """Mark a range that is not in the dump: `  (left out)`, `  (4.0 KiB cut off)`."""
    found = absent(inc, row)
    marks = (why if nbytes >= row.nbytes else f"{output.size(nbytes)} {why}" for why, nbytes in found.items())
    return f"  ({', '.join(marks)})" if found else ""


def as_dict(inc: Incoming, row: OwnedRange, *, partly: bool) -> dict[str, Any]:
    """Return a row for JSON; with `partly`, the bytes that the dump does not have too."""
    if not partly:
        return row._asdict()
    found = absent(inc, row)
    return row._asdict() | {"left_out": found.get(LEFT_OUT, 0), "cut_off": found.get(CUT_OFF, 0)}


def left_out(inc: Incoming, found: Owners) -> int:
    """Return the number of ranges not printed: those beyond what an image of this size can plausibly hold."""
    return max(len(found.rows) - inc.room("items"), 0) + found.more_rows


def print_json(inc: Incoming, found: Owners, *, by_page: bool) -> None:
    """Print as JSON, one line per row, as there may be millions of rows."""
    head: dict[str, Any] = {
        "compatible": inc.compatible,
        "read_as": inc.abi.compatible,
        "unverified": found.unverified,
        "preserved_bytes": None if found.map_lost else inc.preserved_bytes,
        "totals": found.totals,
        "why_unowned": found.why_unowned if found.unowned else None,
        "unpreserved": (row._asdict() for row in found.unpreserved),
        "shared": (row._asdict() for row in found.shared),
        "unlisted_memfds": [
            {"phys": f.blob.phys, "compatible": f.compatible, "size": f.size, "in_map": f.in_map}
            for f in found.unlisted
        ],
        "refused_memfds": [{"phys": phys, "error": error} for phys, error in found.refused],
    }
    if found.more_unpreserved or found.more_shared:
        head |= {"more_unpreserved": found.more_unpreserved, "more_shared": found.more_shared}
    if left := left_out(inc, found):
        head["more_rows"] = left
    partly = any(inc.absent_bytes())
    rows = (as_dict(inc, row, partly=partly) for row in ranges(inc, found, by_page=by_page))
    output.print_json_rows(head, "rows", rows)


def show(inc: Incoming, found: Owners, *, by_page: bool) -> None:
    """Print as text: every range, totals by owner, then unpreserved ranges and ranges with two owners."""
    output.doubts(found.unverified)
    line = "{:<16}  {:>10}  {:<7}  {}"
    hang, width = len(line.format("", "", "", "")), output.line_width()
    rows = (
        folded
        for row in ranges(inc, found, by_page=by_page)
        for folded in output.folded(
            line.format(f"{row.phys:#x}", output.size(row.nbytes), orders(row), owner_and_part(row) + mark(inc, row)),
            hang,
            width,
        )
    )
    output.lines(chain([line.format("address", "size", "orders", "owner")], rows), limit=output.LINE)
    if left := left_out(inc, found):
        output.line(f"and {left} more ranges; kho.owners.owners() lists all")
    output.line()
    if found.map_lost:
        output.line(("Referred to", "bold"), f", by owner; {map_line(*found.map_lost)}, which tells what is preserved")
    else:
        why = "" if inc.finalized else f"; {UNFINALIZED}"
        output.line(("Preserved", "bold"), f": {output.size(inc.preserved_bytes)}{why}")
    totals = output.table("owner", ">bytes")
    for owner, nbytes in found.totals.items():
        totals.add(owner, output.size(nbytes))
    totals.show()
    if found.unowned:
        output.line()
        output.line(f"{len(found.unowned)} ranges have no owner: {found.why_unowned}")
    for file in found.unlisted:
        if not file.in_map:
            why = why_outside(finalized=inc.finalized, lost=found.map_lost is not None)
            output.line(f"{file.blob.owner}: {output.size(file.size)}, {why}; kho extract --memfd")
    for phys, error in found.refused:
        output.line(f"memfd at {phys:#x}, found by its content, is not read: {error}")
    for row in found.unpreserved:
        what = f"{row.phys:#x}: {output.size(row.nbytes)} of {owner_and_part(row)} are not preserved"
        output.line(("not preserved", "bold red"), f" at {what}")
    for shared in found.shared:
        both = f"{', '.join(shared.first)}; {', '.join(shared.second)}"
        what = f" at {shared.phys:#x}: {output.size(shared.nbytes)}: {both}"
        output.line(("two owners", "bold red"), what)
    for what, more in (("not preserved", found.more_unpreserved), ("two owners", found.more_shared)):
        if more:
            output.line((what, "bold red"), f": {more} more places")


def orders(row: OwnedRange) -> str:
    """Format the orders of a row: `0`, `0-3`, `0,9`."""
    if len(row.orders) > 2 and row.orders[-1] - row.orders[0] == len(row.orders) - 1:
        return f"{row.orders[0]}-{row.orders[-1]}"
    return ",".join(map(str, row.orders))


def owner_and_part(row: OwnedRange) -> str:
    """Format owner and part: `session vm-1, file 0x10: data at 0x4000`."""
    offset = "" if row.offset is None else f" at {row.offset:#x}"
    return f"{row.owner}: {row.what}{offset}"
