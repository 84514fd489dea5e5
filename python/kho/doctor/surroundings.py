"""Detects the environment of a kernel: architecture, container and boot loader."""

from __future__ import annotations

import os
import re

from . import bootline, layout
from .facts import Amount, Facts
from .kernellog import Evidence
from .tree import Tree, clean

ARCHITECTURES = {
    "amd64": "x86_64",
    "x86_64": "x86_64",
    "arm64": "aarch64",
    "aarch64": "aarch64",
    "powerpc64le": "ppc64le",
    "ppc64el": "ppc64le",
    "ppc64le": "ppc64le",
    "powerpc64": "ppc64",
    "ppc64": "ppc64",
    "powerpc": "ppc",
    "ppc": "ppc",
    "riscv64": "riscv64",
    "riscv32": "riscv32",
    "s390x": "s390x",
    "s390": "s390",
    "i386": "i686",
    "i486": "i686",
    "i586": "i686",
    "i686": "i686",
    "686": "i686",
    "686-pae": "i686",
    "armhf": "armv7l",
    "armmp": "armv7l",
    "armv5tel": "armv5tel",
    "armv6l": "armv6l",
    "armv7l": "armv7l",
    "armv7hl": "armv7l",
    "armv8l": "armv7l",
    "arm": "armv7l",
    "loongarch64": "loongarch64",
    "loong64": "loongarch64",
    "mips": "mips",
    "mips64": "mips64",
    "mips64el": "mips64",
    "mipsel": "mips",
    "sparc64": "sparc64",
    "parisc": "parisc",
    "parisc64": "parisc64",
    "alpha": "alpha",
    "m68k": "m68k",
}
"""Names of architectures in packages, compilers and uname, mapped to the name that `uname -m` prints."""
NAMES = "|".join(sorted(ARCHITECTURES, key=len, reverse=True))
WORDS = ("alpha", "arm", "ppc", "m68k", "parisc", "mips")
"""Names that a release may contain without being the architecture: 7.1.0-alpha."""
RELEASES = "|".join(name for name in sorted(ARCHITECTURES, key=len, reverse=True) if name not in WORDS)
IN_RELEASE = re.compile(rf"[.\-_+]({RELEASES})(?=[.\-_+]|$)")
COMPILER = re.compile(rf"\(({NAMES})(?:-[a-z0-9]+)?-linux(?:-gnu\w*|-musl\w*|-android\w*)?-(?:gcc|clang|ld)")
CPUINFO = (
    (re.compile(rb"^isa\s*: rv64", re.MULTILINE), "riscv64"),
    (re.compile(rb"^isa\s*: rv32", re.MULTILINE), "riscv32"),
    (re.compile(rb"^vendor_id\s*: IBM/S390", re.MULTILINE), "s390x"),
    (re.compile(rb"^cpu\s*: (?:POWER|PPC|e\d{3}|7\d{3})", re.MULTILINE), "ppc64le"),
    (re.compile(rb"^CPU architecture\s*: [4-7]\b", re.MULTILINE), "armv7l"),
    (re.compile(rb"^CPU Family\s*: Loongson", re.MULTILINE), "loongarch64"),
    (re.compile(rb"^cpu model\s*: (?:MIPS|ICT|Cavium)", re.MULTILINE), "mips"),
)
"""Lines of /proc/cpuinfo that identify an architecture with certainty."""
KHO_ARCHITECTURES = ("x86_64", "aarch64")
"""Architectures that select ARCH_SUPPORTS_KEXEC_HANDOVER in every release from `FIRST` to `KNOWN_TO`."""
FIRST, KNOWN_TO = (6, 16), (7, 3)


