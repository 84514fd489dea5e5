#!/usr/bin/env bash
# Guess: tools that read ELF cores handle more than 65535 program headers (e_phnum is PN_XNUM, the
#   real number is sh_info of section 0: what the kernel, gcore and QEMU's dump -p write), or refuse.
# What happens, with a valid core of 70000 PT_LOADs of 16 bytes each:
#   pyelftools, drgn   70000; all memory is there
#   goblin (Rust)      65535 segments, Ok(..): the rest does not exist
#   volatility3        65535 segments: reads of the rest are invalid addresses
#   LIEF               10000 segments: a limit of its own comes first; parse() succeeds
#   No error and no exception in the last three: the dump looks shorter than it is.
# Versions: pyelftools 0.33, drgn 0.3.0, volatility3 2.28.2, LIEF 1.0.0, goblin 0.10.7. The crate is
#   skipped if there is no cargo.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check \
    pyelftools==0.33 drgn==0.3.0 volatility3==2.28.2 lief==1.0.0
cd "$tmp"
venv/bin/python - <<'EOF'
import os, struct, sys

import drgn, lief
from elftools.elf.elffile import ELFFile
from volatility3.framework import contexts, exceptions
from volatility3.framework.layers import elf, physical

COUNT, PN_XNUM, PAGE = 70000, 0xFFFF, 4096


def address(i):
    return i * 2 * PAGE


def content(i):
    return struct.pack("<I", i) * 4


table_end = 64 + 56 * COUNT
data_start = table_end + 64
with open("core", "wb") as file:
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    file.write(
        struct.pack(
            "<16sHHIQQQIHHHHHH", ident, 4, 62, 1, 0, 64, table_end, 0, 64, 56, PN_XNUM, 64, 1, 0
        )
    )
    for i in range(COUNT):
        offset = data_start + 16 * i
        file.write(struct.pack("<IIQQQQQQ", 1, 6, offset, address(i), address(i), 16, 16, 0))
    file.write(struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, COUNT, 0, 0))
    for i in range(COUNT):
        file.write(content(i))

seen = {}
with open("core", "rb") as file:
    seen["pyelftools"] = ELFFile(file).num_segments()
prog = drgn.Program()
prog.set_core_dump("core")
seen["drgn reads the last"] = prog.read(address(COUNT - 1), 16, physical=True) == content(COUNT - 1)
seen["LIEF"] = len(lief.parse("core").segments)

context = contexts.Context()
context.config["base.location"] = "file://" + os.path.abspath("core")
context.add_layer(physical.FileLayer(context, "base", "base"))
context.config["elf.base_layer"] = "base"
layer = elf.Elf64Layer(context, "elf", "elf")


def volatility_reads(i):
    try:
        return layer.read(address(i), 16) == content(i)
    except exceptions.InvalidAddressException:
        return False


seen["volatility3 reads 65534, 65535"] = (volatility_reads(65534), volatility_reads(65535))
for name, value in seen.items():
    print(f"{name}: {value}")
expected = [COUNT, True, 10000, (True, False)]
sys.exit(0 if list(seen.values()) == expected else f"the behavior has changed: expected {expected}")
EOF

if ! command -v cargo >/dev/null; then
    echo "goblin: skipped, there is no cargo"
    exit 0
fi
mkdir -p reader/src
cat >reader/Cargo.toml <<'EOF'
[package]
name = "reader"
version = "0.0.0"
edition = "2021"

[dependencies]
goblin = "=0.10.7"
EOF
cat >reader/src/main.rs <<'EOF'
fn main() {
    let core = std::fs::read("core").unwrap();
    println!("{}", goblin::elf::Elf::parse(&core).unwrap().program_headers.len());
}
EOF
CARGO_TARGET_DIR=$tmp/target cargo build -q --manifest-path reader/Cargo.toml
segments=$(target/debug/reader)
echo "goblin: $segments"
[ "$segments" = 65535 ] || { echo "the behavior has changed: goblin" >&2; exit 1; }
