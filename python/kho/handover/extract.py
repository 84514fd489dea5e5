"""Extracts contents from a handover: files of sessions, subtrees, reserve_mem regions, folios.

Contents are streamed in windows; holes are neither read nor written. `Allowance` limits the work that a malformed
image can cause.

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

from .. import errors, formats, jsontext
from .._kho import Incoming, Memfd
from ..formats import Broken, FolioFile, MemfdFile, Payload, PstoreKho, Raw, Region
from ..formats.luo import FileEntry, Session
from .owners import unlisted

__all__ = [
    "Allowance",
    "Content",
    "Item",
    "Saved",
    "content_of",
    "dmesg",
    "file",
    "folio",
    "items",
    "memfd",
    "region",
    "safe_name",
    "save",
    "save_all",
    "sha256_of",
    "stream",
    "subtree",
]

WINDOW = 4 << 20
"""Bytes per read."""
PIECE = 4096
"""Bytes per read where a part of a window is not in the dump."""
PARTIAL = ".partial"
"""End of the name of a file that lacks what is not in the dump."""
_ZEROS = bytes(1 << 20)
PSTORE = "pstore-kho"
"""Name of the subtree with the previous kernel's messages."""
DMESG = "dmesg.txt"
"""Name of these messages as a file."""
_parts = itertools.count()

Progress = Callable[[int], object]
"""Callback that gets the number of bytes processed so far."""


@runtime_checkable
class Readable(Protocol):
    """Protocol of objects with contents: a memfd, a reserve_mem region, a payload with a size."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`."""


