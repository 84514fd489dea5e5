"""Handovers and findings as HTML, for notebooks: what `_repr_html_` of these objects returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Protocol

from .. import errors
from .._kho import Incoming
from ..formats import Luo, MemfdFile, payloads
from ..sizes import format_size
from ..text import printable
from .absence import map_line

__all__ = ["findings", "incoming"]

MOST = 64
"""Maximum number of rows of a table; a last row has the number of the others."""
CELL = 160
"""Maximum characters of a cell."""


class Found(Protocol):
    """A finding."""

    @property
    def id(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def value(self) -> str: ...


def text(value: object) -> str:
    """Return a value as the text of an element: names of images are untrusted."""
    return escape(printable(value, CELL))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], count: int) -> str:
    """Return a table of at most `MOST` of `count` rows; they are consumed lazily."""
    head = "".join(f"<th>{text(name)}</th>" for name in heads)
    body = []
    for _, row in zip(range(MOST), rows, strict=False):
        body.append("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>")
    if count > MOST:
        body.append(f'<tr><td colspan="{len(heads)}">{count - MOST} more</td></tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def incoming(inc: Incoming) -> str:
    """Return a handover as HTML: its format, its folios by order, its subtrees, and the files of LUO.

    A payload that cannot be decoded is a row with the reason.
    """
    total = f"{inc.nr_folios} folios, {format_size(inc.preserved_bytes)}"
    if inc.map_lost is not None:
        total = f"folios not known, as {map_line(*inc.map_lost)}"
    head = f"<b>{text(inc.compatible)}</b> handover ({text(inc.kernels)}) at {inc.fdt_phys:#x}: {total}"
    orders = inc.folios_by_order
    parts = [f"<div>{head}</div>"]
    if orders:
        sizes = ((order, count, format_size(count * inc.page_size << order)) for order, count in orders.items())
        parts.append(table(("order", "folios", "size"), sizes, len(orders)))
    decoded = payloads(inc)
    subtrees = inc.subtrees
    if subtrees:
        rows = ((name, f"{subtrees[name].phys:#x}", type(decoded[name]).__name__) for name in subtrees)
        parts.append(table(("subtree", "address", "read as"), rows, len(subtrees)))
    for payload in decoded.values():
        if isinstance(payload, Luo):
            parts.append(_files(payload))
    return "".join(parts)


def _files(luo: Luo) -> str:
    """Return the files of LUO's sessions as a table."""

    def rows() -> Iterable[tuple[object, ...]]:
        for session in luo.all_sessions:
            for entry in session.entries:
                try:
                    file = session.files.decode(entry)
                    size = format_size(file.size) if isinstance(file, MemfdFile) else ""
                except errors.KhoError as error:
                    size = str(error)
                yield session.name, f"{entry.token:#x}", entry.compatible, size

    count = sum(len(session.entries) for session in luo.all_sessions)
    return table(("session", "token", "kind", "size"), rows(), count)


def findings(found: Sequence[Found]) -> str:
    """Return findings as a table."""
    if not found:
        return "<div>no findings</div>"
    rows = ((f.severity, f.id, f.title, f.place, f.value) for f in found)
    return table(("severity", "id", "title", "place", "value"), rows, len(found))
