//! The page allocator: a buddy allocator whose free sets are trackers.
//!
//! A free block of order `o` is a folio of order `o` in `free`, an allocated folio one in `allocated`; a page in
//! neither is reserved. So 16 TiB of free memory are a handful of bits, and no page has a structure of its own.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::read::arena_note::Region;
use crate::read::restore::Claims;
use crate::tracker::{Geometry, Tracker};
use crate::units::{Order, PageSize, Pfn, aligned_blocks, merge_ranges};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, Weak};

/// What a page is, as the kernel's `struct page` would say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageKind {
    /// In the buddy allocator, in a free block of this order.
    Free {
        /// The order of the block.
        order: Order,
    },
    /// The first page of an allocated folio.
    Head {
        /// The order of the folio.
        order: Order,
    },
    /// Another page of an allocated folio.
    Tail {
        /// The first page of the folio.
        head: Pfn,
        /// The order of the folio.
        order: Order,
    },
    /// Not available to the allocator: scratch, page 0, inherited and not restored.
    Reserved,
}

impl PageKind {
    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            PageKind::Free { .. } => "free",
            PageKind::Head { .. } => "allocated",
            PageKind::Tail { .. } => "the tail of an allocated folio",
            PageKind::Reserved => "reserved",
        }
    }
}

/// What the library itself keeps in pages of an arena. No caller gets, frees or writes these.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// A bitmap of the arena's `Outgoing`.
    Bitmap,
    /// A chunk or tree node of the map of the arena's `Outgoing`.
    Node,
    /// The root FDT of the arena's `Outgoing`.
    Fdt,
    /// The blob of a subtree of the arena's `Outgoing`.
    Subtree,
    /// A bitmap of a map that was taken over, read where it lies.
    Inherited,
    /// A bitmap of an `Outgoing` whose arena was taken over.
    Stale,
}

impl Owner {
    /// Those whose pages are allocated; pages of the others are reserved.
    const ALLOCATED: [Owner; 4] = [Owner::Bitmap, Owner::Node, Owner::Fdt, Owner::Subtree];

    const fn name(self) -> &'static str {
        match self {
            Owner::Bitmap => "a bitmap of this arena's Outgoing",
            Owner::Node => "a chunk or node of the map of this arena's Outgoing",
            Owner::Fdt => "the root FDT of this arena's Outgoing",
            Owner::Subtree => "a subtree's blob of this arena's Outgoing",
            Owner::Inherited => "a bitmap of the map that was taken over",
            Owner::Stale => "a bitmap of an Outgoing whose arena was taken over",
        }
    }

    const fn state(self) -> &'static str {
        match self {
            Owner::Bitmap | Owner::Node => "in use",
            Owner::Fdt | Owner::Subtree => "preserved",
            Owner::Inherited | Owner::Stale => "reserved",
        }
    }

    const fn remedy(self) -> &'static str {
        match self {
            Owner::Stale => "drop that Outgoing to release it",
            Owner::Subtree => "remove the subtree to release it",
            Owner::Inherited => "drop the Incoming to release it",
            Owner::Bitmap | Owner::Node | Owner::Fdt => {
                "drop the Outgoing (abort() first if it is finalized) to release it"
            }
        }
    }

    const fn index(self) -> usize {
        self as usize
    }
}

/// Pages `start .. end` of one allocation: good until they are freed, even if others get the same pages later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lease {
    /// The first page.
    pub start: Pfn,
    /// One past the last page.
    pub end: Pfn,
    /// The take-overs before it ([`super::Arena::generation`]).
    pub(super) generation: u64,
    /// The frees before it.
    stamp: u64,
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
    /// The claims of a take-over whose free pages were not computed yet.
    unsettled: Option<Arc<Claims>>,
    maps: Vec<Map>,
    /// The FDT of a handover in the arena's file that was not taken over; 0 if there is none. Until the take-over it is not
    /// known which pages the handover needs, so no page is allocated.
    pub(super) untaken: u64,
    /// From the first page to after the last that a map of `maps` lies in.
    maps_span: (Pfn, Pfn),
    /// Folios from this page on are restored without a check against the maps. It is 0 if only this process can write the
    /// memory: the bits of a bitmap are then as they were when it was checked, and none stands for a bitmap's own page.
    /// Otherwise it is the end of `maps_span`.
    guarded: Pfn,
    /// Whether no other process has the memory.
    pub(super) is_private: bool,
    /// From the first page to after the last that ever held a chunk or node of an `Outgoing`.
    nodes_span: (Pfn, Pfn),
    /// Allocated pages that the library itself uses, by [`Owner::index`].
    owned: [Tracker; Owner::ALLOCATED.len()],
    /// How many folios have been freed since the last take-over.
    frees: u64,
    /// Allocated folios whose pages may have been freed before, by head: how many pages, and `frees` when they were
    /// allocated. A lease with a smaller stamp is of an earlier allocation.
    reused: BTreeMap<u64, (u64, u64)>,
    /// The number of views on each page range, by `(log2 of the pages, start, end)`. Pages in a range are not allocated.
    views: BTreeMap<(u32, u64, u64), u64>,
    /// The logarithms in the keys of `views` so far, a bit each.
    view_sizes: u64,
    /// Freed blocks that wait for the end of a view.
    lingering: Vec<(Pfn, Order)>,
}

