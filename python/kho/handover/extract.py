"""Take contents out of a handover: files of sessions, subtrees, reserve_mem regions, folios.

Everything streams in windows, holes are neither read nor written, and what an image merely claims to hold is bounded by
what it can hold (`Allowance`).

>>> saved = save(file(inc, "vm-1", 0x10).contents(), "vm-1.img")
>>> saved.sha256
'01c29cb64734b83691322c1126f26b591845a6c4044bcc07e96552ad12de09e7'
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

from .. import errors, jsontext
from .._kho import Incoming, Memfd
from ..formats import MemfdFile, Payload, Raw, Region
from ..formats.luo import FileEntry, Session

__all__ = [
    "Allowance",
    "Content",
    "Item",
    "Saved",
    "content_of",
    "file",
    "folio",
    "items",
    "region",
    "safe_name",
    "save",
    "save_all",
    "sha256_of",
    "stream",
    "subtree",
]

WINDOW = 4 << 20
"""Bytes read at a time."""
_ZEROS = bytes(1 << 20)
_parts = itertools.count()

Progress = Callable[[int], object]
"""Called with the number of bytes done so far."""


@runtime_checkable
class Readable(Protocol):
    """What has contents: a memfd, a reserve_mem region, anybody's payload with a size."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`."""


@dataclass(frozen=True)
class Content:
    """Bytes to be read: `size` of them, of which only `data` is more than zeros."""

    what: str
    """Whose they are, for people."""
    size: int
    data: Iterable[tuple[int, int]]
    """`(offset, nbytes)`, by offset, disjoint, to be iterated over any number of times; the rest is holes."""
    read: Callable[[int, int], bytes]
    """`read(n, offset)`."""
    next_to_read: Callable[[int, int], tuple[int, int] | None] | None = None
    """`next_to_read(offset, end)`: the first `(offset, nbytes)` in between that does not read as zeros for certain, if
    that can be told without reading: an image may claim terabytes that it does not hold."""

    @property
    def data_bytes(self) -> int:
        """Bytes that are not holes."""
        return sum(nbytes for _, nbytes in self.data)

    def present(self) -> Iterator[tuple[int, int]]:
        """Give what of the data is more than zeros, as far as that is known without reading it."""
        for start, nbytes in self.data:
            if self.next_to_read is None:
                yield start, nbytes
                continue
            at, end = start, start + nbytes
            while at < end and (found := self.next_to_read(at, end)):
                yield found
                at = sum(found)

    def windows(self) -> Iterator[tuple[int, bytes]]:
        """Read the data, `(offset, bytes)` by offset; what is not given is zeros. Raises: OutsideMemoryError."""
        for start, nbytes in self.present():
            for offset in range(start, start + nbytes, WINDOW):
                yield offset, self.read(min(WINDOW, start + nbytes - offset), offset)


class Allowance:
    """How much a handover can be worth reading.

    Nothing a kernel preserved is in two files, so the contents come to what the image holds; an image made to harm
    lists one folio in many files, or files of 2^63 zeros. One allowance serves one run over a handover, which may read
    each content up to twice.
    """

    ZEROS = 1 << 30

    def __init__(self, inc: Incoming | None = None) -> None:
        self.data = None if inc is None else 2 * inc.room("contents")
        self.zeros = self.ZEROS + (0 if inc is None else 32 * inc.room("held"))
        self.pieces = None if inc is None else 2 * inc.room("items")

    def take_data(self, content: Content) -> None:
        """Use up what the contents hold. Raises: FormatError once that is more than there can be."""
        if self.data is None or self.pieces is None:
            return
        for _, nbytes in content.present():
            self.data -= nbytes
            self.pieces -= 1
            if self.data < 0:
                raise errors.FormatError(f"{content.what}: with it, contents are more than is preserved")
            if self.pieces < 0:
                raise errors.FormatError(f"{content.what}: in more pieces than the image can plausibly hold")

    def take_zeros(self, nbytes: int) -> bool:
        """Use up zeros to be hashed or written out; False once there are more than that is worth."""
        if nbytes > self.zeros:
            return False
        self.zeros -= nbytes
        return True


def content_of(thing: Memfd | Readable, what: str | None = None) -> Content:
    """Give the contents of a memfd (with its holes) or of whatever has a size and can be read."""
    if isinstance(thing, MemfdFile):
        what, thing = what or thing.blob.owner, thing.memfd
    if isinstance(thing, Memfd):
        memfd = thing
        return Content(what or f"memfd at {memfd.phys:#x}", memfd.size, memfd.data, memfd.read, memfd.next_to_read)
    if isinstance(thing, Region):
        return memory_content(thing.inc, what or thing.name, thing.start, thing.size)
    if what is None:
        what = thing.blob.owner if isinstance(thing, Payload) else str(getattr(thing, "name", "contents"))
    return Content(what, thing.size, [(0, thing.size)] if thing.size else [], thing.read)


