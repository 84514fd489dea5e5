"""Running out of memory for a list or a copy is an error, after which all objects stay usable."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("numpy")

HEAD = """
import resource
import numpy as np
import kho

def leave(mib):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (mib << 20), resource.RLIM_INFINITY))

"""
LISTS = """
scattered, mixed = kho.Tracker(), kho.Tracker()
scattered.preserve_many(np.arange(0, 1 << 25, 2))
mixed.preserve_many(np.arange(0, 12 << 20, 3))
mixed.preserve_many(np.arange(0, 12 << 20, 6), 1)
merged = np.asarray(mixed.folios())
arena = kho.Arena([(1 << 30, 64 << 20)])
out = kho.Outgoing(arena, "kho-v4")
address = arena.alloc(0)
leave(120)

numbers = np.broadcast_to(np.uint64(address.phys), 1 << 40)
octets = np.broadcast_to(np.uint8(0), 1 << 40)
writer = kho.fdt.Writer()
for what in (
    lambda: scattered.pfns(),
    lambda: scattered.folios(),
    lambda: scattered.runs(),
    lambda: scattered.extents(),
    lambda: out.preserve_many(numbers),
    lambda: scattered.preserve_many(np.arange(9), octets),
    lambda: scattered.preserve_many(np.arange(9), np.broadcast_to(np.int64(0), 1 << 40)),
    lambda: arena.write(address.phys, octets),
    lambda: out.add_subtree("x", octets),
    lambda: writer.property("x", octets),
):
    try:
        what()
    except kho.OutOfMemoryError as error:
        print(type(error).__name__, error)
    else:
        raise AssertionError

# There is memory for the list, but not for as much again to merge it in.
assert np.array_equal(np.asarray(mixed.folios()), merged)
assert scattered.preserve_many(np.arange(1, 9, 2)) == 4
assert scattered.rank(9) == 9
"""

UNSORTED = """
shuffled = np.random.default_rng(1).permutation(16 << 20) << 4
tracker = kho.Tracker()
tracker.preserve_run(0, 0, 1 << 28)
leave(16)
print(tracker.unpreserve_many(shuffled), tracker.preserve_many(shuffled))
"""


def test_out_of_memory_for_a_list_or_a_copy_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + LISTS], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said[0] == (
        "OutOfMemoryError 16777216 items of 8 bytes each are more than this process can have memory for; "
        "less at a time may do, of a tracker its runs or extents"
    )
    assert [line.split()[0] for line in said].count("OutOfMemoryError") == len(said)


def test_without_memory_to_sort_a_long_list_is_processed_unsorted() -> None:
    done = subprocess.run([sys.executable, "-c", HEAD + UNSORTED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(1 << 24)] * 2
