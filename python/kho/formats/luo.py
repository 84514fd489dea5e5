"""LUO, the live update orchestrator: sessions, the files in them, and file-lifecycle-bound data (ABI section 6)."""

from __future__ import annotations

import builtins
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import errors
from .._kho import Fdt, Memfd, Vmalloc
from .._types import MemfdFolio
from .registry import Blob, Broken, Owned, Payload, decode, decoder

BLOCK = struct.Struct("<QQ")
"""`{ u64 next; u64 count; }` at the head of a luo-v5 block, then the entries."""
SESSION = struct.Struct("<64sQQ")
"""`{ char name[64]; u64 files; u64 count; }`"""
FILE = struct.Struct("<48sQQ")
"""`{ char compatible[48]; u64 data; u64 token; }`"""
FLB = struct.Struct("<48sQQ")
"""`{ char name[48]; u64 data; u64 count; }`"""


def text(raw: bytes) -> str:
    """Read a C string in an array of chars."""
    return raw.split(b"\0")[0].decode("utf-8", "replace")


class FileEntry(NamedTuple):
    """A file as its session lists it."""

    compatible: str
    data: int
    token: int


@dataclass(frozen=True)
class Flb:
    """File-lifecycle-bound data: what files of one kind share."""

    name: str
    data: int
    count: int


@dataclass(frozen=True)
class Session:
    """A session: the files a process preserved together."""

    name: str
    count: int
    """How many files it says it has."""
    entries: list[FileEntry]
    files: Files
    """Token to decoded file; the first of a token that stands twice."""
    blocks: list[tuple[int, int]]
    """`(phys, nbytes)` of the blocks that list the files."""

    @property
    def fd_store(self) -> Any:
        """Systemd's map of its fd store (v261 and later): the JSON in token 0 of the session `systemd`.

        Raises: NotFoundError without it; FormatError if it is no JSON.
        """
        stored = self.files.get(0)
        if self.name != "systemd" or not isinstance(stored, MemfdFile):
            raise errors.NotFoundError(f"session {self.name}: no fd-store map (token 0 of the session systemd)")
        try:
            return json.loads(stored.read())
        except ValueError as error:
            raise errors.FormatError(f"session {self.name}, file 0x0: no JSON: {error}") from error


class Files(Mapping[int, Payload]):
    """The files of a session by token, each decoded when it is first asked for."""

    def __init__(self, luo: Luo, session: str, entries: list[FileEntry]) -> None:
        self._luo = luo
        self._session = session
        self._entries = {entry.token: entry for entry in reversed(entries)}
        self._decoded: dict[int, Payload] = {}

    def __getitem__(self, token: int) -> Any:
        """Decode a file."""
        if token not in self._decoded:
            self._decoded[token] = self.decode(self._entries[token])
        return self._decoded[token]

    def decode(self, entry: FileEntry) -> Payload:
        """Decode a file that is listed, whether or not its token is unique; each listing once."""
        owner = f"session {self._session}, file {entry.token:#x}"
        luo = self._luo.blob
        return self._luo.file(Blob(luo.inc, entry.compatible, entry.data, None, owner, luo.budget))

    def __iter__(self) -> Iterator[int]:
        """Iterate over the tokens in the order the session lists them."""
        return iter(reversed(self._entries))

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self._entries)


