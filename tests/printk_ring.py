"""A printk ring buffer in memory, with the VMCOREINFO that describes it: what `handover/kernellog` reads in a dump."""

from __future__ import annotations

import struct

IMAGE = 0xFFFFFFFF80000000
PAGE = 4096
FINALIZED = 2 << 62
PRB, RING, DESCS, INFOS = 0x10, 0x40, 0x1000, 0x3000
"""Offsets in the kernel's image."""


def vmcoreinfo(
    release: str = "7.0.0-14-generic", *, base: int = 0x10000000, crashed: bool = True, more: str = ""
) -> bytes:
    """Write VMCOREINFO with the offsets of Linux 7.0, for an image at `base`."""
    lines = [f"OSRELEASE={release}", "PAGESIZE=4096", f"NUMBER(phys_base)={base}", f"SYMBOL(prb)={IMAGE + PRB:x}"]
    lines += [] if "swapper_pg_dir" in more else [f"SYMBOL(swapper_pg_dir)={IMAGE:x}"]
    for name, nbytes in (("printk_ringbuffer", 88), ("prb_desc", 24), ("printk_info", 112)):
        lines.append(f"SIZE({name})={nbytes}")
    offsets = {
        "printk_ringbuffer.desc_ring": 0,
        "printk_ringbuffer.text_data_ring": 48,
        "prb_desc_ring.count_bits": 0,
        "prb_desc_ring.descs": 8,
        "prb_desc_ring.infos": 16,
        "prb_desc_ring.head_id": 24,
        "prb_desc_ring.tail_id": 32,
        "prb_desc.state_var": 0,
        "prb_desc.text_blk_lpos": 8,
        "prb_data_blk_lpos.begin": 0,
        "prb_data_blk_lpos.next": 8,
        "printk_info.ts_nsec": 8,
        "printk_info.text_len": 16,
        "prb_data_ring.size_bits": 0,
        "prb_data_ring.data": 8,
    }
    lines += [f"OFFSET({name})={at}" for name, at in offsets.items()]
    lines += [f"CRASHTIME={1796065898}"] if crashed else []
    return ("\n".join(lines) + "\n" + more).encode()


def pages(
    texts: list[str], *, base: int = 0x10000000, count_bits: int = 6, text_bits: int = 13, first: int = 0, room: int = 0
) -> dict[int, bytes]:
    """Write a ring with these messages; returns the content of each page.

    Args: first: the id of the oldest record. room: the position of the oldest text in the ring.
    """
    count, size = 1 << count_bits, 1 << text_bits
    text_at = INFOS + -(-count * 112 // PAGE) * PAGE
    image = bytearray(text_at + size)
    descs, infos, data = bytearray(count * 24), bytearray(count * 112), bytearray(size)
    at = room
    for number, text in enumerate(texts):
        ident, encoded = first + number, text.encode()
        block = 8 + -(-len(encoded) // 8) * 8
        begin = at
        start = begin & (size - 1)
        if start + block > size:  # the block is at the beginning of the ring, and the rest of its end is unused
            after, start = (begin // size + 1) * size + block, 0
        else:
            after = begin + block
        struct.pack_into("<Q", data, start, ident)
        data[start + 8 : start + 8 + len(encoded)] = encoded
        struct.pack_into("<QQQ", descs, (ident & (count - 1)) * 24, FINALIZED | ident, begin, after)
        struct.pack_into("<QQH", infos, (ident & (count - 1)) * 112, ident, number * 1_000_000_000, len(encoded))
        at = after
    struct.pack_into("<Q", image, PRB, IMAGE + RING)
    last = first + len(texts) - 1
    struct.pack_into("<IIQQQQ", image, RING, count_bits, 0, IMAGE + DESCS, IMAGE + INFOS, last, first)
    struct.pack_into("<IIQ", image, RING + 48, text_bits, 0, IMAGE + text_at)
    image[DESCS : DESCS + len(descs)] = descs
    image[INFOS : INFOS + len(infos)] = infos
    image[text_at : text_at + size] = data
    return {base + at: bytes(image[at : at + PAGE]).ljust(PAGE, b"\0") for at in range(0, len(image), PAGE)}
