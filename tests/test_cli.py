"""The `kho` command: output, streams and exit codes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import kho

import captures
from command import kho as run
from command import process
from images import MIB, Image, sample_subtrees

CAPTURE = captures.elf("linux-6.18.15-x86_64")
SMALL = captures.elf("linux-6.16-layout-x86_64")
HOST = Path(__file__).parent / "data/hosts/default-scratch"
KEYS = {
    "schema",
    "read_as",
    "unverified",
    "drafts",
    "compatible",
    "kernels",
    "page_size",
    "page_size_why",
    "bitmap_bytes",
    "bitmap_bytes_why",
    "certainty",
    "finalized",
    "fdt_phys",
    "other_fdts",
    "other_roots",
    "preserved_memory_map",
    "metadata_pages",
    "nr_folios",
    "preserved_bytes",
    "folios_by_order",
    "pages_outside",
    "subtrees",
    "malformed_subtrees",
    "scratch",
    "scratch_phys",
    "scratch_how",
    "folios",
    "folios_sha256",
    "kho_test",
    "reserve_mem",
}


@pytest.mark.smoke
def test_help_lists_every_command() -> None:
    for flag in ("--help", "-h"):
        done = run(flag)
        assert (done.code, done.err) == (0, "")
        assert "kho inspect core.elf" in done.out
        assert "\n  inspect " in done.out.partition("Commands:")[2]
    done = run("inspect", "--help")
    assert done.code == 0
    for option in ("--fdt-phys A", "--bitmap-bytes N", "--page-size N", "--scratch A", "--full", "--json", "--python"):
        assert option in done.out
    assert "Exit codes: 0 read, 2 no handover or not readable." in done.out


def test_the_version_is_the_packages() -> None:
    assert run("--version").out == f"kho, version {kho.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ("inspect",),
        ("inspect", "--page-size", "many", CAPTURE),
        ("inspect", "--fdt-phys", "-1", CAPTURE),
        ("inspect", "--fdt-phys", 2**64, CAPTURE),
        ("inspect", "--no-such-option", CAPTURE),
        ("no-such-command",),
    ],
)
def test_a_usage_error_exits_2_with_a_message_on_stderr(args: tuple[object, ...]) -> None:
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err


@pytest.mark.smoke
def test_the_report_of_a_real_handover() -> None:
    done = run("inspect", CAPTURE)
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0].startswith("kho-v1 handover (Linux ")
    assert lines[0].endswith(f" in {CAPTURE}")
    assert any(line.startswith("root FDT 0x6c4000 ") for line in lines)
    assert any(line.startswith("preserved-memory-map 0x6d4000 11 pages of metadata") for line in lines)
    assert any(line.startswith("page size 4096 x86_64 has no other") for line in lines)
    assert any(line.startswith("bitmaps 4096 bytes likely: ") for line in lines)
    assert "Preserved: 16 folios, 216.0 KiB" in lines
    assert "0 4.0 KiB 8 32.0 KiB" in lines
    assert "Scratch: 3 areas, 64.0 MiB, where the next kernel boots" in lines
    assert "low memory 0xe400000 16.0 MiB" in lines
    assert "node 0 0xb400000 16.0 MiB" in lines
    assert "kho_test 0x50a000 240 bytes" in lines
    assert "\x1b" not in done.out


def test_json_has_every_key_and_integers() -> None:
    done = run("inspect", "--json", CAPTURE)
    assert set(done.json) == KEYS
    assert run("inspect", "--json", "--full", CAPTURE).json == done.json, (
        "the report of a small capture is complete without --full"
    )
    numbers = [done.json[key] for key in ("fdt_phys", "preserved_memory_map", "preserved_bytes", "page_size")]
    numbers += [number for area in done.json["scratch"] for number in area]
    numbers += [sub[key] for sub in done.json["subtrees"].values() for key in ("phys", "size")]
    assert all(type(number) is int for number in numbers)


def test_full_lists_every_folio() -> None:
    listed = run("inspect", "--full", CAPTURE).out.split("\n\n")[-1].splitlines()[1:]
    found = [(int(phys, 16), int(order)) for phys, order in (line.split() for line in listed)]
    assert found == [tuple(folio) for folio in captures.expected("linux-6.18.15-x86_64")["folios"]]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--bitmap-bytes", "512"),
        ("--fdt-phys", "0x6c4000", "--page-size", "0x1000"),
    ],
)
def test_the_python_it_prints_reads_the_same(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    done = run("inspect", "--python", *options, CAPTURE)
    assert (done.code, done.err) == (0, "")
    names: dict[str, object] = {}
    exec(compile(done.out, "printed", "exec"), names)
    inc = names["inc"]
    assert isinstance(inc, kho.Incoming)
    report = run("inspect", "--json", *options, CAPTURE).json
    assert (inc.bitmap_bytes, inc.nr_folios) == (report["bitmap_bytes"], report["nr_folios"])
    assert capsys.readouterr().out.startswith("kho-v1 {0: ")


def test_the_python_names_every_source(tmp_path: Path) -> None:
    done = run("inspect", "--python", "it's.bin@0x0", "b.bin@1G")
    assert done.code == 0
    assert """kho.open(["it's.bin@0x0", 'b.bin@1G'])""" in done.out


# Sources


def test_several_raw_images_are_one_memory(tmp_path: Path) -> None:
    image = Image(
        folios=[(0x20_0000, 0), (0x100_0000, 9)],
        ram=[(0, 32 * MIB)],
        scratch=[(8 * MIB, MIB), (10 * MIB, MIB), (12 * MIB, MIB)],
        subtrees=sample_subtrees(),
    )
    layout = image.lay_out()
    low, high = tmp_path / "a.bin", tmp_path / "b.bin"
    low.write_bytes(layout.to_raw(0, 16 * MIB))
    high.write_bytes(layout.to_raw(16 * MIB, 16 * MIB))
    done = run("inspect", "--json", f"{low}@0x0", f"{high}@0x1000000")
    assert (done.code, done.err) == (0, "")
    assert done.json["folios"] == [list(folio) for folio in layout.folios]
    assert done.json["scratch"] == [list(area) for area in image.scratch]
    assert (done.json["fdt_phys"], done.json["pages_outside"]) == (layout.fdt_phys, 0)
    both = run("inspect", f"{high}@16M", f"{low}@0").out
    assert f"in {high}@16M, {low}@0" in both.replace("\n", "")
    part = run("inspect", "--json", f"{low}@0")
    assert part.json["pages_outside"] == 512
    assert "512 preserved pages are not in this memory" in run("inspect", f"{low}@0").out
    for wrong in (f"{low}@64K", f"{low}@0x4000000"):
        done = run("inspect", wrong, f"{high}@32M")
        assert (done.code, done.out) == (2, "")
        assert "do not lie where they were named" in done.err


def test_a_raw_image_is_read_at_its_address_or_refused(tmp_path: Path) -> None:
    base = 0x4000_0000
    layout = Image(folios=[(base + MIB, 0)], ram=[(base, 8 * MIB)], metadata_phys=base + 2 * MIB).lay_out()
    raw = tmp_path / "ram.bin"
    raw.write_bytes(layout.to_raw(base, 8 * MIB))
    assert run("inspect", "--json", f"{raw}@0x40000000").json["fdt_phys"] == layout.fdt_phys
    done = run("inspect", "--json", raw)
    assert (done.code, done.json["fdt_phys"]) == (0, layout.fdt_phys)
    assert done.json["placement"]["argument"] == f"{raw}@0x40000000"
    done = run("inspect", f"{raw}@0,check=no")
    assert done.code == 2
    assert f"{layout.map_phys:#x}" in done.err, "the address of the map is in the message"


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_the_page_size_can_be_given(page_size: int, tmp_path: Path) -> None:
    image = Image(folios=[(0x80_0000, 0)], page_size=page_size, bitmap_bytes=page_size, machine=183)
    path = image.write(tmp_path / "core.elf")
    report = run("inspect", "--json", "--page-size", page_size, path).json
    assert (report["page_size"], report["page_size_why"]) == (page_size, "given by the caller")
    done = run("inspect", "--page-size", 8192, path)
    assert (done.code, done.err.splitlines()[0]) == (2, "kho: page size 8192 is none of 4096, 16384, 65536")


def test_other_handovers_are_noted_on_stderr(tmp_path: Path) -> None:
    stale = Image(folios=[(0x80_0000, 0)], ram=[(0, 32 * MIB)], metadata_phys=4 * MIB)
    image = Image(
        folios=[(0x40_0000, 2)], ram=[(0, 32 * MIB)], subtrees=sample_subtrees(), whole_ram=True, under=[stale]
    )
    path = image.write(tmp_path / "ram.elf")
    old = stale.lay_out().fdt_phys
    done = run("inspect", "--json", path)
    assert (done.code, done.json["other_fdts"]) == (0, [old])
    assert done.err == f"note: another handover's FDT is at {old:#x}; read it with --fdt-phys {old:#x}\n"
    assert run("inspect", "--json", "--fdt-phys", hex(old), path).json["fdt_phys"] == old


def test_a_given_fdt_has_its_scratch_areas_from_the_array_that_is_named() -> None:
    path = captures.elf("linux-7.3.4-x86_64")
    inc = kho.open(path)
    fdt, array = hex(inc.fdt_phys), hex(inc.scratch_phys or 0)
    whole = run("inspect", path)
    done = run("inspect", "--fdt-phys", fdt, "--scratch", array, path)
    assert (done.code, done.out, done.err) == (0, whole.out, "")
    done = run("inspect", "--fdt-phys", fdt, path)
    assert "\nScratch: not known (" in done.out
    assert (
        done.err == "note: with --fdt-phys the memory is not searched; --scratch A names the array of scratch areas\n"
    )
    assert f"scratch={array}" in run("inspect", "--python", "--fdt-phys", fdt, "--scratch", array, path).out
    done = run("inspect", "--scratch", fdt, path)
    assert done.code == 2
    assert done.err.startswith(f"kho: scratch: no scratch array lies at {fdt}: it has at least three (address, size), ")


def test_names_from_the_image_are_not_markup(tmp_path: Path) -> None:
    blob = sample_subtrees()["producer"]
    image = Image(folios=[(0x80_0000, 0)], subtrees={"[bold]x[/]": blob, "[/red]": blob})
    done = run("inspect", image.write(tmp_path / "[core].elf"))
    assert (done.code, done.err) == (0, "")
    assert "[bold]x[/]" in done.out
    assert "[/red]" in done.out
    assert "[core].elf" in done.out


def test_an_arenas_file_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "arena.elf"
    arena = kho.Arena("64M", backing=path, scratch="4M,4M,4M")
    out = kho.Outgoing(arena)
    out.preserve_folio(arena.alloc(3))
    done = run("inspect", path)
    assert done.code == 2
    out.finalize()
    report = run("inspect", "--json", path).json
    assert report["folios_by_order"] == {"0": 1, "3": 1}
    assert report["scratch"] == [list(area) for area in arena.scratch]
    assert report["page_size_why"] == "the arena's"


# Errors, terminals, pipes


def test_an_error_has_a_hint(tmp_path: Path) -> None:
    empty = tmp_path / "ram.bin"
    empty.write_bytes(bytes(8192))
    done = run("inspect", empty)
    assert (done.code, done.out) == (2, "")
    first, hint = done.err.splitlines()
    assert first.startswith("kho: no handover: ")
    assert hint.startswith("hint: was the image taken after finalization?")
    assert "--bitmap-bytes" in run("inspect", "--bitmap-bytes", 4096, SMALL).err


def in_a_terminal(args: list[object], env: dict[str, str]) -> str:
    """The output of `kho ARGS` on a pseudo-terminal."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "kho", *map(str, args)],
        stdout=follower,
        stderr=follower,
        stdin=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}, "TERM": "xterm", **env},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert child.wait(60) == 0
    return shown.decode().replace("\r\n", "\n")


