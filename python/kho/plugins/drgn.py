"""The command `%kho` of drgn: what KHO preserves in the memory that drgn has open.

The entry point group `drgn.plugins` names this module, so that drgn has the command wherever kho is installed.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

from drgn import Program

from ..cli import output
from ..cli.inspect import show as show_handover
from ..cli.owners import show as show_owners
from ..cli.verify import show as show_findings
from ..errors import KhoError
from ..handover.describe import describe
from ..handover.owners import owners
from ..handover.rules import SEVERITIES
from ..handover.verify import verify
from ..readers.drgn import memory
from ..sources import open as open_handover

__all__ = ["drgn_prog_set", "run"]


def drgn_prog_set(prog: Program) -> None:
    """Define `%kho`; drgn calls this for each program that it opens. A drgn without commands is left as it is."""
    _define()


@cache
def _define() -> None:
    """Define the command, once."""
    try:
        from drgn.commands import CommandError, argument, command
    except ImportError:
        return

    @command(  # type: ignore[untyped-decorator,unused-ignore]
        name="kho",
        description="show what Linux Kexec HandOver preserves in this memory",
        long_description="Show the handover in the physical memory of the program, or check it, or list the owners.",
        arguments=(
            argument(
                "what",
                nargs="?",
                choices=("inspect", "verify", "owners"),
                default="inspect",
                help="default: inspect",
            ),
            argument("--fdt-phys", type="hexadecimal", help="physical address of the root FDT; default: by a search"),
        ),
    )
    def kho_command(prog: Program, name: str, args: argparse.Namespace, **kwargs: Any) -> Any:
        try:
            return run(prog, args.what, args.fdt_phys)
        except KhoError as error:
            raise CommandError(str(error)) from error


def run(prog: Program, what: str = "inspect", fdt_phys: int | None = None) -> Any:
    """Print a handover as `kho inspect`, `kho verify` or `kho owners` does, and return its object.

    Returns: an `Incoming`, the findings, or the `Owners`.

    Raises: as `kho.open`; ParameterError for another `what`.
    """
    inc = open_handover(memory(prog), fdt_phys=fdt_phys)
    if what == "verify":
        found = verify(inc)
        show_findings(found, {severity: sum(f.severity == severity for f in found) for severity in SEVERITIES})
        return found
    if what == "owners":
        rows = owners(inc)
        show_owners(inc, rows, by_page=False)
        return rows
    show_handover(inc, describe(inc), "this program", full=False)
    output.note_opened(inc)
    return inc
