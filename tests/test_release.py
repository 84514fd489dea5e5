"""Steps of a release (scripts/release.py), and the licenses of what is linked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from programs import script

ROOT = Path(__file__).parent.parent
URL = "https://forge.example/kho"


def test_links_become_absolute_and_other_text_stays() -> None:
    absolute = script("release").absolute
    page = "[a](docs/x.md) [b](docs/x.md#y) ![c](docs/z.svg) [d](https://e/f) [g](#here) `[h](i)`"
    assert absolute(page, URL, "v1") == (
        f"[a]({URL}/blob/v1/docs/x.md) [b]({URL}/blob/v1/docs/x.md#y) ![c]({URL}/raw/v1/docs/z.svg) "
        f"[d](https://e/f) [g](#here) `[h]({URL}/blob/v1/i)`"
    )
    readme = absolute((ROOT / "README.md").read_text(), URL, "main")
    for target in re.findall(r"\]\(([^)\s]+)\)", readme):
        assert target.startswith(("https://", "#")), target


def test_the_addresses_are_a_table_of_pyproject() -> None:
    with_urls = script("release").with_urls
    text = (ROOT / "pyproject.toml").read_text()
    made = tomllib.loads(with_urls(text, URL, "v1"))
    assert made["project"]["urls"]["Changelog"] == f"{URL}/blob/v1/CHANGELOG.md"
    del made["project"]["urls"]
    assert made == tomllib.loads(text)
    with pytest.raises(SystemExit):
        with_urls(with_urls(text, URL, "v1"), URL, "v1")


def test_a_tag_of_another_version_is_a_problem_in_every_place(tmp_path: Path) -> None:
    problems = script("release").problems
    man = tmp_path / "wheel-data/data/share/man/man1"
    man.mkdir(parents=True)
    (tmp_path / "Cargo.toml").write_text('[workspace.package]\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n")
    (man / "kho.1").write_text('.TH KHO 1 "2026-12-01" "kho 1.2.0" "User Commands"\n')
    assert problems(tmp_path, "v1.2.0") == []
    assert len(problems(tmp_path, "v1.3.0")) == 3
    (man / "kho.1").write_text('.TH KHO 1 "2026-11-01" "kho 1.2.0" "User Commands"\n')
    assert len(problems(tmp_path, "v1.2.0")) == 1


def test_an_unknown_step_prints_what_there_is() -> None:
    command = [sys.executable, str(ROOT / "scripts/release.py"), "publish"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "release.py check TAG" in done.stderr


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", heading) for heading in headings[1:])
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert re.search(r"^ABI: ", section, re.MULTILINE), section.splitlines()[0]


@pytest.mark.skipif(shutil.which("cargo") is None, reason="no cargo")
def test_the_licenses_are_those_of_the_crates_in_the_lock_file() -> None:
    command = [sys.executable, str(ROOT / "scripts/licenses.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "offline" in done.stderr:
        pytest.skip("crates of another target were never fetched")
    assert (done.returncode, done.stderr) == (0, ""), "run make licenses"


def test_every_linked_crate_has_the_text_of_its_license() -> None:
    text = (ROOT / "THIRD-PARTY-LICENSES").read_text()
    listed = dict(re.findall(r"^([\w-]+) (\d\S*): ", text, re.MULTILINE))
    given = set(re.findall(r"^([\w-]+) \d\S*, ", text, re.MULTILINE))
    locked = {package["name"] for package in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]}
    assert set(listed) <= locked
    assert set(listed) <= given
