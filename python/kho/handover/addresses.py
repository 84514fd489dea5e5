"""Whether a handover in a raw image lies where it was read, as far as its payloads tell.

The map and what leads to it are held to the address in Rust (`rust/kho/src/address.rs`). A raw image that leaves out a
hole may have them below the hole and payloads above it: what these point at is then something else.
"""

from __future__ import annotations

from .. import errors
from .._kho import Incoming
from ..formats import Broken, KhoTest, Luo
from .owners import owners

__all__ = ["checked", "misplaced"]


def checked(inc: Incoming) -> Incoming:
    """Give the handover, if its payloads are what they must be or its address was named.

    Raises: SourceError for a raw image without an address, or read at another than it was named with, in which a
    payload cannot be decoded, or refers to what is not preserved.
    """
    if inc.address in ("own", "named") or (why := misplaced(inc)) is None:
        return inc
    at = inc.placement
    read_as = "at 0, as no address was named" if at is None else f"as {at.argument}"
    raise errors.SourceError(
        f"{why}: read {read_as}, the map is whole, but not what it hands over. The image may leave out a hole: say "
        "where it begins (FILE@ADDRESS), and where each part lies if there are several (FILE@ADDRESS,offset=N,size=N)"
    )


def misplaced(inc: Incoming) -> str | None:
    """Name the first payload that cannot be decoded or refers to what is not preserved; None if there is none."""
    payloads = inc.payloads
    for name, payload in payloads.items():
        match payload:
            case Broken():
                return f"subtree {name}: {payload.error}"
            case KhoTest():
                try:
                    if not payload.holds():
                        return f"subtree {name}: its checksum is not that of its folios"
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
