#!/usr/bin/env bash
# Guess: close() of the only descriptor of a file releases its flock() and its OFD locks; a mapping
#   keeps the file's pages, not its locks.
# What happens: both belong to the open file description, which a mapping holds as well, even a
#   read-only private one. After close(), with no descriptor left in any process, the lock stays,
#   through munmap() of a part of the mapping, until the last page is unmapped or the process
#   ends. /proc/locks lists it, while /proc/PID/fd of no process has the file. A traditional POSIX
#   lock is released by the close().
#   So "close the file, keep the mapping" does not hand the lock to the next owner.
# Versions: Linux 6.18.44, Python 3.11 (only as a way to the system calls), tmpfs and ext4.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
uname -sr
python3 - <<'EOF'
import ctypes, errno, fcntl, mmap, os, struct, sys

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE
F_OFD_SETLK = 37
WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def flock(fd):
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def ofd(fd):
    fcntl.fcntl(fd, F_OFD_SETLK, WHOLE_FILE)


def posix(fd):
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def taken(lock):
    """Whether a new process that opens the file finds it locked."""
    child = os.fork()
    if child == 0:
        try:
            lock(os.open("file", os.O_RDWR))
            os._exit(0)
        except OSError as e:
            os._exit(1 if e.errno in (errno.EAGAIN, errno.EACCES) else 2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


# The process that asks must not inherit the mapping, or it would hold the lock itself.
MADV_DONTFORK = 10
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def run(lock):
    fd = os.open("file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 2 * PAGE)
    lock(fd)
    address = libc.mmap(None, 2 * PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0)
    libc.madvise(address, 2 * PAGE, MADV_DONTFORK)
    os.close(fd)
    closed = taken(lock)
    inode = f":{os.stat('file').st_ino} "
    with open("/proc/locks") as locks:
        listed = any(inode in line for line in locks)
    libc.munmap(address, PAGE)
    half = taken(lock)
    libc.munmap(address + PAGE, PAGE)
    return closed, listed, half, taken(lock)


seen = {lock.__name__: run(lock) for lock in (flock, ofd, posix)}
for name, (closed, listed, half, unmapped) in seen.items():
    print(f"{name:5} after close {closed}, in /proc/locks {listed}, half unmapped {half}, unmapped {unmapped}")
expected = {"flock": (True, True, True, False), "ofd": (True, True, True, False), "posix": (False,) * 4}
sys.exit(0 if seen == expected else f"the behavior has changed: expected {expected}")
EOF