def memory_content(inc: Incoming, what: str, phys: int, size: int) -> Content:
    """Give `size` bytes of memory at `phys` as contents."""

    def check() -> None:
        if not inc.has(phys, size):
            inc.read(phys, size)  # raises OutsideMemoryError before it allocates anything

    def read(n: int, offset: int) -> bytes:
        check()
        return inc.read(phys + offset, n)

    def next_to_read(offset: int, end: int) -> tuple[int, int] | None:
        check()
        found = inc.next_to_read(phys + offset, end - offset)
        return None if found is None else (found[0] - phys, found[1])

    return Content(what, size, [(0, size)] if size else [], read, next_to_read)


class _Digest:
    """A sha256 that is given up when holes are more than they are worth."""

    def __init__(self, allowance: Allowance) -> None:
        self._hash: Any = hashlib.sha256()
        self._allowance = allowance
        self._at = 0

    def skip_to(self, offset: int) -> None:
        """Hash a hole without reading it."""
        left, self._at = offset - self._at, offset
        if self._hash is None or not self._allowance.take_zeros(left):
            self._hash = None
            return
        while left:
            taken = min(left, len(_ZEROS))
            self._hash.update(_ZEROS if taken == len(_ZEROS) else _ZEROS[:taken])
            left -= taken

    def add(self, offset: int, data: bytes) -> None:
        """Hash data at `offset`, after the hole before it."""
        self.skip_to(offset)
        self._at += len(data)
        if self._hash is not None:
            self._hash.update(data)

    def hexdigest(self) -> str | None:
        """Give the digest, or None if it was given up."""
        return None if self._hash is None else str(self._hash.hexdigest())


def sha256_of(thing: Content | Memfd | Readable, *, allowance: Allowance | None = None) -> str | None:
    """Hash contents in windows, holes without reading them.

    Args: allowance: shared by the calls of one run over a handover that is not trusted; see `Allowance`.
    Returns: the hex digest; None if holes are more than the allowance (1 GiB by default).
    Raises: OutsideMemoryError; FormatError for contents beyond what is preserved.
    """
    content = thing if isinstance(thing, Content) else content_of(thing)
    allowance = allowance or Allowance()
    allowance.take_data(content)
    digest = _Digest(allowance)
    for offset, data in content.windows():
        digest.add(offset, data)
    digest.skip_to(content.size)
    return digest.hexdigest()


@dataclass(frozen=True)
class Saved:
    """A file that was written."""

    path: Path
    size: int
    data_bytes: int
    """Bytes that are no holes."""
    sha256: str | None
    """None if holes are more than it is worth hashing."""


def save(
    content: Content,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    allowance: Allowance | None = None,
) -> Saved:
    """Write contents to a file, sparse; it appears under its name when it is whole.

    Args: force: replace a regular file that is there.
    Raises: SourceError if the file is there or cannot be written; FormatError for a size no file has, and as
        `sha256_of`; OutsideMemoryError.
    """
    target = Path(path)
    _refuse(target, force=force)
    allowance = allowance or Allowance()
    allowance.take_data(content)
    digest = _Digest(allowance)
    part = target.with_name(f".kho-{os.getpid()}-{next(_parts)}.part")
    done = 0
    try:
        with part.open("xb") as out:
            out.truncate(content.size)
            for offset, data in content.windows():
                out.seek(offset)
                out.write(data)
                digest.add(offset, data)
                done += len(data)
                if progress:
                    progress(done)
        digest.skip_to(content.size)
        _refuse(target, force=force)
        part.replace(target)
    except errors.KhoError:
        raise
    except OverflowError as error:
        raise errors.FormatError(f"{content.what}: {content.size} bytes: no file can be as large") from error
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EINVAL):
            raise errors.FormatError(f"{content.what}: {content.size} bytes: no file here can be as large") from error
        raise errors.SourceError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return Saved(target, content.size, content.data_bytes, digest.hexdigest())


def _refuse(target: Path, *, force: bool) -> None:
    if os.path.lexists(target):
        if not force:
            raise errors.SourceError(f"{target}: is there already")
        if target.is_symlink() or not target.is_file():
            raise errors.SourceError(f"{target}: is no regular file, and is not replaced")


