"""Can that kernel take over what this one hands over? Each object of a handover is judged, with reason and source.

A kernel accepts what it would write itself, so the rows of `kho.kernels` decide; what a kernel does with the rest was
read in its sources, and part of it was run (docs/compat.md).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .._kho import Fdt, Incoming, Snapshot, kho_is_enabled
from ..crashline import crash_kernel_bytes
from ..errors import FdtError, KhoError, ParameterError
from ..formats import KhoTest, Luo, Metadata, Payload, ReserveMem, payloads
from ..formats.features import HEADER, LUO_BITS, MEMFD_BITS, Features, is_header
from ..formats.luo import FEATURES, LuoV1
from ..kernelimage import KernelImage
from ..kernels import FIXES, KERNELS, LUO_SINCE, Kernel, Release, kernel_of, kernels_that_write
from ..sizes import MAX_PAGE_ORDERS, PAGEBLOCK_ORDERS, SMALL_BITMAP, format_size, parse_size
from .depth import levels_written

__all__ = ["Judged", "Offer", "Target", "judge", "worst"]

Verdict = Literal["taken", "unknown", "lost", "refused", "panics"]
VERDICTS: tuple[Verdict, ...] = ("taken", "unknown", "lost", "refused", "panics")
"""From the best to the worst. *lost*: the kernel boots with the rest, and says nothing or a line in its log.
*refused*: it boots cold, without anything of the handover. *panics*: it does not boot."""

CORE = "kernel/liveupdate/kexec_handover.c"
LUO = "kernel/liveupdate/luo_core.c"
SETUP = "arch/x86/kernel/setup.c"
FEATURED_MEMFD = "memfd"
"""What stands in place of a version where a memfd has a feature header."""
TEST_FLB = "liveupdate-test-flb-v"
"""FLBs of the kernel's own test (lib/tests/liveupdate.c)."""
ORDER_CHECKED = "kho_restore_page, " + CORE


class Judged(NamedTuple):
    """What becomes of one object."""

    object: str
    verdict: Verdict
    why: str
    source: str
    """The function and file of the kernel that decides."""


