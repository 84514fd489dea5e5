"""Members of a declared structure: integers, bit fields, text and bytes."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar, cast, overload

from .. import errors
from .._kho import FdtNode, FdtWriter, Vmalloc
from .registry import Blob, Owned

__all__ = [
    "Field",
    "Int",
    "Member",
    "NodesField",
    "Place",
    "Room",
    "TailField",
    "raw",
    "s32",
    "s64",
    "text",
    "u8",
    "u16",
    "u32",
    "u64",
]

T = TypeVar("T")
Member = int | bytes
"""What `struct` makes of a member: an integer, or the bytes of anything else."""


class Room(Protocol):
    """What a writer puts pages into: `kho.formats.kernel_write.Holding`, which preserves them."""

    @property
    def page_size(self) -> int:
        """Bytes of a page."""

    def put(self, data: bytes) -> int:
        """Copy bytes into a new preserved folio and return its physical address."""

    def area(self, data: bytes) -> bytes:
        """Copy bytes into a new preserved vmalloc area and return its `struct kho_vmalloc`."""


@dataclass(frozen=True)
class Place:
    """Where a structure is read: the payload it belongs to, and its address."""

    blob: Blob
    phys: int

    def malformed(self, why: str) -> errors.FormatError:
        """Return the error for a malformed structure, with its owner and address."""
        return errors.FormatError(f"{self.blob.owner} at {self.phys:#x}: {why}")


class Values:
    """An object with the values of fields."""

    _values: dict[str, Any]


class Field(ABC, Generic[T]):
    """A member of a structure. The functions of this module, `u64(...)` and so on, make one."""

    code: str
    """Its code in the module `struct`, little-endian."""
    align = 1
    """Its alignment as C lays it out."""
    bits: int | None = None
    """Bits of a bit field; None for a whole member."""
    count: int | str | None = None
    """Of a list: its length, or the name of the field that contains it."""
    late = False
    """Whether other fields must be read before it."""
    equals: Any = None
    """The only value that is accepted; None for any."""

    def __init__(self, *, key: str | None = None) -> None:
        self.name = ""
        self._key = key

    def __set_name__(self, owner: type, name: str) -> None:
        """Take the name of the attribute."""
        self.name = name

    @overload
    def __get__(self, record: None, owner: type) -> Self: ...
    @overload
    def __get__(self, record: Values, owner: type) -> T: ...
    def __get__(self, record: Values | None, owner: type) -> Self | T:
        """Return the value that was read; on a class, the field itself."""
        return self if record is None else cast("T", record._values[self.name])

    @property
    def plain(self) -> bool:
        """Whether it accepts all bytes, and reads nothing else; not so for lists and trees."""
        return False

    @property
    def key(self) -> str:
        """The property's name in a devicetree."""
        return self._key or self.name

    @property
    def size(self) -> int:
        """Bytes."""
        return struct.calcsize(f"<{self.code}")

    @property
    def shown(self) -> bool:
        """Whether descriptions include it: not if its name begins with an underscore."""
        return not self.name.startswith("_")

    @abstractmethod
    def load(self, data: Member, place: Place, values: dict[str, Any]) -> T:
        """Return the value of `data`. Raises: FormatError."""

    @abstractmethod
    def dump(self, value: Any, room: Room | None) -> Member:
        """Return what stands in the structure for a value. Raises: ParameterError."""

    def cut(self, value: T, values: Mapping[str, Any], place: Place) -> T:
        """Return the value once all fields were read. Raises: FormatError if another one contradicts it."""
        return value

    def counted(self, value: Any) -> dict[str, int]:
        """Return the values of the fields that contain the length of a list."""
        return {}

    def missing(self) -> Any:
        """Return the value that a writer uses if it is given none. Raises: ParameterError."""
        raise errors.ParameterError(f"{self.name}: no value")

    def tell(self, value: T) -> dict[str, Any]:
        """Return what a description has of the value."""
        return {self.name: value}

    def units(self) -> dict[str, str]:
        """Return the units of its numbers."""
        return {}

    def owned(self, value: T, place: Place, values: Mapping[str, Any]) -> Iterator[Owned]:
        """Yield the memory that the value refers to."""
        return iter(())

    def areas(self, value: T) -> Iterator[tuple[str, Vmalloc]]:
        """Yield the vmalloc areas of the value."""
        return iter(())


