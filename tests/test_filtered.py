"""Dumps that lack pages, by a filter or by a cut: every answer is that of the whole dump, minus what is not there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kho
from kho.handover.absence import level_names
from kho.handover.owners import HANDLE
from kho.handover.rules import RULES

from captures import NAMES, contents, expected
from command import Done
from command import kho as run
from filtered import FORMS, MARKED, dump, note

ABOUT_THE_FILE = {"KHO040", "KHO041", "KHO042"}
UNMARKED = {"KHO014"}
"""What is said of a file that does not tell what it left out from what is no RAM."""
LEVEL = 31


@cache
def pages_of(name: str) -> dict[int, bytes]:
    """The pages of a capture, by address."""
    size = int(expected(name)["page_size"])
    return {
        phys + at: data[at : at + size].ljust(size, b"\0")
        for phys, data in contents(name)
        for at in range(0, len(data), size)
    }


def machine_of(name: str) -> str:
    return "aarch64" if "aarch64" in name else "x86_64"


def written(name: str, dropped: set[int], form: str, level: int = LEVEL) -> bytes:
    return dump(pages_of(name), dropped, form, level=level, machine=machine_of(name))


@dataclass(frozen=True)
class Whole:
    """What the commands answer for a capture that lacks nothing."""

    inspect: dict[str, Any]
    findings: set[tuple[str, str]]
    code: int
    extracted: dict[str, bytes]
    owners: dict[str, Any]
    map: dict[str, Any]
    compat: dict[str, Done]
    fdt: str
    converted: Path
    path: Path


TARGETS = ("7.3.4", "7.0.5", "6.18.15")
"""Releases that `kho compat` judges."""


def convert(path: Path, target: Path) -> Done:
    """Convert to the newest version: of kho-v1 to v4 the map is written again."""
    return run("convert", path, "--abi", "kho-v4", "-o", target)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("whole")

    @cache
    def of(name: str) -> Whole:
        path = root / name
        path.write_bytes(written(name, set(), "elf"))
        verified = run("verify", "--json", path)
        folder = root / f"{name}.d"
        assert run("extract", path, "--all", folder).code == 0
        converted = root / f"{name}.v4"
        assert convert(path, converted).code == 0
        return Whole(
            run("inspect", "--json", path).json,
            {(found["id"], found["place"]) for found in verified.json["findings"]},
            verified.code,
            files_of(folder),
            run("owners", "--json", path).json,
            run("map", "--json", path).json,
            {target: run("compat", "--json", path, target) for target in TARGETS},
            run("fdt", path).out,
            converted,
            path,
        )

    return of


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def without(found: Any, *, names: tuple[str, ...]) -> Any:
    """JSON without some keys, at every depth."""
    if isinstance(found, dict):
        return {key: without(value, names=names) for key, value in found.items() if key not in names}
    return [without(value, names=names) for value in found] if isinstance(found, list) else found


SCRATCH = ("scratch", "scratch_phys", "scratch_how")
"""Keys that are gone with the page of the array."""


def check_part(part: Any, of: Any, place: str, *, marked: bool) -> None:
    """Check that JSON has the values of the whole, except for what is said not to be in the dump."""
    if isinstance(of, dict) and isinstance(part, dict):
        excused = "error" in part or "absent" in part
        if place == "inspect":
            # A payload is gone if its subtree says why.
            excused = any("error" in row for row in part["subtrees"].values())
        for key in of:
            if key in part:
                check_part(part[key], of[key], f"{place}.{key}", marked=marked)
            else:
                assert excused or key in ("sha256", *SCRATCH), f"{place}.{key} is gone without a word"
        return
    if isinstance(of, list) and isinstance(part, list) and len(of) == len(part):
        for at, (mine, theirs) in enumerate(zip(part, of, strict=True)):
            check_part(mine, theirs, f"{place}[{at}]", marked=marked)
        return
    if place.endswith(".csum_holds") and isinstance(part, str):
        words = ("left out of this dump", "is cut off") if marked else ("not in this memory",)
        assert any(word in part for word in words), part
        return
    if place.endswith((".size", *SCRATCH)) and part is None:
        return
    assert part == of, place


# Keys that tell how a layout was decided, or what the file is.
MANNER = ("page_size_why", "bitmap_bytes_why", "certainty", "pages_outside", "absent", "dump", "kernels", "machine")


def check_commands(done_inspect: Done, path: Path, of: Whole, folder: Path, *, marked: bool, lost: bool) -> None:
    """Check every command's answer against that for the whole capture."""
    if done_inspect.code:
        # The root FDT or a part of the map is gone: each command says so, and answers nothing.
        assert done_inspect.code == 2
        assert not marked or any(word in done_inspect.err for word in ("left out", "cut off")), done_inspect.err
        verified = run("verify", "--json", path)
        if verified.code != 2:
            check_findings(verified, of, marked=marked)
        return
    if not marked and done_inspect.json["certainty"] != "certain":
        return  # which layout it is was decided by what is there, and is said to be no more than likely
    check_part(without(done_inspect.json, names=MANNER), without(of.inspect, names=MANNER), "inspect", marked=marked)
    check_findings(run("verify", "--json", path), of, marked=marked)
    check_extracted(path, of, folder)
    owners = run("owners", "--json", path)
    assert owners.code in (0, 1)
    assert owners.json["preserved_bytes"] == of.owners["preserved_bytes"]
    check_owners(owners.json["rows"], of.owners["rows"])
    mapped = run("map", "--json", path)
    assert mapped.code == 0
    check_map(mapped.json["spans"], of.map["spans"])
    shown = run("fdt", path)
    assert (shown.code, shown.out) == (0, of.fdt)
    check_compat(path, of, lost=lost)
    if marked:
        check_converted(path, of, folder.with_name("converted"))
    compared = run("diff", "--json", of.path, path)
    if marked:
        assert (compared.code, compared.json["different"]) == (0, False), compared.out
        assert ("note: " in compared.err) == lost