def stream(
    content: Content, out: BinaryIO, *, progress: Progress | None = None, allowance: Allowance | None = None
) -> str | None:
    """Write contents to a pipe, holes as zeros; the sha256.

    Raises: FormatError for contents, holes included, beyond what a handover of this size can hold; as `save`.
    """
    allowance = allowance or Allowance()
    allowance.take_data(content)
    zeros_left = content.size - sum(nbytes for _, nbytes in content.present())
    if not allowance.take_zeros(zeros_left):
        raise errors.FormatError(f"{content.what}: {zeros_left} bytes of holes; write it to a file")
    digest = hashlib.sha256()
    at = 0

    def put(data: bytes) -> None:
        nonlocal at
        out.write(data)
        digest.update(data)
        at += len(data)
        if progress:
            progress(at)

    def zeros(upto: int) -> None:
        while at < upto:
            put(_ZEROS[: min(len(_ZEROS), upto - at)])

    for offset, data in content.windows():
        zeros(offset)
        put(data)
    zeros(content.size)
    return digest.hexdigest()


@dataclass(frozen=True)
class Item:
    """Something in a handover that has contents, or should have."""

    kind: Literal["subtree", "reserve_mem", "file", "folio", "sessions"]
    name: str
    """`LUO`, `keepme`, `vm-1/0x10`."""
    phys: int | None
    """Where it lies: the blob, the region, the folio; of a file, the structure that describes it."""
    size: int | None
    content: Content | None
    error: str | None = None
    """Why there are no contents."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More of it, as data: session, token, compatible, position, seals."""

    def contents(self) -> Content:
        """Give the contents. Raises: FormatError without any."""
        if self.content is None:
            raise errors.FormatError(f"{self.kind} {self.name}: {self.error}")
        return self.content

    def path(self) -> str:
        """Give a relative path to store it under that nothing in the name can lead astray."""
        folder = {"subtree": "subtrees", "file": "sessions", "folio": "folios"}.get(self.kind, self.kind)
        parts = [self.facts["session"], f"{self.facts['token']:#x}"] if self.kind == "file" else [self.name]
        return "/".join([folder, *map(safe_name, parts)])


def safe_name(name: str) -> str:
    """Make any name one of a file: other characters than `A-Za-z0-9._+@=-` become %XX, so does a leading dot.

    Names longer than 120 characters end in a part of their digest.
    """
    raw = name.encode("utf-8", "surrogateescape")
    kept = re.sub(rb"^\.|[^A-Za-z0-9._+@=-]", lambda found: b"%%%02X" % found[0][0], raw).decode() or "%"
    return kept if len(kept) <= 120 else f"{kept[:104]}%{hashlib.sha256(raw).hexdigest()[:15]}"


def subtree(inc: Incoming, name: str) -> Item:
    """Find a subtree's blob. Raises: NotFoundError naming those there are; FormatError for a malformed node."""
    try:
        found = inc.retrieve_subtree(name)
    except errors.NotFoundError:
        raise errors.NotFoundError(f"subtree {name!r}: not there; there are {_listed(inc.subtrees)}") from None
    if found.size is None:
        return Item("subtree", name, found.phys, None, None, "its size is not known")
    content = memory_content(inc, f"subtree {name}", found.phys, found.size)
    return Item("subtree", name, found.phys, found.size, content)


def region(inc: Incoming, name: str) -> Item:
    """Find a `reserve_mem=` region. Raises: NotFoundError naming those there are; FormatError."""
    regions = inc.reserve_mem
    if name not in regions:
        raise errors.NotFoundError(f"reserve_mem {name!r}: not there; there are {_listed(regions)}")
    found = regions[name]
    return Item("reserve_mem", name, found.start, found.size, content_of(found, f"reserve_mem {name}"))


def folio(inc: Incoming, phys: int) -> Item:
    """Find the preserved folio whose head is at `phys`; of several, the largest. Raises: NotFoundError."""
    order = inc.order_at(phys)
    if order is None:
        raise errors.NotFoundError(f"{phys:#x}: no preserved folio begins there")
    size = inc.page_size << order
    content = memory_content(inc, f"folio at {phys:#x}", phys, size)
    return Item("folio", f"{phys:#x}", phys, size, content, facts={"order": order})


