"""Structures of declared fields: where each member is, and how all of them are read and written."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self, cast

from .. import errors
from .._kho import FdtNode, FdtWriter, Vmalloc
from .fields import Field, Int, Member, NodesField, Place, Room, TailField, Values
from .registry import Owned

__all__ = ["Layout", "Record"]

TAKEN = {"blob", "compatible", "data", "draft", "error", "raw", "sha256", "source", "token", "units", "unsure"}
"""Names that a field cannot have: descriptions use them."""


class Layout:
    """The members of a structure, in order, as `struct` reads them."""

    def __init__(self, fields: Iterable[Field[Any]], *, packed: bool, fdt: bool) -> None:
        self.fields = {field.name: field for field in fields}
        self.tail: TailField[Any] | None = None
        """The list of variable length at the end."""
        self.children: NodesField[Any] | None = None
        """The subnodes of a devicetree."""
        self._items: list[list[tuple[Field[Any], int, int]]] = []
        """For each item that `struct` returns: the fields in it, each with shift and mask; a mask of 0 is all of it."""
        self.struct = struct.Struct("<")
        self.size: int = 0
        self.align = 1
        if fdt:
            self.children = next((field for field in self.fields.values() if isinstance(field, NodesField)), None)
            for field in self.fields.values():
                if field.bits is not None:
                    raise TypeError(f"{field.name}: a bit field in a devicetree")
        else:
            self._lay_out(packed=packed)

    def _lay_out(self, *, packed: bool) -> None:
        """Find the place of each member. Raises: TypeError for members that cannot stand in a structure."""
        codes, offset, align, used = [], 0, 1, 0
        for field in self.fields.values():
            if self.tail is not None:
                raise TypeError(f"{field.name}: follows {self.tail.name}, a list of variable length")
            tail = field if isinstance(field, TailField) and field.variable else None
            if isinstance(field, NodesField) or not (field.size or tail):
                raise TypeError(f"{field.name}: has no size; only a devicetree (fdt=True) can have it")
            if tail is not None:
                if field.count is None:
                    raise TypeError(f"{field.name}: a list of variable length needs a count")
                self.tail = tail
                continue
            if field.bits is not None:
                width = 8 * field.size
                if used and self._items[-1][0][0].code == field.code and used + field.bits <= width:
                    self._items[-1].append((field, used, (1 << field.bits) - 1))
                    used = (used + field.bits) % width
                    continue
                if used:
                    raise TypeError(f"{field.name}: the bit fields before it do not fill their integer")
                used = field.bits % width
            elif used:
                raise TypeError(f"{field.name}: the bit fields before it do not fill their integer")
            gap = 0 if packed else -offset % field.align
            if gap:
                codes.append(f"{gap}x")
            codes.append(field.code)
            offset += gap + field.size
            align = max(align, 1 if packed else field.align)
            self._items.append([(field, 0, 0 if field.bits is None else (1 << field.bits) - 1)])
        if used:
            raise TypeError(f"{self._items[-1][-1][0].name}: the bit fields up to it do not fill their integer")
        end = -offset % align
        self.struct = struct.Struct("<" + "".join(codes) + (f"{end}x" if end and self.tail is None else ""))
        self.size = self.struct.size
        self.align = align

    @property
    def plain(self) -> bool:
        """Whether every sequence of bytes of this size is a record, and reading it reads nothing else."""
        return all(field.plain for field in self.fields.values())

    def columns(self, data: bytes, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield the members with these names of every record in `data`, as they stand there."""
        where = {field.name: (at, s, mask) for at, parts in enumerate(self._items) for field, s, mask in parts}
        chosen = [where[name] for name in names]
        for items in self.struct.iter_unpack(data):
            yield tuple([items[at] >> shift & mask if mask else items[at] for at, shift, mask in chosen])

    def check_all(self, data: bytes, place: Place) -> None:
        """Check the page frame numbers of a list of records, without making them. Raises: FormatError."""
        for name, field in self.fields.items():
            if isinstance(field, Int) and field.owns is not None and field.unit == "pfn":
                field.check_pfns((pfn for (pfn,) in self.columns(data, name)), place)

    def load(self, data: bytes, place: Place, room: int | None = None) -> dict[str, Any]:
        """Read the values. Args: room: bytes up to the end of the payload, None if unknown. Raises: FormatError."""
        found: dict[str, Member] = {}
        for item, parts in zip(self.struct.unpack(data), self._items, strict=True):
            for field, shift, mask in parts:
                found[field.name] = item >> shift & mask if mask else item
        return self._values(found, place, room)

    def _values(self, found: dict[str, Member], place: Place, room: int | None) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for field in sorted((self.fields[name] for name in found), key=lambda field: field.late):
            values[field.name] = field.load(found[field.name], place, values)
        if self.tail is not None:
            values[self.tail.name] = self.tail.load_tail(place, self.size, room, values)
        for name, value in values.items():
            values[name] = self.fields[name].cut(value, values, place)
        return values

    def load_node(self, node: FdtNode, place: Place) -> dict[str, Any]:
        """Read the values from the properties of a devicetree's node. Raises: FormatError."""
        found: dict[str, Member] = {}
        for field in self.fields.values():
            if isinstance(field, NodesField):
                continue
            if field.key not in node:
                raise place.malformed(f"node {node.name!r}: no property {field.key!r}")
            value = node[field.key]
            if field.size and len(value) != field.size:
                raise place.malformed(f"{field.key}: {len(value)} bytes, not {field.size}")
            found[field.name] = struct.unpack(f"<{field.code}", value)[0] if field.size else value
        values = self._values(found, place, None)
        if self.children is not None:
            values[self.children.name] = self.children.load_nodes(node, place)
        return values

    def dump(self, given: Mapping[str, Any], room: Room | None) -> dict[str, Member]:
        """Return what stands in the structure for each field. Raises: ParameterError."""
        unknown = [name for name in given if name not in self.fields]
        if unknown:
            raise errors.ParameterError(f"no field {unknown[0]!r}; there are {', '.join(self.fields)}")
        values = dict(given)
        for field in self.fields.values():
            values = field.counted(given.get(field.name, ())) | values
        found: dict[str, Member] = {}
        for name, field in self.fields.items():
            if name not in values and isinstance(field, Int) and not field.shown:
                values[name] = 0
            found[name] = field.dump(values[name] if name in values else field.missing(), room)
        return found

    def pack(self, given: Mapping[str, Any], room: Room | None) -> bytes:
        """Return the bytes of the structure. Raises: ParameterError; OutOfMemoryError."""
        found = self.dump(given, room)
        items: list[Any] = []
        for parts in self._items:
            first, _, mask = parts[0]
            bits = (cast("int", found[field.name]) << shift for field, shift, _ in parts) if mask else ()
            items.append(sum(bits) if mask else found[first.name])
        end = b"" if self.tail is None else cast("bytes", found[self.tail.name])
        return self.struct.pack(*items) + end

    def write_node(self, w: FdtWriter, given: Mapping[str, Any], room: Room | None) -> None:
        """Write the properties and subnodes of an open node. Raises: ParameterError; OutOfMemoryError."""
        found = self.dump({k: v for k, v in given.items() if self.children is None or k != self.children.name}, room)
        for name, field in self.fields.items():
            value = found[name]
            if isinstance(field, NodesField):
                continue
            w.property(field.key, struct.pack(f"<{field.code}", value) if field.size else cast("bytes", value))
        if self.children is not None:
            self.children.write_nodes(w, given.get(self.children.name, {}), room)


