"""The lab's systemd scenario without its guest: units, versions, and the claims about what a guest recorded."""

from __future__ import annotations

import configparser
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import __main__ as command
from lab import bench
from lab.claims import LabError, SkipError
from lab.scenarios import systemd as scenario
from lab.systemd import disk, rootfs, units


def parsed(text: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    return unit


@pytest.mark.parametrize("service", units.SERVICES, ids=lambda service: str(service.name))
def test_each_unit_file_is_what_its_row_says(service: units.Service) -> None:
    unit = parsed(units.text(service))["Service"]
    assert unit.get("FileDescriptorStorePreserve") == service.preserve
    assert int(unit["FileDescriptorStoreMax"]) == service.store
    assert unit["Type"] == "notify"
    script = disk.GUEST / Path(unit["ExecStart"].split()[1]).name
    assert script.exists()


def test_every_service_is_started_in_the_first_boot_or_by_the_driver() -> None:
    driver = (disk.GUEST / "driver.py").read_text()
    for guest in units.GUESTS:
        lines = {int(line.split()[0]): line.split()[1:] for line in units.by_boot(guest).splitlines()}
        for service in units.SERVICES:
            if service.script == guest:
                assert f"{service.name}.service" in lines[1] or f'"{service.name}"' in driver


@pytest.mark.parametrize("preserve", ["no", "restart", "on-success", "yes"])
@pytest.mark.parametrize("script", ["plain", "live"])
def test_each_value_of_preserve_is_tried(script: str, preserve: str) -> None:
    assert any(each.script == script and each.preserve == preserve for each in units.SERVICES)


@pytest.mark.parametrize("tool", [*rootfs.TOOLS, "qemu-system-x86_64"])
def test_a_missing_tool_skips_the_scenario_and_names_the_package(
    tool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == tool else f"/usr/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(scenario, "ARCH", os.uname().machine)
    with pytest.raises(SkipError, match="apt-get install"):
        next(scenario.run(bench.Lab(tmp_path)))
    assert command.main(["--only", "systemd", "--cache", str(tmp_path)]) == 0
    assert "systemd: skipped: apt-get install" in capsys.readouterr().out


def test_another_user_than_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "as root" in (rootfs.missing() or "")


STATUS = """Package: systemd
Status: install ok installed
Version: 262.1-1
Description: system and service manager
 Version: 1

Package: perl-base
Version: 5.40

Package: kexec-tools
Version: 1:2.0.32-3
"""


def made(cache: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make the files with an mmdebstrap that only leaves what it would leave."""

    class Done:
        returncode = 0
        stderr = ""

    def run(words: list[str], **_: object) -> Done:
        [tar] = [word for word in words if word.endswith(".tar")]
        Path(tar).write_bytes(b"tar")
        [hook] = [word for word in words if "download" in word]
        Path(hook.split()[-1]).write_text(STATUS.replace("262.1-1", version))
        return Done()

    monkeypatch.setattr("lab.systemd.rootfs.subprocess.run", run)
    said: list[str] = []
    root = rootfs.make(cache, said.append)
    assert root.tar.read_bytes() == b"tar"
    assert root.versions == {"systemd": version, "kexec-tools": "1:2.0.32-3"}
    yield from said


def test_versions_other_than_the_recorded_ones_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list(made(tmp_path, "263.2-1", monkeypatch))
    assert any("systemd is 263.2-1 in sid now; the recorded results are those of 262.1-1" in line for line in said)
    assert not any(line.startswith("kexec-tools") for line in said)


def test_a_systemd_whose_store_crosses_no_kexec_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match="from 261 on"):
        list(made(tmp_path, "257.9-1", monkeypatch))


def test_records_that_are_missing_fail_every_claim() -> None:
    claims = list(scenario.claims(scenario.Run([], "", "7.3.4", {})))
    assert len(claims) > 30
    assert not [claim.text for claim in claims if claim.held]
    assert len({claim.text for claim in claims}) == len(claims)


def test_a_record_that_was_cut_short_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = json.dumps({"boot": 1, "who": "end"}) + '\n{"boot": 1, "wh'
    monkeypatch.setattr(disk, "file", lambda path, name: lines.encode())
    assert disk.records(tmp_path) == [{"boot": 1, "who": "end"}]
