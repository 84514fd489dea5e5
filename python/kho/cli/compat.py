"""`kho compat`: can that kernel take over what this one holds?"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .._kho import Snapshot
from ..errors import ParameterError, SourceError
from ..handover.compat import Judged, Offer, Target, as_data, judge, notes, worst
from ..handover.running import UnreadableError, missing_root
from ..kernelimage import read_kernel
from ..kernels import KERNELS, Release, differences, faults, known_kernel
from . import output
from .options import Number, read, read_options, read_running

STYLES = {"taken": "green", "unknown": "yellow", "lost": "red", "refused": "red", "panics": "bold red"}
CODES = {"taken": 0, "unknown": 2, "lost": 1, "refused": 1, "panics": 1}
KERNEL_IS = "a release (7.0.11), or a kernel's file (vmlinux, bzImage, Image, EFI zboot, or a configuration)"
HANDOVER_IS = "HANDOVER is a memory image, live, or a directory with debugfs files"
RELEASE = re.compile(r"v?[0-9]{1,3}\.[0-9]{1,3}([.+-]\S*)?$")


@click.command("compat")
@click.argument("args", nargs=-1, metavar="HANDOVER... TARGET")
@read_options
@click.option(
    "--scratch",
    type=Number(),
    metavar="A",
    help="Physical address of the array of scratch areas; else found by the search, which --fdt-phys leaves out.",
)
@click.option(
    "--cmdline",
    metavar="LINE",
    help="Command line of the next kernel: kho=, liveupdate=, crashkernel= and reserve_mem= are judged.",
)
@click.option("--matrix", is_flag=True, help="Print what becomes of a handover between each two kernels, and stop.")
@click.option("--markdown", is_flag=True, help="With --matrix or two releases: print Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def command(
    args: tuple[str, ...],
    cmdline: str | None,
    matrix: bool,
    markdown: bool,
    as_json: bool,
    **options: int | None,
) -> None:
    """Judge whether the kernel TARGET can take over what HANDOVER holds, object by object.

    HANDOVER is what `kho inspect` takes, "live" (debugfs of the running machine) or a directory with debugfs files.
    TARGET is a release (7.0.11), a kernel's file (vmlinux, bzImage, arm64 Image, EFI zboot, packed or not), a
    configuration, or a directory such as /boot: then each kernel in it is judged.

    Of two kernels, each a release or a kernel's file, it prints what differs between them.

    \b
      kho compat handover.elf 7.0
      kho compat live /boot/vmlinuz-7.1.13
      kho compat 6.19 7.0
      kho compat 6.19 /boot/vmlinuz-7.1.13

    Each object is taken; lost (the kernel boots with the rest); refused (it boots cold); the kernel panics; or unknown.

    \b
    Exit codes: 0 all is taken, 1 something is not, 2 cannot tell, or not readable. Of a directory: the worst kernel's.
    """
    if matrix:
        show_matrix(markdown=markdown, as_json=as_json)
        return
    if len(args) < 2:
        raise click.UsageError("HANDOVER and TARGET are needed: kho compat handover.elf 7.0, or two releases")
    *source, target = args
    if len(source) == 1 and (kernel := kernel_named(source[0])) is not None:
        (other,) = targets(target)[:1] if not Path(target).is_dir() else (None,)
        if other is None:
            raise ParameterError(f"{target}: a directory; of two kernels each is {KERNEL_IS}")
        show_differences(kernel, other, markdown=markdown, as_json=as_json)
        return
    offer = offer_of(tuple(source), **options)
    judged = [(kernel, judge(offer, kernel)) for kernel in targets(target, cmdline)]
    if as_json:
        output.print_json({"handover": list(source), "targets": [data(offer, *each) for each in judged]})
    else:
        for kernel, rows in judged:
            show(offer, kernel, rows)
    sys.exit(max((CODES[worst(rows)] for _, rows in judged), key=(0, 2, 1).index))


def is_release(text: str) -> bool:
    """Say whether an argument is a release, and not a file of that name."""
    return RELEASE.match(text) is not None and not Path(text).exists()


def kernel_named(text: str) -> Target | None:
    """Return the kernel that the first argument names, a release or a kernel's file; None for another source.

    Raises: ParameterError for what does not exist.
    """
    if is_release(text):
        return Target(Release.parse(text))
    path = Path(text)
    if not path.exists() and "@" not in text and "," not in text and text not in ("live", "-"):
        raise ParameterError(f"{text}: no such file: {HANDOVER_IS}; to compare two kernels, {KERNEL_IS}")
    if not path.is_file():
        return None
    try:
        image = read_kernel(path)
    except (SourceError, OSError):
        return None
    return Target(image.release, image)


def offer_of(source: tuple[str, ...], **options: int | None) -> Offer:
    """Read what is handed over, from memory or from debugfs."""
    if len(source) != 1 or not Snapshot.recognizes(source[0]):
        return Offer.of(read(source, **options))
    shown = Snapshot.open(source[0])
    if shown.kind == "fdt" or (shown.outgoing is not None and shown.outgoing.compatible is not None):
        return Offer.of_snapshot(shown)
    # After a handover debugfs does not show it.
    try:
        inc, _ = read_running(source[0], **options)
    except UnreadableError as error:
        raise ParameterError(
            f"{source[0]}: debugfs has no outgoing root FDT: {missing_root(shown)}; it is in memory: {error}"
        ) from error
    return Offer.of(inc).unwritten(shown)


def targets(text: str, cmdline: str | None = None) -> list[Target]:
    """Find the kernels that an argument means. Raises: SourceError for a directory without one."""
    if is_release(text):
        return [Target(Release.parse(text), None, cmdline)]
    path = Path(text)
    if not path.exists():
        raise SourceError(f"{text}: no such file: TARGET is {KERNEL_IS}, or a directory such as /boot")
    if not path.is_dir():
        image = read_kernel(path)
        return [Target(image.release, image, cmdline)]
    found, refused = [], []
    for file in sorted(path.iterdir()):
        if file.name.startswith(("vmlinu", "bzImage", "Image", "kernel-")) and file.is_file():
            try:
                image = read_kernel(file)
            except SourceError as error:
                refused.append(str(error))
            else:
                found.append(Target(image.release, image, cmdline))
    if not found:
        raise SourceError("; ".join([f"{path}: no kernel in it (vmlinuz-*, vmlinux, bzImage, Image)", *refused]))
    # A checksum or a symbol table next to a kernel is no error; a damaged kernel is told.
    for line in refused:
        output.line(f"warning: {line}", err=True)
    return found


def data(offer: Offer, target: Target, rows: list[Judged]) -> dict[str, Any]:
    """Give a kernel's judgement as data."""
    return {
        "target": None if target.image is None else target.image.path,
        "release": target.release.text,
        "verdict": worst(rows),
        "objects": as_data(rows),
        "notes": [{"kernel": kernel, "note": note} for kernel, note in notes(offer, target)],
    }


