//! Checks a map by runs and ranges: time is proportional to the map's size, not to the number of folios.
//! What each finding means, and what hangs off the map, is judged in Python (`python/kho/verify.py`).

#![forbid(unsafe_code)]

use crate::filter::Absent;
use crate::memory::PhysRange;
use crate::parallel::{join, processors};
use crate::payload::Memfd;
use crate::read::incoming::Incoming;
use crate::scratch::ranges_of;
use crate::tracker::Tracker;
use crate::units::{Order, PageSize, Pfn, Phys};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A place where something is wrong: `pages` from `phys`, in a folio of `order`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spot {
    /// The first address.
    pub phys: Phys,
    /// The number of pages.
    pub pages: u64,
    /// The order of the folio.
    pub order: Order,
    /// What it clashes with: an address or an order, by the check.
    pub other: u64,
}

/// The first places where one check found something, and how many there are in all.
#[derive(Clone, Debug)]
pub struct Hits {
    /// The first places.
    pub spots: Vec<Spot>,
    /// The number of all places.
    pub count: u64,
    most: usize,
}

impl Hits {
    fn new(most: usize) -> Self {
        Hits { spots: Vec::new(), count: 0, most }
    }

    fn add(&mut self, spot: Spot) {
        self.add_with(|| spot);
    }

    /// As [`Hits::add`], of a spot that takes a search to describe.
    fn add_with(&mut self, spot: impl FnOnce() -> Spot) {
        self.count += 1;
        if self.spots.len() < self.most {
            self.spots.push(spot());
        }
    }
}

/// Memory of a NUMA node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeRange {
    /// The first address.
    pub start: Phys,
    /// The number of bytes.
    pub len: u64,
    /// The NUMA node.
    pub node: u32,
}

/// What a map was checked for.
#[derive(Clone, Debug)]
pub struct Checks {
    /// Pages in two folios; `other` is the order of the other one.
    pub overlapping: Hits,
    /// Preserved pages in scratch, by run; `other` is the area's address.
    pub in_scratch: Hits,
    /// Preserved ranges that the memory does not have.
    pub outside: Hits,
    /// Nodes of the map in scratch; `other` is the area's address.
    pub nodes_in_scratch: Hits,
    /// Nodes of the map that a preserved folio covers; `other` is the folio's address.
    pub nodes_preserved: Hits,
    /// Folios on two NUMA nodes; `other` is the address where the second begins.
    pub spanning: Hits,
    /// Orders with bitmaps that have no bit set: how many, of how many.
    pub empty: Vec<(Order, u64, u64)>,
}

/// Folios that take longer to look at than a thread takes to start.
const BYTES_PER_THREAD: u64 = 1 << 16;

/// Checks a handover's map against itself, its memory, its scratch areas and, if there are any, NUMA nodes. `most` bounds
/// the places listed for each check.
pub fn check(incoming: &Incoming, numa: &[NodeRange], most: usize) -> Checks {
    let tracker = incoming.preserved();
    let page = tracker.geometry().page();
    let scratch = ranges_of(incoming.scratch().unwrap_or_default());
    let overlapping = || overlapping(tracker, page, most);
    // The two halves take about as long: each looks at every run.
    let rest = || {
        let in_scratch = in_scratch(tracker, &scratch, page, most);
        let outside = outside(tracker, incoming.memory().ranges(), page, most);
        (in_scratch, outside, check_nodes(incoming, &scratch, page, most))
    };
    let worth_a_thread = tracker.len() >= BYTES_PER_THREAD && processors() > 1;
    let (overlapping, rest) = if worth_a_thread { join(overlapping, rest) } else { (overlapping(), rest()) };
    let (in_scratch, outside, (nodes_in_scratch, nodes_preserved)) = rest;
    let stats = tracker.stats().into_iter().filter(|s| s.empty_blocks > 0);
    Checks {
        overlapping,
        in_scratch,
        outside,
        nodes_in_scratch,
        nodes_preserved,
        spanning: spanning(tracker, numa, page, most),
        empty: stats.map(|s| (s.order, s.empty_blocks, s.blocks)).collect(),
    }
}

/// How much of what a handover preserves is not in its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lost {
    /// Preserved pages that are not in the file, or not whole, by reason ([`Absent::ALL`]).
    pub pages: [u64; 2],
    /// Folios whose second page alone was left out.
    pub second_pages: u64,
}

