"""A map shows every preserved byte once, with its owner, in a bounded number of lines."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
from kho.handover import mapdraw, memmap
from kho.handover.memmap import Gap, Row, build, merged, without

import captures
import hostile
from command import kho as run
from images import GIB, MIB, TIB, Image

V4 = "linux-7.3.4-x86_64"
ALL = pytest.mark.parametrize("name", captures.NAMES)
pages = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)).map(lambda p: (p[0], p[0] + p[1])), max_size=8)


def spread(intervals: list[tuple[int, int]]) -> set[int]:
    return {at for start, end in intervals for at in range(start, end)}


@given(pages, pages)
def test_intervals_are_sets(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    assert spread(merged(a)) == spread(a)
    assert all(one[1] < other[0] for one, other in pairwise(merged(a)))
    assert spread(without(merged(a), merged(b))) == spread(a) - spread(b)


@ALL
def test_every_preserved_byte_has_exactly_one_owner(name: str) -> None:
    inc = kho.open(captures.elf(name))
    spans = [span for span in memmap.spans_of(inc) if span.kind != "scratch"]
    owned = [interval for span in spans for interval in span.intervals]
    assert merged(owned) == merged([(phys, phys + (inc.page_size << order)) for phys, order in inc.folios])
    assert sum(end - start for start, end in owned) == inc.preserved_bytes
    assert "unclaimed" not in {span.kind for span in spans}, "in captures every preserved page has an owner"


@ALL
def test_cells_add_up_to_the_preserved_bytes(name: str) -> None:
    inc = kho.open(captures.elf(name))
    ranges = kho.Memory.open(captures.elf(name)).ranges
    for rows in (1, 4, 32, 500):
        found = build(inc, ranges, rows=rows)
        seen: dict[str, int] = {}
        end = 0
        for line in found.lines:
            assert line.phys == end, "lines are contiguous"
            end = line.phys + line.nbytes
            if isinstance(line, Row):
                assert sum(nbytes for _, nbytes in line.owners) == sum(sum(c.bytes_of.values()) for c in line.cells)
                for cell in line.cells:
                    for kind, nbytes in cell.bytes_of.items():
                        seen[kind] = seen.get(kind, 0) + nbytes
            elif line.kind:
                seen[line.kind] = seen.get(line.kind, 0) + line.nbytes
        assert seen == found.totals
        assert sum(isinstance(line, Row) for line in found.lines) <= rows


@pytest.mark.parametrize("name", [V4])
def test_the_text_shows_addresses_owners_and_holes(name: str) -> None:
    done = run("map", captures.elf(name))
    assert (done.code, done.err) == (0, "")
    assert "a line is 256.0 KiB, a character 4.0 KiB" in done.out
    (line,) = [line for line in done.out.splitlines() if "reserve_mem keepme" in line]
    assert line.split()[0] == "0xfb00000"
    assert line.count("\u2588") == 16
    assert "15.8 MiB more of scratch, node 0" in done.out
    assert "158.0 MiB, nothing preserved, not in this memory" in done.out
    assert all(len(line) <= 120 for line in done.out.splitlines())


def test_a_map_of_16_tebibytes_is_as_short_as_a_small_one(tmp_path: Path) -> None:
    folios = [(0x40_0000, 0), (8 * TIB, 18), (16 * TIB - 4096, 0)]
    image = Image(folios=folios, compatible="kho-v4", ram=[(0, 16 * TIB)], whole_ram=False).write(tmp_path / "big.elf")
    found = build(kho.open(image))
    assert len(found.lines) < 20
    assert [line.nbytes for line in found.lines if isinstance(line, Gap) and line.kind] == [GIB - found.row_bytes]
    assert run("map", image).code == 0


def test_density_selects_the_character(tmp_path: Path) -> None:
    folios = [(32 * MIB + i * 16384, 0) for i in range(2048)]
    image = Image(folios=folios, compatible="kho-v4", ram=[(0, 128 * MIB)]).write(tmp_path / "image.elf")
    found = build(kho.open(image), rows=2)
    densities = {cell.density(found.cell_bytes) for row in found.lines if isinstance(row, Row) for cell in row.cells}
    assert 0.25 in densities
    assert "\u2592" in run("map", image, "--row", hex(4 * MIB)).out


@pytest.mark.parametrize(
    ("row", "why"),
    [("5000", "must be a power of two"), ("4096", "at least 262144"), ("0x300000", "must be a power of two")],
)
def test_a_row_must_be_a_power_of_two(row: str, why: str) -> None:
    done = run("map", "--row", row, captures.elf(V4))
    assert done.code == 2
    assert why in done.err


def test_json_lists_owners_with_their_addresses() -> None:
    found = run("map", "--json", captures.elf(V4)).json
    (keepme,) = [span for span in found["spans"] if span["owner"] == "reserve_mem keepme"]
    start, size = captures.expected(V4)["reserve_mem"]["keepme"]
    assert (keepme["kind"], keepme["intervals"]) == ("region", [[start, start + size]])


@ALL
def test_svg_is_xml_with_a_color_for_every_kind(name: str, tmp_path: Path) -> None:
    out = tmp_path / "map.svg"
    assert run("map", captures.elf(name), "-o", out).code == 0
    root = ET.fromstring(out.read_text())
    fills = {rect.get("fill") for rect in root.iter("{http://www.w3.org/2000/svg}rect")}
    kinds = build(kho.open(captures.elf(name))).totals
    assert {mapdraw.COLORS[kind] for kind in kinds} <= fills
    assert any(": reserve_mem" in (title.text or "") for title in root.iter("{http://www.w3.org/2000/svg}title"))


def test_html_is_self_contained(tmp_path: Path) -> None:
    out = tmp_path / "map.html"
    assert run("map", captures.elf(V4), "-o", out).code == 0
    page = out.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<svg" in page
    assert "reserve_mem keepme" in page
    assert "src=" not in page
    assert page.count("http") == 1, "only the SVG namespace"


def test_png_without_matplotlib_names_the_extra(tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {"matplotlib": None, "matplotlib.backends.backend_agg": None}):
        done = run("map", captures.elf(V4), "-o", tmp_path / "map.png")
    assert (done.code, done.out) == (2, "")
    assert "pip install 'kho[plot]'" in done.err


def test_a_png_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("map", captures.elf(V4), "-o", tmp_path / "map.png").code == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_other_suffixes_and_missing_directories_are_refused(tmp_path: Path) -> None:
    assert "the suffix must be .svg, .html or .png" in run("map", captures.elf(V4), "-o", tmp_path / "map.gif").err
    assert run("map", captures.elf(V4), "-o", tmp_path / "no" / "map.svg").code == 2


def test_names_from_memory_are_escaped_in_text_and_pictures(tmp_path: Path) -> None:
    span = memmap.Span("file", "evil \x1b[2J\0 </svg> $x$", [(4096, 8192)])
    row = Row(0, 4096 * 64, [memmap.Cell({}, True)] * 64, [(span.owner, 4096)])
    found = memmap.MemoryMap(4096, 4096 * 64, 4096, [row], [span])
    for text in (mapdraw.to_svg(found), mapdraw.to_html(found)):
        assert "\x1b" not in text
        assert "\0" not in text
        assert "evil \\x1b[2J\\x00 &lt;/svg&gt;" in text
    ET.fromstring(mapdraw.to_svg(found))


@pytest.mark.parametrize("what", sorted([*hostile.REFUSED, *hostile.ODD]))
def test_malformed_images_give_an_error_or_a_map(what: str, tmp_path: Path) -> None:
    image = tmp_path / "image.elf"
    image.write_bytes(hostile.damaged((hostile.REFUSED | hostile.ODD)[what]))
    done = run("map", image)
    assert done.code in ((2,) if what in hostile.REFUSED else (0, 2))
    assert "Traceback" not in done.err
