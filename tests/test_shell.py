"""Manual pages and completions: what the shells and the readers of pages make of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import click
import pytest

from kho.cli import cli

ROOT = Path(__file__).parent.parent
SHARE = ROOT / "wheel-data" / "data" / "share"
PAGES = sorted((SHARE / "man" / "man1").glob("*.1"))
BASH = SHARE / "bash-completion/completions/kho"
FISH = SHARE / "fish/vendor_completions.d/kho.fish"
ZSH = SHARE / "zsh/site-functions/_kho"
NAMES = [path.relative_to(SHARE) for path in (BASH, FISH, ZSH, *PAGES)]


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"no {program}")


def test_every_page_has_the_sections_of_a_manual_page() -> None:
    assert len(PAGES) == len(cli.commands) + 1
    for page in PAGES:
        sections = re.findall(r"^\.SH (.*)$", page.read_text(), re.MULTILINE)
        wanted = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "SEE ALSO"]
        assert [name for name in sections if name in wanted] == wanted, page.name


def test_the_exit_status_of_a_page_is_that_of_the_help() -> None:
    for name, command in cli.commands.items():
        text = (SHARE / "man/man1" / f"kho-{name}.1").read_text()
        codes = re.findall(r"^\\fB([0-9]+)(?: \+ N)?\\fR$", text.partition(".SH EXIT STATUS")[2], re.MULTILINE)
        first = re.search(r"Exit codes: (.*?)(?:\. |\Z)", " ".join((command.help or "").split()))
        assert first is not None
        assert codes == re.findall(r"(?:^|[,;] )([0-9]+)(?: \+ N)? ", first[1]), name


def test_see_also_names_pages_that_exist() -> None:
    names = {page.stem for page in PAGES}
    for page in PAGES:
        also = page.read_text().partition(".SH SEE ALSO")[2].replace("\\-", "-")
        for name in re.findall(r"^\.BR (kho\S*) \(1\)", also, re.MULTILINE):
            assert name in names - {page.stem}, page.name


@needs("mandoc")
def test_mandoc_finds_nothing_wrong_with_a_page() -> None:
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", *PAGES], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs("groff")
def test_groff_finds_nothing_wrong_with_a_page() -> None:
    for page in PAGES:
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", page], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), page.name


def completed(words: list[str]) -> list[str]:
    """What bash completes; no answer of the function means file names."""
    script = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _kho; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script, BASH, *words], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.split("\n") if line]


@needs("bash")
def test_bash_completes_commands_options_and_choices() -> None:
    assert completed(["kho", ""]) == [*cli.commands, "--help", "--version"]
    assert completed(["kho", "ins"]) == ["inspect"]
    assert completed(["kho", "fdt", "--numbers", "n"]) == ["native"]
    for name, command in cli.commands.items():
        params = [param for param in command.params if isinstance(param, click.Option)]
        opts = {opt for param in params for opt in [*param.opts, *param.secondary_opts]}
        assert set(completed(["kho", name, "-"])) == opts | {"-h", "--help"}, name
    assert completed(["kho", "inspect", "tests/d"]) == []
    subprocess.run(["bash", "-n", BASH], check=True)


@needs("fish")
def test_fish_completes_commands_options_and_choices(tmp_path: Path) -> None:
    def asked(line: str) -> list[str]:
        env = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
        script = f"source {FISH}; complete -C {line!r}"
        done = subprocess.run(["fish", "-N", "-c", script], capture_output=True, text=True, check=True, env=env)
        return [answer.split("\t")[0] for answer in done.stdout.splitlines()]

    assert asked("kho ins") == ["inspect"]
    assert sorted(asked("kho fdt --numbers ")) == ["auto", "cells", "native"]
    assert asked("kho release --fo") == ["--force"]


@needs("zsh")
def test_zsh_reads_the_completion_which_has_every_option() -> None:
    subprocess.run(["zsh", "-n", ZSH], check=True)
    text = ZSH.read_text()
    for name, command in cli.commands.items():
        case = text.partition(f"        {name})\n")[2].partition(";;")[0]
        for param in command.params:
            if isinstance(param, click.Option):
                assert all(f"{opt}[" in case for opt in param.opts), name


def test_an_installed_wheel_has_the_pages_and_the_completions() -> None:
    files = metadata.files("kho") or []
    if not any(file.name.startswith("_kho.") for file in files):
        pytest.skip("an editable installation")
    shared = {str(file).partition("share/")[2]: file for file in files if "share/" in str(file)}
    assert set(shared) == {str(name) for name in NAMES}
    for name, file in shared.items():
        assert Path(str(file.locate())).read_bytes() == (SHARE / name).read_bytes()
