//! Attributes each preserved page to its owner: joins byte ranges that owners claim with the map: pages that are
//! claimed and preserved, pages without a claim, pages that are claimed and not preserved.

#![forbid(unsafe_code)]

use crate::payload::{Memfd, Vmalloc};
use crate::read::verify::Run;
use crate::tracker::Tracker;
use crate::units::{Order, PageSize, Pfn, Phys};

/// A claim on bytes `first..=last`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Claim {
    first: u64,
    last: u64,
    owner: u32,
    /// Where in its file or area the first byte is.
    offset: Offset,
}

/// A place in a file or area, if there is one, in eight bytes: there may be millions of claims.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Offset(u64);

impl Offset {
    const NONE: u64 = u64::MAX;

    fn new(offset: Option<u64>) -> Self {
        Offset(offset.unwrap_or(Self::NONE))
    }

    fn get(self) -> Option<u64> {
        Some(self.0).filter(|offset| *offset != Self::NONE)
    }
}

/// What was claimed so far; owners are numbers that mean something to the caller.
#[derive(Clone, Debug, Default)]
pub struct Claims(Vec<Claim>);

impl Claims {
    /// Claims `len` bytes from `phys`; what reaches beyond the address space ends there.
    pub fn range(&mut self, owner: u32, phys: Phys, len: u64, offset: Option<u64>) {
        if let Some(more) = len.checked_sub(1) {
            self.0.push(Claim { first: phys.0, last: phys.0.saturating_add(more), owner, offset: Offset::new(offset) });
        }
    }

    /// Claims an area's blocks for `owner`, and the chunks that list them for `chunks`.
    pub fn vmalloc(&mut self, owner: u32, chunks: u32, area: &Vmalloc) {
        let block = area.page.folio_bytes(area.order);
        for (n, phys) in (0u64..).zip(&area.blocks) {
            self.range(owner, *phys, block, n.checked_mul(block));
        }
        for phys in &area.chunks {
            self.range(chunks, *phys, area.page.bytes(), None);
        }
    }

    /// Claims a file's folios, each as large as it was preserved; not those beyond the address space.
    pub fn memfd(&mut self, owner: u32, file: &Memfd, preserved: &Tracker) {
        let page = file.list.page;
        self.0.reserve_exact(file.folios.len());
        let numbered = file.folios.iter().enumerate();
        for (n, folio) in numbered.filter(|(_, folio)| folio.pfn().0 < page.pfn_limit()) {
            let len = page.folio_bytes(file.order(preserved, n));
            self.range(owner, page.phys(folio.pfn()), len, folio.index.checked_mul(page.bytes()));
        }
    }
}

/// Consecutive pages of one owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// The first address.
    pub phys: Phys,
    /// The number of pages.
    pub pages: u64,
    /// The orders of the folios that hold them, as bits.
    pub orders: u64,
    /// `None` for pages without a claim.
    pub owner: Option<u32>,
    offset: Offset,
    /// Unclaimed pages after claimed ones in the same folio.
    pub rest: bool,
}

impl Row {
    /// Where in the owner's file or area the first page is.
    pub fn offset(&self) -> Option<u64> {
        self.offset.get()
    }
}

/// Bytes that two owners claim.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shared {
    /// The first address.
    pub phys: Phys,
    /// The number of bytes.
    pub len: u64,
    /// The two owners, by their number.
    pub owners: (u32, u32),
}

/// Every preserved page with its owner, and what does not fit.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    /// All preserved pages, by address.
    pub rows: Vec<Row>,
    /// Claimed pages that are not preserved.
    pub unpreserved: Vec<Row>,
    /// Bytes that two owners claim.
    pub shared: Vec<Shared>,
    /// What there is more of, of each, than `most` allowed to list.
    pub more: More,
}

/// What is not listed, since there is too much of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct More {
    /// Rows of claimed pages that are not preserved.
    pub unpreserved: u64,
    /// Pairs of claims that share bytes.
    pub shared: u64,
}

