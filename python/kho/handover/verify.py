"""Checks a handover and returns what is wrong with it as findings (`kho.handover.rules`).

>>> [str(f.id) for f in verify("handover.elf") if f.severity == "error"]
[]

As long as a root FDT is found, unreadable parts are reported as findings, not raised as exceptions.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .. import errors
from .._kho import (
    Abi,
    Arena,
    Fdt,
    FdtNode,
    Incoming,
    Memfd,
    Memory,
    Snapshot,
    Vmalloc,
    check_map,
    check_memfd_folios,
    find_memory,
    open_memory,
    versions_of,
)
from ..formats import Broken, Declared, KhoTest, Luo, MemfdFile, Payload, Raw, Session
from ..sizes import PAGE_SIZES, PAGEBLOCK_ORDERS, SMALL_BITMAP
from ..sources import Source, bare_fdt, memory
from ..text import UNFINALIZED
from .absence import LEFT_OUT, absence, why_absent
from .addresses import checked
from .compat import Offer, Target
from .depth import MOST_LEVELS, Read, in_tree
from .owners import HANDLE, owners, why_outside
from .rules import SEVERITIES, Finding, note_omitted
from .symbols import know_scratch
from .verify_kernel import (
    luo_findings,
    partial_findings,
    release_findings,
    target_findings,
    target_named,
    unsettled_findings,
)

__all__ = ["Findings", "verify", "verify_fdt"]

PAGEBLOCK = {page: page << order for page, order in PAGEBLOCK_ORDERS.items()}
"""Page size -> alignment of scratch areas in bytes (CMA_MIN_ALIGNMENT_BYTES of a default kernel)."""
BY_KIND = {
    "cycle": "KHO005",
    "shared": "KHO005",
    "start": "KHO013",
    "block": "KHO013",
    "unaligned": "KHO007",
}
"""`FormatError.kind` of a map error -> rule id; KHO004 for any other kind."""
LATE = ("cycle", "shared", "start", "entry", "count", "order", "length", "outside", "unaligned", None)
"""`FormatError.kind`, the most informative first: the error of the reading that got furthest is reported."""
MAP_MESSAGES = (
    (
        "KHO012",
        "overlapping",
        "page at {phys:#x}",
        "{pages} pages from there are in a folio of order {order} and in a folio of order {other}",
    ),
    (
        "KHO015",
        "in_scratch",
        "folio of order {order} at {phys:#x}",
        "{pages} pages from there are in the scratch area at {other:#x}",
    ),
    ("KHO014", "outside", "folio of order {order} around {phys:#x}", "{pages} pages are not in this memory"),
    ("KHO010", "nodes_in_scratch", "map node at {phys:#x}", "in the scratch area at {other:#x}"),
    ("KHO011", "nodes_preserved", "map node at {phys:#x}", "in the preserved folio of order {order} at {other:#x}"),
    (
        "KHO016",
        "spanning",
        "folio of order {order} at {phys:#x}",
        "memory of another NUMA node begins inside it, at {other:#x}",
    ),
)
"""Checks of the map that Rust returns: rule id, name of the check, format of the place, format of the value."""
OF_PRESERVED = ("KHO021", "KHO022")
"""Rules that compare with what is preserved: nothing is that is known, without a map."""
DATA = {"data", "folio", "region", HANDLE}
"""Parts of a payload that are content; the other parts are metadata that leads to it."""
MEMFD_FOLIO = 16
"""Bytes of one record of a memfd's folio list (`struct memfd_luo_folio_ser`)."""
FDT_MAGIC = b"\xd0\x0d\xfe\xed"


class Findings(list[Finding]):
    """A list of findings that notebooks show as a table."""

    def _repr_html_(self) -> str:
        from .html import findings

        return findings(self)


