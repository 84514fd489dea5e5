"""A handover with every draft format in it, written on request."""

from __future__ import annotations

import zlib
from typing import Any

import kho
from kho.formats import (
    EventFd,
    GuestMemfd,
    HugeMemfd,
    Hugetlb,
    HwPoison,
    KvmVm,
    Pci,
    PstoreKho,
    TmpfsFile,
    TmpfsMount,
)
from kho.formats.declare import Declared

MIB = 1 << 20
LOG = b"<6>[    1.000000] first line\n", b"<0>[    2.000000] Kernel panic - not syncing\n"
TIME = {"time_sec": 1_780_000_000, "time_nsec": 5}


def deflated(data: bytes) -> bytes:
    """Compress as pstore does: raw deflate."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def records() -> list[dict[str, Any]]:
    """Two parts of one dump, as pstore writes them: part 1 is the end."""
    parts = [b"Panic#1 Part1\n" + LOG[1], b"Panic#1 Part2\n" + LOG[0]]
    return [
        {**TIME, "count": 1, "reason": 1, "part": 1, "compressed": 0, "buf": parts[0]},
        {**TIME, "count": 1, "reason": 1, "part": 2, "compressed": 1, "buf": deflated(parts[1])},
    ]


def write(out: kho.Outgoing, kind: type[Declared], values: Any, **where: Any) -> int:
    return out.add_payload(kind, values, draft=True, **where)


def drafts(abi: str = "kho-v4", page_size: int = 4096, *, poison: bool = True) -> kho.Arena:
    """Write all of them. A poisoned page lies in a folio of the guest if `poison`."""
    arena = kho.Arena((4096 if page_size == 65536 else 256) * MIB, page_size=page_size, scratch="16M,32M,16M")
    out = kho.Outgoing(arena, abi)

    def folio(order: int, content: bytes) -> int:
        made = arena.alloc(order)
        memoryview(made)[: len(content)] = content
        out.preserve_folio(made)
        return made.pfn

    guest = [folio(2, b"guest memory"), folio(0, b"more of it")]
    write(out, KvmVm, {"type": 1, "nr_attrs": 2, "attrs": b"\1" * 32}, file=("vm-1", 0x1))
    entries = [{"pfn": guest[0], "flags": 1, "index": 0}, {"pfn": guest[1], "flags": 1, "index": 6}]
    values = {"size": 8 * page_size, "flags": 1, "vm_token": 1, "folios": entries}
    write(out, GuestMemfd, values, file=("vm-1", 0x2))
    huge = {"size": 100, "order": 3, "folios": [{"pfn": folio(3, b"huge page"), "index": 0}]}
    write(out, HugeMemfd, huge, file=("vm-1", 0x3))
    write(out, TmpfsMount, {"max_blocks": 512, "mode": 0o755}, file=("store", 0x1))
    entry = {"pfn": folio(0, b"a file of tmpfs"), "flags": 3, "index": 0}
    file = {"mnt_token": 1, "size": 15, "pos": 3, "mode": 0o640, "name": "state", "folios": [entry]}
    write(out, TmpfsFile, file, file=("store", 0x2))
    write(out, EventFd, {"count": 7, "flags": 0o4001}, file=("store", 0x3))
    devices = [{"domain": 0, "bdf": 0x00FB, "refcount": 1}, {"domain": 1, "bdf": 0xFFFF, "refcount": 0}]
    write(out, Pci, {"max_devices": 16, "devices": devices}, flb=2)
    write(out, Hugetlb, {"hstates": [{"nr_pages": 1, "order": 3}]}, flb=1)
    pfns = [(1 << 24) + n for n in range(2)] + ([guest[0] + 1] if poison else [])
    write(out, HwPoison, {"pfns": pfns}, subtree="hwpoison")
    if kho._kho.abis()[abi].size_property:  # Its length is that of the blob.
        write(out, PstoreKho, PstoreKho.encode_records(*records()), subtree="pstore-kho")
    out.finalize()
    return arena
