"""`kho plan`: compute the cost of a handover: metadata, time, scratch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import ParameterError, SourceError
from ..sizes import parse_size
from ..sizing.plan import LAYOUTS, Calibration, Plan, plan
from ..sizing.simulate import calibrate
from ..text import size
from . import output
from .options import Number

Command = TypeVar("Command", bound=Callable[..., Any])
MOST = 1 << 24
"""Maximum bytes of a calibration file."""


def folio_options(function: Command) -> Command:
    """Add the options that select folios, shared by `kho plan` and `kho simulate`."""
    options = (
        click.option("--memory", required=True, type=Number(), metavar="SIZE", help="The machine's memory: 64G, 2T."),
        click.option("--folios", multiple=True, metavar="COUNTxSIZE", help="Folios of one size: 1048576x2M. Repeat."),
        click.option("--preserve", multiple=True, metavar="N%:SIZE", help="A share of memory: 80%:2M. Repeat."),
        click.option(
            "--random/--contiguous", default=False, help="Scatter folios, or put them side by side (the default)."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def kept(path: str) -> Calibration:
    """Read a saved calibration. Raises: SourceError; ParameterError if the file contains no calibration."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MOST + 1)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from None
    if len(raw) > MOST:
        raise SourceError(f"{path}: more than {size(MOST)}, which is no calibration (kho plan --json writes one)")
    try:
        return Calibration.from_dict(json.loads(raw))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ParameterError):
            raise ParameterError(f"{path}: {error}; kho plan --json writes one") from None
        raise SourceError(f"{path}: not JSON; kho plan --json writes a calibration") from None


def seconds(value: float | None) -> str:
    """Format a time with three digits, in s, ms or us."""
    if value is None:
        return "-"
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"


@click.command("plan")
@folio_options
@click.option(
    "--abi", multiple=True, type=click.Choice(list(LAYOUTS)), help="A layout; default: all released ones. Repeat."
)
@click.option("--kernel", metavar="RELEASE", help="Plan for this kernel (7.0.11): its layout, how it reads --scratch.")
@click.option("--page-size", multiple=True, type=Number(), metavar="N", help="4K (the default), 16K or 64K. Repeat.")
@click.option("--scratch", default="200%", metavar="VALUE", show_default=True, help="As kho_scratch= of the kernel.")
@click.option(
    "--reserved",
    metavar="LOW,NODE...",
    help="What the kernel reserves at boot: below 4 GiB, per node; else guessed.",
)
@click.option("--nodes", type=click.IntRange(1, 1024), default=1, metavar="N", help="NUMA nodes with memory.")
@click.option("--calibrate/--no-calibrate", "measure", default=True, help="Measure this machine for the times, 1 s.")
@click.option("--calibration", metavar="FILE", help="Take the times from what an earlier --json printed.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text, the calibration with it.")
def command(
    memory: int,
    folios: tuple[str, ...],
    preserve: tuple[str, ...],
    random: bool,
    abi: tuple[str, ...],
    kernel: str | None,
    page_size: tuple[int, ...],
    scratch: str,
    reserved: str | None,
    nodes: int,
    measure: bool,
    calibration: str | None,
    as_json: bool,
) -> None:
    """Compute the cost of handing folios over, in metadata, time and scratch, for each layout.

    Bytes are exact for contiguous folios. For --random they are an average over all placements, with the standard
    deviation. Each group can set its own placement: 1000000x4K@random, 80%:2M@contiguous. Scattered groups divide the
    memory that is not preserved; each gets a zone of its own.

    Times are extrapolated from a short run of kho on this machine, so they are times of kho, not of a kernel; kho
    simulate runs the complete handover.

    \b
      kho plan --memory 2T --preserve 80%:2M                         a host whose guests have huge pages
      kho plan --memory 2T --preserve 80%:2M --folios 1000000x4K@random
      kho plan --memory 512G --preserve 50%:64K --page-size 4K --page-size 64K
      kho plan --memory 64G --preserve 50%:4K --scratch 512M,1G,256M --nodes 2 --kernel 7.0.11
      kho plan --memory 64G --preserve 50%:4K --json > here.json; kho plan ... --calibration here.json

    \b
    Exit codes: 0 planned, 2 not possible; the message names what does not fit.
    """
    parts = [parse_size(part, "--reserved") for part in reserved.split(",")] if reserved is not None else None
    sizes = page_size or (4096,)
    pages = {"page_sizes": sizes, "scratch": scratch, "reserved": parts, "nodes": nodes}
    groups: dict[str, Any] = {"preserve": preserve, "random": random, "layouts": abi or None, "kernel": kernel, **pages}
    made = plan(memory, folios, **groups)  # before the calibration, to report invalid arguments immediately
    if calibration is not None or measure:
        speed = kept(calibration) if calibration is not None else calibrate()
        made = plan(memory, folios, **groups, calibration=speed)
    if as_json:
        output.print_json(made.as_dict())
    else:
        show(made)


