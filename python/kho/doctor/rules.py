"""Rules of `kho doctor`: for each finding its severity, explanation, advice and a real case, by a stable id.

`make docs` writes one page for each rule to `docs/doctor/`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._types import SEVERITIES, Severity

__all__ = ["RULES", "SEVERITIES", "Rule", "page"]


@dataclass(frozen=True)
class Rule:
    """Explanation of a finding. Errors and warnings set the exit code to 1; notes do not."""

    severity: Severity
    title: str
    means: str
    """The condition that was found."""
    matters: str
    """Its consequences."""
    advice: str
    """The remedy."""
    case: str
    """Real machines with this finding."""
    source: str
    """Kernel source, module or document that defines the behavior."""
    known: str = ""
    """How this is known: kernels, date, and what was run."""
    helped: str = ""
    """How to see that the remedy helped."""

    @property
    def explanation(self) -> str:
        """The text of `kho doctor --explain`, as paragraphs."""
        more = f"\n\nHow this is known: {self.known}" if self.known else ""
        helped = f"\n\nHow to see that it helped: {self.helped}" if self.helped else ""
        return (
            f"{self.means}\n\nWhy it matters: {self.matters}\n\nWhat to do: {self.advice}{helped}\n\n"
            f"Real case: {self.case}{more}\n\nSource: {self.source}"
        )


CORE = "kernel/liveupdate/kexec_handover.c"
RESERVE = f"{CORE}, kho_reserve_scratch"
OFF = "If nothing on this machine uses live update, boot with kho=off"
SIZES = "set explicit sizes with kho_scratch=LOW,GLOBAL,PERNODE (kho doctor --what-if kho_scratch=64M,256M,64M)"
GUEST = "the hosts/ captures: 2 GiB guests of Linux 7.3"
RUN = "30 November 2026, QEMU guests (TCG, BIOS, x86_64), kexec-tools 2.0.32, makedumpfile 1.7.8"
NOKASLR = (
    "In this order: boot a kernel with the fix (7.0.11 or later, 7.1 or later); or add nokaslr to the crash kernel's "
    "command "
    'line (KDUMP_CMDLINE_APPEND="... nokaslr" in /etc/default/kdump-tools, then kdump-config reload), which costs a '
    'crash kernel nothing; or load it by kexec_load (KDUMP_KEXEC_ARGS="-c"), which Secure Boot and lockdown forbid. '
    "kho=off on "
    "the crash kernel's line does not help: it is read after KASLR has chosen the place."
)

RULES: dict[str, Rule] = {
    "DOC001": Rule(
        "warning",
        "scratch memory is held",
        "KHO is active and holds scratch areas, the memory in which the next kernel boots. They are pageblocks of type "
        "CMA that CmaTotal does not count, so CmaFree is larger than CmaTotal.",
        "Only movable memory can use scratch: page cache and process memory. Kernel memory, page tables, huge page "
        "reservations at boot and long-term pins cannot. MemFree therefore overstates what the kernel can use.",
        f"{OFF}; this frees all of the scratch. Otherwise {SIZES}.",
        "Ubuntu's 7.0 kernels enable KHO by default. A database image for 800 MiB cloud VMs lost about 128 MiB to it "
        "(532 of 800 MiB were available at boot, 666 with kho=off). The image now ships with kho=off.",
        f"{RESERVE}, kho_init",
        "Seen in each captured machine with KHO (tests/data/hosts, 6.18.15 to 7.3.4): debugfs out/scratch_len, the "
        "pageblocks of pagetypeinfo and CmaFree agree. MemTotal does not fall with scratch, only `Memory: X/Y "
        "available` of the kernel log does: with 192 MiB of scratch on 1 GiB, 7.3.4 logs 808664K available, 997052K "
        "after a handover, and MemTotal is 1009300 kB and 1009280 kB (30 November 2026, QEMU).",
        "After a boot with kho=off `CmaFree` of /proc/meminfo is no larger than `CmaTotal`, and `Memory:` of dmesg "
        "has more available. MemTotal stays the same.",
    ),
    "DOC002": Rule(
        "warning",
        "scratch is a large share of RAM",
        "Scratch takes a tenth of the memory, or more.",
        "Kernel memory has to fit into the rest. Small and busy guests run out of memory while MemFree is still large, "
        "because all of the free memory is scratch.",
        f"{OFF}. Otherwise {SIZES}. The next kernel needs about as much as this one reserves during boot (dmesg: "
        "Memory: ... reserved), not four times as much.",
        "128 MiB of an 800 MiB cloud VM (16 %); guests of a hypervisor that were killed early by the out-of-memory "
        "killer.",
        f"{CORE}, scratch_size_update: 200 % of the low and of the other reserved memory, and 200 % again per node",
        "The amounts are those of DOC001. Ubuntu's 7.0.0-14-generic with crashkernel=192M in a guest of 1400 MiB "
        "holds 884 MiB, 81 % of RAM; a guest of 2 GiB with Linux 7.3.4 and crashkernel=128M 79.8 % (30 November "
        "2026, QEMU).",
        "kho doctor prints a smaller share after the boot with the new line.",
    ),
    "DOC003": Rule(
        "error",
        "reservation failed, KHO disabled itself",
        "The kernel could not reserve one of the scratch areas. It disabled KHO for this boot and continued.",
        "Nothing can be handed over, and /dev/liveupdate does not work, whatever the command line requests.",
        "Request areas that fit: LOW below 4 GiB; GLOBAL and PERNODE each as one contiguous piece. If KHO is not "
        "needed, boot with kho=off.",
        "Workstations and servers with hundreds of GiB, where 200 % of the memory reserved below 4 GiB is not free as "
        "one contiguous piece below 4 GiB: 'Failed to reserve lowmem scratch buffer' at each boot of Ubuntu 7.0. In "
        "the captures: kho_scratch=64M,3G,64M on 2 GiB.",
        f"{RESERVE}: err_disable_kho",
        "tests/data/hosts/scratch-too-big (7.3.4, 2 GiB), and a guest of 512 MiB with crashkernel=128M and no "
        "kho_scratch=: 'KHO: Failed to reserve nid 0 scratch buffer' (7.3.4, 30 November 2026, QEMU). The messages "
        "of each release are from its source.",
        "dmesg has no `Failed to reserve scratch area`, and /sys/kernel/debug/kho exists.",
    ),
    "DOC004": Rule(
        "warning",
        "a failed reservation left memory in CMA",
        "Some CMA pageblocks have no owner. The reservation of a scratch area failed, and the kernel released the "
        "areas it had reserved before without resetting their pageblock type from CMA.",
        "Kernel memory and long-term pins cannot use these pageblocks until the next boot, although KHO is off and "
        "holds no memory.",
        "Boot with kho=off, or with sizes that fit, so that no reservation fails halfway.",
        "kho_scratch=64M,3G,64M on a 2 GiB guest: the 64 MiB of the first area were left in CMA. zoneinfo does not "
        "count them as CMA; pagetypeinfo and CmaFree do.",
        f"{RESERVE}: err_free_scratch_areas; mm/mm_init.c",
        "tests/data/hosts/scratch-too-big: 32 pageblocks stay CMA. A guest of 512 MiB (7.3.4, 30 November 2026, "
        "QEMU): 100 MiB, 50 pageblocks.",
        "CmaFree is 0, or no larger than CmaTotal, after the boot.",
    ),
    "DOC005": Rule(
        "error",
        "kho_scratch= is rejected",
        "The kernel cannot parse the value of kho_scratch= and ignores it.",
        "An earlier valid kho_scratch= remains in effect, or the default of 200 % if there is none. Scratch therefore "
        "does not have the requested size.",
        "Write N% or LOW,GLOBAL,PERNODE: three sizes with the suffix K, M, G, T, P or E, without spaces or decimals, "
        "and no text after the third size.",
        "Examples of early versions of the patches have one size (512M) or two (512M,512M). Search engines still find "
        "that documentation first.",
        f"{CORE}, kho_parse_scratch_size; abi.md section 5",
        "The parser was read in 6.17.8 to 7.3.4, and kho parses with the same rules; the table of cases is in "
        "rust/kho/src/cmdline.rs.",
        "dmesg has `KHO: scratch areas:` or `KHO: scratch scale is` with the values that were meant.",
    ),
    "DOC006": Rule(
        "warning",
        "kho_scratch= is parsed differently than it looks",
        "The kernel accepts the value of kho_scratch= but parses it differently than most readers expect: a leading 0 "
        "means octal, a number without a suffix is in bytes, a value that exceeds 64 bits wraps around, and older "
        "kernels ignore text after the third size.",
        "Areas are smaller or larger than intended, and the kernel prints no message.",
        "Write decimal numbers with a suffix, and no text after the third size.",
        "064M is 52 MiB; 64,256,64 is three pageblocks; 64M,256M,64MB worked until kernels began to reject the "
        "trailing B.",
        "lib/cmdline.c, memparse; abi.md section 5",
        "memparse was read in lib/cmdline.c of 6.17.8 to 7.3.4; the octal and the truncated sizes were compared with "
        "`KHO: scratch areas:` of booted kernels.",
        "`KHO: scratch areas:` of dmesg has the sizes that were meant, in MiB.",
    ),
    "DOC007": Rule(
        "warning",
        "kho= is not a boolean",
        "kstrtobool does not accept the value of kho=, so the parameter has no effect.",
        "KHO stays as the kernel's default or an earlier kho= sets it: possibly on, although it was meant to be off.",
        "Write kho=on or kho=off.",
        "`kho` without a value, or kho=auto, as other parameters accept it.",
        f"{CORE}, kho_parse_enable; lib/kstrtox.c, kstrtobool",
        "kstrtobool was read in lib/kstrtox.c of 6.17.8 to 7.3.4; the kernel logs 'Malformed early option'.",
        "dmesg has no `Malformed early option 'kho'`.",
    ),
    "DOC008": Rule(
        "note",
        "kho_scratch= has no effect",
        "KHO is off, or a later kho_scratch= overrides this one, or this kernel was booted by a handover and inherited "
        "the areas of the previous kernel.",
        "The sizes on the command line are not the sizes in effect.",
        "Nothing, or remove the parameter. New sizes take effect with a cold boot.",
        "The second boot of a chain keeps the areas of the first, whatever its own command line requests.",
        f"{CORE}, kho_memory_init; abi.md section 5",
        "Seen after each handover of the captures (stage2) and with kho=off (tests/data/hosts/kho-off).",
        "`cat /sys/kernel/debug/kho/out/scratch_len` shows the sizes in effect.",
    ),
    "DOC009": Rule(
        "warning",
        "scratch is too small for the next boot",
        "All scratch areas together are smaller than what this kernel reserved during boot.",
        "The next kernel can allocate only from scratch until it has read the map. Page structures, hash tables, "
        "per-CPU memory and huge pages reserved at boot must fit, otherwise the kernel panics.",
        "Make scratch at least as large as what the kernel reserves during boot (dmesg: Memory: ... reserved): "
        f"{SIZES}.",
        "Explicit sizes copied from a small test guest: 16M,32M,16M suits a 256 MiB guest, but not one with 8 GiB, "
        "whose page structures alone take 128 MiB.",
        f"mm/memblock.c, memblock_set_kho_scratch_only; {CORE}, kho_populate",
        "That the next kernel allocates from scratch alone was read in mm/memblock.c. A guest of 1280 MiB with 107 "
        "MiB of initramfs and the default scratch: 'Initramfs unpacking failed: write error', panic (7.3.4, QEMU).",
        "The next kexec boots; `kho doctor --what-if` of the new sizes exits 0.",
    ),
    "DOC010": Rule(
        "warning",
        "boot-time reservations inflate scratch",
        "The size of scratch is a percentage of all memory reserved during boot, including gigantic pages and the "
        "crash kernel. At N %, a reserved byte adds N % of its size to low or global scratch, and again to its "
        "node's; a "
        "crash kernel is no node's. Without NUMA each byte adds 4 N %.",
        "With the default of 200 %, a 1 GiB page may cost 4 GiB of scratch, or the reservation fails. Linux 7.3 and "
        "later do not count huge pages, but still count the crash kernel.",
        f"Use sizes instead of a percentage: {SIZES}. Or reserve gigantic pages after boot.",
        "Virtualization hosts with hugepagesz=1G hugepages=N. Huge pages of 2 MiB are allocated later and do not "
        "count: the capture with hugepages=600 has the same scratch as the one without.",
        f"{CORE}, scratch_size_update: memblock_reserved_kern_size",
        "crashkernel=128M in guests without NUMA: 1456, 2268 and 2828 MiB of scratch with 2, 4 and 8 GiB, 8 bytes "
        "for each byte (7.3.4). With NUMA a crash kernel counts for low or global memory only: Ubuntu's 7.0.0-44 "
        "with crashkernel=192M has areas of 640 and 248 MiB, and the node's does not contain it (30 November 2026, "
        "QEMU). Huge pages: memblock_reserved_hugetlb_size is in 7.3.4 and not in 7.1.13.",
        "/sys/kernel/debug/kho/out/scratch_len has the smaller sizes after a cold boot.",
    ),
    "DOC011": Rule(
        "note",
        "huge pages also hold memory",
        "Huge pages are reserved. They are not scratch, and KHO does not cause them.",
        "They reduce MemFree and MemAvailable in the same way, so the two causes are easily confused.",
        "If they are not wanted, check hugepages= on the command line and vm.nr_hugepages.",
        "hugepages=600 on a 2 GiB guest: 1200 MiB are huge pages, 192 MiB are scratch.",
        "Documentation/admin-guide/mm/hugetlbpage.rst",
        "tests/data/hosts/hugepages: 600 huge pages, and the scratch of the same machine without them.",
        "HugePages_Total of /proc/meminfo is the wanted number.",
    ),
    "DOC012": Rule(
        "note",
        "other CMA areas exist",
        "CmaTotal is the memory that cma=, hugetlb_cma= and drivers reserved. It is not scratch: scratch is outside "
        "CmaTotal.",
        "Only movable memory can use either of them, so both reduce the memory for kernel allocations and pins.",
        "Check cma= and hugetlb_cma= on the command line, and reserved-memory in the devicetree.",
        "A workstation with a CmaTotal of 32 MiB, from the kernel's default, and a CmaFree of 9.3 GiB: the 32 MiB "
        "were blamed.",
        "mm/cma.c: totalcma_pages",
        "mm/cma.c was read; the captures have a CmaTotal of 0 with CmaFree above it.",
        "CmaTotal of /proc/meminfo falls when the areas are gone.",
    ),
    "DOC013": Rule(
        "warning",
        "long-term pins at risk",
        "Devices or drivers on this machine pin memory for a long time (RDMA, VFIO, GPUs), and part of the memory is "
        "in CMA pageblocks, where long-term pins are not allowed: each such page must be migrated out first.",
        "Under memory pressure the migration has no target: registering memory fails with ENOMEM or EAGAIN while "
        "gigabytes are free.",
        f"{OFF}. Otherwise {SIZES}, and keep enough memory outside of scratch free.",
        "Two 128 GB workstations (GB10, ConnectX-7) with 9.36 GiB of scratch: ibv_reg_mr fails with ENOMEM under GPU "
        "memory pressure, and NCCL does not start. With kho=off all 4096 registrations succeed.",
        "mm/gup.c, migrate_longterm_unpinnable_folios",
        "Public reports from two GB10 machines, which also tried kho=off; mm/gup.c was read. Not run here: the "
        "guests have no such device.",
        "The registration that failed succeeds under the same memory pressure.",
    ),
    "DOC014": Rule(
        "note",
        "KHO is on by default",
        "The command line does not request KHO: the kernel was built with CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT.",
        "A kernel upgrade can enable KHO, and its scratch, on machines whose owners never requested it.",
        f"{OFF}.",
        "Ubuntu's 7.0 HWE kernels enabled it on machines that had run 6.x without it. Some vendors turn the default "
        "off in their own builds.",
        "kernel/liveupdate/Kconfig",
        "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y in the configuration of Ubuntu's 7.0.0-14-generic, which boots with "
        "scratch and without kho= (30 November 2026, QEMU).",
        "With kho=off on the line /sys/kernel/debug/kho does not exist.",
    ),
    "DOC015": Rule(
        "note",
        "KHO is off",
        "KHO is not enabled on this boot: the command line or the kernel's default disables it, or all CMA memory is "
        "accounted for and none of it is scratch. A CmaFree of 0 alone does not show that KHO is off while memory is "
        "full.",
        "It holds no memory, and nothing can be handed over. Exception: a kernel that was booted by a handover keeps "
        "the scratch it inherited, also with kho=off.",
        "Nothing; kho=on enables it.",
        f"kho=off after kho=on, as a vendor's package appends it: the last one wins ({GUEST}).",
        f"{CORE}, kho_parse_enable",
        "tests/data/hosts/kho-off: no pageblock of type CMA. tests/data/hosts/kdump-kernel: 'KHO: disabled in the "
        "kdump kernel' (7.3.4).",
        "If KHO is wanted: after a boot with kho=on /sys/kernel/debug/kho exists.",
    ),
    "DOC016": Rule(
        "note",
        "KHO is not built in",
        "This kernel has no KHO: its configuration lacks it, it is older than Linux 6.16, its architecture is neither "
        "x86_64 nor arm64, or it has no CMA, which KHO requires.",
        "KHO does not hold any memory here. CMA memory outside CmaTotal belongs to a vendor's driver. For a 6.x kernel "
        "this is a guess, because vendors backport features to their long-term kernels.",
        "Nothing.",
        "Most machines.",
        "kernel/liveupdate/Kconfig: KEXEC_HANDOVER selects CMA; ARCH_SUPPORTS_KEXEC_HANDOVER in arch/x86, arch/arm64",
        "Kconfig was read in 6.16 to 7.3.4: KEXEC_HANDOVER selects CMA, and x86 and arm64 alone support it.",
        "Not applicable: nothing is to be changed.",
    ),
    "DOC017": Rule(
        "note",
        "booted by a handover",
        "kexec started this kernel, and it took over memory from the previous kernel, including its scratch areas.",
        "Memory that was preserved and is never restored stays reserved until the next cold boot. MemTotal is lower by "
        "what still waits to be retrieved; a tmpfs that is mounted in that time with a size in percent of RAM stays "
        "small.",
        "Nothing; kho verify checks the handover. A tmpfs that stayed small: mount -o remount,size=50% /dev/shm.",
        "The second kernel of a chain. From 7.1 on it logs the previous kernel's release and the number of kexecs.",
        f"{CORE}, kho_populate; kexec-metadata, abi.md section 6",
        "Seen in the second kernel of each chain of the captures (6.18.15 to 7.3.4). MemTotal and the small tmpfs: "
        "systemd 262.1 on 7.3.4, 30 November 2026.",
        "MemTotal rises as memory is retrieved; `mount -o remount,size=50% /tmp` gives a tmpfs its size back.",
    ),
    "DOC018": Rule(
        "warning",
        "a handover was refused",
        "The previous kernel passed handover data that this kernel could not use, so this kernel booted cold.",
        "All preserved memory is lost.",
        "Use kernels that write the same `compatible` before and after the kexec (kho compat). 'disabling KHO revival: "
        "-2' alone on 6.19, without the number on 7.0, means that the previous kernel did not finalize: set "
        "liveupdate=on, or write 1 to out/finalize before the kexec.",
        "'KHO: setup: handover FDT (0x1e7000) is incompatible with ...' and 'disabling KHO revival' after a "
        "kexec from 7.0 to 7.1. 'is invalid: -9' on 6.16 and 6.17.0 to 6.17.3 is harmless (DOC037).",
        f"{CORE}, kho_populate",
        "30 November 2026, QEMU: 7.0's code to 7.1.13, 7.1.13 to 7.3.4, 6.19.11 to 7.1.13, and 6.19.11 that never "
        "finalized.",
        "After the next kexec dmesg has `KHO: found kexec handover data` and no `disabling KHO revival`.",
    ),
    "DOC019": Rule(
        "warning",
        "finalized, but no kexec followed",
        "debugfs out/finalize is 1 (Linux 6.16 to 7.0): the map was written, but no kexec followed.",
        "To 6.18 memory can be neither preserved nor unpreserved until the handover is aborted: callers get EBUSY. On "
        "6.19 and 7.0 they can, and what is preserved later is missing from the map until it is written again. There a "
        "crash kernel that is loaded hangs (DOC027).",
        "Run kexec. Or, to 6.18, abort the handover: echo 0 > /sys/kernel/debug/kho/out/finalize; on 6.19 and 7.0 this "
        "is EINVAL, and only a reboot undoes it.",
        "A live update that was prepared and canceled; the 6.18 captures before their kexec.",
        "kernel/kexec_handover.c, kho_out_finalize_set; abi.md section 2",
        "The captures of 6.18.15 before their kexec; 6.19.11 and 7.0's code: echo 0 is EINVAL, a second 1 is "
        "accepted (30 November 2026, QEMU).",
        "out/finalize is 0, or absent after the reboot.",
    ),
    "DOC020": Rule(
        "note",
        "memory is preserved for the next kernel",
        "Producers have added subtrees to the handover.",
        "The memory that the subtrees describe stays in place across kexec. This is the purpose of KHO.",
        "kho inspect shows the content of the subtrees, from debugfs or memory.",
        "LUO, kexec-metadata, memblock (reserve_mem=), kho_test in the captures.",
        f"{CORE}, kho_add_subtree",
        "Seen in each capture; debugfs shows the subtrees.",
        "After the kexec `in/sub_fdts` of debugfs has the same names.",
    ),
    "DOC021": Rule(
        "note",
        "live update is not available",
        "The command line requests liveupdate=on, but the kernel did not enable it.",
        "systemd and virtual machine monitors that rely on /dev/liveupdate restart instead of keeping their state.",
        "Enable KHO (kho=on) with scratch that fits.",
        "liveupdate=on with kho=off: 'luo: Disabling liveupdate because KHO is disabled'.",
        "kernel/liveupdate/luo_core.c",
        "'luo: Disabling liveupdate because KHO is disabled' in 6.19.11 to 7.3.4 (source), and seen on 7.0's code "
        "and 7.3.4 (30 November 2026, QEMU).",
        "/dev/liveupdate exists.",
    ),
    "DOC022": Rule(
        "note",
        "live update is available",
        "The kernel provides /dev/liveupdate, the device of the Live Update Orchestrator (LUO).",
        "The process that opens it preserves files for the next kernel; only one process can open it at a time. A "
        "session lives as long as its descriptor is open. Scratch exists for such handovers.",
        "Find out which programs use live update before you disable KHO.",
        "systemd 261 and later hand their descriptor store over in a session named systemd. systemd-shutdown makes it "
        "in the last moment before the jump: on a running machine there is none of that name.",
        "kernel/liveupdate/luo_core.c; abi.md section 7",
        "Captures of 6.19.11 to 7.3.4. systemd 262.1 on 7.3.4: the session exists only at the end of "
        "systemd-shutdown (30 November 2026).",
        "`kho doctor` names the sessions that are open; `in/sub_fdts/LUO` of 7.2 and later shows freed memory and is "
        "not read.",
    ),
    "DOC023": Rule(
        "warning",
        "figures disagree",
        "The scratch size in debugfs differs by more than rounding from the size that CMA pageblocks or CmaFree imply.",
        "One of the files is from another time or machine, or neither KHO nor CmaTotal accounts for some CMA memory.",
        "Take the snapshot again, with all files at the same time.",
        "Snapshots assembled from several collections; Android and vendor kernels with CMA areas of their own.",
        "kho.doctor.scratch",
        "The figures of the captures agree to a pageblock; a difference was only seen in snapshots that mix machines.",
        "A snapshot of one time gives no such finding.",
    ),
    "DOC024": Rule(
        "note",
        "this is a container",
        "The figures are those of the container's host. lxcfs replaces MemTotal and MemFree by the container's limit, "
        "and passes through the host's CmaTotal and CmaFree in the same file. CmaFree may then exceed MemFree, "
        "although it is a part of it.",
        "Nothing can be changed from inside the container: the command line and the boot loader are the host's. A "
        "quotient of two machines' figures has no meaning, so the report gives no share of RAM.",
        "Run kho doctor on the host. For containers of a cloud provider, only the provider can change the boot line.",
        "A container of 512 MiB on a host with 1.9 GiB of scratch: 375 % of RAM. A virtual machine whose image was "
        "made from a container image has a .dockerenv but is not a container: its process 2 is kthreadd, or / is a "
        "whole disk.",
        "lxcfs, src/proc_fuse.c; container= of /proc/1/environ, cgroups, mounts; run/.containerenv, .dockerenv",
        "Public reports of lxcfs containers with such figures; lxcfs was read. docs/doctor.md has the evidence in "
        "order.",
        "kho doctor on the host has no such finding.",
    ),
    "DOC025": Rule(
        "warning",
        "KHO is requested but not active",
        "The command line has kho=on, but KHO holds no memory: this kernel was built without it, or KHO disabled "
        "itself and released its memory.",
        "A live update planned for this machine will not work: kexec boots cold.",
        "`dmesg | grep KHO` shows why KHO disabled itself; `grep KEXEC_HANDOVER /boot/config-$(uname -r)` shows "
        "whether it is built in. Set sizes that fit, or remove kho=on.",
        "Boot lines reused with a kernel of another vendor, who turns CONFIG_KEXEC_HANDOVER off; machines whose kernel "
        "log was overwritten since the reservation failed.",
        f"{CORE}, kho_parse_enable; kernel/liveupdate/Kconfig",
        "Debian's 7.2.13 is built without KHO and ignores kho=on; a failed reservation leaves no debugfs directory "
        "(7.3.4, 30 November 2026, QEMU).",
        "/sys/kernel/debug/kho exists after the boot.",
    ),
    "DOC026": Rule(
        "warning",
        "crash dumps are damaged: the crash kernel runs in scratch",
        "This release passes KHO's scratch areas to every image that kexec_file_load loads, also to a crash kernel. On "
        "x86_64 the decompressor then takes the place for KASLR from these areas alone, so that the crash kernel runs "
        "in memory of the crashed machine instead of the memory reserved by crashkernel=.",
        "A piece of the crashed machine's memory as large as the crash kernel is overwritten (58 MiB with Ubuntu's "
        "7.0.0-14, 10 MiB with a small kernel), its pages of /proc/vmcore cannot be read, and nothing reports it: "
        "makedumpfile -d 31 drops the pages of page "
        "cache and processes and exits 0. Dumps with user pages (-d 1, -d 17), and memfds read from them, are damaged. "
        "After a live update scratch also holds the kernel itself, and makedumpfile can fail.",
        NOKASLR,
        "Ubuntu 26.04 and its relatives have KHO and kdump on by default. No live update and no KHO option on the "
        "command line is needed.",
        f"{CORE}, kho_fill_kimage (asks for kho_enable only, until a6715d7ec472 in 7.0.11); "
        "arch/x86/boot/compressed/kaslr.c, process_kho_entries",
        f"{RUN}. RAM was copied before the panic and in the crash kernel. 7.0.9's KHO code: 2559 pages overwritten, "
        "1017 "
        "unreadable, 3 of 3 runs; 6.19.11: 2556 and 1018, 2 of 2; the same with kho=off on the crash kernel's line. "
        "With nokaslr, with kexec_load, with kho=off on the first kernel's line, and with 7.0.11: nothing overwritten. "
        "After a live update 5 of 5 were in scratch, and makedumpfile -d 31 failed in 1 of 5. The other releases of "
        "6.19 and 7.0.0 to 7.0.10 have the same lines. 6.16 and 6.17.0 to 6.17.3 pass the areas too (from the sources, "
        "not run). Ubuntu's own kernels, kexec-tools 2.0.32, the same day: 7.0.0-14-generic (7.0.0): 6 segments, one "
        "of "
        "0x30 bytes, the crash kernel at 0x28a00000 in scratch; 7.0.0-44-generic (7.0.14): 5 segments, in its own "
        "memory.",
        "`kexec -d -p -s ...` of kexec-tools 2.0.32 prints the segments of the image to the kernel log (2.0.25 does "
        "not): without the small one (bufsz=0x30 for three areas) the image has no KHO data. /var/crash/kexec_cmd "
        "shows nokaslr or -c. In the crash kernel, "
        "dmesg does not have `.text .data .bss are not marked as E820_TYPE_RAM!`.",
    ),
    "DOC027": Rule(
        "error",
        "a crash now hangs the machine: the handover is finalized",
        "debugfs out/finalize is 1 while a crash kernel is loaded. The crash kernel gets a handover that it accepts, "
        "allocates from scratch, which its page tables do not map, and stops before its console works.",
        "A panic leaves no dump, and the machine does not reboot: panic= is not parsed by then. nokaslr does not help.",
        "Do the kexec, or reboot: 6.19 and 7.0 have no way back (echo 0 is EINVAL); to 6.18 echo 0 > "
        "/sys/kernel/debug/kho/out/finalize aborts. Boot 7.0.11 or later. Do not write to out/finalize on a machine "
        "that only needs kdump.",
        "A panic while devices shut down for a live update, between the serialization and the jump; a 1 written to "
        "out/finalize by hand.",
        f"{CORE}, kho_fill_kimage, kho_populate; arch/x86/mm/numa.c",
        f"{RUN}. 6.19.11 and 7.0.9's code, loaded by kexec_file_load before and after the 1 was written, with nokaslr, "
        "with "
        "nokaslr kho=off: hangs each time. 7.0.11: the dump is whole. kexec_load is harmless by the sources.",
        "out/finalize is 0 or absent after the reboot.",
    ),
    "DOC028": Rule(
        "error",
        "this crash dump has lost memory",
        "This is a crash kernel, and its code is in a System RAM range of its own, outside the memory that was "
        "reserved for it: in memory of the crashed kernel (DOC026).",
        "The range is not in /proc/vmcore any more: about 1000 of its pages cannot be read (EFAULT), the others "
        "contain the crash kernel. Conclusions from these addresses are wrong.",
        "Keep the range with the dump. Change the loading kernel before the next crash: " + NOKASLR,
        "`.text .data .bss are not marked as E820_TYPE_RAM!` in the crash kernel's log, and Kernel code at 0x33200000 "
        "while the crash kernel's area is at 0x37000000.",
        "arch/x86/kernel/setup.c, setup_arch; arch/x86/mm/ioremap.c",
        f"{RUN}. The message and the range appeared in every run with a misplaced crash kernel, and in none without.",
        "In the next crash kernel /proc/iomem has Kernel code inside the area that /proc/iomem of the first kernel "
        "names Crash kernel.",
    ),
    "DOC029": Rule(
        "warning",
        "no crash kernel is reserved",
        "The command line has crashkernel=, but the kernel reserved no memory for a crash kernel. After a handover it "
        "can take that memory from scratch only, and one area must have room for all of it.",
        "kexec -p fails ('Memory for crashkernel is not reserved'), and a crash leaves no vmcore until the next cold "
        "boot.",
        "Boot cold with scratch that has room for it in one area (kho doctor --what-if), or with a smaller "
        "crashkernel=.",
        "crashkernel=128M kho_scratch=16M,64M,16M: reserved on the cold boot, 'cannot allocate crashkernel "
        "(size:0x8000000)' after the first live update; kexec_crash_size is 0.",
        "kernel/crash_reserve.c; mm/memblock.c, memblock_set_kho_scratch_only",
        "30 November 2026, Linux 7.3.4, guests of 768 MiB, 2 GiB and 6 GiB.",
        "/sys/kernel/kexec_crash_size is not 0 after the reboot, and after the next live update.",
    ),
    "DOC030": Rule(
        "warning",
        "no crash kernel after the next live update",
        "The memory for a crash kernel is reserved now. After a live update it must come from one scratch area, and no "
        "area is large enough.",
        "The machine has no crash dumps from its next live update to its next cold boot, and no message says so "
        "before.",
        "Boot cold with scratch that has room for it in one area, as the fix says (kho doctor --what-if computes it).",
        "crashkernel=128M kho_scratch=16M,64M,16M has no crash kernel after the live update; with "
        "kho_scratch=16M,256M,16M it has one.",
        "kernel/crash_reserve.c; mm/memblock.c, memblock_set_kho_scratch_only",
        "30 November 2026, Linux 7.3.4, guests of 1 and 2 GiB: these lines and 16M,192M,16M, which is proposed for 1 "
        "GiB, "
        "were booted and handed over. Areas that adjoin are one piece: with 32M,128M,32M the crash kernel got 128 MiB "
        "across two of them.",
        "After the next live update /sys/kernel/kexec_crash_size is not 0.",
    ),
    "DOC031": Rule(
        "note",
        "KHO in a crash kernel",
        "This kernel saves a crash dump and has KHO on. Linux 7.3 and later turn it off here; 6.19 to 7.2 reserve "
        "scratch as on any boot, or fail to and continue without.",
        "A crash kernel hands nothing over. Scratch takes memory that it may need for the dump; a failed reservation "
        "is harmless.",
        "Add kho=off to the crash kernel's command line (KDUMP_CMDLINE_APPEND in /etc/default/kdump-tools).",
        "crashkernel=512M on 6.19 and 7.0 with KHO on by default: 152 of 489 MiB are scratch. crashkernel=128M: "
        "'Failed to reserve nid 0 scratch buffer', 'disabling kexec handover'.",
        f"{CORE}, kho_memory_init",
        f"{RUN}, 7.0.9's code: 195816K reserved with scratch, 40168K with kho=off.",
        "The crash kernel's `Memory:` line has more available.",
    ),
    "DOC032": Rule(
        "error",
        "scratch sizes are not whole pageblocks: memory corruption",
        "A size of low or global scratch is no multiple of a pageblock (2 MiB at 4 KiB pages), and this kernel does "
        "not round it. kho_init gives whole pageblocks to the page allocator, so the pages next to the area in its "
        "last pageblock go with it.",
        "The owner of these pages shares them with the page allocator: hash tables of file systems, bounce buffers. "
        "Such a kernel corrupts its own memory.",
        "Use whole pageblocks: multiples of 2 MiB at 4 KiB pages, of 32 MiB at 16 KiB, of 512 MiB at 64 KiB; or boot "
        "6.18.42, 7.1.5, 7.2 or later. Sizes for nodes and percentages are rounded in every release.",
        "kho_scratch=17M,64M,16M on 6.19 and 7.0. Free pages next to the area are counted twice (MemTotal grows by "
        "exactly those pages), reserved ones become free.",
        f"{CORE}, kho_init, kho_reserve_scratch; 0e39380a7316",
        "30 November 2026, QEMU: 6.19.11 and 7.0.11's KHO code corrupted themselves and died soon after, even MiB did "
        "not; 7.1.13 rounds, and logs the size before rounding. 6.16 to 6.18.41, 7.0 and 7.1.0 to 7.1.4 from the "
        "sources.",
        "Each line of /sys/kernel/debug/kho/out/scratch_len is a multiple of 0x200000 (4 KiB pages).",
    ),
    "DOC033": Rule(
        "warning",
        "memfds lose pages in this release",
        "This machine has live update, and its release records folios of a memfd as they are at PRESERVE_FD. A clean "
        "folio may be reclaimed afterwards; one that is not up to date is zeroed by the next kernel.",
        "Data written to a memfd after PRESERVE_FD can be missing after the kexec, and no call fails.",
        "Boot 6.19.9 or later. Until then write everything before PRESERVE_FD.",
        "6.19.0 to 6.19.8; 7.0 has the fix from its first release on.",
        "mm/memfd_luo.c; 50d7b4332f27, 7e04bf1f3315, f85b1c6af5bc",
        "The sources of 6.19.6, 6.19.8 and 6.19.11, and the stable patches; 30 November 2026. The loss itself was not "
        "run.",
        "`uname -r` is 6.19.9 or later.",
    ),
    "DOC034": Rule(
        "warning",
        "a memfd came back in part",
        "The kernel could not restore a page of a memfd that was handed over.",
        "To 6.19 and 7.0.10 RETRIEVE_FD can succeed all the same if the first page was restored: the file is short or "
        "has a hole. From 7.0.11 on the call fails.",
        "Compare size and content (a checksum) of what was retrieved, and treat the file as lost. Boot 7.0.11 or "
        "later. Preserve each memfd once: its second token cannot be retrieved.",
        "One memfd preserved under two tokens: the first retrieve is whole, the second gives EIO and this message.",
        "mm/memfd_luo.c; 0fb1daf0b78d",
        "30 November 2026, 6.19.11 and 7.0.11's code: EIO if the first page fails. The short file follows from the "
        "source.",
        "The message is absent after the next live update.",
    ),
    "DOC035": Rule(
        "note",
        "known faults of live update in this release",
        "This machine has live update, and its release has faults that later releases mended.",
        "Each one is named with its effect and the release that has the fix.",
        "Boot a release with the fixes. Until then: compare what was retrieved, check that each file of a session is "
        "there, and neither open nor close sessions during the kexec.",
        "6.19 and 7.0 on machines with liveupdate=on.",
        "kho.kernels.FIXES; docs/compat.md",
        "The sources of 6.19.6 to 6.19.11, 7.0 (files of Linus' tree and stable mails), 7.1.3 and 7.1.13, and the "
        "stable patches; 30 November 2026. 6.19.11 and 7.0.11's code were booted: EIO if the first page of a memfd "
        "cannot be restored, and 7.0 accepts PRESERVE_FD on two tokens of one memfd.",
        "`uname -r` (Ubuntu: the last word of /proc/version_signature) is a release that the value names, or later.",
    ),
    "DOC036": Rule(
        "warning",
        "a NUMA node without memory keeps KHO off",
        "This release reserves scratch for each online NUMA node, also for one without memory. That reservation fails, "
        "and KHO disables itself.",
        "KHO cannot be used on this machine, whatever sizes are requested.",
        "Boot 6.19.6, 7.0 or later, or give each node memory.",
        "Servers with sub-NUMA clustering or unpopulated sockets.",
        f"{RESERVE}; 427b2535f513",
        "The sources of 6.16 to 6.19.5 and the stable patch; 30 November 2026. Not run.",
        "dmesg has no `Failed to reserve scratch area`.",
    ),
    "DOC037": Rule(
        "note",
        "an empty handover was refused, which is harmless",
        "6.16 and 6.17.0 to 6.17.3 pass the FDT page at each kexec with KHO on, also if nothing was finalized. The "
        "next kernel finds no FDT in it ('is invalid: -9') and boots as without KHO.",
        "Nothing was handed over, so nothing is lost. Only a finalized handover would have been.",
        "Nothing. 6.17.4 and later no longer pass it.",
        "'KHO: setup: handover FDT (0x10116b000) is invalid: -9' and 'disabling KHO revival: -22' after any kexec of "
        "6.17 with KHO on.",
        f"{CORE}, kho_fill_kimage",
        "The sources of 6.17.8 and the stable patch of 6.17.4; public logs.",
        "The message is absent from 6.17.4 on.",
    ),
    "DOC038": Rule(
        "note",
        "a kexec from this release into a later one does not boot",
        "6.19 with liveupdate=on hands over LUO data without the luo-flb node that 7.0 and 7.1 require. 6.16 and 6.17 "
        "write a map whose bitmaps 6.18 and later read with the wrong size, and nothing tells the two apart.",
        "The next kernel panics, or dies before its first message, so that only a power cycle helps.",
        "Reboot cold for this upgrade. From 6.19: or put kho=off on the line of the 7.0 kernel (liveupdate=off does "
        "not help); memfds and files of sessions are lost, reserve_mem is kept. From 6.17: do not finalize, or boot "
        "kho=off.",
        "'luo: Unable to get FLB node [luo-flb]', 'Kernel panic - not syncing: The incoming tree failed to initialize "
        "properly [-ENOENT], disabling live update', also if no session was ever made.",
        "kernel/liveupdate/luo_flb.c; abi.md section 6",
        "30 November 2026, QEMU: 6.19.11 to 7.0's code, with and without a session, with liveupdate=off: panic; with "
        "kho=off: boots. 6.17.8 finalized to 6.19.11: dies before its first console line, 2 of 2 runs.",
        "The next kernel boots; `kho compat` shows each pair.",
    ),
    "DOC039": Rule(
        "error",
        "live update data made the kernel panic",
        "The kernel could not use the LUO data of the previous kernel, and panicked on purpose: it does not run with "
        "devices in a state that it does not know.",
        "The machine does not boot by kexec. All preserved memory is lost.",
        "Boot this kernel cold, or with kho=off (liveupdate=off does not help). Use kernels that go together (kho "
        "compat).",
        "6.19 with liveupdate=on, then 7.0.",
        "kernel/liveupdate/luo_internal.h, luo_restore_fail",
        "30 November 2026, QEMU: 6.19.11 to 7.0's code.",
        "The log of the next boot has no such panic.",
    ),
    "DOC040": Rule(
        "warning",
        "the kernel reported a fault of KHO",
        "The kernel log has a message that reports a failure of KHO, LUO or memfds. docs/messages.md has each message "
        "with its meaning.",
        "Depending on the message, a file, a subtree or the next handover is lost.",
        'The value names the meaning of each message; `kho doctor --explain "MESSAGE"` prints it.',
        "'luo: No registered handler for compatible ...', then EIO on /dev/liveupdate.",
        "docs/messages.md",
        "The wordings and their releases are those of the sources of 6.17.8, 6.18.15, 6.19.11, 7.1.13, 7.2.13 and "
        "7.3.4; a test compares docs/messages.md with a list of them (tests/data/messages.txt).",
        "The message is absent after the next live update.",
    ),
    "DOC041": Rule(
        "warning",
        "a handover was ignored: this kernel has no KHO",
        "The previous kernel handed memory over, and this kernel is built without CONFIG_KEXEC_HANDOVER.",
        "All preserved memory is lost, and only this line tells.",
        "kexec into a kernel with CONFIG_KEXEC_HANDOVER=y.",
        "'Passed KHO data, but CONFIG_KEXEC_HANDOVER not set. Ignoring.' after a kexec from a distribution's kernel "
        "with KHO into one without.",
        "arch/x86/kernel/setup.c, add_kho",
        "The sources of 6.17.8 to 7.3.4.",
        "The line is absent, and `KHO: found kexec handover data` is there.",
    ),
    "DOC042": Rule(
        "note",
        "descriptors that will not cross systemctl kexec",
        "A unit has descriptors in systemd's store, and FileDescriptorStorePreserve= is restart (the default) or no. "
        "The store is released when the unit stops, before systemd-shutdown hands anything over.",
        "After systemctl kexec the service starts without them, and no message says so. Only memfds cross: pipes, "
        "eventfds, sockets and files are refused by the kernel (ENOENT), and of two descriptors of one memfd the "
        "second one (EBUSY).",
        "If the service is to keep its memory: FileDescriptorStorePreserve=yes in the unit.",
        "systemd-logind and most services: restart. systemd-journald: yes, with sockets, so that each kexec logs at "
        "least one 'Failed to preserve LUO fd'.",
        "systemd.service(5); systemd-shutdown",
        "30 November 2026, systemd 262.1, kexec-tools 2.0.32, Linux 7.3.4 in QEMU.",
        "`systemctl show -P NFileDescriptorStore UNIT` after the kexec.",
    ),
    "DOC043": Rule(
        "warning",
        "memory is held for units that do not exist",
        "systemd's store has descriptors of a unit whose unit file is gone. After a kexec systemd makes a unit with "
        "LoadState=not-found for each name that was handed over.",
        "The memory is not usable, and each kexec carries it on. systemctl clean, stop, reset-failed and daemon-reload "
        "do not release it.",
        "Create a unit file of that name without FileDescriptorStoreMax=, and run systemctl daemon-reload: the memory "
        "is released at once. Then remove the file.",
        "48 MiB of a unit that was removed before a kexec stayed through a soft-reboot and the next kexec; also units "
        "of systemd-run, and app@v1.service after an update to app@v2.service.",
        "systemd, core/service.c; findings/systemd-fdstore-outlives-its-unit.sh",
        "30 November 2026, systemd 262.1, kexec-tools 2.0.32, Linux 7.3.4 in QEMU.",
        "`systemctl show -P NFileDescriptorStore UNIT` is 0, and Shmem of /proc/meminfo falls a moment later.",
    ),
    "DOC044": Rule(
        "warning",
        "the last kexec handed nothing over",
        "kexec started this kernel, but there was no handover, and systemd counts no kexec (KExecCount is part of what "
        "it hands over).",
        "Services have lost their stored descriptors. systemctl kexec prints no warning, and logs that stores were "
        "preserved.",
        "Load the kernel by kexec_file_load (kexec -s -l), not by kexec_load (kexec -c -l); the kernel before needs "
        "KHO on.",
        "`kexec -c -l`: every service starts without descriptors, KExecCount=0.",
        "systemctl(1); kexec(8)",
        "30 November 2026, systemd 262.1, kexec-tools 2.0.32, Linux 7.3.4 in QEMU.",
        "`systemctl show -P KExecCount` is 1 or more after the next kexec.",
    ),
    "DOC045": Rule(
        "warning",
        "sessions of the last kernel are kept in a store",
        "systemd holds sessions that the last kernel handed over, for units with LUOSession= or for services that "
        "stored them. Nothing can be preserved in such a session any more.",
        "PRESERVE_FD is EINVAL, also after FINISH; at the next kexec systemd writes the name down, and the kernel "
        "after it has no such session: its files are lost every other kexec.",
        "The service retrieves its files, finishes the session, removes it from the store (FDSTOREREMOVE=1), and "
        "creates a new session of the same name.",
        "LUOSession= works for every other kexec only.",
        "findings/systemd-luosession-every-other-kexec.sh",
        "30 November 2026, systemd 262.1, kexec-tools 2.0.32, Linux 7.3.4 in QEMU.",
        "Process 1 has no `anon_inode:[luo_session]` after a kexec.",
    ),
    "DOC046": Rule(
        "note",
        "shared memory of no cgroup",
        "The root cgroup has shared memory that no child accounts for. What systemd retrieves from its store after a "
        "kexec is charged to the root cgroup, not to the unit.",
        "MemoryMax= of the unit does not limit it, and no unit's accounting shows it.",
        "Nothing; subtract it if memory seems to be missing. A service that copies the data is charged for the copy.",
        "64 MiB of a service: shmem 67108864 in its cgroup before the kexec, 0 after it.",
        "mm/memfd_luo.c; systemd, core/manager.c",
        "30 November 2026, systemd 262.1, kexec-tools 2.0.32, Linux 7.3.4 in QEMU.",
        "Shmem of the root cgroup (`grep ^shmem /sys/fs/cgroup/memory.stat`) equals the sum of its children again "
        "once the services have released it.",
    ),
    "DOC047": Rule(
        "warning",
        "this crash dump may have lost memory",
        "The machine that crashed passed its scratch areas to its crash kernel (DOC026), so that KASLR placed the "
        "crash "
        "kernel there. The dump does not name the range: its filter drops page cache and process memory anyway, and "
        "the "
        "crash kernel's own log, which names it, is not part of the dump.",
        "Pages of scratch in this dump can be bytes of the crash kernel, or missing. What is read from them, memfds "
        "among it, may be wrong; structures of the crashed kernel are not affected unless it was booted by a handover.",
        "Look for the log of the crash kernel (kexec-dmesg.log next to the dump, or its console): `.text .data .bss "
        "are "
        "not marked as E820_TYPE_RAM!` proves it, and `Early memory node ranges` name the range. Before the next "
        "crash: " + NOKASLR,
        "Ubuntu 7.0.0-14: makedumpfile -d 31 saved the dump and exited 0.",
        f"{CORE}, kho_fill_kimage; arch/x86/boot/compressed/kaslr.c, process_kho_entries",
        "30 November 2026, QEMU (TCG, BIOS, x86_64): Ubuntu's 7.0.0-14-generic, kexec-tools 2.0.32, makedumpfile "
        "1.7.8.",
        "The next dump's crash kernel does not log `.text .data .bss are not marked as E820_TYPE_RAM!`; `kho "
        "inspect` of "
        "the next dump prints no such note.",
    ),
    "DOC048": Rule(
        "note",
        "descriptors in a store that the kernel refuses",
        "A unit keeps its store across a kexec (FileDescriptorStorePreserve=yes), and some of its descriptors are no "
        "memfds, or two of them are one memfd. The kernel has no way to preserve a pipe, socket, eventfd, directory or "
        "linked file (ENOENT), and preserves a memfd once (EBUSY).",
        "systemd-shutdown skips them with a warning on the console, after the journal has ended, and without the name "
        "of the unit. The service starts without them.",
        "Store memfds only, each in one place, and not in a session as well. A socket unit makes its sockets again by "
        "itself: those of journald are no loss.",
        "'systemd-shutdown[1]: Failed to preserve LUO fd 48 (name 'event') with token 7, will be lost across kexec: No "
        "such file or directory'.",
        "systemd-analyze(1), fdstore; kernel/liveupdate/luo_file.c, luo_preserve_file",
        "30 November 2026, systemd 262.1, Linux 7.3.4 in QEMU: pipe, eventfd, socket, directory, file: ENOENT; one "
        "memfd twice: EBUSY; an empty memfd and an O_TMPFILE file of tmpfs arrive.",
        "`systemd-analyze fdstore UNIT` lists only paths that end in (deleted), each inode once.",
    ),
}


def page(rule_id: str) -> str:
    """Return the documentation page of a rule, in Markdown."""
    rule = RULES[rule_id]
    helped = f"## How to see that it helped\n\n{rule.helped}\n\n" if rule.helped else ""
    known = f"## How this is known\n\n{rule.known}\n\n" if rule.known else ""
    return (
        f"# {rule_id}: {rule.title}\n\nSeverity: {rule.severity}.\n\n{rule.means}\n\n## Why it matters\n\n"
        f"{rule.matters}\n\n## What to do\n\n{rule.advice}\n\n{helped}## Real case\n\n{rule.case}\n\n"
        f"{known}## Source\n\n{rule.source}\n"
    )
