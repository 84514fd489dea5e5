"""Flattened devicetrees (FDT), as a handover's root and many subtrees are: read, write, print.

The reader is safe on arbitrary bytes; the writer's output is identical to that of libfdt's sequential writer. KHO
stores values in native byte order; the format's own words, and the values of all other devicetrees, are big-endian.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from kho._kho import Fdt, abis
from kho._kho import FdtNode as Node
from kho._kho import FdtPlaceholder as Placeholder
from kho._kho import FdtWriter as Writer

from .errors import FdtError, ParameterError, SourceError
from .formats.registry import MOST_FDT
from .jsontext import exact

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Fdt",
    "Node",
    "Placeholder",
    "Writer",
    "likely_names",
    "load",
    "numbers_of",
    "parse",
    "to_dts",
    "to_json",
    "value_of",
]

MAGIC = b"\xd0\x0d\xfe\xed"


def parse(blob: Buffer) -> Fdt:
    """Parse a blob strictly, as `Fdt(blob)`; `Fdt.partial` reads a truncated one.

    Raises: FdtError with the offset of the first error.
    """
    return Fdt(blob)


ROWS = abis().values()
SIZES = [abi.size_property for abi in ROWS if abi.size_property is not None]

NOTES = {
    **dict.fromkeys(SIZES, "bytes"),
    **dict.fromkeys((abi.subtree_property for abi in ROWS), "physical address of the producer's blob"),
    **dict.fromkeys((abi.map_property for abi in ROWS), "physical address of the map's first node"),
    "csum": "csum_partial of the folios",
    "fdt": "physical address of the producer's FDT",
    "folios_info": "struct kho_vmalloc",
    "liveupdate-number": "live updates so far",
    "luo-file-header": "physical address",
    "luo-session-header": "physical address",
    "magic": "",
    "nr_folios": "",
    "size": "bytes",
    "start": "physical address",
}
"""Meaning of the properties in KHO's own trees; they are numbers even if the bytes look like text."""

ROOT_NAMES = list(
    dict.fromkeys(["compatible", *(abi.map_property for abi in ROWS), *(abi.subtree_property for abi in ROWS), *SIZES])
)
"""Properties of a root FDT (abi.md section 2)."""

Numbers = Literal["native", "cells"]
"""Format of values: `native`, KHO's numbers in native byte order; `cells`, big-endian 32-bit cells as in dtc."""

KHO_TREE = re.compile(rb"(?:kho|kho-test|luo|memblock|reserve-mem)-v[0-9]")
"""Prefixes of the root compatible in KHO's own trees; other trees have `vendor,model` there."""

CHOSEN = "linux,kho-"
"""Prefix of the properties of /chosen that pass a handover to an arm64 kernel: `<address size>` in cells
(drivers/of/kexec.c), in any tree."""

DTS_HEAD = {
    "native": "Numbers are in native byte order, as KHO stores them; dtc prints them byte-swapped.",
    "cells": "Not one of KHO's own trees: numbers are big-endian cells, as dtc prints them.",
}
ESCAPES = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 0x22: '\\"', 0x5C: "\\\\"}
MOST_TEXT = 64 << 10
"""Maximum bytes of a property that is shown as text; longer ones are shown as bytes."""
_VMALLOC = struct.Struct("<QIHH")

Prop = tuple[str | None, int, bytes]
"""A property: name (None if truncated), offset of the name in the string block, value."""


