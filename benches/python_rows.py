"""The Python half of the table: bulk calls on W1, single calls on a part of it, FDTs, and the floor of a call."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

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

FULL = 10_000_000
"""Folios of W1; with fewer everything else shrinks along."""
SINGLE = 1_000_000
"""Folios of a row with a Python call each."""

Work = Callable[[], object]


class Row(NamedTuple):
    """What is done, by peer; and the bytes of metadata of what that makes."""

    operation: str
    peers: dict[str, Work]
    sizes: Mapping[str, Callable[[Any], int]] = MappingProxyType({})


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


def power(n: int) -> int:
    """The smallest power of two that is not below it."""
    return 1 << (max(n, 1) - 1).bit_length()


def span(folios: int) -> int:
    """Pages of W1's address space: 2^28 for 10,000,000."""
    return power((1 << 28) * folios // FULL)


def one_by_one(call: Callable[[int], object], numbers: Iterable[int]) -> None:
    """What a caller's loop does: one Python call a folio."""
    for number in numbers:
        call(number)


def packed(pages: Any, size: int) -> Any:
    """A bitmap of the whole span: numpy's best. It knows no orders and no sparseness."""
    bitmap = np.zeros(size // 8, np.uint8)
    np.bitwise_or.at(bitmap, pages >> 3, np.left_shift(1, pages & 7).astype(np.uint8))
    return bitmap


def cells_of(row: Row, units: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Nanoseconds a unit of each round, of all peers in turns; what a round made is dropped outside of it.

    One round more, the first, in which memory is touched and caches fill, counts only if it leaves no time for another.
    """
    times: dict[str, list[int]] = {peer: [] for peer in row.peers}
    sizes: dict[str, float] = {}
    for _ in range(rounds + 1):
        for peer, work in row.peers.items():
            if sum(times[peer]) > PATIENCE * 1e9:
                continue
            start = time.perf_counter_ns()
            made = work()
            times[peer].append(time.perf_counter_ns() - start)
            if peer in row.sizes and peer not in sizes:
                sizes[peer] = row.sizes[peer](made) / units
            del made
    for peer, spent in times.items():
        taken = [time / units for time in spent[1:] or spent]
        yield {"operation": row.operation, "peer": peer, "bytes": sizes.get(peer), "samples": taken}


class Workload(NamedTuple):
    """Folios in the order in which they come, as the Rust half has them (benches/src/workload.rs)."""

    name: str
    pfns: Any
    orders: Any
    """As many; None where all are of order 0."""
    span: int
    """One past the last pfn that may occur, rounded up to whole bytes of a bitmap."""

    @classmethod
    def w1(cls, folios: int) -> Workload:
        """10,000,000 random order-0 folios of 1 TiB."""
        size = span(folios)
        return cls("W1", shuffled(np.arange(folios, dtype=np.uint64), size.bit_length() - 1), None, size)

    @classmethod
    def w2(cls, folios: int) -> Workload:
        """2^24 consecutive order-0 folios."""
        n = (1 << 24) * folios // FULL
        return cls("W2", np.arange(n, dtype=np.uint64), None, (n + 7) & ~7)

    @classmethod
    def w3(cls, folios: int) -> Workload:
        """A guest of 2 TiB in order-9 folios, shuffled; then order-0 and order-18 folios after them."""
        guest = power((1 << 20) * folios // FULL)
        small, huge = max(1_000_000 * folios // FULL, 1), max(512 * folios // FULL, 1)
        small_span = max(span(folios), power(small))
        behind = guest << 9
        aligned = (behind + small_span + (1 << 18) - 1) >> 18 << 18
        large = shuffled(np.arange(guest, dtype=np.uint64), guest.bit_length() - 1) << np.uint64(9)
        single = np.uint64(behind) + shuffled(np.arange(small, dtype=np.uint64), small_span.bit_length() - 1)
        gigantic = np.uint64(aligned) + (np.arange(huge, dtype=np.uint64) << np.uint64(18))
        orders = np.repeat(np.array([9, 0, 18], np.uint8), [guest, small, huge])
        return cls("W3", np.concatenate([large, single, gigantic]), orders, aligned + (huge << 18))


def size_of_set(numbers: set[int]) -> int:
    """A set's table, and the integers in it."""
    return sys.getsizeof(numbers) + sum(map(sys.getsizeof, itertools.islice(numbers, 1000))) * len(numbers) // 1000


def preserving(w: Workload) -> tuple[dict[str, Work], dict[str, Callable[[Any], int]]]:
    """Filling from nothing, by peer; and how many bytes what that made takes."""
    signed, narrow, numbers = w.pfns.astype(np.int64), w.pfns.astype(np.uint32), w.pfns.tolist()

    def fill() -> kho.Tracker:
        tracker = kho.Tracker()
        tracker.preserve_many(w.pfns, 0 if w.orders is None else w.orders)
        return tracker

    row: dict[str, Work] = {"kho": fill, "numpy": lambda: packed(signed, w.span), "set": lambda: set(numbers)}
    sizes: dict[str, Callable[[Any], int]] = {"kho": lambda made: made.nbytes, "numpy": lambda made: made.nbytes}
    sizes["set"] = size_of_set
    if BitMap is not None:
        row["pyroaring"] = lambda: BitMap(narrow)
        sizes["pyroaring"] = lambda made: len(made.serialize())
    if bitarray is not None:

        def bits() -> Any:
            made = bitarray(w.span)
            made[numbers] = 1
            return made

        row["bitarray"] = bits
        sizes["bitarray"] = lambda made: made.nbytes
    return row, sizes


def bulk(w: Workload) -> Iterator[Row]:
    """Calls for all of a workload at once. Peers know no orders: pfns alone."""
    count = len(w.pfns)
    yield Row("preserve in bulk, unsorted" if w.name == "W1" else "preserve in bulk", *preserving(w))
    in_order = np.sort(w.pfns)
    narrow_in_order = in_order.astype(np.uint32)
    if w.name == "W1":
        row: dict[str, Work] = {"kho": lambda: kho.Tracker().preserve_many(in_order)}
        if BitMap is not None:
            row["pyroaring"] = lambda: BitMap(narrow_in_order)
        yield Row("preserve in bulk, sorted", row)

    tracker = kho.Tracker()
    tracker.preserve_many(w.pfns, 0 if w.orders is None else w.orders)
    assert len(tracker) == count
    signed = w.pfns.astype(np.int64)
    bitmap = packed(signed, w.span)
    roaring = BitMap(narrow_in_order) if BitMap is not None else None
    listing: dict[str, Work] = {"numpy": lambda: np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))}
    if roaring is not None:
        listing["pyroaring"] = roaring.to_array
    if bitarray is not None:
        bits = bitarray(endian="little")
        bits.frombytes(bitmap.tobytes())
        listing["bitarray"] = lambda: list(bits.search(1))
    if w.orders is None:
        yield Row("pfns()", {"kho": lambda: tracker.pfns(0), **listing})
    yield Row("folios()", {"kho": tracker.folios, **listing})
    orders = 0 if w.orders is None else w.orders
    row = {"kho": lambda: tracker.contains_many(w.pfns, orders)}
    row["numpy"] = lambda: bitmap[signed >> 3] >> (signed & 7).astype(np.uint8) & 1
    yield Row("contains in bulk", row)

    def there_and_back() -> None:
        tracker.unpreserve_many(w.pfns, orders)
        tracker.preserve_many(w.pfns, orders)

    yield Row("unpreserve in bulk, and preserve again", {"kho": there_and_back})
    other = tracker.copy()
    row = {"kho": lambda: tracker | other, "numpy": lambda: bitmap | bitmap}
    if roaring is not None:
        twin = BitMap(roaring)
        row["pyroaring"] = lambda: roaring | twin
    yield Row("union", row)


def single(folios: int) -> Iterator[Row]:
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
    yield Row("preserve, one call each", row)
    yield Row("iterate in Python", iterating)


def write_kho(nodes: int) -> bytes:
    """A root with that many nodes of two properties."""
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


def trees(nodes: int) -> Iterator[Row]:
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
    yield Row(f"build an FDT of {nodes:,} nodes", building)
    yield Row(f"walk an FDT of {nodes:,} nodes", walking)


def cells(folios: int, rounds: int) -> Iterator[dict[str, Any]]:
    """The cells of the table, as the Rust half writes them."""

    def of(workload: str, unit: str, units: int, rows: Iterator[Row], times: int) -> Iterator[dict[str, Any]]:
        for row in rows:
            for cell in cells_of(row, units, times):
                yield {"workload": workload, "unit": unit, **cell}

    for make in (Workload.w1, Workload.w2, Workload.w3):
        w = make(folios)
        yield from of(f"Python {w.name}", "folio", len(w.pfns), bulk(w), rounds)
    part = min(SINGLE, folios)
    yield from of(f"Python, {part:,} of W1", "folio", part, single(part), rounds)
    for nodes in (100, 10_000):
        yield from of("FDT", "node", nodes, trees(nodes), 2 * rounds + 1)