class TailField(Field[T]):
    """A list that may end the structure."""

    variable: bool
    """Whether it does, with as many records as another field contains."""

    @abstractmethod
    def load_tail(self, place: Place, offset: int, room: int | None, values: dict[str, Any]) -> T:
        """Read the list that ends the structure, `offset` bytes into it. Raises: FormatError."""


class NodesField(Field[T]):
    """The subnodes of a devicetree's node."""

    code = ""

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> T:
        """Refuse: subnodes are no member. Raises: FormatError."""
        raise place.malformed(f"{self.name}: subnodes stand in no structure")

    def dump(self, value: Any, room: Room | None) -> bytes:
        """Return no bytes: `write_nodes` writes them."""
        return b""

    @abstractmethod
    def load_nodes(self, node: FdtNode, place: Place) -> T:
        """Read the subnodes of a node. Raises: FormatError."""

    @abstractmethod
    def write_nodes(self, w: FdtWriter, value: Any, room: Room | None) -> None:
        """Write the subnodes of an open node. Raises: ParameterError; OutOfMemoryError."""


class Int(Field[int]):
    """An integer.

    Args:
        code: its code in the module `struct`: B, H, I, Q, i, q.
        unit: of the number, for output: "bytes", "pages", "pfn", "phys", "mode", "s", ... .
        enum: names of values; a value without a name is shown as a number.
        flags: names of bits by mask; other bits are shown in hex.
        show: makes text of a number, shown next to it.
        equals: the only value that is accepted, as of a version.
        at_most: the largest value that is accepted.
        bits: width of a bit field. Bit fields that follow each other fill one integer, from its lowest bit, as in C.
        owns: the memory there, of unit "pfn" or "phys", belongs to the payload under this name: "data", "folio".
        nbytes: the field with the bytes of that memory, or the number; by default it is the folio that begins there.
        default: what a writer uses if it is given no value.
        key: name of the property in a devicetree, by default that of the attribute.

    """

    def __init__(
        self,
        code: str,
        *,
        unit: str | None = None,
        enum: Mapping[int, str] | None = None,
        flags: Mapping[int, str] | None = None,
        show: Callable[[int], str] | None = None,
        equals: int | None = None,
        at_most: int | None = None,
        bits: int | None = None,
        owns: str | None = None,
        nbytes: str | int | None = None,
        default: int | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(key=key)
        if owns is not None and unit not in ("pfn", "phys"):
            raise TypeError(f"owns={owns!r}: the unit must be pfn or phys, not {unit!r}")
        self.code = code
        self.unit, self.enum, self.flags = unit, enum, flags
        self.show, self.equals, self.at_most = show, equals, at_most
        self.bits, self.owns, self.nbytes, self.default = bits, owns, nbytes, default
        self.align = self.size

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> int:
        """Check the number."""
        assert isinstance(data, int)
        if self.equals is not None and data != self.equals:
            raise place.malformed(f"{self.key} {data:#x} is not {self.equals:#x}")
        if self.at_most is not None and data > self.at_most:
            raise place.malformed(f"{self.key} {data:#x} exceeds {self.at_most:#x}")
        if self.owns is not None and self.unit == "pfn":
            self.check_pfns([data], place)
        return data

    def dump(self, value: Any, room: Room | None) -> int:
        """Check that the number fits."""
        bits = self.bits or 8 * self.size
        signed = self.code.islower()
        low, end = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < end:
            raise errors.ParameterError(f"{self.key} {value!r}: not an integer of {bits} bits")
        return value

    def missing(self) -> int:
        """Return the default, or the only value there is."""
        if self.default is not None:
            return self.default
        return cast("int", super().missing()) if self.equals is None else self.equals

    @property
    def plain(self) -> bool:
        """Whether every number is accepted."""
        return self.equals is None and self.at_most is None

    def check_all(self, data: bytes, place: Place) -> None:
        """Check the numbers of a list. Raises: FormatError."""
        if not self.plain:
            for (value,) in struct.iter_unpack(f"<{self.code}", data):
                self.load(value, place, {})
        if self.owns is not None and self.unit == "pfn":
            self.check_pfns((value for (value,) in struct.iter_unpack(f"<{self.code}", data)), place)

    def check_pfns(self, pfns: Iterable[int], place: Place) -> None:
        """Check that page frame numbers are inside the address space. Raises: FormatError."""
        limit = (1 << 64) // place.blob.inc.page_size
        for pfn in pfns:
            if pfn >= limit:
                raise place.malformed(f"{self.key} {pfn:#x}: beyond the address space")

    def text_of(self, value: int) -> str | None:
        """Return the text next to a number; None without one."""
        if self.show is not None:
            return self.show(value)
        if self.enum is not None:
            return self.enum.get(value)
        if self.flags is not None:
            names = [name for mask, name in self.flags.items() if value & mask]
            rest = value & ~sum(self.flags)
            return ", ".join([*names, *([f"{rest:#x}"] if rest else [])]) or "none"
        return None

    def tell(self, value: int) -> dict[str, Any]:
        """Return the number, and its text under `NAME_text`."""
        said = self.text_of(value)
        return {self.name: value} if said is None else {self.name: value, f"{self.name}_text": said}

    def units(self) -> dict[str, str]:
        """Return the unit."""
        return {} if self.unit is None else {self.name: self.unit}

    def owned(self, value: int, place: Place, values: Mapping[str, Any]) -> Iterator[Owned]:
        """Yield the memory at the address, if it is the payload's."""
        if self.owns is None or not value:
            return
        inc = place.blob.inc
        phys = value * inc.page_size if self.unit == "pfn" else value
        if self.nbytes is None:
            nbytes = inc.page_size << (inc.order_at(phys) or 0)
        else:
            nbytes = values[self.nbytes] if isinstance(self.nbytes, str) else self.nbytes
        if nbytes:
            yield Owned(place.blob.owner, self.owns, (phys, nbytes))


def u8(**options: Any) -> Int:
    """Declare an unsigned integer of 8 bits. Args: as in `Int`."""
    return Int("B", **options)


def u16(**options: Any) -> Int:
    """Declare an unsigned integer of 16 bits. Args: as in `Int`."""
    return Int("H", **options)


def u32(**options: Any) -> Int:
    """Declare an unsigned integer of 32 bits. Args: as in `Int`."""
    return Int("I", **options)


def u64(**options: Any) -> Int:
    """Declare an unsigned integer of 64 bits. Args: as in `Int`."""
    return Int("Q", **options)


def s32(**options: Any) -> Int:
    """Declare a signed integer of 32 bits. Args: as in `Int`."""
    return Int("i", **options)


def s64(**options: Any) -> Int:
    """Declare a signed integer of 64 bits. Args: as in `Int`."""
    return Int("q", **options)


class _Text(Field[str]):
    def __init__(self, size: int | None, equals: str | None, key: str | None) -> None:
        super().__init__(key=key)
        self.code = f"{size or 0}s"
        self._room = size
        self.equals = equals

    @property
    def plain(self) -> bool:
        return self.equals is None

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> str:
        assert isinstance(data, bytes)
        found = data.split(b"\0")[0].decode("utf-8", "replace")
        if self.equals is not None and found != self.equals:
            raise place.malformed(f"{self.key} {found!r} is not {self.equals!r}")
        return found

    def dump(self, value: Any, room: Room | None) -> bytes:
        raw = value.encode() if isinstance(value, str) else None
        if raw is None or b"\0" in raw or (self._room is not None and len(raw) >= self._room):
            most = "" if self._room is None else f" of at most {self._room - 1} bytes"
            raise errors.ParameterError(f"{self.key} {value!r}: not text{most} without NUL")
        return raw if self._room else raw + b"\0"

    def missing(self) -> str:
        return cast("str", super().missing()) if self.equals is None else self.equals


def text(size: int | None = None, *, equals: str | None = None, key: str | None = None) -> Field[str]:
    """Declare a char array of `size` bytes with a NUL in it; in a devicetree, a string of any length.

    Args: equals: the only text that is accepted. key: as in `Int`.
    """
    return _Text(size, equals, key)


class _Bytes(Field[bytes]):
    plain = True

    def __init__(self, size: int | None, key: str | None) -> None:
        super().__init__(key=key)
        self.code = f"{size or 0}s"
        self._room = size

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> bytes:
        assert isinstance(data, bytes)
        return data

    def dump(self, value: Any, room: Room | None) -> bytes:
        found = bytes(value)
        if self._room is not None and len(found) > self._room:
            raise errors.ParameterError(f"{self.key}: {len(found)} bytes, there is room for {self._room}")
        return found

    def missing(self) -> bytes:
        return b""

    def tell(self, value: bytes) -> dict[str, Any]:
        return {self.name: value.hex()}


def raw(size: int | None = None, *, key: str | None = None) -> Field[bytes]:
    """Declare bytes without a meaning: reserved members, padding. Writers fill them with zeros."""
    return _Bytes(size, key)
