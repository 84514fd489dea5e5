"""Attributes each preserved page to its owner: root FDT, subtree blob, session file and so on, or `unknown`.

>>> found = kho.owners.owners(kho.open("handover.elf"))
>>> found.rows[0]
OwnedRange(phys=4390912, nbytes=16384, orders=(2,), owner='kho_test', what='folio', offset=None)
>>> found.unpreserved[:]
[]

The map itself is not preserved: the next kernel reads it before it allocates memory (abi.md section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

from .. import errors
from .._kho import Incoming, OwnerRows, find_outside_map, find_unlisted, join_owners
from .._types import OwnedRange
from ..formats import Blob, Broken, Budget, Declared, Luo, MemfdFile, Owned, Payload, Raw, unverified_in
from ..formats.luo import MemfdV1, MemfdV2, title
from .symbols import kernel_of, session_files, waiting_files

__all__ = [
    "HANDLE",
    "UNKNOWN",
    "Owners",
    "Ranges",
    "SharedRange",
    "claims",
    "owners",
    "unlisted",
    "why_outside",
]

UNKNOWN = "unknown"
"""Owner of pages that nothing refers to."""
VERSIONS = {f"memfd-v{version}": version for version in (1, 2)}
"""Versions of `find_unlisted`, by what the handler of such a memfd names itself."""
MOST_NAMED = 8
"""Files of the kernel's lists that are named."""
HANDLE = "data of an unknown kind"
"""Part name of a page that an undecoded reference points to."""


class Ranges(Sequence[OwnedRange]):
    """Ranges sorted by address, created on access: a large handover has millions of them."""

    def __init__(self, rows: OwnerRows) -> None:
        self._rows = rows

    def __repr__(self) -> str:
        return f"<Ranges: {len(self)}>"

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> OwnedRange: ...
    @overload
    def __getitem__(self, at: slice) -> list[OwnedRange]: ...
    def __getitem__(self, at: int | slice) -> OwnedRange | list[OwnedRange]:
        """Return a range, or a list of ranges for a slice."""
        if isinstance(at, slice):
            return [self._rows[i] for i in range(*at.indices(len(self._rows)))]
        return self._rows[at]

    @property
    def nbytes(self) -> int:
        """Total bytes."""
        return sum(row.nbytes for row in self)


class SharedRange(NamedTuple):
    """Bytes that two owners refer to."""

    phys: int
    nbytes: int
    first: tuple[str, str]
    """(owner, what)"""
    second: tuple[str, str]


@dataclass(frozen=True)
class Owners:
    """The owner of each preserved page, and the inconsistencies found."""

    rows: Ranges
    """All preserved pages, by address; adjacent pages with the same owner and part are one range."""
    unowned: Ranges
    """The pages that nothing refers to: leaked, unless an undecoded payload refers to them."""
    unpreserved: Ranges
    """Pages that are referred to but not preserved: the next kernel will overwrite them."""
    shared: list[SharedRange]
    """Bytes with two owners."""
    totals: dict[str, int]
    """Preserved bytes by owner, the largest first; `unknown` for pages that nothing refers to."""
    undecoded: list[str]
    """Payloads without a decoder, or refused by it: unowned pages may belong to them."""
    unlisted: list[MemfdFile] = field(default_factory=list)
    """The memfds that no session lists, as `unlisted` returns them; those in the map are owners."""
    refused: list[tuple[int, str]] = field(default_factory=list)
    """Structures of memfds that were found by content and cannot be decoded: (physical address, error)."""
    before_jump: bool = False
    """LUO's lists are empty, as until the jump: of the memory of sessions only `unlisted` files have an owner."""
    kernel_files: list[str] = field(default_factory=list)
    """Other files in the sessions of the kernel's own lists (`kho.handover.symbols`), if `before_jump`."""
    map_lost: tuple[int, str] | None = None
    """`Incoming.map_lost`: `rows` are what payloads refer to, as what is preserved is not known."""
    more_rows: int = 0
    """As `more_unpreserved`, for `rows` if `map_lost`."""
    more_unpreserved: int = 0
    """Number of ranges omitted from `unpreserved`: those beyond what an image of this size can plausibly hold."""
    more_shared: int = 0
    """As `more_unpreserved`, for `shared`."""
    unverified: list[str] = field(default_factory=list)
    """Why the handover or its payloads may not be what they were read as."""

    @property
    def why_unowned(self) -> str:
        """Explain why there are pages without an owner."""
        why = "no payload refers to them"
        if self.undecoded:
            why = f"no decoded payload refers to them; not decoded: {', '.join(self.undecoded)}"
        if self.before_jump:
            why += (
                "; LUO's lists are empty: the kernel writes them at the jump, so what sessions preserved is in none yet"
            )
            if self.kernel_files:
                why += f"; the kernel's own lists have {', '.join(self.kernel_files)}"
        return why


