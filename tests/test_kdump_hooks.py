"""The scripts of contrib/kdump save a handover next to the dump, and never keep the dump from being taken."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kho

import captures
from filtered import kernel_dump

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


def test_the_dracut_module_takes_every_program_of_the_script_along() -> None:
    words = set(re.findall(r"[a-z]+", re.sub(r"#.*", "", SAVE.read_text())))
    programs = {
        "timeout",
        "df",
        "awk",
        "tail",
        "date",
        "chmod",
        "mkdir",
        "mv",
        "rm",
        "sync",
        "cat",
        "cp",
        "ls",
        "find",
        "stat",
        "sed",
    }
    (listed,) = re.findall(r"inst_multiple ([a-z ]+)$", MODULE.read_text(), re.MULTILINE)
    assert set(listed.split()) == words & programs


DRACUT = Path(os.environ.get("KHO_TEST_DRACUT", "/usr/lib/dracut"))
"""The directory of dracut's modules."""


@pytest.mark.skipif(
    not (DRACUT / "dracut-init.sh").exists(), reason="dracut is not installed: apt-get install dracut-core"
)
def test_dracut_builds_an_initramfs_in_which_kho_saves_the_handover(tmp_path: Path) -> None:
    """The whole module, next to an empty one of the name that kdump-utils has. In its root, as root, the hook runs."""
    base = tmp_path / "dracut"
    shutil.copytree(DRACUT, base, ignore=shutil.ignore_patterns("modules.d"))
    module, needed = base / "modules.d" / "99kho", base / "modules.d" / "98kdumpbase"
    for made in (module, needed):
        made.mkdir(parents=True)
    for file in (MODULE, SAVE):
        shutil.copy2(file, module)
    (needed / "module-setup.sh").write_text(
        "#!/bin/bash\ncheck() { return 255; }\ndepends() { :; }\ninstall() { :; }\n"
    )
    (needed / "module-setup.sh").chmod(0o755)
    (tmp_path / "conf").mkdir()
    command = shutil.which("dracut") or DRACUT.parents[1] / "bin" / "dracut"
    options = ["--no-kernel", "--no-hostonly", "--nostrip", "--nohardlink", "--force", "--no-compress", "-m", "kho"]
    places = ["--conf", os.devnull, "--confdir", str(tmp_path / "conf"), "--tmpdir", str(tmp_path)]
    env = {"dracutbasedir": str(base), "DRACUT_INSTALL": str(base / "dracut-install"), "KHO": str(KHO)}
    image = tmp_path / "initrd"
    done = subprocess.run(
        ["bash", str(command), *options, *places, str(image)],
        env=env | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "Including module: kho" in done.stdout + done.stderr
    root = tmp_path / "root"
    root.mkdir()
    with image.open("rb") as packed:
        subprocess.run(["cpio", "-idm", "--quiet"], cwd=root, stdin=packed, check=True, timeout=120)
    hook = root / "etc" / "kdump" / "pre.d" / "kho-save"
    assert hook.read_bytes() == SAVE.read_bytes()
    assert os.access(hook, os.X_OK)
    if os.geteuid() != 0:
        return
    shutil.copy2(VMCORE, root / "vmcore")
    (root / "var" / "crash").mkdir(parents=True, exist_ok=True)
    settings = {"KHO": str(KHO), "KHO_VMCORE": "/vmcore", "KHO_CONTENTS": "yes", "KHO_RESERVE": "0"}
    ran = subprocess.run(
        ["chroot", root, shutil.which("sh") or "/bin/sh", "/etc/kdump/pre.d/kho-save"],
        env=settings | {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0
    (made,) = (root / "var" / "crash").glob("kho-*")
    assert json.loads((made / "inspect.json").read_text())["luo"]["sessions"][0]["name"] == "vm-1", ran.stderr
    assert (made / "contents" / "sessions" / "vm-1" / "0x10").is_file()


KDUMP_CONFIG = Path(os.environ.get("KHO_TEST_KDUMP_CONFIG", "/usr/sbin/kdump-config"))
"""The script of kdump-tools that saves a dump."""


@pytest.mark.skipif(
    not KDUMP_CONFIG.exists() or shutil.which("makedumpfile") is None,
    reason="kdump-tools is not installed: apt-get install kdump-tools",
)
def test_kdump_tools_writes_its_dump_next_to_what_was_saved_before(tmp_path: Path) -> None:
    """What the units do with the drop-in: the script, then `kdump-config savecore`, of another file than /proc's."""
    name = "linux-6.18.15-x86_64"
    core = tmp_path / "core"
    runs = captures.contents(name)
    pages = {phys + at: data[at : at + 4096] for phys, data in runs for at in range(0, len(data), 4096)}
    core.write_bytes(kernel_dump(pages, {}))
    folder = tmp_path / "crash"
    folder.mkdir()
    made, said = save(folder, KHO_VMCORE=core)
    assert made is not None, said
    script = KDUMP_CONFIG.read_text().replace("vmcore_file=/proc/vmcore", f"vmcore_file={core}")
    assert str(core) in script
    (tmp_path / "kdump-config").write_text(script)
    env = {"PATH": os.environ["PATH"], "KDUMP_COREDIR": str(folder), "KDUMP_DUMP_DMESG": "0"}
    done = subprocess.run(
        ["sh", tmp_path / "kdump-config", "savecore"], env=env, capture_output=True, text=True, timeout=300
    )
    (dump,) = (file for file in folder.glob("*/dump.*") if file.is_file())
    report = json.loads((made / "inspect.json").read_text())
    assert kho.open(dump).fdt_phys == report["fdt_phys"], done.stdout + done.stderr
