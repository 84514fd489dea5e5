"""Commands in documentation: the files that they name are in a clone, and they run with the exit code that is shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?<![\w./-])(?:tests/data|examples|contrib|findings|benches|scripts|lab|docs)/[\w./*+-]+")
MADE = re.compile(r"(?:-o|--out|--output|--parquet)[ =]|> ?")
COMMAND = re.compile(r"^(?: {4})?\$ (.*)$", re.MULTILINE)


def commands(text: str) -> list[str]:
    """List the commands of a page, those of indented and of fenced blocks."""
    return COMMAND.findall(text)


def tracked() -> set[str]:
    """List the files that a clone has."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return set(done.stdout.split("\n")) - {""}


FILES = tracked()


@pytest.mark.skipif(not FILES, reason="not a clone")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_command_names_is_in_a_clone(page: Path) -> None:
    folders = {str(parent) for file in FILES for parent in Path(file).parents}
    for command in commands(page.read_text()):
        for named in PATH.findall(command):
            name = named.rstrip("/.")
            if "*" in name:
                assert [*ROOT.glob(name)], f"{page.name}: {command}"
            else:
                assert "no-such" in name or name in FILES or name in folders, f"{page.name}: {command}"


def test_no_page_names_a_directory_that_only_its_author_has() -> None:
    for page in PAGES:
        assert not re.findall(r"(?<![\w/.-])captures/\S+", page.read_text()), page.name


def test_a_path_that_is_not_there_is_seen() -> None:
    assert PATH.findall("kho diff tests/data/a/b.elf x/docs/c examples/d.py 'lab/*.toml'") == [
        "tests/data/a/b.elf",
        "examples/d.py",
        "lab/*.toml",
    ]


def listed() -> list[tuple[str, str]]:
    """List the commands of kho in indented blocks of README.md, which no script runs: page and command."""
    text = (ROOT / "README.md").read_text()
    return [("README.md", command) for command in commands(text) if command.startswith("kho ")]


@pytest.mark.parametrize(("page", "command"), listed())
def test_the_commands_of_the_readme_run(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "doctor" and not any("/" in word for word in words):
        words.append(str(ROOT / "tests/data/hosts/default-scratch"))  # this machine may have no KHO
    expanded = [str(path) for word in words for path in ([*sorted(ROOT.glob(word))] if "*" in word else [word])]
    done = subprocess.run([sys.executable, "-m", "kho", *expanded], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr.decode()
    assert b"Traceback" not in done.stderr


EXIT = re.compile(r"^\$ (?P<command>.*)\n(?:(?!\$ ).*\n)*?\(exit (?P<code>\d+)\)$", re.MULTILINE)


def test_every_command_of_the_pages_that_fails_says_so() -> None:
    # scripts/docs.py adds `(exit N)` where a command does not exit with 0, and test_docs.py compares its output.
    codes = [
        (page.name, found["command"], int(found["code"])) for page in PAGES for found in EXIT.finditer(page.read_text())
    ]
    assert codes, "pages show failures as well"
    assert {code for _, _, code in codes} <= {1, 2}, codes
