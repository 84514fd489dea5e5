"""What real kernels write that looks malformed is read as it is, by every command."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest

import kho
from kho._types import MemfdFolio
from kho.handover.verify import verify

import images
import model
from command import Done
from command import kho as run
from images import MIB, Layout
from model import Node

PAGE = 4096
COLD = "nothing was finalized: the next kernel will boot cold"


def arena_of() -> kho.Arena:
    return kho.Arena(64 * MIB, scratch="2M,2M,2M")


def saved(arena: kho.Arena, path: Path, runs: Iterable[tuple[int, int]]) -> Path:
    """An ELF core of these runs of an arena's memory, and of its scratch array."""
    layout = Layout(images.Image())
    assert arena.scratch_phys is not None
    for phys, nbytes in [*runs, (arena.scratch_phys, PAGE)]:
        layout.put(phys, arena.read(phys, nbytes))
    path.write_bytes(layout.to_elf())
    return path


def sparse(arena: kho.Arena, path: Path) -> Path:
    """An ELF core of what a finalized handover names, and nothing else, as a capture has it."""
    inc = kho.open(arena)
    return saved(arena, path, [*((phys, PAGE << order) for phys, order in inc.folios), *inc.map_nodes])


def clean(done: Done) -> Done:
    assert (done.code, done.err) == (0, ""), done
    return done


def sound(path: Path) -> None:
    """`kho verify` finds no error; LUO data of 6.19 panics 7.0 (KHO037), and may lack late writes (KHO049)."""
    report = clean(run("verify", "--json", path)).json
    assert {row["id"] for row in report["findings"]} <= {"KHO037", "KHO049"}


def extracted(path: Path, *args: object) -> bytes:
    """What `kho extract` writes."""
    target = path.with_suffix(".out")
    done = run("extract", path, *args, "-o", target, "--force")
    assert done.code == 0, done
    return target.read_bytes()


# A subnode of the root without `fdt` (6.19, 7.0.0 to 7.0.8)


def with_empty_node(compatible: str, path: Path) -> Path:
    image = images.Image(subtrees=images.sample_subtrees(), compatible=compatible, scratch=[(128 * MIB, 16 * MIB)] * 1)
    layout = image.lay_out()
    layout.root.children = {"left": Node({}), **layout.root.children}
    layout.put_root()
    path.write_bytes(layout.to_elf())
    return path


def test_a_subnode_without_its_property_is_a_subtree_that_was_not_added(tmp_path: Path) -> None:
    path = with_empty_node("kho-v1", tmp_path / "left.elf")
    done = clean(run("inspect", path))
    assert "\nleft: " in done.out
    assert clean(run("inspect", "--json", path)).json["malformed_subtrees"].keys() == {"left"}
    (found,) = (f for f in verify(path) if f.id not in ("KHO018", "KHO025"))
    assert (found.id, found.severity, found.place) == ("KHO048", "note", "subtree left")
    assert clean(run("verify", path)).out.endswith("notes\n")
    clean(run("owners", path))
    assert model.read_fdt(extracted(path, "--subtree", "producer")).props["compatible"] == b"example-v1\0"
    done = run("extract", path, "--subtree", "left", "-o", tmp_path / "none")
    assert done.code == 2
    assert 'subtree "left"' in done.err


def test_a_tree_does_not_leave_such_a_node(tmp_path: Path) -> None:
    found = verify(with_empty_node("kho-v3", tmp_path / "left.elf"))
    assert [f.place for f in found if f.id == "KHO019"] == ["subtree left"]


def test_a_property_of_another_name_is_malformed(tmp_path: Path) -> None:
    image = images.Image(subtrees=images.sample_subtrees())
    layout = image.lay_out()
    layout.root.children["left"] = Node({"phys": bytes(8)})
    layout.put_root()
    path = tmp_path / "odd.elf"
    path.write_bytes(layout.to_elf())
    assert [f.place for f in verify(path) if f.id == "KHO019"] == ["subtree left"]


# An empty session name (6.19 to 7.1.3), and a session without files


