"""`kho verify`: check a handover and print findings."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from .. import __version__, jsontext
from .._kho import Snapshot
from ..handover.rules import RULES, SEVERITIES, Finding, Severity, markdown
from ..handover.running import UnreadableError, core_of, is_running, looked_at, open_running
from ..handover.verify import verify
from . import output
from .fleet_options import Fleet, fleet_options
from .options import Range, read_options

SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@click.command("verify")
@click.argument("source", nargs=-1)
@read_options
@click.option(
    "--scratch",
    type=Range(2),
    multiple=True,
    metavar="A:N",
    help="A scratch area; else found by the search for the root FDT.",
)
@click.option("--node", type=Range(3), multiple=True, metavar="A:N:ID", help="Memory of a NUMA node, for KHO016.")
@click.option("--kernel", metavar="RELEASE", help="What this kernel (7.0) does not take over is an error.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; addresses are integers.")
@click.option("--sarif", "as_sarif", is_flag=True, help="Print a SARIF 2.1.0 log.")
@click.option("--explain", metavar="ID", help="Explain a finding (KHO004) and exit.")
@click.option("--list", "as_list", is_flag=True, help="List all possible findings and exit.")
@click.option("--markdown", "as_markdown", is_flag=True, help="With --list: print docs/findings.md.")
@fleet_options
@click.pass_context
def command(
    ctx: click.Context,
    source: tuple[str, ...],
    fdt_phys: int | None,
    bitmap_bytes: int | None,
    page_size: int | None,
    scratch: tuple[tuple[int, int], ...],
    node: tuple[tuple[int, int, int], ...],
    kernel: str | None,
    as_json: bool,
    as_sarif: bool,
    explain: str | None,
    as_list: bool,
    as_markdown: bool,
    fleet: Fleet | None,
) -> None:
    """Check the handover in SOURCE and print what is wrong with it.

    Checks the root FDT, the preserved-memory map, scratch, every subtree and file, and whether all memory that they
    refer to is preserved, and whether the kernels that read its map take its LUO data. With --kernel, all that this
    kernel would not take over is an error, as `kho compat` judges it. SOURCE is anything `kho inspect` takes, or a bare
    root FDT (debugfs out/fdt). Of "live", the running machine, or a directory with its files, it checks the root FDTs
    in debugfs, and the memory if /proc/kcore can be read (root); it says what it looked at.

    \b
      kho verify handover.elf
      kho verify --kernel 7.0 handover.elf
      kho verify --explain KHO015
      kho verify --sarif handover.elf > findings.sarif
      kho verify --fleet 'dumps/*' --parquet findings.parquet

    With --fleet, each source is a separate handover, and --json prints one line per source.

    \b
    Exit codes: 0 no errors (warnings and notes are possible), 1 errors, 2 no handover or not readable. With --fleet:
    the highest code of any source.
    """
    if explain is not None:
        output.lines(explanation(explain))
        return
    if as_list:
        if as_markdown:
            output.lines(markdown())
        elif as_json:
            output.print_json({"rules": [rule_as_dict(rule_id) for rule_id in RULES]})
        else:
            table = output.table("id", "severity", "title")
            for rule_id, rule in RULES.items():
                table.add(rule_id, (rule.severity, COLORS[rule.severity]), rule.title)
            table.show()
        return
    if fleet is not None:
        if as_sarif:
            raise click.UsageError("--sarif takes one source; with --fleet use --json or --parquet")
        from ..fleet import VERIFY, verify_row

        examine = functools.partial(
            verify_row,
            nodes=node,
            fdt_phys=fdt_phys,
            page_size=page_size,
            bitmap_bytes=bitmap_bytes,
            scratch=scratch or None,
            kernel=kernel,
        )
        sys.exit(fleet.run(examine, VERIFY, more=source, as_json=as_json))
    if not source:
        raise click.UsageError("Missing argument 'SOURCE...'.", ctx)
    looked: dict[str, str] = {}
    if len(source) == 1 and is_running(source[0]):
        found, looked = running(
            source[0],
            node,
            kernel,
            fdt_phys=fdt_phys,
            page_size=page_size,
            bitmap_bytes=bitmap_bytes,
            scratch=scratch or None,
        )
    else:
        with output.progress("searching") as told:
            found = verify(
                source if len(source) > 1 else source[0],
                nodes=node,
                fdt_phys=fdt_phys,
                page_size=page_size,
                bitmap_bytes=bitmap_bytes,
                scratch=scratch or None,
                kernel=kernel,
                progress=told,
                opened=functools.partial(output.note_opened, absent=False),
            )
    counts = {severity: sum(f.severity == severity for f in found) for severity in SEVERITIES}
    if as_sarif:
        log = sarif(found, source)
        log["runs"][0]["results"] = (result(finding, list(RULES), source) for finding in found)
        output.print_json(log, hexed=False)
    elif as_json:
        seen = {"looked_at": looked} if looked else {}
        output.print_json({"sources": list(source), **seen, "counts": counts, "findings": (f.as_dict() for f in found)})
    else:
        for what, how in looked.items():
            output.line(f"looked at {what}: {how}")
        if looked:
            output.line()
        show(found, counts)
    if counts["error"]:
        sys.exit(1)


def running(
    source: str,
    nodes: Sequence[tuple[int, int, int]],
    kernel: str | None,
    *,
    scratch: Sequence[tuple[int, int]] | None,
    **options: int | None,
) -> tuple[list[Finding], dict[str, str]]:
    """Check what debugfs shows, and the memory if it can be read; and say what was looked at, by path.

    Raises: SourceError if debugfs cannot be read; ParameterError.
    """
    shown = Snapshot.open(source)
    found, looked = verify(shown, kernel=kernel), dict(looked_at(shown))
    try:
        with output.progress("searching") as told:
            inc, memory = open_running(source, progress=told, scratch=scratch, **options)
    except UnreadableError as error:
        looked[str(core_of(source))] = f"not read: {error}"
    else:
        looked[memory.sources[0]] = f"{inc.nr_folios} folios; LUO's sessions are not written before the kexec"
        found += verify(inc, nodes=nodes, kernel=kernel)
    return found, looked


def explanation(rule_id: str) -> str:
    """Return the text of a rule; click reports a usage error for an unknown id."""
    rule = RULES.get(rule_id.upper())
    if rule is None:
        raise click.UsageError(f"no finding {rule_id}; kho verify --list shows all ids")
    return f"{rule_id.upper()} ({rule.severity}): {rule.title}\n\n{rule.explanation}"


def rule_as_dict(rule_id: str) -> dict[str, str]:
    """Return a rule as a dict for JSON."""
    return {"id": rule_id, **vars(RULES[rule_id])}


def show(found: list[Finding], counts: Mapping[Severity, int]) -> None:
    """Print findings as text, the most severe first, then the number of each severity."""
    for finding in found:
        output.line((finding.severity, COLORS[finding.severity]), f" {finding.id}: {finding.title}")
        output.line(f"  {finding.place}: {finding.value}")
        output.line(f"  {finding.rule.advice}")
    if found:
        output.line()
    numbers = [f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in counts.items()]
    output.line(", ".join(numbers))


def sarif(found: list[Finding], source: tuple[str, ...]) -> dict[str, Any]:
    """Return a SARIF 2.1.0 log: one run with all rules and one result per finding."""
    ids = list(RULES)
    pages = documentation()
    rules = [
        {
            "id": rule_id,
            **({"helpUri": f"{pages}/findings/#{rule_id.lower()}"} if pages else {}),
            "name": "".join(filter(str.isalnum, rule.title.title())),
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": f"{rule.means} {rule.matters}"},
            "help": {"text": rule.advice},
            "defaultConfiguration": {"level": rule.severity},
        }
        for rule_id, rule in RULES.items()
    ]
    driver = {"name": "kho", "version": __version__, **({"informationUri": pages} if pages else {}), "rules": rules}
    artifacts = [{"location": {"uri": as_uri(name)}} for name in source]
    run = {"tool": {"driver": driver}, "artifacts": artifacts, "results": [result(f, ids, source) for f in found]}
    return {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def documentation() -> str | None:
    """Return the address of kho's documentation as its package names it (Project-URL); None if it names none."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        named = metadata("kho").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    urls = dict(entry.split(", ", 1) for entry in named if ", " in entry)
    return urls["Documentation"].rstrip("/") if "Documentation" in urls else None


def as_uri(name: str) -> str:
    """Return a source as a URI reference of a file."""
    from urllib.parse import quote

    return quote(os.fsencode(name), safe="/@=,~")


def result(finding: Finding, ids: list[str], source: tuple[str, ...]) -> dict[str, Any]:
    """Return a finding as a SARIF result; its address is a physical address."""
    physical: dict[str, Any] = {"artifactLocation": {"uri": as_uri(source[0]), "index": 0}}
    if finding.phys is not None and finding.phys < 1 << 63:
        physical["address"] = {"absoluteAddress": finding.phys, "kind": "data"}
        if finding.phys > jsontext.MOST:  # readers that parse numbers as doubles lose precision
            physical["address"]["name"] = f"{finding.phys:#x}"
    where = {"physicalLocation": physical, "logicalLocations": [{"fullyQualifiedName": finding.place}]}
    made: dict[str, Any] = {
        "ruleId": finding.id,
        "level": finding.severity,
        "message": {"text": f"{finding.place}: {finding.value}"},
        "locations": [where],
    }
    if finding.id in ids:
        made["ruleIndex"] = ids.index(finding.id)
    return made
