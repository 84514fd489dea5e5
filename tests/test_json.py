"""JSON output is ASCII, and each number above 2^53 has a hex string next to it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
from kho import jsontext

import captures
import hostile
from command import kho as run

TOP = 2**64 - 1


def inexact(data: Any, where: str = "") -> Iterator[str]:
    """Yield numbers that a double cannot hold, without a hex string next to them, their list or their map."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name.endswith("_hex") and name.removesuffix("_hex") in data:
                continue
            yield from inexact_member(data, name, value, f"{where}.{name}")
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from inexact(value, f"{where}[{i}]")
    elif isinstance(data, int) and abs(data) > 2**53:
        yield f"{where}: {data}"


def inexact_member(data: dict[str, Any], name: str, value: Any, where: str) -> Iterator[str]:
    """As `inexact`, for a member that may have a hex string."""
    sibling = data.get(f"{name}_hex")
    if sibling is None:
        yield from inexact(value, where)
    elif without_objects(value) != numbers(sibling):
        yield f"{where}: {sibling} is not {value}"
    else:
        yield from inexact(list(objects(value)), where)


def objects(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects in nested lists: their members have hex strings of their own."""
    for each in data if isinstance(data, list) else ():
        if isinstance(each, dict):
            yield each
        else:
            yield from objects(each)


def without_objects(data: Any) -> Any:
    """Data with null for each object in a list, as the hex strings next to the list have it."""
    if isinstance(data, list):
        return [None if isinstance(each, dict) else without_objects(each) for each in data]
    return numbers(data)


def numbers(data: Any) -> Any:
    """Data with hexadecimal strings converted to numbers."""
    if isinstance(data, dict):
        return {name: numbers(value) for name, value in data.items()}
    if isinstance(data, list):
        return [numbers(value) for value in data]
    return int(data, 16) if isinstance(data, str) and data.startswith(("0x", "-0x")) else data


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handover with the largest possible numbers."""
    folder = tmp_path_factory.mktemp("json")
    base = 2**64 - (64 << 20)
    arena = kho.Arena([(base, 32 << 20)])
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd("vm-1", TOP, b"guest" * 100)
    out.add_memfd("vm-1", 7, b"")
    out.add_flb("pci", 0xFEEDF00DCAFEBEE0, 1)
    out.add_reserve_mem("keepme_hex", 8192)
    out.finalize()
    out.save(folder / "top.elf")
    return folder / "top.elf"


def commands(image: Path, folder: Path) -> Iterator[tuple[object, ...]]:
    """Every command that prints JSON for an image."""
    yield from (("inspect", "--json", image), ("inspect", "--full", "--json", image), ("verify", "--json", image))
    yield from (("verify", "--sarif", image), ("owners", "--json", image), ("owners", "--by-page", "--json", image))
    yield from (
        ("map", "--json", image),
        ("fdt", "--all", "--json", image),
        ("extract", "--all", folder, "--json", image),
    )
    yield from (
        ("diff", "--json", image, captures.elf("linux-7.3.4-x86_64")),
        ("convert", image, "--abi", "kho-v4", "-o", folder / "converted.elf", "--json"),
    )


def test_every_command_adds_hex_strings_to_large_numbers(image: Path, tmp_path: Path) -> None:
    large = 0
    for words in commands(image, tmp_path / "out"):
        done = run(*words)
        assert done.code in (0, 1), (words, done.err)
        assert done.out.isascii()
        if "--sarif" not in words:
            assert list(inexact(done.json)) == [], words
        large += done.out.count("1844674407")
    assert large > 20, "the image has large numbers"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert list(inexact(manifest)) == []
    rows = run("inspect", "--json", image).json["luo"]["sessions"][0]["files"]
    assert [row["token_hex"] for row in rows] == [f"{TOP:#x}", "0x7"], "a token always has a hex string"
    assert [row["token"] for row in rows] == [TOP, 7]


@pytest.mark.parametrize("what", sorted([*hostile.REFUSED, *hostile.ODD]))
def test_large_numbers_of_malformed_images_have_hex_strings(what: str, tmp_path: Path) -> None:
    image = tmp_path / "image.elf"
    image.write_bytes(hostile.damaged((hostile.REFUSED | hostile.ODD)[what]))
    for command in ("inspect", "verify", "owners", "map", "fdt"):
        done = run(command, "--json", image)
        if done.code != 2:
            assert list(inexact(done.json)) == []
    sarif = run("verify", "--sarif", image)
    for result in sarif.json["runs"][0]["results"] if sarif.code != 2 else []:
        address = result["locations"][0]["physicalLocation"].get("address", {})
        if address.get("absoluteAddress", 0) > 2**53:
            assert int(address["name"], 16) == address["absoluteAddress"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_jq_reads_every_bit_of_a_token(image: Path) -> None:
    found = run("inspect", "--json", image).out
    script = '.luo.sessions[] | select(.name == "vm-1") | .files[].token_hex'
    done = subprocess.run(["jq", "-r", script], input=found, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0xffffffffffffffff", "0x7"]


DATA = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["a", "b", "token", "c"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "token", "reserve_mem"]), DATA, max_size=4))
def test_exact_adds_strings_and_keeps_all_data(data: dict[str, Any]) -> None:
    text = jsontext.dumps(data)
    assert text.isascii()
    assert text.isprintable()
    read = json.loads(text)
    assert list(inexact(read)) == []

    def without(given: Any, told: Any) -> Any:
        if isinstance(given, dict):
            return {name: without(value, told[name]) for name, value in given.items()}
        if isinstance(given, list):
            return [without(a, b) for a, b in zip(given, told, strict=True)]
        return told

    assert without(data, read) == data


def test_text_is_exact_and_ascii() -> None:
    text = "\x1b\x7f\x85\u202e\udcff\n\u6f22"
    written = jsontext.dumps({"name": text})
    assert written.isascii()
    assert written.isprintable()
    assert json.loads(written) == {"name": text}


NAMES = st.one_of(st.sampled_from(["token", "totals", "reserve_mem"]), st.text(max_size=3), st.integers(0, 2**64))
KEYED = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(NAMES, inner, max_size=3),
    ),
    max_leaves=12,
)


@given(st.dictionaries(NAMES, KEYED, max_size=4))
def test_pieces_equal_dumps_for_any_member_names(data: dict[Any, Any]) -> None:
    assert json.loads("".join(jsontext.pieces(data))) == json.loads(jsontext.dumps(data))


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_integer_member_names_become_strings(command: str) -> None:
    done = run(command, "--memory", "1G", "--preserve", "10%:2M", "--json")
    assert done.code == 0
    assert done.json