def verify(
    source: Incoming | Snapshot | Source | Iterable[str | os.PathLike[str]],
    *,
    nodes: Sequence[tuple[int, int, int]] = (),
    fdt_phys: int | None = None,
    page_size: int | None = None,
    bitmap_bytes: int | None = None,
    scratch: Sequence[tuple[int, int]] | None = None,
    kernel: str | None = None,
    most: int = 16,
    progress: Callable[[int], object] | None = None,
    opened: Callable[[Incoming], object] | None = None,
) -> list[Finding]:
    """Check a handover and return its findings, sorted by severity.

    Args:
        source: anything `kho.open` takes, an `Incoming`, a `Snapshot`, the file of a bare root FDT, or a debugfs
            directory. For the last three only the root FDTs are checked.
        nodes: `(start, size, node)` in bytes for each range of NUMA memory, to find folios that span two nodes;
            an arena supplies its own.
        fdt_phys, page_size, bitmap_bytes, scratch, progress: as in `kho.open`.
        kernel: the release that is to take it over ("7.0.3"): what it does not take is an error (KHO039). Without it,
            the LUO data is compared with all kernels that read the map.
        most: maximum number of findings per condition; the last of them states how many more there are.
        opened: called with the `Incoming` before it is checked; not called if the handover cannot be read.

    Raises:
        SourceError, NoHandoverError, ParameterError: there is nothing to check, or no such kernel is known. Defects of
            a handover are returned.

    """
    target = None if kernel is None else target_named(kernel)
    if isinstance(source, Incoming):
        return _sorted(_handover(source, nodes, target, most))
    if isinstance(source, Snapshot):
        return _sorted(_snapshot(source, target, most))
    if isinstance(source, str | os.PathLike) and (blob := _bare_fdt(source)) is not None:
        return verify_fdt(blob, place=os.fspath(source), kernel=kernel)
    if isinstance(source, str | os.PathLike) and Snapshot.recognizes(source):
        return _sorted(_snapshot(Snapshot.open(source), target, most))
    memory = _memory(source, progress)
    if isinstance(memory, Memory) and (blob := bare_fdt(memory)) is not None:  # read from a pipe, or decompressed
        return verify_fdt(blob, place=memory.sources[0], kernel=kernel)
    if isinstance(memory, Arena):
        nodes = nodes or memory.regions
        scratch = memory.scratch if scratch is None else scratch
        fdt_phys = memory.fdt_phys if fdt_phys is None else fdt_phys
    given = {"page_size": page_size, "bitmap_bytes": bitmap_bytes}
    try:
        inc = open_memory(memory, fdt_phys=fdt_phys, scratch=scratch, progress=progress, **given)
    except errors.MissingMemoryError as error:
        return _sorted(_incomplete(memory, error, fdt_phys))
    except (errors.FormatError, errors.OutsideMemoryError) as error:
        if isinstance(memory, Memory) and memory.truncated:
            return _sorted(_incomplete(memory, error, fdt_phys))
        return _sorted(_unreadable(memory, error, fdt_phys, scratch, given))
    know_scratch(inc)
    checked(inc)
    if opened is not None:
        opened(inc)
    return _sorted(_handover(inc, nodes, target, most))


def verify_fdt(blob: bytes, *, place: str = "FDT", kernel: str | None = None) -> list[Finding]:
    """Check a root FDT without its memory: structure, compatible, map pointer, subtree nodes.

    Args: kernel: the release that is to take it over, as in `verify`.
    Raises: ParameterError if no such kernel is known; NoHandoverError if the FDT is not the root of a handover.
    """
    try:
        fdt, why = Fdt.partial(blob)
    except errors.FdtError as error:
        return [Finding("KHO001", place, str(error))]
    found: list[Finding] = []
    try:
        values = [value for _, _, value in fdt.root.raw_properties]
    except errors.NotFoundError:
        values = []
    compatible = next((v.rstrip(b"\0").decode("latin-1") for v in values if v.startswith(b"kho-v")), None)
    pointer = next((int.from_bytes(v, "little") for v in values if len(v) == 8), None)
    if compatible is None and why is None:
        missing = errors.NoHandoverError(
            f"no handover: {place} is a devicetree without the compatible kho-v...; kho fdt prints it"
        )
        missing.kind = "devicetree"
        raise missing
    if kernel is not None and compatible is not None:
        found += target_findings(Offer(compatible, map=pointer), target_named(kernel), place)
    if why is not None:
        said = f"{why}; still readable: compatible {compatible}, map at {f'{pointer:#x}' if pointer else 'unknown'}"
        found.append(Finding("KHO003" if fdt.totalsize > len(blob) else "KHO001", place, said))
    else:
        found += _root(fdt, place, None)
    return _sorted(found)


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    """Remove duplicates and sort by severity, id and address."""
    rank = {severity: n for n, severity in enumerate(SEVERITIES)}
    order = sorted(dict.fromkeys(findings), key=lambda f: (rank[f.severity], f.id, f.phys or 0, f.place, f.value))
    return Findings(order)


