"""Memory and time of every command are proportional to the bytes in a file, whatever the file claims."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from attack import craft

import captures

MIB = 1 << 20
CAPTURES = [captures.elf(name) for name in captures.NAMES]
IMPORTS = 0.12
"""Seconds for starting an interpreter and importing the command, which the fork server has done already."""


class Took(NamedTuple):
    """Exit code and cost of a command."""

    code: int
    seconds: float
    nbytes: int
    err: str


Run = Callable[..., Took]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run commands in forked children of a process that has imported only kho."""
    command = [sys.executable, str(Path(__file__).with_name("forkserver.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        stdin, stdout = server.stdin, server.stdout
        assert stdin is not None
        assert stdout is not None

        def run(*args: object) -> Took:
            stdin.write(json.dumps({"args": [str(arg) for arg in args]}) + "\n")
            stdin.flush()
            found: dict[str, Any] = json.loads(stdout.readline())
            return Took(found["code"], found["seconds"], found["bytes"], found["err"])

        yield run
        stdin.close()


def commands(image: Path, folder: Path, honest: Path) -> list[tuple[object, ...]]:
    """Every command that reads memory, in every output format."""
    out = folder / "out"
    return [
        ("inspect", image),
        ("verify", image),
        ("inspect", "--json", image),
        ("inspect", "--full", image),
        ("inspect", "--full", "--json", image),
        ("verify", "--json", image),
        ("verify", "--sarif", image),
        ("owners", image),
        ("owners", "--json", image),
        ("owners", "--by-page", image),
        ("map", image),
        ("map", "--json", image),
        ("map", "-o", out / "map.svg", image),
        ("map", "-o", out / "map.html", image),
        ("fdt", "--all", image),
        ("fdt", "--all", "--json", image),
        ("extract", "--all", out / "all", image),
        ("extract", "--folio", hex(craft.TOP), "-o", out / "folio", image),
        ("extract", "--folio", hex(craft.TOP), "-o", "-", image),
        ("extract", "--subtree", "kho_test", "-o", out / "subtree", image),
        ("diff", image, honest),
        ("diff", "--json", honest, image),
        ("diff", "--all", image, image),
        ("convert", "--abi", "kho-v1", "-o", out / "v1.elf", image),
        ("convert", "--abi", "kho-v4", "-o", out / "v4.elf", image),
    ]


def check(run: Run, command: tuple[object, ...], image: Path, folder: Path, what: str) -> Took:
    """Check the law: at most 64 MiB and four times the file; 2 s and 1 s per 10 MiB; no traceback."""
    nbytes = image.stat().st_size
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    took = run(*command)
    shown = " ".join(str(arg) for arg in command)
    said = (
        f"{what}: kho {shown}: {took.nbytes / MIB:.0f} MiB, {took.seconds:.2f} s for {nbytes / MIB:.2f} MiB\n{took.err}"
    )
    assert took.code in (0, 1, 2), said
    assert "Traceback" not in took.err, said
    assert took.nbytes <= 64 * MIB + 4 * nbytes, said
    assert took.seconds <= 2 - IMPORTS + nbytes / (10 * MIB), said
    return took


@pytest.mark.parametrize("case", craft.CASES)
def test_memory_and_time_are_proportional_to_the_file(
    case: str, run: Run, tmp_path: Path, attack_seconds: float, attack_seed: int
) -> None:
    """The worst image for each structure: at least two commands, then more commands and sizes while time is left."""
    chance = random.Random(f"{attack_seed} {case}")
    image = tmp_path / "image"
    honest = chance.choice(CAPTURES)
    first = [(1.0, command) for command in commands(image, tmp_path, honest)[:2]]
    sizes = (0.05, 1.0, chance.uniform(0.1, 4), 4.0) if attack_seconds >= 30 else (1.0,)
    others = [(scale, command) for scale in sizes for command in commands(image, tmp_path, honest)[2:]]
    chance.shuffle(others)
    # The cases share the time of two laws.
    until = time.monotonic() + 2 * attack_seconds / len(craft.CASES)
    written = None
    for number, (scale, command) in enumerate([*first, *others]):
        if number > len(first) and time.monotonic() > until:
            break
        if scale != written:
            image.write_bytes(craft.CASES[case](scale))
            written = scale
        check(run, command, image, tmp_path, f"seed {attack_seed}, {case}, scale {scale:.2f}")


# Captures with a few changed words


NUMBERS = (0, 1, 8, 16, 4096, 4104, 1 << 16, 1 << 20, 1 << 32, 1 << 40, 1 << 52, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """A capture with wrong pointers, absurd counts, duplicate words, and headers that claim zeros."""
    image = bytearray(raw)
    (phnum,) = struct.unpack_from("<H", image, 56)
    headers = [64 + 56 * n for n in range(phnum)]
    segments = [struct.unpack_from("<QQQQQ", image, at + 8) for at in headers]
    pages = [
        (offset + skip, phys + skip)
        for offset, _, phys, filesz, _ in segments
        for skip in range(0, max(filesz - 4095, 0), 4096)
    ]
    # Words with values inside this memory are mostly pointers.
    here = {phys for _, phys in pages}
    pointers = [
        at + 8 * n
        for at, _ in pages
        for n, word in enumerate(struct.unpack_from("<512Q", image, at))
        if word and word & ~0xFFF in here
    ]
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        kind = chance.randrange(8)
        at, _ = chance.choice(pages)
        if kind == 0 and pointers:
            struct.pack_into(
                "<Q", image, chance.choice(pointers), chance.choice(pages)[1] + chance.choice((0, 0, 16, 64))
            )
        elif kind == 1 and pointers:
            there = chance.choice(pointers)
            (word,) = struct.unpack_from("<Q", image, there)
            struct.pack_into("<Q", image, there, (word + chance.choice((8, 16, 64, 80, 4096, -16, -4096))) % (1 << 64))
        elif kind == 2 and pointers:
            near = chance.choice(pointers) + chance.choice((-16, -8, 8, 16, 24))
            struct.pack_into("<Q", image, near, chance.choice(NUMBERS))
        elif kind == 3:
            struct.pack_into("<Q", image, at + 8 * chance.randrange(512), chance.choice(NUMBERS))
        elif kind == 4:
            # Repeat list entries to the end of the page.
            size = chance.choice((8, 16, 64, 80))
            start = at + size * chance.randrange(4096 // size)
            entry = image[start : start + size]
            room = at + 4096 - start
            image[start : start + room] = (entry * (room // max(len(entry), 1) + 1))[:room]
        elif kind == 5:
            # A header claims zeros after its bytes, up to the next segment or the end of the address space.
            header = chance.choice(headers)
            (start,) = struct.unpack_from("<Q", image, header + 24)
            ends = [other[2] for other in segments if other[2] > start] or [1 << 48]
            struct.pack_into("<Q", image, header + 40, min(chance.choice((min(ends), 1 << 47)), 1 << 48) - start)
        elif kind == 6:
            other = chance.choice(pages)[0]
            image[at : at + 4096] = image[other : other + 4096]
        else:
            image[at : at + 4096] = chance.choice((b"\xff", b"\x55", b"\x01\0\0\0\0\0\0\0"))[:1] * 4096
    return bytes(image)


def test_a_mutated_capture_stays_within_the_bounds(
    run: Run, tmp_path: Path, attack_seconds: float, attack_seed: int
) -> None:
    chance = random.Random(f"{attack_seed} captures")
    image = tmp_path / "image"
    began = time.monotonic()
    for number in itertools.count():
        source = chance.choice(CAPTURES)
        image.write_bytes(mutated(source.read_bytes(), random.Random(f"{attack_seed} {number}")))
        for command in chance.sample(commands(image, tmp_path, source), 3):
            check(run, command, image, tmp_path, f"seed {attack_seed}, number {number}, {source.parent.name}")
        if time.monotonic() - began > attack_seconds:
            break


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.parent.name)
def test_captures_are_read_completely(path: Path, run: Run, tmp_path: Path) -> None:
    """Captures stay below all limits: nothing is refused or omitted."""
    for command in commands(path, tmp_path, path):
        if command[0] in ("inspect", "verify", "owners", "map", "fdt"):
            took = check(run, command, path, tmp_path, path.parent.name)
            assert took.code == 0, took.err
            assert "plausibly" not in took.err
