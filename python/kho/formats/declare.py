"""Payloads as declarations: the fields of a structure are listed once, and read and written from that list.

>>> from kho.formats import Declared, Record, decoder, u32, u64, vmalloc
>>>
>>> class Ring(Record):
...     pfn = u64(unit="pfn", owns="data")
...     entries = u64()
>>>
>>> @decoder("vendor,widget-v1")
... class Widget(Declared):
...     version = u32(equals=1)
...     nr_rings = u32()
...     rings = vmalloc(Ring, count="nr_rings")

docs/decoders.md has the whole of it. Every declaration is safe on hostile input: a structure has a fixed size; a list
is read only after its length was counted against what an image of this size can hold (`Budget`), no two lists share a
page, and each address is checked before it is followed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, ClassVar

from .. import errors
from .._kho import FdtWriter
from .fields import Field, Int, Place, Room, raw, s32, s64, text, u8, u16, u32, u64
from .layout import Record
from .records import Records, array, blocks, nodes, vmalloc
from .registry import Blob, Owned, Payload, registered_as

__all__ = [
    "Declared",
    "Field",
    "Int",
    "Place",
    "Record",
    "Records",
    "Room",
    "array",
    "blocks",
    "compatible_of",
    "nodes",
    "raw",
    "s32",
    "s64",
    "text",
    "u8",
    "u16",
    "u32",
    "u64",
    "vmalloc",
]


class Declared(Record, Payload):
    """A payload whose fields are declared; register it with `decoder`.

    Class arguments: as those of `Record`.
    A subclass may check its fields in `check`, and add to `describe`, `owned` and `findings`.
    """

    LAYOUT: ClassVar[struct.Struct]
    """The members without a list at the end."""
    source: ClassVar[str] = ""
    """Where the format is documented; shown with a draft."""
    unsure: str = ""
    """What of the format is not known for certain."""

    def __init_subclass__(cls, **rest: Any) -> None:
        """Lay the fields out."""
        super().__init_subclass__(**rest)
        cls.LAYOUT = cls.layout.struct

    def __init__(self, blob: Blob) -> None:
        Payload.__init__(self, blob)
        self._place = Place(blob, blob.phys)
        if self._fdt:
            self._values = self.layout.load_node(blob.fdt().root, self._place)
        else:
            size = self.layout.size
            room = None if blob.size is None else blob.size - size
            self._values = self.layout.load(blob.read(size), self._place, room)
        self.check()

    def check(self) -> None:
        """Check what the declaration does not: a subclass raises `self.malformed(why)`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the structure, with the list at its end; in a devicetree, those of the blob."""
        if self._fdt:
            return self.blob.size or 1
        tail = self.layout.tail
        return self.layout.size + (0 if tail is None else self._values[tail.name].nbytes)

    def describe(self) -> dict[str, Any]:
        """Return the fields; before them whether it is a draft, after them the units of numbers."""
        said: dict[str, Any] = {}
        if self.draft:
            said |= {"draft": True, "source": self.source}
        if self.unsure:
            said["unsure"] = self.unsure
        said |= Record.describe(self)
        units = self.units()
        return said | {"units": units} if units else said

    def owned(self) -> Iterator[Owned]:
        """Yield the structure, unless it is a subtree's blob, and the memory that its fields refer to."""
        if not self.blob.of_subtree:
            yield Owned(self.blob.owner, "structure", (self.blob.phys, self.nbytes))
        yield from Record.owned(self)

    @classmethod
    def encode(cls, room: Room | None = None, /, **values: Any) -> bytes:
        """Return the bytes of a payload with these fields.

        A count that is not given is that of its list; a field with `equals` or `default` has that value, and a field
        whose name begins with an underscore is 0. Lists are sequences of dicts or of integers, or bytes.

        Args: room: what takes the pages of lists in vmalloc areas and blocks; None if there are none.
        Raises: ParameterError for a value that does not fit, or is missing; OutOfMemoryError.
        """
        try:
            if not cls._fdt:
                return cls.layout.pack(values, room)
            w = FdtWriter(1 << 20)
            with w.node():
                if "compatible" not in (field.key for field in cls.layout.fields.values()):
                    w.property_str("compatible", compatible_of(cls))
                cls.layout.write_node(w, values, room)
            return w.finish()
        except errors.ParameterError as error:
            raise errors.ParameterError(f"{(registered_as(cls) or [cls.__name__])[0]}: {error}") from error


def compatible_of(kind: type[Payload]) -> str:
    """Return the compatible that a payload's class is registered under. Raises: ParameterError."""
    names = registered_as(kind)
    if not names:
        raise errors.ParameterError(f"{kind.__name__}: not registered; @decoder(COMPATIBLE) registers it")
    return names[0]
