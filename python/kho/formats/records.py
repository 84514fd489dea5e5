"""Lists of records: in the structure itself, in vmalloc areas, in chains of blocks, and as subnodes of a devicetree."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias, overload

from .. import errors
from .._kho import FdtNode, FdtWriter, Vmalloc
from .fields import Field, Int, Member, NodesField, Place, Room, TailField
from .layout import Layout, Record
from .registry import Owned

__all__ = ["Records", "array", "blocks", "nodes", "vmalloc"]

MOST_SHOWN = 1024
"""Maximum number of a list's records in a description."""
DESCRIPTOR = 16
"""Bytes of `struct kho_vmalloc`."""
BLOCK = struct.Struct("<QQ")
"""`{ u64 next; u64 count; }` at the head of a block of entries."""

Of: TypeAlias = type[Record] | Int
"""What a list consists of: records, or integers."""


def layout_of(of: Of) -> Layout | Int:
    """Return what has the size of a record, and whether it is plain."""
    return of if isinstance(of, Int) else of.layout


def take(place: Place, of: Of, count: int, what: str) -> None:
    """Count the records of a list, before it is read. Raises: FormatError for more than the image can hold."""
    budget = place.blob.budget
    (budget.take_items if layout_of(of).plain else budget.take_objects)(count, f"{place.blob.owner}: {what}")


def read_records(place: Place, phys: int, count: int, of: Of, what: str) -> bytes:
    """Read `count` records, after they were counted. Raises: FormatError."""
    take(place, of, count, f"{what} at {phys:#x}")
    size = layout_of(of).size
    try:
        return place.blob.inc.read(phys, count * size)
    except errors.MissingMemoryError:
        raise
    except errors.KhoError as error:
        raise place.malformed(f"{what} at {phys:#x}: {count} records of {size} bytes: {error}") from error


