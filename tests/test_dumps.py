"""All formats of dumps, and debugfs snapshots, through the public API: real ones, and synthetic ones."""

from __future__ import annotations

import json
import lzma
import os
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

import kho
from kho._kho import Memory
from kho.cli import cli

from captures import DATA, debugfs, expected
from dumpfiles import CODECS, flatten, kdump, lime
from images import EM_AARCH64, MIB, Image, sample_subtrees

QEMU = {"q35": 0, "virt": 0x40000000}


def unpacked(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name.removesuffix(".xz")
    path.write_bytes(lzma.decompress((DATA / "dumps" / name).read_bytes()))
    return path


def contents(memory: Memory) -> list[tuple[int, bytes]]:
    return [(phys, memory.read(phys, size)) for phys, size in memory.ranges]


def sample(base: int = 0, page_size: int = 4096) -> Image:
    return Image(
        folios=[(base + 2 * MIB, 0), (base + 4 * MIB, 4)],
        page_size=page_size,
        bitmap_bytes=page_size,
        ram=[(base, 16 * MIB)],
        scratch=[(base + m * MIB, MIB) for m in (8, 9, 10)],
        subtrees=sample_subtrees(),
        contents={base + 2 * MIB: b"kept", base + 4 * MIB: bytes(range(256)) * 16},
    )


@pytest.mark.parametrize("machine", QEMU)
@pytest.mark.parametrize("form", ["flat", "raw"])
def test_a_dump_that_qemu_compressed_is_the_memory_it_wrote_as_elf(tmp_path: Path, machine: str, form: str) -> None:
    elf = Memory.open(unpacked(tmp_path, f"qemu-{machine}.elf.xz"))
    dump = Memory.open(unpacked(tmp_path, f"qemu-{machine}-{form}.kdump.xz"))
    assert contents(dump) == contents(elf)
    # QEMU writes an i386 core while the CPU is in real mode.
    assert (dump.machine, elf.machine) == {"q35": ("x86_64", "machine 3"), "virt": ("aarch64", "aarch64")}[machine]
    base = QEMU[machine]
    inc = kho.open(unpacked(tmp_path, f"qemu-{machine}-{form}.kdump.xz"))
    assert (inc.fdt_phys, inc.page_size) == (base + 3 * MIB, 4096)
    assert [tuple(folio) for folio in inc.folios][:2] == [(base + MIB, 0), (base + 2 * MIB, 4)]
    assert inc.read(base + MIB, 14) == b"preserved page"
    assert inc.scratch == [(base + m * MIB, MIB) for m in (4, 5, 6)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_every_dump_format_gives_the_same_handover(tmp_path: Path, codec: str, page_size: int) -> None:
    layout = sample(page_size=page_size).lay_out()
    pages = {phys: bytes(page) for phys, page in layout.pages.items()}
    pages |= {phys: bytes(page_size) for phys in (12 * MIB, 12 * MIB + page_size)}
    file = kdump(pages, codec, block=page_size, machine="aarch64")
    known = kho.open(Memory.from_segments(list(pages.items())))
    for written in (file, flatten(file)):
        path = tmp_path / "vmcore"
        path.write_bytes(written)
        memory = Memory.open(path)
        assert all(memory.read(phys, page_size) == page for phys, page in pages.items())
        assert sum(size for _, size in memory.ranges) == page_size * len(pages)
        inc = kho.open(str(path), page_size=page_size)
        assert (inc.fdt_phys, [*inc.folios]) == (known.fdt_phys, [*known.folios])
        assert inc.scratch == sample().scratch
        with pytest.raises(kho.OutsideMemoryError):
            memory.read(15 * MIB, 1)


def test_lime_and_elf_give_the_same_memory(tmp_path: Path) -> None:
    layout = sample(0x40000000).lay_out()
    ram = layout.to_raw(0x40000000, 16 * MIB)
    (tmp_path / "ram.lime").write_bytes(lime([(0x40000000, ram[: 8 * MIB]), (0x40800000, ram[8 * MIB :])]))
    (tmp_path / "ram.bin").write_bytes(ram)
    taken = [kho.open(str(tmp_path / name)) for name in ("ram.lime", "ram.bin,machine=virt", "ram.bin@0x40000000")]
    assert len({(inc.fdt_phys, tuple(inc.folios), tuple(inc.scratch or ())) for inc in taken}) == 1
    assert Memory.open(f"{tmp_path / 'ram.bin'},machine=virt").sources == [f"{tmp_path / 'ram.bin'},machine=virt"]
    with pytest.raises(kho.SourceError, match="is no machine"):
        kho.open(f"{tmp_path / 'ram.bin'},machine=vax")


def test_memory_above_the_pci_hole_has_the_addresses_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(4 << 30)
        for at in (2 << 30, 3 << 30):
            file.seek(at)
            file.write(b"%d" % (at >> 30))
    q35, pc = Memory.open(f"{path},machine=q35"), Memory.open(f"{path},machine=pc")
    assert q35.ranges == [(0, 2 << 30), (4 << 30, 2 << 30)]
    assert pc.ranges == [(0, 3 << 30), (4 << 30, 1 << 30)]
    assert (q35.read(4 << 30, 1), q35.read(5 << 30, 1)) == (b"2", b"3")
    assert (pc.read(2 << 30, 1), pc.read(4 << 30, 1)) == (b"2", b"3")


def test_duplicate_segments_are_read_once(tmp_path: Path) -> None:
    """As written by `dump-guest-memory -p`: the same memory at several virtual addresses."""
    layout = Image(folios=[(2 * MIB, 0)], ram=[(0, 4 * MIB)], whole_ram=True, machine=EM_AARCH64).lay_out()
    elf = bytearray(layout.to_elf())
    phoff, count = 64, struct.unpack_from("<H", elf, 56)[0]
    load = bytearray(elf[phoff : phoff + 56])
    struct.pack_into("<Q", load, 16, 0xFFFF_8000_0000_0000)
    assert count == 1
    elf[56:58] = struct.pack("<H", 3)
    elf[phoff + 56 : phoff + 168] = 2 * load
    path = tmp_path / "p.elf"
    path.write_bytes(elf)
    inc = kho.open(path)
    assert Memory.open(path).ranges == [(0, 4 * MIB)]
    assert (2 * MIB, 0) in [tuple(folio) for folio in inc.folios]


def test_more_segments_than_fit_the_elf_header_are_read(tmp_path: Path) -> None:
    """From 65535 segments on, their number is in sh_info of section header 0."""
    kept = [(64 * MIB + 8192 * i, 0) for i in range(66_000)]
    path = Image(folios=kept, ram=[(0, 1024 * MIB)]).write(tmp_path / "many.elf")
    assert struct.unpack_from("<H", path.read_bytes()[:64], 56)[0] == 0xFFFF
    memory = Memory.open(path)
    assert len(memory.ranges) > 66_000
    assert all(memory.read(phys, 4096) == bytes(4096) for phys, _ in (kept[0], kept[-1]))
    inc = kho.open(path)
    assert {tuple(folio) for folio in inc.folios} >= set(kept)


def test_a_truncated_fdt_of_linux_7_still_gives_compatible_and_map() -> None:
    snap = kho.Snapshot.open(DATA / "linux-7.3.4-x86_64/host/stage1")
    out = snap.outgoing
    assert snap.kind == "root"
    assert snap.incoming is None
    assert out is not None
    assert out.fdt == debugfs("linux-7.3.4-x86_64", 1, "out/fdt")
    assert out.truncated == (405, 233)
    assert "cut short: 233 bytes of 405" in str(out.problem)
    assert out.compatible == "kho-v4"
    assert out.preserved_memory_map == expected("linux-7.3.4-x86_64")["preserved_memory_map"]
    assert sorted(out.sub_fdts) == ["LUO", "kexec-metadata", "kho_test", "memblock"]
    assert out.sub_fdts["LUO"] == debugfs("linux-7.3.4-x86_64", 1, "out/sub_fdts/LUO")
    assert snap.scratch == [(0xE400000, 0x1000000), (0xC400000, 0x2000000), (0xB400000, 0x1000000)]
    assert snap.ram == [(0x1000, 0x9EC00), (0x100000, 0xFEE0000)]
    assert str(snap.version).startswith("Linux version 7.3.4 ")
    assert (snap.finalized, snap.cmdline) == (None, None)


@pytest.mark.parametrize("name", ["linux-6.16-layout-x86_64", "linux-6.18.15-x86_64", "linux-7.3.4-x86_64"])
def test_after_the_kexec_the_fdt_is_complete(name: str) -> None:
    for where in ("host/stage2", "host/stage2/sys/kernel/debug/kho"):
        snap = kho.Snapshot.open(DATA / name / where)
        side = snap.incoming
        assert side is not None
        assert (side.truncated, side.problem) == (None, None)
        assert side.compatible == expected(name)["compatible"]
        assert side.preserved_memory_map == expected(name)["preserved_memory_map"]
        assert snap.outgoing is not None
        assert snap.outgoing.fdt is None
        assert snap.kind == ("root" if where == "host/stage2" else "debugfs")
    stage1 = kho.Snapshot.open(DATA / name / "host/stage1")
    assert stage1.finalized is (True if name.startswith("linux-6") else None)


def test_a_single_fdt_is_shown_and_other_files_are_refused(tmp_path: Path) -> None:
    fdt = DATA / "fdt" / "linux-7.3.4-in-fdt.dtb"
    snap = kho.Snapshot.open(fdt)
    assert (snap.kind, snap.scratch, snap.incoming) == ("fdt", None, None)
    assert snap.outgoing is not None
    assert snap.outgoing.compatible == "kho-v4"
    with pytest.raises(kho.FormatError):
        kho.Snapshot.open(DATA / "fdt" / "linux-7.3.4-memblock.dtb")
    with pytest.raises(kho.FdtError, match="magic"):
        kho.Snapshot.open(DATA / "README.md")
    with pytest.raises(kho.SourceError, match="shows no handover"):
        kho.Snapshot.open(tmp_path)
    with pytest.raises(kho.SourceError, match="missing: No such file"):
        kho.Snapshot.open(tmp_path / "missing")
    assert kho.Snapshot.recognizes(fdt)
    assert kho.Snapshot.recognizes("live")
    assert not kho.Snapshot.recognizes(Path("live"))
    assert not kho.Snapshot.recognizes(DATA / "README.md")


def test_a_snapshot_follows_no_link_out_of_its_directory(tmp_path: Path) -> None:
    sub_fdts = tmp_path / "in" / "sub_fdts"
    sub_fdts.mkdir(parents=True)
    (sub_fdts / "x").symlink_to("/etc/passwd")
    with pytest.raises(kho.SourceError, match="x: is a link to /etc/passwd, outside of"):
        kho.Snapshot.open(tmp_path)
    (sub_fdts / "x").unlink()
    os.mkfifo(sub_fdts / "x")
    with pytest.raises(kho.SourceError, match="neither a file"):
        kho.Snapshot.open(tmp_path)


def test_inspect_shows_a_snapshot_as_text_and_as_data() -> None:
    source = str(DATA / "linux-7.3.4-x86_64/host/stage1")
    shown = CliRunner().invoke(cli, ["inspect", source])
    assert shown.exit_code == 0
    assert "the FDT is truncated: 233 bytes of 405" in shown.output
    assert "kho-v4" in shown.output
    report = json.loads(CliRunner().invoke(cli, ["inspect", "--json", source]).output)
    assert report["out"]["truncated"] == {"totalsize": 405, "size": 233}
    assert report["in"] is None
    assert report["scratch"][0] == [0xE400000, 0x1000000]
    calls = CliRunner().invoke(cli, ["inspect", "--python", source]).output
    assert f"kho.Snapshot.open({source!r})" in calls