@dataclass
class Offer:
    """What is handed over, as far as it is known."""

    abi: str
    release: Release | None = None
    """The kernel that hands it over, if it is known."""
    page_size: int | None = None
    bitmap_bytes: int | None = None
    map: int | None = None
    """Address of the map; 0 if nothing was finalized."""
    levels: int | None = None
    """Levels of the tree."""
    orders: dict[int, int] | None = field(default_factory=dict)
    """Folios by order; None if the map is not in the dump."""
    scratch: list[tuple[int, int]] | None = None
    ram: int = 0
    """Bytes of memory that are known to be there; the machine may have more."""
    cmdline: str | None = None
    """Command line of the kernel that hands over."""
    luo: str | None = None
    flb_node: bool = False
    flbs: list[str] = field(default_factory=list)
    sessions: dict[str, list[tuple[int, str]]] | None = field(default_factory=dict)
    """Token and compatible of each file, by session; None if they are not seen."""
    features: dict[str, Features] = field(default_factory=dict)
    """Feature headers in place of versions (a draft), by what has them: `luo`, `session vm-1, file 0x10`."""
    reserve_mem: dict[str, int | None] = field(default_factory=dict)
    """Size of each region by name; None if it is not seen."""
    kho_test: str | None = None
    """array or vmalloc."""
    metadata: bool = False
    others: list[str] = field(default_factory=list)
    """Subtrees that no released kernel reads."""

    @classmethod
    def of(cls, inc: Incoming, found: Mapping[str, Payload] | None = None) -> Offer:
        """Take it from a memory image; `found`: its payloads, if they were decoded already."""
        offer = cls(inc.compatible, page_size=inc.page_size, bitmap_bytes=inc.bitmap_bytes)
        offer.map, offer.scratch = inc.preserved_memory_map, inc.scratch
        offer.orders = None if inc.map_lost else dict(inc.folios_by_order)
        offer.ram, offer.levels = sum(nbytes for _, nbytes in inc.ranges), levels_written(inc)
        node: bool | None = None
        for name, payload in (payloads(inc) if found is None else found).items():
            if isinstance(payload, Luo):
                offer.luo = payload.compatible
                node = payload.has_flb_node if isinstance(payload, LuoV1) else None
                offer.flb_node = node is not False
                offer.flbs = [flb.name for flb in payload.flbs]
                sessions: dict[str, list[tuple[int, str]]] = {}
                for session in payload.all_sessions:
                    files = sessions.setdefault(session.name, [])
                    files += [(entry.token, entry.compatible) for entry in session.entries]
                offer.sessions = sessions
                offer.features = _features_of(payload)
            elif isinstance(payload, ReserveMem):
                offer.reserve_mem = {name: region.size for name, region in payload.regions.items()}
            elif isinstance(payload, Metadata):
                offer.metadata = True
                with contextlib.suppress(ParameterError):  # of a release that no kernel has
                    offer.release = Release.parse(payload.previous_release)
            elif isinstance(payload, KhoTest):
                offer.kho_test = "array" if payload.list is None else "vmalloc"
            elif name == "LUO" and (header := _header(inc, payload.blob.phys, LUO_BITS)) is not None:
                # kho refuses bits that it does not know; the target may support them.
                offer.luo, offer.flb_node, offer.sessions, offer.features = FEATURES, True, None, {"luo": header}
            else:
                offer.others.append(name)
        if offer.release is None:
            writers = kernels_that_write(offer.abi, offer.bitmap_bytes, offer.luo, flb_node=node)
            offer.release = Release.parse(writers[0].name) if len(writers) == 1 else None
            dumped = _dumped_release(inc)
            # The kernel that was dumped may have been handed it by another one.
            if dumped is not None and dumped.name in [kernel.name for kernel in writers]:
                offer.release = dumped
        return offer

    def unwritten(self, shown: Snapshot) -> Offer:
        """Give what a running kernel will hand over: its sessions are not written yet, whatever its memory holds.

        Args: shown: what debugfs shows of the same machine.
        """
        release = _release_of(shown)
        return replace(
            self,
            sessions=None if self.luo is not None else {},
            flbs=[],
            release=self.release if release is None else release,
            cmdline=shown.cmdline,
        )

    @classmethod
    def of_snapshot(cls, taken: Snapshot) -> Offer:
        """Take it from what debugfs shows of the outgoing side: FDTs alone, so that sessions are not seen.

        Raises: ParameterError if there is no outgoing side.
        """
        side = taken.outgoing
        if side is None or side.compatible is None:
            raise ParameterError(
                f"{taken.path}: no outgoing root FDT in debugfs: KHO is off, nothing was finalized yet (Linux 6.16 to "
                "6.18), or this kernel was itself booted by a handover, where Linux 6.19 and later do not show it"
            )
        offer = cls(side.compatible, map=side.preserved_memory_map, scratch=taken.scratch)
        offer.ram, offer.cmdline = sum(nbytes for _, nbytes in taken.ram or ()), taken.cmdline
        offer.release = _release_of(taken)
        for name, blob in side.sub_fdts.items():
            if name == "LUO":
                offer.sessions = None
                offer.luo, offer.flb_node = _luo_of(blob)
            elif name == "memblock":
                offer.reserve_mem = _names_of(blob)
            elif name == "kexec-metadata":
                offer.metadata = True
            elif name == "kho_test":
                offer.kho_test = _test_of(blob)
            else:
                offer.others.append(name)
        kernel = None if offer.release is None or offer.release.vendor else kernel_of(offer.release)
        if kernel is not None and kernel.abi == offer.abi:
            # FDTs do not tell it. A vendor's 6.17 may have bitmaps of a page.
            offer.bitmap_bytes = kernel.bitmap_bytes(4096)
        return offer

    @classmethod
    def typical(cls, kernel: Kernel) -> Offer:
        """Make up what a kernel writes that hands over a memfd in a session, reserve_mem, and its test folios."""
        offer = cls(kernel.abi, Release.parse(kernel.name), 4096, kernel.bitmap_bytes(4096), map=1)
        offer.reserve_mem, offer.scratch = {"trace0": 1 << 20}, [(64 << 20, 32 << 20)]
        offer.kho_test, offer.metadata = kernel.kho_test, kernel.kexec_metadata
        offer.luo, offer.flb_node = kernel.luo, kernel.flbs
        offer.sessions = {} if kernel.memfd is None else {"session": [(0, kernel.memfd)]}
        return offer


