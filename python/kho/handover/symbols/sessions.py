"""What a kernel's own variables tell of its handovers: `kho_scratch`, `kho_out`, `kho_in`, LUO's lists of sessions.

LUO writes its sessions into the handover at the jump. Until then they are in the kernel's lists, and so are, in a
kernel that was booted by a handover, the sessions it got (kernel/liveupdate). Variables are found by `kallsyms`, which
has those of data with CONFIG_KALLSYMS_ALL, and members of structures by BTF.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ... import errors
from .btf import Btf
from .kallsyms import Kallsyms
from .space import AddressSpace
from .structs import Record, Types, entries
from .vmcoreinfo import Readable, Vmcoreinfo

__all__ = ["SOURCE", "KernelFile", "KernelSession", "KernelState", "read_state"]

SOURCE = "kallsyms+BTF"
NAMES = (
    *("init_uts_ns", "kho_scratch", "kho_scratch_cnt", "kho_out", "kho_in", "luo_session_global"),
    *("__start_BTF", "__stop_BTF", "_text", "_end"),
)
MOST_AREAS = 4096
"""Scratch areas: two, and one per NUMA node."""
MOST_SESSIONS = 65536
MOST_FILES = 1 << 18
"""Files of all sessions."""
MOST_PROBLEMS = 64
"""Problems that are reported; the walk goes on."""
MOST_PATH = 4096
RELEASE = 2 * 65
"""`struct new_utsname { char sysname[65], nodename[65], release[65], ... }`"""
MEMFD = "memfd:"
"""What the kernel puts before the name of a memfd."""


@dataclass(frozen=True)
class KernelFile:
    """A file in a session, as the kernel has it (struct luo_file)."""

    token: int
    compatible: str | None
    """What its handler names itself, as "memfd-v2"; None if it cannot be read."""
    data: int
    """Physical address of what the handler wrote, or another number of its own: `serialized_data`."""
    size: int | None
    """Bytes of the file; None if it is not open."""
    name: str | None
    """The name of the open file; of a memfd the one it was made with."""
    retrieved: bool | None
    """Whether it was retrieved; None on the outgoing side."""

    def describe(self) -> dict[str, Any]:
        """Return the file as data for JSON."""
        row: dict[str, Any] = {"token": self.token, "compatible": self.compatible, "data": self.data}
        row |= {key: value for key in ("size", "name", "retrieved") if (value := getattr(self, key)) is not None}
        return row


@dataclass(frozen=True)
class KernelSession:
    """A session in one of the kernel's lists (struct luo_session)."""

    name: str
    files: list[KernelFile]
    retrieved: bool | None
    """Whether a process took it back; None on the outgoing side."""

    def describe(self) -> dict[str, Any]:
        """Return the session as data for JSON."""
        row: dict[str, Any] = {"name": self.name}
        if self.retrieved is not None:
            row["retrieved"] = self.retrieved
        return row | {"files": [file.describe() for file in self.files]}


