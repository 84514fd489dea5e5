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
@click.option("--size", metavar="SIZE", help="Memory there may be, as 8G; else what the command asks for.")
@click.option(
    "--restart",
    type=click.Choice(get_args(Restart)),
    default="on-failure",
    show_default=True,
    help="When the command is started again.",
)
@click.option("--grace", type=click.FloatRange(0.0), default=10.0, show_default=True, help="Seconds it has to end.")
@click.option(
    "--settled",
    type=click.FloatRange(0.0),
    default=10.0,
    show_default=True,
    help="Seconds after which ending is no failure to start.",
)
@click.option(
    "--failures",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Failures to start, one after the other, to give up after.",
)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    name: str, size: str | None, restart: Restart, grace: float, settled: float, failures: int, argv: tuple[str, ...]
) -> None:
    """Keep the memory of service NAME while the command ARGV is restarted, or crashes.

    \b
      kho hold search-index --size 8G -- python serve.py

    In the command, kho.live.open(NAME) finds the memory as it was last committed. SIGHUP restarts the command; SIGTERM
    and SIGINT end it, and the holder; SIGUSR1 and SIGUSR2 it gets. What ends with an error is started again, later each
    time up to 30 s. When the holder is killed the command is asked to end.

    \b
    Exit codes: 0 or what the command exits with, 128 + N for signal N, 2 bad input or NAME is taken.
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
