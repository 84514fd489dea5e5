"""A kernel takes over what kho wrote: images of its own, and every capture as `kho convert --kernel` writes it.

No kernel hands over here: the image is loaded into the guest's memory, and the kernel is started as the next one
after a kexec. What it then gives back is compared, byte for byte, with what the last kernel or kho had put in.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import kho
from lab import Claim, Console, Lab
from lab.initramfs import GUEST

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"
SEALS_SINCE = (7, 1)  # memfd-v2
LUO_SINCE = (6, 19)
METADATA_SINCE = (7, 1)
MIB = 1 << 20
GUEST_FOR = [("x86_64", "lean"), ("aarch64", "lean"), ("aarch64", "64k")]


@dataclass
class Expected:
    """What the next kernel must give back."""

    files: dict[tuple[str, int], tuple[int, int, int | None, str]] = field(default_factory=dict)
    """(session, token) to (size, position, seals or None where they are not recorded, SHA-256)."""
    regions: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    """Name of a reserve_mem region to (address, bytes, SHA-256)."""
    folios: int = 0
    """The number of the test's folios."""


@dataclass
class Trial:
    """An image, the kernel it is for, and the claim."""

    text: str
    version: str
    arch: str
    fragments: tuple[str, ...]
    image: Path
    expected: Expected
    trouble: str = ""


def release(version: str) -> tuple[int, int]:
    """The series of a version, to compare: (7, 3)."""
    major, minor = version.partition("-")[0].split(".")[:2]
    return int(major), int(minor)


