"""What each kernel writes and accepts, and which point release fixes what: one table for every command that asks.

A kernel is known by its series (`7.0`), because formats do not change within one. Point releases differ in what they
fix: `FIXES`. A distribution's release (`7.0.0-14-generic`) does not tell which point release it contains; Ubuntu's
/proc/version_signature does.

Sources: the kernel trees of 6.17.8, 6.18.15, 6.19.11, 7.0 (files of Linus' tree and stable mails), 7.1.13, 7.2.13 and
7.3.4; docs/abi.md has the table with the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

from ._kho import ScratchSpec, abis, parse_kho_scratch
from .errors import ParameterError
from .sizes import MAX_PAGE_ORDERS, PAGE_SIZES, PAGEBLOCK_ORDERS, SMALL_BITMAP

__all__ = [
    "FIXES",
    "KERNELS",
    "Fix",
    "Kernel",
    "Release",
    "differences",
    "faults",
    "kernel_of",
    "kernels_that_write",
    "known_kernel",
    "spanned",
]


@dataclass(frozen=True)
class Kernel:
    """One series: what it writes, and therefore what it accepts."""

    name: str
    abi: str
    """Compatible of the root FDT."""
    map: Literal["chunk list", "radix tree"]
    bitmap: str
    """Size of a bitmap of the chunk list; of a tree the leaf is a page."""
    levels_16k: int | None
    """Levels of the tree at 16 KiB pages, where versions differ."""
    subtree_property: str
    blob_size: bool
    """Whether each subtree says its size."""
    luo: str | None
    """Compatible of LUO's subtree."""
    flb_node: bool
    """Whether LUO's FDT needs a `luo-flb` node: without it the kernel panics."""
    flbs: bool
    """Whether file-lifecycle-bound data is handed over at all."""
    memfd: str | None
    kexec_metadata: bool
    kho_test: Literal["array", "vmalloc"]
    """How lib/test_kho.c lists its folios."""
    finalize: Literal["by hand", "with LUO", "none"]
    """The finalize step: debugfs `out/finalize`; by itself if liveupdate=on; none, as the map is always valid."""
    max_page_order: bool
    """Whether a folio above MAX_PAGE_ORDER fails to restore."""
    cuts_at_nodes: bool
    """Whether a range is split where the NUMA node changes."""
    scratch_nodes: str
    """Which nodes get a scratch area."""
    deferred_init: bool
    """Whether KHO and CONFIG_DEFERRED_STRUCT_PAGE_INIT can be set together."""
    get_name: bool
    """Whether LUO has the ioctl LIVEUPDATE_SESSION_GET_NAME."""
    same_file: bool
    """Whether PRESERVE_FD refuses a file that is preserved under another token."""
    marker: Literal["order", "order and magic"]
    """What `page->private` of a preserved folio holds; without the magic a second restore is not refused."""
    enabled_by: Literal["kho=on", "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT"]
    """What switches KHO on; `kho=` decides where it is given."""
    scratch_option: str
    """Which sizes `kho_scratch=` takes."""
    scratch_alignment: Literal["pageblock", "MAX_ORDER block"]
    """What the size of an area by percentage, and per node, is rounded up to."""
    extends_scratch: bool
    """Whether a kernel that takes over adds blocks of 1 GiB without preserved memory to its scratch."""
    off_in_kdump: bool
    """Whether a crash kernel switches KHO off by itself."""

    @property
    def edits_root(self) -> bool:
        """Whether the root FDT is written at boot and edited, newest subtree first; else in one pass at finalize."""
        return self.finalize != "by hand"

    def scratch_block(self, page_size: int) -> int:
        """Return what scratch areas are aligned to, in bytes, with the default MAX_PAGE_ORDER and with huge pages."""
        orders = PAGEBLOCK_ORDERS if self.scratch_alignment == "pageblock" else MAX_PAGE_ORDERS
        return page_size << orders[page_size]

    def parse_scratch(self, value: str) -> ScratchSpec:
        """Parse a value of `kho_scratch=` as this kernel does. Raises: ParameterError."""
        ignored = self.scratch_option.endswith("the rest is ignored")
        zeros = not self.scratch_option.startswith("each above 0")
        return parse_kho_scratch(value, trailing_garbage=ignored, zeros=zeros)

    def bitmap_bytes(self, page_size: int) -> int | None:
        """Return the bytes of a bitmap of its chunk list; None for a tree."""
        if self.map == "radix tree":
            return None
        return SMALL_BITMAP if self.bitmap.startswith(str(SMALL_BITMAP)) else page_size