class Records(Sequence[Any]):
    """A list that was read: records, or integers.

    There may be millions, so an object is made when it is asked for, unless reading a record includes checks or lists
    of its own: then all are made when the list is read.
    """

    def __init__(
        self,
        of: Of,
        data: bytes,
        place: Place,
        *,
        area: Vmalloc | None = None,
        pages: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.of = of
        self.place = place
        self.area = area
        """The vmalloc area that contains the list, or None."""
        self.pages = pages
        """`(phys, nbytes)` of the blocks that contain the list."""
        self._data = data
        self._size = layout_of(of).size
        if isinstance(of, Int):
            of.check_all(data, place)
        else:
            of.layout.check_all(data, place)
        self._made: list[Any] | None = None
        if not isinstance(of, Int) and not of.layout.plain:
            self._made = [of.load(data[at : at + self._size], place) for at in range(0, len(data), self._size)]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._data) // self._size

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> list[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        """Return a record or an integer; a list of them for a slice."""
        if self._made is not None:
            return self._made[at]
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        start = range(len(self))[at] * self._size
        data = self._data[start : start + self._size]
        if isinstance(self.of, Int):
            return self.of.load(struct.unpack(f"<{self.of.code}", data)[0], self.place, {})
        return self.of.load(data, self.place)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the records."""
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether all records are equal."""
        return isinstance(other, Records | list | tuple) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return the first records."""
        more = f", ... {len(self)} in all" if len(self) > 8 else ""
        return f"[{', '.join(map(repr, islice(self, 8)))}{more}]"

    @property
    def nbytes(self) -> int:
        """Bytes of the list."""
        return len(self._data)

    def head(self, n: int) -> Records:
        """Return the first `n` records."""
        found = copy.copy(self)
        found._data = self._data[: n * self._size]
        found._made = None if self._made is None else self._made[:n]
        return found

    def owned(self) -> Iterator[Owned]:
        """Yield the memory that the records refer to; memory that adjoins is one range."""
        last: Owned | None = None
        for found in self._each_owned():
            if (
                last is not None
                and last[:2] == found[:2]
                and isinstance(last.memory, tuple)
                and isinstance(found.memory, tuple)
            ):
                (phys, nbytes), (after, more) = last.memory, found.memory
                if phys + nbytes == after:
                    last = Owned(last.owner, last.what, (phys, nbytes + more))
                    continue
            if last is not None:
                yield last
            last = found
        if last is not None:
            yield last

    def _each_owned(self) -> Iterator[Owned]:
        if isinstance(self.of, Int):
            for value in self:
                yield from self.of.owned(value, self.place, {})
        elif self._made is not None:
            for record in self._made:
                yield from record.owned()
        else:
            for name, field in self.of.layout.fields.items():
                if isinstance(field, Int) and field.owns is not None:
                    extra = [field.nbytes] if isinstance(field.nbytes, str) else []
                    for value, *size in self.of.layout.columns(self._data, name, *extra):
                        yield from field.owned(value, self.place, dict(zip(extra, size, strict=True)))

    def columns(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield the members with these names of every record, without making objects of the records.

        Raises: ParameterError if the records are not of numbers and bytes alone.
        """
        if isinstance(self.of, Int) or self._made is not None:
            raise errors.ParameterError("columns: the list does not consist of plain records")
        return self.of.layout.columns(self._data, *names)


class _List(Field[Records]):
    """Common part of all lists."""

    late = True

    def __init__(self, of: Of, count: int | str | None, *, listed: bool, key: str | None) -> None:
        super().__init__(key=key)
        if not layout_of(of).size:
            raise TypeError("a list of records of no size")
        self.of = of
        self.count = count
        self.listed = listed

    def nr(self, values: Mapping[str, Any], place: Place) -> int | None:
        """Return the length that another field states, None if none does. Raises: FormatError if it is negative."""
        count: int | None = values[self.count] if isinstance(self.count, str) else self.count
        if count is not None and count < 0:
            raise place.malformed(f"{self.count} {count}: is negative")
        return count

    def counted(self, value: Any) -> dict[str, int]:
        nr = len(value) // layout_of(self.of).size if isinstance(value, bytes | bytearray) else len(value)
        return {self.count: nr} if isinstance(self.count, str) else {}

    def missing(self) -> Any:
        return []

    def packed(self, value: Any, room: Room | None) -> bytes:
        """Return the bytes of the records of a list; bytes are taken as they are."""
        if isinstance(value, bytes | bytearray):
            return bytes(value)
        if isinstance(self.of, Int):
            of = self.of
            return b"".join(struct.pack(f"<{of.code}", of.dump(item, room)) for item in value)
        layout = self.of.layout
        return b"".join(layout.pack(item._values if isinstance(item, Record) else item, room) for item in value)

    def tell(self, value: Records) -> dict[str, Any]:
        if not self.listed:
            return {self.name: len(value)}
        said: list[Any] = [v.describe() if isinstance(v, Record) else v for v in islice(value, MOST_SHOWN)]
        more = len(value) - len(said)
        return {self.name: said, f"{self.name}_omitted": more} if more else {self.name: said}

    def units(self) -> dict[str, str]:
        if not self.listed:
            return {}
        if isinstance(self.of, Int):
            return {} if self.of.unit is None else {self.name: self.of.unit}
        return {f"{self.name}.{name}": unit for name, unit in self.of.units().items()}

    def owned(self, value: Records, place: Place, values: Mapping[str, Any]) -> Iterator[Owned]:
        yield from value.owned()


class _Array(_List, TailField[Records]):
    """Records in the structure itself."""

    def __init__(self, of: Of, count: int | str | None, used: str | None, *, listed: bool, key: str | None) -> None:
        super().__init__(of, count, listed=listed, key=key)
        self.used = used
        self.variable = not isinstance(count, int)
        self.align = of.align if isinstance(of, Int) else of.layout.align
        self.code = f"{(count if isinstance(count, int) else 0) * layout_of(of).size}s"

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> Records:
        assert isinstance(data, bytes)
        size = layout_of(self.of).size
        if len(data) % size:
            raise place.malformed(f"{self.key}: {len(data)} bytes are not a multiple of {size}")
        take(place, self.of, len(data) // size, self.key)
        return Records(self.of, data, place)

    def load_tail(self, place: Place, offset: int, room: int | None, values: dict[str, Any]) -> Records:
        """Read a list that follows the structure."""
        size, count = layout_of(self.of).size, self.nr(values, place)
        assert count is not None
        if room is not None and count * size > room:
            raise place.malformed(f"{self.count} {count}: the payload has room for {max(room, 0) // size} {self.name}")
        return Records(self.of, read_records(place, place.phys + offset, count, self.of, self.name), place)

    def cut(self, value: Records, values: Mapping[str, Any], place: Place) -> Records:
        """Leave out the records that are not in use."""
        if (count := self.nr(values, place)) not in (None, len(value)):
            raise place.malformed(f"{self.count} {count}: {self.key} has {len(value)}")
        if self.used is None:
            return value
        used = values[self.used]
        if not 0 <= used <= len(value):
            raise place.malformed(f"{self.used} {used}: {self.name} has room for {len(value)}")
        return value.head(used)

    def counted(self, value: Any) -> dict[str, int]:
        found = super().counted(value)
        return found if self.used is None else {self.used: len(value)}

    def dump(self, value: Any, room: Room | None) -> bytes:
        data = self.packed(value, room)
        if isinstance(self.count, int) and len(data) > self.size:
            raise errors.ParameterError(f"{self.name}: {len(data)} bytes, there is room for {self.size}")
        return data


def array(
    of: Of, count: int | str | None = None, *, used: str | None = None, listed: bool = True, key: str | None = None
) -> Field[Records]:
    """Declare records in the structure itself.

    Args:
        of: a `Record` class, or an integer such as `u64(unit="pfn")`.
        count: their number, or the name of the field that contains it; then the list is the end of the structure. In a
            devicetree, None: all of the property.
        used: the field with the number of records in use, of a list of fixed length.
        listed: whether descriptions list the records, or only their number.
        key: as in `Int`.

    """
    return _Array(of, count, used, listed=listed, key=key)


class _Area(_List):
    """Records in a vmalloc area."""

    code = f"{DESCRIPTOR}s"
    align = 8

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> Records:
        assert isinstance(data, bytes)
        blob, size, count = place.blob, layout_of(self.of).size, self.nr(values, place)
        area = Vmalloc(blob.inc, data, place.phys)
        if count is None:
            found = area.records(size, min(area.nbytes // size, blob.inc.room("items") + 1))
            take(place, self.of, len(found) // size, self.name)
            return Records(self.of, found, place, area=area)
        if count * size > area.nbytes:
            raise place.malformed(f"{self.count} {count}: the area of {self.name} has room for {area.nbytes // size}")
        take(place, self.of, count, self.name)
        return Records(self.of, area.read(count * size) if count else b"", place, area=area)

    def dump(self, value: Any, room: Room | None) -> bytes:
        data = self.packed(value, room)
        if not data:
            return bytes(DESCRIPTOR)
        if room is None:
            raise errors.ParameterError(f"{self.name}: a list needs pages; encode it into a handover")
        return room.area(data)

    def owned(self, value: Records, place: Place, values: Mapping[str, Any]) -> Iterator[Owned]:
        if value.area is not None:
            yield Owned(place.blob.owner, f"{self.name} list", value.area)
        yield from value.owned()

    def areas(self, value: Records) -> Iterator[tuple[str, Vmalloc]]:
        if value.area is not None:
            yield f"{self.name} list", value.area


class _Unknown(_Area):
    """A vmalloc area whose records have no published layout."""

    late = False

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> Records:
        assert isinstance(data, bytes)
        return Records(self.of, b"", place, area=Vmalloc(place.blob.inc, data, place.phys))

    def tell(self, value: Records) -> dict[str, Any]:
        nbytes = value.area.nbytes if value.area else 0
        return {self.name: {"nbytes": nbytes, "unsure": "the layout of its records is not published"}}


def vmalloc(of: Of | None, count: str | None = None, *, listed: bool = True, key: str | None = None) -> Field[Records]:
    """Declare a `struct kho_vmalloc`: records in a preserved vmalloc area, which belongs to the payload.

    Args:
        of: as in `array`; None if the layout of the records is not known.
        count: the field with their number; without it, they end at the first record of zeros.
        listed, key: as in `array`.

    """
    if of is None:
        return _Unknown(Int("B"), None, listed=listed, key=key)
    return _Area(of, count, listed=listed, key=key)


class _Blocks(_List):
    """Records in a chain of blocks of one page each."""

    code = "Q"
    align = 8

    def load(self, data: Member, place: Place, values: dict[str, Any]) -> Records:
        assert isinstance(data, int)
        blob, size = place.blob, layout_of(self.of).size
        page, phys = blob.inc.page_size, data
        found, pages = bytearray(), []
        while phys:
            what = f"{self.name} block"
            if phys % page:
                raise place.malformed(f"{what} at {phys:#x}: not a multiple of the page size {page}")
            # A block counts as a record, so that a chain of empty blocks is limited too.
            blob.budget.take_objects(1, f"{blob.owner}: {what} at {phys:#x}")
            blob.budget.take_memory(phys, page, what)
            following, count = BLOCK.unpack(blob.inc.read(phys, BLOCK.size))
            if count > (page - BLOCK.size) // size:
                raise place.malformed(f"{what} at {phys:#x}: {count} entries do not fit a page")
            found += read_records(place, phys + BLOCK.size, count, self.of, what)
            pages.append((phys, page))
            phys = following
        count = self.nr(values, place)
        if count is not None and count != len(found) // size:
            raise place.malformed(f"{self.count} {count}: the blocks of {self.name} have {len(found) // size}")
        return Records(self.of, bytes(found), place, pages=pages)

    def dump(self, value: Any, room: Room | None) -> int:
        data = self.packed(value, room)
        if not data:
            return 0
        if room is None:
            raise errors.ParameterError(f"{self.name}: a list needs pages; encode it into a handover")
        size = layout_of(self.of).size
        most = (room.page_size - BLOCK.size) // size * size
        following = 0
        for start in reversed(range(0, len(data), most)):
            part = data[start : start + most]
            following = room.put((BLOCK.pack(following, len(part) // size) + part).ljust(room.page_size, b"\0"))
        return following

    def owned(self, value: Records, place: Place, values: Mapping[str, Any]) -> Iterator[Owned]:
        for page in value.pages:
            yield Owned(place.blob.owner, f"{self.name} block", page)
        yield from value.owned()


def blocks(of: Of, count: str | None = None, *, listed: bool = True, key: str | None = None) -> Field[Records]:
    """Declare the address of a chain of pages, each `{ u64 next; u64 count; }` and `count` records.

    Args: count: the field with their number in all, which must be right. Others: as in `array`.
    """
    return _Blocks(of, count, listed=listed, key=key)


class _Nodes(NodesField[dict[str, Any]]):
    def __init__(self, of: type[Record]) -> None:
        super().__init__()
        self.of = of

    def load_nodes(self, node: FdtNode, place: Place) -> dict[str, Any]:
        children = node.children
        place.blob.budget.take_objects(len(children), f"{place.blob.owner} at {place.phys:#x}")
        return {child.name: self.of.load_node(child, place) for child in children}

    def write_nodes(self, w: FdtWriter, value: Any, room: Room | None) -> None:
        for name, values in value.items():
            with w.node(name):
                self.of.layout.write_node(w, values, room)

    def missing(self) -> Any:
        return {}

    def tell(self, value: dict[str, Any]) -> dict[str, Any]:
        return {self.name: {name: record.describe() for name, record in value.items()}}

    def units(self) -> dict[str, str]:
        return {f"{self.name}.{name}": unit for name, unit in self.of.units().items()}

    def owned(self, value: dict[str, Any], place: Place, values: Mapping[str, Any]) -> Iterator[Owned]:
        for record in value.values():
            yield from record.owned()

    def areas(self, value: dict[str, Any]) -> Iterator[tuple[str, Vmalloc]]:
        for name, record in value.items():
            yield from ((f"{name}, {what}", area) for what, area in record.areas())


def nodes(of: type[Record]) -> Field[dict[str, Any]]:
    """Declare the subnodes of a devicetree: a dict of records by node name."""
    return _Nodes(of)
