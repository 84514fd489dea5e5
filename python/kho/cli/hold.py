"""`kho hold`: keep a service's memory while its command is restarted."""

from __future__ import annotations

import sys
from typing import get_args

import click

from ..errors import ParameterError
from ..live import size_of
from ..live.transports.holder import Holder, Restart
from . import output


@click.command("hold")
@click.argument("name")
@click.option("--size", metavar="SIZE", help="Size limit, as in 8G; default: as the command asks.")
@click.option(
    "--restart",
    type=click.Choice(get_args(Restart)),
    default="on-failure",
    show_default=True,
    help="When to restart the command.",
)
@click.option("--grace", type=click.FloatRange(0.0), default=10.0, show_default=True, help="Seconds until SIGKILL.")
@click.option(
    "--settled",
    type=click.FloatRange(0.0),
    default=10.0,
    show_default=True,
    help="Seconds; a command that exits earlier failed to start.",
)
@click.option(
    "--failures",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Give up after this number of consecutive failures to start.",
)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    name: str, size: str | None, restart: Restart, grace: float, settled: float, failures: int, argv: tuple[str, ...]
) -> None:
    """Keep the memory of service NAME while its command ARGV restarts or crashes.

    \b
      kho hold search-index --size 8G -- python serve.py

    In the command, kho.live.open(NAME) returns the memory as last committed. SIGHUP restarts the command; SIGTERM and
    SIGINT end the command and the holder; SIGUSR1 and SIGUSR2 are forwarded to the command. A command that exits with
    an error is restarted after a delay that grows up to 30 s. If the holder is killed, the command gets SIGTERM.

    \b
    Exit codes: 0 or that of the command, 128 + N for signal N, 2 bad input or NAME is in use.
    """
    words = argv[1:] if argv[0] == "--" else argv
    if not words:
        raise ParameterError("hold: no command to run; write it after --")

    nbytes = None if size is None else size_of(size)
    holder = Holder(
        name, words, size=nbytes, restart=restart, grace=grace, settled=settled, failures=failures, log=_say
    )
    sys.exit(holder.run())


def _say(text: str) -> None:
    output.line(text, err=True)
