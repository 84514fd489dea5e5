"""Each finding is found under its own id, in what has nothing else wrong; what a kernel wrote is in order."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
from kho import findings
from kho.findings import RULES, Finding
from kho.verify import verify, verify_fdt

import captures
import hostile
import model
from command import kho as run
from images import MIB, Layout
from model import Node

NAME = "linux-7.3.4-x86_64"
PAGE = 4096
LIMIT = 1.0
ROOT = Path(__file__).parent.parent


class Edit:
    """A memory that can be damaged: the pages of a handover by address."""

    def __init__(self, segments: list[tuple[int, bytes]]) -> None:
        self.segments = {phys: bytearray(data) for phys, data in segments}

    def find(self, phys: int) -> tuple[bytearray, int]:
        start, data = next((s, d) for s, d in self.segments.items() if s <= phys < s + len(d))
        return data, phys - start

    def put(self, phys: int, raw: bytes) -> None:
        data, at = self.find(phys)
        data[at : at + len(raw)] = raw

    def get(self, phys: int, n: int) -> bytes:
        data, at = self.find(phys)
        return bytes(data[at : at + n])

    def u64(self, phys: int) -> int:
        return int.from_bytes(self.get(phys, 8), "little")

    def put_u64(self, phys: int, value: int) -> None:
        self.put(phys, struct.pack("<Q", value))

    def replace(self, phys: int, old: bytes, new: bytes) -> None:
        """Replaces the one place in the page at `phys` that has the bytes `old`."""
        page = self.get(phys, PAGE)
        assert page.count(old) == 1
        assert len(old) == len(new)
        self.put(phys + page.index(old), new)

    def preserve(self, phys: int, order: int, on: bool = True) -> None:
        """Sets or clears a key of a kho-v4 tree with pages of 4 KiB, where its leaf is there."""
        key, node = 1 << (52 - order) | phys >> (12 + order), self.map_phys
        for level in range(5, 0, -1):
            node = self.u64(node + 8 * (key >> ((level - 1) * 9 + 15) & 511))
            assert node, "no such leaf"
        byte, bit = node + key % 32768 // 8, 1 << key % 8
        old = self.get(byte, 1)[0]
        assert bool(old & bit) != on
        self.put(byte, bytes([old ^ bit]))

    @property
    def map_phys(self) -> int:
        return int(captures.expected(NAME)["preserved_memory_map"])

    @property
    def fdt_phys(self) -> int:
        return int(captures.expected(NAME)["fdt_phys"])

    @property
    def memory(self) -> kho.Memory:
        return kho.Memory.from_segments([(phys, bytes(data)) for phys, data in self.segments.items()])


@cache
def captured() -> list[tuple[int, bytes]]:
    memory = kho.Memory.open(captures.elf(NAME))
    return [(phys, memory.read(phys, size)) for phys, size in memory.ranges]


def capture() -> Edit:
    """A handover of Linux 7.3.4, complete."""
    return Edit(captured())


class Case(NamedTuple):
    """What to damage, how, and what `verify` is told."""

    damage: Callable[[Edit], None] = lambda edit: None
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    base: Callable[[], Edit] = capture


def subtree(name: str) -> int:
    return int(captures.expected(NAME)["subtrees"][name]["phys"])


def file(session: int, n: int) -> dict[str, int]:
    found: dict[str, int] = captures.expected(NAME)["luo"]["sessions"][session]["files"][n]
    return found


@cache
def opened() -> kho.Incoming:
    return kho.open(captures.elf(NAME))


def folio_list(session: str, token: int) -> int:
    """Where a file's list of folios begins."""
    return int(opened().luo.sessions[session].files[token].list.blocks[0])


def folio(session: str, token: int, n: int = 0) -> int:
    return int(opened().luo.sessions[session].files[token].folios[n].phys)


def sessions() -> int:
    """The first session entry; each has 80 bytes: name, files, count."""
    return opened().luo.blocks[0][1] + 16