def test_color_is_used_only_on_terminals_that_support_it() -> None:
    args: list[object] = ["inspect", CAPTURE]
    coloured = in_a_terminal(args, {"COLUMNS": "200"})
    assert "\x1b[1mkho-v1\x1b[0m" in coloured
    plain = in_a_terminal(args, {"NO_COLOR": "1", "COLUMNS": "200"})
    assert "\x1b[3" not in plain
    piped = process(*args)
    assert "\x1b" not in piped.out
    for text in (plain, piped.out):
        assert "Preserved" in text
        assert "0x6c4000" in text


def test_a_closed_pipe_is_not_an_error() -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m kho inspect --json '{CAPTURE}' | head -c 10"],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ('{\n  "schem', "")


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["owners", "--json"], ["fdt"]])
@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_cause_no_traceback(command: list[str], closed: str) -> None:
    args = " ".join(command)
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m kho {args} '{SMALL}' {closed}"], capture_output=True, text=True
    )
    without_stdout = ">&-" in closed.replace("2>&-", "")
    assert done.returncode == (2 if without_stdout else 0)
    assert bool(done.stdout) is not without_stdout
    expected = "kho: stdout is closed; redirect it to /dev/null to discard the output\n"
    assert done.stderr == (expected if closed == ">&-" else "")


