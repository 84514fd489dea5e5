"""Structures in kernel memory, read by the names of their members."""

from __future__ import annotations

from collections.abc import Iterator

from ... import errors
from .btf import Btf
from .space import AddressSpace

__all__ = ["Record", "Types", "entries"]

MOST_BYTES = 65536
"""Bytes of the largest structure that is read."""


class Types:
    """The types of a kernel, and its memory."""

    def __init__(self, space: AddressSpace, btf: Btf) -> None:
        self.space = space
        self.btf = btf

    def record(self, name: str, address: int) -> Record:
        """Return the structure with a name at an address. Raises: FormatError if the kernel has none of this name."""
        number = self.btf.struct(name)
        if number is None:
            raise errors.FormatError(f"BTF: no struct {name}")
        return Record(self, number, address, name)


class Record:
    """A structure at an address. It is read once, as a whole."""

    def __init__(self, types: Types, number: int, address: int, name: str) -> None:
        self.types = types
        self.number = number
        self.address = address
        self.name = name
        size = types.btf.size(number)
        if size > MOST_BYTES:
            raise errors.FormatError(f"struct {name}: {size} bytes")
        self._raw = types.space.read(address, size)

    def has(self, path: str) -> bool:
        """Whether there is a member: "file_set.count"."""
        return self.types.btf.field(self.number, path) is not None

    def bytes(self, path: str) -> bytes:
        """Return the bytes of a member. Raises: FormatError if absent."""
        btf = self.types.btf
        field = btf.field(self.number, path)
        if field is None:
            raise errors.FormatError(f"struct {self.name}: no member {path}")
        if field.bits or field.offset % 8:
            raise errors.FormatError(f"struct {self.name}: {path} is a bit field")
        first, size = field.offset // 8, btf.size(field.type)
        if first + size > len(self._raw):
            raise errors.FormatError(f"struct {self.name}: {path} ends after the structure")
        return self._raw[first : first + size]

    def integer(self, path: str) -> int:
        """Return a member that is a number or a pointer."""
        raw = self.bytes(path)
        if len(raw) > 8:
            raise errors.FormatError(f"struct {self.name}: {path} has {len(raw)} bytes")
        field = self.types.btf.field(self.number, path)
        signed = field is not None and self.types.btf.signed(field.type)
        return int.from_bytes(raw, "little", signed=signed)

    def text(self, path: str) -> str:
        """Return a member that is an array of characters, up to its first 0 or its end."""
        return self.bytes(path).split(b"\0")[0].decode("utf-8", "replace")

    def follow(self, path: str) -> Record | None:
        """Return the structure that a pointer leads to; None for a null pointer."""
        address = self.integer(path)
        field = self.types.btf.field(self.number, path)
        if address == 0 or field is None:
            return None
        number = self.types.btf.resolve(self.types.btf.pointed(field.type))
        return Record(self.types, number, address, path)

    def address_of(self, path: str) -> int:
        """Return the address of a member."""
        field = self.types.btf.field(self.number, path)
        if field is None:
            raise errors.FormatError(f"struct {self.name}: no member {path}")
        return self.address + field.offset // 8


def entries(types: Types, head: int, struct: str, member: str, most: int) -> Iterator[Record]:
    """Yield the structures on a list, `list_for_each_entry(head, struct, member)`.

    Raises: FormatError if the list does not come back to its head, or has more than `most` entries; as reading.
    """
    number = types.btf.struct(struct)
    field = None if number is None else types.btf.field(number, member)
    if number is None or field is None:
        raise errors.FormatError(f"BTF: no struct {struct} with a member {member}")
    before, at = head, _word(types, head)
    seen = {head}
    while at != head:
        if at in seen:
            raise errors.FormatError(f"list at {head:#x}: its entry at {at:#x} is on it twice")
        if len(seen) > most:
            raise errors.FormatError(f"list at {head:#x}: more than {most} entries")
        if _word(types, at + 8) != before:
            raise errors.FormatError(f"list at {head:#x}: the entry at {at:#x} does not lead back to {before:#x}")
        seen.add(at)
        yield Record(types, number, at - field.offset // 8, struct)
        before, at = at, _word(types, at)


def _word(types: Types, address: int) -> int:
    return int.from_bytes(types.space.read(address, 8), "little")