/// Joins claims with a map. A page belongs to the first claim that touches it; pages that complete the folio of claimed ones
/// belong to their owner. Linear in runs and claims, but for sorting these. Of pages that are not preserved and bytes that
/// two claim, `most` are listed and the rest is counted; rows are as many as runs and claims that touch.
pub fn join(preserved: &Tracker, claims: Claims, most: usize) -> Owners {
    let page = preserved.geometry().page();
    let mut claims = claims.0;
    claims.sort_unstable();
    let mut owners = Owners::default();
    (owners.shared, owners.more.shared) = shared(&claims, most);
    let mut claimed = segments(page, &claims).peekable();
    for (start, end) in preserved.extents() {
        let mut at = start;
        while at < end {
            while let Some(early) = claimed.next_if(|s| s.end <= at) {
                owners.lost(page, early, most);
            }
            match claimed.peek_mut() {
                Some(segment) if segment.start < end => {
                    if segment.start < at {
                        owners.lost(page, segment.cut(segment.start, at, page), most);
                        *segment = segment.cut(at, segment.end, page);
                    }
                    owners.free(page, preserved, at, segment.start);
                    let until = segment.end.min(end);
                    push(page, &mut owners.rows, segment.cut(segment.start, until, page).row(page));
                    *segment = segment.cut(until, segment.end, page);
                    at = until;
                }
                _ => {
                    owners.free(page, preserved, at, end);
                    at = end;
                }
            }
        }
    }
    for left in claimed {
        owners.lost(page, left, most);
    }
    for order in preserved.orders() {
        let runs = preserved.runs(order).map(|(pfn, n)| (pfn, Pfn(pfn.0 + (n << order.get())), order));
        mark_order(page, &mut owners.rows, runs);
    }
    owners
}

impl Owners {
    /// Pages that are claimed, not preserved.
    fn lost(&mut self, page: PageSize, segment: Segment, most: usize) {
        if segment.start < segment.end {
            push(page, &mut self.unpreserved, segment.row(page));
            if self.unpreserved.len() > most {
                self.unpreserved.pop();
                self.more.unpreserved += 1;
            }
        }
    }

    /// Preserved pages without a claim, and those of them that complete the folio of the pages before.
    fn free(&mut self, page: PageSize, preserved: &Tracker, start: Pfn, end: Pfn) {
        if start >= end {
            return;
        }
        let row = |from: Pfn, to: Pfn| Row {
            phys: page.phys(from),
            pages: to.0 - from.0,
            orders: 0,
            owner: None,
            offset: Offset::new(None),
            rest: false,
        };
        let mut at = start;
        if let (Some((head, order)), Some(before)) = (preserved.covering(start), self.rows.last())
            && head < start
            && page.pfn(before.phys).0 + before.pages == start.0
        {
            at = Pfn(head.0 + order.nr_pages()).min(end);
            let rest = Row { owner: before.owner, rest: before.owner.is_some(), ..row(start, at) };
            push(page, &mut self.rows, rest);
        }
        if at < end {
            push(page, &mut self.rows, row(at, end));
        }
    }
}

/// Pages `[start, end)` of one claim, none of them in a claim before it.
#[derive(Clone, Copy, Debug)]
struct Segment {
    start: Pfn,
    end: Pfn,
    owner: u32,
    offset: Option<u64>,
}

impl Segment {
    /// The part `[start, end)`.
    fn cut(&self, start: Pfn, end: Pfn, page: PageSize) -> Segment {
        let skipped = (start.0.saturating_sub(self.start.0)) << page.shift();
        Segment { start, end, owner: self.owner, offset: self.offset.and_then(|o| o.checked_add(skipped)) }
    }

    fn row(&self, page: PageSize) -> Row {
        Row {
            phys: page.phys(self.start),
            pages: self.end.0 - self.start.0,
            orders: 0,
            owner: Some(self.owner),
            offset: Offset::new(self.offset),
            rest: false,
        }
    }
}

/// Claims as disjoint segments of pages, ascending.
fn segments(page: PageSize, claims: &[Claim]) -> impl Iterator<Item = Segment> + '_ {
    let mut next = 0;
    claims.iter().filter_map(move |claim| {
        let whole = Segment {
            start: page.pfn(Phys(claim.first)),
            end: Pfn(page.pfn(Phys(claim.last)).0 + 1),
            owner: claim.owner,
            offset: claim.offset.get(),
        };
        let start = whole.start.0.max(next);
        next = next.max(whole.end.0);
        (start < whole.end.0).then(|| whole.cut(Pfn(start), whole.end, page))
    })
}

