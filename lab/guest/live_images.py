"""kho.live over three kernels: sizes, late changes, deaths, `kho hold`, exec, and a store like systemd's.

Each claim is a line `CLAIM {"text": ..., "held": ..., "evidence": ...}`; an image's object tells which kernel wrote it.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import kexec as kernel
import numpy as np

import kho
import kho.live
from kho import luo

PHASE = int(kernel.argument("phase", "1"))
SEALS_CROSS = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (7, 1)
"""Whether a memfd comes back with its seals."""
SIZES = kernel.argument("sizes", "8M,64M").split(",")
PAGES = 200
"""At 0.5 to 1 us each far below 5 ms: what opening may touch at any size. The requests to the kernel cause none."""
TAKEN: list[Any] = []
"""Handles and sessions that must be open when the kernel jumps."""
SERVICE = """
import os, signal, sys, time, kho.live
h = kho.live.open("held", kexec=True)
n = int(bytes(h["n"])) + 1 if h.inherited else 1
print("HELD", n, h.transport, h.generation, flush=True)
h.put("n", str(n).encode()); h.commit()
if n % 2: os.kill(os.getpid(), signal.SIGKILL)
open("/run/held", "w").close()
time.sleep(100000)
"""
EXECED = """
import sys, kho.live
h = kho.live.open("exec", "2M", kexec=True)
print(h.transport, h.generation, *h.names(), flush=True)
if sys.argv[1:] == ["again"]:
    kho.live.exec([sys.executable, "-c", sys.orig_argv[4]])
