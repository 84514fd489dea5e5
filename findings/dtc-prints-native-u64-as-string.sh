#!/usr/bin/env bash
# Guess: a devicetree blob turned to source by dtc and back to a blob by another tool keeps its bytes.
#   8-byte properties are printed as cells or bytes.
# What happens: KHO keeps native-endian u64 addresses in properties. dtc decides by the bytes, so a
#   page-aligned little-endian address such as 0x2141426000 (133 GiB), half of whose bytes are
#   printable, is printed as a string with embedded NULs, "\0`BA!\0\0", while its neighbor 0x2100000000
#   is printed as cells. dtc reads the string back right. PyPI's fdt, given that source, takes the
#   escape \0 as two characters: 8 bytes become 13, without a warning, and the tree compiles.
#   The same happens to each string list, which dtc 1.6 prints as one string: compatible = "a\0b".
# Versions: dtc 1.6.1 (Debian 12: device-tree-compiler 1.6.1-4+b1), PyPI fdt 0.3.3, pylibfdt 1.7.2.post2.
#   Exits 77 where apt does not offer that dtc.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
if ! apt-get download -q device-tree-compiler=1.6.1-4+b1 libfdt1=1.6.1-4+b1 libyaml-0-2 >apt.log 2>&1; then
    cat apt.log
    exit 77
fi
for package in ./*.deb; do dpkg -x "$package" tree; done
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check fdt==0.3.3 pylibfdt==1.7.2.post2
PATH=$tmp/tree/usr/bin:$PATH LD_LIBRARY_PATH=$(dirname "$tmp"/tree/usr/lib/*/libfdt.so.1) venv/bin/python - <<'EOF'
import struct, subprocess, sys

import fdt, libfdt

properties = {
    "compatible": b"memfd-v1\0memfd-v0\0",
    "phys": struct.pack("<Q", 0x2141426000),
    "next": struct.pack("<Q", 0x2100000000),
}
sw = libfdt.FdtSw()
sw.finish_reservemap()
with sw.add_node(""):
    for name, value in properties.items():
        sw.property(name, value)
blob = sw.as_fdt().as_bytearray()


def dtc(source, to):
    command = ["dtc", "-q", "-I", {"dts": "dtb", "dtb": "dts"}[to], "-O", to]
    return subprocess.run(command, input=source, stdout=subprocess.PIPE, check=True).stdout


def read(tree):
    tree = libfdt.Fdt(tree)
    return {name: bytes(tree.getprop(0, name)) for name in properties}


source = dtc(blob, "dts")
print(source.decode())
by_dtc = read(dtc(source, "dtb"))
by_fdt = read(fdt.parse_dts(source.decode()).to_dtb(version=17))
for name, value in properties.items():
    print(f"{name}: {value}\n    by way of dtc {by_dtc[name]}\n    by way of fdt {by_fdt[name]}")
same = (
    b'phys = "\\0`BA!\\0\\0";' in source
    and b"next = <" in source
    and by_dtc == properties
    and by_fdt["next"] == properties["next"]
    and by_fdt["phys"] == b"\\0`BA!\\0\\0\0"
    and by_fdt["compatible"] == b"memfd-v1\\0memfd-v0\0"
)
sys.exit(0 if same else "the behavior has changed")
EOF