/// Bytes in two claims: of each claim, what one before it reaches over.
fn shared(claims: &[Claim], most: usize) -> (Vec<Shared>, u64) {
    let mut shared = Vec::new();
    let mut more = 0;
    let mut reach: Option<&Claim> = None;
    for claim in claims {
        if let Some(before) = reach.filter(|before| claim.first <= before.last) {
            let last = claim.last.min(before.last);
            let len = (last - claim.first).saturating_add(1);
            if shared.len() < most {
                shared.push(Shared { phys: Phys(claim.first), len, owners: (before.owner, claim.owner) });
            } else {
                more += 1;
            }
        }
        if reach.is_none_or(|before| claim.last > before.last) {
            reach = Some(claim);
        }
    }
    (shared, more)
}

/// Appends pages, to the last row if they continue it.
fn push(page: PageSize, rows: &mut Vec<Row>, row: Row) {
    if let Some(last) = rows.last_mut()
        && page.pfn(last.phys).0 + last.pages == page.pfn(row.phys).0
        && (last.owner, last.rest) == (row.owner, row.rest)
        && last.offset().and_then(|o| o.checked_add(last.pages << page.shift())) == row.offset()
    {
        last.pages += row.pages;
    } else {
        rows.push(row);
    }
}

/// Notes an order in the rows that its runs touch; both ascend.
fn mark_order(page: PageSize, rows: &mut [Row], runs: impl Iterator<Item = Run>) {
    let mut at = 0;
    for (start, end, order) in runs {
        let bit: u64 = 1 << order.get();
        while rows.get(at).is_some_and(|row| page.pfn(row.phys).0 + row.pages <= start.0) {
            at += 1;
        }
        let mut i = at;
        while let Some(row) = rows.get_mut(i).filter(|row| page.pfn(row.phys) < end) {
            row.orders |= bit;
            i += 1;
        }
        at = i.saturating_sub(1).max(at);
    }
}

/// Pages per owner, and pages without one.
pub fn totals(rows: &[Row], nr_owners: usize) -> (Vec<u128>, u128) {
    let mut owned = vec![0; nr_owners];
    let mut nobodys = 0;
    for row in rows {
        let slot = row.owner.and_then(|owner| owned.get_mut(usize::try_from(owner).ok()?));
        *slot.unwrap_or(&mut nobodys) += u128::from(row.pages);
    }
    (owned, nobodys)
}