def sha256(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def noise(nbytes: int, seed: int) -> bytes:
    """Bytes that repeat nowhere."""
    return hashlib.shake_128(str(seed).encode()).digest(nbytes)


def command(*words: str) -> tuple[int, str]:
    """Run `kho` with this Python, and return its exit code and output."""
    done = subprocess.run([sys.executable, "-m", "kho", *words], capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


def captured(folder: Path, series: tuple[int, int]) -> Expected:
    """What a kernel of this series must give back of a capture: what the reference reader found in it."""
    truth = json.loads((folder / "expected.json").read_text())
    inc, found = kho.open(folder / "handover.elf"), Expected()
    for session in truth.get("luo", {}).get("sessions", []) if series >= LUO_SINCE else []:
        for file in session["files"]:
            recorded = series >= SEALS_SINCE and file["compatible"] != "memfd-v1"
            entry = (file["size"], file["pos"], file.get("seals", 0) if recorded else None, file["sha256"])
            found.files[session["name"], file["token"]] = entry
    for name, (start, nbytes) in truth.get("reserve_mem", {}).items():
        found.regions[name] = (start, nbytes, sha256(inc.read(start, nbytes)))
    found.folios = truth.get("kho_test", {}).get("nr_folios", 0)
    return found


def converted(lab: Lab, folder: Path, version: str, out: Path) -> str:
    """Convert a capture for a kernel by the command, as a user would; return what went wrong."""
    series = release(version)
    target = ".".join(map(str, series))
    options = ["--drop-luo"] if series < LUO_SINCE else ["--drop-seals", "--drop-flbs"] if series == (6, 19) else []
    options = ["--drop-seals"] if series == (7, 0) else options
    code, said = command("convert", str(folder / "handover.elf"), "--kernel", target, *options, "-o", str(out))
    if code:
        return f"kho convert --kernel {target}: exit code {code}\n{said}"
    code, said = command("verify", "--kernel", target, str(out))
    return "" if code == 0 else f"kho verify --kernel {target}: exit code {code}\n{said}"


MACHINES = {
    ("x86_64", 4096): ([(MIB, 511 * MIB)], [(0x10000000, 64 * MIB), (0x14000000, 96 * MIB), (0x1A000000, 32 * MIB)]),
    ("aarch64", 4096): (
        [(0x40000000, 256 * MIB)],
        [(0x4E800000, 16 * MIB), (0x4A000000, 64 * MIB), (0x49000000, 16 * MIB)],
    ),
    ("aarch64", 65536): (
        [(0x40000000, 3584 * MIB)],
        [(0xE0000000, 512 * MIB), (0xC0000000, 512 * MIB), (0xA0000000, 512 * MIB)],
    ),
}
"""RAM, and the scratch areas low, global and of node 0. On x86_64 firmware is at work below 1 MiB."""


def written(arch: str, page: int, version: str, out_path: Path) -> Expected:
    """Write an image of kho's own for a kernel: memfds of many shapes, a reserve_mem region, the test's folios."""
    series, found = release(version), Expected()
    ram, scratch = MACHINES[arch, page]
    arena = kho.Arena(ram, page_size=page, scratch=scratch)
    out = kho.Outgoing(arena, kernel=".".join(map(str, series)))
    big = (2 * MIB // page).bit_length() - 1

    def memfd(session: str, token: int, data: bytes, pos: int = 0, seals: int = 0, order: int = 0) -> None:
        kept = seals if series >= SEALS_SINCE else 0
        out.add_memfd(session, token, data, pos=pos, seals=kept, order=order)
        found.files[session, token] = (len(data), pos, kept if series >= SEALS_SINCE else None, sha256(data))

    if series >= LUO_SINCE:
        out.add_luo(liveupdate_num=1)
        memfd("vm-1", 0x10, noise(6 * MIB, 1), pos=3 * MIB)
        memfd("vm-1", 0x11, noise(5000, 2), pos=2500, seals=6)
        memfd("cache", 7, noise(300000, 3), order=2, pos=1)
        memfd("cache", 8, b"")
        memfd("big", 1, noise(4 * MIB, 4), order=big)
        first, last = arena.alloc(0), arena.alloc(3)
        parts = noise(page, 5), noise(8 * page, 6)
        memoryview(first)[:], memoryview(last)[:] = parts
        data = (bytes(2 * page) + parts[0] + bytes(5 * page) + parts[1])[: 15 * page + 100]
        given = [kho.MemfdFolio(first.phys, 0, 2, 3), kho.MemfdFolio(last.phys, 3, 8, 3)]
        out.add_memfd("holes", 1, given, size=len(data))
        found.files["holes", 1] = (len(data), 0, 0 if series >= SEALS_SINCE else None, sha256(data))
        for i in range(100):
            memfd("blocks", i, noise(10 + i, 100 + i))
    region, contents = out.add_reserve_mem("keepme", 2 * 65536), noise(2 * 65536, 7)
    arena.write(region[0], contents)
    found.regions["keepme"] = (region[0], len(contents), sha256(contents))
    if series >= METADATA_SINCE:
        out.set_kexec_metadata(version, 1)
    folios = []
    for i, order in enumerate((0, 1, 2, 3, 4, big, 0)):
        folio = arena.alloc(order)
        memoryview(folio)[:] = noise(page << order, 200 + i)
        folios.append(folio)
    out.add_kho_test(folios, machine=arch)
    found.folios = len(folios)
    out.finalize()
    out.save(out_path, machine=arch)
    return found


def judge(console: Console, expected: Expected) -> list[str]:
    """Compare what the kernel gave back; return the differences."""
    wrong = []
    files = {}
    for line in console.lines("TAKE: file "):
        match = re.fullmatch(
            r"(\S+) (0x[0-9a-f]+|0) size (\d+) pos (\d+) seals (0x[0-9a-f]+|0) sha256 ([0-9a-f]{64})", line
        )
        if match:
            files[match[1], int(match[2], 16)] = (int(match[3]), int(match[4]), int(match[5], 16), match[6])
    for key, want in expected.files.items():
        got = files.get(key)
        if got is None or (got if want[2] is not None else (*got[:2], None, got[3])) != want:
            wrong.append(f"session {key[0]}, file {key[1]:#x}: expected {want}, got {got}")
    memory = dict(re.findall(r"TAKE: memory (0x[0-9a-f]+) bytes \d+ sha256 ([0-9a-f]{64})", console.text))
    for name, (start, _, digest) in expected.regions.items():
        if f"Revived memory reservation '{name}' from KHO" not in console.text:
            wrong.append(f"reserve_mem {name} was not revived")
        if memory.get(f"{start:#x}") != digest:
            wrong.append(f"reserve_mem {name}: contents differ at {start:#x}")
    if expected.folios and "KHO restore succeeded" not in console.text:
        wrong.append("the kernel's own test did not say 'KHO restore succeeded'")
    if "TAKE: end" not in console.text:
        wrong.append("the guest did not come to its end")
    return wrong


def trials(lab: Lab) -> Iterator[Trial]:
    """Every image with every kernel that is to take it."""
    work = lab.cache / "work" / "images"
    work.mkdir(parents=True, exist_ok=True)
    captures = {
        ("x86_64", "lean"): [path.parent for path in sorted(DATA.glob("*x86_64/handover.elf"))],
        ("aarch64", "lean"): [path.parent for path in sorted(DATA.glob("*aarch64/handover.elf"))],
        ("aarch64", "64k"): [path.parent for path in sorted(DATA.glob("*aarch64-64k/handover.elf"))],
    }
    for version in lab.versions:
        for arch, layout in GUEST_FOR:
            if arch not in lab.arches or (arch != "x86_64" and version != lab.newest):
                continue
            fragments = ("lean",) if layout == "lean" else ("lean", layout)
            page = 65536 if layout == "64k" else 4096
            label = arch if page == 4096 else f"{arch}, 64 KiB pages"
            series = ".".join(map(str, release(version)))
            image = work / f"own-{label.split(',')[0]}-{page}-{version}.elf"
            expected = written(arch, page, version, image)
            text = f"an image that `kho.Outgoing(kernel={series!r})` wrote is taken"
            yield Trial(text, version, label, fragments, image, expected)
            for folder in captures[arch, layout]:
                image = work / f"{folder.name}-{version}.elf"
                trouble = converted(lab, folder, version, image)
                text = f"{folder.name} after `kho convert --kernel {series}` is taken"
                yield Trial(text, version, label, fragments, image, captured(folder, release(version)), trouble)


def summary(expected: Expected) -> str:
    """What was given back, for the table's evidence."""
    parts = [f"{len(expected.files)} memfds with contents, sizes, positions"] if expected.files else []
    parts += [f"reserve_mem {name}" for name in expected.regions]
    parts += [f"{expected.folios} test folios"] if expected.folios else []
    return ", ".join(parts)


def boot(lab: Lab, trial: Trial) -> Claim:
    """Boot one image."""
    expected, arch = trial.expected, trial.arch.split(",")[0]
    if trial.trouble:
        return Claim(trial.text, trial.version, trial.arch, False, trial.trouble)
    names = "".join(f"{session} {token:#x}\n" for session, token in expected.files)
    initrd = lab.small_initramfs(GUEST / "take.c", arch, {"list": names.encode()})
    page = 65536 if "64k" in trial.fragments else 4096
    words = [f"reserve_mem={nbytes}:{page}:{name}" for name, (_, nbytes, _) in expected.regions.items()]
    words += [f"take_mem={start:#x},{nbytes:#x}" for start, nbytes, _ in expected.regions.values()]
    kernel = lab.kernel(trial.version, arch, trial.fragments)
    console = lab.boot_image(kernel, trial.image, initrd, " ".join(words))
    wrong = judge(console, expected)
    evidence = "\n".join([*wrong[:8], console.tail(25)]) if wrong else summary(expected)
    return Claim(trial.text, trial.version, trial.arch, not wrong, evidence)


def run(lab: Lab) -> Iterator[Claim]:
    """Two guests at a time."""
    yield from lab.side_by_side(partial(boot, lab), list(trials(lab)))