/// Pages with bitmaps that are used where they are, by something that may outlive its time: they are reserved until then.
#[derive(Debug)]
struct Map {
    user: User,
    /// Ascending, disjoint.
    pages: Vec<(Pfn, Pfn)>,
    /// Those of them that become free when the claims are gone.
    left: Vec<(Pfn, Pfn)>,
}

/// What reads bitmaps where they are.
#[derive(Debug)]
enum User {
    Claims(Weak<Claims>),
    /// The tracker of an `Outgoing` that was taken over.
    Tracker(Weak<Mutex<Tracker>>),
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
            untaken: 0,
            nodes_span: NOWHERE,
            maps_span: NOWHERE,
            guarded: Pfn(0),
            is_private: false,
            owned: [(); Owner::ALLOCATED.len()].map(|()| Tracker::new(geometry)),
            frees: 0,
            reused: BTreeMap::new(),
            views: BTreeMap::new(),
            view_sizes: 0,
            lingering: Vec::new(),
        };
        for r in regions {
            let start = page.pfn(r.start).0;
            pages.regions.push((start, start + r.len / page.bytes(), r.node));
        }
        pages.free_all_but(reserved.iter().copied(), None)?;
        Ok(pages)
    }

    /// Frees every page that no range of `busy` (ascending by start, possibly overlapping) covers, except the
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
        self.check_taken()?;
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
        self.check_taken()?;
        self.page.check_folio(pfn, order)?;
        match self.free.covering(pfn) {
            Some((block, from)) if from >= order => self.split(block.0, from, pfn.0, order)?,
            _ => return Err(self.wrong_state(self.first_not_free(pfn, order), "free")),
        }
        self.mark_allocated(pfn, order)
    }

    fn check_taken(&self) -> Result<()> {
        match self.untaken {
            0 => Ok(()),
            phys => Err(Error::Untaken { phys }),
        }
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
        if self.frees > 0 {
            self.reused.insert(pfn.0, (order.nr_pages(), self.frees));
        }
        Ok(pfn)
    }

    /// An inherited folio becomes an allocated one (it was reserved until now).
    ///
    /// # Errors
    /// [`Error::Owned`] if a bitmap lies in it that is read where it is.
    #[inline]
    pub(super) fn adopt(&mut self, pfn: Pfn, order: Order) -> Result<()> {
        if pfn < self.guarded {
            return self.adopt_guarded(pfn, order);
        }
        self.allocated.preserve(pfn, order).map(drop)
    }

    #[inline(never)]
    fn adopt_guarded(&mut self, pfn: Pfn, order: Order) -> Result<()> {
        self.check_not_inherited("restore", pfn, Pfn(pfn.0 + order.nr_pages()))?;
        self.allocated.preserve(pfn, order).map(drop)
    }

    /// Inherited pages become allocated ones of order 0.
    ///
    /// # Errors
    /// As [`Pages::adopt`].
    pub(super) fn adopt_pages(&mut self, pfn: Pfn, nr_pages: u64) -> Result<()> {
        self.check_not_inherited("restore", pfn, Pfn(pfn.0 + nr_pages))?;
        self.allocated.preserve_run(pfn, Order::ZERO, nr_pages).map(drop)
    }

    /// Page ranges that adopted folios must not overlap: bitmaps lie there that are read where they are.
    pub(super) fn inherited_pages(&self) -> Vec<(Pfn, Pfn)> {
        self.maps.iter().flat_map(Map::in_place).collect()
    }

    /// The lease of pages `start .. end`, which were just found allocated.
    pub(super) fn lease(&self, start: Pfn, end: Pfn, generation: u64) -> Lease {
        Lease { start, end, generation, stamp: self.frees }
    }

    /// Refuses a lease whose pages were freed since.
    ///
    /// # Errors
    /// [`Error::Freed`].
    pub(super) fn check_lease(&self, lease: &Lease) -> Result<()> {
        let (start, end) = (lease.start.0, lease.end.0);
        let later = |(head, (nr_pages, frees)): (&u64, &(u64, u64))| *frees > lease.stamp && head + nr_pages > start;
        let before = self.reused.range(..start).next_back();
        let freed = before.into_iter().chain(self.reused.range(start..end)).any(later);
        if freed || self.check_allocated(lease.start, lease.end).is_err() {
            let state = self.kind(lease.start).map_or("outside", PageKind::name);
            return Err(Error::Freed { phys: self.page.phys(lease.start).0, state });
        }
        Ok(())
    }

    /// Marks an allocated folio as the library's.
    pub(super) fn own(&mut self, pfn: Pfn, order: Order, owner: Owner) -> Result<()> {
        if owner == Owner::Node {
            let end = Pfn(pfn.0 + order.nr_pages());
            self.nodes_span = (self.nodes_span.0.min(pfn), self.nodes_span.1.max(end));
        }
        match self.owned.get_mut(owner.index()) {
            Some(owned) => owned.preserve(pfn, order).map(drop),
            None => Ok(()),
        }
    }

    /// Takes that back.
    pub(super) fn disown(&mut self, pfn: Pfn, order: Order) {
        for owned in &mut self.owned {
            // An allocated folio is one: unmarking it cannot fail.
            let _ = owned.unpreserve(pfn, order);
        }
    }

    /// Refuses pages that the library keeps something in.
    ///
    /// # Errors
    /// [`Error::Owned`] for the first owner that has one.
    pub(super) fn check_not_owned(&self, what: &'static str, start: Pfn, end: Pfn) -> Result<()> {
        for (owner, owned) in Owner::ALLOCATED.into_iter().zip(&self.owned) {
            if owned.is_empty() {
                continue;
            }
            if let Some((pfn, _)) = owned.overlapping(start, end) {
                return Err(self.is_owned(what, pfn.max(start), owner));
            }
        }
        self.check_not_inherited(what, start, end)
    }

    /// Refuses chunks and nodes of the map of an `Outgoing`: they are freed when the map is written again.
    ///
    /// # Errors
    /// [`Error::Owned`].
    pub(super) fn check_no_node(&self, what: &'static str, start: Pfn, end: Pfn) -> Result<()> {
        let nodes = &self.owned[Owner::Node.index()];
        match nodes.overlapping(start, end).filter(|_| !nodes.is_empty()) {
            Some((pfn, _)) => Err(self.is_owned(what, pfn.max(start), Owner::Node)),
            None => Ok(()),
        }
    }

    /// Refuses pages with bitmaps of a map that was taken over and is in use.
    #[inline]
    fn check_not_inherited(&self, what: &'static str, start: Pfn, end: Pfn) -> Result<()> {
        if end <= self.maps_span.0 || start >= self.maps_span.1 {
            return Ok(());
        }
        self.check_not_in_maps(what, start, end)
    }

    #[cold]
    #[inline(never)]
    fn check_not_in_maps(&self, what: &'static str, start: Pfn, end: Pfn) -> Result<()> {
        for map in &self.maps {
            let mut pages = map.in_place().into_iter();
            if let Some((from, _)) = pages.find(|(from, to)| *from < end && start < *to) {
                return Err(self.is_owned(what, from.max(start), map.owner()));
            }
        }
        Ok(())
    }

    fn is_owned(&self, what: &'static str, pfn: Pfn, owner: Owner) -> Error {
        let (state, owner, remedy) = (owner.state(), owner.name(), owner.remedy());
        Error::Owned { what, phys: self.page.phys(pfn).0, state, owner, remedy }
    }

    /// Keeps pages from being given out until [`Pages::end_view`].
    pub(super) fn begin_view(&mut self, start: Pfn, end: Pfn) {
        let key = view_key(start, end);
        *self.views.entry(key).or_insert(0) += 1;
        self.view_sizes |= 1 << key.0;
    }

    /// Undoes [`Pages::begin_view`]; blocks that were freed and have no view any more become free.
    pub(super) fn end_view(&mut self, start: Pfn, end: Pfn) -> Result<()> {
        let key = view_key(start, end);
        match self.views.get_mut(&key) {
            Some(count) if *count > 1 => {
                *count -= 1;
                return Ok(());
            }
            _ => self.views.remove(&key),
        };
        let mut at = 0;
        while let Some(&(pfn, order)) = self.lingering.get(at) {
            let block_end = Pfn(pfn.0 + order.nr_pages());
            if pfn >= end || block_end <= start || self.has_view(pfn, block_end) {
                at += 1;
            } else {
                self.lingering.swap_remove(at);
                self.free_block(pfn.0, order)?;
            }
        }
        Ok(())
    }

    /// Whether there is a view on one of the pages `start .. end`.
    pub(super) fn has_view(&self, start: Pfn, end: Pfn) -> bool {
        let of_size = |log2: u32| {
            // A range of this size that reaches `start` begins less than twice `1 << log2` pages before it.
            let first = start.0.saturating_sub(2 << log2);
            self.views.range((log2, first, 0)..(log2, end.0, 0)).any(|((.., to), _)| *to > start.0)
        };
        !self.views.is_empty() && (0..u64::BITS).any(|log2| self.view_sizes >> log2 & 1 != 0 && of_size(log2))
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
            if self.nodes_span.0 < end && pfn < self.nodes_span.1 {
                self.check_no_node("preserve", pfn, end)?;
            }
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
        self.reused.remove(&pfn.0);
        self.frees += 1;
        if self.has_view(pfn, Pfn(pfn.0 + order.nr_pages())) {
            self.lingering.push((pfn, order));
        } else {
            self.free_block(pfn.0, order)?;
        }
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
        } else if let Some((_, order)) = self.free.covering(pfn).or_else(|| self.lingering_at(pfn)) {
            PageKind::Free { order }
        } else {
            PageKind::Reserved
        })
    }

    /// The freed block that a page is in and that waits for the end of a view.
    fn lingering_at(&self, pfn: Pfn) -> Option<(Pfn, Order)> {
        self.lingering.iter().copied().find(|(head, order)| *head <= pfn && pfn.0 < head.0 + order.nr_pages())
    }

    /// `page->private`: the marker of an inherited folio that was not restored.
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
    /// out by [`Pages::settle`], on the next call that needs free pages. False, and nothing has changed, while there is a
    /// view on a bitmap that the claims would read where it is: the view can write it.
    #[must_use]
    pub(super) fn take_over(&mut self, claims: &Arc<Claims>, outgoing: Weak<Mutex<Tracker>>) -> bool {
        let pages = &claims.bitmaps().pages;
        if pages.iter().any(|(start, end)| self.has_view(*start, *end)) {
            return false;
        }
        let stale: Vec<_> = self.owned[Owner::Bitmap.index()].extents().collect();
        self.maps.push(Map { user: User::Tracker(outgoing), left: stale.clone(), pages: stale });
        self.allocated.clear();
        self.owned.iter_mut().for_each(Tracker::clear);
        self.refs.clear();
        self.reused.clear();
        self.lingering.clear();
        self.frees = 0;
        self.untaken = 0;
        self.nodes_span = NOWHERE;
        self.inherited = Arc::downgrade(claims);
        self.unsettled = Some(Arc::clone(claims));
        self.maps.push(Map { user: User::Claims(Arc::downgrade(claims)), pages: pages.clone(), left: pages.clone() });
        true
    }

    /// Brings up to date where maps in use lie.
    pub(super) fn span_maps(&mut self) {
        let pages = || self.maps.iter().flat_map(|map| &map.pages);
        self.maps_span = match (pages().map(|range| range.0).min(), pages().map(|range| range.1).max()) {
            (Some(start), Some(end)) => (start, end),
            _ => NOWHERE,
        };
        let stale = self.maps.iter().any(|map| matches!(map.user, User::Tracker(_)) && map.is_used());
        self.guarded = if self.is_private && !stale { Pfn(0) } else { self.maps_span.1 };
    }

    /// Frees what a take-over left without an owner (all but the ranges of `reserved`, which ascend, and pages with views),
    /// and the pages of maps that are not used any longer. To be called before free pages are asked for.
    pub(super) fn settle(&mut self, reserved: &[(Pfn, Pfn)]) -> Result<()> {
        if let Some(claims) = self.unsettled.clone() {
            let preserved = claims.preserved();
            self.maps.iter_mut().for_each(Map::detach);
            self.maps.retain(Map::is_used);
            let viewed = merge_ranges(self.views.keys().map(|view| (Pfn(view.1), Pfn(view.2))).collect());
            let maps = merge_ranges(self.maps.iter().flat_map(|map| &map.pages).copied().collect());
            let mut busy = [&maps[..], reserved, &viewed].concat();
            busy.sort_unstable();
            let larger = preserved.extents_from(Order::saturating(1));
            self.free_all_but(merged(busy.into_iter(), larger), Some(preserved))?;
            let others = |pfn: &Pfn| !within(reserved, *pfn) && preserved.covering(*pfn).is_none();
            for map in &mut self.maps {
                map.left = pages_of(&map.pages).filter(others).map(|pfn| (pfn, Pfn(pfn.0 + 1))).collect();
            }
            // Pages that would be free but for a view.
            self.lingering.clear();
            for (start, end, _) in &self.regions {
                let here = viewed.iter().map(|view| (view.0.max(Pfn(*start)), view.1.min(Pfn(*end))));
                let here: Vec<_> = here.filter(|(from, to)| from < to).collect();
                let waiting = pages_of(&here).filter(others).filter(|pfn| !within(&maps, *pfn));
                let waiting = merge_ranges(waiting.map(|pfn| (pfn, Pfn(pfn.0 + 1))).collect());
                self.lingering.extend(waiting.into_iter().flat_map(|(from, to)| aligned_blocks(from, to)));
            }
            self.unsettled = None;
            self.span_maps();
        }
        self.maps.iter_mut().for_each(Map::detach);
        while let Some(at) = self.maps.iter().position(|map| !map.is_used()) {
            for pfn in pages_of(&self.maps.swap_remove(at).left) {
                if self.maps.iter().any(|map| within(&map.pages, pfn)) {
                    continue;
                }
                if self.has_view(pfn, Pfn(pfn.0 + 1)) {
                    self.lingering.push((pfn, Order::ZERO));
                } else {
                    self.free_block(pfn.0, Order::ZERO)?;
                }
            }
            self.span_maps();
        }
        Ok(())
    }
}