def check_extracted(path: Path, of: Whole, folder: Path, *, kinds: tuple[str, ...] = ()) -> None:
    """Check that what comes out is what comes out of the whole, or says which parts of it are not there."""
    extracted = run("extract", path, "--all", folder)
    manifest = json.loads((folder / "manifest.json").read_text())["entries"]
    files = files_of(folder)
    for entry in manifest:
        if entry["path"] is None:
            assert entry["error"]
            continue
        data = files.pop(entry["path"])
        if kinds and entry["kind"] not in kinds:
            continue
        right = of.extracted.get(entry["path"].removesuffix(".partial"))
        if right is None:  # found by its content, as the lists of sessions are not in the dump
            assert entry["kind"] == "memfd"
            assert "missing" in entry or data in of.extracted.values()
            continue
        holes = entry.get("missing", [])
        assert bool(holes) == entry["path"].endswith(".partial")
        assert entry["sha256"] == (None if holes else hashlib.sha256(right).hexdigest())
        for at, nbytes in holes:
            assert not any(data[at : at + nbytes])
            data = data[:at] + right[at : at + nbytes] + data[at + nbytes :]
        assert data == right
    assert not files
    assert extracted.code == int(any(entry["path"] is None or "missing" in entry for entry in manifest))


FOUND = "memfd at "
"""How the owner is named of a memfd that is found by its content."""


def check_owners(part: list[dict[str, Any]], of: list[dict[str, Any]]) -> None:
    """Check that each preserved byte has the owner and the part that it has in the whole, or none."""
    right = iter(of)
    row = next(right)
    for mine in part:
        at, end = mine["phys"], mine["phys"] + mine["nbytes"]
        while at < end:
            while row["phys"] + row["nbytes"] <= at:
                row = next(right)
            assert row["phys"] <= at
            known = mine["owner"] in ("unknown", row["owner"]) or mine["owner"].startswith(FOUND)
            assert known, (hex(at), mine, row)
            if mine["owner"] == row["owner"] and mine["what"] != HANDLE:
                assert mine["what"] == row["what"]
                if mine["offset"] is not None:
                    assert mine["offset"] - mine["phys"] == row["offset"] - row["phys"]
            at = row["phys"] + row["nbytes"]


