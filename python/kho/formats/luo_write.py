"""Writer of LUO data: sessions, files and FLBs, laid out as in the kernel (kernel/liveupdate/luo_*.c).

Pages are allocated in the kernel's order: the pages of LUO and of the FLBs first, a session's block with the session,
its file block with its first file. The arrays of luo-v1 may be placed on any page. `seal` writes the addresses of the
lists and the counts, `unseal` clears them: in the kernel too, the lists are empty until the kexec starts.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import _kho
from ..errors import ExistsError, NotFoundError, ParameterError
from .features import LUO_BITS, Features
from .kernel_write import Holding
from .luo import BLOCK, FILE, FLB, SESSION, FileEntry, Flb, LuoFeatures, LuoV1, LuoV5, LuoV5Parts
from .registry import writer, writer_for, writer_of

__all__ = ["LuoOut", "LuoV1Out", "LuoV5Out"]


@dataclass
class OutFile:
    """An added file and the memory that its payload holds."""

    entry: FileEntry
    holding: Holding | None


@dataclass
class OutSession:
    """An added session."""

    name: str
    files: dict[int, OutFile] = field(default_factory=dict)
    blocks: list[Holding] = field(default_factory=list)
    """Memory of its file entries: one page per block in luo-v5, one array in luo-v1."""
    at: list[int] = field(default_factory=list)
    """Physical addresses of that memory."""


def text(what: str, value: str, size: int, *, empty: bool = False) -> bytes:
    """Encode a C string for an array of `size` chars, including the NUL; surrogates are bytes that are no UTF-8.

    Raises: ParameterError.
    """
    try:
        raw = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ParameterError(f"{what} {value!r}: {error}") from error
    if not (raw or empty) or len(raw) >= size or b"\0" in raw:
        raise ParameterError(f"{what} {value!r}: must be {0 if empty else 1} to {size - 1} bytes")
    return raw


def word(what: str, value: int) -> int:
    """Check that a value fits 64 bits, and return it. Raises: ParameterError."""
    if not 0 <= value < 1 << 64:
        raise ParameterError(f"{what} {value}: does not fit 64 bits")
    return value


class LuoOut(ABC):
    """Common part of all versions: sessions, files and FLBs by name."""

    compatible: str
    draft = False
    """Whether only a public draft has this version; it is written only if asked for by name."""
    memfd: str | None = None
    """The compatible of the memfds in its sessions, if not that of the handover's ABI."""

    def __init__(self, hold: Callable[[], Holding], liveupdate_num: int, *, flb_node: bool = True) -> None:
        self._hold = hold
        self._flb_node = flb_node
        self.liveupdate_num = word("liveupdate_num", liveupdate_num)
        self.sessions: dict[str, OutSession] = {}
        self.flbs: dict[str, Flb] = {}
        with hold() as own:
            self._own = own
            self.page_size = own.page_size
            self._arena = own.arena
            self._set_up()

    # Implemented by each version

    phys: int
    """Physical address of the subtree's blob."""
    size: int
    """Size of the blob in bytes."""

    @abstractmethod
    def _set_up(self) -> None: ...

    @abstractmethod
    def _room_for_sessions(self, n: int) -> None: ...

    @abstractmethod
    def _room_for_files(self, session: OutSession, n: int) -> None: ...

    @abstractmethod
    def seal(self) -> None:
        """Write all lists, then the addresses that point to them."""

    @abstractmethod
    def unseal(self) -> None:
        """Clear the addresses that point to the lists."""

    # Common to all versions

    def add_session(self, name: str, *, empty: bool = False) -> OutSession:
        """Add a session without files. Raises: ExistsError; ParameterError for a name of more than 63 bytes.

        Args: empty: accept an empty name.
        """
        text("session name", name, 64, empty=empty)
        if name in self.sessions:
            raise ExistsError(f"session {name!r} exists")
        self._room_for_sessions(len(self.sessions) + 1)
        made = self.sessions[name] = OutSession(name)
        return made

    def session(self, name: str) -> OutSession:
        """Return a session. Raises: NotFoundError."""
        try:
            return self.sessions[name]
        except KeyError:
            raise NotFoundError(f"no session {name!r}") from None

    def add_file(self, name: str, token: int, compatible: str, write: Callable[[], tuple[int, Holding | None]]) -> int:
        """Add a file to a session and return its `data`; the session is created if it does not exist.

        Args: write: called after the entry has room; writes the payload and returns its address and memory.
        Raises: ExistsError for a duplicate token; ParameterError.
        """
        text("compatible", compatible, 48)
        word("token", token)
        new = name not in self.sessions
        session = self.add_session(name) if new else self.sessions[name]
        try:
            if token in session.files:
                raise ExistsError(f"session {name!r} has a file {token:#x} already")
            self._room_for_files(session, len(session.files) + 1)
            data, holding = write()
            session.files[token] = OutFile(FileEntry(compatible, word("data", data), token), holding)
        except BaseException:
            if new:
                self.remove_session(name)
            else:
                self._room_for_files(session, len(session.files))
            raise
        return data

    def remove_file(self, name: str, token: int) -> None:
        """Remove a file and release its memory. Raises: NotFoundError, FinalizedError."""
        session = self.session(name)
        if token not in session.files:
            raise NotFoundError(f"session {name!r} has no file {token:#x}")
        holding = session.files[token].holding
        if holding is not None:
            holding.release()
        del session.files[token]
        self._room_for_files(session, len(session.files))

    def remove_session(self, name: str) -> None:
        """Remove a session and its files. Raises: as `remove_file`."""
        session = self.session(name)
        for token in list(session.files):
            self.remove_file(name, token)
        self._room_for_files(session, 0)
        del self.sessions[name]
        self._room_for_sessions(len(self.sessions))

    def add_flb(self, name: str, data: int, count: int) -> None:
        """Add file-lifecycle-bound data. Raises: ExistsError; ParameterError if there is no room, or no list at all."""
        text("FLB name", name, 48)
        if not self._flb_node:
            raise ParameterError(
                f"FLB {name!r}: the kernel that this is written for has no FLBs; Linux 7.0 and later have"
            )
        if name in self.flbs:
            raise ExistsError(f"FLB {name!r} exists")
        most = (self.page_size - BLOCK.size) // FLB.size
        if len(self.flbs) == most:
            raise ParameterError(f"FLB {name!r}: the FLB page is full: it holds {most}")
        self.flbs[name] = Flb(name, word("data", data), word("count", count))

    def remove_flb(self, name: str) -> None:
        """Remove file-lifecycle-bound data. Raises: NotFoundError."""
        if self.flbs.pop(name, None) is None:
            raise NotFoundError(f"no FLB {name!r}")

    def holdings(self) -> Iterator[Holding]:
        """Yield all memory that is held."""
        for session in self.sessions.values():
            yield from (file.holding for file in session.files.values() if file.holding is not None)
            yield from session.blocks
        yield self._own

    def release(self) -> None:
        """Release all memory. Raises: FinalizedError."""
        for name in list(self.sessions):
            self.remove_session(name)
        self._own.release()

    def _write(self, phys: int, header: bytes, entries: Sequence[bytes], room: int) -> None:
        self._arena.write(phys, (header + b"".join(entries)).ljust(room, b"\0"))

    def _session_entry(self, session: OutSession) -> bytes:
        files = session.at[0] if session.files else 0
        return SESSION.pack(text("session name", session.name, 64, empty=True), files, len(session.files))

    def _file_entries(self, session: OutSession) -> list[bytes]:
        entries = (file.entry for file in session.files.values())
        return [FILE.pack(entry.compatible.encode(), entry.data, entry.token) for entry in entries]

    def _write_flbs(self, phys: int) -> None:
        entries = [FLB.pack(flb.name.encode(), flb.data, flb.count) for flb in self.flbs.values()]
        self._write(phys, BLOCK.pack(1, len(entries)), entries, self.page_size)


