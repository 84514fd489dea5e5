"""The scripts of contrib/kdump save a handover next to the dump, and never keep the dump from being taken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import captures

CONTRIB = Path(__file__).resolve().parents[1] / "contrib" / "kdump"
SAVE = CONTRIB / "kho-save"
MODULE = CONTRIB / "dracut" / "99kho" / "module-setup.sh"
KHO = Path(sys.executable).with_name("kho")
VMCORE = captures.elf("linux-7.3.4-x86_64")


def save(folder: Path, **settings: object) -> tuple[Path | None, str]:
    """Run the script as a kdump kernel does; return the directory that it made, and its messages."""
    given = {"KHO_DIR": folder, "KHO": KHO, "KHO_VMCORE": VMCORE, "KHO_CONF": folder / "none", "KHO_RESERVE": 0}
    env = {"PATH": os.environ["PATH"]} | {name: str(value) for name, value in (given | settings).items()}
    done = subprocess.run(["sh", str(SAVE)], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    made = list(folder.glob("kho-*"))
    assert len(made) <= 1
    return (made[0] if made else None), done.stderr


def test_the_report_is_saved_and_contents_only_on_request(tmp_path: Path) -> None:
    made, said = save(tmp_path)
    assert made is not None
    assert made.stat().st_mode & 0o777 == 0o700
    report = json.loads((made / "inspect.json").read_text())
    assert report["luo"]["sessions"][0]["name"] == "vm-1"
    assert json.loads((made / "owners.json").read_text())["preserved_bytes"] == report["preserved_bytes"]
    assert not list(made.glob("contents*"))
    assert f"saved {made}/inspect.json" in said


def test_contents_are_those_of_the_memfds(tmp_path: Path) -> None:
    made, said = save(tmp_path, KHO_CONTENTS="yes")
    assert made is not None
    file = made / "contents" / "sessions" / "vm-1" / "0x10"
    expected = captures.expected("linux-7.3.4-x86_64")["luo"]["sessions"][0]["files"][0]["sha256"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == expected
    assert f"{expected}  {file}" in (made / "contents.sha256").read_text()
    assert f"saved {made}/contents" in said


def test_contents_that_would_leave_the_dump_no_room_are_not_saved(tmp_path: Path) -> None:
    made, said = save(tmp_path, KHO_CONTENTS="yes", KHO_RESERVE=1 << 50)
    assert made is not None
    assert not (made / "contents").exists()
    assert "contents not saved" in said


def test_a_file_has_the_settings(tmp_path: Path) -> None:
    conf = tmp_path / "kho-save.conf"
    conf.write_text(f"KHO_DIR='{tmp_path}/elsewhere'\nKHO_CONTENTS=yes\n")
    env = {"PATH": os.environ["PATH"], "KHO": str(KHO), "KHO_VMCORE": str(VMCORE), "KHO_CONF": str(conf)}
    subprocess.run(["sh", str(SAVE)], env=env | {"KHO_RESERVE": "0"}, check=True, timeout=120, capture_output=True)
    (made,) = (tmp_path / "elsewhere").glob("kho-*")
    assert (made / "contents" / "manifest.json").is_file()


def test_without_a_vmcore_nothing_is_written(tmp_path: Path) -> None:
    assert save(tmp_path, KHO_VMCORE=tmp_path / "none") == (None, "")
    (tmp_path / "empty").touch()
    assert save(tmp_path, KHO_VMCORE=tmp_path / "empty") == (None, "")


def test_the_dump_is_taken_whatever_fails(tmp_path: Path) -> None:
    assert "is not installed here" in save(tmp_path, KHO=tmp_path / "none")[1]
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho partial\necho broken >&2\nexit 2\n")
    failing.chmod(0o755)
    (tmp_path / "a").mkdir()
    made, said = save(tmp_path / "a", KHO=failing)
    assert made is not None
    assert not (made / "inspect.json").exists()
    assert not list(made.glob("*.part"))
    assert "failed with 2: broken" in said
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    (tmp_path / "b").mkdir()
    assert "failed with 124" in save(tmp_path / "b", KHO=slow, KHO_TIMEOUT=1)[1]
    (tmp_path / "file").touch()
    env = {"PATH": os.environ["PATH"], "KHO": str(KHO), "KHO_VMCORE": str(VMCORE), "KHO_DIR": str(tmp_path / "file")}
    done = subprocess.run(["sh", str(SAVE)], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "no directory to write to" in done.stderr) == (0, True)


def in_module(commands: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "KHO": str(KHO)}
    script = f". '{MODULE}'; {commands}"
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)


def test_the_initramfs_gets_kho_and_all_that_it_imports() -> None:
    done = in_module("kho_files")
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert files[0] == KHO
    assert [file for file in files if not file.exists()] == []
    names = {file.name for file in files}
    assert {"_kho.abi3.so", "os.py", "hashlib.py", "pyvenv.cfg"} <= names
    assert any("click" in file.parts for file in files)
    assert any("rich" in file.parts for file in files)
    assert not any("tkinter" in file.parts for file in files)


def test_the_module_installs_the_script_as_a_hook_that_runs_before_the_dump() -> None:
    fakes = 'inst() { echo "inst $1"; }; inst_multiple() { echo "multiple $*"; }; inst_script() { echo "script $*"; };'
    done = in_module(f"{fakes} moddir=/mods/99kho; install")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"inst {KHO}" in lines
    assert "script /mods/99kho/kho-save /etc/kdump/pre.d/kho-save" in lines
    assert in_module("check").returncode == 255


def test_the_drop_in_runs_the_script_before_the_dump_and_ignores_its_failure() -> None:
    assert "ExecStartPre=-/usr/local/sbin/kho-save" in (CONTRIB / "systemd" / "kho.conf").read_text().splitlines()


@pytest.mark.parametrize("script", [SAVE, MODULE], ids=lambda path: path.name)
def test_the_scripts_are_sound_shell(script: Path) -> None:
    shell = "sh" if script == SAVE else "bash"
    assert subprocess.run([shell, "-n", str(script)], capture_output=True).returncode == 0
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(KHO.parent))
    if shellcheck is not None:
        done = subprocess.run([shellcheck, "-s", shell, str(script)], capture_output=True, text=True)
        assert done.stdout == ""
