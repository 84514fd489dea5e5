"""Reports for other programs: the Prometheus text format, and rows of a CSV table."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import AccessError, SourceError
from ..text import printable
from .report import Report
from .rules import RULES

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
    ("kho_finding", "1 for each rule of kho doctor that applies, 0 for the others."),
    ("kho_doctor_exit_code", "0 nothing notable, 1 findings, 2 unknown."),
)


NAN = "NaN"
"""The value of what is unknown."""


def number(value: int | None) -> str:
    """Return a value as a sample; NaN if it is unknown."""
    return NAN if value is None else str(value)


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
    """Yield the samples of a metric as (labels, value): 0 for what is not there, NaN for what is unknown.

    The series of a machine therefore do not come and go with its state, and an alert can compare with 0.
    """
    match name:
        case "kho_active":
            yield {}, NAN if report.state == "unknown" else str(int(report.state == "active"))
        case "kho_scratch_bytes":
            yield {"how": report.scratch_how}, number(report.scratch)
        case "kho_scratch_node_bytes":
            held = report.by_node if report.state == "active" else {}
            for node in sorted({*report.nodes, *held}):
                yield {"node": str(node)}, str(held.get(node, 0)) if held or report.scratch == 0 else NAN
        case "kho_leftover_bytes":
            yield {}, number(report.leftover) if report.state in ("failed", "unknown") else str(report.leftover or 0)
        case "kho_scratch_ratio":
            yield {}, NAN if report.share is None else f"{report.share:.6f}"
        case "kho_crash_dumps":
            yield {"verdict": report.crash_dumps, "needs": report.crash_dumps_needs}, "1"
        case "kho_finding":
            applies = {finding.id for finding in report.findings}
            for rule_id, rule in RULES.items():
                yield {"rule": rule_id, "severity": rule.severity}, str(int(rule_id in applies))
        case "kho_doctor_exit_code":
            yield {}, str(report.exit_code)


def write_metrics(text: str, path: str | os.PathLike[str]) -> None:
    """Write metrics to a file that a collector may read at any moment: a new file with mode 0644, renamed to `path`.

    The temporary file is next to it and has no suffix `.prom`, so that node_exporter does not read it.

    Raises: AccessError, SourceError; the file is then as it was.
    """
    target = Path(path)
    made = None
    try:
        descriptor, made = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(made).replace(target)
    except OSError as error:
        if made is not None:
            Path(made).unlink(missing_ok=True)
        kind = AccessError if isinstance(error, PermissionError) else SourceError
        raise kind(f"{os.fspath(path)}: {error.strerror or error}") from error