@writer
class LuoV5Out(LuoOut):
    """A packed struct that points to chains of blocks of one page each."""

    compatible = "luo-v5"
    LAYOUT = LuoV5.LAYOUT
    size = LAYOUT.size

    def _set_up(self) -> None:
        self.phys = self._own.page().phys
        self._flbs = self._own.page().phys
        self._blocks: list[Holding] = []
        self._at: list[int] = []
        self.unseal()

    def _room_for_sessions(self, n: int) -> None:
        self._room(self._blocks, self._at, SESSION, n)

    def _room_for_files(self, session: OutSession, n: int) -> None:
        self._room(session.blocks, session.at, FILE, n)

    def _most(self, layout: struct.Struct) -> int:
        return (self.page_size - BLOCK.size) // layout.size

    def _room(self, blocks: list[Holding], at: list[int], layout: struct.Struct, n: int) -> None:
        """Allocate blocks until `n` entries fit."""
        wanted = -(-n // self._most(layout))
        while len(blocks) > wanted:
            blocks[-1].release()
            blocks.pop()
            at.pop()
        while len(blocks) < wanted:
            with self._hold() as hold:
                at.append(hold.page().phys)
                blocks.append(hold)

    def _list(self, at: list[int], layout: struct.Struct, entries: list[bytes]) -> int:
        """Write entries into their blocks and return the address of the first block, 0 if there is none."""
        most = self._most(layout)
        for i, phys in enumerate(at):
            part = entries[i * most : (i + 1) * most]
            following = at[i + 1] if i + 1 < len(at) else 0
            self._write(phys, BLOCK.pack(following, len(part)), part, self.page_size)
        return at[0] if at else 0

    def seal(self) -> None:
        """Write every list, then the addresses of the first blocks."""
        for session in self.sessions.values():
            self._list(session.at, FILE, self._file_entries(session))
        sessions = self._list(self._at, SESSION, [self._session_entry(s) for s in self.sessions.values()])
        self._write_flbs(self._flbs)
        self._write_head(sessions, self._flbs)

    def unseal(self) -> None:
        """Set the addresses of the first blocks to 0."""
        self._write_head(0, 0)

    def _write_head(self, sessions: int, flbs: int) -> None:
        self._arena.write(self.phys, self.LAYOUT.pack(self._first(), self.liveupdate_num, sessions, flbs))

    def _first(self) -> bytes:
        """Return what the structure begins with."""
        return self.compatible.encode()

    def holdings(self) -> Iterator[Holding]:
        """Yield all memory that is held."""
        yield from self._blocks
        yield from super().holdings()


@writer
class LuoV5PartsOut(LuoV5Out):
    """The same with the longer string of the draft of composite compatibles."""

    compatible = "luo-v5;block-v1"
    LAYOUT = LuoV5Parts.LAYOUT
    size = LAYOUT.size
    draft = True


@writer
class LuoFeaturesOut(LuoV5Out):
    """The same with a feature header in place of the string (a draft)."""

    compatible = "luo-features"
    LAYOUT = LuoFeatures.LAYOUT
    size = LAYOUT.size
    draft = True
    memfd = "memfd"
    features = Features.all_of(LUO_BITS)

    def _first(self) -> bytes:
        return self.features.pack()


@writer
class LuoV1Out(LuoOut):
    """An FDT that points to contiguous arrays of fixed size."""

    compatible = "luo-v1"
    SESSION_PAGES = LuoV1.SESSION_PAGES
    FILE_PAGES = LuoV1.FILE_PAGES
    COUNT = struct.Struct("<Q")

    def _set_up(self) -> None:
        self.phys = self._own.page().phys
        self._sessions = self._own.array(self.SESSION_PAGES)
        self._flbs = self._own.page().phys if self._flb_node else None
        w = _kho.FdtWriter(self.page_size)
        with w.node():
            w.property_str("compatible", self.compatible)
            w.property_u64("liveupdate-number", self.liveupdate_num)
            with w.node("luo-session"):
                w.property_str("compatible", "luo-session-v2")
                w.property_u64("luo-session-header", self._sessions)
            if self._flbs is not None:
                with w.node("luo-flb"):
                    w.property_str("compatible", "luo-flb-v1")
                    w.property_u64("luo-flb-header", self._flbs)
        blob = w.finish()
        self.size = len(blob)
        self._arena.write(self.phys, blob)
        self.unseal()

    def _room_for_sessions(self, n: int) -> None:
        most = (self.page_size * self.SESSION_PAGES - self.COUNT.size) // SESSION.size
        if n > most:
            raise ParameterError(f"{n} sessions: the array of {self.compatible} holds {most}")

    def _room_for_files(self, session: OutSession, n: int) -> None:
        most = self.page_size * self.FILE_PAGES // FILE.size
        if n > most:
            raise ParameterError(f"session {session.name!r}: {n} files, the array of {self.compatible} holds {most}")
        if n and not session.blocks:
            with self._hold() as hold:
                session.at.append(hold.array(self.FILE_PAGES))
                session.blocks.append(hold)
        if not n and session.blocks:
            session.blocks[0].release()
            session.blocks.clear()
            session.at.clear()

    def seal(self) -> None:
        """Write all arrays, then their counts."""
        for session in self.sessions.values():
            if session.files:
                self._write(session.at[0], b"", self._file_entries(session), self.page_size * self.FILE_PAGES)
        entries = [self._session_entry(session) for session in self.sessions.values()]
        room = self.page_size * self.SESSION_PAGES
        self._write(self._sessions, self.COUNT.pack(len(entries)), entries, room)
        if self._flbs is not None:
            self._write_flbs(self._flbs)

    def unseal(self) -> None:
        """Set the counts to 0."""
        self._arena.write(self._sessions, self.COUNT.pack(0))
        if self._flbs is not None:
            self._arena.write(self._flbs, BLOCK.pack(1, 0))


def luo_out(
    compatible: str | None, whose: str, hold: Callable[[], Holding], version: str | None = None, **given: Any
) -> LuoOut:
    """Return a writer of a LUO version (abi.md section 1).

    Args: whose: the kernels that it belongs to, for the message. version: the compatible to write in its place.
    Raises: UnsupportedAbiError.
    """
    if version is not None:
        make = writer_for(version, family="luo-")
    else:
        make = writer_of("LUO", compatible, whose, family="luo-")
    made: LuoOut = make(hold, **given)
    return made
