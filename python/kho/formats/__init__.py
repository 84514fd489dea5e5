"""Payloads of a handover: decoders by `compatible`, in a registry to which other packages can add.

>>> from kho.formats import Blob, Payload, decoder
>>>
>>> @decoder("vendor,widget-v1")
... class Widget(Payload):
...     def __init__(self, blob: Blob) -> None:
...         super().__init__(blob)
...         self.serial = int.from_bytes(blob.read(8), "little")

A package installs its decoders through the entry point group `kho.decoders`. Each entry names a module that registers
decoders, or a `Payload` class, with the compatible as the entry's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .._kho import Incoming
from ..errors import FormatError, NotFoundError
from .declare import (
    Declared,
    Int,
    Record,
    Records,
    array,
    blocks,
    nodes,
    raw,
    s32,
    s64,
    text,
    u8,
    u16,
    u32,
    u64,
    vmalloc,
)
from .drafts import EventFd, GuestMemfd, HugeMemfd, Hugetlb, HwPoison, KvmVm, Pci, TmpfsFile, TmpfsMount
from .folio_file import FolioEntry, FolioFile
from .kernel import KhoTest, Metadata, Region, ReserveMem
from .keytree import KeyTree, keytree
from .live import Live
from .luo import Luo, MemfdFile, Session
from .pstore import PstoreKho, PstoreRecord
from .registry import Blob, Broken, Budget, Owned, Payload, Raw, decode, decoder, known, subtree
from .systemd import FdStore, Stored

__all__ = [
    "Blob",
    "Broken",
    "Budget",
    "Declared",
    "EventFd",
    "FdStore",
    "FolioEntry",
    "FolioFile",
    "GuestMemfd",
    "HugeMemfd",
    "Hugetlb",
    "HwPoison",
    "Int",
    "KeyTree",
    "KhoTest",
    "KvmVm",
    "Live",
    "Luo",
    "MemfdFile",
    "Metadata",
    "Owned",
    "Payload",
    "Pci",
    "PstoreKho",
    "PstoreRecord",
    "Raw",
    "Record",
    "Records",
    "Region",
    "ReserveMem",
    "Session",
    "Stored",
    "TmpfsFile",
    "TmpfsMount",
    "array",
    "blocks",
    "decode",
    "decoder",
    "drafts_in",
    "keytree",
    "known",
    "luo_of",
    "metadata_of",
    "nodes",
    "payloads",
    "raw",
    "reserve_mem_of",
    "s32",
    "s64",
    "subtree",
    "text",
    "u8",
    "u16",
    "u32",
    "u64",
    "unverified_in",
    "vmalloc",
]


def payloads(inc: Incoming) -> dict[str, Payload]:
    """Decode every subtree of the root and return the payloads by name (`Incoming.payloads`)."""
    budget = Budget(inc)
    return {name: subtree(inc, name, budget) for name in inc.subtrees}


def _all_payloads(decoded: Mapping[str, Payload]) -> Iterator[Payload]:
    """Yield the payloads of all subtrees, and the files of sessions."""
    for payload in decoded.values():
        yield payload
        if isinstance(payload, Luo):
            for session in payload.all_sessions:
                for entry in session.entries:
                    yield session.files.decode(entry)


def unverified_in(inc: Incoming, decoded: Mapping[str, Payload], most: int = 16) -> list[str]:
    """List why a handover or its payloads may not be what they were read as; empty if all of it is known.

    Args: decoded: `inc.payloads`. most: payloads that are listed one by one; then one line has the number of others.
    """
    doubts = [f"root FDT: {doubt}" for doubt in inc.unverified]
    doubtful = [payload for payload in _all_payloads(decoded) if payload.unverified]
    doubts += [f"{payload.blob.owner}: {'; '.join(payload.unverified)}" for payload in doubtful[:most]]
    return [*doubts, f"and {len(doubtful) - most} more payloads"] if len(doubtful) > most else doubts


def drafts_in(inc: Incoming, decoded: Mapping[str, Payload]) -> list[str]:
    """List the formats of a handover that only public drafts have (abi.md section 9), sorted."""
    found = {payload.compatible for payload in _all_payloads(decoded) if payload.draft and not payload.unverified}
    return sorted(found | ({inc.compatible} if inc.abi.draft else set()))


def luo_of(inc: Incoming) -> Luo:
    """Decode the subtree `LUO` (`Incoming.luo`). Raises: NotFoundError; FormatError if it cannot be decoded."""
    payload = subtree(inc, "LUO")
    if not isinstance(payload, Luo):
        raise _refusal(payload)
    return payload


def metadata_of(inc: Incoming) -> Metadata:
    """Decode the subtree `kexec-metadata` (`Incoming.metadata`). Raises: as `luo_of`."""
    payload = subtree(inc, "kexec-metadata")
    if not isinstance(payload, Metadata):
        raise _refusal(payload)
    return payload


def reserve_mem_of(inc: Incoming) -> dict[str, Region]:
    """Return the `reserve_mem=` regions by name (`Incoming.reserve_mem`); empty without the subtree `memblock`."""
    try:
        payload = subtree(inc, "memblock")
    except NotFoundError:
        return {}
    if not isinstance(payload, ReserveMem):
        raise _refusal(payload)
    return payload.regions


def _refusal(payload: Payload) -> Exception:
    """Return the error for a subtree whose payload has an unexpected type."""
    if isinstance(payload, Broken):
        return payload.error
    return FormatError(f"{payload.blob.owner} at {payload.blob.phys:#x}: unknown compatible {payload.compatible!r}")