"""


def claim(text: str, held: object, evidence: object = "") -> None:
    """Say whether something held."""
    print("CLAIM", json.dumps({"text": text, "held": bool(held), "evidence": str(evidence)}), flush=True)


def fresh(code: str, *args: str, **more: Any) -> tuple[int, str]:
    """Run code in a new interpreter."""
    command = [
        sys.executable,
        "-W",
        "always",
        "-c",
        "import os, sys, kho, kho.live\nfrom kho import luo\n" + code,
        *args,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    return done.returncode, (done.stdout + done.stderr).strip()


def values(n: int, phase: int) -> np.ndarray[Any, Any]:
    """What a kernel writes."""
    return np.arange(n, dtype="u4") * 2654435761 + phase


def opened(name: str, size: str = "2M", **more: Any) -> kho.live.Handle:
    """An image that is to be preserved."""
    h = kho.live.open(name, size, **({"kexec": True} | more))
    TAKEN.append(h)
    return h


def sized(size: str) -> None:
    """An image over the kernels: contents, commits, what was not committed."""
    name, where = f"image-{size}", f"{size}, kernel {PHASE}"
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    h = opened(name, size)
    seconds, touched = time.process_time() - began, resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    n = min(h.stats()["size"] // 3, 64 << 20) // 4
    if PHASE == 1:
        h.put("table", values(n, 1))
    else:
        old = PHASE - 1
        whole = np.array_equal(h["table"], values(n, old)) and h.verify() > 0
        late = bytes(h["late"]).decode() == f"after kernel {old} was told to load the next"
        found = (
            f"{h.transport}, generation {h.generation}, {h.stats()['allocated_bytes']} bytes, {seconds:.2f} s of CPU"
        )
        claim(f"{where}: every object is as the last kernel left it", h.inherited and whole, found)
        claim(f"{where}: a commit after the next kernel was loaded is handed over", late, found)
        claim(f"{where}: what was not committed is named in dropped", h.dropped == ("lost",), h.dropped)
        claim(f"{where}: no free memory was punched (holes is 0)", h.stats()["holes"] == 0, h.stats())
        if SEALS_CROSS:  # else it is copied into a memfd that is sealed
            text = f"{where}: opening it touched fewer than {PAGES} pages, as it would at any size"
            claim(text, touched < PAGES, f"{touched} page faults; {found}")
        seals = fcntl.fcntl(h.fileno(), fcntl.F_GET_SEALS)
        mode = os.fstat(h.fileno()).st_mode & 0o777
        claim(f"{where}: the memfd is sealed, of mode 0600", (seals, mode) == (7, 0o600), f"{seals:#x} {mode:o}")
        h.put("table", values(n, PHASE))
    h.commit()


def late_changes() -> None:
    """Commits and changes after kexec_file_load."""
    for h in TAKEN:
        if isinstance(h, kho.live.Handle) and h.name.startswith("image-"):
            h.put("late", f"after kernel {PHASE} was told to load the next".encode())
            h.commit()
            h.put("lost", b"not committed")


def wait_for(path: str, seconds: float = 120) -> bool:
    """Wait for a file."""
    end = time.monotonic() + seconds
    while not Path(path).exists() and time.monotonic() < end:
        time.sleep(0.2)
    return Path(path).exists()


def hold() -> None:
    """A holder and its command, which is killed once in each kernel."""
    log = open("/run/hold.log", "w+")  # noqa: SIM115, PTH123
    command = [sys.executable, "-m", "kho", "hold", "held", "--size", "2M", "--", sys.executable, "-c", SERVICE]
    TAKEN.extend([log, subprocess.Popen(command, stdout=log, stderr=log)])
    ready = wait_for("/run/held")
    said = Path("/run/hold.log").read_text()
    counts = [int(line.split()[1]) for line in said.splitlines() if line.startswith("HELD")]
    claim(f"kho hold: kernel {PHASE} goes on counting", ready and counts == [2 * PHASE - 1, 2 * PHASE], said)
    if PHASE > 1:
        claim(
            f"kho hold: the holder of kernel {PHASE} asks the kernel first", "memory of the last kernel" in said, said
        )


def store() -> None:
    """A store like systemd's: it keeps the memfd, preserves it in its own session, passes it by LISTEN_FDS."""
    address = "/run/notify"
    conn = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    conn.bind(address)
    conn.settimeout(120)
    TAKEN.append(conn)
    environ = os.environ | {"NOTIFY_SOCKET": address, "FDSTORE": "4"}
    code = 'h = kho.live.open("sysd", "2M", kexec=True)\nprint(h.transport, h.generation, *h.names())\n'
    code += f'h.put("kernel-{PHASE}", b"x"); h.commit()\n'
    pass_fds: tuple[int, ...] = ()
    if PHASE > 1:
        with luo.Device() as device:
            session = device.retrieve_session("systemd")
        fd = os.dup2(session.retrieve_fd(1), 100)
        session.finish()
        session.close()
        link = str(Path(f"/proc/self/fd/{fd}").readlink())
        claim(f"a retrieved memfd has no name, kernel {PHASE}", link == "/ (deleted)", link)
        code = (
            "import os\nos.dup2(100, 3)\n"
            'os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="kho-live-sysd")\n' + code
        )
        pass_fds = (100,)
    status, said = fresh(code, env=environ, pass_fds=pass_fds)
    expected = (
        "new 0" if PHASE == 1 else " ".join(["systemd", str(PHASE - 1), *(f"kernel-{n}" for n in range(1, PHASE))])
    )
    claim(f"a store like systemd's, kernel {PHASE}: the service finds its image", (status, said) == (0, expected), said)
    fds: list[int] = []
    while not fds:  # a message that removes a descriptor has none
        _, fds, _, _ = socket.recv_fds(conn, 4096, 4)
    with luo.Device() as device:
        session = device.create_session("systemd")
    session.preserve_fd(fds[0], 1)
    TAKEN.append(session)


def execed() -> None:
    """Exec with an image that came by kexec."""
    if PHASE == 1:
        opened("exec").put("a", b"a")
        TAKEN[-1].commit()
    if PHASE == 2:
        status, said = fresh(EXECED.replace("import sys, kho.live\n", ""), "again")
        claim("kho.live.exec passes an image on that came by kexec", said == "kexec 1 a\nexec 1 a", (status, said))


def deaths() -> None:
    """Processes that end between retrieving and preserving; another version; two at once."""
    if PHASE == 1:
        for name in ("dies", "version", "race"):
            opened(name).put("a", b"a")
            TAKEN[-1].commit()
    if PHASE == 2:
        code = 'luo.Session.preserve_fd = lambda *_: os._exit(3)\nkho.live.open("dies", "2M", kexec=True)'
        first = fresh(code)
        second = fresh('h = kho.live.open("dies", "2M", kexec=True)\nprint(h.transport, h.inherited)')
        text = "a process that dies between retrieving and preserving takes the image along, as documented"
        claim(text, (first[0], second) == (3, (0, "new False")), (first, second))
        status, said = fresh('kho.live.open("version", "2M", version="2", kexec=True)')
        said = said[said.find("kho.errors.") :]
        claim(
            "SchemaError after a kexec says that the image will be lost", status and "THE IMAGE IS LOST" in said, said
        )
        code = 'try:\n h = kho.live.open("race", "2M", kexec=True)\n print(h.transport)\n sys.stdin.read()\n'
        code += "except kho.KhoError as error:\n print(type(error).__name__)"
        start = "import sys, kho, kho.live\n"
        several = [
            subprocess.Popen([sys.executable, "-c", start + code], stdin=-1, stdout=-1, text=True) for _ in range(3)
        ]
        said = sorted(one.stdout.readline().strip() for one in several if one.stdout)
        for one in several:
            one.communicate()
        held = said.count("kexec") == 1 and set(said) <= {"kexec", "socket", "BusyError", "LuoExistsError"}
        claim("of three processes one takes the image over from the last kernel, no process begins again", held, said)


