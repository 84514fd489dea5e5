"""How the commands take a source; `source_options` stands in for the one of options.py until that is there."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from .._kho import Incoming
from ..sources import open as open_source
from . import output
from .inspect import Number


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command SOURCE, --fdt-phys, --bitmap-bytes and --page-size; it is called with `source` and `options`."""

    @click.argument("source", nargs=-1, required=True)
    @click.option("--fdt-phys", type=Number(), metavar="A", help="Physical address of the root FDT; else searched for.")
    @click.option("--bitmap-bytes", type=Number(), metavar="N", help="512 (Linux 6.16) or the page size; else decided.")
    @click.option("--page-size", type=Number(), metavar="N", help="4096, 16384 or 65536; else decided from evidence.")
    @wraps(command)
    def wrapped(fdt_phys: int | None, bitmap_bytes: int | None, page_size: int | None, **given: Any) -> Any:
        options = {"fdt_phys": fdt_phys, "bitmap_bytes": bitmap_bytes, "page_size": page_size}
        return command(options=options, **given)

    return wrapped


def read(source: tuple[str, ...], options: dict[str, int | None]) -> Incoming:
    """Open what the command was given, with progress on a terminal."""
    with output.progress("searching") as told:
        return open_source(
            source,
            progress=told,
            fdt_phys=options["fdt_phys"],
            bitmap_bytes=options["bitmap_bytes"],
            page_size=options["page_size"],
        )