/// Counts what a handover's memory lacks of what it preserves.
pub fn lost(incoming: &Incoming) -> Lost {
    let mut lost = Lost::default();
    let (tracker, memory) = (incoming.preserved(), incoming.memory());
    let page = tracker.geometry().page();
    for (at, why) in Absent::ALL.into_iter().enumerate() {
        let ranges: Vec<_> =
            memory.absences().iter().filter(|absence| absence.why == why).map(|absence| absence.range).collect();
        if ranges.is_empty() {
            continue;
        }
        for (start, end) in tracker.extents() {
            for (low, high, _) in touching(page, &ranges, start, end) {
                lost.pages[at] += high.0 - low.0;
                if why == Absent::LeftOut && high.0 - low.0 == 1 {
                    let folio = tracker.covering(low).filter(|(head, order)| order.get() > 0 && low.0 == head.0 + 1);
                    lost.second_pages += u64::from(folio.is_some());
                }
            }
        }
    }
    lost
}

/// A run of consecutive folios of one order, as pages `[start, end)`.
pub(crate) type Run = (Pfn, Pfn, Order);

/// Every run by address.
pub(crate) fn runs_by_address(tracker: &Tracker) -> impl Iterator<Item = Run> + '_ {
    let mut runs: Vec<_> = tracker.orders().map(|order| (order, tracker.runs(order))).collect();
    let mut heads = BinaryHeap::new();
    let key = |i: usize, order: Order, (pfn, n): (Pfn, u64)| Reverse((pfn.0, pfn.0 + (n << order.get()), i));
    for (i, (order, run)) in runs.iter_mut().enumerate() {
        heads.extend(run.next().map(|run| key(i, *order, run)));
    }
    core::iter::from_fn(move || {
        let Reverse((start, end, i)) = heads.pop()?;
        let (order, run) = &mut runs[i];
        heads.extend(run.next().map(|run| key(i, *order, run)));
        Some((Pfn(start), Pfn(end), *order))
    })
}

/// The parts of pages `[start, end)` that touch one of the sorted, disjoint `ranges`: none twice, with the range.
fn touching(
    page: PageSize,
    ranges: &[PhysRange],
    start: Pfn,
    end: Pfn,
) -> impl Iterator<Item = (Pfn, Pfn, PhysRange)> + '_ {
    let first = page.phys(start).0;
    let last = page.phys(Pfn(end.0 - 1)).0 | (page.bytes() - 1);
    let from = ranges.partition_point(|r| r.start.0 + (r.len.max(1) - 1) < first);
    let mut done = start.0;
    let near = ranges[from..].iter().take_while(move |r| r.start.0 <= last).filter(|r| r.len > 0);
    near.filter_map(move |r| {
        let low = page.pfn(Phys(r.start.0.max(first))).0.max(done);
        let high = page.pfn(Phys((r.start.0 + (r.len - 1)).min(last))).0 + 1;
        done = done.max(high);
        (low < high).then_some((Pfn(low), Pfn(high), *r))
    })
}

fn overlapping(tracker: &Tracker, page: PageSize, most: usize) -> Hits {
    let mut hits = Hits::new(most);
    let mut reach: Option<(Pfn, Order)> = None;
    for (start, end, order) in runs_by_address(tracker) {
        match reach {
            Some((until, other)) if start < until => {
                let pages = until.min(end).0 - start.0;
                hits.add(Spot { phys: page.phys(start), pages, order, other: other.get().into() });
                if end > until {
                    reach = Some((end, order));
                }
            }
            _ => reach = Some((end, order)),
        }
    }
    hits
}

fn in_scratch(tracker: &Tracker, scratch: &[PhysRange], page: PageSize, most: usize) -> Hits {
    let mut hits = Hits::new(most);
    if scratch.is_empty() {
        return hits;
    }
    for (start, end, order) in runs_by_address(tracker) {
        for (low, high, area) in touching(page, scratch, start, end) {
            let head = Pfn(low.0 & !(order.nr_pages() - 1));
            hits.add(Spot { phys: page.phys(head), pages: high.0 - low.0, order, other: area.start.0 });
        }
    }
    hits
}

