"""Every preserved page is attributed to the owner that refers to it; inconsistencies are reported."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import kho
from kho.formats import Blob, Owned, Payload, decode, decoder, registry
from kho.handover.owners import HANDLE, Owners, owners
from test_verify import Edit, capture

import captures
from command import kho as run

V4 = [name for name in captures.NAMES if "7.3.4" in name]
X86 = "linux-7.3.4-x86_64"


def of(name: str) -> tuple[kho.Incoming, Owners]:
    inc = kho.open(captures.elf(name))
    return inc, owners(inc)


def edited(edit: Edit) -> Owners:
    return owners(kho.open(edit.memory))


@pytest.mark.parametrize("name", captures.NAMES)
def test_every_preserved_page_is_in_exactly_one_range(name: str) -> None:
    inc, found = of(name)
    pages = [phys for row in found.rows for phys in range(row.phys, row.phys + row.nbytes, inc.page_size)]
    preserved = [p for phys, order in inc.folios for p in range(phys, phys + (inc.page_size << order), inc.page_size)]
    assert pages == sorted(preserved)
    assert not any((found.unowned[:], found.unpreserved[:], found.shared, found.undecoded))
    assert sum(found.totals.values()) == inc.preserved_bytes
    assert "unknown" not in found.totals


@pytest.mark.parametrize("name", captures.NAMES)
def test_a_range_has_the_orders_of_its_folios(name: str) -> None:
    inc, found = of(name)
    for row in found.rows:
        inside = {o for p, o in inc.folios if p < row.phys + row.nbytes and row.phys < p + (inc.page_size << o)}
        assert row.orders == tuple(sorted(inside))


@pytest.mark.parametrize("name", V4)
def test_the_pages_of_a_file_have_its_size_and_content(name: str) -> None:
    inc, found = of(name)
    for session in captures.expected(name)["luo"]["sessions"]:
        for entry in session["files"]:
            owner = f"session {session['name']}, file {entry['token']:#x}"
            data = [row for row in found.rows if (row.owner, row.what) == (owner, "data")]
            pages = -(-entry["size"] // inc.page_size)
            assert sum(row.nbytes for row in data) == pages * inc.page_size
            content = bytearray(pages * inc.page_size)
            for row in data:
                assert row.offset is not None
                content[row.offset : row.offset + row.nbytes] = inc.read(row.phys, row.nbytes)
            assert bytes(content[: entry["size"]]) == inc.luo.sessions[session["name"]].files[entry["token"]].read()


def test_pages_of_structures_have_their_owner() -> None:
    _, found = of(X86)
    by_page = {row.phys: (row.owner, row.what) for row in found.rows}
    assert by_page[captures.expected(X86)["fdt_phys"]] == ("root FDT", "FDT")
    subtrees = captures.expected(X86)["subtrees"]
    for name, at in subtrees.items():
        assert by_page[at["phys"]] == (f"subtree {name}", "blob")
    assert by_page[subtrees["kho_test"]["phys"] + 4096] == ("subtree kho_test", "rest of a folio of the pages before")
    assert by_page[captures.expected(X86)["luo"]["sessions"][0]["files"][0]["data"]] == (
        "session vm-1, file 0x10",
        "memfd header",
    )
    count = Counter((row.owner, row.what) for row in found.rows)
    assert count["LUO", "session block"] == count["LUO", "FLB list"] == count["session vm-1", "file block"] == 1
    assert count["session vm-1, file 0x10", "folio list chunk"] == 1
    start, size = captures.expected(X86)["reserve_mem"]["keepme"]
    assert (by_page[start], found.totals["reserve_mem keepme"]) == (("reserve_mem keepme", "region"), size)


def test_an_unreferenced_page_is_listed_with_the_reason() -> None:
    edit = capture()
    edit.preserve(0x51C000, 2)
    found = edited(edit)
    (row,) = found.unowned
    assert (row.phys, row.nbytes, row.orders, row.owner) == (0x51C000, 16384, (2,), "unknown")
    assert found.totals["unknown"] == 16384
    assert found.why_unowned == "no payload refers to them"


def test_an_unpreserved_page_of_a_file_is_listed_with_its_offset() -> None:
    edit = capture()
    edit.preserve(edit.memfd().folios[5].phys, 0, on=False)
    (row,) = edited(edit).unpreserved
    assert (row.phys, row.nbytes, row.orders) == (edit.memfd().folios[5].phys, 4096, ())
    assert (row.owner, row.what, row.offset) == ("session vm-1, file 0x10", "data", 5 * 4096)


def test_a_file_of_an_unknown_kind_owns_the_folio_its_data_points_to() -> None:
    edit = capture()
    edit.put(edit.file, b"vendor-v1".ljust(48, b"\0"))
    found = edited(edit)
    (row,) = [row for row in found.rows if row.owner == "session vm-1, file 0x10"]
    assert (row.phys, row.what) == (edit.memfd().blob.phys, HANDLE)
    assert found.undecoded == ["session vm-1, file 0x10 (vendor-v1)"]
    assert found.totals["unknown"] == 98 * 4096  # 96 of data, the list and its chunk
    assert "vendor-v1" in found.why_unowned


def test_memory_with_two_owners_is_listed_with_both() -> None:
    edit = capture()
    edit.put_u64(edit.record(0, 0x11), edit.u64(edit.record(0)))
    (shared,) = edited(edit).shared
    assert shared.phys == edit.memfd().folios[0].phys
    assert shared.nbytes == 4096
    assert {shared.first, shared.second} == {("session vm-1, file 0x10", "data"), ("session vm-1, file 0x11", "data")}


def test_a_third_party_decoder_reports_owned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vendor(Payload):
        def owned(self) -> Any:
            (phys,) = struct.unpack("<Q", self.blob.read(8))
            yield Owned(self.blob.owner, "ring", (phys, 8192))

    monkeypatch.setattr(registry, "_decoders", dict(registry._decoders))
    decoder("vendor,ring-v1")(Vendor)
    arena = kho.Arena("64M", scratch="2M,2M,2M")
    out = kho.Outgoing(arena)
    ring = arena.alloc(1)
    out.preserve_folio(ring)
    out.add_subtree("ring", struct.pack("<Q", ring.phys))
    inc = kho.open(arena, fdt_phys=out.finalize())
    where = next(phys for phys, _ in inc.folios if inc.read(phys, 8) == struct.pack("<Q", ring.phys))
    payload = decode(Blob(inc, "vendor,ring-v1", where, 8, "subtree ring"))
    found = owners(inc, {"ring": payload})
    assert found.totals == {"subtree ring": 8192 + 4096, "root FDT": 4096}


def test_the_command_prints_ranges_and_totals() -> None:
    done = run("owners", captures.elf(X86))
    assert (done.code, done.err) == (0, "")
    assert "0x4ef000" in done.out
    assert "root FDT: FDT" in done.out
    assert "session cache, file 0x7: data at 0x4000" in done.out


def test_by_page_prints_a_row_per_page() -> None:
    inc, found = of(X86)
    pages = run("owners", "--json", "--by-page", captures.elf(X86)).json["rows"]
    assert len(pages) * 4096 == inc.preserved_bytes
    assert {row["nbytes"] for row in pages} == {4096}
    assert len(run("owners", "--json", captures.elf(X86)).json["rows"]) == len(found.rows)


def test_the_command_reports_unpreserved_and_shared_memory(tmp_path: Path) -> None:
    edit = capture()
    edit.preserve(edit.memfd().folios[0].phys, 0, on=False)
    path = tmp_path / "bad.bin"
    with path.open("wb") as out:
        for phys, data in edit.segments.items():
            out.seek(phys)
            out.write(data)
    done = run("owners", f"{path}@0")
    assert done.code == 1
    assert "not preserved at " in done.out
    assert json.loads(run("owners", "--json", f"{path}@0").out)["unpreserved"][0]["offset"] == 0
