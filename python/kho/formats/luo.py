"""LUO, the live update orchestrator: sessions, their files, and file-lifecycle-bound data (abi.md section 6)."""

from __future__ import annotations

import builtins
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from .. import errors
from .._kho import Fdt, Memfd, Vmalloc
from .._types import MemfdFolio
from .features import HEADER, LUO_BITS, MEMFD_BITS, Features, is_header
from .registry import Blob, Broken, Owned, Payload, by_content, decode, decoder, has_decoder
from .systemd import MAP_TOKEN, MOST_BYTES, SESSION_NAME, FdStore, Stored

BLOCK = struct.Struct("<QQ")
"""`{ u64 next; u64 count; }` at the head of a luo-v5 block, then the entries."""
SESSION = struct.Struct("<64sQQ")
"""`{ char name[64]; u64 files; u64 count; }`"""
FILE = struct.Struct("<48sQQ")
"""`{ char compatible[48]; u64 data; u64 token; }`"""
FLB = struct.Struct("<48sQQ")
"""`{ char name[48]; u64 data; u64 count; }`"""
SEALS = 0x3F
"""F_SEAL_* bits that there are, up to F_SEAL_EXEC."""


def text(raw: bytes) -> str:
    """Decode a C string in a char array."""
    return raw.split(b"\0")[0].decode("utf-8", "replace")


def title(name: str) -> str:
    """Name a session in a message. Kernels before 7.1.4 take an empty name, and hand it over."""
    return f"session {name}" if name else 'session ""'


class FileEntry(NamedTuple):
    """The entry of a file in its session's list."""

    compatible: str
    data: int
    token: int


@dataclass(frozen=True)
class Flb:
    """File-lifecycle-bound data, shared by the files of one kind."""

    name: str
    data: int
    count: int


@dataclass(frozen=True)
class Session:
    """A session: files that a process preserved together."""

    name: str
    count: int
    """The file count recorded in the session."""
    entries: list[FileEntry] = field(repr=False)
    files: Files
    """Decoded files by token; for a duplicate token, the first one."""
    blocks: list[tuple[int, int]] = field(repr=False)
    """`(phys, nbytes)` of the blocks that list the files."""
    name_bytes: bytes = field(repr=False)
    """The name as it is in memory: the kernel takes bytes that are no UTF-8."""

    @property
    def title(self) -> str:
        """The session in messages: `session vm-1`."""
        return title(self.name)

    @property
    def fd_store(self) -> FdStore:
        """Systemd's map of its descriptor store (261 and later), in token 0 of the session `systemd`.

        Raises: NotFoundError if absent; FormatError if it is too large or not JSON; OutsideMemoryError.
        """
        stored = self.files.get(MAP_TOKEN)
        if self.name != SESSION_NAME or stored is None:
            raise errors.NotFoundError(f"{self.title}: no fd-store map (token 0 of the session systemd)")
        if not isinstance(stored, MemfdFile):
            raise errors.FormatError(f"{stored.blob.owner}: the map is a {stored.compatible!r}, not a memfd")
        if stored.size > MOST_BYTES:
            raise errors.FormatError(f"{stored.blob.owner}: {stored.size} bytes are no map; the limit is {MOST_BYTES}")
        try:
            store = FdStore(stored.read())
        except errors.FormatError as error:
            raise errors.FormatError(f"{stored.blob.owner}: {error}") from error
        store.check(set(self.files), set(self.files.luo.sessions))
        return store


class Files(Mapping[int, Payload]):
    """The files of a session by token, decoded on first access."""

    def __init__(self, luo: Luo, session: str, entries: list[FileEntry]) -> None:
        self.luo = luo
        self._session = session
        self._entries = {entry.token: entry for entry in reversed(entries)}
        self._decoded: dict[int, Payload] = {}

    def __repr__(self) -> str:
        tokens = [f"{token:#x}" for token in islice(self, 8)]
        more = [f"... {len(self)} in all"] if len(self) > len(tokens) else []
        return f"<Files {', '.join(tokens + more)}>" if tokens else "<Files: none>"

    def __getitem__(self, token: int) -> Any:
        """Decode a file."""
        if token not in self._decoded:
            self._decoded[token] = self.decode(self._entries[token])
        return self._decoded[token]

    def decode(self, entry: FileEntry) -> Payload:
        """Decode a listed file, even if its token is not unique; each entry is decoded once."""
        owner = f"{title(self._session)}, file {entry.token:#x}"
        if stored := self.luo.stored(self._session, entry.token):
            owner = f"{owner} ({stored.label})"
        luo = self.luo.blob
        return self.luo.file(Blob(luo.inc, entry.compatible, entry.data, None, owner, luo.budget))

    def stored(self, token: int) -> Stored | None:
        """Find the entry of systemd's store that refers to a file; None if there is none."""
        return self.luo.stored(self._session, token)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the tokens in the order of the session's list."""
        return iter(reversed(self._entries))

    def __len__(self) -> int:
        """Return the number of distinct tokens."""
        return len(self._entries)


