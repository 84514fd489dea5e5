"""The registry of decoders: what third parties add, what nobody knows, what is refused, and systemd's map."""

from __future__ import annotations

import importlib.metadata
import json
import struct
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

import kho
from kho.payload import Blob, Broken, Owned, Payload, Raw, base, decode, decoder, known

import captures
from images import MIB

V4 = "linux-7.3.4-x86_64"


class Widget(Payload):
    """Somebody's device: a serial number, and one page of state."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(blob)
        _, self.serial, self.state = struct.unpack("<8sQQ", blob.read(24))
        if not self.serial:
            raise self.malformed("serial number 0")

    def describe(self) -> dict[str, Any]:
        """Give the serial number."""
        return {"serial": self.serial}

    def owned(self) -> Iterator[Owned]:
        """Account for the state."""
        yield Owned("widget", "state", (self.state, 4096))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A registry that is as it was afterwards."""
    copy = dict(base._decoders)
    monkeypatch.setattr(base, "_decoders", copy)
    return copy


def handover(serial: int) -> tuple[kho.Incoming, int]:
    """Hand a widget over."""
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
    from kho.owners import owners

    assert any(row.phys == state and row.owner == "widget" for row in owners(inc).rows)


def test_a_decoder_that_refuses_leaves_the_rest_readable(registry: dict[str, Any]) -> None:
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
    stored = {"fds": [{"name": "db", "token": 1}]}
    arena = kho.Arena(64 * MIB)
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd("systemd", 0, json.dumps(stored).encode())
    out.add_memfd("systemd", 1, b"data")
    out.add_memfd("vm-1", 0, b"{}")
    inc = kho.open(arena, fdt_phys=out.finalize())
    assert inc.luo.sessions["systemd"].fd_store == stored
    with pytest.raises(kho.NotFoundError, match="session vm-1"):
        _ = inc.luo.sessions["vm-1"].fd_store
    assert list(inc.luo.sessions["systemd"].files) == [0, 1]


def test_what_is_not_there_is_not_found() -> None:
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
    """What would let a small image have one long list read a million times."""
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
    assert "its data is that of session vm-1, file 0x10" in str(files[second.token].error)


def _segments(content: bytearray) -> list[tuple[int, bytes]]:
    """Cut an ELF core's content into the segments its headers name."""
    (offset,) = struct.unpack_from("<Q", content, 32)
    (count,) = struct.unpack_from("<H", content, 56)
    headers = [struct.unpack_from("<IIQQQQQQ", content, offset + 56 * i) for i in range(count)]
    return [(h[4], bytes(content[h[2] : h[2] + h[5]]).ljust(h[6], b"\0")) for h in headers]