def _release_of(shown: Snapshot) -> Release | None:
    """Read /proc/version and /proc/version_signature; None without the first, or for a release that no kernel has."""
    if shown.version is not None and len(words := shown.version.split()) > 2:
        with contextlib.suppress(ParameterError):
            return Release.parse(words[2], _signature_of(shown) or shown.version)
    return None


def _signature_of(shown: Snapshot) -> str | None:
    """Read /proc/version_signature of the machine or of a directory; None if it is missing, or no regular file."""
    if shown.kind not in ("live", "root"):
        return None
    path = (Path("/") if shown.kind == "live" else Path(shown.path)) / "proc/version_signature"
    with contextlib.suppress(OSError):
        # A FIFO without a writer would block the open.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(256).decode("ascii", "replace")
    return None


def _dumped_release(inc: Incoming) -> Release | None:
    """Return the release of the kernel whose memory was dumped; None if VMCOREINFO does not have it."""
    text = inc.vmcoreinfo("OSRELEASE")
    with contextlib.suppress(ParameterError):
        return None if text is None else Release.parse(text)
    return None


def _features_of(luo: Luo) -> dict[str, Features]:
    """List the feature headers of LUO and of its memfds (a draft), also those that kho refuses."""
    inc, found = luo.blob.inc, {}
    header = _header(inc, luo.blob.phys, LUO_BITS) if luo.compatible == FEATURES else None
    if header is not None:
        found["luo"] = header
    for session in luo.all_sessions:
        for entry in session.entries:
            header = _header(inc, entry.data, MEMFD_BITS) if entry.compatible == FEATURED_MEMFD else None
            if header is not None:
                found[f"session {session.name}, file {entry.token:#x}"] = header
    return found


def _header(inc: Incoming, phys: int, names: tuple[str, ...]) -> Features | None:
    """Read a feature header as it is, whatever it requires; None if there is none."""
    with contextlib.suppress(KhoError):
        data = inc.read(phys, HEADER.size)
        if is_header(data):
            supp, req, active, reserved = HEADER.unpack(data)
            return Features(supp, req, active, names, reserved)
    return None


def _luo_of(blob: bytes) -> tuple[str | None, bool]:
    """Read the compatible of LUO's subtree, a string in a struct or an FDT's, and whether it has FLBs."""
    if blob.startswith(b"luo-"):
        return blob[:8].partition(b"\0")[0].decode("ascii", "replace"), True
    try:
        fdt = Fdt(blob)
        return fdt.root.str("compatible"), "/luo-flb" in fdt
    except (FdtError, KhoError):
        return None, False


def _names_of(blob: bytes) -> dict[str, int | None]:
    """List the nodes of memblock's FDT with their sizes."""
    try:
        nodes = Fdt(blob).root.children
        return {node.name: node.u64("size") if "size" in node else None for node in nodes}
    except (FdtError, KhoError):
        return {}


def _test_of(blob: bytes) -> str:
    """Say how kho_test lists its folios: the vmalloc area has 16 bytes, an inline array 8 a folio."""
    with contextlib.suppress(FdtError, KhoError):
        return "vmalloc" if len(Fdt(blob)["/data"]["folios_info"]) == 16 else "array"
    return "vmalloc"


