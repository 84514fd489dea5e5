"""Captures of real kernels: read correctly, rewritten byte for byte, checksum of kho_test verified."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

import kho

import captures
import images
import model
from adapters import ArenaMemory
from command import kho as run
from command import process

V1 = pytest.mark.parametrize("name", captures.V1_NAMES)
KEYS = (
    "compatible",
    "page_size",
    "bitmap_bytes",
    "fdt_phys",
    "preserved_memory_map",
    "nr_folios",
    "preserved_bytes",
    "folios_by_order",
    "metadata_pages",
    "scratch",
)


def of_issue(found: dict[str, Any]) -> dict[str, Any]:
    """The keys that must match exactly, with addresses and sizes of subtrees; only kho-v1 has a bitmap size."""
    subtrees = {name: {"phys": sub["phys"], "size": sub["size"]} for name, sub in found["subtrees"].items()}
    return {**{key: found.get(key) for key in KEYS}, "subtrees": subtrees}


# Reading


@pytest.mark.parametrize("name", captures.NAMES)
@pytest.mark.smoke
def test_inspect_agrees_with_the_reference_reader(name: str) -> None:
    expected = captures.expected(name)
    done = run("inspect", "--json", captures.elf(name))
    assert (done.code, done.err) == (0, "")
    assert of_issue(done.json) == of_issue(expected)
    assert done.json["folios"] == expected["folios"]
    assert done.json["folios_sha256"] == expected["folios_sha256"]
    assert done.json["page_size_why"]
    assert ("bitmap_bytes_why" in done.json) == ("bitmap_bytes" in expected)
    assert done.json["certainty"] in ("certain", "likely")


@V1
def test_a_separate_process_prints_the_same_report(name: str) -> None:
    done = process("inspect", "--json", captures.elf(name))
    assert (done.code, done.err) == (0, "")
    assert of_issue(done.json) == of_issue(captures.expected(name))


@V1
def test_each_report_names_the_reason_for_its_layout(name: str) -> None:
    inc = kho.open(captures.elf(name))
    assert inc.page_size_why == "x86_64 has no other"
    assert inc.bitmap_bytes_why is not None
    if captures.expected(name)["bitmap_bytes"] == 512:
        assert "not 4096 bytes" in inc.bitmap_bytes_why
        assert inc.certainty == "certain"
    else:
        assert "512" in inc.bitmap_bytes_why


@V1
def test_the_page_size_is_detected_without_the_machine_type(name: str) -> None:
    memory = kho.Memory.open(captures.elf(name))
    segments = [(phys, memory.read(phys, size)) for phys, size in memory.ranges]
    inc = kho.open(kho.Memory.from_segments(segments))
    assert (inc.page_size, inc.bitmap_bytes) == (4096, captures.expected(name)["bitmap_bytes"])
    assert list(inc.folios) == [tuple(folio) for folio in captures.expected(name)["folios"]]


def test_bitmap_bytes_overrides_detection() -> None:
    name = "linux-6.18.15-x86_64"
    told = run("inspect", "--json", "--bitmap-bytes", 512, captures.elf(name)).json
    assert (told["bitmap_bytes"], told["certainty"]) == (512, "given")
    assert told["bitmap_bytes_why"] == "given by the caller"
    memory = model.Memory.from_elf(captures.elf(name))
    folios, _ = model.read_v1(memory, captures.expected(name)["preserved_memory_map"], 4096, 512)
    assert told["folios"] == [list(folio) for folio in folios]
    assert told["nr_folios"] < captures.expected(name)["nr_folios"]


def test_invalid_bitmap_bytes_are_refused() -> None:
    done = run("inspect", "--bitmap-bytes", 4096, captures.elf("linux-6.16-layout-x86_64"))
    assert done.code == 2
    assert done.err.startswith("kho: chunk at 0x")
    done = run("inspect", "--bitmap-bytes", 1024, captures.elf("linux-6.18.15-x86_64"))
    assert (done.code, done.err.splitlines()[0]) == (
        2,
        "kho: bitmap of 1024 bytes: only 512 (Linux 6.16 and 6.17) or a page of 4096 bytes (6.18 and later) exist",
    )


@V1
def test_the_address_of_the_fdt_can_be_given(name: str) -> None:
    expected = captures.expected(name)
    assert kho.open(captures.elf(name), fdt_phys=expected["fdt_phys"]).scratch is None
    array = kho.open(captures.elf(name)).scratch_phys
    inc = kho.open(captures.elf(name), fdt_phys=expected["fdt_phys"], scratch=array)
    assert of_issue({**expected, "scratch": None}) == of_issue(
        {
            **{key: getattr(inc, key) for key in KEYS},
            "folios_by_order": {str(order): n for order, n in inc.folios_by_order.items()},
            "scratch": None,
            "subtrees": {n: {"phys": s.phys, "size": s.size} for n, s in inc.subtrees.items()},
        }
    )
    assert [list(area) for area in inc.scratch or []] == expected["scratch"]


@pytest.mark.parametrize("compatible", ["kho-v5", "kho-v99"])
def test_a_version_that_is_not_known_is_read_by_evidence(compatible: str, tmp_path: Path) -> None:
    layout = images.Image(folios=[(0x40_0000, 0)]).lay_out()
    layout.root.props["compatible"] = compatible.encode() + b"\0"
    layout.put_root()
    path = tmp_path / "future.elf"
    path.write_bytes(layout.to_elf())
    inc = kho.open(path)
    assert (inc.compatible, inc.abi.compatible) == (compatible, "kho-v1")
    assert inc.unverified == [f'version "{compatible}" is not known: read as kho-v1']
    done = run("inspect", path)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{compatible} handover (no known kernel)")


# Rewriting captures


def ram(name: str) -> list[tuple[int, int]]:
    """System RAM of the machine, whole pages, as regions."""
    found = []
    for line in (captures.DATA / name / "host/stage1/proc/iomem").read_text().splitlines():
        if line.endswith(": System RAM"):
            start, last = (int(word, 16) for word in line.split()[0].split("-"))
            begin, end = -(-start // 4096) * 4096, (last + 1) // 4096 * 4096
            found.append((begin, end - begin))
    return found


def rebuild(name: str) -> tuple[kho.Incoming, kho.Outgoing]:
    """The handover of a capture, rewritten in an arena with the same RAM and the same addresses."""
    inc = kho.open(captures.elf(name))
    arena = kho.Arena(ram(name), scratch=inc.scratch)
    out = kho.Outgoing(arena, bitmap_bytes=inc.bitmap_bytes, fdt_phys=inc.fdt_phys, map_phys=inc.preserved_memory_map)
    orders = dict(inc.folios)
    for sub in inc.subtrees.values():
        if orders[sub.phys] == 0:
            # Copied with the rest of its page: kho-v1 does not record the size of a blob.
            assert out.add_subtree(sub.name, inc.read(sub.phys, 4096), phys=sub.phys) == sub.phys
        else:
            arena.alloc_at(sub.phys, orders[sub.phys])
            out.link_subtree(sub.name, sub.phys, sub.size or 0)
    placed = {inc.fdt_phys, *(sub.phys for sub in inc.subtrees.values())}
    for phys, order in inc.folios:
        if phys not in placed:
            arena.alloc_at(phys, order)
        # The caller may not write a blob that add_subtree copied.
        if phys != inc.fdt_phys and (phys not in placed or order):
            arena.write(phys, inc.read(phys, 4096 << order))
    before = out.nr_folios
    assert out.preserve_all(inc.tracker()) == inc.nr_folios - before
    assert out.preserve_all(inc.tracker()) == 0
    return inc, out


def chunks(memory: model.Memory, head: int, bitmap_bytes: int) -> list[tuple[bytes, list[tuple[int, bytes]]]]:
    """Each chunk page with its pointers zeroed, and the `(phys_start, bitmap)` they point to."""
    out = []
    while head:
        page = bytearray(memory.read(head, 4096))
        following, _, num = struct.unpack_from("<QII", page)
        bitmaps = []
        struct.pack_into("<Q", page, 0, 0)
        for at in range(16, 16 + 16 * num, 16):
            start, bitmap = struct.unpack_from("<QQ", page, at)
            bitmaps.append((start, memory.read(bitmap, bitmap_bytes)))
            struct.pack_into("<Q", page, at + 8, 0)
        out.append((bytes(page), bitmaps))
        head = following
    return out


@V1
def test_a_rewritten_map_equals_the_kernels_bytes(name: str) -> None:
    inc, out = rebuild(name)
    assert inc.bitmap_bytes is not None
    blob = out.serialize()
    assert blob == captures.debugfs(name, 1, "out/fdt")
    assert out.folios() == inc.folios
    theirs = chunks(model.Memory.from_elf(captures.elf(name)), inc.preserved_memory_map, inc.bitmap_bytes)
    ours = chunks(ArenaMemory(out.arena), inc.preserved_memory_map, inc.bitmap_bytes)
    assert ours == theirs
    assert sum(len(bitmaps) for _, bitmaps in theirs) >= 5
    assert out.arena.read(inc.fdt_phys, len(blob)) == blob


@V1
def test_an_arena_takes_over_a_rewritten_handover(name: str) -> None:
    inc, out = rebuild(name)
    taken = kho.Incoming(out.arena, out.finalize())
    assert (taken.bitmap_bytes, taken.scratch) == (inc.bitmap_bytes, inc.scratch)
    assert taken.folios == inc.folios
    for phys, _ in inc.folios:
        # After its FDT, the kernel's page still contains the string table, which libfdt builds downwards from the end.
        size = len(bytes(inc.fdt)) if phys == inc.fdt_phys else None
        assert bytes(taken.restore_folio(phys))[:size] == bytes(inc.restore_folio(phys))[:size]
    for subtree in inc.subtrees:
        assert taken.retrieve_subtree(subtree).read() == inc.retrieve_subtree(subtree).read()
    assert len(taken.unrestored()) == 0


# kho_test


def kho_test(inc: kho.Incoming, name: str) -> tuple[list[model.Folio], int]:
    """The folios in the subtree of lib/test_kho.c, and its checksum."""
    blob = inc.retrieve_subtree("kho_test").read()
    return model.read_kho_test(model.Memory.from_elf(captures.elf(name)), blob, inc.page_size)


@V1
def test_the_checksum_of_kho_test_matches(name: str) -> None:
    inc = kho.open(captures.elf(name))
    folios, csum = kho_test(inc, name)
    assert [list(folio) for folio in folios] == captures.expected(name)["kho_test"]["folios"]
    orders = dict(inc.folios)
    contents = b""
    for phys, order in folios:
        assert orders[phys] == order
        folio = inc.restore_folio(phys)
        assert (folio.phys, folio.order, folio.nbytes) == (phys, order, 4096 << order)
        contents += bytes(folio)
    assert model.csum(contents) == model.fold(csum)
    assert model.csum(contents[:-1] + bytes([contents[-1] ^ 1])) != model.fold(csum)


@V1
def test_subtrees_are_the_blobs_debugfs_shows(name: str) -> None:
    inc = kho.open(captures.elf(name))
    for subtree in ("kho_test", "memblock"):
        blob = inc.retrieve_subtree(subtree).read()
        assert blob == captures.debugfs(name, 1, f"out/sub_fdts/{subtree}") == bytes(inc.subtrees[subtree].fdt())
    area = captures.expected(name)["reserve_mem"]["keepme"]
    node = inc.subtrees["memblock"].fdt()["/keepme"]
    assert [node.u64("start"), node.u64("size")] == area
    covered = sum(4096 << order for phys, order in inc.folios if area[0] <= phys < sum(area))
    assert covered == area[1]


@V1
def test_a_capture_restores_each_folio_once(name: str) -> None:
    inc = kho.open(captures.elf(name))
    for phys, order in inc.folios:
        if order:
            with pytest.raises(kho.NotRestorableError, match=rf"{phys + 4096:#x}: it is inside .* at {phys:#x}"):
                inc.restore_folio(phys + 4096)
        inc.restore_folio(phys)
        with pytest.raises(kho.NotRestorableError, match="restored before"):
            inc.restore_folio(phys)
    assert (inc.nr_restored, len(inc.unrestored())) == (inc.nr_folios, 0)


def test_json_output_can_be_saved_and_parsed_again(tmp_path: Path) -> None:
    """The output of `--json` can be saved to a file and parsed again."""
    path = tmp_path / "report.json"
    path.write_text(run("inspect", "--json", captures.elf(captures.V1_NAMES[0])).out)
    assert json.loads(path.read_text())["scratch"][0] == [239075328, 16777216]


def agrees(found: Any, expected: Any) -> bool:
    """Whether `found` contains everything in `expected`; additional keys are allowed."""
    if isinstance(expected, dict):
        return all(key in found and agrees(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(agrees, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("name", captures.NAMES)
def test_every_key_agrees_without_options(name: str) -> None:
    found = json.loads(run("inspect", "--json", captures.elf(name)).out)
    for key, expected in captures.expected(name).items():
        assert agrees(found[key], expected), key
