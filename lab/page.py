"""docs/real-kernels.md, made from lab/results: what was proved on which kernel, and when."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from .claims import load

RESULTS = Path(__file__).parent / "results"
HEAD = """# What was proved on real kernels

kho's claims are held against running kernels in virtual machines: kernels take over what kho wrote, and kho reads what
they hand over. `make lab` repeats all of it ([lab/README.md](../lab/README.md)). This page is made from the results of
its last runs (`lab/results`) by `make docs`; {summary}.

"""
FOOT = """## What this does not prove

The guests are small (256 MiB to 4 GiB, one processor, one NUMA node) and most run under TCG, QEMU's interpreter: times
are not those of a machine. Kernels are upstream sources with a small configuration, not a distribution's builds. No
Linux 7.0 tarball was available: the capture `linux-7.0-layout-x86_64` is Linux 6.19.11 with 7.0's files for KHO, LUO
and memfds, and no claim here was run on a kernel that is called 7.0.
"""


def results() -> list[tuple[str, list[dict[str, Any]]]]:
    """Each scenario with its rows, in the order of their names."""
    return [load(path) for path in sorted(RESULTS.glob("*.json"))]


def cell(text: str) -> str:
    """Text of one cell: one line, without what ends the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def version_key(version: str) -> list[int]:
    """Sorts releases."""
    return [int(part) for part in version.partition("-")[0].split(".") if part.isdigit()]


def section(scenario: str, rows: list[dict[str, Any]]) -> str:
    """A scenario: what it proves, then its rows, newest kernel first."""
    doc = (import_module(f"lab.scenarios.{scenario}").__doc__ or "").strip()
    lines = [
        f"## {scenario}",
        "",
        doc,
        "",
        "| claim | kernel | architecture | | date | seen |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (version_key(row["kernel"]), row["arch"]), reverse=True):
        held = "held" if row["held"] else "**failed**"
        seen = cell(row["evidence"])[:240]
        lines.append(f"| {cell(row['text'])} | {row['kernel']} | {row['arch']} | {held} | {row['date']} | {seen} |")
    return "\n".join(lines) + "\n\n"


def summary(found: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """One sentence: how many claims, how many held, which kernels, when."""
    rows = [row for _, scenario in found for row in scenario]
    if not rows:
        return "there are none yet"
    kernels = sorted({row["kernel"] for row in rows}, key=version_key)
    arches = sorted({row["arch"].partition(",")[0] for row in rows})
    held, last = sum(row["held"] for row in rows), max(row["date"] for row in rows)
    text = f"{held} of {len(rows)} claims held on Linux {', '.join(kernels[:-1])} and {kernels[-1]}"
    if len(kernels) == 1:
        text = f"{held} of {len(rows)} claims held on Linux {kernels[0]}"
    return f"{text} ({', '.join(arches)}), the last run on {last}"


def page() -> str:
    """The whole page."""
    found = results()
    return HEAD.format(summary=summary(found)) + "".join(section(*entry) for entry in found) + FOOT
