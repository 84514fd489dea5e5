"""One table of ABI facts: Python and the pages say what it says, and a row is all that a new version needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kho
from kho import _kho
from kho.formats import Luo
from kho.handover.verify import verify, verify_fdt
from kho.sizing.plan import LAYOUTS

from captures import elf

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = Path(kho.__file__).parent
NEW = "kho-v5"
NAMES = {
    "kernels": "Linux 9.8 and 9.9",
    "map_property": "folio-tree",
    "subtree_property": "blob",
    "size_property": "blob-bytes",
}


@pytest.fixture
def new() -> Iterator[_kho.Abi]:
    """Add a version: the tree of kho-v4 under other names."""
    yield _kho.Abi._add(NEW, like="kho-v4", **NAMES)
    assert _kho.Abi._remove(NEW)
    assert NEW not in _kho.abis()


def handed_over(abi: str) -> kho.Arena:
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, abi)
    for order in (0, 3, 9):
        out.preserve_folio(arena.alloc(order))
    out.add_subtree("mine", b"my own bytes")
    out.add_memfd("vm-1", 0x10, b"guest memory", order=1)
    out.set_kexec_metadata("9.9.1", 3)
    out.finalize()
    return arena


# The table itself


def test_a_row_has_levels_or_bitmap_sizes() -> None:
    for abi in _kho.abis().values():
        assert abi.map == ("chunk list" if abi.bitmaps else "radix tree")
        assert list(abi.levels) == ([] if abi.bitmaps else [4096, 16384, 65536])
        assert repr(abi) == f"<Abi {abi.compatible}: {abi.map}, {abi.kernels}>"


def test_a_row_says_how_many_levels_a_written_tree_has() -> None:
    for abi in _kho.abis().values():
        for page, levels in abi.levels.items():
            arena = kho.Arena(64 * page, page_size=page)
            out = kho.Outgoing(arena, abi.compatible)
            out.finalize()
            inc = kho.open(arena)
            # The FDT's own page alone: from the root down to one leaf.
            assert len(inc.map_pages) == levels
            assert inc.fdt.root.u64(abi.map_property) == inc.preserved_memory_map


def test_a_row_says_where_a_new_subtree_goes() -> None:
    for abi in _kho.abis().values():
        out = kho.Outgoing(kho.Arena("1M"), abi.compatible)
        for name in ("first", "second"):
            out.add_subtree(name, b"bytes")
        out.finalize()
        names = list(kho.open(out.arena).subtrees)
        assert names == (["first", "second"] if abi.subtree_order == "append" else ["second", "first"])


@pytest.mark.parametrize("abi", _kho.abis().values(), ids=_kho.abis())
def test_what_is_written_is_the_luo_and_the_memfd_of_the_row(abi: _kho.Abi) -> None:
    luo = kho.open(handed_over(abi.compatible)).payloads["LUO"]
    assert isinstance(luo, Luo)
    (entry,) = luo.sessions["vm-1"].entries
    assert (luo.compatible, entry.compatible) == (abi.luo, abi.memfd)


def test_rows_are_added_once_and_from_rows_there_are() -> None:
    with pytest.raises(ValueError, match='"kho-v4" exists'):
        _kho.Abi._add("kho-v4", like="kho-v1")
    with pytest.raises(ValueError, match='radix-v1;vmalloc-v1" exists'):
        _kho.Abi._add("kho-v4;radix-v1;vmalloc-v1", like="kho-v4")
    with pytest.raises(ValueError, match='no ABI "kho-v9"'):
        _kho.Abi._add("kho-v10", like="kho-v9")
    with pytest.raises(ValueError, match='no column "map"'):
        _kho.Abi._add("kho-v10", like="kho-v4", map="list")
    assert not _kho.Abi._remove("kho-v1")
    assert list(_kho.abis()) == ["kho-v1", "kho-v2", "kho-v3", "kho-v4"]


# A version that is a row


def test_a_new_version_is_written_and_read(new: _kho.Abi) -> None:
    arena, old = handed_over(NEW), handed_over("kho-v4")
    inc, same = kho.open(arena), kho.open(old)
    assert inc.compatible == NEW
    assert inc.folios == same.folios
    root = inc.fdt.root
    assert set(root.properties) == {"compatible", "folio-tree"}
    for node in root.children:
        assert set(node.properties) == {"blob", "blob-bytes"}
    assert {name: s.size for name, s in inc.subtrees.items()} == {name: s.size for name, s in same.subtrees.items()}
    assert inc.luo.sessions["vm-1"].files[0x10].read() == b"guest memory"
    assert inc.payloads["kexec-metadata"].describe() == same.payloads["kexec-metadata"].describe()


def test_a_new_version_is_verified(new: _kho.Abi) -> None:
    assert verify(handed_over(NEW)) == verify(handed_over("kho-v4"))

    def root(map_at: int, *names: str) -> bytes:
        w = _kho.FdtWriter(4096)
        with w.node():
            w.property_str("compatible", NEW)
            w.property_u64(new.map_property, map_at)
            with w.node("mine"):
                for name in names:
                    w.property_u64(name, 0x8000)
        return w.finish()

    def found(blob: bytes) -> list[tuple[str, str]]:
        return [(f.id, f.value) for f in verify_fdt(blob)]

    assert found(root(0x1000, "blob", "blob-bytes")) == []
    assert found(root(0, "blob", "blob-bytes")) == [("KHO001", "folio-tree is 0: nothing was serialized")]
    assert [rule for rule, _ in found(root(0x1000, "preserved-data", "blob-size"))] == ["KHO019"]
    assert [rule for rule, _ in found(root(0x1000, "blob", "blob-size"))] == ["KHO020"]


def test_a_tree_of_the_wrong_depth_is_told_for_a_new_version() -> None:
    """Both write the same string; the levels are those of the row that reads."""
    _kho.Abi._add(NEW, like="kho-v2")
    try:
        arena = kho.Arena("16M", page_size=16384)
        kho.Outgoing(arena, NEW).finalize()
    finally:
        _kho.Abi._remove(NEW)
    _kho.Abi._add(NEW, like="kho-v4")
    try:
        values = [f.value for f in verify(arena) if f.id == "KHO006"]
    finally:
        _kho.Abi._remove(NEW)
    assert values == [f"with 5 levels, as {NEW} has, it does not preserve the FDT; with 4 it does"]


def test_a_new_version_is_planned_and_simulated(new: _kho.Abi) -> None:
    by_name = {cost.layout.name: cost for cost in kho.plan("64G", ["1000x2M", "5000x4K@random"]).costs}
    assert list(by_name) == ["kho-v1-512", "kho-v1", "kho-v3", "kho-v4", NEW]
    assert by_name[NEW].nbytes == by_name["kho-v4"].nbytes
    assert by_name[NEW].layout.kernels == "9.8 and 9.9"
    assert LAYOUTS[NEW].depth(16384) == LAYOUTS["kho-v4"].depth(16384) == 5
    done = kho.simulate("64G", ["1000x2M"], layout=NEW, restore=True)
    assert done.as_planned
    assert done.cost.layout.abi == NEW


def test_a_new_version_is_converted_to_and_from(new: _kho.Abi, tmp_path: Path) -> None:
    source = kho.open(elf("linux-6.18.15-x86_64"))
    kho.convert(source, NEW).save(tmp_path / "new.elf")
    there = kho.open(tmp_path / "new.elf")
    # The newest subtree is first here, and last there.
    assert (there.compatible, there.folios, list(there.subtrees)) == (NEW, source.folios, list(source.subtrees)[::-1])
    kho.convert(there, source.compatible).save(tmp_path / "back.elf")
    back = kho.open(tmp_path / "back.elf")
    assert (back.folios, list(back.subtrees), back.bitmap_bytes) == (source.folios, list(source.subtrees), 4096)
    assert back.compatible == source.compatible


def test_the_command_knows_a_new_version(tmp_path: Path) -> None:
    """The table is read when the command starts, so the row is added before."""
    start = (
        f"from kho import _kho; _kho.Abi._add({NEW!r}, like='kho-v4', **{NAMES!r}); from kho.cli import main; main()"
    )

    def kho_with_row(*words: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", start, *map(str, words)], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, ""), words
        return done.stdout

    path, folios = str(tmp_path / "new.elf"), ("--memory", "64G", "--folios", "100x2M")
    assert "kho-v4 or kho-v5." in " ".join(kho_with_row("convert", "--help").split())
    assert f"kho-v1 to {NEW}:" in kho_with_row("convert", elf("linux-6.18.15-x86_64"), "--abi", NEW, "-o", path)
    assert "folio-tree = /bits/ 64 <" in kho_with_row("fdt", path)
    assert f"{NEW} handover (Linux 9.8 and 9.9)" in kho_with_row("inspect", path)
    assert "KHO002" not in kho_with_row("verify", path)
    assert re.search(rf"^{NEW} .* 9.8 and 9.9 *$", kho_with_row("plan", *folios, "--no-calibrate"), re.MULTILINE)
    assert "as planned" in kho_with_row("simulate", *folios, "--abi", NEW, "--no-calibrate")
    assert "kho-v1, kho-v2, kho-v3, kho-v4 and kho-v5" in kho_with_row("verify", "--explain", "KHO002")


# Payloads without a writer


def test_a_luo_version_without_a_writer_is_refused_and_never_another_one_written() -> None:
    _kho.Abi._add(NEW, like="kho-v4", luo="luo-v9")
    try:
        out = kho.Outgoing(kho.Arena("16M"), NEW)
        state = out.folios()
        message = f"LUO: the kernels of {NEW} read luo-v9, which kho cannot write; it writes luo-v1, luo-v5"
        for call in (
            out.add_luo,
            lambda: out.add_session("s"),
            lambda: out.add_file("s", 1, "vendor,thing-v1", 0),
            lambda: out.add_memfd("s", 1, b"bytes"),
            lambda: out.add_flb("flb", 0),
        ):
            with pytest.raises(kho.UnsupportedAbiError, match=message):
                call()
        assert (out.folios(), dict(out.subtrees)) == (state, {})
    finally:
        _kho.Abi._remove(NEW)


def test_a_memfd_version_without_a_writer_is_refused_and_never_another_one_written() -> None:
    _kho.Abi._add(NEW, like="kho-v4", memfd="memfd-v9")
    try:
        out = kho.Outgoing(kho.Arena("16M"), NEW)
        state = out.folios()
        message = f"memfd: the kernels of {NEW} read memfd-v9, which kho cannot write; it writes memfd-v1, memfd-v2"
        with pytest.raises(kho.UnsupportedAbiError, match=message):
            out.add_memfd("s", 1, b"bytes")
        assert (out.folios(), dict(out.subtrees)) == (state, {})
        out.add_session("s")
    finally:
        _kho.Abi._remove(NEW)


# No other table

VERSION = re.compile(r"(kho|luo|memfd)-v[0-9]")
PROPERTIES = {name for abi in _kho.abis().values() for name in (abi.subtree_property, abi.size_property)} - {"fdt"}
"""Names that only the table has; `fdt` also has other meanings."""
CHOICES = {
    ("doctor/messages.py", "MESSAGES"),
    ("doctor/reading.py", "LUO_STRUCT"),
    ("handover/style.py", "DEFAULT_ABI"),
    ("live/file/metadata.py", "ABI"),
    ("sizing/plan.py", "MEASURED_TREE"),
}
"""Constants that choose a version, tell a structure by its name, or quote what kernels print."""


def named_versions(path: str, tree: ast.Module) -> list[tuple[int, str]]:
    """List the strings of a module that name a version or a property.

    Left out are docstrings, what registers a decoder or a writer, and choices.
    """
    allowed: set[ast.AST] = set()

    def registers(node: ast.expr) -> bool:
        call = node.func if isinstance(node, ast.Call) else node
        return isinstance(call, ast.Name) and call.id in ("decoder", "writer")

    for node in ast.walk(tree):
        inside: list[ast.AST] = []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside = [node.value]
        elif isinstance(node, ast.Call) and registers(node):
            inside = [node]
        elif isinstance(node, ast.ClassDef) and any(map(registers, node.decorator_list)):
            inside = [s for s in node.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "compatible"]
        elif isinstance(node, ast.Assign) and (path, ast.unparse(node.targets[0])) in CHOICES:
            inside = [node.value]
        allowed.update(part for top in inside for part in ast.walk(top))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and node not in allowed:
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            if VERSION.search(text) or text in PROPERTIES:
                found.append((node.lineno, text))
    return found


@pytest.mark.parametrize("path", sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py")))
def test_no_module_has_a_table_of_its_own(path: str) -> None:
    assert named_versions(path, ast.parse((PACKAGE / path).read_text())) == []


RUST = ROOT / "rust"
RUST_CHOICES = {
    ("kho-python/src/outgoing.rs", b"kho-v1"),  # The default of an argument.
}


def versions_in_rust(text: bytes) -> set[bytes]:
    """List the versions that string literals of Rust code name, without comments, and without tests at its end."""
    code = re.sub(rb"(?m)^\s*//.*$", b"", text.partition(b"#[cfg(test)]")[0])
    return set(re.findall(rb'"[^"\n]*?((?:kho|luo|memfd)-v[0-9])', code))


def test_no_rust_code_names_a_version_outside_the_table() -> None:
    named = set()
    for path in [*RUST.glob("kho/src/**/*.rs"), *RUST.glob("kho-python/src/**/*.rs")]:
        name = str(path.relative_to(RUST))
        if name != "kho/src/abi/mod.rs" and "tests" not in name:
            named |= {(name, version) for version in versions_in_rust(path.read_bytes())}
    assert named == RUST_CHOICES
    assert versions_in_rust(b'// "kho-v1"\nlet a = "x kho-v3";\n#[cfg(test)]\nlet b = "luo-v1";') == {b"kho-v3"}


def test_choices_are_there() -> None:
    for path, name in CHOICES:
        tree = ast.parse((PACKAGE / path).read_text())
        values = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name]
        assert [VERSION.search(ast.unparse(value)) is not None for value in values] == [True], (path, name)


def test_a_table_of_its_own_is_found() -> None:
    code = '''
"""kho-v1"""
LEVELS = {"kho-v1": 1}
DEFAULT_ABI = "kho-v1"
@writer
class Out:
    """Writes luo-v1."""
    compatible = "luo-v1"
    def f(self, abi):
        return f"kho-v1 {abi}" if abi == "kho-v4" else b"memfd-v2"
'''
    assert sorted(named_versions("handover/style.py", ast.parse(code))) == [
        (3, "kho-v1"),
        (10, "kho-v1 "),
        (10, "kho-v4"),
        (10, "memfd-v2"),
    ]


# The pages


def table(page: str, head: str) -> list[list[str]]:
    """Read the table of a page whose first line begins with `head`."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("*", "") for cell in line.strip().strip("|").split("|")])
    return [rows[0], *rows[2:]]