def claims(inc: Incoming, payloads: Mapping[str, Payload]) -> Iterator[Owned]:
    """Yield all memory with an owner: root FDT, blobs of subtrees, and the memory their payloads refer to."""
    yield Owned("root FDT", "FDT", (inc.fdt_phys, inc.fdt.totalsize))
    for name, payload in payloads.items():
        size = payload.nbytes if payload.blob.size is None and isinstance(payload, Declared) else payload.blob.size
        yield Owned(f"subtree {name}", "blob", (payload.blob.phys, max(size or 1, 1)))
        yield from payload.owned()
        if isinstance(payload, Luo):
            yield from _handles(inc, payload)


def _handles(inc: Incoming, luo: Luo) -> Iterator[Owned]:
    """Yield the folios that undecoded `data` words point to; a word that is not a folio's address is ignored."""
    orders = list(inc.folios_by_order)
    found = [(f"FLB {flb.name}", flb.data) for flb in luo.flbs if isinstance(luo.flb_payload(flb), Raw | Broken | None)]
    for session in luo.all_sessions:
        for entry in session.entries:
            if isinstance(session.files.decode(entry), Raw | Broken):
                found.append((f"{session.title}, file {entry.token:#x}", entry.data))
    for owner, phys in found:
        order = next((order for order in orders if inc.preserves(phys, order)), None)
        if order is not None:
            yield Owned(owner, HANDLE, (phys, inc.page_size << order))


def _undecoded(payloads: Mapping[str, Payload]) -> Iterator[str]:
    for name, payload in payloads.items():
        if isinstance(payload, Raw | Broken):
            yield f"subtree {name}"
        if isinstance(payload, Luo):
            for session in payload.all_sessions:
                for entry in session.entries:
                    if isinstance(session.files.decode(entry), Raw | Broken):
                        yield f"{session.title}, file {entry.token:#x} ({entry.compatible})"
            yield from (f"FLB {flb.name}" for flb, found in payload.flb_payloads() if isinstance(found, Broken))


def owners(inc: Incoming, payloads: Mapping[str, Payload] | None = None) -> Owners:
    """Attribute every preserved page of a handover. A file of a million folios takes about a second.

    Args: payloads: `inc.payloads`, if they were decoded already.
    """
    payloads = inc.payloads if payloads is None else payloads
    # A root without a map preserves nothing yet, so that nothing is missing from the map.
    owned = list(claims(inc, payloads)) if inc.preserved_memory_map else []
    names, found = _join(inc, owned)
    refused: list[tuple[int, str]] = []
    files = _unlisted(inc, payloads, found, refused)
    lost = inc.map_lost
    more = [part for file in files if file.in_map or lost for part in file.owned()]
    if more:
        names, found = _join(inc, owned + more)
    totals: dict[str, int] = {}
    for (owner, _), nbytes in zip(names, found["totals"], strict=True):
        totals[owner] = totals.get(owner, 0) + nbytes
    totals[UNKNOWN] = totals.get(UNKNOWN, 0) + found["unowned_bytes"]
    # Without the map there are no rows, and all that is referred to is, as far as is known, not preserved.
    rows, referred = Ranges(found["rows"]), Ranges(found["unpreserved"])
    if lost:
        for row in referred:
            totals[row.owner] = totals.get(row.owner, 0) + row.nbytes
    before_jump = any(isinstance(payload, Luo) and payload.lists_nothing for payload in payloads.values())
    return Owners(
        rows=referred if lost else rows,
        unowned=Ranges(found["unowned"]),
        unpreserved=rows if lost else referred,
        shared=[SharedRange(phys, nbytes, names[a], names[b]) for phys, nbytes, a, b in found["shared"]],
        totals={o: n for o, n in sorted(totals.items(), key=lambda item: -item[1]) if n},
        undecoded=list(_undecoded(payloads)),
        unlisted=files,
        refused=refused,
        before_jump=before_jump,
        kernel_files=_kernel_files(inc, files) if before_jump and len(found["unowned"]) else [],
        map_lost=lost,
        more_rows=found["more_unpreserved"] if lost else 0,
        more_unpreserved=0 if lost else found["more_unpreserved"],
        more_shared=found["more_shared"],
        unverified=unverified_in(inc, payloads),
    )