@pytest.mark.parametrize("kernel", ["6.19", "7.0", "7.1", "7.2"])
def test_an_empty_session_name_is_read(kernel: str, tmp_path: Path) -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, kernel=kernel)
    out.add_memfd("was-named", 0x10, b"guest memory")
    out.add_memfd("other", 1, b"x")
    out.finalize()
    _, where, _ = next(block for block in kho.open(arena).luo.blocks if block[0].startswith("session"))
    entry = where + (16 if kernel == "7.2" else 8)
    assert arena.read(entry, 10) == b"was-named\0"
    arena.write(entry, bytes(64))
    path = sparse(arena, tmp_path / "handover.elf")
    assert [session.name for session in kho.open(path).luo.all_sessions] == ["", "other"]
    assert ['""', "0x10"] in [line.split()[:2] for line in clean(run("inspect", path)).out.splitlines()]
    sound(path)
    assert 'session "", file 0x10: data' in clean(run("owners", path)).out
    assert extracted(path, "--session", "", "--token", "0x10") == b"guest memory"
    assert run("extract", path, "--all", tmp_path / "all").code == 0
    assert {p.read_bytes() for p in (tmp_path / "all/sessions").rglob("0x10")} == {b"guest memory"}


@pytest.mark.parametrize("kernel", ["6.19", "7.0", "7.1", "7.2"])
def test_a_session_without_files_hides_no_other(kernel: str, tmp_path: Path) -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, kernel=kernel)
    out.add_session("nothing yet")
    out.add_memfd("vm-1", 0x10, b"guest memory")
    out.add_session("nothing at all")
    out.finalize()
    path = sparse(arena, tmp_path / "handover.elf")
    done = clean(run("inspect", path))
    assert done.out.count("no files") == 2
    sound(path)
    assert "unknown" not in clean(run("owners", path)).out
    assert extracted(path, "--session", "vm-1", "--token", "0x10") == b"guest memory"
    done = run("extract", path, "--session", "nothing yet", "--token", "0x10", "-o", tmp_path / "none")
    assert (done.code, done.err) == (2, "kho: session 'nothing yet': no token 0x10; there are none\n")


# Folio flags 0 to 3 (memfd-v1, 6.19.0 to 6.19.8)


def test_folios_of_a_memfd_have_any_flags(tmp_path: Path) -> None:
    """Bit 0 is dirty, bit 1 up to date: without it the kernel gives zeros."""
    arena = arena_of()
    out = kho.Outgoing(arena, kernel="6.19")
    listed = []
    for flags in range(4):
        folio = arena.alloc()
        memoryview(folio)[:] = bytes([0x41 + flags]) * PAGE
        listed.append(MemfdFolio(folio.phys, 0, flags, flags))
    out.add_memfd("vm-1", 0x10, listed, size=4 * PAGE)
    out.finalize()
    path = sparse(arena, tmp_path / "handover.elf")
    expected = bytes(2 * PAGE) + b"C" * PAGE + b"D" * PAGE
    file = kho.open(path).luo.sessions["vm-1"].files[0x10]
    assert ([folio.flags for folio in file.folios], file.read()) == ([0, 1, 2, 3], expected)
    (row,) = clean(run("inspect", "--json", path)).json["luo"]["sessions"][0]["files"]
    assert (row["folios"], row["size"]) == (4, 4 * PAGE)
    sound(path)
    assert "unknown" not in clean(run("owners", path)).out
    assert extracted(path, "--session", "vm-1", "--token", "0x10") == expected


# A root with map 0 (6.19, 7.0), and sessions with count 0 until the kexec


def unfinalized(kernel: str, path: Path) -> Path:
    """Memory of a kernel that has finalized nothing: root, subtrees, LUO with its array of sessions, a region."""
    arena = arena_of()
    out = kho.Outgoing(arena, kernel=kernel)
    out.add_reserve_mem("trace0", 2 * PAGE)
    folio = arena.alloc(1)
    memoryview(folio)[:] = random.Random(1).randbytes(folio.nbytes)
    out.add_kho_test([folio])
    out.add_memfd("vm-1", 0x10, b"guest memory")
    runs = [(folio.phys, PAGE << folio.order) for folio in out.folios()]
    return saved(arena, path, runs)


