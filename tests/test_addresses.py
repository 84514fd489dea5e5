"""A raw image is read at the address where its handover is complete; without a unique address it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

import kho
from kho import errors

import captures
import dumpfiles
from command import kho as run
from images import EM_AARCH64, GIB, MIB, TIB, Image, sample_subtrees


def answer(*args: object) -> tuple[int, dict[str, Any] | None, str | None]:
    """Exit code, report, and the argument that was used; no report with exit code 2."""
    done = run("inspect", "--json", *args)
    if done.code:
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("kho: ")
        return done.code, None, None
    report = done.json
    placement = report.pop("placement", None)
    assert (placement is not None) == done.err.startswith("note: ")
    return 0, report, None if placement is None else placement["argument"]


def end_of(memory: list[tuple[int, bytes]]) -> int:
    return max(phys + len(data) for phys, data in memory)


@pytest.mark.parametrize("name", captures.NAMES)
def test_a_wrong_or_missing_address_is_corrected(name: str, tmp_path: Path) -> None:
    memory = captures.contents(name)
    random, end = Random(name), end_of(memory)
    step = 1 << 16 if name.endswith("64k") else 1 << 12
    first = memory[0][0] // step
    for base in (0, random.randrange(first) * step, random.randrange(first) * step, first * step):
        raw = dumpfiles.raw(tmp_path / "ram.bin", memory, [(base, end - base)])
        code, right, argument = answer(f"{raw}@{base:#x}")
        assert (code, argument) == (0, None)
        assert right is not None
        assert right["folios"] == captures.expected(name)["folios"]
        for wrong in ("", "@0", "@0x40000000", "@0x80000000", f"@{base + 0x1000:#x}", ",machine=q35", "@1T"):
            code, found, argument = answer(f"{raw}{wrong}")
            # With data above 4 GiB, a machine with a hole below 4 GiB may fit as well.
            assert (code, found) == (0, right) or (code == 2 and end > 4 * GIB and "machine" in wrong), wrong
            assert argument in (None, f"{raw}@{base:#x}")
        assert run("verify", f"{raw}@3M").out == run("verify", f"{raw}@{base:#x}").out
        for command in ("owners", "map", "fdt"):
            moved, there = run(command, f"{raw}@3M"), run(command, f"{raw}@{base:#x}")
            assert (moved.code, moved.out.replace("@3M", f"@{base:#x}")) == (0, there.out)
            assert moved.err.startswith(f"note: {raw}@{3 * MIB:#x} is read as {raw}@{base:#x} (")


@pytest.mark.parametrize("name", captures.NAMES)
def test_bytes_before_the_memory_in_a_file_are_skipped(name: str, tmp_path: Path) -> None:
    memory = captures.contents(name)
    end, before = end_of(memory), 8 * MIB
    raw = dumpfiles.raw(tmp_path / "ram.bin", dumpfiles.moved(memory, before), [(0, end + before)])
    code, found, argument = answer(raw)
    assert (code, argument) == (0, f"{raw}@0x0,offset={before:#x}")
    assert found == answer(argument)[1]
    assert found is not None
    assert found["folios"] == captures.expected(name)["folios"]


@pytest.mark.parametrize("name", captures.NAMES)
def test_an_image_that_does_not_begin_at_a_page_boundary_is_read(name: str, tmp_path: Path) -> None:
    """LiME's format=raw: the range below 640 KiB ends inside a page and is followed by memory from 1 MiB on."""
    memory = captures.contents(name)
    raw = dumpfiles.raw(tmp_path / "ram.bin", memory, [(0x1000, 0x9EC00), (0x100000, end_of(memory) - 0x100000)])
    code, found, argument = answer(raw)
    assert (code, argument) == (0, f"{raw}@0x61400")
    assert found is not None
    assert found["folios"] == captures.expected(name)["folios"]


