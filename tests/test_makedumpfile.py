"""makedumpfile filters a dump: each file that it writes gives what is left of the handover, and names the rest."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import kho
from kho.formats import MemfdFile
from kho.handover.absence import level_names

from captures import contents, elf
from command import kho as run
from filtered import RELEASE, kernel_dump

TOOL = shutil.which("makedumpfile")
if TOOL is None and "makedumpfile" in os.environ.get("KHO_TEST_TOOLS", "").split():
    raise RuntimeError("makedumpfile is not installed: apt-get install makedumpfile")
pytestmark = pytest.mark.skipif(TOOL is None, reason="makedumpfile is not installed: apt-get install makedumpfile")
NAMES = ["linux-7.3.4-x86_64", "linux-7.1.13-x86_64", "linux-6.18.15-x86_64"]
LEVELS = {1: set[str](), 17: {"free"}, 31: {"free", "cache", "user"}}


def pages_of(name: str) -> dict[int, bytes]:
    return {phys + at: data[at : at + 4096] for phys, data in contents(name) for at in range(0, len(data), 4096)}


def kinds_of(name: str) -> dict[int, str]:
    """Kinds as a kernel has them before the kexec: memfds are in the page cache, half of them here a user's."""
    inc = kho.open(elf(name))
    kinds = {}
    for payload in inc.payloads.values():
        if not isinstance(payload, kho.formats.Luo):
            continue
        files = [session.files.decode(entry) for session in payload.all_sessions for entry in session.entries]
        for at, file in enumerate(file for file in files if isinstance(file, MemfdFile)):
            for folio in file.folios:
                for phys in range(folio.phys, folio.phys + (4096 << folio.order), 4096):
                    kinds[phys] = "user" if at % 2 else "cache"
    preserved = {pfn + at for pfn, n in inc.tracker().extents() for at in range(n)}
    kept = {phys // 4096 for phys in (*inc.map_pages, inc.fdt_phys, inc.scratch_phys or 0)}
    free = [phys for phys in pages_of(name) if phys // 4096 not in preserved | kept]
    return kinds | dict.fromkeys(free, "free")


def filtered(tmp_path: Path, core: Path, *options: str) -> Path:
    assert TOOL is not None
    target = tmp_path / f"vmcore{''.join(options)}"
    done = subprocess.run([TOOL, *options, str(core), str(target)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize("name", NAMES)
def test_what_makedumpfile_leaves_is_read_and_the_rest_is_named(name: str, tmp_path: Path) -> None:
    core = tmp_path / "core"
    kinds = kinds_of(name)
    core.write_bytes(kernel_dump(pages_of(name), kinds))
    whole = kho.Memory.open(core)
    inspected = run("inspect", "--json", core)
    assert inspected.code == 0
    assert not whole.absent
    for level, dropped in LEVELS.items():
        for form in (("-c",), ("-l",), (), ("-E",)):
            path = filtered(tmp_path, core, *form, "-d", str(level))
            elf_form = form == ("-E",)
            memory = kho.Memory.open(path)
            gone = {phys for start, n, _ in memory.absent for phys in range(start, start + n, 4096)}
            assert memory.ranges == whole.ranges
            assert {why for _, _, why in memory.absent} <= {"left out"}
            assert memory.dump_level == (None if elf_form else level)
            for phys in range(0, whole.ranges[-1][0], 4096):
                if phys in gone or not any(start <= phys < start + n for start, n in whole.ranges):
                    continue
                assert memory.read(phys, 4096) == whole.read(phys, 4096), hex(phys)
            # What is in the file of the kinds that were to be dropped, and what is not though it was not: zeros alone.
            wanted = {phys for phys, kind in kinds.items() if kind in dropped}
            if not elf_form:  # -E keeps stretches of fewer than 256 pages
                assert wanted <= gone
            assert all(not any(whole.read(phys, 4096)) for phys in gone - wanted)
            if level == 1 and not elf_form:
                assert not gone
            shown = run("inspect", path)
            assert (shown.code, f"Linux {RELEASE}" in shown.out) == (0, True)
            verified = run("verify", path)
            assert verified.code == 0, verified.out
            assert ("KHO040" in verified.out) == bool(gone)
            if gone and not elf_form:
                assert f"left out of this dump: level {level} = {level_names(level)}" in shown.err


def test_parts_of_a_split_dump_are_read_together_and_one_without_pages_is_valid(tmp_path: Path) -> None:
    assert TOOL is not None
    name = NAMES[0]
    core = tmp_path / "core"
    core.write_bytes(kernel_dump(pages_of(name), kinds_of(name)))
    parts = [tmp_path / f"part{n}" for n in range(3)]
    command = [TOOL, "-c", "-d", "17", "--split", str(core), *map(str, parts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    whole, together = run("inspect", "--json", core), run("inspect", "--json", *parts)
    assert together.code == 0, together.err
    keys = ("fdt_phys", "nr_folios", "subtrees", "luo")
    assert {key: together.json.get(key) for key in keys} == {key: whole.json.get(key) for key in keys}
    for part in parts:
        kho.Memory.open(part)


def test_the_contents_that_level_31_drops_are_not_extracted_as_zeros(tmp_path: Path) -> None:
    name = NAMES[0]
    core = tmp_path / "core"
    core.write_bytes(kernel_dump(pages_of(name), kinds_of(name)))
    whole = run("extract", core, "--all", tmp_path / "whole")
    assert whole.code == 0
    for options in (("-c", "-d", "31"), ("-E", "-d", "31")):
        path = filtered(tmp_path, core, *options)
        folder = tmp_path / f"all{options[0]}"
        assert run("extract", path, "--all", folder).code == int(
            options[0] == "-c" or bool(kho.Memory.open(path).absent)
        )
        for file in folder.rglob("*"):
            if file.is_file() and file.name != "manifest.json" and file.suffix != ".partial":
                same = tmp_path / "whole" / file.relative_to(folder)
                digests = {hashlib.sha256(each.read_bytes()).hexdigest() for each in (file, same)}
                assert len(digests) == 1, file
