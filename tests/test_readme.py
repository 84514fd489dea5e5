"""The blocks of README.md, run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LIVE = [block for block in BLOCKS if "kho.live" in block]
OTHERS = [block for block in BLOCKS if block not in LIVE]
DIES = "import builtins, os; builtins.print = lambda *_: os.kill(os.getpid(), 9)\n"


def ran(program: str, here: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a new user would, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=here, capture_output=True, text=True, timeout=120
    )


def test_the_blocks_run_one_after_the_other_and_say_what_they_do(tmp_path: Path) -> None:
    # A comment at the end of an expression is its value.
    program = "".join(OTHERS)
    shown = re.findall(r"^([^\s#].*?)  # (b'.*?'|\(.*\))(?:;.*)?$", program, re.MULTILINE)
    assert len(shown) >= 3
    for expression, value in shown:
        program = program.replace(f"{expression}  #", f"assert (({expression}) == ({value})), {expression!r}  #")
    done = ran(program, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_next_process_finds_the_arrays_also_after_kill_9(tmp_path: Path, runtime: Path) -> None:
    (block,) = LIVE
    first, later = re.findall(r"prints `(.*?)`, every later one `(.*?)`", README)[0]
    outputs = [ran(block, tmp_path).stdout, ran(block, tmp_path).stdout]
    assert outputs == [f"{first}\n", f"{later}\n"]
    killed = ran(DIES + block, tmp_path)
    assert (killed.returncode, killed.stdout) == (-9, "")
    done = ran(block, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{later}\n", "")
    release = re.findall(r"`(kho release [^`]*)`", README)[0].split()
    subprocess.run([sys.executable, "-m", *release, "--yes"], check=True, capture_output=True, timeout=60)
    assert list(runtime.glob("kho/*.live")) == []


def test_a_process_that_is_killed_as_it_fills_the_arrays_leaves_none(tmp_path: Path) -> None:
    (block,) = LIVE
    killed = ran(block.replace("h.commit()", "__import__('os').kill(__import__('os').getpid(), 9)"), tmp_path)
    assert killed.returncode == -9
    assert ran(block, tmp_path).stdout.startswith("new ")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs at /dev/shm")
def test_without_a_runtime_directory_of_systemd_the_arrays_are_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = LIVE
    name = f"readme-{os.getpid()}"
    monkeypatch.delenv("KHO_LIVE_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # not on tmpfs, usually
    block = block.replace("search-index", name)
    try:
        assert [ran(block, tmp_path).stdout.split()[0] for _ in range(2)] == ["new", "file"]
    finally:
        command = [sys.executable, "-m", "kho", "release", name, "--yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
