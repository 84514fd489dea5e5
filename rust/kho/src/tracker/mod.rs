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

pub(crate) mod adopt;
mod batch;
mod block;
mod directory;
mod geometry;
mod iter;
mod ops;
mod range;
mod runs;
mod state;

#[cfg(test)]
mod tests;

pub use adopt::Bitmap;
pub use batch::{Orders, Words};
pub use block::{BlockSource, HeapBlocks};
pub use geometry::Geometry;
pub use iter::{BlockRef, Folio};

use crate::error::Result;
use crate::units::{Order, Pfn};
use block::Shape;
use directory::Directory;

/// A set of folios.
pub struct Tracker {
    /// By order, up to the largest ever used.
    dirs: Vec<Directory>,
    shape: Shape,
    geometry: Geometry,
    source: Box<dyn BlockSource>,
}

/// What one order holds, and what that costs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OrderStats {
    pub order: Order,
    pub folios: u64,
    pub blocks: u64,
    pub empty_blocks: u64,
    /// Bytes of blocks and of the directory.
    pub bytes: u64,
}

impl Tracker {
    /// An empty tracker whose blocks live on the heap.
    pub fn new(geometry: Geometry) -> Self {
        Self::with_source(geometry, Box::new(HeapBlocks::default()))
    }

    /// An empty tracker whose blocks live in `source`.
    pub fn with_source(geometry: Geometry, source: Box<dyn BlockSource>) -> Self {
        Tracker { dirs: Vec::new(), shape: geometry.shape(), geometry, source }
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Marks a folio (`__kho_preserve_order`). True if it was not marked yet.
    ///
    /// # Errors
    /// [`Error::Misaligned`](crate::Error::Misaligned) unless `pfn` is a multiple of the folio's size,
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) beyond the address space, and the source's when a block is needed.
    #[inline]
    pub fn preserve(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        let shape = self.shape;
        if let Some(dir) = self.dirs.get_mut(order.index())
            && pfn.0 & dir.invalid == 0
        {
            let folio = pfn.0 >> order.get();
            if let Some(slot) = dir.near_mut(folio >> shape.log2_bits)
                && let Some(block) = slot.block
            {
                let word = (folio >> 6) as usize;
                let old = block.load(shape, word);
                let new = old | 1 << (folio & 63);
                if new == old {
                    return Ok(false);
                }
                block.store(shape, word, new);
                slot.count += 1;
                dir.len += 1;
                return Ok(true);
            }
        }
        self.preserve_slow(pfn, order)
    }

    /// An error, a block to make, or a block far from the others.
    #[cold]
    #[inline(never)]
    fn preserve_slow(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        self.geometry.page().check_folio(pfn, order)?;
        let folio = pfn.0 >> order.get();
        self.ensure(order, folio >> self.shape.log2_bits)?;
        Ok(self.fill(order, folio, 1, true) == 1)
    }

    /// Unmarks a folio. True if it was marked.
    ///
    /// # Errors
    /// As [`Tracker::preserve`], but it needs no memory.
    #[inline]
    pub fn unpreserve(&mut self, pfn: Pfn, order: Order) -> Result<bool> {
        let shape = self.shape;
        if let Some(dir) = self.dirs.get_mut(order.index())
            && pfn.0 & dir.invalid == 0
        {
            let folio = pfn.0 >> order.get();
            let Some((block, count)) = dir.get_mut(folio >> shape.log2_bits) else {
                return Ok(false);
            };
            let word = (folio >> 6) as usize;
            let old = block.load(shape, word);
            let new = old & !(1 << (folio & 63));
            if new == old {
                return Ok(false);
            }
            block.store(shape, word, new);
            *count -= 1;
            dir.len -= 1;
            return Ok(true);
        }
        self.geometry.page().check_folio(pfn, order)?;
        Ok(false)
    }

    /// Whether exactly this folio is marked; false for what no folio could be.
    #[inline]
    pub fn contains(&self, pfn: Pfn, order: Order) -> bool {
        let Some(dir) = self.dirs.get(order.index()) else {
            return false;
        };
        let folio = pfn.0 >> order.get();
        pfn.0 & dir.invalid == 0
            && dir
                .get(folio >> self.shape.log2_bits)
                .is_some_and(|(block, _)| block.load(self.shape, (folio >> 6) as usize) >> (folio & 63) & 1 != 0)
    }

    /// Folios marked.
    pub fn len(&self) -> u64 {
        self.dirs.iter().map(|dir| dir.len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.dirs.iter().all(|dir| dir.len == 0)
    }

    /// Folios of one order marked.
    pub fn len_of(&self, order: Order) -> u64 {
        self.dirs.get(order.index()).map_or(0, |dir| dir.len)
    }

    /// Pages in the folios marked. A page in two folios counts twice.
    pub fn nr_pages(&self) -> u128 {
        Order::all().zip(&self.dirs).map(|(order, dir)| u128::from(dir.len) << order.get()).sum()
    }

    /// Orders that ever had a block, even if all are empty by now; ascending.
    pub fn orders(&self) -> impl Iterator<Item = Order> + '_ {
        Order::all().zip(&self.dirs).filter(|(_, dir)| dir.blocks > 0).map(|(order, _)| order)
    }

    /// Unmarks everything and gives every block back.
    pub fn clear(&mut self) {
        self.dirs = Vec::new();
        self.source.release_all();
    }

    /// Bytes of memory held: the source's, the directories', the tracker's own.
    pub fn nbytes(&self) -> u64 {
        let own = size_of::<Self>() + self.dirs.capacity() * size_of::<Directory>();
        let dirs: u64 = self.dirs.iter().map(Directory::nbytes).sum();
        own as u64 + dirs + self.source.nbytes()
    }

    /// One row per order of [`Tracker::orders`].
    pub fn stats(&self) -> Vec<OrderStats> {
        self.orders()
            .map(|order| {
                let dir = &self.dirs[order.index()];
                OrderStats {
                    order,
                    folios: dir.len,
                    blocks: dir.blocks,
                    empty_blocks: dir.blocks_from(0).filter(|b| b.2 == 0).count() as u64,
                    bytes: dir.blocks * self.geometry.block_bytes() + dir.nbytes(),
                }
            })
            .collect()
    }

    /// An order's directory, made if need be.
    fn dir_mut(&mut self, order: Order) -> &mut Directory {
        for order in Order::all().take(order.index() + 1).skip(self.dirs.len()) {
            let valid = (self.geometry.page().pfn_limit() - 1) & !(order.nr_pages() - 1);
            self.dirs.push(Directory::new(!valid));
        }
        &mut self.dirs[order.index()]
    }

    /// Makes sure that a block exists.
    fn ensure(&mut self, order: Order, index: u64) -> Result<()> {
        self.dir_mut(order);
        self.dirs[order.index()].ensure(index, &mut *self.source, self.shape)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.source.release_all();
    }
}
