"""Reports for other programs: the Prometheus text format, and rows of a CSV table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..text import printable
from .report import Report

COLUMNS = (
    "root",
    "release",
    "state",
    "boot",
    "ram",
    "scratch",
    "scratch_how",
    "leftover",
    "share",
    "cma_total",
    "hugetlb",
    "crash_dumps",
    "crash_dumps_needs",
    "exit_code",
    "findings",
    "unread",
    "headline",
)
"""Columns of `row`, in order. Sizes are bytes, `share` is 0 to 1."""


def row(report: Report) -> dict[str, str | int | float | None]:
    """Return a report as a flat row; `findings` is the ids separated by spaces, `unread` a number of files."""
    share = None if report.share is None else round(report.share, 6)
    made: dict[str, str | int | float | None] = {
        "share": share,
        "findings": " ".join(finding.id for finding in report.findings),
        "unread": len(report.unread),
    }
    return {name: made[name] if name in made else getattr(report, name) for name in COLUMNS}


METRICS = (
    ("kho_active", "1 if KHO is active, 0 if not, NaN if unknown."),
    ("kho_scratch_bytes", "Memory held by KHO's scratch areas."),
    ("kho_scratch_node_bytes", "Memory held by KHO's scratch areas, by NUMA node."),
    ("kho_leftover_bytes", "Memory that a failed reservation left in CMA pageblocks."),
    ("kho_scratch_ratio", "Scratch, or the leftover of a failed reservation, as a share of RAM."),
    ("kho_crash_dumps", "1 for what a crash of this machine would leave, and the least that mends it."),
    ("kho_finding", "1 for each rule of kho doctor that applies."),
    ("kho_doctor_exit_code", "0 nothing notable, 1 findings, 2 unknown."),
)


def escaped(text: str) -> str:
    """Replace characters that are not printable, then escape the text as the value of a label."""
    return printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def prometheus(reports: Sequence[Report]) -> str:
    """Return metrics for node_exporter's textfile collector; with several reports, each has a label `root`."""
    lines = []
    for name, about in METRICS:
        lines += [f"# HELP {name} {about}", f"# TYPE {name} gauge"]
        for report in reports:
            base = {"root": report.root} if len(reports) > 1 else {}
            for labels, value in samples(name, report):
                shown = ",".join(f'{key}="{escaped(text)}"' for key, text in {**base, **labels}.items())
                lines.append(f"{name}{{{shown}}} {value}" if shown else f"{name} {value}")
    return "\n".join(lines) + "\n"


def samples(name: str, report: Report) -> Iterable[tuple[dict[str, str], str]]:
    """Yield the samples of a metric as (labels, value); none if the value is unknown."""
    match name:
        case "kho_active":
            yield {}, "NaN" if report.state == "unknown" else str(int(report.state == "active"))
        case "kho_scratch_bytes" if report.scratch is not None:
            yield {"how": report.scratch_how}, str(report.scratch)
        case "kho_scratch_node_bytes" if report.state == "active":
            yield from (({"node": str(node)}, str(held)) for node, held in report.by_node.items())
        case "kho_leftover_bytes" if report.leftover is not None:
            yield {}, str(report.leftover)
        case "kho_scratch_ratio" if report.share is not None:
            yield {}, f"{report.share:.6f}"
        case "kho_crash_dumps":
            yield {"verdict": report.crash_dumps, "needs": report.crash_dumps_needs}, "1"
        case "kho_finding":
            for rule_id in dict.fromkeys(finding.id for finding in report.findings):
                severity = next(finding.severity for finding in report.findings if finding.id == rule_id)
                yield {"rule": rule_id, "severity": severity}, "1"
        case "kho_doctor_exit_code":
            yield {}, str(report.exit_code)
