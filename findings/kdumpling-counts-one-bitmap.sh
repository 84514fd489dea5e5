#!/usr/bin/env bash
# Guess: kdumpling, which makes dumps to test tools such as drgn with, writes kdump files that libkdumpfile
#   (which drgn reads kdump files with) can read.
# What happens: the file opens without an error, but no page can be read: "Out-of-bounds PFN".
#   bitmap_blocks of the header counts both bitmaps; kdumpling writes two bitmaps and the size of one.
#   A reader takes half of that for each, and the second bitmap for page descriptors.
#   With that one field doubled, the same file is read whole.
# Versions: kdumpling 0.4.0; libkdumpfile as in the wheel of drgn 0.3.0.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check kdumpling==0.4.0 drgn==0.3.0
cd "$tmp"
venv/bin/python - <<'EOF'
import collections, ctypes, glob, os, struct, sys

import drgn
import kdumpling

PAGE, START, COUNT = 4096, 0x100000, 64
memory = b"".join(bytes([i + 1]) * PAGE for i in range(COUNT))
builder = kdumpling.KdumpBuilder()
builder.set_vmcoreinfo("OSRELEASE=6.12.0\nPAGESIZE=4096\n")
builder.add_memory_segment(START, memory)
builder.write("one", format=kdumpling.OutputFormat.KDUMP_COMPRESSED)

BITMAP_BLOCKS = 436  # offset in the header
with open("one", "rb") as file:
    dump = bytearray(file.read())
(blocks,) = struct.unpack_from("<I", dump, BITMAP_BLOCKS)
struct.pack_into("<I", dump, BITMAP_BLOCKS, 2 * blocks)
with open("two", "wb") as file:
    file.write(dump)

(library,) = glob.glob(os.path.dirname(drgn.__file__) + "/../drgn.libs/libkdumpfile-*.so*")
lib = ctypes.CDLL(library)
lib.kdump_new.restype = ctypes.c_void_p
lib.kdump_get_err.restype = ctypes.c_char_p
lib.kdump_get_err.argtypes = [ctypes.c_void_p]
lib.kdump_open_fdset.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.POINTER(ctypes.c_int)]
lib.kdump_read.argtypes = [
    ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)
]  # fmt: skip


def read(path):
    """What comes of each page: right, wrong, or an error."""
    handle = lib.kdump_new()
    assert lib.kdump_open_fdset(handle, 1, (ctypes.c_int * 1)(os.open(path, os.O_RDONLY))) == 0
    results = collections.Counter()
    for i in range(COUNT):
        buffer, size = ctypes.create_string_buffer(PAGE), ctypes.c_size_t(PAGE)
        machine_physical = 1
        if lib.kdump_read(handle, machine_physical, START + i * PAGE, buffer, size):
            results[lib.kdump_get_err(handle).decode()] += 1
        else:
            results["right" if buffer.raw == memory[i * PAGE :][:PAGE] else "wrong"] += 1
    return dict(results)


as_written, doubled = read("one"), read("two")
print(f"bitmap_blocks {blocks}, as written: {as_written}")
print(f"bitmap_blocks {2 * blocks}: {doubled}")
same = as_written == {"Out-of-bounds PFN": COUNT} and doubled == {"right": COUNT}
sys.exit(0 if same else "the behavior has changed")
EOF