fn view_key(start: Pfn, end: Pfn) -> (u32, u64, u64) {
    ((end.0 - start.0).checked_ilog2().unwrap_or(0), start.0, end.0)
}

impl Map {
    /// The pages whose bitmaps are read where they are.
    fn in_place(&self) -> Vec<(Pfn, Pfn)> {
        match &self.user {
            User::Claims(claims) => claims.upgrade().map_or(Vec::new(), |claims| claims.in_place().to_vec()),
            User::Tracker(tracker) if tracker.strong_count() > 0 => self.pages.clone(),
            User::Tracker(_) => Vec::new(),
        }
    }

    /// Gives an `Outgoing` that was taken over a copy of its bitmaps, so that their pages become free although it lives on.
    fn detach(&mut self) {
        let User::Tracker(tracker) = &self.user else { return };
        // Not waited for: a thread that holds the tracker may wait for the pages, which the caller holds. Without the lock,
        // or memory for the copy, the pages stay reserved.
        if let Some(tracker) = tracker.upgrade()
            && let Ok(mut tracker) = tracker.try_lock()
            && let Ok(copy) = tracker.try_clone()
        {
            *tracker = copy;
            self.user = User::Tracker(Weak::new());
        }
    }

    fn is_used(&self) -> bool {
        match &self.user {
            User::Claims(claims) => claims.strong_count() > 0,
            User::Tracker(tracker) => tracker.strong_count() > 0,
        }
    }

    const fn owner(&self) -> Owner {
        match self.user {
            User::Claims(_) => Owner::Inherited,
            User::Tracker(_) => Owner::Stale,
        }
    }
}

/// No pages.
const NOWHERE: (Pfn, Pfn) = (Pfn(u64::MAX), Pfn(0));

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