def files(session: str) -> int:
    """The first file entry of a session; each has 64 bytes: compatible, data, token."""
    return int(opened().luo.sessions[session].blocks[0][0]) + 16


def first_entry(edit: Edit) -> int:
    """The address of the root node's first entry."""
    return next(at for at in range(edit.map_phys, edit.map_phys + PAGE, 8) if edit.u64(at))


def root_value(old: int, new: int) -> Callable[[Edit], None]:
    """Replaces the value of a property of the root FDT."""
    return lambda edit: edit.replace(edit.fdt_phys, struct.pack("<Q", old), struct.pack("<Q", new))


def entry_is(change: Callable[[Edit, int], int]) -> Callable[[Edit], None]:
    """Replaces the root node's first entry."""

    def damage(edit: Edit) -> None:
        at = first_entry(edit)
        edit.put_u64(at, change(edit, edit.u64(at)))

    return damage


def shared_node(edit: Edit) -> None:
    at = first_entry(edit)
    edit.put_u64(at + 8, edit.u64(at))


def a_level_too_low(edit: Edit) -> None:
    order_0 = edit.u64(edit.map_phys + 2 * 8)
    root_value(edit.map_phys, order_0)(edit)


def from_layout(layout: Layout) -> Edit:
    return Edit([(phys, bytes(page)) for phys, page in layout.pages.items()])


def misaligned_start() -> Edit:
    layout = hostile.sane().lay_out()
    hostile.REFUSED["phys_start misaligned"](layout)
    return from_layout(layout)


def either_page_size() -> Edit:
    """A kho-v1 map that reads as well with pages of 4 KiB as of 16 KiB: the FDT's bit is set in both."""
    fdt, chunk, bitmap = 0x10000, 0x20000, 0x30000
    edit = Edit([(0, bytes(512 << 10))])
    root = Node({"compatible": b"kho-v1\0", "preserved-memory-map": struct.pack("<Q", chunk)})
    edit.put(fdt, model.write_fdt(root))
    edit.put(chunk, struct.pack("<QIIQQ", 0, 0, 1, 0, bitmap))
    edit.put_u64(bitmap, 1 << (fdt >> 12) | 1 << (fdt >> 14))
    return edit


def scratch_of_the_capture() -> list[tuple[int, int]]:
    return [tuple(area) for area in captures.expected(NAME)["scratch"]]


def put(phys: Callable[[], int], form: str, *values: Any) -> Callable[[Edit], None]:
    """Writes a struct at an address that is looked up when it is needed."""
    return lambda edit: edit.put(phys(), struct.pack("<" + form, *values))


def without_scratch(edit: Edit) -> None:
    edit.put(int(captures.expected(NAME)["scratch_phys"]), bytes(48))


def blank(edit: Edit) -> None:
    edit.preserve(0x530000, 4, on=False)


IN_MEMORY = 0x700_0000
"""An address without memory in the capture, in a leaf that is there."""

