"""How the commands print: the same text with and without a terminal, colour only on one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from .. import errors
from .._kho import Incoming
from ..text import printable


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
    """Print data as JSON; addresses are integers."""
    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")


def say_placement(inc: Incoming) -> None:
    """Say on stderr that a raw image is read somewhere else than where it was named, and how to prevent it."""
    if (at := inc.placement) is not None:
        text = f"{at.named} is read as {at.argument} ({at.certainty}): {at.why}; {at.as_is} reads it as named"
        click.echo(f"note: {printable(text)}", err=True)
    elif inc.address == "named" and inc.pages_outside:
        text = "are not in this memory: it is a part of one, or does not lie where it was named"
        click.echo(f"warning: {inc.pages_outside} preserved pages {text}", err=True)


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
