//! The tracker: which folios are preserved.
//!
//! Per order a sparse array of bitmaps ("blocks"): bit `b` of block `i` is the folio of that order at
//! pfn `(i * bits + b) << order` (`struct kho_mem_phys`, kernel/kexec_handover.c). One bit is one (pfn, order) pair;
//! whether folios of different orders may overlap is the caller's business. As in the kernel, a block that has become
//! empty stays: it is serialized.
//!
//! There is no tree walk, lock or atomic between a call and its bit:
//!
//! ```text
//!  pfn -> order's directory -> slot in a flat window -> word in a block
//! ```

#![deny(unsafe_code)]

pub(crate) mod adopt;
mod alloc;
mod block;
mod bulk;
mod folio;
mod geometry;
mod index;
mod interchange;
mod list;
mod ops;
mod placement;
mod range;
mod simd;
mod word;

#[cfg(test)]
mod tests;

pub use adopt::Bitmap;
pub use alloc::heap::HeapBlocks;
pub use block::BlockSource;
pub use bulk::batch::{Orders, Words};
pub use folio::Folio;
pub use geometry::Geometry;
pub use interchange::roaring::RoaringBits;
pub use list::iter::BlockRef;
pub use list::stats::OrderStats;
pub use placement::BitmapPlace;

use crate::error::Result;
use crate::units::{Order, Pfn};
use block::{Block, Shape};
use core::{array, mem};
use index::directory::Directory;
use std::sync::Arc;
use word::Word;

/// A set of folios.
pub struct Tracker {
    /// By order. They lie in the tracker itself, so that nothing need be loaded to find one.
    dirs: [Directory; Order::COUNT],
    shape: Shape,
    geometry: Geometry,
    source: Arc<dyn BlockSource>,
}

impl Tracker {
    /// An empty tracker whose blocks live on the heap.
    pub fn new(geometry: Geometry) -> Self {
        Self::with_source(geometry, Arc::new(HeapBlocks::default()))
    }

    /// An empty tracker whose blocks live in `source`.
    pub fn with_source(geometry: Geometry, source: Arc<dyn BlockSource>) -> Self {
        Tracker { dirs: no_blocks(), shape: geometry.shape().of(&*source), geometry, source }
    }

    /// Page size and block size.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Where a folio's bit is, if its block is in the window: the directory, the word, and the folio's number.
    ///
    /// A pfn that is not aligned has, rotated, bits above all numbers of folios, so that the window has no block for it;
    /// nor for a folio beyond the address space. The bounds check of the lookup
    /// therefore also rejects misaligned and out-of-range pfns.
    #[inline(always)]
    fn near(&mut self, pfn: Pfn, order: Order) -> Option<(&mut Directory, Word, u64)> {
        let dir = &mut self.dirs[order.index()];
        let folio = pfn.0.rotate_right(order.get());
        let word = dir.window.slots().word(folio)?;
        Some((dir, word, folio))
    }