@pytest.mark.parametrize("name", captures.NAMES)
def test_a_truncated_image_never_gives_another_report(name: str, tmp_path: Path) -> None:
    memory = captures.contents(name)
    random, end = Random(name), end_of(memory)
    base = memory[0][0] & ~0xFFFF
    for _ in range(12):
        size = random.randrange(1, (end - base) >> 12) << 12
        raw = dumpfiles.raw(tmp_path / "ram.bin", memory, [(base, end - base)], size=size)
        right = run("inspect", "--json", f"{raw}@{base:#x}")
        for wrong in ("", "@0", "@0x1000000"):
            code, found, _ = answer(f"{raw}{wrong}")
            assert code == 2 or found == right.json


def high(*, low: list[int], up: list[int], start: int, metadata: int, machine: int = 62, abi: str = "kho-v4") -> Image:
    """A handover with non-zero data below and above a hole."""
    folios = [(phys, 0) for phys in low + [start + phys for phys in up]]
    return Image(
        folios=folios,
        ram=[(0, 2 * TIB)],
        compatible=abi,
        subtrees=sample_subtrees(),
        contents={phys: Random(phys).randbytes(4096) for phys, _ in folios},
        metadata_phys=metadata,
        machine=machine,
    )


LAYOUTS: dict[str, tuple[int, int]] = {
    "q35": (2 * GIB, 4 * GIB),
    "pc": (3 * GIB, 4 * GIB),
    "microvm": (0xE000_0000, 4 * GIB),
    "firecracker": (0xD000_0000, 4 * GIB),
    "cloud-hypervisor": (0xC000_0000, 4 * GIB),
    "AMD, 1 TiB": (2 * GIB, TIB),
    "VMware": (0xC000_0000, 4 * GIB),
    "max-ram-below-4g": (0xB800_0000, 4 * GIB),
}


