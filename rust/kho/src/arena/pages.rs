//! The page allocator: a buddy allocator whose free sets are trackers.
//!
//! A free block of order `o` is a folio of order `o` in `free`, an allocated folio one in `allocated`; a page in
//! neither is reserved. So 16 TiB of free memory are a handful of bits, and no page has a structure of its own.

use super::Region;
use crate::claims::Claims;
use crate::error::{Error, Result};
use crate::tracker::{Geometry, Tracker};
use crate::units::{Order, PageSize, Pfn, aligned_blocks};
use std::collections::HashMap;
use std::sync::{Arc, Weak};

/// What a page is, as the kernel's `struct page` would say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageKind {
    /// In the buddy allocator, in a free block of this order.
    Free { order: Order },
    /// The first page of an allocated folio.
    Head { order: Order },
    /// Another page of an allocated folio.
    Tail { head: Pfn, order: Order },
    /// Nobody's to allocate: scratch, page 0, inherited and not restored.
    Reserved,
}

impl PageKind {
    pub const fn name(self) -> &'static str {
        match self {
            PageKind::Free { .. } => "free",
            PageKind::Head { .. } => "allocated",
            PageKind::Tail { .. } => "the tail of an allocated folio",
            PageKind::Reserved => "reserved",
        }
    }
}

#[derive(Debug)]
pub(super) struct Pages {
    page: PageSize,
    regions: Vec<(u64, u64, u32)>,
    max_order: Order,
    free: Tracker,
    /// Per order, no free block lies below this pfn.
    hints: [u64; Order::COUNT],
    pub(super) allocated: Tracker,
    /// Reference counts other than 1, by head pfn.
    refs: HashMap<u64, u32>,
    inherited: Weak<Claims>,
    /// The claims of a take-over after which nobody asked yet what is free.
    unsettled: Option<Arc<Claims>>,
    maps: Vec<Map>,
}

/// A map whose bitmaps are used where they are, by claims that may outlive their time: its pages are reserved meanwhile.
#[derive(Debug)]
struct Map {
    claims: Weak<Claims>,
    /// Ascending, disjoint.
    pages: Vec<(Pfn, Pfn)>,
}

impl Pages {
    pub(super) fn new(page: PageSize, max_order: Order, regions: &[Region], reserved: &[(Pfn, Pfn)]) -> Result<Self> {
        let geometry = Geometry::new(page, 512)?;
        let mut pages = Pages {
            page,
            regions: Vec::with_capacity(regions.len()),
            max_order,
            free: Tracker::new(geometry),
            hints: [u64::MAX; Order::COUNT],
            allocated: Tracker::new(geometry),
            refs: HashMap::new(),
            inherited: Weak::new(),
            unsettled: None,
            maps: Vec::new(),
        };
        for r in regions {
            let start = page.pfn(r.start).0;
            pages.regions.push((start, start + r.len / page.bytes(), r.node));
        }
        pages.free_all_but(reserved.iter().copied(), None)?;
        Ok(pages)
    }

    /// Frees every page that no range of `busy` (ascending by start, possibly overlapping) covers, and that is none of the
    /// single pages marked in `singles`.
    fn free_all_but(&mut self, busy: impl Iterator<Item = (Pfn, Pfn)>, singles: Option<&Tracker>) -> Result<()> {
        self.free.clear();
        self.hints = [u64::MAX; Order::COUNT];
        let mut busy = busy.peekable();
        for (mut start, end, _) in self.regions.clone() {
            while start < end {
                while busy.next_if(|range| range.1.0 <= start).is_some() {}
                let (from, to) = busy.peek().map_or((end, end), |range| (range.0.0.clamp(start, end), range.1.0));
                self.free_but(start, from, singles)?;
                start = from.max(to);
            }
        }
        Ok(())
    }

    /// Frees the pages `start .. end` but those marked in `singles`. Free blocks of less than 64 pages lie in one word of its
    /// bitmaps, and are found there all at once; larger ones are between words that are not empty.
    fn free_but(&mut self, mut start: u64, end: u64, singles: Option<&Tracker>) -> Result<()> {
        if let Some(singles) = singles.filter(|_| start < end) {
            let bits = singles.geometry().bits();
            for block in singles.blocks_between(Order::ZERO, Pfn(start), Pfn(end)) {
                let first = block.index() * bits;
                for (base, word) in (first..).step_by(64).zip(block.words()).filter(|(_, word)| *word != 0) {
                    let (low, high) = (base.max(start), (base + 64).min(end));
                    if low >= high {
                        continue;
                    }
                    self.free_range(start, low)?;
                    let here = !0 << (low - base) & !0 >> (64 - (high - base));
                    self.free_in_word(base, !word & here)?;
                    start = high;
                }
            }
        }
        self.free_range(start, end)
    }

