"""Workflows and the action of this repository: they are well formed, and what they run is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ACTION = ROOT / ".github/actions/verify/action.yml"
CAPTURES = ROOT / "tests/data"

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="not a clone")


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="no actionlint")
def test_actionlint_finds_nothing_wrong() -> None:
    # Which release of an action is old depends on the date; a linter of today may know newer ones.
    done = subprocess.run(
        ["actionlint", "-ignore", "is deprecated in GitHub Actions", *WORKFLOWS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_target_that_a_workflow_makes_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made: set[str] = set()
    for workflow in WORKFLOWS:
        for line in re.findall(r"run: (make .*)", workflow.read_text()):
            made |= set(line.split()[1:2])
    assert made <= targets
    assert {"check", "test-rust", "test-python", "wheel-check", "wheels", "site", "lab", "release-check"} <= made


def test_a_step_of_a_job_builds_and_tests_by_the_makefile_alone() -> None:
    # Installing programs of the system, and publishing, are a job's own.
    own = re.compile(r"(make |gh release create |\|$)")
    for workflow in WORKFLOWS:
        for line in re.findall(r"^ +(?:- )?run: (.*)$", workflow.read_text(), re.MULTILINE):
            assert own.match(line), f"{workflow.name}: {line}"


def script() -> str:
    """The last step of the action, as bash gets it."""
    text = ACTION.read_text().rpartition("      run: |\n")[2]
    return "".join(line.removeprefix("        ") for line in text.splitlines(keepends=True))


def ran(tmp_path: Path, source: str, **inputs: str) -> subprocess.CompletedProcess[str]:
    """Run the action as a runner does: `bash -eo pipefail`."""
    (tmp_path / "kho").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kho "$@"\n')
    (tmp_path / "kho").chmod(0o755)
    given = {"SOURCE": source, "KERNEL": "", "COMPAT": "", "SARIF": str(tmp_path / "kho.sarif")} | inputs
    env = {**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script()]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_the_action_passes_a_good_handover_and_writes_its_findings(tmp_path: Path) -> None:
    done = ran(tmp_path, str(CAPTURES / "linux-7.3.4-x86_64/handover.elf"))
    assert done.returncode == 0, done.stderr
    assert "sarif-schema-2.1.0" in (tmp_path / "kho.sarif").read_text()
    assert "kho-v4 handover" in done.stdout


@pytest.mark.parametrize("inputs", [{"KERNEL": "6.17"}, {"COMPAT": "6.17"}], ids=["kernel", "compat"])
def test_the_action_fails_if_the_kernel_does_not_take_it(tmp_path: Path, inputs: dict[str, str]) -> None:
    done = ran(tmp_path, str(CAPTURES / "linux-7.3.4-x86_64/handover.elf"), **inputs)
    assert done.returncode == 1, done.stderr


def test_the_action_fails_for_what_is_no_handover(tmp_path: Path) -> None:
    done = ran(tmp_path, str(CAPTURES / "README.md"))
    assert done.returncode == 2
