"""`Payload`, the registry of payload decoders, and the fallbacks `Raw` and `Broken`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

from .. import errors
from .._kho import Fdt, Incoming, Memfd, Vmalloc, split_compatible

if TYPE_CHECKING:
    from ..handover.rules import Finding


SUBTREE = "subtree "
"""How the owner of a subtree's blob begins."""
FDT_MAGIC = b"\xd0\x0d\xfe\xed"
MOST_FDT = 2 << 20
"""Maximum bytes of a devicetree: no kernel boots with a larger one (MAX_FDT_SIZE of arm64)."""


class Owned(NamedTuple):
    """Memory that a payload refers to: a byte range, a vmalloc area or a memfd."""

    owner: str
    """The owner as text: `session vm-1, file 0x10`."""
    what: str
    """The part of the owner: `data`, `folio list`, `block`."""
    memory: tuple[int, int] | Vmalloc | Memfd
    """`(phys, nbytes)`, the blocks of a vmalloc area, or the folios of a memfd."""


class Budget:
    """Limits on what all decoders of one run over a handover may read and allocate in total.

    A malformed image can refer to one list from many places, so a limit per list would not bound the total. The limits
    are proportional to the bytes of the image (`Incoming.room`).
    """

    def __init__(self, inc: Incoming) -> None:
        self._objects = self.most_objects = inc.room("objects")
        self._items = self._most_items = inc.room("items")
        self._fdt_bytes = inc.room("fdt_bytes")
        self.most_fdt = min(self._fdt_bytes, max(MOST_FDT, inc.room("held") // 64))
        """Maximum bytes of one devicetree."""
        self._page = inc.page_size
        self._taken: dict[int, None] = {}
        """Page frame numbers of the pages that contain a list, in the order in which they were recorded."""

    def take_objects(self, count: int, what: str) -> None:
        """Count list entries. Raises: FormatError if the total exceeds what an image of this size can hold."""
        if count > self._objects:
            raise errors.FormatError(
                f"{what}: with these {count} entries the total exceeds {self.most_objects}, more than an image of "
                "this size can plausibly hold"
            )
        self._objects -= count

    def take_items(self, count: int, what: str) -> None:
        """Count records that stay bytes until they are asked for. Raises: FormatError as `take_objects`."""
        if count > self._items:
            raise errors.FormatError(
                f"{what}: with these {count} records the total exceeds {self._most_items}, more than an image of this "
                "size can plausibly hold"
            )
        self._items -= count

    def take_fdt(self, nbytes: int, what: str) -> None:
        """Count bytes of devicetrees. Raises: FormatError as `take_objects`."""
        if nbytes > min(self._fdt_bytes, self.most_fdt):
            raise errors.FormatError(
                f"{what}: a devicetree of {nbytes} bytes: this, or the total of all devicetrees, is more than an image "
                f"of this size can plausibly hold ({self.most_fdt} each)"
            )
        self._fdt_bytes -= nbytes

    def take_memory(self, phys: int, nbytes: int, what: str) -> None:
        """Record the pages of a list. Raises: FormatError if a page belongs to another list already."""
        for page in range(phys // self._page, -(-(phys + nbytes) // self._page)):
            if page in self._taken:
                raise errors.FormatError(
                    f"{what} at {phys:#x}: the page at {page * self._page:#x} belongs to a list already: a cycle, or "
                    "a shared page"
                )
            self._taken[page] = None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Forget the pages recorded in the block if it raises, so that another decoder can read them.

        What was counted stays counted.
        """
        before = len(self._taken)
        try:
            yield
        except BaseException:
            while len(self._taken) > before:
                self._taken.popitem()
            raise


@dataclass(frozen=True)
class Blob:
    """The input of a decoder: an address in a handover, with size and compatible if known."""

    inc: Incoming
    compatible: str
    """The compatible string in the blob; empty if there is none."""
    phys: int
    size: int | None
    """Size in bytes; None if unknown."""
    owner: str
    """The owner as text: `subtree LUO`, `session vm-1, file 0x10`."""
    shared: Budget | None = field(default=None, repr=False, compare=False)
    """Limits shared by the decoders of one run; None for a separate run."""

    @property
    def of_subtree(self) -> bool:
        """Whether it is the blob of a subtree, not the data of a file."""
        return self.owner.startswith(SUBTREE)

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`, by default up to the end of the blob.

        Raises: ParameterError if neither `n` nor the size of the blob is known; FormatError for more bytes than the
            image holds; OutsideMemoryError.
        """
        if n is None:
            if self.size is None:
                raise errors.ParameterError(f"{self.owner} at {self.phys:#x}: its size is not known")
            n = max(self.size - offset, 0)
            check_size(self.inc, n, f"{self.owner} at {self.phys:#x}")
        return self.inc.read(self.phys + offset, n)

    @cached_property
    def budget(self) -> Budget:
        """The limits that apply to this decoder."""
        return self.shared or Budget(self.inc)

    def fdt(self) -> Fdt:
        """Check the size of the blob, then read it as a devicetree.

        Raises: ParameterError if the size is unknown; FormatError for more than an image of this size can hold;
            FdtError; OutsideMemoryError.
        """
        if self.size is None:
            raise errors.ParameterError(f"{self.owner} at {self.phys:#x}: its size is not known")
        return fdt_at(self.inc, self.phys, self.size, f"{self.owner} at {self.phys:#x}", self.budget)


def check_size(inc: Incoming, nbytes: int, what: str) -> None:
    """Check a size before a read. Raises: FormatError if it exceeds the bytes in the files, holes not counted."""
    most = inc.room("held") + MOST_FDT
    if nbytes > most:
        raise errors.FormatError(f"{what}: {nbytes} bytes, but the image holds {most - MOST_FDT}")


def fdt_at(inc: Incoming, phys: int, size: int, what: str, budget: Budget) -> Fdt:
    """Read the devicetree at `phys`, at most `size` and its `totalsize` bytes. Raises: as `Blob.fdt`."""
    head = inc.read(phys, min(size, 8))
    total = int.from_bytes(head[4:8], "big")
    nbytes = min(size, max(total, 40)) if head.startswith(FDT_MAGIC) else min(size, 40)
    budget.take_fdt(nbytes, what)
    return Fdt(inc.read(phys, nbytes))


class Payload:
    """A decoded payload. A subclass reads its blob in `__init__` and raises FormatError if the blob is malformed."""

    draft: ClassVar[bool] = False
    """Whether only a public draft has this format (abi.md section 9)."""
    unverified: tuple[str, ...] = ()
    """Why the blob may not be what it was decoded as: its version, or a part of its compatible, is not known."""

    def __init__(self, blob: Blob) -> None:
        self.blob = blob

    def __repr__(self) -> str:
        size = "" if self.blob.size is None else f", {self.blob.size} bytes"
        return f"<{type(self).__name__} of {self.blob.owner!r} at {self.blob.phys:#x}{size}>"

    @property
    def compatible(self) -> str:
        """The compatible that selected the decoder."""
        return self.blob.compatible

    def describe(self) -> dict[str, Any]:
        """Return the contents as a dict for JSON."""
        return {}

    def owned(self) -> Iterator[Owned]:
        """Yield the memory that the payload refers to, without the blob itself."""
        return iter(())

    def findings(self) -> Iterator[Finding]:
        """Yield findings about the payload."""
        return iter(())

    def misfits(self) -> int:
        """Count what contradicts itself, to choose among the known versions for a blob of a version not known."""
        return 0

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes of the contents from `offset`, by default all; for payloads that are files.

        Raises: FormatError for a payload without contents: it is not a file, has no decoder, or its decoder refused
            it.
        """
        raise errors.FormatError(
            f"{self.blob.owner} at {self.blob.phys:#x}: {self.compatible!r} has no contents known to kho; "
            "`payload.blob.read(n)` reads the memory there"
        )

    def malformed(self, why: str) -> errors.FormatError:
        """Return the error for a malformed blob, with its owner and address."""
        return errors.FormatError(f"{self.blob.owner} at {self.blob.phys:#x}: {why}")


class Raw(Payload):
    """A blob without a registered decoder, shown raw."""

    SHOWN = 64

    def describe(self) -> dict[str, Any]:
        """Return the first bytes in hex."""
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

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Raise the error of the decoder."""
        raise self.error

    def describe(self) -> dict[str, Any]:
        """Return the error as text."""
        return {"error": str(self.error)}


_decoders: dict[str, Callable[[Blob], Payload]] = {}
_Class = TypeVar("_Class", bound=Callable[[Blob], Payload])


def decoder(*compatibles: str) -> Callable[[_Class], _Class]:
    """Register a `Payload` class, or a function that returns a payload, for these compatibles."""

    def register(make: _Class) -> _Class:
        for compatible in compatibles:
            _decoders[compatible] = make
        return make

    return register


def registered_as(kind: type[Payload]) -> list[str]:
    """Return the compatibles that a class is registered for, in the order in which they were."""
    return [compatible for compatible, make in _decoders.items() if make is kind]


@cache
def _load_entry_points() -> None:
    """Import the decoders of other packages; one that fails to load is skipped with a warning."""
    from importlib.metadata import entry_points

    for entry in entry_points(group="kho.decoders"):
        try:
            loaded = entry.load()
        except Exception as error:  # noqa: BLE001 - third-party code; the other decoders must still load
            import warnings

            warnings.warn(f"kho.decoders: {entry.name} ({entry.value}) cannot be loaded: {error}", stacklevel=2)
        else:
            if isinstance(loaded, type) and issubclass(loaded, Payload):
                _decoders.setdefault(entry.name, loaded)


class _Writer(Protocol):
    """What writes payloads of one compatible: a class or a layout, as its module uses it."""

    @property
    def compatible(self) -> str: ...


_writers: dict[str, Any] = {}
_W = TypeVar("_W", bound=_Writer)


def writer(made: _W) -> _W:
    """Register what writes payloads of its `compatible`."""
    _writers[made.compatible] = made
    return made


def writer_for(compatible: str, *, family: str) -> Any:
    """Find what writes payloads of a compatible, drafts included.

    Raises: UnsupportedAbiError, which names what kho writes.
    """
    if compatible in _writers:
        return _writers[compatible]
    names = ", ".join(sorted(name for name in _writers if name.startswith(family)))
    raise errors.UnsupportedAbiError(f"{compatible}: kho cannot write it; it writes {names}")


def writer_of(kind: str, compatible: str | None, whose: str, *, family: str) -> Any:
    """Find what writes the payloads that some kernels read.

    Args:
        kind: the payload, for the message: "LUO".
        compatible: the version of it that these kernels read; None if they have none.
        whose: the kernels, for the message: "the kernels of kho-v1", "Linux 6.18".
        family: what the compatibles of its versions begin with.

    Raises:
        UnsupportedAbiError: kho has no writer for that version.

    """
    if compatible in _writers:
        return _writers[compatible]
    if compatible is None:
        raise errors.UnsupportedAbiError(f"{kind}: there is none in {whose}")
    released = (
        name for name, made in _writers.items() if name.startswith(family) and not getattr(made, "draft", False)
    )
    known = ", ".join(sorted(released))
    raise errors.UnsupportedAbiError(f"{kind}: {whose} read {compatible}, which kho cannot write; it writes {known}")


def known() -> list[str]:
    """Return the compatibles that have a decoder, sorted."""
    _load_entry_points()
    return sorted(_decoders)


def has_decoder(compatible: str) -> bool:
    """Whether a decoder is registered for a compatible."""
    _load_entry_points()
    return compatible in _decoders


def decode(blob: Blob) -> Payload:
    """Decode a blob by its compatible: `Raw` if there is no decoder, `Broken` if the decoder refuses it.

    A version that has no decoder is decoded as the known version of the same payload that fits best, if one does; then
    `Payload.unverified` says what is not known.
    """
    _load_entry_points()
    make = _decoders.get(blob.compatible)
    if make is None:
        return _as_known(blob) or Raw(blob)
    try:
        return make(blob)
    except errors.KhoError as error:
        return Broken(blob, error)


_VERSION = re.compile(r"(.+)-v([0-9]{1,9})")


def _as_known(blob: Blob) -> Payload | None:
    """Decode a blob as each known version of its payload; return the one with fewest misfits, of equals the newest."""
    base, _, doubts = split_compatible(blob.compatible)
    best: Payload | None = None
    least = 0
    for name in _versions_like(base):
        try:
            with blob.budget.attempt():
                payload = _decoders[name](blob)
                misfits = payload.misfits()
        except errors.KhoError:
            continue
        if best is None or misfits < least:
            best, least = payload, misfits
            if name != base:
                payload.unverified = (f"version {base!r} is not known: read as {name}", *doubts)
            else:
                payload.unverified = tuple(doubts) or (f"a combination of parts that no draft has: read as {name}",)
            if not misfits:
                break
    return best


def _versions_like(base: str) -> list[str]:
    """List the decoders for versions of the same payload: the one of this name first, then the newest first."""
    named = _VERSION.fullmatch(base)
    if named is None:
        return [base] if base in _decoders else []
    others = []
    for name in _decoders:
        other = _VERSION.fullmatch(name)
        if other is not None and other[1] == named[1]:
            others.append((name != base, -int(other[2]), name))
    return [name for _, _, name in sorted(others)]


def subtree(inc: Incoming, name: str, budget: Budget | None = None) -> Payload:
    """Decode a subtree of the root. Raises: NotFoundError; FormatError for a malformed node.

    Args: budget: limits shared by everything decoded in one run.
    """
    budget = budget or Budget(inc)
    found = inc.retrieve_subtree(name)
    owner = f"{SUBTREE}{name}"
    blob = Blob(inc, "", found.phys, found.size, owner, budget)
    try:
        blob = replace(blob, compatible=_compatible(blob, name))
    except errors.MissingMemoryError as error:
        return Broken(replace(blob, compatible=name), error)
    return decode(blob)


MOST_NAME = 256
"""Maximum bytes of a compatible at the start of a packed struct, NUL included."""
_content: dict[str, tuple[str, Callable[[bytes], bool]]] = {}


def by_content(name: str, compatible: str) -> Callable[[Callable[[bytes], bool]], Callable[[bytes], bool]]:
    """Register a test that recognizes the blob of the subtree `name` by its first bytes, if it has no compatible."""

    def register(test: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
        _content[name] = (compatible, test)
        return test

    return register


def _compatible(blob: Blob, name: str) -> str:
    """Return the compatible of a subtree's blob: that of an FDT, or the string at the start of a packed struct.

    A string counts if it has a decoder, or if it names a version of a payload that has one. A blob without a string is
    recognized by its content or, as kexec-metadata, by its name.
    """
    _load_entry_points()
    try:
        head = _head(blob)
    except errors.MissingMemoryError:
        raise
    except errors.OutsideMemoryError:
        return name
    if head.startswith(FDT_MAGIC) and blob.size is not None:
        try:
            return blob.fdt().root.str("compatible")
        except errors.MissingMemoryError:
            raise
        except errors.KhoError:
            return name
    text = head.split(b"\0")[0].decode("ascii", "replace")
    if text in _decoders or (len(text) < len(head) and text.isprintable() and _versions_like(text.split(";")[0])):
        return text
    compatible, test = _content.get(name, (name, None))
    return compatible if test is not None and test(head) else name


def _head(blob: Blob) -> bytes:
    """Read the first bytes of a blob, as many as are there of those that can hold a name."""
    size = MOST_NAME if blob.size is None else min(blob.size, MOST_NAME)
    if not blob.inc.has(blob.phys, size):
        size = min(size, 8)
    return blob.inc.read(blob.phys, size)
