"""Extracting contents of a handover: correct bytes, safe file names, bounded total size."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
from kho.handover import extract

import captures
import hostile
from command import kho as run
from images import KIB, MIB, Image

LUO_NAMES = [name for name in captures.NAMES if "luo" in captures.expected(name)]
V4 = "linux-7.3.4-x86_64"
ALL = pytest.mark.parametrize("name", captures.NAMES)


def files_of(name: str) -> list[tuple[str, dict[str, Any]]]:
    """`(session, file)` of each file in a capture with LUO."""
    sessions = captures.expected(name)["luo"]["sessions"]
    return [(session["name"], file) for session in sessions for file in session["files"]]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", LUO_NAMES)
def test_every_extracted_memfd_agrees_with_the_reference_reader(name: str, tmp_path: Path) -> None:
    for session, file in files_of(name):
        out = tmp_path / f"{session}-{file['token']}"
        done = run("extract", captures.elf(name), "--session", session, "--token", hex(file["token"]), "-o", out)
        assert (done.code, done.out) == (0, f"{file['sha256']}  {out}\n")
        assert sha256(out) == file["sha256"]
        assert out.stat().st_size == file["size"]


@ALL
def test_the_manifest_lists_everything(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    done = run("extract", captures.elf(name), "--all", folder, "--json")
    expected = captures.expected(name)
    assert done.code == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert done.json == {"schema": "kho-extract-1"} | manifest
    assert manifest["compatible"] == expected["compatible"]
    entries = manifest["entries"]
    subtrees = {e["name"]: (e["phys"], e["size"]) for e in entries if e["kind"] == "subtree"}
    assert subtrees == {n: (sub["phys"], sub["size"]) for n, sub in expected["subtrees"].items()}
    digests = {e["name"]: e["sha256"] for e in entries if e["kind"] == "subtree"}
    for subtree, found in expected["subtrees"].items():
        assert digests[subtree] == found.get("sha256", digests[subtree])
    regions = {e["name"]: [e["phys"], e["size"]] for e in entries if e["kind"] == "reserve_mem"}
    assert regions == expected["reserve_mem"]
    files = [(e["session"], e["token"], e["phys"], e["size"], e["sha256"]) for e in entries if e["kind"] == "file"]
    listed = files_of(name) if "luo" in expected else []
    assert files == [(s, f["token"], f["data"], f["size"], f["sha256"]) for s, f in listed]
    for entry in entries:
        assert sha256(folder / entry["path"]) == entry["sha256"]
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {entry["path"] for entry in entries} | {"manifest.json"}


def test_sha256sum_accepts_the_output(tmp_path: Path) -> None:
    done = run("extract", captures.elf(V4), "--all", tmp_path / "all")
    assert done.out.count("\n") == 9
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet"], input=done.out, text=True, check=True)


@ALL
def test_extracted_regions_subtrees_and_folios_equal_memory(name: str, tmp_path: Path) -> None:
    inc = kho.open(captures.elf(name))
    reserved, region = next(iter(inc.reserve_mem.items()))
    phys, order = max(inc.folios, key=lambda folio: folio.order)
    wanted = {
        ("--reserve-mem", reserved): inc.read(region.start, region.size),
        ("--subtree", "kho_test"): inc.subtrees["kho_test"].read(),
        ("--folio", hex(phys)): inc.read(phys, inc.page_size << order),
    }
    for i, (what, content) in enumerate(wanted.items()):
        assert run("extract", captures.elf(name), *what, "-o", tmp_path / str(i)).code == 0
        assert (tmp_path / str(i)).read_bytes() == content


def test_stdout_contains_only_the_content() -> None:
    command = [sys.executable, "-m", "kho", "extract", str(captures.elf(V4)), "--subtree", "memblock", "-o", "-"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert done.stderr == b"subtree memblock: 210 bytes\n"
    assert hashlib.sha256(done.stdout).hexdigest() == captures.expected(V4)["subtrees"]["memblock"]["sha256"]


# Holes


def fake(size: int, data: dict[int, bytes]) -> extract.Content:
    """Synthetic contents."""

    def read(n: int, offset: int) -> bytes:
        (start,) = (start for start, raw in data.items() if start <= offset < start + len(raw))
        return data[start][offset - start : offset - start + n]

    return extract.Content("made up", size, [(start, len(raw)) for start, raw in sorted(data.items())], read)


def test_holes_stay_holes_in_the_file(tmp_path: Path) -> None:
    size = 256 * MIB
    content = fake(size, {64 * MIB: b"x" * 4096, size - 4096: b"y" * 4096})
    saved = extract.save(content, tmp_path / "sparse")
    assert saved.path.stat().st_size == size
    assert saved.path.stat().st_blocks * 512 < MIB
    assert saved.data_bytes == 8192
    assert saved.sha256 == sha256(saved.path)


def test_a_file_that_ends_in_a_hole_has_its_size(tmp_path: Path) -> None:
    saved = extract.save(fake(10_000, {0: b"x" * 10}), tmp_path / "f")
    assert saved.path.read_bytes() == b"x" * 10 + bytes(9990)


@given(st.integers(0, 5000), st.dictionaries(st.integers(0, 40), st.binary(min_size=1, max_size=100), max_size=5))
def test_the_digest_includes_holes_as_zeros(size: int, data: dict[int, bytes]) -> None:
    placed = {at * 100: raw for at, raw in data.items()}
    size = max([size, *(at + len(raw) for at, raw in placed.items())])
    whole = bytearray(size)
    for at, raw in placed.items():
        whole[at : at + len(raw)] = raw
    assert extract.sha256_of(fake(size, placed)) == hashlib.sha256(whole).hexdigest()


def test_holes_beyond_the_allowance_are_not_hashed(tmp_path: Path) -> None:
    content = fake(1 << 40, {4096: b"x"})
    assert extract.sha256_of(content) is None
    saved = extract.save(content, tmp_path / "f")
    assert (saved.sha256, saved.path.stat().st_size) == (None, 1 << 40)
    with pytest.raises(kho.FormatError, match="holes"), (tmp_path / "out").open("wb") as out:
        extract.stream(content, out)


@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_size_beyond_the_largest_file_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(kho.FormatError, match=f"{size} bytes exceed the largest"):
        extract.save(fake(size, {}), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


# Existing files


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    command = ("extract", captures.elf(V4), "--subtree", "LUO", "-o", out)
    done = run(*command)
    assert (done.code, out.read_text()) == (2, "mine")
    assert done.err == f"kho: {out}: exists; --force (force=True) replaces it\n"
    assert run(*command, "--force").code == 0
    assert sha256(out) == captures.expected(V4)["subtrees"]["LUO"]["sha256"]


def test_a_directory_that_is_not_empty_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = run("extract", captures.elf(V4), "--all", tmp_path)
    assert (done.code, done.err) == (2, f"kho: {tmp_path}: not empty; --force (force=True) writes to it anyway\n")
    assert run("extract", captures.elf(V4), "--all", tmp_path, "--force").code == 0
    assert run("extract", captures.elf(V4), "--all", tmp_path, "--force").code == 0
    assert (tmp_path / "mine").read_text() == "mine"


def test_links_are_neither_replaced_nor_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    link = tmp_path / "link"
    link.symlink_to(victim / "file")
    done = run("extract", captures.elf(V4), "--subtree", "LUO", "-o", link, "--force")
    assert (done.code, done.err) == (2, f"kho: {link}: not a regular file, so it is not replaced\n")
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "subtrees").symlink_to(victim)
    done = run("extract", captures.elf(V4), "--all", folder, "--force")
    assert done.code == 2
    assert "symbolic link" in done.err
    assert list(victim.iterdir()) == []


def test_a_read_that_fails_leaves_no_file(tmp_path: Path) -> None:
    inc = kho.open(captures.elf(V4))
    content = extract.Content("gone", 8192, [(0, 8192)], lambda n, offset: inc.read(0x1000 + offset, n))
    with pytest.raises(kho.OutsideMemoryError):
        extract.save(content, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


# Missing items


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (["--session", "vm-2", "--token", "1"], "kho: session 'vm-2': not found; there are 'vm-1', 'cache'"),
        (["--session", "vm-1", "--token", "1"], "kho: session 'vm-1': no token 0x1; there are 0x10, 0x11"),
        (["--reserve-mem", "x"], "kho: reserve_mem 'x': not found; there are 'keepme'"),
        (["--subtree", "x"], "kho: subtree 'x': not found; there are 'memblock', 'LUO', 'kho_test', 'kexec-metadata'"),
        (["--folio", "0x459000"], "kho: 0x459000: no preserved folio begins there"),
        (["--folio", "0x458001"], "kho: 0x458001: no preserved folio begins there"),
    ],
)
def test_a_missing_item_is_named_with_the_existing_ones(what: list[str], said: str, tmp_path: Path) -> None:
    done = run("extract", captures.elf(V4), *what, "-o", tmp_path / "out")
    assert (done.code, done.out, done.err.splitlines()[0]) == (2, "", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "what",
    [
        [],
        ["--session", "s"],
        ["--token", "1"],
        ["--subtree", "a", "--folio", "0"],
        ["--subtree", "a"],
        ["--all", "d", "-o", "f"],
    ],
)
def test_missing_or_contradictory_options_are_a_usage_error(what: list[str]) -> None:
    done = run("extract", captures.elf(V4), *what)
    assert (done.code, done.out) == (2, "")
    assert "Usage:" in done.err


# Hostile names and images


@given(st.text())
def test_any_name_becomes_a_safe_file_name(name: str) -> None:
    safe = extract.safe_name(name)
    assert 0 < len(safe) <= 120
    assert not safe.startswith(".")
    assert set(safe) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+@=-%")


@given(st.sets(st.text(alphabet="ab./%~\0\\é", max_size=4), min_size=2, max_size=2))
def test_different_names_give_different_file_names(names: set[str]) -> None:
    assert len({extract.safe_name(name) for name in names}) == 2


def luo_image(sessions: list[tuple[bytes, list[tuple[bytes, int, int]]]], contents: dict[int, bytes]) -> bytes:
    """A kho-v4 image with LUO sessions of `(compatible, data, token)` files; LUO's blocks are at 32 MiB."""
    at = 32 * MIB
    blob = struct.pack("<8sQQQ", b"luo-v5", 1, at, 0)
    block = struct.pack("<QQ", 0, len(sessions))
    for i, (name, files) in enumerate(sessions):
        place = at + 4096 * (i + 1)
        block += struct.pack("<64sQQ", name, place, len(files))
        entries = b"".join(struct.pack("<48sQQ", *file) for file in files)
        contents = {**contents, place: struct.pack("<QQ", 0, len(files)) + entries}
    image = Image(
        folios=[(40 * MIB, 0), (at, 3)],
        compatible="kho-v4",
        ram=[(0, 64 * MIB)],
        subtrees={"LUO": blob},
        contents={**contents, at: block},
    )
    return image.to_bytes()


