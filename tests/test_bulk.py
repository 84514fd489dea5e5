"""Python side of a tracker's bulk operations, set algebra, ranks and Roaring bitmaps: buffers and threads."""

from __future__ import annotations

import array
import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kho import PfnArray, RunArray, Tracker, errors

np = pytest.importorskip("numpy")

PFNS = [7, 5, 70_000, 5, 0, 2**40, 33]
SORTED_PFNS = sorted({*PFNS})


def tracker_of(pfns: Any, order: int = 0) -> Tracker:
    """Return a tracker with preserved folios of one order."""
    t = Tracker()
    t.preserve_many(array.array("Q", pfns), order)
    return t


def read_only(pfns: Any) -> Any:
    pfns.setflags(write=False)
    return pfns


BUFFERS: dict[str, Callable[[], Any]] = {
    "uint64": lambda: np.array(PFNS, np.uint64),
    "int64": lambda: np.array(PFNS, np.int64),
    "read-only": lambda: read_only(np.array(PFNS)),
    "strided": lambda: np.repeat(np.array(PFNS), 3)[::3],
    "strided, unsigned": lambda: np.repeat(np.array(PFNS, np.uint64), 2)[1::2],
    "backwards": lambda: np.array(PFNS[::-1])[::-1],
    "a column": lambda: np.array([PFNS, PFNS]).T[:, 1],
    "array Q": lambda: array.array("Q", PFNS),
    "array q": lambda: array.array("q", PFNS),
    "array L": lambda: array.array("L", PFNS),
    "unaligned": lambda: np.frombuffer(b"\0" + array.array("Q", PFNS).tobytes(), np.uint64, offset=1),
    "unaligned, strided": lambda: np.array([(0, pfn) for pfn in PFNS], "u1,u8")["f1"],
    "memoryview of ctypes": lambda: memoryview((ctypes.c_uint64 * len(PFNS))(*PFNS)),
    "memoryview": lambda: memoryview(array.array("Q", PFNS)),
    "memoryview, backwards": lambda: memoryview(array.array("q", PFNS[::-1]))[::-1],
    "memoryview, cast": lambda: memoryview(array.array("Q", PFNS).tobytes()).cast("Q"),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_pfns_may_be_in_any_buffer_of_64_bit_integers(kind: str) -> None:
    pfns = BUFFERS[kind]()
    t = Tracker()
    assert t.preserve_many(pfns) == len(SORTED_PFNS)
    assert t.pfns() == SORTED_PFNS
    assert t.contains_many(pfns) == bytes([1] * len(PFNS))
    assert t.contains_many(pfns, np.array([0, 1] * 3 + [0], np.uint8)) == bytes([1, 0, 1, 0, 1, 0, 1])
    assert t.unpreserve_many(pfns, bytes(len(PFNS))) == len(SORTED_PFNS)
    assert not t


@pytest.mark.parametrize("kind", ["u4", "i4"])
def test_pfns_may_be_32_bit_integers(kind: str) -> None:
    pfns = np.array([5, 70_000, 5, 2**31 - 1], kind)
    for buffer in (pfns, pfns[::-1], np.repeat(pfns, 3)[::3], memoryview(pfns), array.array("Ii"[kind == "i4"], pfns)):
        t = Tracker()
        assert t.preserve_many(buffer) == 3
        assert t.pfns() == [5, 70_000, 2**31 - 1]
        assert t.contains_many(buffer) == bytes([1] * 4)
    t = Tracker()
    assert t.preserve_many(np.arange(10_000, dtype=kind)[::-1].copy()) == 10_000
    assert t.runs() == [(0, 10_000)]


INVALID: dict[str, Callable[[], Any]] = {
    "a list": lambda: [1],
    "an int": lambda: 1,
    "uint16": lambda: np.array([1], np.uint16),
    "float64": lambda: np.array([1.0]),
    "bool": lambda: np.array([True]),
    "bytes": lambda: b"12345678",
    "records": lambda: tracker_of([1]).folios(),
    "byte-swapped": lambda: np.array([1], ">u8"),
    "bare": lambda: np.uint64(5),
    "objects": lambda: np.array([1], object),
}


@pytest.mark.parametrize("kind", INVALID)
def test_other_objects_as_pfns_raise(kind: str) -> None:
    t = tracker_of([1])
    for call in (t.preserve_many, t.unpreserve_many, t.contains_many):
        with pytest.raises(TypeError, match="pfns: a one-dimensional buffer of 64-bit or 32-bit integers is wanted"):
            call(INVALID[kind]())
    assert t.pfns() == [1]


def test_two_dimensions_raise() -> None:
    with pytest.raises(errors.ParameterError, match="dimensions, not 1"):
        Tracker().preserve_many(np.zeros((2, 2), np.uint64))


@pytest.mark.parametrize(
    "order",
    [np.zeros(3), np.zeros(3, ">u2"), np.zeros((3, 1), np.uint8), np.full(3, 256), np.full(3, -1), "0", 1.5, None],
)
def test_invalid_orders_raise(order: Any) -> None:
    t = Tracker()
    for call in (t.preserve_many, t.unpreserve_many, t.contains_many):
        if order is None:
            assert len(call(np.arange(3))) == 3 if call == t.contains_many else call(np.arange(3)) == 3
        else:
            with pytest.raises((TypeError, errors.ParameterError)):
                call(np.arange(3), order)


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_orders_may_be_integers_of_any_width(kind: str) -> None:
    t = Tracker()
    orders = np.array([9, 0, 3, 9], kind)
    pfns = np.array([512, 7, 8, 1024])
    assert t.preserve_many(pfns, orders) == 4
    assert list(t) == [(7, 0), (8, 3), (512, 9), (1024, 9)]
    assert t.contains_many(pfns[::-1], orders[::-1]) == bytes([1] * 4)
    assert t.contains_many(pfns, np.repeat(orders, 2)[1::2]) == bytes([1] * 4)
    with pytest.raises(errors.OrderError, match="order 37"):
        t.preserve_many(pfns, orders + np.array(28, kind))


def test_an_invalid_folio_in_a_list_changes_nothing() -> None:
    t = tracker_of([8, 9])
    bad: list[tuple[list[int], Any, type[Exception]]] = [
        ([8, 2**52], 0, errors.OutOfRangeError),
        ([8, 9], 3, errors.MisalignedError),
        ([8, 9], b"\0", errors.ParameterError),
        ([8, 9], b"\0\x25", errors.OrderError),
        ([8], 37, errors.OrderError),
        ([8], -1, errors.ParameterError),
    ]
    for pfns, order, error in bad:
        for call in (t.preserve_many, t.unpreserve_many):
            with pytest.raises(error):
                call(np.array(pfns), order)
    assert t.pfns() == [8, 9]
    assert t.contains_many(np.array([-1, 8, 2**62])) == b"\0\1\0"
    with pytest.raises(errors.OrderError):
        t.contains_many(np.array([8]), 37)


def test_empty_buffers_change_nothing() -> None:
    t = tracker_of([1])
    for empty in (array.array("Q"), np.array([], np.uint64), np.arange(9)[5:5:2], memoryview(array.array("q"))):
        assert (t.preserve_many(empty), t.unpreserve_many(empty, b""), t.contains_many(empty)) == (0, 0, b"")
    assert Tracker().pfns() == []
    assert memoryview(Tracker().pfns()).tolist() == []
    assert np.asarray(Tracker().extents()).shape == (0,)


def test_pfns_and_runs_are_zero_copy_buffers_that_outlive_the_tracker() -> None:
    t = tracker_of([*range(10, 20), 30])
    pfns, runs = t.pfns(), t.runs()
    seen, rows = np.asarray(pfns), np.asarray(runs)
    assert (seen.dtype, seen.flags.writeable) == (np.dtype("<u8"), False)
    assert rows.dtype == np.dtype([("pfn", "<u8"), ("n", "<u8")])
    assert np.shares_memory(seen, np.asarray(pfns[3:]))
    t.clear()
    del pfns, runs
    gc.collect()
    assert seen.tolist() == [*range(10, 20), 30]
    assert rows.tolist() == [(10, 10), (30, 1)]


def test_the_buffer_of_a_dropped_long_list_is_reused_for_the_next() -> None:
    """The lists are long enough for the buffer pool. An equal address shows the reuse; no old content remains."""
    long, short = (tracker_of(np.arange(0, stop, 3)) for stop in (3_000_000, 2_400_000))
    first, folios = long.pfns(0), long.folios()
    at = np.asarray(first).ctypes.data
    part = np.asarray(first)[10:20]
    del first  # `part` still refers to the buffer
    other = np.asarray(long.pfns(0))
    assert other.ctypes.data != at
    assert part.tolist() == list(range(30, 60, 3))
    del part
    again = short.pfns(0)
    assert np.asarray(again).ctypes.data == at
    assert np.array_equal(np.asarray(again), np.arange(0, 2_400_000, 3))
    del folios
    listed = np.asarray(short.folios())
    assert np.array_equal(listed["phys"], np.arange(0, 2_400_000, 3) << 12)
    assert not listed["order"].any()
    assert len(tracker_of([5]).pfns(0)) == 1


def test_pfns_are_a_sequence_of_ints() -> None:
    pfns = tracker_of(range(0, 50, 10)).pfns()
    whole = [0, 10, 20, 30, 40]
    assert (len(pfns), list(pfns), pfns[1], pfns[-1]) == (5, whole, 10, 40)
    assert pfns == whole == list(pfns[::-1])[::-1]
    assert pfns != whole[:4]
    assert pfns != [0, 10, 20, 30, "40"]
    assert pfns != [0, 10, 20, 30, -1]
    assert pfns != 5
    assert 10 in pfns
    assert repr(pfns) == "PfnArray([0x0, 0xa, 0x14, 0x1e, ... 5 in all])"
    for part in (slice(None), slice(-2, 9), slice(2, 1), slice(None, None, -1), slice(None, None, 2)):
        assert isinstance(pfns[part], PfnArray)
        assert pfns[part] == whole[part]
    for at in (5, -6, 2**70):
        with pytest.raises(IndexError):
            pfns[at]
    with pytest.raises(TypeError):
        pfns["0"]  # type: ignore[call-overload]


def test_extents_are_a_sequence_of_pairs() -> None:
    t = tracker_of([1, 2])
    t.preserve(512, 9)
    t.preserve(3)
    extents = t.extents()
    assert isinstance(extents[:1], RunArray)
    assert extents == [(1, 3), (512, 512)] == list(extents)
    assert type(extents[0]) is tuple
    assert repr(extents) == "RunArray([(0x1, 3), (0x200, 512)])"
    assert t.runs(9) == [(512, 1)]
    assert t.runs(3) == []


def test_a_tracker_may_be_filled_with_its_own_pfns() -> None:
    t = tracker_of(range(0, 4000, 4))
    assert t.preserve_many(t.pfns()) == 0
    assert t.preserve_many(t.pfns(), 2) == 1000
    assert t.unpreserve_many(t.pfns()) == 1000
    assert t.pfns(2) == list(range(0, 4000, 4))


def test_comparison_operators_work_as_for_sets() -> None:
    small, large, other = tracker_of([1]), tracker_of([1, 2]), tracker_of([3])

    def compared(a: Tracker, b: Tracker) -> tuple[bool, ...]:
        return a < b, a <= b, a >= b, a > b

    assert compared(small, large) == (True, True, False, False)
    assert compared(large, small) == (False, False, True, True)
    assert compared(small, small.copy()) == (False, True, True, False)
    assert compared(small, other) == (False, False, False, False)
    assert large.issuperset(small)
    assert not small.issuperset(large)
    bads: list[Any] = [{1}, 5, None]
    for bad in bads:
        with pytest.raises(TypeError):
            _ = small < bad
        with pytest.raises(TypeError):
            small.union_len(bad)


@pytest.mark.parametrize("op", ["or", "and", "sub", "xor"])
def test_a_tracker_combined_with_itself_is_itself_or_empty(op: str) -> None:
    t = tracker_of(PFNS)
    want = SORTED_PFNS if op in ("or", "and") else []
    assert getattr(t, f"__{op}__")(t).pfns() == want
    getattr(t, f"__i{op}__")(t)
    assert t.pfns() == want
    assert len(t) == len(want)
    assert t.stats()[0]["blocks"] == 3  # empty bitmaps are not freed, as in the kernel


def test_folios_with_different_page_sizes_are_never_equal() -> None:
    a, b = tracker_of([1]), Tracker(65536)
    b.preserve(1)
    assert (a.union_len(b), a.intersection_len(b), a.difference_len(b), a.symmetric_difference_len(b)) == (2, 0, 1, 2)
    assert a.isdisjoint(b)
    assert not a <= b
    with pytest.raises(errors.ParameterError):
        _ = a & b


def test_select_after_the_last_folio_raises_index_error() -> None:
    t = tracker_of(PFNS)
    assert [t.select(i) for i in range(len(t))] == SORTED_PFNS
    assert [t.rank(pfn) for pfn in SORTED_PFNS] == list(range(len(t)))
    assert t.rank(2**64 - 1) == len(t)
    for rank, order in [(len(t), 0), (0, 1), (-1, 0), (2**64, 0)]:
        with pytest.raises(IndexError):
            t.select(rank, order)
    with pytest.raises(TypeError):
        t.select(1.0)  # type: ignore[arg-type]
    with pytest.raises(errors.OrderError):
        t.rank(0, 37)


# Roaring bitmaps

NUMBERS = st.sets(st.integers(0, 300) | st.integers(0, 200_000) | st.integers(0, 2**32 - 1), max_size=60)
RANGES = st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 70_000), st.integers(1, 4)), max_size=3)
GEOMETRIES = st.sampled_from([(4096, 512), (4096, 4096), (16384, 16384), (65536, 65536), (65536, 512)])


