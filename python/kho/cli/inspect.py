"""`kho inspect`: what does this memory hand over?"""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.text import Text

from .._kho import Incoming, Snapshot
from ..report import describe
from . import output, snapshot
from .options import read, source_options


@click.command("inspect")
@source_options
@click.option("--full", is_flag=True, help="List every folio and digest every file, however many and large.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; addresses are integers.")
@click.option("--python", "as_python", is_flag=True, help="Print the Python calls that read the same, and stop.")
def command(
    source: tuple[str, ...],
    full: bool,
    as_json: bool,
    as_python: bool,
    **options: int | None,
) -> None:
    """Show what the memory in SOURCE hands over.

    Its format and how that was decided, the scratch areas, the preserved-memory map, folios by order, and the subtrees
    of its producers. SOURCE is an ELF core, a kdump or LiME dump, FILE@ADDRESS[,offset=N][,size=N][,hole=A:B] or, for
    the memory file of a virtual machine, FILE,machine=NAME (q35, pc, virt, microvm, firecracker, cloud-hypervisor);
    several make up one memory. A raw image is read at another address than it was named with if its handover is whole
    only there, unless ,check=no follows.

    Of a debugfs directory, one with proc and sys in it, "live" or a single FDT it shows what is there: no memory.

    \b
    Exit codes: 0 read, 2 no handover or not readable.
    """
    if as_python:
        click.echo(as_calls(source, **options))
        return
    if len(source) == 1 and Snapshot.recognizes(source[0]):
        snapshot.run(source[0], as_json=as_json)
        return
    inc = read(source, **options)
    report = describe(inc, full=full)
    if as_json:
        output.print_json(report)
    else:
        show(inc, report, ", ".join(source) if inc.placement is None else inc.placement.argument, full=full)
    for other in inc.others:
        click.echo(f"note: another handover's FDT is at {other:#x}; read it with --fdt-phys {other:#x}", err=True)


def as_calls(source: tuple[str, ...], **given: int | None) -> str:
    """Write the Python calls that read the same."""
    if len(source) == 1 and Snapshot.recognizes(source[0]):
        return snapshot.as_calls(source[0])
    named = [f"{name}={value:#x}" for name, value in given.items() if value is not None]
    call = ", ".join([repr(source[0]) if len(source) == 1 else repr(list(source)), *named])
    return (
        f"import kho\n\ninc = kho.open({call})\nprint(inc.compatible, inc.folios_by_order, inc.subtrees, inc.scratch)"
    )


def show(inc: Incoming, report: dict[str, Any], source: str, *, full: bool) -> None:
    """Print the report as text."""
    out = output.console()
    out.print(f"[bold]{inc.compatible}[/bold] handover ({inc.kernels})", end=" ")
    out.print(f"in {source}\n", markup=False, soft_wrap=True)
    facts = output.table("", "", "")
    facts.show_header = False
    facts.columns[2].no_wrap = False
    facts.add_row("root FDT", f"{inc.fdt_phys:#x}", f"{inc.fdt.totalsize} bytes")
    facts.add_row("preserved-memory-map", f"{inc.preserved_memory_map:#x}", f"{inc.metadata_pages} pages of metadata")
    if inc.bitmap_bytes is None:
        facts.add_row("page size", str(inc.page_size), f"{inc.certainty}: {inc.page_size_why}")
    else:
        facts.add_row("page size", str(inc.page_size), inc.page_size_why)
        facts.add_row("bitmaps", f"{inc.bitmap_bytes} bytes", f"{inc.certainty}: {inc.bitmap_bytes_why}")
    out.print(facts)

    out.print(f"\n[bold]Preserved[/bold]: {inc.nr_folios} folios, {output.size(inc.preserved_bytes)}")
    orders = output.table(">order", ">folio", ">folios", ">bytes")
    for order, count in sorted(inc.folios_by_order.items()):
        each = inc.page_size << order
        orders.add_row(str(order), output.size(each), str(count), output.size(count * each))
    out.print(orders)
    if inc.pages_outside:
        out.print(f"{inc.pages_outside} preserved pages are not in this memory")

    if inc.scratch is None:
        out.print("\n[bold]Scratch[/bold]: not found in this memory (the next kernel is told of it elsewhere)")
    else:
        total = output.size(sum(nbytes for _, nbytes in inc.scratch))
        out.print(f"\n[bold]Scratch[/bold]: {len(inc.scratch)} areas, {total}, where the next kernel boots")
        areas = output.table("for", "address", ">size")
        for i, (addr, nbytes) in enumerate(inc.scratch):
            areas.add_row(("low memory", "global")[i] if i < 2 else f"node {i - 2}", f"{addr:#x}", output.size(nbytes))
        out.print(areas)

    out.print(f"\n[bold]Subtrees[/bold]: {len(inc.subtrees)}")
    subtrees = output.table("name", "address", ">size")
    for name, sub in inc.subtrees.items():
        subtrees.add_row(Text(name), f"{sub.phys:#x}", "unknown" if sub.size is None else f"{sub.size} bytes")
    if inc.subtrees:
        out.print(subtrees)
    for name, why in inc.malformed_subtrees.items():
        out.print(f"{name}: {why}", markup=False)
    show_payloads(out, report)
    if full:
        out.print()
        listed = output.table("address", ">order")
        for phys, order in report["folios"]:
            listed.add_row(f"{phys:#x}", str(order))
        out.print(listed)