def version(release: str | None) -> tuple[int, int] | None:
    """Return major and minor version of a release; None if it does not begin with them."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release or "")
    return (int(match[1]), int(match[2])) if match is not None else None


BACKPORTS = re.compile(
    r"\.el\d|uek|\.amzn\d|azl\d|-default$|\+$|-(?:nvidia|gke|gkeop|gcp|aws|azure|oracle|ibm|tegra)(?:-|$)"
)
"""Releases of vendors that backport features of newer kernels to their long-term kernels."""


def may_have_backport(facts: Facts) -> bool:
    """Return whether the kernel is older than 6.16, but of a vendor that may have backported KHO."""
    release = facts.release.text if facts.release is not None else None
    numbers = version(release)
    return numbers is not None and (5, 14) <= numbers < FIRST and BACKPORTS.search(release or "") is not None


def why_no_kho(facts: Facts) -> str | None:
    """Return why upstream Linux of this release or architecture has no KHO; None if it may have it."""
    release = facts.release.text if facts.release is not None else None
    numbers = version(release)
    if numbers is not None and numbers < FIRST:
        return f"Linux {release} is older than 6.16"
    name = facts.architecture.text if facts.architecture is not None else None
    if name is not None and name not in KHO_ARCHITECTURES and (numbers is None or numbers <= KNOWN_TO):
        return f"Linux supports KHO on x86_64 and arm64, this machine is {name}"
    return None


def architecture(tree: Tree, facts: Facts) -> None:
    """Determine the architecture from the best source that names a known one."""
    for name, seen in _architectures(tree, facts):
        known = ARCHITECTURES.get(name)
        if known is not None:
            facts.architecture = seen._replace(text=known)
            return


def _architectures(tree: Tree, facts: Facts) -> list[tuple[str, Evidence]]:
    """Return the architecture according to each source, best first."""
    found = []
    for file in ("proc/sys/kernel/arch", "architecture"):
        piece = layout.read(tree, file, 64)
        if piece is not None:
            found.append((clean(piece.head), Evidence(piece.file, piece.line(0), clean(piece.head))))
    for file in ("sos_commands/kernel/uname_-a", "insights_commands/uname_-a", "uname", "uname.txt", "uname_-a"):
        piece = layout.read(tree, file, 4096)
        if piece is None:
            continue
        text = clean(piece.head.split(b"\n")[0])
        named = [word for word in text.split()[2:] if word in ARCHITECTURES]
        found += [(named[-1], Evidence(piece.file, piece.line(0), text))] if named else []
    if facts.release is not None and (match := IN_RELEASE.search(facts.release.text)):
        found.append((match[1], facts.release))
    if facts.banner is not None and (match := COMPILER.search(facts.banner)):
        found.append((match[1], Evidence("proc/version", 1, facts.banner)))
    piece = layout.read(tree, "proc/cpuinfo", 1 << 16)
    if piece is not None:
        for pattern, name in CPUINFO:
            match_b = pattern.search(piece.head)
            if match_b is not None:
                found.append((name, Evidence(piece.file, piece.line(match_b.start()), clean(match_b[0]))))
                break
    if tree.live and hasattr(os, "uname") and not os.uname().machine.startswith(("i", "armv8")):
        found.append((os.uname().machine, Evidence("uname -m", None, os.uname().machine)))
    return found


CGROUP = re.compile(
    rb":[^:\n]*:[^\n]*(?:/docker[/-]|/kubepods|/lxc(?:\.payload)?[/.]|/libpod[-/]|/cri-containerd|/ecs/|/garden/|/machine\.slice/"
    rb"(?:libpod|machine-)|/system\.slice/containerd\.service/|/podman)"
)
RUNTIMES = re.compile(
    rb"lowerdir\+?=[^ \n]*(?:/docker/|/containerd|containers/storage|/podman/|/buildkit|/kubelet/|/lxc/|/incus/)"
)
ROOT_MOUNT = re.compile(rb"^\d+ \d+ \d+:\d+ (\S+) / [^\n]*? - (\S+) (\S+) ?([^\n]*)$", re.MULTILINE)
ROOT_OLD = re.compile(rb"^(\S+) / (\S+) ([^\n]*)$", re.MULTILINE)
MARKERS = ("run/.containerenv", ".dockerenv", "run/systemd/container", "dev/.lxc-boot-id")
SLACK = 16 << 20
"""Bytes by which two counters of free pages may differ, because each is a sum of per-CPU counters."""


def container(tree: Tree, facts: Facts) -> None:
    """Determine whether this is a container, and whether meminfo mixes its figures with those of its host."""
    facts.container = _container(tree)
    _detect_mixed_figures(facts)
    if facts.container is not None and "lxcfs" in facts.container.text and facts.mixed is None:
        facts.mixed = "lxcfs shows the container's limit in proc/meminfo"
    if facts.mixed is not None:
        facts.of_container, facts.mem_total, facts.mem_free = facts.mem_total, None, None


def _container(tree: Tree) -> Evidence | None:
    """Return the evidence that this is a container: proof, or a marker file without evidence against it."""
    for file, pattern in (
        ("proc/1/environ", rb"(?:^|\0)container=(?!wsl)\w+"),
        ("proc/self/mountinfo", rb"^[^\n]* /proc/meminfo [^\n]* - fuse\.lxcfs [^\n]*"),
        ("proc/1/mountinfo", rb"^[^\n]* /proc/meminfo [^\n]* - fuse\.lxcfs [^\n]*"),
        ("proc/mounts", rb"^lxcfs /proc/meminfo [^\n]*"),
        ("proc/self/cgroup", CGROUP.pattern),
        ("proc/1/cgroup", CGROUP.pattern),
    ):
        text = tree.peek(file, 1 << 18) if tree.exists(file) else b""  # processes of other users are not readable
        match = re.search(pattern, text, re.MULTILINE)
        if match is not None:
            return Evidence(file, text.count(b"\n", 0, match.start()) + 1, clean(match[0].strip(b"\0")))
    source, kind, options, root = _root_mount(tree)
    if source is not None and (RUNTIMES.search(options) or source.startswith(b"/dev/mapper/docker-")):
        return Evidence("proc/self/mountinfo", None, clean(kind + b" / " + options)[:200])
    if _in_initial_pid_namespace(tree) or (
        source is not None and source.startswith(b"/dev/") and kind != b"overlay" and root == b"/"
    ):
        return None  # kernel threads are visible, or / is a whole disk: a machine booted from a container's image
    for file in MARKERS if tree.live or kind == b"overlay" else ():
        if tree.stat(file) is None:
            continue
        piece = tree.read(file, 256) if file == "run/systemd/container" else None
        if piece is None or piece.head.strip() != b"wsl":
            return Evidence(file, None, "is there")
    return None


def _root_mount(tree: Tree) -> tuple[bytes | None, bytes, bytes, bytes]:
    """Return source, type, options and root directory of the mount at /."""
    for file in ("proc/self/mountinfo", "proc/1/mountinfo"):
        found = ROOT_MOUNT.findall(tree.peek(file, 1 << 18)) if tree.exists(file) else []
        if found:
            root, kind, source, options = found[-1]
            return source, kind, options, root
    old = ROOT_OLD.findall(tree.peek("proc/mounts", 1 << 18)) if tree.exists("proc/mounts") else []
    return (old[-1][0], old[-1][1], old[-1][2], b"/") if old else (None, b"", b"", b"")


def _in_initial_pid_namespace(tree: Tree) -> bool:
    """Return whether proc/ is of the initial PID namespace, where process 2 is kthreadd."""
    return tree.exists("proc/2/comm") and tree.peek("proc/2/comm", 64).strip() == b"kthreadd"


def _detect_mixed_figures(facts: Facts) -> None:
    """Compare a figure with the one that includes it: lxcfs replaces MemTotal and MemFree, but not CmaFree."""
    total, free, cma = facts.mem_total, facts.mem_free, facts.cma_free
    slack = max(SLACK, (total.bytes if total is not None else 0) >> 8)
    if cma is not None and free is not None and cma.bytes > free.bytes + slack:
        facts.mixed = f"CmaFree ({cma.bytes >> 10} kB) exceeds MemFree ({free.bytes >> 10} kB), which includes it"
    for part, name in ((cma, "CmaFree"), (facts.cma_total, "CmaTotal")):
        if part is not None and total is not None and part.bytes > total.bytes + (slack if total.bytes > SLACK else 0):
            facts.mixed = f"{name} ({part.bytes >> 10} kB) exceeds MemTotal ({total.bytes >> 10} kB), which includes it"
    if facts.mixed is None and _is_unexplained(facts):
        free_kb, total_kb = ((cma.bytes if cma else 0) >> 10), ((total.bytes if total else 0) >> 10)
        facts.mixed = f"CmaFree ({free_kb} kB) is most of MemTotal ({total_kb} kB), and no parameter explains it"
    managed = sum(zone.managed for zone in facts.zones) * 4096
    if total is not None and total.bytes * 2 < managed:
        facts.mixed = f"MemTotal ({total.bytes >> 10} kB) is less than half of the memory in zoneinfo's zones"


def _is_unexplained(facts: Facts) -> bool:
    """Return whether more than half of MemTotal is free in CMA outside CmaTotal, without an explanation.

    Scratch has this size only if kho_scratch= requests it, or if huge pages reserved at boot inflate a percentage.
    """
    total, cma = facts.mem_total, facts.cma_free
    huge = facts.hugetlb is not None and facts.hugetlb.bytes > 0
    if (
        total is None
        or cma is None
        or facts.zones
        or huge
        or facts.cmdline is None
        or "kho_scratch=" in facts.cmdline.text
    ):
        return False
    others = facts.cma_total.bytes if facts.cma_total is not None else 0
    return (cma.bytes - others) * 2 > total.bytes


def boot_loaders(tree: Tree, facts: Facts) -> None:
    """Detect the boot loader by its files, the distribution and the command line."""
    if facts.container is not None or facts.mixed is not None:
        return  # files of a container do not belong to the machine's boot
    names = []
    for file in ("etc/os-release", "usr/lib/os-release", "etc/initrd-release", "os_info", "os-release"):
        piece = layout.read(tree, file, 1 << 14)
        if piece is not None:
            names.append(piece.head.decode("utf-8", "replace"))
    line = facts.cmdline.text if facts.cmdline is not None else ""
    release = facts.release.text if facts.release is not None else ""

    def there(file: str) -> bool:
        if file in tree.kept:
            return True
        if "*" not in file:
            return tree.exists(file) and tree.stat(file) is not None
        folder, _, name = file.rpartition("/")
        ending = name.removeprefix("*")
        return tree.exists(folder) and any(each.endswith(ending) for each in tree.names(folder))

    facts.platforms = bootline.detect(there, "\n".join(names), line, release)


TMPFS = re.compile(rb"^\S+ (/dev/shm|/tmp|/run) tmpfs (\S+)", re.MULTILINE)
SHARES = {"/dev/shm": 2, "/tmp": 2, "/run": 5}
"""The part of RAM that systemd and the kernel give to a tmpfs."""
MISSING = 8 << 20
"""Bytes from which a tmpfs is smaller than its part: counters of the boot differ by less."""


def small_tmpfs(tree: Tree, facts: Facts) -> None:
    """Find each tmpfs that has less than its usual part of MemTotal: memory was missing when it was mounted.

    /proc/mounts has `size=` of a tmpfs where it differs from half of the RAM of now, or was asked for.
    """
    total = facts.mem_total.bytes if facts.mem_total is not None else None
    file = "proc/mounts" if tree.exists("proc/mounts") else "proc/self/mounts"
    text = tree.peek(file, 1 << 18) if total is not None and tree.exists(file) else b""
    for match in TMPFS.finditer(text):
        given = re.search(rb"(?:^|,)size=(\d{1,15})k(?:,|$)", match[2])
        point = match[1].decode()
        part = (total or 0) // SHARES[point]
        if given is not None and 0 < (nbytes := int(given[1]) << 10) < part - MISSING and nbytes > part // 2:
            line = text.count(b"\n", 0, match.start()) + 1
            facts.small_tmpfs.append((point, nbytes, part, Evidence(file, line, clean(match[0]))))


def managed_memory(facts: Facts) -> Amount | None:
    """Return the managed memory of all zones; None if there are none or the page size is only assumed."""
    managed = sum(zone.managed for zone in facts.zones)
    if not managed or facts.page_size_from == "assumed":
        return None
    return Amount(managed * facts.page_size, facts.zones[0].seen._replace(text=f"managed pages: {managed}"))
