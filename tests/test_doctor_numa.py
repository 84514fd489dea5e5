"""`kho doctor` on generated machines with several nodes, explicit sizes, handovers and other page sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kho.doctor import Report, examine, what_if

from command import kho
from doctor_hosts import MIB, write
from doctor_numa import GIB, Machine, metadata

DEFAULT = ((0x60000000, 300 * MIB), (0x1_4000_0000, 5 * GIB), (0x2_C000_0000, 4 * GIB), (66 * GIB + 2 * GIB, 1 * GIB))
SIZES = ((0x60000000, 16 * MIB), (0x1_4000_0000, 512 * MIB), (0x2_C000_0000, 32 * MIB), (68 * GIB, 32 * MIB))
LINE = "kho=on kho_scratch=16M,512M,32M"
SAID = "KHO: scratch areas: lowmem: 16MiB global: 512MiB pernode: 32MiB"
BY_NODE = {0: 560 * MIB, 1: 32 * MIB}


def finding_ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings}


def bounds(report: Report) -> tuple[int | None, int | None, int | None]:
    return report.scratch_low, report.scratch, report.scratch_high


def without(tree: Path, *files: str) -> Path:
    for file in files:
        (tree / file).unlink()
    return tree


def total(areas: object) -> int:
    return sum(size for _, size in areas)  # type: ignore[attr-defined]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("others", [(), ((0x3_0000_0000, 128 * MIB), (70 * GIB, 64 * MIB))], ids=["alone", "cma=128M"])
def test_two_nodes_with_three_zones_and_other_cma_areas(
    others: tuple[tuple[int, int], ...], mixed: bool, tmp_path: Path
) -> None:
    made = Machine(areas=DEFAULT, others=others, used=100 * MIB, cmdline="kho=on", mixed=mixed)
    root = examine(made.with_debugfs(tmp_path / "root"))
    assert (root.scratch, root.scratch_how, root.cma_total) == (total(DEFAULT), "exact", total(others))
    assert root.by_node == {0: 300 * MIB + 9 * GIB, 1: GIB}
    assert [(area.kind, area.phys, area.node) for area in root.areas] == [
        (kind, at, node)
        for kind, (at, _), node in zip(("low", "global", "node", "node"), DEFAULT, (0, 0, 0, 1), strict=True)
    ]
    assert "DOC023" not in finding_ids(root)
    user = examine(made.write(tmp_path / "user"))
    assert (user.scratch, user.scratch_how, user.by_node) == (root.scratch, "inferred", root.by_node)
    assert user.scratch_low == total(DEFAULT) - 2 * MIB
    assert user.ram == 125 * GIB
    assert user.nodes == {0: 64 * GIB, 1: 64 * GIB}
    assert user.reserved_at_boot == 3 * GIB
    shown = kho("doctor", tmp_path / "user").out
    assert "node 0: 9.3 GiB of 64.0 GiB, node 1: 1.0 GiB of 64.0 GiB" in shown


@pytest.mark.parametrize("gone", [(), ("proc/pagetypeinfo",), ("proc/zoneinfo",), ("var/log/dmesg",)], ids=str)
def test_explicit_sizes_are_exact_if_pageblocks_or_the_log_confirm_them(gone: tuple[str, ...], tmp_path: Path) -> None:
    report = examine(without(Machine(areas=SIZES, used=90 * MIB, cmdline=LINE, messages=[SAID]).write(tmp_path), *gone))
    assert bounds(report) == (592 * MIB, 592 * MIB, 592 * MIB)
    assert (report.scratch_how, report.boot, report.by_node) == ("exact", "cold", BY_NODE)
    assert [(area.kind, area.bytes) for area in report.areas] == [
        ("low", 16 * MIB),
        ("global", 512 * MIB),
        ("node", 32 * MIB),
        ("node", 32 * MIB),
    ]
    assert [area.node for area in report.areas][2:] == [0, 1]


def test_explicit_sizes_without_confirmation_are_a_guess(tmp_path: Path) -> None:
    tree = Machine(areas=SIZES, used=90 * MIB, cmdline=LINE, messages=[SAID]).write(tmp_path)
    by_log = examine(without(tree, "proc/pagetypeinfo", "proc/zoneinfo"))
    assert (bounds(by_log), by_log.scratch_how) == ((592 * MIB,) * 3, "exact"), "the kernel logs the parsed sizes"
    line = examine(without(tree, "var/log/dmesg"))
    assert (line.scratch_how, line.scratch_low, line.scratch_high) == ("boot line", 502 * MIB, None)
    assert line.scratch == 560 * MIB, "without node information one node is assumed"
    assert line.headline.startswith("KHO holds about 560.0 MiB")
    assert [f.certainty for f in line.findings if f.id == "DOC001"] == ["guess"]
    for node in (0, 1):
        write(tree, f"sys/devices/system/node/node{node}/meminfo", f"Node {node} MemTotal:       67108864 kB\n")
    assert examine(tree).scratch == 592 * MIB, "sysfs shows two nodes"


def test_sizes_are_rounded_as_each_release_does(tmp_path: Path) -> None:
    areas = ((0x60000000, 18 * MIB), (0x1_4000_0000, 34 * MIB), (0x2_C000_0000, 18 * MIB), (68 * GIB, 18 * MIB))
    old = Machine(areas=areas, cmdline="kho=on kho_scratch=17M,33M,17M", release="6.18.15").write(tmp_path / "old")
    assert (examine(old).scratch, examine(old).scratch_how) == (88 * MIB, "exact")
    refused = what_if(examine(old), "kho_scratch=17M,33M,17M")
    assert (refused.accepted, refused.sizes) == (False, [])
    assert refused.notes[0].endswith("use kho_scratch=18M,34M,18M"), "Linux 6.18.15 does not round low and global"
    rounded = what_if(examine(old), "kho_scratch=18M,34M,18M")
    assert rounded.sizes == [18 * MIB, 34 * MIB, 18 * MIB, 18 * MIB]
    areas = ((0x60000000, 20 * MIB), (0x1_4000_0000, 36 * MIB), (0x2_C000_0000, 20 * MIB), (68 * GIB, 20 * MIB))
    new = Machine(areas=areas, cmdline="kho=on kho_scratch=17M,33M,17M").write(tmp_path / "new")
    assert (examine(new).scratch, examine(new).scratch_how) == (96 * MIB, "exact")
    assert what_if(examine(new), "kho_scratch=17M,33M,17M").then == 96 * MIB


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("kho_scratch=1G,1G,1G kho_scratch=16M,512M,32M", "16M,512M,32M"),
        ("kho_scratch=16M,512M,32M kho_scratch=512M", "16M,512M,32M"),
        ("kho_scratch=16M,512M,32M kho_scratch", "16M,512M,32M"),
        ("kho-scratch=16M,512M,32M", "16M,512M,32M"),
        ('"kho_scratch=16M,512M,32M" -- kho_scratch=1M,1M,1M', "16M,512M,32M"),
        ("kho_scratch=0x1000000,0x20000000,040000000", "0x1000000,0x20000000,040000000"),
        ("kho_scratch=16384k,512m,32M", "16384k,512m,32M"),
    ],
)
def test_the_last_valid_value_of_kho_scratch_is_in_effect(line: str, value: str, tmp_path: Path) -> None:
    sizes = SIZES if "040000000" not in value else (*SIZES[:2], *((at, 8 * MIB) for at, _ in SIZES[2:]))
    report = examine(Machine(areas=sizes, cmdline=f"kho=on {line}").write(tmp_path))
    assert (report.scratch, report.scratch_how) == (total(sizes), "exact")
    assert ("DOC005" in finding_ids(report)) == (line.endswith(("=512M", "kho_scratch")))
    for finding in report.findings:
        if finding.id == "DOC005":
            assert f"{value} is in effect" in finding.value


def test_a_valid_percentage_after_sizes_is_in_effect(tmp_path: Path) -> None:
    made = Machine(areas=DEFAULT, cmdline="kho=on kho_scratch=16M,16M,16M kho_scratch=300%").write(tmp_path / "a")
    assert (examine(made).scale, examine(made).scratch_how) == (300, "inferred")
    made = Machine(areas=DEFAULT, cmdline="kho=on kho_scratch=30.5%").write(tmp_path / "b")
    report = examine(made)
    assert report.scale == 200
    assert any("the default of 200 % is in effect" in f.value for f in report.findings if f.id == "DOC005")


def test_inherited_areas_are_found_with_and_without_root(tmp_path: Path) -> None:
    said = ["KHO: found kexec handover data.", SAID, "KHO: exec from: 7.3.3-cloud (count 3)"]
    made = Machine(areas=SIZES, used=200 * MIB, cold=False, cmdline=LINE, messages=said)
    user = examine(without(made.write(tmp_path / "user"), "proc/pagetypeinfo"))
    assert (user.state, user.boot, user.previous_release, user.kexec_count) == ("active", "kho", "7.3.3-cloud", 3)
    assert (bounds(user), user.scratch_how) == ((392 * MIB, 392 * MIB, None), "at least"), (
        "the boot line does not apply to inherited areas"
    )
    assert "at least 392.0 MiB" in user.headline
    assert user.by_node == {0: 360 * MIB, 1: 32 * MIB}, "a lower bound as well"
    root = examine(made.write(tmp_path / "blocks"))
    assert (root.scratch, root.scratch_how, root.by_node) == (592 * MIB, "inferred", BY_NODE)
    made.messages = ()
    tree = made.with_debugfs(tmp_path / "root")
    write(tree, "sys/kernel/debug/kho/in/fdt", b"kho-v4\0")
    write(tree, "sys/kernel/debug/kho/in/sub_fdts/kexec-metadata", metadata("7.3.3-cloud", 3))
    write(tree, "sys/kernel/debug/kho/out/sub_fdts/kexec-metadata", metadata("7.3.4", 4))
    exact = examine(tree)
    assert (exact.scratch, exact.scratch_how, exact.boot) == (592 * MIB, "exact", "kho")
    assert (exact.previous_release, exact.kexec_count, exact.by_node) == ("7.3.3-cloud", 3, BY_NODE)
    told = next(f for f in exact.findings if f.id == "DOC017")
    assert told.value == "from Linux 7.3.3-cloud, kexec number 3 since the last cold boot"
    assert {"DOC001", "DOC008", "DOC017"} <= finding_ids(exact)


def test_6_18_does_not_log_the_previous_release(tmp_path: Path) -> None:
    made = Machine(areas=SIZES, cold=False, release="6.18.15", messages=["KHO: found kexec handover data."])
    report = examine(made.write(tmp_path))
    assert (report.boot, report.previous_release, report.kexec_count) == ("kho", None, None)
    assert report.scratch == 592 * MIB


def test_kho_off_after_a_handover_keeps_the_inherited_scratch(tmp_path: Path) -> None:
    made = Machine(areas=SIZES, cold=False, cmdline="kho=off", messages=["KHO: found kexec handover data."])
    report = examine(made.write(tmp_path))
    assert (report.scratch, report.exit_code) == (592 * MIB, 1)
    assert any(
        "kho=off frees it at the next kexec or cold boot" in f.value for f in report.findings if f.id == "DOC001"
    )
    assert any("cold boot" in note for note in what_if(report, "kho=off").notes)


@pytest.mark.parametrize("scratch", [0, 100 * MIB])
def test_a_failed_reservation_on_one_node_is_reported(scratch: int, tmp_path: Path) -> None:
    said = [
        "KHO: Failed to reserve nid 1 scratch buffer",
        "KHO: Failed to reserve scratch area, disabling kexec handover",
    ]
    left = ((0x60000000, 300 * MIB), (0x1_4000_0000, 5 * GIB)) if scratch else ()
    made = Machine(areas=left, cold=False, messages=said, cmdline="kho=on").write(tmp_path)
    report = examine(made)
    assert (report.state, report.leftover, report.scratch) == ("failed", total(left), 0)
    assert any("the nid 1 scratch buffer" in f.value for f in report.findings if f.id == "DOC003")
    assert report.by_node == ({0: total(left)} if scratch else {})


def test_the_boot_parameters_distinguish_a_leftover_from_inherited_scratch(tmp_path: Path) -> None:
    made = Machine(areas=((0x60000000, 300 * MIB),), cold=False, cmdline="kho=on", used=10 * MIB)
    tree = without(made.write(tmp_path), "var/log/dmesg", "proc/pagetypeinfo")
    assert examine(tree).state == "active", "these files also fit a handover"
    write(tree, "sys/kernel/boot_params/version", "0x020f\n")
    assert (examine(tree).state, examine(tree).leftover) == ("failed", 290 * MIB)
    write(tree, "sys/kernel/boot_params/setup_data/0/type", "0xa\n")
    assert (examine(tree).state, examine(tree).boot) == ("active", "kho")


@pytest.mark.parametrize(
    ("page", "block"), [(4096, 2 * MIB), (16384, 32 * MIB), (65536, 512 * MIB), (65536, 2 * MIB), (16384, 16384 << 7)]
)
def test_page_size_and_pageblock_are_detected_on_two_nodes(page: int, block: int, tmp_path: Path) -> None:
    unit = max(block, 32 * MIB)
    areas = ((0x60000000, unit), (0x1_4000_0000, 2 * unit), (0x2_C000_0000, unit), (68 * GIB, unit))
    made = Machine(areas=areas, used=unit // 2, page=page, block=block, cmdline="kho=on", release="6.18.15")
    tree = without(made.write(tmp_path), "var/log/dmesg")
    report = examine(tree)
    assert (report.page_size, report.pageblock, report.scratch) == (page, block, 5 * unit)
    user = examine(without(tree, "proc/pagetypeinfo"))
    assert (user.page_size, user.scratch, user.by_node) == (page, 5 * unit, {0: 4 * unit, 1: unit})
    least = examine(without(tree, "proc/zoneinfo"))
    assert (least.state, least.scratch, least.scratch_how) == ("active", 5 * unit - unit // 2, "at least")


def test_node_numbers_are_those_of_the_kernel(tmp_path: Path) -> None:
    ranges = ((0, 0, 2 * GIB), (0, 4 * GIB, 66 * GIB), (4, 66 * GIB, 70 * GIB))
    areas = (*SIZES[:3], (67 * GIB, 32 * MIB))
    report = examine(Machine(ranges=ranges, areas=areas, cmdline=LINE).write(tmp_path))
    assert (report.scratch, report.by_node) == (592 * MIB, {0: 560 * MIB, 4: 32 * MIB})
    assert what_if(report, "kho_scratch=16M,16M,8G").notes[-1] == "PERNODE exceeds the memory of node 4"
    assert "node 4: 64.0 MiB" in kho("doctor", "--what-if", "kho_scratch=16M,16M,64M", tmp_path).out


def test_memoryless_nodes_have_no_scratch(tmp_path: Path) -> None:
    tree = Machine(areas=SIZES, cmdline=LINE).write(tmp_path)
    empty = "".join(
        f"Node 2, zone {zone:>8}\n  pages free     0\n        spanned  0\n        present  0\n        managed  0\n"
        "        cma      0\n        protection: (0, 0)\n"
        for zone in ("DMA", "Normal")
    )
    write(tree, "proc/zoneinfo", (tree / "proc/zoneinfo").read_text() + empty)
    report = examine(tree)
    assert (set(report.nodes), report.scratch_how) == ({0, 1}, "exact")


JOURNAL = "-- Logs begin at Mon 2026-11-23 --\n"


def sosreport(tree: Path, log: str, lines: str) -> Path:
    """Write what sos collects: no /proc/version, no debugfs, and the log as printed by a command."""
    Machine(areas=SIZES, cmdline=LINE, release="6.18.15").write(tree)
    without(tree, "proc/version", "var/log/dmesg")
    write(tree, "sos_commands/kernel/uname_-a", "Linux db1 6.18.15 #1 SMP PREEMPT_DYNAMIC x86_64 GNU/Linux\n")
    write(tree, "boot/config-6.18.15", "CONFIG_CMA=y\nCONFIG_KEXEC_HANDOVER=y\n")
    return write(tree, log, lines)


@pytest.mark.parametrize(
    ("log", "prefix"),
    [
        ("sos_commands/kernel/dmesg_-T", "[Mon Nov 23 09:15:57 2026] "),
        ("sos_commands/kernel/dmesg", "[    0.000000] "),
        ("sos_commands/logs/journalctl_--no-pager_--boot", "Nov 23 09:15:57 db1 kernel: "),
        ("sos_commands/logs/journalctl_--no-pager_--catalog_--boot", "Nov 23 09:15:57 db1 kernel: "),
        ("sos_commands/logs/journalctl_--no-pager", "2026-11-23T09:15:57+0000 db1 kernel: "),
        ("var/log/messages", "Nov 23 09:15:57 db1 kernel: [    0.000000] "),
        ("var/log/syslog", "2026-11-23T09:15:57.000000+00:00 db1 kernel: [    0.000000] "),
    ],
)
def test_the_log_is_found_in_each_place_of_an_sosreport(log: str, prefix: str, tmp_path: Path) -> None:
    said = ("Linux version 6.18.15 (root@vm)", SAID)
    report = examine(sosreport(tmp_path, log, JOURNAL + "".join(f"{prefix}{line}\n" for line in said)))
    assert (report.release, report.built_in, report.scratch) == ("6.18.15", True, 592 * MIB)
    assert report.boot == "cold"


def test_a_log_with_the_beginning_of_the_boot_is_preferred(tmp_path: Path) -> None:
    boot = "sos_commands/logs/journalctl_--no-pager_--boot"
    tree = sosreport(tmp_path, boot, f"kernel: Linux version 6.18.15 (x)\nkernel: {SAID}\n")
    write(tree, "sos_commands/kernel/dmesg", "[99.0] cma: Reserved 1 MiB at 0x1000000\n[99.1] luo: late\n")
    report = examine(tree)
    assert report.boot == "cold"
    shown = [seen.file for finding in report.findings for seen in finding.evidence]
    assert "sos_commands/kernel/dmesg" not in shown


def test_of_a_long_log_only_the_last_boot_is_used(tmp_path: Path) -> None:
    failed = "kernel: KHO: Failed to reserve scratch area, disabling kexec handover\n"
    text = f"kernel: Linux version 6.18.15 (x)\n{failed}" + "db1 app: nothing\n" * 600_000
    assert examine(sosreport(tmp_path, "var/log/messages", text)).state == "active"
    text += f"kernel: Linux version 6.18.15 (x)\n{failed}"
    assert examine(write(tmp_path, "var/log/messages", text)).state == "failed"


def test_liveupdate_off_is_not_a_request(tmp_path: Path) -> None:
    tree = Machine(cmdline="kho=off liveupdate=off").write(tmp_path)
    assert "DOC021" not in finding_ids(examine(tree))
    assert "DOC021" in finding_ids(examine(write(tree, "proc/cmdline", "kho=off liveupdate=1\n")))


def test_kho_on_without_scratch_is_reported_with_its_certainty(tmp_path: Path) -> None:
    tree = Machine(cmdline="kho=on").write(tmp_path)
    report = examine(without(tree, "var/log/dmesg"))
    assert (report.state, report.scratch, report.exit_code) == ("off", 0, 1)
    assert [f.certainty for f in report.findings if f.id == "DOC025"] == ["likely"]
    report = examine(without(tree, "proc/pagetypeinfo"))
    assert [f.certainty for f in report.findings if f.id == "DOC025"] == ["guess"]
    report = examine(write(tree, "proc/cmdline", "quiet\n"))
    assert (report.exit_code, "DOC025" in finding_ids(report)) == (0, False), "kho= is not given"


def test_zoneinfo_alone_shows_the_leftover(tmp_path: Path) -> None:
    left = ((0x60000000, 300 * MIB), (68 * GIB, 100 * MIB))
    said = [
        "KHO: Failed to reserve global scratch buffer",
        "KHO: Failed to reserve scratch area, disabling kexec handover",
    ]
    tree = Machine(areas=left, cold=False, cmdline="kho=on", messages=said).write(tmp_path)
    report = examine(without(tree, "proc/meminfo", "proc/pagetypeinfo"))
    assert (report.state, report.leftover, report.by_node) == ("failed", 400 * MIB, {0: 300 * MIB, 1: 100 * MIB})
    assert "at least 400.0 MiB" in report.headline
    report = examine(without(tree, "proc/zoneinfo"))
    assert (report.state, report.leftover) == ("failed", None)
    assert report.headline.endswith("these files do not show the leftover in CMA.")


def test_other_cma_areas_are_not_scratch_without_meminfo(tmp_path: Path) -> None:
    others = ((0x3_0000_0000, 128 * MIB),)
    tree = Machine(areas=(), others=others, cmdline="cma=128M").write(tmp_path / "off")
    assert examine(without(tree, "proc/meminfo")).exit_code == 0, "the log has the size of the other CMA areas"
    tree = Machine(areas=SIZES, others=others, cmdline="kho=on").write(tmp_path / "on")
    told = examine(without(tree, "proc/meminfo"))
    assert (told.scratch, told.scratch_how) == (592 * MIB, "inferred")
    report = examine(without(tree, "var/log/dmesg"))
    assert (report.scratch_low, report.scratch) == (0, 720 * MIB)
    found = next(f for f in report.findings if f.id == "DOC001")
    assert (found.certainty, "CmaTotal is unknown" in found.value) == ("guess", True)


def test_memory_that_may_be_leftover_or_inherited_is_a_guess(tmp_path: Path) -> None:
    tree = Machine(areas=((0x60000000, 300 * MIB),), cold=False, cmdline="quiet").write(tmp_path)
    report = examine(without(tree, "var/log/dmesg"))
    found = next(f for f in report.findings if f.id == "DOC001")
    assert (found.certainty, "it may be the leftover of a failed reservation" in found.value) == ("guess", True)


def test_sizes_larger_than_ram_mean_a_failed_reservation(tmp_path: Path) -> None:
    tree = Machine(areas=((0x60000000, 64 * MIB),), cold=False, cmdline="kho=on kho_scratch=64M,200G,64M").write(
        tmp_path
    )
    report = examine(without(tree, "var/log/dmesg", "proc/zoneinfo", "proc/pagetypeinfo"))
    assert (report.state, report.leftover) == ("failed", 64 * MIB)


@pytest.mark.parametrize("gone", ["proc/pagetypeinfo", "proc/zoneinfo"])
def test_sizes_that_pageblocks_contradict_are_ignored(gone: str, tmp_path: Path) -> None:
    tree = Machine(areas=DEFAULT, cmdline=LINE, messages=[SAID]).write(tmp_path)
    report = examine(without(tree, gone))
    assert (report.scratch, report.scratch_how, report.areas) == (total(DEFAULT), "inferred", [])
