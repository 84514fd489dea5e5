"""One table of ratios: the tracker from Python beside set, pyroaring and a numpy packed bitmap.

    python benches/report.py [--pages N] [--rounds N] [--json FILE]

Every row does the same work on the same seeded pages; a cell is the median of the rounds in nanoseconds a page, and in
brackets how many times as long as kho that is. Peers that are not installed are left out. See benches/README.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kho import Tracker

try:
    import numpy as np
except ImportError:
    np = None  # type: ignore[assignment]
try:
    from pyroaring import BitMap
except ImportError:
    BitMap = None  # type: ignore[assignment,misc]

SPAN = 1 << 28  # pages of 4 KiB in 1 TiB
SEED = 20250401

Work = Callable[[], object]


def one_by_one(add: Callable[[int], object], pages: Iterable[int]) -> None:
    """What a caller's loop does: one Python call a page."""
    for page in pages:
        add(page)


def packed(pages: Any) -> Any:
    """A bitmap of the whole span: what numpy offers in place of a set."""
    bitmap = np.zeros(SPAN // 8, np.uint8)
    np.bitwise_or.at(bitmap, pages >> 3, np.left_shift(1, pages & 7).astype(np.uint8))
    return bitmap


def rows(n: int) -> dict[str, dict[str, Work]]:
    """{what is done: {who does it: how}} for `n` random pages of 1 TiB (W1)."""
    pages = random.Random(SEED).sample(range(SPAN), n)
    tracker, plain = Tracker(), set(pages)
    one_by_one(tracker.preserve, pages)
    table: dict[str, dict[str, Work]] = {
        "preserve, one call each": {
            "kho": lambda: one_by_one(Tracker().preserve, pages),
            "set": lambda: one_by_one(set[int]().add, pages),
        },
        "list every folio": {"kho": tracker.folios, "set": lambda: sorted(plain)},
    }
    table["iterate in Python"] = {"kho": lambda: sum(1 for _ in tracker), "set": lambda: sum(1 for _ in plain)}
    other, also = tracker.copy(), plain.copy()
    table["union of equals"] = {"kho": lambda: tracker | other, "set": lambda: plain | also}
    if np is not None:
        # numpy's annotations call an array a buffer from Python 3.12 on only.
        unsorted: Any = np.array(pages, np.uint64)
        in_order: Any = np.sort(unsorted)
        signed, bitmap = unsorted.astype(np.int64), packed(unsorted.astype(np.int64))
        table["preserve in bulk, unsorted"] = {
            "kho": lambda: Tracker().preserve_many(unsorted),
            "set": lambda: set(pages),
            "numpy": lambda: packed(signed),
        }
        table["preserve in bulk, sorted"] = {"kho": lambda: Tracker().preserve_many(in_order)}
        table["list every folio"]["numpy"] = lambda: np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))
    if BitMap is not None:
        roaring = BitMap(pages)
        table["preserve, one call each"]["pyroaring"] = lambda: one_by_one(BitMap().add, pages)
        table["list every folio"]["pyroaring"] = roaring.to_array
        table["iterate in Python"]["pyroaring"] = lambda: sum(1 for _ in roaring)
        twin = BitMap(pages)
        table["union of equals"]["pyroaring"] = lambda: roaring | twin
        if np is not None:
            narrow, narrow_in_order = unsorted.astype(np.uint32), in_order.astype(np.uint32)
            table["preserve in bulk, unsorted"]["pyroaring"] = lambda: BitMap(narrow)
            table["preserve in bulk, sorted"]["pyroaring"] = lambda: BitMap(narrow_in_order)
    return table


def floors(n: int) -> dict[str, Work]:
    """What no method can go below: a bare call a page, and copying the result of a listing."""
    listing = bytearray(16 * n)
    return {
        "a call that does nothing": lambda: one_by_one(id, range(n)),
        "copy 16 bytes a page": lambda: bytes(listing),
    }


def measure(work: Work, rounds: int) -> list[float]:
    """Nanoseconds of each round; what a round made is dropped outside of it."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        made = work()
        times.append(float(time.perf_counter_ns() - start))
        del made
    return times


def report(n: int, rounds: int) -> dict[str, Any]:
    """{"pages", "rounds", "floors", "rows"}; times are {"median", "min", "max"} in nanoseconds a page."""

    def cell(work: Work) -> dict[str, float]:
        times = [t / n for t in measure(work, rounds)]
        return {"median": statistics.median(times), "min": min(times), "max": max(times)}

    table = {what: {who: cell(work) for who, work in row.items()} for what, row in rows(n).items()}
    below = {what: cell(work) for what, work in floors(n).items()}
    return {"pages": n, "rounds": rounds, "floors": below, "rows": table}


def text(result: dict[str, Any]) -> str:
    """The table: who in columns, what in rows."""
    who = ["kho", "set", "pyroaring", "numpy"]
    lines = [f"{result['pages']:,} random pages of 1 TiB, medians of {result['rounds']} rounds, ns a page (x kho)", ""]
    lines.append(f"{'':28}" + "".join(f"{name:>20}" for name in who))
    for what, row in result["rows"].items():
        line = f"{what:28}"
        for name in who:
            median = row[name]["median"] if name in row else None
            ratio = "" if median is None or name == "kho" else f" ({median / row['kho']['median']:.1f}x)"
            line += f"{'-' if median is None else f'{median:.1f}{ratio}':>20}"
        lines.append(line)
    lines.append("")
    lines += [f"{'floor: ' + what:48}{cell['median']:.1f}" for what, cell in result["floors"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=int, default=1_000_000, help="random pages (default 1,000,000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take the median of (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every number there")
    args = parser.parse_args()
    result = report(args.pages, args.rounds)
    print(text(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
