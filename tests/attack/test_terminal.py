"""The text output of every command consists of plain lines, whatever names memory, files and logs contain.

Each string field of every decoder is overwritten, in the bytes of an image, with characters that terminals interpret.
Then every command prints the image, without a terminal and with forced styles. The only control characters in the
output are line ends and the command's own styles, and the number of lines does not depend on names.
"""

from __future__ import annotations

import ast
import os
import re
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import kho
import kho.live
from kho.cli import output
from kho.live.handover.registry import Holding
from kho.text import printable

import doctor_hosts
from command import Done
from command import kho as run

PACKAGE = Path(kho.__file__).parent
STYLE = re.compile(r"\x1b\[[0-9;]*m")
OWN = re.compile(r"\x1b\[(?:0|1|2|3[0-7]|1;3[0-7]|2;3[0-7]|9[0-7])?m")
"""Escape sequences of the command's own styles."""

EVIL = [
    b"\x1b[38;5;196m",
    b"\x1b]0;owned\x07",
    b"\x1b[2J",
    b"\x07",
    b"\r",
    b"\n",
    b"\nvm-9  0x99",
    b"\x0b\x0c",
    b"\x7f",
    b"\t",
    "\x9b31m".encode(),
    "\x85".encode(),
    b"\x9b31m",
    b"\xed\xa0\x80",
    b"\xff\xfe",
    "\u202e".encode(),
    "\u2066\u2069".encode(),
    "\u200b\u200d\ufeff".encode(),
    "\u2028\u2029".encode(),
    ("a" + "\u0301" * 9).encode(),
    "\u3164\ufe0f".encode(),
    "\U000e0041".encode(),
    b"[red]x[/red]",
    b":boom:",
    b"%s{0}",
    "\u6f22\u5b57".encode(),
]


def evil(random: Random, room: int) -> bytes:
    """Hostile text of exactly `room` bytes, without NUL."""
    made = b""
    while len(made) < room:
        part = random.choice(EVIL) if random.random() < 0.7 else bytes([random.choice(b"abc/.-_\"'<>&\\")])
        made += part if len(made) + len(part) <= room else b"x" * (room - len(made))
    return made


def fields() -> tuple[bytes, list[bytes]]:
    """An image with a payload of every producer, and the bytes of each string in it; all strings differ."""
    names = [f"Field{i:02}qqqqqqqqqqqqq".encode() for i in range(12)]
    text = [name.decode() for name in names]
    arena = kho.Arena(64 << 20, scratch="1M,1M,1M")
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd(text[0], 2**64 - 1, b"guest" * 100)
    out.add_file(text[1], 7, text[2], 0xFFFFFFFFFFFF0000)
    out.add_flb(text[3], 0xFEEDF00DCAFEBEE0, 1)
    out.add_reserve_mem(text[4], 8192)
    out.set_kexec_metadata(text[5], 3)
    out.add_subtree(text[6], b"no tree")
    tree = kho.fdt.Writer()
    with tree.node():
        tree.property("compatible", names[7] + b"\0")
        tree.property(text[8], b"\1\2\3\4")
        with tree.node(text[9]):
            tree.property("text", names[10] + b"\0")
    out.add_subtree("tree", tree.finish())
    out.add_kho_test([arena.alloc()])
    out.finalize()
    path = Path(os.environ["KHO_TEST_SCRATCH"]) / "made.elf"
    out.save(path)
    image = path.read_bytes()
    found = [name for name in names if name in image]
    assert len(found) == 11
    return image, found


def live_image(folder: Path) -> tuple[bytes, list[bytes]]:
    """An image of a service, and the strings in it."""
    names = [f"Live{i:02}qqqqqqqqqqqqqq" for i in range(3)]
    with kho.live.open(names[0], size="1M", version=names[1], backing=folder / "live") as handle:
        handle.put(names[2], b"x" * 100)
        handle.commit()
    image = (folder / "live").read_bytes()
    return image, [name.encode() for name in names if name.encode() in image]


def shape(data: Any) -> Any:
    """The structure of data without its strings."""
    if isinstance(data, dict):
        return [shape(value) for value in data.values()]
    if isinstance(data, list):
        return [shape(each) for each in data]
    return type(data).__name__


