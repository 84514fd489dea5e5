"""`kho convert`: write a handover in another ABI."""

from __future__ import annotations

from typing import Any

import click

from .._kho import abis
from ..errors import ParameterError
from ..handover.compat import VERDICTS, Offer, Target, judge, worst
from ..handover.convert import convert
from ..handover.convert_luo import DROPPABLE
from ..kernels import Kernel, Release, kernels_that_write, known_kernel
from ..sources import memory
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
@click.option("--abi", metavar="ABI", help=f"What to write: {listed((abi.compatible for abi in WRITTEN), 'or')}.")
@click.option("--kernel", metavar="RELEASE", help="Write it for this kernel (7.0), if that can take it over.")
@click.option("-o", "--output", "path", required=True, type=click.Path(dir_okay=False), help="The ELF core to write.")
@click.option(
    "--bitmap-bytes",
    type=Number(),
    metavar="N",
    help=f"To write {_chunked()}.",
)
@click.option("--drop-seals", is_flag=True, help="Leave out seals of memfds where the target records none.")
@click.option("--drop-files", is_flag=True, help="Leave out files of a kind that kho does not know.")
@click.option("--drop-flbs", is_flag=True, help="Leave out FLBs that the target does not take, or kho does not know.")
@click.option("--drop-luo", is_flag=True, help="Leave out all sessions where the target has no LUO.")
@click.option("--keep-unknown", is_flag=True, help="Keep files and FLBs that kho does not know as they are.")
@click.option("--fdt-phys", type=Number(), metavar="A", help="Physical address of the source's root FDT.")
@click.option("--page-size", type=Number(), metavar="N", help="The source's: 4096, 16384 or 65536.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; addresses are integers.")
@click.option("--python", "as_python", is_flag=True, help="Print the equivalent Python calls and exit.")
def command(
    source: tuple[str, ...],
    abi: str | None,
    kernel: str | None,
    path: str,
    bitmap_bytes: int | None,
    keep_unknown: bool,
    fdt_phys: int | None,
    page_size: int | None,
    as_json: bool,
    as_python: bool,
    **drops: bool,
) -> None:
    """Write the handover in SOURCE as an ELF core in another ABI, or for another kernel.

    Folios, orders, contents and the address of the root FDT are unchanged; the new map goes to unused pages. LUO's
    sessions, files, memfds and FLBs are written in the formats that belong to the ABI or that the kernel reads; other
    subtrees are unchanged.

    What the target cannot take (seals before Linux 7.1, FLBs in 6.19, LUO before 6.19, kinds of files that kho does not
    know, more sessions than fit) is refused by name. --drop-seals, --drop-flbs, --drop-files and --drop-luo leave it
    out with a warning. With --kernel a handover that would panic or be refused is not written; `kho compat` judges each
    object.

    \b
      kho convert old.elf --kernel 7.3 -o new.elf
      kho convert new.elf --kernel 7.0 --drop-seals -o old.elf
      kho convert old.elf --abi kho-v4 -o new.elf                        for Linux 7.2 and later
      kho convert new.elf --abi kho-v1 --bitmap-bytes 512 -o old.elf     for Linux 6.17

    \b
    Exit codes: 0 written, 2 no handover, or it cannot be expressed in that ABI.
    """
    if (abi is None) == (kernel is None):
        raise click.UsageError("either --abi or --kernel is needed")
    target = None if kernel is None else known_kernel(kernel)
    if target is not None and bitmap_bytes is not None:
        raise click.UsageError("--kernel decides the bitmap size: leave --bitmap-bytes out")
    given: dict[str, Any] = {
        "abi": abi,
        "kernel": kernel,
        "bitmap_bytes": bitmap_bytes,
        "drop": [what for what in DROPPABLE if drops[f"drop_{what}"]],
        "keep_unknown": keep_unknown,
    }
    if as_python:
        output.lines(as_calls(source, path, given, fdt_phys=fdt_phys, page_size=page_size))
        return
    with output.progress("searching") as told:
        opened = memory(source, progress=told)
        with output.noting_cuts(opened):
            inc = open_source(opened, fdt_phys=fdt_phys, page_size=page_size, progress=told)
    output.note_opened(inc)
    made = convert(inc, **given)
    offer = made.offer()
    check_target(offer, target)
    for loss in made.losses:
        output.line(f"warning: {loss}", err=True)
    with output.progress("writing") as told:
        segments = made.save(path, progress=told)
    nbytes = sum(segment.filesz for segment in segments)
    if as_json:
        output.print_json(
            {
                "path": path,
                "compatible": made.out.abi,
                "bitmap_bytes": made.out.bitmap_bytes,
                "luo": made.luo,
                "losses": made.losses,
                "fdt_phys": made.out.fdt_phys,
                "nr_folios": made.out.nr_folios,
                "preserved_bytes": made.out.preserved_bytes,
                "segments": [segment._asdict() for segment in segments],
            }
        )
        return
    folios = f"{made.out.nr_folios} folios, {output.size(made.out.preserved_bytes)}"
    sizes = inc.bitmap_bytes, made.out.bitmap_bytes
    bitmaps = "" if None in sizes or sizes[0] == sizes[1] else f", bitmaps of {sizes[0]} bytes to {sizes[1]}"
    output.line(f"{inc.compatible} to {made.out.abi}{bitmaps}: {folios}")
    output.line(
        f"{path}: {len(segments)} segments, {output.size(nbytes)} of contents, root FDT at {made.out.fdt_phys:#x}"
    )
    if made.luo == "write" and offer.sessions is not None:
        files = sum(map(len, offer.sessions.values()))
        output.line(
            f"LUO written as {offer.luo}: {len(offer.sessions)} sessions, {files} files, {len(offer.flbs)} FLBs"
        )


def check_target(offer: Offer, target: Kernel | None) -> None:
    """Judge a conversion for its kernel, or for all that read its map: a warning for each object that is not taken.

    Raises: ParameterError if a kernel that was named would panic, or boot cold.
    """
    kernels = [target] if target is not None else kernels_that_write(offer.abi, offer.bitmap_bytes, None)
    judged = [(kernel, judge(offer, Target(Release.parse(kernel.name)))) for kernel in kernels]
    if not judged:
        return
    kernel, rows = min(judged, key=lambda each: VERDICTS.index(worst(each[1])))
    bad = [row for row in rows if row.verdict in ("lost", "refused", "panics")]
    if target is not None and worst(rows) in ("refused", "panics"):
        row = max(bad, key=lambda each: VERDICTS.index(each.verdict))
        raise ParameterError(f"--kernel: Linux {kernel.name} would not take it over: {row.object}: {row.why}")
    for row in bad:
        output.line(f"warning: Linux {kernel.name}: {row.object}: {row.verdict}: {row.why}", err=True)


def as_calls(source: tuple[str, ...], path: str, given: dict[str, Any], **opened: int | None) -> str:
    """Return equivalent Python calls as source text."""
    named = [f"{name}={value:#x}" for name, value in opened.items() if value is not None]
    found = ", ".join([repr(source[0]) if len(source) == 1 else repr(list(source)), *named])
    options = "".join(f", {name}={value!r}" for name, value in given.items() if value)
    return f"import kho\n\ninc = kho.open({found})\nkho.convert(inc{options}).save({path!r})"