    fn free_range(&mut self, start: u64, end: u64) -> Result<()> {
        for (pfn, order) in aligned_blocks(Pfn(start), Pfn(end)) {
            self.insert_free(pfn.0, order)?;
        }
        Ok(())
    }

    /// Frees the pages `base + bit` of the bits set, in the largest blocks there are: a pair of blocks that are free is a
    /// free block of the next order.
    fn free_in_word(&mut self, base: u64, mut free: u64) -> Result<()> {
        for order in Order::all() {
            if free == 0 {
                break;
            }
            let pairs = free & free >> 1 & 0x5555_5555_5555_5555;
            let alone = free & !(pairs | pairs << 1);
            if alone != 0 {
                self.free.preserve_bits(order, base >> order.get(), alone)?;
                let hint = &mut self.hints[order.index()];
                *hint = (*hint).min(base + (u64::from(alone.trailing_zeros()) << order.get()));
            }
            free = every_other(pairs);
        }
        Ok(())
    }

    /// The region a page is in.
    fn region_of(&self, pfn: u64) -> Option<(u64, u64, u32)> {
        let after = self.regions.partition_point(|r| r.0 <= pfn);
        self.regions[..after].last().copied().filter(|r| pfn < r.1)
    }

    pub(super) fn node_of(&self, pfn: Pfn) -> Option<u32> {
        self.region_of(pfn.0).map(|r| r.2)
    }

    fn insert_free(&mut self, pfn: u64, order: Order) -> Result<()> {
        self.free.preserve(Pfn(pfn), order)?;
        let hint = &mut self.hints[order.index()];
        *hint = (*hint).min(pfn);
        Ok(())
    }

    /// The lowest free block of exactly `order`, on `node` if one is given.
    fn lowest(&mut self, order: Order, node: Option<u32>) -> Option<u64> {
        let from = self.hints[order.index()];
        if self.free.len_of(order) == 0 {
            return None;
        }
        let Some(node) = node else {
            let pfn = self.free.next(order, Pfn(from))?.0;
            self.hints[order.index()] = pfn;
            return Some(pfn);
        };
        self.regions
            .iter()
            .filter(|r| r.2 == node)
            .find_map(|&(start, end, _)| self.free.next_before(order, Pfn(from.max(start)), Pfn(end)).map(|p| p.0))
    }

    /// Takes a free block of `order`: the smallest that does, the lowest of those.
    pub(super) fn alloc(&mut self, order: Order, node: Option<u32>, gigantic: bool) -> Result<Pfn> {
        if order > self.max_order && !gigantic {
            return Err(Error::OrderTooLarge {
                order: order.get().into(),
                max: u8::try_from(self.max_order.get()).unwrap_or(Order::MAX),
            });
        }
        for from in Order::all().skip(order.index()) {
            if let Some(pfn) = self.lowest(from, node) {
                self.split(pfn, from, pfn, order)?;
                return self.mark_allocated(Pfn(pfn), order);
            }
        }
        Err(Error::NoMemory { order: order.get(), node })
    }

    /// Takes one particular block.
    pub(super) fn alloc_at(&mut self, pfn: Pfn, order: Order) -> Result<Pfn> {
        self.page.check_folio(pfn, order)?;
        match self.free.covering(pfn) {
            Some((block, from)) if from >= order => self.split(block.0, from, pfn.0, order)?,
            _ => return Err(self.wrong_state(self.first_not_free(pfn, order), "free")),
        }
        self.mark_allocated(pfn, order)
    }

    fn first_not_free(&self, pfn: Pfn, order: Order) -> Pfn {
        let mut at = pfn.0;
        while at < pfn.0 + order.nr_pages() {
            match self.free.covering(Pfn(at)) {
                Some((block, order)) => at = block.0 + order.nr_pages(),
                None => return Pfn(at),
            }
        }
        pfn
    }

    /// Carves `[pfn, order]` out of the free block `[block, from]`; the rest stays free.
    fn split(&mut self, mut block: u64, mut from: Order, pfn: u64, order: Order) -> Result<()> {
        self.free.unpreserve(Pfn(block), from)?;
        while from > order {
            from = Order::saturating(from.get() - 1);
            let upper = block + from.nr_pages();
            if pfn >= upper {
                self.insert_free(block, from)?;
                block = upper;
            } else {
                self.insert_free(upper, from)?;
            }
        }
        Ok(())
    }