def file(inc: Incoming, session: str, token: int) -> Item:
    """Find a session's file. Raises: NotFoundError naming what there is; FormatError."""
    sessions = inc.luo.sessions
    if session not in sessions:
        raise errors.NotFoundError(f"session {session!r}: not there; there are {_listed(sessions)}")
    found = sessions[session]
    for entry in found.entries:
        if entry.token == token:
            return _file(found, entry)
    tokens = ", ".join(f"{entry.token:#x}" for entry in found.entries) or "none"
    raise errors.NotFoundError(f"session {session!r}: no token {token:#x}; there are {tokens}")


def _file(session: Session, entry: FileEntry) -> Item:
    payload = session.files.decode(entry)
    shown = payload.describe()
    why = shown.pop("error", None)
    size = shown.pop("size", None)
    facts = {"session": session.name, "token": entry.token, "compatible": entry.compatible, **shown}
    name = f"{session.name}/{entry.token:#x}"
    if isinstance(payload, Readable) and type(payload).read is not Payload.read:
        return Item("file", name, entry.data, size, content_of(payload, payload.blob.owner), facts=facts)
    if why is None or isinstance(payload, Raw):
        why = f"{entry.compatible!r} has no contents that kho knows of"
    return Item("file", name, entry.data, size, None, why, facts)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def items(inc: Incoming) -> Iterator[Item]:
    """Find all that has contents: subtrees, reserve_mem regions, and files in the order sessions list them.

    What is there and cannot be read has an error instead of contents.
    """
    for name in inc.subtrees:
        yield subtree(inc, name)
    for name, why in inc.malformed_subtrees.items():
        yield Item("subtree", name, None, None, None, why)
    try:
        for name, found in inc.reserve_mem.items():
            yield Item("reserve_mem", name, found.start, found.size, content_of(found, f"reserve_mem {name}"))
    except errors.KhoError as error:
        yield Item("reserve_mem", "memblock", None, None, None, str(error))
    try:
        luo = inc.luo
    except errors.NotFoundError:
        return
    except errors.KhoError as error:
        yield Item("sessions", "LUO", None, None, None, str(error))
        return
    for session in luo.all_sessions:
        for entry in session.entries:
            yield _file(session, entry)


def save_all(
    inc: Incoming, folder: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write everything under a directory, with a `manifest.json`; the manifest.

    One entry per item, in the order of `items`: kind, name, phys, size, path under the directory, data_bytes, sha256,
    and what more is known. An item that cannot be read has a null path and an error; the rest is written.

    Args: force: write into a directory that holds something, replacing files.
    Raises: SourceError if the directory holds something or cannot be written.
    """
    root = Path(folder)
    allowance = Allowance(inc)
    entries: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    done = 0

    def told(nbytes: int) -> None:
        if progress:
            progress(done + nbytes)

    try:
        root.mkdir(parents=True, exist_ok=True)
        if not force and any(root.iterdir()):
            raise errors.SourceError(f"{root}: is not empty")
        for item in items(inc):
            entry: dict[str, Any] = {"kind": item.kind, "name": item.name, "phys": item.phys, "size": item.size}
            entry |= {"path": None, "data_bytes": None, "sha256": None}
            entry = {**item.facts, **entry}
            entries.append(entry)
            try:
                content = item.contents()
                content_bytes = content.data_bytes
                path = _untaken(item.path(), taken)
                _folder(root, path)
                saved = save(content, root / path, force=force, progress=told, allowance=allowance)
            except errors.SourceError:
                raise
            except errors.KhoError as error:
                entry["error"] = str(error)
                continue
            entry |= {"path": path, "data_bytes": content_bytes, "sha256": saved.sha256}
            done += content_bytes
        manifest = {
            "compatible": inc.compatible,
            "page_size": inc.page_size,
            "fdt_phys": inc.fdt_phys,
            "entries": entries,
        }
        _refuse(root / "manifest.json", force=force)
        with (root / "manifest.json").open("w") as file:
            file.writelines(jsontext.pieces(manifest))
            file.write("\n")
    except errors.KhoError:
        raise
    except OSError as error:
        raise errors.SourceError(f"{root}: {error.strerror or error}") from error
    return manifest


def _untaken(path: str, taken: Counter[str]) -> str:
    """Number a path that stands already: names and tokens can occur twice, and some file systems ignore case."""
    taken[path.lower()] += 1
    count = taken[path.lower()]
    return path if count == 1 else f"{path}~{count}"  # no safe name has a ~


def _folder(root: Path, path: str) -> None:
    """Make the directories of a path under `root`; a symbolic link on the way is not followed."""
    at = root
    for part in path.split("/")[:-1]:
        at /= part
        at.mkdir(exist_ok=True)
        if at.is_symlink():
            raise errors.SourceError(f"{at}: is a symbolic link, and is not followed")
