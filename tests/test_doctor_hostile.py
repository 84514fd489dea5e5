"""Hostile and broken snapshots: time and memory are bounded, unread files are reported, nothing raises."""

from __future__ import annotations

import errno
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kho.cli.doctor import report_lines
from kho.doctor import Report, examine, what_if
from kho.doctor.export import prometheus
from kho.doctor.tree import FILE_LIMIT, Tree

from bounded import bounded
from command import kho, process
from doctor_hosts import HOSTS, copied, debugfs, machine, write

FILES = [
    "proc/meminfo",
    "proc/zoneinfo",
    "proc/pagetypeinfo",
    "proc/cmdline",
    "proc/version",
    "proc/sys/kernel/osrelease",
    "proc/iomem",
    "proc/vmstat",
    "proc/modules",
    "proc/misc",
    "proc/config.gz",
    "boot/config-7.3.4",
    "var/log/dmesg",
    "sys/kernel/debug/kho/out/scratch_len",
    "sys/kernel/debug/kho/out/scratch_phys",
    "sys/kernel/debug/kho/out/finalize",
    "sys/kernel/debug/kho/out/fdt",
    "sys/kernel/debug/kho/in/sub_fdts/kexec-metadata",
    "sys/kernel/debug/kho/out/sub_fdts/LUO",
    "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
    "sys/kernel/boot_params/setup_data/0/type",
]


def assert_printable_and_bounded(report: Report) -> None:
    """Assert that a report can be printed in every format, and that its figures and exit code are in range."""
    assert report.exit_code in (0, 1, 2)
    assert report.headline.isprintable()
    assert "\\u001b" not in json.dumps(report.to_dict())
    assert prometheus([report]).endswith("\n")
    assert report_lines(report, what_if(report, "kho=on kho_scratch=64M,64M,64M"))
    assert report_lines(report, None)
    for entry in report.unread:
        assert entry.file.isprintable()
        assert entry.why.isprintable()
    for value in (report.scratch, report.leftover, report.ram, report.scratch_high):
        assert value is None or 0 <= value < 1 << 63


def why_unread(report: Report, file: str) -> str:
    return next(entry.why for entry in report.unread if entry.file == file)


@pytest.mark.parametrize("file", FILES)
def test_garbage_in_one_file_raises_nothing(file: str, tmp_path: Path) -> None:
    tree = copied("default-scratch", tmp_path)
    for junk in (b"", b"\0" * 5000, bytes(range(256)) * 64, b"\x1b[2J\n" * 100, b"9" * 30, b" " * 100000 + b"x"):
        assert_printable_and_bounded(examine(write(tree, file, junk)))


def test_garbage_in_every_file_raises_nothing(tmp_path: Path) -> None:
    for file in FILES:
        write(tmp_path, file, os.urandom(70000))
    report = examine(tmp_path)
    assert_printable_and_bounded(report)
    assert ("proc/meminfo", "no line of meminfo") in report.unread
    assert ("proc/config.gz", "not gzip") in report.unread


