"""BTF, the kernel's description of its types (include/uapi/linux/btf.h, Documentation/bpf/btf.rst).

Types are numbered from 1 in the order of their records. One pass notes where each begins; members are read for the
structures that are asked for: a blob of 6 MB with 150000 types takes about a tenth of a second.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from ... import errors

__all__ = ["Btf", "Field"]

HEADER = struct.Struct("<HBBIIIII")
RECORD = struct.Struct("<III")
MEMBER = struct.Struct("<III")
ARRAY = struct.Struct("<III")
MAGIC = 0xEB9F
INT, PTR, ARRAY_KIND, STRUCT, UNION, ENUM, TYPEDEF, VOLATILE, CONST, RESTRICT = 1, 2, 3, 4, 5, 6, 8, 9, 10, 11
TYPE_TAG, ENUM64 = 18, 19
SIZED = {INT, STRUCT, UNION, ENUM, ENUM64}
QUALIFIERS = {TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG}
LAYOUT = (
    *((0, 0), (4, 0), (0, 0), (12, 0), (0, 12), (0, 12), (0, 8), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)),
    *((0, 8), (4, 0), (0, 12), (0, 0), (4, 0), (0, 0), (0, 12)),
)
"""Bytes after the record of each kind: fixed, and for each of its elements."""
MOST_BYTES = 64 << 20
"""Bytes of the largest blob: a distribution's kernel has 6 MB."""
MOST_TYPES = 1 << 20
DEPTH = 32
"""Qualifiers, and anonymous members, within each other."""
POINTER = 8


class Field(NamedTuple):
    """A member of a structure."""

    offset: int
    """Bits from its start."""
    bits: int
    """Bits of a bit field; 0 for other members."""
    type: int


