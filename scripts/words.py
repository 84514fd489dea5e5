#!/usr/bin/env python3
"""Check texts for banned words, options that no command has, and wrong references to docs/abi.md.

    scripts/words.py PATH...           files and folders; exit 1 if there is a fault
    scripts/words.py --count PATH...   the number of faults by top-level folder

The banned words, and what to write instead, are the table in docs/style.md. Only text is checked for them: comments and
strings of Python, Rust and C; comments of shell and make; Markdown and YAML without code. Options of `kho` commands are
those of the manual pages in wheel-data, which tests/test_docs.py compares with the commands.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STYLE = ROOT / "docs" / "style.md"
ABI = ROOT / "docs" / "abi.md"
MAN = ROOT / "wheel-data" / "data" / "share" / "man" / "man1"

Fault = tuple[int, str]  # line, what is wrong

# Text between two words of a phrase: spaces, or a line's end with what begins the next line of a comment or string.
GAP = r"""(?:[ \t]+|["' \t\\]*\n[ \t#/!*>]*(?:[bfr]{0,2}["'])?)"""
# Programs other than kho whose options are named in texts that are not code.
TOOLS = (
    "bootctl|cargo|dtc|git|grubby|journalctl|make|makedumpfile|mount|pip|pytest|python|qemu|"
    "systemctl|valgrind|virsh|vol"
)
# Options of the programs in benches/ that texts name without the program.
BENCH_OPTIONS = {"--readers", "--seconds", "--twin", "--update"}


# Text of a file: everything else is masked, so that offsets and lines stay.


def masked(source: str, spans: Iterable[tuple[int, int]]) -> str:
    """Return `source` with everything outside `spans` replaced by NUL, except white space."""
    parts, end = [], 0
    for start, stop in spans:
        parts += [re.sub(r"\S", "\0", source[end:start]), source[start:stop]]
        end = stop
    return "".join(parts) + re.sub(r"\S", "\0", source[end:])


def python_text(source: str) -> str:
    """Keep comments and strings of Python."""
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    kept = {"COMMENT", "STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}
    spans = [
        (lines[token.start[0] - 1] + token.start[1], lines[token.end[0] - 1] + token.end[1])
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if tokenize.tok_name[token.type] in kept
    ]
    return masked(source, spans)


RUST = re.compile(
    r"""(?P<text> //[^\n]* | /\*.*?\*/ | (?<!\w)b?r(?P<hash>\#*)".*?"(?P=hash) | "(?:\\.|[^"\\])*" )
    | '(?:\\[^\n']+|\\'|[^\\'\n])' | '\w+  # a character, a lifetime
    """,
    re.VERBOSE | re.DOTALL,
)


def rust_text(source: str) -> str:
    """Keep comments and string literals of Rust or C; characters and lifetimes are skipped."""
    return masked(source, (match.span("text") for match in RUST.finditer(source) if match["text"]))


def shell_text(source: str) -> str:
    """Keep comments of shell scripts and makefiles."""
    return masked(source, (match.span() for match in re.finditer(r"(?<!\S)#(?!!).*", source)))


CODE = re.compile(
    r"""^(?P<fence>```+|~~~+).*?^(?P=fence)[ ]*$  # a block between fences
    | (?<=\n\n)(?:(?:[ ]{4}|\t)[^\n]*\n|\n(?=[ ]{4}))+  # an indented block after an empty line
    | (?P<tick>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=tick)(?!`)  # a span
    | \]\([^)\s]*\)  # the target of a link
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


def markdown_text(source: str) -> str:
    """Keep what is not code in Markdown."""
    code = [match.span() for match in CODE.finditer(source)]
    edges = [0, *(edge for span in code for edge in span), len(source)]
    return masked(source, zip(edges[::2], edges[1::2], strict=True))


TEXT: dict[str, Callable[[str], str]] = {
    ".py": python_text,
    ".pyi": python_text,
    ".rs": rust_text,
    ".c": rust_text,
    ".h": rust_text,
    ".sh": shell_text,
    ".toml": shell_text,
    ".md": markdown_text,
    ".yml": str,
    ".yaml": str,
}


def kind(path: Path) -> str | None:
    """Return the suffix whose entry in TEXT reads a file; scripts without one by their first line. None for others."""
    if path.suffix in TEXT:
        return path.suffix
    if path.name == "Makefile":
        return ".sh"
    if path.suffix or not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.readline(80)
    if not first.startswith(b"#!"):
        return None
    return ".py" if b"python" in first else ".sh" if b"sh" in first else None


# The three checks: (a) banned words, (b) options, (c) references.


@functools.cache
def table(style: str) -> tuple[dict[str, str], list[str]]:
    """Read the table of docs/style.md: the banned phrases with what to write instead, and the phrases allowed."""
    found: dict[str, str] = {}
    allowed: list[str] = []
    for phrases, instead, exceptions in re.findall(r"^\| (`.*?) \| (.*?) \| *(.*?) *\|$", style, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", phrases), instead)
        allowed += re.findall(r"`([^`]+)`", exceptions)
    return found, allowed


@functools.cache
def pattern(phrase: str) -> re.Pattern[str]:
    """Compile a phrase: whole words, in any case, also over the end of a line."""
    words = GAP.join(re.escape(word) for word in phrase.split())
    return re.compile(rf"(?<![\w-]){words}(?![\w-])", re.IGNORECASE)


def banned(text: str, phrases: dict[str, str], allowed: Iterable[str] = ()) -> Iterator[Fault]:
    """Find banned phrases in text from which code was masked; text between backticks is code as well."""
    text = re.sub(r"\\[nt]", "  ", text)
    for code in (re.compile(r"`[^`\n]+`"), *map(pattern, allowed)):
        text = code.sub(lambda match: re.sub(r"\S", "\0", match[0]), text)
    lower = text.lower()
    for phrase, instead in phrases.items():
        if phrase.split()[0] not in lower:
            continue  # much faster than the pattern
        for match in pattern(phrase).finditer(text):
            yield line_of(text, match.start()), f"'{phrase}': write {instead}"


@functools.cache
def manual(man: Path) -> dict[str, set[str]]:
    """Read the options of every command from its manual page; `kho` itself is the empty name."""
    found = {}
    for page in man.glob("kho*.1"):
        head = re.findall(r"^\.TP\n\\fB(.*?)\\fR$", page.read_text(), re.MULTILINE)
        options = {option for line in head for option in OPTION.findall(line.replace("\\-", "-"))}
        found[page.stem.removeprefix("kho").removeprefix("-")] = options
    return found


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
COMMAND = re.compile(rf"(?<![\w./-])kho(?![\w./-])(?: ([a-z]+)\b(?!-))?|(?<![\w.-])(?:{TOOLS})(?:\b|-)")


def unknown_options(
    source: str, suffix: str, commands: dict[str, set[str]], page: str | None = None
) -> Iterator[Fault]:
    """Find options that their command does not have.

    An option's command is the last one before it in the same piece of code or sentence. If there is none, the option
    must be one of the commands that its sentence names, or of the command that the page is about; if these are missing
    too, of any command.
    """
    everywhere = set().union(*commands.values()) | BENCH_OPTIONS
    for line, text, code in (markdown_pieces if suffix == ".md" else python_pieces)(source):
        for match in OPTION.finditer(text):
            where = line + text.count("\n", 0, match.start())
            before = re.split(r"[|;&`]", text[: match.start()])[-1]
            if " -- " in before:
                continue  # the rest is another program's command line
            named = list(COMMAND.finditer(before))
            in_span = code or text.count("`", 0, match.start()) % 2 == 1
            if named:
                name = named[-1][1] or ""
                if not named[-1][0].startswith("kho"):
                    continue
                allowed = commands.get(name, commands[""] if code else everywhere)
            elif in_span and not before.lstrip().startswith("-") and before.strip():
                continue  # a program that is not kho
            else:
                names = {name for name in re.findall(r"\bkho ([a-z]+)", text) if name in commands}
                names |= {page} & set(commands)
                allowed = set().union(*(commands[name] for name in names)) if names else everywhere
            if match[0] not in allowed:
                yield where, f"{match[0]}: no such option"


SENTENCE = re.compile(r"(?:`[^`]+`|[^.:;!?|\n]|[.:;!?](?!\s)|\n(?![ \t]*\n))+")


def markdown_pieces(source: str) -> Iterator[tuple[int, str, bool]]:
    """Split Markdown into sentences, and into the lines of its blocks that are commands: (line, text, is code)."""
    prose = list(source)
    for block in CODE.finditer(source):
        if block[0].startswith(("`", "](")) and not block["fence"]:
            continue
        prose[block.start() : block.end()] = re.sub(r"\S", " ", block[0])
        console = block[0].startswith("```console")
        for number, line in enumerate(block[0].splitlines()):
            if line.startswith("$ ") if console else re.match(r"\s*(?:\$ )?kho\b", line):
                yield line_of(source, block.start()) + number, line.strip().removeprefix("$ "), True
    text = "".join(prose)
    for sentence in SENTENCE.finditer(text):
        yield line_of(text, sentence.start()), sentence[0], False


def python_pieces(source: str) -> Iterator[tuple[int, str, bool]]:
    """Split docstrings and help texts of Python into sentences: (line, text, is code)."""
    for node in ast.walk(ast.parse(source)):
        texts: list[ast.expr] = []
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.body and isinstance(node.body[0], ast.Expr):
                texts.append(node.body[0].value)
        elif isinstance(node, ast.Call):
            texts += [keyword.value for keyword in node.keywords if keyword.arg in ("help", "epilog", "short_help")]
        for text in texts:
            for part in ast.walk(text):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    for sentence in SENTENCE.finditer(part.value):
                        yield part.lineno + line_of(part.value, sentence.start()) - 1, sentence[0], False


BETWEEN = r"[\s/#*!]+"
OLD_FORM = re.compile(
    rf"\bABI,?{BETWEEN}sections?{BETWEEN}\d|\bsections?{BETWEEN}\d[\d., and]*{BETWEEN}of{BETWEEN}\S*abi\.md"
)
NEW_FORM = re.compile(rf"abi\.md[\])`,]*{BETWEEN}sections?{BETWEEN}(\d[\d.]*(?:(?:,| and| to){BETWEEN}\d[\d.]*)*)")
ANCHOR = re.compile(r"abi\.md#([\w-]+)")


def wrong_references(source: str, abi: str) -> Iterator[Fault]:
    """Find references to sections that docs/abi.md does not have, and any form but `abi.md section N`."""
    headings = re.findall(r"^#+ (.*)$", abi, re.MULTILINE)
    numbers = {match[1] for heading in headings if (match := re.match(r"(\d+(?:\.\d+)*)\.? ", heading))}
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for match in OLD_FORM.finditer(source):
        yield line_of(source, match.start()), f"'{' '.join(match[0].split())}': write abi.md section N"
    for match in NEW_FORM.finditer(source):
        for number in re.findall(r"\d+(?:\.\d+)*", match[1]):
            if number not in numbers:
                yield line_of(source, match.start()), f"docs/abi.md has no section {number}"
    for match in ANCHOR.finditer(source):
        if match[1] not in anchors:
            yield line_of(source, match.start()), f"docs/abi.md has no heading #{match[1]}"


# Files and the command.


def line_of(text: str, offset: int) -> int:
    """Return the number of the line at an offset."""
    return text.count("\n", 0, offset) + 1


def faults(path: Path) -> list[Fault]:
    """Check one file; return an empty list for a file that is not text of a known kind."""
    suffix = kind(path)
    if suffix is None:
        return []
    source = path.read_text(encoding="utf-8")
    found = list(banned(TEXT[suffix](source), *table(STYLE.read_text())))
    inside = path.resolve().relative_to(ROOT).parts if path.resolve().is_relative_to(ROOT) else ()
    page = suffix == ".md" and (inside[:1] == ("docs",) or len(inside) == 1)
    if page or (suffix == ".py" and inside[:1] == ("python",)):
        found += unknown_options(source, suffix, manual(MAN), path.stem)
    found += wrong_references(source, ABI.read_text())
    return sorted(found)


SKIPPED = {"__pycache__", "target", "node_modules", "man"}


def files(paths: Iterable[str]) -> Iterator[Path]:
    """Expand folders to the files below them, without hidden and built ones."""
    for path in map(Path, paths):
        if not path.exists():
            raise SystemExit(f"{path}: no such file or folder")
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in below:
            parts = file.relative_to(path).parts
            if file.is_file() and not any(part.startswith(".") or part in SKIPPED for part in parts):
                yield file


def main(arguments: list[str]) -> int:
    """Check every file that the arguments name; print each fault as FILE:LINE: FAULT."""
    counting = arguments[:1] == ["--count"]
    counts: Counter[str] = Counter()
    for path in files(arguments[counting:]):
        found = faults(path)
        counts[path.parts[0]] += len(found)
        if not counting:
            for line, what in found:
                print(f"{path}:{line}: {what}")
    if counting:
        for folder, count in counts.items():
            print(f"{count:6} {folder}")
    return 1 if counts.total() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
