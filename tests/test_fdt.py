"""Devicetrees, through the public API: real blobs, and comparison with other readers and writers of the format."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import fdt as pyfdt  # type: ignore[import-untyped]
import libfdt  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kho import fdt
from kho.errors import FdtError, NotFoundError

DATA = Path(__file__).parent / "data" / "fdt"
KERNEL_BLOBS = sorted(p.name for p in DATA.glob("linux-*.dtb"))
CUT = "linux-7.3.4-out-fdt.dtb"
EDITED = "linux-7.3.4-in-fdt.dtb"
SEQUENTIAL = [name for name in KERNEL_BLOBS if name not in (CUT, EDITED)]


def data(name: str) -> bytes:
    return (DATA / name).read_bytes()


class Tree(NamedTuple):
    name: str
    props: list[tuple[str, bytes]]
    children: list[Tree]


def tree_of(node: fdt.Node) -> Tree:
    props = [(name or "?", value) for name, _, value in node.raw_properties]
    return Tree(node.name, props, [tree_of(child) for child in node.children])


def write(tree: Tree, capacity: int = 1 << 20) -> bytes:
    w = fdt.Writer(capacity)

    def node(tree: Tree) -> None:
        with w.node(tree.name):
            for name, value in tree.props:
                w.property(name, value)
            for child in tree.children:
                node(child)

    node(tree)
    return w.finish()


def write_with_libfdt(tree: Tree) -> bytes:
    w = libfdt.FdtSw(1 << 20)  # as_fdt() does not grow the buffer for the end of a tree that just fits
    w.finish_reservemap()

    def node(tree: Tree) -> None:
        w.begin_node(tree.name)
        for name, value in tree.props:
            w.property(name, value)
        for child in tree.children:
            node(child)
        w.end_node()

    node(tree)
    blob = w.as_fdt()
    return bytes(blob.as_bytearray()[: blob.totalsize()])


def with_unique_names(tree: Tree) -> Tree:
    """The tree with unique names: other readers refuse duplicate properties or children."""
    return Tree(
        tree.name,
        list(dict(tree.props).items()),
        list({child.name: with_unique_names(child) for child in tree.children}.values()),
    )


# Few letters, so that names are often suffixes of other names.
prop_names = st.text("ab,", min_size=1, max_size=5)
node_names = st.text("abcd", min_size=1, max_size=6)
props = st.lists(st.tuples(prop_names, st.binary(max_size=20)), max_size=6)
subtrees = st.recursive(
    st.builds(Tree, node_names, props, st.just([])),
    lambda inner: st.builds(Tree, node_names, props, st.lists(inner, max_size=4)),
    max_leaves=12,
)
trees = subtrees.map(lambda tree: tree._replace(name=""))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_kernels_blob_is_rebuilt_byte_for_byte(name: str) -> None:
    blob = data(name)
    assert write(tree_of(fdt.parse(blob).root), capacity=4096) == blob


def test_a_handovers_root_reads_like_a_mapping() -> None:
    tree = fdt.parse(data("linux-6.18.15-out-fdt.dtb"))
    root = tree.root
    assert root["compatible"] == b"kho-v1\0"
    assert root.str("compatible") == "kho-v1"
    assert root.strings("compatible") == ["kho-v1"]
    assert root.u64("preserved-memory-map") == 0x6D4000
    assert list(root.properties) == ["compatible", "preserved-memory-map"]
    assert "compatible" in root
    assert "fdt" not in root
    assert [node.path for node in tree.walk()] == ["/", "/kho_test", "/memblock"]
    assert [node.name for node in root.children] == ["kho_test", "memblock"]
    memblock = tree["/memblock"]
    assert memblock.u64("fdt") == 0x6C6000
    assert memblock == root.node("memblock")
    assert hash(memblock) == hash(root.node("memblock"))
    assert memblock != tree["/kho_test"]
    assert memblock.parent == root
    assert root.parent is None
    assert "/kho_test" in tree
    assert "/nothing" not in tree
    assert (tree.totalsize, tree.version, tree.boot_cpuid, tree.reservations) == (236, 17, 0, [])
    assert repr(tree) == "<Fdt of 236 bytes, 3 nodes>"
    assert repr(memblock) == '<FdtNode "/memblock", 1 properties>'


def test_a_node_outlives_its_tree() -> None:
    assert fdt.parse(data("linux-6.18.15-kho_test.dtb"))["/data"].u32("nr_folios") == 6


def test_a_missing_node_or_property_raises_not_found() -> None:
    root = fdt.parse(data("linux-6.18.15-out-fdt.dtb")).root
    with pytest.raises(NotFoundError, match='offset 0x40: no property "fdt"'):
        root["fdt"]
    with pytest.raises(NotFoundError, match='no property "fdt"'):
        root.u64("fdt")
    with pytest.raises(NotFoundError, match='no node "/memblock/x"'):
        root.node("memblock").node("x")
    with pytest.raises(NotFoundError, match='no node "/x"'):
        fdt.parse(data("linux-6.18.15-out-fdt.dtb"))["/x"]
    with pytest.raises(FdtError, match='"compatible" has 7 bytes, not 8'):
        root.u64("compatible")
    with pytest.raises(FdtError, match='"preserved-memory-map" is not one NUL-terminated string'):
        root.str("preserved-memory-map")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)])
def test_any_buffer_type_can_be_read_and_written(kind: type[bytes]) -> None:
    blob = data(EDITED)
    page = blob.ljust(4096, b"\xa5")
    assert bytes(fdt.parse(kind(page))) == blob
    w = fdt.Writer()
    with w.node():
        w.property("a", kind(b"value"))
    assert fdt.parse(w.finish()).root["a"] == b"value"


def test_a_strided_buffer_is_accepted() -> None:
    blob = data(EDITED)
    spread: Any = np.zeros(len(blob) * 2, np.uint8)
    spread[::2] = np.frombuffer(blob, np.uint8)
    assert bytes(fdt.parse(spread[::2])) == blob
    rows: Any = np.frombuffer(blob, np.uint8).reshape(5, -1)
    assert bytes(fdt.parse(rows)) == blob


def test_only_totalsize_bytes_of_a_huge_buffer_are_read(tmp_path: Path) -> None:
    sparse = tmp_path / "ram"
    sparse.write_bytes(data(EDITED))
    with sparse.open("r+b") as f:
        f.truncate(1 << 40)
    ram: Any = np.memmap(sparse, np.uint8, "r")
    assert bytes(fdt.parse(ram)) == data(EDITED)
    with pytest.raises(FdtError, match="magic 0x00000000"):
        fdt.parse(ram[1 << 30 :])


@pytest.mark.parametrize("wrong", ["text", None, 7, np.zeros(40, np.uint64)])
def test_objects_that_are_not_byte_buffers_are_refused(wrong: object) -> None:
    with pytest.raises((TypeError, BufferError)):
        fdt.parse(wrong)  # type: ignore[arg-type]


def test_a_blob_without_its_string_block_keeps_its_values() -> None:
    with pytest.raises(FdtError, match=r"^FDT at offset 0xe9: cut short: 233 bytes of 405$"):
        fdt.parse(data(CUT))
    tree, problem = fdt.Fdt.partial(data(CUT))
    assert isinstance(problem, FdtError)
    assert str(problem) == "FDT at offset 0xe9: cut short: 233 bytes of 405"
    assert [node.path for node in tree.walk()] == ["/", "/memblock", "/LUO", "/kho_test"]
    assert tree.root.raw_properties == [
        (None, 21, b"kho-v4\0"),
        (None, 0, (0x4EE000).to_bytes(8, "little")),
    ]
    assert tree.root.properties == {}
    assert (tree.totalsize, bytes(tree)) == (405, data(CUT))


def test_partial_reports_no_error_for_a_complete_blob() -> None:
    tree, problem = fdt.Fdt.partial(data(EDITED))
    assert problem is None
    assert tree["/kexec-metadata"].u64("blob-size") == 73


def test_a_blob_cut_before_its_root_has_no_root() -> None:
    tree, problem = fdt.Fdt.partial(data(EDITED)[:40])
    assert problem is not None
    assert tree.walk() == []
    with pytest.raises(NotFoundError):
        _ = tree.root


@settings(max_examples=200)
@given(st.binary(max_size=200), st.sampled_from(KERNEL_BLOBS), st.integers(0, 500), st.integers(0, 3000))
def test_malformed_bytes_raise_fdt_error(noise: bytes, name: str, cut: int, bit: int) -> None:
    blob = data(name)
    flipped = bytearray(blob)
    flipped[bit // 8 % len(blob)] ^= 1 << bit % 8
    for hostile in (noise, blob[:cut] + noise, bytes(flipped)):
        try:
            tree, problem = fdt.Fdt.partial(hostile)
        except FdtError:
            continue
        for node in tree.walk():
            assert node.path.startswith("/")
            assert len(node.properties) <= len(node.raw_properties)
        if problem is None:
            assert tree_of(fdt.parse(hostile).root) == tree_of(tree.root)
        else:
            with pytest.raises(FdtError) as error:
                fdt.parse(hostile)
            assert str(error.value) == str(problem)


def test_a_placeholder_is_filled_before_the_end() -> None:
    w = fdt.Writer()
    with w.node():
        w.property_str("compatible", "kho-v1")
        place = w.placeholder("preserved-memory-map", 8)
        for name, phys in [("kho_test", 0x50A000), ("memblock", 0x6C6000)]:
            with w.node(name):
                w.property_u64("fdt", phys)
    with pytest.raises(FdtError, match='"preserved-memory-map" has 4 bytes, not 8'):
        place.fill(bytes(4))
    place.fill_u64(0x6D4000)
    assert w.finish() == data("linux-6.18.15-out-fdt.dtb")
    with pytest.raises(FdtError, match="finished"):
        place.fill(bytes(8))
    with pytest.raises(FdtError, match="finished"):
        w.finish()


def test_a_writer_stays_usable_after_finish_fails() -> None:
    w = fdt.Writer()
    w.begin_node()
    with pytest.raises(FdtError, match="while a node is open"):
        w.finish()
    w.property_u32("a", 1)
    w.end_node()
    assert fdt.parse(w.finish()).root.u32("a") == 1


def test_a_full_buffer_is_an_error() -> None:
    w = fdt.Writer(128)
    assert w.capacity == 128
    with pytest.raises(FdtError, match="does not fit its buffer of 128 bytes"), w.node():
        w.property("a", bytes(100))
    assert fdt.parse(w.finish()).root.properties == {}


def test_unbalanced_nodes_are_an_error() -> None:
    w = fdt.Writer()
    with pytest.raises(FdtError, match="do not match"), w.node():
        w.begin_node("a")
    w = fdt.Writer()
    with pytest.raises(KeyError), w.node():
        w.begin_node("a")
        raise KeyError


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_a_value_out_of_range_overflows(value: int) -> None:
    w = fdt.Writer()
    w.begin_node()
    with pytest.raises(OverflowError):
        w.property_u64("a", value)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_libfdt_writes_the_same_bytes(tree: Tree) -> None:
    assert write(tree) == write_with_libfdt(tree)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_libfdt_reads_what_we_write(tree: Tree) -> None:
    blob = libfdt.FdtRo(write(tree))

    def check(offset: int, tree: Tree) -> None:
        assert blob.get_name(offset) == tree.name
        found = []
        at = blob.first_property_offset(offset, libfdt.QUIET_NOTFOUND)
        while at >= 0:
            prop = blob.get_property_by_offset(at)
            found.append((prop.name, bytes(prop)))
            at = blob.next_property_offset(at, libfdt.QUIET_NOTFOUND)
        assert found == tree.props
        children = []
        at = blob.first_subnode(offset, libfdt.QUIET_NOTFOUND)
        while at >= 0:
            children.append(at)
            at = blob.next_subnode(at, libfdt.QUIET_NOTFOUND)
        assert len(children) == len(tree.children)
        for at, child in zip(children, tree.children, strict=True):
            check(at, child)

    check(0, tree)


@settings(max_examples=200, deadline=None)
@given(trees.map(with_unique_names))
def test_the_package_fdt_reads_what_we_write(tree: Tree) -> None:
    def as_tree(node: pyfdt.Node) -> Tree:
        name = "" if node.name == "/" else node.name
        props = [(p.name, pyfdt_value(p)) for p in node.props]
        return Tree(name, props, [as_tree(child) for child in node.nodes])

    assert as_tree(pyfdt.parse_dtb(write(tree)).root) == tree


def pyfdt_value(prop: pyfdt.items.BaseItem) -> bytes:
    """The bytes of a property: the package guesses types, this reverses the guess."""
    if isinstance(prop, pyfdt.PropStrings):
        return b"".join(text.encode() + b"\0" for text in prop.data)
    if isinstance(prop, pyfdt.PropWords):
        return b"".join(word.to_bytes(4, "big") for word in prop.data)
    if isinstance(prop, pyfdt.PropBytes):
        return bytes(prop.data)
    return b""


def dtc(*args: str, stdin: bytes) -> bytes:
    tool = shutil.which("dtc")
    if tool is None:
        pytest.fail("dtc is not installed: apt-get install device-tree-compiler (Fedora: dnf install dtc)")
    return subprocess.run([tool, "-q", *args], input=stdin, capture_output=True, check=True).stdout


@pytest.mark.parametrize("name", [*SEQUENTIAL, EDITED])
def test_dtc_reads_the_kernels_blob_and_ours_equally(name: str) -> None:
    ours = write(tree_of(fdt.parse(data(name)).root))
    as_source = ("-I", "dtb", "-O", "dts")
    assert dtc(*as_source, stdin=ours) == dtc(*as_source, stdin=data(name))


@settings(max_examples=25, deadline=None)
@given(trees.map(with_unique_names))
def test_our_blob_survives_a_round_trip_through_dtc(tree: Tree) -> None:
    through_dtc = dtc("-f", "-I", "dtb", "-O", "dtb", stdin=write(tree))
    assert tree_of(fdt.parse(through_dtc).root) == tree


def test_blobs_compiled_by_dtc_are_read() -> None:
    source = b"""/dts-v1/;
    /memreserve/ 0x10000 0x2000;
    / { compatible = "a", "b"; data = [01 02 03]; empty; words = <1 0x80000000>;
        node@1 { inner { reg = <7>; linux,reg = [07 00 00 00]; }; }; };"""
    for version in ("16", "17"):
        tree = fdt.parse(dtc("-I", "dts", "-O", "dtb", "-V", version, stdin=source))
        assert tree.version == int(version)
        assert tree.reservations == [(0x10000, 0x2000)]
        assert tree.root.strings("compatible") == ["a", "b"]
        assert tree.root["data"] == b"\1\2\3"
        assert tree.root["empty"] == b""
        assert tree.root["words"] == b"\0\0\0\1\x80\0\0\0"
        inner = tree["/node@1/inner"]
        assert inner["reg"] == b"\0\0\0\7"
        assert inner.u32("linux,reg") == 7


def test_importing_it_needs_no_numpy() -> None:
    code = "import sys, kho.fdt; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
