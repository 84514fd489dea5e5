"""`kho extract`: copy files, subtrees, regions and folios out of a handover."""

from __future__ import annotations

import sys
from typing import Any

import click

from .. import errors
from .._kho import Incoming
from ..handover import extract
from . import output
from .options import Number, read, source_options


@click.command("extract")
@source_options
@click.option("--session", metavar="S", help="Extract a file of this LUO session; needs --token.")
@click.option("--token", type=Number(), metavar="T", help="The file's token.")
@click.option("--subtree", metavar="NAME", help="Extract the blob of a subtree.")
@click.option("--reserve-mem", metavar="NAME", help="Extract a reserve_mem= region.")
@click.option("--memfd", type=Number(), metavar="PHYS", help="Extract the memfd in no session whose structure is here.")
@click.option("--folio", type=Number(), metavar="PHYS", help="Extract the folio at this physical address.")
@click.option("--dmesg", is_flag=True, help="Extract the previous kernel's last messages (draft: pstore-kho).")
@click.option("--all", "folder", type=click.Path(), metavar="DIR", help="Extract everything and DIR/manifest.json.")
@click.option("-o", "--output", "target", type=click.Path(), metavar="FILE", help="The file to write; - is stdout.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print the list of written files as data.")
def command(
    source: tuple[str, ...],
    session: str | None,
    token: int | None,
    subtree: str | None,
    reserve_mem: str | None,
    memfd: int | None,
    folio: int | None,
    dmesg: bool,
    folder: str | None,
    target: str | None,
    force: bool,
    as_json: bool,
    **options: int | None,
) -> None:
    """Write contents of the handover in SOURCE to files.

    Files are sparse, get their name only once complete, and replace existing files only with --force. The output has
    the format of sha256sum, for `sha256sum -c`. Of contents that are partly not in the dump (left out by its filter, or
    cut off) the rest is written to a file whose name ends in .partial, without a sum; what is missing is a hole there.

    \b
    Exit codes: 0 written, 1 a part is not in the dump or, with --all, could not be read, 2 not found or not readable.
    """
    chosen = [name is not None for name in (session, subtree, reserve_mem, memfd, folio, folder, dmesg or None)]
    if sum(chosen) != 1 or (session is None) != (token is None):
        raise click.UsageError(
            "one of --session with --token, --subtree, --reserve-mem, --memfd, --folio, --dmesg or --all is required"
        )
    if (folder is None) != (target is not None):
        raise click.UsageError("--all takes a directory; omit -o" if folder else "-o FILE is required")
    inc = read(source, **options)
    if folder is not None:
        with output.progress("extracting") as told:
            manifest = extract.save_all(inc, folder, force=force, progress=told)
        sys.exit(show_all(manifest, folder, as_json=as_json))
    try:
        if session is not None and token is not None:
            item = extract.file(inc, session, token)
        elif subtree is not None:
            item = extract.subtree(inc, subtree)
        elif reserve_mem is not None:
            item = extract.region(inc, reserve_mem)
        elif dmesg:
            item = extract.dmesg(inc)
        elif memfd is not None:
            item = extract.memfd(inc, memfd)
        else:
            item = extract.folio(inc, folio or 0)
        write(inc, item, target or "", force=force, as_json=as_json)
    except errors.MissingMemoryError as error:
        output.line(f"kho: {error}", err=True)
        sys.exit(1)


def write(inc: Incoming, item: extract.Item, target: str, *, force: bool, as_json: bool) -> None:
    """Extract one item; exit with code 1 if a part of it is not in the dump."""
    content = item.contents()
    allowance = extract.Allowance(inc)
    saved: extract.Saved | None = None
    with output.progress("extracting") as told:
        if target == "-":
            digest = extract.stream(content, output.binary(force=force), progress=told, allowance=allowance)
        else:
            saved = extract.save(content, target, force=force, progress=told, allowance=allowance, partial=True)
            digest = saved.sha256
            target = str(saved.path) if saved.missing else target
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
    if saved is not None and saved.missing:
        entry |= {"missing": [list(piece) for piece in saved.missing], "error": missing_text(saved)}
    if as_json and target != "-":
        output.print_json(entry)
    elif target != "-":
        show(entry)
    output.line(f"{content.what}: {summary(entry)}", err=True)
    if "missing" in entry:
        sys.exit(1)


def missing_text(saved: extract.Saved) -> str:
    """Say how much of a file is not in the dump."""
    return f"{saved.missing_bytes} of its {saved.size} bytes are not in the dump"


def summary(entry: dict[str, Any]) -> str:
    """Format the size of an entry and of its holes."""
    holes = entry["size"] - entry["data_bytes"]
    return f"{entry['size']} bytes" + (f", {output.size(holes)} of them holes" if holes else "")


def show(entry: dict[str, Any], prefix: str = "") -> None:
    """Print a line in the format of sha256sum."""
    if "missing" in entry:
        output.line(f"{prefix}{entry['path']}: {entry['error']}: no sum", err=True)
    elif entry["sha256"] is None:
        output.line(f"{entry['path']}: not hashed, its holes are too large", err=True)
    else:
        output.exact_line(sum_line(entry["sha256"], prefix + entry["path"]))


def sum_line(digest: str, path: str) -> str:
    """Format a line of sha256sum: line ends and backslashes in the name are escaped, marked by a leading backslash."""
    escaped = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == path else chr(92)}{digest}  {escaped}"


def show_all(manifest: dict[str, Any], folder: str, *, as_json: bool) -> int:
    """Print the files that --all wrote and return the exit code."""
    if as_json:
        output.print_json(manifest)
    written = failed = 0
    for entry in manifest["entries"]:
        if entry["path"] is None:
            failed += 1
            output.line(f"{entry['kind']} {entry['name']}: {entry['error']}", err=True)
            continue
        written += 1
        failed += "missing" in entry
        if not as_json or "missing" in entry:
            show(entry, f"{folder.rstrip('/')}/")
    output.line(f"{written} files and manifest.json in {folder}", err=True)
    return 1 if failed else 0
