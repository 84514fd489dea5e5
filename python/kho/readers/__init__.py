"""Memory that other tools have open, as sources: drgn, volatility3 and libkdumpfile, each over `Memory.from_reader`.

`kho.open` takes their objects. A module per tool makes a `Memory` of one; none of them is imported before it is needed,
and the tools are no dependencies of kho.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from .._kho import Memory

__all__ = ["memory_of"]

TOOLS = {
    "_drgn": "drgn",
    "drgn": "drgn",
    "volatility3": "volatility",
    "_kdumpfile": "kdumpfile",
    "kdumpfile": "kdumpfile",
}
"""Package that defines a class -> module here."""


def memory_of(source: object) -> Memory | None:
    """Return the memory of an object of another tool; None for all other objects.

    Args: source: a drgn `Program`, a volatility3 layer, or a libkdumpfile context.

    Raises: ParameterError for an object of these tools that is no memory, or whose ranges are not known.
    """
    for base in type(source).__mro__:
        name = TOOLS.get(base.__module__.partition(".")[0])
        if name is not None:
            return cast(Memory, import_module(f".{name}", __name__).memory(source))
    return None
