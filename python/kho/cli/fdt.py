"""`kho fdt`: print the devicetrees of a handover as source."""

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
    help="Byte order of numbers: native, as in KHO; cells, big-endian, as in a machine's devicetree; auto detects it.",
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

    KHO stores numbers in native byte order; they are printed correctly, where dtc would swap their bytes. SOURCE can
    also be a bare FDT, such as the files in /sys/kernel/debug/kho. If it is truncated, as out/fdt is in Linux 7.x, the
    readable part is printed with a warning. The numbers of a bare FDT are native if its root has a compatible of KHO;
    in any other FDT, such as the machine's own (/sys/firmware/fdt), they are big-endian cells, including
    linux,kho-fdt and linux,kho-scratch in /chosen.

    \b
    Exit codes: 0 printed, even if truncated, 2 not readable, or malformed; the readable part is printed.
    """
    if subtree is not None and everything:
        raise click.UsageError("--subtree and --all exclude each other")
    stored: fdts.Numbers | None = "native" if numbers == "native" else "cells" if numbers == "cells" else None
    bare, have = None, 0
    if len(source) == 1 and Path(source[0]).is_file():
        bare, have = fdts.load(source[0]), Path(source[0]).stat().st_size
    if bare is None:
        with output.progress("searching") as told:
            opened = memory(source, progress=told)
        raw = bare_fdt(opened)
        if raw is None:
            # All subtrees of a handover use KHO's byte order, regardless of their compatible.
            found = trees(read(opened, **options), subtree, everything=everything)
            show({title: (fdt, None) for title, fdt in found.items()}, as_json=as_json, numbers=stored or "native")
            return
        bare, have = fdts.Fdt.partial(raw), len(raw)  # read from a pipe, or decompressed
    if subtree is not None:
        raise errors.NotFoundError(
            f"subtree {subtree!r}: {source[0]} is a bare FDT, which contains only the addresses of subtrees"
        )
    fdt, error = bare
    short = have < fdt.totalsize
    show({f"{source[0]}, {fdt.totalsize} bytes": (fdt, error)}, as_json=as_json, numbers=stored)
    if error is not None:
        output.line(f"{'warning' if short else 'kho'}: {source[0]}: {error}", err=True)
        sys.exit(0 if short else 2)


def trees(inc: Incoming, subtree: str | None = None, *, everything: bool = False) -> dict[str, Fdt]:
    """Return the root FDT, one subtree, or all of them, by a title with name, address and size.

    Raises: NotFoundError if the subtree does not exist or is not an FDT.
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
                f"subtree {name}: not an FDT (kho extract --subtree writes it raw): {error}"
            ) from error
        found[f"subtree {name} at {blob.phys:#x}, {fdt.totalsize} bytes"] = fdt
    return found


def show(found: dict[str, tuple[Fdt, errors.FdtError | None]], *, as_json: bool, numbers: fdts.Numbers | None) -> None:
    """Print FDTs under their titles, piece by piece."""
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
