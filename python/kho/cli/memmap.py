"""`kho map`: draw a handover by address."""

from __future__ import annotations

from pathlib import Path

import click

from .._kho import Snapshot
from ..handover import mapdraw
from ..handover.memmap import KINDS, MemoryMap, Row, build, lay_out, spans_shown
from ..handover.running import UnreadableError, is_running, shown_ranges
from ..sizes import PAGE_SIZES
from ..sources import memory
from ..text import printable, size
from . import output
from .options import Number, read, read_running, source_options

STYLES = {
    "file": "green",
    "region": "yellow",
    "payload": "cyan",
    "metadata": "magenta",
    "unclaimed": "bold red",
    "scratch": "blue",
}
SHADES = {"utf": "\u2591\u2592\u2593\u2588", "ascii": ".:+#"}
SCRATCH = {"utf": "\u2571", "ascii": "/"}
RAM = {"utf": "\u00b7", "ascii": "_"}


@click.command("map")
@source_options
@click.option(
    "-o", "--output", "target", type=click.Path(), metavar="FILE", help="Write FILE.svg, FILE.html or FILE.png."
)
@click.option("--row", type=Number(), metavar="N", help="Bytes in a line, a power of two; else as few as fit 32 lines.")
@click.option("--json", "as_json", is_flag=True, help="Print owners with their addresses as data.")
def command(source: tuple[str, ...], target: str | None, row: int | None, as_json: bool, **options: int | None) -> None:
    """Draw the memory of the handover in SOURCE by address.

    The darker a character, the larger its preserved part; scratch is /, memory that is not preserved is a dot. Lines
    that are all the same are replaced by a line of words. The owners are listed to the right, in color on a terminal.
    PNG needs matplotlib: pip install 'kho[plot]'. Of "live", the running machine, it is what /proc/kcore holds;
    without permission for that (root), the addresses that debugfs shows.

    \b
    Exit codes: 0 drawn, 2 not readable.
    """
    columns = 64 if output.width() >= 100 or target else 32
    if len(source) == 1 and is_running(source[0]):
        found, abi = running(source[0], columns, row, **options)
    else:
        with output.progress("searching") as told:
            # Opened once: a pipe can only be read once, and decompressing takes time.
            opened = memory(source, progress=told)
        inc = read(opened, **options)
        found, abi = build(inc, inc.ranges, columns=columns, row_bytes=row), inc.compatible
    title = f"{abi} handover in {', '.join(source)}"
    if target is not None:
        mapdraw.save(found, Path(target), title)
        output.line(f"{target}: {len(found.lines)} lines of {size(found.row_bytes)}", err=True)
    if as_json:
        output.print_json(found.as_dict())
    elif target is None:
        show(found, title)


def running(source: str, columns: int, row: int | None, **options: int | None) -> tuple[MemoryMap, str]:
    """Lay out the memory of a running machine, or what debugfs shows of it; and give the compatible.

    Raises: SourceError if neither can be read.
    """
    try:
        inc, _ = read_running(source, **options)
    except UnreadableError as error:
        shown = Snapshot.open(source)
        output.line(f"note: {error}; this is what debugfs shows: no folios, no files", err=True)
        page_size = options.get("page_size") or PAGE_SIZES[0]
        spans = spans_shown(shown_ranges(shown), shown.scratch, page_size)
        abi = None if shown.outgoing is None else shown.outgoing.compatible
        return lay_out(spans, page_size, shown.ram, columns=columns, row_bytes=row), abi or "unknown"
    return build(inc, inc.ranges, columns=columns, row_bytes=row), inc.compatible


def show(found: MemoryMap, title: str) -> None:
    """Print the map as text."""
    charset, width = output.charset(), output.width()
    output.line((title, "bold"))
    output.line(f"a line is {size(found.row_bytes)}, a character {size(found.cell_bytes)}")
    legend: list[output.Part] = []
    used = 0
    for kind, nbytes in found.totals.items():
        mark = SCRATCH[charset] if kind == "scratch" else SHADES[charset][-1]
        name = f" {KINDS[kind]} {size(nbytes)}   "
        if used and used + len(name) > width:
            output.line(*legend)
            legend, used = [], 0
        legend += [(mark, STYLES[kind]), name]
        used += len(mark) + len(name)
    if legend:
        last = legend.pop()
        output.line(*legend, str(last).rstrip())
    output.line()
    digits = max((len(f"{line.phys:#x}") for line in found.lines), default=0)
    dots = "\u2026" if charset == "utf" else ""
    for line in found.lines:
        if isinstance(line, Row):
            head = f"{line.phys:#{digits}x}".rjust(digits) + "  "
            owners = "  " + ", ".join(f"{printable(owner)} {size(nbytes)}" for owner, nbytes in line.owners)
            room = width - len(head) - len(line.cells)
            output.line(head, *bar(line, found.cell_bytes, charset), cropped(owners, room, dots))
        else:
            words = mapdraw.words(line)
            shown = " " * (digits + 2) + (words if charset == "utf" else words.replace("\u2026", ":"))
            output.line((cropped(shown, width, dots), "dim"))


def cropped(text: str, room: int, dots: str) -> str:
    """Cut a text to `room` columns; a cut text ends with `dots`."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= room:
        return text
    return set_cell_size(text, max(room - len(dots), 0)) + dots


def bar(row: Row, cell_bytes: int, charset: str) -> list[output.Part]:
    """Draw a row, one character per cell; adjacent cells of the same style form one part."""
    drawn: list[tuple[str, str]] = []
    for cell in row.cells:
        kind = cell.kind
        if kind is None:
            char, style = (RAM[charset], "dim") if cell.ram else (" ", "")
        elif kind == "scratch":
            char, style = SCRATCH[charset], STYLES[kind]
        else:
            char, style = SHADES[charset][min(int(cell.density(cell_bytes) * 4), 3)], STYLES[kind]
        if drawn and drawn[-1][1] == style:
            drawn[-1] = (drawn[-1][0] + char, style)
        else:
            drawn.append((char, style))
    return list(drawn)
