"""What `kho compat` predicts of a handover and a kernel is what the kernel then does: real kexecs between real kernels.

The first kernel preserves memfds, a region and the test's folios, and jumps. The next one is stopped at kho_populate;
the memory of that moment and the file of the kernel are what `kho compat` judges. Then it runs on, and each object is
held against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product

from lab import Claim, Lab
from lab.claims import LabError
from lab.handover import PLAN, Handed, hand_over

from .images import command, release

APPEND = "reserve_mem=1M:4096:trace0 test_kho.max_mem=1048576"


def pairs(versions: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each version to itself and to its neighbors, and the newest from and to all."""
    found = []
    for (i, first), (j, then) in product(enumerate(versions), repeat=2):
        if abs(i - j) <= 1 or 0 in (i, j):
            found.append((first, then))
    return found


def happened(handed: Handed) -> dict[str, str]:
    """What the next kernel did, by object: taken, lost, refused, panics."""
    text = handed.console.text.partition("HAND: jump")[2]
    if "TAKE: end" not in text:
        return {"root": "panics"}
    if "disabling KHO revival" in text or "found kexec handover data" not in text:
        return {"root": "refused"}
    done = {"root": "taken"}
    for file in PLAN:
        if file.token is not None:
            line = f"TAKE: file {file.session} {file.token:#x} size {file.size} pos {file.pos} seals "
            same = re.search(re.escape(line) + rf"\S+ sha256 {file.sha256}\b", text)
            done[f"session {file.session}, file {file.token:#x}"] = "taken" if same else "lost"
    done["reserve_mem trace0"] = "taken" if "Revived memory reservation 'trace0' from KHO" in text else "lost"
    done["kho_test"] = "taken" if "KHO restore succeeded" in text else "lost"
    return done


def differences(objects: list[dict[str, str]], done: dict[str, str]) -> list[str]:
    """Compare the verdicts with what happened, without those that are unknown and objects that nothing shows."""
    verdicts = {entry["object"]: entry["verdict"] for entry in objects}
    fatal = [name for name, verdict in verdicts.items() if verdict == "panics"]
    if done["root"] == "panics":
        return [] if fatal else ["the kernel died, and kho compat did not say so"]
    if fatal:
        return [f"{name}: kho compat says that the kernel panics, and it booted" for name in fatal]
    if verdicts.get("map") == "lost":
        return [] if "lost" in done.values() else ["map: kho compat says that a part is lost, and all was taken"]
    if "refused" in (verdicts["root"], done["root"]):
        same = verdicts["root"] == done["root"]
        return [] if same else [f"root: kho compat says {verdicts['root']}, and it was {done['root']}"]
    wrong = []
    if verdicts.get("LUO") == "lost":
        verdicts |= {name: "lost" for name in done if name.startswith("session ")}
    for name, seen in done.items():
        said = verdicts.get(name, "not mentioned")
        if said not in ("unknown", seen) and not (said == "not mentioned" and seen == "lost"):
            wrong.append(f"{name}: kho compat says {said}, and it was {seen}")
    return wrong


def trial(lab: Lab, first: str, then: str) -> Claim:
    """One kexec."""
    text = f"from Linux {first}: `kho compat` says what the next kernel does with each object"
    target = lab.kernel(then)
    dump = lab.work(f"{first}-{then}.dump")
    try:
        handed = hand_over(lab, lab.kernel(first), target, append=APPEND, dump=dump)
        if handed.dump is None:
            return Claim(text, then, "x86_64", False, "no stop at kho_populate\n" + handed.console.tail(25))
        words = ["--fdt-phys", f"{handed.fdt:#x}", "--scratch", f"{handed.scratch:#x}", str(dump), str(target)]
        line = lab.cmdline("x86_64", f"kho=on liveupdate=on {APPEND}")
        code, said = command("compat", "--json", "--cmdline", line, *words)
    except LabError as error:
        return Claim(text, then, "x86_64", False, str(error))
    finally:
        dump.unlink(missing_ok=True)
    try:
        (judged,) = json.loads(said)["targets"]
    except ValueError:
        return Claim(text, then, "x86_64", False, f"kho compat: exit code {code}\n{said}")
    done = happened(handed)
    wrong = differences(judged["objects"], done)
    shown = "; ".join(f"{name} {verdict}" for name, verdict in done.items())
    why = "; ".join(
        dict.fromkeys(entry["why"] for entry in judged["objects"] if entry["verdict"] not in ("taken", "unknown"))
    )
    evidence = f"verdict {judged['verdict']}{f' ({why})' if why else ''}; seen: {shown}"
    if wrong:
        evidence = "\n".join([*wrong, evidence, said[:3000], handed.console.tail(30)])
    return Claim(text, then, "x86_64", not wrong, evidence)


def run(lab: Lab) -> Iterator[Claim]:
    """Two guests at a time."""
    for version in lab.versions:
        lab.kernel(version)
    newest_first = tuple(sorted(lab.versions, key=release, reverse=True))
    yield from lab.side_by_side(lambda pair: trial(lab, *pair), pairs(newest_first))
