"""Objects as they were committed, read in place: what a candidate and an owner have in common."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ..errors import FormatError, NotFoundError, NotOwnerError, SchemaError
from ..formats.live import PAGE, Item
from ..owned import Uncopied
from .file.arrays import View, shaped
from .file.image import Image, State
from .file.mapping import Mapping
from .file.pins import Pin

Exporter = ctypes.Array[ctypes.c_ubyte]


class Reader(Uncopied):
    """An image's committed objects: a mapping of names to read-only views. Threads may share it."""

    def __init__(self, image: Image, state: State, pin: Pin) -> None:
        """Read what a pin keeps; its description is what is mapped, so that views keep it too."""
        self._image = image
        self._state = state
        self._pin = pin
        self._lock = threading.RLock()
        self._data = Mapping(pin.fd, image.sup.offset, image.sup.size, writable=False)
        self._exporters: weakref.WeakValueDictionary[int, Exporter] = weakref.WeakValueDictionary()
        self._torn = state.torn
        self._dropped = image.journal(state.root.generation)
        _readers.add(self)

    @property
    def name(self) -> str:
        """The image's."""
        return self._state.catalog.image

    @property
    def version(self) -> str:
        """Of what the service keeps in it."""
        return self._state.catalog.version

    @property
    def generation(self) -> int:
        """How many commits there have been."""
        return self._state.root.generation

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of objects whose changes the owner before did not commit, as far as they were noted."""
        return self._dropped

    @property
    def torn(self) -> int | None:
        """The generation whose commit the owner before did not live to finish; the one before it is whole."""
        return self._torn

    def info(self, name: str) -> Item:
        """Tell an object's place, dtype, shape, checksum, and the commit it came with. Raises: NotFoundError."""
        with self._lock:
            return self._find(name)

    def _find(self, name: str) -> Item:
        if self._image.fd < 0:
            raise NotOwnerError(f"{self._image.where}: {name!r}: this is closed")
        try:
            return self._state.catalog.items[name]
        except KeyError:
            raise NotFoundError(f"{self._image.where}: no object {name!r}") from None

    def names(self) -> list[str]:
        """List the objects, in the order in which they were put."""
        with self._lock:
            return list(self._state.catalog.items)

    def __len__(self) -> int:
        """Count the objects."""
        return len(self.names())

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        """Say whether there is an object of that name."""
        return name in self.names()

    def __getitem__(self, name: str) -> View:
        """Give an object where it lies: read-only, without a copy. Raises: NotFoundError."""
        with self._lock:
            return self._shown(self._find(name))

    def _shown(self, item: Item) -> View:
        return shaped(memoryview(self._exporter(item.phys, item.nbytes)).cast("B").toreadonly(), item.dtype, item.shape)

    def _exporter(self, phys: int, nbytes: int) -> Exporter:
        """Give what exports an object's bytes: one as long as anybody looks at it."""
        if not nbytes:
            return self._data.exporter(0, 0)
        found = self._exporters.get(phys)
        if found is None:
            found = self._exporters[phys] = self._data.exporter(phys - self._image.sup.base, nbytes)
        return found

    def verify(self, *names: str) -> int:
        """Read objects, by default all that are committed, and compare their checksums.

        Returns the number of bytes read.

        Raises: FormatError with the first object whose bytes are not those that were committed; NotFoundError.
        """
        with self._lock:
            items = [Reader._find(self, name) for name in names or self._state.catalog.items]
            held = [self._exporter(item.phys, item.nbytes) for item in items]
        for item, exporter in zip(items, held, strict=True):
            if (crc := zlib.crc32(exporter)) != item.crc32:
                raise FormatError(
                    f"{self._image.where}: object {item.name!r} at {item.phys:#x}: its bytes sum to {crc:#010x}, not "
                    f"{item.crc32:#010x}; they were changed after generation {item.generation} was committed"
                )
        return sum(item.nbytes for item in items)

    def check(self, name: str | None, version: str | None) -> None:
        """Refuse an image of another name or version. Raises: SchemaError."""
        if name is not None and name != self.name:
            raise SchemaError(f"{self._image.where}: the image of {self.name!r}, not of {name!r}")
        if version is not None and version != self.version:
            raise SchemaError(
                f"{self._image.where}: {self.name!r} of version {self.version!r}, not {version!r}; it is left as it "
                "is. Convert it with kho.live.attach, or release it and begin anew"
            )

    def fileno(self) -> int:
        """Give the image's descriptor, to pass on. Its lock does not go with it."""
        return self._image.fd

    def close(self) -> None:
        """Let go. Views that were handed out stay, and what they show stays what it is."""
        self._image.close()
        self._unmap()

    def _unmap(self) -> None:
        vars(self).pop("_data", None)
        self._pin.close()

    def _forked(self) -> None:
        """In a child: give up what must be one process's."""
        self._lock = threading.RLock()
        self._image.forget_lock()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close."""
        if hasattr(self, "_image"):
            self._image.close()
        if hasattr(self, "_pin"):
            self._pin.close()


_readers: weakref.WeakSet[Reader] = weakref.WeakSet()


def _after_fork() -> None:
    """Close the lock in a child: a lock that a forgotten child holds would outlive its owner."""
    for reader in list(_readers):
        reader._forked()


os.register_at_fork(after_in_child=_after_fork)


def run_of(item: Item, base: int) -> tuple[int, int]:
    """Give an object's pages, counted from the memory's first."""
    return ((item.phys - base) // PAGE, item.pages) if item.nbytes else (0, 0)
