"""Names without a vmlinux: kallsyms, BTF and page tables of a kernel, and the variables of KHO and LUO."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

import kho
from kernelmemory import File, Kernel, Layout, Session
from kho import errors
from kho._kho import unpack_bytes
from kho.handover.owners import owners
from kho.handover.symbols import kernel_of
from kho.handover.symbols.btf import Btf
from kho.handover.symbols.kallsyms import Kallsyms
from kho.handover.symbols.sessions import KernelState, read_state
from kho.handover.symbols.space import AddressSpace
from kho.handover.symbols.vmcoreinfo import Vmcoreinfo
from kho.handover.verify import verify

from command import kho as run

AREAS = [(0x1000000, 0x400000), (0x8000000, 0x2000000), (0xA000000, 0x1000000)]
SESSIONS = [
    Session(
        "vm-1", [File(0x10, 0x744000, name="guest-ram", size=393216), File(0x11, 0x748000, name="state", size=312)]
    ),
    Session("search index \u2603", [File(0xFEEDFACECAFE, 0x74C000, name="vectors", size=18700)]),
    Session("empty"),
]
MACHINES: dict[str, dict[str, Any]] = {
    "x86_64": {},
    "x86_64, 5 levels": {"bits": 57},
    "x86_64, small pages": {"large": False},
    "x86_64, 6.19": {"like": "6.19", "release": "6.19.11", "relative_base": True},
    "x86_64, 6.17": {"like": "6.17", "release": "6.17.8", "relative_base": True},
    "aarch64": {"machine": "aarch64"},
    "aarch64, 39 bits": {"machine": "aarch64", "bits": 39},
    "aarch64, 16 KiB": {"machine": "aarch64", "page": 16384, "bits": 47},
    "aarch64, 64 KiB": {"machine": "aarch64", "page": 65536, "bits": 52},
}


def memory(kernel: Kernel) -> kho.Memory:
    return kho.Memory.from_segments(kernel.runs())


def info_of(kernel: Kernel) -> Vmcoreinfo:
    return Vmcoreinfo(kernel.info.get)


def read(kernel: Kernel) -> KernelState:
    return read_state(memory(kernel), info_of(kernel))


def filled(**given: Any) -> Kernel:
    """A kernel with sessions that preserved, not finished."""
    kernel = Kernel(**given)
    kernel.scratch(AREAS)
    kernel.out(kernel.start + 0x1F00000, finalized=True)
    kernel.got(0x3000 + kernel.ram, release="7.2.13", count=2)
    if kernel.like != "6.17":
        kernel.sessions("outgoing", SESSIONS)
        kernel.sessions("incoming", [Session("old", [File(1, 0x5000, name=None), File(2, 0x6000, status=1)], True)])
    return kernel


def shown(sessions: list[Any] | None) -> list[Any]:
    return [(s.name, [(f.token, f.compatible, f.data, f.size, f.name) for f in s.files]) for s in sessions or ()]


@pytest.mark.parametrize("given", MACHINES.values(), ids=MACHINES)
def test_what_the_kernel_has_in_its_variables_is_read_on_every_machine(given: dict[str, Any]) -> None:
    kernel = filled(**given)
    state = read(kernel.finish())
    assert state.problems == []
    assert (state.release, state.scratch) == (given.get("release", "7.3.4"), AREAS)
    assert (
        state.scratch_phys
        == int.from_bytes(memory(kernel).read(kernel.image_phys(kernel.symbols["kho_scratch"]), 8), "little")
        - kernel.direct
        + kernel.ram
    )
    assert (state.out_fdt, state.in_fdt) == (kernel.start + 0x1F00000, 0x3000 + kernel.ram)
    if kernel.like == "7.3":
        assert (state.previous_release, state.kexec_count, state.finalized) == ("7.2.13", 2, None)
    else:
        assert (state.previous_release, state.kexec_count, state.finalized) == (None, None, True)
    if kernel.like == "6.17":
        assert (state.outgoing, state.incoming) == (None, None)
        return
    expected = [(s.name, [(f.token, "memfd-v2", f.data, f.size, f.name) for f in s.files]) for s in SESSIONS]
    assert shown(state.outgoing) == expected
    assert shown(state.incoming) == [("old", [(1, "memfd-v2", 0x5000, None, None), (2, "memfd-v2", 0x6000, 0, "ram")])]
    assert state.incoming is not None
    assert [(s.retrieved, [f.retrieved for f in s.files]) for s in state.incoming] == [(True, [False, True])]


@pytest.mark.parametrize("relative_base", [False, True])
def test_names_are_found_by_bisection_as_by_reading_all_of_them(relative_base: bool) -> None:
    kernel = Kernel(relative_base=relative_base, symbols=1500).finish()
    table = Kallsyms(AddressSpace(memory(kernel), info_of(kernel)))
    assert table.count == len(kernel.symbols) - sum(name.startswith("kallsyms") for name in kernel.symbols)
    named = [name for name in kernel.symbols if not name.startswith("kallsyms")]
    assert table.find(named) == {name: kernel.symbols[name] for name in named}
    assert table._scan(set(named)) == table.find(named)
    assert table.find(["kho_fillet", "", "zzz", "A"]) == {}


def test_names_are_found_where_the_tables_between_are_elsewhere() -> None:
    """A kernel whose order of tables is another one: nothing is found by bisection, and all names are read."""
    kernel = Kernel().finish()
    space = AddressSpace(memory(kernel), info_of(kernel))
    table = Kallsyms(space)
    read_before = dict(kernel.info)
    # The order of names, zeroed.
    at = kernel.symbols["kallsyms_offsets"] + 4 * table.count
    kernel.put(at, bytes(3 * table.count))
    assert read_before == kernel.info
    table = Kallsyms(AddressSpace(memory(kernel), info_of(kernel)))
    assert table.find(["kho_out", "kho_in"]) == {name: kernel.symbols[name] for name in ("kho_out", "kho_in")}


def test_a_kernel_without_symbols_of_data_says_so() -> None:
    kernel = filled().finish(without=("kho_scratch", "kho_out", "kho_in", "luo_session_global"))
    with pytest.raises(errors.FormatError, match="CONFIG_KALLSYMS_ALL"):
        read(kernel)


def test_a_kernel_without_btf_tells_its_scratch_areas() -> None:
    state = read(filled().finish(without=("__start_BTF", "__stop_BTF")))
    assert state.scratch == AREAS
    assert state.outgoing is None
    assert state.problems == ["the kernel has no BTF (CONFIG_DEBUG_INFO_BTF), so no structure can be read"]


def test_vmcoreinfo_of_another_memory_is_refused() -> None:
    kernel = filled().finish()
    kernel.put(kernel.symbols["init_uts_ns"] + 16 + 130, b"7.3.5\0")
    with pytest.raises(errors.FormatError, match=r"is not that of Linux 7\.3\.4"):
        read(kernel)


@pytest.mark.parametrize("name", ["phys_base", "swapper_pg_dir", "kallsyms_names", "kallsyms_num_syms", "init_uts_ns"])
@pytest.mark.parametrize("value", [None, "", "-1", "zz", "0", "ffffffffffffffff", "7" * 90, "0x-5"])
def test_vmcoreinfo_with_any_value_is_refused(name: str, value: str | None) -> None:
    kernel = filled().finish()
    key = next(key for key in kernel.info if f"({name})" in key)
    kernel.info[key] = value or ""
    if value is None:
        del kernel.info[key]
    try:
        state = read(kernel)
    except errors.KhoError:
        return
    assert name == "swapper_pg_dir"
    assert state.problems


# Lists


def damaged(change: Callable[[Kernel, list[int]], None]) -> KernelState:
    kernel = filled()
    places = kernel.sessions("outgoing", SESSIONS)
    change(kernel, places)
    return read(kernel.finish())


def test_a_list_that_goes_round_is_reported_and_its_sessions_stay() -> None:
    def change(kernel: Kernel, places: list[int]) -> None:
        at = kernel.layout.offset("luo_session", "list")
        kernel.put(places[2] + at, struct.pack("<Q", places[1] + at))
        kernel.put(places[1] + at + 8, struct.pack("<Q", places[2] + at))

    state = damaged(change)
    assert [session.name for session in state.outgoing or ()][:1] == ["vm-1"]
    assert len(state.problems) == 1
    assert "does not lead back" in state.problems[0] or "twice" in state.problems[0]


@pytest.mark.parametrize("target", [0, 8, 0x1000, 0xFFFF800000000001, 0xFFFFFFFFFFFFFFF8, 1 << 63])
def test_a_list_that_leads_elsewhere_is_reported(target: int) -> None:
    def change(kernel: Kernel, places: list[int]) -> None:
        kernel.put(places[1] + kernel.layout.offset("luo_session", "list"), struct.pack("<Q", target))

    state = damaged(change)
    assert [session.name for session in state.outgoing or ()] == [session.name for session in SESSIONS[:2]]
    assert len(state.problems) == 1
    assert state.problems[0].startswith("LUO's outgoing sessions: ")
    assert len(state.incoming or ()) == 1


def test_a_count_that_lies_is_reported() -> None:
    def change(kernel: Kernel, places: list[int]) -> None:
        kernel.put(places[0] + kernel.layout.offset("luo_session", "file_set.count"), struct.pack("<Q", 1 << 60))

    state = damaged(change)
    assert state.problems == [f"session vm-1: count {1 << 60}, the list has 2 files"]
    assert [len(session.files) for session in state.outgoing or ()] == [2, 1, 0]


def test_a_name_without_an_end_is_cut_at_its_array() -> None:
    def change(kernel: Kernel, places: list[int]) -> None:
        kernel.put(places[0], b"\xff\x1b" * 32)

    state = damaged(change)
    assert next(len(session.name) for session in state.outgoing or ()) == 64
    assert state.problems == []


@pytest.mark.parametrize("member", ["fh", "file", "serialized_data"])
def test_pointers_of_files_that_lead_nowhere_cost_that_member_alone(member: str) -> None:
    kernel = filled()
    heads = range(kernel.start + 0x1000000, kernel._next_heap, 64)
    token = kernel.layout.offset("luo_file", "token")
    raw = dict(kernel.pages)

    def word(at: int) -> int:
        return int.from_bytes(bytes(raw.get(at // 4096 * 4096, bytes(4096))[at % 4096 : at % 4096 + 8]), "little")

    place = next(at for at in heads if word(at + token) == 0xFEEDFACECAFE)
    kernel.write(place + kernel.layout.offset("luo_file", member), struct.pack("<Q", 0xDEAD000000000122))
    state = read(kernel.finish())
    assert shown(state.outgoing)[0] == shown(read(filled().finish()).outgoing)[0]
    file = (state.outgoing or [])[1].files[0]
    assert file.token == 0xFEEDFACECAFE
    if member == "fh":
        assert (file.compatible, file.size, file.name) == (None, 18700, "vectors")
    if member == "file":
        assert (file.compatible, file.size, file.name) == ("memfd-v2", None, None)
    assert len(state.problems) == (0 if member == "serialized_data" else 1)


@pytest.mark.parametrize("count", [0, 5000, 0xFFFFFFFF])
def test_a_number_of_scratch_areas_that_lies_is_no_scratch(count: int) -> None:
    kernel = filled()
    kernel.put(kernel.symbols["kho_scratch_cnt"], struct.pack("<I", count))
    state = read(kernel.finish())
    assert state.scratch is None
    assert len(state.problems) == bool(count)


# Tables of symbols


@pytest.mark.parametrize("count", [0, 1, 100, 1 << 21, (1 << 21) + 1, 0xFFFFFFFF])
def test_a_number_of_symbols_that_lies_gives_no_wrong_address(count: int) -> None:
    kernel = filled().finish()
    kernel.put(kernel.symbols["kallsyms_num_syms"], struct.pack("<I", count))
    try:
        state = read(kernel)
    except errors.KhoError:
        return
    # Variables are the first of these symbols, and of too many the others are never reached.
    assert count in (100, 1 << 21)
    assert (state.scratch, state.problems) == (AREAS, [])


@pytest.mark.parametrize("byte", [0, 1, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("name", ["kallsyms_names", "kallsyms_token_table", "kallsyms_token_index", "kallsyms_offsets"])
def test_tables_of_one_byte_are_an_exception_of_kho(name: str, byte: int) -> None:
    kernel = filled().finish()
    kernel.put(kernel.symbols[name], bytes([byte]) * (512 if name == "kallsyms_token_index" else 8192))
    with pytest.raises(errors.KhoError):
        read(kernel)


# BTF


def test_members_are_found_through_typedefs_and_anonymous_unions() -> None:
    layout = Kernel().layout
    for header in (24, 32, 40):
        btf = Btf(layout.btf(header=header))
        number = btf.struct("dentry")
        assert number is not None
        found = btf.field(number, "d_name.name")
        assert found is not None
        assert found.offset == layout.offset("dentry", "d_name.name") * 8
        inode = btf.struct("inode")
        assert inode is not None
        size = btf.field(inode, "i_size")
        assert size is not None
        assert (btf.size(size.type), btf.signed(size.type)) == (8, True)
        opened = btf.struct("file")
        assert opened is not None
        flags = btf.field(opened, "f_flags")
        assert flags is not None
        assert flags.bits == 3
        assert btf.field(opened, "f_inode.nothing") is None
        assert btf.struct("colors") is None  # an enum


def test_a_kind_of_a_later_kernel_is_passed_over_by_the_layout_that_comes_with_it() -> None:
    layout = Kernel().layout
    extra = struct.pack("<III", 0, 20 << 24 | 3, 0) + bytes(8 + 3 * 4)
    assert Btf(layout.btf(header=32, extra=extra)).struct("luo_file") is not None
    with pytest.raises(errors.FormatError, match="unknown kind, 20"):
        Btf(layout.btf(extra=extra))


def test_btf_that_is_cut_anywhere_is_an_exception_of_kho() -> None:
    blob = Kernel().layout.btf()
    for nbytes in range(0, len(blob), 37):
        with pytest.raises(errors.FormatError):
            Btf(blob[:nbytes])
    state = read(filled().finish(btf=blob[: len(blob) // 2]))
    assert state.scratch == AREAS
    assert [problem[:5] for problem in state.problems] == ["BTF: "]


def test_any_byte_of_btf_may_be_wrong() -> None:
    blob = bytearray(Kernel().layout.btf())
    for at in range(24, len(blob), 13):
        for value in (0, 0xFF, blob[at] ^ 1):
            lying = bytearray(blob)
            lying[at] = value
            try:
                btf = Btf(bytes(lying))
                for name in ("dentry", "luo_file", "luo_session"):
                    number = btf.struct(name)
                    for path in ("d_name.name", "token", "file_set.files_list", "list.next", "fh"):
                        field = None if number is None else btf.field(number, path)
                        if field is not None:
                            btf.size(field.type)
                            btf.signed(field.type)
            except errors.FormatError:
                pass


def test_types_that_contain_themselves_end() -> None:
    loop = Layout({"a": [("", "union:u")]}, {"u": [("x", "int")]})
    btf = bytearray(loop.btf())
    number = Btf(bytes(btf)).struct("a")
    assert number is not None
    # The union's only member becomes the structure itself, without a name.
    raw = bytes(btf)
    union = raw.index(struct.pack("<II", 5 << 24 | 1, 4)) - 4
    lying = raw[: union + 12] + struct.pack("<III", 0, number, 0) + raw[union + 24 :]
    assert Btf(lying).field(number, "y") is None


# Page tables


def test_addresses_that_are_not_mapped_are_an_exception_of_kho() -> None:
    kernel = filled().finish()
    space = AddressSpace(memory(kernel), info_of(kernel))
    for address in (0, 1, 0x7FFFFFFFFFFF, 1 << 63, kernel.direct + (1 << 40), (1 << 64) - 1, kernel.direct - 8):
        with pytest.raises(errors.KhoError):
            space.read(address, 8)
    with pytest.raises(errors.FormatError, match="beyond the address space, or too many"):
        space.read(kernel.direct, 1 << 40)


def test_tables_that_lead_to_themselves_end() -> None:
    kernel = filled().finish()
    root = kernel.image_phys(kernel.root)
    kernel.write(root, struct.pack("<Q", root | 0x63) * 512)
    space = AddressSpace(memory(kernel), info_of(kernel))
    assert space.phys(kernel.direct) == (root // 4096 * 4096)


# Dumps of a real kernel (tests/data/symbols/README.md)

DATA = Path(__file__).parent / "data/symbols"
BEFORE, AFTER = (DATA / f"linux-7.3.4-{when}.elf.zst" for when in ("before-jump", "after-update"))
SNOWMAN = "search index \u2603"
FILES = [("vm-1", 0x10, "guest-ram", 384 << 10, 1), ("vm-1", 0x11, "guest-state", 312, 2)]
FILES += [(SNOWMAN, 0xFEEDFACECAFE, "vectors", 18700, 3)]


def pattern(size: int, seed: int) -> bytes:
    return bytes((i * 7 + (i >> 12) * 13 + seed) % 256 for i in range(size))


def segments(path: Path) -> list[tuple[int, bytes]]:
    """The pages of a dump, without its notes."""
    found = kho.Memory.open(path)
    return [(phys, found.read(phys, nbytes)) for phys, nbytes in found.ranges]


def vmcoreinfo_text(path: Path) -> bytes:
    raw = unpack_bytes(str(path), path.read_bytes(), 64 << 20)
    at = raw.index(b"VMCOREINFO\0\0OSRELEASE=")
    return raw[at + 12 : at + 12 + int.from_bytes(raw[at - 8 : at - 4], "little")]


def test_sessions_before_the_jump_have_their_names() -> None:
    inc = kho.open(BEFORE)
    state = kernel_of(inc)
    assert state is not None
    assert state.problems == []
    assert (state.release, state.out_fdt, state.in_fdt, state.kexec_count) == ("7.3.4", inc.fdt_phys, None, 0)
    assert [(s.name, len(s.files), s.retrieved) for s in state.outgoing or ()] == [
        ("vm-1", 2, None),
        (SNOWMAN, 1, None),
        ("empty", 0, None),
    ]
    assert state.incoming == []
    listed = [(s.name, f.token, f.name, f.size) for _, s, f in state.files()]
    assert listed == [file[:4] for file in FILES]
    assert inc.luo.lists_nothing
    found = owners(inc)
    places = {f.data: (s.name, f.token) for _, s, f in state.files()}
    assert [(places[f.blob.phys], f.read()) for f in found.unlisted] == [
        ((name, token), pattern(size, seed)) for name, token, _, size, seed in FILES
    ]
    assert [f.blob.owner for f in found.unlisted] == [
        f"session {name}, file {token:#x}, memfd at {phys:#x}, before the jump"
        for phys, (name, token) in ((f.blob.phys, places[f.blob.phys]) for f in found.unlisted)
    ]
    assert sum(owner.startswith("session vm-1, file 0x10") for owner in found.totals) == 1
    assert all("before the jump" in f.place for f in verify(inc) if f.id == "KHO043")


def test_sessions_that_a_kernel_got_have_their_names() -> None:
    inc = kho.open(AFTER)
    state = kernel_of(inc)
    assert state is not None
    assert state.problems == []
    assert (state.out_fdt, state.previous_release, state.kexec_count) == (inc.fdt_phys, "7.3.4", 1)
    assert state.in_fdt in inc.others
    assert state.outgoing == []
    assert [(s.name, s.retrieved, [f.retrieved for f in s.files]) for s in state.incoming or ()] == [
        ("vm-1", False, [False, False]),
        (SNOWMAN, False, [False]),
        ("empty", False, []),
    ]
    places = {f.data: (s.name, f.token) for _, s, f in state.files()}
    found = inc.unlisted_memfds
    assert [(places[f.blob.phys], f.read(), f.in_map) for f in found] == [
        ((name, token), pattern(size, seed), False) for name, token, _, size, seed in FILES
    ]
    assert found[0].blob.owner == f"session vm-1, file 0x10, memfd at {found[0].blob.phys:#x}, not retrieved"


@pytest.mark.parametrize("path", [BEFORE, AFTER], ids=["before", "after"])
def test_vmcoreinfo_is_found_in_a_page_of_memory(path: Path) -> None:
    noted = kernel_of(kho.open(path))
    assert noted is not None
    page = 0x17000000
    text = vmcoreinfo_text(path)
    inc = kho.open(kho.Memory.from_segments([*segments(path), (page, text.ljust(4096, b"\0"))]))
    assert inc.vmcoreinfo_pages == [page]
    state = kernel_of(inc)
    assert state is not None
    assert (state.vmcoreinfo_phys, state.describe()) == (page, noted.describe())
    assert inc.scratch == state.scratch
    # Not found, as by --fdt-phys: everything else is as without symbols.
    bare = kho.open(kho.Memory.from_segments(segments(path)))
    assert (bare.vmcoreinfo_pages, kernel_of(bare)) == ([], None)
    assert [f.read() for f in bare.unlisted_memfds] == [f.read() for f in inc.unlisted_memfds]


def test_of_two_kernels_in_one_memory_the_last_one_counts() -> None:
    noted = kernel_of(kho.open(AFTER))
    assert noted is not None
    assert noted.in_fdt is not None
    earlier = Kernel("7.2.13", start=0x60000000)
    earlier.sessions("outgoing", [Session("stale", [File(1, noted.in_fdt)])])
    # Its root FDT is the one that the next kernel got.
    earlier.out(noted.in_fdt)
    earlier.mapped.append(noted.in_fdt)
    earlier.finish()
    pages = [(0x5FFFF000, earlier.text.ljust(4096, b"\0")), (0x17000000, vmcoreinfo_text(AFTER).ljust(4096, b"\0"))]
    inc = kho.open(kho.Memory.from_segments([*segments(AFTER), *earlier.runs(), *pages]))
    assert inc.vmcoreinfo_pages == [0x17000000, 0x5FFFF000]
    state = kernel_of(inc)
    assert state is not None
    assert state.describe() == noted.describe()


def test_the_kernel_s_own_scratch_areas_replace_what_is_found_by_content() -> None:
    noted = kernel_of(kho.open(BEFORE))
    assert noted is not None
    assert noted.scratch is not None
    inc = kho.open(BEFORE)
    assert (inc.scratch, inc.scratch_how) == (noted.scratch, "kho_scratch")
    assert inc.scratch_phys == noted.scratch_phys
    # Another page that looks like such an array: by content alone neither is certain.
    decoy = b"".join(struct.pack("<QQ", (0x800 + 8 * n) << 20, 8 << 20) for n in range(3)).ljust(4096, b"\0")
    text = vmcoreinfo_text(BEFORE).ljust(4096, b"\0")
    pages = [*segments(BEFORE), (0x17001000, decoy)]
    assert kho.open(kho.Memory.from_segments(pages)).scratch is None
    known = kho.open(kho.Memory.from_segments([*pages, (0x17000000, text)]))
    assert (known.scratch, known.scratch_how) == (noted.scratch, "kho_scratch")
    # What the caller names stays.
    given = kho.open(BEFORE, scratch=[(0x1000000, 0x1000000)])
    assert (given.scratch, given.scratch_how) == ([(0x1000000, 0x1000000)], "given")


def test_inspect_shows_the_kernel_s_sessions() -> None:
    result = run("inspect", BEFORE)
    assert result.code == 0, result.err
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "Sessions before the jump: 3, the kernel writes them into LUO's lists at the jump" in lines
    assert any(line.startswith("vm-1 0x10 memfd-v2 384.0 KiB guest-ram 0x") for line in lines)
    report = json.loads(run("inspect", "--json", AFTER).out)["kernel"]
    assert report["source"] == "kallsyms+BTF"
    assert [session["name"] for session in report["incoming_sessions"]] == ["vm-1", SNOWMAN, "empty"]
    assert report["previous_release"] == "7.3.4"


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_any_page_of_a_dump_may_be_missing_or_wrong(data: st.DataObject) -> None:
    """What is left is a part of the whole answer, or a problem is named; never another exception."""
    pages = {at: raw[n : n + 4096] for at0, raw in PAGES for n, at in zip(range(0, len(raw), 4096), count(at0, 4096))}
    for at in data.draw(st.lists(st.sampled_from(sorted(pages)), max_size=30, unique=True)):
        del pages[at]
        if data.draw(st.booleans()):
            pages[at] = data.draw(st.sampled_from([bytes(4096), b"\xff" * 4096, Random(at).randbytes(4096)]))
    lacking = kho.Memory.from_segments(list(pages.items()))
    text = TEXT.decode().splitlines()
    info = Vmcoreinfo(dict(line.partition("=")[::2] for line in text).get)
    try:
        state = read_state(lacking, info)
    except errors.KhoError:
        return
    whole = {f.token for _, _, f in WHOLE.files()}
    if not state.problems:
        assert {f.token for _, _, f in state.files()} in (whole, set())


PAGES = segments(BEFORE)
TEXT = vmcoreinfo_text(BEFORE)
WHOLE = read_state(kho.Memory.from_segments(PAGES), Vmcoreinfo(kho.Memory.open(BEFORE).vmcoreinfo))