def releases(text: str) -> list[str]:
    return re.findall(r"\b\d+\.\d+\b", text)


def ends(texts: list[str]) -> tuple[str, str]:
    found = [release for text in texts for release in releases(text)]
    return found[0], found[-1]


def test_the_version_table_of_abi_md_is_that_of_the_library() -> None:
    head, *rows = table("abi.md", "| | 6.16")
    facts = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    kernels: dict[str, list[str]] = {}
    for kernel, compatible in facts["root `compatible`"].items():
        kernels.setdefault(compatible.strip("`"), []).append(kernel)
    assert list(kernels) == [abi.compatible for abi in _kho.abis().values() if abi.released]
    for name, columns in kernels.items():
        abi = _kho.abis()[name]
        assert ends(columns) == ends([abi.kernels])
        for column in columns:
            said = {what: cells[column] for what, cells in facts.items()}
            assert said["map"] == abi.map
            properties = [abi.subtree_property, abi.size_property] if abi.size_property else [abi.subtree_property]
            shown = said["subtree properties"]
            if shown == "the same":
                shown = facts["subtree properties"][head[head.index(column) - 1]]
            assert re.findall(r"`([\w-]+)`", shown) == properties
            depth = [f"{levels}" for levels in abi.levels.values()]
            assert said["tree depth at 4, 16, 64 KiB"] == ", ".join(depth)
            small = said["bitmap or leaf"] == "512 bytes"
            assert small or said["bitmap or leaf"] == "P bytes"
            if abi.bitmaps:
                of_size = [c for c in columns if (facts["bitmap or leaf"][c] == "512 bytes") == small]
                assert ends(of_size) == ends([dict(abi.bitmaps)[512 if small else None]])
            else:
                assert not small
            assert said["page ranges are cut at NUMA nodes"] == ("yes" if abi.cuts_at_nodes else "no")
            # Kernels of kho-v1 before 6.19 have no LUO.
            for what, version in (("LUO subtree", abi.luo), ("memfd", abi.memfd)):
                named = re.findall(r"`((?:luo|memfd)-v\d)`", said[what])
                if not said[what] or "the same" in said[what]:
                    assert abi.map == "chunk list" or "the same" in said[what]
                else:
                    assert named == [version]


