"""The tracker through Python: against a plain set, and what Python adds to it."""

from __future__ import annotations

import array
import copy
import gc
import io
import pickle
import threading
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kho import FolioArray, FolioInfo, Tracker, errors

Folio = tuple[int, int]
GEOMETRIES = [(p, b) for p in (4096, 16384, 65536) for b in (512, p)]


def limit(page_size: int) -> int:
    """One past the last pfn."""
    return 2**64 // page_size


def split(pfn: int, n: int) -> list[Folio]:
    """The naturally aligned folios that `n` pages split into, as (pfn, order)."""
    end, out = pfn + n, []
    while pfn < end:
        order = min((pfn & -pfn).bit_length() - 1 if pfn else 36, (end - pfn).bit_length() - 1, 36)
        out.append((pfn, order))
        pfn += 1 << order
    return out


@st.composite
def folios(draw: st.DrawFn, page_size: int = 4096) -> Folio:
    """A folio near 0, a bitmap's edge, the end of the address space, or anywhere."""
    order = draw(st.sampled_from([0, 0, 0, 1, 9, 18, 36]) | st.integers(0, 36))
    count = limit(page_size) >> order
    number = draw(
        st.integers(0, 70)
        | st.integers(4093, 4099)
        | st.integers(32765, 32771)
        | st.integers(1, 4).map(lambda n: count - n)
        | st.integers(0, count - 1)
    )
    return number % count << order, order


