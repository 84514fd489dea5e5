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
COUNT_BITS, SIZE_BITS = 19, 24
"""The largest ring that is read: binary logarithms of its records, and of its bytes of text."""
MOST_TEXT = 1 << 23
"""Characters of the log that are returned, the oldest ones, with their time stamps."""
WINDOW = 1024
"""Records that are read at once."""
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

    Returns: None without VMCOREINFO, or if the ring buffer is not in the dump, malformed or larger than 16 MiB; at most
    `MOST_TEXT` characters, the oldest. Records may overlap in a malformed one, and still no more is returned.
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
        if not 0 < found <= 512:
            raise ValueError(name)
        return found

    pointer = memory.read(_phys(memory, _number(memory, "SYMBOL(prb)", 16)), 8)
    ring = memory.read(_phys(memory, _word(pointer, 0)), size("printk_ringbuffer"))
    descs_at, text_at = offset("printk_ringbuffer.desc_ring"), offset("printk_ringbuffer.text_data_ring")
    count_bits = _word(ring, descs_at + offset("prb_desc_ring.count_bits"), 4)
    bits = _word(ring, text_at + offset("prb_data_ring.size_bits"), 4)
    if count_bits > COUNT_BITS or bits > SIZE_BITS:
        raise ValueError(count_bits, bits)
    count, nbytes = 1 << count_bits, 1 << bits
    each, info = size("prb_desc"), size("printk_info")
    descs_phys, infos_phys, text_phys = (
        _phys(memory, _word(ring, at + offset(name)))
        for at, name in (
            (descs_at, "prb_desc_ring.descs"),
            (descs_at, "prb_desc_ring.infos"),
            (text_at, "prb_data_ring.data"),
        )
    )
    tail, head = (_word(ring, descs_at + offset(f"prb_desc_ring.{name}")) for name in ("tail_id", "head_id"))
    state, block = offset("prb_desc.state_var"), offset("prb_desc.text_blk_lpos")
    begin_at, next_at = block + offset("prb_data_blk_lpos.begin"), block + offset("prb_data_blk_lpos.next")
    stamp_at, length_at = offset("printk_info.ts_nsec"), offset("printk_info.text_len")
    ids = (1 << 62) - 1
    number, end, left = 0, min(((head - tail) & ids) + 1, count), MOST_TEXT
    while number < end:
        slot = (tail + number) & (count - 1)
        here = min(WINDOW, end - number, count - slot)
        descs = memory.read(descs_phys + slot * each, here * each)
        infos = memory.read(infos_phys + slot * info, here * info) if any(descs) else b""
        for at in range(here if infos else 0):
            value = _word(descs, at * each + state)
            begin, after = _word(descs, at * each + begin_at), _word(descs, at * each + next_at)
            if (
                value & ids != (tail + number + at) & ids
                or value >> 62 not in (COMMITTED, FINALIZED)
                or begin & NO_DATA
            ):
                continue
            start = 0 if begin >> bits != (after - 1) >> bits else begin & (nbytes - 1)  # a block never wraps around
            start += 8  # the id of its record
            length = max(min(_word(infos, at * info + length_at, 2), nbytes - start), 0)
            seconds, rest = divmod(_word(infos, at * info + stamp_at), 1_000_000_000)
            text = memory.read(text_phys + start, length) if length else b""
            for line in text.decode("utf-8", "replace").split("\n"):
                yield (shown := f"[{seconds:5}.{rest // 1000:06}] {line}\n")
                left -= len(shown)
                if left <= 0:
                    return
        number += here