def test_stdin_with_an_address_goes_after_two_dashes() -> None:
    done = run("inspect", "-@0x40000000")
    assert done.code == 2
    assert "kho inspect -- -@0x40000000" in done.err


def widest(shown: str) -> int:
    """The length of the longest line."""
    return max(map(len, shown.splitlines()))


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_without_a_terminal_lines_are_folded_at_columns(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = [run("owners", CAPTURE).out, run("doctor", HOST).out]
    monkeypatch.setenv("COLUMNS", str(columns))
    owned, doctor = run("owners", CAPTURE).out, run("doctor", HOST).out
    table = owned.partition("\nPreserved")[0]
    assert widest(table) <= columns
    report, steps = doctor.split("To boot with kho=off")
    assert widest(report) <= max(columns, *map(len, report.split()))
    assert steps == wide[1].split("To boot with kho=off")[1]  # commands stay in one piece
    for narrow, whole in zip([owned, report], [wide[0], wide[1].split("To boot with kho=off")[0]], strict=True):
        assert narrow.split() == whole.split()  # nothing is lost


@pytest.mark.parametrize("columns", ["", "0", "-1", "x"])
def test_a_columns_variable_that_is_no_width_is_ignored(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = run("owners", CAPTURE).out
    monkeypatch.setenv("COLUMNS", columns)
    assert run("owners", CAPTURE).out == wide
