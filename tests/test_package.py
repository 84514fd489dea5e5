"""The package as it is installed."""

from __future__ import annotations

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