class Record(Values):
    """A structure: a class whose attributes are fields, in the order of the structure.

    Class arguments: packed=False lays the fields out as C does, with padding; by default there is none, as in the
    kernel's headers, which say `__packed`. fdt=True: a node of a devicetree, in which each field is a property.
    """

    layout: ClassVar[Layout] = Layout((), packed=True, fdt=False)
    _fdt: ClassVar[bool] = False
    _place: Place

    def __init_subclass__(cls, *, packed: bool = True, fdt: bool = False, **rest: Any) -> None:
        """Lay the fields out. Raises: TypeError for fields that cannot be a structure."""
        super().__init_subclass__(**rest)
        found: dict[str, Field[Any]] = {}
        used: set[str] = set()
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                if isinstance(value, Field):
                    found.pop(name, None)  # A field that is declared again stands where the subclass has it.
                    found[name] = value
            used |= {name for name, value in vars(base).items() if not isinstance(value, Field)}
        for name in found.keys() & (TAKEN | used):
            raise TypeError(f"field {name!r}: the name is in use; end it with an underscore")
        cls._fdt = fdt or cls._fdt
        cls.layout = Layout(found.values(), packed=packed, fdt=cls._fdt)

    @classmethod
    def load(cls, data: bytes, place: Place) -> Self:
        """Read a record from its bytes. Raises: FormatError."""
        record = cls.__new__(cls)
        record._place = place
        record._values = cls.layout.load(data, place)
        return record

    @classmethod
    def load_node(cls, node: FdtNode, place: Place) -> Self:
        """Read a record from a devicetree's node. Raises: FormatError."""
        record = cls.__new__(cls)
        record._place = place
        record._values = cls.layout.load_node(node, place)
        return record

    def describe(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON, with the text of enums and flags under `NAME_text`."""
        said: dict[str, Any] = {}
        for name, field in self.layout.fields.items():
            if field.shown:
                said |= field.tell(self._values[name])
        return said

    @classmethod
    def units(cls) -> dict[str, str]:
        """Return the unit of each number, by the name of its field; those of records as `LIST.FIELD`."""
        found: dict[str, str] = {}
        for field in cls.layout.fields.values():
            if field.shown:
                found |= field.units()
        return found

    def owned(self) -> Iterator[Owned]:
        """Yield the memory that the fields refer to."""
        for name, field in self.layout.fields.items():
            yield from field.owned(self._values[name], self._place, self._values)

    def areas(self) -> Iterator[tuple[str, Vmalloc]]:
        """Yield the vmalloc areas that the fields refer to, each with its name."""
        for name, field in self.layout.fields.items():
            yield from field.areas(self._values[name])

    def __eq__(self, other: object) -> bool:
        """Whether both are of one class and have the same values."""
        return isinstance(other, Record) and (type(self), self._values) == (type(other), other._values)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return the class and the values."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"
