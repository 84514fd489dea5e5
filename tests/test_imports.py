"""Imports of the package: no circle among its modules, directions that hold, and import paths that stay."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from kho._moved import MOVED

SOURCES = Path(__file__).parent.parent / "python"
ROOT = Path(__file__).parent.parent
PATHS = Path(__file__).parent / "data/import-paths.txt"


def modules(root: Path) -> dict[str, Path]:
    """Name every module below `root`: `kho.live.handle` to its file; the extension has a stub alone."""
    found = {}
    for path in [*root.rglob("*.pyi"), *root.rglob("*.py")]:
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """List the modules that one imports anywhere: at its top, in functions, for type checkers, or by name.

    `from .a import b` is an import of `a.b` where that is a module, and else of `a`.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    if path.suffix == ".pyi":
        return found  # Of types alone: at run time the extension imports by name, on first use.
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                full = f"{target}.{alias.name}"
                found.add(full if full in known else target)
    return {found_name for found_name in found if found_name in known} - {name}


def graph(root: Path) -> dict[str, set[str]]:
    """Which modules each module below `root` imports."""
    known = modules(root)
    return {name: imports(name, path, known) for name, path in sorted(known.items())}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """List the circles: groups of modules in which each reaches each other (Kosaraju's algorithm)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        for target in arrows[name] - seen:
            if target not in seen:
                visit(target)
        order.append(name)

    for name in arrows:
        if name not in seen:
            visit(name)
    back: dict[str, set[str]] = {name: set() for name in arrows}
    for name, targets in arrows.items():
        for target in targets:
            back[target].add(name)
    groups = []
    seen.clear()
    for name in reversed(order):
        if name in seen:
            continue
        group, ahead = [], [name]
        while ahead:
            at = ahead.pop()
            if at not in seen:
                seen.add(at)
                group.append(at)
                ahead += back[at] - seen
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


def reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    """List what a module imports, directly or through others."""
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        for target in arrows[ahead.pop()] - seen:
            seen.add(target)
            ahead.append(target)
    return seen


ARROWS = graph(SOURCES)


def test_no_module_imports_itself_through_others() -> None:
    assert circles(ARROWS) == []


def test_a_circle_is_found_wherever_the_import_stands(tmp_path: Path) -> None:
    (tmp_path / "p/q").mkdir(parents=True)
    for name, text in {
        "p/__init__.py": "",
        "p/a.py": "from .q import b\n",
        "p/q/__init__.py": "",
        "p/q/b.py": "def late():\n    from ..c import thing\n",
        "p/c.py": "import p.a\nthing = 1\n",
        "p/d.py": "from . import c\n",
    }.items():
        (tmp_path / name).write_text(text)
    arrows = graph(tmp_path)
    assert circles(arrows) == [["p.a", "p.c", "p.q.b"]]
    assert reached(arrows, "p.d") == {"p.a", "p.c", "p.q.b"}


LEVELS = [
    ("kho.errors", "kho._types", "kho.sizes", "kho.text", "kho.jsontext", "kho.owned"),
    ("kho.kernels", "kho.kernelimage", "kho.handover.rules"),
    ("kho.formats",),
    ("kho.fdt", "kho.readers", "kho.sources", "kho.handover", "kho.sizing", "kho.doctor", "kho.luo"),
    ("kho.live",),
    ("kho.fleet",),
    ("kho.cli",),
    ("kho.plugins",),
]
"""Rooms from the ground up: none imports from one further down in this list."""


def test_imports_point_to_the_same_level_or_below() -> None:
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}

    def of(name: str) -> int | None:
        rooms = [room for room in level if name == room or name.startswith(room + ".")]
        return level[max(rooms, key=len)] if rooms else None

    up = [
        (name, target)
        for name, targets in ARROWS.items()
        for target in targets
        if (here := of(name)) is not None and (there := of(target)) is not None and there > here
    ]
    # A source may be a running service, `live:NAME`: the code that asks it is imported when one is named.
    assert up == [("kho.sources", "kho.live.handover.registry")]


PUBLIC = {line.split()[0]: line.split()[1:] for line in PATHS.read_text().splitlines()}


@pytest.mark.parametrize(("module", "names"), PUBLIC.items(), ids=PUBLIC)
def test_public_import_paths_stay(module: str, names: list[str]) -> None:
    found = import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []


def test_a_module_that_moved_is_one_module_under_both_names() -> None:
    for old, new in MOVED.items():
        assert import_module(f"kho.{old}") is import_module(f"kho.{new}")
        assert import_module(f"kho.{new}").__spec__.name == f"kho.{new}"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "line",
    [
        "import kho.payload.luo; assert kho.payload.luo is kho.formats.luo",
        "from kho import verify; assert verify.verify",
        "from kho.payload import decoder; import kho.formats.registry as r; assert decoder is r.decoder",
        "import kho.live.slots, kho.live.file.header as h; assert kho.live.slots is h",
    ],
)
def test_earlier_names_are_imported_first_as_well(line: str) -> None:
    subprocess.run([sys.executable, "-c", line], check=True, timeout=60)


ENTRY_POINTS = {"kho.decoders"}
FILES = {"kho.cfg", "kho.conf"}


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_what_a_page_names_is_there_after_import_kho(page: str) -> None:
    text = (ROOT / page).read_text()
    names = sorted({*re.findall(r"(?<![\w./-])(kho(?:\.[A-Za-z]\w*)+)(?=[`(])", text)} - ENTRY_POINTS - FILES)
    code = f"import kho\nfor name in {names!r}:\n    eval(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
