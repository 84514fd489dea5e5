"""`kho ps`: list the kho.live images of this user and the processes that hold them."""

from __future__ import annotations

import os
import time

import click

from ..live.handover.registry import Holding, holdings
from . import output


@click.command("ps")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; times in seconds.")
def command(as_json: bool) -> None:
    """List the memory that services of this user keep with kho.live, and the process that holds each.

    Queries every process with a socket in the runtime directory ($XDG_RUNTIME_DIR/kho) and removes the sockets of
    killed processes. Images that ended processes have left there, or in /dev/shm, have the state "left". Images with a
    path are listed if they were opened with serve=True.

    \b
    Exit codes: 0 listed, 2 other users have access to the directory.
    """
    rows = holdings()
    now = time.time()
    if as_json:
        output.print_json({"images": [row._asdict() | {"age": age(row, now)} for row in rows]})
        return
    table = output.table(
        "name", ">pid", "state", ">generation", ">objects", ">used", ">size", "from", ">age", "command"
    )
    for row in rows:
        size = "" if row.state == "silent" else output.size(row.size)
        used = "" if row.state == "silent" else output.size(row.used)
        table.add(
            row.name,
            str(row.child or row.pid or ""),
            row.state,
            str(row.generation),
            str(row.objects),
            used,
            size,
            row.transport,
            text_of(age(row, now)),
            short(row),
        )
    if rows:
        table.show()
    else:
        output.line(f"no service of user {os.geteuid()} keeps memory", err=True)


def age(row: Holding, now: float) -> float | None:
    """Return the seconds since the process began to serve the image, or None if unknown."""
    return round(max(now - row.since, 0.0), 1) if row.since else None


def text_of(seconds: float | None) -> str:
    """Format a time with its two largest units: 3d 4h."""
    if seconds is None:
        return ""
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        n, left = divmod(left, size)
        if n or (unit == "s" and not parts):
            parts.append(f"{n}{unit}")
    return " ".join(parts[:2])


def short(row: Holding) -> str:
    """Return the command, cut to 40 characters."""
    return row.command if len(row.command) <= 40 else row.command[:37] + "..."