@settings(max_examples=40, deadline=None)
@given(NUMBERS, RANGES, GEOMETRIES, st.booleans(), st.sampled_from([0, 3, 9]))
def test_bitmaps_of_both_widths_round_trip_through_pyroaring(
    numbers: set[int], ranges: list[tuple[int, int, int]], geometry: tuple[int, int], runs: bool, order: int
) -> None:
    pyroaring = pytest.importorskip("pyroaring")
    for bits, kind in ((32, pyroaring.BitMap), (64, pyroaring.BitMap64)):
        theirs = kind(numbers)
        for start, n, step in ranges:
            theirs.update(range(start, start + n, step))
        if runs:
            theirs.run_optimize()
        page_size, bitmap_bytes = geometry
        t = Tracker.from_roaring(theirs.serialize(), order, bits=bits, page_size=page_size, bitmap_bytes=bitmap_bytes)
        assert len(t) == len(t.pfns(order)) == len(theirs)
        assert (np.asarray(t.pfns(order)) >> order).tolist() == list(theirs)
        data = t.to_roaring(order, bits=bits, runs=runs)
        assert kind.deserialize(data) == theirs
        assert t.update_roaring(memoryview(data), order, bits=bits) == 0
        assert (t.page_size, t.bitmap_bytes) == geometry


