"""scripts/words.py finds banned words, unknown options and wrong references to abi.md; the documents have none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from programs import script

ROOT = Path(__file__).parent.parent


words = script("words")
BANNED: dict[str, str]
ALLOWED: list[str]
BANNED, ALLOWED = words.table(words.STYLE.read_text())
COMMANDS: dict[str, set[str]] = words.manual(words.MAN)
PHRASES = sorted(BANNED)
LONG = next(phrase for phrase in PHRASES if " " in phrase)

# How a text stands in a file of each kind, and as what is not text there.
AS_TEXT = [
    (".py", "x = 1  # {}\n"),
    (".py", 'def f():\n    """First line.\n\n    {}\n    """\n'),
    (".py", 'raise ValueError(f"{{x}}: {}")\n'),
    (".py", "x = b'{}'\n"),
    (".rs", "let c = '\"'; // {}\n"),
    (".rs", "fn f<'a>(x: &'a str) {{}}\n/// {}\n"),
    (".rs", "//! {}\n"),
    (".rs", 'panic!("at {{}}:\\n{}");\n'),
    (".rs", 'let s = r#"a "quoted" {}"#;\n'),
    (".c", "/* {} */\nint x;\n"),
    (".sh", "#!/bin/sh\ntrue # {}\n"),
    (".md", "Some text, {}.\n"),
    (".md", "| a | {} |\n"),
    (".yml", "label: {}\n"),
]
AS_CODE = [
    (".py", "# The `{}` field.\n"),
    (".rs", "/// The `{}` field.\n"),
    (".py", "{} = 1\n"),
    (".rs", "let {} = '\"';\n"),
    (".sh", "{}=1\n"),
    (".md", "Some `{}` text.\n"),
    (".md", "Text:\n\n    $ {}\n\nText.\n"),
    (".md", "```console\n$ {}\n```\n"),
]


def found(suffix: str, source: str) -> list[tuple[int, str]]:
    return list(words.banned(words.TEXT[suffix](source), BANNED, ALLOWED))


def options(source: str, suffix: str = ".md", page: str | None = None) -> list[str]:
    return [what.split(":")[0] for _, what in words.unknown_options(source, suffix, COMMANDS, page)]


def references(source: str) -> list[str]:
    return [what for _, what in words.wrong_references(source, "# ABI\n\n## 1. One\n\n## 2. Two\n\n### 2.1 Part\n")]


def spelled(text: str) -> str:
    """Write out `%` and `@`, which keep this file free of references."""
    return text.replace("%", "abi.md").replace("@", "section")


def test_the_table_of_the_style_page_is_read() -> None:
    assert len(BANNED) >= 20
    assert all(instead.strip() for instead in BANNED.values())
    assert [phrase.lower() for phrase in PHRASES] == PHRASES


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_banned_phrase_is_found_in_any_case_and_nowhere_within_a_word(phrase: str) -> None:
    assert len(found(".md", f"It is {phrase} that.\n")) >= 1
    assert found(".md", f"First.\n\n{phrase.capitalize()} that.\n")[0][0] == 3
    assert found(".md", f"x{phrase}, {phrase}ly and look_{phrase}\n") == []


@pytest.mark.parametrize("phrase", ALLOWED)
def test_an_allowed_phrase_contains_a_banned_one_and_is_not_found(phrase: str) -> None:
    assert found(".md", f"What {phrase} is fine.\n") == []
    assert len(list(words.banned(phrase, BANNED))) == 1
    assert len(found(".md", f"What {phrase} is {PHRASES[0]} it.\n")) == 1


@pytest.mark.parametrize(("suffix", "frame"), AS_TEXT)
def test_a_banned_word_in_text_is_found_with_its_line(suffix: str, frame: str) -> None:
    source = frame.format(PHRASES[0])
    line = 1 + source[: source.index(PHRASES[0])].count("\n")
    assert found(suffix, source) == [(line, f"'{PHRASES[0]}': write {BANNED[PHRASES[0]]}")]


@pytest.mark.parametrize(("suffix", "frame"), AS_CODE)
def test_code_is_not_text(suffix: str, frame: str) -> None:
    assert found(suffix, frame.format(PHRASES[0])) == []


@pytest.mark.parametrize(
    ("suffix", "frame"),
    [
        (".md", "One {}\n{} two.\n"),
        (".rs", "    // one {}\n    // {} two\n"),
        (".rs", 'let s = "one {} \\\n    {} two";\n'),
        (".py", "# one {}\n# {} two\n"),
        (".py", 'x = ("one {} "\n     f"{} two")\n'),
        (".sh", "# one {}\n#   {} two\n"),
    ],
)
def test_a_phrase_is_found_across_the_end_of_a_line(suffix: str, frame: str) -> None:
    first, rest = LONG.split(" ", 1)
    assert len(found(suffix, frame.format(first, rest))) == 1


@pytest.mark.parametrize(
    ("text", "page", "unknown"),
    [
        ("Use `kho inspect --full` for it.", None, []),
        ("Use `kho inspect --folios` for it.", None, ["--folios"]),
        ("Use `kho plan --folios 1x4K` for it.", None, []),
        ("Use `kho diff --json A B | jq --arg x` for it.", None, []),
        ("`--folios` has groups.", None, []),
        ("`--folios` adds every folio.", "inspect", ["--folios"]),
        ("`--folios` of `kho plan` has groups. `--nonesuch` is another.", "inspect", ["--nonesuch"]),
        ("No command has --nonesuch.", None, ["--nonesuch"]),
        ("`pip install --nonesuch` is another program's.", None, []),
        ("`program --nonesuch` is another program's.", "inspect", []),
        ("`kho hold NAME -- program --nonesuch` is another program's.", None, []),
        ("```console\n$ kho map --folios\nx --nonesuch\n```\n", None, ["--folios"]),
        ("Text:\n\n    kho map --folios x\n", None, ["--folios"]),
        ("Text:\n\n    $ kho map --folios x\n    $ other --folios\n", None, ["--folios"]),
        ("```sh\nkho map --folios x\nother --folios\n```\n", None, ["--folios"]),
        ("A kho-v4 file from `kho convert --bitmap-bytes`.", None, []),
        ("`kho --nonesuch`", None, ["--nonesuch"]),
    ],
)
def test_an_option_that_its_command_does_not_have_is_found(text: str, page: str | None, unknown: list[str]) -> None:
    assert options(text, page=page) == unknown


def test_options_in_docstrings_and_help_texts_are_checked_and_other_strings_are_not() -> None:
    source = '''
def f():
    """List folios.

    `kho inspect --folios` prints them.
    """
    option("--nonesuch", help="See kho plan --full, or --never.")
'''
    assert list(words.unknown_options(source, ".py", COMMANDS)) == [
        (5, "--folios: no such option"),
        (7, "--full: no such option"),
        (7, "--never: no such option"),
    ]


def test_every_command_has_its_options_in_a_manual_page() -> None:
    assert "--help" in COMMANDS[""]
    assert {"--full", "--fdt-phys", "--json"} <= COMMANDS["inspect"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("see % @ 2", []),
        ("see docs/%, @ 2.1", []),
        ("see % @s 1 and 2", []),
        ("// see %\n// @ 2", []),
        ("[@ 2](%#2-two)", []),
        ("see % @ 3", ["docs/% has no @ 3"]),
        ("see % @s 1 and 7", ["docs/% has no @ 7"]),
        ("see [%](%) @ 2.2", ["docs/% has no @ 2.2"]),
        ("[there](%#3-three)", ["docs/% has no heading #3-three"]),
        ("see ABI @ 2", ["'ABI @ 2': write % @ N"]),
        ("// see ABI\n// @ 2", ["'ABI // @ 2': write % @ N"]),
        ("@ 2 of docs/%", ["'@ 2 of docs/%': write % @ N"]),
    ],
)
def test_a_reference_to_a_missing_section_and_an_old_form_are_found(text: str, wrong: list[str]) -> None:
    assert references(spelled(text)) == [spelled(what) for what in wrong]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", f"It is {PHRASES[0]} it.\n"),
        ("module.py", f"# It is {PHRASES[0]} it.\n"),
        ("script", f"#!/bin/sh\n# It is {PHRASES[0]} it.\n"),
        ("ref.md", "See ABI section" + " 2.\n"),
    ],
)
def test_a_fault_in_a_file_is_printed_and_the_exit_code_is_1(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "fine.md").write_text("Nothing is wrong here.\n")
    (tmp_path / "data.bin").write_bytes(b"\xff" + PHRASES[0].encode())
    assert words.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / name}:{text.count(chr(10))}: ")
    assert out.count("\n") == 1
    (tmp_path / name).write_text("Nothing is wrong here.\n")
    assert words.main([str(tmp_path)]) == 0


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such file"):
        words.main([str(tmp_path / "nonesuch")])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_documents_pass() -> None:
    done = subprocess.run(["make", "-s", "words"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
