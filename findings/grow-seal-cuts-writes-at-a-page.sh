#!/usr/bin/env bash
# Guess: a write() that crosses the end of a memfd sealed with F_SEAL_GROW either fails with EPERM and changes
#   nothing, or is short: it fills the file to its last byte, as with RLIMIT_FSIZE.
# What happens: it is short, and cut at the last page boundary before the end. On 6000 bytes, write() of
#   8192 returns 4096; the loop that every "write all" has then gets EPERM for the rest, though 1904 of those
#   bytes lie in the file, and they stay as they were. On 100 bytes (less than a page) nothing is
#   written. A write that ends at the size works, and with RLIMIT_FSIZE at 6000 the call returns 6000.
#   So whether an oversized write leaves a file full, partly new or unchanged depends on its size modulo 4096.
# Versions: Linux 6.18.44, pages of 4096; Python 3.11 (only as a way to the system calls).
set -euo pipefail
uname -sr
python3 - <<'EOF'
import errno, fcntl, os, resource, signal, sys

F_ADD_SEALS, F_SEAL_GROW, MORE = 1033, 4, 8192


def write(fd, size, offset):
    try:
        return os.pwrite(fd, b"x" * size, offset)
    except OSError as e:
        return errno.errorcode[e.errno]


def sealed(size):
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_GROW)
    return fd


def write_all(size):
    """What the calls of a loop return, and how many bytes of the file are new."""
    fd, done, results = sealed(size), 0, []
    while True:
        results.append(write(fd, MORE - done, done))
        if isinstance(results[-1], str):
            return results, os.pread(fd, size, 0).count(b"x")
        done += results[-1]


seen = {size: write_all(size) for size in (100, 4096, 6000)}
for size, (results, new) in seen.items():
    print(f"{size} bytes, write() of {MORE}: {results}, {new} bytes written")
exact = write(sealed(6000), 6000, 0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
limited = write(os.memfd_create("limited"), MORE, 0)
print(f"write() of 6000 to 6000 bytes: {exact}; of {MORE} with RLIMIT_FSIZE 6000: {limited}")
expected = {100: (["EPERM"], 0), 4096: ([4096, "EPERM"], 4096), 6000: ([4096, "EPERM"], 4096)}
same = seen == expected and exact == limited == 6000
sys.exit(0 if same else f"the behavior has changed: expected {expected}, 6000, 6000")
EOF