class Btf:
    """The types of a kernel."""

    def __init__(self, blob: bytes) -> None:
        """Index the types. Raises: FormatError if the blob is malformed or cut off."""
        if len(blob) < HEADER.size:
            raise errors.FormatError(f"BTF: {len(blob)} bytes, a header has {HEADER.size}")
        magic, version, _, header, type_off, type_len, str_off, str_len = HEADER.unpack_from(blob)
        if magic != MAGIC or version != 1 or not HEADER.size <= header <= 4096:
            raise errors.FormatError(f"BTF: magic {magic:#x}, version {version}, header of {header} bytes")
        if len(blob) > MOST_BYTES or header + max(type_off + type_len, str_off + str_len) > len(blob):
            raise errors.FormatError(f"BTF: its sections end after its {len(blob)} bytes")
        self._types = blob[header + type_off : header + type_off + type_len]
        self._strings = blob[header + str_off : header + str_off + str_len]
        if not self._strings.startswith(b"\0") or not self._strings.endswith(b"\0"):
            raise errors.FormatError("BTF: its strings do not begin and end with 0")
        self._starts = array("I", [0])
        self._named = array("I", [0])
        self._fields: dict[tuple[int, str], Field | None] = {}
        self._index(_layout(blob, header))

    def _index(self, layout: tuple[tuple[int, int], ...]) -> None:
        types, at, end = self._types, 0, len(self._types)
        starts, named, unpack = self._starts.append, self._named.append, RECORD.unpack_from
        while at < end:
            if at + 12 > end or len(self._starts) > MOST_TYPES:
                raise errors.FormatError(f"BTF: type {len(self._starts)} is cut off, or one too many")
            name, info, _ = unpack(types, at)
            starts(at)
            named(name)
            kind = info >> 24 & 0x7F
            if not 0 < kind < len(layout):
                raise errors.FormatError(f"BTF: type {len(self._starts) - 1} at {at:#x} is of an unknown kind, {kind}")
            fixed, each = layout[kind]
            at += 12 + fixed + each * (info & 0xFFFFFF)
        if at != end:
            raise errors.FormatError(f"BTF: type {len(self._starts) - 1} ends after its section")

    def __len__(self) -> int:
        """Return the number of types."""
        return len(self._starts) - 1

    def struct(self, name: str) -> int | None:
        """Return the number of the structure with a name; None if absent."""
        wanted = name.encode() + b"\0"
        at = self._strings.find(wanted)
        while at >= 0:
            place = 0
            while True:
                try:
                    place = self._named.index(at, place + 1)
                except ValueError:
                    break
                if self._kind(place) == STRUCT:
                    return place
            at = self._strings.find(wanted, at + 1)
        return None

    def size(self, number: int) -> int:
        """Return the bytes of a type. Raises: FormatError if it has no size."""
        number = self.resolve(number)
        kind = self._kind(number)
        if kind == PTR:
            return POINTER
        if kind == ARRAY_KIND:
            element, _, count = self._array(number)
            return self.size(element) * count if self._kind(self.resolve(element)) != ARRAY_KIND else 0
        if kind not in SIZED:
            raise errors.FormatError(f"BTF: type {number} of kind {kind} has no size")
        return self._record(number)[2]

    def resolve(self, number: int) -> int:
        """Follow typedefs and qualifiers."""
        for _ in range(DEPTH):
            if self._kind(number) not in QUALIFIERS:
                return number
            number = self._record(number)[2]
        raise errors.FormatError(f"BTF: type {number} is a typedef of itself")

    def signed(self, number: int) -> bool:
        """Whether a type is a signed integer."""
        number = self.resolve(number)
        return self._kind(number) == INT and self._types[self._starts[number] + 15] & 1 == 1

    def pointed(self, number: int) -> int:
        """Return the type that a pointer, or an array, leads to. Raises: FormatError for other types."""
        number = self.resolve(number)
        if self._kind(number) == ARRAY_KIND:
            return self._array(number)[0]
        if self._kind(number) != PTR:
            raise errors.FormatError(f"BTF: type {number} is no pointer")
        return self._record(number)[2]

    def field(self, number: int, path: str) -> Field | None:
        """Find a member of a structure, as "file_set.count", also within anonymous members; None if absent."""
        key = number, path
        if key not in self._fields:
            offset, found = 0, Field(0, 0, number)
            for name in path.split("."):
                member = self._member(self.resolve(found.type), name, DEPTH)
                if member is None:
                    self._fields[key] = None
                    return None
                offset += member.offset
                found = Field(offset, member.bits, member.type)
            self._fields[key] = found
        return self._fields[key]

    def _member(self, number: int, name: str, depth: int) -> Field | None:
        anonymous = []
        for member, offset, bits, kind in self._members(number):
            if member == name:
                return Field(offset, bits, kind)
            if not member and not bits:
                anonymous.append((offset, kind))
        for offset, kind in anonymous if depth else ():
            inner = self.resolve(kind)
            if self._kind(inner) in (STRUCT, UNION):
                found = self._member(inner, name, depth - 1)
                if found is not None:
                    return Field(offset + found.offset, found.bits, found.type)
        return None

    def _members(self, number: int) -> Iterator[tuple[str, int, int, int]]:
        """Yield (name, bits from the start, bits of a bit field, type)."""
        _, info, _ = self._record(number)
        if info >> 24 & 0x7F not in (STRUCT, UNION):
            return
        at = self._starts[number] + 12
        for _ in range(info & 0xFFFFFF):
            name, kind, offset = MEMBER.unpack_from(self._types, at)
            bits = 0
            if info >> 31:
                offset, bits = offset & 0xFFFFFF, offset >> 24
            yield self._string(name), offset, bits, kind
            at += 12

    def _record(self, number: int) -> tuple[int, int, int]:
        if not 0 < number < len(self._starts):
            raise errors.FormatError(f"BTF: there is no type {number}")
        name, info, size = RECORD.unpack_from(self._types, self._starts[number])
        return name, info, size

    def _kind(self, number: int) -> int:
        # Type 0 is void.
        return self._record(number)[1] >> 24 & 0x7F if number else 0

    def _array(self, number: int) -> tuple[int, int, int]:
        element, index, count = ARRAY.unpack_from(self._types, self._starts[number] + 12)
        return element, index, count

    def _string(self, offset: int) -> str:
        if offset >= len(self._strings):
            raise errors.FormatError(f"BTF: a name at {offset:#x} of {len(self._strings):#x} bytes of strings")
        return self._strings[offset : self._strings.index(b"\0", offset)].decode("latin-1")


def _layout(blob: bytes, header: int) -> tuple[tuple[int, int], ...]:
    """Return the bytes that follow a record of each kind: with a newer header, its own table has further kinds."""
    found = list(LAYOUT)
    if header >= 32:
        offset, nbytes = struct.unpack_from("<II", blob, 24)
        raw = blob[header + offset : header + offset + min(nbytes, 4 * 128)]
        found += [(raw[at], raw[at + 1]) for at in range(4 * len(LAYOUT), len(raw) - 3, 4)]
    return tuple(found)