def test_folio_numbers_above_32_bits_need_64_bit_bitmaps() -> None:
    t = tracker_of([2**32 - 1, 2**32])
    with pytest.raises(errors.OutOfRangeError, match="0x100000000"):
        t.to_roaring(bits=32)
    assert Tracker.from_roaring(t.to_roaring()) == t
    with pytest.raises(errors.OutOfRangeError):
        Tracker.from_roaring(t.to_roaring(), 36)
    for bits in (0, 33, 2**70, -64):
        with pytest.raises(errors.ParameterError):
            t.to_roaring(bits=bits)
        with pytest.raises(errors.ParameterError):
            t.update_roaring(b"", bits=bits)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_truncated_bitmap_changes_nothing(bits: int) -> None:
    t = tracker_of([*range(0, 9000, 2), *range(100_000, 200_000), 2**31])
    data = t.to_roaring(bits=bits)
    other = tracker_of([3])
    for n in [*range(200), *range(200, len(data), 97), len(data) - 1]:
        with pytest.raises(errors.ParameterError):
            other.update_roaring(data[:n], bits=bits)
    with pytest.raises(errors.ParameterError):
        other.update_roaring(data + b"\0", bits=bits)
    with pytest.raises(TypeError):
        other.update_roaring("text")  # type: ignore[arg-type]
    assert other.pfns() == [3]


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\x3a\x30\0\0", b"\x3b\x30\0\0", b"\1" + bytes(11) + b"\x3a\x30\0\0"]),
)
def test_hostile_bitmaps_raise_and_change_nothing(garbage: bytes, head: bytes) -> None:
    for bits in (32, 64):
        t = Tracker()
        try:
            t.update_roaring(head + garbage, bits=bits)
        except errors.KhoError:
            assert len(t) == 0


