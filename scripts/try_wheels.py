#!/usr/bin/env python3
"""Install wheels into empty venvs, of every CPython that is found, and try them: the smoke tests, and captures.

scripts/try_wheels.py DIRECTORY    every wheel in it; those for another machine are only looked into
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
CAPTURE = ROOT / "tests/data/linux-7.3.4-x86_64/handover.elf"
HOST = ROOT / "tests/data/hosts/default-scratch"
PARTS = ["share/man/man1/kho.1", "share/bash-completion/completions/kho", "licenses/THIRD-PARTY-LICENSES", "sboms/"]
"""What every wheel has next to the package."""


def pythons() -> Iterator[str]:
    """Find one CPython of each version, in PATH and among those of pyenv; that of this process is always one."""
    seen = {sys.version_info[:2]}
    yield sys.executable
    for version in PYTHONS:
        places = [
            shutil.which(f"python{version}"),
            *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
        ]
        major, minor = map(int, version.split("."))
        for place in places:
            if place is None or (major, minor) in seen:
                continue
            # A shim of pyenv for a version that is not installed fails.
            asked = "import sys; print(sys.implementation.name, *sys.version_info[:2])"
            done = subprocess.run([place, "-c", asked], capture_output=True, text=True, check=False)
            if done.stdout.split() == ["cpython", str(major), str(minor)]:
                seen.add((major, minor))
                yield place


def smoke() -> list[Path]:
    """List the files with smoke tests; others may import what is not installed here."""
    return [file for file in sorted(ROOT.glob("tests/test_*.py")) if "@pytest.mark.smoke" in file.read_text()]


def look(wheel: Path) -> None:
    """Check the names in a wheel. Exits with a message if something is missing."""
    names = zipfile.ZipFile(wheel).namelist()
    for part in PARTS:
        if not any(part in name for name in names):
            sys.exit(f"{wheel.name}: nothing like {part} in it")
    if "cp311-abi3" not in wheel.name:
        sys.exit(f"{wheel.name}: not for every Python from 3.11 on")


def attempt(wheel: Path, python: str) -> None:
    """Install a wheel, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        subprocess.run([python, "-m", "venv", here / "venv"], check=True)
        own = here / "venv/bin/python"
        env = {**os.environ, "XDG_RUNTIME_DIR": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, wheel, "pytest>=8", "hypothesis>=6.100", "numpy>=2"], check=True)
        for command in (["doctor", HOST], ["inspect", CAPTURE]):
            program = [here / "venv/bin/kho", *command]
            done = subprocess.run(program, cwd=here, env=env, capture_output=True, text=True, check=False)
            if done.returncode > 1 or done.stderr:
                sys.exit(f"{wheel.name}: kho {command[0]}: {done.stderr}")
        subprocess.run(
            [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "smoke", *smoke()],
            cwd=ROOT,
            env=env,
            check=True,
        )


def main() -> int:
    """Try all wheels."""
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    if not wheels:
        sys.exit(f"{sys.argv[1]}: no wheel")
    libc = "manylinux" if platform.libc_ver()[0] == "glibc" else "musllinux"
    for wheel in wheels:
        look(wheel)
        if wheel.stem.endswith(platform.machine()) and libc in wheel.name:
            for python in pythons():
                print(f"{wheel.name}: {python}", flush=True)
                attempt(wheel, python)
        else:
            print(f"{wheel.name}: not for this machine, so only looked into", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
