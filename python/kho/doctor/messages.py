"""What the kernel's messages about KHO mean: every wording of Linux 6.16 to 7.3, with its releases.

`kho doctor --explain "KHO: Failed to reserve lowmem scratch buffer"` prints an entry; `make docs` writes the page
docs/messages.md. The wordings are those of the kernel sources.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Meaning(NamedTuple):
    """A message: its wording with `%` where a value stands, the releases that print it, and what it means."""

    wording: str
    releases: str
    meaning: str
    rule: str = ""
    """The rule of `kho doctor` that it leads to."""
    bad: bool = False
    """True if it reports a fault that no other rule covers (DOC040)."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """Return the pattern that the message matches."""
        parts = (re.escape(part) for part in self.wording.split("%"))
        return re.compile(r".{0,200}?".join(parts))


MESSAGES = (
    Meaning(
        "KHO: found kexec handover data. Will skip init for some devices",
        "6.16 to 6.18",
        "kexec started this kernel with a handover, and it is taken over. No device is skipped: the words are a "
        "leftover.",
        "DOC017",
    ),
    Meaning(
        "KHO: found kexec handover data.",
        "6.19 and later",
        "kexec started this kernel with a handover, and it is taken over.",
        "DOC017",
    ),
    Meaning(
        "KHO: disabling KHO revival: %",
        "6.16 to 6.19",
        "the handover is refused and this kernel boots cold: everything that was preserved is lost. A line before it "
        "has the reason; -2 alone means that the previous kernel never finalized (its map is 0), so that nothing was "
        "handed over. In a crash kernel it is no symptom.",
        "DOC018",
    ),
    Meaning(
        "KHO: disabling KHO revival",
        "7.0 and later",
        "the handover is refused and this kernel boots cold: everything that was preserved is lost. Alone, without a "
        "reason, the previous kernel (6.19, 7.0) never finalized. In a crash kernel it is no symptom.",
        "DOC018",
    ),
    Meaning(
        "KHO: setup: failed to memremap FDT (%)",
        "6.16 and later",
        "the FDT's address cannot be mapped: the handover is refused and this kernel boots cold: everything that was "
        "preserved is lost.",
        "DOC018",
    ),
    Meaning(
        "KHO: setup: failed to memremap scratch (%",
        "6.16 and later",
        "the array of scratch areas cannot be mapped: the handover is refused and this kernel boots cold: everything "
        "that was preserved is lost.",
        "DOC018",
    ),
    Meaning(
        "KHO: setup: handover FDT (%) is invalid: %",
        "6.16 and later",
        "the FDT is not one. -9 on 6.16 and 6.17.0 to 6.17.3: the previous kernel passed an empty page because "
        "nothing was finalized, which is harmless. Otherwise: the handover is refused and this kernel boots cold: "
        "everything that was preserved is lost.",
        "DOC037",
    ),
    Meaning(
        "KHO: setup: handover FDT (%) is incompatible with '%'",
        "6.16 and later",
        "the previous kernel writes another version of the format: the handover is refused and this kernel boots "
        "cold: everything that was preserved is lost. kho compat shows which kernels go together.",
        "DOC018",
    ),
    Meaning(
        "KHO: failed to mark the scratch region %",
        "6.16 and later",
        "memblock has no room for the scratch areas: the handover is refused and this kernel boots cold: everything "
        "that was preserved is lost.",
        "DOC018",
    ),
    Meaning(
        "KHO: failed to get preserved memory bitmaps",
        "6.16 to 7.0",
        "the map of the handover is missing after it was accepted: preserved memory is not found again.",
        bad=True,
    ),
    Meaning(
        "KHO: failed to get preserved memory map",
        "7.1 and later",
        "the map of the handover is missing after it was accepted: preserved memory is not found again.",
        bad=True,
    ),
    Meaning(
        "KHO: failed to get preserved KHO memory tree",
        "7.1, 7.2",
        "the tree of preserved memory is missing after the handover was accepted.",
        bad=True,
    ),
    Meaning(
        "KHO: failed to restore folio for KHO fdt",
        "6.16 to 6.18",
        "the page of the FDT was not preserved by the previous kernel.",
        bad=True,
    ),
    Meaning(
        "KHO: scratch scale is %%",
        "6.16 and later",
        "kho_scratch= is a percentage of the memory reserved at boot.",
    ),
    Meaning(
        "KHO: scratch areas: lowmem: %MiB global: %MiB pernode: %MiB",
        "6.16 and later",
        "the sizes of kho_scratch= as parsed, in whole MiB and before rounding. After a handover the inherited areas "
        "are in effect instead.",
    ),
    Meaning(
        "KHO: Failed to reserve scratch array",
        "7.0 and later",
        "the list of scratch areas could not be allocated: KHO is off for this boot. The machine works otherwise.",
        "DOC003",
    ),
    Meaning(
        "KHO: Failed to reserve lowmem scratch buffer",
        "7.0 and later",
        "no contiguous free memory below 4 GiB is as large as the low area (by default 200 % of what the kernel "
        "reserved below 4 GiB, crash kernel included): KHO is off for this boot. It is no hardware fault and no lack "
        "of RAM, and unrelated to graphics or firmware. With kho=off, or smaller areas in "
        "kho_scratch=LOW,GLOBAL,PERNODE, it is gone.",
        "DOC003",
    ),
    Meaning(
        "KHO: Failed to reserve global scratch buffer",
        "7.0 and later",
        "no contiguous free memory is as large as the global area: KHO is off for this boot.",
        "DOC003",
    ),
    Meaning(
        "KHO: Failed to reserve nid % scratch buffer",
        "7.0 and later",
        "a NUMA node has no contiguous free memory of that size: KHO is off for this boot. In a crash kernel it is "
        "harmless.",
        "DOC003",
    ),
    Meaning(
        "KHO: Failed to reserve scratch area, disabling kexec handover",
        "6.16 and later",
        "a scratch area could not be reserved, and KHO is off for this boot. 6.16 to 6.19 print only this line. A "
        "NUMA node without memory causes it to 6.19.5.",
        "DOC003",
    ),
    Meaning(
        "KHO: Failed to convert KHO state tree: %",
        "6.16 to 6.18",
        "the finalize step failed: nothing will be handed over.",
        bad=True,
    ),
    Meaning(
        "KHO: Failed to abort KHO finalization: %",
        "6.16 to 6.18",
        "the abort of a finalize step failed.",
        bad=True,
    ),
    Meaning(
        "KHO: Failed to extend scratch: %",
        "7.3",
        "memory without preserved pages could not be used early in boot: it comes later.",
        bad=True,
    ),
    Meaning(
        "KHO: disabled in the kdump kernel",
        "7.3 and later",
        "this kernel saves a crash dump and hands nothing over; it is not a failed reservation.",
        "DOC015",
    ),
    Meaning(
        "KHO: exec from: % (count %)",
        "7.1 and later",
        "the release of the previous kernel and the number of kexecs since the cold boot.",
        "DOC017",
    ),
    Meaning(
        "KHO: kexec-metadata blob too small %",
        "7.1 and later",
        "the previous kernel's release is not readable; nothing else is lost.",
        bad=True,
    ),
    Meaning(
        "KHO: kexec-metadata version % not supported%",
        "7.1 and later",
        "the previous kernel's release is in a newer form; nothing else is lost.",
        bad=True,
    ),
    Meaning(
        "KHO: failed to initialize kexec-metadata subtree%",
        "7.1 and later",
        "the next kernel will not know the release of this one.",
        bad=True,
    ),
    Meaning(
        "KHO: broken KHO subnode '%': missing or invalid blob-size property",
        "7.1 and later",
        "a subtree without its size is not taken over: its payload is lost.",
        bad=True,
    ),
    Meaning(
        "KHO: failed exposing handover FDT in debugfs: %",
        "6.16 and later",
        "debugfs does not show the handover, which is not affected.",
    ),
    Meaning(
        "KHO: node % prop % has invalid length: %",
        "6.16 and later",
        "debugfs does not show a subtree.",
    ),
    Meaning(
        "KHO: failed to add fdt % to debugfs: %",
        "6.16 to 7.0",
        "debugfs does not show a subtree.",
    ),
    Meaning(
        "KHO: failed to add blob % to debugfs: %",
        "7.1 and later",
        "debugfs does not show a subtree.",
    ),
    Meaning(
        "KHO: node % missing or invalid % property",
        "7.1 and later",
        "debugfs does not show a subtree, whose node lacks the address of its data.",
    ),
    Meaning(
        "luo: Disabling liveupdate because KHO is disabled",
        "6.19 and later",
        "liveupdate=on needs KHO, which is off or has disabled itself: there is no /dev/liveupdate.",
        "DOC021",
    ),
    Meaning(
        "luo: Retrieved live update data, liveupdate number: %",
        "6.19 and later",
        "the sessions of the previous kernel were found.",
        "DOC022",
    ),
    Meaning(
        "luo: failed to retrieve FDT 'LUO' from KHO%",
        "6.19 to 7.1",
        "the handover has a broken LUO subtree: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: FDT 'LUO' is incompatible with 'luo-v1'%",
        "6.19 to 7.1",
        "the previous kernel writes another LUO format: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: Unable to get live update number%",
        "6.19 to 7.1",
        "the LUO subtree is incomplete: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: Unable to get FLB node [luo-flb]",
        "7.0, 7.1",
        "the previous kernel is a 6.19 with liveupdate=on, whose LUO data has no such node: a panic follows. Boot "
        "this kernel with kho=off: memfds are lost, reserve_mem is kept.",
        "DOC039",
    ),
    Meaning(
        "luo: FLB node is incompatible with 'luo-flb-v1'%",
        "7.0, 7.1",
        "the previous kernel writes other FLB data: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: Unable to get FLB header property '%'",
        "7.0, 7.1",
        "the FLB node is incomplete: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: failed to retrieve LUO state%",
        "7.2 and later",
        "the handover has a broken LUO subtree: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: LUO state is too small%",
        "7.2 and later",
        "the LUO subtree is truncated: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: LUO state is incompatible with 'luo-v5'%",
        "7.2 and later",
        "the previous kernel writes another LUO format: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "Kernel panic - not syncing: The incoming tree failed to initialize properly [%], disabling live update",
        "6.19 and later",
        "the LUO data of the previous kernel cannot be used, and the kernel gives up. kho=off on this kernel's line "
        "avoids it; liveupdate=off does not.",
        "DOC039",
    ),
    Meaning(
        "luo: kho_finalize failed %",
        "6.19, 7.0",
        "the kexec was refused: the handover could not be written.",
        bad=True,
    ),
    Meaning(
        "luo: No registered handler for compatible '%'",
        "6.19 and later",
        "no driver of this kernel takes a file of that kind: the session's files are lost, and /dev/liveupdate gives "
        "EIO from 7.0 on.",
        bad=True,
    ),
    Meaning(
        "luo: Failed to deserialize files for session [%] %",
        "7.0 and later",
        "a session's files could not be read: EIO on /dev/liveupdate. 6.19.0 to 6.19.12 print nothing: the device "
        "opens, and files are missing; 6.19.13 has the message.",
        bad=True,
    ),
    Meaning(
        "luo: Block set is corrupted%",
        "7.2 and later",
        "the list of sessions or files is damaged.",
        bad=True,
    ),
    Meaning(
        "luo: Block contains invalid entry count%",
        "7.2 and later",
        "the list of sessions or files is damaged.",
        bad=True,
    ),
    Meaning(
        "luo: File count mismatch%",
        "7.2 and later",
        "a session's list of files is damaged.",
        bad=True,
    ),
    Meaning(
        "luo: failed to allocate/preserve FDT memory",
        "6.19 to 7.1",
        "LUO could not set up its part of the handover at boot: there is no live update until the next boot.",
        bad=True,
    ),
    Meaning(
        "luo: failed to prepare LUO FDT: %",
        "6.19 to 7.1",
        "LUO could not set up its part of the handover at boot: there is no live update until the next boot.",
        bad=True,
    ),
    Meaning(
        "luo: failed to allocate/preserve LUO state memory",
        "7.2 and later",
        "LUO could not set up its part of the handover at boot: there is no live update until the next boot.",
        bad=True,
    ),
    Meaning(
        "luo: failed to prepare LUO state: %",
        "7.2 and later",
        "LUO could not set up its part of the handover at boot: there is no live update until the next boot.",
        bad=True,
    ),
    Meaning(
        "luo: Unable to get session node: [%]",
        "6.19 to 7.1",
        "the LUO subtree has no list of sessions: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: Unable to get session header '%' [%]",
        "6.19 to 7.1",
        "the list of sessions has no address: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: Session node incompatible [%]",
        "6.19 to 7.1",
        "the previous kernel writes another list of sessions: a panic follows.",
        "DOC039",
    ),
    Meaning(
        "luo: Failed to allocate session [%] during deserialization %",
        "6.19 and later",
        "memory ran out while the sessions of the previous kernel were read: the rest of them is lost.",
        bad=True,
    ),
    Meaning(
        "luo: Failed to insert session [%] %",
        "6.19 and later",
        "two sessions of the previous kernel have one name: one of them is lost.",
        bad=True,
    ),
    Meaning(
        "luo: Unable to finish session [%] on release",
        "6.19 and later",
        "the last descriptor of a retrieved session was closed before FINISH, and a file could not be given back: "
        "its memory stays reserved until a cold boot.",
        bad=True,
    ),
    Meaning(
        "luo: Freeze failed for token[%] handler[%] err[%]",
        "6.19 and later",
        "a file could not be frozen, and the kexec was refused: the machine runs on, and nothing was handed over.",
        bad=True,
    ),
    Meaning(
        "luo: The file was successfully preserved, but response to user failed",
        "6.19 and later",
        "PRESERVE_FD preserved the file, and its answer could not be copied to the process (EFAULT).",
        bad=True,
    ),
    Meaning(
        "luo: File handler registration failed: Compatible string '%' already registered.",
        "6.19 and later",
        "two drivers register for one kind of file: the second one is not used.",
    ),
    Meaning(
        "luo: Failed to unregister FLB '%': not found in file handler '%'",
        "7.1 and later",
        "a driver unregistered data that it had not registered.",
    ),
    Meaning(
        "memfd_luo: Unable to restore folio at physical address: %",
        "6.19 and later",
        "a page of a memfd is lost. To 7.0.10 RETRIEVE_FD can succeed with a short file all the same; from 7.0.11 on "
        "it fails.",
        "DOC034",
    ),
    Meaning(
        "memfd_luo: shmem: failed to charge folio index %: -12",
        "6.19 and later",
        "the memory limit of the process that retrieves a memfd is smaller than the memfd (MemoryMax=): it is killed,"
        " and the file is lost.",
        bad=True,
    ),
    Meaning(
        "memfd_luo: failed to pin folios: %",
        "6.19 and later",
        "PRESERVE_FD failed: pages of the memfd could not be pinned, for want of memory outside scratch and other CMA.",
        bad=True,
    ),
    Meaning(
        "memfd_luo: failed to setup file: %",
        "6.19 and later",
        "RETRIEVE_FD failed: no file could be made for the memfd, whose pages are lost.",
        bad=True,
    ),
    Meaning(
        "memfd_luo: failed to add seals: %",
        "7.1 and later",
        "RETRIEVE_FD failed: the seals of the memfd could not be set.",
        bad=True,
    ),
    Meaning(
        "memfd_luo: shmem: failed to account folio index %",
        "6.19 and later",
        "RETRIEVE_FD failed: the memory of the memfd exceeds a limit of shared memory; the file is lost.",
        bad=True,
    ),
    Meaning(
        "memfd_luo: shmem: failed to add to page cache folio index %: %",
        "6.19 and later",
        "RETRIEVE_FD failed: memory ran out while the pages of the memfd were inserted; the file is lost.",
        bad=True,
    ),
    Meaning(
        "memfd_luo: Could not register luo filesystem handler: %",
        "6.19 and later",
        "memfds cannot be preserved until the next boot.",
        bad=True,
    ),
    Meaning(
        "memfd_luo: %",
        "6.19 and later",
        "a memfd could not be preserved or restored.",
        bad=True,
    ),
    Meaning(
        "Revived memory reservation '%' from KHO",
        "6.16 and later",
        "memory of reserve_mem= has its old address and content.",
    ),
    Meaning(
        "KHO reserve-mem '%' has wrong alignment (%, %)",
        "6.16 and later",
        "reserve_mem= asks for another alignment than before the kexec: the old content is not used.",
        bad=True,
    ),
    Meaning(
        "KHO reserve-mem '%' has wrong size (% != %)",
        "6.16 and later",
        "reserve_mem= asks for another size than before the kexec: the old content is not used.",
        bad=True,
    ),
    Meaning(
        "FDT 'memblock' has no child '%': %",
        "6.16 and later",
        "reserve_mem= names an area that the previous kernel did not hand over: it is new and empty.",
    ),
    Meaning(
        "failed to prepare memblock FDT for KHO: %",
        "6.16 and later",
        "memory of reserve_mem= will not be handed over.",
        bad=True,
    ),
    Meaning(
        "failed to retrieve FDT '%' from KHO: %",
        "6.16 and later",
        "the handover has no list of reserve_mem= areas: they are new and empty. After a handover of a kernel "
        "without reserve_mem= it is no fault.",
    ),
    Meaning(
        "FDT '%' is incompatible with '%': %",
        "6.16 and later",
        "the previous kernel writes another list of reserve_mem= areas: they are new and empty.",
    ),
    Meaning(
        "Passed KHO data, but CONFIG_KEXEC_HANDOVER not set. Ignoring.",
        "6.16 and later",
        "the previous kernel handed memory over to a kernel without KHO: all of it is lost.",
        "DOC041",
    ),
    Meaning(
        "cannot allocate crashkernel (size:%)",
        "6.16 and later",
        "no memory is reserved for a crash kernel: there will be no crash dump. After a handover it must fit into one"
        " scratch area.",
        "DOC029",
    ),
    Meaning(
        ".text .data .bss are not marked as E820_TYPE_RAM!",
        "6.16 and later",
        "in a crash kernel: it runs outside its own memory, and the dump has lost that range.",
        "DOC028",
    ),
    Meaning(
        "test_kho: failed to retrieve % FDT: %",
        "6.16 and later",
        "the handover has nothing of the kernel's own test module, as after a cold boot: no fault.",
    ),
    Meaning(
        "test_kho: KHO restore succeeded",
        "6.16 and later",
        "the kernel's own test module has found its memory again.",
    ),
    Meaning(
        "test_kho: KHO restore failed",
        "6.19 and later",
        "the kernel's own test module has not found its memory.",
        bad=True,
    ),
)


def meaning_of(text: str) -> Meaning | None:
    """Return the meaning of a message: that whose wording is the longest of those that it begins with, or contains."""
    found = [meaning for meaning in MESSAGES if meaning.pattern.match(text)]
    return max(found, key=lambda meaning: len(meaning.wording), default=None)


def search(text: str) -> list[Meaning]:
    """Return the meanings of messages in a line of a log, or those whose wording contains a part of one."""
    text = text[:2000]
    within = [meaning for meaning in MESSAGES if meaning.pattern.search(text)]
    if within:
        longest = max(len(meaning.wording) for meaning in within)
        return [meaning for meaning in within if len(meaning.wording) == longest]
    wanted = re.sub(r"0x[0-9a-f]+|\d+", "%", text.strip().lower())
    return [meaning for meaning in MESSAGES if len(wanted) > 6 and wanted in meaning.wording.lower()]


def page() -> str:
    """Return the page docs/messages.md: a section for each message, under its wording."""
    head = "Each message under its wording, `%` for a value, with the releases that print it."
    parts = [f'# Kernel messages about KHO\n\n{head} `kho doctor --explain "MESSAGE"` prints the same.\n']
    for meaning in MESSAGES:
        rule = f" See [{meaning.rule}](doctor/{meaning.rule}.md)." if meaning.rule else ""
        rule = " See [DOC040](doctor/DOC040.md)." if meaning.bad else rule
        said = meaning.meaning[0].upper() + meaning.meaning[1:]
        parts.append(f"## `{meaning.wording}`\n\nLinux {meaning.releases}. {said}{rule}\n")
    return "\n".join(parts)
