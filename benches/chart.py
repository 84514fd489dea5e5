"""Two charts for docs/plan.md: what metadata costs by density, and how long a handover takes by size.

    python benches/chart.py [--out DIR] [--seconds N] [--json FILE]

overhead.svg is worked out by `kho.plan`, whose bytes tests hold against what is written; the same code draws the same
bytes. time.svg is measured: every marker is a run, and a size that would take more than --seconds has none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

from kho import KhoError
from kho.handover import mapdraw
from kho.sizing.plan import Group, plan
from kho.sizing.simulate import Simulation, simulate
from kho.text import size

mpl.use("Agg")
from matplotlib import pyplot as plt

KIB, GIB, TIB = 1 << 10, 1 << 30, 1 << 40
LAYOUTS = {
    "kho-v1-512": ("kho-v1, bitmaps of 512 bytes (6.16)", mapdraw.COLOURS["region"], "--"),
    "kho-v1": ("kho-v1, bitmaps of a page (6.18 to 7.0)", mapdraw.COLOURS["payload"], "-"),
    "kho-v4": ("kho-v4, radix tree (7.2 and 7.3)", mapdraw.COLOURS["unclaimed"], ":"),
}
FOLIO = {"size": 4 * KIB, "memory": TIB}
SIZES = (4 * KIB, 2 << 20)
STEPS = {
    "preserve": ("preserve", mapdraw.COLOURS["file"], "o"),
    "take over": ("take over", mapdraw.COLOURS["metadata"], "s"),
    "serialize": ("serialize", mapdraw.COLOURS["region"], "^"),
    "count": ("count", mapdraw.COLOURS["payload"], "D"),
}
PER_FOLIO = 8e-9
"""Seconds per folio next to others: an estimate, to leave out what would take too long."""
OFTEN = 1 << 28
"""Up to this number of folios, a handover is done three times."""


def style() -> None:
    """Set what makes the same picture of the same numbers anywhere."""
    mpl.rcParams.update({"svg.hashsalt": "kho", "svg.fonttype": "path", "font.size": 10, "axes.grid": True})
    mpl.rcParams.update({"grid.color": mapdraw.EMPTY, "axes.edgecolor": mapdraw.FAINT, "text.color": mapdraw.INK})


def save(figure: Any, path: Path) -> None:
    """Write an SVG without a date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    # matplotlib ends some lines with blanks.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def overhead(path: Path) -> None:
    """Draw bytes a folio, and the share of what is preserved, against how much of memory that is."""
    slots = (FOLIO["memory"] - (1 << 20)) // FOLIO["size"]
    densities = [2.0 ** (step / 4) for step in range(-100, 1)]
    figure, left = plt.subplots(figsize=(8.4, 5.2), layout="constrained")
    for name, (label, colour, line) in LAYOUTS.items():
        bytes_each = []
        for density in densities:
            # All but the last hundredth, so that the metadata fit as well.
            group = Group(max(1, int(slots * min(density, 0.99))), FOLIO["size"], random=True)
            bytes_each.append(plan(FOLIO["memory"], [group], layouts=[name]).costs[0].nbytes / group.count)
        left.loglog(densities, bytes_each, line, color=colour, label=label, linewidth=2)
    left.axhline(1 / 8, color=mapdraw.FAINT, linewidth=1)
    left.annotate("1 bit a folio", (densities[0], 1 / 8), (4, 4), textcoords="offset points", color=mapdraw.FAINT)
    left.set_xlabel("density: share of memory that is preserved")
    left.set_ylabel("metadata, bytes a folio")
    right = left.secondary_yaxis(
        "right", functions=(lambda y: y / FOLIO["size"] * 100, lambda y: y * FOLIO["size"] / 100)
    )
    right.set_ylabel("metadata, % of what is preserved")
    left.set_title(f"{size(FOLIO['size'])} folios scattered over {size(FOLIO['memory'])}, average")
    left.legend()
    save(figure, path)


def measured(seconds: float) -> list[dict[str, Any]]:
    """Run handovers of one folio size after the other, side by side, up to 16 TiB or as far as `seconds` reach."""
    rows = []
    for folio in SIZES:
        for log2 in range(30, 45):
            memory = 1 << log2
            count = memory // folio
            if count * PER_FOLIO > seconds:
                break
            runs = [one(memory, folio) for _ in range(3 if count < OFTEN else 1)]
            took = {step: statistics.median(run.seconds[step] for run in runs) for step in STEPS}
            rows.append({"folio": folio, "preserved": memory, "metadata": runs[0].nbytes, "seconds": took})
            print(f"{size(memory)} as {size(folio)}: {sum(took.values()):.3f} s", file=sys.stderr)
    return rows


def one(nbytes: int, folio: int) -> Simulation:
    """Hand over so much; what lies below is for the FDT. Raises: KhoError if it is not as planned."""
    done = simulate(nbytes + GIB, [Group(nbytes // folio, folio)])
    if not done.as_planned:
        raise KhoError(f"{size(nbytes)} as {size(folio)}: {done.pages} pages of metadata, {done.cost.pages} planned")
    return done


def times(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what was measured; markers are runs, lines join them, and nothing goes beyond."""
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 5.2), layout="constrained", sharey=True)
    for panel, folio in zip(panels, SIZES, strict=True):
        here = [row for row in rows if row["folio"] == folio]
        sizes = [row["preserved"] for row in here]
        for step, (label, colour, marker) in STEPS.items():
            took = [row["seconds"][step] for row in here]
            panel.loglog(sizes, took, marker=marker, color=colour, label=label, markersize=5, linewidth=1.2)
        panel.set_xlim(GIB / 1.5, 16 * TIB * 1.5)
        marks = [GIB << shift for shift in range(0, 15, 2)]
        panel.set_xticks(marks, [size(mark) for mark in marks], rotation=30)
        panel.minorticks_off()
        panel.set_xlabel("preserved, side by side")
        most = max(sizes, default=0)
        reach = "" if most >= 16 * TIB else f"; not measured beyond {size(most)}"
        panel.set_title(f"folios of {size(folio)}{reach}", fontsize=10)
    panels[0].set_ylabel("seconds")
    panels[0].legend(loc="upper left")
    figure.suptitle("kho-v4 in an arena, as measured: medians of three, one run beyond 2\u00b2\u2078 folios")
    save(figure, path)


def main() -> int:
    """Draw both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/charts"), help="folder for the pictures")
    parser.add_argument("--seconds", type=float, default=60.0, help="what one run may take at most, about (default 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the measured times there")
    args = parser.parse_args()
    style()
    overhead(args.out / "overhead.svg")
    rows = measured(args.seconds)
    times(rows, args.out / "time.svg")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