@pytest.mark.parametrize("abi", ["kho-v1", "kho-v4"])
@pytest.mark.parametrize("metadata", ["below", "above"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_omitted_hole_is_found_or_refused(layout: str, metadata: str, abi: str, tmp_path: Path) -> None:
    low_end, start = LAYOUTS[layout]
    where = 64 * MIB if metadata == "below" else start + 64 * MIB
    image = high(low=[32 * MIB, low_end - 4096], up=[0, 100 * MIB, GIB], start=start, metadata=where, abi=abi).lay_out()
    runs: list[dumpfiles.Run] = [(0, low_end), (start, 5 * GIB - low_end)]
    pages = [(phys, bytes(page)) for phys, page in image.pages.items()]
    raw = dumpfiles.raw(tmp_path / "ram.bin", pages, runs)
    hole = f"{raw}@0x0,hole={low_end:#x}:{start:#x}"
    code, right, argument = answer(hole)
    assert (code, argument) == (0, None)
    assert right is not None
    assert right["folios"] == [list(folio) for folio in image.folios]
    assert right["pages_outside"] == 0
    solved = 0
    # A given machine or hole is accepted if the map fits it; with a map above the hole, only the right one fits.
    misnamed = (",machine=pc", "@0,hole=0x90000000:0x100000000") if metadata == "above" else ()
    for wrong in ("", "@0", "@0x40000000", ",machine=virt", *misnamed):
        code, found, argument = answer(f"{raw}{wrong}")
        assert code == 2 or found == right, wrong
        solved += code == 0
        inc = kho.open(argument or f"{raw}{wrong}") if code == 0 else None
        if inc is not None:
            for phys in (32 * MIB, low_end - 4096, start, start + 100 * MIB, start + GIB):
                assert inc.read(phys, 4096) == Random(phys).randbytes(4096), wrong
    if metadata == "above":
        assert solved
    elif layout != "max-ram-below-4g":
        assert solved or hole in run("inspect", raw).err
    machine = layout.partition(",")[0]
    if machine in ("q35", "pc", "microvm", "firecracker", "cloud-hypervisor") and start == 4 * GIB:
        assert answer(f"{raw},machine={machine}")[:2] == (0, right)


def test_a_padded_image_is_read_at_0(tmp_path: Path) -> None:
    """LiME's format=padded, and dd of /dev/mem: holes are in the file as zeros."""
    image = high(low=[32 * MIB], up=[0, 8 * MIB], start=4 * GIB, metadata=64 * MIB).lay_out()
    pages = [(phys, bytes(page)) for phys, page in image.pages.items()]
    raw = dumpfiles.raw(tmp_path / "ram.bin", pages, [(0, 6 * GIB)])
    for named in (raw, f"{raw}@0"):
        code, found, argument = answer(named)
        assert (code, argument) == (0, None)
        assert found is not None
        assert found["folios"] == [list(folio) for folio in image.folios]


def test_an_ambiguous_address_is_refused_with_all_candidates(tmp_path: Path) -> None:
    """No page of the file is blank, so holes of 1 GiB and 2 GiB cannot be distinguished."""
    image = high(low=[32 * MIB], up=[GIB], start=4 * GIB, metadata=64 * MIB).lay_out()
    pages = [(phys, bytes(page)) for phys, page in image.pages.items()]
    filler = [(place, b"RAM" * 1000) for place in range(2 * GIB, 6 * GIB, 256 * MIB)]
    raw = dumpfiles.raw(tmp_path / "ram.bin", [*filler, *pages], [(0, 2 * GIB), (4 * GIB, 4 * GIB)])
    with raw.open("r+b") as file:
        for place, data in filler:
            file.seek(place)
            if not any(file.read(16)):
                file.seek(place)
                file.write(data)
    done = run("inspect", raw)
    assert (done.code, done.out) == (2, "")
    assert "several addresses fit" in done.err
    assert f"{raw}@0x0,hole=0x80000000:0x100000000" in done.err
    assert answer(f"{raw}@0,check=no")[0] == 0
    assert answer(f"{raw}@0x0,hole=0x80000000:0x100000000")[0] == 0


def test_check_no_forces_the_given_address(tmp_path: Path) -> None:
    name = "linux-7.3.4-x86_64"
    memory = captures.contents(name)
    raw = dumpfiles.raw(tmp_path / "ram.bin", dumpfiles.moved(memory, MIB), [(0, end_of(memory) + MIB)])
    inc = kho.open(f"{raw}@0,check=no")
    assert (inc.address, inc.placement, inc.nr_folios) == ("named", None, 0)
    solved = kho.open(raw)
    assert (solved.address, solved.nr_folios) == ("solved", captures.expected(name)["nr_folios"])
    assert solved.placement is not None
    assert solved.placement.as_is == f"{raw}@0x0,check=no"
    assert kho.open(solved.placement.argument).address == "named"
    assert kho.open(captures.elf(name)).address == "own"
    assert kho.open(f"{raw},machine=q35,check=no").nr_folios == 0


def test_without_a_fitting_address_the_error_names_reason_and_remedy(tmp_path: Path) -> None:
    memory = captures.contents("linux-7.3.4-x86_64")
    fdt = captures.expected("linux-7.3.4-x86_64")["fdt_phys"]
    only = [(phys, data) for phys, data in memory if phys <= fdt < phys + len(data)]
    raw = dumpfiles.raw(tmp_path / "ram.bin", [(phys - MIB, data) for phys, data in only], [(0, 16 * MIB)])
    for command in ("inspect", "verify", "owners", "map", "fdt"):
        done = run(command, raw)
        assert (done.code, done.out) == (2, ""), command
        assert "does not begin there" in done.err
        assert f"{raw}@0x0,check=no" in done.err
        assert "KHO021" not in done.err


def test_an_incomplete_image_with_its_address_is_read_with_a_warning(tmp_path: Path) -> None:
    image = Image(folios=[(0x20_0000, 0), (0x100_0000, 9)], ram=[(0, 32 * MIB)], subtrees=sample_subtrees())
    raw = tmp_path / "low.bin"
    raw.write_bytes(image.lay_out().to_raw(0, 16 * MIB))
    done = run("inspect", f"{raw}@0")
    assert done.code == 0
    assert done.err.startswith("warning: 512 preserved pages are not in this memory")
    assert "512 preserved pages are not in this memory" in done.out
    with pytest.raises(errors.SourceError, match="512 preserved pages lie outside"):
        kho.open(raw)


def test_a_broken_map_at_the_right_address_is_a_finding(tmp_path: Path) -> None:
    """A valid subtree at the address in the root FDT confirms the address of the image."""
    image = Image(folios=[(0x20_0000, 0)], ram=[(0, 8 * MIB)], subtrees=sample_subtrees()).lay_out()
    image.put(image.chunks[0] + 8, b"\xff\0\0\0")
    raw = tmp_path / "ram.bin"
    raw.write_bytes(image.to_raw(0, 8 * MIB))
    done = run("verify", "--json", raw)
    assert done.code == 1
    assert "KHO004" in [finding["id"] for finding in json.loads(done.out)["findings"]]


def test_two_memories_in_one_file_are_not_mixed(tmp_path: Path) -> None:
    one = captures.contents("linux-7.3.4-x86_64")
    other = captures.contents("linux-7.3.4-aarch64")
    base = 0x4000_0000
    there = 512 * MIB
    raw = tmp_path / "ram.bin"
    with raw.open("wb") as file:
        for phys, data in [*dumpfiles.moved(one, 16 * MIB), *dumpfiles.moved(other, there - base)]:
            file.seek(phys)
            file.write(data)
        file.truncate(there + 256 * MIB)
    done = run("inspect", raw)
    assert done.code == 2
    assert f"{raw}@0x0,offset={16 * MIB:#x}" in done.err
    assert f"{raw}@{base - there:#x}" in done.err


@pytest.mark.parametrize("base", [GIB, 2 * GIB])
def test_memory_of_arm64_is_found_at_its_base_address(base: int, tmp_path: Path) -> None:
    image = high(low=[], up=[0, 3 * GIB], start=base, metadata=base + 64 * MIB, machine=EM_AARCH64).lay_out()
    pages = [(phys, bytes(page)) for phys, page in image.pages.items()]
    raw = dumpfiles.raw(tmp_path / "ram.bin", pages, [(base, 4 * GIB)])
    code, found, argument = answer(raw)
    assert (code, argument) == (0, f"{raw}@{base:#x}")
    assert found == answer(f"{raw}@{base:#x}")[1]


def test_every_form_of_a_source_name_is_parsed(tmp_path: Path) -> None:
    raw = tmp_path / "ram.bin"
    raw.write_bytes(bytes(4 * MIB))
    for text, ranges in (
        ("@0,hole=1M:16M", [(0, MIB), (16 * MIB, 3 * MIB)]),
        ("@0x1000,offset=4K,size=2M,hole=1M:2M,check=no", [(0x1000, MIB - 0x1000), (2 * MIB, MIB + 0x1000)]),
        ("@1G,hole=3G:4G", [(GIB, 4 * MIB)]),
        (",machine=firecracker,check=no", [(0, 4 * MIB)]),
        (",machine=firecracker-arm64", [(2 * GIB, 4 * MIB)]),
    ):
        memory = kho.Memory.open(f"{raw}{text}")
        assert memory.ranges == ranges
        assert kho.Memory.open(memory.sources[0]).ranges == ranges
    for wrong in ("@0,hole=1M", "@2M,hole=1M:3M", "@0,hole=2M:1M", "@0,check=yes", "@0,hole=:"):
        with pytest.raises(errors.SourceError, match="is not an address"):
            kho.Memory.open(f"{raw}{wrong}")
    with pytest.raises(errors.SourceError, match="q35, pc, microvm, virt, firecracker"):
        kho.Memory.open(f"{raw},machine=vax")
