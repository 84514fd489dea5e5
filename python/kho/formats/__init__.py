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
    "vmalloc",
]


def payloads(inc: Incoming) -> dict[str, Payload]:
    """Decode every subtree of the root and return the payloads by name (`Incoming.payloads`)."""
    budget = Budget(inc)
    return {name: subtree(inc, name, budget) for name in inc.subtrees}


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
