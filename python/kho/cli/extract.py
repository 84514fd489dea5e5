"""`kho extract`: take files, subtrees, regions and folios out of a handover."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..handover import extract
from . import output
from .options import Number, read, source_options


@click.command("extract")
@source_options
@click.option("--session", metavar="S", help="Take a file of this LUO session; with --token.")
@click.option("--token", type=Number(), metavar="T", help="The file's token.")
@click.option("--subtree", metavar="NAME", help="Take a subtree's blob.")
@click.option("--reserve-mem", metavar="NAME", help="Take a reserve_mem= region.")
@click.option("--folio", type=Number(), metavar="PHYS", help="Take the preserved folio at this physical address.")
@click.option("--all", "folder", type=click.Path(), metavar="DIR", help="Take everything, with a DIR/manifest.json.")
@click.option("-o", "--output", "target", type=click.Path(), metavar="FILE", help="Where to write; - is stdout.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as data.")
def command(
    source: tuple[str, ...],
    session: str | None,
    token: int | None,
    subtree: str | None,
    reserve_mem: str | None,
    folio: int | None,
    folder: str | None,
    target: str | None,
    force: bool,
    as_json: bool,
    **options: int | None,
) -> None:
    """Write contents of the handover in SOURCE to files.

    Files are sparse, appear when they are whole, and replace nothing without --force. What is printed is what sha256sum
    prints, and `sha256sum -c` takes it.

    \b
    Exit codes: 0 written, 1 something of --all could not be read, 2 not there or not readable.
    """
    chosen = [name is not None for name in (session, subtree, reserve_mem, folio, folder)]
    if sum(chosen) != 1 or (session is None) != (token is None):
        raise click.UsageError("say what: --session with --token, --subtree, --reserve-mem, --folio or --all")
    if (folder is None) != (target is not None):
        raise click.UsageError("--all takes a directory and no -o" if folder else "say where to write: -o FILE")
    inc = read(source, **options)
    if folder is not None:
        with output.progress("extracting") as told:
            manifest = extract.save_all(inc, folder, force=force, progress=told)
        sys.exit(show_all(manifest, folder, as_json=as_json))
    if session is not None and token is not None:
        item = extract.file(inc, session, token)
    elif subtree is not None:
        item = extract.subtree(inc, subtree)
    elif reserve_mem is not None:
        item = extract.region(inc, reserve_mem)
    else:
        item = extract.folio(inc, folio or 0)
    content = item.contents()
    allowance = extract.Allowance(inc)
    with output.progress("extracting") as told:
        if target == "-":
            digest = extract.stream(content, output.binary(force=force), progress=told, allowance=allowance)
        else:
            saved = extract.save(content, target or "", force=force, progress=told, allowance=allowance)
            digest = saved.sha256
    entry = {
        **item.facts,
        "kind": item.kind,
        "name": item.name,
        "phys": item.phys,
        "size": item.size,
        "path": target,
        "data_bytes": content.data_bytes,
        "sha256": digest,
    }
    if as_json and target != "-":
        output.print_json(entry)
    elif target != "-":
        show(entry)
    output.line(f"{content.what}: {summary(entry)}", err=True)


def summary(entry: dict[str, Any]) -> str:
    """Say how much it is."""
    holes = entry["size"] - entry["data_bytes"]
    return f"{entry['size']} bytes" + (f", {output.size(holes)} of them holes" if holes else "")


def show(entry: dict[str, Any], prefix: str = "") -> None:
    """Print a line as sha256sum does."""
    if entry["sha256"] is None:
        output.line(f"{entry['path']}: not hashed, too many zeros", err=True)
    else:
        output.exact_line(sum_line(entry["sha256"], prefix + entry["path"]))


def sum_line(digest: str, path: str) -> str:
    """Write a line as sha256sum does: with line ends and backslashes in the name escaped, and that said."""
    escaped = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == path else chr(92)}{digest}  {escaped}"


def show_all(manifest: dict[str, Any], folder: str, *, as_json: bool) -> int:
    """Print what --all wrote; the exit code."""
    if as_json:
        output.print_json(manifest)
    written = failed = 0
    for entry in manifest["entries"]:
        if entry["path"] is None:
            failed += 1
            output.line(f"{entry['kind']} {entry['name']}: {entry['error']}", err=True)
            continue
        written += 1
        if not as_json:
            show(entry, f"{folder.rstrip('/')}/")
    output.line(f"{written} files and manifest.json in {folder}", err=True)
    return 1 if failed else 0