def show_payloads(out: Console, report: dict[str, Any]) -> None:
    """Print what the subtrees hold."""
    for name, row in report["subtrees"].items():
        if "error" in row:
            out.print(f"{name}: {row['error']}", markup=False)
        elif "raw" in row:
            out.print(f"{name}: no decoder; begins with {row['raw']}", markup=False, soft_wrap=True)
    if "kexec_metadata" in report:
        chain = report["kexec_metadata"]
        out.print(f"\n[bold]Chain[/bold]: kexec {chain['kexec_count']}, previous kernel", end=" ")
        out.print(chain["previous_release"], markup=False)
    if report.get("reserve_mem"):
        out.print("\n[bold]reserve_mem[/bold]")
        regions = output.table("name", "address", ">size")
        for name, (start, nbytes) in report["reserve_mem"].items():
            regions.add_row(Text(name), f"{start:#x}", output.size(nbytes))
        out.print(regions)
    if "kho_test" in report:
        test = report["kho_test"]
        verdict = "holds" if test["csum_holds"] is True else f"does not hold ({test['csum_holds']})"
        out.print(f"\n[bold]kho_test[/bold]: {test['nr_folios']} folios; checksum {test['csum']:#010x} {verdict}")
    if "live" in report:
        live = report["live"]
        out.print(f"\n[bold]kho.live[/bold]: generation {live['generation']} of", end=" ")
        out.print(f"{live['image']}, version {live['version']}", markup=False)
        objects = output.table("object", "dtype", ">shape", "address", ">size", ">since")
        for row in live["objects"]:
            shape = " x ".join(map(str, row["shape"])) if row["dtype"] is not None else ""
            place, nbytes = f"{row['phys']:#x}", output.size(row["nbytes"])
            objects.add_row(Text(row["name"]), row["dtype"] or "bytes", shape, place, nbytes, str(row["generation"]))
        if live["objects"]:
            out.print(objects)
    if "luo" in report:
        show_luo(out, report["luo"])


def show_luo(out: Console, luo: dict[str, Any]) -> None:
    """Print sessions, files and FLBs."""
    out.print(f"\n[bold]LUO[/bold]: {luo['compatible']}, live update {luo['liveupdate_num']}")
    files = output.table("session", ">token", "kind", ">size", ">folios", "sha256")
    for session in luo["sessions"]:
        for row in session["files"]:
            size = output.size(row["size"]) if "size" in row else ""
            digest = row.get("sha256") or row.get("error") or ""
            kind = Text(row["compatible"])
            files.add_row(
                Text(session["name"]), f"{row['token']:#x}", kind, size, str(row.get("folios", "")), Text(digest[:16])
            )
        if not session["files"]:
            files.add_row(Text(session["name"]), "", "no files")
    if luo["sessions"]:
        out.print(files)
    if luo["flbs"]:
        flbs = output.table("FLB", "data", ">files")
        for name, data, count in luo["flbs"]:
            flbs.add_row(Text(name), f"{data:#x}", str(count))
        out.print(flbs)
