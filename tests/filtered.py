"""Writers of dumps that lack pages, named in the file or not, and of a vmcore that makedumpfile filters."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import NamedTuple

from dumpfiles import flatten, kdump, lime

PAGE_OFFSET = 0xFFFF_8880_0000_0000
"""Where x86_64 maps all memory."""


def note(owner: bytes, kind: int, desc: bytes) -> bytes:
    """An ELF note, padded to 4 bytes."""
    parts = (owner + b"\0", desc)
    return struct.pack("<III", len(owner) + 1, len(desc), kind) + b"".join(p + bytes(-len(p) % 4) for p in parts)


class Load(NamedTuple):
    """A PT_LOAD: the bytes in the file, and how many there are in memory."""

    phys: int
    data: bytes
    memsz: int


def core(loads: list[Load], notes: bytes = b"", machine: int = 62) -> bytes:
    """An ELF core as the kernel and makedumpfile write it: PT_NOTE first, then PT_LOADs with virtual addresses."""
    at = 64 + 56 * (1 + len(loads))
    headers = struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(notes), len(notes), 4)
    body = bytearray(notes)
    for load in loads:
        place = (load.phys, len(load.data), load.memsz, 0)
        headers += struct.pack("<IIQQQQQQ", 1, 7, at + len(body), (PAGE_OFFSET + load.phys) % (1 << 64), *place)
        body += load.data
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    count = 1 + len(loads)
    return ident + struct.pack("<HHIQQQIHHHHHH", 4, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0) + headers + body


def runs_of(pages: Mapping[int, bytes]) -> list[tuple[int, bytes]]:
    """Adjacent pages as `(phys, bytes)`."""
    runs: list[tuple[int, bytearray]] = []
    for phys, page in sorted(pages.items()):
        if runs and runs[-1][0] + len(runs[-1][1]) == phys:
            runs[-1][1].extend(page)
        else:
            runs.append((phys, bytearray(page)))
    return [(phys, bytes(data)) for phys, data in runs]


def kernel_dump(pages: dict[int, bytes], kinds: Mapping[int, str]) -> bytes:
    """A vmcore of `pages` of 4 KiB with as much of a kernel of x86_64 around them as makedumpfile's filter reads.

    That is VMCOREINFO, page tables that map memory at PAGE_OFFSET, the kernel's names, and one array of `struct page`
    (FLATMEM), in which `kinds` makes pages, by address, those of the cache, of a user, or free.
    """
    base = -(-(max(pages) + 4096) // (2 << 20)) * (2 << 20)
    array = base + (1 << 20)
    nbytes = -(-(array + (16 << 20)) // 4096 * 64 // 4096) * 4096
    structs = bytearray(nbytes)
    for phys in range(0, nbytes // 64 * 4096, 4096):
        flags, mapping, mapcount, refcount = PAGE_KINDS.get(kinds.get(phys, ""), (0, 0, 0xFFFFFFFF, 1))
        # Where flags, mapping, private, _mapcount and _refcount lie in VMCOREINFO below.
        struct.pack_into("<Q16xQ8xQII", structs, phys // 64, flags, mapping, 0, mapcount, refcount)
    tables, names = base, base + 3 * 4096
    pointer = base + 2 * 4096
    own = bytearray(4 * 4096)
    struct.pack_into("<Q", own, 8 * (PAGE_OFFSET >> 39 & 511), tables + 4096 | 0x67)
    for gib in range(512):
        struct.pack_into("<Q", own, 4096 + 8 * gib, gib << 30 | 0xE7)  # present, writable, 1 GiB
    struct.pack_into("<Q", own, 2 * 4096, PAGE_OFFSET + array)
    for at, text in enumerate((b"Linux", b"host", RELEASE.encode(), b"#1", b"x86_64", b"(none)")):
        own[3 * 4096 + 65 * at : 3 * 4096 + 65 * at + len(text)] = text
    symbols = {
        "init_uts_ns": PAGE_OFFSET + names,
        "node_online_map": PAGE_OFFSET + names + 512,
        "contig_page_data": PAGE_OFFSET + names + 1024,
        "mem_map": PAGE_OFFSET + pointer,
        "swapper_pg_dir": KERNEL_MAP + tables,
        "init_top_pgt": KERNEL_MAP + tables,
        "_stext": KERNEL_MAP + (16 << 20),
    }
    lines = [f"OSRELEASE={RELEASE}", *(f"SYMBOL({name})={value:x}" for name, value in symbols.items()), *VMCOREINFO]
    notes = note(b"CORE", 1, bytes(336)) + note(b"VMCOREINFO", 0, "\n".join([*lines, ""]).encode())
    memory = {**pages, base: bytes(own), array: bytes(structs)}
    return core([Load(phys, data, len(data)) for phys, data in runs_of(memory)], notes)


RELEASE = "6.18.15"
KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""Where x86_64 maps its text."""
ANON = 1
"""The bit of a mapping that makes a page anonymous (PAGE_MAPPING_ANON)."""
LRU, SWAPBACKED = 1 << 5, 1 << 17
PAGE_KINDS = {
    "cache": (LRU, PAGE_OFFSET, 0xFFFFFFFF, 1),
    "user": (LRU | SWAPBACKED, PAGE_OFFSET | ANON, 0xFFFFFFFF, 1),
    "free": (0, 0, 0xFFFFFF7F, 0),
}
"""Kind -> flags, mapping, _mapcount, _refcount of its `struct page`."""
VMCOREINFO = [
    "PAGESIZE=4096",
    "CRASHTIME=1764518400",
    "KERNELOFFSET=0",
    *(f"SIZE({name})={n}" for name, n in {"page": 64, "pglist_data": 6400, "zone": 1728, "free_area": 104}.items()),
    *(f"SIZE({name})={n}" for name, n in {"list_head": 16, "nodemask_t": 8}.items()),
    "OFFSET(uts_namespace.name)=0",
    *(f"OFFSET(page.{name})={n}" for name, n in {"flags": 0, "lru": 8, "compound_head": 8, "mapping": 24}.items()),
    *(f"OFFSET(page.{name})={n}" for name, n in {"private": 40, "_mapcount": 48, "_refcount": 52}.items()),
    *(f"OFFSET(pglist_data.{name})={n}" for name, n in {"node_zones": 0, "nr_zones": 5248, "node_id": 5280}.items()),
    *(f"OFFSET(pglist_data.{name})={n}" for name, n in {"node_start_pfn": 5256, "node_spanned_pages": 5272}.items()),
    *(f"OFFSET(zone.{name})={n}" for name, n in {"free_area": 192, "vm_stat": 1472, "spanned_pages": 136}.items()),
    "OFFSET(free_area.free_list)=0",
    "OFFSET(list_head.next)=0",
    "OFFSET(list_head.prev)=8",
    "LENGTH(zone.free_area)=11",
    "LENGTH(free_area.free_list)=6",
    *(f"NUMBER({name})={n}" for name, n in {"NR_FREE_PAGES": 0, "PG_lru": 5, "PG_private": 14, "PG_slab": 9}.items()),
    *(f"NUMBER({name})={n}" for name, n in {"PG_swapcache": 10, "PG_swapbacked": 17, "PG_hwpoison": 22}.items()),
    "NUMBER(PG_head_mask)=64",
    "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-129",
    "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)=-257",
    "NUMBER(phys_base)=0",
    "NUMBER(KERNEL_IMAGE_SIZE)=1073741824",
    "NUMBER(pgtable_l5_enabled)=0",
]