@dataclass
class Target:
    """The kernel that is to take over."""

    release: Release
    image: KernelImage | None = None
    cmdline: str | None = None
    """The command line that it is to be booted with; None if that is not known."""

    @property
    def enabled(self) -> bool | None:
        """Whether KHO is on with its command line; None if that depends on what is not known."""
        if self.cmdline is None:
            return None
        default = False if self.release.series < LUO_SINCE else self.option("KEXEC_HANDOVER_ENABLE_DEFAULT")
        on, off = kho_is_enabled(self.cmdline, True), kho_is_enabled(self.cmdline, False)
        return on if on == off else default

    @property
    def listed(self) -> set[str]:
        """Compatibles and names that its file lists (`.liveupdate_versions`, `.liveupdate_features`, both drafts)."""
        image = self.image
        return set() if image is None else {*(image.versions or ()), *(image.features or ())}

    def lacks(self, what: str, header: Features) -> list[str] | None:
        """List the bits that a feature header requires and its file does not support for `what`, `luo` or `memfd`.

        None if the file lists no features of that name.
        """
        row = None if self.image is None else (self.image.features or {}).get(what)
        return None if row is None else header.listed(header.req & ~row.supported)

    @property
    def kernel(self) -> Kernel | None:
        """Its row; None if no such kernel is known."""
        return kernel_of(self.release)

    def option(self, name: str) -> bool | None:
        """Say whether a configuration option is set; None if the configuration is not known."""
        config = None if self.image is None else self.image.config
        return None if config is None else config.get(name, "n") in ("y", "m")


def worst(rows: list[Judged]) -> Verdict:
    """Give the worst verdict of all."""
    return max((row.verdict for row in rows), key=VERDICTS.index, default="taken")


def judge(offer: Offer, target: Target) -> list[Judged]:
    """Judge every object of a handover: the root first, as nothing is taken where that is refused.

    What follows from the root or the map (`refused`, `panics`, `lost`) is said once, for these; then the other objects
    are not judged: the kernel does not come to them, or any of them may have been in the memory that it gives away.
    """
    rows = list(_judge_root(offer, target))
    kernel = target.kernel
    if kernel is None or worst(rows) in ("refused", "panics", "lost"):
        return rows
    rows += _judge_scratch(offer, target, kernel)
    rows += _judge_folios(offer, target, kernel)
    rows += _judge_luo(offer, target, kernel)
    rows += _judge_small(offer, target, kernel)
    return rows


