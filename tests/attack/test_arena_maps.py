"""No map, and no bits that another process flips in it, give the caller memory that the library uses."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time

import kho

PAGE = 4096
BASE = 1 << 30
SIZES = {512: 16 << 20, 4096: 128 << 20}
"""Memory that a bitmap of that size covers: for a smaller arena bitmaps are copied, not used in place."""


class Shared:
    """An arena in a memory file, and a second mapping of its memory, as another process has it."""

    def __init__(self, size: int) -> None:
        self.arena = kho.Arena([(BASE, size)], backing="memfd")
        self.every_page = range(BASE, BASE + size, PAGE)
        head = os.pread(self.arena.fileno(), PAGE, 0)
        table, count = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<H", head, 56)[0]
        loads = (struct.unpack_from("<IIQQQQQQ", head, table + 56 * n) for n in range(count))
        self.offset = next(load[2] for load in loads if load[0] == 1)

    def write(self, phys: int, data: bytes) -> None:
        os.pwrite(self.arena.fileno(), data, self.offset + phys - BASE)


def mutate(rng: random.Random, shared: Shared, pages: list[int]) -> None:
    """Write a few words with a meaning in maps to random words of the map."""
    for _ in range(rng.randrange(1, 6)):
        page = rng.choice(pages)
        somewhere = rng.choice(shared.every_page)
        word = rng.choice([0, 2**64 - 1, somewhere, rng.choice(pages), 1 << rng.randrange(64), rng.getrandbits(64)])
        at = rng.choice([0, 8, 16, 24, 8 * rng.randrange(PAGE // 8), somewhere // PAGE % (8 * PAGE) // 64 * 8])
        shared.write(page + at, struct.pack("<Q", word))


def trial(rng: random.Random) -> None:
    abi, bitmap = rng.choice([("kho-v1", 512)] * 6 + [("kho-v1", 4096), ("kho-v2", 4096), ("kho-v4", 4096)])
    shared = Shared(SIZES[bitmap])
    arena, every_page = shared.arena, shared.every_page
    out = kho.Outgoing(arena, abi, bitmap_bytes=bitmap if abi == "kho-v1" else None)
    mine = [arena.alloc(rng.randrange(3)) for _ in range(rng.randrange(1, 6))]
    for folio in mine:
        out.preserve_folio(folio)
    fdt = out.finalize()
    pages = [phys for phys in every_page[:64] if arena.page(phys).state == "head"]
    if rng.random() < 0.5:
        del out
    views = [memoryview(folio) for folio in mine[::2]]
    for _ in range(rng.randrange(3)):
        mutate(rng, shared, pages)
    try:
        inc = kho.Incoming(arena, fdt)
    except kho.KhoError:
        return
    if rng.random() < 0.7:
        for _ in range(rng.randrange(8)):
            mutate(rng, shared, pages)
    # Allocate and restore everything possible, and overwrite it.
    for phys in every_page:
        with contextlib.suppress(kho.KhoError):
            views.append(memoryview(inc.restore_folio(phys)))
    listed = None
    if rng.random() < 0.5:
        listed = list(inc.folios)
    given: list[kho.Folio] = []
    with contextlib.suppress(kho.OutOfMemoryError):
        while len(given) < 96:
            given.append(arena.alloc())
    for folio in given:
        memoryview(folio)[:] = b"\xff" * PAGE
    for phys in every_page:
        with contextlib.suppress(kho.KhoError):
            arena.write(phys, b"\xee" * PAGE)
    for view in views:
        view[:] = b"\xdd" * len(view)
    if listed is not None:
        assert list(inc.folios) == listed, "a write of the caller changed the list of preserved folios"
    # The next handover contains exactly what is put into it, whatever is written.
    kept = given[: len(given) // 2]
    for folio in given[len(given) // 2 :]:
        folio.free()
    try:
        after = kho.Outgoing(arena, abi)
        for folio in kept:
            after.preserve_folio(folio)
    except kho.OutOfMemoryError:
        return
    expected = sorted([(folio.phys, 0) for folio in kept] + [(after.fdt_phys, 0)])
    for phys in every_page:
        with contextlib.suppress(kho.KhoError):
            arena.write(phys, b"\xcc" * PAGE)
    for view in views:
        view[:] = b"\xbb" * len(view)
    assert sorted(after.folios()) == expected
    after.finalize()
    assert sorted(kho.open(arena).folios) == expected


def test_no_map_gives_the_caller_pages_of_the_library(attack_seconds: float, attack_seed: int) -> None:
    end = time.monotonic() + attack_seconds
    n = 0
    while n < 5 or time.monotonic() < end:
        try:
            trial(random.Random(f"{attack_seed}/{n}"))
        except BaseException as error:
            error.add_note(f"ATTACK_SEED={attack_seed}, input {n}")
            raise
        n += 1
