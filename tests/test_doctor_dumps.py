"""Dumps whose crash kernel ran in memory of the crashed machine: Ubuntu's own kernel, and the kernel log in a dump."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

import kho
import printk_ring
from kho.doctor import Finding, Report, examine
from kho.doctor.dumps import notes_of_dump
from kho.handover import kernellog
from kho.handover.kernellog import kernel_log
from test_filtered import pages_of

from bounded import bounded
from command import kho as run
from doctor_hosts import HOSTS, edit, write
from filtered import dump, note

UBUNTU, KDUMP, CRASHED = (HOSTS / f"ubuntu-7.0.0-14{name}" for name in ("", "-kdump", "-crashed"))
BANNER = (
    "Linux version 7.0.0-14-generic (buildd@lcy02-amd64-043) (gcc 15.2.0) #14-Ubuntu SMP PREEMPT_DYNAMIC Mon Apr 13 "
    "11:09:53 UTC 2026 (Ubuntu 7.0.0-14.14-generic 7.0.0)"
)
LOADED = "CPU: 0 UID: 0 PID: 1 Comm: init Kdump: loaded Not tainted 7.0.0-14-generic #14-Ubuntu"


def one(report: Report, rule_id: str) -> Finding:
    [found] = [finding for finding in report.findings if finding.id == rule_id]
    assert found.evidence
    return found


def ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings}


def copied(host: Path, to: Path) -> Path:
    shutil.copytree(host, to / host.name)
    return to / host.name


def test_ubuntus_own_kernel_passes_its_scratch_areas_to_the_crash_kernel() -> None:
    report = examine(UBUNTU)
    found = one(report, "DOC026")
    assert found.certainty == "certain"
    assert any("bufsz=0x30 mem=0x53ff0000" in seen.text for seen in found.evidence)
    assert report.crash_dumps == "damaged"
    assert report.share is not None
    assert report.share > 0.8


def test_the_crash_kernel_of_ubuntus_kernel_names_the_58_mib_that_it_overwrote() -> None:
    report = examine(KDUMP)
    assert "0x28a00000 to 0x2c42ffff, in 58.2 MiB" in one(report, "DOC028").value
    assert one(report, "DOC028").certainty == "certain"
    assert report.crash_dumps == "damaged"
    assert "harmless" in report.headline


def test_ubuntus_kernel_with_the_fix_has_nothing_wrong() -> None:
    report = examine(HOSTS / "ubuntu-7.0.0-44")
    assert {"DOC026", "DOC027", "DOC028", "DOC029", "DOC047"}.isdisjoint(ids(report))
    assert report.crash_dumps == "ok"
    inside = examine(HOSTS / "ubuntu-7.0.0-44-kdump")
    assert "DOC028" not in ids(inside)
    assert inside.crash_dumps == "ok"
    assert inside.exit_code == 0


def test_with_numa_a_crash_kernel_counts_once_in_a_percentage() -> None:
    """128 MiB more of crashkernel= gave 256 MiB more of low scratch, and the node's area stayed 246 MiB."""
    found = one(examine(UBUNTU), "DOC010")
    assert "192.0 MiB of the crash kernel, reserved at boot, add up to 384.0 MiB to scratch at 200 %" in found.value


@pytest.mark.parametrize("without", ["proc/iomem", "dmesg"])
def test_the_memory_map_and_the_log_each_name_the_same_range(without: str, tmp_path: Path) -> None:
    tree = copied(KDUMP, tmp_path)
    (tree / without).unlink()
    assert "0x28a00000 to 0x2c42ffff" in one(examine(tree), "DOC028").value


def test_the_first_message_of_ubuntus_kernels_has_the_stable_level(tmp_path: Path) -> None:
    tree = copied(UBUNTU, tmp_path)
    (tree / "proc/version_signature").unlink()
    found = one(examine(tree), "DOC026")
    assert found.certainty == "certain"
    assert any(seen.text == "Ubuntu 7.0.0-14.14-generic 7.0.0" for seen in found.evidence)
    edit(tree, "dmesg", ("(Ubuntu 7.0.0-14.14-generic 7.0.0)", "(Ubuntu 7.0.0-14.14-generic 7.0.11)"))
    assert "DOC026" not in ids(examine(tree))


