"""Devicetrees as source: what dtc takes, with KHO's numbers as KHO means them."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
from kho import fdt

import captures
import hostile
from command import kho as run

BLOBS = sorted((captures.DATA / "fdt").glob("*.dtb"))
CUT = captures.DATA / "fdt/linux-7.3.4-out-fdt.dtb"
V4 = "linux-7.3.4-x86_64"
needs_dtc = pytest.mark.skipif(shutil.which("dtc") is None, reason="dtc is not installed")


def compiled(dts: str) -> fdt.Fdt:
    """What dtc makes of source."""
    done = subprocess.run(["dtc", "-q", "-I", "dts", "-O", "dtb"], input=dts.encode(), capture_output=True, check=True)
    return fdt.parse(done.stdout)


def captured() -> list[fdt.Fdt]:
    """Every whole FDT of the captures: roots, subtrees, and the files kept of them."""
    found = [fdt.parse(path.read_bytes()) for path in BLOBS if path != CUT]
    for name in captures.NAMES:
        inc = kho.open(captures.elf(name))
        found.append(inc.fdt)
        found += [sub.fdt() for sub in inc.subtrees.values() if sub.read()[:4] == fdt.MAGIC]
    return found


@needs_dtc
def test_dtc_reads_every_captured_tree_with_its_numbers_swapped() -> None:
    for tree in captured():
        again = compiled(fdt.to_dts(tree))
        assert [node.path for node in again.walk()] == [node.path for node in tree.walk()]
        for node, copy in zip(tree.walk(), again.walk(), strict=True):
            assert list(node.properties) == list(copy.properties)
            for name, raw in node.properties.items():
                number = fdt.value_of(name, raw)["type"] in ("u32", "u64")
                assert copy[name] == (raw[::-1] if number else raw), (node.path, name)


@pytest.mark.parametrize("name", captures.NAMES)
def test_addresses_are_shown_as_they_are(name: str) -> None:
    expected = captures.expected(name)
    done = run("fdt", captures.elf(name))
    assert (done.code, done.err) == (0, "")
    assert f"preserved-memory-map = /bits/ 64 <{expected['preserved_memory_map']:#018x}>;" in done.out
    assert f'compatible = "{expected["compatible"]}";' in done.out
    for subtree in expected["subtrees"].values():
        assert f"{subtree['phys']:#018x}" in done.out
    data = run("fdt", "--json", captures.elf(name)).json
    values = {prop["name"]: prop["value"] for prop in data["root"]["properties"]}
    assert values == {"compatible": [expected["compatible"]], "preserved-memory-map": expected["preserved_memory_map"]}
    assert {child["name"] for child in data["root"]["children"]} == set(expected["subtrees"])


def test_all_prints_every_subtree_that_is_a_tree() -> None:
    out = run("fdt", "--all", captures.elf(V4)).out
    assert out.count("/dts-v1/;") == 3
    start, size = captures.expected(V4)["reserve_mem"]["keepme"]
    assert f"start = /bits/ 64 <{start:#018x}>;" in out
    assert f"size = /bits/ 64 <{size:#018x}>;" in out
    assert "struct kho_vmalloc: first 0x541000, 1 pages" in out
    one = run("fdt", "--subtree", "memblock", captures.elf(V4))
    assert one.code == 0
    assert one.out in out
    assert len(run("fdt", "--all", "--json", captures.elf(V4)).json) == 3


def test_a_tree_that_the_kernel_cut_off_still_says_compatible_and_map() -> None:
    done = run("fdt", CUT)
    assert done.code == 0
    assert done.err == f"warning: {CUT}: FDT at offset 0xe9: cut short: 233 bytes of 405\n"
    assert '\tcompatible = "kho-v4";  // its name is cut off, this one fits\n' in done.out
    map_phys = captures.expected(V4)["preserved_memory_map"]
    assert f"\tpreserved-memory-map = /bits/ 64 <{map_phys:#018x}>;" in done.out
    data = json.loads(run("fdt", "--json", CUT).out)
    assert [prop["likely_name"] for prop in data["root"]["properties"]] == ["compatible", "preserved-memory-map"]
    assert "233 bytes of 405" in data["error"]


def test_names_that_are_cut_off_are_told_right_for_every_captured_root(tmp_path: Path) -> None:
    for name in captures.NAMES:
        root = kho.open(captures.elf(name)).fdt
        raw = bytes(root)
        strings = struct.unpack_from(">I", raw, 12)[0]
        if strings < struct.unpack_from(">I", raw, 8)[0]:
            continue  # strings before the structure: nothing is left of the tree
        tree, error = fdt.Fdt.partial(raw[:strings])
        assert error is not None
        likely = fdt.likely_names(tree)
        named = [likely.get(offset) for node in tree.walk() for _, offset, _ in node.raw_properties]
        assert named == [prop for node in root.walk() for prop in node.properties]


@pytest.mark.parametrize("length", [0, 3, 20, 39, 60, 100, 200])
def test_every_beginning_of_a_tree_ends_well(length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.dtb"
    path.write_bytes((captures.DATA / "fdt/linux-7.3.4-in-fdt.dtb").read_bytes()[:length])
    done = run("fdt", path)
    assert done.code == (0 if length >= 60 and done.out else 2)
    assert "Traceback" not in done.err
    assert done.err


def test_a_malformed_tree_is_printed_as_far_as_it_goes(tmp_path: Path) -> None:
    raw = bytearray((captures.DATA / "fdt/linux-7.3.4-in-fdt.dtb").read_bytes())
    at = raw.index(b"kho_test") - 4
    raw[at : at + 4] = b"\0\0\0\7"
    path = tmp_path / "bad.dtb"
    path.write_bytes(raw)
    done = run("fdt", path)
    assert done.code == 2
    assert "LUO" in done.out
    assert done.err.startswith(f"kho: {path}: FDT at offset ")


def test_a_subtree_that_is_no_tree_says_so() -> None:
    done = run("fdt", "--subtree", "LUO", captures.elf(V4))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("kho: subtree LUO: no FDT (kho extract --subtree takes it raw)")
    assert run("fdt", "--subtree", "nobody", captures.elf(V4)).code == 2
    assert run("fdt", "--subtree", "memblock", "--all", captures.elf(V4)).code == 2
    assert "bare FDT" in run("fdt", "--subtree", "memblock", BLOBS[0]).err


@needs_dtc
@given(st.lists(st.binary(max_size=24), min_size=1, max_size=6))
def test_any_value_survives_dtc(values: list[bytes]) -> None:
    writer = fdt.Writer()
    with writer.node():
        for i, value in enumerate(values):
            writer.property(f"p{i}", value)
    tree = fdt.parse(writer.finish())
    copy = compiled(fdt.to_dts(tree)).root
    for name, raw in tree.root.properties.items():
        number = fdt.value_of(name, raw)["type"] in ("u32", "u64")
        assert copy[name] == (raw[::-1] if number else raw)


def test_names_cannot_leave_their_comment() -> None:
    writer = fdt.Writer()
    with writer.node():
        writer.property('a"b */ evil', b"\0\0\0\1")
    dts = fdt.to_dts(fdt.parse(writer.finish()), comment="x\n/ { y; };")
    assert dts.count("*/") == 1
    assert "\n/ { y" not in dts
    assert "a?b?" in dts


@pytest.mark.parametrize("what", sorted([*hostile.REFUSED, *hostile.ODD]))
def test_images_no_kernel_wrote_end_in_an_error_or_a_tree(what: str, tmp_path: Path) -> None:
    image = tmp_path / "image.elf"
    image.write_bytes(hostile.damaged((hostile.REFUSED | hostile.ODD)[what]))
    done = run("fdt", "--all", image)
    assert done.code in ((2,) if what in hostile.REFUSED else (0, 2))
    assert "Traceback" not in done.err
