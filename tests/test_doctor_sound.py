"""With fewer files the answer of `kho doctor` is weaker and never contradicts the full one: all hosts, all subsets."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kho.doctor import RULES, Report, examine

from command import kho
from doctor_hosts import HOSTS, MIB, edit, machine, write
from doctor_numa import GIB, Machine

CAPTURES = HOSTS.parent
SOURCES = {
    "meminfo": ("proc/meminfo",),
    "version": ("proc/version", "proc/sys/kernel/osrelease"),
    "cmdline": ("proc/cmdline",),
    "log": ("var/log/dmesg",),
    "zoneinfo": ("proc/zoneinfo",),
    "pagetypeinfo": ("proc/pagetypeinfo",),
    "debugfs": ("sys/kernel/debug",),
    "config": ("boot",),
    "iomem": ("proc/iomem",),
    "vmstat": ("proc/vmstat", "proc/buddyinfo", "sys/kernel/mm"),
}
"""Files that are collected together."""
FEW = ("meminfo", "version", "cmdline", "log", "zoneinfo", "pagetypeinfo", "debugfs")
AREAS = ((0x60000000, 300 * MIB), (0x1_4000_0000, 5 * GIB), (0x2_C000_0000, 4 * GIB), (68 * GIB, 1 * GIB))
OTHERS = ((0x3_0000_0000, 128 * MIB), (70 * GIB, 64 * MIB))
HANDED = "KHO: found kexec handover data."
FAILED = (
    "KHO: Failed to reserve global scratch buffer",
    "KHO: Failed to reserve scratch area, disabling kexec handover",
)
CONFIG = "CONFIG_CMA=y\nCONFIG_KEXEC_HANDOVER=y\nCONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y\n"
NUMA: dict[str, Machine] = {
    "on": Machine(areas=AREAS),
    "on, all in use": Machine(areas=AREAS, used=10 * GIB + 300 * MIB),
    "on, and others": Machine(areas=AREAS, others=OTHERS, used=3 * GIB, cmdline="kho=on cma=192M"),
    "off, and others": Machine(others=OTHERS, used=100 * MIB, cmdline="kho=off cma=192M"),
    "handed over": Machine(areas=AREAS, cold=False, messages=[HANDED], used=2 * GIB),
    "handed over, all in use": Machine(areas=AREAS, cold=False, messages=[HANDED], used=10 * GIB + 300 * MIB),
    "handed over, kho=off": Machine(areas=AREAS, cold=False, messages=[HANDED], cmdline="kho=off"),
    "handed over, sizes": Machine(
        areas=AREAS, cold=False, messages=[HANDED], cmdline="kho=on kho_scratch=1G,20G,1G", used=9 * GIB
    ),
    "failed": Machine(areas=AREAS[:2], cold=False, messages=FAILED, cmdline="kho=on"),
    "failed, nothing left": Machine(cold=False, messages=FAILED, cmdline="kho=on"),
}
KNOWN = {
    **{path.name: path for path in sorted(HOSTS.iterdir()) if path.is_dir()},
    **{
        f"{capture}-{stage}": CAPTURES / capture / "host" / stage
        for capture in ("linux-6.16-layout-x86_64", "linux-6.18.15-x86_64", "linux-7.3.4-x86_64")
        for stage in ("stage1", "stage2")
    },
}


@cache
def build_host(name: str, base: Path) -> Path:
    """Return the complete tree of a host."""
    if name in KNOWN:
        return KNOWN[name]
    tree = base / name.replace(" ", "-").replace(",", "")
    NUMA[name].with_debugfs(tree) if name.startswith(("on", "handed")) else NUMA[name].write(tree)
    if "all in use" in name:
        text = (tree / "proc/meminfo").read_text()
        write(tree, "proc/meminfo", re.sub(r"MemFree: +\d+", "MemFree: 2000000", text))
    return write(tree, "boot/config-7.3.4", CONFIG)


def copy_sources(tree: Path, to: Path, sources: tuple[str, ...]) -> Path:
    """Copy the files of some sources."""
    to.mkdir(parents=True)
    for source in sources:
        for file in SOURCES[source]:
            place = tree / file
            if place.is_dir():
                shutil.copytree(place, to / file)
            elif place.is_file():
                write(to, file, place.read_bytes())
    return to


def closed_bytes(report: Report) -> int:
    """Return the bytes that kernel memory cannot use: scratch and leftover."""
    return (report.scratch or 0) + (report.leftover or 0)


def assert_weaker(less: Report, whole: Report) -> None:
    """Assert that a report of fewer files is weaker than the report of all files and does not contradict it."""
    closed = closed_bytes(whole)
    said = (less.state, whole.state, less.headline)
    if less.state in ("off", "absent"):
        assert closed == 0 or less.scratch_high is None, said
        assert closed == 0 or less.exit_code or "kho=off" in (less.cmdline or ""), said
    elif less.state == "active":
        assert whole.state in ("active", "failed"), said
        if whole.state == "failed" and less.scratch:
            doubt = [f for f in less.findings if f.id == "DOC001"]
            assert (doubt[0].certainty, "failed reservation" in doubt[0].value) == ("guess", True), said
    elif less.state == "failed":
        assert whole.state == "failed", said
    low = less.leftover if less.state == "failed" and less.leftover else less.scratch_low
    if less.state != "failed" or less.leftover:
        assert (low or 0) <= closed or less.state in ("off", "absent"), (low, closed, said)
    if less.state == "active" and less.scratch_high is not None:
        assert closed <= less.scratch_high, said
    if less.exit_code == 0:
        assert whole.exit_code == 0 or closed == 0 or "unless it inherited" in less.headline, said
    if less.headline.endswith("and holds nothing."):
        assert closed == 0, said


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize("name", [*KNOWN, *NUMA])
def test_every_subset_of_the_files_gives_a_weaker_answer(name: str, base: Path, tmp_path: Path) -> None:
    tree = build_host(name, base)
    whole = examine(tree)
    there = [source for source in FEW if any((tree / file).exists() for file in SOURCES[source])]
    subsets = (subset for n in range(len(there) + 1) for subset in itertools.combinations(there, n))
    for i, sources in enumerate(subsets):
        assert_weaker(examine(copy_sources(tree, tmp_path / str(i), sources)), whole)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([*KNOWN, *NUMA]),
    sources=st.sets(st.sampled_from(list(SOURCES))),
    full=st.sampled_from([0.0, 0.2, 0.6, 0.9, 0.99]),
)
def test_less_free_memory_gives_a_weaker_answer(
    name: str, sources: set[str], full: float, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = build_host(name, base)
    less = copy_sources(tree, tmp_path_factory.mktemp("less") / "tree", tuple(sorted(sources)))
    if (less / "proc/meminfo").is_file() and full:
        lines = []
        for line in (less / "proc/meminfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            value = int(rest.split()[0]) if key in ("MemFree", "CmaFree") else None
            lines.append(line if value is None else f"{key}: {int(value * (1 - full))} kB")
        write(less, "proc/meminfo", "\n".join(lines) + "\n")
        if (less / "proc/zoneinfo").is_file():
            (less / "proc/zoneinfo").unlink()  # its counters would be of another time
    assert_weaker(examine(less), examine(tree))


def meminfo(**values: int) -> str:
    return "".join(f"{name}: {value} kB\n" for name, value in values.items())


UBUNTU = "Linux version 7.0.0-31-generic (buildd@bos03) (gcc) #31-Ubuntu SMP PREEMPT_DYNAMIC\n"


@pytest.mark.parametrize("cma_free", [0, 4, 20480, 32768])
@pytest.mark.parametrize(
    "files", [{}, {"proc/cmdline": "quiet\n"}, {"proc/version": UBUNTU}], ids=["", "line", "version"]
)
def test_no_free_scratch_proves_nothing_while_memory_is_full(
    cma_free: int, files: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path, "proc/meminfo", meminfo(MemTotal=127600000, MemFree=2000000, CmaTotal=32768, CmaFree=cma_free))
    for name, content in files.items():
        write(tmp_path, name, content)
    report = examine(tmp_path)
    assert (report.state, report.scratch, report.exit_code) == ("unknown", None, 2)
    assert "proves nothing while 1.6 % of memory is free" in report.headline
    assert "DOC015" not in {finding.id for finding in report.findings}


def test_no_free_scratch_on_an_idle_machine_means_likely_off(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", meminfo(MemTotal=8000000, MemFree=7800000, CmaTotal=0, CmaFree=0))
    report = examine(write(tmp_path, "proc/cmdline", "quiet\n"))
    assert (report.state, report.exit_code) == ("off", 0)
    assert [f.certainty for f in report.findings if f.id == "DOC015"] == ["likely"]


@pytest.mark.parametrize("line", ["quiet", "kho=on", "kho=off"])
def test_a_logged_handover_means_active_although_no_scratch_is_free(line: str, tmp_path: Path) -> None:
    made = Machine(areas=AREAS, cold=False, messages=[HANDED], used=10 * GIB + 300 * MIB, cmdline=line)
    tree = made.write(tmp_path)
    for file in ("proc/zoneinfo", "proc/pagetypeinfo"):
        (tree / file).unlink()
    report = examine(tree)
    assert (report.state, report.boot, report.scratch, report.exit_code) == ("active", "kho", None, 2)
    assert "booted by a handover" in report.headline


def test_logged_sizes_are_exact_although_all_scratch_is_in_use(tmp_path: Path) -> None:
    sizes = ((0x60000000, 16 * MIB), (0x1_4000_0000, 512 * MIB), (0x2_C000_0000, 32 * MIB), (68 * GIB, 32 * MIB))
    said = "KHO: scratch areas: lowmem: 16MiB global: 512MiB pernode: 32MiB"
    tree = Machine(areas=sizes, used=592 * MIB, messages=[said], cmdline="kho=on kho_scratch=16M,512M,32M").write(
        tmp_path
    )
    for file in ("proc/zoneinfo", "proc/pagetypeinfo"):
        (tree / file).unlink()
    report = examine(tree)
    assert (report.state, report.scratch, report.scratch_how) == ("active", 592 * MIB, "exact")


def test_kho_off_with_unexplained_cma_memory_is_unknown(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", meminfo(MemTotal=8000000, MemFree=7000000, CmaTotal=0, CmaFree=600000))
    report = examine(write(tmp_path, "proc/cmdline", "kho=off\n"))
    assert (report.state, report.exit_code) == ("unknown", 1)
    assert {finding.id for finding in report.findings} == {"DOC023"}
    assert "inherited scratch, or an area with another owner" in report.headline


# Two machines' figures, kernels without KHO, containers


LXCFS = meminfo(MemTotal=524288, MemFree=200000, CmaTotal=0, CmaFree=1966080)


def test_a_container_gets_no_share_of_ram(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", LXCFS)
    report = examine(write(tmp_path, "proc/version", UBUNTU))
    ids = {finding.id for finding in report.findings}
    assert (report.scratch, report.share, report.ram, report.container) == (1966080 << 10, None, None, True)
    assert "DOC024" in ids
    assert "DOC002" not in ids
    out = kho("doctor", tmp_path).out
    assert "on the host of this container" in out
    assert "%" not in out.split("\n")[0]
    assert "This is a container: the boot line is that of the host" in out
    assert "update-grub" not in out


@pytest.mark.parametrize(
    "values",
    [
        {"MemTotal": 524288, "MemFree": 200000, "CmaTotal": 0, "CmaFree": 300000},
        {"MemTotal": 524288, "MemFree": 200000, "CmaTotal": 32768, "CmaFree": 400000},
        {"MemTotal": 65536, "MemFree": 60000, "CmaTotal": 2097152, "CmaFree": 30000},
    ],
    ids=["more than is free", "with others", "CmaTotal"],
)
def test_a_figure_larger_than_the_one_that_includes_it_shows_a_container(
    values: dict[str, int], tmp_path: Path
) -> None:
    report = examine(write(tmp_path, "proc/meminfo", meminfo(**values)))
    assert (report.share, report.container) == (None, True)
    assert "DOC024" in {finding.id for finding in report.findings}


@pytest.mark.parametrize("limit", [256, 512, 1024, 2048, 3072])
@pytest.mark.parametrize("idle", [0.1, 0.5, 0.99])
def test_scratch_that_nearly_fills_a_limit_gets_no_share_of_ram(limit: int, idle: float, tmp_path: Path) -> None:
    values = meminfo(MemTotal=limit << 10, MemFree=int((limit << 10) * idle), CmaTotal=0, CmaFree=1966080)
    write(write(tmp_path, "proc/meminfo", values), "proc/cmdline", "ro quiet\n")
    report = examine(tmp_path)
    assert (report.state, report.share) == ("active", None)
    assert "DOC002" not in {finding.id for finding in report.findings}


WHOLE = meminfo(MemTotal=127600000, MemFree=2000000, Percpu=8192, HugePages_Total=0)


@pytest.mark.parametrize("line", ["quiet", "kho=on", "kho=off"])
def test_only_a_complete_meminfo_proves_that_there_is_no_cma(line: str, tmp_path: Path) -> None:
    write(write(tmp_path, "proc/version", UBUNTU), "proc/cmdline", f"{line}\n")
    assert examine(write(tmp_path, "proc/meminfo", WHOLE)).state == "absent"
    lines = WHOLE.splitlines(keepends=True)
    for cut in (lines[:2], lines[:3], lines[:2] + lines[3:]):
        report = examine(write(tmp_path, "proc/meminfo", "".join(cut)))
        assert report.state == ("off" if line == "kho=off" else "unknown"), cut
        assert "and holds nothing." not in report.headline
    report = examine(write(tmp_path, "proc/meminfo", "".join(lines[:2]) + "CmaFree: 0 kB\n"))
    assert report.state == ("off" if line == "kho=off" else "unknown")


@pytest.mark.parametrize(
    "release",
    [
        "5.14.0-570.el9.x86_64",
        "6.12.0-55.el10.aarch64",
        "6.12.0-102.36.5.2.el10uek.x86_64",
        "6.8.0-2031-nvidia",
        "6.6.56+",
    ],
)
def test_an_older_vendor_kernel_may_have_a_backport(release: str, tmp_path: Path) -> None:
    """Vendors backport features of newer kernels to older ones: absent is likely, but unknown with kho=on."""
    write(tmp_path, "proc/meminfo", meminfo(MemTotal=127600000, MemFree=2000000, CmaTotal=0, CmaFree=0))
    write(write(tmp_path, "proc/sys/kernel/osrelease", f"{release}\n"), "proc/cmdline", "quiet\n")
    report = examine(tmp_path)
    assert (report.state, [f.certainty for f in report.findings if f.id == "DOC016"]) == ("absent", ["guess"])
    assert "KHO is likely not in this kernel" in report.headline
    report = examine(write(tmp_path, "proc/cmdline", "kho=on\n"))
    assert (report.state, report.exit_code) == ("unknown", 2)
    assert "its vendor backports features" in report.headline


def test_a_memtotal_below_half_of_the_zones_shows_a_container(tmp_path: Path) -> None:
    tree = machine(tmp_path, nodes=(64 * GIB,), scratch=(2 * GIB,))
    edit(tree, "proc/meminfo", (f"{64 << 20:14} kB", f"{16 << 20:14} kB"), (f"{32 << 20:14} kB", f"{15 << 20:14} kB"))
    report = examine(tree)
    assert (report.scratch, report.container) == (2 * GIB, True)
    assert report.ram in (None, 64 * GIB)


def test_counter_drift_does_not_show_a_container(tmp_path: Path) -> None:
    values = meminfo(MemTotal=8000000, MemFree=500000, CmaTotal=0, CmaFree=508000)
    report = examine(write(tmp_path, "proc/meminfo", values))
    assert (report.container, report.ram) == (False, 8000000 << 10)


@pytest.mark.parametrize("release", ["4.14.117-perf+", "5.15.0-91-generic", "6.1.0-42-amd64", "6.12.0", "6.15.11"])
def test_a_kernel_before_6_16_has_no_kho_whatever_its_cma(release: str, tmp_path: Path) -> None:
    tree = machine(tmp_path, scratch=(64 * MIB,), cma=(32 * MIB,), cmdline="quiet", release=release)
    report = examine(tree)
    ids = {finding.id: finding for finding in report.findings}
    assert (report.state, report.scratch, report.exit_code) == ("absent", 0, 1)
    assert set(ids) >= {"DOC016", "DOC023"}
    assert not set(ids) & {"DOC001", "DOC014"}
    assert ids["DOC016"].certainty == ("likely" if release < "6." else "guess"), "vendors backport features to 6.x"
    assert "has another owner" in report.headline
    assert "KHO holds" not in report.headline
    assert "frees nothing" in ids["DOC023"].remedy


def cpuinfo(text: str) -> Callable[[Path], Path]:
    return lambda tree: write(tree, "proc/cpuinfo", text)


ARCHITECTURES: list[tuple[str, Callable[[Path], Path]]] = [
    ("riscv64", lambda tree: write(tree, "proc/sys/kernel/osrelease", "7.1.3-1-riscv64\n")),
    ("s390x", lambda tree: write(tree, "proc/sys/kernel/osrelease", "6.18.4-300.fc43.s390x\n")),
    ("ppc64le", lambda tree: write(tree, "proc/sys/kernel/osrelease", "7.0.3-powerpc64le\n")),
    ("i686", lambda tree: write(tree, "proc/sys/kernel/osrelease", "6.17.8+deb14-686-pae\n")),
    ("armv7l", lambda tree: write(tree, "proc/sys/kernel/osrelease", "7.0.3-armmp-lpae\n")),
    ("loongarch64", lambda tree: write(tree, "proc/sys/kernel/arch", "loongarch64\n")),
    ("s390x", lambda tree: write(tree, "sos_commands/kernel/uname_-a", "Linux z 7.0.1 #1 SMP s390x s390x GNU/Linux\n")),
    ("riscv64", lambda tree: write(tree, "proc/version", "Linux version 7.3.4 (b@h) (riscv64-linux-gnu-gcc-14) #1\n")),
    ("riscv64", cpuinfo("processor\t: 0\nhart\t\t: 0\nisa\t\t: rv64imafdc\n")),
    ("s390x", cpuinfo("vendor_id       : IBM/S390\n# processors    : 2\n")),
    ("ppc64le", cpuinfo("processor\t: 0\ncpu\t\t: POWER9 (architected), altivec supported\n")),
    ("armv7l", cpuinfo("model name\t: ARMv7 Processor rev 4 (v7l)\nCPU architecture: 7\n")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build"), ARCHITECTURES)
def test_an_architecture_without_kho_has_none_whatever_its_cma(
    name: str, build: Callable[[Path], Path], tmp_path: Path
) -> None:
    report = examine(build(machine(tmp_path, scratch=(64 * MIB,), cmdline="quiet")))
    assert (report.state, report.scratch) == ("absent", 0)
    assert f"Linux supports KHO on x86_64 and arm64, this machine is {name}" in report.headline


@pytest.mark.parametrize(
    "build",
    [
        lambda tree: write(tree, "proc/sys/kernel/osrelease", "7.0.3-arm64-16k\n"),
        lambda tree: write(tree, "proc/sys/kernel/osrelease", "6.18.4-300.fc43.x86_64\n"),
        cpuinfo("CPU implementer\t: 0x41\nCPU architecture: 8\n"),
        cpuinfo("vendor_id\t: GenuineIntel\nflags\t\t: fpu lm\n"),
        lambda tree: write(tree, "proc/sys/kernel/osrelease", "7.9.1-riscv64\n"),
    ],
)
def test_an_architecture_that_may_have_kho_is_active(build: Callable[[Path], Path], tmp_path: Path) -> None:
    assert examine(build(machine(tmp_path, scratch=(64 * MIB,), cmdline="quiet"))).state == "active"


def test_debugfs_overrides_the_release(tmp_path: Path) -> None:
    tree = Machine(areas=AREAS, release="6.12.0-211.el10.x86_64").with_debugfs(tmp_path)
    assert examine(tree).state == "active", "a vendor's backport"


MARKERS = (".dockerenv", "run/.containerenv")
WHOLE_DISK = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n28 27 0:5 / /dev rw - devtmpfs devtmpfs rw\n"
OVERLAY = "900 800 0:60 / / rw - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/l/AB,upperdir=/var/lib/docker/x\n"


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize(
    ("files", "inside"),
    [
        ({"proc/2/comm": "kthreadd\n"}, False),
        ({"proc/self/mountinfo": WHOLE_DISK}, False),
        ({"proc/1/mountinfo": WHOLE_DISK, "proc/1/cgroup": "0::/init.scope\n"}, False),
        ({"proc/self/mountinfo": OVERLAY}, True),
        ({"proc/1/cgroup": "12:pids:/docker/0123abcd\n"}, True),
        ({"proc/1/cgroup": "0::/kubepods/besteffort/pod1/abc\n", "proc/2/comm": "kthreadd\n"}, True),
        ({"proc/1/environ": "PATH=/bin\0container=lxc\0"}, True),
        ({"proc/mounts": "lxcfs /proc/meminfo fuse.lxcfs rw,nosuid 0 0\n"}, True),
    ],
)
def test_a_machine_booted_from_a_container_image_is_not_a_container(
    live: bool, marker: str, files: dict[str, str], inside: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if live:
        monkeypatch.setattr("kho.doctor.tree.os.path.realpath", lambda path: "/")
        monkeypatch.setattr("kho.doctor.reading.running_log", lambda tree: None)
    write(machine(tmp_path, cmdline="quiet"), marker, "")
    for name, content in files.items():
        write(tmp_path, name, content)
    report = examine(tmp_path)
    assert ("DOC024" in {finding.id for finding in report.findings}) is inside
    assert report.container is inside


def test_a_kdump_kernel_exits_0(tmp_path: Path) -> None:
    tree = Machine(cmdline="kho=on elfcorehdr=0x37000000", messages=["KHO: disabled in the kdump kernel"]).write(
        tmp_path
    )
    report = examine(tree)
    assert (report.state, report.exit_code) == ("off", 0)
    assert {RULES[finding.id].severity for finding in report.findings} <= {"note"}
