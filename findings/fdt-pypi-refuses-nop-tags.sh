#!/usr/bin/env bash
# Guess: a tree from which libfdt has removed a property or a node is a valid blob for every reader.
# What happens: fdt_nop_property() and fdt_nop_node() leave FDT_NOP tags, which the specification allows
#   between other tags of the structure block: it is how a tree is edited without moving it. libfdt
#   and PyPI's pyfdt read on. PyPI's fdt raises Exception("Unknown Tag: 4") for the whole tree.
# Versions: PyPI fdt 0.3.3, pyfdt 0.3, pylibfdt 1.7.2.post2.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check fdt==0.3.3 pyfdt==0.3 pylibfdt==1.7.2.post2
"$tmp/venv/bin/python" - <<'EOF'
import io, sys

import fdt, libfdt
from pyfdt.pyfdt import FdtBlobParse

sw = libfdt.FdtSw()
sw.finish_reservemap()
with sw.add_node(""):
    sw.property_string("compatible", "kho-v1")
    with sw.add_node("memblock"):
        sw.property_string("fdt", "a")
    with sw.add_node("LUO"):
        sw.property_string("fdt", "b")
whole = bytes(sw.as_fdt().as_bytearray())


def without(path, name=None):
    """The tree after libfdt has removed a node, or a property of it, in place."""
    tree = libfdt.Fdt(whole)
    node = tree.path_offset(path)
    status = libfdt.fdt_nop_property(tree._fdt, node, name) if name else libfdt.fdt_nop_node(tree._fdt, node)
    assert status == 0
    return bytes(tree.as_bytearray())


def by_libfdt(blob):
    tree, names = libfdt.Fdt(blob), []
    offset = tree.first_subnode(0)
    while offset >= 0:
        names.append(tree.get_name(offset))
        offset = tree.next_subnode(offset, libfdt.QUIET_NOTFOUND)
    return names


def by_pyfdt(blob):
    root = FdtBlobParse(io.BytesIO(blob)).to_fdt().get_rootnode()
    return [item.get_name() for item in root if hasattr(item, "subdata")]


def by_fdt(blob):
    try:
        return [node.name for node in fdt.parse_dtb(blob).root.nodes]
    except Exception as e:
        return repr(e)


both = ["memblock", "LUO"]
trees = {
    "whole": (whole, both, both),
    "node removed": (without("/memblock"), both[1:], "Exception('Unknown Tag: 4')"),
    "property removed": (without("/LUO", "fdt"), both, "Exception('Unknown Tag: 4')"),
}
same = True
for name, (blob, nodes, expected) in trees.items():
    seen = by_libfdt(blob), by_pyfdt(blob), by_fdt(blob)
    print(f"{name}: libfdt {seen[0]}, pyfdt {seen[1]}, fdt {seen[2]}")
    same &= seen == (nodes, nodes, expected)
sys.exit(0 if same else "the behavior has changed")
EOF
