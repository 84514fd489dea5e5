"""`Reader`: committed objects, read in place. The common base of `Candidate` and `Handle`."""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from .._kho import MappedBytes
from ..errors import FormatError, NotFoundError, NotOwnerError, SchemaError
from ..formats.live import PAGE, Item
from ..owned import Uncopied
from .file.arrays import View, shaped
from .file.image import ImageFile, State
from .file.mapping import Mapping
from .file.pins import Pin


class Reader(Uncopied):
    """An image's committed objects: a mapping of names to read-only views. Threads may share it."""

    def __init__(self, image: ImageFile, state: State, pin: Pin) -> None:
        """Read a committed state that a pin has locked; views map the pin's description, so they keep the lock."""
        self._image = image
        self._state = state
        self._pin = pin
        self._lock = threading.RLock()
        self._data = Mapping(pin.fd, image.sup.offset, image.sup.size, writable=False)
        self._exporters: weakref.WeakValueDictionary[int, MappedBytes] = weakref.WeakValueDictionary()
        self._torn = state.torn
        self._dropped = image.journal(state.root.generation)
        _readers.add(self)

    @property
    def name(self) -> str:
        """The name of the image."""
        return self._state.catalog.image

    @property
    def version(self) -> str:
        """The version of the service's data."""
        return self._state.catalog.version

    @property
    def generation(self) -> int:
        """The number of commits so far."""
        return self._state.root.generation

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of objects whose changes the previous owner did not commit, as far as the journal has them."""
        return self._dropped

    @property
    def torn(self) -> int | None:
        """The generation whose commit the previous owner's death cut short; None if there is none."""
        return self._torn

    def info(self, name: str) -> Item:
        """Return address, dtype, shape, checksum and generation of an object. Raises: NotFoundError."""
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
        """Return the objects' names, in the order in which they were put."""
        with self._lock:
            return list(self._state.catalog.items)

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.names())

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        """Return whether there is an object of that name."""
        return name in self.names()

    def __getitem__(self, name: str) -> View:
        """Return an object in place: read-only, without a copy. Raises: NotFoundError."""
        with self._lock:
            return self._shown(self._find(name))

    def _shown(self, item: Item) -> View:
        return shaped(memoryview(self._exporter(item.phys, item.nbytes)).toreadonly(), item.dtype, item.shape)

    def _exporter(self, phys: int, nbytes: int) -> MappedBytes:
        """Return the exporter of an object's bytes: the same one as long as a view of it exists."""
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

    def _check_schema(self, name: str | None, version: str | None) -> None:
        """Refuse an image of another name or version. Raises: SchemaError."""
        if name is not None and name != self.name:
            raise SchemaError(f"{self._image.where}: the image of {self.name!r}, not of {name!r}")
        if version is not None and version != self.version:
            raise SchemaError(
                f"{self._image.where}: {self.name!r} of version {self.version!r}, not {version!r}; it is left as it "
                "is. Convert it with kho.live.attach, or release it and start again"
            )

    def fileno(self) -> int:
        """Return the image's descriptor, to pass to another process. The lock is not passed with it."""
        return self._image.fd

    def close(self) -> None:
        """Close the image. Views that were handed out stay valid, and keep their contents."""
        self._image.close()
        self._unmap()

    def _unmap(self) -> None:
        vars(self).pop("_data", None)
        self._pin.close()

    def _forked(self) -> None:
        """In a forked child: drop the lock, which is the parent's."""
        self._lock = threading.RLock()
        self._image.forget_lock()

    def __enter__(self) -> Self:
        """Return this reader."""
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
    """Close locks in a forked child: they would otherwise be held until the child ends, after their owner's end."""
    for reader in list(_readers):
        reader._forked()


os.register_at_fork(after_in_child=_after_fork)


def run_of(item: Item, base: int) -> tuple[int, int]:
    """Return an object's pages: the first one, counted from the start of the memory, and their number."""
    return ((item.phys - base) // PAGE, item.pages) if item.nbytes else (0, 0)
