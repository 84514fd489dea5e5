"""Payloads, the registry of their decoders, and what becomes of those nobody knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .. import errors
from .._kho import Fdt, Incoming, Memfd, Vmalloc

if TYPE_CHECKING:
    from ..findings import Finding


class Owned(NamedTuple):
    """Memory that a payload accounts for: one of a byte range, a page list, a file."""

    owner: str
    """Whose it is, for people: `session vm-1, file 0x10`."""
    what: str
    """What of it: `data`, `folio list`, `block`."""
    memory: tuple[int, int] | Vmalloc | Memfd
    """`(phys, nbytes)`, the blocks of a vmalloc area, or the folios of a memfd."""


@dataclass(frozen=True)
class Blob:
    """What a decoder is given: a place in a handover."""

    inc: Incoming
    compatible: str
    """What it says it is; empty if it does not say."""
    phys: int
    size: int | None
    """Bytes, if known."""
    owner: str
    """Whose it is, for people: `subtree LUO`, `session vm-1, file 0x10`."""

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`; all of them when `n` is not given.

        Raises: ParameterError if there is no size to read up to; OutsideMemoryError.
        """
        if n is None:
            if self.size is None:
                raise errors.ParameterError(f"{self.owner} at {self.phys:#x}: its size is not known")
            n = max(self.size - offset, 0)
        return self.inc.read(self.phys + offset, n)


class Payload:
    """Something that was decoded. A subclass reads its blob in `__init__` and raises FormatError where it cannot."""

    def __init__(self, blob: Blob) -> None:
        self.blob = blob

    @property
    def compatible(self) -> str:
        """The compatible it was decoded by."""
        return self.blob.compatible

    def describe(self) -> dict[str, Any]:
        """Give what is in it, as data for JSON."""
        return {}

    def owned(self) -> Iterator[Owned]:
        """Account for memory beyond the blob itself."""
        return iter(())

    def findings(self) -> Iterator[Finding]:
        """Say what is wrong with it."""
        return iter(())

    def malformed(self, why: str) -> errors.FormatError:
        """Make the error for a blob that cannot be what it says."""
        return errors.FormatError(f"{self.blob.owner} at {self.blob.phys:#x}: {why}")


class Raw(Payload):
    """A blob nobody has a decoder for, shown as it is."""

    SHOWN = 64

    def describe(self) -> dict[str, Any]:
        """Give the first bytes in hex."""
        nbytes = self.SHOWN if self.blob.size is None else min(self.blob.size, self.SHOWN)
        try:
            return {"raw": self.blob.read(nbytes).hex()}
        except errors.KhoError as error:
            return {"error": str(error)}


class Broken(Payload):
    """A blob whose decoder refused it."""

    def __init__(self, blob: Blob, error: errors.KhoError) -> None:
        super().__init__(blob)
        self.error = error

    def describe(self) -> dict[str, Any]:
        """Give the reason."""
        return {"error": str(self.error)}


_decoders: dict[str, Callable[[Blob], Payload]] = {}
_Class = TypeVar("_Class", bound=Callable[[Blob], Payload])


def decoder(*compatibles: str) -> Callable[[_Class], _Class]:
    """Register a `Payload` class (or function that makes one) for these compatibles."""

    def register(make: _Class) -> _Class:
        for compatible in compatibles:
            _decoders[compatible] = make
        return make

    return register


@cache
def _load_entry_points() -> None:
    """Import what other packages registered; one that fails is left out, with a warning."""
    from importlib.metadata import entry_points

    for entry in entry_points(group="kho.decoders"):
        try:
            loaded = entry.load()
        except Exception as error:  # noqa: BLE001 - somebody else's code; the rest must still work
            import warnings

            warnings.warn(f"kho.decoders: {entry.name} ({entry.value}) cannot be loaded: {error}", stacklevel=2)
        else:
            if isinstance(loaded, type) and issubclass(loaded, Payload):
                _decoders.setdefault(entry.name, loaded)


def known() -> list[str]:
    """List the compatibles that have a decoder."""
    _load_entry_points()
    return sorted(_decoders)


def decode(blob: Blob) -> Payload:
    """Decode a blob by its compatible: `Raw` if nobody knows it, `Broken` if its decoder refuses it."""
    _load_entry_points()
    try:
        return _decoders.get(blob.compatible, Raw)(blob)
    except errors.KhoError as error:
        return Broken(blob, error)


def subtree(inc: Incoming, name: str) -> Payload:
    """Decode a subtree of the root. Raises: NotFoundError; FormatError for a malformed node."""
    found = inc.retrieve_subtree(name)
    blob = Blob(inc, _compatible(inc, name, found.phys, found.size), found.phys, found.size, f"subtree {name}")
    return decode(blob)


def _compatible(inc: Incoming, name: str, phys: int, size: int | None) -> str:
    """Find out what a subtree's blob says it is: an FDT's compatible, or the string a packed struct begins with.

    kexec-metadata says nothing and goes by its name.
    """
    _load_entry_points()
    try:
        head = inc.read(phys, 8 if size is None else min(size, 8))
    except errors.OutsideMemoryError:
        return name
    if head.startswith(b"\xd0\x0d\xfe\xed") and size is not None:
        try:
            return Fdt(inc.read(phys, size)).root.str("compatible")
        except errors.KhoError:
            return name
    text = head.split(b"\0")[0]
    if text.decode("ascii", "replace") in _decoders:
        return text.decode("ascii")
    return name
