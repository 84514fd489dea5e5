"""Crash kernels on machines with KHO: damaged dumps, crash kernels that are not there, and machines with neither."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kho.doctor import Finding, Report, examine, what_if
from kho.doctor.crash import fits_after_handover, proposed
from kho.doctor.export import prometheus, row
from kho.fleet import doctor_row

from command import kho as run
from doctor_crash_hosts import CALL, inside, layout70, loads, say
from doctor_hosts import HOSTS, MIB, copied, debugfs, edit, machine, write

CRASH = {f"DOC0{n}" for n in range(26, 32)}


def crash_ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings} & CRASH


def one(report: Report, rule_id: str) -> Finding:
    [found] = [finding for finding in report.findings if finding.id == rule_id]
    assert found.evidence
    return found


@pytest.mark.parametrize(
    ("release", "signature", "certainty"),
    [
        ("7.0.9", None, "likely"),
        ("7.0.0", None, "likely"),
        ("6.19.11", None, "likely"),
        ("7.0.0-14-generic", None, "likely"),
        ("7.0.0-14-generic", "Ubuntu 7.0.0-14.14-generic 7.0.9", "likely"),
        ("7.0.0-1010-nvidia", "Ubuntu 7.0.0-1010.10-nvidia 7.0.0", "likely"),
        ("6.16.3", None, "likely"),
        ("6.17.3", None, "likely"),
        ("7.0.11", None, None),
        ("7.0.14", None, None),
        ("7.0.0-31-generic", "Ubuntu 7.0.0-31.31-generic 7.0.12", None),
        ("7.0.0-31-generic", "Ubuntu 7.0.0-31.31-generic 7.0.11", None),
        ("7.0.12-1-pve", None, None),
        ("7.1.0", None, None),
        ("7.1.13", None, None),
        ("7.3.4", None, None),
        ("6.17.4", None, None),
        ("6.18.15", None, None),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_release_decides_whether_a_crash_kernel_is_misplaced(
    release: str, signature: str | None, certainty: str | None, stage: int, tmp_path: Path
) -> None:
    report = examine(layout70(tmp_path, stage=stage, release=release, signature=signature))
    if certainty is None:
        assert crash_ids(report) == set()
        assert report.crash_dumps == "ok"
        return
    assert crash_ids(report) == {"DOC026"}
    found = one(report, "DOC026")
    assert found.certainty == certainty
    assert "unless its command line has nokaslr" in found.value
    assert found.evidence[0].text == release
    unknown = "generic" in release and signature is None
    assert ("ask the vendor for a6715d7ec472" in found.value) == unknown
    assert report.crash_dumps == ("cannot tell" if unknown else "damaged")
    assert ("the kernel itself is in scratch" in found.value) == (stage == 2)


def test_the_remedies_are_named_in_the_order_in_which_they_help(tmp_path: Path) -> None:
    remedy = one(examine(layout70(tmp_path)), "DOC026").to_dict()["remedy"]
    order = [
        remedy.index(word) for word in ("7.0.11", "nokaslr", '"-c"', "kho=off on the crash kernel's line does not help")
    ]
    assert order == sorted(order)
    assert "/etc/default/kdump-tools" in remedy
    assert "kdump-config reload" in remedy


SAFE: list[tuple[str, Callable[[Path], Path]]] = [
    ("nokaslr on the line, which kdump-tools passes on", lambda at: layout70(at, nokaslr=True)),
    ("nokaslr in the call", lambda at: layout70(at, call=CALL.format(nokaslr=" nokaslr"))),
    ("kexec_load", lambda at: layout70(at, call=CALL.format(nokaslr="").replace("-p ", "-p -c "))),
    ("nothing loaded", lambda at: layout70(at, loaded="0")),
    ("kho=off", lambda at: layout70(at, cmdline="crashkernel=16M kho=off", stage=2)),
    ("an image without KHO data", lambda at: loads(layout70(at), kho=False)),
    (
        "configured",
        lambda at: write(layout70(at), "etc/default/kdump-tools", 'KDUMP_CMDLINE_APPEND="nr_cpus=1 nokaslr"\n'),
    ),
    (
        "configured -c",
        lambda at: write(layout70(at), "etc/default/kdump-tools", 'USE_KDUMP=1\nKDUMP_KEXEC_ARGS="-c"\n'),
    ),
    (
        "configured by Fedora",
        lambda at: write(layout70(at), "etc/sysconfig/kdump", 'KDUMP_COMMANDLINE_APPEND="irqpoll nokaslr"\n'),
    ),
]


@pytest.mark.parametrize(("name", "build"), SAFE, ids=[name for name, _ in SAFE])
def test_a_remedy_that_is_in_place_is_no_finding(name: str, build: Callable[[Path], Path], tmp_path: Path) -> None:
    report = examine(build(tmp_path))
    assert crash_ids(report) == set()
    assert report.crash_dumps == ("none" if name == "nothing loaded" else "ok")


NOT_SAFE: list[tuple[str, Callable[[Path], Path]]] = [
    ("kho=off in the call", lambda at: layout70(at, call=CALL.format(nokaslr=" kho=off"))),
    ("nokaslrx in the call", lambda at: layout70(at, call=CALL.format(nokaslr=" nokaslrx=1"))),
    ("the call has it not", lambda at: layout70(at, nokaslr=True, call=CALL.format(nokaslr=""))),
    (
        "configured, not reloaded",
        lambda at: write(
            layout70(at, call=CALL.format(nokaslr="")), "etc/default/kdump-tools", 'KDUMP_CMDLINE_APPEND="nokaslr"\n'
        ),
    ),
    ("a comment", lambda at: write(layout70(at), "etc/default/kdump-tools", '#KDUMP_CMDLINE_APPEND="nokaslr"\n')),
]


@pytest.mark.parametrize(("name", "build"), NOT_SAFE, ids=[name for name, _ in NOT_SAFE])
def test_what_does_not_help_is_not_taken_for_a_remedy(name: str, build: Callable[[Path], Path], tmp_path: Path) -> None:
    report = examine(build(tmp_path))
    assert crash_ids(report) == {"DOC026"}
    assert ("kdump-config reload" in one(report, "DOC026").value) == (name == "configured, not reloaded")


def test_the_segments_of_the_loaded_image_prove_it(tmp_path: Path) -> None:
    report = examine(loads(layout70(tmp_path), kho=True))
    found = one(report, "DOC026")
    assert found.certainty == "certain"
    assert "unless" not in found.value
    assert any("bufsz=0x30" in seen.text for seen in found.evidence)
    assert report.crash_dumps == "damaged"


def test_the_last_crash_image_counts_and_images_for_a_reboot_do_not(tmp_path: Path) -> None:
    tree = loads(loads(layout70(tmp_path), kho=False), kho=True, kind=0)
    assert crash_ids(examine(tree)) == set()
    assert one(examine(loads(tree, kho=True)), "DOC026").certainty == "certain"


def test_a_vendors_release_is_never_certain(tmp_path: Path) -> None:
    found = one(examine(loads(layout70(tmp_path, release="7.0.0-14-generic"), kho=True)), "DOC026")
    assert found.certainty == "likely"


def test_a_call_of_an_earlier_boot_does_not_count(tmp_path: Path) -> None:
    tree = layout70(tmp_path, call=CALL.format(nokaslr=" nokaslr"))
    write(tree, "proc/stat", "cpu  1 2 3\nbtime 1700000000\n")
    os.utime(tree / "var/crash/kexec_cmd", (1600000000, 1600000000))
    assert crash_ids(examine(tree)) == {"DOC026"}
    os.utime(tree / "var/crash/kexec_cmd", (1700000100, 1700000100))
    assert crash_ids(examine(tree)) == set()


def test_a_guess_needs_a_reserved_area(tmp_path: Path) -> None:
    tree = layout70(tmp_path, loaded=None)
    assert one(examine(tree), "DOC026").certainty == "guess"
    assert examine(tree).crash_dumps == "cannot tell"
    other = machine(tmp_path / "other", scratch=(64 * MIB,), release="7.0.9", cmdline="kho=on")
    assert crash_ids(examine(other)) == set()


@pytest.mark.parametrize(
    ("release", "loaded", "certainty"),
    [
        ("6.19.11", "1", "certain"),
        ("7.0.9", "1", "certain"),
        ("6.16.3", "1", "likely"),
        ("6.18.15", "1", "likely"),
        ("7.0.0-14-generic", "1", "likely"),
        ("7.0.11", "1", None),
        ("7.0.9", "0", None),
    ],
)
def test_finalized_with_a_crash_kernel_is_an_error(
    release: str, loaded: str, certainty: str | None, tmp_path: Path
) -> None:
    report = examine(layout70(tmp_path, release=release, finalize="1", loaded=loaded, nokaslr=True))
    if certainty is None:
        assert crash_ids(report) == set()
        return
    found = one(report, "DOC027")
    assert (found.severity, found.certainty) == ("error", certainty)
    assert report.crash_dumps == "none"
    assert report.findings[0].id == "DOC027"


def test_a_crash_kernel_names_the_range_that_the_dump_has_lost(tmp_path: Path) -> None:
    report = examine(inside(tmp_path))
    found = one(report, "DOC028")
    assert found.certainty == "certain"
    assert "0x33200000 to 0x33bfffff, in 10.0 MiB" in found.value
    assert found.evidence[0].text.startswith(".text .data .bss")
    assert report.crash_dumps == "damaged"


def test_the_memory_map_alone_shows_the_range(tmp_path: Path) -> None:
    found = one(examine(inside(tmp_path, said=False)), "DOC028")
    assert found.certainty == "likely"


def test_a_crash_kernel_in_its_own_memory_has_lost_nothing(tmp_path: Path) -> None:
    for tree in (HOSTS / "kdump-kernel", inside(tmp_path, misplaced=False, said=False)):
        report = examine(tree)
        assert crash_ids(report) == set()
        assert report.crash_dumps == "ok"
        assert report.exit_code == 0


def test_a_crash_kernel_has_no_failed_reservation(tmp_path: Path) -> None:
    tree = inside(tmp_path, misplaced=False, said=False)
    say(
        tree,
        "KHO: Failed to reserve nid 0 scratch buffer",
        "KHO: Failed to reserve scratch area, disabling kexec handover",
    )
    report = examine(tree)
    assert crash_ids(report) == {"DOC031"}
    assert "DOC003" not in {finding.id for finding in report.findings}
    assert report.exit_code == 0
    assert "harmless" in report.headline


@pytest.mark.parametrize("without", ["dmesg", "proc/pagetypeinfo", "proc/vmstat"])
def test_a_crash_kernel_without_one_file_is_still_one(without: str, tmp_path: Path) -> None:
    report = examine(copied("kdump-kernel", tmp_path, without))
    assert report.state == "off"
    assert report.exit_code == 0
    assert {"DOC003", "DOC025", "DOC029"}.isdisjoint({finding.id for finding in report.findings})


def test_after_a_handover_no_crash_kernel_is_reserved() -> None:
    report = examine(HOSTS / "no-crash-kernel")
    found = one(report, "DOC029")
    assert found.certainty == "certain"
    assert any("cannot allocate crashkernel (size:0x8000000)" in seen.text for seen in found.evidence)
    assert "kho_scratch=16M,256M,16M" in found.to_dict()["remedy"]
    assert report.crash_dumps == "none"


def cold(to: Path, scratch: str = "16M,64M,16M", areas: tuple[int, int, int] = (16, 64, 16)) -> Path:
    """The machine of no-crash-kernel before its live update: a cold boot that reserved 181 MiB, 128 of them for it."""
    tree = copied("no-crash-kernel", to, "sys/kernel/debug/kho/in")
    write(tree, "sys/kernel/kexec_crash_size", f"{128 * MIB}\n")
    write(tree, "sys/kernel/debug/kho/out/scratch_len", "".join(f"{size * MIB:#x}\n" for size in areas))
    line = (tree / "proc/cmdline").read_text().replace("16M,64M,16M", scratch)
    write(tree, "proc/cmdline", line)
    reserved = (181 << 10) + (sum(areas) << 10)
    return write(
        tree,
        "dmesg",
        f"Linux version 7.3.4 (root@vm) #1 SMP\nCommand line: {line}Kernel command line: {line}"
        "KHO: scratch areas: lowmem: 16MiB global: 64MiB pernode: 16MiB\n"
        "crashkernel reserved: 0x0000000077000000 - 0x000000007f000000 (128 MB)\n"
        f"Memory: 1800000K/2096620K available (5192K kernel code, {reserved}K reserved, 0K cma-reserved)\n",
    )


def test_before_the_live_update_the_loss_is_predicted(tmp_path: Path) -> None:
    report = examine(cold(tmp_path))
    found = one(report, "DOC030")
    assert found.certainty == "certain"
    assert "kho_scratch=16M,256M,16M" in found.to_dict()["remedy"]
    assert "DOC009" not in {finding.id for finding in report.findings}, "128 of the 181 MiB are the crash kernel's"
    assert report.needed_at_boot == 53 * MIB
    write(tmp_path / "no-crash-kernel", "sys/kernel/kexec_crash_loaded", "1\n")
    assert examine(tmp_path / "no-crash-kernel").crash_dumps == "none after the next live update"


def test_scratch_with_room_for_the_crash_kernel_is_no_finding(tmp_path: Path) -> None:
    tree = write(cold(tmp_path, "16M,256M,16M", (16, 256, 16)), "sys/kernel/kexec_crash_loaded", "1\n")
    report = examine(tree)
    assert crash_ids(report) == set()
    assert report.crash_dumps == "ok"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("128M", 128),
        ("128M@16M", 128),
        ("0x8000000", 128),
        ("1G,high", 1024),
        ("1G,high crashkernel=64M,low", 1024),
        ("64M crashkernel=96M", 96),
        ("2G-4G:320M,4G-32G:512M,32G-64G:1024M", 0),
        ("1G-2G:320M,2G-:512M", 320),
        ("512M-:192M", 192),
        ("auto", 0),
        ("99999999999999999999M", 0),
        ("", 0),
    ],
)
def test_crashkernel_is_parsed_as_the_kernel_does(value: str, wanted: int, tmp_path: Path) -> None:
    tree = copied("no-crash-kernel", tmp_path, "dmesg")
    edit(tree, "proc/cmdline", ("crashkernel=128M", f"crashkernel={value}"))
    report = examine(tree)
    assert ("DOC029" in crash_ids(report)) == (wanted > 0)
    if wanted:
        assert f"asks for {wanted}.0 MiB" in one(report, "DOC029").value.replace("1.0 GiB", "1024.0 MiB")


def test_areas_that_adjoin_are_one_piece_for_a_crash_kernel() -> None:
    """7.3.4, 1 GiB, crashkernel=128M: 32M,128M,32M reserved it at 0x2d000000, across two areas; 16M,64M,16M did not."""
    areas, places = [32 * MIB, 128 * MIB, 32 * MIB], [0x33C00000, 0x2BC00000, 0x29C00000]
    assert fits_after_handover(areas, 128 * MIB, 41 * MIB, list(places)) is True
    assert fits_after_handover(areas, 128 * MIB, 41 * MIB, [0x33C00000, 0x2AC00000, 0x10000000]) is False
    assert fits_after_handover(areas, 128 * MIB, None) is None
    small = [16 * MIB, 64 * MIB, 16 * MIB]
    assert fits_after_handover(small, 128 * MIB, 41 * MIB, [0x34C00000, 0x30C00000, 0x2FC00000]) is False
    assert fits_after_handover(small, 128 * MIB, 41 * MIB) is False
    assert fits_after_handover([16 * MIB, 256 * MIB, 16 * MIB], 128 * MIB, 41 * MIB) is True


def test_a_proposal_is_whole_pageblocks_and_leaves_memory() -> None:
    assert (
        proposed([16 * MIB, 64 * MIB, 16 * MIB], 128 * MIB, 53 * MIB, 2048 * MIB, 2 * MIB) == "kho_scratch=16M,256M,16M"
    )
    assert proposed([], 128 * MIB, 64 * MIB, None, 512 * MIB) == "kho_scratch=512M,512M,512M"
    assert proposed([], 512 * MIB, 64 * MIB, 1024 * MIB, 2 * MIB) is None


def test_machines_without_a_crash_kernel_have_none_of_these_findings() -> None:
    for name in ("default-scratch", "hugepages", "kho-off", "scratch-too-big"):
        report = examine(HOSTS / name)
        assert crash_ids(report) == set()
        assert report.crash_dumps == "not set up"


def test_what_if_says_whether_a_crash_kernel_has_room_and_proposes_a_line(tmp_path: Path) -> None:
    tree = cold(tmp_path)
    same = what_if(examine(tree), "kho_scratch=16M,64M,16M")
    assert (same.fits, same.boots, same.crash_kernel) == (True, True, False)
    assert any("kho_scratch=16M,256M,16M has room" in note for note in same.notes)
    more = what_if(examine(tree), "kho_scratch=16M,256M,16M")
    assert (more.fits, more.boots, more.crash_kernel) == (True, True, True)
    assert run("doctor", "--what-if", "kho_scratch=16M,64M,16M", str(tree)).code == 1
    assert run("doctor", "--what-if", "kho_scratch=16M,256M,16M", str(tree)).code == 0
    assert what_if(examine(HOSTS / "default-scratch"), "kho_scratch=16M,64M,16M").crash_kernel is None


def test_what_if_exits_1_if_the_next_kernel_has_no_room() -> None:
    tree = str(HOSTS / "default-scratch")
    small = run("doctor", "--what-if", "kho_scratch=4M,8M,4M", tree)
    assert small.code == 1
    assert "too small for a handover" in small.out
    assert "initramfs" in small.out


def test_without_numa_the_default_costs_twice_as_much(tmp_path: Path) -> None:
    """Guests of 2 GiB with crashkernel=128M and no kho_scratch= had scratch of 1456 MiB: 181 MiB were reserved."""
    tree = machine(tmp_path, nodes=(2048 * MIB,), cmdline="kho=off crashkernel=128M", release="7.3.4")
    write(tree, "var/log/dmesg", "Linux version 7.3.4 (root@vm) #1 SMP\nMemory: 1800000K/2096620K available "
          f"(1K kernel code, {181 << 10}K reserved, 0K cma-reserved)\n")  # fmt: skip
    write(tree, "proc/vmstat", "nr_free_pages 1\nnuma_hit 1\n")
    assert what_if(examine(tree), "kho=on").then == 4 * 181 * MIB
    write(tree, "proc/vmstat", "nr_free_pages 1\n")
    assert abs((what_if(examine(tree), "kho=on").then or 0) - 1456 * MIB) < 16 * MIB


@pytest.mark.parametrize(
    ("release", "signature", "accepted"),
    [
        ("7.0.9", None, False),
        ("6.19.11", None, False),
        ("6.18.41", None, False),
        ("6.16.1", None, False),
        ("7.1.4", None, False),
        ("7.0.0-14-generic", None, False),
        ("7.1.0-3-generic", "Ubuntu 7.1.0-3.3-generic 7.1.4", False),
        ("7.1.0-3-generic", "Ubuntu 7.1.0-3.3-generic 7.1.5", True),
        ("6.18.42", None, True),
        ("7.1.5", None, True),
        ("7.2.0", None, True),
        ("7.3.4", None, True),
    ],
)
def test_sizes_must_be_whole_pageblocks_where_the_kernel_does_not_round(
    release: str, signature: str | None, accepted: bool, tmp_path: Path
) -> None:
    odd = "kho_scratch=17M,65M,15M"
    tree = machine(tmp_path, scratch=(100 * MIB,), cmdline=f"kho=on {odd}", release=release)
    if signature is not None:
        write(tree, "proc/version_signature", signature + "\n")
    report = examine(tree)
    found = [finding for finding in report.findings if finding.id == "DOC032"]
    predicted = what_if(report, odd)
    assert predicted.accepted == accepted
    if accepted:
        assert not found
        return
    assert [finding.certainty for finding in found] == [
        "likely" if "generic" in release and not signature else "certain"
    ]
    assert "kho_scratch=18M,66M,16M" in found[0].to_dict()["remedy"]
    assert any("kho_scratch=18M,66M,16M" in note for note in predicted.notes)
    assert what_if(report, "kho_scratch=18M,66M,16M").accepted
    assert run("doctor", "--what-if", odd, str(tree)).code == 1
    assert what_if(report, "kho_scratch=16M,64M,15M").accepted, "sizes of nodes are rounded everywhere"


def test_areas_in_debugfs_decide_whether_sizes_are_whole(tmp_path: Path) -> None:
    tree = machine(tmp_path, scratch=(96 * MIB,), cmdline="kho=on kho_scratch=17M,64M,16M", release="7.0.0-14-generic")
    debugfs(tree, [(1 << 32, 18 * MIB), (2 << 32, 64 * MIB), (3 << 32, 16 * MIB)])
    assert "DOC032" not in {finding.id for finding in examine(tree).findings}, "a vendor's kernel that rounds"
    debugfs(tree, [(1 << 32, 17 * MIB), (2 << 32, 64 * MIB), (3 << 32, 16 * MIB)])
    assert one(examine(tree), "DOC032").certainty == "certain"


def test_a_fleet_gets_a_verdict_for_each_machine(tmp_path: Path) -> None:
    damaged = layout70(tmp_path / "a")
    fine = layout70(tmp_path / "b", release="7.0.11")
    assert doctor_row(str(damaged))["crash_dumps"] == "damaged"
    assert doctor_row(str(damaged))["crash_dumps_needs"] == "one line in a file"
    assert row(examine(fine))["crash_dumps"] == "ok"
    text = prometheus([examine(damaged)])
    assert 'kho_crash_dumps{verdict="damaged",needs="one line in a file"} 1' in text


def test_the_summary_of_a_fleet_has_the_share_that_needs_each_remedy() -> None:
    from kho.cli.fleet_options import crash_line

    counts = {("ok", ""): 2, ("damaged", "one line in a file"): 1, ("none", "a reboot"): 1}
    assert crash_line(counts) == (
        "crash dumps: 1 damaged, 1 none, 2 ok; needed: 25.0 % one line in a file, 25.0 % a reboot"
    )


@pytest.mark.parametrize("misplaced", [True, False])
def test_inspect_of_a_crash_kernels_vmcore_names_the_lost_range(misplaced: bool, tmp_path: Path) -> None:
    tree = inside(tmp_path, misplaced=misplaced, said=misplaced)
    dump = (HOSTS.parent / "linux-7.3.4-x86_64" / "handover.elf").read_bytes()
    write(tree, "proc/vmcore", dump)
    done = run("inspect", str(tree / "proc/vmcore"))
    assert done.code == 0
    assert ("note: the crash kernel runs at 0x33200000 to 0x33bfffff, in 10.0 MiB" in done.err) == misplaced