def show(offer: Offer, target: Target, rows: list[Judged]) -> None:
    """Print a kernel's judgement."""
    verdict = worst(rows)
    where = "" if target.image is None else f" ({target.image.path})"
    output.line(f"{offer.abi} handover to Linux {target.release}{where}: ", (verdict, STYLES[verdict]))
    output.line()
    table = output.table("object", "verdict", "why", limit=output.LINE)
    for row in rows:
        table.add(row.object, (row.verdict, STYLES[row.verdict]), row.why)
    table.show()
    for kernel, note in notes(offer, target) if verdict not in ("refused", "panics") else ():
        output.line(f"note: {kernel}: {note}")


def cells(name: str) -> dict[str, list[Judged]]:
    """Judge what a kernel writes for every kernel there is."""
    offer = Offer.typical(KERNELS[name])
    return {other: judge(offer, Target(Release.parse(other))) for other in KERNELS}


def show_matrix(*, markdown: bool, as_json: bool) -> None:
    """Print the verdict between each two kernels; of an object that is not taken, its name."""
    table = {name: cells(name) for name in KERNELS}
    if as_json:
        matrix = {name: {other: as_data(rows) for other, rows in row.items()} for name, row in table.items()}
        output.print_json({"matrix": matrix})
        return
    if markdown:
        shown = [(f"**{name}**", *(cell(rows) for rows in row.values())) for name, row in table.items()]
        print_markdown("from, to", *KERNELS, rows=shown)
        return
    printed = output.table("from, to", *KERNELS)
    for name, row in table.items():
        printed.add(name, *((cell(rows), STYLES[worst(rows)]) for rows in row.values()))
    printed.show()


def cell(rows: list[Judged]) -> str:
    """Say in a few words what becomes of a handover."""
    verdict = worst(rows)
    if verdict == "refused":
        return "cold boot"
    if verdict == "panics":
        return "panics"
    missing = [row.object.split(",")[0].split(" ")[0] for row in rows if row.verdict in ("lost", "unknown")]
    if "map" in missing:
        return "lost in part"
    return "taken" if not missing else f"without {', '.join(dict.fromkeys(missing))}"


OPTIONS = (
    "KEXEC_HANDOVER",
    "KEXEC_HANDOVER_ENABLE_DEFAULT",
    "KEXEC_HANDOVER_DEBUG",
    "LIVEUPDATE",
    "LIVEUPDATE_MEMFD",
    "LIVEUPDATE_TEST",
    "TEST_KEXEC_HANDOVER",
    "DEFERRED_STRUCT_PAGE_INIT",
)
"""Configuration options that decide about a handover."""