CORRUPTIONS: dict[str, Case] = {
    "KHO001": Case(lambda edit: root_value(edit.map_phys, 0)(edit)),
    "KHO002": Case(lambda edit: edit.replace(edit.fdt_phys, b"kho-v4\0", b"kho-v9\0")),
    "KHO004": Case(entry_is(lambda edit, _: 0x4000_0000_0000)),
    "KHO005": Case(shared_node),
    "KHO006": Case(a_level_too_low),
    "KHO007": Case(entry_is(lambda edit, child: child + 8)),
    "KHO008": Case(base=either_page_size),
    "KHO009": Case(blank),
    "KHO010": Case(options={"scratch": [(4 * MIB, 2 * MIB)]}),
    "KHO011": Case(lambda edit: edit.preserve(edit.map_phys, 0)),
    "KHO012": Case(lambda edit: edit.preserve(0x458000, 0)),
    "KHO013": Case(base=misaligned_start),
    "KHO014": Case(lambda edit: edit.preserve(IN_MEMORY, 0)),
    "KHO015": Case(lambda edit: edit.preserve(0xB40_0000, 0), {"scratch": scratch_of_the_capture()}),
    "KHO016": Case(options={"nodes": [(0, 0x45A000, 0), (0x45A000, 1 << 30, 1)]}),
    "KHO017": Case(options={"scratch": [(0xB40_1000, 16 * MIB)]}),
    "KHO018": Case(without_scratch),
    "KHO019": Case(lambda edit: edit.replace(edit.fdt_phys, b"preserved-data\0", b"preserved-atad\0")),
    "KHO020": Case(root_value(32, 16)),
    "KHO021": Case(lambda edit: edit.preserve(edit.fdt_phys, 0, on=False)),
    "KHO022": Case(lambda edit: edit.preserve(folio("vm-1", 0x10), 0, on=False)),
    "KHO023": Case(lambda edit: edit.replace(subtree("kho_test"), struct.pack("<I", 0x4B484F21), b"nope")),
    "KHO024": Case(lambda edit: edit.put(0x530000, b"\xff\xfe\xfd")),
    "KHO025": Case(put(lambda: files("vm-1"), "48s", b"vendor-v1")),
    "KHO026": Case(put(lambda: file(0, 0)["data"] + 40, "I", 99)),
    "KHO027": Case(put(lambda: folio_list("vm-1", 0x10) + 24, "Q", 0)),
    "KHO028": Case(put(lambda: folio_list("vm-1", 0x10) + 24, "Q", 96)),
    "KHO029": Case(put(lambda: file(0, 0)["data"] + 24, "Q", 97)),
    "KHO030": Case(put(lambda: sessions() + 80, "64s", b"vm-1")),
    "KHO031": Case(put(lambda: files("vm-1") + 64 + 56, "Q", 0x10)),
    "KHO032": Case(put(lambda: sessions() + 72, "Q", 3)),
    "KHO033": Case(put(lambda: folio_list("vm-1", 0x11), "Q", folio("vm-1", 0x10) >> 12 | 3 << 52)),
    "KHO034": Case(lambda edit: edit.preserve(0x51C000, 2)),
}


def ids(found: list[Finding]) -> list[str]:
    return [f.id for f in found]


@pytest.mark.parametrize("name", captures.NAMES)
def test_what_a_kernel_wrote_is_in_order(name: str) -> None:
    found = verify(captures.elf(name))
    assert [f for f in found if f.severity != "note"] == []
    done = run("verify", captures.elf(name))
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"0 errors, 0 warnings, {len(found)} notes\n")


@pytest.mark.parametrize("rule", CORRUPTIONS)
def test_a_corruption_is_found_under_its_own_id(rule: str) -> None:
    case = CORRUPTIONS[rule]
    edit = case.base()
    case.damage(edit)
    began = time.monotonic()
    found = verify(edit.memory, **case.options)
    assert time.monotonic() - began < LIMIT
    assert rule in ids(found), found
    finding = next(f for f in found if f.id == rule)
    assert finding.place
    assert finding.value
    assert (finding.severity, finding.title) == (RULES[rule].severity, RULES[rule].title)


def test_the_base_of_the_corruptions_has_nothing_wrong() -> None:
    assert verify(capture().memory) == []


def test_every_rule_has_a_corruption() -> None:
    assert sorted({*CORRUPTIONS, "KHO003"}) == sorted(RULES)
    assert list(RULES) == [f"KHO{n:03}" for n in range(1, len(RULES) + 1)]


def test_an_fdt_that_debugfs_cut_short_still_says_abi_and_map() -> None:
    path = captures.DATA / NAME / "host/stage1/sys/kernel/debug/kho/out/fdt"
    (found,) = verify(path)
    assert found.id == "KHO003"
    assert "233 bytes of 405" in found.value
    assert f"kho-v4, map at {captures.expected(NAME)['preserved_memory_map']:#x}" in found.value


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", captures.V1_NAMES)
def test_an_fdt_by_itself_can_be_in_order(name: str, stage: int) -> None:
    assert verify_fdt(captures.debugfs(name, stage, "out/fdt" if stage == 1 else "in/fdt")) == []


