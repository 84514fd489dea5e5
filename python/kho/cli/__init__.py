"""The `kho` command. Data goes to stdout, errors to stderr; exit 0 fine, 1 findings, 2 bad input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from importlib import import_module

import click

from .. import __version__
from .._kho import abis
from ..errors import KhoError

HELP = """Linux Kexec HandOver (KHO) in userspace.

KHO is how Linux carries memory across kexec: the old kernel marks folios as preserved, writes that map into plain
physical memory, and hands one small FDT to the next kernel, which restores every folio in place.

A SOURCE is an ELF core, a raw image with the physical address of its first byte after an @ (ram.bin@0x40000000), or
several of them that make up one memory. No vmlinux and no symbols are needed.
"""

TASKS = {
    "doctor": ("where did my RAM go?", "kho doctor"),
    "inspect": ("what does this memory hand over?", "kho inspect core.elf"),
    "map": ("where in memory is it?", "kho map core.elf"),
    "owners": ("whose is every page of it?", "kho owners core.elf"),
    "verify": ("is anything wrong with it?", "kho verify core.elf"),
    "fdt": ("the devicetrees, as source", "kho fdt --all core.elf"),
    "extract": ("take a file out", "kho extract core.elf --session vm-1 --token 0x10 -o disk.img"),
    "diff": ("what differs between two?", "kho diff before.elf after.elf"),
    "convert": ("write it as another kernel would", f"kho convert core.elf --abi {[*abis()][-1]} -o new.elf"),
    "plan": ("what will handing over cost?", "kho plan --memory 2T --preserve 80%:2M"),
    "simulate": ("do it, and measure", "kho simulate --memory 2T --preserve 80%:2M"),
    "hold": ("keep memory while a service restarts", "kho hold search-index --size 8G -- python serve.py"),
    "ps": ("which services keep memory?", "kho ps"),
    "release": ("give it back", "kho release search-index"),
}
"""What each command is for, with an example, in the order one needs them."""

MODULES = {"map": "memmap"}
"""Where a command is, if not in the module of its name."""


class Commands(MutableMapping[str, click.Command]):
    """The commands by name. A module is imported when its command is asked for: one run needs one of them."""

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
    """A group whose help has an example for every command there is, and lists commands in the order of `TASKS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands."""
        order = list(TASKS)
        return sorted(self.commands, key=lambda name: (order.index(name) if name in order else len(order), name))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what KHO is, then the examples."""
        super().format_help_text(ctx, formatter)
        examples = [(task, example) for name, (task, example) in TASKS.items() if name in self.commands]
        with formatter.section("Examples"):
            formatter.write_dl(examples, col_max=34)


@click.group(cls=Teaching, commands=Commands(), help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kho")
def cli() -> None:
    """Hold the subcommands; each is a module of this package."""


def main() -> None:
    """Run the command; an error of kho is one line on stderr, with a hint, and exit code 2."""
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
    except UnicodeEncodeError as error:  # an argument that is no UTF-8, where it must be text
        output.fail(KhoError(f"{error.object!r} is not text in UTF-8"))
    except OSError as error:  # stdout, mostly: a full disk
        output.fail(error)