def memory() -> None:
    """What does not fit is refused, and no process is killed."""
    if PHASE > 1:
        return
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {words[0]: int(words[1]) for words in lines}
    available, scratch = kib["MemAvailable:"], kib["CmaFree:"] - kib["CmaTotal:"]
    sizes = {"does not fit in memory": 2 * kib["MemTotal:"], "fits with scratch only": available - scratch // 2}
    for text, size in sizes.items():
        status, said = fresh(f'kho.live.open("huge", {size} << 10, kexec=True)')
        killed = kernel.dmesg("out of memory", "killed process")
        held = status == 1 and "OutOfMemoryError" in said and not killed
        claim(
            f"an image that {text} is refused",
            held,
            (f"{size} of {available} KiB, {scratch} in scratch", said[-300:], killed),
        )


def noexec() -> None:
    """vm.memfd_noexec=1."""
    sysctl = Path("/proc/sys/vm/memfd_noexec")
    if not sysctl.exists():
        return
    if PHASE == 1:
        sysctl.write_text("1\n")
        h = opened("noexec", kexec=False, backing="memfd")
        sysctl.write_text("0\n")
        h.put("a", b"a")
        h.commit()
        h.preserve()
    elif PHASE == 2:
        h = opened("noexec")
        h.put("b", b"b")
        held = h.inherited and h.commit() == 2
        claim("an image made under vm.memfd_noexec=1 without kexec=True can be written after a kexec", held, h.names())


def sealed() -> None:
    """A memfd with F_SEAL_EXEC."""
    if not SEALS_CROSS:
        return
    name = "sealed"
    if PHASE == 1:
        fd = os.memfd_create("kho-live:sealed", os.MFD_CLOEXEC | 0x8)
        with kho.live.open(name, "2M", backing=fd) as h:
            h.put("a", b"a")
            h.commit()
        with luo.Device() as device:
            session = device.create_session(f"kho-live/{name}")
        session.preserve_fd(fd, 1)
        TAKEN.append(session)
    elif PHASE == 2:
        try:
            opened(name)
            claim("a memfd that came back write-sealed is said to be that", False, "it was opened")
        except kho.ReadOnlyError as error:
            claim(
                "a memfd that came back write-sealed is said to be that", "sealed against writing" in str(error), error
            )
        with kho.live.attach(kho.live.transports.kexec.find(name)) as old:
            kho.live.transports.kexec.forget(name)
            h = opened(name)
            for one in old.names():
                h.put(one, old[one])
        h.commit()
        claim("its copy by the lines of docs/live.md is complete", bytes(h["a"]) == b"a", h.names())


def main() -> None:
    """Check what came from the last kernel, then start the next."""
    print("PHASE", PHASE, os.uname().release, flush=True)
    for part in (
        memory,
        *(lambda size=size: sized(size) for size in SIZES),
        hold,
        store,
        execed,
        deaths,
        noexec,
        sealed,
    ):
        try:
            part()
        except Exception:  # noqa: BLE001
            claim(f"kernel {PHASE}: {getattr(part, '__name__', part)} runs to its end", False, traceback.format_exc())
    log = kernel.dmesg()
    words = ("cut here", "call trace", "warning:", "killed process")
    found = next((at for at, line in enumerate(log) if any(word in line.lower() for word in words)), None)
    trouble = [] if found is None else log[max(found - 5, 0) : found + 10]
    claim(f"kernel {PHASE} has logged no warning and killed no process", not trouble, "\n".join(trouble))
    print("END", PHASE, flush=True)
    if PHASE < 3:
        kernel.load("next", phase=PHASE + 1)
        late_changes()
        kernel.jump()
    for one in TAKEN:
        if isinstance(one, subprocess.Popen):
            one.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001
        print("BROKEN", traceback.format_exc(), flush=True)