class TrackerIsASet(RuleBasedStateMachine):
    """Every operation does to the tracker what it does to a Python set of (pfn, order)."""

    @initialize(geometry=st.sampled_from(GEOMETRIES))
    def start(self, geometry: tuple[int, int]) -> None:
        self.page_size, self.bitmap_bytes = geometry
        self.tracker = Tracker(*geometry)
        self.model: set[Folio] = set()

    def change(self, wanted: list[Folio], mark: bool) -> int:
        changed = [f for f in dict.fromkeys(wanted) if (f in self.model) != mark]
        self.model = self.model | set(changed) if mark else self.model - set(changed)
        return len(changed)

    @rule(data=st.data())
    def preserve(self, data: st.DataObject) -> None:
        folio = data.draw(folios(self.page_size))
        assert self.tracker.preserve(*folio) is (self.change([folio], True) == 1)

    @rule(data=st.data())
    def unpreserve(self, data: st.DataObject) -> None:
        known = st.sampled_from(sorted(self.model)) if self.model else st.nothing()
        folio = data.draw(known | folios(self.page_size))
        assert self.tracker.unpreserve(*folio) is (self.change([folio], False) == 1)

    @rule(data=st.data(), n=st.integers(0, 70_000), mark=st.booleans())
    def pages(self, data: st.DataObject, n: int, mark: bool) -> None:
        pfn, _ = data.draw(folios(self.page_size))
        call = self.tracker.preserve_pages if mark else self.tracker.unpreserve_pages
        if pfn + n > limit(self.page_size):
            with pytest.raises(errors.OutOfRangeError):
                call(pfn, n)
        else:
            assert call(pfn, n) == self.change(split(pfn, n), mark)

    @rule(data=st.data())
    def many(self, data: st.DataObject) -> None:
        wanted = data.draw(st.lists(folios(self.page_size), max_size=20))
        pfns = array.array("Q", [pfn for pfn, _ in wanted])
        new = self.tracker.preserve_many(pfns, bytes(order for _, order in wanted))
        assert new == self.change(wanted, True)

    @rule(data=st.data())
    def many_fewer(self, data: st.DataObject) -> None:
        known = st.sampled_from(sorted(self.model)) if self.model else st.nothing()
        wanted = data.draw(st.lists(known | folios(self.page_size), max_size=20))
        pfns = array.array("q", [pfn for pfn, _ in wanted])
        orders = bytes(order for _, order in wanted)
        assert self.tracker.contains_many(pfns, orders) == bytes(f in self.model for f in wanted)
        assert self.tracker.unpreserve_many(pfns, orders) == self.change(wanted, False)

    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        pfn, order = data.draw(folios(self.page_size))
        pfns = sorted(p for p, o in self.model if o == order)
        assert self.tracker.pfns(order) == pfns
        assert self.tracker.rank(pfn, order) == sum(p < pfn for p in pfns)
        assert [self.tracker.select(n, order) for n in range(len(pfns))[:9]] == pfns[:9]
        assert sum(n for _, n in self.tracker.runs(order)) == len(pfns)

    @rule(data=st.data())
    def through_a_roaring_bitmap(self, data: st.DataObject) -> None:
        copy = Tracker(self.page_size, data.draw(st.sampled_from([512, self.page_size])))
        for order in {order for _, order in self.model}:
            new = copy.update_roaring(self.tracker.to_roaring(order), order)
            assert new == len(self.tracker.pfns(order))
        assert copy == self.tracker

    def other(self, data: st.DataObject) -> tuple[Tracker, set[Folio]]:
        """Another tracker that has some folios in common, in bitmaps of either size, and its model."""
        mine = data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=9)) if self.model else []
        model = {*mine, *data.draw(st.lists(folios(self.page_size), max_size=9))}
        tracker = Tracker(self.page_size, data.draw(st.sampled_from([512, self.page_size])))
        for folio in model:
            tracker.preserve(*folio)
        return tracker, model

    @rule(data=st.data(), op=st.sampled_from(["or", "and", "sub", "xor"]), in_place=st.booleans())
    def combine(self, data: st.DataObject, op: str, in_place: bool) -> None:
        tracker, other = self.other(data)
        self.model = getattr(self.model, f"__{op}__")(other)
        if in_place:
            getattr(self.tracker, f"__i{op}__")(tracker)
        else:
            self.tracker = getattr(self.tracker, f"__{op}__")(tracker)

    @rule(data=st.data())
    def compare(self, data: st.DataObject) -> None:
        tracker, other = self.other(data)
        for op in ("lt", "le", "gt", "ge", "eq"):
            assert getattr(self.tracker, f"__{op}__")(tracker) is getattr(self.model, f"__{op}__")(other)
        for law in ("isdisjoint", "issubset", "issuperset"):
            assert getattr(self.tracker, law)(tracker) is getattr(self.model, law)(other)
        for size in ("union", "intersection", "difference", "symmetric_difference"):
            assert getattr(self.tracker, f"{size}_len")(tracker) == len(getattr(self.model, size)(other))

    @rule()
    def through_a_pickle(self) -> None:
        stats = self.tracker.stats()
        self.tracker = pickle.loads(pickle.dumps(self.tracker))
        shape = [{**row, "bytes": 0} for row in stats.values()]
        assert [{**row, "bytes": 0} for row in self.tracker.stats().values()] == shape

    @rule()
    def clear(self) -> None:
        self.tracker.clear()
        self.model = set()
        assert self.tracker.stats() == {}

    @invariant()
    def same(self) -> None:
        assert len(self.tracker) == len(self.model)
        assert bool(self.tracker) is bool(self.model)
        assert list(self.tracker) == sorted(self.model, key=lambda f: (f[1], f[0]))
        assert self.tracker.folios() == sorted((pfn * self.page_size, order) for pfn, order in self.model)
        assert all(f in self.tracker for f in list(self.model)[:9])
        assert (self.tracker.page_size, self.tracker.bitmap_bytes) == (self.page_size, self.bitmap_bytes)


TestTrackerIsASet = TrackerIsASet.TestCase
TestTrackerIsASet.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.fixture
def tracker() -> Tracker:
    """Three folios; two overlap."""
    t = Tracker()
    for folio in [(5, 0), (512, 9), (512, 0)]:
        t.preserve(*folio)
    return t


@pytest.mark.parametrize(
    ("folio", "error"),
    [
        ((1, 1), errors.MisalignedError),
        ((0, 37), errors.OrderError),
        ((2**52, 0), errors.OutOfRangeError),
        ((2**64, 0), errors.ParameterError),
        ((-1, 0), errors.ParameterError),
        ((0, -1), errors.ParameterError),
        (("0", 0), TypeError),
        ((0.0, 0), TypeError),
    ],
)
def test_what_is_no_folio_is_refused(tracker: Tracker, folio: Folio, error: type[Exception]) -> None:
    with pytest.raises(error):
        tracker.preserve(*folio)
    with pytest.raises(error):
        tracker.unpreserve(*folio)
    if error is TypeError:
        with pytest.raises(TypeError):
            _ = folio in tracker
    else:
        assert folio not in tracker
    assert len(tracker) == 3


