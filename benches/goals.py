"""What is to be reached, as ratios within one run: the rows of the table, and by how much over whom."""

from __future__ import annotations

from typing import NamedTuple

V1, BEST, V4 = "twin v1", "best C", "twin v4"
"""`best C` is the fastest of the twin's builds in that row."""


class Goal(NamedTuple):
    """How many times as fast as the peer, whose time may be in another row; divided by what one other peer of the row
    is to another, if that tells what the machine does to such a ratio.
    """

    peer: str
    times: float
    row: tuple[str, str] | None = None
    machine: tuple[str, str] | None = None


ONE = "preserve, one call each"
BATCH = "preserve, batch"
THREADS = "preserve, per thread"
PYTHON = "Python W1"

SCALES = Goal("one thread", 0.9, machine=("flat bitmap, one thread", "flat bitmaps"))
"""Two threads keep nine tenths of what two of them on two flat bitmaps keep."""

GOALS: dict[tuple[str, str], list[Goal]] = {
    ("W1", ONE): [Goal(V1, 5), Goal(BEST, 2)],
    ("W1", BATCH): [Goal(V1, 7, ("W1", ONE)), Goal(BEST, 2.5, ("W1", ONE))],
    ("W1", "unpreserve"): [Goal(V1, 6)],
    ("W1", "iterate into an array"): [Goal(V1, 5)],
    ("W1", "serialize"): [Goal(V1, 8)],
    ("W1", "mark on take-over"): [Goal(V1, 10)],
    ("W1", "restore once, random"): [Goal(V1, 3)],
    ("W1", THREADS): [SCALES],
    ("W1", f"{THREADS}, orders of one tracker"): [SCALES],
    ("W2", ONE): [Goal(V1, 7)],
    ("W2", "as a range kept order-0"): [Goal(V1, 1000, ("W2", ONE))],
    ("W3", ONE): [Goal(V1, 4)],
    ("W3", BATCH): [Goal(V1, 4, ("W3", ONE))],
    (PYTHON, "preserve in bulk, unsorted"): [Goal("numpy", 3), Goal("pyroaring", 30), Goal("set", 20)],
    (PYTHON, "preserve in bulk, sorted"): [Goal("pyroaring", 5)],
    (PYTHON, "pfns()"): [Goal("pyroaring", 1)],
    (PYTHON, "folios()"): [Goal("pyroaring", 1)],
}
"""The library's time is the cell `kho` of the row."""
