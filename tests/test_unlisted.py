"""Memfds in no list, roots whose map was given back, and scratch arrays that a loaded kernel was told of."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest

import kho
from kho.handover.extract import sha256_of
from kho.handover.owners import owners, unlisted

import captures
import filtered
import handovers
from command import kho as run
from filtered import MARKED
from images import EM_AARCH64, EM_X86_64, MIB, Image, Layout, sample_subtrees

LUO = [name for name in captures.NAMES if "luo" in captures.expected(name)]
X86 = "linux-7.3.4-x86_64"


def files_of(name: str) -> list[dict[str, Any]]:
    """The reference reader's memfds of a capture that have contents, by address."""
    sessions = captures.expected(name)["luo"]["sessions"]
    return sorted((f for s in sessions for f in s["files"] if f["size"]), key=lambda f: f["data"])


def before_jump(name: str) -> list[tuple[int, bytes]]:
    """The pages of a capture with LUO's lists as they are before the jump: not written yet."""
    inc = kho.open(captures.elf(name))
    pages = {phys: bytearray(data) for phys, data in captures.contents(name)}

    def zero(at: int, nbytes: int) -> None:
        start = max(phys for phys in pages if phys <= at)
        pages[start][at - start : at - start + nbytes] = bytes(nbytes)

    luo = inc.luo
    if luo.compatible == "luo-v5":
        zero(luo.blob.phys + 16, 16)
        for _, phys, nbytes in luo.blocks:
            zero(phys, nbytes)
    else:
        for what, phys, _ in luo.blocks:
            zero(phys + (8 if what == "FLB list" else 0), 8)
    return [(phys, bytes(data)) for phys, data in pages.items()]


def image(pages: list[tuple[int, bytes]], **given: Any) -> Image:
    return Image(contents=dict(pages), **given)


def found_in(inc: kho.Incoming) -> list[tuple[int, int, str | None, bool]]:
    return [(f.blob.phys, f.size, sha256_of(f), f.in_map) for f in unlisted(inc)]


