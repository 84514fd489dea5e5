"""Output of the `kho` command: the only module of `kho.cli` that prints.

Printed text contains names from memory images, files and logs, which are untrusted. All output is therefore printed as
lines or table cells and escaped (`kho.text.printable`): it cannot move the cursor, change colors, reorder or hide text,
or start a new line. A test checks that no other module of the command prints.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from time import monotonic
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

import click

from .. import errors
from .._kho import Arena, Incoming, Memory
from ..handover.absence import CUT_OFF, absence, why_absent
from ..handover.roots import about_roots
from ..sizes import format_size
from ..text import printable

if TYPE_CHECKING:
    from rich.console import Console

Part = str | tuple[str, str]
"""Text, or a pair of text and style: `("error", "bold red")`."""

LINE = 8192
"""Maximum characters of a text in a line; two paths of PATH_MAX bytes fit."""
CELL = 160
"""Maximum characters of a table cell."""
BUFFER = 1 << 16
"""Characters that are buffered before a write."""
MOST_LAID_OUT = 512
"""Maximum rows of a table that rich lays out, at 0.25 ms per row; longer tables use plain columns."""
WIDE = 1 << 16
"""Width in columns for the layout of tables: wider than any row, because a wrapped row looks like two rows."""


def line(*parts: Part, err: bool = False, limit: int | None = LINE) -> None:
    """Print one line. Each part is escaped, cut to `limit` characters and, on a terminal, styled."""
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
    """Print one line for another program: escaped on a terminal, else unchanged, encoded like file names.

    The text contains no line ends: the caller has escaped them in the way that program expects.
    """
    if sys.stdout.isatty():
        line(text)
        return
    sys.stdout.flush()
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None:  # stdout was replaced by a text stream without bytes, e.g. io.StringIO
        sys.stdout.write(text + "\n")
    else:
        raw.write(os.fsencode(text) + b"\n")
        raw.flush()


def lines(text: str | Iterable[str], *, err: bool = False, limit: int | None = None) -> None:
    """Print a text of several lines, or one line per item of an iterable. Leading tabs are kept.

    An iterable is consumed lazily and written in buffers, as it may have millions of items.
    """
    stream = sys.stderr if err else sys.stdout

    def shown() -> Iterator[str]:
        for each in text.removesuffix("\n").split("\n") if isinstance(text, str) else text:
            bare = each.lstrip("\t")
            yield each[: len(each) - len(bare)] + _encodable(printable(bare, limit), stream) + "\n"

    _write(shown(), stream)


def _write(pieces: Iterable[str], stream: Any) -> None:
    """Write pieces of escaped text lazily, in buffers."""
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
    """A table without borders, one line per row. Cells are escaped."""

    def __init__(self, *columns: str, limit: int = CELL) -> None:
        """Start a table; columns whose name begins with `>` are right-aligned, cells are cut to `limit` characters."""
        self._columns = columns
        self._limit = limit
        self._rows: list[tuple[Part, ...]] = []

    def add(self, *cells: Part) -> None:
        """Add a row."""
        self._rows.append(cells)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def show(self, *, header: bool = True) -> None:
        """Print the table."""
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
        """Print the table without styles."""
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
        """Return the printed text of a cell, without its style."""
        return _encodable(printable(cell if isinstance(cell, str) else cell[0], self._limit), sys.stdout)


def table(*columns: str, limit: int = CELL) -> Table:
    """Start a `Table`."""
    return Table(*columns, limit=limit)


size = format_size


def width() -> int:
    """Return the width in columns: that of the terminal, else COLUMNS, else 120, wide enough for addresses."""
    return line_width() or 120


def line_width() -> int | None:
    """Return the width that lines are folded at, from the terminal or else COLUMNS; None without either."""
    if sys.stdout.isatty():
        from rich.console import Console

        return Console().width
    columns = os.environ.get("COLUMNS", "")
    return int(columns[:6]) if columns.isascii() and columns.isdigit() and int(columns[:6]) else None


def folded(text: str, hang: int, width: int | None) -> list[str]:
    """Fold a line at spaces to at most `width` columns, continued at column `hang`. Longer words stay whole."""
    if width is None or len(text) <= width or hang >= width:
        return [text]
    head, rest = text[:hang], text[hang:]
    pieces = textwrap.wrap(rest, width - hang, break_long_words=False, break_on_hyphens=False) or [""]
    return [head + pieces[0], *(" " * hang + piece for piece in pieces[1:])]


def prose(*parts: Part) -> list[tuple[Part, ...]]:
    """Fold a line of parts at `line_width`, with a hanging indent; the first part keeps its style."""
    texts = [part if isinstance(part, str) else part[0] for part in parts]
    text = "".join(texts)
    first, *rest = folded(text, len(text) - len(text.lstrip(" ")) + 2, line_width())
    if not rest:
        return [parts]
    style = "" if isinstance(parts[0], str) else parts[0][1]
    cut = min(len(texts[0]), len(first))
    return [((first[:cut], style), first[cut:]), *((more if parts[1:] else (more, style),) for more in rest)]


def charset() -> str:
    """Return the character set of stdout: `utf` or `ascii`."""
    return "utf" if (sys.stdout.encoding or "utf-8").lower().startswith("utf") else "ascii"


def print_json(data: Any, *, indent: int | None = 2, hexed: bool = True) -> None:
    """Print data as ASCII JSON. With `hexed`, integers above 2^53 and tokens get a hex string next to them.

    An iterator in the data becomes a list; its items are consumed lazily.
    """
    from ..jsontext import dumps, pieces

    write_json([dumps(data, hexed=hexed)] if indent is None else pieces(data, hexed=hexed), named=hexed)


def write_json(text: Iterable[str], *, named: bool = True) -> None:
    """Print a JSON object from `kho.jsontext`, piece by piece. With `named`, its first member is `schema`."""
    _write(chain(_named(text) if named else text, ["\n"]), sys.stdout)


def _named(text: Iterable[str]) -> Iterator[str]:
    """Add the member `schema`, which names the schema of this command's documents (`kho schema COMMAND`)."""
    from .schemas import named

    pieces = iter(text)
    first = next(pieces)
    rest = first[1:].lstrip()
    space = first[1 : len(first) - len(rest)]
    yield f'{{{space}"schema": "{named(click.get_current_context().command.name or "")}",{space or " "}{rest}'
    yield from pieces