def _memory(
    source: Source | Iterable[str | os.PathLike[str]], progress: Callable[[int], object] | None
) -> Memory | Arena:
    if isinstance(source, Memory | Arena):
        return source
    return memory(source, progress=progress)


def _snapshot(shown: Snapshot, target: Target | None, most: int) -> Iterator[Finding]:
    """Check the root FDTs in debugfs: `in/fdt` (from the previous kernel) and `out/fdt` (for the next one)."""
    for name, side in (("in/fdt", shown.incoming), ("out/fdt", shown.outgoing)):
        if side is not None and side.fdt is not None:
            yield from verify_fdt(side.fdt, place=f"{shown.path}: {name}")
    path = os.fspath(shown.path)
    if target is not None:
        yield from target_findings(Offer.of_snapshot(shown), target, path, most=most)
    if shown.outgoing is None or shown.outgoing.compatible is None:
        return
    offer = Offer.of_snapshot(shown)
    yield from release_findings(offer, f"{path}: LUO")
    if target is None:
        yield from luo_findings(offer, f"{path}: LUO", None, most)


def _bare_fdt(source: str | os.PathLike[str]) -> bytes | None:
    """Read a file if it begins with the FDT magic and has at most 64 KiB, the limit of a root FDT; else None."""
    path = Path(source)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        blob = file.read((64 << 10) + 1)
    return blob if blob.startswith(FDT_MAGIC) and len(blob) <= 64 << 10 else None


# Handovers that cannot be read


def _incomplete(memory: Memory | Arena, error: errors.KhoError, fdt_phys: int | None) -> Iterator[Finding]:
    """Report that the map is not in the dump, and check the root FDT, if it is."""
    rule = "KHO040" if why_absent(error) == LEFT_OUT else "KHO041"
    if fdt_phys is None:
        fdts = find_memory(memory)[0]
        fdt_phys = fdts[0] if len(fdts) == 1 else None
    if fdt_phys is not None:
        place = f"root FDT at {fdt_phys:#x}"
        fdt, broken = _read_fdt(memory.read, fdt_phys)
        if fdt is not None and not broken:
            yield from _root(fdt, place, memory.read, fdt_phys)
    told = str(error)
    for source in memory.sources if isinstance(memory, Memory) else ():
        told = told.removeprefix(f"{source}: ")
    yield Finding(rule, "preserved-memory map", f"{told}; the map and what it leads to were not checked", error.phys)