@pytest.mark.parametrize("kernel", ["6.19", "7.0"])
def test_a_root_with_map_0_is_valid_and_the_next_kernel_boots_cold(kernel: str, tmp_path: Path) -> None:
    path = unfinalized(kernel, tmp_path / "handover.elf")
    inc = kho.open(path)
    assert (inc.finalized, inc.nr_folios, inc.preserved_memory_map, inc.metadata_pages) == (False, 0, 0, 0)
    assert (inc.page_size, inc.bitmap_bytes) == (PAGE, PAGE)
    assert list(inc.subtrees) == ["LUO", "kho_test", "memblock"]
    assert inc.luo.sessions == {}

    done = clean(run("inspect", path))
    assert ["preserved-memory-map", "0x0", *COLD.split()] in [line.split() for line in done.out.splitlines()]
    assert "Preserved: 0 folios, 0 B\n" in done.out
    assert "checksum" in done.out
    found = clean(run("inspect", "--json", path)).json
    assert (found["finalized"], found["nr_folios"], found["luo"]["sessions"]) == (False, 0, [])
    assert found["kernels"] == f"Linux {kernel}"
    assert found["reserve_mem"]["trace0"][1] == 2 * PAGE

    done = clean(run("verify", path))
    assert done.out.startswith(f"warning KHO047: handover not finalized\n  root FDT at {inc.fdt_phys:#x}: ")
    assert COLD in done.out
    assert "note KHO043: memfd in no session" in done.out
    assert done.out.endswith("0 errors, 1 warning, 1 note\n")

    assert f"Preserved: 0 B; {COLD}\n" in clean(run("owners", path)).out
    assert extracted(path, "--subtree", "LUO") == inc.subtrees["LUO"].read()
    assert extracted(path, "--reserve-mem", "trace0") == bytes(2 * PAGE)
    assert run("extract", path, "--folio", f"{inc.fdt_phys:#x}", "-o", tmp_path / "none").code == 2
    clean(run("map", path))

    done = run("convert", path, "--abi", "kho-v4", "-o", tmp_path / "new.elf")
    assert (done.code, (tmp_path / "new.elf").exists()) == (2, False)
    assert f"{COLD}; there is nothing to convert" in done.err
    assert run("compat", path, "7.0").code == 1


def test_a_finalized_handover_in_the_same_memory_is_preferred(tmp_path: Path) -> None:
    """The machine was booted by a handover, and holds the root of the next one, which is not finalized yet."""
    old, new = arena_of(), arena_of()
    out = kho.Outgoing(old, kernel="7.0", fdt_phys=0x100_0000)
    out.finalize()
    later = kho.Outgoing(new, kernel="7.0", fdt_phys=0x80_0000)
    later.add_reserve_mem("trace0", PAGE)
    layout = Layout(images.Image())
    inc = kho.open(old)
    assert old.scratch_phys is not None
    runs = [(phys, PAGE << order) for phys, order in inc.folios] + inc.map_nodes + [(old.scratch_phys, PAGE)]
    for phys, nbytes in runs:
        layout.put(phys, old.read(phys, nbytes))
    layout.put(0x80_0000, new.read(0x80_0000, PAGE))
    path = tmp_path / "both.elf"
    path.write_bytes(layout.to_elf())
    assert (kho.open(path).fdt_phys, kho.open(path).others) == (0x100_0000, [0x80_0000])
    assert not kho.open(path, fdt_phys=0x80_0000).finalized


