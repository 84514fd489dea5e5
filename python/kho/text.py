"""Words for people: sizes, and names that came out of memory."""

from __future__ import annotations

__all__ = ["printable", "size"]


def printable(text: object) -> str:
    """Escape what is not printable, terminal sequences above all: names from memory are not to be trusted."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def size(nbytes: int) -> str:
    """Write a number of bytes in the largest unit that divides it, else with a digit behind the point."""
    for i, unit in reversed(list(enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")))):
        if nbytes >= 1 << 10 * i or i == 0:
            whole = nbytes % (1 << 10 * i) == 0
            return f"{nbytes >> 10 * i} {unit}" if whole else f"{nbytes / (1 << 10 * i):.1f} {unit}"
    return f"{nbytes} B"
