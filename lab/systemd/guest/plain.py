"""A plain service: stores a memfd in systemd's descriptor store, and records what comes back. No kho in it.

plain.py NAME [size=BYTES] [exit=STATUS] [kinds]
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import socket
import sys
from pathlib import Path

from record import LAB, charged, notify, record

F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEALS = 0x6
"""F_SEAL_SHRINK | F_SEAL_GROW."""
PAGE = 4096
"""The first page holds a counter, each other one the pattern: MemoryMax= leaves no room for another copy of it."""


def store(fd: int, name: str, more: str = "") -> None:
    """Put a descriptor into the store."""
    notify(f"FDSTORE=1\nFDNAME={name}{more}", fd)


def pattern(name: str) -> bytes:
    """Return the bytes of each page of an image after the first one."""
    return hashlib.sha256(name.encode()).digest() * (PAGE // 32)


def new(name: str, nbytes: int) -> int:
    """Make a sealed memfd with a counter of 1 and the pattern."""
    fd = os.memfd_create("img", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    os.pwrite(fd, (1).to_bytes(8, "little"), 0)
    page = pattern(name)
    for at in range(PAGE, nbytes, PAGE):
        os.pwrite(fd, page, at)
    fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
    os.lseek(fd, 100, os.SEEK_SET)
    return fd


def found(fd: int, name: str, nbytes: int) -> dict[str, object]:
    """Check a memfd that came, and count this start in it."""
    count = int.from_bytes(os.pread(fd, 8, 0), "little")
    stat, page = os.fstat(fd), pattern(name)
    made = {
        "link": str(Path(f"/proc/self/fd/{fd}").readlink()),
        "mode": oct(stat.st_mode & 0o7777),
        "seals": hex(fcntl.fcntl(fd, F_GET_SEALS)),
        "offset": os.lseek(fd, 0, os.SEEK_CUR),
        "equal": stat.st_size == nbytes and all(os.pread(fd, PAGE, at) == page for at in range(PAGE, nbytes, PAGE)),
        "count": count,
    }
    os.pwrite(fd, (count + 1).to_bytes(8, "little"), 0)
    return made


def kinds(kept: list[object]) -> None:
    """Store a descriptor of each kind; those that the kernel can preserve are the memfds."""
    reading, writing = os.pipe()
    kept += [reading, writing]
    store(reading, "pipe", "\nFDPOLL=0")
    store(os.eventfd(5), "eventfd")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind("/run/lab-kinds.sock")
    listening.listen()
    kept.append(listening)
    store(listening.fileno(), "socket")
    Path("/run/lab-file").write_bytes(b"tmpfs")
    store(os.open("/run/lab-file", os.O_RDWR), "tmpfs-file")
    store(os.open(LAB / "disk-file", os.O_RDWR | os.O_CREAT, 0o600), "ext4-file")
    store(os.open(LAB, os.O_RDONLY | os.O_DIRECTORY), "directory")
    store(os.memfd_create("empty", os.MFD_CLOEXEC), "empty-memfd")


def main() -> None:
    """Run."""
    name = sys.argv[1]
    options = dict(each.partition("=")[::2] for each in sys.argv[2:])
    nbytes = int(options.get("size", "65536"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":") if "LISTEN_FDS" in os.environ else []
    came = {given: 3 + place for place, given in enumerate(names)}
    values: dict[str, object] = {"names": sorted(names), "charged": charged()}
    kept: list[object] = []
    if "img" in came:
        values["image"] = found(came["img"], name, nbytes)
        values["charged_after"] = charged()
    else:
        values["image"] = None
        kept.append(fd := new(name, nbytes))
        store(fd, "img")
        if "kinds" in options:
            kinds(kept)
    if "exit" in options:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(int(options["exit"])))
    record(name, **values)
    notify("READY=1")
    while True:
        signal.pause()


main()
