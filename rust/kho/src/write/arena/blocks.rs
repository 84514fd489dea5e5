//! A tracker's blocks in an arena's pages, so that neither serializing nor taking over copies a bitmap.

#![allow(unsafe_code)]

use super::spans::Spans;
use super::{Arena, Owner};
use crate::abi::preserved::{Bitmaps, Collector, InPlace, Preserved};
use crate::error::{Error, Result};
use crate::memory::PhysMemory;
use crate::tracker::{Bitmap, BlockSource, Geometry, HeapBlocks, Tracker};
use crate::units::{Order, PageSize, Pfn, Phys, merge_ranges};
use std::mem;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Hands out blocks from pages it allocates; blocks smaller than a page share one.
#[derive(Debug)]
pub struct ArenaBlocks {
    /// Weak, because an arena can own a tracker whose blocks are its pages ([`Arena::keep`]).
    arena: Weak<Arena>,
    spans: Arc<Spans>,
    page: PageSize,
    generation: u64,
    pages: Mutex<Pages>,
}

/// Pages that were allocated for blocks.
#[derive(Debug)]
struct Pages {
    pages: Vec<Pfn>,
    /// Bytes of the last page that are taken.
    used: u64,
}

impl ArenaBlocks {
    /// A source of blocks in pages of `arena`.
    pub fn new(arena: &Arc<Arena>) -> Self {
        Self::on(Arc::downgrade(arena), Arc::clone(&arena.spans), arena.page(), arena.generation())
    }

    fn on(arena: Weak<Arena>, spans: Arc<Spans>, page: PageSize, generation: u64) -> Self {
        ArenaBlocks {
            arena,
            spans,
            page,
            generation,
            pages: Mutex::new(Pages { pages: Vec::new(), used: page.bytes() }),
        }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ArenaBlocks {
    fn drop(&mut self) {
        let pages = mem::take(&mut self.pages().pages);
        if let Some(arena) = self.arena.upgrade().filter(|arena| arena.generation() == self.generation) {
            arena.put_own(pages);
        }
    }
}

// SAFETY: a block lies in a page that `alloc_bytes` allocated for this source alone and zeroed, inside a mapping that `spans`
// keeps mapped; blocks have a power of two of bytes, at least 512, so that they are 8-aligned; `used` only grows within a page,
// so that no two blocks share a byte. The page is owned (`Owner::Bitmap`): until the source is dropped `Pages` gives it to no
// caller, begins no view on it (and gave it out only when it had none), and after a take-over it stays reserved as long as the
// tracker lives (`User::Tracker`). Other processes may still write it: the source is shared.
unsafe impl BlockSource for ArenaBlocks {
    fn alloc_block(&self, bytes: usize) -> Result<NonNull<u64>> {
        let arena = self.arena.upgrade().ok_or(Error::Stale { what: "tracker" })?;
        arena.check_generation("tracker", self.generation)?;
        let (bytes, mut own) = (bytes as u64, self.pages());
        if own.used + bytes > self.page.bytes() {
            own.pages.push(arena.alloc_bytes(self.page.bytes(), None, Owner::Bitmap)?.0);
            own.used = 0;
        }
        let pfn = own.pages.last().copied().unwrap_or_default();
        let phys = Phys(self.page.phys(pfn).0 + own.used);
        let outside = Error::OutsideMemory { what: "tracker block", phys: phys.0, len: bytes };
        let block = self.spans.ptr(phys, bytes).ok_or(outside)?;
        own.used += bytes;
        Ok(block.cast())
    }

    fn phys_of(&self, block: NonNull<u64>) -> Option<Phys> {
        self.spans.phys_of(block.cast())
    }

    fn stretch_of(&self, block: NonNull<u64>) -> Option<(Range<usize>, Phys)> {
        self.spans.stretch_of(block.cast())
    }

    fn nbytes(&self) -> u64 {
        self.pages().pages.len() as u64 * self.page.bytes()
    }

    fn renewed(&self) -> Arc<dyn BlockSource> {
        Arc::new(Self::on(Weak::clone(&self.arena), Arc::clone(&self.spans), self.page, self.generation))
    }
}

/// Blocks of a map that lies in an arena, and blocks on the heap.
struct MapBlocks {
    spans: Arc<Spans>,
    heap: HeapBlocks,
}

// SAFETY: new blocks are the heap's. One at an address was bounded by `Spans::ptr`, and lies inside a mapping that `spans` keeps
// mapped and writable; it is 8-aligned, which `block_at` checks. Other processes may write it: the source is shared.
unsafe impl BlockSource for MapBlocks {
    fn alloc_block(&self, bytes: usize) -> Result<NonNull<u64>> {
        self.heap.alloc_block(bytes)
    }

    fn phys_of(&self, block: NonNull<u64>) -> Option<Phys> {
        self.spans.phys_of(block.cast())
    }

    fn stretch_of(&self, block: NonNull<u64>) -> Option<(Range<usize>, Phys)> {
        self.spans.stretch_of(block.cast())
    }

    fn block_at(&self, phys: Phys, bytes: usize) -> Option<NonNull<u64>> {
        self.spans.ptr(phys, bytes as u64).map(NonNull::cast).filter(|block: &NonNull<u64>| block.is_aligned())
    }

    fn nbytes(&self) -> u64 {
        self.heap.nbytes()
    }

    fn renewed(&self) -> Arc<dyn BlockSource> {
        Arc::new(MapBlocks { spans: Arc::clone(&self.spans), heap: HeapBlocks::default() })
    }
}

/// What a map in an arena preserves, collected bitmap by bitmap.
///
/// Bitmaps whose every bit stands for memory of the arena are neither read nor copied: nothing that is in them, or that
/// other code writes there later, can be wrong. The others (at the ends of memory, and of orders so large that a bitmap speaks
/// of more than there is) are checked, and copied so that they stay as they were checked.
struct Inherited<'a> {
    arena: &'a Arena,
    geometry: Geometry,
    copied: Tracker,
    bitmaps: Vec<Bitmap>,
}

impl<'a> Inherited<'a> {
    fn new(arena: &'a Arena, geometry: Geometry) -> Self {
        let blocks = MapBlocks { spans: Arc::clone(&arena.spans), heap: HeapBlocks::default() };
        Inherited { arena, geometry, copied: Tracker::with_source(geometry, Arc::new(blocks)), bitmaps: Vec::new() }
    }