    fn mark_allocated(&mut self, pfn: Pfn, order: Order) -> Result<Pfn> {
        self.allocated.preserve(pfn, order)?;
        Ok(pfn)
    }

    /// An inherited folio becomes an allocated one (it was reserved until now).
    pub(super) fn adopt(&mut self, pfn: Pfn, order: Order) -> Result<()> {
        self.mark_allocated(pfn, order).map(drop)
    }

    /// Inherited pages become allocated ones of order 0.
    pub(super) fn adopt_pages(&mut self, pfn: Pfn, nr_pages: u64) -> Result<()> {
        self.allocated.preserve_run(pfn, Order::ZERO, nr_pages).map(drop)
    }

    /// The order of the folio allocated at `pfn`, its head.
    pub(super) fn allocated_at(&self, pfn: Pfn) -> Result<Order> {
        self.allocated.head_order(pfn).ok_or_else(|| self.wrong_state(pfn, "the head of an allocated folio"))
    }

    /// Whether every page of the range belongs to allocated folios; the first that does not, as an error.
    pub(super) fn check_allocated(&self, start: Pfn, end: Pfn) -> Result<()> {
        let mut at = start.0;
        while at < end.0 {
            match self.allocated.covering(Pfn(at)) {
                Some((head, order)) => at = head.0 + order.nr_pages(),
                None => return Err(self.wrong_state(Pfn(at), "allocated (alloc or alloc_at it first)")),
            }
        }
        Ok(())
    }

    /// The same for folios that each belong to allocated ones. The one found last is looked at first.
    pub(super) fn check_all_allocated(&self, folios: impl Iterator<Item = Result<(Pfn, Order)>>) -> Result<()> {
        let orders: Vec<Order> = self.allocated.orders().filter(|order| self.allocated.len_of(*order) > 0).collect();
        let mut last = (Pfn(0), Pfn(0));
        for folio in folios {
            let (pfn, order) = folio?;
            let end = Pfn(pfn.0 + order.nr_pages());
            if last.0 <= pfn && end <= last.1 {
                continue;
            }
            let found = orders.iter().find_map(|large| {
                let head = Pfn(pfn.0 & !(large.nr_pages() - 1));
                (*large >= order && self.allocated.contains(head, *large))
                    .then(|| (head, Pfn(head.0 + large.nr_pages())))
            });
            match found {
                Some(found) => last = found,
                None => self.check_allocated(pfn, end)?,
            }
        }
        Ok(())
    }

    fn wrong_state(&self, pfn: Pfn, wanted: &'static str) -> Error {
        let phys = self.page.phys(pfn).0;
        match self.kind(pfn) {
            Some(kind) => Error::PageState { phys, state: kind.name(), wanted },
            None => Error::OutsideMemory { what: "page", phys, len: self.page.bytes() },
        }
    }

    pub(super) fn refcount(&self, pfn: Pfn) -> u32 {
        match self.allocated.head_order(pfn) {
            Some(_) => self.refs.get(&pfn.0).copied().unwrap_or(1),
            None => 0,
        }
    }

    pub(super) fn get(&mut self, pfn: Pfn) -> Result<u32> {
        self.allocated_at(pfn)?;
        let count = self.refs.entry(pfn.0).or_insert(1);
        *count = count.saturating_add(1);
        Ok(*count)
    }

    /// Drops a reference; with the last one the block goes back to the free sets, merged with its free buddies.
    pub(super) fn put(&mut self, pfn: Pfn) -> Result<bool> {
        let order = self.allocated_at(pfn)?;
        match self.refs.get(&pfn.0).copied() {
            Some(count) if count > 1 => {
                self.refs.insert(pfn.0, count - 1);
                return Ok(false);
            }
            _ => self.refs.remove(&pfn.0),
        };
        self.allocated.unpreserve(pfn, order)?;
        self.free_block(pfn.0, order)?;
        Ok(true)
    }

    fn free_block(&mut self, mut pfn: u64, mut order: Order) -> Result<()> {
        if let Some((start, end, _)) = self.region_of(pfn) {
            while order.get() < u32::from(Order::MAX) {
                let merged = pfn & !order.nr_pages();
                let inside = merged >= start && merged + 2 * order.nr_pages() <= end;
                if !inside || !self.free.unpreserve(Pfn(pfn ^ order.nr_pages()), order)? {
                    break;
                }
                pfn = merged;
                order = Order::saturating(order.get() + 1);
            }
        }
        self.insert_free(pfn, order)
    }

