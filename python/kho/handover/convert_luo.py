"""LUO data for another kernel: its sessions, files and FLBs in the formats that this kernel reads.

Lists and memfd headers are written again; the data of files and the lists of their folios stay where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from .. import _kho
from ..errors import FormatError, ParameterError
from ..formats import Broken, Luo, MemfdFile, Payload, Session
from ..formats.kernel_write import VMALLOC, MemfdLayout
from ..formats.luo import FileEntry, Flb, LuoV1
from ..formats.registry import writer_of
from ..kernels import Kernel
from .compat import TEST_FLB, Offer
from .outgoing import Outgoing

__all__ = ["DROPPABLE", "Formats", "LuoPlan", "plan_luo"]

Drop = Literal["seals", "files", "flbs", "luo"]
DROPPABLE: tuple[Drop, ...] = get_args(Drop)
"""What a conversion may leave out if it is told to."""
SUBTREE = "LUO"
KEEP = "--keep-unknown (keep_unknown=True) keeps what kho does not know as it is"
SHOWN = 3
"""How many objects a message names."""


class Formats(NamedTuple):
    """What a target reads of LUO."""

    whom: str
    """The target as text: `Linux 7.0`, `kho-v3`."""
    abi: str
    luo: str | None
    """Compatible of the subtree; None if the target has no LUO."""
    memfd: str | None
    flb_node: bool
    """Whether an FDT of LUO has the node `luo-flb`."""
    flbs: bool
    """Whether FLBs are handed over at all."""

    @classmethod
    def of_kernel(cls, kernel: Kernel) -> Formats:
        """Take the formats of a kernel."""
        return cls(
            f"Linux {kernel.name}",
            kernel.abi,
            kernel.luo,
            kernel.memfd,
            kernel.flb_node,
            kernel.flbs,
        )

    @classmethod
    def of_abi(cls, abi: _kho.Abi) -> Formats:
        """Take the formats that go with a root FDT; `luo-flb` is written, as it harms none of its kernels."""
        return cls(abi.compatible, abi.compatible, abi.luo, abi.memfd, flb_node=True, flbs=True)


class OutEntry(NamedTuple):
    """A file as it is written."""

    token: int
    compatible: str
    data: int
    header: bytes | None
    """A memfd header that gets a page of its own, whose address is the file's data; None to keep `data`."""


@dataclass
class LuoPlan:
    """What becomes of the subtree LUO, decided before anything is written."""

    formats: Formats
    action: Literal["keep", "write", "drop"] = "keep"
    liveupdate_num: int = 0
    sessions: dict[str, list[OutEntry]] = field(default_factory=dict)
    flbs: list[Flb] = field(default_factory=list)
    replaced: list[tuple[int, int]] = field(default_factory=list)
    """`(phys, nbytes)` of the lists and memfd headers that are written again, without the subtree's blob."""
    losses: list[str] = field(default_factory=list)
    """What was left out, as the caller allowed."""

    def write(self, out: Outgoing) -> None:
        """Write the subtree with the writers of the handover.

        Raises: ParameterError for more sessions, files or FLBs than the target's lists hold; OutOfMemoryError.
        """
        page = out.arena.page_size
        try:
            out.add_luo(liveupdate_num=self.liveupdate_num)
            for name, entries in self.sessions.items():
                out.add_session(name, empty=True)
                for entry in entries:
                    data = entry.data
                    if entry.header is not None:
                        folio = out.arena.alloc()
                        memoryview(folio)[:] = entry.header.ljust(page, b"\0")
                        out.preserve_folio(folio)
                        data = folio.phys
                    out.add_file(name, entry.token, entry.compatible, data)
            for flb in self.flbs:
                out.add_flb(flb.name, flb.data, flb.count)
        except ParameterError as error:
            raise ParameterError(
                f"{self.formats.whom} cannot take the LUO data: {error}; hand over less, or to Linux 7.2 or later, "
                "whose lists have any length"
            ) from error

    def amend(self, offer: Offer) -> None:
        """Change what `kho compat` judges as the conversion changes it."""
        if self.action == "keep":
            return
        written = self.action == "write"
        offer.luo, offer.flb_node = (self.formats.luo, self.formats.flbs) if written else (None, False)
        offer.others = [name for name in offer.others if name != SUBTREE]
        offer.flbs = [flb.name for flb in self.flbs]
        offer.sessions = {
            _shown(name): [(entry.token, entry.compatible) for entry in entries]
            for name, entries in self.sessions.items()
        }


