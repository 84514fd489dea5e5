"""Dumps that lack pages, by a filter or by a cut: every answer is that of the whole dump, minus what is not there."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kho
from kho.handover import html
from kho.handover.absence import level_names
from kho.handover.rules import RULES

from answers import Whole, answers, check_commands
from captures import NAMES, contents, expected
from command import kho as run
from filtered import FORMS, MARKED, dump, note

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("whole")

    @cache
    def of(name: str) -> Whole:
        path = root / name
        path.write_bytes(written(name, set(), "elf"))
        return answers(path, root / f"{name}.d")

    return of


def map_of(of: Whole) -> set[int]:
    """The pages of the map."""
    inc = kho.open(of.path)
    return {phys // inc.page_size * inc.page_size for phys in inc.map_pages}


def root_of(of: Whole) -> int:
    """The page of the root FDT, without which nothing of a handover can be read."""
    inc = kho.open(of.path)
    return inc.fdt_phys // inc.page_size * inc.page_size


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), form=st.sampled_from(FORMS), seed=st.integers(0, 1 << 32), with_map=st.booleans())
def test_a_dump_without_some_pages_answers_as_the_whole_minus_what_is_not_there(
    name: str, form: str, seed: int, with_map: bool, whole: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random, of = Random(seed), whole(name)
    root = tmp_path_factory.mktemp("dropped")
    pages = sorted(set(pages_of(name)) - (set() if with_map else {*map_of(of), root_of(of)}))
    dropped = set(random.sample(pages, random.choice([1, 2, len(pages) // 4, len(pages) * 3 // 4])))
    path = root / "dump"
    path.write_bytes(written(name, dropped, form))
    done = run("inspect", "--json", path)
    rootless = root_of(of) in dropped
    check_commands(done, path, of, root / "all", marked=form in MARKED, lost=bool(dropped), rootless=rootless)
    if form in MARKED and not with_map:
        assert done.code == 0
        size = int(expected(name)["page_size"])
        assert done.json["absent"]["left_out_bytes"] == len(dropped) * size
        assert done.err.count("were left out of this dump") == 1
        if form != "elf":
            assert f"level {LEVEL} = {level_names(LEVEL)}" in done.err


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), form=st.sampled_from(MARKED), seed=st.integers(0, 1 << 32), share=st.floats(0, 1))
def test_a_dump_without_pages_of_the_map_gives_what_the_root_fdt_leads_to(
    name: str, form: str, seed: int, share: float, whole: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_without_map(whole(name), name, form, seed, share, tmp_path_factory.mktemp("mapless"))


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("name", NAMES)
def test_a_dump_without_the_whole_map_gives_what_the_root_fdt_leads_to(
    name: str, form: str, whole: Any, tmp_path: Path
) -> None:
    check_without_map(whole(name), name, form, 1, 1, tmp_path)


def check_without_map(of: Whole, name: str, form: str, seed: int, share: float, root: Path) -> None:
    """Drop a share of the pages of the map, at least its first one or another."""
    pages = sorted(map_of(of))
    dropped = set(Random(seed).sample(pages, max(1, int(share * len(pages)))))
    path = root / "dump"
    path.write_bytes(written(name, dropped, form))
    done = run("inspect", "--json", path)
    assert done.code == 0, done.err
    assert done.json["map_lost"]["phys"] in dropped
    check_commands(done, path, of, root / "all", marked=True, lost=True)
    alone = run("inspect", "--json", path, "--fdt-phys", f"{done.json['fdt_phys']:#x}")
    assert (alone.code, alone.json["map_lost"]) == (0, done.json["map_lost"])
    converted = run("convert", path, "--abi", "kho-v4", "-o", root / "converted")
    assert (converted.code, "was left out of this dump" in converted.err) == (2, True)
    verified = run("verify", "--json", path)
    assert [found["id"] for found in verified.json["findings"]].count("KHO058") == 1
    inc = kho.open(path)
    assert "folios not known" in html.incoming(inc)
    assert "folios not known" in repr(inc)


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), form=st.sampled_from(FORMS), share=st.floats(0.05, 1), filtered=st.booleans())
def test_a_dump_that_is_cut_answers_as_the_whole_minus_what_is_not_there(
    name: str, form: str, share: float, filtered: bool, whole: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    of = whole(name)
    root = tmp_path_factory.mktemp("cut")
    path = root / "dump"
    kept = {*map_of(of), root_of(of)}
    dropped = set(sorted(pages_of(name))[::7]) - kept if filtered and form in MARKED else set()
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