class Luo(Payload):
    """Common part of both versions of LUO's subtree."""

    liveupdate_num: int

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        self.sessions: dict[str, Session] = {}
        self.all_sessions: list[Session] = []
        """All sessions, including those with duplicate names."""
        self.flbs: list[Flb] = []
        self.fd_store_error: str | None = None
        """Why the map of systemd's descriptor store cannot be read."""
        self.blocks: list[tuple[str, int, int]] = []
        """`(what, phys, nbytes)` for each piece of memory that contains a list."""
        self._files: dict[tuple[str, str, int], Payload] = {}
        self._data_of: dict[int, str] = {}

    def file(self, blob: Blob) -> Payload:
        """Decode the data of a file, once. A file that refers to the data of another file becomes `Broken`."""
        key = (blob.owner, blob.compatible, blob.phys)
        if key not in self._files:
            first = self._data_of.setdefault(blob.phys, blob.owner) if blob.phys else blob.owner
            if first == blob.owner:
                self._files[key] = decode(blob)
            else:
                why = f"{blob.owner} at {blob.phys:#x}: {first} refers to the same data"
                self._files[key] = Broken(blob, errors.FormatError(why))
        return self._files[key]

    def flb_payload(self, flb: Flb) -> Payload | None:
        """Decode file-lifecycle-bound data; None if no decoder is registered for its name, or it has no address."""
        if not flb.data or not has_decoder(flb.name):
            return None
        return self.file(Blob(self.blob.inc, flb.name, flb.data, None, f"FLB {flb.name}", self.blob.budget))

    def flb_payloads(self) -> Iterator[tuple[Flb, Payload]]:
        """Yield the file-lifecycle-bound data that has a decoder."""
        for flb in self.flbs:
            payload = self.flb_payload(flb)
            if payload is not None:
                yield flb, payload

    @cached_property
    def fd_store(self) -> FdStore | None:
        """The map of systemd's descriptor store; None if there is none or it cannot be read (`fd_store_error`)."""
        session = self.sessions.get(SESSION_NAME)
        if session is None or MAP_TOKEN not in session.files:
            return None
        try:
            return session.fd_store
        except errors.KhoError as error:
            self.fd_store_error = str(error)
            return None

    def stored(self, session: str, token: int) -> Stored | None:
        """Find the entry of systemd's store that refers to a file, or to the session of the file."""
        if session == SESSION_NAME:
            # The map itself has no entry, and is read to find the others.
            return None if token == MAP_TOKEN or self.fd_store is None else self.fd_store.by_token.get(token)
        return None if self.fd_store is None else self.fd_store.by_session.get(session)

    def _add(self, raw: bytes, count: int, entries: list[FileEntry], blocks: list[tuple[int, int]]) -> None:
        name = text(raw)
        session = Session(name, count, entries, Files(self, name, entries), blocks, raw.split(b"\0")[0])
        self.all_sessions.append(session)
        self.sessions.setdefault(name, session)

    def _entries(
        self, layout: struct.Struct, phys: int, count: int, what: str, *, head: int = BLOCK.size, nbytes: int = 0
    ) -> Iterator[tuple[Any, ...]]:
        """Read `count` contiguous entries after `head` bytes at `phys`, in memory of no other list.

        Args: nbytes: size of the list's memory, if larger than its entries.
        """
        self.blob.budget.take_objects(count, f"{self.blob.owner}: {what} at {phys:#x}")
        size = count * layout.size
        try:
            self.blob.budget.take_memory(phys, max(head + size, nbytes), what)
            data = self.blob.inc.read(phys + head, size)
        except errors.MissingMemoryError:
            raise
        except errors.KhoError as error:
            raise self.malformed(f"{what} at {phys:#x}: {count} entries: {error}") from error
        return layout.iter_unpack(data)

    def _aligned(self, phys: int, what: str) -> int:
        """Check that an address is page-aligned, as those of the kernel's page allocator are. Raises: FormatError."""
        if phys % self.blob.inc.page_size:
            error = self.malformed(f"{what} at {phys:#x}: not a multiple of the page size {self.blob.inc.page_size}")
            error.kind, error.phys = "unaligned", phys
            raise error
        return phys

    def _read_flbs(self, phys: int) -> None:
        """Read the FLB list, `{ u64 pgcnt; u64 count; }` and its entries; no-op if the address is 0."""
        if not phys:
            return
        pages, count = BLOCK.unpack(self.blob.inc.read(self._aligned(phys, "FLB list"), BLOCK.size))
        self.blocks.append(("FLB list", phys, pages * self.blob.inc.page_size))
        for name, data, used in self._entries(FLB, phys, count, "FLB list"):
            self.flbs.append(Flb(text(name), data, used))

    @property
    def lists_nothing(self) -> bool:
        """Whether no session and no FLB is listed, as before the jump: the kernel writes the lists when it starts."""
        return not self.all_sessions and not self.flbs

    def describe(self) -> dict[str, Any]:
        """Return sessions, files and FLBs; under `flb_data` the FLBs that have a decoder."""
        decoded = {flb.name: payload.describe() for flb, payload in self.flb_payloads()}
        return {
            "compatible": self.compatible,
            "liveupdate_num": self.liveupdate_num,
            "sessions": [
                {
                    "name": session.name,
                    "count": session.count,
                    "files": [self._row(session, entry) for entry in session.entries],
                }
                for session in self.all_sessions
            ],
            "flbs": [[flb.name, flb.data, flb.count] for flb in self.flbs],
        } | ({"flb_data": decoded} if decoded else {})

    def _row(self, session: Session, entry: FileEntry) -> dict[str, Any]:
        """Describe a file, with unit and FDNAME if it is in systemd's store."""
        payload = session.files.decode(entry)
        row = entry._asdict() | payload.describe()
        if payload.unverified:
            row["unverified"] = list(payload.unverified)
        if stored := self.stored(session.name, entry.token):
            row |= {"unit": stored.unit, "fd": stored.name}
        return row

    def owned(self) -> Iterator[Owned]:
        """Yield the memory of the lists and of every file."""
        for what, phys, nbytes in self.blocks:
            yield Owned("LUO", what, (phys, nbytes))
        for session in self.all_sessions:
            for phys, nbytes in session.blocks:
                yield Owned(session.title, "file block", (phys, nbytes))
            for entry in session.entries:
                yield from session.files.decode(entry).owned()
        for _, payload in self.flb_payloads():
            yield from payload.owned()


