"""`kho fdt`: the devicetrees of a handover, as source."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click

from .. import errors
from .. import fdt as fdts
from .._kho import Fdt, Incoming
from ..formats.registry import Budget, fdt_at
from ..sources import bare_fdt, memory
from . import output
from .options import read, source_options


@click.command("fdt")
@source_options
@click.option("--subtree", metavar="NAME", help="Print this subtree instead of the root.")
@click.option("--all", "everything", is_flag=True, help="Print the root and every subtree that is an FDT.")
@click.option(
    "--numbers",
    type=click.Choice(["auto", *get_args(fdts.Numbers)]),
    default="auto",
    show_default=True,
    help="How numbers are stored: native, as KHO does; cells, big-endian, as machines' trees do; else decided.",
)
@click.option("--json", "as_json", is_flag=True, help="Print data instead of devicetree source.")
def command(
    source: tuple[str, ...],
    subtree: str | None,
    everything: bool,
    numbers: str,
    as_json: bool,
    **options: int | None,
) -> None:
    """Print the root FDT of the handover in SOURCE as devicetree source.

    KHO stores numbers in native byte order; they are shown as what they are, where dtc would swap their bytes. SOURCE
    may also be a bare FDT, as the files of /sys/kernel/debug/kho are: of one that is cut short, as Linux 7.x shows
    out/fdt, what is there is printed, with a warning. The numbers of a bare FDT are native if its root has a KHO
    compatible; those of any other, as the one a machine boots with (/sys/firmware/fdt), are big-endian cells, and so
    are linux,kho-fdt and linux,kho-scratch in its /chosen.

    \b
    Exit codes: 0 printed, also if cut short, 2 not readable, or malformed: then what could be read is printed.
    """
    if subtree is not None and everything:
        raise click.UsageError("--subtree and --all do not go together")
    stored: fdts.Numbers | None = "native" if numbers == "native" else "cells" if numbers == "cells" else None
    bare, have = None, 0
    if len(source) == 1 and Path(source[0]).is_file():
        bare, have = fdts.load(source[0]), Path(source[0]).stat().st_size
    if bare is None:
        with output.progress("searching") as told:
            opened = memory(source, progress=told)
        raw = bare_fdt(opened)
        if raw is None:
            # A handover's subtrees are KHO's, whatever their compatible.
            found = trees(read(opened, **options), subtree, everything=everything)
            show({title: (fdt, None) for title, fdt in found.items()}, as_json=as_json, numbers=stored or "native")
            return
        bare, have = fdts.Fdt.partial(raw), len(raw)  # from a pipe, or packed
    if subtree is not None:
        raise errors.NotFoundError(
            f"subtree {subtree!r}: {source[0]} is a bare FDT, which has addresses of subtrees only"
        )
    fdt, error = bare
    short = have < fdt.totalsize
    show({f"{source[0]}, {fdt.totalsize} bytes": (fdt, error)}, as_json=as_json, numbers=stored)
    if error is not None:
        output.line(f"{'warning' if short else 'kho'}: {source[0]}: {error}", err=True)
        sys.exit(0 if short else 2)


def trees(inc: Incoming, subtree: str | None = None, *, everything: bool = False) -> dict[str, Fdt]:
    """Give the root FDT, a subtree, or all of them, by what they are.

    Raises: NotFoundError for a subtree that is not there, or no FDT.
    """
    found = {} if subtree is not None else {f"root FDT at {inc.fdt_phys:#x}, {inc.fdt.totalsize} bytes": inc.fdt}
    names = [subtree] if subtree is not None else list(inc.subtrees) if everything else []
    budget = Budget(inc)
    for name in names:
        blob = inc.retrieve_subtree(name)
        try:
            if blob.size is None:
                blob.fdt()  # raises
            fdt = fdt_at(inc, blob.phys, blob.size or 0, f"subtree {name} at {blob.phys:#x}", budget)
        except errors.KhoError as error:
            if subtree is None:
                continue
            raise errors.NotFoundError(
                f"subtree {name}: no FDT (kho extract --subtree takes it raw): {error}"
            ) from error
        found[f"subtree {name} at {blob.phys:#x}, {fdt.totalsize} bytes"] = fdt
    return found


def show(found: dict[str, tuple[Fdt, errors.FdtError | None]], *, as_json: bool, numbers: fdts.Numbers | None) -> None:
    """Print trees by what they are, piece by piece."""
    if not as_json:
        for title, (fdt, error) in found.items():
            comment = title + (f"; incomplete: {error}" if error else "")
            output.lines(fdts.dts_lines(fdt, comment=comment, numbers=numbers))
        return
    if len(found) == 1:
        ((fdt, error),) = found.values()
        output.write_json(fdts.json_text(fdt, {"error": str(error)} if error else None, numbers=numbers))
    else:
        output.write_json(_several(found, numbers))


def _several(found: dict[str, tuple[Fdt, errors.FdtError | None]], numbers: fdts.Numbers | None) -> Iterator[str]:
    separator = "{\n  "
    for title, (fdt, error) in found.items():
        yield f"{separator}{json.dumps(title)}: "
        yield from fdts.json_text(fdt, {"error": str(error)} if error else None, depth=1, numbers=numbers)
        separator = ",\n  "
    yield "\n}"