def test_what_else_can_be_said_of_a_map_that_cannot_be_read_is_said() -> None:
    edit = capture()
    shared_node(edit)
    root_value(240, 100)(edit)
    found = verify(edit.memory, scratch=[(0xB40_1000, 16 * MIB)])
    assert ids(found) == ["KHO005", "KHO020", "KHO017"]
    assert "a second entry leads to it" in found[0].value
    assert found[0].phys


def test_places_are_listed_up_to_a_number_and_counted_beyond() -> None:
    edit = capture()
    for phys in (0x458000, 0x45A000, 0x45C000, 0x45E000):
        edit.preserve(phys, 0)
    found = [f for f in verify(edit.memory, most=2) if f.id == "KHO012"]
    assert [f.phys for f in found] == [0x458000, 0x45A000]
    assert found[1].value.endswith("(and 2 more places)")


def test_a_clean_handover_that_was_opened_verifies_as_it_is() -> None:
    assert verify(opened()) == []


def test_an_arena_is_checked_with_its_own_nodes() -> None:
    half = 64 * MIB
    arena = kho.Arena([(0, half, 0), (half, half, 1)], scratch="2M,2M,2M")
    out = kho.Outgoing(arena)
    folio = arena.alloc_at(0x40_0000, 2)
    out.preserve_folio(folio)
    out.finalize()
    assert [i for i in ids(verify(arena)) if RULES[i].severity == "error"] == []


# Hostile input


def attempt(source: Path | kho.Memory) -> list[Finding] | kho.KhoError:
    """What verify makes of it, soon: findings, or an error of kho."""
    began = time.monotonic()
    result: list[Finding] | kho.KhoError
    try:
        result = verify(source)
    except kho.KhoError as error:
        result = error
    assert time.monotonic() - began < LIMIT
    return result


def check(result: list[Finding] | kho.KhoError) -> None:
    if isinstance(result, kho.KhoError):
        assert str(result)
    else:
        assert all(f.id in RULES and f.place and f.value for f in result)


