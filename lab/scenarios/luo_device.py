"""kho.luo and the live update device, request by request over three kernels, held against tests/data/luo.

`python -m lab --only luo_device --record` writes the answers to tests/data/luo/VERSION.json instead of comparing them;
`make test` compares the fake device, kho.luo and docs/luo.md with these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from lab import Claim, Console, Lab
from lab.claims import LabError
from lab.initramfs import GUEST

from .images import release

DATA = Path(__file__).parents[2] / "tests/data/luo"
DOCS = Path(__file__).parents[2] / "docs/luo.md"
BEGIN, END = "<!-- lab: luo_device -->\n\n", "\n<!-- end -->\n"
"""Around the table in docs/luo.md."""
APPEND = "kho=on liveupdate=on kho_scratch=32M,320M,32M retain_initrd lab=luo_device.py loglevel=1"
FIRST = (6, 19)
"""The first version with a device."""
Recorded = dict[tuple[int, str], dict[str, Any]]
"""A kernel's answers by phase and request."""


def records(console: list[str]) -> list[dict[str, Any]]:
    """The records on a console; printk may have written after one of them."""
    decoder = json.JSONDecoder()
    return [decoder.raw_decode(line)[0] for line in console if line.startswith("{")]


def differences(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """Records that are not the same in both, one line each."""
    before = {(one["phase"], one["what"]): one for one in old}
    after = {(one["phase"], one["what"]): one for one in new}
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        one, other = before.get(key), after.get(key)
        if one != other:
            parts = ["-" if this is None else f"{this['answer']} {this['ioctls']}" for this in (one, other)]
            found.append(f"kernel {key[0]}, {key[1]}: recorded {parts[0]}, now {parts[1]}")
    return found


def unknown(every: Mapping[str, Recorded], made: list[dict[str, Any]]) -> list[str]:
    """Of a kernel without a record: answers that no other gave, and requests that were not made; a line each."""
    found = []
    for one in made:
        key = one["phase"], one["what"]
        answers = [version[key] for version in every.values() if key in version]
        if one not in answers:
            others = ", ".join(dict.fromkeys(f"{other['answer']} {other['ioctls']}" for other in answers))
            found.append(f"kernel {key[0]}, {key[1]}: recorded {others or '-'}, now {one['answer']} {one['ioctls']}")
    made_keys = {(one["phase"], one["what"]) for one in made}
    always = set.intersection(*(set(version) for version in every.values()))
    return found + [f"kernel {phase}, {what}: the request was not made" for phase, what in sorted(always - made_keys)]


def recorded() -> dict[str, Recorded]:
    """The recorded answers by version, newest first, and by phase and request."""
    files = sorted(DATA.glob("*.json"), key=lambda path: [int(part) for part in path.stem.split(".")], reverse=True)
    found = {}
    for path in files:
        data = json.loads(path.read_text())
        found[data["kernel"]] = {(one["phase"], one["what"]): one for one in data["records"]}
    return found


def documented() -> str:
    """The table of docs/luo.md: the requests whose answers differ between kernels."""
    every = recorded()
    keys = list(dict.fromkeys(key for answers in every.values() for key in answers))
    lines = ["| kernel | request | " + " | ".join(every) + " |", "|---" * (2 + len(every)) + "|"]
    for key in keys:
        answers = [answer_of(version.get(key)) for version in every.values()]
        if len(set(answers)) > 1:
            cells = " | ".join(cell.replace("|", "\\|") for cell in shortened(answers))
            lines.append(f"| {key[0]} | {key[1]} | {cells} |")
    return "\n".join(lines) + "\n"


def answer_of(record: dict[str, Any] | None) -> str:
    """An answer as text."""
    return "not asked" if record is None else str(record["answer"])


def shortened(answers: list[str]) -> list[str]:
    """Answers, without the words that are the same in all of them, where they have as many words."""
    words = [answer.split() for answer in answers]
    if len({len(one) for one in words}) > 1 or len(words[0]) < 3:
        return answers
    differ = [i for i in range(len(words[0])) if len({one[i] for one in words}) > 1]
    return [" ".join(" ".join(one[max(i - 1, 0) : i + 1]) for i in differ) for one in words]


def run(lab: Lab) -> Iterator[Claim]:
    """Make the same requests of every kernel that has the device, two guests at a time."""
    versions = [version for version in lab.versions if release(version) >= FIRST]
    for version, console in zip(versions, lab.side_by_side(partial(asked, lab), versions), strict=True):
        made = records(console.lines("R "))
        ended = console.lines("END ")
        text = "the device answers three kernels' requests, the guest ends by itself"
        held = ended == ["1", "2", "3"]
        evidence = f"{len(made)} records" if held else f"{len(made)} records\n{console.tail(25)}"
        yield Claim(text, version, "x86_64", held, evidence)
        path = DATA / f"{version}.json"
        if lab.record:
            if ended != ["1", "2", "3"]:
                raise LabError(f"{path}: not recorded, as the run is incomplete; see {console.path}")
            write(path, version, made)
            text = DOCS.read_text()
            head, _, rest = text.partition(BEGIN)
            DOCS.write_text(head + BEGIN + documented() + END + rest.partition(END)[2])
        if path.exists():
            text = "every answer of the device, of kho.luo and of the files that came back is the recorded one"
            wrong = differences(json.loads(path.read_text())["records"], made)
        else:
            text = "every answer of the device and of kho.luo is one that a recorded kernel gave"
            wrong = unknown(recorded(), made)
            wrong += [f"{path} is not there; --record makes it"] if wrong else []
        yield Claim(text, version, "x86_64", not wrong, "\n".join(wrong) or f"{len(made)} answers")


def asked(lab: Lab, version: str) -> Console:
    """Make the requests of a kernel, and of the two that it starts."""
    kernel = lab.kernel(version)
    initrd = lab.python_initramfs([GUEST / "luo_device.py", GUEST / "kexec.py"], {"next": kernel})
    return lab.boot(kernel, initrd, f"{APPEND} phase=1", timeout=1500)


def write(path: Path, version: str, made: list[dict[str, Any]]) -> None:
    """Record the answers, a line each."""
    head = {"kernel": version, "arch": "x86_64", "date": datetime.now(UTC).date().isoformat()}
    lines = ",\n".join(f"  {json.dumps(one)}" for one in made)
    fields = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{fields} "records": [\n{lines}\n ]\n}}\n')