def _unreadable(
    memory: Memory | Arena,
    error: errors.KhoError,
    fdt_phys: int | None,
    scratch: Sequence[tuple[int, int]] | None,
    given: Mapping[str, int | None],
) -> Iterator[Finding]:
    """Report why `kho.open` refused a memory, and check its root FDT and scratch areas separately."""
    fdts, pointers, arrays = find_memory(memory)
    if fdt_phys is None:
        if not fdts:
            raise error
        fdt_phys = fdts[0]
    place = f"root FDT at {fdt_phys:#x}"
    fdt, broken = _read_fdt(memory.read, fdt_phys)
    if fdt is None or broken:
        yield Finding("KHO001", place, str(broken or error), fdt_phys)
        if fdt is None:
            return
    found = [] if broken else list(_root(fdt, place, memory.read, fdt_phys))
    yield from found
    if not broken and not any(f.id in ("KHO001", "KHO002") for f in found):
        yield from _map_error(memory, error, fdt, fdt_phys, given)
    areas: Sequence[tuple[int, int]] | None = scratch
    told = next(((phys, size) for fdt, phys, size in pointers if fdt == fdt_phys), None)
    if areas is None and told:
        try:
            areas = list(struct.iter_unpack("<QQ", memory.read(told[0], min(told[1], 1 << 16) // 16 * 16)))
        except errors.KhoError:
            areas = None
    if areas is None and len({tuple(areas) for _, areas in arrays}) == 1:
        areas = arrays[0][1]
    yield from _scratch(areas, given["page_size"] or 4096)


def _read_fdt(read: Read, phys: int) -> tuple[Fdt | None, str | None]:
    """Read the FDT at `phys`: the readable part (None if there is none) and the error (None if complete)."""
    try:
        header = read(phys, 40)
        total = int.from_bytes(header[4:8], "big")
        blob = read(phys, min(max(total, 40), 64 << 10))
        fdt, why = Fdt.partial(blob)
    except errors.KhoError as error:
        return None, str(error)
    return fdt, None if why is None else str(why)


def _map_error(
    memory: Memory | Arena, error: errors.KhoError, fdt: Fdt, fdt_phys: int, given: Mapping[str, int | None]
) -> Iterator[Finding]:
    """Report a map that is invalid under every page and bitmap size: the error of the reading that got furthest."""
    best, page_size = error, given["page_size"]
    if error.kind is None:
        tried = []
        for page in PAGE_SIZES if page_size is None else (page_size,):
            for bitmap in (None, SMALL_BITMAP, page):
                try:
                    open_memory(memory, fdt_phys=fdt_phys, scratch=[], page_size=page, bitmap_bytes=bitmap)
                except errors.KhoError as other:
                    if isinstance(other, errors.FormatError) and other.kind:
                        tried.append((LATE.index(other.kind) if other.kind in LATE else len(LATE), page, other))
        if tried:
            _, page_size, best = min(tried, key=lambda t: t[:2])
    abi = versions_of(fdt)[0][0]
    pointer = fdt.root.u64(abi.map_property)
    sizes = PAGE_SIZES if page_size is None or best.kind is None else (page_size,)
    for page in sizes:
        other_depth = _wrong_depth(memory.read, abi, page, pointer, fdt_phys)
        if other_depth is not None:
            yield Finding("KHO006", f"map at {pointer:#x}", other_depth, pointer)
            return
    where = best.phys if best.phys is not None else pointer
    yield Finding(BY_KIND.get(best.kind or "", "KHO004"), f"map at {pointer:#x}", str(best), where)


def _wrong_depth(read: Read, abi: Abi, page: int, root: int, fdt_phys: int) -> str | None:
    """Describe a wrong tree depth, or None: the FDT's page is in the tree only under another number of levels."""
    shift = page.bit_length() - 1
    key = 1 << (64 - shift) | fdt_phys >> shift
    expected = abi.levels.get(page)
    if expected is None or in_tree(read, page, root, key, expected):
        return None
    for levels in sorted(range(2, MOST_LEVELS + 1), key=lambda n: abs(n - expected)):
        if levels != expected and in_tree(read, page, root, key, levels):
            return (
                f"with {expected} levels, as {abi.compatible} has, it does not preserve the FDT; with {levels} it does"
            )
    return None


# Root FDT


def _root(
    fdt: Fdt,
    place: str,
    read: Read | None,
    fdt_phys: int | None = None,
    read_as: tuple[Abi, Sequence[str]] | None = None,
) -> Iterator[Finding]:
    """Check a root FDT: compatible, map pointer, subtree nodes and, with `read`, the blobs they point to.

    Args: read_as: the version that the handover was read as, and why it may be another.
    """
    root = fdt.root
    try:
        compatible = root.str("compatible")
    except errors.KhoError as error:
        yield Finding("KHO001", place, str(error), fdt_phys)
        return
    try:
        abi, doubts = read_as or versions_of(fdt)[0]
    except errors.KhoError:
        yield Finding("KHO002", place, f"compatible {compatible!r}", fdt_phys)
        return
    for doubt in doubts:
        yield Finding("KHO046", place, f"compatible {compatible!r}: {doubt}", fdt_phys)
    if abi.draft:
        yield Finding("KHO044", place, f"compatible {compatible!r}", fdt_phys)
    try:
        if root.u64(abi.map_property) == 0 and abi.live:
            yield Finding("KHO001", place, f"{abi.map_property} is 0: nothing was serialized", fdt_phys)
        elif root.u64(abi.map_property) == 0:
            yield Finding("KHO047", place, f"{abi.map_property} is 0: {UNFINALIZED}", fdt_phys)
    except errors.KhoError as error:
        yield Finding("KHO001", place, str(error), fdt_phys)
    names = Counter(node.name for node in root.children)
    for node in root.children:
        if names[node.name] > 1:
            yield Finding(
                "KHO019", f"subtree {node.name}", f"the root has {names[node.name]} nodes of this name", fdt_phys
            )
        yield from _subtree(node, abi, read, fdt_phys)


def _subtree(node: FdtNode, abi: Abi, read: Read | None, fdt_phys: int | None) -> Iterator[Finding]:
    """Check a subtree node: its address, its size, and whether an FDT at that address fits into the size."""
    place = f"subtree {node.name}"
    if not abi.live and not any(node.raw_properties):
        yield Finding("KHO048", place, f"its node has no {abi.subtree_property}, and no other property", fdt_phys)
        return
    try:
        phys = node.u64(abi.subtree_property)
    except errors.KhoError as error:
        yield Finding("KHO019", place, str(error), fdt_phys)
        return
    if abi.size_property is None:
        return
    place = f"{place} at {phys:#x}"
    try:
        size = node.u64(abi.size_property)
    except errors.KhoError as error:
        yield Finding("KHO020", place, str(error), phys)
        return
    try:
        head = read(phys, 8) if read else b""
    except errors.KhoError:
        return
    if head.startswith(FDT_MAGIC) and int.from_bytes(head[4:8], "big") > size:
        yield Finding(
            "KHO020", place, f"{abi.size_property} {size}, the FDT has {int.from_bytes(head[4:8], 'big')} bytes", phys
        )
    elif size == 0:
        yield Finding("KHO020", place, f"{abi.size_property} 0", phys)


# Handovers that were read


def _handover(
    inc: Incoming, nodes: Sequence[tuple[int, int, int]], target: Target | None, most: int
) -> Iterator[Finding]:
    """Check a handover that was read: root FDT, scratch, map, payloads, owners."""
    yield from _root(inc.fdt, f"root FDT at {inc.fdt_phys:#x}", inc.read, inc.fdt_phys, (inc.abi, inc.unverified))
    if inc.scratch is not None or not (any(inc.absent_bytes()) or inc.cut_files):
        yield from _scratch(inc.scratch, inc.page_size)
    if inc.certainty == "not read" and inc.map_lost is None:
        value = f"not that of a version known to kho; {len(inc.subtrees)} subtrees are read without it"
        yield Finding("KHO004", f"map at {inc.preserved_memory_map:#x}", value, inc.preserved_memory_map)
    elif inc.finalized and inc.map_lost is None:
        yield from _map(inc, nodes, most)
    payloads = inc.payloads
    yield from _absence(inc, payloads)
    for name, payload in payloads.items():
        of_payload = _payload(payload, f"subtree {name} at {payload.blob.phys:#x}", most)
        mapped = inc.finalized and inc.map_lost is None
        yield from (found for found in of_payload if mapped or found.id not in OF_PRESERVED)
    if inc.certainty != "not read" or inc.map_lost is not None:
        yield from _owners(inc, payloads, target, most)
    luo = payloads.get("LUO")
    if isinstance(luo, Luo):
        yield from unsettled_findings(luo, most)
    if next(_undecoded(payloads), None) is not None:
        return  # what the next kernel does with them is not known
    offer = Offer.of(inc, payloads)
    yield from release_findings(offer, "LUO")
    if target is not None:
        yield from target_findings(offer, target, f"root FDT at {inc.fdt_phys:#x}", inc.fdt_phys, most=most)
    elif luo is not None:
        yield from luo_findings(offer, f"LUO at {luo.blob.phys:#x}", luo.blob.phys, most)


def _absence(inc: Incoming, payloads: Mapping[str, Payload]) -> Iterator[Finding]:
    """Report what of the memory is not in the dump, and which payloads could not be decoded for that."""
    found = absence(inc)
    lost = dict(_undecoded(payloads))
    for rule, there, text in (
        ("KHO040", found.left_out, found.left_out_line),
        ("KHO041", found.cut_files, found.cut_line),
    ):
        if there:
            mine = [owner for owner, why in lost.items() if (why == LEFT_OUT) == (rule == "KHO040")]
            unread = f"; not decoded for that: {', '.join(mine)}" if mine else ""
            yield Finding(rule, ", ".join(found.cut_files) if rule == "KHO041" else "this dump", text() + unread)
    if found.map_page is not None:
        pointer = inc.preserved_memory_map
        yield Finding("KHO058", f"map at {pointer:#x}", found.map_line(), found.map_page[0])
    if found.compound_fault:
        yield Finding("KHO042", "this dump", found.compound_line())


def _undecoded(payloads: Mapping[str, Payload]) -> Iterator[tuple[str, str]]:
    """Yield the owner of each payload that is not in the dump, and why."""
    for payload in payloads.values():
        if isinstance(payload, Broken) and (why := why_absent(payload.error)):
            yield payload.blob.owner, why
        if isinstance(payload, Luo):
            for session in payload.all_sessions:
                for entry in session.entries:
                    file = session.files.decode(entry)
                    if isinstance(file, Broken) and (why := why_absent(file.error)):
                        yield file.blob.owner, why


def _scratch(areas: Sequence[tuple[int, int]] | None, page_size: int) -> Iterator[Finding]:
    if areas is None:
        yield Finding("KHO018", "scratch", "no scratch array was found in this memory")
        return
    block = PAGEBLOCK.get(page_size, PAGEBLOCK[4096])
    for n, (addr, size) in enumerate(areas):
        if addr % block or size % block:
            name = ("low memory", "global")[n] if n < 2 else f"node {n - 2}"
            what = f"{size:#x} bytes; address and size must be multiples of the pageblock size {block:#x}"
            yield Finding("KHO017", f"scratch area for {name} at {addr:#x}", what, addr)


def _map(inc: Incoming, nodes: Sequence[tuple[int, int, int]], most: int) -> Iterator[Finding]:
    """Check the map by runs (in Rust): time is proportional to its bitmaps, not to its folios."""
    checks = check_map(inc, nodes, most)
    for rule, name, place, value in MAP_MESSAGES:
        count, spots = checks[name]
        found = []
        for phys, pages, order, other in spots:
            values = {"phys": phys, "pages": pages, "order": order, "other": other}
            found.append(Finding(rule, place.format(**values), value.format(**values), phys))
        yield from note_omitted(found, count)
    pointer = inc.preserved_memory_map
    for order, empty, blocks in checks["empty"]:
        value = f"{empty} of {blocks} bitmaps are empty"
        yield Finding("KHO009", f"map at {pointer:#x}, order {order}", value, pointer)
    if inc.certainty == "guess":
        value = f"read with pages of {inc.page_size} bytes: {inc.page_size_why}"
        if inc.bitmap_bytes is not None:
            value += f"; with bitmaps of {inc.bitmap_bytes} bytes: {inc.bitmap_bytes_why}"
        yield Finding("KHO008", f"map at {pointer:#x}", value, pointer)
    depth = _wrong_depth(inc.read, inc.abi, inc.page_size, pointer, inc.fdt_phys)
    if depth is not None:
        yield Finding("KHO006", f"map at {pointer:#x}", depth, pointer)


# Payloads


def _payload(payload: Payload, place: str, most: int) -> Iterator[Finding]:
    """Check one payload, including the files of its sessions."""
    blob, name = payload.blob, payload.compatible
    phys = blob.phys
    layout = getattr(type(payload), "LAYOUT", None)
    if blob.size is not None and isinstance(layout, struct.Struct) and blob.size < layout.size:
        yield Finding(
            "KHO020",
            place,
            f"{blob.inc.abi.size_property or 'size'} {blob.size}, but a {name} has {layout.size} bytes",
            phys,
        )
    for doubt in payload.unverified:
        yield Finding("KHO046", place, f"compatible {name!r}: {doubt}", phys)
    if isinstance(payload, Luo | MemfdFile) and payload.draft and not payload.unverified:
        yield Finding("KHO044", place, f"compatible {name!r}", phys)
    if isinstance(payload, Broken):
        if why_absent(payload.error):
            return
        yield from _broken(payload, place)
    elif isinstance(payload, Raw):
        yield Finding("KHO025", place, f"compatible {name!r}", phys)
    elif isinstance(payload, Luo):
        yield from _luo(payload, most)
    elif isinstance(payload, MemfdFile):
        try:
            yield from _memfd(payload, place, most)
        except errors.MissingMemoryError:
            return
    elif isinstance(payload, KhoTest):
        yield from _kho_test(payload)
    yield from payload.findings()
    for what, area in _areas(payload):
        if area.total_pages != area.nr_pages:
            value = f"total_pages {area.total_pages}, the list names {area.nr_pages}"
            yield Finding("KHO026", f"{place}, {what}", value, area.first or phys)


def _areas(payload: Payload) -> Iterator[tuple[str, Vmalloc]]:
    """Yield the vmalloc areas of a payload, each with its purpose."""
    if isinstance(payload, Declared):
        yield from payload.areas()
    area = payload.list if isinstance(payload, MemfdFile | KhoTest) else None
    if area is not None:
        yield "folio list", area


def _broken(payload: Broken, place: str) -> Iterator[Finding]:
    error = payload.error
    rule = "KHO013" if error.kind == "block" else "KHO023"
    yield Finding(rule, place, str(error), payload.blob.phys)


def _kho_test(payload: KhoTest) -> Iterator[Finding]:
    """Check that each folio of kho_test is aligned to its size and preserved with its order."""
    inc = payload.blob.inc
    for phys, order in payload.folios:
        place = f"kho_test folio of order {order} at {phys:#x}"
        if phys % (inc.page_size << min(order, 64)):
            yield Finding("KHO013", place, f"not a multiple of {inc.page_size << min(order, 64):#x}", phys)
        elif not inc.preserves(phys, order):
            yield Finding("KHO022", place, "not preserved as a folio of this order", phys)


def _luo(luo: Luo, most: int) -> Iterator[Finding]:
    """Check session names, tokens, counts and every file."""
    place = f"LUO at {luo.blob.phys:#x}"
    names = Counter(session.name for session in luo.all_sessions)
    for name, count in names.items():
        if count > 1:
            yield Finding("KHO030", place, f"{count} sessions are named {name!r}", luo.blob.phys)
    for session in luo.all_sessions:
        yield from _session(session, most)
    yield from _store(luo)
    for flb, payload in luo.flb_payloads():
        yield from _payload(payload, f"FLB {flb.name} at {flb.data:#x}", most)


def _store(luo: Luo) -> Iterator[Finding]:
    """Check the map of systemd's descriptor store."""
    place = "session systemd, file 0x0"
    if luo.fd_store is not None:
        for problem in luo.fd_store.problems:
            yield Finding("KHO045", place, problem)
    elif luo.fd_store_error is not None:
        yield Finding("KHO045", place, luo.fd_store_error)


def _session(session: Session, most: int) -> Iterator[Finding]:
    phys = session.blocks[0][0] if session.blocks else None
    place = session.title + (f" at {phys:#x}" if phys is not None else "")
    if session.count != len(session.entries):
        yield Finding("KHO032", place, f"count {session.count}, its list has {len(session.entries)}", phys)
    for token, count in Counter(entry.token for entry in session.entries).items():
        if count > 1:
            yield Finding("KHO031", place, f"{count} files have the token {token:#x}", phys)
    for entry in session.entries:
        payload = session.files.decode(entry)
        yield from _payload(payload, f"{session.title}, file {entry.token:#x} at {entry.data:#x}", most)


def _memfd(file: MemfdFile, place: str, most: int) -> Iterator[Finding]:
    """Check the folio list of a memfd (in Rust)."""
    memfd, inc = file.memfd, file.blob.inc
    phys, pages = file.blob.phys, -(-memfd.size // inc.page_size)
    checks = check_memfd_folios(inc, memfd, most)
    messages = (
        ("KHO027", "duplicated", "another folio has the same index"),
        ("KHO028", "beyond", f"the file has {memfd.size} bytes, {pages} pages"),
        ("KHO022", "interior", "inside a preserved folio; only the head page of a folio can be restored"),
        ("KHO022", "nowhere", "beyond the address space"),
    )
    for rule, name, what in messages:
        count, spots = checks[name]
        found = [Finding(rule, f"{place}, index {index}", f"folio at {at:#x}: {what}", at) for index, at in spots]
        yield from note_omitted(found, count)
    listed = checks["listed"][0]
    if listed < memfd.nr_folios:
        yield Finding("KHO029", place, f"nr_folios {memfd.nr_folios}, the list has {listed}", phys)
    elif _has_more_records(memfd):
        yield Finding("KHO029", place, f"nr_folios {memfd.nr_folios}, the list has more", phys)


def _has_more_records(memfd: Memfd) -> bool:
    """Whether a record follows the `nr_folios` counted ones, that is the count is too small."""
    end = memfd.nr_folios * MEMFD_FOLIO
    try:
        return end + MEMFD_FOLIO <= memfd.list.nbytes and any(memfd.list.read(MEMFD_FOLIO, end))
    except errors.KhoError:
        return False


# Owners


def _owners(inc: Incoming, payloads: Mapping[str, Payload], target: Target | None, most: int) -> Iterator[Finding]:
    try:
        found = owners(inc, payloads)
    except errors.MissingMemoryError:
        return
    if target is not None:
        yield from partial_findings(found.unpreserved, target, most)
    lost: dict[str, list[Finding]] = {"KHO021": [], "KHO022": []}
    counts = Counter({"KHO022": found.more_unpreserved})
    for row in found.unpreserved:
        rule = "KHO022" if row.what in DATA else "KHO021"
        counts[rule] += 1
        if len(lost[rule]) == most:
            continue
        offset = "" if row.offset is None else f", offset {row.offset:#x}"
        place = f"{row.owner}, {row.what} at {row.phys:#x}{offset}"
        lost[rule].append(Finding(rule, place, f"{row.nbytes:#x} bytes are not preserved", row.phys))
    for rule, listed in lost.items():
        yield from note_omitted(listed, counts[rule])
    shared = [
        Finding("KHO033", f"{s.nbytes:#x} bytes at {s.phys:#x}", f"{', '.join(s.first)}; {', '.join(s.second)}", s.phys)
        for s in found.shared[:most]
    ]
    yield from note_omitted(shared, len(found.shared) + found.more_shared)
    if found.unowned and next(_undecoded(payloads), None) is None:
        rows = found.unowned
        size = f"{found.totals['unknown']:#x} bytes in {len(rows)} range{'s' * (len(rows) != 1)}"
        # Before the jump no list has what sessions preserved, so that nothing tells a leak from it.
        rule = "KHO056" if found.before_jump else "KHO034"
        yield Finding(rule, f"pages from {rows[0].phys:#x}", f"{size}: {found.why_unowned}", rows[0].phys)
    files = [
        Finding(
            "KHO043",
            f.blob.owner,
            f"{f.size} bytes, {f.memfd.nr_listed} folios"
            + ("" if f.in_map else f"; {why_outside(finalized=inc.finalized, lost=inc.map_lost is not None)}"),
            f.blob.phys,
        )
        for f in found.unlisted[:most]
    ]
    refused = [Finding("KHO057", f"memfd at {phys:#x}", error, phys) for phys, error in found.refused[:most]]
    yield from note_omitted(refused, len(found.refused))
    # Lists that cannot be read may have it.
    if not any(isinstance(payload, Broken) for payload in payloads.values()):
        yield from note_omitted(files, len(found.unlisted))
