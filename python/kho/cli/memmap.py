"""`kho map`: the handover by address."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from .. import mapdraw
from ..memmap import KINDS, MemoryMap, Row, build
from ..text import printable, size
from . import output
from .options import Number, read, source_options

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

    The darker a character, the more of it is preserved; scratch is /, memory that is there and not preserved a dot.
    What lies between two lines, and is all the same, is said in words. Whose memory it is stands at the right, and is
    in colour on a terminal. PNG needs matplotlib: pip install 'kho[plot]'.

    \b
    Exit codes: 0 drawn, 2 not readable.
    """
    inc = read(source, **options)
    console = output.console()
    wide = console.width >= 100
    found = build(inc, inc.ranges, columns=64 if wide or target else 32, row_bytes=row)
    title = f"{inc.compatible} handover in {', '.join(source)}"
    if target is not None:
        mapdraw.save(found, Path(target), title)
        click.echo(f"{target}: {len(found.lines)} lines of {size(found.row_bytes)}", err=True)
    if as_json:
        output.print_json(found.as_dict())
    elif target is None:
        show(found, title, console)


def show(found: MemoryMap, title: str, console: Console) -> None:
    """Print the map as text."""
    charset = "utf" if (sys.stdout.encoding or "utf-8").lower().startswith("utf") else "ascii"
    console.print(Text(printable(title), style="bold"))
    console.print(Text(f"a line is {size(found.row_bytes)}, a character {size(found.cell_bytes)}"))
    legend = Text()
    for kind, nbytes in found.totals.items():
        mark = SCRATCH[charset] if kind == "scratch" else SHADES[charset][-1]
        name = f" {KINDS[kind]} {size(nbytes)}   "
        if len(legend.plain.rsplit("\n")[-1]) + len(name) > console.width:
            legend.append("\n")
        legend.append(mark, STYLES[kind]).append(name)
    legend.rstrip()
    console.print(legend, no_wrap=True)
    console.print()
    digits = max((len(f"{line.phys:#x}") for line in found.lines), default=0)
    for line in found.lines:
        if isinstance(line, Row):
            text = Text(f"{line.phys:#{digits}x}".rjust(digits) + "  ").append_text(
                bar(line, found.cell_bytes, charset)
            )
            owners = ", ".join(f"{printable(owner)} {size(nbytes)}" for owner, nbytes in line.owners)
            text.append("  ").append(owners)
        else:
            words = mapdraw.words(line)
            text = Text(" " * (digits + 2) + (words if charset == "utf" else words.replace("\u2026", ":")), style="dim")
        text.truncate(console.width, overflow="ellipsis" if charset == "utf" else "crop")
        console.print(text, no_wrap=True)


def bar(row: Row, cell_bytes: int, charset: str) -> Text:
    """Draw a row's cells, a character each."""
    drawn = Text()
    for cell in row.cells:
        kind = cell.kind
        if kind is None:
            drawn.append(RAM[charset] if cell.ram else " ", "dim")
        elif kind == "scratch":
            drawn.append(SCRATCH[charset], STYLES[kind])
        else:
            drawn.append(SHADES[charset][min(int(cell.density(cell_bytes) * 4), 3)], STYLES[kind])
    return drawn