def plan_luo(
    luo: Payload | None, formats: Formats, drop: Collection[Drop] = (), *, keep_unknown: bool = False
) -> LuoPlan:
    """Decide what becomes of the subtree LUO for a target, and what it cannot take.

    A subtree in the target's own form stays as it is, byte for byte. Linux 6.19 would also read one with a node
    `luo-flb`, but does not write it.

    Args:
        luo: the decoded subtree, if there is one.
        drop: losses that are allowed, each only where the target cannot take the object: "seals", "files" (of an
            unknown kind), "flbs", "luo" (all of it).
        keep_unknown: keep files and FLBs of an unknown kind as they are, as a driver of the target may read them.

    Raises:
        ParameterError: an object cannot be carried and its loss is not allowed; the message names objects and remedy.
        FormatError: LUO, or the memory that it refers to, is malformed.

    """
    plan = LuoPlan(formats)
    if luo is None:
        return plan
    if not isinstance(luo, Luo) or luo.unverified:
        _plan_unreadable(luo, plan, drop)
        return plan
    if formats.luo is None:
        if "luo" not in drop:
            raise ParameterError(
                f"subtree LUO: {_counted(luo)}: {formats.whom} has no LUO, their memory would stay reserved; "
                "--drop-luo (drop=['luo']) leaves them out"
            )
        plan.action = "drop"
        plan.losses.append(f"left out LUO: {_counted(luo)}")
    elif not _fits(luo, formats):
        plan.action = "write"
        plan.liveupdate_num = luo.liveupdate_num
        _Files(luo, plan, drop, keep_unknown=keep_unknown).convert()
        plan.replaced = _replaced(luo, plan)
    return plan


def _plan_unreadable(luo: Payload, plan: LuoPlan, drop: Collection[Drop]) -> None:
    """Keep a subtree that cannot be read only for kernels of its own version."""
    if luo.compatible == plan.formats.luo:
        return
    if "luo" not in drop:
        unknown = "; ".join(luo.unverified) or f"its version is not known ({luo.describe()})"
        why = str(luo.error) if isinstance(luo, Broken) else unknown
        raise FormatError(
            f"subtree LUO at {luo.blob.phys:#x}: cannot be converted for {plan.formats.whom}: {why}; "
            "--drop-luo (drop=['luo']) leaves it out"
        )
    plan.action = "drop"
    plan.losses.append("left out LUO, which cannot be read; the memory that it refers to stays preserved")


def _shown(name: str) -> str:
    """Write a session's name as readers show it, with bytes that are no UTF-8 replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _counted(luo: Luo) -> str:
    files = sum(len(session.entries) for session in luo.all_sessions)
    return f"{len(luo.all_sessions)} sessions with {files} files"


def _fits(luo: Luo, formats: Formats) -> bool:
    """Say whether the target would write LUO, its memfds and FLBs as they are; files of other kinds are not judged."""
    if luo.compatible != formats.luo or (isinstance(luo, LuoV1) and luo.has_flb_node != formats.flb_node):
        return False
    if luo.flbs and not formats.flbs:
        return False
    kinds = {entry.compatible for session in luo.all_sessions for entry in session.entries}
    return not any(kind.startswith("memfd-") and kind != formats.memfd for kind in kinds)


def _named(names: list[str]) -> str:
    """Name the first objects and count the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