def test_the_log_of_a_crashed_kernel_says_that_its_dump_is_damaged() -> None:
    report = examine(CRASHED)
    found = one(report, "DOC047")
    assert found.certainty == "certain"
    assert report.crash_dumps == "damaged"
    assert ids(report) & {"DOC026", "DOC028"} == set()


def test_the_crash_kernels_log_next_to_it_names_the_range(tmp_path: Path) -> None:
    tree = copied(CRASHED, tmp_path)
    shutil.copy(KDUMP / "dmesg", tree / "kexec-dmesg.log")
    report = examine(tree)
    found = one(report, "DOC028")
    assert "0x28a00000 to 0x2c42ffff" in found.value
    assert found.certainty == "certain"
    assert "DOC047" not in ids(report)


@pytest.mark.parametrize(
    ("change", "certainty"),
    [
        (("no_timer_check", "no_timer_check nokaslr"), None),
        (("no_timer_check", "no_timer_check kho=off"), None),
        (("14.14-generic 7.0.0)", "14.14-generic 7.0.11)"), None),
        (("bufsz=0x30 ", "bufsz=0x8000 "), None),
        (("kexec_file: nr_segments", "nothing: nr_segments"), "guess"),
        (("type:1,", "type:0,"), "guess"),
    ],
)
def test_what_the_crashed_kernels_log_says_decides(
    change: tuple[str, str], certainty: str | None, tmp_path: Path
) -> None:
    tree = copied(CRASHED, tmp_path)
    edit(tree, "vmcore-dmesg.txt", change)
    found = [finding.certainty for finding in examine(tree).findings if finding.id == "DOC047"]
    assert found == ([certainty] if certainty else [])


def test_a_crash_without_a_crash_kernel_has_no_dump_to_doubt(tmp_path: Path) -> None:
    tree = copied(CRASHED, tmp_path)
    lines = (tree / "vmcore-dmesg.txt").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "kexec_file" not in line]
    write(tree, "vmcore-dmesg.txt", "".join(kept).replace("Kdump: loaded ", ""))
    assert "DOC047" not in ids(examine(tree))


# The kernel log in a dump


class Memory:
    """Pages and the lines of VMCOREINFO."""

    machine = "x86_64"

    def __init__(self, pages: dict[int, bytes], info: bytes) -> None:
        self.pages = pages
        self.info = dict(line.split("=", 1) for line in info.decode().splitlines())

    def read(self, phys: int, n: int) -> bytes:
        start = phys & -4096
        try:
            data = b"".join(self.pages[at] for at in range(start, phys + n, 4096))
        except KeyError as error:
            raise kho.errors.OutsideMemoryError(str(error)) from error
        return data[phys - start : phys - start + n]

    def vmcoreinfo(self, name: str) -> str | None:
        return self.info.get(name)


TEXTS = [BANNER, "Command line: BOOT_IMAGE=/vmlinuz-7.0.0-14-generic crashkernel=192M", "two\nlines", LOADED]


@pytest.mark.parametrize(("first", "room"), [(0, 0), (62, 0), (5000, 8000), (1 << 40, 16376)])
def test_the_messages_of_a_ring_are_read_in_order_wherever_it_begins(first: int, room: int) -> None:
    memory = Memory(printk_ring.pages(TEXTS, first=first, room=room), printk_ring.vmcoreinfo())
    log = kernel_log(memory)
    assert log is not None
    lines = [line for text in TEXTS for line in text.split("\n")]
    assert [line.partition("] ")[2] for line in log.splitlines()] == lines
    assert log.startswith("[    0.000000] Linux version 7.0.0-14-generic")


