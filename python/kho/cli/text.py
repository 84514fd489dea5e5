"""Names from memory are not to be trusted on a terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    """Escape what is not printable, terminal sequences above all."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))
