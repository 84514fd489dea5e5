"""The bundled captures: real handovers, and the results of a reference reader."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import kho

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.parent.name for path in DATA.glob("*/expected.json"))


def elf(name: str) -> Path:
    """The ELF core of a capture."""
    return DATA / name / "handover.elf"


@cache
def expected(name: str) -> dict[str, Any]:
    """The content of its `expected.json`."""
    found: dict[str, Any] = json.loads((DATA / name / "expected.json").read_text())
    return found


RADIX_NAMES = [name for name in NAMES if expected(name)["compatible"] != "kho-v1"]
LUO_V1_NAMES = [name for name in NAMES if expected(name).get("luo", {}).get("compatible") == "luo-v1"]
V1_NAMES = [name for name in NAMES if name not in RADIX_NAMES and name not in LUO_V1_NAMES]
"""Of Linux 6.16 to 6.18, which write the root in one pass when they finalize."""


def debugfs(name: str, stage: int, path: str) -> bytes:
    """A file of /sys/kernel/debug/kho before (1) or after (2) the kexec."""
    return (DATA / name / f"host/stage{stage}/sys/kernel/debug/kho" / path).read_bytes()


def contents(name: str) -> list[tuple[int, bytes]]:
    """`(address, bytes)` of all segments of a capture."""
    memory = kho.Memory.open(elf(name))
    return [(phys, memory.read(phys, nbytes)) for phys, nbytes in memory.ranges]
