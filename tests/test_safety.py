"""Memory safety: what no call, view, process or file may do to the memory that the library works in."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import os
import random
import re
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho

from images import GIB, KIB, MIB

ROOT = Path(__file__).resolve().parents[1]
P = 4096
BASE = GIB
SPAN = 128 * MIB
"""What a bitmap of a page stands for: where all of that is memory the bitmap is read in place."""
ABIS = pytest.mark.parametrize("abi", ["kho-v1", "kho-v2", "kho-v3", "kho-v4"])


def small(size: int = 4 * MIB, **options: object) -> kho.Arena:
    return kho.Arena([(BASE, size)], **options)  # type: ignore[arg-type]


def pages_in_use(arena: kho.Arena) -> set[int]:
    """Addresses of allocated pages."""
    pages = (BASE + at for at in range(0, arena.nbytes, arena.page_size))
    return {phys for phys in pages if arena.page(phys).state in ("head", "tail")}


def all_there_is(arena: kho.Arena) -> list[kho.Folio]:
    """Allocate every page."""
    taken = []
    with contextlib.suppress(kho.OutOfMemoryError):
        while True:
            taken.append(arena.alloc())
    return taken


# The sources


def rust_sources() -> list[Path]:
    return sorted(path for crate in ("kho", "kho-python") for path in (ROOT / "rust" / crate / "src").rglob("*.rs"))


def has_unsafe(source: str) -> bool:
    code = re.sub(r"//[^\n]*", "", source)
    code = re.sub(r'"(?:\\.|[^"\\])*"', '""', code)
    return re.search(r"\bunsafe\b", code) is not None


def test_unsafe_code_is_where_the_architecture_says_and_forbidden_elsewhere() -> None:
    found = {path for path in rust_sources() if has_unsafe(path.read_text())}
    table = re.findall(r"^ *\| (`rust/[^|]*) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    listed = {ROOT / name for row in table for name in re.findall(r"`([^`]+)`", row)}
    assert found == listed
    for path in rust_sources():
        said = re.findall(r"^#!\[(\w+)\(unsafe_code\)\]$", path.read_text(), re.MULTILINE)
        # A module that forbids it forbids it to those inside.
        inside = path.parent if path.name in ("mod.rs", "lib.rs") else path.with_suffix("")
        above = any(inside in other.parents for other in found - {path})
        assert said == ["allow" if path in found else "deny" if above else "forbid"], path


def test_every_class_is_asserted_to_fit_the_alignment_of_python_objects() -> None:
    classes = 0
    for path in rust_sources():
        text = path.read_text()
        for at in re.finditer(r"^ *#\[pyclass", text, re.MULTILINE):
            following = text[at.start() :]
            name = re.search(r"(?:struct|enum) (\$?\w+)", following)
            assert name is not None
            stop = following.find("#[pyclass", 20)
            assert f"assert_object_alignment!({name[1]});" in following[: stop if stop > 0 else None], (path, name[1])
            classes += 1
    assert classes > 20


# Pages of the library's own


@ABIS
def test_pages_of_a_handover_are_not_got_freed_written_or_allocated(abi: str) -> None:
    arena = small()
    free = arena.free_pages
    out = kho.Outgoing(arena, abi)
    mine = [arena.alloc(order) for order in (0, 3, 0)]
    for folio in mine:
        out.preserve_folio(folio)
    out.add_subtree("blob", bytes(5 * KIB))

    def refused_everywhere() -> None:
        own = pages_in_use(arena) - {folio.phys + at for folio in mine for at in range(0, folio.nbytes, P)}
        assert len(own) >= 4
        before = {phys: arena.read(phys, P) for phys in own}
        for phys in own:
            for at in (phys, phys + P - 1):
                with pytest.raises(kho.OwnedPageError, match=rf"write at {phys:#x}: .* it holds .*release") as error:
                    arena.write(at, b"x")
                assert error.value.phys == phys
            with pytest.raises(kho.PageStateError):
                arena.alloc_at(phys)
            with pytest.raises(kho.PageStateError):
                arena.free(phys)
            with pytest.raises(kho.PageStateError):
                arena.folio(phys)
            if arena.page(phys).state == "head":
                with pytest.raises(kho.OwnedPageError, match=f"free at {phys:#x}"):
                    arena.free(phys)
                with pytest.raises(kho.OwnedPageError, match=f"folio at {phys:#x}"):
                    arena.folio(phys)
        # A write that only ends in such a page changes nothing, not even before it.
        first = min(own)
        around = arena.read(first - P, P) if first > BASE else b""
        if around:
            with pytest.raises(kho.OwnedPageError):
                arena.write(first - P, bytes([7]) * 2 * P)
            assert arena.read(first - P, P) == around
        taken = all_there_is(arena)
        assert own.isdisjoint(folio.phys for folio in taken)
        for folio in taken:
            memoryview(folio)[:] = b"\xff" * P
            folio.free()
        assert {phys: arena.read(phys, P) for phys in own} == before

    refused_everywhere()
    out.serialize()
    refused_everywhere()
    out.finalize()
    refused_everywhere()
    out.abort()
    refused_everywhere()
    fdt = out.finalize()
    folios = list(out.folios())
    del out
    gc.collect()
    refused_everywhere()
    inc = kho.Incoming(arena, fdt)
    assert list(inc.folios) == folios
    for phys, order in folios:
        assert inc.restore_folio(phys).order == order
    del inc
    again = kho.Outgoing(arena, abi)
    del again
    for phys, _ in folios:
        arena.free(phys)
    assert arena.free_pages == free


@ABIS
def test_bitmaps_that_are_read_in_place_are_not_the_callers_to_write(abi: str) -> None:
    arena = small(SPAN)
    out = kho.Outgoing(arena, abi)
    folio = arena.alloc()
    out.preserve_folio(folio)
    out.finalize()
    del out
    inc = kho.Incoming(arena)
    expected = list(inc.folios)
    refused = 0
    for phys in range(BASE, BASE + arena.nbytes, P):
        try:
            arena.write(phys, b"\xff" * P if phys != folio.phys else b"mine")
        except kho.OwnedPageError as error:
            assert "Incoming" in str(error)
            refused += 1
    for other in all_there_is(arena):
        memoryview(other)[:] = b"\xff" * P
    assert refused == inc.stats()["in_place_bytes"] // P == 1
    assert list(inc.folios) == expected
    del inc
    gc.collect()
    assert len(all_there_is(arena)) == 1, "the bitmap's page is free"


@ABIS
def test_a_subtree_cannot_be_freed_while_it_is_linked(abi: str) -> None:
    arena = small()
    out = kho.Outgoing(arena, abi)
    folio = arena.alloc(1)
    out.link_subtree("mine", folio.phys + 100, P)
    with pytest.raises(kho.PageStateError, match="linked as a subtree"):
        folio.free()
    memoryview(folio)[:5] = b"still"
    out.remove_subtree("mine")
    assert folio.free()


def test_the_map_cannot_be_preserved_because_it_is_freed_when_written_again() -> None:
    arena = small()
    out = kho.Outgoing(arena, "kho-v1")
    before = pages_in_use(arena)
    out.serialize()
    for head in pages_in_use(arena) - before:
        with pytest.raises(kho.OwnedPageError, match="chunk"):
            out.preserve_folio(head, 0)
        with pytest.raises(kho.OwnedPageError, match="chunk"):
            out.preserve_many(array("Q", [head]))


# Handles


def uses(arena: kho.Arena, folio: kho.Folio, out: kho.Outgoing) -> Iterator[Callable[[], object]]:
    yield folio.free
    yield folio.get
    yield lambda: arena.free(folio)
    yield lambda: memoryview(folio)
    yield lambda: bytes(folio)
    yield lambda: np.frombuffer(folio, dtype="u1")  # type: ignore[call-overload]
    yield lambda: out.preserve_folio(folio)
    yield lambda: out.preserve_pages(folio, 1)
    yield lambda: out.preserve_run(folio, 0, 1)
    yield lambda: out.unpreserve_folio(folio)


@pytest.mark.parametrize("order", [0, 1, 4])
@pytest.mark.parametrize("next_order", [None, 0, 1, 4, 5])
def test_a_folio_is_dead_after_it_is_freed_whatever_its_pages_become(order: int, next_order: int | None) -> None:
    arena = small()
    out = kho.Outgoing(arena)
    place = BASE + 2 * MIB
    folio = arena.alloc_at(place, order)
    twin = arena.folio(place)
    assert folio.free()
    other = None if next_order is None else arena.alloc_at(place, next_order)
    if other is not None:
        memoryview(other)[:] = b"\x5a" * other.nbytes
    for dead in (folio, twin):
        for use in uses(arena, dead, out):
            with pytest.raises(kho.FreedFolioError, match=f"{place:#x}"):
                use()
        assert dead.refcount == 0
    if other is not None:
        assert bytes(other) == b"\x5a" * other.nbytes
        assert other.free()


def test_a_folio_of_another_arena_frees_and_preserves_nothing_here() -> None:
    one, other = small(), small()
    theirs, mine = other.alloc(), one.alloc()
    assert theirs.phys == mine.phys
    out = kho.Outgoing(one)
    with pytest.raises(kho.ParameterError, match="another arena"):
        one.free(theirs)
    with pytest.raises(kho.ParameterError, match="another arena"):
        out.preserve_folio(theirs)
    assert mine.refcount == 1


def test_references_keep_a_folio_alive_for_every_handle() -> None:
    arena = small()
    folio = arena.alloc()
    twin = arena.folio(folio.phys)
    twin.get()
    assert not folio.free()
    assert bytes(twin) == bytes(folio)
    assert twin.free()
    with pytest.raises(kho.FreedFolioError):
        folio.free()


def test_restored_pages_are_dead_once_one_of_them_is_freed() -> None:
    arena = small()
    out = kho.Outgoing(arena)
    block = arena.alloc(3)
    out.preserve_pages(block, 8)
    out.finalize()
    inc = kho.Incoming(arena)
    pages = inc.restore_pages(block.phys, 8)
    with pytest.raises(kho.StaleError):
        block.free()
    arena.free(block.phys + 3 * P)
    arena.alloc_at(block.phys + 3 * P)
    for use in (memoryview, bytes):
        with pytest.raises(kho.FreedFolioError):
            use(pages)


@given(
    st.lists(
        st.tuples(st.sampled_from(["alloc", "free", "twin", "view", "end", "use"]), st.integers(0, 99)), max_size=60
    )
)
def test_handles_and_views_agree_with_a_model(steps: list[tuple[str, int]]) -> None:
    arena = small(64 * P)
    handles: list[tuple[kho.Folio, int]] = []  # and which allocation it is of
    alive: dict[int, set[int]] = {}  # allocation: its pages
    views: list[tuple[memoryview, set[int]]] = []
    count = 0
    for step, pick in steps:
        if step == "alloc":
            try:
                folio = arena.alloc(pick % 3)
            except kho.OutOfMemoryError:
                continue
            pages = {folio.pfn + n for n in range(folio.nr_pages)}
            assert all(pages.isdisjoint(held) for held in alive.values())
            assert all(pages.isdisjoint(seen) for _, seen in views), "a page with a view was given out"
            count += 1
            alive[count] = pages
            handles.append((folio, count))
        elif step == "end" and views:
            views.pop(pick % len(views))[0].release()
        elif handles:
            folio, made = handles[pick % len(handles)]
            dead = made not in alive
            expectation = pytest.raises(kho.FreedFolioError) if dead else contextlib.nullcontext()
            with expectation:
                if step == "free":
                    assert folio.free()
                    del alive[made]
                elif step == "view":
                    views.append((memoryview(folio), alive.get(made, set())))
                elif step == "twin" and not dead:
                    handles.append((arena.folio(folio.phys), made))
                else:
                    assert len(bytes(folio)) == folio.nbytes
    while views:
        views.pop()[0].release()
    for _, made in handles:
        if made in alive:
            handle = next(folio for folio, other in handles if other == made)
            handle.free()
            del alive[made]
    assert (arena.free_pages, arena.allocated_pages) == (64, 0)


# Views


def test_the_pages_of_a_view_are_given_to_nobody_until_it_ends() -> None:
    arena = small(16 * P)
    folio = arena.alloc(2)
    view, array = memoryview(folio), np.asarray(folio)
    folio.free()
    assert arena.page(folio.phys).state == "free"
    assert len(all_there_is(arena)) == 12
    view[:5] = b"still"
    assert bytes(array[:5]) == b"still"
    with pytest.raises(kho.FreedFolioError):
        memoryview(folio)
    view.release()
    with pytest.raises(kho.OutOfMemoryError):
        arena.alloc()
    del array
    gc.collect()
    assert {f.phys for f in all_there_is(arena)} == {folio.phys + n * P for n in range(4)}


@ABIS
def test_a_view_from_before_a_take_over_reaches_nothing_that_is_used_after_it(abi: str) -> None:
    arena = small(256 * P)
    lost = [arena.alloc(2) for _ in range(8)]
    views = [memoryview(folio) for folio in lost]
    out = kho.Outgoing(arena, abi)
    kept = arena.alloc()
    out.preserve_folio(kept)
    out.finalize()
    inc = kho.Incoming(arena)
    seen = {folio.phys + n * P for folio in lost for n in range(4)}
    out = kho.Outgoing(arena, abi)
    out.preserve_folio(inc.restore_folio(kept.phys))
    taken = all_there_is(arena)
    assert seen.isdisjoint(pages_in_use(arena))
    for view in views:
        view[:] = b"\xff" * len(view)
    assert dict(out.folios())[kept.phys] == 0
    assert len(out.folios()) == 2
    assert list(inc.folios)
    del views, view
    gc.collect()
    assert seen <= {folio.phys for folio in all_there_is(arena)}
    assert taken


# Maps that others write


class Shared:
    """An arena in a memory file, and its physical memory through another descriptor, as another process has it."""

    def __init__(self) -> None:
        self.arena = small(SPAN, backing="memfd")
        self.file = os.dup(self.arena.fileno())
        head = os.pread(self.file, 4096, 0)
        (table, count) = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<H", head, 56)[0]
        loads = [struct.unpack_from("<IIQQQQQQ", head, table + 56 * n) for n in range(count)]
        self.offset = next(load[2] for load in loads if load[0] == 1)

    def write(self, phys: int, data: bytes) -> None:
        os.pwrite(self.file, data, self.offset + phys - BASE)

    def __del__(self) -> None:
        os.close(self.file)


def bitmap_page(shared: Shared, abi: str) -> int:
    """The page of order 0's bitmap, which has the bit of its own page clear, of a handover of one folio."""
    out = kho.Outgoing(shared.arena, abi)
    folio = shared.arena.alloc()
    out.preserve_folio(folio)
    out.finalize()
    pages = {phys for phys in pages_in_use(shared.arena) if phys != folio.phys}
    bits = {(phys - BASE) // P for phys, _ in out.folios()}
    at = BASE // P % (8 * P)
    found = []
    for phys in pages:
        content = np.unpackbits(np.frombuffer(shared.arena.read(phys, P), dtype="u1"), bitorder="little")
        if {int(bit) - at for bit in np.flatnonzero(content)} == bits:
            found.append(phys)
    (page,) = found
    return page


@ABIS
@pytest.mark.parametrize("how", ["one", "many", "pages", "large"])
def test_a_bitmap_in_use_is_not_restored_even_if_another_process_marks_it(abi: str, how: str) -> None:
    shared = Shared()
    page = bitmap_page(shared, abi)
    inc = kho.Incoming(shared.arena)
    assert len(inc.folios) == 2
    assert inc.stats()["in_place_bytes"] == P
    shared.write(page, b"\xff" * P)  # every page of the arena
    arena, used = shared.arena, arena_use(shared.arena)
    with pytest.raises((kho.OwnedPageError, kho.NotRestorableError), match=f"{page:#x}"):
        if how == "one":
            inc.restore_folio(page)
        elif how == "many":
            inc.restore_many(array("Q", [page + P, page]))
        elif how == "pages":
            inc.restore_pages(page, 1)
        else:
            inc.restore_many(array("Q", [page, page - P]))
    assert (inc.nr_restored, arena_use(arena)) == (0, used)
    for restored in (phys for phys in range(BASE, BASE + arena.nbytes, P) if phys != page):
        with contextlib.suppress(kho.NotRestorableError, kho.OwnedPageError):
            memoryview(inc.restore_folio(restored))[:] = b"\xaa" * P
    assert arena.read(page, P) == b"\xff" * P


def arena_use(arena: kho.Arena) -> int:
    return arena.allocated_pages


@ABIS
def test_a_map_that_preserves_its_own_bitmaps_is_copied_and_they_are_restored(abi: str) -> None:
    shared = Shared()
    page = bitmap_page(shared, abi)
    bit = page // P % (8 * P)
    content = bytearray(shared.arena.read(page, P))
    content[bit // 8] |= 1 << bit % 8
    shared.write(page, bytes(content))
    inc = kho.Incoming(shared.arena)
    expected = list(inc.folios)
    assert (page, 0) in expected
    memoryview(inc.restore_folio(page))[:] = b"\xff" * P
    assert list(inc.folios) == expected


def test_bitmaps_under_a_view_are_copied_when_they_are_taken_over() -> None:
    """A handover written by hand, in folios that the caller still has views of."""
    real = small(SPAN)
    out = kho.Outgoing(real, "kho-v1")
    out.preserve_folio(real.alloc())
    fdt = out.finalize()
    expected = list(out.folios())
    arena = small(SPAN)
    views = {}
    for phys in sorted(pages_in_use(real)):
        views[phys] = memoryview(arena.alloc_at(phys))
        views[phys][:] = real.read(phys, P)
    inc = kho.Incoming(arena, fdt)
    assert list(inc.folios) == expected
    for view in views.values():
        view[:] = b"\xff" * P
    assert list(inc.folios) == expected
    assert inc.stats()["in_place_bytes"] == 0
    real.write(BASE + SPAN - P, b"x")
    assert kho.Incoming(real).stats()["in_place_bytes"] == P, "without views they are not"


def test_a_handover_that_was_not_taken_over_is_not_allocated_over(tmp_path: Path) -> None:
    shared = Shared()
    out = kho.Outgoing(shared.arena)
    folio = shared.arena.alloc()
    memoryview(folio)[:4] = b"keep"
    out.preserve_folio(folio)
    fdt = out.finalize()
    other = kho.Arena.open(shared.file)
    for use in (other.alloc, lambda: other.alloc_at(folio.phys), lambda: kho.Outgoing(other)):
        with pytest.raises(kho.PageStateError, match=rf"{fdt:#x}.*Incoming"):
            use()
    inc = kho.Incoming(other)
    assert bytes(inc.restore_folio(folio.phys))[:4] == b"keep"
    assert other.alloc().refcount == 1


# Threads


def test_threads_that_allocate_free_and_preserve_leave_no_preserved_page_free() -> None:
    arena = small(512 * P)
    out = kho.Outgoing(arena, "kho-v4")
    shared: list[kho.Folio] = []
    lock = threading.Lock()
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(1500):
                kind = rng.randrange(4)
                with contextlib.suppress(kho.PageStateError, kho.OutOfMemoryError):
                    if kind == 0:
                        folio = arena.alloc(rng.randrange(3))
                        with lock:
                            shared.append(folio)
                    elif shared:
                        with lock:
                            folio = rng.choice(shared)
                        if kind == 1:
                            folio.free()
                        elif kind == 2:
                            out.preserve_many(array("Q", [folio.phys] * 64), order=folio.order)
                        else:
                            memoryview(folio)[:1] = b"x"
        except BaseException as error:  # noqa: BLE001
            wrong.append(error)
        finally:
            stop.set()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for phys, order in out.folios():
        for at in range(phys, phys + (P << order), P):
            assert arena.page(at).state in ("head", "tail"), hex(at)


# Files


def unsealed(seals: int | None) -> int:
    """A memory file with an arena's content, with these seals."""
    fd = os.memfd_create("copy", os.MFD_ALLOW_SEALING if seals is not None else 0)
    arena = small(backing="memfd")
    os.ftruncate(fd, os.fstat(arena.fileno()).st_size)
    os.pwrite(fd, os.pread(arena.fileno(), 4096, 0), 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize("seals", [None, 0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_a_memory_file_that_can_be_cut_is_refused(seals: int | None) -> None:
    fd = unsealed(seals)
    try:
        for source in (fd, f"/proc/self/fd/{fd}"):
            with pytest.raises(kho.SourceError, match="F_SEAL_SHRINK.*F_ADD_SEALS"):
                kho.Arena.open(source)
    finally:
        os.close(fd)


def test_a_memory_file_that_cannot_be_cut_is_opened() -> None:
    fd = unsealed(fcntl.F_SEAL_SHRINK)
    try:
        assert kho.Arena.open(fd).nbytes == 4 * MIB
    finally:
        os.close(fd)


CUT = """
import gc, os, sys
import numpy as np
import kho

path, size, fdt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
finalized = fdt != 0
arena = kho.Arena.open(os.open(path, os.O_RDWR) if sys.argv[4] == "fd" else path)
inc = None
if finalized and sys.argv[5] == "after":
    inc = kho.Incoming(arena)
    inc.restore_many(np.array([phys for phys, _ in inc.folios if phys != fdt], dtype="u8"))
out = None if finalized and inc is None else kho.Outgoing(arena)
folio = None if out is None else arena.alloc()
if out is not None:
    out.preserve_folio(folio)
os.truncate(path, size)
refused = []
def attempt(name, use):
    try:
        use()
    except kho.KhoError as error:
        refused.append(name)
attempt("read", lambda: arena.read(arena.regions[0][0], 4096))
attempt("write", lambda: arena.write(arena.regions[0][0] + 4096 * 40, b"x"))
attempt("open", lambda: kho.open(arena))
attempt("take over", lambda: kho.Incoming(arena))
attempt("hand over", lambda: kho.Outgoing(arena))
attempt("alloc and view", lambda: memoryview(arena.alloc())[:1])
if out is not None:
    attempt("bytes", lambda: bytes(folio))
    attempt("view", lambda: memoryview(folio)[:1])
    attempt("preserve", lambda: out.preserve_pages(folio, 1))
    attempt("unpreserve", lambda: out.unpreserve_folio(folio))
    attempt("tracker", out.tracker)
    attempt("folios", out.folios)
    attempt("serialize", out.serialize)
    attempt("finalize", out.finalize)
if inc is not None:
    len(inc.folios), inc.tracker(), inc.unrestored(), inc.stats()
del out, inc
gc.collect()
attempt("hand over again", lambda: kho.Outgoing(arena))
print(*refused, sep=", ")
"""


@pytest.mark.parametrize("left", [0, 4096, 2 * MIB])
@pytest.mark.parametrize("how", ["path", "fd"])
@pytest.mark.parametrize("when", ["empty", "before", "after"])
def test_a_file_that_is_cut_while_it_is_open_is_an_error_and_no_signal(
    left: int, how: str, when: str, tmp_path: Path
) -> None:
    path = tmp_path / "arena.elf"
    arena = small(backing=path)
    fdt = 0
    if when != "empty":
        out = kho.Outgoing(arena)
        for _ in range(5):
            out.preserve_folio(arena.alloc())
        fdt = out.finalize()
        del out
    del arena
    done = subprocess.run(
        [sys.executable, "-c", CUT, path, str(left), str(fdt), how, when], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    refused = done.stdout.strip().split(", ")
    assert {"read", "write", "open", "take over", "hand over", "hand over again"} <= set(refused)
    if when != "before":
        assert {"bytes", "view", "preserve", "unpreserve", "tracker", "folios", "serialize", "finalize"} <= set(refused)
    assert path.stat().st_size == left, "nothing made it longer again"


# Sizes


@pytest.mark.parametrize(
    "regions",
    [
        [(0, 2**63), (2**63, 2**63)],
        [(0, 2**63), (2**63, 2**63 - P)],
        [(0, 2**62), (2**62, 2**62), (2**63, 2**62), (2**63 + 2**62, 2**62)],
        [(0, 2**63)],
        [(2**63, 2**63)],
        [(P, 2**64 - P)],
        [(0, 2**63 - P)],
        [(n << 40, 2**40) for n in range(2**16 - 2**15)],
    ],
)
@pytest.mark.parametrize("backing", [None, "memfd"])
def test_regions_that_are_too_large_together_are_refused(regions: list[tuple[int, int]], backing: str | None) -> None:
    with pytest.raises(kho.KhoError):
        kho.Arena(regions, backing=backing)
    if sum(size for _, size in regions) > 2**63:
        with pytest.raises(kho.OutOfRangeError, match="size of all regions"):
            kho.Arena(regions, backing=backing)


@given(st.lists(st.tuples(st.integers(0, 2**52), st.integers(0, 2**52)), min_size=1, max_size=5))
def test_an_arena_has_exactly_the_regions_it_was_given_or_none(pages: list[tuple[int, int]]) -> None:
    regions = [(start * P % 2**64, size * P) for start, size in pages]
    try:
        arena = kho.Arena(regions)
    except kho.KhoError:
        return
    assert arena.nbytes == sum(size for _, size in regions)
    for (start, size), _ in itertools.product(regions, range(1)):
        with pytest.raises(kho.OutsideMemoryError):
            arena.read(start, size + 2**63)