def _kernel_files(inc: Incoming, files: Iterable[MemfdFile]) -> list[str]:
    """Name the files in the kernel's own lists that are no memfd with an owner, at most `MOST_NAMED`."""
    state = kernel_of(inc)
    known = {file.blob.phys for file in files}
    rest = [] if state is None else [one for one in state.files() if not one[0] and one[2].data not in known]
    names = [
        f"{title(session.name)}, file {file.token:#x} ({file.compatible})" for _, session, file in rest[:MOST_NAMED]
    ]
    return [*names, f"{len(rest) - MOST_NAMED} more"] if len(rest) > MOST_NAMED else names


def _join(inc: Incoming, owned: Iterable[Owned]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Join claims with the map; return the names that the result refers to, and the result."""
    numbers: dict[tuple[str, str], int] = {}

    def number(owner: str, what: str) -> int:
        return numbers.setdefault((owner, what), len(numbers))

    claimed = []
    for owner, what, memory in owned:
        if isinstance(memory, tuple):
            phys, nbytes = memory
            memory = (phys, min(nbytes, (1 << 64) - 1))
        claimed.append((number(owner, what), number(owner, f"{what} chunk"), memory))
    names = list(numbers)
    return names, join_owners(inc, names, claimed)


def why_outside(*, finalized: bool, lost: bool = False) -> str:
    """Explain why a memfd is found that no map preserves.

    Args:
        finalized: whether the handover has a map: Linux 6.19 and 7.0 write it when they finalize.
        lost: whether a page of it is not in the dump.

    """
    why = "not retrieved from the handover this kernel booted from, or freed since and not overwritten"
    if lost:
        return f"preserved, which the map would tell that is not in this dump, or {why}"
    return why if finalized else f"preserved for a map that is not written yet, {why}"


def unlisted(
    inc: Incoming,
    payloads: Mapping[str, Payload] | None = None,
    *,
    refused: list[tuple[int, str]] | None = None,
) -> list[MemfdFile]:
    """Find the memfds that no session lists, by address.

    From PRESERVE_FD until it is retrieved, a memfd has its structure and folio list in pages of their own, but LUO
    lists it only from the jump on (abi.md section 6). Preserved pages without an owner are searched for structures. In
    a memory that also has the root FDT of a handover whose map was given back, so are all other pages: what is found
    there was not retrieved, or was retrieved and its pages were not used again; its `in_map` is False.

    Args:
        payloads: `inc.payloads`, if they were decoded already.
        refused: what cannot be decoded is appended: (physical address of the structure, error).

    Raises: SourceError on a read error.

    """
    if not inc.may_have_unlisted:
        return []
    payloads = inc.payloads if payloads is None else payloads
    _, found = _join(inc, claims(inc, payloads))
    return _unlisted(inc, payloads, found, [] if refused is None else refused)


def _unlisted(
    inc: Incoming, payloads: Mapping[str, Payload], found: Mapping[str, Any], refused: list[tuple[int, str]]
) -> list[MemfdFile]:
    """Find the memfds that no session lists, given the join of all other claims."""
    if not inc.may_have_unlisted:
        return []
    places = [(*place, True) for place in (find_unlisted(inc, found["unowned"]) if len(found["unowned"]) else [])]
    places += [(*place, False) for place in find_outside_map(inc)]
    # The kernel's own list has them also while the map that it got is still intact.
    waiting = {file.data: VERSIONS[file.compatible] for file in waiting_files(inc) if file.compatible in VERSIONS}
    waiting = {phys: version for phys, version in waiting.items() if phys not in {place[0] for place in places}}
    places += [(phys, version, False) for phys, version in waiting.items()]
    listed = {
        entry.data
        for payload in payloads.values()
        if isinstance(payload, Luo)
        for session in payload.all_sessions
        for entry in session.entries
    }
    places = [place for place in places if place[0] not in listed]
    budget = next((payload.blob.budget for payload in payloads.values()), None) or Budget(inc)
    complete = not any(isinstance(payload, Broken) for payload in payloads.values())
    listing = "in no session" if complete else "in no session that can be read"
    names = session_files(inc) if places else {}
    files: list[MemfdFile] = []
    for phys, version, in_map in sorted(places):
        owner = f"memfd at {phys:#x}, " + (listing if in_map or inc.map_lost else "outside the map")
        if phys in names:
            owner = f"{names[phys]}, memfd at {phys:#x}, " + ("before the jump" if in_map else "not retrieved")
        try:
            budget.take_objects(1, owner)
            blob = Blob(inc, f"memfd-v{version}", phys, None, owner, budget)
            files.append((MemfdV1 if version == 1 else MemfdV2)(blob, in_map=in_map))
        except errors.KhoError as error:
            refused.append((phys, str(error)))  # for one, its list is that of a file that was found before
    return files
