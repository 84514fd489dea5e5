"""Arena, outgoing and incoming against a plain-Python model, over many handovers, also through a memfd."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kho

import model
from adapters import ArenaMemory
from images import overlap

Range = tuple[int, int]
"""(first pfn, number of pages)"""

REGIONS: list[Range] = [(0, 4200), (32700, 140), (1 << 24, 1 << 20)]
"""Pages: around the edge of a small bitmap (4096 folios), of a page of 4 KiB (32768), and room for gigantic folios."""
SCRATCH: list[Range] = [(2048, 256), (32704, 16)]
EDGES = [1, 2047, 2304, 4094, 4095, 4096, 4097, 4199, 32703, 32720, 32766, 32767, 32768, 32839]
BIG = [1 << 24, (1 << 24) + 4096, (1 << 24) + (1 << 18), (1 << 24) + (1 << 19)]
NAMES = ["LUO", "memblock", "producer"]

pfns = st.one_of(st.sampled_from(EDGES), st.sampled_from(BIG), st.integers(0, 4300), st.integers(32690, 32850))
orders = st.one_of(st.integers(0, 3), st.integers(0, 10), st.integers(11, 20))
picks = st.integers(0, 2**16)


def pages_of(folio: tuple[int, int]) -> Range:
    """The pages of (pfn, order)."""
    return folio[0], 1 << folio[1]


class Handovers(RuleBasedStateMachine):
    """Owners of one memory, one after the other."""

    arena: kho.Arena
    out: kho.Outgoing

    @initialize(
        shape=st.sampled_from([(4096, 512), (4096, 4096), (16384, 512), (16384, 16384), (65536, 512), (65536, 65536)]),
        backing=st.sampled_from([None, "memfd"]),
    )
    def boot(self, shape: tuple[int, int], backing: str | None) -> None:
        self.page, self.bitmap_bytes = shape
        self.backing = backing
        self.arena = kho.Arena(
            [(start * self.page, n * self.page) for start, n in REGIONS],
            page_size=self.page,
            max_page_order=10,
            backing=backing,
            scratch=[(start * self.page, n * self.page) for start, n in SCRATCH],
        )
        self.stamps: dict[int, bytes] = {}
        """What was written at the beginning of a page, by pfn, since it was allocated."""
        self.inherited: set[tuple[int, int]] = set()
        self.restored: set[tuple[int, int]] = set()
        self.incoming: kho.Incoming | None = None
        self.serial = 0
        self.begin()

    def begin(self) -> None:
        """A new owner starts to hand over."""
        self.held: dict[int, tuple[int, int]] = {}
        """Folios allocated by the model: pfn to (order, references)."""
        self.out = kho.Outgoing(self.arena, bitmap_bytes=self.bitmap_bytes)
        self.tracker = model.ModelTracker(self.page, self.bitmap_bytes)
        self.own: dict[str, tuple[int, int]] = {"": (self.out.fdt_phys // self.page, 0)}
        self.ranges: list[Range] = []
        self.tracker.preserve(*self.own[""])
        self.finalized = False

    # What the model says of memory

    def unrestored(self) -> list[Range]:
        return [pages_of(folio) for folio in self.inherited - self.restored]

    def taken(self) -> list[Range]:
        """Everything that is not free, as far as the model knows: the map's own pages it does not."""
        folios = [(pfn, 1 << order) for pfn, (order, _) in self.held.items()] + [pages_of(f) for f in self.own.values()]
        return folios + self.unrestored() + SCRATCH + [(0, 1)]

    def inside(self, pfn: int, n: int) -> bool:
        return any(start <= pfn and pfn + n <= start + length for start, length in REGIONS)

    def room(self, order: int) -> bool:
        """Whether there is a free block of this order. Of the pages of the map the arena alone knows."""
        n = 1 << order
        for start, length in REGIONS:
            at = -(-start // n) * n
            while at + n <= start + length:
                ends = [first + m for first, m in self.taken() if first < at + n and at < first + m]
                if not ends and all(self.arena.page(pfn * self.page).state == "free" for pfn in range(at, at + n)):
                    return True
                at = max([at + n, *(-(-end // n) * n for end in ends)])
        return False

    def allocated(self, pfn: int, n: int) -> bool:
        """Whether the model knows that all these pages are allocated."""
        held = [(at, 1 << order) for at, (order, _) in self.held.items()] + [pages_of(f) for f in self.own.values()]
        return sum(min(at + m, pfn + n) - max(at, pfn) for at, m in held if at < pfn + n and pfn < at + m) == n

    def stamp(self, pfn: int, n: int) -> None:
        self.serial += 1
        for at in {pfn, pfn + n // 2, pfn + n - 1}:
            self.stamps[at] = self.serial.to_bytes(4, "little") + at.to_bytes(8, "little")
            self.arena.write(at * self.page, self.stamps[at])

    def check_stamps(self, pfn: int, n: int) -> None:
        for at, raw in self.stamps.items():
            if pfn <= at < pfn + n:
                assert self.arena.read(at * self.page, len(raw)) == raw

    def forget(self, pfn: int, n: int) -> None:
        self.stamps = {at: raw for at, raw in self.stamps.items() if not pfn <= at < pfn + n}

    def take(self, folio: kho.Folio, order: int) -> None:
        """The arena gave out a folio: it must have been free."""
        assert (folio.order, folio.nbytes) == (order, self.page << order)
        assert folio.pfn % (1 << order) == 0
        assert self.inside(folio.pfn, 1 << order)
        assert not overlap(folio.pfn, 1 << order, self.taken())
        self.held[folio.pfn] = (order, 1)
        self.forget(folio.pfn, 1 << order)
        self.stamp(folio.pfn, 1 << order)
        view = memoryview(folio)
        assert bytes(view[:12]) == self.stamps[folio.pfn]

    def pick(self, n: int) -> int:
        return sorted(self.held)[n % len(self.held)]

    def change(self, change: Callable[[], Any]) -> Any:
        """Makes a change to the handover; False if it is closed."""
        if not self.finalized:
            return change()
        with pytest.raises(kho.FinalizedError):
            change()
        return None

    # Allocation

    @rule(order=orders, gigantic=st.booleans())
    def alloc(self, order: int, gigantic: bool) -> None:
        if order > 10 and not gigantic:
            with pytest.raises(kho.OrderError):
                self.arena.alloc(order)
            return
        try:
            folio = self.arena.alloc(order, gigantic=gigantic)
        except kho.OutOfMemoryError:
            assert order > 10 or not self.room(order)
            return
        self.take(folio, order)

    @rule(pfn=pfns, order=orders)
    def alloc_at(self, pfn: int, order: int) -> None:
        pfn -= pfn % (1 << order)
        n = 1 << order
        if not self.inside(pfn, n) or overlap(pfn, n, self.taken()):
            with pytest.raises((kho.PageStateError, kho.OutsideMemoryError)):
                self.arena.alloc_at(pfn * self.page, order)
            return
        try:
            folio = self.arena.alloc_at(pfn * self.page, order)
        except kho.PageStateError as error:
            at = int(str(error).split()[2], 16)
            assert pfn <= at // self.page < pfn + n
            assert self.arena.page(at).state in {"head", "reserved"}, (
                "only a map itself, which the model does not know, is in the way: one being made, or one taken over"
            )
            assert not overlap(at // self.page, 1, self.taken())
            return
        self.take(folio, order)

    @precondition(lambda self: self.held)
    @rule(n=picks)
    def get(self, n: int) -> None:
        pfn = self.pick(n)
        order, count = self.held[pfn]
        assert self.arena.folio(pfn * self.page).get() == count + 1
        self.held[pfn] = (order, count + 1)

    @precondition(lambda self: self.held)
    @rule(n=picks)
    def free(self, n: int) -> None:
        pfn = self.pick(n)
        order, count = self.held[pfn]
        if count > 1:
            assert self.arena.free(pfn * self.page) is False
            self.held[pfn] = (order, count - 1)
        elif overlap(pfn, 1 << order, [pages_of(folio) for folio in self.tracker.marked]):
            with pytest.raises(kho.PageStateError, match="preserved"):
                self.arena.free(pfn * self.page)
        else:
            assert self.arena.free(pfn * self.page) is True
            del self.held[pfn]
            self.forget(pfn, 1 << order)
            with pytest.raises((kho.PageStateError, kho.OutsideMemoryError)):
                self.arena.free(pfn * self.page)

    # Handing over

    @precondition(lambda self: self.held)
    @rule(n=picks, undo=st.booleans())
    def preserve_folio(self, n: int, undo: bool) -> None:
        pfn = self.pick(n)
        order, _ = self.held[pfn]
        folio = self.arena.folio(pfn * self.page)
        if undo:
            changed = self.change(lambda: self.out.unpreserve_folio(folio))
            assert changed is None or changed == self.tracker.unpreserve(pfn, order)
        else:
            changed = self.change(lambda: self.out.preserve_folio(folio))
            assert changed is None or changed == self.tracker.preserve(pfn, order)

    @precondition(lambda self: self.held)
    @rule(n=picks, skip=picks, length=st.one_of(st.integers(1, 9), st.integers(1, 5000)), undo=st.booleans())
    def preserve_pages(self, n: int, skip: int, length: int, undo: bool) -> None:
        pfn = self.pick(n)
        pages = 1 << self.held[pfn][0]
        start = pfn + skip % pages
        length = min(length, pfn + pages - start)
        phys = start * self.page
        if undo:
            changed = self.change(lambda: self.out.unpreserve_pages(phys, length))
            assert changed is None or changed == self.tracker.unpreserve_pages(start, length)
            return
        changed = self.change(lambda: self.out.preserve_pages(phys, length))
        if changed is not None:
            assert changed == self.tracker.preserve_pages(start, length)
            self.ranges.append((start, length))

    @precondition(lambda self: not self.finalized)
    @rule(pfn=pfns, order=orders)
    def preserve_anything(self, pfn: int, order: int) -> None:
        """Only what is allocated, and not in scratch."""
        pfn -= pfn % (1 << order)
        n = 1 << order
        if overlap(pfn, n, SCRATCH):
            with pytest.raises(kho.ScratchOverlapError):
                self.out.preserve_folio(pfn * self.page, order)
        elif self.allocated(pfn, n):
            assert self.out.preserve_folio(pfn * self.page, order) == self.tracker.preserve(pfn, order)
        elif overlap(pfn, n, [(0, 1), *self.unrestored()]) or not self.inside(pfn, n):
            with pytest.raises((kho.PageStateError, kho.OutsideMemoryError)):
                self.out.preserve_folio(pfn * self.page, order)

    @rule(name=st.sampled_from(NAMES), size=st.sampled_from([0, 1, 300, 4096, 70000]))
    def add_subtree(self, name: str, size: int) -> None:
        blob = name.encode() * (size // len(name) + 1)
        if name in self.own and not self.finalized:
            with pytest.raises(kho.ExistsError):
                self.out.add_subtree(name, blob)
            return
        phys = self.change(lambda: self.out.add_subtree(name, blob))
        if phys is not None:
            order = (-(-len(blob) // self.page) - 1).bit_length()
            pfn = phys // self.page
            assert not overlap(pfn, 1 << order, self.taken())
            self.own[name] = (pfn, order)
            self.tracker.preserve(pfn, order)
            self.forget(pfn, 1 << order)
            assert self.arena.read(phys, len(blob)) == blob
            self.stamps[pfn] = blob[: self.page]

    @rule(name=st.sampled_from(NAMES))
    def remove_subtree(self, name: str) -> None:
        if name not in self.own and not self.finalized:
            with pytest.raises(kho.NotFoundError):
                self.out.remove_subtree(name)
            return
        if not self.finalized:
            others = [pages_of(folio) for folio in self.tracker.marked if folio != self.own[name]]
            if overlap(*pages_of(self.own[name]), others):
                with pytest.raises(kho.PageStateError):
                    self.out.remove_subtree(name)
                return
        self.change(lambda: self.out.remove_subtree(name))
        if not self.finalized:
            folio = self.own.pop(name)
            self.tracker.unpreserve(*folio)
            self.forget(*pages_of(folio))

    @rule()
    def serialize(self) -> None:
        blob = self.out.serialize()
        root = model.read_fdt(blob)
        assert model.write_fdt(root) == blob == self.arena.read(self.out.fdt_phys, len(blob))
        memory = ArenaMemory(self.arena)
        folios, metadata = model.read_v1(memory, root.int("preserved-memory-map"), self.page, self.bitmap_bytes)
        assert folios == self.tracker.folios() == list(self.out.folios())
        assert {name: node.int("fdt") // self.page for name, node in root.children.items()} == {
            name: pfn for name, (pfn, _) in self.own.items() if name
        }
        assert not any(overlap(phys // self.page, 1, self.taken()) for phys in metadata)

    @rule()
    def finalize(self) -> None:
        self.change(self.out.finalize)
        self.finalized = True
        assert self.arena.fdt_phys == self.out.fdt_phys

    @rule()
    def abort(self) -> None:
        if self.finalized:
            self.out.abort()
            self.finalized = False
        else:
            with pytest.raises(kho.FinalizedError):
                self.out.abort()

    # Taking over

    @precondition(lambda self: self.finalized)
    @rule(shape=st.booleans(), through_fd=st.booleans())
    def take_over(self, shape: bool, through_fd: bool) -> None:
        expected = self.tracker.folios()
        self.inherited = set(self.tracker.marked)
        if through_fd and self.backing:
            self.arena = kho.Arena.open(self.arena.fileno())
        # Folios that share pages speak for another size of bitmaps, as no sane owner makes them: then it is given.
        shared = not all(map(self.alone, self.tracker.marked))
        self.incoming = kho.Incoming(self.arena, bitmap_bytes=self.bitmap_bytes if shared else None)
        assert list(self.incoming.folios) == expected == list(self.incoming.unrestored())
        assert self.incoming.scratch == self.arena.scratch
        subtrees = {name: sub.phys // self.page for name, sub in self.incoming.subtrees.items()}
        assert subtrees == {name: pfn for name, (pfn, _) in self.own.items() if name}
        self.restored = set()
        self.inherited_ranges = self.ranges
        if shape:
            self.bitmap_bytes = 512 if self.bitmap_bytes == self.page else self.page
        self.stamps = {at: raw for at, raw in self.stamps.items() if overlap(at, 1, self.unrestored())}
        self.begin()

    def alone(self, folio: tuple[int, int]) -> bool:
        """Whether no other inherited folio shares a page with it, as a sane owner sees to."""
        return not overlap(*pages_of(folio), [pages_of(other) for other in self.inherited - {folio}])

    @precondition(lambda self: self.inherited)
    @rule(n=picks)
    def restore_folio(self, n: int) -> None:
        assert self.incoming
        pfn, order = folio = sorted(self.inherited)[n % len(self.inherited)]
        if folio in self.restored:
            with pytest.raises(kho.NotRestorableError, match="restored before"):
                self.incoming.restore_folio(pfn * self.page)
        elif self.alone(folio):
            got = self.incoming.restore_folio(pfn * self.page)
            assert (got.pfn, got.order, got.refcount) == (pfn, order, 1)
            self.check_stamps(pfn, 1 << order)
            self.restored.add(folio)
            self.held[pfn] = (order, 1)
            if order:
                with pytest.raises(kho.NotRestorableError):
                    self.incoming.restore_folio((pfn + 1) * self.page)

    @precondition(lambda self: self.inherited)
    @rule(ns=st.lists(picks, max_size=5), extra=st.one_of(st.none(), pfns))
    def restore_many(self, ns: list[int], extra: int | None) -> None:
        assert self.incoming
        folios = [sorted(self.inherited)[n % len(self.inherited)] for n in ns]
        folios = [folio for folio in folios if self.alone(folio)]
        heads = [pfn for pfn, _ in folios] + [extra for _ in (0,) if extra is not None]
        good = len(set(heads)) == len(heads) == len(folios) and not self.restored & set(folios)
        phys = array("Q", [pfn * self.page for pfn in heads])
        if good:
            assert list(self.incoming.restore_many(phys)) == [order for _, order in folios]
            self.restored |= set(folios)
            self.held |= {pfn: (order, 1) for pfn, order in folios}
        elif extra is None or not any(extra == head for head, _ in self.inherited):
            with pytest.raises(kho.NotRestorableError):
                self.incoming.restore_many(phys)

    @precondition(lambda self: self.inherited and self.inherited_ranges)
    @rule(n=picks)
    def restore_pages(self, n: int) -> None:
        assert self.incoming
        start, length = self.inherited_ranges[n % len(self.inherited_ranges)]
        blocks = set(model.greedy_split(start, length))
        if not blocks <= self.inherited or blocks & self.restored:
            with pytest.raises(kho.NotRestorableError):
                self.incoming.restore_pages(start * self.page, length)
        elif all(self.alone(block) for block in blocks):
            pages = self.incoming.restore_pages(start * self.page, length)
            assert (pages.pfn, pages.nr_pages) == (start, length)
            self.check_stamps(start, length)
            self.restored |= blocks
            self.held |= dict.fromkeys(range(start, start + length), (0, 1))

    @precondition(lambda self: self.incoming)
    @rule(pfn=pfns)
    def restore_anything(self, pfn: int) -> None:
        assert self.incoming
        if not any(pfn == head for head, _ in self.inherited):
            with pytest.raises(kho.NotRestorableError):
                self.incoming.restore_folio(pfn * self.page)

    @invariant()
    def what_is_counted_is_what_there_is(self) -> None:
        if hasattr(self, "tracker"):
            assert self.out.nr_folios == len(self.tracker.marked)
            assert self.out.finalized == self.finalized
            if self.incoming:
                assert self.incoming.nr_restored == len(self.restored)
                assert len(self.incoming.unrestored()) == len(self.inherited) - len(self.restored)

    def teardown(self) -> None:
        if hasattr(self, "tracker"):
            for at, raw in self.stamps.items():
                assert self.arena.read(at * self.page, len(raw)) == raw


TestHandovers = Handovers.TestCase
TestHandovers.settings = settings(
    settings.get_profile("quick"),
    max_examples=100,
    stateful_step_count=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
