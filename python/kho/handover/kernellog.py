"""The kernel log that a dump holds: the messages in the printk ring buffer of the machine that was dumped.

VMCOREINFO names the ring buffer and the layout of its structures (kernel/printk/printk_ringbuffer.h, from Linux 5.10
on), so that no symbols are needed. Filters keep it, because it is the kernel's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import KhoError
from .symbols.space import AddressSpace
from .symbols.vmcoreinfo import Readable, Vmcoreinfo

__all__ = ["kernel_log"]

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


def kernel_log(memory: Readable) -> str | None:
    """Return the kernel log in a dump, a line per message, with time stamps as dmesg prints them.

    Returns: None without VMCOREINFO, or if the ring buffer is not in the dump, malformed or larger than 16 MiB; at most
    `MOST_TEXT` characters, the oldest. Records may overlap in a malformed one, and still no more is returned.
    """
    try:
        info = Vmcoreinfo(memory.vmcoreinfo)
        return "".join(_records(AddressSpace(memory, info), info))
    except (KhoError, LookupError):
        return None


def _word(data: bytes, at: int, nbytes: int = 8) -> int:
    if not 0 <= at <= len(data) - nbytes:
        raise LookupError(at)
    return int.from_bytes(data[at : at + nbytes], "little")


def _records(space: AddressSpace, info: Vmcoreinfo) -> Iterator[str]:
    """Yield the lines of the log, oldest first. Raises: LookupError, KhoError for what is absent or malformed."""

    def offset(name: str) -> int:
        found = info.offset(name)
        if found is None:
            raise LookupError(name)
        return found

    def size(name: str) -> int:
        found = info.size(name)
        if found is None or not 0 < found <= 512:
            raise LookupError(name)
        return found

    pointer = space.read(info.symbol_value("prb"), 8)
    ring = space.read(_word(pointer, 0), size("printk_ringbuffer"))
    descs_at, text_at = offset("printk_ringbuffer.desc_ring"), offset("printk_ringbuffer.text_data_ring")
    count_bits = _word(ring, descs_at + offset("prb_desc_ring.count_bits"), 4)
    bits = _word(ring, text_at + offset("prb_data_ring.size_bits"), 4)
    if count_bits > COUNT_BITS or bits > SIZE_BITS:
        raise LookupError(count_bits, bits)
    count, nbytes = 1 << count_bits, 1 << bits
    each, each_info = size("prb_desc"), size("printk_info")
    descs_addr = _word(ring, descs_at + offset("prb_desc_ring.descs"))
    infos_addr = _word(ring, descs_at + offset("prb_desc_ring.infos"))
    text_addr = _word(ring, text_at + offset("prb_data_ring.data"))
    tail, head = (_word(ring, descs_at + offset(f"prb_desc_ring.{name}")) for name in ("tail_id", "head_id"))
    state, block = offset("prb_desc.state_var"), offset("prb_desc.text_blk_lpos")
    begin_at, next_at = block + offset("prb_data_blk_lpos.begin"), block + offset("prb_data_blk_lpos.next")
    stamp_at, length_at = offset("printk_info.ts_nsec"), offset("printk_info.text_len")
    ids = (1 << 62) - 1
    number, end, left = 0, min(((head - tail) & ids) + 1, count), MOST_TEXT
    while number < end:
        slot = (tail + number) & (count - 1)
        here = min(WINDOW, end - number, count - slot)
        descs = space.read(descs_addr + slot * each, here * each)
        infos = space.read(infos_addr + slot * each_info, here * each_info) if any(descs) else b""
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
            length = max(min(_word(infos, at * each_info + length_at, 2), nbytes - start), 0)
            seconds, rest = divmod(_word(infos, at * each_info + stamp_at), 1_000_000_000)
            text = space.read(text_addr + start, length) if length else b""
            for line in text.decode("utf-8", "replace").split("\n"):
                yield (shown := f"[{seconds:5}.{rest // 1000:06}] {line}\n")
                left -= len(shown)
                if left <= 0:
                    return
        number += here