fn outside(tracker: &Tracker, ranges: &[PhysRange], page: PageSize, most: usize) -> Hits {
    let mut hits = Hits::new(most);
    for (start, end) in tracker.extents() {
        let mut at = start;
        let mut gap = |from: Pfn, to: Pfn| {
            if from < to {
                hits.add_with(|| {
                    let order = tracker.covering(from).map_or(Order::ZERO, |(_, order)| order);
                    Spot { phys: page.phys(from), pages: to.0 - from.0, order, other: 0 }
                });
            }
        };
        for (low, high, _) in touching(page, ranges, start, end) {
            gap(at, low);
            at = high;
        }
        gap(at, end);
    }
    hits
}

fn check_nodes(incoming: &Incoming, scratch: &[PhysRange], page: PageSize, most: usize) -> (Hits, Hits) {
    let (mut inside, mut preserved) = (Hits::new(most), Hits::new(most));
    for node in incoming.map_nodes().iter().filter(|node| node.len > 0) {
        let (start, last) = (page.pfn(node.start), page.pfn(Phys(node.start.0 + (node.len - 1))));
        let spot = |order, other| Spot { phys: node.start, pages: 1, order, other };
        let next = scratch.partition_point(|r| r.start.0 + (r.len - 1) < node.start.0);
        if let Some(area) = scratch.get(next).filter(|r| r.start.0 <= node.start.0 + (node.len - 1)) {
            inside.add(spot(Order::ZERO, area.start.0));
        }
        if let Some((head, order)) = incoming.preserved().overlapping(start, Pfn(last.0 + 1)) {
            preserved.add(spot(order, page.phys(head).0));
        }
    }
    (inside, preserved)
}

/// Of the folios around a place where one node's memory ends and another's begins, those that have both.
fn spanning(tracker: &Tracker, numa: &[NodeRange], page: PageSize, most: usize) -> Hits {
    let mut hits = Hits::new(most);
    let mut ranges: Vec<&NodeRange> = numa.iter().filter(|r| r.len > 0).collect();
    ranges.sort_unstable_by_key(|r| r.start);
    for pair in ranges.windows(2) {
        let [before, after] = pair else { continue };
        if before.node == after.node {
            continue;
        }
        let (boundary, last) = (page.pfn(after.start), page.pfn(Phys(before.start.0.saturating_add(before.len - 1))));
        for order in tracker.orders() {
            let head = Pfn(boundary.0 & !(order.nr_pages() - 1));
            if head < boundary && head <= last && tracker.contains(head, order) {
                let pages = order.nr_pages();
                hits.add(Spot { phys: page.phys(head), pages, order, other: after.start.0 });
            }
        }
    }
    hits
}

/// What is wrong with a memfd's list of folios: (place in the file in pages, address of the folio) of the first, and how
/// many there are.
#[derive(Clone, Debug, Default)]
pub struct MemfdChecks {
    /// Folios at a place of the file that another one has.
    pub duplicated: (Vec<(u64, Phys)>, u64),
    /// Folios that begin past the end of the file.
    pub beyond: (Vec<(u64, Phys)>, u64),
    /// Folios whose address is inside a preserved folio: only its head can be restored.
    pub interior: (Vec<(u64, Phys)>, u64),
    /// Folios beyond the address space, whose address is none; given modulo 2^64.
    pub nowhere: (Vec<(u64, Phys)>, u64),
}

