"""How the project gets the next version's truth: a handover is captured as the next kernel is told of it, and kho
reads it whole.

The capture is in `captures` of the lab's cache, shaped as those in tests/data: handover.elf, expected.json with what
the guest and the debugger said (not kho), and host/stage1 with debugfs and /proc of the first kernel.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kho
from lab import Claim, Lab
from lab.handover import PLAN, Handed, hand_over

from .images import command, sha256

APPEND = "reserve_mem=64K:4096:keepme test_kho.max_mem=1048576"


def told(handed: Handed, inc: kho.Incoming, version: str) -> dict[str, Any]:
    """What is known of the handover without kho: from the debugger, from raw memory, and from the guest's plan."""
    assert handed.fdt is not None
    assert handed.scratch is not None
    raw = inc.read(handed.scratch, handed.scratch_len)
    fdt = inc.read(handed.fdt, 4096)
    sessions: dict[str, list[dict[str, Any]]] = {}
    for file in PLAN:
        files = sessions.setdefault(file.session, [])
        if file.token is not None:
            entry = {
                "token": file.token,
                "size": file.size,
                "pos": file.pos,
                "seals": file.seals,
                "sha256": file.sha256,
            }
            files.append(entry)
    found = re.search(rb"kho-v\d[^\0]*", fdt)
    return {
        "release": version,
        "page_size": 4096,
        "fdt_phys": handed.fdt,
        "scratch_phys": handed.scratch,
        "compatible": found[0].decode() if found else None,
        "scratch": [list(struct.unpack_from("<QQ", raw, at)) for at in range(0, len(raw), 16)],
        "luo": {"sessions": [{"name": name, "count": len(files), "files": files} for name, files in sessions.items()]},
        "kexec_metadata": {"previous_release": version},
    }


def check(image: Path, truth: dict[str, Any], shown: dict[str, bytes], luo: bool) -> list[str]:
    """Read the capture as a user would, and compare it with what is known; return the differences."""
    wrong = []
    for words in (("inspect", str(image)), ("verify", str(image)), ("owners", str(image))):
        code, said = command(*words)
        if code:
            wrong.append(f"kho {words[0]}: exit code {code}\n{said}")
    inc = kho.open(image)
    for key in ("page_size", "fdt_phys", "scratch_phys", "compatible"):
        if getattr(inc, key) != truth[key]:
            wrong.append(f"{key}: {getattr(inc, key)}, expected {truth[key]}")
    if [list(area) for area in inc.scratch or []] != truth["scratch"]:
        wrong.append(f"scratch: {inc.scratch}, expected {truth['scratch']}")
    for path, blob in shown.items():
        place, _, name = path.rpartition("/")
        if place.endswith("out/sub_fdts") and name in ("memblock", "kho_test", "kexec-metadata"):
            subtree = inc.retrieve_subtree(name)
            if inc.read(subtree.phys, len(blob)) != blob:
                wrong.append(f"subtree {name}: the bytes differ from debugfs")
    if luo:
        assert inc.luo is not None
        for session in truth["luo"]["sessions"]:
            files = inc.luo.sessions[session["name"]].files
            for file in session["files"]:
                data = files[file["token"]].read()
                if len(data) != file["size"] or sha256(data) != file["sha256"]:
                    wrong.append(f"session {session['name']}, file {file['token']:#x}: contents differ")
    return wrong


def capture(lab: Lab, version: str, arch: str) -> Claim:
    """Let a kernel hand over to itself, write the capture, and read it."""
    kernel, out = lab.kernel(version, arch), lab.cache / "captures" / f"linux-{version}-{arch}"
    text = "a handover that `make lab ONLY=capture` takes is read whole, and verified without a finding"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    dump = lab.work(f"{version}-{arch}.dump")
    scratch = "16M,32M,16M" if arch == "x86_64" else "16M,64M,16M"
    handed = hand_over(lab, kernel, kernel, append=APPEND, scratch=scratch, memory=256, dump=dump)
    if handed.dump is None:
        return Claim(text, version, arch, False, "no stop at kho_populate\n" + handed.console.tail(25))
    inc = kho.open(dump, fdt_phys=handed.fdt, scratch=handed.scratch)
    inc.save(out / "handover.elf")
    truth = told(handed, inc, version)
    del inc
    dump.unlink()
    for path, data in handed.files.items():
        place = out / "host" / "stage1" / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    luo = "HAND: /dev/liveupdate errno 0" in handed.console.text
    if not luo:
        del truth["luo"]
    (out / "expected.json").write_text(json.dumps(truth, indent=1) + "\n")
    wrong = check(out / "handover.elf", truth, handed.files, luo)
    files = sum(file.token is not None for file in PLAN) if luo else 0
    evidence = f"{truth['compatible']}, {files} memfds, subtrees equal to debugfs, {out.name}/handover.elf"
    return Claim(text, version, arch, not wrong, "\n".join(wrong) if wrong else evidence)


def run(lab: Lab) -> Iterator[Claim]:
    """Capture each version on x86_64, and the newest on arm64; two guests at a time."""
    arm = [(lab.newest, arch) for arch in lab.arches if arch != "x86_64"]
    x86 = [(version, "x86_64") for version in lab.versions if "x86_64" in lab.arches]
    yield from lab.side_by_side(lambda one: capture(lab, *one), [*x86, *arm])