def built(target: Target) -> dict[str, object]:
    """List what a kernel's file tells that its release does not; None where it does not tell, or there is none."""
    image = target.image
    rows: dict[str, object] = {
        "page_size": None if image is None else image.page_size,
        "largest_order": None if image is None else image.max_page_order,
    }
    rows |= {f"CONFIG_{name}": target.option(name) for name in OPTIONS}
    rows["versions"] = None if image is None or image.versions is None else ", ".join(sorted(image.versions))
    features = None if image is None else image.features
    rows["features"] = (
        None
        if features is None
        else ", ".join(
            f"{name} {row.supported:#x}, requires {row.required:#x}" for name, row in sorted(features.items())
        )
    )
    return rows


def show_differences(one: Target, two: Target, *, markdown: bool, as_json: bool) -> None:
    """Print what differs between two kernels: formats and rules, what their files tell, then faults of one of them."""
    first, second = known_kernel(one.release.text), known_kernel(two.release.text)
    rows, mended = list(differences(first, second)), list(faults(one.release, two.release))
    theirs = built(two)
    both = [(name, a, theirs[name]) for name, a in built(one).items()]
    configured = [(name, a, b) for name, a, b in both if a != b and None not in (a, b)]
    if as_json:
        output.print_json(
            {
                "kernels": [first.name, second.name],
                "differences": {name: [a, b] for name, a, b in rows},
                "configured": {name: [a, b] for name, a, b in configured},
                "files": [None if each.image is None else each.image.path for each in (one, two)],
                "releases": [one.release.text, two.release.text],
                "faults": {
                    fix.name: {
                        "affects": [a, b],
                        "effect": fix.effect,
                        "fixed": fix.remedied(),
                        "upstream": fix.upstream,
                        "remedy": fix.remedy,
                    }
                    for fix, a, b in mended
                },
            }
        )
        return
    listed = [(fix.name, has(a), has(b), fix.remedied(), fix.effect) for fix, a, b in mended]
    shown = [(label(name), said(a), said(b)) for name, a, b in rows]
    shown += [(label(name), said(a), said(b)) for name, a, b in configured]
    heads = [
        f"Linux {kernel.name}" if each.image is None else Path(each.image.path).name
        for kernel, each in ((first, one), (second, two))
    ]
    for each in (one, two):
        if each.image is not None and each.option("KEXEC_HANDOVER") is False:
            output.line(f"warning: {each.image.path}: built without CONFIG_KEXEC_HANDOVER", err=True)
    if markdown:
        print_markdown("", *(head.removeprefix("Linux ") for head in heads), rows=shown)
        if listed:
            output.line()
            print_markdown("fault", one.release.text, two.release.text, "fixed in", "effect", rows=listed)
        return
    if not rows:
        output.line(f"Linux {one.release} and {two.release} write the same formats")
    if shown:
        table = output.table("", *heads)
        for row in shown:
            table.add(*row)
        table.show()
    if listed:
        output.line()
        table = output.table("fault", f"in {one.release}", f"in {two.release}", "fixed in", "effect", limit=output.LINE)
        for entry in listed:
            table.add(*entry)
        table.show()


def print_markdown(*columns: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table as Markdown."""
    for parts in (columns, ("---",) * len(columns), *rows):
        output.line(f"| {' | '.join(parts)} |", limit=output.LINE)


def has(affected: bool | None) -> str:
    """Say whether a release has a fault."""
    return "may" if affected is None else said(affected)


LABELS = {
    "abi": "root compatible",
    "bitmap": "bitmap",
    "levels_16k": "levels of the tree at 16 KiB pages",
    "subtree_property": "property of a subtree",
    "blob_size": "subtrees say their size",
    "luo": "LUO",
    "flb_node": "luo-flb node needed",
    "flbs": "FLBs handed over",
    "memfd": "memfd",
    "kho_test": "folios of kho_test",
    "max_page_order": "MAX_PAGE_ORDER checked on restore",
    "cuts_at_nodes": "ranges cut at NUMA nodes",
    "scratch_nodes": "scratch for nodes",
    "deferred_init": "with DEFERRED_STRUCT_PAGE_INIT",
    "get_name": "ioctl GET_NAME",
    "same_file": "PRESERVE_FD refuses the same file twice",
    "marker": "mark of a preserved folio",
    "enabled_by": "KHO is on by",
    "scratch_option": "sizes of kho_scratch=",
    "scratch_alignment": "scratch sizes rounded up to a",
    "extends_scratch": "scratch extended after a handover",
    "off_in_kdump": "off in a crash kernel",
    "page_size": "page size",
    "largest_order": "MAX_PAGE_ORDER",
    "versions": "versions that LUO lists",
    "features": "features that LUO lists",
}


def label(name: str) -> str:
    """Name a column for people."""
    return LABELS.get(name, name if name.startswith("CONFIG_") else name.replace("_", " "))


def said(value: object) -> str:
    """Say a value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