def test_abi_md_names_what_was_never_released() -> None:
    text = " ".join((DOCS / "abi.md").read_text().split())
    for abi in _kho.abis().values():
        if not abi.released:
            shape = (
                f"a {abi.map}, `{abi.subtree_property}`{'' if abi.size_property else ' without a size'}, `{abi.luo}`"
            )
            assert f"`{abi.compatible}` ({shape}) existed in development trees" in text
            assert f"At 16 KiB {abi.compatible} has {abi.levels[16384]} and" in text


def test_the_version_table_of_formats_md_is_that_of_the_library() -> None:
    _, *rows = table("formats.md", "| Linux | compatible |")
    seen: dict[str, list[str]] = {}
    sizes: dict[int | None, list[str]] = {}
    for kernels, compatible, shape, properties, luo in rows:
        abi = _kho.abis()[compatible.strip("`")]
        seen.setdefault(abi.compatible, []).append(kernels)
        if abi.bitmaps:
            nbytes = {"chunks, bitmaps of 512 bytes": 512, "chunks, bitmaps of a page": None}[shape]
            sizes.setdefault(nbytes, []).append(kernels)
        else:
            assert shape == abi.map
        assert re.findall(r"`([\w-]+)`", properties) == [p for p in (abi.subtree_property, abi.size_property) if p]
        assert re.findall(r"`(luo-v\d)`", luo) in ([abi.luo], [] if abi.bitmaps else [abi.luo])
        for version in re.findall(r"`(memfd-v\d)`", luo):
            assert version == abi.memfd
    for nbytes, columns in sizes.items():
        (written,) = (kernels for abi in _kho.abis().values() for size, kernels in abi.bitmaps if size == nbytes)
        assert ends(columns) == ends([written])
    assert list(seen) == list(_kho.abis())
    for name, columns in seen.items():
        assert ends(columns) == ends([_kho.abis()[name].kernels])


def test_abi_md_ends_with_the_checklist_for_a_new_version() -> None:
    *_, last = re.split(r"^## ", (DOCS / "abi.md").read_text(), flags=re.MULTILINE)
    title, *steps = last.split("\n")
    assert title.endswith("Checklist for a new version")
    named = re.findall(r"`((?:rust|python|tests|docs)/[\w./-]+)`", last)
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert {"rust/kho/src/abi/mod.rs", "python/kho/formats/", "tests/data/", "tests/test_abis.py"} <= set(named)
    words = " ".join(re.findall(r"^\d+\. \*\*(.+?)\*\*", "\n".join(steps), re.MULTILINE)).lower()
    assert re.search("row.*decoder.*capture.*page", words), words
