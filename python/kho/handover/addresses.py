"""Checks by its payloads whether the handover in a raw image was read at the right address.

Rust checks the map and the root FDT against the address (`rust/kho/src/address.rs`). If a raw image omits a hole in
memory, the map may lie below the hole and payloads above it, so that pointers to payloads lead to other bytes.
"""

from __future__ import annotations

from .. import errors
from .._kho import Incoming
from ..formats import Broken, KhoTest, Luo
from .owners import owners

__all__ = ["checked", "misplaced"]


def checked(inc: Incoming) -> Incoming:
    """Return the handover if its address was given, or if its payloads confirm the address.

    Raises: SourceError if a raw image without an address, or one that is read at another address than the given one,
    contains a payload that cannot be decoded or refers to memory that is not preserved.
    """
    if inc.address in ("own", "named") or (why := misplaced(inc)) is None:
        return inc
    at = inc.placement
    read_as = "at 0, as no address was given" if at is None else f"as {at.argument}"
    raise errors.SourceError(
        f"{why}: read {read_as}, the map is valid, but its payloads are not. The image may omit a hole in memory: give "
        "its address (FILE@ADDRESS), and that of each part if there are several (FILE@ADDRESS,offset=N,size=N)"
    )


def misplaced(inc: Incoming) -> str | None:
    """Describe the first payload that is malformed or refers to memory that is not preserved; None if all are valid."""
    payloads = inc.payloads
    for name, payload in payloads.items():
        match payload:
            case Broken():
                return f"subtree {name}: {payload.error}"
            case KhoTest():
                try:
                    if not payload.holds():
                        return f"subtree {name}: its checksum differs from that of its folios"
                except errors.KhoError as error:
                    return f"subtree {name}: {error}"
            case Luo():
                for session in payload.all_sessions:
                    for entry in session.entries:
                        file = session.files.decode(entry)
                        if isinstance(file, Broken):
                            return f"session {session.name}, file {entry.token:#x}: {file.error}"
    for lost in owners(inc, payloads).unpreserved:
        return f"{lost.owner}: {lost.what} at {lost.phys:#x} (+{lost.nbytes:#x}) is not preserved"
    return None
