"""File names are bytes: every command takes any of them, and prints every form of its output without a traceback.

Names of the package: records that methods take are made by their public names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

import kho
from kho.formats import Broken, Raw
from kho.handover.describe import describe

import captures

CAPTURE = captures.elf("linux-7.3.4-x86_64")
NAMES = [b"\xff\xfe two\nlines \\ and \x1b[31m.elf", "a@b,c=d \u200b\u202e\U0001f600.elf".encode()]


def kho_command(*args: object, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    """Run `kho ARGS`, with its output as bytes."""
    return subprocess.run(
        [sys.executable, "-m", "kho", *[arg if isinstance(arg, bytes | str) else str(arg) for arg in args]],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )


@pytest.fixture(params=NAMES, ids=["no UTF-8", "an address"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    """A copy of a capture with this name."""
    path = tmp_path / os.fsdecode(request.param)
    path.symlink_to(CAPTURE)
    return os.fsencode(path)


COMMANDS: list[list[str]] = [
    ["inspect"],
    ["inspect", "--json"],
    ["inspect", "--python"],
    ["verify", "--json"],
    ["verify", "--sarif"],
    ["owners"],
    ["map"],
    ["map", "-o", "OUT.svg"],
    ["map", "-o", "OUT.html"],
    ["fdt", "--all"],
    ["fdt", "--json"],
    ["extract", "--all", "OUT"],
    ["extract", "--json", "--subtree", "LUO", "-o", "OUT"],
    ["convert", "--abi", "kho-v4", "-o", "OUT"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_any_file_name_is_read_and_printed(command: list[str], image: bytes) -> None:
    encoding = "ascii" if len(command) % 2 else "utf-8"
    args = [image + arg[3:].encode() + b".out" if arg == "OUT" else arg for arg in command]
    args = [image + arg[3:].encode() if isinstance(arg, str) and arg.startswith("OUT.") else arg for arg in args]
    done = kho_command(*args, image, encoding=encoding)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    done.stdout.decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("missing", [b"\xff\xfe", b"a\nb"])
def test_a_missing_file_is_an_error_for_any_name(missing: bytes, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/" + missing
    for command in (["inspect"], ["verify", "--sarif"], ["diff", str(CAPTURE)], ["fdt"], ["map"], ["owners", "--json"]):
        done = kho_command(*command, path)
        assert (done.returncode, b"Traceback" in done.stderr) == (2, False), done.stderr


def test_a_sarif_log_encodes_the_bytes_of_the_file_name(image: bytes) -> None:
    log = json.loads(kho_command("verify", "--sarif", image).stdout)
    (artifact,) = log["runs"][0]["artifacts"]
    assert unquote_to_bytes(artifact["location"]["uri"]) == image


def test_sha256sum_accepts_the_output_of_extract(image: bytes, tmp_path: Path) -> None:
    target = image + b".blob"
    done = kho_command("extract", "--subtree", "LUO", "-o", target, image)
    taken = subprocess.run(["sha256sum", "-c", "-"], input=done.stdout, capture_output=True, check=False)
    assert taken.returncode == 0, (done.stdout, taken.stderr)


# Payloads without contents


def test_reading_a_file_without_contents_raises_a_kho_error(tmp_path: Path) -> None:
    raw = bytearray(CAPTURE.read_bytes())
    inc = kho.open(CAPTURE)
    entries = [entry for session in inc.luo.all_sessions for entry in session.entries]
    for number, compatible in enumerate([b"vfio-pci-v1", b"memfd-v1", b"\xff\xff", b""]):
        changed = raw.replace(entries[0].compatible.encode().ljust(48, b"\0"), compatible.ljust(48, b"\0"))
        path = tmp_path / f"{number}.elf"
        path.write_bytes(changed)
        inc = kho.open(path)
        for session in inc.luo.all_sessions:
            for file in session.files.values():
                if isinstance(file, Raw | Broken):
                    with pytest.raises(kho.KhoError, match="0x"):
                        file.read()
                    with pytest.raises(kho.KhoError):
                        file.read(10, 5)
        describe(inc)
    for payload in inc.payloads.values():
        with pytest.raises(kho.KhoError):
            payload.read()


# Names of the package


def test_the_folios_that_add_memfd_takes_are_made_by_a_public_name() -> None:
    arena = kho.Arena("1G")
    out = kho.Outgoing(arena, "kho-v4")
    one, two = arena.alloc(), arena.alloc(order=1)
    for folio in (one, two):
        memoryview(folio)[:] = bytes([folio.order + 1]) * len(folio)
        out.preserve_folio(folio)
    listed = [kho.MemfdFolio(one.phys, 0, index=1, flags=3), kho.MemfdFolio(two.phys, 1, index=4, flags=3)]
    out.add_memfd("session", 1, listed, size=6 * 4096)
    file = kho.open(arena, fdt_phys=out.finalize()).luo.sessions["session"].files[1]
    assert not isinstance(file, Raw | Broken)
    assert list(file.folios) == listed
    assert file.read() == bytes(4096) + b"\1" * 4096 + bytes(8192) + b"\2" * 8192
    assert "MemfdFolio" in kho.__all__