def memfd(size: int, folios: list[tuple[int, int]], place: int) -> dict[int, bytes]:
    """A memfd-v2 at `place`: its structure, its chunk in the next page, its folio list in the page after that."""
    listed = b"".join(struct.pack("<QQ", phys >> 12 | 3 << 52, index) for phys, index in folios)
    vmalloc = struct.pack("<QIHH", place + 4096, 1, 1, 0)
    return {
        place: struct.pack("<QQIIQ", 0, size, 0, 0, len(folios)) + vmalloc,
        place + 4096: struct.pack("<QQ", 0, place + 8192),
        place + 8192: listed,
    }


def test_names_from_memory_cannot_escape_the_directory(tmp_path: Path) -> None:
    contents = {40 * MIB: b"hello"}
    names = [b"../../../evil", b"/etc/passwd", b"..", b"\x1b[31mred\n", b"a/b", b"dup", b"dup", b"\xff\xfe"]
    image = tmp_path / "image.elf"
    sessions = []
    for i, name in enumerate(names):
        place = 48 * MIB + i * 16 * KIB
        contents |= memfd(5, [(40 * MIB, 0)], place)
        sessions.append((name, [(b"memfd-v2", place, 1)]))
    image.write_bytes(luo_image(sessions, contents))
    folder = tmp_path / "deep" / "all"
    done = run("extract", image, "--all", folder)
    assert done.code == 0
    assert "\x1b" not in done.out + done.err
    files = [path for path in (tmp_path / "deep").rglob("*") if path.is_file()]
    assert len([path for path in files if path.read_bytes() == b"hello"]) == len(names)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [e["session"] for e in manifest["entries"] if e["kind"] == "file"][:5] == [n.decode() for n in names[:5]]
    assert {path.name for path in tmp_path.iterdir()} == {"image.elf", "deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"all"}
    out = tmp_path / "out"
    assert run("extract", image, "--session", "../../../evil", "--token", 1, "-o", out).code == 0
    assert out.read_bytes() == b"hello"


def test_one_folio_at_a_hundred_thousand_offsets_is_refused(tmp_path: Path) -> None:
    contents: dict[int, bytes] = {40 * MIB: b"x" * 4096}
    sessions = []
    for i in range(50):
        places = [48 * MIB + (8 * i + token) * 16 * KIB for token in range(8)]
        for place in places:
            contents |= memfd(256 * MIB, [(40 * MIB, index) for index in range(256)], place)
        sessions.append((f"s{i}".encode(), [(b"memfd-v2", place, token) for token, place in enumerate(places)]))
    image = tmp_path / "image.elf"
    image.write_bytes(luo_image(sessions, contents))
    inc = kho.open(image)
    manifest = extract.save_all(inc, tmp_path / "all")
    errors = [entry for entry in manifest["entries"] if entry.get("error")]
    assert "the total of all contents exceeds the preserved memory" in errors[0]["error"]
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "all").rglob("*") if path.is_file())
    assert used < 2 * (image.stat().st_size + 16 * MIB) + 8 * MIB
    assert any(entry["path"] and entry["sha256"] is None for entry in manifest["entries"])