@dataclass
class KernelState:
    """The variables of KHO and LUO in one kernel's memory."""

    release: str | None
    vmcoreinfo_phys: int | None
    """Where VMCOREINFO was found; None if the dump has it as a note."""
    scratch: list[tuple[int, int]] | None = None
    """(addr, nbytes) of each area in `kho_scratch`; None if not known."""
    scratch_phys: int | None = None
    """Physical address of that array."""
    out_fdt: int | None = None
    """Physical address of the root FDT for the next kernel (`kho_out`)."""
    finalized: bool | None = None
    """`kho_out.finalized`; None in kernels that have none (Linux 7.1 and later)."""
    in_fdt: int | None = None
    """Physical address of the root FDT that this kernel got (`kho_in`); None if it booted cold."""
    previous_release: str | None = None
    """The kernel before this one, from `kho_in` (Linux 7.1 and later)."""
    kexec_count: int | None = None
    outgoing: list[KernelSession] | None = None
    """The sessions for the next kernel; None without LUO, or if the list cannot be found."""
    incoming: list[KernelSession] | None = None
    """The sessions that this kernel got, as far as they were not finished."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    def files(self) -> Iterator[tuple[bool, KernelSession, KernelFile]]:
        """Yield each file: whether it is of the incoming side, its session, the file."""
        for incoming, sessions in ((False, self.outgoing), (True, self.incoming)):
            for session in sessions or ():
                for file in session.files:
                    yield incoming, session, file

    def describe(self) -> dict[str, Any]:
        """Return everything as data for JSON; what is not known is left out."""
        kept: dict[str, Any] = {"source": SOURCE, "release": self.release}
        for name in ("scratch_phys", "out_fdt", "finalized", "in_fdt", "previous_release", "kexec_count"):
            if (value := getattr(self, name)) is not None:
                kept[name] = value
        if self.scratch is not None:
            kept["scratch"] = [list(area) for area in self.scratch]
        for name, sessions in (("sessions", self.outgoing), ("incoming_sessions", self.incoming)):
            if sessions is not None:
                kept[name] = [session.describe() for session in sessions]
        if self.problems:
            kept["problems"] = self.problems
        return kept


def read_state(memory: Readable, info: Vmcoreinfo) -> KernelState:
    """Read the variables of the kernel that VMCOREINFO describes.

    Raises: FormatError if VMCOREINFO, or the table of symbols, does not lead to them; KhoError if they cannot be read.
    """
    space = AddressSpace(memory, info)
    symbols = Kallsyms(space).find(NAMES)
    if not space.image and symbols.get("_text", 0) < symbols.get("_end", 0):
        space.image = range(symbols["_text"], symbols["_end"])
    state = KernelState(info.release, info.phys)
    _check(space, info)
    if "kho_scratch" not in symbols and "kho_out" not in symbols:
        raise errors.FormatError(
            "kallsyms: neither kho_scratch nor kho_out; the kernel was built without KHO or without CONFIG_KALLSYMS_ALL"
        )
    walk = _Walk(space, symbols, state)
    walk.part("kho_scratch", walk.scratch)
    types = walk.part("BTF", walk.types)
    if types is not None:
        walk.part("kho_out", lambda: walk.out(types))
        walk.part("kho_in", lambda: walk.got(types))
        walk.part("LUO's sessions", lambda: walk.sessions(types))
    return state


def _check(space: AddressSpace, info: Vmcoreinfo) -> None:
    """Refuse a VMCOREINFO that is not of the memory it is found in: its addresses lead to no `init_uts_ns`."""
    at, offset = info.symbol("init_uts_ns"), info.offset("uts_namespace.name")
    release = (info.release or "").encode()
    if at is None or offset is None or not release:
        raise errors.FormatError("VMCOREINFO: no OSRELEASE, SYMBOL(init_uts_ns) or OFFSET(uts_namespace.name)")
    if not space.read_image(at + offset + RELEASE, 65).startswith(release + b"\0"):
        place = space.image_phys(at)
        raise errors.FormatError(f"VMCOREINFO: its init_uts_ns, at {place:#x}, is not that of Linux {info.release}")


class _Walk:
    """The parts of a state; each is read on its own."""

    def __init__(self, space: AddressSpace, symbols: dict[str, int], state: KernelState) -> None:
        self.space = space
        self.symbols = symbols
        self.state = state
        self._left = MOST_FILES

    def part(self, name: str, read: Any) -> Any:
        """Call a function; keep why it failed."""
        try:
            return read()
        except errors.KhoError as error:
            self.problem(f"{name}: {error}")
            return None

    def problem(self, text: str) -> None:
        if len(self.state.problems) < MOST_PROBLEMS:
            self.state.problems.append(text)

    def scratch(self) -> None:
        if "kho_scratch" not in self.symbols or "kho_scratch_cnt" not in self.symbols:
            return
        array = int.from_bytes(self.space.read_image(self.symbols["kho_scratch"], 8), "little")
        count = int.from_bytes(self.space.read_image(self.symbols["kho_scratch_cnt"], 4), "little")
        if array == 0 or count == 0:
            return
        if count > MOST_AREAS:
            raise errors.FormatError(f"kho_scratch_cnt: {count} areas, of at most {MOST_AREAS}")
        areas = list(struct.iter_unpack("<QQ", self.space.read(array, 16 * count)))
        self.state.scratch_phys = self.space.phys(array)
        self.state.scratch = areas

    def types(self) -> Types | None:
        start, stop = self.symbols.get("__start_BTF"), self.symbols.get("__stop_BTF")
        if start is None or stop is None:
            self.problem("the kernel has no BTF (CONFIG_DEBUG_INFO_BTF), so no structure can be read")
            return None
        if not start < stop:
            raise errors.FormatError(f"from {start:#x} to {stop:#x}")
        return Types(self.space, Btf(self.space.read_image(start, stop - start)))

    def out(self, types: Types) -> None:
        if "kho_out" not in self.symbols:
            return
        out = types.record("kho_out", self.symbols["kho_out"])
        if out.has("finalized"):
            self.state.finalized = out.integer("finalized") != 0
        if out.has("fdt"):
            address = out.integer("fdt")
            self.state.out_fdt = self.space.phys(address) if address else None
        elif out.has("ser.fdt") and (page := out.integer("ser.fdt")):
            self.state.out_fdt = self._page_phys(page)

    def _page_phys(self, page: int) -> int:
        """Return the address of the memory of a `struct page` (page_to_phys)."""
        info = self.space.info
        first, size = info.symbol("vmemmap"), info.size("page")
        if first is None or not size or page < first or (page - first) % size:
            raise errors.FormatError(f"struct page at {page:#x}: not in vmemmap")
        return (page - first) // size * self.space.page_size

    def got(self, types: Types) -> None:
        if "kho_in" not in self.symbols:
            return
        got = types.record("kho_in", self.symbols["kho_in"])
        self.state.in_fdt = got.integer("fdt_phys") or None
        if got.has("previous_release"):
            self.state.previous_release = got.text("previous_release") or None
        if got.has("kexec_count"):
            self.state.kexec_count = got.integer("kexec_count")

    def sessions(self, types: Types) -> None:
        if "luo_session_global" not in self.symbols:
            return
        lists = types.record("luo_session_global", self.symbols["luo_session_global"])
        self.state.outgoing = []
        self._list(types, lists, "outgoing", self.state.outgoing)
        self.state.incoming = []
        self._list(types, lists, "incoming", self.state.incoming)

    def _list(self, types: Types, lists: Record, side: str, found: list[KernelSession]) -> None:
        """Add the sessions of a list; those before an error stay."""
        try:
            for record in entries(types, lists.address_of(f"{side}.list"), "luo_session", "list", MOST_SESSIONS):
                found.append(self._session(types, record, side))
            count = lists.integer(f"{side}.count")
            if count != len(found):
                self.problem(f"LUO's {side} sessions: count {count}, the list has {len(found)}")
        except errors.KhoError as error:
            self.problem(f"LUO's {side} sessions: {error}")

    def _session(self, types: Types, record: Record, side: str) -> KernelSession:
        incoming = side == "incoming"
        name = record.text("name")
        files: list[KernelFile] = []
        retrieved = record.integer("retrieved") != 0 if incoming else None
        session = KernelSession(name, files, retrieved)
        head = record.address_of("file_set.files_list")
        try:
            for file in entries(types, head, "luo_file", "list", self._left):
                files.append(self._file(file, incoming))
            count = record.integer("file_set.count")
            if count != len(files):
                self.problem(f"session {name}: count {count}, the list has {len(files)} files")
        except errors.KhoError as error:
            self.problem(f"session {name}: {error}")
        self._left -= len(files)
        return session

    def _file(self, record: Record, incoming: bool) -> KernelFile:
        token = record.integer("token")
        place = f"file {token:#x}"

        def compatible() -> str | None:
            handler = record.follow("fh")
            return None if handler is None else handler.text("compatible")

        opened = self.part(place, lambda: record.follow("file"))
        return KernelFile(
            token=token,
            compatible=self.part(place, compatible),
            data=record.integer("serialized_data"),
            size=None if opened is None else self.part(place, lambda: _size(opened)),
            name=None if opened is None else self.part(place, lambda: _name(opened)),
            retrieved=_retrieved(record) if incoming else None,
        )


def _retrieved(record: Record) -> bool:
    status = "retrieve_status" if record.has("retrieve_status") else "retrieved"
    return record.integer(status) > 0


def _size(opened: Record) -> int | None:
    inode = opened.follow("f_inode")
    return None if inode is None else inode.integer("i_size")


def _name(opened: Record) -> str | None:
    entry = opened.follow("f_path.dentry")
    if entry is None:
        return None
    name = entry.types.space.text(entry.integer("d_name.name"), MOST_PATH)
    return name.removeprefix(MEMFD)
