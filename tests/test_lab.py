"""The lab without its virtual machines: pins, scenarios, layouts, the table."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import re
import struct
import threading
from pathlib import Path

import lab
import pytest
from lab import __main__ as command
from lab import inject, kernels, page, qemu
from lab.claims import Claim, LabError, Table, load, save
from lab.initramfs import Cpio, Root

import kho

ROOT = Path(__file__).resolve().parent.parent
X86 = ROOT / "tests/data/linux-7.3.4-x86_64/handover.elf"


def test_pinned_kernels_name_a_file_and_its_digest() -> None:
    pinned, suites = kernels.pins()
    assert suites
    assert [pin.version for pin in pinned] == sorted(
        (pin.version for pin in pinned), key=lambda v: [int(n) for n in v.split(".")], reverse=True
    )
    for pin in pinned:
        assert re.fullmatch(r"[0-9a-f]{64}", pin.sha256)
        assert pin.version in pin.file
        assert (pin.package is None) != (pin.source is None)


@pytest.mark.parametrize("name", command.names())
def test_a_scenario_has_run_and_says_what_it_proves(name: str) -> None:
    module = importlib.import_module(f"lab.scenarios.{name}")
    assert inspect.isgeneratorfunction(module.run)
    assert module.__doc__


def test_fragments_are_found_by_architecture() -> None:
    assert kernels.fragment("lean", "x86_64").name == "lean.x86_64.frag"
    assert kernels.build_name("7.3.4", "aarch64", ("lean", "64k")) == "7.3.4-aarch64-64k"
    with pytest.raises(LabError, match="there are 64k, lean"):
        kernels.fragment("nothing", "x86_64")
    with pytest.raises(LabError, match="KERNEL=PATH"):
        lab.Lab(Path("/nonexistent")).kernel("5.4.0")


def test_a_failed_row_fails_the_run_and_shows_its_evidence() -> None:
    held = Claim("a", "7.3.4", "x86_64", True, "fine")
    assert Table([("one", held)]).exit_code == 0
    failed = Table([("one", held), ("two", Claim("b", "7.3.4", "x86_64", False, "console: panic"))])
    assert failed.exit_code == 1
    assert "console: panic" in failed.text()
    assert "1 of 2 claims held" in failed.text()
    assert Table([]).exit_code == 1


def test_an_error_in_a_scenario_is_a_failed_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lab.scenarios.hello")

    def broken(_: lab.Lab) -> None:
        raise LabError("no kernel")

    monkeypatch.setattr(module, "run", broken)
    (claim,) = command.run(lab.Lab(tmp_path), "hello")
    assert not claim.held
    assert claim.evidence == "no kernel"


def test_results_of_some_kernels_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "x.json"

    def rows() -> list[tuple[str, str, str]]:
        return [(row["text"], row["kernel"], row["date"]) for row in load(path)[1]]

    older = [Claim("a", "7.1.13", "x86_64", True), Claim("a", "7.3.4", "x86_64", True)]
    save(path, "x", older, "2026-11-30", whole=True)
    save(path, "x", [Claim("a", "7.3.4", "x86_64", False)], "2026-12-01", whole=False)
    assert rows() == [("a", "7.1.13", "2026-11-30"), ("a", "7.3.4", "2026-12-01")]
    save(path, "x", [Claim("b", "7.3.4", "x86_64", True)], "2026-12-02", whole=True)
    assert rows() == [("b", "7.3.4", "2026-12-02")]


def test_the_kernel_is_told_of_the_handover_as_its_headers_say() -> None:
    """A setup_data {next, type, len}, then kho_data {fdt_addr, fdt_size, scratch_addr, scratch_size}."""
    raw = inject.setup_data(inject.read(X86))
    assert raw == struct.pack("<QII4Q", 0, 10, 32, 0x4EF000, 4096, 0xF3F0000, 48)


def header(init_size: int = 12 << 20, code: bytes = b"\x90" * 5000) -> bytes:
    """A bzImage whose setup header alone is right: protocol 2.15, aligned to 2 MiB."""
    raw = bytearray(5 * 512)
    raw[0x1F1], raw[0x201] = 4, 0x6A
    raw[0x202:0x206] = b"HdrS"
    struct.pack_into("<I", raw, 0x230, 2 << 20)
    struct.pack_into("<I", raw, 0x260, init_size)
    return bytes(raw) + code


def test_boot_params_of_a_small_kernel() -> None:
    bz = header()
    stub, parts = inject.x86_layout(bz, b"archive", inject.read(X86), "quiet", 256)
    (start, code), (params, page), (line, words), (data, node), (initrd, archive) = parts
    assert (start, code) == (0xC400000, bz[5 * 512 :])  # the largest scratch area, 32 MiB
    assert (params, line, data, initrd) == (0xD000000, 0xD001000, 0xD003000, 0xD100000)
    assert archive == b"archive"
    assert len(page) == 4096
    assert page[0x1F1:0x202] == bz[0x1F1:0x202]
    assert page[0x210] == 0xFF
    assert struct.unpack_from("<3I", page, 0x214) == (start, initrd, 7)
    assert struct.unpack_from("<I", page, 0x228) == (line,)
    assert struct.unpack_from("<Q", page, 0x250) == (data,)
    assert page[0x1E8] == 6
    assert struct.unpack_from("<QQI", page, 0x2D0 + 60) == (1 << 20, (255 << 20) - 0x20000, 1)
    assert words.endswith(b" quiet\0")
    assert len(node) == 48
    magic, flags, check, head, load, *_, entry = struct.unpack_from("<8I", stub)
    assert (magic + flags + check) & 0xFFFFFFFF == 0
    assert (head, load, entry) == (0xD010000, 0xD010000, 0xD010020)
    assert stub[32:44] == b"\xfa\xfc\xbe" + struct.pack("<I", params) + b"\xb8" + struct.pack("<I", start)
    with pytest.raises(LabError, match="no scratch area has room"):
        inject.x86_layout(header(init_size=64 << 20), b"", inject.read(X86), "", 256)


def test_arm64_is_told_in_chosen() -> None:
    image = ROOT / "tests/data/linux-7.3.4-aarch64/handover.elf"
    tree = (ROOT / "tests/data/fdt/machine-virt.dtb").read_bytes()
    kernel = struct.pack("<QQQ", 0, 0, 8 << 20).ljust(0x38, b"\0") + b"ARM\x64"
    handover = inject.read(image)
    jump, parts = inject.arm64_layout(kernel, tree, b"archive", handover, "")
    where = dict(parts)
    at = next(phys for phys, data in parts if data[:4] == b"\xd0\x0d\xfe\xed")
    chosen = kho.fdt.parse(where[at])["/chosen"]
    assert chosen["linux,kho-fdt"] == struct.pack(">QQ", handover.fdt, 4096)
    assert chosen["linux,kho-scratch"] == struct.pack(">QQ", handover.scratch, 48)
    assert struct.unpack("<6IQQ", where[jump])[6:] == (at, 0x4C800000)


def test_consoles_are_read_by_prefix() -> None:
    console = qemu.Console("LAB: one\r\n[    0.1] LAB: two\nnot LAB: three\n")
    assert console.lines("LAB:") == ["one"]
    assert console.find("two") == ["[    0.1] LAB: two"]


def test_archives_are_what_the_kernel_unpacks(tmp_path: Path) -> None:
    archive = Cpio()
    archive.file("a/b", b"hello", 0o755)
    raw = archive.bytes()
    assert len(raw) % 512 == 0
    assert raw.count(b"070701") == 3  # the folder, the file, the trailer
    head = raw[raw.index(b"a/b\0") - 110 :][:110]
    assert int(head[14:22], 16) == 0o100755
    assert int(head[54:62], 16) == 5


def test_modules_are_in_the_archive_as_bytecode(tmp_path: Path) -> None:
    """An interpreter under TCG needs 10 seconds to compile numpy and kho."""
    (tmp_path / "from").mkdir()
    (tmp_path / "from/fine.py").write_text("ANSWER = 42\nWHERE = (lambda: 0).__code__.co_filename\n")
    (tmp_path / "from/broken.py").write_text("ANSWER = \n")
    (tmp_path / "from/data.json").write_text("{}")
    root = Root()
    root.tree(str(tmp_path / "from"), re.compile("$^"), "/opt/kho/x")
    names = {name for name in root.archive.names if "." in name}
    assert names == {"opt/kho/x/fine.pyc", "opt/kho/x/broken.py", "opt/kho/x/data.json"}
    code = next(part for part in root.archive.parts if part.startswith(importlib.util.MAGIC_NUMBER))
    (tmp_path / "fine.pyc").write_bytes(code)
    loader = importlib.machinery.SourcelessFileLoader("fine", str(tmp_path / "fine.pyc"))
    spec = importlib.util.spec_from_loader("fine", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    assert module.ANSWER == 42
    assert module.WHERE == "/opt/kho/x/fine.py", "a traceback in a guest names the guest's file"


def test_guests_run_two_at_a_time_and_results_keep_their_order(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)

    def guest(number: int) -> int:
        both.wait()
        return number * number

    assert list(lab.Lab(tmp_path).side_by_side(guest, range(4))) == [0, 1, 4, 9]


def test_the_page_is_made_from_the_results() -> None:
    """What scripts/docs.py --check compares, without the other pages; every row is on it, also one that failed."""
    text = (ROOT / "docs/real-kernels.md").read_text()
    assert text == page.page(), "run make docs"
    rows = [row for _, rows in page.results() for row in rows]
    held = [row for row in rows if row["held"]]
    assert text.count("| held |") == len(held) > 40
    assert text.count("| **failed** |") == len(rows) - len(held)
    assert {"images", "compat", "capture"} <= {name for name, _ in page.results()}


def test_results_name_no_place_of_the_machine_that_ran_the_lab() -> None:
    """Evidence of a row that held is short, and paths in it are those of a guest."""
    for _, rows in page.results():
        for row in rows:
            places = set(re.findall(r"(?<![\w/.-])/([a-z]+)/\w", row["evidence"]))
            assert places <= {"proc", "sys", "usr", "dev", "run", "lab", "etc"}, row["evidence"]
            assert not row["held"] or len(row["evidence"]) < 1500, row["text"]


def test_that_a_scenario_broke_off_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    broke = Claim("the scenario runs to its end", "7.3.4", "", False, "Traceback")
    save(path, "x", [Claim("a", "7.3.4", "x86_64", True), broke], "2026-11-30", whole=True)
    assert [row["text"] for row in load(path)[1]] == ["a"]


def test_a_failed_result_is_shown_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(
        tmp_path / "hello.json",
        "hello",
        [Claim("a | b", "7.3.4", "x86_64", False, "no\nbanner")],
        "2026-11-30",
        whole=True,
    )
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert "| a \\| b | 7.3.4 | x86_64 | **failed** | 2026-11-30 | no banner |" in page.page()
    assert "0 of 1 claims held on Linux 7.3.4 (x86_64), the last run on 2026-11-30" in page.page()
