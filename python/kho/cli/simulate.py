"""`kho simulate`: carry out a plan in an arena and measure it."""

from __future__ import annotations

import sys

import click

from ..sizing.plan import LAYOUTS
from ..sizing.simulate import DEFAULT_LAYOUT, Simulation, calibrate, simulate
from ..text import size
from . import output
from .options import Number
from .plan import folio_options, kept, seconds, show_folios


@click.command("simulate")
@folio_options
@click.option(
    "--abi", type=click.Choice(list(LAYOUTS)), help=f"The layout to write; default: {DEFAULT_LAYOUT}, or --kernel's."
)
@click.option("--kernel", metavar="RELEASE", help="Write what this kernel (7.0) writes: its layout and root FDT.")
@click.option("--page-size", type=Number(), default=4096, metavar="N", help="4K (the default), 16K or 64K.")
@click.option("--scale", type=float, default=1.0, metavar="F", help="Do a part of it, as 0.1: of memory and folios.")
@click.option("--restore", is_flag=True, help="Also restore every folio, one call each.")
@click.option("--keep", type=click.Path(dir_okay=False), metavar="FILE", help="Keep the memory: a new ELF core.")
@click.option("--seed", type=int, default=1, metavar="N", help="How --random scatters.")
@click.option("--calibrate/--no-calibrate", "measure", default=True, help="Compare the times with planned ones.")
@click.option("--calibration", metavar="FILE", help="Take these from what kho plan --json printed.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def command(
    memory: int,
    folios: tuple[str, ...],
    preserve: tuple[str, ...],
    random: bool,
    abi: str | None,
    kernel: str | None,
    page_size: int,
    scale: float,
    restore: bool,
    keep: str | None,
    seed: int,
    measure: bool,
    calibration: str | None,
    as_json: bool,
) -> None:
    """Hand folios over in an arena, take them over, and compare the cost with kho plan.

    The arena has the addresses of the memory but touches only the pages of the map, so a small machine can simulate
    terabytes. If even the map does not fit, the command fails and names the --scale that fits.

    \b
      kho simulate --memory 2T --preserve 80%:2M
      kho simulate --memory 1T --folios 10000000x4K --random --restore
      kho simulate --memory 64G --preserve 50%:4K --abi kho-v1-512 --keep old.elf; kho inspect old.elf
      kho simulate --memory 64G --preserve 50%:4K --kernel 7.0 --keep new.elf
      kho simulate --memory 16T --preserve 90%:4K --scale 0.1

    \b
    Exit codes: 0 the result matches the plan, 1 metadata or folios differ from kho plan, 2 not possible.
    """
    speed = kept(calibration) if calibration is not None else None
    with output.steps("simulating") as told:
        done = simulate(
            memory,
            folios,
            preserve=preserve,
            random=random,
            page_size=page_size,
            layout=abi,
            kernel=kernel,
            calibration=speed or (calibrate() if measure else None),
            scale=scale,
            restore=restore,
            keep=keep,
            seed=seed,
            progress=told,
        )
    if as_json:
        output.print_json(done.as_dict())
    else:
        show(done)
    if not done.as_planned:
        sys.exit(1)


def show(done: Simulation) -> None:
    """Print the result as text: bytes first, then times, which differ between machines."""
    show_folios(done.plan)
    cost = done.cost
    about = "" if cost.exact else f" on average, standard deviation {size(round(cost.deviation))} or less"
    planned = f"{cost.pages} pages{about}"
    output.line(f"{cost.layout.name}, pages of {size(cost.page_size)}")
    output.line(f"metadata     {done.pages} pages, {size(done.nbytes)}; planned {planned}")
    output.line(f"taken over   {done.nr_folios} folios, including the page of the root FDT")
    output.line("as planned" if done.as_planned else "NOT as planned")
    if done.kept is not None:
        output.line(f"kept         {done.kept}: kho inspect reads it")
    output.line()
    table = output.table("step", ">time", ">planned", ">a folio")
    expected = {"serialize": cost.serialize_s, "take over": cost.take_over_s}
    for what, took in done.seconds.items():
        table.add(what, seconds(took), seconds(expected.get(what)), f"{took / done.nr_folios * 1e9:.3g} ns")
    table.show()
    output.line(f"peak RSS {size(done.peak_rss)}, {done.page_faults} page faults")
