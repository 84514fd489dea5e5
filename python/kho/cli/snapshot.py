"""`kho inspect` for debugfs: a directory, the running machine, or a single FDT."""

from __future__ import annotations

import hashlib
from typing import Any

from .._kho import Snapshot, SnapshotSide
from ..handover.running import missing_root
from ..text import UNFINALIZED
from . import output

WAYS = {"in": "Handed to this kernel", "out": "To be handed to the next kernel"}


def run(source: str, *, as_json: bool) -> None:
    """Print the snapshot of `source` as text or JSON."""
    taken = Snapshot.open(source)
    report = describe(taken)
    if as_json:
        output.print_json(report)
    else:
        show(taken, report)


def as_calls(source: str) -> str:
    """Return equivalent Python calls as source text."""
    return f"import kho\n\nsnap = kho.Snapshot.open({source!r})\nprint(snap.incoming, snap.outgoing, snap.scratch)"


def describe(snap: Snapshot) -> dict[str, Any]:
    """Return the report as a dict; absent parts are omitted, or null if they are optional."""
    report: dict[str, Any] = {"kind": snap.kind, "path": str(snap.path)}
    facts = {"version": snap.version, "cmdline": snap.cmdline, "finalized": snap.finalized}
    report.update({name: fact for name, fact in facts.items() if fact is not None})
    for name, areas in (("scratch", snap.scratch), ("ram", snap.ram)):
        if areas is not None:
            report[name] = [list(area) for area in areas]
    for name, side in (("in", snap.incoming), ("out", snap.outgoing)):
        report[name] = None if side is None else describe_side(side)
    if snap.outgoing is not None and snap.outgoing.fdt is None:
        report["out"]["missing"] = missing_root(snap)
    return report


def describe_side(side: SnapshotSide) -> dict[str, Any]:
    """Return one direction, `in` or `out`, as a dict."""
    report: dict[str, Any] = {
        "fdt_bytes": None if side.fdt is None else len(side.fdt),
        "compatible": side.compatible,
        "preserved_memory_map": side.preserved_memory_map,
        "sub_fdts": {
            name: {"size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
            for name, blob in side.sub_fdts.items()
        },
    }
    if side.truncated is not None:
        report["truncated"] = {"totalsize": side.truncated[0], "size": side.truncated[1]}
    if side.problem is not None:
        report["problem"] = side.problem
    return report


def show(snap: Snapshot, report: dict[str, Any]) -> None:
    """Print the report as text."""
    what = {"live": "the running machine", "fdt": f"the FDT {snap.path}"}.get(snap.kind, str(snap.path))
    output.line(f"Handover from {what}: FDTs only, no memory, so no folios")
    if snap.version is not None:
        output.line(snap.version)
    if snap.cmdline is not None:
        output.line(f"command line: {snap.cmdline}")
    if snap.finalized is not None:
        output.line("finalized: the map was written" if snap.finalized else "not finalized: there is no map yet")
    for way, side in (("in", snap.incoming), ("out", snap.outgoing)):
        if side is not None:
            missing = missing_root(snap) if way == "out" else "not there"
            show_side("Root FDT" if snap.kind == "fdt" else WAYS[way], side, missing)
    if snap.scratch is not None:
        output.line()
        output.line(("Scratch", "bold"), f": {len(snap.scratch)} areas, where the next kernel boots")
        areas = output.table("for", "address", ">size")
        for i, (addr, nbytes) in enumerate(snap.scratch):
            areas.add(("low memory", "global")[i] if i < 2 else f"node {i - 2}", f"{addr:#x}", output.size(nbytes))
        areas.show()
    if snap.ram is not None:
        total = output.size(sum(nbytes for _, nbytes in snap.ram))
        output.line()
        output.line(("RAM", "bold"), f": {total} in {len(report['ram'])} ranges")


def show_side(title: str, side: SnapshotSide, missing: str) -> None:
    """Print one direction, `in` or `out`, as text."""
    output.line()
    if side.fdt is None:
        output.line((title, "bold"), f": root FDT {missing}")
    else:
        output.line((title, "bold"), f": {side.compatible or 'no compatible'}")
        where = "unknown" if side.preserved_memory_map is None else f"{side.preserved_memory_map:#x}"
        output.line(f"preserved-memory-map {where}, FDT of {len(side.fdt)} bytes")
        if side.preserved_memory_map == 0:
            output.line(
                f"{UNFINALIZED} (with liveupdate=on the kernel finalizes by itself; else write 1 to out/finalize)"
            )
    if side.truncated is not None:
        total, there = side.truncated
        output.line(
            f"the FDT is truncated: {there} bytes of {total}. Linux 6.19 and later show it with the size it had at "
            "boot; property names are missing, compatible and map are recognized by value and position"
        )
    elif side.problem is not None:
        output.line(f"the FDT is damaged: {side.problem}")
    if side.sub_fdts:
        blobs = output.table("subtree", ">size")
        for name, blob in side.sub_fdts.items():
            blobs.add(name, f"{len(blob)} bytes")
        blobs.show()
