//! Adopts the bitmaps of a map that is taken over as blocks, in place.
//!
//! What lies in memory that others may write is trusted for nothing but its bits: a count is that of the moment when it
//! was made, and a bit that changes later is read as it is then.

#![forbid(unsafe_code)]

use super::block::{Block, Shape};
use super::{Tracker, simd};
use crate::error::{Error, Result};
use crate::parallel::{join, threads_for};
use crate::units::{Order, Pfn, Phys, merge_ranges};

/// A bitmap in memory: block `index` of an order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Bitmap {
    /// The order of its folios.
    pub order: Order,
    /// The index of its block in that order.
    pub index: u64,
    /// The physical address of the bitmap.
    pub phys: Phys,
}

impl Tracker {
    /// Makes bitmaps that lie in the tracker's source its blocks, without copying them. From here on the tracker is for
    /// reading: other code may write its blocks, and it must not.
    ///
    /// A bitmap that lies in a page which the tracker marks is copied after all: the page belongs to a folio whose owner
    /// may write it.
    ///
    /// Every bit is counted here, by as many threads as there are processors if there is enough for them.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] for a bitmap that is not in the source, [`Error::OutOfRange`] for one that begins beyond the
    /// address space, [`Error::Invalid`] for one whose block exists; the source's, for copies.
    ///
    /// Returns the bitmaps that were not copied.
    pub fn adopt(&mut self, bitmaps: &[Bitmap]) -> Result<Vec<Bitmap>> {
        let shape = self.shape;
        let mut blocks = Vec::with_capacity(bitmaps.len());
        for bitmap in bitmaps {
            let (len, limit) = (shape.bytes() as u64, self.geometry.index_limit(bitmap.order));
            if bitmap.index >= limit {
                return Err(Error::OutOfRange { what: "block", value: bitmap.index, limit });
            }
            let outside = Error::OutsideMemory { what: "bitmap", phys: bitmap.phys.0, len };
            blocks.push(Block::at(&*self.source, bitmap.phys, shape).ok_or(outside)?);
        }
        let counts = counts(&blocks, shape, threads_for(blocks.len() * shape.bytes()));
        for ((bitmap, block), count) in bitmaps.iter().zip(blocks).zip(counts) {
            let whole = self.whole(bitmap.order);
            if !self.dirs[bitmap.order.index()].adopt(bitmap.index, block, self.shape, count, whole) {
                let why = format!("there are two of order {} at {:#x}", bitmap.order, bitmap.index);
                return Err(Error::Invalid { what: "bitmap", why });
            }
        }
        self.keep_written(bitmaps)
    }

    /// Copies the blocks of adopted bitmaps that lie in pages which are marked.
    fn keep_written(&mut self, bitmaps: &[Bitmap]) -> Result<Vec<Bitmap>> {
        let (page, shape) = (self.geometry.page(), self.shape);
        let pages = |bitmap: &Bitmap| {
            let last = Phys(bitmap.phys.0 + (shape.bytes() as u64 - 1));
            (page.pfn(bitmap.phys), Pfn(page.pfn(last).0 + 1))
        };
        // In most maps there is none, which is soon said of bitmaps side by side.
        let runs = merge_ranges(bitmaps.iter().map(pages).collect());
        if runs.iter().all(|(start, end)| self.overlapping(*start, *end).is_none()) {
            return Ok(bitmaps.to_vec());
        }
        let is_marked = |bitmap: &&Bitmap| {
            let (start, end) = pages(bitmap);
            self.overlapping(start, end).is_some()
        };
        let (marked, unmarked): (Vec<Bitmap>, Vec<Bitmap>) = bitmaps.iter().partition(is_marked);
        for Bitmap { order, index, .. } in marked {
            let copy = Block::allocate(&*self.source, shape)?;
            let dir = &mut self.dirs[order.index()];
            if let Some(block) = dir.get(index) {
                block.words(shape).enumerate().for_each(|(n, word)| copy.store(shape, n, word));
                dir.replace(index, copy);
            }
        }
        Ok(unmarked)
    }
}

/// How many bits each block has set, counted by up to `threads` threads.
fn counts(blocks: &[Block], shape: Shape, threads: usize) -> Vec<u64> {
    if threads < 2 {
        return blocks.iter().map(|block| simd::count(*block, shape)).collect();
    }
    let (few, more) = (threads / 2, threads - threads / 2);
    let (first, second) = blocks.split_at(blocks.len() / threads * few);
    let (mut counts, others) = join(|| counts(first, shape, few), || counts(second, shape, more));
    counts.extend(others);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::Geometry;
    use crate::units::PageSize;

    #[test]
    fn what_is_on_the_heap_has_no_place_and_cannot_be_adopted() {
        let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
        t.preserve(Pfn(7), Order::ZERO).unwrap();
        assert!(t.places_from(Order::ZERO, 0, [[0; 2]][..].as_mut().into()).is_err());
        let bitmap = Bitmap { order: Order::ZERO, index: 1, phys: Phys(0x1000) };
        assert!(matches!(t.adopt(&[bitmap]), Err(Error::OutsideMemory { .. })));
        assert!(matches!(t.adopt(&[Bitmap { index: 1 << 40, ..bitmap }]), Err(Error::OutOfRange { .. })));
        assert_eq!(t.len(), 1);
    }

    #[test]
    fn every_way_of_counting_counts_the_same() {
        for page in PageSize::ALL {
            let mut t = Tracker::new(Geometry::paged(page));
            let mut x = 1u64;
            for _ in 0..3000 {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                t.preserve(Pfn((x >> 33) % (3 * t.geometry().bits())), Order::ZERO).unwrap();
            }
            t.preserve_run(Pfn(t.geometry().bits() - 100), Order::ZERO, 200).unwrap();
            let blocks: Vec<_> = t.dirs[0].blocks_from(0).collect();
            let bit_by_bit = |block: Block| block.words(t.shape).map(|word| u64::from(word.count_ones())).sum();
            for threads in [0, 1, 2, 3, 7, 1000] {
                let counted = counts(&blocks.iter().map(|b| b.1).collect::<Vec<_>>(), t.shape, threads);
                assert!(counted.iter().copied().eq(blocks.iter().map(|b| bit_by_bit(b.1))));
            }
        }
    }
}
