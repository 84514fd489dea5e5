"""Options and parameter types that several commands share, and the function that opens a source."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .._kho import Incoming, Memory
from ..errors import ParameterError
from ..handover.running import is_running, open_running
from ..sizes import parse_size
from ..sources import memory
from ..sources import open as open_source
from . import output

Command = TypeVar("Command", bound=Callable[..., Any])

if TYPE_CHECKING:
    IntType = click.ParamType[int]
    IntsType = click.ParamType[tuple[int, ...]]
else:  # ParamType is a generic class from click 8.4 on
    IntType = IntsType = click.ParamType


class Number(IntType):
    """A number below 2^64, a size or an address: `parse_size`."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the number; click reports a usage error if it is invalid."""
        try:
            return parse_size(value)
        except ParameterError as error:
            self.fail(str(error), param, ctx)


class Range(IntsType):
    """Parameter type: `count` numbers separated by colons, as in `0xb400000:0x2000000`."""

    name = "range"

    def __init__(self, count: int) -> None:
        self.count = count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the numbers; click reports a usage error if they are invalid."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(":")
        if len(parts) != self.count:
            self.fail(f"{value!r} is not {self.count} numbers with colons between them", param, ctx)
        return tuple(Number().convert(part, param, ctx) for part in parts)


def read_options(function: Command) -> Command:
    """Add `--fdt-phys`, `--bitmap-bytes` and `--page-size`, named like the arguments of `kho.open`."""
    options = (
        click.option(
            "--fdt-phys",
            type=Number(),
            metavar="A",
            help="Physical address of the root FDT; the memory is not searched then.",
        ),
        click.option(
            "--bitmap-bytes", type=Number(), metavar="N", help="512 (Linux 6.16, 6.17) or the page size; else decided."
        ),
        click.option(
            "--page-size", type=Number(), metavar="N", help="4096, 16384 or 65536; else decided from evidence."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def source_options(function: Command) -> Command:
    """Add the argument SOURCE, one or more, as `source`, `read_options`, and `--scratch`."""
    scratch = click.option(
        "--scratch",
        type=Number(),
        metavar="A",
        help="Physical address of the array of scratch areas, as `linux,kho-scratch` or struct kho_data names it; else "
        "found by the search for the root FDT, which --fdt-phys leaves out.",
    )
    return click.argument("source", nargs=-1, required=True)(read_options(scratch(function)))


def read(
    source: tuple[str, ...] | Memory,
    *,
    fdt_phys: int | None = None,
    bitmap_bytes: int | None = None,
    page_size: int | None = None,
    scratch: int | None = None,
) -> Incoming:
    """Open the handover in the given sources or memory; show progress if stderr is a terminal.

    Prints on stderr why the handover may not be what it is read as.
    Of a running machine that is the one in /proc/kcore. Raises: UnreadableError (`kho.handover.running`).
    """
    inc = read_unmarked(source, fdt_phys=fdt_phys, bitmap_bytes=bitmap_bytes, page_size=page_size, scratch=scratch)
    output.doubts(inc.unverified, err=True)
    return inc


def read_unmarked(source: tuple[str, ...] | Memory, **options: int | None) -> Incoming:
    """Open a handover as `read`, without a line on why it may not be what it is read as: the caller prints it."""
    if not isinstance(source, Memory) and len(source) == 1 and is_running(source[0]):
        return read_running(source[0], **options)[0]
    with output.progress("searching") as told:
        opened = source if isinstance(source, Memory) else memory(source, progress=told)
        with output.noting_cuts(opened):
            inc = open_source(opened, progress=told, **options)
    output.note_opened(inc)
    return inc


def read_running(source: str, **options: int | None) -> tuple[Incoming, Memory]:
    """Open the handover in the memory of a running machine; a note tells what it lacks.

    Raises: UnreadableError (`kho.handover.running`).
    """
    with output.progress("searching") as told:
        inc, memory = open_running(source, progress=told, **options)
    where = memory.sources[0]
    output.line(
        f"note: read from {where}, while the kernel runs: LUO writes its sessions at the kexec, until when their pages "
        "have no owner",
        err=True,
    )
    return inc, memory