# Threads


def test_a_bulk_call_releases_the_gil() -> None:
    """With a long switch interval, the other thread runs only when this one releases the GIL, that is in the call."""
    pfns = np.random.default_rng(0).integers(0, 2**30, 1_000_000)
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0)

    def another_thread_ran_during(call: Callable[[], object]) -> bool:
        before = ticks
        call()
        return ticks > before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        assert not any(another_thread_ran_during(lambda: sorted(range(100_000))) for _ in range(100))
        # A call takes a few milliseconds, in which a busy machine may not run the other thread.
        assert any(another_thread_ran_during(lambda: Tracker().preserve_many(pfns)) for _ in range(1000))
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join(60)


def test_pfns_that_change_during_a_call_are_used_as_copied_or_raise() -> None:
    pfns = np.arange(300_000)
    done = threading.Event()

    def scribble() -> None:
        while not done.is_set():
            pfns[::7] = 2**62
            pfns[:] = np.arange(len(pfns))
            pfns[::11] = 5

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for _ in range(15):
            t = Tracker()
            try:
                n = t.preserve_many(pfns)
            except errors.OutOfRangeError:
                n = len(t)
            assert n == len(t)
            assert not t or t.select(len(t) - 1) < len(pfns)
    finally:
        done.set()
        thread.join(60)


