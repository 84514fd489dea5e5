"""The fake device and kho.luo, held against what real devices answered: tests/data/luo, which `lab` records."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab.scenarios import luo_device

from kho import luo

HERE = Path(__file__).parent
DATA = HERE / "data/luo"
GUEST = HERE.parent / "lab/guest"
DOCS = HERE.parent / "docs/luo.md"
VERSIONS = sorted((path.stem for path in DATA.glob("*.json")), key=lambda name: [int(n) for n in name.split(".")])
NEWEST = VERSIONS[-1]
REAL = "x "
"""What the names of records of the real device alone begin with."""

RUN = """
import json, sys, tempfile, warnings
warnings.simplefilter("ignore")
sys.path[:0] = sys.argv[1:3]
import fake_luo, luo_device
records = []
with fake_luo.FakeLuo(tempfile.mkdtemp() + "/liveupdate") as machine:
    recorder = luo_device.Recorder(fake_luo.CLIENT, str(machine.path), real=False, out=records.append)
    for phase in range(1, luo_device.PHASES + 1):
        recorder.run(phase)
        if phase < luo_device.PHASES:
            machine.kexec()
print(json.dumps(records))
"""

Records = dict[tuple[int, str], tuple[Any, list[list[Any]]]]


def table(records: list[dict[str, Any]]) -> Records:
    found = {(one["phase"], one["what"]): (one["answer"], one["ioctls"]) for one in records}
    assert len(found) == len(records), "each has a name of its own"
    return found


@functools.cache
def recorded(version: str) -> Records:
    """What the device of a kernel answered."""
    return table(json.loads((DATA / f"{version}.json").read_text())["records"])


def test_a_kernel_without_a_record_is_held_to_the_answers_of_the_others() -> None:
    every = luo_device.recorded()
    between = every["7.1.13"]
    made = list(between.values())
    assert luo_device.unknown(every, made) == []
    at = next(i for i, one in enumerate(made) if one["what"] == "api: same token")
    changed = [*made[:at], made[at] | {"answer": "ok"}, *made[at + 2 :]]
    wrong = luo_device.unknown(every, changed)
    assert len(wrong) == 2
    assert wrong[0].startswith("kernel 1, api: same token: recorded ")
    assert wrong[1] == f"kernel 1, {made[at + 1]['what']}: the request was not made"


@functools.cache
def faked() -> Records:
    """What the fake answers to the same requests."""
    command = [sys.executable, "-c", RUN, str(HERE), str(GUEST)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return table(json.loads(done.stdout))


def test_the_records_name_their_kernel_and_its_date() -> None:
    for version in VERSIONS:
        data = json.loads((DATA / f"{version}.json").read_text())
        assert data["kernel"] == version
        assert data["arch"] == "x86_64"
        year, month, day = data["date"].split("-")
        assert int(year) >= 2026
        assert 1 <= int(month) <= 12
        assert 1 <= int(day) <= 31
        assert len(data["records"]) > 200


def test_the_fake_and_kho_luo_answer_each_request_as_the_newest_kernel_errno_by_errno() -> None:
    real = {key: value for key, value in recorded(NEWEST).items() if not key[1].startswith(REAL)}
    assert faked().keys() == real.keys()
    wrong = {key: (faked()[key], real[key]) for key in real if faked()[key] != real[key]}
    assert wrong == {}
    assert sum(len(ioctls) for _, ioctls in real.values()) > 190


def test_the_table_of_the_docs_is_that_of_the_records() -> None:
    text = DOCS.read_text()
    shown = text[text.index(luo_device.BEGIN) + len(luo_device.BEGIN) : text.index(luo_device.END)]
    assert shown == luo_device.documented(), "python -m lab --only luo_device --record writes it"


SEALED = [(2, f"take {0x100 + seals:#x}") for seals in (2, 4, 8, 0x1F)]
BOTH = [(1, "finish outgoing"), (1, "take from outgoing"), (2, "preserve on incoming")]


@pytest.mark.parametrize(
    ("row", "keys", "since"),
    [
        ("| before 7.2 | no GET_NAME |", [(1, "get name")], (7, 2, 0)),
        ("| before 7.1.5 | the direction of a session is not checked", BOTH[:2], (7, 1, 5)),
        ("| before 7.1.4 | an empty name is taken, one of 64 bytes is cut |", [(1, "create empty")], (7, 1, 4)),
        ("| 6.19, 7.0 | seals are lost, and none can be added (F_SEAL_SEAL);", SEALED, (7, 1, 0)),
    ],
)
def test_what_the_docs_say_of_older_kernels_is_what_they_answered(
    row: str, keys: list[tuple[int, str]], since: tuple[int, int, int]
) -> None:
    assert row in DOCS.read_text()
    for version in VERSIONS:
        number = tuple(int(part) for part in version.split("."))
        for key in keys:
            same = recorded(version)[key] == recorded(NEWEST)[key]
            assert same == (number >= since), (version, key, recorded(version)[key])


def test_what_the_docs_say_of_a_memfd_that_came_back_is_what_came_back() -> None:
    text = DOCS.read_text()
    answers = recorded(NEWEST)
    noexec, readonly = answers[2, "take 0x120"][0], answers[2, "take 0x9"][0]
    assert "restored sealed against writing (0x3e)" in " ".join(text.split())
    assert " seals 0x3e " in noexec
    assert answers[2, "write to 0x120"][0] == "EPERM"
    assert "A restored memfd has no name (`/ (deleted)`), mode 0777" in " ".join(text.split())
    assert answers[2, "x link of a retrieved file"][0] == "/ (deleted)"
    assert " mode 777 cloexec 1 flags 2 nlink 0 " in readonly
    assert "writing past the end, `ftruncate` and `fallocate` fail (EPERM)" in " ".join(text.split())
    refused = [what for phase, what in answers if what.startswith("preserved: ") and answers[phase, what][0] == "EPERM"]
    assert len(refused) == 7
    assert answers[1, "preserved: truncate same"][0] == "ok"
    assert "Seals that are added after PRESERVE_FD are lost" in " ".join(text.split())
    assert answers[1, "preserved: add seals"][0] == "(0, 2)"
    assert " seals 0x0 " in answers[2, "take 0x14"][0]


def test_a_user_who_may_only_read_the_device_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded(NEWEST)[1, "create through a device opened O_RDONLY"][0] == "ok"
    flags: list[int] = []

    def refused(path: str, how: int) -> int:
        flags.append(how)
        if how & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real("/dev/null", os.O_RDONLY)

    real = os.open
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refused)
        device = luo.Device("/dev/liveupdate")
    with device:
        assert flags == [os.O_RDWR | os.O_CLOEXEC, os.O_RDONLY | os.O_CLOEXEC]