def test_membership_takes_a_pfn_or_a_pair(tracker: Tracker) -> None:
    assert 5 in tracker
    assert (512, 9) in tracker
    assert 6 not in tracker
    assert (5, 1) not in tracker
    with pytest.raises(TypeError):
        _ = (1, 2, 3) in tracker  # type: ignore[operator]


@pytest.mark.parametrize(
    ("page_size", "bitmap_bytes"), [(1000, None), (4096, 1024), (65536, 4096), (0, 512), (-1, None)]
)
def test_other_geometries_are_refused(page_size: int, bitmap_bytes: int | None) -> None:
    with pytest.raises(errors.ParameterError):
        Tracker(page_size, bitmap_bytes)


def test_trackers_of_other_page_sizes_neither_equal_nor_combine(tracker: Tracker) -> None:
    other = Tracker(65536)
    assert Tracker() != other
    assert Tracker() == Tracker(4096, 512)
    assert tracker != {(5, 0), (512, 9), (512, 0)}
    with pytest.raises(errors.ParameterError):
        _ = tracker | other
    with pytest.raises(TypeError):
        _ = tracker | {5}  # type: ignore[operator]
    with pytest.raises(TypeError):
        hash(tracker)


def test_a_tracker_combines_with_itself(tracker: Tracker) -> None:
    same = tracker
    same |= same
    assert same is tracker
    assert len(tracker) == 3
    assert tracker == tracker & tracker
    assert not (tracker ^ tracker)
    tracker -= tracker
    assert len(tracker) == 0


def test_a_copy_is_another_tracker(tracker: Tracker) -> None:
    copies = [tracker.copy(), copy.copy(tracker), copy.deepcopy(tracker)]
    tracker.clear()
    assert [len(c) for c in copies] == [3, 3, 3]


def test_iteration_is_over_the_tracker_as_it_was(tracker: Tracker) -> None:
    items = iter(tracker)
    first = next(items)
    tracker.preserve(7)
    tracker.clear()
    assert [first, *items] == [(5, 0), (512, 0), (512, 9)]
    assert next(items, None) is None


def test_iteration_crosses_batches() -> None:
    t = Tracker()
    t.preserve_many(array.array("Q", range(0, 3000, 3)))
    t.preserve(2**52 - 1)
    assert list(t) == [*((n, 0) for n in range(0, 3000, 3)), (2**52 - 1, 0)]


def test_many_are_preserved_whole_or_not_at_all(tracker: Tracker) -> None:
    bad: list[tuple[Any, Any, Any]] = [
        (array.array("Q", [8, 2**52]), 0, errors.OutOfRangeError),
        (array.array("q", [8, -1]), 0, errors.OutOfRangeError),
        (array.array("Q", [8, 9]), 1, errors.MisalignedError),
        (array.array("Q", [8, 9]), b"\0", errors.ParameterError),
        (array.array("Q", [8, 9]), b"\0\x25", errors.OrderError),
        (array.array("i", [8, -1]), 0, errors.OutOfRangeError),
        (array.array("H", [8]), 0, TypeError),
        (array.array("Q", [8]), array.array("f", [0]), TypeError),
        ([8], 0, TypeError),
    ]
    for pfns, order, error in bad:
        with pytest.raises(error):
            tracker.preserve_many(pfns, order)
    assert len(tracker) == 3
    assert tracker.preserve_many(array.array("q", [16, 8, 8]), 3) == 2
    assert tracker.preserve_many(memoryview(array.array("Q", range(9)))[::4], order=bytes(3)) == 3