def check_map(part: list[dict[str, Any]], of: list[dict[str, Any]]) -> None:
    """Check that what the map draws is of the kind and owner that it has in the whole, or of an unknown one."""
    right: dict[tuple[str, str], list[list[int]]] = {}
    for span in of:
        right.setdefault((span["kind"], span["owner"]), []).extend(span["intervals"])
    for span in part:
        if span["kind"] == "unknown" or span["owner"] == "unknown" or span["owner"].startswith(FOUND):
            continue
        there = right.get((span["kind"], span["owner"]), [])
        for start, end in span["intervals"]:
            assert any(first <= start and end <= last for first, last in there), (span, start, end)


def check_compat(path: Path, of: Whole, *, lost: bool) -> None:
    """Check that the verdict of each object is that of the whole, and that what is not judged is named."""
    for target, whole in of.compat.items():
        done = run("compat", "--json", path, target)
        if done.out and whole.out:
            (judged,), (right,) = done.json["targets"], whole.json["targets"]
            theirs = {row["object"]: row for row in right["objects"]}
            for row in judged["objects"]:
                known = theirs.get(row["object"])
                same = known is not None and {**row, "source": None} == {**known, "source": None}
                assert same or (lost and row["verdict"] == "unknown"), (target, row, known)
        assert done.code == whole.code or (lost and done.code in (1, 2)), (target, done.out, done.err)


def check_converted(path: Path, of: Whole, target: Path) -> None:
    """Check that a conversion has the contents that the whole's has, and that no zeros stand for what is not there."""
    done = convert(path, target)
    if done.code:
        assert any(word in done.err for word in ("left out", "cut off")), done.err
        return
    mine, right, source = kho.open(target), kho.open(of.converted), kho.open(of.path)
    size = right.page_size
    assert (mine.compatible, mine.preserved_bytes) == (right.compatible, right.preserved_bytes)
    assert set(mine.subtrees) == set(right.subtrees)
    # The pages that the conversion writes lie where memory is free, which depends on what else is there.
    left_alone = set(map(tuple, source.folios)) & set(map(tuple, right.folios))
    pages = [at for phys, order in sorted(left_alone) for at in range(phys, phys + (size << order), size)]
    pages = [at for at in pages if right.read(at, size) == source.read(at, size)]
    assert pages
    for at in pages:
        try:
            assert mine.read(at, size) == source.read(at, size), hex(at)
        except (kho.LeftOutError, kho.CutOffError):
            assert done.err
    check_extracted(target, of, target.with_name("converted.d"), kinds=("memfd",))


def check_findings(verified: Done, of: Whole, *, marked: bool) -> None:
    found = {(each["id"], each["place"]) for each in verified.json["findings"]}
    about = ABOUT_THE_FILE if marked else ABOUT_THE_FILE | UNMARKED
    new = {each for each in found if each[0] not in about} - of.findings
    if marked:
        assert not new, [each for each in verified.json["findings"] if (each["id"], each["place"]) in new]
        assert verified.code == of.code


