"""`kho release`: give an image's memory back."""

from __future__ import annotations

import sys

import click

from ..errors import BusyError, ParameterError
from ..live.handover.registry import release
from . import output


@click.command("release")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Even while a process uses it.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def command(name: str, yes: bool, force: bool, as_json: bool) -> None:
    """Give back the memory of service NAME, or, if there is a slash in it, of the image in that file.

    What is in use stays, unless --force says otherwise: a holder ends its command then and with it itself; a service
    that owns the image by itself keeps no more of it than the arrays that it shows.

    \b
    Exit codes: 0 released, 1 in use or not confirmed, 2 there is none.
    """
    if not yes:
        confirmed = output.confirm(f"Give back the memory of {name}? What it holds is lost")
        if confirmed is None:
            raise ParameterError(f"release {name}: what it holds is lost; say --yes")
        if not confirmed:
            sys.exit(1)
    try:
        freed = release(name, force=force)
    except BusyError as error:
        output.line(f"kho: {error}", err=True)
        sys.exit(1)
    if as_json:
        output.print_json({"name": name, "freed": freed})
    else:
        output.line(f"{name}: released, {output.size(freed)} given back")