FORMS = ("kdump", "flat", "elf", "unmarked-elf", "lime")
MARKED = ("kdump", "flat", "elf")
"""Forms that tell what was left out from what is no RAM."""


def dump(
    pages: dict[int, bytes],
    dropped: Collection[int],
    form: str,
    *,
    level: int = 31,
    machine: str = "x86_64",
    notes: bytes = b"",
) -> bytes:
    """A dump of `pages`, by address, without those at `dropped`."""
    size = len(next(iter(pages.values())))
    kept = {phys: page for phys, page in pages.items() if phys not in dropped}
    numbers = {"x86_64": 62, "aarch64": 183}
    if form in ("kdump", "flat"):
        file = kdump(kept, block=size, machine=machine, ram=pages, level=level)
        return flatten(file) if form == "flat" else file
    if form == "lime":
        return lime(runs_of(kept))
    loads = []
    for phys, data in runs_of(kept if form == "unmarked-elf" else pages):
        at, end = phys, phys + len(data)
        while at < end:
            # What is in the file, then what is not.
            here = at
            while here < end and here in kept:
                here += size
            gone = here
            while gone < end and gone not in kept:
                gone += size
            loads.append(Load(at, data[at - phys : here - phys], gone - at))
            at = gone
    return core(loads, notes or note(b"CORE", 1, bytes(8)), numbers[machine])
