"""A million folios scattered over a terabyte are handed to another process through a memfd or a file."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import kho

from images import GIB, MIB, TIB

P = 4096
STAMP = struct.Struct("<QQ")
LIMIT = 120.0
"""Maximum user CPU time, in seconds, of this process and the next owner together.

System time is not included: it depends on how fast the kernel allocates and clears pages. Neither is time spent waiting
for a CPU. The limit detects errors of complexity and is not a measurement: on a 2-core machine with a load of 12 the
larger case takes 55 s, the smaller one 1.4 s. The test prints the time.
"""


def user_time() -> float:
    """Return the user CPU time, in seconds, of this process and of the child processes that it waited for."""
    times = os.times()
    return times.user + times.children_user


NEXT_OWNER = """
import struct, sys, time
import numpy as np
import kho
began = time.monotonic()
arena = kho.Arena.open(sys.argv[1] if len(sys.argv) == 2 else int(sys.argv[2]))
inc = kho.Incoming(arena)
took_over = time.monotonic() - began
assert arena.allocated_pages == 0
folios = np.asarray(inc.folios)
stamped = struct.Struct("<QQ")
wrong = 0
for phys, order in zip(folios["phys"].tolist(), folios["order"].tolist()):
    folio = inc.restore_folio(phys)
    if phys != inc.fdt_phys:
        wrong += stamped.unpack_from(folio) != (phys, order)
assert not len(inc.unrestored())
assert inc.nr_restored == inc.nr_folios == len(folios)
assert arena.allocated_pages == int((1 << folios["order"].astype(np.uint64)).sum())
try:
    inc.restore_folio(int(folios["phys"][12345]))
except kho.NotRestorableError:
    print(inc.nr_folios, inc.bitmap_bytes, wrong)
print(f"take over {took_over:.2f} s, restore and check {time.monotonic() - began - took_over:.2f} s", file=sys.stderr)
"""


def random_folios(seed: int, count: int) -> list[tuple[int, int]]:
    """Folios of orders 0 to 4 in random order, 16 in each of many 2 MiB blocks: page tables stay small."""
    chosen = random.Random(seed)
    blocks = chosen.sample(range(1, (TIB - 64 * GIB) // (2 * MIB)), count // 16)
    slots = [block * 2 * MIB + slot * 16 * P for block in blocks for slot in chosen.sample(range(32), 16)]
    chosen.shuffle(slots)
    return [(phys, min(int(chosen.expovariate(1)), 4)) for phys in slots]


@pytest.mark.parametrize(
    ("backing", "count", "bitmap_bytes"),
    [("memfd", 1 << 20, 4096), ("file", 1 << 17, 512)],  # each folio takes a page of memory or of the disk
)
def test_the_folios_of_a_terabyte_reach_another_process(
    backing: str, count: int, bitmap_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "arena.elf"
    folios = random_folios(bitmap_bytes, count)
    computed, began = user_time(), time.monotonic()
    arena = kho.Arena([(0, TIB)], backing="memfd" if backing == "memfd" else path, scratch=[(TIB - 32 * GIB, 16 * GIB)])
    out = kho.Outgoing(arena, bitmap_bytes=bitmap_bytes, fdt_phys=TIB - 4 * GIB)
    for phys, order in folios:
        folio = arena.alloc_at(phys, order)
        arena.write(phys, STAMP.pack(phys, order))
        out.preserve_folio(folio)
    assert out.nr_folios == count + 1
    preserved = time.monotonic() - began
    out.finalize()
    finalized = time.monotonic() - began - preserved
    done = subprocess.run(
        [sys.executable, "-c", NEXT_OWNER, *([str(path)] if backing == "file" else ["fd", str(arena.fileno())])],
        capture_output=True,
        text=True,
        pass_fds=[arena.fileno()],
    )
    computed = user_time() - computed
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{count + 1} {bitmap_bytes} 0\n"
    with capsys.disabled():
        print(
            f" {backing}: computed {computed:.1f} s; preserve {preserved:.2f} s, finalize {finalized:.3f} s, ", end=""
        )
        print(done.stderr.strip(), end="")
    assert computed < LIMIT
    expected = np.array(sorted([*folios, (out.fdt_phys, 0)]), dtype=np.uint64)
    found = np.asarray(out.folios())
    assert np.array_equal(found["phys"], expected[:, 0])
    assert np.array_equal(found["order"], expected[:, 1])
