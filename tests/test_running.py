"""A running machine as a source: "live", or a directory with copies of its proc and sys."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest

import kho
from kho.handover.running import UnreadableError, core_of, is_running, open_running, shown_ranges

import captures
from command import kho as run
from images import EM_AARCH64, EM_X86_64, MIB, Image

STAGES = {name: captures.DATA / name / "host" for name in captures.NAMES if "x86_64" in name}
DEBUGFS = "sys/kernel/debug/kho"
UNKNOWN = (1 << 64) - 1


def machine(folder: Path, stage: Path, memory: list[tuple[int, bytes]] | None = None, elf_machine: int = 62) -> Path:
    """A copy of a machine's files, with /proc/kcore if there is memory."""
    root = folder / "machine"
    shutil.copytree(stage, root)
    (root / "proc").mkdir(exist_ok=True)
    if memory is not None:
        (root / "proc/kcore").write_bytes(kcore(memory, elf_machine))
    return root


def kcore(memory: list[tuple[int, bytes]], elf_machine: int = EM_X86_64) -> bytes:
    """An ELF core as fs/proc/kcore.c writes it.

    A note of a process, the vmalloc area and the modules without a physical address, then memory; the kernel's text is
    in memory too, so that its segment overlaps one of memory.
    """
    note = struct.pack("<III", 5, 336, 1) + b"CORE\0\0\0\0" + bytes(336)
    text = (memory[0][0], memory[0][1][:4096])
    loads = [(UNKNOWN, b"\0" * 64), (UNKNOWN, b"\xff" * 64), text, *memory]
    at = 64 + 56 * (1 + len(loads))
    headers, body = struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(note), 0, 0), note
    for phys, raw in loads:
        virtual = (0xFFFF888000000000 + phys) & UNKNOWN
        headers += struct.pack("<IIQQQQQQ", 1, 7, at + len(body), virtual, phys, len(raw), len(raw), 4096)
        body += raw
    head = struct.pack("<HHIQQQI6H", 4, elf_machine, 1, 0, 64, 0, 0, 64, 56, 1 + len(loads), 0, 0, 0)
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + head + headers + body