def load(path: str | os.PathLike[str]) -> tuple[Fdt, FdtError | None] | None:
    """Read a file that is a bare FDT, as `Fdt.partial`; None if the file is not an FDT.

    Raises: FdtError for an invalid header; SourceError.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(4) != MAGIC:
                return None
            size = int.from_bytes(file.read(4), "big")
            file.seek(0)
            raw = file.read(min(size, MOST_FDT + 1))
            if len(raw) > MOST_FDT:
                raise FdtError(
                    f"{os.fspath(path)}: a devicetree of {size} bytes exceeds {MOST_FDT}, the most a kernel accepts"
                )
            return Fdt.partial(raw)
    except OSError as error:
        raise SourceError(f"{os.fspath(path)}: {error.strerror or error}") from error


def numbers_of(fdt: Fdt) -> Numbers:
    """Detect the format of a tree's values: `native` if its root has a compatible of KHO, else `cells`.

    If the property names are truncated, as in `out/fdt` of Linux 6.19 and later, the compatible is recognized by its
    value.
    """
    texts = (raw for name, _, raw in _properties(fdt.root) if name in ("compatible", None))
    return "native" if any(KHO_TREE.match(raw) and raw.endswith(b"\0") for raw in texts) else "cells"


def value_of(name: str | None, raw: bytes, numbers: Numbers = "native", *, node: str = "/") -> dict[str, Any]:
    """Interpret a property's value: `type`, `value`, and a `note` if its meaning is known.

    The types are empty, u32, u64, cells, strings and bytes.
    Native numbers are little-endian, as on every machine that has KHO. A value that could be text is text, unless the
    property is one of KHO's numbers. As cells a value is what dtc takes it for: text, cells, or else bytes.

    Args: node: path of the property's node; `linux,kho-*` in /chosen are cells in any tree.
    """
    found: dict[str, Any]
    chosen = node == "/chosen" and (name or "").startswith(CHOSEN)
    if chosen or numbers == "cells":
        found = _cells(raw)
        if chosen and found["type"] == "cells" and len(raw) in (8, 16):
            half = len(raw) // 2
            start, size = (int.from_bytes(part, "big") for part in (raw[:half], raw[half:]))
            found["note"] = f"physical address {start:#x}, {size} bytes"
        return found
    note = NOTES.get(name or "")
    if not raw:
        found = {"type": "empty", "value": None}
    elif note is None and (strings := _strings(raw)) is not None:
        found = {"type": "strings", "value": strings}
    elif len(raw) in (4, 8):
        found = {"type": f"u{8 * len(raw)}", "value": int.from_bytes(raw, "little")}
    else:
        found = {"type": "bytes", "value": raw.hex()}
    if name == "folios_info" and len(raw) == _VMALLOC.size:
        first, pages, flags, order = _VMALLOC.unpack(raw)
        note = f"struct kho_vmalloc: first {first:#x}, {pages} pages, flags {flags:#x}, order {order}"
    return found | ({"note": note} if note else {})


def _cells(raw: bytes) -> dict[str, Any]:
    """Decode a value as dtc does (guess_value_type in dtc's treesource.c)."""
    nuls = raw.count(0)
    if not raw:
        return {"type": "empty", "value": None}
    text = raw.endswith(b"\0") and nuls <= len(raw) - nuls and len(raw) <= MOST_TEXT
    if text and all(0x20 <= c < 0x7F or 7 <= c <= 13 or not c for c in raw):
        return {"type": "strings", "value": [part.decode("ascii") for part in raw[:-1].split(b"\0")]}
    if len(raw) % 4:
        return {"type": "bytes", "value": raw.hex()}
    return {"type": "cells", "value": [cell for (cell,) in struct.iter_unpack(">I", raw)]}


def likely_names(fdt: Fdt) -> dict[int, str]:
    """Guess truncated property names from their lengths, which follow from the offsets of adjacent names.

    In debugfs of Linux 6.19 and later the string block of `out/fdt` is missing; the names of KHO's properties differ in
    length.
    Returns: offset in the string block -> name, only for properties of a root FDT.
    """
    raw = bytes(fdt)
    (end,) = struct.unpack_from(">I", raw, 32)  # size_dt_strings
    offsets = {offset for node in fdt.walk() for name, offset, _ in _properties(node) if name is None}
    lengths = {len(name) + 1: name for name in ROOT_NAMES}
    gaps = pairwise([*sorted(offsets), end])
    return {at: lengths[following - at] for at, following in gaps if following - at in lengths}


def _properties(node: Node) -> Iterator[Prop]:
    """Yield a node's properties, read in small batches."""
    first = 0
    while some := node.some_properties(first, 512):
        yield from some
        first += len(some)


def _strings(raw: bytes) -> list[str] | None:
    """Decode non-empty, printable, NUL-terminated strings; None if the bytes are not such strings."""
    if not raw.endswith(b"\0") or len(raw) > MOST_TEXT:
        return None
    parts = raw[:-1].split(b"\0")
    if not all(part and all(0x20 <= byte < 0x7F for byte in part) for part in parts):
        return None
    return [part.decode("ascii") for part in parts]


def to_json(fdt: Fdt, *, numbers: Numbers | None = None) -> dict[str, Any]:
    """Return a tree as a dict for JSON.

    Properties are a list, in order: name (None if truncated, then with a likely_name, see `likely_names`), type, value
    and note as in `value_of`, and raw in hex.

    Args: numbers: format of values, also in `numbers` of the result; default: `numbers_of`.
    """

    def node(it: Node, path: str) -> dict[str, Any]:
        properties = [_as_dict(prop, likely, stored, path) for prop in _properties(it)]
        children = [node(child, _below(path, child)) for child in it.children]
        return {"name": it.name, "properties": properties, "children": children}

    likely = likely_names(fdt)
    stored = numbers_of(fdt) if numbers is None else _known(numbers)
    return {**_head(fdt, stored), "root": node(fdt.root, "/")}


def _head(fdt: Fdt, stored: Numbers) -> dict[str, Any]:
    return {
        "totalsize": fdt.totalsize,
        "version": fdt.version,
        "boot_cpuid": fdt.boot_cpuid,
        "numbers": stored,
        "reservations": [list(entry) for entry in fdt.reservations],
    }


def _below(path: str, child: Node) -> str:
    return f"{path.rstrip('/')}/{child.name}"


def _as_dict(prop: Prop, likely: dict[int, str], numbers: Numbers, path: str) -> dict[str, Any]:
    name, offset, raw = prop
    guess = {} if name is not None else {"likely_name": likely.get(offset)}
    return {"name": name, **guess, **value_of(name or likely.get(offset), raw, numbers, node=path), "raw": raw.hex()}


def json_text(
    fdt: Fdt, more: dict[str, Any] | None = None, *, depth: int = 0, numbers: Numbers | None = None
) -> Iterator[str]:
    """Yield the result of `to_json` as JSON text in pieces, as a tree may be large; strings as in `kho.jsontext`.

    Args: more: further members after the tree. depth: nesting level of the text. numbers: as in `to_json`.
    """
    likely = likely_names(fdt)
    stored = numbers_of(fdt) if numbers is None else _known(numbers)

    def pad(n: int) -> str:
        return "\n" + "  " * (depth + n)

    def text(it: str) -> str:
        return encode_basestring_ascii(it).replace("\x7f", "\\u007f")

    def value(it: Any, n: int) -> str:
        if isinstance(it, str):
            return text(it)
        if isinstance(it, int):
            return str(it)
        if isinstance(it, list) and it and isinstance(it[0], str):
            inner = pad(n + 1)
            return f"[{inner}{f',{inner}'.join(map(text, it))}{pad(n)}]"
        return json.dumps(it, indent=2).replace("\n", pad(n))

    def opened(it: Node, path: str, n: int) -> Iterator[str]:
        yield "{" + pad(n + 1) + f'"name": {text(it.name)},' + pad(n + 1) + '"properties": ['
        separator = pad(n + 2)
        for prop in _properties(it):
            inner = pad(n + 3)
            items = exact(_as_dict(prop, likely, stored, path)).items()
            body = ("," + inner).join(f'"{key}": {value(found, n + 3)}' for key, found in items)
            yield f"{separator}{{{inner}{body}{pad(n + 2)}}}"
            separator = "," + pad(n + 2)
        yield ("]" if separator == pad(n + 2) else pad(n + 1) + "]") + "," + pad(n + 1) + '"children": ['

    yield "{"
    for key, found in exact(_head(fdt, stored)).items():
        yield pad(1) + f'"{key}": {value(found, 1)},'
    yield pad(1) + '"root": '
    yield from opened(fdt.root, "/", 1)
    # For each open node: its remaining children, its path, and whether a child was written.
    stack: list[tuple[Iterator[Node], str, bool]] = [(iter(fdt.root.children), "/", False)]
    while stack:
        children, path, any_yet = stack.pop()
        level = 1 + 2 * len(stack)
        child = next(children, None)
        if child is None:
            yield (pad(level + 1) if any_yet else "") + "]" + pad(level) + "}"
            continue
        stack.append((children, path, True))
        yield ("," if any_yet else "") + pad(level + 2)
        yield from opened(child, _below(path, child), level + 2)
        stack.append((iter(child.children), _below(path, child), False))
    for key, found in (more or {}).items():
        yield "," + pad(1) + f'"{key}": {value(found, 1)}'
    yield pad(0) + "}"


def to_dts(fdt: Fdt, *, comment: str | None = None, numbers: Numbers | None = None) -> str:
    """Return a tree as devicetree source, with numbers in their actual value.

    In KHO's own trees, whose numbers are native, 8 bytes are printed as `/bits/ 64 <...>`, 4 bytes as `<...>`, text as
    text, and other values as hex bytes. dtc compiles the result, but stores numbers big-endian, so they are
    byte-swapped then. For other trees the values are those that dtc prints, and dtc compiles them to the same tree.

    Args:
        comment: a line for the top.
        numbers: format of values; default: `numbers_of`.

    Raises: NotFoundError if a partial read did not reach the root.

    """
    return "\n".join(dts_lines(fdt, comment=comment, numbers=numbers)) + "\n"


def dts_lines(fdt: Fdt, *, comment: str | None = None, numbers: Numbers | None = None) -> Iterator[str]:
    """Yield the lines of `to_dts`, as a tree may be large. Raises: as `to_dts`."""
    stored = numbers_of(fdt) if numbers is None else _known(numbers)
    yield "/dts-v1/;"
    yield f"// {DTS_HEAD[stored]}"
    if comment:
        yield f"// {_one_line(comment)}"
    for address, size in fdt.reservations:
        yield f"/memreserve/ {address:#018x} {size:#018x};"
    yield ""
    likely = likely_names(fdt)
    yield from _opened(fdt.root, "/", 0, likely, stored)
    stack = [(iter(fdt.root.children), "/")]
    while stack:
        children, path = stack[-1]
        child = next(children, None)
        if child is None:
            stack.pop()
            yield "\t" * len(stack) + "};"
            continue
        yield ""
        yield from _opened(child, _below(path, child), len(stack), likely, stored)
        stack.append((iter(child.children), _below(path, child)))


def _known(numbers: Numbers) -> Numbers:
    """Check the format of values and return it. Raises: ParameterError."""
    if numbers not in get_args(Numbers):
        raise ParameterError(f"numbers: {numbers!r} is not native or cells")
    return numbers


def _opened(node: Node, path: str, depth: int, likely: dict[int, str], numbers: Numbers) -> Iterator[str]:
    """Yield the opening line of a node and its properties."""
    indent = "\t" * depth
    yield f"{indent}{_name(node.name) if depth else '/'} {{{_was(node.name)}"
    for name, offset, raw in _properties(node):
        found = value_of(name or likely.get(offset), raw, numbers, node=path)
        yield f"{indent}\t{_property(name, likely.get(offset), offset, raw, found)}"


def _property(name: str | None, likely: str | None, offset: int, raw: bytes, found: dict[str, Any]) -> str:
    shown = (likely or f"name-at-{offset:#x}") if name is None else _name(name)
    match found["type"]:
        case "empty":
            text = f"{shown};"
        case "strings":
            escaped = (string.translate(ESCAPES) for string in found["value"])
            text = f"{shown} = " + ", ".join(f'"{string}"' for string in escaped) + ";"
        case "u64":
            text = f"{shown} = /bits/ 64 <{found['value']:#018x}>;"
        case "u32":
            text = f"{shown} = <{found['value']:#010x}>;"
        case "cells":
            text = f"{shown} = <{' '.join(f'{cell:#04x}' for cell in found['value'])}>;"
        case _:
            text = f"{shown} = [{raw.hex(' ')}];"
    note = found.get("note") or ""
    if name is None:
        note = "name truncated" + (", this one fits" if likely else "") + (f"; {note}" if note else "")
    return f"{text}{_was(name or '')}" + (f"  // {note}" if note else "")


def _name(name: str) -> str:
    """Convert a name to one that is valid in devicetree source."""
    return re.sub(r"[^A-Za-z0-9,._+*#?@-]", "?", name) or "?"


def _was(name: str) -> str:
    """Return a comment with the original name if `_name` changed it."""
    return f"  /* {_one_line(ascii(name))} */" if name and _name(name) != name else ""


def _one_line(text: str) -> str:
    """Escape text so that it cannot end a comment."""
    return "".join(char if char.isprintable() else "?" for char in text).replace("*/", "*?")
