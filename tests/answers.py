"""What the commands answer of a whole dump, against which their answers for one that lacks pages are checked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kho
from kho.handover.describe import OF_MAP as MAP_KEYS
from kho.handover.owners import HANDLE

from command import Done
from command import kho as run

ABOUT_THE_FILE = {"KHO040", "KHO041", "KHO042", "KHO058"}
UNMARKED = {"KHO014"}
"""What is said of a file that does not tell what it left out from what is no RAM."""


@dataclass(frozen=True)
class Whole:
    """What the commands answer for a capture that lacks nothing."""

    inspect: dict[str, Any]
    findings: set[tuple[str, str]]
    code: int
    extracted: dict[str, bytes]
    owners: dict[str, Any]
    map: dict[str, Any]
    compat: dict[str, Done]
    fdt: str
    converted: Path | None
    """None if there is no map to convert."""
    path: Path


TARGETS = ("7.3.4", "7.0.5", "6.18.15")
"""Releases that `kho compat` judges."""


def convert(path: Path, target: Path) -> Done:
    """Convert to the newest version: of kho-v1 to v4 the map is written again."""
    return run("convert", path, "--abi", "kho-v4", "-o", target)


def answers(path: Path, folder: Path) -> Whole:
    """Ask every command about a whole dump; `folder` is made."""
    folder.mkdir()
    verified = run("verify", "--json", path)
    assert run("extract", path, "--all", folder / "all").code == 0
    inspected = run("inspect", "--json", path).json
    converted = folder / "v4" if inspected["preserved_memory_map"] else None
    assert converted is None or convert(path, converted).code == 0
    return Whole(
        inspected,
        {(found["id"], found["place"]) for found in verified.json["findings"]},
        verified.code,
        files_of(folder / "all"),
        run("owners", "--json", path).json,
        run("map", "--json", path).json,
        {target: run("compat", "--json", path, target) for target in TARGETS},
        run("fdt", path).out,
        converted,
        path,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def without(found: Any, *, names: tuple[str, ...]) -> Any:
    """JSON without some keys, at every depth."""
    if isinstance(found, dict):
        return {key: without(value, names=names) for key, value in found.items() if key not in names}
    return [without(value, names=names) for value in found] if isinstance(found, list) else found


OF_MAP = (*MAP_KEYS, "bitmap_bytes", "bitmap_bytes_why")
SCRATCH = ("scratch", "scratch_phys", "scratch_how")
"""Keys that are gone with the page of the array."""


def check_part(part: Any, of: Any, place: str, *, marked: bool) -> None:
    """Check that JSON has the values of the whole, except for what is said not to be in the dump."""
    if isinstance(of, dict) and isinstance(part, dict):
        excused = "error" in part or "absent" in part
        if place == "inspect":
            # A payload is gone if its subtree says why.
            excused = any("error" in row for row in part["subtrees"].values())
        for key in of:
            if key in OF_MAP and "map_lost" in part:
                assert part.get(key) is None
            elif key in part:
                check_part(part[key], of[key], f"{place}.{key}", marked=marked)
            else:
                assert excused or key in ("sha256", *SCRATCH), f"{place}.{key} is gone without a word"
        return
    if isinstance(of, list) and isinstance(part, list) and len(of) == len(part):
        for at, (mine, theirs) in enumerate(zip(part, of, strict=True)):
            check_part(mine, theirs, f"{place}[{at}]", marked=marked)
        return
    if place.endswith(".csum_holds") and isinstance(part, str):
        words = ("left out of this dump", "is cut off") if marked else ("not in this memory",)
        assert any(word in part for word in words), part
        return
    if place.endswith((".size", *SCRATCH)) and part is None:
        return
    if place.endswith(".in_map") and part is False:
        return
    if place == "inspect.kernel.error":
        assert part
        return
    if place.startswith("inspect.other_roots"):
        # Of a map that was given back anything is read, or nothing is there.
        assert place.endswith((".state", ".why")) or part == of, place
        return
    assert part == of, place


# Keys that tell how a layout was decided, or what the file is.
MANNER = ("page_size_why", "bitmap_bytes_why", "certainty", "pages_outside", "absent", "dump", "kernels", "machine")


def check_commands(
    done_inspect: Done, path: Path, of: Whole, folder: Path, *, marked: bool, lost: bool, rootless: bool = False
) -> None:
    """Check every command's answer against that for the whole capture."""
    if done_inspect.code:
        # The root FDT is gone, or a part of an unmarked map: each command says so, and answers nothing.
        assert done_inspect.code == 2
        assert rootless or not marked, done_inspect.err
        assert not marked or any(word in done_inspect.err for word in ("left out", "cut off")), done_inspect.err
        verified = run("verify", "--json", path)
        if verified.code != 2:
            check_findings(verified, of, marked=marked)
        return
    if not marked and done_inspect.json["certainty"] != "certain":
        return  # which layout it is was decided by what is there, and is said to be no more than likely
    check_part(without(done_inspect.json, names=MANNER), without(of.inspect, names=MANNER), "inspect", marked=marked)
    check_findings(run("verify", "--json", path), of, marked=marked)
    check_extracted(path, of, folder)
    owners = run("owners", "--json", path)
    mapless = "map_lost" in done_inspect.json
    assert owners.code == 0 if mapless else owners.code in (0, 1)
    assert owners.json["preserved_bytes"] == (None if mapless else of.owners["preserved_bytes"])
    check_owners(owners.json["rows"], of.owners["rows"])
    mapped = run("map", "--json", path)
    assert mapped.code == 0
    check_map(mapped.json["spans"], of.map["spans"])
    shown = run("fdt", path)
    assert (shown.code, shown.out) == (0, of.fdt)
    check_compat(path, of, lost=lost)
    if marked and of.converted is not None:
        check_converted(path, of, folder.with_name("converted"))
    compared = run("diff", "--json", of.path, path)
    if marked:
        assert (compared.code, compared.json["different"]) == (0, False), compared.out
        assert ("note: " in compared.err) == lost
        assert any("folios, page size" in what for what in compared.json.get("uncompared", ())) == mapless
    if mapless:
        check_mapless(done_inspect, path, of)