@decoder("luo-v5")
class LuoV5(Luo):
    """`struct luo_ser`, packed, 32 bytes (Linux 7.2 and 7.3). Its lists are empty until the kexec starts."""

    LAYOUT = struct.Struct("<8sQQQ")

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        layout = self.layout(blob.compatible)
        _, self.liveupdate_num, sessions, flbs = layout.unpack(blob.read(layout.size))
        self._read_lists(sessions, flbs)

    @staticmethod
    def layout(compatible: str) -> struct.Struct:
        """Return the structure that begins with a compatible: the string is padded to a multiple of 8 bytes."""
        return struct.Struct(f"<{len(compatible.encode()) // 8 * 8 + 8}sQQQ")

    def _read_lists(self, sessions: int, flbs: int) -> None:
        """Read sessions, their files, and FLBs, from the addresses of their first blocks; 0 for none."""
        for name, files, count in self._list(SESSION, sessions, "session block", self.blocks):
            blocks: list[tuple[str, int, int]] = []
            entries = [
                FileEntry(text(compatible), data, token)
                for compatible, data, token in self._list(FILE, files, "file block", blocks)
            ]
            self._add(name, count, entries, [(phys, nbytes) for _, phys, nbytes in blocks])
        self._read_flbs(flbs)

    def _list(
        self, layout: struct.Struct, first: int, what: str, blocks: list[tuple[str, int, int]]
    ) -> Iterator[tuple[Any, ...]]:
        """Walk a chain of blocks of entries; each block is a page and is visited once."""
        page = self.blob.inc.page_size
        phys = first
        while phys:
            following, count = BLOCK.unpack(self.blob.inc.read(self._aligned(phys, what), BLOCK.size))
            if count > (page - BLOCK.size) // layout.size:
                raise self.malformed(f"{what} at {phys:#x}: {count} entries do not fit a page")
            # A block counts as an entry, so that a chain of empty blocks is limited too.
            self.blob.budget.take_objects(1, f"{self.blob.owner}: {what} at {phys:#x}")
            entries = self._entries(layout, phys, count, what, nbytes=page)
            blocks.append((what, phys, page))
            yield from entries
            phys = following