def test_a_ring_elsewhere_is_found_by_the_page_tables() -> None:
    """log_buf_len= puts the ring into the direct map, whose place KASLR chooses."""
    pages = printk_ring.pages(TEXTS)
    base, virt, table = 0x10000000, 0xFF27F6E900000000, 0x20000000
    info = printk_ring.vmcoreinfo(more=f"SYMBOL(swapper_pg_dir)={printk_ring.IMAGE + table - base:x}\n"
                                  "NUMBER(pgtable_l5_enabled)=1\n")  # fmt: skip
    image = bytearray(pages[base])
    struct.pack_into("<Q", image, printk_ring.PRB, virt + printk_ring.RING)
    pages[base] = bytes(image)
    for level, flags in ((4, 1), (3, 1), (2, 1), (1, 0x81)):
        entries = bytearray(4096)
        to = table + 0x1000 if flags == 1 else base
        struct.pack_into("<Q", entries, 8 * (virt >> (12 + 9 * level) & 511), to | flags)
        pages[table] = bytes(entries)
        table += 0x1000
    log = kernel_log(Memory(pages, info))
    assert log is not None
    assert "Kdump: loaded" in log


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SYMBOL(prb)", "0"),
        ("SYMBOL(prb)", "zzz"),
        ("NUMBER(phys_base)", str(1 << 70)),
        ("OFFSET(prb_desc_ring.descs)", str(1 << 40)),
        ("SIZE(printk_info)", str(1 << 40)),
        ("SIZE(prb_desc)", "0"),
        ("OFFSET(printk_info.text_len)", "-5"),
        ("OFFSET(prb_desc_ring.count_bits)", "8"),
    ],
)
def test_a_lying_description_is_no_log(name: str, value: str) -> None:
    memory = Memory(printk_ring.pages(TEXTS), printk_ring.vmcoreinfo())
    memory.info[name] = value
    assert kernel_log(memory) is None


def test_a_ring_of_noise_is_no_log_or_a_short_one() -> None:
    pages = {at: bytes(range(256)) * 16 for at in printk_ring.pages(TEXTS)}
    assert kernel_log(Memory(pages, printk_ring.vmcoreinfo())) is None


def test_records_that_are_being_written_and_cut_lengths_are_skipped() -> None:
    pages = printk_ring.pages(["one", "two", "three"])
    descs = bytearray(pages[0x10000000 + printk_ring.DESCS])
    struct.pack_into("<Q", descs, 24, 1)  # reserved: still being written
    pages[0x10000000 + printk_ring.DESCS] = bytes(descs)
    log = kernel_log(Memory(pages, printk_ring.vmcoreinfo()))
    assert log is not None
    assert [line.partition("] ")[2] for line in log.splitlines()] == ["one", "three"]


@pytest.mark.parametrize(("at", "value"), [(0, 1 << 31), (0, 0xFFFFFFFF), (48, 25), (48, 0xFFFFFFFF)])
def test_a_ring_larger_than_any_is_refused_before_its_size_is_computed(at: int, value: int) -> None:
    pages = printk_ring.pages(TEXTS)
    image = bytearray(pages[0x10000000])
    struct.pack_into("<I", image, printk_ring.RING + at, value)
    pages[0x10000000] = bytes(image)
    with bounded(0.2):
        assert kernel_log(Memory(pages, printk_ring.vmcoreinfo())) is None


def test_records_that_all_have_the_same_text_are_read_up_to_a_bound() -> None:
    """Of 16 Ki records each claims the 60 KiB of the first: a gigabyte."""
    count = 1 << 14
    pages = printk_ring.pages(["x" * 60_000] + ["y"] * (count - 1), count_bits=14, text_bits=20)
    descs = printk_ring.DESCS
    image = bytearray(b"".join(pages[at] for at in sorted(pages)))
    infos_at = 0x400000
    assert len(image) < infos_at
    image = image.ljust(infos_at, b"\0") + bytes(count * 112)
    struct.pack_into("<Q", image, printk_ring.RING + 16, printk_ring.IMAGE + infos_at)
    for i in range(count):
        struct.pack_into("<QQQ", image, descs + 24 * i, printk_ring.FINALIZED | i, 0, 60_008)
        struct.pack_into("<QQH", image, infos_at + 112 * i, i, 0, 60_000)
    pages = {0x10000000 + at: bytes(image[at : at + 4096]).ljust(4096, b"\0") for at in range(0, len(image), 4096)}
    log = kernel_log(Memory(pages, printk_ring.vmcoreinfo()))
    assert log is not None
    assert len(log) <= kernellog.MOST_TEXT + 70_000


