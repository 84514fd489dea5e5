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