@decoder("luo-v5;block-v1")
class LuoV5Parts(LuoV5):
    """The same in the draft of composite compatibles: the string takes 16 bytes, and the fields after it move by 8."""

    LAYOUT = struct.Struct("<16sQQQ")
    draft = True


FEATURES = "luo-features"
"""The name that kho gives to LUO's structure with a feature header, which has no string."""
by_content("LUO", FEATURES)(is_header)


@decoder("luo-features")
class LuoFeatures(LuoV5):
    """A feature header in place of the version string, then the same fields (a draft)."""

    LAYOUT = struct.Struct(f"<{HEADER.size}sQQQ")
    draft = True

    def __init__(self, blob: Blob) -> None:
        Luo.__init__(self, blob)
        head, number, sessions, flbs = self.LAYOUT.unpack(blob.read(self.LAYOUT.size))
        self.features = _features(self, head, LUO_BITS)
        self.unverified = tuple(self.features.unknown())
        self.liveupdate_num = number if self.features.has("NUMBER") else 0
        used = (self.features.has("SESSIONS"), self.features.has("FLBS"))
        self._read_lists(sessions if used[0] else 0, flbs if used[1] else 0)

    def describe(self) -> dict[str, Any]:
        """Return the features, sessions, files and FLBs."""
        return super().describe() | {"features": self.features.describe()}


def _features(payload: Payload, head: bytes, names: tuple[str, ...]) -> Features:
    """Read the feature header of a payload. Raises: FormatError for one that a reader must refuse."""
    try:
        return Features.of(head, names)
    except ValueError as error:
        raise payload.malformed(str(error)) from error


@decoder("luo-v1")
class LuoV1(Luo):
    """An FDT that leads to arrays (Linux 6.19 to 7.1), which are allocated whole whatever is in them.

    Sessions have 16 pages from boot on, the files of a session 2 from the first one on: LUO_SESSION_PGCNT,
    LUO_FILE_PGCNT (kernel/liveupdate/luo_session.c, luo_file.c). Both may begin on any page.
    """

    SESSION_PAGES = 16
    FILE_PAGES = 2

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        fdt = Fdt(blob.read())
        self.liveupdate_num = fdt.root.u64("liveupdate-number")
        self.has_flb_node = "/luo-flb" in fdt
        """Linux 7.0 and 7.1 write the node even if it is empty, and panic without it; 6.19 has none."""
        if self.has_flb_node:
            self._read_flbs(fdt["/luo-flb"].u64("luo-flb-header"))
        header = fdt["/luo-session"].u64("luo-session-header")
        if not header:
            return
        what = "session array"
        (count,) = struct.unpack("<Q", blob.inc.read(self._aligned(header, what), 8))
        sessions = list(self._entries(SESSION, header, count, what, head=8))
        self.blocks.append((what, header, self._array(header, 8 + count * SESSION.size, self.SESSION_PAGES)))
        for name, files, nr_files in sessions:
            entries = []
            if nr_files:
                listed = self._entries(FILE, self._aligned(files, "file array"), nr_files, "file array", head=0)
                entries = [FileEntry(text(compatible), data, token) for compatible, data, token in listed]
            blocks = [(files, self._array(files, nr_files * FILE.size, self.FILE_PAGES))] if nr_files else []
            self._add(name, nr_files, entries, blocks)

    def _array(self, phys: int, used: int, pages: int) -> int:
        """Say how many bytes an array has: the folios that it was preserved as, at least those that it uses."""
        inc = self.blob.inc
        nbytes = 0
        while nbytes < pages * inc.page_size:
            order = inc.order_at(phys + nbytes)
            if order is None:
                break
            nbytes += inc.page_size << order
        return max(nbytes, used)


