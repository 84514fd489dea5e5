"""What every script in the guest uses: records on the disk, one JSON object a line."""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

LAB = Path("/lab")
RECORDS = LAB / "records.jsonl"
CGROUPS = Path("/sys/fs/cgroup")


def boot() -> int:
    """Return the number of this boot, from 1 on."""
    return int((LAB / "boot").read_text())


def guest() -> str:
    """Return which of the guests this is: the word `lab.guest=` of the command line."""
    return re.findall(r"\blab\.guest=(\w+)", Path("/proc/cmdline").read_text())[-1]


def record(who: str, **values: object) -> None:
    """Append a record and wait until the disk has it: the next moment may be the jump."""
    line = json.dumps({"guest": guest(), "boot": boot(), "who": who, **values}) + "\n"
    fd = os.open(RECORDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, line.encode())
    os.fsync(fd)
    os.close(fd)
    with suppress(OSError), Path("/dev/ttyS0").open("w") as console:
        console.write(f"\r\nlab: boot {boot()}: {who}\r\n")


def charged() -> dict[str, int]:
    """Return the bytes that this process's cgroup is charged for: all of them, and those of shared memory."""
    own = CGROUPS / Path("/proc/self/cgroup").read_text().strip().split("::")[1].lstrip("/")
    made = {}
    with suppress(OSError):
        made["current"] = int((own / "memory.current").read_text())
        found = re.search(r"^shmem (\d+)", (own / "memory.stat").read_text(), re.MULTILINE)
        made["shmem"] = int(found[1]) if found else -1
    return made


def notify(message: str, *fds: int) -> None:
    """Send a message to systemd, with descriptors."""
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as conn:
        conn.connect("\0" + address[1:] if address[0] == "@" else address)
        socket.send_fds(conn, [message.encode()], list(fds))