    pub(super) fn kind(&self, pfn: Pfn) -> Option<PageKind> {
        self.region_of(pfn.0)?;
        Some(if let Some((head, order)) = self.allocated.covering(pfn) {
            if head == pfn { PageKind::Head { order } } else { PageKind::Tail { head, order } }
        } else if let Some((_, order)) = self.free.covering(pfn) {
            PageKind::Free { order }
        } else {
            PageKind::Reserved
        })
    }

    /// `page->private`: the marker of an inherited folio that nobody restored.
    pub(super) fn private(&self, pfn: Pfn) -> u64 {
        self.inherited.upgrade().map_or(0, |claims| claims.private(pfn))
    }

    pub(super) fn nr_free(&self) -> u128 {
        self.free.nr_pages()
    }

    pub(super) fn nr_allocated(&self) -> u128 {
        self.allocated.nr_pages()
    }

    pub(super) fn nbytes(&self) -> u64 {
        self.free.nbytes() + self.allocated.nbytes()
    }

    /// A new kernel takes over: every page is free but those reserved and what was preserved. Which these are is found
    /// out by [`Pages::settle`], when somebody asks.
    pub(super) fn take_over(&mut self, claims: &Arc<Claims>) {
        self.allocated.clear();
        self.refs.clear();
        self.inherited = Arc::downgrade(claims);
        self.unsettled = Some(Arc::clone(claims));
        self.maps.push(Map { claims: Arc::downgrade(claims), pages: claims.bitmaps().pages.clone() });
    }

    /// Frees what a take-over left to nobody (all but the ranges of `reserved`, which ascend), and the pages of maps that
    /// nobody uses any longer. To be called before free pages are asked for.
    pub(super) fn settle(&mut self, reserved: &[(Pfn, Pfn)]) -> Result<()> {
        if let Some(claims) = self.unsettled.clone() {
            let preserved = claims.preserved();
            self.maps.retain(|map| map.claims.strong_count() > 0);
            let mut busy: Vec<(Pfn, Pfn)> = self.maps.iter().flat_map(|map| &map.pages).copied().collect();
            busy.extend_from_slice(reserved);
            busy.sort_unstable();
            let larger = preserved.extents_from(Order::saturating(1));
            self.free_all_but(merged(busy.into_iter(), larger), Some(preserved))?;
            for map in &mut self.maps {
                let others = |pfn: &Pfn| !within(reserved, *pfn) && preserved.covering(*pfn).is_none();
                map.pages = pages_of(&map.pages).filter(others).map(|pfn| (pfn, Pfn(pfn.0 + 1))).collect();
            }
            self.unsettled = None;
        }
        while let Some(at) = self.maps.iter().position(|map| map.claims.strong_count() == 0) {
            for pfn in pages_of(&self.maps.swap_remove(at).pages) {
                if !self.maps.iter().any(|map| within(&map.pages, pfn)) {
                    self.free_block(pfn.0, Order::ZERO)?;
                }
            }
        }
        Ok(())
    }
}

/// The bits at even places, side by side.
const fn every_other(bits: u64) -> u64 {
    let bits = bits & 0x5555_5555_5555_5555;
    let bits = (bits | bits >> 1) & 0x3333_3333_3333_3333;
    let bits = (bits | bits >> 2) & 0x0f0f_0f0f_0f0f_0f0f;
    let bits = (bits | bits >> 4) & 0x00ff_00ff_00ff_00ff;
    let bits = (bits | bits >> 8) & 0x0000_ffff_0000_ffff;
    (bits | bits >> 16) & 0xffff_ffff
}

fn pages_of(ranges: &[(Pfn, Pfn)]) -> impl Iterator<Item = Pfn> + '_ {
    ranges.iter().flat_map(|range| (range.0.0..range.1.0).map(Pfn))
}

/// Whether one of the ascending, disjoint ranges has a page.
fn within(ranges: &[(Pfn, Pfn)], pfn: Pfn) -> bool {
    ranges[..ranges.partition_point(|range| range.0 <= pfn)].last().is_some_and(|range| pfn < range.1)
}

/// Two ascending sequences of page ranges as one.
fn merged(
    a: impl Iterator<Item = (Pfn, Pfn)>,
    b: impl Iterator<Item = (Pfn, Pfn)>,
) -> impl Iterator<Item = (Pfn, Pfn)> {
    let (mut a, mut b) = (a.peekable(), b.peekable());
    core::iter::from_fn(move || match (a.peek(), b.peek()) {
        (Some(x), Some(y)) if y < x => b.next(),
        (Some(_), _) => a.next(),
        (None, _) => b.next(),
    })
}
