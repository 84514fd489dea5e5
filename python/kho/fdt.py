"""Flattened devicetrees: what a handover's root, and many a subtree, is stored in.

The reader takes any bytes without harm; the writer's bytes equal those of libfdt's sequential writer. KHO writes values
in native byte order, while the format's own words are big-endian, as are the values of every other devicetree.
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
    """Read a blob strictly: `Fdt(blob)`. See `Fdt.partial` for one that is cut short.

    Raises: FdtError with the offset of the first thing that is wrong.
    """
    return Fdt(blob)


ROWS = abis().values()
SIZES = [abi.size_property for abi in ROWS if abi.size_property is not None]

NOTES = {
    **dict.fromkeys(SIZES, "bytes"),
    **dict.fromkeys((abi.subtree_property for abi in ROWS), "physical address of the producer's blob"),
    **dict.fromkeys((abi.map_property for abi in ROWS), "physical address of the map's first node"),
    "csum": "csum_partial over the folios",
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
"""What the properties of KHO's own trees are; they are numbers even where they look like text."""

ROOT_NAMES = list(
    dict.fromkeys(["compatible", *(abi.map_property for abi in ROWS), *(abi.subtree_property for abi in ROWS), *SIZES])
)
"""The properties a root FDT has (ABI section 2)."""

Numbers = Literal["native", "cells"]
"""How values are read: KHO's numbers in native byte order, or cells of 32 bits, big-endian, as dtc reads them."""

KHO_TREE = re.compile(rb"(?:kho|kho-test|luo|memblock|reserve-mem)-v[0-9]")
"""How the compatible at the root of KHO's own trees begins; other trees have a vendor, a comma and a model there."""

CHOSEN = "linux,kho-"
"""How the properties of /chosen begin that tell an arm64 kernel of a handover: <address size> in cells
(drivers/of/kexec.c), whatever tree they are in."""

DTS_HEAD = {
    "native": "Numbers are in native byte order, as KHO stores them; dtc shows them byte-swapped.",
    "cells": "Not one of KHO's own trees: numbers are big-endian cells, as dtc shows them.",
}
ESCAPES = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 0x22: '\\"', 0x5C: "\\\\"}
MOST_TEXT = 64 << 10
"""Bytes of a property that is shown as text; longer ones are bytes."""
_VMALLOC = struct.Struct("<QIHH")

Prop = tuple[str | None, int, bytes]
"""A property: name, None if it is cut off; its offset in the strings; value."""


def load(path: str | os.PathLike[str]) -> tuple[Fdt, FdtError | None] | None:
    """Read a file that is a bare FDT: as `Fdt.partial`; None for a file that is something else.

    Raises: FdtError for a header that cannot be used; SourceError.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(4) != MAGIC:
                return None
            size = int.from_bytes(file.read(4), "big")
            file.seek(0)
            raw = file.read(min(size, MOST_FDT + 1))
            if len(raw) > MOST_FDT:
                raise FdtError(f"{os.fspath(path)}: a devicetree of {size} bytes: no kernel takes more than {MOST_FDT}")
            return Fdt.partial(raw)
    except OSError as error:
        raise SourceError(f"{os.fspath(path)}: {error.strerror or error}") from error


def numbers_of(fdt: Fdt) -> Numbers:
    """Tell how a tree's values are stored: `native` if its root has a KHO compatible, else `cells`.

    The compatible is known by its value where the names are cut off, as Linux 7.x shows its `out/fdt`.
    """
    texts = (raw for name, _, raw in _properties(fdt.root) if name in ("compatible", None))
    return "native" if any(KHO_TREE.match(raw) and raw.endswith(b"\0") for raw in texts) else "cells"


def value_of(name: str | None, raw: bytes, numbers: Numbers = "native", *, node: str = "/") -> dict[str, Any]:
    """Say what a property's value is: `type` (empty, u32, u64, cells, strings, bytes), `value`, and a `note` if known.

    Native numbers are little-endian, as on every machine that has KHO. A value that could be text is text, unless the
    property is one of KHO's numbers. As cells a value is what dtc takes it for: text, cells, or else bytes.

    Args: node: the path of the property's node; `linux,kho-*` of /chosen are cells in any tree.
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
    """Take a value for what dtc does (dtc's treesource.c, guess_value_type)."""
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
    """Tell names that are cut off by their lengths, which the offsets of their neighbours give.

    Linux 7.x shows its `out/fdt` in debugfs without the strings; KHO's names differ in length.
    Returns: offset in the strings to name, for names of the root's format alone.
    """
    raw = bytes(fdt)
    (end,) = struct.unpack_from(">I", raw, 32)  # size_dt_strings
    offsets = {offset for node in fdt.walk() for name, offset, _ in _properties(node) if name is None}
    lengths = {len(name) + 1: name for name in ROOT_NAMES}
    gaps = pairwise([*sorted(offsets), end])
    return {at: lengths[following - at] for at, following in gaps if following - at in lengths}


