"""Copy the docstrings of the compiled module into its stub: `python scripts/stubs.py`, or `--write` to change the file.

The text lies in Rust, as the `///` comments of the bindings, which PyO3 makes the docstrings of classes, methods and
functions. `python/kho/_kho.pyi` has the types, and the same docstrings for editors. Without `--write` this prints what
differs and exits with 1. A stub has no docstring where CPython gives the compiled object its own: on names with two
underscores, such as `__len__`, and on constants.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kho import _kho

STUB = Path(__file__).parent.parent / "python/kho/_kho.pyi"
SECTION = re.compile(r"^(Args|Returns|Raises|Examples?|Notes?):$", re.MULTILINE)
"""Sections of a docstring; ruff requires an empty line after the last one (D413)."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef


class Entry(NamedTuple):
    """A name of the stub and its docstrings."""

    name: str
    node: Documented
    stub: str | None
    """What the stub says, without indentation; None without a docstring."""
    compiled: str | None
    """What the compiled module says; None where the stub has to have none."""


def entries(tree: ast.Module) -> Iterator[Entry]:
    """Yield the module, and every class and function of its stub."""
    yield _entry("kho._kho", tree, _kho)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield _entry(node.name, node, getattr(_kho, node.name))
        elif isinstance(node, ast.ClassDef):
            owner = getattr(_kho, node.name)
            yield _entry(node.name, node, owner)
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found = getattr(owner, method.name, None)
                    yield _entry(f"{node.name}.{method.name}", method, found)


def _entry(name: str, node: Documented, found: Any) -> Entry:
    private = isinstance(node, ast.FunctionDef) and node.name.startswith("_")
    told = None if private else inspect.cleandoc(found.__doc__ or "") or None
    return Entry(name, node, ast.get_docstring(node), told)


def literal(text: str, indent: str) -> list[str]:
    """Write a docstring as lines of source."""
    quotes = '"""'
    prefix = "r" if "\\" in text else ""
    if "\n" not in text and len(indent) + 2 * len(quotes) + len(text) <= 120:
        return [f"{indent}{prefix}{quotes}{text}{quotes}"]
    lines = f"{prefix}{quotes}{text}".split("\n")
    end = ["", quotes] if SECTION.search(text) else [quotes]
    return [f"{indent}{line}".rstrip() for line in [*lines, *end]]


def rewritten(source: str) -> str:
    """Give the stub with the docstrings of the compiled module."""
    lines = source.split("\n")
    differ = [entry for entry in entries(ast.parse(source)) if entry.stub != entry.compiled]
    for entry in sorted(differ, key=lambda entry: entry.node.body[0].lineno, reverse=True):
        node, statement = entry.node, entry.node.body[0]
        indent = "" if isinstance(node, ast.Module) else " " * (node.col_offset + 4)
        text = [] if entry.compiled is None else literal(entry.compiled, indent)
        first = last = statement.lineno - 1
        dots = isinstance(statement, ast.Expr) and getattr(statement.value, "value", None) is ...
        if entry.stub is not None or dots:
            last = statement.end_lineno or statement.lineno
            if not text and len(node.body) == 1:
                text = [f"{indent}..."]
        if dots and not lines[first].startswith(f"{indent}..."):  # `def name(self) -> int: ...`
            text.insert(0, lines[first].removesuffix(" ..."))
        lines[first:last] = text
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Compare, or write."""
    source = STUB.read_text()
    tree = ast.parse(source)
    differ = [entry.name for entry in entries(tree) if entry.stub != entry.compiled]
    if args == ["--write"]:
        STUB.write_text(rewritten(source))
        return 0
    if args:
        print(__doc__, file=sys.stderr)
        return 2
    for name in differ:
        print(f"{name}: the docstring in {STUB.name} is not that of the compiled module; run scripts/stubs.py --write")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
