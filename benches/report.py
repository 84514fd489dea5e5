"""One table of ratios: what `make bench` prints.

    python benches/report.py [--rust FILE] [--instructions FILE] [--folios N] [--rounds N] [--json FILE]

Measures the Python API next to set, pyroaring, bitarray and numpy, FDTs next to fdt and pylibfdt; takes the samples of
the Rust half from FILE (`cargo bench --manifest-path benches/Cargo.toml`), and instructions from what
`benches/guard --json` wrote, if anything. Peers that are not installed are left out. A goal is a ratio of medians of
one run; see benches/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import python_rows
from goals import BEST, GOALS


class Cell(NamedTuple):
    """One peer in one row: nanoseconds a unit."""

    median: float
    low: float
    high: float
    samples: int
    bytes: float | None

    @classmethod
    def of(cls, cell: dict[str, Any]) -> Cell:
        """The quarter of the samples below and the one above are the spread."""
        times = sorted(cell["samples"])
        quarter = len(times) // 4
        return cls(statistics.median(times), times[quarter], times[-1 - quarter], len(times), cell["bytes"])


Row = tuple[str, str]


def table(cells: list[dict[str, Any]]) -> dict[Row, tuple[str, dict[str, Cell]]]:
    """{(workload, operation): (unit, {peer: cell})}, in the order of the cells."""
    rows: dict[Row, tuple[str, dict[str, Cell]]] = {}
    for cell in cells:
        if cell["samples"]:
            _, peers = rows.setdefault((cell["workload"], cell["operation"]), (cell["unit"], {}))
            peers[cell["peer"]] = Cell.of(cell)
    return rows


def peer_of(peers: dict[str, Cell], name: str) -> Cell | None:
    """A peer of a row; `best C` is whichever of the twin's builds was fastest."""
    if name == BEST:
        twins = [cell for peer, cell in peers.items() if peer.startswith("twin")]
        return min(twins, key=lambda cell: cell.median, default=None)
    return peers.get(name) or peers.get(f"kho, {name}")


def judged(rows: dict[Row, tuple[str, dict[str, Cell]]]) -> list[dict[str, Any]]:
    """Every goal whose cells were all measured: ratio reached, and whether that is enough."""
    found = []
    for row, goals in GOALS.items():
        cells = rows.get(row, ("", {}))[1]
        ours = cells.get("kho")
        for goal in goals:
            peer = peer_of(rows.get(goal.row or row, ("", {}))[1], goal.peer)
            one, other = (peer_of(cells, name) for name in goal.machine or ("kho", "kho"))
            if ours and peer and one and other:
                ratio = peer.median / ours.median / (one.median / other.median)
                found.append(
                    {"workload": row[0], "operation": row[1], "peer": goal.peer, "goal": goal.times, "ratio": ratio}
                    | {"second": " to ".join(goal.machine or ()), "met": ratio >= goal.times}
                )
    return found


def number(value: float) -> str:
    """Three digits that count."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def text(result: dict[str, Any]) -> str:
    """The table: a line per peer and row, what its goals say under it; floors; the goals in sum."""
    rows = table(result["cells"])
    goals = {(g["workload"], g["operation"], g["peer"]): g for g in result["goals"]}
    head = f"{'':26}{'ns':>10}{'spread':>18}{'x kho':>9}{'bytes':>8}"
    lines = [
        f"{result['folios']:,} folios in W1; medians, the middle half of the samples, bytes of metadata a folio",
        "",
    ]
    for (workload, operation), (unit, peers) in rows.items():
        floor = workload == "floor"
        lines += [f"{workload}: {operation}, ns a {unit}" + ("" if floor else f"\n{head}")]
        ours = peers.get("kho")
        for peer, cell in peers.items():
            ratio = f"{cell.median / ours.median:.2f}" if ours and peer != "kho" else ""
            size = "" if cell.bytes is None else f"{cell.bytes:.2f}"
            spread = f"{number(cell.low)}-{number(cell.high)}"
            lines.append(f"  {peer:24}{number(cell.median):>10}{spread:>18}{ratio:>9}{size:>8}")
        for (name, what, peer), goal in goals.items():
            if (name, what) == (workload, operation):
                sign = "met" if goal["met"] else "MISSED"
                second = f", divided by {goal['second']}" if goal["second"] else ""
                lines.append(f"  goal: {goal['goal']:g}x {peer}{second}; reached {number(goal['ratio'])}x, {sign}")
        if not floor:
            lines.append("")
    if result["instructions"]:
        lines += ["instructions, counted by callgrind"]
        lines += [f"  {path:24}{it['count']:>10.2f}  per {it['per']}" for path, it in result["instructions"].items()]
    met = sum(goal["met"] for goal in result["goals"])
    lines += ["", f"{met} of {len(result['goals'])} goals met"]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rust", type=Path, metavar="FILE", help="the samples of the Rust half")
    parser.add_argument(
        "--instructions", type=Path, metavar="FILE", help="instruction counts of benches/guard, if it is there"
    )
    parser.add_argument("--folios", type=int, help="folios of W1 (default: those of the Rust half, else 10,000,000)")
    parser.add_argument("--rounds", type=int, default=5, help="samples a cell (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every sample there")
    args = parser.parse_args()
    rust: dict[str, Any] = json.loads(args.rust.read_text()) if args.rust else {}
    folios = args.folios or int(rust.get("folios", 10_000_000))
    cells = [*rust.get("cells", []), *python_rows.cells(folios, args.rounds)]
    result = {**rust, "folios": folios, "python": sys.version.split()[0], "cells": cells}
    result["goals"] = judged(table(cells))
    counted = args.instructions and args.instructions.exists()
    result["instructions"] = json.loads(args.instructions.read_text()) if counted else {}
    print(text(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
