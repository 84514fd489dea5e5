#!/usr/bin/env bash
# Guess: an ELF core whose PT_LOAD has p_filesz < p_memsz reads the same everywhere: the saved
#   part is there, and the part that the dumper left out (makedumpfile -E writes such segments)
#   is reported as missing.
# What happens: the saved part and the hole depend on the reader.
#   drgn, core without VMCOREINFO     saved part read; hole: FaultError
#   drgn, the same core with a note   saved part read; hole: zeros, no error
#   libkdumpfile (from drgn's wheel)  saved part read; hole: "Page not found"
#   volatility3                       the whole segment is dropped, the saved part included
#   So with drgn a zero in a filtered ELF dump may be a page that held data, and volatility3 loses
#   memory that is in the file; neither prints a warning.
# Versions: drgn 0.3.0, volatility3 2.28.2; Python 3.11, x86_64.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check drgn==0.3.0 volatility3==2.28.2
cd "$tmp"
venv/bin/python - <<'EOF'
import ctypes, glob, os, struct, sys

import drgn
from volatility3.framework import contexts, exceptions
from volatility3.framework.layers import elf, physical

PAGE = 4096
VMCOREINFO = (
    b"OSRELEASE=6.12.0\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff82a00000\n"
    b"SYMBOL(swapper_pg_dir)=ffffffff82a10000\nNUMBER(phys_base)=0\nKERNELOFFSET=0\n"
)
# Two segments: two pages with only one of them saved, and one page that is saved completely.
LOADS = [(0x10000, b"A" * PAGE, 2 * PAGE), (0x20000, b"B" * PAGE, PAGE)]
SAVED, HOLE, WHOLE = 0x10000, 0x11000, 0x20000


def note(name, kind, data):
    name += b"\0"
    pad = lambda b: b + bytes(-len(b) % 4)
    return struct.pack("<III", len(name), len(data), kind) + pad(name) + pad(data)


def write_core(path, vmcoreinfo):
    notes = note(b"CORE", 1, bytes(336))
    if vmcoreinfo:
        notes += note(b"VMCOREINFO", 0, VMCOREINFO)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 4, 62, 1, 0, 64, 0, 0, 64, 56, 1 + len(LOADS), 0, 0, 0
    )
    head += struct.pack("<IIQQQQQQ", 4, 0, PAGE, 0, 0, len(notes), len(notes), 4)
    body = b""
    for phys, data, memsz in LOADS:
        virt = 0xFFFF888000000000 + phys
        head += struct.pack("<IIQQQQQQ", 1, 7, 2 * PAGE + len(body), virt, phys, len(data), memsz, 0)
        body += data
    with open(path, "wb") as file:
        file.write(head.ljust(PAGE, b"\0") + notes.ljust(PAGE, b"\0") + body)


def by_drgn(path):
    prog = drgn.Program()
    prog.set_core_dump(path)

    def read(phys):
        try:
            return prog.read(phys, 4, physical=True)
        except drgn.FaultError as e:
            return f"FaultError: {e}"

    return read


def by_libkdumpfile(path):
    (library,) = glob.glob(os.path.dirname(drgn.__file__) + "/../drgn.libs/libkdumpfile-*.so*")
    lib = ctypes.CDLL(library)
    lib.kdump_new.restype = ctypes.c_void_p
    lib.kdump_get_err.restype = ctypes.c_char_p
    lib.kdump_get_err.argtypes = [ctypes.c_void_p]
    lib.kdump_open_fdset.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.POINTER(ctypes.c_int)]
    lib.kdump_read.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)
    ]  # fmt: skip
    dump = lib.kdump_new()
    assert lib.kdump_open_fdset(dump, 1, (ctypes.c_int * 1)(os.open(path, os.O_RDONLY))) == 0

    def read(phys):
        buffer, size = ctypes.create_string_buffer(4), ctypes.c_size_t(4)
        machine_physical = 1
        if lib.kdump_read(dump, machine_physical, phys, buffer, size):
            return lib.kdump_get_err(dump).decode()
        return buffer.raw

    return read


def by_volatility(path):
    context = contexts.Context()
    context.config["base.location"] = "file://" + os.path.abspath(path)
    context.add_layer(physical.FileLayer(context, "base", "base"))
    context.config["elf.base_layer"] = "base"
    layer = elf.Elf64Layer(context, "elf", "elf")

    def read(phys):
        try:
            return layer.read(phys, 4)
        except exceptions.InvalidAddressException as e:
            return f"InvalidAddressException: {e}"

    return read


write_core("plain.elf", vmcoreinfo=False)
write_core("noted.elf", vmcoreinfo=True)
seen = {}
for name, read in {
    "drgn, no VMCOREINFO": by_drgn("plain.elf"),
    "drgn, VMCOREINFO": by_drgn("noted.elf"),
    "libkdumpfile": by_libkdumpfile("noted.elf"),
    "volatility3": by_volatility("noted.elf"),
}.items():
    seen[name] = [read(phys) for phys in (SAVED, HOLE, WHOLE)]
    print(f"{name:20} saved {seen[name][0]!r}; hole {seen[name][1]!r}; whole {seen[name][2]!r}")

same = (
    all(reads[2] == b"BBBB" for reads in seen.values())
    and all(seen[name][0] == b"AAAA" for name in seen if name != "volatility3")
    and "not saved" in seen["drgn, no VMCOREINFO"][1]
    and seen["drgn, VMCOREINFO"][1] == bytes(4)
    and seen["libkdumpfile"][1] == "Page not found"
    and "Invalid address" in seen["volatility3"][0]
    and "Invalid address" in seen["volatility3"][1]
)
sys.exit(0 if same else "the behavior has changed")
EOF
