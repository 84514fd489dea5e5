"""How a process comes by an image: a path, a descriptor, or whatever else finds one by name.

A transport is a function that is given an image's name and gives the descriptor of an image somebody left for this
process, or None. `open` asks them in order when the backing is no file. A transport keeps its descriptor: `open` opens
the file once more, for a lock of its own.
"""

from __future__ import annotations

from collections.abc import Callable

Finder = Callable[[str], int | None]

FINDERS: list[Finder] = []


def find(name: str) -> int | None:
    """Ask every transport for an image."""
    for finder in FINDERS:
        if (fd := finder(name)) is not None:
            return fd
    return None