/// The orders in a row's `orders`.
pub fn orders_of(bits: u64) -> impl Iterator<Item = Order> {
    Order::all().filter(move |order| bits >> order.get() & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::Geometry;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const PAGE: PageSize = PageSize::Size4K;

    fn tracker(folios: &[(u64, u64)]) -> Tracker {
        let mut t = Tracker::new(Geometry::paged(PAGE));
        for &(pfn, order) in folios {
            t.preserve(Pfn(pfn), Order::new(order).unwrap()).unwrap();
        }
        t
    }

    fn claims(ranges: &[(u32, u64, u64)]) -> Claims {
        let mut claims = Claims::default();
        for &(owner, phys, len) in ranges {
            claims.range(owner, Phys(phys), len, None);
        }
        claims
    }

    fn short(rows: &[Row]) -> Vec<(u64, u64, Option<u32>, bool)> {
        rows.iter().map(|r| (r.phys.0 >> 12, r.pages, r.owner, r.rest)).collect()
    }

    #[test]
    fn a_blob_owns_its_folio_and_nobody_the_one_behind() {
        let found = join(&tracker(&[(4, 2), (8, 0)]), claims(&[(7, 0x4000, 240)]), 99);
        assert_eq!(short(&found.rows), [(4, 1, Some(7), false), (5, 3, Some(7), true), (8, 1, None, false)]);
        assert_eq!(found.rows[0].orders, 1 << 2);
        assert_eq!(totals(&found.rows, 8), ([0, 0, 0, 0, 0, 0, 0, 4].to_vec(), 1));
        assert!(found.unpreserved.is_empty() && found.shared.is_empty());
    }

    #[test]
    fn what_is_claimed_and_not_preserved_is_reported_around_what_is() {
        let found = join(&tracker(&[(4, 0)]), claims(&[(1, 0x2000, 0x5000), (2, 0x9000, 1)]), 99);
        assert_eq!(short(&found.rows), [(4, 1, Some(1), false)]);
        let lost = [(2, 2, Some(1), false), (5, 2, Some(1), false), (9, 1, Some(2), false)];
        assert_eq!(short(&found.unpreserved), lost);
    }

    #[test]
    fn structures_may_share_a_page_but_no_byte() {
        let found = join(&tracker(&[(4, 0)]), claims(&[(1, 0x4000, 0x100), (2, 0x4100, 0x100), (3, 0x41ff, 2)]), 99);
        assert_eq!(found.shared, [Shared { phys: Phys(0x41ff), len: 1, owners: (2, 3) }]);
        assert_eq!(short(&found.rows), [(4, 1, Some(1), false)]);
    }

    #[test]
    fn rows_that_continue_each_other_in_memory_and_in_the_file_are_one() {
        let mut claims = Claims::default();
        for (phys, offset) in [(0x1000, 0), (0x2000, 0x1000), (0x3000, 0x9000)] {
            claims.range(0, Phys(phys), 0x1000, Some(offset));
        }
        let found = join(&tracker(&[(1, 0), (2, 0), (3, 0)]), claims, 99);
        let rows: Vec<_> = found.rows.iter().map(|r| (r.phys.0, r.pages, r.offset())).collect();
        assert_eq!(rows, [(0x1000, 2, Some(0)), (0x3000, 1, Some(0x9000))]);
    }

    #[test]
    fn a_claim_to_the_top_of_the_address_space_ends_there() {
        let found = join(&tracker(&[]), claims(&[(0, u64::MAX - 0x1fff, u64::MAX)]), 99);
        assert_eq!(short(&found.unpreserved), [((1 << 52) - 2, 2, Some(0), false)]);
    }

    proptest! {
        #[test]
        fn every_page_has_the_first_owner_that_claims_it(
            folios in proptest::collection::vec((0u64..64, 0u64..4), 0..12),
            ranges in proptest::collection::vec((0u32..9, 0u64..64, 1u64..8), 0..12),
        ) {
            let folios: Vec<_> = folios.into_iter().map(|(pfn, o)| (pfn >> o << o, o)).collect();
            let ranges: Vec<_> = ranges.into_iter().map(|(owner, pfn, n)| (owner, pfn << 12, n << 12)).collect();
            let found = join(&tracker(&folios), claims(&ranges), 99);
            let mut sorted = ranges.clone();
            sorted.sort_by_key(|&(owner, phys, len)| (phys, phys + len, owner));
            let mut model: BTreeMap<u64, u32> = BTreeMap::new();
            for (owner, phys, len) in sorted {
                for pfn in phys >> 12..(phys + len) >> 12 {
                    model.entry(pfn).or_insert(owner);
                }
            }
            let mut orders: BTreeMap<u64, u64> = BTreeMap::new();
            for (pfn, order) in folios {
                for page in pfn..pfn + (1 << order) {
                    *orders.entry(page).or_default() |= 1 << order;
                }
            }
            let mut seen = BTreeMap::new();
            for row in &found.rows {
                for pfn in row.phys.0 >> 12..(row.phys.0 >> 12) + row.pages {
                    prop_assert!(seen.insert(pfn, row.owner).is_none());
                    prop_assert!(row.orders & orders[&pfn] == orders[&pfn]);
                    if !row.rest {
                        prop_assert_eq!(row.owner, model.get(&pfn).copied());
                    } else {
                        prop_assert!(!model.contains_key(&pfn));
                    }
                }
            }
            prop_assert!(seen.keys().eq(orders.keys()));
            let lost: Vec<u64> = found.unpreserved.iter()
                .flat_map(|r| r.phys.0 >> 12..(r.phys.0 >> 12) + r.pages).collect();
            let expected: Vec<u64> = model.keys().copied().filter(|pfn| !orders.contains_key(pfn)).collect();
            prop_assert_eq!(lost, expected);
        }
    }
}
