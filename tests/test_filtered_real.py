"""Real kernels' memory, whole and as makedumpfile left it: each answer is that of the whole, minus what is gone."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

import kho
from kho.handover.owners import unlisted

from answers import Whole, answers, check_commands
from command import kho as run

DATA = Path(__file__).parent / "data" / "filtered"
TRUTH: dict[str, dict[str, Any]] = json.loads((DATA / "truth.json").read_text())
NAMES = sorted(TRUTH)
KEPT = sorted(path.name.removesuffix(".xz") for path in DATA.glob("*.d31.*.xz"))
"""What makedumpfile 1.7.8 made of the dumps."""
PAGE = 4096
TOOL = shutil.which("makedumpfile")
tool = pytest.mark.skipif(TOOL is None, reason="makedumpfile is not installed: apt-get install makedumpfile")
LOST = ["linux-7.1.13-before"]
"""Whose map makedumpfile up to 1.7.9 breaks at level 8 and above."""

Of = Callable[[str], Whole]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Of:
    root = tmp_path_factory.mktemp("whole")

    @cache
    def of(name: str) -> Whole:
        return answers(unpacked(f"{name}.elf", root), root / f"{name}.d")

    return of


def unpacked(name: str, folder: Path) -> Path:
    """A file of `DATA`; pages of zeros become holes of the file."""
    path = folder / name
    data = lzma.decompress((DATA / f"{name}.xz").read_bytes())
    with path.open("wb") as out:
        for at in range(0, len(data), 1 << 16):
            if any(part := data[at : at + (1 << 16)]):
                out.seek(at)
                out.write(part)
        out.truncate(len(data))
    return path


def filtered(core: Path, target: Path, *options: str) -> Path:
    assert TOOL is not None
    done = subprocess.run([TOOL, *options, str(core), str(target)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def compressions() -> list[str]:
    """The options of the compressions that this makedumpfile was built with, and for none."""
    assert TOOL is not None
    said = subprocess.run([TOOL, "-v"], capture_output=True, text=True, timeout=60, check=False).stdout.split()
    built = [
        option
        for name, option in (("lzo", "-l"), ("snappy", "-p"), ("zstd", "-z"))
        if f"{name} enabled" in " ".join(said)
    ]
    return ["", "-c", *built]


def check_memory(core: Path, *sources: Path, level: int, cut: bool = False) -> None:
    """Check that each page is that of the core, or is not there for a reason that the filter has."""
    right, mine = kho.Memory.open(core), kho.Memory.open(*sources)
    assert mine.ranges == right.ranges
    gone = {phys: why for start, n, why in mine.absent for phys in range(start // PAGE * PAGE, start + n, PAGE)}
    assert set(gone.values()) <= ({"left out", "cut off"} if cut else {"left out"})
    if level == 1 and not cut:
        assert not gone or mine.dump_level is None  # an ELF core does not tell that it is zeros
    for start, nbytes in right.ranges:
        for phys in range(start, start + nbytes, PAGE):
            if phys not in gone:
                assert mine.read(phys, PAGE) == right.read(phys, PAGE), hex(phys)
            elif level == 1 and gone[phys] == "left out":
                assert not any(right.read(phys, PAGE)), hex(phys)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_dump_has_what_its_guest_said(name: str, whole: Of) -> None:
    of, truth = whole(name), TRUTH[name]
    inc = kho.open(of.path)
    assert (inc.compatible, inc.vmcoreinfo("OSRELEASE")) == (truth["compatible"], truth["release"])
    assert [list(area) for area in inc.scratch or []] == truth["scratch"]
    assert set(inc.subtrees) == set(truth["subtrees"])
    found = sorted(unlisted(inc), key=lambda file: file.size)
    assert [(file.size, hashlib.sha256(file.read()).hexdigest()) for file in found] == [
        (file["size"], file["sha256"]) for file in truth["memfds"]
    ]
    assert of.code == 0
    assert "map_lost" not in of.inspect


@pytest.mark.parametrize("kept", KEPT)
def test_what_makedumpfile_1_7_8_left_is_answered_as_the_whole_minus_that(kept: str, whole: Of, tmp_path: Path) -> None:
    name = kept.split(".d31.", maxsplit=1)[0]
    path = unpacked(kept, tmp_path)
    check_memory(whole(name).path, path, level=31)
    check_answers(name, path, whole, tmp_path)


def check_answers(name: str, path: Path, whole: Of, folder: Path) -> None:
    done = run("inspect", "--json", path)
    assert done.code == 0, done.err
    lost = bool(kho.Memory.open(path).absent)
    check_commands(done, path, whole(name), folder / "all", marked=True, lost=lost)
    inc, truth = kho.open(path), TRUTH[name]
    assert [list(area) for area in inc.scratch or []] == truth["scratch"]
    found = sorted(unlisted(inc), key=lambda file: file.size)
    assert [file.size for file in found] == [file["size"] for file in truth["memfds"]]
    if "after" in name:  # what waits is kept, with its contents
        assert [hashlib.sha256(file.read()).hexdigest() for file in found] == [f["sha256"] for f in truth["memfds"]]
    elif inc.dump_level == 31:
        with pytest.raises(kho.LeftOutError):
            found[-1].read()


def test_a_map_that_makedumpfile_broke_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = unpacked("linux-7.1.13-before.d31.zstd", tmp_path)
    inc = kho.open(path)
    assert inc.map_lost == (inc.preserved_memory_map, "left out")
    shown = run("inspect", path)
    assert "makedumpfile up to 1.7.9 dropped it" in shown.err
    assert "Memfds in no session: 3" in shown.out
    assert "KHO058" in run("verify", path).out


@tool
@pytest.mark.parametrize("name", NAMES)
def test_every_level_and_compression_gives_the_pages_of_the_whole(name: str, whole: Of, tmp_path: Path) -> None:
    core = whole(name).path
    for level in (1, 17, 31):
        for n, form in enumerate([*compressions(), "-E"]):
            path = filtered(core, tmp_path / f"{level}-{n}", *filter(None, [form]), "-d", str(level))
            check_memory(core, path, level=level)
            inc = kho.open(path)
            assert (inc.map_lost is not None) <= (name in LOST and level == 31)
            path.unlink()


@tool
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [("-c", "-d", "31"), ("-l", "-d", "17")], ids=" ".join)
def test_the_installed_makedumpfile_leaves_what_is_answered_as_the_whole_minus_that(
    name: str, options: tuple[str, ...], whole: Of, tmp_path: Path
) -> None:
    check_answers(name, filtered(whole(name).path, tmp_path / "vmcore", *options), whole, tmp_path)


@tool
@pytest.mark.parametrize("level", [1, 17, 31])
@pytest.mark.parametrize("name", NAMES)
def test_a_split_dump_is_read_as_one_memory(name: str, level: int, whole: Of, tmp_path: Path) -> None:
    assert TOOL is not None
    core, parts = whole(name).path, [tmp_path / f"part{n}" for n in range(3)]
    command = [TOOL, "-l", "-d", str(level), "--split", str(core), *map(str, parts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check_memory(core, *parts, level=level)
    alone = run("inspect", "--json", filtered(core, tmp_path / "alone", "-l", "-d", str(level)))
    together = run("inspect", "--json", *parts)
    assert (together.code, without_dump(together.json)) == (0, without_dump(alone.json))
    for part in parts:
        # Each says of itself what it lacks; one without the root FDT names what is not there.
        one = run("inspect", part)
        assert one.code == 0 or any(why in one.err for why in ("left out", "name all of its parts")), one.err


def without_dump(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in ("absent", "dump")}


@pytest.mark.parametrize("kept", KEPT)
def test_a_cut_anywhere_gives_pages_of_the_whole_and_says_that_it_is_cut(kept: str, whole: Of, tmp_path: Path) -> None:
    name = kept.split(".d31.", maxsplit=1)[0]
    of, random = whole(name), Random(kept)
    data = unpacked(kept, tmp_path).read_bytes()
    for n in range(6):
        (folder := tmp_path / str(n)).mkdir()
        path, end = folder / "cut", random.randrange(1, len(data))
        path.write_bytes(data[:end])
        done = run("inspect", "--json", path)
        if done.code == 2:
            assert any(word in done.err for word in ("cut off", "ends", "left out", "is missing")), (end, done.err)
            continue
        check_memory(of.path, path, level=31, cut=True)
        assert "it is cut off" in done.err
        if done.json["fdt_phys"] != of.inspect["fdt_phys"]:  # cut off, and an earlier handover is read
            assert done.json["fdt_phys"] in of.inspect["other_fdts"]
            assert "map_lost" in done.json
            continue
        check_commands(done, path, of, folder / "all", marked=True, lost=True)
