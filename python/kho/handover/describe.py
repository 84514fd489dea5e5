"""Describes a handover as a dict, for `kho inspect`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from .. import errors
from .._kho import Incoming
from ..formats import (
    Broken,
    Declared,
    FolioFile,
    KhoTest,
    Live,
    Luo,
    MemfdFile,
    Metadata,
    Payload,
    Raw,
    ReserveMem,
    drafts_in,
    payloads,
    unverified_in,
)
from ..formats.luo import LuoV1
from ..kernels import Kernel, kernels_that_write, spanned
from .absence import NOT_IN_DUMP, absence, dump_facts
from .extract import Allowance, memory_content, sha256_of
from .owners import unlisted
from .symbols import SOURCE, find_kernel

__all__ = ["describe"]

MOST_FOLIOS = 1 << 16
"""Maximum number of folios listed in a report that is not `full`."""
OF_MAP = (
    *("metadata_pages", "nr_folios", "preserved_bytes", "folios_by_order", "pages_outside"),
    *("folios", "folios_sha256"),
)
"""What only the map tells: null if it is not in the dump."""
MOST_BYTES = 1 << 30
"""Maximum number of bytes hashed in a report that is not `full`."""


def lists_folios(inc: Incoming, *, full: bool) -> bool:
    """Whether a report lists every folio.

    True if they are few or, in a full report, if they are no more than an image of this size can plausibly hold. One
    byte of a bitmap holds eight folios, so even a small image can preserve billions.
    """
    return inc.nr_folios <= (max(MOST_FOLIOS, inc.room("items")) if full else MOST_FOLIOS)


def _writers(inc: Incoming, luo: Luo | None) -> list[Kernel]:
    """List the kernels that write these formats; empty if none is known, as for a handover that mixes them."""
    node = luo.has_flb_node if isinstance(luo, LuoV1) else None
    wrote = kernels_that_write(inc.compatible, inc.bitmap_bytes, None if luo is None else luo.compatible, flb_node=node)
    return [kernel for kernel in wrote if inc.finalized or kernel.edits_root]


def describe(inc: Incoming, *, full: bool = False) -> dict[str, Any]:
    """Describe a handover as a dict: layout, map, folios, scratch, and every payload.

    Addresses are integers. Lists of more than 65,536 folios and hashes of more than 1 GiB are omitted unless `full`.
    With `full`, if there are more folios than an image of this size can plausibly hold, they are listed as runs:
    `folio_runs`, `[phys, order, number of folios]` each. A payload that cannot be decoded is described by its error.
    """
    decoded = payloads(inc)
    luo = next((payload for payload in decoded.values() if isinstance(payload, Luo)), None)
    wrote = _writers(inc, luo)
    report: dict[str, Any] = {
        "compatible": inc.compatible,
        "kernels": spanned(wrote) if wrote else inc.kernels,
        "read_as": inc.abi.compatible,
        "unverified": unverified_in(inc, decoded),
        "drafts": drafts_in(inc, decoded),
        "page_size": inc.page_size,
        "page_size_why": inc.page_size_why,
        "certainty": inc.certainty,
        "finalized": inc.finalized,
        "fdt_phys": inc.fdt_phys,
        "other_fdts": inc.others,
        "other_roots": [other._asdict() for other in inc.other_roots],
        "preserved_memory_map": inc.preserved_memory_map,
        "metadata_pages": inc.metadata_pages,
        "nr_folios": inc.nr_folios,
        "preserved_bytes": inc.preserved_bytes,
        "folios_by_order": {str(order): count for order, count in inc.folios_by_order.items()},
        "pages_outside": inc.pages_outside,
        "subtrees": _subtrees(inc, decoded, full),
        "malformed_subtrees": inc.malformed_subtrees,
    }
    if facts := dump_facts(inc):
        report["dump"] = facts
    if gone := absence(inc):
        report["absent"] = gone.as_dict()
    if inc.map_lost is not None:
        phys, reason = inc.map_lost
        report |= {"map_lost": {"phys": phys, "why": reason}} | dict.fromkeys(OF_MAP)
    if inc.placement is not None:
        report["placement"] = inc.placement._asdict()
    if inc.bitmap_bytes is not None:
        report["bitmap_bytes"] = inc.bitmap_bytes
        report["bitmap_bytes_why"] = inc.bitmap_bytes_why
        if luo is not None and wrote and inc.certainty != "certain":
            report["certainty"] = "certain"
            report["bitmap_bytes_why"] = (
                f"only {report['kernels']} writes LUO's subtree in this form: {wrote[0].bitmap}"
            )
    if inc.scratch is not None:
        report["scratch"] = [list(area) for area in inc.scratch]
        report["scratch_phys"] = inc.scratch_phys
        report["scratch_how"] = inc.scratch_how
    if inc.map_lost is not None:
        pass
    elif lists_folios(inc, full=full):
        folios = inc.folios
        report["folios"] = [list(folio) for folio in folios]
        report["folios_sha256"] = _folios_digest(memoryview(folios).cast("B"))
    elif full:
        report["folio_runs"] = folio_runs(inc)
    for name, payload in decoded.items():
        match payload:
            case KhoTest():
                report["kho_test"] = payload.describe()
            case ReserveMem():
                report |= payload.describe()
            case Metadata():
                report["kexec_metadata"] = payload.describe()
            case Live():
                report["live"] = payload.describe()
            case Declared():
                report.setdefault("payloads", {})[name] = payload.describe()
            case Luo():
                report["luo"] = payload.describe()
                _add_digests(payload, report["luo"], full)
                if payload.fd_store is not None:
                    report["systemd"] = payload.fd_store.describe()
                elif payload.fd_store_error is not None:
                    report["systemd"] = {"error": payload.fd_store_error}
    kernel, why = find_kernel(inc)
    if kernel is not None:
        report["kernel"] = kernel.describe()
    elif why:
        report["kernel"] = {"source": SOURCE, "error": why[0]}
    refused: list[tuple[int, str]] = []
    files = unlisted(inc, decoded, refused=refused)
    if files:
        report["unlisted_memfds"] = rows = [
            {"phys": f.blob.phys, "compatible": f.compatible, "in_map": f.in_map, **f.describe()} for f in files
        ]
        _add_digests_of(inc, zip(files, rows, strict=True), full)
    if refused:
        report["refused_memfds"] = [{"phys": phys, "error": error} for phys, error in refused]
    return report


def folio_runs(inc: Incoming) -> list[list[int]]:
    """Return runs of folios as `[phys, order, number of folios]`, at most as many as the image can plausibly hold."""
    tracker, page = inc.tracker(), inc.page_size
    runs = ([pfn * page, order, n] for order in inc.folios_by_order for pfn, n in tracker.runs(order))
    return list(islice(runs, inc.room("items")))


def _subtrees(inc: Incoming, decoded: Mapping[str, Payload], full: bool) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    allowance = Allowance(inc)
    for name, subtree in inc.subtrees.items():
        row: dict[str, Any] = {"phys": subtree.phys, "size": subtree.size}
        if subtree.size is not None and (full or subtree.size <= MOST_BYTES):
            try:
                row["sha256"] = sha256_of(memory_content(inc, name, subtree.phys, subtree.size), allowance=allowance)
            except errors.MissingMemoryError as error:
                row |= {"absent": NOT_IN_DUMP, "error": str(error)}
            except errors.KhoError as error:
                row["error"] = str(error)
        payload = decoded[name]
        if isinstance(payload, Raw | Broken):
            row |= payload.describe()
        if payload.unverified:
            row["unverified"] = list(payload.unverified)
        rows[name] = row
    return rows


def _add_digests(luo: Luo, described: dict[str, Any], full: bool) -> None:
    """Add the SHA-256 of every file's contents to its row."""
    entries = (
        (session.files.decode(entry), row)
        for session, rows in zip(luo.all_sessions, described["sessions"], strict=True)
        for entry, row in zip(session.entries, rows["files"], strict=True)
    )
    _add_digests_of(luo.blob.inc, entries, full)


def _add_digests_of(inc: Incoming, entries: Iterable[tuple[Payload, dict[str, Any]]], full: bool) -> None:
    """Add the SHA-256 of the contents of memfds to their rows, of at most `MOST_BYTES` in all unless `full`."""
    left = MOST_BYTES
    allowance = Allowance(inc)
    for file, row in entries:
        if isinstance(file, MemfdFile):
            data = file.memfd.data_bytes
        elif isinstance(file, FolioFile):
            data = sum(nbytes for _, nbytes in file.parts)
        else:
            continue
        if full or data <= left:
            left -= data
            try:
                row["sha256"] = sha256_of(file, allowance=allowance)
            except errors.MissingMemoryError as error:
                row |= {"absent": NOT_IN_DUMP, "error": str(error)}
            except errors.KhoError as error:
                row["error"] = str(error)


def _folios_digest(records: memoryview) -> str:
    """Hash folios as `<QI` (phys, order): the first 12 bytes of each 16-byte record."""
    digest = hashlib.sha256()
    for at in range(0, len(records), 16):
        digest.update(records[at : at + 12])
    return digest.hexdigest()
