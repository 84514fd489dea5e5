"""The kernel log that a dump holds: the messages in the printk ring buffer of the machine that was dumped.

VMCOREINFO names the ring buffer and the layout of its structures (kernel/printk/printk_ringbuffer.h, from Linux 5.10
on), so that no symbols are needed. Filters keep it, because it is the kernel's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ..errors import KhoError

__all__ = ["kernel_log"]

IMAGE = 0xFFFFFFFF80000000
"""__START_KERNEL_map of x86_64: the kernel's image is mapped from here on."""
PRESENT, HUGE, FRAME = 1, 1 << 7, 0x000FFFFFFFFFF000
"""Bits of an entry of x86's page tables: present, large page, address."""
MOST_RECORDS, MOST_TEXT = 1 << 20, 1 << 28
COMMITTED, FINALIZED = 1, 2
"""States of a record that can be read."""
NO_DATA = 1
"""Set in the position of a record without text."""


class Dump(Protocol):
    """A memory that was dumped: `kho.Memory` and `kho.Incoming`."""

    def read(self, phys: int, n: int) -> bytes:
        """Copy memory."""

    def vmcoreinfo(self, name: str) -> str | None:
        """Return the value of a line of VMCOREINFO."""


def kernel_log(memory: Dump) -> str | None:
    """Return the kernel log in a dump, a line per message, with time stamps as dmesg prints them.

    Returns: None without VMCOREINFO, or if the ring buffer is not in the dump or malformed. Time and memory are bounded
    by the size of the buffer, and that by `MOST_TEXT`.
    """
    try:
        return "".join(_records(memory))
    except (KhoError, LookupError, ValueError, OverflowError):
        return None


def _number(memory: Dump, name: str, base: int = 10) -> int:
    """Return a number of VMCOREINFO. Raises: LookupError if the line is absent, ValueError if it is not a number."""
    text = memory.vmcoreinfo(name)
    if text is None:
        raise LookupError(name)
    return int(text, base)


def _word(data: bytes, at: int, nbytes: int = 8) -> int:
    if not 0 <= at <= len(data) - nbytes:
        raise LookupError(at)
    return int.from_bytes(data[at : at + nbytes], "little")


def _phys(memory: Dump, virt: int) -> int:
    """Translate a virtual address of the kernel: by the place of its image, otherwise by x86's page tables."""
    if memory.vmcoreinfo("NUMBER(kimage_voffset)") is not None:  # arm64: the buffer is in the image
        return (virt - _number(memory, "NUMBER(kimage_voffset)", 0)) & (1 << 64) - 1
    base = _number(memory, "NUMBER(phys_base)")
    if virt >= IMAGE:
        return virt - IMAGE + base
    table = _number(memory, "SYMBOL(swapper_pg_dir)", 16) - IMAGE + base
    levels = 5 if memory.vmcoreinfo("NUMBER(pgtable_l5_enabled)") == "1" else 4
    for level in range(levels - 1, -1, -1):
        shift = 12 + 9 * level
        entry = _word(memory.read(table + 8 * (virt >> shift & 511), 8), 0)
        if not entry & PRESENT:
            raise LookupError(virt)
        if level == 0 or (entry & HUGE and level < 3):
            return (entry & FRAME & -(1 << shift)) | (virt & (1 << shift) - 1)
        table = entry & FRAME
    raise LookupError(virt)


def _records(memory: Dump) -> Iterator[str]:
    """Yield the lines of the log, oldest first."""

    def offset(name: str) -> int:
        return _number(memory, f"OFFSET({name})")

    def size(name: str) -> int:
        found = _number(memory, f"SIZE({name})")
        if not 0 < found <= 4096:
            raise ValueError(name)
        return found

    pointer = memory.read(_phys(memory, _number(memory, "SYMBOL(prb)", 16)), 8)
    ring = memory.read(_phys(memory, _word(pointer, 0)), size("printk_ringbuffer"))
    descs_at, text_at = offset("printk_ringbuffer.desc_ring"), offset("printk_ringbuffer.text_data_ring")
    count = 1 << _word(ring, descs_at + offset("prb_desc_ring.count_bits"), 4)
    bits = _word(ring, text_at + offset("prb_data_ring.size_bits"), 4)
    nbytes = 1 << bits
    if count > MOST_RECORDS or nbytes > MOST_TEXT:
        raise ValueError(count, nbytes)
    each, info = size("prb_desc"), size("printk_info")
    descs = memory.read(_phys(memory, _word(ring, descs_at + offset("prb_desc_ring.descs"))), count * each)
    infos = memory.read(_phys(memory, _word(ring, descs_at + offset("prb_desc_ring.infos"))), count * info)
    text = memory.read(_phys(memory, _word(ring, text_at + offset("prb_data_ring.data"))), nbytes)
    tail, head = (_word(ring, descs_at + offset(f"prb_desc_ring.{name}")) for name in ("tail_id", "head_id"))
    state, block = offset("prb_desc.state_var"), offset("prb_desc.text_blk_lpos")
    begin_at, next_at = block + offset("prb_data_blk_lpos.begin"), block + offset("prb_data_blk_lpos.next")
    stamp_at, length_at = offset("printk_info.ts_nsec"), offset("printk_info.text_len")
    ids = (1 << 62) - 1
    for number in range(min(((head - tail) & ids) + 1, count)):
        ident = (tail + number) & ids
        at = ident & (count - 1)
        value = _word(descs, at * each + state)
        begin, after = _word(descs, at * each + begin_at), _word(descs, at * each + next_at)
        if value & ids != ident or value >> 62 not in (COMMITTED, FINALIZED) or begin & NO_DATA:
            continue
        start = 0 if begin >> bits != (after - 1) >> bits else begin & (nbytes - 1)  # a block never wraps around
        start += 8  # the id of its record
        length = min(_word(infos, at * info + length_at, 2), nbytes - start)
        seconds, rest = divmod(_word(infos, at * info + stamp_at), 1_000_000_000)
        for line in text[start : start + max(length, 0)].decode("utf-8", "replace").split("\n"):
            yield f"[{seconds:5}.{rest // 1000:06}] {line}\n"