def with_zeros(memory: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Memory whose first page is zeros, for the text of the kernel."""
    return [(0x1000, bytes(4096)), *memory]


@pytest.mark.parametrize("name", STAGES)
def test_owners_and_map_read_the_memory_of_a_running_machine(name: str, tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES[name] / "stage1", with_zeros(captures.contents(name)))
    wanted = run("owners", "--json", captures.elf(name))
    found = run("owners", "--json", root)
    assert (found.code, found.json) == (wanted.code, wanted.json)
    assert f"note: read from {root}/proc/kcore, while the kernel runs" in found.err
    spans = run("map", "--json", root).json["spans"]
    assert spans == run("map", "--json", captures.elf(name)).json["spans"]
    assert run("fdt", root).code == 0


def test_the_memory_of_an_arm64_machine_is_read(tmp_path: Path) -> None:
    name = "linux-7.3.4-aarch64"
    root = machine(tmp_path, STAGES["linux-7.3.4-x86_64"] / "stage1", captures.contents(name), EM_AARCH64)
    for path in (root / DEBUGFS / "out").glob("scratch_*"):
        path.unlink()  # of the other machine
    inc, memory = open_running(root)
    assert memory.machine == "aarch64"
    assert inc.fdt_phys == captures.expected(name)["fdt_phys"]
    assert inc.nr_folios == kho.open(captures.elf(name)).nr_folios


@pytest.mark.parametrize("name", STAGES)
def test_without_its_memory_a_machine_shows_what_debugfs_names(name: str, tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES[name] / "stage1")
    done = run("owners", "--json", root)
    assert done.code == 0
    assert "kcore: is not there" in done.err
    inc = kho.open(captures.elf(name))
    blobs = {f"subtree {name}": sub.phys for name, sub in inc.subtrees.items()}
    rows = {row["owner"]: row for row in done.json["rows"]}
    # Linux 6.16 and 6.18 write the root when they finalize; 7.0 and later may move what is written at the kexec.
    assert {owner: row["phys"] for owner, row in rows.items() if owner in blobs}.items() <= blobs.items()
    regions = {f"reserve_mem {name}": region.start for name, region in inc.reserve_mem.items()}
    assert {owner: row["phys"] for owner, row in rows.items() if owner in regions} == regions
    drawn = run("map", root)
    assert drawn.code == 0
    assert "scratch" in drawn.out


@pytest.mark.parametrize("name", STAGES)
def test_the_root_fdt_that_a_kernel_does_not_show_is_not_called_absent(name: str, tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES[name] / "stage2")
    shown = kho.Snapshot.open(root)
    if shown.outgoing is None or shown.outgoing.fdt is not None:
        pytest.skip("this kernel shows it")
    text = run("inspect", root)
    assert "no root FDT" not in text.out
    assert "To be handed to the next kernel: root FDT not shown by this kernel, which was itself booted by" in text.out
    assert "not shown" in run("inspect", "--json", root).json["out"]["missing"]
    printed = run("fdt", root)
    assert printed.code == 0
    assert "out/fdt: not shown by this kernel" in printed.err
    assert "in/fdt, " in printed.out


def test_before_finalization_there_is_no_root_fdt_yet(tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES["linux-6.18.15-x86_64"] / "stage1")
    out = root / DEBUGFS / "out"
    (out / "fdt").unlink(missing_ok=True)
    shutil.rmtree(out / "sub_fdts", ignore_errors=True)
    (out / "finalize").write_text("0\n")
    assert "root FDT there is none yet: nothing was finalized" in run("inspect", root).out
    refused = run("fdt", root)
    assert refused.code == 2
    assert "no root FDT in debugfs" in refused.err


def test_the_subtrees_of_debugfs_are_printed(tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES["linux-7.1.13-x86_64"] / "stage1")
    one = run("fdt", "--subtree", "memblock", root)
    assert one.code == 0
    assert 'compatible = "memblock-v1"' in one.out
    every = run("fdt", "--all", root)
    assert "out/sub_fdts/LUO, " in every.out
    assert "warning: out/fdt: " in every.err
    assert "out/fdt, 233 of 405 bytes" in every.out
    absent = run("fdt", "--subtree", "nothing", root)
    assert (absent.code, absent.out) == (2, "")


def test_a_truncated_root_fdt_is_read_whole_from_memory(tmp_path: Path) -> None:
    name = "linux-7.3.4-x86_64"
    root = machine(tmp_path, STAGES[name] / "stage1", captures.contents(name))
    assert run("fdt", root).out == run("fdt", captures.elf(name)).out


def test_the_handover_that_booted_a_kernel_is_not_the_one_it_holds(tmp_path: Path) -> None:
    """Both root FDTs are in memory; debugfs shows the one that was received."""
    received = Image([(64 * MIB, 3)], compatible="kho-v4", metadata_phys=8 * MIB, scratch=[(128 * MIB, 16 * MIB)])
    own = Image([(32 * MIB, 9), (80 * MIB, 0)], compatible="kho-v4", metadata_phys=24 * MIB, under=[received])
    own.scratch = received.scratch
    layout, first = own.lay_out(), received.lay_out()
    stage = tmp_path / "stage"
    (stage / DEBUGFS / "in/sub_fdts").mkdir(parents=True)
    (stage / DEBUGFS / "out/sub_fdts").mkdir(parents=True)
    total = struct.unpack_from(">I", first.pages[first.fdt_phys], 4)[0]
    (stage / DEBUGFS / "in/fdt").write_bytes(first.pages[first.fdt_phys][:total])
    (stage / DEBUGFS / "out/scratch_phys").write_text(f"{128 * MIB:#x}\n")
    (stage / DEBUGFS / "out/scratch_len").write_text(f"{16 * MIB:#x}\n")
    memory = [(phys, bytes(page)) for phys, page in sorted(layout.pages.items())]
    root = machine(tmp_path, stage, memory)
    inc, _ = open_running(root)
    assert inc.fdt_phys == layout.fdt_phys != first.fdt_phys
    assert inc.scratch == [(128 * MIB, 16 * MIB)]
    assert run("compat", root, "7.3").code == 0
    # Without the own one, the received one is not taken for it.
    shutil.rmtree(root)
    root = machine(tmp_path, stage, [(phys, bytes(page)) for phys, page in sorted(first.pages.items())])
    with pytest.raises(UnreadableError, match="no root FDT in it but that of the handover which booted"):
        open_running(root)
    refused = run("compat", root, "7.3")
    assert refused.code == 2
    assert "which was itself booted by a handover" in refused.err


def test_verify_tells_what_it_looked_at(tmp_path: Path) -> None:
    name = "linux-7.1.13-x86_64"
    root = machine(tmp_path, STAGES[name] / "stage1")
    without = run("verify", root)
    assert "looked at out/fdt: 233 of 405 bytes, checked" in without.out
    assert "looked at in: not there: this kernel was not booted by a handover" in without.out
    assert f"looked at {root}/proc/kcore: not read" in without.out
    shutil.rmtree(root)
    root = machine(tmp_path, STAGES[name] / "stage1", captures.contents(name))
    looked = run("verify", "--json", root).json
    folios = kho.open(captures.elf(name)).nr_folios
    assert looked["looked_at"][f"{root}/proc/kcore"].startswith(f"{folios} folios")
    assert [finding["id"] for finding in looked["findings"] if finding["severity"] == "error"] == []
    after = run("verify", machine(tmp_path / "after", STAGES[name] / "stage2"))
    assert "looked at out/fdt: not shown by this kernel" in after.out


def test_sessions_that_are_not_written_yet_are_preserved_without_an_owner(tmp_path: Path) -> None:
    """LUO's count of sessions is 0 until the kexec: their memory is KHO034, and compat does not call them taken."""
    name = "linux-7.1.13-x86_64"
    header = kho.open(captures.elf(name)).retrieve_subtree("LUO").fdt()["/luo-session"].u64("luo-session-header")
    memory = [(phys, bytearray(raw)) for phys, raw in captures.contents(name)]
    for phys, raw in memory:
        if phys <= header < phys + len(raw):
            raw[header - phys : header - phys + 8] = bytes(8)
    root = machine(tmp_path, STAGES[name] / "stage1", [(phys, bytes(raw)) for phys, raw in memory])
    assert open_running(root)[0].luo.sessions == {}
    findings = run("verify", "--json", root).json["findings"]
    assert {"KHO034"} <= {finding["id"] for finding in findings}
    (root / DEBUGFS / "out/fdt").unlink()
    objects = run("compat", "--json", root, "7.1.13").json["targets"][0]["objects"]
    assert {row["object"]: row["verdict"] for row in objects}["sessions"] == "unknown"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_user_without_permission_is_told_that_root_is_needed(tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES["linux-7.3.4-x86_64"] / "stage1", captures.contents("linux-7.3.4-x86_64"))
    (root / "proc/kcore").chmod(0)
    assert "root is needed" in run("owners", root).err


def test_permission_errors_name_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES["linux-7.3.4-x86_64"] / "stage1", captures.contents("linux-7.3.4-x86_64"))

    def refuse(*_: object, **__: object) -> None:
        raise kho.errors.AccessError(13, "Permission denied")

    monkeypatch.setattr("kho.handover.running.Memory.open", refuse, raising=False)
    done = run("owners", root)
    assert "proc/kcore: permission denied: root is needed to read memory" in done.err
    assert done.code == 0


