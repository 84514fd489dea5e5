"""Text for output: lists, sizes, and untrusted names with escapes."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from .sizes import format_size as size

__all__ = ["UNFINALIZED", "listed", "printable", "size"]

UNFINALIZED = "nothing was finalized: the next kernel will boot cold"
"""What a map of 0 means in a root FDT of kho-v1."""

MARKS = 2
"""Maximum combining marks per character: more of them would be drawn over adjacent lines."""
INVISIBLE = frozenset(
    map(
        ord,
        "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
        + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)])),
    )
)
"""Invisible letters and marks: printable Default_Ignorable_Code_Points, and the empty Braille cell."""


def printable(text: object, limit: int | None = None) -> str:
    r"""Escape characters that a terminal would interpret, hide or reorder, and cut text after `limit` characters.

    Names from memory and files are untrusted. These characters are escaped, as in Python (`\x1b`, `\u202e`, `\udcff`):
    controls (C0 including newline and tab, C1), bidirectional and zero-width characters, lone surrogates, unassigned
    and private-use characters, invisible letters, and combining marks without a base character or after two others.
    The result is one line; escaping it again does not change it.
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
