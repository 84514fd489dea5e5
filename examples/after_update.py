"""Makes, from a capture of a handover, the memory of the kernel that booted from it and crashed: for docs/vmcore.md.

    python examples/after_update.py handover.elf crashed.elf

The kernel gave the pages of the map and of LUO's lists back early in boot, and used them again; here they are noise. It
has a root FDT of its own for the next handover. All other pages stay as they were left to it.
"""

import random
import struct
import sys
from pathlib import Path

import kho

source, target = sys.argv[1:]
old = kho.open(source)
noise = random.Random(7)
given_back = old.map_nodes + [(phys, nbytes) for _, phys, nbytes in old.luo.blocks]
for session in old.luo.sessions.values():
    given_back += session.blocks

# The memory of the next handover's root lies above all that was handed over.
start, size = old.ranges[0][0], old.ranges[-1][0] + old.ranges[-1][1] - old.ranges[0][0]
above = -(-(start + size) // (1 << 20)) << 20
arena = kho.Arena([(above, 64 << 20)], scratch="4M,4M,4M")
out = kho.Outgoing(arena, old.compatible)
out.set_kexec_metadata("7.3.4", old.metadata.kexec_count + 1)
out.add_luo()
new = kho.Incoming(arena, out.finalize())

pieces = [(phys, bytearray(old.read(phys, nbytes))) for phys, nbytes in old.ranges]
for phys, nbytes in given_back:
    begin, piece = next((at, data) for at, data in pieces if at <= phys < at + len(data))
    piece[phys - begin : phys - begin + nbytes] = noise.randbytes(nbytes)
pieces += [(phys, bytearray(new.read(phys, nbytes))) for phys, nbytes in new.ranges]

with Path(target).open("wb") as file:
    at = 64 + 56 * len(pieces)
    header = struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(pieces), 0, 0, 0)
    file.write(b"\x7fELF\2\1\1".ljust(16, b"\0") + header)
    for phys, data in pieces:
        file.write(struct.pack("<IIQQQQQQ", 1, 7, at, 0, phys, len(data), len(data), 0))
        at += len(data)
    for _, data in pieces:
        for begin in range(0, len(data), 4096):
            page = data[begin : begin + 4096]
            if any(page):
                file.write(page)
            else:
                file.seek(len(page), 1)  # a hole
    file.truncate(at)
