"""The Python half of the table: bulk calls on W1, single calls on a part of it, FDTs, and the floor of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

import kho
from kho import fdt

try:
    from pyroaring import BitMap
except ImportError:
    BitMap = None  # type: ignore[assignment,misc]
try:
    from bitarray import bitarray
except ImportError:
    bitarray = None
try:
    import fdt as pyfdt  # type: ignore[import-untyped]
except ImportError:
    pyfdt = None
try:
    import libfdt  # type: ignore[import-untyped]
except ImportError:
    libfdt = None

WORKLOAD = "Python W1"
SINGLE = 1_000_000
"""Folios of a row with a Python call each."""

Work = Callable[[], object]
PATIENCE = 4.0
"""Seconds after which a cell gets no further sample."""


def shuffled(number: Any, bits: int) -> Any:
    """The permutation that makes the Rust half's W1 (benches/src/workload.rs), of a whole array at once."""
    mask = np.uint64((1 << bits) - 1)
    x = number & mask
    for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x * np.uint64(odd)) & mask
        x ^= x >> np.uint64((bits + 1) // 2)
    return x


def span(folios: int) -> int:
    """Pages of W1's address space: 2^28 for 10,000,000."""
    return 1 << (max((1 << 28) * folios // 10_000_000, 1) - 1).bit_length()


def one_by_one(call: Callable[[int], object], numbers: Iterable[int]) -> None:
    """What a caller's loop does: one Python call a folio."""
    for number in numbers:
        call(number)


def packed(pages: Any, size: int) -> Any:
    """A bitmap of the whole span: numpy's best. It knows no orders and no sparseness."""
    bitmap = np.zeros(size // 8, np.uint8)
    np.bitwise_or.at(bitmap, pages >> 3, np.left_shift(1, pages & 7).astype(np.uint8))
    return bitmap


def samples(row: dict[str, Work], units: int, rounds: int) -> dict[str, list[float]]:
    """Nanoseconds a unit of each round, of all peers in turns; what a round made is dropped outside of it.

    One round more, the first, in which memory is touched and caches fill, counts only if it leaves no time for another.
    """
    times: dict[str, list[int]] = {peer: [] for peer in row}
    for _ in range(rounds + 1):
        for peer, work in row.items():
            if sum(times[peer]) > PATIENCE * 1e9:
                continue
            start = time.perf_counter_ns()
            made = work()
            times[peer].append(time.perf_counter_ns() - start)
            del made
    return {peer: [spent / units for spent in spent[1:] or spent] for peer, spent in times.items()}


def bulk(folios: int) -> Iterator[tuple[str, dict[str, Work]]]:
    """Calls for all of W1 at once."""
    size = span(folios)
    pfns = shuffled(np.arange(folios, dtype=np.uint64), size.bit_length() - 1)
    in_order = np.sort(pfns)
    signed, narrow, narrow_in_order = pfns.astype(np.int64), pfns.astype(np.uint32), in_order.astype(np.uint32)
    row: dict[str, Work] = {"kho": lambda: kho.Tracker().preserve_many(pfns), "numpy": lambda: packed(signed, size)}
    numbers: list[int] = pfns.tolist()
    row["set"] = lambda: set(numbers)
    if BitMap is not None:
        row["pyroaring"] = lambda: BitMap(narrow)
    if bitarray is not None:
        row["bitarray"] = lambda: bitarray(size).__setitem__(numbers, 1)
    yield "preserve in bulk, unsorted", row
    row = {"kho": lambda: kho.Tracker().preserve_many(in_order)}
    if BitMap is not None:
        row["pyroaring"] = lambda: BitMap(narrow_in_order)
    yield "preserve in bulk, sorted", row

    tracker = kho.Tracker()
    tracker.preserve_many(pfns)
    assert len(tracker) == folios
    bitmap = packed(signed, size)
    roaring = BitMap(narrow_in_order) if BitMap is not None else None
    listing: dict[str, Work] = {"numpy": lambda: np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))}
    if roaring is not None:
        listing["pyroaring"] = roaring.to_array
    if bitarray is not None:
        bits = bitarray(endian="little")
        bits.frombytes(bitmap.tobytes())
        listing["bitarray"] = lambda: list(bits.search(1))
    if hasattr(tracker, "pfns"):
        yield "pfns()", {"kho": lambda: tracker.pfns(0), **listing}
    yield "folios()", {"kho": tracker.folios, **listing}
    row = {}
    if hasattr(tracker, "contains_many"):
        row["kho"] = lambda: tracker.contains_many(pfns)
    row["numpy"] = lambda: bitmap[signed >> 3] >> (signed & 7).astype(np.uint8) & 1
    yield "contains in bulk", row
    if hasattr(tracker, "unpreserve_many"):

        def there_and_back() -> None:
            tracker.unpreserve_many(pfns)
            tracker.preserve_many(pfns)

        yield "unpreserve in bulk, and preserve again", {"kho": there_and_back}
    other = tracker.copy()
    row = {"kho": lambda: tracker | other, "numpy": lambda: bitmap | bitmap}
    if roaring is not None:
        twin = BitMap(roaring)
        row["pyroaring"] = lambda: roaring | twin
    yield "union", row


def single(folios: int) -> Iterator[tuple[str, dict[str, Work]]]:
    """A call a folio, and iterating in Python."""
    pages: list[int] = shuffled(np.arange(folios, dtype=np.uint64), 28).tolist()
    row: dict[str, Work] = {"kho": lambda: one_by_one(kho.Tracker().preserve, pages)}
    row["set"] = lambda: one_by_one(set[int]().add, pages)
    row["a call that does nothing"] = lambda: one_by_one(id, pages)
    tracker, plain = kho.Tracker(), set(pages)
    one_by_one(tracker.preserve, pages)
    iterating: dict[str, Work] = {"kho": lambda: sum(1 for _ in tracker), "set": lambda: sum(1 for _ in plain)}
    if BitMap is not None:
        row["pyroaring"] = lambda: one_by_one(BitMap().add, pages)
        roaring = BitMap(pages)
        iterating["pyroaring"] = lambda: sum(1 for _ in roaring)
    if bitarray is not None:
        bits = bitarray(1 << 28)
        row["bitarray"] = lambda: one_by_one(lambda page: bits.__setitem__(page, 1), pages)
    yield "preserve, one call each", row
    yield "iterate in Python", iterating


def write_kho(nodes: int) -> bytes:
    """A root with so many nodes of two properties."""
    w = fdt.Writer(256 * nodes + 4096)
    with w.node():
        w.property_str("compatible", "kho-v4")
        for n in range(nodes):
            with w.node(f"node-{n}"):
                w.property_u64("preserved-data", n << 12)
                w.property_u64("blob-size", n)
    return w.finish()


def write_libfdt(nodes: int) -> bytes:
    """The same by pylibfdt's sequential writer."""
    w = libfdt.FdtSw()
    w.finish_reservemap()
    with w.add_node(""):
        w.property_string("compatible", "kho-v4")
        for n in range(nodes):
            with w.add_node(f"node-{n}"):
                w.property("preserved-data", (n << 12).to_bytes(8, "little"))
                w.property("blob-size", n.to_bytes(8, "little"))
    return bytes(w.as_fdt().as_bytearray())


def write_fdt(nodes: int) -> bytes:
    """The same by the package fdt, which has 32-bit cells."""
    tree = pyfdt.FDT()
    tree.header.version = 17
    tree.root.append(pyfdt.PropStrings("compatible", "kho-v4"))
    for n in range(nodes):
        node = pyfdt.Node(f"node-{n}")
        node.append(pyfdt.PropWords("preserved-data", n << 12 & 0xFFFFFFFF, 0))
        node.append(pyfdt.PropWords("blob-size", n, 0))
        tree.root.append(node)
    return bytes(tree.to_dtb())


def walk_kho(blob: bytes) -> int:
    """Every property of every node."""
    return sum(len(node.properties) for node in fdt.Fdt(blob).walk())


def walk_libfdt(blob: bytes) -> int:
    """The same; libfdt looks for each by offset."""
    tree, count, at, depth = libfdt.FdtRo(blob), 0, 0, 0
    while at >= 0:
        prop = tree.first_property_offset(at, libfdt.QUIET_NOTFOUND)
        while prop >= 0:
            tree.get_property_by_offset(prop)
            count += 1
            prop = tree.next_property_offset(prop, libfdt.QUIET_NOTFOUND)
        at, depth = tree.next_node(at, depth, libfdt.QUIET_NOTFOUND)
        if depth < 0:
            break
    return count


def walk_fdt(blob: bytes) -> int:
    """The same; the whole tree becomes objects first."""
    return sum(len(props) for _, _, props in pyfdt.parse_dtb(blob).walk())


def trees(nodes: int) -> Iterator[tuple[str, dict[str, Work]]]:
    """FDTs: writing and walking."""
    blob = write_kho(nodes)
    building: dict[str, Work] = {"kho": lambda: write_kho(nodes)}
    walking: dict[str, Work] = {"kho": lambda: walk_kho(blob)}
    counted = {"kho": walk_kho(blob)}
    if libfdt is not None:
        building["pylibfdt"] = lambda: write_libfdt(nodes)
        walking["pylibfdt"] = lambda: walk_libfdt(blob)
        counted["pylibfdt"] = walk_libfdt(blob)
    if pyfdt is not None:
        building["fdt"] = lambda: write_fdt(nodes)
        walking["fdt"] = lambda: walk_fdt(blob)
        counted["fdt"] = walk_fdt(blob)
    assert set(counted.values()) == {2 * nodes + 1}, counted
    yield f"build an FDT of {nodes:,} nodes", building
    yield f"walk an FDT of {nodes:,} nodes", walking


def cells(folios: int, rounds: int) -> list[dict[str, Any]]:
    """The cells of the table, as the Rust half writes them."""
    found: list[dict[str, Any]] = []

    def add(workload: str, unit: str, units: int, rows: Iterator[tuple[str, dict[str, Work]]], times: int) -> None:
        for operation, row in rows:
            for peer, taken in samples(row, units, times).items():
                cell = {"workload": workload, "operation": operation, "unit": unit, "peer": peer, "bytes": None}
                found.append({**cell, "samples": taken})

    add(WORKLOAD, "folio", folios, bulk(folios), rounds)
    part = min(SINGLE, folios)
    add(f"Python, {part:,} of W1", "folio", part, single(part), rounds)
    for nodes in (100, 10_000):
        add("FDT", "node", nodes, trees(nodes), 2 * rounds + 1)
    return found
