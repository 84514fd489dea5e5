"""The rules that `kho verify` checks, by stable id, and `Finding`: a place where a rule is violated.

>>> Finding("KHO015", "folio of order 9 at 0xc000000", "in the scratch area at 0xb400000", 0xC000000).severity
'error'

Other packages add rules under ids of their own (`RULES["ACME001"] = Rule(...)`) and yield findings from
`Payload.findings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .._kho import Abi, abis
from .._types import SEVERITIES, Severity
from ..kernels import FIXES, KERNELS, spanned
from ..text import UNFINALIZED, listed

__all__ = ["RULES", "SEVERITIES", "Finding", "Rule", "Severity", "markdown", "note_omitted"]


@dataclass(frozen=True)
class Rule:
    """A rule: its severity, its meaning, its consequence and its remedy."""

    severity: Severity
    title: str
    means: str
    """The condition that was found."""
    matters: str
    """Its consequence."""
    advice: str
    """The remedy."""
    source: str
    """Kernel file, or section of docs/abi.md, that states the rule."""

    @property
    def explanation(self) -> str:
        """Meaning, consequence, remedy and source, as paragraphs."""
        return f"{self.means}\n\nWhy it matters: {self.matters}\n\nWhat to do: {self.advice}\n\nSource: {self.source}"


ABI_H = "include/linux/kho/abi/kexec_handover.h"
CORE = "kernel/liveupdate/kexec_handover.c"
LUO = "include/linux/kho/abi/luo.h, kernel/liveupdate/"
MEMFD = "include/linux/kho/abi/memfd.h, mm/memfd_luo.c"
GUESS = "if kho may have detected the layout wrongly, read it again with --page-size, --bitmap-bytes or --fdt-phys"

ROWS = abis().values()


def _which(has: Callable[[Abi], object]) -> str:
    """Return the names of the ABIs that a condition holds for."""
    return listed(abi.compatible for abi in ROWS if has(abi))


def _each(column: Callable[[Abi], object]) -> str:
    """Return the values of a column and the ABIs that have them: "4 in kho-v2 and 5 in kho-v3 and kho-v4"."""
    values = dict.fromkeys(value for abi in ROWS if (value := column(abi)) is not None)
    return listed(f"{value} in {listed(abi.compatible for abi in ROWS if column(abi) == value)}" for value in values)


def _edits() -> str:
    """Return the kernels that edit the root FDT of a chunk list: "Linux 6.19 and 7.0"."""
    edits = [kernel for kernel in KERNELS.values() if kernel.map == "chunk list" and kernel.edits_root]
    return spanned(edits)


def _bitmaps() -> str:
    """Return the bitmap sizes and the kernels that use them: "512 bytes in Linux 6.16 and 6.17, a page in ..."."""
    sizes = (bitmap for abi in ROWS for bitmap in abi.bitmaps)
    return ", ".join(f"{'a page' if nbytes is None else f'{nbytes} bytes'} in {kernels}" for nbytes, kernels in sizes)


def _remedy(fix: str) -> str:
    """Return what helps against a fault of a release, as a sentence without its end."""
    text = FIXES[fix].remedy
    return text[:1].upper() + text[1:]


RULES: dict[str, Rule] = {
    "KHO001": Rule(
        "error",
        "root FDT unreadable",
        "The root FDT is not a valid devicetree, has no preserved-memory-map property, or the property is 0 where the "
        "map is always in force.",
        "The next kernel validates the root FDT first. On an error it prints a warning and boots cold: all preserved "
        "memory is lost.",
        "Check the FDT's address and that the image is complete. "
        f"In {_which(lambda abi: not abi.live)} a map of 0 is another finding: KHO047.",
        f"{CORE}, kho_populate",
    ),
    "KHO002": Rule(
        "error",
        "unknown ABI",
        f"The compatible string of the root FDT is not one of {_which(lambda abi: abi.decoded)}, and its properties "
        "are not those of any of them.",
        "A kernel accepts only its own compatible string; with any other it boots cold. The rest of the handover was "
        "not checked.",
        "Boot a kernel that writes the same compatible, or look for a newer version of this program.",
        f"{ABI_H}, KHO_FDT_COMPATIBLE",
    ),
    "KHO003": Rule(
        "warning",
        "FDT cut short",
        "The FDT is shorter than the totalsize in its header. Linux 6.19 and later show out/fdt in debugfs with the "
        "size it had at boot, so the string block with the property names is missing after a subtree was added.",
        "The kernel's own copy is complete; only this copy is truncated.",
        "To get the complete FDT, read it from memory: in/fdt after the kexec, /proc/vmcore, or an image.",
        "kernel/liveupdate/kexec_handover_debugfs.c",
    ),
    "KHO004": Rule(
        "error",
        "map unreadable",
        "The preserved-memory map is malformed: a node outside memory, an order, count or entry out of range, or no "
        "page size and bitmap size under which it is consistent.",
        "The next kernel walks the map without checks early at boot: it reserves the wrong pages, or faults.",
        f"Check that the image is complete; {GUESS}.",
        f"{CORE}, kho_mem_retrieve; {ABI_H}",
    ),
    "KHO005": Rule(
        "error",
        "map cycle or shared node",
        "A node of the map is reached twice: a chunk list returns to an earlier chunk, or two entries of a radix tree "
        "point to the same page.",
        "The next kernel walks a chunk list to its end, so a cycle hangs it at boot. A shared node preserves the same "
        "bits at two addresses.",
        "Either the map was overwritten or its writer has a bug. Do not kexec with it.",
        f"{CORE}, kho_mem_deserialize, kho_radix_walk_tree",
    ),
    "KHO006": Rule(
        "error",
        "tree of the wrong depth",
        "With the number of levels that belongs to its compatible, the tree does not contain the page of the root FDT; "
        f"with another number it does. Levels at 16 KiB pages: {_each(lambda abi: abi.levels.get(16384))}.",
        "The next kernel reads tables as bitmaps, or bitmaps as tables, and preserves the wrong pages.",
        "Write the tree with the depth of its compatible (`kho convert --abi`), or boot a kernel that uses this depth. "
        f"Linux {FIXES['tree-depth'].where()} wrote one level less at 16 KiB, under the compatible of 7.1.",
        f"{ABI_H}, KHO_TREE_MAX_DEPTH",
    ),
    "KHO007": Rule(
        "error",
        "map node misaligned",
        "The address of a map node is not page-aligned (for a bitmap of 512 bytes: not a multiple of 8).",
        "Every node is allocated as a page. A misaligned pointer is corrupt, and a reader that follows it reads "
        "unrelated memory.",
        f"Check the code that wrote the pointer; {GUESS}.",
        ABI_H,
    ),
    "KHO008": Rule(
        "warning",
        "page size or bitmap size ambiguous",
        f"The map is equally consistent under another page size or, in {_which(lambda abi: abi.bitmaps)}, another "
        f"bitmap size ({_bitmaps()}). The compatible string does not determine the bitmap size.",
        "With the wrong size, folios appear at wrong addresses, or those after bit 4095 are missing.",
        "Give the sizes of the kernel that wrote it: --bitmap-bytes 512 or --bitmap-bytes 4096, --page-size.",
        "abi.md section 1; kernel/kexec_handover.c, PRESERVE_BITS",
    ),
    "KHO009": Rule(
        "note",
        "empty bitmaps",
        "Bitmaps or leaves have no bit set. Unpreserving clears bits but does not free the bitmap.",
        "Harmless: each costs a page (or 512 bytes) and one step of the walk.",
        "Nothing.",
        f"{CORE}, __kho_unpreserve_order",
    ),
    "KHO010": Rule(
        "error",
        "map in scratch",
        "A chunk, bitmap or node of the map lies in a scratch area.",
        "The next kernel allocates from scratch at boot: it may overwrite the map before it has read it.",
        "Allocate metadata outside scratch. If the scratch areas were guessed, give them with --scratch. With KFENCE, "
        f"Linux {FIXES['metadata-allocator'].where()} does it by itself: {FIXES['metadata-allocator'].remedy}.",
        f"{CORE}, kho_alloc_preserve, kho_scratch_overlap",
    ),
    "KHO011": Rule(
        "error",
        "map preserved as data",
        "A node of the map lies in a folio that the map preserves.",
        "Map pages are not preserved: the next kernel reads them and then frees them. If a page is both map and data, "
        "one of the two has overwritten the other.",
        f"Find the code that wrote to memory it did not own; {GUESS}.",
        f"{CORE}, kho_mem_serialize",
    ),
    "KHO012": Rule(
        "error",
        "folios overlap",
        "A page is in two preserved folios, of different orders.",
        "The next kernel reserves the page twice; restoring and freeing both folios frees it twice.",
        f"Find the owner of the smaller folio with `kho owners`: a preserved page has one owner. Otherwise, {GUESS}.",
        f"{CORE}, kho_preserve_folio, kho_restore_folio",
    ),
    "KHO013": Rule(
        "error",
        "misaligned for its order",
        "The address of a folio, of the start of a bitmap, or of a block of a vmalloc area is not a multiple of its "
        "size.",
        "A folio of order N begins at a multiple of 2^N pages; the entry names a folio that cannot exist.",
        f"Check the code that wrote the entry; {GUESS}.",
        "abi.md section 3: phys_start = index * BITS << (order + PAGE_SHIFT)",
    ),
    "KHO014": Rule(
        "error",
        "preserved memory outside RAM",
        "The map preserves pages outside the memory that was given.",
        "The next kernel cannot reserve or restore them. If the image covers only a part of memory, the handover may "
        "be correct.",
        f"Give all parts of the memory; compare with /proc/iomem of the machine; {GUESS}.",
        f"{CORE}, kho_restore_page: pfn_to_online_page",
    ),
    "KHO015": Rule(
        "error",
        "folio in scratch",
        "Preserved memory overlaps a scratch area.",
        "The next kernel allocates from scratch at boot: it overwrites the content of the folio.",
        "Allocate preserved memory outside scratch; kernels with CONFIG_KEXEC_HANDOVER_DEBUG refuse "
        "it with EINVAL, others take it.",
        f"{CORE}, kho_scratch_overlap",
    ),
    "KHO016": Rule(
        "warning",
        "folio spans NUMA nodes",
        "A folio contains memory of two NUMA nodes.",
        "A restored folio that spans two nodes is accounted to the first. The kernels that write "
        f"{_which(lambda abi: abi.cuts_at_nodes)} split ranges at the node boundary; earlier kernels do not.",
        "Preserve the memory of each node as a separate range.",
        f"{CORE}, kho_preserve_pages (7.3)",
    ),
    "KHO017": Rule(
        "warning",
        "scratch misaligned",
        "A scratch area does not begin and end at a multiple of the pageblock size: by default 2 MiB with 4 KiB "
        "pages, 32 MiB with 16 KiB, 512 MiB with 64 KiB.",
        "The next kernel turns whole pageblocks into CMA: memory next to the area becomes CMA too, preserved or not.",
        "Round addresses and sizes as the kernel does. A kernel with a smaller pageblock size accepts smaller "
        "multiples.",
        f"{CORE}, kho_reserve_scratch: CMA_MIN_ALIGNMENT_BYTES",
    ),
    "KHO018": Rule(
        "note",
        "scratch areas not known",
        "The scratch array was not found in this memory, so overlap with scratch was not checked.",
        "Preserved memory in scratch is always overwritten by the next kernel.",
        "Give the areas with --scratch (debugfs out/scratch_phys and out/scratch_len, or the array's address from "
        "boot_params or /chosen).",
        "abi.md section 2",
    ),
    "KHO019": Rule(
        "error",
        "subtree malformed",
        "A subtree node has no property of 8 bytes with the address of its blob, or has the same name as another node.",
        "When the producer retrieves the subtree, the next kernel returns EINVAL, or the first of two equal names: the "
        "subtree is lost.",
        f"Write subtrees with kho_add_subtree; the property is {_each(lambda abi: f'`{abi.subtree_property}`')}.",
        f"{CORE}, kho_retrieve_subtree",
    ),
    "KHO020": Rule(
        "error",
        "blob-size missing or too small",
        f"In {_which(lambda abi: abi.size_property)} each subtree node has the size of its blob in bytes. It is "
        "missing, or smaller than the structure at the blob's address.",
        "If it is missing the next kernel returns EINVAL; if it is too small, the producer reads a truncated blob or "
        "refuses it.",
        "Pass the actual size of the blob to kho_add_subtree.",
        f"{ABI_H}, KHO_SUB_TREE_SIZE_PROP_NAME",
    ),
    "KHO021": Rule(
        "error",
        "metadata not preserved",
        "Pages that lead to preserved data are not preserved themselves: the root FDT, a subtree's blob, a LUO block, "
        "a memfd's header, a list's chunk.",
        "The next kernel may allocate and overwrite the page before its producer has read it.",
        "Allocate such structures with kho_alloc_preserve. If the page is the root FDT's, the map may have been read "
        "with the wrong layout.",
        f"{CORE}, kho_alloc_preserve",
    ),
    "KHO022": Rule(
        "error",
        "referenced but not preserved",
        "A file, vmalloc area, reserve_mem region or kho_test refers to pages that are not preserved, or not preserved "
        "as a folio of that order.",
        "The next kernel allocates the pages to another user, or refuses to restore them: their content is lost.",
        "Preserve the folio with its order (kho_preserve_folio) before its address is recorded.",
        f"{CORE}, kho_restore_folio; {MEMFD}",
    ),
    "KHO023": Rule(
        "error",
        "payload malformed",
        "The decoder for a payload's compatible refused it: a wrong magic or version, a count or list out of range, or "
        "an address outside memory.",
        "Its producer in the next kernel refuses it too, or follows its pointers into unrelated memory.",
        "Compare the raw bytes with the format; look for overwritten memory (KHO021, KHO033).",
        "abi.md section 6",
    ),
    "KHO024": Rule(
        "error",
        "checksum mismatch",
        "The checksum that kho_test recorded for its folios differs from the checksum of their present content.",
        "kho_test is the kernel's own test of the mechanism: the handover did not keep its content, so other content "
        "may be corrupt too.",
        "Find the folio that differs; look for overlaps (KHO012, KHO015, KHO033).",
        "lib/test_kho.c",
    ),
    "KHO025": Rule(
        "note",
        "unknown compatible",
        "No decoder is registered for this payload's compatible. It is shown raw, and the pages it refers to are not "
        "checked.",
        "The pages it refers to are listed as unknown.",
        "Install a package with a decoder (entry point group kho.decoders), or register one.",
        "kho.formats.decoder",
    ),
    "KHO026": Rule(
        "error",
        "vmalloc total_pages mismatch",
        "The number of pages in the list of a vmalloc area differs from its total_pages.",
        "The next kernel adds up the pages of the list and refuses the area (EINVAL) if the sum is not total_pages.",
        "Write the list and total_pages from the same area; look for a truncated or overwritten chunk.",
        f"{CORE}, kho_restore_vmalloc",
    ),
    "KHO027": Rule(
        "error",
        "memfd index duplicated",
        "Two folios of a memfd have the same index, or their index ranges overlap.",
        "The second cannot be added to the page cache (EEXIST), so the file is not restored.",
        "Set the index of each folio to the file offset of its first page, in pages; a folio of order N covers 2^N "
        "indexes.",
        f"{MEMFD}, memfd_luo_retrieve_folios",
    ),
    "KHO028": Rule(
        "error",
        "memfd index beyond size",
        "A folio of a memfd begins beyond the end of the file.",
        "The size or the index is wrong: the content of the folio cannot be read through the file.",
        "Record only folios below the size (the kernel pins them with memfd_pin_folios up to size - 1).",
        f"{MEMFD}, memfd_luo_preserve_folios",
    ),
    "KHO029": Rule(
        "error",
        "memfd folio count wrong",
        "nr_folios differs from the number of folios in the list.",
        "If nr_folios is too large, the next kernel reads past the list; if too small, the remaining folios are never "
        "restored and leak.",
        "Set nr_folios to the length of the list.",
        f"{MEMFD}, struct memfd_luo_ser",
    ),
    "KHO030": Rule(
        "error",
        "duplicate session name",
        "Two sessions have the same name.",
        "Sessions are retrieved by name. The second cannot be inserted (EEXIST) and can never be retrieved.",
        "Give each session a unique name (CREATE_SESSION refuses a duplicate).",
        f"{LUO}luo_session.c",
    ),
    "KHO031": Rule(
        "error",
        "duplicate token",
        "Two files of a session have the same token.",
        "Files are retrieved by token; the second cannot be retrieved.",
        "Give each file of a session a unique token (PRESERVE_FD refuses a duplicate).",
        f"{LUO}luo_file.c",
    ),
    "KHO032": Rule(
        "error",
        "session's file count wrong",
        "The file count of a session differs from the number of entries in its list.",
        "The next kernel uses one of the two numbers: it loses files, or reads entries that do not exist.",
        "Set the count to the length of the list.",
        f"{LUO}luo_session.c",
    ),
    "KHO033": Rule(
        "error",
        "memory with two owners",
        "Two payloads, or two parts of one payload, refer to the same bytes.",
        "One of them has overwritten the other, or both will free the page.",
        "`kho owners` shows both; one of the two references is wrong.",
        "kho.handover.owners",
    ),
    "KHO034": Rule(
        "note",
        "preserved without a known owner",
        "Pages are preserved, but no payload that kho can decode refers to them.",
        "Pages that are never restored stay reserved until the next boot: a leak. They may also belong to a payload "
        "without a decoder (KHO025).",
        "List them with `kho owners`, and look for a preserve call without a matching reference.",
        "abi.md section 5",
    ),
    "KHO035": Rule(
        "error",
        "a poisoned page inside a preserved folio",
        "The list of pages with memory errors (subtree `hwpoison`, a public draft) names a page of a preserved folio.",
        "The content of the page is lost. The next kernel restores the folio as if it were intact; a read of the page "
        "raises a machine check, which kills the reader.",
        "Find the owner of the folio with `kho owners`, and do not restore it: its owner must rebuild the content.",
        "abi.md section 9; mm/memory-failure.c",
    ),
    "KHO036": Rule(
        "error",
        "no kernel of this map takes the LUO data",
        f"LUO's version is {_each(lambda abi: abi.luo)}. The subtree has another one, or lacks the node luo-flb that "
        "every kernel which reads this map needs, even if it is empty.",
        "The next kernel accepts the root FDT, then panics in luo_early_startup. With an incompatible root FDT it "
        "would have booted cold.",
        "Write it for the kernel that takes over: `kho convert --kernel RELEASE` converts LUO with the map.",
        "kernel/liveupdate/luo_core.c, luo_early_startup; luo_flb.c, luo_flb_setup_incoming",
    ),
    "KHO037": Rule(
        "note",
        "LUO data that panics another kernel of this map",
        "Of the kernels that read this map, some take the LUO data and some panic on it. Linux 6.19 writes no node "
        "luo-flb, which Linux 7.0 needs even if it is empty.",
        "A kexec from Linux 6.19 with liveupdate=on to Linux 7.0 ends in a panic, even if there are no sessions.",
        "Name the next kernel with --kernel. `kho convert --kernel 7.0` adds the node; a running 6.19 has to be booted "
        "without liveupdate=on, or the 7.0 kernel with kho=off.",
        "kernel/liveupdate/luo_flb.c, luo_flb_setup_incoming; docs/compat.md",
    ),
    "KHO038": Rule(
        "error",
        "file that no kernel of this map restores",
        "The compatible of a file is a version without a handler in the kernels that read this map. Memfds are "
        f"{_each(lambda abi: abi.memfd)}.",
        "One such file makes every session unusable from Linux 7.0 on: /dev/liveupdate gives EIO. Linux 6.19 before "
        "6.19.13 leaves the file out.",
        "Write it for the kernel that takes over: `kho convert --kernel RELEASE` converts memfds with the map.",
        "kernel/liveupdate/luo_file.c, luo_file_deserialize",
    ),
    "KHO039": Rule(
        "error",
        "the kernel that was named does not take it",
        "The kernel that --kernel names panics on the handover, boots cold, or loses an object of it.",
        "What is lost stays reserved until the next cold boot, and its contents cannot be restored.",
        "`kho convert --kernel RELEASE` writes what that kernel takes; `kho compat` judges each object.",
        "docs/compat.md",
    ),
    "KHO040": Rule(
        "note",
        "memory left out of the dump",
        "The filter that wrote the dump left pages out: makedumpfile's level, which the header of a kdump file names, "
        "or a range that was not asked for.",
        "Nothing is wrong with the handover. What was left out was not checked, and its contents cannot be extracted.",
        "A dump of makedumpfile -d 17 (or -d 1) keeps the contents of memfds; or run kho in the kdump kernel on "
        "/proc/vmcore, before makedumpfile.",
        "makedumpfile(8), -d; struct kdump_sub_header; the two bitmaps of a kdump file",
    ),
    "KHO041": Rule(
        "warning",
        "dump cut off",
        "The file ends before what its headers promise: the disk was full, or a copy was interrupted.",
        "What is missing was not checked, and its contents cannot be extracted. It is no fault of the handover.",
        "Copy the whole file again, or take the dump again with more room.",
        "the program headers of an ELF core, the descriptors of a kdump file, the ranges of LiME",
    ),
    "KHO042": Rule(
        "note",
        "second pages dropped by makedumpfile",
        "Folios lack their second page and no other one.",
        "makedumpfile up to 1.7.9 takes the second page of every compound page of Linux 7.1 and later for one of user "
        "space, at level 8 and above. Folios of order 1 and more that the kernel allocated have a hole.",
        "Take the dump with a later makedumpfile, or with -d 17.",
        "makedumpfile, commit f50c015; include/linux/mm_types.h, compound_info",
    ),
    "KHO043": Rule(
        "note",
        "memfd in no session",
        "A memfd is preserved, or was preserved for the kernel that runs, and no session lists it.",
        "Before the jump that is every memfd: LUO's lists are written then. After a live update, it was not retrieved, "
        "or the pages of its structure and its list were freed since and are not overwritten.",
        "`kho extract --memfd PHYS` writes its contents. Its session and token are known if the dump's kernel has "
        "CONFIG_KALLSYMS_ALL and BTF (docs/vmcore.md).",
        f"{LUO}luo_session.c",
    ),
    "KHO044": Rule(
        "note",
        "format of a draft",
        "The compatible string of the root FDT, of LUO or of a memfd, or the feature header in its place, is that of a "
        "public draft (abi.md section 9).",
        "No release of Linux writes or reads it, and a draft may change: released kernels boot cold, or lose the "
        "payload.",
        "Boot the development kernel that wrote it.",
        "abi.md section 9",
    ),
    "KHO045": Rule(
        "warning",
        "descriptor store of systemd inconsistent",
        "The map in token 0 of the session `systemd` is not as systemd writes it, or does not agree with the files and "
        "sessions of the handover.",
        "systemd gives a descriptor to its unit by this map. A descriptor without an entry, or an entry without a "
        "file, is lost.",
        "Compare `kho inspect` with the log of systemd-shutdown: it names each descriptor that could not be preserved.",
        "abi.md section 6; systemd 262.1",
    ),
    "KHO046": Rule(
        "warning",
        "unknown version",
        "The compatible string of the root FDT or of a payload is a version, or has a part after `;`, that kho does "
        "not know. It is read as the known version that fits best, as far as that goes.",
        "What is shown of it is not verified. A kernel accepts only its own compatible strings; with any other it "
        "boots cold, or loses the payload.",
        "Boot a kernel that writes the same compatible, or look for a newer version of this program.",
        "abi.md section 9",
    ),
    "KHO047": Rule(
        "warning",
        "handover not finalized",
        f"The root FDT of {_which(lambda abi: not abi.live)} is valid, and its preserved-memory-map is 0: "
        f"{UNFINALIZED}. {_edits()} write this root at boot, and the map only when they finalize.",
        "The next kernel prints 'disabling KHO revival' and boots cold: what was preserved is lost. On a machine that "
        "does not kexec, this is the normal state.",
        "Boot with liveupdate=on, so that the kernel finalizes before the kexec, or write 1 to debugfs out/finalize. "
        "The subtrees can still be read from this memory.",
        f"{CORE}, kho_populate, kho_finalize",
    ),
    "KHO048": Rule(
        "note",
        "subtree that was not added",
        f"A node of the root FDT of {_which(lambda abi: not abi.live)} has no property at all. {_edits()} leave it in "
        f"a root of nearly one page, where the node fits and its property does not ({FIXES['subnode-left'].where()}).",
        "kho_add_subtree failed for this producer: its data is not handed over. The rest of the handover is intact.",
        "Take the node as absent. Add fewer subtrees, or use Linux 7.0.9.",
        f"{CORE}, kho_add_subtree; upstream {FIXES['subnode-left'].upstream}",
    ),
    "KHO049": Rule(
        "warning",
        "memfd may lack what was written late",
        f"Linux 6.19 {FIXES['memfd-dirty'].where()} records a folio of a memfd as it was at PRESERVE_FD. Folios that "
        "are not dirty, or not up to date, prove such a release; else it is that of the machine, or of the dump.",
        "What is written to such a folio afterwards can be lost: a folio recorded as clean may be reclaimed before the "
        "kexec, one that is not up to date is zeroed by the next kernel.",
        f"{_remedy('memfd-dirty')}. Compare what was restored with what was written.",
        f"{MEMFD}, memfd_luo_preserve_folios; upstream {FIXES['memfd-dirty'].upstream}",
    ),
    "KHO050": Rule(
        "error",
        "scratch size that its kernel did not round",
        "The scratch area for low memory, or the global one, is no multiple of a pageblock (2 MiB by default at 4 KiB "
        f"pages), and the kernel that reserved it does not round these sizes: {FIXES['scratch-rounding'].where()}.",
        "That kernel gives whole pageblocks to its page allocator, so that pages after the area, which may be in use, "
        "are allocated again: it corrupts its memory, and with it what it hands over.",
        f"{_remedy('scratch-rounding')}. Do not trust contents of this machine.",
        f"{CORE}, kho_init; upstream {FIXES['scratch-rounding'].upstream}; docs/compat.md",
    ),
    "KHO051": Rule(
        "error",
        "bitmaps of another size than the named kernel reads",
        f"Kernels of one compatible read bitmaps of different sizes: {_bitmaps()}. The kernel that --kernel names "
        "reads the other size.",
        "If it reads more than was written, it takes memory in use for free and dies before its first message: a "
        "finalized handover of Linux 6.17 kills 6.19. If it reads less, it loses what the rest of each bitmap marks: "
        "6.17.8 booted with a handover of 6.18.15, without a part of it. Nothing refuses either, as the compatible is "
        "the same.",
        "Boot cold, or kexec before anything is finalized. `kho convert --kernel RELEASE` writes the other size.",
        "kernel/kexec_handover.c, PRESERVE_BITS; docs/compat.md",
    ),
    "KHO052": Rule(
        "warning",
        "memfd that the named kernel restores in part",
        "A folio of a memfd, not its first, cannot be restored, and the kernel that --kernel names does not report it "
        f"({FIXES['retrieve-partial'].where()}).",
        "RETRIEVE_FD succeeds, and part of the file is missing; only the kernel log tells: 'Unable to restore folio "
        "at physical address'.",
        f"{_remedy('retrieve-partial')}.",
        f"{MEMFD}, memfd_luo_retrieve_folios; upstream {FIXES['retrieve-partial'].upstream}",
    ),
    "KHO056": Rule(
        "note",
        "preserved before the jump, in no list yet",
        "Pages are preserved that nothing refers to, and LUO's lists are empty, as in every dump of a machine before "
        "its kexec: the kernel writes them at the jump.",
        "They may be of any session: lists of files, devices, page tables of an iommufd. A leak cannot be told from "
        "them until the jump.",
        "List them with `kho owners`. Memfds of sessions are found by their content (KHO043).",
        f"{LUO}luo_session.c, luo_session_serialize; abi.md section 6",
    ),
    "KHO057": Rule(
        "note",
        "memfd found by its content and not read",
        "A page holds the structure of a memfd, with a list that fits it, and cannot be decoded: for one, another "
        "memfd that was found has the same list.",
        "Its contents are not extracted. A copy of a structure that was freed looks like this.",
        "Read the memory at that address (`kho owners` names what is preserved there).",
        "kho.handover.owners, unlisted",
    ),
    "KHO058": Rule(
        "note",
        "map not in the dump",
        "A page of the preserved-memory map was left out of the dump, or cut off. In a machine that was booted by a "
        "handover the map of that one was given back; of a map that is in use, makedumpfile up to 1.7.9 leaves out "
        "pages at level 8 and above, with Linux 7.1 and later.",
        "Which memory is preserved is not known, and whether it has an owner was not checked. The root FDT, subtrees, "
        "LUO's sessions and memfds are read all the same; sizes of a memfd's folios follow from its list.",
        "Take the dump with `makedumpfile -d 17`, or a later makedumpfile; of a file that is cut off, copy the whole.",
        "docs/vmcore.md; abi.md sections 3 and 4",
    ),
}

UNKNOWN = Rule(
    "warning",
    "rule of another package",
    "A decoder from another package reported this, under an id without a registered rule.",
    "Not documented.",
    "Read the documentation of that package.",
    "no such id in kho.handover.rules.RULES",
)


@dataclass(frozen=True)
class Finding:
    """A place where a rule is violated."""

    id: str
    place: str
    """The object and its address: `folio of order 9 at 0xc000000`."""
    value: str
    """The value found there."""
    phys: int | None = None
    """Physical address of the object, or None."""

    @property
    def rule(self) -> Rule:
        """The rule with this id; a generic one for ids that are not in `RULES`."""
        return RULES.get(self.id, UNKNOWN)

    @property
    def severity(self) -> Severity:
        """Severity of the rule: error, warning or note."""
        return self.rule.severity

    @property
    def title(self) -> str:
        """Short title of the rule."""
        return self.rule.title

    @property
    def explanation(self) -> str:
        """Meaning, consequence, remedy and source of the rule, as paragraphs."""
        return self.rule.explanation

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as a dict for JSON."""
        return {
            "id": self.id,
            "severity": self.severity,
            "title": self.title,
            "place": self.place,
            "value": self.value,
            "phys": self.phys,
        }


def note_omitted(found: list[Finding], count: int) -> Iterator[Finding]:
    """Yield findings of one kind; the last one says how many more there are, `count` in all."""
    if found and count > len(found):
        last = found.pop()
        more = f"{last.value} (and {count - len(found) - 1} more places)"
        found.append(Finding(last.id, last.place, more, last.phys))
    yield from found


def markdown() -> str:
    """Return the text of `docs/findings.md`."""
    lines = [
        "# Findings",
        "",
        "The findings that `kho verify` reports. Ids are stable; `kho verify --explain KHO015` prints one entry.",
        "This page is generated by `kho verify --list --markdown`.",
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
