"""The `kho` command. Data goes to stdout, errors to stderr; exit 0 fine, 1 findings, 2 bad input."""

from __future__ import annotations

import sys

import click

from .. import __version__
from ..errors import KhoError
from . import convert, diff, extract, fdt, inspect, memmap, owners, verify
from .output import hint

HELP = """Linux Kexec HandOver (KHO) in userspace.

KHO is how Linux carries memory across kexec: the old kernel marks folios as preserved, writes that map into plain
physical memory, and hands one small FDT to the next kernel, which restores every folio in place.

\b
  kho inspect core.elf                 what does this memory hand over?
  kho inspect ram.bin@0x40000000       the same for a raw image that begins at 1 GiB
  kho inspect --json core.elf | jq .   as data
  kho convert core.elf --abi kho-v4 -o new.elf   the same folios as another kernel writes them
  kho verify core.elf                  is anything wrong with it?
  kho owners core.elf                  whose is each preserved page?

A SOURCE is an ELF core, a raw image with the physical address of its first byte after an @, or several of them that
make up one memory. No vmlinux and no symbols are needed.
"""


@click.group(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kho")
def cli() -> None:
    """Hold the subcommands; each is a module of this package."""


cli.add_command(inspect.command)
cli.add_command(extract.command)
cli.add_command(diff.command)
cli.add_command(fdt.command)
cli.add_command(memmap.command)
cli.add_command(convert.command)
cli.add_command(verify.command)
cli.add_command(owners.command)


def main() -> None:
    """Run the command; an error of kho is one line on stderr, with a hint, and exit code 2."""
    try:
        cli.main(standalone_mode=False)
    except KhoError as error:
        click.echo(f"kho: {error}", err=True)
        advice = hint(error)
        if advice:
            click.echo(f"hint: {advice}", err=True)
        sys.exit(2)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
