"""Writes JSON in ASCII, with a hexadecimal string next to each integer above 2^53.

jq before 1.7, JavaScript and others parse numbers as doubles, which are exact only for integers up to 2^53. Tokens have
64 bits, and a malformed image may contain any address.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["dumps", "exact", "pieces"]

MOST = 1 << 53
"""The largest integer up to which all integers are exact as doubles."""
ALWAYS = frozenset({"token"})
"""Fields that always get a hexadecimal string, because they contain arbitrary 64-bit values."""
MAPS = frozenset({"reserve_mem", "totals", "folios_by_order"})
"""Fields that map names chosen by the image to numbers: their hexadecimal strings are in a map next to the field."""


def exact(data: Any) -> Any:
    """Return the data with hexadecimal strings added next to integers that a double cannot hold.

    A member `NAME` of an object that is an integer above 2^53, or a list with one, gets a sibling `NAME_hex` of the
    same shape with hexadecimal strings; a `token` always gets one. A map from names to numbers (`reserve_mem`) gets one
    sibling for the whole map.
    """
    if isinstance(data, Mapping):
        made: dict[str, Any] = {}
        for name, value in data.items():
            made[name] = exact(value)
            if _is_map(name, value):
                if any(_beyond(each) for each in value.values()):
                    made[name] = value
                    made[f"{name}_hex"] = {key: _hex(each) for key, each in value.items()}
            elif _beyond(value) or (name in ALWAYS and type(value) is int):
                made[f"{name}_hex"] = _hex(value)
        return made
    if isinstance(data, list | tuple) and any(isinstance(each, Mapping | list | tuple) for each in data):
        return [exact(each) for each in data]
    return data


def dumps(data: Any, *, indent: int | None = None, default: Any = None, hexed: bool = True) -> str:
    """Return data as JSON in printable ASCII; all other characters, including DEL, become `\\uXXXX`.

    Args: hexed: add the strings of `exact`; False for formats whose fields are specified elsewhere, such as SARIF.
    """
    # DEL (0x7f) occurs only inside strings.
    return json.dumps(exact(data) if hexed else data, indent=indent, default=default).replace("\x7f", "\\u007f")


def pieces(data: Any, *, hexed: bool = True) -> Iterator[str]:
    """Yield the text of `dumps(data, indent=2)` in pieces; an iterator becomes a list and is consumed lazily.

    The last piece is the line end and the closing brace of the outermost object.
    """
    yield from _pieces(data, 0, hexed)


def _pieces(it: Any, depth: int, hexed: bool) -> Iterator[str]:
    pad = "\n" + "  " * depth
    inner = pad + "  "
    if isinstance(it, Mapping) and it:
        separator = "{" + inner
        for key, value in it.items():
            # Whether a member gets a sibling depends on its own value only, so iterators stay lazy.
            small = not isinstance(value, Iterator | Mapping) or _is_map(key, value)
            for name, each in exact({key: value}).items() if hexed and small else ((key, value),):
                yield f"{separator}{_key(name)}: "
                # The strings of a map from names to numbers are next to the map, not inside it.
                strings = hexed and not _is_map(key, value)
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
    """Return the name of a member as a JSON string, converting other types as `json` does."""
    return dumps(name if isinstance(name, str) else json.dumps(name))


def _is_map(name: Any, value: Any) -> bool:
    """Whether a member is one of `MAPS`, with numbers, or lists of them, and no objects."""
    return name in MAPS and isinstance(value, Mapping) and not any(_has_object(each) for each in value.values())


def _has_object(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_object(each) for each in value)
    return isinstance(value, Mapping)


def _beyond(value: Any) -> bool:
    """Whether a value is an integer that a double cannot hold, or a list with one."""
    if isinstance(value, int):
        return not -MOST <= value <= MOST
    return isinstance(value, list | tuple) and any(_beyond(each) for each in value)


def _hex(value: Any) -> Any:
    """Return a value with its integers as strings; null for an object, whose members have strings of their own."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return None
    if isinstance(value, int):
        return f"{value:#x}"
    return [_hex(each) for each in value] if isinstance(value, list | tuple) else value