@pytest.mark.parametrize("what", sorted([*hostile.REFUSED, *hostile.ODD, *hostile.FILES]))
def test_what_no_kernel_writes_is_a_finding_or_an_error(what: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.elf"
    if what in hostile.FILES:
        path.write_bytes(hostile.FILES[what](hostile.sane().to_bytes()))
        return check(attempt(path))
    path.write_bytes(hostile.damaged({**hostile.REFUSED, **hostile.ODD}[what]))
    check(attempt(path))
    if what in hostile.REFUSED:
        fdt = hostile.sane().lay_out().fdt_phys
        found = verify(path, fdt_phys=fdt)
        assert any(f.severity == "error" for f in found), found
    return None


@given(st.integers(0, 2**64), st.binary(min_size=1, max_size=16))
def test_bytes_changed_anywhere_are_findings_or_errors(where: int, value: bytes) -> None:
    edit = capture()
    phys = list(edit.segments)[where % len(edit.segments)]
    data = edit.segments[phys]
    at = where // len(edit.segments) % max(len(data) - len(value), 1)
    data[at : at + len(value)] = value
    check(attempt(edit.memory))


# The command


def damaged(tmp_path: Path, *rules: str) -> Path:
    """A raw file of the capture's low memory, damaged."""
    edit = capture()
    for rule in rules:
        CORRUPTIONS[rule].damage(edit)
    path = tmp_path / "bad.bin"
    with path.open("wb") as out:
        for phys, data in edit.segments.items():
            out.seek(phys)
            out.write(data)
    return path


def test_errors_make_the_exit_code_one(tmp_path: Path) -> None:
    done = run("verify", f"{damaged(tmp_path, 'KHO012')}@0")
    assert done.code == 1
    assert done.err == ""
    assert "error KHO012: folios overlap" in done.out
    assert "page at 0x458000" in done.out
    assert RULES["KHO012"].advice in done.out


def test_findings_come_as_data(tmp_path: Path) -> None:
    done = run("verify", "--json", f"{damaged(tmp_path, 'KHO024', 'KHO034')}@0")
    assert done.code == 1
    assert done.json["counts"] == {"error": 1, "warning": 0, "note": 1}
    assert [(f["id"], f["severity"]) for f in done.json["findings"]] == [("KHO024", "error"), ("KHO034", "note")]


def test_findings_come_as_sarif(tmp_path: Path) -> None:
    done = run("verify", "--sarif", f"{damaged(tmp_path, 'KHO012')}@0")
    assert done.code == 1
    log = done.json
    assert log["version"] == "2.1.0"
    (only,) = log["runs"]
    rules = only["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(RULES)
    assert all(rule["name"].isalnum() and rule["shortDescription"]["text"] for rule in rules)
    for result in only["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        physical = result["locations"][0]["physicalLocation"]
        assert physical["artifactLocation"]["index"] < len(only["artifacts"])
        assert physical["address"]["absoluteAddress"] >= 0


SARIF = {
    "log": {"$schema", "version", "runs"},
    "runs": {"tool", "artifacts", "results"},
    "tool": {"driver"},
    "driver": {"name", "version", "rules"},
    "rules": {"id", "name", "shortDescription", "fullDescription", "help", "defaultConfiguration"},
    "shortDescription": {"text"},
    "fullDescription": {"text"},
    "help": {"text"},
    "defaultConfiguration": {"level"},
    "artifacts": {"location"},
    "location": {"uri"},
    "results": {"ruleId", "ruleIndex", "level", "message", "locations"},
    "message": {"text"},
    "locations": {"physicalLocation", "logicalLocations"},
    "physicalLocation": {"artifactLocation", "address"},
    "artifactLocation": {"uri", "index"},
    "address": {"absoluteAddress", "kind"},
    "logicalLocations": {"fullyQualifiedName"},
}
"""Of SARIF 2.1.0's objects the properties that are used: its schema allows no others than it knows."""


def check_sarif(name: str, value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            check_sarif(name, item)
    elif isinstance(value, dict):
        assert set(value) <= SARIF[name], name
        for key, item in value.items():
            check_sarif(key, item)
    else:
        kind = int if name in ("index", "ruleIndex", "absoluteAddress") else str
        assert type(value) is kind, name


@pytest.mark.parametrize("rule", ["KHO001", "KHO012", "KHO022", "KHO034"])
def test_sarif_has_only_what_its_schema_knows(rule: str, tmp_path: Path) -> None:
    done = run("verify", "--sarif", f"{damaged(tmp_path, rule)}@0")
    check_sarif("log", done.json)
    assert rule in [result["ruleId"] for result in done.json["runs"][0]["results"]]


def test_a_rule_is_explained() -> None:
    done = run("verify", "--explain", "kho015")
    assert done.code == 0
    assert done.out.startswith("KHO015 (error): folio in scratch\n")
    assert RULES["KHO015"].matters in done.out
    missing = run("verify", "--explain", "KHO999")
    assert missing.code == 2
    assert "no finding KHO999" in missing.err


def test_all_rules_are_listed() -> None:
    done = run("verify", "--list")
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == list(RULES)
    assert [rule["id"] for rule in run("verify", "--list", "--json").json["rules"]] == list(RULES)


def test_the_page_about_findings_is_what_the_rules_say() -> None:
    page = (ROOT / "docs/findings.md").read_text()
    assert page == findings.markdown() == run("verify", "--list", "--markdown").out


def test_without_a_source_or_a_handover_the_exit_code_is_two(tmp_path: Path) -> None:
    assert run("verify").code == 2
    nothing = tmp_path / "nothing.bin"
    nothing.write_bytes(bytes(8192))
    assert run("verify", nothing).code == 2
    assert run("verify", tmp_path / "missing").code == 2


def test_a_finding_of_another_package_without_a_rule_is_a_warning() -> None:
    odd = Finding("ACME001", "widget at 0x1000", "serial 0")
    assert (odd.severity, odd.phys) == ("warning", None)
    assert json.loads(json.dumps(odd.as_dict()))["id"] == "ACME001"
