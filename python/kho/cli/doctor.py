"""`kho doctor`: how KHO uses memory. Imports are deferred so that it starts quickly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import output
from .fleet_options import Fleet, fleet_options

if TYPE_CHECKING:
    from ..doctor import Report, WhatIf

COLOR = {"error": "red", "warning": "yellow", "note": "cyan"}
EVIDENCE = 6
"""Maximum number of lines of evidence printed for a finding; --json has all of them."""


@click.command("doctor")
@click.argument("directory", nargs=-1, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; sizes are bytes.")
@click.option("--csv", "as_csv", is_flag=True, help="Print a row of CSV for each DIRECTORY.")
@click.option(
    "--prometheus",
    "metrics",
    metavar="[FILE]",
    is_flag=False,
    flag_value="-",
    help="Write metrics for node_exporter's textfile collector to FILE, which is replaced at once; else print them.",
)
@click.option(
    "--what-if",
    metavar="PARAMS",
    help='Predict the effect of other parameters: kho=off, "kho=on kho_scratch=64M,256M,64M".',
)
@click.option("--explain", metavar="ID", help="Explain a finding (DOC003), or a kernel message, and exit.")
@click.option("--list", "as_list", is_flag=True, help="List every finding and exit.")
@fleet_options
def command(
    directory: tuple[str, ...],
    as_json: bool,
    as_csv: bool,
    metrics: str | None,
    what_if: str | None,
    explain: str | None,
    as_list: bool,
    fleet: Fleet | None,
) -> None:
    """Report how KHO uses the memory of this machine, or of the machine whose files are in a DIRECTORY.

    Works without root. As root it also reads debugfs and /proc/pagetypeinfo, and the figures are exact. A DIRECTORY is
    a tree with any of proc/, sys/, var/log/dmesg and boot/config-*, or has copies of single files, or is an unpacked
    collection of sos, Insights, supportconfig, must-gather, apport or kdump. Several of them are printed as a table.
    Nothing is changed: edits of the boot line are only printed.

    \b
      kho doctor
      kho doctor --what-if kho_scratch=64M,256M,64M
      kho doctor --explain DOC003
      kho doctor --csv snapshots/*
      kho doctor --fleet 'snapshots/*' --parquet fleet.parquet
      kho doctor --prometheus /var/lib/prometheus/node-exporter/kho.prom

    \b
    Exit codes: 0 nothing notable, 1 findings, 2 state or amount unknown, or bad input; the largest of several. With
    --what-if: 0 the kernel would accept the parameters, and the areas, the next kernel in them and its crash kernel
    fit as far as is known; 1 otherwise.
    """
    if metrics is not None and Path(metrics).is_dir():  # the option without a FILE, before a DIRECTORY
        directory, metrics = (metrics, *directory), "-"
    as_metrics = metrics is not None
    if sum((as_json, as_csv, as_metrics)) > 1:
        raise click.UsageError("--json, --csv and --prometheus exclude each other")
    if what_if is not None and (as_csv or as_metrics):
        raise click.UsageError("--what-if excludes --csv and --prometheus")
    if explain is not None or as_list:
        if explain is not None:
            output.lines(explanation(explain))
        elif as_json:
            output.print_json({"rules": rules()})
        else:
            output.lines(f"{rule['id']}  {rule['severity']:7}  {rule['title']}" for rule in rules())
        return
    if fleet is not None:
        if as_metrics or what_if is not None:
            raise click.UsageError("--fleet works with --json, --csv and --parquet, not with --prometheus or --what-if")
        from ..fleet import DOCTOR, doctor_row

        sys.exit(fleet.run(doctor_row, DOCTOR, more=directory, as_json=as_json, as_csv=as_csv))
    from ..doctor import examine
    from ..doctor import what_if as predict

    reports = [examine(root) for root in dict.fromkeys(directory) or ("/",)]
    wanted = None if what_if is None else [predict(report, what_if) for report in reports]
    if as_csv:
        from ..doctor.export import COLUMNS, row

        print_row = output.csv_rows(COLUMNS)
        for report in reports:
            print_row(row(report).values())
    elif as_metrics:
        from ..doctor.export import prometheus, write_metrics

        if metrics in (None, "-"):
            output.lines(prometheus(reports))
        else:
            write_metrics(prometheus(reports), metrics)
    elif as_json:
        data = [report.to_dict() for report in reports]
        for made, change in zip(data, wanted or [], strict=False):
            made["what_if"] = change.to_dict()
        output.print_json(data[0] if len(data) < 2 else {"reports": data})
    elif len(reports) > 1:
        table(reports)
        for report, change in zip(reports, wanted or [], strict=False):
            output.line(f"{report.root}: {change.headline}")
    else:
        for parts in report_lines(reports[0], wanted[0] if wanted else None):
            output.line(*parts)
    if wanted is not None:
        sys.exit(0 if all(change.good for change in wanted) else 1)
    sys.exit(max(report.exit_code for report in reports))


def explanation(rule_id: str) -> str:
    """Return the explanation of a rule or of a kernel message as text. Raises UsageError for an unknown one."""
    from ..doctor.messages import search
    from ..doctor.rules import RULES
    from ..text import printable

    rule = RULES.get(rule_id.upper())
    if rule is None and (found := search(rule_id)):
        see = {meaning: f" ({meaning.rule or 'DOC040'})" if meaning.rule or meaning.bad else "" for meaning in found}
        return "\n\n".join(
            f"{meaning.wording}\nLinux {meaning.releases}{see[meaning]}: {meaning.meaning}" for meaning in found[:8]
        )
    if rule is None:
        shown = printable(rule_id, 80)
        known = "kho doctor --list prints all findings, docs/messages.md has all messages"
        raise click.UsageError(f"unknown finding or message {shown}; {known}")
    return f"{rule_id.upper()} ({rule.severity}): {rule.title}\n\n{rule.explanation}"


def rules() -> list[dict[str, str]]:
    """Return the rules as data for JSON."""
    from ..doctor.rules import RULES

    return [{"id": rule_id, **vars(rule)} for rule_id, rule in RULES.items()]


def report_lines(report: Report, change: WhatIf | None) -> list[tuple[output.Part, ...]]:
    """Return a report as lines of parts: the headline, then the prediction, or the findings with their remedies."""
    from ..doctor.bootline import instructions

    lines = output.prose((report.headline, "bold"))
    lines += prose_lines([*machine_lines(report), ""])
    if change is not None:
        lines += prose_lines(what_if_text(report, change))
        if change.accepted:
            lines += verbatim([*instructions(change.parameters, report.platforms, report.container), ""])
    else:
        for finding in report.findings:
            for parts in finding_text(finding.to_dict()):
                lines += output.prose(*parts)
        remedy = any(finding.id in ("DOC001", "DOC003", "DOC004") for finding in report.findings)
        if remedy:
            lines += verbatim([*instructions("kho=off", report.platforms, report.container), ""])
    if report.looked:
        lines += prose_lines([f"no kernel log of this boot; searched {', '.join(report.looked)}", ""])
    if report.unread:
        lines += prose_lines(["not read:", *(f"  {file}: {why}" for file, why in report.unread)])
    while lines and not any(lines[-1]):
        lines.pop()
    return lines


def prose_lines(lines: list[str]) -> list[tuple[output.Part, ...]]:
    """Return lines of text, folded."""
    return [parts for line in lines for parts in output.prose(line)]


def verbatim(lines: list[str]) -> list[tuple[output.Part, ...]]:
    """Return lines as they are: they have commands to copy."""
    return [(line,) for line in lines]


def machine_lines(report: Report) -> list[str]:
    """Return the lines that identify the machine, the boot and the collection."""
    from ..doctor.text import size

    parts = [f"Linux {report.release}"] if report.release else []
    parts += [f"{size(report.ram)} of RAM"] if report.ram else []
    parts += {"cold": ["cold boot"], "kho": ["booted by a handover"]}.get(report.boot or "", [])
    if len(report.nodes) > 1:
        parts += [
            f"node {node}: {size(report.by_node.get(node, 0))} of {size(ram)}" for node, ram in report.nodes.items()
        ]
    crash = () if report.crash_dumps in ("not set up", "cannot tell") else (f"crash dumps: {report.crash_dumps}",)
    where = f"{report.layout or 'a report'} in {report.folder}/" if report.folder else report.layout
    return [f"  {line}" for line in (", ".join(parts), where, *crash) if line]


def finding_text(finding: dict[str, Any]) -> list[tuple[output.Part, ...]]:
    """Return a finding as lines of parts."""
    severity = finding["severity"]
    head = f" {finding['id']}: {finding['title']} ({finding['certainty']})"
    lines = [f"  {finding['value']}"]
    for seen in finding["evidence"][:EVIDENCE]:
        line = "" if seen["line"] is None else f":{seen['line']}"
        lines.append(f"    {seen['file']}{line}: {seen['text']}")
    more = len(finding["evidence"]) - EVIDENCE
    lines += [f"    and {more} more (--json)"] if more > 0 else []
    if severity != "note":
        lines.append(f"  fix: {finding['remedy']}")
    return [((severity, COLOR[severity]), head), *verbatim([*lines, ""])]


def what_if_text(report: Report, change: WhatIf) -> list[str]:
    """Return the lines of a prediction."""
    from ..doctor.text import size

    lines = [change.headline]
    if len(change.sizes) > 2:
        low, anywhere, *nodes = map(size, change.sizes)
        names = list(report.nodes) if len(report.nodes) == len(nodes) else range(len(nodes))
        shown = ", ".join(f"node {name}: {held}" for name, held in zip(names, nodes, strict=True))
        lines.append(f"  low {low}, global {anywhere}, {shown}")
    lines += [f"  {note}" for note in change.notes] if change.accepted else []
    lines += [f"  unknown: {what}" for what in change.unknown]
    return [*lines, ""]


def table(reports: list[Report]) -> None:
    """Print a table with one line per report."""
    from ..doctor.text import share, size
    from ..text import printable

    rows = [("tree", "kernel", "state", "held", "of RAM", "leftover", "findings")]
    for report in reports:
        least = {"at least": ">= ", "boot line": "~ "}.get(report.scratch_how, "")
        rows.append(
            (
                printable(report.root, output.LINE),
                printable(report.release or "?", output.CELL),
                report.state,
                "?" if report.scratch is None else least + size(report.scratch),
                share(report.share) if report.share is not None else "",
                size(report.leftover) if report.leftover else "",
                " ".join(finding.id for finding in report.findings if finding.severity != "note") or "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    output.lines("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
