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
from .._kho import Fdt, Incoming, Snapshot
from ..formats.registry import Budget, fdt_at
from ..handover.running import UnreadableError, is_running, missing_root
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
    also be a bare FDT, such as the files in /sys/kernel/debug/kho. If it is truncated, as out/fdt is from Linux 6.19
    on, the readable part is printed with a warning. The numbers of a bare FDT are native if its root has a compatible
    of KHO; in any other FDT, such as the machine's own (/sys/firmware/fdt), they are big-endian cells, including
    linux,kho-fdt and linux,kho-scratch in /chosen.

    Of "live", the running machine, the FDTs are those in debugfs; a root FDT that is truncated or not shown there is
    read from /proc/kcore if that is permitted (root).

    \b
    Exit codes: 0 printed, even if truncated, 2 not readable, or malformed; the readable part is printed.
    """
    if subtree is not None and everything:
        raise click.UsageError("--subtree and --all exclude each other")
    stored: fdts.Numbers | None = "native" if numbers == "native" else "cells" if numbers == "cells" else None
    if len(source) == 1 and is_running(source[0]):
        show(running(source[0], subtree, everything=everything, **options), as_json=as_json, numbers=stored or "native")
        return
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


def running(
    source: str, subtree: str | None, *, everything: bool, **options: int | None
) -> dict[str, tuple[Fdt, errors.FdtError | None]]:
    """Read FDTs of a running machine, by title: from memory if debugfs does not show the root whole, else from debugfs.

    Raises: NotFoundError, SourceError.
    """
    shown = Snapshot.open(source)
    sides = {"out": shown.outgoing, "in": shown.incoming}
    out = shown.outgoing
    if subtree is None and (out is None or out.fdt is None or out.truncated is not None):
        try:
            inc = read((source,), **options)
        except UnreadableError as error:
            output.line(f"note: {error}", err=True)
        else:
            return {title: (fdt, None) for title, fdt in trees(inc, everything=everything).items()}
    blobs: dict[str, bytes] = {}
    for way, side in sides.items():
        if side is None:
            continue
        if subtree is None and side.fdt is not None:
            blobs[f"{way}/fdt"] = side.fdt
        for name, blob in side.sub_fdts.items() if everything or subtree is not None else ():
            if name == subtree or subtree is None:
                blobs[f"{way}/sub_fdts/{name}"] = blob
    if subtree is None and (out is None or out.fdt is None):
        output.line(f"note: out/fdt: {missing_root(shown)}", err=True)
    found: dict[str, tuple[Fdt, errors.FdtError | None]] = {}
    for path, blob in blobs.items():
        try:
            fdt, damage = Fdt.partial(blob)
        except errors.FdtError:
            continue  # a struct, such as LUO's from Linux 7.2 on
        short = f" of {fdt.totalsize}" if len(blob) < fdt.totalsize else ""
        found[f"{path}, {len(blob)}{short} bytes"] = fdt, damage
        if damage is not None:
            output.line(f"warning: {path}: {damage}", err=True)
    if not found:
        what = "no root FDT" if subtree is None else f"no FDT of a subtree {subtree!r}"
        raise errors.NotFoundError(f"{source}: {what} in debugfs; kho inspect {source} lists what is there")
    return found


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
    separator = '{\n  "trees": {\n    '
    for title, (fdt, error) in found.items():
        yield f"{separator}{json.dumps(title)}: "
        yield from fdts.json_text(fdt, {"error": str(error)} if error else None, depth=2, numbers=numbers)
        separator = ",\n    "
    yield "\n  }\n}"
