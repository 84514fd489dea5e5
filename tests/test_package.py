"""The package as it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

from kho import _kho

ROOT = Path(__file__).parent.parent


@pytest.mark.smoke
def test_the_version_equals_that_of_the_cargo_workspace() -> None:
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert metadata.version("kho") == workspace
    assert _kho.__version__ == workspace


@pytest.mark.smoke
def test_the_package_contains_type_information() -> None:
    for name in ("py.typed", "_kho.pyi"):
        assert resources.files("kho").joinpath(name).is_file(), name


@pytest.mark.smoke
def test_importing_kho_imports_no_heavy_modules() -> None:
    heavy = "import sys, kho; print(*sorted({'numpy', 'click', 'rich', 'dask', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.skipif(shutil.which("cargo") is None, reason="no cargo")
def test_the_packed_crate_has_every_source_and_the_data_of_its_tests() -> None:
    command = ["cargo", "package", "-p", "kho", "--allow-dirty", "--list", "--offline"]
    packed = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    crate = ROOT / "rust/kho"
    wanted = {str(path.relative_to(crate)) for path in (crate / "src").rglob("*") if path.is_file()}
    assert wanted - packed == set()
    assert {"testdata/linux-6.18.15-x86_64/handover.elf", "testdata/README.md"} <= packed


ELSEWHERE = """
import fcntl, mmap, os, sys
linux = [(fcntl, "F_ADD_SEALS F_GET_SEALS F_SEAL_SHRINK F_SEAL_GROW F_SEAL_SEAL F_SEAL_WRITE F_OFD_SETLK F_OFD_GETLK"),
         (os, "memfd_create MFD_CLOEXEC MFD_ALLOW_SEALING O_PATH O_TMPFILE posix_fallocate eventfd pidfd_open")]
for module, names in linux:
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "darwin"
"""
"""What other systems do not have: readers and the doctor must not need it."""


@pytest.mark.parametrize("command", ["inspect", "doctor", "verify", "owners", "map", "fdt", "plan"])
def test_commands_that_read_need_nothing_that_only_linux_has(command: str) -> None:
    host = command == "doctor"
    source = [str(ROOT / "tests/data" / ("hosts/default-scratch" if host else "linux-7.3.4-x86_64/handover.elf"))]
    words = ["--memory", "64G", "--preserve", "50%:2M"] if command == "plan" else source
    program = f"{ELSEWHERE}\nfrom kho.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program, command, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["ps"], ["release", "x", "--yes"], ["inspect", "live:x"]])
def test_kho_live_says_elsewhere_that_it_is_of_linux_only(command: list[str]) -> None:
    program = f"{ELSEWHERE}\nfrom kho.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kho: kho.live: Linux only: it needs memory files, seals and locks of open files\n"
