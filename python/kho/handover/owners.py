"""Whose is each preserved page? The root FDT's, a producer's blob's, a file's of a session, or nobody's.

>>> found = kho.owners.owners(kho.open("handover.elf"))
>>> found.rows[0]
OwnedRange(phys=4390912, nbytes=16384, orders=(2,), owner='kho_test', what='folio', offset=None)
>>> found.unpreserved[:]
[]

The map itself is not preserved: the next kernel reads it before it hands out memory (ABI section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from .._kho import Incoming, OwnerRows, join_owners
from .._types import OwnedRange
from ..formats import Broken, Luo, Owned, Payload, Raw

__all__ = ["HANDLE", "UNKNOWN", "Owners", "Ranges", "SharedRange", "claims", "owners"]

UNKNOWN = "unknown"
"""The owner of pages that nobody claims."""
HANDLE = "data of an unknown kind"
"""What a page is that an undecoded reference points at."""


class Ranges(Sequence[OwnedRange]):
    """Ranges by address, made as they are asked for: a large handover has millions."""

    def __init__(self, rows: OwnerRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        """Count the ranges."""
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> OwnedRange: ...
    @overload
    def __getitem__(self, at: slice) -> list[OwnedRange]: ...
    def __getitem__(self, at: int | slice) -> OwnedRange | list[OwnedRange]:
        """Make a range, or those of a slice."""
        if isinstance(at, slice):
            return [self._rows[i] for i in range(*at.indices(len(self._rows)))]
        return self._rows[at]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(row.nbytes for row in self)


class SharedRange(NamedTuple):
    """Bytes that two owners claim."""

    phys: int
    nbytes: int
    first: tuple[str, str]
    """(owner, what)"""
    second: tuple[str, str]


@dataclass(frozen=True)
class Owners:
    """Every preserved page with its owner, and what does not fit."""

    rows: Ranges
    """All preserved pages, by address; neighbours of one owner, and one place in its file, are one range."""
    unowned: Ranges
    """Of these, the pages that nobody claims: leaked, unless a payload nobody decodes refers to them."""
    unpreserved: Ranges
    """Pages that are claimed and not preserved: tomorrow's corruption."""
    shared: list[SharedRange]
    """Bytes with two owners."""
    totals: dict[str, int]
    """Bytes preserved by owner, the largest first; `unknown` for pages that nobody claims."""
    undecoded: list[str]
    """Payloads that nobody decodes, or whose decoder refused them: unowned pages may be theirs."""
    more_unpreserved: int = 0
    """Ranges of `unpreserved` that are not listed: more than an image of this size can plausibly hold."""
    more_shared: int = 0
    """As `more_unpreserved`, of `shared`."""

    @property
    def why_unowned(self) -> str:
        """Say why there are pages without an owner."""
        if not self.undecoded:
            return "no payload refers to them"
        return f"no payload refers to them that can be decoded; not decoded: {', '.join(self.undecoded)}"


def claims(inc: Incoming, payloads: Mapping[str, Payload]) -> Iterator[Owned]:
    """Give every claim there is: the root FDT, each subtree's blob, and what its payload accounts for."""
    yield Owned("root FDT", "FDT", (inc.fdt_phys, inc.fdt.totalsize))
    for name, payload in payloads.items():
        yield Owned(f"subtree {name}", "blob", (payload.blob.phys, max(payload.blob.size or 1, 1)))
        yield from payload.owned()
        if isinstance(payload, Luo):
            yield from _handles(inc, payload)


def _handles(inc: Incoming, luo: Luo) -> Iterator[Owned]:
    """Claim what undecoded references point at, if that is a preserved folio's head: else they are no addresses."""
    orders = list(inc.folios_by_order)
    found = [(f"FLB {flb.name}", flb.data) for flb in luo.flbs]
    for session in luo.all_sessions:
        for entry in session.entries:
            if isinstance(session.files.decode(entry), Raw | Broken):
                found.append((f"session {session.name}, file {entry.token:#x}", entry.data))
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
                        yield f"session {session.name}, file {entry.token:#x} ({entry.compatible})"


def owners(inc: Incoming, payloads: Mapping[str, Payload] | None = None) -> Owners:
    """Attribute every preserved page of a handover. A file of a million folios takes about a second.

    Args: payloads: `inc.payloads`, if they were decoded already.
    """
    payloads = inc.payloads if payloads is None else payloads
    numbers: dict[tuple[str, str], int] = {}

    def number(owner: str, what: str) -> int:
        return numbers.setdefault((owner, what), len(numbers))

    claimed = []
    for owner, what, memory in claims(inc, payloads):
        if isinstance(memory, tuple):
            phys, nbytes = memory
            memory = (phys, min(nbytes, (1 << 64) - 1))
        claimed.append((number(owner, what), number(owner, f"{what} chunk"), memory))
    names = list(numbers)
    found = join_owners(inc, names, claimed)
    totals: dict[str, int] = {}
    for (owner, _), nbytes in zip(names, found["totals"], strict=True):
        totals[owner] = totals.get(owner, 0) + nbytes
    totals[UNKNOWN] = totals.get(UNKNOWN, 0) + found["unowned_bytes"]
    return Owners(
        rows=Ranges(found["rows"]),
        unowned=Ranges(found["unowned"]),
        unpreserved=Ranges(found["unpreserved"]),
        shared=[SharedRange(phys, nbytes, names[a], names[b]) for phys, nbytes, a, b in found["shared"]],
        totals={o: n for o, n in sorted(totals.items(), key=lambda item: -item[1]) if n},
        undecoded=list(_undecoded(payloads)),
        more_unpreserved=found["more_unpreserved"],
        more_shared=found["more_shared"],
    )
