"""The one place where text leaves the program: every command prints through here, a line or a row at a time.

What is printed has names from memory, files and logs in it, which are not to be trusted. So everything is printed as a
line, or as a cell of a table, and is escaped (`kho.text.printable`): it cannot move the cursor, recolor, reorder, hide,
or begin a line of its own. A test holds that no other module of the command prints.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from time import monotonic
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

import click

from .. import errors
from .._kho import Incoming
from ..sizes import format_size
from ..text import printable

if TYPE_CHECKING:
    from rich.console import Console

Part = str | tuple[str, str]
"""Text, or text and its style: `("error", "bold red")`."""

LINE = 8192
"""Characters of a text in a line, and no more; two paths of the longest kind fit."""
CELL = 160
"""Characters of a cell in a table."""
BUFFER = 1 << 16
"""Characters that are collected before they are written."""
MOST_LAID_OUT = 512
"""Rows of a table that rich lays out, a quarter of a millisecond each; a longer one is put into plain columns."""
WIDE = 1 << 16
"""Columns that tables are laid out for: more than any row has, as a row that is wrapped looks like two."""


def line(*parts: Part, err: bool = False, limit: int | None = LINE) -> None:
    """Print one line: each part escaped, cut to `limit` characters, and in its style on a terminal."""
    _print(parts, "", err=err, limit=limit)


def _print(parts: Iterable[Part], indent: str, *, err: bool, limit: int | None) -> None:
    stream = sys.stderr if err else sys.stdout
    color = _color(stream)
    shown = indent
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        text = text[len(indent) :]
        text = _encodable(printable(text, limit), stream)
        shown += _styled(text, style) if color and style and text else text
    click.echo(shown, err=err, color=color)


def exact_line(text: str) -> None:
    """Print one line that another program reads: escaped on a terminal, else as it is, in the bytes of file names.

    The text has no line ends: the caller has escaped them as that program does.
    """
    if sys.stdout.isatty():
        line(text)
        return
    sys.stdout.flush()
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None:  # text that another program collects
        sys.stdout.write(text + "\n")
    else:
        raw.write(os.fsencode(text) + b"\n")
        raw.flush()


def lines(text: str | Iterable[str], *, err: bool = False, limit: int | None = None) -> None:
    """Print lines: of an iterable, an item each; of kho's own text, as it is divided. Tabs that indent them stay.

    An iterable is printed as it is made, a buffer at a time: it may have millions of items.
    """
    stream = sys.stderr if err else sys.stdout

    def shown() -> Iterator[str]:
        for each in text.removesuffix("\n").split("\n") if isinstance(text, str) else text:
            bare = each.lstrip("\t")
            yield each[: len(each) - len(bare)] + _encodable(printable(bare, limit), stream) + "\n"

    _write(shown(), stream)


def _write(pieces: Iterable[str], stream: Any) -> None:
    """Write text that is escaped already, as it is made, a buffer at a time."""
    some: list[str] = []
    chars = 0
    for piece in pieces:
        some.append(piece)
        chars += len(piece)
        if chars >= BUFFER:
            stream.write("".join(some))
            some, chars = [], 0
    stream.write("".join(some))
    stream.flush()


class Table:
    """A table without lines, a row a line. Cells are escaped."""

    def __init__(self, *columns: str, limit: int = CELL) -> None:
        """Begin a table; numbers (columns named with a leading `>`) stand to the right."""
        self._columns = columns
        self._limit = limit
        self._rows: list[tuple[Part, ...]] = []

    def add(self, *cells: Part) -> None:
        """Add a row."""
        self._rows.append(cells)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._rows)

    def show(self, *, header: bool = True) -> None:
        """Print it."""
        if len(self._rows) > MOST_LAID_OUT:
            self._show_plain(header=header)
            return
        from rich import table
        from rich.text import Text

        made = table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=header)
        for column in self._columns:
            right = column.startswith(">")
            made.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=True)
        for row in self._rows:
            shown = []
            for cell in row:
                shown.append(Text(self._text(cell), "" if isinstance(cell, str) else cell[1]))
            made.add_row(*shown)
        _console().print(made, crop=False)

    def _show_plain(self, *, header: bool) -> None:
        """Print it without styles."""
        heads = [[column.lstrip(">") for column in self._columns]] if header else []
        texts = [[self._text(cell) for cell in row] for row in self._rows]
        widths = [max(map(len, column)) for column in zip(*heads, *texts, strict=True)]
        right = [column.startswith(">") for column in self._columns]

        def shown() -> Iterator[str]:
            for row in (*heads, *texts):
                cells = zip(row, widths, right, strict=True)
                yield "  ".join(cell.rjust(width) if r else cell.ljust(width) for cell, width, r in cells) + "\n"

        _write(shown(), sys.stdout)

    def _text(self, cell: Part) -> str:
        """Give a cell as it is printed, without its style."""
        return _encodable(printable(cell if isinstance(cell, str) else cell[0], self._limit), sys.stdout)


def table(*columns: str, limit: int = CELL) -> Table:
    """Begin a table: `Table`."""
    return Table(*columns, limit=limit)


size = format_size


def width() -> int:
    """Give the columns of the terminal; 120 without one, which is wide enough for addresses."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else 120


