"""The `kho` command. Data goes to stdout, errors to stderr; exit 0 success, 1 findings, 2 bad input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from importlib import import_module

import click

from .. import __version__
from .._kho import abis
from ..errors import KhoError

HELP = """Linux Kexec HandOver (KHO) in userspace.

With KHO, Linux keeps memory across kexec: the old kernel marks folios as preserved, writes a map of them to physical
memory, and passes a small FDT to the next kernel, which restores every folio in place.

A SOURCE is a core or vmcore (ELF), a kdump file of makedumpfile, a LiME or AVML dump, a raw image followed by @ and the
physical address of its first byte (ram.bin@0x40000000), the memory file of a virtual machine (ram,machine=q35), an
arena's file, any of these compressed, "-" for a pipe, or several files that are parts of one memory. "live" is the
running machine. No vmlinux and no symbols are needed. `kho doctor` reads / or a copy of /proc and /sys instead.
"""

TASKS = {
    "doctor": ("how much RAM does KHO take?", "kho doctor"),
    "inspect": ("show a handover", "kho inspect core.elf"),
    "map": ("draw it by address", "kho map core.elf"),
    "owners": ("list the owner of each page", "kho owners core.elf"),
    "verify": ("check it for defects", "kho verify core.elf"),
    "compat": ("judge whether a kernel takes it", "kho compat core.elf 7.0"),
    "fdt": ("print its devicetrees", "kho fdt --all core.elf"),
    "extract": ("extract a file", "kho extract core.elf --session vm-1 --token 0x10 -o disk.img"),
    "diff": ("compare two handovers", "kho diff before.elf after.elf"),
    "convert": ("convert to another ABI", f"kho convert core.elf --abi {[*abis()][-1]} -o new.elf"),
    "plan": ("compute the cost of one", "kho plan --memory 2T --preserve 80%:2M"),
    "simulate": ("simulate and measure it", "kho simulate --memory 2T --preserve 80%:2M"),
    "hold": ("keep memory while a service restarts", "kho hold search-index --size 8G -- python serve.py"),
    "ps": ("list services that keep memory", "kho ps"),
    "release": ("release that memory", "kho release search-index"),
    "schema": ("print the schema of a command's JSON", "kho schema inspect"),
}
"""Command -> purpose and example, in the order of the help text."""

MODULES = {"map": "memmap"}
"""Command -> module, where their names differ."""


class Commands(MutableMapping[str, click.Command]):
    """The commands by name. A module is imported on first access, because a run needs only one command."""

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command | None] = dict.fromkeys(TASKS)

    def __getitem__(self, name: str) -> click.Command:
        found = self._loaded[name]
        if found is None:
            found = import_module(f".{MODULES.get(name, name)}", __package__).command
            assert isinstance(found, click.Command)
            self._loaded[name] = found
        return found

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded


class Teaching(click.Group):
    """A click group that lists commands in the order of `TASKS`, with an example for each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of `TASKS`."""
        order = list(TASKS)
        return sorted(self.commands, key=lambda name: (order.index(name) if name in order else len(order), name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of this name; `help` is not one, but people try it. Raises UsageError for it."""
        if cmd_name == "help":
            raise click.UsageError("use kho --help, and kho COMMAND --help")
        return super().get_command(ctx, cmd_name)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description of KHO, then the examples."""
        super().format_help_text(ctx, formatter)
        examples = [(task, example) for name, (task, example) in TASKS.items() if name in self.commands]
        with formatter.section("Examples"):
            formatter.write_dl(examples, col_max=34)


@click.group(cls=Teaching, commands=Commands(), help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kho")
def cli() -> None:
    """The root command; each subcommand is a module of this package."""


def main() -> None:
    """Run the command. A `KhoError` is printed as one line on stderr, with a hint; the exit code is then 2."""
    from . import output

    output.open_streams()
    try:
        cli.main(standalone_mode=False)
    except KhoError as error:
        output.fail(error)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        output.usage(error)
    except BrokenPipeError:
        output.end_of_pipe()
    except UnicodeEncodeError as error:  # an argument that must be text is not valid UTF-8
        output.fail(KhoError(f"{error.object!r} is not valid UTF-8"))
    except OSError as error:  # usually from stdout: disk full
        output.fail(error)
