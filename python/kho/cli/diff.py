"""`kho diff`: compare two handovers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from .. import errors
from ..handover.diff import Change, Diff, Extent, diff
from ..sources import memory
from ..sources import open as open_source
from . import output

SHOWN = 8
"""Maximum extents listed per order and side without --all."""
ADDRESSES = ("phys", "fdt_phys", "preserved_memory_map")


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--all", "everything", is_flag=True, help=f"List every extent, not only the first {SHOWN} of an order.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; addresses are integers.")
def command(a: str, b: str, everything: bool, as_json: bool) -> None:
    """Show the differences between the handovers in A and B.

    Compares ABI and sizes, scratch areas, folios by order as address ranges, and subtrees, sessions, files and
    reserve_mem regions with their contents. A line with < belongs to A, one with > to B. Contents that one of two dumps
    does not have are not compared, and are listed on stderr.

    \b
    Exit codes: 0 the same, 1 different, 2 one of them is not readable.
    """
    opened = []
    for source in (a, b):
        with output.progress(f"searching {source}") as told:
            try:
                there = memory(source, progress=told)
                with output.noting_cuts(there):
                    opened.append(open_source(there, progress=told))
            except errors.KhoError as error:
                raise type(error)(f"{source}: {error}") from error
        output.note_opened(opened[-1])
    with output.progress("comparing") as told:
        found = diff(*opened, progress=told)
    if as_json:
        output.print_json(found.as_dict())
    else:
        for line in lines(found, SHOWN if not everything else None):
            output.line(line)
        for name in found.uncompared:
            output.line(f"not compared, not in the dump: {name}", err=True)
    sys.exit(1 if found else 0)


def lines(found: Diff, most: int | None = None) -> Iterator[str]:
    """Yield the lines of a difference, none if there is no difference; at most `most` extents per order and side."""
    for name, pair in found.facts.items():
        yield f"{name}: {value(name, pair[0])} -> {value(name, pair[1])}"
    if found.scratch:
        yield "scratch:"
        for sign, areas in zip("<>", found.scratch, strict=True):
            for addr, nbytes in areas or []:
                yield f"  {sign} {addr:#x} {output.size(nbytes)}"
            if areas is None:
                yield f"  {sign} not known"
    for change in found.folios:
        yield f"folios of order {change.order} ({output.size(found.page_size << change.order)}):"
        for sign, extents, more in (("<", change.only_a, change.more_a), (">", change.only_b, change.more_b)):
            yield from folio_lines(sign, extents, most)
            if more:
                yield f"  {sign} {more} more folios are not listed"
    for heading, changes in (
        ("subtrees", found.subtrees),
        ("reserve_mem", found.reserve_mem),
        ("sessions", found.sessions),
        ("files", found.files),
    ):
        if changes:
            yield f"{heading}:"
        for one in changes:
            yield from change_lines(one)


def folio_lines(sign: str, extents: list[Extent], most: int | None) -> Iterator[str]:
    """Yield a line per run of folios, then the number of runs not listed."""
    for phys, nbytes, folios in extents[:most]:
        yield f"  {sign} {phys:#x}-{phys + nbytes:#x}  {folios} folio{'s' * (folios != 1)}"
    rest = [] if most is None else extents[most:]
    if rest:
        yield f"  {sign} {sum(extent.folios for extent in rest)} folios in {len(rest)} more places (--all lists them)"


def change_lines(change: Change) -> Iterator[str]:
    """Yield the lines of one change: its name, then its changed properties."""
    name = change.name
    if change.side != "changed":
        index = 0 if change.side == "removed" else 1
        size = change.facts.get("size", (None, None))[index]
        yield f"  {'<>'[index]} {name}" + ("" if size is None else f", {size} bytes")
        return
    said = [f"{key} {value(key, pair[0])} -> {value(key, pair[1])}" for key, pair in change.facts.items()]
    content = change.content
    if content is None:
        yield f"    {name}: {'; '.join(said)}"
        return
    said.append(f"contents differ from offset {content.offset:#x} on, in {content.nbytes} bytes of the common size")
    yield f"    {name}: {'; '.join(said)}"
    for sign, digest in zip("<>", content.sha256, strict=True):
        yield f"      {sign} sha256 {digest or 'not computed: the holes are too large'}"


def value(name: str, it: Any) -> str:
    """Format a value: addresses in hex, None as `none`."""
    if it is None:
        return "none"
    return f"{it:#x}" if name in ADDRESSES and isinstance(it, int) else str(it)