def check_mapless(done_inspect: Done, path: Path, of: Whole) -> None:
    """Check what is said of a dump without a page of the map: once by each command, and never a value in its place."""
    lost = done_inspect.json["map_lost"]
    nodes = {phys // size * size for size in (4096, 65536) for phys in kho.open(of.path).map_pages}
    assert lost["phys"] in nodes
    said = f"the map's page at {lost['phys']:#x} "
    said += "was left out of this dump" if lost["why"] == "left out" else "is cut off with the end of the file"
    for command in ("inspect", "owners", "map", "compat", "verify"):
        done = run(command, path, *(TARGETS[:1] if command == "compat" else ()))
        assert said in done.out + done.err, command
    listed = {entry["data"] for session in of.inspect.get("luo", {}).get("sessions", []) for entry in session["files"]}
    found, right = (
        {row["phys"] for row in each.get("unlisted_memfds", [])} for each in (done_inspect.json, of.inspect)
    )
    assert found <= listed | right
    if any("error" in row for row in done_inspect.json["subtrees"].values()):
        return
    assert found <= right
    for mine, theirs in zip(
        done_inspect.json.get("luo", {}).get("sessions", []), of.inspect.get("luo", {}).get("sessions", []), strict=True
    ):
        for file, right in zip(mine["files"], theirs["files"], strict=True):
            assert file.get("absent") or file["sha256"] == right["sha256"]


def check_extracted(path: Path, of: Whole, folder: Path, *, kinds: tuple[str, ...] = ()) -> None:
    """Check that what comes out is what comes out of the whole, or says which parts of it are not there."""
    extracted = run("extract", path, "--all", folder)
    manifest = json.loads((folder / "manifest.json").read_text())["entries"]
    files = files_of(folder)
    for entry in manifest:
        if entry["path"] is None:
            assert entry["error"]
            continue
        data = files.pop(entry["path"])
        if kinds and entry["kind"] not in kinds:
            continue
        right = of.extracted.get(entry["path"].removesuffix(".partial"))
        if right is None:  # found by its content, as the lists of sessions are not in the dump
            assert entry["kind"] == "memfd"
            assert "missing" in entry or data in of.extracted.values()
            continue
        holes = entry.get("missing", [])
        assert bool(holes) == entry["path"].endswith(".partial")
        assert entry["sha256"] == (None if holes else hashlib.sha256(right).hexdigest())
        for at, nbytes in holes:
            assert not any(data[at : at + nbytes])
            data = data[:at] + right[at : at + nbytes] + data[at + nbytes :]
        assert data == right
    assert not files
    assert extracted.code == int(any(entry["path"] is None or "missing" in entry for entry in manifest))


FOUND = "memfd at "
"""How the owner is named of a memfd that is found by its content."""


def check_owners(part: list[dict[str, Any]], of: list[dict[str, Any]]) -> None:
    """Check that each preserved byte has the owner and the part that it has in the whole, or none."""
    if not of:  # nothing is preserved
        assert not part
        return
    right = iter(of)
    row = next(right)
    for mine in part:
        at, end = mine["phys"], mine["phys"] + mine["nbytes"]
        while at < end:
            while row["phys"] + row["nbytes"] <= at:
                row = next(right)
            assert row["phys"] <= at
            known = mine["owner"] in ("unknown", row["owner"]) or mine["owner"].startswith(FOUND)
            assert known, (hex(at), mine, row)
            if mine["owner"] == row["owner"] and mine["what"] != HANDLE:
                assert mine["what"] == row["what"]
                if mine["offset"] is not None:
                    assert mine["offset"] - mine["phys"] == row["offset"] - row["phys"]
            at = row["phys"] + row["nbytes"]


def check_map(part: list[dict[str, Any]], of: list[dict[str, Any]]) -> None:
    """Check that what the map draws is of the kind and owner that it has in the whole, or of an unknown one."""
    right: dict[tuple[str, str], list[list[int]]] = {}
    for span in of:
        right.setdefault((span["kind"], span["owner"]), []).extend(span["intervals"])
    for span in part:
        if span["kind"] == "unknown" or span["owner"] == "unknown" or span["owner"].startswith(FOUND):
            continue
        there = right.get((span["kind"], span["owner"]), [])
        for start, end in span["intervals"]:
            assert any(first <= start and end <= last for first, last in there), (span, start, end)


def check_compat(path: Path, of: Whole, *, lost: bool) -> None:
    """Check that the verdict of each object is that of the whole, and that what is not judged is named."""
    for target, whole in of.compat.items():
        done = run("compat", "--json", path, target)
        if done.out and whole.out:
            (judged,), (right,) = done.json["targets"], whole.json["targets"]
            theirs = {row["object"]: row for row in right["objects"]}
            if theirs.get("map", {}).get("verdict") == "panics" and lost:
                # Nothing else is judged of what panics; without the map it is not known that it does.
                mine = {row["object"]: row["verdict"] for row in judged["objects"]}
                assert mine["map"] in ("panics", "unknown")
                continue
            for row in judged["objects"]:
                known = theirs.get(row["object"])
                same = known is not None and {**row, "source": None} == {**known, "source": None}
                assert same or (lost and row["verdict"] == "unknown"), (target, row, known)
        assert done.code == whole.code or (lost and done.code in (1, 2)), (target, done.out, done.err)


def check_converted(path: Path, of: Whole, target: Path) -> None:
    """Check that a conversion has the contents that the whole's has, and that no zeros stand for what is not there."""
    done = convert(path, target)
    if done.code:
        assert any(word in done.err for word in ("left out", "cut off")), done.err
        return
    assert of.converted is not None
    mine, right, source = kho.open(target), kho.open(of.converted), kho.open(of.path)
    size = right.page_size
    assert (mine.compatible, mine.preserved_bytes) == (right.compatible, right.preserved_bytes)
    assert set(mine.subtrees) == set(right.subtrees)
    # The pages that the conversion writes lie where memory is free, which depends on what else is there.
    left_alone = set(map(tuple, source.folios)) & set(map(tuple, right.folios))
    pages = [at for phys, order in sorted(left_alone) for at in range(phys, phys + (size << order), size)]
    pages = [at for at in pages if right.read(at, size) == source.read(at, size)]
    assert pages
    for at in pages:
        try:
            assert mine.read(at, size) == source.read(at, size), hex(at)
        except (kho.LeftOutError, kho.CutOffError):
            assert done.err
    check_extracted(target, of, target.with_name("converted.d"), kinds=("memfd",))


def check_findings(verified: Done, of: Whole, *, marked: bool) -> None:
    found = {(each["id"], each["place"]) for each in verified.json["findings"]}
    about = ABOUT_THE_FILE if marked else ABOUT_THE_FILE | UNMARKED
    new = {each for each in found if each[0] not in about} - of.findings
    if marked:
        assert not new, [each for each in verified.json["findings"] if (each["id"], each["place"]) in new]
        assert verified.code == of.code
