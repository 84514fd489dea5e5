//! Trackers as sets: union, intersection, difference, symmetric difference, and what follows from their sizes.
//!
//! Block sizes may differ: everything goes by chunks of [`CHUNK`] words, which both sizes are multiples of.

use super::block::Block;
use super::{Geometry, HeapBlocks, Tracker};
use crate::error::{Error, Result};
use crate::units::Order;
use core::fmt;
use std::alloc::{Layout, handle_alloc_error};

/// Words in the smallest block.
const CHUNK: usize = Geometry::SMALL as usize / 8;

impl Tracker {
    /// Marks what `other` marks. Returns how many folios that added.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the page sizes differ, and the source's; then nothing is marked that was not before.
    pub fn union_with(&mut self, other: &Tracker) -> Result<u64> {
        self.combine(other, true, |mine, theirs| mine | theirs).map(|(added, _)| added)
    }

    /// Unmarks what `other` does not mark. Returns how many folios that removed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the page sizes differ.
    pub fn intersect_with(&mut self, other: &Tracker) -> Result<u64> {
        self.combine(other, false, |mine, theirs| mine & theirs).map(|(_, removed)| removed)
    }

    /// Unmarks what `other` marks. Returns how many folios that removed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the page sizes differ.
    pub fn subtract(&mut self, other: &Tracker) -> Result<u64> {
        self.combine(other, false, |mine, theirs| mine & !theirs).map(|(_, removed)| removed)
    }

    /// Flips what `other` marks. Returns how many folios that added and how many it removed.
    ///
    /// # Errors
    /// As [`Tracker::union_with`].
    pub fn symmetric_difference_with(&mut self, other: &Tracker) -> Result<(u64, u64)> {
        self.combine(other, true, |mine, theirs| mine ^ theirs)
    }

    /// Whether `other` marks everything that this tracker marks. Never, unless empty, when the page sizes differ.
    pub fn is_subset(&self, other: &Tracker) -> bool {
        self.intersection_len(other) == self.len()
    }

    /// Whether no folio is in both.
    pub fn is_disjoint(&self, other: &Tracker) -> bool {
        self.common(other).next().is_none()
    }

    /// How many folios are in both. None are when the page sizes differ.
    pub fn intersection_len(&self, other: &Tracker) -> u64 {
        self.common(other).map(|w| u64::from(w.count_ones())).sum()
    }

    /// How many folios are in either.
    pub fn union_len(&self, other: &Tracker) -> u64 {
        // Saturating, because bits of a map that was taken over may change after they were counted.
        (self.len() + other.len()).saturating_sub(self.intersection_len(other))
    }

    /// The words, none of them zero, of the intersection.
    fn common<'a>(&'a self, other: &'a Tracker) -> impl Iterator<Item = u64> + 'a {
        let comparable = self.geometry.page() == other.geometry.page();
        let orders = Order::all().zip(&self.dirs).filter(move |_| comparable);
        orders.flat_map(move |(order, dir)| {
            let blocks = dir.blocks_from(0).filter(|b| b.2 > 0);
            blocks.flat_map(move |(index, block, _)| {
                self.chunks(index).flat_map(move |(at, chunk)| {
                    let theirs = other.chunk(order, chunk);
                    theirs.into_iter().flat_map(move |(their, their_at)| {
                        (0..CHUNK).filter_map(move |n| {
                            let word = block.load(self.shape, at + n) & their.load(other.shape, their_at + n);
                            (word != 0).then_some(word)
                        })
                    })
                })
            })
        })
    }

    /// A block's chunks: the first word of each in the block, and its number in the order.
    fn chunks(&self, index: u64) -> impl Iterator<Item = (usize, u64)> + use<> {
        let per_block = self.shape.words() / CHUNK;
        (0..per_block).map(move |n| (n * CHUNK, index * per_block as u64 + n as u64))
    }

    /// The block that holds a chunk, if it exists and has anything set, and the chunk's first word in it.
    fn chunk(&self, order: Order, chunk: u64) -> Option<(Block, usize)> {
        let per_block = (self.shape.words() / CHUNK) as u64;
        let (block, count) = self.dirs.get(order.index())?.get(chunk / per_block)?;
        (count > 0).then_some((block, (chunk % per_block) as usize * CHUNK))
    }

    /// Sets every word to `op(mine, theirs)`; with `grow` in `other`'s blocks too, else only in those of this tracker.
    /// Returns the bits set and the bits cleared.
    fn combine(&mut self, other: &Tracker, grow: bool, op: impl Fn(u64, u64) -> u64) -> Result<(u64, u64)> {
        if self.geometry.page() != other.geometry.page() {
            return Err(Error::Invalid {
                what: "trackers",
                why: format!("pages of {} and of {} do not compare", self.geometry.page(), other.geometry.page()),
            });
        }
        if grow {
            self.ensure_chunks(other)?;
        }
        let shape = self.shape;
        let only_theirs_matter = op(!0, 0) == !0;
        let (mut added, mut removed) = (0, 0);
        for (order, mut dir) in Order::all().zip(core::mem::take(&mut self.dirs)) {
            for (index, block, count) in dir.blocks_mut() {
                for (at, chunk) in self.chunks(index) {
                    let theirs = other.chunk(order, chunk);
                    if theirs.is_none() && only_theirs_matter {
                        continue;
                    }
                    for n in 0..CHUNK {
                        let old = block.load(shape, at + n);
                        let their = theirs.map_or(0, |(b, b_at)| b.load(other.shape, b_at + n));
                        let new = op(old, their);
                        block.store(shape, at + n, new);
                        let (plus, minus) = ((new & !old).count_ones(), (old & !new).count_ones());
                        *count = *count + u64::from(plus) - u64::from(minus);
                        added += u64::from(plus);
                        removed += u64::from(minus);
                    }
                }
            }
            dir.recount();
            self.dirs.push(dir);
        }
        Ok((added, removed))
    }

    /// Makes the blocks that hold whatever `other` marks.
    fn ensure_chunks(&mut self, other: &Tracker) -> Result<()> {
        let per_block = (self.shape.words() / CHUNK) as u64;
        for (order, dir) in Order::all().zip(&other.dirs) {
            for (index, block, _) in dir.blocks_from(0).filter(|b| b.2 > 0) {
                for (at, chunk) in other.chunks(index) {
                    if (0..CHUNK).any(|n| block.load(other.shape, at + n) != 0) {
                        self.ensure(order, chunk / per_block)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A copy on the heap, of every block, the empty ones too.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn try_clone(&self) -> Result<Tracker> {
        let mut copy = Tracker::with_source(self.geometry, Box::new(HeapBlocks::default()));
        for order in self.orders() {
            for block in self.blocks(order) {
                copy.ensure(order, block.index())?;
                copy.merge_block(order, block.index(), block.words());
            }
        }
        Ok(copy)
    }
}

/// Copies to the heap; aborts, as allocation does, when there is none left ([`Tracker::try_clone`] returns).
impl Clone for Tracker {
    fn clone(&self) -> Self {
        self.try_clone().unwrap_or_else(|_| handle_alloc_error(Layout::new::<Tracker>()))
    }
}

/// The same folios and page size, whatever the block size and the empty blocks.
impl PartialEq for Tracker {
    fn eq(&self, other: &Self) -> bool {
        self.geometry.page() == other.geometry.page()
            && Order::all().all(|order| self.len_of(order) == other.len_of(order))
            && self.is_subset(other)
    }
}

impl Eq for Tracker {}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").field("geometry", &self.geometry).field("len", &self.len()).finish_non_exhaustive()
    }
}
