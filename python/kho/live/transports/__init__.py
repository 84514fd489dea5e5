"""How an image comes to a process by its name; `FINDERS` adds transports of your own.

A finder is a function that takes an image's name and returns the descriptor of the image, or None. `kho.live.open`
calls them in order when `backing` names no file. A finder keeps its descriptor: `open` opens the file again, for a lock
of its own.
"""

from __future__ import annotations

from collections.abc import Callable

Finder = Callable[[str], int | None]

FINDERS: list[Finder] = []


def find(name: str) -> int | None:
    """Return the descriptor of the first finder that knows the image; None if none does."""
    for finder in FINDERS:
        if (fd := finder(name)) is not None:
            return fd
    return None
