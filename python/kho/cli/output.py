"""How the commands print: the same text with and without a terminal, colour only on one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import errors


def console() -> Console:
    """Give a console for stdout: as wide as the terminal, wide enough for addresses without one."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def table(*columns: str) -> Table:
    """Give a table without lines; numbers (columns named with a leading `>`) stand to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return made


def size(nbytes: int) -> str:
    """Write a number of bytes with the unit that leaves at most four digits before the point."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def print_json(data: dict[str, Any]) -> None:
    """Print data as JSON; addresses are integers. An iterator is a list, whose items are printed as they are made."""
    write(json_text(data))
    write(["\n"])


def json_text(it: Any, depth: int = 0) -> Iterator[str]:
    """Write what `json.dumps(..., indent=2)` writes, piece by piece."""
    pad = "\n" + "  " * depth
    inner = pad + "  "
    if isinstance(it, dict) and it:
        separator = "{" + inner
        for key, value in it.items():
            yield f"{separator}{json.dumps(key)}: "
            yield from json_text(value, depth + 1)
            separator = "," + inner
        yield pad + "}"
    elif isinstance(it, Iterator):
        separator = "[" + inner
        for item in it:
            yield separator + json.dumps(item, indent=2).replace("\n", inner)
            separator = "," + inner
        yield "[]" if separator.startswith("[") else pad + "]"
    elif isinstance(it, list) and it:
        separator = "[" + inner
        for item in it:
            yield separator
            yield from json_text(item, depth + 1)
            separator = "," + inner
        yield pad + "]"
    else:
        yield json.dumps(it)


def write(pieces: Iterable[str]) -> None:
    """Write text to stdout as it is made, a buffer at a time."""
    some: list[str] = []
    chars = 0
    for piece in pieces:
        some.append(piece)
        chars += len(piece)
        if chars >= 1 << 16:
            sys.stdout.write("".join(some))
            some, chars = [], 0
    sys.stdout.write("".join(some))


MOST_LAID_OUT = 512
"""Rows of a table that rich lays out; it takes a quarter of a millisecond for each."""


def show_table(out: Console, made: Table) -> None:
    """Print a table; one of many rows in plain columns, which takes a hundredth of the time."""
    if made.row_count <= MOST_LAID_OUT:
        out.print(made)
        return
    columns = [[str(cell) for cell in (column.header, *column.cells)] for column in made.columns]
    widths = [max(map(len, column)) for column in columns]
    right = [column.justify == "right" for column in made.columns]

    def lines() -> Iterator[str]:
        for row in zip(*columns, strict=True):
            cells = zip(row, widths, right, strict=True)
            padded = (cell.rjust(width) if r else cell.ljust(width) for cell, width, r in cells)
            yield "  ".join(padded) + "\n"

    write(lines())


def line(out: Console, text: Text) -> None:
    """Print a line, however long; without a terminal as it is, which takes a hundredth of the time."""
    if out.is_terminal:
        out.print(text, soft_wrap=True)
    else:
        sys.stdout.write(text.plain + "\n")


@contextmanager
def progress(doing: str) -> Iterator[Callable[[int], None] | None]:
    """Show on stderr how many bytes have been seen, if it is a terminal and the work takes longer than a moment."""
    if not sys.stderr.isatty():
        yield None
        return
    began = monotonic()
    with Console(stderr=True).status(doing) as status:

        def told(nbytes: int) -> None:
            if monotonic() - began > 0.5:
                status.update(f"{doing}: {size(nbytes)}")

        yield told


@contextmanager
def bar(doing: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """Show on stderr how many of `total` are done, if it is a terminal; what is called is told how many."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(doing, total=total)
        yield lambda done: shown.update(task, completed=done)


def hint(error: errors.KhoError) -> str | None:
    """Say what to try after an error."""
    match error:
        case errors.NoHandoverError():
            return "was it taken after the handover was finalized? A raw image needs its address: FILE@0x40000000"
        case errors.UnsupportedAbiError():
            return "a newer kho may read it"
        case errors.OutsideMemoryError():
            return "is the image complete? Give all parts of the memory, each with its address"
        case errors.FormatError():
            return "--page-size, --bitmap-bytes and --fdt-phys override what was decided"
        case _:
            return None
