"""The commands on a live machine, before (boot=1) and after (boot=2) a KHO boot, as root and as a user.

Prints `CHECK 1|0 TEXT :: EVIDENCE` for each claim; what the kernel shows itself in debugfs and /proc is the truth.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import kexec

import kho

OUT = Path("/sys/kernel/debug/kho/out")
USER = 1000
BOOT = int(kexec.argument("boot", "1"))
WHEN = "before a kexec" if BOOT == 1 else "after a KHO boot"
CLI = importlib.import_module("kho.cli")
for name in ("doctor", "inspect", "verify", "owners", "memmap", "fdt"):
    importlib.import_module(f"kho.cli.{name}")


def run(*words: str, uid: int = 0) -> tuple[int, str]:
    """Run `kho` in a forked child, which has everything imported, as root or as a user; return exit code and output."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            if uid:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                os.environ["HOME"] = "/tmp"
            sys.argv = ["kho", *words]
            try:
                CLI.main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            sys.stdout.flush()
        finally:
            os._exit(code)
    os.close(write)
    said = b""
    while more := os.read(read, 65536):
        said += more
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode(errors="replace")


def data_of(said: str) -> dict[str, Any]:
    """The JSON in the output of a command, which notes may precede or follow."""
    at = said.find("{")
    return json.JSONDecoder().raw_decode(said[at:])[0] if at >= 0 else {}


def check(held: bool, text: str, evidence: str) -> None:
    """Print one claim."""
    print(f"\nCHECK {int(held)} {text} {WHEN} :: {' | '.join(evidence.split(chr(10)))[:1500]}", flush=True)


def numbers(name: str) -> list[int]:
    """The numbers of a file in debugfs."""
    return [int(word, 0) for word in (OUT / name).read_text().split()]


def doctor() -> None:
    """`kho doctor` against debugfs and the release."""
    truth = sum(numbers("scratch_len"))
    code, said = run("doctor", "--json")
    data = data_of(said)
    seen = f"debugfs {truth}, doctor {data.get('scratch')} ({data.get('scratch_how')}), exit code {code}"
    check(
        data.get("scratch") == truth and code in (0, 1),
        "`kho doctor` as root reports the scratch that debugfs lists",
        seen,
    )
    code, said = run("doctor", "--json", uid=USER)
    data = data_of(said)
    seen = f"debugfs {truth}, doctor {data.get('scratch')} ({data.get('scratch_how')}), exit code {code}"
    held = 0 < data.get("scratch", 0) <= truth and code in (0, 1)
    check(held, "`kho doctor` as a user reports scratch, or a lower bound of it", seen)
    previous, count = data.get("previous_release"), data.get("kexec_count")
    want = (None, None) if BOOT == 1 else (os.uname().release, 1)
    seen = f"boot {data.get('boot')}, from {previous}, kexecs {count}"
    check((previous, count) == want, "`kho doctor` tells how the machine was booted", seen)


def live() -> None:
    """inspect, verify, owners, map and fdt on the running machine."""
    names = sorted(path.name for path in (OUT / "sub_fdts").iterdir())
    for command in ("inspect", "verify", "owners", "map", "fdt"):
        code, said = run(command, "live")
        missing = [name for name in names if name not in said] if command in ("inspect", "fdt") else []
        lacks = " ".join(missing) or "none"
        seen = f"exit code {code}; subtrees in debugfs: {' '.join(names)}; missing: {lacks}\n{said[:900]}"
        which = " and names each subtree of debugfs" if command in ("inspect", "fdt") else ""
        held = code == 0 and not missing and "Traceback" not in said
        check(held, f"`kho {command} live` works as root{which}", seen)
        code, said = run(command, "live", uid=USER)
        held = code == 2 and "root" in said and "Traceback" not in said
        seen = f"exit code {code}: {said[:400]}"
        check(held, f"`kho {command} live` as a user exits with 2 and says that it needs root", seen)


def kcore() -> None:
    """The running kernel's own memory."""
    names = sorted(path.name for path in (OUT / "sub_fdts").iterdir())
    code, said = run("inspect", "--json", "/proc/kcore")
    data = data_of(said)
    missing = [name for name in names if f'"{name}"' not in said]
    lacks = " ".join(missing) or "none"
    seen = f"exit code {code}, {data.get('nr_folios')} folios, missing: {lacks}"
    held = code == 0 and not missing
    check(
        held,
        "`kho inspect /proc/kcore` reads the running kernel's outgoing handover",
        seen if held else f"{seen}\n{said[:900]}",
    )
    code, said = run("verify", "/proc/kcore")
    check(code == 0, "`kho verify /proc/kcore` has no error", f"exit code {code}: {said[:600]}")


def main() -> None:
    """Preserve something, check, and jump once."""
    index = kho.live.open("lab-index", "2M", kexec=True)
    index.put("a", b"x" * 100_000)
    index.commit()
    held = (index.inherited and "a" in index.names()) if BOOT == 2 else not index.inherited
    check(
        held,
        "`kho.live.open(kexec=True)` has the image of the last kernel, or begins a new one",
        index.transport or "new",
    )
    doctor()
    live()
    if BOOT == 2:
        kcore()
        print("\nCHECKS END", flush=True)
    else:
        kexec.load("next", boot=2)
        kexec.jump()


try:
    main()
except BaseException:  # noqa: BLE001
    traceback.print_exc()
