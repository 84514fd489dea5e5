"""`kho inspect`: show a handover."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import click

from .._kho import Incoming, Snapshot
from ..handover.absence import level_names, map_line
from ..handover.describe import describe
from ..handover.owners import why_outside
from ..handover.running import core_of, is_running
from ..text import UNFINALIZED
from . import output, snapshot
from .options import read_unmarked, source_options


@click.command("inspect")
@source_options
@click.option("--full", is_flag=True, help="List every folio (as runs if there are too many) and hash every file.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text; addresses are integers.")
@click.option("--python", "as_python", is_flag=True, help="Print the equivalent Python calls and exit.")
def command(
    source: tuple[str, ...],
    full: bool,
    as_json: bool,
    as_python: bool,
    **options: int | None,
) -> None:
    """Show the handover in SOURCE.

    Prints its layout and how it was detected, the scratch areas, the preserved-memory map, folios by order, and the
    subtrees of its producers. SOURCE is an ELF core, a kdump or LiME dump, FILE@ADDRESS[,offset=N][,size=N][,hole=A:B]
    or, for the memory file of a virtual machine, FILE,machine=NAME (q35, pc, virt, microvm, firecracker,
    cloud-hypervisor); several sources form one memory. If the handover in a raw image is complete only at another
    address than the one given, the image is read at that address, unless ,check=no is appended.

    In a crash kernel SOURCE is /proc/vmcore; a note names the range that this kernel itself overwrote, if there is one.
    Of a saved dump the note follows from the crash kernel's log next to it (kexec-dmesg.log), or from the log in
    the dump itself.

    SOURCE can also be a debugfs directory, a directory with proc and sys in it, "live" or a single FDT; these show
    the FDTs without memory.

    \b
    Exit codes: 0 read, 2 no handover or not readable.
    """
    if as_python:
        output.lines(as_calls(source, **options))
        return
    if len(source) == 1 and Snapshot.recognizes(source[0]):
        snapshot.run(source[0], as_json=as_json)
        if is_running(source[0]) and os.access(core_of(source[0]), os.R_OK):
            output.line(
                f"note: {core_of(source[0])} can be read: kho owners {source[0]} and kho map {source[0]} use it",
                err=True,
            )
        return
    for line in lost_ranges(source):
        output.line(f"note: {line}", err=True)
    inc = read_unmarked(source, **options)
    for line in lost_of_saved(inc, source):
        output.line(f"note: {line}", err=True)
    report = describe(inc, full=full)
    if as_json:
        output.print_json(report)
    else:
        show(inc, report, ", ".join(source) if inc.placement is None else inc.placement.argument, full=full)
        if inc.scratch is None and options["fdt_phys"] is not None:
            hint = "note: with --fdt-phys the memory is not searched; --scratch A names the array of scratch areas"
            output.line(hint, err=True)
    for row in report.get("refused_memfds", ()):
        output.line(f"note: memfd at {row['phys']:#x}, found by its content, is not read: {row['error']}", err=True)


def lost_ranges(source: tuple[str, ...]) -> Iterator[str]:
    """Yield what a dump has lost, if a source is proc/vmcore of a crash kernel: its own files show where it runs."""
    end = "/proc/vmcore"
    for name in source:
        path = os.path.realpath(name)
        if path.endswith(end) and os.path.isdir(root := path.removesuffix(end) or "/"):  # noqa: PTH112
            from ..doctor import examine

            yield from (found.value for found in examine(root).findings if found.id == "DOC028")


def lost_of_saved(inc: Incoming, source: tuple[str, ...]) -> Iterator[str]:
    """Yield what a saved dump has lost, if a crash kernel wrote it: KHO was on, because it has a handover."""
    if len(source) == 1 and source[0] != "-" and inc.vmcoreinfo("CRASHTIME") is not None:
        from ..doctor.dumps import notes_of_dump

        if not source[0].endswith("/proc/vmcore"):
            yield from notes_of_dump(inc, source[0], is_on=True)


def as_calls(source: tuple[str, ...], **given: int | None) -> str:
    """Return equivalent Python calls as source text."""
    if len(source) == 1 and Snapshot.recognizes(source[0]):
        return snapshot.as_calls(source[0])
    named = [f"{name}={value:#x}" for name, value in given.items() if value is not None]
    call = ", ".join([repr(source[0]) if len(source) == 1 else repr(list(source)), *named])
    return (
        f"import kho\n\ninc = kho.open({call})\nprint(inc.compatible, inc.folios_by_order, inc.subtrees, inc.scratch)"
    )


def show(inc: Incoming, report: dict[str, Any], source: str, *, full: bool) -> None:
    """Print the report as text."""
    output.line((inc.compatible, "bold"), f" handover ({report['kernels']}) in {source}")
    output.doubts(report["unverified"], report["drafts"])
    output.line()
    facts = output.table("", "", "", limit=output.LINE)
    facts.add("root FDT", f"{inc.fdt_phys:#x}", f"{inc.fdt.totalsize} bytes")
    about = f"{inc.metadata_pages} pages of metadata" if inc.finalized else UNFINALIZED
    if inc.map_lost is not None:
        about = map_line(*inc.map_lost)
    facts.add("preserved-memory-map", f"{inc.preserved_memory_map:#x}", about)
    if inc.bitmap_bytes is None:
        facts.add("page size", str(inc.page_size), f"{inc.certainty}: {inc.page_size_why}")
    else:
        facts.add("page size", str(inc.page_size), inc.page_size_why)
        facts.add("bitmaps", f"{inc.bitmap_bytes} bytes", f"{report['certainty']}: {report['bitmap_bytes_why']}")
    if dump := report.get("dump"):
        facts.add("dump", *dump_line(dump))
    facts.show(header=False)

    if inc.map_lost is not None:
        heading("Preserved", f": not known, as {map_line(*inc.map_lost)}")
    else:
        heading("Preserved", f": {inc.nr_folios} folios, {output.size(inc.preserved_bytes)}")
        orders = output.table(">order", ">folio", ">folios", ">bytes")
        for order, count in sorted(inc.folios_by_order.items()):
            each = inc.page_size << order
            orders.add(str(order), output.size(each), str(count), output.size(count * each))
        orders.show()
    if inc.pages_outside:
        output.line(f"{inc.pages_outside} preserved pages are not in this memory")

    if inc.scratch is None:
        heading("Scratch", ": not known (the next kernel is told of it outside the FDT)")
    else:
        total = output.size(sum(nbytes for _, nbytes in inc.scratch))
        heading("Scratch", f": {len(inc.scratch)} areas, {total}, where the next kernel boots")
        areas = output.table("for", "address", ">size")
        for i, (addr, nbytes) in enumerate(inc.scratch):
            areas.add(("low memory", "global")[i] if i < 2 else f"node {i - 2}", f"{addr:#x}", output.size(nbytes))
        areas.show()

    heading("Subtrees", f": {len(inc.subtrees)}")
    subtrees = output.table("name", "address", ">size")
    for name, sub in inc.subtrees.items():
        subtrees.add(name, f"{sub.phys:#x}", "unknown" if sub.size is None else f"{sub.size} bytes")
    if inc.subtrees:
        subtrees.show()
    for name, why in inc.malformed_subtrees.items():
        output.line(f"{name}: {why}")
    show_payloads(report)
    if full and inc.map_lost is None:
        output.line()
        if "folios" in report:
            listed = output.table("address", ">order")
            for phys, order in report["folios"]:
                listed.add(f"{phys:#x}", str(order))
        else:
            listed = output.table("address", ">order", ">folios")
            for phys, order, count in report["folio_runs"]:
                listed.add(f"{phys:#x}", str(order), str(count))
        listed.show()


def dump_line(dump: dict[str, Any]) -> tuple[str, str]:
    """Format what a dump says of itself, for two columns: the release of its kernel, then time and filter."""
    said = [f"crashed {dump['crash_time']}"] if "crash_time" in dump else []
    if "level" in dump:
        said.append(f"level {dump['level']}: without {level_names(dump['level'])}")
    return f"Linux {dump['release']}" if "release" in dump else "", "; ".join(said)


def show_payloads(report: dict[str, Any]) -> None:
    """Print the payloads of the subtrees."""
    for name, row in report["subtrees"].items():
        if "error" in row:
            output.line(f"{name}: {row['error']}")
        elif "raw" in row:
            output.line(f"{name}: no decoder; begins with {row['raw']}")
    if "kexec_metadata" in report:
        chain = report["kexec_metadata"]
        heading("Chain", f": kexec {chain['kexec_count']}, previous kernel {chain['previous_release']}")
    if report.get("reserve_mem"):
        heading("reserve_mem")
        regions = output.table("name", "address", ">size")
        for name, (start, nbytes) in report["reserve_mem"].items():
            regions.add(name, f"{start:#x}", output.size(nbytes))
        regions.show()
    if "kho_test" in report:
        test = report["kho_test"]
        holds = test["csum_holds"]
        verdict = "OK" if holds is True else "mismatch" if holds is False else f"not verified ({holds})"
        heading("kho_test", f": {test['nr_folios']} folios; checksum {test['csum']:#010x}: {verdict}")
    if "live" in report:
        live = report["live"]
        what = f"{live['image']}, version {live['version']}"
        heading("kho.live", f": generation {live['generation']} of {what}")
        objects = output.table("object", "dtype", ">shape", "address", ">size", ">since")
        for row in live["objects"]:
            shape = " x ".join(map(str, row["shape"])) if row["dtype"] is not None else ""
            place, nbytes = f"{row['phys']:#x}", output.size(row["nbytes"])
            objects.add(row["name"], row["dtype"] or "bytes", shape, place, nbytes, str(row["generation"]))
        if live["objects"]:
            objects.show()
    if "luo" in report:
        show_luo(report["luo"])
    if "systemd" in report:
        show_store(report["systemd"])
    if "kernel" in report:
        show_kernel(report["kernel"], unlisted=report.get("luo", {}).get("sessions") == [])
    if "unlisted_memfds" in report:
        show_unlisted(report["unlisted_memfds"], finalized=report["finalized"], lost="map_lost" in report)
    show_fields(list(fielded(report)))


KNOWN = {
    *("compatible", "data", "token", "size", "folios", "sha256", "error", "raw"),
    *("pos", "seals", "flags", "nr_folios"),
    *("unit", "fd", "unverified"),
}
"""What the table of files shows, or leaves out, of every file."""
ABOUT = {"draft", "source", "units", "unsure"}
"""What a description says of the fields, next to them."""
ENTRY = {"compatible", "data", "token", "sha256", "unit", "fd", "unverified"}
"""What a file's row has in addition to its fields."""
MOST = 8
"""Maximum number of records of a list that are shown."""