# What kho inspect says of a saved dump


def saved(folder: Path, texts: list[str], form: str = "elf", **info: Any) -> Path:
    """Write a dump of a machine with a handover and this kernel log."""
    pages = pages_of("linux-7.0-layout-x86_64") | printk_ring.pages(texts)
    notes = note(b"VMCOREINFO", 0, printk_ring.vmcoreinfo(**info))
    path = folder / "dump.202611301920"
    path.write_bytes(dump(pages, set(), form, notes=notes))
    return path


SEGMENTS = [
    "kexec_file: nr_segments = 6",
    "kexec_file: segment[0]: buf=0x0000000085edb1e0 bufsz=0x30 mem=0x53ff0000 memsz=0x1000",
    "kexec_file: kexec_file_load: type:1, start:0x53ffb150 head:0x4 flags:0xa",
]


@pytest.mark.parametrize("form", ["elf", "unmarked-elf"])
def test_inspect_says_of_a_saved_dump_that_it_may_have_lost_memory(form: str, tmp_path: Path) -> None:
    done = run("inspect", saved(tmp_path, TEXTS, form))
    assert done.code == 0
    assert "note: Linux 7.0.0-14-generic passes its scratch areas to a crash kernel" in done.err
    assert "(likely; kho doctor --explain DOC047)" in done.err


def test_inspect_is_certain_if_the_log_in_the_dump_shows_the_segments(tmp_path: Path) -> None:
    done = run("inspect", saved(tmp_path, [*TEXTS[:2], *SEGMENTS, LOADED]))
    assert "(certain; kho doctor --explain DOC047)" in done.err


@pytest.mark.parametrize(
    ("texts", "info"),
    [
        ([BANNER.replace("7.0.0)", "7.0.11)"), *TEXTS[1:]], {}),
        ([TEXTS[0], TEXTS[1] + " nokaslr", *TEXTS[2:]], {}),
        (TEXTS[:3], {}),
        ([BANNER.replace("7.0.0-14-generic", "7.3.4"), *TEXTS[1:]], {"release": "7.3.4"}),
        (TEXTS, {"crashed": False}),
    ],
    ids=["the fix", "nokaslr", "no crash kernel", "7.3", "not of a crash"],
)
def test_inspect_says_nothing_where_nothing_is_lost(texts: list[str], info: dict[str, Any], tmp_path: Path) -> None:
    done = run("inspect", saved(tmp_path, texts, **info))
    assert done.code == 0
    assert "crash kernel" not in done.err


def test_inspect_reads_the_crash_kernels_log_next_to_the_dump(tmp_path: Path) -> None:
    path = saved(tmp_path, [BANNER.replace("7.0.0)", "7.0.11)")])
    shutil.copy(KDUMP / "dmesg", tmp_path / "kexec-dmesg.log")
    done = run("inspect", path)
    assert "0x28a00000 to 0x2c42ffff, in 58.2 MiB" in done.err
    assert "kexec-dmesg.log" in done.err


def test_a_log_next_to_the_dump_that_says_nothing_of_it_is_no_evidence(tmp_path: Path) -> None:
    path = saved(tmp_path, [BANNER.replace("7.0.0)", "7.0.11)")])
    shutil.copy(HOSTS / "kdump-kernel" / "dmesg", tmp_path / "kexec-dmesg.log")
    (tmp_path / "kexec-dmesg-2.log").mkdir()
    assert "crash kernel" not in run("inspect", path).err


def test_a_dump_without_a_log_gives_no_note(tmp_path: Path) -> None:
    memory = Memory({}, printk_ring.vmcoreinfo())
    assert list(notes_of_dump(memory, str(tmp_path / "vmcore"), is_on=True)) == []