def test_a_link_or_a_fifo_is_not_taken_for_memory(tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES["linux-7.3.4-x86_64"] / "stage1")
    os.mkfifo(root / "proc/kcore")
    with pytest.raises(UnreadableError, match="no regular file"):
        open_running(root)
    (root / "proc/kcore").unlink()
    (root / "proc/kcore").symlink_to(captures.elf("linux-7.3.4-x86_64"))
    with pytest.raises(UnreadableError, match="no regular file"):
        open_running(root)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", bytes(10_000), b"\x7fELF\x02\x01\x01" + bytes(100)])
def test_memory_that_cannot_be_read_leaves_debugfs(content: bytes, tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES["linux-7.3.4-x86_64"] / "stage1")
    (root / "proc/kcore").write_bytes(content)
    done = run("owners", root)
    assert done.code == 0
    assert "this is what debugfs shows" in done.err


def test_live_is_the_running_machine() -> None:
    assert is_running("live")
    assert core_of("live") == Path("/proc/kcore")
    assert not is_running(captures.elf("linux-7.3.4-x86_64"))


@pytest.mark.parametrize("n", range(0, 233, 9))
def test_every_cut_of_a_root_fdt_names_ranges_or_none(n: int, tmp_path: Path) -> None:
    root = machine(tmp_path, STAGES["linux-7.3.4-x86_64"] / "stage1")
    path = root / DEBUGFS / "out/fdt"
    whole = shown_ranges(kho.Snapshot.open(root))
    path.write_bytes(path.read_bytes()[:n])
    cut = shown_ranges(kho.Snapshot.open(root))
    assert {row.owner for row in cut} <= {row.owner for row in whole}
