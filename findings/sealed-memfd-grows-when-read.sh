#!/usr/bin/env bash
# Guess: a memfd with all seals (SEAL, SHRINK, GROW, WRITE) uses constant memory; a reader that has
#   it O_RDONLY and maps it PROT_READ, MAP_PRIVATE cannot change that. SEEK_DATA reports allocated
#   pages as data and holes as holes.
# What happens: a load from a hole through any mapping allocates a page in the file (tmpfs maps no zero
#   page), so the read-only reader makes st_blocks grow up to the file's size and turns holes into data
#   for SEEK_DATA. read() of the same holes allocates nothing.
#   The other way round, pages that fallocate() allocated are a hole for SEEK_DATA until something
#   touches them, though st_blocks counts them.
#   So what a sparse copy of a memfd contains depends on whether, and how, it was read before.
# Versions: Linux 6.18.44; Python 3.11 (only as a way to the system calls).
set -euo pipefail
uname -sr
python3 - <<'EOF'
import ctypes, errno, fcntl, mmap, os, sys

SIZE = 1 << 20
F_ADD_SEALS, ALL_SEALS = 1033, 0xF
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]


def state(fd):
    """(bytes allocated, offset of the first data or None if all is a hole)."""
    try:
        data = os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as e:
        assert e.errno == errno.ENXIO
        data = None
    return os.fstat(fd).st_blocks * 512, data


seen = {}
sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
os.ftruncate(sealed, SIZE)
fcntl.fcntl(sealed, F_ADD_SEALS, ALL_SEALS)
reader = os.open(f"/proc/self/fd/{sealed}", os.O_RDONLY)
seen["sealed, sparse"] = state(sealed)
assert os.pread(reader, SIZE, 0) == bytes(SIZE)
seen["after pread of all of it"] = state(sealed)
address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, reader, 0)
assert ctypes.string_at(address, SIZE) == bytes(SIZE)
seen["after loads through PROT_READ, MAP_PRIVATE"] = state(sealed)

allocated = os.memfd_create("allocated")
os.posix_fallocate(allocated, 0, SIZE)
seen["after fallocate"] = state(allocated)
address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, allocated, 0)
ctypes.string_at(address, SIZE)
seen["after fallocate and loads"] = state(allocated)
for name, (used, data) in seen.items():
    print(f"{name}: {used} bytes allocated, SEEK_DATA {data}")
expected = [(0, None), (0, None), (SIZE, 0), (SIZE, None), (SIZE, 0)]
sys.exit(0 if list(seen.values()) == expected else f"the behavior has changed: expected {expected}")
EOF
