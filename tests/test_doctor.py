"""`kho.doctor.examine` on captured and generated hosts: the amount of scratch and the source of the figure."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from kho import errors
from kho.doctor import Report, examine

from doctor_hosts import HOSTS, MIB, copied, debugfs, edit, log, machine, write

DEFAULT = 0x6400000 + 0x5C00000
DEBUGFS, DMESG, ZONES = "sys/kernel/debug", "var/log/dmesg", "proc/zoneinfo"
CAPTURES = HOSTS.parent


def ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings}


def test_debugfs_shows_the_areas_exactly() -> None:
    report = examine(HOSTS / "default-scratch")
    assert report.scratch == report.scratch_low == report.scratch_high == DEFAULT
    assert (report.scratch_how, report.state, report.boot, report.exit_code) == ("exact", "active", "cold", 1)
    assert [(a.kind, a.phys, a.bytes, a.node) for a in report.areas] == [
        ("low", 0x77000000, 0x6400000, 0),
        ("global", 0x7D800000, 0, 0),
        ("node", 0x71400000, 0x5C00000, 0),
    ]
    assert report.by_node == {0: DEFAULT}
    assert report.headline.startswith("KHO holds 192.0 MiB (9.6 % of RAM)")
    held = next(finding for finding in report.findings if finding.id == "DOC001")
    assert held.certainty == "certain"
    assert ("sys/kernel/debug/kho/out/scratch_len", 1, "0x6400000 at 0x77000000") in held.evidence


@pytest.mark.parametrize(
    "without",
    [
        (DEBUGFS,),
        (DEBUGFS, DMESG),
        (DEBUGFS, DMESG, ZONES),
        (DEBUGFS, DMESG, ZONES, "proc/vmstat", "proc/cmdline", "proc/version", "proc/buddyinfo", "proc/iomem"),
        (DEBUGFS, "proc/pagetypeinfo"),
        (DEBUGFS, "proc/pagetypeinfo", DMESG),
        (DEBUGFS, "proc/pagetypeinfo", ZONES),
        (DEBUGFS, "proc/pagetypeinfo", ZONES, DMESG, "proc/cmdline"),
    ],
    ids=lambda files: ",".join(file.rpartition("/")[2] for file in files),
)
@pytest.mark.parametrize("name", ["default-scratch", "hugepages"])
def test_without_debugfs_scratch_is_inferred_within_a_pageblock(
    name: str, without: tuple[str, ...], tmp_path: Path
) -> None:
    report = examine(copied(name, tmp_path, *without))
    assert report.state == "active"
    assert report.scratch is not None
    assert abs(report.scratch - DEFAULT) <= 2 * MIB
    assert report.scratch_low is not None
    assert report.scratch_low <= DEFAULT
    assert report.scratch_high is None or report.scratch_high >= DEFAULT
    assert report.scratch_how == (
        "inferred" if "proc/pagetypeinfo" not in without or ZONES not in without else "at least"
    )
    if report.scratch_how == "inferred":
        assert (report.scratch, report.by_node) == (DEFAULT, {0: DEFAULT})


def test_kho_off_exits_0_and_the_headline_gives_the_reason() -> None:
    report = examine(HOSTS / "kho-off")
    assert (report.exit_code, report.state, report.scratch) == (0, "off", 0)
    assert report.headline == "KHO is off (kho=off on the command line) and holds nothing."
    assert {finding.severity for finding in report.findings} == {"note"}


@pytest.mark.parametrize("without", [(), (DMESG,), (DMESG, ZONES)], ids=["all", "no dmesg", "no dmesg, no zoneinfo"])
def test_a_failed_reservation_is_reported_with_sizes_and_leftover(without: tuple[str, ...], tmp_path: Path) -> None:
    report = examine(copied("scratch-too-big", tmp_path, *without))
    assert (report.exit_code, report.state, report.scratch, report.leftover) == (1, "failed", 0, 64 * MIB)
    assert ids(report) >= {"DOC003", "DOC004", "DOC021"}
    assert "64M,3G,64M" in report.headline
    assert "64.0 MiB (3.2 % of RAM) was left in CMA" in report.headline
    failed = next(finding for finding in report.findings if finding.id == "DOC003")
    assert failed.certainty == ("likely" if without else "certain")
    assert "64.0 MiB + 3.0 GiB + 64.0 MiB = 3355443200 bytes" in failed.value
    if not without:
        assert ("var/log/dmesg", 91, "KHO: Failed to reserve global scratch buffer") in failed.evidence
        assert "the global scratch buffer could not be reserved" in failed.value


def test_huge_pages_are_not_counted_as_scratch() -> None:
    report = examine(HOSTS / "hugepages")
    assert (report.scratch, report.hugetlb) == (DEFAULT, 1200 * MIB)
    huge = next(finding for finding in report.findings if finding.id == "DOC011")
    assert huge.value == "1.2 GiB are huge pages, 192.0 MiB are scratch"
    assert "DOC010" not in ids(report), "huge pages of 2 MiB do not inflate scratch"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("capture", ["linux-6.16-layout-x86_64", "linux-6.18.15-x86_64", "linux-7.3.4-x86_64"])
def test_captured_handovers_are_exact_before_and_after_kexec(capture: str, stage: str) -> None:
    report = examine(CAPTURES / capture / "host" / stage)
    assert (report.state, report.scratch, report.scratch_how) == ("active", 64 * MIB, "exact")
    assert report.boot == ("cold" if stage == "stage1" else "kho")
    assert ("DOC017" in ids(report)) == (stage == "stage2")
    assert ("DOC019" in ids(report)) == (stage == "stage1" and "7.3" not in capture)
    if (capture, stage) == ("linux-7.3.4-x86_64", "stage2"):
        assert (report.previous_release, report.kexec_count) == ("7.3.4", 1)


def test_scratch_is_attributed_to_numa_nodes(tmp_path: Path) -> None:
    nodes = (4096 * MIB, 8192 * MIB, 2048 * MIB)
    tree = machine(tmp_path, nodes=nodes, scratch=(200 * MIB, 120 * MIB, 40 * MIB), cmdline="kho=on")
    report = examine(tree)
    assert report.scratch == 360 * MIB
    assert report.by_node == {0: 200 * MIB, 1: 120 * MIB, 2: 40 * MIB}
    assert report.nodes == dict(enumerate(nodes))
    areas = [(0x10_0000_0000 + 64 * MIB, 80 * MIB), (0x11_2000_0000, 120 * MIB)]
    areas += [(0x10_0800_0000, 60 * MIB), (0x11_4000_0000, 60 * MIB), (0x13_0800_0000, 40 * MIB)]
    debugfs(tree, areas)
    shown = examine(tree)
    assert shown.scratch == shown.scratch_high == 360 * MIB
    assert [area.kind for area in shown.areas] == ["low", "global", "node", "node", "node"]
    assert [area.node for area in shown.areas] == [None, None, 0, 1, 2], (
        "addresses outside every zone: the position decides"
    )


def test_the_address_of_an_area_determines_its_node(tmp_path: Path) -> None:
    tree = machine(tmp_path, nodes=(4096 * MIB, 4096 * MIB), scratch=(64 * MIB, 64 * MIB))
    first, second = (1 << 20) * 4096, (1 << 20) * 4096 + 4096 * MIB
    debugfs(tree, [(first, 32 * MIB), (second, 32 * MIB), (first + 64 * MIB, 32 * MIB), (second + 64 * MIB, 32 * MIB)])
    report = examine(tree)
    assert [area.node for area in report.areas] == [0, 1, 0, 1]
    assert report.by_node == {0: 64 * MIB, 1: 64 * MIB}


@pytest.mark.parametrize(("page", "order"), [(4096, 9), (16384, 11), (65536, 13), (65536, 5)])
def test_page_size_and_pageblock_are_detected(page: int, order: int, tmp_path: Path) -> None:
    block = page << order
    tree = machine(tmp_path, nodes=(64 << 30,), scratch=(3 * block,), page=page, block_order=order)
    report = examine(tree)
    assert (report.page_size, report.pageblock, report.scratch) == (page, block, 3 * block)
    (tree / "proc/zoneinfo").unlink()
    if (page, order) != (65536, 5):
        assert examine(tree).scratch == 3 * block, "the page size follows from the pageblock's order"


@pytest.mark.parametrize("used", [0, 10 * MIB, 90 * MIB])
@pytest.mark.parametrize("pagetypeinfo", [True, False])
def test_other_cma_areas_are_not_counted_as_scratch(pagetypeinfo: bool, used: int, tmp_path: Path) -> None:
    tree = machine(tmp_path, cma=(96 * MIB,), used=used, cmdline="cma=96M", pagetypeinfo=pagetypeinfo)
    report = examine(tree)
    assert (report.state, report.scratch, report.exit_code) == ("off", 0, 0)
    assert "DOC012" in ids(report)


@pytest.mark.parametrize("pagetypeinfo", [True, False])
def test_scratch_is_inferred_exactly_while_all_cma_memory_is_in_use(pagetypeinfo: bool, tmp_path: Path) -> None:
    tree = machine(tmp_path, scratch=(200 * MIB,), cma=(96 * MIB,), used=250 * MIB, pagetypeinfo=pagetypeinfo)
    report = examine(tree)
    assert (report.state, report.scratch, report.cma_total) == ("active", 200 * MIB, 96 * MIB)
    assert report.scratch_how == "inferred"


def test_counter_drift_is_not_counted_as_scratch(tmp_path: Path) -> None:
    tree = machine(tmp_path, cma=(96 * MIB,), used=-5 * MIB)
    assert (examine(tree).state, examine(tree).exit_code) == ("off", 0), "CmaTotal accounts for every CMA pageblock"
    tree = machine(tmp_path, scratch=(64 * MIB,), used=-MIB)
    assert (examine(tree).scratch, examine(tree).scratch_low) == (64 * MIB, 64 * MIB)


def test_other_cma_areas_are_subtracted_from_their_nodes(tmp_path: Path) -> None:
    nodes = (4096 * MIB, 4096 * MIB)
    tree = machine(tmp_path, nodes=nodes, scratch=(64 * MIB, 64 * MIB), cma=(0, 32 * MIB), cmdline="kho=on")
    assert examine(tree).by_node == {}, "the node of the other area is unknown"
    log(tree, "cma: Reserved 32 MiB at 0x0000000210000000", release="7.3.4")
    assert examine(tree).by_node == {0: 64 * MIB, 1: 64 * MIB}


def test_cma_free_gives_a_lower_bound(tmp_path: Path) -> None:
    tree = machine(tmp_path, scratch=(200 * MIB,), used=50 * MIB, pagetypeinfo=False)
    (tree / "proc/zoneinfo").unlink()
    report = examine(tree)
    assert (report.scratch, report.scratch_low, report.scratch_high) == (150 * MIB, 150 * MIB, None)
    assert "at least 150.0 MiB" in report.headline


def test_inherited_scratch_is_active_after_a_handover(tmp_path: Path) -> None:
    tree = machine(tmp_path, scratch=(192 * MIB,), counted=False, used=60 * MIB, cmdline="kho=on kho_scratch=1M,1M,1M")
    log(tree, "KHO: found kexec handover data.", "KHO: exec from: 7.3.4 (count 2)")
    report = examine(tree)
    assert (report.state, report.boot, report.scratch) == ("active", "kho", 192 * MIB)
    assert (report.previous_release, report.kexec_count) == ("7.3.4", 2)
    assert ids(report) >= {"DOC001", "DOC008", "DOC017"}
    (tree / "proc/pagetypeinfo").unlink()
    unprivileged = examine(tree)
    assert (unprivileged.scratch, unprivileged.scratch_how) == (132 * MIB, "at least")


def test_the_boot_parameters_alone_show_a_handover(tmp_path: Path) -> None:
    tree = machine(tmp_path, scratch=(192 * MIB,), counted=False, used=60 * MIB)
    write(tree, "sys/kernel/boot_params/setup_data/1/type", "0xa\n")
    assert (examine(tree).state, examine(tree).boot) == ("active", "kho")
    write(tree, "sys/kernel/boot_params/setup_data/1/type", "0x1\n")
    assert examine(tree).boot is None
    write(tree, "proc/device-tree/chosen/linux,kho-fdt", b"\0" * 16)
    assert examine(tree).boot == "kho"


def test_explicit_sizes_are_confirmed_without_root(tmp_path: Path) -> None:
    tree = machine(
        tmp_path,
        nodes=(4096 * MIB, 4096 * MIB),
        scratch=(48 * MIB, 16 * MIB),
        used=20 * MIB,
        cmdline="kho=on kho_scratch=16M,16M,16M",
        pagetypeinfo=False,
        release="6.18.15",
    )
    log(tree, "KHO: scratch areas: lowmem: 16MiB global: 16MiB pernode: 16MiB", release="6.18.15")
    report = examine(tree)
    assert (report.scratch, report.by_node) == (64 * MIB, {0: 48 * MIB, 1: 16 * MIB})


def test_a_log_of_another_kernel_is_ignored(tmp_path: Path) -> None:
    tree = machine(tmp_path, cmdline="quiet")
    log(tree, "KHO: Failed to reserve scratch area, disabling kexec handover", release="6.18.1")
    report = examine(tree)
    assert report.state == "off"
    assert ("var/log/dmesg", "the log is of Linux 6.18.1, this kernel is 7.3.4") in report.unread


def test_only_the_last_boot_of_a_log_is_used(tmp_path: Path) -> None:
    tree = machine(tmp_path, scratch=(64 * MIB,))
    log(tree, "KHO: Failed to reserve scratch area, disabling kexec handover", "Linux version 7.3.4 (again)")
    assert examine(tree).state == "active"


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "<4>",
        "[    0.000000] ",
        "<4>[    0.000000] [    T0] ",
        "[Mon Nov 23 09:15:57 2026] ",
        "Nov 23 09:15:57 vm kernel: [    0.000000] ",
        "4,87,0,-;",
    ],
)
@pytest.mark.parametrize("file", ["var/log/dmesg", "sos_commands/kernel/dmesg", "dmesg"])
def test_every_line_prefix_of_a_log_is_parsed(file: str, prefix: str, tmp_path: Path) -> None:
    said = ("Linux version 7.3.4 (root@vm)", "KHO: Failed to reserve scratch area, disabling kexec handover")
    write(machine(tmp_path, cmdline="kho=on"), file, "".join(f"{prefix}{line}\n" for line in said))
    failed = next(finding for finding in examine(tmp_path).findings if finding.id == "DOC003")
    assert (file, 2, said[1]) in failed.evidence


def test_kho_on_without_scratch_is_a_finding(tmp_path: Path) -> None:
    report = examine(machine(tmp_path, cmdline="kho=on"))
    assert (report.state, report.scratch, report.exit_code) == ("off", 0, 1), "KHO may also not be built in"
    assert "not built in, or it disabled itself" in report.headline
    requested = next(finding for finding in report.findings if finding.id == "DOC025")
    assert requested.certainty == "likely"
    report = examine(write(tmp_path, "boot/config-7.3.4", "CONFIG_CMA=y\nCONFIG_KEXEC_HANDOVER=y\n"))
    assert (report.state, report.leftover, report.exit_code) == ("failed", 0, 1)


def test_a_failed_lowmem_reservation_is_certain_from_the_log(tmp_path: Path) -> None:
    tree = machine(tmp_path, nodes=(512 << 30,), cmdline="quiet")
    failures = ("Failed to reserve lowmem scratch buffer", "Failed to reserve scratch area, disabling kexec handover")
    report = examine(log(tree, *(f"KHO: {line}" for line in failures)))
    assert report.headline == "KHO could not reserve its scratch and disabled itself; no memory was left in CMA."
    failed = next(finding for finding in report.findings if finding.id == "DOC003")
    assert (failed.value, failed.certainty) == ("the lowmem scratch buffer could not be reserved", "certain")


def test_reports_pickle_and_convert_to_json() -> None:
    for host in sorted(HOSTS.iterdir()):
        if host.is_dir():
            report = examine(host)
            assert pickle.loads(pickle.dumps(report)) == report
            data = json.loads(json.dumps(report.to_dict()))
            assert data["exit_code"] == report.exit_code
            assert {finding["id"] for finding in data["findings"]} == ids(report)


def test_a_path_that_is_not_a_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(errors.ParameterError, match="not a directory"):
        examine(tmp_path / "nowhere")
    with pytest.raises(errors.ParameterError, match="not a directory"):
        examine(write(tmp_path, "file", "") / "file")


def test_debugfs_and_pageblocks_that_disagree_are_reported(tmp_path: Path) -> None:
    tree = copied("default-scratch", tmp_path)
    edit(tree, "sys/kernel/debug/kho/out/scratch_len", ("0x5c00000", "0x15c00000"))
    assert "DOC023" in ids(examine(tree)), "pageblocks and debugfs do not agree"
