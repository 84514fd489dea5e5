"""Devicetrees as source: accepted by dtc, with KHO's numbers in their actual value."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho import errors, fdt

import captures
import hostile
from command import kho as run

BLOBS = sorted((captures.DATA / "fdt").glob("linux-*.dtb"))
CUT = captures.DATA / "fdt/linux-7.3.4-out-fdt.dtb"
V4 = "linux-7.3.4-x86_64"
needs_dtc = pytest.mark.skipif(shutil.which("dtc") is None, reason="dtc is not installed")


def compiled(dts: str) -> fdt.Fdt:
    """The FDT that dtc compiles from source."""
    return fdt.parse(dtc(dts.encode(), "dts", "dtb"))


def dtc(data: bytes, form: str, to: str) -> bytes:
    """Run dtc on source or a blob."""
    return subprocess.run(["dtc", "-q", "-I", form, "-O", to], input=data, capture_output=True, check=True).stdout


def captured() -> list[fdt.Fdt]:
    """Every complete FDT of the captures: roots, subtrees, and saved files."""
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
def test_addresses_are_printed_unswapped(name: str) -> None:
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


def test_all_prints_every_subtree_that_is_an_fdt() -> None:
    out = run("fdt", "--all", captures.elf(V4)).out
    assert out.count("/dts-v1/;") == 3
    start, size = captures.expected(V4)["reserve_mem"]["keepme"]
    assert f"start = /bits/ 64 <{start:#018x}>;" in out
    assert f"size = /bits/ 64 <{size:#018x}>;" in out
    assert "struct kho_vmalloc: first 0x541000, 1 pages" in out
    one = run("fdt", "--subtree", "memblock", captures.elf(V4))
    assert one.code == 0
    assert one.out in out
    assert len(run("fdt", "--all", "--json", captures.elf(V4)).json["trees"]) == 3


def test_a_truncated_tree_still_shows_compatible_and_map() -> None:
    done = run("fdt", CUT)
    assert done.code == 0
    assert done.err == f"warning: {CUT}: FDT at offset 0xe9: cut short: 233 bytes of 405\n"
    assert '\tcompatible = "kho-v4";  // name truncated, this one fits\n' in done.out
    map_phys = captures.expected(V4)["preserved_memory_map"]
    assert f"\tpreserved-memory-map = /bits/ 64 <{map_phys:#018x}>;" in done.out
    data = json.loads(run("fdt", "--json", CUT).out)
    assert [prop["likely_name"] for prop in data["root"]["properties"]] == ["compatible", "preserved-memory-map"]
    assert "233 bytes of 405" in data["error"]


def test_truncated_names_are_guessed_correctly_for_every_captured_root(tmp_path: Path) -> None:
    for name in captures.NAMES:
        root = kho.open(captures.elf(name)).fdt
        raw = bytes(root)
        strings = struct.unpack_from(">I", raw, 12)[0]
        if strings < struct.unpack_from(">I", raw, 8)[0]:
            continue  # the string block is before the structure block: nothing is left of the tree
        tree, error = fdt.Fdt.partial(raw[:strings])
        assert error is not None
        likely = fdt.likely_names(tree)
        named = [likely.get(offset) for node in tree.walk() for _, offset, _ in node.raw_properties]
        assert named == [prop for node in root.walk() for prop in node.properties]


@pytest.mark.parametrize("length", [0, 3, 20, 39, 60, 100, 200])
def test_every_prefix_of_a_tree_is_printed_or_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.dtb"
    path.write_bytes((captures.DATA / "fdt/linux-7.3.4-in-fdt.dtb").read_bytes()[:length])
    done = run("fdt", path)
    assert done.code == (0 if length >= 60 and done.out else 2)
    assert "Traceback" not in done.err
    assert done.err


def test_a_malformed_tree_is_printed_up_to_the_error(tmp_path: Path) -> None:
    raw = bytearray((captures.DATA / "fdt/linux-7.3.4-in-fdt.dtb").read_bytes())
    at = raw.index(b"kho_test") - 4
    raw[at : at + 4] = b"\0\0\0\7"
    path = tmp_path / "bad.dtb"
    path.write_bytes(raw)
    done = run("fdt", path)
    assert done.code == 2
    assert "LUO" in done.out
    assert done.err.startswith(f"kho: {path}: FDT at offset ")


def test_a_subtree_that_is_not_an_fdt_is_refused() -> None:
    done = run("fdt", "--subtree", "LUO", captures.elf(V4))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("kho: subtree LUO: not an FDT (kho extract --subtree writes it raw)")
    assert run("fdt", "--subtree", "absent", captures.elf(V4)).code == 2
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
    copy = compiled(fdt.to_dts(tree, numbers="native")).root
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
def test_malformed_images_give_an_error_or_a_tree(what: str, tmp_path: Path) -> None:
    image = tmp_path / "image.elf"
    image.write_bytes(hostile.damaged((hostile.REFUSED | hostile.ODD)[what]))
    done = run("fdt", "--all", image)
    assert done.code in ((2,) if what in hostile.REFUSED else (0, 2))
    assert "Traceback" not in done.err


# Other trees

MACHINE = captures.DATA / "fdt/machine-virt.dtb"


def values(dts: str) -> list[str]:
    """The lines of source without comments, indents and empty lines, with strings in one form."""
    lines = (re.sub(r"\s*//.*", "", line).strip() for line in dts.splitlines())
    return [re.sub(r"^(/memreserve/)\s+", r"\1 ", line.replace('", "', "\\0")) for line in lines if line]


@needs_dtc
def test_the_devicetree_of_a_machine_is_printed_as_by_dtc() -> None:
    done = run("fdt", MACHINE)
    assert (done.code, done.err) == (0, "")
    assert "#address-cells = <0x02>;" in done.out
    assert "linux,kho-fdt = <0x00 0x4095d000 0x00 0x1000>;  // physical address 0x4095d000, 4096 bytes" in done.out
    assert "linux,kho-scratch = <0x00 0x4f7f0000 0x00 0x30>;  // physical address 0x4f7f0000, 48 bytes" in done.out
    assert values(done.out) == values(dtc(MACHINE.read_bytes(), "dtb", "dts").decode())
    assert dtc(done.out.encode(), "dts", "dtb") == MACHINE.read_bytes()
    data = run("fdt", "--json", MACHINE).json
    assert data["numbers"] == "cells"
    assert data["root"]["properties"][0] == {"name": "#address-cells", "type": "cells", "value": [2], "raw": "00000002"}


NAMES = st.text("abcxyz0189,._+-", min_size=1, max_size=12)
VALUES = st.one_of(
    st.binary(max_size=24),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5).map(lambda n: struct.pack(f">{len(n)}I", *n)),
    st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=9), min_size=1, max_size=4).map(
        lambda texts: "\0".join(texts).encode() + b"\0"
    ),
    st.text("a\t\n\r\a\b\v\f\\\\\"'", max_size=9).map(lambda text: text.encode() + b"\0"),
)
TREES: st.SearchStrategy[Any] = st.recursive(
    st.tuples(st.dictionaries(NAMES, VALUES, max_size=4), st.just({})),
    lambda nodes: st.tuples(st.dictionaries(NAMES, VALUES, max_size=4), st.dictionaries(NAMES, nodes, max_size=3)),
    max_leaves=6,
)


@needs_dtc
@settings(max_examples=25)
@given(TREES, st.sampled_from([None, b"linux,dummy-virt\0", b"acme,kho-v4\0", b"kho\0", b"khov4\0"]))
def test_other_trees_have_the_values_that_dtc_prints(tree: Any, compatible: bytes | None) -> None:
    """Compiled with dtc, the output gives the same tree for any values.

    The output of dtc itself does not: 1.6 prints the strings "" and "0 " as "\\00 " and reads one octal escape.
    """
    writer = fdt.Writer()

    def write(node: Any, name: str) -> None:
        properties, children = node
        with writer.node(name):
            for key, value in properties.items():
                writer.property(key, value)
            for key, child in children.items():
                write(child, key + "@1")

    properties, children = tree
    properties = {name: value for name, value in properties.items() if name != "compatible"}
    if compatible is not None:
        properties["compatible"] = compatible
    write((properties, children), "")
    blob = writer.finish()
    parsed = fdt.parse(blob)
    assert fdt.numbers_of(parsed) == "cells"
    shown = fdt.to_dts(parsed)
    again = fdt.parse(dtc(shown.encode(), "dts", "dtb"))
    assert [node.properties for node in again.walk()] == [node.properties for node in parsed.walk()]
    cells = [line for line in values(dtc(blob, "dtb", "dts").decode()) if "<" in line and '"' not in line]
    ours = values(shown)
    # dtc 1.6 prints a string with as many NULs as letters as bytes, later versions as text: the bytes are the same.
    assert [line for line in cells if line not in ours and "= <" in line and not _short(line)] == []


def _short(line: str) -> bool:
    """Whether another version of dtc may print these cells as text: half of the bytes are NULs."""
    raw = b"".join(int(cell, 16).to_bytes(4, "big") for cell in re.findall(r"0x[0-9a-f]+", line.split("=", 1)[1]))
    return raw.count(0) * 2 >= len(raw)


def test_trees_of_kho_and_its_producers_are_native_and_others_are_not(tmp_path: Path) -> None:
    for tree in captured():
        assert fdt.numbers_of(tree) == "native"
    partial, _ = fdt.Fdt.partial(CUT.read_bytes())
    assert fdt.numbers_of(partial) == "native"
    assert fdt.numbers_of(fdt.parse(MACHINE.read_bytes())) == "cells"


def test_the_byte_order_of_numbers_can_be_given(tmp_path: Path) -> None:
    native = run("fdt", "--numbers", "native", MACHINE).out
    assert "#address-cells = <0x02000000>;" in native
    assert "linux,kho-fdt = <0x00 0x4095d000 0x00 0x1000>;" in native, "cells in any tree"
    root = captures.DATA / "fdt/linux-7.3.4-in-fdt.dtb"
    assert "/bits/ 64" not in run("fdt", "--numbers", "cells", root).out
    assert run("fdt", "--numbers", "auto", root).out == run("fdt", "--numbers", "native", root).out
    assert "preserved-memory-map = /bits/ 64" not in run("fdt", "--numbers", "cells", captures.elf(V4)).out
    with pytest.raises(errors.ParameterError, match="not native or cells"):
        fdt.to_dts(fdt.parse(MACHINE.read_bytes()), numbers="big")  # type: ignore[arg-type]


def test_subtrees_of_a_handover_are_native_for_any_compatible(tmp_path: Path) -> None:
    writer = fdt.Writer()
    with writer.node():
        writer.property("compatible", b"vendor,widget\0")
        writer.property("where", struct.pack("<Q", 0x123456789))
    out = kho.Outgoing(kho.Arena(16 << 20), "kho-v4")
    out.add_subtree("widget", writer.finish())
    out.finalize()
    out.save(tmp_path / "x.elf")
    assert "where = /bits/ 64 <0x0000000123456789>;" in run("fdt", "--subtree", "widget", tmp_path / "x.elf").out


def test_a_tree_is_read_from_a_pipe() -> None:
    command = [sys.executable, "-m", "kho", "fdt", "-"]
    done = subprocess.run(command, input=MACHINE.read_bytes(), capture_output=True, check=True)
    assert values(done.stdout.decode()) == values(run("fdt", MACHINE).out)