def _properties(node: Node) -> Iterator[Prop]:
    """Iterate over a node's properties, a few at a time."""
    first = 0
    while some := node.some_properties(first, 512):
        yield from some
        first += len(some)


def _strings(raw: bytes) -> list[str] | None:
    """Read NUL-terminated printable strings, none of them empty; None if it is something else."""
    if not raw.endswith(b"\0") or len(raw) > MOST_TEXT:
        return None
    parts = raw[:-1].split(b"\0")
    if not all(part and all(0x20 <= byte < 0x7F for byte in part) for part in parts):
        return None
    return [part.decode("ascii") for part in parts]


def to_json(fdt: Fdt, *, numbers: Numbers | None = None) -> dict[str, Any]:
    """Give a tree as data.

    Properties are a list, in order: name (None if it is cut off, with a likely_name, see `likely_names`), type, value
    and note as `value_of`, raw in hex.

    Args: numbers: how values are stored, in `numbers` of the result, too; `numbers_of` tells if not given.
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
    """Write what `to_json` gives as JSON with `kho.jsontext`'s strings, piece by piece: a tree may be large.

    Args: more: what follows the tree. depth: how deep the text is nested in other text. numbers: as of `to_json`.
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
    # The children that are still to be written of each open node, its path, and whether one was.
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
    """Write a tree as devicetree source, numbers shown as what they are.

    Of KHO's own trees, whose numbers are native, 8 bytes are `/bits/ 64 <...>`, 4 bytes `<...>`, text is text, the rest
    bytes in hex; dtc takes the result and stores numbers big-endian, so that they come out byte-swapped. Of others the
    values are those that dtc shows, and dtc makes the same tree of the result again.

    Args:
        comment: a line to stand at the top.
        numbers: how values are stored; `numbers_of` tells if not given.

    Raises: NotFoundError if a partial read did not come as far as the root.

    """
    return "\n".join(dts_lines(fdt, comment=comment, numbers=numbers)) + "\n"


def dts_lines(fdt: Fdt, *, comment: str | None = None, numbers: Numbers | None = None) -> Iterator[str]:
    """Write what `to_dts` gives, line by line: a tree may be large. Raises: as `to_dts`."""
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
    """Refuse another word. Raises: ParameterError."""
    if numbers not in get_args(Numbers):
        raise ParameterError(f"numbers: {numbers!r} is neither native nor cells")
    return numbers


def _opened(node: Node, path: str, depth: int, likely: dict[int, str], numbers: Numbers) -> Iterator[str]:
    """Write the head of a node and its properties."""
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
        note = "its name is cut off" + (", this one fits" if likely else "") + (f"; {note}" if note else "")
    return f"{text}{_was(name or '')}" + (f"  // {note}" if note else "")


def _name(name: str) -> str:
    """Make a name one that devicetree source can have."""
    return re.sub(r"[^A-Za-z0-9,._+*#?@-]", "?", name) or "?"


def _was(name: str) -> str:
    """Say what a name was before `_name`."""
    return f"  /* {_one_line(ascii(name))} */" if name and _name(name) != name else ""


def _one_line(text: str) -> str:
    """Keep text within a comment."""
    return "".join(char if char.isprintable() else "?" for char in text).replace("*/", "*?")