def metadata_of(name: str, of: Whole) -> set[int]:
    """Pages without which nothing of a handover can be read: its root FDT and the pages of its map."""
    inc = kho.open(of.path)
    size = inc.page_size
    return {phys // size * size for phys in (*inc.map_pages, inc.fdt_phys)}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), form=st.sampled_from(FORMS), seed=st.integers(0, 1 << 32), with_map=st.booleans())
def test_a_dump_without_some_pages_answers_as_the_whole_minus_what_is_not_there(
    name: str, form: str, seed: int, with_map: bool, whole: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random, of = Random(seed), whole(name)
    root = tmp_path_factory.mktemp("dropped")
    pages = sorted(set(pages_of(name)) - (set() if with_map else metadata_of(name, of)))
    dropped = set(random.sample(pages, random.choice([1, 2, len(pages) // 4, len(pages) * 3 // 4])))
    path = root / "dump"
    path.write_bytes(written(name, dropped, form))
    done = run("inspect", "--json", path)
    check_commands(done, path, of, root / "all", marked=form in MARKED, lost=bool(dropped))
    if form in MARKED and not with_map:
        assert done.code == 0
        size = int(expected(name)["page_size"])
        assert done.json["absent"]["left_out_bytes"] == len(dropped) * size
        assert done.err.count("were left out of this dump") == 1
        if form != "elf":
            assert f"level {LEVEL} = {level_names(LEVEL)}" in done.err


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), form=st.sampled_from(FORMS), share=st.floats(0.05, 1), filtered=st.booleans())
def test_a_dump_that_is_cut_answers_as_the_whole_minus_what_is_not_there(
    name: str, form: str, share: float, filtered: bool, whole: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    of = whole(name)
    root = tmp_path_factory.mktemp("cut")
    path = root / "dump"
    dropped = set(sorted(pages_of(name))[::7]) - metadata_of(name, of) if filtered and form in MARKED else set()
    file = written(name, dropped, form)
    path.write_bytes(file[: int(share * len(file))])
    done = run("inspect", "--json", path)
    if done.code == 2:
        # Where no header is left, the file is a raw image without a handover.
        words = ["not in this memory"] if form == "lime" else []
        words += ("cut off", "ends", "empty", "no handover", "is missing", "left out", "headers", "header")
        assert any(word in done.err for word in words), done.err
        return
    if not dropped:
        assert done.json.get("absent", {"left_out_bytes": 0})["left_out_bytes"] == 0
    marked = form != "lime"
    check_commands(done, path, of, root / "all", marked=marked, lost="absent" in done.json)


@pytest.mark.parametrize("form", ["kdump", "elf", "lime"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_cut_took_is_cut_off_and_not_left_out(name: str, form: str, tmp_path: Path) -> None:
    file, pages, path = written(name, set(), form), pages_of(name), tmp_path / "dump"
    for part in range(4, 20):
        path.write_bytes(file[: len(file) * part // 20])
        try:
            memory = kho.Memory.open(path)
        except kho.SourceError as error:
            assert "cut off" in str(error)  # in the bitmaps, without which no page has a place
            continue
        assert {why for _, _, why in memory.absent} == {"cut off"} or form == "lime"
        for phys, page in pages.items():
            try:
                assert memory.read(phys, len(page)) == page
            except kho.CutOffError:
                assert memory.truncated
            except kho.OutsideMemoryError:
                assert form == "lime"


def kdump_of(name: str, dropped: set[int], tmp_path: Path) -> Path:
    path = tmp_path / "vmcore"
    path.write_bytes(written(name, dropped, "kdump"))
    return path


NAME = "linux-7.3.4-x86_64"


def test_every_command_says_once_what_was_left_out(tmp_path: Path, whole: Any) -> None:
    inc = kho.open(whole(NAME).path)
    session = inc.luo.all_sessions[0]
    file = session.files.decode(session.entries[0])
    assert isinstance(file, kho.formats.MemfdFile)
    dropped = {folio.phys for folio in file.folios}
    path = kdump_of(NAME, dropped, tmp_path)
    text = f"{len(dropped)} page"
    said = f"were left out of this dump: level 31 = {level_names(31)}"
    target = tmp_path / "converted.elf"
    for command in (
        ("inspect", path),
        ("verify", path),
        ("owners", path),
        ("map", path),
        ("extract", path, "--all", tmp_path / "all"),
        ("convert", path, "--abi", inc.compatible, "-o", target),
    ):
        done = run(*command)
        assert (done.out + done.err).count(said) == 1, command
        assert text in done.out + done.err
        assert "makedumpfile -d 17" in done.out + done.err
        assert done.code == int(command[0] == "extract"), command
    assert "(left out)" in run("owners", path).out
    assert "not in the dump" in run("inspect", path).out
    token = f"{session.entries[0].token:#x}"
    alone = run("extract", path, "--session", session.name, "--token", token, "-o", tmp_path / "file")
    assert (alone.code, (tmp_path / "file").exists()) == (1, False)
    assert "left out of this dump (level 31" in alone.err
    # What a conversion could not copy is not zeros in its result.
    again = kho.open(target)
    with pytest.raises(kho.LeftOutError, match="level 31"):
        again.read(next(iter(dropped)), 1)
    assert again.dump_level == 31


def test_a_file_that_is_partly_there_is_written_without_a_sum(tmp_path: Path, whole: Any) -> None:
    inc = kho.open(whole(NAME).path)
    session = inc.luo.all_sessions[0]
    entry = max(session.entries, key=lambda entry: session.files.decode(entry).describe().get("folios", 0))
    file = session.files.decode(entry)
    assert isinstance(file, kho.formats.MemfdFile)
    folio = file.folios[1]
    path = kdump_of(NAME, {folio.phys}, tmp_path)
    target = tmp_path / "file"
    done = run("extract", path, "--session", session.name, "--token", f"{entry.token:#x}", "-o", target, "--json")
    assert (done.code, target.exists()) == (1, False)
    assert done.json["sha256"] is None
    size = inc.page_size << folio.order
    [[at, nbytes]] = done.json["missing"]
    assert (at, nbytes) == (folio.index * inc.page_size, min(size, inc.page_size))
    assert (tmp_path / "file.partial").read_bytes() == file.read()[:at] + bytes(nbytes) + file.read()[at + nbytes :]


def test_the_rule_of_a_cut_names_file_and_amount(tmp_path: Path, whole: Any) -> None:
    path = tmp_path / "cut"
    file = written(NAME, set(), "elf")
    path.write_bytes(file[:-8192])
    done = run("verify", path)
    assert f"warning KHO041: {RULES['KHO041'].title}" in done.out
    assert f"{path}: the file ends before what its headers promise: it is cut off, and 2 pages, 8.0 KiB" in done.out
    assert done.code == 0
    assert run("inspect", path).err.startswith(f"note: {path}: the file ends before what its headers promise")


def test_second_pages_alone_are_makedumpfiles_fault_on_linux_7_1(tmp_path: Path, whole: Any) -> None:
    inc = kho.open(whole(NAME).path)
    heads = [phys for phys, order in map(tuple, inc.folios) if order > 0]
    assert heads
    dropped = {phys + inc.page_size for phys in heads}
    path = tmp_path / "vmcore"
    for release, said in (("7.3.4", True), ("7.1.0-rc1", True), ("7.0.12", False), ("6.19.1", False)):
        notes = note(b"VMCOREINFO", 0, f"OSRELEASE={release}\nCRASHTIME=1764518400\n".encode())
        path.write_bytes(dump(pages_of(NAME), dropped, "elf", notes=notes))
        done = run("verify", path)
        assert ("KHO042" in done.out) == said, release
        assert (done.code, "KHO040" in done.out) == (0, True)
        shown = run("inspect", path).out
        assert f"Linux {release}" in shown
        assert "crashed 2025-11-30 16:00:00 UTC" in shown


def test_a_page_size_in_vmcoreinfo_decides(tmp_path: Path) -> None:
    name = "linux-7.3.4-aarch64-64k"
    path = tmp_path / "vmcore"
    notes = note(b"VMCOREINFO", 0, b"PAGESIZE=65536\n")
    path.write_bytes(dump(pages_of(name), set(), "elf", machine="aarch64", notes=notes))
    inc = kho.open(path)
    assert (inc.page_size, inc.page_size_why) == (65536, "VMCOREINFO names it")


def test_pages_of_zeros_alone_are_zeros_at_level_1(tmp_path: Path, whole: Any) -> None:
    zeros = {phys for phys, page in pages_of(NAME).items() if not any(page)}
    path = tmp_path / "vmcore"
    path.write_bytes(written(NAME, zeros, "kdump", level=1))
    assert not kho.open(path).absent()
    done = run("diff", whole(NAME).path, path)
    assert (done.code, done.out, done.err) == (0, "", "")
