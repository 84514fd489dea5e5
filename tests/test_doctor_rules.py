"""Every rule of `kho doctor`: machines where it applies, machines where it does not, and its documentation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kho.doctor import RULES, Report, examine, fdstore, rules
from kho.doctor.rules import SEVERITIES, page
from kho.doctor.tree import Tree

from doctor_crash_hosts import inside, layout70, say
from doctor_hosts import HOSTS, MIB, copied, debugfs, log, machine, write

DOCS = HOSTS.parents[2] / "docs"
GIB = 1 << 30
CONFIG = "CONFIG_CMA=y\nCONFIG_KEXEC_HANDOVER=y\nCONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y\n"
OFF = "CONFIG_CMA=y\nCONFIG_KEXEC_HANDOVER=y\n# CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT is not set\n"


def finding_ids(report: Report) -> list[str]:
    return [finding.id for finding in report.findings]


def workstation(tree: Path) -> Path:
    """One node with 128 GiB, 9.36 GiB of scratch and 32 MiB of CMA: the machines on which RDMA failed."""
    scratch = 0xC000000 + 0x12BA00000 + 0x11F800000
    machine(tree, nodes=(128 * GIB,), scratch=(scratch,), cma=(32 * MIB,), used=30 * MIB)
    write(tree, "boot/config-7.3.4", CONFIG)
    write(tree, "sys/class/infiniband/mlx5_0/node_type", "1: CA\n")
    return write(
        tree, "proc/modules", "mlx5_ib 634880 0 - Live 0x0\nnvidia 123 45 - Live 0x0\nvfio_pci 1 0 - Live 0x0\n"
    )


def cloud(tree: Path) -> Path:
    return machine(tree, nodes=(800 * MIB,), scratch=(128 * MIB,), cmdline="console=tty1")


def asked(value: str, boot: str = "kho=on") -> Callable[[Path], Path]:
    return lambda tree: machine(tree, scratch=(64 * MIB,), cmdline=f"{boot} kho_scratch={value}")


def gigantic(tree: Path) -> Path:
    machine(tree, nodes=(64 * GIB,), scratch=(20 * GIB,), cmdline="hugepagesz=1G hugepages=4 kho=on", release="7.2.13")
    return write(tree, "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "4\n")


def crash_kernel(tree: Path) -> Path:
    machine(tree, nodes=(64 * GIB,), scratch=(8 * GIB,), cmdline="crashkernel=1G kho=on")
    return write(tree, "proc/iomem", "00100000-103fffffff : System RAM\n  10000000-4fffffff : Crash kernel\n")


def small(tree: Path) -> Path:
    machine(tree, nodes=(8 * GIB,), scratch=(64 * MIB,), cmdline="kho=on kho_scratch=16M,32M,16M")
    return log(tree, "Memory: 8000000K/8388608K available (1K kernel code, 300000K reserved, 0K cma-reserved)")


def small_by_memmap(tree: Path) -> Path:
    machine(tree, nodes=(8 * GIB,), scratch=(64 * MIB,))
    return write(tree, "proc/vmstat", "nr_memmap_boot_pages 32768\n")


def refused(tree: Path, release: str = "7.3.4") -> Path:
    machine(tree, scratch=(64 * MIB,), release=release)
    lines = ("KHO: setup: handover FDT (0x10116b000) is invalid: -9", "KHO: disabling KHO revival: -22")
    return log(tree, *lines, release=release)


def live_update_on(release: str) -> Callable[[Path], Path]:
    return lambda tree: write(
        machine(tree, scratch=(64 * MIB,), cmdline="kho=on liveupdate=on", release=release),
        "proc/misc",
        "125 liveupdate\n",
    )


def memoryless(tree: Path, release: str = "6.19.5") -> Path:
    machine(tree, cmdline="kho=on", release=release)
    lines = ("Initmem setup node 1 as memoryless", "KHO: Failed to reserve scratch area, disabling kexec handover")
    return log(tree, *lines, release=release)


def panicked(tree: Path) -> Path:
    """The log that pstore keeps of a 7.0 that a 6.19 with liveupdate=on started."""
    lines = (
        "KHO: found kexec handover data.",
        "luo: Unable to get FLB node [luo-flb]",
        "Kernel panic - not syncing: The incoming tree failed to initialize properly [-ENOENT], disabling live update",
    )
    text = "".join(f"[    0.1{at:05}] {line}\n" for at, line in enumerate(("Linux version 7.0.9 (root@vm) #1", *lines)))
    return write(tree, "sys/fs/pstore/dmesg-ramoops-0", text)


def ignored(tree: Path) -> Path:
    machine(tree, release="7.3.4", cmdline="quiet")
    return log(tree, "Passed KHO data, but CONFIG_KEXEC_HANDOVER not set. Ignoring.")


def chained(tree: Path) -> Path:
    machine(tree, scratch=(64 * MIB,), counted=False, cmdline="kho=on kho_scratch=1G,1G,1G")
    return log(tree, "KHO: found kexec handover data. Will skip init for some devices", release="7.3.4")


def finalized(tree: Path) -> Path:
    machine(tree, scratch=(64 * MIB,), release="6.18.15")
    debugfs(tree, [(1 << 32, 16 * MIB), (2 << 32, 32 * MIB), (3 << 32, 16 * MIB)])
    return write(tree, "sys/kernel/debug/kho/out/finalize", "1\n")


def disagreeing(tree: Path) -> Path:
    return debugfs(machine(tree, scratch=(640 * MIB,)), [(1 << 32, 16 * MIB), (2 << 32, 32 * MIB), (3 << 32, 16 * MIB)])


def unexplained(tree: Path) -> Path:
    return machine(tree, scratch=(64 * MIB,), cmdline="kho=off")


def host(name: str) -> Callable[[Path], Path]:
    return lambda tree: copied(name, tree)


def live_update(tree: Path) -> Path:
    machine(tree, scratch=(64 * MIB,), cmdline="kho=on liveupdate=on")
    write(tree, "proc/misc", "125 liveupdate\n")
    (tree / "proc/7/fd").mkdir(parents=True)
    (tree / "proc/7/fd/3").symlink_to("anon_inode:[luo_session]")
    return tree


def stores(preserve: str = "restart", load: str = "loaded", kexecs: int = 1) -> Callable[[Path], Path]:
    """A machine with live update, with `systemctl show` as sos keeps it, started by kexec."""

    def build(tree: Path) -> Path:
        live_update_on("7.3.4")(tree)
        log(tree, "KHO: scratch areas: lowmem: 16MiB global: 32MiB pernode: 16MiB")
        write(tree, "proc/sys/kernel/bootloader_type", "208\n")
        unit = f"Id=x.service\nLoadState={load}\nNFileDescriptorStore=2\nFileDescriptorStorePreserve={preserve}\n"
        other = "\nId=y.service\nLoadState=loaded\nNFileDescriptorStore=0\nFileDescriptorStorePreserve=restart\n"
        write(tree, "sos_commands/systemd/systemctl_show_service_--all", unit + other)
        return write(tree, "sos_commands/systemd/systemctl_show", f"Version=262.1\nKExecCount={kexecs}\n")

    return build


def stored(*rows: str) -> Callable[[Path], Path]:
    """The same with `systemd-analyze fdstore` of units whose descriptors cross a kexec."""

    def build(tree: Path) -> Path:
        stores("yes")(tree)
        for number, text in enumerate(rows):
            head = "FDNAME TYPE DEVNO   INODE RDEVNO PATH             ACCESS\n"
            write(tree, f"sos_commands/systemd/systemd-analyze_fdstore_{'xyz'[number]}.service", head + text)
        return tree

    return build


def held_session(tree: Path) -> Path:
    chained(tree)
    write(tree, "proc/misc", "125 liveupdate\n")
    (tree / "proc/1/fd").mkdir(parents=True)
    (tree / "proc/1/fd/33").symlink_to("anon_inode:[luo_session] x-luosess")
    write(tree, "sys/fs/cgroup/memory.stat", "anon 1\nshmem 120900000\n")
    return write(tree, "sys/fs/cgroup/system.slice/memory.stat", "anon 1\nshmem 2700000\n")


def configured(text: str, cmdline: str = "quiet") -> Callable[[Path], Path]:
    return lambda tree: write(machine(tree, cmdline=cmdline), "boot/config-7.3.4", text)


ODD = "kho_scratch=17M,64M,16M"


def odd_sizes(tree: Path) -> Path:
    machine(tree, scratch=(98 * MIB,), cmdline=f"kho=on {ODD}", release="7.0.9")
    return debugfs(tree, [(1 << 32, 17 * MIB), (2 << 32, 64 * MIB), (3 << 32, 16 * MIB)])


TRIGGERS: list[tuple[str, str, Callable[[Path], Path]]] = [
    ("DOC001", "workstation", workstation),
    ("DOC001", "cloud VM", cloud),
    ("DOC002", "cloud VM", cloud),
    ("DOC003", "too big", host("scratch-too-big")),
    ("DOC004", "too big", host("scratch-too-big")),
    ("DOC005", "one size", asked("512M")),
    ("DOC005", "two sizes", asked("512M,512M")),
    ("DOC005", "a decimal", asked("1.5G,1G,1G")),
    ("DOC005", "garbage", asked("64M,256M,64MB")),
    ("DOC006", "octal", asked("064M,64M,64M")),
    ("DOC006", "bytes", asked("64,256,64")),
    ("DOC006", "wrapped", asked("17E,1M,1M")),
    ("DOC006", "a large percentage", asked("20000%")),
    ("DOC006", "no percent", asked("0%")),
    ("DOC007", "auto", lambda tree: machine(tree, cmdline="kho=auto")),
    ("DOC007", "no value", lambda tree: machine(tree, cmdline="quiet kho")),
    ("DOC008", "off", asked("64M,64M,64M", "kho=off")),
    ("DOC008", "inherited", chained),
    ("DOC008", "twice", asked("1M,1M,1M kho_scratch=2M,2M,2M")),
    ("DOC009", "reserved", small),
    ("DOC009", "page structures", small_by_memmap),
    ("DOC010", "gigantic pages", gigantic),
    ("DOC010", "crash kernel", crash_kernel),
    ("DOC011", "hugepages", host("hugepages")),
    ("DOC012", "workstation", workstation),
    ("DOC013", "workstation", workstation),
    ("DOC014", "workstation", workstation),
    ("DOC015", "off", host("kho-off")),
    ("DOC015", "not by default", configured(OFF)),
    ("DOC016", "not configured", configured("CONFIG_CMA=y\n# CONFIG_KEXEC_HANDOVER is not set\n", "kho=on")),
    ("DOC016", "too old", lambda tree: machine(tree, release="6.12.9")),
    ("DOC016", "no CMA", lambda tree: write(tree, "proc/meminfo", "MemTotal: 1 kB\nPercpu: 0 kB\nDirectMap4k: 1 kB\n")),
    ("DOC017", "chain", chained),
    ("DOC018", "refused", refused),
    ("DOC019", "finalized", finalized),
    ("DOC020", "default", host("default-scratch")),
    ("DOC021", "off", host("kho-off")),
    ("DOC022", "device", live_update),
    ("DOC022", "subtree", host("default-scratch")),
    ("DOC023", "debugfs", disagreeing),
    ("DOC023", "not active", unexplained),
    ("DOC025", "not there", lambda tree: machine(tree, cmdline="kho=on")),
    ("DOC025", "not built in", configured("CONFIG_CMA=y\nCONFIG_SMP=y\n", "kho=1")),
    ("DOC026", "cold boot", layout70),
    ("DOC027", "finalized", lambda tree: layout70(tree, finalize="1")),
    ("DOC028", "misplaced", inside),
    ("DOC029", "after a live update", host("no-crash-kernel")),
    (
        "DOC030",
        "before a live update",
        lambda tree: layout70(tree, release="7.3.4", cmdline="crashkernel=88M", size=88 * MIB),
    ),
    (
        "DOC031",
        "failed",
        lambda tree: say(inside(tree), "KHO: Failed to reserve scratch area, disabling kexec handover"),
    ),
    ("DOC032", "debugfs", odd_sizes),
    ("DOC032", "boot line", lambda tree: machine(tree, scratch=(96 * MIB,), cmdline=f"kho=on {ODD}", release="7.0.9")),
    ("DOC033", "6.19.8", live_update_on("6.19.8")),
    (
        "DOC034",
        "a folio",
        lambda tree: say(layout70(tree), "memfd_luo: Unable to restore folio at physical address: 15f0000"),
    ),
    ("DOC035", "7.0.3", live_update_on("7.0.3")),
    ("DOC036", "6.19.5", memoryless),
    ("DOC037", "6.17.3", lambda tree: refused(tree, "6.17.3")),
    ("DOC038", "6.19", live_update_on("6.19.11")),
    ("DOC038", "6.17", lambda tree: layout70(tree, release="6.17.8", finalize="1", loaded="0")),
    ("DOC039", "panic", panicked),
    ("DOC040", "no handler", lambda tree: say(layout70(tree), "luo: No registered handler for compatible 'memfd-v1'")),
    ("DOC041", "ignored", ignored),
    ("DOC042", "restart", stores()),
    ("DOC043", "not found", stores(load="not-found")),
    ("DOC044", "kexec_load", stores(kexecs=0)),
    ("DOC045", "a session in the store", held_session),
    ("DOC046", "shmem", held_session),
    ("DOC047", "a crashed kernel's log", host("ubuntu-7.0.0-14-crashed")),
    ("DOC048", "a socket", stored("stored sock 0:8   4218620 -      socket:[4218620] ro\n")),
]


@pytest.mark.parametrize(("rule_id", "name", "build"), TRIGGERS, ids=[f"{i}-{name}" for i, name, _ in TRIGGERS])
def test_a_rule_applies_with_evidence(rule_id: str, name: str, build: Callable[[Path], Path], tmp_path: Path) -> None:
    report = examine(build(tmp_path))
    found = [finding for finding in report.findings if finding.id == rule_id]
    assert len(found) >= 1, finding_ids(report)
    for finding in found:
        assert finding.value
        assert finding.certainty in ("certain", "likely", "guess")
        assert all(seen.file and seen.text for seen in finding.evidence)
        assert finding.evidence, "every finding has evidence"
    assert report.exit_code == int(any(RULES[i].severity != "note" for i in finding_ids(report)))


@pytest.mark.parametrize(
    "clean",
    [host("kho-off"), configured(OFF), lambda tree: machine(tree, cmdline="quiet"), configured("CONFIG_SMP=y\n")],
    ids=["off", "off by default", "no information", "not built in"],
)
def test_a_clean_machine_has_notes_at_most(clean: Callable[[Path], Path], tmp_path: Path) -> None:
    report = examine(clean(tmp_path))
    assert report.exit_code == 0
    assert {RULES[rule_id].severity for rule_id in finding_ids(report)} <= {"note"}
    assert set(finding_ids(report)) <= {"DOC015", "DOC016", "DOC021"}
    assert report.scratch == 0


def test_a_container_gets_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kho.doctor.tree.os.path.realpath", lambda path: "/")
    monkeypatch.setattr("kho.doctor.reading.running_log", lambda tree: None)
    write(machine(tmp_path, cmdline="quiet"), "run/.containerenv", "")
    report = examine(tmp_path)
    assert "DOC024" in finding_ids(report)
    assert report.exit_code == 0


def test_every_rule_is_triggered_by_a_test() -> None:
    assert {rule_id for rule_id, _, _ in TRIGGERS} | {"DOC024"} == set(RULES)


def test_the_findings_of_the_workstation_have_their_evidence(tmp_path: Path) -> None:
    report = examine(workstation(tmp_path))
    assert report.scratch == 0xC000000 + 0x12BA00000 + 0x11F800000
    assert report.headline.startswith("KHO holds 9.4 GiB (7.3 % of RAM)")
    pins = next(finding for finding in report.findings if finding.id == "DOC013")
    assert {"sys/class/infiniband", "proc/modules"} <= {seen.file for seen in pins.evidence}
    default = next(finding for finding in report.findings if finding.id == "DOC014")
    assert ("boot/config-7.3.4", 3, "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y") in default.evidence


def test_text_after_the_third_size_is_valid_if_the_log_shows_it_was_accepted(tmp_path: Path) -> None:
    tree = asked("64M,256M,64MB")(tmp_path)
    log(tree, "KHO: scratch areas: lowmem: 64MiB global: 256MiB pernode: 64MiB")
    assert "DOC006" in finding_ids(examine(tree))
    assert "DOC005" not in finding_ids(examine(tree))


def test_a_kernel_message_makes_a_rejected_value_certain(tmp_path: Path) -> None:
    tree = asked("512M")(tmp_path)
    assert [f.certainty for f in examine(tree).findings if f.id == "DOC005"] == ["likely"]
    log(tree, "Malformed early option 'kho_scratch'")
    assert [f.certainty for f in examine(tree).findings if f.id == "DOC005"] == ["certain"]


def test_huge_pages_no_longer_inflate_scratch_from_7_3_on(tmp_path: Path) -> None:
    tree = gigantic(tmp_path)
    assert "DOC010" in finding_ids(examine(tree))
    write(tree, "proc/sys/kernel/osrelease", "7.3.4\n")
    assert "DOC010" not in finding_ids(examine(tree))


def test_a_sufficient_size_is_not_reported_as_too_small(tmp_path: Path) -> None:
    tree = machine(tmp_path, nodes=(8 * GIB,), scratch=(512 * MIB,), cmdline="kho=on kho_scratch=64M,384M,64M")
    log(tree, "Memory: 8000000K/8388608K available (1K kernel code, 800000K reserved, 0K cma-reserved)")
    report = examine(tree)
    assert report.reserved_at_boot == (800000 << 10) - 512 * MIB
    assert "DOC009" not in finding_ids(report)


def test_rules_are_complete_and_in_order() -> None:
    assert list(RULES) == [f"DOC{n:03}" for n in range(1, len(RULES) + 1)]
    for rule_id, rule in RULES.items():
        assert rule.severity in SEVERITIES
        for text in (rule.means, rule.matters, rule.advice, rule.case, rule.source):
            assert re.search(r"\w", text), rule_id
        assert rule.title == rule.title.rstrip(".")


def test_every_page_says_what_it_is_how_it_is_known_what_to_do_and_how_to_see_that_it_helped() -> None:
    for rule_id in RULES:
        parts = re.split(r"^## (.*)$", (DOCS / "doctor" / f"{rule_id}.md").read_text(), flags=re.MULTILINE)
        sections = {"what it is": parts[0].split("\n\n", 2)[2], **dict(zip(parts[1::2], parts[2::2], strict=True))}
        for name in ("what it is", "What to do", "How to see that it helped", "How this is known"):
            assert re.search(r"\w", sections.get(name, "")), (rule_id, name)


def test_every_section_of_abi_md_that_the_doctor_cites_exists() -> None:
    headings = set(re.findall(r"^## (\d+)\. ", (DOCS / "abi.md").read_text(), re.MULTILINE))
    texts = {rule_id: rule.explanation for rule_id, rule in RULES.items()}
    texts |= {path.name: path.read_text() for path in Path(rules.__file__).parent.glob("*.py")}
    cited = {name: set(re.findall(r"abi\.md section (\d+)", text)) for name, text in texts.items()}
    assert cited["DOC005"] == {"5"}
    for name, text in texts.items():
        assert cited[name] <= headings, name
        assert text.count("abi.md") == len(re.findall(r"abi\.md section \d+", text)), "each citation names a section"
        assert "ABI section" not in text, name


@pytest.mark.parametrize("rule_id", list(RULES))
def test_every_rule_has_a_page(rule_id: str) -> None:
    assert (DOCS / "doctor" / f"{rule_id}.md").read_text() == page(rule_id), "run make docs"
    assert f"(doctor/{rule_id}.md)" in (DOCS / "doctor.md").read_text()


def test_a_store_that_crosses_is_no_finding(tmp_path: Path) -> None:
    report = examine(stores("yes")(tmp_path))
    assert {"DOC042", "DOC043", "DOC044", "DOC045", "DOC046"}.isdisjoint(finding_ids(report))
    write(tmp_path, "proc/sys/kernel/bootloader_type", "114\n")
    write(tmp_path, "sos_commands/systemd/systemctl_show", "KExecCount=0\n")
    assert "DOC044" not in finding_ids(examine(tmp_path)), "a cold boot"


MEMFD = "img    reg  0:1      1027 -      /memfd:img (deleted) rw\n"


def test_descriptors_that_the_kernel_takes_are_no_finding(tmp_path: Path) -> None:
    came = "old    reg  0:1      1030 -      / (deleted)       rw\n"
    session = "sess   -    0:15     1055 -      anon_inode:[luo_session] mine rw\n"
    assert "DOC048" not in finding_ids(examine(stored(MEMFD + came + session)(tmp_path)))


@pytest.mark.parametrize(
    ("row", "path"),
    [
        ("a fifo 0:14 77 - pipe:[77] rw\n", "pipe:[77]"),
        ("two words - 0:15 1055 - anon_inode:[eventfd] rw\n", "anon_inode:[eventfd]"),
        ("c dir 8:1 2 - /srv ro\n", "/srv"),
        ("d reg 8:1 9 - /var/lib/x/state.db rw\n", "/var/lib/x/state.db"),
    ],
)
def test_a_descriptor_that_is_no_memfd_is_named(row: str, path: str, tmp_path: Path) -> None:
    [found] = [f for f in examine(stored(MEMFD + row)(tmp_path)).findings if f.id == "DOC048"]
    assert f"is no memfd ({path})" in found.value
    assert found.value.startswith("the kernel will refuse 1 of 2")
    assert any(path in seen.text for seen in found.evidence)


def test_one_memfd_in_two_stores_is_refused_the_second_time(tmp_path: Path) -> None:
    [found] = [f for f in examine(stored(MEMFD, MEMFD.replace("img ", "copy"))(tmp_path)).findings if f.id == "DOC048"]
    assert "x.service img and y.service copy are one memfd" in found.value
    other = stored(MEMFD, MEMFD.replace("1027", "1028"))(tmp_path / "other")
    assert "DOC048" not in finding_ids(examine(other))


def test_a_memfd_that_process_1_holds_twice_is_found_by_its_inode(tmp_path: Path) -> None:
    live_update_on("7.3.4")(tmp_path)
    (tmp_path / "proc/1/fd").mkdir(parents=True)
    for fd, inode in ((41, 1027), (42, 1028), (43, 1027)):
        (tmp_path / f"proc/1/fd/{fd}").symlink_to("/memfd:img (deleted)")
        write(tmp_path, f"proc/1/fdinfo/{fd}", f"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t{inode}\n")
    [found] = [f for f in examine(tmp_path).findings if f.id == "DOC048"]
    assert found.certainty == "likely"
    assert "proc/1/fd/41 and proc/1/fd/43 are one memfd" in found.value


def test_supportconfig_has_a_section_for_each_unit(tmp_path: Path) -> None:
    live_update_on("7.3.4")(tmp_path)
    unit = "#==[ Command ]======================================#\n# /usr/bin/systemctl --no-pager show '{}'\n{}\n"
    shown = "Id={}\nLoadState={}\nNFileDescriptorStore=3\nFileDescriptorStorePreserve={}\n"
    rows = (("a.service", "loaded", "restart"), ("b.service", "not-found", "yes"), ("c.service", "loaded", "yes"))
    text = "".join(unit.format(row[0], shown.format(*row)) for row in rows)
    write(tmp_path, "systemd.txt", unit.format("manager", "Version=262.1\nKExecCount=1\n") + text)
    report = examine(tmp_path)
    values = {f.id: f.value for f in report.findings}
    assert "a.service (3, restart)" in values["DOC042"]
    assert "b.service" in values["DOC043"]
    assert "c.service" not in values["DOC042"] + values["DOC043"]


def test_hostile_output_of_systemctl_is_bounded_and_escaped(tmp_path: Path) -> None:
    tree = stores()(tmp_path)
    unit = "Id=\x1b[31m{0}.service\nLoadState=not-found\nNFileDescriptorStore={0}\n\n"
    text = "".join(unit.format(at) for at in range(3000)) + "NFileDescriptorStore=99999999999999999999\nKExecCount=x\n"
    write(tree, "sos_commands/systemd/systemctl_show_service_--all", text)
    [found] = [finding for finding in examine(tree).findings if finding.id == "DOC043"]
    assert "\x1b" not in found.value
    assert len(found.value) <= 600


def test_the_store_of_a_real_machine_after_systemctl_kexec() -> None:
    """Systemd 262.1 after its first kexec: three services that will not cross, one removed, two images of 48 MiB."""
    found = {finding.id: finding for finding in examine(HOSTS / "systemd-kexec").findings}
    assert re.findall(r"[\w-]+\.service \(1, \w+\)", found["DOC042"].value) == [
        "plain-no.service (1, no)",
        "plain-default.service (1, restart)",
        "plain-restart.service (1, restart)",
    ]
    assert re.findall(r"[\w-]+\.service", found["DOC043"].value) == ["plain-removed.service"]
    assert found["DOC046"].value.startswith("96.3 MiB of shared memory belong to no cgroup")
    assert {"DOC044", "DOC045"}.isdisjoint(found)


def test_a_systemd_that_does_not_answer_is_listed_as_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)

    def late(argv: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(argv, timeout)

    monkeypatch.setattr(subprocess, "run", late)
    tree = Tree(tmp_path)
    assert fdstore._ask(tree) == []
    assert [(each.file, each.why) for each in tree.unread] == [("systemctl show", f"no answer in {fdstore.SECONDS} s")]