class _Files:
    """The sessions, files and FLBs of one plan."""

    def __init__(self, luo: Luo, plan: LuoPlan, drop: Collection[Drop], *, keep_unknown: bool) -> None:
        self.luo = luo
        self.plan = plan
        self.formats = plan.formats
        self.drop = drop
        self.keep_unknown = keep_unknown
        self.layout: MemfdLayout | None = None
        self.sealed: list[str] = []
        """Files with seals or flags that the target's memfds do not record."""
        self.unknown: list[str] = []
        """Files of a kind that is not known here, or that cannot be read."""

    def convert(self) -> None:
        """Fill in the plan. Raises: ParameterError, FormatError."""
        names = Counter(session.name_bytes for session in self.luo.all_sessions)
        for raw, count in names.items():
            if count > 1:
                raise FormatError(
                    f"LUO at {self.luo.blob.phys:#x}: {count} sessions are named {raw!r}; only the first can be "
                    "retrieved (KHO030), so they cannot be converted"
                )
        for session in self.luo.all_sessions:
            name = session.name_bytes.decode("utf-8", "surrogateescape")
            self.plan.sessions[name] = list(self._entries(session))
        whom = self.formats.whom
        self._refuse(
            "seals",
            self.sealed,
            f"{self.formats.memfd}, which {whom} reads, records no seals: the file would be writable",
            "seals",
        )
        self._refuse(
            "files",
            self.unknown,
            f"kho cannot convert such a file, and one that no driver of {whom} handles makes it lose every session; "
            f"{KEEP}",
            "files, whose memory stays preserved",
        )
        self._convert_flbs()

    def _refuse(self, what: Drop, names: list[str], why: str, loss: str) -> None:
        """Raise, or record as a loss what may be dropped."""
        if not names:
            return
        if what not in self.drop:
            raise ParameterError(f"{_named(names)}: {why}; --drop-{what} (drop=['{what}']) leaves them out")
        self.plan.losses.append(f"left out {loss}: {_named(names)}")

    def _entries(self, session: Session) -> Iterator[OutEntry]:
        """Convert the files of a session."""
        tokens = Counter(entry.token for entry in session.entries)
        for entry in session.entries:
            name = f"session {session.name}, file {entry.token:#x}"
            if tokens[entry.token] > 1:
                raise FormatError(
                    f"{name}: {tokens[entry.token]} files have this token (KHO031): they cannot be converted"
                )
            payload = session.files.decode(entry)
            if entry.compatible == self.formats.memfd:
                yield OutEntry(entry.token, entry.compatible, entry.data, None)
            elif isinstance(payload, MemfdFile) and not payload.unverified:
                yield self._memfd(entry, payload, name)
            elif self.keep_unknown and not isinstance(payload, Broken) and "\ufffd" not in entry.compatible:
                yield OutEntry(entry.token, entry.compatible, entry.data, None)
            else:
                why = f": {payload.error}" if isinstance(payload, Broken) else ""
                self.unknown.append(f"{name} ({entry.compatible}{why})")

    def _memfd(self, entry: FileEntry, file: MemfdFile, name: str) -> OutEntry:
        """Convert the header of a memfd; its folios and their list stay as they are."""
        if self.layout is None:
            self.layout = writer_of("memfd", self.formats.memfd, f"the kernels of {self.formats.abi}", family="memfd-")
        layout, area = self.layout, file.list
        listed = VMALLOC.pack(area.first, area.total_pages, area.flags, area.order)
        if layout.has_seals:
            fields: tuple[int, ...] = (file.pos, file.size, file.seals, file.flags, file.memfd.nr_folios)
        else:
            if file.seals or file.flags:
                flags = f", flags {file.flags:#x}" if file.flags else ""
                self.sealed.append(f"{name}: seals {file.seals:#x}{flags}")
            fields = (file.pos, file.size, file.memfd.nr_folios)
        return OutEntry(entry.token, layout.compatible, 0, layout.layout.pack(*fields, listed))

    def _convert_flbs(self) -> None:
        """Convert the list of FLBs, whose entries are the same in all versions."""
        taken: list[Flb] = []
        refused: list[Flb] = []
        for flb in self.luo.flbs:
            known = flb.name.startswith(TEST_FLB) or (self.keep_unknown and "\ufffd" not in flb.name)
            (taken if known and self.formats.flbs else refused).append(flb)
        for name, count in Counter(flb.name for flb in taken).items():
            if count > 1:
                raise FormatError(
                    f"LUO at {self.luo.blob.phys:#x}: {count} FLBs are named {name!r}: they cannot be converted"
                )
        whom = self.formats.whom
        why = f"{whom} has no FLBs"
        if self.formats.flbs:
            why = f"kho does not know its data, which {whom} may read in another way; {KEEP}"
        self._refuse("flbs", [f"FLB {flb.name}" for flb in refused], why, "FLBs, whose memory stays preserved")
        self.plan.flbs = taken


def _replaced(luo: Luo, plan: LuoPlan) -> list[tuple[int, int]]:
    found = [(phys, nbytes) for _, phys, nbytes in luo.blocks]
    for session, entries in zip(luo.all_sessions, plan.sessions.values(), strict=True):
        found += session.blocks
        for entry in entries:
            if entry.header is not None:
                headers = (owned.memory for owned in session.files[entry.token].owned() if owned.what == "memfd header")
                found += [memory for memory in headers if isinstance(memory, tuple)]
    return found