def test_numpy_arrays_of_pfns_and_orders_are_taken() -> None:
    np = pytest.importorskip("numpy")
    t = Tracker()
    assert t.preserve_many(np.arange(10)) == 10
    assert t.preserve_many(np.arange(0, 40, 4, dtype=np.uint64), np.full(10, 2, np.uint8)) == 10
    assert t.preserve_many(np.array([0]), np.uint8(9)) == 1


def test_numpy_sees_folios_without_a_copy_and_keeps_them(tracker: Tracker) -> None:
    np = pytest.importorskip("numpy")
    folios = tracker.folios()
    seen = np.asarray(folios)
    assert seen.dtype == np.dtype({"names": ["phys", "order"], "formats": ["<u8", "u1"], "itemsize": 16})
    assert not seen.flags.writeable
    assert np.shares_memory(seen, np.asarray(folios[1:]))
    tracker.clear()
    del folios
    gc.collect()
    assert seen["phys"].tolist() == [0x5000, 0x200000, 0x200000]
    assert seen["order"].tolist() == [0, 0, 9]


def test_folios_are_a_sequence(tracker: Tracker) -> None:
    folios = tracker.folios()
    pairs = [(0x5000, 0), (0x200000, 0), (0x200000, 9)]
    assert folios == pairs
    assert folios == tuple(pairs)
    assert folios == tracker.folios()
    assert folios != pairs[:2]
    assert folios != [(0x5000, 0), (0x200000, 0), (0x200000, 8)]
    assert folios != [1, 2, 3]
    assert folios != 5
    assert list(folios) == pairs
    assert all(type(f) is FolioInfo for f in folios)
    assert folios[-1].order == 9
    assert repr(folios) == "FolioArray([(0x5000, 0), (0x200000, 0), (0x200000, 9)])"
    for at in (3, -4, 2**70):
        with pytest.raises(IndexError):
            folios[at]
    with pytest.raises(TypeError):
        folios["0"]  # type: ignore[call-overload]
    for part in (slice(None), slice(1, None), slice(-2, 9), slice(2, 1), slice(None, None, -1), slice(None, None, 2)):
        assert isinstance(folios[part], FolioArray)
        assert folios[part] == pairs[part]
        assert folios[part][:1] == pairs[part][:1]


def test_folios_are_a_read_only_buffer(tracker: Tracker) -> None:
    folios = tracker.folios()
    view = memoryview(folios)
    assert (view.format, view.itemsize, view.shape, view.readonly) == ("T{Q:phys:B:order:7x}", 16, (3,), True)
    assert bytes(folios[1:2]) == (0x200000).to_bytes(8, "little") + bytes(8)
    with pytest.raises(TypeError, match="read-write"):
        io.BytesIO(bytes(48)).readinto(folios)


def test_no_prefix_of_a_pickles_state_makes_another_tracker(tracker: Tracker) -> None:
    make, args, state = tracker.__reduce__()
    for n in range(0, len(state), 7):
        t = make(*args)
        with pytest.raises((errors.ParameterError, errors.OrderError)):
            t.__setstate__(state[: n or 1])
        assert len(t) == 0
    with pytest.raises(errors.ParameterError):
        tracker.__setstate__(state)
    with pytest.raises(TypeError):
        Tracker().__setstate__("text")  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_hostile_state_only_raises(garbage: bytes) -> None:
    t = Tracker(4096, 512)
    try:
        t.__setstate__(b"khot\x01" + garbage)
    except errors.KhoError:
        assert len(t) == 0


def test_threads_may_share_trackers_and_combine_them_both_ways() -> None:
    a, b = Tracker(), Tracker()

    def work(mine: Tracker, other: Tracker, base: int) -> None:
        for n in range(300):
            mine.preserve(base + n)
            mine |= other
            assert base + n in mine

    threads = [threading.Thread(target=work, args=args) for args in [(a, b, 0), (b, a, 1000), (a, b, 2000)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(a | b) == 900


def test_a_sparse_tracker_is_small() -> None:
    t = Tracker()
    assert t.nbytes < 4096, "less than a bitmap"
    t.preserve(2**52 - 1)
    t.preserve(0)
    assert t.nbytes < 16384
    assert t.stats()[0]["blocks"] == 2