def fielded(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the payloads whose fields are shown one by one, each with its owner."""
    for name, row in report.get("payloads", {}).items():
        yield f"subtree {name}", row
    luo = report.get("luo", {})
    for session in luo.get("sessions", []):
        for row in session["files"]:
            if row.keys() - KNOWN:
                yield f"{session['name']}/{row['token']:#x}", row
    for name, row in luo.get("flb_data", {}).items():
        yield f"FLB {name}", row


def show_fields(payloads: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print the fields of payloads, numbers with their units."""
    if not payloads:
        return
    drafts = [owner for owner, row in payloads if row.get("draft")]
    heading("Fields", ": of public drafts, which may still change" if len(drafts) == len(payloads) else "")
    table = output.table("of", "field", "value", limit=output.LINE)
    for owner, row in payloads:
        shown = owner
        units = row.get("units", {})
        for name, value in row.items():
            if name in ABOUT | ENTRY or name.removesuffix("_text") in row.keys() - {name}:
                continue
            if isinstance(value, list):
                for at, item in enumerate(value[:MOST]):
                    table.add(shown, f"{name}[{at}]", value_text(item, name, units))
                    shown = ""
                more = len(value) + row.get(f"{name}_omitted", 0)
                if more > MOST or not value:
                    table.add(shown, name, f"{more} in all")
            else:
                said = row.get(f"{name}_text")
                table.add(shown, name, value_text(value, name, units) + ("" if said is None else f" ({said})"))
            shown = ""
        for key in ("unsure", "source"):
            if key in row:
                table.add(shown, key if key == "unsure" else "draft of", row[key])
    table.show()


def value_text(value: Any, name: str, units: dict[str, str]) -> str:
    """Format a value with the unit of its field; a record as its fields."""
    if isinstance(value, dict):
        parts = []
        for key, item in value.items():
            if key.endswith("_text") and key.removesuffix("_text") in value:
                continue
            said = value.get(f"{key}_text")
            parts.append(f"{key} {value_text(item, f'{name}.{key}', units) if said is None else said}")
        return ", ".join(parts)
    unit = units.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or unit is None:
        return str(value)
    if unit == "bytes" and value >= 0:
        return output.size(value)
    if unit in ("pfn", "phys", "token"):
        return f"{value:#x}" if unit in name else f"{unit} {value:#x}"
    return f"{value:#o}" if unit == "mode" else f"{value} {unit}"


def show_unlisted(memfds: list[dict[str, Any]], *, finalized: bool, lost: bool) -> None:
    """Print the memfds in no session: those preserved before the jump, then those that were not retrieved."""
    for in_map, why in (
        (True, "preserved; a session lists its files from the jump on"),
        (False, why_outside(finalized=finalized, lost=lost)),
    ):
        found = [row for row in memfds if row["in_map"] is in_map]
        if not found:
            continue
        heading("Memfds in no session" if in_map or lost else "Memfds outside the map", f": {len(found)}, {why}")
        files = output.table("address", "kind", ">size", ">folios", "sha256")
        for row in found:
            digest = (row.get("sha256") or "")[:16] or row.get("absent") or row.get("error") or ""
            files.add(f"{row['phys']:#x}", row["compatible"], output.size(row["size"]), str(row["folios"]), digest)
        files.show()


def show_kernel(kernel: dict[str, Any], *, unlisted: bool) -> None:
    """Print what the kernel's own variables tell: its sessions before the jump, and those that it got.

    If they cannot be read, say so only where LUO's lists have no session either.
    """
    if "error" in kernel:
        if unlisted:
            output.line()
            output.line(f"the kernel's own list of sessions cannot be read: {kernel['error']}")
        return
    heading("Kernel", f": Linux {kernel['release']}, by its symbols and types ({kernel['source']})")
    facts = output.table("", "", "")
    if "previous_release" in kernel:
        facts.add("previous kernel", kernel["previous_release"], f"kexec {kernel.get('kexec_count', 0)}")
    for side, what in (("out_fdt", "for the next kernel"), ("in_fdt", "this kernel got")):
        if side in kernel:
            facts.add("root FDT", f"{kernel[side]:#x}", what)
    if "scratch_phys" in kernel:
        facts.add("kho_scratch", f"{kernel['scratch_phys']:#x}", f"{len(kernel['scratch'])} areas")
    facts.show(header=False)
    for key, title, why in (
        ("sessions", "Sessions before the jump", "the kernel writes them into LUO's lists at the jump"),
        ("incoming_sessions", "Sessions this kernel got", "not finished yet"),
    ):
        if kernel.get(key):
            show_sessions(title, why, kernel[key])
    for problem in kernel.get("problems", ()):
        output.line(f"kernel: {problem}")


def show_sessions(title: str, why: str, sessions: list[dict[str, Any]]) -> None:
    """Print the sessions of one of the kernel's lists."""
    heading(title, f": {len(sessions)}, {why}")
    files = output.table("session", ">token", "kind", ">size", "name", "address", "")
    for session in sessions:
        name = session["name"] or '""'
        for row in session["files"]:
            size = output.size(row["size"]) if "size" in row else ""
            state = "" if "retrieved" not in row else "retrieved" if row["retrieved"] else "waits"
            kind = row["compatible"] or "unknown"
            files.add(name, f"{row['token']:#x}", kind, size, row.get("name", ""), f"{row['data']:#x}", state)
        if not session["files"]:
            files.add(name, "", "no files")
    files.show()


def show_luo(luo: dict[str, Any]) -> None:
    """Print sessions, files and FLBs."""
    heading("LUO", f": {luo['compatible']}, live update {luo['liveupdate_num']}")
    if "features" in luo:
        output.line("; ".join(f"{what}: {', '.join(names) or 'none'}" for what, names in luo["features"].items()))
    files = output.table("session", ">token", "kind", ">size", ">folios", "sha256")
    for session in luo["sessions"]:
        for row in session["files"]:
            size = output.size(row["size"]) if "size" in row else ""
            digest = (row.get("sha256") or "")[:16] or row.get("absent") or row.get("error") or ""
            folios = str(row.get("folios", ""))
            kind = row["compatible"] + (" (draft)" if row.get("draft") else "")
            files.add(session["name"] or '""', f"{row['token']:#x}", kind, size, folios, digest)
        if not session["files"]:
            files.add(session["name"] or '""', "", "no files")
    if luo["sessions"]:
        files.show()
    if not luo["sessions"] and not luo["flbs"]:
        output.line("no session is listed: the kernel writes LUO's lists at the jump")
    if luo["flbs"]:
        flbs = output.table("FLB", "data", ">files")
        decoded = luo.get("flb_data", {})
        for name, data, count in luo["flbs"]:
            flbs.add(name + (" (draft)" if decoded.get(name, {}).get("draft") else ""), f"{data:#x}", str(count))
        flbs.show()


def show_store(store: dict[str, Any]) -> None:
    """Print the map of systemd's descriptor store."""
    if "error" in store:
        heading("systemd", f": the map of the descriptor store cannot be read: {store['error']}")
        return
    count = "unknown" if store["kexec_count"] is None else store["kexec_count"]
    heading("systemd", f": descriptor store, KExecCount {count}")
    entries = output.table("unit", "descriptor", "kept as")
    for row in store["entries"]:
        place = f"file {row['token']:#x}" if row["session"] is None else f"session {row['session']}"
        entries.add(row["unit"], row["name"], place)
    if store["entries"]:
        entries.show()
    for problem in store["problems"]:
        output.line(("store", "bold red"), f": {problem}")


def heading(title: str, rest: str = "") -> None:
    """Print an empty line, then a bold title followed by `rest`."""
    output.line()
    output.line((title, "bold"), rest)