def show(made: Plan) -> None:
    """Print a plan as text."""
    show_folios(made)
    columns = ["layout", ">page", ">bitmaps", ">bytes", ">nodes", ">bytes", ">metadata", ">a folio"]
    if made.calibration is not None:
        columns += [">serialize", ">take over"]
    table = output.table(*columns, "Linux")
    for cost in made.costs:
        about = "" if cost.exact else "~"
        row = [
            cost.layout.name,
            size(cost.page_size),
            f"{about}{cost.bitmaps}",
            size(cost.bitmap_bytes),
            f"{about}{cost.nodes}",
            size(cost.node_bytes),
            f"{about}{size(cost.nbytes)}",
            f"{cost.nbytes / made.nr_folios:.3g} B" if made.nr_folios else "-",
        ]
        if made.calibration is not None:
            row += [seconds(cost.serialize_s), seconds(cost.take_over_s)]
        table.add(*row, cost.layout.kernels)
    table.show()
    for name, why in made.left_out.items():
        output.line(f"{name}: {why}")
    loose = [cost for cost in made.costs if not cost.exact]
    if loose:
        most = max(cost.deviation for cost in loose)
        output.line(
            f"~ average over all placements of scattered folios, standard deviation {size(round(most))} or less"
        )
    most = max((cost.directory_bytes for cost in made.costs), default=0)
    output.line(f"kho's own index needs about {size(most)} in addition, outside that memory")
    if made.calibration is not None:
        output.line("times are of kho, extrapolated from short runs on this machine, within a factor of two")
    show_scratch(made)


def show_folios(made: Plan) -> None:
    """Print the groups of folios and their addresses."""
    share = made.preserved / made.memory
    output.lines(f"{made.nr_folios} folios, {size(made.preserved)}: {share:.1%} of {size(made.memory)} of memory\n\n")
    table = output.table(">folios", ">of", ">bytes", "where")
    for zone in made.zones:
        how = f"scattered over {size(zone.slots * zone.size)}" if zone.random else "contiguous"
        bounds = f"{how} from {zone.start:#x}"
        table.add(str(zone.count), size(zone.size), size(zone.count * zone.size), bounds)
    table.show()
    output.line()


def show_scratch(made: Plan) -> None:
    """Print how much scratch the kernel would reserve, and how exact that figure is."""
    found = made.scratch
    output.line()
    output.line(f"Scratch sizes with kho_scratch={found.value}:")
    for page, sizes in found.sizes.items():
        low, anywhere, *nodes = sizes
        text = f"low memory {size(low)}, global {size(anywhere)}, node {', '.join(map(size, nodes))}"
        output.line(f"  {size(page)} pages: {text}; {size(sum(sizes))} in all")
        if found.unaligned(page):
            wrong = " and ".join(map(size, found.unaligned(page)))
            block = size(found.aligned[page])
            output.line(f"  {wrong}: no multiple of {block}, and this kernel does not round low and global: the pages")
            output.line("  next to the area may be freed while in use")
        if made.left(page) < 0:
            output.line(f"  That is {size(-made.left(page))} more than the folios leave free: preserve fewer folios")
    if found.estimated:
        output.line(
            "  Estimate, within a factor of two: a percentage is of the kernel's reservations at boot, taken as 64"
        )
        output.line("  bytes per page and 16 MiB. Give them with --reserved; a kho_scratch= of three sizes is exact.")
    elif found.reserved is None:
        block = "a pageblock" if found.rounds_all else "a pageblock, but low and global"
        output.line(
            f"  Exact: each size is rounded up to {block}. If an area cannot be placed, the kernel disables KHO."
        )