def plain(done: Done, what: object) -> None:
    """Check that the output of a run contains only lines and the command's own styles."""
    for text in (done.out, done.err):
        for style in STYLE.findall(text):
            assert OWN.fullmatch(style), (what, style)
        rest = STYLE.sub("", text)
        bad = [
            char
            for line in rest.split("\n")
            for char in line.lstrip("\t")  # devicetree source is indented by tabs
            if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        ]
        assert not bad, (what, bad, rest)
    assert "Traceback" not in done.err, (what, done.err)


def commands(image: Path, folder: Path) -> Iterator[tuple[tuple[object, ...], tuple[object, ...] | None]]:
    """The arguments of every command on an image, and those that print the same as JSON."""
    yield ("inspect", image), ("inspect", "--json", image)
    yield ("inspect", "--full", image), ("inspect", "--full", "--json", image)
    yield ("inspect", "--python", image), None
    yield ("verify", image), ("verify", "--json", image)
    yield ("owners", image), ("owners", "--json", image)
    yield ("map", image), ("map", "--json", image)
    yield ("fdt", "--all", image), ("fdt", "--all", "--json", image)
    yield ("diff", image, folder / "plain.elf"), ("diff", "--json", image, folder / "plain.elf")
    yield ("extract", "--all", folder / f"out-{time.monotonic_ns()}", image), None
    yield ("convert", image, "--abi", "kho-v4", "-o", folder / "converted.elf"), None


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for images."""
    monkeypatch.setenv("KHO_TEST_SCRATCH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("styled", ["", "1"])
def test_every_command_prints_every_field_as_plain_lines(
    styled: str, scratch: Path, attack_seconds: float, attack_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if styled:
        monkeypatch.setenv("FORCE_COLOR", styled)
    handover, names = fields()
    service, live_names = live_image(scratch)
    (scratch / "plain.elf").write_bytes(handover)
    shapes: dict[tuple[int, object, str], int] = {}
    until = time.monotonic() + attack_seconds / 2
    number = 0
    while time.monotonic() < until or number < 2:
        random = Random(f"{attack_seed} {number}")
        source, texts = (service, live_names) if number % 5 == 4 else (handover, names)
        image = source
        for name in texts if number % 3 == 0 else random.sample(texts, 1):
            image = image.replace(name, evil(random, len(name)))
        path = scratch / (os.fsdecode(b"f" + evil(random, 20).replace(b"/", b"_")) if number % 2 else "image")
        path.write_bytes(image)
        for words, data in commands(path, scratch):
            done = run(*words)
            plain(done, (attack_seed, number, words))
            if data is None or done.code == 2:
                continue
            told = run(*data)
            assert told.out.isascii()
            assert "\x7f" not in told.out
            # The number of lines is the same for all names in the same structure.
            key = (number % 5 == 4, repr(shape(told.json)), str(words[:2] if words[0] == "inspect" else words[0]))
            lines = done.out.count("\n")
            if words[0] not in ("map", "fdt", "diff"):
                assert shapes.setdefault(key, lines) == lines, (attack_seed, number, words, done.out)
        path.unlink()
        number += 1


def test_doctor_prints_logs_and_trees_as_plain_lines(
    tmp_path: Path, attack_seconds: float, attack_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = time.monotonic() + attack_seconds / 4
    number = 0
    while time.monotonic() < until or number < 2:
        random = Random(f"doctor {attack_seed} {number}")
        monkeypatch.setenv("FORCE_COLOR", "1") if number % 2 else monkeypatch.delenv("FORCE_COLOR", raising=False)
        tree = doctor_hosts.copied("default-scratch", tmp_path / str(number))
        for file in random.sample(["proc/cmdline", "proc/version", "var/log/dmesg", "proc/meminfo", "proc/iomem"], 3):
            path = tree / file
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            at = random.randrange(len(content) + 1)
            path.write_bytes(content[:at] + evil(random, 30) + b" kho=on " + evil(random, 20) + content[at:])
        named = tree.rename(tree.parent / os.fsdecode(b"t" + evil(random, 20).replace(b"/", b"_")))
        for words in (
            ("doctor", named),
            ("doctor", named, tmp_path),
            ("doctor", "--csv", named),
            ("doctor", "--prometheus", named, tmp_path),
            ("doctor", "--what-if", "kho=on kho_scratch=\x1b[31m", named),
            ("doctor", "--what-if", "kho=off", named),
        ):
            plain(run(*words), (attack_seed, number, words))
        number += 1


def test_arguments_are_printed_as_plain_lines(attack_seed: int, tmp_path: Path) -> None:
    random = Random(f"typed {attack_seed}")
    for number in range(20):
        word = os.fsdecode(evil(random, 24))
        for words in (
            ("inspect", word),
            ("inspect", f"{word}@{word}"),
            ("inspect", f"--{word}"),
            (word,),
            ("verify", "--explain", word),
            ("verify", "--scratch", word, "x"),
            ("fdt", "--numbers", word, "x"),
            ("doctor", "--explain", word),
            ("plan", "--memory", word),
            ("plan", "--memory", "1G", "--folios", word),
            ("plan", "--memory", "1G", "--folios", "1x4K", "--scratch", word, "--no-calibrate"),
            ("simulate", "--memory", "1G", "--abi", word),
            ("convert", word, "--abi", word, "-o", tmp_path / "x"),
            ("diff", word, word),
            ("extract", word, "--subtree", word, "-o", word),
            ("map", word, "-o", word),
            ("release", word),
            ("release", "--yes", word.replace("/", "_")),
            ("hold", word, "--size", word, "--", "true"),
        ):
            done = run(*words)
            plain(done, (attack_seed, number, words))
            assert done.code in (1, 2) or words[0] in ("hold", "plan"), words
            assert len(done.err.splitlines()) <= 6, (words, done.err)


def test_ps_prints_services_as_plain_lines(attack_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(f"ps {attack_seed}")
    for _ in range(20):
        word = [evil(random, 60).decode(errors="surrogateescape") for _ in range(5)]
        row = Holding(word[0], 1, 0, word[1], word[2], word[3], 1, 2, 3, 4, 5.0, None, word[4])
        monkeypatch.setattr("kho.cli.ps.holdings", lambda row=row: [row, row])
        done = run("ps")
        plain(done, word)
        assert done.out.count("\n") == 3


def test_only_unprintable_characters_are_escaped() -> None:
    for text in ("vm-1", "", "\u00e9t\u00e9", "\u6f22\u5b57", "e\u0301", "a b", "C:\\x", "\U0001f600"):
        assert printable(text) == text
    for code in range(0x110000):
        shown = printable(chr(code))
        assert shown.isprintable(), hex(code)
        assert printable(shown) == shown
    assert printable("\x1b[1m\n\udcff") == "\\x1b[1m\\n\\udcff"
    assert printable("x" * 100, 10) == "x" * 10 + "... (90 more characters)"


def test_long_text_is_cut() -> None:
    assert len(printable("\u202e" * 10**6, output.LINE)) < 7 * output.LINE


PRINTING = {"print", "echo", "secho", "echo_via_pager", "confirm", "prompt", "pause", "Console", "getLogger"}
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}
ALLOWED = {
    ("cli/output.py", None),
    ("doctor/fdstore.py", "stdout"),  # what systemctl printed
    ("fleet.py", "getLogger"),
    ("sources.py", "getLogger"),  # the application's choice what is shown, and how
    ("live/transports/holder.py", "print"),  # the default log function of `Holder`; the command passes output.line
    ("live/transports/holder.py", "stderr"),
}


def test_no_other_module_prints() -> None:
    """A new command that does not print through cli/output.py fails this test."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            used = None
            if isinstance(node, ast.Call):
                called = node.func
                used = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
                of_output = isinstance(called, ast.Attribute) and getattr(called.value, "id", None) == "output"
                used = used if used in PRINTING and not of_output else None
            elif isinstance(node, ast.Attribute) and node.attr in STREAMS:
                used = node.attr
            elif isinstance(node, ast.ImportFrom | ast.Import) and name.startswith("cli/"):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                used = next((m for m in modules if m.split(".")[0] == "rich" and m != "rich.cells"), None)
            if used and (name, None) not in ALLOWED and (name, used) not in ALLOWED:
                found.append(f"{name}:{getattr(node, 'lineno', 0)}: {used}")
    assert found == []