def print_json_rows(head: Mapping[str, Any], name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Print a JSON object: the items of `head`, then a list `name` with one line per row, written lazily."""
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
    """Print the CSV header and return a function that prints one row, with its strings escaped."""
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")

    def row(values: Iterable[Any]) -> None:
        writer.writerow(
            [_encodable(printable(value), sys.stdout) if isinstance(value, str) else value for value in values]
        )

    row(columns)
    return row


def binary(*, force: bool = False) -> BinaryIO:
    """Return stdout as a binary stream. Raises: ParameterError if it is a terminal, unless `force`."""
    if sys.stdout.isatty() and not force:
        raise errors.ParameterError("stdout is a terminal, and the content is binary: redirect stdout, or use --force")
    sys.stdout.flush()
    return cast(BinaryIO, sys.stdout.buffer)


def confirm(*parts: str) -> bool | None:
    """Ask a yes/no question on the terminal; None if stdin is not a terminal."""
    if not sys.stdin.isatty():
        return None
    return click.confirm(_encodable(printable("".join(parts), LINE), sys.stderr), err=True)


@contextmanager
def noting_cuts(opened: Memory | Arena) -> Iterator[None]:
    """Say that a file is cut off before the error of reading the handover in it: that is likely the reason."""
    try:
        yield
    except errors.KhoError as error:
        if isinstance(opened, Memory) and why_absent(error) is None and getattr(error, "kind", None) != CUT_OFF:
            for path in dict.fromkeys(os.fsdecode(path) for path, _, _ in opened.truncated):
                line(f"note: {path}: the file ends before what its headers promise: it is cut off", err=True)
        raise


def note_opened(inc: Incoming, *, absent: bool = True) -> None:
    """Print notes on stderr.

    They tell what the dump does not have, which other root FDTs are in it, and if a raw image is read at an address
    that was not given.
    """
    for text in absence(inc).lines() if absent else ():
        line(f"note: {text}", err=True)
    for text in about_roots(inc):
        line(f"note: {text}", err=True)
    if (at := inc.placement) is not None:
        text = f"{at.named} is read as {at.argument} ({at.certainty}): {at.why}; {at.as_is} reads it as given"
        line(f"note: {text}", err=True)
    elif inc.address == "named" and inc.pages_outside:
        text = "are not in this memory: the memory is incomplete, or its address is wrong"
        line(f"warning: {inc.pages_outside} preserved pages {text}", err=True)


def doubts(unverified: Iterable[str], drafts: Sequence[str] = (), *, err: bool = False) -> None:
    """Print what is read on evidence only, and the formats that no release of Linux has."""
    for doubt in unverified:
        line(("unverified", "bold yellow"), f": {doubt}", err=err)
    if drafts:
        line(("draft", "bold yellow"), f": no release of Linux has {', '.join(drafts)}", err=err)


@contextmanager
def progress(doing: str) -> Iterator[Callable[[int], None] | None]:
    """Show on stderr how many bytes were processed, if it is a terminal and the work takes longer than 0.5 s."""
    with _status(doing) as update:
        yield None if update is None else lambda nbytes: update(f"{doing}: {size(nbytes)}")


@contextmanager
def steps(doing: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show the progress of each step on stderr, under the same conditions as `progress`."""
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
    """Show a progress bar on stderr if it is a terminal; the yielded function takes the number done of `total`."""
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
    """Return a hint on how to resolve an error, or None."""
    match error:
        case errors.NoHandoverError(kind="devicetree" | "left out" | "cut off"):
            return None
        case errors.NoHandoverError():
            return "was the image taken after finalization? A raw image needs its address: FILE@0x40000000"
        case errors.AccessError():
            return "a user with permission is needed; for debugfs and /proc/kcore that is root (sudo)"
        case errors.UnsupportedAbiError():
            return "a newer kho may read it"
        case errors.MissingMemoryError():
            return None
        case errors.OutsideMemoryError():
            return "is the image complete? Give all parts of the memory, each with its address"
        case errors.FdtError():
            return None
        case errors.FormatError():
            return "--page-size, --bitmap-bytes and --fdt-phys override the detected layout"
        case _:
            return None


def fail(error: BaseException) -> NoReturn:
    """Print an error on one line and a hint, if there is one, on the next; exit with code 2."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) and not _own(error) else str(error)
    line(f"kho: {text}", err=True)
    advice = hint(error) if isinstance(error, errors.KhoError) else None
    if advice:
        line(f"hint: {advice}", err=True)
    sys.exit(2)


def usage(error: click.ClickException) -> NoReturn:
    """Print a usage error in click's format; exit with code 2."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        context = error.ctx
        lines(context.get_usage(), err=True)
        names = context.help_option_names
        if names and context.command.get_help_option(context) is not None:
            lines([f"Try '{context.command_path} {names[0]}' for help.", ""], err=True)
    # click prints the choices of an option on several lines, and the argument itself may contain line ends.
    line(f"Error: {' '.join(error.format_message().split())}", err=True)
    if isinstance(error, click.NoSuchOption) and error.option_name.startswith(("-@", "-,")):
        line("hint: a source on stdin with an address goes after --, as in: kho inspect -- -@0x40000000", err=True)
    sys.exit(2)


def _unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Codec error handler: bytes of file names (surrogates) are written as they are, other characters escaped."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    if all("\udc80" <= char <= "\udcff" for char in text):
        return text.encode("utf-8", "surrogateescape"), error.end
    return codecs.backslashreplace_errors(error)


def open_streams() -> None:
    """Replace a closed stdin or stderr (None in Python) by /dev/null; exit with code 2 if stdout is closed.

    Otherwise the next opened file would get their descriptor, and a child of `kho hold` or a write to stderr would use
    it. Also sets the error handler that escapes characters missing from the output's encoding.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    closed = sys.stdout is None
    if closed:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if closed:
        line("kho: stdout is closed; redirect it to /dev/null to discard the output", err=True)
        sys.exit(2)
    codecs.register_error("kho", _unencodable)
    for stream in (sys.stdout, sys.stderr):
        # File names are bytes and may not be valid UTF-8: printing them must not fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="kho")


def end_of_pipe() -> NoReturn:
    """Exit with code 0 and no message: the reader closed the pipe."""
    sys.stderr.close()
    sys.exit(0)


def _own(error: BaseException) -> bool:
    return isinstance(error, errors.KhoError)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=WIDE)


def _color(stream: Any) -> bool:
    """Whether to style text, by the same rules as rich (https://no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _styled(text: str, style: str) -> str:
    """Apply a style, words such as `bold`, `dim` or a color, to text."""
    words = style.split()
    color = next((word for word in words if word not in ("bold", "dim")), None)
    return click.style(text, fg=color, bold="bold" in words or None, dim="dim" in words or None)


def _encodable(text: str, stream: Any) -> str:
    """Escape characters that the stream's encoding lacks."""
    if text.isascii():
        return text
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