def _judge_root(offer: Offer, target: Target) -> Iterator[Judged]:
    """Judge root FDT, map and bitmaps: kho_populate and what follows it."""
    kernel, release = target.kernel, target.release
    populate = f"kho_populate, {CORE}"
    oldest, newest = (Release.parse(name) for name in (min(KERNELS, key=_order), max(KERNELS, key=_order)))
    if kernel is None and release.series < oldest.series:
        yield Judged(
            "root", "refused", f"Linux {release} has no KHO, which came with {oldest}", "arch/x86/kernel/setup.c"
        )
        return
    if kernel is None:
        yield Judged(
            "root", "unknown", f"Linux {release} is not known here; the newest that is, {newest}, may differ", populate
        )
        return
    if target.option("KEXEC_HANDOVER") is False:
        yield Judged(
            "root",
            "refused",
            "built without CONFIG_KEXEC_HANDOVER: it ignores what is passed",
            "arch/x86/kernel/setup.c",
        )
        return
    if offer.abi != kernel.abi and offer.abi not in target.listed:
        why = f"compatible {offer.abi!r}, and Linux {kernel.name} takes {kernel.abi!r} only: it boots cold"
        why += _parts(offer.abi, kernel)
        yield Judged("root", "refused", why, populate)
        return
    if offer.map == 0:
        why = "the address of the map is 0, as nothing was finalized: it boots cold"
        yield Judged("root", "refused", why, f"kho_mem_init, {CORE}")
        return
    pages = None if target.image is None else target.image.page_size
    if pages is not None and offer.page_size is not None and pages != offer.page_size:
        why = f"pages of {offer.page_size} bytes, and the kernel's have {pages}: it reads the map wrongly"
        yield Judged("map", "panics", why, f"docs/abi.md section 3, {CORE}")
        return
    bitmap_bytes = kernel.bitmap_bytes(offer.page_size or 4096)
    if offer.bitmap_bytes is not None and bitmap_bytes is not None and offer.bitmap_bytes != bitmap_bytes:
        why = f"bitmaps of {offer.bitmap_bytes} bytes under the same compatible; "
        why += f"Linux {kernel.name} reads {kernel.bitmap}"
        verdict: Verdict = "panics"
        if bitmap_bytes < offer.bitmap_bytes:
            # Seen from 6.18.15 to 6.17.8 (docs/real-kernels.md): it boots, without a part of what is preserved.
            verdict = "lost"
            why += ": it gives away all memory that the rest of a bitmap marks, and boots if that is not in its way"
        else:
            why += ": it takes pages in use for free ones, and dies before its first message"
        where = "PRESERVE_BITS, kernel/kexec_handover.c"
        if release.vendor and bitmap_bytes == SMALL_BITMAP:
            why += f"; your vendor's {kernel.name} may have bitmaps of a page ({FIXES['metadata-allocator'].upstream})"
            yield Judged("map", "unknown", why, where)
            return
        yield Judged("map", verdict, why, where)
        return
    if kernel.levels_16k is not None and offer.page_size == 16384 and offer.levels not in (None, kernel.levels_16k):
        why = f"a tree of {offer.levels} levels, and Linux {kernel.name} reads {kernel.levels_16k} at 16 KiB pages"
        yield Judged("map", "panics", why, "include/linux/kho/abi/kexec_handover.h")
        return
    if offer.orders is None:
        why = "the map is not in this dump: whether the kernel reads it is not known"
        if bitmap_bytes is not None:
            why += f"; Linux {kernel.name} reads bitmaps of {bitmap_bytes} bytes"
        yield Judged("map", "unknown", why, f"kho_mem_deserialize, {CORE}")
        return
    how = f"what Linux {kernel.name} writes itself" if offer.abi == kernel.abi else "listed in the kernel's file"
    yield Judged("root", "taken", f"{offer.abi}: {how}", populate)
    if offer.bitmap_bytes is None and bitmap_bytes is not None:
        why = f"Linux {kernel.name} reads bitmaps of {bitmap_bytes} bytes; debugfs does not show what size they have"
        yield Judged("map", "unknown", why, "PRESERVE_BITS, kernel/kexec_handover.c")
        return
    form = kernel.map if bitmap_bytes is None else f"{kernel.map}, bitmaps of {bitmap_bytes} bytes"
    condition = "" if pages is not None or offer.page_size in (None, 4096) else f", if its pages have {offer.page_size}"
    yield Judged("map", "taken", form + condition, f"kho_mem_deserialize, {CORE}")


def _judge_scratch(offer: Offer, target: Target, kernel: Kernel) -> Iterator[Judged]:
    """Judge the scratch areas, which the target inherits and boots in, and the crash kernel that has to fit there."""
    where = "memblock_set_kho_scratch_only, mm/memblock.c"
    if offer.scratch is None:
        why = "the areas were not found: with --fdt-phys name their array with --scratch"
        yield Judged("scratch", "unknown", why, where)
        return
    page_size = offer.page_size or 4096
    total, largest = sum(n for _, n in offer.scratch), max((n for _, n in offer.scratch), default=0)
    # struct page has 64 bytes; memory that is not known of needs more.
    need = offer.ram // page_size * 64
    block = page_size << PAGEBLOCK_ORDERS[page_size]
    partial = next((area for area in offer.scratch if area[0] % block or area[1] % block), None)
    if need > total and not kernel.extends_scratch:
        why = (
            f"{format_size(total)} in all, and the page structures of {format_size(offer.ram)} alone take "
            f"{format_size(need)}: Linux {kernel.name} can allocate only from scratch until it frees memblock, so that "
            "it panics, or does without part of its memory"
        )
        yield Judged("scratch", "unknown", why, where)
    elif partial is not None:
        why = (
            f"{format_size(partial[1])} at {partial[0]:#x} are no whole pageblocks of {format_size(block)}: a kernel "
            "without the fix scratch-rounding that reserved them frees the memory next to them"
        )
        yield Judged("scratch", "unknown", why, "kho_init, " + CORE)
    else:
        why = f"{len(offer.scratch)} areas, {format_size(total)}, as they are; kho_scratch= is ignored"
        yield Judged("scratch", "taken", why, where)
    line = offer.cmdline if target.cmdline is None else target.cmdline
    asked = 0 if line is None else crash_kernel_bytes(line, offer.ram or None)
    source = "reserve_crashkernel_generic, kernel/crash_reserve.c"
    if asked is None:
        why = "crashkernel= depends on the amount of memory, which is not known"
        yield Judged("crash kernel", "unknown", why, source)
    elif asked > largest:
        why = (
            f"crashkernel= asks for {format_size(asked)} in one piece; scratch alone serves it after a handover, and "
            f"its largest area has {format_size(largest)}: there is no crash kernel until the next cold boot"
        )
        yield Judged("crash kernel", "lost", why, source)
    elif asked:
        why = f"{format_size(asked)} fit an area of {format_size(largest)}, if the kernel itself leaves them free there"
        yield Judged("crash kernel", "taken", why, source)


