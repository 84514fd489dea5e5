"""Attributes each preserved page to its owner: root FDT, subtree blob, session file and so on, or `unknown`.

>>> found = kho.owners.owners(kho.open("handover.elf"))
>>> found.rows[0]
OwnedRange(phys=4390912, nbytes=16384, orders=(2,), owner='kho_test', what='folio', offset=None)
>>> found.unpreserved[:]
[]

The map itself is not preserved: the next kernel reads it before it allocates memory (abi.md section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from .._kho import Incoming, OwnerRows, join_owners
from .._types import OwnedRange
from ..formats import Broken, Declared, Luo, Owned, Payload, Raw

__all__ = ["HANDLE", "UNKNOWN", "Owners", "Ranges", "SharedRange", "claims", "owners"]

UNKNOWN = "unknown"
"""Owner of pages that nothing refers to."""
HANDLE = "data of an unknown kind"
"""Part name of a page that an undecoded reference points to."""


class Ranges(Sequence[OwnedRange]):
    """Ranges sorted by address, created on access: a large handover has millions of them."""

    def __init__(self, rows: OwnerRows) -> None:
        self._rows = rows

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
    more_unpreserved: int = 0
    """Number of ranges omitted from `unpreserved`: those beyond what an image of this size can plausibly hold."""
    more_shared: int = 0
    """As `more_unpreserved`, for `shared`."""

    @property
    def why_unowned(self) -> str:
        """Explain why there are pages without an owner."""
        if not self.undecoded:
            return "no payload refers to them"
        return f"no decoded payload refers to them; not decoded: {', '.join(self.undecoded)}"


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
    numbers: dict[tuple[str, str], int] = {}

    def number(owner: str, what: str) -> int:
        return numbers.setdefault((owner, what), len(numbers))

    claimed = []
    # Without a map nothing is preserved: that each part is not says nothing of it.
    for owner, what, memory in claims(inc, payloads) if inc.finalized else ():
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