def dump(path: Path, pages: list[tuple[int, bytes]]) -> Path:
    """A raw image of pages that are not many."""
    with path.open("wb") as out:
        for phys, data in pages:
            out.seek(phys)
            out.write(data)
        end = max(phys + len(data) for phys, data in pages)
        out.truncate(-(-end // MIB) * MIB)
    return path


@pytest.mark.parametrize("name", LUO)
def test_before_the_jump_every_memfd_is_found_with_its_contents(name: str, tmp_path: Path) -> None:
    inc = kho.open(f"{dump(tmp_path / 'ram.bin', before_jump(name))}@0,check=no")
    assert inc.luo.lists_nothing
    assert found_in(inc) == [(f["data"], f["size"], f["sha256"], True) for f in files_of(name)]
    for file, expected in zip(unlisted(inc), files_of(name), strict=True):
        assert (file.pos, file.seals) == (expected["pos"], expected["seals"])
    # The same without a search, by looking at the pages without an owner.
    again = kho.open(f"{tmp_path / 'ram.bin'}@0,check=no", fdt_phys=inc.fdt_phys)
    assert found_in(again) == found_in(inc)


@pytest.mark.parametrize("name", LUO)
def test_listed_memfds_are_not_found_twice(name: str) -> None:
    inc = kho.open(captures.elf(name))
    assert unlisted(inc) == []
    assert inc.may_have_unlisted


def test_memfds_in_no_session_are_owners_of_all_their_pages(tmp_path: Path) -> None:
    name = X86
    whole = owners(kho.open(captures.elf(name)))
    found = owners(kho.open(f"{dump(tmp_path / 'ram.bin', before_jump(name))}@0,check=no"))
    listed = sum(n for owner, n in whole.totals.items() if owner.startswith("session ") and not owner.endswith("0x8"))
    memfds = {owner: n for owner, n in found.totals.items() if owner.startswith("memfd at ")}
    assert len(memfds) == len(files_of(name))
    blocks = sum(row.nbytes for row in whole.rows if row.what == "file block")
    assert sum(memfds.values()) == listed - blocks
    assert found.before_jump
    assert "LUO's lists are empty" in found.why_unowned
    assert not found.unpreserved[:]


def test_commands_name_memfds_in_no_session_and_extract_them(tmp_path: Path) -> None:
    source = f"{dump(tmp_path / 'ram.bin', before_jump(X86))}@0,check=no"
    files = files_of(X86)
    shown = run("inspect", source)
    assert shown.code == 0
    assert "\nMemfds in no session: 3, preserved; a session lists its files from the jump on\n" in shown.out
    assert "no session is listed: the kernel writes LUO's lists at the jump" in shown.out
    rows = run("inspect", "--json", source).json["unlisted_memfds"]
    assert [(r["phys"], r["sha256"], r["in_map"]) for r in rows] == [(f["data"], f["sha256"], True) for f in files]
    first = files[0]
    place = hex(first["data"])
    assert f"memfd at {place}, in no session: data" in run("owners", source).out
    assert f"memfd at {place}, in no session" in run("map", "--json", source).out
    checked = run("verify", "--json", source)
    notes = [f for f in checked.json["findings"] if f["id"] == "KHO043"]
    assert [note["phys"] for note in notes] == [f["data"] for f in files]
    done = run("extract", source, "--memfd", place, "-o", tmp_path / "out")
    assert done.code == 0
    assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == first["sha256"]
    done = run("extract", source, "--memfd", "0x1000", "-o", tmp_path / "none")
    assert (done.code, place in done.err) == (2, True)
    manifest = run("extract", "--json", source, "--all", tmp_path / "all").json
    memfds = [entry for entry in manifest["entries"] if entry["kind"] == "memfd"]
    assert [(m["path"], m["sha256"]) for m in memfds] == [(f"memfds/{f['data']:#x}", f["sha256"]) for f in files]


@pytest.mark.parametrize("abi", ["kho-v1", "kho-v3", "kho-v4"])
@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_memfds_of_any_order_are_found_in_what_kho_writes(abi: str, page_size: int) -> None:
    arena, _, expected = handovers.complete(abi, page_size=page_size)
    luo = kho.open(arena).luo
    listed = {entry.data for session in luo.all_sessions for entry in session.entries}
    if luo.compatible == "luo-v5":
        arena.write(luo.blob.phys + 16, bytes(16))
    else:
        phys = next(block[1] for block in luo.blocks if block[0] == "session array")
        arena.write(phys, bytes(8))
    found = unlisted(kho.open(arena))
    contents = [f.contents for files in expected.sessions.values() for f in files.values() if f.contents]
    assert {f.blob.phys for f in found} <= listed
    assert sorted(f.read() for f in found) == sorted(contents)


def metadata(release: bytes, count: int) -> bytes:
    """`struct kho_kexec_metadata`, packed."""
    return struct.pack("<I65sI", 1, release, count)


def after_update(name: str, rng: Random, *, count: int) -> Image:
    """The memory of a kernel that booted from a capture's handover: the map and LUO's lists were freed and used again.

    The next handover's root, which is in force from boot on, is in the same memory.
    """
    inc = kho.open(captures.elf(name))
    pages = captures.contents(name)
    for phys, nbytes in given_back(name):
        pages.append((phys, rng.randbytes(nbytes)))
    start = -(-max(phys + len(data) for phys, data in pages) // MIB) * MIB
    return Image(
        contents=dict(split(pages)),
        compatible=captures.expected(name)["compatible"],
        page_size=inc.page_size,
        ram=[(0x4000_0000 if "aarch64" in name else 0, start + 16 * MIB)],
        subtrees=sample_subtrees() | {"kexec-metadata": metadata(b"7.3.4", count)},
        metadata_phys=start + MIB,
        machine=EM_AARCH64 if "aarch64" in name else EM_X86_64,
        whole_ram=True,
    )


def given_back(name: str) -> list[tuple[int, int]]:
    """What a kernel frees early in boot of the handover that it booted from: map and LUO's lists."""
    inc = kho.open(captures.elf(name))
    freed = [*inc.map_nodes, *((phys, nbytes) for _, phys, nbytes in inc.luo.blocks)]
    for session in inc.luo.all_sessions:
        freed += session.blocks
    return freed


def split(pages: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Pages of 4096 bytes, so that later ones replace earlier ones."""
    return [(phys + at, data[at : at + 4096]) for phys, data in pages for at in range(0, len(data), 4096)]


@pytest.mark.parametrize("name", [name for name in LUO if captures.expected(name)["compatible"] != "kho-v1"])
def test_memfds_that_were_not_retrieved_come_out_of_the_memory_after_a_live_update(name: str, tmp_path: Path) -> None:
    old = kho.open(captures.elf(name)).fdt_phys
    before = captures.expected(name).get("kexec_metadata", {}).get("kexec_count")
    path = after_update(name, Random(name), count=2).write(tmp_path / "ram.elf")
    inc = kho.open(path)
    assert inc.fdt_phys != old
    (other,) = inc.other_roots
    assert (other.phys, other.kexec_count) == (old, before)
    assert other.state in ("stale", "broken")
    assert found_in(inc) == [(f["data"], f["size"], f["sha256"], False) for f in files_of(name)]
    shown = run("inspect", path)
    assert f"Memfds outside the map: {len(files_of(name))}, not retrieved" in shown.out
    assert "--fdt-phys" not in shown.err
    if before == 1:
        assert f"{old:#x} (kexec 1) is of the handover this kernel booted from; its map was given back" in shown.err
    assert run("owners", path).code == 0
    manifest = run("extract", "--json", path, "--all", tmp_path / "all").json
    memfds = [entry["sha256"] for entry in manifest["entries"] if entry["kind"] == "memfd"]
    assert memfds == [f["sha256"] for f in files_of(name)]


SMALL_PAGES = [name for name in LUO if "64k" not in name]


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("name", SMALL_PAGES)
def test_a_filter_that_leaves_out_the_map_that_was_given_back_loses_no_memfd(
    name: str, form: str, tmp_path: Path
) -> None:
    """Level 31 leaves out free pages, and the map's are free after a live update, unless they were used again."""
    pages = {
        phys: bytes(page).ljust(4096, b"\0")
        for phys, page in after_update(name, Random(name), count=2).lay_out().pages.items()
    }
    freed = {at for phys, nbytes in given_back(name) for at in range(phys & -4096, phys + nbytes, 4096)}
    path = tmp_path / "vmcore"
    machine = "aarch64" if "aarch64" in name else "x86_64"
    path.write_bytes(filtered.dump(pages, freed, form, machine=machine))
    inc = kho.open(path)
    old = kho.open(captures.elf(name)).fdt_phys
    assert [(other.phys, other.state) for other in inc.other_roots] == [(old, "left out")]
    assert found_in(inc) == [(f["data"], f["size"], f["sha256"], False) for f in files_of(name)]
    for command in ("inspect", "verify", "owners", "map", "compat"):
        done = run(command, path, *(["7.3.4"] if command == "compat" else []))
        assert f"note: the root FDT at {old:#x}" in done.err
        assert "--fdt-phys" not in done.err
    made = run("extract", "--json", path, "--all", tmp_path / "all").json["entries"]
    assert [e["sha256"] for e in made if e["kind"] == "memfd"] == [f["sha256"] for f in files_of(name)]


def test_without_an_earlier_handover_only_preserved_pages_are_searched(tmp_path: Path) -> None:
    """What a closed session leaves in free pages is no memfd that was not retrieved."""
    made = after_update(X86, Random(1), count=1)
    made.contents[kho.open(captures.elf(X86)).fdt_phys] = bytes(4096)
    inc = kho.open(made.write(tmp_path / "ram.elf"))
    assert inc.other_roots == []
    assert unlisted(inc) == []


@pytest.mark.parametrize(
    "what", ["list too long", "nr_folios", "size", "chunk", "after", "order", "index", "pfn", "cycle"]
)
def test_a_structure_that_does_not_fit_its_list_is_no_memfd(what: str, tmp_path: Path) -> None:
    pages = dict(split(before_jump(X86)))
    expected = files_of(X86)[0]
    memfd = kho.open(captures.elf(X86)).luo.sessions["vm-1"].files[0x10].memfd
    head, chunk, block = memfd.phys, memfd.list.chunks[0], memfd.list.blocks[0]
    at, value = {
        "list too long": (head + 40, struct.pack("<I", 2)),
        "nr_folios": (head + 24, struct.pack("<Q", expected["nr_folios"] + 1)),
        "size": (head + 8, struct.pack("<Q", 4096)),
        "chunk": (chunk + 16, struct.pack("<Q", block)),
        "after": (head + 4000, b"\1"),
        "order": (head + 46, struct.pack("<H", 3)),
        "index": (block + 16 + 8, struct.pack("<Q", 0)),
        "pfn": (block, struct.pack("<Q", 3 << 52 | 0x12345)),
        "cycle": (chunk, struct.pack("<Q", chunk)),
    }[what]
    page = bytearray(pages[at & -4096])
    page[at & 4095 : (at & 4095) + len(value)] = value
    pages[at & -4096] = bytes(page)
    inc = kho.open(f"{dump(tmp_path / 'ram.bin', list(pages.items()))}@0,check=no")
    assert [f.blob.phys for f in unlisted(inc)] == [f["data"] for f in files_of(X86)[1:]]


def test_many_structures_that_name_one_list_are_bounded(tmp_path: Path) -> None:
    """Each copy passes until the list's owner is known; the work is that of a few lists, and one memfd is shown."""
    pages = dict(split(before_jump(X86)))
    head = files_of(X86)[0]["data"]
    inc = kho.open(captures.elf(X86))
    spare = [p for p, order in inc.folios if order == 0 and p not in {f["data"] for f in files_of(X86)}]
    data = [folio.phys for folio in inc.luo.sessions["vm-1"].files[0x10].folios]
    copies = [phys for phys in spare if phys in data]
    for phys in copies:
        pages[phys] = pages[head]
    again = kho.open(f"{dump(tmp_path / 'ram.bin', list(pages.items()))}@0,check=no")
    found = [f.blob.phys for f in unlisted(again)]
    lists = {phys for phys in found if pages[phys] == pages[head]}
    assert len(lists) == 1
    assert len(found) == len(files_of(X86))


@pytest.mark.parametrize("seed", range(2))
def test_random_memory_has_no_memfds(seed: int, tmp_path: Path) -> None:
    """Random pages, and pages of words as in real memory: small numbers, and addresses of pages that are there."""
    rng = Random(seed)
    old = Image(folios=[(0x40_0000, 0)], ram=[(0, 24 * MIB)], metadata_phys=MIB)
    contents = {}
    for phys in range(4 * MIB, 20 * MIB, 4096):
        if rng.random() < 0.3:
            contents[phys] = rng.randbytes(4096)
        else:
            words = [rng.choice((0, 1, rng.randrange(1 << 14), rng.randrange(6144) << 12)) for _ in range(6)]
            contents[phys] = struct.pack("<6Q", *words).ljust(4096, b"\0")
    old.folios = [(phys, 0) for phys in range(4 * MIB, 20 * MIB, 4096)]
    old.contents = contents
    inc = kho.open(old.write(tmp_path / "ram.elf"))
    assert unlisted(inc) == []
    assert found_in(kho.open(tmp_path / "ram.elf", fdt_phys=inc.fdt_phys)) == []


# Scratch


AREAS = [(0x0B00_0000, 16 * MIB), (0x0800_0000, 32 * MIB), (0x0600_0000, 16 * MIB)]
ARRAY, LOADED, THERE = 0x30_0000, 0x0080_0000, 0x0600_3000


def told(fdt: int, scratch: int, areas: int) -> bytes:
    """A `struct setup_data` entry of type SETUP_KEXEC_KHO."""
    return struct.pack("<QIIQQQQ", 0, 10, 32, fdt, 4096, scratch, 16 * areas)


def with_loaded(areas: list[tuple[int, int]], there: bytes, *, array: int | None = ARRAY, after: bytes = b"") -> Image:
    """A memory with the next kernel loaded by kexec_file_load: setup_data names where the array will be copied to."""
    image = Image(
        folios=[(0x40_0000, 2)],
        compatible="kho-v4",
        ram=[(0, 256 * MIB)],
        subtrees=sample_subtrees(),
        whole_ram=True,
        fdt_phys=0x20_0000,
        scratch_phys=0x21_0000,
    )
    image.contents[LOADED] = told(0x20_0000, THERE, len(areas))
    image.contents[THERE] = there
    if array is not None:
        image.contents[array] = b"".join(struct.pack("<QQ", *area) for area in areas) + after
    return image


@pytest.mark.parametrize(
    "there",
    [
        b"",
        bytes(64),
        Random(5).randbytes(4096),
        struct.pack("<6Q", *([0x48C0_3148_C031_0F0B] * 6)),
        struct.pack("<6Q", 1, 2, 3, 4, 5, 6),
    ],
    ids=["nothing", "zeros", "random", "code", "small numbers"],
)
def test_scratch_is_not_what_lies_where_a_loaded_kernel_will_find_it(there: bytes, tmp_path: Path) -> None:
    inc = kho.open(with_loaded(AREAS, there).write(tmp_path / "ram.elf"))
    assert (inc.scratch, inc.scratch_phys) == (AREAS, ARRAY)
    none = kho.open(with_loaded(AREAS, there, array=None).write(tmp_path / "none.elf"))
    assert none.scratch is None
    assert "Scratch: not known" in run("inspect", tmp_path / "none.elf").out
    assert [f["id"] for f in run("verify", "--json", tmp_path / "none.elf").json["findings"]].count("KHO018") == 1


@pytest.mark.parametrize("after", [b"", b"\x7fELF" * 64, struct.pack("<QQ", 3 * MIB, 1)])
@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_an_array_is_found_whatever_follows_it_in_its_page(nodes: int, after: bytes, tmp_path: Path) -> None:
    areas = AREAS + [(0x0D00_0000 + n * 4 * MIB, 4 * MIB) for n in range(nodes - 1)]
    inc = kho.open(with_loaded(areas, b"\xcc" * 4096, after=after).write(tmp_path / "ram.elf"))
    assert (inc.scratch, inc.scratch_phys) == (areas, ARRAY)


def test_an_array_that_is_where_it_was_told_is_used(tmp_path: Path) -> None:
    there = b"".join(struct.pack("<QQ", *area) for area in AREAS)
    inc = kho.open(with_loaded(AREAS, there, array=None).write(tmp_path / "ram.elf"))
    assert (inc.scratch, inc.scratch_phys) == (AREAS, THERE)
    # Of a kernel before 7.1, which does not round the sizes of the command line.
    odd = [(0x0B00_0000, 16 * MIB + 4096), *AREAS[1:]]
    there = b"".join(struct.pack("<QQ", *area) for area in odd)
    path = with_loaded(odd, there, array=None).write(tmp_path / "odd.elf")
    assert kho.open(path).scratch == odd
    assert "KHO017" in [f["id"] for f in run("verify", "--json", path).json["findings"]]


def test_an_array_outside_this_memory_gives_way_to_one_inside(tmp_path: Path) -> None:
    far = [(addr + (1 << 40), size) for addr, size in AREAS]
    there = b"".join(struct.pack("<QQ", *area) for area in far)
    inc = kho.open(with_loaded(AREAS, there).write(tmp_path / "ram.elf"))
    assert (inc.scratch, inc.scratch_phys) == (AREAS, ARRAY)


def test_of_two_roots_the_one_that_its_map_preserves_is_read(tmp_path: Path) -> None:
    """The kernel was told of the root whose map was given back; the pages of that map read as an empty one by now."""
    stale = Image(folios=[(0x80_0000, 0)], compatible="kho-v4", ram=[(0, 256 * MIB)], metadata_phys=4 * MIB)
    laid = stale.lay_out()
    new = with_loaded(AREAS, b"", array=ARRAY)
    new.under = [stale]
    new.contents[LOADED] = told(laid.fdt_phys, THERE, 3)
    new.contents[laid.map_phys] = bytes(4096)
    inc = kho.open(new.write(tmp_path / "ram.elf"))
    assert inc.fdt_phys == 0x20_0000
    assert [(other.phys, other.state) for other in inc.other_roots] == [(laid.fdt_phys, "stale")]


def laid_out_without_map(made: Image) -> Layout:
    """Lay out an image whose root has the address 0 for its map: nothing was finalized."""
    laid = made.lay_out()
    root = bytearray(laid.pages[laid.fdt_phys])
    at = root.index(struct.pack("<Q", laid.map_phys))
    root[at : at + 8] = bytes(8)
    laid.put_root(bytes(root))
    return laid


@pytest.mark.parametrize("left", ["memfds", "nothing"])
def test_next_to_a_root_without_a_map_no_root_is_read_whose_map_was_given_back(left: str, tmp_path: Path) -> None:
    """Of Linux before 7.1 the root without a map is that of the kernel that runs, whatever the other's map reads as."""
    name = "linux-7.0-layout-x86_64"
    made = after_update(name, Random(7), count=1)
    laid = laid_out_without_map(made)
    freed = {at for phys, nbytes in given_back(name) for at in range(phys & -4096, phys + nbytes, 4096)}
    lost = set(freed)
    if left == "nothing":
        lost |= {f["data"] for f in files_of(name)}
    pages = {phys: bytes(page).ljust(4096, b"\0") for phys, page in laid.pages.items()}
    for dropped in (lost, lost - freed):
        path = tmp_path / "vmcore"
        zeroed = pages | dict.fromkeys(freed, bytes(4096))
        path.write_bytes(filtered.dump(zeroed, dropped, "kdump"))
        inc = kho.open(path)
        assert (inc.fdt_phys, inc.nr_folios, inc.finalized) == (laid.fdt_phys, 0, False)
        assert len(unlisted(inc)) == (len(files_of(name)) if left == "memfds" else 0)
        checked = run("verify", "--json", path).json["findings"]
        assert "KHO047" in [f["id"] for f in checked]


def test_without_any_map_what_was_not_retrieved_is_found_next_to_the_root_that_has_none(tmp_path: Path) -> None:
    """Linux 6.19 and 7.0 after a live update: the outgoing root has no map until it is finalized."""
    name = "linux-7.0-layout-x86_64"
    made = after_update(name, Random(7), count=1)
    laid = laid_out_without_map(made)
    path = tmp_path / "ram.elf"
    path.write_bytes(laid.to_elf())
    inc = kho.open(path)
    assert (inc.fdt_phys, inc.nr_folios, inc.preserved_memory_map) == (laid.fdt_phys, 0, 0)
    assert found_in(inc) == [(f["data"], f["size"], f["sha256"], False) for f in files_of(name)]
    for command in ("inspect", "owners", "map"):
        assert run(command, path).code == 0
    found = run("verify", "--json", path).json["findings"]
    assert "KHO047" in [f["id"] for f in found]
    assert len([f for f in found if f["id"] == "KHO043"]) == len(files_of(name))