/// Checks a memfd's folios against each other, its size and what is preserved.
pub fn check_memfd(memfd: &Memfd, preserved: &Tracker, most: usize) -> MemfdChecks {
    let page = memfd.list.page;
    let mut checks = MemfdChecks::default();
    let add = |(spots, count): &mut (Vec<(u64, Phys)>, u64), index: u64, pfn: Pfn| {
        *count += 1;
        if spots.len() < most {
            spots.push((index, Phys(pfn.0.wrapping_shl(page.shift()))));
        }
    };
    let pages = memfd.size.div_ceil(page.bytes());
    let mut places = Vec::with_capacity(memfd.folios.len());
    for folio in &memfd.folios {
        if folio.index >= pages {
            add(&mut checks.beyond, folio.index, folio.pfn());
        }
        let order = preserved.head_order(folio.pfn());
        if folio.pfn().0 >= page.pfn_limit() {
            add(&mut checks.nowhere, folio.index, folio.pfn());
        } else if order.is_none() && preserved.covering(folio.pfn()).is_some() {
            add(&mut checks.interior, folio.index, folio.pfn());
        }
        places.push((folio.index, order.unwrap_or_default().nr_pages(), folio.pfn()));
    }
    places.sort_unstable();
    let mut until = 0;
    for (index, nr_pages, pfn) in places {
        if index < until {
            add(&mut checks.duplicated, index, pfn);
        }
        until = until.max(index.saturating_add(nr_pages));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::ScratchArea;
    use crate::tracker::Geometry;

    const PAGE: PageSize = PageSize::Size4K;

    fn tracker(folios: &[(u64, u64)]) -> Tracker {
        let mut t = Tracker::new(Geometry::paged(PAGE));
        for &(pfn, order) in folios {
            t.preserve(Pfn(pfn), Order::new(order).unwrap()).unwrap();
        }
        t
    }

    fn spots(hits: &Hits) -> Vec<(u64, u64, u32, u64)> {
        hits.spots.iter().map(|s| (s.phys.0, s.pages, s.order.get(), s.other)).collect()
    }

    #[test]
    fn runs_come_by_address_whatever_their_order() {
        let t = tracker(&[(8, 3), (16, 3), (2, 1), (3, 0), (40, 0)]);
        let runs: Vec<_> = runs_by_address(&t).map(|(a, b, o)| (a.0, b.0, o.get())).collect();
        assert_eq!(runs, [(2, 4, 1), (3, 4, 0), (8, 24, 3), (40, 41, 0)]);
    }

    #[test]
    fn pages_in_two_folios_are_found_also_behind_a_shorter_run() {
        let t = tracker(&[(0, 4), (1, 0), (4, 1), (32, 0)]);
        assert_eq!(spots(&overlapping(&t, PAGE, 9)), [(0x1000, 1, 0, 4), (0x4000, 2, 1, 4)]);
        let none = overlapping(&tracker(&[(0, 4), (16, 0)]), PAGE, 9);
        assert_eq!((none.count, none.spots.len()), (0, 0));
    }

    #[test]
    fn more_places_than_asked_for_are_counted_and_not_listed() {
        let t = tracker(&[(0, 4), (1, 0), (4, 0), (8, 0)]);
        let hits = overlapping(&t, PAGE, 1);
        assert_eq!((hits.count, hits.spots.len()), (3, 1));
    }

    #[test]
    fn a_folio_that_reaches_into_scratch_is_named_by_its_head() {
        let areas =
            ranges_of(&[ScratchArea { addr: 0x8000, size: 0x2000 }, ScratchArea { addr: 0x9000, size: 0x3000 }]);
        assert_eq!(areas, [PhysRange { start: Phys(0x8000), len: 0x4000 }]);
        let t = tracker(&[(0, 4), (12, 0), (64, 0)]);
        assert_eq!(spots(&in_scratch(&t, &areas, PAGE, 9)), [(0, 4, 4, 0x8000)]);
    }

    #[test]
    fn what_the_memory_lacks_is_given_as_gaps() {
        let ranges = [PhysRange { start: Phys(0x1000), len: 0x1000 }, PhysRange { start: Phys(0x3000), len: 0x1000 }];
        let t = tracker(&[(0, 2), (8, 0)]);
        let gaps = spots(&outside(&t, &ranges, PAGE, 9));
        assert_eq!(gaps, [(0, 1, 2, 0), (0x2000, 1, 2, 0), (0x8000, 1, 0, 0)]);
    }

    #[test]
    fn a_folio_with_memory_of_two_nodes_is_found_and_one_that_ends_at_the_boundary_is_not() {
        let numa = [
            NodeRange { start: Phys(0x8000), len: 0x8000, node: 1 },
            NodeRange { start: Phys(0), len: 0x8000, node: 0 },
        ];
        assert_eq!(spots(&spanning(&tracker(&[(0, 4)]), &numa, PAGE, 9)), [(0, 16, 4, 0x8000)]);
        assert_eq!(spanning(&tracker(&[(0, 3), (8, 3)]), &numa, PAGE, 9).count, 0);
        let same = numa.map(|r| NodeRange { node: 0, ..r });
        assert_eq!(spanning(&tracker(&[(0, 4)]), &same, PAGE, 9).count, 0);
    }
}