    fn spans(&self) -> &Spans {
        &self.arena.spans
    }
}

impl InPlace for Arena {
    fn collect(&self, geometry: Geometry) -> Box<dyn Collector + '_> {
        Box::new(Inherited::new(self, geometry))
    }
}

impl Collector for Inherited<'_> {
    fn add(&mut self, bitmap: Bitmap) -> Result<()> {
        let Bitmap { order, index, phys } = bitmap;
        let len = self.geometry.block_bytes();
        let outside = Error::OutsideMemory { what: "bitmap", phys: phys.0, len };
        self.spans().ptr(phys, len).ok_or(outside)?;
        if self.geometry.span(order, index).is_some_and(|(start, len)| self.arena.contains(start, len)) {
            self.bitmaps.push(bitmap);
            return Ok(());
        }
        let bytes = self.arena.read_vec("bitmap", phys, len)?;
        self.copied.adopt_block(order, index, &bytes).map(drop)
    }

    fn preserve(&mut self, pfn: Pfn, order: Order) -> Result<()> {
        self.copied.preserve(pfn, order).map(drop)
    }

    /// No bitmap is read before the tracker of the result is asked for.
    fn finish(self: Box<Self>) -> Result<Preserved> {
        let Inherited { arena, geometry, copied, mut bitmaps } = *self;
        let page = geometry.page();
        if !bitmaps.is_sorted() {
            bitmaps.sort_unstable();
        }
        let same = |pair: &&[Bitmap]| (pair[0].order, pair[0].index) == (pair[1].order, pair[1].index);
        if let Some(pair) = bitmaps.windows(2).find(same) {
            let why = format!("two bitmaps are of the same folios of order {}", pair[0].order);
            return Err(Error::Invalid { what: "preserved-memory map", why });
        }
        let last = move |bitmap: &Bitmap| page.pfn(Phys(bitmap.phys.0 + (geometry.block_bytes() - 1)));
        let pages = merge_ranges(bitmaps.iter().map(|b| (page.pfn(b.phys), Pfn(last(b).0 + 1))).collect());
        let kept = Bitmaps { count: bitmaps.len() as u64, pages };
        let outside = copied.extents().map(|(start, end)| (page.phys(start), (end.0 - start.0) << page.shift()));
        let outside = { outside }.find(|&(phys, len)| !arena.contains(phys, len));
        let count = move || {
            let mut tracker = copied;
            // Every bitmap was found in the arena, which stays mapped, and no two are the same block: what can fail is a copy,
            // for want of memory, and then all of them count as being in place.
            let in_place = tracker.adopt(&bitmaps).unwrap_or(bitmaps);
            let pages = in_place.iter().map(|b| (page.pfn(b.phys), Pfn(last(b).0 + 1))).collect();
            (tracker, merge_ranges(pages))
        };
        Ok(Preserved::in_place(geometry, kept, outside, Box::new(count)))
    }
}