def _series(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def _includes(kernels: str, series: tuple[int, int]) -> bool:
    """Say whether a column of the ABI table names a series: "Linux 6.16 to 7.0", "Linux 7.2 and 7.3", "Linux 7.1"."""
    named = [_series(text) for text in re.findall(r"[0-9]+\.[0-9]+", kernels)]
    return min(named) <= series <= max(named) if " to " in kernels else series in named


LUO_SINCE = (6, 19)


def _kernel(name: str, **given: object) -> Kernel:
    """Make the row of a series: formats from the table of ABIs (`kho._kho.abis`), and what is given.

    LUO came with 6.19, between two kernels of one ABI.
    """
    series = _series(name)
    abi = next(abi for abi in abis().values() if abi.released and _includes(abi.kernels, series))
    sizes = [nbytes for nbytes, kernels in abi.bitmaps if _includes(kernels, series)]
    luo = series >= LUO_SINCE
    row: dict[str, object] = {
        "abi": abi.compatible,
        "map": abi.map,
        "bitmap": "-" if not sizes else "a page" if sizes[0] is None else f"{sizes[0]} bytes",
        "levels_16k": abi.levels.get(16384),
        "subtree_property": abi.subtree_property,
        "blob_size": abi.size_property is not None,
        "luo": abi.luo if luo else None,
        "flb_node": False,
        "flbs": False,
        "memfd": abi.memfd if luo else None,
        "kexec_metadata": False,
        "kho_test": "vmalloc",
        "finalize": "with LUO" if luo else "by hand",
        "max_page_order": True,
        "cuts_at_nodes": abi.cuts_at_nodes,
        "scratch_nodes": "with memory" if luo else "online",
        "deferred_init": False,
        "get_name": False,
        "same_file": False,
        "marker": "order and magic",
        "enabled_by": "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT" if luo else "kho=on",
        "scratch_option": "sum above 0, nothing may follow" if luo else "sum above 0, the rest is ignored",
        "scratch_alignment": "pageblock",
        "extends_scratch": False,
        "off_in_kdump": False,
    }
    return Kernel(name, **{**row, **given})  # type: ignore[arg-type]


_OLDEST = {
    "kho_test": "array",
    "marker": "order",
    "scratch_option": "each above 0, the rest is ignored",
}
_TREE = {"flbs": True, "kexec_metadata": True, "finalize": "none", "max_page_order": False, "same_file": True}
_NEWEST = {**_TREE, "deferred_init": True, "get_name": True, "scratch_alignment": "MAX_ORDER block"}

KERNELS = {
    kernel.name: kernel
    for kernel in (
        _kernel("6.16", **_OLDEST),
        _kernel("6.17", **_OLDEST),
        _kernel("6.18"),
        _kernel("6.19"),
        _kernel("7.0", flb_node=True, flbs=True),
        _kernel("7.1", **_TREE, flb_node=True),
        _kernel("7.2", **_NEWEST),
        _kernel("7.3", **_NEWEST, extends_scratch=True, off_in_kdump=True),
    )
}
"""Every series that has KHO, by name, oldest first."""


SIGNED = re.compile(r"\S [^\s()]*[0-9][^\s()]* ([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,5})\)?\s*$")
"""The end of a distribution's signature, `Ubuntu 7.0.0-14.14-generic 7.0.3`, in parentheses or not."""


class Release(NamedTuple):
    """A kernel's release, as `uname -r` has it."""

    text: str
    series: tuple[int, int]
    point: int | None
    """The point release; None where only the series is known."""
    vendor: bool
    """Whether a distribution made it, so that fixes of later point releases may be in it."""
    candidate: int | None = None
    """Of a release candidate (7.1-rc3) its number; its point release is 0."""

    @classmethod
    def parse(cls, text: str, signature: str | None = None) -> Release:
        """Read `7.0`, `7.0.11`, `7.1-rc3`, `7.0.0-14-generic`.

        Args: signature: the contents of /proc/version_signature, whose last word is the upstream release, or a banner
            that ends with them in parentheses.
        Raises: ParameterError.
        """
        found = re.match(r"v?([0-9]{1,3})\.([0-9]{1,3})(?:\.([0-9]{1,5}))?(.*)$", text.strip(), re.DOTALL)
        if found is None:
            raise ParameterError(f"kernel release {text!r}: write 7.0 or 7.0.11")
        series = int(found[1]), int(found[2])
        upstream = SIGNED.search(signature or "")
        if upstream is not None and (int(upstream[1]), int(upstream[2])) == series:
            return cls(text.strip(), series, int(upstream[3]), vendor=False)
        rest = found[4]
        point = None if found[3] is None else int(found[3])
        candidate = re.match(r"-rc([0-9]{1,3})", rest)
        if candidate is not None:
            # A tree that was built after it (-rc3-00012-g...) has it, so is not a distribution's.
            return cls(text.strip(), series, 0, vendor=False, candidate=int(candidate[1]))
        return cls(text.strip(), series, point, vendor=bool(rest))

    @classmethod
    def running(cls) -> Release | None:
        """Give the release of the kernel that runs this process; None for one whose name is no release."""
        signature = None
        with suppress(OSError):
            signature = Path("/proc/version_signature").read_text(errors="replace")
        with suppress(ParameterError):
            return cls.parse(os.uname().release, signature)
        return None

    @property
    def name(self) -> str:
        """The series as `KERNELS` has it."""
        return f"{self.series[0]}.{self.series[1]}"

    def __str__(self) -> str:
        """Give the text."""
        return self.text


def kernel_of(release: Release) -> Kernel | None:
    """Give the row of a release; None for one before KHO (6.16), or after the last one known."""
    return KERNELS.get(release.name)


def known_kernel(text: str) -> Kernel:
    """Give the row of a release that is written as `uname -r` has it. Raises: ParameterError if it is not known."""
    found = kernel_of(Release.parse(text))
    if found is None:
        raise ParameterError(f"Linux {text}: kernels with KHO that are known here: {', '.join(KERNELS)}")
    return found


def kernels_that_write(
    abi: str, bitmap_bytes: int | None, luo: str | None, *, flb_node: bool | None = None
) -> list[Kernel]:
    """List the kernels that write a handover with these formats.

    Args: bitmap_bytes: of a chunk list, else None. luo: the compatible of the LUO subtree; None if there is none, which
        every kernel can leave out. flb_node: whether LUO's FDT has the node `luo-flb`; None if it is not an FDT.
    """
    found = []
    for kernel in KERNELS.values():
        small = kernel.bitmap_bytes(PAGE_SIZES[0]) == SMALL_BITMAP
        if kernel.abi != abi or (bitmap_bytes is not None and small != (bitmap_bytes == SMALL_BITMAP)):
            continue
        if luo is None or (kernel.luo == luo and (flb_node is None or kernel.flb_node == flb_node)):
            found.append(kernel)
    return found


def spanned(kernels: list[Kernel]) -> str:
    """Name adjacent kernels as the ABI table does: "Linux 6.18 to 7.0", "Linux 7.2 and 7.3", "Linux 7.0"."""
    first, last = kernels[0].name, kernels[-1].name
    if len(kernels) == 1:
        return f"Linux {first}"
    return f"Linux {first} {'and' if len(kernels) == 2 else 'to'} {last}"


@dataclass(frozen=True)
class Fix:
    """A fault that a point release mends."""

    name: str
    effect: str
    """What a user sees without the fix."""
    since: tuple[int, int]
    """The first series with the fault."""
    mended: tuple[int, int]
    """The first series without it from its first release on."""
    points: dict[str, int]
    """The point release of an earlier series that has the fix."""
    upstream: str
    """Upstream commits, or the title of the patch where the commit is not known."""
    remedy: str
    candidates: dict[str, int] = field(default_factory=dict)
    """The release candidate of a series that has the fix, where a released kernel never lacked it."""

    def affects(self, release: Release) -> bool | None:
        """Say whether a release has the fault; None if a distribution may have taken the fix over."""
        if not self.since <= release.series < self.mended:
            return False
        if release.name in self.candidates:
            return release.candidate is not None and release.candidate < self.candidates[release.name]
        fixed = self.points.get(release.name)
        if fixed is None:
            return None if release.vendor else True
        if release.point is None:
            return None
        if release.point >= fixed:
            return False
        return None if release.vendor else True

    def where(self) -> str:
        """Say which releases have it: `6.19 (every release), before 7.0.11`."""
        spans = []
        for name, kernel in KERNELS.items():
            series = Release.parse(kernel.name).series
            if self.since <= series < self.mended:
                fixed, candidate = self.points.get(name), self.candidates.get(name)
                if candidate is not None:
                    spans.append(f"before {name}-rc{candidate}")
                else:
                    spans.append(f"{name} (every release)" if fixed is None else f"before {name}.{fixed}")
        return ", ".join(spans)

    def remedied(self) -> str:
        """Say which releases have the fix: `6.19.9, 7.0 and later`."""
        first = [f"{name}.{point}" for name, point in self.points.items()]
        first += [f"{name}-rc{candidate}" for name, candidate in self.candidates.items()]
        return ", ".join([*first, f"{self.mended[0]}.{self.mended[1]} and later"])


FIXES = {
    fix.name: fix
    for fix in (
        Fix(
            "segment-unfinalized",
            "each kexec with kho=on and no finalized handover makes the next kernel say 'handover FDT is invalid: -9'; "
            "nothing is lost",
            (6, 16),
            (6, 18),
            {"6.17": 4},
            "only fill kimage if KHO is finalized",
            "none is needed",
        ),
        Fix(
            "metadata-allocator",
            "with KFENCE the map's bitmaps can lie in scratch, if the kernel was itself booted by a handover: the next "
            "one overwrites them",
            (6, 16),
            (6, 18),
            {},
            "a2fff99f92da, fa759cd75bce, e38f65d317df",
            "boot without KFENCE (kfence.sample_interval=0), or use 6.18",
        ),
        Fix(
            "unpreserve-absent",
            "unpreserving memory that is not preserved is not noticed; with the fix the kernel warns and returns",
            (6, 16),
            (6, 18),
            {"6.17": 9},
            "b05addf6f059",
            "unpreserve what was preserved, once",
        ),
        Fix(
            "memfd-dirty",
            "pages of a memfd that are written after PRESERVE_FD can be lost: a folio that was clean may be reclaimed, "
            "one that was not up to date is zeroed by the next kernel",
            (6, 19),
            (7, 0),
            {"6.19": 9},
            "50d7b4332f27, 7e04bf1f3315, f85b1c6af5bc",
            "write everything before PRESERVE_FD, or use 6.19.9",
        ),
        Fix(
            "retrieve-partial",
            "RETRIEVE_FD can succeed with part of the memfd missing, where a folio after the first cannot be restored; "
            "only the kernel log tells: 'Unable to restore folio at physical address'",
            (6, 19),
            (7, 1),
            {"7.0": 11},
            "0fb1daf0b78d",
            "compare size and contents of what was retrieved, or use 7.0.11",
        ),
        Fix(
            "session-error-ignored",
            "a session whose files cannot be read is no error: /dev/liveupdate opens, and files are missing",
            (6, 19),
            (7, 0),
            {"6.19": 13},
            "307e0c5859b0",
            "check that each file is there, or use 6.19.13",
        ),
        Fix(
            "retrieve-leaks",
            "after a RETRIEVE_FD that failed the file's other folios are not given back: they stay reserved",
            (6, 19),
            (7, 1),
            {"7.0": 4},
            "3538f90ab89a",
            "boot cold to have the memory back, or use 7.0.4",
        ),
        Fix(
            "restored-blocks",
            "st_blocks of a restored memfd with large folios is too small: a large folio counts as one page",
            (6, 19),
            (7, 1),
            {},
            "memfd: account a restored folio as its pages (in 7.1)",
            "take the size of a restored memfd, not its blocks",
        ),
        Fix(
            "tree-depth",
            "the radix tree has 4 levels at 16 KiB pages, where every released kernel has 5; ranges are not "
            "unpreserved as they were preserved",
            (7, 1),
            (7, 2),
            {},
            "d64b0372760e, 8fd2f26fa2a3",
            "use a released 7.1",
            {"7.1": 6},
        ),
        Fix(
            "crash-kernel",
            "a crash kernel that kexec_file_load loaded is given the scratch areas: on x86_64 KASLR places it there, "
            "so that about 10 MiB of the crashed kernel's memory are overwritten; after the finalize step it hangs "
            "while booting",
            (6, 19),
            (7, 1),
            {"7.0": 11},
            "a6715d7ec472",
            "use 7.0.11, or put nokaslr on the crash kernel's command line",
        ),
        Fix(
            "scratch-rounding",
            "low and global sizes of kho_scratch= that are no multiple of a pageblock (2 MiB at 4 KiB pages) give the "
            "page allocator pages next to the area that may be in use: memory corruption",
            (6, 16),
            (7, 2),
            {"6.18": 42, "7.1": 5},
            "0e39380a7316",
            "use multiples of the pageblock",
        ),
        Fix(
            "ioctl-direction",
            "ioctls of the wrong direction are taken: PRESERVE_FD on a retrieved session, FINISH and RETRIEVE_FD on an "
            "outgoing one",
            (6, 19),
            (7, 2),
            {"7.1": 5},
            "507e3b479f9c",
            "do not issue them",
        ),
        Fix(
            "empty-session-name",
            "CREATE_SESSION takes an empty name, and cuts one of 64 bytes to 63",
            (6, 19),
            (7, 2),
            {"7.1": 4},
            "reject CREATE_SESSION with invalid name length (in 7.1.y c04873ea85d9)",
            "give each session a name of 1 to 63 bytes",
        ),
        Fix(
            "subnode-left",
            "a root FDT of nearly 4096 bytes can hold a subnode without its property",
            (6, 19),
            (7, 1),
            {"7.0": 9},
            "9ec953298948",
            "readers take such a node as a subtree that was not added",
        ),
        Fix(
            "memoryless-node",
            "a NUMA node without memory makes the reservation of scratch fail, and KHO is off",
            (6, 16),
            (7, 0),
            {"6.19": 6},
            "427b2535f513",
            "give each node memory, or use 6.19.6",
        ),
        Fix(
            "arm64-cells",
            "arm64: the size in linux,kho-fdt and linux,kho-scratch is read with #address-cells",
            (6, 16),
            (6, 19),
            {"6.17": 13, "6.18": 2},
            "fix incorrect use of dt_root_addr_cells",
            "use 6.17.13 or 6.18.2 where #address-cells and #size-cells differ",
        ),
        Fix(
            "session-race",
            "a session that is opened or closed during the kexec can be lost, or corrupt the array of sessions; "
            "unpreserving or finishing can use memory that was given back",
            (6, 19),
            (7, 2),
            {"7.1": 8},
            "bb1328be35bf, 291dcd37c8c8, ef52801fdb96",
            "keep sessions as they are once the kexec begins",
        ),
    )
}
"""Faults by name, with the release that mends each."""


def faults(one: Release, two: Release) -> Iterator[tuple[Fix, bool | None, bool | None]]:
    """List the faults that two releases do not share: the fault, and whether each has it; None where that is unsure."""
    for fix in FIXES.values():
        a, b = fix.affects(one), fix.affects(two)
        if a is not b:
            yield fix, a, b


def differences(one: Kernel, two: Kernel) -> Iterator[tuple[str, object, object]]:
    """List what differs between two kernels: the column, and each one's value."""
    for column in fields(Kernel):
        a, b = getattr(one, column.name), getattr(two, column.name)
        if column.name != "name" and a != b:
            yield column.name, a, b