class Luo(Payload):
    """What both versions have."""

    liveupdate_num: int

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        self.sessions: dict[str, Session] = {}
        self.all_sessions: list[Session] = []
        """Every session, those whose name stands twice included."""
        self.flbs: list[Flb] = []
        self.blocks: list[tuple[str, int, int]] = []
        """`(what, phys, nbytes)` of the memory that holds the lists."""
        self._files: dict[tuple[str, str, int], Payload] = {}
        self._data_of: dict[int, str] = {}

    def file(self, blob: Blob) -> Payload:
        """Decode a file's data, once. No two files share it; one that claims another's is `Broken`."""
        key = (blob.owner, blob.compatible, blob.phys)
        if key not in self._files:
            first = self._data_of.setdefault(blob.phys, blob.owner) if blob.phys else blob.owner
            if first == blob.owner:
                self._files[key] = decode(blob)
            else:
                why = f"{blob.owner} at {blob.phys:#x}: its data is that of {first}"
                self._files[key] = Broken(blob, errors.FormatError(why))
        return self._files[key]

    def _add(self, name: str, count: int, entries: list[FileEntry], blocks: list[tuple[int, int]]) -> None:
        session = Session(name, count, entries, Files(self, name, entries), blocks)
        self.all_sessions.append(session)
        self.sessions.setdefault(name, session)

    def _entries(
        self, layout: struct.Struct, phys: int, count: int, what: str, *, head: int = BLOCK.size, nbytes: int = 0
    ) -> Iterator[tuple[Any, ...]]:
        """Read entries that follow one another after `head` bytes at `phys`, in memory that is no other list's.

        Args: nbytes: the memory of the list, if it is more than its entries take.
        """
        self.blob.budget.take_objects(count, f"{self.blob.owner}: {what} at {phys:#x}")
        size = count * layout.size
        try:
            self.blob.budget.take_memory(phys, max(head + size, nbytes), what)
            data = self.blob.inc.read(phys + head, size)
        except errors.KhoError as error:
            raise self.malformed(f"{what} at {phys:#x}: {count} entries: {error}") from error
        return layout.iter_unpack(data)

    def _aligned(self, phys: int, what: str) -> int:
        """Check an address that the kernel got from its page allocator. Raises: FormatError."""
        if phys % self.blob.inc.page_size:
            error = self.malformed(f"{what} at {phys:#x}: not a multiple of the page size {self.blob.inc.page_size}")
            error.kind, error.phys = "unaligned", phys
            raise error
        return phys

    def _read_flbs(self, phys: int) -> None:
        """Read `{ u64 pgcnt; u64 count; }` and the entries after it; nothing where there is no address."""
        if not phys:
            return
        pages, count = BLOCK.unpack(self.blob.inc.read(self._aligned(phys, "FLB list"), BLOCK.size))
        self.blocks.append(("FLB list", phys, pages * self.blob.inc.page_size))
        for name, data, used in self._entries(FLB, phys, count, "FLB list"):
            self.flbs.append(Flb(text(name), data, used))

    def describe(self) -> dict[str, Any]:
        """Give sessions, files and FLBs."""
        return {
            "compatible": self.compatible,
            "liveupdate_num": self.liveupdate_num,
            "sessions": [
                {
                    "name": session.name,
                    "count": session.count,
                    "files": [entry._asdict() | session.files.decode(entry).describe() for entry in session.entries],
                }
                for session in self.all_sessions
            ],
            "flbs": [[flb.name, flb.data, flb.count] for flb in self.flbs],
        }

    def owned(self) -> Iterator[Owned]:
        """Account for the lists, and for every file."""
        for what, phys, nbytes in self.blocks:
            yield Owned("LUO", what, (phys, nbytes))
        for session in self.all_sessions:
            for phys, nbytes in session.blocks:
                yield Owned(f"session {session.name}", "file block", (phys, nbytes))
            for entry in session.entries:
                yield from session.files.decode(entry).owned()


