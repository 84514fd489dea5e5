"""The registry of decoders: third-party decoders, unknown and refused payloads, and systemd's map."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import struct
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import kho
from attack import craft
from kho.formats import Blob, Broken, KhoTest, Owned, Payload, Raw, decode, decoder, known
from kho.formats import registry as base
from kho.handover import extract
from kho.handover.verify import verify

import captures
from images import MIB

V4 = "linux-7.3.4-x86_64"


class Widget(Payload):
    """A third-party payload: a serial number, and one page of state."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        _, self.serial, self.state = struct.unpack("<8sQQ", blob.read(24))
        if not self.serial:
            raise self.malformed("serial number 0")

    def describe(self) -> dict[str, Any]:
        """Return the serial number."""
        return {"serial": self.serial}

    def owned(self) -> Iterator[Owned]:
        """Yield the page of state."""
        yield Owned("widget", "state", (self.state, 4096))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registry of decoders, restored after the test."""
    copy = dict(base._decoders)
    monkeypatch.setattr(base, "_decoders", copy)
    return copy


def handover(serial: int) -> tuple[kho.Incoming, int]:
    """A handover with a widget, and the address of its state."""
    arena = kho.Arena(64 * MIB)
    out = kho.Outgoing(arena, "kho-v4")
    state = arena.alloc()
    out.preserve_folio(state)
    out.add_subtree("widget", struct.pack("<8sQQ", b"widgt-1", serial, state.phys))
    return kho.open(arena, fdt_phys=out.finalize()), state.phys


def test_a_few_lines_add_a_decoder(registry: dict[str, Any]) -> None:
    inc, state = handover(7)
    assert isinstance(inc.payloads["widget"], Raw)
    assert inc.payloads["widget"].describe()["raw"].startswith(b"widgt-1\0".hex())
    decoder("widgt-1")(Widget)
    assert "widgt-1" in known()
    widget = inc.payloads["widget"]
    assert isinstance(widget, Widget)
    assert (widget.compatible, widget.serial, widget.state) == ("widgt-1", 7, state)
    from kho.handover.owners import owners

    assert any(row.phys == state and row.owner == "widget" for row in owners(inc).rows)


def test_a_refused_payload_leaves_the_others_readable(registry: dict[str, Any]) -> None:
    decoder("widgt-1")(Widget)
    inc, _ = handover(0)
    broken = inc.payloads["widget"]
    assert isinstance(broken, Broken)
    assert "serial number 0" in broken.describe()["error"]
    assert "subtree widget at 0x" in str(broken.error)


def test_entry_points_are_decoders(registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("widgt-1", f"{__name__}:Widget", "kho.decoders"),
        EntryPoint("gone-v1", "no_such_package:Gone", "kho.decoders"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == "kho.decoders" else [])
    base._load_entry_points.cache_clear()
    try:
        inc, _ = handover(9)
        with pytest.warns(UserWarning, match="gone-v1"):
            widget = inc.payloads["widget"]
        assert isinstance(widget, Widget)
    finally:
        base._load_entry_points.cache_clear()


def test_a_file_of_an_unknown_kind_is_shown_raw() -> None:
    inc = kho.open(captures.elf(V4))
    entry = inc.luo.sessions["vm-1"].entries[0]
    raw = decode(Blob(inc, "vfio-pci-v1", entry.data, None, "session vm-1, file 0x10"))
    assert isinstance(raw, Raw)
    assert raw.describe() == {"raw": inc.read(entry.data, 64).hex()}


def test_systemd_keeps_its_map_of_descriptors_in_token_0() -> None:
    stored = {
        "version": 1,
        "state": {"KExecCount": 1},
        "units": {"db.service": {"fdstore": [{"type": "fd", "name": "db", "token": 1}]}},
    }
    arena = kho.Arena(64 * MIB)
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd("systemd", 0, json.dumps(stored).encode())
    out.add_memfd("systemd", 1, b"data")
    out.add_memfd("vm-1", 0, b"{}")
    inc = kho.open(arena, fdt_phys=out.finalize())
    assert inc.luo.sessions["systemd"].fd_store.document == stored
    with pytest.raises(kho.NotFoundError, match="session vm-1"):
        _ = inc.luo.sessions["vm-1"].fd_store
    assert list(inc.luo.sessions["systemd"].files) == [0, 1]


def test_a_missing_payload_raises_not_found() -> None:
    inc = kho.open(captures.elf("linux-6.18.15-x86_64"))
    for name in ("luo", "metadata"):
        with pytest.raises(kho.NotFoundError):
            getattr(inc, name)
    assert set(inc.reserve_mem) == {"keepme"}
    region = inc.reserve_mem["keepme"]
    assert region.read(16) == inc.read(region.start, 16)
    with pytest.raises(kho.OutsideMemoryError):
        region.read(1 << 40)


def test_two_files_do_not_share_their_data() -> None:
    """Otherwise a small image could have one long list read a million times."""
    inc = kho.open(captures.elf(V4))
    first, second = inc.luo.sessions["vm-1"].entries
    content = bytearray(captures.elf(V4).read_bytes())
    pointer = second.data.to_bytes(8, "little") + second.token.to_bytes(8, "little")
    at = content.index(pointer)
    content[at : at + 8] = first.data.to_bytes(8, "little")
    image = kho.Memory.from_segments(_segments(content))
    files = kho.open(image, fdt_phys=inc.fdt_phys, page_size=4096).luo.sessions["vm-1"].files
    assert files[first.token].size == 393216
    assert isinstance(files[second.token], Broken)
    assert "session vm-1, file 0x10 refers to the same data" in str(files[second.token].error)


def _segments(content: bytearray) -> list[tuple[int, bytes]]:
    """Split the content of an ELF core into the segments of its headers."""
    (offset,) = struct.unpack_from("<Q", content, 32)
    (count,) = struct.unpack_from("<H", content, 56)
    headers = [struct.unpack_from("<IIQQQQQQ", content, offset + 56 * i) for i in range(count)]
    return [(h[4], bytes(content[h[2] : h[2] + h[5]]).ljust(h[6], b"\0")) for h in headers]


# Malformed lists (tests/attack checks the bounds on their cost)


def crafted(name: str, tmp_path: Path, scale: float = 0.2) -> kho.Incoming:
    path = tmp_path / "image.elf"
    path.write_bytes(craft.CASES[name](scale))
    return kho.open(path)


@pytest.mark.parametrize("name", ["blocks_sixteen_bytes_apart", "arrays_that_overlap"])
def test_lists_of_luo_begin_on_a_page(name: str, tmp_path: Path) -> None:
    inc = crafted(name, tmp_path)
    with pytest.raises(kho.FormatError, match=r"not a multiple of the page size 4096"):
        inc.luo  # noqa: B018 - decodes
    assert any(f.id == "KHO023" and "page size" in f.value for f in verify(inc))


def test_no_two_lists_of_luo_share_a_page(tmp_path: Path) -> None:
    inc = crafted("sessions_of_shared_files", tmp_path)
    with pytest.raises(
        kho.FormatError, match=r"file block at 0x[0-9a-f]+: .*the page at 0x[0-9a-f]+ belongs to a list already"
    ):
        inc.luo  # noqa: B018 - decodes


def test_no_two_page_lists_share_a_page(tmp_path: Path) -> None:
    inc = crafted("lists_that_share_their_pages", tmp_path)
    first, *others = (inc.luo.sessions["s"].files[token] for token in inc.luo.sessions["s"].files)
    assert first.memfd.nr_listed > 0
    assert all(isinstance(other, Broken) for other in others)
    assert all("is a block that another area has" in str(other.error) for other in others)
    # A second read gives the same result.
    again = list(inc.luo.sessions["s"].files.values())
    assert [type(file) for file in again] == [type(first), *map(type, others)]


@pytest.mark.parametrize("name", ["one_test_folio_again_and_again", "test_folios_inside_one_another"])
def test_folios_of_a_checksum_share_no_memory(name: str, tmp_path: Path) -> None:
    inc = crafted(name, tmp_path, 0.02)
    test = inc.payloads["kho_test"]
    assert isinstance(test, KhoTest)
    assert "overlaps the folio at" in str(test.describe()["csum_holds"])
    assert [f.id for f in test.findings()] == ["KHO024"]


def test_missing_contents_are_an_error_and_not_zeros(tmp_path: Path) -> None:
    """Holes are not read, but the missing end of a truncated file is not a hole."""
    image = craft.Craft()
    craft.luo5(image, [(b"memfd-v2", craft.memfd(image, 4096, craft.records_of([(0x8000, 0)])), 1)])
    image.put(b"x" * 4096, 0x8000 << 12)
    path = tmp_path / "image.elf"
    whole = image.elf()
    path.write_bytes(whole)
    file = kho.open(path).luo.sessions["s"].files[1]
    assert extract.sha256_of(file) == hashlib.sha256(b"x" * 4096).hexdigest()
    path.write_bytes(whole[:-4096])
    file = kho.open(path).luo.sessions["s"].files[1]
    with pytest.raises(kho.SourceError, match="ends before what its headers promise"):
        extract.sha256_of(file)
    with pytest.raises(kho.SourceError):
        extract.save(extract.content_of(file), tmp_path / "out")