def _parts(compatible: str, kernel: Kernel) -> str:
    """Judge a composite compatible (a draft, docs/abi.md section 9) part by part, as text; empty for another one."""
    base, *parts = compatible.split(";")
    if not parts:
        return ""
    # struct kho_vmalloc came with the release whose test uses it.
    forms = {"radix-v1": kernel.map == "radix tree", "vmalloc-v1": kernel.kho_test == "vmalloc"}
    known = {base: base in (kernel.abi, kernel.luo, kernel.memfd), **{part: forms.get(part) for part in parts}}
    words = {True: "it reads", False: "it does not read", None: "is not known here"}
    judged = ", ".join(f"{part!r} {words[known[part]]}" for part in known)
    return f". Part by part: {judged}; but released kernels compare the whole string"


def _order(name: str) -> tuple[int, int]:
    return Release.parse(name).series


def _judge_folios(offer: Offer, target: Target, kernel: Kernel) -> Iterator[Judged]:
    """Judge folios that the kernel marks, but cannot restore."""
    most = None if target.image is None else target.image.max_page_order
    if offer.orders is None and kernel.max_page_order:
        why = (
            f"the map that is not in this dump would tell whether there are folios above MAX_PAGE_ORDER: Linux "
            f"{kernel.name} cannot restore them"
        )
        yield Judged("folios", "unknown", why, ORDER_CHECKED)
    if not offer.orders or not kernel.max_page_order:
        return
    limit = MAX_PAGE_ORDERS.get(offer.page_size or 4096, 10) if most is None else most
    beyond = {order: n for order, n in offer.orders.items() if order > limit}
    if beyond:
        n = sum(beyond.values())
        said = "" if most is not None else ", unless its CONFIG_ARCH_FORCE_MAX_ORDER is larger"
        why = f"{n} folios above MAX_PAGE_ORDER, {limit}: kho_restore_folio gives NULL for them{said}"
        yield Judged(f"folios of order {min(beyond)} and more", "lost", why, ORDER_CHECKED)