@decoder("luo-v5")
class LuoV5(Luo):
    """`struct luo_ser`, packed, 32 bytes (Linux 7.2 and 7.3). Before the kexec is under way it lists nothing."""

    LAYOUT = struct.Struct("<8sQQQ")

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        _, self.liveupdate_num, sessions, flbs = self.LAYOUT.unpack(blob.read(self.LAYOUT.size))
        for name, files, count in self._list(SESSION, sessions, "session block", self.blocks):
            blocks: list[tuple[str, int, int]] = []
            entries = [
                FileEntry(text(compatible), data, token)
                for compatible, data, token in self._list(FILE, files, "file block", blocks)
            ]
            self._add(text(name), count, entries, [(phys, nbytes) for _, phys, nbytes in blocks])
        self._read_flbs(flbs)

    def _list(
        self, layout: struct.Struct, first: int, what: str, blocks: list[tuple[str, int, int]]
    ) -> Iterator[tuple[Any, ...]]:
        """Follow blocks of entries; each is a page of its own, and visited once."""
        page = self.blob.inc.page_size
        phys = first
        while phys:
            following, count = BLOCK.unpack(self.blob.inc.read(self._aligned(phys, what), BLOCK.size))
            if count > (page - BLOCK.size) // layout.size:
                raise self.malformed(f"{what} at {phys:#x}: {count} entries do not fit a page")
            # A block counts as an entry of its own, or a chain of empty ones would cost nothing.
            self.blob.budget.take_objects(1, f"{self.blob.owner}: {what} at {phys:#x}")
            entries = self._entries(layout, phys, count, what, nbytes=page)
            blocks.append((what, phys, page))
            yield from entries
            phys = following


@decoder("luo-v1")
class LuoV1(Luo):
    """An FDT that points at contiguous arrays (Linux 6.19 to 7.1); from public headers, no capture has it."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        fdt = Fdt(blob.read())
        self.liveupdate_num = fdt.root.u64("liveupdate-number")
        if "/luo-flb" in fdt:
            self._read_flbs(fdt["/luo-flb"].u64("luo-flb-header"))
        header = fdt["/luo-session"].u64("luo-session-header")
        if not header:
            return
        what = "session array"
        (count,) = struct.unpack("<Q", blob.inc.read(self._aligned(header, what), 8))
        sessions = list(self._entries(SESSION, header, count, what, head=8))
        self.blocks.append((what, header, 8 + count * SESSION.size))
        for name, files, nr_files in sessions:
            entries = []
            if nr_files:
                listed = self._entries(FILE, self._aligned(files, "file array"), nr_files, "file array", head=0)
                entries = [FileEntry(text(compatible), data, token) for compatible, data, token in listed]
            self._add(text(name), nr_files, entries, [(files, nr_files * FILE.size)] if nr_files else [])


class MemfdFile(Payload):
    """A preserved memfd: what a file object of its size, seals and position would read."""

    VERSION: int

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        self.memfd = Memfd(blob.inc, blob.phys, self.VERSION)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.memfd.size

    @property
    def pos(self) -> int:
        """The file position."""
        return self.memfd.pos

    @property
    def seals(self) -> int:
        """F_SEAL_* bits; 0 in memfd-v1, which has none."""
        return self.memfd.seals

    @property
    def flags(self) -> int:
        """Flags of the structure; 0 in memfd-v1."""
        return self.memfd.flags

    @property
    def folios(self) -> builtins.list[MemfdFolio]:
        """The folios of the page cache."""
        return self.memfd.folios

    @property
    def list(self) -> Vmalloc:
        """The vmalloc area that lists the folios."""
        return self.memfd.list

    def read(self, n: int | None = None, offset: int = 0) -> bytes:
        """Copy `n` bytes from `offset`, fewer at the end; holes are zeros. Raises: OutsideMemoryError."""
        return self.memfd.read(n, offset)

    def describe(self) -> dict[str, Any]:
        """Give the file's metadata."""
        return {
            "pos": self.pos,
            "size": self.size,
            "seals": self.seals,
            "flags": self.flags,
            "nr_folios": self.memfd.nr_folios,
            "folios": self.memfd.nr_listed,
        }

    def owned(self) -> Iterator[Owned]:
        """Account for the structure, the folio list and the folios."""
        yield Owned(self.blob.owner, "memfd header", (self.blob.phys, 40 if self.VERSION == 1 else 48))
        yield Owned(self.blob.owner, "folio list", self.memfd.list)
        yield Owned(self.blob.owner, "data", self.memfd)


@decoder("memfd-v2")
class MemfdV2(MemfdFile):
    """Linux 7.1 and later (mm/memfd_luo.c)."""

    VERSION = 2


@decoder("memfd-v1")
class MemfdV1(MemfdFile):
    """Linux 6.19 and 7.0."""

    VERSION = 1
