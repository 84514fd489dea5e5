"""Can that kernel take over what this one hands over? Each object of a handover is judged, with reason and source.

A kernel accepts what it would write itself, so the rows of `kho.kernels` decide; what a kernel does with the rest was
read in its sources, and part of it was run (docs/compat.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .._kho import Fdt, Incoming, Snapshot
from ..errors import FdtError, KhoError, ParameterError
from ..formats import KhoTest, Luo, Metadata, Payload, ReserveMem, payloads
from ..formats.luo import LuoV1
from ..kernelimage import KernelImage
from ..kernels import FIXES, KERNELS, Kernel, Release, kernel_of

__all__ = ["Judged", "Offer", "Target", "judge", "worst"]

Verdict = Literal["taken", "unknown", "lost", "refused", "panics"]
VERDICTS: tuple[Verdict, ...] = ("taken", "unknown", "lost", "refused", "panics")
"""From the best to the worst. *lost*: the kernel boots with the rest, and says nothing or a line in its log.
*refused*: it boots cold, without anything of the handover. *panics*: it does not boot."""

CORE = "kernel/liveupdate/kexec_handover.c"
LUO = "kernel/liveupdate/luo_core.c"
MAX_PAGE_ORDER = {4096: 10, 16384: 11, 65536: 13}
"""The default by page size (ARCH_FORCE_MAX_ORDER, arch/arm64/Kconfig)."""
SETUP = "arch/x86/kernel/setup.c"
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
    orders: dict[int, int] = field(default_factory=dict)
    """Folios by order."""
    scratch: list[tuple[int, int]] | None = None
    luo: str | None = None
    flb_node: bool = False
    flbs: list[str] = field(default_factory=list)
    sessions: dict[str, list[tuple[int, str]]] | None = field(default_factory=dict)
    """Token and compatible of each file, by session; None if they are not seen."""
    reserve_mem: list[str] = field(default_factory=list)
    kho_test: str | None = None
    """array or vmalloc."""
    metadata: bool = False
    others: list[str] = field(default_factory=list)
    """Subtrees that no released kernel reads."""

    @classmethod
    def of(cls, inc: Incoming, found: Mapping[str, Payload] | None = None) -> Offer:
        """Take it from a memory image; `found`: its payloads, if they were decoded already."""
        offer = cls(inc.compatible, page_size=inc.page_size, bitmap_bytes=inc.bitmap_bytes)
        offer.map, offer.orders, offer.scratch = inc.preserved_memory_map, dict(inc.folios_by_order), inc.scratch
        for name, payload in (payloads(inc) if found is None else found).items():
            if isinstance(payload, Luo):
                offer.luo = payload.compatible
                offer.flb_node = not isinstance(payload, LuoV1) or payload.has_flb_node
                offer.flbs = [flb.name for flb in payload.flbs]
                sessions: dict[str, list[tuple[int, str]]] = {}
                for session in payload.all_sessions:
                    files = sessions.setdefault(session.name, [])
                    files += [(entry.token, entry.compatible) for entry in session.entries]
                offer.sessions = sessions
            elif isinstance(payload, ReserveMem):
                offer.reserve_mem = list(payload.describe()["reserve_mem"])
            elif isinstance(payload, Metadata):
                offer.metadata = True
            elif isinstance(payload, KhoTest):
                offer.kho_test = "array" if payload.list is None else "vmalloc"
            else:
                offer.others.append(name)
        return offer

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
        if taken.version is not None and len(words := taken.version.split()) > 2:
            with contextlib.suppress(ParameterError):  # of a release that no kernel has
                offer.release = Release.parse(words[2])
        for name, blob in side.sub_fdts.items():
            if name == "LUO":
                offer.sessions = None
                offer.luo, offer.flb_node = _luo_of(blob)
            elif name == "memblock":
                offer.reserve_mem = _names_of(blob)
            elif name == "kexec-metadata":
                offer.metadata = True
            elif name == "kho_test":
                offer.kho_test = "vmalloc"
            else:
                offer.others.append(name)
        return offer

    @classmethod
    def typical(cls, kernel: Kernel) -> Offer:
        """Make up what a kernel writes that hands over a memfd in a session, reserve_mem, and its test folios."""
        offer = cls(kernel.abi, Release.parse(kernel.name), 4096, kernel.bitmap_bytes(4096), map=1)
        offer.reserve_mem, offer.kho_test, offer.metadata = ["trace0"], kernel.kho_test, kernel.kexec_metadata
        offer.luo, offer.flb_node = kernel.luo, kernel.flbs
        offer.sessions = {} if kernel.memfd is None else {"session": [(0, kernel.memfd)]}
        return offer


def _luo_of(blob: bytes) -> tuple[str | None, bool]:
    """Read the compatible of LUO's subtree, a string in a struct or an FDT's, and whether it has FLBs."""
    if blob.startswith(b"luo-"):
        return blob[:8].partition(b"\0")[0].decode("ascii", "replace"), True
    try:
        fdt = Fdt(blob)
        return fdt.root.str("compatible"), "/luo-flb" in fdt
    except (FdtError, KhoError):
        return None, False


def _names_of(blob: bytes) -> list[str]:
    """List the nodes of memblock's FDT."""
    try:
        return [node.name for node in Fdt(blob).root.children]
    except (FdtError, KhoError):
        return []


