"""`kho schema`: the JSON schema of the JSON of a command."""

from __future__ import annotations

import click

from . import output
from .schemas import COMMANDS, named, schema


@click.command("schema")
@click.argument("name", metavar="COMMAND", type=click.Choice(sorted(COMMANDS)), required=False)
@click.option("--list", "as_list", is_flag=True, help="List the commands that print JSON, and their schemas.")
def command(name: str | None, as_list: bool) -> None:
    """Print the JSON schema (2020-12) of the documents that COMMAND prints as JSON.

    Each document names its schema in its first member, schema. The number at its end is raised when a member is removed
    or changes its type or meaning; new members do not raise it.

    \b
      kho schema inspect > inspect.schema.json
      kho schema --list

    \b
    Exit codes: 0 printed, 2 no such command.
    """
    if as_list:
        table = output.table("command", "schema")
        for each in sorted(COMMANDS):
            table.add(f"kho {each}", named(each))
        table.show()
        return
    if name is None:
        raise click.UsageError("COMMAND is needed; --list shows all")
    output.write_json(pieces_of(name), named=False)


def pieces_of(name: str) -> list[str]:
    """Return the schema of a command as JSON text in pieces."""
    from ..jsontext import pieces

    return list(pieces(schema(name), hexed=False))
