"""Words for people: sizes, lists, and names that came out of memory."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

__all__ = ["listed", "printable", "size"]

MARKS = 2
"""Combining marks a character may carry: more of them draw over the lines next to it."""
INVISIBLE = frozenset(
    map(
        ord,
        "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
        + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)])),
    )
)
"""Letters and marks that show nothing: Default_Ignorable_Code_Point that is printable, and the empty Braille cell."""


def printable(text: object, limit: int | None = None) -> str:
    r"""Escape what a terminal would act on, hide or reorder, and cut what is longer than `limit` characters.

    Names from memory and files are not to be trusted. Escaped, as Python writes them (`\x1b`, `\u202e`, `\udcff`):
    controls (C0 with newline and tab, C1), bidirectional and zero-width characters, lone surrogates, unassigned and
    private characters, invisible letters, and combining marks without a character, or more than two on one. The result
    is one line, and stays the same if it is escaped again.
    """
    shown = str(text)
    left = 0 if limit is None else len(shown) - limit
    if left > 0:
        shown = shown[:limit]
    if not (shown.isascii() and shown.isprintable()):
        shown = "".join(_escaped(shown))
    return f"{shown}... ({left} more characters)" if left > 0 else shown


def _escaped(text: str) -> list[str]:
    parts = []
    marks = MARKS
    for char in text:
        plain = char.isprintable() and ord(char) not in INVISIBLE
        if plain and not char.isascii() and unicodedata.category(char) in ("Mn", "Me"):
            marks += 1
            plain = marks <= MARKS
        elif plain:
            marks = 0
        else:
            marks = MARKS
        parts.append(char if plain else char.encode("unicode_escape").decode())
    return parts


def listed(words: Iterable[str], last: str = "and") -> str:
    """Join words as a sentence does: `a`, `a and b`, `a, b and c`."""
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def size(nbytes: int) -> str:
    """Write a number of bytes in the largest unit that divides it, else with a digit behind the point."""
    for i, unit in reversed(list(enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")))):
        if nbytes >= 1 << 10 * i or i == 0:
            whole = nbytes % (1 << 10 * i) == 0
            return f"{nbytes >> 10 * i} {unit}" if whole else f"{nbytes / (1 << 10 * i):.1f} {unit}"
    return f"{nbytes} B"