@dataclass(frozen=True)
class Content:
    """Contents of `size` bytes; everything outside the ranges `data` is zeros."""

    what: str
    """The owner as text."""
    size: int
    data: Iterable[tuple[int, int]]
    """`(offset, nbytes)` of the data, sorted and disjoint; can be iterated over repeatedly. The rest is holes."""
    read: Callable[[int, int], bytes]
    """`read(n, offset)`."""
    next_to_read: Callable[[int, int], tuple[int, int] | None] | None = None
    """`next_to_read(offset, end)`: the first `(offset, nbytes)` in this range that may contain non-zero bytes, found
    without reading; None if unsupported. An image may claim terabytes that it does not hold."""

    @property
    def data_bytes(self) -> int:
        """Number of bytes that are not in holes."""
        return sum(nbytes for _, nbytes in self.data)

    def present(self) -> Iterator[tuple[int, int]]:
        """Yield the parts of the data that may contain non-zero bytes, as far as known without reading."""
        for start, nbytes in self.data:
            if self.next_to_read is None:
                yield start, nbytes
                continue
            at, end = start, start + nbytes
            while at < end and (found := self.next_to_read(at, end)):
                yield found
                at = sum(found)

    def windows(self) -> Iterator[tuple[int, bytes]]:
        """Yield the data as `(offset, bytes)`, sorted; all other bytes are zeros. Raises: OutsideMemoryError."""
        for start, nbytes in self.present():
            for offset in range(start, start + nbytes, WINDOW):
                yield offset, self.read(min(WINDOW, start + nbytes - offset), offset)

    def readable(self, missing: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """As `windows`, without what is not in the dump: `missing` gets the `(offset, nbytes)` of that."""
        for start, nbytes in self.present():
            for offset in range(start, start + nbytes, WINDOW):
                end = min(offset + WINDOW, start + nbytes)
                try:
                    yield offset, self.read(end - offset, offset)
                except errors.MissingMemoryError:
                    yield from self._pieces(offset, end, missing)

    def _pieces(self, start: int, end: int, missing: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        for offset in range(start, end, PIECE):
            nbytes = min(PIECE, end - offset)
            try:
                yield offset, self.read(nbytes, offset)
            except errors.MissingMemoryError:
                if missing and sum(missing[-1]) == offset:
                    missing[-1] = (missing[-1][0], missing[-1][1] + nbytes)
                else:
                    missing.append((offset, nbytes))


class Allowance:
    """Limits on the contents that are read from one handover.

    In a genuine handover no folio is in two files, so the total of all contents is at most the size of the image. A
    malicious image lists one folio in many files, or files of 2^63 zeros. Use one allowance per run over a handover;
    a run may read each content up to twice.
    """

    ZEROS = 1 << 30

    def __init__(self, inc: Incoming | None = None) -> None:
        self.data = None if inc is None else 2 * inc.room("contents")
        self.zeros = self.ZEROS + (0 if inc is None else 32 * inc.room("held"))
        self.pieces = None if inc is None else 2 * inc.room("items")

    def take_data(self, content: Content) -> None:
        """Count the data of a content. Raises: FormatError if the total exceeds what the image can hold."""
        if self.data is None or self.pieces is None:
            return
        for _, nbytes in content.present():
            self.data -= nbytes
            self.pieces -= 1
            if self.data < 0:
                raise errors.FormatError(
                    f"{content.what}: with it, the total of all contents exceeds the preserved memory"
                )
            if self.pieces < 0:
                raise errors.FormatError(f"{content.what}: has more data ranges than the image can plausibly hold")

    def take_zeros(self, nbytes: int) -> bool:
        """Count zeros to be hashed or written; False if the total exceeds the limit."""
        if nbytes > self.zeros:
            return False
        self.zeros -= nbytes
        return True


def content_of(thing: Memfd | Readable, what: str | None = None) -> Content:
    """Return the contents of a memfd (with its holes) or of any other `Readable`."""
    if isinstance(thing, MemfdFile):
        what, thing = what or thing.blob.owner, thing.memfd
    if isinstance(thing, Memfd):
        memfd = thing
        return Content(what or f"memfd at {memfd.phys:#x}", memfd.size, memfd.data, memfd.read, memfd.next_to_read)
    if isinstance(thing, FolioFile):
        return Content(what or thing.blob.owner, thing.size, thing.parts, thing.read, thing.next_to_read)
    if isinstance(thing, Region):
        return memory_content(thing.inc, what or thing.name, thing.start, thing.size)
    if what is None:
        what = thing.blob.owner if isinstance(thing, Payload) else str(getattr(thing, "name", "contents"))
    return Content(what, thing.size, [(0, thing.size)] if thing.size else [], thing.read)


def memory_content(inc: Incoming, what: str, phys: int, size: int) -> Content:
    """Return `size` bytes of memory at `phys` as contents."""

    def check() -> None:
        if not inc.has(phys, size):
            inc.read(phys, size)  # raises OutsideMemoryError before it allocates a buffer

    def read(n: int, offset: int) -> bytes:
        check()
        return inc.read(phys + offset, n)

    def next_to_read(offset: int, end: int) -> tuple[int, int] | None:
        check()
        found = inc.next_to_read(phys + offset, end - offset)
        return None if found is None else (found[0] - phys, found[1])

    return Content(what, size, [(0, size)] if size else [], read, next_to_read)


class _Digest:
    """SHA-256 of contents with holes; abandoned if the holes exceed the allowance."""

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
        """Hash the hole before `offset`, then the data at `offset`."""
        self.skip_to(offset)
        self._at += len(data)
        if self._hash is not None:
            self._hash.update(data)

    def hexdigest(self) -> str | None:
        """Return the digest, or None if it was abandoned."""
        return None if self._hash is None else str(self._hash.hexdigest())


def sha256_of(thing: Content | Memfd | Readable, *, allowance: Allowance | None = None) -> str | None:
    """Compute the SHA-256 of contents in windows, without reading holes.

    Args: allowance: `Allowance` shared by all calls of one run over an untrusted handover.
    Returns: the hex digest; None if the holes exceed the allowance (1 GiB by default).
    Raises: OutsideMemoryError; FormatError if the contents exceed the preserved memory.
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
    """Result of `save`: a written file."""

    path: Path
    size: int
    data_bytes: int
    """Number of bytes that are not in holes."""
    sha256: str | None
    """Hex digest; None if the holes are too large to hash, or if something is missing."""
    missing: tuple[tuple[int, int], ...] = ()
    """`(offset, nbytes)` of what is not in the dump: holes of the file, whose name ends in `.partial`."""

    @property
    def missing_bytes(self) -> int:
        """Number of bytes that are not in the dump."""
        return sum(nbytes for _, nbytes in self.missing)


def save(
    content: Content,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    allowance: Allowance | None = None,
    partial: bool = False,
) -> Saved:
    """Write contents to a sparse file; the file is renamed to its path when complete.

    Args: force: replace an existing regular file. partial: if a part of the contents is not in the dump, write the
        rest to a file whose name ends in `.partial`, instead of raising MissingMemoryError, which is then raised only
        if nothing is there.
    Raises: SourceError if the file exists or cannot be written; FormatError for a size that no file can have, and as
        `sha256_of`; OutsideMemoryError.
    """
    target = Path(path)
    _check_target(target, force=force)
    allowance = allowance or Allowance()
    allowance.take_data(content)
    digest = _Digest(allowance)
    part = target.with_name(f".kho-{os.getpid()}-{next(_parts)}.part")
    done = 0
    missing: list[tuple[int, int]] = []
    try:
        with part.open("xb") as out:
            out.truncate(content.size)
            for offset, data in content.readable(missing) if partial else content.windows():
                out.seek(offset)
                out.write(data)
                digest.add(offset, data)
                done += len(data)
                if progress:
                    progress(done)
        if missing:
            if not done:
                content.read(min(missing[0][1], PIECE), missing[0][0])  # raises MissingMemoryError
            target = target.with_name(target.name + PARTIAL)
        else:
            digest.skip_to(content.size)
        _check_target(target, force=force)
        part.replace(target)
    except errors.KhoError:
        raise
    except OverflowError as error:
        raise errors.FormatError(f"{content.what}: {content.size} bytes exceed the largest possible file") from error
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EINVAL):
            raise errors.FormatError(
                f"{content.what}: {content.size} bytes exceed the largest file of this file system"
            ) from error
        raise errors.SourceError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return Saved(target, content.size, content.data_bytes, None if missing else digest.hexdigest(), tuple(missing))


def _check_target(target: Path, *, force: bool) -> None:
    if os.path.lexists(target):
        if not force:
            raise errors.SourceError(f"{target}: exists; --force (force=True) replaces it")
        if target.is_symlink() or not target.is_file():
            raise errors.SourceError(f"{target}: not a regular file, so it is not replaced")


def stream(
    content: Content, out: BinaryIO, *, progress: Progress | None = None, allowance: Allowance | None = None
) -> str | None:
    """Write contents to a pipe, holes as zeros, and return the SHA-256.

    Raises: FormatError if the contents, including holes, exceed what a handover of this size can hold; as `save`.
    """
    allowance = allowance or Allowance()
    allowance.take_data(content)
    zeros_left = content.size - sum(nbytes for _, nbytes in content.present())
    if not allowance.take_zeros(zeros_left):
        raise errors.FormatError(
            f"{content.what}: {zeros_left} bytes of holes are too many for a pipe; write it to a file"
        )
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
    """A part of a handover with contents, or with the error why it has none."""

    kind: Literal["subtree", "reserve_mem", "file", "memfd", "folio", "sessions", "pstore"]
    name: str
    """`LUO`, `keepme`, `vm-1/0x10`."""
    phys: int | None
    """Physical address of the blob, region or folio; for a file, of the structure that describes it."""
    size: int | None
    content: Content | None
    error: str | None = None
    """The reason if there are no contents, else None."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further properties for JSON: session, token, compatible, position, seals."""
    cause: errors.KhoError | None = None
    """The exception that is the reason, if there is one."""

    @property
    def absent(self) -> bool:
        """Whether there are no contents because what leads to them is not in the dump."""
        return isinstance(self.cause, errors.MissingMemoryError)

    def contents(self) -> Content:
        """Return the contents. Raises: MissingMemoryError if the dump lacks them; FormatError if there are none."""
        if isinstance(self.cause, errors.MissingMemoryError):
            raise self.cause
        if self.content is None:
            raise errors.FormatError(f"{self.kind} {self.name}: {self.error}")
        return self.content

    def path(self) -> str:
        """Return a relative path for the item that stays inside its directory whatever the name contains."""
        folder = {"subtree": "subtrees", "file": "sessions", "folio": "folios", "memfd": "memfds"}.get(
            self.kind, self.kind
        )
        parts = [self.facts["session"], f"{self.facts['token']:#x}"] if self.kind == "file" else [self.name]
        return "/".join([folder, *map(safe_name, parts)])


def safe_name(name: str) -> str:
    """Convert a name to a file name: characters other than `A-Za-z0-9._+@=-`, and a leading dot, become %XX.

    Names longer than 120 characters are cut and end with a part of their SHA-256.
    """
    raw = name.encode("utf-8", "surrogateescape")
    kept = re.sub(rb"^\.|[^A-Za-z0-9._+@=-]", lambda found: b"%%%02X" % found[0][0], raw).decode() or "%"
    return kept if len(kept) <= 120 else f"{kept[:104]}%{hashlib.sha256(raw).hexdigest()[:15]}"


def subtree(inc: Incoming, name: str) -> Item:
    """Return a subtree's blob. Raises: NotFoundError, which lists all subtrees; FormatError for a malformed node."""
    try:
        found = inc.retrieve_subtree(name)
    except errors.NotFoundError:
        raise errors.NotFoundError(f"subtree {name!r}: not found; there are {_quoted_names(inc.subtrees)}") from None
    if found.size is None:
        try:
            inc.read(found.phys, 1)
        except errors.MissingMemoryError as error:
            return Item("subtree", name, found.phys, None, None, str(error), cause=error)
        except errors.KhoError:
            pass
        return Item("subtree", name, found.phys, None, None, "its size is unknown")
    content = memory_content(inc, f"subtree {name}", found.phys, found.size)
    return Item("subtree", name, found.phys, found.size, content)


def region(inc: Incoming, name: str) -> Item:
    """Return a `reserve_mem=` region. Raises: NotFoundError, which lists all regions; FormatError."""
    regions = inc.reserve_mem
    if name not in regions:
        raise errors.NotFoundError(f"reserve_mem {name!r}: not found; there are {_quoted_names(regions)}")
    found = regions[name]
    return Item("reserve_mem", name, found.start, found.size, content_of(found, f"reserve_mem {name}"))


def dmesg(inc: Incoming) -> Item:
    """Return the previous kernel's last messages: the records of the subtree `pstore-kho`, a public draft.

    Raises: NotFoundError without that subtree; FormatError if no record can be read.
    """
    try:
        payload = formats.subtree(inc, PSTORE)
    except errors.NotFoundError:
        raise errors.NotFoundError(
            f"no kernel messages: no subtree {PSTORE!r}, which only kernels with the draft of pstore's KHO backend "
            f"write; there are {_quoted_names(inc.subtrees)}"
        ) from None
    if not isinstance(payload, PstoreKho):
        raise payload.error if isinstance(payload, Broken) else payload.malformed("it is not decoded")
    return _dmesg(payload)


def _dmesg(payload: PstoreKho) -> Item:
    text = payload.dmesg()
    data = [(0, len(text))] if text else []
    content = Content(DMESG, len(text), data, lambda n, offset: text[offset : offset + n])
    facts = {"draft": True, "records": len(payload.records)}
    return Item("pstore", DMESG, payload.blob.phys, len(text), content, facts=facts)


def folio(inc: Incoming, phys: int) -> Item:
    """Return the preserved folio whose head is at `phys`; of several, the largest. Raises: NotFoundError."""
    order = inc.order_at(phys)
    if order is None:
        raise errors.NotFoundError(f"{phys:#x}: no preserved folio begins there")
    size = inc.page_size << order
    content = memory_content(inc, f"folio at {phys:#x}", phys, size)
    return Item("folio", f"{phys:#x}", phys, size, content, facts={"order": order})


def file(inc: Incoming, session: str, token: int) -> Item:
    """Return a file of a session. Raises: NotFoundError, which lists all sessions or tokens; FormatError."""
    sessions = inc.luo.sessions
    if session not in sessions:
        raise errors.NotFoundError(f"session {session!r}: not found; there are {_quoted_names(sessions)}")
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
    if stored := session.files.stored(entry.token):
        facts |= {"unit": stored.unit, "fd": stored.name}
    name = f"{session.name}/{entry.token:#x}"
    if isinstance(payload, Readable) and type(payload).read is not Payload.read:
        return Item("file", name, entry.data, size, content_of(payload, payload.blob.owner), facts=facts)
    if why is None or isinstance(payload, Raw):
        why = f"{entry.compatible!r} has no contents known to kho"
    cause = payload.error if isinstance(payload, Broken) else None
    return Item("file", name, entry.data, size, None, why, facts, cause)


def memfd(inc: Incoming, phys: int) -> Item:
    """Return the memfd in no session whose structure is at `phys`. Raises: NotFoundError, which lists all of them."""
    found = {file.blob.phys: file for file in unlisted(inc)}
    if phys not in found:
        known = ", ".join(f"{at:#x}" for at in found) or "none"
        raise errors.NotFoundError(f"memfd {phys:#x}: no memfd outside the sessions is there; there are {known}")
    return _memfd(found[phys])


def _memfd(file: MemfdFile) -> Item:
    shown = file.describe()
    size = shown.pop("size")
    facts = {"compatible": file.compatible, "in_map": file.in_map, **shown}
    content = content_of(file, file.blob.owner)
    return Item("memfd", f"{file.blob.phys:#x}", file.blob.phys, size, content, facts=facts)


def _quoted_names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def items(inc: Incoming) -> Iterator[Item]:
    """Yield everything with contents: subtrees, reserve_mem regions, files by session, memfds in no session.

    An item that cannot be read has an error instead of contents.
    """
    for name in inc.subtrees:
        yield subtree(inc, name)
    for name, why in inc.malformed_subtrees.items():
        yield Item("subtree", name, None, None, None, why)
    try:
        for name, found in inc.reserve_mem.items():
            yield Item("reserve_mem", name, found.start, found.size, content_of(found, f"reserve_mem {name}"))
    except errors.KhoError as error:
        yield Item("reserve_mem", "memblock", None, None, None, str(error), cause=error)
    if PSTORE in inc.subtrees:
        try:
            yield dmesg(inc)
        except errors.KhoError as error:
            yield Item("pstore", DMESG, inc.subtrees[PSTORE].phys, None, None, str(error), cause=error)
    sessions: Iterable[Session] = ()
    try:
        sessions = inc.luo.all_sessions
    except errors.NotFoundError:
        pass
    except errors.KhoError as error:
        yield Item("sessions", "LUO", None, None, None, str(error), cause=error)
    for session in sessions:
        for entry in session.entries:
            yield _file(session, entry)
    for memfd_file in unlisted(inc):
        yield _memfd(memfd_file)


def save_all(
    inc: Incoming, folder: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write everything to a directory, with a `manifest.json`, and return the manifest.

    The manifest has one entry per item, in the order of `items`: kind, name, phys, size, path relative to the
    directory, data_bytes, sha256 and further properties. An item that cannot be read has a null path and an error; of
    an item that is partly not in the dump the rest is written, and it has an error, `missing` and a null sha256. The
    other items are written.

    Args: force: write to a directory that is not empty, replacing files.
    Raises: SourceError if the directory is not empty or cannot be written.
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
            raise errors.SourceError(f"{root}: not empty; --force (force=True) writes to it anyway")
        for item in items(inc):
            entry: dict[str, Any] = {"kind": item.kind, "name": item.name, "phys": item.phys, "size": item.size}
            entry |= {"path": None, "data_bytes": None, "sha256": None}
            entry = {**item.facts, **entry}
            entries.append(entry)
            try:
                content = item.contents()
                content_bytes = content.data_bytes
                path = _unused_path(item.path(), taken)
                _folder(root, path)
                saved = save(content, root / path, force=force, progress=told, allowance=allowance, partial=True)
            except errors.MissingMemoryError as error:
                entry["error"] = str(error)
                continue
            except errors.SourceError:
                raise
            except errors.KhoError as error:
                entry["error"] = str(error)
                continue
            entry |= {"path": path, "data_bytes": content_bytes, "sha256": saved.sha256}
            if saved.missing:
                entry["path"] = path + PARTIAL
                entry["missing"] = [list(piece) for piece in saved.missing]
                entry["error"] = f"{saved.missing_bytes} of its {saved.size} bytes are not in the dump"
            done += content_bytes
        manifest = {
            "compatible": inc.compatible,
            "read_as": inc.abi.compatible,
            "unverified": inc.unverified,
            "page_size": inc.page_size,
            "fdt_phys": inc.fdt_phys,
            "entries": entries,
        }
        _check_target(root / "manifest.json", force=force)
        with (root / "manifest.json").open("w") as file:
            file.writelines(jsontext.pieces(manifest))
            file.write("\n")
    except errors.KhoError:
        raise
    except OSError as error:
        raise errors.SourceError(f"{root}: {error.strerror or error}") from error
    return manifest


def _unused_path(path: str, taken: Counter[str]) -> str:
    """Append a number to a path in use: names and tokens can be duplicate, and some file systems ignore case."""
    taken[path.lower()] += 1
    count = taken[path.lower()]
    return path if count == 1 else f"{path}~{count}"  # safe names contain no ~


def _folder(root: Path, path: str) -> None:
    """Create the directories of a path under `root`; symbolic links are not followed."""
    at = root
    for part in path.split("/")[:-1]:
        at /= part
        at.mkdir(exist_ok=True)
        if at.is_symlink():
            raise errors.SourceError(f"{at}: a symbolic link, which is not followed")
