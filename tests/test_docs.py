"""The documentation is up to date: outputs, calls, links, and a page for every command."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from kho.cli import TASKS, cli

from command import kho as run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SHARE = ROOT / "wheel-data" / "data" / "share"
MAN = SHARE / "man" / "man1"
COMMANDS = sorted(cli.commands)


def check() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/docs.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(shutil.which("dtc") is None, reason="dtc is not installed, and a page shows its output")
def test_pages_and_manual_pages_are_up_to_date() -> None:
    done = check()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "run make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_and_a_manual_page(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text()
    assert page.startswith(f"# kho {name}: ")
    assert f"$ kho {name} " in page
    assert (MAN / f"kho-{name}.1").is_file()
    documented = (MAN / f"kho-{name}.1").read_text().replace("\\-", "-")
    for param in cli.commands[name].params:
        if isinstance(param, click.Option):
            assert all(opt in documented for opt in param.opts)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_lists_its_exit_codes(name: str) -> None:
    assert "Exit codes: 0" in (cli.commands[name].help or "")


def test_help_shows_a_call_of_every_command() -> None:
    done = run("--help")
    assert done.code == 0
    flat = re.sub(r"\s+", " ", done.out)
    for name in COMMANDS:
        task, example = TASKS[name]
        assert task in flat
        assert example.split(" ")[:2] == ["kho", name]
        assert f"kho {name}" in flat
    for name in set(TASKS) - set(COMMANDS):
        assert f"kho {name} " not in flat, "the help shows only existing commands"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_calls_that_parse(name: str) -> None:
    words = shlex.split(TASKS[name][1])
    cli.commands[name].make_context(name, words[2:])


def test_links_have_targets() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (DOCS / target).exists(), f"{page.name}: {target}"


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_man_renders_the_manual_pages_without_warnings() -> None:
    for page in sorted(MAN.glob("*.1")):
        done = subprocess.run(["man", "--warnings", "-l", str(page)], capture_output=True, text=True, check=True)
        assert done.stderr == "", page.name
