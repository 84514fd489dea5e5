"""`kho convert`: write a handover in another ABI."""

from __future__ import annotations

import click

from .._kho import abis
from ..handover.convert import convert
from ..sources import open as open_source
from ..text import listed
from . import output
from .options import Number

WRITTEN = [abi for abi in abis().values() if abi.decoded]


def _chunked() -> str:
    """Say which bitmap sizes can be written: "kho-v1: 512 (Linux 6.16 and 6.17) or the page size (...)"."""
    sizes = {
        abi.compatible: [f"{nbytes or 'the page size'} ({kernels})" for nbytes, kernels in abi.bitmaps]
        for abi in WRITTEN
        if abi.bitmaps
    }
    return "; ".join(f"{name}: {listed(values, 'or')}" for name, values in sizes.items())


@click.command("convert")
@click.argument("source", nargs=-1, required=True)
@click.option(
    "--abi",
    required=True,
    metavar="ABI",
    help=f"What to write: {listed((abi.compatible for abi in WRITTEN), 'or')}.",
)
@click.option("-o", "--output", "path", required=True, type=click.Path(dir_okay=False), help="The ELF core to write.")
@click.option(
    "--bitmap-bytes",
    type=Number(),
    metavar="N",
    help=f"To write {_chunked()}.",
)
@click.option("--fdt-phys", type=Number(), metavar="A", help="Physical address of the source's root FDT.")
@click.option("--page-size", type=Number(), metavar="N", help="The source's: 4096, 16384 or 65536.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; addresses are integers.")
@click.option("--python", "as_python", is_flag=True, help="Print the equivalent Python calls and exit.")
def command(
    source: tuple[str, ...],
    abi: str,
    path: str,
    bitmap_bytes: int | None,
    fdt_phys: int | None,
    page_size: int | None,
    as_json: bool,
    as_python: bool,
) -> None:
    """Write the handover in SOURCE as an ELF core in another ABI.

    Folios, orders, contents, subtrees and the address of the root FDT are unchanged; the new map goes to unused pages.
    The contents of subtrees are not converted: a kernel reads only LUO data of its own version.

    \b
      kho convert old.elf --abi kho-v4 -o new.elf                        for Linux 7.2 and later
      kho convert new.elf --abi kho-v1 --bitmap-bytes 512 -o old.elf     for Linux 6.16

    \b
    Exit codes: 0 written, 2 no handover, or it cannot be expressed in that ABI.
    """
    if as_python:
        output.lines(as_calls(source, abi, path, bitmap_bytes=bitmap_bytes, fdt_phys=fdt_phys, page_size=page_size))
        return
    with output.progress("searching") as told:
        inc = open_source(source, fdt_phys=fdt_phys, page_size=page_size, progress=told)
    output.note_placement(inc)
    made = convert(inc, abi, bitmap_bytes=bitmap_bytes)
    with output.progress("writing") as told:
        segments = made.save(path, progress=told)
    nbytes = sum(segment.filesz for segment in segments)
    if as_json:
        output.print_json(
            {
                "path": path,
                "compatible": made.out.abi,
                "bitmap_bytes": made.out.bitmap_bytes,
                "fdt_phys": made.out.fdt_phys,
                "nr_folios": made.out.nr_folios,
                "preserved_bytes": made.out.preserved_bytes,
                "segments": [segment._asdict() for segment in segments],
            }
        )
        return
    folios = f"{made.out.nr_folios} folios, {output.size(made.out.preserved_bytes)}"
    output.line(f"{inc.compatible} to {made.out.abi}: {folios}")
    output.line(
        f"{path}: {len(segments)} segments, {output.size(nbytes)} of contents, root FDT at {made.out.fdt_phys:#x}"
    )


def as_calls(source: tuple[str, ...], abi: str, path: str, *, bitmap_bytes: int | None, **given: int | None) -> str:
    """Return equivalent Python calls as source text."""
    named = [f"{name}={value:#x}" for name, value in given.items() if value is not None]
    opened = ", ".join([repr(source[0]) if len(source) == 1 else repr(list(source)), *named])
    bitmaps = "" if bitmap_bytes is None else f", bitmap_bytes={bitmap_bytes}"
    return f"import kho\n\ninc = kho.open({opened})\nkho.convert(inc, {abi!r}{bitmaps}).save({path!r})"