class MemfdFile(Payload):
    """A preserved memfd: size, position, seals and contents."""

    VERSION: int

    LAYOUT: struct.Struct

    def __init__(self, blob: Blob, *, in_map: bool = True) -> None:
        super().__init__(blob)
        self.in_map = in_map
        """Whether a map preserves it; without one, each folio reaches to the next one in the list."""
        self.memfd = Memfd(blob.inc, blob.phys, self.VERSION, orders_by_index=not in_map)

    def misfits(self) -> int:
        """Count lists that are not as long as the structure says, and values that no file has."""
        memfd = self.memfd
        wrong = memfd.nr_listed != memfd.nr_folios, memfd.list.total_pages != memfd.list.nr_pages
        return sum((*wrong, memfd.seals > SEALS, memfd.flags != 0, memfd.pos >> 63 != 0, memfd.size >> 63 != 0))

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.memfd.size

    @property
    def pos(self) -> int:
        """File position in bytes."""
        return self.memfd.pos

    @property
    def seals(self) -> int:
        """F_SEAL_* bits; 0 in memfd-v1, which does not record seals."""
        return self.memfd.seals

    @property
    def flags(self) -> int:
        """Flags of `struct memfd_luo_ser`; 0 in memfd-v1."""
        return self.memfd.flags

    @property
    def folios(self) -> builtins.list[MemfdFolio]:
        """The folios of the page cache."""
        return self.memfd.folios

    @property
    def list(self) -> Vmalloc:
        """The vmalloc area that contains the folio list."""
        return self.memfd.list

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy up to `n` bytes from `offset`, by default all; holes read as zeros. Raises: OutsideMemoryError."""
        return self.memfd.read(n, offset)

    def describe(self) -> dict[str, Any]:
        """Return the metadata of the file."""
        return {
            "pos": self.pos,
            "size": self.size,
            "seals": self.seals,
            "flags": self.flags,
            "nr_folios": self.memfd.nr_folios,
            "folios": self.memfd.nr_listed,
        }

    def owned(self) -> Iterator[Owned]:
        """Yield the memory of the structure, the folio list and the folios."""
        yield Owned(self.blob.owner, "memfd header", (self.blob.phys, self.LAYOUT.size))
        yield Owned(self.blob.owner, "folio list", self.memfd.list)
        yield Owned(self.blob.owner, "data", self.memfd)


@decoder("memfd-v2")
class MemfdV2(MemfdFile):
    """memfd-v2: Linux 7.1 and later (mm/memfd_luo.c)."""

    VERSION = 2
    LAYOUT = struct.Struct("<QQIIQ16s")


@decoder("memfd-v2;vmalloc-v1")
class MemfdV2Parts(MemfdV2):
    """The same in the draft of composite compatibles."""

    draft = True


@decoder("memfd")
class MemfdFeatures(MemfdFile):
    """A feature header, then the fields of version 2 (a draft: the entry names no version)."""

    VERSION = 2
    LAYOUT = struct.Struct(f"<{HEADER.size}sQQIIQ16s")
    draft = True

    def __init__(self, blob: Blob) -> None:
        Payload.__init__(self, blob)
        head = blob.read(HEADER.size)
        self.features = _features(self, head, MEMFD_BITS)
        self.unverified = tuple(self.features.unknown())
        if not self.features.has("FOLIOS"):
            raise self.malformed("the feature FOLIOS is not in use, and where else the contents are is not known")
        self.memfd = Memfd(blob.inc, blob.phys + HEADER.size, self.VERSION)

    @property
    def seals(self) -> int:
        """F_SEAL_* bits; 0 if the feature is not in use."""
        return self.memfd.seals if self.features.has("SEALS") else 0

    def describe(self) -> dict[str, Any]:
        """Return the metadata of the file and its features."""
        return super().describe() | {"features": self.features.describe()}


@decoder("memfd-v1")
class MemfdV1(MemfdFile):
    """memfd-v1: Linux 6.19 and 7.0."""

    VERSION = 1
    LAYOUT = struct.Struct("<QQQ16s")