def _judge_luo(offer: Offer, target: Target, kernel: Kernel) -> Iterator[Judged]:
    """Judge LUO's subtree, its sessions, files and FLBs."""
    if offer.luo is None:
        return
    if kernel.luo is None:
        yield Judged("LUO", "lost", f"Linux {kernel.name} has no LUO: its memory stays reserved", LUO)
        return
    if target.enabled is False:
        # Seen with kho=off where 6.19 hands over to 7.0, which panics without it (docs/compat.md).
        why = "KHO is off on its command line: there is no /dev/liveupdate, and the memory stays reserved"
        yield Judged("LUO", "lost", why, LUO)
        return
    built = target.option("LIVEUPDATE")
    if built is False:
        yield Judged("LUO", "lost", "built without CONFIG_LIVEUPDATE: its memory stays reserved", LUO)
        return
    header = offer.features.get("luo")
    missing = None if header is None else target.lacks("luo", header)
    if missing:
        why = f"it requires {', '.join(missing)}, which .liveupdate_features of the kernel does not support"
        yield Judged("LUO", "panics", why, f"luo_early_startup, {LUO}")
        return
    if offer.luo != kernel.luo and offer.luo not in target.listed and missing is None:
        why = f"compatible {offer.luo!r}, and Linux {kernel.name} takes {kernel.luo!r} only, or panics"
        why += _parts(offer.luo, kernel)
        yield Judged("LUO", "panics", why, f"luo_early_startup, {LUO}")
        return
    if kernel.flb_node and not offer.flb_node:
        why = (
            f"no node luo-flb, which Linux {kernel.name} needs even if it is empty: 'Unable to get FLB node [luo-flb]'"
        )
        yield Judged("LUO", "panics", why, "luo_flb_setup_incoming, kernel/liveupdate/luo_flb.c")
        return
    if target.cmdline is not None and not _switched_on(target.cmdline):
        why = "no liveupdate=on on its command line: there is no /dev/liveupdate, and the memory stays reserved"
        yield Judged("LUO", "lost", why, LUO)
        return
    said = "" if header is None or missing is None else f": it requires {', '.join(header.listed(header.req))}"
    yield Judged("LUO", "taken", offer.luo + said, f"luo_early_startup, {LUO}")
    tested = target.option("LIVEUPDATE_TEST")
    for name in offer.flbs:
        if not kernel.flbs:
            yield Judged(f"FLB {name}", "lost", f"Linux {kernel.name} has no FLBs", LUO)
        elif name.startswith(TEST_FLB) and tested is not None:
            verdict: Verdict = "taken" if tested else "lost"
            why = (
                "CONFIG_LIVEUPDATE_TEST"
                if tested
                else "built without CONFIG_LIVEUPDATE_TEST: its memory stays reserved"
            )
            yield Judged(f"FLB {name}", verdict, why, "lib/tests/liveupdate.c")
        else:
            why = "taken by the driver of that name, if the kernel has it"
            yield Judged(f"FLB {name}", "unknown", why, "kernel/liveupdate/luo_flb.c")
    if offer.sessions is None:
        why = "sessions are written while the kexec is under way: debugfs does not show them"
        if "luo" in offer.features:
            why = "its feature header requires what kho does not know, so that its lists are not read"
        yield Judged("sessions", "unknown", why, "kernel/liveupdate/luo_session.c")
        return
    for name, files in offer.sessions.items():
        yield from _judge_session(name, files, target, kernel, offer.features)


def _judge_session(
    name: str, files: list[tuple[int, str]], target: Target, kernel: Kernel, features: Mapping[str, Features]
) -> Iterator[Judged]:
    """Judge a session: one file that no handler takes fails all of them from Linux 7.0 on."""
    where = "luo_file_deserialize, kernel/liveupdate/luo_file.c"
    listed = target.listed
    memfd = target.option("LIVEUPDATE_MEMFD")
    if not files:
        yield Judged(f"session {name}", "taken", "it has no files", where)
    for token, compatible in files:
        what = f"session {name}, file {token:#x}"
        header = features.get(what)
        missing = None if header is None else target.lacks(compatible, header)
        if missing:
            why = (
                f"it requires {', '.join(missing)}, which .liveupdate_features of the kernel does not support: every "
                "session is lost"
            )
            yield Judged(what, "lost", why, where)
            continue
        if listed:
            known: bool | None = compatible in listed
        elif compatible == kernel.memfd:
            known = memfd is not False or kernel.name == "6.19"
        else:
            known = False if compatible.startswith("memfd-") else None
        if known:
            yield Judged(what, "taken", compatible, where)
        elif known is None:
            yield Judged(what, "unknown", f"{compatible}: taken if a driver of that kernel handles it", where)
        elif kernel.name == "6.19" and not _has(target, "session-error-ignored"):
            yield Judged(what, "lost", f"no handler for {compatible!r}: the file is missing, and nothing fails", where)
        else:
            why = f"no handler for {compatible!r}: every session is lost, and /dev/liveupdate gives EIO"
            why += _parts(compatible, kernel)
            yield Judged(what, "lost", why, where)


def _has(target: Target, fix: str) -> bool:
    return FIXES[fix].affects(target.release) is False


