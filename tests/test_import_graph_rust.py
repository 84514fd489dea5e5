"""The import graph of the Rust sources: no file imports itself through others, and reading does not import writing.

A node is a source file. An arrow leads from a file to the file that defines what it names, by `use` or by a path such
as `crate::fdt::totalsize` in an expression. A name that a module re-exports counts for the file that defines it, so a
parent's `mod` and `pub use` of its children are no arrows. Test modules are left out. The sources follow rustfmt, so
few forms need be read; the tests at the end check that they are.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "rust" / "kho" / "src"
BINDING = ROOT / "rust" / "kho-python" / "src"

# Segments of a Rust path.
Names = tuple[str, ...]
Graph = dict[str, set[str]]

IDENTIFIER = r"(?:r#)?[A-Za-z_]\w*"


def code_of(source: str) -> str:
    """A source without comments, without the contents of string and character literals, without test modules."""
    literal = r'r(#*)".*?"\1|b?"(?:\\.|[^"\\])*"' + r"|b?'(?:\\[^']*|[^'\\])'|//[^\n]*|/\*.*?\*/"
    code = re.sub(literal, lambda found: " " if found[0].startswith("/") else '""', source, flags=re.DOTALL)
    while found := re.search(r"#\[cfg\((?:all\()?test\b[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*", code):
        code = code[: found.start()] + code[end_of_item(code, found.end()) :]
    return code


def end_of_item(code: str, start: int) -> int:
    """Where the item at `start` ends: after its `;`, or after the brace that closes its first one."""
    depth = 0
    for at in range(start, len(code)):
        if code[at] == "{":
            depth += 1
        elif code[at] == "}":
            depth -= 1
            if depth == 0 and not re.match(r"\s*;", code[at + 1 :]):
                return at + 1
        elif code[at] == ";" and depth == 0:
            return at + 1
    return len(code)


def expand(tree: str) -> Iterator[tuple[Names, str]]:
    """The paths of a `use` tree, each with the name it is known by ("*" for all of a module's names)."""
    tree = tree.strip()
    if (brace := tree.find("{")) >= 0:
        before = tuple(part.strip() for part in tree[:brace].split("::") if part.strip())
        depth, start = 0, brace + 1
        for at in range(brace, len(tree)):
            depth += {"{": 1, "}": -1}.get(tree[at], 0)
            if (tree[at] == "," and depth == 1) or depth == 0:
                for path, name in expand(tree[start:at]):
                    yield (before + path if path != ("self",) else before), (name if path != ("self",) else before[-1])
                start = at + 1
            if depth == 0:
                return
    elif tree:
        whole, _, renamed = tree.partition(" as ")
        parts = tuple(part.strip() for part in whole.split("::") if part.strip())
        yield parts, renamed.strip() or parts[-1]


@dataclass
class Module:
    """One source file: what it declares, what it imports, what it names."""

    file: str
    children: set[str] = field(default_factory=set)
    uses: dict[str, Names] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    globs: list[Names] = field(default_factory=list)
    defined: set[str] = field(default_factory=set)
    named: set[Names] = field(default_factory=set)


def parse(file: str, source: str) -> Module:
    """Reads one source file."""
    code, module = code_of(source), Module(file)
    visible = r"(?:pub(?:\([^)]*\))?\s+)?"
    for found in re.finditer(rf"(?m)^[ ]*{visible}mod\s+({IDENTIFIER})\s*;", code):
        module.children.add(found[1])
    kinds = "struct|enum|union|trait|type|fn|const|static|macro_rules!"
    for found in re.finditer(rf"\b(?:{kinds})\s+(?:fn\s+)?({IDENTIFIER})", code):
        module.defined.add(found[1])
    for found in re.finditer(rf"(?m)^([ ]*)({visible})use\s+(?:::)?([^;]*);", code):
        for path, name in expand(" ".join(found[3].split())):
            if name == "*":
                module.globs.append(path[:-1])
                continue
            module.uses[name] = path
            if found[2]:
                module.exported.add(name)
    code = re.sub(rf"(?m)^[ ]*{visible}use\s+[^;]*;|\bpub\(in [^)]*\)", "", code)
    for found in re.finditer(rf"(?<![\w:])({IDENTIFIER}(?:\s*::\s*{IDENTIFIER})+)", code):
        module.named.add(tuple(part.strip() for part in found[1].split("::")))
    return module


class Crate:
    """The modules of a crate by path, and where its names lead."""

    def __init__(self, sources: dict[str, str]):
        """Reads a crate of sources by file name, `lib.rs` first of all."""
        self.modules: dict[Names, Module] = {}
        self.sources = sources
        self.load((), "lib.rs")

    def load(self, path: Names, file: str) -> None:
        """Reads a module and those below it."""
        module = self.modules[path] = parse(file, self.sources[file])
        for child in sorted(module.children):
            base = "/".join((*path, child))
            self.load((*path, child), f"{base}.rs" if f"{base}.rs" in self.sources else f"{base}/mod.rs")

    def absolute(self, at: Names, path: Names) -> Names | None:
        """A path as seen from module `at`, from the crate's root; None for another crate's."""
        parts = list(path)
        if parts[0] == "crate":
            return tuple(parts[1:])
        if parts[0] in ("self", "super"):
            base = list(at)
            while parts and parts[0] in ("self", "super"):
                if parts.pop(0) == "super":
                    base.pop()
            return (*base, *parts)
        module = self.modules[at]
        if parts[0] in module.children:
            return (*at, *parts)
        if parts[0] in module.uses and module.uses[parts[0]] != path:
            first = self.absolute(at, module.uses[parts[0]])
            return None if first is None else (*first, *parts[1:])
        return None

    def home(self, path: Names, depth: int = 0) -> Names:
        """The module that defines what a path from the crate's root names."""
        assert depth < 20, path
        at: Names = ()
        for index, name in enumerate(path):
            module, rest = self.modules[at], path[index + 1 :]
            if name in module.children:
                at = (*at, name)
                continue
            if name not in module.uses:
                if name not in module.defined:
                    for glob in module.globs:
                        inside = self.absolute(at, glob)
                        if (
                            inside in self.modules
                            and name in self.modules[inside].defined | self.modules[inside].exported
                        ):
                            return self.home((*inside, name, *rest), depth + 1)
                return at
            there = self.absolute(at, module.uses[name])
            return at if there is None else self.home((*there, *rest), depth + 1)
        return at

    def arrows(self) -> Graph:
        """By file, the files whose things it names."""
        graph: Graph = {module.file: set() for module in self.modules.values()}
        for at, module in self.modules.items():
            mentioned = [path for name, path in module.uses.items() if name not in module.exported]
            for path in [*mentioned, *module.globs, *module.named]:
                whole = self.absolute(at, path)
                if whole is None:
                    continue
                # What binds a module's name alone is no arrow: the paths that begin with the name are.
                if whole in self.modules and path in mentioned:
                    continue
                target = self.modules[self.home(whole)].file
                if target != module.file:
                    graph[module.file].add(target)
        return graph


def crate(root: Path) -> Crate:
    """The crate whose sources lie in a directory."""
    return Crate({str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*.rs"))})


def reached(graph: Graph, start: str) -> set[str]:
    """Every file that `start` imports, directly or through others."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = graph[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def circles(graph: Graph) -> list[list[str]]:
    """Groups of files that all reach each other (strongly connected components of two or more)."""
    far = {name: reached(graph, name) for name in graph}
    groups = {frozenset(other for other in far[name] if name in far[other]) for name in graph if name in far[name]}
    return sorted(sorted(group) for group in groups)


def sources(**modules: str) -> dict[str, str]:
    """A crate for a test: its files by name, without suffix; `__` stands for `/`."""
    return {f"{name.replace('__', '/')}.rs": text for name, text in modules.items()}


def files_of_tests(root: Path) -> set[str]:
    """The files of test modules, by name: those that only `#[cfg(test)] mod` leads to."""
    names = {str(path.relative_to(root)) for path in root.rglob("*.rs")}
    return {name for name in names if "tests" in name}


@pytest.mark.parametrize("root", [CORE, BINDING], ids=["kho", "kho-python"])
def test_no_file_imports_itself_through_others(root: Path) -> None:
    graph = crate(root).arrows()
    assert len(graph) == len(list(root.rglob("*.rs"))) - len(files_of_tests(root))
    assert circles(graph) == []


def test_reading_does_not_import_writing() -> None:
    graph = crate(CORE).arrows()
    readers = [name for name in graph if not name.startswith("write/") and name != "lib.rs"]
    assert {"read/incoming.rs", "read/verify.rs", "abi/detect.rs"} <= set(readers)
    for name in readers:
        assert [far for far in sorted(reached(graph, name)) if far.startswith("write/")] == [], name


def test_the_core_does_not_know_python() -> None:
    files = [path for path in CORE.parent.rglob("*") if path.suffix in (".rs", ".toml")]
    assert [path for path in files if re.search("pyo3", path.read_text(), re.IGNORECASE)] == []


# What the functions above read of a source.


def test_a_circle_is_found_by_use_by_path_and_through_a_parent() -> None:
    clean = sources(lib="mod a;\nmod b;\npub use a::A;", a="pub struct A;", b="use crate::a::A;\npub fn b(_: A) {}")
    assert circles(Crate(clean).arrows()) == []
    for line in ("use crate::b::b;", "use super::b;\nfn f() { b::b(A) }", "fn f() { crate::b::b(A) }"):
        assert circles(Crate({**clean, "a.rs": f"{line}\npub struct A;"}).arrows()) == [["a.rs", "b.rs"]], line


def test_a_name_counts_for_the_file_that_defines_it() -> None:
    files = sources(
        lib="mod room;\nmod user;\nmod globbed;",
        room__mod="mod inner;\npub use inner::{Thing as Renamed, other::*};",
        room__inner="pub mod other;\npub struct Thing;",
        room__inner__other="pub struct Other;",
        user="use crate::room::Renamed;\nuse crate::room;\nfn f(_: room::Other) {}",
        globbed="use crate::room::inner::*;\nfn f(_: Thing) {}",
    )
    graph = Crate(files).arrows()
    assert graph["user.rs"] == {"room/inner.rs", "room/inner/other.rs"}
    assert graph["globbed.rs"] == {"room/inner.rs"}
    assert graph["room/inner.rs"] == set()


def test_comments_strings_and_test_modules_are_left_out() -> None:
    text = """
        // use crate::b::B;
        /* crate::b::B */
        const TEXT: &str = "crate::b::B \\" crate::b::B";
        const RAW: &str = r#"crate::b::B"#;
        fn quoted<'a>(c: char, s: &'a str) -> bool { c == '"' || c == '\\'' || s.is_empty() }
        pub(in crate::b) fn seen() {}
        #[cfg(test)]
        use crate::b::B;
        #[cfg(all(test, target_arch = ""))]
        mod tests { use crate::b::{B, C}; mod inner {} }
        #[cfg(test)]
        mod more;
        fn after() { crate::c::C }
    """
    graph = Crate(sources(lib="mod a;\nmod b;\nmod c;", a=text, b="pub struct B;", c="pub struct C;")).arrows()
    assert graph["a.rs"] == {"c.rs"}


def test_use_trees_are_read_whole() -> None:
    tree = "crate::a::{self, b::{C, D as E}, f::*, g}"
    assert sorted(expand(tree)) == [
        (("crate", "a"), "a"),
        (("crate", "a", "b", "C"), "C"),
        (("crate", "a", "b", "D"), "E"),
        (("crate", "a", "f", "*"), "*"),
        (("crate", "a", "g"), "g"),
    ]