    /// Marks a folio (`__kho_preserve_order`). True if it was not marked yet.
    ///
    /// # Errors
    /// [`Error::Misaligned`](crate::Error::Misaligned) unless `pfn` is a multiple of the folio's size,
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) beyond the address space, and the source's when a block is needed.
    #[inline]
    pub fn preserve(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        match self.near(pfn, order) {
            Some((dir, word, folio)) => Ok(dir.set(word, folio)),
            None => self.preserve_slow(pfn, order),
        }
    }

    /// An error, a block to make, or a block far from the others.
    #[cold]
    #[inline(never)]
    fn preserve_slow(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        self.geometry.page().check_folio(pfn, order)?;
        let folio = pfn.0 >> order.get();
        let new = self.ensure(order, folio >> self.shape.log2_bits)?.word(self.shape, folio).set(folio);
        self.dirs[order.index()].len += u64::from(new);
        Ok(new)
    }

    /// Unmarks a folio. True if it was marked.
    ///
    /// # Errors
    /// As [`Tracker::preserve`], but it needs no memory.
    #[inline]
    pub fn unpreserve(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        match self.near(pfn, order) {
            Some((dir, word, folio)) => Ok(dir.clear(word, folio)),
            None => self.unpreserve_slow(pfn, order),
        }
    }

    /// An error, no block, or a block far from the others.
    #[cold]
    #[inline(never)]
    fn unpreserve_slow(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        self.geometry.page().check_folio(pfn, order)?;
        let folio = pfn.0 >> order.get();
        let dir = &mut self.dirs[order.index()];
        let block = dir.seek(folio >> self.shape.log2_bits);
        let gone = block.is_some_and(|block| block.word(self.shape, folio).clear(folio));
        dir.len -= u64::from(gone);
        Ok(gone)
    }

    /// Whether exactly this folio is marked; false for what no folio could be.
    #[inline]
    pub fn contains(&self, pfn: Pfn, order: Order) -> bool {
        let folio = pfn.0.rotate_right(order.get());
        match self.dirs[order.index()].window.slots().word(folio) {
            Some(word) => word.test(folio),
            None => self.contains_slow(pfn, order),
        }
    }

    #[cold]
    #[inline(never)]
    fn contains_slow(&self, pfn: Pfn, order: Order) -> bool {
        let folio = pfn.0 >> order.get();
        self.geometry.page().check_folio(pfn, order).is_ok()
            && self.dirs[order.index()].far_word(self.shape, folio).is_some_and(|word| word.test(folio))
    }

    /// Folios marked.
    pub fn len(&self) -> u64 {
        self.dirs.iter().map(|dir| dir.len).sum()
    }

    /// Whether no folio is marked.
    pub fn is_empty(&self) -> bool {
        self.dirs.iter().all(|dir| dir.len == 0)
    }

    /// Folios of one order marked.
    pub fn len_of(&self, order: Order) -> u64 {
        self.dirs[order.index()].len
    }

    /// Pages in the folios marked. A page in two folios counts twice.
    pub fn nr_pages(&self) -> u128 {
        Order::all().zip(&self.dirs).map(|(order, dir)| u128::from(dir.len) << order.get()).sum()
    }

    /// Orders that ever had a block, even if all are empty by now; ascending.
    pub fn orders(&self) -> impl Iterator<Item = Order> + '_ {
        Order::all().zip(&self.dirs).filter(|(_, dir)| dir.blocks() > 0).map(|(order, _)| order)
    }

    /// Blocks of an order that exist, those that became empty too.
    pub fn nr_blocks(&self, order: Order) -> u64 {
        self.dirs[order.index()].blocks()
    }

    /// Unmarks everything and gives every block back.
    pub fn clear(&mut self) {
        self.dirs = no_blocks();
        self.source = self.source.renewed();
    }

    /// Takes an order out: a tracker that has its folios, and this one has them no more. Both get blocks from one source,
    /// and nothing is copied; so two threads work on two orders of one tracker, and [`Tracker::append`] puts them together
    /// again.
    pub fn split_off(&mut self, order: Order) -> Tracker {
        let mut dirs = no_blocks();
        mem::swap(&mut dirs[order.index()], &mut self.dirs[order.index()]);
        Tracker { dirs, shape: self.shape, geometry: self.geometry, source: Arc::clone(&self.source) }
    }

    /// Marks what `other` marks, as [`Tracker::union_with`] does. Orders that were taken out of this tracker are put back,
    /// without a copy, if it has got no blocks of them since.
    ///
    /// # Errors
    /// As [`Tracker::union_with`]; never for what was taken out and has not come back.
    pub fn append(&mut self, mut other: Tracker) -> Result<()> {
        if Arc::ptr_eq(&self.source, &other.source) && self.geometry == other.geometry {
            for (mine, theirs) in self.dirs.iter_mut().zip(&mut other.dirs).filter(|(mine, _)| mine.blocks() == 0) {
                *mine = mem::take(theirs);
            }
        }
        if other.orders().next().is_some() { self.union_with(&other).map(drop) } else { Ok(()) }
    }

    /// Bytes of memory that it takes: blocks, directories, the tracker itself.
    pub fn nbytes(&self) -> u64 {
        let dirs: u64 = self.dirs.iter().map(Directory::nbytes).sum();
        size_of::<Self>() as u64 + dirs + self.source.nbytes()
    }

    /// How many blocks of an order lie in the address space whole.
    fn whole(&self, order: Order) -> u64 {
        self.geometry.folio_limit(order) >> self.shape.log2_bits
    }

    /// A block, allocated if it does not exist.
    fn ensure(&mut self, order: Order, index: u64) -> Result<Block> {
        let whole = self.whole(order);
        self.dirs[order.index()].ensure(index, &*self.source, self.shape, whole)
    }

    /// Allocates a block that does not exist, with every bit set.
    fn make_full(&mut self, order: Order, index: u64) -> Result<()> {
        let (block, whole) = (Block::allocate_full(&*self.source, self.shape)?, self.whole(order));
        let dir = &mut self.dirs[order.index()];
        dir.put(index, block, self.shape, whole);
        dir.len += self.geometry.bits();
        Ok(())
    }
}

/// Directories without blocks.
fn no_blocks() -> [Directory; Order::COUNT] {
    array::from_fn(|_| Directory::default())
}
