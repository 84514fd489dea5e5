"""Hand memory over from one process to the next: preserve, serialize, start a successor, restore, compare.

The two processes share a memory file and one number, as two kernels share RAM and one boot parameter.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys

import kho

FOLIOS = 200


def digest(folio: kho.Folio) -> bytes:
    """Digest a folio's bytes."""
    return hashlib.sha256(memoryview(folio)).digest()


def old_kernel() -> None:
    """Fill memory, preserve it, and start the successor."""
    arena = kho.Arena("1T", backing="memfd", scratch="16M,32M,16M")
    print(f"arena      {arena.nbytes >> 40} TiB of address space, {arena.free_pages} free pages")
    out = kho.Outgoing(arena, abi="kho-v1")
    digests = []
    for i in range(FOLIOS):
        folio = arena.alloc(order=i % 5)
        memoryview(folio)[:] = bytes([i]) * folio.nbytes
        out.preserve_folio(folio)
        digests.append(folio.phys.to_bytes(8, "little") + digest(folio))
    out.add_subtree("digests", b"".join(digests))
    fdt_phys = out.finalize()
    print(f"old        {out.nr_folios} folios, {out.preserved_bytes >> 10} KiB preserved; root FDT at {fdt_phys:#x}")
    sys.stdout.flush()
    fd = arena.fileno()
    subprocess.run([sys.executable, __file__, str(fd)], check=True, pass_fds=[fd])


def new_kernel(fd: int) -> None:
    """Take the memory over and check the contents of every folio."""
    arena = kho.Arena.open(fd)
    inc = kho.Incoming(arena)
    print(f"new        {inc.compatible}: {inc.nr_folios} folios inherited, {len(inc.unrestored())} to restore")
    subtree = inc.subtrees["digests"].phys
    table = bytes(inc.restore_folio(subtree))
    for at in range(0, FOLIOS * 40, 40):
        phys = int.from_bytes(table[at : at + 8], "little")
        folio = inc.restore_folio(phys)
        if digest(folio) != table[at + 8 : at + 40]:
            sys.exit(f"the folio at {phys:#x} is not what it was")
    print(f"restored   {inc.nr_restored} folios, contents as they were; {len(inc.unrestored())} left reserved")
    try:
        inc.restore_folio(subtree)
    except kho.NotRestorableError as error:
        print(f"once only  {error}")


if len(sys.argv) > 1:
    new_kernel(int(sys.argv[1]))
else:
    old_kernel()