@pytest.mark.parametrize(
    "huge", ["1" + "0" * 30, "9" * 5000, "18446744073709551615", "-1", "1e9", "\N{ARABIC-INDIC DIGIT NINE}" * 40]
)
def test_numbers_larger_than_any_memory_are_rejected(huge: str, tmp_path: Path) -> None:
    machine(tmp_path, cmdline=f"kho=on kho_scratch={huge}M,{huge},{huge}")
    for name in ("MemTotal", "CmaTotal", "CmaFree", "Hugetlb"):
        assert_printable_and_bounded(examine(write(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\n{name}: {huge} kB\n")))
    write(tmp_path, "proc/zoneinfo", f"Node {huge}, zone Normal\n        present  {huge}\n        cma {huge}\n")
    write(
        tmp_path,
        "proc/pagetypeinfo",
        f"Page block order: {huge}\nNumber of blocks type CMA\nNode 0, zone Normal {huge}\n",
    )
    write(tmp_path, "proc/vmstat", f"nr_memmap_boot_pages {huge}\n")
    debugfs(tmp_path, [(1 << 32, 1 << 51)] * 3)
    assert_printable_and_bounded(examine(tmp_path))
    write(tmp_path, "sys/kernel/debug/kho/out/scratch_len", f"{huge}\n0x{'f' * 16}\n")
    report = examine(tmp_path)
    assert_printable_and_bounded(report)
    assert report.scratch_how != "exact"


def test_of_a_log_of_1_gib_both_ends_are_read(tmp_path: Path) -> None:
    tree = machine(tmp_path, cmdline="kho=on")
    place = write(tree, "var/log/dmesg", "Linux version 7.3.4 (x)\n") / "var/log/dmesg"
    with place.open("r+b") as file:
        file.truncate(1 << 30)
        file.seek(0, 2)
        file.write(b"\nKHO: Failed to reserve scratch area, disabling kexec handover\n")
    tracemalloc.start()
    with bounded(10):
        report = examine(tree)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.state == "failed"
    assert "bytes" in why_unread(report, "var/log/dmesg")
    assert peak < 8 * FILE_LIMIT


def test_a_large_log_of_matching_lines_takes_bounded_time(tmp_path: Path) -> None:
    tree = machine(tmp_path, cmdline="kho=on")
    write(tree, "var/log/dmesg", b"Linux version 7.3.4 (x)\n" + b"KHO: exec from: x (count 1)\n" * 200_000)
    with bounded(10):
        assert_printable_and_bounded(examine(tree))


@pytest.mark.parametrize("line", [b"\n", b" \n", b"Node 0, zone " + b" " * 400 + b"x\n", b"a" * 100])
def test_large_files_of_unusual_lines_take_bounded_time(line: bytes, tmp_path: Path) -> None:
    for file in ("proc/zoneinfo", "proc/pagetypeinfo", "proc/meminfo", "var/log/dmesg", "proc/modules", "proc/iomem"):
        write(tmp_path, file, line * (2 * FILE_LIMIT // len(line)))
    with bounded(20):
        assert_printable_and_bounded(examine(tmp_path))


def test_a_gzip_bomb_is_truncated(tmp_path: Path) -> None:
    tree = machine(tmp_path)
    write(tree, "proc/config.gz", gzip.compress(b"CONFIG_SMP=y\n" + b"\0" * (48 << 20), 9))
    tracemalloc.start()
    report = examine(tree)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.state == "absent"
    assert peak < 6 * FILE_LIMIT


def test_links_out_of_the_tree_are_not_followed(tmp_path: Path) -> None:
    secret = write(tmp_path, "outside/meminfo", (HOSTS / "default-scratch/proc/meminfo").read_bytes())
    tree = tmp_path / "tree"
    (tree / "proc").mkdir(parents=True)
    (tree / "proc/meminfo").symlink_to("../../outside/meminfo")
    (tree / "proc/cmdline").symlink_to(secret / "outside/meminfo")
    (tree / "var").symlink_to("../../../../../../../../etc")
    (tree / "sys").symlink_to("/")
    (tree / "proc/zoneinfo").symlink_to("zoneinfo")
    report = examine(tree)
    assert_printable_and_bounded(report)
    assert (report.exit_code, report.ram) == (2, None)
    assert why_unread(report, "proc/meminfo") == "a link leads out of the tree"
    assert why_unread(report, "proc/cmdline") == "a link to a file that is not in the tree"
    assert why_unread(report, "proc/zoneinfo") == "too many links"


def test_absolute_links_resolve_within_the_tree(tmp_path: Path) -> None:
    tree = copied("default-scratch", tmp_path)
    (tree / "proc").rename(tree / "elsewhere")
    (tree / "proc").symlink_to("/elsewhere")
    (tree / "var/log/dmesg").rename(tree / "kernel.log")
    (tree / "var/log/dmesg").symlink_to("../../kernel.log")
    report = examine(tree)
    assert report.headline == examine(HOSTS / "default-scratch").headline
    assert report.unread == []


@pytest.mark.parametrize("file", ["proc/meminfo", "var/log/dmesg", "sys/kernel/debug/kho/out/scratch_len"])
def test_fifos_and_directories_in_place_of_files_do_not_block(file: str, tmp_path: Path) -> None:
    tree = copied("default-scratch", tmp_path)
    (tree / file).unlink()
    os.mkfifo(tree / file)
    report = examine(tree)
    assert_printable_and_bounded(report)
    assert why_unread(report, file) == "not a regular file"
    (tree / file).unlink()
    (tree / file).mkdir()
    assert why_unread(examine(tree), file) == "not a regular file"


def test_files_in_place_of_directories_raise_nothing(tmp_path: Path) -> None:
    for file in ("proc", "sys", "var", "boot", "dev", "etc", "run", "lib"):
        write(tmp_path, file, "a file")
    report = examine(tmp_path)
    assert_printable_and_bounded(report)
    assert report.exit_code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_listed_as_unread(tmp_path: Path) -> None:
    tree = copied("default-scratch", tmp_path)
    (tree / "sys/kernel/debug").chmod(0)
    (tree / "proc/pagetypeinfo").chmod(0)
    report = examine(tree)
    (tree / "sys/kernel/debug").chmod(0o755)
    assert why_unread(report, "proc/pagetypeinfo") == "permission denied"
    assert report.scratch == 0x6400000 + 0x5C00000


@pytest.mark.parametrize("call", ["open", "lstat", "scandir"])
def test_refused_system_calls_are_listed_as_unread(call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Root is never refused access, so the system calls are replaced to behave as for a user without permission."""
    closed = ("pagetypeinfo", "/debug/kho")
    original = getattr(os, call)

    def refused(path: Any, *args: Any, **more: Any) -> Any:
        if any(name in str(path) for name in closed):
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, *args, **more)

    monkeypatch.setattr(f"kho.doctor.tree.os.{call}", refused)
    report = examine(HOSTS / "default-scratch")
    assert_printable_and_bounded(report)
    assert {entry.why for entry in report.unread} == {"permission denied"}
    assert report.state == "active"


def test_a_read_error_is_listed_as_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, n: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("kho.doctor.tree.os.read", broken)
    report = examine(HOSTS / "default-scratch")
    assert_printable_and_bounded(report)
    assert why_unread(report, "proc/meminfo") == "Input/output error"
    assert report.exit_code == 2 or report.state == "active"


def test_deep_and_wide_directories_are_bounded(tmp_path: Path) -> None:
    tree = machine(tmp_path)
    deep = tree / "/".join(["sys/kernel/mm/hugepages", *["d" * 50] * 40])
    deep.mkdir(parents=True)
    folder = tree / "sys/class/infiniband"
    folder.mkdir(parents=True)
    for n in range(1100):
        (folder / f"mlx{n}\x1b[31m").touch()
    report = examine(tree)
    assert_printable_and_bounded(report)
    assert why_unread(report, "sys/class/infiniband") == "more than 1024 names"


def test_reading_stops_at_the_limit_of_a_tree(tmp_path: Path) -> None:
    write(tmp_path, "big", b"x" * 100)
    tree = Tree(tmp_path)
    tree._budget = 10
    piece = tree.read("big")
    assert piece is not None
    assert len(piece.head) == 10
    assert tree.unread == [("big", "the limit of 64.0 MiB for a tree is used up")]


def test_control_characters_in_a_logged_command_line_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, "dmesg", b"Linux version 7.3.4 (x)\nKernel command line: kho=off \x1b[31m kho_scratch=\x07\n")
    report = examine(tmp_path)
    assert_printable_and_bounded(report)
    assert report.headline == "KHO is off (kho=off on the command line) and holds nothing."


def test_nul_bytes_separate_words_of_a_command_line(tmp_path: Path) -> None:
    write(machine(tmp_path), "proc/cmdline", b"kho=on\0kho=off\0\x1b]0;x\x07\n")
    report = examine(tmp_path)
    assert_printable_and_bounded(report)
    assert report.state == "off"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_bytes_in_random_files_raise_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = copied("default-scratch", tmp_path_factory.mktemp("any"))
    for file in data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=6, unique=True)):
        place = tree / file
        before = place.read_bytes() if place.is_file() else b""
        junk = data.draw(st.binary(max_size=200))
        at = data.draw(st.integers(0, len(before)))
        write(tree, file, before[:at] + junk + before[at + data.draw(st.integers(0, 40)) :])
    assert_printable_and_bounded(examine(tree))


@settings(max_examples=40, deadline=None)
@given(words=st.text(max_size=80), value=st.text(alphabet="0123456789xKMG,%.abf ", max_size=30))
def test_random_command_lines_raise_nothing(words: str, value: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tree = machine(tmp_path_factory.mktemp("any"), cmdline=f"kho=on {words} kho_scratch={value}")
    assert_printable_and_bounded(examine(tree))


def test_the_command_prints_unread_files(tmp_path: Path) -> None:
    tree = copied("default-scratch", tmp_path)
    (tree / "proc/pagetypeinfo").unlink()
    os.mkfifo(tree / "proc/pagetypeinfo")
    done = kho("doctor", tree)
    assert done.code == 1
    assert "not read:\n  proc/pagetypeinfo: not a regular file\n" in done.out
    assert kho("doctor", "--json", tree).json["unread"] == [{"file": "proc/pagetypeinfo", "why": "not a regular file"}]


def test_an_empty_directory_exits_with_2(tmp_path: Path) -> None:
    done = process("doctor", tmp_path)
    assert (done.code, done.err) == (2, "")
    assert "Cannot determine" in done.out
