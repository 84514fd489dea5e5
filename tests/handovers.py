"""A complete handover as Linux writes it, made with kho's writers: the reference for readers, writers and verify."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import kho
from kho.formats import KhoTest

MIB = 1 << 20


@dataclass
class File:
    """The expected content of a memfd."""

    contents: bytes
    pos: int
    seals: int
    orders: set[int]


@dataclass
class Expected:
    """The expected content of the handover."""

    liveupdate_num: int = 1
    sessions: dict[str, dict[int, File]] = field(default_factory=dict)
    flbs: list[tuple[str, int, int]] = field(default_factory=list)
    reserve_mem: dict[str, tuple[int, int, bytes]] = field(default_factory=dict)
    """Name -> start, size and contents."""
    metadata: tuple[str, int] = ("", 0)
    test_folios: list[tuple[int, int]] = field(default_factory=list)
    csum: int = 0
    folios: list[tuple[int, int]] = field(default_factory=list)
    """All preserved folios."""


def complete(
    abi: str = "kho-v4", *, page_size: int = 4096, flbs: bool = True
) -> tuple[kho.Arena, kho.Outgoing, Expected]:
    """Two sessions with memfds of 0 bytes, 5000 bytes, 6 MiB and one of huge folios; reserve_mem; metadata; kho_test.

    The handover is finalized. A huge folio has order 9, or the largest order that fits with large pages.
    """
    random = Random(f"{abi} {page_size}")
    huge = {4096: 9, 16384: 7, 65536: 5}[page_size]
    # Scratch areas are whole pageblocks, of 512 MiB at 64 KiB pages.
    arena = kho.Arena((4096 if page_size == 65536 else 256) * MIB, page_size=page_size, scratch="16M,32M,16M")
    out = kho.Outgoing(arena, abi)
    expected = Expected(liveupdate_num=3, metadata=("7.3.4-test", 2))
    out.set_kexec_metadata(*expected.metadata)

    def add(session: str, token: int, contents: bytes, order: int = 0, pos: int = 0, seals: int = 0) -> None:
        seals = seals if abi == "kho-v4" else 0
        out.add_memfd(session, token, contents, pos=pos, seals=seals, order=order)
        orders = {order} if contents else set()
        expected.sessions.setdefault(session, {})[token] = File(contents, pos, seals, orders)

    out.add_luo(liveupdate_num=expected.liveupdate_num)
    add("vm-1", 0x10, random.randbytes(6 * MIB), pos=4096, seals=0x6)
    add("vm-1", 0x11, b"")
    add("vm-1", 0x12, random.randbytes(2 * (page_size << huge) - 1000), order=huge)
    add("cache", 7, random.randbytes(5000), pos=5000)
    shared = arena.alloc()
    out.preserve_folio(shared)
    if flbs:
        expected.flbs = [("liveupdate-test-flb-v0", 0xFEEDF00DCAFEBEE0, 4), ("pci", shared.phys, 1)]
    for flb in expected.flbs:
        out.add_flb(*flb)

    for name, pages in (("keepme", 19), ("trace", 1)):
        start, size = out.add_reserve_mem(name, pages * page_size)
        contents = random.randbytes(size)
        arena.write(start, contents)
        expected.reserve_mem[name] = (start, size, contents)

    for order in (0, 3, 1, 0, 2):
        folio = arena.alloc(order)
        memoryview(folio)[:] = random.randbytes(folio.nbytes)
        expected.test_folios.append((folio.phys, order))
    expected.csum = out.add_kho_test([arena.folio(phys) for phys, _ in expected.test_folios])

    out.finalize()
    expected.folios = [(folio.phys, folio.order) for folio in out.folios()]
    return arena, out, expected


def check(inc: kho.Incoming, expected: Expected, *, seals: bool = True, folios: bool = True) -> None:
    """Compare every part of a handover that was read with the expected content.

    Without `seals` files have none; without `folios` LUO's lists may be elsewhere.
    """
    assert not folios or [tuple(folio) for folio in inc.folios] == expected.folios
    luo = inc.luo
    assert luo.liveupdate_num == expected.liveupdate_num
    assert list(luo.sessions) == list(expected.sessions)
    for name, files in expected.sessions.items():
        session = luo.sessions[name]
        assert (session.count, list(session.files)) == (len(files), list(files))
        for token, file in files.items():
            found = session.files[token]
            assert (found.size, found.pos, found.seals) == (len(file.contents), file.pos, file.seals * seals)
            assert found.read() == file.contents
            assert {folio.order for folio in found.folios} == file.orders
            assert all(folio.flags == 3 for folio in found.folios)
    assert [(flb.name, flb.data, flb.count) for flb in luo.flbs] == expected.flbs
    assert set(inc.reserve_mem) == set(expected.reserve_mem)
    for name, (start, size, contents) in expected.reserve_mem.items():
        region = inc.reserve_mem[name]
        assert (region.start, region.size, region.read()) == (start, size, contents)
    if "kexec-metadata" in inc.payloads:
        assert (inc.metadata.previous_release, inc.metadata.kexec_count) == expected.metadata
    test = inc.payloads["kho_test"]
    assert isinstance(test, KhoTest)
    assert test.folios == expected.test_folios
    assert test.csum == expected.csum
    assert test.holds()