def test_no_arena_is_taken_over_from_a_root_with_map_0() -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, kernel="7.0")
    out.preserve_folio(arena.alloc())
    with pytest.raises(kho.FormatError, match="preserved-memory-map is 0: nothing was serialized"):
        kho.Incoming(arena, out.fdt_phys)
    assert out.nr_folios == 2


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_the_page_size_of_a_root_with_map_0_is_what_its_address_leaves_open(page_size: int) -> None:
    at = 0x40_0000 + page_size
    root = Node({"compatible": b"kho-v1\0", "preserved-memory-map": bytes(8)})
    memory = kho.Memory.from_segments([(at, model.write_fdt(root).ljust(page_size, b"\0"))])
    inc = kho.open(memory)
    assert (inc.page_size, inc.certainty) == (4096, "certain" if page_size == 4096 else "guess")
    told = kho.open(memory, page_size=page_size)
    assert (told.page_size, told.certainty, told.nr_folios) == (page_size, "given", 0)
    assert kho.open(memory, bitmap_bytes=512).bitmap_bytes == 512


def test_a_tree_has_no_map_of_0() -> None:
    root = Node({"compatible": b"kho-v3\0", "preserved-memory-map": bytes(8)})
    memory = kho.Memory.from_segments([(0x40_0000, model.write_fdt(root).ljust(PAGE, b"\0"))])
    with pytest.raises(kho.FormatError, match="preserved-memory-map is 0: nothing was serialized"):
        kho.open(memory)
    assert [f.id for f in verify(memory)] == ["KHO001", "KHO018"]


def test_debugfs_before_finalize_says_what_it_means(tmp_path: Path) -> None:
    """Linux 6.19 and 7.0 show the root from boot on, with map 0."""
    out = kho.Outgoing(arena_of(), kernel="7.0")
    blob = out.arena.read(out.fdt_phys, 152)
    debugfs = tmp_path / "kho"
    (debugfs / "out").mkdir(parents=True)
    (debugfs / "out/fdt").write_bytes(blob)
    (debugfs / "out/finalize").write_text("0\n")
    shown = clean(run("inspect", debugfs)).out
    assert "not finalized: there is no map yet\n" in shown
    assert f"{COLD} (with liveupdate=on the kernel finalizes by itself" in shown
    assert clean(run("inspect", "--json", debugfs)).json["out"]["preserved_memory_map"] == 0
    (tmp_path / "fdt").write_bytes(blob)
    for source in (debugfs, tmp_path / "fdt"):
        assert [f.id for f in verify(source)] == ["KHO047"]
        assert clean(run("verify", source)).out.endswith("0 errors, 1 warning, 0 notes\n")


@pytest.mark.parametrize("kernel", ["7.1", "7.2", "7.3"])
def test_sessions_are_empty_until_the_kexec(kernel: str, tmp_path: Path) -> None:
    """The root of these kernels is always in force; sessions are written when the machine reboots."""
    arena = arena_of()
    out = kho.Outgoing(arena, kernel=kernel)
    out.add_memfd("vm-1", 0x10, b"guest memory")
    out.add_flb("pci", 0xFEED)
    inc = kho.open(arena, fdt_phys=out.fdt_phys)
    path = saved(arena, tmp_path / "early.elf", [(p, PAGE << o) for p, o in inc.folios] + inc.map_nodes)
    found = clean(run("inspect", "--json", path)).json["luo"]
    assert (found["sessions"], found["flbs"], found["liveupdate_num"]) == ([], [], 1)
    done = clean(run("verify", path))
    assert "KHO023" not in done.out
    clean(run("owners", path))
    assert len(extracted(path, "--subtree", "LUO")) == (311 if kernel == "7.1" else 32)
    assert run("extract", path, "--session", "vm-1", "--token", "0x10", "-o", tmp_path / "none").code == 2


def test_a_session_array_with_count_0_names_no_session(tmp_path: Path) -> None:
    arena = arena_of()
    out = kho.Outgoing(arena, kernel="7.0")
    out.add_luo()
    out.finalize()
    path = sparse(arena, tmp_path / "handover.elf")
    (array,) = struct.unpack("<Q", kho.open(path).subtrees["LUO"].fdt()["/luo-session"]["luo-session-header"])
    assert arena.read(array, 8) == bytes(8)
    assert clean(run("inspect", "--json", path)).json["luo"]["sessions"] == []
    sound(path)
    assert "unknown" not in clean(run("owners", path)).out
    assert len(extracted(path, "--subtree", "LUO")) == 311
