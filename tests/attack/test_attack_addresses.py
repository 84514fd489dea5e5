"""A raw image with a wrong address, truncated or without a hole gives the report of the right address, or none."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

import captures
import dumpfiles
from command import kho as run

ADDRESSES = ("", "@0", "@1G", "@2G", "@0x1000", "@1T", ",machine=pc", ",machine=firecracker", "@0,hole=3G:4G")


def answer(*args: object) -> dict[str, Any] | None:
    """The report without the address of the image; None with exit code 2."""
    done = run("inspect", "--json", *args)
    assert done.code in (0, 2), done
    if done.code:
        assert done.out == ""
        return None
    report = done.json
    # The reason for a layout also mentions other readings, which depend on memory outside the handover.
    for of_the_place in ("placement", "page_size_why", "bitmap_bytes_why"):
        report.pop(of_the_place, None)
    return report


def without_contents(report: Any) -> Any:
    """The report without the parts that depend on contents only."""
    if isinstance(report, dict):
        contents = ("pages_outside", "scratch_phys", "sha256", "csum_holds", "error", "raw")
        return {key: without_contents(value) for key, value in report.items() if key not in contents}
    return [without_contents(item) for item in report] if isinstance(report, list) else report


@pytest.mark.parametrize("name", captures.NAMES)
def test_a_wrong_address_never_gives_another_report(
    name: str, tmp_path: Path, attack_seconds: float, attack_seed: int
) -> None:
    memory = captures.contents(name)
    end = max(phys + len(data) for phys, data in memory)
    step = 1 << (16 if name.endswith("64k") else 12)
    until = time.monotonic() + attack_seconds
    number = solved = 0
    while time.monotonic() < until:
        number += 1
        random = Random(f"{attack_seed} {name} {number}")
        base = random.choice((0, random.randrange(memory[0][0] // step + 1) * step))
        before = random.choice((0, 0, random.randrange(1, 4096) * step))
        size = random.choice((None, None, random.randrange(1, (end - base) // step) * step))
        up = dumpfiles.moved(memory, before)
        raw = dumpfiles.raw(tmp_path / "ram.bin", up, [(base, end + before - base)], size=size)
        right = answer(f"{raw}@{base:#x},offset={before:#x},check=no") if size is None or size > before else None
        named = random.choice((*ADDRESSES, f"@{random.randrange(1 << 40) * step:#x}"))
        found = answer(f"{raw}{named}")
        if size is not None or "machine=" in named or "hole=" in named:
            # Contents confirm nothing: a given hole is accepted if the map is complete, and the missing end of a
            # truncated image may lie above a hole.
            same = without_contents(found) == without_contents(right)
        else:
            same = found == right
        assert found is None or same, (attack_seed, number, base, before, size, named)
        solved += found is not None
    assert solved > 0


@pytest.mark.parametrize("name", captures.NAMES)
def test_an_unusual_hole_never_gives_another_report(
    name: str, tmp_path: Path, attack_seconds: float, attack_seed: int
) -> None:
    """Metadata is on both sides of the hole; with only contents on one side, the hole could not be detected."""
    memory = captures.contents(name)
    expected = captures.expected(name)
    end = max(phys + len(data) for phys, data in memory)
    step = 1 << (16 if name.endswith("64k") else 12)
    leads = [expected["fdt_phys"], expected["preserved_memory_map"]]
    leads += [subtree["phys"] for subtree in expected["subtrees"].values()]
    until = time.monotonic() + attack_seconds
    number = 0
    while time.monotonic() < until:
        number += 1
        random = Random(f"{attack_seed} {name} {number}")
        base = random.randrange(memory[0][0] // step + 1) * step
        start = random.randrange(min(leads) // step + 1, max(leads) // step + 1) * step
        # Pages between parts of the handover are missing in the file, or the file has pages that are not memory.
        hole = random.randrange(1, 1 << 12) * step * random.choice((1, -1))
        low, high = split(memory, start, above=False), split(memory, start, above=True)
        upper = start + hole if hole > 0 else start + max(hole, -(start - base) // 2 // step * step)
        raw = tmp_path / "ram.bin"
        dumpfiles.raw(raw, [*low, *dumpfiles.moved(high, upper - start)], [(base, upper - base + end - start)])
        right = answer(
            f"{raw}@{base:#x},check=no,size={min(start, upper) - base:#x}",
            f"{raw}@{start:#x},check=no,offset={upper - base:#x}",
        )
        named = random.choice(("", "@1G", "@2G", "@1T", ",machine=virt", f"@{random.randrange(1 << 20) * step:#x}"))
        found = answer(f"{raw}{named}")
        assert found is None or found == right, (attack_seed, number, hex(base), hex(start), hex(upper), named)


def split(memory: list[tuple[int, bytes]], at: int, *, above: bool) -> list[tuple[int, bytes]]:
    """Return the memory below an address, or from the address on."""
    if above:
        return [(max(phys, at), data[max(at - phys, 0) :]) for phys, data in memory if phys + len(data) > at]
    return [(phys, data[: max(at - phys, 0)]) for phys, data in memory if phys < at]