def _judge_small(offer: Offer, target: Target, kernel: Kernel) -> Iterator[Judged]:
    """Judge what is not LUO's: reserve_mem, the test's folios, kexec-metadata, and what no kernel reads."""
    asked = None if target.cmdline is None else _reservations(target.cmdline)
    for name, size in offer.reserve_mem.items():
        where = "reserve_mem_kho_revive, mm/memblock.c"
        if asked is None:
            why = "if the command line reserves the same name, size and alignment (reserve_mem=)"
            yield Judged(f"reserve_mem {name}", "taken", why, where)
        elif name not in asked:
            yield Judged(f"reserve_mem {name}", "lost", "its command line has no reserve_mem= of that name", where)
        elif size not in (None, asked[name]):
            why = f"its command line reserves {asked[name]:#x} bytes, and {size:#x} are handed over"
            yield Judged(f"reserve_mem {name}", "lost", why, where)
        else:
            yield Judged(f"reserve_mem {name}", "taken", "its command line reserves the same name and size", where)
    if offer.kho_test is not None:
        where = "kho_test_restore, lib/test_kho.c"
        built = target.option("TEST_KEXEC_HANDOVER")
        if offer.kho_test != kernel.kho_test:
            why = f"folios listed as {offer.kho_test}, and Linux {kernel.name} reads {kernel.kho_test}"
            yield Judged("kho_test", "lost", why, where)
        elif target.enabled is False:
            yield Judged("kho_test", "lost", "KHO is off on its command line", where)
        elif built is False:
            yield Judged("kho_test", "lost", "built without CONFIG_TEST_KEXEC_HANDOVER: they stay reserved", where)
        else:
            why = "CONFIG_TEST_KEXEC_HANDOVER" if built else "if the kernel has CONFIG_TEST_KEXEC_HANDOVER"
            yield Judged("kho_test", "taken", why, where)
    if offer.metadata and not kernel.kexec_metadata:
        why = f"Linux {kernel.name} does not read it: its count of kexecs starts again"
        yield Judged("kexec-metadata", "lost", why, CORE)
    elif offer.metadata:
        yield Judged("kexec-metadata", "taken", "version 1", f"kho_in_kexec_metadata, {CORE}")
    for name in offer.others:
        yield Judged(
            f"subtree {name}", "unknown", "no released kernel reads it, or it is damaged; a driver may take it", CORE
        )


def _switched_on(cmdline: str) -> bool:
    """Say whether `liveupdate=` is on, which the kernel parses as it parses `kho=`."""
    words = [word.replace("liveupdate", "kho", 1) for word in cmdline.split() if word.startswith("liveupdate=")]
    return kho_is_enabled(" ".join(words))


def _reservations(cmdline: str) -> dict[str, int | None]:
    """Read `reserve_mem=SIZE:ALIGN:NAME`: the size by name; None for one that is no number."""
    found: dict[str, int | None] = {}
    for word in cmdline.split():
        parts = word.removeprefix("reserve_mem=").split(":")
        if word.startswith("reserve_mem=") and len(parts) == 3:
            found[parts[2]] = None
            with contextlib.suppress(ParameterError):
                found[parts[2]] = parse_size(parts[0])
    return found


OF_SOURCE = ("memfd-dirty", "session-race", "scratch-rounding")
VENDOR = "upstream; your vendor may have the fix: "
OF_TARGET = ("retrieve-partial", "session-error-ignored", "crash-kernel")


def notes(offer: Offer, target: Target) -> list[tuple[str, str]]:
    """List the faults of both releases that bear on a handover: the release, and the fault with its remedy."""
    found = []
    if target.image is not None and target.image.unread is not None:
        why = f"{target.image.path}: {target.image.unread}; its configuration is not known"
        found.append((f"Linux {target.release}", why))
    for release, names in ((offer.release, OF_SOURCE), (target.release, OF_TARGET)):
        for fix in (FIXES[name] for name in names):
            affected = None if release is None else fix.affects(release)
            if release is None or affected is False:
                continue
            condition = ""
            if affected is None:
                condition = f"before {release.name}.{fix.points[release.name]}: " if release.point is None else VENDOR
            found.append((f"Linux {release}", f"{condition}{fix.effect} ({fix.upstream}). Remedy: {fix.remedy}"))
    return found


def as_data(rows: list[Judged]) -> list[dict[str, Any]]:
    """Give the rows as `--json` prints them."""
    return [row._asdict() for row in rows]
