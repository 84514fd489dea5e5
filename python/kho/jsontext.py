"""JSON that every reader reads exactly: strings in ASCII escapes, and numbers beyond 2^53 as hexadecimal strings, too.

jq before 1.7, JavaScript and others read a number as a double, which holds integers up to 2^53 exactly. Tokens are 64
bits, and an image may claim any address.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["dumps", "exact", "pieces"]

MOST = 1 << 53
"""Integers up to this are exact as doubles."""
ALWAYS = frozenset({"token"})
"""Fields that have a string at all times, as any 64 bits may be in them."""
MAPS = frozenset({"reserve_mem", "totals", "folios_by_order"})
"""Fields whose value maps names, which an image may choose, to numbers: their strings are a map next to them."""


def exact(data: Any) -> Any:
    """Give the same data with a string next to what a double cannot hold.

    An integer beyond 2^53, or a list with one, that is the member `NAME` of an object gets a sibling `NAME_hex` of the
    same shape with hexadecimal strings; a `token` always does. Of a map from names to numbers (`reserve_mem`) the whole
    map gets one.
    """
    if isinstance(data, Mapping):
        made: dict[str, Any] = {}
        for name, value in data.items():
            made[name] = exact(value)
            if name in MAPS and isinstance(value, Mapping):
                if any(_beyond(each) for each in value.values()):
                    made[name] = value
                    made[f"{name}_hex"] = {key: _hex(each) for key, each in value.items()}
            elif _beyond(value) or (name in ALWAYS and isinstance(value, int)):
                made[f"{name}_hex"] = _hex(value)
        return made
    if isinstance(data, list | tuple) and any(isinstance(each, Mapping | list | tuple) for each in data):
        return [exact(each) for each in data]
    return data


def dumps(data: Any, *, indent: int | None = None, default: Any = None, hexed: bool = True) -> str:
    """Write data as JSON in printable ASCII: other characters are `\\uXXXX`, also the delete character.

    Args: hexed: with the strings of `exact`, for all but formats whose fields another specification fixes.
    """
    # Outside of strings there is no 0x7f.
    return json.dumps(exact(data) if hexed else data, indent=indent, default=default).replace("\x7f", "\\u007f")


def pieces(data: Any, *, hexed: bool = True) -> Iterator[str]:
    """Write what `dumps(data, indent=2)` writes, piece by piece; an iterator in it is a list, taken as it is written.

    The closing brace of the outermost object is the last piece, with the line end before it.
    """
    yield from _pieces(data, 0, hexed)


def _pieces(it: Any, depth: int, hexed: bool) -> Iterator[str]:
    pad = "\n" + "  " * depth
    inner = pad + "  "
    if isinstance(it, Mapping) and it:
        separator = "{" + inner
        for key, value in it.items():
            # The value of one member alone decides on its sibling, so that what is lazy stays so.
            small = not isinstance(value, Iterator | Mapping) or key in MAPS
            for name, each in exact({key: value}).items() if hexed and small else ((key, value),):
                yield f"{separator}{_key(name)}: "
                # A map from names to numbers has its strings next to it, and none in it.
                strings = hexed and not (key in MAPS and isinstance(value, Mapping))
                yield from _pieces(each, depth + 1, strings)
                separator = "," + inner
        yield pad + "}"
    elif isinstance(it, Iterator):
        separator = "[" + inner
        for item in it:
            yield separator + dumps(item, indent=2, hexed=hexed).replace("\n", inner)
            separator = "," + inner
        yield "[]" if separator.startswith("[") else pad + "]"
    elif isinstance(it, list | tuple) and it:
        separator = "[" + inner
        for item in it:
            yield separator
            yield from _pieces(item, depth + 1, hexed)
            separator = "," + inner
        yield pad + "]"
    else:
        yield dumps(it, hexed=hexed)


def _key(name: Any) -> str:
    """Write the name of a member: a string, whatever it is in Python, as `json` does."""
    return dumps(name if isinstance(name, str) else json.dumps(name))


def _beyond(value: Any) -> bool:
    """Whether a double cannot hold an integer, or one of a list."""
    if isinstance(value, int):
        return not -MOST <= value <= MOST
    return isinstance(value, list | tuple) and any(_beyond(each) for each in value)


def _hex(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return f"{value:#x}"
    return [_hex(each) for each in value] if isinstance(value, list | tuple) else value