def test_an_unreadable_file_is_listed_and_the_others_are_written(tmp_path: Path) -> None:
    place = 48 * MIB
    contents = memfd(5, [(40 * MIB, 0)], place) | {40 * MIB: b"hello"}
    contents |= memfd((1 << 64) - 1, [], 50 * MIB)
    files = [
        (b"vfio-pci-v1", 0x1000, 1),
        (b"memfd-v2", 1 << 50, 2),
        (b"memfd-v2", place, 3),
        (b"memfd-v2", 50 * MIB, 4),
    ]
    image = tmp_path / "image.elf"
    image.write_bytes(luo_image([(b"vm", files)], contents))
    done = run("extract", image, "--all", tmp_path / "all")
    assert done.code == 1
    entries = {e["name"]: e for e in json.loads((tmp_path / "all/manifest.json").read_text())["entries"]}
    assert "'vfio-pci-v1' has no contents" in entries["vm/0x1"]["error"]
    assert "0x4000000000000" in entries["vm/0x2"]["error"]
    assert "exceed the largest possible file" in entries["vm/0x4"]["error"]
    assert (tmp_path / "all" / entries["vm/0x3"]["path"]).read_bytes() == b"hello"
    assert run("extract", image, "--session", "vm", "--token", 1, "-o", tmp_path / "x").code == 2