def test_threads_may_fill_and_combine_different_trackers() -> None:
    trackers = [Tracker() for _ in range(4)]

    def fill(n: int) -> None:
        trackers[n].preserve_many(np.arange(n, 400_000, 4))
        for other in trackers:
            trackers[n] |= other

    threads = [threading.Thread(target=fill, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    whole = trackers[0] | trackers[1] | trackers[2] | trackers[3]
    assert whole.runs() == [(0, 400_000)]


def test_threads_work_concurrently_on_different_orders_of_a_tracker() -> None:
    t = Tracker()
    done = threading.Event()
    concurrent: list[bool] = []

    def single_pages() -> None:
        for _ in range(3):
            t.preserve_many(np.random.default_rng(0).permutation(3_000_000))
        done.set()

    thread = threading.Thread(target=single_pages)
    thread.start()
    large = np.arange(5000) << 9
    for _ in range(1_000_000):
        if done.is_set():
            break
        # Neither call waits for the lock of the other order; a call that reads all orders waits for both.
        assert t.preserve_many(large, 9) == 5000
        assert t.contains_many(large, 9) == bytes([1] * 5000)
        assert t.unpreserve_many(large, 9) == 5000
        concurrent.append(not done.is_set())
    thread.join(60)
    assert sum(concurrent) > 3
    assert t.runs(0) == [(0, 3_000_000)]
    assert len(t) == 3_000_000


def test_calls_on_one_order_are_atomic_for_calls_on_the_whole_tracker() -> None:
    t = Tracker()
    lists = {order: np.random.default_rng(order).permutation(200_000).astype("u8") << order for order in (0, 1, 2)}

    def there_and_back(order: int) -> None:
        for _ in range(20):
            assert t.preserve_many(lists[order], order) == 200_000
            assert t.unpreserve_many(lists[order], order) == 200_000

    threads = [threading.Thread(target=there_and_back, args=(order,)) for order in lists]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(t) in range(0, 800_000, 200_000)
        copy = t.copy()
        assert {row["folios"] for row in copy.stats().values()} <= {0, 200_000}
        assert len(t | copy) % 200_000 == 0
        assert t.preserve(1 << 40, 3)
        assert t.unpreserve(1 << 40, 3)
    for thread in threads:
        thread.join(60)
    assert len(t) == 0


def test_a_preserved_run_equals_its_folios() -> None:
    t = Tracker(bitmap_bytes=512)
    assert t.preserve_run(4096 - 2, 1, 9000) == 9000
    assert t.preserve_run(4096, 1, 1) == 0
    assert list(t.runs(1)) == [(4094, 9000)]
    assert t == tracker_of(range(4094, 4094 + 18000, 2), 1)
    assert t.unpreserve_run(0, 1, 2048) == 1
    assert list(t.runs(1)) == [(4096, 8999)]
    with pytest.raises(errors.MisalignedError):
        t.preserve_run(1, 1, 1)
    with pytest.raises(errors.OutOfRangeError):
        t.preserve_run((1 << 52) - 2, 1, 2)
    assert list(t.runs(1)) == [(4096, 8999)]