@dataclass
class Target:
    """The kernel that is to take over."""

    release: Release
    image: KernelImage | None = None

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

    What follows from the root alone (`refused`, `panics`) is said once, for the root; then the other objects are not
    judged, because the kernel does not come to them.
    """
    rows = list(_judge_root(offer, target))
    kernel = target.kernel
    if kernel is None or worst(rows) in ("refused", "panics"):
        return rows
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
    accepts = [kernel.abi]
    if offer.abi not in accepts:
        why = f"compatible {offer.abi!r}, and Linux {kernel.name} takes {kernel.abi!r} only: it boots cold"
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
        why = (
            f"bitmaps of {offer.bitmap_bytes} bytes under the same compatible; Linux {kernel.name} reads "
            f"{kernel.bitmap}: it takes pages in use for free ones, and dies before its first message"
        )
        yield Judged("map", "panics", why, "PRESERVE_BITS, kernel/kexec_handover.c")
        return
    if kernel.levels_16k is not None and offer.page_size == 16384 and offer.levels not in (None, kernel.levels_16k):
        why = f"a tree of {offer.levels} levels, and Linux {kernel.name} reads {kernel.levels_16k} at 16 KiB pages"
        yield Judged("map", "panics", why, "include/linux/kho/abi/kexec_handover.h")
        return
    yield Judged("root", "taken", f"{offer.abi}: what Linux {kernel.name} writes itself", populate)


def _order(name: str) -> tuple[int, int]:
    return Release.parse(name).series


def _judge_folios(offer: Offer, target: Target, kernel: Kernel) -> Iterator[Judged]:
    """Judge folios that the kernel marks, but cannot restore."""
    most = None if target.image is None else target.image.max_page_order
    if not offer.orders or not kernel.max_page_order:
        return
    limit = MAX_PAGE_ORDER.get(offer.page_size or 4096, 10) if most is None else most
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
    built = target.option("LIVEUPDATE")
    if built is False:
        yield Judged("LUO", "lost", "built without CONFIG_LIVEUPDATE: its memory stays reserved", LUO)
        return
    if offer.luo != kernel.luo:
        why = f"compatible {offer.luo!r}, and Linux {kernel.name} takes {kernel.luo!r} only, or panics"
        yield Judged("LUO", "panics", why, f"luo_early_startup, {LUO}")
        return
    if kernel.flb_node and not offer.flb_node:
        why = (
            f"no node luo-flb, which Linux {kernel.name} needs even if it is empty: 'Unable to get FLB node [luo-flb]'"
        )
        yield Judged("LUO", "panics", why, "luo_flb_setup_incoming, kernel/liveupdate/luo_flb.c")
        return
    yield Judged("LUO", "taken", offer.luo, f"luo_early_startup, {LUO}")
    for name in offer.flbs:
        if not kernel.flbs:
            yield Judged(f"FLB {name}", "lost", f"Linux {kernel.name} has no FLBs", LUO)
        else:
            why = "taken by the driver of that name, if the kernel has it"
            yield Judged(f"FLB {name}", "unknown", why, "kernel/liveupdate/luo_flb.c")
    if offer.sessions is None:
        why = "sessions are written while the kexec is under way: debugfs does not show them"
        yield Judged("sessions", "unknown", why, "kernel/liveupdate/luo_session.c")
        return
    for name, files in offer.sessions.items():
        yield from _judge_session(name, files, target, kernel)


def _judge_session(name: str, files: list[tuple[int, str]], target: Target, kernel: Kernel) -> Iterator[Judged]:
    """Judge a session: one file that no handler takes fails all of them from Linux 7.0 on."""
    where = "luo_file_deserialize, kernel/liveupdate/luo_file.c"
    listed = None if target.image is None else target.image.versions
    memfd = target.option("LIVEUPDATE_MEMFD")
    if not files:
        yield Judged(f"session {name}", "taken", "it has no files", where)
    for token, compatible in files:
        what = f"session {name}, file {token:#x}"
        if listed is not None:
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
            yield Judged(what, "lost", why, where)


def _has(target: Target, fix: str) -> bool:
    return FIXES[fix].affects(target.release) is False


def _judge_small(offer: Offer, target: Target, kernel: Kernel) -> Iterator[Judged]:
    """Judge what is not LUO's: reserve_mem, the test's folios, kexec-metadata, and what no kernel reads."""
    for name in offer.reserve_mem:
        why = "if the command line reserves the same name, size and alignment (reserve_mem=)"
        yield Judged(f"reserve_mem {name}", "taken", why, "reserve_mem_kho_revive, mm/memblock.c")
    if offer.kho_test is not None:
        if offer.kho_test != kernel.kho_test:
            why = f"folios listed as {offer.kho_test}, and Linux {kernel.name} reads {kernel.kho_test}"
            yield Judged("kho_test", "lost", why, "kho_test_restore, lib/test_kho.c")
        else:
            yield Judged("kho_test", "taken", "if the kernel has CONFIG_TEST_KHO", "kho_test_restore, lib/test_kho.c")
    if offer.metadata and not kernel.kexec_metadata:
        why = f"Linux {kernel.name} does not read it: its count of kexecs starts again"
        yield Judged("kexec-metadata", "lost", why, CORE)
    elif offer.metadata:
        yield Judged("kexec-metadata", "taken", "version 1", f"kho_in_kexec_metadata, {CORE}")
    for name in offer.others:
        yield Judged(
            f"subtree {name}", "unknown", "no released kernel reads it, or it is damaged; a driver may take it", CORE
        )


OF_SOURCE = ("memfd-dirty", "session-race", "scratch-rounding")
VENDOR = "unless your vendor has the fix: "
OF_TARGET = ("retrieve-partial", "session-error-ignored", "crash-kernel")


def notes(offer: Offer, target: Target) -> list[tuple[str, str]]:
    """List the faults of both releases that bear on a handover: the release, and the fault with its remedy."""
    found = []
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