def test_unreadable_sessions_are_reported_and_the_rest_is_written(tmp_path: Path) -> None:
    image = tmp_path / "image.elf"
    blob = struct.pack("<8sQQQ", b"luo-v5", 1, 1 << 50, 0)
    subtrees = {"LUO": blob, "memblock": b"\xd0\x0d\xfe\xed"}
    image.write_bytes(Image(folios=[(40 * MIB, 0)], compatible="kho-v4", subtrees=subtrees).to_bytes())
    done = run("extract", image, "--all", tmp_path / "all")
    assert done.code == 1
    assert "sessions LUO: " in done.err
    assert (tmp_path / "all/subtrees/LUO").read_bytes() == blob
    assert run("diff", image, image).code == 0
    assert run("map", image).code == 0


@pytest.mark.parametrize("what", sorted([*hostile.REFUSED, *hostile.ODD]))
def test_malformed_images_give_an_error_or_files(what: str, tmp_path: Path) -> None:
    image = tmp_path / "image.elf"
    image.write_bytes(hostile.damaged((hostile.REFUSED | hostile.ODD)[what]))
    done = run("extract", image, "--all", tmp_path / "all")
    assert done.code in ((2,) if what in hostile.REFUSED else (0, 1, 2))
    assert "Traceback" not in done.err
    if done.code < 2:
        assert (tmp_path / "all/manifest.json").is_file()


def test_a_full_disk_is_an_error_of_kho(tmp_path: Path) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full")
    done = run("extract", captures.elf(V4), "--subtree", "LUO", "-o", "/dev/full", "--force")
    assert (done.code, done.err) == (2, "kho: /dev/full: not a regular file, so it is not replaced\n")
    done = run("extract", captures.elf(V4), "--subtree", "LUO", "-o", tmp_path / "no" / "such" / "folder")
    assert done.code == 2
    assert "No such file or directory" in done.err