def charset() -> str:
    """Say what the output can show: `utf`, or `ascii`."""
    return "utf" if (sys.stdout.encoding or "utf-8").lower().startswith("utf") else "ascii"


def print_json(data: Any, *, indent: int | None = 2, hexed: bool = True) -> None:
    """Print data as JSON in ASCII; integers beyond 2^53, and tokens, have a string in hex next to them if `hexed`.

    An iterator in it is a list, whose items are printed as they are made.
    """
    from ..jsontext import dumps, pieces

    write_json([dumps(data, hexed=hexed)] if indent is None else pieces(data, hexed=hexed))


def write_json(text: Iterable[str]) -> None:
    """Print JSON that `kho.jsontext` has written, piece by piece."""
    _write(chain(text, ["\n"]), sys.stdout)


def print_json_rows(head: Mapping[str, Any], name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Print an object of `head` and a list `name` with a row a line: rows may be millions."""
    from ..jsontext import dumps, pieces

    def text() -> Iterator[str]:
        for piece in pieces(head):
            if piece != "\n}":
                yield piece
        yield f',\n  "{name}": ['
        separator = "\n    "
        for row in rows:
            yield separator + dumps(row)
            separator = ",\n    "
        yield "\n  ]\n}"

    write_json(text())


def csv_rows(columns: Sequence[str]) -> Callable[[Iterable[Any]], None]:
    """Begin CSV with its header; what is given prints a row, a line, with its texts escaped."""
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")

    def row(values: Iterable[Any]) -> None:
        writer.writerow(
            [_encodable(printable(value), sys.stdout) if isinstance(value, str) else value for value in values]
        )

    row(columns)
    return row


def binary(*, force: bool = False) -> BinaryIO:
    """Give stdout for contents, which are no text. Raises: ParameterError if it is a terminal, unless `force`."""
    if sys.stdout.isatty() and not force:
        raise errors.ParameterError("stdout is a terminal, and contents may hold anything: redirect it, or say --force")
    sys.stdout.flush()
    return cast(BinaryIO, sys.stdout.buffer)


def confirm(*parts: str) -> bool | None:
    """Ask on the terminal; None if stdin is none."""
    if not sys.stdin.isatty():
        return None
    return click.confirm(_encodable(printable("".join(parts), LINE), sys.stderr), err=True)


def say_placement(inc: Incoming) -> None:
    """Say on stderr that a raw image is read somewhere else than where it was named, and how to prevent it."""
    if (at := inc.placement) is not None:
        text = f"{at.named} is read as {at.argument} ({at.certainty}): {at.why}; {at.as_is} reads it as named"
        line(f"note: {text}", err=True)
    elif inc.address == "named" and inc.pages_outside:
        text = "are not in this memory: it is a part of one, or does not lie where it was named"
        line(f"warning: {inc.pages_outside} preserved pages {text}", err=True)


@contextmanager
def progress(doing: str) -> Iterator[Callable[[int], None] | None]:
    """Show on stderr how many bytes have been seen, if it is a terminal and the work takes longer than a moment."""
    with _status(doing) as update:
        yield None if update is None else lambda nbytes: update(f"{doing}: {size(nbytes)}")


@contextmanager
def steps(doing: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show on stderr how much of each step of a work is done, as `progress` does."""
    with _status(doing) as update:
        yield None if update is None else lambda what, done, total: update(f"{what}: {done} of {total} folios")


@contextmanager
def _status(doing: str) -> Iterator[Callable[[str], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.text import Text

    began = monotonic()
    with Console(stderr=True).status(Text(printable(doing, CELL))) as status:

        def update(text: str) -> None:
            if monotonic() - began > 0.5:
                status.update(Text(printable(text, CELL)))

        yield update


@contextmanager
def bar(doing: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """Show on stderr how many of `total` are done, if it is a terminal; what is called is told how many."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(printable(doing, CELL), total=total)
        yield lambda done: shown.update(task, completed=done)


def hint(error: errors.KhoError) -> str | None:
    """Say what to try after an error."""
    match error:
        case errors.NoHandoverError(kind="devicetree"):
            return None
        case errors.NoHandoverError():
            return "was it taken after the handover was finalized? A raw image needs its address: FILE@0x40000000"
        case errors.UnsupportedAbiError():
            return "a newer kho may read it"
        case errors.OutsideMemoryError():
            return "is the image complete? Give all parts of the memory, each with its address"
        case errors.FdtError():
            return None
        case errors.FormatError():
            return "--page-size, --bitmap-bytes and --fdt-phys override what was decided"
        case _:
            return None


def fail(error: BaseException) -> NoReturn:
    """Print an error, a line, with a hint if there is one, and end with exit code 2."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) and not _own(error) else str(error)
    line(f"kho: {text}", err=True)
    advice = hint(error) if isinstance(error, errors.KhoError) else None
    if advice:
        line(f"hint: {advice}", err=True)
    sys.exit(2)


def usage(error: click.ClickException) -> NoReturn:
    """Print what is wrong with the command line as click does, and end with exit code 2."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        context = error.ctx
        lines(context.get_usage(), err=True)
        names = context.help_option_names
        if names and context.command.get_help_option(context) is not None:
            lines([f"Try '{context.command_path} {names[0]}' for help.", ""], err=True)
    # Click puts the choices of an option on lines of their own; what was given may have line ends, too.
    line(f"Error: {' '.join(error.format_message().split())}", err=True)
    if isinstance(error, click.NoSuchOption) and error.option_name.startswith(("-@", "-,")):
        line("hint: a source on stdin with an address goes after --, as in: kho inspect -- -@0x40000000", err=True)
    sys.exit(2)


def _unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what an output's encoding does not have: a byte of a file name as that byte, everything else escaped."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    if all("\udc80" <= char <= "\udcff" for char in text):
        return text.encode("utf-8", "surrogateescape"), error.end
    return codecs.backslashreplace_errors(error)


def open_streams() -> None:
    """Open /dev/null for a stdin or stderr that the caller closed, which Python gives as None; without stdout, end.

    Their descriptors go to what is opened next, which a child of `kho hold` or a write to stderr would then hit.
    What an encoding lacks is escaped from here on.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    closed = sys.stdout is None
    if closed:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if closed:
        line("kho: stdout is closed: send it to /dev/null if it is not wanted", err=True)
        sys.exit(2)
    codecs.register_error("kho", _unencodable)
    for stream in (sys.stdout, sys.stderr):
        # File names are bytes, and may be no text: printing one must not fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="kho")


def end_of_pipe() -> NoReturn:
    """End quietly: the reader of the output has gone."""
    sys.stderr.close()
    sys.exit(0)


def _own(error: BaseException) -> bool:
    return isinstance(error, errors.KhoError)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=WIDE)


def _color(stream: Any) -> bool:
    """Whether to style text: as rich decides (https://no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _styled(text: str, style: str) -> str:
    """Put a style of words (`bold`, `dim`, a color) around text."""
    words = style.split()
    color = next((word for word in words if word not in ("bold", "dim")), None)
    return click.style(text, fg=color, bold="bold" in words or None, dim="dim" in words or None)


def _encodable(text: str, stream: Any) -> str:
    """Escape what the stream's encoding does not have."""
    if text.isascii():
        return text
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
