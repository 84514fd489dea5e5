"""Formats of public drafts are read and marked wherever they are, and written only on request."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import drafted
import kho
from kho import _kho, errors
from kho.cli.inspect import show_payloads
from kho.formats import Broken, Hugetlb, HwPoison, Pci, PstoreKho, Raw, TmpfsFile, drafts, known
from kho.formats.declare import Declared, compatible_of
from kho.formats.pstore import MOST_TEXT
from kho.handover import extract
from kho.handover.describe import describe
from kho.handover.owners import owners
from kho.handover.verify import verify

from bounded import bounded
from command import kho as run

KINDS = [getattr(drafts, name) for name in drafts.__all__] + [PstoreKho]
COMPATIBLES = {
    "eventfd-v1",
    "guest_memfd_luo_v1",
    "huge-memfd-v1",
    "hugetlb-v1",
    "hwpoison",
    "kvm_vm_luo_v1",
    "pci-v2",
    "pstore-kho",
    "tmpfs-file-v1",
    "tmpfs-mnt-v1",
}
SHAPES = [("kho-v4", 4096), ("kho-v4", 16384), ("kho-v4", 65536), ("kho-v3", 4096), ("kho-v1", 4096)]


@pytest.fixture(scope="module")
def elf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafts") / "drafts.elf"
    kho.Image.of_arena(drafted.drafts()).save(path)
    return path


def payloads(inc: kho.Incoming) -> dict[str, Any]:
    """All draft payloads of a handover by compatible."""
    found = {payload.compatible: payload for payload in inc.payloads.values()}
    luo = inc.luo
    for session in luo.all_sessions:
        found |= {entry.compatible: session.files.decode(entry) for entry in session.entries}
    return found | {flb.name: payload for flb, payload in luo.flb_payloads()}


def test_every_draft_has_a_decoder_that_says_so() -> None:
    assert {compatible_of(kind) for kind in KINDS} == COMPATIBLES
    assert set(known()) >= COMPATIBLES
    for kind in KINDS:
        assert kind.draft
        assert "include/linux/kho/abi/" in kind.source


@pytest.mark.parametrize(("abi", "page_size"), SHAPES)
def test_what_is_written_is_read_and_every_page_has_an_owner(abi: str, page_size: int) -> None:
    inc = kho.open(drafted.drafts(abi, page_size, poison=False))
    found = payloads(inc)
    sized = bool(_kho.abis()[abi].size_property)
    assert found.keys() >= COMPATIBLES - (set() if sized else {"pstore-kho"})
    assert [(d.domain, d.bdf, d.refcount) for d in found["pci-v2"].devices] == [(0, 0xFB, 1), (1, 0xFFFF, 0)]
    assert [(p.nr_pages, p.order) for p in found["hugetlb-v1"].hstates] == [(1, 3)]
    guest = found["guest_memfd_luo_v1"]
    assert (guest.size, guest.flags, guest.vm_token, len(guest.folios)) == (8 * page_size, 1, 1, 2)
    assert guest.read() == b"guest memory".ljust(6 * page_size, b"\0") + b"more of it".ljust(2 * page_size, b"\0")
    assert guest.read(10, 6 * page_size) == b"more of it"
    assert found["huge-memfd-v1"].read() == b"huge page".ljust(100, b"\0")
    file = found["tmpfs-file-v1"]
    assert (file.read(), file.name, oct(file.mode), file.pos, file.mnt_token) == (
        *(b"a file of tmpfs", "state"),
        *("0o640", 3, 1),
    )
    assert (found["tmpfs-mnt-v1"].max_blocks, found["tmpfs-mnt-v1"].mode) == (512, 0o755)
    assert (found["eventfd-v1"].count, found["eventfd-v1"].flags) == (7, 0o4001)
    vm = found["kvm_vm_luo_v1"]
    assert (vm.type, vm.nr_attrs, vm.attrs.area.read(32)) == (1, 2, b"\1" * 32)
    assert found["hwpoison"].pfns == [1 << 24, (1 << 24) + 1]
    if sized:
        assert found["pstore-kho"].dmesg() == b"".join(drafted.LOG)
    assert verify(inc) == []
    assert not owners(inc).unowned
    assert not owners(inc).unpreserved


def test_a_draft_is_written_only_on_request_and_never_by_default() -> None:
    out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
    before = out.folios()
    for kind in KINDS:
        with pytest.raises(kho.ParameterError, match="draft=True"):
            out.add_payload(kind, {}, file=("s", 1))
    assert out.folios() == before
    assert dict(out.subtrees) == {}
    for abi in _kho.abis().values():
        assert not {abi.luo, abi.memfd} & COMPATIBLES


def test_a_failed_or_removed_payload_leaves_no_pages() -> None:
    out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
    out.add_luo()
    before = out.folios()
    for values in ({"pfns": [-1]}, {"pfns": [1], "count": "x"}, {"pfns": [1], "no such": 1}):
        with pytest.raises(kho.ParameterError, match="hwpoison: "):
            out.add_payload(HwPoison, values, subtree="hwpoison", draft=True)
        with pytest.raises(kho.ParameterError):
            out.add_payload(HwPoison, values, file=("s", 1), draft=True)
        with pytest.raises(kho.ParameterError):
            out.add_payload(HwPoison, values, flb=1, draft=True)
    wheres: list[dict[str, Any]] = [{}, {"subtree": "a", "flb": 1}]
    for where in wheres:
        with pytest.raises(kho.ParameterError, match="exactly one"):
            out.add_payload(HwPoison, {"pfns": [1]}, draft=True, **where)
    assert out.folios() == before
    out.add_payload(HwPoison, {"pfns": [1, 2, 3]}, subtree="hwpoison", draft=True)
    out.add_payload(Pci, {"max_devices": 0}, flb=1, draft=True)
    with pytest.raises(kho.ExistsError):
        out.add_payload(Pci, {"max_devices": 0}, flb=1, draft=True)
    out.add_payload(TmpfsFile, {"mnt_token": 0, "size": 0, "mode": 0, "name": "x"}, file=("s", 1), draft=True)
    out.remove_subtree("hwpoison")
    out.remove_flb("pci-v2")
    out.remove_session("s")
    assert out.folios() == before
    out.add_payload(Pci, {"max_devices": 0}, flb=1, draft=True)
    out.remove_subtree("LUO")
    assert len(out.folios()) < len(before)
    arena = out.arena
    del out
    assert len(kho.Outgoing(arena, "kho-v4").folios()) == 1


# What is shown


def test_drafts_are_marked_in_json_and_in_text(elf: Path) -> None:
    data = run("inspect", "--json", elf).json
    rows = [row for session in data["luo"]["sessions"] for row in session["files"]]
    rows += [*data["payloads"].values(), *data["luo"]["flb_data"].values()]
    assert len(rows) == len(COMPATIBLES)
    for row in rows:
        assert row["draft"] is True
        assert row["source"]
    text = run("inspect", elf).out
    for name in COMPATIBLES - {"hwpoison", "pstore-kho"}:
        assert f"{name} (draft)" in text
    assert "of public drafts, which may still change" in text


def test_fields_are_shown_with_units(elf: Path) -> None:
    text = " ".join(run("inspect", elf).out.split())
    for shown in (
        "size 32.0 KiB",
        "mode 0o640",
        "vm_token 0x1",
        "max_blocks 512 pages",
        "devices[0] domain 0, bdf 00:1f.3, refcount 1",
        "flags 2049 (EFD_SEMAPHORE, EFD_NONBLOCK)",
        "hstates[0] nr_pages 1 huge pages, order 3",
        "pfns[0] 0x1000000",
        "time_sec 1780000000 s",
        "reason Panic",
        "unsure padding",
    ):
        assert shown in text
    file = run("inspect", "--json", elf).json["luo"]["sessions"][1]["files"][1]
    assert file["units"] == {"mnt_token": "token", "pos": "bytes", "size": "bytes", "mode": "mode"}
    assert len(file["sha256"]) == 64


def test_files_of_drafts_are_extracted(elf: Path, tmp_path: Path) -> None:
    done = run("extract", elf, "--session", "store", "--token", "2", "-o", tmp_path / "state")
    assert done.code == 0
    assert (tmp_path / "state").read_bytes() == b"a file of tmpfs"
    assert run("extract", elf, "--session", "vm-1", "--token", "2", "-o", tmp_path / "guest").code == 0
    assert (tmp_path / "guest").read_bytes() == kho.open(elf).luo.sessions["vm-1"].files[2].read()
    done = run("extract", elf, "--session", "store", "--token", "3", "-o", tmp_path / "no")
    assert (done.code, "no contents known to kho" in done.err) == (2, True)
    assert run("extract", elf, "--all", tmp_path / "all").code == 1
    assert (tmp_path / "all/pstore/dmesg.txt").read_bytes() == b"".join(drafted.LOG)


# Poisoned pages


def test_a_poisoned_page_is_found_in_the_folio_that_contains_it(elf: Path) -> None:
    inc = kho.open(elf)
    (found,) = verify(inc)
    head = inc.luo.sessions["vm-1"].files[2].folios[0].pfn * 4096
    assert (found.id, found.severity, found.phys) == ("KHO035", "error", head + 4096)
    assert found.value == f"in the preserved folio of order 2 at {head:#x}"
    assert run("verify", elf).code == 1


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_exactly_the_poisoned_pages_that_are_preserved_are_reported(page_size: int, data: st.DataObject) -> None:
    arena = kho.Arena(1024 * page_size, page_size=page_size)
    out = kho.Outgoing(arena, "kho-v4")
    for order in data.draw(st.lists(st.integers(0, 4), max_size=6)):
        out.preserve_folio(arena.alloc(order))
    pfns = data.draw(st.lists(st.one_of(st.integers(0, 1100), st.just((1 << 64) - 1)), max_size=15, unique=True))
    out.add_payload(HwPoison, {"pfns": pfns}, subtree="hwpoison", draft=True)
    out.finalize()
    inc = kho.open(arena)
    covered = {pfn for first, n in inc.tracker().extents() for pfn in range(first, first + n)}
    found = [f for f in verify(inc) if f.id == "KHO035"]
    assert {f.phys for f in found} == {pfn * page_size for pfn in pfns if pfn in covered}


def test_many_poisoned_pages_are_counted() -> None:
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, "kho-v4")
    folio = arena.alloc(8)
    out.preserve_folio(folio)
    out.add_payload(HwPoison, {"pfns": [folio.pfn + n for n in range(100)]}, subtree="hwpoison", draft=True)
    out.finalize()
    found = [f for f in verify(arena) if f.id == "KHO035"]
    assert len(found) == 16
    assert "(and 85 more places)" in found[-1].value


# The previous kernel's messages


def pstore(blob: bytes, abi: str = "kho-v4") -> kho.Incoming:
    arena = kho.Arena("16M")
    out = kho.Outgoing(arena, abi)
    out.add_payload(PstoreKho, blob, subtree="pstore-kho", draft=True)
    out.finalize()
    return kho.open(arena)


def packed(*records: dict[str, Any]) -> bytes:
    """Records without padding."""
    made = struct.pack("<I", 1)
    for r in records:
        head = (len(r["buf"]), r["time_sec"], r["time_nsec"], r["count"], r["reason"], r["part"], r["compressed"])
        made += struct.pack("<qqIiIII", *head) + r["buf"]
    return made


def test_messages_come_in_the_order_in_which_they_were_logged(elf: Path, tmp_path: Path) -> None:
    done = run("extract", elf, "--dmesg", "-o", tmp_path / "log")
    assert done.code == 0
    assert (tmp_path / "log").read_bytes() == b"".join(drafted.LOG)
    data = run("extract", elf, "--dmesg", "--json", "-o", tmp_path / "log", "--force").json
    assert (data["kind"], data["draft"], data["records"]) == ("pstore", True, 2)


def test_a_record_without_padding_is_read_and_said_to_be() -> None:
    for blob, where in (
        (PstoreKho.encode_records(*drafted.records()), "laid out by C"),
        (packed(*drafted.records()), "packed"),
    ):
        found = pstore(blob).payloads["pstore-kho"]
        assert isinstance(found, PstoreKho)
        assert found.dmesg() == b"".join(drafted.LOG)
        assert where in found.unsure


def test_the_bytes_of_a_record_are_those_of_the_header() -> None:
    """Offsets as a C compiler has them for s64, s64, u32, s32, u32, u32, u32, char[] after a u32."""
    record = {"time_sec": 2, "time_nsec": 3, "count": 4, "reason": 2, "part": 5, "compressed": 0, "buf": b"text"}
    assert PstoreKho.encode_records(record) == struct.pack("<I4xqqIiIII4s", 1, 4, 2, 3, 4, 2, 5, 0, b"text")


def test_without_messages_the_error_names_what_there_is(elf: Path, tmp_path: Path) -> None:
    empty = kho.open(drafted.drafts("kho-v1"))
    with pytest.raises(kho.NotFoundError, match="no kernel messages"):
        extract.dmesg(empty)
    with pytest.raises(kho.FormatError, match="wrote no messages"):
        extract.dmesg(pstore(struct.pack("<I", 1).ljust(200, b"\0")))
    assert run("extract", elf, "--dmesg").code == 2


def test_a_record_that_cannot_be_decompressed_is_a_line_that_says_so() -> None:
    good, bad = drafted.records()
    bad["buf"] = b"\xff" + bad["buf"]
    text = extract.dmesg(pstore(PstoreKho.encode_records(good, bad))).contents().read(1000, 0)
    assert text.startswith(b"[kho: record 1, part 2: its ")
    assert text.endswith(drafted.LOG[1])
    bad["buf"] = drafted.deflated(b"x" * 100)[:-4]
    with pytest.raises(kho.FormatError, match="cut short"):
        extract.dmesg(pstore(PstoreKho.encode_records(bad)))


def test_a_record_that_decompresses_without_end_is_refused() -> None:
    bomb = {**drafted.TIME, "count": 1, "reason": 1, "part": 1, "compressed": 1}
    blob = PstoreKho.encode_records({**bomb, "buf": drafted.deflated(bytes(MOST_TEXT + 1))})
    assert len(blob) < 40_000
    with bounded(3), pytest.raises(kho.FormatError, match=f"more than {MOST_TEXT} bytes"):
        extract.dmesg(pstore(blob))
    half = {**bomb, "buf": drafted.deflated(bytes(MOST_TEXT // 2 + 1))}
    with bounded(3):
        text = pstore(PstoreKho.encode_records(half, {**half, "part": 2})).payloads["pstore-kho"].dmesg()  # type: ignore[attr-defined]
    assert len(text) < MOST_TEXT // 2 + 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", -1), ("size", 1 << 40), ("time_nsec", 10**9), ("reason", 99), ("compressed", 7)],
)
def test_a_first_record_that_cannot_be_one_is_refused(field: str, value: int) -> None:
    (record, _) = drafted.records()
    found = pstore(PstoreKho.encode_records({**record, field: value})).payloads["pstore-kho"]
    assert isinstance(found, Broken)
    assert field in str(found.error)


# Padding


def test_huge_page_pools_are_read_with_and_without_padding() -> None:
    pools = [(1, 9), (2, 18), (3, 4)]
    tight = b"".join(struct.pack("<QB", *pool) for pool in pools) + bytes(9) + b"\3"
    loose = b"".join(struct.pack("<QB7x", *pool) for pool in pools) + bytes(16) + b"\3" + bytes(7)
    for blob, how in ((tight, "packed"), (loose, "laid out by C")):
        out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
        out.add_payload(Hugetlb, blob, flb=1, draft=True)
        out.finalize()
        ((_, found),) = kho.open(out.arena).luo.flb_payloads()
        assert isinstance(found, Hugetlb)
        assert [(pool.nr_pages, pool.order) for pool in found.hstates] == pools
        assert how in found.unsure
        assert verify(out.arena) == []
    assert Hugetlb.encode(hstates=[{"nr_pages": n, "order": order} for n, order in pools]) == tight


# Hostile input

EXTREMES = [0, 1, 7, 2**31, 2**32 - 1, 2**52, 2**63, 2**64 - 1, 0x1000, 0x1001, 2**40]


def look(memory: kho.Memory) -> None:
    """Do with a handover whatever the commands do; errors are those of kho."""
    try:
        inc = kho.open(memory)
    except errors.KhoError:
        return
    describe(inc, full=True)
    verify(inc)
    owners(inc)
    for item in extract.items(inc):
        with contextlib.suppress(errors.KhoError):
            extract.sha256_of(item.contents(), allowance=extract.Allowance(inc))


def structures(inc: kho.Incoming) -> list[tuple[str, int, int]]:
    """(compatible, address, bytes) of every structure of a draft, and of the lists they lead to."""
    found = []
    for name, payload in payloads(inc).items():
        if isinstance(payload, Declared):
            found.append((name, payload.blob.phys, payload.blob.size or payload.nbytes))
            for what, area in payload.areas():
                found += [(f"{name} {what}", block, 64) for block in area.blocks]
                found += [(f"{name} {what} chunk", chunk, 24) for chunk in area.chunks]
    return found


def test_every_field_of_every_draft_may_have_any_value(elf: Path) -> None:
    """Each 4 bytes of each structure and list, in turn, become each of the extremes."""
    memory = kho.Memory.open(elf)
    sane = [(phys, memory.read(phys, size)) for phys, size in memory.ranges]
    places = structures(kho.open(elf))
    assert {name.split()[0] for name, _, _ in places} == COMPATIBLES
    chosen = random.Random(1)
    for _name, phys, size in places:
        for offset in range(0, min(size, 64), 4):
            value = chosen.choice(EXTREMES)
            damaged = []
            for start, data in sane:
                if start <= phys < start + len(data):
                    at = phys + offset - start
                    data = (data[:at] + struct.pack("<Q", value) + data[at + 8 :])[: len(data)]
                damaged.append((start, data))
            with bounded(2):
                look(kho.Memory.from_segments(damaged))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_structures_are_read_or_refused(elf: Path, data: st.DataObject) -> None:
    memory = kho.Memory.open(elf)
    segments = [(phys, bytearray(memory.read(phys, size))) for phys, size in memory.ranges]
    places = structures(kho.open(elf))
    for _ in range(data.draw(st.integers(1, 4))):
        _, phys, size = data.draw(st.sampled_from(places))
        offset = data.draw(st.integers(0, size - 1))
        value = data.draw(st.one_of(st.sampled_from(EXTREMES), st.sampled_from([p for _, p, _ in places])))
        start, found = next((s, d) for s, d in segments if s <= phys < s + len(d))
        at = phys + offset - start
        found[at : at + 8] = struct.pack("<Q", value)[: len(found) - at]
    with bounded(2):
        look(kho.Memory.from_segments([(phys, bytes(part)) for phys, part in segments]))


NOTHING = {"domain": 0, "bdf": 0, "refcount": 0}
LIES: dict[str, tuple[type[Declared], dict[str, Any]]] = {
    "more pfns than the area has": (HwPoison, {"pfns": [1], "count": 1 << 40}),
    "another version": (HwPoison, {"pfns": [], "version": 2}),
    "more devices than there is room for": (
        Pci,
        {"max_devices": 1, "devices": [NOTHING] * 2},
    ),
    "devices up to the end of memory": (Pci, {"max_devices": 0xFFFFFFFF, "nr_devices": 0xFFFFFFFF}),
    "a path as a name": (TmpfsFile, {"mnt_token": 0, "size": 0, "mode": 0, "name": "../etc/passwd"}),
    "no name": (TmpfsFile, {"mnt_token": 0, "size": 0, "mode": 0, "name": ""}),
}


@pytest.mark.parametrize("what", LIES)
def test_lies_are_refused_with_the_place(what: str) -> None:
    kind, values = LIES[what]
    out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
    out.add_payload(kind, values, file=("s", 1), draft=True)
    out.finalize()
    with bounded():
        found = kho.open(out.arena).luo.sessions["s"].files[1]
    assert isinstance(found, Broken)
    assert "session s, file 0x1" in str(found.error)
    assert [f.id for f in verify(out.arena) if f.severity == "error"] == ["KHO023"]


def test_a_name_cannot_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
    values = {"mnt_token": 0, "size": 0, "mode": 0, "name": "\x1b[31mred\nline"}
    out.add_payload(TmpfsFile, values, file=("s", 1), draft=True)
    out.finalize()
    show_payloads(describe(kho.open(out.arena)))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"\x1b[31mred\nline" in text


def test_a_folio_beyond_the_file_or_twice_at_one_place_is_reported() -> None:
    def found(*indexes: int) -> list[str]:
        arena = kho.Arena("16M")
        out = kho.Outgoing(arena, "kho-v4")
        folios = [arena.alloc() for _ in indexes]
        for folio in folios:
            out.preserve_folio(folio)
        entries = [{"pfn": f.pfn, "flags": 3, "index": i} for f, i in zip(folios, indexes, strict=True)]
        values = {"mnt_token": 0, "size": 8192, "mode": 0, "name": "x", "folios": entries}
        out.add_payload(TmpfsFile, values, file=("s", 1), draft=True)
        out.finalize()
        return [f.id for f in verify(arena)]

    assert found(0, 1) == found(1, 0) == []
    assert found(0, 0) == ["KHO027"]
    assert found(0, 2) == ["KHO028"]


def test_data_without_an_address_and_unknown_names_stay_raw() -> None:
    out = kho.Outgoing(kho.Arena("16M"), "kho-v4")
    out.add_flb("pci-v2", 0)
    out.add_flb("vendor-flb", 0x1000)
    out.add_file("s", 1, "tmpfs-v9", 0)
    out.finalize()
    inc = kho.open(out.arena)
    assert list(inc.luo.flb_payloads()) == []
    assert isinstance(inc.luo.sessions["s"].files[1], Raw)
    assert "flb_data" not in inc.luo.describe()


CALLS: dict[str, Callable[[kho.Incoming], object]] = {"describe": describe, "owners": owners}


@pytest.mark.parametrize("call", CALLS)
def test_a_long_list_of_folios_takes_time_in_proportion(call: str) -> None:
    """Folios that adjoin are listed as one range."""
    arena = kho.Arena("512M")
    out = kho.Outgoing(arena, "kho-v4")
    first = (256 << 20) >> 12
    for folio in [arena.alloc_at(first + n << 12) for n in range(1 << 14)]:
        out.preserve_folio(folio)
    entries = [{"pfn": first + n, "flags": 3, "index": n} for n in range(1 << 14)]
    values = {"mnt_token": 0, "size": 1 << 26, "mode": 0, "name": "x", "folios": entries}
    out.add_payload(TmpfsFile, values, file=("s", 1), draft=True)
    out.finalize()
    inc = kho.open(arena)
    file = inc.luo.sessions["s"].files[1]
    assert len([o for o in file.owned() if o.what == "data"]) == 1
    with bounded(8):
        CALLS[call](inc)
