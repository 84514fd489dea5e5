"""What `kho doctor` looks for: rules, by ids that stay, each with the case it comes from.

`docs/doctor/` has a page for each, made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._types import SEVERITIES, Severity

__all__ = ["RULES", "SEVERITIES", "Rule", "page"]


@dataclass(frozen=True)
class Rule:
    """What a finding of one kind means. Errors and warnings are notable; notes explain."""

    severity: Severity
    title: str
    means: str
    """What was found."""
    matters: str
    """What comes of it."""
    advice: str
    """What to do."""
    case: str
    """The kind of real machine it was seen on."""
    source: str
    """Where it is written."""

    @property
    def explanation(self) -> str:
        """Give everything there is to say, as paragraphs."""
        return (
            f"{self.means}\n\nWhy it matters: {self.matters}\n\nWhat to do: {self.advice}\n\n"
            f"Real case: {self.case}\n\nSource: {self.source}"
        )


CORE = "kernel/liveupdate/kexec_handover.c"
RESERVE = f"{CORE}, kho_reserve_scratch"
OFF = "If nothing on this machine uses live update, boot with kho=off"
SIZES = "kho_scratch=LOW,GLOBAL,PERNODE gives it sizes of your own (kho doctor --what-if kho_scratch=64M,256M,64M)"
GUEST = "the hosts/ captures: 2 GiB guests of Linux 7.3"

RULES: dict[str, Rule] = {
    "DOC001": Rule(
        "warning",
        "scratch memory is held",
        "KHO is active and keeps areas of memory in which the next kernel can boot. They are pageblocks of type CMA "
        "that CmaTotal does not count: CmaFree is larger than CmaTotal.",
        "Only movable memory can live there: page cache and memory of processes. Kernel memory, page tables, huge page "
        "reservations at boot and long-term pins cannot. Free memory looks larger than what is of use.",
        f"{OFF}; all of it comes back. Else {SIZES}.",
        "Ubuntu's 7.0 kernels have KHO on by default. A database image for 800 MiB cloud VMs lost about 128 MiB to it "
        "(532 of 800 MiB were available at boot, 666 with kho=off), and now ships kho=off.",
        f"{RESERVE}, kho_init",
    ),
    "DOC002": Rule(
        "warning",
        "scratch is a large share of RAM",
        "Scratch takes a tenth of the memory, or more.",
        "Kernel memory has to fit into the rest. Small and busy guests run out of memory while MemFree still shows "
        "plenty: all of it is scratch.",
        f"{OFF}. Else {SIZES}: the next kernel needs about what it reserves while booting (dmesg: Memory: ... "
        "reserved), not four times that.",
        "128 MiB of an 800 MiB cloud VM (16 %); guests under a hypervisor whose out-of-memory killer came early.",
        f"{CORE}, scratch_size_update: 200 % of what was reserved, in low memory or anywhere, and again per node",
    ),
    "DOC003": Rule(
        "error",
        "reservation failed, KHO disabled itself",
        "The kernel could not reserve one of the scratch areas, gave up KHO for this boot and went on without.",
        "Nothing can be handed over, and /dev/liveupdate does not work, whatever the command line asks for.",
        "Ask for areas that fit: LOW below 4 GiB, GLOBAL and PERNODE each in one piece on the memory there is. Or say "
        "kho=off, if nobody needs it.",
        "Workstations and servers with hundreds of GiB, where 200 % of the memory reserved below 4 GiB is not free in "
        "one piece below 4 GiB: 'Failed to reserve lowmem scratch buffer' at each boot of Ubuntu 7.0. Here: "
        "kho_scratch=64M,3G,64M on 2 GiB.",
        f"{RESERVE}: err_disable_kho",
    ),
    "DOC004": Rule(
        "warning",
        "memory stayed behind in CMA",
        "There are CMA pageblocks that belong to nobody: a reservation of scratch failed, and the areas reserved "
        "before it were given back with the type CMA still on them.",
        "Kernel memory and long-term pins cannot use them until the next boot, though KHO is off and holds nothing.",
        "Boot with kho=off, or with sizes that fit, so that no reservation fails half-way.",
        "kho_scratch=64M,3G,64M on a 2 GiB guest: the first area's 64 MiB stayed behind; zoneinfo does not count them "
        "as CMA, pagetypeinfo and CmaFree do.",
        f"{RESERVE}: err_free_scratch_areas; mm/mm_init.c",
    ),
    "DOC005": Rule(
        "error",
        "kho_scratch= is rejected",
        "The kernel cannot read the value of kho_scratch= and ignores it.",
        "An earlier kho_scratch= that it can read stays in force, else the default of 200 %: scratch is not the size "
        "somebody wanted it to be.",
        "Write N% or LOW,GLOBAL,PERNODE: three sizes with K, M, G, T, P or E, no spaces, no decimals, nothing behind.",
        "Examples of early versions of the patches had one size (512M) or two (512M,512M), and still stand in "
        "documentation that is found first.",
        f"{CORE}, kho_parse_scratch_size; ABI section 5",
    ),
    "DOC006": Rule(
        "warning",
        "kho_scratch= is not read as it looks",
        "The kernel accepts the value of kho_scratch= and understands something else than most readers: a leading 0 is "
        "octal, a number without a suffix is bytes, beyond 64 bits it wraps, and older kernels ignore what follows "
        "the third size.",
        "Areas come out smaller or larger than meant, without any message.",
        "Write decimal numbers with a suffix, and nothing behind the third.",
        "064M is 52 MiB; 64,256,64 is three pageblocks; 64M,256M,64MB was fine until kernels looked at the B.",
        "lib/cmdline.c, memparse; ABI section 5",
    ),
    "DOC007": Rule(
        "warning",
        "kho= is not understood",
        "The value of kho= is none that kstrtobool knows, so it changes nothing.",
        "KHO stays as the kernel's default or an earlier kho= has it: on, where somebody wanted it off.",
        "Write kho=on or kho=off.",
        "`kho` without a value, or kho=auto, as other parameters take it.",
        f"{CORE}, kho_parse_enable; lib/kstrtox.c, kstrtobool",
    ),
    "DOC008": Rule(
        "note",
        "kho_scratch= has no effect",
        "KHO is off, or a later kho_scratch= counts, or this kernel was booted by a handover and took over the "
        "areas of the one before.",
        "The sizes on the command line are not those that are in force.",
        "Nothing, or take it away; sizes change with a cold boot.",
        "The second boot of a chain keeps the first one's areas, whatever its own command line asks for.",
        f"{CORE}, kho_memory_init; ABI section 5",
    ),
    "DOC009": Rule(
        "warning",
        "scratch too small for the next boot",
        "All scratch together is smaller than what this kernel reserved while it booted.",
        "The next kernel has nothing but scratch until it has read the map: page structures, hash tables, per-CPU "
        "memory and huge pages reserved at boot must fit. It panics if they do not.",
        f"Give it at least what the kernel reserves while booting (dmesg: Memory: ... reserved). {SIZES}.",
        "Explicit sizes copied from a small test guest: 16M,32M,16M suits a 256 MiB guest, not one with 8 GiB, whose "
        "page structures alone take 128 MiB.",
        f"mm/memblock.c, memblock_set_kho_scratch_only; {CORE}, kho_populate",
    ),
    "DOC010": Rule(
        "warning",
        "scratch inflated by what was reserved at boot",
        "The size of scratch is a percentage of all memory reserved while booting, and gigantic pages or a crash "
        "kernel are part of it: each byte counts N % in low or global scratch, and N % again per node.",
        "With the default of 200 %, a 1 GiB page may cost 4 GiB of scratch; or the reservation fails. Newer kernels "
        "leave huge pages out, and still count the crash kernel.",
        f"Give sizes instead of the percentage; {SIZES}. Or reserve gigantic pages after boot.",
        "hugepagesz=1G hugepages=N hosts of virtual machines. Huge pages of 2 MiB are allocated later and do not "
        "count: the capture with hugepages=600 has the same scratch as the one without.",
        f"{CORE}, scratch_size_update: memblock_reserved_kern_size",
    ),
    "DOC011": Rule(
        "note",
        "huge pages hold memory too",
        "Huge pages were set aside. They are not scratch, and not KHO's doing.",
        "They take memory from MemFree and MemAvailable just the same; two causes look like one.",
        "Look at hugepages= on the command line and vm.nr_hugepages if that is not wanted.",
        "hugepages=600 on a 2 GiB guest: 1200 MiB are huge pages, 192 MiB are scratch.",
        "Documentation/admin-guide/mm/hugetlbpage.rst",
    ),
    "DOC012": Rule(
        "note",
        "CMA areas of others",
        "CmaTotal is what cma=, hugetlb_cma= and drivers reserved. It is not scratch: scratch is outside CmaTotal.",
        "The same rules hold for both, movable memory only, so both weigh on kernel memory and pins.",
        "Look at cma= and hugetlb_cma= on the command line, and at reserved-memory in the devicetree.",
        "A workstation with CmaTotal 32 MiB, from the kernel's default, and 9.3 GiB in CmaFree: the 32 MiB were "
        "blamed.",
        "mm/cma.c: totalcma_pages",
    ),
    "DOC013": Rule(
        "warning",
        "long-term pins at risk",
        "There are devices or drivers that pin memory for long (RDMA, VFIO, GPUs), and memory in CMA pageblocks, which "
        "cannot be pinned for long: each such page has to be moved out first.",
        "Under pressure there is nowhere to move to: registration of memory fails with ENOMEM or EAGAIN while MemFree "
        "shows gigabytes.",
        f"{OFF}. Else {SIZES}, and leave as much memory free outside.",
        "Two 128 GB workstations (GB10, ConnectX-7): 9.36 GiB of scratch, ibv_reg_mr fails with ENOMEM under GPU "
        "memory pressure, NCCL does not start. With kho=off all 4096 registrations pass.",
        "mm/gup.c, migrate_longterm_unpinnable_folios",
    ),
    "DOC014": Rule(
        "note",
        "on by default",
        "Nobody asked for KHO on the command line: the kernel was built with CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT.",
        "Memory is held on machines whose owners never heard of it, since an upgrade of the kernel.",
        f"{OFF}.",
        "Ubuntu's 7.0 HWE kernels brought it to machines that had run 6.x without; vendors turn the default off in "
        "their own builds.",
        "kernel/liveupdate/Kconfig",
    ),
    "DOC015": Rule(
        "note",
        "KHO is off",
        "KHO is not enabled on this boot: the command line or the kernel's default says so, or all CMA memory is "
        "counted and none is scratch. That no free CMA memory is seen is no sign of it while memory is full.",
        "It holds no memory, and nothing can be handed over. A kernel that was booted by a handover keeps the scratch "
        "it was handed, with kho=off, too.",
        "Nothing; kho=on enables it.",
        f"kho=off behind kho=on, as a vendor's package adds it: the last one wins ({GUEST}).",
        f"{CORE}, kho_parse_enable",
    ),
    "DOC016": Rule(
        "note",
        "KHO is not built in",
        "This kernel has no KHO: its configuration says so, it is older than Linux 6.16, it is of an architecture "
        "other than x86_64 and arm64, or it has no CMA, without which there is no KHO.",
        "Whatever takes memory here, it is not KHO: CMA memory outside CmaTotal is a vendor's driver's. Only of a 6.x "
        "kernel it is a guess, since vendors bring features to the kernels that they keep for long.",
        "Nothing.",
        "Most machines.",
        "kernel/liveupdate/Kconfig: KEXEC_HANDOVER selects CMA; ARCH_SUPPORTS_KEXEC_HANDOVER in arch/x86, arch/arm64",
    ),
    "DOC017": Rule(
        "note",
        "booted by a handover",
        "This kernel was started by kexec and took over memory from the one before, its scratch areas among it.",
        "What was preserved and never restored stays reserved until the next cold boot.",
        "Nothing; kho verify checks what was handed over.",
        "The second kernel of a chain; from 7.1 on it says from which release, and how many there were.",
        f"{CORE}, kho_populate; kexec-metadata, ABI section 6",
    ),
    "DOC018": Rule(
        "warning",
        "a handover was refused",
        "There was data of a previous kernel, and this one could not use it; it booted cold.",
        "Everything that was preserved is lost.",
        "Boot kernels that write the same compatible one after the other. 'is invalid: -9' on 6.16 and 6.17 only says "
        "that the kernel before was never finalized: harmless, fixed in stable.",
        "'KHO: setup: handover FDT (0x10116b000) is invalid: -9' and 'disabling KHO revival: -22' after any kexec of "
        "6.17 with KHO on.",
        f"{CORE}, kho_populate",
    ),
    "DOC019": Rule(
        "warning",
        "finalized and forgotten",
        "debugfs out/finalize is 1 (Linux 6.16 to 6.18): the map was written, and no kexec came.",
        "Until it is undone nothing can be preserved or released: callers get EBUSY.",
        "kexec now, or abort: echo 0 > /sys/kernel/debug/kho/out/finalize.",
        "A live update that was prepared and cancelled; the 6.18 captures before their kexec.",
        "kernel/kexec_handover.c, kho_out_finalize_set; ABI section 2",
    ),
    "DOC020": Rule(
        "note",
        "preserved for the next kernel",
        "Producers have put subtrees into the handover.",
        "The memory behind them stays where it is across kexec; this is KHO at work.",
        "kho inspect says what is in them, from debugfs or memory.",
        "LUO, kexec-metadata, memblock (reserve_mem=), kho_test in the captures.",
        f"{CORE}, kho_add_subtree",
    ),
    "DOC021": Rule(
        "note",
        "live update is not there",
        "The command line asks for liveupdate=on, and the kernel did not provide it.",
        "systemd and virtual machine monitors that count on /dev/liveupdate restart instead of carrying on.",
        "Enable KHO (kho=on) with scratch that fits.",
        "liveupdate=on with kho=off: 'luo: Disabling liveupdate because KHO is disabled'.",
        "kernel/liveupdate/luo_core.c",
    ),
    "DOC022": Rule(
        "note",
        "live update is there",
        "The kernel has /dev/liveupdate, the door of the Live Update Orchestrator.",
        "Who opens it preserves files for the next kernel; one process at a time. Sessions live as long as their "
        "descriptors are open. This is what scratch is for.",
        "Do not take KHO away before you know who uses it.",
        "systemd 261 keeps its descriptor store in a session.",
        "kernel/liveupdate/luo_core.c; ABI section 7",
    ),
    "DOC023": Rule(
        "warning",
        "figures disagree",
        "What debugfs says of scratch, and what CMA pageblocks or CmaFree come to, differ by more than rounding.",
        "One of them is of another moment or machine, or there is CMA memory that neither KHO nor CmaTotal explains.",
        "Take the snapshot again, all files at once.",
        "Snapshots put together from several collections; Android and vendor kernels with CMA of their own.",
        "kho.doctor.scratch",
    ),
    "DOC024": Rule(
        "note",
        "this is a container",
        "The figures are those of the machine the container runs on. lxcfs shows the container's limit as MemTotal and "
        "MemFree, and the host's CmaTotal and CmaFree in the same file: then CmaFree may be larger than MemFree, of "
        "which it is part.",
        "Nothing can be changed from in here: the command line and the boot loader are the host's. Figures of two "
        "machines are not divided, so no share of RAM is given.",
        "Run kho doctor on the host. With a provider's containers only the provider can change the boot line.",
        "A container of 512 MiB on a host with 1.9 GiB of scratch: 375 % of RAM. A virtual machine whose image was "
        "made from a container's has a .dockerenv, and is none: kthreadd is process 2 there, or / is a whole disk.",
        "lxcfs, src/proc_fuse.c; container= of /proc/1/environ, cgroups, mounts; run/.containerenv, .dockerenv",
    ),
    "DOC025": Rule(
        "warning",
        "asked for, and not there",
        "The command line says kho=on, and KHO holds nothing: this kernel was built without it, or it disabled itself "
        "and gave back what it had.",
        "It takes no memory, but who asked for it counts on a live update that will not happen; kexec boots cold.",
        "dmesg | grep KHO tells why it disabled itself, grep KEXEC_HANDOVER /boot/config-$(uname -r) whether it is "
        "built in. Give it sizes that fit, or take kho=on away.",
        "Boot lines carried on to a kernel of another vendor, who turns CONFIG_KEXEC_HANDOVER off; machines whose "
        "kernel log has been overwritten since the reservation failed.",
        f"{CORE}, kho_parse_enable; kernel/liveupdate/Kconfig",
    ),
}


def page(rule_id: str) -> str:
    """Write a rule's page of documentation."""
    rule = RULES[rule_id]
    return (
        f"# {rule_id}: {rule.title}\n\nSeverity: {rule.severity}.\n\n{rule.means}\n\n## Why it matters\n\n"
        f"{rule.matters}\n\n## What to do\n\n{rule.advice}\n\n## The case it comes from\n\n{rule.case}\n\n"
        f"## Source\n\n{rule.source}\n"
    )
