"""What can be wrong with a handover: the rules, by ids that stay, and findings: places where one does not hold.

>>> Finding("KHO015", "folio of order 9 at 0xc000000", "in the scratch area at 0xb400000", 0xC000000).severity
'error'

A third party adds to `RULES` under ids of its own (`RULES["ACME001"] = Rule(...)`) and yields findings from
`Payload.findings`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._kho import Abi, abis
from .._types import SEVERITIES, Severity
from ..text import listed

__all__ = ["RULES", "SEVERITIES", "Finding", "Rule", "Severity", "markdown"]


@dataclass(frozen=True)
class Rule:
    """What a finding of one kind means."""

    severity: Severity
    title: str
    means: str
    """What was found."""
    matters: str
    """What comes of it."""
    advice: str
    """What to do."""
    source: str
    """Where it is written."""

    @property
    def explanation(self) -> str:
        """Give everything there is to say, as paragraphs."""
        return f"{self.means}\n\nWhy it matters: {self.matters}\n\nWhat to do: {self.advice}\n\nSource: {self.source}"


ABI_H = "include/linux/kho/abi/kexec_handover.h"
CORE = "kernel/liveupdate/kexec_handover.c"
LUO = "include/linux/kho/abi/luo.h, kernel/liveupdate/"
MEMFD = "include/linux/kho/abi/memfd.h, mm/memfd_luo.c"
GUESS = "read it again with --page-size, --bitmap-bytes or --fdt-phys if a guess of this program may be wrong"

ROWS = abis().values()


def _which(has: Callable[[Abi], object]) -> str:
    """Name the ABIs that have something."""
    return listed(abi.compatible for abi in ROWS if has(abi))


def _each(column: Callable[[Abi], object]) -> str:
    """Say what a column of the table is, and in which ABIs: "4 in kho-v2 and 5 in kho-v3 and kho-v4"."""
    values = dict.fromkeys(value for abi in ROWS if (value := column(abi)) is not None)
    return listed(f"{value} in {listed(abi.compatible for abi in ROWS if column(abi) == value)}" for value in values)


def _bitmaps() -> str:
    """Say which bitmap sizes there are: "512 bytes in Linux 6.16 and 6.17, a page in Linux 6.18 to 7.0"."""
    sizes = (bitmap for abi in ROWS for bitmap in abi.bitmaps)
    return ", ".join(f"{'a page' if nbytes is None else f'{nbytes} bytes'} in {kernels}" for nbytes, kernels in sizes)


RULES: dict[str, Rule] = {
    "KHO001": Rule(
        "error",
        "root FDT unreadable",
        "The root FDT is no valid devicetree, or has no preserved-memory-map, or a map of 0.",
        "The next kernel validates this before anything else; it warns and boots cold: everything is lost.",
        "Check that the address is the FDT's and the image complete. "
        f"On {_which(lambda abi: not abi.live)} a map of 0 says that the handover was not finalized.",
        f"{CORE}, kho_populate",
    ),
    "KHO002": Rule(
        "error",
        "unknown ABI",
        f"The root's compatible is none of {_which(lambda abi: abi.decoded)}.",
        "A kernel takes over only what carries its own compatible string; any other boots cold. Nothing behind it was "
        "checked.",
        "Boot a kernel that writes the same compatible, or look for a newer version of this program.",
        f"{ABI_H}, KHO_FDT_COMPATIBLE",
    ),
    "KHO003": Rule(
        "warning",
        "FDT cut short",
        "The FDT has fewer bytes than its header says. Linux 7.x shows out/fdt in debugfs with the size it had at "
        "boot, so that the names of properties are missing once a subtree was added.",
        "The kernel's own copy is whole; this copy lacks what is behind the cut.",
        "Read the FDT from memory (in/fdt after the kexec, /proc/vmcore, an image) if what is cut off is needed.",
        "kernel/liveupdate/kexec_handover_debugfs.c",
    ),
    "KHO004": Rule(
        "error",
        "map unreadable",
        "The preserved-memory map cannot be followed: a node outside memory, an impossible order, count or entry, or "
        "no page size and bitmap size under which it makes sense.",
        "The next kernel follows it unchecked before it hands out memory: it reserves the wrong pages, or faults.",
        f"Check that the image is complete; {GUESS}.",
        f"{CORE}, kho_mem_retrieve; {ABI_H}",
    ),
    "KHO005": Rule(
        "error",
        "map cycle or shared node",
        "A node of the map is reached twice: a chunk list comes back to a chunk, or two entries of a tree lead to one "
        "page.",
        "The next kernel walks a chunk list until it ends, so a cycle hangs it at boot; a shared node preserves the "
        "same bits at two places.",
        "A map is written whole, so memory was overwritten, or its writer is wrong. Do not boot into it.",
        f"{CORE}, kho_mem_deserialize, kho_radix_walk_tree",
    ),
    "KHO006": Rule(
        "error",
        "tree of the wrong depth",
        "Read with the number of levels its compatible has, the tree does not preserve the FDT's page; with another "
        f"number it does. Levels at 16 KiB pages: {_each(lambda abi: abi.levels.get(16384))}.",
        "The next kernel takes tables for bitmaps or bitmaps for tables, and preserves the wrong pages.",
        "Write the tree with the depth its compatible asks for (`kho convert --abi`), or boot a kernel that agrees.",
        f"{ABI_H}, KHO_TREE_MAX_DEPTH",
    ),
    "KHO007": Rule(
        "error",
        "map node misaligned",
        "A node of the map is at an address that is no page's (or, for a bitmap of 512 bytes, no multiple of 8).",
        "Every node has its page; such a pointer is no pointer, and what follows it reads something else.",
        f"Look at what wrote the pointer; {GUESS}.",
        ABI_H,
    ),
    "KHO008": Rule(
        "warning",
        "page size or bitmap size ambiguous",
        f"The map makes as much sense under another page size or, in {_which(lambda abi: abi.bitmaps)}, another bitmap "
        f"size ({_bitmaps()}), which its compatible does not tell.",
        "Under the wrong one folios appear all over the address space, or those beyond bit 4095 are dropped.",
        "Say which kernel wrote it: --bitmap-bytes 512 or --bitmap-bytes 4096, --page-size.",
        "ABI section 1; kernel/kexec_handover.c, PRESERVE_BITS",
    ),
    "KHO009": Rule(
        "note",
        "empty bitmaps",
        "Bitmaps or leaves have no bit set. Unpreserving clears bits and frees no bitmap, so that one that was used "
        "stays.",
        "Nothing is wrong; each costs a page (or 512 bytes) and a step of the walk.",
        "Nothing.",
        f"{CORE}, __kho_unpreserve_order",
    ),
    "KHO010": Rule(
        "error",
        "map in scratch",
        "A chunk, bitmap or node of the map lies in a scratch area.",
        "The next kernel boots inside scratch: it may overwrite the map before it has read it.",
        "Allocate metadata outside scratch. If the areas were guessed, give the right ones.",
        f"{CORE}, kho_alloc_preserve, kho_scratch_overlap",
    ),
    "KHO011": Rule(
        "error",
        "map preserved as data",
        "A node of the map lies in a folio that the map preserves.",
        "Map pages are not preserved: they are read and then free. One that is also somebody's folio has been "
        "overwritten by one of the two.",
        f"Look for the writer that used memory it did not own; {GUESS}.",
        f"{CORE}, kho_mem_serialize",
    ),
    "KHO012": Rule(
        "error",
        "folios overlap",
        "A page is in two preserved folios, of different orders.",
        "The next kernel reserves it twice, and whoever restores both folios frees it twice.",
        f"Find who preserved the smaller one (`kho owners`); a preserved page belongs to one caller. Or {GUESS}.",
        f"{CORE}, kho_preserve_folio, kho_restore_folio",
    ),
    "KHO013": Rule(
        "error",
        "misaligned for its order",
        "A folio, the start of a bitmap or a block of a vmalloc area is at an address that is no multiple of its size.",
        "A folio of order N begins at a multiple of 2^N pages; such an entry names a folio that cannot exist.",
        f"Look at what wrote the entry; {GUESS}.",
        "ABI section 3: phys_start = index * BITS << (order + PAGE_SHIFT)",
    ),
    "KHO014": Rule(
        "error",
        "preserved memory outside RAM",
        "The map preserves pages that this memory does not have.",
        "The next kernel cannot reserve or restore them. If the image is only a part of memory, nothing is wrong with "
        "the handover.",
        f"Give all parts of the memory; compare with /proc/iomem of the machine; {GUESS}.",
        f"{CORE}, kho_restore_page: pfn_to_online_page",
    ),
    "KHO015": Rule(
        "error",
        "folio in scratch",
        "Preserved memory overlaps a scratch area.",
        "The next kernel boots inside scratch and allocates from it: the folio's content is overwritten.",
        "Allocate what is to be preserved outside scratch; from 7.x the kernel refuses this with EINVAL.",
        f"{CORE}, kho_scratch_overlap",
    ),
    "KHO016": Rule(
        "warning",
        "folio spans NUMA nodes",
        "One folio has memory of two NUMA nodes.",
        "A page names its node; a restored folio that spans two is accounted to the first. The kernels that write "
        f"{_which(lambda abi: abi.cuts_at_nodes)} split ranges at the boundary, earlier ones did not.",
        "Preserve the two sides as ranges of their own.",
        f"{CORE}, kho_preserve_pages (7.3)",
    ),
    "KHO017": Rule(
        "warning",
        "scratch misaligned",
        "A scratch area does not begin and end at a multiple of a pageblock: by default 2 MiB at 4 KiB pages, 32 MiB "
        "at 16 KiB, 512 MiB at 64 KiB.",
        "The next kernel makes the area's pageblocks CMA, whole: memory around the area goes with it, preserved or "
        "not.",
        "Round sizes and addresses as the kernel does. A kernel built with smaller pageblocks is fine with smaller "
        "steps.",
        f"{CORE}, kho_reserve_scratch: CMA_MIN_ALIGNMENT_BYTES",
    ),
    "KHO018": Rule(
        "note",
        "scratch areas not known",
        "The scratch array was not found in this memory, so nothing was checked against scratch.",
        "Overlap with scratch is what destroys a handover most surely.",
        "Give the areas (debugfs out/scratch_phys and out/scratch_len, or the array's address from boot_params or "
        "/chosen).",
        "ABI section 2",
    ),
    "KHO019": Rule(
        "error",
        "subtree malformed",
        "A node of the root does not have the property with its blob's address, 8 bytes long, or has the name of "
        "another.",
        "The next kernel answers EINVAL (or finds the first of two) when its producer asks for it: that part is lost.",
        f"Write subtrees with kho_add_subtree; the property is {_each(lambda abi: f'`{abi.subtree_property}`')}.",
        f"{CORE}, kho_retrieve_subtree",
    ),
    "KHO020": Rule(
        "error",
        "blob-size missing or too small",
        f"In {_which(lambda abi: abi.size_property)} each subtree says its blob's size in bytes. It is missing, or "
        "smaller than the structure that is there.",
        "Without it the next kernel answers EINVAL; with too small a one its producer reads less than it wrote, or "
        "refuses.",
        "Pass the blob's real size to kho_add_subtree.",
        f"{ABI_H}, KHO_SUB_TREE_SIZE_PROP_NAME",
    ),
    "KHO021": Rule(
        "error",
        "metadata not preserved",
        "Pages that lead to preserved data are not preserved themselves: the root FDT, a subtree's blob, a LUO block, "
        "a memfd's header, a list's chunk.",
        "The next kernel hands the page out before its producer has read it: tomorrow's corruption.",
        "Allocate such structures with kho_alloc_preserve. If it is the FDT, the map may have been misread.",
        f"{CORE}, kho_alloc_preserve",
    ),
    "KHO022": Rule(
        "error",
        "referenced but not preserved",
        "A file, area, region or test names pages that are not preserved, or not as the folio it says.",
        "The next kernel gives them to somebody else, or refuses to restore them: content is lost.",
        "Preserve the folio with its own order (kho_preserve_folio) before its address is written down.",
        f"{CORE}, kho_restore_folio; {MEMFD}",
    ),
    "KHO023": Rule(
        "error",
        "payload malformed",
        "The decoder of a payload's compatible refused it: a magic or version, a count or list that cannot be, memory "
        "that is not there.",
        "Its producer in the next kernel refuses it as well, or follows it into other memory.",
        "Compare the raw bytes with the format; look for overwritten memory (KHO021, KHO033).",
        "ABI section 6",
    ),
    "KHO024": Rule(
        "error",
        "checksum does not hold",
        "The checksum that kho_test took of its folios is not that of what is there.",
        "This is the kernel's own test vector: the handover did not keep content. Everything else in it is in doubt.",
        "Find which folio differs; look for overlaps (KHO012, KHO015, KHO033).",
        "lib/test_kho.c",
    ),
    "KHO025": Rule(
        "note",
        "unknown compatible",
        "Nobody here has a decoder for this payload's compatible. It is shown raw, and what it refers to is not "
        "checked.",
        "Pages that it accounts for are listed as nobody's.",
        "Install a package with a decoder (entry point group kho.decoders), or register one.",
        "kho.formats.decoder",
    ),
    "KHO026": Rule(
        "error",
        "vmalloc total_pages mismatch",
        "The pages that an area's list names are not as many as the area says.",
        "The next kernel maps what it finds and refuses the area (EINVAL) when the sum is not total_pages.",
        "Write the list and its total from the same area; look for a chunk that was cut off or overwritten.",
        f"{CORE}, kho_restore_vmalloc",
    ),
    "KHO027": Rule(
        "error",
        "memfd index duplicated",
        "Two folios of a memfd claim the same place in the file.",
        "The second cannot be added to the page cache (EEXIST); the file is not restored.",
        "Each folio's index is the place of its first page; a folio of order N takes 2^N of them.",
        f"{MEMFD}, memfd_luo_retrieve_folios",
    ),
    "KHO028": Rule(
        "error",
        "memfd index beyond size",
        "A folio of a memfd begins behind the end of the file.",
        "Its content is no part of the file and can never be read; the size or the index is wrong.",
        "Only folios below the size are preserved (memfd_pin_folios up to size - 1).",
        f"{MEMFD}, memfd_luo_preserve_folios",
    ),
    "KHO029": Rule(
        "error",
        "memfd folio count wrong",
        "nr_folios is not the number of folios in the list.",
        "With too many the next kernel reads records that are not there; with too few folios stay behind, never freed.",
        "Write nr_folios from the list.",
        f"{MEMFD}, struct memfd_luo_ser",
    ),
    "KHO030": Rule(
        "error",
        "session twice",
        "Two sessions have one name.",
        "Sessions are retrieved by name; the second cannot be inserted (EEXIST), nor can anyone retrieve it.",
        "A name belongs to one session (CREATE_SESSION refuses a second).",
        f"{LUO}luo_session.c",
    ),
    "KHO031": Rule(
        "error",
        "token twice",
        "Two files of a session have one token.",
        "Files are retrieved by token; the second can never be.",
        "A token belongs to one file of a session (PRESERVE_FD refuses a second).",
        f"{LUO}luo_file.c",
    ),
    "KHO032": Rule(
        "error",
        "session's file count wrong",
        "A session says that it has more or fewer files than its list holds.",
        "The next kernel goes by one of the two numbers: files are lost, or read from what is no entry.",
        "Write the count from the list.",
        f"{LUO}luo_session.c",
    ),
    "KHO033": Rule(
        "error",
        "memory with two owners",
        "Two payloads, or two parts of one, account for the same bytes.",
        "One of them has overwritten the other, or both will free the page.",
        "See both in `kho owners`; one of the two references is wrong.",
        "kho.handover.owners",
    ),
    "KHO034": Rule(
        "note",
        "preserved by nobody's account",
        "Preserved pages that no payload refers to, as far as payloads can be decoded here.",
        "What nobody restores stays reserved until the next boot: leaked. It may also belong to a payload that is "
        "unknown (KHO025).",
        "List them with `kho owners`; look for a preserve without a matching reference.",
        "ABI section 5",
    ),
}

UNKNOWN = Rule(
    "warning",
    "finding of another package",
    "A decoder of another package found this.",
    "It did not say.",
    "Ask the package.",
    "kho.handover.rules.RULES has no such id",
)


@dataclass(frozen=True)
class Finding:
    """A place where a rule does not hold."""

    id: str
    place: str
    """What it is about, with its address: `folio of order 9 at 0xc000000`."""
    value: str
    """What was found there."""
    phys: int | None = None
    """The address, when there is one."""

    @property
    def rule(self) -> Rule:
        """The rule of its id."""
        return RULES.get(self.id, UNKNOWN)

    @property
    def severity(self) -> Severity:
        """How bad it is: error, warning or note."""
        return self.rule.severity

    @property
    def title(self) -> str:
        """The rule in a few words."""
        return self.rule.title

    @property
    def explanation(self) -> str:
        """What it means, why it matters, what to do, and where that is written."""
        return self.rule.explanation

    def as_dict(self) -> dict[str, Any]:
        """Give it as data for JSON."""
        return {
            "id": self.id,
            "severity": self.severity,
            "title": self.title,
            "place": self.place,
            "value": self.value,
            "phys": self.phys,
        }


def markdown() -> str:
    """Write the rules as `docs/findings.md`."""
    lines = [
        "# Findings",
        "",
        "What `kho verify` reports. Ids stay what they are; `kho verify --explain KHO015` prints one of these.",
        "This page is written by `kho verify --list --markdown`.",
        "",
        "| id | severity | title |",
        "|---|---|---|",
    ]
    lines += [f"| [{i}](#{i.lower()}) | {rule.severity} | {rule.title} |" for i, rule in RULES.items()]
    for i, rule in RULES.items():
        lines += [
            "",
            f"## {i}",
            "",
            f"**{rule.title}** ({rule.severity})",
            "",
            rule.means,
            "",
            f"Why it matters: {rule.matters}",
            "",
            f"What to do: {rule.advice}",
            "",
            f"Source: {rule.source}",
        ]
    return "\n".join(lines) + "\n"
