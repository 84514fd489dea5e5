"""`kho release`: free the memory of a kho.live image."""

from __future__ import annotations

import sys

import click

from ..errors import BusyError, ParameterError
from ..live.handover.registry import release
from . import output


@click.command("release")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Release it even if a process uses it.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def command(name: str, yes: bool, force: bool, as_json: bool) -> None:
    """Free the memory of service NAME; a NAME with a slash is the path of an image file.

    Memory in use is kept unless --force is given: then a holder ends its command and exits, and a service that owns
    the image itself keeps only the arrays that it has exported.

    \b
    Exit codes: 0 released, 1 in use or not confirmed, 2 no such image.
    """
    if not yes:
        confirmed = output.confirm(f"Free the memory of {name}? Its contents will be lost")
        if confirmed is None:
            raise ParameterError(f"release {name}: its contents will be lost; confirm with --yes")
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
        output.line(f"{name}: released, {output.size(freed)} freed")
